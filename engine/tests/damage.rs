//! Damage to a small repository: `verify` names the object, a hurt backup does not restore, the others do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use pgstrata_engine::backup::{self, Compression};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectName, Store};
use pgstrata_engine::{Error, restore, verify};
use testdata::synthetic::{Options, SyntheticCluster};

struct Lab {
    scratch: tempfile::TempDir,
    store: MemoryStore,
    repo: Repository,
    backups: Vec<String>,
}

impl Lab {
    /// Three backups, the second of which changes blocks of the first, the third of which is on its own.
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { wal_segment_len: 1 << 20, ..Options::new(16, 7) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 6).unwrap();
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), scratch.path().join("nowhere").display().to_string());
        let repo = repo.unwrap();
        let mut backups = Vec::new();
        for parent in [backup::ParentChoice::Automatic, backup::ParentChoice::Automatic, backup::ParentChoice::Full] {
            cluster.change_random_blocks(0, 2, backups.len() as u64).unwrap();
            cluster.checkpoint().unwrap();
            let compression = Compression::Zstd(9);
            let options = backup::Options {
                data_dir: Some(directory.clone()),
                parent,
                compression,
                offline: true,
                ..backup::Options::default()
            };
            backups.push(backup::run(&repo, &options, &Silent).unwrap().backup.id.to_string());
        }
        Self { scratch, store, repo, backups }
    }

    fn objects(&self) -> Vec<(ObjectName, Vec<u8>)> {
        // What is put by for a full disk is no content.
        let objects = self.store.list("").unwrap().into_iter().filter(|object| object.name.as_str() != "reserve");
        objects.map(|object| (object.name.clone(), self.store.get(&object.name, object.len).unwrap())).collect()
    }

    fn verify(&self, quick: bool) -> Result<verify::Report, Error> {
        let options = verify::Options { quick, jobs: std::num::NonZeroUsize::new(1) };
        verify::run(&self.repo, &ClusterName::default(), "all", &options, &Silent)
    }

    /// Whether a backup restores; a target that failed must not be one that starts.
    fn restores(&self, backup: &str) -> bool {
        let target = self.scratch.path().join("restored");
        let options = restore::Options {
            target: target.clone(),
            tablespace_map: Vec::new(),
            archive_mode: false,
            jobs: std::num::NonZeroUsize::new(1),
        };
        let restored = restore::run(&self.repo, &ClusterName::default(), backup, &options, &Silent).is_ok();
        let startable = target.join("global/pg_control").exists();
        assert_eq!(restored, startable);
        if restored {
            assert!(
                same_data(&target, &self.scratch.path().join("sound").join(backup)),
                "{backup} restored to other bytes"
            );
        }
        let _ = fs::remove_dir_all(&target);
        restored
    }

    fn keep_sound_copies(&self) {
        for backup in &self.backups {
            let target = self.scratch.path().join("sound").join(backup);
            let options = restore::Options { target, tablespace_map: Vec::new(), archive_mode: false, jobs: None };
            restore::run(&self.repo, &ClusterName::default(), backup, &options, &Silent).unwrap();
        }
    }
}

fn same_data(one: &Path, other: &Path) -> bool {
    let read = |root: &Path, path: &str| fs::read(root.join(path)).ok();
    ["base/5/16384", "base/5/16384_vm", "global/pg_control", "PG_VERSION"]
        .iter()
        .all(|path| read(one, path) == read(other, path))
}

/// Places in an object of `len` bytes: all of them if PGSTRATA_EVERY_BYTE is set (minutes), else the first and last 64 and as many
/// others as `count`.
fn places(len: usize, count: usize) -> impl Iterator<Item = usize> {
    let all = std::env::var_os("PGSTRATA_EVERY_BYTE").is_some();
    let stride = if all { 1 } else { (len / count).max(1) };
    (0..len).filter(move |at| at % stride == 0 || (stride > 1 && count > 64 && (*at < 64 || *at + 64 >= len)))
}

fn is_manifest(name: &ObjectName) -> bool {
    name.as_str().contains("/manifests/")
}

#[test]
fn flipped_bytes_are_found_and_named() {
    let lab = Lab::new();
    assert_eq!(lab.verify(false).unwrap().damage, []);
    for (name, bytes) in lab.objects() {
        if name.as_str() == "repository" {
            continue;
        }
        for at in places(bytes.len(), 100) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            lab.store.tamper(&name, Some(damaged));
            let report = lab.verify(false).unwrap();
            let named: BTreeSet<&str> = report.damage.iter().map(|damage| damage.object.as_str()).collect();
            assert!(named.contains(name.as_str()), "byte {at} of {name}: {named:?}");
            assert!(report.damage.iter().all(|damage| !damage.backups.is_empty()), "byte {at} of {name}");
        }
        lab.store.tamper(&name, Some(bytes));
    }
}

#[test]
fn a_hurt_backup_does_not_restore_and_the_others_do() {
    let lab = Lab::new();
    lab.keep_sound_copies();
    for (name, bytes) in lab.objects() {
        if name.as_str() == "repository" {
            continue;
        }
        for at in places(bytes.len(), 12) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x80;
            lab.store.tamper(&name, Some(damaged));
            let report = lab.verify(false).unwrap();
            let hurt: BTreeSet<String> = report.damage.iter().flat_map(|damage| damage.backups.clone()).collect();
            for backup in &lab.backups {
                assert!(lab.restores(backup) || hurt.contains(backup), "byte {at} of {name} hurts {backup}");
            }
        }
        lab.store.tamper(&name, Some(bytes));
    }
}

#[test]
fn an_object_that_is_gone_cut_or_swapped_is_named_by_a_quick_look_too() {
    let lab = Lab::new();
    let objects = lab.objects();
    for (name, bytes) in objects.iter().filter(|(name, _)| name.as_str() != "repository" && !is_manifest(name)) {
        for change in [None, Some(bytes[..bytes.len() - 1].to_vec()), Some(Vec::new())] {
            lab.store.tamper(name, change);
            for quick in [true, false] {
                let report = lab.verify(quick).unwrap();
                let damage = report.damage.iter().find(|damage| damage.object == name.as_str()).unwrap();
                assert!(!damage.backups.is_empty());
                assert!(report.backups.iter().any(|backup| !backup.ok));
            }
        }
        lab.store.tamper(name, Some(bytes.clone()));
    }
    for (name, bytes) in objects.iter().filter(|(name, _)| name.as_str() != "repository") {
        for (other, others) in objects.iter().filter(|(other, _)| other != name && other.as_str() != "repository") {
            lab.store.tamper(name, Some(others.clone()));
            let report = lab.verify(false).unwrap();
            assert!(report.damage.iter().any(|damage| damage.object == name.as_str()), "{other} as {name}");
        }
        lab.store.tamper(name, Some(bytes.clone()));
    }
}
