//! Memory that is really there: before a command is measured, as much as it may need is touched and freed again.
//!
//! On a virtual machine with free page reporting or a balloon, memory that has been free for some seconds is the host's again, and whoever
//! takes it next waits for the host at every page. Writing 4 GB to the page cache took 1.0 s of kernel time here where as much had been
//! freed a moment before, 4 s after a pause of 3 s, and 9 to 10 s after one of 15 s. So the first of several tools would pay for all of them,
//! and so would whoever comes after a pause, say for a checkpoint. Touched memory makes the start the same for all.
//!
//! It is a process of its own that touches: memory counts as this program's peak otherwise, and the kernel hands that down to the commands.
//! What a command needs beyond the share of the available memory that is touched, and what it needs so late that the host has taken it
//! again, it still waits for.

use std::fs;
use std::hint::black_box;
use std::path::Path;

use clap::Args;
use testdata::{Error, Result};

use crate::cannot;

/// What a command may need besides the bytes of a cluster: its own memory, a server's, and what it reads of metadata.
const SPARE_LEN: u64 = 512 << 20;
/// Of the available memory, in percent: more would drive out what the caches are to hold.
const MOST_PERCENT: u64 = 60;
const PAGE_LEN: usize = 4096;

/// Touches memory and frees it; `measure` runs this before each command.
#[derive(Args, Debug)]
#[command(hide = true)]
pub struct TouchArgs {
    /// How many bytes.
    bytes: u64,
}

/// Does it, by all processors.
///
/// # Errors
/// When there is not as much.
pub fn run(args: &TouchArgs) -> Result<()> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let len = usize::try_from(args.bytes).map_err(|e| Error::new(e.to_string()))?.div_ceil(workers);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(|| touched(len))).collect();
        // All of it is there at once: what the first worker freed, the second would only take again.
        let touched: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        let whole = touched.iter().all(|memory| memory.as_ref().is_ok_and(|memory| memory.len() == len));
        if whole { Ok(()) } else { Err(Error::new("a thread that touched memory panicked")) }
    })
}

fn touched(len: usize) -> Vec<u8> {
    let mut memory = vec![0; len];
    memory.chunks_mut(PAGE_LEN).for_each(|page| page[0] = 1);
    black_box(memory)
}

/// What a backup of a cluster of so many bytes, or a look at it, may need: an outcome as large as that.
pub fn of_backup(cluster_bytes: u64) -> u64 {
    cluster_bytes + SPARE_LEN
}

/// What a restore or a copy of such a cluster may need: what is read, and what is written.
pub fn of_restore(cluster_bytes: u64) -> u64 {
    2 * cluster_bytes + SPARE_LEN
}

/// As much of `wanted` as may be touched on this machine now.
///
/// # Errors
/// When the kernel does not tell what is available.
pub fn touchable(wanted: u64) -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(|e| cannot("read", path, e))?;
    let available = available_in(&text).ok_or_else(|| cannot("read", path, "it does not say MemAvailable"))?;
    Ok(wanted.min(available / 100 * MOST_PERCENT))
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_touched_than_a_part_of_what_is_available() {
        assert_eq!(available_in("MemTotal:  9 kB\nMemAvailable:   1000 kB\n"), Some(1_024_000));
        assert_eq!(available_in("MemTotal:  9 kB\n"), None);
        assert_eq!(touchable(1).unwrap(), 1);
        assert!((1..u64::MAX / 2).contains(&touchable(u64::MAX).unwrap()));
    }

    #[test]
    fn a_restore_needs_what_it_reads_and_what_it_writes() {
        assert_eq!(of_restore(1 << 30) - of_backup(1 << 30), 1 << 30);
    }

    #[test]
    fn what_is_touched_need_not_be_a_multiple_of_anything() {
        for bytes in [0, 1, 4097, 1_000_003] {
            run(&TouchArgs { bytes }).unwrap();
        }
    }
}
