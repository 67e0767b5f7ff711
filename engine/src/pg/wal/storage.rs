//! What a record does to relations and databases besides the blocks that it names.
//!
//! Files are made, cut and removed by records that refer to no block:
//!
//! | resource manager | record | main data |
//! |---|---|---|
//! | 2 storage | 0x10 create | spc, db, rel, fork |
//! | | 0x20 truncate | blocks, spc, db, rel, flags (1 main fork, 2 visibility map, 4 free space map) |
//! | 1 transaction | low 3 bits of the kind 0 commit, 2 abort, 3 and 4 the same of a prepared one | i64 time; the rest as its flags say |
//! | 4 database | 13, 14: 0x00 create, 0x10 drop | db, spc, ...; db, n, n times spc |
//! | | 15+: 0x00 create by copying files, 0x10 create by logging blocks, 0x20 drop | the same |
//!
//! All but the time are four bytes each. After a commit's or an abort's time stand, if kind bit 0x80 is set, 4 bytes of flags, then what they announce: 1 database
//! and tablespace; 2 subtransactions (n, n times 4 bytes); 4 dropped relations (n, n times spc, db, rel). What follows is of no concern here. A
//! prepared transaction drops its relations when it is committed or rolled back, in that record.
//!
//! How much the log tells (`wal_level`) is in the record of changed parameters, and since 17 also in those of a checkpoint, its redo
//! point, and the end of recovery.
//!
//! A tablespace's creation and removal touch no relation, and a relation map is a small file that is compared as a whole.
//!
//! A record that changes files in a way that its blocks do not tell carries flag 0x01. One with that flag and of a kind that is not listed here is an error, as is one that is too
//! short: whoever follows changes must not go on. pg_rewind does the same.
//!
//! PostgreSQL: `src/include/catalog/storage_xlog.h`; `src/include/access/xact.h`, `xactdesc.c`, `ParseCommitRecord`;
//! `src/include/commands/dbcommands_xlog.h`; `src/backend/postmaster/walsummarizer.c` (17+); `src/bin/pg_rewind/parsexlog.c`, `extractPageInfo`.

use super::super::bytes::u32_at;
use super::super::{BlockNumber, DatabaseOid, ForkNumber, MajorVersion, RelFileLocator, TablespaceOid, WalLevel};
use super::record::{DecodedRecord, LOCATOR_LEN, locator_at};
use crate::error::{Error, ErrorKind, Result};

const XLOG: u8 = 0;
const TRANSACTION: u8 = 1;
const STORAGE: u8 = 2;
const DATABASE: u8 = 4;

/// PostgreSQL: `XLR_SPECIAL_REL_UPDATE`.
const CHANGES_FILES: u8 = 0x01;
const KIND_MASK: u8 = 0xF0;

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_END_OF_RECOVERY: u8 = 0x90;
const XLOG_CHECKPOINT_REDO: u8 = 0xE0;

const STORAGE_CREATE: u8 = 0x10;
const STORAGE_TRUNCATE: u8 = 0x20;
const TRUNCATES_MAIN: u32 = 1;

const TRANSACTION_MASK: u8 = 0x70;
const TRANSACTION_HAS_FLAGS: u8 = 0x80;
/// Commit, abort, and both of a prepared transaction.
const TRANSACTION_ENDS: [u8; 4] = [0x00, 0x20, 0x30, 0x40];
const HAS_DATABASE: u32 = 1;
const HAS_SUBTRANSACTIONS: u32 = 2;
const HAS_RELATIONS: u32 = 4;

/// What a record says of relations or databases as a whole, or of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageChange {
    /// A fork was made.
    Created {
        /// The relation.
        locator: RelFileLocator,
        /// Its fork.
        fork: ForkNumber,
    },
    /// The main fork was cut.
    Truncated {
        /// The relation.
        locator: RelFileLocator,
        /// The first block that is gone.
        limit: BlockNumber,
    },
    /// All forks were removed.
    Dropped {
        /// The relation.
        locator: RelFileLocator,
    },
    /// All relations of a database in a tablespace were made or removed without being named.
    DatabaseReplaced {
        /// The tablespace.
        spc: TablespaceOid,
        /// The database.
        db: DatabaseOid,
    },
    /// How much the log tells.
    Level(WalLevel),
}

impl DecodedRecord<'_> {
    /// Tells `each` what the record, written by `major`, does besides changing the blocks that it refers to.
    ///
    /// # Errors
    /// Unsupported, with the LSN: it changes files in a way that is not known.
    pub fn storage_changes(&self, major: MajorVersion, each: impl FnMut(StorageChange)) -> Result<()> {
        let (rmgr, info) = (self.record.rmgr(), self.record.info());
        if rmgr > DATABASE && info & CHANGES_FILES == 0 {
            return Ok(());
        }
        let kind = info & KIND_MASK;
        let data = self.main_data;
        let understood = match rmgr {
            XLOG => wal_level(kind, data, major, each),
            TRANSACTION => dropped_by_transaction(kind, data, each),
            STORAGE => storage(kind, data, each),
            DATABASE => database(kind, data, major, each),
            _ => Some(Known::No),
        };
        match understood {
            Some(Known::Yes) => Ok(()),
            Some(Known::No) if info & CHANGES_FILES == 0 => Ok(()),
            found => {
                let why =
                    if found.is_none() { "does not read as it should" } else { "changes files in an unknown way" };
                let what = format!("the WAL record of resource manager {rmgr}, kind {info:02X}, {why}");
                let error = Error::new(ErrorKind::Unsupported, what).at(format!("WAL {}", self.record.lsn));
                Err(error.hint("changes after it can be found by reading everything (--detect scan)"))
            }
        }
    }
}

/// Whether a record is of a kind that is looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Yes,
    No,
}

/// `None` here and below: it does not read as it should.
fn wal_level(kind: u8, data: &[u8], major: MajorVersion, mut each: impl FnMut(StorageChange)) -> Option<Known> {
    let at = match (kind, major.as_u32()) {
        (XLOG_PARAMETER_CHANGE, _) => 20,
        (XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE, 17..) => 20,
        (XLOG_END_OF_RECOVERY, 17..) => 16,
        (XLOG_CHECKPOINT_REDO, 17..) => 0,
        _ => return Some(Known::No),
    };
    each(StorageChange::Level(WalLevel::from_number(u32_at(data, at)?)?));
    Some(Known::Yes)
}

fn storage(kind: u8, data: &[u8], mut each: impl FnMut(StorageChange)) -> Option<Known> {
    match kind {
        STORAGE_CREATE => {
            let fork = ForkNumber::from_number(u32_at(data, LOCATOR_LEN)?)?;
            each(StorageChange::Created { locator: locator_at(data, 0)?, fork });
        }
        STORAGE_TRUNCATE => {
            let (limit, locator) = (BlockNumber::new(u32_at(data, 0)?), locator_at(data, 4)?);
            if u32_at(data, 4 + LOCATOR_LEN)? & TRUNCATES_MAIN != 0 {
                each(StorageChange::Truncated { locator, limit });
            }
        }
        _ => return Some(Known::No),
    }
    Some(Known::Yes)
}

fn dropped_by_transaction(kind: u8, data: &[u8], mut each: impl FnMut(StorageChange)) -> Option<Known> {
    if !TRANSACTION_ENDS.contains(&(kind & TRANSACTION_MASK)) {
        return Some(Known::No);
    }
    if kind & TRANSACTION_HAS_FLAGS == 0 {
        return Some(Known::Yes);
    }
    let flags = u32_at(data, 8)?;
    let mut at = 12;
    if flags & HAS_DATABASE != 0 {
        at += 8;
    }
    if flags & HAS_SUBTRANSACTIONS != 0 {
        at = skip(at, count_at(data, at)?, 4)?;
    }
    data.get(at..)?;
    if flags & HAS_RELATIONS != 0 {
        let count = count_at(data, at)?;
        let relations = data.get(at + 4..skip(at, count, LOCATOR_LEN)?)?;
        for relation in relations.chunks_exact(LOCATOR_LEN) {
            each(StorageChange::Dropped { locator: locator_at(relation, 0)? });
        }
    }
    Some(Known::Yes)
}

fn database(kind: u8, data: &[u8], major: MajorVersion, mut each: impl FnMut(StorageChange)) -> Option<Known> {
    let db = DatabaseOid::new(u32_at(data, 0)?);
    let mut replaced = |at| {
        each(StorageChange::DatabaseReplaced { spc: TablespaceOid::new(u32_at(data, at)?), db });
        Some(())
    };
    let drop_kind = if major.as_u32() < 15 { 0x10 } else { 0x20 };
    match kind {
        kind if kind == drop_kind => {
            let count = count_at(data, 4)?;
            (0..count).try_for_each(|index| replaced(skip(4, index, 4)?))?;
        }
        0x00 | 0x10 => replaced(4)?,
        _ => return None,
    }
    Some(Known::Yes)
}

fn count_at(data: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32_at(data, at)?).ok()
}

/// Past a count at `at` and as many items of `item_len` bytes.
fn skip(at: usize, count: usize, item_len: usize) -> Option<usize> {
    count.checked_mul(item_len)?.checked_add(at + 4)
}

#[cfg(test)]
mod tests;
