//! A backup as the files that `pg_basebackup` would have written.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::Result;
use crate::progress::Progress;
use crate::repo::{BackupSummary, ClusterName, Repository};

/// What files an export makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileFormat {
    /// A data directory, as of `pg_basebackup -Fp`.
    Plain,
    /// Archives, as of `pg_basebackup -Ft`.
    Tar,
}

/// Where to export to and how.
#[derive(Clone, Debug)]
pub struct FilesOptions {
    /// The new data directory, or the directory of the archives: empty, or not there.
    pub target: PathBuf,
    /// What to write.
    pub format: FileFormat,
    /// New directories of tablespaces, by their old ones.
    pub tablespace_map: Vec<(PathBuf, PathBuf)>,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// What an export did.
#[derive(Debug, Serialize)]
pub struct FilesReport {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// The directory that was written.
    pub target: PathBuf,
    /// What was written.
    pub format: FileFormat,
    /// The names of the archives and the manifest; none for a data directory.
    pub files: Vec<String>,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes of the files or archives.
    pub bytes_written: u64,
}

/// What an export is going to do.
pub struct FilesPlan<'r> {
    _repo: &'r Repository,
}

impl fmt::Display for FilesPlan<'_> {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        unimplemented!()
    }
}

/// Decides what to export and where, without changing anything.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup, `Invalid` for a target in use.
pub fn plan_files<'r>(
    _repo: &'r Repository,
    _cluster: &ClusterName,
    _backup: &str,
    _options: &FilesOptions,
) -> Result<FilesPlan<'r>> {
    unimplemented!()
}

/// Exports a backup.
///
/// # Errors
/// As [`plan_files`].
pub fn to_files(
    _repo: &Repository,
    _cluster: &ClusterName,
    _backup: &str,
    _options: &FilesOptions,
    _progress: &dyn Progress,
) -> Result<FilesReport> {
    unimplemented!()
}
