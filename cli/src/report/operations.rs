//! What each operation did, and what comes next.

use std::fmt::Write as _;
use std::path::Path;

use engine::backup::{AuditReport, MissedBlock};
use engine::export::FileFormat;
use engine::repo::BackupSummary;

use super::{corrupt_pages, on_one_line, shell_word, some_of, whereabouts};
use crate::units::{count, rate, seconds, size};

/// Blocks that are shown at most; `--json` has more.
const MISSED_SHOWN: usize = 20;

/// What a backup did and why, and what comes next.
pub fn backup(done: &engine::backup::Report, repo: &Path) -> String {
    let backup = &done.backup;
    let mut text = format!("backup {} done in {}\n", backup.id, seconds(done.seconds));
    let facts = [
        ("kind", kind_and_why(backup)),
        ("read", size_and_rate(done.bytes_read, done.seconds)),
        ("changed", changed(backup)),
        ("stored", format!("{} new, for a cluster of {}", size(backup.stored_bytes), size(backup.cluster_bytes))),
        ("WAL", format!("{} to {}, {}", backup.start_lsn, backup.stop_lsn, size(backup.wal_bytes))),
    ];
    for (name, value) in facts {
        let _ = writeln!(text, "  {name:<8} {}", on_one_line(&value));
    }
    text += &corrupt_pages(backup);
    text += &done.audit.as_ref().map(audited).unwrap_or_default();
    if backup.parent.is_none() {
        let repo = shell_word(&repo.display().to_string());
        let _ = writeln!(text, "the next backup into {repo} stores only what changes from now on");
    }
    text + &how_to_restore(backup, repo)
}

fn changed(backup: &BackupSummary) -> String {
    let found = format!("{}, found by {}", count(backup.blocks_changed, "block"), backup.detector);
    if backup.parent.is_some() { format!("{found}: {}", backup.detector_reason) } else { found }
}

/// What an audit found.
fn audited(audit: &AuditReport) -> String {
    let AuditReport { detector, missed_count, serious_count, missed } = audit;
    if *missed_count == 0 {
        return format!("audit: {} knew of every block that changed\n", on_one_line(detector));
    }
    let blocks = count(*missed_count, "block");
    let mut text =
        format!("audit: {} missed {blocks}, {serious_count} of them by more than hint bits\n", on_one_line(detector));
    for MissedBlock { relation, fork, block, lsn, cause } in missed.iter().take(MISSED_SHOWN) {
        let _ = writeln!(text, "  {relation} {fork} block {block} at {lsn}: {}", cause.explanation());
    }
    text
}

fn how_to_restore(backup: &BackupSummary, repo: &Path) -> String {
    format!("restore it: pgstrata restore {} {} --target DIR\n", backup.id, whereabouts(repo, &backup.cluster))
}

fn kind_and_why(backup: &BackupSummary) -> String {
    match &backup.parent {
        Some(parent) => format!("{} (what changed since {parent})", backup.backup_type),
        None => format!("{} ({})", backup.backup_type, backup.detector_reason),
    }
}

/// What a restore did, and what comes next.
pub fn restore(done: &engine::restore::Report) -> String {
    let target = shell_word(&done.target.display().to_string());
    let mut text = format!("restored {} into {target} in {}\n", done.backup.id, seconds(done.seconds));
    let _ = writeln!(text, "  read     {}", size(done.bytes_read));
    let _ = writeln!(text, "  written  {}", size_and_rate(done.bytes_written, done.seconds));
    text += &corrupt_pages(&done.backup);
    let major = on_one_line(done.backup.postgres_version.split('.').next().unwrap_or_default());
    let _ = writeln!(text, "start it with PostgreSQL {major}: pg_ctl -D {target} start");
    let _ = writeln!(text, "while its original runs on this host: pg_ctl -D {target} -o '-p 5433' start");
    text + "until it has recovered it refuses connections (\"Hot standby mode is disabled\"): pg_isready tells\n"
}

/// What a merge did, and what comes next.
pub fn merge(done: &engine::merge::Report, repo: &Path) -> String {
    let backup = &done.backup;
    let made_of = backup.merged_from.map(|id| format!(" made of {id}")).unwrap_or_default();
    let mut text = format!("backup {}{made_of} in {}\n", backup.id, seconds(done.seconds));
    let facts = [
        ("kind", backup.backup_type.to_string()),
        ("read", size_and_rate(done.bytes_read, done.seconds)),
        ("stored", format!("{} new, for a cluster of {}", size(backup.stored_bytes), size(backup.cluster_bytes))),
    ];
    for (name, value) in facts {
        let _ = writeln!(text, "  {name:<8} {}", on_one_line(&value));
    }
    text += &corrupt_pages(backup);
    text + &how_to_restore(backup, repo)
}

/// What a copy to another repository did, and what comes next.
pub fn copy(done: &engine::export::Report, to: &Path) -> String {
    let place = shell_word(&to.display().to_string());
    let mut text = match done.already_there {
        true => format!("backup {} is in {place} already\n", done.backup.id),
        false => format!("backup {} copied to {place} in {}\n", done.backup.id, seconds(done.seconds)),
    };
    let _ = writeln!(text, "  read     {}", size_and_rate(done.bytes_read, done.seconds));
    let _ = writeln!(text, "  written  {}", size(done.bytes_written));
    text += &corrupt_pages(&done.backup);
    text + &how_to_restore(&done.backup, to)
}

/// What an export to files did, and what comes next.
pub fn unpack(done: &engine::export::FilesReport) -> String {
    let target = shell_word(&done.target.display().to_string());
    let mut text = format!("exported {} into {target} in {}\n", done.backup.id, seconds(done.seconds));
    let _ = writeln!(text, "  read     {}", size(done.bytes_read));
    let _ = writeln!(text, "  written  {}", size_and_rate(done.bytes_written, done.seconds));
    if !done.files.is_empty() {
        let _ = writeln!(text, "  files    {}", some_of(&done.files));
    }
    text += &corrupt_pages(&done.backup);
    if done.format == FileFormat::Plain {
        let _ = writeln!(text, "check it: pg_verifybackup {target}");
    }
    text + "it has its source's settings, archive_command too: look at them before you start a server on it\n"
}

/// Bytes and their rate.
fn size_and_rate(bytes: u64, took: f64) -> String {
    let rate = rate(bytes, took).map(|rate| format!(", {rate}")).unwrap_or_default();
    format!("{}{rate}", size(bytes))
}

/// What verify found.
pub fn verify(done: &engine::verify::Report, quick: bool) -> String {
    if done.backups.is_empty() && done.damage.is_empty() {
        return "there are no backups\n".to_owned();
    }
    let mut text = String::new();
    for verified in &done.backups {
        let _ = writeln!(
            text,
            "{:<7} {} {}",
            if verified.ok { "ok" } else { "DAMAGED" },
            verified.backup.id,
            verified.backup.backup_type
        );
    }
    for damage in &done.damage {
        let _ = writeln!(text, "damage: {}", on_one_line(&format!("{}: {}", damage.object, damage.problem)));
        let _ = writeln!(text, "    backups: {}", some_of(&damage.backups));
        let _ = writeln!(text, "    files: {}", some_of(&damage.files));
    }
    let how = if quick { "presence and length only" } else { "every byte" };
    let (objects, read) = (count(done.objects_checked, "object"), size(done.bytes_read));
    let _ = writeln!(text, "{objects} checked ({how}), {read} read in {}", seconds(done.seconds));
    let found = match done.damage.len() as u64 {
        0 => "no damage found".to_owned(),
        damage => format!("DAMAGE FOUND: {}", count(damage, "problem")),
    };
    text + &found + "\n"
}

/// Which clusters a verification has not looked at: in its report only, as nothing is wrong with a job for each of them.
pub fn not_verified(others: &[String]) -> String {
    if others.is_empty() { String::new() } else { format!("not looked at (--cluster): {}\n", others.join(", ")) }
}

#[cfg(test)]
mod tests {
    use engine::backup;
    use engine::repo::BackupType;
    use serde_json::Value;

    use super::super::tests::{full, incremental, lines};
    use super::super::to_json;
    use super::*;

    fn done(backup: BackupSummary) -> backup::Report {
        backup::Report {
            backup,
            seconds: 21.5,
            bytes_read: 123 << 30,
            bytes_written: 212 << 20,
            audit: None,
            repository_damage: Vec::new(),
        }
    }

    #[test]
    fn a_backup_says_what_kind_it_is_and_why() {
        assert_eq!(
            lines(&backup(&done(full()), Path::new("/backup/my pg"))),
            [
                "backup 20261121T010502Z-1a2b3c4d done in 21.5 s",
                "  kind     full (there is no earlier backup of this cluster)",
                "  read     123 GiB, 5.72 GiB/s",
                "  changed  16121856 blocks, found by scan",
                "  stored   31.0 GiB new, for a cluster of 123 GiB",
                "  WAL      2/28 to 2/100, 16.0 MiB",
                "the next backup into '/backup/my pg' stores only what changes from now on",
                "restore it: pgstrata restore 20261121T010502Z-1a2b3c4d --repo '/backup/my pg' --target DIR",
            ]
        );
        assert_eq!(kind_and_why(&incremental()), "incremental (what changed since 20261121T010502Z-1a2b3c4d)");
    }

    #[test]
    fn a_restore_says_how_to_start_the_copy() {
        let done = engine::restore::Report {
            backup: full(),
            target: "/srv/pg".into(),
            seconds: 2.0,
            bytes_read: 31 << 20,
            bytes_written: 64 << 20,
        };
        assert_eq!(
            lines(&restore(&done)),
            [
                "restored 20261121T010502Z-1a2b3c4d into /srv/pg in 2.0 s",
                "  read     31.0 MiB",
                "  written  64.0 MiB, 32.0 MiB/s",
                "start it with PostgreSQL 15: pg_ctl -D /srv/pg start",
                "while its original runs on this host: pg_ctl -D /srv/pg -o '-p 5433' start",
                "until it has recovered it refuses connections (\"Hot standby mode is disabled\"): pg_isready tells",
            ]
        );
    }

    fn merged() -> BackupSummary {
        BackupSummary {
            id: "20261123T010500Z-9c0d1e2f".parse().unwrap(),
            backup_type: BackupType::SyntheticFull,
            merged_from: Some(incremental().id),
            cluster: "shop".parse().unwrap(),
            stored_bytes: 3 << 20,
            ..full()
        }
    }

    #[test]
    fn a_merge_says_what_it_made_of_what() {
        let done =
            engine::merge::Report { backup: merged(), seconds: 2.0, bytes_read: 8 << 20, bytes_written: 3 << 20 };
        assert_eq!(
            lines(&merge(&done, Path::new("/backup/pg"))),
            [
                "backup 20261123T010500Z-9c0d1e2f made of 20261122T010500Z-5e6f7a8b in 2.0 s",
                "  kind     synthetic-full",
                "  read     8.00 MiB, 4.00 MiB/s",
                "  stored   3.00 MiB new, for a cluster of 123 GiB",
                "restore it: pgstrata restore 20261123T010500Z-9c0d1e2f --repo /backup/pg --cluster shop --target DIR",
            ]
        );
    }

    #[test]
    fn a_copy_leads_to_the_other_repository() {
        let done = engine::export::Report {
            backup: full(),
            to: "/mnt/off site".to_owned(),
            already_there: false,
            seconds: 2.0,
            bytes_read: 8 << 20,
            bytes_written: 8 << 20,
        };
        let to = Path::new("/mnt/off site");
        assert_eq!(
            lines(&copy(&done, to)),
            [
                "backup 20261121T010502Z-1a2b3c4d copied to '/mnt/off site' in 2.0 s",
                "  read     8.00 MiB, 4.00 MiB/s",
                "  written  8.00 MiB",
                "restore it: pgstrata restore 20261121T010502Z-1a2b3c4d --repo '/mnt/off site' --target DIR",
            ]
        );
        let again = copy(&engine::export::Report { already_there: true, ..done }, to);
        assert!(again.starts_with("backup 20261121T010502Z-1a2b3c4d is in '/mnt/off site' already\n"), "{again}");
    }

    #[test]
    fn an_export_to_files_says_what_to_look_at() {
        let done = |format, files: &[&str]| engine::export::FilesReport {
            backup: full(),
            target: "/srv/pg".into(),
            format,
            files: files.iter().map(ToString::to_string).collect(),
            seconds: 2.0,
            bytes_read: 31 << 20,
            bytes_written: 64 << 20,
        };
        let head = [
            "exported 20261121T010502Z-1a2b3c4d into /srv/pg in 2.0 s",
            "  read     31.0 MiB",
            "  written  64.0 MiB, 32.0 MiB/s",
        ];
        let plain = unpack(&done(FileFormat::Plain, &[]));
        let settings =
            "it has its source's settings, archive_command too: look at them before you start a server on it";
        assert_eq!(lines(&plain)[..3], head);
        assert_eq!(lines(&plain)[3..], ["check it: pg_verifybackup /srv/pg", settings]);
        let tar = unpack(&done(FileFormat::Tar, &["base.tar", "pg_wal.tar", "backup_manifest"]));
        assert_eq!(lines(&tar)[..3], head);
        assert_eq!(lines(&tar)[3..], ["  files    base.tar, pg_wal.tar, backup_manifest", settings]);
    }

    #[test]
    fn a_verification_names_what_is_damaged_and_what_that_touches() {
        let files: Vec<String> = (0..10).map(|i| format!("base/5/{i}")).collect();
        let damage = engine::verify::Damage {
            object: "packs/12".to_owned(),
            problem: "checksum differs at offset 4096".to_owned(),
            backups: vec![full().id.to_string()],
            files,
        };
        let done = engine::verify::Report {
            backups: vec![engine::verify::VerifiedBackup { backup: full(), ok: false }],
            damage: vec![damage],
            objects_checked: 2,
            seconds: 0.25,
            bytes_read: 8192,
            bytes_written: 0,
        };
        assert_eq!(
            lines(&verify(&done, false)),
            [
                "DAMAGED 20261121T010502Z-1a2b3c4d full",
                "damage: packs/12: checksum differs at offset 4096",
                "    backups: 20261121T010502Z-1a2b3c4d",
                "    files: base/5/0, base/5/1, base/5/2, base/5/3, base/5/4, base/5/5, base/5/6, base/5/7 and 2 more",
                "2 objects checked (every byte), 8.00 KiB read in 0.2 s",
                "DAMAGE FOUND: 1 problem",
            ]
        );
    }

    #[test]
    fn other_clusters_are_in_the_report_of_a_verification_and_no_note() {
        assert_eq!(not_verified(&[]), "");
        assert_eq!(not_verified(&["crm".to_owned(), "shop".to_owned()]), "not looked at (--cluster): crm, shop\n");
    }

    #[test]
    fn where_there_is_nothing_to_verify_that_is_said() {
        let nothing = engine::verify::Report {
            backups: Vec::new(),
            damage: Vec::new(),
            objects_checked: 0,
            seconds: 0.0,
            bytes_read: 0,
            bytes_written: 0,
        };
        assert_eq!(verify(&nothing, false), "there are no backups\n");
    }

    #[test]
    fn a_backup_as_json_has_the_facts_of_its_run_beside_those_of_the_backup() {
        let document: Value = serde_json::from_str(&to_json(&done(full())).unwrap()).unwrap();
        assert_eq!(document["id"], "20261121T010502Z-1a2b3c4d");
        assert_eq!((&document["seconds"], &document["bytes_written"]), (&21.5.into(), &(212 << 20).into()));
    }
}
