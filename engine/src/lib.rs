//! pgstrata's engine.

pub mod error;
pub mod pg;

pub use error::{Error, ErrorKind, Result};
