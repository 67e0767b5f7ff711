//! Real and synthetic PostgreSQL clusters for the demo, the tests and the benchmarks.
//!
//! This crate never imports the engine: what it writes and checks is a second, independent writing of
//! PostgreSQL's formats and rules, and thereby an oracle for the first.
//!
//! * [`servers`] finds the PostgreSQL installations of this machine, or fetches them once and caches them;
//! * [`cluster`] makes throwaway clusters, starts restored directories, and stops them by process id;
//! * [`os_user`] is about running all this as root: PostgreSQL refuses to.

pub mod cluster;
mod error;
pub mod os_user;
pub mod servers;

pub use error::{Error, Result};
