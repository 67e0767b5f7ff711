//! The summaries that the running server writes, and the mark that a backup takes from them.
//!
//! Summaries are trusted only if the server that runs now wrote them: a directory that was put back to an older copy may still hold those of
//! the future that was given up, and a server that starts on it takes them for its own. So those that are older than its start are left out, or look newer than
//! now; and while there is one of WAL that the server has not written yet, none is trusted, and none taken for a mark.
//!
//! The [`HistoryMark`] of a backup is the server's start time and one file: the summary that ends where the backup starts. `pg_backup_start` makes a
//! checkpoint, and each checkpoint ends a summary. A copy of the cluster that branched off before has no such file, or wrote its own, at another time; a
//! server that was started again, on whatever, has another start time. Where both are as they were, the log from the backup's start to
//! here is the one that the server's summaries are of.
//!
//! What goes wrong: a file system that counts whole seconds cannot tell two files apart, so there is no mark then; files that were moved to another
//! disk look like others, which costs a scan; the summarizer is off, or does not get on, which is waited for a while.
//!
//! PostgreSQL: `src/backend/postmaster/walsummarizer.c`, `SummarizeWAL`, `GetOldestUnsummarizedLSN`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;

use super::changes::Why;
use crate::detect::{CoverageCheck, Summaries};
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId, WalRange, parse_wal_summary_name, wal_summary_name};
use crate::repo::HistoryMark;
use crate::source::{DataDir, Session};

/// How long the server's summarizer may take without getting anywhere.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same for a mark, without which the next backup does, too.
const PATIENCE_FOR_A_MARK: Duration = Duration::from_secs(5);
/// How long it is waited for in all.
const MOST_PATIENCE: Duration = Duration::from_secs(300);
/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// The summaries of a server that runs.
pub(super) struct ServerSummaries<'a> {
    pub session: &'a Session,
    directory: PathBuf,
    /// Takes words for the user.
    pub notice: &'a dyn Fn(&str),
}

impl<'a> ServerSummaries<'a> {
    /// Those of the server of `session`, which runs on `data_dir`.
    pub fn new(session: &'a Session, data_dir: &DataDir, notice: &'a dyn Fn(&str)) -> Self {
        Self { session, directory: data_dir.path().join("pg_wal/summaries"), notice }
    }

    /// Waits until there is one of what comes right before `end`, while the summarizer gets on; gives all that the server wrote since its start.
    pub fn up_to(&self, timeline: TimelineId, end: Lsn) -> std::result::Result<Summaries, Why> {
        self.wait_for(timeline, end, PATIENCE)
    }

    fn wait_for(&self, timeline: TimelineId, end: Lsn, patience: Duration) -> std::result::Result<Summaries, Why> {
        let begun = Instant::now();
        let mut reached = None;
        let mut deadline = begun + patience;
        let mut told_so = false;
        loop {
            if let Some(summaries) = self.look(timeline, end)? {
                return Ok(summaries);
            }
            let ends = self.reached(timeline, end)?;
            if ends > reached {
                (reached, deadline) = (ends, Instant::now() + patience);
            }
            if Instant::now() >= deadline.min(begun + MOST_PATIENCE) {
                let got = ends.map_or_else(|| "nothing".to_owned(), |end| format!("WAL up to {end} only"));
                return Err(format!("the server summarized {got} since its start, and gets no further"));
            }
            if !std::mem::replace(&mut told_so, true) {
                (self.notice)("waiting for the server to summarize its WAL");
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// What the server wrote since its start, if it reaches to `end`; an error if it never will.
    fn look(&self, timeline: TimelineId, end: Lsn) -> std::result::Result<Option<Summaries>, Why> {
        let last = [WalRange { timeline, start: Lsn::new(end.as_u64().saturating_sub(1)), end }];
        let all = Summaries::list(&self.directory).map_err(told)?;
        let summaries = self.list().map_err(told)?;
        // Asked after the listing, so that what is beyond it was not written by this server.
        let written = self.session.current_lsn().map_err(told)?;
        let beyond = all.coverage().ranges().filter(|range| range.timeline == timeline).map(|range| range.end).max();
        if let Some(beyond) = beyond.filter(|beyond| *beyond > written) {
            return Err(format!(
                "there is a WAL summary up to {beyond}, of WAL that the server has not written: of another past"
            ));
        }
        if summaries.check(&last) == CoverageCheck::Covered {
            return Ok(Some(summaries));
        }
        if !self.session.summarizes_wal().map_err(told)? {
            let hint = "summarize_wal is off: with it on, only what changed is read";
            return Err(format!("there is no WAL summary up to {end} ({hint})"));
        }
        if beyond.is_some_and(|beyond| beyond >= end) {
            return Err(format!(
                "there is no WAL summary up to {end} that the server wrote since its start, and none to come"
            ));
        }
        Ok(None)
    }

    /// How far the summarizer has come on the way to `end`.
    fn reached(&self, timeline: TimelineId, end: Lsn) -> std::result::Result<Option<Lsn>, Why> {
        let coverage = self.list().map_err(told)?.coverage();
        let on_the_way = coverage.ranges().filter(|range| range.timeline <= timeline && range.end < end);
        Ok(on_the_way.map(|range| range.end).max())
    }

    /// Those that there are, of what the server wrote since its start.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list(&self) -> Result<Summaries> {
        Summaries::list_since(&self.directory, SystemTime::from(self.session.server().postmaster_start_time))
    }

    /// The mark of a backup that starts at `start`, if there can be one.
    ///
    /// # Errors
    /// When the file cannot be examined.
    pub fn mark(&self, timeline: TimelineId, start: Lsn) -> Result<Option<HistoryMark>> {
        let Ok(summaries) = self.wait_for(timeline, start, PATIENCE_FOR_A_MARK) else { return Ok(None) };
        let Some(range) = summaries.ending_at(timeline, start) else { return Ok(None) };
        let mark = self.mark_of(&wal_summary_name(range))?;
        Ok(mark.filter(|mark| mark.modified.subsec_nanosecond() != 0 || mark.changed.subsec_nanosecond() != 0))
    }

    /// Whether the cluster still is the one that has this mark.
    pub fn has(&self, mark: &HistoryMark) -> std::result::Result<(), Why> {
        if mark.postmaster_start_time != self.session.server().postmaster_start_time {
            return Err("the server was started again since the parent".to_owned());
        }
        let name = &mark.summary;
        // The name is a repository's, and leads nowhere else only if it is a summary's.
        let known = parse_wal_summary_name(name.as_bytes()).map(|_| self.mark_of(name));
        match known.transpose().map_err(|error| error.to_string())?.flatten() {
            None => Err(format!("the WAL summary {name} is gone (wal_summary_keep_time)")),
            Some(found) if found == *mark => Ok(()),
            Some(_) => Err(format!("the WAL summary {name} is not the one that the parent saw: this is another past")),
        }
    }

    fn mark_of(&self, summary: &str) -> Result<Option<HistoryMark>> {
        let path = self.directory.join(summary);
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("examine", &path, error)),
        };
        let (modified, changed) = ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
        Ok(Some(HistoryMark {
            postmaster_start_time: self.session.server().postmaster_start_time,
            summary: summary.to_owned(),
            inode: found.ino(),
            len: found.len(),
            modified: timestamp(modified, &path)?,
            changed: timestamp(changed, &path)?,
        }))
    }
}

fn told(error: Error) -> Why {
    error.to_string()
}

fn timestamp((second, nanosecond): (i64, i64), path: &Path) -> Result<Timestamp> {
    let time = i32::try_from(nanosecond).ok().and_then(|nanosecond| Timestamp::new(second, nanosecond).ok());
    time.ok_or_else(|| Error::invalid("a file of no time that there is").at(path.display().to_string()))
}
