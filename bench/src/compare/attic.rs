//! What was restored and is in the way before the next restore: deleted, or, of a cluster of many files, put aside.
//!
//! ext4 without a journal does not give out an inode that was deleted less than a minute ago (five minutes, where the deletion is not yet
//! written), and looks at each of them again for every new file (Linux: `fs/ext4/ialloc.c`,
//! `recently_deleted`). After the deletion of some ten thousand files, whoever makes as many next took several times as long here, whatever
//! tool it was. So nothing is deleted as long as there is room, and a round after which there is none ends with a wait.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use testdata::Result;

use super::site::Site;
use crate::{cannot, read};

/// From how many files on a cluster has many.
const MANY_FILES: usize = 10_000;
/// How long deleted inodes are not given out, with a second to spare.
const RECENT: Duration = Duration::from_secs(61);
/// Where things are put.
const NAME: &str = "attic";

/// Where a run's old restores go.
pub struct Attic {
    many: bool,
    count: u32,
    /// Bytes that came in the round.
    round_len: u64,
}

impl Attic {
    /// For the restores of a site.
    ///
    /// # Errors
    /// When its files cannot be listed.
    pub fn new(site: &Site) -> Result<Self> {
        let many = read::files(&site.data_dir())?.len() >= MANY_FILES;
        if many {
            site.scratch().user().make_dir(site.scratch().work(), NAME)?;
        }
        Ok(Self { many, count: 0, round_len: 0 })
    }

    /// Takes the scratch directory's `name` out of the way, if it is there.
    ///
    /// # Errors
    /// When it stays.
    pub fn take(&mut self, site: &Site, name: &str) -> Result<()> {
        let from = site.scratch().path(name);
        if !self.many || !from.exists() {
            return site.scratch().clear(name);
        }
        self.round_len += site.bytes()?;
        self.count += 1;
        let to = self.path(site).join(self.count.to_string());
        fs::rename(&from, &to).map_err(|e| cannot("move", &from, e))
    }

    /// Makes room for another round, and waits until that does not matter to whoever comes first in it.
    ///
    /// # Errors
    /// When that fails, or we were asked to end.
    pub fn end_round(&mut self, site: &Site) -> Result<()> {
        let needed = std::mem::take(&mut self.round_len);
        if !self.many || site.scratch().free_len()? > 2 * needed {
            return Ok(());
        }
        for entry in fs::read_dir(self.path(site)).map_err(|e| cannot("list", &self.path(site), e))?.flatten() {
            fs::remove_dir_all(entry.path()).map_err(|e| cannot("remove", &entry.path(), e))?;
        }
        site.scratch().sync()?;
        site.scratch().pause(RECENT)
    }

    fn path(&self, site: &Site) -> PathBuf {
        site.scratch().path(NAME)
    }
}
