//! The data path of a restore or an export: each chunk is read, decompressed and proved once, and its blocks written wherever they belong.
//!
//! ```text
//! for each window of packs:
//!     flatten the block maps that need them; note for each chunk which of its blocks go where
//!     in the order of packs and offsets, on any worker: read neighbouring chunks at once; decompress; prove; write
//! ```
//!
//! The plan of a window is bounded by [`MAX_PIECES`], so memory does not grow with the cluster; a cluster of up to a hundred
//! gigabytes takes one window. Blocks that are zero are never written: files are made with their length, and stay sparse there.
//!
//! A [`Sink`] says where a file is: it may be one of its own, or a place in an archive.
//!
//! Each file's CRC-32C for PostgreSQL's `backup_manifest` is summed up from its pieces in whatever order they come: a CRC is linear, so the
//! contribution of a piece is its own CRC moved over the bytes that follow it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::prelude::*;

use super::Chosen;
use super::crc::shift;
use crate::chunk::{Decoder, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::repo::{
    ChunkRef, DataPack, Depth, FileEntry, Layer, Manifest, PART_BLOCKS, PackKind, PackName, PartMap, Repository,
    TAKE_ANOTHER,
};
use crate::store::ObjectName;
use crate::target::Owner;

/// Pieces of a window at most; one takes up to 250 bytes while it is planned. A pack has far fewer blocks.
const MAX_PIECES: usize = 1 << 19;
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
    fn make(&self, index: usize, file: &TargetFile) -> Result<Opened>;

    /// Opens a file that was made.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&self, index: usize, file: &TargetFile) -> Result<Opened>;
}

/// A file, open for writing.
#[derive(Clone)]
pub(crate) struct Opened {
    /// Where its bytes are.
    pub file: Arc<File>,
    /// Offset of its first byte there.
    pub begin: u64,
}

/// A file to write.
pub(crate) struct TargetFile {
    /// What the backup says of it.
    pub entry: FileEntry,
    /// Owner and mode in the target.
    pub owner: Owner,
    made: Mutex<bool>,
    crc: AtomicU32,
}

impl TargetFile {
    /// A file that is not made yet.
    pub fn new(entry: FileEntry, owner: Owner) -> Self {
        Self { entry, owner, made: Mutex::new(false), crc: AtomicU32::new(0) }
    }

    /// The CRC-32C of the file, once all of its pieces are written.
    pub fn crc32c(&self) -> u32 {
        // Of an all-zero file, then of what is not zero in it.
        let zeros = shift(!0, self.entry.len);
        !(zeros ^ self.crc.load(Ordering::Relaxed))
    }

    fn add_to_crc(&self, offset: u64, bytes: &[u8]) {
        let own = !crc32c::crc32c_append(!0, bytes);
        let moved = shift(own, self.entry.len - offset - bytes.len() as u64);
        self.crc.fetch_xor(moved, Ordering::Relaxed);
    }
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
    pieces: Vec<Piece>,
}

/// Writes the blocks of all files.
pub(crate) struct Writer<'a> {
    repo: &'a Repository,
    manifest: &'a Manifest,
    sink: &'a dyn Sink,
    files: &'a [TargetFile],
    jobs: usize,
    progress: &'a dyn Progress,
    bytes_read: &'a AtomicU64,
}

impl<'a> Writer<'a> {
    /// A writer of `files` to `sink` with so many workers, or one for each processor; it counts what it reads from the repository.
    pub fn new(
        chosen: &'a Chosen<'_>,
        sink: &'a dyn Sink,
        files: &'a [TargetFile],
        jobs: Option<NonZeroUsize>,
        progress: &'a dyn Progress,
        bytes_read: &'a AtomicU64,
    ) -> Self {
        let jobs = crate::os::worker_count(jobs);
        Self { repo: chosen.repo, manifest: &chosen.manifest, sink, files, jobs, progress, bytes_read }
    }

    /// Writes everything, and makes every file, the empty ones too.
    pub fn run(&self) -> Result<()> {
        match self.plan(None)? {
            Some(jobs) => self.write(&jobs)?,
            None => {
                for window in self.windows()? {
                    let jobs = self.plan(Some(&window))?;
                    self.write(&jobs.ok_or_else(|| Error::bug("a window without a plan"))?)?;
                }
            }
        }
        self.files.par_iter().enumerate().try_for_each(|(index, file)| {
            let made = *file.made.lock().unwrap_or_else(PoisonError::into_inner);
            if made { Ok(()) } else { self.sink.make(index, file).map(drop) }
        })
    }

    /// Each part that needs a pack of the window, with its flattened map.
    fn flattened<'w>(
        &'w self,
        window: Option<&'w [DataPack]>,
    ) -> impl ParallelIterator<Item = Result<(u32, u64, Layer)>> + 'w {
        let needs = move |part: &PartMap| {
            let wanted = |pack: &PackName| window.is_none_or(|window| window.binary_search(&data_pack(pack)).is_ok());
            part.data.iter().any(wanted)
        };
        self.files.par_iter().enumerate().flat_map_iter(move |(index, file)| {
            let parts = file.entry.parts.iter().enumerate().filter(move |(_, part)| needs(part));
            parts.map(move |(number, part)| {
                let flat = self.repo.flatten(self.manifest, part, Depth::Locations)?;
                let first_block = number as u64 * u64::from(PART_BLOCKS);
                self.map_must_fit(file, first_block, &flat)?;
                Ok((index as u32, first_block, flat))
            })
        })
    }

    /// A map has as many blocks as the file has in that part.
    fn map_must_fit(&self, file: &TargetFile, first_block: u64, map: &Layer) -> Result<()> {
        let blocks = file.entry.len.div_ceil(u64::from(self.manifest.block_size)).saturating_sub(first_block);
        let (found, expected) = (map.locations.block_count, blocks.min(u64::from(PART_BLOCKS)));
        if u64::from(found) == expected {
            return Ok(());
        }
        let what = format!("a block map of {found} blocks where the file has {expected}");
        Err(Error::corrupt(file.entry.display_path(), what))
    }

    /// The chunks of a window of packs and their pieces; `None` if they are too many, which they may not be in a given window.
    fn plan(&self, window: Option<&[DataPack]>) -> Result<Option<Vec<Job>>> {
        let count = AtomicUsize::new(0);
        let too_many = || window.is_none() && count.load(Ordering::Relaxed) > MAX_PIECES;
        let parts = self.flattened(window).map(|flattened| {
            let (file, first_block, layer) = flattened?;
            count.fetch_add(layer.locations.extents.len(), Ordering::Relaxed);
            Ok(if too_many() { Vec::new() } else { pieces(file, first_block, &layer, window) })
        });
        let parts: Vec<Vec<(DataPack, ChunkRef, Piece)>> = parts.collect::<Result<_>>()?;
        if too_many() {
            return Ok(None);
        }
        let mut all: Vec<_> = parts.into_iter().flatten().collect();
        all.par_sort_unstable_by_key(|(pack, chunk, piece)| {
            (*pack, chunk.offset, piece.first, piece.file, piece.block)
        });
        let mut jobs: Vec<Job> = Vec::new();
        for (pack, chunk, piece) in all {
            match jobs.last_mut() {
                Some(job) if job.pack == pack && job.chunk.offset == chunk.offset => {
                    if !job.chunk.is_same_chunk(&chunk) {
                        return Err(self.disagreement(pack, &chunk)?);
                    }
                    job.pieces.push(piece);
                }
                Some(job) if job.pack == pack && job.chunk.end() > chunk.offset => {
                    return Err(self.disagreement(pack, &chunk)?);
                }
                _ => jobs.push(Job { pack, chunk, pieces: vec![piece] }),
            }
        }
        Ok(Some(jobs))
    }

    fn disagreement(&self, pack: DataPack, chunk: &ChunkRef) -> Result<Error> {
        let object = data_object(self.manifest, pack)?;
        Ok(Error::corrupt(format!("{object} at {}", chunk.offset), "two block maps disagree about a chunk"))
    }

    /// Packs in order, cut so that each window's pieces are few enough; one pack makes a window, however many it has.
    fn windows(&self) -> Result<Vec<Vec<DataPack>>> {
        let counts = self.flattened(None).map(|flattened| {
            let mut counts = BTreeMap::new();
            let locations = flattened?.2.locations;
            for chunk in locations.extents.iter().filter_map(|extent| extent.chunk()) {
                *counts.entry(locations.packs[locations.chunks[chunk].pack as usize]).or_insert(0) += 1;
            }
            Ok(counts)
        });
        let add = |mut all: BTreeMap<DataPack, usize>, more: BTreeMap<DataPack, usize>| {
            for (pack, count) in more {
                *all.entry(pack).or_insert(0) += count;
            }
            Ok(all)
        };
        let counts = counts.try_reduce(BTreeMap::new, add)?;
        let mut windows: Vec<Vec<DataPack>> = Vec::new();
        let mut room = 0;
        for (pack, count) in counts {
            match windows.last_mut() {
                Some(window) if count <= room => window.push(pack),
                _ => {
                    windows.push(vec![pack]);
                    room = MAX_PIECES;
                }
            }
            room = room.saturating_sub(count);
        }
        Ok(windows)
    }

    /// Writes the pieces of `jobs`. Each worker begins with a share of its own, so that two seldom write to one file at once, and then helps
    /// the others.
    fn write(&self, jobs: &[Job]) -> Result<()> {
        let batches = batches(jobs);
        let workers = self.jobs.min(batches.len()).max(1);
        let shares: Vec<Share> = (0..workers).map(|worker| Share::of(worker, workers, batches.len())).collect();
        let failed = AtomicBool::new(false);
        let open = OpenFiles::default();
        let (flusher, to_flush) = bounded::<Arc<File>>(1);
        let work = |own: usize, flusher: Sender<Arc<File>>| {
            let mut worker = Worker {
                writer: self,
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
fn pieces(file: u32, first_block: u64, layer: &Layer, window: Option<&[DataPack]>) -> Vec<(DataPack, ChunkRef, Piece)> {
    let locations = &layer.locations;
    let piece = |extent: &crate::repo::Extent| {
        let chunk = locations.chunks[extent.chunk()?];
        let pack = locations.packs[chunk.pack as usize];
        let wanted = window.is_none_or(|window| window.binary_search(&pack).is_ok());
        let count = u16::try_from(extent.count).unwrap_or(u16::MAX);
        let piece = Piece { file, block: first_block + u64::from(extent.start), first: extent.first, count };
        wanted.then_some((pack, chunk, piece))
    };
    locations.extents.iter().filter_map(piece).collect()
}

/// Runs of jobs that are read at once.
fn batches(jobs: &[Job]) -> Vec<std::ops::Range<usize>> {
    let mut batches: Vec<std::ops::Range<usize>> = Vec::new();
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
        let target = &writer.files[at];
        let mut made = target.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = self.find(index) {
            return Ok(file);
        }
        let file = if *made { writer.sink.open(at, target)? } else { writer.sink.make(at, target)? };
        *made = true;
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
        let (raw, _) = decoded.map_err(|error| hurt(self.writer.files, job, object, &error))?;
        for piece in &job.pieces {
            let file = &self.writer.files[piece.file as usize];
            let blocks = &raw[usize::from(piece.first) * block_len..][..usize::from(piece.count) * block_len];
            let offset = piece.block * block_len as u64;
            let len = usize::try_from(file.entry.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(blocks.len());
            let bytes = &blocks[..len];
            let open = self.open.get(self.writer, piece.file)?;
            let written = open.file.write_all_at(bytes, open.begin + offset);
            written.map_err(|e| Error::io("write", file.entry.display_path().as_ref(), e))?;
            self.unflushed += len;
            if self.unflushed >= FLUSH_LEN {
                // Who is busy flushing comes to this file later, or the sync at the end does.
                let _ = self.flusher.try_send(open.file);
                self.unflushed = 0;
            }
            file.add_to_crc(offset, bytes);
            self.writer.progress.advance(len as u64);
        }
        Ok(())
    }
}

/// The error of a damaged chunk, with what it hurts.
fn hurt(files: &[TargetFile], job: &Job, object: &str, error: &Error) -> Error {
    let piece = job.pieces.first();
    let file = piece.map(|piece| files[piece.file as usize].entry.display_path()).unwrap_or_default();
    let block = piece.map_or(0, |piece| piece.block);
    let what = format!("{}; {file} has its block {block} there", error.what());
    Error::corrupt(format!("{object} at {}", job.chunk.offset), what).hint(TAKE_ANOTHER)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::FileKind;

    proptest! {
        #[test]
        fn the_crc_of_a_file_is_that_of_its_pieces_in_any_order(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..300),
            cuts in prop::collection::vec(1usize..40, 0..20),
            backwards: bool,
        ) {
            let len = bytes.len() as u64;
            let entry = FileEntry { path: Vec::new(), kind: FileKind::File, mode: 0, uid: 0, gid: 0, len, parts: Vec::new() };
            let file = TargetFile::new(entry, Owner { uid: 0, gid: 0, mode: 0 });
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts.into_iter().chain([bytes.len()]) {
                let end = (at + cut).min(bytes.len());
                pieces.push((at as u64, &bytes[at..end]));
                at = end;
            }
            if backwards {
                pieces.reverse();
            }
            for (offset, piece) in pieces.into_iter().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
                file.add_to_crc(offset, piece);
            }
            prop_assert_eq!(file.crc32c(), crc32c::crc32c(&bytes));
        }
    }
}
