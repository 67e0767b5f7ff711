//! Where restored and exported bytes go: a new data directory, and a new directory for each tablespace outside of it.
//!
//! [`Target::check`] looks, without changing anything: every directory must be empty or not there, no server may run on it, and there must
//! be room. [`Target::create`] makes the root directories. After that every path comes from a manifest, which is not trusted: [`Target::path`]
//! takes it apart, refuses whatever is not a plain relative path, and leads those of a tablespace to its directory. Nothing can
//! lead out: the tree is ours alone from the root on, files are created exclusively and never through a symbolic link, and the links of
//! `pg_tblspc` are made last. Directories get their owners and modes when nothing is written to them any more, the roots last: until then nobody
//! else can put something in the way, and a directory that its owner may not write to is no obstacle.
//!
//! `global/pg_control` gets its name when everything else is durable ([`Target::finish`]): PostgreSQL starts on no directory without it. A
//! directory of archives has only a root; each archive gets its name when all are durable ([`Target::name_finished`]).
//!
//! Until then every root has a mark, a file made before all others that names all roots: whoever finds an interrupted or failed run, in whichever
//! of its directories, is told what to delete ([`incomplete`]). The mark goes right before the last name is given, after the long sync.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind as Io, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::pg::{TablespaceOid, canonical_decimal};
use crate::units::size;

/// `pg_control` until the restore is complete.
const UNFINISHED_CONTROL: &str = "global/pg_control.unfinished";
const CONTROL: &[u8] = b"global/pg_control";
/// What the name of an archive ends in until the export is complete.
const UNFINISHED_SUFFIX: &str = ".unfinished";
/// The mark of a root that is being written to; the lines after its first are the roots.
pub(crate) const MARK: &str = ".pgstrata-unfinished";
const MARK_HEAD: &str = "pgstrata is writing, or was interrupted writing, to:";
/// Bytes of a mark that are read at most.
const MAX_MARK_LEN: u64 = 1 << 20;
/// What only a run that did not end leaves in a root. The mark is not there any more while the last names are given.
const UNFINISHED: [&str; 3] = [MARK, UNFINISHED_CONTROL, "backup_manifest.unfinished"];
/// Room that must be left besides the restored bytes, for directories and for recovery.
const SPARE_BYTES: u64 = 64 << 20;

/// Who owns a file, and its permission bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// The directories that a restore writes to.
#[derive(Debug)]
pub struct Target {
    root: PathBuf,
    tablespaces: BTreeMap<TablespaceOid, PathBuf>,
    give_away: bool,
}

impl Target {
    /// The target `root` with these directories for the tablespaces that are not in it.
    ///
    /// # Errors
    /// `Invalid` if a directory is named twice, lies in another, or a tablespace's path is not absolute.
    pub fn new(root: &Path, tablespaces: BTreeMap<TablespaceOid, PathBuf>) -> Result<Self> {
        let root = std::path::absolute(root).map_err(|e| Error::io("find", root, e))?;
        let target = Self { root, tablespaces, give_away: crate::os::gives_files_away() };
        let roots: Vec<PathBuf> = target.roots().map(crate::os::resolve).collect::<Result<_>>()?;
        for (at, one) in roots.iter().enumerate() {
            let nested = roots.iter().enumerate().find(|(other, path)| *other != at && one.starts_with(path));
            if let Some((_, other)) = nested {
                let what = format!("{} lies in {}: both are to be written to", one.display(), other.display());
                return Err(
                    Error::invalid(what).hint("give each tablespace a directory of its own with --tablespace-map")
                );
            }
        }
        match target.tablespaces.values().find(|path| !path.is_absolute()) {
            Some(path) => Err(Error::invalid(format!("the tablespace path {} is not absolute", path.display()))),
            None => Ok(target),
        }
    }

    /// The data directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every directory that is written to: the data directory first.
    pub fn roots(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.root.as_path()).chain(self.tablespaces.values().map(PathBuf::as_path))
    }

    /// The directory of a tablespace that is not in the data directory.
    pub fn tablespace(&self, oid: TablespaceOid) -> Option<&Path> {
        self.tablespaces.get(&oid).map(PathBuf::as_path)
    }

    /// Whether files can be given to the users they belonged to.
    pub fn gives_away(&self) -> bool {
        self.give_away
    }

    /// Checks that everything can be written, without changing anything; `bytes` says how many go to each of [`Target::roots`].
    ///
    /// # Errors
    /// `Invalid` if a directory is in use, `Unavailable` if there is no room.
    pub fn check(&self, bytes: &[u64]) -> Result<()> {
        let mut needed: BTreeMap<u64, (u64, PathBuf)> = BTreeMap::new();
        for (root, bytes) in self.roots().zip(bytes) {
            must_be_free(root)?;
            let existing = crate::os::existing_ancestor(root)?;
            let device = fs::metadata(&existing).map_err(|e| Error::io("look at", &existing, e))?.dev();
            needed.entry(device).or_insert((0, existing)).0 += bytes;
        }
        for (bytes, place) in needed.values() {
            let space = rustix::fs::statvfs(place).map_err(|e| Error::io("look at", place, e.into()))?;
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            if free < bytes + SPARE_BYTES {
                let (free, needed) = (size(free), size(bytes + SPARE_BYTES));
                let of_files =
                    format!("{} for the files and {} for directories and recovery", size(*bytes), size(SPARE_BYTES));
                let what =
                    format!("the file system of {} has {free} free, {needed} are needed: {of_files}", place.display());
                return Err(Error::new(ErrorKind::Unavailable, what).hint("make room, or choose another disk"));
            }
        }
        Ok(())
    }

    /// Makes the root directories, which only we can enter until [`Target::hand_over_roots`], and marks them.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(&self) -> Result<()> {
        for root in self.roots() {
            must_be_free(root)?;
            fs::create_dir_all(root).map_err(|e| Error::io("create", root, e))?;
            if self.give_away {
                std::os::unix::fs::lchown(root, Some(0), Some(0)).map_err(|e| Error::io("take", root, e))?;
            }
            fs::set_permissions(root, Permissions::from_mode(0o700))
                .map_err(|e| Error::io("set the mode of", root, e))?;
            self.mark(root)?;
        }
        Ok(())
    }

    fn mark(&self, root: &Path) -> Result<()> {
        let mut text = MARK_HEAD.as_bytes().to_vec();
        for root in self.roots() {
            text.push(b'\n');
            text.extend_from_slice(root.as_os_str().as_bytes());
        }
        text.push(b'\n');
        let path = root.join(MARK);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(NO_FOLLOW);
        let written = options.open(&path).and_then(|mut file| file.write_all(&text));
        written.map_err(|e| Error::io("write", &path, e))
    }

    /// Takes the marks away, durably.
    fn unmark(&self) -> Result<()> {
        self.roots().try_for_each(|root| {
            let path = root.join(MARK);
            fs::remove_file(&path).map_err(|e| Error::io("delete", &path, e))?;
            sync_directory(root)
        })
    }

    /// The error of a run that has written something, with what to delete.
    #[must_use]
    pub fn explain(&self, error: Error) -> Error {
        match self.roots().find_map(incomplete) {
            Some(left) => error.hint_too(left),
            None => error,
        }
    }

    /// Where the file that a manifest names goes.
    ///
    /// # Errors
    /// `Corrupt` unless the path is a plain relative one.
    pub fn path(&self, path: &[u8]) -> Result<PathBuf> {
        if path == CONTROL {
            return Ok(self.root.join(UNFINISHED_CONTROL));
        }
        let plain = Path::new(OsStr::from_bytes(path));
        let mut components = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            let mut parsed = Path::new(OsStr::from_bytes(part)).components();
            let normal = matches!((parsed.next(), parsed.next()), (Some(Component::Normal(_)), None));
            if !normal || part.contains(&0) {
                return Err(Error::corrupt(
                    plain.display().to_string(),
                    "a path in the backup leads out of the data directory",
                ));
            }
            components.push(OsStr::from_bytes(part));
        }
        if let [first, oid, rest @ ..] = components.as_slice()
            && *first == OsStr::new("pg_tblspc")
            && let Some(oid) = canonical_decimal(oid.as_bytes())
            && let Some(directory) = self.tablespaces.get(&TablespaceOid::new(oid))
        {
            return Ok(rest.iter().fold(directory.clone(), |path, component| path.join(component)));
        }
        Ok(self.root.join(plain))
    }

    /// Makes a directory at a manifest's path; [`Target::hand_over`] gives it its owner and mode.
    ///
    /// # Errors
    /// When it cannot be made; a root that is there already is no error.
    pub fn make_directory(&self, path: &[u8]) -> Result<()> {
        let path = self.path(path)?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == Io::AlreadyExists && self.roots().any(|root| root == path) => Ok(()),
            Err(e) => Err(Error::io("create", &path, e)),
        }
    }

    /// Gives a directory that was made, and that nothing is written to any more, its owner and mode.
    ///
    /// # Errors
    /// When it cannot be given.
    pub fn hand_over(&self, path: &[u8], owner: Owner) -> Result<()> {
        self.own_directory(&self.path(path)?, owner)
    }

    /// Gives the roots, and a file that its owner may not write to, owner and mode at last.
    ///
    /// # Errors
    /// When they cannot be given.
    pub fn hand_over_roots(&self, owner: Owner) -> Result<()> {
        self.roots().try_for_each(|root| self.own_directory(root, owner))
    }

    /// Sets the mode of a file whose owner may not write to it, which it could while it was restored.
    ///
    /// # Errors
    /// When it cannot be set.
    pub fn close_file(&self, path: &[u8], owner: Owner) -> Result<()> {
        if owner.mode & WRITABLE == WRITABLE {
            return Ok(());
        }
        let path = self.path(path)?;
        let mode = Permissions::from_mode(owner.mode & 0o777);
        fs::set_permissions(&path, mode).map_err(|e| Error::io("set the mode of", &path, e))
    }

    fn own_directory(&self, path: &Path, owner: Owner) -> Result<()> {
        if self.give_away {
            std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid))
                .map_err(|e| Error::io("give away", path, e))?;
        }
        let mode = Permissions::from_mode(owner.mode & 0o777);
        fs::set_permissions(path, mode).map_err(|e| Error::io("set the mode of", path, e))
    }

    /// Makes a file of `len` zero bytes at a manifest's path, open for writing.
    ///
    /// # Errors
    /// When it cannot be made, or is there already.
    pub fn make_file(&self, path: &[u8], len: u64, owner: Owner) -> Result<File> {
        let path = self.path(path)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600).custom_flags(NO_FOLLOW);
        let file = options.open(&path).map_err(|e| Error::io("create", &path, e))?;
        if self.give_away {
            let given = std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid));
            given.map_err(|e| Error::io("give away", &path, e))?;
        }
        if owner.mode & 0o777 != 0o600 {
            let mode = Permissions::from_mode(owner.mode & 0o777 | WRITABLE);
            file.set_permissions(mode).map_err(|e| Error::io("set the mode of", &path, e))?;
        }
        if len > 0 {
            file.set_len(len).map_err(|e| Error::io("extend", &path, e))?;
        }
        Ok(file)
    }

    /// Opens a file that was made, for writing.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_file(&self, path: &[u8]) -> Result<File> {
        let path = self.path(path)?;
        let file = OpenOptions::new().write(true).custom_flags(NO_FOLLOW).open(&path);
        file.map_err(|e| Error::io("open", &path, e))
    }

    /// The bytes of a file that was made, at most `max_len` of them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_file(&self, path: &[u8], max_len: u64) -> Result<Vec<u8>> {
        let path = self.path(path)?;
        let mut bytes = Vec::new();
        let opened = OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(&path);
        let read = opened.and_then(|file| file.take(max_len).read_to_end(&mut bytes));
        read.map(|_| bytes).map_err(|e| Error::io("read", &path, e))
    }

    /// Gives a file that was made other bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn rewrite_file(&self, path: &[u8], bytes: &[u8]) -> Result<()> {
        let mut file = self.open_file(path)?;
        let written = file.set_len(0).and_then(|()| file.write_all(bytes));
        written.map_err(|e| Error::io("write", &self.root.join(OsStr::from_bytes(path)), e))
    }

    /// Makes a file of these bytes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, path: &[u8], bytes: &[u8], owner: Owner) -> Result<()> {
        let mut file = self.make_file(path, 0, owner)?;
        file.write_all(bytes).map_err(|e| Error::io("write", &self.root.join(OsStr::from_bytes(path)), e))
    }

    /// Makes the links of `pg_tblspc` to the tablespaces outside the data directory.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn link_tablespaces(&self, owner: Owner) -> Result<()> {
        for (oid, directory) in &self.tablespaces {
            let link = self.root.join("pg_tblspc").join(oid.as_u32().to_string());
            symlink(directory, &link).map_err(|e| Error::io("create", &link, e))?;
            if self.give_away {
                let given = std::os::unix::fs::lchown(&link, Some(owner.uid), Some(owner.gid));
                given.map_err(|e| Error::io("give away", &link, e))?;
            }
        }
        Ok(())
    }

    /// Opens every root before anything is written, so that [`Roots::sync`] hears of each error of writing since.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open_roots(&self) -> Result<Roots> {
        let mut open = BTreeMap::new();
        for root in self.roots() {
            let file = File::open(root).map_err(|e| Error::io("open", root, e))?;
            let device = file.metadata().map_err(|e| Error::io("look at", root, e))?.dev();
            open.entry(device).or_insert((file, root.to_owned()));
        }
        let parents = self.roots().filter_map(Path::parent).map(Path::to_owned).collect();
        Ok(Roots { open: open.into_values().collect(), parents })
    }

    /// Gives `pg_control` its name, the last step: everything else is durable.
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn finish(&self) -> Result<()> {
        self.unmark()?;
        let unfinished = self.root.join(UNFINISHED_CONTROL);
        let control = self.root.join(OsStr::from_bytes(CONTROL));
        fs::rename(&unfinished, &control).map_err(|e| Error::io("name", &control, e))?;
        sync_directory(&self.root.join("global"))
    }

    /// Makes a file of `len` zero bytes in the root, open for writing, that gets its name by [`Target::name_finished`].
    ///
    /// # Errors
    /// When it cannot be made, or is there already.
    pub fn make_unfinished(&self, name: &str, len: u64, owner: Owner) -> Result<File> {
        self.make_file(format!("{name}{UNFINISHED_SUFFIX}").as_bytes(), len, owner)
    }

    /// Gives files that are durable their names, durably, at last `last`.
    ///
    /// # Errors
    /// When one cannot be given.
    pub fn name_finished<'a>(&self, names: impl IntoIterator<Item = &'a str>, last: &str) -> Result<()> {
        names.into_iter().try_for_each(|name| self.name_one(name))?;
        self.unmark()?;
        self.name_one(last)?;
        sync_directory(&self.root)
    }

    fn name_one(&self, name: &str) -> Result<()> {
        let (unfinished, finished) = (format!("{name}{UNFINISHED_SUFFIX}"), self.root.join(name));
        fs::rename(self.root.join(unfinished), &finished).map_err(|e| Error::io("name", &finished, e))
    }
}

/// Open handles on the file systems that a restore writes to.
#[derive(Debug)]
pub struct Roots {
    open: Vec<(File, PathBuf)>,
    parents: Vec<PathBuf>,
}

impl Roots {
    /// Makes everything durable that was written to those file systems.
    ///
    /// One `syncfs` a file system instead of an `fsync` a file: 50,000 files are made durable in one journal commit. It reports every
    /// error of writing since the handle was opened (Linux 5.8 and newer).
    ///
    /// # Errors
    /// When something did not reach the disk.
    pub fn sync(&self) -> Result<()> {
        for (file, root) in &self.open {
            rustix::fs::syncfs(file).map_err(|e| Error::io("sync", root, e.into()))?;
        }
        // A root may be a mount point, its own name in another file system.
        self.parents.iter().try_for_each(|parent| sync_directory(parent))
    }
}

/// What a file's owner needs while it is restored.
const WRITABLE: u32 = 0o600;
const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

fn sync_directory(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|handle| handle.sync_all());
    synced.map_err(|e| Error::io("sync", directory, e))
}

/// Refuses a directory that is in use. One that has nothing but a mark is as good as empty: `rm -r DIR/*` leaves it there.
fn must_be_free(root: &Path) -> Result<()> {
    let mut entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == Io::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("look into", root, e)),
    };
    if entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == MARK)) {
        return Ok(());
    }
    let here = root.display();
    if let Some(left) = incomplete(root) {
        let what = format!("{here} holds a restore or an export that did not end");
        return Err(Error::invalid(what).hint(format!("if none is running now: {left}")));
    }
    let what = format!("{here} is not empty");
    Err(Error::invalid(what)
        .hint("choose an empty or new directory; a tablespace can be placed elsewhere with --tablespace-map OLD=NEW"))
}

/// What to do about a run that did not end and left something in `root`; nothing if none did.
pub fn incomplete(root: &Path) -> Option<String> {
    let left = left_with(root)?;
    let names: Vec<String> = left.iter().map(|path| path.display().to_string()).collect();
    Some(match &names[..] {
        [one] => format!("{one} is incomplete; delete it, then run the command again"),
        several => format!("{} are incomplete; delete them, then run the command again", several.join(" and ")),
    })
}

/// The roots of a run that did not end and left something in `root`: those that its mark names and that have a mark themselves. Something
/// else may be in the others by now.
fn left_with(root: &Path) -> Option<Vec<PathBuf>> {
    UNFINISHED.iter().find(|name| fs::symlink_metadata(root.join(name)).is_ok())?;
    let mut text = Vec::new();
    // A mark that cannot be read names nobody else.
    let _ = File::open(root.join(MARK)).and_then(|file| file.take(MAX_MARK_LEN).read_to_end(&mut text));
    let lines = text.split(|byte| *byte == b'\n').skip(1).filter(|line| !line.is_empty());
    let named = lines.map(|line| PathBuf::from(OsStr::from_bytes(line)));
    let mut left: Vec<PathBuf> = named.filter(|path| fs::symlink_metadata(path.join(MARK)).is_ok()).collect();
    if left.is_empty() {
        left.push(root.to_owned());
    }
    Some(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { uid: 0, gid: 0, mode: 0o700 };

    fn target(directory: &Path) -> Target {
        let oid = TablespaceOid::new(16384);
        Target::new(&directory.join("data"), BTreeMap::from([(oid, directory.join("space"))])).unwrap()
    }

    #[test]
    fn no_path_of_a_manifest_leads_out() {
        let directory = tempfile::tempdir().unwrap();
        let target = target(directory.path());
        let paths: [&[u8]; 12] = [
            b"",
            b"/",
            b"/etc/passwd",
            b"..",
            b"a/../../b",
            b"a//b",
            b"a/",
            b".",
            b"a/./b",
            b"pg_tblspc/16384/../x",
            b"a\0b",
            b"pg_tblspc//16384",
        ];
        for path in paths {
            let error = target.path(path).map(|path| path.display().to_string());
            assert_eq!(error.map_err(|e| e.kind()), Err(ErrorKind::Corrupt), "{:?}", String::from_utf8_lossy(path));
        }
        let odd = b"base/..foo/\xff\\n \n";
        assert_eq!(target.path(odd).unwrap(), directory.path().join("data").join(OsStr::from_bytes(odd)));
    }

    #[test]
    fn files_of_a_tablespace_go_to_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let target = target(directory.path());
        assert_eq!(target.path(b"pg_tblspc/16384/PG_15/5/1").unwrap(), directory.path().join("space/PG_15/5/1"));
        assert_eq!(target.path(b"pg_tblspc/99/PG_15").unwrap(), directory.path().join("data/pg_tblspc/99/PG_15"));
    }

    #[test]
    fn a_file_is_never_made_twice_nor_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let target = target(directory.path());
        fs::create_dir(directory.path().join("data")).unwrap();
        target.make_file(b"a", 3, OWNER).unwrap();
        assert_eq!(target.make_file(b"a", 3, OWNER).unwrap_err().kind(), ErrorKind::Conflict);
        symlink("/dev/null", directory.path().join("data/b")).unwrap();
        assert!(target.make_file(b"b", 0, OWNER).is_err());
        assert!(target.open_file(b"b").is_err());
    }

    #[test]
    fn directories_in_use_and_nested_ones_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        fs::create_dir(&data).unwrap();
        target(directory.path()).check(&[0, 0]).unwrap();
        fs::write(data.join("x"), "").unwrap();
        assert_eq!(target(directory.path()).check(&[0, 0]).unwrap_err().kind(), ErrorKind::Invalid);
        let nested = BTreeMap::from([(TablespaceOid::new(1), data.join("inside"))]);
        assert_eq!(Target::new(&data, nested).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn an_unfinished_target_says_in_each_of_its_directories_what_to_delete() {
        let directory = tempfile::tempdir().unwrap();
        let (data, space) = (directory.path().join("data"), directory.path().join("space"));
        target(directory.path()).create().unwrap();
        target(directory.path()).check(&[0, 0]).unwrap();
        let both = format!("{} and {} are incomplete; delete them, then run", data.display(), space.display());
        for root in [&data, &space] {
            fs::write(root.join("x"), "").unwrap();
            assert!(incomplete(root).unwrap().starts_with(&both));
        }
        let error = Target::new(&space, BTreeMap::new()).unwrap().check(&[0]).unwrap_err();
        assert!(error.what().ends_with("holds a restore or an export that did not end"), "{error}");
        assert!(error.hint_text().unwrap().contains(&both));
        fs::remove_dir_all(&space).unwrap();
        fs::create_dir(&space).unwrap();
        fs::write(space.join("another"), "").unwrap();
        let one = format!("{} is incomplete; delete it, then run", data.display());
        assert!(incomplete(&data).unwrap().starts_with(&one), "what is in the other directory now is none of ours");
        assert_eq!(incomplete(&space), None);
    }

    #[test]
    fn a_finished_target_has_no_mark() {
        let directory = tempfile::tempdir().unwrap();
        let target = target(directory.path());
        target.create().unwrap();
        target.make_directory(b"global").unwrap();
        target.write_file(CONTROL, b"", OWNER).unwrap();
        assert!(incomplete(target.root()).is_some());
        target.unmark().unwrap();
        assert!(incomplete(target.root()).is_some(), "pg_control has not its name yet");
        target.mark(target.root()).unwrap();
        target.mark(&directory.path().join("space")).unwrap();
        target.finish().unwrap();
        assert_eq!(target.roots().find_map(incomplete), None);
        assert!(target.roots().all(|root| !root.join(MARK).exists()));
    }

    #[test]
    fn a_target_without_room_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = target(directory.path()).check(&[u64::MAX / 4, 0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(!directory.path().join("data").exists());
    }
}
