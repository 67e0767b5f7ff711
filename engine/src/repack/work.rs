//! What a worker does with a batch: read, prove, and put together.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cut::{Batch, Output, Source};
use super::{Mover, NewChunk};
use crate::chunk::{ChunkId, Decoder, Encoder, Fingerprint, Shape, hash16};
use crate::error::{Error, ErrorKind, Result};
use crate::repo::{ChunkRef, DataPack, PackKind, PackName, PackTable};
use crate::store::ObjectName;

/// Bytes read from a pack at once, at most; one chunk may be longer.
const READ_LEN: u64 = 1 << 20;
/// Bytes between two chunks that are read rather than skipped.
const GAP_LEN: u64 = 64 << 10;
/// Records of all tables that are kept; with more the next one finds the cache empty. Some 30 MB.
const MAX_CACHED_RECORDS: usize = 1 << 20;

/// What the workers share.
pub(super) struct Shared<'a> {
    mover: &'a Mover<'a>,
    pack_lens: HashMap<ObjectName, u64>,
    tables: Mutex<HashMap<DataPack, Arc<PackTable>>>,
    /// Bytes read from packs.
    pub bytes_read: AtomicU64,
}

impl<'a> Shared<'a> {
    pub fn new(mover: &'a Mover<'a>) -> Result<Self> {
        let pack_lens = mover.from.packs(mover.cluster)?;
        Ok(Self { mover, pack_lens, tables: Mutex::default(), bytes_read: AtomicU64::new(0) })
    }

    fn read(&self, object: &ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Error::bug("a read beyond memory"))?];
        self.mover.from.store().get_range(object, offset, &mut bytes)?;
        self.bytes_read.fetch_add(len, Ordering::Relaxed);
        Ok(bytes)
    }

    /// The table of a pack; two workers may read one at once, which is seldom and harmless.
    fn table(&self, pack: DataPack, object: &ObjectName) -> Result<Arc<PackTable>> {
        let tables = || self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables().get(&pack) {
            return Ok(Arc::clone(table));
        }
        let missing = || Error::new(ErrorKind::Missing, "the pack is missing").at(object.as_str());
        let len = *self.pack_lens.get(object).ok_or_else(missing)?;
        let table = Arc::new(PackTable::read(&**self.mover.from.store(), object, PackKind::Data, len)?);
        self.bytes_read.fetch_add(table.read_len(), Ordering::Relaxed);
        let mut tables = tables();
        let cached: usize = tables.values().map(|table| table.record_count()).sum();
        if cached + table.record_count() > MAX_CACHED_RECORDS {
            tables.clear();
        }
        tables.insert(pack, Arc::clone(&table));
        Ok(table)
    }
}

/// A batch whose records are ready to be appended.
pub(super) struct MovedBatch {
    pub records: Vec<Record>,
    /// Stored bytes of the chunks that are met for the first time.
    pub progress_bytes: u64,
    buffers: Vec<Vec<u8>>,
}

impl MovedBatch {
    pub fn bytes(&self, record: &Record) -> &[u8] {
        &self.buffers[record.buffer][record.range.clone()]
    }
}

/// A chunk ready to be appended.
pub(super) struct Record {
    pub new: Arc<NewChunk>,
    /// What it is; its place is not known yet.
    pub chunk: ChunkRef,
    /// `H16` of its bytes.
    pub hash: [u8; 16],
    /// Whether it was copied.
    pub as_stored: bool,
    buffer: usize,
    range: Range<usize>,
}

/// Where the stored bytes of a source are.
#[derive(Clone, Default)]
struct Stored {
    buffer: usize,
    range: Range<usize>,
    /// What the table says of a source that is copied; proved.
    hash: [u8; 16],
}

/// A chunk that is being put together.
struct Building {
    raw: Vec<u8>,
    fingerprints: Vec<Fingerprint>,
}

/// Moves batches.
pub(super) struct Worker<'a> {
    shared: &'a Shared<'a>,
    decoder: Decoder,
    encoder: Encoder,
}

impl<'a> Worker<'a> {
    pub fn new(shared: &'a Shared<'a>) -> Result<Self> {
        let encoder = Encoder::new(shared.mover.compression)?;
        Ok(Self { shared, decoder: Decoder::new()?, encoder })
    }

    /// Reads the sources of a batch and makes its outputs.
    pub fn work(&mut self, batch: Batch) -> Result<MovedBatch> {
        let Batch { sources, outputs, progress_bytes, .. } = batch;
        let block_len = self.shared.mover.block_len;
        let mut building: Vec<Option<Building>> =
            outputs.iter().map(|(output, _)| Building::of(output, block_len)).collect();
        let (mut stored, mut buffers) = (vec![Stored::default(); sources.len()], Vec::new());
        for run in runs(&sources) {
            let buffer = self.read(&sources, &run, buffers.len(), &mut stored)?;
            for index in run {
                let (source, stored) = (&sources[index], &mut stored[index]);
                let bytes = &buffer[stored.range.clone()];
                if source.pieces.is_empty() {
                    stored.hash = self.prove(source, bytes)?;
                } else {
                    self.decode(source, bytes, &mut building)?;
                }
            }
            buffers.push(buffer);
        }
        let mut records = Vec::with_capacity(outputs.len());
        for ((output, new), building) in outputs.into_iter().zip(building) {
            records.push(match (output, building) {
                (Output::Copy { source }, _) => copied(new, &sources[source], stored[source].clone()),
                (_, Some(building)) => self.compress(new, &building, &mut buffers)?,
                _ => return Err(Error::bug("a chunk that nobody puts together")),
            });
        }
        Ok(MovedBatch { records, progress_bytes, buffers })
    }

    /// Reads the sources of a run at once, and notes where in the buffer they are.
    fn read(&self, sources: &[Source], run: &[usize], buffer: usize, stored: &mut [Stored]) -> Result<Vec<u8>> {
        let [first, ..] = run else { return Ok(Vec::new()) };
        let begin = sources[*first].chunk.offset;
        let mut len = 0;
        for index in run {
            let chunk = &sources[*index].chunk;
            let from = chunk.offset - begin;
            len = len.max(from + u64::from(chunk.stored_len));
            let from = usize::try_from(from).map_err(|_| Error::bug("a read beyond memory"))?;
            stored[*index] = Stored { buffer, range: from..from + chunk.stored_len as usize, hash: [0; 16] };
        }
        self.shared.read(&object(self.shared.mover, sources[*first].pack)?, begin, len)
    }

    /// Compares a source with what the table of its pack says of it, which is returned.
    fn prove(&self, source: &Source, stored: &[u8]) -> Result<[u8; 16]> {
        let table = self.shared.table(source.pack, &object(self.shared.mover, source.pack)?)?;
        let hash = hash16(stored);
        let problem = match table.record(source.chunk.offset) {
            Some((len, check)) if len as usize == stored.len() && hash == check => return Ok(hash),
            Some((len, _)) if len as usize == stored.len() => "the chunk does not match its checksum".to_owned(),
            Some((len, _)) => format!("a chunk of {len} bytes where the block map says {}", stored.len()),
            None => "a block map names a chunk that the pack does not have".to_owned(),
        };
        Err(self.damaged(source, problem))
    }

    /// Decodes a source and puts its blocks where they belong.
    fn decode(&mut self, source: &Source, stored: &[u8], building: &mut [Option<Building>]) -> Result<()> {
        let Source { pack, chunk, pieces } = source;
        let mover = self.shared.mover;
        let block_len = mover.block_len;
        let shape = Shape { block_len, block_count: usize::from(chunk.block_count) };
        let decoded = self.decoder.decode(chunk.codec, stored, shape, chunk.id);
        let damaged = |problem: &str| Error::corrupt(mover.place(*pack, chunk.offset), problem);
        let (raw, fingerprints) = decoded.map_err(|error| damaged(error.what()))?;
        for piece in pieces {
            let Some(Some(to)) = building.get_mut(piece.output) else { return Err(Error::bug("a piece of nothing")) };
            let blocks = piece.first..piece.first + piece.count;
            if to.fingerprints[piece.to..][..piece.count] != fingerprints[blocks.clone()] {
                return Err(damaged("the chunk has other blocks than a block map says"));
            }
            let raw = &raw[blocks.start * block_len..blocks.end * block_len];
            to.raw[piece.to * block_len..][..raw.len()].copy_from_slice(raw);
        }
        Ok(())
    }

    fn compress(&mut self, new: Arc<NewChunk>, building: &Building, buffers: &mut Vec<Vec<u8>>) -> Result<Record> {
        let (codec, stored) = self.encoder.encode(&building.raw, self.shared.mover.block_len)?;
        let block_count = u16::try_from(building.fingerprints.len());
        let chunk = ChunkRef {
            pack: 0,
            offset: 0,
            stored_len: u32::try_from(stored.len()).map_err(|_| Error::bug("a chunk of 4 GiB"))?,
            block_count: block_count.map_err(|_| Error::bug("a chunk of too many blocks"))?,
            codec,
            id: ChunkId::of(&building.fingerprints),
        };
        let (hash, range) = (hash16(stored), 0..stored.len());
        buffers.push(stored.to_vec());
        Ok(Record { new, chunk, hash, as_stored: false, buffer: buffers.len() - 1, range })
    }

    fn damaged(&self, source: &Source, problem: String) -> Error {
        Error::corrupt(self.shared.mover.place(source.pack, source.chunk.offset), problem)
    }
}

impl Building {
    fn of(output: &Output, block_len: usize) -> Option<Self> {
        let Output::Build { fingerprints } = output else { return None };
        Some(Self { raw: vec![0; fingerprints.len() * block_len], fingerprints: fingerprints.clone() })
    }
}

fn copied(new: Arc<NewChunk>, source: &Source, stored: Stored) -> Record {
    let Stored { buffer, range, hash } = stored;
    Record { new, chunk: source.chunk, hash, as_stored: true, buffer, range }
}

fn object(mover: &Mover<'_>, pack: DataPack) -> Result<ObjectName> {
    PackName { run: pack.run, seq: pack.seq, kind: PackKind::Data }.object(mover.cluster)
}

/// The sources in the order of packs and offsets, in runs that are read at once.
fn runs(sources: &[Source]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sources.len()).collect();
    order.sort_unstable_by_key(|index| (sources[*index].pack, sources[*index].chunk.offset));
    let mut runs: Vec<Vec<usize>> = Vec::new();
    for index in order {
        match runs.last_mut() {
            Some(run) if goes_on(&sources[run[0]], &sources[run[run.len() - 1]], &sources[index]) => run.push(index),
            _ => runs.push(vec![index]),
        }
    }
    runs
}

/// Whether `next` is read together with a run from `first` to `last`.
fn goes_on(first: &Source, last: &Source, next: &Source) -> bool {
    let end = |source: &Source| source.chunk.offset.saturating_add(u64::from(source.chunk.stored_len));
    first.pack == next.pack
        && next.chunk.offset <= end(last).saturating_add(GAP_LEN)
        && end(next) - first.chunk.offset <= READ_LEN
}
