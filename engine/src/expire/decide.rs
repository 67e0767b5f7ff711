//! Which backups go and which stay, and why.
//!
//! What a policy keeps is in [`super::policy`]. It decides about moments: a backup and those that were merged from it are one, and of one that is kept the newest
//! sound backup stays. Beyond that stay: what is pinned; what somebody uses right now; what is damaged, because the policy cannot
//! count it and whoever wants to mend it should find it; and the newest good one, whatever is asked for: one that has all its packs, that no verification found damaged, and that
//! lists no corrupt pages, or if all do, one with such pages. Backups that are named go, unless they are pinned, damaged beyond
//! reading, or the last good one: for those `--force` is needed. Nothing removes what is in use.

use std::collections::BTreeSet;

use super::policy::{Moment, Policy};
use super::{Kept, Options, Scene, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::repo::{BackupId, BackupSummary, Repository, unsound_among};
use crate::store::ObjectName;

/// What stays and what goes.
#[derive(Debug, Default)]
pub(super) struct Decision {
    /// Backups that go, oldest first.
    pub removed: Vec<BackupSummary>,
    /// Backups that stay, oldest first.
    pub kept: Vec<Kept>,
    /// Manifests that cannot be read and go.
    pub damaged: Vec<ObjectName>,
    /// Bytes of the manifests that go.
    pub manifest_bytes: u64,
    /// Backups that stay and have not all of their packs.
    pub unsound: BTreeSet<BackupId>,
}

/// A backup and what is known of it.
struct Candidate<'s> {
    backup: &'s BackupSummary,
    /// What is wrong with it, as far as a listing tells.
    fault: Option<String>,
    /// Why it stays; it goes if there is no reason.
    reasons: Vec<String>,
}

impl Candidate<'_> {
    /// Whether a restore of it has all that the source had, and nothing corrupt.
    fn is_good(&self) -> bool {
        self.fault.is_none() && self.backup.corrupt_pages.is_empty()
    }
}

/// Decides about every backup of the scene.
pub(super) fn decide(repo: &Repository, scene: &Scene, options: &Options) -> Result<Decision> {
    let mut candidates = Vec::new();
    let present = repo.packs(&scene.cluster)?;
    for backup in scene.catalog.backups() {
        let manifest = repo.manifest(&scene.cluster, backup.id)?;
        let fault = unsound_among(&present, &manifest)?.map(|(object, fault)| format!("{object}: {fault}"));
        let fault = fault.or_else(|| backup.damaged.then(|| "`pgstrata verify` found it damaged".to_owned()));
        candidates.push(Candidate { backup, fault, reasons: Vec::new() });
    }
    let mut damaged = Vec::new();
    match &options.selection {
        Selection::Policy(policy) => by_policy(policy, scene, &mut candidates),
        Selection::Nothing => candidates.iter_mut().for_each(|c| c.reasons.push("--keep-all".to_owned())),
        Selection::Named(specs) => damaged = by_name(specs, scene, options.force, &mut candidates)?,
    }
    nothing_else_is_damaged(scene, &damaged)?;
    let mut decision = Decision { damaged, ..Decision::default() };
    for Candidate { backup, reasons, fault } in candidates {
        if fault.is_some() {
            decision.unsound.insert(backup.id);
        }
        if reasons.is_empty() {
            let editions = repo.manifest_editions(&scene.cluster, backup.id)?;
            decision.manifest_bytes += editions.iter().map(|(_, len)| len).sum::<u64>();
            decision.removed.push(backup.clone());
        } else {
            decision.kept.push(Kept { id: backup.id, reasons });
        }
    }
    Ok(decision)
}

fn by_policy(policy: &Policy, scene: &Scene, candidates: &mut [Candidate<'_>]) {
    let mut moments = Vec::new();
    let mut representatives = Vec::new();
    let mut begin = 0;
    for backups in scene.catalog.moments() {
        let group = &candidates[begin..begin + backups.len()];
        let sound = group.iter().rposition(|candidate| candidate.fault.is_none());
        let chosen = sound.unwrap_or(backups.len() - 1);
        moments.push(Moment { time: backups[chosen].start_time, counts: sound.is_some() });
        representatives.push(begin + chosen);
        begin += backups.len();
    }
    for (index, reasons) in representatives.into_iter().zip(policy.decide(&moments)) {
        candidates[index].reasons = reasons;
    }
    let last_good = last_good(candidates);
    for (index, candidate) in candidates.iter_mut().enumerate() {
        if candidate.backup.pinned {
            candidate.reasons.push("pinned".to_owned());
        }
        if let Some(fault) = &candidate.fault {
            candidate.reasons.push(format!("damaged, goes only by name: {fault}"));
        }
        if let Some(user) = scene.user(candidate.backup.id) {
            candidate.reasons.push(format!("in use by {user}"));
        }
        if candidate.reasons.is_empty() && last_good == Some(index) {
            candidate.reasons.push("the last good one".to_owned());
        }
    }
}

/// The newest backup without fault and without corrupt pages; if there is none, the newest without fault.
fn last_good(candidates: &[Candidate<'_>]) -> Option<usize> {
    let sound = || candidates.iter().rposition(|candidate| candidate.fault.is_none());
    candidates.iter().rposition(Candidate::is_good).or_else(sound)
}

/// Leaves the named ones without a reason to stay; the damaged manifests among them.
fn by_name(specs: &[String], scene: &Scene, force: bool, candidates: &mut [Candidate<'_>]) -> Result<Vec<ObjectName>> {
    let mut damaged = Vec::new();
    let mut named = Vec::new();
    for spec in specs {
        let unreadable =
            scene.catalog.damaged().iter().find(|(object, _)| last_component(object).starts_with(spec.as_str()));
        match unreadable {
            Some((object, _)) if force && !spec.is_empty() => damaged.push(object.clone()),
            Some((object, _)) if !spec.is_empty() => {
                let selected = scene.catalog.select(spec).map_err(|e| e.or_hint(ErrorKind::Corrupt, &give_up(object)));
                named.push(selected?.id);
            }
            _ => named.push(scene.catalog.select(spec)?.id),
        }
    }
    for candidate in candidates.iter_mut().filter(|c| !named.contains(&c.backup.id)) {
        candidate.reasons.push("not named".to_owned());
    }
    let stays = |is_good: fn(&Candidate<'_>) -> bool| candidates.iter().any(|c| is_good(c) && !c.reasons.is_empty());
    let (good_stays, sound_stays) = (stays(|c| c.is_good()), stays(|c| c.fault.is_none()));
    let refuse = |id: BackupId, why: &str, hint: &str| Err(Error::invalid(format!("{id} {why}")).hint(hint));
    for candidate in candidates.iter().filter(|c| c.reasons.is_empty()) {
        let id = candidate.backup.id;
        if let Some(user) = scene.user(id) {
            let error = Error::new(ErrorKind::Locked, format!("{id} is in use by {user}"));
            return Err(error.hint("run this again when that is done"));
        }
        if candidate.backup.pinned && !force {
            return refuse(id, "is pinned", "unpin it, or give --force");
        }
        let is_last = candidate.fault.is_none() && !sound_stays || candidate.is_good() && !good_stays;
        if is_last && !force {
            return refuse(id, "is the last good backup, or one of them", "take another one first, or give --force");
        }
    }
    Ok(damaged)
}

fn last_component(object: &ObjectName) -> &str {
    object.as_str().rsplit('/').next().unwrap_or_default()
}

/// A manifest that cannot be read may need any pack.
fn nothing_else_is_damaged(scene: &Scene, removed: &[ObjectName]) -> Result<()> {
    let Some((object, error)) = scene.catalog.damaged().iter().find(|(object, _)| !removed.contains(object)) else {
        return Ok(());
    };
    let what = "a manifest cannot be read, so nobody knows what it needs, and nothing is removed";
    let what = format!("{what}: {}", error.without_place());
    Err(Error::corrupt(object.as_str(), what).hint(give_up(object)))
}

/// What to do about a manifest that cannot be read.
fn give_up(object: &ObjectName) -> String {
    format!("put that file back from a copy, or give that backup up: pgstrata expire {} --force", id_in(object))
}

/// The backup that a manifest's name says it is of.
pub(super) fn id_in(object: &ObjectName) -> &str {
    last_component(object).split('.').next().unwrap_or_default()
}
