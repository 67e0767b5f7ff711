//! What an export writes is what `pg_basebackup` would have written, and a server starts on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use engine::export::{self, FileFormat, FilesOptions, FilesReport};
use engine::progress::{Phase, Progress};
use engine::repo::{ClusterName, Repository};
use testdata::cluster::{Cluster, ClusterOptions, StopMode, succeed};

use crate::support::{
    Entry, Lab, assert_same_dump, assert_same_tree, dump, for_majors, judge_contents, judge_restored_directory, text,
    tree,
};

for_majors!(a_plain_export_is_a_base_backup: plain_on_13 = 13, plain_on_15 = 15, plain_on_16 = 16, plain_on_18 = 18);
for_majors!(exported_archives_are_a_base_backup: tar_on_13 = 13, tar_on_15 = 15, tar_on_16 = 16, tar_on_18 = 18);
for_majors!(a_stopped_cluster_is_exported_as_it_was: offline_on_15 = 15, offline_on_18 = 18);
for_majors!(what_leads_out_of_the_directory_is_said: outside_on_15 = 15);

/// Collects notices.
#[derive(Default)]
struct Notices(Mutex<Vec<String>>);

impl Progress for Notices {
    fn begin(&self, _: Phase, _: u64) {}
    fn advance(&self, _: u64) {}
    fn notice(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

/// A cluster with a bit of everything, in a tablespace, too, and in one in place where there can be one.
fn furnished(lab: &Lab, tablespace: &Path) -> Cluster {
    let has_in_place = lab.server.major >= 15;
    let options = ClusterOptions { group_access: true, ..ClusterOptions::default() }.conf("autovacuum = off");
    let options = if has_in_place { options.conf("allow_in_place_tablespaces = on") } else { options };
    let source = lab.cluster(&options);
    source
        .sql_each(
            "postgres",
            &[
                &format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()),
                "CREATE TABLE t (id int PRIMARY KEY, content text)",
                "INSERT INTO t SELECT i, repeat(md5(i::text), 3) FROM generate_series(1, 20000) i",
                "CREATE TABLE moved TABLESPACE space AS SELECT * FROM t",
                "CREATE UNLOGGED TABLE unlogged AS SELECT * FROM t",
                "DELETE FROM t WHERE id % 3 = 0",
            ],
        )
        .unwrap();
    if has_in_place {
        let in_place = ["CREATE TABLESPACE here LOCATION ''", "CREATE TABLE inside TABLESPACE here AS SELECT * FROM t"];
        source.sql_each("postgres", &in_place).unwrap();
    }
    source.sql("postgres", "VACUUM (FREEZE)").unwrap();
    source
}

fn export(lab: &Lab, format: FileFormat, name: &str, map: &[(PathBuf, PathBuf)]) -> (FilesReport, Vec<String>) {
    let repo = Repository::open(&lab.repo()).unwrap();
    let options = FilesOptions { target: lab.path(name), format, tablespace_map: map.to_vec(), jobs: None };
    let notices = Notices::default();
    let report = export::to_files(&repo, &ClusterName::default(), "latest", &options, &notices).unwrap();
    (report, notices.0.into_inner().unwrap())
}

/// What `pg_basebackup` makes of the source now.
fn base_backup(lab: &Lab, source: &Cluster, name: &str, args: &[String]) -> PathBuf {
    let directory = lab.path(name);
    let mut command = source.tool("pg_basebackup").unwrap();
    command.arg("-D").arg(&directory).args(["--checkpoint=fast", "--no-sync", "-X", "stream"]).args(args);
    succeed(&mut command).unwrap();
    directory
}

/// Starts a copy, proves that it holds `expected` and is still on the source's timeline, and judges what it holds.
fn judge_copy(mut copy: Cluster, expected: &str, map: &[(PathBuf, PathBuf)]) {
    copy.start().unwrap();
    assert_same_dump(expected, &dump(&copy, map));
    let timeline = copy.query_value("postgres", "SELECT timeline_id FROM pg_control_checkpoint()").unwrap();
    assert_eq!(timeline, "1");
    judge_contents(&mut copy);
}

/// Whether two base backups of a quiet cluster differ there.
fn differs(path: &Path) -> bool {
    let files = ["backup_label", "backup_manifest", "global/pg_control"];
    let in_wal = path.starts_with("pg_wal") && path.file_name().unwrap().len() >= 24;
    // Links lead to the tablespaces of each copy.
    files.iter().any(|file| path == Path::new(file)) || in_wal || path.parent() == Some(Path::new("pg_tblspc"))
}

/// The names in `pg_wal`, each digit of a segment's as zero: what kinds of files are there.
fn kinds_of_wal(tree: &BTreeMap<PathBuf, Entry>) -> BTreeSet<String> {
    let names = tree.keys().filter_map(|path| path.strip_prefix("pg_wal").ok()).map(|name| name.display().to_string());
    names.map(|name| name.replace(|c: char| c.is_ascii_digit() || "ABCDEF".contains(c), "0")).collect()
}

fn a_plain_export_is_a_base_backup(lab: &Lab) {
    let tablespace = lab.dir("space");
    let source = furnished(lab, &tablespace);
    let expected = dump(&source, &[]);
    lab.backup(&source, &[]);
    let mapping = format!("--tablespace-mapping={}={}", tablespace.display(), lab.path("space-theirs").display());
    let theirs = base_backup(lab, &source, "theirs", &[mapping]);
    let map = [(tablespace, lab.path("space-ours"))];
    let (report, notices) = export(lab, FileFormat::Plain, "ours", &map);
    assert_eq!(notices, Vec::<String>::new());
    for (ours, theirs) in [(&report.target, &theirs), (&map[0].1, &lab.path("space-theirs"))] {
        assert_same_tree(&tree(theirs), &tree(ours), differs);
    }
    let kinds = kinds_of_wal(&tree(&report.target));
    assert!(kinds.is_subset(&kinds_of_wal(&tree(&theirs))), "{kinds:?} and {:?}", kinds_of_wal(&tree(&theirs)));
    let copy = Cluster::adopt(&lab.server, &lab.tools, &report.target).unwrap();
    judge_restored_directory(&copy);
    judge_copy(copy, &expected, &map);
}

/// What the names in an archive are to `tar`, in its order.
fn list(archive: &Path) -> Vec<String> {
    let output = succeed(Command::new("tar").arg("-tf").arg(archive)).unwrap();
    let names = String::from_utf8(output.stdout).unwrap();
    names.lines().map(|name| name.trim_start_matches("./").to_owned()).collect()
}

/// Extracts an archive into a directory as the servers' user.
fn extract(lab: &Lab, archive: &Path, directory: &Path) {
    if !directory.exists() {
        lab.user.make_dir(directory.parent().unwrap(), directory.file_name().unwrap().to_str().unwrap()).unwrap();
    }
    succeed(lab.user.command("tar").arg("-xpf").arg(archive).arg("-C").arg(directory)).unwrap();
}

/// Gives the archives to the servers' user, and extracts them as PostgreSQL's documentation says.
fn unpack(lab: &Lab, report: &FilesReport, name: &str, space: &Path) -> Cluster {
    lab.user.own(&report.target).unwrap();
    for file in &report.files {
        lab.user.own(&report.target.join(file)).unwrap();
    }
    let directory = lab.path(name);
    extract(lab, &report.target.join("base.tar"), &directory);
    extract(lab, &report.target.join("pg_wal.tar"), &directory.join("pg_wal"));
    extract(lab, &report.target.join(&report.files[0]), space);
    fs::copy(report.target.join("backup_manifest"), directory.join("backup_manifest")).unwrap();
    lab.user.own(&directory.join("backup_manifest")).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    Cluster::adopt(&lab.server, &lab.tools, &directory).unwrap()
}

fn exported_archives_are_a_base_backup(lab: &Lab) {
    let tablespace = lab.dir("space");
    let source = furnished(lab, &tablespace);
    let expected = dump(&source, &[]);
    lab.backup(&source, &[]);
    let theirs = base_backup(lab, &source, "theirs", &["--format=tar".to_owned()]);
    let map = [(tablespace, lab.path("space-ours"))];
    let (report, _) = export(lab, FileFormat::Tar, "ours", &map);

    let oid = source.query_value("postgres", "SELECT oid FROM pg_tablespace WHERE spcname = 'space'").unwrap();
    assert_eq!(
        report.files,
        [format!("{oid}.tar"), "base.tar".to_owned(), "pg_wal.tar".to_owned(), "backup_manifest".to_owned()]
    );
    for archive in &report.files[..2] {
        let (ours, theirs) = (list(&report.target.join(archive)), list(&theirs.join(archive)));
        assert_eq!((ours.first(), ours.last().map(|_| ())), (theirs.first(), theirs.last().map(|_| ())));
        if archive == "base.tar" {
            assert_eq!((ours.last(), &ours[..2]), (theirs.last(), &theirs[..2]));
        }
        let set = |names: Vec<String>| {
            names.into_iter().filter(|name| !name.starts_with("pg_tblspc/1")).collect::<BTreeSet<_>>()
        };
        assert_eq!(set(ours), set(theirs), "{archive}");
    }
    let copy = unpack(lab, &report, "copy", &map[0].1);
    if lab.server.major >= 18 {
        let mut verify = source.tool("pg_verifybackup").unwrap();
        succeed(verify.args(["--exit-on-error", "--no-parse-wal"]).arg(&report.target)).unwrap();
    }
    // As recovery does by tablespace_map; pg_verifybackup would miss the tablespace without.
    std::os::unix::fs::symlink(&map[0].1, copy.data_dir().join("pg_tblspc").join(oid)).unwrap();
    judge_restored_directory(&copy);
    judge_copy(copy, &expected, &map);
}

fn a_stopped_cluster_is_exported_as_it_was(lab: &Lab) {
    let tablespace = lab.dir("space");
    let mut source = furnished(lab, &tablespace);
    let expected = dump(&source, &[]);
    source.stop(StopMode::Fast).unwrap();
    lab.backup_offline(source.data_dir()).json(0);

    let map = [(tablespace.clone(), lab.path("space-plain"))];
    let (report, _) = export(lab, FileFormat::Plain, "plain", &map);
    assert_same_tree(&tree(&tablespace), &tree(&map[0].1), |_| false);
    let added: BTreeSet<_> =
        tree(&report.target).into_keys().filter(|path| !source.data_dir().join(path).exists()).collect();
    assert_eq!(added, BTreeSet::from([PathBuf::from("backup_manifest")]));
    let copy = Cluster::adopt(&lab.server, &lab.tools, &report.target).unwrap();
    judge_restored_directory(&copy);
    judge_copy(copy, &expected, &map);

    let map = [(tablespace, lab.path("space-tar"))];
    let (report, _) = export(lab, FileFormat::Tar, "tar", &map);
    let copy = unpack(lab, &report, "copy", &map[0].1);
    assert!(!copy.data_dir().join("tablespace_map").exists());
    judge_restored_directory(&copy);
    judge_copy(copy, &expected, &map);
}

/// An authentication file from elsewhere is in a backup, and not in a base backup; the setting is, and leads to it.
fn what_leads_out_of_the_directory_is_said(lab: &Lab) {
    let outside = lab.dir("etc").join("hba.conf");
    fs::write(&outside, "local all all trust\n").unwrap();
    lab.user.own(&outside).unwrap();
    let source = lab.cluster(&ClusterOptions::default().conf(&format!("hba_file = '{}'", outside.display())));
    let report = lab.backup(&source, &[]);
    let (exported, notices) = export(lab, FileFormat::Plain, "plain", &[]);
    assert_eq!(exported.backup.id.to_string(), text(&report, "id"));
    assert!(notices.iter().any(|notice| notice.contains("left out") && notice.contains("pg_hba.conf")), "{notices:?}");
    assert!(notices.iter().any(|notice| notice.contains("hba_file")), "{notices:?}");
    let inside = |cluster: &Path| fs::read(cluster.join("pg_hba.conf")).unwrap();
    assert_eq!(inside(&exported.target), inside(source.data_dir()));
}
