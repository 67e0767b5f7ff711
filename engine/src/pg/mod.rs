//! PostgreSQL's bytes, no I/O.

mod bytes;
mod control;
mod lsn;
mod page;
mod relation;
mod wal;

pub use control::{CatalogVersion, ClusterState, ControlFile, MajorVersion, SystemIdentifier, WalLevel};
pub use lsn::{Lsn, ParseLsnError, TimelineId};
pub use page::{BlockSize, PageCheck, PageFault, check_page, checksum, is_zero, page_lsn};
pub use relation::{
    BlockNumber, BlocksPerSegment, DatabaseOid, ForkNumber, RelFileLocator, RelFileNumber, RelationFile, SegmentNumber,
    TablespaceOid, is_temp_relation_file_name, parse_relation_file_name,
};
pub use wal::{WalBlockSize, WalSegmentName, WalSegmentNumber, WalSegmentSize};
