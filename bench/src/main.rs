//! Workloads, peers and measurements: how fast a night with pgstrata is on this machine, and beside what.
//!
//! `nightly` makes a throwaway cluster and runs the commands of a night on it, each several times and in turns with its
//! peers; `kernels` times the inner loops alone. Every command is measured from outside, as a whole process; what is
//! printed is kept, with every raw sample, under `bench/runs/`.
//!
//! | file | what it knows |
//! |---|---|
//! | `nightly` | the rounds: which command runs when, and on what |
//! | `stage` | the cluster, its server, the scratch directory, and the removal of all three |
//! | `measure` | one command as a process: time, processor time, memory |
//! | `report` | samples to tables and files |
//! | `machine` | what it ran on |
//! | `torture` | what is killed and crowded, and whether anything is lost |
//! | `kernels` | the inner loops, in this process |
//! | `read` | the bound of all backups: reading everything |

mod kernels;
mod machine;
mod measure;
mod nightly;
mod read;
mod report;
mod stage;
mod torture;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use testdata::Error;

/// Measures pgstrata beside its peers.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Cli {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Subcommand)]
enum Workload {
    Nightly(NightlyArgs),
    Kernels(KernelArgs),
    Read(ReadArgs),
    Torture(TortureArgs),
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

    /// On a busy machine: before each command, wait for so long at most until nobody else computes, and repeat rounds in
    /// which somebody did.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    patience: u64,

    /// Keep the cluster, the last repository and the last copies.
    #[arg(long)]
    keep: bool,

    /// Work in a new directory inside this one [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Names the directory of the results: bench/runs/DATE-NAME [default: nightly-SCALE].
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
}

/// The inner loops, on one core: page checksum, fingerprint, compression.
#[derive(Args)]
struct KernelArgs {
    /// Take the pages of this relation file instead of synthetic ones.
    #[arg(long, value_name = "FILE")]
    pages: Option<PathBuf>,
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
    let done = match Cli::parse().workload {
        Workload::Nightly(args) => nightly::run(&args),
        Workload::Kernels(args) => kernels::run(args.pages.as_deref()).map(|table| print!("{table}")),
        Workload::Torture(args) => torture::run(&args),
        Workload::Read(args) => read::run(&args.data_dir, args.jobs),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
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
