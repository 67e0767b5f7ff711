//! What a backup is going to do: which cluster, where its bytes come from, what it is compared with.
//!
//! Nothing is changed, here or on the server. What goes wrong: the server that is named runs on another directory than the one that is read; the
//! repository lies in what it backs up; a cluster that is said to be stopped is not.

use std::fmt;
use std::path::Path;

use super::{Options, ParentChoice};
use crate::detect::{Detection, Detector};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::ControlFile;
use crate::repo::{BackupType, Catalog, ClusterName, Manifest, Repository};
use crate::source::{DataDir, Environment, Session};

/// What a backup is going to do.
pub struct Plan<'r> {
    pub(super) repo: &'r Repository,
    pub(super) source: Source,
    pub(super) control: ControlFile,
    pub(super) control_bytes: Vec<u8>,
    pub(super) parent: Option<Manifest>,
    pub(super) backup_type: BackupType,
    pub(super) detection: Detection,
    pub(super) notices: Vec<String>,
    pub(super) repository_damage: Vec<String>,
    pub(super) options: Options,
}

/// Where the cluster's bytes come from.
pub(super) enum Source {
    Live { session: Box<Session>, data_dir: DataDir },
    Offline { data_dir: DataDir },
}

impl Source {
    pub(super) fn data_dir(&self) -> &DataDir {
        match self {
            Source::Live { data_dir, .. } | Source::Offline { data_dir } => data_dir,
        }
    }
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match &self.source {
            Source::Live { session, .. } => format!("from PostgreSQL {}", session.server().version),
            Source::Offline { .. } => "of a stopped cluster".to_owned(),
        };
        write!(f, "{} backup {how}, data directory {}", self.backup_type, self.source.data_dir().path().display())?;
        match &self.parent {
            Some(parent) => write!(f, "\n  compared with {} ({})", parent.id, parent.backup_type)?,
            None => write!(f, "\n  compared with nothing: {}", self.detection.reason)?,
        }
        write!(
            f,
            "\n  stored in {} as cluster {}, {}",
            self.repo.place(),
            self.options.cluster,
            self.options.compression
        )
    }
}

/// Opens what is to be backed up and decides what to compare it with.
///
/// # Errors
/// Whatever makes the backup impossible; nothing was changed, here or on the server.
pub fn plan<'r>(repo: &'r Repository, options: &Options) -> Result<Plan<'r>> {
    let source = open_source(options)?;
    let data_dir = source.data_dir();
    must_lie_elsewhere(data_dir, Path::new(repo.place()))?;
    let (control_bytes, control) = data_dir.read_control()?;
    if let Source::Offline { .. } = source {
        must_be_stopped(data_dir, &control)?;
    }
    let catalog = repo.catalog(&options.cluster)?;
    must_be_the_same_cluster(&catalog, &control)?;
    let notices = catalog.damaged().iter().map(|(_, error)| format!("a backup cannot be read: {error}")).collect();
    let repository_damage = catalog.damaged().iter().map(|(_, error)| error.to_string()).collect();
    let mut plan = Plan {
        repo,
        source,
        control,
        control_bytes,
        parent: None,
        backup_type: BackupType::Full,
        detection: Detection { detector: Detector::Scan, reason: String::new() },
        notices,
        repository_damage,
        options: options.clone(),
    };
    if catalog.backups().is_empty() {
        plan.notices.extend(other_names(repo, &options.cluster, &plan.control)?.iter().map(other_chain));
    }
    plan.choose_parent(&catalog)?;
    Ok(plan)
}

/// The other names under which the repository has backups of this very cluster.
pub(crate) fn other_names(repo: &Repository, own: &ClusterName, control: &ControlFile) -> Result<Vec<ClusterName>> {
    let identifier = control.system_identifier.to_string();
    let is_of_it = |name: &ClusterName| {
        // One that does not read is told to whoever names it.
        let catalog = repo.catalog(name).ok();
        catalog.is_some_and(|catalog| {
            catalog.backups().last().is_some_and(|newest| newest.system_identifier == identifier)
        })
    };
    Ok(repo.clusters()?.into_iter().filter(|name| name != own && is_of_it(name)).collect())
}

fn other_chain(name: &ClusterName) -> String {
    format!("this cluster's backups are under --cluster {name}; this one begins another chain")
}

pub(crate) fn must_lie_elsewhere(data_dir: &DataDir, repo: &Path) -> Result<()> {
    if data_dir.contains(repo)? {
        let what = format!("the repository {} lies in the data directory that it would back up", repo.display());
        return Err(Error::invalid(what).hint("put the repository on another disk"));
    }
    Ok(())
}

pub(super) fn open_source(options: &Options) -> Result<Source> {
    if options.offline {
        let path = options.data_dir.as_deref().ok_or_else(|| {
            Error::invalid("an offline backup needs the data directory").hint("give it with -D, or set PGDATA")
        })?;
        return Ok(Source::Offline { data_dir: DataDir::open(path)? });
    }
    let given = options.data_dir.as_deref().map(DataDir::open).transpose()?;
    let session = connect(options.conninfo.as_deref(), given.as_ref())?;
    let data_dir = match given {
        Some(data_dir) => data_dir,
        None => DataDir::open(&session.server().data_directory)?,
    };
    must_belong_together(&session, &data_dir)?;
    session.must_write_enough_wal()?;
    session.must_be_allowed_to_back_up()?;
    Ok(Source::Live { session: Box::new(session), data_dir })
}

/// Connects to the server that `conninfo` names; if nothing does, to the one that runs on `given`.
pub(crate) fn connect(conninfo: Option<&str>, given: Option<&DataDir>) -> Result<Session> {
    let session = Session::connect(conninfo, given.map(DataDir::path), &Environment::from_process());
    session.map_err(|error| match given {
        Some(data_dir) if !has_a_server(data_dir) => without_server(error, conninfo.is_none(), data_dir),
        _ => error,
    })
}

/// What was tried to connect to is of interest only to who said what that is.
fn without_server(error: Error, is_found_by_directory: bool, data_dir: &DataDir) -> Error {
    let what = format!("no server runs on {}", data_dir.path().display());
    let cure = match data_dir.read_control() {
        Ok((_, control)) if !control.was_stopped_cleanly() => {
            format!("it was not stopped cleanly (pg_control says {}): start it, so that it recovers", control.state)
        }
        _ => "start it, or back it up as it is with --offline".to_owned(),
    };
    match is_found_by_directory {
        true => Error::new(error.kind(), what).because(error.to_string()).hint(cure),
        false => error.hint(format!("{what}: {cure}")),
    }
}

/// A server that runs on another directory would tell us when to read one cluster and how to recover another.
pub(crate) fn must_belong_together(session: &Session, data_dir: &DataDir) -> Result<()> {
    let server = session.server();
    let (_, control) = data_dir.read_control()?;
    let (ours, theirs) = (control.system_identifier, server.system_identifier);
    let here = data_dir.path().display();
    let hint = "give the directory of the server that -d names, or reach the server of that directory with -d";
    if ours != theirs {
        let what =
            format!("{here} is the cluster {ours}, but the server at {} is the cluster {theirs}", session.endpoint());
        return Err(Error::invalid(what).hint(hint));
    }
    if data_dir.is_same_directory(&server.data_directory)? {
        return Ok(());
    }
    // The server may name its directory by a path that only it can see, as in a container; its start time tells then.
    let started = server.postmaster_start_time.as_second();
    let pid = data_dir.postmaster_pid()?.and_then(|pid| pid.start_time);
    let unseen = !server.data_directory.exists();
    if unseen && pid.is_some_and(|second| second.abs_diff(started) <= 1) {
        return Ok(());
    }
    let theirs = server.data_directory.display();
    let what = format!("the server at {} runs on {theirs}, not on {here}", session.endpoint());
    Err(Error::invalid(what).hint(hint))
}

fn has_a_server(data_dir: &DataDir) -> bool {
    data_dir.postmaster_pid().is_ok_and(|pid| pid.is_some_and(|pid| pid.is_alive()))
}

pub(super) fn must_be_stopped(data_dir: &DataDir, control: &ControlFile) -> Result<()> {
    let here = data_dir.path().display();
    if data_dir.postmaster_pid()?.is_some_and(|pid| pid.is_alive()) {
        let what = format!("a server runs on {here}");
        return Err(Error::invalid(what).hint("stop it, or back it up while it runs: without --offline"));
    }
    if control.was_stopped_cleanly() {
        return Ok(());
    }
    let what = format!("the cluster in {here} was not stopped cleanly: pg_control says {}", control.state);
    Err(Error::invalid(what).hint("start it, so that it recovers, and back it up while it runs, or stop it again"))
}

/// A cluster that was started and stopped while it was read is half old, half new, and no WAL repairs it.
pub(super) fn must_be_as_it_was(data_dir: &DataDir, control_bytes: &[u8]) -> Result<()> {
    let (bytes, control) = data_dir.read_control()?;
    must_be_stopped(data_dir, &control)?;
    if bytes != control_bytes {
        let what = format!("the cluster in {} was changed while it was backed up", data_dir.path().display());
        return Err(Error::invalid(what).hint("keep it stopped, or back it up while it runs: without --offline"));
    }
    Ok(())
}

pub(crate) fn must_be_the_same_cluster(catalog: &Catalog, control: &ControlFile) -> Result<()> {
    let ours = control.system_identifier.to_string();
    let Some(other) = catalog.backups().iter().find(|backup| backup.system_identifier != ours) else { return Ok(()) };
    let name = &other.cluster;
    let what = format!(
        "the backups of {name:?} in this repository are of the cluster {}, this one is {ours}",
        other.system_identifier,
        name = name.to_string(),
    );
    Err(Error::new(ErrorKind::Conflict, what)
        .hint("give this cluster a name of its own with --cluster, or use another repository"))
}

impl Plan<'_> {
    fn choose_parent(&mut self, catalog: &Catalog) -> Result<()> {
        let backups = catalog.backups();
        let (chosen, otherwise) = match &self.options.parent {
            ParentChoice::Full => (None, "a full backup was asked for"),
            ParentChoice::Automatic => (backups.last().cloned(), "there is no earlier backup of this cluster"),
            ParentChoice::Differential => {
                let full = backups.iter().rfind(|backup| backup.backup_type.is_full());
                (full.cloned(), "there is no full backup of this cluster")
            }
            ParentChoice::Named(spec) => (Some(catalog.select(spec)?), ""),
        };
        let Some(chosen) = chosen else {
            self.detection.reason = otherwise.to_owned();
            return Ok(());
        };
        let parent = self.repo.manifest(&self.options.cluster, chosen.id)?;
        if let Some(why) = self.unfit(&parent)? {
            if self.options.parent != ParentChoice::Automatic {
                let what = format!("{} cannot be compared with: {why}", parent.id);
                return Err(Error::new(ErrorKind::Corrupt, what).hint("take a full backup: --full"));
            }
            self.notices.push(format!("taking a full backup: {} cannot be compared with: {why}", parent.id));
            self.detection.reason = why;
            return Ok(());
        }
        self.backup_type = BackupType::Incremental;
        self.parent = Some(parent);
        Ok(())
    }

    /// Why nothing can be inherited from `parent`, if so.
    fn unfit(&mut self, parent: &Manifest) -> Result<Option<String>> {
        if parent.block_size != self.control.block_size.as_u32() {
            return Ok(Some(format!("its blocks have {} bytes", parent.block_size)));
        }
        let fault = self.repo.known_fault(parent)?.map(|fault| fault.to_string());
        self.repository_damage.extend(fault.clone());
        Ok(fault)
    }
}
