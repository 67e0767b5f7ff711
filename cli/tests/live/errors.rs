//! What cannot be done is refused with its reason and its exit code, and the repository is as it was.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use testdata::cluster::{Cluster, ClusterOptions, StopMode};

use crate::support::{Lab, Run, for_majors, tree};

for_majors!(a_wrong_source_is_refused: sources_on_13 = 13, sources_on_15 = 15, sources_on_18 = 18);
for_majors!(a_wrong_repository_is_refused: repositories_on_18 = 18);

/// A backup of directory `data_dir` with connection `conninfo` into `repo`.
fn back_up(lab: &Lab, repo: &Path, data_dir: &Path, conninfo: &str) -> Run {
    let words = ["backup", "--repo"].map(OsString::from);
    let rest: [OsString; 5] = [repo.into(), "-D".into(), data_dir.into(), "-d".into(), conninfo.into()];
    lab.pgstrata(words.into_iter().chain(rest))
}

/// A stopped cluster may be anything but cleanly stopped, and a running one must be asked about by its own name.
fn a_wrong_source_is_refused(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default().conf("max_wal_senders = 0"));
    let other = lab.cluster(&ClusterOptions::default());
    let init: [OsString; 3] = ["init".into(), "--repo".into(), lab.repo().into()];
    lab.pgstrata(init).expect(0);
    let before = tree(&lab.repo());
    let refuses = |source: &Cluster, data_dir: &Path, conninfo: &str, words: &[&str]| {
        back_up(lab, &lab.repo(), data_dir, conninfo).refuses(1, words);
        assert!(tree(&lab.repo()) == before, "a refused backup changed the repository");
        assert!(source.pid().is_some());
    };

    let empty = lab.dir("empty");
    refuses(&source, &empty, &source.conninfo(), &[empty.to_str().unwrap()]);
    let gone = lab.path("gone");
    refuses(&source, &gone, &source.conninfo(), &[gone.to_str().unwrap()]);
    // The server runs on another directory than the one that was named.
    refuses(&other, source.data_dir(), &other.conninfo(), &[source.data_dir().to_str().unwrap()]);

    let nobody_there = format!("host={} port=5432 user=postgres", empty.display());
    refuses(&other, other.data_dir(), &nobody_there, &[empty.to_str().unwrap()]);

    other.sql("postgres", "CREATE ROLE plain LOGIN").unwrap();
    let as_plain = other.conninfo().replace("user=postgres", "user=plain");
    refuses(&other, other.data_dir(), &as_plain, &["plain", "GRANT"]);

    source.add_conf(&["wal_level = minimal".to_owned()]).unwrap();
    source.restart(StopMode::Fast).unwrap();
    refuses(&source, source.data_dir(), &source.conninfo(), &["wal_level"]);

    // Offline: a running cluster, then one that has crashed.
    let running = lab.backup_offline(other.data_dir());
    running.refuses(1, &[other.data_dir().to_str().unwrap()]);
    let mut other = other;
    other.stop(StopMode::Immediate).unwrap();
    lab.backup_offline(other.data_dir()).refuses(1, &[other.data_dir().to_str().unwrap(), "so that it recovers"]);
    // Found by its directory alone: what is wrong is said first, and then what was tried.
    let words = ["backup".into(), "--repo".into(), lab.repo().into(), "-D".into(), other.data_dir().into()];
    let crashed: Run = lab.pgstrata::<OsString>(words);
    crashed.refuses(1, &["was not stopped cleanly (pg_control says", "start it, so that it recovers"]);
    assert!(
        crashed.stderr.starts_with("error: no server runs on ") && !crashed.stderr.contains("--offline"),
        "{crashed}"
    );
    assert!(tree(&lab.repo()) == before, "a refused backup changed the repository");

    other.start().unwrap();
    lab.backup(&other, &[]);
    lab.verify();
}

fn a_wrong_repository_is_refused(lab: &Lab) {
    let (source, foreign) = (lab.cluster(&ClusterOptions::default()), lab.cluster(&ClusterOptions::default()));
    let back_up_into = |repo: &Path| back_up(lab, repo, source.data_dir(), &source.conninfo());

    // There is none, and none is asked for.
    let none = lab.path("none");
    back_up_into(&none).refuses(5, &[none.to_str().unwrap()]);
    assert!(!none.exists());

    // It is somebody's directory.
    let photos = lab.dir("photos");
    fs::write(photos.join("cat.jpg"), b"cat").unwrap();
    let before = tree(&photos);
    back_up_into(&photos).refuses(5, &[photos.to_str().unwrap()]);
    let init: [OsString; 3] = ["init".into(), "--repo".into(), photos.clone().into()];
    let refused = lab.pgstrata(init);
    assert_ne!(refused.code, Some(0), "{refused}");
    assert!(tree(&photos) == before);

    // It holds another cluster's backups.
    lab.backup(&foreign, &[]);
    let before = tree(&lab.repo());
    let identifier = |cluster: &Cluster| {
        cluster.query_value("postgres", "SELECT system_identifier FROM pg_control_system()").unwrap()
    };
    back_up_into(&lab.repo()).refuses(1, &[&identifier(&source), &identifier(&foreign)]);
    assert!(tree(&lab.repo()) == before);

    // It is of a later format.
    let identity = lab.repo().join("repository");
    let ours = fs::read_to_string(&identity).unwrap();
    let newer = ours.lines().next().unwrap().replacen(":1", ":99", 1);
    let sum = blake3::hash(newer.as_bytes()).to_hex();
    fs::remove_file(&identity).unwrap();
    fs::write(&identity, format!("{newer}\n{sum}\n")).unwrap();
    let before = tree(&lab.repo());
    back_up(lab, &lab.repo(), foreign.data_dir(), &foreign.conninfo()).refuses(5, &["99"]);
    assert!(tree(&lab.repo()) == before);

    lab.pgstrata(["backup", "--no-such-option"]).refuses(2, &["--no-such-option"]);
}
