//! How often a cluster is backed up, and how much WAL it writes meanwhile: that much the server must keep, for the next backup to read the log and not everything.
//!
//! Both are taken from the backups that there are: the time between two of them as it was half of the time or more, and the log since the last one that is as old as
//! that, or the oldest. Where that is less than the usual time, the log is taken to grow on as it did. Nothing is guessed before the third backup: until then, what
//! was written since the newest has to do.
//!
//! What goes wrong: the next night is not like the last. So half as much again is asked for, and it is said from what it was computed.

use jiff::{SignedDuration, Timestamp};

use crate::pg::Lsn;
use crate::repo::BackupSummary;
use crate::units::{duration, size};

const MB: u64 = 1 << 20;
/// `wal_keep_size` is given in multiples of this many MB.
const STEP_MB: u64 = 64;

/// The time between two backups, as it was half of the time or more; none if there are fewer than three.
pub(crate) fn usual_gap(backups: &[BackupSummary]) -> Option<SignedDuration> {
    let mut starts: Vec<Timestamp> = backups.iter().map(|backup| backup.start_time).collect();
    starts.sort_unstable();
    // What was merged has the time of what it was merged from.
    starts.dedup();
    let mut gaps: Vec<SignedDuration> = starts.windows(2).map(|pair| pair[1].duration_since(pair[0])).collect();
    gaps.sort_unstable();
    if gaps.len() < 2 { None } else { gaps.get(gaps.len() / 2).copied() }
}

/// How much log is written between two backups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogHabit {
    /// Bytes of log that were seen.
    pub seen: u64,
    /// How long it took to write them.
    pub over: SignedDuration,
    /// The usual time between two backups.
    pub gap: Option<SignedDuration>,
}

impl LogHabit {
    /// As the backups tell, where the log is at `end` at the time `now`.
    pub fn of(backups: &[BackupSummary], end: Lsn, now: Timestamp) -> Self {
        let gap = usual_gap(backups);
        let timeline = backups.last().map(|newest| newest.timeline);
        let of_this_log = |backup: &&BackupSummary| Some(backup.timeline) == timeline && backup.start_lsn <= end;
        let age = |backup: &BackupSummary| now.duration_since(backup.start_time);
        let is_long_enough = |backup: &&BackupSummary| gap.is_none_or(|gap| age(backup) >= gap);
        let seen = || backups.iter().filter(of_this_log);
        let since = seen().rfind(is_long_enough).or_else(|| seen().next());
        Self {
            seen: since.map_or(0, |since| end.as_u64() - since.start_lsn.as_u64()),
            over: since.map_or(SignedDuration::ZERO, age),
            gap,
        }
    }

    /// Bytes of log that are written between two backups.
    pub fn between(&self) -> u64 {
        match self.gap {
            Some(gap) if self.over.is_positive() => {
                (self.seen as f64 * gap.as_secs_f64() / self.over.as_secs_f64()) as u64
            }
            _ => self.seen,
        }
    }

    /// What `wal_keep_size` should be: half as much again as is written between two backups.
    fn wanted_mb(&self) -> u64 {
        let between = self.between();
        (between + between / 2).div_ceil(MB).next_multiple_of(STEP_MB)
    }

    /// Whether a `wal_keep_size` of `kept_mb` keeps the log until the next backup.
    pub fn is_kept_by(&self, kept_mb: Option<u64>) -> bool {
        kept_mb.is_some_and(|kept| kept >= self.wanted_mb())
    }

    /// How the log is kept until the next backup, and from what that was computed; more than the `kept_mb` of `wal_keep_size` now, which were too few.
    pub fn how_to_keep_it(&self, kept_mb: Option<u64>, has_archive: bool) -> String {
        let wanted = self.wanted_mb().max(kept_mb.map_or(0, |now| now + STEP_MB));
        let told = |span: SignedDuration| duration(span.unsigned_abs());
        let seen = format!("{} of WAL in the last {}", size(self.seen), told(self.over));
        let apart = self.gap.map(|gap| format!(" and backups {} apart", told(gap))).unwrap_or_default();
        let archive =
            if has_archive { "" } else { "; or, where WAL is archived, --wal-archive DIR for `pgstrata backup`" };
        format!(
            "ALTER SYSTEM SET wal_keep_size = '{wanted}MB'; SELECT pg_reload_conf(); (computed from {seen}{apart}, with half as much again){archive}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::tests::backup;
    use crate::pg::TimelineId;

    const HOUR: u64 = 100 * MB;

    /// Backups at these hours of a cluster that writes 100 MiB of log an hour.
    fn at(hours: &[i64]) -> Vec<BackupSummary> {
        let lsn = |hour: i64| Lsn::new(HOUR * u64::try_from(hour).unwrap());
        hours.iter().map(|hour| BackupSummary { start_lsn: lsn(*hour), ..backup(*hour, None) }).collect()
    }

    fn habit(backups: &[BackupSummary], hour: u64) -> LogHabit {
        let begun = backup(0, None).start_time;
        LogHabit::of(backups, Lsn::new(HOUR * hour), begun + SignedDuration::from_hours(i64::try_from(hour).unwrap()))
    }

    #[test]
    fn what_was_merged_is_no_backup_of_its_own_time() {
        assert_eq!(usual_gap(&at(&[0, 24, 24, 48, 48])), Some(SignedDuration::from_hours(24)));
        assert_eq!(usual_gap(&at(&[0, 24])), None, "one gap is no habit");
    }

    #[test]
    fn the_log_between_two_backups_is_the_same_whenever_one_asks() {
        let nights = at(&[0, 24, 48]);
        for hour in [49, 60, 72, 100] {
            assert_eq!(habit(&nights, hour).between(), 24 * HOUR, "at hour {hour}");
        }
        assert_eq!(habit(&nights, 49).seen, 25 * HOUR, "an hour is not taken for a day");
        assert_eq!(habit(&at(&[0, 24]), 25).between(), HOUR, "before there is a habit nothing is guessed");
        assert_eq!(habit(&[], 3).between(), 0);
    }

    #[test]
    fn a_part_of_the_usual_time_is_scaled_up() {
        let mut nights = at(&[0, 24, 48]);
        for old in &mut nights[..2] {
            old.timeline = TimelineId::new(7);
        }
        let habit = habit(&nights, 60);
        assert_eq!((habit.seen, habit.between()), (12 * HOUR, 24 * HOUR));
        let hint = habit.how_to_keep_it(Some(0), false);
        let words = ["'3648MB'", "1.17 GiB of WAL in the last 12h00m and backups 1d00h apart", "--wal-archive"];
        assert!(words.iter().all(|word| hint.contains(word)), "{hint}");
        assert_eq!([None, Some(3600), Some(3648)].map(|kept| habit.is_kept_by(kept)), [false, false, true]);
    }

    #[test]
    fn what_was_kept_and_too_little_is_not_asked_for_again() {
        let hint = habit(&at(&[0, 24, 48]), 72).how_to_keep_it(Some(5000), true);
        assert!(hint.contains("'5064MB'") && !hint.contains("--wal-archive"), "{hint}");
    }
}
