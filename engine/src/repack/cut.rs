//! From layers to batches: which chunk goes where, decided before a byte is read.
//!
//! The [`Cutter`] takes the layers in order. A whole chunk becomes a copy at its first block. Used blocks of mixed chunks are collected in the
//! *open* chunk, which is built when it is full, or when too many layers wait for it. A batch is what one worker does at once; the layers
//! whose last chunk is in it go with it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use super::survey::{Key, Survey, Use};
use super::{MovePlan, Mover, Moves, NewChunk};
use crate::chunk::{Fingerprint, MAX_RAW_LEN};
use crate::error::{Error, Result};
use crate::repo::{ChunkRef, DataPack, Extent, Layer, LayerBuilder};

/// Stored bytes of a batch's chunks after which it is full.
pub(super) const BATCH_LEN: u64 = 4 << 20;
/// Raw bytes of the mixed chunks after which it is full, too.
const BATCH_RAW_LEN: u64 = 16 << 20;
/// Blocks of layers that wait for a chunk to be built or a batch to be full, at most (but for the last of them): some 20 MB.
pub(super) const WAITING_BLOCKS: usize = 1 << 19;

/// Blocks of a source chunk and where they go.
#[derive(Debug)]
pub(super) struct Piece {
    /// Index of the output, a [`Output::Build`].
    pub output: usize,
    /// First block in the output.
    pub to: usize,
    /// First block in the source.
    pub first: usize,
    /// Number of blocks.
    pub count: usize,
}

/// A chunk to read.
#[derive(Debug)]
pub(super) struct Source {
    pub pack: DataPack,
    pub chunk: ChunkRef,
    /// Where its blocks go; none if it is copied.
    pub pieces: Vec<Piece>,
}

/// A chunk to append.
#[derive(Debug)]
pub(super) enum Output {
    /// A source as it is stored.
    Copy { source: usize },
    /// Blocks of these fingerprints, compressed together.
    Build { fingerprints: Vec<Fingerprint> },
}

/// What a worker does at once.
#[derive(Default)]
pub(super) struct Batch {
    pub sources: Vec<Source>,
    /// In the order in which they are appended.
    pub outputs: Vec<(Output, Arc<NewChunk>)>,
    /// Stored bytes of the chunks that are met for the first time.
    pub progress_bytes: u64,
    known: HashMap<Key, usize>,
    stored_len: u64,
    raw_len: u64,
}

impl Batch {
    /// The index of a source, which is read once in a batch.
    fn source(&mut self, pack: DataPack, chunk: &ChunkRef) -> usize {
        *self.known.entry((pack, chunk.offset)).or_insert_with(|| {
            self.stored_len += u64::from(chunk.stored_len);
            self.sources.push(Source { pack, chunk: *chunk, pieces: Vec::new() });
            self.sources.len() - 1
        })
    }

    fn is_full(&self) -> bool {
        self.stored_len >= BATCH_LEN || self.raw_len >= BATCH_RAW_LEN
    }
}

/// A batch, and the jobs that are done when its outputs are appended.
pub(super) struct Step {
    pub batch: Batch,
    pub done: Vec<(usize, Draft)>,
}

/// A job's new layer while its chunks have no places yet.
pub(super) struct Draft {
    block_count: u32,
    limit: u32,
    chunks: Vec<DraftChunk>,
    /// Their `source` refers to `chunks`.
    extents: Vec<Extent>,
    fingerprints: Vec<Fingerprint>,
}

enum DraftChunk {
    Kept(ChunkRef, DataPack),
    Moved(Arc<NewChunk>),
}

impl Draft {
    /// The layer.
    pub fn finish(self) -> Result<Layer> {
        let mut builder = LayerBuilder::new(self.block_count);
        for chunk in &self.chunks {
            let (chunk, pack) = match chunk {
                DraftChunk::Kept(chunk, pack) => (*chunk, *pack),
                DraftChunk::Moved(new) => {
                    *new.placed.get().ok_or_else(|| Error::bug("a layer without the place of a chunk"))?
                }
            };
            builder.add_chunk(chunk, pack);
        }
        for extent in self.extents {
            builder.push(extent, &[]);
        }
        let mut layer = builder.finish();
        layer.locations.limit = self.limit;
        layer.fingerprints = self.fingerprints;
        Ok(layer)
    }
}

/// The job that is being cut.
struct Job {
    layer: Layer,
    survey: Survey,
    draft: Draft,
    /// The `source` of each chunk that is kept, and of each that is new.
    kept: Vec<Option<u32>>,
    moved: HashMap<u64, u32>,
    /// For each use of a whole chunk that was met, what it becomes.
    whole: Vec<Option<Arc<NewChunk>>>,
    met: Vec<bool>,
}

impl Job {
    fn new(layer: Layer, survey: Survey) -> Self {
        let locations = &layer.locations;
        let draft = Draft {
            block_count: locations.block_count,
            limit: locations.limit,
            chunks: Vec::new(),
            extents: Vec::with_capacity(locations.extents.len()),
            fingerprints: Vec::new(),
        };
        let (kept, whole) = (vec![None; locations.chunks.len()], vec![None; survey.uses.len()]);
        let met = vec![false; survey.uses.len()];
        Self { layer, survey, draft, kept, moved: HashMap::new(), whole, met }
    }

    fn add(chunks: &mut Vec<DraftChunk>, chunk: DraftChunk) -> u32 {
        chunks.push(chunk);
        u32::try_from(chunks.len()).unwrap_or(u32::MAX)
    }

    /// Maps an extent to the chunk that it is in.
    fn keep(&mut self, extent: Extent, index: usize) {
        let locations = &self.layer.locations;
        let chunk = locations.chunks[index];
        let kept = || DraftChunk::Kept(chunk, locations.packs[chunk.pack as usize]);
        let source = *self.kept[index].get_or_insert_with(|| Self::add(&mut self.draft.chunks, kept()));
        self.draft.extents.push(Extent { source, ..extent });
    }

    /// Maps blocks to a new chunk.
    fn push(&mut self, extent: Extent, new: &Arc<NewChunk>) {
        let add = || Self::add(&mut self.draft.chunks, DraftChunk::Moved(Arc::clone(new)));
        let source = *self.moved.entry(new.number).or_insert_with(add);
        self.draft.extents.push(Extent { source, ..extent });
    }
}

/// The chunk that collects blocks.
struct OpenChunk {
    new: Arc<NewChunk>,
    fingerprints: Vec<Fingerprint>,
    pieces: Vec<OpenPiece>,
}

struct OpenPiece {
    pack: DataPack,
    chunk: ChunkRef,
    first: u16,
    count: usize,
}

/// What became of a chunk that several jobs use.
struct SharedChunk {
    chunk: ChunkRef,
    fate: Fate,
}

enum Fate {
    Copied(Arc<NewChunk>),
    /// For each block that was met: where it is now.
    Scattered(BTreeMap<u16, (Arc<NewChunk>, u16)>),
}

/// Jobs that wait, and the blocks of their layers.
#[derive(Default)]
struct Queue {
    jobs: Vec<(usize, Draft)>,
    blocks: usize,
}

/// Cuts the moving of layers into batches.
pub(super) struct Cutter<'a> {
    mover: &'a Mover<'a>,
    plan: &'a MovePlan,
    moves: Moves<'a>,
    next_number: u64,
    shared: HashMap<Key, SharedChunk>,
    open: Option<OpenChunk>,
    batch: Batch,
    /// Jobs that wait for the open chunk.
    waiting: Queue,
    /// Jobs that wait for the batch.
    ready: Queue,
    steps: Vec<Step>,
}

impl<'a> Cutter<'a> {
    pub fn new(mover: &'a Mover<'a>, plan: &'a MovePlan, moves: Moves<'a>) -> Self {
        Self {
            mover,
            plan,
            moves,
            next_number: 0,
            shared: HashMap::new(),
            open: None,
            batch: Batch::default(),
            waiting: Queue::default(),
            ready: Queue::default(),
            steps: Vec::new(),
        }
    }

    /// Takes the layer of the next job.
    pub fn take(&mut self, index: usize, layer: Layer) -> Result<()> {
        if layer.locations.stored_blocks() != layer.fingerprints.len() as u64 {
            return Err(Error::bug("a layer to move without its fingerprints"));
        }
        let survey = self.mover.survey(&layer, self.moves)?;
        let mut job = Job::new(layer, survey);
        let mut fingerprint = 0;
        for at in 0..job.layer.locations.extents.len() {
            let extent = job.layer.locations.extents[at];
            match extent.chunk().map(|chunk| (chunk, job.survey.of_chunk[chunk])) {
                None => job.draft.extents.push(extent),
                Some((chunk, None)) => job.keep(extent, chunk),
                Some((_, Some(used))) => self.relocate(&mut job, used, extent, fingerprint)?,
            }
            fingerprint += extent.chunk().map_or(0, |_| extent.count as usize);
        }
        job.draft.fingerprints = job.layer.fingerprints;
        self.deliver(index, job.draft);
        Ok(())
    }

    /// Cuts what there is.
    pub fn finish(&mut self) {
        self.close_chunk();
        if !self.batch.outputs.is_empty() || !self.ready.jobs.is_empty() {
            self.cut();
        }
    }

    /// The steps that were cut, in order.
    pub fn steps(&mut self) -> impl Iterator<Item = Step> {
        self.steps.drain(..)
    }

    /// Maps an extent of a chunk that is to be moved to wherever its blocks go; `fingerprint` is the index of its first one.
    fn relocate(&mut self, job: &mut Job, used: usize, extent: Extent, fingerprint: usize) -> Result<()> {
        let Use { pack, chunk, blocks } = &job.survey.uses[used];
        let (pack, chunk) = (*pack, *chunk);
        let shared = self.plan.shared((pack, chunk.offset));
        let whole = shared.unwrap_or_else(|| blocks.are_all());
        if !std::mem::replace(&mut job.met[used], true) {
            self.meet(pack, &chunk, shared)?;
        }
        if !whole {
            return self.scatter(job, (pack, chunk), extent, fingerprint);
        }
        let new = match &job.whole[used] {
            Some(new) => Arc::clone(new),
            None => self.copy(pack, chunk),
        };
        job.push(extent, &new);
        job.whole[used] = Some(new);
        Ok(())
    }

    /// Meets a chunk in a job, perhaps not for the first time.
    fn meet(&mut self, pack: DataPack, chunk: &ChunkRef, shared: Option<bool>) -> Result<()> {
        if let Some(known) = self.shared.get(&(pack, chunk.offset)) {
            return self.mover.check_agreement(pack, &known.chunk, chunk);
        }
        self.batch.progress_bytes += u64::from(chunk.stored_len);
        if shared == Some(false) {
            let fate = Fate::Scattered(BTreeMap::new());
            self.shared.insert((pack, chunk.offset), SharedChunk { chunk: *chunk, fate });
        }
        Ok(())
    }

    /// Copies a whole chunk, unless that was done for an earlier job.
    fn copy(&mut self, pack: DataPack, chunk: ChunkRef) -> Arc<NewChunk> {
        let key = (pack, chunk.offset);
        if let Some(SharedChunk { fate: Fate::Copied(new), .. }) = self.shared.get(&key) {
            return Arc::clone(new);
        }
        let new = self.new_chunk();
        let source = self.batch.source(pack, &chunk);
        self.batch.outputs.push((Output::Copy { source }, Arc::clone(&new)));
        if self.plan.shared(key).is_some() {
            self.shared.insert(key, SharedChunk { chunk, fate: Fate::Copied(Arc::clone(&new)) });
        }
        self.cut_if_full();
        new
    }

    /// Puts blocks of a mixed chunk into open ones, unless they are in one.
    fn scatter(
        &mut self,
        job: &mut Job,
        (pack, chunk): (DataPack, ChunkRef),
        extent: Extent,
        fingerprint: usize,
    ) -> Result<()> {
        let key = (pack, chunk.offset);
        let mut done = 0;
        while done < extent.count {
            let first = extent.first + u16::try_from(done).map_err(|_| Error::bug("an extent beyond its chunk"))?;
            let start = extent.start + done;
            if let Some((new, at)) = self.scattered(key, first) {
                job.push(Extent { start, count: 1, source: 0, first: at }, &new);
                done += 1;
                continue;
            }
            let fresh = self.fresh(key, first, extent.count - done);
            let from = fingerprint + done as usize;
            let fingerprints = &job.layer.fingerprints[from..from + fresh as usize];
            let (new, at, count) = self.collect((pack, chunk), first, fingerprints)?;
            job.push(Extent { start, count, source: 0, first: at }, &new);
            done += count;
        }
        Ok(())
    }

    /// Where a block of a shared chunk is now.
    fn scattered(&self, key: Key, block: u16) -> Option<(Arc<NewChunk>, u16)> {
        match &self.shared.get(&key)?.fate {
            Fate::Scattered(blocks) => blocks.get(&block).cloned(),
            Fate::Copied(_) => None,
        }
    }

    /// How many of `count` blocks from `first` on are not in a new chunk yet.
    fn fresh(&self, key: Key, first: u16, count: u32) -> u32 {
        match self.shared.get(&key).map(|shared| &shared.fate) {
            Some(Fate::Scattered(blocks)) => {
                blocks.range(first..).next().map_or(count, |(block, _)| count.min(u32::from(block - first)))
            }
            _ => count,
        }
    }

    /// Puts blocks of a chunk into the open one, as many as there is room for; which it is, at which block, and how many.
    fn collect(
        &mut self,
        (pack, chunk): (DataPack, ChunkRef),
        first: u16,
        fingerprints: &[Fingerprint],
    ) -> Result<(Arc<NewChunk>, u16, u32)> {
        let max_blocks = (MAX_RAW_LEN / self.mover.block_len).clamp(1, usize::from(u16::MAX));
        let mut open = self.open.take().unwrap_or_else(|| self.open_chunk());
        let at = open.fingerprints.len();
        let count = fingerprints.len().min(max_blocks - at);
        open.fingerprints.extend_from_slice(&fingerprints[..count]);
        open.pieces.push(OpenPiece { pack, chunk, first, count });
        let full = open.fingerprints.len() == max_blocks;
        let new = Arc::clone(&open.new);
        self.open = Some(open);
        let at = u16::try_from(at).map_err(|_| Error::bug("a chunk of too many blocks"))?;
        if let Some(SharedChunk { fate: Fate::Scattered(blocks), .. }) = self.shared.get_mut(&(pack, chunk.offset)) {
            blocks.extend((0..count as u16).map(|block| (first + block, (Arc::clone(&new), at + block))));
        }
        if full {
            self.close_chunk();
        }
        Ok((new, at, count as u32))
    }

    fn open_chunk(&mut self) -> OpenChunk {
        OpenChunk { new: self.new_chunk(), fingerprints: Vec::new(), pieces: Vec::new() }
    }

    fn new_chunk(&mut self) -> Arc<NewChunk> {
        self.next_number += 1;
        Arc::new(NewChunk { number: self.next_number, placed: OnceLock::new() })
    }

    /// Has the open chunk built; whoever waited for it waits for the batch now.
    fn close_chunk(&mut self) {
        let Some(open) = self.open.take() else { return };
        let output = self.batch.outputs.len();
        let mut to = 0;
        for OpenPiece { pack, chunk, first, count } in open.pieces {
            let source = self.batch.source(pack, &chunk);
            let pieces = &mut self.batch.sources[source].pieces;
            pieces.push(Piece { output, to, first: usize::from(first), count });
            to += count;
        }
        self.batch.raw_len += (open.fingerprints.len() * self.mover.block_len) as u64;
        self.batch.outputs.push((Output::Build { fingerprints: open.fingerprints }, open.new));
        self.ready.jobs.append(&mut self.waiting.jobs);
        self.ready.blocks += std::mem::take(&mut self.waiting.blocks);
        self.cut_if_full();
    }

    /// Takes a job whose chunks are all in batches or in the open chunk.
    fn deliver(&mut self, index: usize, draft: Draft) {
        let queue = if self.open.is_some() { &mut self.waiting } else { &mut self.ready };
        queue.blocks += draft.fingerprints.len() + 1;
        queue.jobs.push((index, draft));
        if self.waiting.blocks + self.ready.blocks >= WAITING_BLOCKS {
            self.finish();
        }
    }

    fn cut_if_full(&mut self) {
        if self.batch.is_full() {
            self.cut();
        }
    }

    fn cut(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        self.steps.push(Step { batch, done: std::mem::take(&mut self.ready).jobs });
    }
}
