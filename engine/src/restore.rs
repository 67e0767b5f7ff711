//! `restore`: from a backup to a directory on which PostgreSQL starts.
//!
//! ```text
//! plan      read the manifest and the file table; see that every pack is there and the target is free and large enough
//! make      directories
//! write     blocks, in the order of the packs (extract/chunks.rs)
//! add       backup_label, tablespace_map, recovery settings, backup_manifest; links to tablespaces
//! sync      everything
//! finish    global/pg_control gets its name; sync
//! ```
//!
//! All but what is added it has in common with `export` (`extract.rs`). An interrupted restore is a directory without `pg_control`, which
//! PostgreSQL refuses to start.
//!
//! The restored cluster recovers by archive recovery from its own `pg_wal` (`recovery.signal`, a `restore_command` that finds nothing), so it
//! ends on a new timeline and can never continue the original's WAL; `archive_mode` is off unless asked for (`restore/config.rs`). The source's
//! signal files are left out.
//!
//! What goes wrong: damage in the repository, noticed before a byte of it is written; a full disk, noticed by the plan or by the write; a path that
//! leads out of the target (`target/mod.rs`).

pub(crate) mod config;

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use self::config::Wanted;
use crate::error::Result;
use crate::extract::{CONF, Chosen, MAX_CONF_LEN, REPLACED, TargetFiles, Tree};
use crate::progress::Progress;
use crate::repo::{BackupSummary, ClusterName, FileEntry, FileKind, Lease, Manifest, Operation, Repository};

/// Files of the source that would make a restored cluster recover otherwise.
const SIGNALS: [&[u8]; 2] = [b"recovery.signal", b"standby.signal"];
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
    tree: Tree<'r>,
    options: Options,
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "restore {}", self.tree)
    }
}

/// Decides what to restore and where, without changing anything.
///
/// # Errors
/// `Missing` or `Corrupt` for the backup, `Invalid` for a target in use, `Unavailable` for one without room.
pub fn plan<'r>(repo: &'r Repository, cluster: &ClusterName, backup: &str, options: &Options) -> Result<Plan<'r>> {
    let chosen = Chosen::find(repo, cluster, backup)?;
    config::must_be_settings(&chosen.manifest.settings)?;
    let tree = Tree::plan(chosen, &options.target, &options.tablespace_map, &choose)?;
    Ok(Plan { tree, options: options.clone() })
}

/// Takes a file into the plan, unless the restored cluster gets its own file of that name.
fn choose(manifest: &Manifest, files: &TargetFiles, mut entry: FileEntry) -> Option<FileEntry> {
    match entry.kind {
        FileKind::File => {
            let path = entry.path.as_slice();
            let outside = manifest.config_outside && path == CONF;
            // Files from outside the data directory come first in the table: nothing sorts before a slash.
            let taken = || files.iter().take(2).any(|file| file.path == path);
            let replaced = REPLACED.contains(&path) || SIGNALS.contains(&path) || outside || taken();
            (!replaced).then_some(entry)
        }
        FileKind::External => {
            entry.path = entry.path.strip_prefix(b"/").map(<[u8]>::to_vec).unwrap_or(entry.path);
            Some(entry)
        }
        FileKind::Wal | FileKind::Directory => Some(entry),
    }
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
    let (_lease, backup) = Lease::of_backup(repo, cluster, backup, Operation::Restore, &notice)?;
    plan(repo, cluster, &backup.id.to_string(), options)?.execute(begun, progress)
}

impl Plan<'_> {
    fn execute(self, begun: Instant, progress: &dyn Progress) -> Result<Report> {
        let written = self.tree.write(self.options.jobs, progress, || self.add_files(progress))?;
        Ok(Report {
            target: self.tree.target.root().to_owned(),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read: written.bytes_read,
            bytes_written: written.bytes_written,
            backup: self.tree.chosen.backup,
        })
    }

    /// Adds what PostgreSQL needs to recover from this directory.
    fn add_files(&self, progress: &dyn Progress) -> Result<()> {
        let Chosen { manifest, .. } = &self.tree.chosen;
        let target = &self.tree.target;
        let owner = self.tree.chosen.default_owner();
        let mut written: Vec<(&[u8], Vec<u8>)> = Vec::new();
        if let Some(label) = &manifest.backup_label {
            written.push((b"backup_label", label.0.clone()));
        }
        let map = self.tree.chosen.tablespace_map(|oid| target.tablespace(oid).map(PathBuf::from))?;
        if let Some(map) = map.filter(|map| !map.is_empty()) {
            written.push((b"tablespace_map", map));
        }
        if !self.tree.has(CONF) {
            written.push((CONF, config::postgresql_conf(&manifest.settings, manifest.config_outside)));
        }
        for (name, text) in [(&b"pg_hba.conf"[..], "local all all peer\n"), (b"pg_ident.conf", "")] {
            if !self.tree.has(name) {
                let text = format!("# Written by pgstrata restore: the backup has no such file.\n{text}");
                written.push((name, text.into_bytes()));
            }
        }
        for (name, bytes) in &written {
            target.write_file(name, bytes, owner)?;
        }
        if let Some(conf) = self.confine(progress)? {
            written.push((CONF, conf));
        }
        self.tree.write_pg_manifest(&written, |path| path != AUTO_CONF)?;
        self.configure()?;
        target.write_file(b"recovery.signal", b"", owner)
    }

    /// Takes out of the restored `postgresql.conf` what leads to the original.
    fn confine(&self, progress: &dyn Progress) -> Result<Option<Vec<u8>>> {
        if !self.tree.has(CONF) {
            return Ok(None);
        }
        let Some((conf, removed)) = config::confined(&self.tree.target.read_file(CONF, MAX_CONF_LEN)?) else {
            return Ok(None);
        };
        for line in removed {
            progress.notice(&format!("taken out of the restored postgresql.conf, as it leads to the original: {line}"));
        }
        self.tree.target.rewrite_file(CONF, &conf)?;
        Ok(Some(conf))
    }

    /// Overrides every setting by which the source may have recovered, replicated or archived.
    fn configure(&self) -> Result<()> {
        let Tree { chosen, target, .. } = &self.tree;
        let wanted = Wanted {
            major: chosen.major()?,
            archive_mode: self.options.archive_mode,
            in_place: chosen.manifest.tablespaces.iter().any(|tablespace| tablespace.location.is_none()),
        };
        if self.tree.has(AUTO_CONF) {
            let source = target.read_file(AUTO_CONF, MAX_CONF_LEN)?;
            return target.rewrite_file(AUTO_CONF, &config::auto_conf(&source, wanted));
        }
        target.write_file(AUTO_CONF, &config::auto_conf(b"", wanted), chosen.default_owner())
    }
}
