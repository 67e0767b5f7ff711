//! Work on a small repository that is stopped at any of its operations, whatever the machine that stops it.
//!
//! A [`Machine`] holds two repositories, `home` and `offsite`, and can be told to stop at its k-th mutating operation: from then on everything fails. The
//! walk of [`stop_everywhere`] prepares a history once, and then for each k works on a copy of it until the machine stops, lets the machine come
//! back with what it kept, and demands: every backup that was listed before, and did not have to go, is listed and restores byte for byte; a new one is
//! complete or not there; the same work done again succeeds, and so does other work, and what they did is still there when the power goes right after them;
//! an expiry then leaves what the manifests name, and nothing else.

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
use pgstrata_engine::{export, merge, pin};
use testdata::synthetic::{Options, SyntheticCluster};

use super::proved::{Proved, assert_no_litter, listed, scratch};
use super::support::{Choices, Files, change, files, without_wal};

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

    /// The machine that comes back, with what this one kept; one that did not stop loses its power.
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
    /// Whether it needs the newest backup of the history.
    fn needs_a_backup(self) -> bool {
        !matches!(self, Work::Backup | Work::FullBackup | Work::Expire)
    }
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
        let scratch = scratch();
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
        let scratch = scratch();
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

    /// Looks at what came back, works on it, loses the power once more, looks again, and collects the litter.
    fn check(&self, machine: M, stopped: Work, choices: &mut Choices, proved: &mut Proved, context: &str) {
        let next = [Work::Backup, Work::Merge, Work::Expire, Work::Export][choices.below(4) as usize];
        let works = if choices.below(3) == 0 { [next, stopped] } else { [stopped, next] };
        let repositories = self.repositories(&machine);
        let [home, offsite] = self.expected(stopped);
        let mut known = Known {
            home: home.look(&repositories.home, proved, context),
            offsite: offsite.look(&repositories.offsite, proved, context),
            pins: None,
        };
        for work in works {
            let is_there = self.newest.is_some_and(|id| listed(&repositories.home, context).contains(&id));
            if work.needs_a_backup() && !is_there {
                continue;
            }
            self.work(work, &repositories).unwrap_or_else(|e| panic!("{context}: then {work:?}: {e}"));
            self.update(work, &repositories, &mut known, context);
        }
        drop(repositories);
        let context = format!("{context}, again after {works:?}");
        let machine = machine.come_back(choices);
        let repositories = self.repositories(&machine);
        let sides = [&repositories.home, &repositories.offsite].into_iter().zip([known.home, known.offsite]);
        for ((repo, expected), side) in sides.zip(0_usize..) {
            expected.look(repo, proved, &context);
            let before = listed(repo, &context);
            expire_by(repo, Selection::Nothing, None).unwrap_or_else(|e| panic!("{context}: {e}"));
            assert_eq!(listed(repo, &context), before, "{context}");
            assert_no_litter(repo, &machine.names()[side], &context);
            expected.look(repo, proved, &context);
        }
        if let Some(pins) = known.pins {
            assert_eq!(repositories.home.pins(&ClusterName::default()).unwrap(), pins, "{context}");
        }
    }

    /// Takes over what work that succeeded did, which is there for good.
    fn update(&self, work: Work, on: &Repositories, known: &mut Known, context: &str) {
        let there = listed(&on.home, context);
        let all = known.home.all();
        let fresh: Vec<BackupId> = there.iter().filter(|id| !all.contains_key(id)).copied().collect();
        let [expected, _] = self.expected(work);
        assert_eq!(fresh.len(), usize::from(expected.fresh.is_some()), "{context}: new after {work:?}: {fresh:?}");
        known.home.there.extend(fresh.into_iter().zip(expected.fresh));
        match work {
            Work::Expire => {
                assert!(there.len() <= 1, "{context}");
                let left = known.home.all().into_iter().filter(|(id, _)| there.contains(id)).collect();
                known.home = Expected { there: left, maybe: Backups::new(), fresh: None };
            }
            Work::Export => known.offsite.there.extend(self.newest.and_then(|id| Some((id, all.get(&id)?.clone())))),
            Work::Pin => known.pins = Some(self.newest.into_iter().collect()),
            Work::Unpin => known.pins = Some(BTreeSet::new()),
            _ => {}
        }
    }
}

impl<M: Machine> Scene<M> {
    /// Stops work, then an expiry of what that left: whatever is listed in the end must restore, and something must be.
    fn stop_twice(
        &self,
        machine: &M,
        operation: u64,
        how: M::Stop,
        choices: &mut Choices,
        proved: &mut Proved,
        context: &str,
    ) {
        let machine = machine.copy();
        let repositories = self.repositories(&machine);
        machine.stop_at(operation, how);
        // Whether it got to its end or not.
        let _ = self.work(Work::Expire, &repositories);
        drop(repositories);
        let machine = machine.come_back(choices);
        let expected = Expected { there: Backups::new(), maybe: self.home.clone(), fresh: Some(Arc::clone(&self.now)) };
        let repositories = self.repositories(&machine);
        let found = expected.look(&repositories.home, proved, context);
        assert!(!listed(&repositories.home, context).is_empty(), "{context}: {} are gone", found.maybe.len());
    }
}

/// What is known of the repositories of a machine that came back.
struct Known {
    home: Expected,
    offsite: Expected,
    pins: Option<BTreeSet<BackupId>>,
}

impl Expected {
    /// Compares a repository with what must be there, and says what is; what nobody promised may go again.
    fn look(&self, repo: &Repository, proved: &mut Proved, context: &str) -> Self {
        let listed = listed(repo, context);
        for id in self.there.keys() {
            assert!(listed.contains(id), "{context}: {id} is gone");
        }
        let mut maybe = self.maybe.clone();
        let mut fresh = 0;
        for id in listed {
            let known = self.there.get(&id).or_else(|| self.maybe.get(&id));
            fresh += u32::from(known.is_none());
            let known = known.or(self.fresh.as_ref()).unwrap_or_else(|| panic!("{context}: {id} came from nowhere"));
            proved.restores_to(repo, id, known, context);
            if !self.there.contains_key(&id) {
                maybe.insert(id, Arc::clone(known));
            }
        }
        assert!(fresh <= 1, "{context}: {fresh} new backups");
        Self { there: self.there.clone(), maybe, fresh: None }
    }

    fn all(&self) -> Backups {
        self.there.iter().chain(&self.maybe).map(|(id, files)| (*id, Arc::clone(files))).collect()
    }
}

fn place(scratch: &Path, name: &str) -> String {
    scratch.join(name).display().to_string()
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

/// Stops each work at each of its operations, in each way, and checks what comes back; how often that was.
pub fn stop_everywhere<M: Machine>(scene: &Scene<M>, works: &[Work], ways: &[M::Stop]) -> u64 {
    let mut crashes = 0;
    let mut proved = Proved::new(&scene.scratch.path().join("restored"));
    for (work, how) in works.iter().flat_map(|work| ways.iter().map(move |how| (*work, *how))) {
        // Two threads that sync the same directory at once do so twice or once: how many operations there are is not known before.
        for operation in 0.. {
            let context = format!("{work:?} stopped at operation {operation}, {how:?}");
            let machine = scene.stop(work, operation, how);
            if !machine.stopped() {
                break;
            }
            let mut choices = Choices(operation);
            let machine = machine.come_back(&mut choices);
            scene.check(machine, work, &mut choices, &mut proved, &context);
            crashes += 1;
        }
    }
    crashes
}

/// Stops work at each of its operations in the first way, and an expiry after that at some of its own in the second way; how often that was.
#[cfg(test)]
pub fn stop_twice<M: Machine>(scene: &Scene<M>, works: &[Work], [first, second]: [M::Stop; 2], samples: u32) -> u64 {
    let mut crashes = 0;
    let mut proved = Proved::new(&scene.scratch.path().join("restored"));
    let calls = u32::try_from(scene.count(Work::Expire, second)).unwrap();
    for work in works {
        for operation in 0..scene.count(*work, first) {
            let mut choices = Choices(operation);
            let machine = scene.stop(*work, operation, first).come_back(&mut choices);
            for _ in 0..samples {
                let then = u64::from(choices.below(calls));
                let context =
                    format!("{work:?} stopped at {operation}, {first:?}, then an expiry at {then}, {second:?}");
                scene.stop_twice(&machine, then, second, &mut choices, &mut proved, &context);
                crashes += 1;
            }
        }
    }
    crashes
}
