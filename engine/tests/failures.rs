//! A store that fails in the middle of a backup: an error, and the repository as it was.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pgstrata_engine::backup::{self, Options};
use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
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
    // A data pack, a map pack, the manifest.
    for room in 0..3 {
        store.room_for.store(room, Ordering::Relaxed);
        let error = backup::run(&repo, &options, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "room for {room}: {error}");
        assert_eq!(store.list("").unwrap(), before, "room for {room}");
    }
    store.room_for.store(3, Ordering::Relaxed);
    let second = backup::run(&repo, &options, &Silent).unwrap().backup;
    assert_eq!((second.parent, second.blocks_changed > 0), (Some(first.id), true));
    let report = verify::run(&repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent).unwrap();
    assert_eq!(report.damage, []);
}
