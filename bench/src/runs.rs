//! What runs left behind, read again: `samples.csv` and the texts beside it.
//!
//! Reports and comparisons are made from these files alone, so that they can be made again, years later, of a run that nobody can
//! repeat. Columns came in the course of time; the earliest runs have neither tool nor action. What a step was is then guessed from
//! its name, which was the same from run to run. A file that lacks a column that all runs have is an error.
//!
//! Samples are one [`Group`] where they are repetitions: of the same step under the same conditions. All statistics are over the
//! undisturbed ones of a group, or over all where there are none of these, as in the printed summary.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use testdata::Result;

use crate::cannot;
use crate::report::{DISTURBED, Spread};

/// Names of steps of others and of bounds, as far as old runs have them: what the name begins with, the tool, and what it does.
const FOREIGN: [(&str, &str, &str); 7] = [
    ("cat", LIMIT, "read"),
    ("parallel read", LIMIT, "read"),
    ("cp -a", LIMIT, "copy"),
    ("pg_basebackup --incremental", "pg_basebackup", "incremental"),
    ("pg_basebackup", "pg_basebackup", "full"),
    ("pg_combinebackup", "pg_combinebackup", "merge"),
    ("pg_verifybackup", "pg_verifybackup", "verify"),
];
/// What pgstrata's steps of old runs have in their names, and what they do.
const OWN: [(&str, &str); 7] = [
    ("expire", "expire"),
    ("restore of the full", "restore-full"),
    ("restore", "restore-last"),
    ("merge", "merge"),
    ("verify", "verify"),
    ("incremental", "incremental"),
    ("full", "full"),
];
/// In the names of old runs: a step of which there is one each night, so that its round is the night.
const NIGHTLY: &str = "each night";

/// The tool whose bench this is.
pub const OURS: &str = "pgstrata";
/// What bounds all tools.
pub const LIMIT: &str = "limit";

/// A line of `samples.csv`; `README.md` describes the columns.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Row {
    /// The row of the table.
    pub step: String,
    /// From 1.
    pub round: u32,
    /// Seconds from the start to the end.
    pub wall_s: f64,
    user_s: f64,
    sys_s: f64,
    /// Seconds of the server's processor time on its behalf.
    pub server_cpu_s: f64,
    others: f64,
    /// Bytes that were resident at once, at most.
    pub peak_rss_bytes: u64,
    /// The cluster's length.
    pub cluster_bytes: u64,
    /// Bytes left on disk.
    pub bytes_written: u64,
    /// Bytes read, as pgstrata says it.
    pub bytes_read: Option<u64>,
    /// Bytes read, as the kernel says it.
    pub proc_read_bytes: Option<u64>,
    /// Whose step it is.
    pub tool: String,
    /// What it does, the same word for all tools.
    pub action: String,
    /// How, where a tool has several ways.
    pub way: String,
    /// Whether the cluster's files were in memory.
    pub cache: String,
    /// What kind of cluster it was.
    pub cluster: String,
    /// How it was changed before.
    pub churn: String,
    /// Percent of the blocks that were to change; as written, so that it can be compared.
    pub share_changed: String,
    /// Incrementals since the full backup.
    pub night: Option<u32>,
    /// Workers.
    pub jobs: String,
    /// Bytes of the tool's repository afterwards.
    pub stored_bytes: Option<u64>,
    /// Transactions a second of the load beside it.
    pub tps: Option<f64>,
    /// A name of the cluster's size, in runs with several.
    pub size: String,
}

impl Row {
    /// Whether others used so much of the machine that the sample says little.
    pub fn is_disturbed(&self) -> bool {
        self.others > DISTURBED
    }

    /// Seconds of its own processor time.
    pub fn cpu_s(&self) -> f64 {
        self.user_s + self.sys_s
    }

    /// Whether it is a step of pgstrata.
    pub fn is_ours(&self) -> bool {
        self.tool == OURS
    }

    /// Percent of the blocks that were to change.
    pub fn share(&self) -> Option<f64> {
        self.share_changed.parse().ok()
    }

    /// What was done, whatever the size of the cluster.
    pub fn kind(&self) -> &str {
        let without = self.step.strip_suffix(&self.size).filter(|_| !self.size.is_empty());
        without.map_or(self.step.as_str(), |kind| kind.trim_end_matches(", "))
    }

    /// Whether it is a backup of a history of nights.
    pub fn is_nightly(&self) -> bool {
        self.night.is_some() && ["full", "incremental"].contains(&self.action.as_str())
    }

    /// What makes samples of a step comparable.
    fn conditions(&self) -> [&str; 6] {
        [&self.step, &self.cache, &self.cluster, &self.churn, &self.share_changed, &self.jobs]
    }

    /// Fills in what old runs do not say.
    fn explained(mut self) -> Self {
        if self.tool.is_empty() {
            let foreign = FOREIGN.iter().find(|(name, ..)| self.step.starts_with(name));
            let own = OWN.iter().find(|(name, _)| self.step.contains(name));
            let own = (OURS, own.map_or(self.step.as_str(), |(_, action)| action));
            let (tool, action) = foreign.map_or(own, |(_, tool, action)| (*tool, *action));
            (self.tool, self.action) = (tool.to_owned(), action.to_owned());
            self.night = self.step.contains(NIGHTLY).then_some(self.round);
        }
        self
    }
}

/// A directory of results.
#[derive(Debug)]
pub struct Run {
    /// The directory's name.
    pub name: String,
    /// Every sample.
    pub rows: Vec<Row>,
    /// What was printed; its first line is the title.
    pub summary: String,
    /// What it ran on.
    pub machine: String,
    /// With what.
    pub versions: String,
    /// What was typed, and what ran.
    pub command: String,
}

impl Run {
    /// Reads a directory of results.
    ///
    /// # Errors
    /// When it has no samples, or they cannot be read.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("samples.csv");
        let text = fs::read_to_string(&path).map_err(|e| cannot("read", &path, e))?;
        let rows = parse(&text).map_err(|e| cannot("read", &path, e))?;
        let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
        let resolved = directory.canonicalize().map_err(|e| cannot("find", directory, e))?;
        Ok(Self {
            name: resolved.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            rows,
            summary: text("summary.txt"),
            machine: text("machine.txt"),
            versions: text("versions.txt"),
            command: text("command.txt"),
        })
    }

    /// What the run was, in a line.
    pub fn title(&self) -> &str {
        self.summary.lines().next().unwrap_or(&self.name)
    }
}

/// The rows of `samples.csv`.
///
/// # Errors
/// When a line does not have what its column's name says.
pub fn parse(text: &str) -> csv::Result<Vec<Row>> {
    csv::Reader::from_reader(text.as_bytes()).into_deserialize().map(|row| row.map(Row::explained)).collect()
}

/// Repetitions of a step under the same conditions; there is at least one.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// In the order of the file.
    pub rows: Vec<&'a Row>,
}

impl<'a> Group<'a> {
    /// The first of them, which stands for what they have in common.
    pub fn first(&self) -> &'a Row {
        self.rows[0]
    }

    /// Whether both are the same step under the same conditions.
    pub fn is_like(&self, other: &Group<'_>) -> bool {
        self.first().conditions() == other.first().conditions()
    }

    /// Whether there is no undisturbed sample.
    pub fn is_disturbed(&self) -> bool {
        self.rows.iter().all(|row| row.is_disturbed())
    }

    /// A value of the samples that count, ascending.
    pub fn values(&self, value: impl Fn(&Row) -> f64) -> Vec<f64> {
        let all = self.is_disturbed();
        let counting = self.rows.iter().filter(|row| all || !row.is_disturbed());
        let mut values: Vec<f64> = counting.map(|row| value(row)).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// The spread of a value of the samples that count.
    pub fn spread(&self, value: impl Fn(&Row) -> f64) -> Option<Spread> {
        Spread::of(self.values(value))
    }

    /// Gigabytes of the cluster a second: of the median time, and of the extremes.
    pub fn rate(&self) -> Option<Spread> {
        let (bytes, wall) = (self.spread(|row| row.cluster_bytes as f64)?.median, self.spread(|row| row.wall_s)?);
        let of = |seconds: f64| bytes / seconds / 1e9;
        Some(Spread { count: wall.count, min: of(wall.max), median: of(wall.median), max: of(wall.min) })
    }

    /// How many times as long it took as `other` did in the same round: the median of the undisturbed rounds, or of all if there are
    /// none of these.
    pub fn time_beside(&self, other: &Group<'_>) -> Option<f64> {
        let pair = |row: &&'a Row| Some((*row, *other.rows.iter().find(|other| other.round == row.round)?));
        let pairs: Vec<(&Row, &Row)> = self.rows.iter().filter_map(pair).collect();
        let quiet = |(own, other): &&(&Row, &Row)| !own.is_disturbed() && !other.is_disturbed();
        let of = |(own, other): &(&Row, &Row)| own.wall_s / other.wall_s;
        let undisturbed: Vec<f64> = pairs.iter().filter(quiet).map(of).collect();
        let all = if undisturbed.is_empty() { pairs.iter().map(of).collect() } else { undisturbed };
        Spread::of(all).map(|spread| spread.median)
    }
}

/// Puts repetitions together, in the order of their first samples.
pub fn groups<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Vec<Group<'a>> {
    grouped(rows, |one, other| one.conditions() == other.conditions())
}

/// Puts rows together that are alike, in the order of their first ones.
pub fn grouped<'a>(rows: impl IntoIterator<Item = &'a Row>, are_alike: impl Fn(&Row, &Row) -> bool) -> Vec<Group<'a>> {
    let mut groups: Vec<Group> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|group| are_alike(group.first(), row)) {
            Some(group) => group.rows.push(row),
            None => groups.push(Group { rows: vec![row] }),
        }
    }
    groups
}

/// Under what a step ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// What kind of cluster it was.
    Cluster,
    /// How it was changed.
    Churn,
    /// How much of it was changed.
    Share,
    /// Whether its files were in memory.
    Cache,
    /// Whether it is part of a history of nights.
    Nightly,
    /// With how many workers.
    Jobs,
    /// How large the cluster was, in runs with several.
    Size,
}

impl Condition {
    /// What a row says of it; nothing, if it does not.
    pub fn of(self, row: &Row) -> String {
        match self {
            Condition::Cluster => row.cluster.clone(),
            Condition::Churn => row.churn.clone(),
            Condition::Share if row.share_changed.is_empty() => String::new(),
            Condition::Share => format!("{} % changed", row.share_changed),
            Condition::Cache => row.cache.clone(),
            Condition::Nightly if row.is_nightly() => "in a history of nights".to_owned(),
            Condition::Nightly => String::new(),
            Condition::Jobs if row.jobs.is_empty() => String::new(),
            Condition::Jobs => format!("{} jobs", row.jobs),
            Condition::Size => row.size.clone(),
        }
    }
}

/// Puts together the rows that ran under the same of these conditions, in the order of their first ones.
pub fn by_conditions<'a>(rows: impl IntoIterator<Item = &'a Row>, conditions: &[Condition]) -> Vec<Group<'a>> {
    grouped(rows, |one, other| conditions.iter().all(|condition| condition.of(one) == condition.of(other)))
}

/// Names things by the conditions that are not the same for all; the share that changed and whether it was nightly are always told.
pub struct Namer {
    told: Vec<Condition>,
}

impl Namer {
    /// A namer that tells which of these conditions a row is under, where the rows differ in it.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Row>, conditions: &[Condition]) -> Self {
        let rows: Vec<&Row> = rows.into_iter().filter(|row| row.tool != LIMIT).collect();
        let varies = |condition: &Condition| {
            let said = rows.iter().map(|row| condition.of(row)).filter(|text| !text.is_empty());
            [Condition::Share, Condition::Nightly].contains(condition) || said.collect::<BTreeSet<_>>().len() > 1
        };
        Self { told: conditions.iter().copied().filter(varies).collect() }
    }

    /// `name`, with the conditions of `row`.
    pub fn name(&self, name: &str, row: &Row) -> String {
        let is_news = |text: &String| !text.is_empty() && !name.split(", ").any(|part| part == text);
        let conditions = self.told.iter().map(|condition| condition.of(row)).filter(is_news);
        [name.to_owned()].into_iter().chain(conditions).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "step,round,wall_s,user_s,sys_s,server_cpu_s,others,peak_rss_bytes,cluster_bytes,bytes_written,blocks_changed,load_1min
\"pgstrata incremental, unchanged\",1,0.4,0.3,0.2,0.02,0.004,15253504,1591524683,4242,0,1.44
\"pgstrata restore of the full\",1,1.5,1,1,0,0,1,1591524683,1591524683,,1.44
\"pgstrata incremental, each night\",7,1.5,1,1,0,0,1,1591524683,9,,1.44
\"list\",1,1.5,1,1,0,0,1,1591524683,9,,1.44
\"expire --dry-run of the full\",1,1.5,1,1,0,0,1,1591524683,9,,1.44
\"cp -a and sync\",1,1.5,1,1,0,0,1,1591524683,9,,1.44
";

    fn row(round: u32, wall_s: f64, others: f64) -> Row {
        Row { round, wall_s, others, ..Row::default() }
    }

    #[test]
    fn what_an_old_run_does_not_say_follows_from_the_names() {
        let rows = parse(OLD).unwrap();
        let told: Vec<_> = rows.iter().map(|row| (row.tool.as_str(), row.action.as_str(), row.night)).collect();
        let expected = [
            ("pgstrata", "incremental", None),
            ("pgstrata", "restore-full", None),
            ("pgstrata", "incremental", Some(7)),
            ("pgstrata", "list", None),
            ("pgstrata", "expire", None),
            ("limit", "copy", None),
        ];
        assert_eq!(told, expected);
        assert!((rows[0].cpu_s() - 0.5).abs() < 1e-9 && rows[0].bytes_read.is_none());
    }

    #[test]
    fn columns_count_by_their_names() {
        let text = "tool,share_changed,step,wall_s,night,action\nbarman,0.1,\"a, b\",2.5,3,full\nbarman,,c,1,,full\n";
        let rows = parse(text).unwrap();
        assert_eq!((rows[0].tool.as_str(), rows[0].share(), rows[0].night), ("barman", Some(0.1), Some(3)));
        assert_eq!((rows[1].step.as_str(), rows[1].share(), rows[1].night), ("c", None, None));
        assert!(parse("step,wall_s\na,soon\n").is_err());
    }

    #[test]
    fn a_group_is_a_step_under_the_same_conditions() {
        let text = "step,cache,round\na,warm,1\nb,warm,1\na,cold,1\na,warm,2\n";
        let rows = parse(text).unwrap();
        let sizes: Vec<usize> = groups(&rows).iter().map(|group| group.rows.len()).collect();
        assert_eq!(sizes, [2, 1, 1]);
    }

    #[test]
    fn disturbed_samples_count_only_where_there_are_no_others() {
        let rows = [row(1, 9.0, 0.5), row(2, 2.0, 0.0), row(3, 4.0, 0.0)];
        assert_eq!(Group { rows: rows.iter().collect() }.values(|row| row.wall_s), [2.0, 4.0]);
        let all = Group { rows: rows[..1].iter().collect() };
        assert!(all.is_disturbed());
        assert_eq!(all.values(|row| row.wall_s), [9.0]);
    }

    #[test]
    fn rates_are_of_the_median_time_and_of_the_extremes() {
        let rows = [1.0, 2.0, 4.0].map(|wall_s| Row { cluster_bytes: 8_000_000_000, ..row(1, wall_s, 0.0) });
        let rate = Group { rows: rows.iter().collect() }.rate();
        assert_eq!(rate, Some(Spread { count: 3, min: 2.0, median: 4.0, max: 8.0 }));
    }

    #[test]
    fn times_are_compared_round_by_round() {
        let (own, peer) = ([row(1, 1.0, 0.0), row(2, 10.0, 0.0)], [row(2, 30.0, 0.0), row(1, 2.0, 0.0)]);
        let [own, peer] = [&own, &peer].map(|rows| Group { rows: rows.iter().collect() });
        assert_eq!(peer.time_beside(&own), Some(2.5));
    }

    #[test]
    fn names_tell_what_varies() {
        let text = "step,cache,cluster,tool,jobs\na,warm,mixed,x,1\nb,cold,mixed,x,2\nc,,synthetic,limit,\n";
        let rows = parse(text).unwrap();
        let namer = Namer::of(&rows, &[Condition::Cluster, Condition::Cache]);
        let names: Vec<String> = rows.iter().map(|row| namer.name(&row.step, row)).collect();
        assert_eq!(names, ["a, warm", "b, cold", "c"]);
        let jobs = Namer::of(&rows, &[Condition::Jobs]);
        assert_eq!([jobs.name("a", &rows[1]), jobs.name("a, 2 jobs", &rows[1])], ["a, 2 jobs"; 2]);
    }

    #[test]
    fn a_kind_is_a_step_on_whatever_size() {
        let rows = parse("step,size\n\"a, cold, 1.0 GB\",1.0 GB\n\"a, cold\",\n").unwrap();
        assert_eq!((rows[0].kind(), rows[1].kind()), ("a, cold", "a, cold"));
    }

    #[test]
    fn the_share_that_changed_is_always_told() {
        let rows = parse("step,share_changed\na,0.1\n").unwrap();
        assert_eq!(Namer::of(&rows, &[Condition::Share]).name("a", &rows[0]), "a, 0.1 % changed");
    }
}
