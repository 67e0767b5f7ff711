//! What happens on the server while it is backed up, where WAL replay alone would get it wrong.

use std::fs;
use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Lab, SLOW, assert_same_dump, back_up_while, dump, fill, for_majors, judge_running, poll, text};

for_majors!(databases_and_tablespaces_that_move_meanwhile: moves_on_13 = 13, moves_on_15 = 15, moves_on_18 = 18);
for_majors!(settings_that_change_meanwhile: settings_on_15 = 15, settings_on_18 = 18);
for_majors!(what_a_standby_replayed_meanwhile: standby_on_15 = 15, standby_on_18 = 18);
for_majors!(a_stopped_cluster_that_is_started_meanwhile: started_on_15 = 15);

/// Replay copies a database from where the restored one was, and makes a tablespace where the original's is: neither is in the backup.
fn databases_and_tablespaces_that_move_meanwhile(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    fill(&source);
    source.sql("postgres", "CREATE DATABASE template_of_another").unwrap();
    source.sql("template_of_another", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i").unwrap();
    source.sql("postgres", "CREATE DATABASE moving").unwrap();
    source.sql("moving", "CREATE TABLE t AS SELECT generate_series(1, 2000) AS i").unwrap();
    let space = lab.dir("space");
    let run = back_up_while(lab, &source, || {
        let create = format!("CREATE TABLESPACE space LOCATION '{}'", space.display());
        source.sql("postgres", &create).unwrap();
        source.sql("postgres", "CREATE TABLE in_space (i int) TABLESPACE space").unwrap();
        source.sql("postgres", "INSERT INTO in_space VALUES (42)").unwrap();
        source.sql("postgres", "ALTER DATABASE moving SET TABLESPACE space").unwrap();
        source.sql("postgres", "CREATE DATABASE copied TEMPLATE template_of_another").unwrap();
        source.sql("postgres", "DROP DATABASE template_of_another").unwrap();
    });
    let report = run.json(0);
    let elsewhere = lab.path("elsewhere");
    let moved = [(space.clone(), elsewhere.clone())];
    let mut restored = lab.restore(text(&report, "id"), "restored", &moved);
    restored.start().unwrap();
    for (database, count) in [("moving", "2000"), ("copied", "1000")] {
        assert_eq!(restored.query_value(database, "SELECT count(*) FROM t").unwrap(), count);
    }
    assert_eq!(restored.query_value("postgres", "SELECT i FROM in_space").unwrap(), "42");
    assert_same_dump(&dump(&source, &[]), &dump(&restored, &moved));
    restored.sql("postgres", "DROP TABLE in_space").unwrap();
    assert_eq!(source.query_value("postgres", "SELECT i FROM in_space").unwrap(), "42");
    judge_running(&mut restored);
}

/// Files that no WAL knows are as long as they are when they are read; what leads to the original leads there no more.
fn settings_that_change_meanwhile(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default().conf("max_connections = 60"));
    fill(&source);
    let own = source.data_dir().to_owned();
    source.add_conf(&[format!("data_directory = '{}'", own.display())]).unwrap();
    source.restart(StopMode::Fast).unwrap();
    // Not in force any more when the copy starts, where recovery would ask for as much as the source had.
    source.add_conf(&["max_connections = 40".to_owned()]).unwrap();
    let long = "a value that is longer than the one before ".repeat(20);
    let run = back_up_while(lab, &source, || {
        source.sql("postgres", &format!("ALTER SYSTEM SET \"some.setting\" = '{long}'")).ok();
        source.sql("postgres", "ALTER SYSTEM SET cluster_name = 'renamed'").unwrap();
        let hba = own.join("pg_hba.conf");
        let mut text = fs::read_to_string(&hba).unwrap();
        text.push_str("local nobody nobody reject\n");
        fs::write(&hba, text).unwrap();
    });
    let report = run.json(0);
    let mut restored = lab.restore(text(&report, "id"), "restored", &[]);
    let hba = fs::read_to_string(restored.data_dir().join("pg_hba.conf")).unwrap();
    assert!(hba.ends_with("local nobody nobody reject\n"));
    restored.start().unwrap();
    let value = |name: &str| restored.query_value("postgres", &format!("SHOW {name}")).unwrap();
    assert_eq!((value("cluster_name"), value("max_connections")), ("renamed".to_owned(), "40".to_owned()));
    assert_eq!(value("data_directory"), restored.data_dir().display().to_string());
    judge_running(&mut restored);
}

fn a_stopped_cluster_that_is_started_meanwhile(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default());
    fill(&source);
    source.stop(StopMode::Fast).unwrap();
    let mut args: Vec<std::ffi::OsString> = ["backup", "--init", "--offline", "--repo"].map(Into::into).into();
    args.extend([lab.repo().into(), "-D".into(), source.data_dir().into()]);
    args.extend(SLOW.map(Into::into));
    let run = std::thread::scope(|scope| {
        let backup = scope.spawn(|| lab.pgstrata(args));
        // The repository appears when the cluster was found to be stopped.
        poll(|| lab.repo().join("clusters").exists());
        source.start().unwrap();
        source.sql("postgres", "UPDATE bulk SET content = 'changed' WHERE i % 7 = 0").unwrap();
        source.stop(StopMode::Fast).unwrap();
        backup.join().unwrap()
    });
    run.refuses(1, &["changed"]);
    assert_eq!(lab.list().len(), 0);
}

/// `pg_backup_stop` on a standby names the point that must be replayed, which may lie long before what was replayed: with nothing
/// written out, before the backup.
fn what_a_standby_replayed_meanwhile(lab: &Lab) {
    let primary = lab.cluster(&ClusterOptions::default());
    fill(&primary);
    primary.sql("postgres", "CREATE TABLE seen (i int)").unwrap();
    let mut standby = primary.make_standby().unwrap();
    standby.add_conf(&["bgwriter_lru_maxpages = 0".to_owned()]).unwrap();
    standby.restart(StopMode::Fast).unwrap();
    let count = |cluster: &Cluster| cluster.query_value("postgres", "SELECT count(*) FROM seen").unwrap();
    let run = back_up_while(lab, &standby, || {
        primary.sql("postgres", "INSERT INTO seen SELECT generate_series(1, 700)").unwrap();
        poll(|| count(&standby) == "700");
    });
    let report = run.json(0);
    let mut restored = lab.restore(text(&report, "id"), "restored", &[]);
    restored.start().unwrap();
    assert_eq!(count(&restored), "700");
    judge_running(&mut restored);
}
