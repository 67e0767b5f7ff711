//! The demo, from the outside: that it succeeds, and that it leaves nothing behind, however it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(120);
const SIGTERM: i32 = 15;

/// A temporary directory for a demo, which its unprivileged user can enter when we are root.
fn temporary_directory() -> TempDir {
    let dir = tempfile::Builder::new().prefix("demo-").tempdir_in("/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    dir
}

fn demo(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    command.args(["demo", "--json"]).env("PGSTRATA_CONFIG", "/dev/null").env("TMPDIR", dir).stdout(Stdio::piped());
    command
}

fn entries(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// Waits until the demo has started a server: until a data directory names its process.
fn wait_for_a_server(demo: &mut Child, dir: &Path) {
    let deadline = Instant::now() + DEADLINE;
    let runs = |name: String| dir.join(name).join("cluster/postmaster.pid").exists();
    while !entries(dir).into_iter().any(runs) {
        assert!(demo.try_wait().unwrap().is_none(), "the demo ended before it had a server");
        assert!(Instant::now() < deadline, "the demo never had a server");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes whose arguments name a place below `dir`.
fn processes_below(dir: &Path) -> Vec<String> {
    let needle = dir.to_str().unwrap();
    let command_line = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).ok();
    let lines = fs::read_dir("/proc").unwrap().filter_map(|entry| command_line(entry.ok()?));
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(needle)).collect()
}

#[test]
fn the_demo_proves_the_copy_equal_and_leaves_nothing_behind() {
    let dir = temporary_directory();
    let output = demo(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let story: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&story["equal"], &story["kept"]), (&true.into(), &Value::Null));
    assert!(
        story["tables_compared"].as_u64() >= Some(7) && story["rows_compared"].as_u64() >= Some(300_000),
        "{story}"
    );
    let [full, incremental] = &story["backups"].as_array().unwrap()[..] else { panic!("two backups: {story}") };
    assert_eq!((&full["type"], &incremental["type"]), (&"full".into(), &"incremental".into()));
    assert!(incremental["stored_bytes"].as_u64() < full["stored_bytes"].as_u64(), "{story}");
    assert_eq!(entries(dir.path()), Vec::<String>::new());
}

#[test]
fn a_demo_that_is_told_to_end_stops_its_server_and_leaves_nothing_behind() {
    let dir = temporary_directory();
    let mut demo = demo(dir.path()).spawn().unwrap();
    wait_for_a_server(&mut demo, dir.path());
    assert!(!processes_below(dir.path()).is_empty());
    let sent = Command::new("kill").arg("-TERM").arg(demo.id().to_string()).status().unwrap();
    assert!(sent.success());
    assert_eq!(demo.wait().unwrap().signal(), Some(SIGTERM), "it ends as it was told to");
    assert_eq!(entries(dir.path()), Vec::<String>::new());
    assert_eq!(processes_below(dir.path()), Vec::<String>::new());
}
