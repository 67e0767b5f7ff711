//! From samples to a table for people and files for later: `bench/runs/DATE-NAME/`.
//!
//! Every raw sample is kept. Nothing in these files says where on the machine anything was, or whose machine it is.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use testdata::Result;

use crate::measure::Usage;
use crate::record::Recorder;
use crate::scratch::Scratch;
use crate::{cannot, machine, page};

const GB: f64 = 1e9;
const MB: f64 = 1e6;
const BLOCK_LEN: f64 = 8192.0;
/// Of all processors' time: what others may use while a command runs.
pub const DISTURBED: f64 = 0.15;

/// What the table's columns are, where commands work on a cluster.
pub const LEGEND: &str = "Medians; rates are over the cluster's bytes. CPU: user and system of the process and its \
    children; server: of\nPostgreSQL on its behalf. Peak: resident memory of the largest process. Read: from the \
    repository or the cluster, as\npgstrata says it. Written: what it left on disk.\n";

/// What is measured: a row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// For the table.
    pub name: &'static str,
    /// What it is compared with.
    peers: &'static [Step],
}

impl Step {
    /// A step that is compared with nothing.
    pub const fn alone(name: &'static str) -> Self {
        Self { name, peers: &[] }
    }

    /// A step that is compared with others.
    pub const fn beside(name: &'static str, peers: &'static [Step]) -> Self {
        Self { name, peers }
    }

    /// A step whose name is put together as the workload goes; there are some dozens of them, which stay until the program ends.
    pub fn named(name: String, peers: Vec<Step>) -> Self {
        Self { name: name.leak(), peers: peers.leak() }
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// One command, once.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What it was.
    pub step: Step,
    /// In which round, from 1.
    pub round: u32,
    /// What it took.
    pub usage: Usage,
    /// The length of all files of the cluster but the WAL, by which rates are told.
    pub cluster_bytes: u64,
    /// What it left on disk.
    pub bytes_written: u64,
    /// What it read, if it says so.
    pub bytes_read: Option<u64>,
    /// Blocks that a backup found changed.
    pub blocks_changed: Option<u64>,
    /// The machine's load of the minute before.
    pub load: String,
    /// What a chart sorts it by.
    pub facts: Facts,
}

/// What a chart sorts samples by; what is empty or `None` is not known, or says nothing about the command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Whose command it was: `pgstrata`, `pg_basebackup`, `pgbackrest`, ..., or `limit` for what bounds all of them.
    pub tool: String,
    /// What it did, the same word for all tools: `full`, `incremental`, `restore-full`, `restore-last`, `merge`, `verify`, `read`,
    /// `compress`, `copy`, `write`, `tps`.
    pub action: String,
    /// In which way, where the tool has several: `scan`, `wal`, `tar`.
    pub way: String,
    /// `warm` or `cold`.
    pub cache: String,
    /// `pgbench`, `mixed` or `synthetic`.
    pub cluster: String,
    /// How the cluster was changed before: `uniform`, `zipf`, `append`, `hot`, `vacuum`.
    pub churn: String,
    /// How much of it, in percent of its blocks, was asked to change.
    pub share_changed: Option<f64>,
    /// How many incrementals lie between the full backup and this one, in a history of nights.
    pub night: Option<u32>,
    /// Its workers.
    pub jobs: Option<u32>,
    /// All bytes of the tool's repository afterwards.
    pub stored_bytes: Option<u64>,
    /// Transactions a second of the load that ran beside it.
    pub tps: Option<f64>,
    /// A name of the cluster's size, in runs with several; the step's name ends with it.
    pub size: String,
}

impl Facts {
    const COLUMNS: &str = "tool,action,way,cache,cluster,churn,share_changed,night,jobs,stored_bytes,tps,size";

    fn fields(&self) -> String {
        fn shown<T: ToString>(value: Option<T>) -> String {
            value.map_or_else(String::new, |value| value.to_string())
        }
        let Self { tool, action, way, cache, cluster, churn, share_changed, night, jobs, stored_bytes, tps, size } =
            self;
        let (share, night, jobs) = (shown(*share_changed), shown(*night), shown(*jobs));
        let (stored, tps) = (shown(*stored_bytes), shown(*tps));
        format!("{tool},{action},{way},{cache},{cluster},{churn},{share},{night},{jobs},{stored},{tps},{size}")
    }
}

impl Sample {
    /// Whether others used so much of the machine that the sample says little.
    pub fn is_disturbed(&self) -> bool {
        self.usage.others > DISTURBED
    }
}

/// What else a run found out.
#[derive(Debug, Default)]
pub struct Notes {
    /// The commands of the first round.
    pub commands: Vec<String>,
    /// Load averages before the first round.
    pub load_before: String,
    /// Load averages after the last round.
    pub load_after: String,
}

/// A run that is done.
pub struct Run<'a> {
    /// Names the directory of the results.
    pub name: String,
    /// What it was, in a line.
    pub title: String,
    /// What to type for the same.
    pub command: String,
    /// What else belongs to the commands.
    pub settings: String,
    /// What the columns are.
    pub legend: &'static str,
    /// What was found out besides, in lines.
    pub found: String,
    /// Another table.
    pub appendix: String,
    /// The rows.
    pub steps: &'a [Step],
    /// The samples.
    pub recorder: &'a Recorder,
    /// Where it was.
    pub scratch: &'a Scratch,
    /// With what.
    pub versions: String,
}

impl Run<'_> {
    /// Prints the summary and writes the run's files.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self) -> Result<()> {
        let summary = self.summary();
        print!("{summary}");
        let directory = make_directory(&self.name)?;
        let Recorder { samples, notes, .. } = self.recorder;
        let loads =
            format!("load         {} before, {} after (1, 5, 15 minutes)\n", notes.load_before, notes.load_after);
        for (name, text) in [
            ("samples.csv", csv(samples)),
            ("machine.txt", machine::machine(self.scratch.work())? + &loads),
            ("command.txt", self.commands()),
            ("versions.txt", self.versions.clone()),
            ("summary.txt", summary),
        ] {
            let path = directory.join(name);
            fs::write(&path, text).map_err(|e| cannot("write", &path, e))?;
        }
        page::write(std::slice::from_ref(&directory), None)?;
        println!("\nwritten to {}", directory.display());
        Ok(())
    }

    fn commands(&self) -> String {
        let mut text = format!("cargo run --release -p bench -- {}\n\n{}\n", self.command, self.settings);
        self.recorder.notes.commands.iter().for_each(|command| {
            let _ = writeln!(text, "  {command}");
        });
        text
    }

    fn summary(&self) -> String {
        let samples = &self.recorder.samples;
        let mut text = format!("{}\n\n{}\n{}", self.title, table(samples, self.steps), self.legend);
        text += &self.found;
        text += &disturbances(samples);
        let ratios = ratios(samples, self.steps);
        if !ratios.is_empty() {
            text += &format!("\nSpeed beside the peers in the same round (2.00: twice as fast; medians):\n{ratios}");
        }
        if !self.appendix.is_empty() {
            text += &format!("\n{}", self.appendix);
        }
        text
    }
}

/// A new directory `bench/runs/DATE-NAME`, with a number if there is one already.
fn make_directory(name: &str) -> Result<PathBuf> {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
    fs::create_dir_all(&runs).map_err(|e| cannot("make", &runs, e))?;
    let base = format!("{}-{name}", jiff::Zoned::now().date());
    let numbered = |number: u32| if number == 1 { base.clone() } else { format!("{base}-{number}") };
    for number in 1.. {
        let directory = runs.join(numbered(number));
        match fs::create_dir(&directory) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| directory.clone()).map_err(|e| cannot("make", &directory, e)),
        }
    }
    Err(cannot("make a directory in", &runs, "all names are taken"))
}

fn csv(samples: &[Sample]) -> String {
    let mut text = "step,round,wall_s,user_s,sys_s,server_cpu_s,others,peak_rss_bytes,cluster_bytes,bytes_written,\
                    blocks_changed,load_1min,bytes_read,proc_read_bytes,proc_disk_read_bytes,"
        .to_owned();
    text += &format!("{}\n", Facts::COLUMNS);
    for Sample { step, round, usage, cluster_bytes, bytes_written, bytes_read, blocks_changed, load, facts } in samples
    {
        let [wall, user, sys, server] =
            [usage.wall, usage.user, usage.sys, usage.server].map(|time| time.as_secs_f64());
        let [changed, read] =
            [blocks_changed, bytes_read].map(|count| count.map_or_else(String::new, |n| n.to_string()));
        let _ = writeln!(
            text,
            "\"{}\",{round},{wall:.6},{user:.6},{sys:.6},{server:.2},{:.3},{},{cluster_bytes},{bytes_written},{changed},{load},{read},{},{},{}",
            step.name,
            usage.others,
            usage.peak_rss,
            usage.read,
            usage.disk_read,
            facts.fields()
        );
    }
    text
}

/// Which samples do not count, and which should not.
fn disturbances(samples: &[Sample]) -> String {
    let disturbed = samples.iter().filter(|sample| sample.is_disturbed()).count();
    let mut text = String::new();
    if disturbed > 0 {
        let (all, percent) = (samples.len(), DISTURBED * 100.0);
        let _ = writeln!(
            text,
            "{disturbed} of {all} samples are left out: others used more than {percent} % of the machine."
        );
    }
    let mut named: Vec<&str> = Vec::new();
    for Sample { step, .. } in samples {
        let mut own = samples.iter().filter(|sample| sample.step == *step);
        if !named.contains(&step.name) && own.all(Sample::is_disturbed) {
            named.push(step.name);
            let _ = writeln!(text, "All samples of {:?} are disturbed: its numbers are worth little.", step.name);
        }
    }
    text
}

fn table(samples: &[Sample], steps: &[Step]) -> String {
    let mut text = format!(
        "{:<44} {:>5} {:>8}  {:>19} {:>6} {:>7} {:>7} {:>8} {:>10} {:>10}\n",
        "", "runs", "wall s", "min .. max", "GB/s", "CPU s", "server", "peak MB", "read MB", "written MB"
    );
    for step in steps {
        let of = |value: fn(&Sample) -> f64| spread(samples, *step, value);
        let Some(Spread { count, min, median, max }) = of(|s| s.usage.wall.as_secs_f64()) else { continue };
        let middle = |value| of(value).map_or(0.0, |spread| spread.median);
        let tells = samples.iter().any(|sample| sample.step == *step && sample.bytes_read.is_some());
        let read = || format!("{:.1}", middle(|s| s.bytes_read.unwrap_or(0) as f64) / MB);
        let _ = writeln!(
            text,
            "{:<44} {count:>5} {median:>8.3}  {:>19} {:>6.2} {:>7.2} {:>7.2} {:>8.0} {:>10} {:>10.1}",
            step.name,
            format!("{min:.3} .. {max:.3}"),
            middle(|s| s.cluster_bytes as f64) / median / GB,
            middle(|s| (s.usage.user + s.usage.sys).as_secs_f64()),
            middle(|s| s.usage.server.as_secs_f64()),
            middle(|s| s.usage.peak_rss as f64) / MB,
            if tells { read() } else { "-".to_owned() },
            middle(|s| s.bytes_written as f64) / MB,
        );
    }
    text
}

/// How many blocks these incrementals found changed.
pub fn changed(samples: &[Sample], steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        let blocks = spread(samples, *step, |s| s.blocks_changed.unwrap_or(0) as f64);
        let cluster = spread(samples, *step, |s| s.cluster_bytes as f64 / BLOCK_LEN);
        if let (Some(blocks), Some(cluster)) = (blocks, cluster) {
            let percent = blocks.median / cluster.median * 100.0;
            let _ = writeln!(text, "{}: {} blocks ({percent:.2} %) differed", step.name, blocks.median);
        }
    }
    text
}

fn ratios(samples: &[Sample], steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        let of = |peer: &Step| Some(format!("{:.2} {}", ratio(samples, *step, *peer)?, peer.name));
        let beside = step.peers.iter().filter_map(of).collect::<Vec<_>>().join("; ");
        if !beside.is_empty() {
            let _ = writeln!(text, "{:<44} {beside}", step.name);
        }
    }
    text
}

/// How many times longer a peer took in the same round, the median of all rounds without disturbance, or of all rounds if there are
/// none of these. What burdens the machine for minutes burdens both.
fn ratio(samples: &[Sample], own: Step, peer: Step) -> Option<f64> {
    let in_round = |step, round| samples.iter().find(|sample: &&Sample| (sample.step, sample.round) == (step, round));
    let pairs = samples.iter().filter(|sample| sample.step == own);
    let pairs: Vec<(&Sample, &Sample)> = pairs.filter_map(|own| Some((own, in_round(peer, own.round)?))).collect();
    let wall = |sample: &Sample| sample.usage.wall.as_secs_f64();
    let of = |(own, peer): &(&Sample, &Sample)| wall(peer) / wall(own);
    let quiet = |(own, peer): &&(&Sample, &Sample)| !own.is_disturbed() && !peer.is_disturbed();
    let undisturbed: Vec<f64> = pairs.iter().filter(quiet).map(of).collect();
    let all = if undisturbed.is_empty() { pairs.iter().map(of).collect() } else { undisturbed };
    Spread::of(all).map(|spread| spread.median)
}

/// Values in short.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// The least.
    pub min: f64,
    /// The one in the middle, or between the two there.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

/// The spread of a value over the undisturbed samples of a step, over all if there are none of these; `None` without any.
fn spread(samples: &[Sample], step: Step, value: fn(&Sample) -> f64) -> Option<Spread> {
    let samples = || samples.iter().filter(|sample| sample.step == step);
    let mut values: Vec<f64> = samples().filter(|sample| !sample.is_disturbed()).map(value).collect();
    if values.is_empty() {
        values = samples().map(value).collect();
    }
    Spread::of(values)
}

impl Spread {
    /// Of a single value.
    pub fn one(value: f64) -> Self {
        Self { count: 1, min: value, median: value, max: value }
    }

    /// `None` without any value.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let odd = values.len() % 2 == 1;
        let median = if odd { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { count: values.len(), min, median, max })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const CAT: Step = Step::alone("cat");
    const CHANGED: Step = Step::alone("pgstrata incremental, 1 % changed");
    const UNCHANGED: Step = Step::beside("pgstrata incremental, unchanged", &[CAT]);

    fn sample(step: Step, round: u32, seconds: u64) -> Sample {
        let usage = Usage { wall: Duration::from_secs(seconds), ..Usage::default() };
        let (cluster_bytes, blocks_changed) = (8_192_000, Some(10));
        Sample {
            step,
            round,
            usage,
            cluster_bytes,
            bytes_written: 5,
            bytes_read: Some(8),
            blocks_changed,
            load: "0.1".to_owned(),
            facts: Facts { tool: "pgstrata".to_owned(), share_changed: Some(0.1), ..Facts::default() },
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let samples = [4, 1, 2, 9].map(|seconds| sample(CAT, 1, seconds));
        let spread = spread(&samples, CAT, |s| s.usage.wall.as_secs_f64());
        assert_eq!(spread, Some(Spread { count: 4, min: 1.0, median: 3.0, max: 9.0 }));
    }

    #[test]
    fn disturbed_samples_count_only_where_there_are_no_others() {
        let mut samples = [4, 1, 2].map(|seconds| sample(CAT, 1, seconds));
        samples[0].usage.others = 0.5;
        let median = |samples: &[Sample]| spread(samples, CAT, |s| s.usage.wall.as_secs_f64()).unwrap().median;
        assert_eq!(median(&samples), 1.5);
        assert!(!disturbances(&samples).contains("little"));
        samples.iter_mut().for_each(|sample| sample.usage.others = 0.5);
        assert_eq!(median(&samples), 2.0);
        assert!(disturbances(&samples).contains("little"));
    }

    #[test]
    fn steps_that_did_not_run_are_neither_rows_nor_peers() {
        let samples = [sample(CAT, 1, 2), sample(UNCHANGED, 1, 4)];
        assert_eq!(table(&samples, &[UNCHANGED, CHANGED, CAT]).lines().count(), 3);
        let ratios = ratios(&samples, &[UNCHANGED, CHANGED]);
        assert_eq!(ratios, "pgstrata incremental, unchanged              0.50 cat\n");
        let changed = changed(&samples, &[UNCHANGED, CHANGED]);
        assert_eq!(changed, "pgstrata incremental, unchanged: 10 blocks (1.00 %) differed\n");
    }

    #[test]
    fn peers_are_compared_in_the_same_round() {
        let in_round = |round, own, peer| [sample(UNCHANGED, round, own), sample(CAT, round, peer)];
        let mut samples = [in_round(1, 1, 2), in_round(2, 10, 30), in_round(3, 1, 2)].concat();
        assert_eq!(ratio(&samples, UNCHANGED, CAT), Some(2.0));
        samples[0].usage.others = 0.5;
        samples[5].usage.others = 0.5;
        assert_eq!(ratio(&samples, UNCHANGED, CAT), Some(3.0));
    }

    #[test]
    fn every_sample_is_a_line() {
        let text = csv(&[sample(CHANGED, 3, 4)]);
        let line = "\"pgstrata incremental, 1 % changed\",3,4.000000,0.000000,0.000000,0.00,0.000,0,8192000,5,10,0.1,8,0,0,\
                    pgstrata,,,,,,0.1,,,,,";
        assert_eq!(text.lines().nth(1), Some(line));
        assert_eq!(text.lines().next().unwrap().split(',').count(), 27);
    }
}
