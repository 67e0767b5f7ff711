//! Backups of a standby, with small WAL segments, while the primary is written to.

use testdata::cluster::{Cluster, ClusterOptions};
use testdata::load::{self, Load};

use crate::support::{Lab, assert_same_dump, dump, for_majors, judge_running, text};

for_majors!(a_standby_is_backed_up_like_a_primary: on_15 = 15, on_18 = 18);

fn a_standby_is_backed_up_like_a_primary(lab: &Lab) {
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let primary = lab.cluster(&options.conf("autovacuum = off").conf("wal_keep_size = 200"));
    Load::prepare(&primary, 2).unwrap();
    primary.sql("postgres", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 5000) i").unwrap();
    let mut standby = primary.make_standby().unwrap();
    let load = Load::start(&primary, 4).unwrap();

    let mut backups = Vec::new();
    for change in ["DELETE FROM t WHERE i > 3000", "INSERT INTO t SELECT i, 'new' FROM generate_series(9000, 9400) i"] {
        primary.sql_each("postgres", &[change, "VACUUM t", "CHECKPOINT"]).unwrap();
        load.wait_for_commits(100).unwrap();
        let committed = load.committed();
        wait_for_replay(&primary, &mut standby);
        let report = lab.backup(&standby, &[]);
        backups.push((text(&report, "id").to_owned(), dump(&primary, &[]), committed));
    }
    load.stop().unwrap();
    let types: Vec<String> = lab.list().iter().map(|backup| text(backup, "type").to_owned()).collect();
    assert_eq!(types, ["full", "incremental"]);

    for (number, (id, expected, committed)) in backups.iter().enumerate() {
        let mut restored = lab.restore(id, &format!("restored-{number}"), &[]);
        assert!(!restored.is_standby(), "standby.signal was restored");
        restored.start().unwrap();
        assert_same_dump(expected, &dump(&restored, &[]));
        assert!(load::check(&restored).unwrap().at_least(committed));
        judge_running(&mut restored);
    }
}

/// Waits until `standby` has replayed all that `primary` has written by now.
fn wait_for_replay(primary: &Cluster, standby: &mut Cluster) {
    let written = primary.query_value("postgres", "SELECT pg_current_wal_lsn()").unwrap();
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
    standby.wait_for("replay", |standby| standby.query_value("postgres", &replayed).is_ok_and(|is| is == "t")).unwrap();
}
