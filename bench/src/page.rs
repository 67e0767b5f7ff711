//! `report.html`: a run, or several, as a page that needs nothing but itself.
//!
//! ```text
//! across:    cost against the cluster's size, where steps of the same name ran on clusters of different sizes
//! each run:  what it ran on; for each thing that was done (a full backup, a restore, ...) a panel: a bar chart of all who did it,
//!            and a table; cost against the share that changed; the repository's growth over the nights; the load beside backups; the
//!            summary as it was printed
//! ```
//!
//! The page is made from the files in a run's directory alone ([`crate::runs`]), at the end of the run and whenever it is asked for. What
//! a run does not have is not on its page. Nothing is said here that the samples do not say: a bar is the median, its whisker the least
//! and the greatest value, and where all samples were disturbed a star says so.

use std::fs;
use std::path::{Path, PathBuf};

use maud::{DOCTYPE, Markup, PreEscaped, html};
use testdata::Result;

use crate::cannot;
use crate::chart::{self, Bar, Line, Scale, number};
use crate::report::Spread;
use crate::runs::{Condition, Group, LIMIT, Namer, OURS, Row, Run, by_conditions, grouped, groups};

/// The page's file in a run's directory.
pub const FILE: &str = "report.html";

const MB: f64 = 1e6;
const GB: f64 = 1e9;
/// Sizes within such a part of each other are one.
const SAME_SIZE: f64 = 0.05;

/// What is done, in the page's order: the word in the samples, what the page calls it, and the bounds that belong to it.
const ACTIONS: [(&str, &str, &[&str]); 6] = [
    ("full", "Full backup", &["read", "compress"]),
    ("incremental", "Incremental backup", &["read", "hash", "server"]),
    ("merge", "Merge", &[]),
    ("restore-full", "Restore of the full backup", &["copy", "write"]),
    ("restore-last", "Restore of the last backup", &["copy", "write"]),
    ("verify", "Verify", &[]),
];
/// Those that store something, of which it matters how much.
const STORING: [&str; 3] = ["full", "incremental", "merge"];
const TPS: &str = "tps";
/// What the page calls all else.
const OTHERS: &str = "Others";
/// What is the same for all in a panel.
const SAME: [Condition; 6] =
    [Condition::Nightly, Condition::Share, Condition::Churn, Condition::Cluster, Condition::Cache, Condition::Size];
/// What is the same for all in a chart over the sizes.
const SAME_BUT_SIZE: [Condition; 5] =
    [Condition::Nightly, Condition::Share, Condition::Churn, Condition::Cluster, Condition::Cache];
/// The same, where the share that changed is told otherwise.
const SAME_BUT_SHARE: [Condition; 3] = [Condition::Churn, Condition::Cluster, Condition::Cache];
/// The same over a history, which begins with a backup before which nothing changed.
const SAME_HISTORY: [Condition; 2] = [Condition::Cluster, Condition::Cache];

const CSS: &str = "
body { color: #222; background: #fff; font: 15px/1.45 sans-serif; max-width: 900px; margin: 24px auto; padding: 0 12px; }
h1 { font-size: 24px; } h2 { font-size: 20px; margin-top: 40px; border-bottom: 1px solid #ccc; } h3 { font-size: 16px; margin: 28px 0 4px; }
svg { display: block; max-width: 100%; height: auto; }
figure { margin: 8px 0; } figcaption { margin-top: 6px; } figcaption, .note { color: #444; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0; width: 100%; }
th, td { padding: 2px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 180px; }
tr.ours td { background: #eaf3f9; }
pre { background: #f6f6f6; padding: 8px; overflow-x: auto; font-size: 12px; line-height: 1.35; }
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
";

/// Makes the page of the runs in these directories and writes it to `to`, or into the first of them.
///
/// # Errors
/// When a directory has no samples, or the page cannot be written.
pub fn write(directories: &[PathBuf], to: Option<&Path>) -> Result<PathBuf> {
    let runs = directories.iter().map(|directory| Run::read(directory)).collect::<Result<Vec<_>>>()?;
    let path = to.map(Path::to_owned).or_else(|| Some(directories.first()?.join(FILE))).unwrap_or_default();
    fs::write(&path, page(&runs)?).map_err(|e| cannot("write", &path, e))?;
    Ok(path)
}

/// The page's text.
///
/// # Errors
/// `Bug`, of the library that draws.
pub fn page(runs: &[Run]) -> Result<String> {
    let title = runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", ");
    let bodies = runs.iter().map(run_body).collect::<Result<Vec<_>>>()?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                title { "pgstrata bench: " (title) }
                style { (PreEscaped(CSS)) }
            }
            body {
                h1 { "pgstrata bench" }
                (by_size(runs)?)
                @for body in &bodies { (body) }
            }
        }
    };
    Ok(page.into_string())
}

fn figure(svg: &str, caption: &str) -> Markup {
    html! { figure { (PreEscaped(svg)) figcaption { (caption) } } }
}

fn run_body(run: &Run) -> Result<Markup> {
    let panels = panels(run).iter().map(Panel::shown).collect::<Result<Vec<_>>>()?;
    let command = run.command.lines().next().unwrap_or_default();
    Ok(html! {
        h2 { (run.name) }
        p { (run.title()) }
        pre.wrapped { (command) "\n\n" (run.machine) "\n" (run.versions) }
        details { summary { "All commands" } pre.wrapped { (run.command) } }
        p.note {
            "Medians of the samples that others on the machine did not disturb; whiskers and “min .. max” are their extremes. Rates are over \
             the cluster's bytes without the WAL. A star: all samples were disturbed."
        }
        @for panel in &panels { (panel) }
        (by_share(run)?)
        (growth(run)?)
        (beside_load(run)?)
        h3 { "The summary as it was printed" }
        pre { (run.summary) }
    })
}

/// All who did the same under the same conditions.
struct Panel<'a> {
    title: String,
    stores: bool,
    names: Vec<String>,
    groups: Vec<Group<'a>>,
}

fn panels(run: &Run) -> Vec<Panel<'_>> {
    let titles = Namer::of(&run.rows, &SAME);
    beside_each_other(&run.rows.iter().collect::<Vec<_>>(), &SAME)
        .into_iter()
        .map(|(action, beside)| Panel::new(&titles, action, beside))
        .collect()
}

/// Puts together who did the same under the same conditions, and adds the bounds on the same cluster with the same caches.
fn beside_each_other<'a>(rows: &[&'a Row], conditions: &[Condition]) -> Vec<(&'static str, Group<'a>)> {
    let is_other = |row: &Row| row.action != TPS && !ACTIONS.iter().any(|(action, ..)| *action == row.action);
    let mut all = Vec::new();
    for (action, title, bounds) in ACTIONS.into_iter().chain([("", OTHERS, &[][..])]) {
        let belongs = |row: &Row| row.action == action || action.is_empty() && is_other(row);
        let own = rows.iter().copied().filter(|row| row.tool != LIMIT && belongs(row));
        let mut alike = by_conditions(own, conditions);
        alike.sort_by_key(|group| group.first().is_nightly());
        for mut beside in alike {
            let (cluster, cache) = (&beside.first().cluster, &beside.first().cache);
            let size = conditions.contains(&Condition::Size).then_some(&beside.first().size);
            let sized = |row: &Row| size.is_none_or(|size| row.size == *size);
            let fits =
                |row: &Row| sized(row) && row.cluster == *cluster && [cache.as_str(), ""].contains(&row.cache.as_str());
            let bounding = |row: &&&Row| row.tool == LIMIT && bounds.contains(&row.action.as_str()) && fits(row);
            beside.rows.extend(rows.iter().filter(bounding));
            all.push((title, beside));
        }
    }
    all
}

impl<'a> Panel<'a> {
    fn new(titles: &Namer, title: &str, beside: Group<'a>) -> Self {
        let first = beside.first();
        let namer = Namer::of(beside.rows.iter().copied(), &[Condition::Jobs]);
        let groups = groups(beside.rows);
        let star = |group: &Group| if group.is_disturbed() { " *" } else { "" };
        let name = |group: &Group| namer.name(&group.first().step, group.first()) + star(group);
        Self {
            title: titles.name(title, first),
            stores: STORING.contains(&first.action.as_str()),
            names: groups.iter().map(name).collect(),
            groups,
        }
    }
}

impl Panel<'_> {
    fn shown(&self) -> Result<Markup> {
        let chart = chart::bars(&self.columns(), &self.bars())?;
        let caption = match self.stores {
            true => "Longer is faster on the left, and more bytes on the right.",
            false => "Longer is faster.",
        };
        let several = self.groups.len() > 1;
        let reference = self.groups.iter().zip(&self.names).find(|(group, _)| several && group.first().is_ours());
        let beside = reference.map(|(_, name)| name.trim_end_matches(" *"));
        Ok(html! {
            h3 { (self.title) }
            (figure(&chart, caption))
            .wide { table {
                tr {
                    th {} th { "runs" } th { "wall s" } th { "min .. max" } th { "GB/s" } th { "CPU s" } th { "server s" }
                    th { "peak MB" } th { "read MB" } th { "left MB" } @if beside.is_some() { th { "time" } }
                }
                @for (group, name) in self.groups.iter().zip(&self.names) {
                    (table_row(group, name, reference.map(|(group, _)| group)))
                }
            } }
            @if let Some(name) = beside {
                p.note { "Time: how many times as long as “" (name) "” in the same round, the median of the rounds." }
            }
        })
    }

    fn columns(&self) -> Vec<&'static str> {
        let mut columns = vec!["rate, GB/s"];
        columns.extend(self.stores.then_some("left on disk, MB"));
        columns
    }

    fn bars(&self) -> Vec<Bar> {
        let bar = |(group, name): (&Group, &String)| {
            let stored = group.spread(|row| row.bytes_written as f64 / MB);
            let stored = stored.filter(|_| group.first().tool != LIMIT);
            let values = [group.rate(), stored];
            Bar {
                name: name.clone(),
                tool: group.first().tool.clone(),
                values: values[..self.columns().len()].to_vec(),
            }
        };
        self.groups.iter().zip(&self.names).map(bar).collect()
    }
}

fn table_row(group: &Group<'_>, name: &str, reference: Option<&Group<'_>>) -> Markup {
    let of = |value: fn(&Row) -> f64| group.spread(value).map_or(0.0, |spread| spread.median);
    let wall = group.spread(|row| row.wall_s).unwrap_or_default();
    let read = |row: &Row| row.bytes_read.or(row.proc_read_bytes);
    let reads = group.rows.iter().any(|row| read(row).is_some());
    let beside = reference.map(|reference| group.time_beside(reference));
    html! {
        tr.ours[group.first().tool == OURS] {
            td { (name) }
            td { (wall.count) @if wall.count < group.rows.len() { " of " (group.rows.len()) } }
            td { (format!("{:.3}", wall.median)) }
            td { (format!("{:.3} .. {:.3}", wall.min, wall.max)) }
            td { (number(group.rate().unwrap_or_default().median)) }
            td { (format!("{:.2}", of(Row::cpu_s))) }
            td { (format!("{:.2}", of(|row| row.server_cpu_s))) }
            td { (format!("{:.0}", of(|row| row.peak_rss_bytes as f64 / MB))) }
            td { @if reads { (format!("{:.1}", of(|row| row.bytes_read.or(row.proc_read_bytes).unwrap_or(0) as f64 / MB))) } }
            td { (format!("{:.1}", of(|row| row.bytes_written as f64 / MB))) }
            @if let Some(times) = beside { td { @if let Some(times) = times { (format!("{times:.2} ×")) } } }
        }
    }
}

/// The name of a line: the tool and its way.
fn tool_and_way(row: &Row) -> String {
    [row.tool.as_str(), &row.way].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A line for each tool, way and what else is named by `namer`, through the points at `along`; lines of one point are left out.
fn lines_of<'a>(
    rows: impl IntoIterator<Item = &'a Row>,
    name: impl Fn(&Row) -> String,
    along: impl Fn(&Row) -> Option<f64>,
    value: impl Fn(&Row) -> f64,
    are_one: impl Fn(f64, f64) -> bool,
) -> Vec<Line> {
    let mut lines = Vec::new();
    for of_line in grouped(rows, |one, other| one.tool == other.tool && name(one) == name(other)) {
        let at = |row: &Row| along(row).unwrap_or_default();
        let known = of_line.rows.iter().copied().filter(|row| along(row).is_some());
        let points = grouped(known, |one, other| are_one(at(one), at(other)));
        let point = |group: &Group| Some((at(group.first()), group.spread(&value)?));
        let mut points: Vec<(f64, Spread)> = points.iter().filter_map(point).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        if points.len() > 1 {
            lines.push(Line { name: name(of_line.first()), tool: of_line.first().tool.clone(), points });
        }
    }
    lines
}

/// Cost against the cluster's size.
fn by_size(runs: &[Run]) -> Result<Markup> {
    let rows: Vec<&Row> = runs.iter().flat_map(|run| &run.rows).collect();
    let titles = Namer::of(rows.iter().copied(), &SAME_BUT_SIZE);
    let names = Namer::of(rows.iter().copied(), &[Condition::Jobs]);
    let size = |row: &Row| Some(row.cluster_bytes as f64 / GB);
    let are_one = |one: f64, other: f64| (one - other).abs() <= SAME_SIZE * one;
    let axes = (("cluster, GB", Scale::Logarithmic), ("wall time, s", Scale::Logarithmic));
    let mut charts = Vec::new();
    for (action, beside) in beside_each_other(&rows, &SAME_BUT_SIZE) {
        let title = titles.name(action, beside.first());
        let lines = lines_of(beside.rows, |row| names.name(row.kind(), row), size, |row| row.wall_s, are_one);
        if lines.iter().any(|line| line.tool != LIMIT) {
            charts.push((title, chart::lines(axes.0, axes.1, &lines)?));
        }
    }
    Ok(html! {
        @if !charts.is_empty() {
            h2 { "Cost against the cluster's size" }
            p.note { "Of all runs on this page. Both axes are logarithmic: what grows with the cluster rises by a decade in a decade." }
        }
        @for (title, chart) in &charts {
            h3 { (title) }
            (figure(chart, "Wall time of the steps that ran on clusters of different sizes; whiskers: least and greatest."))
        }
    })
}

/// Cost of incrementals against the share of the blocks that changed.
fn by_share(run: &Run) -> Result<Markup> {
    let rows = || run.rows.iter().filter(|row| row.action == "incremental" && !row.is_nightly());
    let is_changed = |row: &Row| row.share().is_some_and(|share| share > 0.0);
    let titles = Namer::of(rows(), &SAME_BUT_SHARE);
    let mut charts = Vec::new();
    for alike in by_conditions(rows().filter(|row| is_changed(row)), &SAME_BUT_SHARE) {
        let first = alike.first();
        // Where nothing changed, there is no way in which it did.
        let fits = |row: &Row| (&row.cluster, &row.cache) == (&first.cluster, &first.cache);
        let unchanged = rows().filter(|row| !is_changed(row) && fits(row) && [&first.churn, ""].contains(&&*row.churn));
        let rows: Vec<&Row> = unchanged.chain(alike.rows.iter().copied()).collect();
        charts.extend(share_charts(&rows)?.map(|charts| (titles.name("", first), charts)));
    }
    Ok(html! {
        @for (conditions, [times, stored]) in &charts {
            h3 { "Incremental backup: cost against the share that changed" (conditions) }
            (figure(times, "Wall time by how much of the cluster was asked to change before; whiskers: least and greatest."))
            (figure(stored, "What the backup left on disk, metadata and WAL included. Both axes are logarithmic."))
        }
    })
}

/// Wall times and stored bytes, if there are different shares.
fn share_charts(rows: &[&Row]) -> Result<Option<[String; 2]>> {
    let names = Namer::of(rows.iter().copied(), &[Condition::Jobs]);
    let name = |row: &Row| names.name(&tool_and_way(row), row);
    let lines =
        |value: fn(&Row) -> f64| lines_of(rows.iter().copied(), name, Row::share, value, |one, other| one == other);
    let (times, stored) = (lines(|row| row.wall_s), lines(|row| row.bytes_written as f64 / MB));
    if times.is_empty() {
        return Ok(None);
    }
    let share = ("blocks changed, %", Scale::Logarithmic);
    let times = chart::lines(share, ("wall time, s", Scale::Linear), &times)?;
    let stored = chart::lines(share, ("left on disk, MB", Scale::Logarithmic), &stored)?;
    Ok(Some([times, stored]))
}

/// The repository's length over a history of nights.
fn growth(run: &Run) -> Result<Markup> {
    let nightly = || run.rows.iter().filter(|row| row.is_nightly());
    let titles = Namer::of(nightly(), &SAME_HISTORY);
    let axes = (("nights since the full backup", Scale::Linear), ("repository, MB", Scale::Linear));
    let mut charts = Vec::new();
    for alike in by_conditions(nightly(), &SAME_HISTORY) {
        let first = alike.first();
        let line = |nights: Group| {
            let tool = nights.first().tool.clone();
            Line { name: tool.clone(), tool, points: repository_lengths(run, &nights) }
        };
        let tools = grouped(alike.rows, |one, other| one.tool == other.tool);
        let lines: Vec<Line> = tools.into_iter().map(line).filter(|line| line.points.len() > 1).collect();
        if !lines.is_empty() {
            charts.push((titles.name("", first), chart::lines(axes.0, axes.1, &lines)?));
        }
    }
    Ok(html! {
        @for (conditions, chart) in &charts {
            h3 { "The repository's growth over the nights" (conditions) }
            (figure(chart, "All bytes of a tool's repository after each night; 0 is the full backup."))
        }
    })
}

/// What is said of the repository after each night; where nothing is, all that the nights left on top of the tool's full backup.
fn repository_lengths(run: &Run, nights: &Group<'_>) -> Vec<(f64, Spread)> {
    let mut nights: Vec<&Row> = nights.rows.clone();
    nights.sort_by_key(|row| row.night);
    let night = |row: &Row| f64::from(row.night.unwrap_or_default());
    if nights.iter().any(|row| row.stored_bytes.is_some()) {
        let said = nights.iter().copied().filter(|row| row.stored_bytes.is_some());
        let groups = grouped(said, |one, other| one.night == other.night);
        let point = |group: &Group| {
            let stored = group.spread(|row| row.stored_bytes.unwrap_or_default() as f64 / MB)?;
            Some((night(group.first()), stored))
        };
        return groups.iter().filter_map(point).collect();
    }
    let Some(last) = nights.first() else { return Vec::new() };
    let full = run.rows.iter().find(|row| row.action == "full" && row.tool == last.tool);
    let mut sum = full.map_or(0, |full| full.bytes_written);
    let mut points = vec![(0.0, Spread::one(sum as f64 / MB))];
    for row in nights {
        sum += row.bytes_written;
        points.push((night(row), Spread::one(sum as f64 / MB)));
    }
    points
}

/// Transactions a second of the load beside each tool.
fn beside_load(run: &Run) -> Result<Markup> {
    let rows: Vec<&Row> = run.rows.iter().filter(|row| row.tps.is_some()).collect();
    let namer = Namer::of(rows.iter().copied(), &[Condition::Cluster, Condition::Jobs]);
    let groups = groups(rows);
    if groups.is_empty() {
        return Ok(html! {});
    }
    let bar = |group: &Group| Bar {
        name: namer.name(&group.first().step, group.first()),
        tool: group.first().tool.clone(),
        values: vec![group.spread(|row| row.tps.unwrap_or_default())],
    };
    let chart = chart::bars(&["pgbench, transactions a second"], &groups.iter().map(bar).collect::<Vec<_>>())?;
    Ok(html! {
        h3 { "What the server feels" }
        (figure(&chart, "Transactions a second of pgbench while this ran beside it; whiskers: least and greatest."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runs::parse;

    const HEAD: &str = "step,round,wall_s,others,cluster_bytes,bytes_written,tool,action,way,cache,share_changed,night,stored_bytes,tps\n";

    fn run(lines: &str) -> Run {
        let [machine, versions] = [const { String::new() }; 2];
        let (summary, command) = ("A <cluster>\n\ntable".to_owned(), "bench x\n\nmore".to_owned());
        Run {
            name: "date-name".to_owned(),
            rows: parse(&format!("{HEAD}{lines}")).unwrap(),
            summary,
            machine,
            versions,
            command,
        }
    }

    #[test]
    fn a_page_needs_nothing_but_itself() {
        let run = run("full,1,1,0,1000,500,pgstrata,full,,warm,,,,\nb,1,2,0,1000,700,barman,full,,warm,,,,\n");
        let page = page(&[run]).unwrap();
        for outside in ["src=", "href=", "url(", "<script", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("A &lt;cluster&gt;") && page.contains("<svg"));
        assert!(page.contains("2.00 ×"));
    }

    #[test]
    fn peers_and_bounds_stand_beside_what_did_the_same() {
        let run = run(
            "a,1,1,0,1000,5,pgstrata,full,,,,,,\nb,1,1,0,1000,5,barman,full,,,,,,\nc,1,1,0,1000,5,limit,read,,,,,,\n\
                       d,1,1,0,1000,5,pgstrata,incremental,,,1,,,\ne,1,1,0,1000,5,pgstrata,list,,,,,,\n",
        );
        let told: Vec<String> =
            panels(&run).iter().map(|panel| format!("{}: {}", panel.title, panel.names.join(" "))).collect();
        assert_eq!(told, ["Full backup: a b c", "Incremental backup, 1 % changed: d c", "Others: e"]);
    }

    #[test]
    fn what_a_run_does_not_have_is_not_on_its_page() {
        let page = page(&[run("a,1,1,0,1000,5,pgstrata,full,,,,,,\n")]).unwrap();
        for absent in ["share that changed", "growth over", "server feels", "Cost against"] {
            assert!(!page.contains(absent), "{absent}");
        }
    }

    #[test]
    fn shares_nights_load_and_sizes_have_their_charts() {
        let one = run(
            "a,1,1,0,1000,5,pgstrata,incremental,scan,,0,,,\na,1,2,0,1000,5,pgstrata,incremental,scan,,0.1,,,\n\
                       n,1,1,0,1000,5,pgstrata,incremental,scan,,,1,900,\nn,2,1,0,1000,5,pgstrata,incremental,scan,,,2,950,\n\
                       t,1,1,0,1000,5,pgstrata,tps,,,,,,300\nf,1,1,0,1000,5,pgstrata,full,,,,,,\n",
        );
        let other = run("f,1,9,0,9000,5,pgstrata,full,,,,,,\n");
        let page = page(&[one, other]).unwrap();
        for present in ["share that changed", "growth over", "server feels", "Cost against the cluster"] {
            assert!(page.contains(present), "{present}");
        }
    }

    #[test]
    fn a_repository_that_nobody_measured_is_what_its_backups_left() {
        let run = run("f,1,1,0,1000,5000000,pgstrata,full,,,,,,\nn,1,1,0,1000,1000000,pgstrata,incremental,,,,1,,\n\
                       n,2,1,0,1000,2000000,pgstrata,incremental,,,,2,,\n");
        let nights = Group { rows: run.rows[1..].iter().collect() };
        let lengths: Vec<(f64, f64)> =
            repository_lengths(&run, &nights).iter().map(|(night, spread)| (*night, spread.median)).collect();
        assert_eq!(lengths, [(0.0, 5.0), (1.0, 6.0), (2.0, 8.0)]);
    }
}
