use std::fs;
use std::os::unix::fs::symlink;

use rustix::fs::mknodat;
use tempfile::TempDir;

use super::*;

const CONTROL_15: &[u8] = include_bytes!("../../../../testdata/artefacts/15/pg_control");
const CONTROL_17: &[u8] = include_bytes!("../../../../testdata/artefacts/17/pg_control");
const VERSION_DIR: &str = "PG_15_202209061";

/// A data directory with as little as a listing needs, and a place beside it.
struct Cluster {
    directory: TempDir,
    beside: TempDir,
}

impl Cluster {
    fn of_15() -> Self {
        Self::new("15\n", CONTROL_15)
    }

    fn new(version: &str, control: &[u8]) -> Self {
        let cluster = Self { directory: TempDir::new().unwrap(), beside: TempDir::new().unwrap() };
        for directory in ["base/1", "global", "pg_tblspc", "pg_wal/archive_status"] {
            fs::create_dir_all(cluster.path(directory)).unwrap();
        }
        cluster.write("PG_VERSION", version);
        fs::write(cluster.path("global/pg_control"), control).unwrap();
        cluster
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    fn write(&self, relative: &str, text: &str) {
        fs::create_dir_all(self.path(relative).parent().unwrap()).unwrap();
        fs::write(self.path(relative), text).unwrap();
    }

    fn open(&self) -> DataDir {
        DataDir::open(self.directory.path()).unwrap()
    }

    fn list(&self) -> Listing {
        self.open().list().unwrap()
    }

    /// What is listed beyond the bare cluster; directories end in a slash.
    fn extra(&self) -> Vec<String> {
        let bare = [
            "PG_VERSION",
            "base/",
            "base/1/",
            "global/",
            "global/pg_control",
            "pg_tblspc/",
            "pg_wal/",
            "pg_wal/archive_status/",
        ];
        let mut extra = render(&self.list());
        extra.retain(|entry| !bare.contains(&&**entry));
        extra
    }

    /// Makes a tablespace at `location` with a file of database 5 in it.
    fn add_tablespace(&self, oid: u32, location: &Path, link: &Path) {
        fs::create_dir_all(location.join(VERSION_DIR).join("5")).unwrap();
        fs::write(location.join(VERSION_DIR).join("5/16384"), "x").unwrap();
        symlink(link, self.path(&format!("pg_tblspc/{oid}"))).unwrap();
    }
}

fn render(listing: &Listing) -> Vec<String> {
    let path = |entry: &Entry| entry.path.escape_ascii().to_string();
    let render = |entry: Entry| match entry.kind {
        EntryKind::Directory => format!("{}/", path(&entry)),
        EntryKind::File { .. } => path(&entry),
    };
    listing.entries.iter().map(render).collect()
}

#[test]
fn a_bare_cluster_is_listed_in_the_order_of_its_paths() {
    let cluster = Cluster::of_15();
    let listing = cluster.list();
    let expected = [
        "PG_VERSION",
        "base/",
        "base/1/",
        "global/",
        "global/pg_control",
        "pg_tblspc/",
        "pg_wal/",
        "pg_wal/archive_status/",
    ];
    assert_eq!(render(&listing), expected);
    assert_eq!(listing.entries.find(b"PG_VERSION").unwrap().kind, EntryKind::File { len: 3 });
    assert_eq!(listing.wal_dir, fs::canonicalize(cluster.path("pg_wal")).unwrap());
    assert_eq!((listing.notices.len(), listing.tablespaces.len()), (0, 0));
}

#[test]
fn paths_are_in_the_order_of_their_bytes_whatever_the_names_are() {
    let cluster = Cluster::of_15();
    for path in ["base/1/2", "base/1/2_vm", "base.old/1", "base!/1", "base0", "pg_wal.old", "pg_wal!/a", "pg_tblspc-/x"]
    {
        cluster.write(path, "");
    }
    let beside = cluster.beside.path();
    for oid in [7, 70, 16384] {
        cluster.add_tablespace(oid, &beside.join(oid.to_string()), &beside.join(oid.to_string()));
    }
    cluster.write("pg_tblspc/7.x/1", "");
    let paths: Vec<_> = cluster.list().entries.iter().map(|entry| entry.path).collect();
    assert!(paths.is_sorted());
    let has = |path: String| paths.iter().any(|found| **found == *path.as_bytes());
    assert!([7, 70, 16384].iter().all(|oid| has(format!("pg_tblspc/{oid}/{VERSION_DIR}/5/16384"))));
    assert!(
        has("pg_wal/archive_status".to_owned()) && has("pg_tblspc/7.x/1".to_owned()) && paths.len() == 8 + 3 * 4 + 14
    );
}

#[test]
fn from_17_on_pg_wal_has_a_directory_for_summaries() {
    let cluster = Cluster::new("17\n", CONTROL_17);
    cluster.write("pg_wal/summaries/0000.summary", "");
    cluster.write("pg_wal/000000010000000000000001", "");
    assert_eq!(cluster.extra(), ["pg_wal/summaries/"]);
}

#[test]
fn directories_that_the_server_empties_at_start_are_kept_without_their_contents() {
    let cluster = Cluster::of_15();
    let mut expected = Vec::new();
    for name in EMPTIED_DIRECTORIES {
        let name = std::str::from_utf8(name).unwrap();
        cluster.write(&format!("{name}/inside"), "");
        expected.push(format!("{name}/"));
    }
    assert_eq!(cluster.extra(), expected);
}

#[test]
fn a_directory_to_be_kept_empty_may_be_a_symbolic_link_even_to_nowhere() {
    let cluster = Cluster::of_15();
    fs::write(cluster.beside.path().join("inside"), "").unwrap();
    symlink(cluster.beside.path(), cluster.path("pg_stat_tmp")).unwrap();
    symlink("/nowhere/at/all", cluster.path("pg_notify")).unwrap();
    assert_eq!(cluster.extra(), ["pg_notify/", "pg_stat_tmp/"]);
}

#[test]
fn files_that_belong_to_the_running_server_are_left_out_wherever_they_are() {
    let cluster = Cluster::of_15();
    for name in ["postmaster.pid", "postmaster.opts", "backup_label", "tablespace_map", "backup_manifest"] {
        cluster.write(name, "");
    }
    cluster.write("postgresql.auto.conf.tmp", "");
    cluster.write("current_logfiles.tmp", "");
    cluster.write("base/1/pg_internal.init", "");
    cluster.write("global/pg_internal.init.4711", "");
    cluster.write("base/pgsql_tmp/pgsql_tmp1.0", "");
    cluster.write("base/1/.DS_Store", "");
    cluster.write("backup_label.old", "");
    cluster.write("postgresql.auto.conf", "");
    assert_eq!(cluster.extra(), ["backup_label.old", "postgresql.auto.conf"]);
}

#[test]
fn temporary_relations_are_left_out_and_files_that_only_look_alike_are_not() {
    let cluster = Cluster::of_15();
    for name in ["t3_16384", "t3_16384_fsm.1", "t3", "t3_x", "tt3_1", "t3_16384_init2"] {
        cluster.write(&format!("base/1/{name}"), "");
        cluster.write(&format!("global/{name}"), "");
    }
    let extra = cluster.extra();
    let in_database: Vec<_> = extra.iter().filter(|entry| entry.starts_with("base")).collect();
    assert_eq!(in_database, ["base/1/t3", "base/1/t3_16384_init2", "base/1/t3_x", "base/1/tt3_1"]);
    assert!(extra.contains(&"global/t3_16384".to_owned()));
}

#[test]
fn of_an_unlogged_relation_only_the_init_fork_is_listed() {
    let cluster = Cluster::of_15();
    for name in ["100", "100.1", "100_fsm", "100_vm", "100_init", "1001", "1001_fsm", "0100", "100_init.old"] {
        cluster.write(&format!("base/1/{name}"), "");
    }
    let expected = ["0100", "1001", "1001_fsm", "100_init", "100_init.old"].map(|name| format!("base/1/{name}"));
    assert_eq!(cluster.extra(), expected);
}

#[test]
fn the_name_of_a_relation_means_nothing_outside_a_database() {
    let cluster = Cluster::of_15();
    cluster.write("pg_xact/100", "");
    cluster.write("pg_xact/100_init", "");
    cluster.write("base/x1/t3_16384", "");
    assert_eq!(cluster.extra(), ["base/x1/", "base/x1/t3_16384", "pg_xact/", "pg_xact/100", "pg_xact/100_init"]);
}

#[test]
fn a_tablespace_is_listed_below_its_number_and_only_with_this_versions_directory() {
    let cluster = Cluster::of_15();
    let location = cluster.beside.path().join("ts");
    cluster.add_tablespace(16400, &location, &location);
    fs::create_dir_all(location.join("PG_16_202307071/5")).unwrap();
    fs::write(location.join("README"), "").unwrap();
    fs::write(location.join(VERSION_DIR).join("5/t1_2"), "").unwrap();
    let expected = ["", "PG_15_202209061/", "PG_15_202209061/5/", "PG_15_202209061/5/16384"];
    assert_eq!(cluster.extra(), expected.map(|path| format!("pg_tblspc/16400/{path}")));
    let tablespaces = cluster.list().tablespaces;
    let directory = fs::canonicalize(&location).unwrap();
    assert_eq!(tablespaces, [Tablespace { oid: TablespaceOid::new(16400), link: Some(location), directory }]);
    let mut text = String::new();
    let path = b"pg_tblspc/16400/PG_15_202209061/5/16384";
    cluster.open().open_file(path).unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
}

#[test]
fn a_tablespaces_link_may_be_relative_or_lead_to_another_link() {
    let cluster = Cluster::of_15();
    let location = cluster.beside.path().join("ts");
    let beside = cluster.beside.path().file_name().unwrap();
    cluster.add_tablespace(1, &location, &Path::new("../..").join(beside).join("ts"));
    let other = cluster.beside.path().join("ts2");
    symlink(&other, cluster.beside.path().join("link")).unwrap();
    cluster.add_tablespace(2, &other, &cluster.beside.path().join("link"));
    let directories: Vec<_> = cluster.list().tablespaces.into_iter().map(|tablespace| tablespace.directory).collect();
    assert_eq!(directories, [location, other].map(|path| fs::canonicalize(path).unwrap()));
    assert_eq!(cluster.extra().len(), 8);
}

#[test]
fn a_tablespace_inside_the_data_directory_is_listed_once() {
    let cluster = Cluster::of_15();
    let location = cluster.path("mine/ts");
    cluster.add_tablespace(7, &location, &location);
    cluster.write("mine/other", "");
    let expected = [
        "mine/",
        "mine/other",
        "mine/ts/",
        "pg_tblspc/7/",
        "pg_tblspc/7/PG_15_202209061/",
        "pg_tblspc/7/PG_15_202209061/5/",
        "pg_tblspc/7/PG_15_202209061/5/16384",
    ];
    assert_eq!(cluster.extra(), expected);
}

#[test]
fn a_tablespace_in_place_is_a_directory_without_a_link() {
    let cluster = Cluster::of_15();
    cluster.write("pg_tblspc/9/PG_15_202209061/5/1", "");
    assert_eq!(cluster.extra().len(), 4);
    let tablespaces = cluster.list().tablespaces;
    assert_eq!((tablespaces[0].oid, tablespaces[0].link.clone()), (TablespaceOid::new(9), None));
}

#[test]
fn a_tablespace_that_leads_nowhere_or_is_empty_is_an_error_because_it_may_not_be_mounted() {
    let cluster = Cluster::of_15();
    symlink("/nowhere/at/all", cluster.path("pg_tblspc/9")).unwrap();
    assert_eq!(cluster.open().list().unwrap_err().kind(), ErrorKind::Missing);
    fs::remove_file(cluster.path("pg_tblspc/9")).unwrap();
    symlink(cluster.beside.path(), cluster.path("pg_tblspc/9")).unwrap();
    assert!(cluster.open().list().unwrap_err().hint_text().unwrap().contains("mounted"));
}

#[test]
fn a_name_in_pg_tblspc_that_is_no_number_is_no_tablespace_and_not_lost() {
    let cluster = Cluster::of_15();
    cluster.write("pg_tblspc/README", "");
    cluster.write("pg_tblspc/12x/file", "");
    cluster.write("pg_tblspc/0", "");
    assert_eq!(cluster.extra(), ["pg_tblspc/0", "pg_tblspc/12x/", "pg_tblspc/12x/file", "pg_tblspc/README"]);
}

#[test]
fn a_symbolic_link_is_listed_as_what_it_leads_to() {
    let cluster = Cluster::of_15();
    let beside = cluster.beside.path();
    fs::create_dir_all(beside.join("pg_own/deep")).unwrap();
    fs::write(beside.join("pg_own/deep/today"), "12345").unwrap();
    fs::write(beside.join("postgresql.conf"), "x").unwrap();
    symlink(beside.join("pg_own"), cluster.path("pg_own")).unwrap();
    symlink(beside.join("postgresql.conf"), cluster.path("postgresql.conf")).unwrap();
    assert_eq!(cluster.extra(), ["pg_own/", "pg_own/deep/", "pg_own/deep/today", "postgresql.conf"]);
    let entry = cluster.list().entries.find(b"pg_own/deep/today").unwrap();
    assert_eq!(entry.kind, EntryKind::File { len: 5 });
    assert!(cluster.open().open_file(b"pg_own/deep/today").unwrap().is_some());
}

#[test]
fn symbolic_links_in_a_circle_end() {
    let cluster = Cluster::of_15();
    symlink(cluster.directory.path(), cluster.path("pg_self")).unwrap();
    symlink("..", cluster.path("base/up")).unwrap();
    symlink("round", cluster.path("round")).unwrap();
    fs::create_dir(cluster.beside.path().join("a")).unwrap();
    symlink(cluster.beside.path(), cluster.beside.path().join("a/back")).unwrap();
    symlink(cluster.beside.path(), cluster.path("pg_out")).unwrap();
    assert_eq!(cluster.extra(), ["pg_out/", "pg_out/a/"]);
    assert_eq!(cluster.list().notices.len(), 4);
}

#[test]
fn a_link_to_a_directory_where_postgresql_keeps_nothing_is_not_followed() {
    let cluster = Cluster::of_15();
    fs::write(cluster.beside.path().join("manifest"), "x").unwrap();
    symlink(cluster.beside.path(), cluster.path("backups")).unwrap();
    symlink("/", cluster.path("root")).unwrap();
    assert_eq!(cluster.extra(), Vec::<String>::new());
    assert_eq!(cluster.list().notices.len(), 2);
}

#[test]
fn what_is_neither_file_nor_directory_is_noted_and_never_opened() {
    let cluster = Cluster::of_15();
    mknodat(CWD, cluster.path("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(cluster.path("socket")).unwrap();
    symlink("/nowhere/at/all", cluster.path("dangling")).unwrap();
    symlink("/dev/null", cluster.path("device")).unwrap();
    let listing = cluster.list();
    assert_eq!(cluster.extra(), Vec::<String>::new());
    assert_eq!(listing.notices.len(), 4, "{:?}", listing.notices);
    assert!(cluster.open().open_file(b"fifo").unwrap().is_none());
}

#[test]
fn names_are_bytes() {
    let cluster = Cluster::of_15();
    let names: [&[u8]; 5] = [b"new\nline", b"back\\slash", b"not\xffutf8", b" =#['\"", &[b'x'; 255]];
    for name in names {
        fs::write(cluster.directory.path().join(OsStr::from_bytes(name)), "x").unwrap();
    }
    let listing = cluster.list();
    for name in names {
        assert!(listing.entries.iter().any(|entry| &*entry.path == name), "{}", name.escape_ascii());
        assert!(cluster.open().open_file(name).unwrap().is_some());
    }
}

#[test]
fn a_path_longer_than_the_kernel_takes_at_once_is_listed() {
    let cluster = Cluster::of_15();
    let name = "d".repeat(200);
    let mut directory = open_directory(CWD, cluster.directory.path().as_os_str().as_bytes(), OFlags::empty()).unwrap();
    for _ in 0..30 {
        rustix::fs::mkdirat(&directory, &*name, Mode::RWXU).unwrap();
        directory = open_directory(directory.as_fd(), name.as_bytes(), OFlags::empty()).unwrap();
    }
    assert_eq!(cluster.list().entries.iter().map(|entry| entry.path.len()).max(), Some(30 * 201 - 1));
}

#[test]
fn a_file_that_vanished_is_none_and_an_unreadable_place_an_error() {
    let cluster = Cluster::of_15();
    let data_dir = cluster.open();
    assert!(data_dir.open_file(b"base/1/16384").unwrap().is_none());
    assert!(data_dir.open_file(b"base/gone/16384").unwrap().is_none());
    assert!(data_dir.open_file(b"base").unwrap().is_none());
    assert!(data_dir.open_file(b"PG_VERSION/x").is_err());
}

#[test]
fn a_symbolic_link_to_the_wal_is_listed_as_the_directory_it_is() {
    let cluster = Cluster::of_15();
    fs::remove_dir_all(cluster.path("pg_wal")).unwrap();
    symlink(cluster.beside.path(), cluster.path("pg_wal")).unwrap();
    let beside = |name: &str| cluster.beside.path().join(name);
    let size = WalSegmentSize::new(1 << 20).unwrap();
    for name in ["000000010000000000000002", "000000010000000000000001", "00000001000000000000000G"] {
        fs::write(beside(name), "abc").unwrap();
    }
    fs::write(beside("000000010000000000000003.partial"), "").unwrap();
    fs::write(beside("0000000A.history"), "").unwrap();
    fs::write(beside("0000000b.history"), "").unwrap();
    assert_eq!(cluster.extra(), Vec::<String>::new());
    let data_dir = cluster.open();
    assert_eq!(cluster.list().wal_dir, fs::canonicalize(cluster.beside.path()).unwrap());
    let segments = data_dir.wal_segments(size).unwrap();
    let names: Vec<_> = segments.iter().map(|(name, len)| (name.file_name(size), *len)).collect();
    assert_eq!(names, [("000000010000000000000001".to_owned(), 3), ("000000010000000000000002".to_owned(), 3)]);
    assert_eq!(data_dir.timeline_histories().unwrap(), [TimelineId::new(10)]);
    assert!(data_dir.open_wal_file("0000000A.history").unwrap().is_some());
    assert!(data_dir.open_wal_file("0000000C.history").unwrap().is_none());
}

#[test]
fn the_same_directory_is_known_under_any_name_and_what_is_inside_is_known_to_be() {
    let cluster = Cluster::of_15();
    let link = cluster.beside.path().join("link");
    symlink(cluster.directory.path(), &link).unwrap();
    let location = cluster.beside.path().join("ts");
    cluster.add_tablespace(5, &location, &location);
    let data_dir = cluster.open();
    assert!(data_dir.is_same_directory(&link).unwrap());
    assert!(!data_dir.is_same_directory(cluster.beside.path()).unwrap());
    assert!(!data_dir.is_same_directory(Path::new("/nowhere/at/all")).unwrap());
    assert!(data_dir.contains(&link.join("repository/not/there/yet")).unwrap());
    assert!(data_dir.contains(&location.join("x")).unwrap());
    assert!(data_dir.contains(&cluster.path("pg_wal")).unwrap());
    assert!(!data_dir.contains(&cluster.beside.path().join("ts2")).unwrap());
}

#[test]
fn a_configuration_file_is_read_only_if_it_is_outside() {
    let cluster = Cluster::of_15();
    cluster.write("pg_hba.conf", "inside");
    let outside = cluster.beside.path().join("pg_hba.conf");
    fs::write(&outside, "outside").unwrap();
    let data_dir = cluster.open();
    assert_eq!(data_dir.read_external(&cluster.path("pg_hba.conf")).unwrap(), None);
    assert_eq!(data_dir.read_external(&outside).unwrap().as_deref(), Some(&b"outside"[..]));
    assert_eq!(data_dir.read_external(&cluster.beside.path().join("gone")).unwrap(), None);
}

#[test]
fn a_directory_that_is_no_data_directory_is_refused_with_a_hint() {
    let empty = TempDir::new().unwrap();
    assert!(DataDir::open(empty.path()).unwrap_err().hint_text().unwrap().contains("PG_VERSION"));
    assert_eq!(DataDir::open(Path::new("/nowhere/at/all")).unwrap_err().kind(), ErrorKind::Missing);
    let cluster = Cluster::of_15();
    assert!(DataDir::open(&cluster.path("PG_VERSION")).is_err());
    cluster.write("PG_VERSION", "16\n");
    assert!(DataDir::open(cluster.directory.path()).unwrap_err().to_string().contains("pg_control is of version 15"));
    fs::remove_file(cluster.path("global/pg_control")).unwrap();
    assert!(DataDir::open(cluster.directory.path()).unwrap_err().to_string().contains("not a PostgreSQL data"));
}

/// Reads of pg_control as a writing server lets them come out, the last one again and again.
fn read_script(script: &[&[u8]]) -> (Result<(Vec<u8>, ControlFile)>, usize) {
    let reads = std::cell::Cell::new(0);
    let read = || {
        reads.set(reads.get() + 1);
        Ok(script[(reads.get() - 1).min(script.len() - 1)].to_vec())
    };
    (read_until_whole(read, || {}, Path::new("global/pg_control")), reads.get())
}

#[test]
fn a_torn_pg_control_is_read_again_and_a_damaged_one_reported() {
    let torn = |byte: usize| {
        let mut bytes = CONTROL_15.to_vec();
        bytes[byte] ^= 1;
        bytes
    };
    let (whole, reads) = read_script(&[&torn(40), &torn(41), &torn(40)[..100], CONTROL_15]);
    assert_eq!((whole.unwrap().0, reads), (CONTROL_15.to_vec(), 4));
    let (damaged, reads) = read_script(&[&torn(40), &torn(41), &torn(41), CONTROL_15]);
    assert_eq!((damaged.unwrap_err().kind(), reads), (ErrorKind::Corrupt, 3));
    let always_another: Vec<_> = (40..60).map(torn).collect();
    let always_another: Vec<_> = always_another.iter().map(Vec::as_slice).collect();
    let (restless, reads) = read_script(&always_another);
    assert_eq!((restless.unwrap_err().kind(), reads), (ErrorKind::Corrupt, 11));
}

#[test]
fn a_cluster_without_its_wal_directory_is_not_listed() {
    let cluster = Cluster::of_15();
    fs::remove_dir_all(cluster.path("pg_wal")).unwrap();
    assert!(cluster.open().list().unwrap_err().to_string().contains("pg_wal"));
}
