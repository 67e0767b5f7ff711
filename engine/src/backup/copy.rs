//! The data path of a backup: read, check, fingerprint, compare, compress, store.
//!
//! ```text
//! for each slice of each file (feed.rs), on any of the workers:
//!     read a window; check each page; fingerprint it; compare with the parent's fingerprint of that block
//!     what differs goes into the worker's open chunk; a full chunk is compressed and gets its place in a pack
//!     when the last slice of a part is placed, the part's layer is written
//! ```
//!
//! One worker does all of that for a window while it is in its core's cache; the packs are written by threads of their own behind
//! bounded channels. A file is cut into slices of [`SLICE_BLOCKS`], so that one large file keeps all workers busy. A chunk may
//! hold blocks of several slices and files, so a slice is open until the chunk with its last block is placed. Memory is bounded by the
//! slices in work, not by the cluster: files are taken when their turn comes, and go on in their order when they are finished (order.rs); a slice without
//! blocks in the open chunk is never kept, and the parent's fingerprints only while they are read.
//!
//! What goes wrong, and what is made of it: a file that vanished was dropped, and replay knows it; a file that ends early was
//! truncated, and its length is what was read; every other error of reading ends the backup. A page with a wrong checksum is read again
//! and judged by [`super::judge`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::audit::Audit;
use super::feed::{AHEAD, FEEDERS, SLICE_BLOCKS, Slice, Slices};
use super::judge::{Judge, Verdict};
use super::order::{Order, Take};
use super::part::{self, SliceMap};
use super::rate::RateLimit;
use super::salvage::{Found, Salvage};
use crate::chunk::{ChunkId, Compression, Encoder, Fingerprint, MAX_RAW_LEN};
use crate::detect::{BlockRun, ChangeMap, FileLength};
use crate::error::{Error, Result};
use crate::os::reads_once;
use crate::pg::{BlockNumber, BlocksPerSegment, ForkNumber, RelationFile, is_zero};
use crate::progress::Progress;
use crate::repo::{ChunkRef, DataPack, Extent, FileEntry, PART_BLOCKS, Packer, PartMap, Stack};
use crate::source::DataDir;

/// Bytes read at once.
const WINDOW_LEN: usize = 256 << 10;

/// A file, when its turn comes.
pub(super) enum Work {
    /// There is nothing to copy: a directory, or what the parent has of the file.
    Done(FileEntry),
    /// To be copied.
    Copy(Item),
}

/// A file to copy.
#[derive(Debug)]
pub(super) struct Item {
    /// What the file table will say of it; `len` is the length to read at most, `parts` is empty.
    pub entry: FileEntry,
    /// Where its bytes come from.
    pub content: Content,
    /// What it is to PostgreSQL, if it is a relation file.
    pub relation: Option<RelationFile>,
    /// What the parent's file table says of it.
    pub parent: Option<FileEntry>,
}

/// What a detector says of the changes since the parent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Changes<'a> {
    /// The blocks that may have changed.
    pub map: &'a ChangeMap,
    /// Blocks of a segment's file.
    pub segment: BlocksPerSegment,
    /// Whether everything is read all the same, and what the map missed is noted.
    pub audit: Option<&'a Audit>,
}

/// Where an item's bytes come from.
#[derive(Debug)]
pub(super) enum Content {
    /// The file of the data directory at the entry's path.
    DataDirectory,
    /// The first `valid_len` bytes of a file in the WAL directory; the rest counts as zero.
    Wal {
        /// The file's name.
        name: String,
        /// How much of it counts.
        valid_len: u64,
    },
    /// These.
    Bytes(Arc<[u8]>),
}

/// What copying found besides the files.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// Bytes read from the source.
    pub bytes_read: AtomicU64,
    /// Blocks of relation files that differ from the parent's.
    pub blocks_changed: AtomicU64,
}

/// Copies files into packs.
pub(super) struct Copier<'a> {
    /// Where files are opened.
    pub data_dir: &'a DataDir,
    /// Says whether it still makes sense to go on.
    pub health: &'a (dyn Fn() -> Result<()> + Sync),
    /// Stacks layers upon the parent's.
    pub stack: &'a Stack<'a>,
    /// Takes chunks.
    pub data: &'a Packer,
    /// Bytes of a block.
    pub block_len: usize,
    /// How to compress.
    pub compression: Compression,
    /// What interrupted backups stored already.
    pub salvage: Option<&'a Salvage<'a>>,
    /// Judges pages, where the cluster has checksums.
    pub judge: Option<&'a Judge>,
    /// Which blocks need not be read; none if everything is.
    pub changes: Option<Changes<'a>>,
    /// Number of workers.
    pub jobs: usize,
    /// Bounds the rate of reading.
    pub rate: &'a RateLimit,
    /// Who watches.
    pub progress: &'a dyn Progress,
    /// What else is found.
    pub totals: &'a Totals,
}

/// A file in work.
pub(super) struct OpenItem {
    /// The file.
    pub item: Item,
    /// Its place in the order of the files.
    number: u64,
    reader: Mutex<Opened>,
    slices_to_read: AtomicUsize,
    parts: Vec<OpenPart>,
    parts_left: AtomicUsize,
}

/// How far the file of an item is.
enum Opened {
    NotYet,
    Here(Arc<Reader>),
    /// It was gone when it was to be opened.
    Vanished,
    /// All of it was read.
    Done,
}

#[derive(Default)]
struct OpenPart {
    /// The parent's fingerprints, while slices are still to be read.
    parent: Mutex<Option<Arc<Vec<Fingerprint>>>>,
    parent_blocks: OnceLock<usize>,
    reads_left: AtomicU32,
    slices: Mutex<Vec<SliceMap>>,
    slices_left: AtomicU32,
    /// The part's map, and the file's length if it turned out to end in this part.
    done: OnceLock<(PartMap, Option<u64>)>,
}

/// Where bytes are read from.
pub(super) enum Reader {
    /// A file.
    File(File),
    /// A file of which so many bytes count; the rest is zero.
    Prefix(File, u64),
    /// These.
    Bytes(Arc<[u8]>),
}

impl Reader {
    /// Fills the buffer from `offset` as far as there are bytes, and says how many.
    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Reader::File(file) => fill_from(file, buffer, offset),
            Reader::Prefix(file, valid_len) => {
                let len = fill_from(file, buffer, offset)?;
                let valid = usize::try_from(valid_len.saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
                buffer[valid..len].fill(0);
                Ok(len)
            }
            Reader::Bytes(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let len = buffer.len().min(bytes.len() - from);
                buffer[..len].copy_from_slice(&bytes[from..from + len]);
                Ok(len)
            }
        }
    }
}

fn fill_from(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// The lock of data that a panic elsewhere leaves as good as it was.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A run of the copier: what its workers share.
pub(super) struct Run<'a> {
    /// What is to be done, and how.
    pub copier: &'a Copier<'a>,
    /// Whether one of the threads gave up.
    pub failed: AtomicBool,
    /// Takes the files when they are finished.
    pub order: Order<'a>,
    /// Tells a worker that waits for work to finish what it holds back.
    hurry: Vec<Sender<()>>,
}

/// Sees to it that nobody waits for a thread that panicked.
struct Guard<'r, 'a>(&'r Run<'a>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.give_up();
        }
    }
}

impl Copier<'_> {
    /// Copies files, at most `count`, and hands the entries of those that did not vanish to `take`, in their order.
    pub fn run(
        &self,
        work: &mut (dyn Iterator<Item = Result<Work>> + Send),
        count: usize,
        take: &mut Take<'_>,
    ) -> Result<()> {
        let workers = self.jobs.min(count);
        let (hurry, hurried): (Vec<_>, Vec<_>) = (0..workers).map(|_| bounded(1)).unzip();
        let run = Run { copier: self, failed: AtomicBool::new(false), order: Order::new(take), hurry };
        let slices = Mutex::new(Slices::of(work, self.block_len));
        let (feed, fed) = bounded(AHEAD);
        let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
            let (run, slices) = (&run, &slices);
            let feeder = |_| {
                let feed = feed.clone();
                scope.spawn(move || run.guarded(|| run.feed(slices, &feed)))
            };
            let worker = |hurried| {
                let fed = fed.clone();
                scope.spawn(move || run.guarded(|| Worker::new(run)?.run(&fed, &hurried)))
            };
            let feeders = (0..FEEDERS.min(count)).map(feeder);
            let threads: Vec<_> = feeders.chain(hurried.into_iter().map(worker)).collect();
            // Whoever waits for the others to send or to take learns that they are gone.
            drop((feed, fed));
            let panicked = || Err(Error::bug("a worker panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panicked())).collect()
        });
        outcomes.into_iter().collect()
    }
}

impl Item {
    fn block_count(&self, block_len: u64) -> u64 {
        self.entry.len.div_ceil(block_len)
    }

    /// How many blocks a part has; a file that is read to wherever its end is has one block to begin with.
    pub fn part_blocks(&self, block_len: u64, part: u32) -> u32 {
        let before = u64::from(part) * u64::from(PART_BLOCKS);
        let blocks = self.block_count(block_len).saturating_sub(before).min(u64::from(PART_BLOCKS));
        let least = u64::from(self.is_read_to_its_end());
        u32::try_from(blocks.max(least)).unwrap_or(PART_BLOCKS)
    }

    /// How many blocks a part had in the parent; none if that did not have the file.
    fn parent_part_blocks(&self, block_len: u64, part: u32) -> usize {
        let blocks = self.parent.as_ref().map_or(0, |parent| parent.len.div_ceil(block_len));
        let in_part = blocks.saturating_sub(u64::from(part) * u64::from(PART_BLOCKS)).min(u64::from(PART_BLOCKS));
        usize::try_from(in_part).unwrap_or(usize::MAX)
    }

    /// What a detector says about the file: which blocks among `within` to read; `None` if it is not for detectors to say.
    fn runs<'a>(
        &self,
        changes: Changes<'a>,
        block_len: u64,
        within: Range<u32>,
    ) -> Option<impl Iterator<Item = BlockRun> + 'a> {
        let (relation, parent) = (self.relation?, self.parent.as_ref()?);
        let count = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
        let block_count = count(self.block_count(block_len));
        let len = FileLength { block_count, parent_block_count: count(parent.len / block_len) };
        let trusted = relation.fork == ForkNumber::Main && matches!(self.content, Content::DataDirectory);
        trusted.then(|| changes.map.runs_within(relation, changes.segment, len, within))
    }

    /// The parent's entry for the file as it is now, if nothing of it has to be read.
    pub fn unchanged(&self, changes: Changes<'_>, block_len: u64) -> Option<FileEntry> {
        let parent = self.parent.as_ref().filter(|parent| parent.len == self.entry.len && changes.audit.is_none())?;
        let nothing = self.runs(changes, block_len, 0..u32::MAX)?.next().is_none();
        nothing.then(|| FileEntry { parts: parent.parts.clone(), ..self.entry.clone() })
    }

    /// How many parts the file has.
    pub fn part_count(&self, block_len: u64) -> u32 {
        let parts = self.block_count(block_len).div_ceil(u64::from(PART_BLOCKS));
        u32::try_from(parts.max(u64::from(self.is_read_to_its_end()))).unwrap_or(u32::MAX)
    }

    /// Whether the file is read to wherever its end is then: WAL knows what is appended to a relation after the backup began, but not
    /// what is appended to a configuration file.
    pub fn is_read_to_its_end(&self) -> bool {
        self.relation.is_none() && matches!(self.content, Content::DataDirectory)
    }
}

impl OpenItem {
    /// An item of which nothing is read yet.
    pub fn new(number: u64, item: Item, block_len: u64) -> Self {
        let parts = (0..item.part_count(block_len)).map(|part| {
            let slices = item.part_blocks(block_len, part).div_ceil(SLICE_BLOCKS);
            let (slices_left, reads_left) = (AtomicU32::new(slices), AtomicU32::new(slices));
            OpenPart { slices_left, reads_left, ..OpenPart::default() }
        });
        let parts: Vec<_> = parts.collect();
        let slices = parts.iter().map(|part| part.slices_left.load(Ordering::Relaxed) as usize).sum();
        let (slices_to_read, parts_left) = (AtomicUsize::new(slices), AtomicUsize::new(parts.len()));
        Self { item, number, reader: Mutex::new(Opened::NotYet), slices_to_read, parts, parts_left }
    }

    fn parent_map(&self, part: u32) -> Option<&PartMap> {
        self.item.parent.as_ref()?.parts.get(part as usize)
    }
}

impl Run<'_> {
    /// Does what a thread is for; whatever goes wrong, the others learn of it.
    fn guarded(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _guard = Guard(self);
        work().inspect_err(|_| self.give_up())
    }

    fn give_up(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.order.give_up();
    }

    /// Waits until another file may be begun.
    pub fn wait_for_room(&self) {
        // Who was told and has not listened yet need not be told again.
        let tell = |worker: &Sender<()>| {
            let _ = worker.try_send(());
        };
        self.order.wait_for_room(|| self.hurry.iter().for_each(tell));
    }

    /// The item's reader; all its slices read through one open file, whatever happens to the name.
    pub fn reader(&self, open: &OpenItem) -> Result<Option<Arc<Reader>>> {
        let mut opened = lock(&open.reader);
        if let Opened::NotYet = *opened {
            *opened = self.open_reader(&open.item)?.map_or(Opened::Vanished, |r| Opened::Here(Arc::new(r)));
        }
        match &*opened {
            Opened::Here(reader) => Ok(Some(Arc::clone(reader))),
            _ => Ok(None),
        }
    }

    fn open_reader(&self, item: &Item) -> Result<Option<Reader>> {
        Ok(match &item.content {
            Content::DataDirectory => {
                self.copier.data_dir.open_file(&item.entry.path)?.inspect(reads_once).map(Reader::File)
            }
            Content::Bytes(bytes) => Some(Reader::Bytes(Arc::clone(bytes))),
            Content::Wal { name, valid_len } => {
                let file = self.copier.data_dir.open_wal_file(name)?.ok_or_else(|| super::wal::lost(name))?;
                Some(Reader::Prefix(file, *valid_len))
            }
        })
    }

    /// The parent's fingerprints of a part; empty if the parent does not have it.
    fn parent(&self, slice: &Slice) -> Result<Arc<Vec<Fingerprint>>> {
        let part = &slice.open.parts[slice.part as usize];
        let mut loaded = lock(&part.parent);
        if let Some(fingerprints) = &*loaded {
            return Ok(Arc::clone(fingerprints));
        }
        let map = slice.open.parent_map(slice.part);
        let fingerprints = map.map_or_else(|| Ok(Vec::new()), |map| self.copier.stack.fingerprints(map))?;
        let _ = part.parent_blocks.set(fingerprints.len());
        Ok(Arc::clone(loaded.insert(Arc::new(fingerprints))))
    }

    /// Which blocks of a slice to read, by their numbers in the part; all of them unless a detector knows better.
    pub fn ranges(&self, slice: &Slice) -> Vec<Range<u32>> {
        let all = slice.start..slice.start + slice.count;
        let item = &slice.open.item;
        let Some(changes) = self.copier.changes.filter(|changes| changes.audit.is_none()) else { return vec![all] };
        let part = slice.part * PART_BLOCKS;
        let runs = item.runs(changes, self.copier.block_len as u64, part + all.start..part + all.end);
        let Some(runs) = runs else { return vec![all] };
        let first = item.relation.map_or(0, |file| file.segment.as_u32().wrapping_mul(changes.segment.as_u32()));
        let in_part = |block: u32| block.wrapping_sub(first) - part;
        runs.map(|run| in_part(run.start.as_u32())..in_part(run.start.as_u32()) + run.count).collect()
    }

    /// Lets go of the parent's fingerprints of a part when its last slice is read, and of the file when all are.
    fn read_done(&self, slice: &Slice) {
        let open = &slice.open;
        if open.slices_to_read.fetch_sub(1, Ordering::AcqRel) == 1 {
            let mut opened = lock(&open.reader);
            if let Opened::Here(_) = *opened {
                *opened = Opened::Done;
            }
        }
        let part = &open.parts[slice.part as usize];
        if part.reads_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            lock(&part.parent).take();
        }
    }

    /// Takes the finished map of a slice; with the last of a part its layer is written, with the last of a file its entry made.
    fn deliver(&self, slice: &Slice, map: SliceMap) -> Result<()> {
        let open = &*slice.open;
        let part = &open.parts[slice.part as usize];
        lock(&part.slices).push(map);
        if part.slices_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(());
        }
        let slices = std::mem::take(&mut *lock(&part.slices));
        let known = part.parent_blocks.get().copied();
        let of_parent = || open.item.parent_part_blocks(self.copier.block_len as u64, slice.part);
        let parent_blocks = known.unwrap_or_else(of_parent);
        let vanished = matches!(*lock(&open.reader), Opened::NotYet | Opened::Vanished);
        if !vanished {
            let done = part::write(self.copier.stack, slices, parent_blocks, open.parent_map(slice.part))?;
            if open.item.relation.is_some() {
                self.copier.totals.blocks_changed.fetch_add(done.blocks_changed, Ordering::Relaxed);
            }
            let _ = part.done.set((done.map, done.end));
        }
        if open.parts_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let entry = if vanished { None } else { Some(open.finish()?) };
            self.order.deliver(open.number, entry)?;
        }
        Ok(())
    }
}

impl OpenItem {
    /// The entry of a file all of whose parts are finished.
    fn finish(&self) -> Result<FileEntry> {
        let mut entry = self.item.entry.clone();
        for part in &self.parts {
            let (map, end) = part.done.get().ok_or_else(|| Error::bug("a part of a file was not finished"))?;
            if !map.layers.is_empty() {
                entry.parts.push(map.clone());
            }
            if let Some(end) = *end {
                entry.len = end;
                break;
            }
        }
        Ok(entry)
    }
}

/// A slice that is being read (the last one), or whose last blocks are in the open chunk.
struct OpenSlice {
    slice: Slice,
    map: SliceMap,
    read: bool,
}

/// Blocks of a slice in the open chunk.
struct Piece {
    slice: usize,
    start: u32,
    count: u32,
    first: u16,
}

struct Worker<'r, 'a> {
    run: &'r Run<'a>,
    encoder: Encoder,
    window: Vec<u8>,
    slices: Vec<OpenSlice>,
    raw: Vec<u8>,
    fingerprints: Vec<Fingerprint>,
    pieces: Vec<Piece>,
}

impl<'r, 'a> Worker<'r, 'a> {
    fn new(run: &'r Run<'a>) -> Result<Self> {
        let window_blocks = (WINDOW_LEN / run.copier.block_len).max(1);
        Ok(Self {
            run,
            encoder: Encoder::new(run.copier.compression)?,
            window: vec![0; window_blocks * run.copier.block_len],
            slices: Vec::new(),
            raw: Vec::with_capacity(MAX_RAW_LEN),
            fingerprints: Vec::new(),
            pieces: Vec::new(),
        })
    }

    fn run(&mut self, fed: &Receiver<Slice>, hurried: &Receiver<()>) -> Result<()> {
        while let Some(slice) = self.next(fed, hurried)? {
            if self.run.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            (self.run.copier.health)()?;
            self.copy(&slice)?;
            if self.run.order.is_crowded() {
                self.flush()?;
            }
        }
        self.flush()
    }

    /// The next slice; while there is none, finishes what is held back when told to.
    fn next(&mut self, fed: &Receiver<Slice>, hurried: &Receiver<()>) -> Result<Option<Slice>> {
        // Most of the time there is one, and to wait for two channels costs more than to look at one.
        if let Ok(slice) = fed.try_recv() {
            return Ok(Some(slice));
        }
        loop {
            select! {
                recv(fed) -> slice => return Ok(slice.ok()),
                recv(hurried) -> _ => self.flush()?,
            }
        }
    }

    fn copy(&mut self, slice: &Slice) -> Result<()> {
        let map = SliceMap::new(slice.start);
        self.slices.push(OpenSlice { slice: slice.clone(), map, read: false });
        let ranges = self.run.ranges(slice);
        if let Some(reader) = self.run.reader(&slice.open)? {
            if ranges.is_empty() {
                self.skip(slice);
            } else {
                let parent = self.run.parent(slice)?;
                self.read(slice, &ranges, &reader, &parent)?;
            }
        }
        self.run.read_done(slice);
        let index = self.slices.len() - 1;
        let waits = self.pieces.last().is_some_and(|piece| piece.slice == index);
        match self.slices.pop() {
            Some(done) if !waits => self.run.deliver(slice, done.map),
            waiting => {
                self.slices.extend(waiting.map(|waiting| OpenSlice { read: true, ..waiting }));
                Ok(())
            }
        }
    }

    /// Passes over a slice of which nothing has to be read.
    fn skip(&mut self, slice: &Slice) {
        let len = u64::from(slice.count) * self.run.copier.block_len as u64;
        self.run.copier.progress.advance(len);
        if let Some(open) = self.slices.last_mut() {
            open.map.end = slice.start + slice.count;
        }
    }

    /// Reads ranges of a slice, in order, until the file ends.
    fn read(&mut self, slice: &Slice, ranges: &[Range<u32>], reader: &Reader, parent: &[Fingerprint]) -> Result<()> {
        for range in ranges {
            self.read_range(slice, range.clone(), reader, parent)?;
            if self.slices.last().is_some_and(|open| open.map.file_end.is_some()) {
                return Ok(());
            }
        }
        let blocks: u32 = ranges.iter().map(|range| range.end - range.start).sum();
        self.run.copier.progress.advance(u64::from(slice.count - blocks) * self.run.copier.block_len as u64);
        if let Some(open) = self.slices.last_mut() {
            open.map.end = open.map.end.max(slice.start + slice.count);
        }
        Ok(())
    }

    fn read_range(&mut self, slice: &Slice, range: Range<u32>, reader: &Reader, parent: &[Fingerprint]) -> Result<()> {
        let copier = self.run.copier;
        let block_len = copier.block_len as u64;
        let file_len = slice.open.item.entry.len;
        let part_offset = u64::from(slice.part) * u64::from(PART_BLOCKS) * block_len;
        let end = match slice.to_end {
            true => part_offset + u64::from(PART_BLOCKS) * block_len,
            false => file_len.min(part_offset + u64::from(range.end) * block_len),
        };
        let mut offset = part_offset + u64::from(range.start) * block_len;
        let mut window = std::mem::take(&mut self.window);
        while offset < end {
            let wanted = usize::try_from(end - offset).unwrap_or(usize::MAX).min(window.len());
            let len = reader.fill(&mut window[..wanted], offset).map_err(|e| self.cannot_read(slice, e))?;
            copier.totals.bytes_read.fetch_add(len as u64, Ordering::Relaxed);
            copier.progress.advance(len as u64);
            let padded = len.next_multiple_of(copier.block_len);
            window[len..padded].fill(0);
            let first = u32::try_from((offset - part_offset) / block_len).unwrap_or(u32::MAX);
            for (block, page) in (first..).zip(window[..padded].chunks_exact_mut(copier.block_len)) {
                let whole = (block - first) as usize * copier.block_len + copier.block_len <= len;
                self.take(slice, block, page, whole, reader, parent)?;
            }
            let read_blocks = u32::try_from(padded / copier.block_len).unwrap_or(0);
            if let Some(open) = self.slices.last_mut() {
                open.map.end = first + read_blocks;
                let ends = len < wanted || (slice.to_end && offset + len as u64 == end);
                open.map.file_end = ends.then_some(offset + len as u64);
            }
            if len < wanted {
                break;
            }
            offset += len as u64;
        }
        self.window = window;
        Ok(())
    }

    fn cannot_read(&self, slice: &Slice, error: io::Error) -> Error {
        let path = slice.open.item.entry.display_path();
        Error::io("read", path.as_ref(), error)
    }

    /// Takes one block of the slice: judges its page, compares it, and keeps it if it differs from the parent's.
    fn take(
        &mut self,
        slice: &Slice,
        block: u32,
        page: &mut [u8],
        whole: bool,
        reader: &Reader,
        parent: &[Fingerprint],
    ) -> Result<()> {
        let mut zero = is_zero(page);
        if let (Some(judge), Some(relation), false, true) =
            (self.run.copier.judge, &slice.open.item.relation, zero, whole)
        {
            let in_file = slice.part * PART_BLOCKS + block;
            let offset = u64::from(in_file) * self.run.copier.block_len as u64;
            let path = &slice.open.item.entry.path;
            let verdict = judge.judge(path, *relation, BlockNumber::new(in_file), page, |page| {
                reader.fill(page, offset).map_err(|e| self.cannot_read(slice, e))
            })?;
            if verdict == Verdict::ReadAgain {
                zero = is_zero(page);
            }
        }
        let fingerprint = if zero { Fingerprint::ZERO_PAGE } else { Fingerprint::of(page) };
        if parent.get(block as usize) == Some(&fingerprint) {
            return Ok(());
        }
        self.audit(slice, block, page, parent);
        let index = self.slices.len() - 1;
        let map = &mut self.slices[index].map;
        map.blocks_changed += 1;
        if zero {
            map.push_zero(block);
            return Ok(());
        }
        map.fingerprints.push(fingerprint);
        if let Some(Found { chunk, pack, first }) = self.salvaged(fingerprint)? {
            self.slices[index].map.push(chunk, pack, Extent { start: block, count: 1, source: 0, first });
            return Ok(());
        }
        if self.raw.len() + page.len() > MAX_RAW_LEN {
            self.flush()?;
        }
        self.add_to_chunk(self.slices.len() - 1, block, page, fingerprint);
        Ok(())
    }

    /// Notes a block that changed and that the detector would not have read.
    fn audit(&self, slice: &Slice, block: u32, page: &[u8], parent: &[Fingerprint]) {
        let Some((changes, audit)) = self.run.copier.changes.and_then(|changes| Some((changes, changes.audit?))) else {
            return;
        };
        let item = &slice.open.item;
        let in_file = slice.part * PART_BLOCKS + block;
        let runs = item.runs(changes, self.run.copier.block_len as u64, in_file..in_file + 1);
        if let (Some(mut runs), Some(relation), true) = (runs, item.relation, (block as usize) < parent.len())
            && runs.next().is_none()
        {
            audit.note(relation, changes.segment, BlockNumber::new(in_file), page);
        }
    }

    fn salvaged(&self, fingerprint: Fingerprint) -> Result<Option<Found>> {
        self.run.copier.salvage.map_or(Ok(None), |salvage| salvage.block(fingerprint))
    }

    fn add_to_chunk(&mut self, slice: usize, block: u32, page: &[u8], fingerprint: Fingerprint) {
        let first = u16::try_from(self.fingerprints.len()).unwrap_or(u16::MAX);
        self.raw.extend_from_slice(page);
        self.fingerprints.push(fingerprint);
        match self.pieces.last_mut() {
            Some(last) if last.slice == slice && last.start + last.count == block => last.count += 1,
            _ => self.pieces.push(Piece { slice, start: block, count: 1, first }),
        }
    }

    /// Compresses and places the open chunk, and delivers the slices that waited for it.
    fn flush(&mut self) -> Result<()> {
        if !self.fingerprints.is_empty() {
            let (codec, stored) = self.encoder.encode(&self.raw, self.run.copier.block_len)?;
            let stored_len = u32::try_from(stored.len()).map_err(|_| Error::bug("a chunk of 4 GiB"))?;
            let place = self.run.copier.data.append(stored)?;
            let chunk = ChunkRef {
                pack: 0,
                offset: place.offset,
                stored_len,
                block_count: u16::try_from(self.fingerprints.len())
                    .map_err(|_| Error::bug("a chunk of 65,536 blocks"))?,
                codec,
                id: ChunkId::of(&self.fingerprints),
            };
            let pack = DataPack { run: place.pack.run, seq: place.pack.seq };
            for Piece { slice, start, count, first } in self.pieces.drain(..) {
                self.slices[slice].map.push(chunk, pack, Extent { start, count, source: 0, first });
            }
            self.raw.clear();
            self.fingerprints.clear();
        }
        let read = self.slices.iter().take_while(|open| open.read).count();
        for OpenSlice { slice, map, .. } in self.slices.drain(..read) {
            self.run.deliver(&slice, map)?;
        }
        Ok(())
    }
}
