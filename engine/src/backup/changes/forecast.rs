//! What `auto` would find if a backup began now, as far as that can be said without beginning one.
//!
//! The same questions are asked in the same order, of the log as it is now; nothing is waited for, and no log is read but the little of it that proves the
//! parent. What only reading the log shows stays open: a damaged record, a stretch with `wal_level = minimal`. A backup then scans, and says so.
//!
//! That of a standby begins at the last checkpoint that it has replayed, which only the server knows; it may lie before the parent's end, and then the backup scans.
//!
//! A backup begins with a checkpoint, and summaries end at checkpoints. So what they must reach by now is the last one, not the end of the log.

use super::{Line, NO_SUMMARIES, Question, Why, scan, told};
use crate::backup::summaries::ServerSummaries;
use crate::detect::{CoverageCheck, Detection, Detector};
use crate::pg::WalSegmentName;

/// What a backup would probably find.
#[derive(Debug)]
pub(crate) struct Forecast {
    /// The detector that it would use, and why.
    pub detection: Detection,
    /// Bytes of log since the parent's start.
    pub log_len: u64,
    /// Whether the parent is an earlier state of this cluster, as far as its positions and its checksums tell: if not, nothing spares the scan.
    pub is_of_this_past: bool,
    /// Whether the WAL that the parent has stored is still there to be compared with, which whoever reads the log needs.
    pub has_proof: bool,
    /// The first WAL file since the parent's start that is neither in `pg_wal` nor in the archive.
    pub missing: Option<String>,
}

type Found<T> = std::result::Result<T, Why>;

impl Question<'_> {
    /// What `auto` would find.
    pub(crate) fn forecast(&self) -> Forecast {
        let log_len = self.start.as_u64().saturating_sub(self.parent.start_lsn.as_u64());
        let line = match self.lineage() {
            Ok(line) => line,
            Err(why) => {
                let detection = scan(why).detection;
                return Forecast { detection, log_len, is_of_this_past: false, has_proof: false, missing: None };
            }
        };
        let proof = self.prove(&line).map(drop);
        let missing = self.first_missing(&line);
        let found = self.expect_summaries(&line);
        let found = found.or_else(|first| match self.expect_log(log_len, &proof, &missing) {
            Err(second) if first.is_empty() => Err(second),
            Err(second) if !first.contains(&second) => Err(format!("{first}; {second}")),
            found => found,
        });
        let detection = found.unwrap_or_else(|why| scan(why).detection);
        let name = |name: WalSegmentName| name.file_name(self.control.wal_segment_size);
        let missing = missing.ok().flatten().map(name);
        Forecast { detection, log_len, is_of_this_past: true, has_proof: proof.is_ok(), missing }
    }

    /// Whether the server's summaries cover what they can by now.
    fn expect_summaries(&self, line: &Line) -> Found<Detection> {
        if self.control.major_version().as_u32() < 17 {
            return Err(NO_SUMMARIES.to_owned());
        }
        let session = self.session.ok_or("there is no server to write WAL summaries")?;
        if !session.summarizes_wal().map_err(told)? {
            return Err("summarize_wal is off".to_owned());
        }
        let server = ServerSummaries::new(session, self.data_dir, self.notice);
        let summaries = server.list().map_err(told)?;
        let (from, to) = (self.parent.start_lsn, self.control.redo.max(self.parent.start_lsn));
        let needed = line.history.wal_ranges(self.parent.start_timeline, from, to).map_err(told)?;
        let told = |reason: String| Detection { detector: Detector::Summary, reason };
        server.has(self.parent.history_mark.as_ref().ok_or("the parent was taken without WAL summaries")?)?;
        match summaries.check(&needed) {
            CoverageCheck::Covered => Ok(told(format!("WAL summaries cover {from} to {to}"))),
            CoverageCheck::MissingFrom(missing) => {
                if summaries.coverage().ranges().any(|range| range.start > missing && range.start < self.start) {
                    return Err(format!("there is no WAL summary from {missing} on"));
                }
                Ok(told(format!("the server summarizes its WAL, and has come to {missing}")))
            }
        }
    }

    /// Whether the log since the parent is there, and worth reading.
    fn expect_log(&self, log_len: u64, proof: &Found<()>, missing: &Found<Option<WalSegmentName>>) -> Found<Detection> {
        if log_len > self.cluster_bytes {
            return Err(format!("reading {} MB of WAL would take longer", log_len / 1_000_000));
        }
        proof.clone()?;
        match missing.clone()? {
            Some(name) => Err(self.gone(name)),
            None => {
                let reason = format!("WAL covers {} to {}", self.parent.start_lsn, self.start);
                Ok(Detection { detector: Detector::Wal, reason })
            }
        }
    }

    fn first_missing(&self, line: &Line) -> Found<Option<WalSegmentName>> {
        let files = self.files().map_err(told)?;
        Ok(files.first_missing(&line.history, self.parent.start_lsn, self.start))
    }
}
