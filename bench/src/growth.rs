//! `growth`: what an incremental costs when the cluster grows and what changes in it does not.
//!
//! ```text
//! once:        a cluster of each size, each with a server of its own; a full backup of each by every tool
//! each round:  for each size: as many rows are updated as dirty the same number of blocks, evenly spread; CHECKPOINT; WAL summaries
//!              reach it; pg_backup_start and _stop alone; an incremental by every tool, in each of its ways
//! ```
//!
//! Each round begins with another size and another tool; with `--cache both` it is played with warm caches, then with none. All ways of
//! pgstrata have the same parent, so each finds the same blocks.
//!
//! `backup --json` does not say what of its time is the server's. So a checkpoint is made right before each command, which leaves the one
//! that begins the backup nothing to write, and the whole command is measured; what a session takes that only begins and ends a backup
//! stands beside it. What a full backup by `pg_basebackup` holds is removed after it was measured, but for its manifest, which is all that
//! an incremental needs.

use std::fs;

use clap::Args;
use testdata::Result;

use crate::compare::churn::Churn;
use crate::compare::rounds::{Rounds, in_turns};
use crate::compare::site::{Kind, Site};
use crate::compare::{Caches, CompareArgs, SiteArgs, ToolArgs, steps};
use crate::record::Recorder;
use crate::report::{LEGEND, Run, Sample, Spread, Step, changed};
use crate::scratch::{self, Scratch, must_drop_caches, say};
use crate::{CommonArgs, cannot, machine};

const MB: f64 = 1e6;
/// A cluster of less is named by its megabytes.
const GB: f64 = 1e9;
/// So that four clusters keep little WAL: incrementals need that of one change.
const SMALL_WAL: [&str; 4] = [
    "ALTER SYSTEM SET wal_keep_size = '1GB'",
    "ALTER SYSTEM SET max_wal_size = '1GB'",
    "SELECT pg_reload_conf()",
    "CHECKPOINT",
];

/// Incrementals of as many changed blocks on clusters of several sizes.
#[derive(Args, Debug)]
pub struct GrowthArgs {
    /// pgbench's scale for each cluster: 65 is about 1 GB.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "65,130,260,520", value_parser = clap::value_parser!(u32).range(1..))]
    scales: Vec<u32>,

    /// How many blocks change before each incremental.
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    blocks: u64,

    /// The major version of PostgreSQL.
    #[arg(long, value_name = "MAJOR", default_value_t = 18, value_parser = clap::value_parser!(u32).range(13..=18))]
    major: u32,

    /// What the kernel's caches hold before each command; cold only as root.
    #[arg(long, value_name = "CACHE", value_enum, default_value_t = Caches::Both)]
    cache: Caches,

    /// How often each command runs, with each kind of cache.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,

    #[command(flatten)]
    tools: ToolArgs,

    #[command(flatten)]
    common: CommonArgs,
}

impl GrowthArgs {
    fn of_scale(&self, scale: u32) -> CompareArgs {
        CompareArgs {
            site: SiteArgs { cluster: Kind::Pgbench, scale, major: self.major, ..SiteArgs::default() },
            tools: self.tools.clone(),
            churn: vec![Churn::Uniform],
            change: Vec::new(),
            nights: 0,
            nightly_change: 0.0,
            cache: self.cache,
            runs: self.runs,
            common: self.common.clone(),
        }
    }
}

/// Runs the workload and writes its results.
///
/// # Errors
/// When a command of pgstrata fails; then there are no results.
pub fn run(args: &GrowthArgs) -> Result<()> {
    if args.cache != Caches::Warm {
        must_drop_caches()?;
    }
    let all: Vec<CompareArgs> = args.scales.iter().map(|&scale| args.of_scale(scale)).collect();
    let sites = all.iter().map(site).collect::<Result<Vec<_>>>()?;
    let rounds =
        all.iter().zip(&sites).map(|(args, site)| Ok(Rounds::new(args, site)?.of_size(size_of(site.bytes()?))));
    let mut clusters = rounds.collect::<Result<Vec<_>>>()?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    recorder.round = 1;
    for (cluster, site) in clusters.iter_mut().zip(&sites) {
        say(&format!("full backups of {}", cluster.size()));
        cluster.begin(&mut recorder)?;
        thin(site)?;
    }
    recorder.rounds(args.runs, args.common.patience > 0, |recorder| {
        args.cache.turns().iter().try_for_each(|cold| {
            let order = in_turns(clusters.len(), recorder.round);
            order.into_iter().try_for_each(|at| clusters[at].increment(recorder, args.blocks, *cold))
        })
    })?;
    recorder.notes.load_after = machine::load_average();
    report(args, &sites, &recorder, &clusters)?;
    drop(clusters);
    sites.into_iter().try_for_each(|site| site.close(args.common.keep))
}

fn site(args: &CompareArgs) -> Result<Site> {
    let site = Site::set(&args.site, Scratch::set(&args.common, false, &[])?, &[])?;
    site.server().map_or(Ok(()), |server| server.sql_each("postgres", &SMALL_WAL))?;
    Ok(site)
}

/// Removes the relations from `pg_basebackup`'s full backup, if there is one.
fn thin(site: &Site) -> Result<()> {
    let relations = site.scratch().path("rounds/pg_basebackup/00/base");
    match fs::remove_dir_all(&relations) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(cannot("remove", &relations, e)),
        _ => Ok(()),
    }
}

fn size_of(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes < GB { format!("{:.0} MB", bytes / MB) } else { format!("{:.1} GB", bytes / GB) }
}

fn report(args: &GrowthArgs, sites: &[Site], recorder: &Recorder, clusters: &[Rounds]) -> Result<()> {
    let (Some(site), Some(first)) = (sites.first(), clusters.first()) else { return Ok(()) };
    let sizes: Vec<&str> = clusters.iter().map(Rounds::size).collect();
    let steps = steps(&recorder.samples);
    let incrementals: Vec<Step> =
        steps.iter().copied().filter(|step| step.name.contains("pgstrata incremental")).collect();
    let GrowthArgs { blocks, major, runs, common, .. } = args;
    Run {
        name: common.name.clone().unwrap_or_else(|| "growth".to_owned()),
        title: format!(
            "pgbench clusters of {} without the WAL; {blocks} blocks changed before each incremental; PostgreSQL {major}; {runs} \
             rounds; {} workers",
            sizes.join(", "),
            args.tools.jobs()
        ),
        command: scratch::typed(),
        settings: format!(
            "The servers' settings: {}, {}\n\n{}\nThe commands of the full backups and of the first round; WORK is the scratch directory of \
             each size. Before each: CHECKPOINT, syncfs,\nand what it reads is read once, or the caches are dropped. {}",
            site.settings(),
            SMALL_WAL[..2].join(", "),
            first.settings(),
            common.shown_memory()
        ),
        legend: LEGEND,
        found: changed(&recorder.samples, &incrementals) + &by_size(&recorder.samples, &sizes) + &found(clusters),
        appendix: String::new(),
        steps: &steps,
        recorder,
        scratch: site.scratch(),
        versions: machine::versions(site.server()) + &first.versions(),
    }
    .write()
}

/// What was found out besides on any of the clusters, once.
fn found(clusters: &[Rounds]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in clusters.iter().flat_map(|cluster| cluster.found().lines().map(str::to_owned).collect::<Vec<_>>()) {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

/// The medians of each kind of step for each size, and how many times as long the last is as the first.
fn by_size(samples: &[Sample], sizes: &[&str]) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for kind in samples.iter().map(kind) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let columns: String = sizes.iter().map(|size| format!(" {size:>9}")).collect();
    let mut text = format!("\n{:<52}{columns} {:>12}\n", "wall s, medians, by the cluster's size", "last : first");
    for kind in kinds {
        let medians: Vec<Option<f64>> = sizes.iter().map(|size| median(samples, kind, size)).collect();
        let ratio = medians.first().copied().flatten().zip(medians.last().copied().flatten());
        let shown =
            |value: &Option<f64>| format!(" {:>9}", value.map_or_else(String::new, |value| format!("{value:.3}")));
        let shown: String = medians.iter().map(shown).collect();
        let ratio = ratio.map_or_else(String::new, |(first, last)| format!("{:.2}", last / first));
        text += &format!("{kind:<52}{shown} {ratio:>12}\n");
    }
    text
}

/// The step's name without the size.
fn kind(sample: &Sample) -> &'static str {
    let suffix = format!(", {}", sample.facts.size);
    sample.step.name.strip_suffix(suffix.as_str()).unwrap_or(sample.step.name)
}

/// Of the undisturbed samples, or of all if there are none of these.
fn median(samples: &[Sample], name: &str, size: &str) -> Option<f64> {
    let own: Vec<&Sample> = samples.iter().filter(|sample| kind(sample) == name && sample.facts.size == size).collect();
    let quiet: Vec<&Sample> = own.iter().copied().filter(|sample| !sample.is_disturbed()).collect();
    let counting = if quiet.is_empty() { own } else { quiet };
    let walls = counting.iter().map(|sample| sample.usage.wall.as_secs_f64()).collect();
    Spread::of(walls).map(|spread| spread.median)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::measure::Usage;
    use crate::report::Facts;

    fn sample(size: &str, seconds: u64) -> Sample {
        Sample {
            step: Step::named(format!("look, {size}"), Vec::new()),
            round: 1,
            usage: Usage { wall: Duration::from_secs(seconds), ..Usage::default() },
            cluster_bytes: 1,
            bytes_written: 0,
            bytes_read: None,
            blocks_changed: None,
            load: String::new(),
            facts: Facts { size: size.to_owned(), ..Facts::default() },
        }
    }

    #[test]
    fn the_last_size_is_compared_with_the_first() {
        let samples = [sample("1.0 GB", 2), sample("8.2 GB", 3), sample("1.0 GB", 2), sample("8.2 GB", 3)];
        let text = by_size(&samples, &["1.0 GB", "8.2 GB"]);
        let line: Vec<&str> = text.lines().last().unwrap_or_default().split_whitespace().collect();
        assert_eq!(line, ["look", "2.000", "3.000", "1.50"]);
    }

    #[test]
    fn sizes_are_named_in_gigabytes_or_megabytes() {
        assert_eq!((size_of(1_030_000_000), size_of(95_400_000)), ("1.0 GB".to_owned(), "95 MB".to_owned()));
    }
}
