//! pg_filenode.map: which file holds each of the catalogs that cannot be looked up in a catalog.
//!
//! A wrong map makes a cluster read other files as its system catalogs. It always has the same size, so it is
//! copied by content, and 13 to 15 overwrite it in place: what is read while that happens is half of each. The
//! CRC at the end decides, and the caller reads again when it does not fit.
//!
//! ```text
//! offset              size  field
//! 0                   4     magic 0x00592717
//! 4                   4     number of mappings in use
//! 8                   8 x n mappings: catalog OID u32, file number u32; n is 62 up to 15, 64 from 16 on
//! 504 / 520           4     CRC-32C of everything before it
//! 508 / -             4     padding, up to 15
//! ```
//!
//! PostgreSQL: `src/backend/utils/cache/relmapper.c`, `RelMapFile`, `read_relmap_file`.

use super::bytes::u32_at;
use crate::error::{Error, Result};

const MAGIC: u32 = 0x0059_2717;

/// Checks the contents of a `pg_filenode.map`; `place` names it in the error.
///
/// # Errors
/// Corrupt: a wrong length, magic, count or CRC (also: torn by a concurrent write, read it again).
pub fn check_relation_map(bytes: &[u8], place: &str) -> Result<()> {
    let (max_count, crc_offset) = match bytes.len() {
        512 => (62, 504),
        524 => (64, 520),
        len => return Err(damaged(place, &format!("it is {len} bytes long, not 512 or 524"))),
    };
    let field = |offset| u32_at(bytes, offset).ok_or_else(|| damaged(place, "it is too short"));
    let (magic, count, crc) = (field(0)?, field(4)?, field(crc_offset)?);
    if magic != MAGIC {
        return Err(damaged(place, &format!("its magic is {magic:08X}, not {MAGIC:08X}")));
    }
    if count > max_count {
        return Err(damaged(place, &format!("it claims {count} mappings of at most {max_count}")));
    }
    let computed = crc32c::crc32c(&bytes[..crc_offset]);
    if crc != computed {
        return Err(damaged(place, &format!("it has CRC {crc:08X}, but its contents give {computed:08X}")));
    }
    Ok(())
}

fn damaged(place: &str, what: &str) -> Error {
    Error::corrupt(place, format!("the relation map is damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: [&[u8]; 6] = [
        include_bytes!("../../../testdata/artefacts/13/pg_filenode.map"),
        include_bytes!("../../../testdata/artefacts/14/pg_filenode.map"),
        include_bytes!("../../../testdata/artefacts/15/pg_filenode.map"),
        include_bytes!("../../../testdata/artefacts/16/pg_filenode.map"),
        include_bytes!("../../../testdata/artefacts/17/pg_filenode.map"),
        include_bytes!("../../../testdata/artefacts/18/pg_filenode.map"),
    ];

    #[test]
    fn the_maps_of_every_major_are_sound() {
        assert_eq!(REAL.map(<[u8]>::len), [512, 512, 512, 524, 524, 524]);
        for map in REAL {
            check_relation_map(map, "global/pg_filenode.map").unwrap();
        }
    }

    #[test]
    fn any_flipped_byte_but_the_padding_is_found() {
        for map in [REAL[0], REAL[5]] {
            let checked_len = if map.len() == 512 { 508 } else { 524 };
            for at in 0..checked_len {
                let mut map = map.to_vec();
                map[at] ^= 0x40;
                let error = check_relation_map(&map, "base/5/pg_filenode.map").unwrap_err();
                assert_eq!(error.place(), Some("base/5/pg_filenode.map"), "byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_check_panic(bytes in proptest::collection::vec(any::<u8>(), 0..530), len in 0usize..525) {
            let _ = check_relation_map(&bytes, "x");
            let _ = check_relation_map(&REAL[5][..len.min(524)], "x");
        }
    }
}
