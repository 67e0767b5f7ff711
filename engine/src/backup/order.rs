//! Puts files in order again that several workers finish: the file table takes them in the order of their paths.
//!
//! Files get numbers when they are begun, in order. What is finished waits for those before it, and goes on as soon as they are there. At most
//! [`WINDOW`] files wait: before more are begun, whoever begins them waits, too, and the workers are told to finish what they hold
//! back, as a block may lie in a chunk that is not full. So memory is bounded by the files in work, not by those of the cluster.
//!
//! What goes wrong: somebody gives up; then nobody waits any more.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

use super::copy::lock;
use crate::error::Result;
use crate::repo::FileEntry;

/// Finished files that wait for one that is not, at most but for those in work. Few in tests, so that those of whole backups come to the bound, too.
pub(super) const WINDOW: usize = if cfg!(test) { 4 } else { 1 << 14 };

/// Takes finished files in the order of their numbers.
pub(super) type Take<'a> = dyn FnMut(FileEntry) -> Result<()> + Send + 'a;

/// Files that are finished in any order, and go on in that of their numbers.
pub(super) struct Order<'a> {
    state: Mutex<State<'a>>,
    changed: Condvar,
}

struct State<'a> {
    /// The number that is to go on next.
    next: u64,
    /// What is finished after it; `None` for a file that vanished.
    waiting: BTreeMap<u64, Option<FileEntry>>,
    take: &'a mut Take<'a>,
    given_up: bool,
}

impl<'a> Order<'a> {
    /// Files go on to `take`, from number 0.
    pub fn new(take: &'a mut Take<'a>) -> Self {
        let state = State { next: 0, waiting: BTreeMap::new(), take, given_up: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes a finished file, or that it vanished.
    ///
    /// # Errors
    /// What whoever takes them says.
    pub fn deliver(&self, number: u64, entry: Option<FileEntry>) -> Result<()> {
        let mut state = lock(&self.state);
        state.waiting.insert(number, entry);
        while let Some((&number, _)) = state.waiting.first_key_value()
            && number == state.next
        {
            let first = state.waiting.pop_first();
            state.next += 1;
            if let Some((_, Some(entry))) = first {
                (state.take)(entry)?;
            }
        }
        if state.waiting.len() < WINDOW {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Whether so many wait that what is held back should be finished.
    pub fn is_crowded(&self) -> bool {
        lock(&self.state).waiting.len() >= WINDOW
    }

    /// Waits until fewer than [`WINDOW`] wait, or somebody gave up; before it waits, it calls `hurry`.
    pub fn wait_for_room(&self, hurry: impl Fn()) {
        let mut state = lock(&self.state);
        while state.waiting.len() >= WINDOW && !state.given_up {
            hurry();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nobody waits for room any more.
    pub fn give_up(&self) {
        lock(&self.state).given_up = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::repo::FileKind;

    fn entry(number: u64) -> FileEntry {
        let path = number.to_string().into_bytes();
        FileEntry { path, kind: FileKind::File, mode: 0, uid: 0, gid: 0, len: number, parts: Vec::new() }
    }

    proptest! {
        #[test]
        fn files_go_on_in_order_whatever_the_order_they_are_finished_in(
            order in Just((0..40u64).collect::<Vec<_>>()).prop_shuffle(),
            vanished in prop::collection::btree_set(0..40u64, 0..10),
        ) {
            let mut taken = Vec::new();
            let mut take = |entry: FileEntry| { taken.push(entry.len); Ok(()) };
            let files = Order::new(&mut take);
            for number in order {
                files.deliver(number, (!vanished.contains(&number)).then(|| entry(number))).unwrap();
            }
            drop(files);
            prop_assert_eq!(taken, (0..40).filter(|number| !vanished.contains(number)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn who_begins_files_waits_until_there_is_room_and_hurries_the_others() {
        let mut take = |_| Ok(());
        let files = Order::new(&mut take);
        (1..=WINDOW as u64).for_each(|number| files.deliver(number, Some(entry(number))).unwrap());
        assert!(files.is_crowded());
        let (hurry, hurried) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hurried.recv().unwrap();
                files.deliver(0, None).unwrap();
            });
            files.wait_for_room(|| {
                let _ = hurry.try_send(());
            });
        });
        assert!(!files.is_crowded());
    }

    #[test]
    fn nobody_waits_for_one_who_gave_up() {
        let mut take = |_| Ok(());
        let files = Order::new(&mut take);
        (1..=WINDOW as u64).for_each(|number| files.deliver(number, None).unwrap());
        let (hurry, hurried) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                hurried.recv().unwrap();
                files.give_up();
            });
            files.wait_for_room(|| {
                let _ = hurry.try_send(());
            });
        });
        assert!(files.is_crowded());
    }
}
