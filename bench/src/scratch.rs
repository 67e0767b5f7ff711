//! Where a workload works: a scratch directory, pgstrata's release binary in it, and the same start for every command.
//!
//! Whatever happens, the directory is removed when this is dropped. A signal does not end this program; it makes
//! [`Scratch::measure`] fail, which leads there.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempDir;
use testdata::cluster::succeed;
use testdata::os_user::ServerUser;
use testdata::{Error, Result};

use crate::measure::{self, Usage};
use crate::{CommonArgs, cannot, memory};

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// Of all processors' time: less is nobody.
const QUIET: f64 = 0.1;
const QUIET_PERIOD: Duration = Duration::from_secs(2);
/// How often somebody who waits looks whether to go on.
const POLL: Duration = Duration::from_millis(100);

/// How things are when a command starts.
pub struct Start {
    /// What the kernel's caches hold.
    pub caches: Caches,
    /// Bytes of memory that the command may need, by [`memory`].
    pub memory_len: u64,
}

/// What the kernel's caches hold when a command starts.
pub enum Caches {
    /// Nothing.
    Cold,
    /// These directories.
    Warm(Vec<PathBuf>),
}

/// The scratch directory.
pub struct Scratch {
    user: ServerUser,
    pgstrata: PathBuf,
    interrupted: Arc<AtomicBool>,
    cold: bool,
    patience: Duration,
    warm_memory: bool,
    /// Directories in it that are read once before each command.
    warm: &'static [&'static str],
    handle: File,
    /// Dropped last.
    work: TempDir,
}

impl Scratch {
    /// Builds pgstrata and makes the directory; `warm` names what in it is read once before each command, unless `cold` drops the
    /// kernel's caches.
    ///
    /// # Errors
    /// When any of that fails.
    pub fn set(args: &CommonArgs, cold: bool, warm: &'static [&'static str]) -> Result<Self> {
        let interrupted = watch_signals()?;
        let built = build_pgstrata()?;
        let user = ServerUser::get()?;
        let mut work = match &args.dir {
            Some(dir) => work_in(dir, &user)?,
            None => user.scratch()?,
        };
        work.disable_cleanup(args.keep);
        let pgstrata = work.path().join("pgstrata");
        fs::copy(&built, &pgstrata).map_err(|e| cannot("copy", &built, e))?;
        let handle = File::open(work.path()).map_err(|e| cannot("open", work.path(), e))?;
        let patience = Duration::from_secs(args.patience);
        let warm_memory = !args.no_warm_memory;
        Ok(Self { user, pgstrata, interrupted, cold, patience, warm_memory, warm, handle, work })
    }

    /// Who runs servers and commands.
    pub fn user(&self) -> &ServerUser {
        &self.user
    }

    /// The directory.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// A command of pgstrata, as the server's user, with no configuration of this machine.
    pub fn pgstrata(&self, command: &str) -> Command {
        let mut pgstrata = self.user.command(&self.pgstrata);
        pgstrata.env("PGSTRATA_CONFIG", "/dev/null").arg(command);
        pgstrata
    }

    /// A program of this machine, as the server's user.
    pub fn program(&self, program: &str) -> Command {
        self.user.command(program)
    }

    /// A program by its path, as the server's user.
    pub fn program_at(&self, program: &Path) -> Command {
        self.user.command(program)
    }

    /// This program, whatever directory it is in: the server's user may not be allowed to enter that.
    pub fn this_program(&self) -> Command {
        self.program("/proc/self/exe")
    }

    /// Runs one command with the same start for all: nothing waiting to be written, caches as asked, memory that is there, and nobody
    /// else at work, if there is time to wait for that.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure(&self, command: &mut Command, server_pid: Option<u32>, memory_len: u64) -> Result<Usage> {
        let caches = match self.cold {
            true => Caches::Cold,
            false => Caches::Warm(self.warm.iter().map(|name| self.path(name)).collect()),
        };
        self.measure_from(command, server_pid, &Start { caches, memory_len })
    }

    /// As [`Scratch::measure`], from another start.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure_from(&self, command: &mut Command, server_pid: Option<u32>, start: &Start) -> Result<Usage> {
        self.go_on()?;
        self.sync()?;
        self.wait_for_quiet()?;
        match &start.caches {
            Caches::Cold => fs::write(DROP_CACHES, "1").map_err(|e| cannot("write", DROP_CACHES.as_ref(), e))?,
            // Even a machine with enough memory may have dropped what it thought cold.
            Caches::Warm(directories) => directories.iter().try_for_each(|path| read_once(path))?,
        }
        self.measure_at_once(command, server_pid, start.memory_len)
    }

    /// Runs one command, as things are but for the memory.
    ///
    /// # Errors
    /// When it fails, or we were asked to end.
    pub fn measure_at_once(&self, command: &mut Command, server_pid: Option<u32>, memory_len: u64) -> Result<Usage> {
        self.go_on()?;
        self.touch(memory_len)?;
        let usage = measure::run(command, self.work(), server_pid);
        self.go_on().and(usage)
    }

    /// Writes what waits to be written.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.handle).map_err(|e| cannot("sync", self.work(), e))
    }

    /// Bytes that are free in the file system.
    ///
    /// # Errors
    /// The kernel's.
    pub fn free_len(&self) -> Result<u64> {
        let found = rustix::fs::fstatvfs(&self.handle).map_err(|e| cannot("look at", self.work(), e))?;
        Ok(found.f_bavail * found.f_frsize)
    }

    /// Lets time pass.
    ///
    /// # Errors
    /// When we were asked to end.
    pub fn pause(&self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.go_on()?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// # Errors
    /// When we were asked to end.
    pub fn go_on(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) { Err(Error::new("interrupted")) } else { Ok(()) }
    }

    fn touch(&self, memory_len: u64) -> Result<()> {
        if !self.warm_memory || memory_len == 0 {
            return Ok(());
        }
        succeed(self.this_program().args(["touch", &memory::touchable(memory_len)?.to_string()])).map(drop)
    }

    fn wait_for_quiet(&self) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        while Instant::now() < deadline && !self.interrupted.load(Ordering::Relaxed) {
            if measure::busy(QUIET_PERIOD)? < QUIET {
                break;
            }
        }
        Ok(())
    }

    /// Removes a directory of the scratch directory, if it is there.
    ///
    /// # Errors
    /// When it stays.
    pub fn clear(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(cannot("remove", &path, e)),
            _ => Ok(()),
        }
    }

    /// Removes everything, unless it is to be kept; says where it is then.
    pub fn close(self, keep: bool) {
        if keep {
            say(&format!("kept in {}", self.work().display()));
        }
    }

    /// The command as one would type it, with names for this machine's directories.
    pub fn shown(&self, command: &Command) -> String {
        let work = self.work().display().to_string();
        let program = name_of(&command.get_program().to_string_lossy());
        let program = if program == "exe" { "bench".to_owned() } else { program };
        let words = command.get_args().map(|arg| {
            let arg = name_of(&arg.to_string_lossy().replace(&work, "WORK"));
            if arg.contains([' ', '"']) { format!("'{arg}'") } else { arg }
        });
        std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ")
    }
}

/// What was typed after this program's name, with names for this machine's directories.
pub fn typed() -> String {
    shown_options(std::env::args().skip(1))
}

fn shown_options(args: impl Iterator<Item = String>) -> String {
    let shown = |arg: String| match arg.split_once('=') {
        Some((option, value)) if option.starts_with("--") => format!("{option}={}", name_of(value)),
        _ => name_of(&arg),
    };
    args.map(shown).collect::<Vec<_>>().join(" ")
}

/// The last part of a path that begins at the root: where that is, is this machine's own affair. Other words stay as they are.
fn name_of(word: &str) -> String {
    match Path::new(word).file_name() {
        Some(name) if word.starts_with('/') && !word.starts_with("/dev/") => name.to_string_lossy().into_owned(),
        _ => word.to_owned(),
    }
}

fn read_once(path: &Path) -> Result<()> {
    if path.is_dir() { crate::read::run(path, 1) } else { Ok(()) }
}

/// Progress, for whoever waits.
pub fn say(text: &str) {
    eprintln!("bench: {text}");
}

/// Whether caches can be dropped; asked before anything is made.
///
/// # Errors
/// When they cannot.
pub fn must_drop_caches() -> Result<()> {
    let writable = File::options().write(true).open(DROP_CACHES);
    writable
        .map(drop)
        .map_err(|e| Error::new(format!("--cold cannot drop the kernel's caches here ({DROP_CACHES}: {e})")))
}

fn watch_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|e| Error::new(format!("cannot watch for signals: {e}")))?;
    }
    Ok(interrupted)
}

/// Builds the release binary in the profile's directory that this program is in, and returns its path.
///
/// # Errors
/// When this program is not optimised itself, or pgstrata does not build.
pub fn build_pgstrata() -> Result<PathBuf> {
    let us = std::env::current_exe().map_err(|e| Error::new(format!("cannot tell where this program is: {e}")))?;
    let directory = us.parent().filter(|directory| directory.ends_with("release"));
    let directory =
        directory.ok_or_else(|| Error::new("measuring needs optimised code: run it by cargo run --release"))?;
    let target = directory.parent().unwrap_or(directory);
    say("building pgstrata");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--quiet", "-p", "pgstrata", "--target-dir"]).arg(target);
    succeed(cargo.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    Ok(directory.join("pgstrata"))
}

/// A new directory of the server's user inside `dir`.
fn work_in(dir: &Path, user: &ServerUser) -> Result<TempDir> {
    let dir = dir.canonicalize().map_err(|e| cannot("resolve", dir, e))?;
    if !user.can_enter(&dir) {
        return Err(cannot("work in", &dir, "the user who runs the servers may not enter it"));
    }
    let mut builder = tempfile::Builder::new();
    let work = builder.prefix("pgstrata-bench-").permissions(fs::Permissions::from_mode(0o700)).tempdir_in(&dir);
    let work = work.map_err(|e| cannot("make a directory in", &dir, e))?;
    user.own(work.path())?;
    Ok(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_something_is_on_this_machine_is_not_shown() {
        let typed =
            ["compare", "--dir", "/mnt/big", "--barman=/a/bin/barman", "--wal-rus", "bin/walrus", "--change", "0,1"];
        let shown = shown_options(typed.into_iter().map(str::to_owned));
        assert_eq!(shown, "compare --dir big --barman=barman --wal-rus bin/walrus --change 0,1");
    }
}
