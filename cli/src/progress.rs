//! Progress for people: a bar with bytes, rate and time left, on standard error and only if that is a terminal.
//!
//! Notices are printed in any case: they are part of what a cron mail must say.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::progress::{Phase, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const KNOWN_TOTAL: &str =
    "{msg:<10} {wide_bar} {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>12}, {eta} left";
const UNKNOWN_TOTAL: &str = "{msg:<10} {spinner} {binary_bytes} {binary_bytes_per_sec}";
const NO_BYTES: &str = "{msg} {spinner} {elapsed}";
const TICK: Duration = Duration::from_millis(125);

/// One bar, for the stage that runs now.
pub struct Bars {
    visible: bool,
    now: Mutex<Stage>,
}

/// How far a run is.
pub struct Stage {
    bar: ProgressBar,
    phase: Option<Phase>,
    is_over: bool,
}

impl Stage {
    /// The stage that runs now; none before the first begins.
    pub fn phase(&self) -> Option<Phase> {
        self.phase
    }

    /// Whether the run has ended.
    pub fn is_over(&self) -> bool {
        self.is_over
    }
}

impl Bars {
    /// Nothing is drawn before the first stage begins.
    pub fn new() -> Self {
        Self::drawn(std::io::stderr().is_terminal())
    }

    fn drawn(visible: bool) -> Self {
        Self { visible, now: Mutex::new(Stage { bar: ProgressBar::hidden(), phase: None, is_over: false }) }
    }

    /// Takes the bar off the screen, so that the report has it to itself: the run is over.
    pub fn finish(&self) {
        let mut now = self.now();
        now.bar.finish_and_clear();
        now.is_over = true;
    }

    /// Takes the bar off the screen and says how far the run is. Nobody draws while the answer lives.
    pub fn halt(&self) -> MutexGuard<'_, Stage> {
        let now = self.now();
        now.bar.finish_and_clear();
        now
    }

    fn now(&self) -> MutexGuard<'_, Stage> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bar(&self) -> ProgressBar {
        self.now().bar.clone()
    }
}

impl Progress for Bars {
    fn begin(&self, phase: Phase, total_bytes: u64) {
        let mut now = self.now();
        now.bar.finish_and_clear();
        now.phase = Some(phase);
        if self.visible {
            now.bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
            now.bar.set_style(style(phase, total_bytes));
            now.bar.set_message(label(phase));
            now.bar.enable_steady_tick(TICK);
        }
    }

    fn advance(&self, bytes: u64) {
        self.bar().inc(bytes);
    }

    fn notice(&self, text: &str) {
        self.bar().suspend(|| crate::report::print_notice(text));
    }
}

fn style(phase: Phase, total_bytes: u64) -> ProgressStyle {
    let template = match (phase, total_bytes) {
        (Phase::Starting | Phase::Listing | Phase::Syncing | Phase::Deleting, 0) => NO_BYTES,
        (_, 0) => UNKNOWN_TOTAL,
        _ => KNOWN_TOTAL,
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn label(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "checkpoint",
        Phase::Listing => "listing",
        Phase::Copying => "copying",
        Phase::Wal => "WAL",
        Phase::Restoring => "restoring",
        Phase::Syncing => "syncing",
        Phase::Verifying => "verifying",
        Phase::Merging => "merging",
        Phase::Moving => "moving",
        Phase::Deleting => "deleting",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_one_that_indicatif_can_read() {
        for template in [KNOWN_TOTAL, UNKNOWN_TOTAL, NO_BYTES] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn nothing_is_drawn_where_there_is_no_terminal() {
        let bars = Bars::drawn(false);
        bars.begin(Phase::Copying, 100);
        bars.advance(60);
        assert!(bars.bar().is_hidden());
        let stage = bars.halt();
        assert_eq!((stage.phase(), stage.is_over()), (Some(Phase::Copying), false));
    }
}
