//! What was listed, held small: a cluster may have millions of files.
//!
//! Entries are kept one after the other in the order of their paths, as bytes:
//!
//! ```text
//! bytes that the path has in common with the one before | bytes of the rest | the rest | attributes | length, of a file
//! ```
//!
//! Numbers are varints. The attributes (kind, permissions, owner) of all entries are a handful, and kept once. A relation's file takes ten
//! bytes or so, where a path of its own and its attributes would take a hundred. What this costs is that entries are read in order only; nobody does
//! otherwise, but for one or two that are looked up.
//!
//! What goes wrong: entries that do not ascend, which [`Entries::push`] says.

use std::collections::HashMap;

use super::datadir::{Entry, EntryKind};

/// What many entries have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Attributes {
    is_file: bool,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Entries in the order of their paths.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    bytes: Vec<u8>,
    attributes: Vec<Attributes>,
    numbers: HashMap<Attributes, u64>,
    last_path: Vec<u8>,
    count: usize,
    file_bytes: u64,
}

impl Entries {
    /// Adds an entry; false if its path is not greater than that of the one before.
    #[must_use]
    pub(super) fn push(&mut self, path: &[u8], kind: EntryKind, mode: u32, uid: u32, gid: u32) -> bool {
        if self.count > 0 && path <= self.last_path.as_slice() {
            return false;
        }
        let attributes = Attributes { is_file: kind != EntryKind::Directory, mode, uid, gid };
        let known = &mut self.attributes;
        let number = *self.numbers.entry(attributes).or_insert_with(|| {
            known.push(attributes);
            (known.len() - 1) as u64
        });
        let shared = self.last_path.iter().zip(path).take_while(|(one, other)| one == other).count();
        put(&mut self.bytes, shared as u64);
        put(&mut self.bytes, (path.len() - shared) as u64);
        self.bytes.extend_from_slice(&path[shared..]);
        put(&mut self.bytes, number);
        if let EntryKind::File { len } = kind {
            put(&mut self.bytes, len);
            self.file_bytes += len;
        }
        self.last_path.truncate(shared);
        self.last_path.extend_from_slice(&path[shared..]);
        self.count += 1;
        true
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The entries, in order.
    pub fn iter(&self) -> EntryIter<'_> {
        EntryIter { entries: self, at: 0, path: Vec::new() }
    }

    /// The entry of that path; all before it are passed over.
    pub fn find(&self, path: &[u8]) -> Option<Entry> {
        self.iter().find(|entry| *entry.path >= *path).filter(|entry| *entry.path == *path)
    }
}

/// Entries, one after the other.
#[derive(Debug)]
pub struct EntryIter<'a> {
    entries: &'a Entries,
    at: usize,
    path: Vec<u8>,
}

impl Iterator for EntryIter<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        let bytes = &self.entries.bytes;
        let shared = get(bytes, &mut self.at)? as usize;
        let rest = get(bytes, &mut self.at)? as usize;
        self.path.truncate(shared);
        self.path.extend_from_slice(bytes.get(self.at..self.at + rest)?);
        self.at += rest;
        let number = get(bytes, &mut self.at)? as usize;
        let Attributes { is_file, mode, uid, gid } = *self.entries.attributes.get(number)?;
        let kind = if is_file { EntryKind::File { len: get(bytes, &mut self.at)? } } else { EntryKind::Directory };
        Some(Entry { path: self.path.as_slice().into(), kind, mode, uid, gid })
    }
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The number at `at`, which moves behind it; `None` at the end.
fn get(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn any_entry() -> impl Strategy<Value = (Vec<u8>, (Option<u64>, u32, u32, u32))> {
        let path = prop::collection::vec(prop::sample::select(b"ab/\xff".to_vec()), 1..12);
        (path, (prop::option::of(any::<u64>()), 0..3u32, any::<u32>(), 0..2u32))
    }

    proptest! {
        #[test]
        fn what_was_pushed_in_order_comes_back(entries in prop::collection::vec(any_entry(), 0..60)) {
            let entries: BTreeMap<_, _> = entries.into_iter().collect();
            let mut kept = Entries::default();
            let mut expected = Vec::new();
            for (path, (len, mode, uid, gid)) in entries {
                let len = len.map(|len| len >> 8);
                let kind = len.map_or(EntryKind::Directory, |len| EntryKind::File { len });
                prop_assert!(kept.push(&path, kind, mode, uid, gid));
                prop_assert!(!kept.push(&path, kind, mode, uid, gid));
                expected.push(Entry { path: path.into(), kind, mode, uid, gid });
            }
            prop_assert_eq!(kept.len(), expected.len());
            prop_assert_eq!(kept.iter().collect::<Vec<_>>(), expected.as_slice());
            for entry in expected {
                prop_assert_eq!(kept.find(&[&*entry.path, b"!"].concat()), None);
                prop_assert_eq!(kept.find(&entry.path), Some(entry));
            }
        }
    }

    #[test]
    fn a_relation_takes_a_dozen_bytes() {
        let mut entries = Entries::default();
        for number in 0..10_000 {
            let path = format!("base/16384/{}", 20_000 + number);
            assert!(entries.push(path.as_bytes(), EntryKind::File { len: 8192 }, 0o600, 70, 70));
        }
        assert!(entries.bytes.len() < 12 * entries.len(), "{} bytes", entries.bytes.len());
        assert_eq!(entries.file_bytes(), 10_000 * 8192);
    }
}
