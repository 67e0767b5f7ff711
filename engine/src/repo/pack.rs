//! Packs: many records in one object (`format.md`, Packs).
//!
//! Writing: [`Packer::append`] gives a record its place at once, under a lock, and hands its bytes over a bounded channel to the
//! thread that streams the pack into the store; so whoever appends can write down the place without waiting for the disk, and waits
//! when the store is slower. When a pack is full the next one begins while the full one is still being made durable; at most
//! [`PACKS_IN_FLIGHT`] are on their way.
//!
//! Resuming: an interrupted run whose work is repeated record by record ([`Packer::resuming`]) finds the packs that it did finish under their
//! names. Their bytes are not stored again. Only the table of such a pack is put together, and compared with the stored one when the pack
//! is closed: it has a checksum of every record, so equal tables are equal packs, if the records are what their checksums say, which is looked at, too. A backup that was here before and was expired may have left packs of that name
//! that others refer to: the packer is told which, and passes over their numbers.
//!
//! What goes wrong: a store that fails, noticed by its thread and reported to whoever appends next or finishes; a run that stops
//! in the middle, whose open pack is never given a name, because its end was never announced to the store; an interrupted run that
//! stored something else, noticed when the pack is closed, before anything refers to it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{self, BufRead, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::names::{BackupId, ClusterName, PackKind, PackName};
use crate::chunk::{first16, hash16};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ObjectName, Store};

const HEADER_LEN: u64 = 16;
const TABLE_ENTRY_LEN: usize = 20;
const FOOTER_LEN: usize = 40;
const MAGIC: &[u8; 8] = b"pgstPACK";
const END_MAGIC: &[u8; 8] = b"pgstDONE";
const VERSION: u16 = 1;

/// Bytes after which a pack is full.
const PACK_LEN: u64 = 128 << 20;
/// Chunks after which a pack is full: a gigabyte of blocks, however well they compress. Who reads packs has memory for all blocks of a few.
const PACK_CHUNKS: u64 = 4096;
/// Metadata records after which a pack is full: small files have small ones, and whoever writes a pack has its table in memory.
const PACK_RECORDS: u64 = 1 << 19;
/// Metadata records from so many bytes on are hashed before the lock is taken.
const LARGE_LEN: usize = 16 << 10;
/// Packs that are being written or made durable at once, for each kind.
const PACKS_IN_FLIGHT: usize = 3;
/// Bytes that are handed to a pack's thread at once: small chunks are not worth a wake-up each.
const BUFFER_LEN: usize = 1 << 20;
/// Buffers waiting for a pack's thread.
const BUFFERS_IN_FLIGHT: usize = 4;

/// Bytes of a pack at most, as far as a reader goes: what is in it, its last records, and its table.
pub(crate) const MAX_PACK_LEN: u64 = 1 << 30;
/// Bytes of a record at most: what a reader is ready to take.
const MAX_RECORD_LEN: u32 = 32 << 20;
/// Bytes of a pack's table at most.
const MAX_TABLE_LEN: u64 = 128 << 20;

/// The checksum at the end of a metadata record.
pub(crate) const RECORD_CHECK_LEN: usize = 16;

/// A pack as a manifest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackInfo {
    /// Its name.
    pub name: PackName,
    /// The object's length in bytes.
    pub len: u64,
}

/// The packs with their lengths, of which somebody must know each.
///
/// # Errors
/// `Corrupt` if nobody does: a file table that was inherited refers to a pack that its manifest does not name.
pub(crate) fn with_lengths(
    cluster: &ClusterName,
    packs: &[PackName],
    known: impl Fn(&PackName) -> Option<u64>,
) -> Result<Vec<PackInfo>> {
    let with_len = |name: &PackName| match known(name) {
        Some(len) => Ok(PackInfo { name: *name, len }),
        None => {
            let object = name.object(cluster)?;
            Err(Error::corrupt(object.as_str(), "a file table refers to a pack that its manifest does not name"))
        }
    };
    packs.iter().map(with_len).collect()
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The pack.
    pub pack: PackName,
    /// Offset of its first byte in the pack.
    pub offset: u64,
}

/// Writes the packs of one kind of one run.
pub struct Packer {
    store: Arc<dyn Store>,
    cluster: ClusterName,
    run: BackupId,
    kind: PackKind,
    pack_len: u64,
    /// The packs that an interrupted run stored, with their lengths.
    there: HashMap<ObjectName, u64>,
    /// Packs that bear the run's name and are not its own.
    taken: BTreeSet<ObjectName>,
    state: Mutex<State>,
}

/// The packs of a run that is done.
#[derive(Debug, PartialEq, Eq)]
pub struct Finished {
    /// All of them, in order; those that an interrupted run stored, too.
    pub packs: Vec<PackInfo>,
    /// Bytes that this run stored itself.
    pub bytes_written: u64,
}

#[derive(Default)]
struct State {
    next_seq: u32,
    open: Option<OpenPack>,
    closing: VecDeque<Closing>,
    finished: Vec<PackInfo>,
    bytes_written: u64,
}

struct OpenPack {
    name: PackName,
    object: ObjectName,
    offset: u64,
    table: Vec<u8>,
    count: u32,
    sink: Sink,
}

/// Where the bytes of an open pack go.
enum Sink {
    /// To the thread that stores them.
    Thread { buffer: Vec<u8>, sender: Sender<Message>, thread: JoinHandle<Result<u64>> },
    /// Nowhere: the object is in the store, with so many bytes.
    There { store: Arc<dyn Store>, len: u64 },
}

/// A pack that takes no more records.
enum Closing {
    /// It is being made durable.
    Stored { name: PackName, thread: JoinHandle<Result<u64>> },
    /// It was durable before, and is what it should be.
    There(PackInfo),
}

enum Message {
    Bytes(Vec<u8>),
    End,
}

impl Packer {
    /// A packer for the run `run`.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterName, run: BackupId, kind: PackKind) -> Self {
        let (there, taken) = (HashMap::new(), BTreeSet::new());
        Self { store, cluster, run, kind, pack_len: PACK_LEN, there, taken, state: Mutex::default() }
    }

    /// A packer for the run `run`, which was interrupted and is repeated record by record: packs that are in the store are not stored again. Those
    /// that are `taken` are something else's: it passes over their numbers.
    ///
    /// # Errors
    /// When the store cannot list.
    pub(crate) fn resuming(
        store: Arc<dyn Store>,
        cluster: ClusterName,
        run: BackupId,
        kind: PackKind,
        taken: BTreeSet<ObjectName>,
    ) -> Result<Self> {
        let directory = super::names::packs_of(&cluster, run);
        store.settle(&directory)?;
        let objects = store.list(&directory)?;
        let mut packer = Self::new(store, cluster, run, kind);
        packer.there = objects.into_iter().map(|object| (object.name, object.len)).collect();
        packer.taken = taken;
        Ok(packer)
    }

    /// The same with packs that are full after `pack_len` bytes.
    #[cfg(test)]
    pub(crate) fn with_pack_len(mut self, pack_len: u64) -> Self {
        self.pack_len = pack_len;
        self
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// What the store says.
    pub fn append(&self, record: &[u8]) -> Result<Place> {
        // Outside of the lock, which all workers want.
        self.append_hashed(record, hash16(record))
    }

    /// Appends a chunk whose `H16` is known.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn append_hashed(&self, record: &[u8], hash: [u8; 16]) -> Result<Place> {
        let mut state = self.lock();
        self.make_room(&mut state)?;
        state.append(record, hash)
    }

    /// Appends metadata records, one right after the other in the same pack, and returns the place of the first; each grows by its
    /// checksum of 16 bytes.
    ///
    /// # Errors
    /// What the store says; `Bug` if there are no records.
    pub fn append_checked(&self, bodies: Vec<Vec<u8>>) -> Result<Place> {
        if bodies.iter().map(Vec::len).sum::<usize>() < LARGE_LEN {
            let mut state = self.lock();
            let next = self.next_place(&mut state)?;
            return state.append_all(&Checked::at(next, bodies));
        }
        // Its place is part of a record's checksum. It is guessed, and nearly always right.
        let guess = self.next_place(&mut self.lock())?;
        let records = Checked::at(guess, bodies);
        let mut state = self.lock();
        let next = self.next_place(&mut state)?;
        let records = if records.next == next { records } else { Checked::at(next, records.into_bodies()) };
        state.append_all(&records)
    }

    /// Where the next record goes.
    fn next_place(&self, state: &mut State) -> Result<(ObjectName, u64)> {
        self.make_room(state)?;
        let pack = state.open.as_ref().ok_or_else(|| Error::bug("no open pack"))?;
        Ok((pack.object.clone(), pack.offset))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that a pack with room is open.
    fn make_room(&self, state: &mut State) -> Result<()> {
        // The records that go together once there is room are few.
        let max_count = if self.kind == PackKind::Data { PACK_CHUNKS } else { PACK_RECORDS };
        let is_full = |pack: &OpenPack| pack.offset >= self.pack_len || u64::from(pack.count) >= max_count;
        if state.open.as_ref().is_some_and(is_full) {
            state.close_pack()?;
        }
        while state.open.is_none() {
            let name = PackName { run: self.run, seq: state.next_seq, kind: self.kind };
            let object = name.object(&self.cluster)?;
            state.next_seq += 1;
            if !self.taken.contains(&object) {
                state.open = Some(self.open_pack(name, object)?);
            }
        }
        Ok(())
    }

    fn open_pack(&self, name: PackName, object: ObjectName) -> Result<OpenPack> {
        let sink = match self.there.get(&object) {
            Some(len) => Sink::There { store: Arc::clone(&self.store), len: *len },
            None => self.open_sink(name.seq, object.clone())?,
        };
        Ok(OpenPack { name, object, offset: HEADER_LEN, table: Vec::new(), count: 0, sink })
    }

    fn open_sink(&self, seq: u32, object: ObjectName) -> Result<Sink> {
        let (sender, receiver) = bounded(BUFFERS_IN_FLIGHT);
        let store = Arc::clone(&self.store);
        let thread = std::thread::Builder::new()
            .name(format!("pack {seq}"))
            .spawn(move || store.put_new(&object, &mut Incoming { receiver, bytes: Vec::new(), read: 0, ended: false }))
            .map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start a thread").because(e))?;
        Ok(Sink::Thread { buffer: header(self.kind).to_vec(), sender, thread })
    }

    /// Closes the open pack: what is appended from now on goes to a new one, and this one is made durable meanwhile.
    ///
    /// # Errors
    /// What the store said about an earlier one.
    pub fn close(&self) -> Result<()> {
        self.lock().close_pack()
    }

    /// Closes the last pack and waits until all are durable.
    ///
    /// # Errors
    /// What the store said about any of them.
    pub fn finish(self) -> Result<Vec<PackInfo>> {
        self.finish_resumed().map(|finished| finished.packs)
    }

    /// As [`Packer::finish`], and says how much of it this run stored.
    ///
    /// # Errors
    /// What the store said about any of them; `Conflict` if an interrupted run stored another pack.
    pub fn finish_resumed(self) -> Result<Finished> {
        let mut state = self.lock();
        state.close_pack()?;
        state.wait_until_closing(0)?;
        Ok(Finished { packs: std::mem::take(&mut state.finished), bytes_written: state.bytes_written })
    }
}

impl Drop for Packer {
    /// Waits for the threads of a run that was given up, so that no temporary file outlives it.
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.lock());
        let open = state.open.take().and_then(|pack| match pack.sink {
            Sink::Thread { thread, .. } => Some(thread),
            Sink::There { .. } => None,
        });
        let closing = state.closing.into_iter().filter_map(|closing| match closing {
            Closing::Stored { thread, .. } => Some(thread),
            Closing::There(_) => None,
        });
        for thread in closing.chain(open) {
            // The run has its own error; that its packs ended badly is no news.
            let _ = thread.join();
        }
    }
}

/// Metadata records with their checksums, ready for a place.
struct Checked {
    /// The object, and the offset of the first record in it.
    next: (ObjectName, u64),
    /// With the `H16` of each for the pack's table.
    records: Vec<(Vec<u8>, [u8; 16])>,
}

impl Checked {
    fn at(next: (ObjectName, u64), bodies: Vec<Vec<u8>>) -> Self {
        let (object, mut offset) = (&next.0, next.1);
        let check = |mut body: Vec<u8>| {
            body.extend_from_slice(&record_check(object, offset, &body));
            offset += body.len() as u64;
            let hash = hash16(&body);
            (body, hash)
        };
        let records = bodies.into_iter().map(check).collect();
        Self { next, records }
    }

    fn into_bodies(self) -> Vec<Vec<u8>> {
        let body = |(mut record, _): (Vec<u8>, [u8; 16])| {
            record.truncate(record.len() - RECORD_CHECK_LEN);
            record
        };
        self.records.into_iter().map(body).collect()
    }
}

impl State {
    fn append_all(&mut self, checked: &Checked) -> Result<Place> {
        let mut first = None;
        for (record, hash) in &checked.records {
            let place = self.append(record, *hash)?;
            first.get_or_insert(place);
        }
        first.ok_or_else(|| Error::bug("no records to append"))
    }

    fn append(&mut self, record: &[u8], hash: [u8; 16]) -> Result<Place> {
        let Some(pack) = &mut self.open else { return Err(Error::bug("no open pack")) };
        let place = Place { pack: pack.name, offset: pack.offset };
        let len = u32::try_from(record.len()).map_err(|_| Error::bug("a record of 4 GiB or more"))?;
        pack.table.extend_from_slice(&len.to_le_bytes());
        pack.table.extend_from_slice(&hash);
        pack.count += 1;
        pack.offset += u64::from(len);
        if pack.sink.take(record) { Ok(place) } else { Err(self.why_the_writer_stopped()) }
    }

    fn close_pack(&mut self) -> Result<()> {
        let Some(pack) = self.open.take() else { return Ok(()) };
        let end = trailer(&pack.object, pack.name.kind, &pack.table, pack.offset, pack.count);
        if let Sink::There { store, len } = &pack.sink {
            check_resumed(&**store, &pack, *len, &end)?;
        }
        let (closing, told) = match pack.sink {
            Sink::Thread { buffer, sender, thread } => {
                let rest = [buffer, end].concat();
                let told = sender.send(Message::Bytes(rest)).and_then(|()| sender.send(Message::End));
                (Closing::Stored { name: pack.name, thread }, told.is_ok())
            }
            Sink::There { len, .. } => (Closing::There(PackInfo { name: pack.name, len }), true),
        };
        self.closing.push_back(closing);
        if told { self.wait_until_closing(PACKS_IN_FLIGHT - 1) } else { Err(self.why_the_writer_stopped()) }
    }

    /// Waits until no more than `count` packs are being made durable.
    fn wait_until_closing(&mut self, count: usize) -> Result<()> {
        while self.closing.len() > count {
            let Some(closing) = self.closing.pop_front() else { break };
            self.finish_pack(closing)?;
        }
        Ok(())
    }

    fn finish_pack(&mut self, closing: Closing) -> Result<()> {
        let pack = match closing {
            Closing::There(pack) => pack,
            Closing::Stored { name, thread } => {
                let len = join(thread)?;
                self.bytes_written += len;
                PackInfo { name, len }
            }
        };
        self.finished.push(pack);
        Ok(())
    }

    /// The error of the writer that no longer takes records: the newest one.
    fn why_the_writer_stopped(&mut self) -> Error {
        let open = self.open.take().and_then(|pack| match pack.sink {
            Sink::Thread { thread, .. } => Some(thread),
            Sink::There { .. } => None,
        });
        let thread = open.or_else(|| match self.closing.pop_back() {
            Some(Closing::Stored { thread, .. }) => Some(thread),
            _ => None,
        });
        let error = thread.and_then(|thread| join(thread).err());
        error.unwrap_or_else(|| Error::new(ErrorKind::Unavailable, "an earlier write to the repository failed"))
    }
}

impl Sink {
    /// Takes a record; whether whoever stores it still does.
    fn take(&mut self, record: &[u8]) -> bool {
        let Sink::Thread { buffer, sender, .. } = self else { return true };
        buffer.extend_from_slice(record);
        if buffer.len() < BUFFER_LEN {
            return true;
        }
        let full = std::mem::replace(buffer, Vec::with_capacity(BUFFER_LEN + BUFFER_LEN / 4));
        sender.send(Message::Bytes(full)).is_ok()
    }
}

fn join(thread: JoinHandle<Result<u64>>) -> Result<u64> {
    thread.join().map_err(|_| Error::bug("the thread that writes a pack panicked"))?
}

/// Compares the end of a pack that is in the store with the one that it should have, and then its records with their checksums.
fn check_resumed(store: &dyn Store, pack: &OpenPack, len: u64, end: &[u8]) -> Result<()> {
    let object = &pack.object;
    let mut found = vec![0; end.len()];
    let mut same = len == pack.offset + end.len() as u64 && {
        store.get_range(object, pack.offset, &mut found)?;
        found == end
    };
    if same {
        check_pack(store, object, pack.name.kind, len, |record| {
            same &= record.sound;
            Ok(())
        })?;
    }
    if same {
        return Ok(());
    }
    let conflict = Error::new(ErrorKind::Conflict, "an interrupted run left another pack there").at(object.as_str());
    Err(conflict.hint("remove the packs of that run if no backup needs them, and run the command again"))
}

/// What a pack's thread streams into the store; it ends well only after [`Message::End`].
struct Incoming {
    receiver: Receiver<Message>,
    bytes: Vec<u8>,
    read: usize,
    ended: bool,
}

impl BufRead for Incoming {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.read == self.bytes.len() && !self.ended {
            match self.receiver.recv() {
                Ok(Message::Bytes(bytes)) => (self.bytes, self.read) = (bytes, 0),
                Ok(Message::End) => (self.bytes, self.read, self.ended) = (Vec::new(), 0, true),
                Err(_) => return Err(io::Error::other("the run was given up")),
            }
        }
        Ok(&self.bytes[self.read..])
    }

    fn consume(&mut self, amount: usize) {
        self.read += amount;
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.fill_buf()?;
        let count = bytes.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

pub(super) fn header(kind: PackKind) -> [u8; HEADER_LEN as usize] {
    let mut header = [0; HEADER_LEN as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[10..12].copy_from_slice(&u16::from(u8::from(kind)).to_le_bytes());
    header
}

/// The table and the footer of a pack whose records end at `table_offset`.
pub(super) fn trailer(object: &ObjectName, kind: PackKind, table: &[u8], table_offset: u64, count: u32) -> Vec<u8> {
    let mut end = Vec::with_capacity(table.len() + FOOTER_LEN);
    end.extend_from_slice(table);
    end.extend_from_slice(&table_offset.to_le_bytes());
    end.extend_from_slice(&count.to_le_bytes());
    end.extend_from_slice(&[0; 4]);
    let check = trailer_check(object, &header(kind), &end);
    end.extend_from_slice(&check);
    end.extend_from_slice(END_MAGIC);
    end
}

fn trailer_check(object: &ObjectName, header: &[u8], end: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(object.as_str().as_bytes()).update(header).update(end);
    first16(&hasher.finalize())
}

fn record_check(object: &ObjectName, offset: u64, body: &[u8]) -> [u8; RECORD_CHECK_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(object.as_str().as_bytes()).update(&[0]).update(&offset.to_le_bytes()).update(body);
    first16(&hasher.finalize())
}

/// Reads a metadata record of `len` bytes, checksum included, and returns its body.
///
/// # Errors
/// `Missing` if the pack is gone, `Corrupt` if the record is not what was written there.
pub(crate) fn read_record(store: &dyn Store, object: &ObjectName, offset: u64, len: u32) -> Result<Vec<u8>> {
    if len > MAX_RECORD_LEN {
        return Err(Error::corrupt(format!("{object} at {offset}"), format!("a metadata record of {len} bytes")));
    }
    let len = len as usize;
    let mut record = vec![0; len];
    store.get_range(object, offset, &mut record)?;
    let body_len = len.checked_sub(RECORD_CHECK_LEN);
    let sound = body_len.is_some_and(|body_len| {
        let check = record.split_off(body_len);
        check == record_check(object, offset, &record)
    });
    if sound { Ok(record) } else { Err(Error::corrupt(format!("{object} at {offset}"), "the checksum does not match")) }
}

/// One record that [`check_pack`] read.
pub(crate) struct CheckedRecord<'a> {
    /// Its offset in the pack.
    pub offset: u64,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Whether they match the pack's table.
    pub sound: bool,
}

/// Reads a whole pack of `len` bytes and checks every byte of it; `each` is given the records, the damaged ones too.
///
/// # Errors
/// `Corrupt` if the frame around the records is damaged; then nothing can be said about them.
pub(crate) fn check_pack(
    store: &dyn Store,
    object: &ObjectName,
    kind: PackKind,
    len: u64,
    mut each: impl FnMut(CheckedRecord<'_>) -> Result<()>,
) -> Result<()> {
    let table = PackTable::read(store, object, kind, len)?;
    table.groups().iter().try_for_each(|group| table.check(store, object, group, &mut each))
}

/// Bytes of records that are read at once; one may be longer.
const GROUP_LEN: u64 = 1 << 20;
/// Records that are read at once.
const GROUP_RECORDS: usize = 64;

/// Neighbouring records of a pack.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Which ones.
    records: Range<usize>,
    /// Offset of the first.
    pub offset: u64,
    /// Bytes of all.
    pub len: u64,
}

/// What a pack's own table says of its records.
#[derive(Debug)]
pub(crate) struct PackTable {
    offsets: Vec<u64>,
    entries: Vec<u8>,
}

impl PackTable {
    /// Reads and proves the table of a pack of `len` bytes.
    ///
    /// # Errors
    /// `Missing`, or `Corrupt` if the frame around the records is damaged.
    pub fn read(store: &dyn Store, object: &ObjectName, kind: PackKind, len: u64) -> Result<Self> {
        let entries = read_table(store, object, kind, len)?;
        let mut next = HEADER_LEN;
        let offsets = entries.chunks_exact(TABLE_ENTRY_LEN).map(|entry| {
            let offset = next;
            next += u64::from(record_len(entry));
            offset
        });
        Ok(Self { offsets: offsets.collect(), entries })
    }

    /// Length and `H16` of the record that begins at `offset`.
    pub fn record(&self, offset: u64) -> Option<(u32, &[u8])> {
        // Records of no bytes share their offset with the next one, which comes last.
        let index = self.offsets.partition_point(|begin| *begin <= offset).checked_sub(1)?;
        let entry = self.entries.chunks_exact(TABLE_ENTRY_LEN).nth(index)?;
        (self.offsets[index] == offset).then(|| (record_len(entry), &entry[4..]))
    }

    /// Records that are read at once, each of them in one group.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (index, (offset, entry)) in self.offsets.iter().zip(self.entries.chunks_exact(TABLE_ENTRY_LEN)).enumerate()
        {
            let len = u64::from(record_len(entry));
            match groups.last_mut() {
                Some(group) if group.len + len <= GROUP_LEN && group.records.len() < GROUP_RECORDS => {
                    group.records.end = index + 1;
                    group.len += len;
                }
                _ => groups.push(Group { records: index..index + 1, offset: *offset, len }),
            }
        }
        groups
    }

    /// Reads a group of records, and gives each of them to `each`, the damaged ones too.
    ///
    /// # Errors
    /// Those of the store and of `each`.
    pub fn check(
        &self,
        store: &dyn Store,
        object: &ObjectName,
        group: &Group,
        mut each: impl FnMut(CheckedRecord<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(group.len).map_err(|_| Error::bug("a group of 4 GiB"))?];
        store.get_range(object, group.offset, &mut bytes)?;
        let entries = self.entries.chunks_exact(TABLE_ENTRY_LEN).skip(group.records.start).take(group.records.len());
        let mut rest = bytes.as_slice();
        for (entry, offset) in entries.zip(&self.offsets[group.records.clone()]) {
            let (record, after) = rest.split_at(record_len(entry) as usize);
            each(CheckedRecord { offset: *offset, bytes: record, sound: hash16(record) == entry[4..] })?;
            rest = after;
        }
        Ok(())
    }

    /// Number of records.
    pub fn record_count(&self) -> usize {
        self.offsets.len()
    }

    /// Bytes that were read for it.
    pub fn read_len(&self) -> u64 {
        HEADER_LEN + self.entries.len() as u64 + FOOTER_LEN as u64
    }
}

fn record_len(entry: &[u8]) -> u32 {
    u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])
}

/// Reads and proves the frame of a pack; the records are known to fill the space before the table.
fn read_table(store: &dyn Store, object: &ObjectName, kind: PackKind, len: u64) -> Result<Vec<u8>> {
    let damaged = |what: &str| Error::corrupt(object.as_str(), what.to_owned());
    let footer_offset = len.checked_sub(FOOTER_LEN as u64).filter(|offset| *offset >= HEADER_LEN);
    let footer_offset = footer_offset.ok_or_else(|| damaged("the pack is too short to be one"))?;
    let mut head = [0; HEADER_LEN as usize];
    store.get_range(object, 0, &mut head)?;
    let mut footer = [0; FOOTER_LEN];
    store.get_range(object, footer_offset, &mut footer)?;
    let table_offset = u64::from_le_bytes(footer[..8].try_into().unwrap_or_default());
    let in_place = (HEADER_LEN..=footer_offset).contains(&table_offset);
    let table_len = footer_offset.wrapping_sub(table_offset);
    let count = u64::from(u32::from_le_bytes(footer[8..12].try_into().unwrap_or_default()));
    let fits = count * TABLE_ENTRY_LEN as u64 == table_len && table_len <= MAX_TABLE_LEN;
    if !in_place || !fits || footer[32..] != *END_MAGIC {
        return Err(damaged("the pack's footer is damaged"));
    }
    let mut end = vec![0; table_len as usize];
    store.get_range(object, table_offset, &mut end)?;
    end.extend_from_slice(&footer[..16]);
    if trailer_check(object, &head, &end) != footer[16..32] {
        return Err(damaged("the pack's table does not match its checksum"));
    }
    if head != header(kind) {
        return Err(Error::new(ErrorKind::Unsupported, "the pack is of another version or kind").at(object.as_str()));
    }
    end.truncate(table_len as usize);
    let record_lens = end.chunks_exact(TABLE_ENTRY_LEN).map(record_len);
    if HEADER_LEN + record_lens.clone().map(u64::from).sum::<u64>() != table_offset {
        return Err(damaged("the pack's records do not fill it"));
    }
    if let Some(len) = record_lens.into_iter().find(|len| *len > MAX_RECORD_LEN) {
        return Err(damaged(&format!("a record of {len} bytes")));
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn id() -> BackupId {
        "20261122T160312Z-1a2b3c4d".parse().unwrap()
    }

    fn packed(records: &[&[u8]]) -> (MemoryStore, ObjectName, u64) {
        let store = MemoryStore::new();
        let cluster = ClusterName::default();
        let packer = Packer::new(Arc::new(store.clone()), cluster.clone(), id(), PackKind::Map);
        for record in records {
            packer.append_checked(vec![record.to_vec()]).unwrap();
        }
        let packs = packer.finish().unwrap();
        assert_eq!(packs.len(), 1);
        (store, packs[0].name.object(&cluster).unwrap(), packs[0].len)
    }

    fn is_sound(store: &MemoryStore, object: &ObjectName, len: u64) -> bool {
        let mut sound = true;
        let frame = check_pack(store, object, PackKind::Map, len, |record| {
            sound &= record.sound;
            Ok(())
        });
        frame.is_ok() && sound
    }

    #[test]
    fn records_read_back_from_the_places_they_were_given() {
        let store = MemoryStore::new();
        let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), id(), PackKind::Map);
        let first = packer.append_checked(vec![b"one".to_vec()]).unwrap();
        let second = packer.append_checked(vec![b"second".to_vec()]).unwrap();
        packer.finish().unwrap();
        let object = first.pack.object(&ClusterName::default()).unwrap();
        assert_eq!(read_record(&store, &object, first.offset, 19).unwrap(), b"one");
        assert_eq!(read_record(&store, &object, second.offset, 22).unwrap(), b"second");
        assert_eq!(read_record(&store, &object, second.offset, 21).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(read_record(&store, &object, second.offset, 3).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn metadata_records_of_all_lengths_from_several_threads_are_proved_where_they_are() {
        let store = MemoryStore::new();
        let packer =
            Packer::new(Arc::new(store.clone()), ClusterName::default(), id(), PackKind::Map).with_pack_len(100_000);
        let bodies = |seed: u8| vec![vec![seed; 100 * usize::from(seed % 3 * 90 + 1)], vec![seed; 7]];
        let append = |from: u8| -> Vec<(u8, Place)> {
            (from..from + 40).map(|seed| (seed, packer.append_checked(bodies(seed)).unwrap())).collect()
        };
        let append = &append;
        let places: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = [0, 40, 80, 120].map(|from| scope.spawn(move || append(from))).into();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert!(packer.finish().unwrap().len() > 1);
        for (seed, place) in places {
            let object = place.pack.object(&ClusterName::default()).unwrap();
            let mut offset = place.offset;
            for body in bodies(seed) {
                let len = (body.len() + RECORD_CHECK_LEN) as u32;
                assert_eq!(read_record(&store, &object, offset, len).unwrap(), body);
                offset += u64::from(len);
            }
        }
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_of_a_pack_is_found() {
        let (store, object, len) = packed(&[b"one", b"", b"three and some more"]);
        assert!(is_sound(&store, &object, len));
        let bytes = store.get(&object, len).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            store.tamper(&object, Some(damaged));
            assert!(!is_sound(&store, &object, len), "byte {at}");
            store.tamper(&object, Some(bytes[..at].to_vec()));
            assert!(!is_sound(&store, &object, at as u64), "cut at {at}");
        }
    }

    #[test]
    fn a_pack_under_another_name_is_found() {
        let (store, object, len) = packed(&[b"one"]);
        let other = ObjectName::new(object.as_str().replace("000000", "000001")).unwrap();
        store.tamper(&other, Some(store.get(&object, len).unwrap()));
        assert!(!is_sound(&store, &other, len));
        assert!(read_record(&store, &other, HEADER_LEN, 19).is_err());
    }

    #[test]
    fn a_run_that_is_given_up_leaves_no_pack() {
        let store = MemoryStore::new();
        let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), id(), PackKind::Data);
        packer.append(&[1; 1000]).unwrap();
        drop(packer);
        assert_eq!(store.list("").unwrap(), []);
    }

    /// Five records in packs of two.
    fn run_of_five(packer: Packer, last: &[u8]) -> Result<Finished> {
        let packer = packer.with_pack_len(HEADER_LEN + 150);
        for record in [&[1; 100], &[2; 100], &[3; 100], &[4; 100], last] {
            packer.append(record)?;
        }
        packer.finish_resumed()
    }

    fn resuming(store: &MemoryStore) -> Packer {
        Packer::resuming(Arc::new(store.clone()), ClusterName::default(), id(), PackKind::Data, BTreeSet::new())
            .unwrap()
    }

    #[test]
    fn a_resumed_run_stores_only_the_packs_that_are_not_there_and_ends_as_if_never_interrupted() {
        let whole = MemoryStore::new();
        let all = run_of_five(resuming(&whole), b"last").unwrap();
        assert_eq!(all.packs.len(), 3);
        assert_eq!(all.bytes_written, all.packs.iter().map(|pack| pack.len).sum::<u64>());
        let objects = whole.list("").unwrap();
        for there in 0..1 << objects.len() {
            let store = MemoryStore::new();
            for (index, object) in objects.iter().enumerate().filter(|(index, _)| there >> index & 1 == 1) {
                let bytes = whole.get(&object.name, object.len).unwrap();
                assert_eq!(store.put_new(&object.name, &mut bytes.as_slice()).unwrap(), all.packs[index].len);
            }
            let kept: u64 = store.list("").unwrap().iter().map(|object| object.len).sum();
            let resumed = run_of_five(resuming(&store), b"last").unwrap();
            assert_eq!(resumed.packs, all.packs);
            assert_eq!(resumed.bytes_written, all.bytes_written - kept);
            for object in &objects {
                assert_eq!(store.get(&object.name, object.len).unwrap(), whole.get(&object.name, object.len).unwrap());
            }
        }
    }

    #[test]
    fn a_pack_that_an_interrupted_run_wrote_otherwise_is_a_conflict() {
        for other in [&b"tsal"[..], b"another length", b""] {
            let store = MemoryStore::new();
            run_of_five(resuming(&store), other).unwrap();
            let error = run_of_five(resuming(&store), b"last").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            assert!(error.place().unwrap().ends_with("000002.data"), "{error}");
        }
    }

    #[test]
    fn a_table_knows_its_records_by_their_offsets() {
        let store = MemoryStore::new();
        let packer = Packer::new(Arc::new(store.clone()), ClusterName::default(), id(), PackKind::Data);
        let records = [&b"one"[..], b"", b"second"];
        let places = records.map(|record| packer.append(record).unwrap());
        let pack = packer.finish().unwrap()[0];
        let object = pack.name.object(&ClusterName::default()).unwrap();
        let table = PackTable::read(&store, &object, PackKind::Data, pack.len).unwrap();
        assert_eq!(table.record_count(), 3);
        assert_eq!(table.record(places[0].offset), Some((3, &hash16(b"one")[..])));
        assert_eq!(table.record(places[2].offset), Some((6, &hash16(b"second")[..])));
        assert_eq!(table.record(places[0].offset + 1), None);
        assert_eq!(table.record(0), None);
        assert_eq!(table.record(1000), None);
    }

    #[test]
    fn a_store_that_fails_is_reported_to_whoever_appends() {
        let store = MemoryStore::new();
        let name = PackName { run: id(), seq: 0, kind: PackKind::Data };
        store.put_new(&name.object(&ClusterName::default()).unwrap(), &mut &b"taken"[..]).unwrap();
        let packer = Packer::new(Arc::new(store), ClusterName::default(), id(), PackKind::Data);
        let error = std::iter::repeat_with(|| packer.append(&[0; 1 << 16])).find_map(Result::err).unwrap();
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }
}
