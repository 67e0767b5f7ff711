//! What runs when, and in what order; see the [workload](super).

use std::path::{Path, PathBuf};
use std::process::Command;

use testdata::{Error, Result};

use super::attic::Attic;
use super::churn::Churn;
use super::site::Site;
use super::tools::{self, Action, Set, Tool};
use super::{CompareArgs, proof};
use crate::measure::Usage;
use crate::record::Recorder;
use crate::report::{Facts, Step};
use crate::scratch::{Caches, Start, say};
use crate::{memory, read};

const BLOCK_LEN: u64 = 8192;
/// How much of a line of a peer's complaint is repeated.
const COMPLAINT_LEN: usize = 240;

/// A tool, and why it does not take part any longer, if so.
struct Player {
    tool: Box<dyn Tool>,
    out: bool,
    /// The ways that failed.
    refused: Vec<&'static str>,
}

/// What an incremental is of.
#[derive(Clone, Copy)]
struct Change {
    churn: Churn,
    amount: Amount,
}

/// How much changes.
#[derive(Clone, Copy)]
enum Amount {
    /// Of the cluster's blocks.
    Percent(f64),
    /// As many, however large the cluster is.
    Blocks(u64),
}

impl Amount {
    fn is_nothing(self) -> bool {
        matches!(self, Self::Percent(0.0) | Self::Blocks(0))
    }

    /// As a share of a cluster of so many bytes.
    fn percent_of(self, cluster_bytes: u64) -> f64 {
        match self {
            Self::Percent(percent) => percent,
            Self::Blocks(blocks) => (blocks * BLOCK_LEN) as f64 / cluster_bytes.max(1) as f64 * 100.0,
        }
    }

    fn asked_percent(self) -> Option<f64> {
        if let Self::Percent(percent) = self { Some(percent) } else { None }
    }
}

/// What a command is, besides whose.
#[derive(Clone, Copy)]
struct Moment {
    action: Action,
    cold: bool,
    change: Option<Change>,
    night: Option<u32>,
}

/// The rounds and the history.
pub struct Rounds<'a> {
    args: &'a CompareArgs,
    site: &'a Site,
    rounds: Vec<Player>,
    nights: Vec<Player>,
    attic: Attic,
    /// In the names of steps and in samples, where there are rounds on several clusters.
    size: String,
    /// How often the cluster was changed.
    turn: u64,
    found: Vec<String>,
}

impl<'a> Rounds<'a> {
    /// With the tools that there are.
    ///
    /// # Errors
    /// When the cluster's files cannot be listed.
    pub fn new(args: &'a CompareArgs, site: &'a Site) -> Result<Self> {
        let tools = tools::find(&args.tools, site, Set::Rounds);
        tools.left_out.iter().for_each(|why| say(why));
        let (rounds, nights, attic) = (players(tools.found), Vec::new(), Attic::new(site)?);
        Ok(Self { args, site, rounds, nights, attic, size: String::new(), turn: 0, found: tools.left_out })
    }

    /// With a name for the cluster's size.
    #[must_use]
    pub fn of_size(self, size: String) -> Self {
        Self { size, ..self }
    }

    /// The name of the cluster's size.
    pub fn size(&self) -> &str {
        &self.size
    }

    /// Takes a full backup by each tool.
    ///
    /// # Errors
    /// When pgstrata fails.
    pub fn begin(&mut self, recorder: &mut Recorder) -> Result<()> {
        self.site.tidy()?;
        self.each(recorder, Set::Rounds, Moment { action: Action::Full, cold: false, change: None, night: None })
    }

    /// Changes as many blocks, evenly spread; then an incremental by each tool, and what the server does for one whatever takes it.
    ///
    /// # Errors
    /// When pgstrata fails.
    pub fn increment(&mut self, recorder: &mut Recorder, blocks: u64, cold: bool) -> Result<()> {
        let change = Change { churn: Churn::Uniform, amount: Amount::Blocks(blocks) };
        self.change(change)?;
        self.site.wait_for_summaries()?;
        self.server_limit(recorder, cold)?;
        let moment = Moment { action: Action::Incremental, cold, change: Some(change), night: None };
        self.each(recorder, Set::Rounds, moment)
    }

    /// Takes a full backup and one each night, by every tool that has incrementals. They are measured as they come.
    ///
    /// # Errors
    /// When pgstrata fails.
    pub fn pass_nights(&mut self, recorder: &mut Recorder) -> Result<()> {
        if self.args.nights == 0 {
            return Ok(());
        }
        self.nights = players(tools::find(&self.args.tools, self.site, Set::Nights).found);
        self.nights.retain(|player| !player.tool.ways(Action::Incremental).is_empty());
        recorder.round = 1;
        let moment = Moment { action: Action::Full, cold: false, change: None, night: Some(0) };
        self.each(recorder, Set::Nights, moment)?;
        for night in 1..=self.args.nights {
            say(&format!("night {night}"));
            recorder.round = night;
            let change = Change { churn: self.args.churn[0], amount: Amount::Percent(self.args.nightly_change) };
            self.change(change)?;
            let change = Some(change);
            self.each(
                recorder,
                Set::Nights,
                Moment { action: Action::Incremental, cold: false, change, night: Some(night) },
            )?;
        }
        Ok(())
    }

    /// Plays a round.
    ///
    /// # Errors
    /// When pgstrata fails, or what was restored is wrong.
    pub fn play(&mut self, recorder: &mut Recorder, cold: bool) -> Result<()> {
        let moment = |action| Moment { action, cold, change: None, night: None };
        self.site.tidy()?;
        self.read_limits(recorder, cold)?;
        self.each(recorder, Set::Rounds, moment(Action::Full))?;
        self.restores(recorder, Set::Rounds, moment(Action::RestoreFull))?;
        let mut count = 0;
        for change in self.changes() {
            self.change(change)?;
            count += 1;
            let change = Some(change);
            self.each(recorder, Set::Rounds, Moment { change, ..moment(Action::Incremental) })?;
        }
        let (set, night) = if self.nights.is_empty() { (Set::Rounds, count) } else { (Set::Nights, self.args.nights) };
        if night > 0 {
            self.restores(recorder, set, Moment { night: Some(night), ..moment(Action::RestoreLast) })?;
            self.each(recorder, set, Moment { night: Some(night), ..moment(Action::Merge) })?;
        }
        self.each(recorder, set, moment(Action::Verify))?;
        self.attic.take(self.site, "restored")?;
        self.attic.end_round(self.site)
    }

    /// Nothing changed, once; then each share of each model.
    fn changes(&self) -> Vec<Change> {
        let models = &self.args.churn;
        let none = self.args.change.iter().filter(|share| **share == 0.0).take(1);
        let none = none.map(|&share| Change { churn: models[0], amount: Amount::Percent(share) });
        let shares = || self.args.change.iter().copied().filter(|share| *share > 0.0);
        let change = |churn, share| Change { churn, amount: Amount::Percent(share) };
        let some = models.iter().flat_map(|&churn| shares().map(move |share| change(churn, share)));
        none.chain(some).collect()
    }

    fn change(&mut self, change: Change) -> Result<()> {
        self.turn += 1;
        self.site.scratch().go_on()?;
        let percent = change.amount.percent_of(self.site.bytes()?);
        self.site.change(change.churn, percent, self.turn)
    }

    fn players(&mut self, set: Set) -> &mut Vec<Player> {
        match set {
            Set::Rounds => &mut self.rounds,
            Set::Nights => &mut self.nights,
        }
    }

    /// Each tool does it, in each of its ways.
    fn each(&mut self, recorder: &mut Recorder, set: Set, moment: Moment) -> Result<()> {
        let order = in_turns(self.players(set).len(), recorder.round);
        order.into_iter().try_for_each(|at| self.one(recorder, set, at, moment))
    }

    fn one(&mut self, recorder: &mut Recorder, set: Set, at: usize, moment: Moment) -> Result<()> {
        let site = self.site;
        let player = &mut self.players(set)[at];
        if moment.action == Action::Full
            && !player.out
            && let Err(error) = player.tool.prepare(site)
        {
            self.leave_out(set, at, moment, "", error)?;
        }
        let ways = self.players(set)[at].tool.ways(moment.action);
        for way in in_turns(ways.len(), recorder.round).into_iter().map(|at| ways[at]) {
            let player = &self.players(set)[at];
            if player.out || player.refused.contains(&way) {
                continue;
            }
            if let Err(error) = self.measure(recorder, set, at, moment, way) {
                self.site.scratch().go_on()?;
                self.leave_out(set, at, moment, way, error)?;
            }
        }
        if matches!(moment.action, Action::Full | Action::Incremental) {
            self.players(set)[at].tool.settle();
        }
        Ok(())
    }

    /// A peer that fails is out; a way of pgstrata's that refuses is, too. Anything else is our own failure. Of a peer that finds no
    /// sense in a backup of nothing, only that is left out.
    fn leave_out(&mut self, set: Set, at: usize, moment: Moment, way: &'static str, error: Error) -> Result<()> {
        let player = &mut self.players(set)[at];
        let ours = player.tool.name() == "pgstrata";
        if ours && (way.is_empty() || ["auto", "scan"].contains(&way)) {
            return Err(error);
        }
        let nothing = moment.change.is_some_and(|change| change.amount.is_nothing());
        match way {
            "" if nothing => {}
            "" => player.out = true,
            _ => player.refused.push(way),
        }
        let words = [player.tool.name(), moment.action.name(), way, if nothing { "of nothing" } else { "" }];
        let what = words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        let work = self.site.scratch().work().display().to_string();
        let why = format!("{what} is left out: {}", short(&error.to_string().replace(&work, "WORK")));
        if !self.found.contains(&why) {
            say(&why);
            self.found.push(why);
        }
        Ok(())
    }

    fn measure(
        &mut self,
        recorder: &mut Recorder,
        set: Set,
        at: usize,
        moment: Moment,
        way: &'static str,
    ) -> Result<()> {
        let site = self.site;
        let target = site.scratch().path("restored").join("data");
        if moment.action.restores() {
            self.attic.take(site, "restored")?;
            make_room(site)?;
        }
        let player = &mut self.players(set)[at];
        let tool = &mut player.tool;
        let command = tool.command(site, moment.action, way, &target)?;
        let repo = tool.repo().to_owned();
        let mut warm = vec![repo.clone()];
        if matches!(moment.action, Action::Full | Action::Incremental) {
            warm = site.directories();
            warm.push(repo.clone());
        }
        let before = read::tree_len(&repo)?;
        let (name, jobs) = (tool.name(), tool.own_jobs());
        let step = self.step(set, (name, jobs), moment, way);
        let bytes = site.bytes()?;
        let memory_len = if moment.action.restores() { memory::of_restore(bytes) } else { memory::of_backup(bytes) };
        let start = Start { caches: if moment.cold { Caches::Cold } else { Caches::Warm(warm) }, memory_len };
        let written = || match moment.action.restores() {
            true => read::tree_len(&target),
            false => Ok(read::tree_len(&repo)?.saturating_sub(before)),
        };
        let facts = self.facts((name, jobs), moment, way);
        let run = |command: &mut Command| site.measure(command, &start);
        let done = recorder.measure(step, site.scratch(), bytes, command, run, written)?;
        done.sample.facts = Facts { stored_bytes: Some(read::tree_len(&repo)?), ..facts };
        done.sample.blocks_changed = done.printed["blocks_changed"].as_u64();
        let printed = done.printed;
        self.players(set)[at].tool.done(moment.action, way, &printed)
    }

    fn facts(&self, (tool, jobs): (&str, Option<u32>), moment: Moment, way: &str) -> Facts {
        Facts {
            tool: tool.to_owned(),
            action: moment.action.name().to_owned(),
            way: way.to_owned(),
            churn: moment.change.map_or_else(String::new, |change| change.churn.name().to_owned()),
            share_changed: moment.change.and_then(|change| change.amount.asked_percent()),
            night: moment.night,
            jobs: jobs.or(Some(self.args.tools.jobs())),
            ..self.facts_of(moment.cold)
        }
    }

    fn facts_of(&self, cold: bool) -> Facts {
        let cache = if cold { "cold" } else { "warm" };
        let (cluster, size) = (self.site.kind().name().to_owned(), self.size.clone());
        Facts { cache: cache.to_owned(), cluster, size, ..Facts::default() }
    }

    fn step(&self, set: Set, (tool, jobs): (&str, Option<u32>), moment: Moment, way: &str) -> Step {
        let mut name = format!("{tool} {}", moment.action.label());
        match (set, moment.change, moment.night) {
            (Set::Nights, _, Some(_)) if !moment.action.restores() && moment.action != Action::Merge => {
                name += ", nightly"
            }
            (_, Some(change), _) if change.amount.is_nothing() => name += ", unchanged",
            (_, Some(Change { churn, amount: Amount::Percent(share) }), _) => {
                name += &format!(", {share} % {}", churn.name())
            }
            (_, Some(Change { amount: Amount::Blocks(blocks), .. }), _) => name += &format!(", {blocks} blocks"),
            (_, None, Some(night)) => name += &format!(", {night} nights"),
            _ => {}
        }
        let jobs = jobs.map_or_else(String::new, |jobs| format!("{jobs} jobs"));
        for part in [way, &jobs, if moment.cold { "cold" } else { "" }, &self.size] {
            if !part.is_empty() {
                name += &format!(", {part}");
            }
        }
        Step::named(name, Vec::new())
    }

    /// Each tool restores; then, in the first round, what it restored is proved.
    fn restores(&mut self, recorder: &mut Recorder, set: Set, moment: Moment) -> Result<()> {
        for at in in_turns(self.players(set).len(), recorder.round) {
            let samples = recorder.samples.len();
            self.one(recorder, set, at, moment)?;
            if recorder.samples.len() == samples {
                continue;
            }
            let tool = &self.players(set)[at].tool;
            let ours = tool.name() == "pgstrata" && tool.own_jobs().is_none();
            if ours && moment.action == Action::RestoreFull {
                self.write_limits(recorder, moment.cold)?;
            }
            if recorder.round == 1 {
                self.prove(set, at, moment)?;
            }
        }
        Ok(())
    }

    fn prove(&mut self, set: Set, at: usize, moment: Moment) -> Result<()> {
        // What a history ends with is what the cluster was before the rounds changed it.
        let whole = moment.action == Action::RestoreLast && set == Set::Rounds;
        let tool = &self.players(set)[at].tool;
        let (name, archive) = (tool.name(), tool.needs_archive());
        let jobs = tool.own_jobs().map_or_else(String::new, |jobs| format!(", {jobs} jobs"));
        let proved = proof::prove(self.site, archive, whole || self.site.server().is_none() && set == Set::Rounds);
        let what = format!("{name}{jobs}, {}", moment.action.label());
        match proved {
            Ok(fact) => {
                say(&format!("  {what}: {fact}"));
                self.found.push(format!("{what}: {fact}"));
                Ok(())
            }
            Err(error) if name == "pgstrata" => Err(error),
            Err(error) => self.leave_out(set, at, moment, "", error),
        }
    }

    /// What bounds every backup.
    fn read_limits(&mut self, recorder: &mut Recorder, cold: bool) -> Result<()> {
        let (scratch, jobs) = (self.site.scratch(), self.args.tools.jobs().to_string());
        let mut read = scratch.this_program();
        read.args(["read", "--jobs", &jobs]).arg(self.site.data_dir());
        self.limit(recorder, "read", cold, read, self.site.directories(), None)?;
        for action in ["hash", "compress"] {
            let mut limit = scratch.this_program();
            limit.args(["limit", "--jobs", &jobs, action]).arg(self.site.data_dir());
            self.limit(recorder, action, cold, limit, self.site.directories(), None)?;
        }
        Ok(())
    }

    /// What the server does for every backup: a checkpoint, a history file, and the waits of both.
    fn server_limit(&mut self, recorder: &mut Recorder, cold: bool) -> Result<()> {
        let Some(Ok(mut psql)) = self.site.server().map(|server| server.tool("psql")) else { return Ok(()) };
        psql.args(["-X", "-q", "-o", "/dev/null", "-c", "SELECT pg_backup_start($$bench$$, true)"]);
        psql.args(["-c", "SELECT pg_backup_stop(false)"]);
        self.limit(recorder, "server", cold, psql, Vec::new(), None)
    }

    /// What bounds every restore, with the bytes of one.
    fn write_limits(&mut self, recorder: &mut Recorder, cold: bool) -> Result<()> {
        let (scratch, jobs) = (self.site.scratch(), self.args.tools.jobs().to_string());
        let (restored, copy) = (scratch.path("restored"), scratch.path("copy"));
        let mut write = scratch.this_program();
        write.args(["limit", "--jobs", &jobs, "write"]).arg(restored.join("data")).arg(&copy);
        self.limit(recorder, "write", cold, write, vec![restored.clone()], Some(copy.clone()))?;
        let mut cp = scratch.program("sh");
        cp.args(["-c", "cp -a --reflink=never \"$1\" \"$2\" && sync -f \"$2\"", "sh"]).arg(&restored).arg(&copy);
        self.limit(recorder, "copy", cold, cp, vec![restored], Some(copy))
    }

    fn limit(
        &mut self,
        recorder: &mut Recorder,
        action: &str,
        cold: bool,
        command: Command,
        warm: Vec<PathBuf>,
        made: Option<PathBuf>,
    ) -> Result<()> {
        let names = [
            ("read", "limit: parallel read"),
            ("hash", "limit: checksum and BLAKE3 of all"),
            ("compress", "limit: checksum, BLAKE3, zstd 1 of all"),
            ("write", "limit: parallel write and sync"),
            ("copy", "limit: cp -a and sync"),
            ("server", "limit: pg_backup_start and _stop"),
        ];
        let name = names.iter().find(|(of, _)| *of == action).map_or(action, |(_, name)| name);
        let parts = [name, if cold { "cold" } else { "" }, &self.size];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let step = Step::named(parts.join(", "), Vec::new());
        let site = self.site;
        let bytes = site.bytes()?;
        let memory_len = if made.is_some() { memory::of_restore(bytes) } else { memory::of_backup(bytes) };
        let start = Start { caches: if cold { Caches::Cold } else { Caches::Warm(warm) }, memory_len };
        let run = |command: &mut Command| -> Result<Usage> { site.measure(command, &start) };
        let written = || made.as_deref().map_or(Ok(0), copied_len);
        let done = recorder.measure(step, site.scratch(), bytes, command, run, written)?;
        let (tool, jobs) = ("limit".to_owned(), Some(self.args.tools.jobs()));
        done.sample.facts = Facts { tool, action: action.to_owned(), jobs, ..self.facts_of(cold) };
        if made.is_some() { self.attic.take(site, "copy") } else { Ok(()) }
    }

    /// The tools' settings, a line each.
    pub fn settings(&self) -> String {
        let line = |tool: &dyn Tool| format!("{} ({}): {}\n", tool.name(), tool.version(), tool.settings());
        self.rounds.iter().map(|player| line(&*player.tool)).collect()
    }

    /// Their versions, a line each.
    pub fn versions(&self) -> String {
        let peers = self.rounds.iter().filter(|player| !["pgstrata", "pg_basebackup"].contains(&player.tool.name()));
        peers.map(|player| format!("{:<17} {}\n", player.tool.name(), player.tool.version())).collect()
    }

    /// What was found out besides, a line each.
    pub fn found(&self) -> String {
        self.found.iter().map(|line| format!("{line}\n")).collect()
    }
}

fn players(tools: Vec<Box<dyn Tool>>) -> Vec<Player> {
    tools.into_iter().map(|tool| Player { tool, out: false, refused: Vec::new() }).collect()
}

/// The numbers below `count`, beginning with another one in each round: whoever is first or last is somebody else each time.
pub fn in_turns(count: usize, round: u32) -> Vec<usize> {
    let first = round.saturating_sub(1) as usize;
    (0..count).map(|at| (first + at) % count).collect()
}

/// The bytes of a copy of a restored cluster; its tablespaces are found through its links.
fn copied_len(copy: &Path) -> Result<u64> {
    let data = copy.join("data");
    read::tree_len(if data.exists() { &data } else { copy })
}

/// The beginning of a complaint and its last line, where there are many.
pub fn short(complaint: &str) -> String {
    let cut = |line: &str| line.chars().take(COMPLAINT_LEN).collect::<String>();
    let lines: Vec<&str> = complaint.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.as_slice() {
        [] => String::new(),
        [only] => cut(only),
        [first, .., last] => format!("{} ... {}", cut(first), cut(last)),
    }
}

/// An empty place to restore into.
fn make_room(site: &Site) -> Result<()> {
    let scratch = site.scratch();
    let room = scratch.user().make_dir(scratch.work(), "restored")?;
    if !site.tablespaces().is_empty() {
        scratch.user().make_dir(&room, "tablespaces")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_begins_a_round_in_turns() {
        let orders: Vec<Vec<usize>> = (1..=4).map(|round| in_turns(3, round)).collect();
        assert_eq!(orders, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert!(in_turns(0, 7).is_empty());
    }
}
