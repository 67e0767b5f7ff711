//! The names of backups, clusters and objects; every object name of the repository is made here.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};
use crate::store::ObjectName;

/// The name of the object that makes a store a repository.
pub(crate) const REPOSITORY: &str = "repository";

/// The name of the object that is given up where there is no room for anything else.
pub(crate) const RESERVE: &str = "reserve";

/// The name of a backup, and of the run that writes it: `20261122T160312Z-1a2b3c4d`.
///
/// The first part is the second of its start in UTC, for people; the second is random, so that two runs in one second, or a clock
/// that went back, never share a name. Which of two backups is newer is told by the manifests, not by this.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    second: i64,
    random: u32,
}

impl BackupId {
    /// A new id for a run that starts at `now`.
    ///
    /// # Errors
    /// `Unavailable` if the system has no randomness.
    pub fn generate(now: Timestamp) -> Result<Self> {
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|e| Error::new(ErrorKind::Unavailable, format!("no randomness: {e}")))?;
        Ok(Self { second: now.as_second(), random: u32::from_le_bytes(random) })
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = Timestamp::from_second(self.second).unwrap_or_default().to_zoned(TimeZone::UTC);
        let (date, clock) = (time.date(), time.time());
        write!(f, "{:04}{:02}{:02}T", date.year(), date.month(), date.day())?;
        write!(f, "{:02}{:02}{:02}Z-{:08x}", clock.hour(), clock.minute(), clock.second(), self.random)
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BackupId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('-').and_then(|(time, random)| {
            let time = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", time).ok()?;
            let second = time.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second();
            Some(Self { second, random: u32::from_str_radix(random, 16).ok()? })
        });
        // Comparing with what we would print refuses every other spelling, so a backup has one name.
        parsed
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| Error::invalid(format!("{text:?} is not the id of a backup")))
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of one cluster in a repository; `main` unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

impl Default for ClusterName {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ClusterName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() <= 63 && crate::store::is_component(text) {
            return Ok(Self(text.to_owned()));
        }
        let hint = "use up to 63 letters, digits, underscores, dots and hyphens, not beginning with a dot";
        Err(Error::invalid(format!("{text:?} is not the name of a cluster")).hint(hint))
    }
}

impl TryFrom<String> for ClusterName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> String {
        name.0
    }
}

/// What a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum PackKind {
    /// Chunks.
    Data,
    /// Metadata records.
    Map,
}

impl From<PackKind> for u8 {
    fn from(kind: PackKind) -> u8 {
        match kind {
            PackKind::Data => 1,
            PackKind::Map => 2,
        }
    }
}

impl TryFrom<u8> for PackKind {
    type Error = String;

    fn try_from(number: u8) -> std::result::Result<Self, String> {
        match number {
            1 => Ok(PackKind::Data),
            2 => Ok(PackKind::Map),
            _ => Err(format!("unknown kind of pack {number}")),
        }
    }
}

/// One pack of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackName {
    /// The run that wrote it.
    pub run: BackupId,
    /// Its number among the run's packs of this kind.
    pub seq: u32,
    /// What it holds.
    pub kind: PackKind,
}

impl PackName {
    /// The pack's object.
    ///
    /// # Errors
    /// `Invalid` never happens for names made of checked parts.
    pub fn object(&self, cluster: &ClusterName) -> Result<ObjectName> {
        let suffix = match self.kind {
            PackKind::Data => "data",
            PackKind::Map => "map",
        };
        ObjectName::new(format!("clusters/{cluster}/packs/{}/{:06}.{suffix}", self.run, self.seq))
    }

    /// The pack that an object of the cluster is; `None` if it is something else.
    pub fn parse(object: &ObjectName, cluster: &ClusterName) -> Option<Self> {
        let (run, file) = object.as_str().strip_prefix(&packs(cluster))?.split_once('/')?;
        let (seq, suffix) = file.split_once('.')?;
        let kind = match suffix {
            "data" => PackKind::Data,
            "map" => PackKind::Map,
            _ => return None,
        };
        let pack = Self { run: run.parse().ok()?, seq: seq.parse().ok()?, kind };
        pack.object(cluster).is_ok_and(|name| name == *object).then_some(pack)
    }
}

/// The prefix of a cluster's manifests.
pub(crate) fn manifests(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/manifests/")
}

/// The prefix of a cluster's packs.
pub(crate) fn packs(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/packs/")
}

/// A backup's manifest: the edition 0 has the backup's name, later ones a number behind it.
pub(crate) fn manifest(cluster: &ClusterName, id: BackupId, edition: u32) -> Result<ObjectName> {
    let suffix = if edition == 0 { String::new() } else { format!(".{edition}") };
    ObjectName::new(format!("{}{id}{suffix}", manifests(cluster)))
}

/// The backup and the edition that the last component of a manifest's name says.
pub(crate) fn parse_manifest(text: &str) -> Result<(BackupId, u32)> {
    let Some((id, number)) = text.split_once('.') else { return Ok((text.parse()?, 0)) };
    let edition = number.parse().ok().filter(|edition: &u32| *edition > 0 && edition.to_string() == number);
    edition.map_or_else(
        || Err(Error::invalid(format!("{text:?} is not the name of a manifest"))),
        |edition| Ok((id.parse()?, edition)),
    )
}

/// The prefix of a cluster's leases.
pub(crate) fn leases(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/leases/")
}

/// A lease, renewed `renewals` times.
pub(crate) fn lease(cluster: &ClusterName, id: BackupId, renewals: u32) -> Result<ObjectName> {
    ObjectName::new(format!("{}{id}.{renewals}", leases(cluster)))
}

/// The prefix of a cluster's pins.
pub(crate) fn pins(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/pins/")
}

/// A backup's pin.
pub(crate) fn pin(cluster: &ClusterName, id: BackupId) -> Result<ObjectName> {
    ObjectName::new(format!("{}{id}", pins(cluster)))
}

/// The prefix of a cluster's marks of damage.
pub(crate) fn marks(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/damaged/")
}

/// The mark of a damaged backup.
pub(crate) fn mark(cluster: &ClusterName, id: BackupId) -> Result<ObjectName> {
    ObjectName::new(format!("{}{id}", marks(cluster)))
}

/// The prefix of a cluster's kept maps of changes.
pub(crate) fn changes(cluster: &ClusterName) -> String {
    format!("clusters/{cluster}/changes/")
}

/// What changed from the start of `parent` to the start of `backup`.
pub(crate) fn changes_between(cluster: &ClusterName, backup: BackupId, parent: BackupId) -> Result<ObjectName> {
    ObjectName::new(format!("{}{backup}.{parent}", changes(cluster)))
}

/// The prefix of a run's packs.
pub(crate) fn packs_of(cluster: &ClusterName, run: BackupId) -> String {
    format!("{}{run}/", packs(cluster))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_reads_back_as_it_was_printed(second in 0i64..4_000_000_000, random: u32) {
            let id = BackupId { second, random };
            prop_assert_eq!(id.to_string().parse::<BackupId>().unwrap(), id);
        }

        #[test]
        fn no_text_makes_the_id_parser_panic(text in ".*") {
            let _ = text.parse::<BackupId>();
            let _ = text.parse::<ClusterName>();
        }
    }

    #[test]
    fn the_editions_of_a_manifest_are_told_apart() {
        let cluster = ClusterName::default();
        let id: BackupId = "20261122T160312Z-1a2b3c4d".parse().unwrap();
        for edition in [0, 1, 17] {
            let object = manifest(&cluster, id, edition).unwrap();
            assert_eq!(parse_manifest(&object.as_str()[manifests(&cluster).len()..]).unwrap(), (id, edition));
        }
        for text in ["20261122T160312Z-1a2b3c4d.0", "20261122T160312Z-1a2b3c4d.01", "20261122T160312Z-1a2b3c4d.", ".1"]
        {
            assert!(parse_manifest(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_packs_name_reads_back_and_nothing_else_does() {
        let cluster = ClusterName::default();
        let run = "20261122T160312Z-1a2b3c4d".parse().unwrap();
        for kind in [PackKind::Data, PackKind::Map] {
            let pack = PackName { run, seq: 7, kind };
            assert_eq!(PackName::parse(&pack.object(&cluster).unwrap(), &cluster), Some(pack));
        }
        for text in ["packs/20261122T160312Z-1a2b3c4d/7.data", "packs/20261122T160312Z-1a2b3c4d/000007.dat", "packs/x"]
        {
            let object = ObjectName::new(format!("clusters/main/{text}")).unwrap();
            assert_eq!(PackName::parse(&object, &cluster), None);
        }
    }

    #[test]
    fn an_id_has_one_spelling() {
        for text in
            ["20261122T160312Z-1A2B3C4D", "20261122T160312Z-+a2b3c4d", "20261322T160312Z-1a2b3c4d", "20261122T160312Z"]
        {
            assert!(text.parse::<BackupId>().is_err(), "{text}");
        }
    }
}
