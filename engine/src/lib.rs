#![doc = include_str!("../README.md")]

pub mod backup;
pub mod chunk;
pub mod detect;
pub mod error;
pub mod expire;
pub mod export;
mod extract;
pub mod fuzz;
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
