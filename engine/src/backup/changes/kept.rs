//! What earlier backups found out, kept.
//!
//! What a detector says of the changes from the start of one backup to the start of the next is kept in the repository, under the names of both, when
//! the newer one is committed. So a backup that is compared with an older one than the last, as a differential is, needs no log that `pg_wal` has long lost:
//! it unites the maps from its parent to the newest backup that they lead to, and asks a detector from there on only. A map is made only where it
//! was proved that both backups are of one past, so a chain of them leads along one past, too; and it is bound to the two backups, not to LSNs, which another past has as
//! well. A synthetic full backup is the same moment as the one that it was made from.
//!
//! What goes wrong: a map that is damaged or gone, which is a scan; maps that do not reach from the parent's start to the newer backup's without a hole, which
//! never happens, and is asked all the same before they are trusted.

use super::{DetectorChoice, Found, Line, Question, Why, told};
use crate::detect::{ChangeMap, CoverageCheck, Detection};
use crate::error::Result;
use crate::repo::{BackupId, BackupSummary, KeptChanges, Manifest, Repository};

/// Bytes of a map at most, as it is stored.
const MAX_MAP_LEN: u64 = 256 << 20;

/// Keeps what changed since the parent; says how many bytes that takes. A map that no reader would take is not kept.
///
/// # Errors
/// What the store says.
pub(in crate::backup) fn keep(repo: &Repository, parent: &Manifest, backup: BackupId, map: &ChangeMap) -> Result<u64> {
    repo.keep_changes(&parent.cluster, backup, parent.id, MAX_MAP_LEN, |name| map.encode(name))
}

impl Question<'_> {
    /// By the maps that lead from the parent to a newer backup, and by `choice` from there on.
    pub(super) fn by_kept(&self, line: &Line, choice: DetectorChoice) -> std::result::Result<Found, Why> {
        let cluster = &self.parent.cluster;
        let kept = self.repo.kept_changes(cluster).map_err(told)?;
        let catalog = self.repo.catalog(cluster).map_err(told)?;
        // Where there is none, the reason why there is no detector is another one.
        let (newest, maps) = chain(catalog.backups(), &kept, self.parent.id).ok_or_else(Why::new)?;
        let newest = self.repo.manifest(cluster, newest).map_err(told)?;
        let question = Question { parent: &newest, ..*self };
        let found = question.lineage().and_then(|line| question.without_kept(&line, choice))?;
        let Some(mut map) = found.map else { return Ok(found) };
        for kept in maps {
            let bytes = self.repo.store().get(&kept.object, MAX_MAP_LEN).map_err(told)?;
            let older = ChangeMap::decode(&bytes, kept.object.as_str()).map_err(told)?;
            map.union(older).map_err(told)?;
        }
        if let CoverageCheck::MissingFrom(lsn) = map.coverage().check(&line.ranges) {
            return Err(format!("the kept maps leave out {lsn}"));
        }
        let Detection { detector, reason } = found.detection;
        let reason = format!("kept maps lead to {}, from where on {reason}", newest.id);
        Ok(Found { detection: Detection { detector, reason }, map: Some(map) })
    }
}

/// The newest backup to which maps lead from `parent`, and these maps, newest first.
fn chain<'k>(
    backups: &[BackupSummary],
    kept: &'k [KeptChanges],
    parent: BackupId,
) -> Option<(BackupId, Vec<&'k KeptChanges>)> {
    let moment = |id: BackupId| {
        let made_from = |id: &BackupId| backups.iter().find(|backup| backup.id == *id)?.merged_from;
        // Each was made of an older one, so this ends; but a store may hold manifests that nobody wrote.
        std::iter::successors(Some(id), made_from).take(backups.len() + 1).last().unwrap_or(id)
    };
    let start = moment(parent);
    let newer = backups.iter().rev().take_while(|backup| backup.id != parent);
    newer.filter(|backup| moment(backup.id) != start).find_map(|backup| {
        let mut maps = Vec::new();
        let mut at = moment(backup.id);
        while at != start {
            let map = kept.iter().find(|map| map.backup == at).filter(|_| maps.len() < kept.len())?;
            maps.push(map);
            at = moment(map.parent);
        }
        Some((backup.id, maps))
    })
}

#[cfg(test)]
mod tests;
