//! Which blocks of which relations may have changed in a part of the log.
//!
//! For each relation there is a set of *marked* blocks, those that a record names, and a *limit*, the smallest length that the relation had;
//! for each database that was created or dropped as a whole, that it was. The rule is the same for all sources of a map:
//!
//! * a block that is marked is read;
//! * a block at or beyond the limit is read, whether marked or not: a truncated relation grows again by blocks that are in no record;
//! * a block at or beyond the length that the file had in the parent is read, for the same reason ([`ChangeMap::runs`] asks for that length);
//! * a relation of a database that was created or dropped as a whole is read, all of it.
//!
//! Limits only ever fall and marks are never erased, so the union of two maps is the same in any order, and it does not matter in which order segments,
//! summaries or timelines are read. (PostgreSQL's own tables erase the marks beyond a limit that is set after them, and
//! so lose those that were made after it when summaries are read newest timeline first.)
//!
//! Only main forks are in it. Visibility maps are changed by truncations and, by some versions, by deletions without a trace in the log; free space
//! maps always are; init forks are tiny. [`ChangeMap::is_read`] and [`ChangeMap::runs`] say of all of them: read everything.
//!
//! A map knows the cluster and the ranges of the log that it speaks for. It says nothing about relations of which the log of those ranges
//! says nothing, and so must not be asked about a parent whose start lies outside of them: [`Coverage::check`] comes first.
//!
//! # The object
//!
//! ```text
//! "pgstrata changes 1\n"
//! a zstd frame of postcard values, back to back:
//!   Header   { system_identifier: u64, ranges: Vec<(timeline: u32, start: u64, end: u64)>,
//!              databases: Vec<(spc: u32, db: u32)>, relation_count: u32 }
//!   Relation { locator: (spc: u32, db: u32, rel: u32), limit: Option<u32>, groups: Vec<Group> }   relation_count times
//!     Group  { number: u16, blocks: 0 Gaps(Vec<u16>) | 1 Bitmap(Vec<u8>) }
//! 32 bytes: BLAKE3 of the object's name, a zero byte, and everything before
//! ```
//!
//! A group holds 65,536 blocks. `Gaps` is the first block's offset in it, then the distance from each block to the next, up to 4,096 blocks; `Bitmap` is
//! 8,192 bytes, least significant bit first, for more. Ranges, databases, relations and groups ascend, so equal maps are equal objects.
//! A reader takes at most 1 GiB of values and 2^24 relations, and refuses whatever a writer would not have written.

mod blocks;
mod object;
#[cfg(test)]
mod tests;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use blocks::BlockSet;
pub(crate) use object::sealed as sealed_changes;

use super::coverage::Coverage;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    BlockNumber, BlocksPerSegment, DatabaseOid, ForkNumber, RelFileLocator, RelationFile, SystemIdentifier,
    TablespaceOid, WalRange,
};

/// Blocks that may have changed, of a part of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeMap {
    system_identifier: SystemIdentifier,
    coverage: Coverage,
    /// Created or dropped as a whole.
    databases: BTreeSet<(TablespaceOid, DatabaseOid)>,
    relations: HashMap<RelFileLocator, RelationChanges>,
}

/// What happened to a relation's main fork.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RelationChanges {
    limit: Option<BlockNumber>,
    marked: BlockSet,
}

/// How many blocks a file has, and had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLength {
    /// Blocks in the file now; a last one that is not whole counts.
    pub block_count: u32,
    /// Whole blocks of it in the parent; 0 if the parent did not have the file.
    pub parent_block_count: u32,
}

/// Blocks in a row, counted over the whole fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The first.
    pub start: BlockNumber,
    /// How many; at least one.
    pub count: u32,
}

impl ChangeMap {
    /// A map of this cluster that speaks for nothing yet.
    pub fn new(system_identifier: SystemIdentifier) -> Self {
        let (databases, relations) = (BTreeSet::new(), HashMap::new());
        Self { system_identifier, coverage: Coverage::default(), databases, relations }
    }

    /// The cluster whose log it is of.
    pub fn system_identifier(&self) -> SystemIdentifier {
        self.system_identifier
    }

    /// The ranges of the log that it speaks for.
    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// Says that everything that the log has in `range` is in the map.
    pub fn cover(&mut self, range: WalRange) {
        self.coverage.add(range);
    }

    /// A record names this block; other forks than the main one are not kept.
    pub fn mark(&mut self, locator: RelFileLocator, fork: ForkNumber, block: BlockNumber) {
        if fork == ForkNumber::Main {
            self.relations.entry(locator).or_default().marked.insert(block);
        }
    }

    /// The fork was cut to this length, or made (0) or dropped (0); other forks than the main one are not kept.
    pub fn set_limit(&mut self, locator: RelFileLocator, fork: ForkNumber, limit: BlockNumber) {
        if fork == ForkNumber::Main {
            self.relations.entry(locator).or_default().lower_limit(limit);
        }
    }

    /// All relations of a database in a tablespace were made or dropped without being named.
    pub fn replace_database(&mut self, spc: TablespaceOid, db: DatabaseOid) {
        self.databases.insert((spc, db));
    }

    /// Adds what `other` says; the result does not depend on which is added to which.
    ///
    /// # Errors
    /// Conflict: it is of another cluster.
    pub fn union(&mut self, other: ChangeMap) -> Result<()> {
        if self.system_identifier != other.system_identifier {
            let (ours, theirs) = (self.system_identifier, other.system_identifier);
            let what = format!("changes of cluster {theirs} cannot be added to those of {ours}");
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        self.coverage.union(&other.coverage);
        self.databases.extend(other.databases);
        for (locator, changes) in other.relations {
            match self.relations.entry(locator) {
                Entry::Occupied(mut ours) => ours.get_mut().union(changes),
                Entry::Vacant(place) => drop(place.insert(changes)),
            }
        }
        Ok(())
    }

    /// Whether a block must be read that the parent has.
    pub fn is_read(&self, locator: RelFileLocator, fork: ForkNumber, block: BlockNumber) -> bool {
        let Some(changes) = self.trusted(locator, fork) else { return true };
        changes
            .is_some_and(|changes| changes.limit.is_some_and(|limit| block >= limit) || changes.marked.contains(block))
    }

    /// The blocks of a file that must be read, in order, neighbours in one run.
    pub fn runs(&self, file: RelationFile, size: BlocksPerSegment, len: FileLength) -> impl Iterator<Item = BlockRun> {
        self.runs_within(file, size, len, 0..len.block_count)
    }

    /// Those among the blocks `within`, counted in the file.
    pub fn runs_within(
        &self,
        file: RelationFile,
        size: BlocksPerSegment,
        len: FileLength,
        within: Range<u32>,
    ) -> impl Iterator<Item = BlockRun> {
        let first = u64::from(file.segment.as_u32()) * u64::from(size.as_u32());
        let end = first + u64::from(len.block_count.min(within.end));
        let had = first + u64::from(len.parent_block_count.min(len.block_count));
        let (changes, trusted_to) = match self.trusted(file.locator, file.fork) {
            None => (None, first),
            Some(changes) => {
                let limit = changes.and_then(|changes| changes.limit).map(|limit| u64::from(limit.as_u32()));
                (changes, limit.map_or(had, |limit| limit.clamp(first, had)))
            }
        };
        let mut at = first + u64::from(within.start);
        std::iter::from_fn(move || {
            let marked = changes.and_then(|changes| changes.marked.next_in(at));
            let start = marked.unwrap_or(u64::MAX).min(trusted_to.max(at));
            if start >= end {
                return None;
            }
            let marked_to = changes.map_or(start, |changes| changes.marked.next_out(start));
            at = if marked_to >= trusted_to { end } else { marked_to.min(end) };
            let start_block = BlockNumber::new(u32::try_from(start).ok()?);
            Some(BlockRun { start: start_block, count: u32::try_from(at - start).ok()? })
        })
    }

    /// How many blocks are marked, those at or beyond a limit included.
    pub fn marked_count(&self) -> u64 {
        self.relations.values().map(|changes| changes.marked.len()).sum()
    }

    /// How many relations it says something about by name.
    pub fn relation_count(&self) -> usize {
        self.relations.len()
    }

    /// The databases that were created or dropped as a whole, each with its tablespace.
    pub fn replaced_databases(&self) -> impl Iterator<Item = (TablespaceOid, DatabaseOid)> {
        self.databases.iter().copied()
    }

    /// The relations that it names, in no order, each with its limit.
    pub fn relations(&self) -> impl Iterator<Item = (RelFileLocator, Option<BlockNumber>)> {
        self.relations.iter().map(|(locator, changes)| (*locator, changes.limit))
    }

    /// What is known of a fork; `None` if nothing is to be trusted.
    fn trusted(&self, locator: RelFileLocator, fork: ForkNumber) -> Option<Option<&RelationChanges>> {
        let trusted = fork == ForkNumber::Main && !self.databases.contains(&(locator.spc, locator.db));
        trusted.then(|| self.relations.get(&locator))
    }
}

impl RelationChanges {
    fn lower_limit(&mut self, limit: BlockNumber) {
        self.limit = Some(self.limit.map_or(limit, |known| known.min(limit)));
    }

    fn union(&mut self, other: RelationChanges) {
        if let Some(limit) = other.limit {
            self.lower_limit(limit);
        }
        self.marked.union(other.marked);
    }
}
