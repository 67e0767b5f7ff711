//! PostgreSQL's bytes, no I/O.

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

pub use backup_label::{BackupLabel, BackupMethod, BackupOrigin, IncrementalFrom, TablespaceMap};
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
    WalBlockSize, WalLongHeader, WalPageHeader, WalRecord, WalSegmentName, WalSegmentNumber, WalSegmentSize, WalSource,
    WalStep, WalWalker,
};
