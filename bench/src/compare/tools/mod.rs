//! The tools that back up and restore, pgstrata and its peers, each with its best settings.
//!
//! A [`Tool`] knows how its commands are written and where its repository is; when they run, and on what, is the rounds' to say. A peer
//! that is not on this machine is left out, with a word on how to get it; nothing is installed from here.
//!
//! Every command leaves what it wrote on the disk: whoever does not sync is followed by a `sync -f` in the same measured shell.

mod barman;
mod pgbackrest;
mod pgstrata;
mod postgres;
mod walrus;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testdata::os_user::ServerUser;
use testdata::{Error, Result};

use super::ToolArgs;
use super::site::Site;

/// What a tool can do; the same word for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// A full backup into a repository that has none.
    Full,
    /// A backup of what changed since the last one.
    Incremental,
    /// A full backup made of the last one.
    Merge,
    /// A restore of the full backup, while it is the only one.
    RestoreFull,
    /// A restore of the last incremental.
    RestoreLast,
    /// A check of all backups.
    Verify,
}

impl Action {
    /// As in `samples.csv`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Merge => "merge",
            Self::RestoreFull => "restore-full",
            Self::RestoreLast => "restore-last",
            Self::Verify => "verify",
        }
    }

    /// In the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::RestoreFull => "restore of the full",
            Self::RestoreLast => "restore of the last",
            other => other.name(),
        }
    }

    /// Whether it makes a directory.
    pub fn restores(self) -> bool {
        matches!(self, Self::RestoreFull | Self::RestoreLast)
    }
}

/// A tool with a repository of its own.
pub trait Tool {
    /// Its name in tables and samples.
    fn name(&self) -> &'static str;

    /// Its version, in a line.
    fn version(&self) -> String;

    /// Its settings, in a line.
    fn settings(&self) -> String;

    /// What grows with its backups.
    fn repo(&self) -> &Path;

    /// Makes its repository empty and ready, unmeasured.
    ///
    /// # Errors
    /// When that fails.
    fn prepare(&mut self, site: &Site) -> Result<()>;

    /// In which ways it does this; none if it does not. The way of a tool that has one only is empty.
    fn ways(&self, action: Action) -> Vec<&'static str>;

    /// The command; a restore writes `target`, which is not there, in a directory that is.
    ///
    /// # Errors
    /// When it cannot be put together.
    fn command(&mut self, site: &Site, action: Action, way: &str, target: &Path) -> Result<Command>;

    /// Takes notice of what a command printed, and removes what was made to be measured only.
    ///
    /// # Errors
    /// When it printed something else.
    fn done(&mut self, action: Action, way: &str, printed: &Value) -> Result<()>;

    /// The next backup is made of a later state of the cluster.
    fn settle(&mut self) {}

    /// Its number of workers, where that is not everybody's.
    fn own_jobs(&self) -> Option<u32> {
        None
    }

    /// Whether a restored directory lacks WAL to become consistent, which the archive has to give.
    fn needs_archive(&self) -> bool {
        false
    }
}

/// Where a set of tools works: one for the rounds, one for the history of nights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Repositories that are made anew in each round.
    Rounds,
    /// Repositories with a history.
    Nights,
}

impl Set {
    /// The directory of a tool's repository.
    fn home(self, site: &Site, tool: &str) -> PathBuf {
        site.scratch()
            .path(match self {
                Self::Rounds => "rounds",
                Self::Nights => "nights",
            })
            .join(tool)
    }
}

/// The tools of a run.
pub struct Tools {
    /// pgstrata first.
    pub found: Vec<Box<dyn Tool>>,
    /// What is to be said of those that are left out.
    pub left_out: Vec<String>,
}

/// The tools of this run.
pub fn find(args: &ToolArgs, site: &Site, set: Set) -> Tools {
    let mut found: Vec<Box<dyn Tool>> = vec![ours(args, site, set)];
    for &jobs in args.jobs.iter().skip(1).filter(|_| set == Set::Rounds) {
        found.push(Box::new(pgstrata::Pgstrata::with_jobs(args, site, jobs)));
    }
    let mut left_out = Vec::new();
    let peers: [(&str, Found); 4] = [
        ("pg_basebackup", postgres::find(site, set)),
        ("pgbackrest", pgbackrest::find(args, site, set)),
        ("wal-rus", walrus::find(args, site, set)),
        ("barman", barman::find(args, site, set)),
    ];
    for (name, peer) in peers {
        match peer {
            _ if !args.peers.wants(name) => {}
            Ok(tool) => found.push(tool),
            Err(why) => left_out.push(format!("{name} was left out: {why}")),
        }
    }
    Tools { found, left_out }
}

/// pgstrata alone.
pub fn ours(args: &ToolArgs, site: &Site, set: Set) -> Box<dyn Tool> {
    Box::new(pgstrata::Pgstrata::new(args, site, set))
}

/// PostgreSQL's own tools alone.
///
/// # Errors
/// When they are not here.
pub fn postgres(site: &Site, set: Set) -> std::result::Result<Box<dyn Tool>, String> {
    postgres::find(site, set)
}

/// A peer, or why it cannot take part.
type Found = std::result::Result<Box<dyn Tool>, String>;

/// The first line that the servers' user gets from `program --version` or the like.
fn version_of(user: &ServerUser, program: &Path, arg: &str) -> std::result::Result<String, String> {
    let output = user.command(program).arg(arg).output();
    let output = output.map_err(|e| format!("{} cannot be run: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => Err(format!("{} {arg} failed ({})", program.display(), output.status)),
    }
}

/// The program at `path`, or of this name on the `PATH`; else `hint`, how to get it.
fn program(path: Option<&PathBuf>, name: &str, hint: &str) -> std::result::Result<PathBuf, String> {
    if let Some(path) = path {
        return Ok(path.clone());
    }
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&dirs).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| format!("there is no {name} here; {hint}"))
}

/// A new, empty directory of the servers' user, in the place of an old one.
fn fresh(site: &Site, path: &Path) -> Result<()> {
    let failed = |e: std::io::Error| crate::cannot("make", path, e);
    if path.exists() {
        std::fs::remove_dir_all(path).map_err(failed)?;
    }
    let above: Vec<&Path> = path.ancestors().take_while(|dir| !dir.exists()).collect();
    for dir in above.into_iter().rev() {
        std::fs::create_dir(dir).map_err(failed)?;
        site.scratch().user().own(dir)?;
    }
    Ok(())
}

/// `command`, and what it wrote in `directory` synced, in one shell.
fn and_sync(site: &Site, command: &Command, directory: &Path) -> Command {
    let mut shell = site.scratch().program("sh");
    shell.args(["-c", "to=$1; shift; \"$@\" && sync -f \"$to\"", "sh"]).arg(directory);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

fn no_server(name: &str) -> Error {
    Error::new(format!("{name} needs a server"))
}
