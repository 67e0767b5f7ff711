//! What `check` says of servers, directories and repositories of every kind, and that it changes none of them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Lab, Run, for_majors, number, text, tree};

for_majors!(
    a_check_goes_with_a_cluster_from_before_its_first_night:
    nights_on_13 = 13, nights_on_15 = 15, nights_on_18 = 18
);
for_majors!(what_a_backup_would_stumble_over_is_said: sources_on_13 = 13, sources_on_15 = 15, sources_on_18 = 18);
for_majors!(a_repository_that_is_not_well_is_told_by_its_exit_code: repositories_on_18 = 18);
for_majors!(what_would_spare_a_scan_is_said_in_numbers: scans_on_13 = 13, scans_on_15 = 15, scans_on_18 = 18);
for_majors!(a_standby_is_checked_like_a_primary: standby_on_13 = 13, standby_on_18 = 18);

fn options() -> ClusterOptions {
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    options.conf("autovacuum = off").conf("max_wal_size = 4MB").conf("min_wal_size = 2MB")
}

/// A check of the lab's repository with `-D` and `-d`.
fn check_of(lab: &Lab, data_dir: &Path, conninfo: &str, more: &[&str]) -> Run {
    let words = ["check", "--json", "--repo"].map(OsString::from);
    let rest: [OsString; 5] = [lab.repo().into(), "-D".into(), data_dir.into(), "-d".into(), conninfo.into()];
    lab.pgstrata(words.into_iter().chain(rest).chain(more.iter().map(OsString::from)))
}

fn check(lab: &Lab, source: &Cluster, code: i32) -> Value {
    check_of(lab, source.data_dir(), &source.conninfo(), &[]).json(code)
}

/// The answer to one question.
fn answer<'a>(report: &'a Value, check: &str) -> &'a Value {
    let found = report["checks"].as_array().unwrap().iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("nothing is said of {check} in {report:#}"))
}

/// Proves how the answer to a question is, and that it says all of `words`, itself or in its hint.
fn says(report: &Value, check: &str, status: &str, words: &[&str]) {
    let all = report["checks"].as_array().unwrap().iter().filter(|finding| finding["check"] == check);
    let told: Vec<String> = all.filter(|finding| finding["status"] == status).map(ToString::to_string).collect();
    let has_all = |text: &String| words.iter().all(|word| text.contains(word));
    assert!(told.iter().any(has_all), "{check} is not {status} with {words:?} in {report:#}");
}

fn init(lab: &Lab) {
    let init: [OsString; 3] = ["init".into(), "--repo".into(), lab.repo().into()];
    lab.pgstrata(init).expect(0);
}

fn furnish(source: &Cluster) {
    let rows = "CREATE TABLE t AS SELECT i AS id, repeat(md5(i::text), 10) AS content FROM generate_series(1, 20000) i";
    source.sql_each("postgres", &[rows, "VACUUM t", "CHECKPOINT"]).unwrap();
}

fn a_check_goes_with_a_cluster_from_before_its_first_night(lab: &Lab) {
    let source = lab.cluster(&options());
    furnish(&source);
    // No repository yet: said with what to do, and none is made.
    let none = check(lab, &source, 1);
    says(&none, "repository", "failed", &["no repository", "pgstrata init", "backup --init"]);
    says(&none, "connection", "ok", &["primary"]);
    assert_eq!((&none["status"], &none["backup_possible"]), (&"failed".into(), &false.into()));
    assert!(!lab.repo().exists());

    init(lab);
    let first = check(lab, &source, 0);
    says(&first, "writable", "ok", &[]);
    says(&first, "backups", "ok", &["no backups yet"]);
    says(&first, "detector", "ok", &["full"]);
    for question in ["connection", "rights", "wal_level", "slots", "checksums", "files"] {
        says(&first, question, "ok", &[]);
    }
    assert_eq!(first["backup_possible"], true);
    assert_eq!((number(&first, "backup_count"), &first["newest_backup"]), (0, &Value::Null));

    let full = lab.backup(&source, &[]);
    let before = tree(&lab.repo());
    let second = check(lab, &source, 0);
    assert!(tree(&lab.repo()) == before, "a check changed the repository");
    assert_eq!(text(&second, "newest_backup"), text(&full, "id"));
    assert_eq!((text(&second, "newest_type"), &second["data_checksums"]), ("full", &true.into()));
    assert!(number(&second, "newest_age_seconds") < 600);
    says(&second, "cluster", "ok", &[text(&full, "system_identifier")]);
    assert_eq!(number(&second, "cluster_bytes"), number(&full, "cluster_bytes"));
    assert!(number(&second, "relation_bytes") < number(&second, "cluster_bytes"));
    assert!(number(&second, "free_bytes") > 0);
    // The forecast is what then happens.
    source.sql("postgres", "UPDATE t SET content = 'new' WHERE id < 50").unwrap();
    let forecast = check(lab, &source, 0);
    let incremental = lab.backup(&source, &[]);
    assert_eq!(text(&forecast, "detector"), text(&incremental, "detector"));
    let last = check(lab, &source, 0);
    assert_eq!(number(&last, "last_changed_bytes"), number(&incremental, "blocks_changed") * 8192);

    // Found by libpq's environment alone, and for people.
    let repo = lab.repo().into_os_string().into_string().unwrap();
    let told = lab.pgstrata_in(["check", "--repo", &repo], &source.libpq_env());
    told.expect(0);
    assert!(told.stderr.is_empty() && told.stdout.contains("server\n  ok       PostgreSQL"), "{told}");
    assert!(told.stdout.contains("a backup would work: "), "{told}");
    // A name that nobody has.
    let other = check_of(lab, source.data_dir(), &source.conninfo(), &["--cluster", "shop"]).json(0);
    says(&other, "backups", "warning", &["main", "--cluster"]);
    says(&other, "cluster", "warning", &["as main", "--cluster main"]);
    let other = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--cluster".into(), "shop".into()]));
    other.expect(0);
    assert!(other.stderr.contains("note: this cluster's backups are under --cluster main; this one begins"), "{other}");
    let goes_on = lab.pgstrata(lab.backup_args(&source));
    assert!(!goes_on.stderr.contains("another chain"), "{goes_on}");
}

fn what_a_backup_would_stumble_over_is_said(lab: &Lab) {
    let without_checksums = ClusterOptions { checksums: false, ..options() };
    let mut source = lab.cluster(&without_checksums.conf("max_wal_senders = 0"));
    let other = lab.cluster(&options());
    init(lab);
    says(&check(lab, &source, 0), "checksums", "warning", &["corrupt page", "pg_checksums"]);
    let refuses = |data_dir: &Path, conninfo: &str, question: &str, words: &[&str]| {
        let run = check_of(lab, data_dir, conninfo, &[]);
        says(&run.json(1), question, "failed", words);
        assert!(run.stderr.starts_with("error: no backup can be made: "), "{run}");
    };
    // The directory of another server, no directory, a directory of another kind.
    refuses(source.data_dir(), &other.conninfo(), "data_directory", &["is the cluster", "-d"]);
    refuses(&lab.path("gone"), &source.conninfo(), "data_directory", &["gone"]);
    refuses(&lab.dir("empty"), &source.conninfo(), "data_directory", &["empty"]);
    // The repository inside of it.
    let inside = source.data_dir().join("repo").into_os_string();
    let words: [OsString; 7] =
        ["check".into(), "--json".into(), "--repo".into(), inside, "-D".into(), source.data_dir().into(), "-d".into()];
    let run = lab.pgstrata(words.into_iter().chain([source.conninfo().into()]));
    says(&run.json(1), "place", "failed", &["lies in the data directory"]);

    // Roles without rights, and with some; all that is missing is said at once.
    source
        .sql_each("postgres", &["CREATE ROLE plain LOGIN", "CREATE ROLE reader LOGIN IN ROLE pg_read_all_settings"])
        .unwrap();
    let as_role = |role: &str| source.conninfo().replace("user=postgres", &format!("user={role}"));
    refuses(source.data_dir(), &as_role("plain"), "connection", &["GRANT", "REPLICATION"]);
    refuses(source.data_dir(), &as_role("reader"), "rights", &["REPLICATION", "GRANT EXECUTE"]);
    // Nor is a repository made for a backup that would fail.
    let unmade = lab.path("unmade");
    let words: [OsString; 6] = [
        "backup".into(),
        "--init".into(),
        "--repo".into(),
        unmade.clone().into(),
        "-d".into(),
        as_role("reader").into(),
    ];
    lab.pgstrata(words).refuses(1, &["may not back up", "GRANT EXECUTE"]);
    assert!(!unmade.exists());
    let functions = match lab.server.major {
        13 | 14 => "pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)",
        _ => "pg_backup_start(text, boolean), pg_backup_stop(boolean)",
    };
    let grant = format!("GRANT EXECUTE ON FUNCTION {functions} TO reader");
    source.sql_each("postgres", &[&grant, "ALTER ROLE reader REPLICATION"]).unwrap();
    says(&check_of(lab, source.data_dir(), &as_role("reader"), &[]).json(0), "rights", "ok", &["reader"]);

    // No slot is free: a backup does without. A file that cannot be read, and a socket that is nobody's.
    source.sql("postgres", "SELECT pg_create_physical_replication_slot('a')").unwrap();
    source.add_conf(&["max_replication_slots = 1".to_owned()]).unwrap();
    source.restart(StopMode::Fast).unwrap();
    says(&check(lab, &source, 0), "slots", "warning", &["none of 1 replication slot", "max_replication_slots"]);
    let locked = source.data_dir().join("server.key");
    fs::write(&locked, b"key").unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
    refuses(source.data_dir(), &source.conninfo(), "files", &["server.key"]);
    fs::remove_file(&locked).unwrap();

    source.sql("postgres", "SELECT pg_drop_replication_slot('a')").unwrap();
    source.add_conf(&["wal_level = minimal".to_owned(), "max_replication_slots = 0".to_owned()]).unwrap();
    source.restart(StopMode::Fast).unwrap();
    refuses(source.data_dir(), &source.conninfo(), "wal_level", &["minimal", "wal_level = replica"]);

    // A server that is stopped.
    source.stop(StopMode::Fast).unwrap();
    refuses(source.data_dir(), &source.conninfo(), "connection", &["--offline"]);
    let words = ["check", "--json", "--repo"].map(OsString::from);
    let run = lab.pgstrata(words.into_iter().chain([lab.repo().into(), "-D".into(), source.data_dir().into()]));
    says(&run.json(1), "connection", "failed", &["no server runs on"]);

    // The repository is another cluster's.
    lab.backup(&other, &[]);
    source.add_conf(&["wal_level = replica".to_owned(), "max_replication_slots = 10".to_owned()]).unwrap();
    source.start().unwrap();
    refuses(source.data_dir(), &source.conninfo(), "cluster", &["--cluster"]);
}

fn a_repository_that_is_not_well_is_told_by_its_exit_code(lab: &Lab) {
    let source = lab.cluster(&options());
    furnish(&source);
    let mut ids = Vec::new();
    for _ in 0..3 {
        source.sql("postgres", "UPDATE t SET content = 'new' WHERE id < 50").unwrap();
        ids.push(text(&lab.backup(&source, &[]), "id").to_owned());
    }
    // It may only be read.
    let directories = || tree(&lab.repo()).into_iter().filter(|(path, _)| lab.repo().join(path).is_dir());
    let paths: Vec<PathBuf> = directories().map(|(path, _)| lab.repo().join(path)).chain([lab.repo()]).collect();
    let set = |mode| paths.iter().for_each(|path| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap());
    set(0o500);
    let read_only = check(lab, &source, 1);
    set(0o700);
    says(&read_only, "writable", "failed", &["ermission"]);
    says(&read_only, "backups", "ok", &["3 backups"]);
    whoever_cannot_list_it_exits_with_five(lab, &source);

    // A pack of the newest is gone: the next one is in full.
    let packs = lab.repo().join("clusters/main/packs").join(&ids[2]);
    let away = lab.path("away");
    fs::rename(&packs, &away).unwrap();
    let lacking = check(lab, &source, 3);
    says(&lacking, "packs", "failed", &[&ids[2], "missing", "verify"]);
    says(&lacking, "detector", "warning", &["full"]);
    assert_eq!((&lacking["status"], &lacking["backup_possible"]), (&"failed".into(), &true.into()));
    fs::rename(&away, &packs).unwrap();
    check(lab, &source, 0);

    // An earlier verification found damage.
    let pack = fs::read_dir(&packs).unwrap().map(|entry| entry.unwrap().path()).next().unwrap();
    let sound = fs::read(&pack).unwrap();
    let mut bytes = sound.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let verify: [OsString; 3] = ["verify".into(), "--repo".into(), lab.repo().into()];
    lab.pgstrata(&verify).expect(3);
    says(&check(lab, &source, 3), "packs", "failed", &[&ids[2], "found it damaged"]);
    fs::write(&pack, sound).unwrap();
    lab.pgstrata(&verify).expect(0);
    check(lab, &source, 0);

    // A lock that does not read keeps backups out.
    let lock = lab.repo().join("clusters/main/leases/20261121T010502Z-1a2b3c4d.0");
    fs::write(&lock, b"garbage").unwrap();
    says(&check(lab, &source, 5), "locks", "failed", &["delete that file"]);
    fs::remove_file(&lock).unwrap();

    // A manifest is damaged.
    let manifests = lab.repo().join("clusters/main/manifests");
    let manifest = fs::read_dir(&manifests).unwrap().map(|entry| entry.unwrap().path());
    let manifest = manifest.into_iter().find(|path| path.to_string_lossy().contains(&ids[0])).unwrap();
    let mut bytes = fs::read(&manifest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    let run = check_of(lab, source.data_dir(), &source.conninfo(), &[]);
    says(&run.json(3), "manifests", "failed", &[&ids[0], "cannot be read"]);
    assert!(run.stderr.starts_with("error: a backup cannot be read"), "{run}");
    assert_eq!(
        lab.pgstrata(lab.backup_args(&source)).code,
        Some(3),
        "a backup goes on where a check says that it would"
    );

    // The header is damaged; and it is no repository at all.
    let header = lab.repo().join("repository");
    let sound = fs::read(&header).unwrap();
    fs::write(&header, &sound[1..]).unwrap();
    says(&check(lab, &source, 5), "repository", "failed", &["damaged", "don't make a new repository"]);
    fs::remove_file(&header).unwrap();
    says(&check(lab, &source, 1), "repository", "failed", &["is not a repository"]);
}

/// One rule for all commands, whichever directory it is.
fn whoever_cannot_list_it_exits_with_five(lab: &Lab, source: &Cluster) {
    let repo = lab.repo().into_os_string().into_string().unwrap();
    let target = lab.path("target").into_os_string().into_string().unwrap();
    let commands = [
        vec!["list"],
        vec!["info", "latest"],
        vec!["verify"],
        vec!["restore", "--target", &target],
        vec!["merge"],
        vec!["expire", "--keep-last", "1"],
        vec!["pin", "latest"],
        vec!["export", "--to", &target, "--init"],
    ];
    for directory in ["", "clusters", "clusters/main", "clusters/main/manifests", "clusters/main/packs"] {
        let place = lab.repo().join(directory);
        let close = |mode| fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
        close(0o300);
        let checked = check_of(lab, source.data_dir(), &source.conninfo(), &[]);
        let backed_up = lab.pgstrata(lab.backup_args(source));
        let others: Vec<Run> =
            commands.iter().map(|words| lab.pgstrata(words.iter().chain(&["--repo", &repo]))).collect();
        close(0o700);
        for run in others.iter().chain([&checked, &backed_up]) {
            assert_eq!(run.code, Some(5), "{directory:?} cannot be listed: {run}");
        }
    }
}

/// Lets the server forget its WAL.
fn recycle(source: &Cluster) {
    for _ in 0..4 {
        let more = "INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 3000) i";
        source.sql_each("postgres", &[more, "SELECT pg_switch_wal()", "CHECKPOINT"]).unwrap();
    }
}

/// Changes a setting, as a session that begins now sees it.
fn set(cluster: &mut Cluster, name: &str, value: &str) {
    cluster.sql("postgres", &format!("ALTER SYSTEM SET {name} = '{value}'")).unwrap();
    cluster.sql("postgres", "SELECT pg_reload_conf()").unwrap();
    let show = format!("SHOW {name}");
    cluster.wait_for(name, |cluster| cluster.query_value("postgres", &show).is_ok_and(|is| is == value)).unwrap();
}

fn what_would_spare_a_scan_is_said_in_numbers(lab: &Lab) {
    let mut source = lab.cluster(&options());
    let has_summaries = lab.server.major >= 17;
    furnish(&source);
    lab.backup(&source, &[]);
    recycle(&source);
    let gone = check(lab, &source, 0);
    assert_eq!(text(&gone, "detector"), "scan");
    let question = if has_summaries { "summarize_wal" } else { "wal" };
    let cure = if has_summaries { "ALTER SYSTEM SET summarize_wal = on" } else { "wal_keep_size" };
    says(&gone, question, "warning", &["each incremental reads all", "of relation files", cure]);

    let scanned = lab.pgstrata(lab.backup_args(&source));
    assert_eq!(text(&scanned.json(0), "detector"), "scan");
    let notice = scanned.stderr.contains("note: summarize_wal is off: this backup read ");
    assert_eq!(notice, has_summaries, "{scanned}");
    let notice = scanned.stderr.contains("note: this backup read ") && scanned.stderr.contains("SET wal_keep_size = '");
    assert_eq!(notice, !has_summaries, "{scanned}");
    // By now all WAL since then is there; the next night it would be gone again.
    let warned = check(lab, &source, 0);
    assert_eq!(text(&warned, "detector"), "wal");
    says(&warned, question, "warning", &["the newest backup", "is gone", cure]);
    let asked = lab.pgstrata(lab.backup_args(&source).into_iter().chain(["--detect".into(), "scan".into()]));
    assert!(!asked.stderr.contains("summarize_wal") && !asked.stderr.contains("wal_keep_size"), "{asked}");
    assert!(check(lab, &source, 0)["checks"].as_array().unwrap().iter().all(|found| found["check"] != "wal"));
    recycle(&source);
    says(&check(lab, &source, 0), question, "warning", &["changed", "of the last scan"]);

    // An archive that is not there ends a backup; an empty one is none.
    let nowhere = check_of(lab, source.data_dir(), &source.conninfo(), &["--wal-archive", "/nowhere"]);
    says(&nowhere.json(1), "wal_archive", "failed", &["/nowhere", "--wal-archive"]);
    let empty = lab.dir("empty").into_os_string().into_string().unwrap();
    let empty = check_of(lab, source.data_dir(), &source.conninfo(), &["--wal-archive", &empty]).json(0);
    says(&empty, "wal_archive", "warning", &["no WAL segment"]);

    // What was said is done.
    set(&mut source, "wal_keep_size", "1GB");
    if has_summaries {
        set(&mut source, "summarize_wal", "on");
    }
    lab.backup(&source, &[]);
    source.sql("postgres", "UPDATE t SET content = 'new' WHERE id < 50").unwrap();
    let spared = check(lab, &source, 0);
    assert_eq!(text(&spared, "detector"), if has_summaries { "summary" } else { "wal" }, "{spared:#}");
    let advised = spared["checks"].as_array().unwrap().iter().any(|finding| finding["check"] == question);
    assert!(!advised, "{spared:#}");
    assert_eq!(text(&lab.backup(&source, &[]), "detector"), text(&spared, "detector"));
    if has_summaries {
        set(&mut source, "summarize_wal", "off");
        let off = check(lab, &source, 0);
        assert_eq!(text(&off, "detector"), "wal");
        says(&off, "summarize_wal", "ok", &["summarize_wal is off", "ALTER SYSTEM SET summarize_wal = on"]);
    }
}

fn a_standby_is_checked_like_a_primary(lab: &Lab) {
    let mut primary = lab.cluster(&options().conf("wal_keep_size = 200"));
    furnish(&primary);
    let mut standby = primary.make_standby().unwrap();
    lab.backup(&primary, &[]);
    let report = check(lab, &standby, 0);
    assert_eq!(report["is_standby"], true);
    says(&report, "connection", "ok", &["a standby"]);
    says(&report, "cluster", "ok", &[]);
    assert!(answer(&report, "detector")["message"].as_str().unwrap().contains("next incremental"), "{report:#}");
    lab.backup(&standby, &[]);
    assert_eq!(check(lab, &standby, 0)["backup_possible"], true);

    // From WAL without whole pages, a standby cannot be backed up, and a primary can.
    set(&mut primary, "full_page_writes", "off");
    let without = "SELECT full_page_writes FROM pg_control_checkpoint()";
    // The checkpointer hears of it in its own time.
    let checkpoint = |primary: &Cluster| {
        primary.sql("postgres", "CHECKPOINT").unwrap();
        primary.query_value("postgres", without).is_ok_and(|is| is == "f")
    };
    primary.wait_for("a checkpoint without images of pages", checkpoint).unwrap();
    let written = primary.query_value("postgres", "SELECT pg_current_wal_lsn()").unwrap();
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
    standby.wait_for("replay", |standby| standby.query_value("postgres", &replayed).is_ok_and(|is| is == "t")).unwrap();
    standby.sql("postgres", "CHECKPOINT").unwrap();
    says(&check(lab, &standby, 1), "full_page_writes", "failed", &["full_page_writes = on"]);
    assert_eq!(
        lab.pgstrata(lab.backup_args(&standby)).code,
        Some(1),
        "a backup fails where a check says that it would"
    );
    check(lab, &primary, 0);
    lab.backup(&primary, &[]);
}
