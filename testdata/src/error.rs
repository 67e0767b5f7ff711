//! The harness's error: one sentence, with all the context that the place it happened at has.

use std::fmt;
use std::path::Path;

/// What could not be done, and why.
#[derive(Debug)]
pub struct Error(String);

/// The harness's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that says `what`.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    pub(crate) fn io(verb: &str, path: &Path, source: impl fmt::Display) -> Self {
        Self(format!("cannot {verb} {}: {source}", path.display()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self(format!("PostgreSQL: {} ({})", db.message(), db.code().code())),
            None => Self(format!("PostgreSQL: {error}")),
        }
    }
}
