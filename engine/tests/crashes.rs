//! The world stops at every operation on a store: before it, after it, and in the middle of an object.
//!
//! What an object store promises holds (an object is there, whole, or not at all); what stops is the process that uses it, or one of its stores. What a
//! local disk keeps is another question, and is asked below the local store.

#[path = "support/proved.rs"]
mod proved;
#[path = "support/scenes.rs"]
mod scenes;
mod support;

use std::collections::BTreeSet;
use std::io::BufRead;
use std::sync::{Arc, Mutex};

use pgstrata_engine::error::{Error, ErrorKind, Result};
use pgstrata_engine::store::{MemoryStore, ObjectInfo, ObjectName, Store};
use scenes::{Machine, Scene, Work, stop_everywhere, stop_twice};
use support::Choices;

/// When it stops: before the operation, after it, or in the middle of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Before,
    After,
    Within,
}

/// Which stores stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Both,
    Home,
    Offsite,
}

/// Two stores in memory, and what stops them.
#[derive(Debug, Default)]
struct Stores {
    home: MemoryStore,
    offsite: MemoryStore,
    power: Arc<Power>,
}

#[derive(Debug, Default)]
struct Power {
    /// At which operation, how, and how many there were.
    plan: Mutex<Option<(u64, When, Which)>>,
    counted: Mutex<u64>,
    off: Mutex<bool>,
}

/// One of the two.
#[derive(Clone, Debug)]
struct Stoppable {
    objects: MemoryStore,
    which: Which,
    power: Arc<Power>,
}

fn off() -> Error {
    Error::new(ErrorKind::Unavailable, "the machine is off")
}

impl Power {
    fn concerns(&self, which: Which) -> bool {
        matches!(*self.plan.lock().unwrap(), Some((_, _, planned)) if planned == Which::Both || planned == which)
    }

    fn is_off(&self, which: Which) -> bool {
        *self.off.lock().unwrap() && self.concerns(which)
    }

    /// Counts an operation; when the stores stop, if it is now.
    fn count(&self, which: Which, is_put: bool) -> Result<Option<When>> {
        let mut counted = self.counted.lock().unwrap();
        if self.is_off(which) {
            return Err(off());
        }
        let Some((at, when, _)) = *self.plan.lock().unwrap() else { return Ok(None) };
        if !self.concerns(which) || (when == When::Within && !is_put) {
            return Ok(None);
        }
        *counted += 1;
        if *counted - 1 < at {
            return Ok(None);
        }
        *self.off.lock().unwrap() = true;
        Ok(Some(when))
    }
}

impl Store for Stoppable {
    fn put_new(&self, name: &ObjectName, content: &mut dyn BufRead) -> Result<u64> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|e| Error::new(ErrorKind::Unavailable, "broke off").because(e))?;
        match self.power.count(self.which, true)? {
            None => self.objects.put_new(name, &mut &bytes[..]),
            Some(When::Before) => Err(off()),
            Some(When::After) => self.objects.put_new(name, &mut &bytes[..]).and(Err(off())),
            // What there is of an object that was not put whole has no name.
            Some(When::Within) => Err(off()),
        }
    }

    fn get(&self, name: &ObjectName, max_len: u64) -> Result<Vec<u8>> {
        if self.power.is_off(self.which) { Err(off()) } else { self.objects.get(name, max_len) }
    }

    fn get_range(&self, name: &ObjectName, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if self.power.is_off(self.which) { Err(off()) } else { self.objects.get_range(name, offset, buffer) }
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        if self.power.is_off(self.which) { Err(off()) } else { self.objects.list(prefix) }
    }

    fn delete(&self, name: &ObjectName) -> Result<()> {
        match self.power.count(self.which, false)? {
            None => self.objects.delete(name),
            Some(When::After) => self.objects.delete(name).and(Err(off())),
            Some(_) => Err(off()),
        }
    }
}

fn copy_of(store: &MemoryStore) -> MemoryStore {
    let copy = MemoryStore::new();
    for object in store.list("").unwrap() {
        copy.tamper(&object.name, Some(store.get(&object.name, u64::MAX).unwrap()));
    }
    copy
}

impl Machine for Stores {
    type Stop = (When, Which);

    fn copy(&self) -> Self {
        Self { home: copy_of(&self.home), offsite: copy_of(&self.offsite), power: Arc::default() }
    }

    fn stores(&self) -> [Arc<dyn Store>; 2] {
        let store = |objects: &MemoryStore, which| Stoppable {
            objects: objects.clone(),
            which,
            power: Arc::clone(&self.power),
        };
        [Arc::new(store(&self.home, Which::Home)), Arc::new(store(&self.offsite, Which::Offsite))]
    }

    fn stop_at(&self, operation: u64, (when, which): Self::Stop) {
        *self.power.plan.lock().unwrap() = Some((operation, when, which));
    }

    fn operations(&self) -> u64 {
        *self.power.counted.lock().unwrap()
    }

    fn stopped(&self) -> bool {
        *self.power.off.lock().unwrap()
    }

    fn come_back(self, _: &mut Choices) -> Self {
        Self { power: Arc::default(), ..self }
    }

    fn names(&self) -> [BTreeSet<String>; 2] {
        [&self.home, &self.offsite].map(|store| store.list("").unwrap().iter().map(|o| o.name.to_string()).collect())
    }
}

const WAYS: [(When, Which); 3] = [(When::Before, Which::Both), (When::After, Which::Both), (When::Within, Which::Both)];

#[test]
fn a_first_backup_that_is_stopped_anywhere_is_whole_or_not_there() {
    let scene = Scene::empty(Stores::default());
    assert!(stop_everywhere(&scene, &[Work::Backup], &WAYS) >= 10);
}

#[test]
fn work_that_is_stopped_anywhere_leaves_every_backup_whole() {
    let scene = Scene::with_history(Stores::default());
    let works =
        [Work::Backup, Work::FullBackup, Work::Merge, Work::Repack, Work::Expire, Work::Export, Work::Pin, Work::Unpin];
    let crashes = stop_everywhere(&scene, &works, &WAYS);
    assert!(crashes >= 100, "{crashes} crashes");
}

#[test]
fn an_export_survives_the_loss_of_either_store() {
    let scene = Scene::with_history(Stores::default());
    for which in [Which::Home, Which::Offsite] {
        let ways = [When::Before, When::After, When::Within].map(|when| (when, which));
        assert!(stop_everywhere(&scene, &[Work::Export], &ways) > 3);
    }
}

#[test]
fn an_expiry_that_is_stopped_after_a_run_was_leaves_every_backup_whole() {
    let scene = Scene::with_history(Stores::default());
    let ways = [(When::After, Which::Both), (When::Before, Which::Both)];
    assert!(stop_twice(&scene, &[Work::Expire, Work::Backup], ways, 6) > 50);
}
