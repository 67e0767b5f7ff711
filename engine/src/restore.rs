//! `restore`: from a backup to a directory on which PostgreSQL starts.
//!
//! ```text
//! plan      read the manifest and the file table; see that every pack is there and the target is free and large enough
//! make      directories
//! write     blocks, in the order of the packs (restore/chunks.rs)
//! add       backup_label, tablespace_map, recovery settings, backup_manifest; links to tablespaces
//! sync      everything
//! finish    global/pg_control gets its name; sync
//! ```
//!
//! An interrupted restore is a directory without `pg_control`, which PostgreSQL refuses to start.
//!
//! The restored cluster recovers by archive recovery from its own `pg_wal` (`recovery.signal`, a `restore_command` that finds nothing), so it
//! ends on a new timeline and can never continue the original's WAL; `archive_mode` is off unless asked for (`restore/config.rs`). The source's
//! signal files are left out.
//!
//! What goes wrong: damage in the repository, noticed before a byte of it is written; a full disk, noticed by the plan or by the write; a path that
//! leads out of the target (`target/mod.rs`).

mod chunks;
mod config;
mod crc;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::Serialize;

use self::chunks::{TargetFile, Writer};
use self::config::Wanted;
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    MajorVersion, PgFileChecksum, PgManifestFile, PgManifestWriter, TablespaceMap, TablespaceOid, WalRange,
};
use crate::progress::{Phase, Progress};
use crate::repo::{BackupSummary, ClusterName, FileEntry, FileKind, Lease, Manifest, Operation, Repository, read_page};
use crate::source::PostmasterPid;
use crate::target::{Owner, Target, resolve};

/// Files of the source that a restored cluster gets its own of, or none.
const REPLACED: [&[u8]; 6] =
    [b"recovery.signal", b"standby.signal", b"backup_label", b"tablespace_map", b"backup_manifest", b"postmaster.pid"];
/// The settings file that is read last.
const AUTO_CONF: &[u8] = b"postgresql.auto.conf";
const CONF: &[u8] = b"postgresql.conf";
/// Bytes of a configuration file at most.
const MAX_CONF_LEN: u64 = 64 << 20;

/// Where to restore to and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The new data directory: empty, or not there.
    pub target: PathBuf,
    /// New directories of tablespaces, by their old ones.
    pub tablespace_map: Vec<(PathBuf, PathBuf)>,
    /// Whether the restored cluster may archive its WAL as the source did.
    pub archive_mode: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
}

/// What a restore did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// The new data directory.
    pub target: PathBuf,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the repository.
    pub bytes_read: u64,
    /// Bytes of the restored files.
    pub bytes_written: u64,
}

/// What a restore is going to do.
pub struct Plan<'r> {
    repo: &'r Repository,
    backup: BackupSummary,
    manifest: Manifest,
    target: Target,
    directories: Vec<FileEntry>,
    files: Vec<TargetFile>,
    options: Options,
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: u64 = self.files.iter().map(|file| file.entry.len).sum();
        let count = self.files.len();
        let (id, kind) = (self.manifest.id, self.manifest.backup_type);
        write!(f, "restore {id} ({kind}) to {}: {count} files, {bytes} bytes", self.target.root().display())?;
        for tablespace in &self.manifest.tablespaces {
            let oid = TablespaceOid::new(tablespace.oid);
            if let (Some(old), Some(new)) = (&tablespace.location, self.target.tablespace(oid)) {
                write!(f, "\n  tablespace {oid}: {} -> {}", String::from_utf8_lossy(&old.0), new.display())?;
            }
        }
        Ok(())
    }
}

/// Decides what to restore and where, without changing anything.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup, `Invalid` for a target in use, `Unavailable` for one without room.
pub fn plan<'r>(repo: &'r Repository, cluster: &ClusterName, backup: &str, options: &Options) -> Result<Plan<'r>> {
    let backup = repo.catalog(cluster)?.select(backup)?;
    let manifest = repo.manifest(cluster, backup.id)?;
    packs_must_be_there(repo, &manifest)?;
    must_not_overlap(repo, &options.target)?;
    must_not_be_in_a_cluster(&options.target)?;
    if let Some(pid) = PostmasterPid::read(&options.target)?.filter(PostmasterPid::is_alive) {
        let what = format!("a server (process {}) runs on {}", pid.pid, options.target.display());
        return Err(Error::invalid(what).hint("restore to another directory, or stop it and move its directory away"));
    }
    let target = Target::new(&options.target, tablespaces(&manifest, &options.tablespace_map)?)?;
    for root in target.roots() {
        must_not_overlap(repo, root)?;
    }
    let mut directories = Vec::new();
    let mut files = Vec::new();
    let mut last_path: Option<Vec<u8>> = None;
    for page in &manifest.pages {
        for entry in read_page(&**repo.store(), cluster, page)?.entries {
            if last_path.as_ref().is_some_and(|last| *last >= entry.path) {
                return Err(Error::corrupt(entry.display_path(), "the file table is out of order"));
            }
            last_path = Some(entry.path.clone());
            add_entry(entry, &manifest, &target, &mut directories, &mut files)?;
        }
    }
    files.sort_unstable_by(|a, b| a.entry.path.cmp(&b.entry.path));
    let mut bytes = vec![0; target.roots().count()];
    for file in &files {
        let path = target.path(&file.entry.path)?;
        let root = target.roots().position(|root| path.starts_with(root)).unwrap_or(0);
        bytes[root] += file.entry.len;
    }
    target.check(&bytes)?;
    Ok(Plan { repo, backup, manifest, target, directories, files, options: options.clone() })
}

/// Takes an entry of the file table into the plan, unless the restored cluster gets its own file of that name.
fn add_entry(
    mut entry: FileEntry,
    manifest: &Manifest,
    target: &Target,
    directories: &mut Vec<FileEntry>,
    files: &mut Vec<TargetFile>,
) -> Result<()> {
    match entry.kind {
        FileKind::Directory => {
            target.path(&entry.path)?;
            directories.push(entry);
            return Ok(());
        }
        FileKind::File => {
            let replaced = REPLACED.contains(&entry.path.as_slice()) || (manifest.config_outside && entry.path == CONF);
            // Files from outside the data directory come first in the table: nothing sorts before a slash.
            if replaced || files.iter().take(2).any(|file| file.entry.path == entry.path) {
                return Ok(());
            }
        }
        FileKind::External => {
            entry.path = entry.path.strip_prefix(b"/").map(<[u8]>::to_vec).unwrap_or(entry.path);
        }
        FileKind::Wal => {}
    }
    target.path(&entry.path)?;
    parts_must_fit(manifest, &entry)?;
    let owner = owner_of(manifest, &entry);
    files.push(TargetFile::new(entry, owner));
    Ok(())
}

/// Restores a backup.
///
/// # Errors
/// As [`plan`]; and `Corrupt` for damage in the repository. Then the target cannot be started.
pub fn run(
    repo: &Repository,
    cluster: &ClusterName,
    backup: &str,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report> {
    let begun = Instant::now();
    let notice = |text: &str| progress.notice(text);
    let (_lease, backup) = Lease::of_backup(repo, cluster, backup, Operation::Restore, None, &notice)?;
    plan(repo, cluster, &backup.id.to_string(), options)?.execute(begun, progress)
}

fn packs_must_be_there(repo: &Repository, manifest: &Manifest) -> Result<()> {
    let Some((object, fault)) = repo.unsound_pack(manifest)? else { return Ok(()) };
    let hint = "`pgstrata verify` tells which backups are whole; restore one of them";
    Err(Error::corrupt(object.as_str(), fault).hint(hint))
}

/// A target in the repository would be lost with it, and the other way round.
fn must_not_overlap(repo: &Repository, target: &Path) -> Result<()> {
    let (repo, target) = (resolve(Path::new(repo.place()))?, resolve(target)?);
    if repo.starts_with(&target) || target.starts_with(&repo) {
        let what = format!("the target {} and the repository {} lie in each other", target.display(), repo.display());
        return Err(Error::invalid(what).hint("restore to a directory outside of the repository"));
    }
    Ok(())
}

/// A directory in another cluster's would be backed up with it, and lost with it.
fn must_not_be_in_a_cluster(target: &Path) -> Result<()> {
    let resolved = resolve(target)?;
    if resolved.join("global/pg_control.unfinished").exists() {
        let what = format!("{} holds a restore that did not end", target.display());
        return Err(Error::invalid(what).hint("delete it and restore again"));
    }
    if resolved.exists() && !resolved.is_dir() {
        return Err(Error::invalid(format!("{} is not a directory", target.display())));
    }
    let cluster = resolved.ancestors().skip(1).find(|ancestor| ancestor.join("PG_VERSION").is_file());
    match cluster {
        Some(cluster) => {
            let what = format!("{} lies in the data directory {}", target.display(), cluster.display());
            Err(Error::invalid(what).hint("restore to a directory outside of it"))
        }
        None => Ok(()),
    }
}

/// A file's maps must not have more blocks than its length says.
fn parts_must_fit(manifest: &Manifest, entry: &FileEntry) -> Result<()> {
    let blocks = entry.len.div_ceil(u64::from(manifest.block_size));
    if entry.parts.len() as u64 > blocks.div_ceil(u64::from(crate::repo::PART_BLOCKS)) {
        return Err(Error::corrupt(entry.display_path(), "the file has more block maps than blocks"));
    }
    Ok(())
}

/// Where the tablespaces outside the data directory go.
fn tablespaces(manifest: &Manifest, map: &[(PathBuf, PathBuf)]) -> Result<BTreeMap<TablespaceOid, PathBuf>> {
    let mut unused: BTreeSet<&Path> = map.iter().map(|(old, _)| old.as_path()).collect();
    if unused.len() != map.len() {
        return Err(Error::invalid("--tablespace-map names an old directory twice"));
    }
    let mut places = BTreeMap::new();
    for tablespace in &manifest.tablespaces {
        let Some(location) = &tablespace.location else { continue };
        let old = Path::new(OsStr::from_bytes(&location.0));
        let new = map.iter().find(|(from, _)| from == old).map_or(old, |(_, to)| to);
        unused.remove(old);
        places.insert(TablespaceOid::new(tablespace.oid), new.to_owned());
    }
    match unused.first() {
        Some(old) => {
            let what = format!("the backup has no tablespace in {}", old.display());
            let known: Vec<_> = manifest.tablespaces.iter().filter_map(|t| t.location.as_ref()).collect();
            let known: Vec<_> = known.iter().map(|location| String::from_utf8_lossy(&location.0)).collect();
            let known = if known.is_empty() {
                "it has none outside its data directory".to_owned()
            } else {
                format!("its tablespaces are in: {}", known.join(", "))
            };
            Err(Error::invalid(what).hint(known))
        }
        None => Ok(places),
    }
}

/// The owner and mode of a file that PostgreSQL did not have in its data directory, or that we make.
fn default_owner(manifest: &Manifest) -> Owner {
    let (uid, gid) = manifest.data_directory_owner;
    let group_reads = manifest.data_directory_mode & 0o040 != 0;
    Owner { uid, gid, mode: if group_reads { 0o640 } else { 0o600 } }
}

fn directory_owner(manifest: &Manifest) -> Owner {
    Owner { mode: manifest.data_directory_mode, ..default_owner(manifest) }
}

fn owner_of(manifest: &Manifest, entry: &FileEntry) -> Owner {
    match entry.kind {
        FileKind::File | FileKind::Directory => Owner { uid: entry.uid, gid: entry.gid, mode: entry.mode },
        FileKind::Wal | FileKind::External => default_owner(manifest),
    }
}

impl Plan<'_> {
    fn execute(self, begun: Instant, progress: &dyn Progress) -> Result<Report> {
        let manifest = &self.manifest;
        let bytes_written = self.files.iter().map(|file| file.entry.len).sum();
        self.target.create()?;
        let roots = self.target.open_roots()?;
        for entry in &self.directories {
            self.target.make_directory(&entry.path)?;
        }
        progress.begin(Phase::Restoring, bytes_written);
        let bytes_read = AtomicU64::new(0);
        let processors = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let writer = Writer {
            repo: self.repo,
            manifest,
            target: &self.target,
            files: &self.files,
            jobs: self.options.jobs.unwrap_or(processors).get(),
            progress,
            bytes_read: &bytes_read,
        };
        writer.run()?;
        self.add_files(progress)?;
        self.target.link_tablespaces(default_owner(manifest))?;
        self.hand_over()?;
        progress.begin(Phase::Syncing, 0);
        roots.sync()?;
        self.target.finish()?;
        self.notice_owners(progress);
        Ok(Report {
            target: self.target.root().to_owned(),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read: bytes_read.into_inner(),
            bytes_written,
            backup: self.backup,
        })
    }

    /// Gives files and directories the owners and modes that would have been in the way, the deepest directories first.
    fn hand_over(&self) -> Result<()> {
        for file in &self.files {
            self.target.close_file(&file.entry.path, file.owner)?;
        }
        for entry in self.directories.iter().rev() {
            self.target.hand_over(&entry.path, owner_of(&self.manifest, entry))?;
        }
        self.target.hand_over_roots(directory_owner(&self.manifest))
    }

    fn notice_owners(&self, progress: &dyn Progress) {
        let (uid, _) = self.manifest.data_directory_owner;
        if !self.target.gives_away() && uid != rustix::process::geteuid().as_raw() {
            progress.notice(&format!(
                "the files belonged to user {uid}; they are yours now, as only root can give them away"
            ));
        }
    }

    /// Adds what PostgreSQL needs to recover from this directory.
    fn add_files(&self, progress: &dyn Progress) -> Result<()> {
        let manifest = &self.manifest;
        let owner = default_owner(manifest);
        let mut written: Vec<(&[u8], Vec<u8>)> = Vec::new();
        if let Some(label) = &manifest.backup_label {
            written.push((b"backup_label", label.0.clone()));
        }
        if let Some(map) = self.tablespace_map()? {
            written.push((b"tablespace_map", map));
        }
        if !self.has(CONF) {
            written.push((CONF, config::postgresql_conf(&manifest.settings, manifest.config_outside)));
        }
        for (name, text) in [(&b"pg_hba.conf"[..], "local all all peer\n"), (b"pg_ident.conf", "")] {
            if !self.has(name) {
                let text = format!("# Written by pgstrata restore: the backup has no such file.\n{text}");
                written.push((name, text.into_bytes()));
            }
        }
        for (name, bytes) in &written {
            self.target.write_file(name, bytes, owner)?;
        }
        if let Some(conf) = self.confine(progress)? {
            written.push((CONF, conf));
        }
        self.write_pg_manifest(&written)?;
        self.configure()?;
        self.target.write_file(b"recovery.signal", b"", owner)
    }

    /// Takes out of the restored `postgresql.conf` what leads to the original.
    fn confine(&self, progress: &dyn Progress) -> Result<Option<Vec<u8>>> {
        if !self.has(CONF) {
            return Ok(None);
        }
        let Some((conf, removed)) = config::confined(&self.target.read_file(CONF, MAX_CONF_LEN)?) else {
            return Ok(None);
        };
        for line in removed {
            progress.notice(&format!("taken out of the restored postgresql.conf, as it leads to the original: {line}"));
        }
        self.target.rewrite_file(CONF, &conf)?;
        Ok(Some(conf))
    }

    fn has(&self, path: &[u8]) -> bool {
        self.files.binary_search_by(|file| file.entry.path.as_slice().cmp(path)).is_ok()
    }

    /// PostgreSQL's `tablespace_map` with the directories of the target: recovery makes the links anew by it.
    fn tablespace_map(&self) -> Result<Option<Vec<u8>>> {
        let Some(map) = self.manifest.tablespace_map.as_ref().filter(|map| !map.0.is_empty()) else { return Ok(None) };
        let major = self.major()?;
        let map = TablespaceMap::parse(&map.0, major)?.remap(|oid, old| {
            let new = self.target.tablespace(oid).map(|path| path.as_os_str().as_bytes().to_vec());
            Ok(new.unwrap_or_else(|| old.to_vec()))
        })?;
        map.encode(major).map(Some)
    }

    fn major(&self) -> Result<MajorVersion> {
        let major = self.manifest.postgres_major;
        let unknown = || Error::new(ErrorKind::Unsupported, format!("the backup is of PostgreSQL {major}"));
        MajorVersion::new(major).ok_or_else(unknown)
    }

    /// PostgreSQL's own manifest, by which `pg_verifybackup` checks the directory.
    fn write_pg_manifest(&self, added: &[(&[u8], Vec<u8>)]) -> Result<()> {
        let manifest = &self.manifest;
        let major = self.major()?;
        let system = manifest
            .system_identifier
            .parse()
            .map_err(|_| Error::corrupt(manifest.id.to_string(), "no system identifier"))?;
        let failed = |e| Error::io("write", Path::new("backup_manifest"), e);
        let file = self.target.make_file(b"backup_manifest", 0, default_owner(manifest))?;
        let mut out = PgManifestWriter::begin(std::io::BufWriter::new(file), major, system).map_err(failed)?;
        let described = |path: &[u8], size, crc| PgManifestFile {
            path: path.to_vec(),
            size,
            last_modified: manifest.stop_time,
            checksum: Some(PgFileChecksum::Crc32c(crc)),
        };
        let rewritten = |path: &[u8]| added.iter().any(|(name, _)| *name == path);
        let listed = |file: &&TargetFile| {
            let TargetFile { entry, .. } = file;
            entry.kind != FileKind::Wal && entry.path != AUTO_CONF && !rewritten(&entry.path)
        };
        for file in self.files.iter().filter(listed) {
            out.add_file(&described(&file.entry.path, file.entry.len, file.crc32c())).map_err(failed)?;
        }
        for (path, bytes) in added {
            out.add_file(&described(path, bytes.len() as u64, crc32c::crc32c(bytes))).map_err(failed)?;
        }
        let ranges: Vec<WalRange> = manifest
            .wal
            .iter()
            .map(|span| WalRange { timeline: span.timeline, start: span.start, end: span.end })
            .collect();
        let out = out.finish(&ranges).map_err(failed)?;
        out.into_inner().map(drop).map_err(|e| failed(e.into_error()))
    }

    /// Overrides every setting by which the source may have recovered, replicated or archived.
    fn configure(&self) -> Result<()> {
        let wanted = Wanted {
            major: self.major()?,
            archive_mode: self.options.archive_mode,
            in_place: self.manifest.tablespaces.iter().any(|tablespace| tablespace.location.is_none()),
        };
        if self.has(AUTO_CONF) {
            let source = self.target.read_file(AUTO_CONF, MAX_CONF_LEN)?;
            return self.target.rewrite_file(AUTO_CONF, &config::auto_conf(&source, wanted));
        }
        self.target.write_file(AUTO_CONF, &config::auto_conf(b"", wanted), default_owner(&self.manifest))
    }
}
