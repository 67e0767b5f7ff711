//! Real and synthetic PostgreSQL clusters for the demo, the tests and the benchmarks.
//!
//! This crate never imports the engine: what it writes and checks is a second, independent writing of
//! PostgreSQL's formats and rules, and thereby an oracle for the first.
//!
//! * [`servers`] finds the PostgreSQL installations of this machine, or fetches them once and caches them;
//! * [`cluster`] makes throwaway clusters, starts restored directories, and stops them by process id;
//! * [`load`] writes to a cluster while it is backed up, so that a restored copy can be checked afterwards;
//! * [`synthetic`] writes data directories of any size without PostgreSQL;
//! * [`torture`] kills and crowds pgstrata's commands, and sees that nothing is lost;
//! * [`random`] is where the data of both come from, by seed;
//! * [`os_user`] is about running all this as root: PostgreSQL refuses to.

pub mod cluster;
mod error;
pub mod load;
pub mod os_user;
pub mod random;
pub mod servers;
pub mod synthetic;
pub mod torture;

pub use error::{Error, Result};
