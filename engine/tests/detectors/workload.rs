//! All that PostgreSQL does to relation files, in a few seconds.

use std::collections::BTreeSet;

use pgstrata_engine::pg::RelFileLocator;
use testdata::cluster::{Cluster, StopMode};

use crate::snapshot::locators;

const INDEXES: [&str; 6] = [
    "USING btree (number)",
    "USING hash (number)",
    "USING gin (list)",
    "USING gist (place)",
    "USING spgist (place)",
    "USING brin (id) WITH (pages_per_range = 4)",
];

/// A cluster with a bit of everything, before the work.
pub fn furnish(cluster: &Cluster) {
    let space = cluster.user().make_dir(cluster.scratch(), "space").unwrap();
    let rows = "SELECT i AS id, i % 977 AS number, ARRAY[i, i % 50] AS list, point(i % 300, i / 300) AS place, \
                md5(i::text) AS content FROM generate_series(1, 20000) i";
    cluster.sql("postgres", &format!("CREATE TABLE busy AS {rows}")).unwrap();
    let space = format!("CREATE TABLESPACE space LOCATION '{}'", space.display());
    cluster.sql_each("postgres", &[&space, "CREATE DATABASE other"]).unwrap();
    for name in ["untouched", "shrinks", "truncated", "dropped", "rewritten", "clustered", "moved", "altered"] {
        cluster.sql("postgres", &format!("CREATE TABLE {name} AS SELECT * FROM busy")).unwrap();
    }
    for index in INDEXES {
        cluster.sql("postgres", &format!("CREATE INDEX ON busy {index}")).unwrap();
    }
    cluster
        .sql_each(
            "postgres",
            &[
                "ALTER TABLE busy ADD PRIMARY KEY (id)",
                "CREATE INDEX by_number ON clustered (number)",
                "CREATE UNLOGGED TABLE forgotten AS SELECT * FROM busy",
                "CREATE UNLOGGED TABLE remembered AS SELECT * FROM busy",
                "CREATE TABLE in_space TABLESPACE space AS SELECT * FROM busy",
                "CREATE SEQUENCE counter",
                "CREATE MATERIALIZED VIEW seen AS SELECT number, count(*) FROM busy GROUP BY 1",
                "CREATE TABLE long (id int, content text)",
                "ALTER TABLE long ALTER content SET STORAGE EXTERNAL",
                "INSERT INTO long SELECT i, repeat(md5(i::text), 300) FROM generate_series(1, 200) i",
                "SELECT nextval('counter')",
                // Empty pages at the end, that only a truncation will name.
                "DELETE FROM shrinks WHERE id > 9000",
                "VACUUM (FREEZE, ANALYZE, TRUNCATE false)",
            ],
        )
        .unwrap();
    cluster.sql("other", "CREATE TABLE t AS SELECT i FROM generate_series(1, 20000) i").unwrap();
    cluster
        .sql_each("postgres", &["CREATE DATABASE doomed TEMPLATE other", "CREATE DATABASE reborn TEMPLATE other"])
        .unwrap();
}

/// The work.
pub fn work(cluster: &mut Cluster) {
    rows(cluster);
    relations(cluster);
    transactions(cluster);
    // Redo writes pages, too, and may leave zero pages at the ends.
    cluster.restart(StopMode::Immediate).unwrap();
    databases(cluster);
    cluster
        .sql_each(
            "postgres",
            &["SET wal_compression = on", "CHECKPOINT", "UPDATE busy SET number = 1 WHERE id < 2000", "VACUUM busy"],
        )
        .unwrap();
}

fn rows(cluster: &Cluster) {
    let rows = cluster.user().make_dir(cluster.scratch(), "rows").unwrap().join("rows");
    let rows = rows.display();
    cluster
        .sql_each(
            "postgres",
            &[
                "SET wal_compression = on",
                "UPDATE busy SET number = number + 1 WHERE id % 40 = 0",
                "SET wal_compression = off",
                "DELETE FROM busy WHERE id % 31 = 0",
                "INSERT INTO busy SELECT i, i, ARRAY[i], point(i, i), 'new' FROM generate_series(30001, 36000) i",
                "VACUUM busy",
                "INSERT INTO busy SELECT i, i, ARRAY[i], point(i, i), 'new' FROM generate_series(40001, 42000) i",
                "SELECT gin_clean_pending_list(oid) FROM pg_class WHERE relname = 'busy_list_idx'",
                "SELECT brin_summarize_new_values(oid) FROM pg_class WHERE relname = 'busy_id_idx'",
                "SELECT id FROM busy WHERE id < 100 FOR UPDATE",
                "UPDATE long SET content = repeat('y', 9000) WHERE id % 5 = 0",
                "VACUUM shrinks",
                // Extends the table by more pages than it fills, and they stay zero (16+).
                &format!("COPY (SELECT * FROM untouched WHERE id > 15500) TO '{rows}'"),
                &format!("COPY shrinks FROM '{rows}'"),
                "DO $$ BEGIN FOR i IN 1..200 LOOP PERFORM nextval('counter'); END LOOP; END $$",
                // Hint bits are in the log because of checksums.
                "SELECT count(*) FROM busy",
                "CHECKPOINT",
                "SELECT count(*) FROM shrinks",
                // A record over several segments.
                "SELECT pg_logical_emit_message(false, 'long', repeat('z', 3000000))",
            ],
        )
        .unwrap();
}

fn relations(cluster: &Cluster) {
    cluster
        .sql_each(
            "postgres",
            &[
                "TRUNCATE truncated",
                "INSERT INTO truncated SELECT * FROM untouched WHERE id < 500",
                "DROP TABLE dropped",
                "VACUUM FULL rewritten",
                "CLUSTER clustered USING by_number",
                "ALTER TABLE moved SET TABLESPACE space",
                "ALTER TABLE altered ALTER number TYPE bigint",
                "ALTER TABLE forgotten SET LOGGED",
                "ALTER TABLE altered SET UNLOGGED",
                "ALTER TABLE altered SET LOGGED",
                "UPDATE in_space SET content = 'new' WHERE id % 100 = 0",
                "REFRESH MATERIALIZED VIEW seen",
                "REINDEX TABLE busy",
                // A mapped catalog gets a new file.
                "VACUUM FULL pg_class",
                "REINDEX TABLE pg_type",
                "VACUUM FULL pg_database",
                // Cut in place: the table is of the same transaction.
                "BEGIN; CREATE TABLE young AS SELECT * FROM untouched; TRUNCATE young; \
                 INSERT INTO young SELECT * FROM untouched WHERE id < 300; COMMIT",
                "CREATE INDEX CONCURRENTLY late ON busy (content)",
            ],
        )
        .unwrap();
}

fn transactions(cluster: &Cluster) {
    let nested = |what: &dyn Fn(u32) -> String| {
        let steps: String = (0..150).map(|number| format!("SAVEPOINT s{number}; {};", what(number))).collect();
        format!("BEGIN; {steps} COMMIT")
    };
    let many = nested(&|number| format!("CREATE TABLE many{number} AS SELECT {number} AS i"));
    let none = nested(&|number| format!("DROP TABLE many{number}"));
    cluster
        .sql_each(
            "postgres",
            &[
                &many,
                &none,
                "BEGIN; CREATE TABLE never AS SELECT * FROM untouched; DROP TABLE truncated; ROLLBACK",
                "BEGIN; CREATE TABLE prepared AS SELECT * FROM untouched WHERE id < 900; \
                 DROP TABLE clustered; PREPARE TRANSACTION 'kept'",
                "BEGIN; CREATE TABLE undone AS SELECT * FROM untouched WHERE id < 900; PREPARE TRANSACTION 'undone'",
                "INSERT INTO truncated SELECT * FROM untouched WHERE id BETWEEN 500 AND 600",
                "COMMIT PREPARED 'kept'",
                "ROLLBACK PREPARED 'undone'",
            ],
        )
        .unwrap();
}

fn databases(cluster: &Cluster) {
    let has_strategy = cluster.server().major >= 15;
    let strategy = |name: &str| if has_strategy { format!(" STRATEGY {name}") } else { String::new() };
    cluster
        .sql_each(
            "postgres",
            &[
                &format!("CREATE DATABASE copied TEMPLATE other{}", strategy("file_copy")),
                &format!("CREATE DATABASE logged TEMPLATE other{}", strategy("wal_log")),
                "DROP DATABASE doomed",
                "ALTER DATABASE other SET TABLESPACE space",
            ],
        )
        .unwrap();
    cluster.sql("copied", "DELETE FROM t WHERE i % 2 = 0").unwrap();
    cluster.sql("logged", "INSERT INTO t SELECT i FROM generate_series(1, 999) i").unwrap();
    // There and back: the same paths, and what happened in between is in the log under other names.
    cluster.sql("other", "DELETE FROM t WHERE i % 3 = 0").unwrap();
    cluster.sql("postgres", "ALTER DATABASE other SET TABLESPACE pg_default").unwrap();
    if has_strategy {
        // A database takes the number of one that was dropped, and its relations those of the template.
        let oid = cluster.query_value("postgres", "SELECT oid FROM pg_database WHERE datname = 'reborn'").unwrap();
        let again = format!("CREATE DATABASE reborn TEMPLATE other STRATEGY file_copy OID {oid}");
        cluster.sql_each("postgres", &["DROP DATABASE reborn", &again]).unwrap();
    }
}

/// The SP-GiST indexes of the database postgres.
pub fn spgist_indexes(cluster: &Cluster) -> BTreeSet<RelFileLocator> {
    let query = "SELECT c.oid FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'spgist'";
    locators(cluster, query)
}
