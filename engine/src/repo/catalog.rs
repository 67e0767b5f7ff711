//! The backups of a cluster, as far as their manifests can be read.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::names::{self, BackupId, ClusterName};
use super::{BackupType, CorruptPage, Manifest, Repository, TablespaceLocation};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::store::ObjectName;

/// What a listing says of a backup.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackupSummary {
    /// The backup.
    pub id: BackupId,
    /// What kind of backup it is.
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    /// The backup that it was compared with.
    pub parent: Option<BackupId>,
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// Where a restored cluster is consistent.
    pub stop_lsn: Lsn,
    /// The timeline of `stop_lsn`.
    pub timeline: TimelineId,
    /// When it began.
    pub start_time: Timestamp,
    /// When it was consistent.
    pub stop_time: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Bytes of the cluster's files.
    pub cluster_bytes: u64,
    /// Bytes that the backup added to the repository, metadata included.
    pub stored_bytes: u64,
    /// Blocks of relation files that differ from the parent's, or all of them.
    pub blocks_changed: u64,
    /// Which detector told what may have changed.
    pub detector: String,
    /// Why that one.
    pub detector_reason: String,
    /// PostgreSQL's version.
    pub postgres_version: String,
    /// Damaged pages.
    pub corrupt_pages: Vec<CorruptPage>,
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The cluster's identity, decimal.
    pub system_identifier: String,
    /// Whether the server was a standby.
    pub from_standby: bool,
    /// Whether the cluster was stopped.
    pub offline: bool,
    /// Number of files.
    pub file_count: u64,
    /// Bytes of WAL that the backup holds, among `stored_bytes` when compressed.
    pub wal_bytes: u64,
    /// The tablespaces but `pg_default` and `pg_global`.
    pub tablespaces: Vec<TablespaceLocation>,
    /// The user's own words.
    pub note: Option<String>,
    /// The backup that a synthetic one was made from.
    pub merged_from: Option<BackupId>,
    /// Whether it stays whatever the policy of `expire` says.
    pub pinned: bool,
    /// Whether its bytes were found damaged when they were last read.
    pub damaged: bool,
}

impl BackupSummary {
    /// The summary of a manifest that has `manifest_len` bytes in the store.
    pub fn new(manifest: &Manifest, manifest_len: u64) -> Self {
        Self {
            id: manifest.id,
            backup_type: manifest.backup_type,
            parent: manifest.parent,
            start_lsn: manifest.start_lsn,
            stop_lsn: manifest.stop_lsn,
            timeline: manifest.timeline,
            start_time: manifest.start_time,
            stop_time: manifest.stop_time,
            duration_ms: manifest.duration_ms,
            cluster_bytes: manifest.cluster_bytes,
            stored_bytes: manifest.own_bytes.saturating_add(manifest_len),
            blocks_changed: manifest.blocks_changed,
            detector: manifest.detector.clone(),
            detector_reason: manifest.detector_reason.clone(),
            postgres_version: manifest.postgres_version.clone(),
            corrupt_pages: manifest.corrupt_pages.clone(),
            cluster: manifest.cluster.clone(),
            system_identifier: manifest.system_identifier.clone(),
            from_standby: manifest.from_standby,
            offline: manifest.offline,
            file_count: manifest.file_count,
            wal_bytes: manifest.wal_bytes,
            tablespaces: manifest.tablespaces.clone(),
            note: manifest.note.clone(),
            merged_from: manifest.merged_from,
            pinned: false,
            damaged: false,
        }
    }
}

/// Where a backup stands in the order of all: by the number it was given, then, as what comes from another repository may have the number of
/// another, by its time; and behind what it was merged from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Moment {
    sequence: u64,
    start_time: Timestamp,
    stop_lsn: Lsn,
    synthesis: u32,
}

impl Moment {
    fn of(manifest: &Manifest) -> Self {
        let Manifest { sequence, start_time, stop_lsn, synthesis, .. } = *manifest;
        Self { sequence, start_time, stop_lsn, synthesis }
    }
}

/// The backups of one cluster.
#[derive(Debug)]
pub struct Catalog {
    cluster: ClusterName,
    backups: Vec<BackupSummary>,
    /// The moment of each.
    moments: Vec<Moment>,
    damaged: Vec<(ObjectName, Error)>,
}

impl Catalog {
    pub(super) fn read(repo: &Repository, cluster: &ClusterName) -> Result<Self> {
        let Editions { of, strangers: mut damaged } = Editions::list(repo, cluster, &names::manifests(cluster))?;
        let mut good = Vec::new();
        for (id, editions) in of {
            match Manifest::read_best(repo, cluster, id, &editions) {
                Ok((manifest, len)) => good.push((Moment::of(&manifest), BackupSummary::new(&manifest, len))),
                // Out of reach is not damaged: nobody shall throw it away for that.
                Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e),
                Err(e) if e.kind() != ErrorKind::Missing => {
                    let newest = editions.last().copied().unwrap_or_default();
                    damaged.push((names::manifest(cluster, id, newest)?, e));
                }
                // Written anew since it was listed, or deleted: then it is not a backup any more.
                Err(_) => match Manifest::read_newest(repo, cluster, id) {
                    Ok((manifest, len)) => good.push((Moment::of(&manifest), BackupSummary::new(&manifest, len))),
                    Err(e) if e.kind() == ErrorKind::Missing => {}
                    Err(e) => return Err(e),
                },
            }
        }
        let (pins, marks) = (repo.pins(cluster)?, repo.marks(cluster)?);
        for (_, backup) in &mut good {
            (backup.pinned, backup.damaged) = (pins.contains(&backup.id), marks.contains(&backup.id));
        }
        good.sort_by_key(|(moment, backup)| (*moment, backup.id));
        let (moments, backups) = good.into_iter().unzip();
        Ok(Self { cluster: cluster.clone(), backups, moments, damaged })
    }

    /// The backups whose manifests can be read, oldest first.
    pub fn backups(&self) -> &[BackupSummary] {
        &self.backups
    }

    /// The manifests that cannot be read, and why.
    pub fn damaged(&self) -> &[(ObjectName, Error)] {
        &self.damaged
    }

    /// The backups by moments, oldest first: each is of one backup and those that were merged from it.
    pub(crate) fn moments(&self) -> impl Iterator<Item = &[BackupSummary]> {
        let same = |a: &Moment, b: &Moment| Moment { synthesis: 0, ..*a } == Moment { synthesis: 0, ..*b };
        let mut rest = self.backups.as_slice();
        self.moments.chunk_by(same).map(move |moment| {
            let (these, after) = rest.split_at(moment.len());
            rest = after;
            these
        })
    }

    /// The sequence number of the next backup.
    pub fn next_sequence(&self) -> u64 {
        self.moments.iter().map(|moment| moment.sequence).max().unwrap_or(0).saturating_add(1)
    }

    /// The sequence number for a backup that began at `start_time` and comes from elsewhere, where it has the number `sequence`: it comes
    /// behind those that began before it, and before those that began later.
    pub(crate) fn sequence_between(&self, start_time: Timestamp, sequence: u64) -> u64 {
        let before = self.moments.iter().filter(|moment| moment.start_time <= start_time);
        let below = before.map(|moment| moment.sequence).max().unwrap_or(0);
        let above =
            self.moments.iter().filter(|moment| moment.start_time > start_time).map(|moment| moment.sequence).min();
        match above {
            None => sequence.max(self.next_sequence()),
            Some(above) if below < sequence && sequence < above => sequence,
            Some(_) => below,
        }
    }

    /// The number of the next backup that is made from one with this sequence number.
    pub fn next_synthesis(&self, sequence: u64) -> u32 {
        let of_moment = self.moments.iter().filter(|moment| moment.sequence == sequence);
        of_moment.map(|moment| moment.synthesis).max().unwrap_or(0).saturating_add(1)
    }

    /// The backup that `spec` names: an id, a unique prefix of one, `latest`, `oldest` or `latest-full`.
    ///
    /// # Errors
    /// `Missing` if there is none, `Invalid` if there are several, `Corrupt` if a damaged manifest may be the one.
    pub fn select(&self, spec: &str) -> Result<BackupSummary> {
        let found = match spec {
            "latest" | "oldest" | "latest-full" => {
                self.all_must_be_readable(spec)?;
                let mut backups = self.backups.iter();
                match spec {
                    "oldest" => backups.next(),
                    "latest" => backups.next_back(),
                    _ => backups.rfind(|backup| backup.backup_type.is_full()),
                }
            }
            _ => self.by_prefix(spec)?,
        };
        found.cloned().ok_or_else(|| self.missing(spec))
    }

    fn by_prefix(&self, prefix: &str) -> Result<Option<&BackupSummary>> {
        let matches = |text: String| !prefix.is_empty() && text.starts_with(prefix);
        let manifests = names::manifests(&self.cluster);
        let damaged = self.damaged.iter().find(|(object, _)| matches(object.as_str()[manifests.len()..].to_owned()));
        let mut found = self.backups.iter().filter(|backup| matches(backup.id.to_string()));
        let first = found.next();
        if let Some(second) = found.next() {
            let what = format!("{prefix:?} is the beginning of several ids, {} among them", second.id);
            return Err(Error::invalid(what).hint("give more of the id"));
        }
        match (first, damaged) {
            (None, Some((object, error))) => {
                let what = format!("this backup's manifest cannot be read: {}", error.without_place());
                Err(Error::corrupt(object.as_str(), what))
            }
            (first, _) => Ok(first),
        }
    }

    fn all_must_be_readable(&self, spec: &str) -> Result<()> {
        let Some((object, error)) = self.damaged.first() else { return Ok(()) };
        let what =
            format!("cannot tell which backup is the {spec}: a manifest cannot be read: {}", error.without_place());
        let hint = "name a backup by its id (`pgstrata list`), or move the damaged manifest out of the repository";
        Err(Error::corrupt(object.as_str(), what).hint(hint))
    }

    fn missing(&self, spec: &str) -> Error {
        let what = if self.backups.is_empty() {
            format!("there are no backups of the cluster {:?}", self.cluster.to_string())
        } else {
            format!("there is no backup {spec:?} of the cluster {:?}", self.cluster.to_string())
        };
        Error::new(ErrorKind::Missing, what).hint("`pgstrata list` shows the backups; --cluster says which cluster")
    }
}

/// What is stored among the manifests.
pub(super) struct Editions {
    /// The editions of each, ascending.
    pub of: BTreeMap<BackupId, Vec<u32>>,
    /// What has no business there.
    pub strangers: Vec<(ObjectName, Error)>,
}

impl Editions {
    /// Lists the manifests whose names begin with `prefix`.
    pub fn list(repo: &Repository, cluster: &ClusterName, prefix: &str) -> Result<Self> {
        let directory = names::manifests(cluster);
        let mut of: BTreeMap<BackupId, Vec<u32>> = BTreeMap::new();
        let mut strangers = Vec::new();
        for object in repo.store().list(prefix)? {
            match names::parse_manifest(&object.name.as_str()[directory.len()..]) {
                Ok((id, edition)) => of.entry(id).or_default().push(edition),
                Err(e) => strangers.push((object.name, e)),
            }
        }
        of.values_mut().for_each(|editions| editions.sort_unstable());
        Ok(Self { of, strangers })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::manifest::tests::sample;
    use super::*;
    use crate::store::{MemoryStore, Store};

    const A: &str = "20261122T160312Z-0000000a";
    const B: &str = "20261122T160312Z-0000000b";
    const C: &str = "20261123T160312Z-0000000c";

    fn repository() -> (MemoryStore, Repository) {
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), "memory".to_owned()).unwrap();
        // The clock went back between B and A.
        for (sequence, id) in [(1, B), (2, A), (3, C)] {
            let mut manifest = sample(repo.id(), id.parse().unwrap(), sequence);
            manifest.backup_type = if id == C { BackupType::Incremental } else { BackupType::Full };
            store.tamper(&manifest.object().unwrap(), Some(manifest.encode(&manifest.object().unwrap()).unwrap()));
        }
        (store, repo)
    }

    fn selected(repo: &Repository, spec: &str) -> std::result::Result<String, ErrorKind> {
        let catalog = repo.catalog(&ClusterName::default()).unwrap();
        catalog.select(spec).map(|backup| backup.id.to_string()).map_err(|e| e.kind())
    }

    #[test]
    fn backups_are_in_the_order_in_which_they_were_committed() {
        let (_, repo) = repository();
        let catalog = repo.catalog(&ClusterName::default()).unwrap();
        let ids: Vec<_> = catalog.backups().iter().map(|backup| backup.id.to_string()).collect();
        assert_eq!(ids, [B, A, C]);
        assert_eq!(catalog.next_sequence(), 4);
    }

    #[test]
    fn a_backup_is_named_by_its_place_its_id_or_a_unique_prefix() {
        let (_, repo) = repository();
        assert_eq!(selected(&repo, "latest"), Ok(C.to_owned()));
        assert_eq!(selected(&repo, "oldest"), Ok(B.to_owned()));
        assert_eq!(selected(&repo, "latest-full"), Ok(A.to_owned()));
        assert_eq!(selected(&repo, A), Ok(A.to_owned()));
        assert_eq!(selected(&repo, "20261123"), Ok(C.to_owned()));
        assert_eq!(selected(&repo, "20261122"), Err(ErrorKind::Invalid));
        assert_eq!(selected(&repo, ""), Err(ErrorKind::Missing));
        assert_eq!(selected(&repo, "2027"), Err(ErrorKind::Missing));
    }

    #[test]
    fn latest_is_never_a_guess() {
        let (store, repo) = repository();
        let object = names::manifest(&ClusterName::default(), C.parse().unwrap(), 0).unwrap();
        let mut bytes = store.get(&object, 1 << 20).unwrap();
        bytes[30] ^= 1;
        store.tamper(&object, Some(bytes));
        assert_eq!(selected(&repo, "latest"), Err(ErrorKind::Corrupt));
        assert_eq!(selected(&repo, C), Err(ErrorKind::Corrupt));
        assert_eq!(selected(&repo, A), Ok(A.to_owned()));
        let catalog = repo.catalog(&ClusterName::default()).unwrap();
        assert_eq!(catalog.damaged().len(), 1);
        for spec in ["latest", C] {
            let text = catalog.select(spec).unwrap_err().to_string();
            assert_eq!(text.matches(object.as_str()).count(), 1, "{text}");
        }
    }

    #[test]
    fn a_manifest_of_another_repository_is_not_ours() {
        let (store, repo) = repository();
        let other = Repository::init_in(Arc::new(MemoryStore::new()), "other".to_owned()).unwrap();
        let id = "20261124T160312Z-0000000d".parse().unwrap();
        let object = names::manifest(&ClusterName::default(), id, 0).unwrap();
        store.tamper(&object, Some(sample(other.id(), id, 9).encode(&object).unwrap()));
        assert_eq!(repo.catalog(&ClusterName::default()).unwrap().damaged().len(), 1);
    }
}
