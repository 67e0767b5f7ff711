//! `tps`: what the server feels. pgbench runs against it for a fixed time, alone and with a tool at work beside it, in turns.
//!
//! A tool's full backups follow one another as long as pgbench runs; how many came to their end is counted. Incrementals of pgstrata, by each
//! of its detectors, do so too, each of what changed since the one before, with a pause of `--pause` seconds after each. The server is as durable as
//! one is out of the box (`fsync = on`), and pgbench, the server and the tool share the machine, as they do where a backup runs on the
//! database host. What runs beside pgbench is meant to disturb it, so no sample counts as disturbed by others here.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use testdata::cluster::succeed;
use testdata::{Error, Result};

use crate::compare::rounds::short;
use crate::compare::site::{Kind, Site};
use crate::compare::tools::{self, Action, Set, Tool};
use crate::compare::{Detector, SiteArgs, ToolArgs};
use crate::record::Recorder;
use crate::report::{Facts, LEGEND, Run, Spread, Step};
use crate::scratch::{self, Caches, Scratch, Start, say};
use crate::{CommonArgs, cannot, machine};

/// What a second pgstrata is held to.
const MAX_RATE: &str = "50MB";
const ALONE: &str = "pgbench alone";
/// How long backups may take to end that were told to, and how often that is looked at.
const ENDING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// pgbench's transactions a second, alone and beside backups by pgstrata and its peers.
#[derive(Args, Debug)]
pub struct TpsArgs {
    /// pgbench's scale: 100 is a cluster of about 1.6 GB.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    scale: u32,

    /// How long pgbench runs each time.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// pgbench's clients.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,

    /// How often it runs beside each.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// How long incrementals wait for each other; 0 is back to back.
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    pause: u32,

    /// The major version of PostgreSQL.
    #[arg(long, value_name = "MAJOR", default_value_t = 15, value_parser = clap::value_parser!(u32).range(13..=18))]
    major: u32,

    #[command(flatten)]
    tools: ToolArgs,

    #[command(flatten)]
    common: CommonArgs,
}

/// A tool whose backups run beside pgbench.
struct Beside {
    tool: Box<dyn Tool>,
    action: Action,
    way: &'static str,
    options: &'static [&'static str],
    name: String,
}

/// Runs the workload and writes its results.
///
/// # Errors
/// When pgbench fails.
pub fn run(args: &TpsArgs) -> Result<()> {
    let scratch = Scratch::set(&args.common, false, &[])?;
    let synthetic = SiteArgs::default();
    let site = SiteArgs { cluster: Kind::Pgbench, scale: args.scale, major: args.major, ..synthetic };
    let site = Site::set(&site, scratch, &[])?;
    let server = site.server().ok_or_else(|| Error::new("no server"))?;
    server.sql_each("postgres", &["ALTER SYSTEM SET fsync = on", "SELECT pg_reload_conf()"])?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    let (mut besides, mut found) = besides(args, &site);
    recorder.rounds(args.runs, false, |recorder| {
        measure(args, &site, recorder, None)?;
        besides.retain_mut(|beside| match measure(args, &site, recorder, Some(beside)) {
            Ok(()) => true,
            Err(error) => {
                let error = error.to_string();
                let why =
                    format!("{} is left out from here on: {}", beside.name, error.lines().last().unwrap_or_default());
                say(&why);
                found.push(why);
                false
            }
        });
        // Whoever was first is last in the next round.
        let step = besides.len().min(1);
        besides.rotate_left(step);
        site.scratch().go_on()
    })?;
    recorder.notes.load_after = machine::load_average();
    let peers = besides.iter().filter(|beside| !["pgstrata", "pg_basebackup"].contains(&beside.tool.name()));
    let versions: String =
        peers.map(|beside| format!("{:<17} {}\n", beside.tool.name(), beside.tool.version())).collect();
    report(args, &site, &recorder, &found, &versions)?;
    drop(besides);
    site.close(args.common.keep)
}

/// Every tool that is here, pgstrata also with its rate held down; and why others are not.
fn besides(args: &TpsArgs, site: &Site) -> (Vec<Beside>, Vec<String>) {
    let tools::Tools { found, left_out } = tools::find(&args.tools, site, Set::Rounds);
    let full = |tool, way, options| Beside::new(tool, Action::Full, way, options);
    let ours = || tools::ours(&args.tools, site, Set::Rounds);
    let another = |way| Some(full(tools::postgres(site, Set::Nights).ok()?, way, &[]));
    let incremental = |detector: &Detector| Beside::new(ours(), Action::Incremental, detector.name(), &[]);
    let mut all = Vec::new();
    for tool in found.into_iter().filter(|tool| tool.own_jobs().is_none()) {
        // Servers without zstd refuse one of pg_basebackup's ways.
        let others: Vec<Beside> = tool.ways(Action::Full).into_iter().skip(1).filter_map(another).collect();
        let way = tool.ways(Action::Full).first().copied().unwrap_or_default();
        all.push(full(tool, way, &[]));
        all.extend(others);
    }
    let limited = full(ours(), "", &["--max-rate", MAX_RATE]);
    all.splice(1..1, std::iter::once(limited).chain(args.tools.detect.iter().map(incremental)));
    (all, left_out)
}

impl Beside {
    fn new(tool: Box<dyn Tool>, action: Action, way: &'static str, options: &'static [&'static str]) -> Self {
        let action_name = if action == Action::Incremental { "incremental" } else { "" };
        let words = [tool.name(), action_name, way].into_iter().chain(options.iter().copied());
        let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        let name = format!("pgbench beside {}", words.join(" "));
        Self { tool, action, way, options, name }
    }
}

fn measure(args: &TpsArgs, site: &Site, recorder: &mut Recorder, beside: Option<&mut Beside>) -> Result<()> {
    let server = site.server().ok_or_else(|| Error::new("no server"))?;
    let mut pgbench = server.tool("pgbench")?;
    let (seconds, clients) = (args.seconds.to_string(), args.clients.to_string());
    pgbench.args(["-n", "-T", &seconds, "-c", &clients, "-j", "2"]);
    let name = beside.as_ref().map_or(ALONE, |beside| &beside.name).to_owned();
    let (tool, way) = beside.as_ref().map_or(("none", ""), |beside| (beside.tool.name(), beside.way));
    let way = if beside.as_ref().is_some_and(|beside| !beside.options.is_empty()) { "max-rate" } else { way };
    let facts = Facts {
        tool: tool.to_owned(),
        action: "tps".to_owned(),
        way: way.to_owned(),
        cache: "warm".to_owned(),
        cluster: "pgbench".to_owned(),
        jobs: Some(args.tools.jobs()),
        ..Facts::default()
    };
    let loops = beside.map(|beside| Loop::start(site, beside, args.pause)).transpose()?;
    if let Some(loops) = loops.as_ref().filter(|_| recorder.round == 1) {
        recorder.notes.commands.push(format!("{}  # in a loop beside", loops.shown));
    }
    let mut tps = None;
    let run = |command: &mut Command| {
        let mut usage = site.measure(command, &Start { caches: Caches::Warm(Vec::new()), memory_len: 0 })?;
        tps = tps_in(&usage.output);
        // What runs beside it is what is measured.
        usage.others = 0.0;
        Ok(usage)
    };
    recorder.measure(Step::named(name.clone(), Vec::new()), site.scratch(), site.bytes()?, pgbench, run, || Ok(0))?;
    let count = loops.map(|loops| loops.count(site)).transpose();
    let (Ok(count), Some(tps)) = (&count, tps) else {
        recorder.samples.pop();
        return count.map(drop).and(Err(Error::new("pgbench printed no tps")));
    };
    say(&format!(
        "  {name}: {tps:.0} tps{}",
        count.map_or_else(String::new, |count| format!(", {count} backups done"))
    ));
    if let Some(sample) = recorder.samples.last_mut() {
        sample.facts = Facts { tps: Some(tps), ..facts };
    }
    Ok(())
}

/// Backups, one after the other, until this is dropped.
struct Loop {
    shell: Child,
    log: PathBuf,
    /// The backup's command, for people.
    shown: String,
}

const SCRIPT: &str = "log=$1; err=$2; old=$3; pause=$4; shift 4
while :; do
    if [ -n \"$old\" ]; then rm -rf \"$old\"; fi
    \"$@\" > /dev/null 2>> \"$err\" || exit 1
    echo done >> \"$log\"
    if [ \"$pause\" -gt 0 ]; then sleep \"$pause\"; fi
done";

impl Loop {
    fn start(site: &Site, beside: &mut Beside, pause: u32) -> Result<Self> {
        let scratch = site.scratch();
        beside.tool.prepare(site)?;
        let mut command = |action| beside.tool.command(site, action, beside.way, Path::new(""));
        let incremental = beside.action == Action::Incremental;
        if incremental {
            succeed(&mut command(Action::Full)?)?;
            // A detector that refuses does so now.
            succeed(&mut command(Action::Incremental)?)?;
        }
        let command = command(beside.action)?;
        let pause = if incremental { pause } else { 0 };
        let options = beside.options.iter().map(|option| format!(" {option}")).collect::<String>();
        let shown = scratch.shown(&command) + &options;
        let log = scratch.user().make_dir(scratch.work(), "beside").map(|dir| dir.join("log"));
        let log = log.unwrap_or_else(|_| scratch.path("beside").join("log"));
        let err = log.with_extension("err");
        for path in [&log, &err] {
            let _ = std::fs::remove_file(path);
        }
        let old = match !incremental && ["pgstrata", "pg_basebackup"].contains(&beside.tool.name()) {
            true => beside.tool.repo().to_owned(),
            false => PathBuf::new(),
        };
        let mut shell = scratch.program("sh");
        shell.args(["-c", SCRIPT, "sh"]).arg(&log).arg(err).arg(old).arg(pause.to_string());
        shell.arg(command.get_program());
        shell.args(command.get_args()).args(beside.options);
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                shell.env(name, value);
            }
        }
        shell.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let shell = shell.spawn().map_err(|e| cannot("run", Path::new("sh"), e))?;
        Ok(Self { shell, log, shown })
    }

    /// Ends it, and says how many backups were done.
    fn count(mut self, site: &Site) -> Result<usize> {
        let ended = self.shell.try_wait().ok().flatten();
        let done = std::fs::read_to_string(&self.log).unwrap_or_default().lines().count();
        match ended {
            None => Ok(done),
            Some(status) => {
                let complaint = std::fs::read_to_string(self.log.with_extension("err")).unwrap_or_default();
                let work = site.scratch().work().display().to_string();
                Err(Error::new(format!("a backup failed ({status}): {}", short(&complaint.replace(&work, "WORK")))))
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.shell.id()).ok().and_then(Pid::from_raw) {
            // It fails only if all of them have ended, which is what was wanted.
            let _ = kill_process_group(group, Signal::TERM);
            let _ = self.shell.wait();
            let deadline = Instant::now() + ENDING;
            // A backup may live a little longer than the shell, and what comes next wants its repository's place.
            while test_kill_process_group(group).is_ok() && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
        }
    }
}

/// 1234.5 of `tps = 1234.5 (without initial connection time)`.
fn tps_in(printed: &str) -> Option<f64> {
    printed.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok())
}

fn report(args: &TpsArgs, site: &Site, recorder: &Recorder, found: &[String], peers: &str) -> Result<()> {
    let mut steps: Vec<Step> = Vec::new();
    for sample in &recorder.samples {
        if !steps.contains(&sample.step) {
            steps.push(sample.step);
        }
    }
    let (seconds, clients, common) = (args.seconds, args.clients, &args.common);
    Run {
        name: common.name.clone().unwrap_or_else(|| format!("tps-{}", args.scale)),
        title: format!(
            "{}; PostgreSQL {}; pgbench for {seconds} s by {clients} clients, alone and beside backups in a loop; {} s between incrementals",
            site.describe(),
            args.major,
            args.pause
        ),
        command: scratch::typed(),
        settings: format!("The server's settings: {}, fsync = on", site.settings()),
        legend: LEGEND,
        found: tps_table(recorder, &steps) + &found.iter().map(|line| format!("{line}\n")).collect::<String>(),
        appendix: String::new(),
        steps: &steps,
        recorder,
        scratch: site.scratch(),
        versions: machine::versions(site.server()) + peers,
    }
    .write()
}

fn tps_table(recorder: &Recorder, steps: &[Step]) -> String {
    let median = |step: &Step| {
        let of = |sample: &crate::report::Sample| sample.facts.tps.filter(|_| sample.step == *step);
        Spread::of(recorder.samples.iter().filter_map(of).collect()).unwrap_or_default().median
    };
    let alone = steps.iter().find(|step| step.name == ALONE).map_or(0.0, &median);
    let row = |step: &Step| {
        let tps = median(step);
        format!("{:<60} {tps:>8.0} {:>6.2}\n", step.name, tps / alone)
    };
    let rows: String = steps.iter().map(row).collect();
    format!("\n{:<60} {:>8} {:>6}\n{rows}", "transactions a second, medians", "tps", "of all")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_found_in_what_pgbench_prints() {
        let printed = "latency average = 2.1 ms\ninitial connection time = 5.1 ms\ntps = 1931.5 (without initial connection time)\n";
        assert_eq!(tps_in(printed), Some(1931.5));
        assert_eq!(tps_in("no such line"), None);
    }
}
