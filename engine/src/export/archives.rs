//! A backup as tar archives.
//!
//! Where each member of an archive lies is known before a byte is written: its headers, its length, rounded up to 512. So an archive is made
//! with its final length, and the workers of a restore fill it, each block at the place of its member; zero blocks stay holes.
//!
//! | archive | members |
//! |---|---|
//! | `OID.tar` | a tablespace outside the data directory, from `PG_<major>_<catalog version>/` on |
//! | `base.tar` | `backup_label`, `tablespace_map`, the data directory with an empty `pg_wal`, at last `global/pg_control` |
//! | `pg_wal.tar` | what belongs into `pg_wal` |
//! | `backup_manifest` | no archive: PostgreSQL's manifest, beside them |
//!
//! The backup of a stopped cluster has no `tablespace_map`, which works together with a `backup_label` only; there the links of `pg_tblspc` are
//! members. Tablespaces in place are in `base.tar`: extracted they are where they belong, whereas the archives that PostgreSQL 16 and
//! later make of them have to be put there by hand.
//!
//! Headers are as PostgreSQL makes them (`src/port/tar.c`, `tarCreateHeader`): the plain POSIX format, names of users and groups always
//! `postgres`. Only for what that has no room for, where PostgreSQL fails: long names are split or get GNU's long name entry.
//!
//! Everything is written under names that end in `.unfinished` and gets its own when all is durable, `backup_manifest` last. An interrupted export has
//! no `backup_manifest`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use tar::{Builder, EntryType, Header};

use super::files::archived_marks;
use crate::error::{Error, ErrorKind, Result};
use crate::extract::{
    Choice, Chosen, EntryPlace, Listed, Opened, Sink, TargetFile, TargetFiles, Writer, Written, must_be_usable,
};
use crate::pg::{TablespaceOid, canonical_decimal};
use crate::progress::{Phase, Progress};
use crate::repo::{FileEntry, FileKind, TAKE_ANOTHER};
use crate::target::{Owner, Target};
use crate::units::{count, size};

/// What an archive's parts are rounded up to.
const BLOCK_LEN: u64 = 512;
/// Two zero blocks end an archive.
const END_LEN: u64 = 2 * BLOCK_LEN;
/// The user and group that PostgreSQL names.
const USER_NAME: &str = "postgres";
const CONTROL: &[u8] = b"global/pg_control";
const MANIFEST: &str = "backup_manifest";
const LABEL: &[u8] = b"backup_label";
const MAP: &[u8] = b"tablespace_map";

/// The archives to write.
pub(super) struct Archives<'r> {
    chosen: Chosen<'r>,
    target: Target,
    files: TargetFiles,
    /// For each file, in which archive its bytes are, and where.
    places: Vec<(usize, u64)>,
    archives: Vec<Archive>,
}

/// An archive and what is in it.
struct Archive {
    name: String,
    members: Vec<Member>,
    len: u64,
}

/// A member of an archive.
struct Member {
    name: Vec<u8>,
    content: Content,
    owner: Owner,
    header_at: u64,
}

enum Content {
    Directory,
    Link(PathBuf),
    /// Bytes of the backup, so many.
    File(u64),
    /// Bytes that we add.
    Made(Vec<u8>),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Content::Directory | Content::Link(_) => 0,
            Content::File(len) => *len,
            Content::Made(bytes) => bytes.len() as u64,
        }
    }
}

impl Member {
    /// The headers, as they stand in the archive.
    fn headers(&self, modified: Timestamp) -> Result<Vec<u8>> {
        let mut header = Header::new_ustar();
        header.set_mode(self.owner.mode & 0o7777);
        header.set_uid(self.owner.uid.into());
        header.set_gid(self.owner.gid.into());
        header.set_size(self.content.len());
        header.set_mtime(u64::try_from(modified.as_second()).unwrap_or(0));
        let mut archive = Builder::new(Vec::new());
        let path = Path::new(OsStr::from_bytes(&self.name));
        let appended = name_owner(&mut header).and_then(|()| match &self.content {
            Content::Link(to) => {
                header.set_entry_type(EntryType::Symlink);
                archive.append_link(&mut header, path, to)
            }
            Content::Directory => {
                header.set_entry_type(EntryType::Directory);
                archive.append_data(&mut header, path.join(""), io::empty())
            }
            Content::File(_) | Content::Made(_) => {
                header.set_entry_type(EntryType::Regular);
                archive.append_data(&mut header, path, io::empty())
            }
        });
        appended.map_err(|e| Error::io("put into an archive", path, e))?;
        // Taken out before the builder adds the archive's end.
        Ok(std::mem::take(archive.get_mut()))
    }
}

fn name_owner(header: &mut Header) -> io::Result<()> {
    header.set_username(USER_NAME)?;
    header.set_groupname(USER_NAME)?;
    header.set_device_major(0)?;
    header.set_device_minor(0)
}

impl Archive {
    fn new(name: String) -> Self {
        Self { name, members: Vec::new(), len: 0 }
    }

    /// Adds a member, and says where its bytes begin.
    fn push(&mut self, name: &[u8], content: Content, owner: Owner) -> Result<u64> {
        let member = Member { name: name.to_owned(), content, owner, header_at: self.len };
        // Headers are as long whatever the time.
        let begin = self.len + member.headers(Timestamp::UNIX_EPOCH)?.len() as u64;
        self.len = begin + member.content.len().next_multiple_of(BLOCK_LEN);
        self.members.push(member);
        Ok(begin)
    }

    /// Writes everything but what the backup holds.
    fn write_frame(&self, file: &File, modified: Timestamp) -> Result<()> {
        for member in &self.members {
            let mut bytes = member.headers(modified)?;
            if let Content::Made(made) = &member.content {
                bytes.extend_from_slice(made);
            }
            let written = file.write_all_at(&bytes, member.header_at);
            written.map_err(|e| Error::io("write", self.name.as_ref(), e))?;
        }
        Ok(())
    }
}

/// Which archive takes which path.
struct Layout {
    tablespaces: BTreeMap<TablespaceOid, usize>,
    archives: Vec<Archive>,
    files: TargetFiles,
    places: Vec<(usize, u64)>,
}

impl Layout {
    fn new(tablespaces: impl Iterator<Item = TablespaceOid>) -> Self {
        let tablespaces: BTreeMap<_, _> = tablespaces.enumerate().map(|(at, oid)| (oid, at)).collect();
        let names = tablespaces.keys().map(|oid| format!("{oid}.tar"));
        let names = names.chain(["base.tar", "pg_wal.tar"].map(str::to_owned));
        let archives = names.map(Archive::new).collect();
        Self { tablespaces, archives, files: TargetFiles::default(), places: Vec::new() }
    }

    fn base(&mut self) -> &mut Archive {
        let at = self.tablespaces.len();
        &mut self.archives[at]
    }

    fn wal(&mut self) -> &mut Archive {
        let at = self.tablespaces.len() + 1;
        &mut self.archives[at]
    }

    /// The archive of a path and the name that it has there; `None` for a tablespace's root, which is in no archive.
    fn place<'p>(&self, path: &'p [u8], kind: FileKind) -> Option<(usize, &'p [u8])> {
        let base = self.tablespaces.len();
        if kind == FileKind::Wal {
            return Some((base + 1, path.strip_prefix(b"pg_wal/").unwrap_or(path)));
        }
        let Some((archive, rest)) = self.in_tablespace(path) else { return Some((base, path)) };
        rest.strip_prefix(b"/").map(|name| (archive, name))
    }

    /// The archive of the tablespace that a path is in, and the rest of the path.
    fn in_tablespace<'p>(&self, path: &'p [u8]) -> Option<(usize, &'p [u8])> {
        let below = path.strip_prefix(b"pg_tblspc/")?;
        let (oid, rest) = below.split_at(below.iter().position(|byte| *byte == b'/').unwrap_or(below.len()));
        Some((*self.tablespaces.get(&TablespaceOid::new(canonical_decimal(oid)?))?, rest))
    }

    fn add(&mut self, chosen: &Chosen<'_>, entry: &FileEntry, at: EntryPlace) -> Result<()> {
        let owner = chosen.owner_of(entry);
        let Some((archive, name)) = self.place(&entry.path, entry.kind) else { return Ok(()) };
        if entry.kind == FileKind::Directory {
            return self.archives[archive].push(name, Content::Directory, owner).map(drop);
        }
        let begin = self.archives[archive].push(name, Content::File(entry.len), owner)?;
        self.places.push((archive, begin));
        self.files.push(entry, at, owner)
    }

    /// Adds what we make of the backup's manifest.
    fn add_made(&mut self, chosen: &Chosen<'_>, map: Option<Vec<u8>>) -> Result<()> {
        let label = chosen.manifest.backup_label.as_ref().map(|label| label.0.clone());
        for (name, bytes) in [(LABEL, label), (MAP, map)] {
            if let Some(bytes) = bytes {
                self.base().push(name, Content::Made(bytes), chosen.default_owner())?;
            }
        }
        Ok(())
    }

    /// Adds what is in the file table, but returns `pg_control`.
    fn add_entries(
        &mut self,
        chosen: &Chosen<'_>,
        target: &Target,
        choose: &Choice<'_>,
    ) -> Result<Option<(FileEntry, EntryPlace)>> {
        let mut control = None;
        chosen.entries(|entry, at| {
            target.path(&entry.path)?;
            let chosen_entry = match entry.kind {
                FileKind::Directory => Some(entry),
                _ => choose(&chosen.manifest, &self.files, entry),
            };
            match chosen_entry {
                Some(entry) if entry.path == CONTROL => control = Some((entry, at)),
                Some(entry) => self.add(chosen, &entry, at)?,
                None => {}
            }
            Ok(())
        })?;
        Ok(control)
    }

    fn add_links(&mut self, chosen: &Chosen<'_>, spaces: BTreeMap<TablespaceOid, PathBuf>) -> Result<()> {
        let owner = Owner { mode: 0o777, ..chosen.default_owner() };
        spaces.into_iter().try_for_each(|(oid, directory)| {
            let name = format!("pg_tblspc/{oid}");
            self.base().push(name.as_bytes(), Content::Link(directory), owner).map(drop)
        })
    }

    fn add_marks(&mut self, chosen: &Chosen<'_>) -> Result<()> {
        for mark in archived_marks(chosen, &self.files)? {
            let name = mark.strip_prefix(b"pg_wal/").unwrap_or(&mark);
            self.wal().push(name, Content::Made(Vec::new()), chosen.default_owner())?;
        }
        Ok(())
    }
}

impl<'r> Archives<'r> {
    /// Decides what goes where, without changing anything.
    ///
    /// # Errors
    /// `Invalid` for a target in use, `Unavailable` for one without room, `Corrupt` for the backup.
    pub fn plan(chosen: Chosen<'r>, target: &Path, map: &[(PathBuf, PathBuf)], choose: &Choice<'_>) -> Result<Self> {
        must_be_usable(chosen.repo, target)?;
        let spaces = chosen.tablespaces(map)?;
        if let Some(path) = spaces.values().find(|path| !path.is_absolute()) {
            return Err(Error::invalid(format!("the tablespace path {} is not absolute", path.display())));
        }
        let target = Target::new(target, BTreeMap::new())?;
        let mut layout = Layout::new(spaces.keys().copied());
        let map = chosen.tablespace_map(|oid| spaces.get(&oid).cloned())?;
        let has_map = map.is_some();
        layout.add_made(&chosen, map)?;
        let control = layout.add_entries(&chosen, &target, choose)?;
        if !has_map {
            layout.add_links(&chosen, spaces)?;
        }
        control.map_or(Ok(()), |(entry, at)| layout.add(&chosen, &entry, at))?;
        layout.add_marks(&chosen)?;
        let Layout { mut archives, files, places, .. } = layout;
        archives.iter_mut().for_each(|archive| archive.len += END_LEN);
        target.check(&[archives.iter().map(|archive| archive.len).sum()])?;
        Ok(Self { chosen, target, files, places, archives })
    }

    fn len(&self) -> u64 {
        self.archives.iter().map(|archive| archive.len).sum()
    }

    /// Writes everything.
    ///
    /// # Errors
    /// `Corrupt` for damage in the repository, and whatever cannot be written. Then nothing has its name.
    pub fn write(&self, jobs: Option<NonZeroUsize>, progress: &dyn Progress) -> Result<Written> {
        self.target.create()?;
        self.write_all(jobs, progress)
            .map_err(|error| self.target.explain(error.or_hint(ErrorKind::Corrupt, TAKE_ANOTHER)))
    }

    fn write_all(&self, jobs: Option<NonZeroUsize>, progress: &dyn Progress) -> Result<Written> {
        let roots = self.target.open_roots()?;
        let open = OpenArchives { places: &self.places, open: self.make()? };
        progress.begin(Phase::Restoring, self.files.bytes());
        for (archive, file) in self.archives.iter().zip(&open.open) {
            archive.write_frame(file, self.chosen.manifest.stop_time)?;
        }
        let bytes_read = AtomicU64::new(0);
        Writer::new(&self.chosen, &open, &self.files, jobs, progress, &bytes_read).run()?;
        self.write_pg_manifest()?;
        self.target.hand_over_roots(our_own(self.chosen.directory_owner()))?;
        progress.begin(Phase::Syncing, 0);
        roots.sync()?;
        self.target.name_finished(self.archives.iter().map(|archive| archive.name.as_str()), MANIFEST)?;
        Ok(Written { bytes_read: bytes_read.into_inner(), bytes_written: self.len() })
    }

    fn make(&self) -> Result<Vec<Arc<File>>> {
        let owner = our_own(self.chosen.default_owner());
        let make = |archive: &Archive| self.target.make_unfinished(&archive.name, archive.len, owner).map(Arc::new);
        self.archives.iter().map(make).collect()
    }

    fn write_pg_manifest(&self) -> Result<()> {
        let file = self.target.make_unfinished(MANIFEST, 0, our_own(self.chosen.default_owner()))?;
        let base = &self.archives[self.archives.len() - 2];
        let made = base.members.iter().filter_map(|member| match &member.content {
            Content::Made(bytes) => Some(Listed::of(&member.name, bytes)),
            _ => None,
        });
        let stored = self.files.listed(|file| file.kind != FileKind::Wal);
        self.chosen.write_pg_manifest(file, made.chain(stored))
    }

    /// The backup, the directory, and the names in it.
    pub fn into_parts(self) -> (Chosen<'r>, Target, Vec<String>) {
        let names = self.archives.into_iter().map(|archive| archive.name);
        (self.chosen, self.target, names.chain([MANIFEST.to_owned()]).collect())
    }
}

/// What is written where, for people; the operation's name goes before it.
impl fmt::Display for Archives<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let manifest = &self.chosen.manifest;
        let (id, kind, files) = (manifest.id, manifest.backup_type, count(self.files.len() as u64, "file"));
        write!(f, "{id} ({kind}) to {}: {files}, {}", self.target.root().display(), size(self.len()))?;
        self.archives.iter().try_for_each(|archive| write!(f, "\n  {}: {}", archive.name, size(archive.len)))
    }
}

/// Archives are ours, whosever the files in them are.
fn our_own(owner: Owner) -> Owner {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Owner { uid, gid, mode: owner.mode }
}

/// The archives, open for writing.
struct OpenArchives<'a> {
    places: &'a [(usize, u64)],
    open: Vec<Arc<File>>,
}

impl Sink for OpenArchives<'_> {
    fn make(&self, index: usize, file: TargetFile<'_>) -> Result<Opened> {
        self.open(index, file)
    }

    fn open(&self, index: usize, _: TargetFile<'_>) -> Result<Opened> {
        let (archive, begin) = self.places[index];
        Ok(Opened { file: Arc::clone(&self.open[archive]), begin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { uid: 70, gid: 71, mode: 0o640 };

    fn headers(name: &[u8], content: Content) -> Vec<u8> {
        let member = Member { name: name.to_owned(), content, owner: OWNER, header_at: 0 };
        member.headers(Timestamp::from_second(1_700_000_000).unwrap()).unwrap()
    }

    #[test]
    fn a_header_is_as_postgresql_makes_it() {
        let bytes = headers(b"base/5/112", Content::File(8192));
        let expected: [(usize, &[u8]); 11] = [
            (0, b"base/5/112\0"),
            (100, b"0000640\0"),
            (108, b"0000106\0"),
            (116, b"0000107\0"),
            (124, b"00000020000\0"),
            (136, b"14524770400\0"),
            (156, b"0\0"),
            (257, b"ustar\x0000postgres\0"),
            (297, b"postgres\0"),
            (329, b"0000000\0"),
            (337, b"0000000\0"),
        ];
        assert_eq!(bytes.len(), 512);
        for (at, field) in expected {
            assert_eq!(&bytes[at..at + field.len()], field, "at {at}");
        }
        let sum: u32 = bytes
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
            .sum();
        assert_eq!(&bytes[148..155], format!("{sum:07o}").as_bytes());
    }

    #[test]
    fn directories_end_in_a_slash_and_links_lead_somewhere() {
        let directory = headers(b"base", Content::Directory);
        assert_eq!((&directory[..6], directory[156]), (&b"base/\0"[..], b'5'));
        let link = headers(b"pg_tblspc/1", Content::Link("/space".into()));
        assert_eq!((&link[..12], link[156], &link[157..164]), (&b"pg_tblspc/1\0"[..], b'2', &b"/space\0"[..]));
    }

    #[test]
    fn a_file_of_8_gib_has_its_length_in_binary() {
        let len = |content| headers(b"a", Content::File(content))[124..136].to_owned();
        assert_eq!(len((8 << 30) - 1), b"77777777777\0");
        assert_eq!(len(8 << 30), [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
        assert_eq!(len(0x0123_4567_89AB), [0x80, 0, 0, 0, 0, 0, 0x01, 0x23, 0x45, 0x67, 0x89, 0xAB]);
    }

    #[test]
    fn long_names_and_links_have_room() {
        for (name, link) in
            [("n".repeat(300), "l".repeat(300)), (format!("{}/{}", "d".repeat(99), "n".repeat(99)), "l".repeat(100))]
        {
            let target = PathBuf::from(format!("/{link}"));
            let mut bytes = headers(name.as_bytes(), Content::Link(target.clone()));
            assert_eq!(bytes.len() % 512, 0);
            bytes.extend([0; 1024]);
            let mut archive = tar::Archive::new(bytes.as_slice());
            let entries: Vec<_> = archive.entries().unwrap().map(|entry| entry.unwrap()).collect();
            assert_eq!(entries.len(), 1);
            assert_eq!(*entries[0].path_bytes(), *name.as_bytes());
            assert_eq!(entries[0].link_name().unwrap().unwrap(), target);
        }
    }

    #[test]
    fn each_path_has_its_archive() {
        let layout = Layout::new([TablespaceOid::new(7), TablespaceOid::new(16384)].into_iter());
        let names: Vec<_> = layout.archives.iter().map(|archive| archive.name.as_str()).collect();
        assert_eq!(names, ["7.tar", "16384.tar", "base.tar", "pg_wal.tar"]);
        let place = |path: &'static str, kind| {
            let (archive, name) = layout.place(path.as_bytes(), kind)?;
            Some((names[archive], std::str::from_utf8(name).unwrap()))
        };
        assert_eq!(place("pg_tblspc/16384", FileKind::Directory), None);
        assert_eq!(place("pg_tblspc/16384/PG_15/5/1", FileKind::File), Some(("16384.tar", "PG_15/5/1")));
        assert_eq!(place("pg_tblspc/8/PG_15", FileKind::Directory), Some(("base.tar", "pg_tblspc/8/PG_15")));
        assert_eq!(place("pg_tblspc", FileKind::Directory), Some(("base.tar", "pg_tblspc")));
        assert_eq!(place("pg_wal", FileKind::Directory), Some(("base.tar", "pg_wal")));
        assert_eq!(place("pg_wal/00000001", FileKind::Wal), Some(("pg_wal.tar", "00000001")));
    }
}
