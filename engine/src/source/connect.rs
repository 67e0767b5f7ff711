//! From parameters to a live connection: which endpoint, with or without TLS, and whose server it is.
//!
//! Endpoints are tried in order, each address of a host name on its own, as libpq does: the next one is tried
//! when nobody answers or the server accepts no connections now, but not when it answers and refuses *us*. The
//! error names everything that was tried.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::lookup_host;
use tokio_postgres::config::SslMode as Negotiation;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::conninfo::{Address, ConnectionParameters, Endpoint, TargetSession};
use super::failure;
use super::tls::{self, SslMode};
use crate::error::{Error, ErrorKind, Result};

/// What the server says on its own, while nobody asks or in between.
#[derive(Debug, Default)]
struct Asides {
    notices: Vec<String>,
    end: Option<String>,
}

/// What comes in beside the answers, shared with the task that drives the connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Feedback(Arc<Mutex<Asides>>);

impl Feedback {
    fn lock(&self) -> MutexGuard<'_, Asides> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_notice(&self, notice: String) {
        self.lock().notices.push(notice);
    }

    /// The notices since the last call.
    pub(super) fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().notices)
    }

    /// Why the connection ended, if it did and a reason was given.
    pub(super) fn end(&self) -> Option<String> {
        self.lock().end.clone()
    }
}

/// A connection that a task of the runtime drives.
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) endpoint: Endpoint,
    pub(super) feedback: Feedback,
}

/// Connects to the first endpoint that will do.
///
/// # Errors
///
/// `Unavailable` when nobody answers, `Postgres` when the server refuses, `Conflict` when no server is of the
/// kind that `target_session_attrs` asks for.
pub(super) async fn connect(parameters: &ConnectionParameters) -> Result<Connected> {
    // A certificate file that cannot be read is no obstacle where no TLS is spoken.
    let speaks_tls =
        |endpoint: &Endpoint| negotiations(&endpoint.address, parameters.tls.mode) != [Negotiation::Disable];
    let tls = match parameters.endpoints.iter().any(speaks_tls) {
        true => parameters.tls.clone(),
        false => tls::TlsParameters::none(),
    };
    let connector = tls::connector(&tls)?;
    let passes = match parameters.target_session {
        TargetSession::PreferStandby => vec![TargetSession::Standby, TargetSession::Any],
        other => vec![other],
    };
    let mut failures = Vec::new();
    for target in passes {
        for endpoint in &parameters.endpoints {
            for endpoint in addresses_of(endpoint, &mut failures).await {
                match connect_to(&endpoint, target, &connector, parameters).await {
                    Ok(connected) => return Ok(connected),
                    Err(Failure::Final(error)) => return Err(error),
                    Err(Failure::TryNext(error)) => failures.push(error),
                }
            }
        }
    }
    Err(failure::none_of(failures))
}

enum Failure {
    /// Another endpoint may do.
    TryNext(Error),
    /// The server answered, and refuses.
    Final(Error),
}

/// One endpoint for each address of a host name, so that a timeout concerns one address.
async fn addresses_of(endpoint: &Endpoint, failures: &mut Vec<Error>) -> Vec<Endpoint> {
    let Address::Tcp { host, address: None } = &endpoint.address else { return vec![endpoint.clone()] };
    match lookup_host((host.as_str(), endpoint.port)).await {
        Ok(addresses) => addresses
            .map(|address| Endpoint {
                address: Address::Tcp { host: host.clone(), address: Some(address.ip()) },
                ..endpoint.clone()
            })
            .collect(),
        Err(error) => {
            let what = format!("cannot find the address of host {host}");
            failures.push(Error::new(ErrorKind::Unavailable, what).because(error));
            Vec::new()
        }
    }
}

async fn connect_to(
    endpoint: &Endpoint,
    target: TargetSession,
    connector: &MakeRustlsConnect,
    parameters: &ConnectionParameters,
) -> std::result::Result<Connected, Failure> {
    let mut first_error = None;
    for negotiation in negotiations(&endpoint.address, parameters.tls.mode) {
        match attempt(endpoint, *negotiation, connector, parameters).await {
            Ok(connected) => {
                check_target(&connected, target).await.map_err(Failure::TryNext)?;
                return Ok(connected);
            }
            // What went wrong with the preferred negotiation tells more than what did with the fallback.
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_else(|| Failure::Final(Error::bug("no way of connecting was tried"))))
}

/// The ways of connecting, in order.
fn negotiations(address: &Address, mode: SslMode) -> &'static [Negotiation] {
    match (address, mode) {
        (Address::Socket(_), _) | (_, SslMode::Disable) => &[Negotiation::Disable],
        (_, SslMode::Allow) => &[Negotiation::Disable, Negotiation::Require],
        (_, SslMode::Prefer) => &[Negotiation::Prefer, Negotiation::Disable],
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[Negotiation::Require],
    }
}

async fn attempt(
    endpoint: &Endpoint,
    negotiation: Negotiation,
    connector: &MakeRustlsConnect,
    parameters: &ConnectionParameters,
) -> std::result::Result<Connected, Failure> {
    let config = config(endpoint, negotiation, parameters);
    let connecting = config.connect(connector.clone());
    let connected = match parameters.connect_timeout {
        None => connecting.await,
        // The limit covers the server's answer too: one that accepts and then says nothing is as good as down.
        Some(limit) => match tokio::time::timeout(limit, connecting).await {
            Ok(connected) => connected,
            Err(_) => {
                let what = format!("cannot connect to {endpoint}: no answer within {} s", limit.as_secs());
                return Err(Failure::TryNext(Error::new(ErrorKind::Unavailable, what)));
            }
        },
    };
    let (client, connection) = connected.map_err(|error| {
        let answered = error.code().is_some_and(|code| *code != SqlState::CANNOT_CONNECT_NOW);
        let error = failure::of_connecting(error, endpoint, parameters);
        if answered { Failure::Final(error) } else { Failure::TryNext(error) }
    })?;
    let feedback = Feedback::default();
    tokio::spawn(drive(connection, feedback.clone()));
    Ok(Connected { client, endpoint: endpoint.clone(), feedback })
}

fn config(endpoint: &Endpoint, negotiation: Negotiation, parameters: &ConnectionParameters) -> Config {
    let mut config = Config::new();
    config
        .user(&parameters.user)
        .dbname(&parameters.database)
        .application_name(&parameters.application_name)
        .port(endpoint.port)
        .ssl_mode(negotiation)
        .ssl_negotiation(parameters.ssl_negotiation)
        .channel_binding(parameters.channel_binding)
        .keepalives(parameters.keepalives.enabled)
        .keepalives_idle(parameters.keepalives.idle)
        .keepalives_interval(parameters.keepalives.interval)
        .keepalives_retries(parameters.keepalives.count);
    if let Some(timeout) = parameters.keepalives.user_timeout {
        config.tcp_user_timeout(timeout);
    }
    if let Some(options) = &parameters.options {
        config.options(options);
    }
    if let Some(password) = &endpoint.password {
        config.password(password.expose());
    }
    match &endpoint.address {
        Address::Socket(directory) => {
            config.host_path(directory);
        }
        Address::Tcp { host, address } => {
            config.host(host);
            if let Some(address) = address {
                config.hostaddr(*address);
            }
        }
    }
    config
}

async fn check_target(connected: &Connected, target: TargetSession) -> Result<()> {
    let question = match target {
        TargetSession::Any | TargetSession::PreferStandby => return Ok(()),
        TargetSession::Primary => "SELECT NOT pg_catalog.pg_is_in_recovery()",
        TargetSession::Standby => "SELECT pg_catalog.pg_is_in_recovery()",
        TargetSession::ReadWrite => "SELECT pg_catalog.current_setting('transaction_read_only') = 'off'",
        TargetSession::ReadOnly => "SELECT pg_catalog.current_setting('transaction_read_only') = 'on'",
    };
    let answer = connected.client.query_one(question, &[]).await.and_then(|row| row.try_get::<_, bool>(0));
    match answer {
        Ok(true) => Ok(()),
        Ok(false) => {
            let what = format!("the server at {} is not what target_session_attrs asks for", connected.endpoint);
            Err(Error::new(ErrorKind::Conflict, what))
        }
        Err(error) => Err(failure::of_query(error, "ask the server what it is", &connected.feedback)),
    }
}

type TlsStream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// Moves bytes until the connection ends, and keeps what the server says unasked.
async fn drive(mut connection: Connection<Socket, TlsStream>, feedback: Feedback) {
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        match message {
            Ok(AsyncMessage::Notice(notice)) => feedback.add_notice(failure::render(&notice)),
            Ok(_) => {}
            Err(error) => {
                feedback.lock().end = Some(error.as_db_error().map_or_else(|| failure::chain(&error), failure::render));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_never_uses_tls_and_prefer_falls_back_to_none() {
        let socket = Address::Socket("/run".into());
        let tcp = Address::Tcp { host: "h".to_owned(), address: None };
        assert_eq!(negotiations(&socket, SslMode::VerifyFull), [Negotiation::Disable]);
        assert_eq!(negotiations(&tcp, SslMode::Disable), [Negotiation::Disable]);
        assert_eq!(negotiations(&tcp, SslMode::Allow), [Negotiation::Disable, Negotiation::Require]);
        assert_eq!(negotiations(&tcp, SslMode::Prefer), [Negotiation::Prefer, Negotiation::Disable]);
        for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
            assert_eq!(negotiations(&tcp, mode), [Negotiation::Require]);
        }
    }
}
