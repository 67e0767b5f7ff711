//! The world stops at every call to the disk below the local store: the process is killed, or the power goes and takes with it what was not synced.
//!
//! The machine is a model of a disk (`store/model_disk.rs`), the work and what is demanded afterwards are those of the tests that stop a store
//! (`tests/support/scenes.rs`). A call that fails at the end of its work is the same stop as before the next one, so each call is stopped before it is made, and
//! each write in its middle.

#[path = "../tests/support/proved.rs"]
mod proved;
#[path = "../tests/support/scenes.rs"]
mod scenes;
#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use self::scenes::{Machine, Scene, Work, stop_everywhere, stop_twice};
use self::support::Choices;
use crate::store::Store;
use crate::store::model_disk::{At, End, ModelDisk};

const SIDES: [&str; 2] = ["home", "offsite"];

/// A disk with both repositories.
struct Disks {
    disk: ModelDisk,
    /// How it ends.
    planned: Mutex<Option<Stop>>,
}

/// Before a call, or in the middle of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    Call,
    Write,
}

type Stop = (Point, End);

const WAYS: [Stop; 4] = [
    (Point::Call, End::PowerLoss),
    (Point::Call, End::Killed),
    (Point::Write, End::PowerLoss),
    (Point::Write, End::Killed),
];

impl Disks {
    fn new() -> Self {
        Self::on(ModelDisk::with(&SIDES))
    }

    fn on(disk: ModelDisk) -> Self {
        Self { disk, planned: Mutex::default() }
    }

    fn planned(&self) -> Option<Stop> {
        *self.planned.lock().unwrap()
    }
}

impl Machine for Disks {
    type Stop = Stop;

    fn copy(&self) -> Self {
        Self::on(self.disk.copy())
    }

    fn stores(&self) -> [Arc<dyn Store>; 2] {
        SIDES.map(|side| self.disk.store(side))
    }

    fn stop_at(&self, operation: u64, how: Stop) {
        *self.planned.lock().unwrap() = Some(how);
        self.disk.stop_at(if how.0 == Point::Call { At::Call(operation) } else { At::Write(operation) });
    }

    fn operations(&self) -> u64 {
        let (calls, writes) = self.disk.counted();
        if self.planned().is_some_and(|(point, _)| point == Point::Write) { writes } else { calls }
    }

    fn stopped(&self) -> bool {
        self.disk.is_off()
    }

    fn come_back(self, choices: &mut Choices) -> Self {
        let end = self.planned().filter(|_| self.stopped()).map_or(End::PowerLoss, |(_, end)| end);
        // Of all that may be lost nothing is, all is, or some.
        let lost = [0, 2, 4][choices.below(3) as usize];
        Self::on(self.disk.after(end, &mut || choices.below(4) >= lost))
    }

    fn names(&self) -> [BTreeSet<String>; 2] {
        SIDES.map(|side| self.disk.files(side))
    }
}

#[test]
fn a_first_backup_to_a_disk_that_stops_anywhere_is_whole_or_not_there() {
    let scene = Scene::empty(Disks::new());
    assert!(stop_everywhere(&scene, &[Work::Backup], &WAYS) >= 50);
}

fn stop(works: &[Work]) {
    let scene = Scene::with_history(Disks::new());
    let crashes = stop_everywhere(&scene, works, &WAYS);
    assert!(crashes >= 30 * works.len() as u64, "{crashes} crashes");
}

#[test]
fn backups_to_a_disk_that_stops_anywhere_leave_every_backup_whole() {
    stop(&[Work::Backup, Work::FullBackup]);
}

#[test]
fn merges_on_a_disk_that_stops_anywhere_leave_every_backup_whole() {
    stop(&[Work::Merge, Work::Repack]);
}

#[test]
fn expiries_on_a_disk_that_stops_anywhere_leave_every_backup_whole() {
    stop(&[Work::Expire]);
}

#[test]
fn exports_to_a_disk_that_stops_anywhere_leave_every_backup_whole() {
    stop(&[Work::Export]);
}

#[test]
fn pins_on_a_disk_that_stops_anywhere_leave_every_backup_whole() {
    stop(&[Work::Pin, Work::Unpin]);
}

#[test]
fn a_disk_that_names_files_by_links_forgets_no_more() {
    let scene = Scene::with_history(Disks::on(ModelDisk::with(&SIDES).without_renames()));
    assert!(stop_everywhere(&scene, &[Work::Backup], &WAYS) >= 50);
}

#[test]
fn an_expiry_that_loses_power_after_a_run_was_killed_leaves_every_backup_whole() {
    let scene = Scene::with_history(Disks::new());
    let ways = [(Point::Call, End::Killed), (Point::Call, End::PowerLoss)];
    assert!(stop_twice(&scene, &[Work::Expire, Work::Backup], ways, 12) > 500);
}
