//! A disk that forgets: what the local store's crash tests run it on.
//!
//! It has two states. The *live* one is what programs see. The *durable* one is what was made so: a file's bytes by syncing the file, the entries of a
//! directory by syncing the directory, neither by the other. A process that is killed leaves the live state to the next one. When the power goes, each
//! change since the last sync happened or didn't, whatever the order: each entry that was made or removed, so a rename may leave both names, or none; each sector
//! of a file, which may be there, or be as before, or be zeros below a length that survived. POSIX promises no more, and what
//! ext4 and xfs promise beyond that (renames in one piece, names in their order) is not relied upon.
//!
//! It counts the calls that change something, and stops at the one it is told: before it, or in the middle of a write. From then on every call
//! fails, until [`ModelDisk::after`] says what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::disk::{Disk, DiskFile, Kind, Owner};
use super::{LocalStore, Store};

/// Bytes that reach the platter together.
const SECTOR_LEN: usize = 512;
/// The root directory.
const ROOT: Node = 0;

/// What a file or directory is known by.
type Node = usize;

/// What ends a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The process is killed; the machine runs on.
    Killed,
    /// The power goes.
    PowerLoss,
}

/// Where a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// Before the call of this number, from 0.
    Call(u64),
    /// In the middle of the write of this number.
    Write(u64),
}

/// A file system in memory; clones share it.
#[derive(Clone)]
pub(crate) struct ModelDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Default)]
struct State {
    nodes: Vec<Body>,
    stop: Option<At>,
    calls: u64,
    writes: u64,
    off: bool,
    without_renames: bool,
}

#[derive(Clone)]
enum Body {
    File(Contents),
    Directory(Entries),
}

#[derive(Clone, Default)]
struct Contents {
    live: Arc<Vec<u8>>,
    durable: Arc<Vec<u8>>,
    locked: bool,
}

#[derive(Clone, Default)]
struct Entries {
    live: BTreeMap<OsString, Node>,
    durable: BTreeMap<OsString, Node>,
    /// What changed since the last sync: names that got or lost a node.
    since: Vec<(OsString, Option<Node>)>,
}

impl Entries {
    fn set(&mut self, name: &OsStr, node: Option<Node>) {
        self.since.push((name.to_owned(), node));
        apply(&mut self.live, name, node);
    }
}

fn apply(entries: &mut BTreeMap<OsString, Node>, name: &OsStr, node: Option<Node>) {
    match node {
        Some(node) => entries.insert(name.to_owned(), node),
        None => entries.remove(name),
    };
}

fn off() -> io::Error {
    io::Error::other("the machine is off")
}

fn error(kind: io::ErrorKind) -> io::Error {
    kind.into()
}

impl State {
    /// Counts a call that changes something.
    fn count(&mut self) -> io::Result<()> {
        self.running()?;
        self.off = self.stop == Some(At::Call(self.calls));
        self.calls += 1;
        self.running()
    }

    fn running(&self) -> io::Result<()> {
        if self.off { Err(off()) } else { Ok(()) }
    }

    fn find(&self, path: &Path) -> io::Result<Node> {
        self.running()?;
        let mut node = ROOT;
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            let Body::Directory(entries) = &self.nodes[node] else { return Err(error(io::ErrorKind::NotADirectory)) };
            node = *entries.live.get(name).ok_or_else(|| error(io::ErrorKind::NotFound))?;
        }
        Ok(node)
    }

    fn directory(&mut self, path: &Path) -> io::Result<&mut Entries> {
        let node = self.find(path)?;
        match &mut self.nodes[node] {
            Body::Directory(entries) => Ok(entries),
            Body::File(_) => Err(error(io::ErrorKind::NotADirectory)),
        }
    }

    fn file(&mut self, node: Node) -> io::Result<&mut Contents> {
        match &mut self.nodes[node] {
            Body::File(contents) => Ok(contents),
            Body::Directory(_) => Err(error(io::ErrorKind::IsADirectory)),
        }
    }

    /// The directory of `path`, in which its name must be free.
    fn free_place<'p>(&mut self, path: &'p Path) -> io::Result<(&mut Entries, &'p OsStr)> {
        let (parent, name) = split(path)?;
        let entries = self.directory(parent)?;
        if entries.live.contains_key(name) {
            return Err(error(io::ErrorKind::AlreadyExists));
        }
        Ok((entries, name))
    }

    fn add(&mut self, path: &Path, body: Body) -> io::Result<Node> {
        let node = self.nodes.len();
        let (entries, name) = self.free_place(path)?;
        entries.set(name, Some(node));
        self.nodes.push(body);
        Ok(node)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let (parent, name) = split(path)?;
        let entries = self.directory(parent)?;
        if !entries.live.contains_key(name) {
            return Err(error(io::ErrorKind::NotFound));
        }
        entries.set(name, None);
        Ok(())
    }

    /// What is left of the live state when the power goes; `chance` says of each change whether it happened.
    fn lose(&mut self, chance: &mut dyn FnMut() -> bool) {
        for body in &mut self.nodes {
            match body {
                Body::File(contents) => {
                    contents.durable = Arc::new(torn(&contents.durable, &contents.live, chance));
                    contents.live = Arc::clone(&contents.durable);
                }
                Body::Directory(entries) => {
                    for (name, node) in std::mem::take(&mut entries.since) {
                        if chance() {
                            apply(&mut entries.durable, &name, node);
                        }
                    }
                    entries.live = entries.durable.clone();
                }
            }
        }
    }
}

fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    path.parent().zip(path.file_name()).ok_or_else(|| error(io::ErrorKind::InvalidInput))
}

/// A file of which each sector that was not synced is there, or is not.
fn torn(durable: &Arc<Vec<u8>>, live: &Arc<Vec<u8>>, chance: &mut dyn FnMut() -> bool) -> Vec<u8> {
    let mut bytes = durable.to_vec();
    if Arc::ptr_eq(durable, live) {
        return bytes;
    }
    for (index, sector) in live.chunks(SECTOR_LEN).enumerate().skip(durable.len() / SECTOR_LEN) {
        let at = index * SECTOR_LEN;
        // The length grows with the last sector that is there: what is missing below it is zeros.
        if chance() {
            bytes.resize(bytes.len().max(at + sector.len()), 0);
            bytes[at..at + sector.len()].copy_from_slice(sector);
        }
    }
    bytes
}

impl ModelDisk {
    /// A disk with these directories, which are durable.
    pub fn with(directories: &[&str]) -> Self {
        let mut state = State { nodes: vec![Body::Directory(Entries::default())], ..State::default() };
        let mut root = Entries::default();
        for name in directories {
            root.live.insert(name.into(), state.nodes.len());
            state.nodes.push(Body::Directory(Entries::default()));
        }
        root.durable = root.live.clone();
        state.nodes[ROOT] = Body::Directory(root);
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The same, on which files cannot be renamed without replacing: names are given by links.
    pub fn without_renames(self) -> Self {
        self.lock().without_renames = true;
        self
    }

    /// Another disk with the same contents.
    pub fn copy(&self) -> Self {
        let state = State { stop: None, calls: 0, writes: 0, off: false, ..self.lock().clone() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// The local store in one of its directories.
    pub fn store(&self, directory: &str) -> Arc<dyn Store> {
        let store = LocalStore::open_on(Arc::new(self.clone()), &Path::new("/").join(directory));
        Arc::new(store.unwrap_or_else(|e| panic!("{directory}: {e}")))
    }

    /// Makes the run end there; calls are counted from now.
    pub fn stop_at(&self, at: At) {
        let mut state = self.lock();
        (state.stop, state.calls, state.writes) = (Some(at), 0, 0);
    }

    /// How many calls and how many writes were counted.
    pub fn counted(&self) -> (u64, u64) {
        let state = self.lock();
        (state.calls, state.writes)
    }

    /// Whether the run ended.
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// The disk as the next run finds it.
    pub fn after(&self, end: End, chance: &mut dyn FnMut() -> bool) -> Self {
        let disk = self.copy();
        let mut state = disk.lock();
        for body in &mut state.nodes {
            if let Body::File(contents) = body {
                contents.locked = false;
            }
        }
        if end == End::PowerLoss {
            state.lose(chance);
        }
        drop(state);
        disk
    }

    /// The paths of all files below a directory, relative to it.
    pub fn files(&self, directory: &str) -> BTreeSet<String> {
        let state = self.lock();
        let mut found = BTreeSet::new();
        let top = state.find(Path::new(directory)).unwrap_or_else(|e| panic!("{directory}: {e}"));
        let mut left = vec![(top, String::new())];
        while let Some((node, path)) = left.pop() {
            match &state.nodes[node] {
                Body::File(_) => drop(found.insert(path)),
                Body::Directory(entries) => left.extend(entries.live.iter().map(|(name, node)| {
                    let slash = if path.is_empty() { "" } else { "/" };
                    (*node, format!("{path}{slash}{}", name.display()))
                })),
            }
        }
        found
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self, node: Node, holds_lock: bool) -> Box<dyn DiskFile> {
        Box::new(ModelFile { disk: self.clone(), node, holds_lock })
    }
}

impl fmt::Debug for ModelDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a model of a disk")
    }
}

impl Disk for ModelDisk {
    fn owner(&self, path: &Path) -> io::Result<Option<Owner>> {
        let found = self.lock().directory(path).map(|_| Owner { uid: 0, gid: 0 });
        found.map(Some).or_else(|e| if e.kind() == io::ErrorKind::NotADirectory { Ok(None) } else { Err(e) })
    }

    fn is_directory(&self, path: &Path) -> bool {
        self.lock().directory(path).is_ok()
    }

    fn is_link(&self, _: &Path) -> bool {
        false
    }

    fn exists(&self, path: &Path) -> bool {
        self.lock().find(path).is_ok()
    }

    fn entries(&self, directory: &Path) -> io::Result<Vec<(OsString, Kind)>> {
        let mut state = self.lock();
        let entries = state.directory(directory)?.live.clone();
        let kind = |node: Node| match state.nodes[node] {
            Body::File(_) => Kind::File,
            Body::Directory(_) => Kind::Directory,
        };
        Ok(entries.into_iter().map(|(name, node)| (name, kind(node))).collect())
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        let mut state = self.lock();
        let node = state.find(path)?;
        Ok(state.file(node)?.live.len() as u64)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let node = self.lock().find(path)?;
        Ok(self.opened(node, false))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.lock();
        state.count()?;
        let node = state.add(path, Body::File(Contents { locked: true, ..Contents::default() }))?;
        Ok(self.opened(node, true))
    }

    fn claim(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        let mut state = self.lock();
        let node = state.find(path)?;
        let was_locked = std::mem::replace(&mut state.file(node)?.locked, true);
        Ok((!was_locked).then(|| self.opened(node, true)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.without_renames {
            return Err(Errno::INVAL.into());
        }
        state.count()?;
        let node = state.find(from)?;
        let (entries, name) = state.free_place(to)?;
        entries.set(name, Some(node));
        state.remove(from)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.count()?;
        let node = state.find(from)?;
        let (entries, name) = state.free_place(to)?;
        entries.set(name, Some(node));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.count()?;
        state.remove(path)
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.count()?;
        state.add(path, Body::Directory(Entries::default())).map(drop)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.directory(path)?.live.is_empty() {
            return Err(error(io::ErrorKind::DirectoryNotEmpty));
        }
        state.count()?;
        state.remove(path)
    }

    fn give_directory(&self, _: &Path, _: Owner) -> io::Result<()> {
        self.lock().running()
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.count()?;
        let entries = state.directory(path)?;
        entries.durable = entries.live.clone();
        entries.since.clear();
        Ok(())
    }
}

/// An open file of the model.
#[derive(Debug)]
struct ModelFile {
    disk: ModelDisk,
    node: Node,
    holds_lock: bool,
}

impl DiskFile for ModelFile {
    fn len(&self) -> io::Result<u64> {
        let mut state = self.disk.lock();
        state.running()?;
        Ok(state.file(self.node)?.live.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.running()?;
        let bytes = &state.file(self.node)?.live;
        let range = usize::try_from(offset).ok().and_then(|from| bytes.get(from..from.checked_add(buffer.len())?));
        buffer.copy_from_slice(range.ok_or_else(|| error(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.count()?;
        let torn = state.stop == Some(At::Write(state.writes));
        state.writes += 1;
        state.off = torn;
        let written = if torn { &bytes[..bytes.len() / 2] } else { bytes };
        Arc::make_mut(&mut state.file(self.node)?.live).extend_from_slice(written);
        state.running()
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.count()?;
        let contents = state.file(self.node)?;
        contents.durable = Arc::clone(&contents.live);
        Ok(())
    }

    fn give(&self, _: Owner) -> io::Result<()> {
        self.disk.lock().running()
    }
}

impl Drop for ModelFile {
    fn drop(&mut self) {
        if let (true, Ok(contents)) = (self.holds_lock, self.disk.lock().file(self.node)) {
            contents.locked = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn always(answer: bool) -> impl FnMut() -> bool {
        move || answer
    }

    fn write(disk: &ModelDisk, path: &str, bytes: &[u8]) -> Box<dyn DiskFile> {
        let file = disk.create(Path::new(path)).unwrap();
        file.append(bytes).unwrap();
        file
    }

    fn read(disk: &ModelDisk, path: &str) -> Vec<u8> {
        let file = disk.open(Path::new(path)).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_local_store_conforms_on_it() {
        super::super::conformance::run(&*ModelDisk::with(&["a"]).store("a"));
        super::super::conformance::run(&*ModelDisk::with(&["a"]).without_renames().store("a"));
    }

    #[test]
    fn what_was_not_synced_may_go_with_the_power_and_stays_when_a_process_is_killed() {
        let disk = ModelDisk::with(&["a"]);
        write(&disk, "/a/new", b"bytes");
        assert_eq!(disk.after(End::PowerLoss, &mut always(false)).files("a").len(), 0);
        for end in [End::Killed, End::PowerLoss] {
            assert_eq!(read(&disk.after(end, &mut always(true)), "/a/new"), b"bytes");
        }
    }

    #[test]
    fn a_name_and_what_it_names_are_made_durable_apart() {
        let disk = ModelDisk::with(&["a"]);
        write(&disk, "/a/named", b"bytes");
        disk.sync_directory(Path::new("/a")).unwrap();
        write(&disk, "/a/written", b"bytes").sync().unwrap();
        let left = disk.after(End::PowerLoss, &mut always(false));
        assert_eq!(left.files("a"), BTreeSet::from(["named".to_owned()]));
        assert_eq!(read(&left, "/a/named"), b"");
    }

    #[test]
    fn sectors_survive_one_by_one() {
        let disk = ModelDisk::with(&["a"]);
        let file = write(&disk, "/a/x", &[1; SECTOR_LEN]);
        file.sync().unwrap();
        disk.sync_directory(Path::new("/a")).unwrap();
        file.append(&[2; 2 * SECTOR_LEN]).unwrap();
        let mut every_other = [false, true].into_iter().cycle();
        let left = disk.after(End::PowerLoss, &mut || every_other.next().unwrap());
        assert_eq!(read(&left, "/a/x"), [[1; SECTOR_LEN], [0; SECTOR_LEN], [2; SECTOR_LEN]].concat());
    }

    #[test]
    fn a_rename_that_was_not_synced_may_leave_either_name_both_or_none() {
        let disk = ModelDisk::with(&["a"]);
        write(&disk, "/a/old", b"bytes").sync().unwrap();
        disk.sync_directory(Path::new("/a")).unwrap();
        disk.rename(Path::new("/a/old"), Path::new("/a/new")).unwrap();
        let mut seen = BTreeSet::new();
        for answers in [[false, false], [false, true], [true, false], [true, true]] {
            let mut answers = answers.into_iter();
            seen.insert(disk.after(End::PowerLoss, &mut || answers.next().unwrap()).files("a"));
        }
        assert_eq!(seen.len(), 4);
    }

    #[test]
    fn it_stops_where_it_is_told() {
        let disk = ModelDisk::with(&["a"]);
        disk.stop_at(At::Call(1));
        let file = disk.create(Path::new("/a/x")).unwrap();
        assert!(file.append(b"bytes").is_err() && disk.is_off());
        assert_eq!(read(&disk.after(End::Killed, &mut always(true)), "/a/x"), b"");
        let disk = ModelDisk::with(&["a"]);
        disk.stop_at(At::Write(0));
        let file = disk.create(Path::new("/a/x")).unwrap();
        assert!(file.append(b"bytes").is_err() && file.sync().is_err());
        assert_eq!(read(&disk.after(End::Killed, &mut always(true)), "/a/x"), b"by");
    }

    #[test]
    fn a_store_that_was_made_by_somebody_who_was_killed_is_there_for_good_once_it_is_used() {
        let root = Path::new("/a/b/c");
        let name = crate::store::ObjectName::new("x/y").unwrap();
        let put = |disk: &ModelDisk| -> crate::Result<()> {
            let store = LocalStore::create_on(Arc::new(disk.clone()), root)?;
            store.put_new(&name, &mut &b"bytes"[..]).map(drop)
        };
        let whole = ModelDisk::with(&["a"]);
        put(&whole).unwrap();
        let (calls, _) = whole.counted();
        for call in 0..calls {
            let disk = ModelDisk::with(&["a"]);
            disk.stop_at(At::Call(call));
            assert!(put(&disk).is_err());
            let disk = disk.after(End::Killed, &mut always(true));
            let done = put(&disk);
            assert!(done.is_ok() || call == calls - 1, "call {call}: {done:?}");
            if done.is_ok() {
                let disk = disk.after(End::PowerLoss, &mut always(false));
                assert!(disk.files("a").contains("b/c/x/y"), "call {call}");
            }
        }
    }
}
