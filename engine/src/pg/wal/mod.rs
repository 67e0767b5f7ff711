//! The write-ahead log: its files, its pages, its records.

mod page_header;
mod record;
mod segment;
mod storage;
mod walker;

pub use page_header::{WalLongHeader, WalPageHeader};
pub use record::{BlockReference, DecodedRecord, ImageCompression, PageImage, RecordDecoder};
pub use segment::{WalBlockSize, WalSegmentName, WalSegmentNumber, WalSegmentSize};
pub use storage::StorageChange;
pub use walker::{WalRecord, WalSource, WalStep, WalWalker};
