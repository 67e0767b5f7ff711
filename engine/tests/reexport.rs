//! A backup is exported again after it was expired where it goes.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use pgstrata_engine::backup::{self, Compression};
use pgstrata_engine::expire::{self, Selection};
use pgstrata_engine::export;
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupId, ClusterName, Repository};
use pgstrata_engine::store::MemoryStore;
use support::{Choices, Files, change, files, restored, without_wal};
use testdata::synthetic::{Options, SyntheticCluster};

fn repository(scratch: &Path, name: &str) -> Repository {
    Repository::init_in(Arc::new(MemoryStore::new()), scratch.join(name).display().to_string()).unwrap()
}

fn export_to(from: &Repository, to: &Repository, id: BackupId) {
    let options = export::Options { backup: id.to_string(), ..export::Options::default() };
    export::to_repository(from, to, &options, &Silent).unwrap();
}

fn expire_in(repo: &Repository, id: BackupId) {
    let options = expire::Options {
        cluster: ClusterName::default(),
        selection: Selection::Named(vec![id.to_string()]),
        force: false,
        max_unused: None,
        compression: Compression::default(),
        jobs: None,
    };
    expire::run(repo, &options, &Silent).unwrap();
}

fn assert_restore(repo: &Repository, backups: &BTreeMap<BackupId, Files>, target: &Path) {
    for (id, expected) in backups {
        assert!(restored(repo, &id.to_string(), target) == *expected, "{id} restores to other bytes");
    }
}

#[test]
fn a_backup_that_comes_back_leaves_alone_what_others_still_need_of_its_first_packs() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("cluster");
    let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(17, 5) };
    let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
    cluster.add_database(5).unwrap();
    cluster.add_relation(5, 40).unwrap();
    let home = repository(scratch.path(), "home");
    let offsite = repository(scratch.path(), "offsite");
    let mut backups = BTreeMap::new();
    let mut order = Vec::new();
    let mut choices = Choices(3);
    for _ in 0..3 {
        cluster.change_random_blocks(0, 10, u64::from(choices.below(99))).unwrap();
        change(&mut cluster, &mut choices);
        cluster.checkpoint().unwrap();
        let options =
            backup::Options { data_dir: Some(directory.clone()), offline: true, ..backup::Options::default() };
        let id = backup::run(&home, &options, &Silent).unwrap().backup.id;
        export_to(&home, &offsite, id);
        backups.insert(id, without_wal(files(&directory)));
        order.push(id);
    }
    let target = scratch.path().join("restored");
    for id in &order[..2] {
        expire_in(&offsite, *id);
        export_to(&home, &offsite, *id);
        assert_restore(&offsite, &backups, &target);
    }
}
