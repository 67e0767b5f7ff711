//! `--compare OLD NEW`: whether pgstrata has become slower or needs more, by two runs of the same workload.
//!
//! A step has got worse in a measure if its median is beyond three bounds at once:
//!
//! | bound | why |
//! |---|---|
//! | the threshold, 5 % unless told | less than that matters to nobody |
//! | the spread: of all pairs of a new and an old sample, 95 % are worse | two medians of noise are never the same |
//! | a least difference, one for each measure | what the clock and the allocator cannot resolve |
//!
//! Only undisturbed samples count, and at least three of them in each run are needed: of fewer there is no spread. Both runs are to be
//! of the same workload on the same machine; where they are visibly not, that is said, and the numbers are worth what they are worth. Steps
//! of the peers are listed as a control and flagged by nothing: if they moved too, it was the machine.
//!
//! The second bound is Mann and Whitney's U, held against its greatest value. A measure of an unchanged program that scatters by more than
//! the threshold passes it by chance once in 126 times with five samples in each run, once in 70 with four, and once in 20 with three: what
//! is to be compared is worth five. A flag is a reason to measure again.

use std::fmt::Write as _;
use std::path::Path;

use testdata::Result;

use crate::report::Spread;
use crate::runs::{Group, Row, Run, groups};

/// Samples without which there is no spread.
const FEWEST: usize = 3;
/// Of the pairs of samples of both runs.
const APART: f64 = 0.95;
/// Of the clusters' lengths, from which on rates and times are not comparable.
const SAME_SIZE: f64 = 0.02;
const MB: f64 = 1e6;

/// What of a step is compared.
struct Measure {
    name: &'static str,
    of: fn(&Row) -> f64,
    /// Smaller differences are none.
    least: f64,
    /// What the value is divided by for the table, and its decimals.
    unit: f64,
    decimals: usize,
}

const MEASURES: [Measure; 4] = [
    Measure { name: "wall s", of: |row| row.wall_s, least: 0.01, unit: 1.0, decimals: 3 },
    Measure { name: "CPU s", of: |row| row.cpu_s() + row.server_cpu_s, least: 0.02, unit: 1.0, decimals: 2 },
    Measure { name: "peak MB", of: |row| row.peak_rss_bytes as f64, least: MB, unit: MB, decimals: 1 },
    Measure { name: "written MB", of: |row| row.bytes_written as f64, least: 4096.0, unit: MB, decimals: 3 },
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Worse,
    Better,
    Same,
    TooFew,
}

impl Verdict {
    fn shown(self) -> &'static str {
        match self {
            Verdict::Worse => "WORSE",
            Verdict::Better => "better",
            Verdict::Same => "",
            Verdict::TooFew => "too few samples",
        }
    }
}

/// Two runs, compared.
pub struct Comparison {
    /// The table and what is to be said of it.
    pub text: String,
    /// How many measures of pgstrata's steps got worse.
    pub regressions: usize,
}

/// Compares the runs in two directories; `threshold` is a part, as 0.05.
///
/// # Errors
/// When one of them cannot be read.
pub fn compare(old: &Path, new: &Path, threshold: f64) -> Result<Comparison> {
    Ok(comparison(&Run::read(old)?, &Run::read(new)?, threshold))
}

fn comparison(old: &Run, new: &Run, threshold: f64) -> Comparison {
    let (old_groups, new_groups) = (groups(&old.rows), groups(&new.rows));
    let mut regressions = 0;
    let mut text = format!("old  {}: {}\nnew  {}: {}\n\n", old.name, old.title(), new.name, new.title());
    let _ = writeln!(text, "{:<44} {:<10} {:>10} {:>10} {:>6}", "", "", "old", "new", "ratio");
    for is_ours in [true, false] {
        for group in new_groups.iter().filter(|group| group.first().is_ours() == is_ours) {
            let Some(before) = old_groups.iter().find(|old| old.is_like(group)) else { continue };
            let mut name = group.first().step.as_str();
            for measure in &MEASURES {
                let (line, verdict) = compared(measure, before, group, threshold);
                if is_ours && verdict == Verdict::Worse {
                    regressions += 1;
                }
                let _ = writeln!(text, "{name:<44} {line} {}", if is_ours { verdict.shown() } else { "" });
                name = "";
            }
        }
    }
    text = text.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    text += &remarks(old, new, &old_groups, &new_groups);
    let percent = threshold * 100.0;
    let _ = match regressions {
        0 => writeln!(text, "\nNothing got worse by more than {percent} % and the spread."),
        _ => writeln!(text, "\n{regressions} measures got WORSE by more than {percent} % and the spread."),
    };
    Comparison { text, regressions }
}

fn compared(measure: &Measure, old: &Group<'_>, new: &Group<'_>, threshold: f64) -> (String, Verdict) {
    let [before, after] = [old, new].map(|group| group.values(measure.of));
    let verdict = judge(measure, old, new, threshold);
    let (before, after) = (median(&before), median(&after));
    let ratio = if before > 0.0 { format!("{:.2}", after / before) } else { "-".to_owned() };
    let shown = |value: f64| format!("{:.*}", measure.decimals, value / measure.unit);
    (format!("{:<10} {:>10} {:>10} {ratio:>6}", measure.name, shown(before), shown(after)), verdict)
}

fn judge(measure: &Measure, old: &Group<'_>, new: &Group<'_>, threshold: f64) -> Verdict {
    let [before, after] = [old, new].map(|group| group.values(measure.of));
    if old.is_disturbed() || new.is_disturbed() || before.len().min(after.len()) < FEWEST {
        return Verdict::TooFew;
    }
    let exceeds = |more: &[f64], less: &[f64]| {
        let (high, low) = (median(more), median(less));
        high > low * (1.0 + threshold) && high - low >= measure.least && part_above(more, less) >= APART
    };
    match () {
        () if exceeds(&after, &before) => Verdict::Worse,
        () if exceeds(&before, &after) => Verdict::Better,
        () => Verdict::Same,
    }
}

fn median(values: &[f64]) -> f64 {
    Spread::of(values.to_vec()).map_or(0.0, |spread| spread.median)
}

/// Of all pairs, the part in which the value of `more` is greater than that of `less`.
fn part_above(more: &[f64], less: &[f64]) -> f64 {
    let above: usize = more.iter().map(|high| less.iter().filter(|low| high > low).count()).sum();
    above as f64 / (more.len() * less.len()) as f64
}

/// What makes the comparison doubtful.
fn remarks(old: &Run, new: &Run, old_groups: &[Group<'_>], new_groups: &[Group<'_>]) -> String {
    let mut text = String::new();
    for (these, others, which) in [(old_groups, new_groups, "old"), (new_groups, old_groups, "new")] {
        let alone = these.iter().filter(|group| !others.iter().any(|other| other.is_like(group)));
        let names: Vec<&str> = alone.map(|group| group.first().step.as_str()).collect();
        if !names.is_empty() {
            let _ = writeln!(text, "\nOnly in the {which} run: {}.", names.join("; "));
        }
    }
    if facts_of(&old.machine) != facts_of(&new.machine) {
        let _ = writeln!(text, "\nThe machines differ (machine.txt).");
    }
    let sizes = |groups: &[Group<'_>]| groups.first().and_then(|group| group.spread(|row| row.cluster_bytes as f64));
    if let (Some(before), Some(after)) = (sizes(old_groups), sizes(new_groups))
        && (after.median / before.median - 1.0).abs() > SAME_SIZE
    {
        let _ = writeln!(text, "\nThe clusters differ: {:.0} MB, {:.0} MB.", before.median / MB, after.median / MB);
    }
    text
}

/// The machine without what changes by the minute.
fn facts_of(machine: &str) -> Vec<&str> {
    machine.lines().filter(|line| !line.starts_with("load")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runs::parse;

    /// A run of one step in which each sample took so many seconds and was disturbed so much.
    fn run(step: &str, samples: &[(f64, f64)]) -> Run {
        let mut text = "step,round,wall_s,user_s,others,cluster_bytes,bytes_written\n".to_owned();
        for (round, (wall, others)) in samples.iter().enumerate() {
            let _ = writeln!(text, "\"{step}\",{round},{wall},1.0,{others},1000000,500");
        }
        let rows = parse(&text).unwrap();
        let [summary, machine, versions, command] = [const { String::new() }; 4];
        Run { name: "run".to_owned(), rows, summary, machine, versions, command }
    }

    fn quiet(step: &str, seconds: &[f64]) -> Run {
        run(step, &seconds.iter().map(|wall| (*wall, 0.0)).collect::<Vec<_>>())
    }

    fn regressions(old: &[f64], new: &[f64]) -> usize {
        comparison(&quiet("pgstrata full", old), &quiet("pgstrata full", new), 0.05).regressions
    }

    #[test]
    fn what_is_slower_beyond_threshold_and_spread_is_a_regression() {
        assert_eq!(regressions(&[1.0, 1.01, 1.02, 1.03, 1.04], &[1.2, 1.21, 1.22, 1.23, 1.24]), 1);
    }

    #[test]
    fn a_difference_below_the_threshold_is_none() {
        assert_eq!(regressions(&[1.0, 1.001, 1.002], &[1.04, 1.041, 1.042]), 0);
    }

    #[test]
    fn a_difference_within_the_spread_is_none() {
        assert_eq!(regressions(&[1.0, 1.5, 2.0, 2.5, 3.0], &[1.1, 1.9, 2.4, 2.8, 3.1]), 0);
    }

    #[test]
    fn what_is_faster_is_told_and_no_regression() {
        let compared =
            comparison(&quiet("pgstrata full", &[2.0, 2.0, 2.1]), &quiet("pgstrata full", &[1.0, 1.0, 1.1]), 0.05);
        assert_eq!(compared.regressions, 0);
        assert!(compared.text.contains("0.50 better"), "{}", compared.text);
    }

    #[test]
    fn two_samples_prove_nothing() {
        assert_eq!(regressions(&[1.0, 1.0], &[9.0, 9.0]), 0);
        let compared = comparison(&quiet("pgstrata full", &[1.0, 1.0]), &quiet("pgstrata full", &[9.0, 9.0]), 0.05);
        assert!(compared.text.contains("too few samples"), "{}", compared.text);
    }

    #[test]
    fn disturbed_samples_prove_nothing() {
        let disturbed = run("pgstrata full", &[(9.0, 0.5), (9.0, 0.5), (9.0, 0.5)]);
        assert_eq!(comparison(&quiet("pgstrata full", &[1.0, 1.0, 1.0]), &disturbed, 0.05).regressions, 0);
        let partly = run("pgstrata full", &[(9.0, 0.5), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)]);
        assert_eq!(comparison(&quiet("pgstrata full", &[1.0, 1.0, 1.0]), &partly, 0.05).regressions, 0);
    }

    #[test]
    fn differences_that_no_clock_resolves_are_none() {
        assert_eq!(regressions(&[0.001, 0.001, 0.001], &[0.009, 0.009, 0.009]), 0);
    }

    #[test]
    fn peers_are_shown_and_never_flagged() {
        let [old, new] = [[1.0; 3], [2.0; 3]].map(|seconds| quiet("pg_basebackup plain", &seconds));
        let compared = comparison(&old, &new, 0.05);
        assert_eq!(compared.regressions, 0);
        assert!(compared.text.contains("2.00\n") && !compared.text.contains("WORSE"), "{}", compared.text);
    }

    #[test]
    fn every_measure_of_a_step_is_compared() {
        let old = quiet("pgstrata full", &[1.0, 1.0, 1.0]);
        let mut new = quiet("pgstrata full", &[1.0, 1.0, 1.0]);
        new.rows.iter_mut().for_each(|row| {
            (row.server_cpu_s, row.peak_rss_bytes, row.bytes_written) = (0.2, 9 << 20, 1 << 20);
        });
        assert_eq!(comparison(&old, &new, 0.05).regressions, 3);
        assert_eq!(comparison(&old, &new, 0.25).regressions, 2);
    }

    #[test]
    fn steps_without_a_counterpart_and_other_clusters_are_told() {
        let mut new = quiet("pgstrata verify", &[1.0]);
        new.rows[0].cluster_bytes = 5_000_000;
        new.machine = "cores 4\nload 1\n".to_owned();
        let text = comparison(&quiet("pgstrata full", &[1.0]), &new, 0.05).text;
        for expected in ["Only in the old run: pgstrata full.", "Only in the new run: pgstrata verify.", "1 MB, 5 MB"] {
            assert!(text.contains(expected), "{text}");
        }
        assert!(text.contains("The machines differ"), "{text}");
    }

    #[test]
    fn one_pair_of_25_that_speaks_against_it_is_passed_over_and_two_are_not() {
        let old = [1.0, 1.01, 1.02, 1.03, 1.25];
        assert_eq!(regressions(&old, &[1.2, 1.26, 1.27, 1.28, 1.29]), 1);
        assert_eq!(regressions(&old, &[1.2, 1.21, 1.27, 1.28, 1.29]), 0);
        assert_eq!(part_above(&[1.0, 2.0], &[1.0, 0.5]), 0.75);
    }
}
