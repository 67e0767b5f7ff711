//! A directory of the local file system.
//!
//! An object is a file at its name below the root. `put_new` writes a temporary file beside it (`.tmp-...`, which no object
//! name can be), syncs it, gives it its name by a rename that refuses to replace, and syncs every directory whose entries
//! changed. An error from any of these steps counts: a failed `fsync` is not tried again, because the kernel forgets the
//! failure with the first report. A crash leaves at most a temporary file. Its writer holds a lock on it, which ends with him, however he ends: a
//! temporary file that can be locked is swept away.
//!
//! Files are 0600 and directories 0700: a backup holds everything the database does. Root gives what it makes to the owner of the store's directory, or
//! the next backup of that user could not read it.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{BufRead, ErrorKind as Io, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock};

use super::{ObjectInfo, ObjectName, Store};
use crate::error::{Error, ErrorKind, Result};

/// How the names of temporary files begin.
const TEMPORARY: &str = ".tmp-";
const NO_WAIT: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;
/// How many files stay open for reading.
const OPEN_FILES: usize = 16;

/// Objects as files below a directory.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    /// To whom root gives what it makes.
    owner: Option<Owner>,
    open: Mutex<VecDeque<(ObjectName, Arc<File>)>>,
}

impl LocalStore {
    /// The store in an existing directory.
    ///
    /// # Errors
    /// `Missing` if there is no such directory, `Invalid` if it is something else.
    pub fn open(root: &Path) -> Result<Self> {
        let metadata = fs::metadata(root).map_err(|e| Error::io("open", root, e))?;
        if !metadata.is_dir() {
            return Err(Error::invalid(format!("{} is not a directory", root.display())));
        }
        let is_root = rustix::process::geteuid().is_root();
        let owner = (is_root && metadata.uid() != 0).then(|| Owner { uid: metadata.uid(), gid: metadata.gid() });
        Ok(Self { root: root.to_owned(), owner, open: Mutex::default() })
    }

    /// The store in a directory that is made if need be, with its parents.
    ///
    /// # Errors
    /// As [`LocalStore::open`], and when the directory cannot be made.
    pub fn create(root: &Path) -> Result<Self> {
        make_directories(root, None)?;
        Self::open(root)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// The object opened for reading, from the files that are open already if it is one of them.
    fn reader(&self, name: &ObjectName) -> Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = open.iter().find(|(known, _)| known == name) {
            return Ok(Arc::clone(file));
        }
        let path = self.path(name);
        // Whatever it is, opening it does not wait for anybody.
        let opened = OpenOptions::new().read(true).custom_flags(NO_WAIT).open(&path);
        let file = Arc::new(opened.map_err(|e| Error::io("open", &path, e))?);
        if !file.metadata().map_err(|e| Error::io("look at", &path, e))?.is_file() {
            return Err(Error::corrupt(name.as_str(), "the object is not a file"));
        }
        if open.len() == OPEN_FILES {
            open.pop_front();
        }
        open.push_back((name.clone(), Arc::clone(&file)));
        Ok(file)
    }

    /// A temporary file in a directory, which is made if need be; a sweep may remove it again while it is empty.
    fn temporary_in(&self, directory: &Path) -> Result<Temporary> {
        make_directories(directory, self.owner)?;
        match Temporary::create(directory, self.owner) {
            Err(e) if e.kind() == ErrorKind::Missing => {
                make_directories(directory, self.owner)?;
                Temporary::create(directory, self.owner)
            }
            created => created,
        }
    }

    fn forget(&self, name: &ObjectName) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != name);
    }

    fn list_directory(&self, relative: &str, prefix: &str, found: &mut Vec<ObjectInfo>) -> Result<()> {
        let directory = self.root.join(relative);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(e) if e.kind() == Io::NotFound => return Ok(()),
            Err(e) => return Err(Error::io("list", &directory, e)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("list", &directory, e))?;
            let file_name = entry.file_name();
            let Some(component) = file_name.to_str().filter(|text| super::name::is_component(text)) else { continue };
            let name = if relative.is_empty() { component.to_owned() } else { format!("{relative}/{component}") };
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(e) if e.kind() == Io::NotFound => continue,
                Err(e) => return Err(Error::io("look at", &entry.path(), e)),
            };
            let reachable = name.starts_with(prefix) || prefix.starts_with(&format!("{name}/"));
            if metadata.is_dir() && reachable {
                self.list_directory(&name, prefix, found)?;
            } else if metadata.is_file() && name.starts_with(prefix) {
                // A name that is too long is no object's.
                found.extend(ObjectName::new(name).map(|name| ObjectInfo { name, len: metadata.len() }));
            }
        }
        Ok(())
    }
}

impl Store for LocalStore {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        let path = self.path(name);
        let directory = path.parent().ok_or_else(|| Error::bug("an object name without a directory"))?;
        if fs::symlink_metadata(&path).is_ok() {
            return Err(Error::new(ErrorKind::Conflict, format!("{} exists already", path.display())));
        }
        let temporary = self.temporary_in(directory)?;
        let len = temporary.fill(content)?;
        temporary.rename_to(&path)?;
        sync_directory(directory)?;
        Ok(len)
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        let file = self.reader(name)?;
        let path = self.path(name);
        let len = file.metadata().map_err(|e| Error::io("look at", &path, e))?.len();
        check_len(name, len, max_len)?;
        let too_long = |_| Error::new(ErrorKind::Unsupported, "the object does not fit into memory").at(name.as_str());
        let mut bytes = vec![0; usize::try_from(len).map_err(too_long)?];
        self.get_range(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let file = self.reader(name)?;
        if i64::try_from(offset.saturating_add(buffer.len() as u64)).is_err() {
            let len = file.metadata().map(|metadata| metadata.len()).unwrap_or_default();
            return Err(too_short(name, len, offset, buffer.len()));
        }
        match file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == Io::UnexpectedEof => {
                let len = file.metadata().map(|metadata| metadata.len()).unwrap_or_default();
                Err(too_short(name, len, offset, buffer.len()))
            }
            // The disk says that these bytes are lost.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Err(Error::corrupt(name.as_str(), "the object cannot be read from the disk").because(e))
            }
            Err(e) => Err(Error::io("read", &self.path(name), e)),
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
        match fs::remove_file(&path) {
            Ok(()) => path.parent().map_or(Ok(()), sync_directory),
            Err(e) if e.kind() == Io::NotFound => Ok(()),
            Err(e) => Err(Error::io("delete", &path, e)),
        }
    }

    fn sweep(&self, prefix: &str) -> Result<u64> {
        let directory = self.root.join(prefix);
        // Through a link nothing is listed, so nothing there is ours.
        let is_below = |path: &Path| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
        let mut path = self.root.clone();
        let ours = prefix.split_terminator('/').all(|component| {
            path.push(component);
            is_below(&path)
        });
        if ours { sweep_directory(&directory, false) } else { Ok(0) }
    }
}

/// Sweeps a directory and all below; those below that are empty then go, too.
fn sweep_directory(directory: &Path, may_go: bool) -> Result<u64> {
    let entries = fs::read_dir(directory).map_err(|e| Error::io("list", directory, e))?;
    let mut freed = 0;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("list", directory, e))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| Error::io("look at", &path, e))?;
        if kind.is_dir() {
            freed += sweep_directory(&path, true)?;
        } else if kind.is_file() && entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            freed += sweep_temporary(&path)?;
        }
    }
    if may_go {
        // Fails unless it is empty; whoever wants to write into it makes it again.
        let _ = fs::remove_dir(directory);
    }
    Ok(freed)
}

/// Removes a temporary file unless its writer lives.
fn sweep_temporary(path: &Path) -> Result<u64> {
    let file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == Io::NotFound => return Ok(0),
        Err(e) => return Err(Error::io("open", path, e)),
    };
    // Locked: somebody writes it. Not supported: nobody can tell.
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(0);
    }
    let len = file.metadata().map_err(|e| Error::io("look at", path, e))?.len();
    match fs::remove_file(path) {
        Ok(()) => Ok(len),
        Err(e) if e.kind() == Io::NotFound => Ok(0),
        Err(e) => Err(Error::io("delete", path, e)),
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
    path: PathBuf,
    file: File,
    named: bool,
}

impl Temporary {
    fn create(directory: &Path, owner: Option<Owner>) -> Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| Error::new(ErrorKind::Unavailable, format!("no randomness: {e}")))?;
        let path = directory.join(format!("{TEMPORARY}{:016x}", u64::from_le_bytes(random)));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|e| Error::io("create", &path, e))?;
        let temporary = Self { path, file, named: false };
        // A file system without locks has no sweeping either. One that is swept before it is locked will not get its name, which is an error then.
        let _ = flock(&temporary.file, FlockOperation::NonBlockingLockExclusive);
        if let Some(Owner { uid, gid }) = owner {
            let given = std::os::unix::fs::fchown(&temporary.file, Some(uid), Some(gid));
            given.map_err(|e| Error::io("give away", &temporary.path, e))?;
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
            (&self.file).write_all(bytes).map_err(|e| Error::io("write", &self.path, e))?;
            let written = bytes.len();
            content.consume(written);
            len += written as u64;
        }
        self.file.sync_all().map_err(|e| Error::io("sync", &self.path, e))?;
        Ok(len)
    }

    fn rename_to(mut self, path: &Path) -> Result<()> {
        let renamed = rustix::fs::renameat_with(CWD, &self.path, CWD, path, RenameFlags::NOREPLACE);
        // File systems without that flag (NFS among them) have hard links, which never replace either.
        match renamed {
            Ok(()) => self.named = true,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                fs::hard_link(&self.path, path).map_err(|e| Error::io("name", path, e))?;
            }
            Err(e) => return Err(Error::io("name", path, e.into())),
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.named {
            // Litter that stays is harmless and is cleaned up later.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A user and a group.
#[derive(Clone, Copy, Debug)]
struct Owner {
    uid: u32,
    gid: u32,
}

/// Makes a directory and its parents, 0700, each durable.
fn make_directories(directory: &Path, owner: Option<Owner>) -> Result<()> {
    if directory.as_os_str().is_empty() || directory.is_dir() {
        return Ok(());
    }
    let parent = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_directories(parent, owner)?;
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {
            if let Some(Owner { uid, gid }) = owner {
                std::os::unix::fs::chown(directory, Some(uid), Some(gid))
                    .map_err(|e| Error::io("give away", directory, e))?;
            }
            sync_directory(parent)
        }
        Err(e) if e.kind() == Io::AlreadyExists => Ok(()),
        Err(e) => Err(Error::io("create", directory, e)),
    }
}

/// Makes a directory's entries durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|handle| handle.sync_all());
    synced.map_err(|e| Error::io("sync", directory, e))
}

#[cfg(test)]
mod tests {
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
        let written = Temporary::create(&root.join("x"), None).unwrap();
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
