//! The operating-system user that servers run as.
//!
//! PostgreSQL refuses to run as root. So when we are root, servers, their tools and whatever reads their
//! files run as `postgres`, or as `nobody` where there is no such user; everybody else runs them as
//! themselves. Every directory that a server needs must then be reachable by that user, which is checked
//! here by permission bits, since the alternative is an obscure failure in `initdb`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{Error, Result};

/// Who runs servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUser {
    uid: u32,
    gid: u32,
    /// Whether that is not the user we are.
    switched: bool,
}

impl ServerUser {
    /// Ourselves, or an unprivileged user when we are root.
    ///
    /// # Errors
    ///
    /// When we are root and the machine has neither a `postgres` nor a `nobody`.
    pub fn get() -> Result<Self> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if !uid.is_root() {
            return Ok(Self { uid: uid.as_raw(), gid: gid.as_raw(), switched: false });
        }
        let passwd = fs::read_to_string("/etc/passwd").map_err(|e| Error::io("read", Path::new("/etc/passwd"), e))?;
        ["postgres", "nobody"]
            .iter()
            .find_map(|name| passwd_entry(&passwd, name))
            .map(|(uid, gid)| Self { uid, gid, switched: true })
            .ok_or_else(|| Error::new("PostgreSQL cannot run as root, and there is no user postgres or nobody"))
    }

    /// A command that runs `program` as this user, in a directory that it can be in, with none of the
    /// caller's `PG*` settings.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        if self.switched {
            // The standard library clears the supplementary groups when it changes the user.
            command.uid(self.uid).gid(self.gid).env("HOME", "/").current_dir("/");
        }
        command
    }

    /// Gives one file or directory to this user.
    pub fn own(&self, path: &Path) -> Result<()> {
        if self.switched {
            chown(path, Some(self.uid), Some(self.gid)).map_err(|e| Error::io("change the owner of", path, e))?;
        }
        Ok(())
    }

    /// A private temporary directory of this user, removed when dropped (kept if `PGSTRATA_KEEP` is set).
    ///
    /// Its path is short: a Unix socket's may have no more than 107 bytes.
    pub fn scratch(&self) -> Result<TempDir> {
        let preferred = std::env::temp_dir();
        let base = match preferred.as_os_str().len() <= 48 && self.can_enter(&preferred) {
            true => preferred,
            false => PathBuf::from("/tmp"),
        };
        let mut scratch = tempfile::Builder::new()
            .prefix("pgstrata-")
            .tempdir_in(&base)
            .map_err(|e| Error::io("write in", &base, e))?;
        scratch.disable_cleanup(std::env::var_os("PGSTRATA_KEEP").is_some());
        self.own(scratch.path())?;
        Ok(scratch)
    }

    /// Makes directory `name` below `parent`, for this user.
    pub fn make_dir(&self, parent: &Path, name: &str) -> Result<PathBuf> {
        let path = parent.join(name);
        fs::create_dir(&path).map_err(|e| Error::io("make", &path, e))?;
        self.own(&path)?;
        Ok(path)
    }

    /// Whether this user can read and enter `dir`, which exists.
    pub fn can_enter(&self, dir: &Path) -> bool {
        let Ok(dir) = dir.canonicalize() else { return false };
        let above = dir.ancestors().skip(1).all(|ancestor| self.permitted(ancestor, 0o1));
        above && self.permitted(&dir, 0o5)
    }

    /// Whether the mode of `path` gives this user all of `bits` (of one octal digit).
    fn permitted(&self, path: &Path, bits: u32) -> bool {
        let Ok(metadata) = fs::metadata(path) else { return false };
        let shift = match () {
            () if metadata.uid() == self.uid => 6,
            () if metadata.gid() == self.gid => 3,
            () => 0,
        };
        metadata.mode() >> shift & bits == bits
    }
}

fn passwd_entry(passwd: &str, name: &str) -> Option<(u32, u32)> {
    let mut fields = passwd.lines().map(|line| line.split(':')).find(|fields| fields.clone().next() == Some(name))?;
    Some((fields.nth(2)?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passwd_entry_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres2:x:7:8::/:\npostgres:x:101:104:,,,:/var:/bin/sh\n";
        assert_eq!(passwd_entry(passwd, "postgres"), Some((101, 104)));
        assert_eq!(passwd_entry(passwd, "nobody"), None);
    }

    #[test]
    fn a_scratch_directory_belongs_to_the_server_user_and_is_removed() {
        let user = ServerUser::get().unwrap();
        let scratch = user.scratch().unwrap();
        let path = scratch.path().to_owned();
        assert!(user.can_enter(&path));
        let made = user.command("touch").arg(path.join("file")).status().unwrap();
        assert!(made.success());
        drop(scratch);
        assert!(!path.exists() || std::env::var_os("PGSTRATA_KEEP").is_some());
    }
}
