//! What an interrupted backup left is used by the next one, and proved before.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use pgstrata_engine::backup::{self, Compression, Report};
use pgstrata_engine::expire::{self, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectName, Store};
use pgstrata_engine::verify;
use support::{Choices, change, files, restored, without_wal};
use testdata::synthetic::{Options, SyntheticCluster};

struct Lab {
    scratch: tempfile::TempDir,
    directory: PathBuf,
    cluster: SyntheticCluster,
    store: MemoryStore,
    repo: Repository,
}

impl Lab {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let mut cluster = SyntheticCluster::create(&directory, Options::new(17, 5)).unwrap();
        cluster.add_database(5).unwrap();
        for blocks in [400, 3, 0, 90] {
            cluster.add_relation(5, blocks).unwrap();
        }
        cluster.checkpoint().unwrap();
        let store = MemoryStore::new();
        let place = scratch.path().join("nowhere").display().to_string();
        let repo = Repository::init_in(Arc::new(store.clone()), place).unwrap();
        Self { scratch, directory, cluster, store, repo }
    }

    fn back_up(&self, compression: Compression) -> Report {
        let data_dir = Some(self.directory.clone());
        let options = backup::Options { data_dir, compression, offline: true, ..backup::Options::default() };
        backup::run(&self.repo, &options, &Silent).unwrap()
    }

    /// Makes of a backup what a kill right before its commit would have left of it.
    fn interrupt(&self, report: &Report) {
        let manifest = format!("clusters/main/manifests/{}", report.backup.id);
        self.store.tamper(&ObjectName::new(manifest).unwrap(), None);
    }

    fn assert_sound(&self, report: &Report) {
        let target = self.scratch.path().join("restored");
        let found = restored(&self.repo, &report.backup.id.to_string(), &target);
        assert!(found == without_wal(files(&self.directory)));
        let verified = verify::run(&self.repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent);
        assert_eq!(verified.unwrap().damage, []);
    }

    fn collect(&self, max_unused: u8) -> expire::Report {
        let options = expire::Options {
            cluster: ClusterName::default(),
            selection: Selection::Nothing,
            force: false,
            max_unused: Some(max_unused),
            compression: Compression::default(),
            jobs: None,
        };
        expire::run(&self.repo, &options, &Silent).unwrap()
    }
}

#[test]
fn a_backup_takes_over_what_an_interrupted_one_stored() {
    for compression in [Compression::None, Compression::Zstd(1)] {
        let mut lab = Lab::new();
        let interrupted = lab.back_up(compression);
        lab.interrupt(&interrupted);
        let mut choices = Choices(1);
        (0..4).for_each(|_| change(&mut lab.cluster, &mut choices));
        lab.cluster.checkpoint().unwrap();
        let resumed = lab.back_up(Compression::Zstd(1));
        assert!(resumed.bytes_written * 3 < interrupted.bytes_written, "{resumed:?}");
        assert!(resumed.backup.stored_bytes > interrupted.bytes_written / 2, "what it took over is its own now");
        lab.assert_sound(&resumed);
        // The other packs of the interrupted run go, and what moved is whole.
        lab.collect(0);
        lab.assert_sound(&resumed);
        let again = lab.collect(25);
        assert!(again.bytes_written < 30_000, "only metadata is left to be put together: {again:?}");
        lab.assert_sound(&resumed);
    }
}

#[test]
fn damaged_packs_of_an_interrupted_backup_do_no_harm() {
    let lab = Lab::new();
    let interrupted = lab.back_up(Compression::None);
    lab.interrupt(&interrupted);
    let is_data = |name: &ObjectName| name.as_str().ends_with(".data");
    let pack = lab.store.list("").unwrap().into_iter().find(|object| is_data(&object.name)).unwrap();
    let bytes = lab.store.get(&pack.name, pack.len).unwrap();
    for damage in [|bytes: &mut Vec<u8>| bytes[100_000] ^= 1, |bytes: &mut Vec<u8>| bytes.truncate(300_000)] {
        let mut damaged = bytes.clone();
        damage(&mut damaged);
        lab.store.tamper(&pack.name, Some(damaged));
        let resumed = lab.back_up(Compression::Zstd(1));
        let target = lab.scratch.path().join("restored");
        assert!(restored(&lab.repo, &resumed.backup.id.to_string(), &target) == without_wal(files(&lab.directory)));
        lab.interrupt(&resumed);
        for object in lab.store.list(&format!("clusters/main/packs/{}/", resumed.backup.id)).unwrap() {
            lab.store.tamper(&object.name, None);
        }
    }
}
