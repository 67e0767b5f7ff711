//! pgstrata against real servers: what it backs up, restores as it was.
//!
//! One test binary, so that all scenarios share the machine's cores. A scenario whose PostgreSQL can be neither found
//! nor fetched says "skipped: no PostgreSQL 17 (reason)".

mod check;
mod corruption;
mod detectors;
mod errors;
mod export;
mod faults;
mod history;
mod nights;
mod quiesced;
mod races;
mod restore;
mod secrets;
mod smoke;
mod standby;
mod support;
mod torture;
