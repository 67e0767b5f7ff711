//! Throwaway clusters: made by `initdb`, or adopted from a directory that a restore wrote.
//!
//! A server listens on a Unix socket in its own scratch directory, so that servers of parallel tests cannot
//! meet; on a TCP port only if asked to. Port and socket are given on its command line and never written into
//! its directory: a restored copy inherits nothing of them. It runs as [`ServerUser`], it is the child of this
//! process, and it is stopped by its process id, on drop at the latest.
//!
//! Nothing here sleeps for a fixed time and hopes: every wait polls for its condition, and has a deadline after
//! which the error carries the end of the server's log.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls, SimpleQueryMessage};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::os_user::ServerUser;
use crate::servers::Installation;
use crate::{Error, Result};

/// How long a server may take to start, recover or stop.
const DEADLINE: Duration = Duration::from_secs(180);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How much of the log an error carries.
const LOG_TAIL_LEN: usize = 4000;
/// The superuser of every cluster made here.
pub const SUPERUSER: &str = "postgres";

/// How a server is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Once all sessions have ended by themselves.
    Smart,
    /// Sessions are ended; then a shutdown checkpoint.
    Fast,
    /// At once, like a crash.
    Immediate,
}

impl StopMode {
    fn signal(self) -> Signal {
        match self {
            StopMode::Smart => Signal::TERM,
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        }
    }
}

/// What a new cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Whether pages have checksums.
    pub checksums: bool,
    /// The size of a WAL segment in MB, if not 16.
    pub wal_segment_mb: Option<u32>,
    /// Whether the directory's group may read it (mode 0750).
    pub group_access: bool,
    /// Whether it also listens on a free port of 127.0.0.1.
    pub tcp: bool,
    /// Lines for `postgresql.conf`.
    pub conf: Vec<String>,
}

impl Default for ClusterOptions {
    /// Checksums, and settings that make a small server quick.
    fn default() -> Self {
        let conf = ["fsync = off", "shared_buffers = 32MB", "max_connections = 30", "max_prepared_transactions = 4"];
        Self {
            checksums: true,
            wal_segment_mb: None,
            group_access: false,
            tcp: false,
            conf: conf.map(str::to_owned).into(),
        }
    }
}

impl ClusterOptions {
    /// Adds one line to `postgresql.conf`.
    #[must_use]
    pub fn conf(mut self, line: &str) -> Self {
        self.conf.push(line.to_owned());
        self
    }
}

/// A server, running or stopped, and its directory.
pub struct Cluster {
    server: Arc<Installation>,
    tools: Arc<Installation>,
    user: ServerUser,
    data_dir: PathBuf,
    port: u16,
    tcp: bool,
    process: Option<Child>,
    /// Holds the socket, the log, and the data directory if it was made here. Dropped last.
    scratch: TempDir,
}

impl Cluster {
    /// Makes a cluster with `server` and starts it. Client programs that `server` lacks are taken from `tools`.
    ///
    /// # Errors
    ///
    /// When `initdb` or the server fails; with what it said.
    pub fn create(server: &Arc<Installation>, tools: &Arc<Installation>, options: &ClusterOptions) -> Result<Self> {
        let mut cluster = Self::lay(server, tools, None, options.tcp)?;
        let mut initdb = cluster.server.command("initdb", &cluster.user);
        initdb.arg("-D").arg(&cluster.data_dir).args(["-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-locale"]);
        initdb.arg("--no-sync");
        match options.checksums {
            true => initdb.arg("--data-checksums"),
            false if server.major >= 18 => initdb.arg("--no-data-checksums"),
            false => &mut initdb,
        };
        if let Some(mb) = options.wal_segment_mb {
            initdb.arg(format!("--wal-segsize={mb}"));
        }
        if options.group_access {
            initdb.arg("--allow-group-access");
        }
        succeed(&mut initdb)?;
        cluster.add_conf(&options.conf)?;
        cluster.start()?;
        Ok(cluster)
    }

    /// A server on the existing directory `data_dir`, which belongs to the server's user; not started yet.
    ///
    /// # Errors
    ///
    /// When no scratch directory can be made.
    pub fn adopt(server: &Arc<Installation>, tools: &Arc<Installation>, data_dir: &Path) -> Result<Self> {
        Self::lay(server, tools, Some(data_dir.to_owned()), false)
    }

    /// A started standby of this running cluster, by streaming, in a directory of its own.
    ///
    /// # Errors
    ///
    /// When `pg_basebackup` or the server fails; with what it said.
    pub fn make_standby(&self) -> Result<Self> {
        let mut standby = Self::lay(&self.server, &self.tools, None, false)?;
        let mut basebackup = self.tool("pg_basebackup")?;
        basebackup.arg("-D").arg(&standby.data_dir).args(["--checkpoint=fast", "--no-sync"]);
        succeed(&mut basebackup)?;
        // Not by --write-recovery-conf: a newer pg_basebackup writes options that an older server does not know.
        let conninfo = format!("host={} port={} user={SUPERUSER}", self.socket_dir().display(), self.port);
        standby.add_conf(&[format!("primary_conninfo = '{conninfo}'")])?;
        let signal = standby.data_dir.join("standby.signal");
        fs::write(&signal, "").map_err(|e| Error::io("write", &signal, e))?;
        standby.user.own(&signal)?;
        standby.start()?;
        Ok(standby)
    }

    fn lay(
        server: &Arc<Installation>,
        tools: &Arc<Installation>,
        data_dir: Option<PathBuf>,
        tcp: bool,
    ) -> Result<Self> {
        let user = ServerUser::get()?;
        let scratch = user.scratch()?;
        user.make_dir(scratch.path(), "socket")?;
        Ok(Self {
            server: Arc::clone(server),
            tools: Arc::clone(tools),
            user,
            data_dir: data_dir.unwrap_or_else(|| scratch.path().join("data")),
            port: 5432,
            tcp,
            process: None,
            scratch,
        })
    }

    /// Appends `lines` to `postgresql.conf`; they hold from the next start or reload.
    pub fn add_conf(&self, lines: &[String]) -> Result<()> {
        let path = self.data_dir.join("postgresql.conf");
        let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        fs::write(&path, format!("{text}\n{}\n", lines.join("\n"))).map_err(|e| Error::io("write", &path, e))
    }

    /// Starts the server and waits until it answers and, unless it is a standby, has ended recovery.
    ///
    /// # Errors
    ///
    /// When it gives up or the deadline passes; with the end of its log.
    pub fn start(&mut self) -> Result<()> {
        assert!(self.process.is_none(), "the server of {} runs already", self.data_dir.display());
        if self.tcp {
            self.port = free_port()?;
        }
        let log = fs::File::options().create(true).append(true).open(self.log_path());
        let log = log.map_err(|e| Error::io("write", &self.log_path(), e))?;
        let mut postgres = self.server.command("postgres", &self.user);
        postgres.arg("-D").arg(&self.data_dir);
        for setting in [
            format!("port={}", self.port),
            format!("listen_addresses={}", if self.tcp { "127.0.0.1" } else { "" }),
            format!("unix_socket_directories={}", self.socket_dir().display()),
            "logging_collector=off".to_owned(),
        ] {
            postgres.arg("-c").arg(setting);
        }
        postgres.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.process = Some(postgres.spawn().map_err(|e| Error::io("run postgres of", &self.server.bin_dir, e))?);

        self.wait_for("the server to answer", |cluster| cluster.connect("postgres").is_ok())?;
        if !self.is_standby() {
            self.wait_for("recovery to end", |cluster| {
                cluster.query_value("postgres", "SELECT pg_is_in_recovery()").is_ok_and(|value| value == "f")
            })?;
        }
        Ok(())
    }

    /// Polls until `condition` holds.
    ///
    /// # Errors
    ///
    /// When the server ends before that, or the deadline passes; with the end of its log.
    pub fn wait_for(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            let exited = self.process.as_mut().and_then(|process| process.try_wait().ok().flatten());
            if let Some(status) = exited {
                self.process = None;
                return Err(self.failure(&format!("the server ended ({status}) while waiting for {what}")));
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("waited for {what} in vain")));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn failure(&self, what: &str) -> Error {
        let log = self.log();
        let tail_from = (log.len().saturating_sub(LOG_TAIL_LEN)..=log.len()).find(|at| log.is_char_boundary(*at));
        Error::new(format!(
            "PostgreSQL {} on {}: {what}; its log ends:\n{}",
            self.server.version,
            self.data_dir.display(),
            &log[tail_from.unwrap_or(0)..]
        ))
    }

    /// Stops the server and waits for its end. It is no error if it does not run.
    ///
    /// # Errors
    ///
    /// When it does not end in time; it is killed then.
    pub fn stop(&mut self, mode: StopMode) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        signal(&process, mode.signal());
        let deadline = Instant::now() + DEADLINE;
        while let Ok(None) = process.try_wait() {
            if Instant::now() > deadline {
                signal(&process, Signal::KILL);
                let _ = process.wait();
                return Err(self.failure("the server did not stop"));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Stops the server in `mode` and starts it again.
    ///
    /// # Errors
    ///
    /// Those of [`Cluster::stop`] and [`Cluster::start`].
    pub fn restart(&mut self, mode: StopMode) -> Result<()> {
        self.stop(mode)?;
        self.start()
    }

    /// Makes a standby a primary and waits until it is one.
    ///
    /// # Errors
    ///
    /// When it is none, or is not promoted in time.
    pub fn promote(&mut self) -> Result<()> {
        self.sql("postgres", "SELECT pg_promote(true, 120)")?;
        self.wait_for("promotion", |cluster| {
            cluster.query_value("postgres", "SELECT pg_is_in_recovery()").is_ok_and(|value| value == "f")
        })
    }

    /// A session in `database`, over the socket.
    ///
    /// # Errors
    ///
    /// When the server does not accept it.
    pub fn connect(&self, database: &str) -> Result<Client> {
        let mut config = postgres::Config::new();
        config.host_path(self.socket_dir()).port(self.port).user(SUPERUSER).dbname(database);
        Ok(config.connect(NoTls)?)
    }

    /// Runs `text`, one or more statements, in a session of its own.
    ///
    /// Several statements are one transaction: what cannot run inside one (`VACUUM`) goes to
    /// [`Cluster::sql_each`].
    ///
    /// # Errors
    ///
    /// PostgreSQL's, with the statement.
    pub fn sql(&self, database: &str, text: &str) -> Result<()> {
        self.sql_each(database, &[text])
    }

    /// Runs each of `statements` by itself, all in one session.
    ///
    /// # Errors
    ///
    /// PostgreSQL's, with the statement.
    pub fn sql_each(&self, database: &str, statements: &[&str]) -> Result<()> {
        let mut client = self.connect(database)?;
        for text in statements {
            client.batch_execute(text).map_err(|e| Error::new(format!("{}, running {text}", Error::from(e))))?;
        }
        Ok(())
    }

    /// The rows that `text` returns, as text; `None` is null.
    ///
    /// # Errors
    ///
    /// PostgreSQL's, with the statement.
    pub fn query_strings(&self, database: &str, text: &str) -> Result<Vec<Vec<Option<String>>>> {
        let messages = self.connect(database)?.simple_query(text);
        let messages = messages.map_err(|e| Error::new(format!("{}, running {text}", Error::from(e))))?;
        let row = |message: SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(row).collect())
    }

    /// The first column of the first row that `text` returns.
    ///
    /// # Errors
    ///
    /// PostgreSQL's; or there is no row, or it is null.
    pub fn query_value(&self, database: &str, text: &str) -> Result<String> {
        let rows = self.query_strings(database, text)?;
        let value = rows.into_iter().next().and_then(|row| row.into_iter().next()?);
        value.ok_or_else(|| Error::new(format!("{text} returned nothing")))
    }

    /// Whether `CREATE EXTENSION name` would work.
    pub fn has_extension(&self, name: &str) -> bool {
        let query = format!("SELECT count(*) FROM pg_available_extensions WHERE name = '{name}'");
        self.query_value("postgres", &query).is_ok_and(|count| count == "1")
    }

    /// The names of its databases that accept connections.
    ///
    /// # Errors
    ///
    /// PostgreSQL's.
    pub fn databases(&self) -> Result<Vec<String>> {
        let rows = self.query_strings("postgres", "SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1")?;
        Ok(rows.into_iter().filter_map(|row| row.into_iter().next()?).collect())
    }

    /// A command that runs client program `name` against this server, as the server's user.
    ///
    /// # Errors
    ///
    /// When neither installation has it.
    pub fn tool(&self, name: &str) -> Result<Command> {
        let installation = [&self.server, &self.tools].into_iter().find(|installation| installation.has(name));
        let installation = installation.ok_or_else(|| Error::new(format!("there is no {name} here")))?;
        let mut command = installation.command(name, &self.user);
        command.envs(self.libpq_env());
        Ok(command)
    }

    /// libpq's environment variables for this server.
    pub fn libpq_env(&self) -> [(&'static str, String); 4] {
        [
            ("PGHOST", self.socket_dir().display().to_string()),
            ("PGPORT", self.port.to_string()),
            ("PGUSER", SUPERUSER.to_owned()),
            ("PGDATABASE", "postgres".to_owned()),
        ]
    }

    /// A conninfo string for this server.
    pub fn conninfo(&self) -> String {
        let (socket, port) = (self.socket_dir(), self.port);
        format!("host={} port={port} user={SUPERUSER} dbname=postgres", socket.display())
    }

    /// Whether a signal file keeps it from ending recovery.
    pub fn is_standby(&self) -> bool {
        self.data_dir.join("standby.signal").exists()
    }

    /// Its data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// A directory for whatever belongs beside it, removed with it.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The directory of its socket.
    pub fn socket_dir(&self) -> PathBuf {
        self.scratch.path().join("socket")
    }

    /// The port in its socket's name and, if it listens there, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The installation that it runs.
    pub fn server(&self) -> &Arc<Installation> {
        &self.server
    }

    /// The installation with the client programs.
    pub fn tools(&self) -> &Arc<Installation> {
        &self.tools
    }

    /// The user that it runs as.
    pub fn user(&self) -> &ServerUser {
        &self.user
    }

    /// The postmaster's process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// What the server logged so far.
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("server.log")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A failure to stop has no one to go to here; the server was killed then.
        let _ = self.stop(StopMode::Immediate);
    }
}

fn signal(process: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(process.id()).ok().and_then(Pid::from_raw) {
        // It fails only if the process has ended, which is what was wanted.
        let _ = kill_process(pid, signal);
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|e| Error::new(format!("no free port on 127.0.0.1: {e}")))
}

/// Runs `command` and returns its output if it succeeded.
///
/// # Errors
///
/// With all that it printed, if it failed.
pub fn succeed(command: &mut Command) -> Result<Output> {
    let output =
        command.stdin(Stdio::null()).output().map_err(|e| Error::new(format!("cannot run {command:?}: {e}")))?;
    if !output.status.success() {
        let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        return Err(Error::new(format!("{command:?} failed ({}):\n{}{}", output.status, said[0], said[1])));
    }
    Ok(output)
}
