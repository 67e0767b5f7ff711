//! The data path of a restore or an export: each chunk is read, decompressed and proved once, and its blocks written wherever they belong.
//!
//! ```text
//! for each window of packs:
//!     flatten the block maps that need them; note for each chunk which of its blocks go where
//!     in the order of packs and offsets, on any worker: read neighbouring chunks at once; decompress; prove; write
//! ```
//!
//! The plan of a window is bounded by [`MAX_PIECES`], so memory does not grow with the cluster but by the files themselves (files.rs); a cluster of up to
//! fifty gigabytes takes one window. Block maps are found through the pages of the file table, which are read again for each window that needs them. Blocks that are zero are never written: files are made with their length, and stay sparse there.
//!
//! A [`Sink`] says where a file is: it may be one of its own, or a place in an archive.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;

use super::Chosen;
use super::files::{TargetFile, TargetFiles};
use crate::chunk::{Decoder, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::repo::{
    ChunkRef, DataPack, Depth, Layer, Manifest, PART_BLOCKS, PackKind, PackName, Repository, TAKE_ANOTHER, read_page,
};
use crate::store::ObjectName;

/// Pieces of a window at most; one takes up to 200 bytes while it is planned. A pack has fewer blocks.
const MAX_PIECES: usize = 1 << 18;
/// Bytes read from a pack at once, at most; one chunk may be longer.
const READ_LEN: u64 = 1 << 20;
/// Bytes between two chunks that are read rather than skipped.
const GAP_LEN: u64 = 64 << 10;
/// Bytes after which a worker has the file at hand brought to the disk.
const FLUSH_LEN: usize = 32 << 20;
/// How far ahead batches are asked for.
const BATCHES_AHEAD: usize = 4;
/// Files open for writing.
const OPEN_FILES: usize = 128;

/// Where files are written to.
pub(crate) trait Sink: Sync {
    /// Makes a file with its length, all zero; called once for each.
    ///
    /// # Errors
    /// When it cannot be made.
    fn make(&self, index: usize, file: TargetFile<'_>) -> Result<Opened>;

    /// Opens a file that was made.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&self, index: usize, file: TargetFile<'_>) -> Result<Opened>;
}

/// A file, open for writing.
#[derive(Clone)]
pub(crate) struct Opened {
    /// Where its bytes are.
    pub file: Arc<File>,
    /// Offset of its first byte there.
    pub begin: u64,
}

/// Blocks of a chunk that go to a file.
#[derive(Clone, Copy)]
struct Piece {
    file: u32,
    /// First block in the file.
    block: u64,
    /// First block in the chunk.
    first: u16,
    count: u16,
}

/// A chunk and where its blocks go.
struct Job {
    pack: DataPack,
    chunk: ChunkRef,
    /// In the plan's.
    pieces: Range<usize>,
}

/// What is written from some packs.
#[derive(Default)]
struct Plan {
    jobs: Vec<Job>,
    pieces: Vec<Piece>,
}

impl Plan {
    fn pieces(&self, job: &Job) -> &[Piece] {
        &self.pieces[job.pieces.clone()]
    }
}

/// Packs that are read at once, and the pages of the file table whose files need them.
struct Window {
    /// Ascending.
    packs: Vec<DataPack>,
    pages: Vec<u32>,
}

impl Window {
    fn has(&self, pack: &DataPack) -> bool {
        self.packs.binary_search(pack).is_ok()
    }
}

/// Writes the blocks of all files.
pub(crate) struct Writer<'a> {
    repo: &'a Repository,
    manifest: &'a Manifest,
    sink: &'a dyn Sink,
    files: &'a TargetFiles,
    /// The files by the places of their entries.
    by_place: Vec<u32>,
    jobs: usize,
    progress: &'a dyn Progress,
    bytes_read: &'a AtomicU64,
}

impl<'a> Writer<'a> {
    /// A writer of `files` to `sink` with so many workers, or one for each processor; it counts what it reads from the repository.
    pub fn new(
        chosen: &'a Chosen<'_>,
        sink: &'a dyn Sink,
        files: &'a TargetFiles,
        jobs: Option<NonZeroUsize>,
        progress: &'a dyn Progress,
        bytes_read: &'a AtomicU64,
    ) -> Self {
        let jobs = crate::os::worker_count(jobs);
        let mut by_place: Vec<u32> = (0..).take(files.len()).collect();
        by_place.sort_by_key(|file| files.place(*file as usize));
        Self { repo: chosen.repo, manifest: &chosen.manifest, sink, files, by_place, jobs, progress, bytes_read }
    }

    /// Writes everything, and makes every file, the empty ones too.
    pub fn run(&self) -> Result<()> {
        match self.plan(None)? {
            Some(plan) => self.write(&plan)?,
            None => {
                for window in self.windows()? {
                    let plan = self.plan(Some(&window))?;
                    self.write(&plan.ok_or_else(|| Error::bug("a window without a plan"))?)?;
                }
            }
        }
        (0..self.files.len()).into_par_iter().try_for_each(|index| {
            let made = self.files.made(index).is();
            if made { Ok(()) } else { self.sink.make(index, self.files.get(index)).map(drop) }
        })
    }

    /// Gives each part that needs a pack of the window, of the files that a page has, to `take`: the file, the part's first block, its flattened map.
    fn flatten_page(&self, page: u32, window: Option<&Window>, mut take: impl FnMut(u32, u64, &Layer)) -> Result<()> {
        let of = |file: &u32| self.files.place(*file as usize);
        let begin = self.by_place.partition_point(|file| of(file).page < page);
        let files = self.by_place[begin..].iter().take_while(|file| of(file).page == page);
        let mut files = files.peekable();
        if files.peek().is_none() {
            return Ok(());
        }
        let wanted = |pack: &PackName| window.is_none_or(|window| window.has(&data_pack(pack)));
        let place = &self.manifest.pages[page as usize];
        let entries = read_page(&**self.repo.store(), &self.manifest.cluster, place)?.entries;
        for index in files {
            let (file, entry) = (self.files.get(*index as usize), &entries[usize::from(of(index).slot)]);
            for (number, part) in entry.parts.iter().enumerate().filter(|(_, part)| part.data.iter().any(wanted)) {
                let flat = self.repo.flatten(self.manifest, part, Depth::Locations)?;
                let first_block = number as u64 * u64::from(PART_BLOCKS);
                self.map_must_fit(file, first_block, &flat)?;
                take(*index, first_block, &flat);
            }
        }
        Ok(())
    }

    /// All pages of the file table, or those of a window.
    fn pages(&self, window: Option<&Window>) -> Vec<u32> {
        window.map_or_else(|| (0..).take(self.manifest.pages.len()).collect(), |window| window.pages.clone())
    }

    /// A map has as many blocks as the file has in that part.
    fn map_must_fit(&self, file: TargetFile<'_>, first_block: u64, map: &Layer) -> Result<()> {
        let blocks = file.len.div_ceil(u64::from(self.manifest.block_size)).saturating_sub(first_block);
        let (found, expected) = (map.locations.block_count, blocks.min(u64::from(PART_BLOCKS)));
        if u64::from(found) == expected {
            return Ok(());
        }
        let what = format!("a block map of {found} blocks where the file has {expected}");
        Err(Error::corrupt(file.display_path(), what))
    }

    /// The chunks of a window of packs and their pieces; `None` if they are too many, which they may not be in a given window.
    fn plan(&self, window: Option<&Window>) -> Result<Option<Plan>> {
        let count = AtomicUsize::new(0);
        let too_many = || window.is_none() && count.load(Ordering::Relaxed) > MAX_PIECES;
        let found = Mutex::new(Vec::new());
        self.pages(window).into_par_iter().filter(|_| !too_many()).try_for_each(|page| {
            let mut of_page = Vec::new();
            self.flatten_page(page, window, |file, first_block, layer| {
                let before = of_page.len();
                of_page.extend(pieces(file, first_block, layer, window));
                count.fetch_add(of_page.len() - before, Ordering::Relaxed);
            })?;
            found.lock().unwrap_or_else(PoisonError::into_inner).append(&mut of_page);
            Ok::<_, Error>(())
        })?;
        if too_many() {
            return Ok(None);
        }
        let mut all = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        all.par_sort_unstable_by_key(|(pack, chunk, piece)| {
            (*pack, chunk.offset, piece.first, piece.file, piece.block)
        });
        self.plan_of(all).map(Some)
    }

    /// Puts the pieces of each chunk together; they are in the order of the packs.
    fn plan_of(&self, all: Vec<(DataPack, ChunkRef, Piece)>) -> Result<Plan> {
        let mut plan = Plan { jobs: Vec::new(), pieces: Vec::with_capacity(all.len()) };
        for (pack, chunk, piece) in all {
            let at = plan.pieces.len();
            plan.pieces.push(piece);
            match plan.jobs.last_mut() {
                Some(job) if job.pack == pack && job.chunk.offset == chunk.offset => {
                    if !job.chunk.is_same_chunk(&chunk) {
                        return Err(self.disagreement(pack, &chunk)?);
                    }
                    job.pieces.end = at + 1;
                }
                Some(job) if job.pack == pack && job.chunk.end() > chunk.offset => {
                    return Err(self.disagreement(pack, &chunk)?);
                }
                _ => plan.jobs.push(Job { pack, chunk, pieces: at..at + 1 }),
            }
        }
        Ok(plan)
    }

    fn disagreement(&self, pack: DataPack, chunk: &ChunkRef) -> Result<Error> {
        let object = data_object(self.manifest, pack)?;
        Ok(Error::corrupt(format!("{object} at {}", chunk.offset), "two block maps disagree about a chunk"))
    }

    /// Packs in order, cut so that each window's pieces are few enough; one pack makes a window, however many it has.
    fn windows(&self) -> Result<Vec<Window>> {
        let counted = self.pages(None).into_par_iter().map(|page| {
            let mut counts: BTreeMap<DataPack, usize> = BTreeMap::new();
            self.flatten_page(page, None, |_, _, Layer { locations, .. }| {
                for chunk in locations.extents.iter().filter_map(|extent| extent.chunk()) {
                    *counts.entry(locations.packs[locations.chunks[chunk].pack as usize]).or_default() += 1;
                }
            })?;
            Ok((page, counts.into_iter().collect::<Vec<_>>()))
        });
        let counted: Vec<(u32, Vec<(DataPack, usize)>)> = counted.collect::<Result<_>>()?;
        let mut counts: BTreeMap<DataPack, usize> = BTreeMap::new();
        for (pack, count) in counted.iter().flat_map(|(_, counts)| counts) {
            *counts.entry(*pack).or_default() += count;
        }
        let mut windows: Vec<Window> = Vec::new();
        let mut window_of = BTreeMap::new();
        let mut room = 0;
        for (pack, count) in counts {
            match windows.last_mut() {
                Some(window) if count <= room => window.packs.push(pack),
                _ => {
                    windows.push(Window { packs: vec![pack], pages: Vec::new() });
                    room = MAX_PIECES;
                }
            }
            room = room.saturating_sub(count);
            window_of.insert(pack, windows.len() - 1);
        }
        for (page, counts) in counted {
            let needed: BTreeSet<usize> = counts.iter().filter_map(|(pack, _)| window_of.get(pack).copied()).collect();
            needed.into_iter().for_each(|window| windows[window].pages.push(page));
        }
        Ok(windows)
    }

    /// Writes the pieces of a plan. Each worker begins with a share of its own, so that two seldom write to one file at once, and then helps
    /// the others.
    fn write(&self, plan: &Plan) -> Result<()> {
        let jobs = plan.jobs.as_slice();
        let batches = batches(jobs);
        let workers = self.jobs.min(batches.len()).max(1);
        let shares: Vec<Share> = (0..workers).map(|worker| Share::of(worker, workers, batches.len())).collect();
        let failed = AtomicBool::new(false);
        let open = OpenFiles::default();
        let (flusher, to_flush) = bounded::<Arc<File>>(1);
        let work = |own: usize, flusher: Sender<Arc<File>>| {
            let mut worker = Worker {
                writer: self,
                plan,
                open: &open,
                flusher,
                decoder: Decoder::new()?,
                stored: Vec::new(),
                unflushed: 0,
            };
            for share in shares.iter().cycle().skip(own).take(workers) {
                while !failed.load(Ordering::Relaxed)
                    && let Some(number) = share.next()
                {
                    if let Some(ahead) = batches.get(number + BATCHES_AHEAD) {
                        worker.ask_for(&jobs[ahead.clone()])?;
                    }
                    let batch = &jobs[batches[number].clone()];
                    worker.write(batch).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let flushing = scope.spawn(|| flush(&to_flush));
            let work = &work;
            let start = |own| {
                let flusher = flusher.clone();
                scope.spawn(move || work(own, flusher))
            };
            let workers: Vec<_> = (0..workers).map(start).collect();
            let panicked = |_| Err(Error::bug("a worker panicked"));
            let outcomes: Vec<Result<()>> =
                workers.into_iter().map(|worker| worker.join().unwrap_or_else(panicked)).collect();
            drop(flusher);
            outcomes.into_iter().chain([flushing.join().unwrap_or_else(panicked)]).collect()
        })
    }
}

/// A worker's share of the batches.
struct Share {
    next: AtomicUsize,
    end: usize,
}

impl Share {
    fn of(worker: usize, workers: usize, count: usize) -> Self {
        let at = |worker: usize| worker * count / workers;
        Self { next: AtomicUsize::new(at(worker)), end: at(worker + 1) }
    }

    fn next(&self) -> Option<usize> {
        let batch = self.next.fetch_add(1, Ordering::Relaxed);
        (batch < self.end).then_some(batch)
    }
}

/// Brings files to the disk while others are written, so that the sync at the end finds little left to do.
fn flush(files: &Receiver<Arc<File>>) -> Result<()> {
    files.iter().try_for_each(|file| {
        let synced = file.sync_data();
        synced.map_err(|e| Error::new(ErrorKind::Unavailable, "written bytes did not reach the disk").because(e))
    })
}

fn data_pack(name: &PackName) -> DataPack {
    DataPack { run: name.run, seq: name.seq }
}

fn data_object(manifest: &Manifest, pack: DataPack) -> Result<ObjectName> {
    PackName { run: pack.run, seq: pack.seq, kind: PackKind::Data }.object(&manifest.cluster)
}

/// The pieces of a flattened part that are in packs of the window.
fn pieces<'l>(
    file: u32,
    first_block: u64,
    layer: &'l Layer,
    window: Option<&'l Window>,
) -> impl Iterator<Item = (DataPack, ChunkRef, Piece)> + 'l {
    let locations = &layer.locations;
    let piece = move |extent: &crate::repo::Extent| {
        let chunk = locations.chunks[extent.chunk()?];
        let pack = locations.packs[chunk.pack as usize];
        let wanted = window.is_none_or(|window| window.has(&pack));
        let count = u16::try_from(extent.count).unwrap_or(u16::MAX);
        let piece = Piece { file, block: first_block + u64::from(extent.start), first: extent.first, count };
        wanted.then_some((pack, chunk, piece))
    };
    locations.extents.iter().filter_map(piece)
}

/// Runs of jobs that are read at once.
fn batches(jobs: &[Job]) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut begin = 0;
    let mut end = 0;
    for (index, Job { pack, chunk, .. }) in jobs.iter().enumerate() {
        let chunk_end = chunk.offset + u64::from(chunk.stored_len);
        match batches.last_mut() {
            Some(batch)
                if jobs[batch.start].pack == *pack
                    && chunk.offset <= end + GAP_LEN
                    && chunk_end - begin <= READ_LEN =>
            {
                batch.end = index + 1;
            }
            _ => {
                batches.push(index..index + 1);
                begin = chunk.offset;
            }
        }
        end = chunk_end;
    }
    batches
}

/// Files open for writing, the most recent ones.
#[derive(Default)]
struct OpenFiles {
    open: Mutex<VecDeque<(u32, Opened)>>,
}

impl OpenFiles {
    /// The file, opened or made if it is not among the open ones. Two files are made at once, one is not made twice.
    fn get(&self, writer: &Writer<'_>, index: u32) -> Result<Opened> {
        if let Some(file) = self.find(index) {
            return Ok(file);
        }
        let at = index as usize;
        let target = writer.files.get(at);
        let made = writer.files.made(at);
        if let Some(file) = self.find(index) {
            return Ok(file);
        }
        let file = if made.is() { writer.sink.open(at, target)? } else { writer.sink.make(at, target)? };
        made.set();
        let mut open = self.list();
        if open.len() == OPEN_FILES {
            open.pop_front();
        }
        open.push_back((index, file.clone()));
        Ok(file)
    }

    fn find(&self, index: u32) -> Option<Opened> {
        self.list().iter().rev().find(|(known, _)| *known == index).map(|(_, file)| file.clone())
    }

    fn list(&self) -> MutexGuard<'_, VecDeque<(u32, Opened)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker<'w, 'a> {
    writer: &'w Writer<'a>,
    plan: &'w Plan,
    open: &'w OpenFiles,
    flusher: Sender<Arc<File>>,
    decoder: Decoder,
    stored: Vec<u8>,
    unflushed: usize,
}

impl Worker<'_, '_> {
    /// Says that a batch will be read.
    fn ask_for(&self, batch: &[Job]) -> Result<()> {
        let Some((object, begin, len)) = self.place(batch)? else { return Ok(()) };
        self.writer.repo.store().will_get(&object, begin, len);
        Ok(())
    }

    /// Where a batch is: the pack, the offset, the length.
    fn place(&self, batch: &[Job]) -> Result<Option<(ObjectName, u64, u64)>> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(None) };
        let (begin, end) = (first.chunk.offset, last.chunk.end());
        Ok(Some((data_object(self.writer.manifest, first.pack)?, begin, end - begin)))
    }

    /// Reads a batch and writes its pieces.
    fn write(&mut self, batch: &[Job]) -> Result<()> {
        let Some((object, begin, len)) = self.place(batch)? else { return Ok(()) };
        self.stored.resize(usize::try_from(len).map_err(|_| Error::bug("a batch of 4 GiB"))?, 0);
        self.writer.repo.store().get_range(&object, begin, &mut self.stored)?;
        self.writer.bytes_read.fetch_add(len, Ordering::Relaxed);
        for job in batch {
            let from = usize::try_from(job.chunk.offset - begin).map_err(|_| Error::bug("a batch of 4 GiB"))?;
            self.write_chunk(job, from, object.as_str())?;
        }
        Ok(())
    }

    fn write_chunk(&mut self, job: &Job, from: usize, object: &str) -> Result<()> {
        let block_len = self.writer.manifest.block_len();
        let shape = Shape { block_len, block_count: usize::from(job.chunk.block_count) };
        let stored = &self.stored[from..from + job.chunk.stored_len as usize];
        let decoded = self.decoder.decode(job.chunk.codec, stored, shape, job.chunk.id);
        let (raw, _) = decoded.map_err(|error| hurt(self.writer, self.plan, job, object, &error))?;
        for piece in self.plan.pieces(job) {
            let file = self.writer.files.get(piece.file as usize);
            let blocks = &raw[usize::from(piece.first) * block_len..][..usize::from(piece.count) * block_len];
            let offset = piece.block * block_len as u64;
            let len = usize::try_from(file.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(blocks.len());
            let bytes = &blocks[..len];
            let open = self.open.get(self.writer, piece.file)?;
            let written = open.file.write_all_at(bytes, open.begin + offset);
            written.map_err(|e| Error::io("write", file.display_path().as_ref(), e))?;
            self.unflushed += len;
            if self.unflushed >= FLUSH_LEN {
                // Who is busy flushing comes to this file later, or the sync at the end does.
                let _ = self.flusher.try_send(open.file);
                self.unflushed = 0;
            }
            self.writer.files.add_to_crc(piece.file as usize, offset, bytes);
            self.writer.progress.advance(len as u64);
        }
        Ok(())
    }
}

/// The error of a damaged chunk, with what it hurts.
fn hurt(writer: &Writer<'_>, plan: &Plan, job: &Job, object: &str, error: &Error) -> Error {
    let piece = plan.pieces(job).first();
    let file = piece.map(|piece| writer.files.get(piece.file as usize).display_path()).unwrap_or_default();
    let block = piece.map_or(0, |piece| piece.block);
    let what = format!("{}; {file} has its block {block} there", error.what());
    Error::corrupt(format!("{object} at {}", job.chunk.offset), what).hint(TAKE_ANOTHER)
}
