//! What PostgreSQL refuses, said so that the user knows what to do.
//!
//! Decisions follow the SQLSTATE, never the message, which may be in any language. Only the hint for `peer`
//! authentication rests on how we connected.

use tokio_postgres::error::{DbError, SqlState};

use super::connect::Feedback;
use super::conninfo::{Address, ConnectionParameters, Endpoint};
use super::tls;
use crate::error::{Error, ErrorKind};

const SERVER_DOWN: &str = "is the server running, and does it listen there? -d \"host=... port=...\" or PGHOST and \
                           PGPORT say where it is";

/// A server's message on one line: severity, text and detail.
pub(super) fn render(error: &DbError) -> String {
    let mut text = format!("{}: {}", error.severity(), error.message());
    if let Some(detail) = error.detail() {
        text.push_str(&format!(" ({})", one_line(detail)));
    }
    text
}

/// An error and its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn of_server(error: &DbError, doing: &str) -> Error {
    let kind = match error.code() {
        code if *code == SqlState::CANNOT_CONNECT_NOW || *code == SqlState::TOO_MANY_CONNECTIONS => {
            ErrorKind::Unavailable
        }
        _ => ErrorKind::Postgres,
    };
    let detail = error.detail().map(|detail| format!(" ({})", one_line(detail))).unwrap_or_default();
    let what = format!("cannot {doing}: {}{detail}", error.message());
    let result = Error::new(kind, what).at(format!("SQLSTATE {}", error.code().code()));
    match error.hint().map(one_line).or_else(|| general_hint(error.code()).map(str::to_owned)) {
        Some(hint) => result.hint(hint),
        None => result,
    }
}

fn general_hint(code: &SqlState) -> Option<&'static str> {
    match code {
        code if *code == SqlState::ADMIN_SHUTDOWN || *code == SqlState::CRASH_SHUTDOWN => {
            Some("the server was shut down or restarted: run the command again when it is up")
        }
        code if *code == SqlState::T_R_SERIALIZATION_FAILURE || *code == SqlState::DATABASE_DROPPED => Some(
            "replay on the standby conflicted with this session: run the command again, connected to the database \
             postgres",
        ),
        code if *code == SqlState::QUERY_CANCELED => Some("somebody or a timeout cancelled it: run the command again"),
        _ => None,
    }
}

/// A query that failed while we wanted to `doing`.
pub(super) fn of_query(error: tokio_postgres::Error, doing: &str, feedback: &Feedback) -> Error {
    if let Some(server) = error.as_db_error() {
        return of_server(server, doing);
    }
    if error.is_closed() {
        return connection_lost(doing, feedback);
    }
    Error::new(ErrorKind::Unavailable, format!("cannot {doing}")).because(error)
}

/// The connection is gone; with it, what the server did on its behalf.
pub(super) fn connection_lost(doing: &str, feedback: &Feedback) -> Error {
    let reason = feedback.end().unwrap_or_else(|| "the server closed it".to_owned());
    let what = format!("cannot {doing}: the connection to PostgreSQL is lost: {reason}");
    Error::new(ErrorKind::Unavailable, what).hint("look into the server's log; when it is up, run the command again")
}

/// A connection that could not be made.
pub(super) fn of_connecting(
    error: tokio_postgres::Error,
    endpoint: &Endpoint,
    parameters: &ConnectionParameters,
) -> Error {
    let doing = format!("connect to {endpoint} as {:?}", parameters.user);
    if let Some(server) = error.as_db_error() {
        let result = of_server(server, &doing);
        return match connect_hint(server.code(), endpoint, parameters) {
            Some(hint) => result.hint(hint),
            None => result,
        };
    }
    let hint = tls::certificate_hint(&error).map(str::to_owned).or_else(|| io_hint(&error, endpoint));
    let wants_password = hint.is_none() && endpoint.password.is_none() && chain(&error).contains("password missing");
    if wants_password {
        let what = format!("cannot {doing}: the server asks for a password, and none is given");
        return Error::new(ErrorKind::Postgres, what).hint(password_hint(endpoint, parameters));
    }
    let result = Error::new(ErrorKind::Unavailable, format!("cannot {doing}")).because(error);
    match hint {
        Some(hint) => result.hint(hint),
        None => result,
    }
}

fn io_hint(error: &(dyn std::error::Error + 'static), endpoint: &Endpoint) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NotFound, PermissionDenied, TimedOut};
            return match (error.kind(), &endpoint.address) {
                (ConnectionRefused | HostUnreachable | NotFound | TimedOut, _) => Some(SERVER_DOWN.to_owned()),
                (PermissionDenied, Address::Socket(_)) => Some(
                    "this user may not use the socket: run as the user that owns the server, or see \
                     unix_socket_permissions"
                        .to_owned(),
                ),
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

fn connect_hint(code: &SqlState, endpoint: &Endpoint, parameters: &ConnectionParameters) -> Option<String> {
    match code {
        code if *code == SqlState::INVALID_PASSWORD => Some(password_hint(endpoint, parameters)),
        code if *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => match &endpoint.address {
            Address::Socket(_) => Some(
                "with peer authentication, run as the operating system's user of that name (sudo -u postgres), or \
                 name a role that pg_hba.conf lets in: -d \"user=...\""
                    .to_owned(),
            ),
            Address::Tcp { .. } => Some("let the role in by a line in pg_hba.conf and reload the server".to_owned()),
        },
        code if *code == SqlState::UNDEFINED_DATABASE => {
            Some("name an existing database: -d \"dbname=...\"".to_owned())
        }
        code if *code == SqlState::CANNOT_CONNECT_NOW => Some(
            "the server is starting, stopping, or a standby without hot_standby: try again when it accepts connections"
                .to_owned(),
        ),
        code if *code == SqlState::TOO_MANY_CONNECTIONS => {
            Some("free a connection, or raise max_connections".to_owned())
        }
        _ => None,
    }
}

fn password_hint(endpoint: &Endpoint, parameters: &ConnectionParameters) -> String {
    // The only notices that reading the parameters gives are about a password file that is not used.
    if !parameters.notices.is_empty() {
        return parameters.notices.join("; ");
    }
    let host = match &endpoint.address {
        Address::Socket(_) => "localhost",
        Address::Tcp { host, .. } => host,
    };
    let (port, database, user) = (endpoint.port, &parameters.database, &parameters.user);
    format!("put the line {host}:{port}:{database}:{user}:PASSWORD into ~/.pgpass and give that file the mode 0600")
}

/// One error for all the endpoints that did not do; the only one if there was but one.
pub(super) fn none_of(mut failures: Vec<Error>) -> Error {
    let Some(last) = failures.pop() else {
        return Error::invalid("there is no server to connect to").hint(SERVER_DOWN);
    };
    if failures.is_empty() {
        return last;
    }
    let hint = last.hint_text().unwrap_or(SERVER_DOWN).to_owned();
    let kind = last.kind();
    failures.push(last);
    let texts: Vec<_> = failures.iter().map(ToString::to_string).collect();
    Error::new(kind, texts.join("; ")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_several_servers_names_each_and_keeps_the_hint() {
        let failure = |name: &str| Error::new(ErrorKind::Unavailable, format!("cannot connect to {name}"));
        let error = none_of(vec![failure("a"), failure("b").hint("help")]);
        assert_eq!(error.to_string(), "cannot connect to a; cannot connect to b");
        assert_eq!(error.hint_text(), Some("help"));
        assert_eq!(none_of(vec![failure("a")]).to_string(), "cannot connect to a");
        assert_eq!(none_of(Vec::new()).kind(), ErrorKind::Invalid);
    }
}
