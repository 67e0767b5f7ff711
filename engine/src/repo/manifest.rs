//! Manifests: one for each backup, its root and its commit point (`format.md`, Manifests).

use std::collections::HashMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::catalog::Editions;
use super::names::{self, BackupId, ClusterName, PackKind, PackName};
use super::pack::{MAX_PACK_LEN, PackInfo, Place};
use super::table::PagePlace;
use super::{FORMAT_VERSION, Repository, compress};
use crate::chunk::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{Lsn, TimelineId, WalSegmentSize};
use crate::store::ObjectName;

const FIRST_LINE: &[u8] = b"pgstrata manifest 1\n";
const CHECK_LEN: usize = 32;
/// Bytes of a manifest at most, stored or decompressed: one of 100 TB has 15 MB.
const MAX_LEN: u64 = 32 << 20;
/// Damaged pages that a manifest lists at most; the first ones tell which disk it is.
pub(crate) const MAX_CORRUPT_PAGES: usize = 10_000;
/// Bytes at most of what a manifest says in a word.
const MAX_WORD_LEN: usize = 1 << 10;
/// Bytes at most of what it says in sentences.
const MAX_TEXT_LEN: usize = 256 << 10;

/// What kind of backup it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupType {
    /// Everything was stored.
    Full,
    /// Only what differs from the parent was stored.
    Incremental,
    /// Made from other backups by `merge`.
    SyntheticFull,
}

impl BackupType {
    /// Whether it stands on its own: what a differential backup compares with.
    pub fn is_full(self) -> bool {
        self != BackupType::Incremental
    }
}

impl fmt::Display for BackupType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            BackupType::Full => "full",
            BackupType::Incremental => "incremental",
            BackupType::SyntheticFull => "synthetic-full",
        })
    }
}

/// Bytes that are usually text: in JSON a string, or `{"hex": "..."}` where they are not UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ByteString(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum JsonBytes {
    Text(String),
    Hex { hex: String },
}

impl Serialize for ByteString {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let json = match std::str::from_utf8(&self.0) {
            Ok(text) => JsonBytes::Text(text.to_owned()),
            Err(_) => JsonBytes::Hex { hex: hex(&self.0) },
        };
        json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ByteString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match JsonBytes::deserialize(deserializer)? {
            JsonBytes::Text(text) => Ok(Self(text.into_bytes())),
            JsonBytes::Hex { hex } => {
                from_hex(&hex).map(Self).ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
            }
        }
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// A page whose checksum was wrong however often it was read, and that WAL replay does not repair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorruptPage {
    /// Path of the file below the data directory.
    pub file: String,
    /// The relation as tablespace/database/relfilenode.
    pub relation: String,
    /// Its name as database.schema.relation, where the server could tell.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// `main`, `fsm`, `vm` or `init`.
    pub fork: String,
    /// Block number in the fork.
    pub block: u32,
    /// What is wrong with it.
    pub reason: String,
}

/// Where a tablespace was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceLocation {
    /// Its OID: the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// The directory that the link led to; `None` for a tablespace in place.
    pub location: Option<ByteString>,
}

/// A setting that came from a configuration file outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value, quoted as in `postgresql.conf`.
    pub value: ByteString,
}

/// WAL of one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends.
    pub end: Lsn,
}

/// What a cluster has that took the backup, and none that branched off before its start: a running server, and a file that it wrote then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryMark {
    /// When the server was started, to the microsecond.
    pub postmaster_start_time: Timestamp,
    /// The WAL summary that ends where the backup starts.
    pub summary: String,
    /// Its inode.
    pub inode: u64,
    /// Its length.
    pub len: u64,
    /// When it was written.
    pub modified: Timestamp,
    /// When its inode was written.
    pub changed: Timestamp,
}

/// Everything about one backup but its file table and its data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format's version.
    pub format: u32,
    /// The repository's id.
    pub repository: String,
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The backup.
    pub id: BackupId,
    /// One more than the largest in the catalog when the backup was committed: the order of backups. A synthetic full backup has that
    /// of the backup that it was made from, as it is of the same moment; one that came from another repository may have that of another.
    pub sequence: u64,
    /// The order among the backups of one moment: 0 for the one that was taken, and counting for those that were made from it.
    pub synthesis: u32,
    /// How often the manifest was written anew because what it refers to had moved.
    pub edition: u32,
    /// What kind of backup it is.
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    /// The backup that it was compared with. Provenance only.
    pub parent: Option<BackupId>,
    /// The backup that a synthetic one was made from. Provenance only.
    pub merged_from: Option<BackupId>,
    /// The cluster's identity, decimal.
    pub system_identifier: String,
    /// PostgreSQL's version, as it says it.
    pub postgres_version: String,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// `catalog_version_no`.
    pub catalog_version: u32,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes of a WAL segment.
    pub wal_segment_size: u32,
    /// `data_checksum_version`: 0 is off.
    pub data_checksum_version: u32,
    /// Where replay has to begin.
    pub start_lsn: Lsn,
    /// Where the restored cluster is consistent.
    pub stop_lsn: Lsn,
    /// The timeline of `start_lsn`.
    pub start_timeline: TimelineId,
    /// The timeline of `stop_lsn`.
    pub timeline: TimelineId,
    /// The WAL that the backup holds, from `start_lsn` to `stop_lsn`, by timelines.
    pub wal: Vec<WalSpan>,
    /// When the backup began, by the clock of the host.
    pub start_time: Timestamp,
    /// When it was consistent.
    pub stop_time: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Whether the server was a standby.
    pub from_standby: bool,
    /// Whether the cluster was stopped: then there is no `backup_label`.
    pub offline: bool,
    /// PostgreSQL's `backup_label`.
    pub backup_label: Option<ByteString>,
    /// PostgreSQL's `tablespace_map`, empty where it has none.
    pub tablespace_map: Option<ByteString>,
    /// The tablespaces but `pg_default` and `pg_global`.
    pub tablespaces: Vec<TablespaceLocation>,
    /// Mode of the data directory.
    pub data_directory_mode: u32,
    /// Owner and group of the data directory.
    pub data_directory_owner: (u32, u32),
    /// Whether the server's `postgresql.conf` lies outside the data directory.
    pub config_outside: bool,
    /// Settings from configuration files outside the data directory.
    pub settings: Vec<Setting>,
    /// Bytes of the cluster's files.
    pub cluster_bytes: u64,
    /// Bytes of the WAL that the backup holds.
    pub wal_bytes: u64,
    /// Number of files.
    pub file_count: u64,
    /// Blocks of relation files that differ from the parent's, or all of them.
    pub blocks_changed: u64,
    /// Bytes of the packs that the run wrote, and of the map of changes that it kept, whatever became of them.
    pub own_bytes: u64,
    /// Which detector told what may have changed.
    pub detector: String,
    /// Why that one.
    pub detector_reason: String,
    /// What tells the cluster from others of its name; `None` where the server writes no WAL summaries.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub history_mark: Option<HistoryMark>,
    /// Damaged pages, stored as they are.
    pub corrupt_pages: Vec<CorruptPage>,
    /// The user's own words.
    pub note: Option<String>,
    /// Every pack that the backup needs.
    #[serde(with = "pack_list")]
    pub packs: Vec<PackInfo>,
    /// Where the file table is.
    #[serde(with = "page_list")]
    pub pages: Vec<PagePlace>,
}

impl Manifest {
    /// Bytes of a block.
    pub fn block_len(&self) -> usize {
        self.block_size as usize
    }

    /// The directory that PostgreSQL makes in each tablespace of the cluster.
    pub fn tablespace_version_dir(&self) -> String {
        format!("PG_{}_{}", self.postgres_major, self.catalog_version)
    }

    /// Where the manifest is stored.
    ///
    /// # Errors
    /// `Invalid` never happens for names made of checked parts.
    pub fn object(&self) -> Result<ObjectName> {
        names::manifest(&self.cluster, self.id, self.edition)
    }

    /// Reads an edition of a manifest, and its length in the store.
    pub(super) fn read(repo: &Repository, cluster: &ClusterName, id: BackupId, edition: u32) -> Result<(Self, u64)> {
        let object = names::manifest(cluster, id, edition)?;
        let bytes = repo.store().get(&object, MAX_LEN)?;
        let manifest = Self::decode(&bytes, &object)?;
        let expected = (repo.id(), cluster, id, edition);
        if (manifest.repository.as_str(), &manifest.cluster, manifest.id, manifest.edition) != expected {
            return Err(Error::corrupt(
                object.as_str(),
                "the manifest belongs to another repository, cluster or backup",
            ));
        }
        Ok((manifest, bytes.len() as u64))
    }

    /// Reads the newest of some editions of a manifest that is not damaged: as long as an older one is there, what it names is there, too.
    pub(super) fn read_best(
        repo: &Repository,
        cluster: &ClusterName,
        id: BackupId,
        editions: &[u32],
    ) -> Result<(Self, u64)> {
        let mut worst = None;
        for edition in editions.iter().rev() {
            match Self::read(repo, cluster, id, *edition) {
                Err(e) if e.kind() == ErrorKind::Missing => {}
                Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e),
                Err(e) => {
                    worst.get_or_insert(e);
                }
                read => return read,
            }
        }
        let object = names::manifest(cluster, id, editions.last().copied().unwrap_or_default())?;
        Err(worst.unwrap_or_else(|| Error::new(ErrorKind::Missing, "there is no such manifest").at(object.as_str())))
    }

    /// Reads a manifest; an expiry may write a newer edition at any time and remove the one that was listed.
    pub(super) fn read_newest(repo: &Repository, cluster: &ClusterName, id: BackupId) -> Result<(Self, u64)> {
        let prefix = names::manifest(cluster, id, 0)?;
        let mut known = Vec::new();
        loop {
            let listed = Editions::list(repo, cluster, prefix.as_str())?.of.remove(&id).unwrap_or_default();
            match Self::read_best(repo, cluster, id, &listed) {
                Err(e) if e.kind() == ErrorKind::Missing && listed != known => known = listed,
                read => return read,
            }
        }
    }

    /// Encodes the manifest as the object `object`.
    ///
    /// # Errors
    /// `Unsupported` if it says what [`Manifest::decode`] refuses; `Bug` if a library refuses.
    pub fn encode(&self, object: &ObjectName) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self).map_err(|e| Error::bug("cannot encode a manifest").because(e))?;
        let unreadable =
            self.absurdity().or_else(|| (json.len() as u64 > MAX_LEN).then(|| format!("it has {} bytes", json.len())));
        if let Some(what) = unreadable {
            let what = format!("a manifest that no reader would take: {what}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        sealed(&json, object)
    }

    /// Decodes what was stored as the object `object`.
    ///
    /// # Errors
    /// `Corrupt`, or `Unsupported` for a newer format.
    pub fn decode(bytes: &[u8], object: &ObjectName) -> Result<Self> {
        let damaged = |what: &str| Error::corrupt(object.as_str(), what.to_owned());
        let split = bytes.len().checked_sub(CHECK_LEN).ok_or_else(|| damaged("the manifest is too short"))?;
        let (content, stored) = bytes.split_at(split);
        if check(object, content).as_bytes() != stored {
            return Err(damaged("the manifest does not match its checksum"));
        }
        let frame = content.strip_prefix(FIRST_LINE).ok_or_else(|| newer(object))?;
        let json = super::decompress(frame, MAX_LEN, object.as_str())?;
        let manifest: Self =
            serde_json::from_slice(&json).map_err(|e| damaged("the manifest does not decode").because(e))?;
        if manifest.format != FORMAT_VERSION {
            return Err(newer(object));
        }
        match manifest.absurdity() {
            None => Ok(manifest),
            Some(what) => Err(damaged(&format!("the manifest is not what a backup is: {what}"))),
        }
    }

    /// What no backup says, if the manifest says something like that. Lengths and counts are bounded here, so that sums of them have room.
    fn absurdity(&self) -> Option<String> {
        let block_size = self.block_size;
        let has_sizes = block_size.is_power_of_two() && (1024..=32768).contains(&block_size);
        if !has_sizes || WalSegmentSize::new(self.wal_segment_size).is_none() {
            return Some(format!("blocks of {block_size} bytes, WAL segments of {}", self.wal_segment_size));
        }
        if let Some(pack) = self.packs.iter().find(|pack| pack.len > MAX_PACK_LEN) {
            return Some(format!("a pack of {} bytes", pack.len));
        }
        if self.corrupt_pages.len() > MAX_CORRUPT_PAGES {
            return Some(format!("{} corrupt pages", self.corrupt_pages.len()));
        }
        if self.offline != self.backup_label.is_none() {
            return Some("only the backup of a stopped cluster has no backup_label, and it has none".to_owned());
        }
        if self.system_identifier.parse::<u64>().is_err() {
            return Some("no system identifier".to_owned());
        }
        let mut oids: Vec<u32> = self.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
        oids.sort_unstable();
        oids.windows(2)
            .find(|pair| pair[0] == pair[1])
            .map(|pair| format!("tablespace {} twice", pair[0]))
            .or_else(|| self.long_text())
    }

    fn long_text(&self) -> Option<String> {
        let summary = self.history_mark.iter().map(|mark| &mark.summary);
        let words = [&self.postgres_version, &self.detector, &self.repository].into_iter().chain(summary);
        let texts = [Some(&self.detector_reason), self.note.as_ref()];
        let mut words = words.map(|word| word.len());
        let word = words.find(|len| *len > MAX_WORD_LEN);
        let text = texts.iter().flatten().map(|text| text.len()).find(|len| *len > MAX_TEXT_LEN);
        word.or(text).map(|len| format!("a text of {len} bytes"))
    }
}

/// The manifest `object` of this JSON, as it is stored.
pub(super) fn sealed(json: &[u8], object: &ObjectName) -> Result<Vec<u8>> {
    let mut bytes = [FIRST_LINE, &compress(json)?].concat();
    let check = check(object, &bytes);
    bytes.extend_from_slice(check.as_bytes());
    Ok(bytes)
}

fn check(object: &ObjectName, content: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(object.as_str().as_bytes()).update(&[0]).update(content).finalize()
}

fn newer(object: &ObjectName) -> Error {
    let error = Error::new(ErrorKind::Unsupported, "the manifest is of a format that this program does not know");
    error.at(object.as_str()).hint("use a newer pgstrata; nothing was changed")
}

/// Packs as `{"RUN": {"data": [[seq, len], ...], "map": [...]}}`: a run's name stands once.
mod pack_list {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Default, Serialize, Deserialize)]
    struct OfRun {
        data: Vec<(u32, u64)>,
        map: Vec<(u32, u64)>,
    }

    pub fn serialize<S: Serializer>(packs: &[PackInfo], serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut runs: BTreeMap<BackupId, OfRun> = BTreeMap::new();
        for PackInfo { name, len } in packs {
            let run = runs.entry(name.run).or_default();
            match name.kind {
                PackKind::Data => run.data.push((name.seq, *len)),
                PackKind::Map => run.map.push((name.seq, *len)),
            }
        }
        runs.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<PackInfo>, D::Error> {
        let runs = BTreeMap::<BackupId, OfRun>::deserialize(deserializer)?;
        let mut packs = Vec::new();
        for (run, OfRun { data, map }) in runs {
            let info = |kind| move |(seq, len)| PackInfo { name: PackName { run, seq, kind }, len };
            packs.extend(data.into_iter().map(info(PackKind::Data)));
            packs.extend(map.into_iter().map(info(PackKind::Map)));
        }
        Ok(packs)
    }
}

/// Pages as `[run, seq, offset, len, id, entries]`, runs numbered in a list of their own.
mod page_list {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Pages {
        runs: Vec<BackupId>,
        pages: Vec<(u32, u32, u64, u32, String, u32)>,
    }

    pub fn serialize<S: Serializer>(pages: &[PagePlace], serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut runs = Vec::new();
        let mut numbers = HashMap::new();
        let mut number = |run: BackupId| {
            *numbers.entry(run).or_insert_with(|| {
                runs.push(run);
                (runs.len() - 1) as u32
            })
        };
        let tuple = |page: &PagePlace| {
            let Place { pack, offset } = page.place;
            (number(pack.run), pack.seq, offset, page.len, hex(&page.id), page.entries)
        };
        let pages = pages.iter().map(tuple).collect();
        Pages { runs, pages }.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<PagePlace>, D::Error> {
        let Pages { runs, pages } = Pages::deserialize(deserializer)?;
        let place = |(run, seq, offset, len, id, entries): (u32, u32, u64, u32, String, u32)| {
            let run = *runs.get(run as usize)?;
            let id = from_hex(&id)?.try_into().ok()?;
            let pack = PackName { run, seq, kind: PackKind::Map };
            Some(PagePlace { place: Place { pack, offset }, len, id, entries })
        };
        let places: Option<Vec<_>> = pages.into_iter().map(place).collect();
        places.ok_or_else(|| serde::de::Error::custom("a page of the file table is nowhere"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn sample(repository: &str, id: BackupId, sequence: u64) -> Manifest {
        let pack = PackName { run: id, seq: 0, kind: PackKind::Map };
        Manifest {
            format: FORMAT_VERSION,
            repository: repository.to_owned(),
            cluster: ClusterName::default(),
            id,
            sequence,
            synthesis: 0,
            edition: 0,
            backup_type: BackupType::Full,
            parent: None,
            merged_from: None,
            system_identifier: "7000000000000000001".to_owned(),
            postgres_version: "18.1".to_owned(),
            postgres_major: 18,
            catalog_version: 202_506_291,
            block_size: 8192,
            wal_segment_size: 16 << 20,
            data_checksum_version: 1,
            start_lsn: Lsn::new(0x2000028),
            stop_lsn: Lsn::new(0x2000120),
            start_timeline: TimelineId::new(1),
            timeline: TimelineId::new(1),
            wal: Vec::new(),
            start_time: Timestamp::UNIX_EPOCH,
            stop_time: Timestamp::UNIX_EPOCH,
            duration_ms: 1500,
            from_standby: false,
            offline: false,
            backup_label: Some(ByteString(b"START WAL LOCATION: 0/2000028\n".to_vec())),
            tablespace_map: Some(ByteString(b"16384 /odd\xff\n".to_vec())),
            tablespaces: vec![TablespaceLocation { oid: 16384, location: Some(ByteString(b"/odd\xff".to_vec())) }],
            data_directory_mode: 0o700,
            data_directory_owner: (1, 1),
            config_outside: false,
            settings: Vec::new(),
            cluster_bytes: 1,
            wal_bytes: 2,
            file_count: 3,
            blocks_changed: 4,
            own_bytes: 99,
            detector: "scan".to_owned(),
            detector_reason: "there is no parent".to_owned(),
            history_mark: None,
            corrupt_pages: Vec::new(),
            note: None,
            packs: vec![PackInfo { name: pack, len: 99 }],
            pages: vec![PagePlace { place: Place { pack, offset: 16 }, len: 50, id: [7; 16], entries: 3 }],
        }
    }

    fn object() -> ObjectName {
        ObjectName::new("clusters/main/manifests/20261122T160312Z-1a2b3c4d").unwrap()
    }

    fn encoded() -> (Manifest, Vec<u8>) {
        let manifest = sample("repo", "20261122T160312Z-1a2b3c4d".parse().unwrap(), 1);
        let bytes = manifest.encode(&object()).unwrap();
        (manifest, bytes)
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_written() {
        let (manifest, bytes) = encoded();
        assert_eq!(Manifest::decode(&bytes, &object()).unwrap(), manifest);
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_found() {
        let (_, bytes) = encoded();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Manifest::decode(&damaged, &object()).is_err(), "byte {at}");
            assert!(Manifest::decode(&bytes[..at], &object()).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_manifest_under_another_name_is_found() {
        let (_, bytes) = encoded();
        let other = ObjectName::new("clusters/main/manifests/20261122T160312Z-00000000").unwrap();
        assert_eq!(Manifest::decode(&bytes, &other).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            let _ = Manifest::decode(&bytes, &object());
            let mut checked = [FIRST_LINE, &zstd::bulk::compress(&bytes, 1).unwrap()].concat();
            let hash = check(&object(), &checked);
            checked.extend_from_slice(hash.as_bytes());
            prop_assert!(Manifest::decode(&checked, &object()).is_err());
        }
    }
}
