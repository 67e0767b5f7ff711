//! Where a workload plays: a throwaway cluster with its server, a scratch directory, and the end of both.
//!
//! Whatever happens, the server is stopped and the directory removed when the stage is dropped. A signal does not end
//! this program; it makes [`Stage::measure`] fail, which leads there.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;
use testdata::cluster::{Cluster, SUPERUSER, StopMode, succeed};
use testdata::os_user::ServerUser;
use testdata::servers::{Cache, Installation};
use testdata::{Error, Result};

use crate::measure::{self, Usage};
use crate::{NightlyArgs, cannot};

/// The server's settings. Durability of a throwaway cluster is not what is measured; no checkpoint or vacuum may come
/// between two runs by itself.
pub const CONF: [&str; 6] = [
    "fsync = off",
    "shared_buffers = 256MB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 1h",
    "autovacuum = off",
    "unix_socket_permissions = 0700",
];
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// Programs that not every installation has.
const TOOLS: [&str; 2] = ["pgbench", "pg_basebackup"];
const MB: f64 = 1e6;
/// Of all processors' time: less is nobody.
const QUIET: f64 = 0.1;
const QUIET_PERIOD: Duration = Duration::from_secs(2);

/// The cluster and the scratch directory.
pub struct Stage {
    cluster: Cluster,
    pgstrata: PathBuf,
    interrupted: Arc<AtomicBool>,
    cold: bool,
    patience: Duration,
    handle: File,
    /// Dropped last.
    work: TempDir,
}

impl Stage {
    /// Builds pgstrata and makes the cluster.
    ///
    /// # Errors
    /// When any of that fails.
    pub fn set(args: &NightlyArgs) -> Result<Self> {
        let interrupted = watch_signals()?;
        let built = build_pgstrata()?;
        let user = ServerUser::get()?;
        let mut work = match &args.dir {
            Some(dir) => work_in(dir, &user)?,
            None => user.scratch()?,
        };
        work.disable_cleanup(args.keep);
        let pgstrata = work.path().join("pgstrata");
        fs::copy(&built, &pgstrata).map_err(|e| cannot("copy", &built, e))?;
        let handle = File::open(work.path()).map_err(|e| cannot("open", work.path(), e))?;
        let cluster = make_cluster(args, &user, &work.path().join("data"))?;
        let patience = Duration::from_secs(args.patience);
        let stage = Self { cluster, pgstrata, interrupted, cold: args.cold, patience, handle, work };
        stage.load(args.scale)?;
        Ok(stage)
    }

    fn load(&self, scale: u32) -> Result<()> {
        say(&format!("pgbench -i -s {scale} on PostgreSQL {}", self.cluster.server().version));
        succeed(self.cluster.tool("pgbench")?.args(["-i", "-q", "-s", &scale.to_string()]))?;
        // Otherwise whoever reads a page first would change it: hint bits.
        self.cluster.sql_each("postgres", &["VACUUM (FREEZE, ANALYZE)", "CHECKPOINT"])?;
        let files = crate::read::files(self.data_dir())?;
        let bytes: u64 = files.iter().map(|(_, len)| len).sum();
        say(&format!("the cluster has {:.0} MB in {} files", bytes as f64 / MB, files.len()));
        Ok(())
    }

    /// The running cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Its data directory.
    pub fn data_dir(&self) -> &Path {
        self.cluster.data_dir()
    }

    /// The scratch directory.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// A command of pgstrata, as the server's user, with no configuration of this machine.
    pub fn pgstrata(&self, command: &str) -> Command {
        let mut pgstrata = self.cluster.user().command(&self.pgstrata);
        pgstrata.env("PGSTRATA_CONFIG", "/dev/null").arg(command);
        pgstrata
    }

    /// A program of this machine, as the server's user.
    pub fn program(&self, program: &str) -> Command {
        self.cluster.user().command(program)
    }

    /// Runs one command with the same start for all: a checkpoint behind it, nothing waiting to be written, caches as asked,
    /// and nobody else at work, if there is time to wait for that.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure(&self, command: &mut Command) -> Result<Usage> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Error::new("interrupted"));
        }
        self.cluster.sql("postgres", "CHECKPOINT")?;
        rustix::fs::syncfs(&self.handle).map_err(|e| cannot("sync", self.work(), e))?;
        self.wait_for_quiet()?;
        match self.cold {
            true => fs::write(DROP_CACHES, "1").map_err(|e| cannot("write", DROP_CACHES.as_ref(), e))?,
            // Even a machine with enough memory may have dropped what it thought cold.
            false => ["data", "repo", "restored"].iter().try_for_each(|name| self.warm(name))?,
        }
        let usage = measure::run(command, self.work(), self.cluster.pid());
        if self.interrupted.load(Ordering::Relaxed) { Err(Error::new("interrupted")) } else { usage }
    }

    fn warm(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        if path.is_dir() { crate::read::run(&path, 1) } else { Ok(()) }
    }

    fn wait_for_quiet(&self) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        while Instant::now() < deadline && !self.interrupted.load(Ordering::Relaxed) {
            if measure::busy(QUIET_PERIOD)? < QUIET {
                break;
            }
        }
        Ok(())
    }

    /// Removes a directory of the scratch directory, if it is there.
    ///
    /// # Errors
    /// When it stays.
    pub fn clear(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(cannot("remove", &path, e)),
            _ => Ok(()),
        }
    }

    /// Stops the server and removes everything, unless it is to be kept; says where it is then.
    ///
    /// # Errors
    /// When the server does not stop.
    pub fn close(mut self, keep: bool) -> Result<()> {
        self.cluster.stop(StopMode::Fast)?;
        if keep {
            say(&format!("kept in {}", self.work().display()));
        }
        Ok(())
    }
}

/// Progress, for whoever waits.
pub fn say(text: &str) {
    eprintln!("bench: {text}");
}

/// Whether caches can be dropped; asked before anything is made.
///
/// # Errors
/// When they cannot.
pub fn must_drop_caches() -> Result<()> {
    let writable = File::options().write(true).open(DROP_CACHES);
    writable
        .map(drop)
        .map_err(|e| Error::new(format!("--cold cannot drop the kernel's caches here ({DROP_CACHES}: {e})")))
}

fn watch_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|e| Error::new(format!("cannot watch for signals: {e}")))?;
    }
    Ok(interrupted)
}

/// Builds the release binary in the profile's directory that this program is in, and returns its path.
///
/// # Errors
/// When this program is not optimised itself, or pgstrata does not build.
pub fn build_pgstrata() -> Result<PathBuf> {
    let us = std::env::current_exe().map_err(|e| Error::new(format!("cannot tell where this program is: {e}")))?;
    let directory = us.parent().filter(|directory| directory.ends_with("release"));
    let directory =
        directory.ok_or_else(|| Error::new("measuring needs optimised code: run it by cargo run --release"))?;
    let target = directory.parent().unwrap_or(directory);
    say("building pgstrata");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--quiet", "-p", "pgstrata", "--target-dir"]).arg(target);
    succeed(cargo.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    Ok(directory.join("pgstrata"))
}

/// A new directory of the server's user inside `dir`.
fn work_in(dir: &Path, user: &ServerUser) -> Result<TempDir> {
    let dir = dir.canonicalize().map_err(|e| cannot("resolve", dir, e))?;
    if !user.can_enter(&dir) {
        return Err(cannot("work in", &dir, "the user who runs the servers may not enter it"));
    }
    let mut builder = tempfile::Builder::new();
    let work = builder.prefix("pgstrata-bench-").permissions(fs::Permissions::from_mode(0o700)).tempdir_in(&dir);
    let work = work.map_err(|e| cannot("make a directory in", &dir, e))?;
    user.own(work.path())?;
    Ok(work)
}

/// A started cluster with data checksums in `data_dir`.
fn make_cluster(args: &NightlyArgs, user: &ServerUser, data_dir: &Path) -> Result<Cluster> {
    let cache = Cache::for_tests()?;
    let complete = |found: &Installation| TOOLS.iter().all(|name| found.has(name));
    // A directory with links to the server's programs only may hide the whole installation, whose tools are of its version.
    let mut local = Installation::find_local().into_iter();
    let server = match local.find(|found| found.major == args.major && complete(found)) {
        Some(found) => Arc::new(found),
        None => Arc::new(Installation::for_major(args.major, &cache)?),
    };
    let tools = match complete(&server) {
        true => Arc::clone(&server),
        false => Arc::new(Installation::fetch_wheel(&cache)?),
    };
    let mut initdb = server.command("initdb", user);
    initdb.args(["-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "--data-checksums", "-D"]);
    succeed(initdb.arg(data_dir))?;
    let mut cluster = Cluster::adopt(&server, &tools, data_dir)?;
    cluster.add_conf(&CONF.map(str::to_owned))?;
    cluster.start()?;
    Ok(cluster)
}
