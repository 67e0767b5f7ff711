//! The file table: which files a backup has, and where their block maps are (`format.md`, The file table).
//!
//! The table is cut into pages at paths that their own hashes choose, so the same files make the same pages in every backup, and a page in
//! which nothing changed is referred to, not written again. [`TableWriter`] cuts and reuses, [`Manifest::pages`](super::Manifest) lists them,
//! [`read_page`] reads one.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use super::layer::PART_BLOCKS;
use super::names::{ClusterName, PackKind, PackName};
use super::pack::{Packer, Place, RECORD_CHECK_LEN, read_record};
use super::stack::MAX_LAYERS;
use super::{Manifest, Repository};
use crate::chunk::hash16;
use crate::error::{Error, Result};
use crate::store::Store;

/// Entries of a page at most.
const MAX_PAGE_ENTRIES: usize = 1024;
/// Bytes of a path at most: no file system has longer ones.
const MAX_PATH_LEN: usize = 4096;
/// Bytes of a file at most, so that sums of them have room.
const MAX_FILE_LEN: u64 = 1 << 50;
/// Bytes of a part at least, but for the last of a file: of the smallest blocks.
const MIN_PART_LEN: u64 = PART_BLOCKS as u64 * 1024;

/// What an entry of the file table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum FileKind {
    /// A file of the data directory or of a tablespace.
    File,
    /// A directory.
    Directory,
    /// A WAL segment or timeline history that the backup needs to become consistent.
    Wal,
    /// A configuration file from outside the data directory.
    External,
}

impl From<FileKind> for u8 {
    fn from(kind: FileKind) -> u8 {
        match kind {
            FileKind::File => 0,
            FileKind::Directory => 1,
            FileKind::Wal => 2,
            FileKind::External => 3,
        }
    }
}

impl TryFrom<u8> for FileKind {
    type Error = String;

    fn try_from(number: u8) -> std::result::Result<Self, String> {
        match number {
            0 => Ok(FileKind::File),
            1 => Ok(FileKind::Directory),
            2 => Ok(FileKind::Wal),
            3 => Ok(FileKind::External),
            _ => Err(format!("unknown kind of file {number}")),
        }
    }
}

/// One file or directory of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// Path below the data directory; tablespaces are `pg_tblspc/OID/...`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub len: u64,
    /// The block map of each part.
    pub parts: Vec<PartMap>,
}

impl FileEntry {
    /// The path for people.
    pub fn display_path(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

/// The block map of one part of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartMap {
    /// The layers, newest first.
    pub layers: Vec<LayerPlace>,
    /// The packs that hold the chunks that the layers name, ascending.
    pub data: Vec<PackName>,
}

/// Where a layer's two records are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerPlace {
    /// The map pack.
    pub pack: PackName,
    /// Offset of the locations; the fingerprints follow.
    pub offset: u64,
    /// Bytes of the locations, checksum included.
    pub locations_len: u32,
    /// Bytes of the fingerprints, checksum included; 0 if there are none.
    pub fingerprints_len: u32,
}

impl LayerPlace {
    /// Blocks that the layer has in chunks.
    pub fn stored_blocks(&self) -> u64 {
        u64::from(self.fingerprints_len).saturating_sub(RECORD_CHECK_LEN as u64) / 16
    }
}

/// Where a page of the file table is, as a manifest says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// Where its record is.
    pub place: Place,
    /// Bytes of the record, checksum included.
    pub len: u32,
    /// `H16` of its body, by which a later backup recognises it.
    pub id: [u8; 16],
    /// Its number of entries.
    pub entries: u32,
}

#[derive(Serialize, Deserialize)]
struct StoredPage {
    packs: Vec<PackName>,
    entries: Vec<StoredEntry>,
}

#[derive(Serialize, Deserialize)]
struct StoredEntry {
    path: Vec<u8>,
    kind: FileKind,
    mode: u32,
    uid: u32,
    gid: u32,
    len: u64,
    parts: Vec<StoredPart>,
}

#[derive(Serialize, Deserialize)]
struct StoredPart {
    layers: Vec<StoredLayer>,
    data: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct StoredLayer {
    pack: u32,
    offset: u64,
    locations_len: u32,
    fingerprints_len: u32,
}

/// Numbers the packs of a page in the order of their first use.
#[derive(Default)]
struct PackNumbers {
    packs: Vec<PackName>,
    numbers: HashMap<PackName, u32>,
}

impl PackNumbers {
    fn number(&mut self, pack: PackName) -> u32 {
        let packs = &mut self.packs;
        *self.numbers.entry(pack).or_insert_with(|| {
            packs.push(pack);
            (packs.len() - 1) as u32
        })
    }
}

/// Encodes a page; equal entries make equal bytes.
pub(super) fn encode_page(entries: &[FileEntry]) -> Result<Vec<u8>> {
    let mut numbers = PackNumbers::default();
    let layer = |place: &LayerPlace, numbers: &mut PackNumbers| StoredLayer {
        pack: numbers.number(place.pack),
        offset: place.offset,
        locations_len: place.locations_len,
        fingerprints_len: place.fingerprints_len,
    };
    let mut part = |part: &PartMap| StoredPart {
        layers: part.layers.iter().map(|place| layer(place, &mut numbers)).collect(),
        data: part.data.iter().map(|pack| numbers.number(*pack)).collect(),
    };
    let entries = entries.iter().map(|entry| StoredEntry {
        path: entry.path.clone(),
        kind: entry.kind,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        len: entry.len,
        parts: entry.parts.iter().map(&mut part).collect(),
    });
    let entries = entries.collect();
    super::encode(&StoredPage { packs: numbers.packs, entries })
}

pub(super) fn decode_page(body: &[u8], place: &str) -> Result<(Vec<PackName>, Vec<FileEntry>)> {
    let page: StoredPage = super::decode(body, place)?;
    if let Some(what) = absurdity(&page) {
        return Err(Error::corrupt(place, format!("the file table is damaged: {what}")));
    }
    let pack = |number: u32, kind: PackKind| {
        let named = page.packs.get(number as usize).filter(|pack| pack.kind == kind);
        named.copied().ok_or_else(|| Error::corrupt(place, format!("the file table names no pack {number}")))
    };
    let layer = |stored: &StoredLayer| {
        Ok(LayerPlace {
            pack: pack(stored.pack, PackKind::Map)?,
            offset: stored.offset,
            locations_len: stored.locations_len,
            fingerprints_len: stored.fingerprints_len,
        })
    };
    let part = |stored: &StoredPart| {
        let layers = stored.layers.iter().map(layer).collect::<Result<_>>()?;
        let data = stored.data.iter().map(|number| pack(*number, PackKind::Data)).collect::<Result<_>>()?;
        Ok(PartMap { layers, data })
    };
    let mut entries: Vec<FileEntry> = Vec::with_capacity(page.entries.len());
    for stored in page.entries {
        if entries.last().is_some_and(|last| last.path >= stored.path) {
            return Err(Error::corrupt(place, "the file table is out of order"));
        }
        let parts = stored.parts.iter().map(part).collect::<Result<_>>()?;
        let StoredEntry { path, kind, mode, uid, gid, len, .. } = stored;
        entries.push(FileEntry { path, kind, mode, uid, gid, len, parts });
    }
    Ok((page.packs, entries))
}

/// What no writer would write, if there is something like that in a page.
fn absurdity(page: &StoredPage) -> Option<String> {
    if page.entries.len() > MAX_PAGE_ENTRIES {
        return Some(format!("{} entries in a page", page.entries.len()));
    }
    page.entries.iter().find_map(|entry| {
        let StoredEntry { path, kind, len, parts, .. } = entry;
        let part_is_absurd = |part: &StoredPart| part.layers.len() > MAX_LAYERS || part.data.len() > page.packs.len();
        let what = if path.len() > MAX_PATH_LEN {
            format!("a path of {} bytes", path.len())
        } else if *len > MAX_FILE_LEN || (*kind == FileKind::Directory && *len > 0) {
            format!("{kind:?} of {len} bytes")
        } else if parts.len() as u64 > len.div_ceil(MIN_PART_LEN) {
            format!("{} block maps for {len} bytes", parts.len())
        } else if parts.iter().any(part_is_absurd) {
            "a block map of too many layers or packs".to_owned()
        } else {
            return None;
        };
        Some(what)
    })
}

/// A page that was read.
#[derive(Debug)]
pub struct TablePage {
    /// Every pack that its entries need.
    pub packs: Vec<PackName>,
    /// Its entries, ascending.
    pub entries: Vec<FileEntry>,
}

/// Reads and proves one page.
///
/// # Errors
/// `Missing` or `Corrupt`, with the object.
pub fn read_page(store: &dyn Store, cluster: &ClusterName, page: &PagePlace) -> Result<TablePage> {
    let object = page.place.pack.object(cluster)?;
    let place = format!("{object} at {}", page.place.offset);
    let body = read_record(store, &object, page.place.offset, page.len)?;
    let (packs, entries) = decode_page(&body, &place)?;
    if hash16(&body) != page.id || entries.len() != page.entries as usize {
        return Err(Error::corrupt(place, "this is not the page of the file table that the manifest names"));
    }
    Ok(TablePage { packs, entries })
}

/// The files of a backup, looked up in ascending order of their paths; one page of its file table is in memory at a time.
pub(crate) struct TableCursor<'a> {
    repo: &'a Repository,
    backup: Option<&'a Manifest>,
    next_page: usize,
    page: std::iter::Peekable<std::vec::IntoIter<FileEntry>>,
}

impl<'a> TableCursor<'a> {
    /// A cursor before the first file of a backup; without one, nothing is found.
    pub fn new(repo: &'a Repository, backup: Option<&'a Manifest>) -> Self {
        Self { repo, backup, next_page: 0, page: Vec::new().into_iter().peekable() }
    }

    /// The file at `path`, which is greater than the last that was asked for.
    ///
    /// # Errors
    /// `Missing` or `Corrupt` for the page that would have it.
    pub fn find(&mut self, path: &[u8]) -> Result<Option<FileEntry>> {
        let Some(backup) = self.backup else { return Ok(None) };
        loop {
            while self.page.next_if(|entry| *entry.path < *path).is_some() {}
            if self.page.peek().is_some() {
                let found = self.page.next_if(|entry| entry.path == path);
                return Ok(found.filter(|entry| entry.kind == FileKind::File));
            }
            let Some(page) = backup.pages.get(self.next_page) else { return Ok(None) };
            self.next_page += 1;
            self.page = read_page(&**self.repo.store(), &backup.cluster, page)?.entries.into_iter().peekable();
        }
    }
}

/// Writes the file table of a backup.
///
/// Entries come in the order of their paths, but for some that are only known at the end. Where a page is cut depends on the paths since the last
/// entry whose hash says so. So only the entries between two such are held back where others may come in between; all others are
/// written as they come.
pub struct TableWriter<'a> {
    packer: &'a Packer,
    known: HashMap<[u8; 16], PagePlace>,
    /// What the paths of late entries begin with.
    late: Vec<Vec<u8>>,
    open: Vec<FileEntry>,
    /// Whether late entries may come between the open ones.
    holds: bool,
    last_path: Option<Vec<u8>>,
    /// The last path before the open entries.
    cut_path: Option<Vec<u8>>,
    held: Vec<Held>,
    pages: Vec<PagePlace>,
    packs: BTreeSet<PackName>,
}

/// Entries that others may come in between.
struct Held {
    /// The number of pages that were written before.
    page: usize,
    /// The path of the last entry before them.
    after: Option<Vec<u8>>,
    entries: Vec<FileEntry>,
}

impl<'a> TableWriter<'a> {
    /// A writer that refers to the `known` pages of an earlier backup where they fit.
    pub fn new(packer: &'a Packer, known: &[PagePlace]) -> Self {
        Self::expecting(packer, known, &[])
    }

    /// The same, with entries to come at the end whose paths begin with one of `late`.
    pub fn expecting(packer: &'a Packer, known: &[PagePlace], late: &[&[u8]]) -> Self {
        Self {
            packer,
            known: known.iter().map(|page| (page.id, page.clone())).collect(),
            late: late.iter().map(|prefix| prefix.to_vec()).collect(),
            open: Vec::new(),
            holds: false,
            last_path: None,
            cut_path: None,
            held: Vec::new(),
            pages: Vec::new(),
            packs: BTreeSet::new(),
        }
    }

    /// Adds an entry; paths ascend.
    ///
    /// # Errors
    /// What the store says; `Bug` if paths don't ascend.
    pub fn push(&mut self, entry: FileEntry) -> Result<()> {
        let last = self.last_path.as_deref();
        let passes = |prefix: &Vec<u8>| last.is_none_or(|last| last < prefix.as_slice()) && *prefix <= entry.path;
        self.holds |= self.late.iter().any(|prefix| passes(prefix) || entry.path.starts_with(prefix));
        self.append(entry)
    }

    fn append(&mut self, entry: FileEntry) -> Result<()> {
        if self.last_path.as_ref().is_some_and(|last| *last >= entry.path) {
            return Err(Error::bug(format!("{} comes too late in the file table", entry.display_path())));
        }
        let cut_here = blake3::hash(&entry.path).as_bytes()[0] == 0;
        self.last_path = Some(entry.path.clone());
        self.open.push(entry);
        if cut_here && self.holds {
            self.hold();
            Ok(())
        } else if cut_here || (!self.holds && self.open.len() == MAX_PAGE_ENTRIES) {
            self.write_page()
        } else {
            Ok(())
        }
    }

    fn hold(&mut self) {
        let (page, entries) = (self.pages.len(), std::mem::take(&mut self.open));
        let after = std::mem::replace(&mut self.cut_path, self.last_path.clone());
        self.held.push(Held { page, after, entries });
        self.holds = false;
    }

    fn write_page(&mut self) -> Result<()> {
        let entries = std::mem::take(&mut self.open);
        if entries.is_empty() {
            return Ok(());
        }
        self.cut_path.clone_from(&self.last_path);
        let body = encode_page(&entries)?;
        let id = hash16(&body);
        for part in entries.iter().flat_map(|entry| &entry.parts) {
            self.packs.extend(part.layers.iter().map(|layer| layer.pack));
            self.packs.extend(&part.data);
        }
        let page = match self.known.get(&id) {
            Some(page) => page.clone(),
            None => {
                let len = u32::try_from(body.len() + RECORD_CHECK_LEN).map_err(|_| Error::bug("a page of 4 GiB"))?;
                let place = self.packer.append_checked(vec![body])?;
                PagePlace { place, len, id, entries: entries.len() as u32 }
            }
        };
        self.packs.insert(page.place.pack);
        self.pages.push(page);
        Ok(())
    }

    /// Writes what is left; the pages in order, and every pack that the backup needs, ascending.
    ///
    /// # Errors
    /// What the store says.
    pub fn finish(self) -> Result<(Vec<PagePlace>, Vec<PackName>)> {
        self.finish_with(Vec::new())
    }

    /// The same with the late entries, in whatever order.
    ///
    /// # Errors
    /// What the store says; `Bug` for one that was not expected where it belongs.
    pub fn finish_with(mut self, mut late: Vec<FileEntry>) -> Result<(Vec<PagePlace>, Vec<PackName>)> {
        self.hold();
        late.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let mut late = late.into_iter().peekable();
        let mut written = std::mem::take(&mut self.pages).into_iter();
        let mut held = std::mem::take(&mut self.held).into_iter().peekable();
        let mut taken = 0;
        while let Some(Held { page, after, mut entries }) = held.next() {
            self.pages.extend(written.by_ref().take(page - taken));
            taken = page;
            let end = entries.last().map(|last| last.path.clone()).filter(|_| held.peek().is_some());
            while let Some(entry) = late.next_if(|entry| end.as_ref().is_none_or(|end| entry.path <= *end)) {
                entries.push(entry);
            }
            entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
            self.last_path = after;
            entries.into_iter().try_for_each(|entry| self.append(entry))?;
        }
        self.write_page()?;
        Ok((self.pages, self.packs.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::repo::BackupId;
    use crate::store::MemoryStore;

    fn run(number: u8) -> BackupId {
        format!("20261122T160312Z-000000{number:02x}").parse().unwrap()
    }

    fn entry(number: u32) -> FileEntry {
        let pack = |kind| PackName { run: run(0), seq: number % 3, kind };
        let layers = vec![LayerPlace {
            pack: pack(PackKind::Map),
            offset: u64::from(number),
            locations_len: 100,
            fingerprints_len: 32,
        }];
        let part = PartMap { layers, data: vec![pack(PackKind::Data)] };
        let path = format!("base/5/{number:06}").into_bytes();
        FileEntry { path, kind: FileKind::File, mode: 0o600, uid: 1, gid: 2, len: 8192, parts: vec![part] }
    }

    fn write(store: &MemoryStore, id: BackupId, entries: &[FileEntry], known: &[PagePlace]) -> Vec<PagePlace> {
        let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), id, PackKind::Map);
        let mut writer = TableWriter::new(&packer, known);
        for entry in entries {
            writer.push(entry.clone()).unwrap();
        }
        let (pages, packs) = writer.finish().unwrap();
        assert!(pages.iter().all(|page| packs.contains(&page.place.pack)));
        packer.finish().unwrap();
        pages
    }

    fn read(store: &MemoryStore, pages: &[PagePlace]) -> Vec<FileEntry> {
        pages.iter().flat_map(|page| read_page(store, &ClusterName::default(), page).unwrap().entries).collect()
    }

    #[test]
    fn one_changed_file_rewrites_one_page() {
        let store = MemoryStore::new();
        let mut entries: Vec<_> = (0..5000).map(entry).collect();
        let before = write(&store, run(1), &entries, &[]);
        entries[2500].len = 1;
        entries.remove(100);
        let after = write(&store, run(2), &entries, &before);
        assert_eq!(read(&store, &after), entries);
        let rewritten = after.iter().filter(|page| page.place.pack.run == run(2)).count();
        assert!(before.len() > 10 && rewritten <= 2, "{rewritten} of {}", before.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn late_entries_make_the_same_table(
            count in 0u32..4000,
            places in prop::collection::vec(0u32..4000, 0..4),
            late in prop::collection::vec(0u32..60, 0..40),
        ) {
            let prefixes: Vec<_> = places.iter().map(|place| format!("base/5/{place:06}-").into_bytes()).collect();
            let mut all: Vec<_> = (0..count).map(entry).collect();
            let mut late_entries = Vec::new();
            for (number, prefix) in late.iter().collect::<BTreeSet<_>>().into_iter().zip(prefixes.iter().cycle()) {
                let path = [prefix, number.to_string().as_bytes()].concat();
                late_entries.push(FileEntry { path, ..entry(*number) });
            }
            let store = MemoryStore::new();
            let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), run(2), PackKind::Map);
            let prefixes: Vec<&[u8]> = prefixes.iter().map(Vec::as_slice).collect();
            let mut writer = TableWriter::expecting(&packer, &[], &prefixes);
            all.iter().for_each(|entry| writer.push(entry.clone()).unwrap());
            let (pages, _) = writer.finish_with(late_entries.clone()).unwrap();
            packer.finish().unwrap();
            all.extend(late_entries);
            all.sort_unstable_by(|a, b| a.path.cmp(&b.path));
            let expected = write(&store, run(1), &all, &[]);
            let ids = |pages: &[PagePlace]| pages.iter().map(|page| (page.id, page.entries)).collect::<Vec<_>>();
            prop_assert_eq!(ids(&pages), ids(&expected));
            prop_assert_eq!(read(&store, &pages), all);
        }
    }

    #[test]
    fn a_late_entry_that_was_not_expected_is_refused() {
        let store = MemoryStore::new();
        let packer = Packer::new(Arc::new(store), ClusterName::default(), run(1), PackKind::Map);
        let mut writer = TableWriter::new(&packer, &[]);
        (1..5000).for_each(|number| writer.push(entry(number)).unwrap());
        assert_eq!(writer.finish_with(vec![entry(0)]).unwrap_err().kind(), crate::ErrorKind::Bug);
    }

    #[test]
    fn nothing_changed_writes_nothing() {
        let store = MemoryStore::new();
        let entries: Vec<_> = (0..1000).map(entry).collect();
        let before = write(&store, run(1), &entries, &[]);
        let objects = store.list("").unwrap();
        assert_eq!(write(&store, run(2), &entries, &before), before);
        assert_eq!(store.list("").unwrap(), objects);
    }

    #[test]
    fn a_page_that_is_not_the_one_named_is_refused() {
        let store = MemoryStore::new();
        let mut pages = write(&store, run(1), &[entry(1)], &[]);
        pages[0].id[0] ^= 1;
        let error = read_page(&store, &ClusterName::default(), &pages[0]).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_page_decoder_panic(bytes: Vec<u8>) {
            let _ = decode_page(&bytes, "here");
            let _ = decode_page(&zstd::bulk::compress(&bytes, 1).unwrap(), "here");
        }
    }
}
