//! From what workers found in the slices of a part to the part's block map.

use crate::chunk::Fingerprint;
use crate::error::{Error, Result};
use crate::repo::{ChunkRef, DataPack, Extent, LayerBuilder, PartMap, Stack};

/// What changed in a slice, and where it is stored now.
#[derive(Debug)]
pub(super) struct SliceMap {
    /// First block.
    pub start: u32,
    /// One past the last block that was read.
    pub end: u32,
    /// The file's length, if it ended in this slice before it was expected to.
    pub file_end: Option<u64>,
    /// Blocks that differ from the parent's.
    pub blocks_changed: u64,
    /// Of the changed blocks that are not zero, ascending.
    pub fingerprints: Vec<Fingerprint>,
    chunks: Vec<(ChunkRef, DataPack)>,
    extents: Vec<Extent>,
}

impl SliceMap {
    /// Nothing yet of the slice that begins at `start`.
    pub fn new(start: u32) -> Self {
        Self {
            start,
            end: start,
            file_end: None,
            blocks_changed: 0,
            fingerprints: Vec::new(),
            chunks: Vec::new(),
            extents: Vec::new(),
        }
    }

    /// A block that is zero now.
    pub fn push_zero(&mut self, block: u32) {
        match self.extents.last_mut() {
            Some(last) if last.source == 0 && last.end() == block => last.count += 1,
            _ => self.extents.push(Extent { start: block, count: 1, source: 0, first: 0 }),
        }
    }

    /// Blocks that are stored in `chunk`; in whatever order chunks are placed.
    pub fn push(&mut self, chunk: ChunkRef, pack: DataPack, extent: Extent) {
        if self.chunks.last().map(|(last, of)| (last.offset, *of)) != Some((chunk.offset, pack)) {
            self.chunks.push((chunk, pack));
        }
        let source = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        self.extents.push(Extent { source, ..extent });
    }

    /// Adds the slice's extents below `end` to the builder.
    fn build(&mut self, builder: &mut LayerBuilder, end: u32) -> Result<()> {
        self.extents.sort_unstable_by_key(|extent| extent.start);
        let mut sources = vec![None; self.chunks.len()];
        let mut fingerprints = self.fingerprints.as_slice();
        for extent in &self.extents {
            let count = extent.count.min(end.saturating_sub(extent.start));
            let Some(index) = extent.chunk() else {
                if count > 0 {
                    builder.push_zero(extent.start, count);
                }
                continue;
            };
            let beyond = || Error::bug("more blocks than fingerprints");
            let (these, rest) = fingerprints.split_at_checked(extent.count as usize).ok_or_else(beyond)?;
            fingerprints = rest;
            if count > 0 {
                let (chunk, pack) = self.chunks[index];
                let source = *sources[index].get_or_insert_with(|| builder.add_chunk(chunk, pack));
                builder.push(Extent { count, source, ..*extent }, &these[..count as usize]);
            }
        }
        Ok(())
    }
}

/// A part whose block map is written.
#[derive(Debug)]
pub(super) struct DonePart {
    /// The map; without layers if the part turned out to be empty.
    pub map: PartMap,
    /// The file's length, if it ends in this part before it was expected to.
    pub end: Option<u64>,
    /// Blocks that differ from the parent's.
    pub blocks_changed: u64,
}

/// Writes what the slices of a part found as a layer over the parent's, unless nothing changed.
pub(super) fn write(
    stack: &Stack<'_>,
    mut slices: Vec<SliceMap>,
    parent_blocks: usize,
    parent_map: Option<&PartMap>,
) -> Result<DonePart> {
    slices.sort_unstable_by_key(|slice| slice.start);
    let last = slices.iter().position(|slice| slice.file_end.is_some()).map_or(slices.len(), |at| at + 1);
    slices.truncate(last);
    let file_end = slices.last().and_then(|slice| slice.file_end);
    let block_count = slices.last().map_or(0, |slice| slice.end);
    let blocks_changed = slices.iter().map(|slice| slice.blocks_changed).sum();
    let done = |map| DonePart { map, end: file_end, blocks_changed };
    if block_count == 0 {
        return Ok(done(PartMap::default()));
    }
    if let (Some(map), 0, true) = (parent_map, blocks_changed, parent_blocks == block_count as usize) {
        return Ok(done(map.clone()));
    }
    let mut builder = LayerBuilder::new(block_count);
    for slice in &mut slices {
        slice.build(&mut builder, block_count)?;
    }
    Ok(done(stack.add(builder.finish(), parent_map.map_or(&[], |map| &map.layers))?))
}
