//! `compare`: pgstrata beside everything else that backs up PostgreSQL here, on one cluster, and beside what bounds them all.
//!
//! ```text
//! once:        the cluster; a history of nights, by every tool that has incrementals
//! each round:  limits; for each tool a full backup into an empty repository, and its restore
//!              for each share of change: the cluster changes; an incremental by each tool, in each of its ways
//!              for each tool the restore of the last incremental: of the history if there is one; merge and verify
//! ```
//!
//! The rounds are repeated rather than the commands: whatever drifts, drifts for all alike. Each round begins with another tool. With `--cache both` every other round drops
//! the kernel's caches before each command. A peer that fails is left out from there on, and the report says why; so does a detector
//! of pgstrata that refuses. In the first round what was restored is proved: a server starts on it and has the rows of the cluster, or,
//! without a server, its files are those of the cluster.
//!
//! | file | what it knows |
//! |---|---|
//! | `site` | the cluster, with a server or without |
//! | `churn` | what changes between backups, and how much |
//! | `mixed` | tables that are like those of people |
//! | `tools` | how each tool is called |
//! | `rounds` | what runs when |
//! | `attic` | what was restored, and is in the way |
//! | `proof` | whether what was restored is right |

mod attic;
pub mod churn;
mod mixed;
mod proof;
pub mod rounds;
pub mod site;
pub mod tools;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use testdata::Result;

use self::churn::Churn;
use self::rounds::Rounds;
use self::site::{Kind, Site};
use crate::record::Recorder;
use crate::report::{LEGEND, Run, Sample, Step, changed};
use crate::scratch::{self, Scratch, must_drop_caches};
use crate::{CommonArgs, machine};

const MB: f64 = 1e6;

/// Every step of every tool on one cluster: full, incremental by share of change, restore, merge, verify, and the machine's limits.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// What cluster everybody backs up.
    #[command(flatten)]
    pub site: SiteArgs,

    /// How the tools are called.
    #[command(flatten)]
    pub tools: ToolArgs,

    /// How the cluster changes between backups.
    #[arg(long, value_name = "MODEL,...", value_enum, value_delimiter = ',', default_value = "uniform")]
    pub churn: Vec<Churn>,

    /// How much of its blocks changes before each incremental, in percent; one incremental for each.
    #[arg(long, value_name = "PERCENT,...", value_delimiter = ',', default_value = "0,0.1,1,10", value_parser = parse_share)]
    pub change: Vec<f64>,

    /// Incrementals in the history whose last one is restored; 0 for no history.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=60))]
    pub nights: u32,

    /// How much changes in each of these nights, in percent of the blocks.
    #[arg(long, value_name = "PERCENT", default_value = "1", value_parser = parse_share)]
    pub nightly_change: f64,

    /// What the kernel's caches hold before each command; cold only as root.
    #[arg(long, value_name = "CACHE", value_enum, default_value_t = Caches::Warm)]
    pub cache: Caches,

    /// How often each command runs, with each kind of cache.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,

    /// Options of every workload with rounds.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// What cluster everybody backs up.
#[derive(Args, Clone, Debug)]
pub struct SiteArgs {
    /// What cluster: of a server by pgbench, mixed with less compressible tables, or pages that are written without a server.
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Kind::Pgbench)]
    pub cluster: Kind,

    /// pgbench's scale: 100 is a cluster of about 1.6 GB, and twice that if mixed.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub scale: u32,

    /// The size of a synthetic cluster: 500MB, 8GB, 1TiB.
    #[arg(long, value_name = "BYTES", default_value = "2GB", value_parser = parse_size)]
    pub size: u64,

    /// The relations of a synthetic cluster.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub relations: u32,

    /// The tablespaces of a synthetic cluster besides the default one.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub tablespaces: u32,

    /// How much of a synthetic cluster's rows is random bytes: 33 compresses about 3:1.
    #[arg(long, value_name = "PERCENT", default_value_t = 33, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub random_percent: u8,

    /// The major version of PostgreSQL.
    #[arg(long, value_name = "MAJOR", default_value_t = 18, value_parser = clap::value_parser!(u32).range(13..=18))]
    pub major: u32,
}

impl Default for SiteArgs {
    /// As if nothing were typed.
    fn default() -> Self {
        Self {
            cluster: Kind::Pgbench,
            scale: 100,
            size: 2_000_000_000,
            relations: 1000,
            tablespaces: 2,
            random_percent: 33,
            major: 18,
        }
    }
}

/// How the tools are called.
#[derive(Args, Clone, Debug)]
pub struct ToolArgs {
    /// pgstrata's detectors; one that refuses is left out.
    #[arg(long, value_name = "DETECTOR,...", value_enum, value_delimiter = ',', default_value = "scan,wal,summary")]
    pub detect: Vec<Detector>,

    /// Workers of each tool [default: one for each core]; pgstrata's full, scan, restore and verify also run with each further number.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [cores()], value_parser = clap::value_parser!(u32).range(1..))]
    pub jobs: Vec<u32>,

    /// pgstrata's --compress.
    #[arg(long, value_name = "METHOD", default_value = "zstd:1")]
    pub compress: String,

    /// What runs beside pgstrata, and where it is.
    #[command(flatten)]
    pub peers: PeerArgs,
}

impl ToolArgs {
    /// Workers of each tool.
    pub fn jobs(&self) -> u32 {
        self.jobs.first().copied().unwrap_or(1)
    }
}

/// What runs beside pgstrata, and where it is.
#[derive(Args, Clone, Debug)]
pub struct PeerArgs {
    /// Only these peers: pg_basebackup, pgbackrest, wal-rus, barman; or none [default: all that are found].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub peers: Option<Vec<String>>,

    /// This pgBackRest [default: the one on the PATH].
    #[arg(long, value_name = "PATH")]
    pub pgbackrest: Option<PathBuf>,

    /// This wal-rus [default: walrus on the PATH].
    #[arg(long, value_name = "PATH")]
    pub wal_rus: Option<PathBuf>,

    /// This Barman [default: the one on the PATH].
    #[arg(long, value_name = "PATH")]
    pub barman: Option<PathBuf>,
}

impl PeerArgs {
    /// Whether this peer is to take part if it is there.
    pub fn wants(&self, name: &str) -> bool {
        self.peers.as_ref().is_none_or(|names| names.iter().any(|wanted| wanted == name))
    }
}

/// pgstrata's `--detect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Detector {
    /// Whichever is the cheapest.
    Auto,
    /// Every page is read.
    Scan,
    /// WAL records.
    Wal,
    /// PostgreSQL's WAL summaries.
    Summary,
}

impl Detector {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Scan => "scan",
            Self::Wal => "wal",
            Self::Summary => "summary",
        }
    }
}

/// What the kernel's caches hold before each command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Caches {
    /// What the command reads.
    Warm,
    /// Nothing.
    Cold,
    /// Each in every other round.
    Both,
}

impl Caches {
    /// Whether the rounds, in turns, are cold.
    pub fn turns(self) -> &'static [bool] {
        match self {
            Self::Warm => &[false],
            Self::Cold => &[true],
            Self::Both => &[false, true],
        }
    }
}

/// Runs the workload and writes its results.
///
/// # Errors
/// When a command of pgstrata fails, or what was restored is not what it should be; then there are no results.
pub fn run(args: &CompareArgs) -> Result<()> {
    if args.cache != Caches::Warm {
        must_drop_caches()?;
    }
    let scratch = Scratch::set(&args.common, false, &[])?;
    let hot: Vec<f64> = args.change.iter().copied().filter(|share| *share > 0.0).collect();
    let hot = if args.churn.contains(&Churn::Hot) { hot } else { Vec::new() };
    let site = Site::set(&args.site, scratch, &hot)?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    let mut rounds = Rounds::new(args, &site)?;
    rounds.pass_nights(&mut recorder)?;
    recorder.rounds(args.runs, args.common.patience > 0, |recorder| {
        args.cache.turns().iter().try_for_each(|cold| rounds.play(recorder, *cold))
    })?;
    recorder.notes.load_after = machine::load_average();
    report(args, &site, &recorder, &rounds)?;
    drop(rounds);
    site.close(args.common.keep)
}

fn report(args: &CompareArgs, site: &Site, recorder: &Recorder, rounds: &Rounds) -> Result<()> {
    let CompareArgs { runs, nights, common, .. } = args;
    let (major, jobs) = (args.site.major, args.tools.jobs());
    let steps = steps(&recorder.samples);
    let incrementals: Vec<Step> =
        steps.iter().copied().filter(|step| step.name.contains("pgstrata incremental")).collect();
    let cluster_bytes = recorder.samples.first().map_or(0, |sample| sample.cluster_bytes) as f64;
    let name = || format!("compare-{}", site.describe().replace(" at scale ", "-"));
    Run {
        name: common.name.clone().unwrap_or_else(name),
        title: format!(
            "{}: {:.0} MB without the WAL; PostgreSQL {major}; {runs} rounds; {nights} nights; {jobs} workers",
            site.describe(),
            cluster_bytes / MB
        ),
        command: scratch::typed(),
        settings: format!(
            "The server's settings: {}\n\n{}\nThe commands of the history and of the first round; WORK is the scratch directory. Before \
             each: CHECKPOINT, syncfs,\nand what it reads is read once, or the caches are dropped. {}",
            site.settings(),
            rounds.settings(),
            common.shown_memory()
        ),
        legend: LEGEND,
        found: changed(&recorder.samples, &incrementals) + &rounds.found(),
        appendix: String::new(),
        steps: &steps,
        recorder,
        scratch: site.scratch(),
        versions: machine::versions(site.server()) + &rounds.versions(),
    }
    .write()
}

/// The rows, by what they do and with what they are compared: the same step of other tools, and what bounds it.
pub fn steps(samples: &[Sample]) -> Vec<Step> {
    let order = [
        "read",
        "hash",
        "compress",
        "full",
        "incremental",
        "restore-full",
        "restore-last",
        "write",
        "copy",
        "merge",
        "verify",
    ];
    let mut rows: BTreeMap<(usize, usize), &Sample> = BTreeMap::new();
    for (at, sample) in samples.iter().enumerate() {
        if !rows.values().any(|row| row.step == sample.step) {
            let place = order.iter().position(|action| *action == sample.facts.action).unwrap_or(order.len());
            rows.insert((place, at), sample);
        }
    }
    rows.values()
        .map(|own| match own.facts.tool.as_str() {
            "pgstrata" => Step::named(
                own.step.name.to_owned(),
                rows.values().filter(|peer| is_beside(own, peer)).map(|peer| peer.step).collect(),
            ),
            _ => own.step,
        })
        .collect()
}

fn is_beside(own: &Sample, peer: &Sample) -> bool {
    let (own, peer) = (&own.facts, &peer.facts);
    if peer.tool == "pgstrata" || (&own.cache, &own.size) != (&peer.cache, &peer.size) {
        return false;
    }
    let bounds: &[&str] = match own.action.as_str() {
        "full" => &["read", "compress"],
        "incremental" => &["read", "hash", "server"],
        "restore-full" | "restore-last" => &["write", "copy"],
        _ => &[],
    };
    match peer.tool.as_str() {
        "limit" => bounds.contains(&peer.action.as_str()),
        _ if own.action != peer.action || own.night.is_some() != peer.night.is_some() => false,
        _ => (&own.churn, own.share_changed) == (&peer.churn, peer.share_changed),
    }
}

/// Reads a number of bytes: 200MB and 8GB are powers of ten, 8GiB is one of two.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits_len = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, unit) = text.split_at(digits_len);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" | "k" => 1000,
        "mb" | "m" => 1_000_000,
        "gb" | "g" => 1_000_000_000,
        "tb" | "t" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("expected a whole number with MB, GB or GiB behind it".to_owned()),
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    size.filter(|size| *size > 0).ok_or_else(|| "expected a number first, as in 8GB".to_owned())
}

fn parse_share(text: &str) -> std::result::Result<f64, String> {
    let share = text.strip_suffix('%').unwrap_or(text).parse().ok();
    share.filter(|share| (0.0..=100.0).contains(share)).ok_or_else(|| "expected a percentage of 0 to 100".to_owned())
}

fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_ten_and_of_two() {
        let sizes = [
            ("200MB", 200_000_000),
            ("8GB", 8_000_000_000),
            ("8gib", 8 << 30),
            ("4096", 4096),
            ("1T", 1_000_000_000_000),
        ];
        for (text, size) in sizes {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "GB", "0", "1.5GB", "8XB", "99999999999999999999", "99999999TB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shares_are_percentages() {
        assert_eq!((parse_share("0.1"), parse_share("10%"), parse_share("0")), (Ok(0.1), Ok(10.0), Ok(0.0)));
        assert!(["101", "-1", "x", "NaN"].iter().all(|text| parse_share(text).is_err()));
    }
}
