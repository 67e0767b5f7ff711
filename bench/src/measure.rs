//! One command, measured from outside: the whole process, from its start until it is gone.
//!
//! Time is wall time; processor time and peak memory are what the kernel accounts to the process and to the children it
//! waited for. What the server does for a command is accounted to the server: the difference of its own times, in which
//! a session is counted once it has ended. What everybody else on the machine did in the meantime is measured too: it is
//! the difference between all processor time and these. The peak memory of a process includes the moment between fork and exec, so a
//! value at or below that of this program (a few MB) means "no more than that".

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use testdata::{Error, Result};
use wait4::Wait4;

use crate::cannot;

/// How long the postmaster may take to notice that a session ended.
const REAP: Duration = Duration::from_millis(50);
/// How much of a failed command's complaint is repeated.
const COMPLAINT_LEN: usize = 4000;

/// What a command took.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// From its start to its end.
    pub wall: Duration,
    /// In user mode.
    pub user: Duration,
    /// In the kernel, on its behalf.
    pub sys: Duration,
    /// Of the server, user and kernel, on its behalf.
    pub server: Duration,
    /// Of everybody else on the machine, as a part of all processors' time from 0 to 1.
    pub others: f64,
    /// Resident at once, in bytes, at most.
    pub peak_rss: u64,
    /// Bytes that it and the server read by read calls, from caches and pipes too; what is mapped does not count.
    pub read: u64,
    /// Bytes of these, and of what is mapped, that came from storage.
    pub disk_read: u64,
    /// What it printed on standard output.
    pub output: String,
}

/// Runs `command` to its end; its output goes through files in `scratch`.
///
/// # Errors
/// With its complaint, when it fails.
pub fn run(command: &mut Command, scratch: &Path, server_pid: Option<u32>) -> Result<Usage> {
    let (out, err) = (scratch.join("stdout"), scratch.join("stderr"));
    let create = |path| File::create(path).map_err(|e| cannot("write", path, e));
    command.stdin(Stdio::null()).stdout(create(&out)?).stderr(create(&err)?);
    let server_before = server_pid.map(server_time).transpose()?;
    let server_io_before = server_pid.map(io_of).unwrap_or_default();
    let machine_before = machine_time()?;
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|e| Error::new(format!("cannot run {}: {e}", name(command))))?;
    let own_io = io_at_end(&child);
    let ended = child.wait4().map_err(|e| Error::new(format!("cannot wait for {}: {e}", name(command))))?;
    let wall = begun.elapsed();
    let machine = machine_time()?.saturating_sub(machine_before);
    if !ended.status.success() {
        let complaint = read(&err)?;
        let from = (complaint.len().saturating_sub(COMPLAINT_LEN)..).find(|at| complaint.is_char_boundary(*at));
        let complaint = complaint[from.unwrap_or(0)..].trim();
        return Err(Error::new(format!("{} failed ({}): {complaint}", name(command), ended.status)));
    }
    std::thread::sleep(REAP);
    let server_after = server_pid.map(server_time).transpose()?;
    let server = server_after.unwrap_or_default().saturating_sub(server_before.unwrap_or_default());
    let server_io = server_pid.map(io_of).unwrap_or_default().since(server_io_before);
    let (read_len, disk_read) = (own_io.read + server_io.read, own_io.disk_read + server_io.disk_read);
    let (user, sys, peak_rss) = (ended.rusage.utime, ended.rusage.stime, ended.rusage.maxrss);
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let others = machine.saturating_sub(user + sys + server).as_secs_f64() / (wall.as_secs_f64() * processors);
    Ok(Usage { wall, user, sys, server, others, peak_rss, read: read_len, disk_read, output: read(&out)? })
}

/// What the kernel counted for a process and the children it waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Io {
    read: u64,
    disk_read: u64,
}

impl Io {
    fn since(self, before: Self) -> Self {
        Self { read: self.read.saturating_sub(before.read), disk_read: self.disk_read.saturating_sub(before.disk_read) }
    }
}

/// What a child has read when it has ended, before it is forgotten.
fn io_at_end(child: &Child) -> Io {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let ended = pid.map(|pid| waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT));
    if let Some(Ok(_)) = ended { io_of(child.id()) } else { Io::default() }
}

/// Nothing, where the kernel does not tell.
fn io_of(pid: u32) -> Io {
    fs::read_to_string(format!("/proc/{pid}/io")).map(|text| io_in(&text)).unwrap_or_default()
}

fn io_in(text: &str) -> Io {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().parse().ok()
    };
    Io { read: field("rchar:").unwrap_or(0), disk_read: field("read_bytes:").unwrap_or(0) }
}

fn name(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| cannot("read", path, e))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The part of all processors' time that is used now, from 0 to 1, looked at for `period`.
///
/// # Errors
/// When the kernel does not tell.
pub fn busy(period: Duration) -> Result<f64> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let (begun, before) = (Instant::now(), machine_time()?);
    std::thread::sleep(period);
    let used = machine_time()?.saturating_sub(before);
    Ok(used.as_secs_f64() / (begun.elapsed().as_secs_f64() * processors))
}

/// The processor time that the whole machine has used.
fn machine_time() -> Result<Duration> {
    let stat = read("/proc/stat".as_ref())?;
    let ticks = busy_ticks(&stat).ok_or_else(|| Error::new("/proc/stat cannot be read"))?;
    Ok(duration(ticks))
}

/// What the first line of /proc/stat says, but for the times of doing nothing.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // user nice system idle iowait irq softirq steal; guests are in user.
    let fields: Vec<u64> = fields.take(8).map(|field| field.parse().ok()).collect::<Option<_>>()?;
    Some(fields.iter().enumerate().filter(|(at, _)| ![3, 4].contains(at)).map(|(_, ticks)| ticks).sum())
}

fn duration(ticks: u64) -> Duration {
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The processor time of a server and of its sessions that have ended.
fn server_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = read(path.as_ref())?;
    let ticks = ticks(&stat).ok_or_else(|| Error::new(format!("{path} reads {stat:?}")))?;
    Ok(duration(ticks))
}

/// `utime`, `stime`, `cutime` and `cstime` of a line as in proc(5), summed.
fn ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything; the third field follows it.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().skip(11).take(4).map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_process_and_its_children_are_summed() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 1 20 300 4000 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(4321));
        assert_eq!(ticks("42 no name"), None);
        server_time(std::process::id()).unwrap();
    }

    #[test]
    fn what_is_read_is_told_from_what_came_from_storage() {
        let text = "rchar: 1948\nwchar: 5\nsyscr: 7\nread_bytes: 4096\nwrite_bytes: 0\n";
        assert_eq!(io_in(text), Io { read: 1948, disk_read: 4096 });
        assert_eq!(io_in(""), Io::default());
    }

    #[test]
    fn doing_nothing_is_not_busy() {
        assert_eq!(busy_ticks("cpu  1 20 300 9 9 4000 50000 600000 7 7\ncpu0 1 1\n"), Some(654_321));
        assert_eq!(busy_ticks("intr 1 2"), None);
        assert!((0.0..=1.5).contains(&busy(Duration::from_millis(30)).unwrap()));
    }

    #[test]
    fn a_command_is_measured_and_its_failure_explained() {
        let scratch = tempfile::tempdir().unwrap();
        let mut sleep = Command::new("sh");
        let usage = run(sleep.args(["-c", "sleep 0.05; echo done"]), scratch.path(), None).unwrap();
        assert!(usage.wall >= Duration::from_millis(50) && usage.peak_rss > 0);
        assert_eq!(usage.output, "done\n");
        let mut reads = Command::new("sh");
        let usage = run(reads.args(["-c", "head -c 1000000 /dev/zero > /dev/null"]), scratch.path(), None).unwrap();
        assert!(usage.read >= 1_000_000, "{} were read", usage.read);
        let mut fails = Command::new("sh");
        let error = run(fails.args(["-c", "echo why >&2; exit 7"]), scratch.path(), None).unwrap_err().to_string();
        assert!(error.contains("why") && error.contains('7'), "{error}");
    }
}
