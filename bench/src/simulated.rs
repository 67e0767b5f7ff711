//! Backups of a cluster that is not there: all of their metadata, by the engine's own means, and of their data the lengths only.
//!
//! What is here is what `backup` does with metadata, in its order, with a generator where it reads pages and without the packs of chunks.
//!
//! ```text
//! full:         for each file, on any worker: a layer of chunks of 32 blocks, each somewhere in the data packs; then the table
//! incremental:  for each file: the parent's fingerprints, flattened; a layer of scattered blocks upon its stack; then the table
//! restore:      the plan; then every block map flattened
//! ```
//!
//! The cluster is as many full segments of 1 GiB as it takes, and small files for the rest. A chunk is stored in 60 to 140 KB;
//! a data pack is a file of the right length that has no contents, which file systems keep for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::chunk::{ChunkId, Codec, Fingerprint};
use engine::pg::{Lsn, TimelineId};
use engine::repo::{
    BackupId, BackupType, ChunkRef, ClusterName, DataPack, Depth, Extent, FORMAT_VERSION, FileEntry, FileKind, Layer,
    LayerBuilder, Lease, LeaseRequest, Manifest, Operation, PART_BLOCKS, PackInfo, PackKind, PackName, Packer, PartMap,
    Repository, Stack, TableWriter, read_page, write_layer,
};
use engine::{Error, ErrorKind, Result, restore};
use jiff::Timestamp;
use serde_json::{Value, json};
use testdata::random::Random;

use crate::{SimulateArgs, Simulated};

/// Bytes of a block.
pub const BLOCK_LEN: u64 = 8192;
/// Blocks of a chunk.
const CHUNK_BLOCKS: u32 = 32;
/// Stored bytes of a chunk's blocks, each: at least, and up to so many more.
const STORED_LEN: u64 = 1900;
const STORED_LEN_SPREAD: u64 = 2500;
/// Blocks of a small file at most.
const SMALL_BLOCKS: u64 = 4096;
/// Segments of a relation.
const SEGMENTS: u64 = 32;
/// Bytes after which a data pack is full, of its frame, and of each record in its table.
const PACK_LEN: u64 = 128 << 20;
const PACK_HEADER_LEN: u64 = 16;
const PACK_FOOTER_LEN: u64 = 40;
const TABLE_ENTRY_LEN: u64 = 20;
/// Pieces of a window of a restore (`engine/src/extract/chunks.rs`).
const WINDOW_PIECES: u64 = 1 << 20;

/// Does one step and returns what there is to say about it.
///
/// # Errors
/// What the engine says.
pub fn run(args: &SimulateArgs) -> testdata::Result<Value> {
    let jobs = args.jobs as usize;
    let done = match &args.what {
        Simulated::Full { blocks, files } => full(&args.repo, jobs, *blocks, u64::from(*files)),
        Simulated::Incremental { one_in } => incremental(&args.repo, jobs, u64::from(*one_in)),
        Simulated::Restore { backup } => plan_restore(&args.repo, jobs, backup),
    };
    done.map_err(|e| testdata::Error::new(e.to_string()))
}

fn full(path: &Path, jobs: usize, blocks: u64, files: u64) -> Result<Value> {
    let repo = Repository::init(path)?;
    let run = Run::begin(&repo, None)?;
    let entries = files_of(blocks, files);
    let entries = in_parallel(jobs, &entries, |seed, entry| {
        let map = run.new_part(seed as u64, (entry.len / BLOCK_LEN) as u32)?;
        Ok(FileEntry { parts: vec![map], ..entry.clone() })
    })?;
    run.commit(entries, 0)
}

fn incremental(path: &Path, jobs: usize, one_in: u64) -> Result<Value> {
    let repo = Repository::open(path)?;
    let parent = repo.catalog(&ClusterName::default())?.select("latest")?;
    let run = Run::begin(&repo, Some(repo.manifest(&parent.cluster, parent.id)?))?;
    let (entries, table_len) = entries_of(&repo, run.parent()?)?;
    let read = AtomicU64::new(table_len);
    let seed = run.parent()?.sequence << 32;
    let entries = in_parallel(jobs, &entries, |index, entry| {
        let mut entry = entry.clone();
        for part in &mut entry.parts {
            let places = part.layers.iter().map(|layer| layer.locations_len + layer.fingerprints_len);
            read.fetch_add(places.map(u64::from).sum(), Ordering::Relaxed);
            *part = run.changed_part(seed + index as u64, one_in, part)?;
        }
        Ok(entry)
    })?;
    run.commit(entries, read.into_inner())
}

/// What a restore does before it reads a chunk: the plan, and one pass over all block maps.
fn plan_restore(path: &Path, jobs: usize, backup: &str) -> Result<Value> {
    let repo = Repository::open(path)?;
    let cluster = ClusterName::default();
    let options = restore::Options {
        target: path.with_extension("nowhere"),
        tablespace_map: Vec::new(),
        archive_mode: false,
        jobs: None,
    };
    // The last thing that the plan asks is whether there is room.
    match restore::plan(&repo, &cluster, backup, &options) {
        Err(e) if e.kind() != ErrorKind::Unavailable => return Err(e),
        _ => {}
    }
    let manifest = repo.manifest(&cluster, repo.catalog(&cluster)?.select(backup)?.id)?;
    let (entries, table_len) = entries_of(&repo, &manifest)?;
    let read = AtomicU64::new(2 * table_len);
    let counts = in_parallel(jobs, &entries, |_, entry| {
        let mut pieces: BTreeMap<DataPack, u64> = BTreeMap::new();
        for part in &entry.parts {
            read.fetch_add(part.layers.iter().map(|layer| u64::from(layer.locations_len)).sum(), Ordering::Relaxed);
            let locations = repo.flatten(&manifest, part, Depth::Locations)?.locations;
            for chunk in locations.extents.iter().filter_map(Extent::chunk) {
                *pieces.entry(locations.packs[locations.chunks[chunk].pack as usize]).or_default() += 1;
            }
        }
        Ok(pieces)
    })?;
    let mut packs: BTreeMap<DataPack, u64> = BTreeMap::new();
    for (pack, count) in counts.into_iter().flatten() {
        *packs.entry(pack).or_default() += count;
    }
    let pieces: u64 = packs.values().sum();
    let read = read.into_inner();
    Ok(json!({ "bytes_read": read, "packs": packs.len(), "pieces": pieces, "windows": pieces.div_ceil(WINDOW_PIECES) }))
}

/// The relation files of a backup's file table, and the bytes of its pages.
fn entries_of(repo: &Repository, manifest: &Manifest) -> Result<(Vec<FileEntry>, u64)> {
    let mut entries = Vec::new();
    for page in &manifest.pages {
        let page = read_page(&**repo.store(), &manifest.cluster, page)?;
        entries.extend(page.entries.into_iter().filter(|entry| entry.kind == FileKind::File && entry.len > 0));
    }
    Ok((entries, manifest.pages.iter().map(|page| u64::from(page.len)).sum()))
}

/// The files of a cluster of so many blocks, ascending by path, without their parts.
fn files_of(blocks: u64, files: u64) -> Vec<FileEntry> {
    let segments = blocks / u64::from(PART_BLOCKS);
    let mut random = Random::new(blocks);
    let segment = |number: u64| match (number / SEGMENTS, number % SEGMENTS) {
        (relation, 0) => (format!("base/16384/{}", 16_400 + relation), u64::from(PART_BLOCKS)),
        (relation, segment) => (format!("base/16384/{}.{segment}", 16_400 + relation), u64::from(PART_BLOCKS)),
    };
    let mut all: Vec<(String, u64)> = (0..segments).map(segment).collect();
    // Of each magnitude as many.
    let small = |number| (format!("base/16385/{number}"), SMALL_BLOCKS >> random.below(12));
    all.extend((0..files.saturating_sub(segments)).map(small));
    all.sort_unstable();
    all.into_iter().map(|(path, blocks)| entry(path, FileKind::File, blocks * BLOCK_LEN)).collect()
}

fn entry(path: impl Into<Vec<u8>>, kind: FileKind, len: u64) -> FileEntry {
    FileEntry { path: path.into(), kind, mode: 0o600, uid: 26, gid: 26, len, parts: Vec::new() }
}

/// The entries with what a restore demands besides relation files: their directories, and a `pg_control`.
fn with_surroundings(mut entries: Vec<FileEntry>) -> Vec<FileEntry> {
    let directories = ["base", "base/16384", "base/16385", "global"];
    entries.extend(directories.map(|path| entry(path, FileKind::Directory, 0)));
    entries.push(entry("global/pg_control", FileKind::File, 0));
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    entries
}

/// Does something with each of `items`, in about their order, and returns the outcomes in their order.
fn in_parallel<T: Sync, R: Send>(
    jobs: usize,
    items: &[T],
    work: impl Fn(usize, &T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return Ok(done) };
            done.push((index, work(index, item)?));
        }
    };
    let outcomes: Vec<Result<Vec<(usize, R)>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let panicked = |_| Err(Error::bug("a worker panicked"));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(panicked)).collect()
    });
    let mut all: Vec<(usize, R)> = outcomes.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    all.sort_unstable_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, outcome)| outcome).collect())
}

/// A backup that is being made.
struct Run<'r> {
    repo: &'r Repository,
    parent: Option<Manifest>,
    id: BackupId,
    lease: Lease,
    map: Packer,
    data: DataPacks,
}

impl<'r> Run<'r> {
    fn begin(repo: &'r Repository, parent: Option<Manifest>) -> Result<Self> {
        let cluster = ClusterName::default();
        let id = BackupId::generate(Timestamp::now())?;
        let uses = parent.iter().map(|parent| parent.id).collect();
        let request = LeaseRequest { operation: Operation::Backup, runs: vec![id], uses };
        let lease = Lease::acquire(repo, &cluster, &request, &|_| {})?;
        if let Some(parent) = &parent {
            repo.unsound_pack(parent)?;
        }
        let map = Packer::new(Arc::clone(repo.store()), cluster.clone(), id, PackKind::Map);
        let data = DataPacks { root: repo.place().into(), cluster, run: id, written: Mutex::default() };
        Ok(Self { repo, parent, id, lease, map, data })
    }

    fn parent(&self) -> Result<&Manifest> {
        self.parent.as_ref().ok_or_else(|| Error::bug("there is no parent"))
    }

    /// A part of which everything is new.
    fn new_part(&self, seed: u64, block_count: u32) -> Result<PartMap> {
        let mut random = Random::new(seed);
        let starts: Vec<u32> = (0..block_count).collect();
        let layer = self.layer(&mut random, block_count, &starts)?;
        let data = layer.locations.packs.iter().map(DataPack::name).collect::<BTreeSet<_>>().into_iter().collect();
        Ok(PartMap { layers: vec![write_layer(&self.map, &layer)?], data })
    }

    /// A part of which one block of so many changed, upon what the parent says of it.
    fn changed_part(&self, seed: u64, one_in: u64, map: &PartMap) -> Result<PartMap> {
        let stack = Stack { repo: self.repo, parent: self.parent.as_ref(), map: &self.map };
        let known = stack.fingerprints(map)?;
        let mut random = Random::new(seed);
        let mut step = || 1 + random.below(2 * one_in - 1);
        let all = std::iter::successors(Some(step() - 1), |block| Some(block + step()));
        let changed: Vec<u32> = all.take_while(|block| *block < known.len() as u64).map(|block| block as u32).collect();
        if changed.is_empty() {
            return Ok(map.clone());
        }
        let layer = self.layer(&mut random, known.len() as u32, &changed)?;
        stack.add(layer, &map.layers)
    }

    /// A layer of new chunks of the given blocks.
    fn layer(&self, random: &mut Random, block_count: u32, blocks: &[u32]) -> Result<Layer> {
        let mut builder = LayerBuilder::new(block_count);
        for blocks in blocks.chunks(CHUNK_BLOCKS as usize) {
            let fingerprints: Vec<Fingerprint> = blocks.iter().map(|_| fingerprint(random)).collect();
            let stored_len = blocks.len() as u64 * (STORED_LEN + random.below(STORED_LEN_SPREAD));
            let (pack, offset) = self.data.append(stored_len, blocks.len())?;
            let chunk = ChunkRef {
                pack: 0,
                offset,
                stored_len: stored_len as u32,
                block_count: blocks.len() as u16,
                codec: Codec::Zstd,
                id: ChunkId::of(&fingerprints),
            };
            let source = builder.add_chunk(chunk, pack);
            for (first, (start, fingerprint)) in blocks.iter().zip(&fingerprints).enumerate() {
                builder.push(Extent { start: *start, count: 1, source, first: first as u16 }, &[*fingerprint]);
            }
        }
        Ok(builder.finish())
    }

    /// Writes the file table and the manifest.
    fn commit(self, entries: Vec<FileEntry>, bytes_read: u64) -> Result<Value> {
        let known = self.parent.as_ref().map_or(&[][..], |parent| &parent.pages);
        let mut table = TableWriter::new(&self.map, known);
        let (cluster_bytes, file_count) = (entries.iter().map(|entry| entry.len).sum(), entries.len() as u64);
        with_surroundings(entries).into_iter().try_for_each(|entry| table.push(entry))?;
        let (pages, needed) = table.finish()?;
        let (mut own, blocks_changed) = self.data.finish()?;
        own.extend(self.map.finish()?);
        let inherited = self.parent.iter().flat_map(|parent| &parent.packs);
        let lengths: BTreeMap<PackName, u64> = inherited.chain(&own).map(|pack| (pack.name, pack.len)).collect();
        let with_len = |name: PackName| lengths.get(&name).map(|len| PackInfo { name, len: *len });
        let packs: Option<Vec<PackInfo>> = needed.into_iter().map(with_len).collect();
        let (packs_count, pages_count) = (lengths.len(), pages.len());
        let manifest = Manifest {
            id: self.id,
            sequence: self.repo.catalog(&ClusterName::default())?.next_sequence(),
            backup_type: if self.parent.is_some() { BackupType::Incremental } else { BackupType::Full },
            parent: self.parent.as_ref().map(|parent| parent.id),
            cluster_bytes,
            file_count,
            blocks_changed,
            own_bytes: own.iter().map(|pack| pack.len).sum(),
            packs: packs.ok_or_else(|| Error::bug("a pack that nobody wrote"))?,
            pages,
            ..empty_manifest(self.repo, self.id)
        };
        let manifest_len = self.repo.commit(&manifest, &self.lease)?;
        Ok(json!({
            "id": self.id.to_string(),
            "bytes_read": bytes_read,
            "blocks_changed": blocks_changed,
            "files": file_count,
            "pages": pages_count,
            "packs": packs_count,
            "manifest_bytes": manifest_len,
        }))
    }
}

/// The data packs of a run: names and lengths.
struct DataPacks {
    root: PathBuf,
    cluster: ClusterName,
    run: BackupId,
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    /// Those that are full.
    packs: Vec<PackInfo>,
    /// Bytes of the records in the next one, and their number.
    open_len: u64,
    open_count: u64,
    /// Blocks in all of them.
    blocks: u64,
}

impl DataPacks {
    /// Makes room for a chunk, and says where.
    fn append(&self, stored_len: u64, blocks: usize) -> Result<(DataPack, u64)> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if PACK_HEADER_LEN + written.open_len >= PACK_LEN {
            self.close(&mut written)?;
        }
        let place = (DataPack { run: self.run, seq: written.packs.len() as u32 }, PACK_HEADER_LEN + written.open_len);
        written.open_len += stored_len;
        written.open_count += 1;
        written.blocks += blocks as u64;
        Ok(place)
    }

    fn close(&self, written: &mut Written) -> Result<()> {
        if written.open_count == 0 {
            return Ok(());
        }
        let name = PackName { run: self.run, seq: written.packs.len() as u32, kind: PackKind::Data };
        let path = self.root.join(name.object(&self.cluster)?.as_str());
        let len = PACK_HEADER_LEN + written.open_len + TABLE_ENTRY_LEN * written.open_count + PACK_FOOTER_LEN;
        make_hollow(&path, len).map_err(|e| Error::io("make", &path, e))?;
        written.packs.push(PackInfo { name, len });
        (written.open_len, written.open_count) = (0, 0);
        Ok(())
    }

    /// All packs, and the number of blocks in them.
    fn finish(self) -> Result<(Vec<PackInfo>, u64)> {
        let mut written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        self.close(&mut written)?;
        Ok((written.packs, written.blocks))
    }
}

/// Makes a file of a length without contents.
fn make_hollow(path: &Path, len: u64) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    File::create_new(path)?.set_len(len)
}

fn fingerprint(random: &mut Random) -> Fingerprint {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random.number().to_le_bytes());
    bytes[8..].copy_from_slice(&random.number().to_le_bytes());
    Fingerprint(bytes)
}

/// The manifest of a backup of nothing.
fn empty_manifest(repo: &Repository, id: BackupId) -> Manifest {
    let (lsn, timeline, now) = (Lsn::new(1 << 24), TimelineId::new(1), Timestamp::now());
    Manifest {
        format: FORMAT_VERSION,
        repository: repo.id().to_owned(),
        cluster: ClusterName::default(),
        id,
        sequence: 0,
        synthesis: 0,
        edition: 0,
        backup_type: BackupType::Full,
        parent: None,
        merged_from: None,
        system_identifier: "7000000000000000000".to_owned(),
        postgres_version: "18.0".to_owned(),
        postgres_major: 18,
        catalog_version: 202_506_291,
        block_size: BLOCK_LEN as u32,
        wal_segment_size: 16 << 20,
        data_checksum_version: 1,
        start_lsn: lsn,
        stop_lsn: lsn,
        start_timeline: timeline,
        timeline,
        wal: Vec::new(),
        start_time: now,
        stop_time: now,
        duration_ms: 0,
        from_standby: false,
        offline: true,
        backup_label: None,
        tablespace_map: None,
        tablespaces: Vec::new(),
        data_directory_mode: 0o700,
        data_directory_owner: (26, 26),
        config_outside: false,
        settings: Vec::new(),
        cluster_bytes: 0,
        wal_bytes: 0,
        file_count: 0,
        blocks_changed: 0,
        own_bytes: 0,
        detector: "scan".to_owned(),
        detector_reason: "it is simulated".to_owned(),
        history_mark: None,
        corrupt_pages: Vec::new(),
        note: None,
        packs: Vec::new(),
        pages: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use engine::{merge, progress::Silent, verify};

    use super::*;

    #[test]
    fn a_simulated_repository_is_whole_but_for_its_chunks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("repo");
        full(&path, 2, 2 * u64::from(PART_BLOCKS), 40).unwrap();
        incremental(&path, 2, 100).unwrap();
        incremental(&path, 2, 100).unwrap();
        let repo = Repository::open(&path).unwrap();
        let options = merge::Options { backup: "latest".to_owned(), ..merge::Options::default() };
        let merged = merge::run(&repo, &options, &Silent).unwrap();
        let quick = verify::Options { quick: true, jobs: None };
        assert!(verify::run(&repo, &ClusterName::default(), "all", &quick, &Silent).unwrap().damage.is_empty());
        let plan = plan_restore(&path, 2, &merged.backup.id.to_string()).unwrap();
        assert!(plan["pieces"].as_u64().unwrap() > 2 * 131_072 / 32);
    }

    #[test]
    fn a_cluster_has_the_files_that_it_should_have() {
        let files = files_of(70 * u64::from(PART_BLOCKS), 200);
        assert_eq!(files.len(), 200);
        assert!(files.is_sorted_by(|a, b| a.path < b.path));
        let segments = files.iter().filter(|file| file.len == u64::from(PART_BLOCKS) * BLOCK_LEN).count();
        assert_eq!(segments, 70);
    }
}
