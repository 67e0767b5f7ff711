//! `export --to REPOSITORY`: one backup to another repository.
//!
//! ```text
//! plan      choose the backup, and in the other repository the backup to compare with: the newest of the same cluster
//! compare   block map against block map, by fingerprints: no data is read for what is there already
//! move      the blocks that are missing there, in the order of the files (repack.rs)
//! commit    the file table, then the manifest, in the other repository
//! ```
//!
//! It is an incremental backup whose source is a repository: the other one gets the blocks that its own newest backup does not have, and nothing
//! else; the new backup has the name, the moment and the type that it has here.
//!
//! An export that was interrupted is taken up again: its packs have the backup's name, what goes into them follows from the two backups alone, and so a pack
//! that is there already is compared by its table instead of stored again. If it is another one (the other repository got a newer backup
//! in between), the rest of the interrupted export is removed and the export begins anew. Packs of the backup's name that other backups there refer to
//! are no such rest: the backup was there before, was expired, and they are what others inherited from it. They stay, and the new packs get other numbers.
//!
//! What goes wrong: another cluster under this name there; a backup under this name there with other contents, which cannot be.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chunk::{Compression, Fingerprint};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress, Silent};
use crate::repack::{MovePlan, Mover};
use crate::repo::{
    BackupSummary, Catalog, ClusterName, Depth, FileEntry, Layer, Lease, Manifest, Operation, PART_BLOCKS, PackKind,
    PackName, Packer, PagePlace, PartMap, Repository, Stack, TAKE_ANOTHER, TableCursor, TableWriter, read_page,
    with_lengths,
};
use crate::store::ObjectName;

/// What to export to another repository and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name, in both repositories.
    pub cluster: ClusterName,
    /// The backup: an id, a unique prefix of one, `latest`, `oldest` or `latest-full`.
    pub backup: String,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress what has to be compressed again.
    pub compression: Compression,
}

/// What an export to a repository did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backup, as it is in the other repository.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// The other repository.
    pub to: String,
    /// Whether it was there already.
    pub already_there: bool,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from this repository.
    pub bytes_read: u64,
    /// Bytes written to the other one.
    pub bytes_written: u64,
}

/// What an export is going to do.
#[derive(Debug)]
pub struct Plan {
    backup: BackupSummary,
    to: String,
    base: Option<BackupSummary>,
    /// None if the backup is there.
    moves: Option<MovePlan>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BackupSummary { id, backup_type, start_time, .. } = &self.backup;
        write!(f, "{id} ({backup_type}, {start_time}) to {}", self.to)?;
        let Some(moves) = &self.moves else { return write!(f, "\n  it is there already") };
        match &self.base {
            Some(base) => write!(f, "\n  compared with {} there", base.id)?,
            None => write!(f, "\n  compared with nothing: there is no backup of this cluster there")?,
        }
        write!(f, "\n  copied: {moves}")
    }
}

/// Decides what to copy, without writing.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup; `Conflict` if the other repository has another cluster of that name.
pub fn plan(from: &Repository, to: &Repository, options: &Options) -> Result<Plan> {
    let backup = from.catalog(&options.cluster)?.select(&options.backup)?;
    let there = to.catalog(&options.cluster)?;
    must_be_the_same_cluster(&there, &backup)?;
    if there.backups().iter().any(|other| other.id == backup.id) {
        return Ok(Plan { backup, to: to.place().to_owned(), base: None, moves: None });
    }
    let base = there.backups().last().cloned();
    let exporter = Exporter::new(from, to, &backup, base.as_ref(), options)?;
    let missing = exporter.missing()?;
    let nowhere = Packer::new(Arc::clone(to.store()), options.cluster.clone(), backup.id, PackKind::Data);
    let load = |job: &Job| exporter.load(&missing, job, Depth::Locations);
    let moves = exporter.mover(&nowhere, options, &Silent).plan(&missing.jobs, &load, &|_| true)?;
    Ok(Plan { backup, to: to.place().to_owned(), base, moves: Some(moves) })
}

/// Copies one backup to another repository, with what of its data is missing there.
///
/// # Errors
/// As [`plan`]; then there is no new backup there, and what was copied so far is used by the next attempt.
pub fn to_repository(from: &Repository, to: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    if from.id() == to.id() {
        let what = format!("{} and {} are the same repository", from.place(), to.place());
        return Err(Error::invalid(what).hint("name another one with --to"));
    }
    let notice = |text: &str| progress.notice(text);
    let (_reading, backup) = Lease::of_backup(from, &options.cluster, &options.backup, Operation::Export, &notice)?;
    let (lease, there) = Lease::of_import(to, &options.cluster, backup.id, &notice)?;
    must_be_the_same_cluster(&there, &backup)?;
    if let Some(found) = there.backups().iter().find(|other| other.id == backup.id) {
        return already_there(to, found.clone(), begun);
    }
    let base = there.backups().last().cloned();
    let exporter = Exporter::new(from, to, &backup, base.as_ref(), options)?;
    let sequence = there.sequence_between(backup.start_time, exporter.source.sequence);
    // The lease keeps them from getting more.
    let in_use = to.packs_in_use(&options.cluster, backup.id)?;
    let done = match exporter.execute(&lease, sequence, &in_use, options, progress) {
        Err(e) if e.kind() == ErrorKind::Conflict => {
            progress.notice(&format!("an interrupted export of {} cannot be taken up: {e}; beginning anew", backup.id));
            to.discard_but(&options.cluster, backup.id, &in_use)?;
            exporter.execute(&lease, sequence, &in_use, options, progress)?
        }
        done => done.map_err(|e| e.or_hint(ErrorKind::Corrupt, TAKE_ANOTHER))?,
    };
    Ok(Report { to: to.place().to_owned(), seconds: begun.elapsed().as_secs_f64(), ..done })
}

fn already_there(to: &Repository, backup: BackupSummary, begun: Instant) -> Result<Report> {
    to.settle(&backup.cluster)?;
    let manifest = to.manifest(&backup.cluster, backup.id)?;
    if let Some((object, fault)) = to.unsound_pack(&manifest)? {
        let error = Error::corrupt(object.as_str(), format!("the backup is there already, but damaged: {fault}"));
        return Err(error.hint("remove it there (`pgstrata expire BACKUP --force`), then export it again"));
    }
    let (to, seconds) = (to.place().to_owned(), begun.elapsed().as_secs_f64());
    Ok(Report { backup, to, already_there: true, seconds, bytes_read: 0, bytes_written: 0 })
}

fn must_be_the_same_cluster(there: &Catalog, backup: &BackupSummary) -> Result<()> {
    let other = there.backups().iter().find(|other| other.system_identifier != backup.system_identifier);
    let Some(other) = other else { return Ok(()) };
    let what = format!(
        "the backups of {:?} there are of the cluster {}, this one is of {}",
        other.cluster.to_string(),
        other.system_identifier,
        backup.system_identifier
    );
    Err(Error::new(ErrorKind::Conflict, what).hint("export to another repository"))
}

/// A part of a file that has blocks which are missing there.
struct Job {
    /// Index of its entry, and of the part in it.
    entry: usize,
    part: usize,
    /// The blocks.
    blocks: Vec<Range<u32>>,
    /// What the other repository has of it.
    there: Option<PartMap>,
}

/// The files of a backup, and what of them is missing there.
struct Missing {
    /// The parts without missing blocks are those of the other repository.
    entries: Vec<FileEntry>,
    jobs: Vec<Job>,
}

/// Copies one backup.
struct Exporter<'a> {
    from: &'a Repository,
    to: &'a Repository,
    source: Manifest,
    /// What is there already.
    base: Option<Manifest>,
}

impl<'a> Exporter<'a> {
    fn new(
        from: &'a Repository,
        to: &'a Repository,
        backup: &BackupSummary,
        base: Option<&BackupSummary>,
        options: &Options,
    ) -> Result<Self> {
        let source = from.manifest(&options.cluster, backup.id)?;
        if let Some(fault) = from.known_fault(&source)? {
            return Err(fault.hint("`pgstrata verify` tells which backups are whole; export one of them"));
        }
        let base = base.map(|base| to.manifest(&options.cluster, base.id)).transpose()?;
        // What is not whole there is nothing to build upon.
        let sound = base.as_ref().map_or(Ok(false), |base| Ok(to.known_fault(base)?.is_none()))?;
        let base = base.filter(|base| sound && base.block_size == source.block_size);
        Ok(Self { from, to, source, base })
    }

    fn mover<'m>(&'m self, data: &'m Packer, options: &Options, progress: &'m dyn Progress) -> Mover<'m> {
        Mover {
            from: self.from,
            cluster: &self.source.cluster,
            block_len: self.source.block_len(),
            data,
            compression: options.compression,
            jobs: crate::os::worker_count(options.jobs),
            progress,
        }
    }

    /// The blocks of a job, where they are stored here.
    fn load(&self, missing: &Missing, job: &Job, depth: Depth) -> Result<Layer> {
        let part = &missing.entries[job.entry].parts[job.part];
        let mut layer = self.from.flatten(&self.source, part, depth)?.restricted(&job.blocks);
        // Over what is there it is a layer of one backup, whatever the layers were that it comes from.
        layer.locations.limit = layer.locations.block_count;
        Ok(layer)
    }

    /// Compares every file with what is there.
    fn missing(&self) -> Result<Missing> {
        let mut there = TableCursor::new(self.to, self.base.as_ref());
        let mut entries = Vec::new();
        let mut jobs = Vec::new();
        for page in &self.source.pages {
            for entry in read_page(&**self.from.store(), &self.source.cluster, page)?.entries {
                let maps = there.find(&entry.path)?.map_or_else(Vec::new, |found| found.parts);
                let mut maps = maps.into_iter();
                for part in 0..entry.parts.len() {
                    jobs.push(Job { entry: entries.len(), part, blocks: Vec::new(), there: maps.next() });
                }
                entries.push(entry);
            }
        }
        let missing = Missing { entries, jobs: Vec::new() };
        let compared = jobs.into_par_iter().map(|job| self.compare(&missing, job));
        let jobs: Vec<(Job, bool)> = compared.collect::<Result<_>>()?;
        let (jobs, there): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|(_, differs)| *differs);
        let mut missing = Missing { jobs: jobs.into_iter().map(|(job, _)| job).collect(), ..missing };
        for (Job { entry, part, there, .. }, _) in there {
            missing.entries[entry].parts[part] = there.ok_or_else(|| Error::bug("nothing is as it should be"))?;
        }
        Ok(missing)
    }

    /// Finds the blocks of a part that are missing there; whether anything about it differs.
    fn compare(&self, missing: &Missing, mut job: Job) -> Result<(Job, bool)> {
        let (Some(map), Some(base)) = (&job.there, &self.base) else {
            job.blocks.push(0..PART_BLOCKS);
            return Ok((job, true));
        };
        let here = self.from.flatten(&self.source, &missing.entries[job.entry].parts[job.part], Depth::Fingerprints)?;
        let there = self.to.flatten(base, map, Depth::Fingerprints)?;
        let unread = || Error::bug("a flattened layer without its fingerprints");
        let here = here.all_fingerprints().ok_or_else(unread)?;
        let there = there.all_fingerprints().ok_or_else(unread)?;
        job.blocks = differing(&here, &there);
        let differs = !job.blocks.is_empty() || here.len() != there.len();
        Ok((job, differs))
    }

    fn execute(
        &self,
        lease: &Lease,
        sequence: u64,
        in_use: &BTreeSet<ObjectName>,
        options: &Options,
        progress: &dyn Progress,
    ) -> Result<Report> {
        let Manifest { cluster, id, .. } = &self.source;
        let packer = |kind| Packer::resuming(Arc::clone(self.to.store()), cluster.clone(), *id, kind, in_use.clone());
        let (data, map) = (packer(PackKind::Data)?, packer(PackKind::Map)?);
        let missing = self.missing()?;
        let load = |job: &Job| self.load(&missing, job, Depth::Fingerprints);
        let mover = self.mover(&data, options, progress);
        let plan = mover.plan(&missing.jobs, &load, &|_| true)?;
        progress.begin(Phase::Moving, plan.bytes());
        let stack = Stack { repo: self.to, parent: self.base.as_ref(), map: &map };
        let mut maps = Vec::with_capacity(missing.jobs.len());
        let moved = mover.run(&plan, &missing.jobs, &load, &|_| true, &mut |job, layer| {
            maps.push(stack.add(layer, job.there.as_ref().map_or(&[], |map| &map.layers))?);
            Ok(())
        })?;
        let (pages, needed) = self.write_table(missing, maps, &map)?;
        let (data, map) = (data.finish_resumed()?, map.finish_resumed()?);
        let own: Vec<_> = data.packs.into_iter().chain(map.packs).collect();
        let inherited = self.base.iter().flat_map(|base| &base.packs);
        let lengths: HashMap<PackName, u64> = inherited.chain(&own).map(|pack| (pack.name, pack.len)).collect();
        let manifest = Manifest {
            repository: self.to.id().to_owned(),
            sequence,
            edition: 0,
            own_bytes: own.iter().map(|pack| pack.len).sum(),
            packs: with_lengths(&self.source.cluster, &needed, |pack| lengths.get(pack).copied())?,
            pages,
            ..self.source.clone()
        };
        let manifest_len = self.to.commit(&manifest, lease)?;
        Ok(Report {
            backup: BackupSummary::new(&manifest, manifest_len),
            to: self.to.place().to_owned(),
            already_there: false,
            seconds: 0.0,
            bytes_read: moved.bytes_read,
            bytes_written: data.bytes_written + map.bytes_written + manifest_len,
        })
    }

    fn write_table(
        &self,
        missing: Missing,
        maps: Vec<PartMap>,
        map: &Packer,
    ) -> Result<(Vec<PagePlace>, Vec<PackName>)> {
        let Missing { mut entries, jobs } = missing;
        for (job, map) in jobs.into_iter().zip(maps) {
            entries[job.entry].parts[job.part] = map;
        }
        let mut table = TableWriter::new(map, self.base.as_ref().map_or(&[], |base| &base.pages));
        entries.into_iter().try_for_each(|entry| table.push(entry))?;
        table.finish()
    }
}

/// The ranges of blocks that the other one does not have.
fn differing(here: &[Fingerprint], there: &[Fingerprint]) -> Vec<Range<u32>> {
    let differs = |block: &usize| there.get(*block) != Some(&here[*block]);
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for block in (0..here.len()).filter(differs).filter_map(|block| u32::try_from(block).ok()) {
        match ranges.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}
