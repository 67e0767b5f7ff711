//! Work on a small repository that is stopped at any of its operations, whatever the machine that stops it.
//!
//! A [`Machine`] holds two repositories, `home` and `offsite`, and can be told to stop at its k-th mutating operation: from then on everything fails. The
//! walk of [`stop_everywhere`] prepares a history once, and then for each k works on a copy of it until the machine stops, lets the machine come
//! back with what it kept, and demands: every backup that was listed before, and did not have to go, is listed and restores byte for byte; a new one is
//! complete or not there; the same work done again succeeds, and so does other work; an expiry then leaves what the manifests name, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_engine::backup::{self, ParentChoice};
use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupId, ClusterName, Repository};
use pgstrata_engine::store::Store;
use pgstrata_engine::{export, merge, pin, verify};
use testdata::synthetic::{Options, SyntheticCluster};

use super::support::{Choices, Files, change, files, restored, without_wal};

/// The backups of a repository and what they restore to.
pub type Backups = BTreeMap<BackupId, Arc<Files>>;

/// What holds the repositories, and stops.
pub trait Machine: Sized {
    /// How it stops.
    type Stop: Copy + Debug;

    /// Another one, with the same contents, that runs.
    fn copy(&self) -> Self;

    /// The stores of `home` and of `offsite`, as a process that starts opens them.
    fn stores(&self) -> [Arc<dyn Store>; 2];

    /// Makes it stop at the mutating operation of this number, counted from now and from 0; the operations that `how` is not about don't count.
    fn stop_at(&self, operation: u64, how: Self::Stop);

    /// How many operations were counted, if it did not stop.
    fn operations(&self) -> u64;

    /// Whether it stopped.
    fn stopped(&self) -> bool;

    /// The machine that comes back, with what this one kept.
    fn come_back(self, choices: &mut Choices) -> Self;

    /// The names of all that is in `home` and in `offsite`, what is no object included.
    fn names(&self) -> [BTreeSet<String>; 2];
}

/// What is being done when the machine stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Backup,
    FullBackup,
    Merge,
    Repack,
    Expire,
    Export,
    Pin,
    Unpin,
}

impl Work {
    pub const ALL: [Work; 8] =
        [Work::Backup, Work::FullBackup, Work::Merge, Work::Repack, Work::Expire, Work::Export, Work::Pin, Work::Unpin];
}

/// A prepared history.
pub struct Scene<M> {
    pub scratch: tempfile::TempDir,
    pub machine: M,
    pub directory: PathBuf,
    /// What the cluster's files are now.
    now: Arc<Files>,
    home: Backups,
    offsite: Backups,
    newest: Option<BackupId>,
}

/// The repositories of a running machine, as one process has them.
struct Repositories {
    home: Repository,
    offsite: Repository,
}

/// What must be true of a repository after a crash.
struct Expected {
    /// What must be listed.
    there: Backups,
    /// What may be listed.
    maybe: Backups,
    /// What a backup restores to that nobody heard of before.
    fresh: Option<Arc<Files>>,
}

impl<M: Machine> Scene<M> {
    /// An empty repository beside a cluster.
    pub fn empty(machine: M) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(17, 1) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 40).unwrap();
        cluster.checkpoint().unwrap();
        let [home, offsite] = machine.stores();
        Repository::init_in(home, place(scratch.path(), "home")).unwrap();
        Repository::init_in(offsite, place(scratch.path(), "offsite")).unwrap();
        let now = Arc::new(without_wal(files(&directory)));
        Self { scratch, machine, directory, now, home: Backups::new(), offsite: Backups::new(), newest: None }
    }

    /// Three backups, the first of which is offsite too and mostly of pages that changed later, and a cluster that went on.
    pub fn with_history(machine: M) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(17, 2) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 40).unwrap();
        cluster.add_relation(5, 5).unwrap();
        cluster.checkpoint().unwrap();
        let [home, offsite] = machine.stores();
        Repository::init_in(home, place(scratch.path(), "home")).unwrap();
        Repository::init_in(offsite, place(scratch.path(), "offsite")).unwrap();
        let mut scene = Self {
            scratch,
            machine,
            directory,
            now: Arc::default(),
            home: Backups::new(),
            offsite: Backups::new(),
            newest: None,
        };
        let mut choices = Choices(7);
        for round in 0..3 {
            scene.back_up_the_present();
            if round == 0 {
                scene.export_the_newest();
            }
            cluster.change_random_blocks(0, 30, round).unwrap();
            cluster.drop_and_recreate(1, 7).unwrap();
            (0..3).for_each(|_| change(&mut cluster, &mut choices));
            cluster.checkpoint().unwrap();
        }
        scene.now = Arc::new(without_wal(files(&scene.directory)));
        scene
    }

    fn back_up_the_present(&mut self) {
        let repositories = self.repositories(&self.machine);
        let report = backup::run(&repositories.home, &self.backup_options(ParentChoice::Automatic), &Silent).unwrap();
        self.newest = Some(report.backup.id);
        self.home.insert(report.backup.id, Arc::new(without_wal(files(&self.directory))));
    }

    fn export_the_newest(&mut self) {
        self.work(Work::Export, &self.repositories(&self.machine)).unwrap();
        self.offsite.extend(self.home.clone());
    }

    fn repositories(&self, machine: &M) -> Repositories {
        let [home, offsite] = machine.stores();
        let open = |store, name| Repository::open_in(store, place(self.scratch.path(), name)).unwrap();
        Repositories { home: open(home, "home"), offsite: open(offsite, "offsite") }
    }

    fn backup_options(&self, parent: ParentChoice) -> backup::Options {
        backup::Options { data_dir: Some(self.directory.clone()), parent, offline: true, ..backup::Options::default() }
    }

    fn newest(&self) -> String {
        self.newest.map(|id| id.to_string()).unwrap_or_default()
    }

    fn work(&self, work: Work, repositories: &Repositories) -> Result<()> {
        let Repositories { home, offsite } = repositories;
        let cluster = ClusterName::default();
        let merge = |repack| merge::Options { backup: self.newest(), repack, ..merge::Options::default() };
        match work {
            Work::Backup => backup::run(home, &self.backup_options(ParentChoice::Automatic), &Silent).map(drop),
            Work::FullBackup => backup::run(home, &self.backup_options(ParentChoice::Full), &Silent).map(drop),
            Work::Merge => merge::run(home, &merge(false), &Silent).map(drop),
            Work::Repack => merge::run(home, &merge(true), &Silent).map(drop),
            Work::Export => {
                let options = export::Options { backup: self.newest(), ..export::Options::default() };
                export::to_repository(home, offsite, &options, &Silent).map(drop)
            }
            Work::Pin => pin::set(home, &cluster, &self.newest(), true).map(drop),
            Work::Unpin => pin::set(home, &cluster, &self.newest(), false).map(drop),
            Work::Expire => {
                let last = Some(Count::Number(1));
                expire_by(home, Selection::Policy(Policy { last, ..Policy::default() }), Some(0)).map(drop)
            }
        }
    }

    /// What must be at home and offsite when `work` was stopped.
    fn expected(&self, work: Work) -> [Expected; 2] {
        let of_newest = || self.newest.and_then(|id| self.home.get(&id).cloned());
        let mut home = Expected { there: self.home.clone(), maybe: Backups::new(), fresh: None };
        let mut offsite = Expected { there: self.offsite.clone(), maybe: Backups::new(), fresh: None };
        match work {
            Work::Backup | Work::FullBackup => home.fresh = Some(Arc::clone(&self.now)),
            Work::Merge | Work::Repack => home.fresh = of_newest(),
            Work::Expire => {
                let goes = |id: &BackupId| Some(*id) != self.newest;
                (home.maybe, home.there) = std::mem::take(&mut home.there).into_iter().partition(|(id, _)| goes(id));
            }
            Work::Export => offsite.maybe.extend(self.newest.zip(of_newest())),
            Work::Pin | Work::Unpin => {}
        }
        [home, offsite]
    }

    /// How many operations `work` has that `how` is about.
    fn count(&self, work: Work, how: M::Stop) -> u64 {
        let machine = self.stop(work, u64::MAX, how);
        assert!(!machine.stopped());
        machine.operations()
    }

    /// Stops `work` at one operation.
    fn stop(&self, work: Work, operation: u64, how: M::Stop) -> M {
        let machine = self.machine.copy();
        let repositories = self.repositories(&machine);
        machine.stop_at(operation, how);
        let done = self.work(work, &repositories);
        assert!(done.is_ok() || machine.stopped(), "{work:?}: {done:?}");
        machine
    }

    fn check(&self, machine: M, work: Work, next: Work, proved: &mut Proved, context: &str) {
        let repositories = self.repositories(&machine);
        let [home, offsite] = self.expected(work);
        let mut home = home.check(&repositories.home, proved, context);
        let mut offsite = offsite.check(&repositories.offsite, proved, context);
        for work in [work, next] {
            if self.newest.is_none() && !matches!(work, Work::Backup | Work::FullBackup) {
                continue;
            }
            self.work(work, &repositories).unwrap_or_else(|e| panic!("{context}: then {work:?}: {e}"));
            self.update(work, &repositories, &mut home, &mut offsite, context);
        }
        for repo in [&repositories.home, &repositories.offsite] {
            expire_by(repo, Selection::Nothing, None).unwrap_or_else(|e| panic!("{context}: {e}"));
        }
        for (repo, names) in [&repositories.home, &repositories.offsite].into_iter().zip(machine.names()) {
            assert_no_litter(repo, &names, context);
        }
        for (repo, backups) in [(&repositories.home, &home), (&repositories.offsite, &offsite)] {
            assert_eq!(listed(repo, context), backups.keys().copied().collect(), "{context}");
            let options = verify::Options::default();
            let damage = verify::run(repo, &ClusterName::default(), "all", &options, &Silent);
            assert!(backups.is_empty() || damage.unwrap().damage.is_empty(), "{context}");
        }
    }

    /// Takes over what work that succeeded did.
    fn update(&self, work: Work, on: &Repositories, home: &mut Backups, offsite: &mut Backups, context: &str) {
        let there = listed(&on.home, context);
        let fresh: Vec<BackupId> = there.iter().filter(|id| !home.contains_key(id)).copied().collect();
        let [expected, _] = self.expected(work);
        match expected.fresh {
            Some(files) => {
                assert_eq!(fresh.len(), 1, "{context}: {work:?} made no backup");
                home.insert(fresh[0], files);
            }
            None => assert_eq!(fresh, [], "{context}: {work:?} made a backup"),
        }
        if work == Work::Expire {
            assert_eq!(there.len(), 1, "{context}");
        }
        home.retain(|id, _| there.contains(id) || work != Work::Expire);
        if work == Work::Export {
            offsite.extend(self.newest.and_then(|id| Some((id, home.get(&id)?.clone()))));
        }
        let pinned = on.home.pins(&ClusterName::default()).unwrap();
        match work {
            Work::Pin => assert_eq!(pinned, self.newest.into_iter().collect(), "{context}"),
            Work::Unpin => assert_eq!(pinned, BTreeSet::new(), "{context}"),
            _ => {}
        }
    }
}

impl Expected {
    /// Compares a repository with what must be there, and says what is.
    fn check(&self, repo: &Repository, proved: &mut Proved, context: &str) -> Backups {
        let listed = listed(repo, context);
        for id in self.there.keys() {
            assert!(listed.contains(id), "{context}: {id} is gone");
        }
        let mut found = Backups::new();
        for id in listed {
            let known = self.there.get(&id).or_else(|| self.maybe.get(&id)).or(self.fresh.as_ref());
            let known = known.unwrap_or_else(|| panic!("{context}: {id} came from nowhere"));
            proved.restores_to(repo, id, known, context);
            found.insert(id, Arc::clone(known));
        }
        let fresh = found.keys().filter(|id| !self.there.contains_key(id) && !self.maybe.contains_key(id)).count();
        assert!(fresh <= 1, "{context}: {fresh} new backups");
        found
    }
}

/// Backups that were restored. What a restore writes follows from the manifest and the packs that it names: one of the same bytes is restored once.
struct Proved {
    target: PathBuf,
    known: BTreeSet<[u8; 32]>,
}

impl Proved {
    fn restores_to(&mut self, repo: &Repository, id: BackupId, expected: &Files, context: &str) {
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

fn place(scratch: &Path, name: &str) -> String {
    scratch.join(name).display().to_string()
}

fn listed(repo: &Repository, context: &str) -> BTreeSet<BackupId> {
    let catalog = repo.catalog(&ClusterName::default()).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert!(catalog.damaged().is_empty(), "{context}: {:?}", catalog.damaged());
    catalog.backups().iter().map(|backup| backup.id).collect()
}

fn expire_by(repo: &Repository, selection: Selection, max_unused: Option<u8>) -> Result<expire::Report> {
    let options = expire::Options {
        cluster: ClusterName::default(),
        selection,
        force: false,
        max_unused,
        compression: backup::Compression::default(),
        jobs: None,
    };
    let report = expire::run(repo, &options, &Silent)?;
    // Here no store refuses anything for ever.
    let refused = report.refused.first().map(|refused| Error::new(ErrorKind::Unavailable, refused));
    refused.map_or(Ok(report), Err)
}

/// What is there is what the manifests need, the manifests, the pins, and the header.
pub fn assert_no_litter(repo: &Repository, names: &BTreeSet<String>, context: &str) {
    let cluster = ClusterName::default();
    let mut needed = BTreeSet::from(["repository".to_owned()]);
    for backup in repo.catalog(&cluster).unwrap().backups() {
        let manifest = repo.manifest(&cluster, backup.id).unwrap();
        needed.insert(manifest.object().unwrap().to_string());
        needed.extend(manifest.packs.iter().map(|pack| pack.name.object(&cluster).unwrap().to_string()));
    }
    needed.extend(repo.pins(&cluster).unwrap().iter().map(|id| format!("clusters/main/pins/{id}")));
    assert_eq!(names, &needed, "{context}");
}

/// Stops each work at each of its operations, in each way, and checks what comes back; how often that was.
pub fn stop_everywhere<M: Machine>(scene: &Scene<M>, works: &[Work], ways: &[M::Stop]) -> u64 {
    let mut crashes = 0;
    let mut proved = Proved { target: scene.scratch.path().join("restored"), known: BTreeSet::new() };
    let mut others = [Work::Backup, Work::Merge, Work::Expire, Work::Export].into_iter().cycle();
    for (work, how) in works.iter().flat_map(|work| ways.iter().map(move |how| (*work, *how))) {
        for operation in 0..scene.count(work, how) {
            let context = format!("{work:?} stopped at operation {operation}, {how:?}");
            let machine = scene.stop(work, operation, how);
            assert!(machine.stopped(), "{context}: it was not reached");
            let next = others.next().unwrap_or(work);
            scene.check(machine.come_back(&mut Choices(operation)), work, next, &mut proved, &context);
            crashes += 1;
        }
    }
    crashes
}
