//! The main forks of unlogged relations, where no recovery is going to make them.
//!
//! A base backup has only the init fork of an unlogged relation: recovery makes the main fork anew, a copy of it. The backup of a stopped
//! cluster, written out as it was, starts without recovery, and every unlogged relation would lack its file. So the copy is made here: an entry
//! of the main fork's name with the init fork's block maps.
//!
//! PostgreSQL: `src/backend/storage/file/reinit.c`, `ResetUnloggedRelationsInDbspaceDir`; `StartupXLOG` calls it only in recovery.

use crate::pg::{ForkNumber, RelationFile};
use crate::repo::{FileEntry, FileKind, Manifest};

const SUFFIX: &[u8] = b"_init";

/// Finds the init forks in a file table, read in order.
pub(super) struct Unlogged {
    tablespace_version_dir: String,
    /// First files of main forks whose names the path at hand begins with, shortest first: only they may be its own.
    mains: Vec<Vec<u8>>,
}

impl Unlogged {
    /// Before the first entry.
    pub fn new(manifest: &Manifest) -> Self {
        let tablespace_version_dir = format!("PG_{}_{}", manifest.postgres_major, manifest.catalog_version);
        Self { tablespace_version_dir, mains: Vec::new() }
    }

    /// The file of the main fork that `entry`, the next in the table, is to be copied to; `None` unless it is of an init fork and the
    /// main fork is not there.
    pub fn main_fork(&mut self, entry: &FileEntry) -> Option<FileEntry> {
        while self.mains.pop_if(|main| !entry.path.starts_with(main)).is_some() {}
        let relation = RelationFile::parse_path(&entry.path, &self.tablespace_version_dir)?;
        if entry.kind != FileKind::File {
            return None;
        }
        if relation.fork == ForkNumber::Main && relation.segment.as_u32() == 0 {
            self.mains.push(entry.path.clone());
        }
        if relation.fork != ForkNumber::Init {
            return None;
        }
        let at = entry.path.windows(SUFFIX.len()).rposition(|window| window == SUFFIX)?;
        let (stem, segment) = (&entry.path[..at], &entry.path[at + SUFFIX.len()..]);
        let is_there = self.mains.iter().any(|main| main == stem);
        (!is_there).then(|| FileEntry { path: [stem, segment].concat(), ..entry.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(paths: &[&str]) -> Vec<String> {
        let mut unlogged = Unlogged { tablespace_version_dir: "PG_15_202209061".to_owned(), mains: Vec::new() };
        let mut sorted = paths.to_vec();
        sorted.sort_unstable();
        let entry = |path: &str| FileEntry {
            path: path.as_bytes().to_vec(),
            kind: FileKind::File,
            mode: 0o600,
            uid: 0,
            gid: 0,
            len: 0,
            parts: Vec::new(),
        };
        let made = sorted.into_iter().filter_map(|path| unlogged.main_fork(&entry(path)));
        made.map(|entry| entry.display_path()).collect()
    }

    #[test]
    fn an_init_fork_becomes_the_main_fork_in_any_tablespace() {
        let paths = ["base/5/20_init", "base/5/20_init.1", "pg_tblspc/9/PG_15_202209061/5/30_init"];
        assert_eq!(made(&paths), ["base/5/20", "base/5/20.1", "pg_tblspc/9/PG_15_202209061/5/30"]);
        assert_eq!(made(&["base/x/20_init", "pg_tblspc/9/PG_14_1/5/30_init", "base/5/20_vm", "20_init"]), [""; 0]);
    }

    #[test]
    fn a_main_fork_that_is_there_is_not_made() {
        let paths = ["base/5/20", "base/5/20.1", "base/5/200", "base/5/201_init", "base/5/20_init", "base/5/2_init"];
        assert_eq!(made(&paths), ["base/5/201", "base/5/2"]);
    }
}
