//! The decoders of the repository's format as functions of bytes; see [`crate::fuzz`].

use super::layer::{Layer, Locations, decode_fingerprints, encode_fingerprints};
use super::lease::LeaseRecord;
use super::manifest::{Manifest, sealed};
use super::names::PackKind;
use super::pack::{PackTable, RECORD_CHECK_LEN, check_pack, header, read_record, trailer};
use super::table::{decode_page, encode_page};
use super::{Header, METADATA_LEVEL, unseal};
use crate::store::{MemoryStore, ObjectName};

const BLOCK_LEN: usize = 8192;
/// Bytes of an entry in a pack's table.
const TABLE_ENTRY_LEN: usize = 20;

fn object(name: &str) -> Option<ObjectName> {
    ObjectName::new(format!("clusters/main/{name}")).ok()
}

/// The input as it is, and as what a frame holds.
fn framed(bytes: &[u8]) -> [Vec<u8>; 2] {
    [bytes.to_vec(), zstd::bulk::compress(bytes, METADATA_LEVEL).unwrap_or_default()]
}

/// A manifest, and one whose JSON the input is.
pub fn manifest(bytes: &[u8]) {
    let Some(object) = object("manifests/20261122T160312Z-1a2b3c4d") else { return };
    let _ = Manifest::decode(bytes, &object);
    if let Ok(manifest) = sealed(bytes, &object).and_then(|sealed| Manifest::decode(&sealed, &object)) {
        let again = manifest.encode(&object).and_then(|bytes| Manifest::decode(&bytes, &object));
        assert_eq!(again.ok(), Some(manifest), "a manifest does not read back");
    }
}

/// The locations of a layer; what is decoded is used as a reader would.
pub fn locations(bytes: &[u8]) {
    for body in framed(bytes) {
        let Ok(locations) = Locations::decode(&body, BLOCK_LEN, "here") else { continue };
        let again = locations.encode().and_then(|body| Locations::decode(&body, BLOCK_LEN, "here"));
        assert_eq!(again.ok().as_ref(), Some(&locations), "locations do not read back");
        let layer = Layer { locations, fingerprints: Vec::new() };
        let seen = layer.seen_through([&layer.locations]);
        assert!(seen.is_empty(), "a layer is seen through itself");
        let _ = (layer.is_complete(), layer.all_fingerprints(), layer.restricted(&seen));
        assert_eq!(layer.over(&layer).is_complete(), layer.is_complete());
    }
}

/// The fingerprints of a layer.
pub fn fingerprints(bytes: &[u8]) {
    for count in [0, bytes.len() as u64 / 16, u64::MAX / 16] {
        if let Ok(fingerprints) = decode_fingerprints(bytes, count, "here") {
            assert_eq!(encode_fingerprints(&fingerprints), bytes);
        }
    }
}

/// A page of the file table.
pub fn page(bytes: &[u8]) {
    for body in framed(bytes) {
        let Ok((_, entries)) = decode_page(&body, "here") else { continue };
        let again = encode_page(&entries).and_then(|body| decode_page(&body, "here"));
        assert_eq!(again.ok().map(|(_, entries)| entries), Some(entries), "a page does not read back");
    }
}

/// A pack, and one whose table and records the input is: two bytes say how long the table is.
pub fn pack(bytes: &[u8]) {
    let Some(object) = object("packs/20261122T160312Z-1a2b3c4d/000000.data") else { return };
    read_pack(&object, bytes.to_vec());
    let Some((len, rest)) = bytes.split_first_chunk() else { return };
    let count = usize::from(u16::from_le_bytes(*len)).min(rest.len() / TABLE_ENTRY_LEN);
    let (table, records) = rest.split_at(count * TABLE_ENTRY_LEN);
    let head = header(PackKind::Data);
    let end = trailer(&object, PackKind::Data, table, (head.len() + records.len()) as u64, count as u32);
    read_pack(&object, [&head, records, &end].concat());
}

fn read_pack(object: &ObjectName, bytes: Vec<u8>) {
    let store = MemoryStore::new();
    let len = bytes.len() as u64;
    store.tamper(object, Some(bytes));
    let mut read = 0;
    let checked = check_pack(&store, object, PackKind::Data, len, |record| {
        read += record.bytes.len() as u64;
        Ok(())
    });
    let table = PackTable::read(&store, object, PackKind::Data, len);
    assert!(read <= len && checked.is_ok() == table.is_ok());
    for offset in [0, 16, 17, len, u64::MAX] {
        let _ = table.as_ref().map(|table| table.record(offset).map(|(len, _)| len));
        for record_len in [0, RECORD_CHECK_LEN as u32, 100, u32::MAX] {
            let _ = read_record(&store, object, offset, record_len);
        }
    }
}

/// The repository's header or a lease, and one whose first line the input is.
pub fn sealed_text(bytes: &[u8]) {
    let seal = blake3::hash(bytes).to_hex();
    for text in [bytes.to_vec(), [bytes, b"\n", seal.as_bytes(), b"\n"].concat()] {
        let _ = unseal::<Header>(&text, "here");
        if let Ok(lease) = unseal::<LeaseRecord>(&text, "here") {
            let _ = lease.to_string();
        }
    }
}
