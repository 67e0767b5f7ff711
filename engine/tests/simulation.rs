//! A cluster's life with a store that fails: random work of every kind, against a model, by a seed.
//!
//! A cluster grows, shrinks, is dropped, rewritten and promoted; its backups are made, merged, expired, exported, pinned, restored and verified, in two
//! repositories. In every other step a store fails: one operation is refused once, before or after it was done, or the store stops at
//! it and stays away until the step is over. After each step: what was done without an error is done; what failed is done or not; nothing that is listed is
//! damaged, and all of it restores to the model's bytes. A failure prints the seed; `PGSTRATA_SEEDS` says how many there are.

#[path = "support/proved.rs"]
mod proved;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupId, ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectInfo, ObjectName, Store};
use pgstrata_engine::{export, merge, pin, restore, verify};
use proved::{Proved, assert_no_litter, listed, scratch};
use support::{Choices, Files, change, files, without_wal};
use testdata::synthetic::{Options, SyntheticCluster};

const SEEDS: u64 = 50;
const STEPS: usize = 40;

/// How a store fails.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// One operation is refused.
    Refuses,
    /// One operation is done and reported as failed.
    LosesTheAnswer,
    /// It stops before an operation.
    Stops,
    /// It stops after an operation.
    StopsAfter,
}

/// A store in memory that fails when it is told to.
#[derive(Clone, Debug, Default)]
struct Faulty {
    objects: MemoryStore,
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug, Default)]
struct Plan {
    /// Operations to go, and what happens then.
    fault: Option<(u32, Fault)>,
    off: bool,
    failed: bool,
}

fn out_of_reach() -> Error {
    Error::new(ErrorKind::Unavailable, "the store is out of reach")
}

impl Faulty {
    /// Does something, or fails before or after it.
    fn run<T>(&self, operation: impl FnOnce(&MemoryStore) -> Result<T>) -> Result<T> {
        match self.fault()? {
            None => operation(&self.objects),
            Some(Fault::Refuses | Fault::Stops) => Err(out_of_reach()),
            Some(Fault::LosesTheAnswer | Fault::StopsAfter) => operation(&self.objects).and(Err(out_of_reach())),
        }
    }

    fn fault(&self) -> Result<Option<Fault>> {
        let mut plan = self.plan.lock().unwrap();
        if plan.off {
            return Err(out_of_reach());
        }
        let Some((to_go, fault)) = plan.fault.take() else { return Ok(None) };
        if to_go > 0 {
            plan.fault = Some((to_go - 1, fault));
            return Ok(None);
        }
        plan.failed = true;
        plan.off = matches!(fault, Fault::Stops | Fault::StopsAfter);
        Ok(Some(fault))
    }
}

impl Store for Faulty {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|e| Error::new(ErrorKind::Unavailable, "broke off").because(e))?;
        self.run(|objects| objects.put_new(name, &mut &bytes[..]))
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.run(|objects| objects.get(name, max_len))
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.run(|objects| objects.get_range(name, offset, buffer))
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.run(|objects| objects.list(prefix))
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        self.run(|objects| objects.delete(name))
    }
}

/// A repository and what should be in it.
struct Side {
    store: Faulty,
    place: String,
    repo: Repository,
    backups: BTreeMap<BackupId, Arc<Files>>,
}

/// What a step that failed may have done nevertheless.
#[derive(Default)]
struct InDoubt {
    /// A backup that may be there, with its name if that is known.
    added: Option<(Option<BackupId>, Arc<Files>)>,
    /// Backups that may be gone.
    removed: BTreeSet<BackupId>,
}

impl Side {
    fn new(place: String) -> Self {
        let store = Faulty::default();
        let repo = Repository::init_in(Arc::new(store.clone()), place.clone()).unwrap();
        Self { store, place, repo, backups: BTreeMap::new() }
    }

    fn arm(&self, fault: Option<(u32, Fault)>) {
        *self.store.plan.lock().unwrap() = Plan { fault, ..Plan::default() };
    }

    /// Ends whatever is wrong with the store, as a new process.
    fn recover(&mut self) {
        self.arm(None);
        self.repo = Repository::open_in(Arc::new(self.store.clone()), self.place.clone()).unwrap();
    }

    fn chosen(&self, choices: &mut Choices) -> Option<BackupId> {
        let count = u32::try_from(self.backups.len()).unwrap();
        (count > 0).then(|| *self.backups.keys().nth(choices.below(count) as usize).unwrap())
    }

    /// Compares the listing with the model, and takes over what was in doubt.
    fn settle(&mut self, doubt: &InDoubt, context: &str) {
        let found = listed(&self.repo, context);
        for id in &found {
            if let Some((name, files)) = &doubt.added
                && name.is_none_or(|name| name == *id)
            {
                self.backups.entry(*id).or_insert_with(|| Arc::clone(files));
            }
        }
        self.backups.retain(|id, _| found.contains(id) || !doubt.removed.contains(id));
        assert_eq!(found, self.backups.keys().copied().collect(), "{context}");
    }
}

/// A cluster that changes, and its repositories.
struct World {
    scratch: tempfile::TempDir,
    directory: PathBuf,
    cluster: SyntheticCluster,
    choices: Choices,
    home: Side,
    offsite: Side,
    proved: Proved,
    context: String,
}

impl World {
    fn new(seed: u64) -> Self {
        let scratch = scratch();
        let directory = scratch.path().join("cluster");
        let mut choices = Choices(seed);
        let major = 13 + choices.below(6);
        let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(major, seed) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        let side = |name| Side::new(scratch.path().join(name).display().to_string());
        let (home, offsite) = (side("home"), side("offsite"));
        let proved = Proved::new(&scratch.path().join("proved"));
        Self { directory, cluster, choices, home, offsite, proved, context: String::new(), scratch }
    }

    fn step(&mut self, seed: u64, step: usize) {
        let work = self.choices.below(12);
        let fault = self.fault();
        self.context = format!("seed {seed}, step {step}, work {work}, {fault:?}");
        let at_home = self.choices.below(3) > 0;
        let doubts = match work {
            0..4 => self.back_up(at_home, fault),
            4..6 => self.merge(at_home, fault),
            6..8 => self.expire(at_home, fault),
            8 | 9 => self.export(at_home, fault),
            10 => self.pin(fault),
            _ => self.read(at_home, fault),
        };
        for (side, doubt) in [&mut self.home, &mut self.offsite].into_iter().zip(&doubts) {
            side.recover();
            side.settle(doubt, &self.context);
            for (id, expected) in &side.backups {
                self.proved.restores_to(&side.repo, *id, expected, &self.context);
            }
        }
    }

    fn fault(&mut self) -> Option<(u32, Fault)> {
        let fault = [Fault::Refuses, Fault::LosesTheAnswer, Fault::Stops, Fault::StopsAfter];
        let fault = fault[self.choices.below(4) as usize];
        // Most work has few operations, some has many.
        let bound = [10, 40, 160][self.choices.below(3) as usize];
        (self.choices.below(2) == 0).then(|| (self.choices.below(bound), fault))
    }

    /// Whether work that failed had a reason to.
    fn check<T>(&self, done: Result<T>) -> Option<T> {
        let failed = [&self.home, &self.offsite].iter().any(|side| side.store.plan.lock().unwrap().failed);
        match done {
            Ok(done) => Some(done),
            Err(e) => {
                assert!(failed, "{}: {e}", self.context);
                assert!(!matches!(e.kind(), ErrorKind::Bug | ErrorKind::Corrupt), "{}: {e}", self.context);
                None
            }
        }
    }

    fn back_up(&mut self, _: bool, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        for _ in 0..self.choices.below(4) {
            change(&mut self.cluster, &mut self.choices);
        }
        if self.choices.below(6) == 0 { self.cluster.promote() } else { self.cluster.checkpoint() }.unwrap();
        let now = Arc::new(without_wal(files(&self.directory)));
        let parent = match self.choices.below(7) {
            0 => ParentChoice::Full,
            1 => ParentChoice::Differential,
            _ => ParentChoice::Automatic,
        };
        let data_dir = Some(self.directory.clone());
        let options = backup::Options { data_dir, parent, offline: true, ..backup::Options::default() };
        self.home.arm(fault);
        let done = backup::run(&self.home.repo, &options, &Silent);
        if let Some(report) = self.check(done) {
            assert_eq!(report.repository_damage, [""; 0], "{}", self.context);
            self.home.backups.insert(report.backup.id, now);
            return Default::default();
        }
        [InDoubt { added: Some((None, now)), ..InDoubt::default() }, InDoubt::default()]
    }

    fn merge(&mut self, _: bool, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        let Some(id) = self.home.chosen(&mut self.choices) else { return Default::default() };
        let repack = self.choices.below(2) == 0;
        let verify = self.choices.below(4) == 0;
        let options = merge::Options { backup: id.to_string(), repack, verify, ..merge::Options::default() };
        self.home.arm(fault);
        let done = merge::run(&self.home.repo, &options, &Silent);
        let files = Arc::clone(&self.home.backups[&id]);
        if let Some(report) = self.check(done) {
            self.home.backups.insert(report.backup.id, files);
            return Default::default();
        }
        [InDoubt { added: Some((None, files)), ..InDoubt::default() }, InDoubt::default()]
    }

    fn expire(&mut self, at_home: bool, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        let side = if at_home { &mut self.home } else { &mut self.offsite };
        let max_unused = [None, Some(0), Some(25)][self.choices.below(3) as usize];
        let Some(id) = side.chosen(&mut self.choices) else { return Default::default() };
        let last = Some(Count::Number(1 + self.choices.below(5)));
        let selection = match self.choices.below(4) {
            0 => Selection::Nothing,
            1 => Selection::Named(vec![id.to_string()]),
            _ => Selection::Policy(Policy { last, ..Policy::default() }),
        };
        let cluster = ClusterName::default();
        let compression = Compression::default();
        let options = expire::Options { cluster, selection, force: false, max_unused, compression, jobs: None };
        // Pinned, or the last one.
        let Ok(planned) = expire::plan(&side.repo, &options) else { return Default::default() };
        side.arm(fault);
        let done = expire::run(&side.repo, &options, &Silent);
        let failed = side.store.plan.lock().unwrap().failed;
        let planned: BTreeSet<BackupId> = planned.removed.iter().map(|backup| backup.id).collect();
        if let (Some(report), false) = (self.check(done), failed) {
            assert_eq!(report.refused, [""; 0], "{}", self.context);
            let side = if at_home { &mut self.home } else { &mut self.offsite };
            side.backups.retain(|id, _| !planned.contains(id));
            side.recover();
            let names = side.store.objects.list("").unwrap().iter().map(|object| object.name.to_string()).collect();
            assert_no_litter(&side.repo, &names, &self.context);
            return Default::default();
        }
        let doubt = InDoubt { removed: planned, ..InDoubt::default() };
        if at_home { [doubt, InDoubt::default()] } else { [InDoubt::default(), doubt] }
    }

    fn export(&mut self, fault_at_home: bool, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        let Some(id) = self.home.chosen(&mut self.choices) else { return Default::default() };
        let options = export::Options { backup: id.to_string(), ..export::Options::default() };
        if fault_at_home { &self.home } else { &self.offsite }.arm(fault);
        let done = export::to_repository(&self.home.repo, &self.offsite.repo, &options, &Silent);
        let files = Arc::clone(&self.home.backups[&id]);
        if self.check(done).is_some() {
            self.offsite.backups.insert(id, files);
            return Default::default();
        }
        [InDoubt::default(), InDoubt { added: Some((Some(id), files)), ..InDoubt::default() }]
    }

    fn pin(&mut self, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        let Some(id) = self.home.chosen(&mut self.choices) else { return Default::default() };
        let pinned = self.choices.below(3) > 0;
        self.home.arm(fault);
        let done = pin::set(&self.home.repo, &ClusterName::default(), &id.to_string(), pinned);
        if self.check(done).is_some() {
            self.home.recover();
            let pins = self.home.repo.pins(&ClusterName::default()).unwrap();
            assert_eq!(pins.contains(&id), pinned, "{}", self.context);
        }
        Default::default()
    }

    fn read(&mut self, at_home: bool, fault: Option<(u32, Fault)>) -> [InDoubt; 2] {
        let side = if at_home { &self.home } else { &self.offsite };
        let Some(id) = side.chosen(&mut self.choices) else { return Default::default() };
        side.arm(fault);
        let cluster = ClusterName::default();
        if self.choices.below(2) == 0 {
            let done = verify::run(&side.repo, &cluster, "all", &verify::Options::default(), &Silent);
            if let Some(report) = self.check(done) {
                assert_eq!(report.damage, [], "{}", self.context);
            }
            return Default::default();
        }
        let target = self.scratch.path().join("restored");
        let options =
            restore::Options { target: target.clone(), tablespace_map: Vec::new(), archive_mode: false, jobs: None };
        let done = restore::run(&side.repo, &cluster, &id.to_string(), &options, &Silent);
        if self.check(done).is_some() {
            assert!(
                without_wal(files(&target)) == *side.backups[&id],
                "{}: {id} restores to other bytes",
                self.context
            );
        }
        // A restore that failed leaves what it has, if it came so far.
        let _ = std::fs::remove_dir_all(&target);
        Default::default()
    }
}

#[test]
fn whatever_fails_each_listed_backup_restores_to_the_bytes_of_its_moment() {
    let seeds = std::env::var("PGSTRATA_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let next = AtomicU64::new(0);
    let live = || {
        for seed in std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < seeds)) {
            let mut world = World::new(seed);
            (0..STEPS).for_each(|step| world.step(seed, step));
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(live))));
}
