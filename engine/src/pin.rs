//! `pin` and `unpin`: a pinned backup stays whatever the policy says.

use crate::error::Result;
use crate::repo::{BackupSummary, ClusterName, Repository};

/// Pins a backup, or takes its pin away; no error if it has it, or has none.
///
/// # Errors
/// `Missing` if there is no such backup; `Locked` while an expiry runs.
pub fn set(_repo: &Repository, _cluster: &ClusterName, _backup: &str, _pinned: bool) -> Result<BackupSummary> {
    unimplemented!()
}
