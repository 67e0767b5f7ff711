//! `backup`: from a running or stopped cluster to one more backup in the repository.
//!
//! ```text
//! plan      open the server and the data directory, see that they belong together, choose the parent
//! start     pg_backup_start; a temporary slot keeps the WAL
//! list      only now: what appears later is in the WAL
//! detect    which blocks may have changed since the parent (backup/changes.rs)
//! copy      every file but pg_control, compared with the parent (backup/copy.rs); what is finished goes into the file table
//! control   pg_control, last
//! stop      pg_backup_stop; its backup_label and tablespace_map are part of the backup
//! WAL       from start to stop, out of pg_wal (backup/wal.rs), proved record by record; void if replay could not repeat it
//! commit    the rest of the file table, then the manifest: now it is a backup
//! ```
//!
//! A backup that fails anywhere is no backup: its packs are removed again, or stay, where the run was killed, as litter that no
//! manifest names. The server's side ends with the session: closing the connection ends backup mode and drops the slot.
//!
//! What goes wrong, and who notices: the session breaks (each worker asks before each slice; `pg_backup_stop` at the latest), the standby is
//! promoted (`pg_backup_stop`), pages are damaged (`backup/judge.rs`), the parent's packs are not all there (the plan; then a full
//! backup is made, and said so), the parent's metadata is damaged (the copy; the backup fails).
//!
//! Rooms within: `plan` decides, `run` does one step after another, `commit` makes it a backup.

mod advice;
mod audit;
mod changes;
mod commit;
mod copy;
mod feed;
mod habit;
mod judge;
mod order;
mod part;
mod plan;
mod rate;
mod run;
mod salvage;
mod summaries;
mod wal;

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

pub(crate) use self::advice::SWITCH_ON_SUMMARIES;
pub use self::audit::{AuditReport, Cause, MissedBlock};
pub(crate) use self::changes::{Forecast, Question};
pub(crate) use self::habit::{LogHabit, usual_gap};
pub use self::plan::{Plan, plan};
use self::plan::{Source, must_be_stopped, open_source};
pub(crate) use self::plan::{connect, must_be_the_same_cluster, must_belong_together, must_lie_elsewhere, other_names};
use self::run::{Attempt, Run};
pub use crate::chunk::Compression;
pub use crate::detect::DetectorChoice;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::repo::{BackupSummary, ClusterName, Repository};

/// How often a backup is tried that something in the meantime made void.
const ATTEMPTS: u32 = 3;

/// What to do where the repository's disk is full.
const MAKE_ROOM: &str = "the repository's disk is full: make room, or remove old backups with `pgstrata expire`, which works with no byte free";

/// What to compare with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ParentChoice {
    /// The newest backup of the cluster; a full backup if there is none.
    #[default]
    Automatic,
    /// Nothing: store everything.
    Full,
    /// The newest full backup.
    Differential,
    /// This one.
    Named(String),
}

/// What to back up and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The data directory; what the server says if it is not given.
    pub data_dir: Option<PathBuf>,
    /// How to reach the server, as for libpq; the environment and the data directory's `postmaster.pid` fill the gaps.
    pub conninfo: Option<String>,
    /// What to compare with.
    pub parent: ParentChoice,
    /// How to find what may have changed.
    pub detector: DetectorChoice,
    /// A directory with the cluster's archived WAL, as an `archive_command` fills it.
    pub wal_archive: Option<PathBuf>,
    /// Whether to scan whatever the detector says, and to report what it would have missed.
    pub audit: bool,
    /// How many incremental backups in a row may go without an audit.
    pub audit_every: Option<NonZeroU32>,
    /// Whether the cluster is stopped.
    pub offline: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress.
    pub compression: Compression,
    /// Bytes to read a second at most.
    pub max_rate: Option<NonZeroU64>,
    /// The user's own words; an empty text is no note.
    pub note: Option<String>,
}

/// What a backup did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the cluster.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
    /// Damage in the repository that came to light, none of it in this backup.
    pub repository_damage: Vec<String>,
    /// What an audit found, if there was one.
    pub audit: Option<AuditReport>,
}

/// Makes a backup.
///
/// # Errors
/// Whatever made it fail; then there is no new backup, and the old ones are untouched.
pub fn run(repo: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    make(repo, options, progress).map_err(|error| match is_full(&error) {
        true => error.hint(MAKE_ROOM),
        false => error,
    })
}

/// Whether a disk is full; a backup writes to that of the repository alone.
fn is_full(error: &Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let kind = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(kind, Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        source = cause.source();
    }
    false
}

fn make(repo: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let mut options = options.clone();
    let mut repository_damage = Vec::new();
    for attempts_left in (0..ATTEMPTS).rev() {
        let run = Run::begin(repo, &options, progress)?;
        for notice in &run.plan.notices {
            progress.notice(notice);
        }
        let (id, compared) = (run.id, run.plan.parent.is_some());
        // Held until the packs of a run that fails are removed: before that, the next one would take them over.
        let _lease = Arc::clone(&run.lease);
        let attempt = run.execute(begun).inspect_err(|_| {
            // A full disk must not stay full of a backup that there is not; what cannot be removed is litter.
            let _ = repo.discard(&options.cluster, id);
        });
        match attempt {
            Ok(Attempt::Done(mut report)) => {
                report.repository_damage.append(&mut repository_damage);
                return Ok(*report);
            }
            Ok(Attempt::Void(why)) if attempts_left > 0 => {
                repo.discard(&options.cluster, id)?;
                progress.notice(&format!("{why}, which a restore could not repeat; taking the backup again"));
            }
            Ok(Attempt::Void(why)) => {
                repo.discard(&options.cluster, id)?;
                let error = Error::new(ErrorKind::Postgres, format!("{why}; the backup is void"));
                return Err(error.hint("run it when no databases are copied or moved and no tablespaces created"));
            }
            Err(error) if compared && attempts_left > 0 && is_damaged_parent(&options, &error) => {
                progress.notice(&format!("taking a full backup: the parent cannot be read: {error}"));
                repository_damage.push(error.to_string());
                options.parent = ParentChoice::Full;
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::bug("a backup was tried no times"))
}

/// Whether an automatic backup failed because what it inherits from is damaged.
fn is_damaged_parent(options: &Options, error: &Error) -> bool {
    let in_repository = error.place().is_some_and(|place| place.starts_with("clusters/"));
    options.parent == ParentChoice::Automatic && error.kind() == ErrorKind::Corrupt && in_repository
}

/// Checks that a backup into the repository at `repo` is possible, which need not be there yet; changes nothing. [`crate::check`] asks the same
/// questions, and more, and goes on after the first that is answered badly.
///
/// # Errors
/// What makes it impossible.
pub fn check(options: &Options, repo: &Path) -> Result<()> {
    let source = open_source(options)?;
    must_lie_elsewhere(source.data_dir(), repo)?;
    let (_, control) = source.data_dir().read_control()?;
    match source {
        Source::Live { .. } => Ok(()),
        Source::Offline { data_dir } => must_be_stopped(&data_dir, &control),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let of = |kind: std::io::ErrorKind| Error::io("write", Path::new("/backup/pg/x"), kind.into());
        assert!(is_full(&of(std::io::ErrorKind::StorageFull)) && is_full(&of(std::io::ErrorKind::QuotaExceeded)));
        assert!(is_full(&Error::invalid("no").because(of(std::io::ErrorKind::StorageFull))));
        assert!(!is_full(&of(std::io::ErrorKind::PermissionDenied)) && !is_full(&Error::invalid("no")));
    }
}
