//! The header of a WAL page: which version of PostgreSQL wrote it, on which timeline, for which place of the log.
//!
//! Segment files are recycled: a file is renamed to a future segment with its old contents, so pages of another
//! place of the log, and whole records with a good CRC, follow after the end of what was written. Only the
//! address in the header tells. The first page of a segment has a longer header that also names the cluster.
//!
//! ```text
//! offset  size  field
//! 0       2     magic, one for each major version
//! 2       2     flags: 1 begins with the rest of a record, 2 long header, 4 unused here, 8 replaces a lost rest
//! 4       4     timeline
//! 8       8     LSN of the page
//! 16      4     bytes of the record that are still to come, from this page on
//! 20      4     padding
//! 24      8     system identifier            (long header only)
//! 32      4     segment size
//! 36      4     page size
//! ```
//!
//! PostgreSQL: `src/include/access/xlog_internal.h`, `XLogLongPageHeaderData`;
//! `src/backend/access/transam/xlogreader.c`, `XLogReaderValidatePageHeader`.

use super::super::bytes::{u16_at, u32_at, u64_at};
use super::super::{Lsn, MajorVersion, SystemIdentifier, TimelineId};
use crate::error::{Error, ErrorKind, Result};

pub(super) const SHORT_LEN: usize = 24;
pub(super) const LONG_LEN: usize = 40;

const IS_CONTINUATION: u16 = 1;
const IS_LONG: u16 = 2;
const OVERWRITES: u16 = 8;
const KNOWN_FLAGS: u16 = 15;

/// `XLOG_PAGE_MAGIC` of each major; frozen when it is released, 19 is as of its beta.
const MAGICS: [(u32, u16); 7] =
    [(13, 0xD106), (14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118), (19, 0xD121)];

/// The header of a WAL page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalPageHeader {
    /// Which major version wrote the page.
    pub major: MajorVersion,
    /// Whether the page begins with the rest of a record.
    pub is_continuation: bool,
    /// Whether the page takes the place of the rest of a record that a crash cut off.
    pub overwrites_continuation: bool,
    /// The timeline at the page's beginning.
    pub timeline: TimelineId,
    /// Where the page lies in the log.
    pub address: Lsn,
    /// How many bytes are left of the record that continues on this page, those of later pages included.
    pub remaining_len: u32,
    /// What only the first page of a segment says.
    pub long: Option<WalLongHeader>,
}

/// What the first page of a segment says besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalLongHeader {
    /// Which cluster wrote it.
    pub system_identifier: SystemIdentifier,
    /// The length of the segment, in bytes.
    pub segment_size: u32,
    /// The size of a WAL page, in bytes.
    pub block_size: u32,
}

impl WalPageHeader {
    /// Reads the header of the page that begins with these bytes (24 suffice, 40 on a segment's first page).
    ///
    /// # Errors
    /// Corrupt: not a WAL page of 13 to 19, or too short.
    pub fn parse(bytes: &[u8]) -> Result<WalPageHeader> {
        let magic = u16_at(bytes, 0).ok_or_else(too_short)?;
        let major = major_of(magic).ok_or_else(|| damaged(format!("it has magic {magic:04X}")))?;
        let flags = u16_at(bytes, 2).ok_or_else(too_short)?;
        if flags & !KNOWN_FLAGS != 0 {
            return Err(damaged(format!("it has flags {flags:04X}")));
        }
        Ok(WalPageHeader {
            major,
            is_continuation: flags & IS_CONTINUATION != 0,
            overwrites_continuation: flags & OVERWRITES != 0,
            timeline: TimelineId::new(u32_at(bytes, 4).ok_or_else(too_short)?),
            address: Lsn::new(u64_at(bytes, 8).ok_or_else(too_short)?),
            remaining_len: u32_at(bytes, 16).ok_or_else(too_short)?,
            long: if flags & IS_LONG != 0 { Some(WalLongHeader::parse(bytes)?) } else { None },
        })
    }
}

impl WalLongHeader {
    fn parse(bytes: &[u8]) -> Result<WalLongHeader> {
        Ok(WalLongHeader {
            system_identifier: SystemIdentifier::new(u64_at(bytes, 24).ok_or_else(too_short)?),
            segment_size: u32_at(bytes, 32).ok_or_else(too_short)?,
            block_size: u32_at(bytes, 36).ok_or_else(too_short)?,
        })
    }
}

fn major_of(magic: u16) -> Option<MajorVersion> {
    let entry = MAGICS.iter().find(|(_, known)| *known == magic);
    entry.and_then(|(major, _)| MajorVersion::new(*major))
}

fn too_short() -> Error {
    damaged("it is too short for its header".to_owned())
}

fn damaged(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("this is no WAL page: {what}"))
}
