//! Which blocks changed, from the summaries that the server writes (17+, `summarize_wal = on`).
//!
//! They are read straight from `pg_wal/summaries`. What they cover is what their names say; that it is enough is proved by
//! [`Summaries::check`] with the ranges that are needed, timeline by timeline along the history: summaries may overlap, but a gap of one byte means that something is
//! missing. The server leaves one where `wal_level` was minimal, where summarizing was off, and at the end, where it has not come to yet. Waiting
//! for it is the caller's.
//!
//! What is said of visibility maps is left out, and limits and blocks are united by the rules of [`ChangeMap`], not by
//! those of the server, which gets a truncation before a promotion wrong.
//!
//! What goes wrong: the server removes a summary that is old enough while this reads. Then the directory is listed once more; if what is left does not cover
//! the ranges, or another one is gone, that is an error, and so is a file that does not fit its checksum.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind::NotFound, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{ChangeMap, Coverage, CoverageCheck};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    Lsn, RelFileLocator, RelFileNumber, SummarizedFork, SystemIdentifier, TimelineId, WalRange, WalSummaryReader,
    WalSummaryStep, parse_wal_summary_name, wal_summary_name,
};

/// Bytes read at once.
const READ_LEN: usize = 64 << 10;
/// Stands for all relations of a database in a tablespace.
const WHOLE_DATABASE: RelFileNumber = RelFileNumber::new(0);

/// The summaries that a server has.
#[derive(Clone, Debug)]
pub struct Summaries {
    directory: PathBuf,
    /// Those that were written before are left out.
    since: Option<SystemTime>,
    /// By what they are of.
    listed: Vec<WalRange>,
}

impl Summaries {
    /// Lists `directory`, a server's `pg_wal/summaries`; there are none if it does not exist.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn list(directory: &Path) -> Result<Summaries> {
        Self::list_some(directory, None)
    }

    /// Lists those that were written at or after `since`, by both of their times, and not in the future, as a clock that was set back makes it look.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn list_since(directory: &Path, since: SystemTime) -> Result<Summaries> {
        Self::list_some(directory, Some(since))
    }

    fn list_some(directory: &Path, since: Option<SystemTime>) -> Result<Summaries> {
        let mut listed = Vec::new();
        let fail = |e| Error::io("list", directory, e);
        match fs::read_dir(directory) {
            Ok(entries) => {
                for entry in entries {
                    let entry = entry.map_err(fail)?;
                    let range = parse_wal_summary_name(entry.file_name().as_encoded_bytes());
                    // One that is gone meanwhile is none.
                    let is_wanted =
                        || since.is_none_or(|since| entry.metadata().is_ok_and(|of| was_written(&of, since)));
                    listed.extend(range.filter(|_| is_wanted()));
                }
            }
            Err(error) if error.kind() == NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        listed.sort_by_key(|range| (range.timeline, range.start, range.end));
        Ok(Summaries { directory: directory.to_owned(), since, listed })
    }

    /// The one that ends at a position, and covers the most.
    pub fn ending_at(&self, timeline: TimelineId, end: Lsn) -> Option<WalRange> {
        self.listed.iter().find(|range| range.timeline == timeline && range.end == end).copied()
    }

    /// The parts of the log that they cover.
    pub fn coverage(&self) -> Coverage {
        let mut coverage = Coverage::default();
        self.listed.iter().for_each(|range| coverage.add(*range));
        coverage
    }

    /// Whether they cover all of the `needed` ranges.
    pub fn check(&self, needed: &[WalRange]) -> CoverageCheck {
        self.coverage().check(needed)
    }

    /// Reads those that touch the `needed` ranges.
    ///
    /// # Errors
    /// Missing: they do not cover the ranges, or do not any more; Corrupt, with the file: one is damaged.
    pub fn changes(&mut self, system_identifier: SystemIdentifier, needed: &[WalRange]) -> Result<ChangeMap> {
        let mut map = ChangeMap::new(system_identifier);
        let mut done = BTreeSet::new();
        let mut has_listed_again = false;
        loop {
            if let CoverageCheck::MissingFrom(lsn) = self.check(needed) {
                let what = format!("there is no WAL summary of {lsn}");
                let hint =
                    "the server writes them with summarize_wal = on, and removes old ones (wal_summary_keep_time)";
                return Err(Error::new(ErrorKind::Missing, what).at(self.directory.display().to_string()).hint(hint));
            }
            let Some(gone) = self.read(needed, &mut done, &mut map)? else { return Ok(map) };
            if has_listed_again {
                let what = format!("the WAL summary {} was removed before it could be read", wal_summary_name(gone));
                return Err(Error::new(ErrorKind::Missing, what).at(self.directory.display().to_string()));
            }
            has_listed_again = true;
            *self = Summaries::list_some(&self.directory, self.since)?;
        }
    }

    /// Adds those that are not `done`; one that is gone ends it.
    fn read(&self, needed: &[WalRange], done: &mut BTreeSet<String>, map: &mut ChangeMap) -> Result<Option<WalRange>> {
        let touches = |range: &WalRange| {
            let meets = |other: &WalRange| {
                other.timeline == range.timeline && other.start < range.end && range.start < other.end
            };
            needed.iter().any(meets)
        };
        for range in self.listed.iter().filter(|range| touches(range)) {
            let name = wal_summary_name(*range);
            let path = self.directory.join(&name);
            if !done.insert(name) {
                continue;
            }
            match File::open(&path) {
                Ok(file) => read_file(file, &path, map)?,
                Err(error) if error.kind() == NotFound => return Ok(Some(*range)),
                Err(error) => return Err(Error::io("open", &path, error)),
            }
            map.cover(*range);
        }
        Ok(None)
    }
}

fn was_written(file: &Metadata, since: SystemTime) -> bool {
    let changed = u64::try_from(file.ctime()).ok().zip(u32::try_from(file.ctime_nsec()).ok());
    let changed = changed.map(|(seconds, nanoseconds)| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
    let times = file.modified().ok().zip(changed);
    times
        .is_some_and(|(modified, changed)| modified.min(changed) >= since && modified.max(changed) <= SystemTime::now())
}

fn read_file(mut file: File, path: &Path, map: &mut ChangeMap) -> Result<()> {
    let place = |error: Error| {
        let within = error.place().map(|place| format!(" {place}")).unwrap_or_default();
        error.at(format!("{}{within}", path.display()))
    };
    let mut reader = WalSummaryReader::new();
    let mut buffer = vec![0; READ_LEN];
    let mut current = None;
    loop {
        match reader.step().map_err(place)? {
            WalSummaryStep::Fork(fork) => {
                add_fork(map, fork);
                current = Some(fork);
            }
            WalSummaryStep::Blocks(blocks) => {
                let Some(SummarizedFork { locator, fork, .. }) = current else { continue };
                blocks.iter().for_each(|block| map.mark(locator, fork, *block));
            }
            WalSummaryStep::NeedBytes => match file.read(&mut buffer).map_err(|e| Error::io("read", path, e))? {
                0 => return Err(place(reader.cut_short())),
                len => reader.feed(&buffer[..len]),
            },
            WalSummaryStep::Finished => break,
        }
    }
    match file.read(&mut buffer).map_err(|e| Error::io("read", path, e))? {
        0 => Ok(()),
        _ => Err(Error::corrupt(path.display().to_string(), "the WAL summary goes on after its end")),
    }
}

fn add_fork(map: &mut ChangeMap, SummarizedFork { locator, fork, limit }: SummarizedFork) {
    let RelFileLocator { spc, db, rel } = locator;
    if rel == WHOLE_DATABASE {
        map.replace_database(spc, db);
    } else if let Some(limit) = limit {
        map.set_limit(locator, fork, limit);
    }
}

#[cfg(test)]
mod tests;
