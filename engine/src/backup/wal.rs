//! The WAL that makes a backup consistent: every segment from its start to its stop.
//!
//! It is copied from the server's `pg_wal` when the backup has ended, while a replication slot keeps it there. The bytes at and after the stop are stored
//! as zeros: they belong to no part of this backup, and a recovery must end at the stop, not somewhere in a segment that
//! was half written. Segments are taken from the timeline that the server's history says, newest first, as recovery reads them.
//!
//! What goes wrong: a segment that was removed or recycled before it was copied (no slot could be had), noticed by its name or by
//! [`prove`], which follows every record from start to stop. Then the backup is void.

use std::io::Read;
use std::sync::Arc;

use super::copy::{Content, Item};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{Lsn, TimelineHistory, TimelineId, WalSegmentSize, history_file_name};
use crate::repo::{FileEntry, FileKind};
use crate::source::DataDir;

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
}

/// The history of a timeline, from `pg_wal`, and its file.
pub(super) fn history(data_dir: &DataDir, timeline: TimelineId) -> Result<(TimelineHistory, Option<Item>)> {
    let name = history_file_name(timeline);
    let Some(mut file) = data_dir.open_wal_file(&name)? else {
        if timeline.as_u32() > 1 {
            return Err(lost(&name));
        }
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
        let valid_len = range.stop.as_u64().saturating_sub(begin.as_u64()).min(size.as_u64());
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
