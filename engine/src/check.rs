//! `check`: what a backup would stumble over tonight, and what would make it cheaper, said today.
//!
//! ```text
//! repository   it opens, it can be written to, no lock is damaged, its manifests read, their packs are there  (check/repository.rs)
//! server       it answers, it runs on the data directory, the role may back it up, every file can be read      (check/server.rs)
//! both         the repository is of this cluster, lies elsewhere, has room for it                              (check/both.rs)
//! next         which detector the next incremental would use, and what would spare it the scan                 (check/next.rs)
//! ```
//!
//! It asks what [`backup`](mod@crate::backup) asks, with the same functions, but goes on after a bad answer: each answer is a [`Finding`], and who reads them learns of
//! three things to mend in one run. What can only be asked once an earlier question is answered (the files of a directory that is not there) is left out.
//!
//! Nothing is changed: the server is only queried and not put into backup mode, and what is written to the repository is one lease, which is taken away again at
//! once. No page and no pack is read: whether what is stored is sound is told by [`verify`](mod@crate::verify).
//!
//! What goes wrong: an answer may be old when the backup begins. So no backup trusts a check; it asks again.

mod both;
mod next;
mod repository;
mod server;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::repo::{BackupId, BackupType, ClusterName};

/// What to look at.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The data directory; what the server says if it is not given.
    pub data_dir: Option<PathBuf>,
    /// How to reach the server, as for [`backup`](mod@crate::backup).
    pub conninfo: Option<String>,
    /// A directory with the cluster's archived WAL.
    pub wal_archive: Option<PathBuf>,
}

/// How an answer is; the worst of all is that of the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    #[default]
    Ok,
    /// A backup works; something costs more than it has to, or will not go well for ever.
    Warning,
    /// A backup works; what the repository holds is damaged.
    Damage,
    /// A backup would fail.
    Failed,
    /// The repository cannot be read.
    Unreadable,
}

impl Verdict {
    /// One word of three, for people and programs.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Damage | Verdict::Failed | Verdict::Unreadable => "failed",
        }
    }

    /// Whether a backup would work, as far as this can tell.
    pub fn allows_a_backup(self) -> bool {
        self < Verdict::Failed
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// What an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// Where the backups are.
    Repository,
    /// The cluster, its server and its directory.
    Server,
    /// The next incremental backup.
    Next,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// Which question it answers: one word, always the same.
    pub check: &'static str,
    /// How it is.
    pub status: Verdict,
    /// The answer.
    pub message: String,
    /// What to do, where there is something to do.
    pub hint: Option<String>,
}

/// What was found, in numbers; what could not be found out is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// The repository's format.
    pub repository_format: Option<u32>,
    /// Backups of this cluster whose manifests can be read.
    pub backup_count: Option<u64>,
    /// The newest of them.
    pub newest_backup: Option<BackupId>,
    /// What kind of backup that is.
    pub newest_type: Option<BackupType>,
    /// How long ago it was consistent.
    pub newest_age_seconds: Option<u64>,
    /// Bytes that the repository's file system has room for.
    pub free_bytes: Option<u64>,
    /// PostgreSQL's version.
    pub postgres_version: Option<String>,
    /// The cluster's identity, decimal.
    pub system_identifier: Option<String>,
    /// Whether the server is a standby.
    pub is_standby: Option<bool>,
    /// Whether pages carry checksums.
    pub data_checksums: Option<bool>,
    /// Bytes of the files that a backup holds.
    pub cluster_bytes: Option<u64>,
    /// Bytes of relation files among them, which a scan reads.
    pub relation_bytes: Option<u64>,
    /// Bytes of WAL since the newest backup began.
    pub wal_bytes: Option<u64>,
    /// Bytes of the blocks that the last incremental backup found changed.
    pub last_changed_bytes: Option<u64>,
    /// The detector that the next incremental backup would use, if it is one.
    pub detector: Option<String>,
    /// Why that one.
    pub detector_reason: Option<String>,
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst of the answers.
    pub status: Verdict,
    /// Whether a backup would work, as far as this can tell.
    pub backup_possible: bool,
    /// The answers, by what they are about.
    pub checks: Vec<Finding>,
    /// The numbers.
    #[serde(flatten)]
    pub facts: Facts,
    /// How long it took.
    pub seconds: f64,
}

/// Looks at the repository in `repo`, at the server, and at what the next backup would do.
pub fn run(repo: &Path, options: &Options, progress: &dyn Progress) -> Report {
    let begun = Instant::now();
    let mut sheet = Sheet::default();
    let stored = repository::look(repo, options, &mut sheet);
    let live = server::look(options, progress, &mut sheet);
    both::look(repo, stored.as_ref(), live.as_ref(), options, &mut sheet);
    if let (Some(stored), Some(live)) = (&stored, &live) {
        next::look(stored, live, options, &mut sheet);
    }
    sheet.into_report(begun)
}

/// The answers so far.
#[derive(Debug, Default)]
struct Sheet {
    found: Vec<Finding>,
    facts: Facts,
}

impl Sheet {
    fn add(&mut self, area: Area, check: &'static str, status: Verdict, message: String, hint: Option<String>) {
        self.found.push(Finding { area, check, status, message, hint });
    }

    fn ok(&mut self, area: Area, check: &'static str, message: impl Into<String>) {
        self.add(area, check, Verdict::Ok, message.into(), None);
    }

    fn warn(&mut self, area: Area, check: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.add(area, check, Verdict::Warning, message.into(), Some(hint.into()));
    }

    fn error(&mut self, area: Area, check: &'static str, status: Verdict, error: &Error) {
        self.add(area, check, status, error.to_string(), error.hint_text().map(str::to_owned));
    }

    /// The value, or nothing, and an answer that says why.
    fn need<T>(&mut self, area: Area, check: &'static str, result: Result<T>) -> Option<T> {
        // What a backup cannot read of the repository ends it with the code of an unreadable one; what it cannot read of the cluster does not.
        let status = |error: &Error| match (area, error.kind()) {
            (Area::Repository, ErrorKind::Corrupt | ErrorKind::Unavailable) => Verdict::Unreadable,
            _ => Verdict::Failed,
        };
        result.inspect_err(|error| self.error(area, check, status(error), error)).ok()
    }

    fn into_report(mut self, begun: Instant) -> Report {
        self.found.sort_by_key(|finding| finding.area);
        let status = self.found.iter().map(|finding| finding.status).max().unwrap_or_default();
        Report {
            status,
            backup_possible: status.allows_a_backup(),
            checks: self.found,
            facts: self.facts,
            seconds: begun.elapsed().as_secs_f64(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pg::{Lsn, TimelineId};
    use crate::repo::BackupSummary;

    /// A backup that began at this hour and stored a tenth of a cluster of 1000 bytes; an incremental if it has a parent.
    pub fn backup(hour: i64, parent: Option<&BackupSummary>) -> BackupSummary {
        let start_time = jiff::Timestamp::from_second(1_795_000_000 + hour * 3600).unwrap();
        BackupSummary {
            id: BackupId::generate(start_time).unwrap(),
            backup_type: if parent.is_some() { BackupType::Incremental } else { BackupType::Full },
            parent: parent.map(|parent| parent.id),
            start_lsn: Lsn::new(0x28),
            stop_lsn: Lsn::new(0x100),
            timeline: TimelineId::new(1),
            start_time,
            stop_time: start_time,
            duration_ms: 10_000,
            cluster_bytes: 1000,
            stored_bytes: 100,
            blocks_changed: 3,
            detector: "scan".to_owned(),
            detector_reason: String::new(),
            postgres_version: "18.1".to_owned(),
            corrupt_pages: Vec::new(),
            cluster: ClusterName::default(),
            system_identifier: "7".to_owned(),
            from_standby: false,
            offline: false,
            file_count: 1,
            wal_bytes: 0,
            tablespaces: Vec::new(),
            note: None,
            merged_from: None,
            pinned: false,
            damaged: false,
        }
    }

    #[test]
    fn the_worst_answer_is_that_of_the_report_and_answers_are_by_what_they_are_about() {
        let mut sheet = Sheet::default();
        sheet.warn(Area::Next, "detector", "it scans", "let it not");
        sheet.ok(Area::Repository, "repository", "it is there");
        sheet.error(Area::Repository, "backups", Verdict::Damage, &Error::corrupt("m", "no").hint("mend it"));
        let report = sheet.into_report(Instant::now());
        let areas: Vec<_> = report.checks.iter().map(|finding| (finding.area, finding.check)).collect();
        let repository = Area::Repository;
        assert_eq!(areas, [(repository, "repository"), (repository, "backups"), (Area::Next, "detector")]);
        assert_eq!((report.status, report.backup_possible), (Verdict::Damage, true));
        assert_eq!((report.checks[1].message.as_str(), report.checks[1].hint.as_deref()), ("no (m)", Some("mend it")));
    }

    #[test]
    fn what_is_damaged_in_the_repository_is_worse_than_what_fails_elsewhere() {
        let mut sheet = Sheet::default();
        assert_eq!(sheet.need(Area::Server, "files", Err::<(), _>(Error::corrupt("pg_control", "torn"))), None);
        assert_eq!(sheet.need(Area::Repository, "locks", Ok(1)), Some(1));
        assert_eq!(sheet.found[0].status, Verdict::Failed);
        sheet.need(Area::Repository, "locks", Err::<(), _>(Error::corrupt("leases/1", "torn")));
        assert_eq!(sheet.into_report(Instant::now()).status, Verdict::Unreadable);
    }

    #[test]
    fn a_report_without_answers_is_no_failure() {
        let report = Sheet::default().into_report(Instant::now());
        assert_eq!((report.status, report.backup_possible), (Verdict::Ok, true));
    }
}
