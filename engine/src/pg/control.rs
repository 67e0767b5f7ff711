//! pg_control: which cluster this is, how it is built, and where its last checkpoint lies.
//!
//! The file is 8 KB of which about 300 bytes are used. The server rewrites it in place, so a reader of a live
//! cluster can see half of an old and half of a new one: the CRC decides, and the caller reads again when it
//! does not fit. Nothing is taken from a file whose CRC is wrong but its version, which the CRC's place depends
//! on.
//!
//! Only layouts that were compared with their PostgreSQL sources are read. A version that is not known here is
//! refused: guessed offsets would give a block size or a redo position that looks right and is not.
//!
//! PostgreSQL: `src/include/catalog/pg_control.h`, `ControlFileData`, `CheckPoint`;
//! `src/common/controldata_utils.c`, `get_controlfile`; `src/include/catalog/catversion.h`.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::bytes::{array_at, u32_at, u64_at};
use super::{BlockSize, BlocksPerSegment, Lsn, TimelineId, WalBlockSize, WalSegmentSize};
use crate::error::{Error, ErrorKind, Result};

const PLACE: &str = "global/pg_control";

/// The number that initdb gave this cluster; clones and standbys share it. Decimal wherever it is text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemIdentifier(u64);

impl SystemIdentifier {
    /// The one with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemIdentifier {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Serialize for SystemIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemIdentifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The format of the system catalogs: a date and a digit, as `202209061`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CatalogVersion(u32);

impl CatalogVersion {
    /// Its number.
    pub const fn as_u32(self) -> u32 {
        self.0
    }
}

impl fmt::Display for CatalogVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A major version of PostgreSQL that this program handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MajorVersion(u8);

impl MajorVersion {
    /// `None` unless it is 13 to 19.
    pub fn new(number: u32) -> Option<Self> {
        u8::try_from(number).ok().filter(|number| (13..=19).contains(number)).map(Self)
    }

    /// Its number.
    pub fn as_u32(self) -> u32 {
        u32::from(self.0)
    }
}

impl fmt::Display for MajorVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What the server was doing when it last wrote pg_control.
///
/// PostgreSQL: `DBState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClusterState {
    /// Initialising, before its first checkpoint.
    StartingUp,
    /// Cleanly stopped: the files are complete without WAL.
    ShutDown,
    /// A standby, cleanly stopped: it needs WAL to become consistent.
    ShutDownInRecovery,
    /// Stopping.
    ShuttingDown,
    /// Recovering from a crash.
    InCrashRecovery,
    /// A standby, or a restore that replays an archive.
    InArchiveRecovery,
    /// Open for changes, or crashed while it was.
    InProduction,
}

impl ClusterState {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            _ => return None,
        })
    }
}

impl fmt::Display for ClusterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ClusterState::StartingUp => "starting up",
            ClusterState::ShutDown => "shut down",
            ClusterState::ShutDownInRecovery => "shut down in recovery",
            ClusterState::ShuttingDown => "shutting down",
            ClusterState::InCrashRecovery => "in crash recovery",
            ClusterState::InArchiveRecovery => "in archive recovery",
            ClusterState::InProduction => "in production",
        })
    }
}

/// How much WAL tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalLevel {
    /// Enough for crash recovery only; bulk changes are in no record.
    Minimal,
    /// Enough for backups and standbys.
    Replica,
    /// Enough for logical decoding, too.
    Logical,
}

impl WalLevel {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical].get(usize::try_from(number).ok()?).copied()
    }
}

impl fmt::Display for WalLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WalLevel::Minimal => "minimal",
            WalLevel::Replica => "replica",
            WalLevel::Logical => "logical",
        })
    }
}

/// What pg_control says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// Which cluster.
    pub system_identifier: SystemIdentifier,
    /// The layout of pg_control itself.
    pub pg_control_version: u32,
    /// The format of the system catalogs.
    pub catalog_version: CatalogVersion,
    /// What the server was doing.
    pub state: ClusterState,
    /// When the file was last written, by the server's clock.
    pub time: Timestamp,
    /// Where the record of the last checkpoint begins.
    pub checkpoint: Lsn,
    /// Where replay from that checkpoint begins.
    pub redo: Lsn,
    /// The timeline of that checkpoint.
    pub timeline: TimelineId,
    /// The timeline before it, if the checkpoint begins a new one; else the same.
    pub prev_timeline: TimelineId,
    /// Whether full-page images were on at that checkpoint.
    pub full_page_writes: bool,
    /// How far recovery must replay before the cluster is consistent; 0/0 outside recovery.
    pub min_recovery_point: Lsn,
    /// The timeline of that point.
    pub min_recovery_point_timeline: TimelineId,
    /// Where the backup began that is being recovered; 0/0 if there is none.
    pub backup_start_point: Lsn,
    /// Where that backup, taken from a standby, ended; 0/0 if there is none.
    pub backup_end_point: Lsn,
    /// Whether recovery must see the backup's end record.
    pub backup_end_required: bool,
    /// How much WAL tells.
    pub wal_level: WalLevel,
    /// Whether hint bits are in WAL.
    pub wal_log_hints: bool,
    /// The size of a page.
    pub block_size: BlockSize,
    /// How many blocks a relation's file holds.
    pub relseg_size: BlocksPerSegment,
    /// The size of a WAL page.
    pub wal_block_size: WalBlockSize,
    /// The size of a WAL file.
    pub wal_segment_size: WalSegmentSize,
    /// 0: pages have no checksums; 1: they do; 2 and 3 (19 only): they are being turned off or on.
    pub data_checksum_version: u32,
    major_version: MajorVersion,
}

impl ControlFile {
    /// Reads the contents of `global/pg_control`.
    ///
    /// # Errors
    /// Corrupt: too short, a wrong CRC (also: torn by a concurrent write, read it again), or an impossible value.
    /// Unsupported: a version or a machine's layout that this program does not know.
    pub fn parse(bytes: &[u8]) -> Result<ControlFile> {
        let version = u32_at(bytes, 8).ok_or_else(|| too_short(bytes))?;
        let layout = Layout::of_version(version).ok_or_else(|| unknown_version(version))?;
        layout.check_crc(bytes)?;
        Fields { bytes, layout }.read(version)
    }

    /// The major version of the server that owns the cluster.
    pub fn major_version(&self) -> MajorVersion {
        self.major_version
    }

    /// The directory that this cluster uses in every tablespace, as `PG_15_202209061`.
    ///
    /// PostgreSQL: `src/include/common/relpath.h`, `TABLESPACE_VERSION_DIRECTORY`.
    pub fn tablespace_version_dir(&self) -> String {
        format!("PG_{}_{}", self.major_version, self.catalog_version)
    }

    /// Whether the server was shut down, and its files are all that there is to know.
    pub fn was_stopped_cleanly(&self) -> bool {
        matches!(self.state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
    }

    /// Whether pages carry checksums that must fit.
    pub fn has_data_checksums(&self) -> bool {
        self.data_checksum_version == 1
    }
}

/// Which pg_control and catalog version each major has; both are frozen when it is released, 19 is as of its beta.
const MAJORS: [(u8, u32, u32); 7] = [
    (13, 1300, 202_007_201),
    (14, 1300, 202_107_181),
    (15, 1300, 202_209_061),
    (16, 1300, 202_307_071),
    (17, 1700, 202_406_281),
    (18, 1800, 202_506_291),
    (19, 1902, 202_607_272),
];

fn major_of(control_version: u32, catalog: CatalogVersion) -> Option<MajorVersion> {
    let entry = MAJORS.iter().find(|(_, control, catversion)| (*control, *catversion) == (control_version, catalog.0));
    entry.map(|(major, ..)| MajorVersion(*major))
}

/// Where those fields lie that are not at the same place in every version, in bytes from the file's beginning.
struct Layout {
    min_recovery_point: usize,
    wal_level: usize,
    max_align: usize,
    block_size: usize,
    wal_block_size: usize,
    data_checksum_version: usize,
    crc: usize,
}

impl Layout {
    fn of_version(version: u32) -> Option<&'static Layout> {
        const V1300: Layout = Layout {
            min_recovery_point: 136,
            wal_level: 172,
            max_align: 204,
            block_size: 216,
            wal_block_size: 224,
            data_checksum_version: 252,
            crc: 288,
        };
        const V1800: Layout = Layout { crc: 292, ..V1300 };
        const V1902: Layout = Layout {
            min_recovery_point: 144,
            wal_level: 180,
            max_align: 212,
            block_size: 224,
            wal_block_size: 236,
            data_checksum_version: 264,
            crc: 304,
        };
        match version {
            1300 | 1700 => Some(&V1300),
            1800 => Some(&V1800),
            1902 => Some(&V1902),
            _ => None,
        }
    }

    fn check_crc(&self, bytes: &[u8]) -> Result<()> {
        let stored = u32_at(bytes, self.crc).ok_or_else(|| too_short(bytes))?;
        let computed = crc32c::crc32c(&bytes[..self.crc]);
        if stored != computed {
            let what = format!("pg_control has CRC {stored:08X}, but its contents give {computed:08X}");
            return Err(Error::corrupt(PLACE, what));
        }
        Ok(())
    }
}

/// A file whose length and CRC were checked.
struct Fields<'a> {
    bytes: &'a [u8],
    layout: &'a Layout,
}

impl Fields<'_> {
    fn read(&self, pg_control_version: u32) -> Result<ControlFile> {
        self.check_machine()?;
        let layout = self.layout;
        let catalog_version = CatalogVersion(self.u32(12)?);
        let major_version =
            major_of(pg_control_version, catalog_version).ok_or_else(|| unknown_catalog(catalog_version))?;
        Ok(ControlFile {
            system_identifier: SystemIdentifier(self.u64(0)?),
            pg_control_version,
            catalog_version,
            state: self.value(16, "cluster state", ClusterState::from_number)?,
            time: self.time(24)?,
            checkpoint: self.lsn(32)?,
            redo: self.lsn(40)?,
            timeline: TimelineId::new(self.u32(48)?),
            prev_timeline: TimelineId::new(self.u32(52)?),
            full_page_writes: self.flag(56)?,
            min_recovery_point: self.lsn(layout.min_recovery_point)?,
            min_recovery_point_timeline: TimelineId::new(self.u32(layout.min_recovery_point + 8)?),
            backup_start_point: self.lsn(layout.min_recovery_point + 16)?,
            backup_end_point: self.lsn(layout.min_recovery_point + 24)?,
            backup_end_required: self.flag(layout.min_recovery_point + 32)?,
            wal_level: self.value(layout.wal_level, "wal_level", WalLevel::from_number)?,
            wal_log_hints: self.flag(layout.wal_level + 4)?,
            block_size: self.value(layout.block_size, "block size", BlockSize::new)?,
            relseg_size: self.value(layout.block_size + 4, "relation segment size", BlocksPerSegment::new)?,
            wal_block_size: self.value(layout.wal_block_size, "WAL block size", WalBlockSize::new)?,
            wal_segment_size: self.value(layout.wal_block_size + 4, "WAL segment size", WalSegmentSize::new)?,
            data_checksum_version: self.value(layout.data_checksum_version, "data checksum version", |number| {
                (number <= 3).then_some(number)
            })?,
            major_version,
        })
    }

    /// Structs are laid out for 8-byte alignment, and floats are IEEE 754: the two things PostgreSQL itself asks.
    fn check_machine(&self) -> Result<()> {
        let align = self.u32(self.layout.max_align)?;
        let float = f64::from_bits(self.u64(self.layout.max_align + 4)?);
        if align != 8 || float != 1_234_567.0 {
            let what = format!("the cluster was made on another kind of machine (alignment {align}, float {float})");
            return Err(Error::new(ErrorKind::Unsupported, what).at(PLACE));
        }
        Ok(())
    }

    fn u32(&self, offset: usize) -> Result<u32> {
        u32_at(self.bytes, offset).ok_or_else(|| too_short(self.bytes))
    }

    fn u64(&self, offset: usize) -> Result<u64> {
        u64_at(self.bytes, offset).ok_or_else(|| too_short(self.bytes))
    }

    fn lsn(&self, offset: usize) -> Result<Lsn> {
        self.u64(offset).map(Lsn::new)
    }

    fn flag(&self, offset: usize) -> Result<bool> {
        let [byte] = array_at(self.bytes, offset).ok_or_else(|| too_short(self.bytes))?;
        Ok(byte != 0)
    }

    fn time(&self, offset: usize) -> Result<Timestamp> {
        let seconds = self.u64(offset)?.cast_signed();
        Timestamp::from_second(seconds)
            .map_err(|error| Error::corrupt(PLACE, format!("pg_control was written at {seconds} s")).because(error))
    }

    fn value<T>(&self, offset: usize, name: &str, convert: impl Fn(u32) -> Option<T>) -> Result<T> {
        let number = self.u32(offset)?;
        convert(number).ok_or_else(|| Error::corrupt(PLACE, format!("pg_control gives {number} as {name}")))
    }
}

fn too_short(bytes: &[u8]) -> Error {
    Error::corrupt(PLACE, format!("pg_control is only {} bytes long", bytes.len()))
}

fn unknown_version(version: u32) -> Error {
    let what = if version.is_multiple_of(65_536) && version != 0 {
        format!("pg_control has version {version}: the cluster was made on a big-endian machine")
    } else {
        format!("pg_control has version {version}; this program knows 1300 (PostgreSQL 13 to 16), 1700, 1800 and 1902")
    };
    Error::new(ErrorKind::Unsupported, what).at(PLACE)
}

fn unknown_catalog(catalog: CatalogVersion) -> Error {
    let what = format!("catalog version {catalog} is of no PostgreSQL release from 13 to 18, nor of the 19 known here");
    Error::new(ErrorKind::Unsupported, what).at(PLACE).hint("use a pgstrata that is as new as the server")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: [(u32, &[u8]); 6] = [
        (13, include_bytes!("../../../testdata/artefacts/13/pg_control")),
        (14, include_bytes!("../../../testdata/artefacts/14/pg_control")),
        (15, include_bytes!("../../../testdata/artefacts/15/pg_control")),
        (16, include_bytes!("../../../testdata/artefacts/16/pg_control")),
        (17, include_bytes!("../../../testdata/artefacts/17/pg_control")),
        (18, include_bytes!("../../../testdata/artefacts/18/pg_control")),
    ];

    fn with_new_crc(bytes: &[u8], crc_offset: usize) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let crc = crc32c::crc32c(&bytes[..crc_offset]);
        bytes[crc_offset..crc_offset + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn each_majors_own_file_is_read_as_pg_controldata_prints_it() {
        let dirs: Vec<_> = REAL
            .iter()
            .map(|(major, bytes)| {
                let control = ControlFile::parse(bytes).unwrap();
                assert_eq!(control.major_version().as_u32(), *major);
                assert_eq!(control.wal_segment_size.as_u32(), 1 << 20);
                assert_eq!((control.block_size, control.relseg_size), (BlockSize::DEFAULT, BlocksPerSegment::DEFAULT));
                assert_eq!((control.state, control.wal_level), (ClusterState::InProduction, WalLevel::Replica));
                assert!(control.has_data_checksums());
                control.tablespace_version_dir()
            })
            .collect();
        let expected = [
            "PG_13_202007201",
            "PG_14_202107181",
            "PG_15_202209061",
            "PG_16_202307071",
            "PG_17_202406281",
            "PG_18_202506291",
        ];
        assert_eq!(dirs, expected);
    }

    #[test]
    fn every_field_of_a_real_file_is_what_pg_controldata_says() {
        let control = ControlFile::parse(REAL[5].1).unwrap();
        let expected = ControlFile {
            system_identifier: SystemIdentifier(SYSTEM_IDENTIFIER_18),
            pg_control_version: 1800,
            catalog_version: CatalogVersion(202_506_291),
            state: ClusterState::InProduction,
            time: TIME_18.parse().unwrap(),
            checkpoint: CHECKPOINT_18.parse().unwrap(),
            redo: REDO_18.parse().unwrap(),
            timeline: TimelineId::new(1),
            prev_timeline: TimelineId::new(1),
            full_page_writes: true,
            min_recovery_point: Lsn::INVALID,
            min_recovery_point_timeline: TimelineId::new(0),
            backup_start_point: Lsn::INVALID,
            backup_end_point: Lsn::INVALID,
            backup_end_required: false,
            wal_level: WalLevel::Replica,
            wal_log_hints: false,
            block_size: BlockSize::DEFAULT,
            relseg_size: BlocksPerSegment::DEFAULT,
            wal_block_size: WalBlockSize::DEFAULT,
            wal_segment_size: WalSegmentSize::new(1 << 20).unwrap(),
            data_checksum_version: 1,
            major_version: MajorVersion(18),
        };
        assert_eq!(control, expected);
    }

    const SYSTEM_IDENTIFIER_18: u64 = 7_711_031_876_090_026_729;
    const TIME_18: &str = "2026-11-22T16:22:35Z";
    const CHECKPOINT_18: &str = "0/8F1FC0";
    const REDO_18: &str = "0/8F1F68";

    #[test]
    fn a_flipped_byte_or_a_torn_write_is_corrupt() {
        let good = REAL[2].1;
        for at in (0..8).chain(12..292) {
            let mut bytes = good.to_vec();
            bytes[at] ^= 1;
            let error = ControlFile::parse(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at}");
            assert!(error.to_string().contains("CRC"), "{error}");
        }
    }

    #[test]
    fn a_short_file_is_corrupt() {
        for len in [0, 11, 12, 16, 291] {
            let error = ControlFile::parse(&REAL[2].1[..len]).unwrap_err();
            assert_eq!(error.to_string(), format!("pg_control is only {len} bytes long (global/pg_control)"));
        }
    }

    #[test]
    fn versions_that_are_not_known_are_refused() {
        for version in [0u32, 1200, 1201, 1600, 1801, 1900, 1901, 1903, 2000, 1300 << 16] {
            let mut bytes = REAL[5].1.to_vec();
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            let error = ControlFile::parse(&bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("version {version}")), "{error}");
        }
    }

    #[test]
    fn a_development_catalog_under_a_known_control_version_is_refused() {
        let mut bytes = REAL[5].1.to_vec();
        bytes[12..16].copy_from_slice(&202_506_292u32.to_le_bytes());
        let error = ControlFile::parse(&with_new_crc(&bytes, 292)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().starts_with("catalog version 202506292"), "{error}");
    }

    #[test]
    fn impossible_values_under_a_good_crc_are_corrupt() {
        let cases = [
            (16, 7u32, "cluster state"),
            (172, 3, "wal_level"),
            (216, 5000, "block size"),
            (220, 0, "segment"),
            (224, 0, "WAL block"),
            (228, 12, "WAL segment"),
            (252, 4, "checksum"),
        ];
        for (offset, value, name) in cases {
            let mut bytes = REAL[2].1.to_vec();
            bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
            let error = ControlFile::parse(&with_new_crc(&bytes, 288)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    /// A file of 19 made from one of 18 by moving the fields as `ControlFileData` of 19 has them.
    fn converted_to_19(old: &[u8]) -> Vec<u8> {
        let mut new = vec![0; 8192];
        new[..64].copy_from_slice(&old[..64]);
        new[8..12].copy_from_slice(&1902u32.to_le_bytes());
        new[12..16].copy_from_slice(&202_607_272u32.to_le_bytes());
        for (from, to, len) in [(128, 136, 96), (224, 236, 24), (248, 260, 41)] {
            new[to..to + len].copy_from_slice(&old[from..from + len]);
        }
        new[232..236].copy_from_slice(&32u32.to_le_bytes());
        with_new_crc(&new, 304)
    }

    #[test]
    fn the_layout_of_19_gives_the_same_facts_at_its_own_places() {
        let old = ControlFile::parse(REAL[5].1).unwrap();
        let new = ControlFile::parse(&converted_to_19(REAL[5].1)).unwrap();
        assert_eq!(new.tablespace_version_dir(), "PG_19_202607272");
        let expected = ControlFile {
            pg_control_version: 1902,
            catalog_version: CatalogVersion(202_607_272),
            major_version: MajorVersion(19),
            ..old
        };
        assert_eq!(new, expected);
    }

    #[test]
    fn a_system_identifier_is_a_decimal_string_in_json() {
        let id = SystemIdentifier(u64::MAX);
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"18446744073709551615\"");
        assert_eq!(serde_json::from_str::<SystemIdentifier>("\"18446744073709551615\"").unwrap(), id);
    }

    proptest! {
        #[test]
        fn no_bytes_under_a_good_crc_make_the_parser_panic(
            which in 0usize..6,
            changes in proptest::collection::vec((0usize..288, any::<u8>()), 0..40),
        ) {
            let mut bytes = REAL[which].1.to_vec();
            for (at, value) in changes {
                bytes[at] = value;
            }
            let crc = if which == 5 { 292 } else { 288 };
            let _ = ControlFile::parse(&with_new_crc(&bytes, crc));
            let _ = ControlFile::parse(&bytes);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = ControlFile::parse(&bytes);
        }
    }
}
