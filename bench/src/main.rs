//! Workloads, peers and measurements: how fast a night with pgstrata is on this machine, and beside what.
//!
//! `compare` runs every step of every tool that backs up PostgreSQL here on one cluster, round by round, beside what bounds them all.
//! `nightly` makes a throwaway cluster and runs the commands of a night on it, each several times and in turns with its
//! peers; `merge` does the same with a month of nights; `metadata` has the metadata of a large cluster without the cluster;
//! `kernels` times the inner loops alone. Every command is measured from outside, as a whole process; what is
//! printed is kept, with every raw sample, under `bench/runs/`.
//!
//! | file | what it knows |
//! |---|---|
//! | `compare` | the tools, the clusters, what changes in them, and the rounds |
//! | `growth` | what an incremental of the same changes costs on clusters of several sizes |
//! | `tps` | a server's transactions while it is backed up |
//! | `limits` | the bounds of backups and restores |
//! | `nightly` | the rounds: which command runs when, and on what |
//! | `merge` | a month of nights, by pgstrata and by `pg_basebackup`, and what is made of them |
//! | `metadata` | a repository of a large cluster, and the commands on it |
//! | `simulated` | what fills that repository: a backup without the data |
//! | `stage` | the cluster and its server |
//! | `scratch` | the scratch directory, the same start for all commands, and the end |
//! | `measure` | one command as a process: time, processor time, memory |
//! | `memory` | what is touched before each command |
//! | `record` | rounds and their samples |
//! | `report` | samples to tables and files |
//! | `machine` | what it ran on |
//! | `runs` | the files of a run, read again |
//! | `page`, `chart` | runs to a page with charts |
//! | `regress` | whether a run is worse than an earlier one |
//! | `torture` | what is killed and crowded, and whether anything is lost |
//! | `kernels` | the inner loops, in this process |
//! | `read` | the bound of all backups: reading everything |

mod chart;
mod compare;
mod growth;
mod kernels;
mod limits;
mod machine;
mod measure;
mod memory;
mod merge;
mod metadata;
mod nightly;
mod page;
mod read;
mod record;
mod regress;
mod report;
mod runs;
mod scratch;
mod simulated;
mod stage;
mod torture;
mod tps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use testdata::Error;

/// Measures pgstrata beside its peers.
#[derive(Parser)]
#[command(name = "bench", version, arg_required_else_help = true, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Compare the results of two runs, and fail if pgstrata got worse.
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"])]
    compare: Option<Vec<PathBuf>>,

    /// With --compare: how much worse is worse.
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, requires = "compare")]
    threshold: f64,

    #[command(subcommand)]
    workload: Option<Workload>,
}

#[derive(Subcommand)]
enum Workload {
    Compare(Box<compare::CompareArgs>),
    Growth(Box<growth::GrowthArgs>),
    Tps(Box<tps::TpsArgs>),
    Nightly(NightlyArgs),
    Merge(MergeArgs),
    Metadata(MetadataArgs),
    Simulate(SimulateArgs),
    Kernels(KernelArgs),
    Limit(limits::LimitArgs),
    Read(ReadArgs),
    Touch(memory::TouchArgs),
    Torture(TortureArgs),
    Report(ReportArgs),
}

/// Full, incremental, restore and verify on a pgbench cluster, beside cat, `pg_basebackup` and cp.
#[derive(Args, Debug)]
struct NightlyArgs {
    /// pgbench's scale: 100 is a cluster of about 1.6 GB.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    scale: u32,

    /// How often each command runs.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// The major version of PostgreSQL.
    #[arg(long, value_name = "MAJOR", default_value_t = 15, value_parser = clap::value_parser!(u32).range(13..=18))]
    major: u32,

    /// pgstrata's --jobs, and the number of parallel readers beside it.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    /// pgstrata's --compress.
    #[arg(long, value_name = "METHOD", default_value = "zstd:1")]
    compress: String,

    /// Drop the kernel's caches before every command (as root).
    #[arg(long)]
    cold: bool,

    #[command(flatten)]
    common: CommonArgs,
}

/// Options of every workload with rounds.
#[derive(Args, Clone, Debug)]
struct CommonArgs {
    /// On a busy machine: before each command, wait for so long at most until nobody else computes, and repeat rounds in
    /// which somebody did.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    patience: u64,

    /// Leave out what makes virtual machines fair: touching as much memory as a command may need before it starts.
    #[arg(long)]
    no_warm_memory: bool,

    /// Keep the scratch directory.
    #[arg(long)]
    keep: bool,

    /// Work in a new directory inside this one [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Names the directory of the results: bench/runs/DATE-NAME [default: the workload and its size].
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
}

impl CommonArgs {
    /// The options as they were given, for whoever wants to do the same.
    fn shown(&self) -> String {
        let patience = if self.patience > 0 { format!(" --patience {}", self.patience) } else { String::new() };
        patience + if self.no_warm_memory { " --no-warm-memory" } else { "" }
    }

    /// What happens last before each command, for whoever reads the results.
    fn shown_memory(&self) -> &'static str {
        if self.no_warm_memory {
            ""
        } else {
            "Right before each, as much memory as it may need is touched and freed.\n"
        }
    }
}

/// Merging a month of nights and restoring the outcome, beside `pg_combinebackup` and cp.
#[derive(Args, Debug)]
struct MergeArgs {
    /// pgbench's scale: 300 is a cluster of about 4.5 GB.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    scale: u32,

    /// Backups in the history: a full one and the incrementals of the nights after it.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(2..))]
    nights: u32,

    /// How often each command runs.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// pgstrata's --jobs.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    #[command(flatten)]
    common: CommonArgs,
}

/// The commands that read and write metadata only, in a repository of a large cluster that has no data.
#[derive(Args, Debug)]
struct MetadataArgs {
    /// The cluster's size in TiB. For each, about 2.3 GB are written.
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    terabytes: f64,

    /// The cluster's files.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,

    /// One block of so many changes before each incremental; the changed ones are scattered.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    one_in: u32,

    /// Incrementals after the full backup.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..))]
    nights: u32,

    /// How often each command runs that can be repeated.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    /// Number of workers.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    #[command(flatten)]
    common: CommonArgs,
}

/// One step of `metadata` that pgstrata has no command for, as a process of its own.
#[derive(Args, Debug)]
#[command(hide = true)]
struct SimulateArgs {
    /// Number of workers.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    /// The repository.
    #[arg(long)]
    repo: PathBuf,

    #[command(subcommand)]
    what: Simulated,
}

#[derive(Subcommand, Debug)]
enum Simulated {
    /// A full backup into a new repository.
    Full {
        /// Blocks of the cluster.
        #[arg(long)]
        blocks: u64,
        /// Its files.
        #[arg(long)]
        files: u32,
    },
    /// An incremental.
    Incremental {
        /// One block of so many changed.
        #[arg(long)]
        one_in: u32,
    },
    /// What a restore does before it reads a chunk.
    Restore {
        /// Of which backup.
        backup: String,
    },
}

/// The inner loops, on one core: page checksum, fingerprint, compression.
#[derive(Args)]
struct KernelArgs {
    /// Take the pages of this relation file instead of synthetic ones.
    #[arg(long, value_name = "FILE")]
    pages: Option<PathBuf>,

    /// Read the WAL of this stopped data directory, too.
    #[arg(long, value_name = "DIR")]
    wal: Option<PathBuf>,
}

/// Kills commands at random moments and runs others beside each other, on a live server under load, and sees that nothing
/// is lost.
#[derive(Args, Debug)]
struct TortureArgs {
    /// How many rounds.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// What everything random follows from.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// The major version of PostgreSQL.
    #[arg(long, value_name = "MAJOR", default_value_t = 18, value_parser = clap::value_parser!(u32).range(13..=18))]
    major: u32,
}

/// Makes the page with charts of a run again, or one page of several runs.
#[derive(Args, Debug)]
struct ReportArgs {
    /// Directories of results: bench/runs/DATE-NAME.
    #[arg(required = true, value_name = "DIR")]
    runs: Vec<PathBuf>,

    /// Where to write the page [default: report.html in the first directory].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Reads every file of a data directory that a backup reads; `nightly` runs this beside cat.
#[derive(Args)]
#[command(hide = true)]
struct ReadArgs {
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    /// The data directory.
    data_dir: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (&cli.compare, cli.workload) {
        (Some(runs), _) => compare_runs(runs, cli.threshold),
        (None, Some(workload)) => run(workload).map(|()| ExitCode::SUCCESS),
        (None, None) => Err(Error::new("nothing to do: see --help")),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

fn run(workload: Workload) -> Result<(), Error> {
    match workload {
        Workload::Compare(args) => compare::run(&args),
        Workload::Growth(args) => growth::run(&args),
        Workload::Tps(args) => tps::run(&args),
        Workload::Nightly(args) => nightly::run(&args),
        Workload::Merge(args) => merge::run(&args),
        Workload::Metadata(args) => metadata::run(&args),
        Workload::Simulate(args) => simulated::run(&args).map(|facts| println!("{facts}")),
        Workload::Kernels(args) => {
            kernels::run(args.pages.as_deref(), args.wal.as_deref()).map(|table| print!("{table}"))
        }
        Workload::Torture(args) => torture::run(&args),
        Workload::Limit(args) => limits::run(&args),
        Workload::Read(args) => read::run(&args.data_dir, args.jobs),
        Workload::Touch(args) => memory::run(&args),
        Workload::Report(args) => {
            page::write(&args.runs, args.out.as_deref()).map(|path| println!("written to {}", path.display()))
        }
    }
}

/// Prints the comparison of two runs; a failure if something got worse.
fn compare_runs(runs: &[PathBuf], threshold: f64) -> Result<ExitCode, Error> {
    let [old, new] = runs else { return Err(Error::new("--compare takes two directories")) };
    let comparison = regress::compare(old, new, threshold / 100.0)?;
    print!("{}", comparison.text);
    Ok(if comparison.regressions > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The name becomes part of a directory's.
fn parse_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("letters, digits, -, _ and . only".to_owned()),
    }
}

/// The error of an operation on a file.
fn cannot(verb: &str, path: &Path, source: impl std::fmt::Display) -> Error {
    Error::new(format!("cannot {verb} {}: {source}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_name_cannot_lead_out_of_the_results() {
        assert!(["", "../x", "a/b", "a b"].iter().all(|name| parse_name(name).is_err()));
        assert_eq!(parse_name("scale-100_v0.1"), Ok("scale-100_v0.1".to_owned()));
    }
}
