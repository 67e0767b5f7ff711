//! Little-endian integers at fixed places of a byte slice.
//!
//! PostgreSQL writes its C structs in native order; every cluster this program handles is little-endian.
//! Reading by offset keeps the parsers free of `unsafe` and of alignment; a place past the end is `None`.

/// The `N` bytes at `offset`.
pub(super) fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

pub(super) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array_at(bytes, offset).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array_at(bytes, offset).map(u64::from_le_bytes)
}

/// The number that these ASCII decimal digits write, if they are digits only, without a leading zero, and fit.
///
/// With leading zeros refused there is one text for each number, as PostgreSQL's file names need it.
pub(crate) fn canonical_decimal(digits: &[u8]) -> Option<u32> {
    let canonical = matches!(digits.first(), Some(b'1'..=b'9')) && digits.iter().all(u8::is_ascii_digit);
    canonical.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}
