#![doc = include_str!("../README.md")]

// What tests inside share with tests outside names the engine as those do.
#[cfg(test)]
extern crate self as pgstrata_engine;

pub mod backup;
pub mod check;
pub mod chunk;
#[cfg(test)]
mod crashes;
pub mod detect;
pub mod error;
pub mod expire;
pub mod export;
mod extract;
pub mod fuzz;
pub mod merge;
mod os;
pub mod pg;
pub mod pin;
pub mod progress;
mod repack;
pub mod repo;
pub mod restore;
pub mod source;
pub mod store;
pub mod target;
pub mod units;
pub mod verify;

pub use error::{Error, ErrorKind, Result};
