//! WAL summaries (17+): files in which the server says which blocks a part of the log changed.
//!
//! One lies in `pg_wal/summaries` for about each checkpoint. Its name is the timeline and the part of the log, the end not included: five times eight upper-case
//! hexadecimal digits (timeline, start high, start low, end high, end low) and `.summary`. Whatever else lies there is none:
//! the server writes to `temp.summary` and renames.
//!
//! ```text
//! u32 0x652B137B                                                     magic
//! then for each fork, in no order that matters here:
//!   u32 spc, u32 db, u32 rel, i32 fork, u32 limit, u32 n             24 bytes; a limit of 0xFFFFFFFF is none
//!   n times u16 usage                                                one for each 65,536 blocks of the fork
//!   for each usage that is not 0: usage times u16                    4,096: a bitmap, least significant bit first; else offsets
//! 24 zero bytes                                                      the end
//! u32 CRC-32C of all before it
//! ```
//!
//! A relation 0 stands for all of a database in a tablespace. Up to early 2026 servers wrote a limit for visibility maps that is
//! too large; who reads this leaves those forks out anyway.
//!
//! A [`WalSummaryReader`] is fed bytes like a [`WalWalker`](super::WalWalker), and holds no more of them than one fork's usages (128 KB). What it yields is
//! proved only by the CRC at the end: it may be used when the reader has said [`WalSummaryStep::Finished`], not before.
//!
//! PostgreSQL: `src/common/blkreftable.c`, `BlockRefTableReaderNextRelation`, `BlockRefTableReaderGetBlocks`;
//! `src/backend/backup/walsummary.c`, `GetWalSummaries`.

use super::bytes::{u16_at, u32_at};
use super::{
    BlockNumber, DatabaseOid, ForkNumber, Lsn, RelFileLocator, RelFileNumber, TablespaceOid, TimelineId, WalRange,
};
use crate::error::{Error, Result};

const MAGIC: u32 = 0x652B_137B;
const MAGIC_LEN: usize = 4;
const ENTRY_LEN: usize = 24;
const CRC_LEN: usize = 4;
const NO_LIMIT: u32 = u32::MAX;
/// Blocks of a chunk, chunks of the longest fork, words of a bitmap.
const CHUNK_BLOCKS: u32 = 1 << 16;
const MAX_CHUNKS: usize = 1 << 16;
const BITMAP_WORDS: usize = 4096;
const SUFFIX: &[u8] = b".summary";

/// The part of the log that a summary's name says.
pub fn parse_wal_summary_name(name: &[u8]) -> Option<WalRange> {
    let digits = name.strip_suffix(SUFFIX).filter(|digits| digits.len() == 40)?;
    let upper_hex = digits.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    let digits = std::str::from_utf8(digits).ok().filter(|_| upper_hex)?;
    let timeline = u32::from_str_radix(&digits[..8], 16).ok()?;
    let [start, end] = [&digits[8..24], &digits[24..]].map(|lsn| u64::from_str_radix(lsn, 16).ok().map(Lsn::new));
    let (start, end) = (start?, end?);
    (timeline != 0 && start < end).then_some(WalRange { timeline: TimelineId::new(timeline), start, end })
}

/// The name of the summary of a part of the log.
pub fn wal_summary_name(range: WalRange) -> String {
    format!("{:08X}{:016X}{:016X}.summary", range.timeline.as_u32(), range.start.as_u64(), range.end.as_u64())
}

/// A fork of which a summary says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SummarizedFork {
    /// The relation; number 0 stands for all of its database in its tablespace.
    pub locator: RelFileLocator,
    /// The fork.
    pub fork: ForkNumber,
    /// The smallest length that it had.
    pub limit: Option<BlockNumber>,
}

/// What [`WalSummaryReader::step`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalSummaryStep<'a> {
    /// Feed more bytes.
    NeedBytes,
    /// A fork.
    Fork(SummarizedFork),
    /// Blocks of that fork that changed, in no order.
    Blocks(&'a [BlockNumber]),
    /// All was read and the checksum fits.
    Finished,
}

/// Reads a summary from the bytes it is fed.
#[derive(Debug)]
pub struct WalSummaryReader {
    fed: Vec<u8>,
    /// How much of what is fed was read.
    read: usize,
    /// How much of the file was read, for people.
    offset: u64,
    crc: u32,
    next: Next,
    /// Of the fork that is being read: the number of each chunk and its usage, last first.
    chunks: Vec<(u32, usize)>,
    blocks: Vec<BlockNumber>,
}

/// What comes next in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Magic,
    Entry,
    Usages(usize),
    Chunks,
    Crc,
    Nothing,
}

impl Default for WalSummaryReader {
    fn default() -> Self {
        let (fed, chunks, blocks) = (Vec::new(), Vec::new(), Vec::new());
        Self { fed, read: 0, offset: 0, crc: 0, next: Next::Magic, chunks, blocks }
    }
}

impl WalSummaryReader {
    /// A reader of a new file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the bytes that follow those it was fed before.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.fed.drain(..self.read);
        self.read = 0;
        self.fed.extend_from_slice(bytes);
    }

    /// What comes next.
    ///
    /// # Errors
    /// Corrupt: the file is no summary, or damaged.
    pub fn step(&mut self) -> Result<WalSummaryStep<'_>> {
        loop {
            let step = match self.next {
                Next::Magic => self.magic()?,
                Next::Entry => self.entry()?,
                Next::Usages(count) => self.usages(count)?,
                Next::Chunks => self.chunk(),
                Next::Crc => self.crc()?,
                Next::Nothing => return self.end(),
            };
            match step {
                Found::Fork(fork) => return Ok(WalSummaryStep::Fork(fork)),
                Found::Blocks => return Ok(WalSummaryStep::Blocks(&self.blocks)),
                Found::TooLittle => return Ok(WalSummaryStep::NeedBytes),
                Found::Nothing => {}
            }
        }
    }

    /// The error of a file that ends here, although the reader needs bytes.
    pub fn cut_short(&self) -> Error {
        damaged(self.offset, "it is cut short")
    }

    fn magic(&mut self) -> Result<Found> {
        let Some(bytes) = self.take(MAGIC_LEN) else { return Ok(Found::TooLittle) };
        let magic = u32_at(bytes, 0).unwrap_or_default();
        if magic != MAGIC {
            return Err(damaged(0, &format!("it has magic {magic:08X}")));
        }
        self.next = Next::Entry;
        Ok(Found::Nothing)
    }

    fn entry(&mut self) -> Result<Found> {
        let at = self.offset;
        let Some(bytes) = self.take(ENTRY_LEN) else { return Ok(Found::TooLittle) };
        let [spc, db, rel, fork, limit, count] =
            [0, 4, 8, 12, 16, 20].map(|field| u32_at(bytes, field).unwrap_or_default());
        if bytes.iter().all(|byte| *byte == 0) {
            self.next = Next::Crc;
            return Ok(Found::Nothing);
        }
        let fork = ForkNumber::from_number(fork).ok_or_else(|| damaged(at, &format!("it has a fork {fork}")))?;
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_CHUNKS);
        let count = count.ok_or_else(|| damaged(at, "a fork is longer than one can be"))?;
        self.next = Next::Usages(count);
        let locator =
            RelFileLocator { spc: TablespaceOid::new(spc), db: DatabaseOid::new(db), rel: RelFileNumber::new(rel) };
        let limit = Some(limit).filter(|limit| *limit != NO_LIMIT).map(BlockNumber::new);
        Ok(Found::Fork(SummarizedFork { locator, fork, limit }))
    }

    fn usages(&mut self, count: usize) -> Result<Found> {
        let at = self.offset;
        let Some(bytes) = self.take(2 * count) else { return Ok(Found::TooLittle) };
        let usages = bytes.chunks_exact(2).map(|usage| usize::from(u16_at(usage, 0).unwrap_or_default()));
        let chunks: Vec<_> = (0..).zip(usages).filter(|(_, usage)| *usage > 0).collect();
        if chunks.iter().any(|(_, usage)| *usage > BITMAP_WORDS) {
            return Err(damaged(at, "a chunk is longer than a bitmap"));
        }
        self.chunks = chunks;
        self.chunks.reverse();
        self.next = Next::Chunks;
        Ok(Found::Nothing)
    }

    fn chunk(&mut self) -> Found {
        let Some((number, usage)) = self.chunks.last().copied() else {
            self.next = Next::Entry;
            return Found::Nothing;
        };
        let mut blocks = std::mem::take(&mut self.blocks);
        blocks.clear();
        let found = self.take(2 * usage).map(|bytes| decode_chunk(number, bytes, &mut blocks));
        self.blocks = blocks;
        if found.is_none() {
            return Found::TooLittle;
        }
        self.chunks.pop();
        Found::Blocks
    }

    fn crc(&mut self) -> Result<Found> {
        let (computed, at) = (self.crc, self.offset);
        let Some(bytes) = self.take(CRC_LEN) else { return Ok(Found::TooLittle) };
        let stored = u32_at(bytes, 0).unwrap_or_default();
        if stored != computed {
            return Err(damaged(at, &format!("it has CRC {stored:08X}, but its contents give {computed:08X}")));
        }
        self.next = Next::Nothing;
        Ok(Found::Nothing)
    }

    fn end(&self) -> Result<WalSummaryStep<'_>> {
        if self.read < self.fed.len() {
            return Err(damaged(self.offset, "it goes on after its end"));
        }
        Ok(WalSummaryStep::Finished)
    }

    /// The next bytes of the file, if they are all there.
    fn take(&mut self, len: usize) -> Option<&[u8]> {
        let bytes = self.fed.get(self.read..)?.get(..len)?;
        self.read += len;
        self.offset += len as u64;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        Some(bytes)
    }
}

/// What one look at the bytes at hand came to.
enum Found {
    TooLittle,
    Nothing,
    Fork(SummarizedFork),
    Blocks,
}

fn decode_chunk(number: u32, bytes: &[u8], blocks: &mut Vec<BlockNumber>) {
    let first = number * CHUNK_BLOCKS;
    let words = bytes.chunks_exact(2).map(|word| u32::from(u16_at(word, 0).unwrap_or_default()));
    if bytes.len() < 2 * BITMAP_WORDS {
        blocks.extend(words.map(|offset| BlockNumber::new(first + offset)));
        return;
    }
    for (base, word) in (first..=first + (CHUNK_BLOCKS - 1)).step_by(16).zip(words) {
        blocks.extend((0..16).filter(|bit| word >> bit & 1 == 1).map(|bit| BlockNumber::new(base + bit)));
    }
}

fn damaged(offset: u64, what: &str) -> Error {
    Error::corrupt(format!("offset {offset}"), format!("the WAL summary is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::ErrorKind;

    /// spc 1663, db 5: relation, fork, limit, blocks.
    type Entry = (u32, u32, Option<u32>, Vec<u32>);

    /// A second writing of the format.
    fn summary(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        for (rel, fork, limit, blocks) in entries {
            let chunk_count = blocks.iter().max().map_or(0, |block| block / CHUNK_BLOCKS + 1);
            for field in [1663, 5, *rel, *fork, limit.unwrap_or(NO_LIMIT), chunk_count] {
                bytes.extend(field.to_le_bytes());
            }
            let chunk = |number| blocks.iter().filter(move |block| **block / CHUNK_BLOCKS == number);
            let usage = |number| chunk(number).count().min(BITMAP_WORDS);
            (0..chunk_count).for_each(|number| bytes.extend((usage(number) as u16).to_le_bytes()));
            for number in 0..chunk_count {
                if usage(number) < BITMAP_WORDS {
                    chunk(number).for_each(|block| bytes.extend((*block as u16).to_le_bytes()));
                } else {
                    let mut bitmap = vec![0; 2 * BITMAP_WORDS];
                    chunk(number).for_each(|block| bitmap[(*block as u16 / 8) as usize] |= 1 << (block % 8));
                    bytes.extend(bitmap);
                }
            }
        }
        bytes.extend([0; ENTRY_LEN]);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8], piece_len: usize) -> Result<Vec<Entry>> {
        let mut reader = WalSummaryReader::new();
        let mut pieces = bytes.chunks(piece_len);
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            match reader.step()? {
                WalSummaryStep::NeedBytes => match pieces.next() {
                    Some(piece) => reader.feed(piece),
                    None => return Err(reader.cut_short()),
                },
                WalSummaryStep::Fork(fork) => {
                    let limit = fork.limit.map(BlockNumber::as_u32);
                    entries.push((fork.locator.rel.as_u32(), fork.fork as u32, limit, Vec::new()));
                }
                WalSummaryStep::Blocks(blocks) => {
                    entries.last_mut().unwrap().3.extend(blocks.iter().map(|block| block.as_u32()));
                }
                WalSummaryStep::Finished => return Ok(entries),
            }
        }
    }

    #[test]
    fn limits_lists_and_bitmaps_are_read() {
        let entries: Vec<Entry> = vec![
            (0, 0, Some(0), vec![]),
            (16384, 0, None, vec![7, 3, 65_535, 65_536]),
            (16384, 2, Some(1), vec![0]),
            (16385, 0, Some(90_000), (0..5000).map(|at| 2 * at).chain([131_071, 131_072, 400_000]).collect()),
            (16386, 0, None, vec![u32::MAX - 1]),
        ];
        let bytes = summary(&entries);
        for piece_len in [1, 7, 4096, bytes.len()] {
            assert_eq!(read(&bytes, piece_len).unwrap(), entries);
        }
        assert_eq!(read(&summary(&[]), 9).unwrap(), []);
        assert_eq!(summary(&[]).len(), 32);
    }

    #[test]
    fn every_flipped_byte_truncation_and_addition_is_found() {
        let bytes = summary(&[(16384, 0, Some(9), vec![1, 2, 70_000]), (16385, 3, None, vec![5])]);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(read(&damaged, 64).unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
            assert_eq!(read(&bytes[..at], 64).unwrap_err().kind(), ErrorKind::Corrupt, "cut at {at}");
        }
        assert!(read(&[bytes, vec![0]].concat(), 1 << 16).unwrap_err().to_string().contains("goes on after its end"));
    }

    #[test]
    fn forks_and_chunks_that_cannot_be_are_refused() {
        let fork = summary(&[(16384, 4, None, vec![])]);
        assert!(read(&fork, 64).unwrap_err().to_string().contains("a fork 4"));
        let mut usage = summary(&[(16384, 0, None, vec![1])]);
        usage[28..30].copy_from_slice(&4097u16.to_le_bytes());
        assert!(read(&usage, 64).unwrap_err().to_string().contains("longer than a bitmap"));
        let mut long = summary(&[(16384, 0, None, vec![1])]);
        long[24..28].copy_from_slice(&65_537u32.to_le_bytes());
        assert!(read(&long, 64).unwrap_err().to_string().contains("longer than one can be"));
    }

    #[test]
    fn names_are_those_that_postgresql_makes() {
        let name = "0000000A00000001020000280000000102FFFFF0.summary";
        let range = parse_wal_summary_name(name.as_bytes()).unwrap();
        assert_eq!(
            (range.timeline.as_u32(), range.start.as_u64(), range.end.as_u64()),
            (10, 0x1_0200_0028, 0x1_02FF_FFF0)
        );
        assert_eq!(wal_summary_name(range), name);
        for refused in [
            "temp.summary",
            "0000000a00000001020000280000000102FFFFF0.summary",
            "0000000000000001020000280000000102FFFFF0.summary",
            "0000000A00000001020000280000000102000028.summary",
            "0000000A00000001020000280000000102FFFFF0.summary.1",
            "+000000A00000001020000280000000102FFFFF0.summary",
        ] {
            assert_eq!(parse_wal_summary_name(refused.as_bytes()), None, "{refused}");
        }
    }

    proptest! {
        #[test]
        fn a_summary_reads_back_as_it_was_written(
            entries in proptest::collection::vec((1u32..9, 0u32..4, proptest::option::of(0u32..99),
                proptest::collection::vec(0u32..300_000, 0..50)), 0..5),
            piece_len in 1usize..300,
        ) {
            let sorted = entries.into_iter().map(|(rel, fork, limit, mut blocks)| {
                blocks.sort_by_key(|block| block / CHUNK_BLOCKS);
                (rel, fork, limit, blocks)
            });
            let entries: Vec<Entry> = sorted.collect();
            prop_assert_eq!(read(&summary(&entries), piece_len).unwrap(), entries);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, piece_len in 1usize..99) {
            let _ = parse_wal_summary_name(&bytes);
            if bytes.len() > 5 {
                let _ = read(&[&MAGIC.to_le_bytes(), bytes.as_slice()].concat(), piece_len);
            }
        }
    }
}
