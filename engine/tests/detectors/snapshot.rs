//! The main forks of a stopped cluster's permanent relations, and which of their blocks differ from those of another day.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use pgstrata_engine::detect::{ChangeMap, FileLength};
use pgstrata_engine::pg::{BlockNumber, ControlFile, ForkNumber, RelFileLocator, RelationFile};
use testdata::cluster::Cluster;

/// A stopped cluster.
pub struct Snapshot {
    pub control: ControlFile,
    files: BTreeMap<RelationFile, Vec<u8>>,
}

impl Snapshot {
    pub fn take(data_dir: &Path) -> Self {
        let control = ControlFile::parse(&fs::read(data_dir.join("global/pg_control")).unwrap()).unwrap();
        let version_dir = control.tablespace_version_dir();
        let mut paths = Vec::new();
        ["base", "global", "pg_tblspc"].iter().for_each(|dir| list(data_dir, Path::new(dir), &mut paths));
        let relations: Vec<_> = paths
            .iter()
            .filter_map(|path| Some((RelationFile::parse_path(path.as_bytes(), &version_dir)?, path)))
            .collect();
        let unlogged: BTreeSet<RelFileLocator> =
            relations.iter().filter(|(file, _)| file.fork == ForkNumber::Init).map(|(file, _)| file.locator).collect();
        let files = relations
            .into_iter()
            .filter(|(file, _)| file.fork == ForkNumber::Main && !unlogged.contains(&file.locator))
            .map(|(file, path)| (file, fs::read(data_dir.join(path)).unwrap()))
            .collect();
        Self { control, files }
    }

    /// Blocks that the older one has in another state or not at all.
    pub fn changes_since<'a>(&'a self, older: &'a Snapshot) -> impl Iterator<Item = (RelationFile, BlockNumber)> + 'a {
        let len = self.control.block_size.as_usize();
        self.files.iter().flat_map(move |(file, bytes)| {
            let theirs = older.files.get(file).map_or(&[][..], Vec::as_slice);
            let first = self.control.relseg_size.first_block(file.segment).unwrap();
            let differs = move |(at, page): (usize, &[u8])| theirs.get(at * len..(at + 1) * len) != Some(page);
            let blocks = bytes.chunks(len).enumerate().filter(move |(at, page)| differs((*at, page)));
            blocks.map(move |(at, _)| (*file, first.checked_add(u32::try_from(at).unwrap()).unwrap()))
        })
    }

    /// Whether `map` makes a block of this day be read, against the older one as the parent.
    pub fn is_read(&self, map: &ChangeMap, older: &Snapshot, file: RelationFile, block: BlockNumber) -> bool {
        let block = block.as_u32();
        let runs = map.runs(file, self.control.relseg_size, self.len(older, file));
        runs.into_iter().any(|run| (run.start.as_u32()..run.start.as_u32() + run.count).contains(&block))
    }

    /// The blocks of a relation that `map` makes be read.
    pub fn runs(&self, map: &ChangeMap, older: &Snapshot, locator: RelFileLocator) -> Vec<u32> {
        let files: Vec<_> = self.files.keys().filter(|file| file.locator == locator).collect();
        assert!(!files.is_empty(), "there is no {locator}");
        let runs = files.into_iter().flat_map(|file| map.runs(*file, self.control.relseg_size, self.len(older, *file)));
        runs.map(|run| run.start.as_u32()).collect()
    }

    fn len(&self, older: &Snapshot, file: RelationFile) -> FileLength {
        let blocks = |snapshot: &Snapshot| {
            let len = snapshot.files.get(&file).map_or(0, Vec::len);
            u32::try_from(len / self.control.block_size.as_usize()).unwrap()
        };
        FileLength { block_count: blocks(self), parent_block_count: blocks(older) }
    }
}

/// The files below `dir`, by paths in `root`.
fn list(root: &Path, dir: &Path, paths: &mut Vec<String>) {
    for entry in fs::read_dir(root.join(dir)).unwrap() {
        let path = dir.join(entry.unwrap().file_name());
        match fs::metadata(root.join(&path)).unwrap().is_dir() {
            true => list(root, &path, paths),
            false => paths.push(path.to_str().unwrap().to_owned()),
        }
    }
}

/// Where table `name` of the database postgres is stored.
pub fn locator_of(cluster: &Cluster, name: &str) -> RelFileLocator {
    locators(cluster, &format!("SELECT '{name}'::regclass::oid")).pop_first().unwrap()
}

/// Where the relations with the OIDs that `query` returns are stored.
pub fn locators(cluster: &Cluster, query: &str) -> BTreeSet<RelFileLocator> {
    let control = ControlFile::parse(&fs::read(cluster.data_dir().join("global/pg_control")).unwrap()).unwrap();
    let paths = format!("SELECT pg_relation_filepath(oid) FROM pg_class WHERE oid IN ({query})");
    let rows = cluster.query_strings("postgres", &paths).unwrap();
    let locator = |row: Vec<Option<String>>| {
        let path = row[0].clone().unwrap();
        RelationFile::parse_path(path.as_bytes(), &control.tablespace_version_dir()).unwrap().locator
    };
    rows.into_iter().map(locator).collect()
}
