//! Seeded histories of a repository: backups, merges, exports and expiries in every order, against a model.
//!
//! The model knows the bytes of each moment and which backups are there. After every step each listed backup is one of the model's; in the end, and
//! after each expiry, each restores to the model's bytes, and the store holds what they need and nothing else. A failure prints the seed.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupId, BackupType, ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, Store};
use pgstrata_engine::{ErrorKind, export, merge, pin, verify};
use support::{Choices, Files, change, files, restored, without_wal};
use testdata::synthetic::{Options, SyntheticCluster};

const SEEDS: u64 = 10;
const STEPS: usize = 14;

/// A repository and what should be in it.
struct Modelled {
    store: MemoryStore,
    repo: Repository,
    backups: BTreeMap<BackupId, Arc<Files>>,
    pinned: BTreeSet<BackupId>,
}

impl Modelled {
    fn new(scratch: &Path, name: &str) -> Self {
        let store = MemoryStore::new();
        let place = scratch.join(name).display().to_string();
        let repo = Repository::init_in(Arc::new(store.clone()), place).unwrap();
        Self { store, repo, backups: BTreeMap::new(), pinned: BTreeSet::new() }
    }

    fn listed(&self) -> Vec<BackupId> {
        let catalog = self.repo.catalog(&ClusterName::default()).unwrap();
        assert!(catalog.damaged().is_empty());
        catalog.backups().iter().map(|backup| backup.id).collect()
    }

    fn chosen(&self, choices: &mut Choices) -> Option<BackupId> {
        let count = u32::try_from(self.backups.len()).unwrap();
        (count > 0).then(|| *self.backups.keys().nth(choices.below(count) as usize).unwrap())
    }

    fn assert_lists_what_it_should(&self, context: &str) {
        let listed: BTreeSet<BackupId> = self.listed().into_iter().collect();
        assert_eq!(listed, self.backups.keys().copied().collect(), "{context}");
    }

    fn assert_all_restore(&self, target: &Path, context: &str) {
        for (id, expected) in &self.backups {
            let found = restored(&self.repo, &id.to_string(), target);
            assert!(found == **expected, "{context}: {id} restores to other bytes");
        }
        let damage = verify::run(&self.repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent);
        assert_eq!(damage.unwrap().damage, [], "{context}");
    }

    /// What the store holds is what the manifests need, the manifests, the pins, and the header.
    fn assert_no_litter(&self, context: &str) {
        let mut needed = BTreeSet::from(["repository", "reserve"].map(str::to_owned));
        for id in self.backups.keys() {
            let manifest = self.repo.manifest(&ClusterName::default(), *id).unwrap();
            needed.insert(manifest.object().unwrap().to_string());
            let packs = manifest.packs.iter().map(|pack| pack.name.object(&manifest.cluster).unwrap().to_string());
            needed.extend(packs);
        }
        needed.extend(self.pinned.iter().map(|id| format!("clusters/main/pins/{id}")));
        let there: BTreeSet<String> = self.store.list("").unwrap().iter().map(|o| o.name.to_string()).collect();
        assert_eq!(there, needed, "{context}");
    }
}

/// A cluster that changes, and its repositories.
struct World {
    scratch: tempfile::TempDir,
    directory: PathBuf,
    cluster: SyntheticCluster,
    choices: Choices,
    home: Modelled,
    offsite: Modelled,
    context: String,
}

impl World {
    fn new(seed: u64) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let mut choices = Choices(seed);
        let major = 13 + choices.below(6);
        let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(major, seed) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        let (home, offsite) = (Modelled::new(scratch.path(), "home"), Modelled::new(scratch.path(), "offsite"));
        Self { directory, cluster, choices, home, offsite, context: format!("seed {seed}"), scratch }
    }

    fn back_up(&mut self) {
        for _ in 0..self.choices.below(5) {
            change(&mut self.cluster, &mut self.choices);
        }
        self.cluster.checkpoint().unwrap();
        let parent = match self.choices.below(7) {
            0 => ParentChoice::Full,
            1 => ParentChoice::Differential,
            2 => {
                self.home.chosen(&mut self.choices).map_or(ParentChoice::Full, |id| ParentChoice::Named(id.to_string()))
            }
            _ => ParentChoice::Automatic,
        };
        let data_dir = Some(self.directory.clone());
        let options = backup::Options { data_dir, parent, offline: true, ..backup::Options::default() };
        let report = backup::run(&self.home.repo, &options, &Silent).unwrap();
        self.home.backups.insert(report.backup.id, Arc::new(without_wal(files(&self.directory))));
        assert_eq!(self.home.listed().last(), Some(&report.backup.id), "{}: a new backup is the latest", self.context);
    }

    fn merge(&mut self) {
        let Some(id) = self.home.chosen(&mut self.choices) else { return };
        let before = self.home.listed();
        let repack = self.choices.below(2) == 0;
        let options = merge::Options {
            backup: id.to_string(),
            repack,
            verify: self.choices.below(3) == 0,
            compression: Compression::Zstd(3),
            ..merge::Options::default()
        };
        merge::plan(&self.home.repo, &options).unwrap();
        let report = merge::run(&self.home.repo, &options, &Silent).unwrap();
        let merged = report.backup;
        assert_eq!((merged.backup_type, merged.merged_from), (BackupType::SyntheticFull, Some(id)));
        self.home.backups.insert(merged.id, Arc::clone(&self.home.backups[&id]));
        let of_moment = |other: &BackupId| Arc::ptr_eq(&self.home.backups[other], &self.home.backups[&id]);
        let was_latest = before.last().is_some_and(of_moment);
        assert_eq!(self.home.listed().last() == Some(&merged.id), was_latest, "{}", self.context);
        if repack {
            let manifest = self.home.repo.manifest(&ClusterName::default(), merged.id).unwrap();
            assert!(manifest.packs.iter().all(|pack| pack.name.run == merged.id), "{}", self.context);
        }
    }

    fn export(&mut self) {
        let Some(id) = self.home.chosen(&mut self.choices) else { return };
        let options = export::Options { backup: id.to_string(), ..export::Options::default() };
        let known = self.offsite.backups.contains_key(&id);
        export::plan(&self.home.repo, &self.offsite.repo, &options).unwrap();
        let report = export::to_repository(&self.home.repo, &self.offsite.repo, &options, &Silent).unwrap();
        assert_eq!(report.already_there, known, "{}", self.context);
        self.offsite.backups.insert(id, Arc::clone(&self.home.backups[&id]));
    }

    fn expire(&mut self) {
        let choices = &mut self.choices;
        let side = if choices.below(3) == 0 { &mut self.offsite } else { &mut self.home };
        let max_unused = [None, Some(0), Some(25)][choices.below(3) as usize];
        let named = choices.below(3) == 0;
        let selection = match side.chosen(choices) {
            None => return,
            Some(id) if named => Selection::Named(vec![id.to_string()]),
            Some(_) => {
                let last = Some(Count::Number(1 + choices.below(5)));
                Selection::Policy(Policy { last, ..Policy::default() })
            }
        };
        let options = expire::Options {
            cluster: ClusterName::default(),
            selection: selection.clone(),
            force: false,
            max_unused,
            compression: Compression::default(),
            jobs: None,
        };
        let planned = match expire::plan(&side.repo, &options) {
            Ok(planned) => planned,
            // Pinned, or the last one.
            Err(e) => {
                assert!(named && e.kind() == ErrorKind::Invalid, "{}: {e}", self.context);
                return;
            }
        };
        let newest = side.listed().last().copied();
        let report = expire::run(&side.repo, &options, &Silent).unwrap();
        assert_eq!((&report.removed, &report.kept), (&planned.removed, &planned.kept), "{}", self.context);
        assert_eq!(report.refused, Vec::<String>::new());
        for backup in &report.removed {
            side.backups.remove(&backup.id).unwrap();
            assert!(!side.pinned.contains(&backup.id), "{}: a pinned backup went", self.context);
        }
        if let Selection::Policy(_) = selection {
            assert!(newest.is_none_or(|id| side.backups.contains_key(&id)), "{}: the newest went", self.context);
        }
        side.assert_no_litter(&self.context);
        let target = self.scratch.path().join("restored");
        side.assert_all_restore(&target, &self.context);
        if max_unused == Some(0) && report.packs_repacked > 0 {
            let again = expire::Options { selection: Selection::Nothing, ..options };
            let again = expire::plan(&side.repo, &again).unwrap();
            assert!(again.bytes_unused * 20 <= again.bytes_kept, "{}: {again:?}", self.context);
        }
    }

    fn pin(&mut self) {
        let Some(id) = self.home.chosen(&mut self.choices) else { return };
        let pinned = self.choices.below(3) > 0;
        let found = pin::set(&self.home.repo, &ClusterName::default(), &id.to_string(), pinned).unwrap();
        assert_eq!(found.pinned, pinned);
        if pinned {
            self.home.pinned.insert(id)
        } else {
            self.home.pinned.remove(&id)
        };
    }

    fn step(&mut self) {
        match self.choices.below(10) {
            0..4 => self.back_up(),
            4..6 => self.merge(),
            6..8 => self.expire(),
            8 => self.export(),
            _ => self.pin(),
        }
        self.home.assert_lists_what_it_should(&self.context);
        self.offsite.assert_lists_what_it_should(&self.context);
    }
}

#[test]
fn whatever_is_done_to_a_repository_each_listed_backup_restores_and_nothing_else_is_there() {
    let seeds = std::env::var("PGSTRATA_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    for seed in 0..seeds {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        let target = world.scratch.path().join("restored");
        world.home.assert_all_restore(&target, &world.context);
        world.offsite.assert_all_restore(&target, &world.context);
    }
}
