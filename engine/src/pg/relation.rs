//! Which file holds which blocks of which relation.
//!
//! A relation's fork is cut into files of 1 GiB (`relseg_size` blocks): `16384`, `16384.1`, `16384_vm`. Blocks
//! are numbered over the whole fork, and that number goes into every page's checksum; a block number within
//! its file is never passed around.
//!
//! Only a name that PostgreSQL itself would have made is a relation file. Whatever differs (`0017`, `16384~`,
//! `16384.01`, `t3`) is an ordinary file: taken for pages it would be diffed, checked and truncated by rules
//! that are not its own. Names are parsed to numbers, so there is exactly one text for each value.
//!
//! PostgreSQL: `src/backend/storage/file/reinit.c`, `parse_filename_for_nontemp_relation` (the strict rule of
//! 17+, which refuses nothing that 13 to 16 create); `src/backend/storage/file/fd.c`,
//! `looks_like_temp_rel_name`; `src/common/relpath.c`, `GetRelationPath`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::bytes::canonical_decimal;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u32);

        impl $name {
            /// The one with this number.
            pub const fn new(number: u32) -> Self {
                Self(number)
            }

            /// Its number.
            pub const fn as_u32(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// A block of a fork, counted over the whole fork from 0.
    BlockNumber
}
number! {
    /// A file of a fork, counted from 0; only those from 1 on show in the name.
    SegmentNumber
}
number! {
    /// A tablespace's OID.
    TablespaceOid
}
number! {
    /// A database's OID; 0 stands for the catalogs that all databases share.
    DatabaseOid
}
number! {
    /// A relation's file number; a rewrite of the table changes it, so it is not the table's OID.
    RelFileNumber
}

impl BlockNumber {
    /// The block `count` further on; `None` past the last block a fork can have.
    pub fn checked_add(self, count: u32) -> Option<BlockNumber> {
        self.0.checked_add(count).map(BlockNumber)
    }
}

impl TablespaceOid {
    /// `pg_default`, the directory `base`.
    pub const DEFAULT: TablespaceOid = TablespaceOid(1663);
    /// `pg_global`, the directory `global`.
    pub const GLOBAL: TablespaceOid = TablespaceOid(1664);
}

impl DatabaseOid {
    /// The shared catalogs.
    pub const SHARED: DatabaseOid = DatabaseOid(0);
}

/// How many blocks a relation's file holds before the next one begins (`relseg_size` in pg_control).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlocksPerSegment(u32);

impl BlocksPerSegment {
    /// 1 GiB of 8 KB blocks, the default.
    pub const DEFAULT: BlocksPerSegment = BlocksPerSegment(131_072);

    /// `None` for zero.
    pub fn new(count: u32) -> Option<Self> {
        (count > 0).then_some(Self(count))
    }

    /// The number of blocks.
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The fork's block with which `segment` begins; `None` where no fork reaches.
    pub fn first_block(self, segment: SegmentNumber) -> Option<BlockNumber> {
        segment.0.checked_mul(self.as_u32()).map(BlockNumber)
    }

    /// The file in which `block` lies.
    pub fn segment_of(self, block: BlockNumber) -> SegmentNumber {
        SegmentNumber(block.0 / self.0)
    }
}

/// Where a relation's storage is: tablespace, database, file number. Printed `1663/5/16384`.
///
/// PostgreSQL: `src/include/storage/relfilelocator.h`, `RelFileLocator` (`RelFileNode` up to 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelFileLocator {
    /// The tablespace.
    pub spc: TablespaceOid,
    /// The database.
    pub db: DatabaseOid,
    /// The relation within them.
    pub rel: RelFileNumber,
}

impl fmt::Display for RelFileLocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.spc, self.db, self.rel)
    }
}

/// One of the up to four files-of-blocks that make a relation.
///
/// PostgreSQL: `src/include/common/relpath.h`, `ForkNumber`; the order is that of its numbers, 0 to 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForkNumber {
    /// The data.
    Main,
    /// The free space map.
    Fsm,
    /// The visibility map.
    Vm,
    /// What an unlogged relation is reset to after a crash.
    Init,
}

impl ForkNumber {
    /// All of them, in PostgreSQL's order.
    pub const ALL: [ForkNumber; 4] = [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];

    /// The fork with PostgreSQL's number, as WAL and WAL summaries write it.
    pub fn from_number(number: u32) -> Option<ForkNumber> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    fn name(self) -> &'static str {
        match self {
            ForkNumber::Main => "main",
            ForkNumber::Fsm => "fsm",
            ForkNumber::Vm => "vm",
            ForkNumber::Init => "init",
        }
    }
}

impl fmt::Display for ForkNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One file of a permanent or unlogged relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// The relation.
    pub locator: RelFileLocator,
    /// Its fork.
    pub fork: ForkNumber,
    /// The file of that fork.
    pub segment: SegmentNumber,
}

impl RelationFile {
    /// Reads a path relative to the data directory; `None` if it is no relation's file.
    ///
    /// `tablespace_version_dir` is the directory that this cluster uses in every tablespace
    /// (`PG_15_202209061`); the files of another major version below the same location are not ours.
    pub fn parse_path(path: &[u8], tablespace_version_dir: &str) -> Option<RelationFile> {
        let mut parts = path.split(|&byte| byte == b'/');
        let (spc, db) = match parts.next()? {
            b"global" => (TablespaceOid::GLOBAL, DatabaseOid::SHARED),
            b"base" => (TablespaceOid::DEFAULT, DatabaseOid(canonical_decimal(parts.next()?)?)),
            b"pg_tblspc" => {
                let spc = TablespaceOid(canonical_decimal(parts.next()?)?);
                if parts.next()? != tablespace_version_dir.as_bytes() {
                    return None;
                }
                (spc, DatabaseOid(canonical_decimal(parts.next()?)?))
            }
            _ => return None,
        };
        let (rel, fork, segment) = parse_relation_file_name(parts.next()?)?;
        let locator = RelFileLocator { spc, db, rel };
        parts.next().is_none().then_some(RelationFile { locator, fork, segment })
    }
}

/// Reads a file name such as `16384_vm.1`; `None` if PostgreSQL would not have made it.
///
/// PostgreSQL: `src/backend/storage/file/reinit.c`, `parse_filename_for_nontemp_relation`.
pub fn parse_relation_file_name(name: &[u8]) -> Option<(RelFileNumber, ForkNumber, SegmentNumber)> {
    let (stem, segment) = match split_at_byte(name, b'.') {
        (stem, None) => (stem, SegmentNumber(0)),
        (stem, Some(digits)) => (stem, SegmentNumber(canonical_decimal(digits)?)),
    };
    let (number, fork) = match split_at_byte(stem, b'_') {
        (number, None) => (number, ForkNumber::Main),
        (number, Some(suffix)) => (number, fork_of_suffix(suffix)?),
    };
    Some((RelFileNumber(canonical_decimal(number)?), fork, segment))
}

/// Whether this is the file of a temporary relation (`t3_16384`), which no backup holds.
///
/// PostgreSQL: `src/backend/storage/file/fd.c`, `looks_like_temp_rel_name`.
pub fn is_temp_relation_file_name(name: &[u8]) -> bool {
    let is_number = |digits: &[u8]| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    let Some(rest) = name.strip_prefix(b"t") else { return false };
    let (stem, segment) = split_at_byte(rest, b'.');
    let (backend, rest) = split_at_byte(stem, b'_');
    let Some(rest) = rest else { return false };
    let (relation, suffix) = split_at_byte(rest, b'_');
    is_number(backend)
        && is_number(relation)
        && suffix.is_none_or(|suffix| fork_of_suffix(suffix).is_some())
        && segment.is_none_or(is_number)
}

fn fork_of_suffix(suffix: &[u8]) -> Option<ForkNumber> {
    ForkNumber::ALL.into_iter().find(|&fork| fork != ForkNumber::Main && fork.name().as_bytes() == suffix)
}

/// What stands before the first `separator`, and what after it if there is one.
fn split_at_byte(text: &[u8], separator: u8) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|&byte| byte == separator) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VERSION_DIR: &str = "PG_15_202209061";

    fn parsed(path: &str) -> Option<String> {
        RelationFile::parse_path(path.as_bytes(), VERSION_DIR)
            .map(|file| format!("{} {} {}", file.locator, file.fork, file.segment))
    }

    #[test]
    fn the_three_homes_of_relations_are_told_apart() {
        assert_eq!(parsed("base/5/16384").as_deref(), Some("1663/5/16384 main 0"));
        assert_eq!(parsed("base/5/16384.1").as_deref(), Some("1663/5/16384 main 1"));
        assert_eq!(parsed("global/1262_fsm").as_deref(), Some("1664/0/1262 fsm 0"));
        assert_eq!(parsed("pg_tblspc/16400/PG_15_202209061/5/16401_vm.17").as_deref(), Some("16400/5/16401 vm 17"));
        assert_eq!(parsed("base/5/4294967295_init.4294967295").as_deref(), Some("1663/5/4294967295 init 4294967295"));
    }

    #[test]
    fn a_path_that_is_not_exactly_a_relation_is_an_ordinary_file() {
        let ordinary = [
            "",
            "/",
            "base",
            "base/5",
            "base/5/",
            "base/05/1",
            "base/5/0",
            "base/5/0017",
            "base/5/17.0",
            "base/5/17.01",
            "base/5/17.",
            "base/5/17_",
            "base/5/17_main",
            "base/5/17_fsmx",
            "base/5/17_fsm_vm",
            "base/5/17.1_fsm",
            "base/5/17.1.2",
            "base/5/4294967296",
            "base/5/17.4294967296",
            "base/5/+17",
            "base/5/17/18",
            "base/5/17/",
            "base//17",
            "./base/5/17",
            "/base/5/17",
            "base/5/t3_17",
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "base/pgsql_tmp/17",
            "base/5/17 ",
            "base/5/17\n",
            "global/5/17",
            "global/pg_control",
            "pg_tblspc/16400/PG_16_202307071/5/17",
            "pg_tblspc/16400/5/17",
            "pg_tblspc/x/PG_15_202209061/5/17",
            "pg_tblspc/16400/PG_15_202209061/17",
            "pg_xact/0000",
            "pg_multixact/offsets/17",
        ];
        for path in ordinary {
            assert_eq!(parsed(path), None, "{path:?}");
        }
    }

    #[test]
    fn temporary_relations_are_known_by_their_exact_name() {
        for name in ["t3_16384", "t3_16384_fsm", "t03_0.1", "t3_16384_vm.10", "t3_99999999999999999999.0"] {
            assert!(is_temp_relation_file_name(name.as_bytes()), "{name:?}");
        }
        for name in [
            "t",
            "t3",
            "t3_",
            "t_3",
            "t3_x",
            "t3_1_",
            "t3_1_main",
            "t3_1.",
            "t3_1_fsm.x",
            "3_1",
            "t3_1.1.1",
            "t3_1 ",
            "tt3_1",
        ] {
            assert!(!is_temp_relation_file_name(name.as_bytes()), "{name:?}");
        }
    }

    #[test]
    fn block_numbers_at_the_borders_of_segments_belong_to_the_right_file() {
        let size = BlocksPerSegment::DEFAULT;
        let segments = [0, 65_535, 65_536, 131_071, 131_072, 131_073, u32::MAX]
            .map(|block| size.segment_of(BlockNumber::new(block)).as_u32());
        assert_eq!(segments, [0, 0, 0, 0, 1, 1, 32_767]);
        assert_eq!(size.first_block(SegmentNumber::new(1)), Some(BlockNumber::new(131_072)));
        assert_eq!(size.first_block(SegmentNumber::new(32_767)), Some(BlockNumber::new(4_294_836_224)));
        assert_eq!(size.first_block(SegmentNumber::new(32_768)), None);
    }

    #[test]
    fn forks_have_postgresqls_numbers() {
        let names: Vec<_> = (0..5).map(|n| ForkNumber::from_number(n).map(|fork| fork.to_string())).collect();
        assert_eq!(names, [Some("main".into()), Some("fsm".into()), Some("vm".into()), Some("init".into()), None]);
    }

    proptest! {
        #[test]
        fn a_name_that_parses_is_the_only_text_of_its_value(name in "[0-9]{0,11}(_(fsm|vm|init|x))?(\\.[0-9]{0,11})?") {
            if let Some((rel, fork, segment)) = parse_relation_file_name(name.as_bytes()) {
                let suffix = if fork == ForkNumber::Main { String::new() } else { format!("_{fork}") };
                let number = if segment.as_u32() == 0 { String::new() } else { format!(".{segment}") };
                prop_assert_eq!(format!("{rel}{suffix}{number}"), name);
            }
        }

        #[test]
        fn no_bytes_make_the_name_parsers_panic(name in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse_relation_file_name(&name);
            let _ = is_temp_relation_file_name(&name);
            let _ = RelationFile::parse_path(&name, VERSION_DIR);
        }

        #[test]
        fn a_relation_is_never_taken_for_a_temporary_one(
            name in "t?[0-9]{1,3}(_[0-9]{1,3})?(_(fsm|vm|init))?(\\.[0-9]{1,2})?",
        ) {
            let is_relation = parse_relation_file_name(name.as_bytes()).is_some();
            prop_assert!(!(is_relation && is_temp_relation_file_name(name.as_bytes())));
        }
    }
}
