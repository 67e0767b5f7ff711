//! The remaining majors, in short: a full backup, changes, an incremental, both restored and judged.

use testdata::cluster::ClusterOptions;
use testdata::load::{self, Load};

use crate::support::{Lab, assert_same_dump, dump, for_majors, judge_running, text};

for_majors!(full_and_incremental_restore_as_they_were:
    on_13 = 13, on_14 = 14, on_16 = 16, on_17 = 17);

fn full_and_incremental_restore_as_they_were(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default().conf("autovacuum = off"));
    Load::prepare(&source, 2).unwrap();
    let load = Load::start(&source, lab.server.major.into()).unwrap();
    let make = "CREATE TABLE t (id int PRIMARY KEY, content text);
                INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 5000) i";
    source.sql("postgres", make).unwrap();
    let mut backups = Vec::new();
    for changes in [
        ["VACUUM t", "SELECT 1", "SELECT 1"],
        [
            "DELETE FROM t WHERE id > 2500",
            "VACUUM t",
            "INSERT INTO t SELECT i, 'new' FROM generate_series(6000, 6500) i",
        ],
    ] {
        source.sql_each("postgres", &changes).unwrap();
        load.wait_for_commits(100).unwrap();
        let (dump, committed) = (dump(&source, &[]), load.committed());
        let report = lab.backup(&source, &[]);
        backups.push((text(&report, "id").to_owned(), dump, committed));
    }
    load.stop().unwrap();
    let types: Vec<String> = lab.list().iter().map(|backup| text(backup, "type").to_owned()).collect();
    assert_eq!(types, ["full", "incremental"]);

    for (number, (id, expected, committed)) in backups.iter().enumerate() {
        let mut restored = lab.restore(id, &format!("restored-{number}"), &[]);
        restored.start().unwrap();
        assert_same_dump(expected, &dump(&restored, &[]));
        assert!(load::check(&restored).unwrap().at_least(committed));
        judge_running(&mut restored);
    }
}
