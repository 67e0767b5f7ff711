//! Pages: a writer of plausible heap pages, PostgreSQL's page checksum, and a check of whole directories.
//!
//! A heap page here holds 60 tuples of 128 bytes, each with the tuple header of a committed row, a key, and a
//! payload that is part random and part text. What is in it follows from four numbers (seed, relation, block,
//! version), so two runs write the same bytes.
//!
//! PostgreSQL: `src/include/storage/bufpage.h`, `src/include/storage/checksum_impl.h`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::random::Random;
use crate::{Error, Result};

/// The bytes of a page.
pub const PAGE_LEN: usize = 8192;

/// One page.
pub type Page = [u8; PAGE_LEN];

const TUPLE_LEN: usize = 128;
const TUPLE_COUNT: usize = 60;
const TUPLE_HEADER_LEN: usize = 24;
/// Where the payload begins in a tuple: after its header and two 4-byte columns.
const PAYLOAD_FROM: usize = TUPLE_HEADER_LEN + 8;
const PAYLOAD_LEN: usize = TUPLE_LEN - PAYLOAD_FROM;
const PAGE_HEADER_LEN: usize = 24;
const TUPLES_FROM: usize = PAGE_LEN - TUPLE_COUNT * TUPLE_LEN;

/// What the bytes of a page follow from.
#[derive(Clone, Copy, Debug)]
pub struct PageSeed {
    /// The cluster's seed.
    pub seed: u64,
    /// The relation's number.
    pub relation: u32,
    /// The block's number in its fork.
    pub block: u32,
    /// How often the cluster had been changed when the page was written.
    pub version: u64,
}

/// What all pages of a cluster have in common.
#[derive(Clone, Debug)]
pub struct PageWriter {
    checksums: bool,
    /// How many bytes of each payload are random, a multiple of 8.
    random_len: usize,
    template: Box<Page>,
}

impl PageWriter {
    /// Pages with checksums or without, whose payload is random by `random_percent` and text for the rest.
    pub fn new(checksums: bool, random_percent: u8) -> Self {
        let mut page = Box::new([0; PAGE_LEN]);
        let lower = PAGE_HEADER_LEN + 4 * TUPLE_COUNT;
        put(&mut page[..], 12, &u16::try_from(lower).unwrap_or_default().to_le_bytes());
        put(&mut page[..], 14, &u16::try_from(TUPLES_FROM).unwrap_or_default().to_le_bytes());
        put(&mut page[..], 16, &8192_u16.to_le_bytes());
        put(&mut page[..], 18, &0x2004_u16.to_le_bytes());
        for (index, item) in (1_u16..).zip(0..TUPLE_COUNT) {
            let from = PAGE_LEN - (item + 1) * TUPLE_LEN;
            // Line pointer: 15 bits of offset, 2 of state (1 is "normal"), 15 of length.
            let pointer = u32::try_from(from | 1 << 15 | TUPLE_LEN << 17).unwrap_or_default();
            put(&mut page[..], PAGE_HEADER_LEN + 4 * item, &pointer.to_le_bytes());
            let tuple = &mut page[from..from + TUPLE_LEN];
            put(tuple, 0, &700_u32.to_le_bytes());
            put(tuple, 16, &index.to_le_bytes());
            put(tuple, 18, &3_u16.to_le_bytes());
            // Has variable-length columns; xmin committed, xmax invalid.
            put(tuple, 20, &0x0902_u16.to_le_bytes());
            tuple[22] = 24;
            for (byte, letter) in tuple[PAYLOAD_FROM..].iter_mut().zip(b"lorem ipsum dolor sit amet, ".iter().cycle()) {
                *byte = *letter;
            }
        }
        let random_len = PAYLOAD_LEN * usize::from(random_percent.min(100)) / 100 / 8 * 8;
        Self { checksums, random_len, template: page }
    }

    /// Writes the page of `seed` into `page`, as last changed at `lsn`.
    pub fn heap_page(&self, page: &mut Page, seed: PageSeed, lsn: u64) {
        page.copy_from_slice(&self.template[..]);
        let mut random = Random::new(seed.seed ^ u64::from(seed.relation) << 32);
        let mut random = Random::new(random.number() ^ u64::from(seed.block) << 24 ^ seed.version);
        for tuple in page[TUPLES_FROM..].chunks_exact_mut(TUPLE_LEN) {
            put(tuple, 12, &seed.block.rotate_left(16).to_le_bytes());
            put(tuple, TUPLE_HEADER_LEN, &random.number().to_le_bytes());
            for eight in tuple[PAYLOAD_FROM..PAYLOAD_FROM + self.random_len].chunks_exact_mut(8) {
                eight.copy_from_slice(&random.number().to_le_bytes());
            }
        }
        self.finish(page, seed.block, lsn);
    }

    /// Writes a page of a map fork into `page`: a header, and bytes that follow from `seed`.
    pub fn map_page(&self, page: &mut Page, seed: PageSeed, lsn: u64) {
        page.fill(0);
        put(page, 12, &24_u16.to_le_bytes());
        put(page, 14, &8192_u16.to_le_bytes());
        put(page, 16, &8192_u16.to_le_bytes());
        put(page, 18, &0x2004_u16.to_le_bytes());
        let mut random = Random::new(seed.seed ^ u64::from(seed.relation) << 32 ^ seed.version);
        let used = 64 + usize::try_from(random.below(512)).unwrap_or_default();
        page[PAGE_HEADER_LEN..PAGE_HEADER_LEN + used].fill(0xFF);
        self.finish(page, seed.block, lsn);
    }

    fn finish(&self, page: &mut Page, block: u32, lsn: u64) {
        put(page, 0, &lsn.rotate_left(32).to_le_bytes());
        if self.checksums {
            let sum = checksum(page, block);
            put(page, 8, &sum.to_le_bytes());
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The starting values of the 32 sums.
#[rustfmt::skip]
const STARTS: [u32; 32] = [
    0x5B1F_36E9, 0xB852_5960, 0x02AB_50AA, 0x1DE6_6D2A, 0x79FF_467A, 0x9BB9_F8A3, 0x217E_7CD2, 0x83E1_3D2C,
    0xF8D4_474F, 0xE39E_B970, 0x42C6_AE16, 0x9932_16FA, 0x7B09_3B5D, 0x98DA_FF3C, 0xF718_902A, 0x0B1C_9CDB,
    0xE58F_764B, 0x1876_36BC, 0x5D7B_3BB1, 0xE73D_E7DE, 0x92BE_C979, 0xCCA6_C0B2, 0x304A_0979, 0x85AA_43D4,
    0x7831_25BB, 0x6CA8_EAA2, 0xE407_EAC6, 0x4B5C_FC3E, 0x9FBF_8C76, 0x15CA_20BE, 0xF2CA_9FD3, 0x959B_D756,
];

/// PostgreSQL's checksum of `page` as block `block` of its fork; the checksum field in it does not count.
pub fn checksum(page: &Page, block: u32) -> u16 {
    let mut sums = STARTS;
    let mut round = |row: &[u32; 32]| {
        for (sum, value) in sums.iter_mut().zip(row) {
            let mixed = *sum ^ value;
            *sum = mixed.wrapping_mul(16_777_619) ^ mixed >> 17;
        }
    };
    for (number, bytes) in page.chunks_exact(128).enumerate() {
        let mut row = [0; 32];
        for (value, four) in row.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        }
        if number == 0 {
            // Bytes 8 and 9 hold the checksum.
            row[2] &= 0xFFFF_0000;
        }
        round(&row);
    }
    round(&[0; 32]);
    round(&[0; 32]);
    let folded = sums.iter().fold(block, |folded, sum| folded ^ sum);
    u16::try_from(folded % 65_535 + 1).unwrap_or(u16::MAX)
}

/// A page whose checksum is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// The file, relative to the data directory.
    pub file: PathBuf,
    /// The block's number in its fork.
    pub block: u32,
}

/// The pages below `base`, `global` and `pg_tblspc` of a stopped cluster whose checksums are wrong, and how many
/// pages there are. For majors whose own `pg_checksums` is not at hand.
///
/// # Errors
///
/// When a file cannot be read or has no whole number of pages.
pub fn check_directory(data_dir: &Path) -> Result<(Vec<BadPage>, u64)> {
    let (mut bad, mut count) = (Vec::new(), 0);
    let mut pending: Vec<PathBuf> = ["base", "global", "pg_tblspc"].map(|name| data_dir.join(name)).into();
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))? {
            let path = entry.map_err(|e| Error::io("list", &dir, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match segment_of(&name) {
                _ if path.is_dir() => pending.push(path),
                Some(segment) => count += check_file(data_dir, &path, segment, &mut bad)?,
                None => (),
            }
        }
    }
    Ok((bad, count))
}

/// The segment number that a relation file's `name` ends with; `None` if it is no relation file.
fn segment_of(name: &str) -> Option<u32> {
    let (stem, segment) = name.split_once('.').map_or((name, Some(0)), |(stem, n)| (stem, n.parse().ok()));
    let number = ["_fsm", "_vm", "_init"].iter().find_map(|fork| stem.strip_suffix(fork)).unwrap_or(stem);
    number.parse::<u32>().ok().and(segment)
}

fn check_file(data_dir: &Path, path: &Path, segment: u32, bad: &mut Vec<BadPage>) -> Result<u64> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let (pages, rest) = bytes.as_chunks::<PAGE_LEN>();
    if !rest.is_empty() {
        return Err(Error::new(format!("{} ends within a page", path.display())));
    }
    for (block, page) in (segment * super::SEGMENT_BLOCKS..).zip(pages) {
        let is_new = page[14..16] == [0, 0];
        if !is_new && page[8..10] != checksum(page, block).to_le_bytes() {
            let file = path.strip_prefix(data_dir).unwrap_or(path).to_owned();
            bad.push(BadPage { file, block });
        }
    }
    Ok(pages.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_relation_files_have_a_segment_number() {
        let named = |name| segment_of(name);
        assert_eq!(
            (named("16384"), named("16384.2"), named("1259_fsm"), named("1259_vm.1")),
            (Some(0), Some(2), Some(0), Some(1))
        );
        for name in ["PG_VERSION", "pg_filenode.map", "t3_16384", "pg_internal.init", "16384_tmp", "1.x"] {
            assert_eq!(named(name), None, "{name}");
        }
    }

    #[test]
    fn the_block_number_and_every_byte_but_the_sum_itself_count() {
        let writer = PageWriter::new(true, 50);
        let mut page = [0; PAGE_LEN];
        writer.heap_page(&mut page, PageSeed { seed: 1, relation: 2, block: 3, version: 4 }, 5);
        let sum = checksum(&page, 3);
        assert_eq!(page[8..10], sum.to_le_bytes());
        assert_ne!(sum, checksum(&page, 4));
        for at in 0..PAGE_LEN {
            page[at] ^= 1;
            assert_eq!(checksum(&page, 3) == sum, (8..10).contains(&at), "byte {at}");
            page[at] ^= 1;
        }
    }
}
