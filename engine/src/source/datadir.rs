//! The data directory: what of it belongs into a backup, and how its files are opened.
//!
//! [`DataDir::list`] walks everything that PostgreSQL's own base backup contains. It must run after
//! `pg_backup_start` has returned: what is created, extended or dropped later is repaired by replaying WAL, what
//! happened earlier is not. Directories are opened relative to each other and entries looked at with lstat, so
//! nothing but directories and regular files is ever opened; a FIFO would block for ever.
//!
//! | what | in the listing |
//! |---|---|
//! | `pg_wal` | itself, `archive_status` and (17+) `summaries`, empty, also where it is a symbolic link |
//! | `pg_stat_tmp`, `pg_replslot`, `pg_dynshmem`, `pg_notify`, `pg_serial`, `pg_snapshots`, `pg_subtrans` | themselves, empty, at any depth |
//! | `pgsql_tmp*`, `pg_internal.init*`, `postgresql.auto.conf.tmp`, `current_logfiles.tmp`, `backup_label`, `tablespace_map`, `backup_manifest`, `postmaster.pid`, `postmaster.opts`, `.DS_Store` | not, at any depth |
//! | files of temporary relations | not |
//! | files of unlogged relations | the init fork only |
//! | tablespaces | `pg_tblspc/<oid>`, and below it this cluster's `PG_<major>_<catalog version>` only |
//! | other symbolic links to files, and to directories in `base`, `global` and `pg_*` | as what they point to |
//! | links to directories elsewhere, sockets, FIFOs, devices, dangling links | not; a notice |
//!
//! Names are excluded at any depth because basebackup.c does so. Symbolic links outside `pg_tblspc` are our own
//! choice: `pg_basebackup` leaves them out with a warning, and a restore would miss what they hold.
//!
//! **What may vanish.** A file or directory that was seen and is gone (ENOENT) was dropped, and WAL says so. Every
//! other error ends the backup: a file that cannot be read is not a file that is not there. A tablespace whose link
//! is there but whose directory is not is an error too, because so looks one whose file system is not mounted.
//!
//! **Unlogged relations.** A file is left out only if the relation's init fork exists when the file is looked at. ALTER TABLE
//! ... SET LOGGED and SET UNLOGGED write a new relation, so that no file becomes the other kind. In doubt a file is listed: too much is
//! reset by recovery, too little is lost.
//!
//! PostgreSQL: src/backend/backup/basebackup.c (up to 14: src/backend/replication/basebackup.c), sendDir,
//! sendTablespace, excludeDirContents, excludeFiles. A `stats_temp_directory` (up to 14) that is inside the data
//! directory and not `pg_stat_tmp` is listed like any directory; the server discards its files when it starts.

mod walk;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::ErrorKind::{NotFound, PermissionDenied};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, stat, statat};
use rustix::io::Errno;

use self::walk::{Names, Walk};
use super::entries::Entries;
use super::postmaster::PostmasterPid;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    ControlFile, ForkNumber, MajorVersion, RelFileNumber, TablespaceOid, TimelineId, WalSegmentName, WalSegmentSize,
    is_temp_relation_file_name, parse_relation_file_name,
};

/// Kept, but empty; PostgreSQL: basebackup.c, excludeDirContents.
const EMPTIED_DIRECTORIES: &[&[u8]] =
    &[b"pg_dynshmem", b"pg_notify", b"pg_replslot", b"pg_serial", b"pg_snapshots", b"pg_stat_tmp", b"pg_subtrans"];

/// Left out; PostgreSQL: basebackup.c, excludeFiles, and sendDir for the last.
const EXCLUDED_FILES: &[&[u8]] = &[
    b"postgresql.auto.conf.tmp",
    b"current_logfiles.tmp",
    b"backup_label",
    b"tablespace_map",
    b"backup_manifest",
    b"postmaster.pid",
    b"postmaster.opts",
    b".DS_Store",
];

/// Left out with everything that begins so; PostgreSQL: PG_TEMP_FILE_PREFIX, RELCACHE_INIT_FILENAME.
const EXCLUDED_PREFIXES: &[&[u8]] = &[b"pgsql_tmp", b"pg_internal.init"];

/// How long a tablespace may be without its directory: while DROP TABLESPACE is at work, a moment.
const TABLESPACE_PATIENCE: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
];

/// PostgreSQL: src/common/controldata_utils.c, get_controlfile_by_exact_path.
const CONTROL_FILE_RETRIES: u32 = 10;
const CONTROL_FILE_PAUSE: Duration = Duration::from_millis(10);

/// What a directory or file is, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// Something that a base backup contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is, relative to the data directory; in a tablespace, `pg_tblspc/<oid>/PG_.../...`.
    pub path: Box<[u8]>,
    /// What it is.
    pub kind: EntryKind,
    /// Its permissions, without the file type.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What an [`Entry`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory, which a restore creates even if it stays empty.
    Directory,
    /// A regular file.
    File {
        /// Its length when it was listed, in bytes.
        len: u64,
    },
}

/// A tablespace other than `pg_default` and `pg_global`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    /// Its number.
    pub oid: TablespaceOid,
    /// Where its symbolic link points, as it is written; `None` for a tablespace in place (15+), which is a
    /// directory in `pg_tblspc`.
    pub link: Option<PathBuf>,
    /// Its directory, with all symbolic links resolved.
    pub directory: PathBuf,
}

/// What a base backup of the cluster contains; `global/pg_control` is among it, and must be copied last.
#[derive(Clone, Debug)]
pub struct Listing {
    /// Everything, ordered by path.
    pub entries: Entries,
    /// The tablespaces, ordered by number.
    pub tablespaces: Vec<Tablespace>,
    /// Where the WAL is, with all symbolic links resolved.
    pub wal_dir: PathBuf,
    /// The permissions of the data directory itself.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What was left out that PostgreSQL did not make.
    pub notices: Vec<String>,
}

/// A PostgreSQL data directory.
#[derive(Clone, Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    major: MajorVersion,
    tablespace_version_dir: String,
}

impl DataDir {
    /// The data directory at `path`, after a look at `PG_VERSION` and `global/pg_control`.
    ///
    /// # Errors
    ///
    /// `Invalid` or `Missing` when it is no data directory, `Unavailable` when it cannot be read, `Unsupported`
    /// for a major version that this program does not know.
    pub fn open(path: &Path) -> Result<Self> {
        let given = path;
        let path = std::fs::canonicalize(given).map_err(|error| open_error("open data directory", given, error))?;
        let metadata = std::fs::metadata(&path).map_err(|error| open_error("open data directory", &path, error))?;
        if !metadata.is_dir() {
            return Err(Error::invalid(format!("{} is not a directory", given.display())));
        }
        let version_file = path.join("PG_VERSION");
        let version = std::fs::read(&version_file).map_err(|error| match error.kind() {
            NotFound => not_a_data_directory(&path),
            _ => open_error("read", &version_file, error),
        })?;
        let identity = Identity { device: metadata.dev(), inode: metadata.ino() };
        let control = read_control_file(&path.join("global/pg_control"))?.1;
        let major = control.major_version();
        let version = String::from_utf8_lossy(&version).trim().to_owned();
        if version != major.as_u32().to_string() {
            let what = format!("PG_VERSION says {version:?}, and pg_control is of version {major}");
            return Err(Error::invalid(what).at(path.display().to_string()));
        }
        Ok(Self { path, identity, major, tablespace_version_dir: control.tablespace_version_dir() })
    }

    /// The directory, with all symbolic links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The major version of its server.
    pub fn major_version(&self) -> MajorVersion {
        self.major
    }

    /// `global/pg_control`: its bytes, and what they say. A read that a write of the server came between is
    /// repeated.
    ///
    /// # Errors
    ///
    /// `Corrupt` when the checksum stays wrong.
    pub fn read_control(&self) -> Result<(Vec<u8>, ControlFile)> {
        read_control_file(&self.path.join("global/pg_control"))
    }

    /// What the server that runs here says of itself; `None` when none does.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or understood.
    pub fn postmaster_pid(&self) -> Result<Option<PostmasterPid>> {
        PostmasterPid::read(&self.path)
    }

    /// Whether `other` is this very directory, under whatever path.
    ///
    /// # Errors
    ///
    /// When it cannot be looked at; one that does not exist is another.
    pub fn is_same_directory(&self, other: &Path) -> Result<bool> {
        match stat(other) {
            Ok(stat) => Ok(Identity::of(&stat) == self.identity),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(Error::io("look at", other, errno.into())),
        }
    }

    /// Whether `other`, which need not exist yet, is or would be in the data directory, in its WAL directory or in a
    /// tablespace: a repository there would be backed up into itself.
    ///
    /// # Errors
    ///
    /// When a directory cannot be looked at.
    pub fn contains(&self, other: &Path) -> Result<bool> {
        let mut ours = HashSet::from([self.identity]);
        for directory in self.tablespaces()?.into_iter().map(|tablespace| tablespace.directory).chain([self.wal_dir()?])
        {
            let stat = stat(&directory).map_err(|errno| Error::io("look at", &directory, errno.into()))?;
            ours.insert(Identity::of(&stat));
        }
        let absolute = std::path::absolute(other).map_err(|error| Error::io("look at", other, error))?;
        let existing = absolute.ancestors().find_map(|ancestor| std::fs::canonicalize(ancestor).ok());
        for ancestor in existing.iter().flat_map(|path| path.ancestors()) {
            let stat = stat(ancestor).map_err(|errno| Error::io("look at", ancestor, errno.into()))?;
            if ours.contains(&Identity::of(&stat)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Everything that a base backup contains. Call it only when `pg_backup_start` has returned, or on a cluster
    /// at rest.
    ///
    /// # Errors
    ///
    /// Whatever cannot be read and has not vanished.
    pub fn list(&self) -> Result<Listing> {
        let tablespaces = self.tablespaces()?;
        let mut walk = Walk::new(self, &tablespaces)?;
        let root = open_directory(CWD, self.path.as_os_str().as_bytes(), OFlags::empty());
        let root = root.map_err(|errno| Error::io("open", &self.path, errno.into()))?;
        let stat = fstat(&root).map_err(|errno| Error::io("look at", &self.path, errno.into()))?;
        walk.directory(&root, b"", &mut vec![self.identity])?;
        let Walk { entries, notices, .. } = walk;
        let has = |path: &[u8]| entries.find(path).is_some();
        for needed in ["global/pg_control", "PG_VERSION", "base", "pg_tblspc", "pg_wal"] {
            if !has(needed.as_bytes()) {
                let what = format!("{needed} is missing from the data directory");
                return Err(Error::new(ErrorKind::Missing, what).at(self.path.display().to_string()));
            }
        }
        let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
        Ok(Listing { entries, tablespaces, wal_dir: self.wal_dir()?, mode, uid, gid, notices })
    }

    /// Opens a file by its path in the listing; `None` if it is gone, or no longer a regular file.
    ///
    /// # Errors
    ///
    /// Every other failure.
    pub fn open_file(&self, path: &[u8]) -> Result<Option<File>> {
        open_regular(&self.path.join(OsStr::from_bytes(path)))
    }

    /// The tablespaces, ordered by number.
    ///
    /// # Errors
    ///
    /// `Missing` for one whose directory is not there.
    pub fn tablespaces(&self) -> Result<Vec<Tablespace>> {
        let directory = self.path.join("pg_tblspc");
        let opened = open_directory(CWD, directory.as_os_str().as_bytes(), OFlags::empty());
        let opened = opened.map_err(|errno| Error::io("open", &directory, errno.into()))?;
        let names = Names::read(&opened).map_err(|errno| Error::io("list", &directory, errno.into()))?;
        let mut tablespaces = Vec::new();
        for name in names.iter() {
            if let Some(oid) = tablespace_oid(name) {
                tablespaces.extend(self.tablespace(&opened, oid, &directory.join(OsStr::from_bytes(name)))?);
            }
        }
        tablespaces.sort_unstable_by_key(|tablespace| tablespace.oid);
        Ok(tablespaces)
    }

    fn tablespace(&self, links: &OwnedFd, oid: TablespaceOid, path: &Path) -> Result<Option<Tablespace>> {
        let name = oid.to_string();
        for pause in TABLESPACE_PATIENCE {
            std::thread::sleep(pause);
            let link = match readlinkat(links, &*name, Vec::new()) {
                Ok(link) => Some(PathBuf::from(OsStr::from_bytes(link.as_bytes()))),
                Err(Errno::INVAL) => None,
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(Error::io("read the symbolic link", path, errno.into())),
            };
            let is_directory = std::fs::metadata(path).map(|metadata| metadata.is_dir());
            match is_directory {
                // A plain file with a number for a name is nobody's tablespace.
                Ok(false) if link.is_none() => return Ok(None),
                Ok(false) => {
                    return Err(
                        Error::invalid(format!("tablespace {oid} is no directory")).at(path.display().to_string())
                    );
                }
                Ok(true) => match std::fs::metadata(path.join(&self.tablespace_version_dir)) {
                    Ok(_) => {
                        let directory =
                            std::fs::canonicalize(path).map_err(|error| Error::io("resolve", path, error))?;
                        return Ok(Some(Tablespace { oid, link, directory }));
                    }
                    Err(error) if error.kind() == NotFound => {}
                    Err(error) => return Err(Error::io("look into", path, error)),
                },
                Err(error) if error.kind() == NotFound => {}
                Err(error) => return Err(Error::io("look at", path, error)),
            }
        }
        let what = format!("tablespace {oid} has no directory {}", self.tablespace_version_dir);
        Err(Error::new(ErrorKind::Missing, what)
            .at(path.display().to_string())
            .hint("is its file system mounted? if it is no tablespace any more, remove it from pg_tblspc"))
    }

    fn wal_dir(&self) -> Result<PathBuf> {
        let path = self.path.join("pg_wal");
        std::fs::canonicalize(&path).map_err(|error| Error::io("resolve", &path, error))
    }

    /// The WAL segments that are in `pg_wal` now, with their lengths in bytes, ordered by name. The last ones may be
    /// partly written, or recycled files that hold older WAL under a name of the future.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn wal_segments(&self, size: WalSegmentSize) -> Result<Vec<(WalSegmentName, u64)>> {
        let mut segments = Vec::new();
        for (name, stat) in self.wal_files()? {
            if let Some(segment) = WalSegmentName::parse(&name, size) {
                segments.push((segment, length(&stat)));
            }
        }
        Ok(segments)
    }

    /// The timelines whose history files are in `pg_wal`, in order.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn timeline_histories(&self) -> Result<Vec<TimelineId>> {
        let timeline = |name: &[u8]| {
            let digits = std::str::from_utf8(name.strip_suffix(b".history")?).ok()?;
            let well_formed = digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
            u32::from_str_radix(digits, 16).ok().filter(|_| well_formed).map(TimelineId::new)
        };
        Ok(self.wal_files()?.iter().filter_map(|(name, _)| timeline(name)).collect())
    }

    /// Opens a file in `pg_wal`; `None` if it is gone.
    ///
    /// # Errors
    ///
    /// Every other failure.
    pub fn open_wal_file(&self, name: &str) -> Result<Option<File>> {
        open_regular(&self.path.join("pg_wal").join(name))
    }

    /// The regular files in `pg_wal`, ordered by name.
    fn wal_files(&self) -> Result<Vec<(Vec<u8>, Stat)>> {
        let path = self.path.join("pg_wal");
        let fail = |errno: Errno| Error::io("list", &path, errno.into());
        let directory = open_directory(CWD, path.as_os_str().as_bytes(), OFlags::empty()).map_err(fail)?;
        let mut files = Vec::new();
        for name in Names::read(&directory).map_err(fail)?.iter() {
            match statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if is(&stat, FileType::RegularFile) => files.push((name.to_vec(), stat)),
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(fail(errno)),
            }
        }
        files.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(files)
    }

    /// The contents of a configuration file that lies outside the data directory; `None` for one that lies inside,
    /// which the listing has, or that does not exist.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn read_external(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let resolved = match std::fs::canonicalize(path) {
            Ok(resolved) => resolved,
            Err(error) if error.kind() == NotFound => return Ok(None),
            Err(error) => return Err(Error::io("resolve", path, error)),
        };
        if path.starts_with(&self.path) || resolved.starts_with(&self.path) {
            return Ok(None);
        }
        let Some(mut file) = open_regular(&resolved)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|error| Error::io("read", &resolved, error))?;
        Ok(Some(bytes))
    }
}

/// PostgreSQL: src/backend/access/transam/xlog.c, do_pg_backup_start: a name that is no number is no tablespace.
fn tablespace_oid(name: &[u8]) -> Option<TablespaceOid> {
    let digits = std::str::from_utf8(name).ok().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))?;
    let oid: u32 = digits.parse().ok().filter(|&oid| oid != 0 && !digits.starts_with('0'))?;
    Some(TablespaceOid::new(oid))
}

fn is(stat: &Stat, file_type: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == file_type
}

/// The kernel never reports a negative length.
fn length(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or_default()
}

fn open_directory(parent: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | flags, Mode::empty())
}

/// Opens a regular file. Not to block where a FIFO took the file's place, it is opened without waiting.
fn open_regular(path: &Path) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::io("open", path, errno.into())),
    };
    let stat = fstat(&file).map_err(|errno| Error::io("look at", path, errno.into()))?;
    Ok(is(&stat, FileType::RegularFile).then(|| File::from(file)))
}

fn read_control_file(path: &Path) -> Result<(Vec<u8>, ControlFile)> {
    let read = || match std::fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == NotFound => {
            Err(not_a_data_directory(path.parent().and_then(Path::parent).unwrap_or(path)))
        }
        Err(error) => Err(open_error("read", path, error)),
    };
    read_until_whole(read, || std::thread::sleep(CONTROL_FILE_PAUSE), path)
}

/// Reads until the checksum fits, or the same bytes with a wrong one come twice: then nobody is writing them.
fn read_until_whole(
    read: impl Fn() -> Result<Vec<u8>>,
    pause: impl Fn(),
    path: &Path,
) -> Result<(Vec<u8>, ControlFile)> {
    let mut bytes = read()?;
    let mut retries = 0;
    loop {
        let error = match ControlFile::parse(&bytes) {
            Ok(control) => return Ok((bytes, control)),
            Err(error) => error.at(path.display().to_string()),
        };
        if error.kind() != ErrorKind::Corrupt || retries == CONTROL_FILE_RETRIES {
            return Err(error);
        }
        pause();
        retries += 1;
        let again = read()?;
        if again == bytes {
            return Err(error);
        }
        bytes = again;
    }
}

fn not_a_data_directory(path: &Path) -> Error {
    let what = format!("{} is not a PostgreSQL data directory", path.display());
    Error::new(ErrorKind::Missing, what)
        .hint("it must hold PG_VERSION and global/pg_control; `SHOW data_directory` in psql says where the server's is")
}

fn open_error(verb: &str, path: &Path, error: std::io::Error) -> Error {
    let hint = match error.kind() {
        PermissionDenied => Some("run as the operating system's user that owns the data directory (usually postgres)"),
        NotFound => Some("check the path; `SHOW data_directory` in psql says where the server's is"),
        _ => None,
    };
    let error = Error::io(verb, path, error);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

#[cfg(test)]
mod tests;
