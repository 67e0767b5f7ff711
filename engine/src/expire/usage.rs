//! How much of each pack the backups that stay still need.
//!
//! A chunk may be needed in part: a block of it is dead when every backup that had it is gone or has a newer one in its place. A stored block belongs to one part of
//! one file, so what lives is counted part by part: the union of what all backups see of it, and no block is counted twice. Records of metadata
//! live as a whole.
//!
//! Data packs of a run whose backup stays are all alive, and their maps are not read for this. So the cost grows with the metadata of those files that have
//! blocks of runs that are gone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::Survey;
use crate::error::{Error, Result};
use crate::repo::{
    BackupId, ClusterName, Depth, LayerPlace, Manifest, PackKind, PackName, PartMap, Place, Repository, read_page,
};

/// Bytes that a record costs in its pack's table.
const TABLE_ENTRY_LEN: u64 = 20;
/// Bytes of a pack that are not its records'.
const FRAME_LEN: u64 = 56;
/// A pack is mostly dead when less than this part of it lives.
const MOSTLY: u64 = 2;
/// Percentage of all bytes below which it is not worth the work: writing tables anew leaves a little dead itself.
const WORTH_PERCENT: u8 = 1;

/// A pack and how much of it lives.
#[derive(Clone, Copy, Debug, Default)]
struct PackUse {
    len: u64,
    live: u64,
    /// Whether it may be vacated.
    movable: bool,
}

/// A distinct stack of layers of some backups.
#[derive(Debug)]
pub(super) struct StackUse {
    /// The file.
    pub path: Vec<u8>,
    /// Which part of it.
    pub part: usize,
    /// Its layers and packs.
    pub map: PartMap,
}

/// What the backups that stay need.
pub(super) struct Usage {
    packs: BTreeMap<PackName, PackUse>,
    /// The stacks of the backups whose manifests may be written anew, by path and part.
    pub stacks: Vec<StackUse>,
    /// One of the manifests, for what they have in common; none if all are left as they are.
    pub common: Option<Manifest>,
    /// Bytes read.
    pub bytes_read: u64,
}

impl Usage {
    /// Reads the file tables of the backups that stay, and as many block maps as are needed.
    pub fn read(repo: &Repository, cluster: &ClusterName, survey: &Survey) -> Result<Self> {
        let with_len = |(name, len): (&PackName, &u64)| (*name, PackUse { len: *len, live: FRAME_LEN, movable: true });
        let packs = survey.referenced.iter().map(with_len).collect();
        let mut usage = Self { packs, stacks: Vec::new(), common: None, bytes_read: 0 };
        let mut tables = Tables::default();
        for id in &survey.backups {
            let manifest = repo.manifest(cluster, *id)?;
            if survey.fixed.contains(id) {
                manifest.packs.iter().for_each(|pack| usage.fix(pack.name));
            } else {
                usage.read_table(repo, &manifest, &mut tables)?;
                usage.common.get_or_insert(manifest);
            }
        }
        let kept: BTreeSet<BackupId> = survey.backups.iter().copied().collect();
        let of_kept: Vec<_> = usage
            .packs
            .keys()
            .filter(|pack| pack.kind == PackKind::Data && kept.contains(&pack.run))
            .copied()
            .collect();
        of_kept.into_iter().for_each(|pack| usage.fix(pack));
        usage.stacks.sort_unstable_by(|a, b| (&a.path, a.part).cmp(&(&b.path, b.part)));
        usage.count_blocks(repo)?;
        Ok(usage)
    }

    /// Leaves a pack alone: all of it counts as alive.
    fn fix(&mut self, pack: PackName) {
        if let Some(found) = self.packs.get_mut(&pack) {
            (found.live, found.movable) = (found.len, false);
        }
    }

    fn add(&mut self, pack: PackName, bytes: u64) {
        if let Some(found) = self.packs.get_mut(&pack).filter(|found| found.movable) {
            found.live += bytes;
        }
    }

    fn read_table(&mut self, repo: &Repository, manifest: &Manifest, known: &mut Tables) -> Result<()> {
        for page in &manifest.pages {
            if !known.pages.insert((page.place.pack, page.place.offset)) {
                continue;
            }
            self.bytes_read += u64::from(page.len);
            self.add(page.place.pack, u64::from(page.len) + TABLE_ENTRY_LEN);
            for entry in read_page(&**repo.store(), &manifest.cluster, page)?.entries {
                for (part, map) in entry.parts.into_iter().enumerate() {
                    self.add_stack(&entry.path, part, map, known);
                }
            }
        }
        Ok(())
    }

    fn add_stack(&mut self, path: &[u8], part: usize, map: PartMap, known: &mut Tables) {
        for layer in &map.layers {
            if known.layers.insert(key(layer)) {
                let records = 1 + u64::from(layer.fingerprints_len > 0);
                let len = u64::from(layer.locations_len) + u64::from(layer.fingerprints_len);
                self.add(layer.pack, len + records * TABLE_ENTRY_LEN);
            }
        }
        // By all of its layers: an expiry that was interrupted may leave stacks that differ in the lower ones alone.
        if known.stacks.insert(map.layers.iter().map(key).collect()) {
            self.stacks.push(StackUse { path: path.to_vec(), part, map });
        }
    }

    /// Counts what lives in movable data packs.
    fn count_blocks(&mut self, repo: &Repository) -> Result<()> {
        let Some(common) = &self.common else { return Ok(()) };
        let movable: HashMap<PackName, AtomicU64> = self
            .packs
            .iter()
            .filter(|(name, pack)| name.kind == PackKind::Data && pack.movable)
            .map(|(name, _)| (*name, AtomicU64::new(0)))
            .collect();
        let needed = |stack: &StackUse| stack.map.data.iter().any(|pack| movable.contains_key(pack));
        let read = AtomicU64::new(0);
        let parts: Vec<&[StackUse]> = self.stacks.chunk_by(|a, b| (&a.path, a.part) == (&b.path, b.part)).collect();
        parts.into_par_iter().filter(|stacks| stacks.iter().any(needed)).try_for_each(|stacks| {
            let mut seen = Vec::new();
            for stack in stacks.iter().filter(|stack| needed(stack)) {
                seen.extend(seen_of(repo, common, &stack.map, &movable)?);
                let len = |layer: &LayerPlace| u64::from(layer.locations_len);
                read.fetch_add(stack.map.layers.iter().map(len).sum(), Ordering::Relaxed);
            }
            add_live(seen, &movable);
            Ok::<_, Error>(())
        })?;
        let live: Vec<_> = movable.into_iter().map(|(name, live)| (name, live.into_inner())).collect();
        self.bytes_read += read.into_inner();
        live.into_iter().for_each(|(name, live)| self.add(name, live));
        Ok(())
    }

    /// Bytes of a pack.
    pub fn len(&self, pack: &PackName) -> u64 {
        self.packs.get(pack).map_or(0, |pack| pack.len)
    }

    /// Bytes of a pack that are needed.
    pub fn live(&self, pack: &PackName) -> u64 {
        self.packs.get(pack).map_or(0, |pack| pack.live.min(pack.len))
    }

    /// Bytes of all packs.
    pub fn bytes(&self) -> u64 {
        self.packs.values().map(|pack| pack.len).sum()
    }

    /// Bytes of all packs that nobody needs.
    pub fn unused(&self) -> u64 {
        self.packs.values().map(PackUse::dead).sum()
    }

    /// The packs to vacate so that at most `max_unused` percent of all bytes are dead, the deadest first, and those that are mostly
    /// dead if they are worth it.
    pub fn mostly_dead(&self, max_unused: Option<u8>) -> BTreeSet<PackName> {
        let Some(percent) = max_unused else { return BTreeSet::new() };
        let mut candidates: Vec<(PackName, PackUse)> =
            self.packs.iter().filter(|(_, pack)| pack.movable && pack.dead() > 0).map(|(n, p)| (*n, *p)).collect();
        let share = |pack: &PackUse| u128::from(pack.dead()) * 1_000_000 / u128::from(pack.len.max(1));
        candidates.sort_by_key(|(name, pack)| (std::cmp::Reverse(share(pack)), *name));
        let mostly = |pack: &PackUse| pack.live * MOSTLY < pack.len;
        let wasted: u64 = candidates.iter().filter(|(_, pack)| mostly(pack)).map(|(_, pack)| pack.dead()).sum();
        let exceeds = |dead: u64, percent: u8| u128::from(dead) * 100 > u128::from(self.bytes()) * u128::from(percent);
        let worth_it = exceeds(wasted, WORTH_PERCENT);
        let mut unused = self.unused();
        let mut vacated = BTreeSet::new();
        for (name, pack) in candidates {
            if exceeds(unused, percent.max(WORTH_PERCENT)) || (worth_it && mostly(&pack)) {
                unused -= pack.dead();
                vacated.insert(name);
            }
        }
        vacated
    }
}

impl PackUse {
    fn dead(&self) -> u64 {
        self.len.saturating_sub(self.live)
    }
}

/// What was read already.
#[derive(Default)]
struct Tables {
    pages: HashSet<(PackName, u64)>,
    layers: HashSet<Place>,
    stacks: HashSet<Vec<Place>>,
}

/// What tells a layer from others.
pub(super) fn key(layer: &LayerPlace) -> Place {
    Place { pack: layer.pack, offset: layer.offset }
}

/// Blocks of a chunk that are seen.
struct Seen {
    pack: PackName,
    offset: u64,
    stored_len: u32,
    block_count: u16,
    first: u32,
    end: u32,
}

/// What is seen of chunks in movable packs.
fn seen_of(
    repo: &Repository,
    common: &Manifest,
    map: &PartMap,
    movable: &HashMap<PackName, AtomicU64>,
) -> Result<Vec<Seen>> {
    let locations = repo.flatten(common, map, Depth::Locations)?.locations;
    let seen = locations.extents.iter().filter_map(|extent| {
        let chunk = locations.chunks[extent.chunk()?];
        let pack = locations.packs[chunk.pack as usize].name();
        let first = u32::from(extent.first);
        let seen = Seen {
            pack,
            offset: chunk.offset,
            stored_len: chunk.stored_len,
            block_count: chunk.block_count,
            first,
            end: first + extent.count,
        };
        movable.contains_key(&pack).then_some(seen)
    });
    Ok(seen.collect())
}

/// Adds what a part needs of each chunk, in proportion to its blocks.
fn add_live(mut seen: Vec<Seen>, movable: &HashMap<PackName, AtomicU64>) {
    seen.sort_unstable_by_key(|seen| (seen.pack, seen.offset, seen.first));
    for chunk in seen.chunk_by(|a, b| (a.pack, a.offset) == (b.pack, b.offset)) {
        let mut end = 0;
        let mut blocks = 0;
        for Seen { first, end: last, .. } in chunk {
            blocks += last.saturating_sub(end.max(*first));
            end = end.max(*last);
        }
        let Seen { pack, stored_len, block_count, .. } = chunk[0];
        let record_len = u64::from(stored_len) + TABLE_ENTRY_LEN;
        let live = (record_len * u64::from(blocks)).div_ceil(u64::from(block_count.max(1)));
        if let Some(total) = movable.get(&pack) {
            total.fetch_add(live, Ordering::Relaxed);
        }
    }
}
