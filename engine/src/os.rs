//! The operating system: processors, rights over files, paths, what the kernel is told about reading.

use std::fs::File;
use std::io::IoSliceMut;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise, stat, statvfs};
use rustix::io::{ReadWriteFlags, preadv2};

use crate::error::{Error, Result};

/// Bytes that are cached, or are not, together.
const PIECE_LEN: u64 = 1 << 20;
/// Bytes that are asked for at once: the kernel cuts off longer wishes (`mm/readahead.c`, `force_page_cache_ra`).
const WISH_LEN: u64 = 256 << 10;

/// Tells the kernel that a file will be read once: that is no reason to keep its pages, and let go of others.
pub(crate) fn reads_once(file: &File) {
    // A hint.
    let _ = fadvise(file, 0, None, Advice::NoReuse);
}

/// Tells the kernel that bytes will be read soon, unless they are cached already: a look at one page of each piece is cheaper.
pub(crate) fn will_read(file: &File, offset: u64, len: u64) {
    let end = offset + len;
    for piece in (offset..end).step_by(PIECE_LEN as usize) {
        let mut byte = [0];
        if preadv2(file, &mut [IoSliceMut::new(&mut byte)], piece, ReadWriteFlags::NOWAIT).is_ok() {
            continue;
        }
        let piece_end = end.min(piece + PIECE_LEN);
        for wish in (piece..piece_end).step_by(WISH_LEN as usize) {
            // A hint.
            let _ = fadvise(file, wish, NonZeroU64::new(WISH_LEN.min(piece_end - wish)), Advice::WillNeed);
        }
    }
}

/// How many workers are wanted: one for each processor unless somebody said otherwise.
pub(crate) fn worker_count(jobs: Option<NonZeroUsize>) -> usize {
    let processors = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    jobs.unwrap_or_else(processors).get()
}

/// Bytes that this user may still write to the file system of `path`.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let found = statvfs(path).map_err(|e| Error::io("ask for the free space of", path, e.into()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether two directories are on one file system.
///
/// # Errors
/// When one cannot be looked at.
pub(crate) fn share_a_file_system(one: &Path, other: &Path) -> Result<bool> {
    let device = |path: &Path| stat(path).map(|found| found.st_dev).map_err(|e| Error::io("look at", path, e.into()));
    Ok(device(one)? == device(other)?)
}

/// Whether files can be given to other users: by root, unless he is root over hardly anybody but himself, as in a name space of a user's own.
pub(crate) fn gives_files_away() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    rustix::process::geteuid().is_root() && (map.is_empty() || maps_others(&map))
}

/// Whether a name space has the users of a whole system: `uid_map` has lines of the first id inside, the first outside, and the number of ids.
fn maps_others(uid_map: &str) -> bool {
    let count = |line: &str| line.split_whitespace().nth(2).and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    uid_map.lines().map(count).sum::<u64>() > u64::from(u16::MAX)
}

/// The nearest directory above that exists.
pub(crate) fn existing_ancestor(path: &Path) -> Result<PathBuf> {
    let found = path.ancestors().find(|ancestor| ancestor.exists());
    found.map(Path::to_owned).ok_or_else(|| Error::invalid(format!("{} is nowhere", path.display())))
}

/// The path with its existing part free of symbolic links.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("find", path, e))?;
    let existing = existing_ancestor(&absolute)?;
    let rest = absolute.strip_prefix(&existing).unwrap_or(Path::new("")).to_owned();
    let resolved = existing.canonicalize().map_err(|e| Error::io("find", &existing, e))?;
    Ok(if rest.as_os_str().is_empty() { resolved } else { resolved.join(rest) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_over_himself_alone_gives_nothing_away() {
        assert!(maps_others("         0          0 4294967295\n"));
        assert!(maps_others("         0       1000          1\n         1     100000      65536\n"));
        assert!(!maps_others("         0       1000          1\n"));
    }
}
