//! The proof that the parent, the log and the cluster are of one past.
//!
//! LSNs, timelines and the system identifier do not tell a cluster from one that was put back to an old copy and went on without a recovery: both write other
//! things at the same places, and backups begin at the same places in both. What does tell them apart:
//!
//! * the WAL that the parent has stored, from its start to its stop, against the WAL that is there now, byte for byte;
//! * the parent's [`HistoryMark`](crate::repo::HistoryMark), where that WAL is gone: the server runs since before the parent, and a file that it wrote at
//!   the parent's start is as it was. That proves the past up to the parent's start. What the parent copied later came from its own log from there to its
//!   stop; should the two have parted in between, by a machine that was put back to a snapshot of its running self, the blocks of that log are read, too.
//!
//! An archive is a third place, and must agree with `pg_wal` where both have the same.

use super::{Line, Question, Why, told};
use crate::chunk::Fingerprint;
use crate::detect::{ChangeMap, WalFiles};
use crate::error::{Error, Result};
use crate::pg::{WalSegmentName, WalSegmentNumber, WalStep, WalWalker, is_zero};
use crate::repo::{Depth, FileContents, FileEntry};

impl Question<'_> {
    /// What the log changed that the parent has stored, from its start to its stop.
    pub(super) fn changes_of_the_parent(&self, line: &Line) -> Result<ChangeMap> {
        let (parent, size) = (self.parent, self.control.wal_segment_size);
        let ranges = line.history.wal_ranges(parent.start_timeline, parent.start_lsn, parent.stop_lsn)?;
        let stored = self.repo.wal_files(parent)?;
        let mut changes = self.changes(line)?;
        let mut walker = WalWalker::new(self.log(line), parent.start_lsn, parent.stop_lsn)?;
        let mut open: Option<(WalSegmentName, FileContents<'_>)> = None;
        loop {
            let at = match walker.step()? {
                WalStep::Record(record) => {
                    changes.add(record)?;
                    continue;
                }
                WalStep::Finished => return Ok(changes.finish(ranges)),
                WalStep::NeedBytes { at } => at,
            };
            let name = line.history.segment_name(size.segment_of(at), size);
            let mut contents = match open.take() {
                Some((open, contents)) if open == name => contents,
                _ => FileContents::new(self.repo, parent, entry_of(&stored, &name.file_name(size))?)?,
            };
            let bytes = contents.read_from(size.offset_of(at))?;
            if bytes.is_empty() {
                return Err(Error::corrupt(parent.id.to_string(), "its WAL is shorter than a segment"));
            }
            walker.feed(bytes);
            open = Some((name, contents));
        }
    }

    /// Proves that the parent is a state of this cluster, and not of another that has the same name and the same LSNs: gives the log's files.
    pub(super) fn prove(&self, line: &Line) -> std::result::Result<WalFiles, Why> {
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

/// The stored WAL file of this name.
fn entry_of(stored: &[FileEntry], name: &str) -> Result<FileEntry> {
    let path = format!("pg_wal/{name}");
    let found = stored.iter().find(|entry| entry.path == path.as_bytes());
    found.cloned().ok_or_else(|| Error::corrupt(path, "the parent has no such file"))
}
