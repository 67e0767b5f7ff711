//! Bytes under names.
//!
//! A store knows neither PostgreSQL nor backups. It keeps immutable objects: [`Store::put_new`] makes one that did not
//! exist, whole and durable, or fails and leaves nothing under that name; nothing ever changes one. That is what lets a
//! manifest be the only commit point, and what makes object-lock storage work.
//!
//! Why five methods: each is one every object store and file system has. There is no rename, no append, no lock. Two more are for drivers whose calls can be
//! cut in two when their process is killed: `sweep`, for what `put_new` leaves behind, and `settle`, for what is done and not yet durable.
//!
//! What goes wrong: a name that is taken ([`ErrorKind::Conflict`](crate::ErrorKind)), an object that is not there (`Missing`), a
//! store out of reach or full (`Unavailable`), an object shorter than a reader was told (`Corrupt`). Every driver passes
//! the same conformance suite.

mod disk;
mod local;
mod memory;
mod name;

#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod model_disk;

use std::fmt;
use std::io::BufRead;

pub use local::LocalStore;
pub use memory::MemoryStore;
pub use name::ObjectName;
pub(crate) use name::is_component;

use crate::error::Result;

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name.
    pub name: ObjectName,
    /// Its length in bytes.
    pub len: u64,
}

/// A place that keeps immutable objects under names.
pub trait Store: Send + Sync + fmt::Debug {
    /// Makes an object of everything that `content` yields and returns its length; the object is durable on return.
    ///
    /// # Errors
    /// `Conflict` if the name is taken (the object there is untouched). On any error nothing is under the name that was not
    /// there before.
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64>;

    /// The whole object.
    ///
    /// # Errors
    /// `Missing` if there is none; `Unsupported` if it is longer than `max_len`.
    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>>;

    /// Fills `buffer` with the object's bytes from `offset`.
    ///
    /// # Errors
    /// `Missing` if there is none; `Corrupt` if it ends before the buffer is full.
    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Says that [`Store::get_range`] will ask for these bytes soon. A store that fetches nothing ahead has nothing to do.
    fn will_get(&self, _name: &ObjectName, _offset: u64, _len: u64) {}

    /// All objects whose names begin with `prefix`, in the order of their names.
    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>>;

    /// Removes an object, for good on return; it is no error if there is none.
    fn delete(&self, name: &ObjectName) -> Result<()>;

    /// Makes durable what a listing of `prefix`, a whole directory of names that ends with a slash, shows, and what it shows no more.
    ///
    /// Calls that ended well are durable anyway. One that was cut off by the end of its process may be seen, and still be undone by a loss of power: who
    /// deletes or commits something because of what he sees there asks for this before he looks. A store that is never of two minds has nothing to do.
    fn settle(&self, _prefix: &str) -> Result<()> {
        Ok(())
    }

    /// Removes what calls of `put_new` that never ended left below `prefix`, which is no object, and returns its length in bytes.
    ///
    /// A store whose driver leaves nothing behind has nothing to do.
    fn sweep(&self, _prefix: &str) -> Result<u64> {
        Ok(0)
    }
}
