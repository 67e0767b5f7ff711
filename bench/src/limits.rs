//! What bounds every backup and every restore, as small as it can be written: `compare` runs these beside the tools.
//!
//! ```text
//! read      every byte of the cluster, by all workers                                        bounds a look for changes
//! hash      every page of the relations: its checksum proved and its fingerprint made, thrown away        bounds a scan for changes
//! compress  every byte, then per 256 KiB: page checksums, a BLAKE3 fingerprint for each page, zstd 1    bounds a full backup
//! write     the files of a directory into a new one, by all workers, synced                  bounds a restore
//! ```
//!
//! Checksums and fingerprints are the engine's kernels, zstd is the library: they bound this machine and not a program. What they make they throw
//! away. A backup can be faster than `compress`, since it gives zstd less to do (`engine/src/chunk/delta.rs`).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use engine::chunk::Fingerprint;
use engine::pg::{BlockNumber, checksum, is_zero};
use testdata::{Error, Result};

use crate::{cannot, read};

const PAGE_LEN: usize = 8192;
/// Blocks of a whole segment of a relation.
const SEGMENT_BLOCKS: u64 = 131_072;
/// PostgreSQL: src/include/storage/bufpage.h, PageHeaderData, pd_checksum.
const CHECKSUM_AT: usize = 8;

/// A bound of all backups or restores; `compare` runs this beside the tools.
#[derive(Args, Debug)]
#[command(hide = true)]
pub struct LimitArgs {
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    #[command(subcommand)]
    limit: Limit,
}

#[derive(Subcommand, Debug)]
enum Limit {
    /// Reads, checks and hashes the pages of all relations.
    Hash {
        /// The data directory.
        data_dir: PathBuf,
    },
    /// Reads, checks, hashes and compresses what a backup reads.
    Compress {
        /// The data directory.
        data_dir: PathBuf,
    },
    /// Writes a copy and syncs it.
    Write {
        /// What is copied.
        from: PathBuf,
        /// A new directory.
        to: PathBuf,
    },
}

/// Does it.
///
/// # Errors
/// When a file cannot be read or written.
pub fn run(args: &LimitArgs) -> Result<()> {
    match &args.limit {
        Limit::Hash { data_dir } => hash(data_dir, args.jobs),
        Limit::Compress { data_dir } => compress(data_dir, args.jobs),
        Limit::Write { from, to } => write(from, to, args.jobs),
    }
}

fn hash(data_dir: &Path, jobs: u32) -> Result<()> {
    let files = read::files(data_dir)?;
    let relations: Vec<_> = files.into_iter().filter(|(path, _)| segment_of(path).is_some()).collect();
    let hashers = || {
        |path: &Path, at: u64, window: &[u8]| {
            let first = u64::from(segment_of(path).unwrap_or_default()) * SEGMENT_BLOCKS + at / PAGE_LEN as u64;
            for (block, page) in (first..).zip(window.chunks_exact(PAGE_LEN)) {
                let number = u32::try_from(block).map_err(|e| cannot("count the blocks of", path, e))?;
                if !is_right(page, BlockNumber::new(number)) {
                    return Err(cannot("check", path, format!("the checksum of block {number} is wrong")));
                }
                std::hint::black_box(Fingerprint::of(page));
            }
            Ok(())
        }
    };
    read::in_slices(&relations, jobs, hashers)
}

/// Whether a page is new, or has the checksum that it says.
fn is_right(page: &[u8], number: BlockNumber) -> bool {
    let stored = u16::from_le_bytes([page[CHECKSUM_AT], page[CHECKSUM_AT + 1]]);
    checksum(page, number) == stored || is_zero(page)
}

/// The number of a relation's segment, from its file's name: 16384, `16384_fsm`, `16384.3`; `None` if it is something else.
fn segment_of(path: &Path) -> Option<u32> {
    let (name, segment) = match path.file_name()?.to_str()? {
        name if name.contains('.') => name.split_once('.')?,
        name => (name, "0"),
    };
    let (number, fork) = name.split_once('_').unwrap_or((name, "main"));
    let forks = ["main", "fsm", "vm", "init"];
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let of_database = path.parent()?.file_name()?.to_str()?;
    let placed = is_number(of_database) || of_database == "global";
    let relation = placed && is_number(number) && forks.contains(&fork) && is_number(segment);
    if relation { segment.parse().ok() } else { None }
}

fn compress(data_dir: &Path, jobs: u32) -> Result<()> {
    let encoders = || {
        let mut zstd = zstd::bulk::Compressor::new(1);
        let mut compressed = Vec::new();
        move |_: &Path, _, window: &[u8]| {
            for page in window.chunks_exact(PAGE_LEN) {
                std::hint::black_box((checksum(page, BlockNumber::new(0)), Fingerprint::of(page)));
            }
            let zstd = zstd.as_mut().map_err(|e| Error::new(e.to_string()))?;
            compressed.resize(zstd::zstd_safe::compress_bound(window.len()), 0);
            let len = zstd.compress_to_buffer(window, &mut compressed[..]);
            len.map(|len| _ = std::hint::black_box(len)).map_err(|e| Error::new(e.to_string()))
        }
    };
    read::in_slices(&read::files(data_dir)?, jobs, encoders)
}

fn write(from: &Path, to: &Path, jobs: u32) -> Result<()> {
    let files = read::all_files(from)?;
    let place = |path: &Path| Ok::<_, Error>(to.join(path.strip_prefix(from).map_err(|e| cannot("copy", path, e))?));
    for (path, len) in &files {
        let path = place(path)?;
        let directory = path.parent().unwrap_or(to);
        fs::create_dir_all(directory).map_err(|e| cannot("make", directory, e))?;
        if *len == 0 {
            File::create(&path).map_err(|e| cannot("make", &path, e))?;
        }
    }
    let writers = || {
        |path: &Path, at, window: &[u8]| {
            let path = place(path)?;
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            file.and_then(|file| file.write_all_at(window, at)).map_err(|e| cannot("write", &path, e))
        }
    };
    read::in_slices(&files, jobs, writers)?;
    let root = File::open(to).map_err(|e| cannot("open", to, e))?;
    rustix::fs::syncfs(&root).map_err(|e| cannot("sync", to, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relations_are_told_from_other_files() {
        let segment = |path: &str| segment_of(Path::new(path));
        assert_eq!((segment("d/base/5/16384"), segment("d/base/5/16384_fsm.2")), (Some(0), Some(2)));
        assert_eq!((segment("d/global/1262"), segment("d/pg_tblspc/9/PG_18_1/5/7.1")), (Some(0), Some(1)));
        for other in ["d/base/5/PG_VERSION", "d/pg_xact/0000", "d/global/pg_control", "d/base/5/t3_16384", "d/pg_wal/1"]
        {
            assert_eq!(segment(other), None, "{other}");
        }
    }

    #[test]
    fn a_wrong_checksum_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base/5");
        fs::create_dir_all(&base).unwrap();
        fs::write(base.join("16384"), vec![0; 3 * PAGE_LEN]).unwrap();
        hash(dir.path(), 2).unwrap();
        fs::write(base.join("16384"), vec![1; PAGE_LEN]).unwrap();
        assert!(hash(dir.path(), 2).unwrap_err().to_string().contains("block 0"));
    }

    #[test]
    fn a_written_copy_has_the_files_of_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("base")).unwrap();
        fs::write(from.join("base/1"), vec![7; 300_000]).unwrap();
        fs::write(from.join("PG_VERSION"), "18\n").unwrap();
        write(&from, &to, 2).unwrap();
        assert_eq!(fs::read(to.join("base/1")).unwrap(), vec![7; 300_000]);
        assert_eq!(fs::read(to.join("PG_VERSION")).unwrap(), b"18\n");
        compress(&to, 2).unwrap();
    }
}
