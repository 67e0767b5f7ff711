//! A directory of the local file system.
//!
//! An object is a file at its name below the root. `put_new` writes a temporary file beside it (`.tmp-...`, which no object
//! name can be), syncs it, gives it its name by a rename that refuses to replace, and syncs every directory whose entries
//! changed. An error from any of these steps counts: a failed `fsync` is not tried again, because the kernel forgets the
//! failure with the first report. A crash leaves at most a temporary file. Its writer holds a lock on it, which ends with him, however he ends: a
//! temporary file that can be locked is swept away.
//!
//! What is seen is not yet durable: a writer that was killed between a change and its sync has left it to whoever comes next, and a loss of power may
//! still take it back. So a directory that exists counts as made only after this process has synced the one above it, once, and those who draw
//! conclusions from a listing ask for [`Store::settle`] first.
//!
//! Files are 0600 and directories 0700: a backup holds everything the database does. Root gives what it makes to the owner of the store's directory, or
//! the next backup of that user could not read it.

use std::collections::{HashSet, VecDeque};
use std::io::{BufRead, ErrorKind as Io};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::disk::{Disk, DiskFile, HostDisk, Kind, Owner};
use super::{ObjectInfo, ObjectName, Store};
use crate::error::{Error, ErrorKind, Result};

/// How the names of temporary files begin.
const TEMPORARY: &str = ".tmp-";
/// How many files stay open for reading.
const OPEN_FILES: usize = 16;

/// Objects as files below a directory.
#[derive(Debug)]
pub struct LocalStore {
    disk: Arc<dyn Disk>,
    root: PathBuf,
    /// To whom root gives what it makes.
    owner: Option<Owner>,
    open: Mutex<VecDeque<(ObjectName, Arc<dyn DiskFile>)>>,
    /// Directories that are there for good.
    lasting: Mutex<HashSet<PathBuf>>,
}

impl LocalStore {
    /// The store in an existing directory.
    ///
    /// # Errors
    /// `Missing` if there is no such directory, `Invalid` if it is something else.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_on(Arc::new(HostDisk), root)
    }

    /// The store in a directory that is made if need be, with its parents.
    ///
    /// # Errors
    /// As [`LocalStore::open`], and when the directory cannot be made.
    pub fn create(root: &Path) -> Result<Self> {
        Self::create_on(Arc::new(HostDisk), root)
    }

    /// The store in a directory of a disk that is made if need be.
    pub(super) fn create_on(disk: Arc<dyn Disk>, root: &Path) -> Result<Self> {
        make_directories(&*disk, root)?;
        Self::open_on(disk, root)
    }

    /// The store in an existing directory of a disk.
    pub(super) fn open_on(disk: Arc<dyn Disk>, root: &Path) -> Result<Self> {
        let Some(owner) = disk.owner(root).map_err(|e| Error::io("open", root, e))? else {
            return Err(Error::invalid(format!("{} is not a directory", root.display())));
        };
        let is_root = crate::os::gives_files_away();
        let owner = (is_root && owner.uid != 0).then_some(owner);
        let lasting = Mutex::new(HashSet::from([root.to_owned()]));
        Ok(Self { disk, root: root.to_owned(), owner, open: Mutex::default(), lasting })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// The object opened for reading, from the files that are open already if it is one of them.
    fn reader(&self, name: &ObjectName) -> Result<Arc<dyn DiskFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = open.iter().find(|(known, _)| known == name) {
            return Ok(Arc::clone(file));
        }
        let file: Arc<dyn DiskFile> = Arc::from(self.open_object(name)?);
        if open.len() == OPEN_FILES {
            open.pop_front();
        }
        open.push_back((name.clone(), Arc::clone(&file)));
        Ok(file)
    }

    fn open_object(&self, name: &ObjectName) -> Result<Box<dyn DiskFile>> {
        let path = self.path(name);
        self.disk.open(&path).map_err(|e| match e.kind() {
            Io::InvalidData => Error::corrupt(name.as_str(), "the object is not a file"),
            _ => Error::io("open", &path, e),
        })
    }

    /// Fills `buffer` with the bytes of an open object from `offset`.
    fn fill(&self, name: &ObjectName, file: &dyn DiskFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if i64::try_from(offset.saturating_add(buffer.len() as u64)).is_err() {
            return Err(too_short(name, file.len().unwrap_or_default(), offset, buffer.len()));
        }
        match file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == Io::UnexpectedEof => {
                let len = file.len().unwrap_or_default();
                Err(too_short(name, len, offset, buffer.len()))
            }
            // The disk says that these bytes are lost.
            Err(e) if e.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                Err(Error::corrupt(name.as_str(), "the object cannot be read from the disk").because(e))
            }
            Err(e) => Err(Error::io("read", &self.path(name), e)),
        }
    }

    /// A temporary file in a directory, which is made if need be; a sweep may remove it again while it is empty.
    fn temporary_in(&self, directory: &Path) -> Result<Temporary> {
        let create = || Temporary::create(Arc::clone(&self.disk), directory, self.owner);
        self.make_lasting(directory)?;
        match create() {
            Err(e) if e.kind() == ErrorKind::Missing => {
                self.make_lasting(directory)?;
                create()
            }
            created => created,
        }
    }

    /// Sees to it that a directory below the root is there, and is there for good, 0700 if it is made.
    fn make_lasting(&self, directory: &Path) -> Result<()> {
        let lasting = || self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there = self.disk.is_directory(directory);
        if directory == self.root || (is_there && lasting().contains(directory)) {
            return Ok(());
        }
        let parent = parent_of(directory)?;
        self.make_lasting(parent)?;
        if !is_there {
            make_directory(&*self.disk, directory, self.owner)?;
        }
        sync_directory(&*self.disk, parent)?;
        lasting().insert(directory.to_owned());
        Ok(())
    }

    fn forget(&self, name: &ObjectName) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != name);
    }

    fn list_directory(&self, relative: &str, prefix: &str, found: &mut Vec<ObjectInfo>) -> Result<()> {
        let directory = self.root.join(relative);
        let entries = match self.disk.entries(&directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == Io::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("list", &directory, e)),
        };
        for (file_name, kind) in entries {
            let Some(component) = file_name.to_str().filter(|text| super::name::is_component(text)) else { continue };
            let name = if relative.is_empty() { component.to_owned() } else { format!("{relative}/{component}") };
            let reachable = name.starts_with(prefix) || prefix.starts_with(&format!("{name}/"));
            if kind == Kind::Directory && reachable {
                self.list_directory(&name, prefix, found)?;
            } else if kind == Kind::File && name.starts_with(prefix) {
                let path = directory.join(component);
                match self.disk.len(&path) {
                    // A name that is too long is no object's.
                    Ok(len) => found.extend(ObjectName::new(name).map(|name| ObjectInfo { name, len })),
                    Err(e) if e.kind() == Io::NotFound => {}
                    Err(e) => return Err(Error::io("look at", &path, e)),
                }
            }
        }
        Ok(())
    }

    /// Sweeps a directory and all below; those below that are empty then go, too.
    fn sweep_directory(&self, directory: &Path, may_go: bool) -> Result<u64> {
        let entries = self.disk.entries(directory).map_err(|e| Error::io("list", directory, e))?;
        let mut freed = 0;
        for (name, kind) in entries {
            let path = directory.join(&name);
            if self.disk.is_link(&path) {
                continue;
            }
            if kind == Kind::Directory {
                freed += self.sweep_directory(&path, true)?;
            } else if kind == Kind::File && name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
                freed += self.sweep_temporary(&path)?;
            }
        }
        if may_go {
            // Fails unless it is empty; whoever wants to write into it makes it again.
            let _ = self.disk.remove_directory(directory);
        }
        Ok(freed)
    }

    /// Removes a temporary file unless its writer lives.
    fn sweep_temporary(&self, path: &Path) -> Result<u64> {
        let file = match self.disk.claim(path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(0),
            // Gone, or somebody else's, which is his.
            Err(e) if matches!(e.kind(), Io::NotFound | Io::PermissionDenied) => return Ok(0),
            Err(e) => return Err(Error::io("open", path, e)),
        };
        let len = file.len().map_err(|e| Error::io("look at", path, e))?;
        match self.disk.remove_file(path) {
            Ok(()) => Ok(len),
            Err(e) if e.kind() == Io::NotFound => Ok(0),
            Err(e) => Err(Error::io("delete", path, e)),
        }
    }
}

impl Store for LocalStore {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        let path = self.path(name);
        let directory = parent_of(&path)?;
        if self.disk.exists(&path) {
            return Err(Error::new(ErrorKind::Conflict, format!("{} exists already", path.display())));
        }
        let temporary = self.temporary_in(directory)?;
        let len = temporary.fill(content)?;
        temporary.rename_to(&path)?;
        sync_directory(&*self.disk, directory)?;
        Ok(len)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        // Opened anew: an object that another process has deleted is not there any more.
        let file = self.open_object(name)?;
        let len = file.len().map_err(|e| Error::io("look at", &self.path(name), e))?;
        check_len(name, len, max_len)?;
        let too_long = |_| Error::new(ErrorKind::Unsupported, "the object does not fit into memory").at(name.as_str());
        let mut bytes = vec![0; usize::try_from(len).map_err(too_long)?];
        self.fill(name, &*file, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.fill(name, &*self.reader(name)?, offset, buffer)
    }

    fn will_get(&self, name: &ObjectName, offset: u64, len: u64) {
        // Whoever asks for the bytes then is told what is wrong.
        if let Ok(file) = self.reader(name) {
            file.will_read(offset, len);
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let mut found = Vec::new();
        self.list_directory("", prefix, &mut found)?;
        found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        let path = self.path(name);
        self.forget(name);
        let directory = parent_of(&path)?;
        match self.disk.remove_file(&path) {
            Ok(()) => sync_directory(&*self.disk, directory),
            // Perhaps since a moment ago, by somebody who was killed then.
            Err(e) if e.kind() == Io::NotFound && self.disk.is_directory(directory) => {
                sync_directory(&*self.disk, directory)
            }
            Err(e) if e.kind() == Io::NotFound => Ok(()),
            Err(e) => Err(Error::io("delete", &path, e)),
        }
    }

    fn settle(&self, prefix: &str) -> Result<()> {
        let directory = self.root.join(prefix.trim_end_matches('/'));
        if !self.disk.is_directory(&directory) {
            return Ok(());
        }
        self.make_lasting(&directory)?;
        sync_directory(&*self.disk, &directory)
    }

    fn sweep(&self, prefix: &str) -> Result<u64> {
        // What a link leads to may be somebody else's, too: it is not swept.
        let mut directory = self.root.clone();
        let ours = prefix.split_terminator('/').all(|component| {
            directory.push(component);
            self.disk.is_directory(&directory) && !self.disk.is_link(&directory)
        });
        if ours { self.sweep_directory(&directory, false) } else { Ok(0) }
    }
}

/// The error of a read beyond an object's end.
pub(super) fn too_short(name: &ObjectName, len: u64, offset: u64, wanted: usize) -> Error {
    Error::corrupt(
        name.as_str(),
        format!("the object has {len} bytes where {wanted} were to be read at offset {offset}"),
    )
}

/// Refuses an object that is longer than the caller is ready to take.
pub(super) fn check_len(name: &ObjectName, len: u64, max_len: u64) -> Result<()> {
    if len <= max_len {
        return Ok(());
    }
    let what = format!("the object has {len} bytes where at most {max_len} are expected");
    Err(Error::new(ErrorKind::Unsupported, what).at(name.as_str()))
}

/// A file that is removed again unless it got its name.
struct Temporary {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    named: bool,
}

impl Temporary {
    fn create(disk: Arc<dyn Disk>, directory: &Path, owner: Option<Owner>) -> Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| Error::new(ErrorKind::Unavailable, format!("no randomness: {e}")))?;
        let path = directory.join(format!("{TEMPORARY}{:016x}", u64::from_le_bytes(random)));
        let file = disk.create(&path).map_err(|e| Error::io("create", &path, e))?;
        let temporary = Self { disk, path, file, named: false };
        if let Some(owner) = owner {
            temporary.file.give(owner).map_err(|e| Error::io("give away", &temporary.path, e))?;
        }
        Ok(temporary)
    }

    /// Writes everything that `content` yields and makes it durable.
    fn fill(&self, content: &mut dyn BufRead) -> Result<u64> {
        let mut len = 0;
        loop {
            let bytes = match content.fill_buf() {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == Io::Interrupted => continue,
                Err(e) => return Err(Error::new(ErrorKind::Unavailable, "the object's content broke off").because(e)),
            };
            if bytes.is_empty() {
                break;
            }
            self.file.append(bytes).map_err(|e| Error::io("write", &self.path, e))?;
            let written = bytes.len();
            content.consume(written);
            len += written as u64;
        }
        self.file.sync().map_err(|e| Error::io("sync", &self.path, e))?;
        Ok(len)
    }

    fn rename_to(mut self, path: &Path) -> Result<()> {
        match self.disk.rename(&self.path, path) {
            Ok(()) => self.named = true,
            // File systems without that (NFS among them) have hard links, which never replace either.
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::INVAL | Errno::NOSYS)) => {
                self.disk.link(&self.path, path).map_err(|e| Error::io("name", path, e))?;
            }
            Err(e) => return Err(Error::io("name", path, e)),
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.named {
            // Litter that stays is harmless and is cleaned up later.
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

/// The directory of a path, which is below the root.
fn parent_of(path: &Path) -> Result<&Path> {
    path.parent().ok_or_else(|| Error::bug("an object name without a directory"))
}

/// Makes a directory and its parents, 0700, each durable.
fn make_directories(disk: &dyn Disk, directory: &Path) -> Result<()> {
    let parent = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if disk.is_directory(directory) {
        // Made a moment ago by somebody who was killed then, or long ago in a place that we may not even read: what can be done is done.
        let _ = disk.sync_directory(parent);
        return Ok(());
    }
    if parent != directory {
        make_directories(disk, parent)?;
    }
    make_directory(disk, directory, None)?;
    sync_directory(disk, parent)
}

/// Makes a directory, unless somebody else was faster.
fn make_directory(disk: &dyn Disk, directory: &Path, owner: Option<Owner>) -> Result<()> {
    match disk.make_directory(directory) {
        Ok(()) => owner.map_or(Ok(()), |owner| {
            disk.give_directory(directory, owner).map_err(|e| Error::io("give away", directory, e))
        }),
        Err(e) if e.kind() == Io::AlreadyExists => Ok(()),
        Err(e) => Err(Error::io("create", directory, e)),
    }
}

/// Makes a directory's entries durable.
fn sync_directory(disk: &dyn Disk, directory: &Path) -> Result<()> {
    disk.sync_directory(directory).map_err(|e| Error::io("sync", directory, e))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn store() -> (tempfile::TempDir, LocalStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::create(&directory.path().join("a/b")).unwrap();
        (directory, store)
    }

    #[test]
    fn it_conforms() {
        let (_directory, store) = store();
        super::super::conformance::run(&store);
    }

    #[test]
    fn only_the_owner_can_look_into_it() {
        let (directory, store) = store();
        store.put_new(&ObjectName::new("x/y").unwrap(), &mut &b"secret"[..]).unwrap();
        let mode = |path: &str| fs::metadata(directory.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("a/b"), mode("a/b/x"), mode("a/b/x/y")), (0o700, 0o700, 0o600));
    }

    #[test]
    fn a_sweep_removes_what_nobody_writes_and_leaves_the_rest() {
        let (directory, store) = store();
        store.put_new(&ObjectName::new("x/y").unwrap(), &mut &b"kept"[..]).unwrap();
        let root = directory.path().join("a/b");
        fs::create_dir_all(root.join("x/empty/deeper")).unwrap();
        fs::write(root.join("x/.tmp-0123"), "litter").unwrap();
        fs::write(root.join("x/.other"), "not ours").unwrap();
        let written = Temporary::create(Arc::new(HostDisk), &root.join("x"), None).unwrap();
        assert_eq!(store.sweep("x").unwrap(), 6);
        let mut left: Vec<_> = fs::read_dir(root.join("x")).unwrap().map(|entry| entry.unwrap().path()).collect();
        left.sort();
        assert_eq!(left, [root.join("x/.other"), written.path.clone(), root.join("x/y")]);
        assert_eq!(store.sweep("nothing/here").unwrap(), 0);
    }

    #[test]
    fn content_that_breaks_off_leaves_nothing() {
        struct Broken;
        impl std::io::Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(std::io::Error::other("gone"))
            }
        }
        let (directory, store) = store();
        let mut content = std::io::BufReader::new(std::io::Read::chain(&b"begun"[..], Broken));
        assert!(store.put_new(&ObjectName::new("x").unwrap(), &mut content).is_err());
        assert_eq!(fs::read_dir(directory.path().join("a/b")).unwrap().count(), 0);
    }
}
