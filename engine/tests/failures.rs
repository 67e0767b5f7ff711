//! A store that fails in the middle of a backup: an error, and the repository as it was.

use std::collections::BTreeSet;
use std::io::BufRead;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pgstrata_engine::backup::{self, Options};
use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupType, ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectInfo, ObjectName, Store};
use pgstrata_engine::verify;
use testdata::synthetic::{self, SyntheticCluster};

/// Fails each `put_new` from a given one on, after it took the content.
#[derive(Clone, Debug, Default)]
struct Full {
    objects: MemoryStore,
    room_for: Arc<AtomicU64>,
}

impl Store for Full {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        if self.room_for.load(Ordering::Relaxed) == 0 {
            std::io::copy(content, &mut std::io::sink()).map_err(|e| Error::bug("no content").because(e))?;
            return Err(Error::new(ErrorKind::Unavailable, "the disk is full").at(name.as_str()));
        }
        self.room_for.fetch_sub(1, Ordering::Relaxed);
        self.objects.put_new(name, content)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.objects.get(name, max_len)
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.objects.get_range(name, offset, buffer)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.objects.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        self.objects.delete(name)
    }
}

fn cluster(directory: &Path) -> SyntheticCluster {
    let mut cluster = SyntheticCluster::create(directory, synthetic::Options::new(17, 3)).unwrap();
    cluster.add_database(5).unwrap();
    cluster.add_relation(5, 300).unwrap();
    cluster.checkpoint().unwrap();
    cluster
}

#[test]
fn a_backup_that_fails_leaves_the_repository_as_it_was() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("cluster");
    let mut cluster = cluster(&directory);
    let store = Full::default();
    store.room_for.store(1000, Ordering::Relaxed);
    let repo = Repository::init_in(Arc::new(store.clone()), scratch.path().display().to_string()).unwrap();
    let options = Options { data_dir: Some(directory), offline: true, ..Options::default() };
    let first = backup::run(&repo, &options, &Silent).unwrap().backup;
    cluster.change_random_blocks(0, 20, 1).unwrap();
    cluster.checkpoint().unwrap();
    let before = store.list("").unwrap();
    // The lease, a data pack, a map pack, the manifest.
    for room in 0..4 {
        store.room_for.store(room, Ordering::Relaxed);
        let error = backup::run(&repo, &options, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "room for {room}: {error}");
        assert_eq!(store.list("").unwrap(), before, "room for {room}");
    }
    store.room_for.store(4, Ordering::Relaxed);
    let second = backup::run(&repo, &options, &Silent).unwrap().backup;
    assert_eq!((second.parent, second.blocks_changed > 0), (Some(first.id), true));
    let report = verify::run(&repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent).unwrap();
    assert_eq!(report.damage, []);
}

#[test]
fn a_damaged_parent_is_not_inherited_from_but_replaced_by_a_full_backup() {
    for damage in [|bytes: Vec<u8>| Some(flipped(bytes)), |bytes: Vec<u8>| Some(bytes[1..].to_vec()), |_| None] {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        cluster(&directory);
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), scratch.path().display().to_string()).unwrap();
        let options = Options { data_dir: Some(directory), offline: true, ..Options::default() };
        let first = backup::run(&repo, &options, &Silent).unwrap().backup;
        let is_map = |object: &&ObjectInfo| object.name.as_str().ends_with(".map");
        let objects = store.list("").unwrap();
        let map = objects.iter().find(is_map).unwrap();
        store.tamper(&map.name, damage(store.get(&map.name, map.len).unwrap()));
        let named = Options { parent: backup::ParentChoice::Named(first.id.to_string()), ..options.clone() };
        assert_eq!(backup::run(&repo, &named, &Silent).unwrap_err().kind(), ErrorKind::Corrupt);
        let report = backup::run(&repo, &options, &Silent).unwrap();
        assert_eq!(report.backup.backup_type, BackupType::Full);
        assert_eq!(report.repository_damage.len(), 1);
        let second = report.backup.id.to_string();
        let verified = verify::run(&repo, &ClusterName::default(), &second, &verify::Options::default(), &Silent);
        assert_eq!(verified.unwrap().damage, []);
    }
}

/// Every record of a map pack damaged, its frame not.
fn flipped(mut bytes: Vec<u8>) -> Vec<u8> {
    let records = 16..bytes.len() / 2;
    bytes[records].iter_mut().for_each(|byte| *byte ^= 0x55);
    bytes
}

/// A store that refuses to delete some objects, as one with retention locks does.
#[derive(Clone, Debug, Default)]
struct Retaining {
    objects: MemoryStore,
    retained: Arc<Mutex<BTreeSet<String>>>,
}

impl Store for Retaining {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        self.objects.put_new(name, content)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.objects.get(name, max_len)
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.objects.get_range(name, offset, buffer)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.objects.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        if self.retained.lock().unwrap().contains(name.as_str()) {
            return Err(Error::new(ErrorKind::Unavailable, "retained until tomorrow"));
        }
        self.objects.delete(name)
    }
}

#[test]
fn an_object_that_cannot_be_deleted_is_reported_and_passed_over() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("cluster");
    let mut cluster = cluster(&directory);
    let store = Retaining::default();
    let repo = Repository::init_in(Arc::new(store.clone()), scratch.path().display().to_string()).unwrap();
    let options = Options { data_dir: Some(directory), offline: true, ..Options::default() };
    let mut back_up = |parent| {
        cluster.change_random_blocks(0, 20, 1).unwrap();
        cluster.checkpoint().unwrap();
        backup::run(&repo, &Options { parent, ..options.clone() }, &Silent).unwrap().backup.id.to_string()
    };
    let ids: Vec<String> = (0..4).map(|_| back_up(backup::ParentChoice::Full)).collect();
    let expire = |max_unused| {
        let policy = Policy { last: Some(Count::Number(1)), ..Policy::default() };
        let options = expire::Options {
            cluster: ClusterName::default(),
            selection: Selection::Policy(policy),
            force: false,
            max_unused,
            compression: backup::Compression::default(),
            jobs: None,
        };
        expire::run(&repo, &options, &Silent).unwrap()
    };
    let listed = || -> Vec<String> {
        let catalog = repo.catalog(&ClusterName::default()).unwrap();
        catalog.backups().iter().map(|backup| backup.id.to_string()).collect()
    };
    let pack = store.list(&format!("clusters/main/packs/{}/", ids[0])).unwrap()[0].name.to_string();
    let manifest = format!("clusters/main/manifests/{}", ids[1]);
    *store.retained.lock().unwrap() = BTreeSet::from([pack.clone(), manifest.clone()]);
    let report = expire(Some(0));
    assert_eq!(report.refused.len(), 2, "{:?}", report.refused);
    assert!(report.refused.iter().all(|refused| refused.contains("retained until tomorrow")));
    assert_eq!(listed(), [ids[1].clone(), ids[3].clone()]);
    assert_eq!(report.removed.len(), 2);
    let verified = verify::run(&repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent).unwrap();
    assert_eq!(verified.damage, [], "the backup whose manifest stays is whole");

    store.retained.lock().unwrap().clear();
    let report = expire(Some(0));
    assert_eq!((report.refused.len(), listed()), (0, vec![ids[3].clone()]));
    assert!(store.list(&pack).unwrap().is_empty());
}
