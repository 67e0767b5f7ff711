//! Where the cluster's bytes come from: a live server (SQL session and data directory), or a directory at rest.
//!
//! A backup needs both halves of a running cluster. The [`Session`] puts the server into backup mode and keeps it
//! there; the [`DataDir`] lists and opens the files. They meet in an order that the caller must keep: connect,
//! [`Session::begin_backup`], [`DataDir::list`], read the files, [`DataDir::read_control`] last of all,
//! [`Session::end_backup`], [`Session::wait_for_wal_flush`], copy the WAL, [`Session::drop_slot`].
//!
//! What a file holds is none of this room's business: `detect` and `backup` read the pages.

mod connect;
mod conninfo;
mod datadir;
mod entries;
mod failure;
mod postmaster;
mod rights;
mod server;
mod session;
mod tls;

pub use conninfo::Environment;
pub use datadir::{DataDir, Entry, EntryKind, Listing, Tablespace};
pub use entries::{Entries, EntryIter};
pub use postmaster::PostmasterPid;
pub use server::Server;
pub use session::{BackupStart, BackupStop, FileSetting, Session, SlotCount};
