//! What a restore refuses, and what it does not let a restored copy inherit.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use testdata::cluster::{ClusterOptions, StopMode};

use crate::support::{Lab, dump, for_majors, judge, judge_running, text, tree};

for_majors!(nothing_hostile_is_inherited: hostile_on_13 = 13, hostile_on_15 = 15, hostile_on_18 = 18);
for_majors!(wal_in_another_place_comes_back_into_the_directory: linked_wal_on_15 = 15, linked_wal_on_18 = 18);
for_majors!(what_its_owner_may_not_write_to_comes_back: modes_on_15 = 15);
for_majors!(a_restore_refuses_what_would_do_harm: refusals_on_15 = 15, refusals_on_18 = 18);

/// The source carries the settings of a cluster that was itself restored to a point in time, follows another server,
/// and archives. Its copy must neither obey them nor write into the archive.
fn nothing_hostile_is_inherited(lab: &Lab) {
    let (archive, traps) = (lab.dir("archive"), lab.dir("traps"));
    let (archive_shown, traps_shown) = (archive.display(), traps.display());
    let options = ClusterOptions::default()
        .conf("archive_mode = on")
        .conf(&format!("archive_command = 'cp %p {archive_shown}/%f'"))
        .conf("recovery_target_action = 'shutdown'");
    let mut source = lab.cluster(&options);
    let trap = |setting: &str| format!("ALTER SYSTEM SET {setting} = 'touch {traps_shown}/{setting}; false'");
    source
        .sql_each(
            "postgres",
            &[
                "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i",
                &trap("restore_command"),
                &trap("recovery_end_command"),
                &trap("archive_cleanup_command"),
                "ALTER SYSTEM SET recovery_target_name = 'nowhere'",
                "ALTER SYSTEM SET recovery_target_timeline = '7'",
                "ALTER SYSTEM SET recovery_min_apply_delay = '1h'",
                "ALTER SYSTEM SET primary_conninfo = 'host=/nonexistent'",
                "ALTER SYSTEM SET primary_slot_name = 'theirs'",
                "ALTER SYSTEM SET work_mem = '5MB'",
            ],
        )
        .unwrap();
    let expected = dump(&source, &[]);
    let report = lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    let archived = tree(&archive);

    let mut restored = lab.restore(text(&report, "id"), "restored", &[]);
    restored.start().unwrap();
    assert_eq!(expected, dump(&restored, &[]));
    assert_eq!(restored.query_value("postgres", "SHOW work_mem").unwrap(), "5MB");
    restored.sql_each("postgres", &["INSERT INTO t VALUES (0)", "SELECT pg_switch_wal()", "CHECKPOINT"]).unwrap();
    judge_running(&mut restored);
    assert!(tree(&archive) == archived, "the restored copy wrote into the archive of its source");
    assert!(tree(&traps).is_empty(), "the restored copy ran {:?}", tree(&traps).keys());
}

fn a_restore_refuses_what_would_do_harm(lab: &Lab) {
    let tablespace = lab.dir("space");
    let source = lab.cluster(&ClusterOptions::default());
    source.sql("postgres", &format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display())).unwrap();
    source.sql("postgres", "CREATE TABLE t TABLESPACE space AS SELECT generate_series(1, 1000) AS i").unwrap();
    let id = text(&lab.backup(&source, &[]), "id").to_owned();

    let occupied = lab.dir("occupied");
    fs::write(occupied.join("theirs"), b"precious").unwrap();
    let before = tree(&occupied);
    let map = [(tablespace.clone(), lab.path("elsewhere"))];
    lab.run_restore(&id, &occupied, &map).refuses(1, &[occupied.to_str().unwrap()]);
    assert!(tree(&occupied) == before);

    let running = source.data_dir();
    lab.run_restore(&id, running, &map).refuses(1, &[running.to_str().unwrap()]);
    assert_eq!(source.query_value("postgres", "SELECT count(*) FROM t").unwrap(), "1000");

    // The source's own tablespace is in the way, then another directory that is not empty.
    let before = tree(&tablespace);
    let target = lab.path("target");
    lab.run_restore(&id, &target, &[]).refuses(1, &[tablespace.to_str().unwrap()]);
    assert!(tree(&tablespace) == before);
    let onto_occupied = [(tablespace.clone(), occupied.clone())];
    lab.run_restore(&id, &target, &onto_occupied).refuses(1, &[occupied.to_str().unwrap()]);
    let unknown = [(lab.path("no such tablespace"), lab.path("x")), map[0].clone()];
    lab.run_restore(&id, &target, &unknown).refuses(1, &["no such tablespace"]);

    lab.run_restore("20000101", &target, &map).refuses(1, &["20000101"]);
    assert!(!target.exists() || tree(&target).is_empty(), "a refused restore left something behind");
    let mut restored = lab.restore("latest", "target", &map);
    restored.start().unwrap();
    assert_eq!(restored.query_value("postgres", "SELECT count(*) FROM t").unwrap(), "1000");
    judge_running(&mut restored);
}

/// `pg_wal` is a symbolic link in the source, as `initdb --waldir` makes it.
fn wal_in_another_place_comes_back_into_the_directory(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default());
    source.sql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").unwrap();
    source.stop(StopMode::Fast).unwrap();
    let (inside, outside) = (source.data_dir().join("pg_wal"), lab.path("wal"));
    fs::rename(&inside, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &inside).unwrap();
    source.start().unwrap();
    let expected = dump(&source, &[]);
    let report = lab.backup(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    let before = tree(&outside);

    let restored = lab.restore(text(&report, "id"), "restored", &[]);
    assert!(!restored.data_dir().join("pg_wal").is_symlink(), "the restored copy shares its source's WAL");
    judge(restored, &expected, &[]);
    assert!(tree(&outside) == before);
}

/// A directory and a file without write permission, the file in two backups and larger than what is written at once.
fn what_its_owner_may_not_write_to_comes_back(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    let closed = source.data_dir().join("closed");
    let file = closed.join("key");
    let lock = |path: &Path, mode: u32| {
        lab.user.own(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::create_dir(&closed).unwrap();
    let mut content: Vec<u8> = (0..600_000_u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&file, &content).unwrap();
    lock(&file, 0o400);
    lock(&closed, 0o500);
    lab.backup(&source, &[]);
    content[1_000_000] ^= 1;
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(&file).unwrap();
    fs::write(&file, &content).unwrap();
    lock(&file, 0o400);
    lock(&closed, 0o500);
    let report = lab.backup(&source, &[]);
    let restored = lab.restore(text(&report, "id"), "restored", &[]);
    let mode = |path: &str| fs::metadata(restored.data_dir().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("closed"), mode("closed/key")), (0o500, 0o400));
    assert!(fs::read(restored.data_dir().join("closed/key")).unwrap() == content);
    for directory in [&closed, &restored.data_dir().join("closed")] {
        // Else nobody but root could remove the test's directory.
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
}
