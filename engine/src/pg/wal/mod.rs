//! The write-ahead log: its files, its pages, its records.

mod segment;

pub use segment::{WalBlockSize, WalSegmentName, WalSegmentNumber, WalSegmentSize};
