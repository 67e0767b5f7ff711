//! The WAL that makes a backup consistent: every segment from its start to its stop.
//!
//! It is copied from the server's `pg_wal` when the backup has ended, while a replication slot keeps it there. The bytes at and after the stop are stored
//! as zeros: they belong to no part of this backup, and a recovery must end at the stop, not somewhere in a segment that
//! was half written. Segments are taken from the timeline that the server's history says, newest first, as recovery reads them.
//!
//! On a standby, where `pg_backup_stop` names the last point that must be replayed, the range goes on to what the standby had replayed: the
//! restored copy is then as new as the backup.
//!
//! What goes wrong: a segment that was removed or recycled before it was copied (no slot could be had), noticed by its name or by
//! [`prove`], which follows every record from start to stop. Then the backup is void.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::copy::{Content, Item};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    ControlFile, Lsn, MajorVersion, TimelineHistory, TimelineId, WalRecord, WalSegmentSize, WalSource, WalStep,
    WalWalker, history_file_name,
};
use crate::repo::{FileEntry, FileKind, WalSpan};
use crate::source::DataDir;

/// Bytes of WAL read at once.
const READ_LEN: usize = 256 << 10;

/// Which WAL a backup needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalRange {
    /// Where replay begins.
    pub start: Lsn,
    /// Where it ends.
    pub stop: Lsn,
    /// The timeline of `stop`.
    pub timeline: TimelineId,
    /// Bytes of a segment.
    pub segment_size: WalSegmentSize,
    /// Whether the server is stopped, so that segments are taken as they are.
    pub at_rest: bool,
}

/// The history of a timeline, from `pg_wal`, and its file.
///
/// A timeline without a file has no ancestors, as for PostgreSQL (`timeline.c`, `readTimeLineHistory`); if it has, and the backup needs WAL
/// of theirs, [`prove`] finds it out.
pub(super) fn history(data_dir: &DataDir, timeline: TimelineId) -> Result<(TimelineHistory, Option<Item>)> {
    let name = history_file_name(timeline);
    let Some(mut file) = data_dir.open_wal_file(&name)? else {
        return Ok((TimelineHistory::without_ancestors(timeline), None));
    };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| Error::io("read", name.as_ref(), e))?;
    let history = TimelineHistory::parse(timeline, &bytes)?;
    let len = bytes.len() as u64;
    Ok((history, Some(item(&name, len, Content::Bytes(Arc::from(bytes))))))
}

/// What to copy for `range`, in order.
pub(super) fn items(data_dir: &DataDir, range: WalRange) -> Result<Vec<Item>> {
    let (history, history_file) = history(data_dir, range.timeline)?;
    let size = range.segment_size;
    let present = data_dir.wal_segments(size)?;
    let last = size.segment_before(range.stop).max(size.segment_of(range.start));
    let mut items: Vec<Item> = history_file.into_iter().collect();
    let mut segment = size.segment_of(range.start);
    loop {
        let name = history.segment_name(segment, size);
        let whole = present.iter().any(|(found, len)| *found == name && *len == size.as_u64());
        let name = name.file_name(size);
        if !whole {
            return Err(lost(&name));
        }
        let begin = size.start_of(segment).ok_or_else(|| Error::bug("a WAL segment beyond the end of the log"))?;
        let before_stop = range.stop.as_u64().saturating_sub(begin.as_u64()).min(size.as_u64());
        let valid_len = if range.at_rest { size.as_u64() } else { before_stop };
        items.push(item(&name, size.as_u64(), Content::Wal { name: name.clone(), valid_len }));
        if segment >= last {
            return Ok(items);
        }
        segment = segment.next().ok_or_else(|| Error::bug("a WAL segment beyond the end of the log"))?;
    }
}

fn item(name: &str, len: u64, content: Content) -> Item {
    let path = format!("pg_wal/{name}").into_bytes();
    let entry = FileEntry { path, kind: FileKind::Wal, mode: 0o600, uid: 0, gid: 0, len, parts: Vec::new() };
    Item { entry, content, relation: None, parent: None }
}

/// The error of WAL that is not there any more.
pub(super) fn lost(name: &str) -> Error {
    let what = format!("the WAL file {name} was removed from pg_wal before it could be copied; the backup is void");
    Error::new(ErrorKind::Unavailable, what)
        .hint("let the server have a free replication slot (max_replication_slots), or a larger wal_keep_size, and run it again")
}

/// Follows every record from start to stop: the proof that the backup's WAL is whole, and that its replay needs nothing that the
/// backup cannot have. Says why the backup is void, if it is.
///
/// # Errors
/// `Unavailable` or `Corrupt` if a segment is gone or was recycled, with the LSN.
pub(super) fn prove(data_dir: &DataDir, range: WalRange, control: &ControlFile) -> Result<Option<String>> {
    let mut log = Log::open(data_dir, range, control)?;
    let mut hazards = Hazards::new(control.major_version());
    while log.next(|record| hazards.look_at(record))?.is_some() {}
    Ok(hazards.found)
}

/// What in the WAL of a backup makes its replay wrong.
///
/// * A file copy of a database whose source is gone before the backup ends (`ALTER DATABASE ... SET TABLESPACE`, or `CREATE DATABASE` by
///   file copy and `DROP DATABASE` of the template): replay copies the restored source, of which files may be missing.
/// * A new tablespace: replay makes its link to the original's directory, and the copy would work on the original's files.
///
/// PostgreSQL: `src/backend/commands/dbcommands.c`, `dbase_redo`; `tablespace.c`, `tblspc_redo`.
struct Hazards {
    drop_info: u8,
    /// Sources of file copies: database and tablespace.
    copied: Vec<(u32, u32)>,
    found: Option<String>,
}

impl Hazards {
    const DATABASE: u8 = 4;
    const TABLESPACE: u8 = 5;
    const CREATE: u8 = 0x00;

    fn new(major: MajorVersion) -> Self {
        // 15 put the logged kind of CREATE DATABASE between the two.
        let drop_info = if major.as_u32() < 15 { 0x10 } else { 0x20 };
        Self { drop_info, copied: Vec::new(), found: None }
    }

    fn look_at(&mut self, record: WalRecord<'_>) {
        let kind = (record.rmgr(), record.info() & 0xF0);
        let is_drop = kind == (Self::DATABASE, self.drop_info);
        if kind != (Self::DATABASE, Self::CREATE) && kind != (Self::TABLESPACE, Self::CREATE) && !is_drop {
            return;
        }
        let data = record.main_data().unwrap_or(&[]);
        let word =
            |at: usize| data.get(4 * at..4 * at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        if kind.0 == Self::TABLESPACE {
            let in_place = data.get(4).is_some_and(|byte| *byte == 0);
            if !in_place {
                let oid = word(0).unwrap_or_default();
                self.found = Some(format!("tablespace {oid} was created while the backup ran, at {}", record.lsn));
            }
        } else if is_drop {
            let count = word(1).unwrap_or_default() as usize;
            let dropped = (0..count.min(data.len() / 4)).filter_map(|at| Some((word(0)?, word(2 + at)?)));
            if let Some((database, _)) = dropped.into_iter().find(|dropped| self.copied.contains(dropped)) {
                let what = "was copied as a whole and dropped or moved";
                self.found = Some(format!("database {database} {what} while the backup ran, at {}", record.lsn));
            }
        } else if let (Some(database), Some(tablespace)) = (word(2), word(3)) {
            self.copied.push((database, tablespace));
        }
    }
}

/// Where the record of a stopped cluster's last checkpoint ends.
pub(super) fn end_of_checkpoint(data_dir: &DataDir, control: &ControlFile) -> Result<Lsn> {
    let stop = control.checkpoint.checked_add(1).ok_or_else(|| Error::bug("a checkpoint at the end of the log"))?;
    let segment_size = control.wal_segment_size;
    let range = WalRange { start: control.checkpoint, stop, timeline: control.timeline, segment_size, at_rest: true };
    let mut log = Log::open(data_dir, range, control)?;
    log.next(|_| ())?
        .ok_or_else(|| Error::corrupt(control.checkpoint.to_string(), "the last checkpoint is not in pg_wal"))
}

/// The records of `pg_wal` in a range.
struct Log<'a> {
    data_dir: &'a DataDir,
    walker: WalWalker,
    history: TimelineHistory,
    segment_size: WalSegmentSize,
    file: Option<(String, File)>,
    buffer: Vec<u8>,
}

impl<'a> Log<'a> {
    fn open(data_dir: &'a DataDir, range: WalRange, control: &ControlFile) -> Result<Self> {
        let (history, _) = history(data_dir, range.timeline)?;
        let source = WalSource {
            major: control.major_version(),
            system_identifier: control.system_identifier,
            segment_size: range.segment_size,
            block_size: control.wal_block_size,
            history: history.clone(),
        };
        let walker = WalWalker::new(source, range.start, range.stop)?;
        let segment_size = range.segment_size;
        Ok(Self { data_dir, walker, history, segment_size, file: None, buffer: vec![0; READ_LEN] })
    }

    /// The end of the next record, after a look at it, or `None` past the last.
    fn next(&mut self, look: impl FnOnce(WalRecord<'_>)) -> Result<Option<Lsn>> {
        loop {
            let at = match self.walker.step()? {
                WalStep::Record(record) => {
                    look(record);
                    return Ok(Some(record.end));
                }
                WalStep::Finished => return Ok(None),
                WalStep::NeedBytes { at } => at,
            };
            let name = self.history.segment_name(self.segment_size.segment_of(at), self.segment_size);
            let name = name.file_name(self.segment_size);
            let file = match self.file.take() {
                Some((open, file)) if open == name => file,
                _ => self.data_dir.open_wal_file(&name)?.ok_or_else(|| lost(&name))?,
            };
            let count = file.read_at(&mut self.buffer, self.segment_size.offset_of(at));
            let count = count.map_err(|e| Error::io("read", name.as_ref(), e))?;
            if count == 0 {
                return Err(lost(&name));
            }
            self.walker.feed(&self.buffer[..count]);
            self.file = Some((name, file));
        }
    }
}

/// The range by timelines, as PostgreSQL's manifest wants it.
pub(super) fn spans(data_dir: &DataDir, start_timeline: TimelineId, range: WalRange) -> Result<Vec<WalSpan>> {
    let (history, _) = history(data_dir, range.timeline)?;
    let spans = history.wal_ranges(start_timeline, range.start, range.stop)?.into_iter();
    Ok(spans.map(|span| WalSpan { timeline: span.timeline, start: span.start, end: span.end }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked_at(major: u32, records: &[(u8, u8, &[u32])]) -> Option<String> {
        let mut hazards = Hazards::new(MajorVersion::new(major).unwrap());
        for (rmgr, info, words) in records {
            let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut bytes = vec![0; 24];
            (bytes[16], bytes[17]) = (*info, *rmgr);
            bytes.extend([255, data.len() as u8]);
            bytes.extend(data);
            hazards.look_at(WalRecord::new_unchecked(Lsn::new(1), &bytes));
        }
        hazards.found
    }

    #[test]
    fn a_copied_database_that_is_dropped_in_the_same_backup_voids_it() {
        let copy: (u8, u8, &[u32]) = (4, 0x00, &[20, 1663, 10, 1663]);
        for (major, drop) in [(13, 0x10), (14, 0x10), (15, 0x20), (18, 0x20)] {
            assert_eq!(looked_at(major, &[copy]), None);
            assert_eq!(looked_at(major, &[copy, (4, drop, &[11, 1, 1663])]), None);
            assert_eq!(looked_at(major, &[copy, (4, drop, &[10, 1, 1700])]), None);
            assert!(looked_at(major, &[copy, (4, drop, &[10, 2, 1700, 1663])]).is_some());
            assert_eq!(looked_at(major, &[(4, drop, &[10, 1, 1663]), copy]), None);
        }
        assert_eq!(looked_at(15, &[copy, (4, 0x10, &[10, 1, 1663])]), None, "a logged CREATE DATABASE drops nothing");
    }

    #[test]
    fn a_tablespace_that_comes_during_the_backup_voids_it_unless_it_is_in_place() {
        assert!(looked_at(15, &[(5, 0x00, &[16384, u32::from_le_bytes(*b"/ts\0")])]).is_some());
        assert_eq!(looked_at(15, &[(5, 0x00, &[16384, 0])]), None);
        assert_eq!(looked_at(15, &[(5, 0x10, &[16384])]), None);
    }
}
