//! Damage to a small repository: `verify` names the object, a hurt backup does not restore, the others do.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::expire::{self, Selection};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, ObjectName, Store};
use pgstrata_engine::{Error, ErrorKind, export, merge, pin, restore, verify};
use testdata::synthetic::{Options, SyntheticCluster};

struct Lab {
    scratch: tempfile::TempDir,
    directory: PathBuf,
    store: MemoryStore,
    repo: Repository,
    backups: Vec<String>,
}

fn repository(store: &MemoryStore, scratch: &Path) -> Repository {
    Repository::open_in(Arc::new(store.clone()), scratch.join("nowhere").display().to_string()).unwrap()
}

impl Lab {
    /// Three backups, the second of which changes blocks of the first, the third of which is on its own.
    fn new() -> Self {
        Self::with_backups([ParentChoice::Automatic, ParentChoice::Automatic, ParentChoice::Full])
    }

    fn with_backups(parents: impl IntoIterator<Item = ParentChoice>) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { wal_segment_len: 1 << 20, ..Options::new(16, 7) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 6).unwrap();
        let store = MemoryStore::new();
        let place = scratch.path().join("nowhere").display().to_string();
        let repo = Repository::init_in(Arc::new(store.clone()), place).unwrap();
        let mut lab = Self { scratch, directory, store, repo, backups: Vec::new() };
        for parent in parents {
            cluster.change_random_blocks(0, 2, lab.backups.len() as u64).unwrap();
            cluster.checkpoint().unwrap();
            let id = lab.back_up(&lab.repo, parent).unwrap().backup.id.to_string();
            lab.backups.push(id);
        }
        lab
    }

    /// What an old repository has in it: a backup whose manifest was written anew since an expiry moved its chunks, an incremental one upon it that
    /// is pinned, a merged one, and one that was merged into packs of its own.
    fn of_all_kinds() -> Self {
        let mut lab = Self::with_backups(vec![ParentChoice::Automatic; 4]);
        let [first, second, kept, last] = &lab.backups[..] else { panic!("four backups") };
        expire::run(&lab.repo, &expiry(Selection::Named(vec![first.clone(), second.clone()])), &Silent).unwrap();
        pin::set(&lab.repo, &ClusterName::default(), last, true).unwrap();
        let merge = |backup: &String, repack| lab.merge(&lab.repo, backup, repack).unwrap().backup.id.to_string();
        lab.backups = vec![kept.clone(), last.clone(), merge(last, false), merge(kept, true)];
        let editions = lab.store.list("clusters/main/manifests/").unwrap();
        assert!(editions.iter().any(|object| object.name.as_str().ends_with(".1")), "nothing was written anew");
        lab
    }

    fn back_up(&self, repo: &Repository, parent: ParentChoice) -> Result<backup::Report, Error> {
        let options = backup::Options {
            data_dir: Some(self.directory.clone()),
            parent,
            compression: Compression::Zstd(9),
            offline: true,
            ..backup::Options::default()
        };
        backup::run(repo, &options, &Silent)
    }

    fn merge(&self, repo: &Repository, backup: &str, repack: bool) -> Result<merge::Report, Error> {
        let options = merge::Options { backup: backup.to_owned(), repack, ..merge::Options::default() };
        merge::run(repo, &options, &Silent)
    }

    /// The same repository, to do something to it.
    fn copy(&self) -> (MemoryStore, Repository) {
        let copy = MemoryStore::new();
        self.objects().into_iter().for_each(|(name, bytes)| copy.tamper(&name, Some(bytes)));
        let repo = repository(&copy, self.scratch.path());
        (copy, repo)
    }

    /// Which backups are hurt.
    fn hurt(repo: &Repository) -> BTreeSet<String> {
        let report = verify::run(repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent).unwrap();
        report.damage.into_iter().flat_map(|damage| damage.backups).collect()
    }

    /// Damages one object after the other: bytes flipped, its end cut off, gone.
    fn for_each_damage(&self, count: usize, mut each: impl FnMut(&str)) {
        for (name, bytes) in self.objects() {
            if name.as_str() == "repository" || name.as_str().contains("/pins/") {
                continue;
            }
            let flipped = places(bytes.len(), count).map(|at| {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x80;
                (format!("byte {at} of {name}"), Some(damaged))
            });
            let cut = places(bytes.len(), count.div_ceil(3))
                .map(|len| (format!("{name} cut at {len}"), Some(bytes[..len].to_vec())));
            // Without its manifest a backup is not damaged, but not there.
            let gone = (!is_manifest(&name)).then(|| (format!("without {name}"), None));
            for (what, damaged) in flipped.chain(cut).chain(gone) {
                self.store.tamper(&name, damaged);
                each(&what);
            }
            self.store.tamper(&name, Some(bytes));
        }
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
        self.restores_from(&self.repo, backup, backup)
    }

    /// Whether a backup restores to the bytes of another.
    fn restores_from(&self, repo: &Repository, backup: &str, sound: &str) -> bool {
        let target = self.scratch.path().join("restored");
        let options = restore::Options {
            target: target.clone(),
            tablespace_map: Vec::new(),
            archive_mode: false,
            jobs: std::num::NonZeroUsize::new(1),
        };
        let restored = restore::run(repo, &ClusterName::default(), backup, &options, &Silent).is_ok();
        let startable = target.join("global/pg_control").exists();
        assert_eq!(restored, startable);
        if restored {
            assert!(
                same_data(&target, &self.scratch.path().join("sound").join(sound)),
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

fn expiry(selection: Selection) -> expire::Options {
    expire::Options {
        cluster: ClusterName::default(),
        selection,
        force: true,
        max_unused: Some(0),
        compression: Compression::default(),
        jobs: std::num::NonZeroUsize::new(1),
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

#[test]
fn every_truncation_is_found_and_named() {
    let lab = Lab::new();
    for (name, bytes) in lab.objects().into_iter().filter(|(name, _)| name.as_str() != "repository") {
        for len in places(bytes.len(), 60) {
            lab.store.tamper(&name, Some(bytes[..len].to_vec()));
            let report = lab.verify(true).unwrap();
            let named = report.damage.iter().find(|damage| damage.object == name.as_str());
            assert!(named.is_some_and(|damage| !damage.backups.is_empty()), "{name} cut at {len}");
        }
        lab.store.tamper(&name, Some(bytes));
    }
}

#[test]
fn what_verify_passes_restores_and_the_rest_does_not_in_a_repository_of_all_kinds() {
    let lab = Lab::of_all_kinds();
    assert_eq!(lab.verify(false).unwrap().damage, []);
    lab.keep_sound_copies();
    lab.for_each_damage(4, |what| {
        let hurt = Lab::hurt(&lab.repo);
        assert!(!hurt.is_empty(), "{what}");
        for backup in &lab.backups {
            assert!(lab.restores(backup) || hurt.contains(backup), "{what} hurts {backup}");
        }
    });
}

#[test]
fn what_is_made_of_damage_fails_or_is_as_damaged_as_its_source() {
    let lab = Lab::of_all_kinds();
    lab.keep_sound_copies();
    let source = &lab.backups[1];
    lab.for_each_damage(3, |what| {
        let was_hurt = Lab::hurt(&lab.repo).contains(source);
        for repack in [false, true] {
            let (_, repo) = lab.copy();
            let merged = lab.merge(&repo, source, repack).map(|report| report.backup.id.to_string());
            if let Ok(merged) = merged {
                // What is moved was proved; what merely refers to damage is as damaged as its source.
                assert!(!repack || lab.restores_from(&repo, &merged, source), "{what}: damage was moved");
                let is_hurt = Lab::hurt(&repo).contains(&merged);
                assert!(!is_hurt || was_hurt, "{what}: a merge did damage");
                assert!(
                    is_hurt || lab.restores_from(&repo, &merged, source),
                    "{what}: verify passes what does not restore"
                );
            }
        }
        let offsite = Repository::init_in(Arc::new(MemoryStore::new()), "offsite".to_owned()).unwrap();
        let options = export::Options { backup: source.clone(), ..export::Options::default() };
        match export::to_repository(&lab.repo, &offsite, &options, &Silent) {
            Ok(_) => assert!(lab.restores_from(&offsite, source, source), "{what} was exported"),
            Err(error) => {
                assert!(was_hurt, "{what}: {error}");
                assert_eq!(offsite.catalog(&ClusterName::default()).unwrap().backups(), [], "{what}");
            }
        }
    });
}

#[test]
fn a_backup_never_builds_upon_damage_in_silence() {
    let lab = Lab::with_backups([ParentChoice::Automatic, ParentChoice::Automatic]);
    lab.keep_sound_copies();
    let now = &lab.backups[1];
    lab.for_each_damage(6, |what| {
        let (_, repo) = lab.copy();
        let Ok(report) = lab.back_up(&repo, ParentChoice::Automatic) else { return };
        let made = report.backup.id.to_string();
        let is_whole = lab.restores_from(&repo, &made, now);
        let inherits = report.backup.parent.is_some();
        assert!(is_whole || inherits, "{what}: a full backup does not restore");
        assert!(is_whole || Lab::hurt(&repo).contains(&made), "{what}: verify passes what does not restore");
        if !inherits {
            assert!(!report.repository_damage.is_empty(), "{what}: nobody was told");
        }
    });
}

#[test]
fn an_expiry_over_damage_hurts_nothing_that_was_whole() {
    let lab = Lab::of_all_kinds();
    lab.keep_sound_copies();
    lab.for_each_damage(2, |what| {
        let before = Lab::hurt(&lab.repo);
        for selection in [Selection::Nothing, Selection::Named(vec![lab.backups[0].clone()])] {
            let (_, repo) = lab.copy();
            match expire::run(&repo, &expiry(selection), &Silent) {
                Ok(_) => {}
                Err(error) => assert_ne!(error.kind(), ErrorKind::Bug, "{what}: {error}"),
            }
            let left = repo.catalog(&ClusterName::default()).unwrap();
            for backup in left.backups().iter().map(|backup| backup.id.to_string()).filter(|id| !before.contains(id)) {
                assert!(!Lab::hurt(&repo).contains(&backup), "{what}: {backup} is hurt now");
                assert!(lab.restores_from(&repo, &backup, &backup), "{what}: {backup} does not restore now");
            }
        }
    });
}
