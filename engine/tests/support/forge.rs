//! Repositories that are consistent and lie: every checksum is right, what it is of is absurd or hostile.
//!
//! A forgery begins with a true backup of a small cluster. Its manifest and its file table are taken apart, changed, and put together again with
//! encoders of our own, since the engine's refuse to write what its readers refuse to read.

#![allow(dead_code, reason = "each test that includes this uses another part of it")]

use std::path::Path;
use std::sync::Arc;

use pgstrata_engine::backup;
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{
    BackupId, ClusterName, Extent, FileKind, LayerPlace, Locations, Manifest, PackKind, PackName, Packer, PagePlace,
    Repository, read_page,
};
use pgstrata_engine::store::{MemoryStore, ObjectName, Store};
use serde::Serialize;
use testdata::synthetic::{Options, SyntheticCluster};

/// The backup that is forged.
pub const FORGED: &str = "20261122T160312Z-0bad0bad";

/// A cluster and a true backup of it.
pub struct Origin {
    pub scratch: tempfile::TempDir,
    objects: Vec<(ObjectName, Vec<u8>)>,
    manifest: Manifest,
    entries: Vec<StoredEntry>,
}

/// A page of the file table as it is stored.
#[derive(Serialize)]
pub struct StoredPage {
    pub packs: Vec<PackName>,
    pub entries: Vec<StoredEntry>,
}

#[derive(Clone, Serialize)]
pub struct StoredEntry {
    pub path: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub len: u64,
    pub parts: Vec<StoredPart>,
}

#[derive(Clone, Default, Serialize)]
pub struct StoredPart {
    pub layers: Vec<StoredLayer>,
    pub data: Vec<u32>,
}

#[derive(Clone, Serialize)]
pub struct StoredLayer {
    pub pack: u32,
    pub offset: u64,
    pub locations_len: u32,
    pub fingerprints_len: u32,
}

/// A backup that is being forged.
pub struct Forgery {
    pub store: MemoryStore,
    pub manifest: Manifest,
    /// The packs that `entries` number.
    pub packs: Vec<PackName>,
    pub entries: Vec<StoredEntry>,
    map: Packer,
}

impl Origin {
    pub fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { wal_segment_len: 1 << 20, ..Options::new(16, 7) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 6).unwrap();
        cluster.checkpoint().unwrap();
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), scratch.path().join("nowhere").display().to_string());
        let repo = repo.unwrap();
        let id = backup::run(&repo, &offline(&directory), &Silent).unwrap().backup.id;
        let manifest = repo.manifest(&ClusterName::default(), id).unwrap();
        let objects = store.list("").unwrap().into_iter();
        let objects = objects.map(|object| (object.name.clone(), store.get(&object.name, object.len).unwrap()));
        let objects = objects.collect();
        let entries = stored_entries(&store, &manifest);
        Self { scratch, objects, manifest, entries }
    }

    pub fn cluster(&self) -> std::path::PathBuf {
        self.scratch.path().join("cluster")
    }

    /// A repository with the true backup and a forged one that is newer.
    pub fn forge(&self, change: impl FnOnce(&mut Forgery)) -> (MemoryStore, Repository) {
        let store = MemoryStore::new();
        for (name, bytes) in &self.objects {
            store.tamper(name, Some(bytes.clone()));
        }
        let id: BackupId = FORGED.parse().unwrap();
        let map = Packer::new(Arc::new(store.clone()), ClusterName::default(), id, PackKind::Map);
        let manifest = Manifest { id, sequence: 7, ..self.manifest.clone() };
        let packs = self.manifest.packs.iter().map(|pack| pack.name).collect();
        let mut forgery = Forgery { store: store.clone(), manifest, packs, entries: self.entries.clone(), map };
        change(&mut forgery);
        forgery.commit();
        let repo = self.open(&store);
        (store, repo)
    }

    /// A repository that has the same in it.
    pub fn open(&self, store: &MemoryStore) -> Repository {
        let copy = MemoryStore::new();
        for object in store.list("").unwrap() {
            copy.tamper(&object.name, Some(store.get(&object.name, object.len).unwrap()));
        }
        let place = self.scratch.path().join("nowhere").display().to_string();
        Repository::open_in(Arc::new(copy), place).unwrap()
    }
}

pub fn offline(directory: &Path) -> backup::Options {
    backup::Options { data_dir: Some(directory.to_owned()), offline: true, ..backup::Options::default() }
}

fn stored_entries(store: &MemoryStore, manifest: &Manifest) -> Vec<StoredEntry> {
    let number =
        |pack: &PackName| u32::try_from(manifest.packs.iter().position(|known| known.name == *pack).unwrap()).unwrap();
    let layer = |place: &LayerPlace| StoredLayer {
        pack: number(&place.pack),
        offset: place.offset,
        locations_len: place.locations_len,
        fingerprints_len: place.fingerprints_len,
    };
    let pages = manifest.pages.iter().map(|page| read_page(store, &manifest.cluster, page).unwrap().entries);
    let stored = pages.flatten().map(|entry| StoredEntry {
        kind: entry.kind.into(),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        len: entry.len,
        parts: entry
            .parts
            .iter()
            .map(|part| StoredPart {
                layers: part.layers.iter().map(layer).collect(),
                data: part.data.iter().map(number).collect(),
            })
            .collect(),
        path: entry.path,
    });
    stored.collect()
}

impl Forgery {
    /// The entry of this path.
    pub fn entry(&mut self, path: &str) -> &mut StoredEntry {
        self.entries.iter_mut().find(|entry| entry.path == path.as_bytes()).unwrap()
    }

    /// Adds an empty file, or whatever `kind` says.
    pub fn add(&mut self, path: impl Into<Vec<u8>>, kind: FileKind) {
        let entry =
            StoredEntry { path: path.into(), kind: kind.into(), mode: 0o600, uid: 0, gid: 0, len: 0, parts: vec![] };
        self.entries.push(entry);
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
    }

    /// The locations of the first part of a file, as the true backup has them.
    pub fn locations(&mut self, path: &str) -> Locations {
        let block_len = self.manifest.block_len();
        let layer = self.entry(path).parts[0].layers[0].clone();
        let object = self.packs[layer.pack as usize].object(&self.manifest.cluster).unwrap();
        let mut body = vec![0; layer.locations_len as usize - 16];
        self.store.get_range(&object, layer.offset, &mut body).unwrap();
        Locations::decode(&body, block_len, "here").unwrap()
    }

    /// Gives the first part of a file other locations, and as many fingerprints as they want.
    pub fn relocate(&mut self, path: &str, change: impl FnOnce(&mut Locations)) {
        let mut locations = self.locations(path);
        change(&mut locations);
        let stored = |extent: &&Extent| extent.source != 0;
        let blocks: u64 = locations.extents.iter().filter(stored).map(|extent| u64::from(extent.count)).sum();
        let layer = self.layer(postcard::to_stdvec(&locations).unwrap(), blocks.min(1 << 20) as usize);
        self.entry(path).parts[0].layers = vec![layer];
    }

    /// Stores a layer of these encoded locations.
    pub fn layer(&mut self, locations: Vec<u8>, fingerprints: usize) -> StoredLayer {
        let locations = zstd::bulk::compress(&locations, 3).unwrap();
        let fingerprints = vec![7; 16 * fingerprints];
        let (locations_len, mut fingerprints_len) = (locations.len() as u32 + 16, fingerprints.len() as u32 + 16);
        let mut bodies = vec![locations];
        if fingerprints.is_empty() {
            fingerprints_len = 0;
        } else {
            bodies.push(fingerprints);
        }
        let place = self.map.append_checked(bodies).unwrap();
        StoredLayer { pack: self.number(place.pack), offset: place.offset, locations_len, fingerprints_len }
    }

    /// The number of a pack, which may be new.
    pub fn number(&mut self, pack: PackName) -> u32 {
        let at = self.packs.iter().position(|known| *known == pack).unwrap_or_else(|| {
            self.packs.push(pack);
            self.packs.len() - 1
        });
        at as u32
    }

    /// Stores bytes as a page of the file table.
    pub fn page(&self, plain: &[u8], entries: u32) -> PagePlace {
        let body = zstd::bulk::compress(plain, 3).unwrap();
        let id = blake3::hash(&body).as_bytes()[..16].try_into().unwrap();
        let len = body.len() as u32 + 16;
        let place = self.map.append_checked(vec![body]).unwrap();
        PagePlace { place, len, id, entries }
    }

    fn commit(mut self) {
        if self.manifest.pages.iter().all(|page| page.place.pack.run != self.manifest.id) {
            let entries = std::mem::take(&mut self.entries);
            let count = entries.len() as u32;
            let page = StoredPage { packs: self.packs.clone(), entries };
            self.manifest.pages = vec![self.page(&postcard::to_stdvec(&page).unwrap(), count)];
        }
        let own = self.map.finish().unwrap();
        self.manifest.packs.extend(own);
        let object = ObjectName::new(format!("clusters/main/manifests/{FORGED}")).unwrap();
        self.store.tamper(&object, Some(sealed(&serde_json::to_vec(&self.manifest).unwrap(), &object)));
    }
}

/// A manifest of this JSON.
pub fn sealed(json: &[u8], object: &ObjectName) -> Vec<u8> {
    let mut bytes = [b"pgstrata manifest 1\n", &zstd::bulk::compress(json, 3).unwrap()[..]].concat();
    let named = [object.as_str().as_bytes(), &[0], &bytes].concat();
    bytes.extend_from_slice(blake3::hash(&named).as_bytes());
    bytes
}
