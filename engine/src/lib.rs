#![doc = include_str!("../README.md")]

pub mod backup;
pub mod chunk;
pub mod detect;
pub mod error;
pub mod pg;
pub mod progress;
#[cfg_attr(not(test), expect(dead_code, reason = "for merge, expire and export"))]
mod repack;
pub mod repo;
pub mod restore;
pub mod source;
pub mod store;
pub mod target;
pub mod verify;

pub use error::{Error, ErrorKind, Result};
