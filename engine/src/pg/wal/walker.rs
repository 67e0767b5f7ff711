//! Reading WAL record by record, without reading any file.
//!
//! A [`WalWalker`] is given where to begin and where to stop. It is fed bytes and yields a record, or asks for
//! the bytes at an LSN, or fails with the LSN at which the log is broken. Whoever owns the bytes (an archive,
//! pg_wal, a stream) feeds it. It is done when every record that *begins* before the stop position has been read
//! to its end, and that is the proof that a backup's WAL is whole: a standby's stop position may be a page or
//! segment border, or in the padding after a WAL switch, where no record ends. There is no "end of WAL" here:
//! what cannot be read before the stop is damage.
//!
//! A position is trusted only if all of this holds:
//! * the page says that it is the page of that LSN, of this major version, and of the timeline that the history
//!   gives for it (recycled files hold old pages, and the abandoned end of an older timeline looks perfect);
//! * the segment's first page names this cluster and this segment size;
//! * the record points back to the record before it, and its CRC-32C fits;
//! * where a record goes on on another page, that page says so, and how many bytes are left.
//!
//! Two records are not what they look like. After a WAL switch the rest of the segment means nothing. And a
//! record that a crash cut off stays in the log for ever: the page after it carries a flag and begins with a
//! record that names the lost one (13.5, 14.1 and later); the walker drops the lost record and goes on there.
//!
//! A record may begin in the last 8 bytes of a page, so that only its length is on that page. Records on one
//! page are yielded from the fed bytes; those that span pages are put together first. Memory is bounded by the
//! longest record (1 GB by PostgreSQL's rule, and only as its bytes really arrive) and what the caller feeds at
//! once.
//!
//! PostgreSQL: `src/backend/access/transam/xlogreader.c`, `XLogDecodeNextRecord`, `ValidXLogRecordHeader`,
//! `ValidXLogRecord`; `src/include/access/xlogrecord.h`, `XLogRecord`; `xlog.c`,
//! `CreateOverwriteContrecordRecord`.

use std::ops::Range;

use super::super::bytes::{u32_at, u64_at};
use super::super::{Lsn, MajorVersion, SystemIdentifier, TimelineHistory};
use super::page_header::{LONG_LEN, SHORT_LEN, WalPageHeader};
use super::record::main_data_only;
use super::{WalBlockSize, WalSegmentSize};
use crate::error::{Error, Result};

pub(super) const RECORD_HEADER_LEN: usize = 24;
const CRC_OFFSET: usize = 20;
/// PostgreSQL: `src/include/utils/memutils.h`, `MaxAllocSize`; no server could have read a longer one.
const MAX_RECORD_LEN: usize = 0x3FFF_FFFF;
/// No log gets within a terabyte of the last LSN, so that no position near a stop overflows.
const MAX_LSN: u64 = u64::MAX - (1 << 40);

const RMGR_XLOG: u8 = 0;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

/// Whose log it is, and how it is cut into files and pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalSource {
    /// The major version that writes it.
    pub major: MajorVersion,
    /// The cluster that writes it.
    pub system_identifier: SystemIdentifier,
    /// The length of a segment.
    pub segment_size: WalSegmentSize,
    /// The size of a page.
    pub block_size: WalBlockSize,
    /// The history of the timeline on which the walk ends; it says on which timeline every page must be.
    pub history: TimelineHistory,
}

/// A record that was read whole and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalRecord<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where the next one may begin: 8-byte aligned, before the page header if that is a page's first
    /// byte; for a WAL switch, the next segment.
    pub end: Lsn,
    bytes: &'a [u8],
}

impl<'a> WalRecord<'a> {
    /// A record of bytes that nobody checked; it has a header.
    pub(crate) fn new_unchecked(lsn: Lsn, bytes: &'a [u8]) -> Self {
        WalRecord { lsn, end: lsn, bytes }
    }

    /// The record as it was inserted, header included, page headers taken out.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its length in bytes, header included.
    pub fn total_len(&self) -> usize {
        self.bytes.len()
    }

    /// Which resource manager wrote it.
    pub fn rmgr(&self) -> u8 {
        self.bytes[17]
    }

    /// The record's kind, as its resource manager numbers them, in the high four bits; PostgreSQL's own flags in
    /// the low.
    pub fn info(&self) -> u8 {
        self.bytes[16]
    }

    /// The record's own data, where it refers to no blocks; `None` where it does.
    /// [`RecordDecoder`](super::RecordDecoder) has it in any case.
    pub fn main_data(&self) -> Option<&'a [u8]> {
        main_data_only(self.bytes)
    }

    fn is_xlog(&self, kind: u8) -> bool {
        self.rmgr() == RMGR_XLOG && self.info() & 0xF0 == kind
    }
}

/// What [`WalWalker::step`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalStep<'a> {
    /// The next record.
    Record(WalRecord<'a>),
    /// Feed the bytes that begin at this position, as many as there are at hand.
    NeedBytes {
        /// Where they must begin.
        at: Lsn,
    },
    /// Every record that begins before the stop position was read.
    Finished,
}

/// Reads WAL record by record from the bytes it is fed.
#[derive(Debug)]
pub struct WalWalker {
    source: WalSource,
    /// Where the next record, or the rest of the one being put together, begins; perhaps before a page header.
    position: Lsn,
    stop: Lsn,
    /// The record before, once one was read.
    prev: Option<Lsn>,
    /// Checked before anything else, because the walk may begin within a segment.
    unchecked_segment: Option<Lsn>,
    page: Option<WalPageHeader>,
    fed: Fed,
    /// A record that spans pages, as far as it was read.
    partial: Option<Partial>,
    assembled: Vec<u8>,
    /// A record that a crash cut off, until the record is read that must name it.
    lost: Option<Lsn>,
}

#[derive(Clone, Copy, Debug)]
struct Partial {
    lsn: Lsn,
    total_len: usize,
}

/// The bytes at hand: those of the log from `begin` on.
#[derive(Debug)]
struct Fed {
    begin: Lsn,
    bytes: Vec<u8>,
}

impl Fed {
    /// Where `len` bytes of the log are in `bytes`, if they are all there.
    fn range(&self, at: Lsn, len: usize) -> Option<Range<usize>> {
        let from = usize::try_from(at.as_u64().checked_sub(self.begin.as_u64())?).ok()?;
        let to = from.checked_add(len)?;
        (to <= self.bytes.len()).then_some(from..to)
    }

    fn get(&self, at: Lsn, len: usize) -> Option<&[u8]> {
        self.bytes.get(self.range(at, len)?)
    }

    /// Drops what lies before `position` and tells where the next bytes must begin.
    fn need_from(&mut self, position: Lsn) -> Lsn {
        let passed_len = usize::try_from(position.as_u64().saturating_sub(self.begin.as_u64())).unwrap_or(usize::MAX);
        if passed_len <= self.bytes.len() {
            self.bytes.drain(..passed_len);
        } else {
            self.bytes.clear();
        }
        self.begin = position;
        plus(position, self.bytes.len())
    }
}

/// What one look at the bytes at hand came to.
enum Progress {
    /// Bytes are missing; nothing before this position is needed any more.
    NeedFrom(Lsn),
    Moved,
    Record {
        lsn: Lsn,
        end: Lsn,
        place: Place,
    },
}

enum Place {
    Fed(Range<usize>),
    Assembled,
}

impl WalWalker {
    /// A walk from the record at `start`, or the first one after it if that is a page's first byte, to `stop`.
    ///
    /// # Errors
    /// Invalid: no record can begin at `start`, or `stop` lies before it.
    pub fn new(source: WalSource, start: Lsn, stop: Lsn) -> Result<WalWalker> {
        let page_offset = start.as_u64() % source.block_size.as_u64();
        let segment_start = Lsn::new(start.as_u64() - source.segment_size.offset_of(start));
        let walker = WalWalker {
            source,
            position: start,
            stop,
            prev: None,
            unchecked_segment: Some(segment_start),
            page: None,
            fed: Fed { begin: segment_start, bytes: Vec::new() },
            partial: None,
            assembled: Vec::new(),
            lost: None,
        };
        let in_header = page_offset != 0 && start < plus(walker.page_of(start), walker.header_len(start));
        if in_header || !start.as_u64().is_multiple_of(8) {
            return Err(Error::invalid(format!("no WAL record can begin at {start}")));
        }
        if stop < start || stop.as_u64() > MAX_LSN {
            return Err(Error::invalid(format!("there is no WAL from {start} to {stop}")));
        }
        Ok(walker)
    }

    /// Takes the bytes of the log that begin where the last step said; any number of them.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.fed.bytes.extend_from_slice(bytes);
    }

    /// The next record, or what is needed to find it.
    ///
    /// # Errors
    /// Corrupt, with the LSN: the log cannot be read on although the stop position was not reached.
    pub fn step(&mut self) -> Result<WalStep<'_>> {
        loop {
            if self.partial.is_none() && self.record_start() >= self.stop {
                return Ok(WalStep::Finished);
            }
            match self.advance()? {
                Progress::Moved => {}
                Progress::NeedFrom(position) => return Ok(WalStep::NeedBytes { at: self.fed.need_from(position) }),
                Progress::Record { lsn, end, place } => {
                    self.prev = Some(lsn);
                    self.position = end;
                    let bytes = match place {
                        Place::Fed(range) => &self.fed.bytes[range],
                        Place::Assembled => &self.assembled,
                    };
                    return Ok(WalStep::Record(WalRecord { lsn, end, bytes }));
                }
            }
        }
    }

    fn advance(&mut self) -> Result<Progress> {
        if let Some(segment) = self.unchecked_segment {
            let Some(bytes) = self.fed.get(segment, LONG_LEN) else { return Ok(Progress::NeedFrom(segment)) };
            self.check_page(segment, bytes)?;
            self.unchecked_segment = None;
        }
        let address = self.page_of(self.position);
        let page = match self.page.filter(|page| page.address == address) {
            Some(page) => page,
            None => {
                let header = self.fed.get(address, self.header_len(address));
                let Some(bytes) = header else { return Ok(Progress::NeedFrom(address)) };
                *self.page.insert(self.check_page(address, bytes)?)
            }
        };
        match self.partial {
            Some(partial) => self.continue_record(partial, page),
            None => self.begin_record(page),
        }
    }

    fn begin_record(&mut self, page: WalPageHeader) -> Result<Progress> {
        let lsn = self.record_start();
        if page.is_continuation && lsn == plus(page.address, self.header_len(lsn)) {
            return Err(self.broken(lsn, "the page begins with the rest of a record that did not begin before it"));
        }
        let Some(bytes) = self.fed.get(lsn, 4) else { return Ok(Progress::NeedFrom(lsn)) };
        let total_len = u32_at(bytes, 0).and_then(|len| usize::try_from(len).ok()).unwrap_or_default();
        if !(RECORD_HEADER_LEN..=MAX_RECORD_LEN).contains(&total_len) {
            return Err(self.broken(lsn, &format!("there is no record, but a length of {total_len}")));
        }
        let page_rest = distance(lsn, self.page_end(page.address));
        let Some(range) = self.fed.range(lsn, total_len.min(page_rest)) else { return Ok(Progress::NeedFrom(lsn)) };
        if total_len <= page_rest {
            let end = aligned(plus(lsn, total_len));
            return self.finish_record(lsn, end, Place::Fed(range));
        }
        self.assembled.clear();
        self.assembled.extend_from_slice(&self.fed.bytes[range]);
        self.partial = Some(Partial { lsn, total_len });
        self.position = self.page_end(page.address);
        Ok(Progress::Moved)
    }

    fn continue_record(&mut self, partial: Partial, page: WalPageHeader) -> Result<Progress> {
        if page.overwrites_continuation {
            self.partial = None;
            self.lost = Some(partial.lsn);
            return Ok(Progress::Moved);
        }
        let remaining_len = partial.total_len - self.assembled.len();
        if !page.is_continuation || usize::try_from(page.remaining_len) != Ok(remaining_len) {
            let what = format!(
                "the record goes on for {remaining_len} bytes, but the page at {} continues one for {}",
                page.address,
                if page.is_continuation { page.remaining_len } else { 0 }
            );
            return Err(self.broken(partial.lsn, &what));
        }
        let from = plus(page.address, self.header_len(page.address));
        let page_end = self.page_end(page.address);
        let len = remaining_len.min(distance(from, page_end));
        let Some(range) = self.fed.range(from, len) else { return Ok(Progress::NeedFrom(page.address)) };
        self.assembled.extend_from_slice(&self.fed.bytes[range]);
        if len < remaining_len {
            self.position = page_end;
            return Ok(Progress::Moved);
        }
        self.partial = None;
        self.finish_record(partial.lsn, aligned(plus(from, len)), Place::Assembled)
    }

    fn finish_record(&mut self, lsn: Lsn, mut end: Lsn, place: Place) -> Result<Progress> {
        let bytes = match &place {
            Place::Fed(range) => &self.fed.bytes[range.clone()],
            Place::Assembled => &self.assembled,
        };
        let record = WalRecord { lsn, end, bytes };
        self.check_record(record)?;
        if record.is_xlog(XLOG_SWITCH) {
            let size = self.source.segment_size.as_u64();
            end = Lsn::new(end.as_u64().next_multiple_of(size));
        }
        self.lost = None;
        Ok(Progress::Record { lsn, end, place })
    }

    fn check_record(&self, record: WalRecord<'_>) -> Result<()> {
        let prev = u64_at(record.bytes, 8).map(Lsn::new).unwrap_or_default();
        if self.prev.map_or(prev >= record.lsn, |expected| prev != expected) {
            let expected = self.prev.map_or("an earlier one".to_owned(), |expected| expected.to_string());
            return Err(self.broken(record.lsn, &format!("the record follows one at {prev}, not {expected}")));
        }
        let stored = u32_at(record.bytes, CRC_OFFSET).unwrap_or_default();
        let body_crc = crc32c::crc32c(&record.bytes[RECORD_HEADER_LEN..]);
        let computed = crc32c::crc32c_append(body_crc, &record.bytes[..CRC_OFFSET]);
        if stored != computed {
            let what = format!("the record has CRC {stored:08X}, but its contents give {computed:08X}");
            return Err(self.broken(record.lsn, &what));
        }
        match self.lost {
            Some(lost) if overwritten(record) != Some(lost) => {
                Err(self.broken(record.lsn, &format!("the record at {lost} has no end, and nothing here replaces it")))
            }
            _ => Ok(()),
        }
    }

    fn check_page(&self, address: Lsn, bytes: &[u8]) -> Result<WalPageHeader> {
        let page = WalPageHeader::parse(bytes).map_err(|error| error.at(self.place(address)))?;
        if page.address != address {
            let what = format!("the page is that of {} (a recycled WAL file?)", page.address);
            return Err(self.broken(address, &what));
        }
        if page.major != self.source.major {
            let what = format!("the page was written by PostgreSQL {}, not {}", page.major, self.source.major);
            return Err(self.broken(address, &what));
        }
        let timeline = self.source.history.timeline_of(address);
        if page.timeline != timeline {
            return Err(self.broken(address, &format!("the page is of timeline {}, not {timeline}", page.timeline)));
        }
        self.check_long_header(address, &page)?;
        Ok(page)
    }

    fn check_long_header(&self, address: Lsn, page: &WalPageHeader) -> Result<()> {
        let is_first = self.source.segment_size.offset_of(address) == 0;
        let Some(long) = page.long.filter(|_| is_first) else {
            let matches = page.long.is_some() == is_first;
            return if matches { Ok(()) } else { Err(self.broken(address, "the page has the wrong kind of header")) };
        };
        let source = &self.source;
        if long.system_identifier != source.system_identifier {
            let (theirs, ours) = (long.system_identifier, source.system_identifier);
            return Err(self.broken(address, &format!("the WAL is of cluster {theirs}, not {ours}")));
        }
        if (long.segment_size, long.block_size) != (source.segment_size.as_u32(), source.block_size.as_u32()) {
            let what = format!("segments of {} and pages of {} bytes", long.segment_size, long.block_size);
            return Err(self.broken(address, &format!("the WAL file says {what}, unlike pg_control")));
        }
        Ok(())
    }

    /// Where the next record begins: after the header if the position is a page's first byte.
    fn record_start(&self) -> Lsn {
        let at_page_start = self.position == self.page_of(self.position);
        if at_page_start { plus(self.position, self.header_len(self.position)) } else { self.position }
    }

    fn page_of(&self, lsn: Lsn) -> Lsn {
        Lsn::new(lsn.as_u64() - lsn.as_u64() % self.source.block_size.as_u64())
    }

    fn page_end(&self, page: Lsn) -> Lsn {
        Lsn::new(page.as_u64().saturating_add(self.source.block_size.as_u64()))
    }

    /// Of the header of the page that `lsn` is on.
    fn header_len(&self, lsn: Lsn) -> usize {
        let is_first = self.source.segment_size.offset_of(self.page_of(lsn)) == 0;
        if is_first { LONG_LEN } else { SHORT_LEN }
    }

    fn broken(&self, lsn: Lsn, what: &str) -> Error {
        Error::corrupt(self.place(lsn), format!("the WAL is broken: {what}"))
    }

    fn place(&self, lsn: Lsn) -> String {
        let size = self.source.segment_size;
        let file = self.source.history.segment_name(size.segment_of(lsn), size).file_name(size);
        format!("WAL {lsn}, file {file} offset {}", size.offset_of(lsn))
    }
}

/// The lost record that this one names, if it is of the kind that does.
fn overwritten(record: WalRecord<'_>) -> Option<Lsn> {
    let names_one = record.is_xlog(XLOG_OVERWRITE_CONTRECORD);
    record.main_data().filter(|_| names_one).and_then(|data| u64_at(data, 0)).map(Lsn::new)
}

fn plus(lsn: Lsn, len: usize) -> Lsn {
    Lsn::new(lsn.as_u64().saturating_add(u64::try_from(len).unwrap_or(u64::MAX)))
}

fn distance(from: Lsn, to: Lsn) -> usize {
    usize::try_from(to.as_u64().saturating_sub(from.as_u64())).unwrap_or(usize::MAX)
}

fn aligned(lsn: Lsn) -> Lsn {
    Lsn::new(lsn.as_u64().next_multiple_of(8))
}

#[cfg(test)]
mod tests;
