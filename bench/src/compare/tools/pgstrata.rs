//! pgstrata, in each way in which it finds what changed. Incrementals of several detectors have the same parent.
//!
//! With another number of workers it is a tool of its own, with a repository of its own, which does what workers make faster: full, scan,
//! restore, verify.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testdata::{Error, Result};

use super::{Action, Set, Tool, fresh};
use crate::compare::ToolArgs;
use crate::compare::site::Site;
use crate::merge;

/// pgstrata's commands on a repository.
pub struct Pgstrata {
    repo: PathBuf,
    jobs: u32,
    own_jobs: bool,
    compress: String,
    detectors: Vec<&'static str>,
    /// The full backup, and the one that incrementals are made against.
    full: String,
    parent: String,
    newest: String,
}

impl Pgstrata {
    /// With a repository for `set`.
    pub fn new(args: &ToolArgs, site: &Site, set: Set) -> Self {
        let detectors = match set {
            Set::Rounds => args.detect.iter().map(|detector| detector.name()).collect(),
            Set::Nights => vec!["auto"],
        };
        let repo = set.home(site, "pgstrata");
        let none = String::new;
        let (jobs, compress) = (args.jobs(), args.compress.clone());
        Self { repo, jobs, own_jobs: false, compress, detectors, full: none(), parent: none(), newest: none() }
    }

    /// For the rounds, with `jobs` workers, whatever others have.
    pub fn with_jobs(args: &ToolArgs, site: &Site, jobs: u32) -> Self {
        let repo = Set::Rounds.home(site, &format!("pgstrata-{jobs}"));
        Self { repo, jobs, own_jobs: true, detectors: vec!["scan"], ..Self::new(args, site, Set::Rounds) }
    }

    fn backup(&self, site: &Site) -> Command {
        let mut command = site.scratch().pgstrata("backup");
        command.arg("-D").arg(site.data_dir()).args(["--compress", &self.compress]);
        match site.server() {
            Some(server) => command.envs(server.libpq_env()),
            None => command.arg("--offline"),
        };
        command
    }

    fn restore(&self, site: &Site, backup: &str, target: &Path) -> Command {
        let mut command = site.scratch().pgstrata("restore");
        command.arg(backup).arg("--target").arg(target);
        for moved in site.tablespaces() {
            let map = format!("{}={}", moved.from.display(), moved.to.display());
            command.args(["--tablespace-map", &map]);
        }
        command
    }
}

impl Tool for Pgstrata {
    fn name(&self) -> &'static str {
        "pgstrata"
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    fn settings(&self) -> String {
        format!("--jobs {}, --compress {}", self.jobs, self.compress)
    }

    fn repo(&self) -> &Path {
        &self.repo
    }

    fn prepare(&mut self, site: &Site) -> Result<()> {
        fresh(site, &self.repo)
    }

    fn ways(&self, action: Action) -> Vec<&'static str> {
        match action {
            Action::Incremental => self.detectors.clone(),
            Action::Merge if self.own_jobs => Vec::new(),
            _ => vec![""],
        }
    }

    fn own_jobs(&self) -> Option<u32> {
        self.own_jobs.then_some(self.jobs)
    }

    fn command(&mut self, site: &Site, action: Action, way: &str, target: &Path) -> Result<Command> {
        let mut command = match action {
            Action::Full => self.backup(site),
            Action::Incremental => self.backup(site),
            Action::Merge => site.scratch().pgstrata("merge"),
            Action::RestoreFull => self.restore(site, &self.full, target),
            Action::RestoreLast => self.restore(site, &self.newest, target),
            Action::Verify => site.scratch().pgstrata("verify"),
        };
        match action {
            Action::Full => command.args(["--full", "--init"]),
            // Where nobody said what the parent is, it is the newest backup.
            Action::Incremental if self.parent.is_empty() => command.args(["--detect", way]),
            Action::Incremental => command.args(["--parent", &self.parent, "--detect", way]),
            Action::Merge => command.arg(&self.newest),
            _ => &mut command,
        };
        command.arg("--repo").arg(&self.repo).args(["--json", "--jobs", &self.jobs.to_string()]);
        Ok(command)
    }

    fn done(&mut self, action: Action, _: &str, printed: &Value) -> Result<()> {
        let id = || {
            let id = printed["id"].as_str().map(str::to_owned);
            id.ok_or_else(|| Error::new(format!("pgstrata --json printed no id but {printed}")))
        };
        match action {
            Action::Full => {
                self.full = id()?;
                self.newest = self.full.clone();
            }
            Action::Incremental => self.newest = id()?,
            Action::Merge => merge::remove(&self.repo, &id()?)?,
            _ => {}
        }
        Ok(())
    }

    fn settle(&mut self) {
        self.parent.clone_from(&self.newest);
    }
}
