//! The repository by itself: whether it can be used, and how its backups are.
//!
//! Backups are looked at as a listing shows them: a manifest that does not read, a pack that is not there or too short, what an earlier verification found.

use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Area, Options, Sheet, Verdict};
use crate::backup::usual_gap;
use crate::error::{ErrorKind, Result};
use crate::repo::{BackupSummary, Catalog, ClusterName, FORMAT_VERSION, Lease, Repository, leases, unsound_among};
use crate::units::{count, duration};

const AREA: Area = Area::Repository;
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// How old the newest backup may be where nothing tells how often they are taken.
const WEEK: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Damaged manifests that are told one by one.
const MAX_TOLD: usize = 8;

/// An opened repository and what it lists of the cluster.
pub(super) struct Stored {
    pub repo: Repository,
    pub catalog: Catalog,
}

impl Stored {
    /// The newest backup.
    pub fn newest(&self) -> Option<&BackupSummary> {
        self.catalog.backups().last()
    }
}

/// Looks at the repository in a directory.
pub(super) fn look(path: &Path, options: &Options, sheet: &mut Sheet) -> Option<Stored> {
    let repo = open(path, sheet)?;
    match Lease::probe(&repo, &options.cluster) {
        Ok(()) => sheet.ok(AREA, "writable", "it can be written to"),
        // It can still be read, and restored from.
        Err(error) => sheet.error(AREA, "writable", Verdict::Failed, &error),
    }
    locks(&repo, &options.cluster, sheet);
    let catalog = match repo.catalog(&options.cluster) {
        Ok(catalog) => catalog,
        Err(error) => {
            sheet.error(AREA, "backups", Verdict::Unreadable, &error);
            return None;
        }
    };
    let stored = Stored { repo, catalog };
    backups(&stored, &options.cluster, sheet);
    damage(&stored, sheet);
    Some(stored)
}

fn open(path: &Path, sheet: &mut Sheet) -> Option<Repository> {
    match Repository::open(path) {
        Ok(repo) => {
            sheet.facts.repository_format = Some(FORMAT_VERSION);
            sheet.ok(AREA, "repository", format!("{} is a repository of format {FORMAT_VERSION}", path.display()));
            Some(repo)
        }
        Err(error) => {
            // One that is not there yet is no damage.
            let is_none = error.kind() == ErrorKind::Missing;
            let status = if is_none { Verdict::Failed } else { Verdict::Unreadable };
            sheet.error(AREA, "repository", status, &error);
            None
        }
    }
}

/// Who is at work; a lock that does not read keeps every backup out.
fn locks(repo: &Repository, cluster: &ClusterName, sheet: &mut Sheet) {
    let Some(found) = sheet.need(AREA, "locks", leases(repo, cluster)) else { return };
    let at_work: Vec<String> =
        found.iter().filter(|(id, record)| !record.is_stale(**id)).map(|(_, record)| record.to_string()).collect();
    if !at_work.is_empty() {
        sheet.ok(AREA, "locks", format!("at work now: {}", at_work.join(", ")));
    }
}

fn backups(stored: &Stored, cluster: &ClusterName, sheet: &mut Sheet) {
    let backups = stored.catalog.backups();
    sheet.facts.backup_count = Some(backups.len() as u64);
    let Some(newest) = stored.newest() else {
        if stored.catalog.damaged().is_empty() {
            none_yet(&stored.repo, cluster, sheet);
        }
        return;
    };
    let now = Timestamp::now();
    let age = now.duration_since(newest.stop_time).max(SignedDuration::ZERO);
    sheet.facts.newest_backup = Some(newest.id);
    sheet.facts.newest_type = Some(newest.backup_type);
    sheet.facts.newest_age_seconds = Some(age.unsigned_abs().as_secs());
    let old = duration(Duration::from_secs(age.unsigned_abs().as_secs()));
    let kept = count(backups.len() as u64, "backup");
    let text = format!("{kept} of {cluster}; the newest, {} ({}), is {old} old", newest.id, newest.backup_type);
    match patience(backups) {
        patience if age > patience => {
            let limit = duration(patience.unsigned_abs());
            let hint = "look whether the job that takes them still runs, and what it said last";
            sheet.warn(AREA, "backups", format!("{text}, and was to be expected to be no older than {limit}"), hint);
        }
        _ => sheet.ok(AREA, "backups", text),
    }
    if !newest.corrupt_pages.is_empty() {
        let pages = count(newest.corrupt_pages.len() as u64, "corrupt page");
        let hint = "`pgstrata info latest` names them; while they are there, each incremental backup reads everything";
        sheet.warn(AREA, "corrupt_pages", format!("the newest backup lists {pages} of the cluster"), hint);
    }
}

/// How old the newest backup may be: three times as old as they usually were, and at least a day.
fn patience(backups: &[BackupSummary]) -> SignedDuration {
    usual_gap(backups).map_or(WEEK, |gap| (gap * 3).max(DAY))
}

/// A name that is mistyped must not look like a cluster without backups.
fn none_yet(repo: &Repository, cluster: &ClusterName, sheet: &mut Sheet) {
    let Some(clusters) = sheet.need(AREA, "backups", repo.clusters()) else { return };
    let others: Vec<String> = clusters.iter().filter(|name| *name != cluster).map(ToString::to_string).collect();
    if others.is_empty() {
        return sheet.ok(AREA, "backups", "there are no backups yet: the first one is a full one");
    }
    let what = format!("there are no backups of {cluster} yet, but of {}", others.join(", "));
    sheet.warn(AREA, "backups", what, "say which with --cluster, unless this is a cluster that is new here");
}

/// What is known to be damaged without reading it.
fn damage(stored: &Stored, sheet: &mut Sheet) {
    let damaged = stored.catalog.damaged();
    for (object, error) in damaged.iter().take(MAX_TOLD) {
        let place = if error.place().is_none() { format!(" ({object})") } else { String::new() };
        let hint = error.hint_text().unwrap_or(
            "put the file back from a copy of the repository; `pgstrata expire ID --force` gives the backup up",
        );
        let what = format!("a backup cannot be read: {error}{place}");
        sheet.add(AREA, "manifests", Verdict::Damage, what, Some(hint.to_owned()));
    }
    if damaged.len() > MAX_TOLD {
        let what = format!("{} backups cannot be read", damaged.len());
        sheet.add(AREA, "manifests", Verdict::Damage, what, Some("`pgstrata list` names them all".to_owned()));
    }
    match unsound(stored) {
        Ok(faults) => hurt(&faults, sheet),
        Err(error) => drop(sheet.need(AREA, "packs", Err::<(), _>(error))),
    }
}

fn hurt(faults: &[String], sheet: &mut Sheet) {
    let Some(first) = faults.first() else { return };
    let more = faults.len() - 1;
    let more = if more > 0 { format!(", and {}", count(more as u64, "other damaged backup")) } else { String::new() };
    let hint =
        "`pgstrata verify` tells which files are hurt; what is missing may be put back from a copy of the repository";
    sheet.add(AREA, "packs", Verdict::Damage, format!("{first}{more}"), Some(hint.to_owned()));
}

/// What is wrong with the data of each backup that is damaged, the newest first.
fn unsound(stored: &Stored) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let Some(newest) = stored.newest() else { return Ok(faults) };
    let present = stored.repo.packs(&newest.cluster)?;
    for backup in stored.catalog.backups().iter().rev() {
        let known = match stored.repo.manifest(&backup.cluster, backup.id) {
            Ok(manifest) if unsound_among(&present, &manifest)?.is_some() => known_fault(&stored.repo, backup)?,
            Ok(_) => backup.damaged.then(|| "`pgstrata verify` found it damaged".to_owned()),
            // Expired since it was listed.
            Err(error) if error.kind() == ErrorKind::Missing => None,
            Err(error) => return Err(error),
        };
        faults.extend(known.map(|fault| format!("the backup {} is damaged: {fault}", backup.id)));
    }
    Ok(faults)
}

/// What is wrong with a backup now: an expiry may have written its manifest anew, and moved its packs, since they were listed.
fn known_fault(repo: &Repository, backup: &BackupSummary) -> Result<Option<String>> {
    let manifest = repo.manifest(&backup.cluster, backup.id)?;
    Ok(repo.known_fault(&manifest)?.map(|fault| fault.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::backup;
    use super::*;

    fn at(hours: &[i64]) -> Vec<BackupSummary> {
        hours.iter().map(|hour| backup(*hour, None)).collect()
    }

    #[test]
    fn a_backup_is_expected_as_often_as_there_were_some() {
        let hours = SignedDuration::from_hours;
        assert_eq!(patience(&[]), WEEK);
        assert_eq!(patience(&at(&[0, 24])), WEEK, "one gap is no habit");
        assert_eq!(patience(&at(&[0, 24, 48, 72])), hours(72));
        assert_eq!(patience(&at(&[0, 1, 2, 3])), DAY, "a day may always pass");
        assert_eq!(patience(&at(&[0, 168, 336, 340, 504])), hours(3 * 168), "one more by hand changes nothing");
    }
}
