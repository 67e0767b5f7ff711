//! From samples to a table for people and files for later: `bench/runs/DATE-NAME/`.
//!
//! Every raw sample is kept. Nothing in these files says where on the machine anything was, or whose machine it is.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use testdata::Result;

use crate::measure::Usage;
use crate::stage::Stage;
use crate::{NightlyArgs, cannot, machine, nightly};

const GB: f64 = 1e9;
const MB: f64 = 1e6;
const BLOCK_LEN: f64 = 8192.0;
/// Of all processors' time: what others may use while a command runs.
const DISTURBED: f64 = 0.15;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reading all files in one process.
    Cat,
    /// Reading all files by several threads.
    Read,
    /// A full backup into a new repository.
    Full,
    /// An incremental after no change.
    Unchanged,
    /// An incremental after a change of about 1 %.
    Changed,
    /// Checking everything in the repository.
    Verify,
    /// Restoring the full backup.
    RestoreFull,
    /// Restoring the last incremental.
    RestoreLast,
    /// PostgreSQL's own backup into a directory.
    BasebackupPlain,
    /// PostgreSQL's own backup, compressed by the server.
    BasebackupTar,
    /// Copying a restored directory, and sync.
    Copy,
}

impl Step {
    /// In the table's order.
    pub const ALL: [Step; 11] = [
        Step::Full,
        Step::Unchanged,
        Step::Changed,
        Step::Verify,
        Step::RestoreFull,
        Step::RestoreLast,
        Step::Cat,
        Step::Read,
        Step::BasebackupPlain,
        Step::BasebackupTar,
        Step::Copy,
    ];

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Step::Cat => "cat",
            Step::Read => "parallel read",
            Step::Full => "pgstrata full",
            Step::Unchanged => "pgstrata incremental, unchanged",
            Step::Changed => "pgstrata incremental, 1 % changed",
            Step::Verify => "pgstrata verify, all three",
            Step::RestoreFull => "pgstrata restore of the full",
            Step::RestoreLast => "pgstrata restore of the last",
            Step::BasebackupPlain => "pg_basebackup plain",
            Step::BasebackupTar => "pg_basebackup tar, server zstd 1",
            Step::Copy => "cp -a and sync",
        }
    }

    /// What it is compared with.
    fn peers(self) -> &'static [Step] {
        match self {
            Step::Full => &[Step::Cat, Step::Read, Step::BasebackupPlain, Step::BasebackupTar],
            Step::Unchanged | Step::Changed => &[Step::Cat, Step::Read, Step::BasebackupPlain],
            Step::RestoreFull | Step::RestoreLast => &[Step::Cat, Step::Copy],
            _ => &[],
        }
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
    /// Blocks that a backup found changed.
    pub blocks_changed: Option<u64>,
    /// The machine's load of the minute before.
    pub load: String,
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
    /// Why the compressed `pg_basebackup` was left out.
    pub tar_skipped: Option<String>,
    /// The table of the kernels.
    pub kernels: String,
    /// Load averages before the first round.
    pub load_before: String,
    /// Load averages after the last round.
    pub load_after: String,
}

/// Prints the summary and writes the run's files.
///
/// # Errors
/// When they cannot be written.
pub fn write_run(args: &NightlyArgs, stage: &Stage, samples: &[Sample], notes: &Notes) -> Result<()> {
    let summary = summary(args, samples, notes);
    print!("{summary}");
    let directory = make_directory(args)?;
    let loads = format!("load         {} before, {} after (1, 5, 15 minutes)\n", notes.load_before, notes.load_after);
    for (name, text) in [
        ("samples.csv", csv(samples)),
        ("machine.txt", machine::machine(stage)? + &loads),
        ("command.txt", command(args, notes)),
        ("versions.txt", machine::versions(stage)),
        ("summary.txt", summary),
    ] {
        let path = directory.join(name);
        fs::write(&path, text).map_err(|e| cannot("write", &path, e))?;
    }
    println!("\nwritten to {}", directory.display());
    Ok(())
}

/// A new directory `bench/runs/DATE-NAME`, with a number if there is one already.
fn make_directory(args: &NightlyArgs) -> Result<PathBuf> {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
    fs::create_dir_all(&runs).map_err(|e| cannot("make", &runs, e))?;
    let name = args.name.clone().unwrap_or_else(|| format!("nightly-{}", args.scale));
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

fn command(args: &NightlyArgs, notes: &Notes) -> String {
    let NightlyArgs { scale, runs, major, jobs, compress, cold, patience, .. } = args;
    let cold = if *cold { " --cold" } else { "" };
    let patience = if *patience > 0 { format!(" --patience {patience}") } else { String::new() };
    let mut text = format!(
        "cargo run --release -p bench -- nightly --scale {scale} --runs {runs} --major {major} --jobs {jobs} \
         --compress {compress}{cold}{patience}\n\nThe server's settings: {}\n\nThe commands of the first round; WORK is the \
         scratch directory. Before each: CHECKPOINT, syncfs, all files read once.\n",
        nightly::settings()
    );
    notes.commands.iter().for_each(|command| {
        let _ = writeln!(text, "  {command}");
    });
    text
}

fn csv(samples: &[Sample]) -> String {
    let mut text = "step,round,wall_s,user_s,sys_s,server_cpu_s,others,peak_rss_bytes,cluster_bytes,bytes_written,\
                    blocks_changed,load_1min\n"
        .to_owned();
    for Sample { step, round, usage, cluster_bytes, bytes_written, blocks_changed, load } in samples {
        let [wall, user, sys, server] =
            [usage.wall, usage.user, usage.sys, usage.server].map(|time| time.as_secs_f64());
        let changed = blocks_changed.map_or_else(String::new, |count| count.to_string());
        let _ = writeln!(
            text,
            "\"{}\",{round},{wall:.6},{user:.6},{sys:.6},{server:.2},{:.3},{},{cluster_bytes},{bytes_written},{changed},{load}",
            step.name(),
            usage.others,
            usage.peak_rss
        );
    }
    text
}

fn summary(args: &NightlyArgs, samples: &[Sample], notes: &Notes) -> String {
    let cluster_bytes = samples.first().map_or(0, |sample| sample.cluster_bytes) as f64;
    let cache = if args.cold { "caches dropped before each command" } else { "caches warm" };
    let mut text = format!(
        "pgbench at scale {}: {:.0} MB without the WAL; PostgreSQL {}; --jobs {}, --compress {}; {cache}\n\n",
        args.scale,
        cluster_bytes / MB,
        args.major,
        args.jobs,
        args.compress
    );
    text += &table(samples);
    text += "\nMedians; rates are over the cluster's bytes. CPU: user and system of the process and its children; server: of\n\
             PostgreSQL on its behalf. Peak: resident memory of the largest process. Written: what it left on disk.\n";
    text += &disturbances(samples);
    if let Some(why) = &notes.tar_skipped {
        let _ = writeln!(text, "{} was left out: {why}", Step::BasebackupTar.name());
    }
    text += &changed(samples);
    text += "\nSpeed beside the peers (2.00: twice as fast):\n";
    text += &ratios(samples);
    text + "\n" + &notes.kernels
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
    for step in Step::ALL {
        let mut own = samples.iter().filter(|sample| sample.step == step).peekable();
        if own.peek().is_some() && own.all(Sample::is_disturbed) {
            let _ = writeln!(text, "All samples of {:?} are disturbed: its numbers are worth little.", step.name());
        }
    }
    text
}

fn table(samples: &[Sample]) -> String {
    let mut text = format!(
        "{:<34} {:>5} {:>8}  {:>17} {:>6} {:>7} {:>7} {:>8} {:>10}\n",
        "", "runs", "wall s", "min .. max", "GB/s", "CPU s", "server", "peak MB", "written MB"
    );
    for step in Step::ALL {
        let of = |value: fn(&Sample) -> f64| spread(samples, step, value);
        let Some(Spread { count, min, median, max }) = of(|s| s.usage.wall.as_secs_f64()) else { continue };
        let middle = |value| of(value).map_or(0.0, |spread| spread.median);
        let _ = writeln!(
            text,
            "{:<34} {count:>5} {median:>8.3}  {:>17} {:>6.2} {:>7.2} {:>7.2} {:>8.0} {:>10.1}",
            step.name(),
            format!("{min:.3} .. {max:.3}"),
            middle(|s| s.cluster_bytes as f64) / median / GB,
            middle(|s| (s.usage.user + s.usage.sys).as_secs_f64()),
            middle(|s| s.usage.server.as_secs_f64()),
            middle(|s| s.usage.peak_rss as f64) / MB,
            middle(|s| s.bytes_written as f64) / MB,
        );
    }
    text
}

/// How many blocks the incrementals found changed.
fn changed(samples: &[Sample]) -> String {
    let mut text = String::new();
    for step in [Step::Unchanged, Step::Changed] {
        let blocks = spread(samples, step, |s| s.blocks_changed.unwrap_or(0) as f64);
        let cluster = spread(samples, step, |s| s.cluster_bytes as f64 / BLOCK_LEN);
        if let (Some(blocks), Some(cluster)) = (blocks, cluster) {
            let percent = blocks.median / cluster.median * 100.0;
            let _ = writeln!(text, "{}: {} blocks ({percent:.2} %) differed", step.name(), blocks.median);
        }
    }
    text
}

fn ratios(samples: &[Sample]) -> String {
    let wall = |step| spread(samples, step, |s| s.usage.wall.as_secs_f64()).map(|spread| spread.median);
    let mut text = String::new();
    for step in Step::ALL {
        let Some(own) = wall(step) else { continue };
        let beside = step.peers().iter().filter_map(|peer| Some(format!("{:.2} {}", wall(*peer)? / own, peer.name())));
        let beside = beside.collect::<Vec<_>>().join("; ");
        if !beside.is_empty() {
            let _ = writeln!(text, "{:<34} {beside}", step.name());
        }
    }
    text
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    count: usize,
    min: f64,
    median: f64,
    max: f64,
}

/// The spread of a value over the undisturbed samples of a step, over all if there are none of these; `None` without any.
fn spread(samples: &[Sample], step: Step, value: fn(&Sample) -> f64) -> Option<Spread> {
    let samples = || samples.iter().filter(|sample| sample.step == step);
    let mut values: Vec<f64> = samples().filter(|sample| !sample.is_disturbed()).map(value).collect();
    if values.is_empty() {
        values = samples().map(value).collect();
    }
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
    Some(Spread { count: values.len(), min, median, max })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sample(step: Step, round: u32, seconds: u64) -> Sample {
        let usage = Usage { wall: Duration::from_secs(seconds), ..Usage::default() };
        let (cluster_bytes, blocks_changed) = (8_192_000, Some(10));
        Sample { step, round, usage, cluster_bytes, bytes_written: 5, blocks_changed, load: "0.1".to_owned() }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let samples = [4, 1, 2, 9].map(|seconds| sample(Step::Cat, 1, seconds));
        let spread = spread(&samples, Step::Cat, |s| s.usage.wall.as_secs_f64());
        assert_eq!(spread, Some(Spread { count: 4, min: 1.0, median: 3.0, max: 9.0 }));
    }

    #[test]
    fn disturbed_samples_count_only_where_there_are_no_others() {
        let mut samples = [4, 1, 2].map(|seconds| sample(Step::Cat, 1, seconds));
        samples[0].usage.others = 0.5;
        let median = |samples: &[Sample]| spread(samples, Step::Cat, |s| s.usage.wall.as_secs_f64()).unwrap().median;
        assert_eq!(median(&samples), 1.5);
        assert!(!disturbances(&samples).contains("little"));
        samples.iter_mut().for_each(|sample| sample.usage.others = 0.5);
        assert_eq!(median(&samples), 2.0);
        assert!(disturbances(&samples).contains("little"));
    }

    #[test]
    fn steps_that_did_not_run_are_neither_rows_nor_peers() {
        let samples = [sample(Step::Cat, 1, 2), sample(Step::Unchanged, 1, 4)];
        assert_eq!(table(&samples).lines().count(), 3);
        assert_eq!(ratios(&samples), "pgstrata incremental, unchanged    0.50 cat\n");
        assert_eq!(changed(&samples), "pgstrata incremental, unchanged: 10 blocks (1.00 %) differed\n");
    }

    #[test]
    fn every_sample_is_a_line() {
        let text = csv(&[sample(Step::Changed, 3, 4)]);
        let line = "\"pgstrata incremental, 1 % changed\",3,4.000000,0.000000,0.000000,0.00,0.000,0,8192000,5,10,0.1";
        assert_eq!(text.lines().nth(1), Some(line));
        assert_eq!(text.lines().next().unwrap().split(',').count(), 12);
    }
}
