//! What an interrupted run says before it ends by the signal that it got.
//!
//! Nothing is cleaned up but the lock on the repository: what a backup has stored is used by the next one, and the server's side ends with
//! the connection. Cleaning up would only make the user wait, and could fail.

use std::fs;
use std::sync::Arc;
use std::thread;

use engine::progress::Phase;
use engine::{Error, ErrorKind};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::progress::Bars;
use crate::report::{Failure, print_line};

/// Runs `work`; a signal that comes before it is done ends the process, and first prints what `meaning` makes of the
/// stage that was reached.
///
/// A backup is committed some instants before the engine returns; a signal in between is answered with too little.
pub fn explained<T>(
    bars: &Arc<Bars>,
    meaning: impl Fn(Option<Phase>) -> String + Send + 'static,
    work: impl FnOnce() -> T,
) -> Result<T, Failure> {
    let watched = [SIGINT, SIGTERM].into_iter().filter(|signal| !is_ignored(*signal));
    let mut signals = Signals::new(watched)
        .map_err(|error| Error::new(ErrorKind::Unavailable, "cannot watch for signals").because(error))?;
    let screen = Arc::clone(bars);
    thread::spawn(move || {
        for signal in signals.forever() {
            let stage = screen.halt();
            if !stage.is_over() {
                print_line(&format!("interrupted: {}", meaning(stage.phase())));
            }
            engine::repo::give_up_leases();
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    let done = work();
    bars.finish();
    Ok(done)
}

/// Whether whoever started us wants this signal to pass, as a shell does for what it runs in the background.
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal - 1)) != 0
}
