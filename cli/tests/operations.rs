//! Expire, pin, merge and export as a shell sees them, on the backups of a cluster that no server runs on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engine::repo::{ClusterName, Lease, Operation, Repository};
use serde_json::Value;
use testdata::synthetic::{Options, SyntheticCluster};

/// A repository with three backups, a full one and two incrementals.
struct Lab {
    scratch: tempfile::TempDir,
    ids: Vec<String>,
}

impl Lab {
    fn new() -> Self {
        let mut lab = Self { scratch: tempfile::tempdir().unwrap(), ids: Vec::new() };
        let options = Options { wal_segment_len: 1 << 20, ..Options::new(16, 5) };
        let mut cluster = SyntheticCluster::create(&lab.path("cluster"), options).unwrap();
        cluster.add_database(5).unwrap();
        let relation = cluster.add_relation(5, 200).unwrap();
        for choice in 0..3 {
            cluster.change_random_blocks(relation, 20, choice).unwrap();
            cluster.checkpoint().unwrap();
            let command = format!("backup --init --offline -D {}", cluster.dir().display());
            lab.ids.push(lab.json(&command, 0)["id"].as_str().unwrap().to_owned());
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, command: &str) -> Output {
        let mut process = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
            process.env_remove(name);
        }
        let environment = [("PGSTRATA_CONFIG", PathBuf::from("/dev/null")), ("PGSTRATA_REPO", self.path("repo"))];
        process.envs(environment).args(command.split_whitespace()).output().unwrap()
    }

    /// What a command prints, which ends with this exit code.
    fn text(&self, command: &str, exit: i32) -> String {
        let output = self.run(command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{command}: {error}");
        String::from_utf8(if exit == 0 { output.stdout } else { output.stderr }).unwrap()
    }

    fn json(&self, command: &str, exit: i32) -> Value {
        let output = self.run(&format!("{command} --json"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{command}: {error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn listed(&self) -> Vec<String> {
        ids(&self.json("list", 0))
    }

    /// Restores a backup and returns its files of the relation's database.
    fn restored(&self, backup: &str, name: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let target = self.path(name);
        self.json(&format!("restore {backup} --target {}", target.display()), 0);
        files(&target.join("base"))
    }
}

fn ids(backups: &Value) -> Vec<String> {
    backups.as_array().unwrap().iter().map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

/// The files of a directory with their contents, in order, by their paths in it.
fn files(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => found
                    .push((entry.path().strip_prefix(root).unwrap().to_owned(), std::fs::read(entry.path()).unwrap())),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn expire_does_what_its_dry_run_says_and_the_rest_still_restores() {
    let lab = Lab::new();
    let newest = lab.ids[2].clone();
    let before = lab.restored(&newest, "before");
    let rules = "expire --keep-last 1 --max-unused 0";
    let dry = lab.json(&format!("{rules} --dry-run"), 0);
    assert_eq!(lab.listed(), lab.ids, "a dry run removes nothing");
    let done = lab.json(rules, 0);
    assert_eq!((&dry["dry_run"], &done["dry_run"]), (&true.into(), &false.into()));
    assert_eq!((ids(&dry["removed"]), &dry["kept"]), (ids(&done["removed"]), &done["kept"]));
    assert_eq!(ids(&done["removed"]), lab.ids[..2]);
    assert_eq!(done["kept"], serde_json::json!([{ "id": newest, "reasons": ["last"] }]));
    assert_eq!(lab.listed(), lab.ids[2..]);
    assert_eq!(lab.restored(&newest, "after"), before);
    assert!(lab.text("verify", 0).contains("no damage found"));
}

#[test]
fn expire_prints_a_line_for_each_backup() {
    let lab = Lab::new();
    let text = lab.text(&format!("expire {} --dry-run", lab.ids[0]), 0);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], format!("goes   {}  full", lab.ids[0]));
    assert_eq!(lines[1..3], [format!("stays  {}  not named", lab.ids[1]), format!("stays  {}  not named", lab.ids[2])]);
    assert_eq!(lines.last(), Some(&"nothing was done (--dry-run)"));
}

#[test]
fn a_pinned_backup_stays_until_its_pin_is_gone() {
    let lab = Lab::new();
    let first = &lab.ids[0];
    assert!(lab.text(&format!("pin {first}"), 0).starts_with(&format!("pinned {first}")));
    assert!(lab.text("list", 0).contains("\n    pinned"));
    assert!(lab.text(&format!("info {first}"), 0).contains("pinned"));
    assert_eq!(lab.json(&format!("pin {first}"), 0)["pinned"], true, "again is no error");
    assert_eq!(lab.json("expire --keep-last 1", 0)["kept"][0]["reasons"], serde_json::json!(["pinned"]));
    assert_eq!(lab.listed(), [first.clone(), lab.ids[2].clone()]);
    assert!(lab.text(&format!("expire {first}"), 1).contains("--force"));
    assert_eq!(lab.json(&format!("unpin {first}"), 0)["pinned"], false);
    lab.json("expire --keep-last 1", 0);
    assert_eq!(lab.listed(), lab.ids[2..]);
}

#[test]
fn the_last_good_backup_goes_by_force_alone() {
    let lab = Lab::new();
    let all = lab.ids.join(" ");
    assert!(lab.text(&format!("expire {all}"), 1).contains("--force"));
    assert_eq!(lab.listed(), lab.ids);
    lab.json(&format!("expire {all} --force"), 0);
    assert!(lab.listed().is_empty());
}

#[test]
fn an_unreadable_backup_is_named_with_its_way_out_and_when_it_goes() {
    let lab = Lab::new();
    let first = &lab.ids[0];
    let manifest = lab.path("repo/clusters/main/manifests").join(first);
    let bytes = std::fs::read(&manifest).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    std::fs::write(&manifest, &bytes[1..]).unwrap();
    for command in [format!("expire {first}"), "expire --keep-last 1".to_owned()] {
        let error = lab.text(&command, 5);
        assert!(error.contains(&format!("give that backup up: pgstrata expire {first} --force")), "{error}");
        assert_eq!(error.matches("clusters/main/manifests").count(), 1, "{error}");
    }
    assert!(
        lab.text(&format!("expire {first} --force --dry-run"), 0).starts_with(&format!("goes   {first}  unreadable"))
    );
    let done = lab.json(&format!("expire {first} --force"), 0);
    assert_eq!((&done["removed_unreadable"], &done["removed"]), (&serde_json::json!([first]), &serde_json::json!([])));
    assert_eq!(lab.listed(), lab.ids[1..]);
}

#[test]
fn whoever_meets_damage_is_told_of_verify_and_of_what_is_left() {
    let lab = Lab::new();
    let pack = lab.path("repo/clusters/main/packs").join(&lab.ids[0]).join("000000.data");
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[1000] ^= 1;
    std::fs::remove_file(&pack).unwrap();
    std::fs::write(&pack, bytes).unwrap();
    let (first, target, other) = (&lab.ids[0], lab.path("target"), lab.path("other"));
    let (target, other) = (target.display(), other.display());
    for command in [
        format!("merge {first} --repack"),
        format!("export {first} --to {other} --init"),
        format!("restore {first} --target {target}"),
    ] {
        let error = lab.text(&command, 5);
        assert!(error.contains("hint: `pgstrata verify` tells which backups are hurt"), "{command}: {error}");
        let incomplete = format!("hint: {target} is incomplete; delete it");
        assert_eq!(error.contains(&incomplete), command.starts_with("restore"), "{command}: {error}");
    }
    let again = lab.text(&format!("restore {first} --target {target}"), 1);
    assert!(again.contains("did not end") && again.contains(&format!("{target} is incomplete; delete it")), "{again}");
}

#[test]
fn an_empty_note_is_none() {
    let lab = Lab::new();
    assert_eq!(lab.json("merge --note=", 0)["note"], Value::Null);
    let dry = lab.json("expire --keep-all --dry-run", 0);
    assert_eq!(dry["kept"][0]["reasons"], serde_json::json!(["--keep-all"]));
}

#[test]
fn a_backup_that_somebody_uses_stays_and_to_name_it_is_exit_code_four() {
    let lab = Lab::new();
    let (first, newest) = (&lab.ids[0], &lab.ids[2]);
    let repo = Repository::open(&lab.path("repo")).unwrap();
    let (lease, _) = Lease::of_backup(&repo, &ClusterName::default(), first, Operation::Restore, &|_| {}).unwrap();
    assert!(lab.text(&format!("expire {first}"), 4).contains("in use"));
    assert!(lab.text(&format!("expire {first} --force --dry-run"), 4).contains("in use"));
    assert_eq!(lab.json(&format!("expire {first}"), 4)["error"]["kind"], "locked");
    let kept = lab.json("expire --keep-last 1", 0)["kept"].clone();
    assert_eq!((&kept[0]["id"], &kept[1]["id"]), (&first.clone().into(), &newest.clone().into()));
    drop(lease);
    lab.json(&format!("expire {first}"), 0);
    assert_eq!(lab.listed(), lab.ids[2..]);
}

#[test]
fn a_list_ends_with_what_is_in_the_repository_now() {
    let lab = Lab::new();
    lab.json("expire --keep-last 1 --max-unused 0", 0);
    let cluster = files(&lab.path("repo/clusters/main"));
    let bytes: usize = cluster.iter().map(|(_, bytes)| bytes.len()).sum();
    let last = format!("1 backup, {} in the repository", engine::units::size(bytes as u64));
    assert_eq!(lab.text("list", 0).lines().last(), Some(last.as_str()));
}

#[test]
fn to_keep_all_removes_only_litter() {
    let lab = Lab::new();
    let run = "20261121T010502Z-0badcafe";
    let litter = lab.path("repo/clusters/main/packs").join(run).join("000000.data");
    std::fs::create_dir_all(litter.parent().unwrap()).unwrap();
    std::fs::write(&litter, [0; 5000]).unwrap();
    let done = lab.json("expire --keep-all", 0);
    assert_eq!((&done["removed"], &done["bytes_freed"]), (&Value::Array(Vec::new()), &5000.into()));
    assert_eq!(lab.listed(), lab.ids);
    assert!(!litter.exists());
}

#[test]
fn a_merged_backup_restores_like_the_one_it_is_made_of_and_without_it() {
    let lab = Lab::new();
    let newest = lab.ids[2].clone();
    let expected = lab.restored(&newest, "expected");
    assert!(lab.text("merge --dry-run", 0).contains("nothing was done"));
    for (number, options) in ["", "--repack --verify --note merged"].into_iter().enumerate() {
        let merged = lab.json(&format!("merge {newest} {options}"), 0);
        let id = merged["id"].as_str().unwrap();
        assert_eq!((&merged["type"], &merged["merged_from"]), (&"synthetic-full".into(), &newest.clone().into()));
        assert_eq!(lab.restored(id, &format!("merged-{number}")), expected, "{options}");
    }
    assert!(lab.text("list", 0).contains("; offline; note: merged\n"));
    lab.json(&format!("expire {} --max-unused 0", lab.ids.join(" ")), 0);
    assert_eq!(lab.listed().len(), 2);
    assert_eq!(lab.restored("latest", "alone"), expected);
    assert!(lab.text("merge", 0).contains("restore it: pgstrata restore "));
}

#[test]
fn a_backup_is_exported_as_files_of_its_cluster() {
    let lab = Lab::new();
    let (plain, tar) = (lab.path("plain"), lab.path("tar"));
    assert!(
        lab.text(&format!("export --format plain --to {} --dry-run", plain.display()), 0).contains("nothing was done")
    );
    assert!(!plain.exists());
    let text = lab.text(&format!("export --format plain --to {}", plain.display()), 0);
    assert!(text.contains(&format!("check it: pg_verifybackup {}", plain.display())), "{text}");
    assert_eq!(files(&plain.join("base")), files(&lab.path("cluster/base")));
    let done = lab.json(&format!("export {} --format tar --to {}", lab.ids[0], tar.display()), 0);
    assert_eq!((&done["id"], &done["format"]), (&lab.ids[0].clone().into(), &"tar".into()));
    assert!(tar.join("base.tar").exists() && tar.join("backup_manifest").exists());
    assert!(lab.text(&format!("export --format tar --to {}", tar.display()), 1).starts_with("error: "));
}

#[test]
fn a_backup_is_copied_to_another_repository_once() {
    let lab = Lab::new();
    let (newest, other) = (&lab.ids[2], lab.path("other"));
    let expected = lab.restored(newest, "expected");
    let export = format!("export --to {}", other.display());
    assert!(lab.text(&export, 5).contains("hint: check the path, or create it with --init"));
    assert!(lab.text(&format!("{export} --init --dry-run"), 0).contains("would create a repository"));
    assert!(!other.exists());
    let copied = lab.json(&format!("{export} --init"), 0);
    assert_eq!((&copied["id"], &copied["already_there"]), (&newest.clone().into(), &false.into()));
    assert!(lab.text(&format!("{export} --dry-run"), 0).contains("nothing was done"));
    let again = lab.text(&export, 0);
    assert!(again.starts_with(&format!("backup {newest} is in {} already\n", other.display())), "{again}");
    let listed = lab.json(&format!("list --repo {}", other.display()), 0);
    assert_eq!(ids(&listed), lab.ids[2..]);
    assert!(lab.text(&format!("verify --repo {}", other.display()), 0).contains("no damage found"));
    std::fs::remove_dir_all(lab.path("repo")).unwrap();
    std::fs::rename(other, lab.path("repo")).unwrap();
    assert_eq!(lab.restored("latest", "copied"), expected);
}
