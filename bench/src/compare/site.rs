//! The cluster that everybody backs up: a server's, or a synthetic one that no server runs on.
//!
//! A server's cluster changes by SQL, a synthetic one by its generator; how much and where is [`churn`](super::churn)'s to say. Files
//! that this program writes belong to the servers' user, who runs all commands.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use testdata::cluster::Cluster;
use testdata::random::Random;
use testdata::synthetic::page::PAGE_LEN;
use testdata::synthetic::{Options, SEGMENT_BLOCKS, SyntheticCluster};
use testdata::{Error, Result};

use super::SiteArgs;
use super::churn::{Churn, Table, choose, new_rows_for, rows_for};
use super::mixed;
use crate::measure::Usage;
use crate::scratch::{Scratch, Start, say};
use crate::stage::{Scene, Stage};
use crate::{cannot, read};

/// What kind of cluster it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// pgbench's tables.
    Pgbench,
    /// These, and as many bytes of texts, documents, uuids and numbers with several indexes.
    Mixed,
    /// Pages that are written to disk directly, without a server.
    Synthetic,
}

impl Kind {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pgbench => "pgbench",
            Self::Mixed => "mixed",
            Self::Synthetic => "synthetic",
        }
    }
}

/// The server's settings besides the usual ones: enough WAL for every detector, summaries where there are any.
const CONF: [&str; 2] = ["wal_keep_size = 4GB", "max_wal_size = 2GB"];
const CONF_SUMMARIES: [&str; 3] = ["wal_keep_size = 4GB", "max_wal_size = 2GB", "summarize_wal = on"];
const TOOLS: [&str; 2] = ["pgbench", "pg_basebackup"];
const TOOLS_INCREMENTAL: [&str; 3] = ["pgbench", "pg_basebackup", "pg_combinebackup"];
const MB: f64 = 1e6;
/// How often it is looked whether the server is ready.
const POLL: Duration = Duration::from_millis(100);

/// The database of a synthetic cluster.
const DATABASE: u32 = 16_385;
/// The number of its first tablespace.
const TABLESPACE: u32 = 90_001;
/// The largest relation of a synthetic cluster, if it is large: three and a half segments.
const LARGE_BLOCKS: u64 = SEGMENT_BLOCKS as u64 * 7 / 2;

/// Where a tablespace is, and where a restore puts it.
#[derive(Clone, Debug)]
pub struct Moved {
    /// The tablespace's number.
    pub number: u32,
    /// Its directory.
    pub from: PathBuf,
    /// Its directory in the restored cluster.
    pub to: PathBuf,
}

enum Home {
    Server(Box<Stage>),
    Synthetic { cluster: RefCell<Box<SyntheticCluster>>, scratch: Scratch },
}

/// The cluster, and the scratch directory that it is in.
pub struct Site {
    home: Home,
    kind: Kind,
    scale: u32,
    major: u32,
    tablespaces: Vec<u32>,
}

impl Site {
    /// Makes the cluster; `hot` says how much of it each hot table is to dirty, in percent.
    ///
    /// # Errors
    /// When that fails.
    pub fn set(args: &SiteArgs, scratch: Scratch, hot: &[f64]) -> Result<Self> {
        let count = if args.cluster == Kind::Synthetic { args.tablespaces as usize } else { 0 };
        let tablespaces: Vec<u32> = (TABLESPACE..).take(count).collect();
        let home = match args.cluster {
            Kind::Synthetic => synthetic(args, scratch, &tablespaces)?,
            _ => Home::Server(Box::new(server(args, scratch)?)),
        };
        let site = Self { home, kind: args.cluster, scale: args.scale, major: args.major, tablespaces };
        hot.iter().try_for_each(|share| site.make_hot_table(*share))?;
        Ok(site)
    }

    /// The major version of PostgreSQL.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// What kind of cluster it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The scratch directory.
    pub fn scratch(&self) -> &Scratch {
        match &self.home {
            Home::Server(stage) => stage.scratch(),
            Home::Synthetic { scratch, .. } => scratch,
        }
    }

    /// The server and its cluster, if there is one.
    pub fn stage(&self) -> Option<&Stage> {
        match &self.home {
            Home::Server(stage) => Some(stage),
            Home::Synthetic { .. } => None,
        }
    }

    /// The running cluster, if there is a server.
    pub fn server(&self) -> Option<&Cluster> {
        self.stage().map(Stage::cluster)
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.scratch().path("data")
    }

    /// What a backup reads: the data directory and the tablespaces.
    pub fn directories(&self) -> Vec<PathBuf> {
        vec![self.data_dir()]
    }

    /// The tablespaces, and where a restore puts them.
    pub fn tablespaces(&self) -> Vec<Moved> {
        let to = |number: u32| self.scratch().path("restored").join(format!("tablespaces/{number}"));
        let moved = |&number: &u32| Moved { number, from: tablespace(self.scratch(), number), to: to(number) };
        self.tablespaces.iter().map(moved).collect()
    }

    /// The bytes of all its files but the WAL.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        Ok(read::files(&self.data_dir())?.iter().map(|(_, len)| len).sum())
    }

    /// Runs a command as [`Scratch::measure_from`] does, with a checkpoint behind it.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure(&self, command: &mut Command, start: &Start) -> Result<Usage> {
        match &self.home {
            Home::Server(stage) => stage.measure_from(command, start),
            Home::Synthetic { scratch, .. } => scratch.measure_from(command, None, start),
        }
    }

    /// Changes about `share` percent of the blocks; `turn` says how often it was changed before.
    ///
    /// # Errors
    /// PostgreSQL's; when a file cannot be written.
    pub fn change(&self, churn: Churn, share: f64, turn: u64) -> Result<()> {
        if share == 0.0 {
            return Ok(());
        }
        match &self.home {
            Home::Server(stage) => self.change_tables(stage, churn, share, turn),
            Home::Synthetic { cluster, scratch } => {
                change_files(&mut cluster.borrow_mut(), churn, share, turn)?;
                own_tree(scratch, &self.data_dir(), &self.tablespaces)
            }
        }
    }

    fn change_tables(&self, stage: &Stage, churn: Churn, share: f64, turn: u64) -> Result<()> {
        if churn == Churn::Hot {
            let name = hot_name(share);
            let update = format!("UPDATE {name} SET views = views + 1");
            stage.cluster().sql_each("postgres", &[&update, &format!("VACUUM {name}")])?;
            return stage.cluster().sql("postgres", "CHECKPOINT");
        }
        let tables = self.tables(stage)?;
        let all: u64 = tables.iter().map(|(_, table)| table.total).sum();
        let wanted = stage.blocks()? as f64 * share / 100.0;
        for (name, table) in &tables {
            let blocks = (wanted * table.total as f64 / all as f64).round() as u64;
            let statements = statements(name, table, churn, blocks, turn);
            let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
            stage.cluster().sql_each("postgres", &statements)?;
        }
        stage.cluster().sql("postgres", "CHECKPOINT")
    }

    /// The tables that change, as they are now.
    fn tables(&self, stage: &Stage) -> Result<Vec<(&'static TableSort, Table)>> {
        let names = TABLES.iter().filter(|table| self.kind == Kind::Mixed || table.name == PGBENCH);
        names.map(|sort| Ok((sort, table(stage, sort)?))).collect()
    }

    /// A table every row of which is updated by a hot change: half of what is to differ, as the other half are the new versions.
    fn make_hot_table(&self, share: f64) -> Result<()> {
        let Home::Server(stage) = &self.home else { return Ok(()) };
        // 60 rows of 128 bytes on a page; an index of a sixth of its pages.
        let rows = (stage.blocks()? as f64 * share / 100.0 / 2.2 * 60.0) as u64;
        let name = hot_name(share);
        let make = format!(
            "CREATE TABLE {name} AS SELECT id, 0 AS views, repeat(md5(id::text), 2) AS body FROM generate_series(1, {rows}) id"
        );
        let key = format!("ALTER TABLE {name} ADD PRIMARY KEY (id)");
        stage.cluster().sql_each("postgres", &[&make, &key, &format!("VACUUM (FREEZE, ANALYZE) {name}")])
    }

    /// Cleans up what the changes of the last round left, so that the first vacuum of the next one does not.
    ///
    /// # Errors
    /// PostgreSQL's.
    pub fn tidy(&self) -> Result<()> {
        let Some(server) = self.server() else { return Ok(()) };
        server.sql_each("postgres", &["VACUUM (FREEZE)", "CHECKPOINT"])
    }

    /// Waits until the server's WAL summaries reach its last checkpoint, where it writes any.
    ///
    /// # Errors
    /// PostgreSQL's; when we were asked to end.
    pub fn wait_for_summaries(&self) -> Result<()> {
        let Some(server) = self.server().filter(|_| self.major >= 17) else { return Ok(()) };
        let lacks =
            "SELECT s.summarized_lsn < c.redo_lsn FROM pg_get_wal_summarizer_state() s, pg_control_checkpoint() c";
        while server.query_value("postgres", lacks)? == "t" {
            self.scratch().pause(POLL)?;
        }
        Ok(())
    }

    /// What the table says of the settings.
    pub fn settings(&self) -> String {
        self.stage().map_or_else(|| "no server".to_owned(), Stage::settings)
    }

    /// The cluster in a word or two, for titles.
    pub fn describe(&self) -> String {
        match self.kind {
            Kind::Synthetic => "synthetic".to_owned(),
            kind => format!("{} at scale {}", kind.name(), self.scale),
        }
    }

    /// Stops the server and removes everything, unless it is to be kept; says where it is then.
    ///
    /// # Errors
    /// When the server does not stop.
    pub fn close(self, keep: bool) -> Result<()> {
        match self.home {
            Home::Server(stage) => stage.close(keep),
            Home::Synthetic { scratch, .. } => {
                scratch.close(keep);
                Ok(())
            }
        }
    }
}

fn server(args: &SiteArgs, scratch: Scratch) -> Result<Stage> {
    let new = args.major >= 17;
    let conf: &[&str] = if new { &CONF_SUMMARIES } else { &CONF };
    let tools: &[&str] = if new { &TOOLS_INCREMENTAL } else { &TOOLS };
    let stage = Stage::set(scratch, &Scene { scale: args.scale, major: args.major, conf, tools })?;
    if args.cluster == Kind::Mixed {
        say("filling tables of texts, documents, uuids and numbers");
        mixed::load(&stage, args.scale)?;
        stage.settle()?;
    }
    Ok(stage)
}

/// A table that changes, and how.
struct TableSort {
    name: &'static str,
    key: &'static str,
    counter: &'static str,
    /// The columns of a new row that is like an old one, but for its key.
    copied: &'static str,
}

const PGBENCH: &str = "pgbench_accounts";
const TABLES: [TableSort; 4] = [
    TableSort { name: PGBENCH, key: "aid", counter: "abalance", copied: "bid, abalance, filler" },
    TableSort {
        name: "article",
        key: "id",
        counter: "views",
        copied: "gen_random_uuid(), title, body, tags, created, price, views",
    },
    TableSort { name: "event", key: "id", counter: "views", copied: "at, kind, payload, amount, actor, views" },
    TableSort { name: "report", key: "id", counter: "views", copied: "written, body, views" },
];

fn table(stage: &Stage, sort: &TableSort) -> Result<Table> {
    let name = sort.name;
    let query = format!(
        "SELECT (SELECT max({}) FROM {name}), pg_relation_size('{name}') / {PAGE_LEN},
                pg_total_relation_size('{name}') / {PAGE_LEN},
                (SELECT string_agg((pg_relation_size(indexrelid) / {PAGE_LEN})::text, ' ' ORDER BY indisprimary DESC)
                   FROM pg_index WHERE indrelid = '{name}'::regclass)",
        sort.key
    );
    let rows = stage.cluster().query_strings("postgres", &query)?;
    let field = |at: usize| rows.first().and_then(|row| row.get(at)?.clone()).unwrap_or_default();
    let number = |text: &str| text.parse().map_err(|_| Error::new(format!("{name} has {text:?} rows or blocks")));
    let indexes = field(3).split_whitespace().map(number).collect::<Result<_>>()?;
    Ok(Table { rows: number(&field(0))?, heap: number(&field(1))?, total: number(&field(2))?, indexes })
}

/// What changes about `blocks` blocks of a table.
fn statements(sort: &TableSort, table: &Table, churn: Churn, blocks: u64, turn: u64) -> Vec<String> {
    let TableSort { name, key, counter, copied } = sort;
    // Found by the index: a sequential scan would also set the hint bits of the rows that earlier turns updated.
    let law = if churn == Churn::Vacuum { Churn::Uniform } else { churn };
    let chosen = |rows: u64| {
        let keys = choose(law, table.rows, rows, turn).into_iter().map(|row| (row + 1).to_string());
        format!("{key} = ANY ('{{{}}}'::int[])", keys.collect::<Vec<_>>().join(","))
    };
    match churn {
        Churn::Append => {
            let rows = new_rows_for(table, blocks);
            let old = table.rows.saturating_sub(rows);
            vec![format!("INSERT INTO {name} SELECT {key} + {rows}, {copied} FROM {name} WHERE {key} > {old}")]
        }
        Churn::Vacuum => {
            let delete = format!("DELETE FROM {name} WHERE {}", chosen(rows_for(table, blocks)));
            vec![delete, format!("VACUUM {name}")]
        }
        _ => vec![format!("UPDATE {name} SET {counter} = {counter} + 1 WHERE {}", chosen(rows_for(table, blocks)))],
    }
}

fn hot_name(share: f64) -> String {
    format!("hot_{}", share.to_string().replace('.', "_"))
}

fn synthetic(args: &SiteArgs, scratch: Scratch, tablespaces: &[u32]) -> Result<Home> {
    let mut options = Options::new(args.major, 1);
    options.random_percent = args.random_percent;
    let data_dir = scratch.path("data");
    let mut cluster = SyntheticCluster::create(&data_dir, options)?;
    cluster.add_database(DATABASE)?;
    for number in tablespaces {
        cluster.add_tablespace(*number, &tablespace(&scratch, *number), DATABASE)?;
    }
    let begun = std::time::Instant::now();
    let blocks = lens(args.size / PAGE_LEN as u64, args.relations);
    cluster.add_relations(DATABASE, &blocks, tablespaces)?;
    own_tree(&scratch, &data_dir, tablespaces)?;
    let bytes: u64 = read::files(&data_dir)?.iter().map(|(_, len)| len).sum();
    let seconds = begun.elapsed().as_secs_f64();
    let (megabytes, relations) = (bytes as f64 / MB, args.relations);
    say(&format!("the cluster has {megabytes:.0} MB in {relations} relations, written in {seconds:.1} s"));
    Ok(Home::Synthetic { cluster: RefCell::new(Box::new(cluster)), scratch })
}

fn tablespace(scratch: &Scratch, number: u32) -> PathBuf {
    scratch.path(&format!("tablespace-{number}"))
}

/// The lengths of `relations` relations with so many blocks together: half of the blocks in large ones, the rest in small ones of each
/// magnitude as many; where there are fewer blocks than relations, some are empty, as of tables that nobody uses.
fn lens(blocks: u64, relations: u32) -> Vec<u32> {
    let relations = u64::from(relations.max(1));
    let spare = blocks.saturating_sub(relations) / 2;
    let large = spare.div_ceil(LARGE_BLOCKS).min(relations / 2 + 1);
    let mut lens: Vec<u64> = (0..large).map(|_| spare / large.max(1)).collect();
    let small = relations - large;
    let rest = blocks - lens.iter().sum::<u64>();
    let mut random = Random::new(blocks);
    let weights: Vec<u64> = (0..small).map(|_| 1 << random.below(8)).collect();
    let sum: u64 = weights.iter().sum::<u64>().max(1);
    let mut given = 0;
    let mut weight = 0;
    for own in weights {
        weight += own;
        let until = u64::try_from(u128::from(rest) * u128::from(weight) / u128::from(sum)).unwrap_or(given);
        lens.push(until - given);
        given = until;
    }
    // Where there are only large ones, the first is the largest.
    lens[0] += blocks - lens.iter().sum::<u64>();
    lens.into_iter().map(|len| u32::try_from(len).unwrap_or(u32::MAX)).collect()
}

fn change_files(cluster: &mut SyntheticCluster, churn: Churn, share: f64, turn: u64) -> Result<()> {
    let lens: Vec<u64> = cluster.relations().iter().map(|relation| u64::from(relation.blocks)).collect();
    let largest = (0..lens.len()).max_by_key(|at| lens[*at]).unwrap_or(0);
    let all: u64 = lens.iter().sum();
    let wanted = (all as f64 * share / 100.0).round() as u64;
    match churn {
        Churn::Append => cluster.append(largest, u32::try_from(wanted).unwrap_or(u32::MAX))?,
        Churn::Hot => cluster.rewrite(largest, &narrow(choose(churn, lens[largest], wanted, turn)))?,
        _ => {
            let mut chosen = choose(churn, all, wanted, turn).into_iter().peekable();
            let mut from = 0;
            for (index, len) in lens.iter().enumerate() {
                let mut own = Vec::new();
                while let Some(block) = chosen.next_if(|block| *block < from + len) {
                    own.push(block - from);
                }
                from += len;
                if !own.is_empty() {
                    cluster.rewrite(index, &narrow(own))?;
                }
            }
        }
    }
    cluster.checkpoint()
}

fn narrow(blocks: Vec<u64>) -> Vec<u32> {
    blocks.into_iter().filter_map(|block| u32::try_from(block).ok()).collect()
}

/// Gives what this program wrote to the servers' user.
fn own_tree(scratch: &Scratch, data_dir: &Path, tablespaces: &[u32]) -> Result<()> {
    let roots =
        std::iter::once(data_dir.to_owned()).chain(tablespaces.iter().map(|number| tablespace(scratch, *number)));
    let mut pending: Vec<PathBuf> = roots.collect();
    let owner = fs::metadata(scratch.work()).map_err(|e| cannot("look at", scratch.work(), e))?.uid();
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).map_err(|e| cannot("look at", &path, e))?;
        if metadata.is_symlink() {
            continue;
        }
        if metadata.uid() != owner {
            scratch.user().own(&path)?;
        }
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).map_err(|e| cannot("list", &path, e))?;
            pending.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lengths_of_relations_sum_up_to_what_is_asked_for() {
        for (blocks, relations) in [(1_000_000, 50_000), (25_000, 50_000), (1_000_000, 1), (3_000_000, 10), (0, 3)] {
            let lens = lens(blocks, relations);
            assert_eq!(lens.len(), relations as usize);
            assert_eq!(lens.iter().map(|len| u64::from(*len)).sum::<u64>(), blocks, "{blocks} in {relations}");
        }
        let large = lens(1_000_000, 50_000);
        assert!(large[0] > SEGMENT_BLOCKS);
    }

    #[test]
    fn a_synthetic_cluster_changes_by_the_share_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = SyntheticCluster::create(&dir.path().join("data"), Options::new(18, 1)).unwrap();
        cluster.add_database(DATABASE).unwrap();
        cluster.add_relations(DATABASE, &[2000, 3, 0, 997], &[]).unwrap();
        let pages = || {
            let files = read::files(&dir.path().join("data/base/16385")).unwrap().into_iter();
            let main =
                |path: &Path| path.file_name().unwrap().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
            let pages = |path| fs::read(path).unwrap().chunks(PAGE_LEN).map(<[u8]>::to_vec).collect::<Vec<_>>();
            files.filter(|(path, _)| main(path)).map(|(path, _)| pages(path)).collect::<Vec<_>>()
        };
        for (turn, churn) in
            [Churn::Uniform, Churn::Zipf, Churn::Hot, Churn::Vacuum, Churn::Append].into_iter().enumerate()
        {
            let before = pages();
            change_files(&mut cluster, churn, 10.0, turn as u64).unwrap();
            let differ = |(old, new): (&Vec<Vec<u8>>, &Vec<Vec<u8>>)| {
                let both = old.iter().zip(new).filter(|(old, new)| old != new).count();
                both + new.len() - old.len()
            };
            assert_eq!(before.iter().zip(&pages()).map(differ).sum::<usize>(), 300, "{churn:?}");
        }
    }

    #[test]
    fn statements_name_as_many_rows_as_it_takes() {
        let table = Table { rows: 61_000, heap: 1000, indexes: vec![170], total: 1170 };
        let update = statements(&TABLES[0], &table, Churn::Uniform, 100, 1);
        assert!(update[0].starts_with("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = ANY ('{"));
        assert!((45..=52).contains(&update[0].matches(',').count()), "{update:?}");
        let insert = statements(&TABLES[0], &table, Churn::Append, 117, 1);
        assert_eq!(
            insert,
            [
                "INSERT INTO pgbench_accounts SELECT aid + 6100, bid, abalance, filler FROM pgbench_accounts WHERE aid > 54900"
            ]
        );
        let vacuum = statements(&TABLES[0], &table, Churn::Vacuum, 100, 1);
        assert!(vacuum[0].starts_with("DELETE") && vacuum[1] == "VACUUM pgbench_accounts");
    }
}
