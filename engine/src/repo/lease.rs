//! Leases: who works in a cluster's part of the repository, and what he may refer to (`format.md`, Leases).
//!
//! A store has no locks. What it has is enough: whoever begins to work puts a lease, then lists the leases of the others. Of two who begin at once at least
//! one sees the other. Who sees a lease that conflicts with his own takes his away again and waits, for a while that chance chooses, so two who saw each
//! other don't meet again. Whoever sees none works, and renews his lease while he does.
//!
//! ```text
//!             backup  expire
//! backup      waits   waits      one backup of a cluster at a time
//! expire      -       waits      an expiry goes on beside others: it leaves alone what their leases name
//! all others  -       waits      what begins during an expiry has no lease that the expiry saw
//! ```
//!
//! So an expiry knows all who may refer to what it deletes: those that began before it are in its list, with the backups they use; those that begin later
//! wait until it is done, and look again whether what they wanted to use is still there.
//!
//! A lease is *stale* when its process is known to be dead (same boot, same process namespace, and no such process), or when its time is over. Whoever
//! meets a stale lease removes it. A run that is held up for longer than its lease (a suspended machine, a store out of reach) may lose what it refers to: it asks
//! before and after it commits ([`Repository::commit`](super::Repository::commit)).
//!
//! A lease of a host that is gone, or whose process cannot be seen from here, lasts for an hour; if nothing is at work, its file can be deleted by hand.
//!
//! What goes wrong: clocks of two hosts that differ by more than the lease's time less its renewal (50 minutes), which the question at the commit
//! catches; a lease that does not read, which is an error with its name, as nobody knows what it protects; a repository that may only be read, where
//! readers go without.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use jiff::{SignedDuration, Timestamp};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::names::{self, BackupId, ClusterName};
use super::{BackupSummary, Catalog, Repository, seal, unseal};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ObjectName, Store};

/// How long a lease lasts unless it is renewed.
const TERM: Duration = Duration::from_secs(3600);
/// How often it is renewed.
const RENEWAL: Duration = Duration::from_secs(600);
/// How long a conflicting run is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest wait before looking again.
const RETRY: Duration = Duration::from_millis(500);
/// How often the leases are listed until all that are listed can be read.
const MAX_LOOKS: usize = 50;
/// Bytes of a lease at most.
const MAX_LEN: u64 = 1 << 20;

/// What somebody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Writes a backup.
    Backup,
    /// Writes a synthetic full backup.
    Merge,
    /// Reads a backup to copy it elsewhere.
    Export,
    /// Writes a backup that comes from another repository.
    Import,
    /// Reads a backup.
    Restore,
    /// Reads backups.
    Verify,
    /// Sets or removes a pin.
    Pin,
    /// Deletes.
    Expire,
}

impl Operation {
    /// Whether it has to wait for `other`, which is there already.
    fn waits_for(self, other: Operation) -> bool {
        other == Operation::Expire || (self == Operation::Backup && other == Operation::Backup)
    }

    /// Whether it writes nothing but its lease.
    fn only_reads(self) -> bool {
        matches!(self, Operation::Restore | Operation::Verify | Operation::Export)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Backup => "a backup",
            Operation::Merge => "a merge",
            Operation::Export => "an export",
            Operation::Import => "an export to here",
            Operation::Restore => "a restore",
            Operation::Verify => "a verification",
            Operation::Pin => "a pin",
            Operation::Expire => "an expiry",
        })
    }
}

/// The process that holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    host: String,
    pid: u32,
    /// When the process began, in clock ticks since the boot; process ids are used again.
    started: u64,
    /// The boot of the host.
    boot: String,
    /// The process namespace, in which `pid` means something.
    namespace: String,
}

/// A lease as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseRecord {
    /// What its owner does.
    pub operation: Operation,
    /// The runs whose packs it writes, or takes over from those that were interrupted.
    pub runs: Vec<BackupId>,
    /// The backups that it may refer to.
    pub uses: Vec<BackupId>,
    owner: Owner,
    acquired: Timestamp,
    expires: Timestamp,
}

impl fmt::Display for LeaseRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owner { host, pid, .. } = &self.owner;
        write!(f, "{} (process {pid} on {host}, since {:.0})", self.operation, self.acquired)
    }
}

/// What somebody wants to do.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    /// What it is.
    pub operation: Operation,
    /// The runs whose packs it will write, or take over from those that were interrupted.
    pub runs: Vec<BackupId>,
    /// The backups that it may refer to.
    pub uses: Vec<BackupId>,
}

/// A lease that is held; dropping it gives it back.
#[derive(Debug)]
pub struct Lease {
    id: BackupId,
    /// None where the repository may only be read.
    held: Option<Held>,
    waited: bool,
}

#[derive(Debug)]
struct Held {
    state: Arc<State>,
    stop: Option<Sender<()>>,
    renewer: Option<JoinHandle<()>>,
}

/// What the thread that renews a lease shares with its owner.
#[derive(Debug)]
struct State {
    store: Arc<dyn Store>,
    cluster: ClusterName,
    id: BackupId,
    record: LeaseRecord,
    current: Mutex<Current>,
    lost: AtomicBool,
}

#[derive(Debug)]
struct Current {
    object: ObjectName,
    renewals: u32,
    /// When it lapses, by a clock that nobody sets and that goes on while the machine sleeps.
    lapses_after: Duration,
}

/// The leases that this process holds: a lease of this process that is not among them was given up by a run that failed.
static HELD: LazyLock<Mutex<HashMap<BackupId, Arc<State>>>> = LazyLock::new(Mutex::default);

impl Lease {
    /// Waits until nothing is in the way and takes a lease.
    ///
    /// # Errors
    /// `Locked` if another run is in the way for too long; `Corrupt` if a lease does not read. Neither for those who only read.
    pub fn acquire(
        repo: &Repository,
        cluster: &ClusterName,
        request: &LeaseRequest,
        notice: &dyn Fn(&str),
    ) -> Result<Self> {
        match Self::wait_for(repo, cluster, request, notice) {
            Err(e) if request.operation.only_reads() => {
                // A repository that may only be read, or one with a damaged lease: what is read is proved anyway.
                if e.kind() != ErrorKind::Unavailable {
                    notice(&format!("going on without a lock, so an expiry may remove what is read here: {e}"));
                }
                Ok(Self { id: BackupId::generate(Timestamp::now())?, held: None, waited: false })
            }
            done => done,
        }
    }

    /// Takes a lease of one backup and returns the backup, which is still there then.
    ///
    /// # Errors
    /// As [`Lease::acquire`] and [`Catalog::select`](super::Catalog::select).
    pub fn of_backup(
        repo: &Repository,
        cluster: &ClusterName,
        backup: &str,
        operation: Operation,
        notice: &dyn Fn(&str),
    ) -> Result<(Self, BackupSummary)> {
        let chosen = repo.catalog(cluster)?.select(backup)?;
        let request = LeaseRequest { operation, runs: Vec::new(), uses: vec![chosen.id] };
        let lease = Self::acquire(repo, cluster, &request, notice)?;
        let chosen = repo.catalog(cluster)?.select(&chosen.id.to_string())?;
        Ok((lease, chosen))
    }

    /// Takes a lease to write a backup that comes from elsewhere, next to the newest one; the catalog is as of then.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn of_import(
        repo: &Repository,
        cluster: &ClusterName,
        run: BackupId,
        notice: &dyn Fn(&str),
    ) -> Result<(Self, Catalog)> {
        loop {
            let newest = repo.catalog(cluster)?.backups().last().map(|backup| backup.id);
            let uses = newest.into_iter().collect();
            let request = LeaseRequest { operation: Operation::Import, runs: vec![run], uses };
            let lease = Self::acquire(repo, cluster, &request, notice)?;
            let catalog = repo.catalog(cluster)?;
            if catalog.backups().last().map(|backup| backup.id) == newest {
                return Ok((lease, catalog));
            }
        }
    }

    /// Proves that the repository can be written to: puts a lease that names nothing, and takes it away again. Nobody waits for such a one, and where this
    /// process is killed in between, the next expiry removes it.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) fn probe(repo: &Repository, cluster: &ClusterName) -> Result<()> {
        let request = LeaseRequest { operation: Operation::Verify, runs: Vec::new(), uses: Vec::new() };
        let lease = Self::put(repo, cluster, &request)?;
        let Some(Held { state, .. }) = &lease.held else { return Ok(()) };
        let object = state.current().object.clone();
        state.store.delete(&object)
    }

    fn wait_for(
        repo: &Repository,
        cluster: &ClusterName,
        request: &LeaseRequest,
        notice: &dyn Fn(&str),
    ) -> Result<Self> {
        let deadline = uptime() + PATIENCE;
        let mut waited = false;
        loop {
            let mut lease = match Self::put(repo, cluster, request) {
                // Perhaps there is no room, and this is who makes some.
                Err(e) if request.operation == Operation::Expire && e.kind() == ErrorKind::Unavailable => {
                    repo.give_up_reserve()?;
                    Self::put(repo, cluster, request)?
                }
                put => put?,
            };
            lease.waited = waited;
            let Some(other) = lease.in_the_way(repo, cluster, request, notice)? else { return Ok(lease) };
            if uptime() > deadline {
                let what = format!("the cluster {cluster} of this repository is locked by {other}");
                return Err(Error::new(ErrorKind::Locked, what).hint("run this again when that is done"));
            }
            if !std::mem::replace(&mut waited, true) {
                notice(&format!("waiting for {other}"));
            }
            drop(lease);
            pause()?;
        }
    }

    /// Whether somebody was in the way at first: what was seen before is old.
    pub fn waited(&self) -> bool {
        self.waited
    }

    fn put(repo: &Repository, cluster: &ClusterName, request: &LeaseRequest) -> Result<Self> {
        let now = Timestamp::now();
        let id = BackupId::generate(now)?;
        let LeaseRequest { operation, runs, uses } = request.clone();
        let record = LeaseRecord { operation, runs, uses, owner: Owner::this()?, acquired: now, expires: now };
        let object = names::lease(cluster, id, 0)?;
        let current = Current { object, renewals: 0, lapses_after: uptime() + TERM };
        let state = Arc::new(State {
            store: Arc::clone(repo.store()),
            cluster: cluster.clone(),
            id,
            record,
            current: Mutex::new(current),
            lost: AtomicBool::new(false),
        });
        // Before it can be seen: who sees it asks whether its holder lives.
        held().insert(id, Arc::clone(&state));
        let object = state.current().object.clone();
        let mut lease = Self { id, held: Some(Held { state, stop: None, renewer: None }), waited: false };
        if let Some(held) = &mut lease.held {
            held.state.write(&object)?;
            held.start_renewing()?;
        }
        Ok(lease)
    }

    /// The lease that this one has to wait for; stale ones that would be in the way are removed.
    fn in_the_way(
        &self,
        repo: &Repository,
        cluster: &ClusterName,
        request: &LeaseRequest,
        notice: &dyn Fn(&str),
    ) -> Result<Option<LeaseRecord>> {
        for (id, record) in leases(repo, cluster)? {
            let same_run = request.runs.iter().any(|run| record.runs.contains(run));
            if id == self.id || !(same_run || request.operation.waits_for(record.operation)) {
                continue;
            }
            if !record.is_stale(id) {
                return Ok(Some(record));
            }
            notice(&format!("cleared the lock of {record}, which was interrupted"));
            remove_lease(repo, cluster, id)?;
        }
        Ok(None)
    }

    /// Sees that the lease is still ours.
    ///
    /// # Errors
    /// `Locked` if its time is over, or if somebody removed it.
    pub fn check(&self) -> Result<()> {
        let Some(Held { state, .. }) = &self.held else { return Ok(()) };
        let there = || {
            let object = state.current().object.clone();
            Ok::<_, Error>(state.store.list(object.as_str())?.iter().any(|found| found.name == object))
        };
        // Twice: it may have been renewed between the question for its name and that for its presence.
        if self.is_lapsed() || !(there()? || there()?) {
            if state.store.list(names::REPOSITORY)?.is_empty() {
                return Err(Error::new(ErrorKind::Unavailable, "the repository is gone")
                    .hint("look at its disk, and run this again"));
            }
            let what = "this run was held up for so long that its lease is over; what it refers to may be gone";
            return Err(Error::new(ErrorKind::Locked, what).hint("run it again"));
        }
        Ok(())
    }

    /// Whether its time is over, or renewing it failed for good.
    pub fn is_lapsed(&self) -> bool {
        let lapsed =
            |held: &Held| held.state.lost.load(Ordering::Relaxed) || uptime() > held.state.current().lapses_after;
        self.held.as_ref().is_some_and(lapsed)
    }
}

impl Held {
    fn start_renewing(&mut self) -> Result<()> {
        let (stop, stopped) = bounded::<()>(0);
        let state = Arc::clone(&self.state);
        let renew = move || {
            while stopped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                // A failure is no news yet: there is time for more attempts, and the commit asks.
                let _ = state.renew();
            }
        };
        let thread = std::thread::Builder::new().name("lease".to_owned()).spawn(renew);
        self.renewer =
            Some(thread.map_err(|e| Error::new(ErrorKind::Unavailable, "cannot start a thread").because(e))?);
        self.stop = Some(stop);
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(Held { state, stop, renewer }) = &mut self.held {
            drop(stop.take());
            if let Some(renewer) = renewer.take() {
                // A thread that panicked renews no more, which is all that is wanted.
                let _ = renewer.join();
            }
            state.give_back();
        }
        held().remove(&self.id);
    }
}

impl State {
    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what there is of the lease. What stays is known to be stale: its process does not hold it any more, or is gone.
    fn give_back(&self) {
        let renewals = self.current().renewals;
        for number in renewals.saturating_sub(1)..=renewals {
            let object = names::lease(&self.cluster, self.id, number);
            let _ = object.and_then(|object| self.store.delete(&object));
        }
    }

    fn write(&self, object: &ObjectName) -> Result<()> {
        let term = SignedDuration::try_from(TERM).map_err(|e| Error::bug("a lease without an end").because(e))?;
        let expires = Timestamp::now() + term;
        let text = seal(&LeaseRecord { expires, ..self.record.clone() })?;
        self.store.put_new(object, &mut text.as_bytes()).map(drop)
    }

    /// Puts a lease that lasts longer, then removes the one before the one before: who has listed the last one can still read it.
    fn renew(&self) -> Result<()> {
        let (before, renewals) = {
            let current = self.current();
            (current.object.clone(), current.renewals + 1)
        };
        if self.store.list(before.as_str())?.is_empty() {
            // Somebody broke it: what it protected may be gone.
            self.lost.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let lapses_after = uptime() + TERM;
        let object = names::lease(&self.cluster, self.id, renewals)?;
        self.write(&object)?;
        *self.current() = Current { object, renewals, lapses_after };
        match renewals.checked_sub(2) {
            Some(old) => self.store.delete(&names::lease(&self.cluster, self.id, old)?),
            None => Ok(()),
        }
    }
}

impl LeaseRecord {
    /// Whether nobody holds it any more.
    pub fn is_stale(&self, id: BackupId) -> bool {
        match self.owner.lives() {
            Some(false) => true,
            Some(true) if self.owner.pid == std::process::id() => !held().contains_key(&id),
            Some(true) => false,
            None => self.expires < Timestamp::now(),
        }
    }
}

impl Owner {
    fn this() -> Result<Self> {
        let read = |path: &str| {
            let text = fs::read_to_string(path).map(|text| text.trim().to_owned());
            text.map_err(|e| Error::io("read", path.as_ref(), e))
        };
        let namespace = fs::read_link("/proc/self/ns/pid").map(|link| link.display().to_string());
        let pid = std::process::id();
        Ok(Self {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid,
            started: start_of(pid).unwrap_or_default(),
            boot: read("/proc/sys/kernel/random/boot_id")?,
            namespace: namespace.unwrap_or_default(),
        })
    }

    /// Whether the process lives; `None` if that cannot be told from here.
    fn lives(&self) -> Option<bool> {
        let this = Self::this().ok()?;
        if (&this.boot, &this.namespace) != (&self.boot, &self.namespace) || this.started == 0 {
            return None;
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw)?;
        if test_kill_process(pid) == Err(Errno::SRCH) {
            return Some(false);
        }
        // Another user's process may be there and not be shown.
        start_of(self.pid).map(|started| started == self.started)
    }
}

/// When a process began, in clock ticks since the boot, 0 if it has ended and waits for its parent; `None` if there is none to be seen.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything; starttime is the 20th field after it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?;
    // A zombie does nothing any more.
    if state == "Z" { Some(0) } else { fields.nth(18)?.parse().ok() }
}

/// The leases of a cluster, stale or not, in their newest renewal.
///
/// # Errors
/// `Corrupt` if one does not read.
pub(crate) fn leases(repo: &Repository, cluster: &ClusterName) -> Result<BTreeMap<BackupId, LeaseRecord>> {
    let mut found: BTreeMap<BackupId, LeaseRecord> = BTreeMap::new();
    let mut gone = BTreeSet::new();
    for _ in 0..MAX_LOOKS {
        let listed = repo.store().list(&names::leases(cluster))?;
        let mut all_read = true;
        for object in listed {
            match repo.store().get(&object.name, MAX_LEN) {
                Ok(bytes) => {
                    let record = unseal::<LeaseRecord>(&bytes, object.name.as_str());
                    let hint = "if nothing is at work in this repository, delete that file";
                    let record = record.map_err(|e| e.hint(hint))?;
                    let id = lease_id(cluster, &object.name)?;
                    if found.get(&id).is_none_or(|known| known.expires < record.expires) {
                        found.insert(id, record);
                    }
                }
                // Given back, or renewed: another look tells.
                Err(e) if e.kind() == ErrorKind::Missing => all_read &= !gone.insert(object.name),
                Err(e) => return Err(e),
            }
        }
        if all_read {
            return Ok(found);
        }
    }
    Err(Error::new(ErrorKind::Unavailable, "leases come and go faster than they can be read").hint("run this again"))
}

fn lease_id(cluster: &ClusterName, object: &ObjectName) -> Result<BackupId> {
    let name = &object.as_str()[names::leases(cluster).len()..];
    let id = name.split_once('.').and_then(|(id, _)| id.parse().ok());
    id.ok_or_else(|| Error::corrupt(object.as_str(), "this is not the name of a lease"))
}

/// Removes a lease in all its renewals.
///
/// # Errors
/// What the store says.
pub(crate) fn remove_lease(repo: &Repository, cluster: &ClusterName, id: BackupId) -> Result<()> {
    let objects = repo.store().list(&format!("{}{id}.", names::leases(cluster)))?;
    objects.iter().try_for_each(|object| repo.store().delete(&object.name))
}

fn held() -> std::sync::MutexGuard<'static, HashMap<BackupId, Arc<State>>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives back every lease of this process, which is about to end by a signal; what it was doing must not go on after that.
pub fn give_up_leases() {
    for (_, state) in held().drain() {
        state.give_back();
    }
}

/// Time since the boot, sleep included.
fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

/// Waits for a while that chance chooses.
fn pause() -> Result<()> {
    let mut random = [0];
    getrandom::fill(&mut random).map_err(|e| Error::new(ErrorKind::Unavailable, format!("no randomness: {e}")))?;
    std::thread::sleep(RETRY * u32::from(random[0]).max(32) / 255);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn repository() -> (MemoryStore, Repository, ClusterName) {
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), "memory".to_owned()).unwrap();
        (store, repo, ClusterName::default())
    }

    fn request(operation: Operation) -> LeaseRequest {
        LeaseRequest { operation, runs: Vec::new(), uses: Vec::new() }
    }

    fn put(repo: &Repository, operation: Operation) -> Lease {
        Lease::put(repo, &ClusterName::default(), &request(operation)).unwrap()
    }

    fn waits(repo: &Repository, operation: Operation) -> bool {
        let lease = put(repo, operation);
        lease.in_the_way(repo, &ClusterName::default(), &request(operation), &|_| {}).unwrap().is_some()
    }

    /// A lease of somebody else, who cannot be asked whether he lives.
    fn foreign(repo: &Repository, operation: Operation, expires: Timestamp) -> BackupId {
        let owner = Owner { host: "elsewhere".to_owned(), boot: "another".to_owned(), ..Owner::this().unwrap() };
        let record = LeaseRecord { operation, runs: Vec::new(), uses: Vec::new(), owner, acquired: expires, expires };
        let id = BackupId::generate(Timestamp::now()).unwrap();
        let object = names::lease(&ClusterName::default(), id, 0).unwrap();
        repo.store().put_new(&object, &mut seal(&record).unwrap().as_bytes()).unwrap();
        id
    }

    #[test]
    fn who_waits_for_whom_is_as_the_table_says() {
        use Operation::*;
        let (_, repo, _) = repository();
        for held in [Backup, Merge, Export, Import, Restore, Verify, Pin, Expire] {
            let lease = put(&repo, held);
            for wanted in [Backup, Merge, Export, Import, Restore, Verify, Pin, Expire] {
                let expected = held == Expire || (held == Backup && wanted == Backup);
                assert_eq!(waits(&repo, wanted), expected, "{wanted} while there is {held}");
            }
            drop(lease);
        }
        assert!(!waits(&repo, Backup));
    }

    #[test]
    fn a_lease_is_gone_when_it_is_given_back() {
        let (store, repo, cluster) = repository();
        let lease = put(&repo, Operation::Backup);
        assert_eq!(leases(&repo, &cluster).unwrap().len(), 1);
        drop(lease);
        assert_eq!(store.list(&names::leases(&cluster)).unwrap(), []);
    }

    #[test]
    fn a_lease_whose_time_is_over_is_broken_with_a_word_and_a_live_one_is_not() {
        let (_, repo, cluster) = repository();
        let hour = SignedDuration::from_hours(1);
        let stale = foreign(&repo, Operation::Backup, Timestamp::now() - hour);
        let words = Mutex::new(Vec::new());
        let notice = |text: &str| words.lock().unwrap().push(text.to_owned());
        let lease = Lease::acquire(&repo, &cluster, &request(Operation::Backup), &notice).unwrap();
        assert!(words.lock().unwrap()[0].contains("elsewhere"));
        assert!(!leases(&repo, &cluster).unwrap().contains_key(&stale));
        drop(lease);
        foreign(&repo, Operation::Expire, Timestamp::now() + hour);
        assert!(waits(&repo, Operation::Merge));
    }

    #[test]
    fn a_lease_of_a_process_that_is_dead_is_stale_at_once() {
        let (_, repo, _) = repository();
        let lease = put(&repo, Operation::Expire);
        let mut record = lease.held.as_ref().unwrap().state.record.clone();
        record.expires = Timestamp::now() + SignedDuration::from_hours(1);
        assert!(!record.is_stale(lease.id));
        record.owner.started += 1;
        assert!(record.is_stale(lease.id), "another process has its number now");
        record.owner.namespace = "pid:[1]".to_owned();
        assert!(!record.is_stale(lease.id), "its number means nothing here");
    }

    #[test]
    fn a_lease_that_this_process_gave_up_is_stale_even_if_it_could_not_be_removed() {
        let (store, repo, cluster) = repository();
        let lease = put(&repo, Operation::Backup);
        let object = lease.held.as_ref().unwrap().state.current().object.clone();
        let bytes = store.get(&object, 1 << 20).unwrap();
        drop(lease);
        store.tamper(&object, Some(bytes));
        assert!(!waits(&repo, Operation::Backup));
        assert_eq!(leases(&repo, &cluster).unwrap().len(), 0);
    }

    #[test]
    fn a_renewed_lease_takes_the_place_of_the_one_before() {
        let (store, repo, cluster) = repository();
        let lease = put(&repo, Operation::Backup);
        for _ in 0..3 {
            lease.held.as_ref().unwrap().state.renew().unwrap();
            assert_eq!(store.list(&names::leases(&cluster)).unwrap().len(), 2);
            assert_eq!(leases(&repo, &cluster).unwrap().len(), 1);
        }
        lease.check().unwrap();
        remove_lease(&repo, &cluster, lease.id).unwrap();
        assert_eq!(lease.check().unwrap_err().kind(), ErrorKind::Locked);
        lease.held.as_ref().unwrap().state.renew().unwrap();
        assert!(lease.is_lapsed(), "a lease that somebody broke is not put again");
    }

    #[test]
    fn a_damaged_lease_is_named() {
        let (store, repo, cluster) = repository();
        let object = ObjectName::new(format!("{}20261122T160312Z-1a2b3c4d.0", names::leases(&cluster))).unwrap();
        store.tamper(&object, Some(b"{}\n".to_vec()));
        let error = leases(&repo, &cluster).unwrap_err();
        assert_eq!((error.kind(), error.place()), (ErrorKind::Corrupt, Some(object.as_str())));
    }
}
