//! The map against a naive one, and its object against damage.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::blocks::{BITMAP_WORDS, GROUP_BLOCKS, Group, MAX_OFFSETS};
use super::*;
use crate::error::ErrorKind;
use crate::pg::{Lsn, RelFileNumber, SegmentNumber, TimelineId};

const CLUSTER: SystemIdentifier = SystemIdentifier::new(7);
const SMALL: u32 = 40;

fn locator(db: u32, rel: u32) -> RelFileLocator {
    RelFileLocator { spc: TablespaceOid::DEFAULT, db: DatabaseOid::new(db), rel: RelFileNumber::new(rel) }
}

fn block(number: u32) -> BlockNumber {
    BlockNumber::new(number)
}

fn file(rel: u32, segment: u32) -> RelationFile {
    RelationFile { locator: locator(5, rel), fork: ForkNumber::Main, segment: SegmentNumber::new(segment) }
}

fn range(start: u64, end: u64) -> WalRange {
    WalRange { timeline: TimelineId::new(1), start: Lsn::new(start), end: Lsn::new(end) }
}

/// What a log says, one thing after the other.
#[derive(Clone, Debug)]
enum Step {
    Mark(u32, u32),
    Limit(u32, u32),
    Database(u32),
}

fn map(steps: &[Step]) -> ChangeMap {
    let mut map = ChangeMap::new(CLUSTER);
    for step in steps {
        match *step {
            Step::Mark(rel, at) => map.mark(locator(5, rel), ForkNumber::Main, block(at)),
            Step::Limit(rel, at) => map.set_limit(locator(5, rel), ForkNumber::Main, block(at)),
            Step::Database(db) => map.replace_database(TablespaceOid::DEFAULT, DatabaseOid::new(db)),
        }
    }
    map
}

fn runs(map: &ChangeMap, file: RelationFile, size: u32, block_count: u32, parent_block_count: u32) -> Vec<(u32, u32)> {
    let size = BlocksPerSegment::new(size).unwrap();
    let runs = map.runs(file, size, FileLength { block_count, parent_block_count });
    runs.map(|run| (run.start.as_u32(), run.count)).collect()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (1u32..4, 0..SMALL).prop_map(|(rel, at)| Step::Mark(rel, at)),
        2 => (1u32..4, 0..SMALL).prop_map(|(rel, at)| Step::Limit(rel, at)),
        1 => (5u32..9).prop_map(Step::Database),
    ];
    proptest::collection::vec(step, 0..30)
}

/// Blocks that come in crowds, so that groups turn into bitmaps.
fn crowds() -> impl Strategy<Value = Vec<u32>> {
    let crowd = (0u32..4 * GROUP_BLOCKS, 1u32..9000, 1u32..4)
        .prop_map(|(from, count, stride)| (0..count).map(|i| from + i * stride).collect::<Vec<_>>());
    proptest::collection::vec(crowd, 0..4).prop_map(|crowds| crowds.concat())
}

#[test]
fn truncate_then_extend_reads_every_block_beyond_the_truncation() {
    // Of 200 blocks 100 were cut; of those that came again, the log names only 101.
    let map = map(&[Step::Mark(1, 3), Step::Limit(1, 100), Step::Mark(1, 101)]);
    assert_eq!(runs(&map, file(1, 0), 1000, 180, 200), [(3, 1), (100, 80)]);
    assert!(map.is_read(locator(5, 1), ForkNumber::Main, block(150)));
    assert!(!map.is_read(locator(5, 1), ForkNumber::Main, block(99)));
}

#[test]
fn blocks_that_the_parent_did_not_have_are_read_though_no_record_names_them() {
    let map = map(&[Step::Mark(1, 3)]);
    assert_eq!(runs(&map, file(1, 0), 1000, 180, 100), [(3, 1), (100, 80)]);
    assert_eq!(runs(&map, file(2, 0), 1000, 180, 180), []);
    assert_eq!(runs(&map, file(2, 0), 1000, 180, 0), [(0, 180)], "a file that the parent did not have");
    assert_eq!(runs(&map, file(2, 0), 1000, 20, 180), []);
}

#[test]
fn a_truncation_on_the_old_timeline_and_growth_on_the_new_one_are_the_same_in_any_order() {
    let (older, newer) = (map(&[Step::Limit(1, 10)]), map(&[Step::Mark(1, 12), Step::Mark(1, 15)]));
    let mut newest_first = newer.clone();
    newest_first.union(older.clone()).unwrap();
    let mut oldest_first = older;
    oldest_first.union(newer).unwrap();
    assert_eq!(newest_first, oldest_first);
    assert_eq!(runs(&newest_first, file(1, 0), 1000, 20, 20), [(10, 10)]);
}

#[test]
fn drop_and_recreate_of_a_relation_reads_all_of_it() {
    let map = map(&[Step::Mark(1, 3), Step::Limit(1, 0)]);
    assert_eq!(runs(&map, file(1, 0), 1000, 20, 20), [(0, 20)]);
    assert_eq!(runs(&map, file(1, 1), 10, 7, 10), [(10, 7)]);
}

#[test]
fn a_database_that_was_copied_is_read_whole_in_that_tablespace_only() {
    let map = map(&[Step::Database(5), Step::Mark(1, 3)]);
    assert_eq!(runs(&map, file(9, 0), 1000, 20, 20), [(0, 20)]);
    let elsewhere = RelFileLocator { spc: TablespaceOid::new(99), ..locator(5, 9) };
    assert!(!map.is_read(elsewhere, ForkNumber::Main, block(1)));
    assert!(!map.is_read(locator(6, 9), ForkNumber::Main, block(1)));
}

#[test]
fn other_forks_are_read_whole_whatever_the_log_says() {
    let mut map = ChangeMap::new(CLUSTER);
    for fork in [ForkNumber::Vm, ForkNumber::Fsm, ForkNumber::Init] {
        map.mark(locator(5, 1), fork, block(1));
        map.set_limit(locator(5, 1), fork, block(1));
        assert!(map.is_read(locator(5, 1), fork, block(7)));
        assert_eq!(runs(&map, RelationFile { fork, ..file(1, 0) }, 1000, 20, 20), [(0, 20)]);
    }
    assert_eq!((map.relation_count(), map.marked_count()), (0, 0));
}

#[test]
fn blocks_at_the_borders_of_groups_and_segments_are_in_the_right_file() {
    let borders = [0, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073, u32::MAX];
    let map = map(&borders.map(|at| Step::Mark(1, at)));
    let full = 131_072;
    assert_eq!(runs(&map, file(1, 0), full, full, full), [(0, 1), (65_535, 3), (131_071, 1)]);
    assert_eq!(runs(&map, file(1, 1), full, full, full), [(131_072, 2)]);
    assert_eq!(runs(&map, file(1, 2), full, full, full), []);
    assert_eq!(runs(&map, file(1, 32_767), full, full, full), [(u32::MAX, 1)]);
    assert_eq!(runs(&map, file(1, u32::MAX), full, full, 0), [], "no fork reaches there");
    // A limit that is exactly a segment's border leaves the segment before it alone.
    let cut = self::map(&[Step::Limit(1, full)]);
    assert_eq!(
        (runs(&cut, file(1, 0), full, full, full), runs(&cut, file(1, 1), full, 9, 9)),
        (vec![], vec![(full, 9)])
    );
}

#[test]
fn changes_all_over_a_hundred_million_blocks_are_stored_in_less_than_a_megabyte() {
    let mut map = ChangeMap::new(CLUSTER);
    (0..100_000_000 / 64).for_each(|at| map.mark(locator(5, 1), ForkNumber::Main, block(64 * at)));
    let group_count = map.relations.values().flat_map(|changes| changes.marked.groups()).count();
    assert_eq!(group_count, 100_000_000 / GROUP_BLOCKS as usize + 1);
    let bytes = map.encode("changes").unwrap();
    assert!(bytes.len() < 1 << 20, "{} bytes", bytes.len());
    assert_eq!(ChangeMap::decode(&bytes, "changes").unwrap(), map);
}

#[test]
fn a_group_turns_into_a_bitmap_at_one_length_whatever_the_order() {
    let ascending: Vec<_> = (0..=MAX_OFFSETS as u32).map(|at| Step::Mark(1, 3 * at)).collect();
    let mut descending = ascending.clone();
    descending.reverse();
    assert_eq!(map(&ascending), map(&descending));
    let kinds = |steps: &[Step]| {
        let map = map(steps);
        map.relations.values().map(|changes| matches!(changes.marked.groups()[0].1, Group::Bitmap(_))).next()
    };
    assert_eq!((kinds(&ascending), kinds(&ascending[1..])), (Some(true), Some(false)));
}

#[test]
fn maps_of_two_clusters_do_not_mix() {
    let error = map(&[]).union(ChangeMap::new(SystemIdentifier::new(8))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

#[test]
fn every_flipped_byte_truncation_and_other_name_is_found() {
    let mut map = map(&[Step::Mark(1, 3), Step::Limit(2, 9), Step::Database(6)]);
    map.cover(range(10, 20));
    let bytes = map.encode("changes/1").unwrap();
    assert_eq!(ChangeMap::decode(&bytes, "changes/1").unwrap(), map);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        assert!(ChangeMap::decode(&damaged, "changes/1").is_err(), "byte {at}");
        assert!(ChangeMap::decode(&bytes[..at], "changes/1").is_err(), "cut at {at}");
    }
    assert_eq!(ChangeMap::decode(&bytes, "changes/2").unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_newer_format_is_unsupported_and_a_frame_that_expands_for_ever_is_refused() {
    let content = b"pgstrata changes 2\n".to_vec();
    let check = blake3::Hasher::new().update(b"x\0").update(&content).finalize();
    let newer = [content, check.as_bytes().to_vec()].concat();
    assert_eq!(ChangeMap::decode(&newer, "x").unwrap_err().kind(), ErrorKind::Unsupported);
    // A list of ranges that says it has 2^60 of them, and zeros for ever.
    let mut values = vec![7, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10];
    values.resize(64 << 20, 0);
    let bomb = object::sealed(&zstd::bulk::compress(&values, 3).unwrap(), "x");
    assert_eq!(ChangeMap::decode(&bomb, "x").unwrap_err().kind(), ErrorKind::Corrupt);
}

proptest! {
    #[test]
    fn the_map_reads_what_a_naive_one_would(
        steps in steps(), segment in 0u32..3, block_count in 0u32..=16, parent in 0u32..=16,
    ) {
        let map = map(&steps);
        for rel in 1..5 {
            let is_read = |at: u32| steps.iter().any(|step| match *step {
                Step::Mark(r, marked) => r == rel && marked == at,
                Step::Limit(r, limit) => r == rel && limit <= at,
                Step::Database(db) => db == 5,
            });
            let first = 16 * segment;
            let expected: Vec<u32> =
                (first..first + block_count).filter(|at| at - first >= parent || is_read(*at)).collect();
            let found: Vec<u32> = runs(&map, file(rel, segment), 16, block_count, parent)
                .into_iter().flat_map(|(start, count)| start..start + count).collect();
            prop_assert_eq!(found, expected);
            for at in 0..SMALL {
                prop_assert_eq!(map.is_read(locator(5, rel), ForkNumber::Main, block(at)), is_read(at));
            }
        }
    }

    #[test]
    fn the_union_of_two_logs_is_that_of_both_in_any_order(a in steps(), b in steps()) {
        let mut forth = map(&a);
        forth.union(map(&b)).unwrap();
        let mut back = map(&b);
        back.union(map(&a)).unwrap();
        prop_assert_eq!(&forth, &back);
        prop_assert_eq!(forth, map(&[a, b].concat()));
    }

    #[test]
    fn runs_of_crowds_are_those_of_a_naive_set(blocks in crowds(), more in crowds(), segment in 0u32..3) {
        let marks = |blocks: &[u32]| map(&blocks.iter().map(|at| Step::Mark(1, *at)).collect::<Vec<_>>());
        let mut map = marks(&blocks);
        map.union(marks(&more)).unwrap();
        let all: BTreeSet<u32> = blocks.iter().chain(&more).copied().collect();
        prop_assert_eq!(map.marked_count(), all.len() as u64);
        let full = 131_072;
        let found: Vec<u32> = runs(&map, file(1, segment), full, full, full)
            .into_iter().flat_map(|(start, count)| start..start + count).collect();
        let expected: Vec<u32> = all.range(segment * full..(segment + 1) * full).copied().collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(&ChangeMap::decode(&map.encode("x").unwrap(), "x").unwrap(), &map);
    }

    #[test]
    fn a_map_reads_back_as_it_was_written(steps in steps(), start in 0u64..9, len in 0u64..9) {
        let mut map = map(&steps);
        map.cover(range(start, start + len));
        map.cover(range(12, 15));
        prop_assert_eq!(ChangeMap::decode(&map.encode("x").unwrap(), "x").unwrap(), map);
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
        let _ = ChangeMap::decode(&bytes, "x");
        let frame = zstd::bulk::compress(&bytes, 3).unwrap();
        let _ = ChangeMap::decode(&object::sealed(&bytes, "x"), "x");
        let _ = ChangeMap::decode(&object::sealed(&frame, "x"), "x");
    }
}

#[test]
fn a_bitmap_has_a_bit_for_each_block_of_a_group() {
    assert_eq!(BITMAP_WORDS * 64, GROUP_BLOCKS as usize);
}
