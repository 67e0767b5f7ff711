//! wal-rus, WAL-G's port to Rust: reads the data directory itself, packs it by as many workers as there are cores, zstd 1; its deltas
//! are of the blocks that WAL summaries name (17 and later). It syncs nothing, so a sync follows.
//!
//! The name of its delta holds those of all before it, and after seven of them is too long for a file. So in a history of nights each
//! delta is against the full backup.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testdata::Result;

use super::{Action, Found, Set, Tool, and_sync, fresh, no_server};
use crate::compare::ToolArgs;
use crate::compare::site::Site;

const HINT: &str = "cargo install wal-rus --root DIR, and --wal-rus DIR/bin/walrus";

struct WalRus {
    program: PathBuf,
    version: String,
    repo: PathBuf,
    jobs: u32,
    deltas: bool,
    origin: &'static str,
}

pub(super) fn find(args: &ToolArgs, site: &Site, set: Set) -> Found {
    if site.server().is_none() {
        return Err("it needs a server".to_owned());
    }
    let program = super::program(args.peers.wal_rus.as_ref(), "walrus", HINT)?;
    let version = super::version_of(site.scratch().user(), &program, "--version")?;
    let (repo, jobs) = (set.home(site, "wal-rus"), args.jobs());
    let origin = if set == Set::Nights { "LATEST_FULL" } else { "LATEST" };
    Ok(Box::new(WalRus { program, version, repo, jobs, deltas: site.major() >= 17, origin }))
}

impl WalRus {
    fn base(&self, site: &Site, command: &str) -> Command {
        let mut walrus = site.scratch().program_at(&self.program);
        walrus.arg(command).env("WALG_FILE_PREFIX", &self.repo);
        walrus.envs([("WALG_COMPRESSION_METHOD", "zstd"), ("WALG_COMPRESSION_LEVEL", "1")]);
        walrus.env("WALG_DELTA_MAX_STEPS", "60").env("WALG_DELTA_ORIGIN", self.origin).env("NO_COLOR", "1");
        walrus.env("WALG_UPLOAD_CONCURRENCY", self.jobs.to_string());
        walrus.env("WALG_DOWNLOAD_CONCURRENCY", self.jobs.to_string());
        walrus
    }
}

impl Tool for WalRus {
    fn name(&self) -> &'static str {
        "wal-rus"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn settings(&self) -> String {
        let of_nights = "in the history against the full backup";
        format!("local files, zstd level 1, {} workers, deltas from WAL summaries, {of_nights}; then sync", self.jobs)
    }

    fn repo(&self) -> &Path {
        &self.repo
    }

    fn prepare(&mut self, site: &Site) -> Result<()> {
        fresh(site, &self.repo)
    }

    fn ways(&self, action: Action) -> Vec<&'static str> {
        match action {
            Action::Merge | Action::Verify => Vec::new(),
            Action::Incremental | Action::RestoreLast if !self.deltas => Vec::new(),
            _ => vec![""],
        }
    }

    fn command(&mut self, site: &Site, action: Action, _: &str, target: &Path) -> Result<Command> {
        if action.restores() {
            let mut fetch = self.base(site, "backup-fetch");
            fetch.arg(target).arg("LATEST");
            return Ok(and_sync(site, &fetch, &site.scratch().path("restored")));
        }
        let server = site.server().ok_or_else(|| no_server(self.name()))?;
        let mut push = self.base(site, "backup-push");
        push.arg(site.data_dir()).arg("--fast").envs(server.libpq_env());
        push.arg(if action == Action::Full { "--full" } else { "--delta-from-wal-summaries" });
        Ok(and_sync(site, &push, &self.repo))
    }

    fn done(&mut self, _: Action, _: &str, _: &Value) -> Result<()> {
        Ok(())
    }

    fn needs_archive(&self) -> bool {
        true
    }
}
