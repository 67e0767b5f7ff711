//! Which detector a backup uses, and what it says of the changes since the parent.
//!
//! ```text
//! lineage    the parent is an earlier state of this very cluster: its start and its stop lie on this history, checksums are as they were
//! summaries  the server's own cover the log from the parent's start to this one, and one of them begins exactly at the parent's start
//! WAL        maps that earlier backups left in the repository, then the records from where these end: pg_wal, or an archive
//! proof      the WAL that the parent has stored is the WAL that is there now: LSNs and timelines alone do not tell a cluster from one that was
//!            rolled back to an old snapshot and went on
//! else       everything is read
//! ```
//!
//! `auto` takes the first that is proved, and the scan where none is, or where reading the log would take longer. Whoever asks for one by name gets
//! that one or an error. Of a stopped cluster `auto` reads everything: nobody logs what is done to its files.
//!
//! What goes wrong, and is a reason to scan and not an error: WAL that was recycled, summaries that are late or removed, a damaged log or map, a stretch with
//! `wal_level = minimal`. What the log does not know of at all, [`super::audit`] finds.

use std::path::Path;
use std::time::{Duration, Instant};

use super::stored::StoredChanges;
use super::{DetectorChoice, wal};
use crate::chunk::Fingerprint;
use crate::detect::{ChangeMap, CoverageCheck, Detection, Detector, Summaries, WalChanges, WalFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    ControlFile, Lsn, TimelineHistory, TimelineId, WalLevel, WalRange, WalSegmentName, WalSource, is_zero,
};
use crate::repo::{BackupId, ClusterName, Depth, Manifest, Repository};
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
    /// What the log said that the repository does not know yet.
    pub new: Option<ChangeMap>,
}

/// What is asked.
pub(super) struct Question<'a> {
    /// Where the parent is.
    pub repo: &'a Repository,
    /// Its cluster there.
    pub cluster: &'a ClusterName,
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
    pub fn answer(&self, choice: DetectorChoice) -> Result<Found> {
        let lineage = self.lineage();
        let must = |name: &str, why: Why| {
            let what = format!("--detect {name} cannot be used: {why}");
            Err(Error::new(ErrorKind::Unsupported, what).hint("use --detect auto, which scans then"))
        };
        match (choice, lineage) {
            (DetectorChoice::Scan, _) => Ok(scan("a scan was asked for".to_owned())),
            (DetectorChoice::Auto, Err(why)) => Ok(scan(why)),
            (DetectorChoice::Wal, Err(why)) => must("wal", why),
            (DetectorChoice::Summary, Err(why)) => must("summary", why),
            (DetectorChoice::Wal, Ok(line)) => self.by_wal(&line, None)?.or_else(|why| must("wal", why)),
            (DetectorChoice::Summary, Ok(line)) => self.by_summary(&line)?.or_else(|why| must("summary", why)),
            (DetectorChoice::Auto, Ok(_)) if self.session.is_none() => {
                Ok(scan("nobody logs what is done to the files of a stopped cluster".to_owned()))
            }
            (DetectorChoice::Auto, Ok(line)) => {
                let without_summary = match self.by_summary(&line)? {
                    Ok(found) => return Ok(found),
                    Err(why) => why,
                };
                let found = self.by_wal(&line, Some(self.cluster_bytes))?;
                Ok(found.unwrap_or_else(|why| scan(join(&without_summary, &why))))
            }
        }
    }

    /// The history that leads from the parent to here, and the log in between.
    fn lineage(&self) -> std::result::Result<Line, Why> {
        let parent = self.parent;
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
        let directories = self.wal_archive.into_iter().chain([pg_wal.as_path()]);
        WalFiles::list(&directories.collect::<Vec<_>>(), self.control.wal_segment_size)
    }

    /// Reads the server's summaries.
    fn by_summary(&self, line: &Line) -> Result<std::result::Result<Found, Why>> {
        if self.control.major_version().as_u32() < 17 {
            return Ok(Err("this server writes no WAL summaries".to_owned()));
        }
        let directory = self.data_dir.path().join("pg_wal/summaries");
        let mut summaries = Summaries::list(&directory)?;
        if let Err(why) = self.wait_for_summaries(&mut summaries, line)? {
            return Ok(Err(why));
        }
        if !summaries.begin_at(self.parent.start_timeline, self.parent.start_lsn) {
            let start = self.parent.start_lsn;
            return Ok(Err(format!(
                "no WAL summary begins where the parent began, at {start}: this may be another past"
            )));
        }
        if let Err(why) = self.same_wal(self.parent, &self.files()?, false)? {
            return Ok(Err(why));
        }
        Ok(match summaries.changes(self.control.system_identifier, &line.ranges) {
            Ok(map) => {
                let reason = format!("WAL summaries cover {} to {}", self.parent.start_lsn, self.start);
                let detection = Detection { detector: Detector::Summary, reason };
                Ok(Found { detection, new: Some(map.clone()), map: Some(map) })
            }
            Err(error) => Err(error.to_string()),
        })
    }

    /// Waits until the summaries cover the log, while they get on.
    fn wait_for_summaries(&self, summaries: &mut Summaries, line: &Line) -> Result<std::result::Result<(), Why>> {
        let mut last = None;
        let mut deadline = Instant::now() + SUMMARY_PATIENCE;
        let mut told = false;
        loop {
            let CoverageCheck::MissingFrom(missing) = summaries.check(&line.ranges) else { return Ok(Ok(())) };
            let later = summaries.coverage().ranges().any(|range| range.start > missing && range.start < self.start);
            let summarizes = self.session.map_or(Ok(false), Session::summarizes_wal)?;
            if later || !summarizes {
                let hint =
                    if summarizes { "" } else { " (summarize_wal is off: with it on, only what changed is read)" };
                return Ok(Err(format!("there is no WAL summary from {missing} on{hint}")));
            }
            if last != Some(missing) {
                (last, deadline) = (Some(missing), Instant::now() + SUMMARY_PATIENCE);
            }
            if Instant::now() >= deadline {
                return Ok(Err(format!("the server summarized WAL up to {missing} only, and got no further")));
            }
            if !std::mem::replace(&mut told, true) {
                (self.notice)("waiting for the server to summarize its WAL");
            }
            std::thread::sleep(SUMMARY_PAUSE);
            *summaries = Summaries::list(&self.data_dir.path().join("pg_wal/summaries"))?;
        }
    }

    /// Reads the log, from where the maps in the repository end; no more of it than `max_len`.
    fn by_wal(&self, line: &Line, max_len: Option<u64>) -> Result<std::result::Result<Found, Why>> {
        let files = self.files().map_err(|e| e.hint("look at --wal-archive"))?;
        let mut map = self.stored(line)?;
        let CoverageCheck::MissingFrom(from) = map.coverage().check(&line.ranges) else {
            return Err(Error::bug("the log is known before it is read"));
        };
        let first = match self.backup_at(from)? {
            Some(first) => first,
            None => return Ok(Err(format!("what is known of the log ends at {from}, where no backup begins"))),
        };
        let len = self.start.as_u64().saturating_sub(from.as_u64());
        if max_len.is_some_and(|max| len > max) {
            return Ok(Err(format!("reading {} MB of WAL would take longer", len / 1_000_000)));
        }
        if let Some(name) = files.first_missing(&line.history, from, self.start) {
            let name = name.file_name(self.control.wal_segment_size);
            return Ok(Err(format!("the WAL file {name} is gone (an archive that has it is named by --wal-archive)")));
        }
        if let Err(why) = self.same_wal(&first, &files, true)? {
            return Ok(Err(why));
        }
        Ok(match self.walk(&files, line, &first) {
            Ok(new) => {
                map.union(new.clone())?;
                let CoverageCheck::Covered = map.coverage().check(&line.ranges) else {
                    return Ok(Err("the log leaves a gap".to_owned()));
                };
                let reason = format!("WAL covers {} to {}", self.parent.start_lsn, self.start);
                let detection = Detection { detector: Detector::Wal, reason };
                Ok(Found { detection, map: Some(map), new: Some(new) })
            }
            Err(error) => Err(error.to_string()),
        })
    }

    /// What the repository knows of the log, from the parent's start on without a gap.
    fn stored(&self, line: &Line) -> Result<ChangeMap> {
        let mut map = ChangeMap::new(self.control.system_identifier);
        for stored in StoredChanges::list(self.repo, self.cluster)? {
            let (start, end) = stored.range();
            if end <= self.parent.start_lsn || start >= self.start {
                continue;
            }
            let found = stored.read(self.repo, self.cluster);
            let fits = |found: &ChangeMap| {
                let on_line = |range: WalRange| line.history.contains(range.timeline, range.end);
                found.system_identifier() == map.system_identifier() && found.coverage().ranges().all(on_line)
            };
            match found {
                Ok(found) if fits(&found) => map.union(found)?,
                Ok(_) => {}
                Err(error) => (self.notice)(&format!("what an earlier backup knew of the log is not used: {error}")),
            }
        }
        Ok(map)
    }

    /// The backup that begins at `lsn`: the parent, or a later one.
    fn backup_at(&self, lsn: Lsn) -> Result<Option<Manifest>> {
        if lsn == self.parent.start_lsn {
            return Ok(Some(self.parent.clone()));
        }
        let catalog = self.repo.catalog(self.cluster)?;
        let id: Option<BackupId> = catalog.backups().iter().rfind(|b| b.start_lsn == lsn).map(|b| b.id);
        id.map(|id| self.repo.manifest(self.cluster, id)).transpose()
    }

    /// The changes of the log from the start of `first` on.
    fn walk(&self, files: &WalFiles, line: &Line, first: &Manifest) -> Result<ChangeMap> {
        let control = self.control;
        let source = WalSource {
            major: control.major_version(),
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            block_size: control.wal_block_size,
            history: line.history.clone(),
        };
        // A running server was backed up with more than minimal WAL; of a stopped one the level is known if it never changed.
        let level = if first.offline { control.wal_level } else { WalLevel::Replica };
        let level_is_assumed = first.offline && control.major_version().as_u32() < 17;
        let mut changes = WalChanges::new(&source, control.block_size, level)?;
        files.walk(source, first.start_lsn, self.start, |record| {
            if level_is_assumed && (record.rmgr(), record.info() & 0xF0) == PARAMETER_CHANGE {
                let what =
                    format!("the server's parameters changed at {}, since a backup of a stopped cluster", record.lsn);
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            changes.add(record)
        })?;
        let ranges = line.history.wal_ranges(first.start_timeline, first.start_lsn, self.start)?;
        Ok(changes.finish(ranges))
    }

    /// Whether the WAL that a backup has stored is the WAL that is there now.
    fn same_wal(
        &self,
        backup: &Manifest,
        files: &WalFiles,
        must_be_there: bool,
    ) -> Result<std::result::Result<(), Why>> {
        let size = self.control.wal_segment_size;
        let block_len = backup.block_len();
        let mut seen = 0;
        for entry in self.repo.wal_files(backup)? {
            let name =
                entry.path.strip_prefix(b"pg_wal/".as_slice()).and_then(|name| WalSegmentName::parse(name, size));
            let Some(name) = name else { continue };
            let Some(mut bytes) = files.read(name)? else { continue };
            let begin = size.start_of(name.segment).unwrap_or_default();
            let known = backup.stop_lsn.as_u64().saturating_sub(begin.as_u64()).min(bytes.len() as u64);
            let mut stored = Vec::new();
            for part in &entry.parts {
                let flat = self.repo.flatten(backup, part, Depth::Fingerprints)?;
                stored.extend(flat.all_fingerprints().unwrap_or_default());
            }
            // What lies beyond the stop is zero in the backup of a running server; of a stopped one that page is as it was.
            let known = usize::try_from(known).unwrap_or(0);
            let known = if backup.offline { known / block_len * block_len } else { known };
            bytes[known..].fill(0);
            let blocks = known.div_ceil(block_len);
            let found = bytes
                .chunks_exact(block_len)
                .take(blocks)
                .map(|block| if is_zero(block) { Fingerprint::ZERO_PAGE } else { Fingerprint::of(block) });
            if !found.eq(stored.iter().take(blocks).copied()) {
                let (name, id) = (name.file_name(size), backup.id);
                return Ok(Err(format!("the WAL file {name} is not the one that {id} has: this is another past")));
            }
            seen += blocks;
        }
        if seen == 0 && must_be_there {
            return Ok(Err(format!("there is no WAL of {} to compare with", backup.id)));
        }
        Ok(Ok(()))
    }
}

/// From the parent to here.
struct Line {
    history: TimelineHistory,
    ranges: Vec<WalRange>,
}

/// Everything is read.
pub(super) fn scan(reason: String) -> Found {
    Found { detection: Detection { detector: Detector::Scan, reason }, map: None, new: None }
}

fn join(first: &str, second: &str) -> String {
    format!("{first}; {second}")
}
