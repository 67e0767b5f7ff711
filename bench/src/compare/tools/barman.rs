//! Barman: from PostgreSQL 17 on by `pg_basebackup` and its incrementals, which it combines at a restore; before that by a local rsync
//! of as many jobs as there are cores, whose incrementals link the files that are the same.
//!
//! It takes no backup without WAL that arrives, so a receiver runs beside the server as long as backups are taken; what that writes is
//! not counted. It does not sync what rsync wrote, so a sync follows.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testdata::cluster::{Cluster, succeed};
use testdata::{Error, Result};

use super::{Action, Found, Set, Tool, and_sync, fresh, no_server};
use crate::cannot;
use crate::compare::ToolArgs;
use crate::compare::site::Site;

const HINT: &str = "make a virtual environment, pip install barman psycopg2-binary there, and --barman DIR/bin/barman";
const SERVER: &str = "bench";
/// How long a receiver may take to come or to go, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

struct Barman {
    program: PathBuf,
    version: String,
    home: PathBuf,
    base: PathBuf,
    jobs: u32,
    by_postgres: bool,
    set: Set,
    receiver: Option<Receiver>,
}

pub(super) fn find(args: &ToolArgs, site: &Site, set: Set) -> Found {
    if site.server().is_none() {
        return Err("it needs a server".to_owned());
    }
    let program = super::program(args.peers.barman.as_ref(), "barman", HINT)?;
    let version = super::version_of(site.scratch().user(), &program, "--version")?;
    let home = set.home(site, "barman");
    let (base, jobs, by_postgres) = (home.join("bench/base"), args.jobs(), site.major() >= 17);
    Ok(Box::new(Barman { program, version, home, base, jobs, by_postgres, set, receiver: None }))
}

impl Barman {
    fn config(&self, server: &Cluster) -> Result<String> {
        let (home, socket, port) = (self.home.display(), server.socket_dir(), server.port());
        let conninfo = format!("host={} port={port} user=postgres dbname=postgres", socket.display());
        let basebackup = server.tool("pg_basebackup")?;
        let programs = Path::new(basebackup.get_program()).parent().unwrap_or(Path::new("/")).to_owned();
        let method = if self.by_postgres { "postgres" } else { "local-rsync\nreuse_backup = link" };
        Ok(format!(
            "[barman]\nbarman_home = {home}\nbarman_user = {}\nlog_file = {home}/barman.log\nlog_level = WARNING\n\n\
             [{SERVER}]\ndescription = bench\nconninfo = {conninfo}\nstreaming_conninfo = {conninfo}\n\
             backup_method = {method}\nparallel_jobs = {}\narchiver = off\nstreaming_archiver = on\n\
             slot_name = {}\ncreate_slot = auto\n\
             backup_options = concurrent_backup\npath_prefix = {}\nlocal_staging_path = {home}/staging\n",
            user_name()?,
            self.jobs,
            self.slot(),
            programs.display(),
        ))
    }

    fn slot(&self) -> &'static str {
        if self.set == Set::Nights { "barman_nights" } else { "barman_rounds" }
    }

    /// Ends the receiver, and lets the server forget what it kept for it.
    fn end_receiving(&mut self, server: &Cluster) -> Result<()> {
        self.receiver = None;
        self.wait_until_active(server, false)?;
        let slots = format!("FROM pg_replication_slots WHERE slot_name = '{}'", self.slot());
        server.sql("postgres", &format!("SELECT pg_drop_replication_slot(slot_name) {slots}"))
    }

    fn wait_until_active(&self, server: &Cluster, active: bool) -> Result<()> {
        let count = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}' AND active", self.slot());
        let deadline = Instant::now() + PATIENCE;
        while (server.query_value("postgres", &count)? == "1") != active {
            if Instant::now() > deadline {
                return Err(Error::new("Barman's receiver of WAL does not come or go"));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn base(&self, site: &Site, command: &str) -> Command {
        let mut barman = site.scratch().program_at(&self.program);
        barman.arg("-q").arg("-c").arg(self.home.join("barman.conf")).arg(command).env("HOME", &self.home);
        barman
    }

    /// Starts the receiver, and waits for the first segment.
    fn receive(&mut self, site: &Site, server: &Cluster) -> Result<()> {
        let mut receive = self.base(site, "receive-wal");
        receive.arg(SERVER).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = receive.spawn().map_err(|e| cannot("run", &self.program, e))?;
        self.receiver = Some(Receiver(child));
        self.wait_until_active(server, true)?;
        succeed(self.base(site, "switch-wal").args(["--force", "--archive", SERVER])).map(drop)
    }
}

impl Tool for Barman {
    fn name(&self) -> &'static str {
        "barman"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn settings(&self) -> String {
        let method = if self.by_postgres { "postgres, --incremental" } else { "local-rsync, --reuse-backup link" };
        format!("backup_method {method}, {} jobs, immediate checkpoint; then sync", self.jobs)
    }

    fn repo(&self) -> &Path {
        &self.base
    }

    fn prepare(&mut self, site: &Site) -> Result<()> {
        let server = site.server().ok_or_else(|| no_server(self.name()))?;
        self.end_receiving(server)?;
        fresh(site, &self.home)?;
        fresh(site, &self.base)?;
        fresh(site, &self.home.join("staging"))?;
        let path = self.home.join("barman.conf");
        std::fs::write(&path, self.config(server)?).map_err(|e| cannot("write", &path, e))?;
        site.scratch().user().own(&path)?;
        self.receive(site, server)
    }

    fn ways(&self, action: Action) -> Vec<&'static str> {
        if action == Action::Merge || action == Action::Verify { Vec::new() } else { vec![""] }
    }

    fn command(&mut self, site: &Site, action: Action, _: &str, target: &Path) -> Result<Command> {
        if action.restores() {
            if let (Set::Nights, Some(server)) = (self.set, site.server()) {
                self.end_receiving(server)?;
            }
            let mut restore = self.base(site, "restore");
            // Otherwise it copies all WAL that came after the backup, too.
            restore.args(["--get-wal", "--jobs", &self.jobs.to_string(), SERVER, "latest"]).arg(target);
            return Ok(and_sync(site, &restore, &site.scratch().path("restored")));
        }
        let mut backup = self.base(site, "backup");
        backup.arg("--immediate-checkpoint");
        match (action, self.by_postgres) {
            (Action::Incremental, true) => backup.args(["--incremental", "latest"]),
            (Action::Incremental, false) => backup.arg("--reuse-backup=link"),
            (_, true) => &mut backup,
            (_, false) => backup.arg("--reuse-backup=off"),
        };
        backup.arg(SERVER);
        Ok(and_sync(site, &backup, &self.base))
    }

    fn done(&mut self, _: Action, _: &str, _: &Value) -> Result<()> {
        Ok(())
    }

    fn needs_archive(&self) -> bool {
        true
    }
}

/// A process that receives WAL until this is dropped.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // It fails only if the process has ended, which is what was wanted.
            let _ = kill_process(pid, Signal::INT);
        }
        let _ = self.0.wait();
    }
}

/// Who Barman is to run as: the user who runs the servers.
fn user_name() -> Result<String> {
    let us = if rustix::process::geteuid().is_root() { None } else { std::env::var("USER").ok() };
    let passwd = std::fs::read_to_string("/etc/passwd").map_err(|e| cannot("read", "/etc/passwd".as_ref(), e))?;
    let has = |name: &&str| passwd.lines().any(|line| line.starts_with(&format!("{name}:")));
    let servers = ["postgres", "nobody"].into_iter().find(has).map(str::to_owned);
    us.or(servers).ok_or_else(|| Error::new("Barman wants to know the name of the servers' user, who has none"))
}
