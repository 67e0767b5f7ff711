//! How a long operation tells its caller how far it is.

/// A stage of an operation; [`Progress::begin`] announces each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for PostgreSQL's checkpoint.
    Starting,
    /// Listing the cluster's files.
    Listing,
    /// Reading the cluster and storing what changed.
    Copying,
    /// Storing the WAL that makes the backup consistent.
    Wal,
    /// Writing restored files.
    Restoring,
    /// Making restored files durable.
    Syncing,
    /// Reading and checking stored bytes.
    Verifying,
    /// Writing block maps anew.
    Merging,
    /// Moving stored bytes into other packs.
    Moving,
    /// Removing what nothing refers to.
    Deleting,
}

/// Receives the progress of an operation, from any of its threads.
pub trait Progress: Sync {
    /// A stage begins; `total_bytes` is 0 when it cannot be known.
    fn begin(&self, phase: Phase, total_bytes: u64);

    /// So many more bytes of the stage are done.
    fn advance(&self, bytes: u64);

    /// Something the user should read, once, that is no error.
    fn notice(&self, text: &str);
}

/// Progress that nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Phase, _: u64) {}
    fn advance(&self, _: u64) {}
    fn notice(&self, _: &str) {}
}
