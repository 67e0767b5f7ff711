//! Running pgstrata against real servers, and judging what it restores.
//!
//! [`Lab`] is one test's room: a scratch directory with a repository, reachable by the servers' user, as whom
//! pgstrata runs when we are root. [`Lab::restore`] and [`judge`] are the oracle: a restored directory is judged before
//! it is started, after it has recovered, and after it has been stopped again.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use testdata::cluster::{Cluster, ClusterOptions, StopMode, succeed};
use testdata::load;
use testdata::os_user::ServerUser;
use testdata::servers::{Cache, Installation};
use testdata::synthetic::page::check_directory;

/// Makes one test of `$test(major)` for each major named.
macro_rules! for_majors {
    ($test:ident: $($name:ident = $major:literal),+ $(,)?) => {$(
        #[test]
        fn $name() {
            if let Some(lab) = $crate::support::Lab::new($major) {
                $test(&lab);
            }
        }
    )+};
}
pub(crate) use for_majors;

/// A server to test against, a scratch directory, and a repository's path in it.
pub struct Lab {
    pub server: Arc<Installation>,
    pub tools: Arc<Installation>,
    pub user: ServerUser,
    scratch: TempDir,
}

impl Lab {
    /// A lab with a server of `major`; `None`, said aloud, where that cannot be had.
    pub fn new(major: u32) -> Option<Self> {
        let cache = Cache::for_tests().unwrap();
        match Installation::with_tools(major, &cache) {
            Ok((server, tools)) => {
                let user = ServerUser::get().unwrap();
                let scratch = user.scratch().unwrap();
                Some(Self { server, tools, user, scratch })
            }
            Err(reason) => {
                eprintln!("skipped: no PostgreSQL {major} ({reason})");
                None
            }
        }
    }

    /// A running cluster with `options`.
    pub fn cluster(&self, options: &ClusterOptions) -> Cluster {
        Cluster::create(&self.server, &self.tools, options).unwrap()
    }

    /// The path `name` in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A new directory `name` in the scratch directory.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.user.make_dir(self.scratch.path(), name).unwrap()
    }

    /// The lab's repository.
    pub fn repo(&self) -> PathBuf {
        self.path("repo")
    }

    /// Runs pgstrata with `args`, as the servers' user.
    pub fn pgstrata<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        self.pgstrata_in(args, &[])
    }

    /// Runs pgstrata with `args` and environment variables.
    pub fn pgstrata_in<S: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
        environment: &[(&str, String)],
    ) -> Run {
        let mut command = self.user.command(reachable_binary(&self.user));
        command.args(args).envs(environment.iter().cloned()).stdin(Stdio::null());
        let output = command.output().unwrap();
        Run::of(&format!("{command:?}"), output)
    }

    /// The arguments of a backup of `cluster` into the lab's repository.
    pub fn backup_args(&self, cluster: &Cluster) -> Vec<OsString> {
        let mut args: Vec<OsString> = ["backup", "--init", "--json", "--repo"].map(OsString::from).into();
        args.extend([self.repo().into(), "-D".into(), cluster.data_dir().into()]);
        args.extend(["-d".into(), cluster.conninfo().into()]);
        args
    }

    /// Backs up running `cluster` and returns what pgstrata reports.
    pub fn backup(&self, cluster: &Cluster, more: &[&str]) -> Value {
        let mut args = self.backup_args(cluster);
        args.extend(more.iter().map(OsString::from));
        self.pgstrata(args).json(0)
    }

    /// Backs up the stopped cluster in `data_dir`.
    pub fn backup_offline(&self, data_dir: &Path) -> Run {
        let (repo, data_dir) = (self.repo(), data_dir.to_owned());
        let words = ["backup", "--init", "--json", "--offline", "--repo"].map(OsString::from);
        self.pgstrata(words.into_iter().chain([repo.into(), "-D".into(), data_dir.into()]))
    }

    /// The backups that the repository lists, oldest first.
    pub fn list(&self) -> Vec<Value> {
        let repo = self.repo();
        let args: [&OsStr; 4] = ["list".as_ref(), "--json".as_ref(), "--repo".as_ref(), repo.as_ref()];
        match self.pgstrata(args).json(0) {
            Value::Array(backups) => backups,
            other => panic!("list prints no array but {other}"),
        }
    }

    /// Proves that `pgstrata verify` finds nothing wrong.
    pub fn verify(&self) {
        let repo = self.repo();
        let args: [&OsStr; 5] =
            ["verify".as_ref(), "all".as_ref(), "--json".as_ref(), "--repo".as_ref(), repo.as_ref()];
        self.pgstrata(args).json(0);
    }

    /// Runs a restore of `backup` into directory `target`.
    pub fn run_restore(&self, backup: &str, target: &Path, tablespaces: &[(PathBuf, PathBuf)]) -> Run {
        let mut args: Vec<OsString> = ["restore", backup, "--json", "--repo"].map(OsString::from).into();
        args.extend([self.repo().into(), "--target".into(), target.into()]);
        for (old, new) in tablespaces {
            let mut map = old.clone().into_os_string();
            map.push("=");
            map.push(new);
            args.extend(["--tablespace-map".into(), map]);
        }
        self.pgstrata(args)
    }

    /// Restores `backup` into the new directory `name`, judges the result, and makes it a cluster, not started yet.
    pub fn restore(&self, backup: &str, name: &str, tablespaces: &[(PathBuf, PathBuf)]) -> Cluster {
        let target = self.path(name);
        self.run_restore(backup, &target, tablespaces).json(0);
        let cluster = Cluster::adopt(&self.server, &self.tools, &target).unwrap();
        judge_restored_directory(&cluster);
        cluster
    }
}

/// What a run of pgstrata printed and how it ended.
#[derive(Debug)]
pub struct Run {
    command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// What came of a command.
    pub fn of(command: &str, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            command: command.to_owned(),
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// The JSON document that the run printed, proving that it ended with `code`.
    pub fn json(&self, code: i32) -> Value {
        self.expect(code);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: no JSON document: {self}"))
    }

    /// Proves that the run ended with `code`.
    pub fn expect(&self, code: i32) {
        assert_eq!(self.code, Some(code), "{self}");
    }

    /// Proves that the run ended with `code` and that its message has all of `words`.
    pub fn refuses(&self, code: i32, words: &[&str]) {
        self.expect(code);
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in the message: {self}");
        }
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, code, stdout, stderr } = self;
        write!(f, "{command} ended with {code:?}\nstandard output:\n{stdout}\nstandard error:\n{stderr}")
    }
}

/// A text field of a JSON report.
pub fn text<'a>(report: &'a Value, field: &str) -> &'a str {
    report[field].as_str().unwrap_or_else(|| panic!("no text {field:?} in {report}"))
}

/// A number of a JSON report.
pub fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or_else(|| panic!("no number {field:?} in {report}"))
}

/// The pgstrata binary where the servers' user can run it: a clone in root's home is out of its reach, so there
/// the binary is copied into the cache.
pub fn reachable_binary(user: &ServerUser) -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_pgstrata"));
        if user.can_enter(built.parent().unwrap()) {
            return built.to_owned();
        }
        let cache = Cache::for_tests().unwrap();
        let metadata = fs::metadata(built).unwrap();
        let name = format!("pgstrata-{}-{}", metadata.len(), metadata.mtime());
        let copy = |dir: &Path| {
            let bin = dir.join("bin");
            fs::create_dir(&bin).unwrap();
            fs::copy(built, bin.join("pgstrata")).unwrap();
            Ok(())
        };
        cache.get_or_make(&name, copy).unwrap().join("bin/pgstrata")
    })
}

/// 25 MB to read at 8 MB a second: time for things to happen.
pub const SLOW: [&str; 4] = ["--max-rate", "8M", "--jobs", "1"];

/// Gives a slow backup something to read.
pub fn fill(source: &Cluster) {
    let rows = "CREATE TABLE bulk AS SELECT i, repeat(md5(i::text), 10) AS content FROM generate_series(1, 60000) i";
    source.sql_each("postgres", &[rows, "CHECKPOINT"]).unwrap();
}

/// Backs up slowly, and does something as soon as the server is in backup mode: after that, it is asked for its timeline and its summaries.
pub fn back_up_while(lab: &Lab, source: &Cluster, meanwhile: impl FnOnce()) -> Run {
    let mut args = lab.backup_args(source);
    args.extend(SLOW.map(Into::into));
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        scope.spawn(move || sender.send(lab.pgstrata(args)).unwrap());
        let begun = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgstrata' \
                     AND state = 'idle' AND query ~ 'backup_start|start_backup|pg_control_checkpoint|summarize_wal'";
        poll(|| source.query_value("postgres", begun).unwrap() != "0");
        meanwhile();
        receiver.recv().unwrap()
    })
}

/// Looks again and again until something is so; the backup that is waited for takes seconds.
pub fn poll(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "the backup did not begin");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Judges a restored or exported directory that no server has touched yet.
pub fn judge_restored_directory(restored: &Cluster) {
    let dir = restored.data_dir();
    let mode = fs::metadata(dir).unwrap().permissions().mode() & 0o7777;
    assert!([0o700, 0o750].contains(&mode), "the restored directory has mode {mode:o}");
    for name in ["postmaster.pid", "postmaster.opts"] {
        assert!(!dir.join(name).exists(), "{name} was restored");
    }
    let manifest = fs::read_to_string(dir.join("backup_manifest")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let server = restored.server();
    // A newer pg_verifybackup reads older manifests, but not an older pg_control, which version 2 makes it read;
    // nor can another major's pg_waldump read the WAL.
    let is_own = server.has("pg_verifybackup") && server.has("pg_waldump");
    if !is_own && manifest["PostgreSQL-Backup-Manifest-Version"] == 2 {
        eprintln!("skipped: no pg_verifybackup of PostgreSQL {}", server.major);
        return;
    }
    let mut verify = restored.tool("pg_verifybackup").unwrap();
    if !is_own {
        verify.arg("--no-parse-wal");
    }
    succeed(verify.arg("--exit-on-error").arg(dir)).unwrap();
}

/// Starts `restored`, proves that it holds `expected`, is intact, and is on a timeline of its own; then stops it and
/// proves that its pages are, too.
///
/// `expected` is from [`dump`] of the source; `tablespaces` says where the restore has put them.
pub fn judge(mut restored: Cluster, expected: &str, tablespaces: &[(PathBuf, PathBuf)]) {
    restored.start().unwrap();
    assert_same_dump(expected, &dump(&restored, tablespaces));
    judge_running(&mut restored);
}

/// Judges a started copy as far as that needs no comparison with the source; then stops it and judges its pages.
pub fn judge_running(restored: &mut Cluster) {
    let value = |query| restored.query_value("postgres", query).unwrap();
    let timeline: u32 = value("SELECT timeline_id FROM pg_control_checkpoint()").parse().unwrap();
    assert!(timeline > 1, "the restored copy goes on with the source's timeline");
    assert_eq!(value("SHOW archive_mode"), "off");
    judge_contents(restored);
}

/// Judges what a started copy holds; then stops it and judges its pages.
pub fn judge_contents(restored: &mut Cluster) {
    for database in restored.databases().unwrap() {
        assert_indexes_agree_with_tables(restored, &database);
        assert_visibility_maps_are_right(restored, &database);
    }
    assert_amcheck_passes(restored);
    let has_checksums = restored.query_value("postgres", "SHOW data_checksums").unwrap() == "on";
    restored.stop(StopMode::Fast).unwrap();
    if has_checksums {
        assert_pages_have_their_checksums(restored);
    }
}

/// All of `cluster` but the load's database, as SQL text; places of tablespaces are written as in the source.
pub fn dump(cluster: &Cluster, tablespaces: &[(PathBuf, PathBuf)]) -> String {
    let mut dumpall = cluster.tool("pg_dumpall").unwrap();
    dumpall.arg("--no-unlogged-table-data").arg(format!("--exclude-database={}", load::DATABASE));
    let output = succeed(&mut dumpall).unwrap();
    let mut dump = String::from_utf8(output.stdout).unwrap();
    for (old, new) in tablespaces {
        dump = dump.replace(&*new.to_string_lossy(), &old.to_string_lossy());
    }
    // \restrict and \unrestrict carry a token that is random in each dump.
    let is_content = |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
    dump.split_inclusive('\n').filter(is_content).collect()
}

/// Proves that two dumps are equal, or shows the first lines that are not.
pub fn assert_same_dump(expected: &str, found: &str) {
    if expected == found {
        return;
    }
    let differing = expected.lines().zip(found.lines()).enumerate().find(|(_, (expected, found))| expected != found);
    let (expected_len, found_len) = (expected.lines().count(), found.lines().count());
    match differing {
        Some((line, (expected, found))) => panic!("line {line} of the dump: expected\n{expected}\nfound\n{found}"),
        None => panic!("the dump has {found_len} lines instead of {expected_len}"),
    }
}

/// Reads every user table by sequential scan and again by each column that a B-tree index begins with.
fn assert_indexes_agree_with_tables(cluster: &Cluster, database: &str) {
    let indexed = "SELECT DISTINCT i.indrelid::regclass::text, quote_ident(a.attname)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam AND m.amname = 'btree'
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE i.indisvalid AND i.indpred IS NULL AND t.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%'";
    let mut session = cluster.connect(database).unwrap();
    let mut read = |settings: &str, query: &str| {
        session.batch_execute(&format!("RESET ALL; {settings}")).unwrap();
        let row = session.query_one(query, &[]).unwrap();
        (row.get::<_, i64>(0), row.get::<_, String>(1))
    };
    for row in cluster.query_strings(database, indexed).unwrap() {
        let [Some(table), Some(column)] = &row[..] else { panic!("{row:?}") };
        let rows = format!(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text
             FROM ONLY {table} t WHERE {column} IS NOT NULL"
        );
        // Only the key: an index-only scan, which believes the visibility map.
        let keys = format!(
            "SELECT count({column}), coalesce(sum(hashtextextended({column}::text, 0)::numeric), 0)::text
             FROM ONLY {table} WHERE {column} IS NOT NULL"
        );
        let by_scan = "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off";
        for query in [rows, keys] {
            let (scanned, found) = (read(by_scan, &query), read("SET enable_seqscan = off", &query));
            assert_eq!(scanned, found, "{database}: {query}: by sequential scan and by index");
        }
    }
}

fn assert_visibility_maps_are_right(cluster: &Cluster, database: &str) {
    if !cluster.has_extension("pg_visibility") {
        return eprintln!("skipped: PostgreSQL {} without pg_visibility", cluster.server().major);
    }
    cluster.sql(database, "CREATE EXTENSION IF NOT EXISTS pg_visibility").unwrap();
    for check in ["pg_check_visible", "pg_check_frozen"] {
        let query = format!(
            "SELECT c.oid::regclass::text, t::text FROM pg_class c, LATERAL {check}(c.oid) t
             WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence = 'p'"
        );
        let wrong = cluster.query_strings(database, &query).unwrap();
        assert!(wrong.is_empty(), "{check} in {database} of {}: {wrong:?}", cluster.data_dir().display());
    }
}

fn assert_amcheck_passes(cluster: &Cluster) {
    if !cluster.has_extension("amcheck") {
        return eprintln!("skipped: PostgreSQL {} without amcheck", cluster.server().major);
    }
    if cluster.server().major >= 14 {
        let mut amcheck = cluster.tool("pg_amcheck").unwrap();
        amcheck.args(["--all", "--install-missing", "--heapallindexed", "--parent-check", "--jobs=2"]);
        succeed(&mut amcheck).unwrap();
        return;
    }
    // amcheck of 13 knows B-trees only, and pg_amcheck expects more.
    for database in cluster.databases().unwrap() {
        cluster.sql(&database, "CREATE EXTENSION IF NOT EXISTS amcheck").unwrap();
        let check =
            "SELECT count(bt_index_parent_check(c.oid, true)::text) FROM pg_class c JOIN pg_am m ON m.oid = c.relam
            WHERE m.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p'";
        cluster.query_value(&database, check).unwrap();
    }
}

/// Checks the pages of a cleanly stopped cluster, by our own code and by the server's own tool if it has one.
pub fn assert_pages_have_their_checksums(stopped: &Cluster) {
    let (bad, count) = check_directory(stopped.data_dir()).unwrap();
    assert!(bad.is_empty() && count > 0, "wrong checksums in {}: {bad:?}", stopped.data_dir().display());
    if stopped.server().has("pg_checksums") {
        succeed(stopped.tool("pg_checksums").unwrap().arg("--check").arg("-D").arg(stopped.data_dir())).unwrap();
    }
}

/// A file or directory below some root: its mode, and its content if it is a file, its target if it is a link.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    pub mode: u32,
    pub content: Vec<u8>,
}

/// Everything below `root` by relative path. Links are not followed.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut entries = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let kind = metadata.file_type();
            let content = match () {
                () if kind.is_file() => fs::read(&path).unwrap(),
                () if kind.is_symlink() => fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes(),
                () => Vec::new(),
            };
            let relative = path.strip_prefix(root).unwrap().to_owned();
            entries.insert(relative, Entry { mode: metadata.permissions().mode(), content });
            if kind.is_dir() {
                pending.push(path);
            }
        }
    }
    entries
}

/// Proves that the trees are equal but for the paths that `may_differ` names.
pub fn assert_same_tree(
    expected: &BTreeMap<PathBuf, Entry>,
    found: &BTreeMap<PathBuf, Entry>,
    may_differ: impl Fn(&Path) -> bool,
) {
    for path in expected.keys().chain(found.keys()).filter(|path| !may_differ(path)) {
        match (expected.get(path), found.get(path)) {
            (Some(expected), Some(found)) => {
                assert_eq!(expected.mode, found.mode, "the mode of {} ({:o})", path.display(), found.mode);
                let differs_at = expected.content.iter().zip(&found.content).position(|(a, b)| a != b);
                let (expected, found) = (&expected.content, &found.content);
                assert_eq!(expected.len(), found.len(), "the length of {}", path.display());
                assert!(expected == found, "{} differs at byte {differs_at:?}", path.display());
            }
            (Some(_), None) => panic!("{} is missing", path.display()),
            (None, _) => panic!("{} was not there", path.display()),
        }
    }
}
