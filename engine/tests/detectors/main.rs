//! The detectors against real servers: every block that differs between two quiesced copies of a cluster is named by them.
//!
//! [`furnish`](workload::furnish) and [`work`](workload::work) do all that PostgreSQL does to files; the oracles are the files themselves, byte by byte, the
//! server's own reading of its log (`pg_waldump`, `pg_walinspect`), and its summaries. What cannot be had is said: "skipped: ...".

mod oracle;
mod snapshot;
mod workload;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use pgstrata_engine::detect::{ChangeMap, CoverageCheck, FileLength, Summaries, WalChanges, WalFiles};
use pgstrata_engine::error::ErrorKind;
use pgstrata_engine::pg::{
    BlocksPerSegment, ForkNumber, Lsn, RelFileLocator, RelationFile, SegmentNumber, TimelineHistory, WalLevel,
    WalRange, WalSource,
};
use testdata::cluster::{Cluster, ClusterOptions, StopMode, succeed};
use testdata::servers::{Cache, Installation};

use snapshot::Snapshot;

macro_rules! for_majors {
    ($test:ident: $($name:ident = $major:literal),+ $(,)?) => {$(
        #[test]
        fn $name() {
            if let Some((server, tools)) = installations($major) {
                $test(&server, &tools);
            }
        }
    )+};
}

for_majors!(every_block_that_changed_is_in_the_log:
    changes_of_13 = 13, changes_of_14 = 14, changes_of_15 = 15, changes_of_16 = 16, changes_of_17 = 17,
    changes_of_18 = 18);
for_majors!(a_truncation_before_a_promotion_and_growth_after_it_are_in_the_log:
    promotion_of_13 = 13, promotion_of_15 = 15, promotion_of_18 = 18);
for_majors!(a_relation_that_takes_the_number_of_a_dropped_one_is_read_whole: reuse_of_18 = 18);
for_majors!(a_stretch_of_minimal_wal_is_noticed: minimal_of_13 = 13, minimal_of_16 = 16, minimal_of_18 = 18);

/// The server of `major` and the client programs; `None`, said aloud, where they cannot be had.
fn installations(major: u32) -> Option<(Arc<Installation>, Arc<Installation>)> {
    let found = Installation::with_tools(major, &Cache::for_tests().unwrap());
    found.map_err(|reason| eprintln!("skipped: no PostgreSQL {major} ({reason})")).ok()
}

/// Pages with checksums, so that hint bits are in the log; small segments, so that there are many.
fn options(major: u32) -> ClusterOptions {
    let options = ClusterOptions { wal_segment_mb: Some(1), ..ClusterOptions::default() };
    let options = ["wal_keep_size = 4GB", "autovacuum = off", "max_wal_size = 64MB", "checkpoint_timeout = 1h"]
        .iter()
        .fold(options, |options, line| options.conf(line));
    if major < 17 { options } else { options.conf("summarize_wal = on") }
}

/// The part of the log between two snapshots.
struct Between {
    source: WalSource,
    needed: Vec<WalRange>,
    start: Lsn,
    end: Lsn,
}

impl Between {
    fn of(old: &Snapshot, new: &Snapshot, pg_wal: &Path) -> Self {
        let (before, after) = (&old.control, &new.control);
        let files = WalFiles::list(&[pg_wal], after.wal_segment_size).unwrap();
        let source = WalSource {
            major: after.major_version(),
            system_identifier: after.system_identifier,
            segment_size: after.wal_segment_size,
            block_size: after.wal_block_size,
            history: files.history(after.timeline).unwrap(),
        };
        let (start, end) = (before.redo, after.checkpoint);
        let needed = source.history.wal_ranges(before.timeline, start, end).unwrap();
        Self { source, needed, start, end }
    }

    fn gather(&self, directories: &[&Path], new: &Snapshot) -> pgstrata_engine::Result<ChangeMap> {
        let files = WalFiles::list(directories, self.source.segment_size)?;
        assert_eq!(files.first_missing(&self.source.history, self.start, self.end), None);
        let mut changes = WalChanges::new(&self.source, new.control.block_size, WalLevel::Replica)?;
        files.walk(self.source.clone(), self.start, self.end, |record| changes.add(record))?;
        Ok(changes.finish(self.needed.iter().copied()))
    }
}

/// Stops the cluster and takes its picture.
fn snapshot(cluster: &mut Cluster) -> Snapshot {
    cluster.stop(StopMode::Fast).unwrap();
    Snapshot::take(cluster.data_dir())
}

fn every_block_that_changed_is_in_the_log(server: &Arc<Installation>, tools: &Arc<Installation>) {
    let major = server.major;
    let mut cluster = Cluster::create(server, tools, &options(major)).unwrap();
    workload::furnish(&cluster);
    let before = snapshot(&mut cluster);
    cluster.start().unwrap();
    workload::work(&mut cluster);
    let untouched = snapshot::locator_of(&cluster, "untouched");
    let spgist = workload::spgist_indexes(&cluster);
    let after = snapshot(&mut cluster);

    let pg_wal = cluster.data_dir().join("pg_wal");
    let between = Between::of(&before, &after, &pg_wal);
    let map = between.gather(&[&pg_wal], &after).unwrap();
    assert_eq!(map.coverage().check(&between.needed), CoverageCheck::Covered);

    let missed = after.changes_since(&before).filter(|(file, block)| {
        // The first page of an SP-GiST index holds a cache of free space that no record tells.
        let is_cache = spgist.contains(&file.locator) && block.as_u32() == 0;
        !is_cache && !after.is_read(&map, &before, *file, *block)
    });
    let missed: Vec<_> = missed.map(|(file, block)| format!("{} block {block}", file.locator)).collect();
    assert!(missed.is_empty(), "{} changed blocks are not in the map: {missed:?}", missed.len());
    let changed = after.changes_since(&before).count();
    assert!(changed > 3000, "only {changed} blocks changed");
    assert!(after.runs(&map, &before, untouched).is_empty(), "a table that nobody touched is read");

    let name = "changes";
    let object = map.encode(name).unwrap();
    assert_eq!(ChangeMap::decode(&object, name).unwrap(), map);
    println!("{major}: {changed} blocks changed, {} marked, object of {} bytes", map.marked_count(), object.len());
    archives_say_the_same(&cluster, &between, &after, &map);
    cluster.start().unwrap();
    records_are_decoded_as_by_the_server(&cluster, &between, &after);
    if major >= 17 {
        summaries_say_the_same(&mut cluster, &between, &map);
    }
}

fn a_relation_that_takes_the_number_of_a_dropped_one_is_read_whole(
    server: &Arc<Installation>,
    tools: &Arc<Installation>,
) {
    let mut cluster = Cluster::create(server, tools, &options(server.major)).unwrap();
    let rows = cluster.user().make_dir(cluster.scratch(), "rows").unwrap().join("rows");
    cluster.sql("postgres", "CREATE TABLE old AS SELECT i, repeat('x', 500) FROM generate_series(1, 9000) i").unwrap();
    let old = snapshot::locator_of(&cluster, "old");
    let copy = format!("COPY (SELECT * FROM old LIMIT 1700) TO '{}'", rows.display());
    cluster.sql("postgres", &copy).unwrap();
    cluster.stop(StopMode::Fast).unwrap();
    // As if the counter of numbers had come round.
    let mut reset = cluster.tool("pg_resetwal").unwrap();
    succeed(reset.args(["-o", &old.rel.to_string()]).arg(cluster.data_dir())).unwrap();
    cluster.start().unwrap();
    let before = snapshot(&mut cluster);
    cluster.start().unwrap();
    // The file is gone for good after a checkpoint, and the next relation of that number is the first one made.
    cluster
        .sql_each(
            "postgres",
            &["DROP TABLE old", "CHECKPOINT", "VACUUM pg_class", "CREATE TABLE new (i int, content text)"],
        )
        .unwrap();
    assert_eq!(snapshot::locator_of(&cluster, "new"), old);
    // It is extended by more pages than are filled; they are in no record.
    cluster.sql("postgres", &format!("COPY new FROM '{}'", rows.display())).unwrap();
    let unfilled = "SELECT pg_relation_size('new') / 8192 - 1 > (max(ctid)::text::point)[0] FROM new";
    assert_eq!(cluster.query_value("postgres", unfilled).unwrap(), "t");
    let after = snapshot(&mut cluster);
    let pg_wal = cluster.data_dir().join("pg_wal");
    let map = Between::of(&before, &after, &pg_wal).gather(&[&pg_wal], &after).unwrap();
    let missed = after.changes_since(&before).find(|(file, block)| !after.is_read(&map, &before, *file, *block));
    assert_eq!(missed, None);
}

/// An archive that keeps every segment in another way, and nothing else.
fn archives_say_the_same(cluster: &Cluster, between: &Between, after: &Snapshot, expected: &ChangeMap) {
    let pg_wal = cluster.data_dir().join("pg_wal");
    let archive = tempfile::tempdir().unwrap();
    for (number, entry) in fs::read_dir(&pg_wal).unwrap().enumerate() {
        let path = entry.unwrap().path();
        if !path.is_file() {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let (suffix, stored) = match number % 4 {
            0 => (".gz", gzip(&bytes)),
            1 => (".zst", zstd::bulk::compress(&bytes, 1).unwrap()),
            2 => (".lz4", lz4(&bytes)),
            _ => ("", bytes),
        };
        let name = path.file_name().unwrap().to_str().unwrap();
        fs::write(archive.path().join(format!("{name}{suffix}")), stored).unwrap();
    }
    assert_eq!(&between.gather(&[archive.path()], after).unwrap(), expected);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn records_are_decoded_as_by_the_server(cluster: &Cluster, between: &Between, after: &Snapshot) {
    let Some(theirs) = oracle::records(cluster, between.start, between.end) else { return };
    let files = WalFiles::list(&[&cluster.data_dir().join("pg_wal")], between.source.segment_size).unwrap();
    let ours = oracle::decoded(&files, &between.source, after.control.block_size, between.start, between.end);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
    let images = ours.iter().filter(|record| record.contains("hole")).count();
    println!("{}: {} records are the same, {images} with images", cluster.server().major, ours.len());
    assert!(ours.len() > 10_000 && images > 100);
}

fn summaries_say_the_same(cluster: &mut Cluster, between: &Between, wal: &ChangeMap) {
    let directory = cluster.data_dir().join("pg_wal/summaries");
    let needed = &between.needed;
    let covers = |_: &Cluster| Summaries::list(&directory).unwrap().check(needed) == CoverageCheck::Covered;
    cluster.wait_for("the summarizer", covers).unwrap();
    let mut summaries = Summaries::list(&directory).unwrap();
    let beyond = WalRange { end: Lsn::new(u64::MAX), ..needed[0] };
    assert!(matches!(summaries.check(&[beyond]), CoverageCheck::MissingFrom(lsn) if lsn >= between.end));
    let summary = summaries.changes(between.source.system_identifier, needed).unwrap();
    let covered: Vec<_> = summary.coverage().ranges().collect();
    assert_eq!(
        covered,
        wal.coverage().ranges().collect::<Vec<_>>(),
        "summaries end at checkpoints, as the snapshots do"
    );
    assert_same_reading(wal, &summary);
    println!("{}: summaries name the same blocks", cluster.server().major);
}

/// Proves that two maps make every file of every relation be read in the same places.
fn assert_same_reading(wal: &ChangeMap, summary: &ChangeMap) {
    let databases = |map: &ChangeMap| map.replaced_databases().collect::<Vec<_>>();
    assert_eq!(databases(wal), databases(summary));
    let full = BlocksPerSegment::DEFAULT;
    let len = FileLength { block_count: full.as_u32(), parent_block_count: full.as_u32() };
    let reads = |map: &ChangeMap, locator: RelFileLocator| -> Vec<_> {
        let file = RelationFile { locator, fork: ForkNumber::Main, segment: SegmentNumber::new(0) };
        map.runs(file, full, len).collect()
    };
    let limits = |map: &ChangeMap| map.relations().collect::<std::collections::BTreeMap<_, _>>();
    for (locator, limit) in limits(wal).into_iter().chain(limits(summary)) {
        assert_eq!(reads(wal, locator), reads(summary, locator), "{locator}, limit {limit:?}");
    }
}

fn a_truncation_before_a_promotion_and_growth_after_it_are_in_the_log(
    server: &Arc<Installation>,
    tools: &Arc<Installation>,
) {
    let primary = Cluster::create(server, tools, &options(server.major)).unwrap();
    let fill = |from, to| format!("INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series({from}, {to}) i");
    primary.sql_each("postgres", &["CREATE TABLE t (id int, content text)", &fill(1, 3000)]).unwrap();
    let mut standby = primary.make_standby().unwrap();
    primary.sql_each("postgres", &["CHECKPOINT"]).unwrap();
    catch_up(&primary, &mut standby);
    let before = snapshot(&mut standby);
    standby.start().unwrap();
    primary.sql_each("postgres", &["DELETE FROM t WHERE id > 1500", "VACUUM t", "CHECKPOINT"]).unwrap();
    catch_up(&primary, &mut standby);
    standby.promote().unwrap();
    standby.sql_each("postgres", &[&fill(4000, 5000), "DELETE FROM t WHERE id = 7", "CHECKPOINT"]).unwrap();
    let table = snapshot::locator_of(&standby, "t");
    let after = snapshot(&mut standby);

    let pg_wal = standby.data_dir().join("pg_wal");
    let between = Between::of(&before, &after, &pg_wal);
    let timelines: Vec<_> = between.needed.iter().map(|range| range.timeline.as_u32()).collect();
    assert_eq!(timelines, [2, 1]);
    let map = between.gather(&[&pg_wal], &after).unwrap();
    let missed = after.changes_since(&before).find(|(file, block)| !after.is_read(&map, &before, *file, *block));
    assert_eq!(missed, None);
    let (_, limit) = map.relations().find(|(locator, _)| *locator == table).unwrap();
    let limit = limit.expect("the truncation on timeline 1");
    assert!(map.is_read(table, ForkNumber::Main, limit), "growth on timeline 2 does not undo it");

    // The history without timeline 2 is another cluster's.
    let alone = TimelineHistory::without_ancestors(after.control.timeline);
    let files = WalFiles::list(&[&pg_wal], between.source.segment_size).unwrap();
    assert!(files.first_missing(&alone, between.start, between.end).is_some());
    if server.major >= 17 {
        standby.start().unwrap();
        summaries_say_the_same(&mut standby, &between, &map);
    }
}

fn catch_up(primary: &Cluster, standby: &mut Cluster) {
    let lsn = primary.query_value("postgres", "SELECT pg_current_wal_lsn()").unwrap();
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'::pg_lsn");
    let caught_up = |standby: &Cluster| standby.query_value("postgres", &replayed).is_ok_and(|value| value == "t");
    standby.wait_for("the standby to catch up", caught_up).unwrap();
}

fn a_stretch_of_minimal_wal_is_noticed(server: &Arc<Installation>, tools: &Arc<Installation>) {
    let mut cluster = Cluster::create(server, tools, &options(server.major)).unwrap();
    let before = snapshot(&mut cluster);
    let level = |level: &str| [format!("wal_level = {level}"), "max_wal_senders = 0".to_owned()];
    // The summarizer needs more than minimal, and 17 refuses to start with both.
    let summarize = |on: &str| if server.major < 17 { vec![] } else { vec![format!("summarize_wal = {on}")] };
    cluster.add_conf(&[level("minimal").to_vec(), summarize("off")].concat()).unwrap();
    cluster.start().unwrap();
    let load = "CREATE TABLE t AS SELECT i, repeat('x', 500) AS content FROM generate_series(1, 9000) i";
    cluster.sql("postgres", load).unwrap();
    let table = snapshot::locator_of(&cluster, "t");
    cluster.stop(StopMode::Fast).unwrap();
    cluster.add_conf(&[level("replica").to_vec(), summarize("on")].concat()).unwrap();
    cluster.start().unwrap();
    let after = snapshot(&mut cluster);

    let pg_wal = cluster.data_dir().join("pg_wal");
    let between = Between::of(&before, &after, &pg_wal);
    let error = between.gather(&[&pg_wal], &after).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.what().contains("wal_level is minimal from"), "{error}");
    assert!(after.changes_since(&before).any(|(file, _)| file.locator == table));
    if server.major >= 17 {
        let summaries = Summaries::list(&pg_wal.join("summaries")).unwrap();
        assert!(matches!(summaries.check(&between.needed), CoverageCheck::MissingFrom(_)));
    }
}
