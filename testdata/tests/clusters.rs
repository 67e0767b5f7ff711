//! The harness itself, against a real server of every supported major.

use std::sync::Arc;

use pgstrata_testdata::cluster::{Cluster, ClusterOptions, StopMode, succeed};
use pgstrata_testdata::load::{self, Load};
use pgstrata_testdata::servers::{Cache, Installation};

/// The server of `major` and the client tools; `None`, said aloud, where they cannot be had.
fn installations(major: u32) -> Option<(Arc<Installation>, Arc<Installation>)> {
    let cache = Cache::for_tests().unwrap();
    let found = Installation::with_tools(major, &cache);
    found.map_err(|reason| eprintln!("skipped: no PostgreSQL {major} ({reason})")).ok()
}

fn a_cluster_lives(major: u32) {
    let Some((server, tools)) = installations(major) else { return };
    assert_eq!(server.major, major);
    let options = ClusterOptions { wal_segment_mb: Some(1), tcp: true, ..ClusterOptions::default() };
    let mut cluster = Cluster::create(&server, &tools, &options).unwrap();
    let shown = |setting| cluster.query_value("postgres", &format!("SHOW {setting}")).unwrap();
    assert_eq!(shown("server_version_num")[..2], major.to_string());
    assert_eq!((shown("data_checksums").as_str(), shown("wal_segment_size").as_str()), ("on", "1MB"));
    for extension in ["amcheck", "pg_visibility"] {
        println!("{major}: {extension} {}", cluster.has_extension(extension));
    }

    cluster.sql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").unwrap();
    cluster.restart(StopMode::Immediate).unwrap();
    let count = "SELECT count(*) FROM t";
    assert_eq!(cluster.query_value("postgres", count).unwrap(), "1000");

    let mut standby = cluster.make_standby().unwrap();
    assert!(standby.is_standby());
    standby.promote().unwrap();
    standby.sql("postgres", "DELETE FROM t").unwrap();
    assert_eq!(standby.query_value("postgres", count).unwrap(), "0");

    standby.stop(StopMode::Fast).unwrap();
    let mut adopted = Cluster::adopt(&server, &tools, standby.data_dir()).unwrap();
    adopted.start().unwrap();
    assert_eq!(adopted.query_value("postgres", count).unwrap(), "0");
    assert_eq!(cluster.query_value("postgres", count).unwrap(), "1000");
    assert!(succeed(cluster.tool("pg_dumpall").unwrap().arg("--schema-only")).is_ok());
    cluster.stop(StopMode::Smart).unwrap();
}

macro_rules! for_majors {
    ($test:ident: $($name:ident $major:literal),+) => {$(
        #[test]
        fn $name() {
            $test($major);
        }
    )+};
}

for_majors!(a_cluster_lives:
    a_cluster_of_13_lives 13, a_cluster_of_14_lives 14, a_cluster_of_15_lives 15,
    a_cluster_of_16_lives 16, a_cluster_of_17_lives 17, a_cluster_of_18_lives 18
);

#[test]
fn a_server_that_cannot_start_says_why() {
    let Some((server, tools)) = installations(18) else { return };
    let failure = Cluster::create(&server, &tools, &ClusterOptions::default().conf("work_mem = 'much'"));
    let message = failure.err().unwrap().to_string();
    assert!(message.contains("invalid value for parameter \"work_mem\""), "{message}");
}

#[test]
fn a_load_commits_pauses_and_leaves_a_checkable_state() {
    let Some((server, tools)) = installations(18) else { return };
    let mut cluster = Cluster::create(&server, &tools, &ClusterOptions::default()).unwrap();
    Load::prepare(&cluster, 3).unwrap();
    let load = Load::start(&cluster, 1).unwrap();
    load.wait_for_commits(300).unwrap();
    let before = load.committed();
    load.pause().unwrap();
    let paused = load.committed();
    assert_eq!(load::check(&cluster).unwrap(), paused);
    assert!(paused.at_least(&before));
    load.resume();
    load.wait_for_commits(300).unwrap();
    let after = load.stop().unwrap();
    assert!(after.total() >= paused.total() + 300 && !paused.at_least(&after));
    cluster.restart(StopMode::Immediate).unwrap();
    assert_eq!(load::check(&cluster).unwrap(), after);

    cluster.sql(load::DATABASE, "UPDATE account SET balance = balance + 1 WHERE id = 7").unwrap();
    assert!(load::check(&cluster).unwrap_err().to_string().contains("balances"));
}
