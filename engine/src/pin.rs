//! `pin` and `unpin`: a pinned backup stays whatever the policy says.
//!
//! A pin is an object of its own beside the manifests, which are never modified. What goes wrong: an expiry that goes on at the same
//! time has decided already; so a pin waits until it is done, and is not set if the backup is gone by then.

use crate::error::Result;
use crate::repo::{BackupSummary, ClusterName, Lease, Operation, Repository};

/// Pins a backup, or takes its pin away; no error if it has it, or has none.
///
/// # Errors
/// `Missing` if there is no such backup; `Locked` while an expiry runs.
pub fn set(repo: &Repository, cluster: &ClusterName, backup: &str, pinned: bool) -> Result<BackupSummary> {
    let (_lease, mut found) = Lease::of_backup(repo, cluster, backup, Operation::Pin, &|_| {})?;
    repo.set_pin(cluster, found.id, pinned)?;
    found.pinned = pinned;
    Ok(found)
}
