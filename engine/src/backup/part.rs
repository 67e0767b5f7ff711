//! From what workers found in the slices of a part to the part's block map.

use std::collections::BTreeSet;

use crate::chunk::Fingerprint;
use crate::error::{Error, Result};
use crate::repo::{
    ChunkRef, DataPack, Depth, Extent, Layer, LayerBuilder, LayerPlace, Manifest, PackKind, PackName, Packer, PartMap,
    RECORD_CHECK_LEN, Repository, encode_fingerprints,
};

/// Layers of a stack at most.
const MAX_LAYERS: usize = 8;

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

/// Stacks new layers upon the parent's.
pub(super) struct Stack<'a> {
    /// Where the parent is.
    pub repo: &'a Repository,
    /// The parent, if there is one.
    pub parent: Option<&'a Manifest>,
    /// Takes metadata records.
    pub map: &'a Packer,
}

impl Stack<'_> {
    /// The fingerprints of every block of a part of the parent.
    pub fn fingerprints(&self, map: &PartMap) -> Result<Vec<Fingerprint>> {
        let flat = self.repo.flatten(self.parent()?, map, Depth::Fingerprints)?;
        flat.all_fingerprints().ok_or_else(|| Error::bug("a flattened layer without its fingerprints"))
    }

    /// Writes what the slices of a part found as a layer over the parent's, unless nothing changed.
    pub fn write(
        &self,
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
        Ok(done(self.stack(builder.finish(), parent_map.map_or(&[], |map| &map.layers))?))
    }

    /// Puts `layer` over `older`, newest first; it swallows those that are not more than twice as large.
    fn stack(&self, mut layer: Layer, mut older: &[LayerPlace]) -> Result<PartMap> {
        while let [next, rest @ ..] = older {
            let small = next.stored_blocks() <= 2 * layer.locations.stored_blocks();
            if !small && older.len() < MAX_LAYERS {
                break;
            }
            layer = layer.over(&self.repo.read_layer(self.parent()?, next, Depth::Fingerprints)?);
            older = rest;
        }
        let mut packs: BTreeSet<PackName> = layer.locations.packs.iter().map(pack_name).collect();
        for place in older {
            let locations = self.repo.read_layer(self.parent()?, place, Depth::Locations)?.locations;
            packs.extend(locations.packs.iter().map(pack_name));
        }
        let mut layers = vec![self.put(&layer)?];
        layers.extend_from_slice(older);
        Ok(PartMap { layers, data: packs.into_iter().collect() })
    }

    fn put(&self, layer: &Layer) -> Result<LayerPlace> {
        let locations = layer.locations.encode()?;
        let fingerprints = encode_fingerprints(&layer.fingerprints);
        let checked_len = |body: &[u8]| u32::try_from(body.len() + RECORD_CHECK_LEN).unwrap_or(u32::MAX);
        let locations_len = checked_len(&locations);
        let fingerprints_len = if fingerprints.is_empty() { 0 } else { checked_len(&fingerprints) };
        let bodies = [locations, fingerprints].into_iter().filter(|body| !body.is_empty()).collect();
        let place = self.map.append_checked(bodies)?;
        Ok(LayerPlace { pack: place.pack, offset: place.offset, locations_len, fingerprints_len })
    }

    fn parent(&self) -> Result<&Manifest> {
        self.parent.ok_or_else(|| Error::bug("layers of a parent that there is not"))
    }
}

fn pack_name(pack: &DataPack) -> PackName {
    PackName { run: pack.run, seq: pack.seq, kind: PackKind::Data }
}
