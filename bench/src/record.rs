//! What a run measures, as it goes: samples, and notes for whoever reads them.

use std::process::Command;

use serde_json::Value;
use testdata::{Error, Result};

use crate::machine;
use crate::measure::Usage;
use crate::report::{Facts, Notes, Sample, Step};
use crate::scratch::{Scratch, say};

/// Rounds for each run at most, if others disturb.
const MAX_ROUNDS: u32 = 2;

/// The samples of a run.
#[derive(Default)]
pub struct Recorder {
    /// Every sample.
    pub samples: Vec<Sample>,
    /// What else was found out.
    pub notes: Notes,
    /// The round, from 1.
    pub round: u32,
}

/// A command that was measured.
pub struct Measured<'a> {
    /// What it printed, if that was JSON.
    pub printed: Value,
    /// Its sample.
    pub sample: &'a mut Sample,
}

impl Recorder {
    /// Plays rounds until each of the steps that ran in them has `runs` undisturbed samples; without patience, `runs` rounds.
    ///
    /// # Errors
    /// Those of `play`.
    pub fn rounds(&mut self, runs: u32, patient: bool, mut play: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        let earlier = self.samples.len();
        let most = if patient { MAX_ROUNDS * runs } else { runs };
        self.round = 0;
        while self.round < runs || self.round < most && !enough(&self.samples[earlier..], runs) {
            self.round += 1;
            say(&format!("round {}", self.round));
            play(self)?;
        }
        Ok(())
    }

    /// Keeps the sample of a command that `run` runs; `written` says afterwards how many bytes it left.
    ///
    /// # Errors
    /// Those of both.
    pub fn measure(
        &mut self,
        step: Step,
        scratch: &Scratch,
        cluster_bytes: u64,
        mut command: Command,
        run: impl FnOnce(&mut Command) -> Result<Usage>,
        written: impl FnOnce() -> Result<u64>,
    ) -> Result<Measured<'_>> {
        let load = machine::load_average().split(' ').next().unwrap_or_default().to_owned();
        if self.round == 1 {
            self.notes.commands.push(scratch.shown(&command));
        }
        let usage = run(&mut command)?;
        let (round, bytes_written) = (self.round, written()?);
        say(&format!("  {:<44} {:>8.3} s", step.name, usage.wall.as_secs_f64()));
        let printed: Value = serde_json::from_str(&usage.output).unwrap_or_default();
        self.samples.push(Sample {
            step,
            round,
            usage: Usage { output: String::new(), ..usage },
            cluster_bytes,
            bytes_written,
            bytes_read: printed["bytes_read"].as_u64(),
            blocks_changed: None,
            load,
            facts: Facts::default(),
        });
        let sample = self.samples.last_mut().ok_or_else(|| Error::new("no sample"))?;
        Ok(Measured { printed, sample })
    }
}

impl Measured<'_> {
    /// The id of the backup that pgstrata made.
    ///
    /// # Errors
    /// When it printed none.
    pub fn id(&self) -> Result<String> {
        let id = self.printed["id"].as_str().map(str::to_owned);
        id.ok_or_else(|| Error::new(format!("pgstrata --json printed no id but {}", self.printed)))
    }
}

/// Whether every command has run `runs` times without others at work.
fn enough(samples: &[Sample], runs: u32) -> bool {
    let undisturbed = |step| samples.iter().filter(|sample| sample.step == step && !sample.is_disturbed()).count();
    samples.iter().all(|sample| undisturbed(sample.step) >= runs as usize)
}
