//! The walker against logs made here, by a second writing of the format, and against real ones.

use proptest::prelude::*;

use super::super::WalSegmentNumber;
use super::*;
use crate::error::ErrorKind;
use crate::pg::{ControlFile, TimelineId};

const SEGMENT: u64 = 1 << 20;
const PAGE: u64 = 1024;
const CLUSTER: u64 = 7_711_031_876_090_026_729;

/// Where each record begins, and its bytes.
type Records = Vec<(u64, Vec<u8>)>;

/// Writes a log of 1 KB pages and 1 MB segments byte by byte; `bytes[0]` is at `begin`, a segment's first byte.
struct Log {
    begin: u64,
    bytes: Vec<u8>,
    prev: u64,
    timeline: u32,
    records: Records,
}

impl Log {
    fn new() -> Log {
        Log { begin: 5 * SEGMENT, bytes: Vec::new(), prev: 0x100, timeline: 1, records: Vec::new() }
    }

    fn at(&self) -> u64 {
        self.begin + self.bytes.len() as u64
    }

    fn page_header(&mut self, flags: u16, remaining_len: u32) {
        let at = self.at();
        let is_first = at.is_multiple_of(SEGMENT);
        self.bytes.extend(0xD118u16.to_le_bytes());
        self.bytes.extend((flags | if is_first { 2 } else { 0 }).to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(at.to_le_bytes());
        self.bytes.extend(remaining_len.to_le_bytes());
        self.bytes.extend([0; 4]);
        if is_first {
            self.bytes.extend(CLUSTER.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    fn record_bytes(&self, rmgr: u8, info: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((24 + body.len() as u32).to_le_bytes());
        bytes.extend(777u32.to_le_bytes());
        bytes.extend(self.prev.to_le_bytes());
        bytes.extend([info, rmgr, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &bytes);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn put(&mut self, record: &[u8], limit: usize) -> u64 {
        if self.at().is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        let lsn = self.at();
        for (done, byte) in record.iter().enumerate().take(limit) {
            if self.at().is_multiple_of(PAGE) {
                self.page_header(1, (record.len() - done) as u32);
            }
            self.bytes.push(*byte);
        }
        while !self.at().is_multiple_of(8) {
            self.bytes.push(0);
        }
        lsn
    }

    fn insert(&mut self, rmgr: u8, info: u8, body: &[u8]) -> u64 {
        let record = self.record_bytes(rmgr, info, body);
        let lsn = self.put(&record, usize::MAX);
        self.prev = lsn;
        self.records.push((lsn, record));
        lsn
    }

    /// A record with `len` bytes of body.
    fn insert_len(&mut self, len: usize) -> u64 {
        let body: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
        self.insert(10, 0x20, &body)
    }

    fn insert_many(&mut self, count: usize) {
        for _ in 0..count {
            self.insert_len(500);
        }
    }

    /// Fills the page so that exactly `rest` bytes of it are left.
    fn fill_page_but(&mut self, rest: u64) {
        if self.at().is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        let len = PAGE - self.at() % PAGE - rest;
        self.insert_len(usize::try_from(len).unwrap() - 24);
        assert_eq!((PAGE - self.at() % PAGE) % PAGE, rest % PAGE);
    }

    fn switch(&mut self) {
        self.insert(0, 0x40, &[]);
        let rest = self.at().next_multiple_of(SEGMENT) - self.at();
        self.bytes.resize(self.bytes.len() + rest as usize, 0);
    }

    /// A record of which a crash left only what was on its first page, and the record that replaces the rest.
    fn lose_record(&mut self, named: impl Fn(u64) -> u64) {
        let record = self.record_bytes(10, 0, &[7; 3000]);
        if self.at().is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        let room = (PAGE - self.at() % PAGE) as usize;
        let lost = self.put(&record, room);
        self.page_header(8, 0);
        let mut body = vec![255, 16];
        body.extend(named(lost).to_le_bytes());
        body.extend([0; 8]);
        self.insert(0, 0xD0, &body);
    }
}

fn source() -> WalSource {
    WalSource {
        major: MajorVersion::new(18).unwrap(),
        system_identifier: SystemIdentifier::new(CLUSTER),
        segment_size: WalSegmentSize::new(SEGMENT as u32).unwrap(),
        block_size: WalBlockSize::new(PAGE as u32).unwrap(),
        history: TimelineHistory::without_ancestors(TimelineId::new(1)),
    }
}

/// What a walk yields when it is fed `chunk_len` bytes at a time, and how it ends; `None` if it asks for bytes
/// that are not there.
fn walk(source: WalSource, log: &Log, start: u64, stop: u64, chunk_len: usize) -> (Records, Option<Result<()>>) {
    let mut records = Vec::new();
    let mut walker = WalWalker::new(source, Lsn::new(start), Lsn::new(stop)).unwrap();
    loop {
        match walker.step() {
            Ok(WalStep::Record(record)) => {
                assert_eq!(record.total_len(), record.bytes().len());
                records.push((record.lsn.as_u64(), record.bytes().to_vec()));
            }
            Ok(WalStep::NeedBytes { at }) => {
                let from = (at.as_u64() - log.begin) as usize;
                if from >= log.bytes.len() {
                    return (records, None);
                }
                walker.feed(&log.bytes[from..log.bytes.len().min(from + chunk_len)]);
            }
            Ok(WalStep::Finished) => return (records, Some(Ok(()))),
            Err(error) => return (records, Some(Err(error))),
        }
    }
}

fn walk_all(log: &Log) -> (Records, Option<Result<()>>) {
    walk(source(), log, log.begin, log.at(), 4096)
}

fn assert_whole(log: &Log) {
    let (records, end) = walk_all(log);
    end.expect("enough bytes").unwrap();
    assert!(records == log.records, "{} records, {} expected", records.len(), log.records.len());
}

fn failure(log: &Log) -> String {
    failure_of(source(), log)
}

fn failure_of(source: WalSource, log: &Log) -> String {
    let error = walk(source, log, log.begin, log.at(), 1 << 20).1.expect("enough bytes").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    error.to_string()
}

#[test]
fn records_of_every_length_are_read_across_pages() {
    let mut log = Log::new();
    for len in 0..2100 {
        log.insert_len(len);
    }
    assert_whole(&log);
}

#[test]
fn a_record_that_begins_in_the_last_8_bytes_of_a_page_is_read() {
    for rest in [8, 16, 24, 32] {
        let mut log = Log::new();
        log.fill_page_but(rest);
        log.insert_len(0);
        log.insert_len(3000);
        log.insert_len(1);
        assert_whole(&log);
    }
}

#[test]
fn a_record_that_ends_with_its_page_is_followed_by_one_after_the_next_header() {
    let mut log = Log::new();
    log.fill_page_but(0);
    log.insert_len(5);
    log.insert_len(2 * 1000 + 952 - 24);
    assert_whole(&log);
}

#[test]
fn a_record_over_several_segments_is_put_together() {
    let mut log = Log::new();
    log.insert_len(10);
    log.insert_len(5 << 19);
    log.insert_len(10);
    assert_whole(&log);
}

#[test]
fn after_a_switch_the_walk_goes_on_in_the_next_segment() {
    let mut log = Log::new();
    log.insert_len(100);
    log.switch();
    log.insert_len(200);
    log.fill_page_but(24);
    log.switch();
    log.insert_len(1);
    assert_whole(&log);
}

#[test]
fn a_stop_in_the_padding_after_a_switch_or_at_a_border_is_reached() {
    let mut log = Log::new();
    log.insert_len(100);
    log.switch();
    let switch = log.records[1].0;
    for stop in [switch + 8, switch + 24, switch + 5000, log.at() - 8, log.at(), log.at() + 40] {
        let (records, end) = walk(source(), &log, log.begin, stop, 512);
        assert!(end.expect("nothing beyond the switch is needed").is_ok());
        assert_eq!(records.len(), 2, "stop {stop:X}");
    }
}

#[test]
fn a_stop_at_a_page_border_needs_nothing_of_that_page() {
    let mut log = Log::new();
    log.fill_page_but(0);
    for stop in [log.at() - 8, log.at(), log.at() + 24] {
        assert!(walk(source(), &log, log.begin, stop, 512).1.expect("nothing more is needed").is_ok());
    }
    assert!(walk(source(), &log, log.begin, log.at() + 32, 512).1.is_none());
}

#[test]
fn a_record_that_begins_before_the_stop_is_read_to_its_end() {
    let mut log = Log::new();
    let first = log.insert_len(50);
    let long = log.insert_len(5000);
    for (stop, count) in [(first, 0), (first + 1, 1), (long, 1), (long + 8, 2)] {
        assert_eq!(walk(source(), &log, log.begin, stop, 100).0.len(), count);
    }
    log.bytes.truncate(log.bytes.len() - 16);
    assert!(walk(source(), &log, log.begin, long + 8, 100).1.is_none());
}

#[test]
fn zeros_before_the_stop_are_damage_and_not_the_end() {
    let mut log = Log::new();
    log.insert_len(50);
    log.bytes.resize(3000, 0);
    assert_eq!(
        failure(&log),
        "the WAL is broken: there is no record, but a length of 0 \
         (WAL 0/500078, file 000000010000000000000005 offset 120)"
    );
    let mut log = Log::new();
    log.fill_page_but(0);
    log.bytes.resize(3000, 0);
    assert!(failure(&log).starts_with("this is no WAL page: it has magic 0000 (WAL 0/500400"), "{}", failure(&log));
}

#[test]
fn a_recycled_page_is_known_by_its_address() {
    let mut old = Log { begin: SEGMENT, ..Log::new() };
    old.insert_many(20);
    let mut log = Log::new();
    log.fill_page_but(0);
    log.bytes.extend(&old.bytes[1024..]);
    assert!(failure(&log).contains("the page is that of 0/100400 (a recycled WAL file?)"), "{}", failure(&log));
}

#[test]
fn a_stale_record_with_a_good_crc_is_known_by_the_record_it_follows() {
    let mut log = Log::new();
    let first = log.insert_len(50);
    log.prev -= 8;
    log.insert_len(60);
    let expected = format!("the record follows one at {}, not {}", Lsn::new(first - 8), Lsn::new(first));
    assert!(failure(&log).contains(&expected), "{}", failure(&log));
}

#[test]
fn a_record_that_a_crash_cut_off_is_dropped_for_the_one_that_names_it() {
    let mut log = Log::new();
    log.insert_len(50);
    log.lose_record(|lost| lost);
    log.insert_len(70);
    assert_whole(&log);
    let mut log = Log::new();
    log.lose_record(|lost| lost);
    log.fill_page_but(8);
    log.lose_record(|lost| lost);
    log.insert_len(70);
    assert_whole(&log);
}

#[test]
fn a_cut_off_record_that_nothing_names_is_damage() {
    let mut log = Log::new();
    log.insert_len(50);
    log.lose_record(|lost| lost + 8);
    assert!(failure(&log).contains("has no end, and nothing here replaces it"), "{}", failure(&log));

    let mut log = Log::new();
    log.insert_len(50);
    let record = log.record_bytes(10, 0, &[7; 3000]);
    log.put(&record, 904);
    log.page_header(0, 0);
    log.insert_len(3);
    assert!(failure(&log).contains("the record goes on for 2120 bytes, but the page at"), "{}", failure(&log));
}

#[test]
fn a_page_that_begins_with_the_rest_of_nothing_is_damage() {
    let mut log = Log::new();
    log.fill_page_but(0);
    log.page_header(1, 100);
    log.bytes.extend([0; 1000]);
    assert!(failure(&log).contains("the rest of a record that did not begin before it"), "{}", failure(&log));
}

#[test]
fn timelines_change_where_the_history_says_and_nowhere_else() {
    let mut log = Log::new();
    log.insert_len(50);
    let in_page = log.at();
    log.timeline = 2;
    log.fill_page_but(0);
    let at_border = log.at();
    log.timeline = 3;
    log.insert_len(5000);
    let history = |first: u64, second: u64| {
        let text = format!("1\t{}\n2\t{}\n", Lsn::new(first), Lsn::new(second));
        TimelineHistory::parse(TimelineId::new(3), text.as_bytes()).unwrap()
    };
    let walked = |history| walk(WalSource { history, ..source() }, &log, log.begin, log.at(), 999).1.expect("bytes");
    walked(history(in_page, at_border)).unwrap();
    let error = walked(history(in_page, at_border + 8)).unwrap_err();
    assert!(error.to_string().contains("the page is of timeline 3, not 2"), "{error}");
    // A switch in the segment after it: these pages are the abandoned end of an older timeline.
    let error = walked(history(log.begin, log.begin)).unwrap_err();
    assert!(error.to_string().contains("the page is of timeline 1, not 3"), "{error}");
}

#[test]
fn wal_of_another_cluster_version_or_segment_size_is_refused_even_from_the_middle_of_a_segment() {
    let mut log = Log::new();
    log.insert_many(50);
    let others = [
        (
            WalSource { system_identifier: SystemIdentifier::new(5), ..source() },
            "the WAL is of cluster 7711031876090026729, not 5",
        ),
        (WalSource { major: MajorVersion::new(17).unwrap(), ..source() }, "written by PostgreSQL 18, not 17"),
        (
            WalSource { block_size: WalBlockSize::new(2048).unwrap(), ..source() },
            "segments of 1048576 and pages of 1024",
        ),
    ];
    let start = log.records[20].0;
    for (source, expected) in others {
        let mut start = start;
        if source.block_size.as_u32() == 2048 {
            start = log.begin;
        }
        let error = walk(source, &log, start, log.at(), 4096).1.expect("enough bytes").unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_walk_from_the_middle_asks_for_the_segments_head_and_then_for_its_page() {
    let mut log = Log::new();
    log.insert_many(50);
    let start = log.records[20].0;
    let mut walker = WalWalker::new(source(), Lsn::new(start), Lsn::new(log.at())).unwrap();
    assert_eq!(walker.step().unwrap(), WalStep::NeedBytes { at: Lsn::new(log.begin) });
    walker.feed(&log.bytes[..64]);
    assert_eq!(walker.step().unwrap(), WalStep::NeedBytes { at: Lsn::new(start - start % PAGE) });
    let (records, end) = walk(source(), &log, start, log.at(), 64);
    assert!(end.unwrap().is_ok());
    assert_eq!(records, log.records[20..]);
}

#[test]
fn a_start_where_no_record_can_begin_is_refused() {
    let begin = 5 * SEGMENT;
    for (start, stop) in [
        (begin + 8, begin + 500),
        (begin + 36, begin + 500),
        (begin + PAGE + 16, begin + 3000),
        (begin + 44, begin + 500),
        (begin + 48, begin + 40),
        (begin, u64::MAX),
        (u64::MAX - 7, u64::MAX),
    ] {
        let error = WalWalker::new(source(), Lsn::new(start), Lsn::new(stop)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{start:X} {stop:X}");
    }
}

#[test]
fn a_start_within_a_record_fails_with_that_position() {
    let mut log = Log::new();
    log.insert_len(500);
    let error = walk(source(), &log, log.begin + 48, log.at(), 4096).1.unwrap().unwrap_err();
    assert!(error.place().unwrap().starts_with("WAL 0/500030, file "), "{error}");
}

#[test]
fn the_wal_of_every_major_is_read_up_to_its_switch() {
    macro_rules! artefact {
        ($major:literal, $name:literal) => {
            include_bytes!(concat!("../../../../../testdata/artefacts/", $major, "/", $name)) as &[u8]
        };
    }
    let real = [
        (artefact!("13", "pg_control"), artefact!("13", "wal_segment_head")),
        (artefact!("14", "pg_control"), artefact!("14", "wal_segment_head")),
        (artefact!("15", "pg_control"), artefact!("15", "wal_segment_head")),
        (artefact!("16", "pg_control"), artefact!("16", "wal_segment_head")),
        (artefact!("17", "pg_control"), artefact!("17", "wal_segment_head")),
        (artefact!("18", "pg_control"), artefact!("18", "wal_segment_head")),
    ];
    for (control, wal) in real {
        let control = ControlFile::parse(control).unwrap();
        let source = WalSource {
            major: control.major_version(),
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            block_size: control.wal_block_size,
            history: TimelineHistory::without_ancestors(control.timeline),
        };
        let begin = WalPageHeader::parse(wal).unwrap().address;
        let stop = source.segment_size.start_of(WalSegmentNumber::new(begin.as_u64() / SEGMENT + 1)).unwrap();
        let log = Log { begin: begin.as_u64(), bytes: wal.to_vec(), ..Log::new() };
        let (records, end) = walk(source, &log, log.begin, stop.as_u64(), 1000);
        end.expect("the switch ends the segment").unwrap();
        let message = records.iter().find(|(_, record)| record.len() > 15_000).expect("the long message");
        assert_eq!(message.1[17], 21, "RM_LOGICALMSG_ID");
        let (_, last) = records.last().unwrap();
        assert_eq!((last[17], last[16], last.len()), (0, 0x40, 24), "XLOG_SWITCH");
    }
}

/// Records and switches and lost records of random lengths.
fn any_log() -> impl Strategy<Value = Log> {
    proptest::collection::vec((0usize..20, 0usize..3000), 1..40).prop_map(|steps| {
        let mut log = Log::new();
        for (kind, len) in steps {
            match kind {
                0 => log.switch(),
                1 => log.lose_record(|lost| lost),
                2..10 => _ = log.insert_len(len / 30),
                _ => _ = log.insert_len(len),
            }
        }
        log
    })
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:X?}", self.records.iter().map(|(lsn, record)| (lsn, record.len())).collect::<Vec<_>>())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_log_is_read_as_it_was_written_however_it_is_fed(log in any_log(), chunk_len in 1usize..5000) {
        let (records, end) = walk(source(), &log, log.begin, log.at(), chunk_len);
        prop_assert!(end.expect("enough bytes").is_ok());
        prop_assert!(records == log.records);
    }

    #[test]
    fn a_damaged_log_never_yields_a_record_that_was_not_written(
        mut log in any_log(), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let at = at.index(log.bytes.len());
        log.bytes[at] ^= flip;
        let (records, end) = walk_all(&log);
        prop_assert!(log.records.starts_with(&records));
        prop_assert_eq!(records.len() == log.records.len(), matches!(end, Some(Ok(()))));
    }

    #[test]
    fn no_bytes_make_the_walker_panic(
        mut log in any_log(),
        noise in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..10),
        start in 0u64..3000,
        len in 0u64..100_000,
    ) {
        for (at, value) in noise {
            let at = at.index(log.bytes.len());
            let end = log.bytes.len().min(at + 8);
            log.bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        let start_lsn = Lsn::new(log.begin + start);
        if let Ok(mut walker) = WalWalker::new(source(), start_lsn, plus(start_lsn, usize::try_from(len).unwrap())) {
            walker.feed(&log.bytes);
            while let Ok(WalStep::Record(_)) = walker.step() {}
            let _ = walker.step();
        }
        let _ = WalPageHeader::parse(&log.bytes[..log.bytes.len().min(usize::try_from(start).unwrap())]);
    }
}
