//! A backup written out as a directory, and a directory for each tablespace outside of it.
//!
//! ```text
//! make      directories
//! write     blocks
//! add       what the operation adds; links to tablespaces
//! hand over owners and modes that would have been in the way
//! sync      everything
//! finish    global/pg_control gets its name; sync
//! ```
//!
//! An interrupted run leaves a directory without `pg_control`, which PostgreSQL refuses to start. The error of a run that failed says so.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::{Chosen, Listed, Opened, Sink, TargetFile, TargetFiles, Writer, must_be_usable, must_lie_apart};
use crate::error::{ErrorKind, Result};
use crate::pg::TablespaceOid;
use crate::progress::{Phase, Progress};
use crate::repo::{FileEntry, FileKind, Manifest, TAKE_ANOTHER};
use crate::target::Target;
use crate::units::{count, size};

/// What is going to be written, and where.
pub(crate) struct Tree<'r> {
    /// The backup.
    pub chosen: Chosen<'r>,
    /// The directories.
    pub target: Target,
    directories: Vec<FileEntry>,
    files: TargetFiles,
}

/// How much was read and written.
pub(crate) struct Written {
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes of the files.
    pub bytes_written: u64,
}

/// What to do with a file of the backup: write it, perhaps under another name, or leave it out. It sees the files before it, too.
pub(crate) type Choice<'a> = dyn Fn(&Manifest, &TargetFiles, FileEntry) -> Option<FileEntry> + 'a;

impl<'r> Tree<'r> {
    /// Decides what goes where, without changing anything.
    ///
    /// # Errors
    /// `Invalid` for a target in use, `Unavailable` for one without room, `Corrupt` for the backup.
    pub fn plan(chosen: Chosen<'r>, target: &Path, map: &[(PathBuf, PathBuf)], choose: &Choice<'_>) -> Result<Self> {
        must_be_usable(chosen.repo, target)?;
        let target = Target::new(target, chosen.tablespaces(map)?)?;
        target.roots().try_for_each(|root| must_lie_apart(chosen.repo, root))?;
        let (mut directories, mut files) = (Vec::new(), TargetFiles::default());
        let mut root_bytes = vec![0; target.roots().count()];
        chosen.entries(|entry, place| {
            if entry.kind == FileKind::Directory {
                target.path(&entry.path)?;
                directories.push(entry);
            } else if let Some(entry) = choose(&chosen.manifest, &files, entry) {
                let path = target.path(&entry.path)?;
                let root = target.roots().position(|root| path.starts_with(root)).unwrap_or(0);
                root_bytes[root] += entry.len;
                files.push(&entry, place, chosen.owner_of(&entry))?;
            }
            Ok(())
        })?;
        target.check(&root_bytes)?;
        Ok(Self { chosen, target, directories, files })
    }

    /// The files.
    pub fn files(&self) -> &TargetFiles {
        &self.files
    }

    /// Whether there is a file of that path.
    pub fn has(&self, path: &[u8]) -> bool {
        self.files.iter().any(|file| file.path == path)
    }

    /// Writes everything; `add` adds files before the links to tablespaces are made, the owners set and everything is durable.
    ///
    /// # Errors
    /// Those of `add`, `Corrupt` for damage in the repository, and whatever cannot be written. Then the target cannot be started.
    pub fn write(
        &self,
        jobs: Option<NonZeroUsize>,
        progress: &dyn Progress,
        add: impl FnOnce() -> Result<()>,
    ) -> Result<Written> {
        self.target.create()?;
        self.write_all(jobs, progress, add)
            .map_err(|error| self.target.explain(error.or_hint(ErrorKind::Corrupt, TAKE_ANOTHER)))
    }

    fn write_all(
        &self,
        jobs: Option<NonZeroUsize>,
        progress: &dyn Progress,
        add: impl FnOnce() -> Result<()>,
    ) -> Result<Written> {
        let Self { chosen, target, .. } = self;
        let bytes_written = self.files.bytes();
        let roots = target.open_roots()?;
        self.directories.iter().try_for_each(|entry| target.make_directory(&entry.path))?;
        progress.begin(Phase::Restoring, bytes_written);
        let bytes_read = AtomicU64::new(0);
        Writer::new(chosen, self, &self.files, jobs, progress, &bytes_read).run()?;
        add()?;
        target.link_tablespaces(chosen.default_owner())?;
        self.hand_over()?;
        progress.begin(Phase::Syncing, 0);
        roots.sync()?;
        target.finish()?;
        self.notice_owners(progress);
        Ok(Written { bytes_read: bytes_read.into_inner(), bytes_written })
    }

    /// Writes PostgreSQL's `backup_manifest`: the `added` files, and those of the backup that are `listed` and not replaced by an added one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_pg_manifest(&self, added: &[(&[u8], Vec<u8>)], listed: impl Fn(&[u8]) -> bool) -> Result<()> {
        let file = self.target.make_file(b"backup_manifest", 0, self.chosen.default_owner())?;
        let replaced = |path: &[u8]| added.iter().any(|(name, _)| *name == path);
        let is_listed = |file: &TargetFile<'_>| file.kind != FileKind::Wal && listed(file.path) && !replaced(file.path);
        let files = self.files.listed(is_listed);
        let added = added.iter().map(|(path, bytes)| Listed::of(path, bytes));
        self.chosen.write_pg_manifest(file, files.chain(added))
    }

    /// Gives files and directories the owners and modes that would have been in the way, the deepest directories first.
    fn hand_over(&self) -> Result<()> {
        for file in self.files.iter() {
            self.target.close_file(file.path, file.owner)?;
        }
        for entry in self.directories.iter().rev() {
            self.target.hand_over(&entry.path, self.chosen.owner_of(entry))?;
        }
        self.target.hand_over_roots(self.chosen.directory_owner())
    }

    fn notice_owners(&self, progress: &dyn Progress) {
        let (uid, _) = self.chosen.manifest.data_directory_owner;
        if !self.target.gives_away() && uid != rustix::process::geteuid().as_raw() {
            progress.notice(&format!(
                "the files belonged to user {uid}; they are yours now, as only root can give them away"
            ));
        }
    }
}

/// What is written where, for people; the operation's name goes before it.
impl fmt::Display for Tree<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.files.bytes();
        let files = count(self.files.len() as u64, "file");
        let manifest = &self.chosen.manifest;
        let (id, kind) = (manifest.id, manifest.backup_type);
        write!(f, "{id} ({kind}) to {}: {files}, {}", self.target.root().display(), size(bytes))?;
        for tablespace in &manifest.tablespaces {
            let oid = TablespaceOid::new(tablespace.oid);
            if let (Some(old), Some(new)) = (&tablespace.location, self.target.tablespace(oid)) {
                let old = String::from_utf8_lossy(&old.0);
                write!(
                    f,
                    "\n  tablespace {oid}: {} -> {}",
                    old.escape_debug(),
                    new.display().to_string().escape_debug()
                )?;
            }
        }
        Ok(())
    }
}

impl Sink for Tree<'_> {
    fn make(&self, _: usize, file: TargetFile<'_>) -> Result<Opened> {
        let made = self.target.make_file(file.path, file.len, file.owner)?;
        if file.kind == FileKind::Wal && file.len > 0 {
            // PostgreSQL counts on room in its WAL files (wal_init_zero). A file system that cannot promise it does as for the original.
            let _ = rustix::fs::fallocate(&made, rustix::fs::FallocateFlags::empty(), 0, file.len);
        }
        Ok(Opened { file: Arc::new(made), begin: 0 })
    }

    fn open(&self, _: usize, file: TargetFile<'_>) -> Result<Opened> {
        Ok(Opened { file: Arc::new(self.target.open_file(file.path)?), begin: 0 })
    }
}
