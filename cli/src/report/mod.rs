//! What a run says: tables and summaries for people, or one JSON document.
//!
//! Standard output carries the result, standard error everything else. A reader that goes away (`| head`) is no
//! failure. Whatever becomes an error message passes [`failure`] first: conninfo strings hold passwords.

mod check;
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

pub use check::{check, without_secrets};
pub use expire::expire;
pub use failure::{Failure, print_error, print_failure, print_line, print_notice};
pub use list::{details, list, terminal_width};
pub use operations::{backup, copy, merge, not_verified, restore, unpack, verify};

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

/// `text` as a terminal may have it: what is no character of a text, but moves the cursor, colours, or turns the direction of writing, is written
/// out (`\u{1b}`). Line breaks stay.
///
/// What a repository says comes from whoever wrote it, and so does what a server says.
pub fn printable(text: &str) -> String {
    let is_harmless = |c: char| c == '\n' || !(c.is_control() || is_invisible(c));
    if text.chars().all(is_harmless) {
        return text.to_owned();
    }
    text.chars().map(|c| if is_harmless(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
}

/// The same on one line.
pub fn on_one_line(text: &str) -> String {
    printable(text).replace('\n', r"\n")
}

/// Marks of direction and format, which have no shape of their own.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
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
        let text = if self.json { to_json(value)? } else { printable(&text()) };
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
        Ok(text) => Ok(with_escapes(&text) + "\n"),
        Err(error) => Err(Error::bug("a report cannot be written as JSON").because(error).into()),
    }
}

/// A JSON document in which the characters that JSON allows and [`printable`] does not are escaped; they stand in strings only.
fn with_escapes(document: &str) -> String {
    let mut text = String::with_capacity(document.len());
    for c in document.chars() {
        if c == '\n' || !(c.is_control() || is_invisible(c)) {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
    text
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
        let line = format!("{relation} fork {fork} block {block}: {} ({})", page.reason, page.file);
        let _ = writeln!(text, "    {}", on_one_line(&line));
    }
    text
}

/// The first few names of a list, and how many more there are; JSON has them all.
fn some_of(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = on_one_line(&names[..names.len().min(SHOWN)].join(", "));
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
    fn nothing_that_a_repository_says_reaches_the_terminal_as_a_command() {
        let hostile = "\u{1b}[2J\u{9b}31m\r\nok      all\u{202e}\u{7f}\u{0}";
        let page = CorruptPage {
            file: hostile.to_owned(),
            relation: hostile.to_owned(),
            name: Some(hostile.to_owned()),
            fork: hostile.to_owned(),
            block: 0,
            reason: hostile.to_owned(),
        };
        let backup = BackupSummary {
            detector: hostile.to_owned(),
            detector_reason: hostile.to_owned(),
            postgres_version: hostile.to_owned(),
            system_identifier: hostile.to_owned(),
            note: Some(hostile.to_owned()),
            tablespaces: vec![TablespaceLocation { oid: 1, location: Some(ByteString(hostile.as_bytes().to_vec())) }],
            corrupt_pages: vec![page],
            ..incremental()
        };
        let plain =
            BackupSummary { corrupt_pages: incremental().corrupt_pages, note: Some("x".to_owned()), ..incremental() };
        let damage = |text: &str| engine::verify::Damage {
            object: text.to_owned(),
            problem: text.to_owned(),
            backups: vec![text.to_owned()],
            files: vec![text.to_owned()],
        };
        let verified = |backup: &BackupSummary, text: &str| engine::verify::Report {
            backups: vec![engine::verify::VerifiedBackup { backup: backup.clone(), ok: false }],
            damage: vec![damage(text)],
            objects_checked: 0,
            seconds: 0.0,
            bytes_read: 0,
            bytes_written: 0,
        };
        let restored = |backup: &BackupSummary| engine::restore::Report {
            backup: backup.clone(),
            target: "/srv".into(),
            seconds: 0.0,
            bytes_read: 0,
            bytes_written: 0,
        };
        let backed_up = |backup: &BackupSummary| engine::backup::Report {
            backup: BackupSummary { parent: None, ..backup.clone() },
            seconds: 0.0,
            bytes_read: 0,
            bytes_written: 0,
            audit: None,
            repository_damage: Vec::new(),
        };
        let texts = |summary: &BackupSummary, text: &str| {
            [
                list(std::slice::from_ref(summary), 0, None),
                details(summary),
                verify(&verified(summary, text), false),
                restore(&restored(summary)),
                super::backup(&backed_up(summary), Path::new("/repo")),
            ]
        };
        for (told, sound) in texts(&backup, hostile).into_iter().zip(texts(&plain, "x")) {
            let told = printable(&told);
            assert!(!told.chars().any(|c| (c.is_control() && c != '\n') || is_invisible(c)), "{told:?}");
            assert_eq!(told.lines().count(), sound.lines().count(), "{told}");
        }
    }

    #[test]
    fn a_json_document_says_everything_without_bytes_that_a_terminal_obeys() {
        let hostile = "a\u{1b}\u{9b}\u{7f}\u{202e}\u{e0041}\n\u{e4}";
        let document = to_json(&hostile).unwrap();
        assert_eq!(document, "\"a\\u001b\\u009b\\u007f\\u202e\\udb40\\udc41\\n\u{e4}\"\n");
        assert_eq!(serde_json::from_str::<String>(&document).unwrap(), hostile);
    }

    #[test]
    fn a_word_for_the_shell_is_quoted_only_where_it_must_be() {
        assert_eq!(shell_word("/backup/pg-15_a.b"), "/backup/pg-15_a.b");
        assert_eq!(shell_word("host=/a b"), "'host=/a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
