//! The next incremental backup: what it would read, and what would spare it that.
//!
//! What changes between two backups is known from the last incremental; how fast everything is read, from the last backup that did. Both are of this very cluster
//! and this machine, which no benchmark is.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::repository::Stored;
use super::server::Live;
use super::{Area, Options, Sheet, Verdict};
use crate::backup::{Forecast, LogHabit, Question, SWITCH_ON_SUMMARIES, must_be_the_same_cluster, usual_gap};
use crate::detect::{Detector, HeldSegments, WalFiles};
use crate::error::Result;
use crate::repo::{BackupSummary, Manifest};
use crate::units::{count, duration, size};

const AREA: Area = Area::Next;

/// Says what the next backup would do, and what would make it cheaper.
pub(super) fn look(stored: &Stored, live: &Live, options: &Options, sheet: &mut Sheet) {
    let Some(archived) = sheet.need(AREA, "wal_archive", archived(live, options)) else { return };
    if archived == Some(0) {
        let hint = "name the directory that archive_command fills";
        sheet.warn(AREA, "wal_archive", "the WAL archive holds no WAL segment", hint);
    }
    let Some(newest) = stored.newest() else {
        return sheet.ok(AREA, "detector", "the next backup is a full one: there is no earlier one of this cluster");
    };
    // Backups of another cluster make it fail, which was said.
    if must_be_the_same_cluster(&stored.catalog, &live.control).is_ok() {
        let manifest = stored.repo.manifest(&newest.cluster, newest.id);
        if let Some(parent) = sheet.need(Area::Repository, "backups", manifest) {
            compared_with(&parent, stored, live, options, archived, sheet);
        }
    }
}

fn compared_with(
    parent: &Manifest,
    stored: &Stored,
    live: &Live,
    options: &Options,
    archived: Option<usize>,
    sheet: &mut Sheet,
) {
    let Some(why) = sheet.need(Area::Repository, "packs", unfit(stored, live, parent)) else { return };
    if let Some(why) = why {
        let what = format!("the next backup is a full one: {} cannot be compared with: {why}", parent.id);
        return sheet.warn(AREA, "detector", what, "it takes longer and needs more room than an incremental");
    }
    if let Some(outlook) = sheet.need(AREA, "detector", outlook(stored, live, parent, options)) {
        if let Some(archived) = archived.filter(|archived| *archived > 0) {
            outlook.tell_of_the_archive(archived, sheet);
        }
        outlook.tell(sheet);
        keep_time(live, stored.catalog.backups(), sheet);
    }
}

/// How many segments the archive holds that the user names; one that cannot be listed ends a backup.
fn archived(live: &Live, options: &Options) -> Result<Option<usize>> {
    let Some(archive) = &options.wal_archive else { return Ok(None) };
    let files = WalFiles::list(&[archive], live.control.wal_segment_size);
    files.map(|files| Some(files.segment_count())).map_err(|error| error.hint("look at --wal-archive"))
}

/// Why nothing can be inherited from the newest backup, if so.
fn unfit(stored: &Stored, live: &Live, parent: &Manifest) -> Result<Option<String>> {
    if parent.block_size != live.control.block_size.as_u32() {
        return Ok(Some(format!("its blocks have {} bytes", parent.block_size)));
    }
    Ok(stored.repo.known_fault(parent)?.map(|fault| fault.to_string()))
}

/// What the next incremental would do, and what the ones before it did.
struct Outlook {
    forecast: Forecast,
    log: LogHabit,
    /// Why the newest backup read everything, if it did because WAL was gone.
    was_gone: Option<String>,
    major: u32,
    summarizes: bool,
    /// `wal_keep_size` in MB.
    wal_keep_mb: Option<u64>,
    has_archive: bool,
    relation_bytes: Option<u64>,
    changed: Option<u64>,
    /// Bytes a second of the last backup that read everything.
    rate: Option<u64>,
}

fn outlook(stored: &Stored, live: &Live, parent: &Manifest, options: &Options) -> Result<Outlook> {
    let session = &live.session;
    let question = Question {
        repo: &stored.repo,
        parent,
        control: &live.control,
        data_dir: &live.data_dir,
        session: Some(session),
        wal_archive: options.wal_archive.as_deref(),
        held: &HeldSegments::default(),
        start: session.current_lsn()?,
        timeline: session.current_timeline()?,
        cluster_bytes: live.bytes.map_or(parent.cluster_bytes, |bytes| bytes.cluster),
        notice: &|_| {},
    };
    let backups = stored.catalog.backups();
    Ok(Outlook {
        forecast: question.forecast(),
        log: LogHabit::of(backups, question.start, Timestamp::now()),
        was_gone: backups.last().and_then(was_gone),
        major: live.control.major_version().as_u32(),
        summarizes: session.summarizes_wal()?,
        wal_keep_mb: session.setting("wal_keep_size")?.and_then(|text| text.parse().ok()),
        has_archive: options.wal_archive.is_some(),
        relation_bytes: live.bytes.map(|bytes| bytes.relations),
        changed: last_changed(backups, live.control.block_size.as_u64()),
        rate: scan_rate(backups),
    })
}

/// Why a backup read everything, if WAL or summaries of it were gone.
fn was_gone(backup: &BackupSummary) -> Option<String> {
    let scanned = backup.parent.is_some() && backup.detector == Detector::Scan.to_string();
    (scanned && backup.detector_reason.contains(" is gone (")).then(|| backup.detector_reason.clone())
}

/// How long ago the newest backup began.
fn age(backups: &[BackupSummary]) -> SignedDuration {
    backups.last().map_or(SignedDuration::ZERO, |last| Timestamp::now().duration_since(last.start_time))
}

/// Bytes of the blocks that the last incremental backup found changed.
fn last_changed(backups: &[BackupSummary], block_len: u64) -> Option<u64> {
    let last = backups.iter().rfind(|backup| backup.parent.is_some() && backup.merged_from.is_none())?;
    Some(last.blocks_changed.saturating_mul(block_len))
}

/// How fast everything was read by the last backup that did: an incremental, which stores little meanwhile, or else a full one.
fn scan_rate(backups: &[BackupSummary]) -> Option<u64> {
    let scanned = |backup: &&BackupSummary| {
        backup.detector == Detector::Scan.to_string() && backup.merged_from.is_none() && backup.duration_ms > 0
    };
    let scans = || backups.iter().filter(scanned);
    let last = scans().rfind(|backup| backup.parent.is_some()).or_else(|| scans().next_back())?;
    Some(last.cluster_bytes.saturating_mul(1000) / last.duration_ms)
}

impl Outlook {
    fn tell_of_the_archive(&self, archived: usize, sheet: &mut Sheet) {
        let holds = format!("the WAL archive holds {}", count(archived as u64, "segment"));
        match &self.forecast.missing {
            Some(name) => {
                let hint = "look whether it is the right directory, and what the archiver says (pg_stat_archiver)";
                let what =
                    format!("{holds}, but neither it nor pg_wal has {name}, of the time since the newest backup");
                sheet.warn(AREA, "wal_archive", what, hint);
            }
            None => sheet.ok(AREA, "wal_archive", format!("{holds}; nothing is missing since the newest backup")),
        }
    }

    fn tell(&self, sheet: &mut Sheet) {
        let detection = &self.forecast.detection;
        sheet.facts.wal_bytes = Some(self.forecast.log_len);
        sheet.facts.last_changed_bytes = self.changed;
        sheet.facts.detector = Some(detection.detector.to_string());
        sheet.facts.detector_reason = Some(detection.reason.clone());
        let text = format!("the next incremental would use {}: {}", detection.detector, detection.reason);
        match self.advice() {
            None if self.scans() => sheet.ok(AREA, "detector", format!("{text}; it reads {}", self.everything())),
            None => sheet.ok(AREA, "detector", text),
            Some(Advice { check, message, hint }) => {
                sheet.ok(AREA, "detector", text);
                // Where the log spares the scan, and spared the last one, it does well without.
                let costs = self.scans() || self.was_gone.is_some();
                let status = if costs { Verdict::Warning } else { Verdict::Ok };
                sheet.add(AREA, check, status, message, Some(hint));
            }
        }
    }

    fn scans(&self) -> bool {
        self.forecast.detection.detector == Detector::Scan
    }

    /// What would spare the scan.
    fn advice(&self) -> Option<Advice> {
        if self.major >= 17 && !self.summarizes {
            return Some(self.on_summaries());
        }
        let wal_is_gone = self.forecast.missing.is_some() || !self.forecast.has_proof;
        // A server that writes summaries needs the log only once after each start. Without them, all of it would have to be read.
        let helps = !self.summarizes && self.relation_bytes.is_none_or(|bytes| self.log.between() < bytes);
        if !helps || !self.forecast.is_of_this_past {
            return None;
        }
        match &self.was_gone {
            _ if self.scans() => wal_is_gone.then(|| self.on_wal()),
            // Right after a backup all WAL since then is there; by the next one it would be gone again, if nothing keeps it by now.
            Some(why) if !self.has_archive && !self.log.is_kept_by(self.wal_keep_mb) => {
                Some(self.on_wal_that_was_gone(why))
            }
            _ => None,
        }
    }

    fn on_summaries(&self) -> Advice {
        let log = size(self.forecast.log_len);
        let reads = match self.scans() {
            true => format!("each incremental reads {}", self.everything()),
            false => format!(
                "an incremental reads the WAL since the one before it ({log} by now) or, where that is gone, {}",
                self.everything()
            ),
        };
        let last = self.was_gone.as_ref().map(|why| format!(", as the newest backup did: {why}")).unwrap_or_default();
        let message =
            format!("summarize_wal is off: {reads}{last}{}; with it on, it reads only what changed", self.of_that());
        Advice { check: "summarize_wal", message, hint: SWITCH_ON_SUMMARIES.to_owned() }
    }

    fn on_wal(&self) -> Advice {
        let log = size(self.forecast.log_len);
        let gone = match &self.forecast.missing {
            Some(name) => format!("of the {log} of WAL since the newest backup, {name} is gone"),
            None => format!("the WAL of the newest backup, {log} ago, cannot be compared with what is there now"),
        };
        let message = format!("{gone}: each incremental reads {}{}", self.everything(), self.of_that());
        Advice { check: "wal", message, hint: self.keep_wal() }
    }

    fn on_wal_that_was_gone(&self, why: &str) -> Advice {
        let message = format!("the newest backup read {}: {why}{}", self.everything(), self.of_that());
        Advice { check: "wal", message, hint: self.keep_wal() }
    }

    fn keep_wal(&self) -> String {
        let how = self.log.how_to_keep_it(self.wal_keep_mb, self.has_archive);
        format!("kept until the next backup, it makes that read the WAL instead: {how}")
    }

    /// All relation files, and how long reading them takes.
    fn everything(&self) -> String {
        let Some(bytes) = self.relation_bytes else { return "all relation files".to_owned() };
        let takes = self.rate.filter(|rate| *rate > 0).map(|rate| {
            let seconds = Duration::try_from_secs_f64(bytes as f64 / rate as f64).unwrap_or_default();
            format!(" (about {} at the {}/s of the last scan)", duration(seconds), size(rate))
        });
        format!("all {} of relation files{}", size(bytes), takes.unwrap_or_default())
    }

    fn of_that(&self) -> String {
        let told = |changed| format!("; the last one found {} changed", size(changed));
        self.changed.map(told).unwrap_or_default()
    }
}

/// What would make the next incremental cheaper.
struct Advice {
    check: &'static str,
    message: String,
    hint: String,
}

/// Summaries must outlive the time between two backups.
fn keep_time(live: &Live, backups: &[BackupSummary], sheet: &mut Sheet) {
    let minutes = match live.session.setting("wal_summary_keep_time") {
        Ok(Some(text)) => text.parse().ok(),
        Ok(None) => None,
        Err(error) => return sheet.error(AREA, "wal_summary_keep_time", Verdict::Failed, &error),
    };
    if let Some(minutes) = minutes.filter(|_| live.session.server().summarize_wal) {
        let needed = age(backups).max(usual_gap(backups).unwrap_or_default());
        is_kept_long_enough(SignedDuration::from_mins(minutes), needed, sheet);
    }
}

/// PostgreSQL: src/backend/postmaster/walsummarizer.c, MaybeRemoveOldWalSummaries: 0 keeps them for ever.
fn is_kept_long_enough(kept: SignedDuration, needed: SignedDuration, sheet: &mut Sheet) {
    if kept.is_zero() || kept > needed {
        return;
    }
    let told = |span: SignedDuration| duration(span.unsigned_abs());
    let what = format!(
        "WAL summaries are removed after {} (wal_summary_keep_time), and backups are {} apart",
        told(kept),
        told(needed)
    );
    let hint = "let them be kept for longer than the longest time between two backups: ALTER SYSTEM SET \
                wal_summary_keep_time = '10d'; SELECT pg_reload_conf();";
    sheet.warn(AREA, "wal_summary_keep_time", what, hint);
}

#[cfg(test)]
mod tests {
    use super::super::Finding;
    use super::super::tests::backup;
    use super::*;
    use crate::detect::Detection;

    const MB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// A cluster of 4 GiB whose last incremental changed 12 MiB and took 8 seconds.
    fn outlook(major: u32, summarizes: bool, detector: Detector) -> Outlook {
        let detection = Detection { detector, reason: "so it is".to_owned() };
        let gone = (detector == Detector::Scan).then(|| "000000010000000000000002".to_owned());
        let (log_len, has_proof) = (100 * MB, gone.is_none());
        Outlook {
            forecast: Forecast { detection, log_len, is_of_this_past: true, has_proof, missing: gone },
            log: LogHabit { seen: log_len, over: SignedDuration::from_hours(24), gap: None },
            was_gone: None,
            major,
            summarizes,
            wal_keep_mb: Some(0),
            has_archive: false,
            relation_bytes: Some(4 * GIB),
            changed: Some(12 * MB),
            rate: Some(512 * MB),
        }
    }

    fn told(outlook: &Outlook) -> Vec<Finding> {
        let mut sheet = Sheet::default();
        outlook.tell(&mut sheet);
        sheet.found
    }

    #[test]
    fn what_summaries_would_save_is_told_in_bytes_and_seconds() {
        let scans = outlook(18, false, Detector::Scan);
        let [_, advice] = &told(&scans)[..] else { panic!("no advice") };
        assert_eq!((advice.check, advice.status), ("summarize_wal", Verdict::Warning));
        assert_eq!(
            advice.message,
            "summarize_wal is off: each incremental reads all 4.00 GiB of relation files (about 8.0 s at the 512 MiB/s of the \
             last scan); the last one found 12.0 MiB changed; with it on, it reads only what changed"
        );
        let hint = advice.hint.as_deref().unwrap();
        assert!(hint.contains("ALTER SYSTEM SET summarize_wal = on") && hint.contains("no restart"), "{hint}");
    }

    #[test]
    fn where_the_log_spares_the_scan_summaries_are_no_warning() {
        let reads = outlook(18, false, Detector::Wal);
        let [_, advice] = &told(&reads)[..] else { panic!("no advice") };
        assert_eq!((advice.check, advice.status), ("summarize_wal", Verdict::Ok));
        assert!(advice.message.contains("reads the WAL since the one before it (100 MiB by now)"), "{advice:?}");
    }

    #[test]
    fn what_keeps_the_log_is_told_where_that_would_help() {
        let [_, advice] = &told(&outlook(15, false, Detector::Scan))[..] else { panic!("no advice") };
        assert_eq!((advice.check, advice.status), ("wal", Verdict::Warning));
        let hint = advice.hint.as_deref().unwrap();
        assert!(hint.contains("wal_keep_size = '192MB'") && hint.contains("--wal-archive"), "{hint}");
        let good = outlook(15, false, Detector::Wal);
        let log = LogHabit { seen: 5 * GIB, ..good.log };
        let long = Outlook { log, ..outlook(15, false, Detector::Scan) };
        let other = outlook(15, false, Detector::Scan);
        let other = Outlook {
            forecast: Forecast { is_of_this_past: false, ..other.forecast },
            ..outlook(15, false, Detector::Scan)
        };
        let once = outlook(18, true, Detector::Scan);
        for outlook in [good, long, other, once] {
            let [only] = &told(&outlook)[..] else { panic!("advice for nothing: {:?}", outlook.forecast) };
            assert_eq!((only.check, only.status), ("detector", Verdict::Ok));
        }
    }

    #[test]
    fn a_backup_that_read_everything_as_wal_was_gone_is_a_warning_until_there_is_a_cure() {
        let full = backup(0, None);
        let reason = "the WAL file 0A is gone (if an archive has it, name that with --wal-archive)";
        let scanned = BackupSummary { detector_reason: reason.to_owned(), ..backup(24, Some(&full)) };
        let of = |major, summarizes, backup: &BackupSummary| Outlook {
            was_gone: was_gone(backup),
            ..outlook(major, summarizes, Detector::Wal)
        };
        for (major, check, cure) in [(15, "wal", "wal_keep_size"), (18, "summarize_wal", "summarize_wal = on")] {
            let [_, advice] = &told(&of(major, false, &scanned))[..] else { panic!("no advice") };
            assert_eq!((advice.check, advice.status), (check, Verdict::Warning));
            assert!(
                advice.message.contains("0A is gone") && advice.hint.as_deref().unwrap().contains(cure),
                "{advice:?}"
            );
        }
        let asked = BackupSummary { detector_reason: "a scan was asked for".to_owned(), ..scanned.clone() };
        let cured = Outlook { wal_keep_mb: Some(192), ..of(15, false, &scanned) };
        let archived = Outlook { has_archive: true, ..of(15, false, &scanned) };
        for outlook in [of(18, true, &scanned), of(15, false, &asked), cured, archived] {
            assert_eq!(told(&outlook).len(), 1, "nothing can be done, nobody wants it, or it is done");
        }
    }

    #[test]
    fn an_archive_with_a_gap_is_told_with_its_first_file() {
        let tell = |outlook: &Outlook| {
            let mut sheet = Sheet::default();
            outlook.tell_of_the_archive(7, &mut sheet);
            sheet.found.remove(0)
        };
        assert_eq!(tell(&outlook(15, false, Detector::Wal)).status, Verdict::Ok);
        let gap = tell(&outlook(15, false, Detector::Scan));
        assert!(gap.status == Verdict::Warning && gap.message.contains("000000010000000000000002"), "{gap:?}");
    }

    #[test]
    fn the_rate_is_that_of_the_last_backup_that_read_everything_and_stored_little() {
        let full = BackupSummary { duration_ms: 100_000, ..backup(0, None) };
        let scanned = backup(24, Some(&full));
        let by_wal = BackupSummary { detector: "wal".to_owned(), ..backup(48, Some(&full)) };
        let merged = BackupSummary { merged_from: Some(full.id), ..backup(48, None) };
        assert_eq!(scan_rate(&[]), None);
        assert_eq!(scan_rate(std::slice::from_ref(&full)), Some(10));
        assert_eq!(scan_rate(&[full.clone(), scanned, by_wal.clone(), merged.clone(), backup(72, None)]), Some(100));
        assert_eq!(last_changed(&[full.clone(), by_wal, merged], 8192), Some(3 * 8192));
        assert_eq!(last_changed(&[full], 8192), None);
    }

    #[test]
    fn summaries_must_outlive_the_time_between_two_backups() {
        let status = |kept, needed| {
            let mut sheet = Sheet::default();
            is_kept_long_enough(SignedDuration::from_hours(kept), SignedDuration::from_hours(needed), &mut sheet);
            sheet.found.first().map(|finding| finding.status)
        };
        assert_eq!([status(240, 24), status(0, 24)], [None, None], "for ten days, or for ever");
        assert_eq!([status(24, 24), status(10, 24)], [Some(Verdict::Warning); 2]);
    }
}
