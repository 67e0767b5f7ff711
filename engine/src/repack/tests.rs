use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::ErrorKind;
use crate::chunk::{ChunkId, Codec, Decoder, Encoder, Fingerprint, Shape};
use crate::progress::{Phase, Silent};
use crate::repo::{BackupId, Extent, Finished, LayerBuilder, PART_BLOCKS, PackInfo, check_pack};
use crate::store::{MemoryStore, ObjectName, Store};

/// Eight blocks make a full chunk.
const BLOCK_LEN: usize = 32 << 10;
/// Packs of a few chunks.
const PACK_LEN: u64 = 1000;

fn run_id(number: u8) -> BackupId {
    format!("20261122T160312Z-000000{number:02x}").parse().unwrap()
}

/// Everything but the packs of run 2.
fn not_run_2(pack: &DataPack) -> bool {
    pack.run != run_id(2)
}

/// A chunk of a world.
struct Known {
    chunk: ChunkRef,
    pack: DataPack,
    fingerprints: Vec<Fingerprint>,
}

/// A repository with chunks in the packs of three runs.
struct World {
    store: MemoryStore,
    repo: Repository,
    chunks: Vec<Known>,
}

/// A page that compresses well.
fn page(value: u32) -> Vec<u8> {
    (0..32).flat_map(|at| [(value as u8).wrapping_add(at) | 1; BLOCK_LEN / 32]).collect()
}

/// A page that does not compress.
fn noise(value: u32) -> Vec<u8> {
    let mut page = vec![0; BLOCK_LEN];
    blake3::Hasher::new().update(&value.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

impl World {
    /// One chunk for each entry: its run, and the values of its pages.
    fn new(chunks: &[(u8, Vec<u32>)], page: fn(u32) -> Vec<u8>) -> Self {
        let store = MemoryStore::new();
        let repo = Repository::init_in(Arc::new(store.clone()), "here".to_owned()).unwrap();
        let packers = [0, 1, 2].map(|run| packer(&store, run));
        let mut encoder = Encoder::new(Compression::Zstd(1)).unwrap();
        let add = |(run, values): &(u8, Vec<u32>)| {
            let raw: Vec<u8> = values.iter().flat_map(|value| page(*value)).collect();
            let fingerprints: Vec<_> = raw.chunks_exact(BLOCK_LEN).map(Fingerprint::of).collect();
            let (codec, stored) = encoder.encode(&raw, BLOCK_LEN).unwrap();
            let place = packers[usize::from(*run)].append(stored).unwrap();
            let chunk = ChunkRef {
                pack: 0,
                offset: place.offset,
                stored_len: stored.len() as u32,
                block_count: values.len() as u16,
                codec,
                id: ChunkId::of(&fingerprints),
            };
            Known { chunk, pack: DataPack { run: place.pack.run, seq: place.pack.seq }, fingerprints }
        };
        let chunks = chunks.iter().map(add).collect();
        packers.into_iter().for_each(|packer| drop(packer.finish().unwrap()));
        Self { store, repo, chunks }
    }

    fn object(&self, chunk: usize) -> ObjectName {
        data_object(self.chunks[chunk].pack)
    }

    fn place(&self, chunk: usize) -> String {
        format!("{} at {}", self.object(chunk), self.chunks[chunk].chunk.offset)
    }

    /// Flips a bit in the middle of a chunk.
    fn damage(&self, chunk: usize) {
        let mut bytes = self.store.get(&self.object(chunk), u64::MAX).unwrap();
        let ChunkRef { offset, stored_len, .. } = self.chunks[chunk].chunk;
        bytes[offset as usize + stored_len as usize / 2] ^= 4;
        self.store.tamper(&self.object(chunk), Some(bytes));
    }

    /// A layer of these pieces, each a chunk, its first block, and a number of blocks; after each piece comes a block that
    /// the layer does not map.
    fn layer(&self, pieces: &[(usize, u16, u32)]) -> Layer {
        let pieces: Vec<_> = pieces.iter().map(|(chunk, first, count)| Piece::Chunk(*chunk, *first, *count)).collect();
        let pieces = pieces.into_iter().flat_map(|piece| [piece, Piece::Gap(1)]);
        self.layer_of(&pieces.collect::<Vec<_>>())
    }

    /// A layer of these pieces; blocks of a chunk that it has already are left out, but the chunk is named anew.
    fn layer_of(&self, pieces: &[Piece]) -> Layer {
        let lens = pieces.iter().map(|piece| match piece {
            Piece::Gap(len) | Piece::Zero(len) | Piece::Chunk(_, _, len) => *len,
        });
        let mut builder = LayerBuilder::new(lens.sum());
        let (mut start, mut had) = (0, HashSet::new());
        for piece in pieces {
            match *piece {
                Piece::Gap(count) => start += count,
                Piece::Zero(count) => {
                    builder.push_zero(start, count);
                    start += count;
                }
                Piece::Chunk(index, first, count) => {
                    let Known { chunk, pack, fingerprints } = &self.chunks[index];
                    let source = builder.add_chunk(*chunk, *pack);
                    for block in (first..chunk.block_count).take(count as usize) {
                        if had.insert((index, block)) {
                            let fingerprint = &fingerprints[usize::from(block)..][..1];
                            builder.push(Extent { start, count: 1, source, first: block }, fingerprint);
                        }
                        start += 1;
                    }
                }
            }
        }
        let mut layer = builder.finish();
        layer.locations.limit /= 2;
        layer
    }

    fn mover<'a>(&'a self, data: &'a Packer, jobs: usize, progress: &'a dyn Progress) -> Mover<'a> {
        let compression = Compression::Zstd(1);
        Mover { from: &self.repo, cluster: cluster(), block_len: BLOCK_LEN, data, compression, jobs, progress }
    }

    /// Moves what `moves` says into packs of run 3 in `to`.
    fn move_to(&self, to: &MemoryStore, layers: &[Layer], jobs: usize, moves: Moves<'_>) -> Result<Outcome> {
        let (data, sum) = (packer(to, 3), Sum::default());
        let mover = self.mover(&data, jobs, &sum);
        let load = |layer: &Layer| Ok(layer.clone());
        let plan = mover.plan(layers, &load, moves)?;
        let mut moved_layers = Vec::new();
        let moved = mover.run(&plan, layers, &load, moves, &mut |job, layer| {
            assert_eq!(job, &layers[moved_layers.len()]);
            moved_layers.push(layer);
            Ok(())
        })?;
        assert_eq!(sum.0.into_inner(), plan.bytes());
        Ok(Outcome { layers: moved_layers, plan, moved, finished: data.finish_resumed()? })
    }
}

struct Outcome {
    layers: Vec<Layer>,
    plan: MovePlan,
    moved: Moved,
    finished: Finished,
}

/// Adds up what it is told.
#[derive(Default)]
struct Sum(AtomicU64);

impl Progress for Sum {
    fn begin(&self, _: Phase, _: u64) {}
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
    fn notice(&self, _: &str) {}
}

fn cluster() -> &'static ClusterName {
    static CLUSTER: std::sync::LazyLock<ClusterName> = std::sync::LazyLock::new(ClusterName::default);
    &CLUSTER
}

fn packer(store: &MemoryStore, run: u8) -> Packer {
    let store: Arc<dyn Store> = Arc::new(store.clone());
    Packer::resuming(store, cluster().clone(), run_id(run), PackKind::Data, BTreeSet::new())
        .unwrap()
        .with_pack_len(PACK_LEN)
}

fn data_object(pack: DataPack) -> ObjectName {
    PackName { run: pack.run, seq: pack.seq, kind: PackKind::Data }.object(cluster()).unwrap()
}

/// Every record of these packs, in order.
fn records(store: &MemoryStore, packs: &[PackInfo]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    for PackInfo { name, len } in packs {
        let check = check_pack(store, &name.object(cluster()).unwrap(), PackKind::Data, *len, |record| {
            assert!(record.sound);
            records.push(record.bytes.to_vec());
            Ok(())
        });
        check.unwrap();
    }
    records
}

/// Every block that a layer maps, read through it; the packs of run 3 are in `to`.
fn contents(layer: &Layer, from: &MemoryStore, to: &MemoryStore) -> BTreeMap<u32, Vec<u8>> {
    let Layer { locations, fingerprints } = layer;
    let mut fingerprints = fingerprints.iter();
    let mut blocks = BTreeMap::new();
    for extent in &locations.extents {
        let raw = extent.chunk().map(|index| {
            let chunk = &locations.chunks[index];
            read_chunk(chunk, locations.packs[chunk.pack as usize], from, to)
        });
        for block in 0..extent.count {
            let at = (usize::from(extent.first) + block as usize) * BLOCK_LEN;
            let page = raw.as_ref().map_or(vec![0; BLOCK_LEN], |raw| raw[at..at + BLOCK_LEN].to_vec());
            assert!(raw.is_none() || Fingerprint::of(&page) == *fingerprints.next().unwrap());
            assert_eq!(blocks.insert(extent.start + block, page), None);
        }
    }
    assert_eq!(fingerprints.next(), None);
    blocks
}

fn read_chunk(chunk: &ChunkRef, pack: DataPack, from: &MemoryStore, to: &MemoryStore) -> Vec<u8> {
    let mut stored = vec![0; chunk.stored_len as usize];
    let store = if pack.run == run_id(3) { to } else { from };
    store.get_range(&data_object(pack), chunk.offset, &mut stored).unwrap();
    let shape = Shape { block_len: BLOCK_LEN, block_count: usize::from(chunk.block_count) };
    Decoder::new().unwrap().decode(chunk.codec, &stored, shape, chunk.id).unwrap().0.to_vec()
}

/// The objects of a store with their bytes.
fn objects(store: &MemoryStore) -> Vec<(ObjectName, Vec<u8>)> {
    let objects = store.list("").unwrap().into_iter();
    objects.map(|object| (object.name.clone(), store.get(&object.name, object.len).unwrap())).collect()
}

#[derive(Clone, Debug)]
enum Piece {
    Gap(u32),
    Zero(u32),
    Chunk(usize, u16, u32),
}

fn chunk_lists() -> impl Strategy<Value = Vec<(u8, Vec<u32>)>> {
    prop::collection::vec((0u8..3, prop::collection::vec(0u32..50, 1..9)), 1..12)
}

fn jobs() -> impl Strategy<Value = Vec<Vec<Piece>>> {
    let piece = prop_oneof![
        1 => (1u32..4).prop_map(Piece::Gap),
        1 => (1u32..4).prop_map(Piece::Zero),
        4 => (0usize..12, 0u16..8, 1u32..9).prop_map(|(chunk, first, count)| Piece::Chunk(chunk, first, count)),
        4 => (0usize..12).prop_map(|chunk| Piece::Chunk(chunk, 0, 8)),
    ];
    prop::collection::vec(prop::collection::vec(piece, 0..8), 0..8)
}

/// The layers of generated jobs; pieces of chunks and blocks that the world does not have are cut to what it has.
fn layers(world: &World, jobs: &[Vec<Piece>]) -> Vec<Layer> {
    let clamp = |piece: &Piece| match *piece {
        Piece::Chunk(index, first, count) => {
            let index = index % world.chunks.len();
            let blocks = world.chunks[index].chunk.block_count;
            let first = first % blocks;
            Piece::Chunk(index, first, count.min(u32::from(blocks - first)))
        }
        ref other => other.clone(),
    };
    jobs.iter().map(|pieces| world.layer_of(&pieces.iter().map(clamp).collect::<Vec<_>>())).collect()
}

/// The blocks that the layers use of each chunk that is to be moved.
fn used(layers: &[Layer]) -> BTreeMap<(DataPack, u64), (ChunkRef, BTreeSet<u32>)> {
    let mut used = BTreeMap::new();
    for Layer { locations, .. } in layers {
        for extent in &locations.extents {
            let Some(index) = extent.chunk() else { continue };
            let chunk = locations.chunks[index];
            let pack = locations.packs[chunk.pack as usize];
            if not_run_2(&pack) {
                let entry: &mut (_, BTreeSet<u32>) =
                    used.entry((pack, chunk.offset)).or_insert((chunk, BTreeSet::new()));
                entry.1.extend((0..extent.count).map(|block| u32::from(extent.first) + block));
            }
        }
    }
    used
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn moved_layers_say_the_same_of_the_same_blocks(chunks in chunk_lists(), jobs in jobs()) {
        let world = World::new(&chunks, page);
        let layers = layers(&world, &jobs);
        let to = MemoryStore::new();
        let outcome = world.move_to(&to, &layers, 2, &not_run_2).unwrap();
        prop_assert_eq!(outcome.layers.len(), layers.len());
        for (old, new) in layers.iter().zip(&outcome.layers) {
            prop_assert_eq!(contents(old, &world.store, &to), contents(new, &world.store, &to));
            prop_assert_eq!(new.locations.block_count, old.locations.block_count);
            prop_assert_eq!(new.locations.limit, old.locations.limit);
            prop_assert_eq!(&new.fingerprints, &old.fingerprints);
            prop_assert!(new.locations.packs.iter().all(|pack| pack.run == run_id(2) || pack.run == run_id(3)));
            let encoded = new.locations.encode().unwrap();
            crate::repo::Locations::decode(&encoded, BLOCK_LEN, "here").unwrap();
        }
    }

    #[test]
    fn whole_chunks_are_copied_once_and_used_blocks_of_others_are_stored_once(chunks in chunk_lists(), jobs in jobs()) {
        let world = World::new(&chunks, page);
        let layers = layers(&world, &jobs);
        let to = MemoryStore::new();
        let Outcome { plan, moved, finished, .. } = world.move_to(&to, &layers, 2, &not_run_2).unwrap();
        let used = used(&layers);
        let is_whole = |(chunk, blocks): &&(ChunkRef, BTreeSet<u32>)| blocks.len() == usize::from(chunk.block_count);
        let (whole, mixed): (Vec<_>, Vec<_>) = used.values().partition(is_whole);
        let bytes = |chunks: &[&(ChunkRef, BTreeSet<u32>)]| chunks.iter().map(|(c, _)| u64::from(c.stored_len)).sum();
        prop_assert_eq!((plan.chunks_whole, plan.bytes_whole), (whole.len() as u64, bytes(&whole)));
        prop_assert_eq!((plan.chunks_mixed, plan.bytes_mixed), (mixed.len() as u64, bytes(&mixed)));
        prop_assert_eq!(plan.blocks_mixed, mixed.iter().map(|(_, blocks)| blocks.len() as u64).sum::<u64>());
        prop_assert_eq!(moved.chunks_moved, plan.chunks_whole);
        prop_assert_eq!(moved.chunks_recompressed, plan.blocks_mixed.div_ceil(8));
        let mut records = records(&to, &finished.packs);
        prop_assert_eq!(records.len() as u64, moved.chunks_moved + moved.chunks_recompressed);
        prop_assert_eq!(records.iter().map(|record| record.len() as u64).sum::<u64>(), moved.bytes_appended);
        for ((pack, offset), (chunk, _)) in used.iter().filter(|(_, used)| is_whole(used)) {
            let mut stored = vec![0; chunk.stored_len as usize];
            world.store.get_range(&data_object(*pack), *offset, &mut stored).unwrap();
            let copy = records.iter().position(|record| *record == stored);
            prop_assert!(copy.is_some());
            records.swap_remove(copy.unwrap());
        }
    }

    #[test]
    fn what_is_stored_does_not_depend_on_the_number_of_workers(chunks in chunk_lists(), jobs in jobs()) {
        let world = World::new(&chunks, page);
        let layers = layers(&world, &jobs);
        let (one, four) = (MemoryStore::new(), MemoryStore::new());
        let by_one = world.move_to(&one, &layers, 1, &not_run_2).unwrap();
        let by_four = world.move_to(&four, &layers, 4, &not_run_2).unwrap();
        prop_assert_eq!(by_one.layers, by_four.layers);
        // Two workers may read one table.
        prop_assert_eq!(Moved { bytes_read: 0, ..by_one.moved }, Moved { bytes_read: 0, ..by_four.moved });
        prop_assert_eq!(objects(&one), objects(&four));
    }

    #[test]
    fn damage_of_a_used_chunk_ends_the_run_and_is_named(chunks in chunk_lists(), jobs in jobs(), which: usize) {
        let world = World::new(&chunks, page);
        let layers = layers(&world, &jobs);
        let damaged = which % chunks.len();
        world.damage(damaged);
        let outcome = world.move_to(&MemoryStore::new(), &layers, 2, &not_run_2);
        let Known { chunk, pack, .. } = &world.chunks[damaged];
        if used(&layers).contains_key(&(*pack, chunk.offset)) {
            let error = outcome.err().unwrap();
            prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
            prop_assert_eq!(error.place().map(str::to_owned), Some(world.place(damaged)));
        } else {
            prop_assert!(outcome.is_ok());
        }
    }
}

#[test]
fn a_layer_of_which_nothing_moves_stays_as_it_is() {
    let world = World::new(&[(2, vec![1, 2, 3]), (2, vec![4])], page);
    let layer = world.layer(&[(0, 1, 2), (1, 0, 1)]);
    let to = MemoryStore::new();
    let outcome = world.move_to(&to, std::slice::from_ref(&layer), 2, &not_run_2).unwrap();
    assert_eq!((outcome.layers, outcome.moved), (vec![layer], Moved::default()));
    assert_eq!(objects(&to), []);
}

#[test]
fn no_jobs_move_nothing() {
    let world = World::new(&[(0, vec![1])], page);
    let outcome = world.move_to(&MemoryStore::new(), &[], 2, &not_run_2).unwrap();
    assert_eq!((outcome.plan.bytes(), outcome.moved), (0, Moved::default()));
}

#[test]
fn a_chunk_of_many_small_files_is_copied_once_as_it_is() {
    let world = World::new(&[(0, (0..8).collect())], page);
    let layers: Vec<_> = (0..8).map(|block| world.layer(&[(0, block, 1)])).collect();
    let to = MemoryStore::new();
    let outcome = world.move_to(&to, &layers, 2, &not_run_2).unwrap();
    assert_eq!((outcome.moved.chunks_moved, outcome.moved.chunks_recompressed), (1, 0));
    let places = outcome.layers.iter().map(|layer| layer.locations.chunks[0]);
    assert_eq!(places.map(|chunk| chunk.id).collect::<HashSet<_>>(), HashSet::from([world.chunks[0].chunk.id]));
}

#[test]
fn what_is_left_of_many_small_files_shares_a_chunk() {
    let world = World::new(&[(0, (0..8).collect()), (1, (8..16).collect())], page);
    let layers: Vec<_> =
        [(0, 1), (1, 3), (0, 5), (1, 4)].map(|(chunk, block)| world.layer(&[(chunk, block, 1)])).into();
    let to = MemoryStore::new();
    let outcome = world.move_to(&to, &layers, 2, &not_run_2).unwrap();
    assert_eq!((outcome.moved.chunks_moved, outcome.moved.chunks_recompressed), (0, 1));
    let firsts = outcome.layers.iter().map(|layer| layer.locations.extents[0].first);
    assert_eq!(firsts.collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn records_come_in_the_order_of_jobs_and_blocks() {
    let world = World::new(&[(0, vec![1]), (1, vec![2]), (0, vec![3, 4]), (1, vec![5])], page);
    let layers = [world.layer(&[(3, 0, 1), (0, 0, 1)]), world.layer(&[(2, 0, 2), (1, 0, 1)])];
    let to = MemoryStore::new();
    let outcome = world.move_to(&to, &layers, 4, &not_run_2).unwrap();
    let ids = |layer: &Layer| layer.locations.chunks.iter().map(|chunk| chunk.id).collect::<Vec<_>>();
    let expected = [3, 0, 2, 1].map(|chunk| world.chunks[chunk].chunk.id);
    assert_eq!(outcome.layers.iter().flat_map(ids).collect::<Vec<_>>(), expected);
    let placed = outcome.layers.iter().flat_map(|layer| {
        let packs = &layer.locations.packs;
        layer.locations.chunks.iter().map(|chunk| (packs[chunk.pack as usize], chunk.offset))
    });
    assert!(placed.collect::<Vec<_>>().is_sorted());
}

#[test]
fn many_batches_of_whole_and_mixed_chunks_end_as_one_would() {
    let chunks: Vec<_> = (0..160).map(|chunk| ((chunk % 2) as u8, (chunk * 8..chunk * 8 + 8).collect())).collect();
    let world = World::new(&chunks, noise);
    let parts = (0..16).map(|job| {
        let part = (job * 10..job * 10 + 10).map(|chunk| if chunk % 3 == 0 { (chunk, 2, 5) } else { (chunk, 0, 8) });
        world.layer(&part.collect::<Vec<_>>())
    });
    let layers: Vec<_> = parts.collect();
    let stores = [1, 3].map(|jobs| {
        let to = MemoryStore::new();
        let outcome = world.move_to(&to, &layers, jobs, &not_run_2).unwrap();
        for (old, new) in layers.iter().zip(&outcome.layers) {
            assert_eq!(contents(old, &world.store, &to), contents(new, &world.store, &to));
        }
        assert_eq!((outcome.moved.chunks_moved, outcome.moved.chunks_recompressed), (106, (54 * 5_u64).div_ceil(8)));
        to
    });
    assert_eq!(objects(&stores[0]), objects(&stores[1]));
}

#[test]
fn an_open_chunk_does_not_wait_for_ever() {
    let world = World::new(&[(0, vec![1, 2]), (0, vec![3, 4])], page);
    let mut builder = LayerBuilder::new(PART_BLOCKS);
    let chunk = ChunkRef { block_count: 1 << 15, codec: Codec::Raw, ..world.chunks[0].chunk };
    for start in (0..PART_BLOCKS).step_by(1 << 15) {
        let source = builder.add_chunk(chunk, DataPack { run: run_id(2), seq: 0 });
        builder.push(Extent { start, count: 1 << 15, source, first: 0 }, &[Fingerprint([1; 16]); 1 << 15]);
    }
    let kept = builder.finish();
    let mut layers = vec![kept; cut::WAITING_BLOCKS / PART_BLOCKS as usize];
    layers.insert(0, world.layer(&[(0, 0, 1)]));
    layers.push(world.layer(&[(1, 0, 1)]));
    let outcome = world.move_to(&MemoryStore::new(), &layers, 2, &not_run_2).unwrap();
    assert_eq!(outcome.moved.chunks_recompressed, 2);
}

#[test]
fn a_run_that_is_repeated_after_any_pack_ends_as_if_never_interrupted() {
    let chunks: Vec<_> = (0..24).map(|chunk| ((chunk % 2) as u8, (chunk * 8..chunk * 8 + 8).collect())).collect();
    let world = World::new(&chunks, page);
    let jobs = (0..8).map(|job| world.layer(&[(job * 3, 0, 8), (job * 3 + 1, 3, 4), (job * 3 + 2, 0, 8)]));
    let layers: Vec<_> = jobs.collect();
    let whole = MemoryStore::new();
    let outcome = world.move_to(&whole, &layers, 2, &not_run_2).unwrap();
    let stored = objects(&whole);
    assert!(stored.len() > 4, "{} packs", stored.len());
    for kept in 0..=stored.len() {
        let store = MemoryStore::new();
        for (name, bytes) in &stored[..kept] {
            store.put_new(name, &mut bytes.as_slice()).unwrap();
        }
        let again = world.move_to(&store, &layers, 2, &not_run_2).unwrap();
        assert_eq!(again.layers, outcome.layers);
        assert_eq!(again.finished.packs, outcome.finished.packs);
        let rest: usize = stored[kept..].iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(again.finished.bytes_written, rest as u64);
        assert_eq!(objects(&store), stored);
    }
}

/// The error of moving these layers, which is about the first chunk.
fn refused(world: &World, layers: &[Layer]) -> Error {
    let error = world.move_to(&MemoryStore::new(), layers, 2, &not_run_2).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(error.place(), Some(world.place(0).as_str()), "{error}");
    error
}

#[test]
fn a_map_that_is_wrong_about_a_chunk_is_refused() {
    let world = World::new(&[(0, vec![1, 2]), (0, vec![3, 4])], page);
    let spoilt = |pieces, change: fn(&mut Layer)| {
        let mut layer = world.layer(pieces);
        change(&mut layer);
        refused(&world, &[layer])
    };
    let whole = &[(0, 0, 2)];
    assert!(spoilt(whole, |l| l.locations.chunks[0].stored_len -= 1).what().contains("where the block map says"));
    let mixed = &[(0, 0, 1)];
    assert!(spoilt(mixed, |l| l.locations.chunks[0].id = ChunkId([7; 16])).what().contains("fingerprints"));
    assert!(spoilt(mixed, |l| l.fingerprints[0] = Fingerprint([7; 16])).what().contains("other blocks"));
}

#[test]
fn a_map_that_names_a_place_between_chunks_is_refused() {
    let world = World::new(&[(0, vec![1, 2]), (0, vec![3, 4])], page);
    let mut layer = world.layer(&[(0, 0, 2)]);
    layer.locations.chunks[0].offset += 1;
    let error = world.move_to(&MemoryStore::new(), &[layer], 2, &not_run_2).err().unwrap();
    assert!(error.what().contains("does not have"), "{error}");
}

#[test]
fn two_maps_that_disagree_about_a_chunk_are_refused() {
    let world = World::new(&[(0, vec![1, 2])], page);
    let changes: [fn(&mut ChunkRef); 3] =
        [|chunk| chunk.stored_len += 1, |chunk| chunk.block_count += 1, |chunk| chunk.id = ChunkId([7; 16])];
    for change in changes {
        for pieces in [[(0, 0, 2)], [(0, 0, 1)]] {
            let mut layers = [world.layer(&pieces), world.layer(&pieces)];
            change(&mut layers[1].locations.chunks[0]);
            assert!(refused(&world, &layers).what().contains("disagree"));
        }
    }
}

#[test]
fn a_missing_pack_and_a_damaged_table_are_named() {
    let world = World::new(&[(0, vec![1, 2])], page);
    let layers = [world.layer(&[(0, 0, 2)])];
    let error_with = |bytes: Option<Vec<u8>>| {
        world.store.tamper(&world.object(0), bytes);
        let error = world.move_to(&MemoryStore::new(), &layers, 2, &not_run_2).err().unwrap();
        assert_eq!(error.place(), Some(world.object(0).as_str()));
        error.kind()
    };
    let bytes = world.store.get(&world.object(0), u64::MAX).unwrap();
    let mut spoilt = bytes.clone();
    spoilt[bytes.len() - 60] ^= 1;
    assert_eq!(error_with(Some(spoilt)), ErrorKind::Corrupt);
    assert_eq!(error_with(None), ErrorKind::Missing);
}

#[test]
fn of_several_errors_that_of_the_earliest_job_is_told() {
    let chunks: Vec<_> = (0..20).map(|chunk| (0, vec![chunk])).collect();
    let world = World::new(&chunks, page);
    world.damage(3);
    let data = packer(&MemoryStore::new(), 3);
    let mover = world.mover(&data, 4, &Silent);
    let jobs: Vec<usize> = (0..20).collect();
    let load = |job: &usize| Ok(world.layer(&[(*job, 0, 1)]));
    let plan = mover.plan(&jobs, &load, &not_run_2).unwrap();
    let failing = |job: &usize| if *job == 2 { Err(Error::invalid("job 2")) } else { load(job) };
    let run = |load: Load<'_, usize>, done: &mut dyn FnMut(&usize, Layer) -> Result<()>| {
        mover.run(&plan, &jobs, load, &not_run_2, done).unwrap_err()
    };
    assert_eq!(run(&failing, &mut |_, _| Ok(())).what(), "job 2");
    assert_eq!(run(&load, &mut |_, _| Ok(())).place(), Some(world.place(3).as_str()));
}

#[test]
fn an_error_of_whoever_takes_the_layers_ends_the_run() {
    let chunks: Vec<_> = (0..20).map(|chunk| (0, vec![chunk])).collect();
    let world = World::new(&chunks, page);
    let data = packer(&MemoryStore::new(), 3);
    let mover = world.mover(&data, 2, &Silent);
    let layers: Vec<_> = (0..20).map(|chunk| world.layer(&[(chunk, 0, 1)])).collect();
    let load = |layer: &Layer| Ok(layer.clone());
    let plan = mover.plan(&layers, &load, &not_run_2).unwrap();
    let mut taken = 0;
    let error = mover.run(&plan, &layers, &load, &not_run_2, &mut |_, _| {
        taken += 1;
        if taken == 3 { Err(Error::invalid("enough")) } else { Ok(()) }
    });
    assert_eq!((error.unwrap_err().what(), taken), ("enough", 3));
}

#[test]
fn a_layer_that_was_read_without_fingerprints_is_not_moved() {
    let world = World::new(&[(0, vec![1, 2])], page);
    let mut layer = world.layer(&[(0, 0, 2)]);
    layer.fingerprints.clear();
    let error = world.move_to(&MemoryStore::new(), &[layer], 1, &not_run_2).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Bug);
}
