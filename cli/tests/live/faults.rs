//! What fails in the middle: the disk is full, the repository read-only or gone, the server killed, the session ended. Each command says so and exits
//! with 1 (or 5 where the repository cannot be opened), the old backups are as they were, the server is left alone, and the next run succeeds.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Lab, back_up_while, dump, fill, for_majors, judge, poll, reachable_binary, text};

for_majors!(a_server_that_goes_away_ends_the_backup_and_nothing_else: server_on_13 = 13, server_on_15 = 15, server_on_18 = 18);
for_majors!(a_repository_that_goes_away_ends_the_backup_and_nothing_else: gone_on_15 = 15);
for_majors!(a_full_disk_is_an_error_and_loses_nothing: full_on_15 = 15, full_on_18 = 18);
for_majors!(a_repository_that_may_only_be_read_can_be_read: readonly_on_15 = 15);

/// No session and no replication slot of ours stays on the server.
fn assert_left_alone(source: &Cluster) {
    let left = "SELECT (SELECT count(*) FROM pg_replication_slots)
                + (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgstrata')";
    poll(|| source.query_value("postgres", left).unwrap() == "0");
}

/// The backups that a repository had restore as before, and the next one is made.
fn assert_goes_on(lab: &Lab, source: &Cluster, before: &[serde_json::Value]) {
    assert_eq!(lab.list(), before);
    lab.verify();
    assert_left_alone(source);
    let expected = dump(source, &[]);
    let next = lab.backup(source, &[]);
    lab.verify();
    judge(lab.restore(text(&next, "id"), "restored-next", &[]), &expected, &[]);
}

fn a_server_that_goes_away_ends_the_backup_and_nothing_else(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default());
    lab.backup(&source, &[]);
    let before = lab.list();
    fill(&source);
    let ended = back_up_while(lab, &source, || {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgstrata'";
        source.sql("postgres", end).unwrap();
    });
    ended.refuses(1, &["connection"]);
    assert_eq!(lab.list(), before);
    assert_left_alone(&source);

    // The directory is there, but nobody can end the backup.
    let pid = source.pid().unwrap();
    let killed = back_up_while(lab, &source, || {
        let kill =
            |name: &str| std::process::Command::new("kill").args([name, pid.to_string().as_str()]).status().unwrap();
        assert!(kill("-QUIT").success());
    });
    killed.refuses(1, &["connection"]);
    assert_eq!(lab.list(), before);
    source.stop(StopMode::Immediate).unwrap();
    source.start().unwrap();
    assert_goes_on(lab, &source, &before);
}

fn a_repository_that_goes_away_ends_the_backup_and_nothing_else(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    lab.backup(&source, &[]);
    let before = lab.list();
    fill(&source);
    let away = lab.path("away");
    let run = back_up_while(lab, &source, || fs::rename(lab.repo(), &away).unwrap());
    assert!(matches!(run.code, Some(1 | 5)) && run.stderr.contains("error: "), "{run}");
    let _ = fs::remove_dir_all(lab.repo());
    fs::rename(&away, lab.repo()).unwrap();
    assert_goes_on(lab, &source, &before);
}

/// Runs a shell script in a name space of its own, in which it may mount what nobody else sees; `None`, said aloud, where that is not allowed.
fn in_name_space(lab: &Lab, script: &str) -> Option<crate::support::Run> {
    let unshare = |script: &str| {
        let mut command = lab.user.command("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).stdin(Stdio::null());
        command.output()
    };
    if !unshare("mount -t tmpfs none /mnt").is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no name spaces with mounts here");
        return None;
    }
    Some(crate::support::Run::of(script, unshare(script).unwrap()))
}

/// Runs pgstrata with the directory `small` on a file system of so many bytes; what it held is copied there, and what is there in the end is kept.
fn on_a_small_disk(lab: &Lab, small: &Path, bytes: u64, args: &[OsString]) -> Option<crate::support::Run> {
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_str().unwrap());
    let words: Vec<String> = args.iter().map(|arg| quoted(arg)).collect();
    let (small, copy) = (quoted(small.as_os_str()), quoted(lab.path("kept").as_os_str()));
    let script = format!(
        "mkdir -p {small} {copy} && cp -a {small}/. {copy}/ && mount -t tmpfs -o size={bytes},mode=700 none {small} && cp -a {copy}/. {small}/ || exit 99
         {binary} {words}; code=$?
         rm -rf {copy}/* && cp -a {small}/. {copy}/ && umount {small} && find {small} -mindepth 1 -delete && cp -a {copy}/. {small}/ && rm -rf {copy} || exit 98
         exit $code",
        binary = quoted(reachable_binary(&lab.user).as_os_str()),
        words = words.join(" "),
    );
    in_name_space(lab, &script)
}

/// Bytes of a directory, rounded up as a file system with pages does.
fn disk_usage(directory: &Path) -> u64 {
    crate::support::tree(directory)
        .values()
        .map(|entry| (entry.content.len() as u64).div_ceil(4096) * 4096 + 4096)
        .sum()
}

fn a_full_disk_is_an_error_and_loses_nothing(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    lab.backup(&source, &[]);
    source.sql("postgres", "CREATE TABLE early AS SELECT i, md5(i::text) FROM generate_series(1, 3000) i").unwrap();
    lab.backup(&source, &[]);
    fill(&source);
    let expected = dump(&source, &[]);
    let repo: OsString = lab.repo().into();
    let room = || disk_usage(&lab.repo()) + (1 << 20);
    let backup: Vec<OsString> = [
        "backup".into(),
        "--repo".into(),
        repo.clone(),
        "-D".into(),
        source.data_dir().into(),
        "-d".into(),
        source.conninfo().into(),
    ]
    .to_vec();
    let before = lab.list();
    let Some(full) = on_a_small_disk(lab, &lab.repo(), room(), &backup) else { return };
    full.refuses(1, &["No space left", "room"]);
    assert_eq!(lab.list(), before);
    lab.verify();
    assert_left_alone(&source);

    lab.backup(&source, &[]);
    let words = |words: &[&str]| -> Vec<OsString> {
        words.iter().map(OsString::from).chain(["--repo".into(), repo.clone()]).collect()
    };
    let before = lab.list();
    for command in [&["merge", "--repack"][..], &["expire", "--keep-last", "1", "--max-unused", "0"]] {
        let run = on_a_small_disk(lab, &lab.repo(), room(), &words(command)).unwrap();
        if command[0] == "merge" {
            run.refuses(1, &["No space left", "room"]);
            assert_eq!(lab.list(), before);
        } else {
            // What it removes first may be room enough for what it moves.
            assert!(matches!(run.code, Some(0 | 1)), "{run}");
            assert_eq!(text(&lab.list()[0], "id"), text(before.last().unwrap(), "id"));
        }
        lab.verify();
    }
    let offsite = lab.path("offsite");
    let export: Vec<OsString> = words(&["export", "--init", "--to", offsite.to_str().unwrap()]);
    let run = on_a_small_disk(lab, &offsite, 1 << 20, &export).unwrap();
    run.refuses(1, &["No space left", "room"]);
    lab.pgstrata(export).expect(0);

    let target = lab.path("target");
    let restore: Vec<OsString> = words(&["restore", "--target", target.to_str().unwrap()]);
    let run = on_a_small_disk(lab, &target, 8 << 20, &restore).unwrap();
    run.refuses(1, &["room"]);
    assert!(!target.join("global/pg_control").exists());
    let _ = fs::remove_dir_all(&target);
    let last = text(&lab.list()[0], "id").to_owned();
    judge(lab.restore(&last, "restored", &[]), &expected, &[]);
}

fn a_repository_that_may_only_be_read_can_be_read(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    lab.backup(&source, &[]);
    let expected = dump(&source, &[]);
    let repo = lab.repo();
    let (repo, data, conninfo) = (repo.to_str().unwrap(), source.data_dir().to_str().unwrap(), source.conninfo());
    let binary = reachable_binary(&lab.user).to_str().unwrap();
    let run = |words: &str| {
        let script = format!(
            "mount --bind '{repo}' '{repo}' && mount -o remount,ro,bind '{repo}' || exit 99; '{binary}' {words} --repo '{repo}'"
        );
        in_name_space(lab, &script)
    };
    let target: PathBuf = lab.path("from-read-only");
    for words in [
        format!("backup -D '{data}' -d '{conninfo}'"),
        "merge".to_owned(),
        "expire --keep-last 1".to_owned(),
        "pin latest".to_owned(),
    ] {
        let Some(run) = run(&words) else { return };
        run.refuses(1, &["read-only"]);
    }
    assert_left_alone(&source);
    for words in ["list".to_owned(), "verify".to_owned(), format!("restore --target '{}'", target.display())] {
        run(&words).unwrap().expect(0);
    }
    let copy = Cluster::adopt(&lab.server, &lab.tools, &target).unwrap();
    judge(copy, &expected, &[]);
}
