//! What a run says: tables and summaries for people, or one JSON document.
//!
//! Standard output carries the result, standard error everything else. A reader that goes away (`| head`) is no
//! failure. Whatever becomes an error message passes [`failure`] first: conninfo strings hold passwords.

mod expire;
mod failure;
mod list;
mod operations;

use std::fmt::Write as _;
use std::io::{ErrorKind as IoErrorKind, Write as _};
use std::path::Path;

use engine::repo::{BackupSummary, ClusterName};
use engine::{Error, ErrorKind};
use serde::Serialize;

pub use expire::expire;
pub use failure::{Failure, print_error, print_failure, print_line, print_notice};
pub use list::{details, list, terminal_width};
pub use operations::{backup, copy, merge, restore, unpack, verify};

use crate::exit_codes::Exit;
use crate::units::count;

/// `text` as one word of a POSIX shell, so that a command we print can be pasted.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// The options that lead a command to a cluster's backups.
pub fn whereabouts(repo: &Path, cluster: &ClusterName) -> String {
    let repo = shell_word(&repo.display().to_string());
    if *cluster == ClusterName::default() {
        format!("--repo {repo}")
    } else {
        format!("--repo {repo} --cluster {cluster}")
    }
}

/// Prints results on standard output, in the form that the user wants.
#[derive(Clone, Copy)]
pub struct Printer {
    pub json: bool,
}

impl Printer {
    /// `value` as a document, or the text that says the same.
    pub fn document(self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let text = if self.json { to_json(value)? } else { text() };
        let written = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
        match written {
            Err(error) if error.kind() != IoErrorKind::BrokenPipe => {
                Err(Error::new(ErrorKind::Unavailable, "cannot write to standard output").because(error).into())
            }
            _ => Ok(()),
        }
    }

    /// A plan, for `--dry-run`.
    pub fn plan(self, plan: &str) -> Result<Exit, Failure> {
        let lines = plan.lines().collect();
        self.document(&DryRun { dry_run: true, plan: lines }, || {
            format!("{}\nnothing was done (--dry-run)\n", plan.trim_end())
        })?;
        Ok(Exit::Done)
    }
}

fn to_json(value: &impl Serialize) -> Result<String, Failure> {
    match serde_json::to_string_pretty(value) {
        Ok(text) => Ok(text + "\n"),
        Err(error) => Err(Error::bug("a report cannot be written as JSON").because(error).into()),
    }
}

/// The document of `init`.
#[derive(Serialize)]
pub struct Initialised<'a> {
    pub repository: &'a Path,
}

/// The document of `completions`.
#[derive(Serialize)]
pub struct Completions<'a> {
    pub script: &'a str,
}

#[derive(Serialize)]
struct DryRun<'a> {
    dry_run: bool,
    plan: Vec<&'a str>,
}

fn corrupt_pages(backup: &BackupSummary) -> String {
    let mut text = String::new();
    if !backup.corrupt_pages.is_empty() {
        let _ = writeln!(text, "{} in the source:", count(backup.corrupt_pages.len() as u64, "corrupt page"));
    }
    for page in &backup.corrupt_pages {
        let (locator, fork, block) = (&page.relation, &page.fork, page.block);
        let relation = page.name.as_ref().map_or(locator.clone(), |name| format!("{name} ({locator})"));
        let _ = writeln!(text, "    {relation} fork {fork} block {block}: {} ({})", page.reason, page.file);
    }
    text
}

/// The first few names of a list, and how many more there are; JSON has them all.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len() {
        0 => "none".to_owned(),
        n if n > SHOWN => format!("{shown} and {} more", n - SHOWN),
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use engine::pg::{Lsn, TimelineId};
    use engine::repo::{BackupType, ByteString, CorruptPage, TablespaceLocation};

    use super::*;

    pub fn full() -> BackupSummary {
        BackupSummary {
            id: "20261121T010502Z-1a2b3c4d".parse().unwrap(),
            backup_type: BackupType::Full,
            parent: None,
            start_lsn: Lsn::new(0x2_0000_0028),
            stop_lsn: Lsn::new(0x2_0000_0100),
            timeline: TimelineId::new(1),
            start_time: "2026-11-21T01:05:02Z".parse().unwrap(),
            stop_time: "2026-11-21T01:09:09Z".parse().unwrap(),
            duration_ms: 247_000,
            tablespaces: Vec::new(),
            cluster_bytes: 123 << 30,
            stored_bytes: 31 << 30,
            blocks_changed: 16_121_856,
            detector: "scan".to_owned(),
            detector_reason: "there is no earlier backup of this cluster".to_owned(),
            postgres_version: "15.18".to_owned(),
            corrupt_pages: Vec::new(),
            cluster: "main".parse().unwrap(),
            system_identifier: "7575757575757575757".to_owned(),
            from_standby: false,
            offline: false,
            file_count: 1040,
            wal_bytes: 16 << 20,
            note: None,
            merged_from: None,
            pinned: false,
            damaged: false,
        }
    }

    pub fn incremental() -> BackupSummary {
        let corrupt = CorruptPage {
            file: "base/5/16384".to_owned(),
            relation: "1663/5/16384".to_owned(),
            name: Some("shop.public.customer".to_owned()),
            fork: "main".to_owned(),
            block: 7,
            reason: "checksum 0x12 on the page, 0x34 computed".to_owned(),
        };
        BackupSummary {
            id: "20261122T010500Z-5e6f7a8b".parse().unwrap(),
            backup_type: BackupType::Incremental,
            parent: Some(full().id),
            start_time: "2026-11-22T01:05:00Z".parse().unwrap(),
            stop_time: "2026-11-22T01:05:21Z".parse().unwrap(),
            duration_ms: 21_500,
            tablespaces: vec![
                TablespaceLocation { oid: 16_500, location: Some(ByteString(b"/fast/ts1".to_vec())) },
                TablespaceLocation { oid: 16_501, location: None },
            ],
            stored_bytes: 212 << 20,
            blocks_changed: 98_304,
            corrupt_pages: vec![corrupt],
            from_standby: true,
            note: Some("before\nthe upgrade".to_owned()),
            ..full()
        }
    }

    pub fn lines(text: &str) -> Vec<&str> {
        text.lines().collect()
    }

    #[test]
    fn a_word_for_the_shell_is_quoted_only_where_it_must_be() {
        assert_eq!(shell_word("/backup/pg-15_a.b"), "/backup/pg-15_a.b");
        assert_eq!(shell_word("host=/a b"), "'host=/a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
