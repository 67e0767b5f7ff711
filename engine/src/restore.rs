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
//! ends on a new timeline and can never continue the original's WAL; `archive_mode` is off unless asked for. Every recovery setting that the source may have
//! had is overridden at the end of `postgresql.auto.conf`, which is read last; its signal files are left out.
//!
//! What goes wrong: damage in the repository, noticed before a byte of it is written; a full disk, noticed by the plan or by the write; a path that
//! leads out of the target (`target/mod.rs`).

mod chunks;

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
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{
    MajorVersion, PgFileChecksum, PgManifestFile, PgManifestWriter, TablespaceMap, TablespaceOid, WalRange,
};
use crate::progress::{Phase, Progress};
use crate::repo::{BackupSummary, ClusterName, FileEntry, FileKind, Manifest, PackInfo, Repository, read_page};
use crate::source::PostmasterPid;
use crate::target::{Owner, Target, resolve};

/// Files of the source that a restored cluster gets its own of, or none.
const REPLACED: [&[u8]; 6] =
    [b"recovery.signal", b"standby.signal", b"backup_label", b"tablespace_map", b"backup_manifest", b"postmaster.pid"];
/// The settings file that is read last.
const AUTO_CONF: &[u8] = b"postgresql.auto.conf";

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
            target.path(&entry.path)?;
            last_path = Some(entry.path.clone());
            match entry.kind {
                FileKind::Directory => directories.push(entry),
                FileKind::File if REPLACED.contains(&entry.path.as_slice()) => {}
                FileKind::File | FileKind::Wal | FileKind::External => {
                    parts_must_fit(&manifest, &entry)?;
                    let owner = owner_of(&manifest, &entry);
                    files.push(TargetFile::new(entry, owner));
                }
            }
        }
    }
    let mut bytes = vec![0; target.roots().count()];
    for file in &files {
        let path = target.path(&file.entry.path)?;
        let root = target.roots().position(|root| path.starts_with(root)).unwrap_or(0);
        bytes[root] += file.entry.len;
    }
    target.check(&bytes)?;
    Ok(Plan { repo, backup, manifest, target, directories, files, options: options.clone() })
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
    plan(repo, cluster, backup, options)?.execute(begun, progress)
}

fn packs_must_be_there(repo: &Repository, manifest: &Manifest) -> Result<()> {
    let present = repo.packs(&manifest.cluster)?;
    for PackInfo { name, len } in &manifest.packs {
        let object = name.object(&manifest.cluster)?;
        let problem = match present.get(&object) {
            Some(found) if found == len => continue,
            Some(found) => format!("has {found} bytes instead of {len}"),
            None => "is missing".to_owned(),
        };
        let hint = "`pgstrata verify` tells which backups are whole; restore one of them";
        return Err(Error::corrupt(object.as_str(), format!("a pack of this backup {problem}")).hint(hint));
    }
    Ok(())
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
            Err(Error::invalid(what).hint(format!("its tablespaces are in: {}", known.join(", "))))
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
        self.target.create(directory_owner(manifest))?;
        let roots = self.target.open_roots()?;
        for entry in &self.directories {
            self.target.make_directory(&entry.path, owner_of(manifest, entry))?;
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
        self.add_files()?;
        self.target.link_tablespaces(default_owner(manifest))?;
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

    fn notice_owners(&self, progress: &dyn Progress) {
        let (uid, _) = self.manifest.data_directory_owner;
        if !self.target.gives_away() && uid != rustix::process::geteuid().as_raw() {
            progress.notice(&format!(
                "the files belonged to user {uid}; they are yours now, as only root can give them away"
            ));
        }
    }

    /// Adds what PostgreSQL needs to recover from this directory.
    fn add_files(&self) -> Result<()> {
        let manifest = &self.manifest;
        let owner = default_owner(manifest);
        let mut added: Vec<(&[u8], Vec<u8>)> = Vec::new();
        if let Some(label) = &manifest.backup_label {
            added.push((b"backup_label", label.0.clone()));
        }
        if let Some(map) = self.tablespace_map()? {
            added.push((b"tablespace_map", map));
        }
        if !self.has(b"postgresql.conf") {
            added.push((b"postgresql.conf", self.postgresql_conf()));
        }
        for (name, text) in [(&b"pg_hba.conf"[..], "local all all peer\n"), (b"pg_ident.conf", "")] {
            if !self.has(name) {
                let text = format!("# Written by pgstrata restore: the backup has no such file.\n{text}");
                added.push((name, text.into_bytes()));
            }
        }
        for (name, bytes) in &added {
            self.target.write_file(name, bytes, owner)?;
        }
        self.write_pg_manifest(&added)?;
        self.append_settings()?;
        self.target.write_file(b"recovery.signal", b"", owner)
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

    /// The source's settings, where its configuration file lay outside the data directory.
    fn postgresql_conf(&self) -> Vec<u8> {
        let mut text =
            b"# Written by pgstrata restore: the source's configuration file was not in its data directory.\n\
            # These are the settings that it had from there.\n"
                .to_vec();
        for setting in &self.manifest.settings {
            text.extend_from_slice(setting.name.as_bytes());
            text.extend_from_slice(b" = ");
            text.extend_from_slice(&setting.value.0);
            text.push(b'\n');
        }
        text
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
        let listed = |file: &&TargetFile| file.entry.kind != FileKind::Wal && file.entry.path != AUTO_CONF;
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
    fn append_settings(&self) -> Result<()> {
        use std::io::{Seek, SeekFrom, Write};
        let owner = default_owner(&self.manifest);
        let mut file = match self.has(AUTO_CONF) {
            true => self.target.open_file(AUTO_CONF)?,
            false => self.target.make_file(AUTO_CONF, 0, owner)?,
        };
        let mut text = recovery_settings(self.major()?, self.options.archive_mode);
        if self.manifest.tablespaces.iter().any(|tablespace| tablespace.location.is_none()) {
            // Recovery refuses a tablespace in place otherwise (xlogrecovery.c, CheckTablespaceDirectory).
            text.push_str("allow_in_place_tablespaces = on\n");
        }
        let appended = file.seek(SeekFrom::End(0)).and_then(|_| file.write_all(text.as_bytes()));
        appended.map_err(|e| Error::io("write", Path::new("postgresql.auto.conf"), e))
    }
}

/// What is appended to `postgresql.auto.conf`.
///
/// `restore_command` must be set for archive recovery; one that finds nothing makes the server take its own `pg_wal`.
/// PostgreSQL: `src/backend/access/transam/xlogrecovery.c`, `validateRecoveryParameters`.
fn recovery_settings(major: MajorVersion, archive_mode: bool) -> String {
    let mut settings = vec![
        ("restore_command", "exit 1"),
        ("recovery_end_command", ""),
        ("archive_cleanup_command", ""),
        ("recovery_target", ""),
        ("recovery_target_name", ""),
        ("recovery_target_time", ""),
        ("recovery_target_xid", ""),
        ("recovery_target_lsn", ""),
        ("recovery_target_timeline", "latest"),
        ("recovery_target_action", "promote"),
        ("recovery_min_apply_delay", "0"),
        ("primary_conninfo", ""),
        ("primary_slot_name", ""),
    ];
    if major.as_u32() < 16 {
        settings.push(("promote_trigger_file", ""));
    }
    if !archive_mode {
        settings.push(("archive_mode", "off"));
    }
    let lines = settings.iter().map(|(name, value)| format!("{name} = '{value}'\n"));
    format!(
        "\n# Added by pgstrata restore: nothing of the source's recovery, replication and archiving goes on here.\n{}",
        lines.collect::<String>()
    )
}
