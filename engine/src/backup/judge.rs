//! Pages with a wrong checksum: torn, repaired by replay, or damaged.
//!
//! A page that is read while the server writes it comes half old, half new. Read again, it is whole. What stays wrong is one of two:
//! its LSN lies within the backup, then replay writes its full image over whatever is there; or it does not, then the page is
//! damaged on disk. Damage is stored as it is and reported, because one bad page must not stop all backups, and because what is there may be all that
//! is left. A random header can claim any LSN, so a page beyond the start is kept in mind and judged again when the end is known.
//!
//! PostgreSQL: `src/backend/backup/basebackup.c`, `read_file_data_into_buffer`, `verify_page_checksum`.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::pg::{BlockNumber, BlocksPerSegment, Lsn, PageCheck, PageFault, RelationFile, check_page, page_lsn};

/// How often a page is read again, and how long it may take the server to finish writing it: 1, 2, 4, ... ms.
const READS: u32 = 7;
/// After so many pages that stayed wrong, the disk is to blame, not a write that goes on: further ones are read again once.
const PATIENCE: usize = 64;
/// Suspects that are kept at most.
const MAX_SUSPECTS: usize = 100_000;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is as it was read first.
    AsRead,
    /// It was read again, and may be another now.
    ReadAgain,
}

/// A page whose checksum stayed wrong.
#[derive(Clone, Debug)]
pub(super) struct Suspect {
    /// Path of its file.
    pub path: Vec<u8>,
    /// Its relation.
    pub relation: RelationFile,
    /// Its block in the fork.
    pub block: BlockNumber,
    /// What is wrong.
    pub fault: PageFault,
    lsn: Lsn,
}

/// Judges the pages of a cluster that has checksums.
#[derive(Debug)]
pub(super) struct Judge {
    /// Where the backup began; `None` for a cluster that is stopped, where nothing repairs a page.
    start: Option<Lsn>,
    blocks_per_segment: BlocksPerSegment,
    suspects: Mutex<Vec<Suspect>>,
}

impl Judge {
    /// A judge of pages in a backup that began at `start`.
    pub fn new(start: Option<Lsn>, blocks_per_segment: BlocksPerSegment) -> Self {
        Self { start, blocks_per_segment, suspects: Mutex::default() }
    }

    /// Judges the page of the file's block `in_file`; `read` reads it again and says how many bytes there were.
    pub fn judge(
        &self,
        path: &[u8],
        relation: RelationFile,
        in_file: BlockNumber,
        page: &mut [u8],
        mut read: impl FnMut(&mut [u8]) -> Result<usize>,
    ) -> Result<Verdict> {
        let first = self.blocks_per_segment.first_block(relation.segment);
        let Some(block) = first.and_then(|first| first.checked_add(in_file.as_u32())) else {
            return Ok(Verdict::AsRead);
        };
        let PageCheck::Invalid { reason: mut fault } = check_page(page, block) else { return Ok(Verdict::AsRead) };
        for attempt in 0..self.reads() {
            if self.start.is_some() {
                std::thread::sleep(Duration::from_millis(1 << attempt));
            }
            let len = read(page)?;
            if len < page.len() {
                // The file was truncated in the meantime: replay does the same.
                page[len..].fill(0);
                return Ok(Verdict::ReadAgain);
            }
            match check_page(page, block) {
                PageCheck::Invalid { reason } => fault = reason,
                PageCheck::Valid | PageCheck::Zero => return Ok(Verdict::ReadAgain),
            }
        }
        let suspect = Suspect { path: path.to_vec(), relation, block, fault, lsn: page_lsn(page) };
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        if suspects.len() < MAX_SUSPECTS {
            suspects.push(suspect);
        }
        Ok(Verdict::ReadAgain)
    }

    /// How often to read a page again: nobody writes to a stopped cluster.
    fn reads(&self) -> u32 {
        let suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner).len();
        if self.start.is_none() || suspects >= PATIENCE { 1 } else { READS }
    }

    /// The damaged pages, in order: those that replay up to `stop` does not write anew.
    pub fn damaged(self, stop: Lsn) -> Vec<Suspect> {
        let repaired = |lsn: Lsn| self.start.is_some_and(|start| (start..=stop).contains(&lsn));
        let mut damaged = self.suspects.into_inner().unwrap_or_else(PoisonError::into_inner);
        damaged.retain(|suspect| !repaired(suspect.lsn));
        damaged.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
        damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::checksum;

    const START: Lsn = Lsn::new(1000);
    const STOP: Lsn = Lsn::new(2000);

    fn page(lsn: u64, block: u32) -> Vec<u8> {
        let mut page = vec![7; 8192];
        page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        let sum = checksum(&page, BlockNumber::new(block));
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    fn relation(path: &[u8]) -> RelationFile {
        RelationFile::parse_path(path, "PG_15_202209061").unwrap()
    }

    /// Judges `first` where reading again gives `then`; the damaged blocks and the page that is kept.
    fn judged(start: Option<Lsn>, path: &[u8], first: &[u8], then: &[u8]) -> (Vec<u32>, Vec<u8>) {
        let judge = Judge::new(start, BlocksPerSegment::DEFAULT);
        let mut kept = first.to_vec();
        let read = |page: &mut [u8]| {
            page[..then.len()].copy_from_slice(then);
            Ok(then.len())
        };
        judge.judge(path, relation(path), BlockNumber::new(5), &mut kept, read).unwrap();
        (judge.damaged(STOP).iter().map(|suspect| suspect.block.as_u32()).collect(), kept)
    }

    fn spoiled(lsn: u64) -> Vec<u8> {
        let mut page = page(lsn, 5);
        page[5000] ^= 1;
        page
    }

    #[test]
    fn a_torn_page_is_taken_as_it_is_when_the_write_is_done() {
        assert_eq!(judged(Some(START), b"base/1/2", &spoiled(900), &page(950, 5)), (vec![], page(950, 5)));
    }

    #[test]
    fn a_page_that_stays_wrong_is_damaged_unless_replay_repairs_it() {
        for (lsn, damaged) in [(0, true), (999, true), (1000, false), (2000, false), (2001, true), (u64::MAX, true)] {
            let (blocks, kept) = judged(Some(START), b"base/1/2", &spoiled(lsn), &spoiled(lsn));
            assert_eq!(blocks, if damaged { vec![5] } else { vec![] }, "LSN {lsn}");
            assert_eq!(kept, spoiled(lsn));
        }
        assert_eq!(judged(None, b"base/1/2", &spoiled(1500), &spoiled(1500)).0, [5]);
    }

    #[test]
    fn blocks_count_over_the_whole_fork() {
        let right = page(1, 2 * 131_072 + 5);
        assert_eq!(judged(Some(START), b"base/1/2.2", &right, &right).0, [0u32; 0]);
        assert_eq!(judged(Some(START), b"base/1/2.1", &right, &right).0, [131_072 + 5]);
    }

    #[test]
    fn a_page_that_was_cut_off_meanwhile_is_no_damage() {
        let (blocks, kept) = judged(Some(START), b"base/1/2", &spoiled(1), &[]);
        assert_eq!((blocks, kept), (vec![], vec![0; 8192]));
    }
}
