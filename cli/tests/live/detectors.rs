//! Detectors: what is read because the log names it, against what a scan finds, on every major.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Lab, dump, for_majors, judge, number, text};

for_majors!(
    detectors_find_what_a_scan_finds: history_on_13 = 13, history_on_14 = 14, history_on_15 = 15, history_on_16 = 16,
    history_on_17 = 17, history_on_18 = 18
);
for_majors!(wal_that_is_gone_is_found_in_an_archive_or_means_a_scan: gone_on_15 = 15, gone_on_18 = 18);
for_majors!(a_cluster_that_went_back_in_time_is_scanned: back_on_15 = 15, back_on_18 = 18);
for_majors!(a_promoted_standby_goes_on_from_the_backups_of_its_primary: promoted_on_15 = 15, promoted_on_18 = 18);
for_majors!(an_archive_of_another_past_is_not_followed: archive_on_15 = 15, archive_on_18 = 18);
for_majors!(corrupt_pages_of_the_parent_are_read_again: corrupt_on_15 = 15, corrupt_on_18 = 18);
for_majors!(summaries_serve_a_night_whose_wal_is_gone: summaries_on_17 = 17, summaries_on_18 = 18);
for_majors!(the_log_since_the_parent_is_held_before_a_backup_removes_it: held_on_17 = 17, held_on_18 = 18);
for_majors!(summaries_from_a_wrong_clock_are_not_trusted: clock_on_17 = 17, clock_on_18 = 18);
for_majors!(summaries_that_are_removed_are_not_waited_for: removed_on_18 = 18);
for_majors!(a_map_that_an_audit_found_wanting_is_not_kept: wanting_on_15 = 15, wanting_on_18 = 18);
for_majors!(summaries_of_a_future_that_was_given_up_are_not_trusted: given_up_on_18 = 18);
for_majors!(kept_maps_lead_from_an_older_parent_to_the_last_backup: kept_on_13 = 13, kept_on_16 = 16, kept_on_18 = 18);
for_majors!(checksums_switched_on_mean_a_scan: checksums_on_18 = 18);

fn major(lab: &Lab) -> u32 {
    lab.server.major
}

fn options(lab: &Lab) -> ClusterOptions {
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let options = options.conf("autovacuum = off").conf("wal_keep_size = 500").conf("max_prepared_transactions = 5");
    if major(lab) >= 17 { options.conf("summarize_wal = on") } else { options }
}

fn detectors(lab: &Lab) -> &'static [&'static str] {
    if major(lab) >= 17 { &["wal", "summary"] } else { &["wal"] }
}

/// The round after which a transaction is prepared.
const PREPARED: usize = 5;

/// What happens to the cluster between two backups; each of these lost somebody's data.
fn rounds() -> Vec<Vec<&'static str>> {
    vec![
        vec![
            "UPDATE t SET content = 'new' WHERE id % 500 = 1",
            "INSERT INTO t SELECT i, 'more' FROM generate_series(20001, 21000) i",
        ],
        // Truncated by vacuum, then extended again.
        vec![
            "DELETE FROM t WHERE id > 9000",
            "VACUUM t",
            "INSERT INTO t SELECT i, repeat('again', 9) FROM generate_series(30000, 39000) i",
        ],
        vec![
            "TRUNCATE small",
            "INSERT INTO small SELECT generate_series(1, 90)",
            "REINDEX TABLE t",
            "VACUUM FULL small",
        ],
        // Dropped and made again, and a database by file copy.
        vec![
            "DROP TABLE dropped",
            "CREATE TABLE dropped AS SELECT i, md5(i::text) FROM generate_series(1, 3000) i",
            "CREATE DATABASE copy TEMPLATE template0",
        ],
        vec![
            "ALTER TABLE unlogged SET LOGGED",
            "ALTER TABLE small SET UNLOGGED",
            "ALTER TABLE dropped ADD COLUMN more int DEFAULT 7",
        ],
        vec!["DROP DATABASE copy", "BEGIN; UPDATE t SET content = 'prepared' WHERE id < 200; PREPARE TRANSACTION 'p'"],
        vec!["COMMIT PREPARED 'p'", "SELECT lo_from_bytea(0, decode(repeat('ab', 90000), 'hex'))", "VACUUM (FREEZE)"],
    ]
}

fn furnish(source: &Cluster) {
    source
        .sql_each(
            "postgres",
            &[
                "CREATE TABLE t (id int PRIMARY KEY, content text)",
                "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 20000) i",
                "CREATE INDEX ON t USING gin (to_tsvector('simple', content))",
                "CREATE INDEX ON t USING brin (id)",
                "CREATE INDEX ON t USING hash (content)",
                "CREATE TABLE small AS SELECT generate_series(1, 2000) AS id",
                "CREATE TABLE dropped AS SELECT generate_series(1, 2000) AS id",
                "CREATE UNLOGGED TABLE unlogged AS SELECT * FROM t",
                "VACUUM",
            ],
        )
        .unwrap();
}

/// The files of the users' tables and indexes, in a restored directory.
fn user_files(source: &Cluster, restored: &Cluster) -> BTreeMap<String, Vec<u8>> {
    let paths = "SELECT pg_relation_filepath(oid) FROM pg_class WHERE oid >= 16384 AND relpersistence = 'p' \
                 AND relkind IN ('r', 'i', 't', 'S', 'm')";
    let rows = source.query_strings("postgres", paths).unwrap();
    let read = |path: String| (path.clone(), fs::read(restored.data_dir().join(path)).unwrap());
    rows.into_iter().filter_map(|row| row[0].clone()).map(read).collect()
}

/// Locks that nobody gives up would keep whoever examines indexes waiting.
fn has_a_prepared_transaction(mut restored: Cluster) {
    restored.start().unwrap();
    let count = "SELECT count(*) FROM pg_prepared_xacts";
    restored.wait_for("recovery", |restored| restored.query_value("postgres", count).is_ok_and(|n| n == "1")).unwrap();
    restored.sql("postgres", "COMMIT PREPARED 'p'").unwrap();
    let content = restored.query_value("postgres", "SELECT count(*) FROM t WHERE content = 'prepared'").unwrap();
    assert_eq!(content, "199");
}

fn detectors_find_what_a_scan_finds(lab: &Lab) {
    let mut source = lab.cluster(&options(lab));
    furnish(&source);
    let mut parent = text(&lab.backup(&source, &[]), "id").to_owned();
    for (round, statements) in rounds().into_iter().enumerate() {
        source.sql_each("postgres", &statements).unwrap();
        if round == 2 {
            source.restart(StopMode::Immediate).unwrap();
        }
        for detector in detectors(lab) {
            let report = lab.backup(&source, &["--parent", &parent, "--detect", detector, "--audit"]);
            let audit = &report["audit"];
            assert_eq!(
                (text(audit, "detector"), number(audit, "missed_count")),
                (if round == 2 { "wal" } else { detector }, 0),
                "round {round}: {audit}"
            );
        }
        // Before: to read rows sets hints in their pages.
        let expected = dump(&source, &[]);
        let scanned = lab.backup(&source, &["--parent", &parent, "--detect", "scan"]);
        let restored = lab.restore(text(&scanned, "id"), &format!("scan-{round}"), &[]);
        let files = user_files(&source, &restored);
        let mut last = None;
        for detector in detectors(lab) {
            // The summaries of a server that was started since prove nothing; the log does.
            let used = if round == 2 { "wal" } else { detector };
            let report = lab.backup(&source, &["--parent", &parent, "--detect", detector]);
            assert_eq!(text(&report, "detector"), used, "{report}");
            assert!(number(&report, "bytes_read") < number(&report, "cluster_bytes"), "{report}");
            let restored = lab.restore(text(&report, "id"), &format!("{detector}-{round}"), &[]);
            for (path, bytes) in user_files(&source, &restored) {
                assert!(bytes == files[&path], "round {round}: {detector} restores {path} to other bytes than a scan");
            }
            match round {
                PREPARED => has_a_prepared_transaction(restored),
                // The files are those of the scan; the rest is the same in all rounds.
                1 | 6 => judge(restored, &expected, &[]),
                _ => {}
            }
            last = Some(text(&report, "id").to_owned());
        }
        parent = last.unwrap();
    }
    lab.verify();
}

/// Lets the server forget its WAL.
fn recycle(source: &Cluster) {
    source.sql("postgres", "ALTER SYSTEM SET wal_keep_size = 0").unwrap();
    source.sql("postgres", "SELECT pg_reload_conf()").unwrap();
    for _ in 0..3 {
        source
            .sql_each(
                "postgres",
                &[
                    "INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 9000) i ON CONFLICT DO NOTHING",
                    "SELECT pg_switch_wal()",
                    "CHECKPOINT",
                ],
            )
            .unwrap();
    }
}

fn wal_that_is_gone_is_found_in_an_archive_or_means_a_scan(lab: &Lab) {
    let archive = lab.dir("archive");
    let copy = format!("archive_command = 'test ! -f {0}/%f && gzip < %p > {0}/%f.gz'", archive.display());
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let options = options.conf("autovacuum = off").conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    let mut source = lab.cluster(&options.conf("archive_mode = on").conf(&copy));
    furnish(&source);
    let full = text(&lab.backup(&source, &[]), "id").to_owned();
    recycle(&source);
    let last = source.query_value("postgres", "SELECT pg_walfile_name(pg_switch_wal())").unwrap();
    let archived = format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver");
    source
        .wait_for("the archiver", |source| source.query_value("postgres", &archived).is_ok_and(|is| is == "t"))
        .unwrap();
    let asked = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--detect".into(), "wal".into()]));
    assert!(asked.stderr.contains("is gone") && asked.stderr.contains("--wal-archive"), "{}", asked.stderr);
    assert_eq!(text(&asked.json(0), "detector"), "scan");
    let scanned = lab.backup(&source, &["--parent", &full]);
    assert_eq!(text(&scanned, "detector"), "scan");
    assert!(text(&scanned, "detector_reason").contains("is gone"), "{scanned}");
    let place = archive.display().to_string();
    let report = lab.backup(&source, &["--parent", &full, "--wal-archive", &place]);
    assert_eq!(text(&report, "detector"), "wal", "{report}");
    let expected = dump(&source, &[]);
    judge(lab.restore(text(&report, "id"), "restored", &[]), &expected, &[]);
    let missing = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--wal-archive".into(), "/nowhere".into()]));
    missing.refuses(1, &["/nowhere"]);
}

/// A server that keeps no more WAL than it must.
fn forgetful(lab: &Lab) -> ClusterOptions {
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let options = options.conf("autovacuum = off").conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    if major(lab) >= 17 { options.conf("summarize_wal = on") } else { options }
}

/// A backup of which nothing was missed, and that restores to what the cluster is.
fn night(lab: &Lab, source: &Cluster, more: &[&str]) -> Value {
    let audited = lab.backup(source, &[more, &["--audit"]].concat());
    let audit = &audited["audit"];
    assert_eq!(audit.get("missed_count").map_or(0, |_| number(audit, "missed_count")), 0, "{audit}");
    let expected = dump(source, &[]);
    let report = lab.backup(source, more);
    let id = text(&report, "id");
    judge(lab.restore(id, &format!("restored-{id}"), &[]), &expected, &[]);
    report
}

fn reason_has(report: &Value, detector: &str, words: &str) {
    assert_eq!(text(report, "detector"), detector, "{report}");
    assert!(text(report, "detector_reason").contains(words), "{report}");
}

fn merge(lab: &Lab, backup: &str) -> String {
    let merged = lab.pgstrata(["merge", "--json", backup, "--repo", lab.repo().to_str().unwrap()]).json(0);
    text(&merged, "id").to_owned()
}

fn touch(path: &Path) {
    testdata::cluster::succeed(std::process::Command::new("touch").arg(path)).unwrap();
}

fn summaries_serve_a_night_whose_wal_is_gone(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab));
    furnish(&source);
    lab.backup(&source, &[]);
    for _ in 0..2 {
        recycle(&source);
        reason_has(&night(lab, &source, &[]), "summary", "WAL summaries cover");
    }
    merge(lab, "latest");
    recycle(&source);
    reason_has(&night(lab, &source, &["--detect", "summary"]), "summary", "WAL summaries cover");
    source.restart(StopMode::Immediate).unwrap();
    recycle(&source);
    // Nothing tells the summaries of before from those of another past.
    let asked = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--detect".into(), "summary".into()]));
    assert!(asked.stderr.contains("summary was asked for and cannot be used, so scan is"), "{}", asked.stderr);
    reason_has(&asked.json(0), "scan", "is gone");
    recycle(&source);
    reason_has(&night(lab, &source, &[]), "summary", "WAL summaries cover");
    recycle(&source);
    for summary in fs::read_dir(source.data_dir().join("pg_wal/summaries")).unwrap() {
        touch(&summary.unwrap().path());
    }
    reason_has(&lab.backup(&source, &[]), "scan", "another past");
}

/// The log that waited for the summarizer when the server was stopped goes with the backup's own checkpoint.
fn the_log_since_the_parent_is_held_before_a_backup_removes_it(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab));
    furnish(&source);
    lab.backup(&source, &[]);
    source.sql("postgres", "UPDATE t SET content = 'new' WHERE id % 500 = 1").unwrap();
    source.restart(StopMode::Fast).unwrap();
    let report = lab.backup(&source, &["--audit"]);
    assert_eq!((text(&report["audit"], "detector"), number(&report["audit"], "missed_count")), ("wal", 0), "{report}");
}

/// As of a clock that was ahead: they look as if the server had written them that runs now.
fn summaries_from_a_wrong_clock_are_not_trusted(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab).conf("wal_keep_size = 200MB"));
    furnish(&source);
    lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    let old = lab.path("old");
    copy(source.data_dir(), &old);
    source.start().unwrap();
    recycle(&source);
    source.stop(StopMode::Fast).unwrap();
    let future = lab.path("future");
    copy(&source.data_dir().join("pg_wal/summaries"), &future);
    fs::remove_dir_all(source.data_dir()).unwrap();
    copy(&old, source.data_dir());
    let summaries = source.data_dir().join("pg_wal/summaries");
    for summary in fs::read_dir(&future).unwrap() {
        let (from, to) =
            (future.join(summary.as_ref().unwrap().file_name()), summaries.join(summary.unwrap().file_name()));
        if !to.exists() {
            copy(&from, &to);
            let ahead = std::time::SystemTime::now() + std::time::Duration::from_secs(3600);
            fs::OpenOptions::new().write(true).open(&to).unwrap().set_modified(ahead).unwrap();
        }
    }
    source.start().unwrap();
    source.sql_each("postgres", &["UPDATE t SET content = 'now' WHERE id < 100", "CHECKPOINT"]).unwrap();
    let parent = text(&lab.backup(&source, &[]), "id").to_owned();
    source.sql_each("postgres", &["UPDATE t SET content = 'later' WHERE id < 2000", "CHECKPOINT"]).unwrap();
    let report = night(lab, &source, &["--parent", &parent]);
    assert_ne!(text(&report, "detector"), "summary", "{report}");
}

/// What the summarizer has passed it does not write again.
fn summaries_that_are_removed_are_not_waited_for(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab));
    furnish(&source);
    lab.backup(&source, &[]);
    source.sql_each("postgres", &["UPDATE t SET content = 'now' WHERE id < 100", "CHECKPOINT"]).unwrap();
    let summaries = source.data_dir().join("pg_wal/summaries");
    source.wait_for("a summary", |_| fs::read_dir(&summaries).is_ok_and(|mut found| found.next().is_some())).unwrap();
    for summary in fs::read_dir(&summaries).unwrap() {
        fs::remove_file(summary.unwrap().path()).unwrap();
    }
    let report = lab.backup(&source, &[]);
    assert_ne!(text(&report, "detector"), "summary", "{report}");
    reason_has(&night(lab, &source, &[]), "summary", "WAL summaries cover");
}

/// A block that changed behind the log's back is stored by the audit, and the map that does not name it is kept for nobody.
fn a_map_that_an_audit_found_wanting_is_not_kept(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab).conf("max_wal_size = 64MB"));
    furnish(&source);
    source.sql_each("postgres", &["VACUUM (FREEZE) t", "CHECKPOINT"]).unwrap();
    let path = source.query_value("postgres", "SELECT pg_relation_filepath('t')").unwrap();
    let path = source.data_dir().join(path);
    let old = fs::read(&path).unwrap();
    source.sql_each("postgres", &["UPDATE t SET content = 'newer' WHERE ctid < '(3,0)'", "CHECKPOINT"]).unwrap();
    source.stop(StopMode::Fast).unwrap();
    source.start().unwrap();
    lab.backup(&source, &[]);
    let mut now = fs::read(&path).unwrap();
    now[..8192].copy_from_slice(&old[..8192]);
    write_over(&path, &now);
    let audited = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--audit".into()])).json(3);
    assert_eq!(number(&audited["audit"], "serious_count"), 1, "{audited}");
    assert!(!lab.repo().join("clusters/main/changes").exists());
}

/// The log is put back with the cluster, the summaries are not: the server takes those of the future that was given up for its own.
fn summaries_of_a_future_that_was_given_up_are_not_trusted(lab: &Lab) {
    let mut source = lab.cluster(&forgetful(lab));
    furnish(&source);
    source.stop(StopMode::Fast).unwrap();
    let old = lab.path("old");
    copy(source.data_dir(), &old);
    source.start().unwrap();
    source.sql("postgres", "UPDATE t SET content = 'a past that never was' WHERE id % 7 = 0").unwrap();
    lab.backup(&source, &[]);
    recycle(&source);
    lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    let summaries = lab.path("summaries");
    copy(&source.data_dir().join("pg_wal/summaries"), &summaries);
    fs::remove_dir_all(source.data_dir()).unwrap();
    copy(&old, source.data_dir());
    fs::remove_dir_all(source.data_dir().join("pg_wal/summaries")).unwrap();
    copy(&summaries, &source.data_dir().join("pg_wal/summaries"));
    source.start().unwrap();
    source.sql("postgres", "UPDATE t SET content = 'the other one' WHERE id % 5 = 0").unwrap();
    for _ in 0..3 {
        recycle(&source);
    }
    let report = night(lab, &source, &["--parent", "oldest"]);
    assert_eq!(text(&report, "detector"), "scan", "{report}");
    recycle(&source);
    reason_has(&night(lab, &source, &[]), "summary", "WAL summaries cover");
}

fn kept_maps_lead_from_an_older_parent_to_the_last_backup(lab: &Lab) {
    let source = lab.cluster(&forgetful(lab).conf("max_wal_size = 64MB"));
    furnish(&source);
    let full = text(&lab.backup(&source, &[]), "id").to_owned();
    let change = |text: &str| {
        let update = format!("UPDATE t SET content = '{text}' WHERE id % 400 = {}", text.len());
        source.sql_each("postgres", &[&update, "DELETE FROM t WHERE id > 19000", "VACUUM t"]).unwrap();
    };
    let mut ids = Vec::new();
    for content in ["a", "bb", "ccc"] {
        change(content);
        let report = lab.backup(&source, &["--detect", "wal"]);
        reason_has(&report, "wal", "WAL covers");
        ids.push(text(&report, "id").to_owned());
    }
    let merged = merge(lab, &ids[2]);
    change("dddd");
    reason_has(&lab.backup(&source, &["--parent", &merged, "--detect", "wal"]), "wal", "WAL covers");
    change("eeeee");
    let from_the_full = ["--parent", &full, "--detect", "wal"];
    reason_has(&night(lab, &source, &from_the_full), "wal", "kept maps lead to");
    let maps = lab.repo().join("clusters/main/changes");
    for map in fs::read_dir(&maps).unwrap() {
        let path = map.unwrap().path();
        if path.to_str().unwrap().ends_with(&full) {
            write_over(&path, b"damaged");
        }
    }
    reason_has(&lab.backup(&source, &from_the_full), "scan", "does not match its checksum");
    lab.pgstrata(["expire", "--json", "--keep-last", "1", "--repo", lab.repo().to_str().unwrap()]).json(0);
    let left = fs::read_dir(&maps).unwrap().count();
    assert!(left <= 1, "{left} maps of one backup");
}

/// A cluster that is put back to an old copy of its files writes other WAL at the same positions.
fn a_cluster_that_went_back_in_time_is_scanned(lab: &Lab) {
    let mut source = lab.cluster(&options(lab));
    furnish(&source);
    source.stop(StopMode::Fast).unwrap();
    let old = lab.path("old");
    copy(source.data_dir(), &old);
    source.start().unwrap();
    source.sql("postgres", "UPDATE t SET content = 'a past that never was' WHERE id % 7 = 0").unwrap();
    lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    fs::remove_dir_all(source.data_dir()).unwrap();
    copy(&old, source.data_dir());
    source.start().unwrap();
    for _ in 0..3 {
        source
            .sql_each(
                "postgres",
                &["UPDATE t SET content = 'the other one' WHERE id % 5 = 0", "SELECT pg_switch_wal()"],
            )
            .unwrap();
    }
    let report = lab.backup(&source, &[]);
    assert_eq!(text(&report, "detector"), "scan", "{report}");
    let expected = dump(&source, &[]);
    judge(lab.restore(text(&report, "id"), "restored", &[]), &expected, &[]);
}

/// The archive has the log of the past that was given up, up to where the cluster is now.
fn an_archive_of_another_past_is_not_followed(lab: &Lab) {
    let archive = lab.dir("archive");
    let command = format!("archive_command = 'test ! -f {0}/%f && cp %p {0}/%f'", archive.display());
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let options = options.conf("autovacuum = off").conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    let mut source = lab.cluster(&options.conf("archive_mode = on").conf(&command));
    furnish(&source);
    source.stop(StopMode::Fast).unwrap();
    let old = lab.path("old");
    copy(source.data_dir(), &old);
    source.start().unwrap();
    lab.backup(&source, &[]);
    for _ in 0..4 {
        source
            .sql_each("postgres", &["INSERT INTO small SELECT generate_series(1, 9000)", "SELECT pg_switch_wal()"])
            .unwrap();
    }
    let last = source.query_value("postgres", "SELECT pg_walfile_name(pg_switch_wal())").unwrap();
    let archived = format!("SELECT last_archived_wal >= '{last}' FROM pg_stat_archiver");
    source
        .wait_for("the archiver", |source| source.query_value("postgres", &archived).is_ok_and(|is| is == "t"))
        .unwrap();
    source.stop(StopMode::Immediate).unwrap();
    fs::remove_dir_all(source.data_dir()).unwrap();
    copy(&old, source.data_dir());
    source.start().unwrap();
    source.sql_each("postgres", &["UPDATE t SET content = 'now' WHERE id < 100", "SELECT pg_switch_wal()"]).unwrap();
    source
        .sql_each("postgres", &["UPDATE t SET content = 'later' WHERE id < 50", "SELECT pg_switch_wal()", "CHECKPOINT"])
        .unwrap();
    let report = lab.backup(&source, &["--wal-archive", &archive.display().to_string()]);
    assert_eq!(text(&report, "detector"), "scan", "{report}");
    let expected = dump(&source, &[]);
    judge(lab.restore(text(&report, "id"), "restored", &[]), &expected, &[]);
}

/// What was garbage when the parent read it is looked at again, and so is told again, or comes back.
fn corrupt_pages_of_the_parent_are_read_again(lab: &Lab) {
    let mut source = lab.cluster(&options(lab));
    furnish(&source);
    source.sql("postgres", "CHECKPOINT").unwrap();
    let path = source.query_value("postgres", "SELECT pg_relation_filepath('t')").unwrap();
    source.stop(StopMode::Fast).unwrap();
    let path = source.data_dir().join(path);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[7 * 8192 + 100..7 * 8192 + 3000].fill(0x5A);
    write_over(&path, &bad);
    source.start().unwrap();
    let args = || lab.backup_args(&source);
    assert_eq!(lab.pgstrata(args()).json(3)["corrupt_pages"].as_array().unwrap().len(), 1);
    let again = lab.pgstrata(args()).json(3);
    assert_eq!((text(&again, "detector"), again["corrupt_pages"].as_array().unwrap().len()), ("scan", 1));
    write_over(&path, &good);
    let healed = lab.pgstrata(args()).json(0);
    let expected = dump(&source, &[]);
    judge(lab.restore(text(&healed, "id"), "restored", &[]), &expected, &[]);
    let next = lab.backup(&source, &[]);
    assert_ne!(text(&next, "detector"), "scan", "{next}");
}

/// Changes a file's bytes, whoever owns it.
fn write_over(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

fn copy(from: &Path, to: &Path) {
    testdata::cluster::succeed(std::process::Command::new("cp").arg("-a").args([from, to])).unwrap();
}

fn a_promoted_standby_goes_on_from_the_backups_of_its_primary(lab: &Lab) {
    let primary = lab.cluster(&options(lab));
    furnish(&primary);
    let mut standby = primary.make_standby().unwrap();
    lab.backup(&primary, &[]);
    primary.sql_each("postgres", &["DELETE FROM t WHERE id > 10000", "VACUUM t", "CHECKPOINT"]).unwrap();
    let written = primary.query_value("postgres", "SELECT pg_current_wal_lsn()").unwrap();
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
    standby.wait_for("replay", |standby| standby.query_value("postgres", &replayed).is_ok_and(|is| is == "t")).unwrap();
    standby.promote().unwrap();
    standby
        .sql_each("postgres", &["INSERT INTO t SELECT i, 'grown' FROM generate_series(50000, 59000) i", "CHECKPOINT"])
        .unwrap();
    let report = lab.backup(&standby, &["--detect", "wal"]);
    assert_eq!((text(&report, "detector"), text(&report, "type")), ("wal", "incremental"));
    let audit = lab.backup(&standby, &["--parent", "oldest", "--detect", "wal", "--audit"]);
    assert_eq!(number(&audit["audit"], "missed_count"), 0, "{audit}");
    let expected = dump(&standby, &[]);
    judge(lab.restore(text(&report, "id"), "restored", &[]), &expected, &[]);
    // The old primary goes on where nobody follows it: its WAL is another past.
    primary.sql_each("postgres", &["UPDATE t SET content = 'alone' WHERE id < 500", "CHECKPOINT"]).unwrap();
    let alone = lab.backup(&primary, &[]);
    assert_eq!(text(&alone, "detector"), "scan", "{alone}");
    let expected = dump(&primary, &[]);
    judge(lab.restore(text(&alone, "id"), "restored-alone", &[]), &expected, &[]);
}

fn checksums_switched_on_mean_a_scan(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions { checksums: false, ..options(lab) });
    furnish(&source);
    lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    let mut tool = source.tool("pg_checksums").unwrap();
    testdata::cluster::succeed(tool.arg("--enable").arg("-D").arg(source.data_dir())).unwrap();
    source.start().unwrap();
    let report = lab.backup(&source, &[]);
    assert_eq!(text(&report, "detector"), "scan");
    assert!(text(&report, "detector_reason").contains("checksums"), "{report}");
    let expected = dump(&source, &[]);
    judge(lab.restore(text(&report, "id"), "restored", &[]), &expected, &[]);
}
