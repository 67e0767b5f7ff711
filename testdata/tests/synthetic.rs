//! Synthetic clusters, judged by PostgreSQL's own tools and by real clusters of every major.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use pgstrata_testdata::cluster::{Cluster, ClusterOptions, StopMode, succeed};
use pgstrata_testdata::servers::{Cache, Installation, MAJORS};
use pgstrata_testdata::synthetic::page::check_directory;
use pgstrata_testdata::synthetic::{Options, SyntheticCluster, control_file_is_valid};

/// The installation of `major`; `None`, said aloud, where it cannot be had.
fn installation(major: u32) -> Option<Arc<Installation>> {
    let found = Cache::for_tests().and_then(|cache| Installation::for_major(major, &cache));
    found.map(Arc::new).map_err(|reason| eprintln!("skipped: no PostgreSQL {major} ({reason})")).ok()
}

fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => pending.push(path),
                false => drop(files.insert(path.strip_prefix(dir).unwrap().to_owned(), fs::read(&path).unwrap())),
            }
        }
    }
    files
}

/// A cluster that has seen every kind of change.
fn changed_cluster(dir: &Path, options: Options) -> SyntheticCluster {
    let mut cluster = SyntheticCluster::create(dir, options).unwrap();
    cluster.add_database(5).unwrap();
    let relations: Vec<usize> = (0..5).map(|i| cluster.add_relation(5, 300 + i).unwrap()).collect();
    cluster.checkpoint().unwrap();
    assert_eq!(cluster.change_random_blocks(relations[0], 20, 3).unwrap().len(), 20);
    cluster.append(relations[1], 200).unwrap();
    cluster.truncate(relations[2], 100).unwrap();
    cluster.truncate_and_regrow(relations[3], 100, 250).unwrap();
    cluster.append_zeros(relations[3], 7).unwrap();
    cluster.drop_and_recreate(relations[4], 310).unwrap();
    cluster.drop_relation(relations[0]).unwrap();
    cluster.checkpoint().unwrap();
    cluster.promote().unwrap();
    cluster
}

#[test]
fn many_relations_in_tablespaces_have_the_pages_that_were_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let mut options = Options::new(18, 9);
    options.segment_blocks = 150;
    let mut cluster = SyntheticCluster::create(&home.path().join("data"), options).unwrap();
    cluster.add_database(5).unwrap();
    let place = home.path().join("elsewhere");
    cluster.add_tablespace(70_000, &place, 5).unwrap();
    cluster.add_relations(5, &[0, 1, 4, 5, 400], &[70_000]).unwrap();
    let before = contents(home.path());
    let name = |number| format!("elsewhere/PG_18_202506291/5/{number}");
    let blocks = |name: &str| before.get(Path::new(name)).map(|bytes| bytes.len() / 8192);
    assert_eq!([blocks("data/base/5/16384"), blocks(&name("16385"))], [Some(0), Some(1)]);
    assert_eq!([blocks("data/base/5/16386_fsm"), blocks(&name("16387_fsm"))], [None, Some(3)]);
    let segments = ["", ".1", ".2", ".3"].map(|suffix| blocks(&format!("data/base/5/16388{suffix}")));
    assert_eq!(segments, [Some(150), Some(150), Some(100), None]);
    cluster.rewrite(4, &[3, 399]).unwrap();
    let after = contents(home.path());
    let changed = |name: &&str| before[Path::new(name)] != after[Path::new(name)];
    let names = ["data/base/5/16388", "data/base/5/16388.1", "data/base/5/16388.2", "data/base/5/16386"];
    assert_eq!(names.iter().map(changed).collect::<Vec<_>>(), [true, false, true, false]);
}

#[test]
fn postgresqls_own_tools_accept_a_synthetic_cluster() {
    for major in [15, 18] {
        let Some(server) = installation(major) else { continue };
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let mut cluster = changed_cluster(&dir, Options::new(major, 7));
        cluster.add_tablespace(70_000, &home.path().join("elsewhere"), 5).unwrap();
        cluster.add_relations(5, &[0, 3, 40], &[70_000]).unwrap();
        let tool = |name: &str| match server.has(name) {
            true => Some(Command::new(server.bin_dir.join(name))),
            false => {
                eprintln!("skipped: PostgreSQL {major} without {name}");
                None
            }
        };
        if let Some(mut controldata) = tool("pg_controldata") {
            let output = succeed(controldata.arg(&dir)).unwrap();
            let printed = String::from_utf8(output.stdout).unwrap();
            assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            for line in [
                "shut down",
                "wal_level setting:                    replica",
                "Bytes per WAL segment:                16777216",
                "Latest checkpoint's TimeLineID:       2",
            ] {
                assert!(printed.contains(line), "no {line:?} in\n{printed}");
            }
            assert!(!printed.contains("WARNING"), "{printed}");
        }
        if let Some(mut checksums) = tool("pg_checksums") {
            succeed(checksums.arg("--check").arg("-D").arg(&dir)).unwrap();
        }
        if let Some(mut waldump) = tool("pg_waldump") {
            let output = waldump.arg(dir.join("pg_wal/000000020000000000000004")).output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout);
            assert!(printed.contains("CHECKPOINT_SHUTDOWN redo 0/4000028; tli 2"), "{printed}");
            let history = fs::read_to_string(dir.join("pg_wal/00000002.history")).unwrap();
            assert_eq!(history, "1\t0/4000000\tno recovery target specified\n");
        }
    }
}

/// Every field of a fresh cluster's pg_control that does not depend on its history is as we write it.
#[test]
fn pg_control_is_as_every_major_writes_it() {
    for major in MAJORS {
        let Some(server) = installation(major) else { continue };
        let mut real = Cluster::create(&server, &server, &ClusterOptions::default()).unwrap();
        real.stop(StopMode::Fast).unwrap();
        let theirs = fs::read(real.data_dir().join("global/pg_control")).unwrap();
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        SyntheticCluster::create(&dir, Options::new(major, 1)).unwrap();
        let ours = fs::read(dir.join("global/pg_control")).unwrap();
        assert_eq!(ours.len(), theirs.len());
        assert!(control_file_is_valid(major, &theirs) && control_file_is_valid(major, &ours), "PostgreSQL {major}");
        // Versions; state; wal_level and wal_log_hints; sizes and the checksum version.
        for range in [8..20, 172..177, 200..256] {
            assert_eq!(ours[range.clone()], theirs[range.clone()], "PostgreSQL {major}, bytes {range:?}");
        }
        let their_map = fs::read(real.data_dir().join("base/1/pg_filenode.map")).unwrap();
        let our_map = fs::read(dir.join("base/1/pg_filenode.map")).unwrap();
        assert_eq!((our_map.len(), &our_map[..4]), (their_map.len(), &their_map[..4]));
        let wal = |dir: &Path| {
            let segments = fs::read_dir(dir.join("pg_wal")).unwrap().map(|entry| entry.unwrap().path());
            fs::read(segments.filter(|path| path.is_file()).max().unwrap()).unwrap()
        };
        let (our_wal, their_wal) = (wal(&dir), wal(real.data_dir()));
        assert_eq!(
            (our_wal.len(), &our_wal[..8], &our_wal[32..40]),
            (their_wal.len(), &their_wal[..8], &their_wal[32..40])
        );
    }
}

#[test]
fn real_pages_have_the_checksums_that_we_compute() {
    for major in MAJORS {
        let Some(server) = installation(major) else { continue };
        let mut real = Cluster::create(&server, &server, &ClusterOptions::default()).unwrap();
        real.sql("postgres", "CREATE TABLE t AS SELECT i, repeat('x', i % 100) FROM generate_series(1, 10000) i")
            .unwrap();
        real.stop(StopMode::Fast).unwrap();
        let (bad, count) = check_directory(real.data_dir()).unwrap();
        assert!(bad.is_empty() && count > 1000, "PostgreSQL {major}: {bad:?} of {count} pages");
    }
}

#[test]
fn the_same_seed_writes_the_same_bytes_and_every_page_has_its_checksum() {
    let home = tempfile::tempdir().unwrap();
    let options = Options { segment_blocks: 128, hole_every: Some(3), ..Options::new(16, 9) };
    for name in ["a", "b"] {
        changed_cluster(&home.path().join(name), options.clone());
    }
    let (a, b) = (contents(&home.path().join("a")), contents(&home.path().join("b")));
    assert!(a == b, "two runs differ");
    let lengths: Vec<usize> =
        ["16387", "16387.1", "16387.2"].map(|name| a[&Path::new("base/5").join(name)].len() / 8192).into();
    assert_eq!(lengths, [128, 128, 101]);
    let truncated: Vec<usize> =
        ["16386", "16386.1", "16386.2"].map(|name| a[&Path::new("base/5").join(name)].len() / 8192).into();
    assert_eq!(truncated, [100, 0, 0]);
    assert!(!a.contains_key(Path::new("base/5/16384")));

    let whole = home.path().join("whole");
    changed_cluster(&whole, Options::new(16, 9));
    let (bad, count) = check_directory(&whole).unwrap();
    assert!(bad.is_empty() && count > 1200, "{bad:?} of {count}");
}
