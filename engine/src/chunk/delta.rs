//! Pages as differences: what a page's items have in common with the ones before them becomes zeros, before zstd sees it.
//!
//! A page is full of small items that are much like their neighbours: tuple headers with the same transaction and flags, keys and row addresses
//! that count up, line pointers that count down. zstd at its fast levels finds repeated strings, not sequences; on an index of integers
//! it gets to 16 % at half a gigabyte a second. So each item is replaced by its bytewise difference from the item before it, in the order of
//! the line pointers (which in an index is that of the keys), and so is each line pointer. The same index then gets to 0.5 % at four times the speed.
//!
//! ```text
//! page header          as it is: where the line pointers end, where items begin and end
//! line pointers        each less the one before it, 32 bits wrapping
//! the hole             as it is
//! items                heads: the first 32 bytes less those of the item before it, as far as both have them
//!                      whole: all bytes less those of the item before it, where both are of one length; else as heads
//! special space        as it is
//! ```
//!
//! What is done with a page is one byte after all pages of the chunk ([`Mode`]). Whole items are right for keys and for rows of few columns, and wrong for
//! rows of text; a few pairs of the page decide. A page whose items overlap or lie outside their place is left as it is, as is everything
//! that does not look like a page of PostgreSQL: the encoder looks, the decoder believes the byte. Nothing depends on a page being
//! understood right, but its size: what comes out is proved by the fingerprints.
//!
//! What goes wrong: a mode byte or line pointers that lead outside the page, which is damage; all else the fingerprints find.
//!
//! PostgreSQL: `src/include/storage/bufpage.h`, `PageHeaderData`; `itemid.h`, `ItemIdData`.

use std::ops::Range;

/// Bytes of a page header.
const HEADER_LEN: usize = 24;
/// Bytes of a line pointer.
const POINTER_LEN: usize = 4;
/// Bytes of a unit. Items are aligned to it, so no two of them share one, and what fills up an item's last one belongs to it.
const UNIT_LEN: usize = 8;
/// The units of an item that are much like those of its neighbour in any table: PostgreSQL's header, and the first column.
const HEAD: usize = 4;
/// Pairs of items that are looked at to choose the mode.
const SAMPLES: usize = 8;
/// Bytes of which a sum fits into one.
const SUM_LEN: usize = 128;

/// What was done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    AsItIs = 0,
    Heads = 1,
    Whole = 2,
}

impl Mode {
    fn of(byte: u8) -> Option<Self> {
        [Mode::AsItIs, Mode::Heads, Mode::Whole].into_iter().find(|mode| *mode as u8 == byte)
    }
}

/// The units of an item.
#[derive(Clone, Copy)]
struct Item {
    start: usize,
    count: usize,
}

impl Item {
    /// Where a line pointer says that it is; `None` if it does not begin with a unit. One of length 0 leads nowhere, or to another pointer.
    fn at(pointer: u32) -> Option<Self> {
        let (start, len) = ((pointer & 0x7FFF) as usize, (pointer >> 17) as usize);
        (len == 0 || start % UNIT_LEN == 0).then_some(Item { start: start / UNIT_LEN, count: len.div_ceil(UNIT_LEN) })
    }

    fn is_within(self, units: &Range<usize>) -> bool {
        self.start >= units.start && self.start + self.count <= units.end
    }

    /// How many of its units are a difference from the item before it.
    fn shared(self, before: Item, mode: Mode) -> usize {
        if mode == Mode::Whole && self.count == before.count {
            self.count
        } else {
            self.count.min(before.count).min(HEAD)
        }
    }
}

/// Turns pages into differences; keeps its memory from one chunk to the next.
#[derive(Default)]
pub(super) struct Differences {
    out: Vec<u8>,
    items: Vec<Item>,
    used: Vec<u64>,
}

impl Differences {
    /// The pages of a chunk as differences, and a byte for each page; `None` if no page has any.
    pub fn of(&mut self, raw: &[u8], block_len: usize) -> Option<&[u8]> {
        self.out.clear();
        self.out.extend_from_slice(raw);
        let mut any = false;
        for (index, page) in raw.chunks_exact(block_len).enumerate() {
            let mode = self.mode(page);
            if mode != Mode::AsItIs {
                any = true;
                self.subtract(mode, page, index * block_len);
            }
            self.out.push(mode as u8);
        }
        any.then_some(&self.out)
    }

    /// What to do with a page; its items are in `self.items` then.
    fn mode(&mut self, page: &[u8]) -> Mode {
        self.items.clear();
        let Some(Places { pointers, items }) = Places::of(page) else { return Mode::AsItIs };
        self.used.clear();
        self.used.resize(items.end / 64 + 1, 0);
        for pointer in page[pointers].chunks_exact(POINTER_LEN) {
            let Some(item) = Item::at(pointer_at(pointer)) else { return Mode::AsItIs };
            if item.count == 0 {
                continue;
            }
            if !item.is_within(&items) || !self.take(item) {
                return Mode::AsItIs;
            }
            self.items.push(item);
        }
        match self.items.len() {
            0 | 1 => Mode::AsItIs,
            _ if self.are_alike(page) => Mode::Whole,
            _ => Mode::Heads,
        }
    }

    /// Marks the units of an item as used; false if one is already.
    fn take(&mut self, item: Item) -> bool {
        let (word, bit) = (item.start / 64, item.start % 64);
        if bit + item.count <= 64 {
            let mask = (u64::MAX >> (64 - item.count)) << bit;
            let free = self.used[word] & mask == 0;
            self.used[word] |= mask;
            return free;
        }
        let (mut at, end) = (item.start, item.start + item.count);
        while at < end {
            let (word, bit) = (at / 64, at % 64);
            let count = (end - at).min(64 - bit);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if self.used[word] & mask != 0 {
                return false;
            }
            self.used[word] |= mask;
            at += count;
        }
        true
    }

    /// Whether most bytes after the heads of neighbours are the same, for as many of them as are of one length.
    fn are_alike(&self, page: &[u8]) -> bool {
        let step = (self.items.len() / SAMPLES).max(1);
        let (mut same, mut all) = (0, 0);
        for pair in self.items.windows(2).step_by(step) {
            let [before, item] = [pair[0], pair[1]];
            if before.count == item.count && item.count > HEAD {
                let rest = |item: Item| {
                    page[item.start * UNIT_LEN..][..item.count * UNIT_LEN][HEAD * UNIT_LEN..].chunks(SUM_LEN)
                };
                same += rest(before).zip(rest(item)).map(|(before, item)| same_bytes(before, item)).sum::<usize>();
                all += (item.count - HEAD) * UNIT_LEN;
            }
        }
        2 * same >= all
    }

    /// Writes the differences of a page over its copy.
    fn subtract(&mut self, mode: Mode, page: &[u8], at: usize) {
        let Some(Places { pointers, .. }) = Places::of(page) else { return };
        let out = &mut self.out[at..][..page.len()];
        let mut before = 0;
        for (out, pointer) in
            out[pointers.clone()].chunks_exact_mut(POINTER_LEN).zip(page[pointers].chunks_exact(POINTER_LEN))
        {
            let pointer = pointer_at(pointer);
            out.copy_from_slice(&pointer.wrapping_sub(before).to_le_bytes());
            before = pointer;
        }
        for pair in self.items.windows(2) {
            let len = UNIT_LEN * pair[1].shared(pair[0], mode);
            let (at, before) = (pair[1].start * UNIT_LEN, pair[0].start * UNIT_LEN);
            let (out, item, before) = (&mut out[at..][..len], &page[at..][..len], &page[before..][..len]);
            for ((out, item), before) in out.iter_mut().zip(item).zip(before) {
                *out = item.wrapping_sub(*before);
            }
        }
    }
}

/// How many bytes are the same, of up to [`SUM_LEN`].
fn same_bytes(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).fold(0_u8, |sum, (a, b)| sum + u8::from(a == b)).into()
}

/// Where things are in a page.
struct Places {
    /// The bytes of the line pointers.
    pointers: Range<usize>,
    /// The units in which items may be.
    items: Range<usize>,
}

impl Places {
    /// `None` if that is not a page.
    fn of(page: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(usize::from(u16::from_le_bytes([*page.get(at)?, *page.get(at + 1)?])));
        let (lower, upper, special, version) = (word(12)?, word(14)?, word(16)?, word(18)?);
        let is_page = version == page.len() | 4
            && lower > HEADER_LEN
            && lower % POINTER_LEN == 0
            && lower <= upper
            && upper <= special
            && special <= page.len();
        let items = upper.div_ceil(UNIT_LEN)..page.len() / UNIT_LEN;
        is_page.then_some(Places { pointers: HEADER_LEN..lower, items })
    }
}

fn pointer_at(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Makes the pages again of what [`Differences::of`] made of them; false if that cannot be.
pub(super) fn undo(pages: &mut [u8], modes: &[u8], block_len: usize) -> bool {
    pages.chunks_exact_mut(block_len).zip(modes).all(|(page, mode)| match Mode::of(*mode) {
        Some(Mode::AsItIs) => true,
        Some(mode) => add(mode, page).is_some(),
        None => false,
    })
}

/// Makes a page of its differences; `None` if they lead outside of it.
fn add(mode: Mode, page: &mut [u8]) -> Option<()> {
    let Places { pointers, items } = Places::of(page)?;
    let mut pointer = 0_u32;
    let mut before = Item { start: 0, count: 0 };
    for at in pointers.step_by(POINTER_LEN) {
        let bytes = page.get_mut(at..at + POINTER_LEN)?;
        pointer = pointer.wrapping_add(pointer_at(bytes));
        bytes.copy_from_slice(&pointer.to_le_bytes());
        let item = Item::at(pointer)?;
        if item.count == 0 {
            continue;
        }
        if !item.is_within(&items) {
            return None;
        }
        let len = UNIT_LEN * item.shared(before, mode);
        let (at, from) = (UNIT_LEN * item.start, UNIT_LEN * before.start);
        let (item_bytes, before_bytes) = if at < from {
            let (low, high) = page.split_at_mut(from);
            (low.get_mut(at..at + len)?, high.get(..len)?)
        } else {
            let (low, high) = page.split_at_mut(at);
            (high.get_mut(..len)?, low.get(from..from + len)?)
        };
        for (byte, before) in item_bytes.iter_mut().zip(before_bytes) {
            *byte = byte.wrapping_add(*before);
        }
        before = item;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 1024;

    /// A page with these items, from its end downwards; each begins at a unit.
    fn page(items: &[Vec<u8>], special: usize) -> Vec<u8> {
        let mut page = vec![0; LEN];
        let (mut lower, mut upper) = (HEADER_LEN, LEN - special);
        for bytes in items {
            let start = (upper - bytes.len()) / UNIT_LEN * UNIT_LEN;
            if start < lower + POINTER_LEN {
                break;
            }
            upper = start;
            page[start..start + bytes.len()].copy_from_slice(bytes);
            let pointer = start as u32 | 1 << 15 | (bytes.len() as u32) << 17;
            page[lower..lower + POINTER_LEN].copy_from_slice(&pointer.to_le_bytes());
            lower += POINTER_LEN;
        }
        for (at, value) in [(12, lower), (14, upper), (16, LEN - special), (18, LEN | 4)] {
            page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
        page
    }

    fn again(raw: &[u8]) -> Option<Vec<u8>> {
        let mut differences = Differences::default();
        let out = differences.of(raw, LEN)?;
        let (pages, modes) = out.split_at(raw.len());
        let mut pages = pages.to_vec();
        assert!(undo(&mut pages, modes, LEN));
        Some(pages)
    }

    proptest! {
        #[test]
        fn pages_of_any_items_come_back(
            items in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..90), 0..40),
            same in prop::collection::vec(any::<u8>(), 1..60),
            count in 0usize..30,
            special in prop::sample::select(vec![0usize, 8, 16]),
        ) {
            let alike: Vec<_> = (0..count).map(|i| same.iter().map(|byte| byte.wrapping_add(i as u8)).collect()).collect();
            let raw = [page(&items, special), page(&alike, special), vec![7; LEN]].concat();
            if let Some(found) = again(&raw) {
                prop_assert_eq!(found, raw);
            }
        }

        #[test]
        fn pages_with_any_damage_come_back(
            items in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 2..20),
            damage in prop::collection::vec((0usize..140, any::<u8>()), 1..20),
        ) {
            let mut raw = page(&items, 16);
            damage.iter().for_each(|(at, byte)| raw[*at] = *byte);
            if let Some(found) = again(&raw) {
                prop_assert_eq!(found, raw);
            }
        }

        #[test]
        fn no_differences_lead_outside_a_page(
            mut pages in prop::collection::vec(any::<u8>(), LEN..=LEN),
            lower in 0u16..1100, upper in 0u16..1100, special in 0u16..1100, mode: u8,
        ) {
            for (at, value) in [(12, lower), (14, upper), (16, special), (18, LEN as u16 | 4)] {
                pages[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            undo(&mut pages, &[mode % 4], LEN);
        }
    }

    #[test]
    fn an_index_of_integers_becomes_zeros() {
        let items: Vec<_> = (0..40u8).map(|i| vec![0, 0, 1, 0, i, 0, 16, 0, i, 1, 0, 0, 0, 0, 0, 0]).collect();
        let raw = page(&items, 16);
        let mut differences = Differences::default();
        let out = differences.of(&raw, LEN).unwrap();
        assert_eq!(out[LEN..], [Mode::Whole as u8]);
        let zeros = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == 0).count();
        assert!(zeros(&out[..LEN]) > zeros(&raw) + 40, "{} and {}", zeros(out), zeros(&raw));
        let items = out[LEN - 16 - 39 * 16..LEN - 32].chunks_exact(16);
        assert!(items.clone().all(|item| item == [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(again(&raw).unwrap(), raw);
    }

    #[test]
    fn pointers_that_lead_to_other_pointers_are_passed_over() {
        let mut raw = page(&[vec![1; 16], vec![2; 16], vec![3; 16]], 0);
        let redirect = 3_u32 | 2 << 15;
        raw[HEADER_LEN + 4..HEADER_LEN + 8].copy_from_slice(&redirect.to_le_bytes());
        assert_eq!(again(&raw).unwrap(), raw);
    }

    #[test]
    fn items_that_overlap_are_left_alone() {
        let mut raw = page(&[vec![1; 16], vec![2; 16], vec![3; 16]], 0);
        let second = raw[HEADER_LEN + 4..HEADER_LEN + 8].to_vec();
        raw[HEADER_LEN + 8..HEADER_LEN + 12].copy_from_slice(&second);
        assert_eq!(again(&raw), None);
    }

    #[test]
    fn rows_of_text_are_not_subtracted_from_each_other() {
        let text = |seed: u64| (0..80u64).map(|i| (seed * 31 + i * i * (seed + 7)) as u8 | 64).collect::<Vec<_>>();
        let raw = page(&(0..9).map(text).collect::<Vec<_>>(), 0);
        assert_eq!(Differences::default().of(&raw, LEN).unwrap()[LEN], Mode::Heads as u8);
        assert_eq!(again(&raw).unwrap(), raw);
    }
}
