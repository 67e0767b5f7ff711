//! `postmaster.pid`: whether a server runs on a data directory, and where it listens.
//!
//! The server writes the file line by line while it starts, so a reader may find any prefix of it: what is not
//! there yet is absent here. A crash leaves the file behind, and its process id may by then be another
//! program's; so [`PostmasterPid::is_alive`] may say "alive" wrongly, which costs a refused run, but says
//! "dead" only when no such process exists. A server in another container or on another host that shares the
//! directory is not seen; nobody can notice that from here.
//!
//! PostgreSQL: src/include/utils/pidfile.h; src/backend/utils/init/miscinit.c, CreateLockFile.

use std::io::ErrorKind::NotFound;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, test_kill_process};

use crate::error::{Error, Result};

/// What a running server says of itself in its data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostmasterPid {
    /// The server's process; that of a standalone backend is written as a negative number, and positive here.
    pub pid: u32,
    /// Whether it is a standalone backend (`postgres --single`), which nobody can connect to.
    pub standalone: bool,
    /// When it started, in seconds since 1970.
    pub start_time: Option<i64>,
    /// Its port.
    pub port: Option<u16>,
    /// The directory of its first Unix socket, if it has one.
    pub socket_directory: Option<PathBuf>,
    /// The first address it listens on; `*` for all, empty for none.
    pub listen_address: String,
    /// Its state: `starting`, `stopping`, `ready` or `standby`; empty while it is not written yet.
    pub status: String,
}

impl PostmasterPid {
    /// The `postmaster.pid` of a data directory; `None` when there is none, or nothing in it yet.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or does not begin with a process id.
    pub fn read(data_dir: &Path) -> Result<Option<Self>> {
        let path = data_dir.join("postmaster.pid");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        Self::parse(&bytes).map_err(|error| error.at(path.display().to_string()))
    }

    fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.lines().map(str::trim);
        let Some(first) = lines.next().filter(|line| !line.is_empty()) else { return Ok(None) };
        let pid: i32 = first.parse().ok().filter(|&pid| pid != 0).ok_or_else(|| {
            Error::invalid(format!("postmaster.pid begins with {first:?}, which is no process id"))
                .hint("if no server runs on this directory, remove the file")
        })?;
        let mut line = |skip| lines.nth(skip).unwrap_or_default();
        let start_time = line(1).parse().ok();
        let port = line(0).parse().ok();
        let socket_directory = Some(line(0)).filter(|line| !line.is_empty()).map(PathBuf::from);
        let listen_address = line(0).to_owned();
        let status = line(1).to_owned();
        Ok(Some(Self {
            pid: pid.unsigned_abs(),
            standalone: pid < 0,
            start_time,
            port,
            socket_directory,
            listen_address,
            status,
        }))
    }

    /// Whether a process with this id exists.
    pub fn is_alive(&self) -> bool {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // A process of another user answers EPERM: it exists.
        pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_server_says_where_it_listens() {
        let text = b"4711\n/srv/pg\n1754500000\n5433\n/run/pg\n127.0.0.1\n  5432001    32768\nready   \n";
        let expected = PostmasterPid {
            pid: 4711,
            standalone: false,
            start_time: Some(1_754_500_000),
            port: Some(5433),
            socket_directory: Some("/run/pg".into()),
            listen_address: "127.0.0.1".to_owned(),
            status: "ready".to_owned(),
        };
        assert_eq!(PostmasterPid::parse(text).unwrap(), Some(expected));
    }

    #[test]
    fn every_prefix_of_the_file_is_understood_because_the_server_writes_it_line_by_line() {
        let text = b"4711\n/srv/pg\n1754500000\n5433\n/run/pg\n127.0.0.1\n  5432001    32768\nready   \n";
        assert_eq!(PostmasterPid::parse(b"").unwrap(), None);
        for end in 1..text.len() {
            let parsed = PostmasterPid::parse(&text[..end]).unwrap().unwrap();
            assert!("4711".starts_with(&parsed.pid.to_string()));
        }
        let without_socket = PostmasterPid::parse(b"1\n/srv\n2\n5432\n\n*\n").unwrap().unwrap();
        assert_eq!(without_socket.socket_directory, None);
        assert_eq!(without_socket.listen_address, "*");
    }

    #[test]
    fn a_standalone_backend_is_told_from_a_server() {
        let parsed = PostmasterPid::parse(b"-17\n/srv\n").unwrap().unwrap();
        assert_eq!((parsed.pid, parsed.standalone), (17, true));
    }

    #[test]
    fn a_file_that_does_not_begin_with_a_process_id_is_an_error() {
        assert!(PostmasterPid::parse(b"hello\n").is_err());
        assert!(PostmasterPid::parse(b"0\n").is_err());
    }

    #[test]
    fn this_process_is_alive_and_an_impossible_one_is_not() {
        let of = |pid| PostmasterPid { pid, ..PostmasterPid::parse(b"1\n").unwrap().unwrap() };
        assert!(of(std::process::id()).is_alive());
        assert!(of(1).is_alive());
        assert!(!of(i32::MAX as u32).is_alive());
    }
}
