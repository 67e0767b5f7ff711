//! pgstrata killed and crowded, with a live server under load: whatever happens, what is listed restores.
//!
//! Two kinds of rounds, by a seed. In one, a command is killed (SIGKILL) at a random moment and then run again to its end, which must succeed. In the
//! other, several commands run beside each other; each must end well or say that it is locked out. After each round everything is verified, and no
//! backup may be gone that no expiry removed; every so often a backup is restored, started and judged. In the end there is no litter.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, ClusterOptions, StopMode};
use crate::load::{self, Load, State};
use crate::os_user::ServerUser;
use crate::random::Random;
use crate::servers::Installation;
use crate::{Error, Result};

/// How long the server may take to notice that a client is gone.
const DEADLINE: Duration = Duration::from_secs(60);
/// Backups that an expiry leaves.
const KEPT: usize = 4;
/// Every so many rounds a backup is restored and started.
const RESTORE_EVERY: u32 = 20;

/// What to torture, and for how long.
#[derive(Debug)]
pub struct Options<'a> {
    /// The pgstrata program, where the servers' user can run it.
    pub binary: &'a Path,
    /// The server.
    pub server: &'a Arc<Installation>,
    /// Where client programs come from that the server lacks.
    pub tools: &'a Arc<Installation>,
    /// How many rounds.
    pub rounds: u32,
    /// What everything random follows from.
    pub seed: u64,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Commands that were killed before their end.
    pub killed: u32,
    /// Commands that were to be killed and were done by then.
    pub escaped: u32,
    /// Commands that ran beside others and ended well.
    pub crowded: u32,
    /// Commands that were locked out.
    pub locked_out: u32,
    /// Backups that were made.
    pub backups: u32,
    /// Backups that were restored, started and judged.
    pub restored: u32,
}

/// A command of pgstrata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Backup,
    FullBackup,
    Merge,
    Repack,
    Expire,
    Export,
    Verify,
    Restore,
}

const ACTIONS: [Action; 10] = [
    Action::Backup,
    Action::Backup,
    Action::Backup,
    Action::FullBackup,
    Action::Merge,
    Action::Repack,
    Action::Expire,
    Action::Export,
    Action::Verify,
    Action::Restore,
];

struct Chamber<'a> {
    options: &'a Options<'a>,
    user: ServerUser,
    scratch: tempfile::TempDir,
    source: Cluster,
    load: Load,
    random: Random,
    /// What was committed for certain before each backup began.
    backups: BTreeMap<String, State>,
    /// How long each action took last.
    durations: BTreeMap<Action, Duration>,
    report: Report,
    targets: u32,
}

/// Runs the rounds; `say` is told of each.
///
/// # Errors
///
/// The first thing that is not as it must be, with the seed and the round.
pub fn run(options: &Options<'_>, say: &dyn Fn(&str)) -> Result<Report> {
    let mut chamber = Chamber::new(options)?;
    for round in 0..options.rounds {
        let done = chamber.round(round);
        let what = done.map_err(|e| Error::new(format!("seed {}, round {round}: {e}", options.seed)))?;
        say(&format!("round {round}: {what}"));
    }
    chamber.end()
}

impl<'a> Chamber<'a> {
    fn new(options: &'a Options<'a>) -> Result<Self> {
        let source = Cluster::create(options.server, options.tools, &ClusterOptions::default())?;
        Load::prepare(&source, 2)?;
        let rows =
            "CREATE TABLE bulk AS SELECT i, repeat(md5(i::text), 10) AS content FROM generate_series(1, 60000) i";
        source.sql("postgres", rows)?;
        let load = Load::start(&source, options.seed)?;
        let user = ServerUser::get()?;
        let scratch = user.scratch()?;
        let mut chamber = Self {
            options,
            user,
            scratch,
            source,
            load,
            random: Random::new(options.seed),
            backups: BTreeMap::new(),
            durations: BTreeMap::new(),
            report: Report::default(),
            targets: 0,
        };
        chamber.complete(Action::FullBackup)?;
        chamber.complete(Action::Export)?;
        Ok(chamber)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A random number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.random.number() % bound
    }

    fn action(&mut self) -> Action {
        let index = self.below(ACTIONS.len() as u64);
        ACTIONS[usize::try_from(index).unwrap_or_default()]
    }

    fn start(&mut self, action: Action) -> Result<Child> {
        self.targets += 1;
        let mut args: Vec<OsString> = match action {
            Action::Backup => vec!["backup".into()],
            Action::FullBackup => vec!["backup".into(), "--full".into(), "--init".into()],
            Action::Merge => vec!["merge".into()],
            Action::Repack => vec!["merge".into(), "--repack".into()],
            Action::Expire => {
                ["expire", "--keep-last", &KEPT.to_string(), "--max-unused", "5"].map(OsString::from).to_vec()
            }
            Action::Export => vec!["export".into(), "--init".into(), "--to".into(), self.path("offsite").into()],
            Action::Verify => vec!["verify".into()],
            Action::Restore => {
                vec!["restore".into(), "--target".into(), self.path(&format!("target-{}", self.targets)).into()]
            }
        };
        if matches!(action, Action::Backup | Action::FullBackup) {
            args.extend(["-D".into(), self.source.data_dir().into(), "-d".into(), self.source.conninfo().into()]);
        }
        args.extend(["--json".into(), "--repo".into(), self.path("repo").into()]);
        let mut command = self.user.command(self.options.binary);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|e| Error::io("run", self.options.binary, e))
    }

    /// Runs a command to its end, which must be a good one.
    fn complete(&mut self, action: Action) -> Result<()> {
        let committed = self.load.committed();
        let begun = Instant::now();
        let output = finished(self.start(action)?)?;
        self.durations.insert(action, begun.elapsed());
        if output.status.code() != Some(0) {
            return Err(unexpected(action, &output));
        }
        self.note(action, &output, &committed)
    }

    /// Takes what a command that ended well reports into the model.
    fn note(&mut self, action: Action, output: &Output, committed: &State) -> Result<()> {
        let report: Value = serde_json::from_slice(&output.stdout)
            .map_err(|e| Error::new(format!("{action:?} printed no document: {e}")))?;
        let id = || report["id"].as_str().map(str::to_owned).unwrap_or_default();
        match action {
            Action::Backup | Action::FullBackup => {
                self.report.backups += 1;
                self.backups.insert(id(), committed.clone());
            }
            Action::Merge | Action::Repack => {
                let source = report["merged_from"].as_str().unwrap_or_default();
                let state = self.backups.get(source).cloned().unwrap_or_else(|| committed.clone());
                self.backups.insert(id(), state);
            }
            Action::Expire => {
                for removed in report["removed"].as_array().into_iter().flatten() {
                    self.backups.remove(removed["id"].as_str().unwrap_or_default());
                }
            }
            Action::Restore => {
                let target = report["target"].as_str().unwrap_or_default();
                std::fs::remove_dir_all(target).map_err(|e| Error::io("remove", Path::new(target), e))?;
            }
            Action::Export | Action::Verify => {}
        }
        Ok(())
    }

    fn round(&mut self, round: u32) -> Result<String> {
        let what = if self.below(3) == 0 { self.crowd()? } else { self.kill()? };
        self.check_list()?;
        if round % RESTORE_EVERY == RESTORE_EVERY - 1 {
            self.restore_one()?;
        }
        Ok(what)
    }

    /// Kills a command at a random moment, and runs it again.
    fn kill(&mut self) -> Result<String> {
        let action = self.action();
        if !self.durations.contains_key(&action) {
            self.complete(action)?;
        }
        let committed = self.load.committed();
        let usual = self.durations[&action].as_micros();
        let delay = Duration::from_micros(self.below(u64::try_from(usual + usual / 8).unwrap_or(1).max(1)));
        let mut child = self.start(action)?;
        let begun = Instant::now();
        while begun.elapsed() < delay && matches!(child.try_wait(), Ok(None)) {
            std::thread::park_timeout((delay - begun.elapsed().min(delay)).min(Duration::from_millis(1)));
        }
        // One that is done already cannot be killed any more.
        let _ = child.kill();
        let output = finished(child)?;
        let what = format!("{action:?} killed after {delay:?} of {:?}", self.durations[&action]);
        match output.status.code() {
            None => self.report.killed += 1,
            Some(0) => {
                self.report.escaped += 1;
                self.note(action, &output, &committed)?;
            }
            Some(_) => return Err(unexpected(action, &output)),
        }
        self.server_is_left_alone()?;
        self.adopt_what_was_committed(action, &committed)?;
        self.complete(action)?;
        Ok(what)
    }

    /// A killed command may have got as far as its commit, and a killed expiry as far as it was.
    fn adopt_what_was_committed(&mut self, action: Action, committed: &State) -> Result<()> {
        let listed = self.listed()?;
        match action {
            Action::Backup | Action::FullBackup | Action::Merge | Action::Repack => {
                for (id, merged_from) in &listed {
                    let state = merged_from.as_ref().and_then(|id| self.backups.get(id)).unwrap_or(committed).clone();
                    self.backups.entry(id.clone()).or_insert(state);
                }
            }
            Action::Expire => {
                let ids: BTreeSet<&String> = listed.iter().map(|(id, _)| id).collect();
                if ids.len() < KEPT.min(self.backups.len()) {
                    return Err(Error::new(format!("an expiry that was killed left {ids:?} of {:?}", self.backups)));
                }
                self.backups.retain(|id, _| ids.contains(id));
            }
            _ => {}
        }
        Ok(())
    }

    /// Runs several commands beside each other.
    fn crowd(&mut self) -> Result<String> {
        let count = 3 + self.below(3);
        let actions: Vec<Action> = (0..count).map(|_| self.action()).collect();
        let committed = self.load.committed();
        let running: Vec<Child> = actions.iter().map(|action| self.start(*action)).collect::<Result<_>>()?;
        let outputs: Vec<Output> = running.into_iter().map(finished).collect::<Result<_>>()?;
        // First what adds, then what removes.
        let mut done: Vec<_> = actions.iter().copied().zip(&outputs).collect();
        done.sort_by_key(|(action, _)| *action == Action::Expire);
        for (action, output) in done {
            match output.status.code() {
                Some(0) => {
                    self.report.crowded += 1;
                    self.note(action, output, &committed)?;
                }
                Some(4) => self.report.locked_out += 1,
                _ => return Err(unexpected(action, output)),
            }
        }
        Ok(format!("{actions:?} together"))
    }

    /// Sees that exactly the model's backups are listed, and that all of them are sound.
    fn check_list(&mut self) -> Result<()> {
        let listed: BTreeSet<String> = self.listed()?.into_iter().map(|(id, _)| id).collect();
        let expected: BTreeSet<String> = self.backups.keys().cloned().collect();
        if listed != expected {
            let (gone, new): (Vec<_>, Vec<_>) =
                (expected.difference(&listed).collect(), listed.difference(&expected).collect());
            return Err(Error::new(format!("of the backups {gone:?} are gone and {new:?} are new")));
        }
        self.complete(Action::Verify)
    }

    /// The listed backups, and what each was merged from.
    fn listed(&self) -> Result<Vec<(String, Option<String>)>> {
        let output =
            self.user.command(self.options.binary).args(["list", "--json", "--repo"]).arg(self.path("repo")).output();
        let output = output.map_err(|e| Error::io("run", self.options.binary, e))?;
        let list: Vec<Value> = serde_json::from_slice(&output.stdout).map_err(|e| {
            Error::new(format!("list printed no list: {e}: {}", String::from_utf8_lossy(&output.stderr)))
        })?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Ok(list.iter().map(|backup| (text(&backup["id"]).unwrap_or_default(), text(&backup["merged_from"]))).collect())
    }

    /// No session and no replication slot of a killed command stays.
    fn server_is_left_alone(&self) -> Result<()> {
        let begun = Instant::now();
        let left = "SELECT (SELECT count(*) FROM pg_replication_slots)
                    + (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgstrata')";
        while self.source.query_value("postgres", left)? != "0" {
            if begun.elapsed() > DEADLINE {
                return Err(Error::new("a killed command left a session or a replication slot on the server"));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Restores one of the backups, starts it, and judges what it holds.
    fn restore_one(&mut self) -> Result<()> {
        let index = self.below(self.backups.len() as u64);
        let chosen = self.backups.iter().nth(usize::try_from(index).unwrap_or_default());
        let Some((id, committed)) = chosen.map(|(id, state)| (id.clone(), state.clone())) else { return Ok(()) };
        self.restore(&id, &committed)
    }

    fn restore(&mut self, id: &str, committed: &State) -> Result<()> {
        let target = self.path("judged");
        let mut command = self.user.command(self.options.binary);
        command.args(["restore", id, "--json", "--repo"]).arg(self.path("repo")).arg("--target").arg(&target);
        let output = command.output().map_err(|e| Error::io("run", self.options.binary, e))?;
        if output.status.code() != Some(0) {
            return Err(unexpected(Action::Restore, &output));
        }
        let mut copy = Cluster::adopt(self.options.server, self.options.tools, &target)?;
        copy.start()?;
        let found = load::check(&copy)?;
        if !found.at_least(committed) {
            return Err(Error::new(format!("{id} holds {found:?}, which is less than {committed:?}")));
        }
        copy.query_value("postgres", "SELECT count(*) / (count(*) = 60000)::int FROM bulk")?;
        copy.stop(StopMode::Fast)?;
        std::fs::remove_dir_all(&target).map_err(|e| Error::io("remove", &target, e))?;
        self.report.restored += 1;
        Ok(())
    }

    /// Restores what is left, and sees that no litter is.
    fn end(mut self) -> Result<Report> {
        self.complete(Action::Expire)?;
        self.check_list()?;
        for (id, committed) in self.backups.clone() {
            self.restore(&id, &committed)?;
        }
        let litter = litter(&self.path("repo"))?;
        if !litter.is_empty() {
            return Err(Error::new(format!("seed {}: an expiry left {litter:?}", self.options.seed)));
        }
        self.load.stop()?;
        Ok(self.report)
    }
}

/// Temporary files, leases, and packs of runs that do not matter any more are litter; the last are what a dry run would free.
fn litter(repo: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut pending = vec![repo.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).map_err(|e| Error::io("list", &directory, e))? {
            let path = entry.map_err(|e| Error::io("list", &directory, e))?.path();
            let is_temporary = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            let is_lease = directory.ends_with("leases");
            if path.is_dir() {
                pending.push(path);
            } else if is_temporary || is_lease {
                found.push(path);
            }
        }
    }
    Ok(found)
}

fn finished(child: Child) -> Result<Output> {
    child.wait_with_output().map_err(|e| Error::new(format!("cannot wait for a command: {e}")))
}

fn unexpected(action: Action, output: &Output) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    Error::new(format!("{action:?} ended with {:?}: {text}", output.status.code()))
}
