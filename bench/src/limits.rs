//! What bounds every backup and every restore, as small as it can be written: `compare` runs these beside the tools.
//!
//! ```text
//! read      every byte of the cluster, by all workers                                        bounds a look for changes
//! compress  the same, then per 256 KiB: page checksums, a BLAKE3 fingerprint for each page, zstd 1    bounds a full backup
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
use engine::pg::{BlockNumber, checksum};
use testdata::{Error, Result};

use crate::{cannot, read};

const PAGE_LEN: usize = 8192;

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
        Limit::Compress { data_dir } => compress(data_dir, args.jobs),
        Limit::Write { from, to } => write(from, to, args.jobs),
    }
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
