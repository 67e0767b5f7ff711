//! What tests demand of a repository after anything happened to it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pgstrata_engine::repo::{BackupId, ClusterName, Repository};

use super::support::{Files, restored};

/// Backups that were restored. What a restore writes follows from the manifest and the packs that it names: one of the same bytes is restored once.
pub struct Proved {
    target: PathBuf,
    known: BTreeSet<[u8; 32]>,
}

impl Proved {
    pub fn new(target: &Path) -> Self {
        Self { target: target.to_owned(), known: BTreeSet::new() }
    }

    /// Restores a backup, unless it was, and compares it with what it should be.
    pub fn restores_to(&mut self, repo: &Repository, id: BackupId, expected: &Files, context: &str) {
        let manifest = repo.manifest(&ClusterName::default(), id).unwrap_or_else(|e| panic!("{context}: {e}"));
        let mut hash = blake3::Hasher::new();
        let packs = manifest.packs.iter().map(|pack| pack.name.object(&manifest.cluster).unwrap());
        for object in packs.chain([manifest.object().unwrap()]) {
            let bytes = repo.store().get(&object, u64::MAX).unwrap_or_else(|e| panic!("{context}: {e}"));
            hash.update(&bytes).update(object.as_str().as_bytes());
        }
        if self.known.insert(hash.finalize().into()) {
            let found = restored(repo, &id.to_string(), &self.target);
            assert!(found == *expected, "{context}: {id} restores to other bytes");
        }
    }
}

/// A directory in memory where there is one: what is restored there is synced, many hundred times.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// The backups of a repository, none of which is damaged.
pub fn listed(repo: &Repository, context: &str) -> BTreeSet<BackupId> {
    let catalog = repo.catalog(&ClusterName::default()).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert!(catalog.damaged().is_empty(), "{context}: {:?}", catalog.damaged());
    catalog.backups().iter().map(|backup| backup.id).collect()
}

/// What is there is what the manifests need, the manifests, the pins, and the header.
pub fn assert_no_litter(repo: &Repository, names: &BTreeSet<String>, context: &str) {
    let cluster = ClusterName::default();
    let mut needed = BTreeSet::from(["repository", "reserve"].map(str::to_owned));
    for backup in repo.catalog(&cluster).unwrap().backups() {
        let manifest = repo.manifest(&cluster, backup.id).unwrap();
        needed.insert(manifest.object().unwrap().to_string());
        needed.extend(manifest.packs.iter().map(|pack| pack.name.object(&cluster).unwrap().to_string()));
    }
    needed.extend(repo.pins(&cluster).unwrap().iter().map(|id| format!("clusters/main/pins/{id}")));
    assert_eq!(names, &needed, "{context}");
}
