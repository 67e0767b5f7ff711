//! The files that are going to be written, held small: a cluster may have millions.
//!
//! A file is a path in one long row of bytes and 32 bytes besides. Its block maps are not held: they are in the backup's file table, a page of which is
//! read again when its files have their turn, and proved again.
//!
//! Each file's CRC-32C for PostgreSQL's `backup_manifest` is summed up from its pieces in whatever order they come: a CRC is linear, so the
//! contribution of a piece is its own CRC moved over the bytes that follow it.
//!
//! What goes wrong: more than 4 GB of paths, which is refused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::crc::shift;
use crate::error::{Error, ErrorKind, Result};
use crate::repo::{FileEntry, FileKind};
use crate::target::Owner;

/// Files of which no two are made at once, seen from one of them: one in so many.
const STRIPES: usize = 64;

/// Where the file table has an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EntryPlace {
    /// The number of the page, in the manifest's order.
    pub page: u32,
    /// The number of the entry in the page.
    pub slot: u16,
}

/// A file to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TargetFile<'a> {
    /// Relative to the data directory.
    pub path: &'a [u8],
    /// What the backup says that it is.
    pub kind: FileKind,
    /// In bytes.
    pub len: u64,
    /// Owner and mode in the target.
    pub owner: Owner,
}

impl TargetFile<'_> {
    /// The path for people.
    pub fn display_path(&self) -> String {
        String::from_utf8_lossy(self.path).into_owned()
    }
}

struct Slot {
    len: u64,
    path_end: u32,
    page: u32,
    owner: u32,
    crc: AtomicU32,
    slot: u16,
    kind: FileKind,
    made: AtomicBool,
}

/// The files to write, in the order in which they were added.
pub(crate) struct TargetFiles {
    paths: Vec<u8>,
    slots: Vec<Slot>,
    owners: Vec<Owner>,
    numbers: HashMap<(u32, u32, u32), u32>,
    making: Vec<Mutex<()>>,
}

impl Default for TargetFiles {
    fn default() -> Self {
        let making = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self { paths: Vec::new(), slots: Vec::new(), owners: Vec::new(), numbers: HashMap::new(), making }
    }
}

impl TargetFiles {
    /// Adds a file whose block maps are those of the entry at `place`.
    ///
    /// # Errors
    /// `Unsupported` if there are too many.
    pub fn push(&mut self, entry: &FileEntry, place: EntryPlace, owner: Owner) -> Result<()> {
        self.paths.extend_from_slice(&entry.path);
        let too_many = |_| Error::new(ErrorKind::Unsupported, "the backup has more than 4 GB of paths");
        let path_end = u32::try_from(self.paths.len()).map_err(too_many)?;
        let owners = &mut self.owners;
        let owner = *self.numbers.entry((owner.uid, owner.gid, owner.mode)).or_insert_with(|| {
            owners.push(owner);
            // There are no more owners than files, and no more of these than bytes of paths.
            (owners.len() - 1) as u32
        });
        let EntryPlace { page, slot } = place;
        let (crc, made) = (AtomicU32::new(0), AtomicBool::new(false));
        self.slots.push(Slot { len: entry.len, path_end, page, owner, crc, slot, kind: entry.kind, made });
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The file of that number.
    pub fn get(&self, index: usize) -> TargetFile<'_> {
        let Slot { len, path_end, owner, kind, .. } = self.slots[index];
        let begin = index.checked_sub(1).map_or(0, |before| self.slots[before].path_end);
        let path = &self.paths[begin as usize..path_end as usize];
        TargetFile { path, kind, len, owner: self.owners[owner as usize] }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TargetFile<'_>> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.len).sum()
    }

    /// Where a file's entry is.
    pub fn place(&self, index: usize) -> EntryPlace {
        let Slot { page, slot, .. } = self.slots[index];
        EntryPlace { page, slot }
    }

    /// Whether the file is made; nobody else makes it while the answer is held.
    pub fn made(&self, index: usize) -> Made<'_> {
        let guard = self.making[index % STRIPES].lock().unwrap_or_else(PoisonError::into_inner);
        Made { made: &self.slots[index].made, _guard: guard }
    }

    /// The CRC-32C of a file, once all of its pieces are written.
    pub fn crc32c(&self, index: usize) -> u32 {
        let Slot { len, crc, .. } = &self.slots[index];
        // Of an all-zero file, then of what is not zero in it.
        let zeros = shift(!0, *len);
        !(zeros ^ crc.load(Ordering::Relaxed))
    }

    /// Adds a piece of a file to its CRC.
    pub fn add_to_crc(&self, index: usize, offset: u64, bytes: &[u8]) {
        let Slot { len, crc, .. } = &self.slots[index];
        let own = !crc32c::crc32c_append(!0, bytes);
        crc.fetch_xor(shift(own, len - offset - bytes.len() as u64), Ordering::Relaxed);
    }
}

/// Whether a file is made, held.
pub(crate) struct Made<'a> {
    made: &'a AtomicBool,
    _guard: MutexGuard<'a, ()>,
}

impl Made<'_> {
    /// Whether it is.
    pub fn is(&self) -> bool {
        self.made.load(Ordering::Relaxed)
    }

    /// Now it is.
    pub fn set(&self) {
        self.made.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(len: u64) -> TargetFiles {
        let mut files = TargetFiles::default();
        let path = b"base/1".to_vec();
        let entry = FileEntry { path, kind: FileKind::File, mode: 0, uid: 0, gid: 0, len, parts: Vec::new() };
        files.push(&entry, EntryPlace { page: 0, slot: 0 }, Owner { uid: 0, gid: 0, mode: 0 }).unwrap();
        files
    }

    proptest! {
        #[test]
        fn the_crc_of_a_file_is_that_of_its_pieces_in_any_order(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..300),
            cuts in prop::collection::vec(1usize..40, 0..20),
            backwards: bool,
        ) {
            let files = file(bytes.len() as u64);
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts.into_iter().chain([bytes.len()]) {
                let end = (at + cut).min(bytes.len());
                pieces.push((at as u64, &bytes[at..end]));
                at = end;
            }
            if backwards {
                pieces.reverse();
            }
            for (offset, piece) in pieces.into_iter().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
                files.add_to_crc(0, offset, piece);
            }
            prop_assert_eq!(files.crc32c(0), crc32c::crc32c(&bytes));
        }

        #[test]
        fn files_are_what_was_added(
            added in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..9), any::<u64>(), 0..4u32, any::<u16>()), 0..50),
        ) {
            let mut files = TargetFiles::default();
            for (path, len, owner, slot) in &added {
                let kind = if owner % 2 == 0 { FileKind::File } else { FileKind::Wal };
                let entry = FileEntry { path: path.clone(), kind, mode: 0, uid: 0, gid: 0, len: *len, parts: Vec::new() };
                let owner = Owner { uid: *owner, gid: 7, mode: 0o600 };
                files.push(&entry, EntryPlace { page: owner.uid, slot: *slot }, owner).unwrap();
            }
            prop_assert_eq!(files.len(), added.len());
            for (index, (path, len, owner, slot)) in added.iter().enumerate() {
                let file = files.get(index);
                prop_assert_eq!((file.path, file.len, file.owner.uid), (path.as_slice(), *len, *owner));
                prop_assert_eq!(file.kind == FileKind::File, owner % 2 == 0);
                prop_assert_eq!(files.place(index), EntryPlace { page: *owner, slot: *slot });
            }
        }
    }

    #[test]
    fn a_file_takes_32_bytes_and_its_path() {
        assert_eq!(size_of::<Slot>(), 32);
    }
}
