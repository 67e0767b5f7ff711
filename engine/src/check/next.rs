//! The next incremental backup: what it would read, and what would spare it that.
//!
//! What changes between two backups is known from the last incremental; how fast everything is read, from the last backup that did. Both are of this very cluster
//! and this machine, which no benchmark is.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::repository::{Stored, usual_gap};
use super::server::Live;
use super::{Area, Options, Sheet, Verdict};
use crate::backup::{Forecast, Question, SWITCH_ON_SUMMARIES, must_be_the_same_cluster};
use crate::detect::{Detector, WalFiles};
use crate::error::Result;
use crate::repo::{BackupSummary, Manifest};
use crate::units::{count, duration, size};

const AREA: Area = Area::Next;
const MB: u64 = 1 << 20;

/// Says what the next backup would do, and what would make it cheaper.
pub(super) fn look(stored: &Stored, live: &Live, options: &Options, sheet: &mut Sheet) {
    match sheet.need(AREA, "wal_archive", archive(live, options)).flatten() {
        Some(0) => {
            let hint = "name the directory that archive_command fills";
            sheet.warn(AREA, "wal_archive", "the WAL archive holds no WAL segment", hint);
        }
        Some(found) => {
            sheet.ok(AREA, "wal_archive", format!("the WAL archive holds {}", count(found as u64, "segment")));
        }
        None => {}
    }
    let Some(newest) = stored.newest() else {
        return sheet.ok(AREA, "detector", "the next backup is a full one: there is no earlier one of this cluster");
    };
    // Backups of another cluster make it fail, which was said.
    if must_be_the_same_cluster(&stored.catalog, &live.control).is_ok() {
        let manifest = stored.repo.manifest(&newest.cluster, newest.id);
        if let Some(parent) = sheet.need(Area::Repository, "backups", manifest) {
            compared_with(&parent, stored, live, options, sheet);
        }
    }
}

fn compared_with(parent: &Manifest, stored: &Stored, live: &Live, options: &Options, sheet: &mut Sheet) {
    let Some(why) = sheet.need(Area::Repository, "packs", unfit(stored, live, parent)) else { return };
    if let Some(why) = why {
        let what = format!("the next backup is a full one: {} cannot be compared with: {why}", parent.id);
        return sheet.warn(AREA, "detector", what, "it takes longer and needs more room than an incremental");
    }
    if let Some(outlook) = sheet.need(AREA, "detector", outlook(stored, live, parent, options)) {
        outlook.tell(sheet);
        keep_time(live, stored.catalog.backups(), sheet);
    }
}

/// How many segments the archive holds that the user names; one that cannot be listed ends a backup.
fn archive(live: &Live, options: &Options) -> Result<Option<usize>> {
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
    /// The first WAL file since the newest backup that is gone, by name.
    missing: Option<String>,
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
        start: session.current_lsn()?,
        timeline: session.current_timeline()?,
        cluster_bytes: live.bytes.map_or(parent.cluster_bytes, |bytes| bytes.cluster),
        notice: &|_| {},
    };
    let size = live.control.wal_segment_size;
    let missing = question.first_missing_wal(parent.start_lsn).ok().flatten().map(|name| name.file_name(size));
    let backups = stored.catalog.backups();
    Ok(Outlook {
        forecast: question.forecast(),
        missing,
        major: live.control.major_version().as_u32(),
        summarizes: session.summarizes_wal()?,
        wal_keep_mb: session.setting("wal_keep_size")?.and_then(|text| text.parse().ok()),
        has_archive: options.wal_archive.is_some(),
        relation_bytes: live.bytes.map(|bytes| bytes.relations),
        changed: last_changed(backups, live.control.block_size.as_u64()),
        rate: scan_rate(backups),
    })
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
    fn tell(&self, sheet: &mut Sheet) {
        let detection = &self.forecast.detection;
        sheet.facts.wal_bytes = Some(self.forecast.log_len);
        sheet.facts.last_changed_bytes = self.changed;
        sheet.facts.detector = Some(detection.detector.to_string());
        sheet.facts.detector_reason = Some(detection.reason.clone());
        let text = format!("the next incremental would use {}: {}", detection.detector, detection.reason);
        let advice = self.advice();
        let reads = match (detection.detector, &advice) {
            (Detector::Scan, None) => format!("; it reads {}", self.everything()),
            _ => String::new(),
        };
        sheet.ok(AREA, "detector", format!("{text}{reads}"));
        match advice {
            Some(Advice { check, message, hint }) if detection.detector == Detector::Scan => {
                sheet.warn(AREA, check, message, hint);
            }
            // It does well without, for now.
            Some(Advice { check, message, hint }) => sheet.add(AREA, check, Verdict::Ok, message, Some(hint)),
            None => {}
        }
    }

    /// What would spare the scan.
    fn advice(&self) -> Option<Advice> {
        if self.major >= 17 && !self.summarizes {
            return Some(self.on_summaries());
        }
        let scans = self.forecast.detection.detector == Detector::Scan;
        let wal_is_gone = self.missing.is_some() || !self.forecast.has_proof;
        (scans && self.forecast.is_of_this_past && wal_is_gone).then(|| self.on_wal())
    }

    fn on_summaries(&self) -> Advice {
        let now = match self.forecast.detection.detector {
            Detector::Scan => format!("each incremental reads {}", self.everything()),
            _ => format!(
                "an incremental reads the WAL since the one before it ({} by now), and once that is not all there, {}",
                size(self.forecast.log_len),
                self.everything()
            ),
        };
        let message = format!("summarize_wal is off: {now}{}; with it on, it reads only what changed", self.of_that());
        let keep = if self.forecast.has_proof || !self.forecast.is_of_this_past {
            String::new()
        } else {
            format!("; what a backup stored of the WAL must stay until the next one, too: {}", self.keep_wal())
        };
        Advice { check: "summarize_wal", message, hint: format!("{SWITCH_ON_SUMMARIES}{keep}") }
    }

    fn on_wal(&self) -> Advice {
        let gone = match &self.missing {
            Some(name) => format!("the WAL since the newest backup ({}) begins to be gone ({name})", self.log()),
            None => format!("the WAL of the newest backup is not there to be compared ({} since)", self.log()),
        };
        let message = format!("{gone}: each incremental reads {}{}", self.everything(), self.of_that());
        let instead = if self.summarizes { "only what changed" } else { "the WAL instead" };
        let hint = format!("where it stays until the next backup, that reads {instead}: {}", self.keep_wal());
        Advice { check: "wal", message, hint }
    }

    /// How WAL is kept until the next backup: twice what was written since the last.
    fn keep_wal(&self) -> String {
        let wanted = (self.forecast.log_len * 2).div_ceil(MB).next_multiple_of(64);
        let wanted = wanted.max(self.wal_keep_mb.map_or(0, |now| now + 64));
        let setting = format!("ALTER SYSTEM SET wal_keep_size = '{wanted}MB'; SELECT pg_reload_conf();");
        if self.has_archive { setting } else { format!("{setting} or name an archive that has it: --wal-archive DIR") }
    }

    fn log(&self) -> String {
        size(self.forecast.log_len)
    }

    /// All relation files, and how long reading them takes.
    fn everything(&self) -> String {
        let Some(bytes) = self.relation_bytes else { return "all relation files".to_owned() };
        let takes = self.rate.filter(|rate| *rate > 0).map(|rate| {
            let seconds = Duration::from_secs(bytes / rate);
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
        let age = backups.last().map_or(SignedDuration::ZERO, |last| Timestamp::now().duration_since(last.start_time));
        let needed = age.max(usual_gap(backups).unwrap_or_default());
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
