//! From arguments, environment and configuration file to one [`Request`].
//!
//! The layers, the first that says something wins: the command line; `PGSTRATA_*` in the environment; the command's
//! own table in the file (`[backup]`); the top of the file. The environment and the file are laid under clap's
//! definitions as default values, so an option has one definition, one parser and one meaning wherever it is given.
//! Each such value is also parsed on its own first: clap's error would not say where it came from.
//!
//! `--full`, `--differential` and `--parent` are one choice: whichever layer makes it, lower layers are not asked. Likewise,
//! `expire` with backups or rules that are typed does not ask whether the layers below keep all.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::builder::OsStr;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches};
use engine::repo::ClusterName;
use engine::{Error, backup, check, expire, export, merge, restore, verify};

use crate::args::{
    BackupArgs, CheckArgs, Cli, Command, ExpireArgs, ExportArgs, ExportFormat, KeepArgs, MergeArgs, PinArgs, RULES,
    RestoreArgs, VerifyArgs,
};
use crate::report::Failure;

const DEFAULT_FILE: &str = "/etc/pgstrata/pgstrata.toml";
const PARENT_CHOICE: [&str; 3] = ["full", "differential", "parent"];
/// Long options that only make sense where they are typed, or that say where the file is.
const NOT_IN_FILE: [&str; 3] = ["help", "version", "config"];

/// Where configuration comes from.
pub struct Sources<'a> {
    /// The command line, the program's name first.
    pub args: Vec<OsString>,
    /// The environment.
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
    /// The file that is read when it is there and no other is named.
    pub default_file: PathBuf,
}

/// What a command line asks for.
pub enum Request {
    Init { repo: PathBuf },
    Backup { repo: PathBuf, init: bool, dry_run: bool, options: backup::Options },
    Check { repo: PathBuf, options: check::Options },
    List { repo: PathBuf, cluster: ClusterName, backup: Option<String> },
    Verify { repo: PathBuf, cluster: ClusterName, backup: String, options: verify::Options },
    Restore { repo: PathBuf, cluster: ClusterName, backup: String, dry_run: bool, options: restore::Options },
    Merge { repo: PathBuf, dry_run: bool, options: merge::Options },
    Copy { repo: PathBuf, to: PathBuf, init: bool, dry_run: bool, options: export::Options },
    Unpack { repo: PathBuf, cluster: ClusterName, backup: String, dry_run: bool, options: export::FilesOptions },
    Expire { repo: PathBuf, dry_run: bool, options: expire::Options },
    Pin { repo: PathBuf, cluster: ClusterName, backup: String, pinned: bool },
    Demo { keep: bool, dir: Option<PathBuf> },
    Completions { shell: clap_complete::Shell },
}

impl Sources<'static> {
    /// Those of this process.
    pub fn of_this_process() -> Self {
        Self {
            args: std::env::args_os().collect(),
            env: &|name| std::env::var_os(name),
            default_file: PathBuf::from(DEFAULT_FILE),
        }
    }
}

impl Sources<'_> {
    /// Whether a JSON document is wanted, and what is asked for.
    ///
    /// The first is answered even when the second cannot be: a failure is then printed as a document too.
    pub fn resolve(&self) -> (bool, Result<Request, Failure>) {
        let mut json = self.args.iter().any(|arg| arg == "--json");
        let request = self.settings().and_then(|settings| {
            let subcommand = self.args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default();
            let set = settings.get(&(canonical_name(subcommand), "json".to_owned()));
            json |= set.is_some_and(|setting| setting.values == ["true"]);
            request(&with_defaults(&settings).try_get_matches_from(&self.args)?, self.env)
        });
        (json, request)
    }

    /// Everything that the environment and the file say, by command and option.
    fn settings(&self) -> Result<Settings, Failure> {
        let mut settings = match self.file()? {
            Some(file) => file_settings(&file, &read_file(&file)?)?,
            None => Settings::new(),
        };
        for (key, arg) in configurable_options() {
            let name = format!("PGSTRATA_{}", key.1.to_uppercase().replace('-', "_"));
            let Some(value) = (self.env)(&name).filter(|value| !value.is_empty()) else { continue };
            let value = value.into_string().map_err(|_| Failure::usage(format!("{name} is not valid UTF-8")))?;
            let values = if is_list(&arg) { value.lines().map(str::to_owned).collect() } else { vec![value] };
            let setting = Setting { values, from_env: true }.checked(&arg, &name)?;
            settings.insert(key, setting);
        }
        one_parent_choice(&mut settings)?;
        Ok(settings)
    }

    /// The file to read: the one that is named, else the usual one if it is there.
    fn file(&self) -> Result<Option<PathBuf>, Failure> {
        let named = named_file(&self.args).or_else(|| (self.env)("PGSTRATA_CONFIG").filter(|value| !value.is_empty()));
        match named {
            Some(file) => Ok(Some(PathBuf::from(file))),
            None => Ok(self.default_file.exists().then(|| self.default_file.clone())),
        }
    }
}

/// A command's name and one of its long options.
type Key = (String, String);
type Settings = BTreeMap<Key, Setting>;

/// What the environment or the file says about an option.
#[derive(Debug)]
struct Setting {
    values: Vec<String>,
    from_env: bool,
}

impl Setting {
    /// Parses the values as if they were typed; `origin` names the variable or the key.
    fn checked(mut self, arg: &Arg, origin: &str) -> Result<Self, Failure> {
        if !is_list(arg) && self.values.len() != 1 {
            return Err(Failure::usage(format!("{origin}: takes one value, not {}", self.values.len())));
        }
        if is_flag(arg) {
            let value = parse_bool(&self.values[0])
                .ok_or_else(|| Failure::usage(format!("{origin}: expected true or false, not {:?}", self.values[0])))?;
            self.values = vec![value.to_string()];
            return Ok(self);
        }
        let long = arg.get_long().unwrap_or_default();
        let typed = self.values.iter().map(|value| format!("--{long}={value}"));
        let alone = clap::Command::new("check").no_binary_name(true).arg(arg.clone().required(false));
        match alone.try_get_matches_from(typed) {
            Ok(_) => Ok(self),
            Err(error) => Err(Failure::usage(format!("{origin}: {}", one_line(&error)))),
        }
    }

    /// Whether it makes a choice: a flag that is off makes none.
    fn chooses(&self) -> bool {
        self.values != ["false"]
    }
}

/// The first line of clap's message, without its `error: `.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

fn is_flag(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

/// Every long option of every command that may stand in the environment and the file.
fn configurable_options() -> impl Iterator<Item = (Key, Arg)> {
    let commands: Vec<_> = Cli::command().get_subcommands().cloned().collect();
    commands.into_iter().flat_map(|command| {
        let options = command.get_arguments().filter(|arg| is_configurable(arg)).cloned().collect::<Vec<_>>();
        options.into_iter().map(move |arg| {
            let long = arg.get_long().unwrap_or_default().to_owned();
            ((command.get_name().to_owned(), long), arg)
        })
    })
}

fn is_configurable(arg: &Arg) -> bool {
    arg.get_long().is_some_and(|long| !NOT_IN_FILE.contains(&long))
}

/// A command's own name, where an alias of it is given; else the text itself.
fn canonical_name(name: &str) -> String {
    let cli = Cli::command();
    cli.find_subcommand(name).map_or(name, |command| command.get_name()).to_owned()
}

/// The value of `--config` on the command line, which is needed before the line can be parsed.
fn named_file(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().cloned();
        }
        if let Some(value) = arg.to_str().and_then(|text| text.strip_prefix("--config=")) {
            return Some(value.into());
        }
    }
    None
}

fn read_file(path: &Path) -> Result<toml::Table, Failure> {
    let text = fs::read_to_string(path).map_err(|error| Failure::usage(Error::io("read", path, error).to_string()))?;
    // The error would quote the line, and a line may hold a password.
    text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
        Failure::usage(format!("{}, line {line}: {}", path.display(), error.message()))
    })
}

/// What the file says: first its top, for every command that has the option, then each command's own table.
fn file_settings(path: &Path, file: &toml::Table) -> Result<Settings, Failure> {
    let (tables, top): (Vec<_>, Vec<_>) = file.iter().partition(|(_, value)| value.is_table());
    let mut settings = Settings::new();
    add_table(&mut settings, path, None, top.into_iter())?;
    for (name, table) in tables {
        let command = canonical_name(name);
        if Cli::command().find_subcommand(&command).is_none() {
            return Err(Failure::usage(format!("{}: [{name}] is no command", path.display())));
        }
        add_table(&mut settings, path, Some(&command), table.as_table().into_iter().flatten())?;
    }
    Ok(settings)
}

/// Adds the keys of one table: of `command`, or of all commands at the top of the file.
fn add_table<'t>(
    settings: &mut Settings,
    path: &Path,
    command: Option<&str>,
    table: impl Iterator<Item = (&'t String, &'t toml::Value)>,
) -> Result<(), Failure> {
    let known: Vec<(Key, Arg)> =
        configurable_options().filter(|((name, _), _)| command.is_none_or(|command| command == name)).collect();
    let mut seen = BTreeMap::new();
    for (key, value) in table {
        let section = command.map(|command| format!("[{command}] ")).unwrap_or_default();
        let origin = format!("{}: {section}{key}", path.display());
        let long = key.replace('_', "-");
        if let Some(other) = seen.insert(long.clone(), key) {
            return Err(Failure::usage(format!("{origin}: the same option as {other}")));
        }
        let mut options = known.iter().filter(|((_, option), _)| *option == long).peekable();
        if options.peek().is_none() {
            return Err(Failure::usage(format!("{origin}: there is no such option")));
        }
        let values = texts(value).ok_or_else(|| {
            Failure::usage(format!("{origin}: expected a text, a whole number, true or false, or a list of texts"))
        })?;
        for (option, arg) in options {
            let setting = Setting { values: values.clone(), from_env: false }.checked(arg, &origin)?;
            settings.insert(option.clone(), setting);
        }
    }
    Ok(())
}

/// A TOML value as it would be typed.
fn texts(value: &toml::Value) -> Option<Vec<String>> {
    let one = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    };
    match value {
        toml::Value::Array(items) => items.iter().map(one).collect(),
        value => one(value).map(|text| vec![text]),
    }
}

/// Drops what the file says about the parent where the environment says something, and refuses two choices in one.
fn one_parent_choice(settings: &mut Settings) -> Result<(), Failure> {
    let choices = |settings: &Settings, from_env: bool| -> Vec<&str> {
        let chosen = |key: &(String, String)| settings.get(key).is_some_and(|s| s.from_env == from_env && s.chooses());
        PARENT_CHOICE.into_iter().filter(|option| chosen(&("backup".to_owned(), option.to_string()))).collect()
    };
    if !choices(settings, true).is_empty() {
        settings.retain(|(_, option), setting| setting.from_env || !PARENT_CHOICE.contains(&option.as_str()));
    }
    for (from_env, place) in [(true, "the environment"), (false, "the configuration file")] {
        if let [first, second, ..] = choices(settings, from_env)[..] {
            return Err(Failure::usage(format!("{place} sets both {first} and {second}; a backup has one parent")));
        }
    }
    Ok(())
}

/// Clap's definitions with `settings` under them.
fn with_defaults(settings: &Settings) -> clap::Command {
    let names: Vec<String> = Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(Cli::command(), |cli, name| {
        cli.mut_subcommand(name.clone(), |command| {
            command.mut_args(|arg| {
                let key = (name.clone(), arg.get_long().unwrap_or_default().to_owned());
                match settings.get(&key) {
                    Some(setting) => with_default(arg, setting),
                    None => arg,
                }
            })
        })
    })
}

/// The default is not shown in `--help`: it may hold a password.
fn with_default(arg: Arg, setting: &Setting) -> Arg {
    let values = setting.values.iter().map(|value| OsStr::from(value.clone()));
    let shown = is_flag(&arg);
    arg.required(false).default_values(values).hide_default_value(!shown)
}

fn request(matches: &ArgMatches, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Request, Failure> {
    let command_matches = matches.subcommand().map(|(_, matches)| matches);
    Ok(match Cli::from_arg_matches(matches)?.command {
        Command::Init(args) => Request::Init { repo: args.repo },
        Command::Backup(args) => backup_request(args, command_matches, env),
        Command::Check(args) => check_request(args, env),
        Command::List(args) => Request::List { repo: args.repo.repo, cluster: args.repo.cluster, backup: args.backup },
        Command::Verify(args) => verify_request(args),
        Command::Restore(args) => restore_request(args),
        Command::Merge(args) => merge_request(args),
        Command::Export(args) => export_request(args, command_matches)?,
        Command::Expire(args) => expire_request(args, command_matches)?,
        Command::Pin(args) => pin_request(args, true),
        Command::Unpin(args) => pin_request(args, false),
        Command::Demo(args) => Request::Demo { keep: args.keep, dir: args.dir },
        Command::Completions(args) => Request::Completions { shell: args.shell },
    })
}

fn backup_request(args: BackupArgs, matches: Option<&ArgMatches>, env: &dyn Fn(&str) -> Option<OsString>) -> Request {
    let options = backup::Options {
        parent: parent_choice(&args, matches),
        cluster: args.repo.cluster,
        data_dir: data_dir(args.pgdata, env),
        conninfo: args.dbname,
        detector: args.detect,
        wal_archive: args.wal_archive,
        audit: args.audit,
        audit_every: args.audit_every,
        offline: args.offline,
        jobs: args.jobs,
        compression: args.compress,
        max_rate: args.max_rate,
        note: args.note,
    };
    Request::Backup { repo: args.repo.repo, init: args.init, dry_run: args.dry_run, options }
}

/// The data directory that is given, or libpq's.
fn data_dir(given: Option<PathBuf>, env: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    given.or_else(|| env("PGDATA").filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn check_request(args: CheckArgs, env: &dyn Fn(&str) -> Option<OsString>) -> Request {
    let options = check::Options {
        cluster: args.repo.cluster,
        data_dir: data_dir(args.pgdata, env),
        conninfo: args.dbname,
        wal_archive: args.wal_archive,
    };
    Request::Check { repo: args.repo.repo, options }
}

/// The parent that is asked for; once the command line asks for one, what lies under it counts no more.
fn parent_choice(args: &BackupArgs, matches: Option<&ArgMatches>) -> backup::ParentChoice {
    let choice = PARENT_CHOICE.into_iter().find(|option| is_typed(matches, option));
    let asks = |option| choice.is_none_or(|choice| choice == option);
    match &args.parent.parent {
        Some(backup) if asks("parent") => backup::ParentChoice::Named(backup.clone()),
        _ if args.parent.full && asks("full") => backup::ParentChoice::Full,
        _ if args.parent.differential && asks("differential") => backup::ParentChoice::Differential,
        _ => backup::ParentChoice::Automatic,
    }
}

/// Whether an option, by its field's name, is on the command line; not whether a lower layer sets it.
fn is_typed(matches: Option<&ArgMatches>, option: &str) -> bool {
    matches.and_then(|matches| matches.value_source(option)) == Some(ValueSource::CommandLine)
}

fn verify_request(args: VerifyArgs) -> Request {
    let options = verify::Options { quick: args.quick, jobs: args.jobs };
    Request::Verify { repo: args.repo.repo, cluster: args.repo.cluster, backup: args.backup, options }
}

fn restore_request(args: RestoreArgs) -> Request {
    let options = restore::Options {
        target: args.target,
        tablespace_map: args.tablespace_map,
        archive_mode: args.keep_archive_mode,
        jobs: args.jobs,
    };
    let RestoreArgs { repo, backup, dry_run, .. } = args;
    Request::Restore { repo: repo.repo, cluster: repo.cluster, backup, dry_run, options }
}

fn merge_request(args: MergeArgs) -> Request {
    let options = merge::Options {
        cluster: args.repo.cluster,
        backup: args.backup,
        repack: args.repack,
        verify: args.verify,
        jobs: args.jobs,
        compression: args.compress,
        note: args.note,
    };
    Request::Merge { repo: args.repo.repo, dry_run: args.dry_run, options }
}

/// What is typed must be of use for the format; what the layers below say may be meant for another one.
fn export_request(args: ExportArgs, matches: Option<&ArgMatches>) -> Result<Request, Failure> {
    let useless: &[&str] = match args.format {
        ExportFormat::Repository => &["tablespace_map"],
        ExportFormat::Plain => &["init", "compress"],
        ExportFormat::Tar => &["init", "compress", "tablespace_map"],
    };
    if let Some(option) = useless.iter().find(|option| is_typed(matches, option)) {
        let format = if *option == "tablespace_map" { "plain" } else { "repository" };
        return Err(Failure::usage(format!("--{} is only for --format {format}", option.replace('_', "-"))));
    }
    Ok(match args.format {
        ExportFormat::Repository => copy_request(args),
        ExportFormat::Plain => unpack_request(args, export::FileFormat::Plain),
        ExportFormat::Tar => unpack_request(ExportArgs { tablespace_map: Vec::new(), ..args }, export::FileFormat::Tar),
    })
}

fn copy_request(args: ExportArgs) -> Request {
    let ExportArgs { backup, repo, to, init, jobs, compress, dry_run, .. } = args;
    let options = export::Options { cluster: repo.cluster, backup, jobs, compression: compress };
    Request::Copy { repo: repo.repo, to, init, dry_run, options }
}

fn unpack_request(args: ExportArgs, format: export::FileFormat) -> Request {
    let ExportArgs { backup, repo, to, tablespace_map, jobs, dry_run, .. } = args;
    let options = export::FilesOptions { target: to, format, tablespace_map, jobs };
    Request::Unpack { repo: repo.repo, cluster: repo.cluster, backup, dry_run, options }
}

fn expire_request(args: ExpireArgs, matches: Option<&ArgMatches>) -> Result<Request, Failure> {
    let options = expire::Options {
        selection: selection(args.backups, &args.keep, matches)?,
        cluster: args.repo.cluster,
        force: args.force,
        max_unused: args.max_unused.0,
        compression: args.compress,
        jobs: args.jobs,
    };
    Ok(Request::Expire { repo: args.repo.repo, dry_run: args.dry_run, options })
}

/// Backups that are named win over rules, rules that are typed over a `keep-all` that is not.
fn selection(
    backups: Vec<String>,
    keep: &KeepArgs,
    matches: Option<&ArgMatches>,
) -> Result<expire::Selection, Failure> {
    let policy = policy(keep);
    let rule_is_typed = RULES.into_iter().any(|rule| is_typed(matches, rule));
    match () {
        () if !backups.is_empty() => Ok(expire::Selection::Named(backups)),
        () if keep.keep_all && !rule_is_typed => Ok(expire::Selection::Nothing),
        () if !policy.is_empty() => Ok(expire::Selection::Policy(policy)),
        () => Err(Failure::Usage {
            text: match *keep == KeepArgs::default() {
                true => "nothing says which backups to keep, nor which to remove".to_owned(),
                false => "0 is no rule, so nothing says which backups to keep, nor which to remove".to_owned(),
            },
            hint: Some(
                "give a rule, as in --keep-last 7 or --keep-daily 7, or the backups to remove; \
                 --keep-all removes no backup, only data that none needs",
            ),
        }),
    }
}

fn policy(keep: &KeepArgs) -> expire::Policy {
    expire::Policy {
        last: keep.keep_last,
        within: keep.keep_within,
        hourly: keep.keep_hourly,
        daily: keep.keep_daily,
        weekly: keep.keep_weekly,
        monthly: keep.keep_monthly,
        yearly: keep.keep_yearly,
    }
}

fn pin_request(args: PinArgs, pinned: bool) -> Request {
    Request::Pin { repo: args.repo.repo, cluster: args.repo.cluster, backup: args.backup, pinned }
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;

    use engine::backup::{Compression, ParentChoice};
    use engine::expire::Count;

    use super::*;

    /// Resolves a command line over an environment and the text of a configuration file.
    fn resolve(file: &str, env: &[(&str, &str)], line: &str) -> (bool, Result<Request, Failure>) {
        let dir = tempfile::tempdir().unwrap();
        let default_file = dir.path().join("pgstrata.toml");
        fs::write(&default_file, file).unwrap();
        let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        let args = ["pgstrata"].into_iter().chain(line.split_whitespace()).map(OsString::from).collect();
        Sources { args, env: &env, default_file }.resolve()
    }

    fn backup_options(file: &str, env: &[(&str, &str)], line: &str) -> backup::Options {
        match resolve(file, env, line).1 {
            Ok(Request::Backup { options, .. }) => options,
            Ok(_) => panic!("{line} is no backup"),
            Err(failure) => panic!("{line}: {failure:?}"),
        }
    }

    fn usage_error(file: &str, env: &[(&str, &str)], line: &str) -> String {
        match resolve(file, env, line).1 {
            Err(Failure::Usage { text, .. }) => {
                text.rsplit_once("/pgstrata.toml").map(|(_, text)| text.to_owned()).unwrap_or(text)
            }
            Err(failure) => panic!("{line}: {failure:?}"),
            Ok(_) => panic!("{line} is accepted"),
        }
    }

    #[test]
    fn arguments_win_over_the_environment_and_that_over_the_file() {
        let file = "repo = '/file'\njobs = 1\nnote = 'file'\n[backup]\njobs = 2\n";
        let jobs = |env: &[(&str, &str)], line| backup_options(file, env, line).jobs.map(NonZero::get);
        assert_eq!(jobs(&[("PGSTRATA_JOBS", "3")], "backup --jobs 4"), Some(4));
        assert_eq!(jobs(&[("PGSTRATA_JOBS", "3")], "backup"), Some(3));
        assert_eq!(jobs(&[("PGSTRATA_JOBS", "")], "backup"), Some(2), "an empty variable counts as none");
        let Ok(Request::Verify { repo, options, .. }) =
            resolve("repo = '/file'\njobs = 1\n[backup]\njobs = 2", &[], "verify").1
        else {
            panic!("no verify");
        };
        assert_eq!((repo, options.jobs.map(NonZero::get)), ("/file".into(), Some(1)));
    }

    #[test]
    fn every_kind_of_option_can_stand_in_the_file_in_either_spelling() {
        let file = "[backup]\nrepo = '/r'\ninit = true\nmax_rate = '1M'\ndry-run = true\ncompress = 'none'\npgdata = '/d'\n\
                    [restore]\nrepo = '/r'\ntarget = '/t'\ntablespace-map = ['/a=/b', '/c=/d']\n";
        let Ok(Request::Backup { repo, init: true, dry_run: true, options }) = resolve(file, &[], "backup").1 else {
            panic!("no backup");
        };
        assert_eq!((repo, options.data_dir), ("/r".into(), Some("/d".into())));
        assert_eq!((options.max_rate.map(NonZero::get), options.compression), (Some(1 << 20), Compression::None));
        let Ok(Request::Restore { options, .. }) = resolve(file, &[], "restore").1 else { panic!("no restore") };
        assert_eq!(options.tablespace_map, [("/a".into(), "/b".into()), ("/c".into(), "/d".into())]);
    }

    #[test]
    fn a_list_in_the_environment_has_a_line_for_each_item() {
        let env = [("PGSTRATA_TABLESPACE_MAP", "/a=/b\n/c=/d\n")];
        let Ok(Request::Restore { options, .. }) = resolve("", &env, "restore --repo /r --target /t").1 else {
            panic!("no restore");
        };
        assert_eq!(options.tablespace_map, [("/a".into(), "/b".into()), ("/c".into(), "/d".into())]);
    }

    #[test]
    fn a_flag_can_be_switched_off_in_the_environment() {
        let audit = |env: &[(&str, &str)]| backup_options("audit = true", env, "backup --repo /r").audit;
        assert!(audit(&[]));
        assert!(!audit(&[("PGSTRATA_AUDIT", "off")]));
        assert_eq!(
            usage_error("", &[("PGSTRATA_AUDIT", "maybe")], "backup --repo /r"),
            "PGSTRATA_AUDIT: expected true or false, not \"maybe\""
        );
    }

    #[test]
    fn the_parent_is_one_choice_made_by_the_highest_layer_that_makes_it() {
        let parent = |file: &str, env: &[(&str, &str)], line| backup_options(file, env, line).parent;
        let (file, env) = ("repo = '/r'\nfull = true", [("PGSTRATA_DIFFERENTIAL", "true")]);
        assert_eq!(parent("repo = '/r'", &[], "backup"), ParentChoice::Automatic);
        assert_eq!(parent(file, &[], "backup"), ParentChoice::Full);
        assert_eq!(parent(file, &env, "backup"), ParentChoice::Differential);
        assert_eq!(parent(file, &env, "backup --parent 2026"), ParentChoice::Named("2026".to_owned()));
        assert_eq!(parent(file, &[("PGSTRATA_PARENT", "2026")], "backup --full"), ParentChoice::Full);
    }

    #[test]
    fn a_connection_that_the_file_names_is_no_conflict_with_offline() {
        let options = backup_options("dbname = 'service=main'", &[], "backup --repo /r -D /d --offline");
        assert!(options.offline);
    }

    #[test]
    fn two_parents_in_one_layer_are_refused() {
        let both = [("PGSTRATA_FULL", "1"), ("PGSTRATA_PARENT", "2026")];
        assert!(usage_error("", &both, "backup --repo /r").contains("the environment sets both full and parent"));
        let file = "[backup]\nfull = true\ndifferential = true";
        assert!(usage_error(file, &[], "backup --repo /r").contains("the configuration file sets both"));
        let (_, result) = resolve("", &[], "backup --repo /r --full --differential");
        assert!(matches!(result, Err(Failure::Arguments(_))));
    }

    fn expire_options(file: &str, env: &[(&str, &str)], line: &str) -> expire::Options {
        match resolve(file, env, line).1 {
            Ok(Request::Expire { options, .. }) => options,
            Ok(_) => panic!("{line} is no expire"),
            Err(failure) => panic!("{line}: {failure:?}"),
        }
    }

    fn rules(file: &str, env: &[(&str, &str)], line: &str) -> expire::Policy {
        match expire_options(file, env, line).selection {
            expire::Selection::Policy(policy) => policy,
            selection => panic!("{line}: {selection:?}"),
        }
    }

    #[test]
    fn the_rules_of_expire_can_stand_in_every_layer_and_add_up() {
        let file =
            "repo = '/r'\n[expire]\nkeep-daily = 7\nkeep_within = '2w'\nmax-unused = 'unlimited'\nkeep-last = 3\n";
        let env = [("PGSTRATA_KEEP_MONTHLY", "unlimited"), ("PGSTRATA_KEEP_LAST", "4")];
        let wanted = expire::Policy {
            last: Some(Count::Number(5)),
            within: Some("14d".parse().unwrap()),
            daily: Some(Count::Number(7)),
            monthly: Some(Count::Unlimited),
            ..expire::Policy::default()
        };
        assert_eq!(rules(file, &env, "expire --keep-last 5"), wanted);
        assert_eq!(rules(file, &env, "expire"), expire::Policy { last: Some(Count::Number(4)), ..wanted });
        assert_eq!(expire_options(file, &env, "expire").max_unused, None);
        assert_eq!(expire_options(file, &env, "expire --max-unused 10%").max_unused, Some(10));
        assert_eq!(expire_options("", &[], "expire --repo /r --keep-last 1").max_unused, Some(25));
        let error = usage_error("[expire]\nkeep-daily = -1", &[], "expire --repo /r");
        assert!(error.contains(": [expire] keep-daily: ") && error.contains("use a number, or unlimited"), "{error}");
    }

    #[test]
    fn backups_that_are_named_go_whatever_the_layers_below_would_keep() {
        for (file, env) in [
            ("[expire]\nkeep-daily = 7\nkeep-all = true", &[][..]),
            ("", &[("PGSTRATA_KEEP_LAST", "1"), ("PGSTRATA_KEEP_ALL", "yes")]),
        ] {
            match expire_options(file, env, "expire 2026 latest --repo /r --force").selection {
                expire::Selection::Named(backups) => assert_eq!(backups, ["2026", "latest"]),
                selection => panic!("{selection:?}"),
            }
        }
    }

    #[test]
    fn to_keep_all_is_a_choice_that_typed_rules_undo() {
        let all = "[expire]\nkeep-all = true\nkeep-daily = 7";
        assert!(matches!(expire_options(all, &[], "expire --repo /r").selection, expire::Selection::Nothing));
        assert_eq!(rules(all, &[], "expire --repo /r --keep-last 1").last, Some(Count::Number(1)));
        let typed = expire_options("keep-daily = 7", &[], "expire --repo /r --keep-all");
        assert!(matches!(typed.selection, expire::Selection::Nothing));
    }

    #[test]
    fn expire_without_a_rule_says_how_to_give_one() {
        for (file, line) in [
            ("", "expire --repo /r"),
            ("", "expire --repo /r --keep-last 0 --keep-within 0d"),
            ("[expire]\nkeep-daily = 0", "expire --repo /r --dry-run"),
        ] {
            let Err(Failure::Usage { text, hint: Some(hint) }) = resolve(file, &[], line).1 else { panic!("{line}") };
            assert!(text.contains("which backups to keep"), "{text}");
            assert!(hint.contains("--keep-last") && hint.contains("--keep-all"), "{hint}");
        }
    }

    #[test]
    fn an_export_is_a_copy_in_another_repository_or_files() {
        let line = "export oldest --repo /r --to /t --init --compress none";
        let Ok(Request::Copy { repo, to, init: true, options, .. }) = resolve("", &[], line).1 else {
            panic!("no copy");
        };
        assert_eq!((repo, to, options.backup.as_str()), ("/r".into(), "/t".into(), "oldest"));
        let line = "export --repo /r --to /t --format plain --tablespace-map /a=/b";
        let Ok(Request::Unpack { backup, options, .. }) = resolve("", &[], line).1 else { panic!("no files") };
        assert_eq!((backup.as_str(), options.format), ("latest", export::FileFormat::Plain));
        assert_eq!(options.tablespace_map, [("/a".into(), "/b".into())]);
    }

    #[test]
    fn an_option_that_the_format_has_no_use_for_is_refused_where_it_is_typed() {
        for (options, message) in [
            ("--tablespace-map /a=/b", "--tablespace-map is only for --format plain"),
            ("--format tar --tablespace-map /a=/b", "--tablespace-map is only for --format plain"),
            ("--format tar --init", "--init is only for --format repository"),
            ("--format plain --compress none", "--compress is only for --format repository"),
        ] {
            assert_eq!(usage_error("", &[], &format!("export --repo /r --to /t {options}")), message);
        }
        let file = "tablespace-map = ['/a=/b']\ncompress = 'none'\ninit = true";
        let Ok(Request::Unpack { options, .. }) = resolve(file, &[], "export --repo /r --to /t --format tar").1 else {
            panic!("no files");
        };
        assert!(options.tablespace_map.is_empty());
    }

    #[test]
    fn what_the_file_gets_wrong_is_said_with_its_key() {
        let cases = [
            ("repos = '/r'", ": repos: there is no such option"),
            ("[backup]\nquick = true", ": [backup] quick: there is no such option"),
            ("config = '/other'", ": config: there is no such option"),
            ("[prune]\njobs = 1", ": [prune] is no command"),
            ("jobs = 0", ": jobs: invalid value '0' for '--jobs <N>': expected a number of threads, 1 or more"),
            ("jobs = [1, 2]", ": jobs: takes one value, not 2"),
            ("jobs = 1.5", ": jobs: expected a text, a whole number, true or false, or a list of texts"),
            ("quick = 'perhaps'", ": quick: expected true or false, not \"perhaps\""),
            ("max-rate = '1M'\nmax_rate = '2M'", ": max_rate: the same option as max-rate"),
        ];
        for (file, message) in cases {
            assert_eq!(usage_error(file, &[], "list --repo /r"), message, "{file}");
        }
    }

    #[test]
    fn a_file_that_is_no_toml_is_refused_without_quoting_it() {
        let message = usage_error("jobs = 1\ndbname = 'password=secret", &[], "list --repo /r");
        assert!(message.contains("line 2") && !message.contains("secret"), "{message}");
    }

    #[test]
    fn a_file_that_is_named_must_be_there() {
        for line in ["list --repo /r --config /nonexistent.toml", "list --repo /r --config=/nonexistent.toml"] {
            assert!(usage_error("", &[], line).contains("cannot read /nonexistent.toml"), "{line}");
        }
        let env = [("PGSTRATA_CONFIG", "/nonexistent.toml")];
        assert!(usage_error("", &env, "list --repo /r").contains("cannot read /nonexistent.toml"));
    }

    #[test]
    fn the_data_directory_falls_back_to_pgdata() {
        let data_dir = |env: &[(&str, &str)], line| backup_options("", env, line).data_dir;
        let pgdata = ("PGDATA", "/pgdata");
        assert_eq!(data_dir(&[pgdata], "backup --repo /r"), Some("/pgdata".into()));
        assert_eq!(data_dir(&[pgdata, ("PGSTRATA_PGDATA", "/ours")], "backup --repo /r"), Some("/ours".into()));
        assert_eq!(data_dir(&[pgdata], "backup --repo /r -D /typed"), Some("/typed".into()));
        assert_eq!(data_dir(&[], "backup --repo /r"), None);
    }

    #[test]
    fn a_check_takes_what_a_backup_is_given() {
        let file = "repo = '/r'\npgdata = '/d'\nwal-archive = '/a'\n[check]\ncluster = 'shop'";
        let env = [("PGSTRATA_DBNAME", "service=main"), ("PGDATA", "/pgdata")];
        let Ok(Request::Check { repo, options }) = resolve(file, &env, "check").1 else { panic!("no check") };
        assert_eq!((repo, options.data_dir, options.wal_archive), ("/r".into(), Some("/d".into()), Some("/a".into())));
        assert_eq!(
            (options.cluster.to_string(), options.conninfo.as_deref()),
            ("shop".to_owned(), Some("service=main"))
        );
        let Ok(Request::Check { options, .. }) = resolve("", &env, "check --repo /r").1 else { panic!("no check") };
        assert_eq!(options.data_dir, Some("/pgdata".into()));
    }

    #[test]
    fn json_can_be_asked_for_in_every_layer_and_holds_for_failures() {
        for (file, env, line) in [
            ("", &[][..], "list --json"),
            ("json = true", &[], "list"),
            ("[list]\njson = true", &[], "info"),
            ("", &[("PGSTRATA_JSON", "1")], "list"),
        ] {
            let (json, result) = resolve(file, env, line);
            assert!(json && result.is_err(), "{file:?} {line}");
        }
        assert!(!resolve("[backup]\njson = true", &[], "list").0);
    }

    #[test]
    fn the_help_never_shows_what_the_environment_or_the_file_holds() {
        let env = [("PGSTRATA_DBNAME", "host=db password=secret")];
        let Err(Failure::Arguments(help)) = resolve("note = 'hidden'", &env, "backup --help").1 else {
            panic!("no help")
        };
        let help = help.to_string();
        assert!(help.contains("--dbname") && !help.contains("secret") && !help.contains("hidden"), "{help}");
    }

    #[test]
    fn the_configuration_file_of_the_readme_is_one() {
        let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
        let (_, file) = readme.split_once("```toml\n").unwrap();
        let (file, _) = file.split_once("```").unwrap();
        assert_eq!(backup_options(file, &[], "backup").jobs.map(NonZero::get), Some(2));
    }
}
