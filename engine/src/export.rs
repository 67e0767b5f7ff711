//! `export`: a backup to another repository, or for others than pgstrata.
//!
//! [`to_repository`] copies it with what of its data is missing there (`export/repository.rs`); [`to_files`] writes it as `pg_basebackup` would
//! have (`export/files.rs`).

mod archives;
mod files;
mod repository;

pub use files::{FileFormat, FilesOptions, FilesPlan, FilesReport, plan_files, to_files};
pub use repository::{Options, Plan, Report, plan, to_repository};
