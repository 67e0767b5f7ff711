//! What every store must do; each driver's tests run all of it.

use super::{ObjectName, Store};
use crate::error::ErrorKind;

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

fn names(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.list(prefix).unwrap().into_iter().map(|object| object.name.to_string()).collect()
}

/// Runs the suite on an empty store.
pub fn run(store: &dyn Store) {
    an_object_reads_back_as_it_was_put(store);
    a_name_is_given_once(store);
    reads_beyond_the_end_are_damage(store);
    what_is_not_there_is_missing(store);
    listings_are_sorted_and_complete(store);
    deleting_is_idempotent(store);
    racing_writers_have_one_winner(store);
}

fn an_object_reads_back_as_it_was_put(store: &dyn Store) {
    let bytes: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(store.put_new(&name("read/back"), &mut &bytes[..]).unwrap(), 400_000);
    assert_eq!(store.get(&name("read/back"), 400_000).unwrap(), bytes);
    assert_eq!(store.get(&name("read/back"), 399_999).unwrap_err().kind(), ErrorKind::Unsupported);
    let mut range = [0; 8];
    store.get_range(&name("read/back"), 399_992, &mut range).unwrap();
    assert_eq!(range, bytes[399_992..]);
    assert_eq!(store.put_new(&name("read/empty"), &mut &b""[..]).unwrap(), 0);
    assert_eq!(store.get(&name("read/empty"), 0).unwrap(), b"");
}

fn a_name_is_given_once(store: &dyn Store) {
    store.put_new(&name("once"), &mut &b"first"[..]).unwrap();
    assert_eq!(store.put_new(&name("once"), &mut &b"second"[..]).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(store.get(&name("once"), 10).unwrap(), b"first");
}

fn reads_beyond_the_end_are_damage(store: &dyn Store) {
    store.put_new(&name("short"), &mut &b"1234"[..]).unwrap();
    for (offset, len) in [(0, 5), (4, 1), (5, 1), (u64::MAX, 1), (u64::MAX - 1, 4)] {
        let error = store.get_range(&name("short"), offset, &mut vec![0; len]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unavailable), "{offset} {len}: {error}");
    }
    store.get_range(&name("short"), 4, &mut []).unwrap();
}

fn what_is_not_there_is_missing(store: &dyn Store) {
    assert_eq!(store.get(&name("nowhere/x"), 1).unwrap_err().kind(), ErrorKind::Missing);
    assert_eq!(store.get_range(&name("nowhere"), 0, &mut [0]).unwrap_err().kind(), ErrorKind::Missing);
}

fn listings_are_sorted_and_complete(store: &dyn Store) {
    for text in ["list/b/1", "list/a", "list/b/0", "list/c-1", "listen"] {
        store.put_new(&name(text), &mut text.as_bytes()).unwrap();
    }
    assert_eq!(names(store, "list/"), ["list/a", "list/b/0", "list/b/1", "list/c-1"]);
    assert_eq!(names(store, "list/b/"), ["list/b/0", "list/b/1"]);
    assert_eq!(names(store, "list/c"), ["list/c-1"]);
    assert_eq!(names(store, "nothing/"), [""; 0]);
    assert!(names(store, "").contains(&"listen".to_owned()));
    assert_eq!(store.list("list/a").unwrap()[0].len, 6);
}

fn deleting_is_idempotent(store: &dyn Store) {
    store.put_new(&name("gone"), &mut &b"x"[..]).unwrap();
    store.get(&name("gone"), 1).unwrap();
    store.delete(&name("gone")).unwrap();
    store.delete(&name("gone")).unwrap();
    assert_eq!(store.get(&name("gone"), 1).unwrap_err().kind(), ErrorKind::Missing);
    store.put_new(&name("gone"), &mut &b"again"[..]).unwrap();
    assert_eq!(store.get(&name("gone"), 5).unwrap(), b"again");
}

fn racing_writers_have_one_winner(store: &dyn Store) {
    let put = |i: u8| store.put_new(&name("race"), &mut &vec![i; 10_000][..]).is_ok().then_some(i);
    let winners: Vec<u8> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8).map(|i| scope.spawn(move || put(i))).collect();
        writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
    });
    assert_eq!(winners.len(), 1);
    assert_eq!(store.get(&name("race"), 10_000).unwrap(), vec![winners[0]; 10_000]);
}
