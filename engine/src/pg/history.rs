//! Which timelines a cluster came through, and on which of them each position of the log lies.
//!
//! When a server is promoted it leaves its timeline at the *switch point* and writes `<new timeline>.history`:
//! its parent's history and one more line. From that follow the two questions asked here: is a backup that was
//! taken on timeline 2 up to some LSN an ancestor of a cluster on timeline 5, and which file holds a WAL
//! segment.
//!
//! Two things are less obvious than they look. The switch points need not increase: recovery that aims at
//! timeline 2 but stops before timeline 2 begins makes a timeline 3 whose history says "1 until X, 2 until Y"
//! with Y < X; nothing of timeline 2 is then part of it. And the segment that holds a switch point exists on
//! both timelines, the younger file beginning with a copy of the older: the younger one is the one to read.
//!
//! PostgreSQL: `src/backend/access/transam/timeline.c`, `readTimeLineHistory`, `tliOfPointInHistory`;
//! `src/backend/access/transam/xlogrecovery.c`, `XLogFileReadAnyTLI`; `xlog.c`, `StartupXLOG` for Y < X.

use super::bytes::canonical_decimal;
use super::{Lsn, TimelineId, WalRange, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::error::{Error, ErrorKind, Result};

/// The part of the log that belongs to one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// Its first position; that of the first timeline is 0/0.
    pub begin: Lsn,
    /// The position after its last, where the next timeline begins; `None` for the current one.
    pub end: Option<Lsn>,
}

/// A timeline with its ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// Oldest first; each begins where the one before it ends, and the last one has no end.
    spans: Vec<TimelineSpan>,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors; timeline 1 never has any.
    pub fn without_ancestors(timeline: TimelineId) -> TimelineHistory {
        TimelineHistory { spans: vec![TimelineSpan { timeline, begin: Lsn::INVALID, end: None }] }
    }

    /// Reads the contents of `timeline`'s history file.
    ///
    /// # Errors
    /// Corrupt, with the line: no timeline and LSN, or timelines that do not increase.
    pub fn parse(timeline: TimelineId, bytes: &[u8]) -> Result<TimelineHistory> {
        let mut ancestors: Vec<(TimelineId, Lsn)> = Vec::new();
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let ancestor = ancestor(line).ok_or_else(|| {
                bad_line(timeline, index, &format!("{:?} is not a timeline and an LSN", String::from_utf8_lossy(line)))
            })?;
            let younger = ancestors.last().is_some_and(|last| last.0 >= ancestor.0) || ancestor.0 >= timeline;
            if younger {
                return Err(bad_line(timeline, index, &format!("timeline {} is out of order", ancestor.0)));
            }
            ancestors.push(ancestor);
        }
        Ok(TimelineHistory { spans: spans(timeline, &ancestors) })
    }

    /// The timeline whose history this is.
    pub fn timeline(&self) -> TimelineId {
        self.spans.last().map_or(TimelineId::default(), |span| span.timeline)
    }

    /// The timelines, oldest first, each with its part of the log; the part can be empty.
    pub fn spans(&self) -> &[TimelineSpan] {
        &self.spans
    }

    /// Whether everything that `timeline` holds before `lsn` is part of this history.
    ///
    /// So it is for a backup that ended there and is an ancestor of this cluster; to end at the very switch
    /// point is fine.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.span(timeline).is_some_and(|span| span.begin <= lsn && span.end.is_none_or(|end| lsn <= end))
    }

    /// Where this history leaves `timeline`; `None` if it never was on it or still is.
    pub fn switch_point(&self, timeline: TimelineId) -> Option<Lsn> {
        self.span(timeline)?.end
    }

    /// The timeline that holds the byte at `lsn`.
    pub fn timeline_of(&self, lsn: Lsn) -> TimelineId {
        self.youngest_that_begins(|begin| begin <= lsn)
    }

    /// The timeline whose file to read for a segment: the youngest that has begun when the segment ends.
    pub fn timeline_of_segment(&self, segment: WalSegmentNumber, size: WalSegmentSize) -> TimelineId {
        self.youngest_that_begins(|begin| size.segment_of(begin) <= segment)
    }

    /// The file to read for a segment.
    pub fn segment_name(&self, segment: WalSegmentNumber, size: WalSegmentSize) -> WalSegmentName {
        WalSegmentName { timeline: self.timeline_of_segment(segment, size), segment }
    }

    /// The parts of the log from `start` on `start_timeline` to `stop`, newest timeline first, as a
    /// backup_manifest lists them.
    ///
    /// PostgreSQL: `src/backend/backup/backup_manifest.c`, `AddWALInfoToBackupManifest`.
    ///
    /// # Errors
    /// Conflict: the start is not part of this history.
    pub fn wal_ranges(&self, start_timeline: TimelineId, start: Lsn, stop: Lsn) -> Result<Vec<WalRange>> {
        if !self.contains(start_timeline, start) {
            let what = format!("{start} on timeline {start_timeline} is not in the history of {}", self.timeline());
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        let spans = self.spans.iter().rev().take_while(|span| span.timeline >= start_timeline);
        let ranges = spans.map(|span| WalRange {
            timeline: span.timeline,
            start: if span.timeline == start_timeline { start } else { span.begin },
            end: span.end.map_or(stop, |end| end.min(stop)),
        });
        Ok(ranges.filter(|range| range.start < range.end).collect())
    }

    fn span(&self, timeline: TimelineId) -> Option<&TimelineSpan> {
        self.spans.iter().find(|span| span.timeline == timeline)
    }

    fn youngest_that_begins(&self, begun: impl Fn(Lsn) -> bool) -> TimelineId {
        let youngest = self.spans.iter().rev().find(|span| begun(span.begin));
        youngest.map_or(self.timeline(), |span| span.timeline)
    }
}

/// The name of a timeline's history file, as `0000000A.history`.
pub fn history_file_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.as_u32())
}

/// The timeline whose history file has this name.
pub fn parse_history_file_name(name: &[u8]) -> Option<TimelineId> {
    let digits = std::str::from_utf8(name.strip_suffix(b".history")?).ok()?;
    let timeline = TimelineId::new(u32::from_str_radix(digits, 16).ok()?);
    (history_file_name(timeline).as_bytes() == name).then_some(timeline)
}

/// "timeline, white space, LSN", whatever follows.
fn ancestor(line: &[u8]) -> Option<(TimelineId, Lsn)> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let timeline = canonical_decimal(words.next()?)?;
    let lsn = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    Some((TimelineId::new(timeline), lsn))
}

/// An ancestor ends where the first of those after it ends, so a later and lower switch point cuts it short.
fn spans(timeline: TimelineId, ancestors: &[(TimelineId, Lsn)]) -> Vec<TimelineSpan> {
    let mut end = None;
    let mut ends: Vec<_> = ancestors
        .iter()
        .rev()
        .map(|&(_, switch)| *end.insert(end.map_or(switch, |end: Lsn| end.min(switch))))
        .collect();
    ends.reverse();
    let begins = std::iter::once(Lsn::INVALID).chain(ends.iter().copied());
    let timelines = ancestors.iter().map(|&(timeline, _)| timeline).chain([timeline]);
    let ends = ends.iter().copied().map(Some).chain([None]);
    timelines.zip(begins).zip(ends).map(|((timeline, begin), end)| TimelineSpan { timeline, begin, end }).collect()
}

fn bad_line(timeline: TimelineId, index: usize, what: &str) -> Error {
    let place = format!("{} line {}", history_file_name(timeline), index + 1);
    Error::corrupt(place, format!("the timeline history is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL_15: &[u8] = include_bytes!("../../../testdata/artefacts/15/00000004.history");

    fn parse(timeline: u32, text: &str) -> Result<TimelineHistory> {
        TimelineHistory::parse(TimelineId::new(timeline), text.as_bytes())
    }

    fn shown(history: &TimelineHistory) -> String {
        let show = |span: &TimelineSpan| {
            let end = span.end.map_or("now".to_owned(), |end| end.to_string());
            format!("{}: {}..{end}", span.timeline, span.begin)
        };
        history.spans().iter().map(show).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn a_real_history_of_three_promotions_is_read() {
        let history = TimelineHistory::parse(TimelineId::new(4), REAL_15).unwrap();
        assert_eq!(
            shown(&history),
            "1: 0/0..0/1100000, 2: 0/1100000..0/1129388, 3: 0/1129388..0/114D3A0, 4: 0/114D3A0..now"
        );
    }

    #[test]
    fn a_backup_is_an_ancestor_up_to_the_switch_point_and_not_beyond() {
        let history = parse(3, "1\t0/2000000\tno recovery target specified\n2\t0/3000000\n").unwrap();
        let contains = |timeline, lsn| history.contains(TimelineId::new(timeline), Lsn::new(lsn));
        assert!(contains(1, 0x200_0000) && !contains(1, 0x200_0001));
        assert!(!contains(2, 0x1FF_FFFF) && contains(2, 0x200_0000) && contains(2, 0x300_0000));
        assert!(!contains(3, 0x2FF_FFFF) && contains(3, u64::MAX));
        assert!(!contains(4, 0x300_0000));
        assert_eq!(history.switch_point(TimelineId::new(1)), Some(Lsn::new(0x200_0000)));
        assert_eq!(history.switch_point(TimelineId::new(3)), None);
    }

    #[test]
    fn the_segment_of_a_switch_is_read_from_the_younger_timeline() {
        let history = parse(0xB, "1\t0/2000100\n10\t0/2000200\n").unwrap();
        let size = WalSegmentSize::new(1 << 20).unwrap();
        let names: Vec<_> = [0x1F, 0x20, 0x21]
            .map(|segment| history.segment_name(WalSegmentNumber::new(segment), size).file_name(size))
            .into();
        assert_eq!(names, ["00000001000000000000001F", "0000000B0000000000000020", "0000000B0000000000000021"]);
        let timelines =
            [0x20000FF, 0x2000100, 0x20001FF, 0x2000200].map(|lsn| history.timeline_of(Lsn::new(lsn)).as_u32());
        assert_eq!(timelines, [1, 10, 10, 11]);
    }

    #[test]
    fn the_wal_of_a_backup_across_a_promotion_is_listed_newest_first() {
        let history = parse(3, "1\t0/200\n2\t0/300\n").unwrap();
        let ranges = |tli, start, stop| {
            let ranges = history.wal_ranges(TimelineId::new(tli), Lsn::new(start), Lsn::new(stop)).unwrap();
            ranges.iter().map(|range| format!("{} {}-{}", range.timeline, range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(1, 0x100, 0x400), ["3 0/300-0/400", "2 0/200-0/300", "1 0/100-0/200"]);
        assert_eq!(ranges(1, 0x100, 0x180), ["1 0/100-0/180"]);
        assert_eq!(ranges(3, 0x310, 0x320), ["3 0/310-0/320"]);
        let error = history.wal_ranges(TimelineId::new(1), Lsn::new(0x201), Lsn::new(0x400)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }

    #[test]
    fn a_switch_before_the_parents_own_beginning_cuts_the_parent_out() {
        let history = parse(3, "1\t0/5000000\tlast\n\n2\t0/4000000\tbefore 2024-01-01\n").unwrap();
        assert_eq!(shown(&history), "1: 0/0..0/4000000, 2: 0/4000000..0/4000000, 3: 0/4000000..now");
        assert!(!history.contains(TimelineId::new(1), Lsn::new(0x400_0001)));
        assert_eq!(history.timeline_of(Lsn::new(0x450_0000)).as_u32(), 3);
    }

    #[test]
    fn comments_and_blank_lines_are_skipped_and_timeline_1_needs_no_file() {
        let history = parse(2, "# made by hand\n\n  1 0/10 why not\r\n").unwrap();
        assert_eq!(shown(&history), "1: 0/0..0/10, 2: 0/10..now");
        assert_eq!(shown(&TimelineHistory::without_ancestors(TimelineId::new(1))), "1: 0/0..now");
    }

    #[test]
    fn lines_that_recovery_would_refuse_are_refused() {
        for text in ["x", "1", "1\tx", "2\t0/10", "3\t0/10", "1\t0/10\n1\t0/20", "0\t0/10", "-1\t0/10"] {
            let error = parse(2, text).unwrap_err();
            assert!(error.place().unwrap().starts_with("00000002.history line "), "{error}");
        }
    }

    #[test]
    fn history_file_names_are_eight_upper_case_hexadecimal_digits() {
        assert_eq!(parse_history_file_name(b"0000000A.history"), Some(TimelineId::new(10)));
        for name in
            [&b"0000000a.history"[..], b"A.history", b"+000000A.history", b"0000000A.histor", b"00000000A.history"]
        {
            assert_eq!(parse_history_file_name(name), None);
        }
    }

    proptest! {
        #[test]
        fn every_position_lies_on_the_timeline_that_contains_it(
            switches in proptest::collection::vec(0u64..1000, 0..6),
            lsn in 0u64..1100,
        ) {
            let line = |(i, at): (usize, &u64)| format!("{}\t{}\n", i + 1, Lsn::new(*at));
            let text: String = switches.iter().enumerate().map(line).collect();
            let timeline = u32::try_from(switches.len()).unwrap() + 1;
            let history = parse(timeline, &text).unwrap();
            let lsn = Lsn::new(lsn);
            prop_assert!(history.contains(history.timeline_of(lsn), lsn));
            let ends: Vec<_> = history.spans().iter().map(|span| span.end.unwrap_or(Lsn::new(u64::MAX))).collect();
            prop_assert!(ends.is_sorted());
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            timeline: u32,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            text in "([0-9]{1,4}[\t ][0-9A-F]{1,9}/[0-9A-F]{1,9}.{0,5}\n){0,4}",
        ) {
            let _ = TimelineHistory::parse(TimelineId::new(timeline), &bytes);
            let _ = TimelineHistory::parse(TimelineId::new(timeline), text.as_bytes());
            let _ = parse_history_file_name(&bytes);
        }
    }
}
