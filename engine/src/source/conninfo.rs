//! Where the server is and who we are to it, resolved as libpq resolves it.
//!
//! A setting comes from the first of: the conninfo (key=value pairs, or a `postgresql://` URI), the service
//! file, the environment, a default. tokio-postgres reads conninfo as well, but refuses keywords that every
//! libpq user may have (`sslrootcert`, `service`, `passfile`, `sslmode=verify-full`) and knows neither service
//! files, nor `PG*` variables, nor `.pgpass`; so the texts are read here, and tokio-postgres is handed the
//! result, one endpoint at a time.
//!
//! What differs from libpq, on purpose:
//!
//! * The database defaults to `postgres`, not to the user's name: a backup concerns the whole cluster
//!   (`pg_dumpall` does the same).
//! * With a data directory at hand and no host or port given anywhere, the server is the one that runs on that
//!   directory: its `postmaster.pid` names its socket. Two clusters on one host are never confused.
//! * Without one, both customary socket directories are tried: libpq's is compiled in, and differs by packager.
//! * A setting that would make the connection safer, and that we cannot honour (`sslcrl`, `require_auth`,
//!   `gssencmode=require`, ...), is an error and never ignored.
//!
//! Passwords are held in [`Secret`], which prints as `***`. No error quotes a conninfo value, because a
//! misplaced quote turns any value into part of a password.
//!
//! PostgreSQL: src/interfaces/libpq/fe-connect.c, conninfo_parse, conninfo_uri_parse_options, parseServiceInfo,
//! passwordFromFile.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::config::{ChannelBinding, SslNegotiation};

use super::postmaster::PostmasterPid;
use super::tls::{CertificateMode, RootCertificates, SslMode, TlsParameters};
use crate::error::{Error, ErrorKind, Result};

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_DATABASE: &str = "postgres";
const APPLICATION_NAME: &str = "pgstrata";

/// What the process knows of its surroundings, as far as connecting goes.
#[derive(Clone, Default)]
pub struct Environment {
    /// The `PG*` variables.
    pub variables: BTreeMap<String, OsString>,
    /// The user's home directory, where `.pgpass`, `.pg_service.conf` and `.postgresql/` are.
    pub home: Option<PathBuf>,
    /// The operating system's name for the user, which PostgreSQL's user defaults to.
    pub os_user: Option<String>,
    /// Where the server's socket is looked for when no host is given, in this order.
    pub socket_directories: Vec<PathBuf>,
    /// Where the system-wide `pg_service.conf` is looked for unless `PGSYSCONFDIR` is set.
    pub service_directories: Vec<PathBuf>,
}

impl Environment {
    /// The surroundings of this process.
    pub fn from_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| name.starts_with("PG"));
        Self {
            variables: variables.collect(),
            home: std::env::home_dir().filter(|home| !home.as_os_str().is_empty()),
            os_user: whoami::username().ok(),
            socket_directories: ["/var/run/postgresql", "/tmp"].map(PathBuf::from).to_vec(),
            service_directories: ["/etc/postgresql-common", "/etc/sysconfig/pgsql"].map(PathBuf::from).to_vec(),
        }
    }

    /// The value of a variable; like libpq, an empty one counts as set.
    fn variable(&self, name: &str) -> Result<Option<&str>> {
        let Some(value) = self.variables.get(name) else { return Ok(None) };
        let text = value.to_str().ok_or_else(|| Error::invalid(format!("the variable {name} is not valid UTF-8")))?;
        Ok(Some(text))
    }

    fn home_file(&self, name: &str) -> Option<PathBuf> {
        self.home.as_ref().map(|home| home.join(name))
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("variables", &self.variables.keys())
            .field("home", &self.home)
            .field("os_user", &self.os_user)
            .field("socket_directories", &self.socket_directories)
            .field("service_directories", &self.service_directories)
            .finish()
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// The directory of a Unix socket.
    Socket(PathBuf),
    /// A host, by name or address; `address` is connected to instead, when it is given.
    Tcp { host: String, address: Option<IpAddr> },
}

/// One server to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) address: Address,
    pub(super) port: u16,
    pub(super) password: Option<Secret>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Socket(directory) => write!(f, "socket {}/.s.PGSQL.{}", directory.display(), self.port),
            Address::Tcp { host, address: Some(address) } if *host != address.to_string() => {
                write!(f, "host {host} ({address}) port {}", self.port)
            }
            Address::Tcp { host, .. } => write!(f, "host {host} port {}", self.port),
        }
    }
}

/// Which of several servers will do.
///
/// PostgreSQL: src/interfaces/libpq/libpq-int.h, PGTargetServerType.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetSession {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// How a dead TCP connection is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalives {
    pub(super) enabled: bool,
    pub(super) idle: Duration,
    pub(super) interval: Duration,
    pub(super) count: u32,
    pub(super) user_timeout: Option<Duration>,
}

/// Everything that connecting needs.
#[derive(Clone, Debug)]
pub(super) struct ConnectionParameters {
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) user: String,
    pub(super) database: String,
    pub(super) options: Option<String>,
    pub(super) application_name: String,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) target_session: TargetSession,
    pub(super) channel_binding: ChannelBinding,
    pub(super) ssl_negotiation: SslNegotiation,
    pub(super) keepalives: Keepalives,
    pub(super) tls: TlsParameters,
    /// What the user should know, e.g. that `.pgpass` was not read because others can read it.
    pub(super) notices: Vec<String>,
}

/// Resolves `conninfo`, the environment and the defaults to endpoints, in the order in which they are tried.
///
/// # Errors
///
/// `Invalid` for an unknown keyword, a malformed text or value, or an unknown service; `Unsupported` for a
/// setting that we cannot honour.
pub(super) fn resolve(
    conninfo: Option<&str>,
    data_dir: Option<&Path>,
    environment: &Environment,
) -> Result<ConnectionParameters> {
    let mut settings = Settings::default();
    if let Some(conninfo) = conninfo {
        settings.read_conninfo(conninfo)?;
    }
    settings.read_service(environment)?;
    settings.read_environment(environment)?;
    settings.refuse_what_cannot_be_honoured()?;
    settings.into_parameters(data_dir, environment)
}

/// The keywords of libpq up to PostgreSQL 19, and the variable of each.
const KEYWORDS: &[(&str, Option<&str>)] = &[
    ("application_name", Some("PGAPPNAME")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("client_encoding", Some("PGCLIENTENCODING")),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("dbname", Some("PGDATABASE")),
    ("fallback_application_name", None),
    ("gssdelegation", Some("PGGSSDELEGATION")),
    ("gssencmode", Some("PGGSSENCMODE")),
    ("gsslib", Some("PGGSSLIB")),
    ("host", Some("PGHOST")),
    ("hostaddr", Some("PGHOSTADDR")),
    ("keepalives", None),
    ("keepalives_count", None),
    ("keepalives_idle", None),
    ("keepalives_interval", None),
    ("krbsrvname", Some("PGKRBSRVNAME")),
    ("load_balance_hosts", Some("PGLOADBALANCEHOSTS")),
    ("max_protocol_version", Some("PGMAXPROTOCOLVERSION")),
    ("min_protocol_version", Some("PGMINPROTOCOLVERSION")),
    ("oauth_client_id", None),
    ("oauth_client_secret", None),
    ("oauth_issuer", None),
    ("oauth_scope", None),
    ("options", Some("PGOPTIONS")),
    ("passfile", Some("PGPASSFILE")),
    ("password", Some("PGPASSWORD")),
    ("port", Some("PGPORT")),
    ("replication", None),
    ("require_auth", Some("PGREQUIREAUTH")),
    ("requirepeer", Some("PGREQUIREPEER")),
    ("scram_client_key", None),
    ("scram_server_key", None),
    ("service", Some("PGSERVICE")),
    ("servicefile", Some("PGSERVICEFILE")),
    ("ssl_max_protocol_version", Some("PGSSLMAXPROTOCOLVERSION")),
    ("ssl_min_protocol_version", Some("PGSSLMINPROTOCOLVERSION")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslcertmode", Some("PGSSLCERTMODE")),
    ("sslcompression", Some("PGSSLCOMPRESSION")),
    ("sslcrl", Some("PGSSLCRL")),
    ("sslcrldir", Some("PGSSLCRLDIR")),
    ("sslkey", Some("PGSSLKEY")),
    ("sslkeylogfile", None),
    ("sslmode", Some("PGSSLMODE")),
    ("sslnegotiation", Some("PGSSLNEGOTIATION")),
    ("sslpassword", None),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslsni", Some("PGSSLSNI")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("tcp_user_timeout", None),
    ("user", Some("PGUSER")),
];

/// Keywords whose honouring the user may rely on, and which we cannot honour; each with the values that ask
/// for nothing.
const CANNOT_BE_HONOURED: &[(&str, &[&str])] = &[
    ("gssencmode", &["disable", "prefer"]),
    ("min_protocol_version", &["3.0"]),
    ("oauth_issuer", &[]),
    ("replication", &["false", "off", "no", "0"]),
    ("require_auth", &[]),
    ("requirepeer", &[]),
    ("scram_client_key", &[]),
    ("scram_server_key", &[]),
    ("sslcrl", &[]),
    ("sslcrldir", &[]),
    ("sslkeylogfile", &[]),
    ("sslpassword", &[]),
];

/// The settings found so far; has no `Debug`, because one of them is the password.
#[derive(Default)]
struct Settings(BTreeMap<&'static str, String>);

impl Settings {
    fn get(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(String::as_str)
    }

    /// The value of `keyword`, unless it is empty, which libpq takes for absent.
    fn non_empty(&self, keyword: &str) -> Option<&str> {
        self.get(keyword).filter(|value| !value.is_empty())
    }

    fn set(&mut self, keyword: &str, value: impl Into<String>) -> Result<()> {
        let known = KEYWORDS.iter().find(|(name, _)| *name == keyword);
        let (name, _) =
            known.ok_or_else(|| Error::invalid(format!("unknown connection parameter {:?}", excerpt(keyword))))?;
        self.0.insert(name, value.into());
        Ok(())
    }

    fn set_if_absent(&mut self, keyword: &str, value: &str) -> Result<()> {
        if self.get(keyword).is_some() { Ok(()) } else { self.set(keyword, value) }
    }

    /// As psql does with its argument, a text that is neither pairs nor a URI is a database's name.
    fn read_conninfo(&mut self, conninfo: &str) -> Result<()> {
        let uri = ["postgresql://", "postgres://"].iter().find_map(|prefix| conninfo.strip_prefix(prefix));
        match uri {
            Some(uri) => self.read_uri(uri),
            None if conninfo.contains('=') => self.read_pairs(conninfo),
            None if conninfo.trim().is_empty() => Ok(()),
            None => self.set("dbname", conninfo),
        }
    }

    fn read_pairs(&mut self, mut rest: &str) -> Result<()> {
        loop {
            rest = rest.trim_start();
            if rest.is_empty() {
                return Ok(());
            }
            let (keyword, after) = rest.split_once('=').ok_or_else(|| {
                Error::invalid(format!("missing \"=\" after {:?} in the connection string", excerpt(rest)))
            })?;
            let keyword = keyword.trim_end();
            if keyword.contains(char::is_whitespace) {
                let first = keyword.split_whitespace().next().unwrap_or_default();
                let what = format!("missing \"=\" after {:?} in the connection string", excerpt(first));
                return Err(Error::invalid(what));
            }
            let (value, after) = take_value(after.trim_start())?;
            self.set(keyword, value)?;
            rest = after;
        }
    }

    fn read_uri(&mut self, rest: &str) -> Result<()> {
        let mut rest = rest;
        let credentials_end = rest.find(['@', '/']).filter(|&end| rest[end..].starts_with('@'));
        if let Some(end) = credentials_end {
            let credentials = &rest[..end];
            rest = &rest[end + 1..];
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            self.set_decoded("user", user)?;
            self.set_decoded("password", password)?;
        }
        let hosts_end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (hosts, mut rest) = rest.split_at(hosts_end);
        self.read_uri_hosts(hosts)?;
        if let Some(path) = rest.strip_prefix('/') {
            let (database, query) = path.split_at(path.find('?').unwrap_or(path.len()));
            self.set_decoded("dbname", database)?;
            rest = query;
        }
        for parameter in rest.trim_start_matches('?').split('&').filter(|parameter| !parameter.is_empty()) {
            let (keyword, value) =
                parameter.split_once('=').filter(|(_, value)| !value.contains('=')).ok_or_else(|| {
                    Error::invalid("a query parameter of the connection URI is not of the form key=value")
                })?;
            match (&*percent_decode(keyword)?, percent_decode(value)?) {
                ("ssl", value) if value == "true" => self.set("sslmode", "require")?,
                (keyword, value) => self.set(keyword, value)?,
            }
        }
        Ok(())
    }

    fn read_uri_hosts(&mut self, text: &str) -> Result<()> {
        let mut hosts = Vec::new();
        let mut ports = Vec::new();
        for part in text.split(',') {
            let (host, port) = match part.strip_prefix('[') {
                Some(bracketed) => bracketed
                    .split_once(']')
                    .filter(|(host, after)| !host.is_empty() && (after.is_empty() || after.starts_with(':')))
                    .map(|(host, after)| (host, after.trim_start_matches(':')))
                    .ok_or_else(|| Error::invalid("malformed IPv6 address in the connection URI"))?,
                None => part.split_once(':').unwrap_or((part, "")),
            };
            hosts.push(host);
            ports.push(port);
        }
        if hosts.iter().any(|host| !host.is_empty()) {
            self.set_decoded("host", &hosts.join(","))?;
        }
        if ports.iter().any(|port| !port.is_empty()) {
            self.set_decoded("port", &ports.join(","))?;
        }
        Ok(())
    }

    /// An empty part of a URI says nothing: it does not hide the environment's value.
    fn set_decoded(&mut self, keyword: &str, encoded: &str) -> Result<()> {
        if encoded.is_empty() { Ok(()) } else { self.set(keyword, percent_decode(encoded)?) }
    }

    fn read_service(&mut self, environment: &Environment) -> Result<()> {
        let service = match self.get("service") {
            Some(service) => service.to_owned(),
            None => match environment.variable("PGSERVICE")? {
                Some(service) => service.to_owned(),
                None => return Ok(()),
            },
        };
        for file in self.service_files(environment)? {
            let text = std::fs::read_to_string(&file).map_err(|error| Error::io("read service file", &file, error))?;
            if self.read_service_text(&text, &service, &file)? {
                return Ok(());
            }
        }
        Err(Error::invalid(format!("definition of service {service:?} not found"))
            .hint("define it in ~/.pg_service.conf, or name the file in PGSERVICEFILE"))
    }

    /// The user's service file, then the system's; only a file that was named must exist.
    fn service_files(&self, environment: &Environment) -> Result<Vec<PathBuf>> {
        let named = self.get("servicefile").or(environment.variable("PGSERVICEFILE")?).map(PathBuf::from);
        let own = named.or_else(|| environment.home_file(".pg_service.conf").filter(|file| file.exists()));
        let directories = match environment.variable("PGSYSCONFDIR")? {
            Some(directory) => vec![PathBuf::from(directory)],
            None => environment.service_directories.clone(),
        };
        let system = directories.iter().map(|directory| directory.join("pg_service.conf")).filter(|file| file.exists());
        Ok(own.into_iter().chain(system).collect())
    }

    /// Whether `text` defines `service`; its settings are taken where none was given before.
    fn read_service_text(&mut self, text: &str, service: &str, file: &Path) -> Result<bool> {
        let mut found = false;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            let place = || format!("{} line {}", file.display(), number + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(group) = line.strip_prefix('[') {
                if found {
                    return Ok(true);
                }
                found = group.strip_prefix(service).is_some_and(|after| after.starts_with(']'));
            } else if found {
                if line.starts_with("ldap") {
                    let what = "a service definition that points to an LDAP server is not supported";
                    return Err(Error::new(ErrorKind::Unsupported, what).at(place()));
                }
                let (keyword, value) =
                    line.split_once('=').ok_or_else(|| Error::invalid("syntax error in service file").at(place()))?;
                if matches!(keyword, "service" | "servicefile") {
                    return Err(Error::invalid("nested service specifications are not supported").at(place()));
                }
                self.set_if_absent(keyword, value).map_err(|error| error.at(place()))?;
            }
        }
        Ok(found)
    }

    fn read_environment(&mut self, environment: &Environment) -> Result<()> {
        for (keyword, variable) in KEYWORDS {
            if let Some(value) = variable.map(|name| environment.variable(name)).transpose()?.flatten() {
                self.set_if_absent(keyword, value)?;
            }
        }
        // The variable from before PGSSLMODE; libpq still obeys it.
        if environment.variable("PGREQUIRESSL")?.is_some_and(|value| value.starts_with('1')) {
            self.set_if_absent("sslmode", "require")?;
        }
        Ok(())
    }

    fn refuse_what_cannot_be_honoured(&self) -> Result<()> {
        for (keyword, harmless) in CANNOT_BE_HONOURED {
            if self.non_empty(keyword).is_some_and(|value| !harmless.contains(&value)) {
                let what = format!("the connection parameter {keyword:?} is set, and pgstrata cannot honour it");
                return Err(Error::new(ErrorKind::Unsupported, what)
                    .hint("unset it, or give pgstrata its own connection string with -d"));
            }
        }
        Ok(())
    }

    fn into_parameters(self, data_dir: Option<&Path>, environment: &Environment) -> Result<ConnectionParameters> {
        let mut notices = Vec::new();
        let user = self.non_empty("user").map(str::to_owned).or_else(|| environment.os_user.clone());
        let user = user.ok_or_else(|| {
            Error::invalid("cannot find out this process's user name").hint("give user=... in -d, or set PGUSER")
        })?;
        let database = self.non_empty("dbname").unwrap_or(DEFAULT_DATABASE).to_owned();
        let mut endpoints = self.endpoints(data_dir, environment)?;
        match self.non_empty("password") {
            Some(password) => {
                endpoints.iter_mut().for_each(|endpoint| endpoint.password = Some(Secret(password.to_owned())));
            }
            None => {
                if let Some(text) = self.password_file(environment, &mut notices) {
                    for endpoint in &mut endpoints {
                        let hosts = hosts_in_password_file(&endpoint.address, environment);
                        let key = [&*endpoint.port.to_string(), &*database, &*user];
                        endpoint.password = find_password(&text, &hosts, key);
                    }
                }
            }
        }
        let application_name = self
            .non_empty("application_name")
            .or(self.non_empty("fallback_application_name"))
            .unwrap_or(APPLICATION_NAME);
        Ok(ConnectionParameters {
            endpoints,
            user,
            database,
            options: self.non_empty("options").map(str::to_owned),
            application_name: application_name.to_owned(),
            connect_timeout: self.seconds("connect_timeout")?,
            target_session: self.target_session()?,
            channel_binding: self.channel_binding()?,
            ssl_negotiation: self.ssl_negotiation()?,
            keepalives: self.keepalives()?,
            tls: self.tls(environment)?,
            notices,
        })
    }

    /// PostgreSQL: src/interfaces/libpq/fe-connect.c, pqConnectOptions2: `hostaddr` and `host` are parallel
    /// lists; `port` is one for all of them, or a parallel list too.
    fn endpoints(&self, data_dir: Option<&Path>, environment: &Environment) -> Result<Vec<Endpoint>> {
        let list = |keyword| self.non_empty(keyword).map(|value| value.split(',').collect::<Vec<_>>());
        let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = match (&hosts, &addresses) {
            (Some(hosts), Some(addresses)) if hosts.len() != addresses.len() => {
                let (hosts, addresses) = (hosts.len(), addresses.len());
                return Err(Error::invalid(format!(
                    "could not match {hosts} host names to {addresses} hostaddr values"
                )));
            }
            (_, Some(addresses)) => addresses.len(),
            (Some(hosts), None) => hosts.len(),
            (None, None) => return self.default_endpoints(ports.as_deref(), data_dir, environment),
        };
        let mut endpoints = Vec::new();
        for index in 0..count {
            let port = match ports.as_deref() {
                None => DEFAULT_PORT,
                Some([port]) => parse_port(port)?,
                Some(ports) if ports.len() == count => parse_port(ports[index])?,
                Some(ports) => {
                    let ports = ports.len();
                    return Err(Error::invalid(format!("could not match {ports} port numbers to {count} hosts")));
                }
            };
            let host = hosts.as_ref().map_or("", |hosts| hosts[index]);
            let address = addresses.as_ref().map_or("", |addresses| addresses[index]);
            if host.is_empty() && address.is_empty() {
                endpoints.extend(socket_endpoints(port, environment));
            } else {
                endpoints.push(Endpoint { address: parse_address(host, address)?, port, password: None });
            }
        }
        Ok(endpoints)
    }

    fn default_endpoints(
        &self,
        ports: Option<&[&str]>,
        data_dir: Option<&Path>,
        environment: &Environment,
    ) -> Result<Vec<Endpoint>> {
        match ports {
            None => {
                let running = data_dir.map(PostmasterPid::read).transpose()?.flatten();
                let own = running.and_then(|postmaster| endpoint_of(&postmaster));
                Ok(own.map_or_else(|| socket_endpoints(DEFAULT_PORT, environment), |endpoint| vec![endpoint]))
            }
            Some([port]) => Ok(socket_endpoints(parse_port(port)?, environment)),
            Some(ports) => Err(Error::invalid(format!("could not match {} port numbers to 1 hosts", ports.len()))),
        }
    }

    /// The text of the password file; one that others can read is not used, as in libpq.
    fn password_file(&self, environment: &Environment, notices: &mut Vec<String>) -> Option<String> {
        let named = self.non_empty("passfile").map(PathBuf::from);
        let file = named.clone().or_else(|| environment.home_file(".pgpass"))?;
        let text = std::fs::metadata(&file).and_then(|metadata| {
            if !metadata.is_file() {
                return Err(std::io::Error::other("it is not a plain file"));
            }
            if metadata.permissions().mode() & 0o077 != 0 {
                return Err(std::io::Error::other("group or others can read it; its permissions should be 0600"));
            }
            std::fs::read_to_string(&file)
        });
        match text {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => None,
            Err(error) => {
                notices.push(format!("password file {} is not used: {error}", file.display()));
                None
            }
        }
    }

    fn number(&self, keyword: &str) -> Result<Option<i64>> {
        let parse = |value: &str| {
            let invalid = |_| Error::invalid(format!("the connection parameter {keyword:?} is not an integer"));
            value.trim().parse().map_err(invalid)
        };
        self.non_empty(keyword).map(parse).transpose()
    }

    /// Seconds; 0 and less mean "no limit" or "the default".
    fn seconds(&self, keyword: &str) -> Result<Option<Duration>> {
        let positive = self.number(keyword)?.and_then(|number| u64::try_from(number).ok()).filter(|&number| number > 0);
        Ok(positive.map(Duration::from_secs))
    }

    /// The operating system's two hours before the first probe would let a backup wait two hours for a server
    /// that is gone, so ours are shorter.
    fn keepalives(&self) -> Result<Keepalives> {
        let count = self.number("keepalives_count")?.and_then(|count| u32::try_from(count).ok());
        let user_timeout = self.number("tcp_user_timeout")?.and_then(|millis| u64::try_from(millis).ok());
        Ok(Keepalives {
            enabled: self.number("keepalives")? != Some(0),
            idle: self.seconds("keepalives_idle")?.unwrap_or(Duration::from_secs(60)),
            interval: self.seconds("keepalives_interval")?.unwrap_or(Duration::from_secs(10)),
            count: count.filter(|&count| count > 0).unwrap_or(6),
            user_timeout: user_timeout.filter(|&millis| millis > 0).map(Duration::from_millis),
        })
    }

    fn choice<T: Copy>(&self, keyword: &str, choices: &[(&str, T)], default: T) -> Result<T> {
        let Some(value) = self.non_empty(keyword) else { return Ok(default) };
        choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            Error::invalid(format!("the connection parameter {keyword:?} is none of: {}", names.join(", ")))
        })
    }

    fn target_session(&self) -> Result<TargetSession> {
        use TargetSession::{Any, PreferStandby, Primary, ReadOnly, ReadWrite, Standby};
        let choices = [
            ("any", Any),
            ("read-write", ReadWrite),
            ("read-only", ReadOnly),
            ("primary", Primary),
            ("standby", Standby),
            ("prefer-standby", PreferStandby),
        ];
        self.choice("target_session_attrs", &choices, Any)
    }

    fn channel_binding(&self) -> Result<ChannelBinding> {
        use ChannelBinding::{Disable, Prefer, Require};
        self.choice("channel_binding", &[("disable", Disable), ("prefer", Prefer), ("require", Require)], Prefer)
    }

    fn ssl_negotiation(&self) -> Result<SslNegotiation> {
        use SslNegotiation::{Direct, Postgres};
        self.choice("sslnegotiation", &[("postgres", Postgres), ("direct", Direct)], Postgres)
    }

    fn tls(&self, environment: &Environment) -> Result<TlsParameters> {
        let default_file = |name: &str| environment.home_file(".postgresql").map(|directory| directory.join(name));
        let file = |keyword, name| self.non_empty(keyword).map(PathBuf::from).or_else(|| default_file(name));
        let roots = match self.non_empty("sslrootcert") {
            Some("system") => RootCertificates::System,
            _ => file("sslrootcert", "root.crt").map_or(RootCertificates::None, RootCertificates::File),
        };
        let modes = [
            ("disable", SslMode::Disable),
            ("allow", SslMode::Allow),
            ("prefer", SslMode::Prefer),
            ("require", SslMode::Require),
            ("verify-ca", SslMode::VerifyCa),
            ("verify-full", SslMode::VerifyFull),
        ];
        let system = roots == RootCertificates::System;
        let mode = self.choice("sslmode", &modes, if system { SslMode::VerifyFull } else { SslMode::Prefer })?;
        if system && mode != SslMode::VerifyFull {
            return Err(Error::invalid("weak sslmode may not be used with sslrootcert=system")
                .hint("use sslmode=verify-full, or leave it out"));
        }
        if self.ssl_negotiation()? == SslNegotiation::Direct && mode < SslMode::Require {
            return Err(Error::invalid("weak sslmode may not be used with sslnegotiation=direct")
                .hint("use sslmode=require or a stronger one"));
        }
        use CertificateMode::{Allow, Disable, Require};
        let certificate_modes = [("disable", Disable), ("allow", Allow), ("require", Require)];
        let old = [("TLSv1", false), ("TLSv1.1", false), ("TLSv1.2", false), ("TLSv1.3", true)];
        Ok(TlsParameters {
            mode,
            roots,
            certificate: file("sslcert", "postgresql.crt"),
            key: file("sslkey", "postgresql.key"),
            certificate_mode: self.choice("sslcertmode", &certificate_modes, Allow)?,
            only_tls13: self.choice("ssl_min_protocol_version", &old, false)?,
            only_tls12: !self.choice("ssl_max_protocol_version", &old[2..], true)?,
            server_name_indication: self.non_empty("sslsni") != Some("0"),
            direct: self.ssl_negotiation()? == SslNegotiation::Direct,
        })
    }
}

/// At most twenty characters of what may be a misplaced secret.
fn excerpt(text: &str) -> String {
    text.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')).take(20).collect()
}

/// The value at the beginning of `text`, quoted or not, and what follows it.
fn take_value(text: &str) -> Result<(String, &str)> {
    let (quoted, body) = text.strip_prefix('\'').map_or((false, text), |body| (true, body));
    let mut value = String::new();
    let mut characters = body.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &body[at + 1..])),
            _ if !quoted && c.is_ascii_whitespace() => return Ok((value, &body[at..])),
            _ => value.push(c),
        }
    }
    if quoted {
        return Err(Error::invalid("unterminated quoted string in the connection string"));
    }
    Ok((value, ""))
}

/// PostgreSQL: src/interfaces/libpq/fe-connect.c, conninfo_uri_decode.
fn percent_decode(text: &str) -> Result<String> {
    let malformed = || Error::invalid("invalid percent-encoded token in the connection URI");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(malformed)?;
        let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).filter(|&byte| byte != 0);
        bytes.push(byte.ok_or_else(malformed)?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| malformed())
}

fn parse_port(text: &str) -> Result<u16> {
    if text.is_empty() {
        return Ok(DEFAULT_PORT);
    }
    let port = text.trim().parse().ok().filter(|&port: &u16| port != 0);
    port.ok_or_else(|| Error::invalid("invalid port number: it must be between 1 and 65535"))
}

fn parse_address(host: &str, address: &str) -> Result<Address> {
    if host.starts_with('@') {
        let what = "a Unix socket in the abstract namespace is not supported";
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    if address.is_empty() {
        return Ok(if host.starts_with('/') {
            Address::Socket(PathBuf::from(host))
        } else {
            Address::Tcp { host: host.to_owned(), address: None }
        });
    }
    let parsed: IpAddr = address.parse().map_err(|_| Error::invalid("hostaddr is not a numeric network address"))?;
    let host = if host.is_empty() { address } else { host };
    Ok(Address::Tcp { host: host.to_owned(), address: Some(parsed) })
}

/// The customary sockets: those that exist, or all of them so that the error names them.
fn socket_endpoints(port: u16, environment: &Environment) -> Vec<Endpoint> {
    let endpoint = |directory: &PathBuf| Endpoint { address: Address::Socket(directory.clone()), port, password: None };
    let directories = &environment.socket_directories;
    let exists = |directory: &&PathBuf| directory.join(format!(".s.PGSQL.{port}")).exists();
    let existing: Vec<_> = directories.iter().filter(exists).map(endpoint).collect();
    if existing.is_empty() { directories.iter().map(endpoint).collect() } else { existing }
}

/// Where the server that wrote this `postmaster.pid` listens; its socket, if it has one.
fn endpoint_of(postmaster: &PostmasterPid) -> Option<Endpoint> {
    let port = postmaster.port?;
    let address = match (&postmaster.socket_directory, &*postmaster.listen_address) {
        (Some(directory), _) => Address::Socket(directory.clone()),
        (None, "") => return None,
        (None, "*" | "0.0.0.0" | "::") => Address::Tcp { host: "localhost".to_owned(), address: None },
        (None, host) => Address::Tcp { host: host.to_owned(), address: None },
    };
    Some(Endpoint { address, port, password: None })
}

/// The names under which a password file may know `address`.
fn hosts_in_password_file(address: &Address, environment: &Environment) -> Vec<String> {
    match address {
        Address::Tcp { host, .. } => vec![host.clone()],
        Address::Socket(directory) => {
            let is_default = environment.socket_directories.contains(directory);
            let path = directory.to_string_lossy().into_owned();
            if is_default { vec!["localhost".to_owned(), path] } else { vec![path] }
        }
    }
}

/// The password of the first line that matches one of `hosts`, and the port, database and user of `key`.
fn find_password(text: &str, hosts: &[String], key: [&str; 3]) -> Option<Secret> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = split_password_line(line);
        let [host, rest @ .., password] = fields.get(..5)? else { return None };
        let matches = |field: &PasswordField, wanted: &str| field.raw == "*" || field.value == wanted;
        let hit = hosts.iter().any(|wanted| matches(host, wanted))
            && rest.iter().zip(key).all(|(field, wanted)| matches(field, wanted));
        hit.then(|| Secret(password.value.clone()))
    })
}

/// A field of a password file: as written (an unescaped `*` matches everything), and without its escapes.
struct PasswordField<'a> {
    raw: &'a str,
    value: String,
}

fn split_password_line(line: &str) -> Vec<PasswordField<'_>> {
    let mut fields = Vec::new();
    let mut start = 0;
    let mut value = String::new();
    let mut characters = line.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => value.push(characters.next().map_or('\\', |(_, escaped)| escaped)),
            ':' => {
                fields.push(PasswordField { raw: &line[start..at], value: std::mem::take(&mut value) });
                start = at + 1;
            }
            _ => value.push(c),
        }
    }
    fields.push(PasswordField { raw: &line[start..], value });
    fields
}

#[cfg(test)]
mod tests;
