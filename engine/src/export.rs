//! `export`: a backup for others than pgstrata.
//!
//! [`to_files`] writes it as `pg_basebackup` would have (`export/files.rs`).

mod archives;
mod files;

pub use files::{FileFormat, FilesOptions, FilesPlan, FilesReport, plan_files, to_files};
