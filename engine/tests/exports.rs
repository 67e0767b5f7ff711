//! What an export writes of a synthetic cluster: the bytes of the cluster, in the right places, and all of it or nothing that looks whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgstrata_engine::backup;
use pgstrata_engine::export::{self, FileFormat, FilesOptions, FilesReport};
use pgstrata_engine::pg::{ControlFile, PgBackupManifest, PgFileChecksum};
use pgstrata_engine::progress::Silent;
use pgstrata_engine::repo::{ClusterName, Repository};
use pgstrata_engine::store::{MemoryStore, Store};
use pgstrata_engine::target::incomplete;
use pgstrata_engine::{Error, ErrorKind};
use testdata::synthetic::{Options, SyntheticCluster};

/// Permission bits and contents; a directory has none.
type Entry = (u32, Option<Vec<u8>>);
type Entries = BTreeMap<PathBuf, Entry>;

/// Bytes of the file that is all zero.
const ZEROS_LEN: u64 = 8 << 20;
const OUTSIDE: &str = "pg_tblspc/16500";
const IN_PLACE: &str = "pg_tblspc/16501";

struct Lab {
    scratch: tempfile::TempDir,
    store: MemoryStore,
    repo: Repository,
}

impl Lab {
    /// One backup of a stopped cluster with odd files and two tablespaces, one of them in place.
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("cluster");
        let shape = Options { wal_segment_len: 1 << 20, segment_blocks: 16, ..Options::new(16, 11) };
        let mut cluster = SyntheticCluster::create(&directory, shape).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 40).unwrap();
        let relation = cluster.add_relation(5, 3).unwrap();
        cluster.append_zeros(relation, 30).unwrap();
        cluster.checkpoint().unwrap();
        add_odd_files(&directory, &scratch.path().join("space"));
        add_unlogged_relation(&directory.join("base/5"), cluster.relations()[relation].number);
        let store = MemoryStore::new();
        let place = scratch.path().join("repository").display().to_string();
        let repo = Repository::init_in(Arc::new(store.clone()), place).unwrap();
        let options = backup::Options { data_dir: Some(directory), offline: true, ..backup::Options::default() };
        backup::run(&repo, &options, &Silent).unwrap();
        Self { scratch, store, repo }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn options(&self, format: FileFormat, target: &str) -> FilesOptions {
        let tablespace_map = vec![(self.path("space"), self.path(target).with_extension("space"))];
        FilesOptions { target: self.path(target), format, tablespace_map, jobs: None }
    }

    fn run(&self, options: &FilesOptions) -> Result<FilesReport, Error> {
        export::to_files(&self.repo, &ClusterName::default(), "latest", options, &Silent)
    }

    /// What of the cluster belongs into an export, but its WAL; tablespaces are followed.
    fn expected(&self) -> Entries {
        let mut entries = Entries::new();
        walk(&self.path("cluster"), Path::new(""), &mut entries);
        walk(&self.path("space"), Path::new(OUTSIDE), &mut entries);
        entries.retain(|path, _| !is_wal_file(path));
        let reset = entries[Path::new("base/5/30000_init")].clone();
        entries.insert("base/5/30000".into(), reset);
        entries
    }
}

fn add_odd_files(directory: &Path, space: &Path) {
    let control = ControlFile::parse(&fs::read(directory.join("global/pg_control")).unwrap()).unwrap();
    let version = control.tablespace_version_dir();
    fs::create_dir_all(space.join(&version).join("5")).unwrap();
    fs::write(space.join(&version).join("5/16600"), vec![7; 3 * 8192]).unwrap();
    symlink(space, directory.join(OUTSIDE)).unwrap();
    fs::create_dir_all(directory.join(IN_PLACE).join(&version).join("5")).unwrap();
    fs::write(directory.join(IN_PLACE).join(&version).join("5/16700"), vec![8; 8192]).unwrap();
    let odd = directory.join("odd");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("empty"), "").unwrap();
    fs::write(odd.join("one"), "1").unwrap();
    fs::write(odd.join("n".repeat(200)), "a long name").unwrap();
    let deep = odd.join("d".repeat(90)).join("e".repeat(90));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("deep"), "a long path").unwrap();
    fs::write(odd.join(std::ffi::OsString::from_vec(b"\xff not UTF-8".to_vec())), "a").unwrap();
    fs::write(odd.join("closed"), vec![3; 513]).unwrap();
    fs::set_permissions(odd.join("closed"), fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(&odd, fs::Permissions::from_mode(0o750)).unwrap();
    File::create(odd.join("zeros")).unwrap().set_len(ZEROS_LEN).unwrap();
    fs::write(directory.join("standby.signal"), "").unwrap();
}

/// An unlogged relation, whose init fork is a page of another relation.
fn add_unlogged_relation(database: &Path, other: u32) {
    let page = &fs::read(database.join(other.to_string())).unwrap()[..8192];
    fs::write(database.join("30000_init"), page).unwrap();
    fs::write(database.join("30000"), page.repeat(3)).unwrap();
}

/// Adds everything below `root`, without following links.
fn walk(root: &Path, prefix: &Path, found: &mut Entries) {
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let name = prefix.join(path.file_name().unwrap());
        let metadata = fs::symlink_metadata(&path).unwrap();
        let mode = metadata.permissions().mode() & 0o777;
        if metadata.is_dir() {
            found.insert(name.clone(), (mode, None));
            walk(&path, &name, found);
        } else if metadata.is_file() {
            found.insert(name, (mode, Some(fs::read(&path).unwrap())));
        }
    }
}

fn is_wal_file(path: &Path) -> bool {
    path.parent() == Some(Path::new("pg_wal")) && path.file_name().unwrap().len() == 24
}

/// The members of an archive, in its order, links with what they lead to as their contents.
fn members(archive: &Path) -> Vec<(PathBuf, Entry)> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let read = |entry: std::io::Result<tar::Entry<'_, File>>| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        let kind = entry.header().entry_type();
        match entry.link_name_bytes() {
            Some(link) if kind.is_symlink() => bytes.extend_from_slice(&link),
            _ => drop(entry.read_to_end(&mut bytes).unwrap()),
        }
        let path = entry.path().unwrap().components().collect();
        (path, (entry.header().mode().unwrap(), (!kind.is_dir()).then_some(bytes)))
    };
    archive.entries().unwrap().map(read).collect()
}

fn assert_same(found: &Entries, expected: &Entries) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, entry) in expected {
        assert!(found[path] == *entry, "{} differs", path.display());
    }
}

/// Proves that PostgreSQL's manifest lists the files of `expected` and nothing else.
fn assert_listed(manifest: &Path, expected: &Entries) {
    let manifest = PgBackupManifest::parse(&fs::read(manifest).unwrap()).unwrap();
    let listed =
        manifest.files.into_iter().map(|file| (PathBuf::from(std::ffi::OsString::from_vec(file.path)), file.checksum));
    let listed: BTreeMap<_, _> = listed.collect();
    let checksum = |bytes: &Vec<u8>| Some(PgFileChecksum::Crc32c(crc32c::crc32c(bytes)));
    let files = expected.iter().filter_map(|(path, (_, bytes))| Some((path.clone(), checksum(bytes.as_ref()?))));
    assert_eq!(listed, files.collect());
}

#[test]
fn a_plain_export_is_the_cluster_as_it_was() {
    let lab = Lab::new();
    let options = lab.options(FileFormat::Plain, "plain");
    let report = lab.run(&options).unwrap();
    assert_eq!((report.format, report.files.len()), (FileFormat::Plain, 0));
    let expected = lab.expected();
    assert_listed(&options.target.join("backup_manifest"), &expected);
    fs::remove_file(options.target.join("backup_manifest")).unwrap();
    let mut found = Entries::new();
    walk(&options.target, Path::new(""), &mut found);
    walk(&lab.path("plain.space"), Path::new(OUTSIDE), &mut found);
    let wal: Vec<_> = found.extract_if(.., |path, _| is_wal_file(path)).collect();
    assert_same(&found, &expected);
    assert!(
        wal.iter().all(|(path, entry)| entry.1 == fs::read(lab.path("cluster").join(path)).ok()) && !wal.is_empty()
    );
    assert_eq!(fs::read_link(options.target.join(OUTSIDE)).unwrap(), lab.path("plain.space"));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode();
    assert_eq!(mode(&options.target), mode(&lab.path("cluster")));
}

#[test]
fn archives_hold_the_cluster_as_it_was() {
    let lab = Lab::new();
    let options = lab.options(FileFormat::Tar, "tar");
    let report = lab.run(&options).unwrap();
    assert_eq!(report.files, ["16500.tar", "base.tar", "pg_wal.tar", "backup_manifest"]);
    let mut names: Vec<_> = fs::read_dir(&options.target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["16500.tar", "backup_manifest", "base.tar", "pg_wal.tar"]);

    let expected = lab.expected();
    assert_listed(&options.target.join("backup_manifest"), &expected);
    let base = members(&options.target.join("base.tar"));
    assert_eq!(base.last().unwrap().0, Path::new("global/pg_control"));
    let space = members(&options.target.join("16500.tar"));
    let mut found: Entries = base.into_iter().collect();
    let (_, link) = found.remove(Path::new(OUTSIDE)).unwrap();
    assert_eq!(link.unwrap(), lab.path("tar.space").into_os_string().into_vec());
    found.extend(space.into_iter().map(|(path, entry)| (Path::new(OUTSIDE).join(path), entry)));
    assert_same(&found, &expected);
    let wal = members(&options.target.join("pg_wal.tar"));
    let same = |(path, entry): &(PathBuf, Entry)| entry.1 == fs::read(lab.path("cluster/pg_wal").join(path)).ok();
    assert!(wal.iter().all(same) && !wal.is_empty());
}

#[test]
fn zeros_are_holes_in_an_archive() {
    let lab = Lab::new();
    let options = lab.options(FileFormat::Tar, "tar");
    lab.run(&options).unwrap();
    let file = File::open(options.target.join("base.tar")).unwrap();
    let metadata = file.metadata().unwrap();
    assert!(metadata.blocks() * 512 < metadata.len() - ZEROS_LEN / 2, "{} blocks", metadata.blocks());
    let mut end = [1; 1024];
    file.read_exact_at(&mut end, metadata.len() - 1024).unwrap();
    assert_eq!(end, [0; 1024]);
}

#[test]
fn damage_leaves_nothing_that_looks_whole() {
    let lab = Lab::new();
    let object =
        lab.store.list("").unwrap().into_iter().find(|object| object.name.as_str().ends_with(".data")).unwrap();
    let mut bytes = lab.store.get(&object.name, object.len).unwrap();
    bytes[1000] ^= 1;
    lab.store.tamper(&object.name, Some(bytes));
    for (format, whole) in [(FileFormat::Plain, "global/pg_control"), (FileFormat::Tar, "base.tar")] {
        let options = lab.options(format, &format.to_string());
        let error = lab.run(&options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let left = incomplete(&options.target).unwrap();
        assert!(error.hint_text().unwrap().ends_with(&format!("\n{left}")), "{:?}", error.hint_text());
        assert_eq!(left.contains("plain.space"), format == FileFormat::Plain, "{left}");
        assert!(!options.target.join(whole).exists(), "{whole}");
        assert!(format == FileFormat::Plain || !options.target.join("backup_manifest").exists());
        let error = lab.run(&options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "half an export is in the way of the next");
        assert!(error.what().ends_with("holds a restore or an export that did not end"), "{error}");
        assert!(error.hint_text().unwrap().ends_with(&left));
    }
}

#[test]
fn a_target_that_would_do_harm_is_refused() {
    let lab = Lab::new();
    fs::create_dir_all(lab.path("occupied/x")).unwrap();
    fs::create_dir_all(lab.path("repository")).unwrap();
    for format in [FileFormat::Plain, FileFormat::Tar] {
        for (target, word) in [
            ("occupied", "not empty"),
            ("repository/x", "lie in each other"),
            ("cluster/x", "lies in the data directory"),
        ] {
            let error = lab.run(&lab.options(format, target)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.what().contains(word), "{error}");
        }
        for map in [("nowhere", lab.path("x")), ("space", PathBuf::from("relative"))] {
            let tablespace_map = vec![(lab.path(map.0), map.1)];
            let options = FilesOptions { tablespace_map, ..lab.options(format, "new") };
            assert_eq!(lab.run(&options).unwrap_err().kind(), ErrorKind::Invalid);
        }
        assert!(!lab.path("new").exists());
    }
}

#[test]
fn a_plan_says_what_it_writes_and_changes_nothing() {
    let lab = Lab::new();
    let plan = |format| {
        let options = lab.options(format, "target");
        export::plan_files(&lab.repo, &ClusterName::default(), "latest", &options).unwrap().to_string()
    };
    let (plain, tar) = (plan(FileFormat::Plain), plan(FileFormat::Tar));
    assert!(plain.starts_with("export 2") && plain.contains("tablespace 16500: "), "{plain}");
    assert!(["16500.tar: ", "base.tar: ", "pg_wal.tar: "].iter().all(|name| tar.contains(name)), "{tar}");
    assert!(!lab.path("target").exists());
}
