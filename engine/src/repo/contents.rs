//! The bytes of one file of a backup, read from its front to its back; what restores many files at once is in `extract`.
//!
//! A chunk is proved when it is decompressed, so nothing is given out that was not stored. What goes wrong: a pack or a record that is damaged or gone.

use super::layer::{Layer, PART_BLOCKS};
use super::table::FileEntry;
use super::{Depth, Manifest, Repository};
use crate::chunk::{Decoder, Shape};
use crate::error::{Error, Result};

/// One file of a backup.
pub(crate) struct FileContents<'a> {
    repo: &'a Repository,
    manifest: &'a Manifest,
    entry: FileEntry,
    decoder: Decoder,
    /// The block map of the part that was read last.
    part: Option<(usize, Layer)>,
    bytes: Vec<u8>,
}

impl<'a> FileContents<'a> {
    /// Of a file in the table of `manifest`.
    ///
    /// # Errors
    /// `Unavailable` when there is no memory for it.
    pub fn new(repo: &'a Repository, manifest: &'a Manifest, entry: FileEntry) -> Result<Self> {
        Ok(Self { repo, manifest, entry, decoder: Decoder::new()?, part: None, bytes: Vec::new() })
    }

    /// Some of the bytes from `offset` on, as many as lie in one chunk; none at the end.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, with the object.
    pub fn read_from(&mut self, offset: u64) -> Result<&[u8]> {
        self.bytes.clear();
        if offset >= self.entry.len {
            return Ok(&self.bytes);
        }
        let block_len = self.manifest.block_len();
        let (block, skipped) = (offset / block_len as u64, offset % block_len as u64);
        let number = usize::try_from(block / u64::from(PART_BLOCKS)).unwrap_or(usize::MAX);
        let first = u32::try_from(block % u64::from(PART_BLOCKS)).unwrap_or_default();
        self.open_part(number)?;
        let Some((_, layer)) = &self.part else { return Ok(&self.bytes) };
        read_blocks(self.repo, self.manifest, layer, first, &mut self.decoder, &mut self.bytes)?;
        let left = usize::try_from(self.entry.len - (offset - skipped)).unwrap_or(usize::MAX);
        self.bytes.truncate(left);
        self.bytes.drain(..usize::try_from(skipped).unwrap_or(0).min(self.bytes.len()));
        Ok(&self.bytes)
    }

    fn open_part(&mut self, number: usize) -> Result<()> {
        if self.part.as_ref().is_some_and(|(open, _)| *open == number) {
            return Ok(());
        }
        let path = self.entry.display_path();
        let map = self.entry.parts.get(number);
        let map = map.ok_or_else(|| Error::corrupt(path, "the file is longer than its block maps"))?;
        self.part = Some((number, self.repo.flatten(self.manifest, map, Depth::Locations)?));
        Ok(())
    }
}

/// Appends the blocks from `first` to the end of its extent.
fn read_blocks(
    repo: &Repository,
    manifest: &Manifest,
    layer: &Layer,
    first: u32,
    decoder: &mut Decoder,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    let locations = &layer.locations;
    let at = locations.extents.partition_point(|extent| extent.end() <= first);
    let extent = locations.extents.get(at).filter(|extent| extent.start <= first);
    let extent = extent.ok_or_else(|| Error::corrupt(manifest.id.to_string(), "a block map leaves blocks out"))?;
    let block_len = manifest.block_len();
    let wanted = (extent.end() - first) as usize * block_len;
    let Some(chunk) = extent.chunk() else {
        bytes.resize(wanted, 0);
        return Ok(());
    };
    let chunk = &locations.chunks[chunk];
    let object = locations.packs[chunk.pack as usize].name().object(&manifest.cluster)?;
    let mut stored = vec![0; chunk.stored_len as usize];
    repo.store().get_range(&object, chunk.offset, &mut stored)?;
    let shape = Shape { block_len, block_count: usize::from(chunk.block_count) };
    let decoded = decoder.decode(chunk.codec, &stored, shape, chunk.id);
    let (raw, _) = decoded.map_err(|error| error.at(format!("{object} at {}", chunk.offset)))?;
    let begin = (usize::from(extent.first) + (first - extent.start) as usize) * block_len;
    let blocks = raw.get(begin..begin + wanted);
    let blocks = blocks.ok_or_else(|| Error::corrupt(object.as_str(), "a chunk has fewer blocks than its map says"))?;
    bytes.extend_from_slice(blocks);
    Ok(())
}
