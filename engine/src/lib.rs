//! pgstrata's engine.

pub mod error;
pub mod pg;
pub mod progress;
pub mod source;

pub use error::{Error, ErrorKind, Result};
