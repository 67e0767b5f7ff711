//! Seeded histories of a synthetic cluster: whatever happened to it, every backup restores the bytes of its moment.
//!
//! The model is a copy of the files in memory, taken at each backup. A failure prints the seed.

mod support;

use std::path::{Path, PathBuf};

use pgstrata_engine::backup::{self, Compression, ParentChoice};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{BackupSummary, BackupType, ClusterName, Repository};
use pgstrata_engine::verify;
use support::{Choices, Files, change, files, restored, without_wal};
use testdata::synthetic::{Options, SyntheticCluster};

const SEEDS: u64 = 12;
const BACKUPS: usize = 8;

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
    let restored = restored(repo, &backup.id.to_string(), target);
    let expected = without_wal(expected.clone());
    let names = |files: &Files| files.keys().cloned().collect::<Vec<PathBuf>>();
    assert_eq!(names(&restored), names(&expected), "seed {seed}");
    for (path, bytes) in &expected {
        assert!(restored[path] == *bytes, "seed {seed}, backup {}: {} differs", backup.id, path.display());
    }
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
