//! The fuzz targets, run for a while: true samples with a few seeded mutations each, and noise.
//!
//! `PGSTRATA_FUZZ_INPUTS` says how many inputs each decoder gets.

#[path = "support/forge.rs"]
mod forge;

use std::path::Path;

use forge::{FORGED, Origin};
use pgstrata_engine::detect::ChangeMap;
use pgstrata_engine::fuzz;
use pgstrata_engine::pg::{
    BlockNumber, DatabaseOid, ForkNumber, Lsn, RelFileLocator, RelFileNumber, SystemIdentifier, TablespaceOid,
    TimelineId, WalRange,
};
use pgstrata_engine::store::Store;

const INPUTS: u64 = 10_000;

/// A small generator of numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }

    fn byte(&mut self) -> u8 {
        // Bytes at which numbers and texts have borders, half of the time.
        const ODD: [u8; 16] =
            [0, 1, 0x7F, 0x80, 0xFF, 0xFE, b'\n', b'\r', b'\\', b'\'', b'"', b' ', b'0', b'9', b'/', b'.'];
        if self.below(2) == 0 { ODD[self.below(ODD.len())] } else { self.below(256) as u8 }
    }

    /// One to eight mutations: a bit, a byte, a run of bytes gone, doubled, or new, an end cut off.
    fn mutated(&mut self, sample: &[u8]) -> Vec<u8> {
        let mut bytes = sample.to_vec();
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len() + 1);
            let run = at..(at + 1 + self.below(9)).min(bytes.len()).max(at);
            match self.below(7) {
                0 | 1 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                2 | 3 if at < bytes.len() => bytes[at] = self.byte(),
                4 => drop(bytes.drain(run)),
                5 => {
                    let doubled = bytes[run].to_vec();
                    bytes.splice(at..at, doubled);
                }
                6 if self.below(8) == 0 => bytes.truncate(at),
                _ => bytes.insert(at, self.byte()),
            }
        }
        bytes
    }

    fn noise(&mut self) -> Vec<u8> {
        let len = self.below(200);
        (0..len).map(|_| self.byte()).collect()
    }
}

fn run(decode: fn(&[u8]), samples: &[Vec<u8>]) {
    let inputs = std::env::var("PGSTRATA_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(INPUTS);
    let mut random = Random(17);
    samples.iter().for_each(|sample| decode(sample));
    for number in 0..inputs {
        let input = match samples.get(number as usize % (samples.len() + 1)) {
            Some(sample) => random.mutated(sample),
            None => random.noise(),
        };
        let shown = input.clone();
        let outcome = std::panic::catch_unwind(|| decode(&input));
        assert!(outcome.is_ok(), "input {number}: {shown:02x?}");
    }
}

/// The same file of PostgreSQL 13 to 18.
fn artefacts(name: &str) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/artefacts");
    (13..=18).filter_map(|major| std::fs::read(root.join(format!("{major}/{name}"))).ok()).collect()
}

#[test]
fn no_manifest_makes_its_decoder_panic() {
    let origin = Origin::new();
    let (_, repo) = origin.forge(|_| {});
    let main = pgstrata_engine::repo::ClusterName::default();
    let manifest = repo.manifest(&main, FORGED.parse().unwrap()).unwrap();
    run(fuzz::manifest, &[serde_json::to_vec(&manifest).unwrap()]);
}

#[test]
fn no_block_map_makes_its_decoder_panic() {
    let mut samples = Vec::new();
    Origin::new().forge(|forgery| {
        for path in ["base/5/16384", "base/5/16384_vm", "global/pg_control"] {
            samples.push(postcard::to_stdvec(&forgery.locations(path)).unwrap());
        }
    });
    run(fuzz::locations, &samples);
    run(fuzz::fingerprints, &[vec![7; 160]]);
}

#[test]
fn no_page_of_a_file_table_makes_its_decoder_panic() {
    let mut samples = Vec::new();
    Origin::new().forge(|forgery| {
        let entries = forgery.entries.iter().filter(|entry| !entry.parts.is_empty()).take(3).cloned().collect();
        let page = forge::StoredPage { packs: forgery.packs.clone(), entries };
        samples.push(postcard::to_stdvec(&page).unwrap());
    });
    run(fuzz::page, &samples);
}

#[test]
fn no_pack_makes_its_reader_panic() {
    let (store, _) = Origin::new().forge(|_| {});
    let packs = store.list("clusters/main/packs/").unwrap().into_iter();
    let mut samples: Vec<_> = packs.map(|object| store.get(&object.name, object.len).unwrap()).collect();
    samples.iter_mut().for_each(|sample| drop(sample.drain(600.min(sample.len())..sample.len().max(1200) - 600)));
    samples.push([&[2, 0][..], &[8, 0, 0, 0], &[1; 16], &[8, 0, 0, 0], &[2; 16], &[3; 16]].concat());
    run(fuzz::pack, &samples);
    run(fuzz::chunk, &[zstd::bulk::compress(&[7; 8192], 1).unwrap(), vec![7; 8192]]);
}

#[test]
fn no_sealed_text_makes_its_decoder_panic() {
    let header = br#"{"pgstrata_repository":1,"id":"00","created":"2026-11-22T16:03:12Z"}"#;
    let lease = br#"{"operation":"backup","run":"20261122T160312Z-1a2b3c4d","uses":["20261122T160312Z-1a2b3c4d"],"owner":{"host":"a","pid":1,"started":1,"boot":"b","namespace":"c"},"acquired":"2026-11-22T16:03:12Z","expires":"2026-11-22T16:03:12Z"}"#;
    run(fuzz::sealed_text, &[header.to_vec(), lease.to_vec()]);
    run(
        fuzz::names,
        &[
            b"20261122T160312Z-1a2b3c4d".to_vec(),
            b"0/16B3748".to_vec(),
            b"clusters/main/packs/20261122T160312Z-1a2b3c4d/000001.data".to_vec(),
        ],
    );
}

#[test]
fn no_file_of_postgresql_makes_its_parser_panic() {
    run(fuzz::control, &artefacts("pg_control").into_iter().map(|bytes| bytes[..400].to_vec()).collect::<Vec<_>>());
    run(fuzz::backup_label, &artefacts("backup_label"));
    run(fuzz::tablespace_map, &artefacts("tablespace_map"));
    run(fuzz::history, &artefacts("00000004.history"));
    run(fuzz::relation_map, &artefacts("pg_filenode.map"));
    let files = br#"{ "PostgreSQL-Backup-Manifest-Version": 2,
"System-Identifier": 7711031876090026729,
"Files": [
{ "Path": "base/5/2619", "Size": 8192, "Last-Modified": "2026-11-22 16:22:30 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "994e7be2" },
{ "Encoded-Path": "ff", "Size": 0, "Last-Modified": "2026-11-22 16:22:30 GMT" }
],
"WAL-Ranges": [
{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000100" }
],
"#;
    run(fuzz::pg_manifest, &[files.to_vec()]);
}

#[test]
fn no_map_of_changes_makes_its_decoder_panic() {
    let mut map = ChangeMap::new(SystemIdentifier::new(7));
    let relation =
        |rel| RelFileLocator { spc: TablespaceOid::DEFAULT, db: DatabaseOid::new(5), rel: RelFileNumber::new(rel) };
    map.cover(WalRange { timeline: TimelineId::new(1), start: Lsn::new(40), end: Lsn::new(800) });
    map.replace_database(TablespaceOid::DEFAULT, DatabaseOid::new(9));
    map.set_limit(relation(2), ForkNumber::Main, BlockNumber::new(70_000));
    (0..40).for_each(|at| map.mark(relation(1), ForkNumber::Main, BlockNumber::new(at * at * 100)));
    let sparse = map.encode("x").unwrap();
    (0..5000).for_each(|at| map.mark(relation(3), ForkNumber::Main, BlockNumber::new(at)));
    let values = [&sparse, &map.encode("x").unwrap()].map(|object| {
        let frame = &object["pgstrata changes 1\n".len()..object.len() - 32];
        zstd::stream::decode_all(frame).unwrap()
    });
    run(fuzz::change_map, &values);
}

#[test]
fn no_wal_makes_the_walker_panic_or_stand_still() {
    let heads = artefacts("wal_segment_head");
    assert_eq!(heads.len(), 6);
    run(fuzz::wal, &heads.iter().map(|head| head[..head.len().min(4096)].to_vec()).collect::<Vec<_>>());
    // Mutations behind the first page of records are seldom; these are near its beginning.
    run(fuzz::wal, &heads.iter().map(|head| head[..head.len().min(300)].to_vec()).collect::<Vec<_>>());
}

#[test]
fn no_fragments_make_the_record_decoder_panic() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let locator = words(&[1663, 5, 16384]);
    // An image of 15 with a hole that is compressed, a block of the same relation, an origin, data.
    let blocks = [
        &[0x20, 10, 0, 0x30, 3, 0, 4, 0, 40, 0, 0x07, 0, 16][..],
        &locator,
        &[7, 0, 0, 0, 1, 0x82, 0, 0, 9, 0, 0, 0, 253, 1, 0, 252, 9, 0, 0, 0, 255, 2],
        &[1; 4],
        &[2; 3],
        &[5, 6],
    ];
    let commit = [&[0x81, 1, 255, 52], words(&[1, 1, 7, 5, 1663, 2, 8, 9, 1, 1663, 5, 16384, 3]).as_slice()].concat();
    let dropped = [&[0x21, 4, 255, 16], words(&[20, 2, 1663, 1700]).as_slice()].concat();
    let cut = [&[0x21, 2, 254, 24, 0, 0, 0], words(&[9, 1663, 5, 16384, 7, 0]).as_slice()].concat();
    run(fuzz::wal_record, &[blocks.concat(), commit, dropped, cut]);
}

#[test]
fn no_wal_summary_makes_its_reader_panic() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let list = [words(&[1663, 5, 16384, 0, 9, 2]), vec![3, 0, 1, 0, 1, 0, 2, 0, 9, 0, 4, 0]].concat();
    let bitmap = [words(&[1663, 5, 16385, 2, u32::MAX, 1]), vec![0, 16], vec![0x5A; 8192]].concat();
    let end = [0; 24];
    run(fuzz::wal_summary, &[[&list, &end[..]].concat(), [&list, &bitmap, &end[..]].concat()]);
    run(fuzz::wal_summary, &[b"0000000A00000001020000280000000102FFFFF0.summary".to_vec()]);
}
