//! `merge`: a month of nights becomes one full backup, by pgstrata and by PostgreSQL's own tools, and what is restored from it.
//!
//! ```text
//! the nights, each once: some pgbench transactions; a checkpoint; pgstrata backup; pg_basebackup --incremental
//! each round, on what they left:
//!     merge; restore of the merged backup                    then the merged backup is removed again
//!     merge --repack; restore of that one                    likewise
//!     restore of the last incremental, which nobody merged
//!     pg_combinebackup of the chain: plain, --copy-file-range, --link, each also with --no-sync
//!     cp -a of a combined directory, and sync                the bound of all that write a cluster
//! ```
//!
//! In every other round `pg_combinebackup` comes before pgstrata.
//!
//! Both histories are of the same nights. So in the first round what was made of them is compared: the relation files of the restored merged
//! backup and of the combined one are those of the cluster, byte for byte, and a server on the restored one has its rows.
//!
//! How much a night changes: a transaction updates one row of `pgbench_accounts`, which dirties its heap page and, as the new version goes to
//! another one, the leaf of the primary key that points to it. So there are as many transactions as half a percent of the cluster has blocks.

use std::path::Path;
use std::process::Command;

use engine::repo::{BackupId, ClusterName, Repository};
use testdata::cluster::{Cluster, StopMode, succeed};
use testdata::{Error, Result};

use crate::record::{Measured, Recorder};
use crate::report::{LEGEND, Run, Step, changed};
use crate::scratch::{Scratch, say};
use crate::stage::{Scene, Stage};
use crate::{MergeArgs, machine, memory, read};

const MAJOR: u32 = 18;
/// Without summaries there is no incremental `pg_basebackup`; and more WAL than of a night is only in the way.
const CONF: [&str; 2] = ["summarize_wal = on", "max_wal_size = 1GB"];
const TOOLS: [&str; 4] = ["pgbench", "pg_basebackup", "pg_combinebackup", "pg_verifybackup"];
const MB: f64 = 1e6;

const FIRST: Step = Step::beside("pgstrata full", &[FIRST_PG]);
const NIGHT: Step = Step::beside("pgstrata incremental, each night", &[NIGHT_PG]);
const MERGE: Step = Step::beside("pgstrata merge", &[COMBINE, COMBINE_RANGE, COMBINE_LINK, COMBINE_LINK_NO_SYNC, COPY]);
const REPACK: Step = Step::beside("pgstrata merge --repack", &[COMBINE, COMBINE_RANGE, COPY]);
const RESTORE_MERGED: Step = Step::beside("pgstrata restore of the merged", &[COMBINE, COMBINE_RANGE, COPY]);
const RESTORE_REPACKED: Step = Step::beside("pgstrata restore of the repacked", &[COMBINE, COMBINE_RANGE, COPY]);
const RESTORE_LAST: Step = Step::beside("pgstrata restore of the last incremental", &[COMBINE, COMBINE_RANGE, COPY]);
const FIRST_PG: Step = Step::alone("pg_basebackup full");
const NIGHT_PG: Step = Step::alone("pg_basebackup --incremental, each night");
const COMBINE: Step = Step::alone("pg_combinebackup");
const COMBINE_NO_SYNC: Step = Step::alone("pg_combinebackup --no-sync");
const COMBINE_RANGE: Step = Step::alone("pg_combinebackup --copy-file-range");
const COMBINE_RANGE_NO_SYNC: Step = Step::alone("pg_combinebackup --copy-file-range --no-sync");
const COMBINE_LINK: Step = Step::alone("pg_combinebackup --link");
const COMBINE_LINK_NO_SYNC: Step = Step::alone("pg_combinebackup --link --no-sync");
const COPY: Step = Step::alone("cp -a and sync");

/// In the table's order.
const STEPS: [Step; 16] = [
    MERGE,
    REPACK,
    RESTORE_MERGED,
    RESTORE_REPACKED,
    RESTORE_LAST,
    COMBINE,
    COMBINE_NO_SYNC,
    COMBINE_RANGE,
    COMBINE_RANGE_NO_SYNC,
    COMBINE_LINK,
    COMBINE_LINK_NO_SYNC,
    COPY,
    FIRST,
    FIRST_PG,
    NIGHT,
    NIGHT_PG,
];
/// Last, with `--link`, the outcome shares files with the chain.
const COMBINATIONS: [(Step, &[&str]); 6] = [
    (COMBINE, &[]),
    (COMBINE_NO_SYNC, &["--no-sync"]),
    (COMBINE_RANGE, &["--copy-file-range"]),
    (COMBINE_RANGE_NO_SYNC, &["--copy-file-range", "--no-sync"]),
    (COMBINE_LINK, &["--link"]),
    (COMBINE_LINK_NO_SYNC, &["--link", "--no-sync"]),
];

/// What a server says of the rows of a table, in whatever order they are.
const TABLES: [&str; 4] = ["pgbench_accounts", "pgbench_branches", "pgbench_history", "pgbench_tellers"];

/// Runs the workload and writes its results.
///
/// # Errors
/// When any command fails, or what was merged is not what it should be; then there are no results.
pub fn run(args: &MergeArgs) -> Result<()> {
    let scratch = Scratch::set(&args.common, false, &["repo", "chain"])?;
    let stage = Stage::set(scratch, &Scene { scale: args.scale, major: MAJOR, conf: &CONF, tools: &TOOLS })?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    let mut month = Month { args, stage: &stage, last: String::new(), chain: Vec::new(), found: String::new() };
    month.pass(&mut recorder)?;
    recorder.rounds(args.runs, args.common.patience > 0, |recorder| month.play(recorder))?;
    recorder.notes.load_after = machine::load_average();
    month.report(&recorder)?;
    stage.close(args.common.keep)
}

struct Month<'a> {
    args: &'a MergeArgs,
    stage: &'a Stage,
    /// pgstrata's backup of the last night.
    last: String,
    /// The backups of `pg_basebackup`, the full one first.
    chain: Vec<std::path::PathBuf>,
    /// What was found to be right.
    found: String,
}

impl Month<'_> {
    /// Lets the nights pass. Their backups are measured as things are: there are enough of them.
    fn pass(&mut self, recorder: &mut Recorder) -> Result<()> {
        self.stage.scratch().user().make_dir(self.stage.scratch().work(), "chain")?;
        recorder.round = 1;
        self.backup(recorder, FIRST, &["--full", "--init"])?;
        self.basebackup(recorder, FIRST_PG)?;
        let transactions = self.stage.blocks()? / 200;
        for night in 1..self.args.nights {
            say(&format!("night {night}"));
            recorder.round = night;
            self.work(recorder, transactions)?;
            self.backup(recorder, NIGHT, &[])?;
            self.basebackup(recorder, NIGHT_PG)?;
        }
        Ok(())
    }

    fn work(&self, recorder: &mut Recorder, transactions: u64) -> Result<()> {
        let mut pgbench = self.stage.cluster().tool("pgbench")?;
        let seed = format!("--random-seed={}", recorder.round);
        pgbench.args(["-n", "-c", "4", "-j", "2", "-t", &(transactions / 4).max(1).to_string(), &seed]);
        if recorder.round == 1 {
            recorder
                .notes
                .commands
                .push(format!("{}  # another seed each night", self.stage.scratch().shown(&pgbench)));
        }
        succeed(&mut pgbench)?;
        self.stage.cluster().sql("postgres", "CHECKPOINT")
    }

    fn backup(&mut self, recorder: &mut Recorder, step: Step, options: &[&str]) -> Result<()> {
        let scratch = self.stage.scratch();
        let repo = scratch.path("repo");
        let mut command = scratch.pgstrata("backup");
        command.arg("--repo").arg(&repo).arg("-D").arg(self.stage.data_dir()).args(options);
        command.args(["--json", "--jobs", &self.args.jobs.to_string()]).envs(self.stage.cluster().libpq_env());
        let before = if repo.exists() { read::tree_len(&repo)? } else { 0 };
        let written = || Ok(read::tree_len(&repo)?.saturating_sub(before));
        let done = self.measure_at_once(recorder, step, command, written)?;
        done.sample.blocks_changed = done.printed["blocks_changed"].as_u64();
        self.last = done.id()?;
        Ok(())
    }

    fn basebackup(&mut self, recorder: &mut Recorder, step: Step) -> Result<()> {
        let to = self.stage.scratch().path("chain").join(format!("{:02}", self.chain.len()));
        let mut command = self.stage.cluster().tool("pg_basebackup")?;
        command.arg("-D").arg(&to).args(["-X", "stream", "--checkpoint=fast"]);
        if let Some(last) = self.chain.last() {
            command.arg("--incremental").arg(last.join("backup_manifest"));
        }
        self.measure_at_once(recorder, step, command, || read::tree_len(&to))?;
        self.chain.push(to);
        Ok(())
    }

    fn measure_at_once<'r>(
        &self,
        recorder: &'r mut Recorder,
        step: Step,
        command: Command,
        written: impl FnOnce() -> Result<u64>,
    ) -> Result<Measured<'r>> {
        let (scratch, server, bytes) = (self.stage.scratch(), self.stage.cluster().pid(), self.stage.bytes()?);
        let run = |command: &mut Command| scratch.measure_at_once(command, server, memory::of_backup(bytes));
        recorder.measure(step, scratch, bytes, command, run, written)
    }

    fn measure<'r>(
        &self,
        recorder: &'r mut Recorder,
        step: Step,
        command: Command,
        written: impl FnOnce() -> Result<u64>,
    ) -> Result<Measured<'r>> {
        let (stage, bytes) = (self.stage, self.stage.bytes()?);
        let run = |command: &mut Command| stage.measure(command, memory::of_restore(bytes));
        recorder.measure(step, stage.scratch(), bytes, command, run, written)
    }

    fn play(&mut self, recorder: &mut Recorder) -> Result<()> {
        match recorder.round % 2 {
            1 => self.play_ours(recorder).and_then(|()| self.play_theirs(recorder))?,
            _ => self.play_theirs(recorder).and_then(|()| self.play_ours(recorder))?,
        }
        if recorder.round == 1 { self.rows_must_be_the_clusters() } else { Ok(()) }
    }

    fn play_ours(&mut self, recorder: &mut Recorder) -> Result<()> {
        let first = recorder.round == 1;
        let merged = self.merge(recorder, MERGE, &[])?;
        self.restore(recorder, RESTORE_MERGED, &merged)?;
        if first {
            self.files_must_be_the_clusters("restored", "restored from the merged backup")?;
            self.verify_restored()?;
        }
        self.remove(&merged)?;
        let repacked = self.merge(recorder, REPACK, &["--repack"])?;
        self.restore(recorder, RESTORE_REPACKED, &repacked)?;
        self.remove(&repacked)?;
        self.restore(recorder, RESTORE_LAST, &self.last)?;
        self.stage.scratch().clear("restored")
    }

    fn play_theirs(&mut self, recorder: &mut Recorder) -> Result<()> {
        let first = recorder.round == 1;
        for (step, options) in COMBINATIONS {
            self.combine(recorder, step, options)?;
            if step == COMBINE && first {
                self.files_must_be_the_clusters("combined", "of pg_combinebackup")?;
            }
            if step == COMBINE {
                self.copy(recorder)?;
            }
            self.stage.scratch().clear("combined")?;
        }
        Ok(())
    }

    fn merge(&self, recorder: &mut Recorder, step: Step, options: &[&str]) -> Result<String> {
        let repo = self.stage.scratch().path("repo");
        let mut command = self.stage.scratch().pgstrata("merge");
        command.arg(&self.last).arg("--repo").arg(&repo).args(options);
        command.args(["--json", "--jobs", &self.args.jobs.to_string()]);
        let before = read::tree_len(&repo)?;
        self.measure(recorder, step, command, || Ok(read::tree_len(&repo)?.saturating_sub(before)))?.id()
    }

    fn remove(&self, backup: &str) -> Result<()> {
        remove(&self.stage.scratch().path("repo"), backup)
    }

    fn restore(&self, recorder: &mut Recorder, step: Step, backup: &str) -> Result<()> {
        let target = self.stage.scratch().path("restored");
        self.stage.scratch().clear("restored")?;
        self.measure(recorder, step, self.restore_command(backup), || read::tree_len(&target))?;
        Ok(())
    }

    fn restore_command(&self, backup: &str) -> Command {
        let scratch = self.stage.scratch();
        let mut command = scratch.pgstrata("restore");
        command.arg(backup).arg("--repo").arg(scratch.path("repo")).arg("--target").arg(scratch.path("restored"));
        command.args(["--json", "--jobs", &self.args.jobs.to_string()]);
        command
    }

    fn combine(&self, recorder: &mut Recorder, step: Step, options: &[&str]) -> Result<()> {
        let to = self.stage.scratch().path("combined");
        let mut command = self.stage.cluster().tool("pg_combinebackup")?;
        command.arg("-o").arg(&to).args(options).args(&self.chain);
        self.measure(recorder, step, command, || read::own_len(&to))?;
        Ok(())
    }

    /// Copies what was combined.
    fn copy(&self, recorder: &mut Recorder) -> Result<()> {
        let scratch = self.stage.scratch();
        let mut command = scratch.program("sh");
        command.args(["-c", "cp -a --reflink=never \"$1\" \"$2\" && sync -f \"$2\"", "sh"]);
        command.arg(scratch.path("combined")).arg(scratch.path("copy"));
        self.measure(recorder, COPY, command, || read::tree_len(&scratch.path("copy")))?;
        scratch.clear("copy")
    }

    /// Compares relation files with those of the cluster, where nothing happened since the last backup.
    fn files_must_be_the_clusters(&mut self, name: &str, what: &str) -> Result<()> {
        let directory = self.stage.scratch().path(name);
        for relations in ["base", "pg_xact"] {
            let mut diff = self.stage.scratch().program("diff");
            diff.args(["-rq", "-x", "pg_internal.init", "-x", "pgsql_tmp"]);
            succeed(diff.arg(self.stage.data_dir().join(relations)).arg(directory.join(relations)))?;
        }
        self.found += &format!("The files {what} are those of the cluster (diff -r of base and pg_xact).\n");
        Ok(())
    }

    fn verify_restored(&mut self) -> Result<()> {
        let mut verify = self.stage.cluster().tool("pg_verifybackup")?;
        succeed(verify.arg("-n").arg(self.stage.scratch().path("restored")))?;
        self.found += "pg_verifybackup agrees with what was restored from the merged backup.\n";
        Ok(())
    }

    /// Starts what is restored from a merged backup and compares its rows with the cluster's. It comes last, as reading rows sets hint bits.
    fn rows_must_be_the_clusters(&mut self) -> Result<()> {
        let mut command = self.stage.scratch().pgstrata("merge");
        command.arg(&self.last).arg("--repo").arg(self.stage.scratch().path("repo")).arg("--json");
        let printed = succeed(&mut command)?.stdout;
        let printed: serde_json::Value =
            serde_json::from_slice(&printed).map_err(|e| Error::new(format!("pgstrata merge --json: {e}")))?;
        let merged = printed["id"].as_str().unwrap_or_default().to_owned();
        succeed(&mut self.restore_command(&merged))?;
        self.remove(&merged)?;
        let stage = self.stage;
        let target = stage.scratch().path("restored");
        let mut restored = Cluster::adopt(stage.cluster().server(), stage.cluster().tools(), &target)?;
        restored.start()?;
        let (ours, theirs) = (rows(&restored)?, rows(stage.cluster())?);
        restored.stop(StopMode::Fast)?;
        stage.scratch().clear("restored")?;
        if ours != theirs {
            return Err(Error::new(format!("the restored cluster has {ours:?}, the original {theirs:?}")));
        }
        self.found += "A server on what was restored from the merged backup has the rows of the cluster.\n";
        stage.cluster().sql("postgres", "CHECKPOINT")
    }

    fn report(&self, recorder: &Recorder) -> Result<()> {
        let MergeArgs { scale, nights, runs, jobs, common } = self.args;
        let repo = read::tree_len(&self.stage.scratch().path("repo"))? as f64;
        let chain = read::tree_len(&self.stage.scratch().path("chain"))? as f64;
        let found = format!(
            "{}The {nights} backups take {:.0} MB in the repository of pgstrata, {:.0} MB as a chain of pg_basebackup.\n{}",
            changed(&recorder.samples, &[NIGHT]),
            repo / MB,
            chain / MB,
            self.found,
        );
        Run {
            name: common.name.clone().unwrap_or_else(|| format!("merge-{scale}")),
            title: format!(
                "pgbench at scale {scale}: {:.0} MB without the WAL; {nights} backups; PostgreSQL {MAJOR}; --jobs {jobs}; \
                 caches warm",
                self.stage.bytes()? as f64 / MB
            ),
            command: format!(
                "merge --scale {scale} --nights {nights} --runs {runs} --jobs {jobs}{}",
                common.shown()
            ),
            settings: format!(
                "The server's settings: {}\n\nThe commands of the first night and of the first round; WORK is the scratch \
                 directory. Before each of a round:\nCHECKPOINT, syncfs, the repository and the chain read once. Between the \
                 rounds' commands what they made is removed.\n{}",
                self.stage.settings(),
                common.shown_memory()
            ),
            legend: LEGEND,
            found,
            appendix: String::new(),
            steps: &STEPS,
            recorder,
            scratch: self.stage.scratch(),
            versions: machine::versions(Some(self.stage.cluster())),
        }
        .write()
    }
}

/// Removes a backup and its packs from the repository at `path`, and nothing else.
///
/// # Errors
/// When it stays.
pub fn remove(path: &Path, backup: &str) -> Result<()> {
    let remove = || {
        let repo = Repository::open(path)?;
        let (cluster, id) = (ClusterName::default(), backup.parse::<BackupId>()?);
        repo.store().delete(&repo.manifest(&cluster, id)?.object()?)?;
        repo.discard(&cluster, id)
    };
    remove().map_err(|e: engine::Error| Error::new(format!("cannot remove {backup}: {e}")))
}

/// How many rows each table has, and a sum over them.
fn rows(cluster: &Cluster) -> Result<Vec<String>> {
    let of = |table: &&str| {
        let sum = format!("SELECT count(*) || ' ' || coalesce(sum(hashtext(t::text)::bigint), 0) FROM {table} t");
        cluster.query_value("postgres", &sum)
    };
    TABLES.iter().map(of).collect()
}
