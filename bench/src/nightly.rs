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
//! alike. Before each command a checkpoint is made, and what waits to be written is written.
//!
//! How 1 % is chosen: an update of one row dirties its heap page and, as pgbench's pages are full and the new version
//! goes elsewhere, the leaf of the primary key that points to it. So as many rows are updated as half a percent of the
//! cluster has blocks, equally far apart, and other ones in each round. What really changed is measured and printed.

use std::process::Command;

use testdata::{Error, Result};

use crate::measure::Usage;
use crate::report::{Notes, Sample, Step, write_run};
use crate::stage::{CONF, Stage, must_drop_caches, say};
use crate::{NightlyArgs, cannot, machine, read};

const BLOCK_LEN: u64 = 8192;
/// Rounds for each run at most, if others disturb.
const MAX_ROUNDS: u32 = 2;
/// Rows of `pgbench_accounts` for each unit of scale.
const ROWS: u64 = 100_000;
/// Rows of it on a page; rounds are that many pages apart.
const ROWS_OF_PAGE: u64 = 61;

/// Runs the workload and writes its results.
///
/// # Errors
/// When any command fails; then there are no results.
pub fn run(args: &NightlyArgs) -> Result<()> {
    if args.cold {
        must_drop_caches()?;
    }
    let stage = Stage::set(args)?;
    let mut night = Night { args, stage: &stage, samples: Vec::new(), notes: Notes::default(), round: 0 };
    night.notes.load_before = machine::load_average();
    let most = if args.patience > 0 { MAX_ROUNDS * args.runs } else { args.runs };
    while night.round < args.runs || night.round < most && !enough(&night.samples, args.runs) {
        night.round += 1;
        say(&format!("round {}", night.round));
        night.play()?;
    }
    let Night { samples, mut notes, .. } = night;
    notes.load_after = machine::load_average();
    notes.kernels = kernels(&stage)?;
    write_run(args, &stage, &samples, &notes)?;
    stage.close(args.keep)
}

/// Whether every command has run `runs` times without others at work.
fn enough(samples: &[Sample], runs: u32) -> bool {
    let undisturbed = |step| samples.iter().filter(|sample| sample.step == step && !sample.is_disturbed()).count();
    let ran = |step| samples.iter().any(|sample| sample.step == step);
    Step::ALL.into_iter().all(|step| !ran(step) || undisturbed(step) >= runs as usize)
}

struct Night<'a> {
    args: &'a NightlyArgs,
    stage: &'a Stage,
    samples: Vec<Sample>,
    notes: Notes,
    round: u32,
}

impl Night<'_> {
    fn play(&mut self) -> Result<()> {
        self.read_all()?;
        self.stage.clear("repo")?;
        let full = self.backup(Step::Full, &["--full", "--init"])?;
        self.backup(Step::Unchanged, &[])?;
        self.basebackup(Step::BasebackupPlain, &["-Fp"])?;
        self.change()?;
        self.backup(Step::Changed, &[])?;
        self.basebackup_tar()?;
        self.verify()?;
        self.restore(Step::RestoreFull, &full)?;
        self.copy()?;
        self.restore(Step::RestoreLast, "latest")
    }

    /// Measures a command; `written` says afterwards how many bytes it left.
    fn measure(
        &mut self,
        step: Step,
        mut command: Command,
        written: impl FnOnce() -> Result<u64>,
    ) -> Result<(Usage, &mut Sample)> {
        let files = read::files(self.stage.data_dir())?;
        let cluster_bytes = files.iter().map(|(_, len)| len).sum();
        let load = machine::load_average().split(' ').next().unwrap_or_default().to_owned();
        if self.round == 1 {
            self.notes.commands.push(self.shown(&command));
        }
        let usage = self.stage.measure(&mut command)?;
        let (round, bytes_written) = (self.round, written()?);
        say(&format!("  {:<34} {:>8.3} s", step.name(), usage.wall.as_secs_f64()));
        let kept = Usage { output: String::new(), ..usage.clone() };
        self.samples.push(Sample {
            step,
            round,
            usage: kept,
            cluster_bytes,
            bytes_written,
            blocks_changed: None,
            load,
        });
        self.samples.last_mut().map(|sample| (usage, sample)).ok_or_else(|| Error::new("no sample"))
    }

    fn read_all(&mut self) -> Result<()> {
        let mut cat = self.stage.program("sh");
        let script = "find \"$1\" -name pg_wal -prune -o -type f -exec cat {} + > /dev/null";
        cat.args(["-c", script, "sh"]).arg(self.stage.data_dir());
        self.measure(Step::Cat, cat, || Ok(0))?;
        // This program, whatever directory it is in: the server's user may not be allowed to enter that.
        let mut read = self.stage.program("/proc/self/exe");
        read.args(["read", "--jobs", &self.args.jobs.to_string()]).arg(self.stage.data_dir());
        self.measure(Step::Read, read, || Ok(0))?;
        Ok(())
    }

    /// Makes a backup and returns its id.
    fn backup(&mut self, step: Step, options: &[&str]) -> Result<String> {
        let stage = self.stage;
        let repo = stage.path("repo");
        let mut command = stage.pgstrata("backup");
        command.arg("--repo").arg(&repo).arg("-D").arg(stage.data_dir()).args(options).arg("--json");
        command.args(["--jobs", &self.args.jobs.to_string(), "--compress", &self.args.compress]);
        command.envs(stage.cluster().libpq_env());
        let before = if repo.exists() { read::tree_len(&repo)? } else { 0 };
        let (usage, sample) = self.measure(step, command, || Ok(read::tree_len(&repo)?.saturating_sub(before)))?;
        let report: serde_json::Value = serde_json::from_str(&usage.output)
            .map_err(|e| Error::new(format!("pgstrata backup --json printed {:?}: {e}", usage.output)))?;
        sample.blocks_changed = report["blocks_changed"].as_u64();
        let id = report["id"].as_str().ok_or_else(|| Error::new("pgstrata backup --json printed no id"))?;
        Ok(id.to_owned())
    }

    fn change(&mut self) -> Result<()> {
        let files = read::files(self.stage.data_dir())?;
        let blocks = files.iter().map(|(_, len)| len / BLOCK_LEN).sum::<u64>();
        let rows = u64::from(self.args.scale) * ROWS;
        let stride = rows / (blocks / 200).max(1);
        let first = u64::from(self.round) * 7 * ROWS_OF_PAGE % stride;
        // Found by the index: a sequential scan would also set the hint bits of the rows that earlier rounds updated.
        let chosen = format!("SELECT generate_series({}, {rows}, {stride})", first + 1);
        let update = format!("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = ANY (ARRAY({chosen}))");
        if self.round == 1 {
            self.notes.commands.push(format!("{update};  -- others in each round"));
        }
        self.stage.cluster().sql("postgres", &update)
    }

    fn verify(&mut self) -> Result<()> {
        let mut command = self.stage.pgstrata("verify");
        command.arg("--repo").arg(self.stage.path("repo")).args(["--jobs", &self.args.jobs.to_string(), "--json"]);
        self.measure(Step::Verify, command, || Ok(0))?;
        Ok(())
    }

    fn restore(&mut self, step: Step, backup: &str) -> Result<()> {
        self.stage.clear("restored")?;
        let target = self.stage.path("restored");
        let mut command = self.stage.pgstrata("restore");
        command.arg(backup).arg("--repo").arg(self.stage.path("repo")).arg("--target").arg(&target);
        command.args(["--jobs", &self.args.jobs.to_string(), "--json"]);
        self.measure(step, command, || read::tree_len(&target))?;
        Ok(())
    }

    /// Copies what was restored last.
    fn copy(&mut self) -> Result<()> {
        let (from, to) = (self.stage.path("restored"), self.stage.path("copy"));
        let mut command = self.stage.program("sh");
        command.args(["-c", "cp -a --reflink=never \"$1\" \"$2\" && sync -f \"$2\"", "sh"]).arg(from).arg(&to);
        self.measure(Step::Copy, command, || read::tree_len(&to))?;
        self.stage.clear("copy")
    }

    fn basebackup(&mut self, step: Step, options: &[&str]) -> Result<()> {
        let to = self.stage.path("basebackup");
        let mut command = self.stage.cluster().tool("pg_basebackup")?;
        command.arg("-D").arg(&to).args(options).args(["-X", "stream", "--checkpoint=fast"]);
        let measured = self.measure(step, command, || read::tree_len(&to)).map(drop);
        self.stage.clear("basebackup")?;
        measured
    }

    /// Compressed by the server, where it can.
    fn basebackup_tar(&mut self) -> Result<()> {
        if self.notes.tar_skipped.is_some() {
            return Ok(());
        }
        let options = ["-Ft", "--compress=server-zstd:level=1,workers=2"];
        let measured = match self.args.major {
            13 | 14 => Err(Error::new("the server compresses from PostgreSQL 15 on only")),
            _ => self.basebackup(Step::BasebackupTar, &options),
        };
        // A server that cannot do it cannot the first time; an interruption is met again by the next command.
        if let (Err(error), 1) = (&measured, self.round) {
            self.notes.tar_skipped = Some(error.to_string().lines().last().unwrap_or_default().to_owned());
            return Ok(());
        }
        measured
    }

    /// The command as one would type it, with names for this machine's directories.
    fn shown(&self, command: &Command) -> String {
        let work = self.stage.work().display().to_string();
        let program = std::path::Path::new(command.get_program()).file_name().unwrap_or_default();
        let program = if program == "exe" { "bench".into() } else { program.to_string_lossy() };
        let words = command.get_args().map(|arg| {
            let arg = arg.to_string_lossy().replace(&work, "WORK");
            if arg.contains([' ', '"']) { format!("'{arg}'") } else { arg }
        });
        std::iter::once(program.into_owned()).chain(words).collect::<Vec<_>>().join(" ")
    }
}

/// The kernels on real pages of the cluster, in a process of their own: this one stays small.
fn kernels(stage: &Stage) -> Result<String> {
    let path = stage.cluster().query_value("postgres", "SELECT pg_relation_filepath('pgbench_accounts')")?;
    let path = stage.data_dir().join(path);
    let mut command = stage.program("/proc/self/exe");
    let usage = stage.measure(command.arg("kernels").arg("--pages").arg(&path));
    usage.map(|usage| usage.output).map_err(|e| cannot("time the kernels on", &path, e))
}

/// The settings of the server, for people.
pub fn settings() -> String {
    CONF.join(", ")
}
