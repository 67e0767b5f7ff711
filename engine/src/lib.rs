//! pgstrata's engine.

pub mod chunk;
pub mod error;
pub mod pg;
pub mod progress;
pub mod repo;
pub mod store;

pub use error::{Error, ErrorKind, Result};
