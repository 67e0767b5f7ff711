//! Seeded histories of a synthetic cluster: whatever happened to it, every backup restores the bytes of its moment.
//!
//! The model is a copy of the files in memory, taken at each backup. A failure prints the seed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupSummary, BackupType, ClusterName, Repository};
use pgstrata_engine::{restore, verify};
use testdata::synthetic::{Options, SyntheticCluster};

const SEEDS: u64 = 12;
const BACKUPS: usize = 8;
/// What a restore writes for itself.
const ADDED: [&str; 6] =
    ["backup_manifest", "recovery.signal", "postgresql.auto.conf", "postgresql.conf", "pg_hba.conf", "pg_ident.conf"];

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A small generator of numbers, so that a seed tells the whole history.
struct Choices(u64);

impl Choices {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(bound)) as u32
    }
}

fn files(root: &Path) -> Files {
    fn walk(root: &Path, directory: &Path, found: &mut Files) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    let mut found = Files::new();
    walk(root, root, &mut found);
    found.retain(|path, _| !ADDED.contains(&path.to_str().unwrap()));
    found
}

fn change(cluster: &mut SyntheticCluster, choices: &mut Choices) {
    let count = cluster.relations().len() as u32;
    if count == 0 || choices.below(8) == 0 {
        cluster.add_relation(5, choices.below(90)).unwrap();
        return;
    }
    let index = choices.below(count) as usize;
    let blocks = cluster.relations()[index].blocks;
    match choices.below(8) {
        0 | 1 if blocks > 0 => {
            let count = 1 + choices.below(blocks);
            cluster.change_random_blocks(index, count, choices.0).map(drop).unwrap();
        }
        2 => cluster.append(index, 1 + choices.below(40)).unwrap(),
        3 => cluster.append_zeros(index, 1 + choices.below(40)).unwrap(),
        4 => cluster.truncate(index, choices.below(blocks + 1)).unwrap(),
        5 => {
            let kept = choices.below(blocks + 1);
            cluster.truncate(index, kept).unwrap();
            cluster.append_zeros(index, 1 + choices.below(30)).unwrap();
        }
        6 => cluster.drop_and_recreate(index, choices.below(60)).unwrap(),
        7 if count > 2 => cluster.drop_relation(index).unwrap(),
        _ => cluster.truncate_and_regrow(index, choices.below(blocks + 1), choices.below(40)).unwrap(),
    }
}

fn options(directory: &Path, choices: &mut Choices, earlier: &[(BackupSummary, Files)]) -> backup::Options {
    let parent = match choices.below(6) {
        0 => ParentChoice::Full,
        1 => ParentChoice::Differential,
        2 if !earlier.is_empty() => {
            let index = choices.below(earlier.len() as u32) as usize;
            ParentChoice::Named(earlier[index].0.id.to_string())
        }
        _ => ParentChoice::Automatic,
    };
    let compression = if choices.below(4) == 0 { Compression::None } else { Compression::Zstd(1) };
    let data_dir = Some(directory.to_owned());
    backup::Options { data_dir, parent, compression, offline: true, ..backup::Options::default() }
}

fn assert_restores(repo: &Repository, backup: &BackupSummary, expected: &Files, target: &Path, seed: u64) {
    let options =
        restore::Options { target: target.to_owned(), tablespace_map: Vec::new(), archive_mode: false, jobs: None };
    restore::run(repo, &ClusterName::default(), &backup.id.to_string(), &options, &Silent).unwrap();
    let restored = files(target);
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    let wal = |path: &PathBuf| path.starts_with("pg_wal");
    let expected: Files = expected.iter().filter(|(path, _)| !wal(path)).map(|(p, b)| (p.clone(), b.clone())).collect();
    let restored: Files = restored.into_iter().filter(|(path, _)| !wal(path)).collect();
    assert_eq!(names(&restored), names(&expected), "seed {seed}");
    for (path, bytes) in &expected {
        assert!(restored[path] == *bytes, "seed {seed}, backup {}: {} differs", backup.id, path.display());
    }
    fs::remove_dir_all(target).unwrap();
}

fn run(seed: u64) {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("cluster");
    let mut choices = Choices(seed);
    let major = 13 + choices.below(6);
    let shape = Options { segment_blocks: 16, wal_segment_len: 1 << 20, ..Options::new(major, seed) };
    let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
    cluster.add_database(5).unwrap();
    let repo = Repository::init(&scratch.path().join("repository")).unwrap();
    let mut history: Vec<(BackupSummary, Files)> = Vec::new();
    for _ in 0..BACKUPS {
        for _ in 0..choices.below(5) {
            change(&mut cluster, &mut choices);
        }
        cluster.checkpoint().unwrap();
        let report = backup::run(&repo, &options(&directory, &mut choices, &history), &Silent).unwrap();
        assert_eq!(report.backup.corrupt_pages, [], "seed {seed}");
        history.push((report.backup, files(&directory)));
    }
    let quick = verify::Options::default();
    let verified = verify::run(&repo, &ClusterName::default(), "all", &quick, &Silent).unwrap();
    assert_eq!(verified.damage, [], "seed {seed}");
    for (backup, expected) in &history {
        assert_restores(&repo, backup, expected, &scratch.path().join("restored"), seed);
    }
}

#[test]
fn every_backup_of_any_history_restores_the_bytes_of_its_moment() {
    for seed in 0..SEEDS {
        run(seed);
    }
}

#[test]
fn nothing_changed_stores_next_to_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("cluster");
    let mut cluster = SyntheticCluster::create(&directory, Options::new(18, 1)).unwrap();
    cluster.add_database(5).unwrap();
    for _ in 0..300 {
        cluster.add_relation(5, 3).unwrap();
    }
    cluster.checkpoint().unwrap();
    let repo = Repository::init(&scratch.path().join("repository")).unwrap();
    let options = backup::Options { data_dir: Some(directory), offline: true, ..backup::Options::default() };
    let full = backup::run(&repo, &options, &Silent).unwrap().backup;
    let next = backup::run(&repo, &options, &Silent).unwrap().backup;
    assert_eq!((full.backup_type, next.backup_type), (BackupType::Full, BackupType::Incremental));
    assert_eq!((next.blocks_changed, next.parent), (0, Some(full.id)));
    assert!(next.stored_bytes < 20_000, "{} bytes", next.stored_bytes);
}
