//! What an expiry removed, or would remove, and why the rest stays.
//!
//! Its sentences are in the present, so that a dry run prints the same ones.

use std::fmt::Write as _;

use engine::expire::Report;

use super::on_one_line;
use crate::units::{count, seconds, size};

/// A line for each backup, then what that frees.
pub fn expire(done: &Report) -> String {
    let mut text = String::new();
    for backup in &done.removed {
        let _ = writeln!(text, "goes   {}  {}", backup.id, backup.backup_type);
    }
    for id in &done.removed_unreadable {
        let _ = writeln!(text, "goes   {id}  unreadable");
    }
    for kept in &done.kept {
        let _ = writeln!(text, "stays  {}  {}", kept.id, on_one_line(&kept.reasons.join(", ")));
    }
    for (name, value) in [("goes", goes(done)), ("frees", size(done.bytes_freed)), ("stays", stays(done))] {
        let _ = writeln!(text, "  {name:<6} {value}");
    }
    text + &match done.dry_run {
        true => "nothing was done (--dry-run)\n".to_owned(),
        false => format!(
            "done in {}: {} read, {} written\n",
            seconds(done.seconds),
            size(done.bytes_read),
            size(done.bytes_written)
        ),
    }
}

fn goes(done: &Report) -> String {
    let moved = match (done.packs_repacked, done.packs_removed) {
        (0, _) => String::new(),
        (1, 1) => " (what is still needed of it is written anew)".to_owned(),
        (moved, all) if moved == all => " (what is still needed of them is written anew)".to_owned(),
        (1, _) => " (what is still needed of one of them is written anew)".to_owned(),
        (moved, _) => format!(" (what is still needed of {moved} of them is written anew)"),
    };
    let backups = count((done.removed.len() + done.removed_unreadable.len()) as u64, "backup");
    format!("{backups} and {}{moved}", count(done.packs_removed, "pack"))
}

fn stays(done: &Report) -> String {
    let unused = match done.bytes_unused {
        0 => String::new(),
        bytes => format!(", {} ({} %) of it unused", size(bytes), percent(bytes, done.bytes_kept)),
    };
    format!("{} and {} in packs{unused}", count(done.kept.len() as u64, "backup"), size(done.bytes_kept))
}

/// Rounded down, of nothing 0.
fn percent(part: u64, whole: u64) -> u128 {
    (u128::from(part) * 100).checked_div(u128::from(whole)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use engine::expire::Kept;
    use serde_json::Value;

    use super::super::tests::{full, incremental, lines};
    use super::super::to_json;
    use super::*;

    fn done() -> Report {
        let reasons = ["daily 2026-11-22", "weekly 2026-W47"].map(str::to_owned).to_vec();
        Report {
            dry_run: false,
            removed: vec![full()],
            removed_unreadable: Vec::new(),
            kept: vec![Kept { id: incremental().id, reasons }],
            bytes_freed: 12 << 30,
            packs_removed: 11,
            packs_repacked: 3,
            bytes_kept: 32 << 30,
            bytes_unused: 1 << 30,
            refused: Vec::new(),
            seconds: 2.0,
            bytes_read: 512 << 20,
            bytes_written: 256 << 20,
        }
    }

    #[test]
    fn an_expiry_says_what_goes_what_stays_and_why() {
        assert_eq!(
            lines(&expire(&done())),
            [
                "goes   20261121T010502Z-1a2b3c4d  full",
                "stays  20261122T010500Z-5e6f7a8b  daily 2026-11-22, weekly 2026-W47",
                "  goes   1 backup and 11 packs (what is still needed of 3 of them is written anew)",
                "  frees  12.0 GiB",
                "  stays  1 backup and 32.0 GiB in packs, 1.00 GiB (3 %) of it unused",
                "done in 2.0 s: 512 MiB read, 256 MiB written",
            ]
        );
    }

    #[test]
    fn a_backup_that_cannot_be_read_goes_by_its_name() {
        let removed_unreadable = vec!["20261120T010502Z-0badcafe".to_owned()];
        let text = expire(&Report { removed_unreadable, packs_removed: 1, packs_repacked: 1, ..done() });
        assert_eq!(lines(&text)[1], "goes   20261120T010502Z-0badcafe  unreadable");
        assert_eq!(lines(&text)[3], "  goes   2 backups and 1 pack (what is still needed of it is written anew)");
    }

    #[test]
    fn a_dry_run_says_the_same_and_that_nothing_was_done() {
        let dry = Report { dry_run: true, packs_repacked: 0, bytes_unused: 0, ..done() };
        assert_eq!(
            lines(&expire(&dry))[2..],
            [
                "  goes   1 backup and 11 packs",
                "  frees  12.0 GiB",
                "  stays  1 backup and 32.0 GiB in packs",
                "nothing was done (--dry-run)",
            ]
        );
        assert_eq!(percent(0, 0), 0);
    }

    #[test]
    fn an_expiry_as_json_has_the_reasons_of_each_backup_that_stays() {
        let document: Value = serde_json::from_str(&to_json(&done()).unwrap()).unwrap();
        assert_eq!((&document["dry_run"], &document["bytes_freed"]), (&false.into(), &(12_u64 << 30).into()));
        assert_eq!(document["removed"][0]["id"], "20261121T010502Z-1a2b3c4d");
        assert_eq!(document["kept"][0]["reasons"][1], "weekly 2026-W47");
    }
}
