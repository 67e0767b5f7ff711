//! A run of blocks and its stored bytes.
//!
//! Blocks that belong together in time are compressed together, up to [`MAX_RAW_LEN`]: a page alone compresses slower and
//! worse. Each block has a [`Fingerprint`]; the [`ChunkId`] is the hash of the fingerprints of a chunk's blocks, so that sixteen bytes
//! in a block map prove every block of the chunk (`repo/format.md`, Chunks).
//!
//! What goes wrong: stored bytes that do not decompress, to another length, or to other blocks. The reader notices, before a
//! byte of it is used.

mod delta;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use self::delta::Differences;
use crate::error::{Error, Result};

/// The most raw bytes of a chunk.
pub const MAX_RAW_LEN: usize = 256 * 1024;

/// The first 128 bits of a page's BLAKE3 hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Fingerprint(pub [u8; 16]);

impl Fingerprint {
    /// Stands for a page of zero bytes, which is never hashed nor stored.
    pub const ZERO_PAGE: Fingerprint = Fingerprint([0; 16]);

    /// The fingerprint of `page`, whole blocks only.
    pub fn of(page: &[u8]) -> Self {
        Fingerprint(hash16(page))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex(&self.0))
    }
}

/// What proves a chunk's contents: the hash of its blocks' fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ChunkId(pub [u8; 16]);

impl ChunkId {
    /// The id of a chunk of these blocks.
    pub fn of(fingerprints: &[Fingerprint]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for fingerprint in fingerprints {
            hasher.update(&fingerprint.0);
        }
        ChunkId(first16(&hasher.finalize()))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex(&self.0))
    }
}

/// The first 16 bytes of the BLAKE3 hash of `bytes`.
pub fn hash16(bytes: &[u8]) -> [u8; 16] {
    first16(&blake3::hash(bytes))
}

/// The first 16 bytes of a hash.
pub fn first16(hash: &blake3::Hash) -> [u8; 16] {
    let mut first = [0; 16];
    first.copy_from_slice(&hash.as_bytes()[..16]);
    first
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// How a chunk's bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
    /// One zstd frame of the pages as differences (`delta.rs`), and a byte for each page.
    ZstdDelta,
}

impl From<Codec> for u8 {
    fn from(codec: Codec) -> u8 {
        match codec {
            Codec::Raw => 0,
            Codec::Zstd => 1,
            Codec::ZstdDelta => 2,
        }
    }
}

impl TryFrom<u8> for Codec {
    type Error = String;

    fn try_from(number: u8) -> std::result::Result<Self, String> {
        match number {
            0 => Ok(Codec::Raw),
            1 => Ok(Codec::Zstd),
            2 => Ok(Codec::ZstdDelta),
            _ => Err(format!("unknown codec {number}")),
        }
    }
}

/// How new chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd at this level, 1 to 19.
    Zstd(i32),
}

impl Default for Compression {
    fn default() -> Self {
        Compression::Zstd(1)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => f.write_str("none"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let level = match text {
            "none" => return Ok(Compression::None),
            "zstd" => Some(1),
            _ => text.strip_prefix("zstd:").and_then(|level| level.parse().ok()),
        };
        let level = level.filter(|level| (1..=19).contains(level));
        level.map(Compression::Zstd).ok_or_else(|| {
            Error::invalid(format!("{text:?} is not a compression"))
                .hint("use zstd:LEVEL with a level of 1 to 19, or none")
        })
    }
}

/// Compresses chunks; one for each thread.
pub struct Encoder {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    differences: Differences,
    compressed: Vec<u8>,
}

impl Encoder {
    /// An encoder for this compression.
    ///
    /// # Errors
    /// `Unavailable` when there is no memory for it.
    pub fn new(compression: Compression) -> Result<Self> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd(level) => Some(zstd::bulk::Compressor::new(level).map_err(no_codec)?),
        };
        Ok(Self { zstd, differences: Differences::default(), compressed: Vec::new() })
    }

    /// The stored form of whole blocks; raw where compression gains less than a thirty-second.
    ///
    /// # Errors
    /// `Bug` if the library refuses.
    pub fn encode<'a>(&'a mut self, raw: &'a [u8], block_len: usize) -> Result<(Codec, &'a [u8])> {
        if let Some(zstd) = &mut self.zstd {
            let (codec, source) = match self.differences.of(raw, block_len) {
                Some(differences) => (Codec::ZstdDelta, differences),
                None => (Codec::Zstd, raw),
            };
            self.compressed.resize(zstd::zstd_safe::compress_bound(source.len()), 0);
            let compressed = zstd.compress_to_buffer(source, &mut self.compressed[..]);
            let len = compressed.map_err(|e| Error::bug("zstd cannot compress").because(e))?;
            if len < raw.len() - raw.len() / 32 {
                return Ok((codec, &self.compressed[..len]));
            }
        }
        Ok((Codec::Raw, raw))
    }
}

/// Decompresses and proves chunks; one for each thread.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
    raw: Vec<u8>,
    fingerprints: Vec<Fingerprint>,
}

impl Decoder {
    /// A decoder.
    ///
    /// # Errors
    /// `Unavailable` when there is no memory for it.
    pub fn new() -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().map_err(no_codec)?;
        Ok(Self { zstd, raw: Vec::new(), fingerprints: Vec::new() })
    }

    /// The blocks of a stored chunk and their fingerprints, proved to be those that `id` names.
    ///
    /// # Errors
    /// `Corrupt`, without a place: the caller knows it.
    pub fn decode(
        &mut self,
        codec: Codec,
        stored: &[u8],
        shape: Shape,
        id: ChunkId,
    ) -> Result<(&[u8], &[Fingerprint])> {
        let raw_len = shape.raw_len();
        let coded_len = if codec == Codec::ZstdDelta { raw_len + shape.block_count } else { raw_len };
        self.raw.resize(coded_len, 0);
        let decoded_len = match codec {
            Codec::Zstd | Codec::ZstdDelta => {
                self.zstd.decompress_to_buffer(stored, &mut self.raw[..]).map_err(|e| damaged(e.to_string()))?
            }
            Codec::Raw if stored.len() == raw_len => {
                self.raw.copy_from_slice(stored);
                raw_len
            }
            Codec::Raw => stored.len(),
        };
        if decoded_len != coded_len {
            return Err(damaged(format!("{decoded_len} bytes instead of {coded_len}")));
        }
        if codec == Codec::ZstdDelta && !self.undo_differences(raw_len, shape.block_len) {
            return Err(damaged("differences that lead outside of their page".to_owned()));
        }
        self.fingerprints.clear();
        self.fingerprints.extend(self.raw.chunks_exact(shape.block_len).map(Fingerprint::of));
        if ChunkId::of(&self.fingerprints) != id {
            return Err(damaged("its blocks' fingerprints are not those of the block map".to_owned()));
        }
        Ok((&self.raw, &self.fingerprints))
    }
}

impl Decoder {
    /// How a stored chunk of which nothing else is known is stored, and the fingerprints of its blocks; `None` if it is no chunk of whole blocks.
    pub fn recognise(&mut self, stored: &[u8], block_len: usize) -> Option<(Codec, &[Fingerprint])> {
        let most = MAX_RAW_LEN.max(block_len);
        self.raw.resize(most + most / block_len, 0);
        let (codec, raw_len) = match self.zstd.decompress_to_buffer(stored, &mut self.raw[..]) {
            Ok(len) if len % block_len == 0 => (Codec::Zstd, len),
            Ok(len) => {
                // A chunk has fewer blocks than a block has bytes.
                self.raw.truncate(len);
                let raw_len = len - len % block_len;
                let is_delta = len == raw_len + raw_len / block_len && self.undo_differences(raw_len, block_len);
                (Codec::ZstdDelta, if is_delta { raw_len } else { 0 })
            }
            Err(_) => {
                self.raw.get_mut(..stored.len())?.copy_from_slice(stored);
                (Codec::Raw, stored.len())
            }
        };
        if raw_len == 0 || raw_len % block_len != 0 {
            return None;
        }
        self.fingerprints.clear();
        self.fingerprints.extend(self.raw[..raw_len].chunks_exact(block_len).map(Fingerprint::of));
        Some((codec, &self.fingerprints))
    }

    /// Makes pages of the differences and the bytes after them, which go; false if that cannot be.
    fn undo_differences(&mut self, raw_len: usize, block_len: usize) -> bool {
        let (pages, modes) = self.raw.split_at_mut(raw_len);
        let done = delta::undo(pages, modes, block_len);
        self.raw.truncate(raw_len);
        done
    }
}

/// How many blocks of what length a chunk has.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of a block.
    pub block_len: usize,
    /// Blocks in the chunk.
    pub block_count: usize,
}

impl Shape {
    /// Bytes of the raw chunk.
    pub fn raw_len(self) -> usize {
        self.block_len * self.block_count
    }
}

fn damaged(problem: String) -> Error {
    Error::new(crate::ErrorKind::Corrupt, format!("the chunk does not decompress to what was stored: {problem}"))
}

fn no_codec(error: std::io::Error) -> Error {
    Error::new(crate::ErrorKind::Unavailable, "no memory for zstd").because(error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stored(compression: Compression, raw: &[u8], block_len: usize) -> (Codec, Vec<u8>, Shape, ChunkId) {
        let mut encoder = Encoder::new(compression).unwrap();
        let (codec, bytes) = encoder.encode(raw, block_len).unwrap();
        let bytes = bytes.to_vec();
        let fingerprints: Vec<_> = raw.chunks_exact(block_len).map(Fingerprint::of).collect();
        let shape = Shape { block_len, block_count: fingerprints.len() };
        (codec, bytes, shape, ChunkId::of(&fingerprints))
    }

    proptest! {
        #[test]
        fn a_chunk_reads_back_as_it_was_stored(seed: u8, count in 1usize..8, level in 0i32..4) {
            let raw: Vec<u8> = (0..count * 64).map(|i| (i as u8).wrapping_mul(seed)).collect();
            let compression = if level == 0 { Compression::None } else { Compression::Zstd(level) };
            let (codec, bytes, shape, id) = stored(compression, &raw, 64);
            let mut decoder = Decoder::new().unwrap();
            prop_assert_eq!(decoder.decode(codec, &bytes, shape, id).unwrap().0, &raw[..]);
        }

        #[test]
        fn no_stored_bytes_make_the_decoder_panic(bytes: Vec<u8>, count in 0usize..4) {
            let shape = Shape { block_len: 8, block_count: count };
            for codec in [Codec::Raw, Codec::Zstd, Codec::ZstdDelta] {
                let _ = Decoder::new().unwrap().decode(codec, &bytes, shape, ChunkId::default());
            }
        }
    }

    #[test]
    fn a_flipped_bit_never_passes_as_another_page() {
        let raw = b"an 8 kB page, as it were, and a second one, longer by nothing...".repeat(4);
        let (codec, bytes, shape, id) = stored(Compression::Zstd(1), &raw, 64);
        let mut decoder = Decoder::new().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok((pages, _)) = decoder.decode(codec, &damaged, shape, id) {
                assert_eq!(pages, raw, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_chunk_of_which_nothing_is_known_is_recognised() {
        let raw: Vec<u8> = (0..4 * 64u32).flat_map(|i| (i * i).to_le_bytes()).collect();
        for compression in [Compression::None, Compression::Zstd(1)] {
            let (codec, bytes, _, id) = stored(compression, &raw, 64);
            let mut decoder = Decoder::new().unwrap();
            let (found, fingerprints) = decoder.recognise(&bytes, 64).unwrap();
            assert_eq!((found, ChunkId::of(fingerprints)), (codec, id));
            assert!(decoder.recognise(&bytes[..bytes.len() - 1], 64).is_none());
        }
        assert!(Decoder::new().unwrap().recognise(&[], 64).is_none());
    }

    #[test]
    fn what_does_not_compress_is_stored_raw() {
        let mut random = vec![0; 8192];
        getrandom::fill(&mut random).unwrap();
        let mut encoder = Encoder::new(Compression::Zstd(19)).unwrap();
        assert_eq!(encoder.encode(&random, 8192).unwrap(), (Codec::Raw, &random[..]));
    }

    #[test]
    fn compressions_are_spelled_as_documented() {
        assert_eq!("zstd:19".parse::<Compression>().unwrap(), Compression::Zstd(19));
        assert_eq!("none".parse::<Compression>().unwrap(), Compression::None);
        for text in ["", "zstd:0", "zstd:20", "zstd:-1", "gzip", "zstd:"] {
            assert!(text.parse::<Compression>().is_err(), "{text:?}");
        }
    }
}
