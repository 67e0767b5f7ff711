//! A bound on the rate of reading (`--max-rate`).

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets so many bytes a second pass, over all threads; whoever comes early waits.
#[derive(Debug)]
pub(super) struct RateLimit {
    bytes_per_second: Option<NonZeroU64>,
    free_at: Mutex<Instant>,
}

impl RateLimit {
    /// A limit, or none.
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may be read.
    pub fn take(&self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let now = Instant::now();
        let wait = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*free_at).max(now);
            *free_at = turn + Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
            turn - now
        };
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
    }
}
