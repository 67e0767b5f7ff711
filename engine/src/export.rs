//! `export`: a backup to another repository, or for others than pgstrata.
//!
//! [`to_repository`] copies it with what of its data is missing there (`export/repository.rs`).

mod repository;

pub use repository::{Options, Plan, Report, plan, to_repository};
