//! The repository and the cluster together: whether they are of each other, and whether there is room.

use std::path::Path;

use super::repository::Stored;
use super::server::{Live, is_beside};
use super::{Area, Options, Sheet};
use crate::backup::{must_be_the_same_cluster, must_lie_elsewhere, other_names};
use crate::pg::ControlFile;
use crate::repo::BackupSummary;
use crate::units::size;

const AREA: Area = Area::Repository;

/// Looks at what only both can tell.
pub(super) fn look(repo: &Path, stored: Option<&Stored>, live: Option<&Live>, options: &Options, sheet: &mut Sheet) {
    if let Some(live) = live {
        let apart = sheet.need(AREA, "place", must_lie_elsewhere(&live.data_dir, repo)).is_some();
        if apart && stored.is_some() && is_beside(repo, live.data_dir.path()) {
            let what = "the repository is on the file system of the data directory: what hits that disk takes both";
            sheet.warn(AREA, "place", what, "put the repository on another disk, or `pgstrata export` backups to one");
        }
    }
    let Some(stored) = stored else { return };
    if let Some(live) = live {
        let same = sheet.need(AREA, "cluster", must_be_the_same_cluster(&stored.catalog, &live.control));
        let identifier = live.control.system_identifier.to_string();
        match stored.newest() {
            Some(_) if same.is_some() => {
                sheet.ok(AREA, "cluster", format!("its backups are of this cluster, {identifier}"));
            }
            Some(_) => {}
            None => other_name(stored, options, &live.control, sheet),
        }
    }
    let bytes = live.and_then(|live| live.bytes).map(|bytes| bytes.cluster);
    if let Some(free) = sheet.need(AREA, "space", crate::os::free_bytes(repo)) {
        sheet.facts.free_bytes = Some(free);
        space(Room { free, cluster: bytes }, stored.catalog.backups(), sheet);
    }
}

/// A cluster that has backups under another name would be stored a second time.
fn other_name(stored: &Stored, options: &Options, control: &ControlFile, sheet: &mut Sheet) {
    let Some(names) = sheet.need(AREA, "cluster", other_names(&stored.repo, &options.cluster, control)) else { return };
    for name in names {
        let identifier = control.system_identifier;
        let what = format!("the repository has backups of this very cluster, {identifier}, as {name}");
        let hint = format!("--cluster {name} goes on with them; with another name all of it is stored once more");
        sheet.warn(AREA, "cluster", what, hint);
    }
}

/// What there is room for, and for what.
#[derive(Clone, Copy)]
struct Room {
    free: u64,
    cluster: Option<u64>,
}

/// A backup can become a full one at any time, so there had better be room for that; it may be as large as the cluster, but where there has been one, the next is taken to
/// be as small.
fn space(Room { free, cluster }: Room, backups: &[BackupSummary], sheet: &mut Sheet) {
    let last = backups.iter().rfind(|backup| backup.merged_from.is_none());
    let next = last.map_or(0, |last| if last.parent.is_some() { last.stored_bytes } else { 0 });
    let room = format!("{} free", size(free));
    let hint = "make room, or remove old backups with `pgstrata expire`";
    if free < next {
        let what = format!("{room}, and the newest backup alone stored {}", size(next));
        return sheet.warn(AREA, "space", what, hint);
    }
    let Some(cluster) = cluster else { return sheet.ok(AREA, "space", room) };
    let (full, how) = match ratio(backups) {
        Some(ratio) => ((cluster as f64 * ratio) as u64, "stored as the last one was"),
        None => (cluster, "before compression"),
    };
    let needs = format!("{room}; a full backup of the cluster of {} needs {}, {how}", size(cluster), size(full));
    if free < full { sheet.warn(AREA, "space", needs, hint) } else { sheet.ok(AREA, "space", needs) }
}

/// What part of the cluster's size the last full backup stored.
fn ratio(backups: &[BackupSummary]) -> Option<f64> {
    let is_known =
        |backup: &&BackupSummary| backup.parent.is_none() && backup.merged_from.is_none() && backup.cluster_bytes > 0;
    let full = backups.iter().rfind(is_known)?;
    Some(full.stored_bytes as f64 / full.cluster_bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::super::tests::backup;
    use super::super::{Finding, Verdict};
    use super::*;

    fn told(free: u64, cluster: Option<u64>, backups: &[BackupSummary]) -> Finding {
        let mut sheet = Sheet::default();
        space(Room { free, cluster }, backups, &mut sheet);
        sheet.found.remove(0)
    }

    #[test]
    fn there_had_better_be_room_for_a_full_backup() {
        assert_eq!(told(999, Some(1000), &[]).status, Verdict::Warning, "nothing tells how well it compresses");
        assert_eq!(told(1000, Some(1000), &[]).status, Verdict::Ok);
        let full = backup(0, None);
        let full = std::slice::from_ref(&full);
        assert_eq!(
            told(199, Some(2000), full).status,
            Verdict::Warning,
            "it stored a tenth of a cluster half as large"
        );
        let ok = told(200, Some(2000), full);
        assert_eq!((ok.status, ok.message.contains("needs 200 B")), (Verdict::Ok, true), "{ok:?}");
        assert_eq!(told(0, None, full).status, Verdict::Ok, "of a cluster that cannot be seen nothing is said");
    }

    #[test]
    fn there_must_be_room_for_another_backup_like_the_last() {
        let full = backup(0, None);
        let large = BackupSummary { stored_bytes: 5000, ..backup(24, Some(&full)) };
        let merged = BackupSummary { merged_from: Some(large.id), parent: None, stored_bytes: 1, ..backup(24, None) };
        let backups = [full, large, merged];
        let little = told(4999, Some(1000), &backups);
        assert!(little.status == Verdict::Warning && little.message.contains("4.88 KiB"), "{little:?}");
        assert_eq!(told(5000, Some(1000), &backups).status, Verdict::Ok);
    }
}
