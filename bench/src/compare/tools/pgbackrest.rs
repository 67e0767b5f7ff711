//! pgBackRest with its best settings: files bundled, blocks compared where the version can (2.46 and later), zstd 1, a process for each
//! core, a fast checkpoint. It does not wait for an archive: a backup's WAL is not among what it writes here.
//!
//! It backs up a stopped cluster too, so it takes part without a server; there it refuses an incremental of nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testdata::Result;
use testdata::cluster::{SUPERUSER, succeed};

use super::{Action, Found, Set, Tool, fresh};
use crate::cannot;
use crate::compare::ToolArgs;
use crate::compare::site::Site;

const HINT: &str = "install it (Debian: apt-get install pgbackrest), or build a newer one and say --pgbackrest PATH";

struct PgBackRest {
    program: PathBuf,
    version: String,
    blocks: bool,
    jobs: u32,
    home: PathBuf,
    repo: PathBuf,
}

pub(super) fn find(args: &ToolArgs, site: &Site, set: Set) -> Found {
    let program = super::program(args.peers.pgbackrest.as_ref(), "pgbackrest", HINT)?;
    let version = super::version_of(site.scratch().user(), &program, "version")?;
    let minor = minor(&version).ok_or_else(|| format!("it says {version:?} as its version"))?;
    let newest = if minor < 57 { newest_major(minor) } else { u32::MAX };
    if site.major() > newest {
        return Err(format!("{version} knows PostgreSQL up to {newest}; {HINT}"));
    }
    let home = set.home(site, "pgbackrest");
    let (repo, jobs, blocks) = (home.join("repo"), args.jobs(), minor >= 46);
    Ok(Box::new(PgBackRest { program, version, blocks, jobs, home, repo }))
}

/// 59 of `pgBackRest 2.59.1`.
fn minor(version: &str) -> Option<u32> {
    version.strip_prefix("pgBackRest 2.")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The newest PostgreSQL that version 2.`minor` knows.
fn newest_major(minor: u32) -> u32 {
    match minor {
        0..=40 => 14,
        41..=47 => 15,
        48..=52 => 16,
        _ => 17,
    }
}

impl PgBackRest {
    fn config(&self, site: &Site) -> String {
        let home = self.home.display();
        let blocks = if self.blocks { "repo1-block=y\n" } else { "" };
        let server = site.server().map_or_else(String::new, |server| {
            let (socket, port) = (server.socket_dir().display().to_string(), server.port());
            format!("[bench]\npg1-socket-path={socket}\npg1-port={port}\npg1-user={SUPERUSER}\n")
        });
        format!(
            "[global]\nrepo1-path={}\nrepo1-bundle=y\n{blocks}compress-type=zst\ncompress-level=1\nprocess-max={}\n\
             start-fast=y\narchive-check=n\nrepo1-retention-full=9\nlog-level-file=off\nlog-level-console=off\nlog-level-stderr=warn\n\
             log-path={home}/log\nlock-path={home}/lock\nspool-path={home}/spool\n{server}",
            self.repo.display(),
            self.jobs,
        )
    }

    /// For the commands that talk to a server, if there is one.
    fn online(&self, site: &Site) -> &'static str {
        if site.server().is_some() { "--online" } else { "--no-online" }
    }

    fn base(&self, site: &Site, pg_path: &Path) -> Command {
        let mut command = site.scratch().program_at(&self.program);
        let config = format!("--config={}", self.home.join("pgbackrest.conf").display());
        command.args([&config, "--stanza=bench"]).arg(format!("--pg1-path={}", pg_path.display()));
        command
    }
}

impl Tool for PgBackRest {
    fn name(&self) -> &'static str {
        "pgbackrest"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn settings(&self) -> String {
        let blocks = if self.blocks { "repo-block, " } else { "" };
        let jobs = self.jobs;
        format!(
            "repo-bundle, {blocks}compress-type=zst, compress-level=1, process-max={jobs}, start-fast, no archive-check"
        )
    }

    fn repo(&self) -> &Path {
        &self.repo
    }

    fn prepare(&mut self, site: &Site) -> Result<()> {
        fresh(site, &self.home)?;
        for name in ["repo", "log", "lock", "spool"] {
            site.scratch().user().make_dir(&self.home, name)?;
        }
        let path = self.home.join("pgbackrest.conf");
        std::fs::write(&path, self.config(site)).map_err(|e| cannot("write", &path, e))?;
        site.scratch().user().own(&path)?;
        succeed(self.base(site, &site.data_dir()).args([self.online(site), "stanza-create"])).map(drop)
    }

    fn ways(&self, action: Action) -> Vec<&'static str> {
        if action == Action::Merge || action == Action::Verify { Vec::new() } else { vec![""] }
    }

    fn command(&mut self, site: &Site, action: Action, _: &str, target: &Path) -> Result<Command> {
        let pg_path = if action.restores() { target.to_owned() } else { site.data_dir() };
        let mut command = self.base(site, &pg_path);
        match action {
            Action::Full => command.args(["--type=full", self.online(site), "backup"]),
            Action::Incremental => command.args(["--type=incr", self.online(site), "backup"]),
            _ => {
                for moved in site.tablespaces() {
                    command.arg(format!("--tablespace-map={}={}", moved.number, moved.to.display()));
                }
                command.args(["--type=none", "restore"])
            }
        };
        Ok(command)
    }

    fn done(&mut self, _: Action, _: &str, _: &Value) -> Result<()> {
        Ok(())
    }

    fn needs_archive(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_tells_what_it_can() {
        assert_eq!((minor("pgBackRest 2.45"), minor("pgBackRest 2.60.0dev")), (Some(45), Some(60)));
        assert_eq!(minor("something else"), None);
        assert_eq!((newest_major(45), newest_major(54)), (15, 17));
    }
}
