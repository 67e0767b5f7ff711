//! `extract`: the files of a backup, written out. What `restore` and `export` have in common.
//!
//! ```text
//! choose    read the manifest; see that every pack is there                       [`Chosen`]
//! plan      read the file table; see that the target is free and large enough     [`Tree`] for a directory
//! write     blocks, in the order of the packs                                     [`Writer`]
//! add       what the operation wants besides; PostgreSQL's backup_manifest
//! ```
//!
//! What a repository says is not trusted: what `admit.rs` does not admit is refused before anything is written.

mod admit;
mod chunks;
mod crc;
mod files;
mod tree;
mod unlogged;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::BufWriter;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use self::admit::Admission;
pub(crate) use self::chunks::{Opened, Sink, Writer};
pub(crate) use self::files::{EntryPlace, TargetFile, TargetFiles};
pub(crate) use self::tree::{Choice, Tree, Written};
use self::unlogged::Unlogged;
use crate::error::{Error, ErrorKind, Result};
use crate::os::resolve;
use crate::pg::{
    MajorVersion, PgFileChecksum, PgManifestFile, PgManifestWriter, TablespaceMap, TablespaceOid, WalRange,
};
use crate::repo::{BackupSummary, ClusterName, FileEntry, FileKind, Manifest, Repository, read_page};
use crate::source::PostmasterPid;
use crate::target::{MARK, Owner};

/// Files that whoever writes a backup out makes himself, or that no copy may have.
pub(crate) const REPLACED: [&[u8]; 5] =
    [b"backup_label", b"tablespace_map", b"backup_manifest", b"postmaster.pid", MARK.as_bytes()];
/// The main configuration file.
pub(crate) const CONF: &[u8] = b"postgresql.conf";
/// Bytes of a configuration file at most.
pub(crate) const MAX_CONF_LEN: u64 = 64 << 20;

/// A backup that is to be written out.
pub(crate) struct Chosen<'r> {
    /// Where it is.
    pub repo: &'r Repository,
    /// What the catalog says of it.
    pub backup: BackupSummary,
    /// Its root.
    pub manifest: Manifest,
    /// Whether the copy starts without recovery, which else makes the main forks of unlogged relations.
    pub starts_as_it_is: bool,
}

/// A file as PostgreSQL's `backup_manifest` lists it.
pub(crate) struct Listed<'a> {
    /// Relative to the data directory.
    pub path: &'a [u8],
    /// In bytes.
    pub len: u64,
    /// CRC-32C of its contents.
    pub crc32c: u32,
}

impl<'a> Listed<'a> {
    /// A file of these bytes.
    pub fn of(path: &'a [u8], bytes: &[u8]) -> Self {
        Self { path, len: bytes.len() as u64, crc32c: crc32c::crc32c(bytes) }
    }
}

impl TargetFiles {
    /// Those of the files that are `wanted`, as PostgreSQL lists them.
    pub fn listed<'a>(&'a self, wanted: impl Fn(&TargetFile<'a>) -> bool) -> impl Iterator<Item = Listed<'a>> {
        self.iter().enumerate().filter(move |(_, file)| wanted(file)).map(|(index, file)| Listed {
            path: file.path,
            len: file.len,
            crc32c: self.crc32c(index),
        })
    }
}

impl<'r> Chosen<'r> {
    /// Finds the backup, and that its packs are all there.
    ///
    /// # Errors
    /// `Missing` or `Corrupt` for the backup.
    pub fn find(repo: &'r Repository, cluster: &ClusterName, backup: &str) -> Result<Self> {
        let backup = repo.catalog(cluster)?.select(backup)?;
        let manifest = repo.manifest(cluster, backup.id)?;
        if let Some((object, fault)) = repo.unsound_pack(&manifest)? {
            let hint = "`pgstrata verify` tells which backups are whole; take one of them";
            return Err(Error::corrupt(object.as_str(), fault).hint(hint));
        }
        admit::backup_label(&manifest)?;
        Ok(Self { repo, backup, manifest, starts_as_it_is: false })
    }

    /// Gives each entry of the file table, in order, to `take`, with its place; and what recovery would make, if there is to be none.
    ///
    /// # Errors
    /// `Corrupt` for a file table that contradicts itself; and those of `take`.
    pub fn entries(&self, mut take: impl FnMut(FileEntry, EntryPlace) -> Result<()>) -> Result<()> {
        let mut unlogged = self.starts_as_it_is.then(|| Unlogged::new(&self.manifest));
        let mut admission = Admission::new(&self.manifest);
        for (page, place) in (0..).zip(&self.manifest.pages) {
            let entries = read_page(&**self.repo.store(), &self.manifest.cluster, place)?.entries;
            for (slot, entry) in (0..).zip(entries) {
                let place = EntryPlace { page, slot };
                admission.admit(&entry)?;
                let made = unlogged.as_mut().and_then(|unlogged| unlogged.main_fork(&entry));
                take(entry, place)?;
                made.map_or(Ok(()), |made| take(made, place))?;
            }
        }
        admission.end()
    }

    /// Where the tablespaces outside the data directory go; `map` has new places by the old ones.
    ///
    /// # Errors
    /// `Invalid` for a map that names what the backup does not have, or one directory twice; `Corrupt` for a directory that PostgreSQL would not
    /// have taken, unless it is mapped.
    pub fn tablespaces(&self, map: &[(PathBuf, PathBuf)]) -> Result<BTreeMap<TablespaceOid, PathBuf>> {
        let mut unused: BTreeSet<&Path> = map.iter().map(|(old, _)| old.as_path()).collect();
        if unused.len() != map.len() {
            return Err(Error::invalid("--tablespace-map names an old directory twice"));
        }
        let mut places = BTreeMap::new();
        for tablespace in &self.manifest.tablespaces {
            let Some(location) = &tablespace.location else { continue };
            let old = Path::new(OsStr::from_bytes(&location.0));
            let new = map.iter().find(|(from, _)| from == old).map(|(_, to)| to.as_path());
            if new.is_none() {
                admit::tablespace_place(tablespace.oid, &location.0)?;
            }
            let new = new.unwrap_or(old);
            unused.remove(old);
            places.insert(TablespaceOid::new(tablespace.oid), new.to_owned());
        }
        unused.first().map_or(Ok(places), |old| Err(self.unknown_tablespace(old)))
    }

    fn unknown_tablespace(&self, old: &Path) -> Error {
        let what = format!("the backup has no tablespace in {}", old.display());
        let known: Vec<_> = self.manifest.tablespaces.iter().filter_map(|t| t.location.as_ref()).collect();
        let known: Vec<_> = known.iter().map(|location| String::from_utf8_lossy(&location.0)).collect();
        Error::invalid(what).hint(if known.is_empty() {
            "it has none outside its data directory".to_owned()
        } else {
            format!("its tablespaces are in: {}", known.join(", "))
        })
    }

    /// PostgreSQL's `tablespace_map` with the directories that `place` names: recovery makes the links anew by it. `None` if the backup has
    /// none. One that has no place, as it was dropped before its files were read, is left out: its link would lead to where the original has it.
    ///
    /// # Errors
    /// `Corrupt` if it makes no sense, `Unsupported` if a directory cannot be written in it.
    pub fn tablespace_map(&self, place: impl Fn(TablespaceOid) -> Option<PathBuf>) -> Result<Option<Vec<u8>>> {
        let Some(map) = &self.manifest.tablespace_map else { return Ok(None) };
        let major = self.major()?;
        let mut placed = TablespaceMap::default();
        for (oid, _) in TablespaceMap::parse(&map.0, major)?.iter() {
            if let Some(path) = place(oid) {
                placed.set_location(oid, path.as_os_str().as_bytes().to_vec())?;
            }
        }
        placed.encode(major).map(Some)
    }

    /// PostgreSQL's major version.
    ///
    /// # Errors
    /// `Unsupported` for one that we do not know.
    pub fn major(&self) -> Result<MajorVersion> {
        let major = self.manifest.postgres_major;
        let unknown = || Error::new(ErrorKind::Unsupported, format!("the backup is of PostgreSQL {major}"));
        MajorVersion::new(major).ok_or_else(unknown)
    }

    /// The owner and mode of a file that PostgreSQL did not have in its data directory, or that we make.
    pub fn default_owner(&self) -> Owner {
        let (uid, gid) = self.manifest.data_directory_owner;
        let group_reads = self.manifest.data_directory_mode & 0o040 != 0;
        Owner { uid, gid, mode: if group_reads { 0o640 } else { 0o600 } }
    }

    /// The owner and mode of the data directory.
    pub fn directory_owner(&self) -> Owner {
        Owner { mode: self.manifest.data_directory_mode, ..self.default_owner() }
    }

    /// The owner and mode of a file or directory of the backup.
    pub fn owner_of(&self, entry: &FileEntry) -> Owner {
        match entry.kind {
            FileKind::File | FileKind::Directory => Owner { uid: entry.uid, gid: entry.gid, mode: entry.mode },
            FileKind::Wal | FileKind::External => self.default_owner(),
        }
    }

    /// Writes PostgreSQL's own manifest, by which `pg_verifybackup` checks the files.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_pg_manifest<'a>(&self, file: File, files: impl Iterator<Item = Listed<'a>>) -> Result<()> {
        let manifest = &self.manifest;
        let no_system = |_| Error::corrupt(manifest.id.to_string(), "no system identifier");
        let system = manifest.system_identifier.parse().map_err(no_system)?;
        let failed = |e| Error::io("write", Path::new("backup_manifest"), e);
        let mut out = PgManifestWriter::begin(BufWriter::new(file), self.major()?, system).map_err(failed)?;
        for Listed { path, len, crc32c } in files {
            let checksum = Some(PgFileChecksum::Crc32c(crc32c));
            let file = PgManifestFile { path: path.to_vec(), size: len, last_modified: manifest.stop_time, checksum };
            out.add_file(&file).map_err(failed)?;
        }
        let spans = manifest.wal.iter();
        let range =
            |span: &crate::repo::WalSpan| WalRange { timeline: span.timeline, start: span.start, end: span.end };
        let out = out.finish(&spans.map(range).collect::<Vec<_>>()).map_err(failed)?;
        out.into_inner().map(drop).map_err(|e| failed(e.into_error()))
    }
}

/// Refuses a directory that no backup may be written to, wherever the backup is.
///
/// # Errors
/// `Invalid`, with the reason.
pub(crate) fn must_be_usable(repo: &Repository, target: &Path) -> Result<()> {
    must_lie_apart(repo, target)?;
    match PostmasterPid::read(target)?.filter(PostmasterPid::is_alive) {
        Some(pid) => {
            let what = format!("a server (process {}) runs on {}", pid.pid, target.display());
            Err(Error::invalid(what).hint("choose another directory, or stop it and move its directory away"))
        }
        None => Ok(()),
    }
}

/// Refuses a directory that lies in the repository or in a cluster.
///
/// # Errors
/// `Invalid`, with the reason.
pub(crate) fn must_lie_apart(repo: &Repository, target: &Path) -> Result<()> {
    must_not_overlap(repo, target)?;
    must_not_be_in_a_cluster(target)
}

/// A target in the repository would be lost with it, and the other way round.
fn must_not_overlap(repo: &Repository, target: &Path) -> Result<()> {
    let (repo, target) = (resolve(Path::new(repo.place()))?, resolve(target)?);
    if repo.starts_with(&target) || target.starts_with(&repo) {
        let what = format!("the target {} and the repository {} lie in each other", target.display(), repo.display());
        return Err(Error::invalid(what).hint("choose a directory outside of the repository"));
    }
    Ok(())
}

/// A directory in another cluster's would be backed up with it, and lost with it.
fn must_not_be_in_a_cluster(target: &Path) -> Result<()> {
    let resolved = resolve(target)?;
    if resolved.exists() && !resolved.is_dir() {
        return Err(Error::invalid(format!("{} is not a directory", target.display())));
    }
    let cluster = resolved.ancestors().skip(1).find(|ancestor| ancestor.join("PG_VERSION").is_file());
    match cluster {
        Some(cluster) => {
            let what = format!("{} lies in the data directory {}", target.display(), cluster.display());
            Err(Error::invalid(what).hint("choose a directory outside of it"))
        }
        None => Ok(()),
    }
}
