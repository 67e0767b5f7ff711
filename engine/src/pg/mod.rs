//! PostgreSQL's bytes, no I/O.
//!
//! Each module reads one thing that PostgreSQL writes, and says in its header how it looks, where PostgreSQL's source
//! defines it, and what goes wrong with it. All of them take bytes that somebody else has read, trust none of them, and
//! never panic on any. A value that leaves this room has a type that says what it is: an [`Lsn`], a [`BlockNumber`],
//! a [`WalSegmentSize`].
//!
//! What is damaged is an error of kind Corrupt that names the place; what may be torn because the server is writing
//! it (pg_control, the relation maps, pages) is so, too: this room cannot tell the two apart, its caller reads again.
//! A version that was not compared with its source is Unsupported, never guessed.

mod backup_label;
mod bytes;
mod control;
mod history;
mod lsn;
mod page;
mod pg_manifest;
mod relation;
mod relmap;
mod wal;
mod wal_summary;

pub use backup_label::{BackupLabel, BackupMethod, BackupOrigin, IncrementalFrom, TablespaceMap};
pub(crate) use bytes::canonical_decimal;
pub use control::{CatalogVersion, ClusterState, ControlFile, MajorVersion, SystemIdentifier, WalLevel};
pub use history::{TimelineHistory, TimelineSpan, history_file_name, parse_history_file_name};
pub use lsn::{Lsn, ParseLsnError, TimelineId};
pub use page::{BlockSize, PageCheck, PageFault, check_page, checksum, is_zero, page_lsn};
pub use pg_manifest::{PgBackupManifest, PgFileChecksum, PgManifestFile, PgManifestWriter, WalRange};
pub use relation::{
    BlockNumber, BlocksPerSegment, DatabaseOid, ForkNumber, RelFileLocator, RelFileNumber, RelationFile, SegmentNumber,
    TablespaceOid, is_temp_relation_file_name, parse_relation_file_name,
};
pub use relmap::check_relation_map;
pub use wal::{
    BlockReference, DecodedRecord, ImageCompression, PageImage, RecordDecoder, StorageChange, WalBlockSize,
    WalLongHeader, WalPageHeader, WalRecord, WalSegmentName, WalSegmentNumber, WalSegmentSize, WalSource, WalStep,
    WalWalker,
};
pub use wal_summary::{SummarizedFork, WalSummaryReader, WalSummaryStep, parse_wal_summary_name, wal_summary_name};
