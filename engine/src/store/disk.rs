//! What the local store asks of a file system: one method for each system call or two.
//!
//! The store's promise, that an object is durable when `put_new` returns, is about what a file system forgets when the power goes. No test can see that
//! on a real one. So the store is written against this trait, and its crash tests run the same code on a model of a disk that forgets all that it may
//! (`store/model_disk.rs`). Nothing is decided here: what is called, and in which order, stands in `store/local.rs`.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock};

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// What an entry of a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    /// A socket, a device: nothing of ours.
    Other,
}

const NO_WAIT: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

/// A file system.
pub(super) trait Disk: Send + Sync + fmt::Debug {
    /// To whom the directory at `path` belongs; `None` if it is something else. Links are followed.
    fn owner(&self, path: &Path) -> io::Result<Option<Owner>>;

    /// Whether there is a directory at `path`.
    fn is_directory(&self, path: &Path) -> bool;

    /// Whether there is anything at `path`.
    fn exists(&self, path: &Path) -> bool;

    /// Whether what is at `path` is a link to something else.
    fn is_link(&self, path: &Path) -> bool;

    /// The entries of a directory, in any order; a link is what it leads to.
    fn entries(&self, directory: &Path) -> io::Result<Vec<(OsString, Kind)>>;

    /// The length of the file at `path`.
    fn len(&self, path: &Path) -> io::Result<u64>;

    /// Opens a file for reading; `InvalidData` if it is something else.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Makes a file, 0600, which its holder alone has locked where the file system has locks.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Opens a file that somebody made, and locks it; `None` if it is locked, or nobody can tell.
    fn claim(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>>;

    /// Gives a file another name, which must be free. File systems without this say `EINVAL` or `ENOSYS`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file a second name, which must be free.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a name of a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Makes a directory, 0700.
    fn make_directory(&self, path: &Path) -> io::Result<()>;

    /// Removes a directory that is empty.
    fn remove_directory(&self, path: &Path) -> io::Result<()>;

    /// Gives a directory to somebody.
    fn give_directory(&self, path: &Path, owner: Owner) -> io::Result<()>;

    /// Makes the entries of a directory durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
}

/// An open file. Its lock, if it has one, ends with it.
pub(super) trait DiskFile: Send + Sync + fmt::Debug {
    /// Its length.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset`.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Says that these bytes will be read soon.
    fn will_read(&self, _offset: u64, _len: u64) {}

    /// Adds bytes to its end.
    fn append(&self, bytes: &[u8]) -> io::Result<()>;

    /// Makes its contents durable, not its name.
    fn sync(&self) -> io::Result<()>;

    /// Gives it to somebody.
    fn give(&self, owner: Owner) -> io::Result<()>;
}

/// The file system of the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostDisk;

impl Disk for HostDisk {
    fn owner(&self, path: &Path) -> io::Result<Option<Owner>> {
        let metadata = fs::metadata(path)?;
        Ok(metadata.is_dir().then(|| Owner { uid: metadata.uid(), gid: metadata.gid() }))
    }

    fn is_directory(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn exists(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok()
    }

    fn is_link(&self, path: &Path) -> bool {
        path.is_symlink()
    }

    fn entries(&self, directory: &Path) -> io::Result<Vec<(OsString, Kind)>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            // Links are followed, as opening a file does: what can be read must be listed.
            let kind = match fs::metadata(entry.path()).map(|metadata| metadata.file_type()) {
                Ok(kind) if kind.is_file() => Kind::File,
                Ok(kind) if kind.is_dir() => Kind::Directory,
                Ok(_) => Kind::Other,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            entries.push((entry.file_name(), kind));
        }
        Ok(entries)
    }

    fn len(&self, path: &Path) -> io::Result<u64> {
        fs::metadata(path).map(|metadata| metadata.len())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        // Whatever it is, opening it does not wait for anybody.
        let file = OpenOptions::new().read(true).custom_flags(NO_WAIT).open(path)?;
        if file.metadata()?.is_file() { Ok(Box::new(file)) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // A file system without locks has no sweeping either. One that is swept before it is locked will not get its name, which is an error then.
        let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(Box::new(file))
    }

    fn claim(&self, path: &Path) -> io::Result<Option<Box<dyn DiskFile>>> {
        let file = OpenOptions::new().write(true).open(path)?;
        // Locked: somebody writes it. Not supported: nobody can tell.
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(locked.is_ok().then(|| Box::new(file) as Box<dyn DiskFile>))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn give_directory(&self, path: &Path, Owner { uid, gid }: Owner) -> io::Result<()> {
        std::os::unix::fs::chown(path, Some(uid), Some(gid))
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

impl DiskFile for File {
    fn len(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn will_read(&self, offset: u64, len: u64) {
        crate::os::will_read(self, offset, len);
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut file = self;
        file.write_all(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn give(&self, Owner { uid, gid }: Owner) -> io::Result<()> {
        std::os::unix::fs::fchown(self, Some(uid), Some(gid))
    }
}
