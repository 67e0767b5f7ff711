//! Failures: what they print, and what they never print.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::error::{ContextKind, ContextValue};
use engine::{Error, ErrorKind};
use serde::Serialize;

use super::{Printer, printable};
use crate::exit_codes::Exit;

/// Why a run did not do what was asked.
#[derive(Debug)]
pub enum Failure {
    /// Arguments that clap refuses; or `--help` and `--version`, which clap hands over the same way.
    Arguments(clap::Error),
    /// Configuration that we refuse, and what would be accepted.
    Usage { text: String, hint: Option<&'static str> },
    /// The engine's error and the exit code it stands for.
    Failed { error: Error, exit: Exit },
}

impl Failure {
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage { text: text.into(), hint: None }
    }

    /// An error met while opening the repository.
    pub fn opening(error: Error) -> Self {
        let exit = Exit::of_opening(&error);
        Self::Failed { error, exit }
    }

    pub fn exit(&self) -> Exit {
        match self {
            Self::Arguments(error) if error.use_stderr() => Exit::Usage,
            Self::Arguments(_) => Exit::Done,
            Self::Usage { .. } => Exit::Usage,
            Self::Failed { exit, .. } => *exit,
        }
    }
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Arguments(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let exit = Exit::of(&error);
        Self::Failed { error, exit }
    }
}

/// Prints a failure on standard error, and as a document on standard output where JSON is wanted.
pub fn print_failure(failure: &Failure, json: bool) {
    match failure {
        Failure::Arguments(error) if !error.use_stderr() => {
            let _ = error.print();
            return;
        }
        Failure::Arguments(error) => {
            let _ = write!(std::io::stderr(), "{}", redact(&error.to_string()));
            if let Some(hint) = elsewhere(error) {
                print_line(&format!("hint: {hint}"));
            }
        }
        Failure::Usage { text, hint } => print_error(text, *hint),
        Failure::Failed { error, .. } => print_error(&error.to_string(), error.hint_text()),
    }
    if json {
        let _ = Printer { json }.document(&failure_document(failure), String::new);
    }
}

/// An error line and its hints on standard error.
pub fn print_error(text: &str, hint: Option<&str>) {
    let mut lines = format!("error: {}\n", presentable(text));
    for hint in hint.unwrap_or_default().lines() {
        let _ = writeln!(lines, "hint: {}", presentable(hint));
    }
    let _ = std::io::stderr().write_all(lines.as_bytes());
}

/// Something to read that is no error, on standard error.
pub fn print_notice(text: &str) {
    print_line(&format!("note: {}", presentable(text)));
}

/// `text` without passwords and without what a terminal obeys; its second line and those after it cannot be taken for lines of ours.
fn presentable(text: &str) -> String {
    printable(&redact(text)).replace('\n', "\n    ")
}

/// A line of its own on standard error.
pub fn print_line(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

#[derive(Serialize)]
struct FailureDocument {
    error: FailureFields,
}

#[derive(Serialize)]
struct FailureFields {
    kind: &'static str,
    message: String,
    place: Option<String>,
    hint: Option<String>,
}

fn failure_document(failure: &Failure) -> FailureDocument {
    let fields = |kind, message: &str, place: Option<&str>, hint: Option<&str>| FailureFields {
        kind,
        message: redact(message),
        place: place.map(redact),
        hint: hint.map(redact),
    };
    let error = match failure {
        Failure::Arguments(error) => {
            let text = error.to_string();
            let message = text.split("\n\n").next().unwrap_or_default();
            fields("usage", message.strip_prefix("error: ").unwrap_or(message), None, elsewhere(error).as_deref())
        }
        Failure::Usage { text, hint } => fields("usage", text, None, *hint),
        Failure::Failed { error, .. } => {
            fields(kind_name(error.kind()), &error.without_place(), error.place(), error.hint_text())
        }
    };
    FailureDocument { error }
}

/// Where else an option that is missing can be given.
fn elsewhere(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) else { return None };
    let options = missing.iter().filter_map(|usage| usage.strip_prefix("--")?.split(' ').next());
    let variables: Vec<String> =
        options.map(|option| format!("PGSTRATA_{}", option.to_uppercase().replace('-', "_"))).collect();
    let missing = error.kind() == clap::error::ErrorKind::MissingRequiredArgument && !variables.is_empty();
    missing
        .then(|| format!("or set {} in the environment, or put it into a configuration file", variables.join(" and ")))
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Missing => "missing",
        ErrorKind::Conflict => "conflict",
        ErrorKind::Locked => "locked",
        ErrorKind::Invalid => "invalid",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Postgres => "postgres",
        ErrorKind::Bug => "bug",
    }
}

/// `text` with the passwords of conninfo strings and addresses replaced by `***`; rather too much than too little.
pub(super) fn redact(text: &str) -> String {
    redact_addresses(&redact_keywords(text))
}

/// `password = 'it''s \' this'` and `sslpassword=this`: the value ends at its quote, else at white space.
fn redact_keywords(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.to_ascii_lowercase().find("password") {
        let (before, after) = rest.split_at(at + "password".len());
        safe.push_str(before);
        rest = after;
        let Some(value) = after.trim_start().strip_prefix('=') else { continue };
        safe.push_str("=***");
        rest = after_value(value.trim_start());
    }
    safe + rest
}

fn after_value(value: &str) -> &str {
    let Some(quoted) = value.strip_prefix('\'') else {
        return value.find(char::is_whitespace).map_or("", |end| &value[end..]);
    };
    let mut escaped = false;
    let end = quoted.find(|c| {
        let closes = c == '\'' && !escaped;
        escaped = c == '\\' && !escaped;
        closes
    });
    end.map_or("", |end| &quoted[end + 1..])
}

/// `postgresql://user:this@host/`: from the colon behind the user to the last @ before white space.
fn redact_addresses(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, address) = rest.split_at(at + "://".len());
        safe.push_str(before);
        let (address, after) = address.split_at(address.find(char::is_whitespace).unwrap_or(address.len()));
        match (address.find(':'), address.rfind('@')) {
            (Some(colon), Some(at)) if colon < at => {
                let _ = write!(safe, "{}:***{}", &address[..colon], &address[at..]);
            }
            _ => safe.push_str(address),
        }
        rest = after;
    }
    safe + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_as_json_has_kind_message_place_and_hint() {
        let error =
            Error::corrupt("packs/12", "the pack is 10 bytes long, not 20").hint("verify it").because("no more");
        let document = serde_json::to_value(failure_document(&error.into())).unwrap();
        let wanted = serde_json::json!({ "error": {
            "kind": "corrupt", "message": "the pack is 10 bytes long, not 20: no more", "place": "packs/12", "hint": "verify it"
        }});
        assert_eq!(document, wanted);
    }

    #[test]
    fn an_error_that_comes_from_elsewhere_is_no_command_and_no_line_of_ours() {
        assert_eq!(presentable("a\u{1b}[2J\nerror: b"), "a\\u{1b}[2J\n    error: b");
    }

    #[test]
    fn passwords_never_reach_an_error_message() {
        let cases = [
            (
                "cannot connect to host=a password=s3cret dbname=b: no",
                "cannot connect to host=a password=*** dbname=b: no",
            ),
            (r"PASSWORD = 's3 \' cret' host=a", "PASSWORD=*** host=a"),
            ("sslpassword=s3cret", "sslpassword=***"),
            ("password='s3cret", "password=***"),
            ("postgresql://me:s3cret@host/db is no", "postgresql://me:***@host/db is no"),
            ("postgres://me:s3@cret@host", "postgres://me:***@host"),
            ("postgresql://host:5432/db?password=s3cret", "postgresql://host:5432/db?password=***"),
            ("password authentication failed for me@host", "password authentication failed for me@host"),
            ("see https://host:80/", "see https://host:80/"),
        ];
        for (text, safe) in cases {
            assert_eq!(redact(text), safe);
        }
    }
}
