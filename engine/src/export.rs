//! `export`: one backup to another repository, or as the files that pg_basebackup would have written (`export/files.rs`).

mod archives;
mod files;

use std::fmt;
use std::num::NonZeroUsize;

use serde::Serialize;

pub use files::{FileFormat, FilesOptions, FilesPlan, FilesReport, plan_files, to_files};

use crate::chunk::Compression;
use crate::error::Result;
use crate::progress::Progress;
use crate::repo::{BackupSummary, ClusterName, Repository};

/// What to export to another repository and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name, in both repositories.
    pub cluster: ClusterName,
    /// The backup: an id, a unique prefix of one, `latest`, `oldest` or `latest-full`.
    pub backup: String,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress what has to be compressed again.
    pub compression: Compression,
}

/// What an export to a repository did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backup, as it is in the other repository.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// The other repository.
    pub to: String,
    /// Whether it was there already.
    pub already_there: bool,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from this repository.
    pub bytes_read: u64,
    /// Bytes written to the other one.
    pub bytes_written: u64,
}

/// What an export is going to do.
pub struct Plan<'r> {
    _repo: &'r Repository,
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        unimplemented!()
    }
}

/// Decides what to copy, without writing.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup.
pub fn plan<'r>(_from: &'r Repository, _to: &'r Repository, _options: &Options) -> Result<Plan<'r>> {
    unimplemented!()
}

/// Copies one backup to another repository, with what of its data is missing there.
///
/// # Errors
/// As [`plan`]; `Conflict` if the other repository has another cluster of that name.
pub fn to_repository(
    _from: &Repository,
    _to: &Repository,
    _options: &Options,
    _progress: &dyn Progress,
) -> Result<Report> {
    unimplemented!()
}
