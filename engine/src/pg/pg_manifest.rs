//! PostgreSQL's backup_manifest: the list of a backup's files that pg_verifybackup and pg_combinebackup read.
//!
//! It is JSON, but only in the form the server writes: pg_verifybackup takes the manifest's own SHA-256 over all
//! bytes up to the last line. So the writer makes exactly the server's bytes, one file a line, and streams them:
//! a cluster of a million files needs no memory for it.
//!
//! ```text
//! { "PostgreSQL-Backup-Manifest-Version": 2,          1 up to PostgreSQL 16, without the next line
//! "System-Identifier": 7711031876090026729,
//! "Files": [
//! { "Path": "base/5/2619", "Size": 8192, "Last-Modified": "2026-11-22 16:22:30 GMT", "Checksum-Algorithm": ...
//! ],
//! "WAL-Ranges": [                                     newest timeline first
//! { "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000100" }
//! ],
//! "Manifest-Checksum": "..."}
//! ```
//!
//! A path that is not UTF-8 is written in hexadecimal as `Encoded-Path`. A CRC-32C is printed as its four bytes
//! lie in memory, lowest first: `e27b4e99` becomes `994e7be2`. WAL files and the manifest itself are not listed.
//!
//! PostgreSQL: `src/backend/backup/backup_manifest.c`, `AddFileToBackupManifest`, `AddWALInfoToBackupManifest`;
//! `src/common/parse_manifest.c`, `json_parse_manifest`, `verify_manifest_checksum`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{self, Write};

use jiff::Timestamp;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Lsn, MajorVersion, SystemIdentifier, TimelineId};
use crate::error::{Error, ErrorKind, Result};

const PLACE: &str = "backup_manifest";

/// What a manifest says of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgManifestFile {
    /// Relative to the data directory, tablespaces as `pg_tblspc/<oid>/...`; any bytes.
    pub path: Vec<u8>,
    /// In bytes.
    pub size: u64,
    /// To the second.
    pub last_modified: Timestamp,
    /// Of the contents, if one was asked for.
    pub checksum: Option<PgFileChecksum>,
}

/// The checksum of a file's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PgFileChecksum {
    /// CRC-32C, the server's default.
    Crc32c(u32),
    /// SHA-224, 256, 384 or 512, known by its length.
    Sha2(Vec<u8>),
}

impl PgFileChecksum {
    fn algorithm(&self) -> String {
        match self {
            PgFileChecksum::Crc32c(_) => "CRC32C".to_owned(),
            PgFileChecksum::Sha2(digest) => format!("SHA{}", digest.len() * 8),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            PgFileChecksum::Crc32c(crc) => crc.to_le_bytes().to_vec(),
            PgFileChecksum::Sha2(digest) => digest.clone(),
        }
    }

    fn from_parts(algorithm: &str, bytes: Vec<u8>) -> Option<PgFileChecksum> {
        let len = match algorithm.to_ascii_uppercase().as_str() {
            "CRC32C" => return bytes.try_into().ok().map(|bytes| PgFileChecksum::Crc32c(u32::from_le_bytes(bytes))),
            "SHA224" => 28,
            "SHA256" => 32,
            "SHA384" => 48,
            "SHA512" => 64,
            _ => return None,
        };
        (bytes.len() == len).then_some(PgFileChecksum::Sha2(bytes))
    }
}

/// A part of the log that a restore must replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalRange {
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Its first position.
    pub start: Lsn,
    /// The position after its last.
    pub end: Lsn,
}

/// Writes a manifest as the server would, file by file.
#[derive(Debug)]
pub struct PgManifestWriter<W: Write> {
    out: W,
    hash: Sha256,
    line: String,
    file_count: u64,
}

impl<W: Write> PgManifestWriter<W> {
    /// Begins the manifest of a cluster of this major version.
    ///
    /// # Errors
    /// Those of `out`, here and in the other methods.
    pub fn begin(out: W, major: MajorVersion, system_identifier: SystemIdentifier) -> io::Result<Self> {
        let mut writer = Self { out, hash: Sha256::new(), line: String::new(), file_count: 0 };
        writer.line.push_str("{ \"PostgreSQL-Backup-Manifest-Version\": ");
        if major.as_u32() < 17 {
            writer.line.push_str("1,\n");
        } else {
            writer.line.push_str(&format!("2,\n\"System-Identifier\": {system_identifier},\n"));
        }
        writer.line.push_str("\"Files\": [");
        writer.put_line()?;
        Ok(writer)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Those of the writer below.
    pub fn add_file(&mut self, file: &PgManifestFile) -> io::Result<()> {
        self.line.push_str(if self.file_count == 0 { "\n" } else { ",\n" });
        self.file_count += 1;
        match std::str::from_utf8(&file.path) {
            Ok(path) => self.line.push_str(&format!("{{ \"Path\": {}", serde_json::to_string(path)?)),
            Err(_) => self.line.push_str(&format!("{{ \"Encoded-Path\": \"{}\"", hex(&file.path))),
        }
        let modified = file.last_modified.strftime("%Y-%m-%d %H:%M:%S GMT");
        self.line.push_str(&format!(", \"Size\": {}, \"Last-Modified\": \"{modified}\"", file.size));
        if let Some(checksum) = &file.checksum {
            let (algorithm, bytes) = (checksum.algorithm(), hex(&checksum.bytes()));
            self.line.push_str(&format!(", \"Checksum-Algorithm\": \"{algorithm}\", \"Checksum\": \"{bytes}\""));
        }
        self.line.push_str(" }");
        self.put_line()
    }

    /// Ends the manifest with the WAL that the backup needs, newest timeline first, and its own checksum.
    ///
    /// # Errors
    /// Those of the writer below.
    pub fn finish(mut self, wal_ranges: &[WalRange]) -> io::Result<W> {
        self.line.push_str("\n],\n\"WAL-Ranges\": [\n");
        for (index, WalRange { timeline, start, end }) in wal_ranges.iter().enumerate() {
            self.line.push_str(if index == 0 { "" } else { ",\n" });
            self.line.push_str(&format!(
                "{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            ));
        }
        self.line.push_str("\n],\n");
        self.put_line()?;
        let checksum = hex(&self.hash.finalize());
        self.out.write_all(format!("\"Manifest-Checksum\": \"{checksum}\"}}\n").as_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn put_line(&mut self) -> io::Result<()> {
        self.hash.update(self.line.as_bytes());
        self.out.write_all(self.line.as_bytes())?;
        self.line.clear();
        Ok(())
    }
}

/// A manifest that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgBackupManifest {
    /// Which cluster was backed up; PostgreSQL 16 and older do not say.
    pub system_identifier: Option<SystemIdentifier>,
    /// The files, in the manifest's order; no path twice.
    pub files: Vec<PgManifestFile>,
    /// The WAL to replay, newest timeline first.
    pub wal_ranges: Vec<WalRange>,
}

impl PgBackupManifest {
    /// Reads a manifest and checks its own checksum. The paths in it are not to be trusted.
    ///
    /// # Errors
    /// Corrupt: a wrong checksum, or not a manifest. Unsupported: a later version.
    pub fn parse(bytes: &[u8]) -> Result<PgBackupManifest> {
        check_own_checksum(bytes)?;
        let version: JsonVersion = from_json(bytes)?;
        if !matches!(version.version, 1 | 2) {
            let what = format!("backup_manifest has version {}; this program knows 1 and 2", version.version);
            return Err(Error::new(ErrorKind::Unsupported, what).at(PLACE));
        }
        let manifest: JsonManifest = from_json(bytes)?;
        if manifest.system_identifier.is_some() != (version.version == 2) {
            return Err(damaged("a version 2 manifest names its cluster, and no other does"));
        }
        let files: Vec<_> = manifest.files.into_iter().map(JsonFile::into_file).collect::<Result<_>>()?;
        check_paths_are_distinct(&files)?;
        Ok(PgBackupManifest {
            system_identifier: manifest.system_identifier.map(SystemIdentifier::new),
            files,
            wal_ranges: manifest.wal_ranges.into_iter().map(JsonWalRange::into_range).collect(),
        })
    }
}

/// All bytes up to the last line are under the SHA-256 in it.
fn check_own_checksum(bytes: &[u8]) -> Result<()> {
    let body_and_last = bytes.strip_suffix(b"\n").ok_or_else(|| damaged("it does not end with a line feed"))?;
    let newline = body_and_last.iter().rposition(|&byte| byte == b'\n');
    let last_line_at = newline.ok_or_else(|| damaged("it has only one line"))? + 1;
    let computed = hex(&Sha256::digest(&bytes[..last_line_at]));
    let last_line = &bytes[last_line_at..];
    if last_line.to_ascii_lowercase() != format!("\"manifest-checksum\": \"{computed}\"}}\n").as_bytes() {
        let shown = String::from_utf8_lossy(&last_line[..last_line.len().min(100)]);
        return Err(damaged(&format!("its contents have SHA-256 {computed}, but its last line is {shown:?}")));
    }
    Ok(())
}

fn check_paths_are_distinct(files: &[PgManifestFile]) -> Result<()> {
    let mut seen = HashSet::with_capacity(files.len());
    match files.iter().find(|file| !seen.insert(&file.path)) {
        Some(twice) => Err(damaged(&format!("{:?} is there twice", String::from_utf8_lossy(&twice.path)))),
        None => Ok(()),
    }
}

#[derive(Deserialize)]
struct JsonVersion {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct JsonManifest {
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    files: Vec<JsonFile>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<JsonWalRange>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    last_modified: String,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

impl JsonFile {
    fn into_file(self) -> Result<PgManifestFile> {
        let path = match (self.path, self.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(encoded)) => unhex(&encoded).ok_or_else(|| damaged(&format!("{encoded:?} is no path")))?,
            _ => return Err(damaged("a file needs either a path or an encoded path")),
        };
        let damaged = |what| damaged(&format!("{what} of {:?} makes no sense", String::from_utf8_lossy(&path)));
        let last_modified = parse_time(&self.last_modified).ok_or_else(|| damaged("the modification time"))?;
        let checksum = match (self.algorithm, self.checksum) {
            (None, None) => None,
            (Some(algorithm), Some(digits)) => {
                let checksum = unhex(&digits).and_then(|bytes| PgFileChecksum::from_parts(&algorithm, bytes));
                Some(checksum.ok_or_else(|| damaged("the checksum"))?)
            }
            _ => return Err(damaged("half a checksum")),
        };
        Ok(PgManifestFile { path, size: self.size, last_modified, checksum })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonWalRange {
    #[serde(rename = "Timeline")]
    timeline: TimelineId,
    #[serde(rename = "Start-LSN")]
    start: Lsn,
    #[serde(rename = "End-LSN")]
    end: Lsn,
}

impl JsonWalRange {
    fn into_range(self) -> WalRange {
        WalRange { timeline: self.timeline, start: self.start, end: self.end }
    }
}

fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| damaged("it is not the JSON of a manifest").because(error))
}

fn parse_time(text: &str) -> Option<Timestamp> {
    format!("{}Z", text.strip_suffix(" GMT")?).parse().ok()
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

fn damaged(what: &str) -> Error {
    Error::corrupt(PLACE, format!("backup_manifest is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn major(number: u32) -> MajorVersion {
        MajorVersion::new(number).unwrap()
    }

    fn written(number: u32, files: &[PgManifestFile], wal_ranges: &[WalRange]) -> Vec<u8> {
        let id = SystemIdentifier::new(7_711_031_876_090_026_729);
        let mut writer = PgManifestWriter::begin(Vec::new(), major(number), id).unwrap();
        for file in files {
            writer.add_file(file).unwrap();
        }
        writer.finish(wal_ranges).unwrap()
    }

    fn file(path: &[u8], checksum: Option<PgFileChecksum>) -> PgManifestFile {
        let last_modified = "2026-11-22T06:02:03Z".parse().unwrap();
        PgManifestFile { path: path.to_vec(), size: 8192, last_modified, checksum }
    }

    fn range() -> WalRange {
        WalRange { timeline: TimelineId::new(1), start: Lsn::new(0x200_0028), end: Lsn::new(0x1_0000_0100) }
    }

    #[test]
    fn the_bytes_are_those_the_server_would_write() {
        let files = [file(b"a\"b", Some(PgFileChecksum::Crc32c(0xE27B_4E99))), file(b"\xFFz", None)];
        let expected = r#"{ "PostgreSQL-Backup-Manifest-Version": 2,
"System-Identifier": 7711031876090026729,
"Files": [
{ "Path": "a\"b", "Size": 8192, "Last-Modified": "2026-11-22 06:02:03 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "994e7be2" },
{ "Encoded-Path": "ff7a", "Size": 8192, "Last-Modified": "2026-11-22 06:02:03 GMT" }
],
"WAL-Ranges": [
{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "1/100" }
],
"Manifest-Checksum": "#;
        let bytes = written(17, &files, &[range()]);
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(&text[..expected.len()], expected);
        assert_eq!(text.len(), expected.len() + 64 + 4);
    }

    #[test]
    fn manifests_before_17_do_not_name_the_cluster() {
        let bytes = written(16, &[], &[range()]);
        assert!(
            bytes.starts_with(b"{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n],\n\"WAL-Ranges\": [\n{")
        );
        assert_eq!(PgBackupManifest::parse(&bytes).unwrap().system_identifier, None);
    }

    #[test]
    fn any_flipped_byte_is_found() {
        let bytes = written(18, &[file(b"base/1/2", Some(PgFileChecksum::Crc32c(7)))], &[range()]);
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(PgBackupManifest::parse(&bytes).unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
        }
    }

    fn with_checksum(body: &str) -> Vec<u8> {
        format!("{body}\n\"Manifest-Checksum\": \"{}\"}}\n", hex(&Sha256::digest(format!("{body}\n")))).into_bytes()
    }

    #[test]
    fn a_later_version_is_unsupported_and_not_corrupt() {
        let body = r#"{ "PostgreSQL-Backup-Manifest-Version": 3, "News": {},"#;
        assert_eq!(PgBackupManifest::parse(&with_checksum(body)).unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_path_twice_is_refused() {
        let error = PgBackupManifest::parse(&written(18, &[file(b"x", None), file(b"x", None)], &[])).unwrap_err();
        assert_eq!(error.to_string(), "backup_manifest is damaged: \"x\" is there twice (backup_manifest)");
    }

    #[test]
    fn entries_that_contradict_themselves_are_refused_under_a_good_checksum() {
        let entries = [
            r#""Path": "a", "Encoded-Path": "61", "Size": 1, "Last-Modified": "2026-11-22 06:02:03 GMT""#,
            r#""Size": 1, "Last-Modified": "2026-11-22 06:02:03 GMT""#,
            r#""Path": "a", "Size": -1, "Last-Modified": "2026-11-22 06:02:03 GMT""#,
            r#""Path": "a", "Size": 1, "Last-Modified": "2026-11-22 06:02:03 CET""#,
            r#""Encoded-Path": "6", "Size": 1, "Last-Modified": "2026-11-22 06:02:03 GMT""#,
            r#""Path": "a", "Size": 1, "Last-Modified": "2026-11-22 06:02:03 GMT", "Checksum": "00""#,
            r#""Path": "a", "Size": 1, "Last-Modified": "2026-11-22 06:02:03 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00""#,
        ];
        for entry in entries {
            let body = format!(
                "{{ \"PostgreSQL-Backup-Manifest-Version\": 1, \"Files\": [ {{ {entry} }} ], \"WAL-Ranges\": [],"
            );
            assert_eq!(
                PgBackupManifest::parse(&with_checksum(&body)).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "{entry}"
            );
        }
    }

    fn any_checksum() -> impl Strategy<Value = Option<PgFileChecksum>> {
        let sha = prop_oneof![Just(28usize), Just(32), Just(48), Just(64)];
        prop_oneof![
            Just(None),
            any::<u32>().prop_map(|crc| Some(PgFileChecksum::Crc32c(crc))),
            sha.prop_flat_map(|len| proptest::collection::vec(any::<u8>(), len))
                .prop_map(|digest| Some(PgFileChecksum::Sha2(digest))),
        ]
    }

    fn any_file() -> impl Strategy<Value = PgManifestFile> {
        let path = prop_oneof![proptest::collection::vec(1u8.., 1..20), "\\PC{1,20}".prop_map(String::into_bytes)];
        (path, any::<u64>(), 0i64..253_402_207_200, any_checksum()).prop_map(|(path, size, seconds, checksum)| {
            PgManifestFile { path, size, last_modified: Timestamp::from_second(seconds).unwrap(), checksum }
        })
    }

    proptest! {
        #[test]
        fn a_manifest_reads_back_as_it_was_written(
            mut files in proptest::collection::vec(any_file(), 0..20),
            ranges in proptest::collection::vec((1u32.., any::<u64>(), any::<u64>()), 0..3),
            number in 13u32..=19,
        ) {
            files.sort_by(|a, b| a.path.cmp(&b.path));
            files.dedup_by(|a, b| a.path == b.path);
            let wal_ranges: Vec<_> = ranges
                .into_iter()
                .map(|(timeline, start, end)| (TimelineId::new(timeline), Lsn::new(start), Lsn::new(end)))
                .map(|(timeline, start, end)| WalRange { timeline, start, end })
                .collect();
            let read = PgBackupManifest::parse(&written(number, &files, &wal_ranges)).unwrap();
            prop_assert_eq!((read.files, read.wal_ranges), (files, wal_ranges));
            prop_assert_eq!(read.system_identifier.is_some(), number >= 17);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), body in ".{0,100}") {
            let _ = PgBackupManifest::parse(&bytes);
            let _ = PgBackupManifest::parse(&with_checksum(&body));
            let body = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 1, {body}");
            let _ = PgBackupManifest::parse(&with_checksum(&body));
        }
    }
}
