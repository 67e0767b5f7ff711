//! PostgreSQL's own: `pg_basebackup` plain, and as tar compressed by the server; from 17 on its incrementals, and `pg_combinebackup`,
//! which is their restore.
//!
//! Incrementals are made against the plain backup; the tar one is made to be measured, and removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testdata::Result;

use super::{Action, Found, Set, Tool, fresh, no_server};
use crate::cannot;
use crate::compare::site::Site;

/// Of the tar that the server compresses.
const TAR: [&str; 2] = ["-Ft", "--compress=server-zstd:level=1,workers=2"];

struct Postgres {
    home: PathBuf,
    major: u32,
    tar: bool,
    version: String,
    /// The full backup and its incrementals.
    chain: Vec<PathBuf>,
}

pub(super) fn find(site: &Site, set: Set) -> Found {
    let server = site.server().ok_or("it needs a server")?;
    let tool = server.tool("pg_basebackup").map_err(|e| e.to_string())?;
    let version = super::version_of(site.scratch().user(), Path::new(tool.get_program()), "--version")?;
    let (home, major) = (set.home(site, "pg_basebackup"), site.major());
    Ok(Box::new(Postgres { home, major, tar: set == Set::Rounds && major >= 15, version, chain: Vec::new() }))
}

impl Postgres {
    fn can_increment(&self) -> bool {
        self.major >= 17
    }

    fn next(&self) -> PathBuf {
        self.home.join(format!("{:02}", self.chain.len()))
    }

    fn tar_dir(&self) -> PathBuf {
        self.home.join("tar")
    }
}

impl Tool for Postgres {
    fn name(&self) -> &'static str {
        "pg_basebackup"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn settings(&self) -> String {
        format!("-X stream --checkpoint=fast; tar: {}; restored by pg_combinebackup", TAR.join(" "))
    }

    fn repo(&self) -> &Path {
        &self.home
    }

    fn prepare(&mut self, site: &Site) -> Result<()> {
        self.chain.clear();
        fresh(site, &self.home)
    }

    fn ways(&self, action: Action) -> Vec<&'static str> {
        match action {
            Action::Full if self.tar => vec!["plain", "tar"],
            Action::Full => vec!["plain"],
            Action::Incremental | Action::RestoreFull | Action::RestoreLast if self.can_increment() => vec![""],
            _ => Vec::new(),
        }
    }

    fn command(&mut self, site: &Site, action: Action, way: &str, target: &Path) -> Result<Command> {
        let server = site.server().ok_or_else(|| no_server(self.name()))?;
        if action.restores() {
            let mut command = server.tool("pg_combinebackup")?;
            command.arg("-o").arg(target).args(&self.chain);
            return Ok(command);
        }
        let mut command = server.tool("pg_basebackup")?;
        command.args(["-X", "stream", "--checkpoint=fast", "-D"]);
        match (action, self.chain.last()) {
            (Action::Incremental, Some(last)) => {
                command.arg(self.next()).arg("--incremental").arg(last.join("backup_manifest"))
            }
            _ if way == "tar" => command.arg(self.tar_dir()).args(TAR),
            _ => command.arg(self.next()),
        };
        Ok(command)
    }

    fn done(&mut self, action: Action, way: &str, _: &Value) -> Result<()> {
        match action {
            Action::Full if way == "tar" => {
                fs::remove_dir_all(self.tar_dir()).map_err(|e| cannot("remove", &self.tar_dir(), e))?;
            }
            Action::Full | Action::Incremental => self.chain.push(self.next()),
            _ => {}
        }
        Ok(())
    }
}
