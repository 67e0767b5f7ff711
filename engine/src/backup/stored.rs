//! What the log said, kept in the repository (`repo/format.md`, Changes): WAL that was read once need not be there again.
//!
//! A map is left by a backup that read the log, under a name that says which part of it. It is true whatever becomes of that backup. Maps that
//! no backup of the repository could be a parent for are removed by `expire`.

use crate::detect::ChangeMap;
use crate::error::{ErrorKind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::{ChangesName, ClusterName, Repository};

/// Bytes of a map at most, as it is stored.
const MAX_LEN: u64 = 1 << 30;

/// A map in the repository.
#[derive(Clone, Debug)]
pub(super) struct StoredChanges {
    name: ChangesName,
}

impl StoredChanges {
    /// Those of a cluster, in the order of their names.
    pub fn list(repo: &Repository, cluster: &ClusterName) -> Result<Vec<Self>> {
        Ok(ChangesName::list(repo, cluster)?.into_iter().map(|(name, _)| Self { name }).collect())
    }

    /// Where its part of the log begins and ends.
    pub fn range(&self) -> (Lsn, Lsn) {
        (self.name.start, self.name.end)
    }

    /// Reads it.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`.
    pub fn read(&self, repo: &Repository, cluster: &ClusterName) -> Result<ChangeMap> {
        let object = self.name.object(cluster)?;
        ChangeMap::decode(&repo.store().get(&object, MAX_LEN)?, object.as_str())
    }

    /// Puts a map, unless there is one of this part of the log.
    ///
    /// # Errors
    /// What the store says.
    pub fn put(
        repo: &Repository,
        cluster: &ClusterName,
        map: &ChangeMap,
        timeline: TimelineId,
        range: (Lsn, Lsn),
    ) -> Result<u64> {
        let object = ChangesName { timeline, start: range.0, end: range.1 }.object(cluster)?;
        let bytes = map.encode(object.as_str())?;
        match repo.store().put_new(&object, &mut bytes.as_slice()) {
            Err(e) if e.kind() == ErrorKind::Conflict => Ok(0),
            put => put,
        }
    }
}
