//! What a backup says at its end of how the next one could cost less.
//!
//! Only an incremental that read everything without having been asked to has something to say: that WAL since its parent was gone, which nobody who reads no reports
//! would learn otherwise, and what keeps it. The questions are those of [`check`](mod@crate::check), asked once more: the answers are those of now, but WAL that was gone stays gone.

use jiff::Timestamp;

use super::changes::{Forecast, Question};
use super::habit::LogHabit;
use super::plan::{Plan, Source};
use crate::detect::{Detector, DetectorChoice, HeldSegments};
use crate::error::Result;
use crate::repo::Manifest;
use crate::source::{DataDir, Session};
use crate::units::size;

/// How WAL summaries are switched on, for a hint.
pub(crate) const SWITCH_ON_SUMMARIES: &str =
    "as a superuser: ALTER SYSTEM SET summarize_wal = on; SELECT pg_reload_conf(); no restart is needed";

/// What would have spared a backup that it read everything; nothing where that was asked for, or most of it had changed anyway.
pub(super) fn on_summaries(plan: &Plan<'_>, is_audit: bool, bytes_read: u64, blocks_changed: u64) -> Option<String> {
    let Source::Live { session, data_dir } = &plan.source else { return None };
    let was_asked_to = plan.options.detector != DetectorChoice::Auto || plan.options.audit || is_audit;
    if plan.detection.detector != Detector::Scan || was_asked_to {
        return None;
    }
    let changed = blocks_changed.saturating_mul(plan.control.block_size.as_u64());
    let scan = Scan {
        plan,
        parent: plan.parent.as_ref()?,
        session,
        data_dir,
        held: HeldSegments::default(),
        read: bytes_read,
        changed,
    };
    // The backup is made; that there is no advice is no failure.
    if changed < bytes_read / 2 { scan.advice().ok().flatten() } else { None }
}

/// A backup that has read everything.
struct Scan<'a> {
    plan: &'a Plan<'a>,
    parent: &'a Manifest,
    session: &'a Session,
    data_dir: &'a DataDir,
    /// Nothing: what the backup had is let go of.
    held: HeldSegments,
    read: u64,
    changed: u64,
}

impl Scan<'_> {
    fn advice(&self) -> Result<Option<String>> {
        let question = self.question()?;
        let forecast = question.forecast();
        if !forecast.is_of_this_past {
            return Ok(None);
        }
        let server = self.session.server();
        if server.major.as_u32() >= 17 && !server.summarize_wal {
            return Ok(Some(saving(self.read, self.changed)));
        }
        if !forecast.has_proof || forecast.missing.is_some() {
            return if server.summarize_wal { Ok(self.after_a_restart()) } else { self.on_wal(&question, &forecast) };
        }
        Ok(None)
    }

    fn question(&self) -> Result<Question<'_>> {
        Ok(Question {
            repo: self.plan.repo,
            parent: self.parent,
            control: &self.plan.control,
            data_dir: self.data_dir,
            session: Some(self.session),
            wal_archive: self.plan.options.wal_archive.as_deref(),
            held: &self.held,
            start: self.session.current_lsn()?,
            timeline: self.session.current_timeline()?,
            cluster_bytes: self.read,
            notice: &|_| {},
        })
    }

    /// A server's summaries count from its start on.
    fn after_a_restart(&self) -> Option<String> {
        let read = size(self.read);
        let restarted = self.session.server().postmaster_start_time > self.parent.start_time;
        restarted.then(|| {
            format!("this backup read {read}, as one does after the server was restarted; the next one has WAL summaries again")
        })
    }

    fn on_wal(&self, question: &Question<'_>, forecast: &Forecast) -> Result<Option<String>> {
        let catalog = self.plan.repo.catalog(&self.parent.cluster)?;
        // As it was when this backup began, which by now is the newest.
        let older = catalog.backups().iter().position(|backup| backup.id == self.parent.id);
        let Some(older) = older.and_then(|last| catalog.backups().get(..=last)) else { return Ok(None) };
        let habit = LogHabit::of(older, question.start, Timestamp::now());
        let kept = self.session.setting("wal_keep_size")?.and_then(|text| text.parse().ok());
        let how = habit.how_to_keep_it(kept, question.wal_archive.is_some());
        let gone = match &forecast.missing {
            Some(name) => format!("{name} of the WAL since its parent is gone"),
            None => "the WAL of its parent is gone or another".to_owned(),
        };
        let (read, changed) = (size(self.read), size(self.changed));
        let text = format!(
            "this backup read {read} to find {changed} changed, as {gone}; what keeps it for the next one: {how}"
        );
        Ok((habit.between() < self.read).then_some(text))
    }
}

fn saving(read: u64, changed: u64) -> String {
    let (told_read, told_changed) = (size(read), size(changed));
    format!(
        "summarize_wal is off: this backup read {told_read} to find {told_changed} changed; with it on, an incremental reads only what \
         changed; {SWITCH_ON_SUMMARIES}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spared_is_told_in_numbers() {
        let text = saving(4 << 30, 12 << 20);
        assert!(text.contains("read 4.00 GiB to find 12.0 MiB changed"), "{text}");
    }
}
