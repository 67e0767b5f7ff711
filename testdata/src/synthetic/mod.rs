//! Data directories written without PostgreSQL, of any size, from a seed.
//!
//! What a [`SyntheticCluster`] writes looks to a backup like a cleanly stopped cluster: valid pages, `pg_control`,
//! a WAL segment with the shutdown checkpoint, all directories. It has no catalogs, so no server runs on it;
//! `pg_controldata`, `pg_checksums` and `pg_waldump` accept it, which is tested.
//!
//! Changes between two backups are made by its methods; after them [`SyntheticCluster::checkpoint`] moves the
//! cluster to its next stopped state. Segments may be shorter than PostgreSQL's 1 GB, so that tests cross their
//! borders with small files.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

mod control;
pub mod page;

pub use control::control_file_is_valid;
use control::{Layout, Position};
use page::{PAGE_LEN, Page, PageSeed, PageWriter};

use crate::random::Random;
use crate::{Error, Result};

/// PostgreSQL's own number of blocks in a segment file.
pub const SEGMENT_BLOCKS: u32 = 131_072;
/// The number of the first relation, as of the first one a user creates.
const FIRST_RELATION: u32 = 16_384;
/// The block count written at once.
const RUN_BLOCKS: u32 = 128;
/// A relation of so many blocks has no free space map.
///
/// PostgreSQL: `src/include/storage/freespace.h`, `HEAP_FSM_CREATION_THRESHOLD`.
const MAPLESS_BLOCKS: u32 = 4;
/// The heap blocks that one page of a visibility map is about.
const HEAP_BLOCKS_PER_MAP_PAGE: u32 = 32_672;

/// What a synthetic cluster is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// 13 to 18.
    pub major: u32,
    /// What all contents follow from.
    pub seed: u64,
    /// The cluster's identity.
    pub system_identifier: u64,
    /// Whether pages have checksums.
    pub checksums: bool,
    /// How much of the rows is random bytes, which no compressor shrinks; the rest is text.
    pub random_percent: u8,
    /// The length of a WAL segment in bytes.
    pub wal_segment_len: u32,
    /// How many blocks a segment file of a relation holds.
    pub segment_blocks: u32,
    /// If set, one in this many runs of 128 blocks is a hole in its file.
    pub hole_every: Option<u32>,
}

impl Options {
    /// A cluster of `major` from `seed`, with checksums, one third random.
    pub fn new(major: u32, seed: u64) -> Self {
        Self {
            major,
            seed,
            system_identifier: Random::new(seed).number(),
            checksums: true,
            random_percent: 33,
            wal_segment_len: 16 << 20,
            segment_blocks: SEGMENT_BLOCKS,
            hole_every: None,
        }
    }
}

/// A relation of a synthetic cluster: its main fork, a free space map and a visibility map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// The database's number, as in `base/<database>`.
    pub database: u32,
    /// The relation's number, as in its file's name.
    pub number: u32,
    /// The tablespace that it is in, if that is not the default one.
    pub tablespace: Option<u32>,
    /// The length of its main fork.
    pub blocks: u32,
}

/// A data directory without a server.
#[derive(Debug)]
pub struct SyntheticCluster {
    dir: PathBuf,
    options: Options,
    layout: Layout,
    writer: PageWriter,
    relations: Vec<Relation>,
    next_number: u32,
    /// Counts changes; part of what a page's content follows from.
    version: u64,
    /// The number of the WAL segment with the last checkpoint.
    wal_segment: u64,
    /// The timeline that it is on.
    timeline: u32,
    /// The lines of its history file.
    history: String,
}

impl SyntheticCluster {
    /// Makes a cluster with no relations in the new directory `dir`.
    ///
    /// # Errors
    ///
    /// When `dir` exists, cannot be written, or the options' major is unknown.
    pub fn create(dir: &Path, options: Options) -> Result<Self> {
        let layout = Layout::of(options.major)
            .ok_or_else(|| Error::new(format!("the layout of PostgreSQL {} is not known here", options.major)))?;
        let writer = PageWriter::new(options.checksums, options.random_percent);
        let cluster = Self {
            dir: dir.to_owned(),
            options,
            layout,
            writer,
            relations: Vec::new(),
            next_number: FIRST_RELATION,
            version: 0,
            wal_segment: 1,
            timeline: 1,
            history: String::new(),
        };
        cluster.lay_directories()?;
        cluster.lay_small_files()?;
        cluster.write_control()?;
        Ok(cluster)
    }

    fn lay_directories(&self) -> Result<()> {
        let top = [
            "",
            "base",
            "global",
            "pg_commit_ts",
            "pg_dynshmem",
            "pg_logical",
            "pg_multixact",
            "pg_notify",
            "pg_replslot",
            "pg_serial",
            "pg_snapshots",
            "pg_stat",
            "pg_stat_tmp",
            "pg_subtrans",
            "pg_tblspc",
            "pg_twophase",
            "pg_wal",
            "pg_xact",
        ];
        let below = [
            "base/1",
            "pg_logical/mappings",
            "pg_logical/snapshots",
            "pg_multixact/members",
            "pg_multixact/offsets",
            "pg_wal/archive_status",
        ];
        let summaries = (self.options.major >= 17).then_some("pg_wal/summaries");
        for name in top.into_iter().chain(below).chain(summaries) {
            let path = self.dir.join(name);
            fs::create_dir(&path).map_err(|e| Error::io("make", &path, e))?;
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(&path, private).map_err(|e| Error::io("set the mode of", &path, e))?;
        }
        Ok(())
    }

    fn lay_small_files(&self) -> Result<()> {
        let version = format!("{}\n", self.options.major);
        let map = control::relation_map(&self.layout);
        self.write_small("PG_VERSION", version.as_bytes())?;
        self.write_small("base/1/PG_VERSION", version.as_bytes())?;
        self.write_small("base/1/pg_filenode.map", &map)?;
        self.write_small("global/pg_filenode.map", &map)?;
        self.write_small("postgresql.conf", b"# synthetic\n")?;
        self.write_small("postgresql.auto.conf", b"# Do not edit this file manually!\n")?;
        self.write_small("pg_hba.conf", b"local all all trust\n")?;
        self.write_small("pg_ident.conf", b"")?;
        for slru in ["pg_xact/0000", "pg_multixact/offsets/0000", "pg_multixact/members/0000"] {
            self.write_small(slru, &[0x55; PAGE_LEN])?;
        }
        Ok(())
    }

    fn write_small(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = open_private(&self.dir.join(name))?;
        file.set_len(0)
            .and_then(|()| file.write_all_at(bytes, 0))
            .map_err(|e| Error::io("write", &self.dir.join(name), e))
    }

    fn write_control(&self) -> Result<()> {
        let lsn = control::checkpoint_lsn(&self.options, self.wal_segment);
        let at = Position { timeline: self.timeline, lsn };
        let wal = control::wal_segment(&self.options, &self.layout, at);
        self.write_small(&self.wal_name(), &wal)?;
        self.write_small("global/pg_control", &control::control_file(&self.options, &self.layout, at))
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its relations.
    pub fn relations(&self) -> &[Relation] {
        &self.relations
    }

    /// Moves the cluster to its next cleanly stopped state: a later checkpoint, in a new WAL segment.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn checkpoint(&mut self) -> Result<()> {
        let old = self.dir.join(self.wal_name());
        self.wal_segment += 1;
        self.write_control()?;
        fs::remove_file(&old).map_err(|e| Error::io("remove", &old, e))
    }

    /// Moves the cluster to its next cleanly stopped state as the one that goes on after a promotion: on a new timeline, which leaves the old one where the
    /// new checkpoint's WAL segment begins.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn promote(&mut self) -> Result<()> {
        let old = self.dir.join(self.wal_name());
        self.wal_segment += 1;
        self.history += &control::history_line(&self.options, self.timeline, self.wal_segment);
        self.timeline += 1;
        self.write_small(&format!("pg_wal/{:08X}.history", self.timeline), self.history.as_bytes())?;
        self.write_control()?;
        fs::remove_file(&old).map_err(|e| Error::io("remove", &old, e))
    }

    /// The WAL segment with the last checkpoint.
    fn wal_name(&self) -> String {
        format!("pg_wal/{}", control::wal_segment_name(&self.options, self.timeline, self.wal_segment))
    }

    /// Makes database `number`, empty.
    ///
    /// # Errors
    ///
    /// When it exists.
    pub fn add_database(&mut self, number: u32) -> Result<()> {
        let path = self.dir.join(format!("base/{number}"));
        fs::create_dir(&path).map_err(|e| Error::io("make", &path, e))?;
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(&path, private).map_err(|e| Error::io("set the mode of", &path, e))?;
        self.write_small(&format!("base/{number}/PG_VERSION"), format!("{}\n", self.options.major).as_bytes())?;
        self.write_small(&format!("base/{number}/pg_filenode.map"), &control::relation_map(&self.layout))
    }

    /// Makes a relation of `blocks` in `database` and returns its index in [`SyntheticCluster::relations`].
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn add_relation(&mut self, database: u32, blocks: u32) -> Result<usize> {
        let index = self.name_relation(database, None);
        self.append(index, blocks)?;
        Ok(index)
    }

    fn name_relation(&mut self, database: u32, tablespace: Option<u32>) -> usize {
        self.relations.push(Relation { database, number: self.next_number, tablespace, blocks: 0 });
        self.next_number += 1;
        self.relations.len() - 1
    }

    /// Makes tablespace `number` in the new directory `place`, with a directory for `database`.
    ///
    /// # Errors
    ///
    /// When it exists.
    pub fn add_tablespace(&mut self, number: u32, place: &Path, database: u32) -> Result<()> {
        let private = || fs::Permissions::from_mode(0o700);
        let version = place.join(self.version_dir());
        for path in [place, &version, &version.join(database.to_string())] {
            fs::create_dir(path)
                .and_then(|()| fs::set_permissions(path, private()))
                .map_err(|e| Error::io("make", path, e))?;
        }
        let link = self.dir.join(format!("pg_tblspc/{number}"));
        std::os::unix::fs::symlink(place, &link).map_err(|e| Error::io("make", &link, e))
    }

    /// The directory of a tablespace that is this cluster's.
    fn version_dir(&self) -> String {
        format!("PG_{}_{}", self.options.major, self.layout.catalog_version)
    }

    /// Makes many relations at once, written by all processors: of so many blocks each, one after the other in the
    /// default tablespace and in each of `tablespaces`. As in PostgreSQL, those of up to four blocks have no maps.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn add_relations(&mut self, database: u32, blocks: &[u32], tablespaces: &[u32]) -> Result<()> {
        self.version += 1;
        let first = self.relations.len();
        let places = || std::iter::once(None).chain(tablespaces.iter().copied().map(Some)).cycle();
        for (&blocks, tablespace) in blocks.iter().zip(places()) {
            let index = self.name_relation(database, tablespace);
            self.relations[index].blocks = blocks;
        }
        let new = &self.relations[first..];
        let pieces = |(at, relation): (usize, &Relation)| {
            (0..relation.blocks.max(1)).step_by(RUN_BLOCKS as usize).map(move |from| (at, from))
        };
        let runs: Vec<(usize, u32)> = new.iter().enumerate().flat_map(pieces).collect();
        by_all_processors(&runs, |&(at, from)| self.write_new(&new[at], from))
    }

    /// Writes the run of blocks at `from` of a relation that is new, and with its first one its maps.
    fn write_new(&self, relation: &Relation, from: u32) -> Result<()> {
        if relation.blocks == 0 {
            return open_private(&self.path(relation, "", 0)).map(drop);
        }
        if from == 0 && relation.blocks > MAPLESS_BLOCKS {
            self.write_maps(relation)?;
        }
        self.write_run(relation, from, from.saturating_add(RUN_BLOCKS).min(relation.blocks))
    }

    /// Rewrites these blocks of relation `index`, and its maps if it has any.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn rewrite(&mut self, index: usize, blocks: &[u32]) -> Result<()> {
        self.version += 1;
        let relation = &self.relations[index];
        by_all_processors(blocks, |&block| self.write_run(relation, block, block + 1))?;
        if relation.blocks > MAPLESS_BLOCKS { self.write_maps(relation) } else { Ok(()) }
    }

    /// Rewrites `count` blocks of relation `index`, chosen by `choice`, and returns them in ascending order.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn change_random_blocks(&mut self, index: usize, count: u32, choice: u64) -> Result<Vec<u32>> {
        self.version += 1;
        let relation = self.relations[index].clone();
        let mut random = Random::new(choice);
        let mut blocks = std::collections::BTreeSet::new();
        while blocks.len() < count.min(relation.blocks) as usize {
            blocks.insert(u32::try_from(random.below(u64::from(relation.blocks))).unwrap_or_default());
        }
        for block in &blocks {
            self.write_run(&relation, *block, *block + 1)?;
        }
        self.write_maps(&relation)?;
        Ok(blocks.into_iter().collect())
    }

    /// Adds `blocks` to the end of relation `index`.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn append(&mut self, index: usize, blocks: u32) -> Result<()> {
        self.version += 1;
        let from = self.relations[index].blocks;
        let to = from + blocks;
        self.set_len(index, to)?;
        let relation = &self.relations[index];
        let next = AtomicU32::new(from);
        let claim = |start: u32| (start < to).then(|| start.saturating_add(RUN_BLOCKS - start % RUN_BLOCKS).min(to));
        let write = || -> Result<()> {
            while let Ok(start) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim) {
                let is_hole = self.options.hole_every.is_some_and(|every| (start / RUN_BLOCKS) % every == every - 1);
                if !is_hole {
                    self.write_run(relation, start, start.saturating_add(RUN_BLOCKS - start % RUN_BLOCKS).min(to))?;
                }
            }
            Ok(())
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min((blocks / 4096) as usize + 1);
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(write)).collect();
            handles.into_iter().try_for_each(|handle| {
                handle.join().unwrap_or_else(|_| Err(Error::new("a writer of synthetic pages panicked")))
            })
        })?;
        self.write_maps(relation)
    }

    /// Adds `blocks` all-zero blocks to the end of relation `index`: an extension that no WAL record mentions.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn append_zeros(&mut self, index: usize, blocks: u32) -> Result<()> {
        self.set_len(index, self.relations[index].blocks + blocks)
    }

    /// Cuts relation `index` to `blocks`. Segments behind the end stay, empty, as PostgreSQL leaves them.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn truncate(&mut self, index: usize, blocks: u32) -> Result<()> {
        self.version += 1;
        self.set_len(index, blocks)?;
        self.write_maps(&self.relations[index])
    }

    /// Cuts relation `index` to `kept` blocks, then adds `regrown` that differ from those it had.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn truncate_and_regrow(&mut self, index: usize, kept: u32, regrown: u32) -> Result<()> {
        self.truncate(index, kept)?;
        self.append(index, regrown)
    }

    /// Removes the files of relation `index` and writes `blocks` new ones under the same number.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn drop_and_recreate(&mut self, index: usize, blocks: u32) -> Result<()> {
        self.remove_files(&self.relations[index])?;
        self.relations[index].blocks = 0;
        self.append(index, blocks)
    }

    /// Drops relation `index`; later indexes move down by one.
    ///
    /// # Errors
    ///
    /// When a file cannot be removed.
    pub fn drop_relation(&mut self, index: usize) -> Result<()> {
        self.version += 1;
        self.remove_files(&self.relations[index])?;
        self.relations.remove(index);
        Ok(())
    }

    fn remove_files(&self, relation: &Relation) -> Result<()> {
        for fork in ["", "_fsm", "_vm"] {
            for segment in 0.. {
                match fs::remove_file(self.path(relation, fork, segment)) {
                    Ok(()) => (),
                    Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => break,
                    Err(error) => return Err(Error::io("remove", &self.path(relation, fork, segment), error)),
                }
            }
        }
        Ok(())
    }

    fn path(&self, relation: &Relation, fork: &str, segment: u32) -> PathBuf {
        let suffix = if segment == 0 { String::new() } else { format!(".{segment}") };
        let Relation { database, number, tablespace, .. } = relation;
        self.dir.join(match tablespace {
            None => format!("base/{database}/{number}{fork}{suffix}"),
            Some(tablespace) => {
                format!("pg_tblspc/{tablespace}/{}/{database}/{number}{fork}{suffix}", self.version_dir())
            }
        })
    }

    /// Makes the main fork of relation `index` exactly `blocks` long; what is new reads as zeros.
    fn set_len(&mut self, index: usize, blocks: u32) -> Result<()> {
        let relation = &self.relations[index];
        let per_segment = self.options.segment_blocks;
        let (old, new) = (relation.blocks / per_segment, blocks / per_segment);
        for segment in 0..=old.max(new) {
            let path = self.path(relation, "", segment);
            let begins_at = segment * per_segment;
            let len = u64::from(blocks.saturating_sub(begins_at).min(per_segment)) * PAGE_LEN as u64;
            if len > 0 || segment == 0 || path.exists() {
                open_private(&path)?.set_len(len).map_err(|e| Error::io("set the length of", &path, e))?;
            }
        }
        self.relations[index].blocks = blocks;
        Ok(())
    }

    /// Writes blocks `from..to` of the main fork.
    fn write_run(&self, relation: &Relation, from: u32, to: u32) -> Result<()> {
        let mut pages = vec![[0; PAGE_LEN]; (to - from) as usize];
        for (block, page) in (from..to).zip(&mut pages) {
            self.writer.heap_page(page, self.page_seed(relation, block), self.lsn());
        }
        let mut block = from;
        while block < to {
            let (segment, within) = (block / self.options.segment_blocks, block % self.options.segment_blocks);
            let ends = to.min((segment + 1) * self.options.segment_blocks);
            let bytes = pages[(block - from) as usize..(ends - from) as usize].as_flattened();
            write_at(&self.path(relation, "", segment), bytes, within)?;
            block = ends;
        }
        Ok(())
    }

    /// Writes the free space map (three levels) and the visibility map of `relation`, as of now.
    fn write_maps(&self, relation: &Relation) -> Result<()> {
        let map_pages = relation.blocks.div_ceil(HEAP_BLOCKS_PER_MAP_PAGE);
        for (fork, count) in [("_fsm", 2 + map_pages), ("_vm", map_pages)] {
            let mut pages: Vec<Page> = vec![[0; PAGE_LEN]; count as usize];
            for (block, page) in (0..).zip(&mut pages) {
                self.writer.map_page(page, self.page_seed(relation, block), self.lsn());
            }
            let path = self.path(relation, fork, 0);
            open_private(&path)?.set_len(0).map_err(|e| Error::io("empty", &path, e))?;
            write_at(&path, pages.as_flattened(), 0)?;
        }
        Ok(())
    }

    fn page_seed(&self, relation: &Relation, block: u32) -> PageSeed {
        PageSeed { seed: self.options.seed, relation: relation.number, block, version: self.version }
    }

    /// Where the change that is being made would stand in the WAL: between this checkpoint and the next.
    fn lsn(&self) -> u64 {
        let next = control::checkpoint_lsn(&self.options, self.wal_segment + 1);
        next - u64::from(self.options.wal_segment_len) / 2
    }
}

/// Does `work` on each of `items`, each on any thread.
fn by_all_processors<T: Sync>(items: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let take = || -> Result<()> {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(item)?;
        }
        Ok(())
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(items.len() / 64 + 1);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(take)).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| Err(Error::new("a writer of synthetic pages panicked")))
        })
    })
}

/// Opens `path` to write, and makes it with mode 0600 if it is not there.
fn open_private(path: &Path) -> Result<File> {
    let opened = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.map_err(|e| Error::io("write", path, e))
}

fn write_at(path: &Path, bytes: &[u8], block: u32) -> Result<()> {
    let offset = u64::from(block) * PAGE_LEN as u64;
    open_private(path)?.write_all_at(bytes, offset).map_err(|e| Error::io("write", path, e))
}
