//! Ways in which backups were lost once, before a release: each test says what must hold.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupId, ClusterName, Lease, LeaseRequest, Operation, PackKind, Packer, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectInfo, ObjectName, Store};
use pgstrata_engine::{export, merge, restore, verify};
use testdata::synthetic::{self, SyntheticCluster};

type Hook = Arc<Mutex<Option<Box<dyn FnMut(&MemoryStore, &str, &ObjectName) -> Result<()> + Send>>>>;

/// Calls a hook before each operation.
#[derive(Clone, Default)]
struct Hooked {
    objects: MemoryStore,
    hook: Hook,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Hooked {
    fn over(
        objects: &MemoryStore,
        hook: impl FnMut(&MemoryStore, &str, &ObjectName) -> Result<()> + Send + 'static,
    ) -> Self {
        Self { objects: objects.clone(), hook: Arc::new(Mutex::new(Some(Box::new(hook)))) }
    }

    fn call(&self, operation: &str, name: &ObjectName) -> Result<()> {
        self.hook.lock().unwrap().as_mut().map_or(Ok(()), |hook| hook(&self.objects, operation, name))
    }
}

impl Store for Hooked {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        self.call("put_new", name)?;
        self.objects.put_new(name, content)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.call("get", name)?;
        self.objects.get(name, max_len)
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.objects.get_range(name, offset, buffer)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.objects.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        self.call("delete", name)?;
        self.objects.delete(name)
    }
}

struct World {
    scratch: tempfile::TempDir,
    directory: PathBuf,
    cluster: SyntheticCluster,
}

impl World {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let mut cluster = SyntheticCluster::create(&directory, synthetic::Options::new(17, 3)).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 300).unwrap();
        cluster.checkpoint().unwrap();
        Self { scratch, directory, cluster }
    }

    fn repo(&self, name: &str) -> (MemoryStore, Repository) {
        let store = MemoryStore::new();
        let place = self.scratch.path().join(name).display().to_string();
        (store.clone(), Repository::init_in(Arc::new(store), place).unwrap())
    }

    fn options(&self, parent: ParentChoice) -> backup::Options {
        let data_dir = Some(self.directory.clone());
        backup::Options { data_dir, parent, offline: true, ..backup::Options::default() }
    }

    /// Changes `count` blocks and takes a backup.
    fn back_up(&mut self, repo: &Repository, count: u32, choice: u64) -> BackupId {
        self.cluster.change_random_blocks(0, count, choice).unwrap();
        self.cluster.checkpoint().unwrap();
        backup::run(repo, &self.options(ParentChoice::Automatic), &Silent).unwrap().backup.id
    }
}

fn reopened(store: impl Store + 'static, place: &Path) -> Repository {
    Repository::open_in(Arc::new(store), place.display().to_string()).unwrap()
}

fn listed(repo: &Repository) -> Vec<BackupId> {
    repo.catalog(&ClusterName::default()).unwrap().backups().iter().map(|backup| backup.id).collect()
}

fn damage(repo: &Repository) -> Vec<String> {
    let report = verify::run(repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent).unwrap();
    report.damage.into_iter().map(|d| format!("{}: {} ({:?})", d.object, d.problem, d.backups)).collect()
}

fn expire_options(selection: Selection, max_unused: Option<u8>) -> expire::Options {
    let (cluster, compression) = (ClusterName::default(), Compression::default());
    expire::Options { cluster, selection, force: false, max_unused, compression, jobs: None }
}

fn named(id: BackupId) -> Selection {
    Selection::Named(vec![id.to_string()])
}

fn last(count: u32) -> Selection {
    Selection::Policy(Policy { last: Some(Count::Number(count)), ..Policy::default() })
}

fn copy(from: &Repository, to: &Repository, id: BackupId) -> Result<export::Report> {
    let options = export::Options { backup: id.to_string(), ..export::Options::default() };
    export::to_repository(from, to, &options, &Silent)
}

#[test]
fn an_export_of_a_backup_that_expired_there_leaves_the_packs_that_later_backups_need() {
    let mut world = World::new();
    let ((_, home), (_, offsite)) = (world.repo("home"), world.repo("offsite"));
    let first = world.back_up(&home, 10, 1);
    let second = world.back_up(&home, 10, 2);
    copy(&home, &offsite, first).unwrap();
    copy(&home, &offsite, second).unwrap();
    expire::run(&offsite, &expire_options(named(first), None), &Silent).unwrap();
    assert_eq!(damage(&offsite), Vec::<String>::new());
    copy(&home, &offsite, first).unwrap();
    assert_eq!(damage(&offsite), Vec::<String>::new());
}

#[test]
fn a_backup_that_comes_home_again_leaves_the_packs_that_later_backups_need() {
    let mut world = World::new();
    let ((_, home), (_, offsite)) = (world.repo("home"), world.repo("offsite"));
    let first = world.back_up(&home, 10, 1);
    copy(&home, &offsite, first).unwrap();
    for night in 0..5 {
        world.back_up(&home, 10, 2 + night);
    }
    expire::run(&home, &expire_options(named(first), None), &Silent).unwrap();
    assert_eq!(damage(&home), Vec::<String>::new());
    copy(&offsite, &home, first).unwrap();
    assert_eq!(damage(&home), Vec::<String>::new());
}

#[test]
fn an_old_backup_that_is_exported_does_not_become_the_latest() {
    let mut world = World::new();
    let ((_, home), (_, fresh)) = (world.repo("home"), world.repo("fresh"));
    let old: Vec<BackupId> = (0..4).map(|night| world.back_up(&home, 10, night)).collect();
    // Seconds tell start times apart.
    let before = jiff_second();
    while jiff_second() == before {
        std::thread::yield_now();
    }
    let new = world.back_up(&fresh, 10, 9);
    copy(&home, &fresh, old[2]).unwrap();
    assert_eq!(listed(&fresh), [old[2], new], "oldest first");
    let report = expire::run(&fresh, &expire_options(last(1), None), &Silent).unwrap();
    assert_eq!(report.removed.iter().map(|b| b.id).collect::<Vec<_>>(), [old[2]]);
}

fn jiff_second() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// What the renewal thread does, between another one's listing of the leases and his reading of them.
fn renew_on_get(store: &MemoryStore, operation: &str, name: &ObjectName) -> Result<()> {
    if operation == "get" && name.as_str().contains("/leases/") {
        let bytes = store.get(name, 1 << 20)?;
        let text = String::from_utf8(bytes.clone()).unwrap();
        if !text.contains("\"backup\"") {
            return Ok(());
        }
        let (id, renewals) = name.as_str().rsplit_once('.').unwrap();
        let renewals: u32 = renewals.parse().unwrap();
        let numbered = |number: u32| ObjectName::new(format!("{id}.{number}")).unwrap();
        if store.put_new(&numbered(renewals + 1), &mut bytes.as_slice()).is_err() {
            // It is not the newest.
            return Ok(());
        }
        if let Some(old) = renewals.checked_sub(1) {
            store.delete(&numbered(old))?;
        }
    }
    Ok(())
}

#[test]
fn a_lease_that_is_renewed_while_it_is_read_still_protects_its_packs() {
    let mut world = World::new();
    let (store, repo) = world.repo("home");
    world.back_up(&repo, 10, 1);
    let run: BackupId = "20261122T160312Z-1a2b3c4d".parse().unwrap();
    let request = LeaseRequest { operation: Operation::Backup, runs: vec![run], uses: Vec::new() };
    let _lease = Lease::acquire(&repo, &ClusterName::default(), &request, &|_| {}).unwrap();
    let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), run, PackKind::Data);
    packer.append(&[1; 1000]).unwrap();
    packer.finish().unwrap();
    let other = reopened(Hooked::over(&store, renew_on_get), Path::new("elsewhere"));
    let report = expire::run(&other, &expire_options(Selection::Nothing, None), &Silent).unwrap();
    assert_eq!(report.packs_removed, 0);
}

/// The same, to its end: the backup commits while the expiry that did not see it deletes its packs.
#[test]
fn a_backup_whose_lease_was_renewed_during_an_expiry_is_whole_or_not_there() {
    let mut world = World::new();
    let (store, repo) = world.repo("home");
    world.back_up(&repo, 10, 1);
    world.cluster.change_random_blocks(0, 50, 5).unwrap();
    world.cluster.checkpoint().unwrap();
    let (at_manifest, reached) = std::sync::mpsc::channel::<()>();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let hook = move |_: &MemoryStore, operation: &str, name: &ObjectName| {
        if operation == "put_new" && name.as_str().contains("/manifests/") {
            at_manifest.send(()).unwrap();
            let _ = may_go_on.recv();
        }
        Ok(())
    };
    let writer = reopened(Hooked::over(&store, hook), &world.scratch.path().join("home"));
    let options = world.options(ParentChoice::Automatic);
    let backup = std::thread::spawn(move || backup::run(&writer, &options, &Silent));
    reached.recv().unwrap();
    let mut backup = Some(backup);
    let hook = move |store: &MemoryStore, operation: &str, name: &ObjectName| {
        renew_on_get(store, operation, name)?;
        if operation == "delete"
            && name.as_str().contains("/packs/")
            && let Some(backup) = backup.take()
        {
            go_on.send(()).unwrap();
            // Made or not: what counts is what is listed then.
            let _ = backup.join().unwrap();
        }
        Ok(())
    };
    let other = reopened(Hooked::over(&store, hook), Path::new("elsewhere"));
    expire::run(&other, &expire_options(Selection::Nothing, None), &Silent).unwrap();
    assert_eq!(damage(&repo), Vec::<String>::new());
}

fn refusing(refused: &Arc<Mutex<bool>>) -> impl FnMut(&MemoryStore, &str, &ObjectName) -> Result<()> + Send + 'static {
    let refused = Arc::clone(refused);
    move |_, operation, name| {
        let manifest = name.as_str().contains("/manifests/");
        if operation == "delete" && manifest && *refused.lock().unwrap() {
            return Err(Error::new(ErrorKind::Unavailable, "retained until tomorrow"));
        }
        Ok(())
    }
}

#[test]
fn new_editions_are_whole_when_the_old_ones_can_be_deleted_at_last() {
    let mut world = World::new();
    let (store, repo) = world.repo("home");
    let first = world.back_up(&repo, 10, 1);
    world.back_up(&repo, 250, 2);
    world.back_up(&repo, 10, 3);
    expire::run(&repo, &expire_options(named(first), None), &Silent).unwrap();
    let locked = Arc::new(Mutex::new(true));
    let retaining = reopened(Hooked::over(&store, refusing(&locked)), Path::new("elsewhere"));
    let expire = || expire::run(&retaining, &expire_options(Selection::Nothing, Some(0)), &Silent).unwrap();
    assert!(!expire().refused.is_empty());
    assert_eq!(damage(&repo), Vec::<String>::new());
    expire::run(&retaining, &expire_options(Selection::Nothing, None), &Silent).unwrap();
    *locked.lock().unwrap() = false;
    assert_eq!(expire().refused, Vec::<String>::new());
    assert_eq!(damage(&repo), Vec::<String>::new());
}

#[test]
fn an_expiry_that_was_interrupted_between_two_manifests_does_not_stop_those_after_it() {
    let mut world = World::new();
    world.cluster.add_relation(5, 900).unwrap();
    let (store, repo) = world.repo("home");
    let first = world.back_up(&repo, 1, 1);
    world.cluster.drop_relation(1).unwrap();
    // These share their block maps: a layer of ten blocks over the first one's.
    world.back_up(&repo, 10, 2);
    let again = || backup::run(&repo, &world.options(ParentChoice::Automatic), &Silent).unwrap().backup.id;
    again();
    again();
    let mut left = 1;
    let hook = move |_: &MemoryStore, operation: &str, name: &ObjectName| {
        if operation == "put_new" && name.as_str().contains("/manifests/") {
            if left == 0 {
                return Err(Error::new(ErrorKind::Unavailable, "the disk is full"));
            }
            left -= 1;
        }
        Ok(())
    };
    let failing = reopened(Hooked::over(&store, hook), Path::new("elsewhere"));
    expire::run(&failing, &expire_options(named(first), Some(0)), &Silent).unwrap_err();
    assert_eq!(damage(&repo), Vec::<String>::new());
    let later: Vec<_> =
        (0..3).map(|_| expire::run(&repo, &expire_options(Selection::Nothing, Some(0)), &Silent)).collect();
    assert_eq!(damage(&repo), Vec::<String>::new());
    for report in later {
        report.unwrap();
    }
}

#[test]
fn what_an_interrupted_expiry_left_is_not_lost_by_the_next_one() {
    let mut lost = Vec::new();
    for (max_unused, changed, choice) in [(5, 2, 4), (10, 20, 8)] {
        for committed in 1..3 {
            let found = damage_after_an_interrupted_expiry(max_unused, changed, choice, committed);
            lost.extend(found);
        }
    }
    assert_eq!(lost, Vec::<String>::new());
}

fn damage_after_an_interrupted_expiry(max_unused: u8, changed: u32, choice: u64, committed: u32) -> Vec<String> {
    let mut world = World::new();
    world.cluster.add_relation(5, 900).unwrap();
    let (store, repo) = world.repo("home");
    let first = world.back_up(&repo, 1, 1);
    world.cluster.drop_relation(1).unwrap();
    // Two that share a layer of ten blocks over the first one's; one with a layer more.
    world.back_up(&repo, 10, 2);
    backup::run(&repo, &world.options(ParentChoice::Automatic), &Silent).unwrap();
    world.back_up(&repo, changed, choice);
    let mut left = committed;
    let hook = move |_: &MemoryStore, operation: &str, name: &ObjectName| {
        if operation == "put_new" && name.as_str().contains("/manifests/") {
            if left == 0 {
                return Err(Error::new(ErrorKind::Unavailable, "the disk is full"));
            }
            left -= 1;
        }
        Ok(())
    };
    let failing = reopened(Hooked::over(&store, hook), Path::new("elsewhere"));
    expire::run(&failing, &expire_options(named(first), Some(max_unused)), &Silent).unwrap_err();
    assert_eq!(damage(&repo), Vec::<String>::new());
    expire::run(&repo, &expire_options(Selection::Nothing, Some(max_unused)), &Silent).unwrap();
    let verified = damage(&repo);
    let lost = listed(&repo).into_iter().filter_map(|id| {
        let (target, tablespace_map) = (world.scratch.path().join("restored"), Vec::new());
        let options = restore::Options { target: target.clone(), tablespace_map, archive_mode: false, jobs: None };
        let error = restore::run(&repo, &ClusterName::default(), &id.to_string(), &options, &Silent).err();
        let _ = std::fs::remove_dir_all(target);
        error.map(|error| format!("{id} does not restore: {error}; verify says {verified:?}"))
    });
    lost.chain(verified.clone()).collect()
}

#[test]
fn a_merge_of_an_imported_old_backup_does_not_become_the_latest() {
    let mut world = World::new();
    let ((_, home), (_, fresh)) = (world.repo("home"), world.repo("fresh"));
    let old = world.back_up(&home, 10, 0);
    let before = jiff_second();
    while jiff_second() == before {
        std::thread::yield_now();
    }
    let new = world.back_up(&fresh, 10, 9);
    copy(&home, &fresh, old).unwrap();
    assert_eq!(listed(&fresh), [old, new]);
    let options = merge::Options { backup: old.to_string(), ..merge::Options::default() };
    let merged = merge::run(&fresh, &options, &Silent).unwrap().backup.id;
    assert_eq!(listed(&fresh), [old, merged, new]);
}

#[test]
fn a_verification_that_waited_for_an_expiry_reports_no_damage_in_what_went() {
    let mut world = World::new();
    let (store, repo) = world.repo("home");
    let first = world.back_up(&repo, 10, 1);
    world.back_up(&repo, 250, 2);
    let mut expiry = Some(reopened(store.clone(), Path::new("elsewhere")));
    // Between the verification's look at the catalog and its lease an expiry runs.
    let hook = move |_: &MemoryStore, operation: &str, name: &ObjectName| {
        if operation == "put_new"
            && name.as_str().contains("/leases/")
            && let Some(other) = expiry.take()
        {
            expire::run(&other, &expire_options(named(first), Some(0)), &Silent).unwrap();
        }
        Ok(())
    };
    let mine = reopened(Hooked::over(&store, hook), &world.scratch.path().join("home"));
    assert_eq!(damage(&mine), Vec::<String>::new());
    assert_eq!(damage(&repo), Vec::<String>::new());
}
