//! A change map as an object of a repository; its bytes are described one room up.

use std::io::{BufReader, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::blocks::{BITMAP_WORDS, BlockSet, Group};
use super::{ChangeMap, Coverage, RelationChanges};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{BlockNumber, DatabaseOid, Lsn, RelFileLocator, SystemIdentifier, TablespaceOid, TimelineId, WalRange};

const FIRST_LINE: &[u8] = b"pgstrata changes 1\n";
const CHECK_LEN: usize = 32;
/// Bytes of values at most: a change in every group of a cluster of 60 TB.
const MAX_DECODED_LEN: u64 = 1 << 30;
/// Bytes of the header at most.
const MAX_HEADER_LEN: u64 = 1 << 24;
const MAX_RELATIONS: usize = 1 << 24;
/// As that of the repository's other metadata, and the window that a reader is ready for.
const LEVEL: i32 = 3;
const MAX_WINDOW_LOG: u32 = 23;
/// Postcard borrows from this what it cannot own; nothing here is borrowed.
const SCRATCH_LEN: usize = 16;

#[derive(Serialize, Deserialize)]
struct Header {
    system_identifier: u64,
    ranges: Vec<(TimelineId, u64, u64)>,
    databases: Vec<(TablespaceOid, DatabaseOid)>,
    relation_count: u32,
}

#[derive(Serialize, Deserialize)]
struct Relation {
    locator: RelFileLocator,
    limit: Option<BlockNumber>,
    groups: Vec<StoredGroup>,
}

#[derive(Serialize, Deserialize)]
struct StoredGroup {
    number: u16,
    blocks: StoredBlocks,
}

#[derive(Serialize, Deserialize)]
enum StoredBlocks {
    Gaps(Vec<u16>),
    Bitmap(Vec<u8>),
}

impl ChangeMap {
    /// The map as the object `name` stores it.
    ///
    /// # Errors
    /// Unsupported: it is larger than a reader would take.
    pub fn encode(&self, name: &str) -> Result<Vec<u8>> {
        let mut relations: Vec<_> = self.relations.iter().collect();
        relations.sort_unstable_by_key(|(locator, _)| **locator);
        let too_large = || Error::new(ErrorKind::Unsupported, "a map of changes that no reader would take").at(name);
        let relation_count =
            u32::try_from(relations.len()).ok().filter(|_| relations.len() <= MAX_RELATIONS).ok_or_else(too_large)?;
        let failed = |e: std::io::Error| Error::bug("cannot compress a map of changes").because(e);
        let mut frame = zstd::Encoder::new(FIRST_LINE.to_vec(), LEVEL).map_err(failed)?;
        let header = encoded(&self.header(relation_count))?;
        let mut room = MAX_DECODED_LEN;
        if header.len() as u64 > MAX_HEADER_LEN {
            return Err(too_large());
        }
        frame.write_all(&header).map_err(failed)?;
        for (locator, changes) in relations {
            let bytes = encoded(&stored(*locator, changes))?;
            room = room.checked_sub(bytes.len() as u64).ok_or_else(too_large)?;
            frame.write_all(&bytes).map_err(failed)?;
        }
        let mut bytes = frame.finish().map_err(failed)?;
        let check = check(name, &bytes);
        bytes.extend_from_slice(check.as_bytes());
        Ok(bytes)
    }

    /// Reads what was stored as the object `name`.
    ///
    /// # Errors
    /// Corrupt, or unsupported if it is of a newer format.
    pub fn decode(bytes: &[u8], name: &str) -> Result<ChangeMap> {
        let damaged = || Error::corrupt(name, "the map of changes does not match its checksum");
        let split = bytes.len().checked_sub(CHECK_LEN).ok_or_else(damaged)?;
        let (content, stored) = bytes.split_at(split);
        if check(name, content).as_bytes() != stored {
            return Err(damaged());
        }
        let Some(frame) = content.strip_prefix(FIRST_LINE) else {
            let what = "the map of changes is of a format that this program does not know";
            return Err(Error::new(ErrorKind::Unsupported, what).at(name));
        };
        decode_frame(frame).map_err(|error| error.at(name))
    }

    fn header(&self, relation_count: u32) -> Header {
        let ranges = self.coverage.ranges().map(|range| (range.timeline, range.start.as_u64(), range.end.as_u64()));
        Header {
            system_identifier: self.system_identifier.as_u64(),
            ranges: ranges.collect(),
            databases: self.databases.iter().copied().collect(),
            relation_count,
        }
    }
}

/// The object `name` with `frame` in it, for who wants to break what lies behind the checksum.
pub(crate) fn sealed(frame: &[u8], name: &str) -> Vec<u8> {
    let content = [FIRST_LINE, frame].concat();
    [&content, check(name, &content).as_bytes().as_slice()].concat()
}

fn check(name: &str, content: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(name.as_bytes()).update(&[0]).update(content).finalize()
}

fn encoded<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|e| Error::bug("cannot encode a map of changes").because(e))
}

fn decode_frame(frame: &[u8]) -> Result<ChangeMap> {
    let damaged = |e| Error::new(ErrorKind::Corrupt, "the map of changes does not decompress").because(e);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(damaged)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(damaged)?;
    let mut values = BufReader::new(decoder.take(MAX_HEADER_LEN));
    let header: Header = next(&mut values)?;
    values.get_mut().set_limit(MAX_DECODED_LEN);
    let mut map = from_header(&header).ok_or_else(|| astray("its header is not what a writer writes"))?;
    let mut last = None;
    for _ in 0..header.relation_count {
        let relation: Relation = next(&mut values)?;
        let locator = relation.locator;
        if last.is_some_and(|last| last >= locator) {
            return Err(astray(&format!("relation {locator} is out of order")));
        }
        last = Some(locator);
        let changes = changes(relation).ok_or_else(|| astray(&format!("the blocks of {locator} are no set")))?;
        map.relations.insert(locator, changes);
    }
    match values.read(&mut [0]).map_err(damaged)? {
        0 => Ok(map),
        _ => Err(astray("it has bytes to spare")),
    }
}

fn next<T: DeserializeOwned>(values: &mut impl Read) -> Result<T> {
    let mut scratch = [0; SCRATCH_LEN];
    let value = postcard::from_io((values, &mut scratch[..]));
    value.map(|(value, _)| value).map_err(|e| astray("it does not decode").because(e))
}

fn astray(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the map of changes is damaged: {what}"))
}

fn from_header(header: &Header) -> Option<ChangeMap> {
    let mut map = ChangeMap::new(SystemIdentifier::new(header.system_identifier));
    for &(timeline, start, end) in &header.ranges {
        map.coverage.add(WalRange { timeline, start: Lsn::new(start), end: Lsn::new(end) });
    }
    map.databases = header.databases.iter().copied().collect();
    let as_written = |coverage: &Coverage| {
        let ranges = coverage.ranges().map(|range| (range.timeline, range.start.as_u64(), range.end.as_u64()));
        ranges.eq(header.ranges.iter().copied())
    };
    let ascending = header.databases.is_sorted_by(|a, b| a < b);
    let bounded = usize::try_from(header.relation_count).is_ok_and(|count| count <= MAX_RELATIONS);
    (as_written(&map.coverage) && ascending && bounded).then_some(map)
}

fn stored(locator: RelFileLocator, changes: &RelationChanges) -> Relation {
    let blocks = |group: &Group| match group {
        Group::Offsets(offsets) => {
            let mut last = 0;
            StoredBlocks::Gaps(offsets.iter().map(|offset| offset - std::mem::replace(&mut last, *offset)).collect())
        }
        Group::Bitmap(words) => StoredBlocks::Bitmap(words.iter().flat_map(|word| word.to_le_bytes()).collect()),
    };
    let groups = changes.marked.groups().iter();
    let groups = groups.map(|(number, group)| StoredGroup { number: *number, blocks: blocks(group) }).collect();
    Relation { locator, limit: changes.limit, groups }
}

/// `None` unless a writer would have written it.
fn changes(relation: Relation) -> Option<RelationChanges> {
    let groups = relation.groups.into_iter().map(|stored| {
        let group = match stored.blocks {
            StoredBlocks::Gaps(gaps) => {
                let mut at = 0u16;
                let offsets = gaps.iter().map(|gap| {
                    at = at.checked_add(*gap)?;
                    Some(at)
                });
                Group::Offsets(offsets.collect::<Option<_>>()?)
            }
            StoredBlocks::Bitmap(bytes) => Group::Bitmap(words(&bytes)?),
        };
        Some((stored.number, group))
    });
    let marked = BlockSet::from_groups(groups.collect::<Option<_>>()?)?;
    Some(RelationChanges { limit: relation.limit, marked })
}

fn words(bytes: &[u8]) -> Option<Box<[u64; BITMAP_WORDS]>> {
    let (words, rest) = bytes.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    rest.is_empty().then(|| words.into_boxed_slice().try_into().ok())?
}
