//! The remaining majors, in short: a full backup, changes, an incremental, more changes, a differential; all restored
//! and judged. The differential finds server and directory by libpq's environment alone.

use serde_json::Value;
use testdata::cluster::ClusterOptions;
use testdata::load::{self, Load};

use crate::support::{Lab, assert_same_dump, dump, for_majors, judge_running, text};

for_majors!(backups_of_every_kind_restore_as_they_were:
    on_13 = 13, on_14 = 14, on_16 = 16, on_17 = 17);

const CHAPTERS: [&[&str]; 3] = [
    &[
        "CREATE TABLE t (id int PRIMARY KEY, content text)",
        "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 5000) i",
        "VACUUM t",
    ],
    &["DELETE FROM t WHERE id > 2500", "VACUUM t", "INSERT INTO t SELECT i, 'new' FROM generate_series(6000, 6500) i"],
    &["UPDATE t SET content = 'newer' WHERE id % 100 = 0"],
];

fn backups_of_every_kind_restore_as_they_were(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default().conf("autovacuum = off"));
    Load::prepare(&source, 2).unwrap();
    let load = Load::start(&source, lab.server.major.into()).unwrap();
    let mut backups = Vec::new();
    for (number, changes) in CHAPTERS.into_iter().enumerate() {
        source.sql_each("postgres", changes).unwrap();
        load.wait_for_commits(100).unwrap();
        let (dump, committed) = (dump(&source, &[]), load.committed());
        let report = match number {
            2 => {
                let repo = lab.repo().into_os_string().into_string().unwrap();
                let args = ["backup", "--json", "--differential", "--repo", &repo];
                lab.pgstrata_in(args, &source.libpq_env()).json(0)
            }
            _ => lab.backup(&source, &[]),
        };
        backups.push((text(&report, "id").to_owned(), dump, committed));
    }
    load.stop().unwrap();

    let full = Value::from(backups[0].0.clone());
    let listed: Vec<_> =
        lab.list().iter().map(|backup| (text(backup, "type").to_owned(), backup["parent"].clone())).collect();
    let increment = ("incremental".to_owned(), full);
    assert_eq!(listed, [("full".to_owned(), Value::Null), increment.clone(), increment]);
    for (number, (id, expected, committed)) in backups.iter().enumerate() {
        let mut restored = lab.restore(id, &format!("restored-{number}"), &[]);
        restored.start().unwrap();
        assert_same_dump(expected, &dump(&restored, &[]));
        assert!(load::check(&restored).unwrap().at_least(committed));
        judge_running(&mut restored);
    }
}
