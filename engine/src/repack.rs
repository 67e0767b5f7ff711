//! Moving chunks into new packs, of the same repository or of another.
//!
//! Merging a backup into packs of its own, emptying packs that are mostly dead, and copying what another repository lacks are the same work:
//! some layers are to say the same of the same blocks, with other chunks.
//!
//! ```text
//! plan:  for each job: load its layer; note which blocks of which chunks it uses; a chunk is whole if together they use all of it
//! run:   for each job, in order: load its layer; cut what is to be moved into batches
//!            on any worker: read neighbouring chunks at once; prove them; decode and compress again what is not whole
//!        in order: append the new chunks; when the last of a job is placed, hand out its new layer
//! ```
//!
//! *Whole* chunks are copied as they are stored, once each, after they were compared with the table of their pack: that proves them for a
//! fifth of what decoding costs. *Mixed* ones, of which some blocks are dead, are decoded, which proves them by their ids, and the used blocks
//! are put together to new chunks, across jobs too, so that many small files share one. What goes where is decided by [`cut`] from the
//! layers alone, before a byte of a chunk is read. So the records come in the order of the jobs and their blocks and are the same
//! whatever the number of workers and whoever is faster: merged packs are contiguous in file order, and an interrupted export can be
//! repeated record by record ([`Packer::resuming`]).
//!
//! Why two passes: whether a chunk is whole is known only when all layers were seen, and to move it at its first block is what makes the
//! packs contiguous. The plan remembers only chunks that several jobs share; of all others a layer tells by itself.
//!
//! Memory is bounded by the batches and layers in work: a batch ends at [`cut::BATCH_LEN`] stored bytes, layers wait for a chunk
//! that is not full yet up to [`cut::WAITING_BLOCKS`]. What grows with the repository is the plan and the places of shared chunks,
//! some tens of bytes a chunk.
//!
//! What goes wrong: a damaged chunk, or a map that is wrong about one, is found before any of its bytes are used and ends the run with its
//! name; what was appended before is litter that the caller discards. A layer that changed between the two passes costs copies that could
//! have been shared, never a block.

mod cut;
mod survey;
mod work;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

pub(crate) use survey::MovePlan;

use self::cut::{Batch, Cutter, Step};
use self::work::{MovedBatch, Shared, Worker};
use crate::chunk::Compression;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::repo::{ChunkRef, ClusterName, DataPack, Layer, PackKind, PackName, Packer, Repository};

/// Yields the layer of a job; its fingerprints are needed to move, not to plan.
pub(crate) type Load<'a, J> = &'a (dyn Fn(&J) -> Result<Layer> + Sync);
/// Tells of a pack whether its chunks are to be moved.
pub(crate) type Moves<'a> = &'a (dyn Fn(&DataPack) -> bool + Sync);

/// Moves chunks from the packs of one repository to a packer, of the same repository or of another.
pub(crate) struct Mover<'a> {
    /// Where the chunks are.
    pub from: &'a Repository,
    /// Whose they are.
    pub cluster: &'a ClusterName,
    /// Bytes of a block.
    pub block_len: usize,
    /// Takes the chunks.
    pub data: &'a Packer,
    /// How to compress those that are put together anew.
    pub compression: Compression,
    /// Number of workers.
    pub jobs: usize,
    /// Who watches: told of the stored bytes of each chunk once, [`MovePlan::bytes`] in all.
    pub progress: &'a dyn Progress,
}

/// What was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes read from the packs: chunks, gaps between them, and tables.
    pub bytes_read: u64,
    /// Bytes of chunks appended; a packer that resumes need not have stored them.
    pub bytes_appended: u64,
    /// Chunks that were copied as they are stored.
    pub chunks_moved: u64,
    /// New chunks that were put together from blocks of others.
    pub chunks_recompressed: u64,
}

/// A chunk to be, known to the layers that refer to it before it has its place.
struct NewChunk {
    /// Tells it from others of the run.
    number: u64,
    /// What a layer says of it, when it is appended.
    placed: OnceLock<(ChunkRef, DataPack)>,
}

/// What a worker does: both ends answer to a channel of their own, so that answers are taken in the order of the questions.
enum Task<'a, J> {
    Load(&'a J, Sender<Result<Layer>>),
    Move(Batch, Sender<Result<MovedBatch>>),
}

/// A step on its way to the thread that appends.
struct Underway {
    moved: Receiver<Result<MovedBatch>>,
    done: Vec<(usize, cut::Draft)>,
}

impl Mover<'_> {
    /// What moving would do; `load` may leave fingerprints out.
    ///
    /// # Errors
    /// What `load` says; `Corrupt` if two layers disagree about a chunk.
    pub fn plan<J: Sync>(&self, jobs: &[J], load: Load<'_, J>, moves: Moves<'_>) -> Result<MovePlan> {
        survey::plan(self, jobs, load, moves)
    }

    /// Gives `done` for each job, in order, a layer that says the same of the same blocks, in which every chunk whose pack `moves` was
    /// replaced by one that is in `data`.
    ///
    /// # Errors
    /// What `load` and `done` say; `Missing` or `Corrupt` with object and offset for a chunk that is not what it should be; what
    /// the packer says.
    pub fn run<J: Sync>(
        &self,
        plan: &MovePlan,
        jobs: &[J],
        load: Load<'_, J>,
        moves: Moves<'_>,
        done: &mut dyn FnMut(&J, Layer) -> Result<()>,
    ) -> Result<Moved> {
        let workers = self.jobs.max(1);
        let shared = &Shared::new(self)?;
        let (tasks, to_work) = unbounded();
        // Bounds the batches in work: a task is sent after its step.
        let (steps, to_append) = bounded(2 * workers);
        let cutter = Cutter::new(self, plan, moves);
        std::thread::scope(|scope| {
            let feeding = scope.spawn(move || feed(cutter, jobs, workers, &Feed { tasks, steps }));
            let start = |_| {
                let tasks = to_work.clone();
                scope.spawn(move || work(shared, &tasks, load))
            };
            let working: Vec<_> = (0..workers).map(start).collect();
            drop(to_work);
            let appended = self.append(to_append, jobs, done);
            let panicked = |_| Err(Error::bug("a thread that moves chunks panicked"));
            let fed = feeding.join().unwrap_or_else(panicked);
            let worked: Vec<_> = working.into_iter().map(|w| w.join().unwrap_or_else(panicked)).collect();
            // Of several errors, that of the earliest job; but a worker that is gone has the reason why the others got nothing.
            worked.into_iter().collect::<Result<()>>()?;
            let moved = appended?;
            fed.map(|()| Moved { bytes_read: shared.bytes_read.load(Ordering::Relaxed), ..moved })
        })
    }

    /// Appends what the workers moved, in order, and hands out the layers that are complete.
    fn append<J>(
        &self,
        steps: Receiver<Underway>,
        jobs: &[J],
        done: &mut dyn FnMut(&J, Layer) -> Result<()>,
    ) -> Result<Moved> {
        let mut moved = Moved::default();
        for Underway { moved: batch, done: drafts } in steps {
            // The one who did not answer has the reason, or panicked.
            let batch = batch.recv().map_err(|_| Error::bug("a batch of chunks was not moved"))??;
            self.append_batch(&batch, &mut moved)?;
            for (job, draft) in drafts {
                done(&jobs[job], draft.finish()?)?;
            }
        }
        Ok(moved)
    }

    fn append_batch(&self, batch: &MovedBatch, moved: &mut Moved) -> Result<()> {
        for record in &batch.records {
            let bytes = batch.bytes(record);
            let place = self.data.append_hashed(bytes, record.hash)?;
            let chunk = ChunkRef { pack: 0, offset: place.offset, ..record.chunk };
            let pack = DataPack { run: place.pack.run, seq: place.pack.seq };
            record.new.placed.set((chunk, pack)).map_err(|_| Error::bug("a chunk was moved twice"))?;
            moved.bytes_appended += bytes.len() as u64;
            *(if record.as_stored { &mut moved.chunks_moved } else { &mut moved.chunks_recompressed }) += 1;
        }
        self.progress.advance(batch.progress_bytes);
        Ok(())
    }

    /// A chunk's place, for people.
    fn place(&self, pack: DataPack, offset: u64) -> String {
        let name = PackName { run: pack.run, seq: pack.seq, kind: PackKind::Data };
        name.object(self.cluster).map_or_else(|error| error.to_string(), |object| format!("{object} at {offset}"))
    }
}

/// Where the feeding thread sends what is to be done.
struct Feed<'a, J> {
    tasks: Sender<Task<'a, J>>,
    steps: Sender<Underway>,
}

/// Has the layers loaded some jobs ahead, cuts them in order, and sends the batches to the workers.
fn feed<'a, J>(mut cutter: Cutter<'_>, jobs: &'a [J], workers: usize, feed: &Feed<'a, J>) -> Result<()> {
    let mut to_load = jobs.iter();
    let mut loading = VecDeque::new();
    for job in 0..jobs.len() {
        while loading.len() < 2 * workers
            && let Some(next) = to_load.next()
        {
            let (answer, layer) = bounded(1);
            loading.push_back(layer);
            let _ = feed.tasks.send(Task::Load(next, answer));
        }
        let Some(Ok(layer)) = loading.pop_front().map(|layer| layer.recv()) else { return Ok(()) };
        cutter.take(job, layer?)?;
        if !feed.send(&mut cutter) {
            return Ok(());
        }
    }
    cutter.finish();
    feed.send(&mut cutter);
    Ok(())
}

impl<J> Feed<'_, J> {
    /// Sends the steps that are cut; whether there is still somebody to take them. Who is gone has the reason.
    fn send(&self, cutter: &mut Cutter<'_>) -> bool {
        cutter.steps().all(|Step { batch, done }| {
            let (answer, moved) = bounded(1);
            self.steps.send(Underway { moved, done }).is_ok() && self.tasks.send(Task::Move(batch, answer)).is_ok()
        })
    }
}

/// Does tasks until there are none; an answer that nobody waits for any more is no loss.
fn work<J>(shared: &Shared<'_>, tasks: &Receiver<Task<'_, J>>, load: Load<'_, J>) -> Result<()> {
    let mut worker = Worker::new(shared)?;
    for task in tasks {
        match task {
            Task::Load(job, answer) => drop(answer.send(load(job))),
            Task::Move(batch, answer) => drop(answer.send(worker.work(batch))),
        }
    }
    Ok(())
}
