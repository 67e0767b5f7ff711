//! What the process tells the shell, and how an error becomes a number.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | wrong usage: nothing was tried |
//! | 3 | done, but damage was found: corrupt pages in the cluster, or a repository that does not verify |
//! | 4 | another run holds the lock |
//! | 5 | the repository is damaged, none, or not to be listed or read by this user |
//!
//! `check` ends with 1, not 5, where there is no repository yet: before the first backup that is no damage.
//!
//! A run that a signal interrupts ends by that signal, which a shell shows as 128 and the signal's number.

use std::process::ExitCode;

use engine::check::Verdict;
use engine::{Error, ErrorKind};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    Damage = 3,
    Locked = 4,
    Repository = 5,
}

impl Exit {
    /// The ending that an error of the engine stands for.
    pub fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Corrupt => Self::Repository,
            ErrorKind::Locked => Self::Locked,
            _ => Self::Failed,
        }
    }

    /// The same for an error met while opening the repository: whatever it is, there is none to work with.
    pub fn of_opening(error: &Error) -> Self {
        match Self::of(error) {
            Self::Locked => Self::Locked,
            _ => Self::Repository,
        }
    }

    /// The ending of a check.
    pub fn of_check(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Ok | Verdict::Warning => Self::Done,
            Verdict::Damage => Self::Damage,
            Verdict::Failed => Self::Failed,
            Verdict::Unreadable => Self::Repository,
        }
    }

    /// Done, with or without damage.
    pub fn done(damaged: bool) -> Self {
        if damaged { Self::Damage } else { Self::Done }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_its_exit_code() {
        use ErrorKind::*;
        let of = |kind| Exit::of(&Error::new(kind, "block 7 exists already"));
        let exits = [Unavailable, Corrupt, Missing, Conflict, Locked, Invalid, Unsupported, Postgres, Bug].map(of);
        let failed = Exit::Failed;
        let expected = [failed, Exit::Repository, failed, failed, Exit::Locked, failed, failed, failed, failed];
        assert_eq!(exits, expected);
    }

    #[test]
    fn a_check_fails_if_a_backup_would_and_warnings_are_no_failure() {
        let exits = [Verdict::Ok, Verdict::Warning, Verdict::Damage, Verdict::Failed, Verdict::Unreadable];
        let exits = exits.map(Exit::of_check);
        assert_eq!(exits, [Exit::Done, Exit::Done, Exit::Damage, Exit::Failed, Exit::Repository]);
    }

    #[test]
    fn a_repository_that_cannot_be_opened_is_five_whatever_the_reason() {
        use ErrorKind::*;
        for kind in [Unavailable, Corrupt, Missing, Conflict, Invalid, Unsupported] {
            assert_eq!(Exit::of_opening(&Error::new(kind, "no")), Exit::Repository, "{kind:?}");
        }
        assert_eq!(Exit::of_opening(&Error::new(Locked, "locked by process 12")), Exit::Locked);
    }
}
