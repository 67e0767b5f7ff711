//! `pg_control` and the WAL segment of a cleanly stopped cluster.
//!
//! The layouts of majors 13 to 18 differ in few places, which are constants and comparisons below; all other
//! offsets are common. The segment holds one record, the shutdown checkpoint that `pg_control` points to.
//!
//! PostgreSQL: `src/include/catalog/pg_control.h`, `src/include/access/{xlog_internal,xlogrecord}.h`.

use super::Options;

const CONTROL_FILE_LEN: usize = 8192;
const CHECKPOINT_LEN: usize = 88;
const WAL_PAGE_LEN: u32 = 8192;
/// Where the first record of a segment stands: after the long page header.
const FIRST_RECORD_AT: u64 = 40;
/// Seconds from 1970 to the moment at which every synthetic cluster was stopped.
const STOPPED_AT: i64 = 1_767_225_600;

/// What differs between majors.
#[derive(Debug)]
pub(super) struct Layout {
    control_version: u32,
    /// `PG_CATALOG_VERSION`, as in the name of a tablespace's directory.
    pub(super) catalog_version: u32,
    wal_magic: u16,
    crc_at: usize,
    /// 512 or 524.
    pub(super) relation_map_len: usize,
}

impl Layout {
    /// The layout of `major`; `None` if it is not one of 13 to 18.
    pub(super) fn of(major: u32) -> Option<Self> {
        let (control_version, catalog_version, wal_magic) = match major {
            13 => (1300, 202_007_201, 0xD106),
            14 => (1300, 202_107_181, 0xD10D),
            15 => (1300, 202_209_061, 0xD110),
            16 => (1300, 202_307_071, 0xD113),
            17 => (1700, 202_406_281, 0xD116),
            18 => (1800, 202_506_291, 0xD118),
            _ => return None,
        };
        let crc_at = if major >= 18 { 292 } else { 288 };
        let relation_map_len = if major >= 16 { 524 } else { 512 };
        Some(Self { control_version, catalog_version, wal_magic, crc_at, relation_map_len })
    }
}

/// A place in the WAL.
#[derive(Clone, Copy, Debug)]
pub(super) struct Position {
    pub timeline: u32,
    pub lsn: u64,
}

/// The position of the shutdown checkpoint in WAL segment number `segment`.
pub(super) fn checkpoint_lsn(options: &Options, segment: u64) -> u64 {
    segment * u64::from(options.wal_segment_len) + FIRST_RECORD_AT
}

/// The checkpoint's body, which is in `pg_control` as well as in the record.
fn checkpoint(options: &Options, Position { timeline, lsn }: Position) -> [u8; CHECKPOINT_LEN] {
    let mut body = [0; CHECKPOINT_LEN];
    let mut put = |at: usize, value: &[u8]| body[at..at + value.len()].copy_from_slice(value);
    put(0, &lsn.to_le_bytes());
    put(8, &timeline.to_le_bytes());
    put(12, &timeline.to_le_bytes());
    put(16, &[1]);
    if options.major >= 17 {
        put(20, &1_u32.to_le_bytes());
    }
    put(24, &800_u64.to_le_bytes());
    put(32, &(super::FIRST_RELATION + 100_000).to_le_bytes());
    put(36, &1_u32.to_le_bytes());
    for (at, value) in [(44, 700_u32), (48, 1), (52, 1), (56, 1)] {
        put(at, &value.to_le_bytes());
    }
    put(64, &STOPPED_AT.to_le_bytes());
    body
}

/// The file `global/pg_control` of a cluster stopped with a checkpoint at `at`.
pub(super) fn control_file(options: &Options, layout: &Layout, at: Position) -> Vec<u8> {
    let mut file = vec![0; CONTROL_FILE_LEN];
    let mut put = |at: usize, value: &[u8]| file[at..at + value.len()].copy_from_slice(value);
    put(0, &options.system_identifier.to_le_bytes());
    put(8, &layout.control_version.to_le_bytes());
    put(12, &layout.catalog_version.to_le_bytes());
    // State 1: shut down.
    put(16, &1_u32.to_le_bytes());
    put(24, &STOPPED_AT.to_le_bytes());
    put(32, &at.lsn.to_le_bytes());
    put(40, &checkpoint(options, at));
    put(128, &1000_u64.to_le_bytes());
    // wal_level replica; then the settings that a standby must match.
    for (at, value) in [(172, 1_u32), (180, 100), (184, 8), (188, 10), (192, 0), (196, 64), (204, 8)] {
        put(at, &value.to_le_bytes());
    }
    put(208, &1_234_567.0_f64.to_le_bytes());
    let sizes = [8192, options.segment_blocks, WAL_PAGE_LEN, options.wal_segment_len, 64, 32, 1996, 2048];
    for (index, size) in sizes.into_iter().enumerate() {
        put(216 + 4 * index, &size.to_le_bytes());
    }
    put(248, &[1]);
    put(252, &u32::from(options.checksums).to_le_bytes());
    if options.major >= 18 {
        put(256, &[1]);
    }
    let crc = crc32c(&[&file[..layout.crc_at]]);
    file[layout.crc_at..layout.crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    file
}

/// Whether `file`, a pg_control of `major`, ends with its CRC.
pub fn control_file_is_valid(major: u32, file: &[u8]) -> bool {
    Layout::of(major).is_some_and(|layout| {
        let (before, rest) = file.split_at(layout.crc_at.min(file.len()));
        rest.starts_with(&crc32c(&[before]).to_le_bytes())
    })
}

/// The WAL segment with the shutdown checkpoint at `at`, its first record; zeros after it.
pub(super) fn wal_segment(options: &Options, layout: &Layout, at: Position) -> Vec<u8> {
    let Position { timeline, lsn } = at;
    let mut record = [0; 24 + 2 + CHECKPOINT_LEN];
    let total_len = u32::try_from(record.len()).unwrap_or_default();
    record[0..4].copy_from_slice(&total_len.to_le_bytes());
    // The record before it would be in the segment before; resource manager 0, info 0: shutdown checkpoint.
    record[8..16].copy_from_slice(&(lsn - FIRST_RECORD_AT - 8).to_le_bytes());
    record[24] = 255;
    record[25] = u8::try_from(CHECKPOINT_LEN).unwrap_or_default();
    record[26..].copy_from_slice(&checkpoint(options, at));
    let crc = crc32c(&[&record[24..], &record[..20]]);
    record[20..24].copy_from_slice(&crc.to_le_bytes());

    let mut segment = Vec::with_capacity(usize::try_from(options.wal_segment_len).unwrap_or_default());
    segment.extend(layout.wal_magic.to_le_bytes());
    // Info 2: a long header.
    segment.extend(2_u16.to_le_bytes());
    segment.extend(timeline.to_le_bytes());
    segment.extend((lsn - FIRST_RECORD_AT).to_le_bytes());
    segment.extend(0_u64.to_le_bytes());
    segment.extend(options.system_identifier.to_le_bytes());
    segment.extend(options.wal_segment_len.to_le_bytes());
    segment.extend(WAL_PAGE_LEN.to_le_bytes());
    segment.extend(record);
    segment.resize(usize::try_from(options.wal_segment_len).unwrap_or_default(), 0);
    segment
}

/// The name of WAL segment number `segment` on `timeline`.
pub(super) fn wal_segment_name(options: &Options, timeline: u32, segment: u64) -> String {
    let per_id = (1_u64 << 32) / u64::from(options.wal_segment_len);
    format!("{timeline:08X}{:08X}{:08X}", segment / per_id, segment % per_id)
}

/// The line of a timeline's history that says where it left `timeline`: where WAL segment number `segment` begins.
pub(super) fn history_line(options: &Options, timeline: u32, segment: u64) -> String {
    let lsn = segment * u64::from(options.wal_segment_len);
    format!("{timeline}\t{:X}/{:X}\tno recovery target specified\n", lsn >> 32, lsn & 0xFFFF_FFFF)
}

/// A relation map (`pg_filenode.map`) without entries.
pub(super) fn relation_map(layout: &Layout) -> Vec<u8> {
    let mut map = vec![0; layout.relation_map_len];
    map[..4].copy_from_slice(&0x0059_2717_u32.to_le_bytes());
    // 13 to 15 end with 4 bytes of padding after the sum.
    let crc_at = if layout.relation_map_len == 512 { 504 } else { 520 };
    let crc = crc32c(&[&map[..crc_at]]);
    map[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    map
}

/// CRC-32C of the concatenation of `parts`, a bit at a time: it is only for small files.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = u32::MAX;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_crc32c_is_right() {
        assert_eq!(crc32c(&[b"1234", b"56789"]), 0xE306_9283);
    }
}
