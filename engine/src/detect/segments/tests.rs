//! Archives of segments that real servers wrote, kept in every way there is.

use std::io::Write;

use super::*;
use crate::detect::WalChanges;
use crate::pg::{ControlFile, WalLevel, WalPageHeader};

const SEGMENT: usize = 1 << 20;

macro_rules! artefact {
    ($name:literal) => {
        include_bytes!(concat!("../../../../testdata/artefacts/15/", $name)) as &[u8]
    };
}

/// A segment of PostgreSQL 15, and where it begins; records, then a switch.
fn segment() -> (Vec<u8>, WalSource, Lsn) {
    let control = ControlFile::parse(artefact!("pg_control")).unwrap();
    let mut bytes = artefact!("wal_segment_head").to_vec();
    let begin = WalPageHeader::parse(&bytes).unwrap().address;
    bytes.resize(SEGMENT, 0);
    let source = WalSource {
        major: control.major_version(),
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
        block_size: control.wal_block_size,
        history: TimelineHistory::without_ancestors(control.timeline),
    };
    (bytes, source, begin)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ::zstd::bulk::compress(bytes, 1).unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// How many records an archive with these files (the suffixes of their names) gives.
fn records(files: &[(&str, Vec<u8>)]) -> Result<usize> {
    let (_, source, begin) = segment();
    let directory = tempfile::tempdir().unwrap();
    let name = source.history.segment_name(source.segment_size.segment_of(begin), source.segment_size);
    for (suffix, bytes) in files {
        let path = directory.path().join(format!("{}{suffix}", name.file_name(source.segment_size)));
        fs::write(path, bytes).unwrap();
    }
    let archive = WalFiles::list(&[directory.path()], source.segment_size).unwrap();
    let end = begin.checked_add(SEGMENT as u64).unwrap();
    assert_eq!(archive.first_missing(&source.history, begin, end).is_some(), files.is_empty());
    let mut count = 0;
    archive.walk(source, begin, end, |_| {
        count += 1;
        Ok(())
    })?;
    Ok(count)
}

#[test]
fn a_segment_is_read_however_the_archive_keeps_it() {
    let (bytes, ..) = segment();
    let expected = records(&[("", bytes.clone())]).unwrap();
    assert!(expected >= 4);
    let cut = bytes[..40_960].to_vec();
    for files in [
        vec![(".gz", gzip(&bytes))],
        vec![(".zst", zstd(&bytes))],
        vec![(".lz4", lz4(&bytes))],
        // Some archives keep the bare name.
        vec![("", gzip(&bytes))],
        vec![("", zstd(&bytes))],
        vec![(".partial", bytes.clone())],
        vec![(".partial", cut.clone())],
        vec![(".gz.partial", gzip(&cut))],
        vec![(".partial.lz4", lz4(&cut))],
        // A gzip file may have several members.
        vec![(".gz", [gzip(&bytes[..5000]), gzip(&bytes[5000..])].concat())],
        // The whole one is taken, not the partial one.
        vec![(".partial", vec![0; SEGMENT]), (".gz", gzip(&bytes))],
        vec![(".partial", vec![0; SEGMENT]), ("", bytes.clone())],
    ] {
        let names: Vec<_> = files.iter().map(|(suffix, _)| *suffix).collect();
        assert_eq!(records(&files).unwrap(), expected, "{names:?}");
    }
}

#[test]
fn a_segment_of_the_wrong_length_or_a_damaged_one_is_an_error_that_names_it() {
    let (bytes, ..) = segment();
    let long = [bytes.clone(), vec![0; 1]].concat();
    let short = bytes[..SEGMENT - 1].to_vec();
    let mut flipped = zstd(&bytes);
    let at = flipped.len() / 2;
    flipped[at] ^= 0x55;
    for (file, expected) in [
        (("", long.clone()), "1048577 bytes or more, not 1048576"),
        (("", short.clone()), "1048575 bytes, not 1048576"),
        ((".gz", gzip(&long)), "1048577 bytes or more, not 1048576"),
        ((".zst", zstd(&short)), "1048575 bytes, not 1048576"),
        ((".lz4", lz4(&short)), "1048575 bytes, not 1048576"),
        ((".lz4", lz4(&[])), "0 bytes, not 1048576"),
        ((".gz", gzip(&bytes)[..2000].to_vec()), "does not decompress"),
        ((".partial", bytes[..9000].to_vec()), "9000 bytes, not 1048576"),
        ((".zst", flipped), ""),
    ] {
        let error = records(std::slice::from_ref(&file)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(expected), "{} {error}", file.0);
    }
}

#[test]
fn a_segment_that_is_not_there_is_named() {
    let error = records(&[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing);
    assert!(error.what().starts_with("the WAL file 0000000100000000000000"), "{error}");
}

#[test]
fn a_file_that_is_gone_is_looked_for_in_the_next_directory() {
    let (bytes, source, begin) = segment();
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let name = source.history.segment_name(source.segment_size.segment_of(begin), source.segment_size);
    let name = name.file_name(source.segment_size);
    fs::write(directories[0].path().join(&name), &bytes).unwrap();
    fs::write(directories[1].path().join(format!("{name}.gz")), gzip(&bytes)).unwrap();
    let files = WalFiles::list(&directories.each_ref().map(tempfile::TempDir::path), source.segment_size).unwrap();
    fs::remove_file(directories[0].path().join(&name)).unwrap();
    let end = begin.checked_add(5000).unwrap();
    files.walk(source.clone(), begin, end, |_| Ok(())).unwrap();
    fs::remove_file(directories[1].path().join(format!("{name}.gz"))).unwrap();
    assert_eq!(files.walk(source, begin, end, |_| Ok(())).unwrap_err().kind(), ErrorKind::Missing);
}

#[test]
fn names_that_are_no_segments_are_passed_over() {
    let size = WalSegmentSize::DEFAULT;
    let name = |suffix: &str| segment_file_name(format!("000000020000000000000003{suffix}").as_bytes(), size);
    let is_partial = |suffix| name(suffix).map(|(_, is_partial)| is_partial);
    assert_eq!(["", ".gz", ".zst", ".lz4"].map(is_partial), [Some(false); 4]);
    assert_eq!([".partial", ".partial.gz", ".gz.partial"].map(is_partial), [Some(true); 3]);
    let others = [".00000028.backup", ".tmp", ".gz.tmp", ".gz.gz", ".partial.partial", ".bz2", "0"];
    assert_eq!(others.map(is_partial), [None; 7]);
}

#[test]
fn histories_are_found_compressed_or_not_and_a_timeline_without_one_has_no_ancestors() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("00000004.history.gz"), gzip(artefact!("00000004.history"))).unwrap();
    fs::write(directory.path().join("00000002.history"), "1\t0/1100000\tno recovery target specified\n").unwrap();
    let files = WalFiles::list(&[directory.path()], WalSegmentSize::DEFAULT).unwrap();
    let spans = |timeline| files.history(TimelineId::new(timeline)).unwrap().spans().len();
    assert_eq!([1, 2, 3, 4].map(spans), [1, 2, 1, 4]);
}

#[test]
fn the_file_of_a_segment_with_a_switch_is_that_of_the_younger_timeline() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["000000010000000000000001", "000000010000000000000002", "000000020000000000000003"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let files = WalFiles::list(&[directory.path()], WalSegmentSize::DEFAULT).unwrap();
    let history = TimelineHistory::parse(TimelineId::new(2), b"1\t0/2800000\n").unwrap();
    let missing = |start, end| {
        let name = files.first_missing(&history, Lsn::new(start), Lsn::new(end));
        name.map(|name| name.file_name(WalSegmentSize::DEFAULT))
    };
    assert_eq!(missing(0x100_0000, 0x200_0000), None);
    assert_eq!(missing(0x100_0000, 0x200_0001).as_deref(), Some("000000020000000000000002"));
    assert_eq!(missing(0x300_0000, 0x400_0000), None);
    assert_eq!(missing(0x300_0000, 0x400_0001).as_deref(), Some("000000020000000000000004"));
}

#[test]
fn what_a_real_segment_changed_is_gathered() {
    let (bytes, source, begin) = segment();
    let control = ControlFile::parse(artefact!("pg_control")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let name = source.history.segment_name(source.segment_size.segment_of(begin), source.segment_size);
    fs::write(directory.path().join(format!("{}.zst", name.file_name(source.segment_size))), zstd(&bytes)).unwrap();
    let files = WalFiles::list(&[directory.path()], source.segment_size).unwrap();
    let end = begin.checked_add(SEGMENT as u64).unwrap();
    let mut changes = WalChanges::new(&source, control.block_size, WalLevel::Replica).unwrap();
    let needed = source.history.wal_ranges(control.timeline, begin, end).unwrap();
    files.walk(source, begin, end, |record| changes.add(record)).unwrap();
    let map = changes.finish(needed);
    assert!(map.marked_count() >= 1 && map.coverage().ranges().count() == 1);
}
