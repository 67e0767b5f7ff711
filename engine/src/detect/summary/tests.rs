//! Directories of summaries, made by a second writing of the format.

use super::*;
use crate::pg::{
    BlockNumber, DatabaseOid, ForkNumber, Lsn, RelFileLocator, TablespaceOid, TimelineHistory, TimelineId,
};

const CLUSTER: SystemIdentifier = SystemIdentifier::new(7);

fn range(timeline: u32, start: u64, end: u64) -> WalRange {
    WalRange { timeline: TimelineId::new(timeline), start: Lsn::new(start), end: Lsn::new(end) }
}

/// A summary that names one block of a relation's fork, and a limit.
fn summary(rel: u32, fork: u32, limit: u32, block: u16) -> Vec<u8> {
    let mut bytes = 0x652B_137Bu32.to_le_bytes().to_vec();
    [1663, 5, rel, fork, limit, 1].iter().for_each(|field: &u32| bytes.extend(field.to_le_bytes()));
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(block.to_le_bytes());
    bytes.extend([0; 24]);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

fn directory(files: &[(WalRange, Vec<u8>)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (range, bytes) in files {
        fs::write(directory.path().join(wal_summary_name(*range)), bytes).unwrap();
    }
    fs::write(directory.path().join("temp.summary"), "half").unwrap();
    directory
}

fn locator(rel: u32) -> RelFileLocator {
    RelFileLocator { spc: TablespaceOid::new(1663), db: DatabaseOid::new(5), rel: RelFileNumber::new(rel) }
}

fn is_read(map: &ChangeMap, rel: u32, block: u32) -> bool {
    map.is_read(locator(rel), ForkNumber::Main, BlockNumber::new(block))
}

#[test]
fn summaries_of_the_range_are_united_and_others_are_not_opened() {
    let directory = directory(&[
        (range(1, 100, 200), b"damaged, but of no concern".to_vec()),
        (range(1, 200, 300), summary(16384, 0, u32::MAX, 3)),
        (range(1, 250, 400), summary(16384, 0, 9, 5)),
        (range(1, 400, 500), b"nor is this".to_vec()),
    ]);
    let mut summaries = Summaries::list(directory.path()).unwrap();
    let map = summaries.changes(CLUSTER, &[range(1, 210, 390)]).unwrap();
    assert_eq!([2, 3, 5, 8, 9, 10].map(|block| is_read(&map, 16384, block)), [false, true, true, false, true, true]);
    assert_eq!(map.coverage().check(&[range(1, 200, 400)]), CoverageCheck::Covered);
    assert_eq!(map.coverage().check(&[range(1, 199, 400)]), CoverageCheck::MissingFrom(Lsn::new(199)));
}

#[test]
fn summaries_of_before_a_moment_are_left_out() {
    let directory = directory(&[
        (range(1, 100, 200), summary(16384, 0, u32::MAX, 3)),
        (range(1, 150, 300), summary(16384, 0, u32::MAX, 4)),
        (range(1, 200, 300), summary(16384, 0, u32::MAX, 5)),
    ]);
    let moment = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let old = File::options().write(true).open(directory.path().join(wal_summary_name(range(1, 100, 200)))).unwrap();
    old.set_modified(moment - std::time::Duration::from_micros(1)).unwrap();
    let all = Summaries::list(directory.path()).unwrap();
    let mut since = Summaries::list_since(directory.path(), moment).unwrap();
    assert_eq!(all.check(&[range(1, 100, 300)]), CoverageCheck::Covered);
    assert_eq!(since.check(&[range(1, 100, 300)]), CoverageCheck::MissingFrom(Lsn::new(100)));
    assert_eq!(since.ending_at(TimelineId::new(1), Lsn::new(300)), Some(range(1, 150, 300)));
    assert_eq!(since.ending_at(TimelineId::new(2), Lsn::new(300)), None);
    let map = since.changes(CLUSTER, &[range(1, 150, 300)]).unwrap();
    assert_eq!([3, 4, 5].map(|block| is_read(&map, 16384, block)), [false, true, true]);
    assert_eq!(since.changes(CLUSTER, &[range(1, 120, 300)]).unwrap_err().kind(), crate::error::ErrorKind::Missing);
}

#[test]
fn truncation_on_the_old_timeline_and_growth_on_the_new_one_are_both_kept() {
    let directory = directory(&[
        (range(1, 100, 150), summary(16384, 0, 10, 3)),
        (range(2, 150, 200), summary(16384, 0, u32::MAX, 12)),
    ]);
    let history = TimelineHistory::parse(TimelineId::new(2), b"1\t0/96\n").unwrap();
    let needed = history.wal_ranges(TimelineId::new(1), Lsn::new(100), Lsn::new(200)).unwrap();
    let map = Summaries::list(directory.path()).unwrap().changes(CLUSTER, &needed).unwrap();
    assert_eq!([3, 9, 10, 11, 12].map(|block| is_read(&map, 16384, block)), [true, false, true, true, true]);
}

#[test]
fn a_relation_zero_is_a_database_and_a_visibility_map_is_left_out() {
    let directory = directory(&[(range(1, 1, 2), summary(0, 0, 0, 0)), (range(1, 2, 3), summary(16384, 2, 1, 0))]);
    let map = Summaries::list(directory.path()).unwrap().changes(CLUSTER, &[range(1, 1, 3)]).unwrap();
    assert_eq!(map.replaced_databases().collect::<Vec<_>>(), [(TablespaceOid::new(1663), DatabaseOid::new(5))]);
    assert!(is_read(&map, 99_999, 7));
    assert!(map.relations().all(|(locator, _)| locator.rel == WHOLE_DATABASE));
}

#[test]
fn summaries_that_are_late_or_have_a_gap_cover_nothing_beyond_it() {
    let directory = directory(&[(range(1, 100, 200), summary(1, 0, 0, 0)), (range(1, 201, 300), summary(1, 0, 0, 0))]);
    let mut summaries = Summaries::list(directory.path()).unwrap();
    assert_eq!(summaries.check(&[range(1, 100, 300)]), CoverageCheck::MissingFrom(Lsn::new(200)));
    assert_eq!(summaries.check(&[range(1, 201, 400)]), CoverageCheck::MissingFrom(Lsn::new(300)));
    let error = summaries.changes(CLUSTER, &[range(1, 100, 300)]).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Missing, "there is no WAL summary of 0/C8"));
    let mut none = Summaries::list(&directory.path().join("summaries")).unwrap();
    assert_eq!(none.changes(CLUSTER, &[range(1, 1, 2)]).unwrap_err().kind(), ErrorKind::Missing);
}

#[test]
fn a_summary_that_is_removed_after_listing_is_looked_for_once_more() {
    let first = (range(1, 100, 200), summary(16384, 0, u32::MAX, 3));
    let second = (range(1, 200, 300), summary(16384, 0, u32::MAX, 4));
    let directory = directory(&[first, second.clone()]);
    let mut summaries = Summaries::list(directory.path()).unwrap();
    fs::remove_file(directory.path().join(wal_summary_name(range(1, 100, 200)))).unwrap();
    let error = summaries.clone().changes(CLUSTER, &[range(1, 100, 300)]).unwrap_err();
    assert_eq!((error.kind(), error.what()), (ErrorKind::Missing, "there is no WAL summary of 0/64"));
    // Another summary of the same part is as good.
    fs::write(directory.path().join(wal_summary_name(range(1, 50, 250))), summary(16384, 0, u32::MAX, 3)).unwrap();
    let map = summaries.changes(CLUSTER, &[range(1, 100, 300)]).unwrap();
    assert!(is_read(&map, 16384, 3) && is_read(&map, 16384, 4) && !is_read(&map, 16384, 5));
}

#[test]
fn a_damaged_summary_is_named() {
    let good = summary(16384, 0, u32::MAX, 3);
    for bytes in [good[..20].to_vec(), [good.clone(), vec![0]].concat(), vec![], {
        let mut flipped = good.clone();
        flipped[30] ^= 1;
        flipped
    }] {
        let directory = directory(&[(range(1, 1, 2), bytes)]);
        let error = Summaries::list(directory.path()).unwrap().changes(CLUSTER, &[range(1, 1, 2)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.place().unwrap().contains("000000010000000000000001"), "{error}");
    }
}
