//! A repository through its life: nightly backups, a merge, expiries, and what the next backups make of what is left.

use std::ffi::OsString;

use serde_json::Value;
use testdata::cluster::{Cluster, ClusterOptions, succeed};
use testdata::load::{self, Load};

use crate::support::{Lab, Run, assert_same_dump, dump, for_majors, judge, judge_running, number, text};

for_majors!(twelve_nights_and_only_the_merged_one_stays: nights_on_13 = 13, nights_on_15 = 15, nights_on_18 = 18);
for_majors!(a_repository_is_kept_in_order_while_the_cluster_is_backed_up: order_on_15 = 15, order_on_18 = 18);

const NIGHTS: usize = 12;

/// Runs a command on the lab's repository.
fn on_repo(lab: &Lab, words: &[&str]) -> Run {
    let args = words.iter().map(OsString::from).chain(["--json".into(), "--repo".into(), lab.repo().into()]);
    lab.pgstrata(args)
}

fn pgbench(source: &Cluster, arguments: &[&str]) {
    succeed(source.tool("pgbench").unwrap().args(arguments).arg("postgres")).unwrap();
}

fn twelve_nights_and_only_the_merged_one_stays(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    pgbench(&source, &["--initialize", "--quiet", "--scale=1"]);
    let mut merged = None;
    for night in 1..=NIGHTS {
        pgbench(&source, &["--client=2", "--transactions=100", "--no-vacuum"]);
        if night % 4 == 0 {
            source.sql_each("postgres", &["TRUNCATE pgbench_history", "VACUUM FULL pgbench_tellers"]).unwrap();
        }
        lab.backup(&source, &[]);
        if night == NIGHTS / 2 {
            let report = on_repo(lab, &["merge"]).json(0);
            assert_eq!(text(&report, "type"), "synthetic-full");
            assert!(number(&report, "stored_bytes") < number(&report, "cluster_bytes") / 20, "{report}");
            merged = Some((report, dump(&source, &[])));
        }
    }
    let (merged, at_merge) = merged.unwrap();
    let merged = text(&merged, "id");
    let others: Vec<String> =
        lab.list().iter().map(|backup| text(backup, "id").to_owned()).filter(|id| id != merged).collect();
    assert_eq!(others.len(), NIGHTS);
    let words: Vec<&str> = ["expire"].into_iter().chain(others.iter().map(String::as_str)).collect();
    let report = on_repo(lab, &words).json(0);
    assert_eq!(report["removed"].as_array().unwrap().len(), NIGHTS);
    assert!(number(&report, "bytes_freed") > 0);
    let left = lab.list();
    assert_eq!((left.len(), text(&left[0], "id")), (1, merged));
    lab.verify();

    pgbench(&source, &["--client=2", "--transactions=100", "--no-vacuum"]);
    let next = lab.backup(&source, &[]);
    assert_eq!((text(&next, "type"), text(&next, "parent")), ("incremental", merged));
    let at_end = dump(&source, &[]);
    judge(lab.restore(merged, "restored-merged", &[]), &at_merge, &[]);
    judge(lab.restore(text(&next, "id"), "restored-next", &[]), &at_end, &[]);
}

/// Backups under load; merges, expiries and exports while the next backup goes on.
fn a_repository_is_kept_in_order_while_the_cluster_is_backed_up(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    Load::prepare(&source, 2).unwrap();
    pgbench(&source, &["--initialize", "--quiet", "--scale=2"]);
    lab.backup(&source, &[]);
    let load = Load::start(&source, 7).unwrap();
    let slowly = ["--max-rate", "30M"];
    let offsite = lab.path("offsite").into_os_string().into_string().unwrap();
    for round in 0..4 {
        load.wait_for_commits(50).unwrap();
        std::thread::scope(|scope| {
            let backup = scope.spawn(|| lab.backup(&source, &slowly));
            let repack = if round % 2 == 0 { vec!["merge", "--repack"] } else { vec!["merge"] };
            on_repo(lab, &repack).json(0);
            on_repo(lab, &["export", "--init", "--to", &offsite]).json(0);
            on_repo(lab, &["expire", "--keep-last", "2", "--max-unused", "0"]).json(0);
            on_repo(lab, &["verify"]).json(0);
            backup.join().unwrap()
        });
    }
    let (expected, committed) = (dump(&source, &[]), load.committed());
    let last = lab.backup(&source, &[]);
    load.stop().unwrap();
    on_repo(lab, &["expire", "--keep-last", "1"]).json(0);
    let ids: Vec<Value> = lab.list().iter().map(|backup| backup["id"].clone()).collect();
    assert_eq!(ids, [last["id"].clone()]);
    on_repo(lab, &["export", "--to", &offsite]).json(0);
    lab.verify();
    let mut restored = lab.restore(text(&last, "id"), "restored", &[]);
    restored.start().unwrap();
    assert_same_dump(&expected, &dump(&restored, &[]));
    assert!(load::check(&restored).unwrap().at_least(&committed));
    judge_running(&mut restored);

    let copied = Cluster::adopt(&lab.server, &lab.tools, &restore_from(lab, &offsite)).unwrap();
    judge(copied, &expected, &[]);
}

/// Restores the latest backup of another repository.
fn restore_from(lab: &Lab, repo: &str) -> std::path::PathBuf {
    let target = lab.path("restored-from-the-copy");
    let args: [OsString; 6] =
        ["restore".into(), "--json".into(), "--repo".into(), repo.into(), "--target".into(), target.clone().into()];
    lab.pgstrata(args).json(0);
    target
}
