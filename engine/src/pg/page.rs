//! Pages of relation files: their LSN, their checksum, and whether they are what PostgreSQL wrote.
//!
//! A page is sound if it is all zeros (never initialised) or if its checksum fits its bytes *and its place*: the
//! block's number over the whole fork is mixed in, so a page at the wrong place fails, and so does one that is
//! checked with its number within a 1 GiB file. PostgreSQL takes any page whose `pd_upper` is 0 for a new one
//! and checks nothing; a page like that with other bytes set is damage, and is reported here.
//!
//! The checksum runs 32 independent sums over the columns of a 32-wide table of `u32`. Written plainly, the
//! compiler makes vector code of it; the same body is compiled once more for AVX2, which the processor is asked
//! for at run time, because the baseline x86-64 has no 32-bit vector multiplication.
//!
//! What this cannot see: whether a torn page will be repaired by WAL replay. The caller knows the LSN at
//! which the backup began, reads again, and judges.
//!
//! PostgreSQL: `src/include/storage/bufpage.h`, `PageHeaderData`; `src/include/storage/checksum_impl.h`,
//! `pg_checksum_page`; `src/backend/backup/basebackup.c`, `verify_page_checksum`.

use std::fmt;

use super::bytes::{u16_at, u32_at};
use super::{BlockNumber, Lsn};

/// The size of a page: a power of two from 1 KB to 32 KB (`block_size` in pg_control).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u16);

impl BlockSize {
    /// 8 KB, the default.
    pub const DEFAULT: BlockSize = BlockSize(8192);

    /// `None` unless it is a power of two from 1 KB to 32 KB.
    pub fn new(bytes: u32) -> Option<Self> {
        let bytes = u16::try_from(bytes).ok()?;
        ((1024..=32_768).contains(&bytes) && bytes.is_power_of_two()).then_some(Self(bytes))
    }

    /// In bytes.
    pub fn as_usize(self) -> usize {
        usize::from(self.0)
    }

    /// In bytes.
    pub fn as_u32(self) -> u32 {
        u32::from(self.0)
    }

    /// In bytes.
    pub fn as_u64(self) -> u64 {
        u64::from(self.0)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

const CHECKSUM_OFFSET: usize = 8;
const UPPER_OFFSET: usize = 14;

/// The LSN of the page's last change; 0/0 if the slice is too short for one.
///
/// It proves nothing about a page that was not checked: any bytes make an LSN.
pub fn page_lsn(page: &[u8]) -> Lsn {
    match (u32_at(page, 0), u32_at(page, 4)) {
        (Some(high), Some(low)) => Lsn::new(u64::from(high) << 32 | u64::from(low)),
        _ => Lsn::INVALID,
    }
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<128>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// What [`check_page`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageCheck {
    /// All bytes are zero: a page that was added to the file and never filled.
    Zero,
    /// The checksum fits.
    Valid,
    /// Neither.
    Invalid {
        /// What is wrong.
        reason: PageFault,
    },
}

/// Why a page is not sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// Not a whole page: the end of a file that is being extended, or a damaged one.
    Length(usize),
    /// `pd_upper` is 0 as in a new page, but other bytes are set.
    NewButNotEmpty,
    /// The checksum on the page is not that of its bytes at its place.
    Checksum {
        /// On the page.
        stored: u16,
        /// Of its bytes.
        computed: u16,
    },
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PageFault::Length(len) => write!(f, "{len} bytes are not a page"),
            PageFault::NewButNotEmpty => f.write_str("the header says that the page is new, but it holds data"),
            PageFault::Checksum { stored, computed } => {
                write!(f, "the page says checksum {stored:04X}, its bytes give {computed:04X}")
            }
        }
    }
}

/// Checks one page of a cluster that has data checksums.
pub fn check_page(page: &[u8], block: BlockNumber) -> PageCheck {
    let whole = u32::try_from(page.len()).ok().and_then(BlockSize::new).is_some();
    let (true, Some(upper), Some(stored)) = (whole, u16_at(page, UPPER_OFFSET), u16_at(page, CHECKSUM_OFFSET)) else {
        return PageCheck::Invalid { reason: PageFault::Length(page.len()) };
    };
    if upper == 0 {
        return if is_zero(page) { PageCheck::Zero } else { PageCheck::Invalid { reason: PageFault::NewButNotEmpty } };
    }
    let computed = checksum(page, block);
    if computed == stored {
        PageCheck::Valid
    } else {
        PageCheck::Invalid { reason: PageFault::Checksum { stored, computed } }
    }
}

/// The checksum that the page has when it is `block` of its fork; never 0. The checksum in its header does not
/// count.
///
/// The page is a whole one (see [`BlockSize`]); of other lengths the bytes after the last multiple of 128 count
/// as absent.
pub fn checksum(page: &[u8], block: BlockNumber) -> u16 {
    let folded = fold_rows(page) ^ block.as_u32();
    // The remainder is below 65,535, so this neither loses bits nor overflows.
    (folded % 65_535 + 1) as u16
}

const COLUMNS: usize = 32;
const ROW_LEN: usize = COLUMNS * size_of::<u32>();
const PRIME: u32 = 16_777_619;

/// PostgreSQL: `checksumBaseOffsets`.
#[rustfmt::skip]
const STARTS: [u32; COLUMNS] = [
    0x5B1F_36E9, 0xB852_5960, 0x02AB_50AA, 0x1DE6_6D2A, 0x79FF_467A, 0x9BB9_F8A3, 0x217E_7CD2, 0x83E1_3D2C,
    0xF8D4_474F, 0xE39E_B970, 0x42C6_AE16, 0x9932_16FA, 0x7B09_3B5D, 0x98DA_FF3C, 0xF718_902A, 0x0B1C_9CDB,
    0xE58F_764B, 0x1876_36BC, 0x5D7B_3BB1, 0xE73D_E7DE, 0x92BE_C979, 0xCCA6_C0B2, 0x304A_0979, 0x85AA_43D4,
    0x7831_25BB, 0x6CA8_EAA2, 0xE407_EAC6, 0x4B5C_FC3E, 0x9FBF_8C76, 0x15CA_20BE, 0xF2CA_9FD3, 0x959B_D756,
];

#[cfg(target_arch = "x86_64")]
fn fold_rows(page: &[u8]) -> u32 {
    #[target_feature(enable = "avx2")]
    fn with_avx2(page: &[u8]) -> u32 {
        fold_rows_generic(page)
    }
    if is_x86_feature_detected!("avx2") {
        // The only unsafe thing about the call is that the processor must have AVX2, which was just asked.
        #[allow(unsafe_code)]
        unsafe {
            with_avx2(page)
        }
    } else {
        fold_rows_generic(page)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fold_rows(page: &[u8]) -> u32 {
    fold_rows_generic(page)
}

#[inline(always)]
fn fold_rows_generic(page: &[u8]) -> u32 {
    let (rows, _) = page.as_chunks::<ROW_LEN>();
    let mut sums = STARTS;
    if let Some((first, rest)) = rows.split_first() {
        let mut first = *first;
        first[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2].fill(0);
        add_row(&mut sums, &first);
        for row in rest {
            add_row(&mut sums, row);
        }
    }
    for _ in 0..2 {
        add_row(&mut sums, &[0; ROW_LEN]);
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

#[inline(always)]
fn add_row(sums: &mut [u32; COLUMNS], row: &[u8; ROW_LEN]) {
    let (values, _) = row.as_chunks::<4>();
    for (sum, value) in sums.iter_mut().zip(values) {
        let mixed = *sum ^ u32::from_le_bytes(*value);
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAP_13: &[u8] = include_bytes!("../../../testdata/artefacts/13/heap_block_7");
    const HEAP_18: &[u8] = include_bytes!("../../../testdata/artefacts/18/heap_block_7");
    const BTREE_13: &[u8] = include_bytes!("../../../testdata/artefacts/13/btree_block_0");
    const BTREE_18: &[u8] = include_bytes!("../../../testdata/artefacts/18/btree_block_0");

    #[test]
    fn pages_that_postgresql_wrote_are_valid_at_their_place_and_nowhere_else() {
        for (page, block) in [(HEAP_13, 7), (HEAP_18, 7), (BTREE_13, 0), (BTREE_18, 0)] {
            assert_eq!(check_page(page, BlockNumber::new(block)), PageCheck::Valid);
            assert!(page_lsn(page).is_valid());
            let elsewhere = check_page(page, BlockNumber::new(block + 131_072));
            assert!(matches!(elsewhere, PageCheck::Invalid { reason: PageFault::Checksum { .. } }), "{elsewhere:?}");
        }
    }

    #[test]
    fn any_flipped_byte_of_a_page_is_found() {
        for at in 0..HEAP_18.len() {
            let mut page = HEAP_18.to_vec();
            page[at] ^= 0x10;
            assert!(matches!(check_page(&page, BlockNumber::new(7)), PageCheck::Invalid { .. }), "byte {at}");
        }
    }

    #[test]
    fn a_zero_page_is_zero_and_a_new_one_with_any_byte_set_is_damage() {
        let mut page = vec![0; 8192];
        assert_eq!(check_page(&page, BlockNumber::new(1)), PageCheck::Zero);
        for at in (0..UPPER_OFFSET).chain(UPPER_OFFSET + 2..8192) {
            page[at] = 1;
            let reason = PageFault::NewButNotEmpty;
            assert_eq!(check_page(&page, BlockNumber::new(1)), PageCheck::Invalid { reason }, "byte {at}");
            page[at] = 0;
        }
    }

    #[test]
    fn a_piece_of_a_page_is_not_a_page() {
        for len in [0, 7, 16, 127, 512, 8191, 8193, 65_536] {
            let reason = PageFault::Length(len);
            assert_eq!(check_page(&vec![0; len], BlockNumber::new(0)), PageCheck::Invalid { reason });
        }
    }

    #[test]
    fn zeros_are_told_from_a_single_bit_anywhere() {
        for len in [0, 1, 127, 128, 129, 1024, 8192, 8200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn block_sizes_are_powers_of_two_from_1_to_32_kilobytes() {
        let good: Vec<_> = (0..=70_000).filter(|&bytes| BlockSize::new(bytes).is_some()).collect();
        assert_eq!(good, [1024, 2048, 4096, 8192, 16_384, 32_768]);
    }

    /// The definition, written a second time: one value after the other, by column number.
    fn checksum_by_definition(page: &[u8], block: u32) -> u16 {
        let mut sums = STARTS;
        let zeros = [0; 2 * ROW_LEN];
        for (index, value) in page.chunks(4).chain(zeros.chunks(4)).enumerate() {
            let value = if index == 2 { [0, 0, value[2], value[3]] } else { value.try_into().unwrap() };
            let sum = &mut sums[index % 32];
            *sum ^= u32::from_le_bytes(value);
            *sum = (u64::from(*sum) * 16_777_619 % (1 << 32)) as u32 ^ (*sum >> 17);
        }
        ((sums.into_iter().reduce(|a, b| a ^ b).unwrap() ^ block) % 65_535 + 1) as u16
    }

    proptest! {
        #[test]
        fn the_checksum_is_that_of_the_definition(seed: u64, size in 10u32..16, block: u32) {
            let mut state = seed | 1;
            let page: Vec<u8> = (0..1usize << size)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let expected = checksum_by_definition(&page, block);
            prop_assert_eq!(checksum(&page, BlockNumber::new(block)), expected);
            let (rows, _) = page.as_chunks::<ROW_LEN>();
            prop_assert_eq!(rows.len(), page.len() / 128);
            prop_assert_eq!(((fold_rows_generic(&page) ^ block) % 65_535 + 1) as u16, expected);
        }

        #[test]
        fn no_bytes_make_the_page_check_panic(page in proptest::collection::vec(any::<u8>(), 0..2100), block: u32) {
            let _ = check_page(&page, BlockNumber::new(block));
            let _ = page_lsn(&page);
            let _ = checksum(&page, BlockNumber::new(block));
        }
    }
}
