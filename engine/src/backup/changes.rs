//! Which detector a backup uses, and what it says of the changes since the parent.
//!
//! ```text
//! lineage    the parent is an earlier state of this very cluster: its start and its stop lie on this history, checksums are as they were
//! proof      and of this very past: LSNs and timelines do not tell a cluster from one that was put back to an old copy and went on (changes/past.rs)
//! summaries  the server's own, written since it was started, cover the log from the parent's start to this one
//! WAL        the records from the parent's start to this one: pg_wal, and what it has no more in an archive, which must agree where both begin to overlap
//! kept maps  what earlier backups found, from the parent to a newer backup, and one of these from there on (changes/kept.rs)
//! else       everything is read
//! ```
//!
//! `auto` takes the first that is proved, and the scan where none is, or where reading the log would take longer. Whoever asks for one by name gets
//! it where it is proved, and else what reads more, up to the scan: a backup that reads too much is better than none. What was taken, and why, is in the manifest. Of a stopped cluster
//! `auto` reads everything: nobody logs what is done to its files.
//!
//! A parent with corrupt pages is not trusted: what was garbage then may be whole now, and what still is must be reported again.
//!
//! What goes wrong, and is a reason to scan and not an error: WAL that was recycled, summaries that are late or removed, a damaged log or map, a stretch with
//! `wal_level = minimal`. What the log does not know of at all, [`super::audit`] finds.

mod forecast;
mod kept;
mod past;

use std::path::Path;

pub(crate) use self::forecast::Forecast;
pub(super) use self::kept::keep;
use super::summaries::ServerSummaries;
use super::{DetectorChoice, wal};
use crate::detect::{ChangeMap, Detection, Detector, HeldSegments, WalChanges, WalFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    ControlFile, Lsn, TimelineHistory, TimelineId, WalLevel, WalRange, WalRecord, WalSegmentName, WalSource,
};
use crate::repo::{Manifest, Repository};
use crate::source::{DataDir, Session};

/// Why a server before 17 has none; nobody misses them there.
const NO_SUMMARIES: &str = "";
/// The record that says that `wal_level` or another parameter changed.
const PARAMETER_CHANGE: (u8, u8) = (0, 0x60);

/// What a detector found.
#[derive(Debug)]
pub(super) struct Found {
    /// The detector, and why that one.
    pub detection: Detection,
    /// The blocks that may have changed; `None` if everything is to be read.
    pub map: Option<ChangeMap>,
}

/// What is asked.
#[derive(Clone, Copy)]
pub(crate) struct Question<'a> {
    /// Where the parent is.
    pub repo: &'a Repository,
    /// The parent.
    pub parent: &'a Manifest,
    /// The cluster's `pg_control`, as of now.
    pub control: &'a ControlFile,
    /// Where `pg_wal` is.
    pub data_dir: &'a DataDir,
    /// The server, if it runs.
    pub session: Option<&'a Session>,
    /// An archive that the user has.
    pub wal_archive: Option<&'a Path>,
    /// Segments that were opened before the backup began, and may be removed since.
    pub held: &'a HeldSegments,
    /// Where this backup begins.
    pub start: Lsn,
    /// The timeline that is written now.
    pub timeline: TimelineId,
    /// Bytes that a scan would read.
    pub cluster_bytes: u64,
    /// Takes words for the user.
    pub notice: &'a dyn Fn(&str),
}

/// A reason why a detector cannot be used, for people.
pub(super) type Why = String;

impl Question<'_> {
    /// Uses the detector that was chosen, if it can be used, and else the scan.
    ///
    /// # Errors
    /// `Unsupported` if a server that writes no summaries is asked for them; `Missing` and its kin for an archive that cannot be listed.
    pub(super) fn answer(&self, choice: DetectorChoice) -> Result<Found> {
        if let Some(archive) = self.wal_archive {
            // What the user names must be there; what is in it is proved, or not used.
            std::fs::read_dir(archive).map_err(|e| Error::io("list", archive, e).hint("look at --wal-archive"))?;
        }
        let major = self.control.major_version();
        if choice == DetectorChoice::Summary && major.as_u32() < 17 {
            let what = format!("PostgreSQL {major} writes no WAL summaries");
            return Err(Error::new(ErrorKind::Unsupported, what).hint("use --detect auto or wal"));
        }
        let found = match choice {
            DetectorChoice::Scan => Err("a scan was asked for".to_owned()),
            _ if self.session.is_none() => Err("nobody logs what is done to the files of a stopped cluster".to_owned()),
            _ => {
                self.lineage().and_then(|line| either(self.without_kept(&line, choice), || self.by_kept(&line, choice)))
            }
        };
        let found = found.unwrap_or_else(scan);
        let asked = match choice {
            DetectorChoice::Wal => Some(Detector::Wal),
            DetectorChoice::Summary => Some(Detector::Summary),
            DetectorChoice::Auto | DetectorChoice::Scan => None,
        };
        let Detection { detector, reason } = &found.detection;
        if let Some(asked) = asked.filter(|asked| asked != detector) {
            (self.notice)(&format!("{asked} was asked for and cannot be used, so {detector} is: {reason}"));
        }
        Ok(found)
    }

    /// By what the server and the archive have.
    fn without_kept(&self, line: &Line, choice: DetectorChoice) -> std::result::Result<Found, Why> {
        match choice {
            DetectorChoice::Wal => self.by_wal(line, None),
            DetectorChoice::Summary => either(self.by_summary(line, None), || self.by_wal(line, None)),
            DetectorChoice::Auto | DetectorChoice::Scan => {
                let most = Some(self.cluster_bytes);
                either(self.by_summary(line, most), || self.by_wal(line, most))
            }
        }
    }

    /// The history that leads from the parent to here, and the log in between.
    fn lineage(&self) -> std::result::Result<Line, Why> {
        let parent = self.parent;
        if !parent.corrupt_pages.is_empty() {
            return Err("the parent has corrupt pages, which are looked at again".to_owned());
        }
        if parent.data_checksum_version != self.control.data_checksum_version {
            return Err("data checksums were switched on or off since the parent".to_owned());
        }
        if parent.wal_segment_size != self.control.wal_segment_size.as_u32() {
            return Err("WAL segments had another size".to_owned());
        }
        let history = self.history()?;
        let (stop, timeline) = (parent.stop_lsn, parent.timeline);
        if !history.contains(parent.start_timeline, parent.start_lsn) || !history.contains(timeline, stop) {
            let here = self.timeline;
            return Err(format!(
                "the parent ends at {stop} on timeline {timeline}, which does not lead to timeline {here} here"
            ));
        }
        if stop > self.start {
            return Err(format!("the parent ends at {stop}, and this backup begins before that, at {}", self.start));
        }
        let ranges = history.wal_ranges(parent.start_timeline, parent.start_lsn, self.start);
        Ok(Line { history, ranges: ranges.map_err(|e| e.to_string())? })
    }

    fn history(&self) -> std::result::Result<TimelineHistory, Why> {
        let here = wal::history(self.data_dir, self.timeline).map_err(|e| e.to_string())?.0;
        let is_alone = here.spans().len() == 1 && self.timeline > TimelineId::new(1);
        match &self.wal_archive {
            // pg_wal may have lost the file.
            Some(_) if is_alone => {
                self.files().and_then(|files| files.history(self.timeline)).map_err(|e| e.to_string())
            }
            _ => Ok(here),
        }
    }

    fn files(&self) -> Result<WalFiles> {
        let pg_wal = self.data_dir.path().join("pg_wal");
        let directories: Vec<&Path> = [pg_wal.as_path()].into_iter().chain(self.wal_archive).collect();
        Ok(WalFiles::list(&directories, self.control.wal_segment_size)?.with(self.held))
    }

    /// Reads the server's summaries.
    fn by_summary(&self, line: &Line, max_len: Option<u64>) -> std::result::Result<Found, Why> {
        if self.control.major_version().as_u32() < 17 {
            return Err(NO_SUMMARIES.to_owned());
        }
        let session = self.session.ok_or("there is no server to write WAL summaries")?;
        let server = ServerSummaries::new(session, self.data_dir, self.notice);
        server.has(self.parent.history_mark.as_ref().ok_or("the parent was taken without WAL summaries")?)?;
        let mut summaries = server.up_to(line.timeline_of(self.start), self.start)?;
        let mut map = summaries.changes(self.control.system_identifier, &line.ranges).map_err(told)?;
        must_be_worth_it(self.parent.wal_bytes, max_len)?;
        map.union(self.changes_of_the_parent(line).map_err(told)?).map_err(told)?;
        let reason = format!("WAL summaries cover {} to {}", self.parent.start_lsn, self.start);
        Ok(Found { detection: Detection { detector: Detector::Summary, reason }, map: Some(map) })
    }

    /// Reads the log; no more of it than `max_len`.
    fn by_wal(&self, line: &Line, max_len: Option<u64>) -> std::result::Result<Found, Why> {
        let (begin, end) = (self.parent.start_lsn, self.start);
        let len = end.as_u64().saturating_sub(begin.as_u64());
        must_be_worth_it(len, max_len)?;
        let files = self.prove(line)?;
        if let Some(name) = files.first_missing(&line.history, begin, end) {
            return Err(self.gone(name));
        }
        let mut changes = self.changes(line).map_err(told)?;
        files.walk(self.log(line), begin, end, |record| changes.add(record)).map_err(told)?;
        let detection = Detection { detector: Detector::Wal, reason: format!("WAL covers {begin} to {end}") };
        Ok(Found { detection, map: Some(changes.finish(line.ranges.clone())) })
    }

    fn gone(&self, name: WalSegmentName) -> Why {
        let name = name.file_name(self.control.wal_segment_size);
        format!("the WAL file {name} is gone (if an archive has it, name that with --wal-archive)")
    }

    fn log(&self, line: &Line) -> WalSource {
        WalSource {
            major: self.control.major_version(),
            system_identifier: self.control.system_identifier,
            segment_size: self.control.wal_segment_size,
            block_size: self.control.wal_block_size,
            history: line.history.clone(),
        }
    }

    /// Gathers the changes of the log from the parent's start on.
    fn changes(&self, line: &Line) -> Result<Gathering> {
        let (control, parent) = (self.control, self.parent);
        // A running server was backed up with more than minimal WAL; of a stopped one the level is known if it never changed.
        let level = if parent.offline { control.wal_level } else { WalLevel::Replica };
        let level_is_assumed = parent.offline && control.major_version().as_u32() < 17;
        let changes = WalChanges::new(&self.log(line), control.block_size, level)?;
        Ok(Gathering { changes, level_is_assumed })
    }
}

/// Changes that are gathered record by record.
struct Gathering {
    changes: WalChanges,
    /// Whether nobody knows that the level was at the start what it is now.
    level_is_assumed: bool,
}

impl Gathering {
    fn add(&mut self, record: WalRecord<'_>) -> Result<()> {
        if self.level_is_assumed && (record.rmgr(), record.info() & 0xF0) == PARAMETER_CHANGE {
            let what =
                format!("the server's parameters changed at {}, since a backup of a stopped cluster", record.lsn);
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        self.changes.add(record)
    }

    fn finish(self, ranges: Vec<WalRange>) -> ChangeMap {
        self.changes.finish(ranges)
    }
}

/// The first that can be used; if there is none, why not.
fn either(
    first: std::result::Result<Found, Why>,
    second: impl FnOnce() -> std::result::Result<Found, Why>,
) -> std::result::Result<Found, Why> {
    first.or_else(|first| {
        second().map_err(|second| match () {
            () if first.contains(&second) => first,
            () if second.contains(&first) => second,
            () => format!("{first}; {second}"),
        })
    })
}

fn must_be_worth_it(len: u64, max_len: Option<u64>) -> std::result::Result<(), Why> {
    match max_len.filter(|max| len > *max) {
        None => Ok(()),
        Some(_) => Err(format!("reading {} MB of WAL would take longer", len / 1_000_000)),
    }
}

fn told(error: Error) -> Why {
    error.to_string()
}

/// From the parent to here.
struct Line {
    history: TimelineHistory,
    ranges: Vec<WalRange>,
}

impl Line {
    /// The timeline of a position from the parent on.
    fn timeline_of(&self, at: Lsn) -> TimelineId {
        let within = self.ranges.iter().filter(|range| range.start <= at && at <= range.end);
        within.map(|range| range.timeline).max().unwrap_or(TimelineId::new(1))
    }
}

/// Everything is read.
pub(super) fn scan(reason: String) -> Found {
    Found { detection: Detection { detector: Detector::Scan, reason }, map: None }
}
