//! The configuration of a restored cluster: what it needs to recover by itself, and to stay apart from its original.
//!
//! * `postgresql.auto.conf` is read last, so what is put at its end wins: archive recovery from the copy's own `pg_wal`, nothing of the source's
//!   recovery, replication and archiving. An earlier block of ours, from a backup of a restored cluster, is taken out first.
//! * `data_directory` and its kin cannot be overridden there. Where the restored `postgresql.conf` sets them, the server would run on the
//!   original's files; those lines become comments.
//! * Where the source had its `postgresql.conf` outside the data directory, one is written with the settings that came from there.

use crate::error::{Error, Result};
use crate::pg::MajorVersion;
use crate::repo::Setting;

/// The line that our settings begin with.
const MARK: &str =
    "# Added by pgstrata restore: nothing of the source's recovery, replication and archiving goes on here.";
/// Settings that lead out of the restored directory.
const LEADING_OUT: [&str; 5] = ["data_directory", "hba_file", "ident_file", "config_file", "external_pid_file"];

/// What a restored cluster is configured for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// PostgreSQL's major version.
    pub major: MajorVersion,
    /// Whether it may archive and subscribe as the source did.
    pub archive_mode: bool,
    /// Whether it has tablespaces in place.
    pub in_place: bool,
}

impl Wanted {
    /// The settings, unquoted.
    ///
    /// `restore_command` must be set for archive recovery; one that finds nothing makes the server take its own `pg_wal`. With `hot_standby` on it
    /// would refuse to recover where `max_connections` and its like are lower than they were at the source. Recovery refuses tablespaces in place
    /// unless they are allowed. A subscription would take from the publisher what the original has to get.
    ///
    /// PostgreSQL: `src/backend/access/transam/xlogrecovery.c`, `validateRecoveryParameters`, `CheckRequiredParameterValues`,
    /// `CheckTablespaceDirectory`.
    fn settings(self) -> Vec<(&'static str, &'static str)> {
        let mut settings = vec![
            ("restore_command", "exit 1"),
            ("recovery_end_command", ""),
            ("archive_cleanup_command", ""),
            ("recovery_target", ""),
            ("recovery_target_name", ""),
            ("recovery_target_time", ""),
            ("recovery_target_xid", ""),
            ("recovery_target_lsn", ""),
            ("recovery_target_timeline", "latest"),
            ("recovery_target_action", "promote"),
            ("recovery_min_apply_delay", "0"),
            ("primary_conninfo", ""),
            ("primary_slot_name", ""),
            ("hot_standby", "off"),
        ];
        if self.major.as_u32() < 16 {
            settings.push(("promote_trigger_file", ""));
        }
        if self.in_place {
            settings.push(("allow_in_place_tablespaces", "on"));
        }
        if !self.archive_mode {
            settings.push(("archive_mode", "off"));
            settings.push(("max_logical_replication_workers", "0"));
        }
        settings
    }
}

/// The restored `postgresql.auto.conf`, from the source's.
pub(super) fn auto_conf(source: &[u8], wanted: Wanted) -> Vec<u8> {
    let settings = wanted.settings();
    let ours = |line: &[u8]| {
        line == MARK.as_bytes() || name_of(line).is_some_and(|name| settings.iter().any(|(known, _)| *known == name))
    };
    let mut text = Vec::with_capacity(source.len() + 1024);
    for line in source.split(|byte| *byte == b'\n').filter(|line| !ours(line)) {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    while text.ends_with(b"\n\n") {
        text.pop();
    }
    text.extend_from_slice(format!("{MARK}\n").as_bytes());
    for (name, value) in settings {
        text.extend_from_slice(format!("{name} = '{value}'\n").as_bytes());
    }
    text
}

/// A `postgresql.conf` whose lines that lead out of the restored directory are comments, and those lines; `None` if it has none.
pub(crate) fn confined(conf: &[u8]) -> Option<(Vec<u8>, Vec<String>)> {
    let leads_out = |line: &[u8]| name_of(line).is_some_and(|name| LEADING_OUT.contains(&name.as_str()));
    let mut removed = Vec::new();
    let mut text = Vec::with_capacity(conf.len());
    for line in conf.split_inclusive(|byte| *byte == b'\n') {
        if leads_out(line) {
            removed.push(String::from_utf8_lossy(line).trim().to_owned());
            text.extend_from_slice(b"# taken out by pgstrata restore: ");
        }
        text.extend_from_slice(line);
    }
    (!removed.is_empty()).then_some((text, removed))
}

/// The `postgresql.conf` of a cluster that had its own elsewhere; `known` says whether its settings are in the backup.
pub(super) fn postgresql_conf(settings: &[Setting], known: bool) -> Vec<u8> {
    let told = if known {
        "# These are the settings that it had from there, but for what names files of the source's host (ssl among it)."
    } else {
        "# The backup was taken of a stopped cluster, so its settings are not known."
    };
    let first = "# Written by pgstrata restore: the source's configuration file was not in its data directory.";
    let mut text = format!("{first}\n{told}\n").into_bytes();
    for Setting { name, value } in settings {
        text.extend_from_slice(name.as_bytes());
        text.extend_from_slice(b" = ");
        text.extend_from_slice(&value.0);
        text.push(b'\n');
    }
    text
}

/// Refuses settings from a repository that are more, or something else, than a name and a quoted value.
///
/// # Errors
/// `Corrupt`, with the name.
pub(super) fn must_be_settings(settings: &[Setting]) -> Result<()> {
    let is_setting = |setting: &&Setting| {
        let Some(name) = name_of(setting.name.as_bytes()) else { return false };
        let whole = name.len() == setting.name.len() && !name.starts_with(|first: char| first.is_ascii_digit());
        whole && !LEADING_OUT.contains(&name.as_str()) && !name.starts_with("include") && is_quoted(&setting.value.0)
    };
    match settings.iter().find(|setting| !is_setting(setting)) {
        None => Ok(()),
        Some(Setting { name, .. }) => {
            let shown: String = name.chars().take(100).collect();
            Err(Error::corrupt("the settings of the manifest", format!("{shown:?} is not a setting with its value")))
        }
    }
}

/// Whether `value` is one string of a configuration file, from its first quote to its last.
///
/// PostgreSQL: `src/backend/utils/misc/guc-file.l`, STRING.
fn is_quoted(value: &[u8]) -> bool {
    let Some(mut rest) = value.strip_prefix(b"'").and_then(|rest| rest.strip_suffix(b"'")) else { return false };
    loop {
        rest = match rest {
            [] => return true,
            [b'\\', quoted, rest @ ..] if !matches!(quoted, b'\n' | 0) => rest,
            [b'\'', b'\'', rest @ ..] => rest,
            [b'\\' | b'\'' | b'\n' | 0, ..] => return false,
            [_, rest @ ..] => rest,
        };
    }
}

/// The setting that a line of a configuration file is about, in lower case.
///
/// PostgreSQL: `src/backend/utils/misc/guc-file.l`, ID and QUALIFIED_ID.
fn name_of(line: &[u8]) -> Option<String> {
    let line = line.trim_ascii_start();
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$') || *byte >= 0x80;
    let len = line.iter().take_while(|byte| is_part(byte)).count();
    let name = std::str::from_utf8(&line[..len]).ok()?;
    (len > 0).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::ByteString;

    fn wanted() -> Wanted {
        Wanted { major: MajorVersion::new(15).unwrap(), archive_mode: false, in_place: false }
    }

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_the_source_recovered_by_is_overridden() {
        let source = b"# Do not edit this file manually!\nwork_mem = '8MB'\nRestore_Command = 'cp /archive/%f %p'\n";
        let restored = text(auto_conf(source, wanted()));
        assert!(
            restored.starts_with("# Do not edit this file manually!\nwork_mem = '8MB'\n# Added by pgstrata restore")
        );
        assert!(!restored.contains("/archive"));
        assert!(restored.contains("\nrestore_command = 'exit 1'\n") && restored.contains("\narchive_mode = 'off'\n"));
    }

    #[test]
    fn restoring_a_restored_cluster_adds_nothing_twice() {
        let once = auto_conf(b"work_mem = '8MB'", wanted());
        assert_eq!(auto_conf(&once, wanted()), once);
    }

    #[test]
    fn archiving_goes_on_only_if_asked_for() {
        let restored = text(auto_conf(b"archive_mode = 'on'\n", Wanted { archive_mode: true, ..wanted() }));
        assert!(restored.starts_with("archive_mode = 'on'\n") && !restored.contains("off'\nmax_logical"));
    }

    #[test]
    fn what_is_more_than_a_setting_is_none() {
        let setting = |name: &str, value: &str| Setting { name: name.to_owned(), value: ByteString(value.into()) };
        let sound = [
            ("work_mem", "'8MB'"),
            ("Plpgsql.x$1", "''"),
            ("a", r"'it''s'"),
            ("a", r"'\'x'"),
            ("a", r"'\\'"),
            ("a", "'\u{1}\\n'"),
        ];
        for (name, value) in sound {
            must_be_settings(&[setting(name, value)]).unwrap();
        }
        let forged = [
            ("", "'x'"),
            ("1a", "'x'"),
            ("a b", "'x'"),
            ("a = 'x'\nb", "'x'"),
            ("#a", "'x'"),
            ("DATA_directory", "'/original'"),
            ("include_dir", "'/original'"),
            ("a", "x"),
            ("a", "'"),
            ("a", "'x'\narchive_command = 'rm'"),
            ("a", "'x\ny'"),
            ("a", "'x' 'y'"),
            ("a", r"'x\'"),
            ("a", "'x\0'"),
        ];
        for (name, value) in forged {
            let error = must_be_settings(&[setting("work_mem", "'8MB'"), setting(name, value)]).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{name:?} {value:?}");
        }
    }

    #[test]
    fn a_configuration_file_cannot_lead_to_the_original() {
        let conf =
            b"port = 5432\n  DATA_directory '/original' # there\n#hba_file = 'x'\nhba_file='/original/pg_hba.conf'";
        let (confined, removed) = confined(conf).unwrap();
        let mark = "# taken out by pgstrata restore: ";
        let expected = format!(
            "port = 5432\n{mark}  DATA_directory '/original' # there\n#hba_file = 'x'\n{mark}hba_file='/original/pg_hba.conf'"
        );
        assert_eq!(text(confined), expected);
        assert_eq!(removed, ["DATA_directory '/original' # there", "hba_file='/original/pg_hba.conf'"]);
        assert_eq!(super::confined(b"port = 1\ndata_directory_mode = 1\n"), None);
    }
}
