//! What the server says of itself when we connect, and the settings of our own session.

use std::collections::HashMap;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use jiff::Timestamp;
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Client, Row};

use super::connect::Connected;
use super::{failure, rights};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{MajorVersion, SystemIdentifier, WalSegmentSize};

/// The major versions whose servers this program talks to.
const SUPPORTED: RangeInclusive<u32> = 13..=18;

/// Settings of our own session. A timeout of the database or the role would end the backup.
pub(super) const SESSION_SETTINGS: &str = "SET search_path = pg_catalog, pg_temp; SET client_encoding = 'SQL_ASCII'; \
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET datestyle = 'ISO, YMD'; SET bytea_output = 'hex'; SET client_min_messages = notice";

/// What the server says of itself; fixed while it runs, except by a promotion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// E.g. 150018.
    pub version_num: u32,
    /// E.g. `15.18`.
    pub version: String,
    /// E.g. 15.
    pub major: MajorVersion,
    /// The cluster's identity, from its control file.
    pub system_identifier: SystemIdentifier,
    /// The data directory as the server sees it.
    pub data_directory: PathBuf,
    /// `postgresql.conf`, wherever it is.
    pub config_file: PathBuf,
    /// `pg_hba.conf`, wherever it is.
    pub hba_file: PathBuf,
    /// `pg_ident.conf`, wherever it is.
    pub ident_file: PathBuf,
    /// Whether it was a standby when we connected.
    pub in_recovery: bool,
    /// `minimal`, `replica` or `logical`.
    pub wal_level: String,
    /// Whether pages are logged whole after a checkpoint; forced on while a primary is backed up.
    pub full_page_writes: bool,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// Whether hint bits are logged even without checksums.
    pub wal_log_hints: bool,
    /// Whether WAL is summarized; false before 17.
    pub summarize_wal: bool,
    /// The length of a WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// When the server started.
    pub postmaster_start_time: Timestamp,
}

/// Text as the server holds it: in its encoding, unchecked.
pub(super) struct RawText(pub(super) Vec<u8>);

impl<'a> FromSql<'a> for RawText {
    fn from_sql(_: &Type, raw: &'a [u8]) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw.to_vec()))
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::TEXT | Type::VARCHAR | Type::NAME | Type::BPCHAR)
    }
}

impl RawText {
    pub(super) fn into_path(self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.0))
    }

    pub(super) fn to_text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// A column of a type that the statement determines.
pub(super) fn column<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> Result<T> {
    row.try_get(index).map_err(|error| Error::bug("the server's answer is not of the expected type").because(error))
}

/// Prepares the session and asks the server what it is and who we are.
pub(super) async fn look_around(connected: &Connected) -> Result<(Server, String)> {
    let Connected { client, feedback, .. } = connected;
    let explain = |error| failure::of_query(error, "look at the server", feedback);
    let version = "SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4";
    let row = client.query_one(version, &[]).await.map_err(explain)?;
    let version_num = u32::try_from(column::<i32>(&row, 0)?).unwrap_or_default();
    let number = version_num / 10_000;
    let major = MajorVersion::new(number).filter(|_| SUPPORTED.contains(&number)).ok_or_else(|| {
        let (first, last) = (SUPPORTED.start(), SUPPORTED.end());
        let what = format!("the server is PostgreSQL {number}, and pgstrata supports {first} to {last}");
        Error::new(ErrorKind::Unsupported, what)
    })?;
    let idle = if number >= 14 { "; SET idle_session_timeout = 0" } else { "" };
    client.batch_execute(&format!("{SESSION_SETTINGS}{idle}")).await.map_err(explain)?;
    let identity = "SELECT CURRENT_USER::pg_catalog.text, pg_catalog.pg_is_in_recovery(), \
         (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
         (EXTRACT(EPOCH FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::pg_catalog.int8";
    let row = client.query_one(identity, &[]).await.map_err(explain)?;
    let role = column::<RawText>(&row, 0)?.to_text();
    let settings = Settings::read(client).await.map_err(explain)?;
    if !settings.0.contains_key("data_directory") {
        let what = format!("the role {role:?} may not see the setting data_directory");
        let error = Error::new(ErrorKind::Postgres, what);
        return Err(match rights::hint(client, major).await {
            Some(hint) => error.hint(hint),
            None => error,
        });
    }
    let server = Server {
        version_num,
        version: settings.text("server_version")?.split(' ').next().unwrap_or_default().to_owned(),
        major,
        system_identifier: SystemIdentifier::new(column::<i64>(&row, 2)?.cast_unsigned()),
        data_directory: settings.path("data_directory")?,
        config_file: settings.path("config_file")?,
        hba_file: settings.path("hba_file")?,
        ident_file: settings.path("ident_file")?,
        in_recovery: column(&row, 1)?,
        wal_level: settings.text("wal_level")?,
        full_page_writes: settings.is_on("full_page_writes"),
        data_checksums: settings.is_on("data_checksums"),
        wal_log_hints: settings.is_on("wal_log_hints"),
        summarize_wal: settings.is_on("summarize_wal"),
        wal_segment_size: settings.wal_segment_size()?,
        postmaster_start_time: Timestamp::from_microsecond(column(&row, 3)?)
            .map_err(|error| Error::bug("the server's start time is out of range").because(error))?,
    };
    Ok((server, role))
}

struct Settings(HashMap<String, Vec<u8>>);

impl Settings {
    async fn read(client: &Client) -> std::result::Result<Self, tokio_postgres::Error> {
        let statement = "SELECT name, setting FROM pg_catalog.pg_settings WHERE setting IS NOT NULL";
        let rows = client.query(statement, &[]).await?;
        let pair = |row: &Row| Ok((row.try_get::<_, RawText>(0)?.to_text(), row.try_get::<_, RawText>(1)?.0));
        Ok(Self(rows.iter().map(pair).collect::<std::result::Result<_, _>>()?))
    }

    /// A setting that every server has; what is missing is hidden from us.
    fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.0
            .get(name)
            .map(Vec::as_slice)
            .ok_or_else(|| Error::new(ErrorKind::Postgres, format!("this role may not see the setting {name}")))
    }

    fn text(&self, name: &str) -> Result<String> {
        self.bytes(name).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        self.bytes(name).map(|bytes| PathBuf::from(OsString::from_vec(bytes.to_vec())))
    }

    fn wal_segment_size(&self) -> Result<WalSegmentSize> {
        let text = self.text("wal_segment_size")?;
        let size = text.parse().ok().and_then(WalSegmentSize::new);
        size.ok_or_else(|| Error::bug(format!("wal_segment_size is {text:?}, which is no segment size")))
    }

    fn is_on(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| value == b"on")
    }
}
