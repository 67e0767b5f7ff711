//! The WAL that makes a backup consistent: every segment from its start to its stop.
//!
//! It is copied from the server's `pg_wal` when the backup has ended, while a replication slot keeps it there. The bytes at and after the stop are stored
//! as zeros: they belong to no part of this backup, and a recovery must end at the stop, not somewhere in a segment that
//! was half written. Segments are taken from the timeline that the server's history says, newest first, as recovery reads them.
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
    ControlFile, Lsn, TimelineHistory, TimelineId, WalSegmentSize, WalSource, WalStep, WalWalker, history_file_name,
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

/// Follows every record from start to stop: the proof that the backup's WAL is whole.
///
/// # Errors
/// `Unavailable` or `Corrupt` if a segment is gone or was recycled, with the LSN.
pub(super) fn prove(data_dir: &DataDir, range: WalRange, control: &ControlFile) -> Result<()> {
    let mut log = Log::open(data_dir, range, control)?;
    while log.next()?.is_some() {}
    Ok(())
}

/// Where the record of a stopped cluster's last checkpoint ends.
pub(super) fn end_of_checkpoint(data_dir: &DataDir, control: &ControlFile) -> Result<Lsn> {
    let stop = control.checkpoint.checked_add(1).ok_or_else(|| Error::bug("a checkpoint at the end of the log"))?;
    let segment_size = control.wal_segment_size;
    let range = WalRange { start: control.checkpoint, stop, timeline: control.timeline, segment_size, at_rest: true };
    let mut log = Log::open(data_dir, range, control)?;
    log.next()?.ok_or_else(|| Error::corrupt(control.checkpoint.to_string(), "the last checkpoint is not in pg_wal"))
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

    /// The end of the next record, or `None` past the last.
    fn next(&mut self) -> Result<Option<Lsn>> {
        loop {
            let at = match self.walker.step()? {
                WalStep::Record(record) => return Ok(Some(record.end)),
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
