//! The one error type of the engine.
//!
//! An error says four things: *kind* (what the caller must do), *what* happened (the fact, with the two
//! values that disagree), *where* (object and offset, file and block, or LSN), and a *hint* where one
//! helps. It carries its source. Errors are returned, never logged and swallowed; the command line is the
//! only place that prints one.

use std::fmt::{self, Write as _};
use std::path::Path;

/// What the caller must do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The resource is out of reach or out of room now; try again later or make room.
    Unavailable,
    /// Bytes that should be ours are damaged: the repository cannot be trusted at that place.
    Corrupt,
    /// Something that was named does not exist.
    Missing,
    /// It exists already, or belongs to something else.
    Conflict,
    /// Another run holds the lock; try again when it is done.
    Locked,
    /// The request is wrong: an argument, a directory, a setting.
    Invalid,
    /// A version, format or feature that this program does not handle.
    Unsupported,
    /// PostgreSQL refused or is not in a state to do it.
    Postgres,
    /// A mistake of ours: an invariant does not hold.
    Bug,
}

/// What went wrong, where, and what to do about it.
#[derive(Debug)]
pub struct Error {
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    what: String,
    place: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `what` is the fact, in lower case and without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        let inner = Inner { kind, what: what.into(), place: None, hint: None, source: None };
        Self { inner: Box::new(inner) }
    }

    /// Damaged bytes at `place` (object and offset, or file and block).
    pub fn corrupt(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, what).at(place)
    }

    /// A wrong request.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    /// An invariant of ours that does not hold.
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Bug, what)
    }

    /// A failed system call on `path`; the kind follows the operating system's error.
    pub fn io(verb: &str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::NotFound => ErrorKind::Missing,
            Io::AlreadyExists => ErrorKind::Conflict,
            _ => ErrorKind::Unavailable,
        };
        let hint = match source.kind() {
            Io::StorageFull | Io::QuotaExceeded => Some("make room on that file system and run the command again"),
            Io::PermissionDenied => Some("run as the user that owns it, or give this user access"),
            Io::ReadOnlyFilesystem => Some("the file system is mounted read-only"),
            _ => None,
        };
        let mut error = Self::new(kind, format!("cannot {verb} {}", path.display())).because(source);
        if let Some(hint) = hint {
            error = error.hint(hint);
        }
        error
    }

    /// Adds where it happened.
    #[must_use]
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.inner.place = Some(place.into());
        self
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = Some(hint.into());
        self
    }

    /// Adds something else that the user can do, on a line of its own.
    #[must_use]
    pub fn hint_too(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        self.inner.hint = Some(self.inner.hint.map_or(hint.clone(), |first| format!("{first}\n{hint}")));
        self
    }

    /// Adds what the user can do about an error of this kind that does not say.
    #[must_use]
    pub fn or_hint(self, kind: ErrorKind, hint: &str) -> Self {
        if self.kind() == kind && self.hint_text().is_none() { self.hint(hint) } else { self }
    }

    /// Adds the underlying error.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// What the caller must do.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// The fact.
    pub fn what(&self) -> &str {
        &self.inner.what
    }

    /// The fact and its causes, without the place: for whoever names the place besides.
    pub fn without_place(&self) -> String {
        let mut text = self.what().to_owned();
        self.add_causes(&mut text);
        text
    }

    fn add_causes(&self, text: &mut String) {
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
    }

    /// Where it happened, if that is known.
    pub fn place(&self) -> Option<&str> {
        self.inner.place.as_deref()
    }

    /// What the user can do, if we know.
    pub fn hint_text(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.inner.what.clone();
        if let Some(place) = &self.inner.place {
            let _ = write!(text, " ({place})");
        }
        self.add_causes(&mut text);
        f.write_str(&text)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_ref().map(|source| &**source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_can_be_told_by_whoever_names_its_place() {
        let error = Error::corrupt("packs/12", "the pack is short").because("no more");
        assert_eq!(error.to_string(), "the pack is short (packs/12): no more");
        assert_eq!(error.without_place(), "the pack is short: no more");
    }

    #[test]
    fn hints_add_up_and_none_is_lost() {
        let error = Error::corrupt("packs/12", "the pack is short").or_hint(ErrorKind::Missing, "find it");
        assert_eq!(error.hint_text(), None);
        let error = error.or_hint(ErrorKind::Corrupt, "mend it").or_hint(ErrorKind::Corrupt, "leave it");
        assert_eq!(error.hint_too("try again").hint_text(), Some("mend it\ntry again"));
    }
}
