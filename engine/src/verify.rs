//! `verify`: whether what the repository holds is what was stored.
//!
//! ```text
//! for each backup: read the manifest and the file table; note which packs, layers and chunks it needs
//! quick:  each pack is there, with the right length
//! else:   read each pack once, some packs at a time, all workers together: frame, every record's checksum; every chunk is decompressed and proved by its id,
//!         and the fingerprints in the block maps are those of the blocks
//! then:   name each damaged object, and the backups and files that need it
//! ```
//!
//! Objects that several backups share are read once. Damage is no error: it is the report. An error is what stops verifying.
//!
//! What this cannot see: bytes that were wrong before they came here (a damaged page is listed in its backup), and packs that no backup needs, which are litter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chunk::{Decoder, Fingerprint, Shape};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupSummary, ChunkRef, ClusterName, DataPack, Depth, FileEntry, Group, Layer, LayerPlace, Lease, LeaseRequest,
    Manifest, Operation, PackInfo, PackKind, PackName, PackTable, Place, Repository, pack_fault, read_page,
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

/// A distinct stack of layers, and the files that have it.
struct Stack {
    /// A manifest that needs it.
    manifest: usize,
    layers: Vec<LayerPlace>,
    data: Vec<PackName>,
    users: Vec<User>,
}

/// A file of some backups.
#[derive(Clone)]
struct User {
    path: Vec<u8>,
    page: usize,
}

/// A chunk that block maps need.
struct Needed {
    chunk: ChunkRef,
    fingerprints: Vec<Option<Fingerprint>>,
    stacks: Vec<usize>,
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
    files: BTreeSet<Vec<u8>>,
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
    /// For each distinct page of the file tables, the backups that have it.
    pages: Vec<Vec<usize>>,
    stacks: Vec<Stack>,
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
            stacks: Vec::new(),
            findings: Mutex::default(),
            objects_checked,
            bytes_read: AtomicU64::new(0),
        })
    }

    fn found(&self, object: &str, problem: String, backups: &[usize], files: &[&[u8]]) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        let finding = findings.entry(object.to_owned()).or_default();
        finding.problems.insert(problem);
        finding.backups.extend(backups);
        finding.files.extend(files.iter().map(|path| path.to_vec()));
    }

    /// Notes an error that is damage; passes on one that stops verifying.
    fn note(&self, object: &str, error: Error, backups: &[usize], files: &[&[u8]]) -> Result<()> {
        match error.kind() {
            ErrorKind::Corrupt | ErrorKind::Missing | ErrorKind::Unsupported => {
                let told = error.place() == Some(object);
                let problem = if told { error.without_place() } else { error.to_string() };
                self.found(object, problem, backups, files);
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

    /// Reads every distinct page of the file tables and gathers the block maps.
    fn read_tables(&mut self) -> Result<()> {
        let mut known_pages = HashMap::new();
        let mut known_stacks: HashMap<Vec<Place>, usize> = HashMap::new();
        for index in 0..self.backups.len() {
            for page_number in 0..self.backups[index].1.pages.len() {
                let page = &self.backups[index].1.pages[page_number];
                let key = (page.place.pack, page.place.offset);
                if let Some(known) = known_pages.get(&key) {
                    let known: &usize = known;
                    self.pages[*known].push(index);
                    continue;
                }
                let number = self.pages.len();
                known_pages.insert(key, number);
                let read = read_page(&**self.repo.store(), &self.cluster, page);
                let object = page.place.pack.object(&self.cluster)?;
                self.pages.push(vec![index]);
                match read {
                    Ok(page) => {
                        self.packs_must_be_named(index, &object, &page.packs);
                        self.gather(index, number, page.entries, &mut known_stacks);
                    }
                    Err(error) => {
                        let users = self.packs.get(&key.0).map_or(&[][..], |(_, users)| users);
                        self.note(object.as_str(), error, users, &[])?;
                    }
                }
            }
        }
        self.name_files_of_absent_packs()
    }

    /// A pack that the manifest does not name is not looked at, so nothing may refer to it.
    fn packs_must_be_named(&self, backup: usize, page: &ObjectName, packs: &[PackName]) {
        if packs.iter().any(|pack| !self.packs.contains_key(pack)) {
            let problem = "a page of the file table refers to a pack that the manifest does not name".to_owned();
            self.found(page.as_str(), problem, &[backup], &[]);
        }
    }

    fn gather(
        &mut self,
        manifest: usize,
        page: usize,
        entries: Vec<FileEntry>,
        known: &mut HashMap<Vec<Place>, usize>,
    ) {
        for FileEntry { path, parts, .. } in entries {
            for part in parts {
                let user = User { path: path.clone(), page };
                let key = part.layers.iter().map(|layer| Place { pack: layer.pack, offset: layer.offset }).collect();
                let stack = *known.entry(key).or_insert_with(|| {
                    let (layers, data) = (part.layers.clone(), part.data.clone());
                    self.stacks.push(Stack { manifest, layers, data, users: Vec::new() });
                    self.stacks.len() - 1
                });
                self.stacks[stack].users.push(user);
            }
        }
    }

    fn name_files_of_absent_packs(&self) -> Result<()> {
        for stack in &self.stacks {
            let needed = stack.data.iter().copied().chain(stack.layers.iter().map(|layer| layer.pack));
            for pack in needed.filter(|pack| self.absent.contains(pack)) {
                let (backups, files) = self.hurt(stack);
                let object = pack.object(&self.cluster)?;
                let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
                let finding = findings.entry(object.to_string()).or_default();
                finding.backups.extend(&backups);
                finding.files.extend(files.iter().map(|path| path.to_vec()));
            }
        }
        Ok(())
    }

    /// The backups and files that a damaged block map or chunk of a stack hurts.
    fn hurt<'s>(&self, stack: &'s Stack) -> (Vec<usize>, Vec<&'s [u8]>) {
        let backups = stack.users.iter().flat_map(|user| self.pages[user.page].iter().copied()).collect();
        (backups, stack.users.iter().map(|user| user.path.as_slice()).collect())
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
                    if let Some(problem) = self.prove(chunk, record.bytes, decoder) {
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
        let flattened = self.stacks.par_iter().enumerate().filter(|(_, stack)| stack.data.iter().any(wanted));
        let flattened = flattened.map(|(index, stack)| Ok((index, self.flatten(stack)?)));
        let mut needed = Chunks::new();
        for (index, layer) in flattened.collect::<Result<Vec<_>>>()? {
            let Some(layer) = layer else { continue };
            let mut fingerprints = layer.fingerprints.as_slice();
            for extent in layer.locations.extents.iter().filter(|extent| extent.source != 0) {
                let (these, rest) = fingerprints.split_at(extent.count as usize);
                fingerprints = rest;
                let Some(chunk) = extent.chunk().map(|chunk| layer.locations.chunks[chunk]) else { continue };
                let DataPack { run, seq } = layer.locations.packs[chunk.pack as usize];
                let pack = PackName { run, seq, kind: PackKind::Data };
                if !wanted(&pack) {
                    continue;
                }
                let entry = needed.entry((pack, chunk.offset)).or_insert_with(|| Needed {
                    chunk,
                    fingerprints: vec![None; usize::from(chunk.block_count)],
                    stacks: Vec::new(),
                });
                if entry.stacks.last() != Some(&index) {
                    entry.stacks.push(index);
                }
                let same = entry.chunk.is_same_chunk(&chunk)
                    && these.iter().zip(usize::from(extent.first)..).all(|(fingerprint, block)| {
                        let known = entry.fingerprints[block].get_or_insert(*fingerprint);
                        known == fingerprint
                    });
                if !same {
                    let object = pack.object(&self.cluster)?;
                    let (backups, files) = self.hurt(&self.stacks[index]);
                    let problem = format!("two block maps disagree about the chunk at {}", chunk.offset);
                    self.found(object.as_str(), problem, &backups, &files);
                }
            }
        }
        Ok(needed)
    }

    /// The flattened block map of a stack; `None` if it is damaged, which is noted.
    fn flatten(&self, stack: &Stack) -> Result<Option<Layer>> {
        let manifest = &self.backups[stack.manifest].1;
        let part = crate::repo::PartMap { layers: stack.layers.clone(), data: stack.data.clone() };
        let flat = self.repo.flatten(manifest, &part, Depth::Fingerprints);
        let damaged = match flat {
            Ok(layer) if layer.locations.stored_blocks() == layer.fingerprints.len() as u64 => return Ok(Some(layer)),
            Ok(_) => Error::new(ErrorKind::Corrupt, "a block map has lost its fingerprints"),
            Err(error) => error,
        };
        let object = damaged.place().and_then(|place| place.split(' ').next()).map(str::to_owned);
        let object = match object {
            Some(object) if object.contains('/') => object,
            _ => stack.layers[0].pack.object(&self.cluster)?.to_string(),
        };
        let (backups, files) = self.hurt(stack);
        self.note(&object, damaged, &backups, &files)?;
        Ok(None)
    }

    /// What is wrong with a needed chunk.
    fn prove(&self, needed: &Needed, stored: &[u8], decoder: &mut Decoder) -> Option<String> {
        let Needed { chunk, fingerprints, stacks } = needed;
        if stored.len() != chunk.stored_len as usize {
            return Some(format!("has {} bytes instead of {}", stored.len(), chunk.stored_len));
        }
        let block_len = stacks.first().map_or(0, |stack| self.backups[self.stacks[*stack].manifest].1.block_len());
        let shape = Shape { block_len, block_count: usize::from(chunk.block_count) };
        let found = match decoder.decode(chunk.codec, stored, shape, chunk.id) {
            Ok((_, found)) => found,
            Err(error) => return Some(error.to_string()),
        };
        let same = fingerprints.iter().zip(found).all(|(needed, found)| needed.is_none_or(|needed| needed == *found));
        (!same).then(|| "has other blocks than a block map says".to_owned())
    }

    fn hurt_by_chunk(&self, object: &str, offset: u64, problem: &str, needed: &Needed) {
        for stack in &needed.stacks {
            let (backups, files) = self.hurt(&self.stacks[*stack]);
            self.found(object, format!("the chunk at {offset} {problem}"), &backups, &files);
        }
    }

    fn report(self, begun: Instant) -> Report {
        let findings = self.findings.into_inner().unwrap_or_else(PoisonError::into_inner);
        let hurt: BTreeSet<usize> = findings.values().flat_map(|finding| &finding.backups).copied().collect();
        let name = |path: Vec<u8>| String::from_utf8_lossy(&path).into_owned();
        let damage = findings.into_iter().map(|(object, finding)| Damage {
            object,
            problem: finding.problems.into_iter().collect::<Vec<_>>().join("; "),
            backups: finding.backups.iter().map(|index| self.backups[*index].0.id.to_string()).collect(),
            files: finding.files.into_iter().take(MAX_FILES).map(name).collect(),
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
