//! Which blocks changed, from the records of the log.
//!
//! Every record that changes a page of a permanent relation names it, whatever resource manager wrote it, those of extensions included. What records
//! say besides is which files were made, cut and dropped; see [`StorageChange`]. So a [`ChangeMap`] of all records that begin in a range, and
//! the parent's lengths, is all that is needed to know which blocks of main forks may differ from those at the range's start.
//!
//! What is in no record: hint bits of a cluster without checksums and without `wal_log_hints`, and what SP-GiST keeps on its first page about free
//! space. Both are lost in a crash, too; a backup that takes such a page from the parent is right, though not byte for byte the same.
//!
//! What goes wrong, and makes the log of no use, with its LSN: a stretch with `wal_level = minimal`, where bulk loads are in no record; a record that changes files in a way that is
//! not known; a record that is not understood. The first record of such a stretch may lie before the range, in 13 to 16, where only
//! a change of the level is logged: so [`WalChanges::new`] asks for the level at the beginning.

use super::ChangeMap;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    BlockNumber, BlockSize, ForkNumber, Lsn, MajorVersion, RecordDecoder, StorageChange, WalLevel, WalRange, WalRecord,
    WalSource,
};

const DROPPED: BlockNumber = BlockNumber::new(0);

/// Gathers what records change.
#[derive(Debug)]
pub struct WalChanges {
    major: MajorVersion,
    decoder: RecordDecoder,
    map: ChangeMap,
}

impl WalChanges {
    /// Changes of the cluster that writes `source`, from a position at which it had `level`: that of the parent's `pg_control`, and
    /// more than minimal where the parent was taken from a running server.
    ///
    /// # Errors
    /// Unsupported: the level is minimal.
    pub fn new(source: &WalSource, block_size: BlockSize, level: WalLevel) -> Result<WalChanges> {
        if level == WalLevel::Minimal {
            return Err(incomplete("at the start"));
        }
        Ok(WalChanges {
            major: source.major,
            decoder: RecordDecoder::new(source.major, block_size),
            map: ChangeMap::new(source.system_identifier),
        })
    }

    /// Adds what a record changes. Their order is of no matter, but none may be left out.
    ///
    /// # Errors
    /// Unsupported, with the LSN: what changed cannot be told from this log.
    pub fn add(&mut self, record: WalRecord<'_>) -> Result<()> {
        let decoded = self.decoder.decode(record)?;
        let map = &mut self.map;
        for reference in decoded.blocks {
            map.mark(reference.locator, reference.fork, reference.block);
        }
        let mut minimal = false;
        decoded.storage_changes(self.major, |change| match change {
            StorageChange::Created { locator, fork } => map.set_limit(locator, fork, DROPPED),
            StorageChange::Truncated { locator, limit } => map.set_limit(locator, ForkNumber::Main, limit),
            StorageChange::Dropped { locator } => map.set_limit(locator, ForkNumber::Main, DROPPED),
            StorageChange::DatabaseReplaced { spc, db } => map.replace_database(spc, db),
            StorageChange::Level(level) => minimal = level == WalLevel::Minimal,
        })?;
        if minimal { Err(incomplete_at(record.lsn)) } else { Ok(()) }
    }

    /// The map of all records that begin in `ranges`, which were all added.
    pub fn finish(mut self, ranges: impl IntoIterator<Item = WalRange>) -> ChangeMap {
        ranges.into_iter().for_each(|range| self.map.cover(range));
        self.map
    }
}

fn incomplete_at(lsn: Lsn) -> Error {
    incomplete(&format!("from {lsn} on")).at(format!("WAL {lsn}"))
}

fn incomplete(from: &str) -> Error {
    let what = format!("the log does not tell every change: wal_level is minimal {from}");
    Error::new(ErrorKind::Unsupported, what).hint("changes can be found by reading everything (--detect scan)")
}

#[cfg(test)]
mod tests;
