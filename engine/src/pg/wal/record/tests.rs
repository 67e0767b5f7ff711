//! The decoder against records made here, by a second writing of the format.

use proptest::prelude::*;

use super::*;
use crate::pg::Lsn;

const PAGE: u16 = 8192;

/// An image as it is announced.
#[derive(Clone, Copy, Debug)]
struct Announced {
    len: u16,
    hole_offset: u16,
    flags: u8,
    stored_hole_len: Option<u16>,
}

/// Puts a record together: headers, then what they announce.
#[derive(Clone, Debug, Default)]
struct Builder {
    headers: Vec<u8>,
    payload: Vec<u8>,
}

impl Builder {
    fn block(mut self, id: u8, flags: u8, data: &[u8], image: Option<Announced>, rel: Option<u32>, block: u32) -> Self {
        let has_data = if data.is_empty() { 0 } else { 0x20 };
        let has_image = if image.is_some() { 0x10 } else { 0 };
        let same = if rel.is_none() { 0x80 } else { 0 };
        self.headers.extend([id, flags | has_data | has_image | same]);
        self.headers.extend((data.len() as u16).to_le_bytes());
        if let Some(image) = image {
            self.headers.extend(image.len.to_le_bytes());
            self.headers.extend(image.hole_offset.to_le_bytes());
            self.headers.push(image.flags);
            image.stored_hole_len.iter().for_each(|len| self.headers.extend(len.to_le_bytes()));
            self.payload.extend(vec![7; usize::from(image.len)]);
        }
        if let Some(rel) = rel {
            [1663, 5, rel].iter().for_each(|part: &u32| self.headers.extend(part.to_le_bytes()));
        }
        self.headers.extend(block.to_le_bytes());
        self.payload.extend(data);
        self
    }

    fn image(self, image: Announced) -> Self {
        self.block(0, 0, &[], Some(image), Some(9), 3)
    }

    fn header(mut self, bytes: &[u8]) -> Self {
        self.headers.extend(bytes);
        self
    }

    fn main_data(mut self, data: &[u8]) -> Self {
        match u8::try_from(data.len()) {
            Ok(len) => self.headers.extend([255, len]),
            Err(_) => {
                self.headers.push(254);
                self.headers.extend((data.len() as u32).to_le_bytes());
            }
        }
        self.payload.extend(data);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        [&[0; RECORD_HEADER_LEN], self.headers.as_slice(), &self.payload].concat()
    }
}

fn decoder(major: u32) -> RecordDecoder {
    RecordDecoder::new(MajorVersion::new(major).unwrap(), BlockSize::DEFAULT)
}

/// What is decoded, as text; errors without their place.
fn decoded(major: u32, bytes: &[u8]) -> String {
    let mut decoder = decoder(major);
    match decoder.decode(WalRecord::new_unchecked(Lsn::new(0x100_0028), bytes)) {
        Err(error) => {
            assert_eq!((error.kind(), error.place()), (ErrorKind::Unsupported, Some("WAL 0/1000028")));
            error.what().to_owned()
        }
        Ok(decoded) => {
            let block = |b: &BlockReference| {
                let init = if b.will_init { " init" } else { "" };
                let image = b.image.map_or(String::new(), |i| {
                    let applies = if i.applies { " apply" } else { "" };
                    format!(" image {}+{}@{} {:?}{applies}", i.len, i.hole_len, i.hole_offset, i.compression)
                });
                format!("#{} {} {} {} data {}{init}{image}; ", b.id, b.locator, b.fork, b.block, b.data_len)
            };
            let blocks: String = decoded.blocks.iter().map(block).collect();
            format!("{blocks}{:?} {:?} {:?}", decoded.main_data, decoded.origin, decoded.top_level_xid)
        }
    }
}

fn image(len: u16, hole_offset: u16, flags: u8, stored_hole_len: Option<u16>) -> Announced {
    Announced { len, hole_offset, flags, stored_hole_len }
}

fn decoded_image(major: u32, announced: Announced) -> String {
    decoded(major, &Builder::default().image(announced).bytes())
}

#[test]
fn blocks_data_and_what_goes_with_them_are_decoded_in_every_major() {
    let record = Builder::default()
        .header(&[253, 5, 0])
        .block(0, 0, &[1, 2], None, Some(16384), 7)
        .block(1, 0x42, &[], None, None, 0)
        .block(32, 3, &[9], None, Some(16385), 70_000)
        .main_data(&[4, 5, 6]);
    let expected =
        "#0 1663/5/16384 main 7 data 2; #1 1663/5/16384 vm 0 data 0 init; #32 1663/5/16385 init 70000 data 1; ";
    for major in 13..=19 {
        assert_eq!(decoded(major, &record.bytes()), format!("{expected}[4, 5, 6] Some(5) None"));
    }
}

#[test]
fn a_top_level_transaction_is_known_from_14_on() {
    let record = Builder::default().header(&[252, 1, 2, 0, 0]).main_data(&[8]).bytes();
    assert_eq!(decoded(14, &record), "[8] None Some(513)");
    assert_eq!(decoded(13, &record), "the WAL record of resource manager 0 has a header of an unknown kind, 252");
}

#[test]
fn the_same_image_flags_mean_one_thing_in_14_and_another_in_15() {
    // 14: hole and compressed, with its length; 15: hole and apply.
    let compressed = image(100, 40, 0x03, Some(3000));
    assert!(decoded_image(14, compressed).contains("image 100+3000@40 Some(Pglz); "));
    let applied = image(100, 40, 0x03, None);
    assert!(decoded_image(15, applied).contains("image 100+8092@40 None apply; "));
    for (major, flags, expected) in [
        (13, 0x05, "None apply"),
        (13, 0x01, "None;"),
        (14, 0x07, "Some(Pglz) apply"),
        (15, 0x07, "Some(Pglz) apply"),
        (16, 0x0B, "Some(Lz4) apply"),
        (18, 0x13, "Some(Zstd) apply"),
        (17, 0x11, "Some(Zstd);"),
    ] {
        let is_compressed = expected.starts_with("Some");
        let found = decoded_image(major, image(100, 40, flags, is_compressed.then_some(3000)));
        assert!(found.contains(expected), "{major} {flags:02X}: {found}");
    }
}

#[test]
fn an_image_without_a_hole_is_a_whole_page_or_compressed() {
    assert!(decoded_image(15, image(PAGE, 0, 0x02, None)).contains("image 8192+0@0 None apply"));
    assert!(decoded_image(15, image(500, 0, 0x06, None)).contains("image 500+0@0 Some(Pglz) apply"));
    for bad in [
        image(PAGE - 1, 0, 0x02, None),
        image(PAGE, 8, 0x02, None),
        image(500, 8, 0x06, None),
        image(PAGE, 0, 0x06, None),
        image(PAGE + 1, 0, 0x02, None),
    ] {
        assert!(decoded_image(15, bad).contains("an image that cannot be"), "{bad:?}");
    }
}

#[test]
fn a_hole_has_a_place_and_a_length_and_lies_in_the_page() {
    for (bad, major) in [
        (image(PAGE, 40, 0x01, None), 15),
        (image(100, 0, 0x01, None), 15),
        (image(100, 101, 0x01, None), 15),
        (image(100, 40, 0x05, Some(0)), 15),
        (image(100, 40, 0x05, Some(PAGE)), 15),
        (image(PAGE, 40, 0x05, Some(5)), 15),
        (image(100, 40, 0x03, Some(0)), 14),
    ] {
        assert!(decoded_image(major, bad).contains("an image that cannot be"), "{bad:?}");
    }
}

#[test]
fn image_flags_that_are_not_known_or_say_two_things_are_refused() {
    for (major, flags) in [(13, 0x08), (14, 0x10), (14, 0x80), (15, 0x20), (18, 0x80)] {
        let found = decoded_image(major, image(PAGE, 0, flags, None));
        assert!(found.contains("an image that cannot be"), "{major} {flags:02X}: {found}");
    }
    for flags in [0x0C, 0x14, 0x18, 0x1C] {
        let found = decoded_image(15, image(500, 0, flags, None));
        assert!(found.contains("an image that cannot be"), "{flags:02X}: {found}");
    }
}

#[test]
fn references_that_cannot_be_are_refused() {
    let block = |id, flags, rel, block| Builder::default().block(id, flags, &[], None, rel, block);
    for (record, expected) in [
        (block(0, 4, Some(1), 1), "a fork that is not known"),
        (block(0, 15, Some(1), 1), "a fork that is not known"),
        (block(0, 0, None, 1), "a block without a relation"),
        (block(0, 0, Some(1), u32::MAX), "a reference that cannot be"),
        (block(0, 0x20, Some(1), 1), "a reference that cannot be"),
        (block(1, 0, Some(1), 1).block(1, 0, &[], None, None, 2), "block 1 out of order"),
        (block(2, 0, Some(1), 1).block(1, 0, &[], None, None, 2), "block 1 out of order"),
        (Builder::default().header(&[33, 0, 0, 0]), "a header of an unknown kind, 33"),
        (Builder::default().header(&[251, 0, 0, 0]), "a header of an unknown kind, 251"),
    ] {
        // With data after it, as the headers are read only as long as something is announced by none of them.
        let found = decoded(17, &record.main_data(&[1]).bytes());
        assert!(found.contains(expected), "{found} is not {expected}");
    }
}

#[test]
fn lengths_that_do_not_add_up_are_refused() {
    let record = Builder::default().block(0, 0, &[1, 2, 3], None, Some(1), 1).main_data(&[7; 300]).bytes();
    assert!(decoded(18, &record).contains("7, 7"));
    for bytes in [&record[..record.len() - 1], &[record.as_slice(), &[0]].concat()] {
        assert!(decoded(18, bytes).contains("bytes where 303 are announced"), "{}", decoded(18, bytes));
    }
    assert!(decoded(18, &record[..40]).contains("cut short"));
    assert_eq!(decoded(18, &[0; RECORD_HEADER_LEN]), "[] None None", "a switch has nothing at all");
}

#[test]
fn the_data_of_records_without_blocks_is_found_without_a_version() {
    let data = |builder: Builder| main_data_only(&builder.bytes()).map(<[u8]>::to_vec);
    assert_eq!(data(Builder::default().header(&[253, 1, 0, 252, 1, 1, 1, 1]).main_data(&[5; 300])), Some(vec![5; 300]));
    assert_eq!(data(Builder::default().block(0, 0, &[], None, Some(1), 1).main_data(&[5])), None);
    assert_eq!(data(Builder::default()), None);
}

fn any_record() -> impl Strategy<Value = Vec<u8>> {
    let image = (0u16..9000, 0u16..9000, any::<u8>(), proptest::option::of(any::<u16>()))
        .prop_map(|(len, hole_offset, flags, stored_hole_len)| image(len, hole_offset, flags, stored_hole_len));
    let block = (
        0u8..35,
        any::<u8>(),
        proptest::collection::vec(any::<u8>(), 0..9),
        proptest::option::of(image),
        proptest::option::of(any::<u32>()),
        any::<u32>(),
    );
    let blocks = proptest::collection::vec(block, 0..4);
    (blocks, proptest::collection::vec(any::<u8>(), 0..400), 0usize..60, any::<u8>()).prop_map(
        |(blocks, data, at, flip)| {
            let mut builder = Builder::default();
            for (id, flags, data, image, rel, block) in blocks {
                builder = builder.block(id, flags, &data, image, rel, block);
            }
            let mut bytes = builder.main_data(&data).bytes();
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= flip;
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in any_record(), noise: Vec<u8>, major in 13u32..=19) {
        let mut decoder = decoder(major);
        for bytes in [bytes.clone(), [bytes[..RECORD_HEADER_LEN].to_vec(), noise].concat()] {
            let _ = main_data_only(&bytes);
            let Ok(decoded) = decoder.decode(WalRecord::new_unchecked(Lsn::new(1), &bytes)) else { continue };
            prop_assert!(decoded.blocks.is_sorted_by(|a, b| a.id < b.id));
            prop_assert!(bytes.ends_with(decoded.main_data));
            let _ = decoded.storage_changes(MajorVersion::new(major).unwrap(), |_| ());
        }
    }
}
