//! `export --format plain|tar`: a backup as `pg_basebackup -X stream` would have written it when the backup was made.
//!
//! ```text
//! plain   the data directory and its tablespaces                                  (extract/tree.rs)
//! tar     base.tar, OID.tar for each tablespace outside, pg_wal.tar, backup_manifest      (archives.rs)
//! ```
//!
//! Unlike a restore, nothing is made safe: the settings, the signal files and the configuration are the source's. A server that is
//! started on such a directory goes on with the source's timeline, archives where the source archives, and follows whom the source
//! follows. That is what the tools want that take over from `pg_basebackup`: they write settings of their own.
//!
//! What differs from `pg_basebackup`:
//!
//! * The last WAL segment holds zeros from the backup's stop on, as the backup does; PostgreSQL takes it for one that was being written. So only
//!   the segments before it, which nobody will write to again, and the timeline histories are marked as archived (`archive_status/*.done`).
//! * Histories are there of the backup's timeline alone, and files that only the source's links led to are there as files (`source`).
//! * Modification times are not in a backup: `backup_manifest` and the archives say when the backup was consistent.
//! * A stopped cluster's backup has no `backup_label`: what is written is the stopped cluster, with a `backup_manifest` besides. It starts
//!   without recovery, which would make the files of unlogged relations; they are made here (`extract/unlogged.rs`).
//! * Configuration files from outside the data directory are in our backups. `pg_basebackup` does not see them: they are left out, and a
//!   notice says so.
//!
//! PostgreSQL: `src/backend/backup/basebackup.c` (up to 14: `src/backend/replication/basebackup.c`), `perform_base_backup`;
//! `src/bin/pg_basebackup/pg_basebackup.c`, `receivelog.c`, `mark_file_as_archived`.

use std::cell::RefCell;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use super::archives::Archives;
use crate::error::{Error, Result};
use crate::extract::{CONF, Chosen, MAX_CONF_LEN, REPLACED, TargetFiles, Tree, Written};
use crate::pg::{WalSegmentName, WalSegmentSize, parse_history_file_name};
use crate::progress::Progress;
use crate::repo::{BackupSummary, ClusterName, FileEntry, FileKind, Lease, Manifest, Operation, Repository};
use crate::restore::config;

/// What files an export makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileFormat {
    /// A data directory, as of `pg_basebackup -Fp`.
    Plain,
    /// Archives, as of `pg_basebackup -Ft`.
    Tar,
}

impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            FileFormat::Plain => "plain",
            FileFormat::Tar => "tar",
        })
    }
}

/// Where to export to and how.
#[derive(Clone, Debug)]
pub struct FilesOptions {
    /// The new data directory, or the directory of the archives: empty, or not there.
    pub target: PathBuf,
    /// What to write.
    pub format: FileFormat,
    /// New directories of tablespaces, by their old ones. Archives only name them, in `tablespace_map`.
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
    form: Form<'r>,
    left_out: Vec<String>,
    jobs: Option<NonZeroUsize>,
}

enum Form<'r> {
    Plain(Tree<'r>),
    Tar(Archives<'r>),
}

impl fmt::Display for FilesPlan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.form {
            Form::Plain(tree) => write!(f, "export {tree}")?,
            Form::Tar(archives) => write!(f, "export {archives}")?,
        }
        match self.left_out.as_slice() {
            [] => Ok(()),
            names => write!(f, "\n  left out: {}", names.join(", ")),
        }
    }
}

/// Decides what to export and where, without changing anything.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup, `Invalid` for a target in use, `Unavailable` for one without room.
pub fn plan_files<'r>(
    repo: &'r Repository,
    cluster: &ClusterName,
    backup: &str,
    options: &FilesOptions,
) -> Result<FilesPlan<'r>> {
    let mut chosen = Chosen::find(repo, cluster, backup)?;
    chosen.starts_as_it_is = chosen.manifest.offline;
    let left_out = RefCell::new(Vec::new());
    let choose = |_: &Manifest, _: &TargetFiles, entry: FileEntry| {
        if entry.kind == FileKind::External {
            left_out.borrow_mut().push(entry.display_path().trim_start_matches('/').escape_debug().to_string());
        }
        belongs(&entry).then_some(entry)
    };
    let FilesOptions { target, tablespace_map, .. } = options;
    let form = match options.format {
        FileFormat::Plain => Form::Plain(Tree::plan(chosen, target, tablespace_map, &choose)?),
        FileFormat::Tar => Form::Tar(Archives::plan(chosen, target, tablespace_map, &choose)?),
    };
    Ok(FilesPlan { form, left_out: left_out.into_inner(), jobs: options.jobs })
}

/// Whether `pg_basebackup` would have written the file, and we have no other of that name.
fn belongs(entry: &FileEntry) -> bool {
    entry.kind != FileKind::External && !REPLACED.contains(&entry.path.as_slice())
}

/// Exports a backup.
///
/// # Errors
/// As [`plan_files`]; and `Corrupt` for damage in the repository. Then the data directory cannot be started, and the archives do not have their
/// names.
pub fn to_files(
    repo: &Repository,
    cluster: &ClusterName,
    backup: &str,
    options: &FilesOptions,
    progress: &dyn Progress,
) -> Result<FilesReport> {
    let begun = Instant::now();
    let notice = |text: &str| progress.notice(text);
    let (_lease, backup) = Lease::of_backup(repo, cluster, backup, Operation::Export, &notice)?;
    plan_files(repo, cluster, &backup.id.to_string(), options)?.execute(begun, progress)
}

impl FilesPlan<'_> {
    fn execute(self, begun: Instant, progress: &dyn Progress) -> Result<FilesReport> {
        let (written, format) = match &self.form {
            Form::Plain(tree) => (tree.write(self.jobs, progress, || add_files(tree, progress))?, FileFormat::Plain),
            Form::Tar(archives) => (archives.write(self.jobs, progress)?, FileFormat::Tar),
        };
        let Written { bytes_read, bytes_written } = written;
        if !self.left_out.is_empty() {
            progress.notice(&format!(
                "left out, as they lay outside the data directory, where pg_basebackup does not look: {}",
                self.left_out.join(", ")
            ));
        }
        let (chosen, target, files) = match self.form {
            Form::Plain(tree) => (tree.chosen, tree.target, Vec::new()),
            Form::Tar(archives) => archives.into_parts(),
        };
        let target = target.root().to_owned();
        let seconds = begun.elapsed().as_secs_f64();
        Ok(FilesReport { backup: chosen.backup, target, format, files, seconds, bytes_read, bytes_written })
    }
}

/// Adds what `pg_basebackup` makes in a plain directory. There the links lead to the tablespaces, so it has no `tablespace_map`.
fn add_files(tree: &Tree<'_>, progress: &dyn Progress) -> Result<()> {
    let owner = tree.chosen.default_owner();
    let mut added: Vec<(&[u8], Vec<u8>)> = Vec::new();
    if let Some(label) = &tree.chosen.manifest.backup_label {
        tree.target.write_file(b"backup_label", &label.0, owner)?;
        added.push((b"backup_label", label.0.clone()));
    }
    for mark in archived_marks(&tree.chosen, tree.files())? {
        tree.target.write_file(&mark, b"", owner)?;
    }
    warn_of_original(tree, progress)?;
    tree.write_pg_manifest(&added, |_| true)
}

/// Says which settings would make a server on this directory work on the source's files.
fn warn_of_original(tree: &Tree<'_>, progress: &dyn Progress) -> Result<()> {
    if !tree.has(CONF) {
        return Ok(());
    }
    let confined = config::confined(&tree.target.read_file(CONF, MAX_CONF_LEN)?);
    for line in confined.into_iter().flat_map(|(_, lines)| lines) {
        progress.notice(&format!("change this in the exported postgresql.conf, as it leads to the original: {line}"));
    }
    Ok(())
}

/// Paths of the marks, by which a server knows which of its WAL files are archived already.
pub(super) fn archived_marks(chosen: &Chosen<'_>, files: &TargetFiles) -> Result<Vec<Vec<u8>>> {
    let manifest = &chosen.manifest;
    if manifest.offline {
        return Ok(Vec::new());
    }
    let size = WalSegmentSize::new(manifest.wal_segment_size)
        .ok_or_else(|| Error::corrupt(manifest.id.to_string(), "its WAL segments have an impossible size"))?;
    let is_over = |name: &[u8]| match WalSegmentName::parse(name, size) {
        Some(WalSegmentName { segment, .. }) => {
            segment.next().and_then(|next| size.start_of(next)).is_some_and(|end| end <= manifest.stop_lsn)
        }
        None => parse_history_file_name(name).is_some(),
    };
    let wal = files.iter().filter(|file| file.kind == FileKind::Wal);
    let names = wal.filter_map(|file| file.path.strip_prefix(b"pg_wal/"));
    Ok(names.filter(|name| is_over(name)).map(|name| [b"pg_wal/archive_status/", name, b".done"].concat()).collect())
}
