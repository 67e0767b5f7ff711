//! The write-ahead log: its files, its pages, its records.

mod page_header;
mod segment;
mod walker;

pub use page_header::{WalLongHeader, WalPageHeader};
pub use segment::{WalBlockSize, WalSegmentName, WalSegmentNumber, WalSegmentSize};
pub use walker::{WalRecord, WalSource, WalStep, WalWalker};
