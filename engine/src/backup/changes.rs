//! Which detector a backup uses, and what it says of the changes since the parent.
//!
//! ```text
//! lineage    the parent is an earlier state of this very cluster: its start and its stop lie on this history, checksums are as they were
//! proof      the WAL that the parent has stored is the WAL that is there now, byte for byte: LSNs and timelines do not tell a cluster from one
//!            that was put back to an old copy and went on, and backups begin at the same places in both
//! summaries  the server's own cover the log from the parent's start to this one
//! WAL        the records from the parent's start to this one: pg_wal, and what it has no more in an archive, which must agree where both begin to overlap
//! else       everything is read
//! ```
//!
//! `auto` takes the first that is proved, and the scan where none is, or where reading the log would take longer. Whoever asks for one by name gets
//! that one or an error. Of a stopped cluster `auto` reads everything: nobody logs what is done to its files.
//!
//! A parent with corrupt pages is not trusted: what was garbage then may be whole now, and what still is must be reported again.
//!
//! What goes wrong, and is a reason to scan and not an error: WAL that was recycled, summaries that are late or removed, a damaged log or map, a stretch with
//! `wal_level = minimal`. What the log does not know of at all, [`super::audit`] finds.

mod forecast;

use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) use self::forecast::Forecast;
use super::{DetectorChoice, wal};
use crate::chunk::Fingerprint;
use crate::detect::{ChangeMap, CoverageCheck, Detection, Detector, Summaries, WalChanges, WalFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    ControlFile, Lsn, TimelineHistory, TimelineId, WalLevel, WalRange, WalSegmentName, WalSegmentNumber, WalSource,
    is_zero,
};
use crate::repo::{Depth, Manifest, Repository};
use crate::source::{DataDir, Session};

/// How long the server's summarizer may take without getting anywhere.
const SUMMARY_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked at.
const SUMMARY_PAUSE: Duration = Duration::from_millis(50);
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
type Why = String;

impl Question<'_> {
    /// Uses the detector that was chosen.
    ///
    /// # Errors
    /// `Unsupported` if a detector was named and cannot be used; `Invalid` for an archive that cannot be listed.
    pub(super) fn answer(&self, choice: DetectorChoice) -> Result<Found> {
        if let Some(archive) = self.wal_archive {
            // What the user names must be there; what is in it is proved, or not used.
            std::fs::read_dir(archive).map_err(|e| Error::io("list", archive, e).hint("look at --wal-archive"))?;
        }
        let found = match choice {
            DetectorChoice::Scan => Err("a scan was asked for".to_owned()),
            DetectorChoice::Auto if self.session.is_none() => {
                Err("nobody logs what is done to the files of a stopped cluster".to_owned())
            }
            DetectorChoice::Wal => self.lineage().and_then(|line| self.by_wal(&line, None)),
            DetectorChoice::Summary => self.lineage().and_then(|line| self.by_summary(&line)),
            DetectorChoice::Auto => self.lineage().and_then(|line| {
                let otherwise = |first: Why| {
                    let second = self.by_wal(&line, Some(self.cluster_bytes));
                    second.map_err(|second| if first == second { first } else { format!("{first}; {second}") })
                };
                self.by_summary(&line).or_else(otherwise)
            }),
        };
        match (found, choice) {
            (Ok(found), _) => Ok(found),
            (Err(why), DetectorChoice::Auto | DetectorChoice::Scan) => Ok(scan(why)),
            (Err(why), DetectorChoice::Wal | DetectorChoice::Summary) => {
                let what = format!("the detector that was asked for cannot be used: {why}");
                Err(Error::new(ErrorKind::Unsupported, what).hint("use --detect auto, which scans then"))
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
        let contains = history.contains(parent.start_timeline, parent.start_lsn)
            && history.contains(parent.timeline, parent.stop_lsn)
            && parent.stop_lsn <= self.start;
        if !contains {
            let (stop, timeline) = (parent.stop_lsn, parent.timeline);
            return Err(format!(
                "the parent ends at {stop} on timeline {timeline}, which does not lead to {}",
                self.start
            ));
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
        WalFiles::list(&directories, self.control.wal_segment_size)
    }

    /// Reads the server's summaries.
    fn by_summary(&self, line: &Line) -> std::result::Result<Found, Why> {
        if self.control.major_version().as_u32() < 17 {
            return Err("this server writes no WAL summaries".to_owned());
        }
        let mut summaries = self.summaries()?;
        self.wait_for_summaries(&mut summaries, line)?;
        self.prove(line)?;
        let map = summaries.changes(self.control.system_identifier, &line.ranges).map_err(told)?;
        let reason = format!("WAL summaries cover {} to {}", self.parent.start_lsn, self.start);
        Ok(Found { detection: Detection { detector: Detector::Summary, reason }, map: Some(map) })
    }

    fn summaries(&self) -> std::result::Result<Summaries, Why> {
        Summaries::list(&self.data_dir.path().join("pg_wal/summaries")).map_err(told)
    }

    /// Waits until the summaries cover the log, while they get on.
    fn wait_for_summaries(&self, summaries: &mut Summaries, line: &Line) -> std::result::Result<(), Why> {
        let mut last = None;
        let mut deadline = Instant::now() + SUMMARY_PATIENCE;
        let mut told_so = false;
        loop {
            let CoverageCheck::MissingFrom(missing) = summaries.check(&line.ranges) else { return Ok(()) };
            let later = summaries.coverage().ranges().any(|range| range.start > missing && range.start < self.start);
            let summarizes = self.session.map_or(Ok(false), Session::summarizes_wal).map_err(told)?;
            if later || !summarizes {
                let hint =
                    if summarizes { "" } else { " (summarize_wal is off: with it on, only what changed is read)" };
                return Err(format!("there is no WAL summary from {missing} on{hint}"));
            }
            if last != Some(missing) {
                (last, deadline) = (Some(missing), Instant::now() + SUMMARY_PATIENCE);
            }
            if Instant::now() >= deadline {
                return Err(format!("the server summarized WAL up to {missing} only, and got no further"));
            }
            if !std::mem::replace(&mut told_so, true) {
                (self.notice)("waiting for the server to summarize its WAL");
            }
            std::thread::sleep(SUMMARY_PAUSE);
            *summaries = self.summaries()?;
        }
    }

    /// Reads the log; no more of it than `max_len`.
    fn by_wal(&self, line: &Line, max_len: Option<u64>) -> std::result::Result<Found, Why> {
        let parent = self.parent;
        let len = self.start.as_u64().saturating_sub(parent.start_lsn.as_u64());
        if max_len.is_some_and(|max| len > max) {
            return Err(format!("reading {} MB of WAL would take longer", len / 1_000_000));
        }
        let files = self.prove(line)?;
        if let Some(name) = files.first_missing(&line.history, parent.start_lsn, self.start) {
            return Err(self.gone(name));
        }
        let map = self.walk(&files, line).map_err(told)?;
        let reason = format!("WAL covers {} to {}", parent.start_lsn, self.start);
        Ok(Found { detection: Detection { detector: Detector::Wal, reason }, map: Some(map) })
    }

    fn gone(&self, name: WalSegmentName) -> Why {
        let name = name.file_name(self.control.wal_segment_size);
        format!("the WAL file {name} is gone (an archive that has it is named by --wal-archive)")
    }

    /// The changes of the log since the parent.
    fn walk(&self, files: &WalFiles, line: &Line) -> Result<ChangeMap> {
        let (control, parent) = (self.control, self.parent);
        let source = WalSource {
            major: control.major_version(),
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            block_size: control.wal_block_size,
            history: line.history.clone(),
        };
        // A running server was backed up with more than minimal WAL; of a stopped one the level is known if it never changed.
        let level = if parent.offline { control.wal_level } else { WalLevel::Replica };
        let level_is_assumed = parent.offline && control.major_version().as_u32() < 17;
        let mut changes = WalChanges::new(&source, control.block_size, level)?;
        files.walk(source, parent.start_lsn, self.start, |record| {
            if level_is_assumed && (record.rmgr(), record.info() & 0xF0) == PARAMETER_CHANGE {
                let what =
                    format!("the server's parameters changed at {}, since a backup of a stopped cluster", record.lsn);
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            changes.add(record)
        })?;
        Ok(changes.finish(line.ranges.iter().copied()))
    }

    /// Proves that the parent is a state of this cluster, and not of another that has the same name and the same LSNs: gives the log's files.
    fn prove(&self, line: &Line) -> std::result::Result<WalFiles, Why> {
        let files = self.files().map_err(told)?;
        self.has_the_wal_of_the_parent(&files).map_err(told)??;
        self.archive_leads_here(line).map_err(told)??;
        Ok(files)
    }

    /// Whether the WAL that the parent has stored is the WAL that is there now, all of it.
    fn has_the_wal_of_the_parent(&self, files: &WalFiles) -> Result<std::result::Result<(), Why>> {
        let (parent, size) = (self.parent, self.control.wal_segment_size);
        let block_len = parent.block_len();
        let mut compared = 0;
        for entry in self.repo.wal_files(parent)? {
            let name =
                entry.path.strip_prefix(b"pg_wal/".as_slice()).and_then(|name| WalSegmentName::parse(name, size));
            let Some(name) = name else { continue };
            let begin = size.start_of(name.segment).unwrap_or_default();
            let Some(mut bytes) = files.read(name)? else { return Ok(Err(self.gone(name))) };
            let known = parent.stop_lsn.as_u64().saturating_sub(begin.as_u64()).min(bytes.len() as u64);
            let mut stored = Vec::new();
            for part in &entry.parts {
                let flat = self.repo.flatten(parent, part, Depth::Fingerprints)?;
                stored.extend(flat.all_fingerprints().unwrap_or_default());
            }
            // What lies beyond the stop is zero in the backup of a running server; of a stopped one that page is as it was.
            let known = usize::try_from(known).unwrap_or(0);
            let known = if parent.offline { known / block_len * block_len } else { known };
            bytes[known..].fill(0);
            let blocks = known.div_ceil(block_len);
            let found = bytes
                .chunks_exact(block_len)
                .take(blocks)
                .map(|block| if is_zero(block) { Fingerprint::ZERO_PAGE } else { Fingerprint::of(block) });
            if !found.eq(stored.iter().take(blocks).copied()) {
                let (name, id) = (name.file_name(size), parent.id);
                return Ok(Err(format!("the WAL file {name} is not the one that {id} has: this is another past")));
            }
            // Only what was written between start and stop is the parent's own.
            let from = parent.start_lsn.as_u64().saturating_sub(begin.as_u64());
            compared += (known as u64).saturating_sub(from);
        }
        if compared == 0 {
            return Ok(Err("nothing of the parent's WAL can be compared with what is there now".to_owned()));
        }
        Ok(Ok(()))
    }

    /// Whether an archive has the log of this cluster, and not that of another past: where `pg_wal` begins, both must have the same.
    fn archive_leads_here(&self, line: &Line) -> Result<std::result::Result<(), Why>> {
        let Some(archive) = self.wal_archive else { return Ok(Ok(())) };
        let size = self.control.wal_segment_size;
        let here = WalFiles::list(&[&self.data_dir.path().join("pg_wal")], size)?;
        if here.first_missing(&line.history, self.parent.start_lsn, self.start).is_none() {
            return Ok(Ok(()));
        }
        let archived = WalFiles::list(&[archive], size)?;
        let (first, last) = (size.segment_of(self.parent.start_lsn), size.segment_before(self.start));
        let numbers = (first.as_u64()..=last.as_u64()).map(WalSegmentNumber::new);
        for name in numbers.map(|number| line.history.segment_name(number, size)) {
            if let Some(ours) = here.read(name)? {
                let agrees = archived.read(name)?.is_some_and(|theirs| theirs == ours);
                let name = name.file_name(size);
                let why = || {
                    format!(
                        "pg_wal begins with {name}, and the archive does not have the same: it may be of another past"
                    )
                };
                return Ok(if agrees { Ok(()) } else { Err(why()) });
            }
        }
        Ok(Err("pg_wal has nothing of the log since the parent".to_owned()))
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

/// Everything is read.
pub(super) fn scan(reason: String) -> Found {
    Found { detection: Detection { detector: Detector::Scan, reason }, map: None }
}
