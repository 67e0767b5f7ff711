//! The program as a shell sees it: streams and exit codes.

use std::process::{Command, Output};

use serde_json::Value;

/// A failing call of each command, and its exit code.
const FAILING: [(&str, i32); 21] = [
    ("init --repo /dev/null/repo", 1),
    ("backup --repo /nonexistent/repo -D /nonexistent", 5),
    ("check --repo /nonexistent/repo --cluster ../x", 2),
    ("list --repo /nonexistent/repo", 5),
    ("list --repo /nonexistent/repo latest", 5),
    ("list --repo /dev/null", 5),
    ("verify --repo /nonexistent/repo", 5),
    ("restore --repo /nonexistent/repo --target /nonexistent/target", 5),
    ("merge --repo /nonexistent/repo", 5),
    ("merge --dry-run --repo /nonexistent/repo", 5),
    ("export --repo /nonexistent/repo --to /nonexistent/other --init", 5),
    ("export --repo /nonexistent/repo --to /nonexistent/target --format plain", 5),
    ("expire --repo /nonexistent/repo", 2),
    ("expire --repo /nonexistent/repo --keep-last 7", 5),
    ("pin latest --repo /nonexistent/repo", 5),
    ("unpin latest --repo /nonexistent/repo", 5),
    ("demo --dir /nonexistent", 1),
    ("completions nosh", 2),
    ("help nonsense", 2),
    ("expire --repo /nonexistent/repo --keep-last 0", 2),
    ("backup --jobs many", 2),
];

fn pgstrata(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    command.env("PGSTRATA_CONFIG", "/dev/null").args(line.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_command_that_fails_prints_its_error_on_standard_error_alone() {
    for (line, exit) in FAILING {
        let output = pgstrata(line);
        assert_eq!(output.status.code(), Some(exit), "{line}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{line}");
        assert!(text(&output.stderr).starts_with("error: "), "{line}: {}", text(&output.stderr));
    }
}

#[test]
fn every_command_that_fails_prints_one_json_document_where_that_is_asked_for() {
    for (line, exit) in FAILING {
        let output = pgstrata(&format!("{line} --json"));
        assert_eq!(output.status.code(), Some(exit), "{line}");
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{line}: {error} in {}", text(&output.stdout)));
        let error = document["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["hint", "kind", "message", "place"], "{line}");
        assert!(error["kind"].is_string() && error["message"].is_string(), "{line}: {document}");
        assert!(text(&output.stderr).starts_with("error: "), "{line}");
    }
}

#[test]
fn no_command_is_left_out_of_these_tests() {
    let help = text(&pgstrata("--help").stdout);
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    for command in commands.lines().filter_map(|line| line.split_whitespace().next()) {
        assert!(FAILING.iter().any(|(line, _)| line.split(' ').next() == Some(command)), "{command}");
    }
}

#[test]
fn help_of_a_command_is_asked_for_either_way() {
    let (one, other) = (pgstrata("help backup"), pgstrata("backup --help"));
    assert_eq!((one.status.code(), text(&one.stdout)), (Some(0), text(&other.stdout)));
    assert_eq!(text(&pgstrata("help").stdout), text(&pgstrata("--help").stdout));
}

#[test]
fn whoever_forgets_or_mistypes_something_is_told_where_to_look() {
    let cases = [
        ("list", "hint: or set PGSTRATA_REPO in the environment"),
        ("restore --repo /r", "hint: or set PGSTRATA_TARGET"),
        ("list --repo /nonexistent/repo", "hint: check the path"),
        ("expire --repo /r --keep-last 0 --keep-daily 0", "0 is no rule"),
        ("backup --init --repo /nonexistent/repo --offline -D /nonexistent", "hint: check the path"),
    ];
    for (line, words) in cases {
        let output = pgstrata(line);
        assert!(text(&output.stderr).contains(words), "{line}: {}", text(&output.stderr));
    }
    let document: Value = serde_json::from_slice(&pgstrata("list --json").stdout).unwrap();
    assert!(document["error"]["hint"].as_str().unwrap().contains("PGSTRATA_REPO"), "{document}");
}

#[test]
fn init_then_list_on_a_new_repository() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    let on = |command: &str| pgstrata(&format!("{command} --json --repo {}", repo.display()));
    let created: Value = serde_json::from_slice(&on("init").stdout).unwrap();
    assert_eq!(created["repository"], repo.display().to_string());
    assert_eq!(serde_json::from_slice::<Value>(&on("list").stdout).unwrap(), Value::Array(Vec::new()));
    assert_eq!(on("verify").status.code(), Some(0), "nothing is not damaged");
    assert_eq!(on("init").status.code(), Some(1), "a repository is never made over another");
}

#[test]
fn a_repository_that_cannot_be_opened_is_exit_code_five() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    let list = || pgstrata(&format!("list --repo {}", repo.display()));
    assert_eq!(pgstrata(&format!("init --repo {}", repo.display())).status.code(), Some(0));
    assert_eq!(list().status.code(), Some(0));
    let header = repo.join("repository");
    let sound = std::fs::read(&header).unwrap();
    std::fs::write(&header, &sound[1..]).unwrap();
    let damaged = list();
    assert_eq!(damaged.status.code(), Some(5), "damaged");
    assert!(text(&damaged.stderr).contains("hint: the backups are in other files"), "{}", text(&damaged.stderr));
    std::fs::remove_file(&header).unwrap();
    assert_eq!(list().status.code(), Some(5), "not one");
    std::fs::create_dir(&header).unwrap();
    assert_eq!(list().status.code(), Some(5), "unreadable");
}

#[test]
fn a_first_backup_that_is_impossible_leaves_no_repository() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    for flags in ["", "--dry-run"] {
        let output = pgstrata(&format!("backup --init {flags} --offline --repo {} -D /nonexistent", repo.display()));
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(!repo.exists(), "{flags}");
    }
}

#[test]
fn an_export_of_a_backup_that_is_not_there_leaves_no_repository() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    let other = dir.path().join("other");
    assert_eq!(pgstrata(&format!("init --repo {}", repo.display())).status.code(), Some(0));
    let export = |flags: &str| pgstrata(&format!("export {flags} --repo {} --to {}", repo.display(), other.display()));
    for flags in ["--init", "--init --dry-run"] {
        assert_eq!(export(flags).status.code(), Some(1), "{flags}: {}", text(&export(flags).stderr));
        assert!(!other.exists(), "{flags}");
    }
    let output = export("");
    assert_eq!(output.status.code(), Some(5));
    assert!(
        text(&output.stderr).contains("hint: check the path, or create it with --init"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn expire_without_a_rule_tries_nothing_and_says_how_to_give_one() {
    for line in ["expire --repo /nonexistent/repo", "expire --repo /nonexistent/repo --keep-daily 0 --json"] {
        let output = pgstrata(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        let error = text(&output.stderr);
        assert!(error.contains("hint: ") && error.contains("--keep-last") && error.contains("--keep-all"), "{error}");
    }
}

#[test]
fn a_cluster_that_only_others_are_beside_is_an_error_that_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let on = |command: &str| pgstrata(&format!("{command} --repo {}/repo", dir.path().display()));
    assert_eq!(on("init").status.code(), Some(0));
    assert_eq!(on("list --cluster mian").status.code(), Some(0), "an empty repository lists as empty");
    let manifests = dir.path().join("repo/clusters/shop/manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    std::fs::write(manifests.join("20261121T010502Z-1a2b3c4d"), "damaged").unwrap();
    let others = ["merge", "export --to /nonexistent", "expire --keep-last 1", "pin latest", "unpin latest"];
    for command in ["list", "list latest", "verify"].into_iter().chain(others) {
        let output = on(command);
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(text(&output.stderr).contains("it has shop"), "{command}: {}", text(&output.stderr));
    }
    assert_eq!(on("list --cluster shop").status.code(), Some(5), "its only manifest is damaged");
}

#[test]
fn help_and_version_are_no_failures() {
    for line in ["--help", "--version", "backup --help", "info --help"] {
        let output = pgstrata(line);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{line}");
        assert!(text(&output.stdout).contains("pgstrata"), "{line}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let script = format!("{} completions bash | true; exit ${{PIPESTATUS[0]}}", env!("CARGO_BIN_EXE_pgstrata"));
    let output = Command::new("bash").arg("-c").arg(script).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}
