//! What an interrupted backup stored already, for the next one to use.
//!
//! A run that was killed leaves packs that no manifest names. What their chunks hold is told by the chunks alone: they are decompressed and their blocks fingerprinted, which
//! proves them, too. A block that the next backup would store is looked up by its fingerprint first, and where it is found, the new block map refers to it. So it does
//! not matter what the interrupted run was about to do, nor what happened to the cluster since.
//!
//! Both runs go through the files in the same order, so the packs are needed in the order in which they were written: an index of [`WINDOW`] packs at a time is
//! enough, and moves on as blocks of its second half are found. Memory is bounded by it.
//!
//! What goes wrong: a pack that is damaged, of which the sound records are used, or that is gone, which has nothing to offer; an expiry, which leaves the packs alone that a
//! lease names.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use rayon::prelude::*;

use crate::chunk::{ChunkId, Decoder, Fingerprint};
use crate::error::{ErrorKind, Result};
use crate::repo::{
    BackupId, ChunkRef, ClusterName, DataPack, PackInfo, PackKind, PackName, Repository, check_pack, leases,
};

/// Packs in the index at once.
const WINDOW: usize = 24;

/// A block that is stored already.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// The chunk that holds it.
    pub chunk: ChunkRef,
    /// The chunk's pack.
    pub pack: DataPack,
    /// Which of the chunk's blocks it is.
    pub first: u16,
}

/// The packs that interrupted runs left.
pub(super) struct Salvage<'r> {
    repo: &'r Repository,
    cluster: ClusterName,
    block_len: usize,
    packs: Vec<PackInfo>,
    index: RwLock<Index>,
    bytes_read: AtomicU64,
}

/// The blocks of some packs, which follow one another.
#[derive(Default)]
struct Index {
    packs: VecDeque<Indexed>,
    /// How many packs were taken into the index so far.
    taken: usize,
}

/// The blocks of a pack.
struct Indexed {
    pack: DataPack,
    chunks: Vec<ChunkRef>,
    /// For each block its chunk and its place in it.
    blocks: HashMap<Fingerprint, (u32, u16)>,
}

impl<'r> Salvage<'r> {
    /// Finds data packs that no manifest names and that nobody writes; `None` if there are none.
    pub fn find(repo: &'r Repository, cluster: &ClusterName, block_len: usize) -> Result<Option<Self>> {
        let mut packs = Vec::new();
        for (object, len) in repo.packs(cluster)? {
            let pack = PackName::parse(&object, cluster).filter(|pack| pack.kind == PackKind::Data);
            packs.extend(pack.map(|name| PackInfo { name, len }));
        }
        let catalog = repo.catalog(cluster)?;
        let known: BTreeSet<BackupId> = catalog.backups().iter().map(|backup| backup.id).collect();
        packs.retain(|pack| !known.contains(&pack.name.run));
        // Nobody knows what a manifest that cannot be read names, so what it may name is no litter; but using it does no harm.
        if !packs.is_empty() {
            let named = named(repo, cluster, &known)?;
            let live = live_runs(repo, cluster)?;
            packs.retain(|pack| !named.contains(&pack.name) && !live.contains(&pack.name.run));
        }
        packs.sort_unstable_by_key(|pack| pack.name);
        Ok((!packs.is_empty()).then(|| Self {
            repo,
            cluster: cluster.clone(),
            block_len,
            packs,
            index: RwLock::default(),
            bytes_read: AtomicU64::new(0),
        }))
    }

    /// Makes sure that what is to be taken over is there for good.
    pub fn settle(&self) -> Result<()> {
        self.runs().into_iter().try_for_each(|run| self.repo.settle_packs(&self.cluster, run))
    }

    /// The runs that left them.
    pub fn runs(&self) -> BTreeSet<BackupId> {
        self.packs.iter().map(|pack| pack.name.run).collect()
    }

    /// The packs.
    pub fn packs(&self) -> &[PackInfo] {
        &self.packs
    }

    /// Bytes read from them.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Where a block is stored, if it is.
    pub fn block(&self, fingerprint: Fingerprint) -> Result<Option<Found>> {
        let (found, taken) = {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            let found = index.find(fingerprint);
            // Beyond the middle: the next packs will be needed soon.
            let ahead = index.taken == 0 || found.as_ref().is_some_and(|(at, _)| at * 2 >= WINDOW);
            let found = found.map(|(_, found)| found);
            if !ahead || index.taken == self.packs.len() {
                return Ok(found);
            }
            (found, index.taken)
        };
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        // Unless another worker was faster.
        if index.taken == taken {
            self.move_on(&mut index)?;
        }
        Ok(found.or_else(|| index.find(fingerprint).map(|(_, found)| found)))
    }

    /// Takes the next packs into the index, and lets go of the first.
    fn move_on(&self, index: &mut Index) -> Result<()> {
        let count = if index.taken == 0 { WINDOW } else { WINDOW / 2 };
        let next = &self.packs[index.taken..(index.taken + count).min(self.packs.len())];
        let read: Vec<Indexed> = next.par_iter().map(|pack| self.read(pack)).collect::<Result<_>>()?;
        index.taken += next.len();
        index.packs.extend(read);
        let surplus = index.packs.len().saturating_sub(WINDOW);
        index.packs.drain(..surplus);
        Ok(())
    }

    /// Reads, proves and fingerprints the blocks of a pack.
    fn read(&self, pack: &PackInfo) -> Result<Indexed> {
        let PackInfo { name, len } = *pack;
        let mut indexed =
            Indexed { pack: DataPack { run: name.run, seq: name.seq }, chunks: Vec::new(), blocks: HashMap::new() };
        let mut decoder = Decoder::new()?;
        let object = name.object(&self.cluster)?;
        let read = check_pack(&**self.repo.store(), &object, name.kind, len, |record| {
            self.bytes_read.fetch_add(record.bytes.len() as u64, Ordering::Relaxed);
            if record.sound {
                indexed.add(record.offset, record.bytes, &mut decoder, self.block_len);
            }
            Ok(())
        });
        match read {
            // Not whole, or not there any more: what it has to offer was read.
            Err(e) if !matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Missing | ErrorKind::Unsupported) => Err(e),
            _ => Ok(indexed),
        }
    }
}

impl Index {
    /// Where a block is, and in which of the packs, counted.
    fn find(&self, fingerprint: Fingerprint) -> Option<(usize, Found)> {
        self.packs.iter().enumerate().find_map(|(at, indexed)| {
            let (chunk, first) = *indexed.blocks.get(&fingerprint)?;
            let chunk = *indexed.chunks.get(chunk as usize)?;
            Some((at, Found { chunk, pack: indexed.pack, first }))
        })
    }
}

impl Indexed {
    fn add(&mut self, offset: u64, stored: &[u8], decoder: &mut Decoder, block_len: usize) {
        let Some((codec, fingerprints)) = decoder.recognise(stored, block_len) else { return };
        let (Ok(block_count), Ok(stored_len)) = (u16::try_from(fingerprints.len()), u32::try_from(stored.len())) else {
            return;
        };
        let id = ChunkId::of(fingerprints);
        let number = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        self.chunks.push(ChunkRef { pack: 0, offset, stored_len, block_count, codec, id });
        self.blocks.extend(fingerprints.iter().zip(0..).map(|(fingerprint, first)| (*fingerprint, (number, first))));
    }
}

/// Every pack that a backup names.
fn named(repo: &Repository, cluster: &ClusterName, backups: &BTreeSet<BackupId>) -> Result<BTreeSet<PackName>> {
    let mut named = BTreeSet::new();
    for id in backups {
        match repo.manifest(cluster, *id) {
            Ok(manifest) => named.extend(manifest.packs.iter().map(|pack| pack.name)),
            Err(e) if e.kind() == ErrorKind::Missing => {}
            Err(e) => return Err(e),
        }
    }
    Ok(named)
}

/// The runs that write packs now.
fn live_runs(repo: &Repository, cluster: &ClusterName) -> Result<BTreeSet<BackupId>> {
    let live = leases(repo, cluster)?.into_iter().filter(|(id, record)| !record.is_stale(*id));
    Ok(live.flat_map(|(_, record)| record.runs).collect())
}
