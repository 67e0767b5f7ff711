//! A backup that is being made, step by step; the steps are those of the [room's header](super).

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::audit::Audit;
use super::changes::Question;
use super::copy::{Changes, Content, Copier, Item, Totals, Work};
use super::judge::{Judge, Suspect};
use super::order::Take;
use super::plan::{Plan, Source, must_be_as_it_was, plan};
use super::rate::RateLimit;
use super::salvage::Salvage;
use super::summaries::ServerSummaries;
use super::wal::{self, WalRange};
use super::{Options, Report};
use crate::detect::{ChangeMap, Detection, Detector, DetectorChoice, HeldSegments, WalFiles};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{BackupLabel, ClusterState, ControlFile, Lsn, RelationFile, TimelineId};
use crate::progress::{Phase, Progress};
use crate::repo::{
    BackupId, BackupSummary, ByteString, CorruptPage, FileEntry, FileKind, HistoryMark, Lease, LeaseRequest,
    MAX_CORRUPT_PAGES, Manifest, Operation, PackKind, PackName, Packer, PagePlace, Repository, Setting, Stack,
    TableCursor, TableWriter, WalSpan,
};
use crate::source::{Entry, EntryKind, FileSetting, Listing, Session};

/// What is copied after everything else: paths begin with these.
const LATE: [&[u8]; 3] = [b"/", CONTROL, b"pg_wal/"];
const CONTROL: &[u8] = b"global/pg_control";
/// How long the server may take to write the WAL of the backup's end to disk.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a backup stands between its start and its stop.
pub(super) struct Bounds {
    pub(super) start: Lsn,
    pub(super) stop: Lsn,
    pub(super) start_timeline: TimelineId,
    pub(super) timeline: TimelineId,
    pub(super) backup_label: Option<Vec<u8>>,
    pub(super) tablespace_map: Option<Vec<u8>>,
    pub(super) from_standby: bool,
}

/// What became of an attempt.
pub(super) enum Attempt {
    /// There is a new backup.
    Done(Box<Report>),
    /// Something happened on the server that a restore could not repeat.
    Void(String),
}

/// Everything that a backup found, before it is committed.
pub(super) struct Found {
    pub(super) table: Finished,
    pub(super) listing: Listing,
    pub(super) bounds: Bounds,
    pub(super) wal: Vec<WalSpan>,
    pub(super) control: ControlFile,
    pub(super) history_mark: Option<HistoryMark>,
    pub(super) corrupt_pages: Vec<CorruptPage>,
    pub(super) settings: Option<Vec<Setting>>,
}

/// A backup that is being made.
pub(super) struct Run<'r, 'p> {
    pub(super) plan: Plan<'r>,
    pub(super) progress: &'p dyn Progress,
    pub(super) id: BackupId,
    pub(super) lease: Arc<Lease>,
    pub(super) salvage: Option<Salvage<'r>>,
    pub(super) start_time: Timestamp,
    pub(super) data: Packer,
    pub(super) totals: Totals,
    pub(super) rate: RateLimit,
    pub(super) jobs: usize,
    /// What a detector says of the changes since the parent.
    pub(super) changes: Option<ChangeMap>,
    pub(super) audit: Option<Audit>,
}

impl<'r, 'p> Run<'r, 'p> {
    /// Plans, and takes the lease that keeps what the plan refers to.
    pub(super) fn begin(repo: &'r Repository, options: &Options, progress: &'p dyn Progress) -> Result<Self> {
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
        Self {
            progress,
            id,
            lease: Arc::new(lease),
            salvage,
            start_time,
            data: packer(&plan, id, PackKind::Data),
            totals: Totals::default(),
            rate: RateLimit::new(plan.options.max_rate),
            jobs: crate::os::worker_count(plan.options.jobs),
            changes: None,
            audit: None,
            plan,
        }
    }

    pub(super) fn execute(mut self, begun: Instant) -> Result<Attempt> {
        let held = self.hold_log()?;
        let start = self.start()?;
        self.progress.begin(Phase::Listing, 0);
        let listing = self.plan.source.data_dir().list()?;
        for notice in &listing.notices {
            self.progress.notice(notice);
        }
        self.detect(start, &listing, &held)?;
        let judge = self.judge(start);
        let map = packer(&self.plan, self.id, PackKind::Map);
        let mut table = Table::new(&map, self.plan.parent.as_ref());
        self.copy_cluster(&listing, judge.as_ref(), &map, &mut table)?;
        let (control_entry, control) = self.copy_control(&listing, &map)?;
        let mut late = vec![control_entry];
        late.extend(self.copy_external(&map)?);
        let bounds = self.stop(start, &control)?;
        let range = self.wal_range(&bounds);
        late.extend(self.copy_wal(range, &map)?);
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
        let table = table.finish(late)?;
        let history_mark = self.history_mark(&bounds)?;
        let found = Found { table, listing, bounds, wal, control, history_mark, corrupt_pages, settings };
        self.commit(found, map, begun).map(|report| Attempt::Done(Box::new(report)))
    }

    /// Opens the log since the parent: the checkpoint of the backup's start may remove some of it.
    fn hold_log(&self) -> Result<HeldSegments> {
        let (Some(parent), Source::Live { data_dir, .. }) = (&self.plan.parent, &self.plan.source) else {
            return Ok(HeldSegments::default());
        };
        if self.plan.options.detector == DetectorChoice::Scan {
            return Ok(HeldSegments::default());
        }
        let files = WalFiles::list(&[&data_dir.path().join("pg_wal")], self.plan.control.wal_segment_size)?;
        Ok(files.hold(parent.start_lsn))
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
    fn detect(&mut self, start: Option<Lsn>, listing: &Listing, held: &HeldSegments) -> Result<()> {
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
        let start = start.unwrap_or(control.redo);
        let question = Question {
            repo: plan.repo,
            parent,
            control: &control,
            data_dir,
            session,
            wal_archive: plan.options.wal_archive.as_deref(),
            held,
            start,
            timeline,
            cluster_bytes: listing.entries.file_bytes(),
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
    fn copy_cluster(
        &self,
        listing: &Listing,
        judge: Option<&Judge>,
        map: &Packer,
        table: &mut Table<'_>,
    ) -> Result<()> {
        let version_dir = self.plan.control.tablespace_version_dir();
        let block_len = self.plan.control.block_size.as_u64();
        let mut parent = TableCursor::new(self.plan.repo, self.plan.parent.as_ref());
        let listed = listing.entries.iter().filter(|listed| *listed.path != *CONTROL);
        let mut work = listed.map(|listed| {
            let entry = file_entry(&listed);
            if entry.kind == FileKind::Directory {
                return Ok(Work::Done(entry));
            }
            let parent = parent.find(&entry.path)?;
            let relation = RelationFile::parse_path(&entry.path, &version_dir);
            let item = Item { entry, content: Content::DataDirectory, relation, parent };
            let unchanged = self.changes().and_then(|changes| item.unchanged(changes, block_len));
            if let Some(entry) = &unchanged {
                self.progress.advance(entry.len);
            }
            Ok(unchanged.map_or(Work::Copy(item), Work::Done))
        });
        self.progress.begin(Phase::Copying, listing.entries.file_bytes());
        self.copy(&mut work, listing.entries.len(), judge, map, &mut |entry| table.push(entry))
    }

    /// Copies `pg_control`, as it is after everything else.
    fn copy_control(&self, listing: &Listing, map: &Packer) -> Result<(FileEntry, ControlFile)> {
        let listed = listing.entries.find(CONTROL);
        let listed = listed.ok_or_else(|| Error::invalid("there is no global/pg_control"))?;
        let (bytes, control) = self.plan.source.data_dir().read_control()?;
        let entry = FileEntry { len: bytes.len() as u64, ..file_entry(&listed) };
        let parent = TableCursor::new(self.plan.repo, self.plan.parent.as_ref()).find(CONTROL)?;
        let item = Item { entry, content: Content::Bytes(Arc::from(bytes)), relation: None, parent };
        let copied = self.copy_few(vec![item], map)?.pop();
        Ok((copied.ok_or_else(|| Error::bug("pg_control was not copied"))?, control))
    }

    /// Copies `pg_hba.conf` and `pg_ident.conf` from wherever the server has them, if that is not the data directory.
    fn copy_external(&self, map: &Packer) -> Result<Vec<FileEntry>> {
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
        self.copy_few(items, map)
    }

    /// Settings from outside the data directory, if the server's `postgresql.conf` lies there.
    fn settings(&self, listing: &Listing) -> Result<Option<Vec<Setting>>> {
        let Source::Live { session, data_dir } = &self.plan.source else {
            if listing.entries.find(b"postgresql.conf").is_none() {
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

    /// Copies a few items; their entries in the same order.
    fn copy_few(&self, items: Vec<Item>, map: &Packer) -> Result<Vec<FileEntry>> {
        let mut entries = Vec::new();
        let count = items.len();
        let mut work = items.into_iter().map(|item| Ok(Work::Copy(item)));
        self.copy(&mut work, count, None, map, &mut |entry| {
            entries.push(entry);
            Ok(())
        })?;
        Ok(entries)
    }

    fn copy(
        &self,
        work: &mut (dyn Iterator<Item = Result<Work>> + Send),
        count: usize,
        judge: Option<&Judge>,
        map: &Packer,
        take: &mut Take<'_>,
    ) -> Result<()> {
        let stack = Stack { repo: self.plan.repo, parent: self.plan.parent.as_ref(), map };
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
        copier.run(work, count, take)
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

    fn copy_wal(&self, range: WalRange, map: &Packer) -> Result<Vec<FileEntry>> {
        let items = wal::items(self.plan.source.data_dir(), range)?;
        let len = items.iter().map(|item| item.entry.len).sum();
        self.progress.begin(Phase::Wal, len);
        let entries = self.copy_few(items, map)?;
        if entries.iter().map(|entry| entry.len).sum::<u64>() != len {
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

    /// What tells this cluster from others of its name, for the next backup.
    fn history_mark(&self, bounds: &Bounds) -> Result<Option<HistoryMark>> {
        let Source::Live { session, data_dir } = &self.plan.source else { return Ok(None) };
        if self.plan.control.major_version().as_u32() < 17 {
            return Ok(None);
        }
        let notice = |text: &str| self.progress.notice(text);
        ServerSummaries::new(session, data_dir, &notice).mark(bounds.start_timeline, bounds.start)
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
}

fn packer(plan: &Plan<'_>, run: BackupId, kind: PackKind) -> Packer {
    Packer::new(Arc::clone(plan.repo.store()), plan.options.cluster.clone(), run, kind)
}

/// The file table that is being written, and what the manifest says of its files.
struct Table<'a> {
    writer: TableWriter<'a>,
    counts: Counts,
}

/// What a manifest says of all files.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) cluster_bytes: u64,
    pub(super) wal_bytes: u64,
    pub(super) files: u64,
}

/// A file table that is written.
pub(super) struct Finished {
    pub(super) pages: Vec<PagePlace>,
    /// Every pack that it needs.
    pub(super) packs: Vec<PackName>,
    pub(super) counts: Counts,
}

impl<'a> Table<'a> {
    fn new(map: &'a Packer, parent: Option<&Manifest>) -> Self {
        let known: &[PagePlace] = parent.map_or(&[], |parent| &parent.pages);
        Self { writer: TableWriter::expecting(map, known, &LATE), counts: Counts::default() }
    }

    fn push(&mut self, entry: FileEntry) -> Result<()> {
        self.counts.add(&entry);
        self.writer.push(entry)
    }

    fn finish(mut self, late: Vec<FileEntry>) -> Result<Finished> {
        late.iter().for_each(|entry| self.counts.add(entry));
        let (pages, packs) = self.writer.finish_with(late)?;
        Ok(Finished { pages, packs, counts: self.counts })
    }
}

impl Counts {
    fn add(&mut self, entry: &FileEntry) {
        let bytes = if entry.kind == FileKind::Wal { &mut self.wal_bytes } else { &mut self.cluster_bytes };
        *bytes += entry.len;
        self.files += u64::from(entry.kind == FileKind::File);
    }
}

/// Times are told in whole seconds: finer ones are read by few programs.
pub(super) fn whole_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn file_entry(listed: &Entry) -> FileEntry {
    let (kind, len) = match listed.kind {
        EntryKind::Directory => (FileKind::Directory, 0),
        EntryKind::File { len } => (FileKind::File, len),
    };
    let Entry { path, mode, uid, gid, .. } = listed;
    FileEntry { path: path.to_vec(), kind, mode: *mode, uid: *uid, gid: *gid, len, parts: Vec::new() }
}
