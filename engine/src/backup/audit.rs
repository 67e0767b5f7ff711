//! `--audit`: whether a detector would have missed anything.
//!
//! Everything is read, as by a scan; of each block that differs from the parent's, the detector is asked whether it would have had it read. What it
//! would not is noted, with the likely cause. Nothing is lost by that: what was read is what is stored.
//!
//! A block that changed after the backup began is no miss: its record is beyond the range, and in the backup's own WAL. Its LSN tells, unless
//! only hints were set in it.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::pg::{
    BlockNumber, BlocksPerSegment, ControlFile, Lsn, PageCheck, RelationFile, check_page, is_zero, page_lsn,
};

/// How the contents of an SP-GiST index's first page begin (`spgist_private.h`, `SPGIST_MAGIC_NUMBER`).
const SPGIST_MAGIC: [u8; 4] = 0xBA0B_ABEE_u32.to_le_bytes();
/// Blocks that are named at most.
const MAX_MISSED: usize = 1000;

/// Why a block changed without a detector knowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Hint bits, in a cluster that does not log them: nothing that a restore would miss.
    HintBits,
    /// SP-GiST's first page, where it remembers free space in no record: nothing that a restore would miss.
    FreeSpaceCache,
    /// The page says that it was changed in the log's range, and the detector does not know of it.
    Untracked,
    /// The bytes changed, the page's LSN did not, and the log would know: written by something else than PostgreSQL, or an old version that came back.
    LostWrite,
    /// The bytes changed and the checksum is wrong.
    BitRot,
}

impl Cause {
    /// For people.
    pub fn explanation(self) -> &'static str {
        match self {
            Cause::HintBits => "hint bits, which this cluster does not log",
            Cause::FreeSpaceCache => "SP-GiST's memory of free space, which is never logged",
            Cause::Untracked => "its page says that it was changed, which the detector did not know",
            Cause::LostWrite => "its bytes changed but its LSN did not: a lost write, or a write past the log",
            Cause::BitRot => "its bytes changed and its checksum is wrong: bit rot",
        }
    }
}

/// A block that a detector would have missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissedBlock {
    /// `tablespace/database/relation`, as PostgreSQL numbers them.
    pub relation: String,
    /// The fork.
    pub fork: String,
    /// The block in the fork.
    pub block: u32,
    /// The page's LSN.
    pub lsn: Lsn,
    /// The likely cause.
    pub cause: Cause,
}

/// What an audit found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditReport {
    /// The detector that was audited.
    pub detector: String,
    /// How many blocks it would have missed.
    pub missed_count: u64,
    /// How many of them by more than hints.
    pub serious_count: u64,
    /// The first of them.
    pub missed: Vec<MissedBlock>,
}

/// An audit that goes on.
#[derive(Debug)]
pub(super) struct Audit {
    /// Where the log's range begins and where the backup began.
    range: (Lsn, Lsn),
    has_checksums: bool,
    logs_hints: bool,
    report: Mutex<AuditReport>,
}

impl Audit {
    /// Of a detector, over the log from the parent's start to this one.
    pub fn new(detector: String, parent_start: Lsn, start: Lsn, control: &ControlFile) -> Self {
        let has_checksums = control.has_data_checksums();
        let report = AuditReport { detector, missed_count: 0, serious_count: 0, missed: Vec::new() };
        Self {
            range: (parent_start, start),
            has_checksums,
            logs_hints: has_checksums || control.wal_log_hints,
            report: Mutex::new(report),
        }
    }

    /// Whether the detector has named all that changed so far.
    pub fn missed_nothing(&self) -> bool {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).missed_count == 0
    }

    /// A block that changed, of which the detector knew nothing.
    pub fn note(&self, file: RelationFile, segment: BlocksPerSegment, block: BlockNumber, page: &[u8]) {
        let in_fork = file.segment.as_u32().wrapping_mul(segment.as_u32()).wrapping_add(block.as_u32());
        let Some(cause) = self.cause(page, BlockNumber::new(in_fork)) else { return };
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.missed_count += 1;
        report.serious_count += u64::from(!matches!(cause, Cause::HintBits | Cause::FreeSpaceCache));
        if report.missed.len() < MAX_MISSED {
            let (relation, fork, lsn) = (file.locator.to_string(), file.fork.to_string(), page_lsn(page));
            report.missed.push(MissedBlock { relation, fork, block: in_fork, lsn, cause });
        }
    }

    /// Why it changed; `None` if it did after the backup began.
    fn cause(&self, page: &[u8], block: BlockNumber) -> Option<Cause> {
        let (lsn, (parent_start, start)) = (page_lsn(page), self.range);
        let zero = is_zero(page);
        let damaged = !zero && self.has_checksums && !matches!(check_page(page, block), PageCheck::Valid);
        match () {
            () if damaged => Some(Cause::BitRot),
            () if page.get(24..28) == Some(&SPGIST_MAGIC) => Some(Cause::FreeSpaceCache),
            () if lsn >= start => None,
            () if lsn >= parent_start => Some(Cause::Untracked),
            () if zero || self.logs_hints => Some(Cause::LostWrite),
            () => Some(Cause::HintBits),
        }
    }

    /// What was found, by relation and block.
    pub fn finish(self) -> AuditReport {
        let mut report = self.report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.missed.sort_by(|a, b| (&a.relation, &a.fork, a.block).cmp(&(&b.relation, &b.fork, b.block)));
        report
    }
}
