#![doc = include_str!("format.md")]

mod catalog;
mod contents;
pub(crate) mod fuzz;
mod layer;
mod lease;
mod manifest;
mod names;
mod pack;
mod stack;
mod table;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zstd::bulk::Compressor;
use zstd::zstd_safe::{DCtx, DParameter, ResetDirective};

pub use catalog::{BackupSummary, Catalog};
pub(crate) use contents::FileContents;
pub(crate) use layer::union;
pub use layer::{ChunkRef, DataPack, Extent, Layer, LayerBuilder, Locations, PART_BLOCKS};
use layer::{decode_fingerprints, fingerprints_len};
pub use lease::{Lease, LeaseRequest, Operation, give_up_leases};
pub(crate) use lease::{LeaseRecord, leases, remove_lease};
pub(crate) use manifest::MAX_CORRUPT_PAGES;
#[cfg(test)]
pub(crate) use manifest::tests::sample as sample_manifest;
pub use manifest::{BackupType, ByteString, CorruptPage, HistoryMark, Manifest, Setting, TablespaceLocation, WalSpan};
pub use names::{BackupId, ClusterName, PackKind, PackName};
pub use pack::{Finished, PackInfo, Packer, Place};
pub(crate) use pack::{Group, PackTable, check_pack, read_record, with_lengths};
pub use stack::{Stack, write_layer};
pub(crate) use table::TableCursor;
pub use table::{FileEntry, FileKind, LayerPlace, PagePlace, PartMap, TablePage, TableWriter, read_page};

use crate::chunk::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{LocalStore, ObjectName, Store};

/// The format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// What to do about a backup that damage was met in.
pub(crate) const TAKE_ANOTHER: &str = "`pgstrata verify` tells which backups are hurt; take another one";
/// What to do about a damaged header, which is frightening, and damage to one small file.
const DAMAGED_HEADER: &str = "the backups are in other files: don't make a new repository here, \
                              but put its file `repository` back from a copy of the directory";
/// Bytes that are put by for a full disk.
const RESERVE_LEN: usize = 64 << 10;
/// Bytes of a metadata record at most, decompressed: a part of 131,072 chunks has 12 MB.
const MAX_DECODED_LEN: u64 = 16 << 20;
/// The largest window of a frame that a reader is ready for, as a power of two; frames of [`METADATA_LEVEL`] have 2 MiB.
const MAX_WINDOW_LOG: u32 = 23;
/// The level at which metadata is compressed.
const METADATA_LEVEL: i32 = 3;

/// An opened repository.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn Store>,
    id: String,
    place: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    pgstrata_repository: u32,
    #[serde(default)]
    id: String,
    #[serde(default)]
    created: Option<Timestamp>,
}

/// That an object of this name is there is what pins a backup; its contents are for people.
#[derive(Serialize)]
struct Pin {
    pinned: Timestamp,
}

/// That an object of this name is there is what counts; its contents are for people.
#[derive(Serialize)]
struct Mark {
    found: Timestamp,
    damage: String,
}

impl Repository {
    /// Makes a repository in a directory that is empty or does not exist.
    ///
    /// # Errors
    /// `Conflict` if there is one already; `Invalid` if something else is in the directory.
    pub fn init(path: &Path) -> Result<Self> {
        if path.join(names::REPOSITORY).exists() {
            let what = format!("{} is a repository already", path.display());
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        let is_content =
            |entry: std::io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() != "lost+found");
        let occupied = fs::read_dir(path).is_ok_and(|entries| entries.into_iter().any(is_content));
        if occupied {
            let what = format!("{} is not empty and not a repository", path.display());
            return Err(Error::invalid(what).hint("name a directory that is empty or does not exist yet"));
        }
        must_stand_alone(path)?;
        Self::init_in(Arc::new(LocalStore::create(path)?), path.display().to_string())
    }

    /// Makes a repository in a store.
    ///
    /// # Errors
    /// `Conflict` if there is one already.
    pub fn init_in(store: Arc<dyn Store>, place: String) -> Result<Self> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|e| Error::new(ErrorKind::Unavailable, format!("no randomness: {e}")))?;
        let id = hex(&random);
        let created = Some(Timestamp::now());
        let header = Header { pgstrata_repository: FORMAT_VERSION, id: id.clone(), created };
        let text = seal(&header)?;
        store.put_new(&ObjectName::new(names::REPOSITORY)?, &mut text.as_bytes())?;
        let repository = Self { store, id, place };
        repository.keep_reserve()?;
        Ok(repository)
    }

    /// Puts some bytes by for an expiry that would find no room for its lease; no error if they are there.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn keep_reserve(&self) -> Result<()> {
        let mut bytes = vec![0; RESERVE_LEN];
        // Bytes that no file system makes smaller.
        blake3::Hasher::new().update(self.id.as_bytes()).finalize_xof().fill(&mut bytes);
        match self.store.put_new(&ObjectName::new(names::RESERVE)?, &mut bytes.as_slice()) {
            Err(e) if e.kind() != ErrorKind::Conflict => Err(e),
            _ => Ok(()),
        }
    }

    /// Gives up what was put by.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn give_up_reserve(&self) -> Result<()> {
        self.store.delete(&ObjectName::new(names::RESERVE)?)
    }

    /// Opens the repository in a directory.
    ///
    /// # Errors
    /// `Missing` if there is none, `Corrupt` if its header is damaged, `Unsupported` if it is of a newer format.
    pub fn open(path: &Path) -> Result<Self> {
        let hint = "check the path, and that its disk is mounted; a new repository is made by `pgstrata init --repo ...`, \
                    or with the first backup: `pgstrata backup --init --repo ...`";
        let none = |what: String| Error::new(ErrorKind::Missing, what).hint(hint);
        let store = match LocalStore::open(path) {
            Ok(store) => store,
            Err(e) if e.kind() == ErrorKind::Missing => {
                return Err(none(format!("there is no repository at {}", path.display())));
            }
            Err(e) => return Err(e),
        };
        match Self::open_in(Arc::new(store), path.display().to_string()) {
            Err(e) if e.kind() == ErrorKind::Missing => Err(none(format!("{} is not a repository", path.display()))),
            opened => opened.map_err(|e| e.or_hint(ErrorKind::Corrupt, DAMAGED_HEADER)),
        }
    }

    /// Opens the repository in a store.
    ///
    /// # Errors
    /// As [`Repository::open`].
    pub fn open_in(store: Arc<dyn Store>, place: String) -> Result<Self> {
        let bytes = store.get(&ObjectName::new(names::REPOSITORY)?, 64 << 10)?;
        let header: Header = unseal(&bytes, names::REPOSITORY)?;
        if header.pgstrata_repository != FORMAT_VERSION {
            let found = header.pgstrata_repository;
            let what = format!("{place} has format {found}; this program reads format {FORMAT_VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, what).hint("use a newer pgstrata; nothing was changed"));
        }
        Ok(Self { store, id: header.id, place })
    }

    /// Where the objects are.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The repository's identity, which every manifest repeats.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the repository is, for people.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The clusters that have backups here, in the order of their names.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn clusters(&self) -> Result<Vec<ClusterName>> {
        let objects = self.store.list("clusters/")?;
        let manifests = objects.iter().filter_map(|object| {
            let (cluster, rest) = object.name.as_str().strip_prefix("clusters/")?.split_once('/')?;
            rest.starts_with("manifests/").then(|| cluster.parse().ok()).flatten()
        });
        let mut clusters: Vec<ClusterName> = manifests.collect();
        clusters.dedup();
        Ok(clusters)
    }

    /// Reads the manifests of a cluster.
    ///
    /// # Errors
    /// When the store cannot list; damaged manifests are in the catalog.
    pub fn catalog(&self, cluster: &ClusterName) -> Result<Catalog> {
        Catalog::read(self, cluster)
    }

    /// Reads the newest edition of a manifest.
    ///
    /// # Errors
    /// `Missing`, `Corrupt`, or `Unsupported`.
    pub fn manifest(&self, cluster: &ClusterName, id: BackupId) -> Result<Manifest> {
        Manifest::read_newest(self, cluster, id).map(|(manifest, _)| manifest)
    }

    /// Commits a backup: stores its manifest and returns its length.
    ///
    /// Right before, everything that the backup refers to must be there; the lease is what keeps it there. Right after, the lease must be there still: if
    /// not, an expiry may have passed over the new manifest, and it is taken back if something is gone.
    ///
    /// # Errors
    /// What the store says; `Locked` if the lease is lost; `Corrupt` if a pack is gone.
    pub fn commit(&self, manifest: &Manifest, lease: &Lease) -> Result<u64> {
        let object = manifest.object()?;
        let bytes = manifest.encode(&object)?;
        lease.check()?;
        self.packs_must_be_there(manifest)?;
        let len = self.store.put_new(&object, &mut bytes.as_slice())?;
        if lease.check().is_err() {
            self.packs_must_be_there(manifest).inspect_err(|_| {
                // Whatever this says, the error is that of the packs.
                let _ = self.store.delete(&object);
            })?;
        }
        Ok(len)
    }

    fn packs_must_be_there(&self, manifest: &Manifest) -> Result<()> {
        let fault = self.unsound_pack(manifest)?;
        fault.map_or(Ok(()), |(object, fault)| Err(Error::corrupt(object.as_str(), fault)))
    }

    /// Makes durable which backups there are, as a listing shows them from now on: a run that was killed may have left its manifest, or the lack of one, to be
    /// undone by a loss of power. Whoever deletes what no manifest names asks for this first.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn settle(&self, cluster: &ClusterName) -> Result<()> {
        self.store.settle(&names::manifests(cluster))
    }

    /// Makes durable which packs of a run there are, as a listing shows them from now on: a run that was killed may have left their names to be undone by a
    /// loss of power. Whoever takes them over asks for this first.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn settle_packs(&self, cluster: &ClusterName, run: BackupId) -> Result<()> {
        self.store.settle(&names::packs_of(cluster, run))
    }

    /// Removes the packs of a run that failed, unless its manifest is there after all.
    ///
    /// # Errors
    /// When the store cannot list or delete; what is left is litter.
    pub fn discard(&self, cluster: &ClusterName, run: BackupId) -> Result<()> {
        self.discard_but(cluster, run, &BTreeSet::new())
    }

    /// The same but for packs that are [in use](Self::packs_in_use).
    ///
    /// # Errors
    /// As [`Repository::discard`].
    pub(crate) fn discard_but(
        &self,
        cluster: &ClusterName,
        run: BackupId,
        in_use: &BTreeSet<ObjectName>,
    ) -> Result<()> {
        let manifest = names::manifest(cluster, run, 0)?;
        self.settle(cluster)?;
        if !self.store.list(manifest.as_str())?.is_empty() {
            return Ok(());
        }
        for kept in self.kept_changes(cluster)?.iter().filter(|kept| kept.backup == run) {
            self.store.delete(&kept.object)?;
        }
        let packs = self.store.list(&names::packs_of(cluster, run))?;
        let unused = packs.iter().filter(|pack| !in_use.contains(&pack.name));
        unused.map(|pack| &pack.name).try_for_each(|pack| self.store.delete(pack))
    }

    /// The packs of a run that other backups than its own refer to: a backup that was expired and is exported to here again has left them behind. While a
    /// manifest cannot be read, that is all of them.
    ///
    /// # Errors
    /// When the store cannot list, or a manifest is out of reach.
    pub(crate) fn packs_in_use(&self, cluster: &ClusterName, run: BackupId) -> Result<BTreeSet<ObjectName>> {
        let present = self.store.list(&names::packs_of(cluster, run))?;
        if present.is_empty() {
            return Ok(BTreeSet::new());
        }
        let catalog = self.catalog(cluster)?;
        if !catalog.damaged().is_empty() {
            return Ok(present.into_iter().map(|object| object.name).collect());
        }
        let mut in_use = BTreeSet::new();
        for backup in catalog.backups() {
            let packs = self.manifest(cluster, backup.id)?.packs;
            for pack in packs.iter().filter(|pack| pack.name.run == run) {
                in_use.insert(pack.name.object(cluster)?);
            }
        }
        Ok(in_use)
    }

    /// The backups that are pinned, listed or not.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn pins(&self, cluster: &ClusterName) -> Result<BTreeSet<BackupId>> {
        self.ids_below(&names::pins(cluster))
    }

    /// The backups that were found damaged when their bytes were last read, listed or not.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn marks(&self, cluster: &ClusterName) -> Result<BTreeSet<BackupId>> {
        self.ids_below(&names::marks(cluster))
    }

    fn ids_below(&self, prefix: &str) -> Result<BTreeSet<BackupId>> {
        let objects = self.store.list(prefix)?;
        Ok(objects.iter().filter_map(|object| object.name.as_str()[prefix.len()..].parse().ok()).collect())
    }

    /// Marks a backup as damaged, for whoever decides which ones stay or builds upon one; or takes the mark away. Its holder has a lease that names
    /// the backup.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn set_mark(&self, cluster: &ClusterName, id: BackupId, damage: Option<&str>) -> Result<()> {
        let object = names::mark(cluster, id)?;
        match damage {
            None => self.store.delete(&object),
            Some(damage) => self.put_once(&object, &Mark { found: Timestamp::now(), damage: damage.to_owned() }),
        }
    }

    /// Puts a sealed object unless it is there.
    fn put_once<T: Serialize>(&self, object: &ObjectName, content: &T) -> Result<()> {
        match self.store.put_new(object, &mut seal(content)?.as_bytes()) {
            // Perhaps by somebody who was killed before it was durable.
            Err(e) if e.kind() == ErrorKind::Conflict => {
                let (directory, _) = object.as_str().rsplit_once('/').unwrap_or_default();
                self.store.settle(&format!("{directory}/"))
            }
            put => put.map(drop),
        }
    }

    /// What is wrong with a backup, as far as that is known without reading it: a pack that is not there or too short, or what an earlier
    /// verification found.
    ///
    /// # Errors
    /// When the store cannot list.
    pub(crate) fn known_fault(&self, manifest: &Manifest) -> Result<Option<Error>> {
        if let Some((object, fault)) = self.unsound_pack(manifest)? {
            return Ok(Some(Error::corrupt(object.as_str(), fault)));
        }
        let marked = self.marks(&manifest.cluster)?.contains(&manifest.id);
        let error = || Error::corrupt(manifest.id.to_string(), "`pgstrata verify` found the backup damaged");
        Ok(marked.then(error))
    }

    /// Pins a backup, or takes its pin away; its holder has a lease that names the backup.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn set_pin(&self, cluster: &ClusterName, id: BackupId, pinned: bool) -> Result<()> {
        let object = names::pin(cluster, id)?;
        if pinned { self.put_once(&object, &Pin { pinned: Timestamp::now() }) } else { self.store.delete(&object) }
    }

    /// The backup that an object among the manifests is of; `None` if it is something else.
    pub(crate) fn backup_of(&self, cluster: &ClusterName, object: &ObjectName) -> Option<BackupId> {
        let name = object.as_str().strip_prefix(&names::manifests(cluster))?;
        names::parse_manifest(name).ok().map(|(id, _)| id)
    }

    /// The stored editions of a manifest with their lengths, the newest last.
    ///
    /// # Errors
    /// When the store cannot list.
    pub(crate) fn manifest_editions(&self, cluster: &ClusterName, id: BackupId) -> Result<Vec<(ObjectName, u64)>> {
        let directory = names::manifests(cluster);
        let objects = self.store.list(names::manifest(cluster, id, 0)?.as_str())?;
        let edition = |object: &ObjectName| match names::parse_manifest(&object.as_str()[directory.len()..]) {
            Ok((found, edition)) if found == id => Some(edition),
            _ => None,
        };
        let mut editions: Vec<_> =
            objects.into_iter().filter_map(|o| Some((edition(&o.name)?, o.name, o.len))).collect();
        editions.sort_unstable();
        Ok(editions.into_iter().map(|(_, object, len)| (object, len)).collect())
    }

    /// Every pack that some edition of a backup's manifest names, with its length; editions that cannot be read are passed over.
    ///
    /// # Errors
    /// When the store is out of reach.
    pub(crate) fn packs_of_all_editions(&self, cluster: &ClusterName, id: BackupId) -> Result<Vec<PackInfo>> {
        let listed = catalog::Editions::list(self, cluster, names::manifest(cluster, id, 0)?.as_str())?;
        let mut packs = Vec::new();
        for edition in listed.of.get(&id).into_iter().flatten() {
            match Manifest::read(self, cluster, id, *edition) {
                Ok((manifest, _)) => packs.extend(manifest.packs),
                Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e),
                Err(_) => {}
            }
        }
        Ok(packs)
    }

    /// Removes what interrupted writes of a cluster's objects left, which no listing shows; how many bytes that were.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn sweep(&self, cluster: &ClusterName) -> Result<u64> {
        let prefixes = [names::manifests, names::packs, names::leases, names::pins, names::marks, names::changes];
        prefixes.iter().map(|prefix| self.store.sweep(&prefix(cluster))).sum()
    }

    /// The packs of a cluster that are in the store, with their lengths.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn packs(&self, cluster: &ClusterName) -> Result<HashMap<ObjectName, u64>> {
        let objects = self.store.list(&names::packs(cluster))?;
        Ok(objects.into_iter().map(|object| (object.name, object.len)).collect())
    }

    /// The kept maps of changes of a cluster; what else lies among them is none.
    ///
    /// # Errors
    /// When the store cannot list.
    pub(crate) fn kept_changes(&self, cluster: &ClusterName) -> Result<Vec<KeptChanges>> {
        let prefix = names::changes(cluster);
        let objects = self.store.list(&prefix)?.into_iter();
        let kept = objects.filter_map(|found| {
            let (backup, parent) = found.name.as_str()[prefix.len()..].split_once('.')?;
            let (backup, parent) = (backup.parse().ok()?, parent.parse().ok()?);
            Some(KeptChanges { object: found.name, len: found.len, backup, parent })
        });
        Ok(kept.collect())
    }

    /// Keeps what changed from the start of `parent` to that of `backup`: the bytes that `encode` makes for the object's name. Says how many.
    ///
    /// # Errors
    /// What the store says, and `encode`.
    pub(crate) fn keep_changes(
        &self,
        cluster: &ClusterName,
        backup: BackupId,
        parent: BackupId,
        max_len: u64,
        encode: impl FnOnce(&str) -> Result<Vec<u8>>,
    ) -> Result<u64> {
        let object = names::changes_between(cluster, backup, parent)?;
        let bytes = encode(object.as_str())?;
        if bytes.len() as u64 > max_len {
            return Ok(0);
        }
        self.store.put_new(&object, &mut bytes.as_slice())?;
        Ok(bytes.len() as u64)
    }

    /// Bytes of a cluster's packs, manifests and kept maps of changes that are in the store, whatever needs them.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn stored_bytes(&self, cluster: &ClusterName) -> Result<u64> {
        let len = |prefix: String| Ok(self.store.list(&prefix)?.iter().map(|object| object.len).sum::<u64>());
        Ok(len(names::packs(cluster))? + len(names::manifests(cluster))? + len(names::changes(cluster))?)
    }

    /// The first pack of a backup that is not there, or not of the right length, and what is wrong with it.
    ///
    /// # Errors
    /// When the store cannot list.
    pub fn unsound_pack(&self, manifest: &Manifest) -> Result<Option<(ObjectName, String)>> {
        unsound_among(&self.packs(&manifest.cluster)?, manifest)
    }

    /// The WAL files of a backup.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, with the object.
    pub(crate) fn wal_files(&self, manifest: &Manifest) -> Result<Vec<FileEntry>> {
        let mut found = Vec::new();
        for page in &manifest.pages {
            let entries = read_page(&**self.store(), &manifest.cluster, page)?.entries;
            found.extend(entries.into_iter().filter(|entry| entry.kind == FileKind::Wal));
        }
        Ok(found)
    }

    /// Flattens the block map of a part into one complete layer.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, with the object; also if the map leaves a block out.
    pub fn flatten(&self, manifest: &Manifest, part: &PartMap, depth: Depth) -> Result<Layer> {
        let mut flat: Option<Layer> = None;
        for place in &part.layers {
            let layer = self.read_layer(manifest, place, depth)?;
            flat = Some(match flat {
                Some(newer) => newer.over(&layer),
                None => layer,
            });
        }
        let flat = flat.filter(Layer::is_complete);
        let flat = flat.ok_or_else(|| Error::corrupt(manifest.id.to_string(), "a block map leaves blocks out"))?;
        // What reads pack by pack goes by the part's list: a chunk in another pack would be nobody's.
        let listed: BTreeSet<&PackName> = part.data.iter().collect();
        let unlisted = flat.data_packs().find(|pack| !listed.contains(pack));
        let Some(pack) = unlisted else { return Ok(flat) };
        let object = pack.object(&manifest.cluster)?;
        Err(Error::corrupt(object.as_str(), "a block map names a pack that the file table does not"))
    }

    /// Reads one layer of a block map.
    ///
    /// # Errors
    /// `Missing` or `Corrupt`, with the object.
    pub fn read_layer(&self, manifest: &Manifest, place: &LayerPlace, depth: Depth) -> Result<Layer> {
        let object = place.pack.object(&manifest.cluster)?;
        let at = format!("{object} at {}", place.offset);
        let body = read_record(&*self.store, &object, place.offset, place.locations_len)?;
        let locations = Locations::decode(&body, manifest.block_len(), &at)?;
        let mut fingerprints = Vec::new();
        let count = locations.stored_blocks();
        if fingerprints_len(count) != u64::from(place.fingerprints_len) {
            let what = format!("{} bytes of fingerprints for {count} blocks", place.fingerprints_len);
            return Err(Error::corrupt(at, what));
        }
        if depth == Depth::Fingerprints && place.fingerprints_len > 0 {
            let offset = place.offset.saturating_add(place.locations_len.into());
            let body = read_record(&*self.store, &object, offset, place.fingerprints_len)?;
            fingerprints = decode_fingerprints(&body, count, &at)?;
        }
        Ok(Layer { locations, fingerprints })
    }
}

/// A map of changes that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptChanges {
    /// Where.
    pub object: ObjectName,
    /// Its length.
    pub len: u64,
    /// Whose detector made it.
    pub backup: BackupId,
    /// Since when: the parent's start.
    pub parent: BackupId,
}

/// A repository in a data directory would be backed up with it and lost with it; one in another repository is lost in it.
fn must_stand_alone(path: &Path) -> Result<()> {
    let path = crate::os::resolve(path)?;
    for above in path.ancestors().skip(1) {
        let what = match () {
            () if above.join("PG_VERSION").is_file() => "data directory",
            () if above.join(names::REPOSITORY).is_file() && above.join("clusters").is_dir() => "repository",
            () => continue,
        };
        let what = format!("{} lies in the {what} {}", path.display(), above.display());
        return Err(Error::invalid(what).hint("put the repository into a directory of its own, on another disk"));
    }
    Ok(())
}

/// Two lines of text: a JSON object, and its checksum.
fn seal<T: Serialize>(value: &T) -> Result<String> {
    let line = serde_json::to_string(value).map_err(|e| Error::bug("cannot encode JSON").because(e))?;
    Ok(format!("{line}\n{}\n", blake3::hash(line.as_bytes()).to_hex()))
}

/// Proves and decodes what [`seal`] made.
fn unseal<T: DeserializeOwned>(bytes: &[u8], object: &str) -> Result<T> {
    let damaged = |what: &str| Error::corrupt(object, format!("the object is damaged: {what}"));
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
    let (line, check) = text.split_once('\n').ok_or_else(|| damaged("it has one line"))?;
    if check.strip_suffix('\n') != Some(blake3::hash(line.as_bytes()).to_hex().as_str()) {
        return Err(damaged("it does not match its checksum"));
    }
    serde_json::from_str(line).map_err(|e| damaged("it does not decode").because(e))
}

/// The first pack of a backup that is not among those present, or not of the right length, and what is wrong with it.
pub(crate) fn unsound_among(
    present: &HashMap<ObjectName, u64>,
    manifest: &Manifest,
) -> Result<Option<(ObjectName, String)>> {
    for PackInfo { name, len } in &manifest.packs {
        let object = name.object(&manifest.cluster)?;
        if let Some(fault) = pack_fault(present, &object, *len) {
            return Ok(Some((object, fault)));
        }
    }
    Ok(None)
}

/// What is wrong with a pack that shall have `len` bytes, as far as a listing tells.
pub(crate) fn pack_fault(present: &HashMap<ObjectName, u64>, object: &ObjectName, len: u64) -> Option<String> {
    match present.get(object) {
        Some(found) if *found == len => None,
        Some(found) => Some(format!("the pack has {found} bytes instead of {len}")),
        None => Some("the pack is missing".to_owned()),
    }
}

/// How much of a block map to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Where the blocks are.
    Locations,
    /// Their fingerprints, too.
    Fingerprints,
}

/// Encodes a metadata record's body: postcard in a zstd frame.
fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let plain = postcard::to_stdvec(value).map_err(|e| Error::bug("cannot encode metadata").because(e))?;
    if plain.len() as u64 > MAX_DECODED_LEN {
        let what = format!("a record of metadata of {} bytes, which no reader would take", plain.len());
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    compress(&plain)
}

thread_local! {
    /// Making one takes longer than most records of metadata do.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Compresses metadata.
fn compress(plain: &[u8]) -> Result<Vec<u8>> {
    let compressed = COMPRESSOR.with_borrow_mut(|compressor| {
        let made = compressor.take().map_or_else(|| Compressor::new(METADATA_LEVEL), Ok)?;
        compressor.insert(made).compress(plain)
    });
    compressed.map_err(|e| Error::bug("cannot compress metadata").because(e))
}

/// Decodes what [`encode`] made.
fn decode<T: DeserializeOwned>(body: &[u8], place: &str) -> Result<T> {
    let plain = decompress(body, MAX_DECODED_LEN, place)?;
    match postcard::take_from_bytes(&plain) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(Error::corrupt(place, "the metadata record has bytes to spare")),
        Err(e) => Err(Error::corrupt(place, "the metadata record does not decode").because(e)),
    }
}

/// Decompresses metadata of at most `max_len` bytes.
fn decompress(body: &[u8], max_len: u64, place: &str) -> Result<Vec<u8>> {
    let plain = DECOMPRESSOR.with_borrow_mut(|context| {
        let context = context.get_or_insert_with(DCtx::create);
        let refused = |code| io::Error::other(zstd::zstd_safe::get_error_name(code));
        // Whatever the record before left.
        context.reset(ResetDirective::SessionOnly).map_err(refused)?;
        context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).map_err(refused)?;
        let mut plain = Vec::new();
        zstd::stream::read::Decoder::with_context(body, context).take(max_len + 1).read_to_end(&mut plain)?;
        Ok(plain)
    });
    let plain = plain.map_err(|e: io::Error| Error::corrupt(place, "the metadata does not decompress").because(e))?;
    if plain.len() as u64 > max_len {
        return Err(Error::corrupt(place, format!("the metadata has more than {max_len} bytes")));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn a_directory_with_something_else_in_it_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("precious"), "x").unwrap();
        assert_eq!(Repository::init(directory.path()).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(Repository::open(directory.path()).unwrap_err().kind(), ErrorKind::Missing);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_repository_stands_in_no_data_directory_and_in_no_other_repository() {
        let directory = tempfile::tempdir().unwrap();
        let cluster = directory.path().join("data");
        fs::create_dir(&cluster).unwrap();
        fs::write(cluster.join("PG_VERSION"), "18\n").unwrap();
        assert_eq!(Repository::init(&cluster.join("backups/here")).unwrap_err().kind(), ErrorKind::Invalid);
        let outer = directory.path().join("outer");
        let repo = Repository::init(&outer).unwrap();
        repo.set_pin(&ClusterName::default(), "20261122T160312Z-1a2b3c4d".parse().unwrap(), true).unwrap();
        assert_eq!(Repository::init(&outer.join("inner")).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_new_file_system_is_as_good_as_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("lost+found")).unwrap();
        Repository::init(directory.path()).unwrap();
    }

    #[test]
    fn a_repository_is_made_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let made = Repository::init(&path).unwrap();
        assert_eq!(Repository::open(&path).unwrap().id(), made.id());
        assert_eq!(Repository::init(&path).unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[test]
    fn every_flipped_byte_of_the_header_is_found() {
        let store = MemoryStore::new();
        Repository::init_in(Arc::new(store.clone()), String::new()).unwrap();
        let name = ObjectName::new("repository").unwrap();
        let bytes = store.get(&name, 1000).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            store.tamper(&name, Some(damaged));
            let kind = Repository::open_in(Arc::new(store.clone()), String::new()).unwrap_err().kind();
            assert_eq!(kind, ErrorKind::Corrupt, "byte {at}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let store = MemoryStore::new();
        let line = r#"{"pgstrata_repository":2,"something":"new"}"#;
        let text = format!("{line}\n{}\n", blake3::hash(line.as_bytes()).to_hex());
        store.tamper(&ObjectName::new("repository").unwrap(), Some(text.into_bytes()));
        assert_eq!(Repository::open_in(Arc::new(store), String::new()).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_decompression_bomb_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0; MAX_DECODED_LEN as usize + 1], 1).unwrap();
        assert_eq!(decompress(&bomb, MAX_DECODED_LEN, "here").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_frame_that_wants_a_large_window_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        std::io::Write::write_all(&mut encoder, b"small").unwrap();
        let frame = encoder.finish().unwrap();
        assert_eq!(decompress(&frame, MAX_DECODED_LEN, "here").unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn what_no_reader_would_take_is_not_written() {
        let error = encode(&vec![0u8; MAX_DECODED_LEN as usize + 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
