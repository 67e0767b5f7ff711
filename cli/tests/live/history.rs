//! One cluster's history under a write load, backed up after every chapter; each backup restored and judged.
//!
//! The tables are named for what happens to them, as in PostgreSQL's own test of incremental backups
//! (`src/bin/pg_combinebackup/t/002_compare_backups.pl`). The load lives in a database of its own and is judged by its
//! invariants; everything else stands still while a backup runs and is compared with a dump of that moment.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use testdata::cluster::{Cluster, ClusterOptions, StopMode};
use testdata::load::{self, Load, State};

use crate::support::{Lab, assert_same_dump, dump, for_majors, judge_running, text};

/// The database of the tables named for what happens to them.
const APP: &str = "app";

for_majors!(a_changing_cluster_restores_as_it_was_at_every_backup: on_15 = 15, on_18 = 18);

/// A backup, and what the source was like when it was made.
struct Chapter {
    id: String,
    dump: String,
    /// What the load had committed before the backup began.
    load: State,
    /// The prepared transactions, as (identifier, database).
    prepared: Vec<(String, String)>,
}

fn a_changing_cluster_restores_as_it_was_at_every_backup(lab: &Lab) {
    let options = ClusterOptions::default()
        .conf("autovacuum = off")
        .conf("wal_log_hints = off")
        .conf("max_wal_size = 128MB")
        .conf("archive_mode = on")
        .conf("archive_command = 'true'");
    // Without it a server refuses to start with the in-place tablespace that comes later.
    let options = if lab.server.major >= 15 { options.conf("allow_in_place_tablespaces = on") } else { options };
    // The visibility map bits that a truncation clears are in no WAL record only without checksums.
    let options = ClusterOptions { checksums: lab.server.major >= 18, ..options };
    let mut source = lab.cluster(&options);
    let tablespace = lab.dir("space");
    begin(&source);
    Load::prepare(&source, 3).unwrap();

    let mut chapters = Vec::new();
    let mut load = Load::start(&source, 15).unwrap();
    chapters.push(back_up(lab, &source, &load));

    every_table_meets_its_fate(&source);
    chapters.push(back_up(lab, &source, &load));

    a_table_is_truncated_and_regrown(&source);
    databases_and_tablespaces_come(&source, &tablespace);
    let temporary = a_temporary_table(&source);
    chapters.push(back_up(lab, &source, &load));
    drop(temporary);

    catalogs_are_rewritten_and_persistence_changes(&source);
    chapters.push(back_up(lab, &source, &load));

    load.stop().unwrap();
    a_crash(&mut source);
    load = Load::start(&source, 16).unwrap();
    chapters.push(back_up(lab, &source, &load));

    databases_and_tablespaces_go(&source);
    chapters.push(back_up(lab, &source, &load));
    load.stop().unwrap();
    source.stop(StopMode::Fast).unwrap();

    assert_is_one_line_of_increments(lab, &chapters);
    lab.verify();
    for (number, chapter) in chapters.iter().enumerate() {
        let moved = [(tablespace.clone(), lab.path(&format!("space-{number}")))];
        judge_chapter(lab, chapter, number, &moved);
    }
}

/// Makes the tables, each with rows and indexes.
fn begin(source: &Cluster) {
    source.sql("postgres", "CREATE DATABASE app").unwrap();
    let fates = [
        "will_change",
        "will_grow",
        "will_shrink",
        "will_get_vacuumed",
        "will_get_dropped",
        "will_get_rewritten",
        "will_get_clustered",
        "will_change_type",
        "will_truncate_and_regrow",
        "will_be_truncated",
        "will_move",
        "will_be_logged",
        "will_be_unlogged",
        "will_stay",
    ];
    for table in fates {
        let unlogged = if table == "will_be_logged" { "UNLOGGED" } else { "" };
        source
            .sql_each(
                APP,
                &[
                    &format!(
                        "CREATE {unlogged} TABLE {table} (id int PRIMARY KEY, number int, content text);
                         INSERT INTO {table} SELECT i, i % 1000, md5(i::text) || repeat('-', i % 50)
                         FROM generate_series(1, 6000) i;
                         CREATE INDEX ON {table} (number)"
                    ),
                    &format!("VACUUM (FREEZE) {table}"),
                ],
            )
            .unwrap();
    }
    source
        .sql(
            APP,
            "CREATE TABLE toasted (id int PRIMARY KEY, content text);
             ALTER TABLE toasted ALTER content SET STORAGE EXTERNAL;
             INSERT INTO toasted SELECT i, (SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, 300) j)
             FROM generate_series(1, 100) i;
             CREATE TABLE indexed (id serial PRIMARY KEY, words tsvector, place point, number int, tags int[]);
             INSERT INTO indexed (words, place, number, tags)
             SELECT to_tsvector('simple', md5(i::text) || ' w' || i % 100), point(i % 77, i % 99), i, ARRAY[i % 10, i % 7]
             FROM generate_series(1, 3000) i;
             CREATE INDEX ON indexed USING gin (words);
             CREATE INDEX ON indexed USING gin (tags);
             CREATE INDEX ON indexed USING gist (place);
             CREATE INDEX ON indexed USING spgist (place);
             CREATE INDEX ON indexed USING hash (number);
             CREATE INDEX ON indexed USING brin (number);
             CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY, content text);
             INSERT INTO unlogged SELECT i, md5(i::text) FROM generate_series(1, 2000) i;
             CREATE TABLE prepared (id int PRIMARY KEY);
             CREATE SEQUENCE counter;
             INSERT INTO will_truncate_and_regrow SELECT i, i, repeat('live', 30) FROM generate_series(10000, 40000) i;
             CREATE MATERIALIZED VIEW summary AS SELECT number, count(*) FROM will_change GROUP BY number;
             CREATE UNIQUE INDEX ON summary (number);
             SELECT lo_from_bytea(900000 + i, decode(repeat(md5(i::text), 200), 'hex')) FROM generate_series(1, 10) i",
        )
        .unwrap();
}

/// What each table is named for, first time.
fn every_table_meets_its_fate(source: &Cluster) {
    source
        .sql_each(
            APP,
            &[
                "UPDATE will_change SET content = content || '!' WHERE id % 97 = 0",
                "INSERT INTO will_grow SELECT i, i, repeat('g', i % 300) FROM generate_series(6001, 14000) i",
                "DELETE FROM will_shrink WHERE id > 2000",
                "VACUUM will_shrink",
                "DELETE FROM will_get_vacuumed WHERE id % 3 = 0",
                "VACUUM (FREEZE) will_get_vacuumed",
                "DROP TABLE will_get_dropped",
                "VACUUM FULL will_get_rewritten",
                "CLUSTER will_get_clustered USING will_get_clustered_number_idx",
                "ALTER TABLE will_change_type ALTER number TYPE bigint",
                "TRUNCATE will_be_truncated",
                "INSERT INTO will_be_truncated SELECT i, i, 'anew' FROM generate_series(1, 10) i",
                "UPDATE toasted SET content = reverse(content) WHERE id % 9 = 0",
                "DELETE FROM indexed WHERE id % 5 = 0",
                "INSERT INTO indexed (words, place, number, tags) SELECT 'w1 w2', point(i, i), i, ARRAY[i]
                 FROM generate_series(1, 2000) i",
                "SELECT nextval('counter') FROM generate_series(1, 40)",
                "SELECT lo_put(900001, 100, '\\xdeadbeef'), lo_unlink(900002),
                        lo_from_bytea(900099, decode(repeat('ab', 50000), 'hex'))",
                "REFRESH MATERIALIZED VIEW summary",
                "INSERT INTO unlogged SELECT i, 'more' FROM generate_series(2001, 3000) i",
            ],
        )
        .unwrap();
}

fn databases_and_tablespaces_come(source: &Cluster, tablespace: &Path) {
    let is_15 = source.server().major >= 15;
    let strategy = |name: &str| if is_15 { format!("STRATEGY {name}") } else { String::new() };
    let oid = if is_15 { "OID 70007" } else { "" };
    source
        .sql_each(
            "postgres",
            &[
                &format!("CREATE DATABASE by_file TEMPLATE app {}", strategy("file_copy")),
                &format!("CREATE DATABASE by_log TEMPLATE app {}", strategy("wal_log")),
                &format!("CREATE DATABASE reborn TEMPLATE app {oid} {}", strategy("file_copy")),
                &format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()),
                "CREATE DATABASE outside TABLESPACE space",
            ],
        )
        .unwrap();
    if is_15 {
        source.sql("postgres", "CREATE TABLESPACE in_place LOCATION ''").unwrap();
        source.sql(APP, "CREATE TABLE kept_in_place TABLESPACE in_place AS SELECT * FROM will_stay").unwrap();
    }
    source
        .sql_each(
            APP,
            &[
                "ALTER TABLE will_move SET TABLESPACE space",
                "ALTER INDEX will_move_pkey SET TABLESPACE space",
                "BEGIN; INSERT INTO prepared SELECT generate_series(1, 500); PREPARE TRANSACTION 'pending'",
                "CREATE TABLE will_get_dropped (id int PRIMARY KEY, content text);
                 INSERT INTO will_get_dropped SELECT i, 'again' FROM generate_series(1, 100) i",
            ],
        )
        .unwrap();
}

/// Rows that live in the parent are cut off; then a bulk load extends the table over their blocks, from 16 on with pages
/// at its end that stay empty and are in no WAL record.
fn a_table_is_truncated_and_regrown(source: &Cluster) {
    let pages = || {
        source.sql(APP, "CHECKPOINT").unwrap();
        let file = source.query_value(APP, "SELECT pg_relation_filepath('will_truncate_and_regrow')").unwrap();
        let bytes = fs::read(source.data_dir().join(file)).unwrap();
        let empty = bytes.chunks(8192).filter(|page| page.iter().all(|byte| *byte == 0)).count();
        (bytes.len() / 8192, empty)
    };
    let (in_parent, _) = pages();
    let cut = ["DELETE FROM will_truncate_and_regrow WHERE id > 3000", "VACUUM will_truncate_and_regrow"];
    source.sql_each(APP, &cut).unwrap();
    let (kept, _) = pages();
    let mut session = source.connect(APP).unwrap();
    let mut load = session.copy_in("COPY will_truncate_and_regrow FROM STDIN").unwrap();
    for id in 50_000..52_000 {
        writeln!(load, "{id}\t{id}\t{}", "regrown ".repeat(20)).unwrap();
    }
    load.finish().unwrap();
    let (regrown, empty) = pages();
    let is_as_meant = kept < regrown && regrown < in_parent && (empty > 0 || source.server().major < 16);
    assert!(is_as_meant, "from {in_parent} pages to {kept}, then to {regrown}, {empty} of them empty");
}

/// A session with a temporary table, which lives while the session does.
fn a_temporary_table(source: &Cluster) -> postgres::Client {
    let mut session = source.connect(APP).unwrap();
    session
        .batch_execute("CREATE TEMP TABLE passing AS SELECT * FROM will_stay; CREATE INDEX ON passing (id)")
        .unwrap();
    session
}

fn catalogs_are_rewritten_and_persistence_changes(source: &Cluster) {
    source
        .sql_each(
            APP,
            &[
                "COMMIT PREPARED 'pending'",
                "ALTER TABLE will_be_logged SET LOGGED",
                "ALTER TABLE will_be_unlogged SET UNLOGGED",
                "UPDATE will_be_unlogged SET content = 'lost'",
                "VACUUM FULL pg_class",
                "REINDEX TABLE pg_type",
                "VACUUM FULL pg_largeobject",
                "UPDATE will_change SET content = 'x' WHERE id < 50",
                "VACUUM (FREEZE)",
            ],
        )
        .unwrap();
    source.sql_each("postgres", &["VACUUM FULL pg_database", "REINDEX TABLE pg_shdepend"]).unwrap();
    let is_15 = source.server().major >= 15;
    // The same database, same number, copied from other content: the WAL says so in one record without blocks.
    let reborn = if is_15 {
        "CREATE DATABASE reborn OID 70007 STRATEGY file_copy TEMPLATE app"
    } else {
        "CREATE DATABASE reborn TEMPLATE app"
    };
    source.sql_each("postgres", &["DROP DATABASE reborn", reborn]).unwrap();
}

/// Changes that no checkpoint follows, then a crash and recovery.
fn a_crash(source: &mut Cluster) {
    source
        .sql_each(
            APP,
            &[
                "DELETE FROM will_grow WHERE id % 2 = 0",
                "VACUUM will_grow",
                "BEGIN; INSERT INTO prepared SELECT generate_series(1001, 1500); PREPARE TRANSACTION 'across the crash'",
                "INSERT INTO will_shrink SELECT i, i, 'regrown' FROM generate_series(7000, 9000) i",
                "SELECT nextval('counter')",
            ],
        )
        .unwrap();
    source.restart(StopMode::Immediate).unwrap();
}

fn databases_and_tablespaces_go(source: &Cluster) {
    source
        .sql_each(
            APP,
            &[
                "ROLLBACK PREPARED 'across the crash'",
                "ALTER TABLE will_move SET TABLESPACE pg_default",
                "DROP TABLE will_be_unlogged",
            ],
        )
        .unwrap();
    source
        .sql_each("postgres", &["DROP DATABASE by_file", "ALTER DATABASE outside SET TABLESPACE pg_default"])
        .unwrap();
}

/// Lets the load work, notes what the source is like, and backs it up while the load goes on.
fn back_up(lab: &Lab, source: &Cluster, load: &Load) -> Chapter {
    load.wait_for_commits(200).unwrap();
    let dump = dump(source, &[]);
    let prepared = source.query_strings("postgres", "SELECT gid, database FROM pg_prepared_xacts ORDER BY 1").unwrap();
    let prepared = prepared.into_iter().map(|row| (row[0].clone().unwrap(), row[1].clone().unwrap())).collect();
    let committed = load.committed();
    let report = lab.backup(source, &[]);
    assert_eq!(report["corrupt_pages"], serde_json::json!([]));
    assert!(load.committed().total() > committed.total(), "the load stood still during the backup");
    Chapter { id: text(&report, "id").to_owned(), dump, load: committed, prepared }
}

fn assert_is_one_line_of_increments(lab: &Lab, chapters: &[Chapter]) {
    let listed = lab.list();
    assert_eq!(listed.len(), chapters.len());
    for (number, (backup, chapter)) in listed.iter().zip(chapters).enumerate() {
        let expected_type = if number == 0 { "full" } else { "incremental" };
        assert_eq!((text(backup, "id"), text(backup, "type")), (&*chapter.id, expected_type));
        match number {
            0 => assert!(backup["parent"].is_null()),
            _ => assert_eq!(text(backup, "parent"), chapters[number - 1].id),
        }
    }
}

fn judge_chapter(lab: &Lab, chapter: &Chapter, number: usize, moved: &[(PathBuf, PathBuf)]) {
    let moved = if chapter.dump.contains("CREATE TABLESPACE space") { moved } else { &[] };
    let mut restored = lab.restore(&chapter.id, &format!("restored-{number}"), moved);
    restored.start().unwrap();
    assert_same_dump(&chapter.dump, &dump(&restored, moved));
    let state = load::check(&restored).unwrap();
    assert!(state.at_least(&chapter.load), "backup {number} lost transactions: {state:?} after {:?}", chapter.load);

    // A prepared transaction holds locks that the judge would wait for, and must be as good as in the source.
    for (gid, database) in &chapter.prepared {
        let rows = || restored.query_value(database, "SELECT count(*) FROM prepared").unwrap().parse::<u32>().unwrap();
        let before = rows();
        restored.sql(database, &format!("COMMIT PREPARED '{gid}'")).unwrap();
        assert_eq!(rows(), before + 500);
    }
    judge_running(&mut restored);
}
