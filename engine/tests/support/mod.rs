//! What the tests of whole histories share: a model of a cluster's files, and seeded changes to a synthetic cluster.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
use pgstrata_engine::restore;
use testdata::synthetic::SyntheticCluster;

/// What a restore writes for itself.
const ADDED: [&str; 6] =
    ["backup_manifest", "recovery.signal", "postgresql.auto.conf", "postgresql.conf", "pg_hba.conf", "pg_ident.conf"];

pub type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A small generator of numbers, so that a seed tells the whole history.
pub struct Choices(pub u64);

impl Choices {
    pub fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(bound)) as u32
    }
}

pub fn files(root: &Path) -> Files {
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

pub fn change(cluster: &mut SyntheticCluster, choices: &mut Choices) {
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

/// Files without those of `pg_wal`, of which a backup has only what it needs.
pub fn without_wal(files: Files) -> Files {
    files.into_iter().filter(|(path, _)| !path.starts_with("pg_wal")).collect()
}

/// What a backup restores to, without its WAL.
pub fn restored(repo: &Repository, backup: &str, target: &Path) -> Files {
    let options =
        restore::Options { target: target.to_owned(), tablespace_map: Vec::new(), archive_mode: false, jobs: None };
    restore::run(repo, &ClusterName::default(), backup, &options, &Silent).unwrap();
    let found = without_wal(files(target));
    fs::remove_dir_all(target).unwrap();
    found
}
