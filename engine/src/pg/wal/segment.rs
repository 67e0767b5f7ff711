//! WAL segment files: how long they are, which part of the log each holds, what each is called.
//!
//! The log is one sequence of bytes cut into files of one size (1 MB to 1 GB, chosen at initdb). A name is three
//! groups of eight hexadecimal digits: timeline, and the segment number split in two *by the number of segments
//! in 4 GiB*, so the same name means another place of the log under another segment size; names are never
//! compared or counted without one.
//!
//! PostgreSQL: `src/include/access/xlog_internal.h`, `XLogFileName`, `XLogFromFileName`, `XLByteToSeg`,
//! `XLByteToPrevSeg`, `IsValidWalSegSize`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::{Lsn, TimelineId};

/// The length of a WAL segment file: a power of two from 1 MB to 1 GB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WalSegmentSize(u32);

impl WalSegmentSize {
    /// 16 MB, the default.
    pub const DEFAULT: WalSegmentSize = WalSegmentSize(16 << 20);

    /// `None` unless it is a power of two from 1 MB to 1 GB.
    pub fn new(bytes: u32) -> Option<Self> {
        ((1 << 20..=1 << 30).contains(&bytes) && bytes.is_power_of_two()).then_some(Self(bytes))
    }

    /// In bytes.
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// In bytes.
    pub fn as_u64(self) -> u64 {
        u64::from(self.0)
    }

    /// The segment that holds the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> WalSegmentNumber {
        WalSegmentNumber(lsn.as_u64() / self.as_u64())
    }

    /// The segment that holds the last byte before `lsn`: the last one needed to reach `lsn`.
    pub fn segment_before(self, lsn: Lsn) -> WalSegmentNumber {
        WalSegmentNumber(lsn.as_u64().saturating_sub(1) / self.as_u64())
    }

    /// Where in its segment `lsn` is, in bytes.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.as_u64() % self.as_u64()
    }

    /// Where `segment` begins; `None` past the end of the log.
    pub fn start_of(self, segment: WalSegmentNumber) -> Option<Lsn> {
        segment.0.checked_mul(self.as_u64()).map(Lsn::new)
    }

    fn segments_per_log_id(self) -> u64 {
        (1 << 32) / self.as_u64()
    }
}

impl fmt::Display for WalSegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The size of a WAL page: a power of two from 1 KB to 64 KB, not tied to the size of data pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WalBlockSize(u32);

impl WalBlockSize {
    /// 8 KB, the default.
    pub const DEFAULT: WalBlockSize = WalBlockSize(8192);

    /// `None` unless it is a power of two from 1 KB to 64 KB.
    pub fn new(bytes: u32) -> Option<Self> {
        ((1 << 10..=1 << 16).contains(&bytes) && bytes.is_power_of_two()).then_some(Self(bytes))
    }

    /// In bytes.
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// In bytes.
    pub fn as_u64(self) -> u64 {
        u64::from(self.0)
    }
}

/// A segment, counted from the beginning of the log in the cluster's own segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WalSegmentNumber(u64);

impl WalSegmentNumber {
    /// The segment with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The one after it; `None` past the last number.
    pub fn next(self) -> Option<WalSegmentNumber> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for WalSegmentNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A segment on a timeline: what a WAL file's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentName {
    /// The timeline, hexadecimal in the name.
    pub timeline: TimelineId,
    /// The segment.
    pub segment: WalSegmentNumber,
}

impl WalSegmentName {
    /// The file's name, 24 upper-case hexadecimal digits.
    pub fn file_name(self, size: WalSegmentSize) -> String {
        let per_id = size.segments_per_log_id();
        let number = self.segment.as_u64();
        format!("{:08X}{:08X}{:08X}", self.timeline.as_u32(), number / per_id, number % per_id)
    }

    /// Reads a file's name; `None` for anything PostgreSQL would not have made with this segment size.
    pub fn parse(name: &[u8], size: WalSegmentSize) -> Option<WalSegmentName> {
        let digits = |from: usize| {
            let digits = name.get(from..from + 8)?;
            let upper_hex = digits.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
            upper_hex.then(|| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()).flatten()
        };
        let (timeline, high, low) = (digits(0)?, u64::from(digits(8)?), u64::from(digits(16)?));
        let per_id = size.segments_per_log_id();
        let valid = name.len() == 24 && timeline != 0 && low < per_id;
        let segment = WalSegmentNumber(high * per_id + low);
        valid.then_some(WalSegmentName { timeline: TimelineId::new(timeline), segment })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(timeline: u32, lsn: u64, size: WalSegmentSize) -> String {
        let segment = size.segment_of(Lsn::new(lsn));
        WalSegmentName { timeline: TimelineId::new(timeline), segment }.file_name(size)
    }

    #[test]
    fn names_depend_on_the_segment_size() {
        let lsn = 0x1_2345_6789;
        let sizes = [1 << 20, 16 << 20, 1 << 30].map(|bytes| WalSegmentSize::new(bytes).unwrap());
        assert_eq!(
            sizes.map(|size| name(10, lsn, size)),
            ["0000000A0000000100000234", "0000000A0000000100000023", "0000000A0000000100000000"]
        );
    }

    #[test]
    fn names_that_postgresql_would_not_make_are_refused() {
        let refused = [
            "",
            "00000001000000000000000",
            "0000000100000000000000011",
            "00000001000000000000000a",
            "000000000000000000000001",
            "000000010000000000000100",
            "+0000001000000000000001",
            "00000001.history",
            "000000010000000000000001.partial",
        ];
        for text in refused {
            assert_eq!(WalSegmentName::parse(text.as_bytes(), WalSegmentSize::DEFAULT), None, "{text:?}");
        }
        let small = WalSegmentSize::new(1 << 20).unwrap();
        assert!(WalSegmentName::parse(b"000000010000000000000100", small).is_some());
    }

    #[test]
    fn a_stop_at_a_border_needs_the_segment_before_it() {
        let size = WalSegmentSize::DEFAULT;
        let stop = Lsn::new(0x400_0000);
        assert_eq!((size.segment_of(stop).as_u64(), size.segment_before(stop).as_u64()), (4, 3));
        assert_eq!(size.offset_of(Lsn::new(0x400_0028)), 0x28);
        assert_eq!(size.start_of(WalSegmentNumber::new(4)), Some(stop));
        assert_eq!(size.start_of(WalSegmentNumber::new(u64::MAX)), None);
    }

    #[test]
    fn segment_sizes_are_powers_of_two_from_1_mb_to_1_gb() {
        let good: Vec<_> = (0..32).filter(|&bits| WalSegmentSize::new(1 << bits).is_some()).collect();
        assert_eq!(good, (20..=30).collect::<Vec<_>>());
        assert_eq!(WalSegmentSize::new((1 << 20) + 1), None);
        assert_eq!(WalSegmentSize::new(0), None);
    }

    proptest! {
        #[test]
        fn a_name_reads_back_as_it_was_printed(timeline in 1u32.., bits in 20u32..=30, lsn: u64) {
            let size = WalSegmentSize::new(1 << bits).unwrap();
            let name = WalSegmentName { timeline: TimelineId::new(timeline), segment: size.segment_of(Lsn::new(lsn)) };
            prop_assert_eq!(WalSegmentName::parse(name.file_name(size).as_bytes(), size), Some(name));
        }

        #[test]
        fn no_bytes_make_the_name_parser_panic(name in proptest::collection::vec(any::<u8>(), 0..30)) {
            let _ = WalSegmentName::parse(&name, WalSegmentSize::DEFAULT);
        }
    }
}
