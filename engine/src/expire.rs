//! `expire`: backups go by policy, then what nothing refers to any more.

mod policy;

use std::fmt;
use std::num::NonZeroUsize;

use serde::Serialize;

pub use policy::{Count, Moment, Policy, Span};

use crate::error::Result;
use crate::progress::Progress;
use crate::repo::{BackupId, BackupSummary, ClusterName, Repository};

/// What to expire and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// Which backups go.
    pub selection: Selection,
    /// Whether pinned backups and the last good one may go, too, where the selection names them.
    pub force: bool,
    /// Percentage of the packs' bytes that may be dead before live ones are moved out of mostly dead packs; never if `None`.
    pub max_unused: Option<u8>,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// Which backups go.
#[derive(Clone, Debug)]
pub enum Selection {
    /// Those that no rule of the policy keeps.
    Policy(Policy),
    /// These.
    Named(Vec<String>),
    /// None: only collect what nothing refers to.
    Nothing,
}

/// A backup that stays, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Kept {
    /// The backup.
    pub id: BackupId,
    /// Why: `last`, `daily 2026-11-22`, `pinned`, ...
    pub reasons: Vec<String>,
}

/// What an expiry did, or would do.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether nothing was done (`--dry-run`).
    pub dry_run: bool,
    /// The backups that went.
    pub removed: Vec<BackupSummary>,
    /// The backups that stay, oldest first.
    pub kept: Vec<Kept>,
    /// Bytes that came free: those of the objects removed less those written by moving.
    pub bytes_freed: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Mostly dead packs among them, whose live chunks were moved.
    pub packs_repacked: u64,
    /// Bytes of the packs that stay.
    pub bytes_kept: u64,
    /// Bytes among them that no backup needs.
    pub bytes_unused: u64,
    /// Objects that the store refused to delete, and why.
    pub refused: Vec<String>,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
}

/// Decides what would go, and changes nothing.
///
/// # Errors
/// `Corrupt` when a manifest cannot be read: what it needs is unknown.
pub fn plan(_repo: &Repository, _options: &Options) -> Result<Report> {
    unimplemented!()
}

/// Removes backups and what nothing refers to.
///
/// # Errors
/// As [`plan`]; `Locked` while another expiry runs.
pub fn run(_repo: &Repository, _options: &Options, _progress: &dyn Progress) -> Result<Report> {
    unimplemented!()
}

impl fmt::Display for Selection {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        unimplemented!()
    }
}
