//! Each command: one call of the engine, and what it says about it.

use std::path::Path;
use std::sync::Arc;

use clap::CommandFactory;
use engine::check::Verdict;
use engine::progress::Phase;
use engine::repo::{BackupSummary, Catalog, ClusterName, Repository};
use engine::target::incomplete;
use engine::{Error, ErrorKind, backup, check, expire, export, merge, pin, restore, verify};

use crate::args::Cli;
use crate::config::{Request, Sources};
use crate::demo;
use crate::exit_codes::Exit;
use crate::interrupt;
use crate::progress::Bars;
use crate::report::{self, Failure, Printer};
use crate::units::count;

/// Runs what the command line asks for; the first is whether the user wants JSON.
pub fn run(sources: &Sources) -> (bool, Result<Exit, Failure>) {
    let (json, request) = sources.resolve();
    (json, request.and_then(|request| perform(request, Printer { json })))
}

fn perform(request: Request, out: Printer) -> Result<Exit, Failure> {
    match request {
        Request::Init { repo } => init(&repo, out),
        Request::Backup { repo, init, dry_run: true, options } => plan_backup(&repo, init, &options, out),
        Request::Backup { repo, init, dry_run: false, options } => back_up(&repo, init, &options, out),
        Request::Check { repo, options } => look_over(&repo, &options, out),
        Request::List { repo, cluster, backup: None } => list(&repo, &cluster, out),
        Request::List { repo, cluster, backup: Some(backup) } => show(&repo, &cluster, &backup, out),
        Request::Verify { repo, cluster, backup, options } => check(&repo, &cluster, &backup, &options, out),
        Request::Restore { repo, cluster, backup, dry_run: true, options } => {
            let repository = open_with(&repo, &cluster)?;
            let plan = restore::plan(&repository, &cluster, &backup, &options)?;
            out.plan(&plan.to_string())
        }
        Request::Restore { repo, cluster, backup, dry_run: false, options } => {
            bring_back(&repo, &cluster, &backup, &options, out)
        }
        Request::Merge { repo, dry_run: true, options } => {
            let repository = open_with(&repo, &options.cluster)?;
            let plan = merge::plan(&repository, &options)?;
            out.plan(&plan.to_string())
        }
        Request::Merge { repo, dry_run: false, options } => synthesize(&repo, &options, out),
        Request::Copy { repo, to, init, dry_run: true, options } => plan_copy(&repo, &to, init, &options, out),
        Request::Copy { repo, to, init, dry_run: false, options } => copy(&repo, &to, init, &options, out),
        Request::Unpack { repo, cluster, backup, dry_run: true, options } => {
            let repository = open_with(&repo, &cluster)?;
            let plan = export::plan_files(&repository, &cluster, &backup, &options)?;
            out.plan(&plan.to_string())
        }
        Request::Unpack { repo, cluster, backup, dry_run: false, options } => {
            unpack(&repo, &cluster, &backup, &options, out)
        }
        Request::Expire { repo, dry_run, options } => remove(&repo, dry_run, &options, out),
        Request::Pin { repo, cluster, backup, pinned } => set_pin(&repo, &cluster, &backup, pinned, out),
        Request::Demo { keep, dir } => demo::run(keep, dir.as_deref(), out),
        Request::Completions { shell } => completions(shell, out),
    }
}

fn open(repo: &Path) -> Result<Repository, Failure> {
    Repository::open(repo).map_err(Failure::opening)
}

/// The repository, if `cluster` can be in it.
fn open_with(repo: &Path, cluster: &ClusterName) -> Result<Repository, Failure> {
    let repository = open(repo)?;
    other_clusters(&repository, cluster)?;
    readable(repository, cluster)
}

/// The repository, if its directories can be listed and what it says of `cluster` can be read: whoever cannot has as little to work with as where there is none.
fn readable(repository: Repository, cluster: &ClusterName) -> Result<Repository, Failure> {
    repository.clusters().and_then(|_| repository.catalog(cluster)).map_err(Failure::opening)?;
    Ok(repository)
}

/// Says so whenever it creates one: a nightly job that keeps `--init` would otherwise pass over a disk that is not
/// mounted, night after night, into the empty directory under it. Where no backup can be made, it creates none.
fn open_or_create(repo: &Path, options: &backup::Options) -> Result<Repository, Failure> {
    match Repository::open(repo) {
        Err(error) if error.kind() == ErrorKind::Missing => {
            backup::check(options, repo)?;
            create(repo)
        }
        opened => opened.map_err(Failure::opening),
    }
}

fn create(repo: &Path) -> Result<Repository, Failure> {
    let repository = Repository::init(repo)?;
    report::print_notice(&format!("created a repository in {}", repo.display()));
    Ok(repository)
}

fn init(repo: &Path, out: Printer) -> Result<Exit, Failure> {
    Repository::init(repo)?;
    out.document(&report::Initialised { repository: repo }, || {
        let repo = report::shell_word(&repo.display().to_string());
        format!("created a repository in {repo}\nback up into it: pgstrata backup --repo {repo} -D DIR\n")
    })?;
    Ok(Exit::Done)
}

fn plan_backup(repo: &Path, init: bool, options: &backup::Options, out: Printer) -> Result<Exit, Failure> {
    match Repository::open(repo) {
        Err(error) if init && error.kind() == ErrorKind::Missing => {
            backup::check(options, repo)?;
            out.plan(&format!("would create a repository in {} and store a full backup in it", repo.display()))
        }
        opened => {
            let repository = readable(opened.map_err(Failure::opening)?, &options.cluster)?;
            let plan = backup::plan(&repository, options)?;
            out.plan(&plan.to_string())
        }
    }
}

fn back_up(repo: &Path, init: bool, options: &backup::Options, out: Printer) -> Result<Exit, Failure> {
    let repository = if init { open_or_create(repo, options)? } else { open(repo)? };
    let repository = readable(repository, &options.cluster)?;
    let bars = Arc::new(Bars::new());
    let meaning = |_| "no backup was made".to_owned();
    let done = interrupt::explained(&bars, meaning, || backup::run(&repository, options, &*bars))??;
    out.document(&done, || report::backup(&done, repo))?;
    say_what_damage_came_to_light(&done.repository_damage, repo);
    let corrupt = say_what_is_corrupt(&done.backup, "the cluster", repo);
    let missed = say_what_was_missed(&done);
    Ok(if done.repository_damage.is_empty() && !missed { corrupt } else { Exit::Damage })
}

fn look_over(repo: &Path, options: &check::Options, out: Printer) -> Result<Exit, Failure> {
    let bars = Arc::new(Bars::new());
    let meaning = |_| "not everything was looked at; nothing was changed".to_owned();
    let done = interrupt::explained(&bars, meaning, || check::run(repo, options, &*bars))?;
    let done = report::without_secrets(done);
    out.document(&done, || report::check(&done))?;
    // On standard error too: a cron job that throws the report away must not hide this.
    if let Some(worst) = done.checks.iter().find(|finding| finding.status == done.status) {
        match done.status {
            Verdict::Ok | Verdict::Warning => {}
            Verdict::Damage => report::print_error(&worst.message, worst.hint.as_deref()),
            Verdict::Failed | Verdict::Unreadable => {
                report::print_error(&format!("no backup can be made: {}", worst.message), worst.hint.as_deref());
            }
        }
    }
    Ok(Exit::of_check(done.status))
}

/// Whether an audit found that a detector would have missed more than hint bits.
fn say_what_was_missed(done: &backup::Report) -> bool {
    let Some(audit) = done.audit.as_ref().filter(|audit| audit.serious_count > 0) else { return false };
    let missed = count(audit.serious_count, "block");
    let what = format!("done, but the detector {} would have missed {missed} that changed", audit.detector);
    report::print_error(&what, Some("this backup has them; use --detect scan until the cause is found"));
    true
}

/// Damage that is in no block of this backup, but was met on the way.
fn say_what_damage_came_to_light(damage: &[String], repo: &Path) {
    let hint = format!("pgstrata verify --repo {}", report::shell_word(&repo.display().to_string()));
    for damage in damage {
        report::print_error(&format!("done, but the repository is damaged elsewhere: {damage}"), Some(&hint));
    }
}

/// On standard error too: a cron job that throws the report away must not hide this.
fn say_what_is_corrupt(backup: &BackupSummary, place: &str, repo: &Path) -> Exit {
    let pages = backup.corrupt_pages.len() as u64;
    if pages > 0 {
        let hint = format!("pgstrata info {} {}", backup.id, report::whereabouts(repo, &backup.cluster));
        report::print_error(&format!("done, but {place} has {}", count(pages, "corrupt page")), Some(&hint));
    }
    Exit::done(pages > 0)
}

fn list(repo: &Path, cluster: &ClusterName, out: Printer) -> Result<Exit, Failure> {
    let repository = open(repo)?;
    let others = other_clusters(&repository, cluster)?;
    let catalog = repository.catalog(cluster).map_err(Failure::opening)?;
    let bytes = repository.stored_bytes(cluster).map_err(Failure::opening)?;
    out.document(&catalog.backups(), || match (catalog.backups(), catalog.damaged()) {
        ([], [_, ..]) => "no backup can be read\n".to_owned(),
        (backups, _) => report::list(backups, bytes, report::terminal_width()),
    })?;
    say_what_other_clusters_there_are(&others);
    Ok(say_what_is_damaged(&catalog))
}

/// The names of the repository's other clusters.
///
/// # Errors
/// `Missing` where there are others only: a name that is mistyped must not look like a cluster without backups.
fn other_clusters(repository: &Repository, cluster: &ClusterName) -> Result<Vec<String>, Failure> {
    let clusters = repository.clusters().map_err(Failure::opening)?;
    let others: Vec<String> = clusters.iter().filter(|name| *name != cluster).map(ToString::to_string).collect();
    if others.is_empty() || others.len() < clusters.len() {
        return Ok(others);
    }
    let what = format!("the repository has no cluster {:?}", cluster.to_string());
    let hint = format!("it has {}; say which with --cluster", others.join(", "));
    Err(Error::new(ErrorKind::Missing, what).at(repository.place()).hint(hint).into())
}

fn say_what_other_clusters_there_are(others: &[String]) {
    if !others.is_empty() {
        report::print_notice(&format!("the repository has other clusters, too (--cluster): {}", others.join(", ")));
    }
}

fn show(repo: &Path, cluster: &ClusterName, backup: &str, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, cluster)?;
    let catalog = repository.catalog(cluster).map_err(Failure::opening)?;
    let backup = catalog.select(backup)?;
    out.document(&backup, || report::details(&backup))?;
    Ok(say_what_is_damaged(&catalog))
}

/// The readable backups are listed whatever happened to the others, but never as if they were all.
fn say_what_is_damaged(catalog: &Catalog) -> Exit {
    for (object, error) in catalog.damaged() {
        let place = if error.place().is_none() { format!(" ({object})") } else { String::new() };
        report::print_error(&format!("a backup cannot be read: {error}{place}"), error.hint_text());
    }
    if catalog.damaged().is_empty() { Exit::Done } else { Exit::Repository }
}

fn check(
    repo: &Path,
    cluster: &ClusterName,
    backup: &str,
    options: &verify::Options,
    out: Printer,
) -> Result<Exit, Failure> {
    let repository = readable(open(repo)?, cluster)?;
    let others = other_clusters(&repository, cluster)?;
    let bars = Arc::new(Bars::new());
    let meaning = |_| "not everything was checked, so nothing is known; nothing was changed".to_owned();
    let done = interrupt::explained(&bars, meaning, || verify::run(&repository, cluster, backup, options, &*bars))??;
    out.document(&done, || report::verify(&done, options.quick) + &report::not_verified(&others))?;
    let damaged = !done.damage.is_empty() || done.backups.iter().any(|backup| !backup.ok);
    if damaged {
        let hint = "put what is damaged back from a copy of the repository and verify again; what is `ok` restores, and nothing is built \
                    upon the rest";
        report::print_error("done, but damage was found", Some(hint));
    }
    Ok(Exit::done(damaged))
}

fn bring_back(
    repo: &Path,
    cluster: &ClusterName,
    backup: &str,
    options: &restore::Options,
    out: Printer,
) -> Result<Exit, Failure> {
    let repository = open_with(repo, cluster)?;
    let bars = Arc::new(Bars::new());
    let target = options.target.clone();
    let meaning = move |phase| what_is_in(&target, phase).unwrap_or_else(|| "no file was restored".to_owned());
    let run = || restore::run(&repository, cluster, backup, options, &*bars);
    let done = interrupt::explained(&bars, meaning, run)??;
    out.document(&done, || report::restore(&done))?;
    Ok(say_what_is_corrupt(&done.backup, "the restored cluster", repo))
}

/// What a restore or an export to files that is interrupted leaves in its target; the first stage begins after the target is marked.
fn what_is_in(target: &Path, phase: Option<Phase>) -> Option<String> {
    let complete = phase.map(|_| format!("too late: {} is complete", target.display()));
    incomplete(target).or(complete)
}

fn synthesize(repo: &Path, options: &merge::Options, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, &options.cluster)?;
    let bars = Arc::new(Bars::new());
    let meaning = |_| "no backup was made".to_owned();
    let done = interrupt::explained(&bars, meaning, || merge::run(&repository, options, &*bars))??;
    out.document(&done, || report::merge(&done, repo))?;
    Ok(say_what_is_corrupt(&done.backup, "the merged backup", repo))
}

fn plan_copy(repo: &Path, to: &Path, init: bool, options: &export::Options, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, &options.cluster)?;
    match open_other(to, init, &options.cluster)? {
        Some(other) => {
            let plan = export::plan(&repository, &other, options)?;
            out.plan(&plan.to_string())
        }
        None => {
            let backup = select(&repository, &options.cluster, &options.backup)?;
            let to = to.display();
            out.plan(&format!(
                "would create a repository in {to} and copy backup {} with all its data to it",
                backup.id
            ))
        }
    }
}

fn copy(repo: &Path, to: &Path, init: bool, options: &export::Options, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, &options.cluster)?;
    let other = match open_other(to, init, &options.cluster)? {
        Some(other) => other,
        None => {
            select(&repository, &options.cluster, &options.backup)?;
            create(to)?
        }
    };
    let bars = Arc::new(Bars::new());
    let meaning = |_| "the other repository has no new backup".to_owned();
    let run = || export::to_repository(&repository, &other, options, &*bars);
    let done = interrupt::explained(&bars, meaning, run)??;
    out.document(&done, || report::copy(&done, to))?;
    Ok(say_what_is_corrupt(&done.backup, "the exported backup", to))
}

/// The repository to copy to; none if it is to be made first.
fn open_other(to: &Path, init: bool, cluster: &ClusterName) -> Result<Option<Repository>, Failure> {
    match Repository::open(to) {
        Ok(other) => readable(other, cluster).map(Some),
        Err(error) if error.kind() == ErrorKind::Missing && init => Ok(None),
        Err(error) if error.kind() == ErrorKind::Missing => {
            Err(Failure::opening(error.hint("check the path, or create it with --init")))
        }
        Err(error) => Err(Failure::opening(error)),
    }
}

fn select(repository: &Repository, cluster: &ClusterName, backup: &str) -> Result<BackupSummary, Failure> {
    Ok(repository.catalog(cluster).map_err(Failure::opening)?.select(backup)?)
}

fn unpack(
    repo: &Path,
    cluster: &ClusterName,
    backup: &str,
    options: &export::FilesOptions,
    out: Printer,
) -> Result<Exit, Failure> {
    let repository = open_with(repo, cluster)?;
    let bars = Arc::new(Bars::new());
    let target = options.target.clone();
    let meaning = move |phase| what_is_in(&target, phase).unwrap_or_else(|| "no file was exported".to_owned());
    let run = || export::to_files(&repository, cluster, backup, options, &*bars);
    let done = interrupt::explained(&bars, meaning, run)??;
    out.document(&done, || report::unpack(&done))?;
    Ok(say_what_is_corrupt(&done.backup, "the exported cluster", repo))
}

fn remove(repo: &Path, dry_run: bool, options: &expire::Options, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, &options.cluster)?;
    let done = if dry_run { expire::plan(&repository, options)? } else { expire_backups(&repository, options)? };
    out.document(&done, || report::expire(&done))?;
    for refused in &done.refused {
        report::print_error(&format!("cannot be deleted: {refused}"), None);
    }
    Ok(if done.refused.is_empty() { Exit::Done } else { Exit::Failed })
}

fn expire_backups(repository: &Repository, options: &expire::Options) -> Result<expire::Report, Failure> {
    let bars = Arc::new(Bars::new());
    let meaning = |_| "every backup that is listed is whole; run it again for the rest".to_owned();
    Ok(interrupt::explained(&bars, meaning, || expire::run(repository, options, &*bars))??)
}

fn set_pin(repo: &Path, cluster: &ClusterName, backup: &str, pinned: bool, out: Printer) -> Result<Exit, Failure> {
    let repository = open_with(repo, cluster)?;
    let backup = pin::set(&repository, cluster, backup, pinned)?;
    out.document(&backup, || match pinned {
        true => format!("pinned {}: expire leaves it alone\n", backup.id),
        false => format!("unpinned {}: expire decides about it again\n", backup.id),
    })?;
    Ok(Exit::Done)
}

fn completions(shell: clap_complete::Shell, out: Printer) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pgstrata", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    out.document(&report::Completions { script: &script }, || script.clone())?;
    Ok(Exit::Done)
}
