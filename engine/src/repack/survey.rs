//! Which blocks of which chunks are used, and what moving them would do.

use std::collections::HashMap;
use std::fmt;

use rayon::prelude::*;

use super::{Load, Mover, Moves};
use crate::error::{Error, ErrorKind, Result};
use crate::repo::{ChunkRef, DataPack, Layer};
use crate::units::{count, size};

/// A chunk's place.
pub(super) type Key = (DataPack, u64);

/// Some of a chunk's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Box<[u64]>,
    block_count: u16,
}

impl Blocks {
    fn none(block_count: u16) -> Self {
        Self { words: vec![0; usize::from(block_count).div_ceil(64)].into(), block_count }
    }

    fn add(&mut self, blocks: std::ops::Range<usize>) {
        for block in blocks {
            self.words[block / 64] |= 1 << (block % 64);
        }
    }

    fn add_all(&mut self, other: &Blocks) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether these are all of the chunk's blocks.
    pub fn are_all(&self) -> bool {
        self.count() == u64::from(self.block_count)
    }
}

/// A chunk that a layer uses and that is to be moved.
#[derive(Debug)]
pub(super) struct Use {
    pub pack: DataPack,
    pub chunk: ChunkRef,
    pub blocks: Blocks,
}

/// What a layer uses.
pub(super) struct Survey {
    /// Each chunk once, in the order of first use, however often the layer names it.
    pub uses: Vec<Use>,
    /// For each chunk that the layer names, its index in `uses`; `None` if it stays where it is.
    pub of_chunk: Vec<Option<usize>>,
}

impl Mover<'_> {
    /// Surveys a layer.
    pub(super) fn survey(&self, layer: &Layer, moves: Moves<'_>) -> Result<Survey> {
        let locations = &layer.locations;
        let moved: Vec<bool> = locations.packs.iter().map(moves).collect();
        let mut survey = Survey { uses: Vec::new(), of_chunk: vec![None; locations.chunks.len()] };
        let mut known = HashMap::new();
        for extent in &locations.extents {
            let Some(index) = extent.chunk().filter(|index| moved[locations.chunks[*index].pack as usize]) else {
                continue;
            };
            let chunk = locations.chunks[index];
            let pack = locations.packs[chunk.pack as usize];
            let at = *known.entry((pack, chunk.offset)).or_insert_with(|| {
                survey.uses.push(Use { pack, chunk, blocks: Blocks::none(chunk.block_count) });
                survey.uses.len() - 1
            });
            let used = &mut survey.uses[at];
            self.check_agreement(pack, &used.chunk, &chunk)?;
            let first = usize::from(extent.first);
            used.blocks.add(first..first + extent.count as usize);
            survey.of_chunk[index] = Some(at);
        }
        Ok(survey)
    }

    /// Refuses two accounts of one chunk that differ.
    pub(super) fn check_agreement(&self, pack: DataPack, one: &ChunkRef, other: &ChunkRef) -> Result<()> {
        if one.is_same_chunk(other) { Ok(()) } else { Err(self.disagreement(pack, one.offset)) }
    }

    fn disagreement(&self, pack: DataPack, offset: u64) -> Error {
        Error::corrupt(self.place(pack, offset), "two block maps disagree about a chunk")
    }
}

/// What moving would do.
#[derive(Debug, Default)]
pub(crate) struct MovePlan {
    /// Chunks that are copied as they are stored.
    pub chunks_whole: u64,
    /// Their stored bytes.
    pub bytes_whole: u64,
    /// Chunks of which some blocks are put into new ones.
    pub chunks_mixed: u64,
    /// Their stored bytes.
    pub bytes_mixed: u64,
    /// Blocks that are put into new chunks.
    pub blocks_mixed: u64,
    /// The chunks that several jobs use, and whether each is whole.
    shared: HashMap<Key, bool>,
}

impl fmt::Display for MovePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chunks_whole, bytes_whole, chunks_mixed, bytes_mixed, blocks_mixed, .. } = self;
        write!(f, "{} as they are ({})", count(*chunks_whole, "chunk"), size(*bytes_whole))?;
        let (blocks, chunks) = (count(*blocks_mixed, "block"), count(*chunks_mixed, "chunk"));
        write!(f, ", {blocks} out of {chunks} ({}), compressed again", size(*bytes_mixed))
    }
}

impl MovePlan {
    /// Stored bytes of all chunks to move: what is told to who watches.
    pub fn bytes(&self) -> u64 {
        self.bytes_whole + self.bytes_mixed
    }

    /// Whether a chunk that several jobs use is whole; `None` for one that a single job uses.
    pub(super) fn shared(&self, key: Key) -> Option<bool> {
        self.shared.get(&key).copied()
    }

    fn add(mut self, other: MovePlan) -> MovePlan {
        self.chunks_whole += other.chunks_whole;
        self.bytes_whole += other.bytes_whole;
        self.chunks_mixed += other.chunks_mixed;
        self.bytes_mixed += other.bytes_mixed;
        self.blocks_mixed += other.blocks_mixed;
        self.shared.extend(other.shared);
        self
    }
}

/// What one job uses of a chunk.
struct Ref {
    offset: u64,
    stored_len: u32,
    block_count: u16,
    /// `None`: all of its blocks.
    blocks: Option<Blocks>,
}

impl Ref {
    fn new(used: Use) -> Self {
        let ChunkRef { offset, stored_len, block_count, .. } = used.chunk;
        Self { offset, stored_len, block_count, blocks: (!used.blocks.are_all()).then_some(used.blocks) }
    }
}

/// What the jobs use of each pack.
type Refs = HashMap<DataPack, Vec<Ref>>;

pub(super) fn plan<J: Sync>(mover: &Mover<'_>, jobs: &[J], load: Load<'_, J>, moves: Moves<'_>) -> Result<MovePlan> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(mover.jobs.max(1)).build();
    let threads = threads.map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start threads").because(e))?;
    threads.install(|| {
        let refs = |mut refs: Refs, job: &J| {
            for used in mover.survey(&load(job)?, moves)?.uses {
                refs.entry(used.pack).or_default().push(Ref::new(used));
            }
            Ok(refs)
        };
        let refs =
            jobs.par_iter().try_fold(Refs::new, refs).try_reduce(Refs::new, |one, other| Ok(join(one, other)))?;
        let plans = refs.into_par_iter().map(|(pack, refs)| plan_pack(mover, pack, refs));
        plans.try_reduce(MovePlan::default, |one, other| Ok(one.add(other)))
    })
}

fn join(mut one: Refs, other: Refs) -> Refs {
    for (pack, refs) in other {
        one.entry(pack).or_default().extend(refs);
    }
    one
}

fn plan_pack(mover: &Mover<'_>, pack: DataPack, mut refs: Vec<Ref>) -> Result<MovePlan> {
    refs.sort_unstable_by_key(|used| used.offset);
    let mut plan = MovePlan::default();
    for refs in refs.chunk_by(|one, other| one.offset == other.offset) {
        let Ref { offset, stored_len, block_count, .. } = refs[0];
        if refs.iter().any(|other| (other.stored_len, other.block_count) != (stored_len, block_count)) {
            return Err(mover.disagreement(pack, offset));
        }
        let used = union(refs);
        let whole = used.are_all();
        let (chunks, bytes) = match whole {
            true => (&mut plan.chunks_whole, &mut plan.bytes_whole),
            false => (&mut plan.chunks_mixed, &mut plan.bytes_mixed),
        };
        *chunks += 1;
        *bytes += u64::from(stored_len);
        plan.blocks_mixed += if whole { 0 } else { used.count() };
        if refs.len() > 1 {
            plan.shared.insert((pack, offset), whole);
        }
    }
    Ok(plan)
}

/// The blocks of one chunk that all of these use.
fn union(refs: &[Ref]) -> Blocks {
    let mut used = Blocks::none(refs[0].block_count);
    for blocks in refs.iter().map(|used| used.blocks.as_ref()) {
        match blocks {
            Some(blocks) => used.add_all(blocks),
            None => used.add(0..usize::from(used.block_count)),
        }
    }
    used
}
