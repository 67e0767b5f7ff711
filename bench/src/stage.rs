//! Where a workload with a server plays: a throwaway cluster of pgbench, its server, and the scratch directory that both are in.
//!
//! Whatever happens, the server is stopped and the directory removed when the stage is dropped.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use testdata::Result;
use testdata::cluster::{Cluster, SUPERUSER, StopMode, succeed};
use testdata::os_user::ServerUser;
use testdata::servers::{Cache, Installation};

use crate::measure::Usage;
use crate::read;
use crate::scratch::{Scratch, Start, say};

/// The server's settings. Durability of a throwaway cluster is not what is measured; no checkpoint or vacuum may come
/// between two runs by itself.
const CONF: [&str; 6] = [
    "fsync = off",
    "shared_buffers = 256MB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 1h",
    "autovacuum = off",
    "unix_socket_permissions = 0700",
];
const BLOCK_LEN: u64 = 8192;
const MB: f64 = 1e6;

/// What cluster a workload plays on.
pub struct Scene {
    /// pgbench's scale.
    pub scale: u32,
    /// PostgreSQL's major version.
    pub major: u32,
    /// Settings of the server besides the usual ones; the later one of two holds.
    pub conf: &'static [&'static str],
    /// Client programs that the workload needs; not every installation has them.
    pub tools: &'static [&'static str],
}

/// The cluster and the scratch directory.
pub struct Stage {
    cluster: Cluster,
    conf: Vec<String>,
    /// Dropped last.
    scratch: Scratch,
}

impl Stage {
    /// Makes the cluster.
    ///
    /// # Errors
    /// When that fails.
    pub fn set(scratch: Scratch, scene: &Scene) -> Result<Self> {
        let conf: Vec<String> = CONF.iter().chain(scene.conf).map(|&line| line.to_owned()).collect();
        let cluster = make_cluster(scene, &conf, scratch.user(), &scratch.path("data"))?;
        let stage = Self { cluster, conf, scratch };
        stage.load(scene.scale)?;
        Ok(stage)
    }

    /// Freezes everything, so that nobody who reads a page changes it, and says what there is.
    ///
    /// # Errors
    /// PostgreSQL's.
    pub fn settle(&self) -> Result<()> {
        self.cluster.sql_each("postgres", &["VACUUM (FREEZE, ANALYZE)", "CHECKPOINT"])?;
        let (bytes, count) = (self.bytes()?, read::files(self.data_dir())?.len());
        say(&format!("the cluster has {:.0} MB in {count} files", bytes as f64 / MB));
        Ok(())
    }

    fn load(&self, scale: u32) -> Result<()> {
        say(&format!("pgbench -i -s {scale} on PostgreSQL {}", self.cluster.server().version));
        succeed(self.cluster.tool("pgbench")?.args(["-i", "-q", "-s", &scale.to_string()]))?;
        // Otherwise whoever reads a page first would change it: hint bits.
        self.settle()
    }

    /// The running cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Its data directory.
    pub fn data_dir(&self) -> &Path {
        self.cluster.data_dir()
    }

    /// The bytes of all its files but the WAL.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        Ok(read::files(self.data_dir())?.iter().map(|(_, len)| len).sum())
    }

    /// The blocks of all its files but the WAL.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn blocks(&self) -> Result<u64> {
        Ok(read::files(self.data_dir())?.iter().map(|(_, len)| len / BLOCK_LEN).sum())
    }

    /// The scratch directory.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The settings of the server, for people.
    pub fn settings(&self) -> String {
        self.conf.join(", ")
    }

    /// Runs one command as [`Scratch::measure`] does, with a checkpoint behind it.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure(&self, command: &mut Command, memory_len: u64) -> Result<Usage> {
        self.cluster.sql("postgres", "CHECKPOINT")?;
        self.scratch.measure(command, self.cluster.pid(), memory_len)
    }

    /// Runs one command as [`Scratch::measure_from`] does, with a checkpoint behind it.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure_from(&self, command: &mut Command, start: &Start) -> Result<Usage> {
        self.cluster.sql("postgres", "CHECKPOINT")?;
        self.scratch.measure_from(command, self.cluster.pid(), start)
    }

    /// Stops the server and removes everything, unless it is to be kept; says where it is then.
    ///
    /// # Errors
    /// When the server does not stop.
    pub fn close(mut self, keep: bool) -> Result<()> {
        self.cluster.stop(StopMode::Fast)?;
        let Self { cluster, scratch, .. } = self;
        drop(cluster);
        scratch.close(keep);
        Ok(())
    }
}

/// A started cluster with data checksums in `data_dir`.
fn make_cluster(scene: &Scene, conf: &[String], user: &ServerUser, data_dir: &Path) -> Result<Cluster> {
    let cache = Cache::for_tests()?;
    let complete = |found: &Installation| scene.tools.iter().all(|name| found.has(name));
    // A directory with links to the server's programs only may hide the whole installation, whose tools are of its version.
    let mut local = Installation::find_local().into_iter();
    let server = match local.find(|found| found.major == scene.major && complete(found)) {
        Some(found) => Arc::new(found),
        None => Arc::new(Installation::for_major(scene.major, &cache)?),
    };
    let tools = match complete(&server) {
        true => Arc::clone(&server),
        false => Arc::new(Installation::fetch_wheel(&cache)?),
    };
    let mut initdb = server.command("initdb", user);
    initdb.args(["-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "--data-checksums", "-D"]);
    succeed(initdb.arg(data_dir))?;
    let mut cluster = Cluster::adopt(&server, &tools, data_dir)?;
    cluster.add_conf(conf)?;
    cluster.start()?;
    Ok(cluster)
}
