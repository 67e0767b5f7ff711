//! The inner loops on one core: what a page costs where nothing waits for a disk or a lock.
//!
//! Each kernel gets windows of 256 KiB that were just copied into place, as they are in the cache after a read; only the
//! kernel itself is timed. The rate of a kernel is over raw bytes, also for decompression.
//!
//! This is one look at the pages of a given cluster. Whether a kernel got faster is told by `benches/kernels.rs`, with statistics.

use std::fmt::Write as _;
use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use engine::chunk::{ChunkId, Compression, Decoder, Encoder, Fingerprint, MAX_RAW_LEN, Shape};
use engine::pg::{BlockNumber, checksum, is_zero};
use testdata::synthetic::page::{PAGE_LEN, PageSeed, PageWriter};
use testdata::{Error, Result};

use crate::cannot;

/// Raw bytes that each kernel works on: more than the caches hold.
const SAMPLE_LEN: usize = 64 << 20;
/// How often each kernel goes over the sample; the fastest counts.
const PASSES: usize = 5;
const GB: f64 = 1e9;

/// Times every kernel and returns the table.
///
/// # Errors
/// When the file cannot be read or has no whole window of pages.
pub fn run(pages: Option<&Path>) -> Result<String> {
    let sample = match pages {
        Some(path) => file_pages(path)?,
        None => synthetic_pages(),
    };
    let kind = if pages.is_some() { "of a relation file" } else { "synthetic, half text" };
    let mut table = format!("kernel on one core                 GB/s    pages {kind}\n");
    let mut row = |name: &str, rate: f64, note: &str| {
        let _ = writeln!(table, "{:<34} {rate:>5.2}{}{note}", name, if note.is_empty() { "" } else { "   " });
    };
    if let Some(path) = pages {
        row("read 256 KiB", read_rate(path, sample.len())?, "from the cache");
    }
    row("copy", rate(&sample, |window| drop(black_box(window.to_vec()))), "");
    row(
        "is_zero, of zero pages",
        rate(&vec![0; SAMPLE_LEN], |window| each_page(window, |page| _ = black_box(is_zero(page)))),
        "",
    );
    row(
        "page checksum",
        rate(&sample, |window| each_page(window, |page| _ = black_box(checksum(page, BlockNumber::new(7))))),
        "",
    );
    row("fingerprint", rate(&sample, |window| each_page(window, |page| _ = black_box(Fingerprint::of(page)))), "");
    for level in [1, 3] {
        let (encode, decode, ratio) = compression(&sample, level)?;
        row(&format!("zstd:{level} encode, 256 KiB"), encode, &format!("to {:.1} %", ratio * 100.0));
        row(&format!("zstd:{level} decode and prove, 256 KiB"), decode, "with the fingerprints");
    }
    Ok(table)
}

fn each_page(window: &[u8], kernel: impl FnMut(&[u8])) {
    window.chunks_exact(PAGE_LEN).for_each(kernel);
}

/// GB/s of `kernel` over the sample, window by window.
fn rate(sample: &[u8], mut kernel: impl FnMut(&[u8])) -> f64 {
    let mut window = vec![0; MAX_RAW_LEN];
    let mut pass = || {
        let mut spent = Duration::ZERO;
        for source in sample.chunks_exact(MAX_RAW_LEN) {
            window.copy_from_slice(source);
            let begun = Instant::now();
            kernel(black_box(&window));
            spent += begun.elapsed();
        }
        spent
    };
    let fastest = (0..PASSES).map(|_| pass()).min().unwrap_or_default();
    sample.len() as f64 / fastest.as_secs_f64() / GB
}

/// GB/s of encoding and of decoding with proof, and the stored part of the raw bytes.
fn compression(sample: &[u8], level: i32) -> Result<(f64, f64, f64)> {
    let failed = |e: engine::Error| Error::new(e.to_string());
    let mut encoder = Encoder::new(Compression::Zstd(level)).map_err(failed)?;
    let encode = rate(sample, |window| drop(black_box(encoder.encode(window))));
    let shape = Shape { block_len: PAGE_LEN, block_count: MAX_RAW_LEN / PAGE_LEN };
    let mut chunks = Vec::new();
    for window in sample.chunks_exact(MAX_RAW_LEN) {
        let fingerprints: Vec<_> = window.chunks_exact(PAGE_LEN).map(Fingerprint::of).collect();
        let (codec, stored) = encoder.encode(window).map_err(failed)?;
        chunks.push((codec, stored.to_vec(), ChunkId::of(&fingerprints)));
    }
    let mut decoder = Decoder::new().map_err(failed)?;
    let mut fastest = Duration::MAX;
    for _ in 0..PASSES {
        let begun = Instant::now();
        for (codec, stored, id) in &chunks {
            black_box(decoder.decode(*codec, stored, shape, *id).map_err(failed)?);
        }
        fastest = fastest.min(begun.elapsed());
    }
    let stored: usize = chunks.iter().map(|(_, stored, _)| stored.len()).sum();
    let decode = sample.len() as f64 / fastest.as_secs_f64() / GB;
    Ok((encode, decode, stored as f64 / sample.len() as f64))
}

/// GB/s of positioned reads that the cache answers.
fn read_rate(path: &Path, len: usize) -> Result<f64> {
    let file = File::open(path).map_err(|e| cannot("open", path, e))?;
    let mut window = vec![0; MAX_RAW_LEN];
    let mut fastest = Duration::MAX;
    for _ in 0..PASSES {
        let begun = Instant::now();
        for at in (0..len).step_by(MAX_RAW_LEN) {
            file.read_exact_at(&mut window, at as u64).map_err(|e| cannot("read", path, e))?;
        }
        fastest = fastest.min(begun.elapsed());
    }
    Ok(len as f64 / fastest.as_secs_f64() / GB)
}

/// Whole windows from the file's start.
fn file_pages(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| cannot("open", path, e))?;
    let mut sample = Vec::new();
    file.take(SAMPLE_LEN as u64).read_to_end(&mut sample).map_err(|e| cannot("read", path, e))?;
    sample.truncate(sample.len() / MAX_RAW_LEN * MAX_RAW_LEN);
    if sample.is_empty() {
        return Err(cannot("take pages from", path, format!("it has less than {MAX_RAW_LEN} bytes")));
    }
    Ok(sample)
}

fn synthetic_pages() -> Vec<u8> {
    let writer = PageWriter::new(true, 50);
    let mut sample = Vec::with_capacity(SAMPLE_LEN);
    let mut page = [0; PAGE_LEN];
    for block in (0..).take(SAMPLE_LEN / PAGE_LEN) {
        writer.heap_page(&mut page, PageSeed { seed: 1, relation: 1, block, version: 0 }, 1 << 24);
        sample.extend_from_slice(&page);
    }
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_cut_to_whole_windows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; MAX_RAW_LEN + PAGE_LEN]).unwrap();
        assert_eq!(file_pages(file.path()).unwrap().len(), MAX_RAW_LEN);
        std::fs::write(file.path(), vec![1; PAGE_LEN]).unwrap();
        assert!(file_pages(file.path()).is_err());
    }
}
