//! What a run ran on: the facts that its numbers depend on, and none that say whose machine it was.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use testdata::Result;
use testdata::cluster::Cluster;

use crate::cannot;

/// Processor, cores, memory, kernel, file system.
///
/// # Errors
/// When the work directory's file system cannot be told.
pub fn machine(work: &Path) -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let mut text = String::new();
    let _ = writeln!(text, "processor    {}", field(&cpuinfo, "model name").unwrap_or("unknown"));
    let _ = writeln!(text, "cores        {cores}");
    let _ = writeln!(text, "caches       {}", caches());
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let _ = writeln!(text, "memory       {}", field(&meminfo, "MemTotal").unwrap_or("unknown"));
    let _ = writeln!(text, "kernel       Linux {}", rustix::system::uname().release().to_string_lossy());
    let _ = writeln!(text, "file system  {}", file_system(work)?);
    Ok(text)
}

/// The sizes of the caches that the first processor sees, smallest first.
fn caches() -> String {
    let size = |index| fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok();
    let sizes: Vec<String> = (0..).map_while(size).map(|size| size.trim().to_owned()).collect();
    if sizes.is_empty() { "unknown".to_owned() } else { sizes.join(" ") }
}

/// The machine's load over the last 1, 5 and 15 minutes.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// pgstrata, its commit, Rust, and, where there is a cluster, PostgreSQL and the peers.
pub fn versions(cluster: Option<&Cluster>) -> String {
    let source = env!("CARGO_MANIFEST_DIR");
    let git = |args: &[&str]| first_line(Command::new("git").args(["-C", source]).args(args));
    let changed = git(&["status", "--porcelain", "--", "../engine", "../cli", "../Cargo.lock"]);
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    let commit = if ["", "none"].contains(&changed.as_str()) { commit } else { format!("{commit}, with changes") };
    let mut text = String::new();
    let _ = writeln!(text, "pgstrata          {} (commit {commit})", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(text, "rust              {}", first_line(Command::new("rustc").arg("--version")));
    let Some(cluster) = cluster else { return text };
    let _ = writeln!(text, "server            PostgreSQL {}", cluster.server().version);
    for name in ["pg_basebackup", "pg_combinebackup"] {
        let version = cluster.tool(name).map(|mut tool| first_line(tool.arg("--version")));
        let _ = writeln!(text, "{name:<17} {}", version.unwrap_or_else(|_| "none".to_owned()));
    }
    for name in ["cat", "cp"] {
        let _ = writeln!(text, "{name:<17} {}", first_line(Command::new(name).arg("--version")));
    }
    text
}

/// The first line that a program prints.
fn first_line(command: &mut Command) -> String {
    let output = command.output().ok().filter(|output| output.status.success());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.and_then(|text| Some(text.lines().next()?.to_owned())).unwrap_or_else(|| "none".to_owned())
}

/// The value of `name: value` or `name<tab>: value`.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// The type of the file system that `path` is in.
fn file_system(path: &Path) -> Result<String> {
    let path = path.canonicalize().map_err(|e| cannot("resolve", path, e))?;
    let mounts =
        fs::read_to_string("/proc/self/mounts").map_err(|e| cannot("read", Path::new("/proc/self/mounts"), e))?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((Path::new(fields.next()?), fields.next()?))
    });
    let deepest = mounts.filter(|(at, _)| path.starts_with(at)).max_by_key(|(at, _)| at.as_os_str().len());
    Ok(deepest.map_or("unknown", |(_, kind)| kind).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_with_and_without_tabs() {
        let text = "model\t\t: 17\nmodel name\t: Some CPU @ 2 GHz\nMemTotal:       24 kB\n";
        assert_eq!(field(text, "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(field(text, "MemTotal"), Some("24 kB"));
        assert_eq!(field(text, "absent"), None);
    }
}
