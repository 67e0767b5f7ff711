//! What of a backup may be written out: a repository is not trusted.
//!
//! Its checksums prove that nothing was damaged, not that nobody forged it. So whatever decides where something is written, and how much, is
//! compared here with what a backup can say, and refused as damage while nothing is written yet:
//!
//! * entries ascend, so no path is there twice; each lies in a directory that is an entry, too, so no file lies in a file;
//! * WAL lies in `pg_wal`, configuration files from outside in the root, what is in a tablespace in its directory of this PostgreSQL version: whoever
//!   says where a tablespace was can have that directory made there, and nothing else;
//! * a file has as many block maps as its length says (`chunks.rs` sees to their blocks), and all lengths together have a sum;
//! * a tablespace that is not mapped goes to a path that PostgreSQL would have taken, and `backup_label` to where the manifest says that replay begins.
//!
//! That a path has no `..` in it and leads through no link is the business of [`Target`](crate::target::Target). What is *in* a file is not judged: whoever
//! starts a server on a restored directory trusts who made the backup.

use std::collections::{BTreeSet, HashSet};

use crate::error::{Error, Result};
use crate::pg::{BackupLabel, WalSegmentSize, canonical_decimal};
use crate::repo::{FileEntry, FileKind, Manifest, PART_BLOCKS};

/// Bytes of all files at most, so that what archives add has room in the sum.
const MAX_TOTAL_LEN: u64 = 1 << 60;
/// Bytes of a tablespace's path at most. PostgreSQL: `src/include/pg_config_manual.h`, `MAXPGPATH`.
const MAX_PLACE_LEN: usize = 1024;
const CONTROL: &[u8] = b"global/pg_control";

/// Admits the entries of a file table, in order.
pub(super) struct Admission<'a> {
    manifest: &'a Manifest,
    version_dir: String,
    /// Tablespaces outside the data directory.
    outside: BTreeSet<u32>,
    directories: HashSet<Vec<u8>>,
    last_path: Option<Vec<u8>>,
    total_len: u64,
    has_control: bool,
}

impl<'a> Admission<'a> {
    /// Before the first entry.
    pub fn new(manifest: &'a Manifest) -> Self {
        let outside = manifest.tablespaces.iter().filter(|tablespace| tablespace.location.is_some());
        Self {
            manifest,
            version_dir: manifest.tablespace_version_dir(),
            outside: outside.map(|tablespace| tablespace.oid).collect(),
            directories: HashSet::new(),
            last_path: None,
            total_len: 0,
            has_control: false,
        }
    }

    /// Admits the next entry.
    ///
    /// # Errors
    /// `Corrupt`, with the entry's path.
    pub fn admit(&mut self, entry: &FileEntry) -> Result<()> {
        if self.last_path.as_ref().is_some_and(|last| *last >= entry.path) {
            return Err(Error::corrupt(shown(&entry.path), "the file table is out of order"));
        }
        if !self.is_in_its_place(entry) {
            return Err(Error::corrupt(shown(&entry.path), "no backup has such a file there"));
        }
        let blocks = entry.len.div_ceil(u64::from(self.manifest.block_size));
        if entry.parts.len() as u64 != blocks.div_ceil(u64::from(PART_BLOCKS)) {
            let what = format!("the file has {} block maps for {blocks} blocks", entry.parts.len());
            return Err(Error::corrupt(shown(&entry.path), what));
        }
        let total = self.total_len.checked_add(entry.len).filter(|total| *total <= MAX_TOTAL_LEN);
        self.total_len =
            total.ok_or_else(|| Error::corrupt(shown(&entry.path), "the files have no sensible length"))?;
        if entry.kind == FileKind::Directory {
            self.directories.insert(entry.path.clone());
        }
        self.has_control |= entry.path == CONTROL && entry.kind == FileKind::File;
        self.last_path = Some(entry.path.clone());
        Ok(())
    }

    /// After the last entry.
    ///
    /// # Errors
    /// `Corrupt` if something is not there without which there is no cluster.
    pub fn end(self) -> Result<()> {
        if self.has_control {
            return Ok(());
        }
        Err(Error::corrupt(self.manifest.id.to_string(), "the backup has no global/pg_control"))
    }

    fn is_in_its_place(&self, entry: &FileEntry) -> bool {
        let path = entry.path.as_slice();
        let is_name = |name: &[u8]| !name.is_empty() && !name.contains(&b'/');
        match entry.kind {
            FileKind::External => path.strip_prefix(b"/").is_some_and(is_name),
            FileKind::Wal => self.has_directory(path) && path.strip_prefix(b"pg_wal/").is_some_and(is_name),
            FileKind::File | FileKind::Directory => self.has_directory(path) && self.may_be_in_tablespace(path),
        }
    }

    fn has_directory(&self, path: &[u8]) -> bool {
        path.iter().rposition(|byte| *byte == b'/').is_none_or(|slash| self.directories.contains(&path[..slash]))
    }

    /// In a tablespace outside the data directory there is only the directory of this version.
    fn may_be_in_tablespace(&self, path: &[u8]) -> bool {
        let mut components = path.splitn(4, |byte| *byte == b'/');
        let (first, oid, version) = (components.next(), components.next(), components.next());
        let oid = oid.filter(|_| first == Some(b"pg_tblspc")).and_then(canonical_decimal);
        let is_outside = oid.is_some_and(|oid| self.outside.contains(&oid));
        !is_outside || version.is_none_or(|version| version == self.version_dir.as_bytes())
    }
}

/// A path for an error message, whatever is in it.
fn shown(path: &[u8]) -> String {
    let (begin, rest) = path.split_at(path.len().min(200));
    let dots = if rest.is_empty() { "" } else { "..." };
    format!("{}{dots}", String::from_utf8_lossy(begin).escape_debug())
}

/// Refuses the directory of a tablespace that PostgreSQL would not have taken.
///
/// PostgreSQL: `src/backend/commands/tablespace.c`, `CreateTableSpace`.
///
/// # Errors
/// `Corrupt`, with the path.
pub(super) fn tablespace_place(oid: u32, path: &[u8]) -> Result<()> {
    let is_plain = |component: &[u8]| !matches!(component, b"" | b"." | b"..");
    let rest = path.strip_prefix(b"/").filter(|_| path.len() < MAX_PLACE_LEN && !path.contains(&0));
    if rest.is_some_and(|rest| rest.split(|byte| *byte == b'/').all(is_plain)) {
        return Ok(());
    }
    let what = format!("tablespace {oid} cannot have been in {}", shown(path));
    Err(Error::corrupt("the tablespaces of the manifest", what)
        .hint("place it elsewhere with --tablespace-map OLD=NEW"))
}

/// Refuses a `backup_label` by which replay would begin elsewhere than the manifest says.
///
/// # Errors
/// `Corrupt`, with the line.
pub(super) fn backup_label(manifest: &Manifest) -> Result<()> {
    let Some(label) = &manifest.backup_label else { return Ok(()) };
    let label = BackupLabel::parse(&label.0)?;
    if let Some(size) = WalSegmentSize::new(manifest.wal_segment_size) {
        label.start_segment(size)?;
    }
    let begins = (label.start_lsn, label.start_timeline);
    if begins == (manifest.start_lsn, manifest.start_timeline) && label.incremental_from.is_none() {
        return Ok(());
    }
    let what = format!(
        "replay begins at {} on timeline {}, says the manifest, but not backup_label",
        manifest.start_lsn, manifest.start_timeline
    );
    Err(Error::corrupt(manifest.id.to_string(), what))
}
