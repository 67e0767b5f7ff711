//! A set of blocks of one fork, small whether few or nearly all of them are in it.
//!
//! Blocks are taken in groups of 65,536. A group is a sorted list of offsets of two bytes each as long as that is smaller than a bitmap, that is
//! up to 4,096 of them; then a bitmap of 8 KB. So the worst case is 8 KB for every 512 MB of relation that has a change in it: 160 MB for
//! 10 TB with a change everywhere, 12.5 MB for 100 million blocks in a row. The list turns into a bitmap at exactly that length, whatever the
//! order in which blocks came: equal sets are equal values, and equal bytes when they are stored.
//!
//! PostgreSQL: `src/common/blkreftable.c` (17+), which does the same with lists that are not sorted.

use crate::pg::BlockNumber;

/// Blocks of a group.
pub const GROUP_BLOCKS: u32 = 1 << 16;
/// Offsets in a list at most; one more and it is a bitmap.
pub const MAX_OFFSETS: usize = 4096;
/// Words of a bitmap.
pub const BITMAP_WORDS: usize = 1024;

/// The blocks of a group, by their offsets in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// Ascending; at most [`MAX_OFFSETS`].
    Offsets(Vec<u16>),
    /// A bit for each block, least significant first; more than [`MAX_OFFSETS`] are set.
    Bitmap(Box<[u64; BITMAP_WORDS]>),
}

impl Group {
    fn insert(&mut self, offset: u16) {
        match self {
            Group::Bitmap(words) => set_bit(words, offset),
            Group::Offsets(offsets) => {
                // Mostly the log goes on where it was, or comes back to the same block.
                if offsets.last().is_some_and(|last| *last == offset) {
                    return;
                }
                let Err(at) = offsets.binary_search(&offset) else { return };
                if offsets.len() == MAX_OFFSETS {
                    let mut words = bitmap_of(offsets);
                    set_bit(&mut words, offset);
                    *self = Group::Bitmap(words);
                } else {
                    offsets.insert(at, offset);
                }
            }
        }
    }

    fn contains(&self, offset: u16) -> bool {
        match self {
            Group::Offsets(offsets) => offsets.binary_search(&offset).is_ok(),
            Group::Bitmap(words) => words[usize::from(offset / 64)] >> (offset % 64) & 1 == 1,
        }
    }

    /// The first offset from `from` on that is in the set.
    fn next_in(&self, from: u16) -> Option<u16> {
        match self {
            Group::Offsets(offsets) => offsets.get(offsets.partition_point(|offset| *offset < from)).copied(),
            Group::Bitmap(words) => next_bit(words, from, 0),
        }
    }

    /// The first offset from `from` on that is not in the set.
    fn next_out(&self, from: u16) -> Option<u16> {
        match self {
            Group::Bitmap(words) => next_bit(words, from, u64::MAX),
            Group::Offsets(offsets) => {
                let rest = &offsets[offsets.partition_point(|offset| *offset < from)..];
                let run = rest.iter().zip(from..=u16::MAX).take_while(|(offset, at)| *offset == at).count();
                u16::try_from(usize::from(from) + run).ok()
            }
        }
    }

    fn len(&self) -> u64 {
        match self {
            Group::Offsets(offsets) => offsets.len() as u64,
            Group::Bitmap(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
        }
    }

    fn union(&mut self, other: &Group) {
        match (&mut *self, other) {
            (Group::Bitmap(words), Group::Bitmap(others)) => {
                words.iter_mut().zip(others.iter()).for_each(|(word, other)| *word |= other);
            }
            (_, Group::Offsets(offsets)) => offsets.iter().for_each(|offset| self.insert(*offset)),
            (Group::Offsets(offsets), Group::Bitmap(words)) => {
                let mut union = words.clone();
                offsets.iter().for_each(|offset| set_bit(&mut union, *offset));
                *self = Group::Bitmap(union);
            }
        }
    }
}

/// A set of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSet {
    /// By number of the group, ascending; none is empty.
    groups: Vec<(u16, Group)>,
}

impl BlockSet {
    /// The set with these groups, by their numbers; `None` unless they are as this room makes them.
    pub fn from_groups(groups: Vec<(u16, Group)>) -> Option<Self> {
        let is_ours = |group: &Group| match group {
            Group::Offsets(offsets) => (1..=MAX_OFFSETS).contains(&offsets.len()) && offsets.is_sorted_by(|a, b| a < b),
            Group::Bitmap(_) => group.len() > MAX_OFFSETS as u64,
        };
        let ascending = groups.is_sorted_by(|a, b| a.0 < b.0);
        (ascending && groups.iter().all(|(_, group)| is_ours(group))).then_some(Self { groups })
    }

    /// Its groups, by their numbers.
    pub fn groups(&self) -> &[(u16, Group)] {
        &self.groups
    }

    /// Adds a block.
    pub fn insert(&mut self, block: BlockNumber) {
        let (number, offset) = place(block);
        let at = match self.groups.last() {
            Some((last, _)) if *last == number => self.groups.len() - 1,
            _ => match self.groups.binary_search_by_key(&number, |(number, _)| *number) {
                Ok(at) => at,
                Err(at) => {
                    self.groups.insert(at, (number, Group::Offsets(Vec::new())));
                    at
                }
            },
        };
        self.groups[at].1.insert(offset);
    }

    /// Whether it has the block.
    pub fn contains(&self, block: BlockNumber) -> bool {
        let (number, offset) = place(block);
        let found = self.groups.binary_search_by_key(&number, |(number, _)| *number);
        found.is_ok_and(|at| self.groups[at].1.contains(offset))
    }

    /// How many blocks it has.
    pub fn len(&self) -> u64 {
        self.groups.iter().map(|(_, group)| group.len()).sum()
    }

    /// Adds all blocks of `other`.
    pub fn union(&mut self, other: BlockSet) {
        for (number, group) in other.groups {
            match self.groups.binary_search_by_key(&number, |(number, _)| *number) {
                Ok(at) => self.groups[at].1.union(&group),
                Err(at) => self.groups.insert(at, (number, group)),
            }
        }
    }

    /// The first block from `from` on that is in the set.
    pub fn next_in(&self, from: u64) -> Option<u64> {
        let (number, offset) = place_of(from)?;
        let mut at = self.groups.partition_point(|(other, _)| *other < number);
        let (found, group) = self.groups.get(at)?;
        if *found == number {
            if let Some(offset) = group.next_in(offset) {
                return Some(block_at(number, offset));
            }
            at += 1;
        }
        let (number, group) = self.groups.get(at)?;
        group.next_in(0).map(|offset| block_at(*number, offset))
    }

    /// The first block from `from` on that is not in the set; the one past the last block there can be, if all are.
    pub fn next_out(&self, from: u64) -> u64 {
        let mut from = from;
        while let Some((number, offset)) = place_of(from) {
            let Ok(at) = self.groups.binary_search_by_key(&number, |(number, _)| *number) else { return from };
            match self.groups[at].1.next_out(offset) {
                Some(offset) => return block_at(number, offset),
                None => from = block_at(number, 0) + u64::from(GROUP_BLOCKS),
            }
        }
        from
    }
}

fn place(block: BlockNumber) -> (u16, u16) {
    let [a, b, c, d] = block.as_u32().to_be_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

fn place_of(block: u64) -> Option<(u16, u16)> {
    u32::try_from(block).ok().map(|block| place(BlockNumber::new(block)))
}

fn block_at(group: u16, offset: u16) -> u64 {
    u64::from(group) * u64::from(GROUP_BLOCKS) + u64::from(offset)
}

fn set_bit(words: &mut [u64; BITMAP_WORDS], offset: u16) {
    words[usize::from(offset / 64)] |= 1 << (offset % 64);
}

fn bitmap_of(offsets: &[u16]) -> Box<[u64; BITMAP_WORDS]> {
    let mut words = Box::new([0; BITMAP_WORDS]);
    offsets.iter().for_each(|offset| set_bit(&mut words, *offset));
    words
}

/// The first bit from `from` on that is set once all words are XORed with `flip`.
fn next_bit(words: &[u64; BITMAP_WORDS], from: u16, flip: u64) -> Option<u16> {
    let first = usize::from(from / 64);
    let rest = (words[first] ^ flip) >> (from % 64) << (from % 64);
    let later = (first + 1..BITMAP_WORDS).map(|at| (at, words[at] ^ flip));
    let (at, word) = std::iter::once((first, rest)).chain(later).find(|(_, word)| *word != 0)?;
    u16::try_from(64 * at).ok().zip(u16::try_from(word.trailing_zeros()).ok()).map(|(base, bit)| base + bit)
}
