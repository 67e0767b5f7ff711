//! Which parts of the log something speaks for, and whether a range along a cluster's history is among them without a gap.
//!
//! A range is of one timeline: the same LSN on two timelines is two places of the log. Ranges that touch or overlap are one; a hole of one
//! byte is a hole. What is asked for comes from [`TimelineHistory::wal_ranges`](crate::pg::TimelineHistory::wal_ranges), so a
//! promotion inside it asks for the old timeline up to the switch point and for the new one from there on.
//!
//! A range may reach beyond the point where the history leaves its timeline: what was written there is of no use, but no harm.
//!
//! What goes wrong: a hole that nobody saw would be a block that nobody reads. So there is one place that decides it, this one.

use std::collections::BTreeMap;

use crate::pg::{Lsn, TimelineId, WalRange};

/// Whether a part of the log is covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoverageCheck {
    /// All of it.
    Covered,
    /// Not from this position on.
    MissingFrom(Lsn),
}

/// A set of ranges of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// By timeline and start, to the end; the ranges of a timeline neither overlap nor touch.
    ranges: BTreeMap<(TimelineId, Lsn), Lsn>,
}

impl Coverage {
    /// Adds a range; an empty one adds nothing.
    pub fn add(&mut self, range: WalRange) {
        if range.start >= range.end {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        let up_to_end = (range.timeline, Lsn::INVALID)..=(range.timeline, end);
        let touching: Vec<Lsn> =
            self.ranges.range(up_to_end).filter(|(_, ends)| **ends >= start).map(|((_, begins), _)| *begins).collect();
        for begin in touching {
            let ends = self.ranges.remove(&(range.timeline, begin)).unwrap_or(end);
            start = start.min(begin);
            end = end.max(ends);
        }
        self.ranges.insert((range.timeline, start), end);
    }

    /// Adds all ranges of `other`.
    pub fn union(&mut self, other: &Coverage) {
        other.ranges().for_each(|range| self.add(range));
    }

    /// Its ranges, by timeline and position; no two touch.
    pub fn ranges(&self) -> impl Iterator<Item = WalRange> {
        self.ranges.iter().map(|(&(timeline, start), &end)| WalRange { timeline, start, end })
    }

    /// Whether every position of the `needed` ranges is covered; if not, the first that is not.
    pub fn check(&self, needed: &[WalRange]) -> CoverageCheck {
        let missing = needed.iter().filter_map(|range| self.missing_from(range)).min();
        missing.map_or(CoverageCheck::Covered, CoverageCheck::MissingFrom)
    }

    /// From where on the `needed` ranges, the parts of a history, are covered to their end; their end if its last position is not.
    pub fn covered_from(&self, needed: &[WalRange]) -> Lsn {
        let mut newest_first: Vec<&WalRange> = needed.iter().collect();
        newest_first.sort_unstable_by_key(|range| std::cmp::Reverse(range.start));
        let mut from = newest_first.first().map_or(Lsn::INVALID, |last| last.end);
        for range in newest_first {
            let up_to = (range.timeline, Lsn::INVALID)..(range.timeline, range.end);
            let reaches = self.ranges.range(up_to).next_back().filter(|(_, end)| **end >= range.end);
            let Some(((_, start), _)) = reaches else { return from };
            from = (*start).max(range.start);
            if from > range.start {
                return from;
            }
        }
        from
    }

    fn missing_from(&self, needed: &WalRange) -> Option<Lsn> {
        let from = (needed.timeline, Lsn::INVALID)..=(needed.timeline, needed.start);
        let end = self.ranges.range(from).next_back().map_or(needed.start, |(_, end)| *end);
        Some(end.max(needed.start)).filter(|at| *at < needed.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::TimelineHistory;

    fn range(timeline: u32, start: u64, end: u64) -> WalRange {
        WalRange { timeline: TimelineId::new(timeline), start: Lsn::new(start), end: Lsn::new(end) }
    }

    fn coverage(ranges: &[(u32, u64, u64)]) -> Coverage {
        let mut coverage = Coverage::default();
        ranges.iter().for_each(|&(timeline, start, end)| coverage.add(range(timeline, start, end)));
        coverage
    }

    fn shown(coverage: &Coverage) -> String {
        let ranges = coverage.ranges().map(|r| format!("{}:{}-{}", r.timeline, r.start.as_u64(), r.end.as_u64()));
        ranges.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ranges_that_touch_or_overlap_are_one_and_a_hole_of_one_byte_is_a_hole() {
        assert_eq!(shown(&coverage(&[(1, 30, 40), (1, 10, 20), (1, 20, 30)])), "1:10-40");
        assert_eq!(shown(&coverage(&[(1, 30, 40), (1, 10, 29), (1, 12, 15), (2, 29, 30)])), "1:10-29 1:30-40 2:29-30");
        assert_eq!(shown(&coverage(&[(1, 10, 10), (1, 9, 5)])), "");
    }

    #[test]
    fn the_first_position_that_is_missing_is_named() {
        let known = coverage(&[(1, 10, 20), (1, 30, 40)]);
        let check = |start, end| known.check(&[range(1, start, end)]);
        assert_eq!(check(10, 20), CoverageCheck::Covered);
        assert_eq!(check(12, 40), CoverageCheck::MissingFrom(Lsn::new(20)));
        assert_eq!(check(5, 15), CoverageCheck::MissingFrom(Lsn::new(5)));
        assert_eq!(check(25, 35), CoverageCheck::MissingFrom(Lsn::new(25)));
        assert_eq!(check(35, 50), CoverageCheck::MissingFrom(Lsn::new(40)));
        assert_eq!(known.check(&[range(2, 12, 13)]), CoverageCheck::MissingFrom(Lsn::new(12)));
        assert_eq!(known.check(&[]), CoverageCheck::Covered);
    }

    #[test]
    fn what_is_covered_to_the_end_begins_behind_the_last_hole() {
        let history = TimelineHistory::parse(TimelineId::new(2), b"1\t0/64\n").unwrap();
        let needed = history.wal_ranges(TimelineId::new(1), Lsn::new(50), Lsn::new(150)).unwrap();
        for (ranges, expected) in [
            (vec![], 150),
            (vec![(2, 120, 149)], 150),
            (vec![(2, 120, 150)], 120),
            (vec![(2, 90, 160)], 100),
            (vec![(1, 60, 99), (2, 100, 150)], 100),
            (vec![(1, 60, 100), (2, 100, 150)], 60),
            (vec![(1, 20, 110), (2, 100, 150)], 50),
            (vec![(1, 20, 70), (1, 80, 130), (2, 100, 150)], 80),
        ] {
            assert_eq!(coverage(&ranges).covered_from(&needed), Lsn::new(expected), "{ranges:?}");
        }
        assert_eq!(Coverage::default().covered_from(&[]), Lsn::INVALID);
    }

    #[test]
    fn a_promotion_needs_the_old_timeline_up_to_the_switch_and_the_new_one_from_there() {
        let history = TimelineHistory::parse(TimelineId::new(2), b"1\t0/64\n").unwrap();
        let needed = history.wal_ranges(TimelineId::new(1), Lsn::new(50), Lsn::new(150)).unwrap();
        // The abandoned end of timeline 1 covers nothing that is needed.
        for (ranges, expected) in [
            (vec![(1, 40, 100), (2, 100, 150)], CoverageCheck::Covered),
            (vec![(1, 40, 130), (2, 100, 160)], CoverageCheck::Covered),
            (vec![(1, 40, 160)], CoverageCheck::MissingFrom(Lsn::new(100))),
            (vec![(1, 40, 99), (2, 99, 160)], CoverageCheck::MissingFrom(Lsn::new(99))),
            (vec![(2, 40, 160)], CoverageCheck::MissingFrom(Lsn::new(50))),
        ] {
            assert_eq!(coverage(&ranges).check(&needed), expected, "{ranges:?}");
        }
    }

    proptest! {
        #[test]
        fn coverage_says_what_a_naive_set_of_positions_would(
            ranges in proptest::collection::vec((1u32..3, 0u64..60, 0u64..20), 0..12),
            start in 0u64..60, len in 0u64..30,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(timeline, start, len)| (timeline, start, start + len)).collect();
            let known = coverage(&ranges);
            let has = |at| ranges.iter().any(|&(timeline, start, end)| timeline == 1 && start <= at && at < end);
            let expected = (start..start + len).find(|at| !has(*at));
            let expected = expected.map_or(CoverageCheck::Covered, |at| CoverageCheck::MissingFrom(Lsn::new(at)));
            prop_assert_eq!(known.check(&[range(1, start, start + len)]), expected);
            let mut reversed = Coverage::default();
            ranges.iter().rev().for_each(|&(timeline, start, end)| reversed.add(range(timeline, start, end)));
            prop_assert_eq!(known, reversed);
        }
    }
}
