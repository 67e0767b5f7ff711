//! Reading a data directory as a backup has to, and nothing else: the bound of every backup.
//!
//! `cat` reads the files one after the other; this reads them in slices, by several threads, with the positioned reads of
//! 256 KiB that a backup makes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use testdata::{Error, Result};

use crate::cannot;

const SLICE_LEN: u64 = 32 << 20;
const WINDOW_LEN: usize = 256 << 10;

/// Directories whose contents no backup takes.
const SKIPPED: [&str; 1] = ["pg_wal"];

/// The files of a data directory and of its tablespaces that a backup reads, ascending, with their lengths.
///
/// # Errors
/// When a directory cannot be read.
pub fn files(data_dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    let mut directories = vec![data_dir.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).map_err(|e| cannot("list", &directory, e))? {
            let entry = entry.map_err(|e| cannot("list", &directory, e))?;
            // Tablespaces are behind links, and nothing else is.
            let looked = if directory.ends_with("pg_tblspc") { fs::metadata(entry.path()) } else { entry.metadata() };
            let Ok(metadata) = looked else { continue };
            let skipped = directory == data_dir && SKIPPED.iter().any(|name| entry.file_name() == *name);
            match metadata.is_dir() {
                true if !skipped => directories.push(entry.path()),
                false if metadata.is_file() => found.push((entry.path(), metadata.len())),
                _ => {}
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All files below `directory`, ascending, with their lengths.
///
/// # Errors
/// When a directory cannot be read.
pub fn all_files(directory: &Path) -> Result<Vec<(PathBuf, u64)>> {
    // `files` skips what lies in the root only, so the root's own children are asked one by one.
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(|e| cannot("list", directory, e))? {
        let path = entry.map_err(|e| cannot("list", directory, e))?.path();
        let metadata = fs::symlink_metadata(&path).map_err(|e| cannot("look at", &path, e))?;
        match metadata.is_dir() {
            true => found.extend(files(&path)?),
            false if metadata.is_file() => found.push((path, metadata.len())),
            false => {}
        }
    }
    Ok(found)
}

/// The bytes of all files below `directory`.
///
/// # Errors
/// When a directory cannot be read.
pub fn tree_len(directory: &Path) -> Result<u64> {
    Ok(all_files(directory)?.iter().map(|(_, len)| len).sum())
}

/// The bytes of the files below `directory` that have no other name: what a copy by hard links left out does not count.
///
/// # Errors
/// When a directory cannot be read.
pub fn own_len(directory: &Path) -> Result<u64> {
    let mut len = 0;
    for entry in fs::read_dir(directory).map_err(|e| cannot("list", directory, e))? {
        let path = entry.map_err(|e| cannot("list", directory, e))?.path();
        let metadata = fs::symlink_metadata(&path).map_err(|e| cannot("look at", &path, e))?;
        len += match metadata.is_dir() {
            true => own_len(&path)?,
            false if metadata.nlink() == 1 => metadata.len(),
            false => 0,
        };
    }
    Ok(len)
}

/// Reads everything by `jobs` threads.
///
/// # Errors
/// When a file cannot be read.
pub fn run(data_dir: &Path, jobs: u32) -> Result<()> {
    in_slices(&files(data_dir)?, jobs, || |_: &Path, _, _: &[u8]| Ok(()))
}

/// Reads these files in slices by `jobs` threads; each hands what it read, with its place, to a worker of its own that `make`
/// makes.
///
/// # Errors
/// When a file cannot be read; those of the workers.
pub fn in_slices<W>(files: &[(PathBuf, u64)], jobs: u32, make: impl Fn() -> W + Sync) -> Result<()>
where
    W: FnMut(&Path, u64, &[u8]) -> Result<()>,
{
    let slices: Vec<(&Path, u64)> = files
        .iter()
        .flat_map(|(path, len)| (0..*len).step_by(SLICE_LEN as usize).map(|at| (path.as_path(), at)))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut window, mut worker) = (vec![0; WINDOW_LEN], make());
        while let Some((path, from)) = slices.get(next.fetch_add(1, Ordering::Relaxed)) {
            read_slice(path, *from, &mut window, &mut worker)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| Err(Error::new("a reader panicked"))))
    })
}

fn read_slice(
    path: &Path,
    from: u64,
    window: &mut [u8],
    worker: &mut impl FnMut(&Path, u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).map_err(|e| cannot("open", path, e))?;
    let mut at = from;
    while at < from + SLICE_LEN {
        match file.read_at(window, at).map_err(|e| cannot("read", path, e))? {
            0 => break,
            len => {
                worker(path, at, &window[..len])?;
                at += len as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_is_nobodys_own() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("base")).unwrap();
        fs::write(dir.path().join("base/1"), [7; 100]).unwrap();
        assert_eq!(own_len(dir.path()).unwrap(), 100);
        fs::hard_link(dir.path().join("base/1"), dir.path().join("2")).unwrap();
        assert_eq!(own_len(dir.path()).unwrap(), 0);
    }

    #[test]
    fn the_wal_is_not_read_but_counts_in_a_tree() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["base", "pg_wal"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("1"), [7; 100]).unwrap();
        }
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        let lens: Vec<u64> = files(dir.path()).unwrap().into_iter().map(|(_, len)| len).collect();
        assert_eq!(lens, [3, 100]);
        assert_eq!(tree_len(dir.path()).unwrap(), 203);
        run(dir.path(), 2).unwrap();
    }
}
