//! Work for the copier: files cut into slices, which are opened and asked for ahead of the workers that read them.
//!
//! A disk answers many questions at once as fast as one, and a worker that reads, hashes and compresses asks one at a time. So threads of their own
//! open the files and tell the kernel which bytes will be read; they stay a bounded number of slices ahead. That is what makes a cold disk busy
//! whatever the number of cores, and what opens tens of thousands of small files whose inodes are not in memory. Bytes that are cached
//! are not asked for: a look at one page of each piece tells. The files are also marked as read once, so that the kernel does not take
//! a backup's reading for a reason to keep pages and let go of those that the database uses.
//!
//! The rate of reading is bounded here, where it begins.
//!
//! What goes wrong: nothing that is not an error of opening. Advice that the file system does not take is no advice.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;

use super::copy::{Item, Reader, Run, lock};
use crate::error::Result;
use crate::os::will_read;
use crate::repo::PART_BLOCKS;

/// Blocks that a worker takes at once: 8 MiB of 8 KiB blocks. Larger ones leave workers without work at the end.
pub(super) const SLICE_BLOCKS: u32 = 1024;
/// Slices that wait for a worker, at most.
pub(super) const AHEAD: usize = 8;
/// Threads that open and ask.
pub(super) const FEEDERS: usize = 4;
/// Bytes that the bound on the rate lets pass at once.
const PIECE_LEN: u64 = 1 << 20;

/// A piece of work: some blocks of a part of an item.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    /// The item, by its place in the list.
    pub item: usize,
    /// The part.
    pub part: u32,
    /// The first block in the part.
    pub start: u32,
    /// How many blocks.
    pub count: u32,
    /// Whether it goes on to the end of the file.
    pub to_end: bool,
}

/// The slices of all items, one after the other.
pub(super) struct Slices<'a> {
    items: &'a [Item],
    block_len: u64,
    item: usize,
    part: u32,
    start: u32,
}

impl<'a> Slices<'a> {
    /// From the beginning.
    pub fn of(items: &'a [Item], block_len: usize) -> Self {
        Self { items, block_len: block_len as u64, item: 0, part: 0, start: 0 }
    }
}

impl Iterator for Slices<'_> {
    type Item = Slice;

    fn next(&mut self) -> Option<Slice> {
        loop {
            let item = self.items.get(self.item)?;
            let (parts, blocks) = (item.part_count(self.block_len), item.part_blocks(self.block_len, self.part));
            if self.part >= parts {
                (self.item, self.part, self.start) = (self.item + 1, 0, 0);
            } else if self.start >= blocks {
                (self.part, self.start) = (self.part + 1, 0);
            } else {
                let (start, count) = (self.start, SLICE_BLOCKS.min(blocks - self.start));
                self.start += count;
                let last = self.part + 1 == parts && self.start == blocks;
                let to_end = last && item.is_read_to_its_end();
                return Some(Slice { item: self.item, part: self.part, start, count, to_end });
            }
        }
    }
}

impl Run<'_> {
    /// Opens and asks for slices until there are no more, or nobody takes them.
    pub fn feed(&self, slices: &Mutex<Slices<'_>>, to: &Sender<Slice>) -> Result<()> {
        while !self.failed.load(Ordering::Relaxed) {
            let Some(slice) = lock(slices).next() else { break };
            let asked = self.ask_for(slice).inspect_err(|_| self.failed.store(true, Ordering::Relaxed));
            asked?;
            if to.send(slice).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn ask_for(&self, slice: Slice) -> Result<()> {
        let open = self.open_item(slice.item);
        let reader = self.reader(slice.item, &open)?;
        let block_len = self.copier.block_len as u64;
        let part = u64::from(slice.part) * u64::from(PART_BLOCKS);
        for range in self.ranges(slice) {
            let mut offset = (part + u64::from(range.start)) * block_len;
            let end = self.items[slice.item].entry.len.min((part + u64::from(range.end)) * block_len);
            while offset < end {
                let len = PIECE_LEN.min(end - offset);
                self.copier.rate.take(len);
                if let Some(Reader::File(file) | Reader::Prefix(file, _)) = reader.as_deref() {
                    will_read(file, offset, len);
                }
                offset += len;
            }
        }
        Ok(())
    }
}
