//! Who may read what pgstrata writes, whatever the umask, and that an ordinary user can do everything but give files away.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testdata::synthetic::{Options, SyntheticCluster};

const SECRET: &str = "s3cr3t-of-mine";

struct Lab {
    scratch: tempfile::TempDir,
    umask: &'static str,
}

impl Lab {
    fn new(umask: &'static str) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let options = Options { wal_segment_len: 1 << 20, ..Options::new(16, 5) };
        let mut cluster = SyntheticCluster::create(&scratch.path().join("cluster"), options).unwrap();
        cluster.add_database(5).unwrap();
        cluster.add_relation(5, 20).unwrap();
        cluster.checkpoint().unwrap();
        Self { scratch, umask }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, command: &str, environment: &[(&str, String)]) -> Output {
        let script = format!("umask {} && exec \"$0\" \"$@\"", self.umask);
        let mut process = Command::new("sh");
        process.args(["-c", &script, env!("CARGO_BIN_EXE_pgstrata")]).args(command.split_whitespace());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
            process.env_remove(name);
        }
        let paths = [("PGSTRATA_CONFIG", PathBuf::from("/dev/null")), ("PGSTRATA_REPO", self.path("repo"))];
        process.envs(paths).env("HOME", self.scratch.path()).envs(environment.iter().cloned()).output().unwrap()
    }

    fn succeeds(&self, command: &str) {
        let output = self.run(command, &[]);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Every directory below `root` must be 0700 and every file 0600, the root among them.
fn assert_private(root: &Path) {
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let wanted = if metadata.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(metadata.permissions().mode() & 0o7777, wanted, "{}", path.display());
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

#[test]
fn a_repository_is_its_owners_alone_whatever_the_umask() {
    for umask in ["000", "022", "077"] {
        let lab = Lab::new(umask);
        let (cluster, offsite) = (lab.path("cluster"), lab.path("offsite"));
        let backup = format!("backup --init --offline -D {}", cluster.display());
        let commands = [
            backup.clone(),
            backup,
            "pin latest".to_owned(),
            "merge latest".to_owned(),
            "merge latest --repack".to_owned(),
            "expire --keep-last 1 --max-unused 0".to_owned(),
            format!("export latest --to {} --init", offsite.display()),
            "verify".to_owned(),
        ];
        for command in commands {
            lab.succeeds(&command);
            assert_private(&lab.path("repo"));
        }
        assert_private(&offsite);
        lab.succeeds(&format!("init --repo {}", lab.path("a/b/c").display()));
        assert_private(&lab.path("a"));
    }
}

#[test]
fn what_is_written_out_is_as_private_as_the_cluster_was() {
    for umask in ["000", "077"] {
        let lab = Lab::new(umask);
        lab.succeeds(&format!("backup --init --offline -D {}", lab.path("cluster").display()));
        for (command, name) in [
            ("restore latest", "restored"),
            ("export latest --format plain", "plain"),
            ("export latest --format tar", "tar"),
        ] {
            let option = if command.starts_with("restore") { "target" } else { "to" };
            lab.succeeds(&format!("{command} --{option} {}", lab.path(name).display()));
            assert_private(&lab.path(name));
        }
        let (cluster, restored) = (lab.path("cluster").metadata().unwrap(), lab.path("restored").metadata().unwrap());
        assert_eq!((cluster.uid(), cluster.gid()), (restored.uid(), restored.gid()));
    }
}

#[test]
fn no_password_is_told_when_nobody_is_there_to_take_it() {
    let lab = Lab::new("022");
    let private = |name: &str, text: String| {
        fs::write(lab.path(name), text).unwrap();
        fs::set_permissions(lab.path(name), fs::Permissions::from_mode(0o600)).unwrap();
        lab.path(name).display().to_string()
    };
    let here = lab.scratch.path().display();
    let service =
        private("services", format!("[mine]\nhost={here}\nport=5999\npassword={SECRET}\nno such line {SECRET}\n"));
    let sound = private("sound", format!("[mine]\nhost={here}\nport=5999\npassword={SECRET}\n"));
    let passwords = private("pgpass", format!("*:*:*:*:{SECRET}\n"));
    let cases: [(String, Vec<(&str, String)>); 9] = [
        (format!("-d host={here}\u{a0}port=5999\u{a0}password={SECRET}").replace('\u{a0}', " "), vec![]),
        (format!("-d postgresql://me:{SECRET}@127.0.0.1:1/db"), vec![]),
        (format!("-d postgresql://me:{SECRET}@127.0.0.1:nowhere/db"), vec![]),
        (format!("-d postgresql://127.0.0.1:1/db?password={SECRET}&nosuch=1"), vec![]),
        (format!("-d password={SECRET}"), vec![("PGHOST", here.to_string()), ("PGPORT", "5999".to_owned())]),
        (String::new(), vec![("PGHOST", here.to_string()), ("PGPASSWORD", SECRET.to_owned())]),
        (String::new(), vec![("PGHOST", here.to_string()), ("PGPASSFILE", passwords)]),
        (String::new(), vec![("PGSERVICE", "mine".to_owned()), ("PGSERVICEFILE", service)]),
        (String::new(), vec![("PGSERVICE", "mine".to_owned()), ("PGSERVICEFILE", sound)]),
    ];
    for (words, environment) in cases {
        for command in ["backup --init", "backup --init --json", "check", "check --json"] {
            let output = lab.run(&format!("{command} {words}"), &environment);
            assert!(!output.status.success(), "{words}");
            let told = [output.stdout, output.stderr].concat();
            assert!(!String::from_utf8_lossy(&told).contains(SECRET), "{words}: {}", String::from_utf8_lossy(&told));
        }
    }
}
