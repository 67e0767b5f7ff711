//! The decoders, each as a function of bytes that must return, whatever the bytes are.
//!
//! A function here panics when its decoder does, and when something that was decoded does not read back. Inputs are taken twice where there
//! is a checksum: as they are, and as what the checksum is of, so that mutations reach what lies behind it. Nothing else calls these functions but the fuzz
//! targets in `fuzz/` and a test that runs them for a while with mutations of true samples (`tests/fuzz.rs`).

use jiff::Timestamp;
use sha2::{Digest, Sha256};

pub use crate::repo::fuzz::{fingerprints, locations, manifest, pack, page, sealed_text};

use crate::chunk::{ChunkId, Codec, Decoder, Shape, hex};
use crate::detect::{ChangeMap, FileLength, sealed_changes};
use crate::pg::{
    BackupLabel, BlockSize, BlocksPerSegment, ControlFile, ForkNumber, Lsn, MajorVersion, PgBackupManifest,
    RecordDecoder, RelationFile, SegmentNumber, SystemIdentifier, TablespaceMap, TimelineHistory, TimelineId,
    WalBlockSize, WalPageHeader, WalRecord, WalSegmentName, WalSegmentSize, WalSource, WalStep, WalSummaryReader,
    WalSummaryStep, WalWalker, check_relation_map, parse_wal_summary_name, wal_summary_name,
};

/// Where pg_control has its CRC, by versions.
const CONTROL_CRC_OFFSETS: [usize; 3] = [288, 292, 304];
/// Blocks of a relation's file at most.
const WHOLE_SEGMENT: u32 = BlocksPerSegment::DEFAULT.as_u32();
/// How a WAL summary begins.
const SUMMARY_MAGIC: u32 = 0x652B_137B;
/// Bytes of a WAL page.
const WAL_PAGE_LEN: u32 = 8192;

/// A stored chunk.
pub fn chunk(bytes: &[u8]) {
    let Ok(mut decoder) = Decoder::new() else { return };
    for (codec, block_count) in [(Codec::Raw, 1), (Codec::Zstd, 1), (Codec::Zstd, 32), (Codec::ZstdDelta, 32)] {
        let shape = Shape { block_len: 8192, block_count };
        let _ = decoder.decode(codec, bytes, shape, ChunkId::default()).map(|(raw, _)| raw.len());
    }
}

/// `pg_control`.
pub fn control(bytes: &[u8]) {
    let _ = ControlFile::parse(bytes);
    for at in CONTROL_CRC_OFFSETS {
        let Some((covered, rest)) = bytes.split_at_checked(at) else { continue };
        let crc = crc32c::crc32c(covered).to_le_bytes();
        let tail = rest.get(crc.len()..).unwrap_or_default();
        let _ = ControlFile::parse(&[covered, &crc, tail].concat());
    }
}

/// `backup_label`.
pub fn backup_label(bytes: &[u8]) {
    let Ok(label) = BackupLabel::parse(bytes) else { return };
    let _ = WalSegmentSize::new(16 << 20).map(|size| label.start_segment(size));
}

/// `tablespace_map`, as of 13 and as of later versions.
pub fn tablespace_map(bytes: &[u8]) {
    for major in [13, 18].into_iter().filter_map(MajorVersion::new) {
        let Ok(map) = TablespaceMap::parse(bytes, major) else { continue };
        let Ok(encoded) = map.encode(major) else { continue };
        assert_eq!(TablespaceMap::parse(&encoded, major).ok(), Some(map), "a tablespace_map does not read back");
    }
}

/// A timeline's history.
pub fn history(bytes: &[u8]) {
    let Ok(history) = TimelineHistory::parse(TimelineId::new(9), bytes) else { return };
    let _ = WalSegmentSize::new(1 << 20).map(|size| {
        let segment = size.segment_of(Lsn::new(u64::MAX));
        history.segment_name(segment, size).file_name(size)
    });
    let _ = history.wal_ranges(TimelineId::new(1), Lsn::new(1), Lsn::new(u64::MAX));
}

/// PostgreSQL's `backup_manifest`, and one whose lines but the last the input is.
pub fn pg_manifest(bytes: &[u8]) {
    let _ = PgBackupManifest::parse(bytes);
    let last = format!("\"Manifest-Checksum\": \"{}\"}}\n", hex(&Sha256::digest(bytes)));
    let _ = PgBackupManifest::parse(&[bytes, last.as_bytes()].concat());
}

/// `pg_filenode.map`.
pub fn relation_map(bytes: &[u8]) {
    let _ = check_relation_map(bytes, "here");
}

/// The header of a WAL page, and WAL from there on, fed in pieces of a length that the first byte says.
pub fn wal(bytes: &[u8]) {
    let _ = WalPageHeader::parse(bytes);
    let (Some(segment_size), Some(block_size)) = (WalSegmentSize::new(16 << 20), WalBlockSize::new(WAL_PAGE_LEN))
    else {
        return;
    };
    let _ = WalSegmentName::parse(bytes, segment_size);
    let Ok(header) = WalPageHeader::parse(bytes) else { return };
    for major in (13..=18).filter_map(MajorVersion::new) {
        let history = TimelineHistory::without_ancestors(header.timeline);
        let system_identifier = header.long.map_or(SystemIdentifier::new(0), |long| long.system_identifier);
        let source = WalSource { major, system_identifier, segment_size, block_size, history };
        walk(source, header.address, bytes);
    }
}

fn walk(source: WalSource, start: Lsn, bytes: &[u8]) {
    let major = source.major;
    let Some(stop) = start.checked_add(bytes.len() as u64) else { return };
    let Ok(mut walker) = WalWalker::new(source, start, stop) else { return };
    let piece = 1 + 37 * usize::from(bytes.first().copied().unwrap_or_default());
    let mut steps = 0;
    while let Ok(step) = walker.step() {
        steps += 1;
        assert!(steps <= 4 * bytes.len() + 4, "the walk goes nowhere");
        match step {
            WalStep::Record(record) => use_record(record, major),
            WalStep::Finished => return,
            WalStep::NeedBytes { at } => {
                let from = at.as_u64().checked_sub(start.as_u64()).and_then(|from| usize::try_from(from).ok());
                let rest = from.and_then(|from| bytes.get(from..)).unwrap_or_default();
                if rest.is_empty() {
                    return;
                }
                walker.feed(&rest[..rest.len().min(piece)]);
            }
        }
    }
}

fn use_record(record: WalRecord<'_>, major: MajorVersion) {
    let mut decoder = RecordDecoder::new(major, BlockSize::DEFAULT);
    let Ok(decoded) = decoder.decode(record) else { return };
    assert!(decoded.blocks.is_sorted_by(|a, b| a.id < b.id), "blocks out of order");
    let alone = record.main_data().is_none_or(|data| data == decoded.main_data);
    assert!(alone, "two readings of a record's data");
    let _ = decoded.storage_changes(major, |_| ());
}

/// The fragments of a record, without the CRC before them; the first two bytes are its kind and resource manager.
pub fn wal_record(bytes: &[u8]) {
    let Some(([info, rmgr], fragments)) = bytes.split_first_chunk() else { return };
    let record = [&[0; 16], &[*info, *rmgr, 0, 0, 0, 0, 0, 0][..], fragments].concat();
    for major in (13..=19).filter_map(MajorVersion::new) {
        use_record(WalRecord::new_unchecked(Lsn::new(1), &record), major);
    }
}

/// A WAL summary, and one without its magic and CRC; and its name.
pub fn wal_summary(bytes: &[u8]) {
    if let Some(range) = parse_wal_summary_name(bytes) {
        assert_eq!(wal_summary_name(range).as_bytes(), bytes, "a summary's name does not read back");
    }
    let unsealed = [&SUMMARY_MAGIC.to_le_bytes(), bytes].concat();
    let crc = crc32c::crc32c(&unsealed).to_le_bytes();
    for file in [bytes.to_vec(), [&unsealed, &crc[..]].concat()] {
        let mut reader = WalSummaryReader::new();
        let mut pieces = file.chunks(1 + 37 * usize::from(bytes.first().copied().unwrap_or_default()));
        while let Ok(step) = reader.step() {
            match step {
                WalSummaryStep::NeedBytes => match pieces.next() {
                    Some(piece) => reader.feed(piece),
                    None => break,
                },
                WalSummaryStep::Blocks(blocks) => assert!(blocks.len() <= 1 << 16, "more blocks than a chunk has"),
                WalSummaryStep::Fork(_) => {}
                WalSummaryStep::Finished => break,
            }
        }
    }
}

/// A map of changes, and one whose frame or values the input is; what is decoded is used as a reader would.
pub fn change_map(bytes: &[u8]) {
    let name = "clusters/main/changes/1";
    let frame = zstd::bulk::compress(bytes, 1).unwrap_or_default();
    for object in [bytes.to_vec(), sealed_changes(bytes, name), sealed_changes(&frame, name)] {
        let Ok(map) = ChangeMap::decode(&object, name) else { continue };
        let again = map.encode(name).and_then(|bytes| ChangeMap::decode(&bytes, name));
        assert_eq!(again.ok().as_ref(), Some(&map), "a map of changes does not read back");
        let len = FileLength { block_count: WHOLE_SEGMENT, parent_block_count: WHOLE_SEGMENT };
        for (locator, _) in map.relations() {
            for segment in [SegmentNumber::new(0), SegmentNumber::new(1)] {
                let file = RelationFile { locator, fork: ForkNumber::Main, segment };
                let blocks: u64 = map.runs(file, BlocksPerSegment::DEFAULT, len).map(|run| u64::from(run.count)).sum();
                assert!(blocks <= u64::from(WHOLE_SEGMENT), "more blocks than the file has");
            }
        }
    }
}

/// The names that a repository gives: of backups, manifests, packs, clusters; LSNs and times.
pub fn names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = (text.parse::<crate::repo::BackupId>().map(|id| assert_eq!(id.to_string(), text)), text.parse::<Lsn>());
    let _ = (text.parse::<crate::repo::ClusterName>(), text.parse::<Timestamp>());
    let Ok(object) = crate::store::ObjectName::new(text) else { return };
    let _ = crate::repo::PackName::parse(&object, &crate::repo::ClusterName::default());
}
