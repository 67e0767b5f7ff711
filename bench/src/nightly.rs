//! `nightly`: what runs in a night with pgstrata, and on the worst day, beside what else could have run.
//!
//! ```text
//! each round, on the same cluster:
//!     read everything (cat; 2 threads)                      the bound of all backups
//!     full backup into a new repository; incremental with nothing changed; pg_basebackup
//!     change about 1 % of the blocks; incremental; pg_basebackup with server-side zstd; verify
//!     restore the full; cp -a of the result, and sync; restore the incremental
//! ```
//!
//! The rounds are repeated rather than the commands, so that whatever drifts (heat, neighbours, the disk) drifts for all
//! alike. In every other round the peers come before pgstrata, where a step does not need what another left. Before each command a checkpoint
//! is made, what waits to be written is written, and the memory that it may need is touched.
//!
//! How 1 % is chosen: an update of one row dirties its heap page and, as pgbench's pages are full and the new version
//! goes elsewhere, the leaf of the primary key that points to it. So as many rows are updated as half a percent of the
//! cluster has blocks, equally far apart, and other ones in each round. What really changed is measured and printed.

use std::process::Command;

use testdata::{Error, Result};

use crate::record::{Measured, Recorder};
use crate::report::{LEGEND, Run, Step, changed};
use crate::scratch::{Scratch, must_drop_caches};
use crate::stage::{Scene, Stage};
use crate::{NightlyArgs, cannot, machine, memory, read};

/// Rows of `pgbench_accounts` for each unit of scale.
const ROWS: u64 = 100_000;
/// Rows of it on a page; rounds are that many pages apart.
const ROWS_OF_PAGE: u64 = 61;
const MB: f64 = 1e6;

const CAT: Step = Step::alone("cat");
const READ: Step = Step::alone("parallel read");
const FULL: Step = Step::beside("pgstrata full", &[CAT, READ, BASEBACKUP_PLAIN, BASEBACKUP_TAR]);
const UNCHANGED: Step = Step::beside("pgstrata incremental, unchanged", &[CAT, READ, BASEBACKUP_PLAIN]);
const CHANGED: Step = Step::beside("pgstrata incremental, 1 % changed", &[CAT, READ, BASEBACKUP_PLAIN]);
const VERIFY: Step = Step::alone("pgstrata verify, all three");
const RESTORE_FULL: Step = Step::beside("pgstrata restore of the full", &[CAT, COPY]);
const RESTORE_LAST: Step = Step::beside("pgstrata restore of the last", &[CAT, COPY]);
const BASEBACKUP_PLAIN: Step = Step::alone("pg_basebackup plain");
const BASEBACKUP_TAR: Step = Step::alone("pg_basebackup tar, server zstd 1");
const COPY: Step = Step::alone("cp -a and sync");

/// In the table's order.
const STEPS: [Step; 11] =
    [FULL, UNCHANGED, CHANGED, VERIFY, RESTORE_FULL, RESTORE_LAST, CAT, READ, BASEBACKUP_PLAIN, BASEBACKUP_TAR, COPY];

/// Runs the workload and writes its results.
///
/// # Errors
/// When any command fails; then there are no results.
pub fn run(args: &NightlyArgs) -> Result<()> {
    if args.cold {
        must_drop_caches()?;
    }
    let scratch = Scratch::set(&args.common, args.cold, &["data", "repo", "restored"])?;
    let scene = Scene { scale: args.scale, major: args.major, conf: &[], tools: &["pgbench", "pg_basebackup"] };
    let stage = Stage::set(scratch, &scene)?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    let mut tar_skipped = None;
    recorder.rounds(args.runs, args.common.patience > 0, |recorder| {
        Night { args, stage: &stage, recorder, tar_skipped: &mut tar_skipped }.play()
    })?;
    recorder.notes.load_after = machine::load_average();
    let kernels = kernels(&stage)?;
    report(args, &stage, &recorder, tar_skipped, &kernels)?;
    stage.close(args.common.keep)
}

fn report(
    args: &NightlyArgs,
    stage: &Stage,
    recorder: &Recorder,
    tar_skipped: Option<String>,
    kernels: &str,
) -> Result<()> {
    let NightlyArgs { scale, runs, major, jobs, compress, cold, common } = args;
    let cluster_bytes = recorder.samples.first().map_or(0, |sample| sample.cluster_bytes) as f64;
    let cache = if *cold { "caches dropped before each command" } else { "caches warm" };
    let mut found = changed(&recorder.samples, &[UNCHANGED, CHANGED]);
    if let Some(why) = tar_skipped {
        found += &format!("{} was left out: {why}\n", BASEBACKUP_TAR.name);
    }
    let cold = if *cold { " --cold" } else { "" };
    Run {
        name: common.name.clone().unwrap_or_else(|| format!("nightly-{scale}")),
        title: format!(
            "pgbench at scale {scale}: {:.0} MB without the WAL; PostgreSQL {major}; --jobs {jobs}, --compress \
             {compress}; {cache}",
            cluster_bytes / MB,
        ),
        command: format!(
            "nightly --scale {scale} --runs {runs} --major {major} --jobs {jobs} --compress {compress}{cold}{}",
            common.shown()
        ),
        settings: format!(
            "The server's settings: {}\n\nThe commands of the first round; WORK is the scratch directory. Before each: \
             CHECKPOINT, syncfs, all files read once.\n{}",
            stage.settings(),
            common.shown_memory()
        ),
        legend: LEGEND,
        found,
        appendix: kernels.to_owned(),
        steps: &STEPS,
        recorder,
        scratch: stage.scratch(),
        versions: machine::versions(Some(stage.cluster())),
    }
    .write()
}

struct Night<'a> {
    args: &'a NightlyArgs,
    stage: &'a Stage,
    recorder: &'a mut Recorder,
    tar_skipped: &'a mut Option<String>,
}

impl Night<'_> {
    fn play(&mut self) -> Result<()> {
        let peers_first = self.recorder.round.is_multiple_of(2);
        self.read_all()?;
        self.stage.scratch().clear("repo")?;
        if peers_first {
            self.basebackup(BASEBACKUP_PLAIN, &["-Fp"])?;
        }
        let full = self.backup(FULL, &["--full", "--init"])?;
        self.backup(UNCHANGED, &[])?;
        if !peers_first {
            self.basebackup(BASEBACKUP_PLAIN, &["-Fp"])?;
        }
        self.change()?;
        if peers_first {
            self.basebackup_tar()?;
        }
        self.backup(CHANGED, &[])?;
        if !peers_first {
            self.basebackup_tar()?;
        }
        self.verify()?;
        self.restore(RESTORE_FULL, &full)?;
        self.copy()?;
        self.restore(RESTORE_LAST, "latest")
    }

    /// Measures a command; `written` says afterwards how many bytes it left.
    fn measure(&mut self, step: Step, command: Command, written: impl FnOnce() -> Result<u64>) -> Result<Measured<'_>> {
        let (stage, bytes) = (self.stage, self.stage.bytes()?);
        let copies = [RESTORE_FULL, RESTORE_LAST, COPY].contains(&step);
        let memory_len = if copies { memory::of_restore(bytes) } else { memory::of_backup(bytes) };
        let run = |command: &mut Command| stage.measure(command, memory_len);
        self.recorder.measure(step, stage.scratch(), bytes, command, run, written)
    }

    fn read_all(&mut self) -> Result<()> {
        let mut cat = self.stage.scratch().program("sh");
        let script = "find \"$1\" -name pg_wal -prune -o -type f -exec cat {} + > /dev/null";
        cat.args(["-c", script, "sh"]).arg(self.stage.data_dir());
        self.measure(CAT, cat, || Ok(0))?;
        let mut read = self.stage.scratch().this_program();
        read.args(["read", "--jobs", &self.args.jobs.to_string()]).arg(self.stage.data_dir());
        self.measure(READ, read, || Ok(0))?;
        Ok(())
    }

    /// Makes a backup and returns its id.
    fn backup(&mut self, step: Step, options: &[&str]) -> Result<String> {
        let stage = self.stage;
        let repo = stage.scratch().path("repo");
        let mut command = stage.scratch().pgstrata("backup");
        command.arg("--repo").arg(&repo).arg("-D").arg(stage.data_dir()).args(options).arg("--json");
        command.args(["--jobs", &self.args.jobs.to_string(), "--compress", &self.args.compress]);
        command.envs(stage.cluster().libpq_env());
        let before = if repo.exists() { read::tree_len(&repo)? } else { 0 };
        let done = self.measure(step, command, || Ok(read::tree_len(&repo)?.saturating_sub(before)))?;
        done.sample.blocks_changed = done.printed["blocks_changed"].as_u64();
        done.id()
    }

    fn change(&mut self) -> Result<()> {
        let blocks = self.stage.blocks()?;
        let rows = u64::from(self.args.scale) * ROWS;
        let stride = rows / (blocks / 200).max(1);
        let first = u64::from(self.recorder.round) * 7 * ROWS_OF_PAGE % stride;
        // Found by the index: a sequential scan would also set the hint bits of the rows that earlier rounds updated.
        let chosen = format!("SELECT generate_series({}, {rows}, {stride})", first + 1);
        let update = format!("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = ANY (ARRAY({chosen}))");
        if self.recorder.round == 1 {
            self.recorder.notes.commands.push(format!("{update};  -- others in each round"));
        }
        self.stage.cluster().sql("postgres", &update)
    }

    fn verify(&mut self) -> Result<()> {
        let mut command = self.stage.scratch().pgstrata("verify");
        command.arg("--repo").arg(self.stage.scratch().path("repo")).args([
            "--jobs",
            &self.args.jobs.to_string(),
            "--json",
        ]);
        self.measure(VERIFY, command, || Ok(0))?;
        Ok(())
    }

    fn restore(&mut self, step: Step, backup: &str) -> Result<()> {
        self.stage.scratch().clear("restored")?;
        let target = self.stage.scratch().path("restored");
        let mut command = self.stage.scratch().pgstrata("restore");
        command.arg(backup).arg("--repo").arg(self.stage.scratch().path("repo")).arg("--target").arg(&target);
        command.args(["--jobs", &self.args.jobs.to_string(), "--json"]);
        self.measure(step, command, || read::tree_len(&target))?;
        Ok(())
    }

    /// Copies what was restored last.
    fn copy(&mut self) -> Result<()> {
        let (from, to) = (self.stage.scratch().path("restored"), self.stage.scratch().path("copy"));
        let mut command = self.stage.scratch().program("sh");
        command.args(["-c", "cp -a --reflink=never \"$1\" \"$2\" && sync -f \"$2\"", "sh"]).arg(from).arg(&to);
        self.measure(COPY, command, || read::tree_len(&to))?;
        self.stage.scratch().clear("copy")
    }

    fn basebackup(&mut self, step: Step, options: &[&str]) -> Result<()> {
        let to = self.stage.scratch().path("basebackup");
        let mut command = self.stage.cluster().tool("pg_basebackup")?;
        command.arg("-D").arg(&to).args(options).args(["-X", "stream", "--checkpoint=fast"]);
        let measured = self.measure(step, command, || read::tree_len(&to)).map(drop);
        self.stage.scratch().clear("basebackup")?;
        measured
    }

    /// Compressed by the server, where it can.
    fn basebackup_tar(&mut self) -> Result<()> {
        if self.tar_skipped.is_some() {
            return Ok(());
        }
        let options = ["-Ft", "--compress=server-zstd:level=1,workers=2"];
        let measured = match self.args.major {
            13 | 14 => Err(Error::new("the server compresses from PostgreSQL 15 on only")),
            _ => self.basebackup(BASEBACKUP_TAR, &options),
        };
        // A server that cannot do it cannot the first time; an interruption is met again by the next command.
        if let (Err(error), 1) = (&measured, self.recorder.round) {
            *self.tar_skipped = Some(error.to_string().lines().last().unwrap_or_default().to_owned());
            return Ok(());
        }
        measured
    }
}

/// The kernels on real pages of the cluster, in a process of their own: this one stays small.
fn kernels(stage: &Stage) -> Result<String> {
    let path = stage.cluster().query_value("postgres", "SELECT pg_relation_filepath('pgbench_accounts')")?;
    let path = stage.data_dir().join(path);
    let mut command = stage.scratch().this_program();
    let usage = stage.measure(command.arg("kernels").arg("--pages").arg(&path), 0);
    usage.map(|usage| usage.output).map_err(|e| cannot("time the kernels on", &path, e))
}
