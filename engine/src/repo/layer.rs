//! Block maps: where each block of a part of a file is stored (`format.md`, Block maps).
//!
//! A [`Layer`] says it for the blocks that changed in one backup; a stack of layers, newest first, says it for all. The one rule
//! that must never break is that of the *limit*: a layer hides everything that older layers say about blocks at or beyond its
//! `block_count`. [`Layer::over`] is the only place that applies it, and [`Layer::is_complete`] proves that nothing is left
//! unsaid. What goes wrong: a stack that leaves a block unmapped, or extents that lead out of their chunk; decoding notices.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::names::BackupId;
use super::pack::{MAX_PACK_LEN, RECORD_CHECK_LEN};
use crate::chunk::{ChunkId, Codec, Fingerprint, MAX_RAW_LEN, Shape};
use crate::error::{Error, Result};

/// Blocks of a part: 1 GiB of 8 KiB blocks, a PostgreSQL segment.
pub const PART_BLOCKS: u32 = 131_072;

/// Names a data pack from within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DataPack {
    /// The run that wrote it.
    pub run: BackupId,
    /// Its number.
    pub seq: u32,
}

/// A stored chunk, from within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Index of its pack in the layer's packs.
    pub pack: u32,
    /// Offset in the pack.
    pub offset: u64,
    /// Bytes in the pack.
    pub stored_len: u32,
    /// Blocks in the chunk.
    pub block_count: u16,
    /// How it is stored.
    pub codec: Codec,
    /// What proves it.
    pub id: ChunkId,
}

impl ChunkRef {
    /// Whether two block maps mean the same by what is at one place in one pack.
    pub(crate) fn is_same_chunk(&self, other: &ChunkRef) -> bool {
        let account = |chunk: &ChunkRef| (chunk.id, chunk.stored_len, chunk.block_count, chunk.codec);
        account(self) == account(other)
    }

    /// Where its bytes end in the pack.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.stored_len.into())
    }
}

/// A run of blocks of the part that are stored one after the other, or are all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First block in the part.
    pub start: u32,
    /// Number of blocks.
    pub count: u32,
    /// 0: zero blocks. Otherwise the chunk's index plus one.
    pub source: u32,
    /// First block in the chunk.
    pub first: u16,
}

impl Extent {
    /// One past the last block.
    pub fn end(&self) -> u32 {
        self.start + self.count
    }

    /// The chunk's index, unless the blocks are zero.
    pub fn chunk(&self) -> Option<usize> {
        self.source.checked_sub(1).map(|index| index as usize)
    }

    /// The part of it that begins `skip` blocks on and has `count` blocks.
    fn slice(&self, skip: u32, count: u32) -> Extent {
        let first = if self.source == 0 { 0 } else { self.first + u16::try_from(skip).unwrap_or(u16::MAX) };
        Extent { start: self.start + skip, count, source: self.source, first }
    }

    /// Whether `next` goes on where this one ends.
    fn continues_in(&self, next: &Extent) -> bool {
        let same_run = self.source == 0 || u32::from(self.first) + self.count == u32::from(next.first);
        self.end() == next.start && self.source == next.source && same_run
    }
}

/// The first record of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locations {
    /// Length of the part, in blocks, when the layer was written.
    pub block_count: u32,
    /// Blocks from here on are not looked up in older layers; at most `block_count`.
    pub limit: u32,
    /// The packs that hold the chunks.
    pub packs: Vec<DataPack>,
    /// The chunks that hold the blocks.
    pub chunks: Vec<ChunkRef>,
    /// The blocks, ascending.
    pub extents: Vec<Extent>,
}

impl Locations {
    /// Encodes the record's body.
    ///
    /// # Errors
    /// `Bug` if a library refuses.
    pub fn encode(&self) -> Result<Vec<u8>> {
        super::encode(self)
    }

    /// Decodes a record's body and proves that nothing in it leads astray.
    ///
    /// # Errors
    /// `Corrupt`, at `place`.
    pub fn decode(body: &[u8], block_len: usize, place: &str) -> Result<Self> {
        let locations: Self = super::decode(body, place)?;
        locations
            .check(block_len)
            .map_err(|what| Error::corrupt(place, format!("the block map is damaged: {what}")))?;
        Ok(locations)
    }

    fn check(&self, block_len: usize) -> std::result::Result<(), String> {
        if self.block_count > PART_BLOCKS || self.limit > self.block_count {
            return Err(format!("{} blocks in a part, limit {}", self.block_count, self.limit));
        }
        for chunk in &self.chunks {
            let raw_len = Shape { block_len, block_count: usize::from(chunk.block_count) }.raw_len();
            let stored_len = chunk.stored_len as usize;
            let fits = chunk.block_count > 0 && (raw_len <= MAX_RAW_LEN || chunk.block_count == 1);
            let is_in_pack = (chunk.pack as usize) < self.packs.len() && chunk.offset <= MAX_PACK_LEN;
            if !fits || stored_len > raw_len || !is_in_pack {
                return Err(format!(
                    "a chunk of {} blocks, {stored_len} bytes, at {} in pack {}",
                    chunk.block_count, chunk.offset, chunk.pack
                ));
            }
        }
        let mut end = 0;
        for extent in &self.extents {
            let inside = extent.start.checked_add(extent.count).is_some_and(|end| end <= self.block_count);
            if extent.count == 0 || extent.start < end || !inside {
                return Err(format!("blocks {} + {} of {}", extent.start, extent.count, self.block_count));
            }
            if let Some(index) = extent.chunk() {
                let chunk = self.chunks.get(index).ok_or_else(|| format!("no chunk {index}"))?;
                if u64::from(extent.first) + u64::from(extent.count) > u64::from(chunk.block_count) {
                    return Err(format!(
                        "blocks {} + {} of a chunk of {}",
                        extent.first, extent.count, chunk.block_count
                    ));
                }
            }
            end = extent.end();
        }
        Ok(())
    }

    /// The blocks that are in chunks.
    pub fn stored_blocks(&self) -> u64 {
        self.extents.iter().filter(|extent| extent.source != 0).map(|extent| u64::from(extent.count)).sum()
    }
}

/// A layer of a block map, or several flattened into one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Where the blocks are.
    pub locations: Locations,
    /// The fingerprint of each block that is in a chunk, in order; empty in a layer that was read without them.
    pub fingerprints: Vec<Fingerprint>,
}

impl Layer {
    /// Whether every block of the part is mapped.
    pub fn is_complete(&self) -> bool {
        let extents = &self.locations.extents;
        let mapped: u64 = extents.iter().map(|extent| u64::from(extent.count)).sum();
        mapped == u64::from(self.locations.block_count)
    }

    /// The fingerprint of every block of the part, [`Fingerprint::ZERO_PAGE`] for zero blocks; `None` unless the layer is complete
    /// and was read with its fingerprints.
    pub fn all_fingerprints(&self) -> Option<Vec<Fingerprint>> {
        let known = self.locations.stored_blocks() == self.fingerprints.len() as u64;
        if !known || !self.is_complete() {
            return None;
        }
        let mut all = vec![Fingerprint::ZERO_PAGE; self.locations.block_count as usize];
        let mut stored = self.fingerprints.as_slice();
        for extent in self.locations.extents.iter().filter(|extent| extent.source != 0) {
            let (these, rest) = stored.split_at(extent.count as usize);
            all[extent.start as usize..extent.end() as usize].copy_from_slice(these);
            stored = rest;
        }
        Some(all)
    }

    /// This layer with everything of `older` that it does not hide, as one layer.
    ///
    /// Fingerprints are kept if both layers have theirs.
    #[must_use]
    pub fn over(&self, older: &Layer) -> Layer {
        let mut sources = [Source::new(self), Source::new(older)];
        let hidden = visible(&older.locations.extents, &self.locations);
        let mut pieces: Vec<(usize, usize, Extent)> =
            hidden.into_iter().map(|(index, extent)| (1, index, extent)).collect();
        pieces.extend(self.locations.extents.iter().copied().enumerate().map(|(index, extent)| (0, index, extent)));
        pieces.sort_unstable_by_key(|(_, _, extent)| extent.start);
        let mut builder = LayerBuilder::new(self.locations.block_count);
        builder.layer.locations.limit = self.locations.limit.min(older.locations.limit);
        for (which, index, extent) in pieces {
            sources[which].copy(index, extent, &mut builder);
        }
        builder.finish()
    }
}

impl Layer {
    /// The blocks of this layer that are seen through `newer` ones, in ascending order.
    #[must_use]
    pub fn seen_through<'a>(&self, newer: impl IntoIterator<Item = &'a Locations>) -> Vec<Range<u32>> {
        let mut extents = self.locations.extents.clone();
        for layer in newer {
            extents = visible(&extents, layer).into_iter().map(|(_, extent)| extent).collect();
        }
        union(extents.iter().map(|extent| extent.start..extent.end()).collect())
    }

    /// What this layer says of the blocks in `ranges`, which ascend and don't overlap; its length and its limit stay.
    ///
    /// Where nobody sees the other blocks, because newer layers hide them in every stack that the layer is in, it can take this one's place.
    #[must_use]
    pub fn restricted(&self, ranges: &[Range<u32>]) -> Layer {
        let mut builder = LayerBuilder::new(self.locations.block_count);
        builder.layer.locations.limit = self.locations.limit;
        let mut source = Source::new(self);
        let mut ranges = ranges.iter().peekable();
        for (index, extent) in self.locations.extents.iter().enumerate() {
            while ranges.next_if(|range| range.end <= extent.start).is_some() {}
            let overlapping = ranges.clone().take_while(|range| range.start < extent.end());
            for range in overlapping {
                let (start, end) = (range.start.max(extent.start), range.end.min(extent.end()));
                source.copy(index, extent.slice(start - extent.start, end - start), &mut builder);
            }
        }
        builder.finish()
    }
}

/// The ranges in ascending order, those that overlap or touch joined.
pub(crate) fn union(mut ranges: Vec<Range<u32>>) -> Vec<Range<u32>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u32>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The parts of `older` extents that a newer layer neither maps nor cuts off.
fn visible(older: &[Extent], newer: &Locations) -> Vec<(usize, Extent)> {
    let mut pieces = Vec::with_capacity(older.len());
    let mut hiding = newer.extents.iter().peekable();
    for (index, extent) in older.iter().enumerate() {
        let end = extent.end().min(newer.limit);
        let mut at = extent.start;
        while at < end {
            while hiding.next_if(|hider| hider.end() <= at).is_some() {}
            let next = hiding.peek().map_or(end, |hider| hider.start.min(end));
            if next > at {
                pieces.push((index, extent.slice(at - extent.start, next - at)));
                at = next;
            } else {
                at = hiding.peek().map_or(end, |hider| hider.end());
            }
        }
    }
    pieces
}

/// A layer that is being copied from: where its chunks went, and where each extent's fingerprints begin.
struct Source<'a> {
    layer: &'a Layer,
    chunks: Vec<Option<u32>>,
    fingerprint_starts: Vec<usize>,
}

impl<'a> Source<'a> {
    fn new(layer: &'a Layer) -> Self {
        let mut next = 0;
        let starts = layer.locations.extents.iter().map(|extent| {
            let start = next;
            next += if extent.source == 0 { 0 } else { extent.count as usize };
            start
        });
        let fingerprint_starts = starts.collect();
        Self { layer, chunks: vec![None; layer.locations.chunks.len()], fingerprint_starts }
    }

    /// Copies `piece`, a part of the extent `index`, to the builder.
    fn copy(&mut self, index: usize, piece: Extent, builder: &mut LayerBuilder) {
        let locations = &self.layer.locations;
        let Some(chunk_index) = piece.chunk() else {
            builder.push_zero(piece.start, piece.count);
            return;
        };
        let chunk = &locations.chunks[chunk_index];
        let pack = locations.packs[chunk.pack as usize];
        let source = *self.chunks[chunk_index].get_or_insert_with(|| builder.add_chunk(*chunk, pack));
        let whole = &locations.extents[index];
        let from = self.fingerprint_starts[index] + (piece.start - whole.start) as usize;
        let fingerprints = self.layer.fingerprints.get(from..from + piece.count as usize).unwrap_or(&[]);
        builder.push(Extent { source, ..piece }, fingerprints);
    }
}

/// Puts a layer together from extents in ascending order.
#[derive(Debug)]
pub struct LayerBuilder {
    layer: Layer,
    packs: HashMap<DataPack, u32>,
}

impl LayerBuilder {
    /// A layer of a part of `block_count` blocks.
    pub fn new(block_count: u32) -> Self {
        let locations = Locations { block_count, limit: block_count, ..Locations::default() };
        Self { layer: Layer { locations, fingerprints: Vec::new() }, packs: HashMap::new() }
    }

    /// Adds a chunk in `pack` and returns the `source` of its extents.
    pub fn add_chunk(&mut self, chunk: ChunkRef, pack: DataPack) -> u32 {
        let locations = &mut self.layer.locations;
        let index = *self.packs.entry(pack).or_insert_with(|| {
            locations.packs.push(pack);
            (locations.packs.len() - 1) as u32
        });
        locations.chunks.push(ChunkRef { pack: index, ..chunk });
        locations.chunks.len() as u32
    }

    /// Maps blocks to a chunk that was added.
    pub fn push(&mut self, extent: Extent, fingerprints: &[Fingerprint]) {
        self.layer.fingerprints.extend_from_slice(fingerprints);
        let extents = &mut self.layer.locations.extents;
        match extents.last_mut() {
            Some(last) if last.continues_in(&extent) => last.count += extent.count,
            _ => extents.push(extent),
        }
    }

    /// Maps blocks that are all zero.
    pub fn push_zero(&mut self, start: u32, count: u32) {
        self.push(Extent { start, count, source: 0, first: 0 }, &[]);
    }

    /// The layer.
    pub fn finish(self) -> Layer {
        self.layer
    }
}

/// Encodes fingerprints as the second record of a layer.
pub fn encode_fingerprints(fingerprints: &[Fingerprint]) -> Vec<u8> {
    fingerprints.iter().flat_map(|fingerprint| fingerprint.0).collect()
}

/// Bytes of the second record of a layer with so many blocks in chunks, checksum included; it is not there without any.
pub fn fingerprints_len(count: u64) -> u64 {
    if count == 0 { 0 } else { 16 * count + RECORD_CHECK_LEN as u64 }
}

/// Decodes the second record of a layer.
///
/// # Errors
/// `Corrupt`, at `place`, unless there are `count` of them.
pub fn decode_fingerprints(body: &[u8], count: u64, place: &str) -> Result<Vec<Fingerprint>> {
    if body.len() as u64 != 16 * count {
        return Err(Error::corrupt(place, format!("{} bytes of fingerprints for {count} blocks", body.len())));
    }
    let each = body.chunks_exact(16).map(|bytes| {
        let mut fingerprint = Fingerprint::default();
        fingerprint.0.copy_from_slice(bytes);
        fingerprint
    });
    Ok(each.collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RUN: &str = "20261122T160312Z-1a2b3c4d";

    /// What a naive map says of a block: nothing, zero, or the fingerprint of what is stored.
    type Model = Vec<Option<Option<u8>>>;

    /// A layer that maps `blocks`; chunks of 3 blocks hold whatever comes next, so that extents begin inside of chunks.
    fn layer(model: &Model) -> Layer {
        let mut builder = LayerBuilder::new(model.len() as u32);
        let run = RUN.parse().unwrap();
        let mut in_chunk = 3;
        let mut source = 0;
        for (block, state) in model.iter().enumerate() {
            match state {
                None => {}
                Some(None) => builder.push_zero(block as u32, 1),
                Some(Some(value)) => {
                    if in_chunk == 3 {
                        let chunk = ChunkRef {
                            pack: 0,
                            offset: block as u64,
                            stored_len: 1,
                            block_count: 3,
                            codec: Codec::Raw,
                            id: ChunkId([*value; 16]),
                        };
                        source = builder.add_chunk(chunk, DataPack { run, seq: u32::from(*value) });
                        in_chunk = 0;
                    }
                    let extent = Extent { start: block as u32, count: 1, source, first: in_chunk };
                    builder.push(extent, &[Fingerprint([*value; 16])]);
                    in_chunk += 1;
                }
            }
        }
        builder.finish()
    }

    fn model_of(layer: &Layer) -> Model {
        let mut model = vec![None; layer.locations.block_count as usize];
        let mut fingerprints = layer.fingerprints.iter();
        for extent in &layer.locations.extents {
            for block in extent.start..extent.end() {
                let value = (extent.source != 0).then(|| fingerprints.next().unwrap().0[0]);
                model[block as usize] = Some(value);
            }
        }
        model
    }

    fn models() -> impl Strategy<Value = Model> {
        let state = prop_oneof![Just(None), Just(Some(None)), (1u8..9).prop_map(|value| Some(Some(value)))];
        prop::collection::vec(state, 0..24)
    }

    proptest! {
        #[test]
        fn a_layer_over_another_says_what_a_naive_map_would(newer in models(), older in models()) {
            let flat = layer(&newer).over(&layer(&older));
            let expected: Model = newer.iter().enumerate()
                .map(|(block, state)| state.or_else(|| older.get(block).copied().flatten()))
                .collect();
            prop_assert_eq!(model_of(&flat), expected);
            prop_assert!(flat.locations.check(8192).is_ok());
        }

        #[test]
        fn flattening_is_associative(a in models(), b in models(), c in models()) {
            let (a, b, c) = (layer(&a), layer(&b), layer(&c));
            prop_assert_eq!(model_of(&a.over(&b).over(&c)), model_of(&a.over(&b.over(&c))));
        }

        #[test]
        fn a_layer_without_what_nobody_sees_can_take_its_place(a in models(), b in models(), c in models()) {
            let (a, b, c) = (layer(&a), layer(&b), layer(&c));
            // One stack has all three, another only the lower two.
            let seen = [c.seen_through([&b.locations, &a.locations]), c.seen_through([&b.locations])].concat();
            let restricted = c.restricted(&union(seen));
            prop_assert!(restricted.locations.check(8192).is_ok());
            prop_assert_eq!(model_of(&a.over(&b).over(&restricted)), model_of(&a.over(&b).over(&c)));
            prop_assert_eq!(model_of(&b.over(&restricted)), model_of(&b.over(&c)));
            let alone = b.restricted(&b.seen_through([&a.locations]));
            let blocks = |layer: &Layer| layer.locations.extents.iter().map(|e| e.count).sum::<u32>();
            prop_assert_eq!(model_of(&a.over(&alone).over(&c)), model_of(&a.over(&b).over(&c)));
            prop_assert!(blocks(&alone) <= blocks(&b));
        }

        #[test]
        fn a_layer_reads_back_as_it_was_written(model in models()) {
            let layer = layer(&model);
            let body = layer.locations.encode().unwrap();
            prop_assert_eq!(&Locations::decode(&body, 8192, "here").unwrap(), &layer.locations);
            let fingerprints = encode_fingerprints(&layer.fingerprints);
            let count = layer.locations.stored_blocks();
            prop_assert_eq!(decode_fingerprints(&fingerprints, count, "here").unwrap(), layer.fingerprints);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            let _ = Locations::decode(&bytes, 8192, "here");
            let compressed = zstd::bulk::compress(&bytes, 1).unwrap();
            let _ = Locations::decode(&compressed, 8192, "here");
        }
    }

    #[test]
    fn a_truncation_hides_old_blocks_even_after_the_file_grew_again() {
        let old = layer(&vec![Some(Some(1)); 6]);
        let truncated = layer(&vec![None; 2]);
        let mut regrown = vec![None; 6];
        regrown[5] = Some(None);
        let flat = layer(&regrown).over(&truncated).over(&old);
        assert!(!flat.is_complete(), "blocks 2, 3 and 4 belong to nobody");
        assert_eq!(flat.all_fingerprints(), None);
    }

    #[test]
    fn locations_that_lead_astray_are_refused() {
        let good = layer(&vec![Some(Some(1)); 6]).locations;
        let spoil = |change: fn(&mut Locations)| {
            let mut bad = good.clone();
            change(&mut bad);
            Locations::decode(&bad.encode().unwrap(), 8192, "here").unwrap_err().kind()
        };
        let changes: [fn(&mut Locations); 11] = [
            |l| l.chunks[0].offset = u64::MAX,
            |l| l.chunks[0].offset = MAX_PACK_LEN + 1,
            |l| (l.block_count, l.limit) = (5, 5),
            |l| l.block_count = PART_BLOCKS + 1,
            |l| l.limit = 7,
            |l| l.extents[0].count = 0,
            |l| l.extents[0].source = 9,
            |l| l.extents[1].first = 1,
            |l| l.extents[1].start = 2,
            |l| l.chunks[0].pack = 9,
            |l| l.chunks[0].stored_len = 1 << 30,
        ];
        for change in changes {
            assert_eq!(spoil(change), crate::ErrorKind::Corrupt);
        }
    }
}
