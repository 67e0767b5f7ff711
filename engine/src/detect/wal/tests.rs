//! What the log says, as records made here, and what has to be read for it.

use super::*;
use crate::detect::FileLength;
use crate::error::ErrorKind;
use crate::pg::{
    BlocksPerSegment, DatabaseOid, RelFileLocator, RelFileNumber, RelationFile, SegmentNumber, SystemIdentifier,
    TablespaceOid, TimelineHistory, TimelineId, WalBlockSize, WalSegmentSize,
};

const HEAP: u8 = 10;
const XACT: u8 = 1;
const SMGR: u8 = 2;
const DBASE: u8 = 4;
const XLOG: u8 = 0;

const NOTHING: [u32; 0] = [];

fn source(major: u32) -> WalSource {
    WalSource {
        major: MajorVersion::new(major).unwrap(),
        system_identifier: SystemIdentifier::new(7),
        segment_size: WalSegmentSize::DEFAULT,
        block_size: WalBlockSize::DEFAULT,
        history: TimelineHistory::without_ancestors(TimelineId::new(1)),
    }
}

fn changes(major: u32) -> WalChanges {
    WalChanges::new(&source(major), BlockSize::DEFAULT, WalLevel::Replica).unwrap()
}

fn locator(spc: u32, db: u32, rel: u32) -> RelFileLocator {
    RelFileLocator { spc: TablespaceOid::new(spc), db: DatabaseOid::new(db), rel: RelFileNumber::new(rel) }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(rmgr: u8, info: u8) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    (bytes[16], bytes[17]) = (info, rmgr);
    bytes
}

/// A record with main data alone.
fn plain(rmgr: u8, info: u8, data: &[u32]) -> Vec<u8> {
    let mut bytes = header(rmgr, info);
    bytes.extend([255, 4 * data.len() as u8]);
    bytes.extend(words(data));
    bytes
}

/// A record that names blocks of one relation's fork.
fn names(rmgr: u8, fork: u8, rel: RelFileLocator, blocks: &[u32]) -> Vec<u8> {
    let mut bytes = header(rmgr, 0xB0);
    for (id, block) in blocks.iter().enumerate() {
        bytes.extend([id as u8, fork, 0, 0]);
        bytes.extend(words(&[rel.spc.as_u32(), rel.db.as_u32(), rel.rel.as_u32(), *block]));
    }
    bytes
}

fn gathered(major: u32, records: &[Vec<u8>]) -> ChangeMap {
    let mut changes = changes(major);
    for bytes in records {
        changes.add(WalRecord::new_unchecked(Lsn::new(0x28), bytes)).unwrap();
    }
    changes.finish([])
}

/// Of a file of 20 blocks that the parent had at that length, the blocks that are read.
fn read(map: &ChangeMap, locator: RelFileLocator) -> Vec<u32> {
    let file = RelationFile { locator, fork: ForkNumber::Main, segment: SegmentNumber::new(0) };
    let runs = map.runs(file, BlocksPerSegment::DEFAULT, FileLength { block_count: 20, parent_block_count: 20 });
    runs.flat_map(|run| run.start.as_u32()..run.start.as_u32() + run.count).collect()
}

fn whole() -> Vec<u32> {
    (0..20).collect()
}

#[test]
fn every_block_that_a_record_names_is_read_whoever_wrote_the_record() {
    let rel = locator(1663, 5, 16384);
    // Heap, generic, full page images (one with many blocks), and an extension's resource manager.
    let records = [
        names(HEAP, 0, rel, &[3]),
        names(20, 0, rel, &[5, 6]),
        names(XLOG, 0, rel, &[8, 9, 10]),
        names(200, 0, rel, &[12]),
    ];
    assert_eq!(read(&gathered(18, &records), rel), [3, 5, 6, 8, 9, 10, 12]);
    assert_eq!(read(&gathered(18, &records), locator(1663, 5, 16385)), NOTHING);
}

#[test]
fn blocks_of_visibility_and_free_space_maps_are_left_out() {
    let rel = locator(1663, 5, 16384);
    let map = gathered(15, &[names(HEAP, 1, rel, &[3]), names(HEAP, 2, rel, &[4]), names(HEAP, 3, rel, &[0])]);
    assert_eq!(map.relation_count(), 0);
    assert!(map.is_read(rel, ForkNumber::Vm, BlockNumber::new(9)));
}

#[test]
fn truncate_then_extend_by_pages_that_are_in_no_record_reads_them() {
    let rel = locator(1663, 5, 16384);
    let cut = plain(SMGR, 0x21, &[10, 1663, 5, 16384, 7]);
    let map = gathered(16, &[names(HEAP, 0, rel, &[2, 15]), cut, names(HEAP, 0, rel, &[12])]);
    assert_eq!(read(&map, rel), [2].into_iter().chain(10..20).collect::<Vec<_>>());
}

#[test]
fn drop_and_recreate_of_a_relation_ignores_the_parents_blocks() {
    let rel = locator(1663, 5, 16384);
    for kind in [0x81, 0xA1, 0xB1, 0xC1] {
        let end = plain(XACT, kind, &[0, 0, 4, 1, 1663, 5, 16384]);
        assert_eq!(read(&gathered(14, &[names(HEAP, 0, rel, &[2]), end]), rel), whole());
    }
    let created = plain(SMGR, 0x11, &[1663, 5, 16384, 0]);
    assert_eq!(read(&gathered(14, &[created]), rel), whole());
    // The fork that was made is another one.
    let init = plain(SMGR, 0x11, &[1663, 5, 16384, 3]);
    assert_eq!(read(&gathered(14, &[init]), rel), NOTHING);
}

#[test]
fn a_database_that_was_moved_there_and_back_is_read_whole_at_both_ends() {
    for (major, drop) in [(13, 0x11), (14, 0x11), (15, 0x21), (18, 0x21)] {
        let there = [plain(DBASE, 0x01, &[5, 1700, 5, 1663]), plain(DBASE, drop, &[5, 1, 1663])];
        let back = [plain(DBASE, 0x01, &[5, 1663, 5, 1700]), plain(DBASE, drop, &[5, 1, 1700])];
        let map = gathered(major, &[there, back].concat());
        for spc in [1663, 1700] {
            assert_eq!(read(&map, locator(spc, 5, 16384)), whole(), "{major}");
        }
        assert_eq!(read(&map, locator(1663, 6, 16384)), NOTHING);
    }
}

#[test]
fn a_stretch_of_minimal_wal_makes_the_log_useless_from_that_lsn() {
    let minimal = plain(XLOG, 0x60, &[100, 8, 0, 0, 64, 0, 0]);
    let mut changes = changes(13);
    let error = changes.add(WalRecord::new_unchecked(Lsn::new(0x200_0028), &minimal)).unwrap_err();
    assert_eq!((error.kind(), error.place()), (ErrorKind::Unsupported, Some("WAL 0/2000028")));
    assert!(error.what().contains("wal_level is minimal from 0/2000028 on"), "{error}");
    // That it is replica again says nothing of what it was before.
    let error = WalChanges::new(&source(13), BlockSize::DEFAULT, WalLevel::Minimal).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_record_that_changes_files_in_an_unknown_way_makes_the_log_useless() {
    let special = plain(150, 0x01, &[1]);
    let error = changes(18).add(WalRecord::new_unchecked(Lsn::new(0x28), &special)).unwrap_err();
    assert_eq!((error.kind(), error.place()), (ErrorKind::Unsupported, Some("WAL 0/28")));
}

#[test]
fn a_replaced_rest_of_a_record_is_nothing_to_stop_at() {
    let map = gathered(18, &[plain(XLOG, 0xD0, &[0x28, 0, 0, 0])]);
    assert_eq!((map.relation_count(), map.marked_count()), (0, 0));
}
