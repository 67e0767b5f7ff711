#![doc = include_str!("../README.md")]

pub mod backup;
pub mod chunk;
pub mod detect;
pub mod error;
pub mod expire;
pub mod export;
mod extract;
pub mod merge;
pub mod pg;
pub mod pin;
pub mod progress;
mod repack;
pub mod repo;
pub mod restore;
pub mod source;
pub mod store;
pub mod target;
pub mod verify;

pub use error::{Error, ErrorKind, Result};

/// How many workers are wanted: one for each processor unless somebody said otherwise.
pub(crate) fn worker_count(jobs: Option<std::num::NonZeroUsize>) -> usize {
    let processors = || std::thread::available_parallelism().unwrap_or(std::num::NonZeroUsize::MIN);
    jobs.unwrap_or_else(processors).get()
}
