//! `merge`: a full backup out of what the repository holds.

use std::fmt;
use std::num::NonZeroUsize;

use serde::Serialize;

use crate::chunk::Compression;
use crate::error::Result;
use crate::progress::Progress;
use crate::repo::{BackupId, BackupSummary, ClusterName, Repository};

/// What to merge and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The backup to make a full one of: an id, a unique prefix of one, `latest`, `oldest` or `latest-full`.
    pub backup: String,
    /// Whether to copy its data into packs of its own, in the order of the files.
    pub repack: bool,
    /// Whether to read and check every byte that the backup needs first.
    pub verify: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress what has to be compressed again by repacking.
    pub compression: Compression,
    /// The user's own words; those of the merged backup if there are none.
    pub note: Option<String>,
}

/// What a merge did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The new backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
}

/// What a merge is going to do.
pub struct Plan<'r> {
    _repo: &'r Repository,
    _merged: BackupId,
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        unimplemented!()
    }
}

/// Decides what to write, without writing.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup.
pub fn plan<'r>(_repo: &'r Repository, _options: &Options) -> Result<Plan<'r>> {
    unimplemented!()
}

/// Makes a full backup out of what the repository holds.
///
/// # Errors
/// As [`plan`]; then there is no new backup.
pub fn run(_repo: &Repository, _options: &Options, _progress: &dyn Progress) -> Result<Report> {
    unimplemented!()
}
