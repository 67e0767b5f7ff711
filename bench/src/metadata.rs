//! `metadata`: what the commands cost that grow with the metadata, for a cluster that this machine could not hold.
//!
//! ```text
//! once:        a full backup of the simulated cluster; some incrementals                                  (simulated.rs)
//! each round:  merge of the last one; what a restore does before it reads a chunk; expiries that are only planned;
//!              the plan of a repacking merge; verify --quick; list                    then the merged backup is removed again
//! ```
//!
//! The repository is whole but for its chunks: data packs are files of their length without contents. Nothing here reads
//! a chunk, so nothing here notices. Reading, hashing and compressing the cluster is not in these numbers; `nightly` has it.

use std::process::Command;

use engine::repo::{BackupId, ClusterName, Repository};
use testdata::{Error, Result};

use crate::record::{Measured, Recorder};
use crate::report::{Run, Step};
use crate::scratch::Scratch;
use crate::simulated::BLOCK_LEN;
use crate::{MetadataArgs, machine, read};

const TIB: f64 = (1_u64 << 40) as f64;
const MB: f64 = 1e6;

const FULL: Step = Step::alone("full, its metadata only");
const INCREMENTAL: Step = Step::alone("incremental, its metadata only");
const MERGE: Step = Step::alone("merge of the last incremental");
const RESTORE: Step = Step::alone("restore of the merged, its plan only");
const RESTORE_LAST: Step = Step::alone("restore of the incremental, its plan only");
const EXPIRE_LAST: Step = Step::alone("expire --dry-run of the last incremental");
const EXPIRE_FULL: Step = Step::alone("expire --dry-run of the full");
const REPACK: Step = Step::alone("merge --repack --dry-run");
const QUICK: Step = Step::alone("verify --quick");
const LIST: Step = Step::alone("list");

/// In the table's order.
const STEPS: [Step; 10] =
    [FULL, INCREMENTAL, MERGE, RESTORE, RESTORE_LAST, EXPIRE_LAST, EXPIRE_FULL, REPACK, QUICK, LIST];

const LEGEND: &str = "Medians; rates are over the bytes of the simulated cluster, none of which is read. CPU: user and system \
    of the process.\nPeak: its resident memory. Read: as it says. Written: what it left on disk.\n";

/// Runs the workload and writes its results.
///
/// # Errors
/// When any command fails; then there are no results.
pub fn run(args: &MetadataArgs) -> Result<()> {
    let scratch = Scratch::set(&args.common, false, &[])?;
    let mut recorder = Recorder::default();
    recorder.notes.load_before = machine::load_average();
    let mut cluster = Simulation { args, scratch: &scratch, backups: Vec::new(), facts: String::new() };
    cluster.fill(&mut recorder)?;
    recorder.rounds(args.runs, args.common.patience > 0, |recorder| cluster.play(recorder))?;
    recorder.notes.load_after = machine::load_average();
    cluster.report(&recorder)?;
    scratch.close(args.common.keep);
    Ok(())
}

struct Simulation<'a> {
    args: &'a MetadataArgs,
    scratch: &'a Scratch,
    /// The full backup and its incrementals.
    backups: Vec<String>,
    facts: String,
}

impl Simulation<'_> {
    fn blocks(&self) -> u64 {
        (self.args.terabytes * TIB / BLOCK_LEN as f64) as u64
    }

    fn fill(&mut self, recorder: &mut Recorder) -> Result<()> {
        recorder.round = 1;
        let (blocks, files) = (self.blocks().to_string(), self.args.files.to_string());
        let one_in = self.args.one_in.to_string();
        self.simulate(recorder, FULL, &["full", "--blocks", &blocks, "--files", &files])?;
        for night in 1..=self.args.nights {
            recorder.round = night;
            self.simulate(recorder, INCREMENTAL, &["incremental", "--one-in", &one_in])?;
        }
        Ok(())
    }

    fn simulate(&mut self, recorder: &mut Recorder, step: Step, what: &[&str]) -> Result<()> {
        let done = self.measure(recorder, step, self.simulation(what))?;
        done.sample.blocks_changed = done.printed["blocks_changed"].as_u64();
        let (id, facts) = (done.id()?, done.printed.to_string());
        if !self.backups.contains(&id) {
            self.backups.push(id);
        }
        self.note(recorder, step, &facts);
        Ok(())
    }

    /// Keeps what a step of ours printed the first time.
    fn note(&mut self, recorder: &Recorder, step: Step, facts: &str) {
        if recorder.round == 1 {
            self.facts += &format!("{}: {facts}\n", step.name);
        }
    }

    fn measure<'r>(&self, recorder: &'r mut Recorder, step: Step, command: Command) -> Result<Measured<'r>> {
        let (scratch, repo) = (self.scratch, self.scratch.path("repo"));
        let metadata_len = || if repo.exists() { map_len(&repo) } else { Ok(0) };
        let before = metadata_len()?;
        let run = |command: &mut Command| scratch.measure(command, None, 0);
        let written = || Ok(metadata_len()?.saturating_sub(before));
        recorder.measure(step, scratch, self.blocks() * BLOCK_LEN, command, run, written)
    }

    /// A step of ours on the repository.
    fn simulation(&self, what: &[&str]) -> Command {
        let mut command = self.scratch.this_program();
        command.args(["simulate", "--jobs", &self.args.jobs.to_string(), "--repo"]).arg(self.scratch.path("repo"));
        command.args(what);
        command
    }

    /// A command of pgstrata on the repository.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.scratch.pgstrata(words[0]);
        command.args(&words[1..]).arg("--repo").arg(self.scratch.path("repo")).arg("--json");
        command
    }

    fn play(&mut self, recorder: &mut Recorder) -> Result<()> {
        let [full, .., last] = self.backups.as_slice() else { return Err(Error::new("there are no incrementals")) };
        let (full, last) = (full.clone(), last.clone());
        let jobs = self.args.jobs.to_string();
        let merged = self.measure(recorder, MERGE, self.command(&["merge", &last, "--jobs", &jobs]))?.id()?;
        self.plan_restore(recorder, RESTORE, &merged)?;
        self.plan_restore(recorder, RESTORE_LAST, &last)?;
        for (step, backup) in [(EXPIRE_LAST, &last), (EXPIRE_FULL, &full)] {
            self.measure(recorder, step, self.command(&["expire", backup, "--dry-run", "--jobs", &jobs]))?;
        }
        self.measure(recorder, REPACK, self.command(&["merge", &last, "--repack", "--dry-run", "--jobs", &jobs]))?;
        self.measure(recorder, QUICK, self.command(&["verify", "--quick", "--jobs", &jobs]))?;
        self.measure(recorder, LIST, self.command(&["list"]))?;
        self.remove(&merged)
    }

    fn plan_restore(&mut self, recorder: &mut Recorder, step: Step, backup: &str) -> Result<()> {
        let command = self.simulation(&["restore", backup]);
        let facts = self.measure(recorder, step, command)?.printed.to_string();
        self.note(recorder, step, &facts);
        Ok(())
    }

    /// Removes a backup and its packs, and nothing else.
    fn remove(&self, backup: &str) -> Result<()> {
        let remove = || {
            let repo = Repository::open(&self.scratch.path("repo"))?;
            let (cluster, id) = (ClusterName::default(), backup.parse::<BackupId>()?);
            repo.store().delete(&repo.manifest(&cluster, id)?.object()?)?;
            repo.discard(&cluster, id)
        };
        remove().map_err(|e: engine::Error| Error::new(format!("cannot remove {backup}: {e}")))
    }

    fn report(&self, recorder: &Recorder) -> Result<()> {
        let MetadataArgs { terabytes, files, one_in, nights, runs, jobs, common } = self.args;
        let share = 100.0 / f64::from(*one_in);
        Run {
            name: common.name.clone().unwrap_or_else(|| format!("metadata-{terabytes}")),
            title: format!(
                "A simulated cluster of {terabytes} TiB: {} blocks in {files} files; a full backup and {nights} incrementals \
                 of {share:.1} % of the blocks;\n{jobs} workers; {:.0} MB of metadata; caches as they are",
                self.blocks(),
                map_len(&self.scratch.path("repo"))? as f64 / MB,
            ),
            command: format!(
                "metadata --terabytes {terabytes} --files {files} --one-in {one_in} --nights {nights} --runs {runs} --jobs {jobs}{}",
                common.shown()
            ),
            settings: "The commands; WORK is the scratch directory. Before each: syncfs.".to_owned(),
            legend: LEGEND,
            found: self.facts.clone(),
            appendix: String::new(),
            steps: &STEPS,
            recorder,
            scratch: self.scratch,
            versions: machine::versions(None),
        }
        .write()
    }
}

/// The bytes of everything in a repository but its data packs.
fn map_len(repo: &std::path::Path) -> Result<u64> {
    let is_data = |path: &std::path::Path| path.extension().is_some_and(|extension| extension == "data");
    Ok(read::files(repo)?.iter().filter(|(path, _)| !is_data(path)).map(|(_, len)| len).sum())
}
