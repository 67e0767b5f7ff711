//! Packs: many records in one object (`format.md`, Packs).
//!
//! Writing: [`Packer::append`] gives a record its place at once, under a lock, and hands its bytes over a bounded channel to the
//! thread that streams the pack into the store; so whoever appends can write down the place without waiting for the disk, and waits
//! when the store is slower. When a pack is full the next one begins while the full one is still being made durable; at most
//! [`PACKS_IN_FLIGHT`] are on their way.
//!
//! What goes wrong: a store that fails, noticed by its thread and reported to whoever appends next or finishes; a run that stops
//! in the middle, whose open pack is never given a name, because its end was never announced to the store.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
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
/// Packs that are being written or made durable at once, for each kind.
const PACKS_IN_FLIGHT: usize = 3;
/// Bytes that are handed to a pack's thread at once: small chunks are not worth a wake-up each.
const BUFFER_LEN: usize = 1 << 20;
/// Buffers waiting for a pack's thread.
const BUFFERS_IN_FLIGHT: usize = 4;

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
/// `Bug` if nobody does.
pub(crate) fn with_lengths(packs: &[PackName], known: impl Fn(&PackName) -> Option<u64>) -> Result<Vec<PackInfo>> {
    let with_len = |name: &PackName| {
        let len = known(name).ok_or_else(|| Error::bug("a pack that nobody wrote"))?;
        Ok(PackInfo { name: *name, len })
    };
    packs.iter().map(with_len).collect()
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_seq: u32,
    open: Option<OpenPack>,
    closing: VecDeque<Writer>,
    finished: Vec<PackInfo>,
}

struct OpenPack {
    object: ObjectName,
    offset: u64,
    table: Vec<u8>,
    count: u32,
    buffer: Vec<u8>,
    sender: Sender<Message>,
    writer: Writer,
}

struct Writer {
    name: PackName,
    thread: JoinHandle<Result<u64>>,
}

enum Message {
    Bytes(Vec<u8>),
    End,
}

impl Packer {
    /// A packer for the run `run`.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterName, run: BackupId, kind: PackKind) -> Self {
        Self { store, cluster, run, kind, state: Mutex::default() }
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// What the store says.
    pub fn append(&self, record: &[u8]) -> Result<Place> {
        // Outside of the lock, which all workers want.
        let hash = hash16(record);
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
        let mut state = self.lock();
        self.make_room(&mut state)?;
        let mut first = None;
        for mut body in bodies {
            let check = state.open.as_ref().map(|pack| record_check(&pack.object, pack.offset, &body));
            body.extend_from_slice(&check.unwrap_or_default());
            let place = state.append(&body, hash16(&body))?;
            first.get_or_insert(place);
        }
        first.ok_or_else(|| Error::bug("no records to append"))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that a pack with room is open.
    fn make_room(&self, state: &mut State) -> Result<()> {
        if state.open.as_ref().is_some_and(|pack| pack.offset >= PACK_LEN) {
            state.close_pack()?;
        }
        if state.open.is_none() {
            state.open = Some(self.open_pack(state.next_seq)?);
            state.next_seq += 1;
        }
        Ok(())
    }

    fn open_pack(&self, seq: u32) -> Result<OpenPack> {
        let name = PackName { run: self.run, seq, kind: self.kind };
        let object = name.object(&self.cluster)?;
        let (sender, receiver) = bounded(BUFFERS_IN_FLIGHT);
        let (store, target) = (Arc::clone(&self.store), object.clone());
        let thread = std::thread::Builder::new()
            .name(format!("pack {seq}"))
            .spawn(move || store.put_new(&target, &mut Incoming { receiver, bytes: Vec::new(), read: 0, ended: false }))
            .map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start a thread").because(e))?;
        let writer = Writer { name, thread };
        let buffer = header(self.kind).to_vec();
        Ok(OpenPack { object, offset: HEADER_LEN, table: Vec::new(), count: 0, buffer, sender, writer })
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
        let mut state = self.lock();
        state.close_pack()?;
        while let Some(writer) = state.closing.pop_front() {
            let pack = writer.wait()?;
            state.finished.push(pack);
        }
        Ok(std::mem::take(&mut state.finished))
    }
}

impl Drop for Packer {
    /// Waits for the threads of a run that was given up, so that no temporary file outlives it.
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.lock());
        let open = state.open.take().map(|OpenPack { sender, writer, .. }| {
            drop(sender);
            writer
        });
        for writer in state.closing.into_iter().chain(open) {
            // The run has its own error; that its packs ended badly is no news.
            let _ = writer.thread.join();
        }
    }
}

impl State {
    fn append(&mut self, record: &[u8], hash: [u8; 16]) -> Result<Place> {
        let Some(pack) = &mut self.open else { return Err(Error::bug("no open pack")) };
        let place = Place { pack: pack.writer.name, offset: pack.offset };
        let len = u32::try_from(record.len()).map_err(|_| Error::bug("a record of 4 GiB or more"))?;
        pack.table.extend_from_slice(&len.to_le_bytes());
        pack.table.extend_from_slice(&hash);
        pack.count += 1;
        pack.offset += u64::from(len);
        pack.buffer.extend_from_slice(record);
        if pack.buffer.len() >= BUFFER_LEN {
            let full = std::mem::replace(&mut pack.buffer, Vec::with_capacity(BUFFER_LEN + BUFFER_LEN / 4));
            if pack.sender.send(Message::Bytes(full)).is_err() {
                return Err(self.why_the_writer_stopped());
            }
        }
        Ok(place)
    }

    fn close_pack(&mut self) -> Result<()> {
        let Some(pack) = self.open.take() else { return Ok(()) };
        let kind = pack.writer.name.kind;
        let end = trailer(&pack.object, kind, &pack.table, pack.offset, pack.count);
        let rest = [pack.buffer, end].concat();
        let told = pack.sender.send(Message::Bytes(rest)).and_then(|()| pack.sender.send(Message::End));
        self.closing.push_back(pack.writer);
        if told.is_err() {
            return Err(self.why_the_writer_stopped());
        }
        while self.closing.len() >= PACKS_IN_FLIGHT {
            let Some(writer) = self.closing.pop_front() else { break };
            self.finished.push(writer.wait()?);
        }
        Ok(())
    }

    /// The error of the writer that no longer takes records: the newest one.
    fn why_the_writer_stopped(&mut self) -> Error {
        let writer = self.open.take().map(|pack| pack.writer).or_else(|| self.closing.pop_back());
        let error = writer.and_then(|writer| writer.wait().err());
        error.unwrap_or_else(|| Error::new(ErrorKind::Unavailable, "an earlier write to the repository failed"))
    }
}

impl Writer {
    fn wait(self) -> Result<PackInfo> {
        let len = self.thread.join().map_err(|_| Error::bug("the thread that writes a pack panicked"))??;
        Ok(PackInfo { name: self.name, len })
    }
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

fn header(kind: PackKind) -> [u8; HEADER_LEN as usize] {
    let mut header = [0; HEADER_LEN as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[10..12].copy_from_slice(&u16::from(u8::from(kind)).to_le_bytes());
    header
}

/// The table and the footer of a pack whose records end at `table_offset`.
fn trailer(object: &ObjectName, kind: PackKind, table: &[u8], table_offset: u64, count: u32) -> Vec<u8> {
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
    let len = usize::try_from(len).map_err(|_| Error::bug("a record that does not fit into memory"))?;
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
    let table = read_table(store, object, kind, len)?;
    let mut offset = HEADER_LEN;
    let mut bytes = Vec::new();
    for entry in table.chunks_exact(TABLE_ENTRY_LEN) {
        let (record_len, check) = entry.split_at(4);
        let record_len = u32::from_le_bytes(record_len.try_into().unwrap_or_default());
        bytes.resize(record_len as usize, 0);
        store.get_range(object, offset, &mut bytes)?;
        each(CheckedRecord { offset, bytes: &bytes, sound: hash16(&bytes) == check })?;
        offset += u64::from(record_len);
    }
    Ok(())
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
    if !in_place || count * TABLE_ENTRY_LEN as u64 != table_len || footer[32..] != *END_MAGIC {
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
    let record_lens =
        end.chunks_exact(TABLE_ENTRY_LEN).map(|e| u64::from(u32::from_le_bytes([e[0], e[1], e[2], e[3]])));
    if HEADER_LEN + record_lens.sum::<u64>() != table_offset {
        return Err(damaged("the pack's records do not fill it"));
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
