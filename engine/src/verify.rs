//! `verify`: whether what the repository holds is what was stored.
//!
//! ```text
//! for each backup: read the manifest and the file table; note which packs, layers and chunks it needs
//! quick:  each pack is there, with the right length
//! else:   read each pack once, on all workers: frame, every record's checksum; every chunk is decompressed and proved by its id,
//!         and the fingerprints in the block maps are those of the blocks
//! then:   name each damaged object, and the backups and files that need it
//! ```
//!
//! Objects that several backups share are read once. Damage is no error: it is the report. An error is what stops verifying.
//!
//! What this cannot see: bytes that were wrong before they came here (a damaged page is listed in its backup), and packs that no backup needs, which are litter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chunk::{Decoder, Fingerprint, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupSummary, ChunkRef, ClusterName, DataPack, Depth, FileEntry, Layer, LayerPlace, Manifest, PackInfo, PackKind, PackName,
    Repository, check_pack, read_page,
};

/// Files named for each damaged object at most.
const MAX_FILES: usize = 100;

/// How to verify.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether to look at presence and lengths only.
    pub quick: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// What verifying found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backups that were verified.
    pub backups: Vec<VerifiedBackup>,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Objects that were looked at.
    pub objects_checked: u64,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Nothing.
    pub bytes_written: u64,
}

/// A backup and whether it is whole.
#[derive(Debug, Serialize)]
pub struct VerifiedBackup {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// Whether nothing that it needs is damaged.
    pub ok: bool,
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// The backups that need it.
    pub backups: Vec<String>,
    /// Their files that need the damaged place, the first hundred.
    pub files: Vec<String>,
}
