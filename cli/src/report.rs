//! What a run says: tables and summaries for people, or one JSON document.
//!
//! Standard output carries the result, standard error everything else. A reader that goes away (`| head`) is no
//! failure. Whatever becomes an error message passes [`redact`] first: conninfo strings hold passwords.

use std::fmt::Write as _;
use std::io::{ErrorKind as IoErrorKind, Write as _};
use std::path::Path;
use std::time::Duration;

use engine::repo::{BackupId, BackupSummary};
use engine::{Error, ErrorKind};
use serde::Serialize;

use crate::exit_codes::Exit;
use crate::units::{count, duration, rate, seconds, size};

/// Why a run did not do what was asked.
#[derive(Debug)]
pub enum Failure {
    /// Arguments that clap refuses; or `--help` and `--version`, which clap hands over the same way.
    Arguments(clap::Error),
    /// Configuration that we refuse.
    Usage(String),
    /// The engine's error and the exit code it stands for.
    Failed { error: Error, exit: Exit },
}

impl Failure {
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// An error met while opening the repository.
    pub fn opening(error: Error) -> Self {
        let exit = Exit::of_opening(&error);
        let error = if exit == Exit::Repository { with_hint_about_the_header(error) } else { error };
        Self::Failed { error, exit }
    }

    pub fn exit(&self) -> Exit {
        match self {
            Self::Arguments(error) if error.use_stderr() => Exit::Usage,
            Self::Arguments(_) => Exit::Done,
            Self::Usage(_) => Exit::Usage,
            Self::Failed { exit, .. } => *exit,
        }
    }
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Arguments(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let exit = Exit::of(&error);
        Self::Failed { error, exit }
    }
}

/// A damaged header is frightening, and damage to one small file.
fn with_hint_about_the_header(error: Error) -> Error {
    match (error.kind(), error.hint_text()) {
        (ErrorKind::Corrupt, None) => error.hint(
            "the backups are in other files: don't make a new repository here, \
             but put its file `repository` back from a copy of the directory",
        ),
        _ => error,
    }
}

/// Prints a failure on standard error, and as a document on standard output where JSON is wanted.
pub fn print_failure(failure: &Failure, json: bool) {
    match failure {
        Failure::Arguments(error) if !error.use_stderr() => {
            let _ = error.print();
            return;
        }
        Failure::Arguments(error) => {
            let _ = write!(std::io::stderr(), "{}", redact(&error.to_string()));
        }
        Failure::Usage(text) => print_error(text, None),
        Failure::Failed { error, .. } => print_error(&error.to_string(), error.hint_text()),
    }
    if json {
        let _ = Printer { json }.document(&failure_document(failure), String::new);
    }
}

/// An error line and its hints on standard error.
pub fn print_error(text: &str, hint: Option<&str>) {
    let mut lines = format!("error: {}\n", redact(text));
    for hint in hint.unwrap_or_default().lines() {
        let _ = writeln!(lines, "hint: {}", redact(hint));
    }
    let _ = std::io::stderr().write_all(lines.as_bytes());
}

/// Something to read that is no error, on standard error.
pub fn print_notice(text: &str) {
    print_line(&format!("note: {}", redact(text)));
}

/// A line of its own on standard error.
pub fn print_line(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

#[derive(Serialize)]
struct FailureDocument {
    error: FailureFields,
}

#[derive(Serialize)]
struct FailureFields {
    kind: &'static str,
    message: String,
    place: Option<String>,
    hint: Option<String>,
}

fn failure_document(failure: &Failure) -> FailureDocument {
    let fields = |kind, message: &str, place: Option<&str>, hint: Option<&str>| FailureFields {
        kind,
        message: redact(message),
        place: place.map(redact),
        hint: hint.map(redact),
    };
    let error = match failure {
        Failure::Arguments(error) => {
            let text = error.to_string();
            let message = text.split("\n\n").next().unwrap_or_default();
            fields("usage", message.strip_prefix("error: ").unwrap_or(message), None, None)
        }
        Failure::Usage(text) => fields("usage", text, None, None),
        Failure::Failed { error, .. } => {
            fields(kind_name(error.kind()), &message_with_causes(error), error.place(), error.hint_text())
        }
    };
    FailureDocument { error }
}

/// The fact and its causes, without the place, which has a field of its own.
fn message_with_causes(error: &Error) -> String {
    let mut text = error.what().to_owned();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Missing => "missing",
        ErrorKind::Conflict => "conflict",
        ErrorKind::Locked => "locked",
        ErrorKind::Invalid => "invalid",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Postgres => "postgres",
        ErrorKind::Bug => "bug",
    }
}

/// `text` with the passwords of conninfo strings and addresses replaced by `***`; rather too much than too little.
fn redact(text: &str) -> String {
    redact_addresses(&redact_keywords(text))
}

/// `password = 'it''s \' this'` and `sslpassword=this`: the value ends at its quote, else at white space.
fn redact_keywords(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.to_ascii_lowercase().find("password") {
        let (before, after) = rest.split_at(at + "password".len());
        safe.push_str(before);
        rest = after;
        let Some(value) = after.trim_start().strip_prefix('=') else { continue };
        safe.push_str("=***");
        rest = after_value(value.trim_start());
    }
    safe + rest
}

fn after_value(value: &str) -> &str {
    let Some(quoted) = value.strip_prefix('\'') else {
        return value.find(char::is_whitespace).map_or("", |end| &value[end..]);
    };
    let mut escaped = false;
    let end = quoted.find(|c| {
        let closes = c == '\'' && !escaped;
        escaped = c == '\\' && !escaped;
        closes
    });
    end.map_or("", |end| &quoted[end + 1..])
}

/// `postgresql://user:this@host/`: from the colon behind the user to the last @ before white space.
fn redact_addresses(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, address) = rest.split_at(at + "://".len());
        safe.push_str(before);
        let (address, after) = address.split_at(address.find(char::is_whitespace).unwrap_or(address.len()));
        match (address.find(':'), address.rfind('@')) {
            (Some(colon), Some(at)) if colon < at => {
                let _ = write!(safe, "{}:***{}", &address[..colon], &address[at..]);
            }
            _ => safe.push_str(address),
        }
        rest = after;
    }
    safe + rest
}

/// `text` as one word of a POSIX shell, so that a command we print can be pasted.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
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

/// The columns that a narrow terminal does without, the first to go first.
const DISPENSABLE: [&str; 5] = ["detector", "parent", "took", "cluster", "changed"];

/// A table with a line for each backup, and under it a line for whatever is unusual about that backup.
///
/// In a terminal of `width` columns, columns are left out until it fits; else it has all of them.
pub fn list(backups: &[BackupSummary], width: Option<usize>) -> String {
    if backups.is_empty() {
        return "no backups yet\n".to_owned();
    }
    let head = ["id", "type", "started (UTC)", "took", "cluster", "stored", "changed", "parent", "detector"];
    let rows: Vec<_> = backups.iter().map(row).collect();
    let mut columns: Vec<Column> = (0..head.len())
        .map(|index| {
            let cells = rows.iter().map(|row| row[index].len());
            Column { index, width: cells.chain([head[index].len()]).max().unwrap_or(0) }
        })
        .collect();
    for name in DISPENSABLE {
        if width.is_some_and(|width| table_width(&columns) > width) {
            columns.retain(|column| head[column.index] != name);
        }
    }
    let mut text = line(&head.map(str::to_owned), &columns);
    for (row, backup) in rows.iter().zip(backups) {
        text += &line(row, &columns);
        if let Some(remarks) = remarks(backup) {
            let _ = writeln!(text, "    {remarks}");
        }
    }
    let stored = backups.iter().map(|backup| backup.stored_bytes).fold(0, u64::saturating_add);
    let _ = writeln!(text, "{}, {} stored", count(backups.len() as u64, "backup"), size(stored));
    text
}

/// How many columns the terminal has that standard output is; nothing if it is none.
pub fn terminal_width() -> Option<usize> {
    terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0.into())
}

/// A column of the table: which cell of a row, and how wide.
struct Column {
    index: usize,
    width: usize,
}

const GAP: &str = "  ";

fn table_width(columns: &[Column]) -> usize {
    columns.iter().map(|column| column.width + GAP.len()).sum::<usize>().saturating_sub(GAP.len())
}

fn row(backup: &BackupSummary) -> [String; 9] {
    [
        backup.id.to_string(),
        backup.backup_type.to_string(),
        backup.start_time.strftime("%Y-%m-%d %H:%M").to_string(),
        duration(elapsed(backup)),
        size(backup.cluster_bytes),
        size(backup.stored_bytes),
        backup.blocks_changed.to_string(),
        backup.parent.as_ref().map_or("-".to_owned(), short_id),
        backup.detector.clone(),
    ]
}

/// One line; numbers are to the right, words to the left.
fn line(cells: &[String; 9], columns: &[Column]) -> String {
    let is_number = |i: usize| (3..7).contains(&i);
    let cells = columns.iter().map(|&Column { index, width }| match is_number(index) {
        true => format!("{:>width$}", cells[index]),
        false => format!("{:<width$}", cells[index]),
    });
    format!("{}\n", cells.collect::<Vec<_>>().join(GAP).trim_end())
}

/// The part of an id that tells it apart at a glance: a table has no room for two whole ones.
fn short_id(id: &BackupId) -> String {
    let id = id.to_string();
    id.rsplit('-').next().map(str::to_owned).unwrap_or(id)
}

fn elapsed(backup: &BackupSummary) -> Duration {
    Duration::from_millis(backup.duration_ms)
}

/// What is unusual about a backup, and its note.
fn remarks(backup: &BackupSummary) -> Option<String> {
    let flags = flags(backup);
    let note = backup.note.as_deref().map(|note| format!("note: {}", note.escape_debug()));
    let parts: Vec<String> = flags.into_iter().chain(note).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn flags(backup: &BackupSummary) -> Vec<String> {
    let corrupt = backup.corrupt_pages.len() as u64;
    let flags = [
        backup.from_standby.then(|| "from a standby".to_owned()),
        backup.offline.then(|| "offline".to_owned()),
        (corrupt > 0).then(|| count(corrupt, "corrupt page").to_uppercase()),
    ];
    flags.into_iter().flatten().collect()
}

/// Everything about one backup.
pub fn details(backup: &BackupSummary) -> String {
    let time = |time: jiff::Timestamp| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
    let flags = flags(backup).join(", ");
    let facts = [
        ("backup", backup.id.to_string()),
        ("cluster", format!("{} (system identifier {})", backup.cluster, backup.system_identifier)),
        ("type", backup.backup_type.to_string()),
        ("parent", backup.parent.as_ref().map_or("none".to_owned(), ToString::to_string)),
        ("started", time(backup.start_time)),
        ("stopped", format!("{}, after {}", time(backup.stop_time), duration(elapsed(backup)))),
        ("PostgreSQL", backup.postgres_version.clone()),
        ("WAL", format!("{} to {}, timeline {}", backup.start_lsn, backup.stop_lsn, backup.timeline)),
        ("WAL size", format!("{} before compression", size(backup.wal_bytes))),
        ("cluster size", format!("{} in {}", size(backup.cluster_bytes), count(backup.file_count, "file"))),
        ("stored", format!("{} ({} bytes) added by this backup", size(backup.stored_bytes), backup.stored_bytes)),
        ("changed", count(backup.blocks_changed, "block")),
        ("detector", format!("{}: {}", backup.detector, backup.detector_reason)),
        ("tablespaces", tablespaces(backup)),
        ("flags", if flags.is_empty() { "none".to_owned() } else { flags }),
        ("note", backup.note.as_deref().map_or("none".to_owned(), |note| note.escape_debug().to_string())),
    ];
    let mut text = String::new();
    for (name, value) in facts {
        let _ = writeln!(text, "{name:<13} {value}");
    }
    text + &corrupt_pages(backup)
}

/// Each with its OID and its directory, as `restore --tablespace-map` wants it.
fn tablespaces(backup: &BackupSummary) -> String {
    let one = |tablespace: &engine::repo::TablespaceLocation| match &tablespace.location {
        Some(location) => format!("{} in {}", tablespace.oid, String::from_utf8_lossy(&location.0).escape_debug()),
        None => format!("{} in the data directory", tablespace.oid),
    };
    match &backup.tablespaces[..] {
        [] => "none".to_owned(),
        tablespaces => tablespaces.iter().map(one).collect::<Vec<_>>().join(", "),
    }
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

/// What a backup did and why, and what comes next.
pub fn backup(done: &engine::backup::Report, repo: &Path) -> String {
    let backup = &done.backup;
    let speed = rate(done.bytes_read, done.seconds).map(|rate| format!(", {rate}")).unwrap_or_default();
    let mut text = format!("backup {} done in {}\n", backup.id, seconds(done.seconds));
    let facts = [
        ("kind", kind_and_why(backup)),
        ("read", format!("{}{speed}", size(done.bytes_read))),
        ("changed", format!("{}, found by {}", count(backup.blocks_changed, "block"), backup.detector)),
        ("stored", format!("{} new, for a cluster of {}", size(backup.stored_bytes), size(backup.cluster_bytes))),
        ("WAL", format!("{} to {}, {}", backup.start_lsn, backup.stop_lsn, size(backup.wal_bytes))),
    ];
    for (name, value) in facts {
        let _ = writeln!(text, "  {name:<8} {value}");
    }
    text += &corrupt_pages(backup);
    let repo = shell_word(&repo.display().to_string());
    if backup.parent.is_none() {
        let _ = writeln!(text, "the next backup into {repo} stores only what changes from now on");
    }
    text + &format!("restore it: pgstrata restore {} --repo {repo} --target DIR\n", backup.id)
}

fn kind_and_why(backup: &BackupSummary) -> String {
    match &backup.parent {
        Some(parent) => format!("{} (what changed since {parent})", backup.backup_type),
        None => format!("{} ({})", backup.backup_type, backup.detector_reason),
    }
}

/// What a restore did, and what comes next.
pub fn restore(done: &engine::restore::Report) -> String {
    let speed = rate(done.bytes_written, done.seconds).map(|rate| format!(", {rate}")).unwrap_or_default();
    let target = shell_word(&done.target.display().to_string());
    let mut text = format!("restored {} into {target} in {}\n", done.backup.id, seconds(done.seconds));
    let _ = writeln!(text, "  read     {}", size(done.bytes_read));
    let _ = writeln!(text, "  written  {}{speed}", size(done.bytes_written));
    text += &corrupt_pages(&done.backup);
    let major = done.backup.postgres_version.split('.').next().unwrap_or_default();
    let _ = writeln!(text, "start it with PostgreSQL {major}: pg_ctl -D {target} start");
    text + &format!("while its original runs on this host: pg_ctl -D {target} -o '-p 5433' start\n")
}

/// What verify found.
pub fn verify(done: &engine::verify::Report, quick: bool) -> String {
    let mut text = String::new();
    for verified in &done.backups {
        let _ = writeln!(
            text,
            "{:<7} {} {}",
            if verified.ok { "ok" } else { "DAMAGED" },
            verified.backup.id,
            verified.backup.backup_type
        );
    }
    for damage in &done.damage {
        let _ = writeln!(text, "damage: {}: {}", damage.object, damage.problem);
        let _ = writeln!(text, "    backups: {}", some_of(&damage.backups));
        let _ = writeln!(text, "    files: {}", some_of(&damage.files));
    }
    let how = if quick { "presence and length only" } else { "every byte" };
    let (objects, read) = (count(done.objects_checked, "object"), size(done.bytes_read));
    let _ = writeln!(text, "{objects} checked ({how}), {read} read in {}", seconds(done.seconds));
    let found = match done.damage.len() as u64 {
        0 => "no damage found".to_owned(),
        damage => format!("DAMAGE FOUND: {}", count(damage, "problem")),
    };
    text + &found + "\n"
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
    use engine::backup;
    use engine::pg::{Lsn, TimelineId};
    use engine::repo::{BackupType, ByteString, CorruptPage, TablespaceLocation};
    use serde_json::Value;

    use super::*;

    fn full() -> BackupSummary {
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
        }
    }

    fn incremental() -> BackupSummary {
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

    fn done(backup: BackupSummary) -> backup::Report {
        backup::Report {
            backup,
            seconds: 21.5,
            bytes_read: 123 << 30,
            bytes_written: 212 << 20,
            repository_damage: Vec::new(),
        }
    }

    fn lines(text: &str) -> Vec<&str> {
        text.lines().collect()
    }

    #[test]
    fn a_list_has_a_line_for_each_backup_and_one_more_for_what_is_unusual() {
        assert_eq!(
            lines(&list(&[full(), incremental()], None)),
            [
                "id                         type         started (UTC)       took  cluster    stored   changed  parent    detector",
                "20261121T010502Z-1a2b3c4d  full         2026-11-21 01:05   4m07s  123 GiB  31.0 GiB  16121856  -         scan",
                "20261122T010500Z-5e6f7a8b  incremental  2026-11-22 01:05  21.5 s  123 GiB   212 MiB     98304  1a2b3c4d  scan",
                r"    from a standby; 1 CORRUPT PAGE; note: before\nthe upgrade",
                "2 backups, 31.2 GiB stored",
            ]
        );
        assert_eq!(list(&[], None), "no backups yet\n");
    }

    #[test]
    fn the_widest_table_fits_120_columns() {
        let widest = BackupSummary {
            backup_type: BackupType::SyntheticFull,
            parent: Some(full().id),
            duration_ms: 39_259_000,
            cluster_bytes: 1022 << 40,
            stored_bytes: 1022 << 40,
            blocks_changed: 99_999_999,
            detector: "summary".to_owned(),
            ..full()
        };
        let width = list(&[widest], None).lines().map(|line| line.chars().count()).max();
        assert!(width <= Some(120), "{width:?}");
    }

    #[test]
    fn a_narrow_terminal_gets_fewer_columns_and_no_line_too_long() {
        let table = |width| list(&[full(), incremental()], Some(width));
        let head = |width| {
            let head = table(width).lines().next().unwrap().replace(" (UTC)", "");
            head.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(head(120), "id type started took cluster stored changed parent detector");
        assert_eq!(head(110), "id type started took cluster stored changed parent");
        assert_eq!(head(100), "id type started took cluster stored changed");
        assert_eq!(head(90), "id type started cluster stored changed");
        assert_eq!(head(80), "id type started stored changed");
        assert_eq!(head(20), "id type started stored");
        for width in 70..130 {
            assert!(table(width).lines().all(|line| line.chars().count() <= width), "{width}");
        }
    }

    #[test]
    fn the_details_of_a_backup_are_all_there() {
        assert_eq!(
            lines(&details(&incremental())),
            [
                "backup        20261122T010500Z-5e6f7a8b",
                "cluster       main (system identifier 7575757575757575757)",
                "type          incremental",
                "parent        20261121T010502Z-1a2b3c4d",
                "started       2026-11-22 01:05:00 UTC",
                "stopped       2026-11-22 01:05:21 UTC, after 21.5 s",
                "PostgreSQL    15.18",
                "WAL           2/28 to 2/100, timeline 1",
                "WAL size      16.0 MiB before compression",
                "cluster size  123 GiB in 1040 files",
                "stored        212 MiB (222298112 bytes) added by this backup",
                "changed       98304 blocks",
                "detector      scan: there is no earlier backup of this cluster",
                "tablespaces   16500 in /fast/ts1, 16501 in the data directory",
                "flags         from a standby, 1 CORRUPT PAGE",
                r"note          before\nthe upgrade",
                "1 corrupt page in the source:",
                "    shop.public.customer (1663/5/16384) fork main block 7: checksum 0x12 on the page, 0x34 computed (base/5/16384)",
            ]
        );
    }

    #[test]
    fn a_backup_says_what_kind_it_is_and_why() {
        assert_eq!(
            lines(&backup(&done(full()), Path::new("/backup/my pg"))),
            [
                "backup 20261121T010502Z-1a2b3c4d done in 21.5 s",
                "  kind     full (there is no earlier backup of this cluster)",
                "  read     123 GiB, 5.72 GiB/s",
                "  changed  16121856 blocks, found by scan",
                "  stored   31.0 GiB new, for a cluster of 123 GiB",
                "  WAL      2/28 to 2/100, 16.0 MiB",
                "the next backup into '/backup/my pg' stores only what changes from now on",
                "restore it: pgstrata restore 20261121T010502Z-1a2b3c4d --repo '/backup/my pg' --target DIR",
            ]
        );
        assert_eq!(kind_and_why(&incremental()), "incremental (what changed since 20261121T010502Z-1a2b3c4d)");
    }

    #[test]
    fn a_restore_says_how_to_start_the_copy() {
        let done = engine::restore::Report {
            backup: full(),
            target: "/srv/pg".into(),
            seconds: 2.0,
            bytes_read: 31 << 20,
            bytes_written: 64 << 20,
        };
        assert_eq!(
            lines(&restore(&done)),
            [
                "restored 20261121T010502Z-1a2b3c4d into /srv/pg in 2.0 s",
                "  read     31.0 MiB",
                "  written  64.0 MiB, 32.0 MiB/s",
                "start it with PostgreSQL 15: pg_ctl -D /srv/pg start",
                "while its original runs on this host: pg_ctl -D /srv/pg -o '-p 5433' start",
            ]
        );
    }

    #[test]
    fn a_verification_names_what_is_damaged_and_what_that_touches() {
        let files: Vec<String> = (0..10).map(|i| format!("base/5/{i}")).collect();
        let damage = engine::verify::Damage {
            object: "packs/12".to_owned(),
            problem: "checksum differs at offset 4096".to_owned(),
            backups: vec![full().id.to_string()],
            files,
        };
        let done = engine::verify::Report {
            backups: vec![engine::verify::VerifiedBackup { backup: full(), ok: false }],
            damage: vec![damage],
            objects_checked: 2,
            seconds: 0.25,
            bytes_read: 8192,
            bytes_written: 0,
        };
        assert_eq!(
            lines(&verify(&done, false)),
            [
                "DAMAGED 20261121T010502Z-1a2b3c4d full",
                "damage: packs/12: checksum differs at offset 4096",
                "    backups: 20261121T010502Z-1a2b3c4d",
                "    files: base/5/0, base/5/1, base/5/2, base/5/3, base/5/4, base/5/5, base/5/6, base/5/7 and 2 more",
                "2 objects checked (every byte), 8.00 KiB read in 0.2 s",
                "DAMAGE FOUND: 1 problem",
            ]
        );
    }

    #[test]
    fn list_as_json_has_the_promised_fields() {
        let document: Value = serde_json::from_str(&to_json(&[full(), incremental()]).unwrap()).unwrap();
        let [first, second] = &document.as_array().unwrap()[..] else { panic!("two backups") };
        for name in "id type parent start_lsn stop_lsn timeline start_time stop_time cluster_bytes stored_bytes \
                     blocks_changed detector postgres_version corrupt_pages"
            .split_whitespace()
        {
            assert!(first.get(name).is_some(), "{name}");
        }
        assert_eq!(
            (&first["type"], &first["parent"], &first["start_lsn"]),
            (&"full".into(), &Value::Null, &"2/28".into())
        );
        assert_eq!((&second["parent"], &second["corrupt_pages"][0]["block"]), (&first["id"], &7.into()));
    }

    #[test]
    fn a_backup_as_json_has_the_facts_of_its_run_beside_those_of_the_backup() {
        let document: Value = serde_json::from_str(&to_json(&done(full())).unwrap()).unwrap();
        assert_eq!(document["id"], "20261121T010502Z-1a2b3c4d");
        assert_eq!((&document["seconds"], &document["bytes_written"]), (&21.5.into(), &(212 << 20).into()));
    }

    #[test]
    fn a_failure_as_json_has_kind_message_place_and_hint() {
        let error =
            Error::corrupt("packs/12", "the pack is 10 bytes long, not 20").hint("verify it").because("no more");
        let document = serde_json::to_value(failure_document(&error.into())).unwrap();
        let wanted = serde_json::json!({ "error": {
            "kind": "corrupt", "message": "the pack is 10 bytes long, not 20: no more", "place": "packs/12", "hint": "verify it"
        }});
        assert_eq!(document, wanted);
    }

    #[test]
    fn passwords_never_reach_an_error_message() {
        let cases = [
            (
                "cannot connect to host=a password=s3cret dbname=b: no",
                "cannot connect to host=a password=*** dbname=b: no",
            ),
            (r"PASSWORD = 's3 \' cret' host=a", "PASSWORD=*** host=a"),
            ("sslpassword=s3cret", "sslpassword=***"),
            ("password='s3cret", "password=***"),
            ("postgresql://me:s3cret@host/db is no", "postgresql://me:***@host/db is no"),
            ("postgres://me:s3@cret@host", "postgres://me:***@host"),
            ("postgresql://host:5432/db?password=s3cret", "postgresql://host:5432/db?password=***"),
            ("password authentication failed for me@host", "password authentication failed for me@host"),
            ("see https://host:80/", "see https://host:80/"),
        ];
        for (text, safe) in cases {
            assert_eq!(redact(text), safe);
        }
    }

    #[test]
    fn a_word_for_the_shell_is_quoted_only_where_it_must_be() {
        assert_eq!(shell_word("/backup/pg-15_a.b"), "/backup/pg-15_a.b");
        assert_eq!(shell_word("host=/a b"), "'host=/a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
