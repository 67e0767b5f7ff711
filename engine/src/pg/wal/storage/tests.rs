//! Records that name relations without blocks, of every major.

use super::*;
use crate::pg::{BlockSize, Lsn, RecordDecoder, WalRecord};

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// What a record says, as text; an error without its place.
fn said(major: u32, rmgr: u8, info: u8, data: &[u8]) -> String {
    let mut bytes = vec![0; 24];
    (bytes[16], bytes[17]) = (info, rmgr);
    bytes.push(254);
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(data);
    let major = MajorVersion::new(major).unwrap();
    let mut decoder = RecordDecoder::new(major, BlockSize::DEFAULT);
    let decoded = decoder.decode(WalRecord::new_unchecked(Lsn::new(0x28), &bytes)).unwrap();
    let mut changes = Vec::new();
    let each = |change| {
        changes.push(match change {
            StorageChange::Created { locator, fork } => format!("create {locator} {fork}"),
            StorageChange::Truncated { locator, limit } => format!("truncate {locator} to {limit}"),
            StorageChange::Dropped { locator } => format!("drop {locator}"),
            StorageChange::DatabaseReplaced { spc, db } => format!("database {spc}/{db}"),
            StorageChange::Level(level) => format!("level {level}"),
        })
    };
    match decoded.storage_changes(major, each) {
        Ok(()) => changes.join(", "),
        Err(error) => {
            assert_eq!((error.kind(), error.place()), (ErrorKind::Unsupported, Some("WAL 0/28")));
            error.what().to_owned()
        }
    }
}

fn on_every_major(rmgr: u8, info: u8, data: &[u8], expected: &str) {
    (13..=19).for_each(|major| assert_eq!(said(major, rmgr, info, data), expected, "{major}"));
}

#[test]
fn storage_is_made_and_cut() {
    on_every_major(2, 0x11, &words(&[1663, 5, 16384, 3]), "create 1663/5/16384 init");
    on_every_major(2, 0x21, &words(&[9, 1663, 5, 16384, 7]), "truncate 1663/5/16384 to 9");
    on_every_major(2, 0x21, &words(&[9, 1663, 5, 16384, 6]), "");
}

#[test]
fn every_end_of_a_transaction_tells_what_it_drops() {
    let time = [0, 0];
    let dropped = words(&[&time[..], &[4, 2], &[1663, 5, 16384], &[1700, 5, 16385]].concat());
    for kind in [0x80, 0xA0, 0xB0, 0xC0] {
        on_every_major(1, kind | 1, &dropped, "drop 1663/5/16384, drop 1700/5/16385");
    }
    // Database, three subtransactions, and invalidations after the relations.
    let all = words(&[&time[..], &[0b1111, 5, 1663, 3, 7, 8, 9, 1, 1663, 5, 16384, 1, 2, 3, 4, 5]].concat());
    on_every_major(1, 0x80, &all, "drop 1663/5/16384");
    on_every_major(1, 0x00, &words(&time), "");
    on_every_major(1, 0x80, &words(&[0, 0, 0b11, 5, 1663, 0]), "");
    // A prepared transaction says in its own format what it would drop; it does not do it yet.
    for kind in [0x10, 0x90, 0x50, 0x60] {
        on_every_major(1, kind, &dropped, "");
    }
}

#[test]
fn a_commit_of_more_subtransactions_than_it_has_room_for_is_refused() {
    for data in [&[0, 0, 2, 5, 1][..], &[0, 0, 2, u32::MAX], &[0, 0, 4, 1, 1663, 5], &[0, 0, 4, u32::MAX, 1], &[0, 0]] {
        let found = said(16, 1, 0x80, &words(data));
        assert!(found.contains("does not read as it should"), "{data:?}: {found}");
    }
}

#[test]
fn databases_are_made_and_dropped_by_the_numbers_of_each_major() {
    let (created, dropped) = (words(&[20, 1663, 1, 1663]), words(&[20, 2, 1663, 1700]));
    for major in 13..=19 {
        assert_eq!(said(major, 4, 0x01, &created), "database 1663/20");
    }
    for major in [13, 14] {
        assert_eq!(said(major, 4, 0x11, &dropped), "database 1663/20, database 1700/20");
        assert!(said(major, 4, 0x21, &dropped).contains("does not read as it should"));
    }
    for major in 15..=19 {
        assert_eq!(said(major, 4, 0x10, &words(&[20, 1663])), "database 1663/20");
        assert_eq!(said(major, 4, 0x21, &dropped), "database 1663/20, database 1700/20");
        assert!(said(major, 4, 0x21, &words(&[20, 3, 1663, 1700])).contains("does not read as it should"));
    }
}

#[test]
fn wal_level_is_read_where_each_major_has_it() {
    let parameters = words(&[100, 8, 10, 0, 64, 0, 0]);
    on_every_major(0, 0x60, &parameters, "level minimal");
    let checkpoint = words(&[0, 0, 1, 1, 1, 2, 0, 0]);
    let recovery = words(&[0, 0, 2, 1, 1]);
    for major in 13..=19 {
        let from_17 = |text: &'static str| if major < 17 { "" } else { text };
        assert_eq!(said(major, 0, 0x00, &checkpoint), from_17("level logical"));
        assert_eq!(said(major, 0, 0x10, &checkpoint), from_17("level logical"));
        assert_eq!(said(major, 0, 0x90, &recovery), from_17("level replica"));
        assert_eq!(said(major, 0, 0xE0, &words(&[0, 1])), from_17("level minimal"));
        assert!(said(major, 0, 0x60, &words(&[1, 1, 1, 1, 1, 3, 0])).contains("does not read as it should"));
    }
    // What replaces a lost record, a switch, an end of backup.
    for kind in [0xD0, 0x40, 0x50, 0xA0] {
        on_every_major(0, kind, &words(&[0, 0, 0, 0, 0, 0]), "");
    }
}

#[test]
fn a_special_change_of_files_of_an_unknown_kind_is_refused() {
    for (rmgr, info) in [(0, 0x31), (1, 0x11), (2, 0x31), (5, 0x01), (7, 0x01), (10, 0x01), (130, 0x21), (255, 0xF1)] {
        let found = said(18, rmgr, info, &words(&[1, 2, 3, 4, 5, 6]));
        assert!(found.contains("changes files in an unknown way"), "{rmgr} {info:02X}: {found}");
        assert_eq!(said(18, rmgr, info & 0xF0, &words(&[1, 2, 3, 4, 5, 6])), "");
    }
}

#[test]
fn tablespaces_and_relation_maps_change_no_blocks() {
    on_every_major(5, 0x00, &words(&[16400, 0x2F]), "");
    on_every_major(5, 0x10, &words(&[16400]), "");
    on_every_major(7, 0x00, &words(&[5, 1663, 512]), "");
}
