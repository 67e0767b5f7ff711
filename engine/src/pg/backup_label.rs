//! backup_label and tablespace_map: the two files that the server hands over when a backup stops.
//!
//! backup_label tells recovery where replay begins; a restored cluster without it begins at pg_control's
//! checkpoint and is silently corrupt. tablespace_map tells recovery which links to make in `pg_tblspc`, and it
//! *overrides* links that are there: a restore that moves a tablespace must change both.
//!
//! Both are stored as they came; they are parsed to learn what they say and to refuse what recovery would refuse,
//! when the backup is taken and not on the day it is needed. The parser is stricter than the server's: each
//! line must be there, in order, ended by LF alone. A label text with a line break in it therefore is refused.
//!
//! Paths in tablespace_map are bytes. Since 14 a backslash quotes LF, CR and itself. In 13 it quotes only LF and
//! CR: a backslash before anything else is part of the path, and a path that ends with one cannot be written.
//!
//! PostgreSQL: `src/backend/access/transam/xlogbackup.c`, `build_backup_content`;
//! `src/backend/access/transam/xlogrecovery.c`, `read_backup_label`, `read_tablespace_map` (`xlog.c` up to 14).

use std::collections::BTreeMap;

use super::bytes::canonical_decimal;
use super::{Lsn, MajorVersion, TablespaceOid, TimelineId, WalSegmentName, WalSegmentSize};
use crate::error::{Error, ErrorKind, Result};

/// Where a backup came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackupOrigin {
    /// A server that accepts changes; WAL holds a record of the backup's end.
    Primary,
    /// A server in recovery; pg_control says where the backup ends.
    Standby,
}

/// What made the label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackupMethod {
    /// An online backup: recovery must reach its end before the cluster is consistent.
    Streamed,
    /// pg_rewind.
    PgRewind,
}

/// The parent of one of PostgreSQL's own incremental backups, which is no data directory by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IncrementalFrom {
    /// Where the parent began.
    pub lsn: Lsn,
    /// On which timeline.
    pub timeline: TimelineId,
}

/// What a backup_label says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins: the redo position of the backup's checkpoint.
    pub start_lsn: Lsn,
    /// The WAL file that holds that position.
    pub wal_file_name: String,
    /// Where the checkpoint's record is.
    pub checkpoint_lsn: Lsn,
    /// What made the label.
    pub method: BackupMethod,
    /// Where the backup came from.
    pub origin: BackupOrigin,
    /// When it began, as the server wrote it in its log's time zone.
    pub start_time: String,
    /// The text given to the function that started it; what is not UTF-8 shows as U+FFFD.
    pub label: String,
    /// The timeline it began on.
    pub start_timeline: TimelineId,
    /// Set in PostgreSQL's own incremental backups only.
    pub incremental_from: Option<IncrementalFrom>,
}

impl BackupLabel {
    /// Reads the contents of a backup_label.
    ///
    /// # Errors
    /// Corrupt, with the line: something is missing, out of order, or contradicts something else.
    pub fn parse(bytes: &[u8]) -> Result<BackupLabel> {
        let mut lines = Lines { rest: bytes, number: 0 };
        let (start_lsn, wal_file_name) = lines.next("START WAL LOCATION: ", start_wal_location)?;
        let label = BackupLabel {
            start_lsn,
            wal_file_name,
            checkpoint_lsn: lines.next("CHECKPOINT LOCATION: ", |text| text.parse().ok())?,
            method: lines.next("BACKUP METHOD: ", method)?,
            origin: lines.next("BACKUP FROM: ", origin)?,
            start_time: lines.next("START TIME: ", |text| Some(text.to_owned()))?,
            label: lines.next("LABEL: ", |text| Some(text.to_owned()))?,
            start_timeline: lines.next("START TIMELINE: ", timeline)?,
            incremental_from: if lines.rest.is_empty() { None } else { Some(lines.incremental_from()?) },
        };
        if !lines.rest.is_empty() {
            return Err(lines.error("nothing more was expected"));
        }
        label.check_timeline()?;
        Ok(label)
    }

    /// The WAL segment with which recovery begins, checked against the file name in the label.
    ///
    /// # Errors
    /// Corrupt: the name is not that of the start LSN under this segment size.
    pub fn start_segment(&self, size: WalSegmentSize) -> Result<WalSegmentName> {
        let expected = WalSegmentName { timeline: self.start_timeline, segment: size.segment_of(self.start_lsn) };
        if self.wal_file_name != expected.file_name(size) {
            let (lsn, name, right) = (self.start_lsn, &self.wal_file_name, expected.file_name(size));
            let what = format!("backup_label says that {lsn} is in WAL file {name}, but that position is in {right}");
            return Err(Error::corrupt("backup_label line 1", what));
        }
        Ok(expected)
    }

    fn check_timeline(&self) -> Result<()> {
        let timeline = format!("{:08X}", self.start_timeline.as_u32());
        if !self.wal_file_name.starts_with(&timeline) {
            let what = format!(
                "backup_label says timeline {}, but its WAL file is {}",
                self.start_timeline, self.wal_file_name
            );
            return Err(Error::corrupt("backup_label line 7", what));
        }
        Ok(())
    }
}

struct Lines<'a> {
    rest: &'a [u8],
    number: usize,
}

impl Lines<'_> {
    /// The value of the next line, which must begin with `key` and end with LF.
    fn next<T>(&mut self, key: &str, convert: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.number += 1;
        let unexpected = || self.error(&format!("expected {key:?}, a value and a line feed"));
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or_else(unexpected)?;
        let (line, rest) = (&self.rest[..end], &self.rest[end + 1..]);
        let value = line.strip_prefix(key.as_bytes()).filter(|value| !value.contains(&b'\r')).ok_or_else(unexpected)?;
        let value = convert(&String::from_utf8_lossy(value)).ok_or_else(unexpected)?;
        self.rest = rest;
        Ok(value)
    }

    fn incremental_from(&mut self) -> Result<IncrementalFrom> {
        let lsn = self.next("INCREMENTAL FROM LSN: ", |text| text.parse().ok())?;
        Ok(IncrementalFrom { lsn, timeline: self.next("INCREMENTAL FROM TLI: ", timeline)? })
    }

    fn error(&self, expectation: &str) -> Error {
        let line = self.rest.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let shown = String::from_utf8_lossy(&line[..line.len().min(100)]);
        let what = format!("backup_label is damaged: {expectation}, but there is {shown:?}");
        Error::corrupt(format!("backup_label line {}", self.number), what)
    }
}

fn start_wal_location(text: &str) -> Option<(Lsn, String)> {
    let (lsn, name) = text.strip_suffix(')')?.split_once(" (file ")?;
    let is_wal_file = name.len() == 24 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    is_wal_file.then_some((lsn.parse().ok()?, name.to_owned()))
}

fn method(text: &str) -> Option<BackupMethod> {
    match text {
        "streamed" => Some(BackupMethod::Streamed),
        "pg_rewind" => Some(BackupMethod::PgRewind),
        _ => None,
    }
}

fn origin(text: &str) -> Option<BackupOrigin> {
    match text {
        // 13 says "master".
        "primary" | "master" => Some(BackupOrigin::Primary),
        "standby" => Some(BackupOrigin::Standby),
        _ => None,
    }
}

fn timeline(text: &str) -> Option<TimelineId> {
    canonical_decimal(text.as_bytes()).map(TimelineId::new)
}

/// Where each tablespace outside the data directory is: what a tablespace_map says.
///
/// In-place tablespaces are directories in `pg_tblspc` and are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TablespaceMap {
    locations: BTreeMap<TablespaceOid, Vec<u8>>,
}

const MAP: &str = "tablespace_map";

impl TablespaceMap {
    /// Reads the contents of a tablespace_map that a server of this major version wrote.
    ///
    /// # Errors
    /// Corrupt, with the line: not an OID, a space and a path; a path twice; no line feed at the end.
    pub fn parse(bytes: &[u8], major: MajorVersion) -> Result<TablespaceMap> {
        let mut map = TablespaceMap::default();
        for (index, line) in unescaped_lines(bytes, Escaping::of(major))?.into_iter().enumerate() {
            let (oid, location) = entry(&line).ok_or_else(|| bad_line(index, "not an OID, a space and a path"))?;
            if map.locations.insert(oid, location.to_vec()).is_some() {
                return Err(bad_line(index, &format!("tablespace {oid} was there before")));
            }
        }
        Ok(map)
    }

    /// The file's contents as a server of this major version reads them.
    ///
    /// # Errors
    /// Unsupported: the path cannot be written for 13 (see the module's description).
    pub fn encode(&self, major: MajorVersion) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (oid, location) in &self.locations {
            let escaped = escape(location, Escaping::of(major)).ok_or_else(|| unwritable(*oid, location))?;
            bytes.extend_from_slice(format!("{oid} ").as_bytes());
            bytes.extend_from_slice(&escaped);
            bytes.push(b'\n');
        }
        Ok(bytes)
    }

    /// The tablespaces and where they are, in the order of their OIDs.
    pub fn iter(&self) -> impl Iterator<Item = (TablespaceOid, &[u8])> {
        self.locations.iter().map(|(oid, location)| (*oid, location.as_slice()))
    }

    /// Where that tablespace is.
    pub fn location(&self, oid: TablespaceOid) -> Option<&[u8]> {
        self.locations.get(&oid).map(Vec::as_slice)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.locations.is_empty()
    }

    /// Adds a tablespace, or moves one.
    ///
    /// # Errors
    /// Invalid: an empty path, or one with a zero byte.
    pub fn set_location(&mut self, oid: TablespaceOid, location: Vec<u8>) -> Result<()> {
        if location.is_empty() || location.contains(&0) {
            let shown = String::from_utf8_lossy(&location);
            return Err(Error::invalid(format!("{shown:?} cannot be the place of tablespace {oid}")));
        }
        self.locations.insert(oid, location);
        Ok(())
    }

    /// The same tablespaces with every place given by `place`, which sees the OID and the old place.
    ///
    /// # Errors
    /// Those of `place`, and those of [`TablespaceMap::set_location`].
    pub fn remap(&self, mut place: impl FnMut(TablespaceOid, &[u8]) -> Result<Vec<u8>>) -> Result<TablespaceMap> {
        let mut map = TablespaceMap::default();
        for (oid, location) in self.iter() {
            map.set_location(oid, place(oid, location)?)?;
        }
        Ok(map)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Escaping {
    /// 13: a backslash quotes LF and CR only.
    LineBreaks,
    /// 14 and later: it quotes itself, too.
    LineBreaksAndBackslash,
}

impl Escaping {
    fn of(major: MajorVersion) -> Escaping {
        if major.as_u32() < 14 { Escaping::LineBreaks } else { Escaping::LineBreaksAndBackslash }
    }

    fn quotes(self, byte: u8) -> bool {
        matches!(byte, b'\n' | b'\r') || byte == b'\\' && self == Escaping::LineBreaksAndBackslash
    }
}

/// The lines without their quoting. A quote before a byte that needs none stands for itself in 13 and for
/// nothing later.
fn unescaped_lines(bytes: &[u8], escaping: Escaping) -> Result<Vec<Vec<u8>>> {
    let mut lines = Vec::new();
    let mut line = Vec::new();
    let mut rest = bytes.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            b'\n' => lines.push(std::mem::take(&mut line)),
            b'\r' => return Err(bad_line(lines.len(), "a carriage return that is not quoted")),
            b'\\' => match rest.peek().copied() {
                Some(next) if escaping.quotes(next) => {
                    line.push(next);
                    rest.next();
                }
                _ if escaping == Escaping::LineBreaks => line.push(byte),
                _ => return Err(bad_line(lines.len(), "a backslash that quotes nothing")),
            },
            _ => line.push(byte),
        }
    }
    if line.is_empty() { Ok(lines) } else { Err(bad_line(lines.len(), "no line feed at its end")) }
}

fn escape(location: &[u8], escaping: Escaping) -> Option<Vec<u8>> {
    let mut escaped = Vec::with_capacity(location.len());
    let mut after_backslash = false;
    for &byte in location {
        let quoted = escaping.quotes(byte);
        if quoted && after_backslash && escaping == Escaping::LineBreaks {
            return None;
        }
        if quoted {
            escaped.push(b'\\');
        }
        escaped.push(byte);
        after_backslash = byte == b'\\';
    }
    (!after_backslash || escaping == Escaping::LineBreaksAndBackslash).then_some(escaped)
}

fn entry(line: &[u8]) -> Option<(TablespaceOid, &[u8])> {
    let space = line.iter().position(|&byte| byte == b' ')?;
    let (oid, location) = (canonical_decimal(&line[..space])?, &line[space + 1..]);
    (!location.is_empty() && !location.contains(&0)).then_some((TablespaceOid::new(oid), location))
}

fn bad_line(index: usize, what: &str) -> Error {
    Error::corrupt(format!("{MAP} line {}", index + 1), format!("tablespace_map is damaged: {what}"))
}

fn unwritable(oid: TablespaceOid, location: &[u8]) -> Error {
    let shown = String::from_utf8_lossy(location);
    let what = format!("PostgreSQL 13 cannot read {shown:?} from a tablespace_map, the place of tablespace {oid}");
    Error::new(ErrorKind::Unsupported, what).hint("choose a path without a backslash")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LABEL_13: &[u8] = include_bytes!("../../../testdata/artefacts/13/backup_label");
    const LABEL_18: &[u8] = include_bytes!("../../../testdata/artefacts/18/backup_label");
    const MAPS: [(u32, &[u8]); 6] = [
        (13, include_bytes!("../../../testdata/artefacts/13/tablespace_map")),
        (14, include_bytes!("../../../testdata/artefacts/14/tablespace_map")),
        (15, include_bytes!("../../../testdata/artefacts/15/tablespace_map")),
        (16, include_bytes!("../../../testdata/artefacts/16/tablespace_map")),
        (17, include_bytes!("../../../testdata/artefacts/17/tablespace_map")),
        (18, include_bytes!("../../../testdata/artefacts/18/tablespace_map")),
    ];

    fn major(number: u32) -> MajorVersion {
        MajorVersion::new(number).unwrap()
    }

    fn text_18() -> String {
        String::from_utf8(LABEL_18.to_vec()).unwrap()
    }

    #[test]
    fn a_real_label_is_read_field_by_field() {
        let label = BackupLabel::parse(LABEL_18).unwrap();
        let expected = BackupLabel {
            start_lsn: "0/C00028".parse().unwrap(),
            wal_file_name: "00000001000000000000000C".into(),
            checkpoint_lsn: "0/C00080".parse().unwrap(),
            method: BackupMethod::Streamed,
            origin: BackupOrigin::Primary,
            start_time: "2026-11-22 16:34:09 UTC".into(),
            label: "nightly of 18".into(),
            start_timeline: TimelineId::new(1),
            incremental_from: None,
        };
        assert_eq!(label, expected);
        let segment = label.start_segment(WalSegmentSize::new(1 << 20).unwrap()).unwrap();
        assert_eq!(segment.file_name(WalSegmentSize::new(1 << 20).unwrap()), label.wal_file_name);
    }

    #[test]
    fn the_masters_of_13_are_primaries() {
        assert!(LABEL_13.windows(6).any(|window| window == b"master"));
        assert_eq!(BackupLabel::parse(LABEL_13).unwrap().origin, BackupOrigin::Primary);
    }

    #[test]
    fn a_label_that_was_edited_on_windows_or_cut_is_refused() {
        assert!(BackupLabel::parse(text_18().replace('\n', "\r\n").as_bytes()).is_err());
        for len in 0..LABEL_18.len() {
            assert!(BackupLabel::parse(&LABEL_18[..len]).is_err(), "{len} bytes");
        }
        let longer = text_18() + "MORE: 1\n";
        assert!(BackupLabel::parse(longer.as_bytes()).is_err());
    }

    #[test]
    fn the_error_says_which_line_is_wrong_and_what_it_holds() {
        let damaged = text_18().replace("BACKUP FROM: primary", "BACKUP FROM: nowhere");
        assert_eq!(
            BackupLabel::parse(damaged.as_bytes()).unwrap_err().to_string(),
            "backup_label is damaged: expected \"BACKUP FROM: \", a value and a line feed, \
             but there is \"BACKUP FROM: nowhere\" (backup_label line 4)"
        );
    }

    #[test]
    fn timeline_and_wal_file_must_agree_in_hexadecimal() {
        let on_16 = text_18().replace("START TIMELINE: 1", "START TIMELINE: 16");
        assert!(BackupLabel::parse(on_16.as_bytes()).is_err());
        let agreed = on_16.replace("(file 00000001", "(file 00000010");
        assert_eq!(BackupLabel::parse(agreed.as_bytes()).unwrap().start_timeline, TimelineId::new(16));
    }

    #[test]
    fn a_wal_file_of_another_segment_size_is_refused() {
        let label = BackupLabel::parse(LABEL_18).unwrap();
        let error = label.start_segment(WalSegmentSize::DEFAULT).unwrap_err();
        assert!(error.to_string().contains("but that position is in 000000010000000000000000"), "{error}");
    }

    #[test]
    fn postgresqls_own_incremental_backups_are_recognised() {
        let text = text_18() + "INCREMENTAL FROM LSN: 0/2000028\nINCREMENTAL FROM TLI: 1\n";
        let parent = IncrementalFrom { lsn: Lsn::new(0x200_0028), timeline: TimelineId::new(1) };
        assert_eq!(BackupLabel::parse(text.as_bytes()).unwrap().incremental_from, Some(parent));
        let half = text_18() + "INCREMENTAL FROM LSN: 0/2000028\n";
        assert!(BackupLabel::parse(half.as_bytes()).is_err());
    }

    #[test]
    fn the_odd_paths_of_every_major_are_read_and_written_back() {
        for (number, bytes) in MAPS {
            let map = TablespaceMap::parse(bytes, major(number)).unwrap();
            let mut paths: Vec<_> = map.iter().map(|(_, path)| String::from_utf8_lossy(path).into_owned()).collect();
            paths.sort();
            let odd = format!("/srv/pg/{number} line\nbreak back\\slash\rreturn");
            assert_eq!(paths, [odd, format!("/srv/pg/plain{number}")]);
            let again = TablespaceMap::parse(&map.encode(major(number)).unwrap(), major(number)).unwrap();
            assert_eq!(again, map);
        }
    }

    #[test]
    fn maps_with_damaged_lines_are_refused() {
        let damaged: [&[u8]; 11] = [
            b"16384",
            b"16384 /a",
            b"16384 /a\r\n",
            b"16384 \n",
            b"16384\n",
            b"\n",
            b" /a\n",
            b"016384 /a\n",
            b"16384 /a\\b\n",
            b"16384 /a\n16384 /b\n",
            b"16384 /a\0b\n",
        ];
        for bytes in damaged {
            let error = TablespaceMap::parse(bytes, major(15)).unwrap_err();
            assert!(error.place().unwrap().starts_with("tablespace_map line"), "{error}");
        }
        assert!(TablespaceMap::parse(b"", major(15)).unwrap().is_empty());
    }

    #[test]
    fn a_path_that_13_cannot_read_back_is_not_written_for_it() {
        for path in [&b"/a\\"[..], b"/a\\\nb"] {
            let mut map = TablespaceMap::default();
            map.set_location(TablespaceOid::new(1), path.to_vec()).unwrap();
            assert_eq!(map.encode(major(13)).unwrap_err().kind(), ErrorKind::Unsupported);
            assert!(map.encode(major(14)).is_ok());
        }
    }

    #[test]
    fn remapping_sees_every_tablespace_and_refuses_an_empty_place() {
        let map = TablespaceMap::parse(b"16384 /a\n16385  b=c\n", major(15)).unwrap();
        let moved = map.remap(|_, old| Ok([b"/new/", old].concat())).unwrap();
        assert_eq!(moved.encode(major(15)).unwrap(), b"16384 /new//a\n16385 /new/ b=c\n");
        assert!(map.remap(|_, _| Ok(Vec::new())).is_err());
    }

    proptest! {
        #[test]
        fn any_path_reads_back_as_it_was_written(path in proptest::collection::vec(1u8.., 1..30), number in 13u32..=19) {
            let mut map = TablespaceMap::default();
            map.set_location(TablespaceOid::new(7), path).unwrap();
            match map.encode(major(number)) {
                Ok(bytes) => prop_assert_eq!(TablespaceMap::parse(&bytes, major(number)).unwrap(), map),
                Err(error) => prop_assert_eq!((error.kind(), number), (ErrorKind::Unsupported, 13)),
            }
        }

        #[test]
        fn no_bytes_make_the_parsers_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            at in 0usize..211,
            number in 13u32..=19,
        ) {
            let _ = TablespaceMap::parse(&bytes, major(number));
            let _ = BackupLabel::parse(&bytes);
            let _ = BackupLabel::parse(&[&LABEL_18[..at], &bytes].concat());
        }
    }
}
