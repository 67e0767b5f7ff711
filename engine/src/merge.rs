//! `merge`: a full backup out of what the repository holds, of the moment of one of its backups.
//!
//! ```text
//! plan      choose the backup; a lease keeps what it refers to
//! prove     every pack is there with its length; with --verify, every byte of them is read and checked
//! flatten   page by page of the file table: each block map in one layer, each chunk within its pack
//! repack    or: the chunks themselves into packs of the new backup, in the order of the files (repack.rs)
//! commit    the file table, then the manifest: now it is a backup
//! ```
//!
//! Nothing is asked of PostgreSQL, nothing read of its directory, and without `--repack` no chunk is read or written: the new manifest and its maps refer to the
//! chunks where they are. The cost grows with the metadata, and where little changed, with the change: a block map whose lowest layer holds at least
//! eight times as many blocks as all above it becomes two layers, as writing the lowest one again would gain a reader nothing.
//!
//! The new backup stands at the moment of the old one, so it is `latest` if that was, and comes before whatever was taken later. It needs none of the
//! manifests that it was made from. An interrupted merge leaves packs that no manifest names.
//!
//! What goes wrong: a pack that is gone or too short, a map that leads out of its pack or leaves a block out: an error, and no backup.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use jiff::Timestamp;
use rayon::prelude::*;
use serde::Serialize;

use crate::chunk::Compression;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::RelationFile;
use crate::progress::{Phase, Progress, Silent};
use crate::repack::{MovePlan, Mover};
use crate::repo::{
    BackupId, BackupSummary, BackupType, ClusterName, Depth, FileEntry, Layer, LayerPlace, Lease, LeaseRequest,
    Manifest, Operation, PackKind, PackName, Packer, PartMap, Repository, TAKE_ANOTHER, TableWriter, read_page,
    with_lengths, write_layer,
};
use crate::units::{count, size};
use crate::verify;

/// How many times more blocks the lowest layer of a map must hold than all above it to be left as it is.
const BASE_RATIO: u64 = 8;
/// Bytes at the end of a pack that are no record, at least.
const PACK_END_LEN: u64 = 40;

/// What to merge and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The backup to make a full one of: an id, a unique prefix of one, `latest`, `oldest` or `latest-full`.
    pub backup: String,
    /// Whether to copy its data into packs of its own, in the order of the files.
    pub repack: bool,
    /// Whether to read and check every byte that the backup needs first.
    pub verify: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress what has to be compressed again by repacking.
    pub compression: Compression,
    /// The user's own words; those of the merged backup if there are none. An empty text is no note.
    pub note: Option<String>,
}

/// What a merge did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The new backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
}

/// What a merge is going to do.
#[derive(Debug)]
pub struct Plan {
    backup: BackupSummary,
    /// Files and directories.
    entries: u64,
    /// Packs that the new backup will refer to, but for its own.
    packs: u64,
    /// Block maps that get fewer layers.
    flattened: u64,
    /// Bytes of their layers.
    flattened_bytes: u64,
    /// With `--repack`: what is moved.
    moves: Option<MovePlan>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BackupSummary { id, backup_type, start_time, .. } = &self.backup;
        let Self { entries, packs, flattened, flattened_bytes, .. } = self;
        let files = count(*entries, "file");
        write!(f, "a full backup of the moment of {id} ({backup_type}, {start_time}), {files}")?;
        if let Some(moves) = &self.moves {
            return write!(f, "\n  copied into packs of its own: {moves}");
        }
        let (maps, packs) = (count(*flattened, "block map"), count(*packs, "pack"));
        write!(f, "\n  {maps} to write anew ({})", size(*flattened_bytes))?;
        write!(f, "\n  no data is copied: it stays in {packs}, all of which are there")
    }
}

/// Decides what to write, without writing.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup.
pub fn plan(repo: &Repository, options: &Options) -> Result<Plan> {
    let backup = repo.catalog(&options.cluster)?.select(&options.backup)?;
    let source = repo.manifest(&options.cluster, backup.id)?;
    must_be_whole(repo, &source)?;
    let packs = source.packs.len() as u64;
    let mut plan = Plan { backup, entries: 0, packs, flattened: 0, flattened_bytes: 0, moves: None };
    let mut parts = Vec::new();
    for page in &source.pages {
        let entries = read_page(&**repo.store(), &source.cluster, page)?.entries;
        plan.entries += entries.len() as u64;
        for part in entries.into_iter().flat_map(|entry| entry.parts) {
            let flattened = &part.layers[..flattened_len(&part.layers)];
            let len = |layer: &LayerPlace| u64::from(layer.locations_len) + u64::from(layer.fingerprints_len);
            plan.flattened += u64::from(!flattened.is_empty());
            plan.flattened_bytes += flattened.iter().map(len).sum::<u64>();
            if options.repack {
                parts.push(part);
            }
        }
    }
    if options.repack {
        let nowhere = Packer::new(Arc::clone(repo.store()), source.cluster.clone(), source.id, PackKind::Data);
        let load = |part: &PartMap| repo.flatten(&source, part, Depth::Locations);
        plan.moves = Some(mover(repo, &source, &nowhere, options, &Silent).plan(&parts, &load, &|_| true)?);
    }
    Ok(plan)
}

/// Makes a full backup out of what the repository holds.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup; then there is no new one.
pub fn run(repo: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let (run, source_len) = Run::begin(repo, options, progress)?;
    let id = run.id;
    if options.verify {
        run.verify()?;
    }
    let done = run.execute(begun, source_len).inspect_err(|_| {
        // The lease is given back, but nobody else writes under this name; what cannot be removed is litter.
        let _ = repo.discard(&options.cluster, id);
    });
    done.map_err(|e| e.or_hint(ErrorKind::Corrupt, TAKE_ANOTHER))
}

fn must_be_whole(repo: &Repository, manifest: &Manifest) -> Result<()> {
    let Some(fault) = repo.known_fault(manifest)? else { return Ok(()) };
    Err(fault.hint("`pgstrata verify` tells which backups are whole; merge one of them"))
}

/// How many of a part's layers, from the top, become one: none if they are few enough already.
fn flattened_len(layers: &[LayerPlace]) -> usize {
    let [newer @ .., base] = layers else { return 0 };
    let above: u64 = newer.iter().map(LayerPlace::stored_blocks).sum();
    let keeps_base = base.stored_blocks() >= BASE_RATIO * above.max(1);
    match (newer.len(), keeps_base) {
        (0, _) | (1, true) => 0,
        (count, true) => count,
        (count, false) => count + 1,
    }
}

/// What moves the chunks of a backup into packs of another.
fn mover<'a>(
    repo: &'a Repository,
    source: &'a Manifest,
    data: &'a Packer,
    options: &Options,
    progress: &'a dyn Progress,
) -> Mover<'a> {
    Mover {
        from: repo,
        cluster: &source.cluster,
        block_len: source.block_len(),
        data,
        compression: options.compression,
        jobs: crate::os::worker_count(options.jobs),
        progress,
    }
}

/// A merge that is being made.
struct Run<'r, 'p> {
    repo: &'r Repository,
    options: &'p Options,
    progress: &'p dyn Progress,
    id: BackupId,
    lease: Lease,
    source: Manifest,
    lengths: HashMap<PackName, u64>,
    data: Packer,
    map: Packer,
    jobs: usize,
    bytes_read: AtomicU64,
}

impl<'r, 'p> Run<'r, 'p> {
    fn begin(repo: &'r Repository, options: &'p Options, progress: &'p dyn Progress) -> Result<(Self, u64)> {
        let cluster = &options.cluster;
        let chosen = repo.catalog(cluster)?.select(&options.backup)?;
        let id = BackupId::generate(Timestamp::now())?;
        let request = LeaseRequest { operation: Operation::Merge, runs: vec![id], uses: vec![chosen.id] };
        let lease = Lease::acquire(repo, cluster, &request, &|text| progress.notice(text))?;
        // Now that nobody may remove it.
        let source = repo.manifest(cluster, chosen.id)?;
        must_be_whole(repo, &source)?;
        let source_len: u64 = source.pages.iter().map(|page| u64::from(page.len)).sum();
        let packer = |kind| Packer::new(Arc::clone(repo.store()), cluster.clone(), id, kind);
        let run = Self {
            repo,
            options,
            progress,
            id,
            lease,
            lengths: source.packs.iter().map(|pack| (pack.name, pack.len)).collect(),
            data: packer(PackKind::Data),
            map: packer(PackKind::Map),
            jobs: crate::os::worker_count(options.jobs),
            bytes_read: AtomicU64::new(source_len),
            source,
        };
        Ok((run, source_len))
    }

    /// Reads and checks every byte that the merged backup needs.
    fn verify(&self) -> Result<()> {
        let options = verify::Options { quick: false, jobs: self.options.jobs };
        let id = self.source.id.to_string();
        let report = verify::run(self.repo, &self.source.cluster, &id, &options, self.progress)?;
        self.bytes_read.fetch_add(report.bytes_read, Ordering::Relaxed);
        match report.damage.into_iter().next() {
            None => Ok(()),
            Some(damage) => Err(Error::corrupt(damage.object, damage.problem)
                .hint("`pgstrata verify` tells which backups are whole; merge one of them")),
        }
    }

    fn execute(self, begun: Instant, tables_len: u64) -> Result<Report> {
        self.progress.begin(Phase::Merging, tables_len);
        let mut table = TableWriter::new(&self.map, &self.source.pages);
        let blocks = if self.options.repack { self.repack_all(&mut table)? } else { self.flatten_all(&mut table)? };
        let (pages, needed) = table.finish()?;
        self.map.close()?;
        let mut own = self.data.finish()?;
        own.extend(self.map.finish()?);
        let lengths: HashMap<PackName, u64> =
            self.lengths.into_iter().chain(own.iter().map(|pack| (pack.name, pack.len))).collect();
        let manifest = Manifest {
            id: self.id,
            edition: 0,
            synthesis: self.repo.catalog(&self.source.cluster)?.next_synthesis(self.source.sequence),
            backup_type: BackupType::SyntheticFull,
            parent: None,
            merged_from: Some(self.source.id),
            duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            blocks_changed: blocks,
            own_bytes: own.iter().map(|pack| pack.len).sum(),
            detector: "merge".to_owned(),
            detector_reason: format!("made from {}", self.source.id),
            note: self.options.note.clone().or_else(|| self.source.note.clone()).filter(|note| !note.is_empty()),
            packs: with_lengths(&self.source.cluster, &needed, |pack| lengths.get(pack).copied())?,
            pages,
            ..self.source
        };
        let manifest_len = self.repo.commit(&manifest, &self.lease)?;
        Ok(Report {
            backup: BackupSummary::new(&manifest, manifest_len),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read: self.bytes_read.into_inner(),
            bytes_written: manifest.own_bytes + manifest_len,
        })
    }

    /// Writes the file table with flattened maps, page by page, and counts the blocks of relation files.
    fn flatten_all(&self, table: &mut TableWriter<'_>) -> Result<u64> {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(self.jobs).build();
        let threads = threads.map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start threads").because(e))?;
        let mut blocks = 0;
        for page in &self.source.pages {
            let mut entries = read_page(&**self.repo.store(), &self.source.cluster, page)?.entries;
            let parts = entries.par_iter_mut().flat_map_iter(|entry| &mut entry.parts);
            threads.install(|| parts.try_for_each(|part| self.flatten(part)))?;
            blocks += entries.iter().map(|entry| self.relation_blocks(entry)).sum::<u64>();
            self.progress.advance(u64::from(page.len));
            entries.into_iter().try_for_each(|entry| table.push(entry))?;
        }
        Ok(blocks)
    }

    /// Writes the file table with maps of one layer each, whose chunks are in packs of this backup, in the order of the files.
    fn repack_all(&self, table: &mut TableWriter<'_>) -> Result<u64> {
        let mut entries = Vec::new();
        for page in &self.source.pages {
            entries.extend(read_page(&**self.repo.store(), &self.source.cluster, page)?.entries);
        }
        let parts: Vec<&PartMap> = entries.iter().flat_map(|entry| &entry.parts).collect();
        let mover = mover(self.repo, &self.source, &self.data, self.options, self.progress);
        let load = |part: &&PartMap| self.repo.flatten(&self.source, part, Depth::Fingerprints);
        let plan = mover.plan(&parts, &load, &|_| true)?;
        self.progress.begin(Phase::Moving, plan.bytes());
        let mut maps = Vec::with_capacity(parts.len());
        let moved = mover.run(&plan, &parts, &load, &|_| true, &mut |_, layer| {
            let place = write_layer(&self.map, &layer)?;
            maps.push(PartMap {
                layers: vec![place],
                data: layer.data_packs().collect::<BTreeSet<_>>().into_iter().collect(),
            });
            Ok(())
        })?;
        self.bytes_read.fetch_add(moved.bytes_read, Ordering::Relaxed);
        let blocks = entries.iter().map(|entry| self.relation_blocks(entry)).sum();
        let mut maps = maps.into_iter();
        for mut entry in entries {
            for part in &mut entry.parts {
                *part = maps.next().ok_or_else(|| Error::bug("a block map that was not moved"))?;
            }
            table.push(entry)?;
        }
        Ok(blocks)
    }

    fn relation_blocks(&self, entry: &FileEntry) -> u64 {
        let is_relation = RelationFile::parse_path(&entry.path, &self.source.tablespace_version_dir()).is_some();
        if is_relation { entry.len.div_ceil(u64::from(self.source.block_size)) } else { 0 }
    }

    /// Proves that every chunk of a part lies within its pack, and gives the part few layers.
    fn flatten(&self, part: &mut PartMap) -> Result<()> {
        let count = flattened_len(&part.layers);
        let (above, below) = part.layers.split_at(count);
        let mut packs: BTreeSet<PackName> = BTreeSet::new();
        let mut base: Option<Layer> = None;
        for place in below {
            let layer = self.read_layer(place, Depth::Locations)?;
            self.chunks_must_be_there(place, &layer)?;
            packs.extend(layer.data_packs());
            base = Some(match base {
                Some(newer) => newer.over(&layer),
                None => layer,
            });
        }
        let mut flat: Option<Layer> = None;
        for place in above {
            let layer = self.read_layer(place, Depth::Fingerprints)?;
            self.chunks_must_be_there(place, &layer)?;
            flat = Some(match flat {
                Some(newer) => newer.over(&layer),
                None => layer,
            });
        }
        let whole = match (&flat, &base) {
            (Some(flat), Some(base)) => flat.over(base).is_complete(),
            (Some(layer), None) | (None, Some(layer)) => layer.is_complete(),
            (None, None) => false,
        };
        if !whole {
            return Err(Error::corrupt(self.source.id.to_string(), "a block map leaves blocks out"));
        }
        let Some(flat) = flat else { return Ok(()) };
        packs.extend(flat.data_packs());
        let mut layers = vec![write_layer(&self.map, &flat)?];
        layers.extend_from_slice(below);
        *part = PartMap { layers, data: packs.into_iter().collect() };
        Ok(())
    }

    fn read_layer(&self, place: &LayerPlace, depth: Depth) -> Result<Layer> {
        let fingerprints_len = if depth == Depth::Fingerprints { place.fingerprints_len } else { 0 };
        let len = u64::from(place.locations_len) + u64::from(fingerprints_len);
        self.bytes_read.fetch_add(len, Ordering::Relaxed);
        self.repo.read_layer(&self.source, place, depth)
    }

    /// A chunk that leads out of its pack would be found by a restore; a backup that lists but does not restore is none.
    fn chunks_must_be_there(&self, place: &LayerPlace, layer: &Layer) -> Result<()> {
        let locations = &layer.locations;
        let lengths: Vec<Option<u64>> =
            locations.packs.iter().map(|pack| self.lengths.get(&pack.name()).copied()).collect();
        for chunk in &locations.chunks {
            let len = lengths[chunk.pack as usize];
            let end = chunk.offset.saturating_add(u64::from(chunk.stored_len)).saturating_add(PACK_END_LEN);
            if len.is_none_or(|len| end > len) {
                let object = place.pack.object(&self.source.cluster)?;
                let what = format!("a block map names a chunk at {} that no pack has", chunk.offset);
                return Err(Error::corrupt(format!("{object} at {}", place.offset), what));
            }
        }
        Ok(())
    }
}
