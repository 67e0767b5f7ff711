//! The table of the backups, and everything about one of them.

use std::fmt::Write as _;
use std::time::Duration;

use engine::repo::{BackupId, BackupSummary};

use super::{corrupt_pages, on_one_line};
use crate::units::{count, duration, size};

/// The columns that a narrow terminal does without, the first to go first.
const DISPENSABLE: [&str; 5] = ["detector", "parent", "took", "cluster", "changed"];

/// A table with a line for each backup, and under it a line for whatever is unusual about that backup; at last how many bytes of this
/// cluster the repository holds, which is not the sum of what each backup added: some of that may have been removed since.
///
/// In a terminal of `width` columns, columns are left out until it fits; else it has all of them.
pub fn list(backups: &[BackupSummary], bytes_in_repository: u64, width: Option<usize>) -> String {
    if backups.is_empty() {
        return "no backups yet\n".to_owned();
    }
    let head = ["id", "type", "started (UTC)", "took", "cluster", "stored", "changed", "parent", "detector"];
    let rows: Vec<_> = backups.iter().map(|backup| row(backup).map(|cell| on_one_line(&cell))).collect();
    let mut columns: Vec<Column> = (0..head.len())
        .map(|index| {
            let cells = rows.iter().map(|row| row[index].chars().count());
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
            let _ = writeln!(text, "    {}", on_one_line(&remarks));
        }
    }
    let _ =
        writeln!(text, "{}, {} in the repository", count(backups.len() as u64, "backup"), size(bytes_in_repository));
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
        if backup.merged_from.is_some() { "-".to_owned() } else { duration(elapsed(backup)) },
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
        backup.damaged.then(|| "DAMAGED, as `pgstrata verify` found".to_owned()),
        backup.pinned.then(|| "pinned".to_owned()),
        // Its times are those of the backup that it was made of; how long it took is not.
        backup.merged_from.map(|id| format!("merged from {id} in {}", duration(elapsed(backup)))),
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
    let stopped = match backup.merged_from {
        Some(_) => time(backup.stop_time),
        None => format!("{}, after {}", time(backup.stop_time), duration(elapsed(backup))),
    };
    let facts = [
        ("backup", backup.id.to_string()),
        ("cluster", format!("{} (system identifier {})", backup.cluster, backup.system_identifier)),
        ("type", backup.backup_type.to_string()),
        ("parent", backup.parent.as_ref().map_or("none".to_owned(), ToString::to_string)),
        ("started", time(backup.start_time)),
        ("stopped", stopped),
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
        let _ = writeln!(text, "{name:<13} {}", on_one_line(&value));
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

#[cfg(test)]
mod tests {
    use engine::repo::BackupType;
    use serde_json::Value;

    use super::super::tests::{full, incremental, lines};
    use super::super::to_json;
    use super::*;

    #[test]
    fn a_list_has_a_line_for_each_backup_and_one_more_for_what_is_unusual() {
        assert_eq!(
            lines(&list(&[full(), incremental()], 40 << 20, None)),
            [
                "id                         type         started (UTC)       took  cluster    stored   changed  parent    detector",
                "20261121T010502Z-1a2b3c4d  full         2026-11-21 01:05   4m07s  123 GiB  31.0 GiB  16121856  -         scan",
                "20261122T010500Z-5e6f7a8b  incremental  2026-11-22 01:05  21.5 s  123 GiB   212 MiB     98304  1a2b3c4d  scan",
                r"    from a standby; 1 CORRUPT PAGE; note: before\nthe upgrade",
                "2 backups, 40.0 MiB in the repository",
            ]
        );
        assert_eq!(list(&[], 0, None), "no backups yet\n");
    }

    #[test]
    fn a_list_says_which_backups_are_pinned_and_merged() {
        let merged = BackupSummary {
            backup_type: BackupType::SyntheticFull,
            merged_from: Some(full().id),
            duration_ms: 1_500,
            pinned: true,
            ..full()
        };
        let text = list(std::slice::from_ref(&merged), 0, None);
        assert_eq!(lines(&text)[2], "    pinned; merged from 20261121T010502Z-1a2b3c4d in 1.5 s");
        assert!(lines(&text)[1].contains("2026-11-21 01:05     -  123 GiB"), "{text}");
        let details = details(&merged);
        assert!(
            details.contains("\nflags         pinned, merged from 20261121T010502Z-1a2b3c4d in 1.5 s\n"),
            "{details}"
        );
        assert!(details.contains("\nstopped       2026-11-21 01:09:09 UTC\n"), "{details}");
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
        let width = list(&[widest], 0, None).lines().map(|line| line.chars().count()).max();
        assert!(width <= Some(120), "{width:?}");
    }

    #[test]
    fn a_narrow_terminal_gets_fewer_columns_and_no_line_too_long() {
        let table = |width| list(&[full(), incremental()], 0, Some(width));
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
}
