//! `backup`: from a running or stopped cluster to one more backup in the repository.
//!
//! ```text
//! plan      open the server and the data directory, see that they belong together, choose the parent
//! start     pg_backup_start; a temporary slot keeps the WAL
//! list      only now: what appears later is in the WAL
//! detect    which blocks may have changed since the parent (backup/changes.rs)
//! copy      every file but pg_control, compared with the parent (backup/copy.rs)
//! control   pg_control, last
//! stop      pg_backup_stop; its backup_label and tablespace_map are part of the backup
//! WAL       from start to stop, out of pg_wal (backup/wal.rs), proved record by record; void if replay could not repeat it
//! commit    the file table, then the manifest: now it is a backup
//! ```
//!
//! A backup that fails anywhere is no backup: its packs are removed again, or stay, where the run was killed, as litter that no
//! manifest names. The server's side ends with the session: closing the connection ends backup mode and drops the slot.
//!
//! What goes wrong, and who notices: the session breaks (each worker asks before each slice; `pg_backup_stop` at the latest), the standby is
//! promoted (`pg_backup_stop`), pages are damaged (`backup/judge.rs`), the parent's packs are not all there (the plan; then a full
//! backup is made, and said so), the parent's metadata is damaged (the copy; the backup fails).

mod advice;
mod audit;
mod changes;
mod copy;
mod feed;
mod judge;
mod part;
mod rate;
mod salvage;
mod wal;

use std::collections::HashMap;
use std::fmt;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

pub(crate) use self::advice::SWITCH_ON_SUMMARIES;
use self::audit::Audit;
pub use self::audit::{AuditReport, Cause, MissedBlock};
pub(crate) use self::changes::{Forecast, Question};
use self::copy::{Changes, Content, Copier, Item, Totals};
use self::judge::{Judge, Suspect};
use self::rate::RateLimit;
use self::salvage::Salvage;
use self::wal::WalRange;
pub use crate::chunk::Compression;
pub use crate::detect::DetectorChoice;
use crate::detect::{ChangeMap, Detection, Detector};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{BackupLabel, ClusterState, ControlFile, Lsn, RelationFile, TimelineId};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupId, BackupSummary, BackupType, ByteString, Catalog, ClusterName, CorruptPage, FORMAT_VERSION, FileEntry,
    FileKind, Lease, LeaseRequest, MAX_CORRUPT_PAGES, Manifest, Operation, PackKind, PackName, Packer, PagePlace,
    Repository, Setting, Stack, TableCursor, TableWriter, TablespaceLocation, WalSpan, with_lengths,
};
use crate::source::{DataDir, Entry, EntryKind, Environment, FileSetting, Listing, Session, Tablespace};

/// How often a backup is tried that something in the meantime made void.
const ATTEMPTS: u32 = 3;
/// How long the server may take to write the WAL of the backup's end to disk.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);

/// What to compare with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ParentChoice {
    /// The newest backup of the cluster; a full backup if there is none.
    #[default]
    Automatic,
    /// Nothing: store everything.
    Full,
    /// The newest full backup.
    Differential,
    /// This one.
    Named(String),
}

/// What to back up and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The data directory; what the server says if it is not given.
    pub data_dir: Option<PathBuf>,
    /// How to reach the server, as for libpq; the environment and the data directory's `postmaster.pid` fill the gaps.
    pub conninfo: Option<String>,
    /// What to compare with.
    pub parent: ParentChoice,
    /// How to find what may have changed.
    pub detector: DetectorChoice,
    /// A directory with the cluster's archived WAL, as an `archive_command` fills it.
    pub wal_archive: Option<PathBuf>,
    /// Whether to scan whatever the detector says, and to report what it would have missed.
    pub audit: bool,
    /// How many incremental backups in a row may go without an audit.
    pub audit_every: Option<NonZeroU32>,
    /// Whether the cluster is stopped.
    pub offline: bool,
    /// Number of workers; one for each processor if it is not given.
    pub jobs: Option<NonZeroUsize>,
    /// How to compress.
    pub compression: Compression,
    /// Bytes to read a second at most.
    pub max_rate: Option<NonZeroU64>,
    /// The user's own words; an empty text is no note.
    pub note: Option<String>,
}

/// What a backup did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupSummary,
    /// How long it took.
    pub seconds: f64,
    /// Bytes read from the cluster.
    pub bytes_read: u64,
    /// Bytes written to the repository.
    pub bytes_written: u64,
    /// Damage in the repository that came to light, none of it in this backup.
    pub repository_damage: Vec<String>,
    /// What an audit found, if there was one.
    pub audit: Option<AuditReport>,
}

/// What a backup is going to do.
pub struct Plan<'r> {
    repo: &'r Repository,
    source: Source,
    control: ControlFile,
    control_bytes: Vec<u8>,
    parent: Option<Manifest>,
    backup_type: BackupType,
    detection: Detection,
    notices: Vec<String>,
    repository_damage: Vec<String>,
    options: Options,
}

/// Where the cluster's bytes come from.
enum Source {
    Live { session: Box<Session>, data_dir: DataDir },
    Offline { data_dir: DataDir },
}

impl Source {
    fn data_dir(&self) -> &DataDir {
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
    plan.choose_parent(&catalog)?;
    Ok(plan)
}

/// Makes a backup.
///
/// # Errors
/// Whatever made it fail; then there is no new backup, and the old ones are untouched.
pub fn run(repo: &Repository, options: &Options, progress: &dyn Progress) -> Result<Report> {
    let begun = Instant::now();
    let mut options = options.clone();
    let mut repository_damage = Vec::new();
    for attempts_left in (0..ATTEMPTS).rev() {
        let run = Run::begin(repo, &options, progress)?;
        for notice in &run.plan.notices {
            progress.notice(notice);
        }
        let (id, compared) = (run.id, run.plan.parent.is_some());
        // Held until the packs of a run that fails are removed: before that, the next one would take them over.
        let _lease = Arc::clone(&run.lease);
        let attempt = run.execute(begun).inspect_err(|_| {
            // A full disk must not stay full of a backup that there is not; what cannot be removed is litter.
            let _ = repo.discard(&options.cluster, id);
        });
        match attempt {
            Ok(Attempt::Done(mut report)) => {
                report.repository_damage.append(&mut repository_damage);
                return Ok(*report);
            }
            Ok(Attempt::Void(why)) if attempts_left > 0 => {
                repo.discard(&options.cluster, id)?;
                progress.notice(&format!("{why}, which a restore could not repeat; taking the backup again"));
            }
            Ok(Attempt::Void(why)) => {
                repo.discard(&options.cluster, id)?;
                let error = Error::new(ErrorKind::Postgres, format!("{why}; the backup is void"));
                return Err(error.hint("run it when no databases are copied or moved and no tablespaces created"));
            }
            Err(error) if compared && attempts_left > 0 && is_damaged_parent(&options, &error) => {
                progress.notice(&format!("taking a full backup: the parent cannot be read: {error}"));
                repository_damage.push(error.to_string());
                options.parent = ParentChoice::Full;
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::bug("a backup was tried no times"))
}

/// Whether an automatic backup failed because what it inherits from is damaged.
fn is_damaged_parent(options: &Options, error: &Error) -> bool {
    let in_repository = error.place().is_some_and(|place| place.starts_with("clusters/"));
    options.parent == ParentChoice::Automatic && error.kind() == ErrorKind::Corrupt && in_repository
}

/// Checks that a backup into the repository at `repo` is possible, which need not be there yet; changes nothing. [`crate::check`] asks the same
/// questions, and more, and goes on after the first that is answered badly.
///
/// # Errors
/// What makes it impossible.
pub fn check(options: &Options, repo: &Path) -> Result<()> {
    let source = open_source(options)?;
    must_lie_elsewhere(source.data_dir(), repo)?;
    let (_, control) = source.data_dir().read_control()?;
    match source {
        Source::Live { .. } => Ok(()),
        Source::Offline { data_dir } => must_be_stopped(&data_dir, &control),
    }
}

pub(crate) fn must_lie_elsewhere(data_dir: &DataDir, repo: &Path) -> Result<()> {
    if data_dir.contains(repo)? {
        let what = format!("the repository {} lies in the data directory that it would back up", repo.display());
        return Err(Error::invalid(what).hint("put the repository on another disk"));
    }
    Ok(())
}

fn open_source(options: &Options) -> Result<Source> {
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
        Some(data_dir) if !has_a_server(data_dir) => error.hint(format!(
            "no server runs on {}: start it, or back it up as it is with --offline",
            data_dir.path().display(),
        )),
        _ => error,
    })
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

fn must_be_stopped(data_dir: &DataDir, control: &ControlFile) -> Result<()> {
    let here = data_dir.path().display();
    if data_dir.postmaster_pid()?.is_some_and(|pid| pid.is_alive()) {
        let what = format!("a server runs on {here}");
        return Err(Error::invalid(what).hint("stop it, or back it up while it runs: without --offline"));
    }
    match control.state {
        ClusterState::ShutDown | ClusterState::ShutDownInRecovery => Ok(()),
        state => {
            let what = format!("the cluster in {here} was not stopped cleanly: pg_control says {state}");
            Err(Error::invalid(what).hint("start it and stop it again, then back it up"))
        }
    }
}

/// A cluster that was started and stopped while it was read is half old, half new, and no WAL repairs it.
fn must_be_as_it_was(data_dir: &DataDir, control_bytes: &[u8]) -> Result<()> {
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

/// Where a backup stands between its start and its stop.
struct Bounds {
    start: Lsn,
    stop: Lsn,
    start_timeline: TimelineId,
    timeline: TimelineId,
    backup_label: Option<Vec<u8>>,
    tablespace_map: Option<Vec<u8>>,
    from_standby: bool,
}

/// What became of an attempt.
enum Attempt {
    /// There is a new backup.
    Done(Box<Report>),
    /// Something happened on the server that a restore could not repeat.
    Void(String),
}

/// Everything that a backup found, before it is committed.
struct Found {
    entries: Vec<FileEntry>,
    listing: Listing,
    bounds: Bounds,
    wal: Vec<WalSpan>,
    control: ControlFile,
    corrupt_pages: Vec<CorruptPage>,
    settings: Option<Vec<Setting>>,
}

/// A backup that is being made.
struct Run<'r, 'p> {
    plan: Plan<'r>,
    progress: &'p dyn Progress,
    id: BackupId,
    lease: Arc<Lease>,
    salvage: Option<Salvage<'r>>,
    start_time: Timestamp,
    data: Packer,
    map: Packer,
    totals: Totals,
    rate: RateLimit,
    jobs: usize,
    /// What a detector says of the changes since the parent.
    changes: Option<ChangeMap>,
    audit: Option<Audit>,
}

impl<'r, 'p> Run<'r, 'p> {
    /// Plans, and takes the lease that keeps what the plan refers to.
    fn begin(repo: &'r Repository, options: &Options, progress: &'p dyn Progress) -> Result<Self> {
        loop {
            let plan = plan(repo, options)?;
            let start_time = whole_second(Timestamp::now());
            let id = BackupId::generate(start_time)?;
            let salvage = Salvage::find(repo, &options.cluster, plan.control.block_size.as_usize())?;
            let uses = plan.parent.iter().map(|parent| parent.id).collect();
            let runs = salvage.iter().flat_map(Salvage::runs).chain([id]).collect();
            let request = LeaseRequest { operation: Operation::Backup, runs, uses };
            let lease = Lease::acquire(repo, &options.cluster, &request, &|text| progress.notice(text))?;
            // Between the plan and the lease another run may have removed the parent, or made a newer one.
            let is_there = |parent: &Manifest| match repo.manifest(&parent.cluster, parent.id) {
                Err(e) if e.kind() == ErrorKind::Missing => Ok(false),
                found => Ok(found?.edition == parent.edition && repo.unsound_pack(parent)?.is_none()),
            };
            let is_there = plan.parent.as_ref().map_or(Ok(true), is_there)?;
            if is_there && !lease.waited() {
                salvage.iter().try_for_each(Salvage::settle)?;
                return Ok(Self::new(plan, id, start_time, lease, salvage, progress));
            }
        }
    }

    fn new(
        plan: Plan<'r>,
        id: BackupId,
        start_time: Timestamp,
        lease: Lease,
        salvage: Option<Salvage<'r>>,
        progress: &'p dyn Progress,
    ) -> Self {
        let packer = |kind| Packer::new(Arc::clone(plan.repo.store()), plan.options.cluster.clone(), id, kind);
        Self {
            progress,
            id,
            lease: Arc::new(lease),
            salvage,
            start_time,
            data: packer(PackKind::Data),
            map: packer(PackKind::Map),
            totals: Totals::default(),
            rate: RateLimit::new(plan.options.max_rate),
            jobs: crate::os::worker_count(plan.options.jobs),
            changes: None,
            audit: None,
            plan,
        }
    }

    fn execute(mut self, begun: Instant) -> Result<Attempt> {
        let start = self.start()?;
        self.progress.begin(Phase::Listing, 0);
        let listing = self.plan.source.data_dir().list()?;
        for notice in &listing.notices {
            self.progress.notice(notice);
        }
        self.detect(start, &listing)?;
        let judge = self.judge(start);
        let mut entries = self.copy_cluster(&listing, judge.as_ref())?;
        let (control_entry, control) = self.copy_control(&listing)?;
        entries.push(control_entry);
        entries.extend(self.copy_external()?);
        let bounds = self.stop(start, &control)?;
        let range = self.wal_range(&bounds);
        entries.extend(self.copy_wal(range)?);
        self.data.close()?;
        // After the copy: a segment that was recycled meanwhile is found out.
        if let Some(why) = wal::prove(self.plan.source.data_dir(), range, &self.plan.control)? {
            return Ok(Attempt::Void(why));
        }
        self.release()?;
        let wal = wal::spans(self.plan.source.data_dir(), bounds.start_timeline, self.wal_range(&bounds))?;
        let suspects = judge.map_or_else(Vec::new, |judge| judge.damaged(bounds.stop));
        let corrupt_pages = self.describe(suspects);
        let settings = self.settings(&listing)?;
        if let Source::Live { session, .. } = &mut self.plan.source {
            for notice in session.take_notices() {
                self.progress.notice(&notice);
            }
        }
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let found = Found { entries, listing, bounds, wal, control, corrupt_pages, settings };
        self.commit(found, begun).map(|report| Attempt::Done(Box::new(report)))
    }

    /// Begins the backup on the server; `None` for a stopped cluster.
    fn start(&mut self) -> Result<Option<Lsn>> {
        let Source::Live { session, .. } = &mut self.plan.source else { return Ok(None) };
        self.progress.begin(Phase::Starting, 0);
        let started = session.begin_backup(&format!("pgstrata {}", self.id), true)?;
        if let Some(notice) = started.slot_notice {
            self.progress.notice(&notice);
        }
        Ok(Some(started.start_lsn))
    }

    /// Asks a detector what may have changed since the parent.
    fn detect(&mut self, start: Option<Lsn>, listing: &Listing) -> Result<()> {
        let plan = &self.plan;
        let Some(parent) = &plan.parent else { return Ok(()) };
        let data_dir = plan.source.data_dir();
        // As of now: checksums and parameters may have changed since the plan, if the server was started anew.
        let (_, control) = data_dir.read_control()?;
        let session = match &plan.source {
            Source::Live { session, .. } => Some(&**session),
            Source::Offline { .. } => None,
        };
        let timeline = session.map_or(Ok(control.timeline), Session::current_timeline)?;
        let len = |entry: &Entry| if let EntryKind::File { len } = entry.kind { len } else { 0 };
        let start = start.unwrap_or(control.redo);
        let question = Question {
            repo: plan.repo,
            parent,
            control: &control,
            data_dir,
            session,
            wal_archive: plan.options.wal_archive.as_deref(),
            start,
            timeline,
            cluster_bytes: listing.entries.iter().map(len).sum(),
            notice: &|text| self.progress.notice(text),
        };
        let found = question.answer(plan.options.detector)?;
        if self.is_due_for_audit()? {
            let detector = found.detection.detector;
            let reason = match detector {
                Detector::Scan => {
                    let what = "there is no detector to audit";
                    self.progress.notice(&format!("{what}: {}", found.detection.reason));
                    found.detection.reason
                }
                _ => {
                    self.audit = Some(Audit::new(detector.to_string(), parent.start_lsn, start, &control));
                    format!("an audit of {detector}: {}", found.detection.reason)
                }
            };
            self.plan.detection = Detection { detector: Detector::Scan, reason };
        } else {
            self.plan.detection = found.detection;
        }
        self.changes = found.map;
        Ok(())
    }

    /// Whether everything is to be read and compared with what the detector says.
    fn is_due_for_audit(&self) -> Result<bool> {
        let options = &self.plan.options;
        let Some(every) = options.audit_every.filter(|_| !options.audit) else { return Ok(options.audit) };
        let catalog = self.plan.repo.catalog(&options.cluster)?;
        let trusting = |backup: &&BackupSummary| backup.detector != Detector::Scan.to_string();
        let since = catalog.backups().iter().rev().take_while(trusting).count();
        Ok(since as u64 + 1 >= u64::from(every.get()))
    }

    fn judge(&self, start: Option<Lsn>) -> Option<Judge> {
        let control = &self.plan.control;
        control.has_data_checksums().then(|| Judge::new(start, control.relseg_size))
    }

    /// Copies everything of the data directory but `pg_control`.
    fn copy_cluster(&self, listing: &Listing, judge: Option<&Judge>) -> Result<Vec<FileEntry>> {
        let version_dir = self.plan.control.tablespace_version_dir();
        let mut parent = TableCursor::new(self.plan.repo, self.plan.parent.as_ref());
        let mut entries = Vec::new();
        let mut items = Vec::new();
        for listed in &listing.entries {
            let entry = file_entry(listed);
            if entry.kind == FileKind::Directory {
                entries.push(entry);
            } else if *entry.path != *b"global/pg_control" {
                let parent = parent.find(&entry.path)?;
                let relation = RelationFile::parse_path(&entry.path, &version_dir);
                items.push(Item { entry, content: Content::DataDirectory, relation, parent });
            }
        }
        if let Some(changes) = self.changes() {
            let block_len = self.plan.control.block_size.as_u64();
            items.retain(|item| match item.unchanged(changes, block_len) {
                Some(entry) => {
                    entries.push(entry);
                    false
                }
                None => true,
            });
        }
        let bytes = items.iter().map(|item| item.entry.len).sum();
        self.progress.begin(Phase::Copying, bytes);
        entries.extend(self.copy(&items, judge)?);
        Ok(entries)
    }

    /// Copies `pg_control`, as it is after everything else.
    fn copy_control(&self, listing: &Listing) -> Result<(FileEntry, ControlFile)> {
        let path = b"global/pg_control";
        let listed = listing.entries.iter().find(|entry| *entry.path == *path);
        let listed = listed.ok_or_else(|| Error::invalid("there is no global/pg_control"))?;
        let (bytes, control) = self.plan.source.data_dir().read_control()?;
        let entry = FileEntry { len: bytes.len() as u64, ..file_entry(listed) };
        let parent = TableCursor::new(self.plan.repo, self.plan.parent.as_ref()).find(path)?;
        let item = Item { entry, content: Content::Bytes(Arc::from(bytes)), relation: None, parent };
        let copied = self.copy(&[item], None)?.pop();
        Ok((copied.ok_or_else(|| Error::bug("pg_control was not copied"))?, control))
    }

    /// Copies `pg_hba.conf` and `pg_ident.conf` from wherever the server has them, if that is not the data directory.
    fn copy_external(&self) -> Result<Vec<FileEntry>> {
        let Source::Live { session, data_dir } = &self.plan.source else { return Ok(Vec::new()) };
        let server = session.server();
        let mut items = Vec::new();
        for (name, path) in [("pg_hba.conf", &server.hba_file), ("pg_ident.conf", &server.ident_file)] {
            if let Some(bytes) = data_dir.read_external(path)? {
                let (path, len) = (format!("/{name}").into_bytes(), bytes.len() as u64);
                let entry =
                    FileEntry { path, kind: FileKind::External, mode: 0o600, uid: 0, gid: 0, len, parts: Vec::new() };
                items.push(Item { entry, content: Content::Bytes(Arc::from(bytes)), relation: None, parent: None });
            }
        }
        self.copy(&items, None)
    }

    /// Settings from outside the data directory, if the server's `postgresql.conf` lies there.
    fn settings(&self, listing: &Listing) -> Result<Option<Vec<Setting>>> {
        let Source::Live { session, data_dir } = &self.plan.source else {
            if !listing.entries.iter().any(|entry| *entry.path == *b"postgresql.conf") {
                let what =
                    "there is no postgresql.conf in the data directory: the server's settings are not in this backup";
                self.progress.notice(what);
            }
            return Ok(None);
        };
        if data_dir.contains(&session.server().config_file)? {
            return Ok(None);
        }
        let setting = |found: FileSetting| Setting { name: found.name, value: ByteString(found.value) };
        Ok(Some(session.file_settings()?.into_iter().map(setting).collect()))
    }

    fn copy(&self, items: &[Item], judge: Option<&Judge>) -> Result<Vec<FileEntry>> {
        let stack = Stack { repo: self.plan.repo, parent: self.plan.parent.as_ref(), map: &self.map };
        let health = || match &self.plan.source {
            Source::Live { session, .. } => session.check_alive(),
            Source::Offline { .. } => Ok(()),
        };
        let copier = Copier {
            data_dir: self.plan.source.data_dir(),
            health: &health,
            stack: &stack,
            data: &self.data,
            block_len: self.plan.control.block_size.as_usize(),
            compression: self.plan.options.compression,
            salvage: self.salvage.as_ref(),
            judge,
            changes: self.changes(),
            jobs: self.jobs,
            rate: &self.rate,
            progress: self.progress,
            totals: &self.totals,
        };
        copier.run(items)
    }

    fn changes(&self) -> Option<Changes<'_>> {
        let map = self.changes.as_ref()?;
        Some(Changes { map, segment: self.plan.control.relseg_size, audit: self.audit.as_ref() })
    }

    /// Ends the backup on the server, and says what WAL it needs.
    fn stop(&mut self, start: Option<Lsn>, control: &ControlFile) -> Result<Bounds> {
        let (session, start) = match (&mut self.plan.source, start) {
            (Source::Live { session, .. }, Some(start)) => (session, start),
            _ => return self.stopped(control),
        };
        let replayed = session.replayed()?;
        let stopped = session.end_backup()?;
        let label = BackupLabel::parse(&stopped.backup_label)?;
        if label.start_lsn != start {
            let what = format!("pg_backup_start said {start}, backup_label says {}", label.start_lsn);
            return Err(Error::new(ErrorKind::Postgres, what));
        }
        session.wait_for_wal_flush(stopped.stop_lsn, FLUSH_TIMEOUT)?;
        let from_standby = session.server().in_recovery;
        let mut bounds = Bounds {
            start,
            stop: stopped.stop_lsn,
            start_timeline: label.start_timeline,
            timeline: session.current_timeline()?,
            backup_label: Some(stopped.backup_label),
            tablespace_map: Some(stopped.tablespace_map),
            from_standby,
        };
        if let Some(replayed) = replayed.filter(|replayed| *replayed > bounds.stop) {
            let stop = std::mem::replace(&mut bounds.stop, replayed);
            // Only if that WAL can be followed: after a switch of timelines the server may not yet say on which one it is.
            if wal::prove(self.plan.source.data_dir(), self.wal_range(&bounds), control).is_err() {
                bounds.stop = stop;
            }
        }
        Ok(bounds)
    }

    /// The bounds of a stopped cluster: its last checkpoint, which recovery reads and ends after.
    fn stopped(&self, control: &ControlFile) -> Result<Bounds> {
        let data_dir = self.plan.source.data_dir();
        must_be_as_it_was(data_dir, &self.plan.control_bytes)?;
        let standby = control.state == ClusterState::ShutDownInRecovery;
        let end = wal::end_of_checkpoint(data_dir, control)?;
        Ok(Bounds {
            start: control.redo,
            stop: if standby { control.min_recovery_point.max(end) } else { end },
            start_timeline: control.timeline,
            timeline: control.timeline.max(control.min_recovery_point_timeline),
            backup_label: None,
            tablespace_map: None,
            from_standby: standby,
        })
    }

    fn wal_range(&self, bounds: &Bounds) -> WalRange {
        WalRange {
            start: bounds.start,
            stop: bounds.stop,
            timeline: bounds.timeline,
            segment_size: self.plan.control.wal_segment_size,
            at_rest: bounds.backup_label.is_none(),
        }
    }

    fn copy_wal(&self, range: WalRange) -> Result<Vec<FileEntry>> {
        let items = wal::items(self.plan.source.data_dir(), range)?;
        self.progress.begin(Phase::Wal, items.iter().map(|item| item.entry.len).sum());
        let entries = self.copy(&items, None)?;
        let len = |entries: &mut dyn Iterator<Item = &FileEntry>| entries.map(|entry| entry.len).sum::<u64>();
        if len(&mut entries.iter()) != len(&mut items.iter().map(|item| &item.entry)) {
            return Err(Error::new(ErrorKind::Unavailable, "a WAL file changed its length while it was copied"));
        }
        Ok(entries)
    }

    /// Lets the server have its WAL back; makes sure that a stopped cluster is still as it was.
    fn release(&mut self) -> Result<()> {
        match &mut self.plan.source {
            Source::Live { session, .. } => session.drop_slot(),
            Source::Offline { data_dir } => must_be_as_it_was(data_dir, &self.plan.control_bytes),
        }
    }

    fn describe(&self, suspects: Vec<Suspect>) -> Vec<CorruptPage> {
        let name = |suspect: &Suspect| match &self.plan.source {
            Source::Live { session, .. } => {
                let locator = suspect.relation.locator;
                session.relation_name(locator.spc.as_u32(), locator.db.as_u32(), locator.rel.as_u32())
            }
            Source::Offline { .. } => None,
        };
        if suspects.len() > MAX_CORRUPT_PAGES {
            self.progress
                .notice(&format!("{} damaged pages; the first {MAX_CORRUPT_PAGES} are listed", suspects.len()));
        }
        let describe = |suspect: &Suspect| CorruptPage {
            file: String::from_utf8_lossy(&suspect.path).into_owned(),
            relation: suspect.relation.locator.to_string(),
            name: name(suspect),
            fork: suspect.relation.fork.to_string(),
            block: suspect.block.as_u32(),
            reason: suspect.fault.to_string(),
        };
        suspects.iter().take(MAX_CORRUPT_PAGES).map(describe).collect()
    }

    /// Writes the file table and the manifest.
    fn commit(self, mut found: Found, begun: Instant) -> Result<Report> {
        let mut manifest = self.manifest(&found)?;
        let known: &[PagePlace] = self.plan.parent.as_ref().map_or(&[], |parent| &parent.pages);
        let mut table = TableWriter::new(&self.map, known);
        for entry in found.entries.drain(..) {
            table.push(entry)?;
        }
        let (pages, needed) = table.finish()?;
        self.map.close()?;
        let mut own = self.data.finish()?;
        own.extend(self.map.finish()?);
        manifest.pages = pages;
        let inherited = self.plan.parent.iter().flat_map(|parent| &parent.packs);
        let salvaged = self.salvage.iter().flat_map(Salvage::packs);
        let salvage_read = self.salvage.as_ref().map_or(0, Salvage::bytes_read);
        let taken_over = salvaged.clone().filter(|pack| needed.contains(&pack.name)).map(|pack| pack.len);
        let taken_over: u64 = taken_over.sum();
        let lengths: HashMap<PackName, u64> =
            inherited.chain(&own).chain(salvaged).map(|pack| (pack.name, pack.len)).collect();
        manifest.packs = with_lengths(&self.plan.options.cluster, &needed, |pack| lengths.get(pack).copied())?;
        manifest.sequence = self.plan.repo.catalog(&manifest.cluster)?.next_sequence();
        manifest.stop_time = whole_second(Timestamp::now());
        manifest.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let written: u64 = own.iter().map(|pack| pack.len).sum();
        manifest.own_bytes = written + taken_over;
        let manifest_len = self.plan.repo.commit(&manifest, &self.lease)?;
        let bytes_read = self.totals.bytes_read.load(Ordering::Relaxed) + salvage_read;
        let advice = advice::on_summaries(&self.plan, self.audit.is_some(), bytes_read, manifest.blocks_changed);
        advice.iter().for_each(|advice| self.progress.notice(advice));
        Ok(Report {
            audit: self.audit.map(Audit::finish),
            backup: BackupSummary::new(&manifest, manifest_len),
            seconds: begun.elapsed().as_secs_f64(),
            bytes_read,
            bytes_written: written + manifest_len,
            repository_damage: self.plan.repository_damage,
        })
    }

    /// The manifest, but for what is known only when all else is stored.
    fn manifest(&self, found: &Found) -> Result<Manifest> {
        let Found { listing, bounds, control, .. } = found;
        let bytes = |wanted: fn(FileKind) -> bool| -> u64 {
            found.entries.iter().filter(|entry| wanted(entry.kind)).map(|entry| entry.len).sum()
        };
        let postgres_version = match &self.plan.source {
            Source::Live { session, .. } => session.server().version.clone(),
            Source::Offline { data_dir } => data_dir.major_version().to_string(),
        };
        Ok(Manifest {
            format: FORMAT_VERSION,
            repository: self.plan.repo.id().to_owned(),
            cluster: self.plan.options.cluster.clone(),
            id: self.id,
            sequence: 0,
            synthesis: 0,
            edition: 0,
            backup_type: self.plan.backup_type,
            parent: self.plan.parent.as_ref().map(|parent| parent.id),
            merged_from: None,
            system_identifier: control.system_identifier.to_string(),
            postgres_version,
            postgres_major: control.major_version().as_u32(),
            catalog_version: control.catalog_version.as_u32(),
            block_size: control.block_size.as_u32(),
            wal_segment_size: control.wal_segment_size.as_u32(),
            data_checksum_version: control.data_checksum_version,
            start_lsn: bounds.start,
            stop_lsn: bounds.stop,
            start_timeline: bounds.start_timeline,
            timeline: bounds.timeline,
            wal: found.wal.clone(),
            start_time: self.start_time,
            stop_time: self.start_time,
            duration_ms: 0,
            from_standby: bounds.from_standby,
            offline: bounds.backup_label.is_none(),
            backup_label: bounds.backup_label.clone().map(ByteString),
            tablespace_map: bounds.tablespace_map.clone().map(ByteString),
            tablespaces: listing.tablespaces.iter().map(tablespace_location).collect(),
            data_directory_mode: listing.mode,
            data_directory_owner: (listing.uid, listing.gid),
            config_outside: found.settings.is_some(),
            settings: found.settings.clone().unwrap_or_default(),
            cluster_bytes: bytes(|kind| kind != FileKind::Wal),
            wal_bytes: bytes(|kind| kind == FileKind::Wal),
            file_count: found.entries.iter().filter(|entry| entry.kind == FileKind::File).count() as u64,
            blocks_changed: self.totals.blocks_changed.load(Ordering::Relaxed),
            own_bytes: 0,
            detector: self.plan.detection.detector.to_string(),
            detector_reason: self.plan.detection.reason.clone(),
            corrupt_pages: found.corrupt_pages.clone(),
            note: self.plan.options.note.clone().filter(|note| !note.is_empty()),
            packs: Vec::new(),
            pages: Vec::new(),
        })
    }
}

/// Times are told in whole seconds: finer ones are read by few programs.
fn whole_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn tablespace_location(found: &Tablespace) -> TablespaceLocation {
    let bytes = |link: &PathBuf| ByteString(link.as_os_str().as_bytes().to_vec());
    TablespaceLocation { oid: found.oid.as_u32(), location: found.link.as_ref().map(bytes) }
}

fn file_entry(listed: &Entry) -> FileEntry {
    let (kind, len) = match listed.kind {
        EntryKind::Directory => (FileKind::Directory, 0),
        EntryKind::File { len } => (FileKind::File, len),
    };
    let Entry { path, mode, uid, gid, .. } = listed;
    FileEntry { path: path.to_vec(), kind, mode: *mode, uid: *uid, gid: *gid, len, parts: Vec::new() }
}
