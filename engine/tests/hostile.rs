//! Forged repositories: whatever they say, nothing is written outside of the target, no server starts on half a cluster, memory stays
//! bounded, and nothing panics.
//!
//! Each case runs every command that reads a repository. The whole runs in a process of its own that may not take more memory than
//! [`MEMORY_KIB`].

#[path = "support/forge.rs"]
mod forge;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use forge::{FORGED, Forgery, Origin, StoredLayer, StoredPart, offline};
use pgstrata_engine::backup::ParentChoice;
use pgstrata_engine::expire::{self, Count, Policy, Selection};
use pgstrata_engine::export::{self, FileFormat};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{
    ByteString, ClusterName, CorruptPage, DataPack, Extent, FileKind, PackInfo, Repository, Setting,
    TablespaceLocation, WalSpan,
};
use pgstrata_engine::store::{LocalStore, MemoryStore, Store};
use pgstrata_engine::{Error, ErrorKind, backup, merge, restore, verify};

type Change = fn(&mut Forgery);

/// Address space of the process that reads forged repositories.
const MEMORY_KIB: u64 = 1_300_000;
/// Where forged tablespaces may be.
const SPACE: &str = "space";
const RELATION: &str = "base/5/16384";

/// Runs a test of this file again in a process with little memory; whether this is that process.
fn with_little_memory(test: &str) -> bool {
    if std::env::var_os("PGSTRATA_LITTLE_MEMORY").is_some() {
        return true;
    }
    let script = format!("ulimit -v {MEMORY_KIB} && exec \"$0\" --exact \"$1\" --test-threads=1 --nocapture");
    let mut child = Command::new("sh");
    child.args(["-c", &script]).arg(std::env::current_exe().unwrap()).arg(test);
    let output = child.env("PGSTRATA_LITTLE_MEMORY", "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
    false
}

/// Everything below a directory, without following links; lengths of files.
fn everything(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            found.insert(entry.path(), if metadata.is_file() { metadata.len() } else { 0 });
            if metadata.is_dir() {
                left.push(entry.path());
            }
        }
    }
    found
}

/// What restoring and exporting a forged backup came to.
#[derive(Debug)]
struct Outcome {
    restored: Option<Error>,
    plain: Option<Error>,
    tar: Option<Error>,
}

impl Outcome {
    fn all(&self) -> [&Option<Error>; 3] {
        [&self.restored, &self.plain, &self.tar]
    }
}

/// Runs every command on a forged repository.
fn run_everything(origin: &Origin, case: &str, change: impl FnOnce(&mut Forgery)) -> Outcome {
    let main = ClusterName::default();
    let scratch = origin.scratch.path();
    let no_bug = |what: &str, error: Option<&Error>| {
        assert!(error.is_none_or(|error| error.kind() != ErrorKind::Bug), "{case}: {what}: {}", error.unwrap());
    };
    let (forged, _) = origin.forge(change);
    let fresh = || origin.open(&forged);
    let before = everything(scratch);
    let target = scratch.join("target");
    let clean = |what: &str| {
        for root in [&target, &scratch.join(SPACE)] {
            let _ = fs::remove_dir_all(root);
        }
        assert_eq!(everything(scratch), before, "{case}: {what} wrote outside of its target");
    };

    let repo = fresh();
    let _ = repo.catalog(&main).unwrap().backups().len();
    for quick in [true, false] {
        let options = verify::Options { quick, jobs: None };
        no_bug("verify", verify::run(&repo, &main, "all", &options, &Silent).err().as_ref());
    }
    let options = restore::Options { target: target.clone(), tablespace_map: vec![], archive_mode: false, jobs: None };
    let planned = restore::plan(&repo, &main, FORGED, &options).err();
    clean("a plan");
    let restored = restore::run(&repo, &main, FORGED, &options, &Silent).err();
    no_bug("restore", restored.as_ref());
    assert!(planned.is_none() || restored.is_some(), "{case}");
    assert_eq!(target.join("global/pg_control").exists(), restored.is_none(), "{case}: {restored:?}");
    clean("restore");

    let mut exported = [FileFormat::Plain, FileFormat::Tar].map(|format| {
        let options = export::FilesOptions { target: target.clone(), format, tablespace_map: vec![], jobs: None };
        let error = export::to_files(&repo, &main, FORGED, &options, &Silent).err();
        no_bug("export", error.as_ref());
        let finished = ["global/pg_control", "backup_manifest"][usize::from(format == FileFormat::Tar)];
        assert_eq!(target.join(finished).exists(), error.is_none(), "{case}: {error:?}");
        clean("export");
        error
    });

    for repack in [false, true] {
        let repo = fresh();
        let options = merge::Options { backup: FORGED.to_owned(), repack, ..merge::Options::default() };
        no_bug("merge plan", merge::plan(&repo, &options).err().as_ref());
        no_bug("merge", merge::run(&repo, &options, &Silent).err().as_ref());
    }
    let policy = Policy { last: Some(Count::Number(1)), ..Policy::default() };
    let options = expire::Options {
        cluster: main.clone(),
        selection: Selection::Policy(policy),
        force: false,
        max_unused: Some(0),
        compression: backup::Compression::default(),
        jobs: None,
    };
    no_bug("expire plan", expire::plan(&repo, &options).err().as_ref());
    no_bug("expire", expire::run(&fresh(), &options, &Silent).err().as_ref());
    let other = Repository::init_in(Arc::new(MemoryStore::new()), "elsewhere".to_owned()).unwrap();
    let options = export::Options { backup: FORGED.to_owned(), ..export::Options::default() };
    no_bug("export plan", export::plan(&repo, &other, &options).err().as_ref());
    no_bug("export to a repository", export::to_repository(&repo, &other, &options, &Silent).err().as_ref());

    let repo = fresh();
    for parent in [ParentChoice::Automatic, ParentChoice::Named(FORGED.to_owned())] {
        let options = backup::Options { parent, ..offline(&origin.cluster()) };
        no_bug("backup", backup::run(&repo, &options, &Silent).err().as_ref());
    }
    clean("something");
    let tar = exported[1].take();
    Outcome { restored, plain: exported[0].take(), tar }
}

/// Every way of writing the backup out refuses it as damage.
fn refused(origin: &Origin, case: &str, change: impl FnOnce(&mut Forgery)) {
    let outcome = run_everything(origin, case, change);
    for error in outcome.all() {
        let kind = error.as_ref().map(Error::kind);
        let refused =
            matches!(kind, Some(ErrorKind::Corrupt | ErrorKind::Invalid | ErrorKind::Missing | ErrorKind::Unsupported));
        assert!(refused, "{case}: {outcome:?}");
    }
}

/// The same for what takes long to read: it is verified and restored only.
fn refused_at_once(origin: &Origin, case: &str, change: impl FnOnce(&mut Forgery)) {
    let (_, repo) = origin.forge(change);
    let main = ClusterName::default();
    let report = verify::run(&repo, &main, "all", &verify::Options::default(), &Silent).unwrap();
    assert!(!report.damage.is_empty(), "{case}");
    let target = origin.scratch.path().join("target");
    let options = restore::Options { target: target.clone(), tablespace_map: vec![], archive_mode: false, jobs: None };
    let error = restore::run(&repo, &main, FORGED, &options, &Silent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{case}: {error}");
    assert!(!target.join("global/pg_control").exists(), "{case}");
    let _ = fs::remove_dir_all(&target);
}

/// The backup is written out, with whatever it says.
fn harmless(origin: &Origin, case: &str, change: impl FnOnce(&mut Forgery)) {
    let outcome = run_everything(origin, case, change);
    assert!(outcome.all().iter().all(|error| error.is_none()), "{case}: {outcome:?}");
}

#[test]
fn a_forgery_that_lies_about_nothing_is_a_backup() {
    harmless(&Origin::new(), "nothing", |_| {});
}

#[test]
fn no_path_leads_out_of_the_target() {
    let origin = Origin::new();
    let long = [b"base/".as_slice(), &[b'x'; 5000]].concat();
    let paths: [&[u8]; 19] = [
        b"",
        b"..",
        b"../out",
        b"base/../../out",
        b"/etc/out",
        b"/../out",
        b"base//out",
        b"base/./out",
        b"base/",
        b"base/\0out",
        b"nowhere/out",
        b"base/5/16384/out",
        b"pg_wal/a/b",
        b"pg_tblspc/16384/out",
        b"PG_VERSION/out",
        b"base/5/../5/16384",
        b"./PG_VERSION",
        b"global/../PG_VERSION",
        &long,
    ];
    for path in paths {
        let case = String::from_utf8_lossy(&path[..path.len().min(40)]).into_owned();
        refused(&origin, &format!("file {case:?}"), |forgery| forgery.add(path, FileKind::File));
        if !path.starts_with(b"/etc") {
            run_everything(&origin, &format!("directory {case:?}"), |forgery| forgery.add(path, FileKind::Directory));
        }
    }
}

#[test]
fn each_kind_of_file_has_its_place() {
    let origin = Origin::new();
    for path in ["base/out", "/a/b", "//a", "/", "/../a", "pg_hba.conf2"] {
        let outcome = run_everything(&origin, path, |forgery| forgery.add(path, FileKind::External));
        assert!(outcome.restored.is_some(), "{path}");
    }
    for path in ["standby.signal", "base/x", "pg_wal/../x", "pg_wal/a/b", "/pg_wal/x"] {
        refused(&origin, path, |forgery| forgery.add(path, FileKind::Wal));
    }
}

#[test]
fn a_path_is_there_once() {
    let origin = Origin::new();
    refused(&origin, "twice", |forgery| forgery.entries.push(forgery.entries[3].clone()));
    refused(&origin, "one after the other", |forgery| forgery.entries.insert(3, forgery.entries[3].clone()));
    refused(&origin, "backwards", |forgery| forgery.entries.reverse());
    refused(&origin, "without pg_control", |forgery| forgery.entries.retain(|e| e.path != b"global/pg_control"));
    let twice_outside = |forgery: &mut Forgery| forgery.add("/postgresql.auto.conf", FileKind::External);
    run_everything(&origin, "instead of another", twice_outside);
}

/// A tablespace in a directory, and a file in it.
fn tablespace(forgery: &mut Forgery, location: &Path, files: &[(&str, FileKind)]) {
    let location = ByteString(location.as_os_str().as_encoded_bytes().to_vec());
    forgery.manifest.tablespaces = vec![TablespaceLocation { oid: 16400, location: Some(location) }];
    forgery.add("pg_tblspc/16400", FileKind::Directory);
    for (path, kind) in files {
        forgery.add(format!("pg_tblspc/16400/{path}"), *kind);
    }
}

#[test]
fn a_tablespace_is_a_directory_of_its_own_with_its_version_in_it() {
    let origin = Origin::new();
    let scratch = origin.scratch.path().to_owned();
    let place = scratch.join(SPACE);
    for path in ["authorized_keys", ".ssh", "PG_16_1", "x/y"] {
        refused(&origin, path, |forgery| tablespace(forgery, &place, &[(path, FileKind::File)]));
    }
    let file: &[(&str, FileKind)] = &[];
    for location in ["relative", "", "/", "/tmp/../tmp/out", "/tmp/./out", "/tmp//out", "/tmp/out/", "/tmp/a\0b"] {
        refused(&origin, location, |forgery| tablespace(forgery, Path::new(location), file));
    }
    let inside = ["target", "target/space", "nowhere", "nowhere/space", "cluster/space", "cluster", ""];
    for name in inside {
        let outcome = run_everything(&origin, name, |forgery| tablespace(forgery, &scratch.join(name), file));
        assert!(outcome.restored.is_some() && outcome.plain.is_some(), "{name}: {outcome:?}");
    }
    let twice = |oids: [u32; 2], places: [&str; 2]| {
        let place = |name: &str| ByteString(scratch.join(name).as_os_str().as_encoded_bytes().to_vec());
        let tablespaces = [0, 1].map(|at| TablespaceLocation { oid: oids[at], location: Some(place(places[at])) });
        run_everything(&origin, "two tablespaces", move |forgery| forgery.manifest.tablespaces = tablespaces.to_vec())
    };
    assert!(twice([16400, 16400], ["space", "other"]).restored.is_some());
    assert!(twice([16400, 16401], ["space", "space"]).restored.is_some());
    assert!(twice([16400, 16401], ["space", "space/below"]).restored.is_some());
}

#[test]
fn nothing_is_written_through_a_link_of_the_target() {
    let origin = Origin::new();
    let space = origin.scratch.path().join(SPACE);
    // Spelled otherwise it is another directory, not a way through the link.
    for name in ["016400", "+16400"] {
        refused(&origin, name, |forgery| {
            tablespace(forgery, &space, &[]);
            forgery.add(format!("pg_tblspc/{name}/x"), FileKind::File);
        });
    }
    // What is a file cannot become a link.
    let outcome = run_everything(&origin, "a file", |forgery| {
        tablespace(forgery, &space, &[]);
        forgery.entry("pg_tblspc/16400").kind = FileKind::File.into();
    });
    assert!(outcome.restored.is_some());
}

#[test]
fn recovery_is_not_led_to_a_tablespace_that_the_backup_does_not_have() {
    let origin = Origin::new();
    let label = |forgery: &mut Forgery| {
        forgery.manifest.offline = false;
        let (lsn, timeline) = (forgery.manifest.start_lsn, forgery.manifest.start_timeline);
        let segment = lsn.as_u64() / u64::from(forgery.manifest.wal_segment_size);
        let text = format!(
            "START WAL LOCATION: {lsn} (file {:08X}00000000{segment:08X})\nCHECKPOINT LOCATION: {lsn}\nBACKUP METHOD: streamed\n\
             BACKUP FROM: primary\nSTART TIME: now\nLABEL: x\nSTART TIMELINE: {timeline}\n",
            timeline.as_u32()
        );
        forgery.manifest.backup_label = Some(ByteString(text.into_bytes()));
    };
    let map = |text: &'static [u8]| {
        move |forgery: &mut Forgery| {
            label(forgery);
            forgery.manifest.tablespace_map = Some(ByteString(text.to_vec()));
        }
    };
    let (_, repo) = origin.forge(map(b"16400 /etc\n"));
    let target = origin.scratch.path().join("target");
    let options = restore::Options { target: target.clone(), tablespace_map: vec![], archive_mode: false, jobs: None };
    restore::run(&repo, &ClusterName::default(), FORGED, &options, &Silent).unwrap();
    assert!(!target.join("tablespace_map").exists());
    fs::remove_dir_all(&target).unwrap();
    for text in [&b"16400 /etc"[..], b"1 /a\n1 /b\n", b"x\n", b"1 /a\rb\n", b"\0\n", b"-1 /etc\n"] {
        let outcome = run_everything(&origin, &String::from_utf8_lossy(text), map(text));
        assert!(outcome.restored.is_some() && outcome.tar.is_some(), "{outcome:?}");
    }
    let labels: [fn(&str) -> String; 5] = [
        |_| String::new(),
        |text| text.replace("START WAL LOCATION: 0/", "START WAL LOCATION: 1/"),
        |text| text.replace("LABEL: x", "LABEL: x\nSTART TIMELINE: 9"),
        |text| text.to_owned() + "INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 1\n",
        |text| text.replace("CHECKPOINT", "\x1b[2JCHECKPOINT"),
    ];
    for change in labels {
        refused(&origin, &change("START WAL LOCATION: 0/"), |forgery| {
            label(forgery);
            let text = String::from_utf8(forgery.manifest.backup_label.take().unwrap().0).unwrap();
            forgery.manifest.backup_label = Some(ByteString(change(&text).into_bytes()));
        });
    }
    refused(&origin, "no label", |forgery| forgery.manifest.offline = false);
}

#[test]
fn no_setting_brings_another_one_with_it() {
    let origin = Origin::new();
    let settings = [
        ("work_mem", "'8MB'\narchive_command = 'rm -rf ~'"),
        ("a\narchive_command", "'x'"),
        ("data_directory", "'/original'"),
        ("include", "'/original'"),
        ("work_mem", "'"),
    ];
    for (name, value) in settings {
        let outcome = run_everything(&origin, name, |forgery| {
            let value = ByteString(value.as_bytes().to_vec());
            forgery.manifest.settings = vec![Setting { name: name.to_owned(), value }];
        });
        assert_eq!(outcome.restored.map(|error| error.kind()), Some(ErrorKind::Corrupt), "{name}");
    }
}

#[test]
fn absurd_counts_and_lengths_are_refused_in_little_memory() {
    if !with_little_memory("absurd_counts_and_lengths_are_refused_in_little_memory") {
        return;
    }
    let origin = Origin::new();
    let lens = [u64::MAX, u64::MAX / 2, 1 << 60, 1 << 50];
    for len in lens {
        refused(&origin, &format!("a file of {len} bytes"), |forgery| forgery.entry(RELATION).len = len);
        let directory = |forgery: &mut Forgery| forgery.entry("base/5").len = len;
        refused(&origin, &format!("a directory of {len} bytes"), directory);
    }
    refused(&origin, "no map for a long file", |forgery| {
        let entry = forgery.entry(RELATION);
        (entry.len, entry.parts) = (1 << 49, Vec::new());
    });
    refused(&origin, "a longer map than the file", |forgery| forgery.entry(RELATION).len = 8192);
    refused(&origin, "a shorter map than the file", |forgery| forgery.entry(RELATION).len = 7 * 8192);
    refused_at_once(&origin, "many maps", |forgery| {
        forgery.entry(RELATION).parts = vec![StoredPart::default(); 3_000_000];
    });
    refused_at_once(&origin, "many layers", |forgery| {
        let part = &mut forgery.entry(RELATION).parts[0];
        part.layers = vec![part.layers[0].clone(); 1_000_000];
    });
    refused_at_once(&origin, "many packs", |forgery| forgery.entry(RELATION).parts[0].data = vec![0; 3_000_000]);
    for len in [0, 16, 4 << 20, u32::MAX] {
        let changes: [fn(&mut StoredLayer, u32); 2] =
            [|layer, len| layer.locations_len = len, |layer, len| layer.fingerprints_len = len];
        for change in changes {
            refused(&origin, &format!("a record of {len} bytes"), |forgery| {
                change(&mut forgery.entry(RELATION).parts[0].layers[0], len);
            });
        }
        refused(&origin, &format!("a page of {len} bytes"), |forgery| {
            let mut page = forgery.page(b"", 0);
            page.len = len;
            forgery.manifest.pages = vec![page];
        });
    }
    for offset in [u64::MAX, u64::MAX - 1000, i64::MAX as u64, 1 << 62] {
        refused(&origin, &format!("a layer at {offset}"), |forgery| {
            forgery.entry(RELATION).parts[0].layers[0].offset = offset;
        });
        refused(&origin, &format!("a chunk at {offset}"), |forgery| {
            forgery.relocate(RELATION, |locations| locations.chunks[0].offset = offset);
        });
    }
    for len in [u64::MAX, 1 << 40] {
        refused(&origin, &format!("a pack of {len} bytes"), |forgery| forgery.manifest.packs[0].len = len);
    }
}

#[test]
fn maps_that_lead_astray_are_refused() {
    let origin = Origin::new();
    let both = |change: fn(&mut Forgery)| refused(&origin, "a map", change);
    both(|forgery| forgery.relocate(RELATION, |l| l.block_count = u32::MAX));
    both(|forgery| forgery.relocate(RELATION, |l| (l.block_count, l.limit) = (131_072, 131_072)));
    both(|forgery| forgery.relocate(RELATION, |l| l.extents.clear()));
    both(|forgery| forgery.relocate(RELATION, |l| l.extents[0].count = u32::MAX));
    both(|forgery| forgery.relocate(RELATION, |l| l.extents.push(l.extents[0])));
    both(|forgery| forgery.relocate(RELATION, |l| l.chunks[0].block_count = u16::MAX));
    both(|forgery| forgery.relocate(RELATION, |l| l.chunks[0].stored_len = u32::MAX));
    both(|forgery| forgery.relocate(RELATION, |l| l.chunks.clear()));
    both(|forgery| forgery.relocate(RELATION, |l| l.packs.clear()));
    // Two accounts of one chunk: longer, shorter, and one that lies in another.
    both(|forgery| forgery.relocate(RELATION, |l| l.chunks[0].block_count -= 1));
    both(|forgery| forgery.relocate("base/5/16384_vm", |l| l.chunks[0].block_count += 1));
    both(|forgery| forgery.relocate("base/5/16384_vm", |l| l.chunks[0].offset += 1));
    both(|forgery| {
        forgery.relocate(RELATION, |l| {
            let inner = l.chunks[0];
            l.chunks.push(pgstrata_engine::repo::ChunkRef { offset: inner.offset + 1, stored_len: 1, ..inner });
            let last = l.extents.pop().unwrap();
            let (source, count) = (l.chunks.len() as u32, last.count - 1);
            l.extents.push(Extent { count, ..last });
            l.extents.push(Extent { start: last.end() - 1, count: 1, source, first: 0 });
        });
    });
    both(|forgery| {
        let run = FORGED.parse().unwrap();
        forgery.relocate(RELATION, |l| l.packs[0] = DataPack { run, seq: u32::MAX });
    });
}

#[test]
fn bombs_go_off_in_little_memory() {
    if !with_little_memory("bombs_go_off_in_little_memory") {
        return;
    }
    let origin = Origin::new();
    for len in [17 << 20, 200 << 20] {
        refused_at_once(&origin, "a page", |forgery| {
            forgery.manifest.pages = vec![forgery.page(&vec![0; len], 0)];
        });
    }
    // A page of as many entries, parts, or packs as 16 MiB can claim.
    for prefix in [
        &[0, 0xFF, 0xFF, 0xFF, 7][..],
        &[0xFF, 0xFF, 0xFF, 0xFF, 0xF, 0],
        &[0, 1, 1, 97, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 3],
    ] {
        refused_at_once(&origin, "a page of nothings", |forgery| {
            let plain = [prefix, &vec![0; 15 << 20]].concat();
            forgery.manifest.pages = vec![forgery.page(&plain, 1)];
        });
    }
    refused_at_once(&origin, "many pages", |forgery| {
        let plain = [&[0, 1, 1, 97, 0, 0, 0, 0, 0, 0x80, 0x80, 0x80, 3][..], &vec![0; 15 << 20]].concat();
        forgery.manifest.pages = vec![forgery.page(&plain, 1); 20];
    });
    for plain in [
        vec![0; 200 << 20],
        vec![0xFF; 15 << 20],
        [&[1, 1, 0, 0, 0xFF, 0xFF, 0xFF, 7][..], &vec![0; 15 << 20]].concat(),
    ] {
        refused_at_once(&origin, "a layer", move |forgery| {
            let layer = forgery.layer(plain.clone(), 6);
            forgery.entry(RELATION).parts[0].layers = vec![layer];
        });
    }
}

#[test]
fn manifests_that_no_backup_has_are_damaged_in_little_memory() {
    if !with_little_memory("manifests_that_no_backup_has_are_damaged_in_little_memory") {
        return;
    }
    let origin = Origin::new();
    let changes: [(&str, Change); 13] = [
        ("packs", |forgery| {
            let pack = forgery.manifest.packs[0];
            forgery.manifest.packs = vec![PackInfo { len: u64::MAX, ..pack }; 10];
        }),
        ("many packs", |forgery| {
            let pack = forgery.manifest.packs[0];
            forgery.manifest.packs = vec![PackInfo { len: 1, ..pack }; 1_500_000];
        }),
        ("many pages", |forgery| {
            let page = forgery.page(b"", 0);
            forgery.manifest.pages = vec![page; 200_000];
        }),
        ("corrupt pages", |forgery| {
            let nothing = String::new;
            let (file, relation, fork, reason) = (nothing(), nothing(), nothing(), nothing());
            let page = CorruptPage { file, relation, name: None, fork, block: 0, reason };
            forgery.manifest.corrupt_pages = vec![page; 300_000];
        }),
        ("a note", |forgery| forgery.manifest.note = Some("x".repeat(1 << 20))),
        ("a detector", |forgery| forgery.manifest.detector = "x".repeat(1 << 20)),
        ("a version", |forgery| forgery.manifest.postgres_version = "1".repeat(40 << 20)),
        ("a system", |forgery| forgery.manifest.system_identifier = "-".to_owned()),
        ("blocks of nothing", |forgery| forgery.manifest.block_size = 0),
        ("blocks of everything", |forgery| forgery.manifest.block_size = 1 << 31),
        ("odd blocks", |forgery| forgery.manifest.block_size = 8191),
        ("segments of nothing", |forgery| forgery.manifest.wal_segment_size = 0),
        ("segments of everything", |forgery| forgery.manifest.wal_segment_size = 1 << 31),
    ];
    for (case, change) in changes {
        refused_at_once(&origin, case, change);
    }
    refused(&origin, "larger blocks", |forgery| forgery.manifest.block_size = 32768);
    refused(&origin, "smaller blocks", |forgery| forgery.manifest.block_size = 1024);
    refused(&origin, "another major version", |forgery| forgery.manifest.postgres_major = u32::MAX);
}

#[test]
fn odd_numbers_in_a_manifest_do_no_harm() {
    let origin = Origin::new();
    harmless(&origin, "numbers", |forgery| {
        let manifest = &mut forgery.manifest;
        manifest.wal =
            vec![WalSpan { timeline: manifest.timeline, start: manifest.stop_lsn, end: manifest.start_lsn }; 3];
        (manifest.sequence, manifest.synthesis, manifest.edition) = (u64::MAX, u32::MAX, 0);
        (manifest.cluster_bytes, manifest.wal_bytes, manifest.file_count) = (u64::MAX, u64::MAX, u64::MAX);
        (manifest.blocks_changed, manifest.own_bytes, manifest.duration_ms) = (u64::MAX, u64::MAX, u64::MAX);
        (manifest.data_checksum_version, manifest.data_directory_mode) = (u32::MAX, u32::MAX);
        manifest.start_time = jiff::Timestamp::MAX;
        manifest.stop_time = jiff::Timestamp::MIN;
        manifest.detector = "\x1b[2J\r\n".to_owned();
    });
}

/// A store in a directory, of a repository in memory.
fn on_disk(store: &MemoryStore, directory: &Path) -> LocalStore {
    for object in store.list("").unwrap() {
        let path = directory.join(object.name.as_str());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, store.get(&object.name, object.len).unwrap()).unwrap();
    }
    LocalStore::open(directory).unwrap()
}

#[test]
fn huge_objects_are_refused_in_little_memory() {
    if !with_little_memory("huge_objects_are_refused_in_little_memory") {
        return;
    }
    let origin = Origin::new();
    let (memory, repo) = origin.forge(|_| {});
    let directory = origin.scratch.path().join("repository");
    let store = on_disk(&memory, &directory);
    let names = store.list("").unwrap().into_iter().filter(|object| object.name.as_str() != "reserve");
    for object in names {
        let path = directory.join(object.name.as_str());
        let bytes = fs::read(&path).unwrap();
        // Sparse, and for a pack with its own footer at the end of a table of 64 GiB.
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(64 << 30).unwrap();
        let opened = Repository::open(&directory);
        if object.name.as_str() != "repository" {
            let repo = opened.unwrap();
            let report = verify::run(&repo, &ClusterName::default(), "all", &verify::Options::default(), &Silent);
            assert!(!report.unwrap().damage.is_empty(), "{}", object.name);
        } else {
            assert!(opened.is_err());
        }
        fs::write(&path, bytes).unwrap();
    }
    drop(repo);
}

#[test]
fn what_is_no_file_is_no_object_and_is_not_waited_for() {
    let origin = Origin::new();
    let (memory, _) = origin.forge(|_| {});
    let directory = origin.scratch.path().join("repository");
    on_disk(&memory, &directory);
    let header = directory.join("repository");
    let bytes = fs::read(&header).unwrap();
    for what in ["pipe", "directory", "device"] {
        fs::remove_file(&header).unwrap();
        match what {
            "pipe" => assert!(Command::new("mkfifo").arg(&header).status().unwrap().success()),
            "directory" => fs::create_dir(&header).unwrap(),
            _ => symlink("/dev/zero", &header).unwrap(),
        }
        assert_eq!(Repository::open(&directory).unwrap_err().kind(), ErrorKind::Corrupt, "{what}");
        if what == "directory" {
            fs::remove_dir(&header).unwrap()
        } else {
            fs::remove_file(&header).unwrap()
        }
        fs::write(&header, &bytes).unwrap();
    }
    // Names too long for an object are passed over.
    let mut deep = directory.join("clusters/main/packs");
    for _ in 0..5 {
        deep.push("x".repeat(200));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("000000.data"), "").unwrap();
    let repo = Repository::open(&directory).unwrap();
    assert_eq!(repo.catalog(&ClusterName::default()).unwrap().backups().len(), 2);
}

#[test]
fn an_expiry_deletes_nothing_through_a_link() {
    let origin = Origin::new();
    let (memory, _) = origin.forge(|_| {});
    let directory = origin.scratch.path().join("repository");
    on_disk(&memory, &directory);
    let precious = origin.scratch.path().join("precious");
    fs::create_dir_all(precious.join("empty")).unwrap();
    fs::write(precious.join(".tmp-precious"), "").unwrap();
    symlink(&precious, directory.join("clusters/main/pins")).unwrap();
    let options = expire::Options {
        cluster: ClusterName::default(),
        selection: Selection::Nothing,
        force: false,
        max_unused: None,
        compression: backup::Compression::default(),
        jobs: None,
    };
    let _ = expire::run(&Repository::open(&directory).unwrap(), &options, &Silent);
    assert!(precious.join("empty").is_dir() && precious.join(".tmp-precious").is_file());
}
