//! Sources that stand still: what is restored equals them byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Entry, Lab, assert_same_dump, assert_same_tree, dump, for_majors, judge, number, text, tree};

for_majors!(a_stopped_cluster_is_restored_byte_for_byte: offline_on_15 = 15, offline_on_18 = 18);
for_majors!(relation_files_of_a_quiet_cluster_are_restored_byte_for_byte: live_on_15 = 15, live_on_18 = 18);
for_majors!(an_increment_of_nothing_is_small: nothing_on_15 = 15, nothing_on_18 = 18);

fn quiet() -> ClusterOptions {
    ClusterOptions { group_access: true, ..ClusterOptions::default() }.conf("autovacuum = off")
}

/// A cluster with a bit of everything, in a tablespace, too.
fn furnished(lab: &Lab, tablespace: &Path) -> Cluster {
    let source = lab.cluster(&quiet());
    source
        .sql_each(
            "postgres",
            &[
                &format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()),
                "CREATE TABLE t (id int PRIMARY KEY, content text)",
                "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 20000) i",
                "CREATE TABLE moved TABLESPACE space AS SELECT * FROM t",
                "CREATE UNLOGGED TABLE unlogged AS SELECT * FROM t",
                "DELETE FROM t WHERE id % 3 = 0",
                "VACUUM (FREEZE)",
            ],
        )
        .unwrap();
    source
}

/// The main, free space map and visibility map files of unlogged relations.
fn unlogged_files(source: &Cluster) -> BTreeSet<PathBuf> {
    let paths = "SELECT pg_relation_filepath(oid) FROM pg_class WHERE relpersistence = 'u'";
    let rows = source.query_strings("postgres", paths).unwrap();
    let mains = rows.into_iter().filter_map(|row| row[0].clone());
    mains.flat_map(|main| ["", "_fsm", "_vm"].map(|fork| PathBuf::from(format!("{main}{fork}")))).collect()
}

fn a_stopped_cluster_is_restored_byte_for_byte(lab: &Lab) {
    let tablespace = lab.dir("space");
    let mut source = furnished(lab, &tablespace);
    let unlogged = unlogged_files(&source);
    for number in 0..2 {
        source
            .sql_each(
                "postgres",
                &["UPDATE t SET content = 'new' WHERE id % 500 = 1", "DELETE FROM moved WHERE id < 99"],
            )
            .unwrap();
        let expected_dump = dump(&source, &[]);
        source.stop(StopMode::Fast).unwrap();
        let expected = [source.data_dir(), &tablespace].map(tree);
        let id = text(&lab.backup_offline(source.data_dir()).json(0), "id").to_owned();

        let maps = [(tablespace.clone(), lab.path(&format!("space-{number}")))];
        let restored = lab.restore(&id, &format!("restored-{number}"), &maps);
        let found = [restored.data_dir(), &maps[0].1].map(tree);
        assert_same_tree(&expected[0], &found[0], |path| written_by_restore(path) || unlogged.contains(path));
        assert_same_tree(&expected[1], &found[1], |_| false);
        assert_wal_is_from_the_source(&expected[0], &found[0]);
        judge(restored, &expected_dump, &maps);
        source.start().unwrap();
    }
}

/// Whether restore legitimately writes `path` itself, or leaves out what the source has there, as PostgreSQL's own
/// base backup does (`src/backend/backup/basebackup.c`, `excludeDirContents`, `excludeFiles`).
fn written_by_restore(path: &Path) -> bool {
    let files = ["postgresql.auto.conf", "recovery.signal", "backup_manifest", "backup_label", "tablespace_map"];
    let leftovers = ["postmaster.opts", "pg_internal.init", "pgsql_tmp"];
    // Links of tablespaces lead elsewhere; the WAL is compared by itself.
    let contents = [
        "pg_dynshmem",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_tblspc",
        "pg_wal",
    ];
    let name = path.file_name().unwrap();
    files.iter().any(|file| path == Path::new(file))
        || leftovers.iter().any(|leftover| name == *leftover)
        || contents.iter().any(|dir| path.starts_with(dir) && path != Path::new(dir))
}

fn assert_wal_is_from_the_source(source: &BTreeMap<PathBuf, Entry>, restored: &BTreeMap<PathBuf, Entry>) {
    let is_segment = |path: &Path| path.parent() == Some(Path::new("pg_wal")) && path.file_name().unwrap().len() == 24;
    let segments: Vec<_> = restored.iter().filter(|(path, _)| is_segment(path)).collect();
    assert!(!segments.is_empty(), "no WAL was restored");
    for (path, segment) in segments {
        assert!(source.get(path).is_some_and(|theirs| theirs.content == segment.content), "{} differs", path.display());
    }
}

fn relation_files_of_a_quiet_cluster_are_restored_byte_for_byte(lab: &Lab) {
    let tablespace = lab.dir("space");
    let source = furnished(lab, &tablespace);
    let unlogged = unlogged_files(&source);
    for number in 0..2 {
        source
            .sql_each(
                "postgres",
                &[
                    "UPDATE t SET content = 'new' WHERE id % 500 = 1",
                    "DELETE FROM moved WHERE id > 12000",
                    "VACUUM (FREEZE)",
                ],
            )
            .unwrap();
        let expected_dump = dump(&source, &[]);
        let id = text(&lab.backup(&source, &[]), "id").to_owned();
        source.sql("postgres", "CHECKPOINT").unwrap();

        let maps = [(tablespace.clone(), lab.path(&format!("space-{number}")))];
        let restored = lab.restore(&id, &format!("restored-{number}"), &maps);
        for (live, copy) in [
            (source.data_dir().join("base"), restored.data_dir().join("base")),
            (source.data_dir().join("global"), restored.data_dir().join("global")),
            (tablespace.clone(), maps[0].1.clone()),
        ] {
            let below = live.file_name().unwrap().to_owned();
            let differs = |path: &Path| {
                let name = path.file_name().unwrap();
                unlogged.contains(&Path::new(&below).join(path))
                    || ["pg_control", "pg_internal.init", "pgsql_tmp"].iter().any(|excluded| name == *excluded)
            };
            assert_same_tree(&tree(&live), &tree(&copy), differs);
        }
        judge(restored, &expected_dump, &maps);
    }
}

fn an_increment_of_nothing_is_small(lab: &Lab) {
    let source = furnished(lab, &lab.dir("space"));
    lab.backup(&source, &[]);
    let report = lab.backup(&source, &[]);
    assert_eq!(text(&report, "type"), "incremental");
    let (stored, wal) = (number(&report, "stored_bytes"), number(&report, "wal_bytes"));
    assert!(stored < 100_000 + wal, "an increment of nothing stored {stored} bytes, with {wal} bytes of WAL");
    let (expected, id) = (dump(&source, &[]), text(&report, "id"));
    let maps = [(lab.path("space"), lab.path("space-moved"))];
    let mut restored = lab.restore(id, "restored", &maps);
    restored.start().unwrap();
    assert_same_dump(&expected, &dump(&restored, &maps));
    assert!(fs::read_dir(&maps[0].1).unwrap().count() > 0);
}
