//! What a record refers to: blocks, with or without an image of the page, and the record's own data.
//!
//! After the 24 bytes of its header a record is a list of small headers, then the bytes that they announce, in the same order:
//!
//! ```text
//! id     what                      then
//! 0-32   a block                   u8 flags: low 4 bits fork, 0x10 image, 0x20 data, 0x40 the page is made anew,
//!                                  0x80 relation as in the block before; u16 length of data;
//!                                  with 0x10: u16 length of image, u16 hole offset, u8 image flags, and
//!                                  u16 hole length if the image has a hole and is compressed;
//!                                  without 0x80: u32 tablespace, u32 database, u32 relation; u32 block
//! 252    top-level transaction     u32 (14+)
//! 253    replication origin        u16
//! 254    main data                 u32 length; always the last
//! 255    main data                 u8 length; always the last
//! ```
//!
//! Image flags were renumbered in 15, so the same byte means two things: 13 and 14 have 1 hole, 2 compressed, 4 apply; later ones 1 hole, 2 apply,
//! 4 pglz, 8 lz4, 16 zstd. An image is a page without its hole (a run of zeros between its two parts), perhaps compressed; the hole's length
//! is what the image lacks of a page, or stands there if the image is compressed.
//!
//! A record that comes here has a good CRC, so what does not fit is no torn write: it is a version or an extension of the format that this program
//! does not know, and an error, since a block that was overlooked would be lost. PostgreSQL itself ignores flags that it does not know;
//! this decoder refuses them.
//!
//! [`RecordDecoder`] keeps its list of blocks from record to record, so that decoding allocates nothing.
//!
//! PostgreSQL: `src/include/access/xlogrecord.h`; `src/backend/access/transam/xlogreader.c`, `DecodeXLogRecord`.

use super::super::bytes::{u16_at, u32_at};
use super::super::{
    BlockNumber, BlockSize, DatabaseOid, ForkNumber, MajorVersion, RelFileLocator, RelFileNumber, TablespaceOid,
};
use super::walker::{RECORD_HEADER_LEN, WalRecord};
use crate::error::{Error, ErrorKind, Result};

const MAX_BLOCK_ID: u8 = 32;
const TOP_LEVEL_ID: u8 = 252;
const ORIGIN_ID: u8 = 253;
const LONG_DATA_ID: u8 = 254;
const SHORT_DATA_ID: u8 = 255;

const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_RELATION: u8 = 0x80;

const HAS_HOLE: u8 = 1;
/// Bytes of a relation's identity in a record.
pub(super) const LOCATOR_LEN: usize = 12;
/// PostgreSQL: `InvalidBlockNumber`.
const NO_BLOCK: u32 = u32::MAX;

/// How the image of a page is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageCompression {
    /// PostgreSQL's own.
    Pglz,
    /// LZ4 (15+).
    Lz4,
    /// Zstandard (15+).
    Zstd,
}

/// The image of a page, in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageImage {
    /// Its bytes in the record.
    pub len: u16,
    /// Where in the page the hole begins.
    pub hole_offset: u16,
    /// Bytes of the hole; 0 if there is none.
    pub hole_len: u16,
    /// How it is compressed.
    pub compression: Option<ImageCompression>,
    /// Whether replay puts it in place; if not, it is there to compare with.
    pub applies: bool,
}

/// A block that a record refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockReference {
    /// Its number in the record.
    pub id: u8,
    /// The relation.
    pub locator: RelFileLocator,
    /// Its fork.
    pub fork: ForkNumber,
    /// The block.
    pub block: BlockNumber,
    /// Whether replay makes the page anew.
    pub will_init: bool,
    /// The page's image, if there is one.
    pub image: Option<PageImage>,
    /// Bytes of data about the block.
    pub data_len: u16,
}

/// A record with all that it refers to.
#[derive(Clone, Copy, Debug)]
pub struct DecodedRecord<'a> {
    /// The record.
    pub record: WalRecord<'a>,
    /// The blocks that it refers to, by their ids, which ascend.
    pub blocks: &'a [BlockReference],
    /// Its own data, as its resource manager writes it.
    pub main_data: &'a [u8],
    /// The node that the change came from, in logical replication.
    pub origin: Option<u16>,
    /// The transaction of which the record's own is a part.
    pub top_level_xid: Option<u32>,
}

/// Decodes records of one version and page size, one after the other.
#[derive(Debug)]
pub struct RecordDecoder {
    major: MajorVersion,
    block_size: BlockSize,
    blocks: Vec<BlockReference>,
}

impl RecordDecoder {
    /// A decoder of what `major` writes about relations with pages of this size.
    pub fn new(major: MajorVersion, block_size: BlockSize) -> Self {
        Self { major, block_size, blocks: Vec::with_capacity(usize::from(MAX_BLOCK_ID) + 1) }
    }

    /// Decodes a record.
    ///
    /// # Errors
    /// Unsupported, with the LSN: the record has something that this version is not known to write.
    pub fn decode<'a>(&'a mut self, record: WalRecord<'a>) -> Result<DecodedRecord<'a>> {
        self.blocks.clear();
        match self.read(record.bytes()) {
            Ok(rest) => Ok(DecodedRecord {
                record,
                blocks: &self.blocks,
                main_data: rest.main_data,
                origin: rest.origin,
                top_level_xid: rest.top_level_xid,
            }),
            Err(what) => {
                let what = format!("the WAL record of resource manager {} has {what}", record.rmgr());
                let error = Error::new(ErrorKind::Unsupported, what).at(format!("WAL {}", record.lsn));
                Err(error.hint(format!("is this the WAL of an unmodified PostgreSQL {}?", self.major)))
            }
        }
    }

    /// The image flags that say that it is compressed.
    fn compressed_flags(&self) -> u8 {
        if self.major.as_u32() < 15 { 0x02 } else { 0x1C }
    }

    fn read<'a>(&mut self, record: &'a [u8]) -> std::result::Result<Fragments<'a>, String> {
        let compressed = self.compressed_flags();
        let mut rest = record.get(RECORD_HEADER_LEN..).unwrap_or_default();
        let mut fragments = Fragments { main_data: &[], origin: None, top_level_xid: None };
        let mut announced_len = 0;
        let mut main_data_len = 0;
        while rest.len() > announced_len {
            let (header, after) = Header::read(rest, compressed).ok_or("a header that is cut short")?;
            rest = after;
            match header {
                Header::Block(header) => {
                    let reference = self.reference(header)?;
                    announced_len += usize::from(reference.data_len);
                    announced_len += reference.image.map_or(0, |image| usize::from(image.len));
                    self.blocks.push(reference);
                }
                Header::Origin(origin) => fragments.origin = Some(origin),
                Header::TopLevel(xid) if self.major.as_u32() >= 14 => fragments.top_level_xid = Some(xid),
                Header::TopLevel(_) => return Err(unknown_id(TOP_LEVEL_ID)),
                Header::Unknown(id) => return Err(unknown_id(id)),
                Header::MainData(len) => {
                    main_data_len = len;
                    announced_len += len;
                    break;
                }
            }
        }
        if rest.len() != announced_len {
            return Err(format!("{} bytes where {announced_len} are announced", rest.len()));
        }
        fragments.main_data = &rest[announced_len - main_data_len..];
        Ok(fragments)
    }

    fn reference(&self, header: BlockHeader) -> std::result::Result<BlockReference, String> {
        let BlockHeader { id, flags, data_len, .. } = header;
        let block = BlockNumber::new(header.block);
        let last = self.blocks.last();
        if last.is_some_and(|last| last.id >= id) {
            return Err(format!("block {id} out of order"));
        }
        if (flags & HAS_DATA != 0) != (data_len > 0) || header.block == NO_BLOCK {
            return Err(format!("a reference that cannot be: {header:?}"));
        }
        let fork = ForkNumber::from_number(u32::from(flags & FORK_MASK));
        let fork = fork.ok_or_else(|| format!("a fork that is not known: {header:?}"))?;
        let locator = header.locator.or(last.map(|last| last.locator));
        let locator = locator.ok_or_else(|| format!("a block without a relation: {header:?}"))?;
        let image =
            header.image.map(|image| self.image(image).ok_or_else(|| format!("an image that cannot be: {image:?}")));
        let image = image.transpose()?;
        Ok(BlockReference { id, locator, fork, block, will_init: flags & WILL_INIT != 0, image, data_len })
    }

    /// `None` unless PostgreSQL would take it, and every flag is known.
    fn image(&self, header: ImageHeader) -> Option<PageImage> {
        let ImageHeader { len, hole_offset, flags, .. } = header;
        let is_old = self.major.as_u32() < 15;
        let (applies, compression) = match (is_old, flags & !HAS_HOLE) {
            (true, flags @ (0 | 4)) => (flags & 4 != 0, None),
            (true, flags @ (2 | 6)) => (flags & 4 != 0, Some(ImageCompression::Pglz)),
            (false, flags) if flags & !0x1E == 0 => (flags & 2 != 0, compression(flags & 0x1C)?),
            _ => return None,
        };
        let page_len = self.block_size.as_u32();
        let has_hole = flags & HAS_HOLE != 0;
        let missing_len = page_len.checked_sub(u32::from(len))?;
        let hole_len = match compression {
            Some(_) => u32::from(if has_hole { header.stored_hole_len } else { 0 }),
            None => missing_len,
        };
        let fits = match has_hole {
            true => hole_offset > 0 && hole_len > 0 && missing_len > 0 && u32::from(hole_offset) + hole_len <= page_len,
            false => hole_offset == 0 && hole_len == 0 && (compression.is_some() == (missing_len > 0)),
        };
        let hole_len = u16::try_from(hole_len).ok()?;
        fits.then_some(PageImage { len, hole_offset, hole_len, compression, applies })
    }
}

/// Of 15 and later; `None` for what says two things at once.
fn compression(flags: u8) -> Option<Option<ImageCompression>> {
    match flags {
        0 => Some(None),
        0x04 => Some(Some(ImageCompression::Pglz)),
        0x08 => Some(Some(ImageCompression::Lz4)),
        0x10 => Some(Some(ImageCompression::Zstd)),
        _ => None,
    }
}

/// The data of a record that refers to no blocks; `None` if it does.
pub(super) fn main_data_only(record: &[u8]) -> Option<&[u8]> {
    let mut rest = record.get(RECORD_HEADER_LEN..)?;
    loop {
        let (header, after) = Header::read(rest, 0)?;
        match header {
            Header::MainData(len) => return after.get(..len),
            Header::Origin(_) | Header::TopLevel(_) => rest = after,
            Header::Block(_) | Header::Unknown(_) => return None,
        }
    }
}

/// What a record has besides blocks.
struct Fragments<'a> {
    main_data: &'a [u8],
    origin: Option<u16>,
    top_level_xid: Option<u32>,
}

/// One of the small headers.
enum Header {
    Block(BlockHeader),
    Origin(u16),
    TopLevel(u32),
    MainData(usize),
    Unknown(u8),
}

#[derive(Clone, Copy, Debug)]
struct BlockHeader {
    id: u8,
    flags: u8,
    data_len: u16,
    image: Option<ImageHeader>,
    /// `None` for that of the block before.
    locator: Option<RelFileLocator>,
    block: u32,
}

#[derive(Clone, Copy, Debug)]
struct ImageHeader {
    len: u16,
    hole_offset: u16,
    flags: u8,
    /// Of images that are compressed and have a hole.
    stored_hole_len: u16,
}

impl Header {
    /// Reads one, and what follows it; `None` if it is cut short.
    #[inline]
    fn read(bytes: &[u8], compressed_flags: u8) -> Option<(Header, &[u8])> {
        let (id, rest) = bytes.split_first()?;
        let (header, len) = match *id {
            id @ 0..=MAX_BLOCK_ID => return BlockHeader::read(id, rest, compressed_flags),
            SHORT_DATA_ID => (Header::MainData(usize::from(*rest.first()?)), 1),
            LONG_DATA_ID => (Header::MainData(usize::try_from(u32_at(rest, 0)?).ok()?), 4),
            ORIGIN_ID => (Header::Origin(u16_at(rest, 0)?), 2),
            TOP_LEVEL_ID => (Header::TopLevel(u32_at(rest, 0)?), 4),
            id => (Header::Unknown(id), 0),
        };
        Some((header, rest.get(len..)?))
    }
}

impl BlockHeader {
    /// Reads what follows the id, and what follows that.
    #[inline]
    fn read(id: u8, bytes: &[u8], compressed_flags: u8) -> Option<(Header, &[u8])> {
        let (flags, data_len) = (*bytes.first()?, u16_at(bytes, 1)?);
        let mut rest = bytes.get(3..)?;
        let mut image = None;
        if flags & HAS_IMAGE != 0 {
            let (header, after) = ImageHeader::read(rest, compressed_flags)?;
            (image, rest) = (Some(header), after);
        }
        let mut locator = None;
        if flags & SAME_RELATION == 0 {
            locator = Some(locator_at(rest, 0)?);
            rest = rest.get(LOCATOR_LEN..)?;
        }
        let block = u32_at(rest, 0)?;
        Some((Header::Block(BlockHeader { id, flags, data_len, image, locator, block }), rest.get(4..)?))
    }
}

impl ImageHeader {
    #[inline]
    fn read(bytes: &[u8], compressed_flags: u8) -> Option<(ImageHeader, &[u8])> {
        let (len, hole_offset, flags) = (u16_at(bytes, 0)?, u16_at(bytes, 2)?, *bytes.get(4)?);
        let stores_hole_len = flags & HAS_HOLE != 0 && flags & compressed_flags != 0;
        let stored_hole_len = if stores_hole_len { u16_at(bytes, 5)? } else { 0 };
        let rest = bytes.get(if stores_hole_len { 7 } else { 5 }..)?;
        Some((ImageHeader { len, hole_offset, flags, stored_hole_len }, rest))
    }
}

/// The relation that stands at `offset`.
#[inline]
pub(super) fn locator_at(bytes: &[u8], offset: usize) -> Option<RelFileLocator> {
    let [spc, db, rel] = [0, 4, 8].map(|field| u32_at(bytes, offset + field));
    Some(RelFileLocator { spc: TablespaceOid::new(spc?), db: DatabaseOid::new(db?), rel: RelFileNumber::new(rel?) })
}

fn unknown_id(id: u8) -> String {
    format!("a header of an unknown kind, {id}")
}

#[cfg(test)]
mod tests;
