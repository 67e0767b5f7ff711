//! PostgreSQL's bytes, no I/O.

mod lsn;

pub use lsn::{Lsn, ParseLsnError, TimelineId};
