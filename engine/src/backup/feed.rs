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
//! Files are taken from whoever lists them when their turn comes, so those that are ahead are few, too.
//!
//! What goes wrong: nothing that is not an error of listing or opening. Advice that the file system does not take is no advice.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crossbeam_channel::Sender;

use super::copy::{OpenItem, Reader, Run, Work, lock};
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
#[derive(Clone)]
pub(super) struct Slice {
    /// The item.
    pub open: Arc<OpenItem>,
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
    work: &'a mut (dyn Iterator<Item = Result<Work>> + Send),
    block_len: u64,
    /// The number of the next file.
    number: u64,
    /// The item that is being cut.
    open: Option<Arc<OpenItem>>,
    part: u32,
    start: u32,
}

impl<'a> Slices<'a> {
    /// From the beginning.
    pub fn of(work: &'a mut (dyn Iterator<Item = Result<Work>> + Send), block_len: usize) -> Self {
        Self { work, block_len: block_len as u64, number: 0, open: None, part: 0, start: 0 }
    }

    /// The next slice. Files that have none are finished as they come.
    fn next(&mut self, run: &Run<'_>) -> Result<Option<Slice>> {
        loop {
            if let Some(slice) = self.cut() {
                return Ok(Some(slice));
            }
            run.wait_for_room();
            if run.failed.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let Some(work) = self.work.next().transpose()? else { return Ok(None) };
            let number = self.number;
            self.number += 1;
            match work {
                Work::Copy(item) if item.part_count(self.block_len) > 0 => {
                    self.open = Some(Arc::new(OpenItem::new(number, item, self.block_len)));
                }
                Work::Copy(item) => run.order.deliver(number, Some(item.entry))?,
                Work::Done(entry) => run.order.deliver(number, Some(entry))?,
            }
        }
    }

    /// The next slice of the item at hand.
    fn cut(&mut self) -> Option<Slice> {
        let open = self.open.as_ref()?;
        let parts = open.item.part_count(self.block_len);
        while self.part < parts {
            let blocks = open.item.part_blocks(self.block_len, self.part);
            if self.start < blocks {
                let (start, count) = (self.start, SLICE_BLOCKS.min(blocks - self.start));
                self.start += count;
                let last = self.part + 1 == parts && self.start == blocks;
                let to_end = last && open.item.is_read_to_its_end();
                return Some(Slice { open: Arc::clone(open), part: self.part, start, count, to_end });
            }
            (self.part, self.start) = (self.part + 1, 0);
        }
        (self.open, self.part, self.start) = (None, 0, 0);
        None
    }
}

impl Run<'_> {
    /// Opens and asks for slices until there are no more, or nobody takes them.
    pub fn feed(&self, slices: &Mutex<Slices<'_>>, to: &Sender<Slice>) -> Result<()> {
        while !self.failed.load(Ordering::Relaxed) {
            let slice = lock(slices).next(self);
            let Some(slice) = slice? else { break };
            self.ask_for(&slice)?;
            if to.send(slice).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn ask_for(&self, slice: &Slice) -> Result<()> {
        let reader = self.reader(&slice.open)?;
        let block_len = self.copier.block_len as u64;
        let part = u64::from(slice.part) * u64::from(PART_BLOCKS);
        for range in self.ranges(slice) {
            let mut offset = (part + u64::from(range.start)) * block_len;
            let end = slice.open.item.entry.len.min((part + u64::from(range.end)) * block_len);
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
