//! Which backups stay, by rules over their moments: no I/O, no clock.
//!
//! The rules mean what they mean in restic, so that who knows `restic forget` knows these. They are or-ed: a backup stays if
//! any rule keeps it. `last` keeps the newest so many. `within` keeps what is less than a span older than the newest backup;
//! not than now, so that a job that stopped making backups does not lose those that it has. The others cut time into
//! hours, days, ISO weeks, months or years in UTC, pass over those without a backup, and keep the newest backup of each of
//! the newest so many. While such a rule has not found as many as it may keep, it keeps the oldest backup, too: the history
//! is then as long as it can be, and a first backup becomes the first of its week, its month and its year.
//!
//! Which backup is newer is the caller's to say, by the order it gives them in: a clock that was set back, or that is fast on one
//! of two hosts, must not make a new backup look old. Times only say into which bucket a backup falls, and how far it lies
//! behind the newest.
//!
//! A damaged backup is neither kept nor counted: seven damaged nights must not push the last good one out. A rule of none
//! (`daily 0`) is no rule, and a policy without rules keeps everything: an empty setting must never empty a repository.
//!
//! Three things differ from restic: that order; a month before 31 March is the last day of February, as in PostgreSQL, and not
//! 3 March; weeks can be written.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::error::{Error, Result};

/// Which backups to keep; each rule that is there keeps what it says, whatever the others do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The newest backups.
    pub last: Option<Count>,
    /// The backups of this span before the newest one.
    pub within: Option<Span>,
    /// The newest backup of each hour.
    pub hourly: Option<Count>,
    /// The newest backup of each day.
    pub daily: Option<Count>,
    /// The newest backup of each ISO week, which begins on Monday.
    pub weekly: Option<Count>,
    /// The newest backup of each month.
    pub monthly: Option<Count>,
    /// The newest backup of each year.
    pub yearly: Option<Count>,
}

/// How many a rule keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// The newest so many; 0 is no rule.
    Number(u32),
    /// All of them.
    Unlimited,
}

/// A span of time by the calendar; one of nothing is no rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Years.
    pub years: u32,
    /// Months.
    pub months: u32,
    /// Days.
    pub days: u32,
    /// Hours.
    pub hours: u32,
}

/// What a policy knows of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The moment that the backup stands for.
    pub time: Timestamp,
    /// Whether the backup is good: a damaged one is kept and counted by no rule.
    pub counts: bool,
}

/// A rule that keeps the newest of each bucket: its name and how a bucket is written.
struct Calendar {
    name: &'static str,
    bucket: &'static str,
}

const HOURLY: Calendar = Calendar { name: "hourly", bucket: "%Y-%m-%d %H:00" };
const DAILY: Calendar = Calendar { name: "daily", bucket: "%Y-%m-%d" };
const WEEKLY: Calendar = Calendar { name: "weekly", bucket: "%G-W%V" };
const MONTHLY: Calendar = Calendar { name: "monthly", bucket: "%Y-%m" };
const YEARLY: Calendar = Calendar { name: "yearly", bucket: "%Y" };

impl Policy {
    /// Whether there is no rule: then everything is kept.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        self.within().is_none() && counts.into_iter().flatten().all(Count::is_spent)
    }

    /// For each backup why it is kept: one that nothing keeps goes.
    ///
    /// `moments` are those of one cluster's backups, oldest first; whatever their times say, that is their order.
    pub fn decide(&self, moments: &[Moment]) -> Vec<Vec<String>> {
        if self.is_empty() {
            return vec![vec!["no rule".to_owned()]; moments.len()];
        }
        let mut decision = Decision::new(moments);
        decision.keep_last(self.last);
        decision.keep_within(self.within());
        decision.keep_newest_of_each(&HOURLY, self.hourly);
        decision.keep_newest_of_each(&DAILY, self.daily);
        decision.keep_newest_of_each(&WEEKLY, self.weekly);
        decision.keep_newest_of_each(&MONTHLY, self.monthly);
        decision.keep_newest_of_each(&YEARLY, self.yearly);
        decision.reasons
    }

    fn within(&self) -> Option<Span> {
        self.within.filter(|span| *span != Span::default())
    }
}

/// The reasons found so far, beside the backups that count.
struct Decision {
    newest_first: Vec<(usize, Timestamp)>,
    reasons: Vec<Vec<String>>,
}

impl Decision {
    fn new(moments: &[Moment]) -> Self {
        let good = moments.iter().enumerate().rev().filter(|(_, moment)| moment.counts);
        let newest_first = good.map(|(index, moment)| (index, moment.time)).collect();
        Self { newest_first, reasons: vec![Vec::new(); moments.len()] }
    }

    fn keep_last(&mut self, count: Option<Count>) {
        for &(index, _) in self.newest_first.iter().take(count.map_or(0, Count::limit)) {
            self.reasons[index].push("last".to_owned());
        }
    }

    fn keep_within(&mut self, span: Option<Span>) {
        let (Some(span), Some(&(_, newest))) = (span, self.newest_first.first()) else { return };
        let start = span.before(newest);
        for &(index, _) in self.newest_first.iter().filter(|&&(_, time)| start.is_none_or(|start| time > start)) {
            self.reasons[index].push(format!("within {span}"));
        }
    }

    fn keep_newest_of_each(&mut self, calendar: &Calendar, count: Option<Count>) {
        let Some(mut left) = count else { return };
        let mut found = HashSet::new();
        for (rank, &(index, time)) in self.newest_first.iter().enumerate() {
            if left.is_spent() {
                break;
            }
            let bucket = time.strftime(calendar.bucket).to_string();
            let reason = format!("{} {bucket}", calendar.name);
            if found.insert(bucket) {
                self.reasons[index].push(reason);
                left = left.less_one();
            } else if rank + 1 == self.newest_first.len() {
                self.reasons[index].push(format!("oldest ({})", calendar.name));
            }
        }
    }
}

impl Count {
    fn is_spent(self) -> bool {
        self == Self::Number(0)
    }

    fn less_one(self) -> Self {
        match self {
            Self::Number(number) => Self::Number(number.saturating_sub(1)),
            Self::Unlimited => Self::Unlimited,
        }
    }

    fn limit(self) -> usize {
        match self {
            Self::Number(number) => usize::try_from(number).unwrap_or(usize::MAX),
            Self::Unlimited => usize::MAX,
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

impl FromStr for Count {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        let refused = || Error::invalid(format!("{text:?} is no count")).hint("use a number, or unlimited");
        text.parse().map(Self::Number).map_err(|_| refused())
    }
}

impl Span {
    /// The moment that lies this span before `time`; none if that is before all time.
    fn before(self, time: Timestamp) -> Option<Timestamp> {
        let span = jiff::Span::new().try_years(self.years).and_then(|span| span.try_months(self.months));
        let span = span.and_then(|span| span.try_days(self.days)).and_then(|span| span.try_hours(self.hours)).ok()?;
        time.to_zoned(TimeZone::UTC).checked_sub(span).ok().map(|start| start.timestamp())
    }

    /// Adds `number` of a unit by its letter; none if it does not fit or there is no such unit.
    fn plus(self, number: u32, unit: char) -> Option<Self> {
        Some(match unit {
            'y' => Self { years: self.years.checked_add(number)?, ..self },
            'm' => Self { months: self.months.checked_add(number)?, ..self },
            'w' => Self { days: self.days.checked_add(number.checked_mul(7)?)?, ..self },
            'd' => Self { days: self.days.checked_add(number)?, ..self },
            'h' => Self { hours: self.hours.checked_add(number)?, ..self },
            _ => return None,
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut span = Self::default();
        let mut rest = text;
        while !rest.is_empty() {
            let (digits, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
            let mut after = after.chars();
            span = span.plus(digits.parse().ok()?, after.next()?)?;
            rest = after.as_str();
        }
        (!text.is_empty()).then_some(span)
    }
}

/// As restic writes it: `2y5m7d3h`; weeks are days.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return f.write_str("0d");
        }
        let units = [(self.years, 'y'), (self.months, 'm'), (self.days, 'd'), (self.hours, 'h')];
        units.into_iter().filter(|&(number, _)| number > 0).try_for_each(|(number, unit)| write!(f, "{number}{unit}"))
    }
}

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text).ok_or_else(|| {
            let hint = "write years, months, weeks, days and hours as in 14d, 2w or 2y5m7d3h";
            Error::invalid(format!("{text:?} is no span of time")).hint(hint)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::ToSpan;
    use proptest::prelude::*;

    use super::*;

    fn moment(time: &str) -> Moment {
        Moment { time: time.parse().unwrap(), counts: true }
    }

    fn number(count: u32) -> Option<Count> {
        Some(Count::Number(count))
    }

    /// One backup at 11:00 on each of the last `count` days of this step before a Sunday.
    fn every(step_days: i64, count: i64) -> Vec<Moment> {
        let newest: Timestamp = "2019-11-17T11:00:00Z".parse().unwrap();
        let time = |back: i64| newest - (24 * step_days * back).hours();
        (0..count).rev().map(|back| Moment { time: time(back), counts: true }).collect()
    }

    fn kept(policy: Policy, moments: &[Moment]) -> Vec<usize> {
        let reasons = policy.decide(moments);
        (0..moments.len()).filter(|&index| !reasons[index].is_empty()).collect()
    }

    #[test]
    fn each_rule_says_why_it_keeps_a_backup() {
        let moments = [
            moment("2025-12-28T23:59:59Z"),
            moment("2025-12-29T00:00:00Z"),
            moment("2026-01-01T10:00:00Z"),
            moment("2026-01-01T10:59:59Z"),
        ];
        let all = number(9);
        let policy = Policy {
            last: number(1),
            within: Some("3d".parse().unwrap()),
            hourly: all,
            daily: all,
            weekly: all,
            monthly: all,
            yearly: all,
        };
        let newest =
            "last, within 3d, hourly 2026-01-01 10:00, daily 2026-01-01, weekly 2026-W01, monthly 2026-01, yearly 2026";
        let expected = [
            "hourly 2025-12-28 23:00, daily 2025-12-28, weekly 2025-W52, oldest (monthly), oldest (yearly)",
            "hourly 2025-12-29 00:00, daily 2025-12-29, monthly 2025-12, yearly 2025",
            "within 3d",
            newest,
        ];
        let reasons: Vec<String> = policy.decide(&moments).iter().map(|reasons| reasons.join(", ")).collect();
        assert_eq!(reasons, expected);
    }

    #[test]
    fn restics_example_of_twelve_sundays() {
        let sundays = every(7, 12);
        let cases = [
            (Policy { daily: number(4), ..Policy::default() }, 8..12),
            (Policy { last: number(4), ..Policy::default() }, 8..12),
            (Policy { weekly: number(20), ..Policy::default() }, 0..12),
            (Policy { daily: Some(Count::Unlimited), ..Policy::default() }, 0..12),
            (Policy { within: Some("14d".parse().unwrap()), ..Policy::default() }, 10..12),
            (Policy { within: Some("14d1h".parse().unwrap()), ..Policy::default() }, 9..12),
        ];
        for (policy, stay) in cases {
            assert_eq!(kept(policy, &sundays), stay.collect::<Vec<_>>(), "{policy:?}");
        }
    }

    #[test]
    fn restics_example_of_a_backup_on_each_day_of_a_hundred_years() {
        let days = every(1, 36_525);
        let policy = Policy {
            daily: number(7),
            weekly: number(5),
            monthly: number(12),
            yearly: number(75),
            ..Policy::default()
        };
        let reasons = policy.decide(&days);
        let by = |name: &str| reasons.iter().flatten().filter(|reason| reason.starts_with(name)).count();
        assert_eq!((by("daily "), by("weekly "), by("monthly "), by("yearly ")), (7, 5, 12, 75));
        // The newest is the first of each rule, and the last day of 2018 ends a month and a year.
        assert_eq!(kept(policy, &days).len(), 7 + (5 - 1) + (12 - 1) + (75 - 2));
    }

    #[test]
    fn the_oldest_stays_only_while_a_rule_has_not_found_enough() {
        let moments = [
            moment("2026-11-20T01:00:00Z"),
            moment("2026-11-20T02:00:00Z"),
            moment("2026-11-21T01:00:00Z"),
            moment("2026-11-21T02:00:00Z"),
        ];
        let daily = |count| kept(Policy { daily: Some(count), ..Policy::default() }, &moments);
        assert_eq!(daily(Count::Number(2)), [1, 3], "two days were found");
        assert_eq!(daily(Count::Number(3)), [0, 1, 3]);
        assert_eq!(daily(Count::Unlimited), [0, 1, 3]);
    }

    #[test]
    fn a_span_is_counted_from_the_newest_backup_by_the_calendar() {
        let moments = [
            moment("2025-02-28T12:00:00Z"),
            moment("2025-02-28T12:00:01Z"),
            moment("2025-03-02T12:00:00Z"),
            moment("2025-03-31T12:00:00Z"),
        ];
        let within = |span: &str| kept(Policy { within: Some(span.parse().unwrap()), ..Policy::default() }, &moments);
        assert_eq!(within("1m"), [1, 2, 3], "what is exactly the span older goes");
        assert_eq!(within("4w1d"), [3]);
        assert_eq!(within("4w1d1h"), [2, 3]);
        assert_eq!(within("4000000000y"), [0, 1, 2, 3], "before all time");
        assert_eq!(within("9000y9000m"), [0, 1, 2, 3], "before all time");
    }

    #[test]
    fn a_damaged_backup_is_neither_kept_nor_counted() {
        let mut moments = every(1, 5);
        for damaged in [0, 3, 4] {
            moments[damaged].counts = false;
        }
        assert_eq!(kept(Policy { last: number(9), ..Policy::default() }, &moments), [1, 2]);
        assert_eq!(kept(Policy { daily: number(1), ..Policy::default() }, &moments), [2]);
        assert_eq!(kept(Policy { within: Some("1d1h".parse().unwrap()), ..Policy::default() }, &moments), [1, 2]);
    }

    #[test]
    fn the_one_given_later_is_the_newer_whatever_the_clock_said() {
        let moments = [moment("2026-11-22T01:00:00Z"); 3];
        assert_eq!(kept(Policy { last: number(1), ..Policy::default() }, &moments), [2]);
        assert_eq!(kept(Policy { daily: number(1), ..Policy::default() }, &moments), [2]);
        assert_eq!(kept(Policy { within: Some("1h".parse().unwrap()), ..Policy::default() }, &moments), [0, 1, 2]);
        let fast = moment("2038-01-19T03:14:07Z");
        let moments = [moment("2026-11-20T01:00:00Z"), fast, fast, moments[0], moment("2026-11-23T01:00:00Z")];
        assert_eq!(kept(Policy { last: number(2), ..Policy::default() }, &moments), [3, 4]);
        assert_eq!(kept(Policy { daily: number(3), ..Policy::default() }, &moments), [2, 3, 4]);
        assert_eq!(kept(Policy { within: Some("2d".parse().unwrap()), ..Policy::default() }, &moments), [1, 2, 3, 4]);
    }

    #[test]
    fn rules_of_nothing_are_no_rules_and_no_rule_keeps_everything() {
        let nothing = Policy { daily: number(0), within: Some("0d".parse().unwrap()), ..Policy::default() };
        for policy in [Policy::default(), nothing] {
            assert!(policy.is_empty());
            assert_eq!(policy.decide(&every(1, 2)), [["no rule"], ["no rule"]]);
        }
        assert!(!Policy { yearly: Some(Count::Unlimited), ..nothing }.is_empty());
        assert_eq!(Policy { last: number(1), ..nothing }.decide(&[]), Vec::<Vec<String>>::new());
    }

    #[test]
    fn spans_and_counts_are_read_as_they_are_written() {
        let cases =
            [("2y5m7d3h", "2y5m7d3h"), ("14d", "14d"), ("2w", "14d"), ("1w1d", "8d"), ("3h1y", "1y3h"), ("0h", "0d")];
        for (text, written) in cases {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), written, "{text}");
        }
        for text in [
            "",
            "14",
            "d",
            "-1d",
            "1.5d",
            "2 d",
            "1x",
            "4294967296d",
            "4000000000w",
            "4294967295d1d",
            "1µ",
            "unlimited",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text:?}");
        }
        assert_eq!("unlimited".parse::<Count>().unwrap(), Count::Unlimited);
        for text in ["", "-1", "all", "4294967296", "1.0"] {
            assert!(text.parse::<Count>().is_err(), "{text:?}");
        }
    }

    /// What a rule means, said without walking: a newest of its bucket with fewer than `count` buckets after it; or the
    /// oldest, with fewer than `count` buckets in all the others.
    fn bucket_keeps(moments: &[Moment], bucket: impl Fn(usize) -> String, count: Count, index: usize) -> bool {
        let good = |other: &usize| moments[*other].counts;
        let is_newer = |other: &usize| *other > index;
        let newer: BTreeSet<String> = (0..moments.len()).filter(good).filter(is_newer).map(&bucket).collect();
        let is_oldest = (0..moments.len()).filter(good).all(|other| other == index || is_newer(&other));
        let has_room = count == Count::Unlimited || newer.len() < count.limit();
        moments[index].counts && has_room && (is_oldest || !newer.contains(&bucket(index)))
    }

    fn naive(policy: &Policy, moments: &[Moment]) -> Vec<usize> {
        let at = |index: usize| moments[index].time.to_zoned(TimeZone::UTC).datetime();
        let hours = |index: usize| moments[index].time.as_second().div_euclid(3600);
        let newest = moments.iter().rfind(|moment| moment.counts).map(|moment| moment.time);
        let within = |index: usize| {
            let start = newest.zip(policy.within()).map(|(newest, span)| span.before(newest));
            moments[index].counts && start.is_some_and(|start| start.is_none_or(|start| moments[index].time > start))
        };
        let keeps = |count: Option<Count>, index: usize, bucket: &dyn Fn(usize) -> String| {
            count.is_some_and(|count| bucket_keeps(moments, bucket, count, index))
        };
        let is_kept = |&index: &usize| {
            within(index)
                || keeps(policy.last, index, &|index| index.to_string())
                || keeps(policy.hourly, index, &|index| hours(index).to_string())
                || keeps(policy.daily, index, &|index| hours(index).div_euclid(24).to_string())
                // 1 January 1970 was a Thursday.
                || keeps(policy.weekly, index, &|index| (hours(index).div_euclid(24) + 3).div_euclid(7).to_string())
                || keeps(policy.monthly, index, &|index| format!("{} {}", at(index).year(), at(index).month()))
                || keeps(policy.yearly, index, &|index| at(index).year().to_string())
        };
        (0..moments.len()).filter(is_kept).collect()
    }

    fn counts() -> impl Strategy<Value = Option<Count>> {
        prop_oneof![
            3 => Just(None),
            3 => (0..6_u32).prop_map(number),
            1 => Just(Some(Count::Unlimited)),
        ]
    }

    fn spans() -> impl Strategy<Value = Span> {
        (0..3_u32, 0..14_u32, 0..40_u32, 0..30_u32).prop_map(|(years, months, days, hours)| Span {
            years,
            months,
            days,
            hours,
        })
    }

    fn policies() -> impl Strategy<Value = Policy> {
        let within = prop_oneof![2 => Just(None), 1 => spans().prop_map(Some)];
        (counts(), within, counts(), counts(), counts(), counts(), counts()).prop_map(
            |(last, within, hourly, daily, weekly, monthly, yearly)| Policy {
                last,
                within,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
            },
        )
    }

    /// Backups at any distance, from some seconds to years, not always in the order of time.
    fn histories() -> impl Strategy<Value = Vec<Moment>> {
        let step = prop_oneof![Just(0_i64), -5_000..5_000_i64, 0..100_000_i64, 0..9_000_000_i64];
        prop::collection::vec((step, prop::bool::weighted(0.9)), 0..30).prop_map(|steps| {
            let mut second = 1_700_000_000;
            let next = |(step, counts): (i64, bool)| {
                second += step;
                Moment { time: Timestamp::from_second(second).unwrap(), counts }
            };
            steps.into_iter().map(next).collect()
        })
    }

    proptest! {
        #[test]
        fn the_rules_keep_what_a_naive_reading_of_them_keeps(policy in policies(), moments in histories()) {
            prop_assume!(!policy.is_empty());
            prop_assert_eq!(kept(policy, &moments), naive(&policy, &moments));
        }

        #[test]
        fn at_least_the_last_so_many_good_ones_stay(policy in policies(), last in 1..9_u32, moments in histories()) {
            let policy = Policy { last: number(last), ..policy };
            let good = moments.iter().filter(|moment| moment.counts).count();
            prop_assert!(kept(policy, &moments).len() >= good.min(last as usize));
        }

        #[test]
        fn the_newest_good_one_always_stays(policy in policies(), moments in histories()) {
            let newest = moments.iter().rposition(|moment| moment.counts);
            prop_assert!(policy.is_empty() || newest.is_none_or(|newest| kept(policy, &moments).contains(&newest)));
        }

        #[test]
        fn one_more_rule_never_removes_a_backup(policy in policies(), other in policies(), moments in histories()) {
            prop_assume!(!policy.is_empty());
            let more = Policy {
                last: policy.last.or(other.last),
                within: policy.within.or(other.within),
                hourly: policy.hourly.or(other.hourly),
                daily: policy.daily.or(other.daily),
                weekly: policy.weekly.or(other.weekly),
                monthly: policy.monthly.or(other.monthly),
                yearly: policy.yearly.or(other.yearly),
            };
            let (few, many) = (kept(policy, &moments), kept(more, &moments));
            prop_assert!(few.iter().all(|index| many.contains(index)), "{few:?} {many:?}");
        }

        #[test]
        fn a_span_is_read_as_it_was_printed(span in spans()) {
            prop_assert_eq!(span.to_string().parse::<Span>().unwrap(), span);
        }

        #[test]
        fn a_count_is_read_as_it_was_printed(count in counts()) {
            prop_assume!(count.is_some());
            prop_assert_eq!(count.unwrap().to_string().parse::<Count>().unwrap(), count.unwrap());
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in "\\PC*|[0-9ymwdh]*") {
            let _ = (text.parse::<Span>(), text.parse::<Count>());
        }
    }
}
