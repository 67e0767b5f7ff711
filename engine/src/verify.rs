//! `verify`: whether what the repository holds is what was stored.
//!
//! ```text
//! for each backup: read the manifest and the file table; note which packs each page of it needs
//! quick:  each pack is there, with the right length
//! else:   read each pack once, some packs at a time, all workers together: frame, every record's checksum; every chunk is decompressed and proved by its id,
//!         and the fingerprints in the block maps are those of the blocks
//! then:   name each damaged object, and, in another pass over the file tables, the backups and files that need it
//! ```
//!
//! Objects that several backups share are read once. What is held is the chunks of the packs at hand, and of the block maps that need them only what tells
//! them apart: the pages of the file tables are read again for each window of packs whose chunks they name. So memory is bounded, however many files there are. Damage is no error: it is the report. An error is what stops verifying.
//!
//! What this cannot see: bytes that were wrong before they came here (a damaged page is listed in its backup), and packs that no backup needs, which are litter.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chunk::{Decoder, Fingerprint, Shape, hash16};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupSummary, ChunkRef, ClusterName, Depth, FileEntry, Group, Layer, LayerPlace, Lease, LeaseRequest, Manifest,
    Operation, PackInfo, PackKind, PackName, PackTable, PartMap, Place, Repository, pack_fault, read_page,
};
use crate::store::ObjectName;

/// Files named for each damaged object at most.
const MAX_FILES: usize = 100;
/// Packs whose chunks are known at once.
const WINDOW: usize = 8;
/// How far ahead groups of records are asked for.
const GROUPS_AHEAD: usize = 4;

/// How to verify.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether to look at presence and lengths only.
    pub quick: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// What verifying found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backups that were verified.
    pub backups: Vec<VerifiedBackup>,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Objects that were looked at.
    pub objects_checked: u64,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Nothing.
    pub bytes_written: u64,
}

/// A backup and whether it is whole.
#[derive(Debug, Serialize)]
pub struct VerifiedBackup {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// Whether nothing that it needs is damaged.
    pub ok: bool,
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// The backups that need it.
    pub backups: Vec<String>,
    /// Their files that need the damaged place, the first hundred.
    pub files: Vec<String>,
}

/// Verifies one backup, or `all` of a cluster.
///
/// # Errors
/// What stops verifying; damage is in the report.
pub fn run(
    repo: &Repository,
    cluster: &ClusterName,
    backup: &str,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    let begun = Instant::now();
    let (_lease, chosen) = loop {
        let chosen = Chosen::read(repo, cluster, backup)?;
        let uses = chosen.backups.iter().map(|backup| backup.id).collect();
        let request = LeaseRequest { operation: Operation::Verify, runs: Vec::new(), uses };
        let lease = Lease::acquire(repo, cluster, &request, &|text| progress.notice(text))?;
        // Who had to wait chose from what is there no more.
        if !lease.waited() {
            break (lease, chosen);
        }
    };
    let mut verifier = Verifier::new(repo, cluster, chosen)?;
    verifier.check_presence()?;
    verifier.read_tables()?;
    if !options.quick {
        let jobs = crate::os::worker_count(options.jobs);
        let threads = rayon::ThreadPoolBuilder::new().num_threads(jobs).build();
        let threads = threads.map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start threads").because(e))?;
        threads.install(|| verifier.check_contents(jobs, progress))?;
    }
    verifier.name_what_is_hurt()?;
    let report = verifier.report(begun);
    if !options.quick {
        mark(repo, cluster, &report, progress);
    }
    Ok(report)
}

/// Leaves a mark at backups that are damaged, so that no policy counts them and nothing is built upon them; takes it away from those that are not.
fn mark(repo: &Repository, cluster: &ClusterName, report: &Report, progress: &dyn Progress) {
    for VerifiedBackup { backup, ok } in &report.backups {
        let id = backup.id.to_string();
        let damage = report.damage.iter().find(|damage| damage.backups.contains(&id));
        let damage = damage.map(|damage| format!("{}: {}", damage.object, damage.problem));
        let marked = match (ok, damage) {
            (false, damage) => repo.set_mark(cluster, backup.id, Some(&damage.unwrap_or_default())),
            (true, _) if backup.damaged => repo.set_mark(cluster, backup.id, None),
            _ => continue,
        };
        if let Err(error) = marked {
            // A repository that may only be read: the report says it all the same.
            progress.notice(&format!("cannot note in the repository what was found out about {id}: {error}"));
        }
    }
}

/// Tells a stack of layers from others.
type StackId = [u8; 16];

fn stack_id(part: &PartMap) -> StackId {
    let mut bytes = Vec::with_capacity(part.layers.len() * 32);
    for LayerPlace { pack, offset, .. } in &part.layers {
        bytes.extend_from_slice(pack.run.to_string().as_bytes());
        bytes.extend_from_slice(&pack.seq.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
    }
    hash16(&bytes)
}

/// A distinct page of the file tables.
struct Page {
    /// A backup that has it, and its number there.
    backup: usize,
    number: usize,
    /// All backups that have it.
    users: Vec<usize>,
    /// The data packs that its entries need; none if it cannot be read.
    data: Box<[PackName]>,
}

/// A chunk that block maps need.
struct Needed {
    chunk: ChunkRef,
    block_len: usize,
    fingerprints: Vec<Option<Fingerprint>>,
    stacks: Vec<StackId>,
    /// Whether two of these say different things of it.
    disputed: bool,
}

/// The chunks that block maps need, by pack and offset.
type Chunks = HashMap<(PackName, u64), Needed>;

/// A pack whose frame is sound.
struct ReadPack {
    name: PackName,
    object: ObjectName,
    table: PackTable,
    /// How many of its records are chunks that are needed.
    proved: AtomicUsize,
    /// Whether some of it could not be read.
    broke_off: AtomicBool,
}

#[derive(Default)]
struct Finding {
    problems: BTreeSet<String>,
    backups: BTreeSet<usize>,
    /// The stacks that are hurt: their files and backups are looked for at the end.
    stacks: HashSet<StackId>,
    /// The first hundred.
    files: BTreeSet<Vec<u8>>,
}

impl Finding {
    fn hurts(&mut self, backups: &[usize], path: &[u8]) {
        self.backups.extend(backups);
        self.files.insert(path.to_vec());
        if self.files.len() > MAX_FILES {
            self.files.pop_last();
        }
    }
}

/// What is to be verified.
struct Chosen {
    backups: Vec<BackupSummary>,
    unreadable: Vec<Damage>,
}

impl Chosen {
    fn read(repo: &Repository, cluster: &ClusterName, backup: &str) -> Result<Self> {
        let catalog = repo.catalog(cluster)?;
        if backup != "all" {
            return Ok(Self { backups: vec![catalog.select(backup)?], unreadable: Vec::new() });
        }
        let unreadable = catalog.damaged().iter().map(|(object, error)| Damage {
            object: object.to_string(),
            problem: error.without_place(),
            backups: object
                .as_str()
                .rsplit('/')
                .next()
                .and_then(|name| name.split('.').next())
                .map(str::to_owned)
                .into_iter()
                .collect(),
            files: Vec::new(),
        });
        Ok(Self { backups: catalog.backups().to_vec(), unreadable: unreadable.collect() })
    }
}

struct Verifier<'r> {
    repo: &'r Repository,
    cluster: ClusterName,
    backups: Vec<(BackupSummary, Manifest)>,
    unreadable: Vec<Damage>,
    /// The needed packs, with the length that they must have and the backups that need them.
    packs: BTreeMap<PackName, (u64, Vec<usize>)>,
    /// Packs that are not there, or not whole.
    absent: BTreeSet<PackName>,
    pages: Vec<Page>,
    findings: Mutex<BTreeMap<String, Finding>>,
    objects_checked: AtomicU64,
    bytes_read: AtomicU64,
}

impl<'r> Verifier<'r> {
    fn new(repo: &'r Repository, cluster: &ClusterName, chosen: Chosen) -> Result<Self> {
        let Chosen { backups: chosen, unreadable } = chosen;
        let several = chosen.len() > 1;
        let mut backups = Vec::new();
        for backup in chosen {
            match repo.manifest(cluster, backup.id) {
                Ok(manifest) => backups.push((backup, manifest)),
                // Expired before the lease said that it is wanted.
                Err(e) if e.kind() == ErrorKind::Missing && several => {}
                Err(e) => return Err(e),
            }
        }
        let mut packs: BTreeMap<PackName, (u64, Vec<usize>)> = BTreeMap::new();
        for (index, (_, manifest)) in backups.iter().enumerate() {
            for PackInfo { name, len } in &manifest.packs {
                let users = &mut packs.entry(*name).or_insert((*len, Vec::new())).1;
                if users.last() != Some(&index) {
                    users.push(index);
                }
            }
        }
        let objects_checked = AtomicU64::new((backups.len() + unreadable.len()) as u64);
        Ok(Self {
            repo,
            cluster: cluster.clone(),
            backups,
            unreadable,
            packs,
            absent: BTreeSet::new(),
            pages: Vec::new(),
            findings: Mutex::default(),
            objects_checked,
            bytes_read: AtomicU64::new(0),
        })
    }

    fn found(&self, object: &str, problem: String, backups: &[usize], stacks: &[StackId]) {
        let mut findings = self.findings();
        let finding = findings.entry(object.to_owned()).or_default();
        finding.problems.insert(problem);
        finding.backups.extend(backups);
        finding.stacks.extend(stacks);
    }

    /// Notes an error that is damage; passes on one that stops verifying.
    fn note(&self, object: &str, error: Error, backups: &[usize], stacks: &[StackId]) -> Result<()> {
        match error.kind() {
            ErrorKind::Corrupt | ErrorKind::Missing | ErrorKind::Unsupported => {
                let told = error.place() == Some(object);
                let problem = if told { error.without_place() } else { error.to_string() };
                self.found(object, problem, backups, stacks);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Looks whether each pack is there, with its length.
    fn check_presence(&mut self) -> Result<()> {
        let present = self.repo.packs(&self.cluster)?;
        // Each manifest for itself: they may disagree.
        for (index, (_, manifest)) in self.backups.iter().enumerate() {
            for PackInfo { name, len } in &manifest.packs {
                let object = name.object(&self.cluster)?;
                let Some(problem) = pack_fault(&present, &object, *len) else { continue };
                self.found(object.as_str(), problem, &[index], &[]);
                self.absent.insert(*name);
            }
        }
        self.objects_checked.fetch_add(self.packs.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reads every distinct page of the file tables, and notes which packs it needs.
    fn read_tables(&mut self) -> Result<()> {
        let mut known: HashMap<Place, usize> = HashMap::new();
        for backup in 0..self.backups.len() {
            for number in 0..self.backups[backup].1.pages.len() {
                let page = &self.backups[backup].1.pages[number];
                if let Some(known) = known.get(&page.place) {
                    self.pages[*known].users.push(backup);
                    continue;
                }
                known.insert(page.place, self.pages.len());
                let object = page.place.pack.object(&self.cluster)?;
                let data = match read_page(&**self.repo.store(), &self.cluster, page) {
                    Ok(page) => {
                        self.packs_must_be_named(backup, &object, &page.packs);
                        page.packs.into_iter().filter(|pack| pack.kind == PackKind::Data).collect()
                    }
                    Err(error) => {
                        let users = self.packs.get(&page.place.pack).map_or(&[][..], |(_, users)| users);
                        self.note(object.as_str(), error, users, &[])?;
                        Box::default()
                    }
                };
                self.pages.push(Page { backup, number, users: vec![backup], data });
            }
        }
        Ok(())
    }

    /// The entries of a page, once more; none if it cannot be read, which is noted.
    fn entries(&self, page: &Page) -> Result<Vec<FileEntry>> {
        let place = &self.backups[page.backup].1.pages[page.number];
        match read_page(&**self.repo.store(), &self.cluster, place) {
            Ok(page) => Ok(page.entries),
            Err(error) => {
                let object = place.place.pack.object(&self.cluster)?;
                self.note(object.as_str(), error, &page.users, &[]).map(|()| Vec::new())
            }
        }
    }

    /// A pack that the manifest does not name is not looked at, so nothing may refer to it.
    fn packs_must_be_named(&self, backup: usize, page: &ObjectName, packs: &[PackName]) {
        if packs.iter().any(|pack| !self.packs.contains_key(pack)) {
            let problem = "a page of the file table refers to a pack that the manifest does not name".to_owned();
            self.found(page.as_str(), problem, &[backup], &[]);
        }
    }

    /// Names the backups and files that what was found hurts.
    fn name_what_is_hurt(&self) -> Result<()> {
        let mut hurt: HashMap<StackId, Vec<String>> = HashMap::new();
        for (object, finding) in &mut *self.findings() {
            for stack in finding.stacks.drain() {
                hurt.entry(stack).or_default().push(object.clone());
            }
        }
        if hurt.is_empty() && self.absent.is_empty() {
            return Ok(());
        }
        self.pages.iter().try_for_each(|page| {
            for FileEntry { path, parts, .. } in self.entries(page)? {
                for part in parts {
                    let needed = part.data.iter().copied().chain(part.layers.iter().map(|layer| layer.pack));
                    for pack in needed.filter(|pack| self.absent.contains(pack)) {
                        let object = pack.object(&self.cluster)?;
                        self.findings().entry(object.to_string()).or_default().hurts(&page.users, &path);
                    }
                    for object in hurt.get(&stack_id(&part)).into_iter().flatten() {
                        self.findings().entry(object.clone()).or_default().hurts(&page.users, &path);
                    }
                }
            }
            Ok(())
        })
    }

    fn findings(&self) -> MutexGuard<'_, BTreeMap<String, Finding>> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and proves every pack that is there.
    fn check_contents(&self, jobs: usize, progress: &dyn Progress) -> Result<()> {
        let present = self.packs.iter().filter(|(name, _)| !self.absent.contains(name));
        let (data, map): (Vec<_>, Vec<_>) =
            present.map(|(name, (len, _))| (*name, *len)).partition(|(name, _)| name.kind == PackKind::Data);
        progress.begin(Phase::Verifying, data.iter().chain(&map).map(|(_, len)| len).sum());
        for window in map.chunks(jobs.max(WINDOW)) {
            self.check_packs(window, &Chunks::new(), progress)?;
        }
        for window in data.chunks(WINDOW) {
            self.check_packs(window, &self.needed(window)?, progress)?;
        }
        Ok(())
    }

    /// Reads some packs, all workers together, and proves the chunks that are needed.
    fn check_packs(&self, packs: &[(PackName, u64)], needed: &Chunks, progress: &dyn Progress) -> Result<()> {
        let read = packs.par_iter().map(|(name, len)| self.open_pack(*name, *len, progress));
        let read: Vec<ReadPack> = read.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let groups: Vec<(&ReadPack, Group)> =
            read.iter().flat_map(|pack| pack.table.groups().into_iter().map(move |group| (pack, group))).collect();
        groups.par_iter().enumerate().try_for_each_init(Decoder::new, |decoder, (index, (pack, group))| {
            let decoder = decoder.as_mut().map_err(|e| Error::new(e.kind(), e.what()))?;
            if let Some((next, ahead)) = groups.get(index + GROUPS_AHEAD) {
                self.repo.store().will_get(&next.object, ahead.offset, ahead.len);
            }
            self.check_group(pack, group, needed, decoder, progress)
        })?;
        for pack in read.iter().filter(|pack| !pack.broke_off.load(Ordering::Relaxed)) {
            let expected = needed.keys().filter(|(name, _)| *name == pack.name).count();
            if pack.proved.load(Ordering::Relaxed) < expected {
                let problem = "a block map names a chunk that the pack does not have".to_owned();
                self.found(pack.object.as_str(), problem, &self.packs[&pack.name].1, &[]);
            }
        }
        Ok(())
    }

    /// Reads the frame of a pack; `None` if that is damaged, which is noted.
    fn open_pack(&self, name: PackName, len: u64, progress: &dyn Progress) -> Result<Option<ReadPack>> {
        let object = name.object(&self.cluster)?;
        self.bytes_read.fetch_add(len, Ordering::Relaxed);
        match PackTable::read(&**self.repo.store(), &object, name.kind, len) {
            Ok(table) => Ok(Some(ReadPack {
                name,
                object,
                table,
                proved: AtomicUsize::new(0),
                broke_off: AtomicBool::new(false),
            })),
            Err(error) => {
                progress.advance(len);
                self.note(object.as_str(), error, &self.packs[&name].1, &[]).map(|()| None)
            }
        }
    }

    /// Reads and proves some records of a pack.
    fn check_group(
        &self,
        pack: &ReadPack,
        group: &Group,
        needed: &Chunks,
        decoder: &mut Decoder,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (object, users) = (&pack.object, &self.packs[&pack.name].1);
        let checked = pack.table.check(&**self.repo.store(), object, group, |record| {
            progress.advance(record.bytes.len() as u64);
            let chunk = needed.get(&(pack.name, record.offset));
            pack.proved.fetch_add(usize::from(chunk.is_some()), Ordering::Relaxed);
            match chunk {
                Some(chunk) if record.sound => {
                    if let Some(problem) = chunk.prove(record.bytes, decoder) {
                        self.hurt_by_chunk(object.as_str(), record.offset, &problem, chunk);
                    }
                }
                Some(chunk) => {
                    self.hurt_by_chunk(object.as_str(), record.offset, "does not match its checksum", chunk);
                }
                None if record.sound => {}
                None => {
                    let what = if pack.name.kind == PackKind::Map { "metadata record" } else { "chunk" };
                    let problem = format!("the {what} at {} does not match its checksum", record.offset);
                    self.found(object.as_str(), problem, users, &[]);
                }
            }
            Ok(())
        });
        checked.or_else(|error| {
            pack.broke_off.store(true, Ordering::Relaxed);
            self.note(object.as_str(), error, users, &[])
        })
    }

    /// The chunks of some packs that block maps need.
    fn needed(&self, window: &[(PackName, u64)]) -> Result<Chunks> {
        let wanted = |pack: &PackName| window.binary_search_by(|(name, _)| name.cmp(pack)).is_ok();
        let (known, needed) = (Mutex::new(HashSet::new()), Mutex::new(Chunks::new()));
        let pages = self.pages.par_iter().filter(|page| page.data.iter().any(wanted));
        pages.try_for_each(|page| {
            let manifest = &self.backups[page.backup].1;
            let parts = self.entries(page)?.into_iter().flat_map(|entry| entry.parts);
            for part in parts.filter(|part| part.data.iter().any(wanted)) {
                let stack = stack_id(&part);
                if !known.lock().unwrap_or_else(PoisonError::into_inner).insert(stack) {
                    continue;
                }
                let Some(layer) = self.flatten(manifest, &part, stack)? else { continue };
                let mut needed = needed.lock().unwrap_or_else(PoisonError::into_inner);
                add_needed(&mut needed, &layer, stack, manifest.block_len(), wanted);
            }
            Ok::<_, Error>(())
        })?;
        let needed = needed.into_inner().unwrap_or_else(PoisonError::into_inner);
        for ((pack, offset), needed) in needed.iter().filter(|(_, needed)| needed.disputed) {
            let problem = format!("two block maps disagree about the chunk at {offset}");
            self.found(pack.object(&self.cluster)?.as_str(), problem, &[], &needed.stacks);
        }
        Ok(needed)
    }

    /// The flattened block map of a part; `None` if it is damaged, which is noted.
    fn flatten(&self, manifest: &Manifest, part: &PartMap, stack: StackId) -> Result<Option<Layer>> {
        let flat = self.repo.flatten(manifest, part, Depth::Fingerprints);
        let damaged = match flat {
            Ok(layer) if layer.locations.stored_blocks() == layer.fingerprints.len() as u64 => return Ok(Some(layer)),
            Ok(_) => Error::new(ErrorKind::Corrupt, "a block map has lost its fingerprints"),
            Err(error) => error,
        };
        let object = damaged.place().and_then(|place| place.split(' ').next()).map(str::to_owned);
        let object = match (object, part.layers.first()) {
            (Some(object), _) if object.contains('/') => object,
            (_, Some(layer)) => layer.pack.object(&self.cluster)?.to_string(),
            (_, None) => manifest.object()?.to_string(),
        };
        self.note(&object, damaged, &[], &[stack])?;
        Ok(None)
    }

    fn hurt_by_chunk(&self, object: &str, offset: u64, problem: &str, needed: &Needed) {
        self.found(object, format!("the chunk at {offset} {problem}"), &[], &needed.stacks);
    }

    fn report(self, begun: Instant) -> Report {
        let findings = self.findings.into_inner().unwrap_or_else(PoisonError::into_inner);
        let hurt: BTreeSet<usize> = findings.values().flat_map(|finding| &finding.backups).copied().collect();
        let name = |path: Vec<u8>| String::from_utf8_lossy(&path).into_owned();
        let damage = findings.into_iter().map(|(object, finding)| Damage {
            object,
            problem: finding.problems.into_iter().collect::<Vec<_>>().join("; "),
            backups: finding.backups.iter().map(|index| self.backups[*index].0.id.to_string()).collect(),
            files: finding.files.into_iter().map(name).collect(),
        });
        let damage = self.unreadable.into_iter().chain(damage).collect();
        let verified = |(index, (backup, _))| VerifiedBackup { backup, ok: !hurt.contains(&index) };
        Report {
            backups: self.backups.into_iter().enumerate().map(verified).collect(),
            damage,
            objects_checked: self.objects_checked.into_inner(),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read: self.bytes_read.into_inner(),
            bytes_written: 0,
        }
    }
}

/// Adds the chunks of wanted packs that a flattened block map names.
fn add_needed(
    chunks: &mut Chunks,
    layer: &Layer,
    stack: StackId,
    block_len: usize,
    wanted: impl Fn(&PackName) -> bool,
) {
    let locations = &layer.locations;
    let mut fingerprints = layer.fingerprints.as_slice();
    for extent in locations.extents.iter().filter(|extent| extent.source != 0) {
        let (these, rest) = fingerprints.split_at(extent.count as usize);
        fingerprints = rest;
        let Some(chunk) = extent.chunk().map(|chunk| locations.chunks[chunk]) else { continue };
        let pack = locations.packs[chunk.pack as usize].name();
        if !wanted(&pack) {
            continue;
        }
        let needed = chunks.entry((pack, chunk.offset)).or_insert_with(|| Needed {
            chunk,
            block_len,
            fingerprints: vec![None; usize::from(chunk.block_count)],
            stacks: Vec::new(),
            disputed: false,
        });
        if needed.stacks.last() != Some(&stack) {
            needed.stacks.push(stack);
        }
        let same = needed.chunk.is_same_chunk(&chunk)
            && these.iter().zip(usize::from(extent.first)..).all(|(fingerprint, block)| {
                let known = needed.fingerprints[block].get_or_insert(*fingerprint);
                known == fingerprint
            });
        needed.disputed |= !same;
    }
}

impl Needed {
    /// What is wrong with the chunk. Of one that block maps disagree about, that was said.
    fn prove(&self, stored: &[u8], decoder: &mut Decoder) -> Option<String> {
        let Needed { chunk, block_len, fingerprints, disputed, .. } = self;
        if *disputed {
            return None;
        }
        if stored.len() != chunk.stored_len as usize {
            return Some(format!("has {} bytes instead of {}", stored.len(), chunk.stored_len));
        }
        let shape = Shape { block_len: *block_len, block_count: usize::from(chunk.block_count) };
        let found = match decoder.decode(chunk.codec, stored, shape, chunk.id) {
            Ok((_, found)) => found,
            Err(error) => return Some(error.to_string()),
        };
        let same = fingerprints.iter().zip(found).all(|(needed, found)| needed.is_none_or(|needed| needed == *found));
        (!same).then(|| "has other blocks than a block map says".to_owned())
    }
}
