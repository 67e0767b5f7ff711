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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ErrorKind;
    use crate::chunk::{ChunkId, Compression, Encoder, Fingerprint};
    use crate::repo::{
        BackupId, ChunkRef, DataPack, Extent, FileKind, LayerBuilder, PackKind, Packer, sample_manifest, write_layer,
    };
    use crate::store::{MemoryStore, ObjectName, Store};

    const BLOCK_LEN: usize = 8192;

    fn block(value: u8) -> Vec<u8> {
        (0..BLOCK_LEN).map(|at| value.wrapping_mul(at as u8) | 1).collect()
    }

    /// A file of seven blocks, the last one cut: two of one chunk, two zero ones, two of another chunk from its second block on, one of the first again.
    fn file(store: &MemoryStore) -> (Manifest, FileEntry, Vec<u8>) {
        let run: BackupId = "20261122T160312Z-00000001".parse().unwrap();
        let packer = |kind| Packer::new(Arc::new(store.clone()), "main".parse().unwrap(), run, kind);
        let (data, map) = (packer(PackKind::Data), packer(PackKind::Map));
        let mut encoder = Encoder::new(Compression::Zstd(1)).unwrap();
        let mut add = |values: &[u8]| {
            let raw: Vec<u8> = values.iter().flat_map(|value| block(*value)).collect();
            let fingerprints: Vec<_> = raw.chunks_exact(BLOCK_LEN).map(Fingerprint::of).collect();
            let (codec, stored) = encoder.encode(&raw, BLOCK_LEN).unwrap();
            let place = data.append(stored).unwrap();
            let (stored_len, id) = (stored.len() as u32, ChunkId::of(&fingerprints));
            let chunk =
                ChunkRef { pack: 0, offset: place.offset, stored_len, block_count: values.len() as u16, codec, id };
            (chunk, DataPack { run, seq: place.pack.seq }, fingerprints)
        };
        let (first, second) = (add(&[3, 5, 7]), add(&[11, 13, 17]));
        let mut builder = LayerBuilder::new(7);
        let sources = [&first, &second].map(|(chunk, pack, _)| builder.add_chunk(*chunk, *pack));
        builder.push(Extent { start: 0, count: 2, source: sources[0], first: 0 }, &first.2[..2]);
        builder.push_zero(2, 2);
        builder.push(Extent { start: 4, count: 2, source: sources[1], first: 1 }, &second.2[1..]);
        builder.push(Extent { start: 6, count: 1, source: sources[0], first: 2 }, &first.2[2..]);
        let layer = write_layer(&map, &builder.finish()).unwrap();
        let packs = [data, map].map(|packer| packer.finish().unwrap()).concat();
        let part = crate::repo::PartMap { layers: vec![layer], data: vec![first.1.name()] };
        let blocks = [block(3), block(5), vec![0; 2 * BLOCK_LEN], block(13), block(17), block(7)].concat();
        let bytes = blocks[..blocks.len() - 100].to_vec();
        let (path, len) = (b"pg_wal/a".to_vec(), bytes.len() as u64);
        let entry = FileEntry { path, kind: FileKind::Wal, mode: 0o600, uid: 0, gid: 0, len, parts: vec![part] };
        (Manifest { packs, ..sample_manifest("r", run, 1) }, entry, bytes)
    }

    fn repository(store: &MemoryStore) -> Repository {
        Repository::init_in(Arc::new(store.clone()), "here".to_owned()).unwrap()
    }

    #[test]
    fn a_file_is_read_from_any_of_its_bytes_on() {
        let store = MemoryStore::new();
        let (manifest, entry, bytes) = file(&store);
        let repo = repository(&store);
        for begin in [0, 1, 8191, 8192, 16384, 20000, 32768, 40961, 49152, bytes.len() - 1] {
            let mut contents = FileContents::new(&repo, &manifest, entry.clone()).unwrap();
            let mut found = Vec::new();
            loop {
                let more = contents.read_from((begin + found.len()) as u64).unwrap();
                if more.is_empty() {
                    break;
                }
                found.extend_from_slice(more);
            }
            assert!(found == bytes[begin..], "from {begin}");
        }
    }

    #[test]
    fn what_was_not_stored_is_not_given_out() {
        let store = MemoryStore::new();
        let (manifest, entry, bytes) = file(&store);
        let repo = repository(&store);
        let long = FileEntry { len: bytes.len() as u64 + 8192, ..entry.clone() };
        let mut contents = FileContents::new(&repo, &manifest, long).unwrap();
        assert_eq!(contents.read_from(7 * 8192).unwrap_err().kind(), ErrorKind::Corrupt);
        let pack = manifest.packs.iter().find(|pack| pack.name.kind == PackKind::Data).unwrap();
        let object: ObjectName = pack.name.object(&manifest.cluster).unwrap();
        let mut damaged = store.get(&object, 1 << 20).unwrap();
        for byte in &mut damaged {
            *byte ^= 1;
        }
        store.delete(&object).unwrap();
        let mut contents = FileContents::new(&repo, &manifest, entry).unwrap();
        assert_eq!(contents.read_from(0).unwrap_err().kind(), ErrorKind::Missing);
        store.put_new(&object, &mut damaged.as_slice()).unwrap();
        let error = contents.read_from(0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.place().unwrap().starts_with(object.as_str()), "{error}");
        assert_eq!(contents.read_from(2 * 8192).unwrap(), vec![0; 2 * 8192]);
    }
}
