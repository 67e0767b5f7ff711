//! A concurrent write load whose effects can be checked in any restored copy.
//!
//! The load lives in a database of its own, [`DATABASE`], so that everything else in the cluster can be dumped
//! and compared exactly while it runs. Each worker has its own session and seed and runs small transactions:
//!
//! * a transfer between two `account`s and its entry in the `ledger`;
//! * churn of `item`s: inserts, updates and deletes of rows that carry a hash of their own content;
//! * one step of the worker's own `progress` counter.
//!
//! So whatever a copy holds, if it is a state that the source was once in, then all of this is true in it: the
//! balances sum to what they began with, each balance follows from the ledger, each item's hash is right, each
//! worker's ledger entries are as many as its counter says. And if the copy is *recent enough*, no counter is below
//! what the worker had seen committed before the backup began. [`check`] proves the first, [`State::at_least`]
//! the second.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use postgres::Client;

use crate::cluster::Cluster;
use crate::random::Random;
use crate::{Error, Result};

/// The database of the load.
pub const DATABASE: &str = "load";

const ACCOUNTS: u64 = 1000;
const OPENING_BALANCE: u64 = 1000;
const ITEMS: u64 = 3000;
/// How long [`Load::wait_for_commits`] waits at most.
const DEADLINE: Duration = Duration::from_secs(120);

/// A running load.
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// How many transactions each worker has seen committed.
    committed: Vec<AtomicU64>,
    /// Whether workers shall wait, how many do, and the first failure.
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    waiting: usize,
    failure: Option<String>,
}

/// How many transactions of each worker a state of the database contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    commits: Vec<u64>,
}

impl State {
    /// Whether every worker is as far here as in `other`.
    pub fn at_least(&self, other: &State) -> bool {
        self.commits.len() == other.commits.len()
            && self.commits.iter().zip(&other.commits).all(|(own, other)| own >= other)
    }

    /// All workers' transactions.
    pub fn total(&self) -> u64 {
        self.commits.iter().sum()
    }
}

impl Load {
    /// Creates the database of the load, for `workers`.
    ///
    /// # Errors
    ///
    /// PostgreSQL's.
    pub fn prepare(cluster: &Cluster, workers: u64) -> Result<()> {
        cluster.sql("postgres", &format!("CREATE DATABASE {DATABASE}"))?;
        cluster.sql(
            DATABASE,
            &format!(
                "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, opening bigint NOT NULL, filler text);
                 CREATE TABLE ledger (id bigserial PRIMARY KEY, worker int NOT NULL, payer int NOT NULL,
                                      payee int NOT NULL, amount bigint NOT NULL);
                 CREATE TABLE item (id bigint PRIMARY KEY, content text NOT NULL, hash text NOT NULL);
                 CREATE INDEX ON item (hash);
                 CREATE TABLE progress (worker int PRIMARY KEY, commits bigint NOT NULL);
                 INSERT INTO account SELECT i, {OPENING_BALANCE}, {OPENING_BALANCE}, repeat('.', 60) FROM generate_series(0, {last}) i;
                 INSERT INTO progress SELECT i, 0 FROM generate_series(0, {workers} - 1) i",
                last = ACCOUNTS - 1
            ),
        )
    }

    /// Starts as many workers as the load was prepared for, from `seed`.
    ///
    /// # Errors
    ///
    /// When a session cannot be opened, or the load was not prepared.
    pub fn start(cluster: &Cluster, seed: u64) -> Result<Self> {
        let begun = check(cluster)?;
        let mut load = Self {
            shared: Arc::new(Shared {
                stop: AtomicBool::new(false),
                committed: begun.commits.iter().map(|commits| AtomicU64::new(*commits)).collect(),
                gate: Mutex::default(),
                changed: Condvar::new(),
            }),
            workers: Vec::new(),
        };
        for worker in 0..begun.commits.len() {
            let mut client = cluster.connect(DATABASE)?;
            let shared = Arc::clone(&load.shared);
            let mut random = Random::new(seed.wrapping_add(worker as u64));
            load.workers.push(std::thread::spawn(move || {
                if let Err(error) = work(&shared, worker, &mut client, &mut random) {
                    let mut gate = shared.gate();
                    gate.failure.get_or_insert(format!("worker {worker} of the load: {error}"));
                    shared.changed.notify_all();
                }
            }));
        }
        Ok(load)
    }

    /// What is committed for certain by now.
    pub fn committed(&self) -> State {
        State { commits: self.shared.committed.iter().map(|count| count.load(Ordering::Acquire)).collect() }
    }

    /// Waits until `more` transactions have been committed from now on.
    ///
    /// # Errors
    ///
    /// When a worker has failed, or they do not come in time.
    pub fn wait_for_commits(&self, more: u64) -> Result<()> {
        let wanted = self.committed().total() + more;
        let deadline = Instant::now() + DEADLINE;
        let mut gate = self.shared.gate();
        while self.committed().total() < wanted {
            if let Some(failure) = &gate.failure {
                return Err(Error::new(failure));
            }
            if Instant::now() > deadline {
                return Err(Error::new(format!("the load did not commit {more} transactions in {DEADLINE:?}")));
            }
            (gate, _) = self.shared.changed.wait_timeout(gate, DEADLINE).unwrap_or_else(|e| e.into_inner());
        }
        Ok(())
    }

    /// Returns once no worker has a transaction open; they wait for [`Load::resume`].
    ///
    /// # Errors
    ///
    /// When a worker has failed.
    pub fn pause(&self) -> Result<()> {
        let mut gate = self.shared.gate();
        gate.closed = true;
        while gate.waiting < self.workers.len() {
            if let Some(failure) = &gate.failure {
                return Err(Error::new(failure));
            }
            gate = self.shared.changed.wait(gate).unwrap_or_else(|e| e.into_inner());
        }
        Ok(())
    }

    /// Lets the workers go on.
    pub fn resume(&self) {
        self.shared.gate().closed = false;
        self.shared.changed.notify_all();
    }

    /// Ends all workers and returns what they have committed.
    ///
    /// # Errors
    ///
    /// When one has failed.
    pub fn stop(mut self) -> Result<State> {
        self.end();
        match self.shared.gate().failure.take() {
            Some(failure) => Err(Error::new(failure)),
            None => Ok(self.committed()),
        }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.resume();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                self.shared.gate().failure.get_or_insert("a worker of the load panicked".to_owned());
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn gate(&self) -> std::sync::MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits while the gate is closed; false when the worker shall end.
    fn pass_gate(&self) -> bool {
        let mut gate = self.gate();
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.closed && !self.stop.load(Ordering::Acquire) {
            gate = self.changed.wait(gate).unwrap_or_else(|e| e.into_inner());
        }
        gate.waiting -= 1;
        !self.stop.load(Ordering::Acquire)
    }
}

/// Commits transactions until the load ends.
fn work(shared: &Shared, worker: usize, client: &mut Client, random: &mut Random) -> Result<()> {
    while shared.pass_gate() {
        let mut transaction = client.transaction()?;
        transaction.batch_execute(&one_transaction(worker, random))?;
        transaction.commit()?;
        shared.committed[worker].fetch_add(1, Ordering::Release);
        shared.changed.notify_all();
    }
    Ok(())
}

/// The statements of one transaction; it locks accounts and items in ascending order, so that no two deadlock.
fn one_transaction(worker: usize, random: &mut Random) -> String {
    let payer = random.below(ACCOUNTS);
    let payee = (payer + 1 + random.below(ACCOUNTS - 1)) % ACCOUNTS;
    let amount = 1 + random.below(100);
    let step = |account, change: String| format!("UPDATE account SET balance = balance {change} WHERE id = {account};");
    let mut steps = [(payer, step(payer, format!("- {amount}"))), (payee, step(payee, format!("+ {amount}")))];
    steps.sort();
    let item = random.below(ITEMS);
    let content = format!("repeat('{:x} ', {})", random.number(), 1 + random.below(30));
    let churn = match random.below(4) {
        0 => format!("DELETE FROM item WHERE id = {item};"),
        _ => format!(
            "INSERT INTO item VALUES ({item}, {content}, md5({content}))
             ON CONFLICT (id) DO UPDATE SET content = excluded.content, hash = excluded.hash;"
        ),
    };
    format!(
        "{}{}INSERT INTO ledger (worker, payer, payee, amount) VALUES ({worker}, {payer}, {payee}, {amount});
         {churn}UPDATE progress SET commits = commits + 1 WHERE worker = {worker};",
        steps[0].1, steps[1].1
    )
}

/// What is true in every state that a sequence of whole transactions leaves: the violation, and the query.
const INVARIANTS: [(&str, &str); 4] = [
    ("the balances do not sum to what they began with", "SELECT sum(balance) = sum(opening) FROM account"),
    (
        "a balance does not follow from the ledger",
        "SELECT bool_and(a.balance = a.opening + coalesce(l.change, 0)) FROM account a LEFT JOIN
         (SELECT account, sum(change) AS change FROM
            (SELECT payee AS account, amount AS change FROM ledger UNION ALL SELECT payer, -amount FROM ledger) entries
          GROUP BY account) l ON l.account = a.id",
    ),
    ("an item's hash is wrong", "SELECT coalesce(bool_and(hash = md5(content)), true) FROM item"),
    (
        "a worker's ledger entries are not as many as its progress says",
        "SELECT bool_and(commits = (SELECT count(*) FROM ledger l WHERE l.worker = p.worker)) FROM progress p",
    ),
];
const BY_SCAN: &str =
    "RESET ALL; SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off";
const BY_INDEX: &str = "RESET ALL; SET enable_seqscan = off";

/// Proves that the load's database in `cluster` is in a state that a sequence of whole transactions leaves, and
/// returns that state. Tables are read by sequential scan and again through their indexes.
///
/// # Errors
///
/// With the invariant that does not hold.
pub fn check(cluster: &Cluster) -> Result<State> {
    let mut client = cluster.connect(DATABASE)?;
    let mut counts = Vec::new();
    for access in [BY_SCAN, BY_INDEX] {
        client.batch_execute(access)?;
        for (violation, query) in INVARIANTS {
            if !client.query_one(query, &[])?.try_get::<_, bool>(0)? {
                return Err(Error::new(format!("{violation} (with {access})")));
            }
        }
        // An index that has lost entries still satisfies the invariants on what it finds: so count, too.
        for table in ["account", "ledger", "item"] {
            let count = client.query_one(&format!("SELECT count(*) FROM {table} WHERE id >= 0"), &[])?;
            counts.push(count.try_get::<_, i64>(0)?);
        }
    }
    let (by_scan, by_index) = counts.split_at(counts.len() / 2);
    if by_scan != by_index {
        return Err(Error::new(format!("the tables have {by_scan:?} rows by scan and {by_index:?} by index")));
    }
    let rows = client.query("SELECT commits FROM progress ORDER BY worker", &[])?;
    let commits: std::result::Result<Vec<i64>, _> = rows.iter().map(|row| row.try_get(0)).collect();
    Ok(State { commits: commits?.into_iter().map(i64::unsigned_abs).collect() })
}
