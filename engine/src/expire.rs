//! `expire`: backups go by policy, then what nothing refers to any more.
//!
//! ```text
//! lease     from here on nobody begins who does not wait; who began before is in the list, with what he uses
//! settle    which manifests there are is made durable: what a killed run left half done must not be undone later
//! decide    which backups stay and why (expire/decide.rs, expire/policy.rs)
//! manifests those of the others are deleted first: they are no backups any more
//! garbage   packs that no manifest names and that no live run writes; pins, leases and temporary files of what is gone
//! compact   live chunks move out of packs that are mostly dead (expire/usage.rs, expire/compact.rs)
//! ```
//!
//! No backup depends on another, so any of them can go. A crash at any point leaves litter, never a manifest whose data is gone: manifests go before their packs, and
//! a manifest that is written anew, because what it refers to moved, is stored before its older edition is deleted, and that before the packs.
//!
//! What goes wrong: a manifest that cannot be read may need any pack, so nothing is collected until it reads again or is removed by name; a store that refuses to
//! delete something (a retention lock), which is reported and passed over, with all that the thing still needs; a disk that is full, on which
//! deleting comes first, so that moving finds room.

mod compact;
mod decide;
mod policy;
mod usage;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::time::Instant;

use serde::Serialize;

pub use self::policy::{Count, Moment, Policy, Span};

use self::compact::Vacating;
use self::decide::Decision;
use self::usage::Usage;
use crate::chunk::Compression;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupId, BackupSummary, Catalog, ClusterName, Lease, LeaseRecord, LeaseRequest, Operation, PackName, Repository,
    leases, remove_lease,
};
use crate::store::ObjectName;

/// What to expire and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// Which backups go.
    pub selection: Selection,
    /// Whether pinned backups, damaged ones and the last good one may go, where the selection names them.
    pub force: bool,
    /// Percentage of the packs' bytes that may be dead before live ones are moved out of mostly dead packs; never if `None`.
    pub max_unused: Option<u8>,
    /// How to compress what has to be compressed again when chunks move.
    pub compression: Compression,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// Which backups go.
#[derive(Clone, Debug)]
pub enum Selection {
    /// Those that no rule of the policy keeps.
    Policy(Policy),
    /// These.
    Named(Vec<String>),
    /// None: only collect what nothing refers to.
    Nothing,
}

/// A backup that stays, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The backup.
    pub id: BackupId,
    /// Why: `last`, `daily 2026-11-22`, `pinned`, ...
    pub reasons: Vec<String>,
}

/// What an expiry did, or would do.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Whether nothing was done (`--dry-run`).
    pub dry_run: bool,
    /// The backups that went.
    pub removed: Vec<BackupSummary>,
    /// The backups that went whose manifests could not be read, by their ids.
    pub removed_unreadable: Vec<String>,
    /// The backups that stay, oldest first.
    pub kept: Vec<Kept>,
    /// Bytes that came free: those of the objects removed less those written by moving.
    pub bytes_freed: u64,
    /// Packs that were removed.
    pub packs_removed: u64,
    /// Mostly dead packs among them, whose live chunks were moved.
    pub packs_repacked: u64,
    /// Bytes of the packs that stay.
    pub bytes_kept: u64,
    /// Bytes among them that no backup needs.
    pub bytes_unused: u64,
    /// Objects that the store refused to delete, and why.
    pub refused: Vec<String>,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
}

/// Decides what would go, and changes nothing.
///
/// # Errors
/// `Corrupt` when a manifest cannot be read: what it needs is unknown. `Missing` or `Invalid` for a backup that is named and
/// is not there, or must not go; `Locked` for one that is in use.
pub fn plan(repo: &Repository, options: &Options) -> Result<Report> {
    let begun = Instant::now();
    let scene = Scene::read(repo, &options.cluster)?;
    let decision = decide::decide(repo, &scene, options)?;
    let survey = Survey::of(repo, &options.cluster, &decision)?;
    let usage = Usage::read(repo, &options.cluster, &survey)?;
    let vacated = usage.mostly_dead(options.max_unused);
    let live_in_vacated: u64 = vacated.iter().map(|pack| usage.live(pack)).sum();
    let len_of_vacated: u64 = vacated.iter().map(|pack| usage.len(pack)).sum();
    let garbage: u64 = survey.garbage.iter().chain(&survey.maps).map(|(_, len)| len).sum();
    Ok(Report {
        dry_run: true,
        bytes_freed: decision.manifest_bytes + garbage + len_of_vacated.saturating_sub(live_in_vacated),
        packs_removed: (survey.garbage.len() + vacated.len()) as u64,
        packs_repacked: vacated.len() as u64,
        bytes_kept: usage.bytes() + live_in_vacated - len_of_vacated,
        bytes_unused: usage.unused() + live_in_vacated - len_of_vacated,
        removed: decision.removed,
        removed_unreadable: decision.damaged.iter().map(|object| decide::id_in(object).to_owned()).collect(),
        kept: decision.kept,
        seconds: begun.elapsed().as_secs_f64(),
        bytes_read: usage.bytes_read,
        ..Report::default()
    })
}

/// Removes backups and what nothing refers to.
///
/// # Errors
/// As [`plan`]; `Locked` while another expiry runs.
pub fn run(repo: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let request = LeaseRequest { operation: Operation::Expire, runs: Vec::new(), uses: Vec::new() };
    let lease = Lease::acquire(repo, &options.cluster, &request, &|text| progress.notice(text))?;
    repo.settle(&options.cluster)?;
    let scene = Scene::read(repo, &options.cluster)?;
    let mut collector =
        Collector { repo, cluster: &options.cluster, lease: &lease, progress, report: Report::default() };
    progress.begin(Phase::Deleting, 0);
    collector.break_stale_leases(&scene)?;
    let mut decision = decide::decide(repo, &scene, options)?;
    collector.remove_manifests(&scene, &mut decision)?;
    collector.remove_garbage(&decision)?;
    collector.compact(&decision, options)?;
    if let Err(error) = repo.keep_reserve() {
        progress.notice(&format!("there is hardly any room left in the repository: {error}"));
    }
    let mut report = collector.report;
    report.removed = decision.removed;
    report.kept = decision.kept;
    report.bytes_freed = report.bytes_freed.saturating_sub(report.bytes_written);
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// What an expiry finds.
struct Scene {
    cluster: ClusterName,
    catalog: Catalog,
    /// The leases of others that are not stale.
    live: Vec<LeaseRecord>,
    /// Leases that nobody holds any more.
    stale: Vec<(BackupId, LeaseRecord)>,
}

impl Scene {
    /// Leases first: a backup that is committed in between is in the catalog, or its lease was seen, or both.
    fn read(repo: &Repository, cluster: &ClusterName) -> Result<Self> {
        let (stale, live): (Vec<_>, Vec<_>) =
            leases(repo, cluster)?.into_iter().partition(|(id, record)| record.is_stale(*id));
        let catalog = repo.catalog(cluster)?;
        let live = live.into_iter().map(|(_, record)| record).filter(|record| record.operation != Operation::Expire);
        Ok(Self { cluster: cluster.clone(), catalog, live: live.collect(), stale })
    }

    /// Who uses a backup now.
    fn user(&self, id: BackupId) -> Option<&LeaseRecord> {
        self.live.iter().find(|lease| lease.runs.contains(&id) || lease.uses.contains(&id))
    }

    /// The runs that write packs now.
    fn writers(&self) -> BTreeSet<BackupId> {
        self.live.iter().flat_map(|lease| lease.runs.iter().copied()).collect()
    }
}

/// The packs of a cluster: what the backups that stay refer to, and the rest.
struct Survey {
    /// The backups that stay.
    backups: Vec<BackupId>,
    /// Those of them that are left as they are: somebody uses them, they are damaged, or they are newer than the decision.
    fixed: BTreeSet<BackupId>,
    /// Packs that they refer to, with their lengths.
    referenced: BTreeMap<PackName, u64>,
    /// Packs that nobody refers to and nobody writes.
    garbage: Vec<(ObjectName, u64)>,
    /// Maps of changes up to backups that are not there and that nobody makes.
    maps: Vec<(ObjectName, u64)>,
}

impl Survey {
    /// Looks again at everything: what was committed or begun since the decision is taken as it is.
    fn of(repo: &Repository, cluster: &ClusterName, decision: &Decision) -> Result<Self> {
        let scene = Scene::read(repo, cluster)?;
        if let Some((object, error)) =
            scene.catalog.damaged().iter().find(|(object, _)| !decision.damaged.contains(object))
        {
            let what = format!("a manifest cannot be read, so nobody knows what it needs: {error}");
            return Err(Error::corrupt(object.as_str(), what));
        }
        let goes: BTreeSet<BackupId> = decision.removed.iter().map(|backup| backup.id).collect();
        let ids = scene.catalog.backups().iter().map(|backup| backup.id);
        let backups: Vec<BackupId> = ids.filter(|id| !goes.contains(id)).collect();
        let mut referenced = BTreeMap::new();
        for id in &backups {
            let packs = repo.packs_of_all_editions(cluster, *id)?;
            referenced.extend(packs.iter().map(|pack| (pack.name, pack.len)));
        }
        let writers = scene.writers();
        let present: HashMap<ObjectName, u64> = repo.packs(cluster)?;
        let is_garbage = |object: &ObjectName| {
            let pack = PackName::parse(object, cluster);
            pack.is_some_and(|pack| !referenced.contains_key(&pack) && !writers.contains(&pack.run))
        };
        let mut garbage: Vec<_> = present.into_iter().filter(|(object, _)| is_garbage(object)).collect();
        garbage.sort_unstable();
        let kept_maps = repo.kept_changes(cluster)?.into_iter();
        let is_of_nobody = |id: &BackupId| !backups.contains(id) && !writers.contains(id);
        let maps = kept_maps.filter(|map| is_of_nobody(&map.backup)).map(|map| (map.object, map.len)).collect();
        let decided = |id: &BackupId| decision.kept.iter().any(|kept| kept.id == *id);
        let is_fixed = |id: &BackupId| scene.user(*id).is_some() || decision.unsound.contains(id) || !decided(id);
        let fixed = backups.iter().copied().filter(is_fixed).collect();
        Ok(Self { backups, fixed, referenced, garbage, maps })
    }
}

/// Deletes, and keeps the books.
struct Collector<'a> {
    repo: &'a Repository,
    cluster: &'a ClusterName,
    lease: &'a Lease,
    progress: &'a dyn Progress,
    report: Report,
}

impl Collector<'_> {
    fn break_stale_leases(&mut self, scene: &Scene) -> Result<()> {
        for (id, record) in &scene.stale {
            self.progress.notice(&format!("cleared the lock of {record}, which was interrupted"));
            remove_lease(self.repo, self.cluster, *id)?;
        }
        Ok(())
    }

    /// Deletes an object; whether it is gone. A refusal is reported and passed over.
    fn delete(&mut self, object: &ObjectName, len: u64) -> bool {
        match self.repo.store().delete(object) {
            Ok(()) => {
                self.report.bytes_freed += len;
                true
            }
            Err(error) => {
                self.report.refused.push(format!("{object}: {error}"));
                false
            }
        }
    }

    /// Deletes the manifests of the backups that go, and older editions of all. A backup whose manifest cannot be deleted stays.
    fn remove_manifests(&mut self, scene: &Scene, decision: &mut Decision) -> Result<()> {
        self.lease.check()?;
        for object in &decision.damaged {
            // All of its editions: an older one would be a backup again, whose packs go now.
            let gone = match self.repo.backup_of(self.cluster, object) {
                Some(id) => self.remove_manifest(id)?,
                None => self.delete(object, 0),
            };
            if gone {
                self.report.removed_unreadable.push(decide::id_in(object).to_owned());
            }
        }
        let removed = std::mem::take(&mut decision.removed);
        for backup in removed {
            if self.remove_manifest(backup.id)? {
                decision.removed.push(backup);
            } else {
                let reasons = vec!["the store refused to delete it".to_owned()];
                decision.kept.push(Kept { id: backup.id, reasons });
            }
        }
        for backup in scene.catalog.backups() {
            if !decision.removed.iter().any(|removed| removed.id == backup.id) {
                self.remove_old_editions(backup.id)?;
            }
        }
        let order: HashMap<BackupId, usize> =
            scene.catalog.backups().iter().enumerate().map(|(at, b)| (b.id, at)).collect();
        decision.kept.sort_by_key(|kept| order.get(&kept.id).copied());
        Ok(())
    }

    /// Deletes the editions of a manifest, the newest last: whatever is left of it is whole.
    fn remove_manifest(&mut self, id: BackupId) -> Result<bool> {
        for (object, len) in self.repo.manifest_editions(self.cluster, id)? {
            if !self.delete(&object, len) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Deletes the editions of a manifest but for the one that counts.
    fn remove_old_editions(&mut self, id: BackupId) -> Result<()> {
        let counts = match self.repo.manifest(self.cluster, id) {
            Ok(manifest) => manifest.object()?,
            // Given up, or gone.
            Err(e) if matches!(e.kind(), ErrorKind::Missing | ErrorKind::Corrupt | ErrorKind::Unsupported) => {
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        for (object, len) in self.repo.manifest_editions(self.cluster, id)? {
            if object != counts {
                self.delete(&object, len);
            }
        }
        Ok(())
    }

    /// Deletes what no manifest refers to and nobody writes.
    fn remove_garbage(&mut self, decision: &Decision) -> Result<()> {
        let survey = Survey::of(self.repo, self.cluster, decision)?;
        self.remove_packs(&survey)?;
        let gone = |id: &BackupId| !decision.kept.iter().any(|kept| kept.id == *id);
        for id in self.repo.pins(self.cluster)?.iter().filter(|id| gone(id)) {
            self.repo.set_pin(self.cluster, *id, false)?;
        }
        for id in self.repo.marks(self.cluster)?.iter().filter(|id| gone(id)) {
            self.repo.set_mark(self.cluster, *id, None)?;
        }
        self.report.bytes_freed += self.repo.sweep(self.cluster)?;
        Ok(())
    }

    fn remove_packs(&mut self, survey: &Survey) -> Result<()> {
        self.lease.check()?;
        for (object, len) in &survey.garbage {
            let gone = self.delete(object, *len);
            self.report.packs_removed += u64::from(gone);
        }
        for (object, len) in &survey.maps {
            self.delete(object, *len);
        }
        Ok(())
    }

    /// Moves what lives out of packs that are mostly dead, then deletes them.
    fn compact(&mut self, decision: &Decision, options: &Options) -> Result<()> {
        let survey = Survey::of(self.repo, self.cluster, decision)?;
        let usage = Usage::read(self.repo, self.cluster, &survey)?;
        self.report.bytes_read += usage.bytes_read;
        let vacated = usage.mostly_dead(options.max_unused);
        if vacated.is_empty() {
            self.report.bytes_kept = usage.bytes();
            self.report.bytes_unused = usage.unused();
            return Ok(());
        }
        let Self { repo, cluster, lease, progress, .. } = *self;
        let vacating =
            Vacating { repo, cluster, survey: &survey, usage: &usage, vacated: &vacated, options, lease, progress };
        let moved = vacating.run()?;
        self.report.bytes_read += moved.bytes_read;
        self.report.bytes_written += moved.bytes_written;
        self.report.packs_repacked = vacated.len() as u64;
        let refused_before = self.report.refused.len();
        for Kept { id, .. } in &decision.kept {
            self.remove_old_editions(*id)?;
        }
        if self.report.refused.len() > refused_before {
            return Ok(());
        }
        let survey = Survey::of(self.repo, self.cluster, decision)?;
        self.remove_packs(&survey)?;
        let usage = Usage::read(self.repo, self.cluster, &survey)?;
        self.report.bytes_kept = usage.bytes();
        self.report.bytes_unused = usage.unused();
        self.report.bytes_freed += self.repo.sweep(self.cluster)?;
        Ok(())
    }
}
