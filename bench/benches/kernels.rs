//! The inner loops one by one, with their statistics: what a change to one of them costs or gains.
//!
//! `bench kernels` says what a page of a given cluster costs, once and in a table; this compares a kernel with itself of yesterday. So
//! what goes in is always the same: pages that follow from a seed, and the block maps of one full segment of 1 GiB.
//!
//! ```text
//! page    a page is looked at:             its checksum, as shipped and as PostgreSQL defines it; its fingerprint; both, and the comparison
//! chunk   32 pages are stored and read:    zstd at levels 1 and 3; reading proves them by their fingerprints
//! map     a segment's block map:           encoded, decoded; a night's layer laid over the full one; a stack of 8 read and flattened
//! table   the file table of 20,000 files:  written to memory and read from there, with everything that a disk would get
//! manifest, wal                            of 1 TiB, 3,000 packs; 16 MiB of records of about 200 bytes
//! ```
//!
//! Only what the engine's users can call is called. Pages come from 16 MiB, window by window, so that they are in the last cache but not in
//! the first, as after a read; rates are over raw bytes. What goes wrong here: a kernel whose outcome nobody uses, which the compiler
//! leaves out: Criterion takes what a closure returns; and one that only fails, and fast: each that can is run once before.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use engine::backup;
use engine::chunk::{ChunkId, Codec, Compression, Decoder, Encoder, Fingerprint, MAX_RAW_LEN, Shape};
use engine::pg::{
    BlockNumber, Lsn, MajorVersion, SystemIdentifier, TimelineHistory, TimelineId, WalBlockSize, WalSegmentSize,
    WalSource, WalStep, WalWalker, check_page, checksum,
};
use engine::progress::Silent;
use engine::repo::{
    BackupId, ChunkRef, ClusterName, DataPack, Depth, Extent, FileEntry, FileKind, Layer, LayerBuilder, LayerPlace,
    Locations, Manifest, PART_BLOCKS, PackInfo, PackKind, PackName, Packer, PagePlace, PartMap, Place, Repository,
    TableWriter, read_page, write_layer,
};
use engine::store::MemoryStore;
use engine::{Error, Result};
use testdata::random::Random;
use testdata::synthetic::page::{self, PAGE_LEN, Page, PageSeed, PageWriter};
use testdata::synthetic::{Options, SyntheticCluster};

/// How long each is measured, and run before that.
const MEASURED: Duration = Duration::from_secs(3);
const WARM_UP: Duration = Duration::from_secs(1);
/// Samples of each: slow ones take tens of milliseconds.
const SAMPLES: usize = 30;

/// Raw bytes that pages come from.
const PAGES_LEN: usize = 16 << 20;
const CHUNK_BLOCKS: u32 = 32;
/// One block of so many changes in a night.
const ONE_IN: usize = 100;
const NIGHTS: u64 = 7;
const FILES: u32 = 20_000;
const PACKS: u32 = 3_000;
const TABLE_PAGES: u32 = 90;

const WAL_LEN: usize = 16 << 20;
const WAL_PAGE_LEN: usize = 8192;
const WAL_BEGIN: u64 = 1 << 24;
const WAL_CLUSTER: u64 = 7_000_000_000_000_000_000;

fn main() -> Result<()> {
    let config = Criterion::default().measurement_time(MEASURED).warm_up_time(WARM_UP).sample_size(SAMPLES);
    let mut criterion = config.configure_from_args();
    pages(&mut criterion.benchmark_group("page"));
    chunks(&mut criterion.benchmark_group("chunk"))?;
    maps(&mut criterion.benchmark_group("map"))?;
    tables(&mut criterion.benchmark_group("table"))?;
    manifests(&mut criterion.benchmark_group("manifest"))?;
    wal(&mut criterion.benchmark_group("wal"))?;
    criterion.final_summary();
    Ok(())
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Measures what `kernel` does to window after window.
fn over_windows<T>(group: &mut Group<'_>, name: &str, pages: &[Page], mut kernel: impl FnMut(&[Page]) -> T) {
    group.throughput(Throughput::Bytes(MAX_RAW_LEN as u64));
    let mut windows = pages.chunks_exact(MAX_RAW_LEN / PAGE_LEN).cycle();
    group.bench_function(name, |bencher| bencher.iter(|| windows.next().map(&mut kernel)));
}

fn pages(group: &mut Group<'_>) {
    let pages = heap_pages(0);
    let block = BlockNumber::new(7);
    over_windows(group, "checksum", &pages, |window| {
        window.iter().fold(0, |all, page| all ^ checksum(black_box(page), block))
    });
    over_windows(group, "checksum, the definition", &pages, |window| {
        window.iter().fold(0, |all, page| all ^ page::checksum(black_box(page), 7))
    });
    over_windows(group, "fingerprint", &pages, |window| {
        window.iter().for_each(|page| _ = black_box(Fingerprint::of(page)));
    });
    let known: Vec<Fingerprint> = pages.iter().map(|page| Fingerprint::of(page)).collect();
    let mut known = known.chunks_exact(MAX_RAW_LEN / PAGE_LEN).cycle();
    over_windows(group, "check, fingerprint and compare", &pages, |window| {
        let known = known.next().unwrap_or_default();
        let judged = |page: &Page| black_box(check_page(page, block));
        window.iter().zip(known).filter(|(page, known)| (judged(page), Fingerprint::of(&page[..]) != **known).1).count()
    });
    let (old, new) = (fingerprints(1), fingerprints(1));
    group.throughput(Throughput::Elements(u64::from(PART_BLOCKS)));
    group.bench_function("compare fingerprints", |bencher| {
        bencher.iter(|| black_box(&old).iter().zip(black_box(&new)).filter(|(old, new)| old != new).count());
    });
}

fn chunks(group: &mut Group<'_>) -> Result<()> {
    let pages = heap_pages(0);
    for level in [1, 3] {
        let mut encoder = Encoder::new(Compression::Zstd(level))?;
        let mut decoder = Decoder::new()?;
        let windows = pages.chunks_exact(MAX_RAW_LEN / PAGE_LEN);
        let stored = windows.map(|window| Stored::new(&mut encoder, window)).collect::<Result<Vec<_>>>()?;
        let name = format!("encode, zstd:{level}");
        over_windows(group, &name, &pages, |window| {
            encoder.encode(window.as_flattened()).map(|(_, stored)| stored.len())
        });
        stored.iter().try_for_each(|chunk| chunk.read(&mut decoder).map(drop))?;
        let mut chunks = stored.iter().cycle();
        group.bench_function(format!("decode and prove, zstd:{level}"), |bencher| {
            bencher.iter(|| chunks.next().map(|chunk| chunk.read(&mut decoder)));
        });
    }
    Ok(())
}

/// A chunk as a pack has it.
struct Stored {
    codec: Codec,
    bytes: Vec<u8>,
    id: ChunkId,
}

impl Stored {
    fn new(encoder: &mut Encoder, window: &[Page]) -> Result<Self> {
        let fingerprints: Vec<_> = window.iter().map(|page| Fingerprint::of(page)).collect();
        let (codec, bytes) = encoder.encode(window.as_flattened())?;
        Ok(Self { codec, bytes: bytes.to_vec(), id: ChunkId::of(&fingerprints) })
    }

    fn read(&self, decoder: &mut Decoder) -> Result<usize> {
        let shape = Shape { block_len: PAGE_LEN, block_count: MAX_RAW_LEN / PAGE_LEN };
        decoder.decode(self.codec, &self.bytes, shape, self.id).map(|(raw, _)| raw.len())
    }
}

fn maps(group: &mut Group<'_>) -> Result<()> {
    let run = run()?;
    let all: Vec<u32> = (0..PART_BLOCKS).collect();
    let full = layer(run, 0, &all);
    let night = layer(run, 1, &scattered(1));
    let encoded = full.locations.encode()?;
    Locations::decode(&encoded, PAGE_LEN, "here")?;
    group.throughput(Throughput::Elements(u64::from(PART_BLOCKS)));
    group.bench_function("encode", |bencher| bencher.iter(|| full.locations.encode()));
    group.bench_function("decode", |bencher| bencher.iter(|| Locations::decode(&encoded, PAGE_LEN, "here")));
    group.bench_function("a night's layer over a full one", |bencher| bencher.iter(|| night.over(&full)));
    let scene = Scene::new()?;
    let nights = (1..=NIGHTS).rev().map(|night| layer(run, night, &scattered(night)));
    let map = scene.write(nights.chain([full]))?;
    for (name, depth) in [("locations", Depth::Locations), ("fingerprints", Depth::Fingerprints)] {
        scene.repo.flatten(&scene.manifest, &map, depth)?;
        group.bench_function(format!("read and flatten 8 layers, {name}"), |bencher| {
            bencher.iter(|| scene.repo.flatten(&scene.manifest, &map, depth));
        });
    }
    Ok(())
}

/// A repository in memory with a small backup in it.
struct Scene {
    store: Arc<MemoryStore>,
    repo: Repository,
    manifest: Manifest,
}

impl Scene {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir().map_err(|e| Error::io("make a directory in", &std::env::temp_dir(), e))?;
        let data_dir = directory.path().join("data");
        SyntheticCluster::create(&data_dir, Options::new(18, 1)).map_err(|e| Error::bug(e.to_string()))?;
        let store = Arc::new(MemoryStore::new());
        let repo = Repository::init_in(store.clone(), "memory".to_owned())?;
        let options = backup::Options { data_dir: Some(data_dir), offline: true, ..backup::Options::default() };
        let id = backup::run(&repo, &options, &Silent)?.backup.id;
        let manifest = repo.manifest(&ClusterName::default(), id)?;
        Ok(Self { store, repo, manifest })
    }

    /// Stores layers, newest first, as the block map of one part.
    fn write(&self, layers: impl Iterator<Item = Layer>) -> Result<PartMap> {
        let run = "20261123T000000Z-00000002".parse()?;
        let packer = Packer::new(self.store.clone(), self.manifest.cluster.clone(), run, PackKind::Map);
        let (mut places, mut data) = (Vec::<LayerPlace>::new(), Vec::<PackName>::new());
        for layer in layers {
            data.extend(layer.locations.packs.iter().map(DataPack::name));
            places.push(write_layer(&packer, &layer)?);
        }
        data.sort_unstable();
        data.dedup();
        packer.finish()?;
        Ok(PartMap { layers: places, data })
    }
}

fn tables(group: &mut Group<'_>) -> Result<()> {
    let (run, cluster) = (run()?, ClusterName::default());
    let files: Vec<FileEntry> = (0..FILES).map(|number| file(run, number)).collect();
    let write = |files: Vec<FileEntry>| {
        let store = Arc::new(MemoryStore::new());
        let packer = Packer::new(store.clone(), cluster.clone(), run, PackKind::Map);
        let mut table = TableWriter::new(&packer, &[]);
        files.into_iter().try_for_each(|file| table.push(file))?;
        let (pages, _) = table.finish()?;
        packer.finish().map(|_| (store, pages))
    };
    let (store, pages) = write(files.clone())?;
    group.throughput(Throughput::Elements(FILES.into()));
    group.bench_function("write", |bencher| bencher.iter_batched(|| files.clone(), write, BatchSize::PerIteration));
    let read = || pages.iter().try_for_each(|page| read_page(&*store, &cluster, page).map(drop));
    read()?;
    group.bench_function("read", |bencher| bencher.iter(read));
    Ok(())
}

fn manifests(group: &mut Group<'_>) -> Result<()> {
    let run = run()?;
    let name = |seq| PackName { run, seq, kind: PackKind::Data };
    let packs = (0..PACKS).map(|seq| PackInfo { name: name(seq), len: (128 << 20) + u64::from(seq) }).collect();
    let mut random = Random::new(2);
    let page = |seq| PagePlace {
        place: Place { pack: PackName { run, seq, kind: PackKind::Map }, offset: u64::from(seq) << 16 },
        len: 20_000 + seq,
        id: fingerprint(&mut random).0,
        entries: 256,
    };
    let manifest = Manifest { packs, pages: (0..TABLE_PAGES).map(page).collect(), ..Scene::new()?.manifest };
    let object = manifest.object()?;
    let encoded = manifest.encode(&object)?;
    Manifest::decode(&encoded, &object)?;
    group.throughput(Throughput::Elements(PACKS.into()));
    group.bench_function("encode", |bencher| bencher.iter(|| manifest.encode(&object)));
    group.bench_function("decode", |bencher| bencher.iter(|| Manifest::decode(&encoded, &object)));
    Ok(())
}

fn wal(group: &mut Group<'_>) -> Result<()> {
    let (log, count) = log();
    let source = wal_source().ok_or_else(|| Error::bug("WAL that no server writes"))?;
    let stop = Lsn::new(WAL_BEGIN + log.len() as u64);
    let walk = || {
        let mut walker = WalWalker::new(source.clone(), Lsn::new(WAL_BEGIN), stop)?;
        let (mut found, mut pieces) = (0_u64, log.chunks(1 << 20));
        loop {
            match (walker.step()?, pieces.len()) {
                (WalStep::Record(_), _) => found += 1,
                (WalStep::NeedBytes { .. }, 1..) => walker.feed(pieces.next().unwrap_or_default()),
                _ => return Ok::<_, Error>(found),
            }
        }
    };
    if walk()? != count {
        return Err(Error::bug("the walk passes over records"));
    }
    group.throughput(Throughput::Bytes(log.len() as u64));
    group.bench_function("walk 16 MiB", |bencher| bencher.iter(walk));
    Ok(())
}

fn wal_source() -> Option<WalSource> {
    Some(WalSource {
        major: MajorVersion::new(18)?,
        system_identifier: SystemIdentifier::new(WAL_CLUSTER),
        segment_size: WalSegmentSize::DEFAULT,
        block_size: WalBlockSize::new(WAL_PAGE_LEN as u32)?,
        history: TimelineHistory::without_ancestors(TimelineId::new(1)),
    })
}

/// A segment of whole records, and their number. PostgreSQL: `src/include/access/xlogrecord.h`, `xlog_internal.h`.
fn log() -> (Vec<u8>, u64) {
    let (mut log, mut random, mut previous, mut count) = (Vec::with_capacity(WAL_LEN), Random::new(3), 0, 0);
    while log.len() + 1024 < WAL_LEN {
        if log.len().is_multiple_of(WAL_PAGE_LEN) {
            page_header(&mut log, 0);
        }
        let body: Vec<u8> = (0..100 + random.below(150)).map(|_| random.number() as u8).collect();
        let record = record(previous, &body);
        previous = WAL_BEGIN + log.len() as u64;
        for (at, byte) in record.iter().enumerate() {
            if log.len().is_multiple_of(WAL_PAGE_LEN) {
                page_header(&mut log, record.len() - at);
            }
            log.push(*byte);
        }
        log.resize(log.len().next_multiple_of(8), 0);
        count += 1;
    }
    (log, count)
}

fn record(previous: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = (24 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(777_u32.to_le_bytes());
    bytes.extend(previous.to_le_bytes());
    // An insertion into a heap.
    bytes.extend([0x00, 10, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &bytes);
    bytes.extend(crc.to_le_bytes());
    bytes.extend(body);
    bytes
}

fn page_header(log: &mut Vec<u8>, remaining_len: usize) {
    let is_first = log.is_empty();
    let flags = u16::from(remaining_len > 0) | if is_first { 2 } else { 0 };
    let address = WAL_BEGIN + log.len() as u64;
    log.extend(0xD118_u16.to_le_bytes());
    log.extend(flags.to_le_bytes());
    log.extend(1_u32.to_le_bytes());
    log.extend(address.to_le_bytes());
    log.extend((remaining_len as u32).to_le_bytes());
    log.extend([0; 4]);
    if is_first {
        log.extend(WAL_CLUSTER.to_le_bytes());
        log.extend((WAL_LEN as u32).to_le_bytes());
        log.extend((WAL_PAGE_LEN as u32).to_le_bytes());
    }
}

fn heap_pages(version: u64) -> Vec<Page> {
    let writer = PageWriter::new(true, 50);
    let mut pages = vec![[0; PAGE_LEN]; PAGES_LEN / PAGE_LEN];
    for (block, page) in (0..).zip(&mut pages) {
        writer.heap_page(page, PageSeed { seed: 1, relation: 1, block, version }, 1 << 24);
    }
    pages
}

fn run() -> Result<BackupId> {
    "20261122T160312Z-00000001".parse()
}

fn fingerprint(random: &mut Random) -> Fingerprint {
    let [low, high] = [random.number(), random.number()].map(u64::to_le_bytes);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low);
    bytes[8..].copy_from_slice(&high);
    Fingerprint(bytes)
}

fn fingerprints(seed: u64) -> Vec<Fingerprint> {
    let mut random = Random::new(seed);
    (0..PART_BLOCKS).map(|_| fingerprint(&mut random)).collect()
}

/// The blocks that change in a night, ascending.
fn scattered(seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let mut step = || 1 + random.below(2 * ONE_IN as u64 - 1);
    let blocks = std::iter::successors(Some(step()), |block| Some(block + step()));
    blocks.map_while(|block| u32::try_from(block).ok().filter(|block| *block < PART_BLOCKS)).collect()
}

/// A layer of a full segment, of chunks of 32 of `blocks`.
fn layer(run: BackupId, seed: u64, blocks: &[u32]) -> Layer {
    let mut random = Random::new(seed);
    let mut builder = LayerBuilder::new(PART_BLOCKS);
    let mut offset = 16;
    for blocks in blocks.chunks(CHUNK_BLOCKS as usize) {
        let fingerprints: Vec<Fingerprint> = blocks.iter().map(|_| fingerprint(&mut random)).collect();
        let chunk = ChunkRef {
            pack: 0,
            offset,
            stored_len: blocks.len() as u32 * (1900 + random.below(2500) as u32),
            block_count: blocks.len() as u16,
            codec: Codec::Zstd,
            id: ChunkId::of(&fingerprints),
        };
        offset += u64::from(chunk.stored_len);
        let source = builder.add_chunk(chunk, DataPack { run, seq: seed as u32 });
        for ((first, start), fingerprint) in (0..).zip(blocks).zip(&fingerprints) {
            builder.push(Extent { start: *start, count: 1, source, first }, &[*fingerprint]);
        }
    }
    builder.finish()
}

fn file(run: BackupId, number: u32) -> FileEntry {
    let name = |kind| PackName { run, seq: number % 7, kind };
    let place = LayerPlace {
        pack: name(PackKind::Map),
        offset: u64::from(number) << 8,
        locations_len: 200,
        fingerprints_len: 528,
    };
    let part = PartMap { layers: vec![place], data: vec![name(PackKind::Data)] };
    let path = format!("base/16384/{number:06}").into_bytes();
    let len = 32 * PAGE_LEN as u64;
    FileEntry { path, kind: FileKind::File, mode: 0o600, uid: 26, gid: 26, len, parts: vec![part] }
}
