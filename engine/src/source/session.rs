//! The SQL session that a backup happens in.
//!
//! Backup mode belongs to a session: when it ends, for whatever reason, the server ends the backup, and what was
//! copied is void. So one connection is opened for the whole backup, kept from timing out, watched from any
//! thread ([`Session::check_alive`]), and used to the end ([`Session::end_backup`]). Dropping it ends the backup
//! on the server's side and removes the replication slot; nothing has to be cleaned up after a crash of ours.
//!
//! tokio-postgres is asynchronous; the runtime inside has one thread, which drives the connection while the
//! caller works, so that keepalives and the server's "I am going down" are noticed at once. Async ends here.
//!
//! **Bytes.** `backup_label` and `tablespace_map` hold paths, which are bytes. `client_encoding` is therefore
//! `SQL_ASCII`: with any other the server converts what it sends (a LATIN1 database would change the path) or
//! checks it (an SQL_ASCII database would refuse to send it), where `pg_basebackup` gets the bytes as they are.
//!
//! **Rights.** A role without superuser needs, in the database it connects to: EXECUTE on the two backup
//! functions, the attribute REPLICATION (for the temporary slot), and membership in `pg_read_all_settings` (to
//! see `data_directory`). Each missing one is an error whose hint is the statement that grants it.
//!
//! Who notices what: a lost session, `check_alive` or the next call; a promotion of the standby, or replay of WAL
//! written with `full_page_writes = off`, `pg_backup_stop`, which fails; WAL that was removed although a slot
//! reserved it (`max_slot_wal_keep_size`), the caller, when it copies the WAL.
//!
//! PostgreSQL: src/backend/access/transam/xlogfuncs.c, pg_backup_start, pg_backup_stop;
//! src/backend/access/transam/xlog.c, do_pg_backup_start, do_pg_backup_stop.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::connect::{Connected, Feedback, connect};
use super::conninfo::{ConnectionParameters, Environment, resolve};
use super::server::{RawText, SESSION_SETTINGS, Server, column, look_around};
use super::{failure, rights};
use crate::error::{Error, ErrorKind, Result};
use crate::pg::{Lsn, TimelineId};

/// The server's limit for a backup's label, in bytes; MAXPGPATH.
const MAX_LABEL_LEN: usize = 1024;

/// A backup has begun; list and read files from here on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupStart {
    /// The redo position that a restore will begin to replay at.
    pub start_lsn: Lsn,
    /// Why no replication slot reserves the WAL, if none does: it may then be removed before it is copied.
    pub slot_notice: Option<String>,
}

/// A backup has ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupStop {
    /// WAL up to here makes the backup consistent.
    pub stop_lsn: Lsn,
    /// The file `backup_label`, which a restore must put in place.
    pub backup_label: Vec<u8>,
    /// The file `tablespace_map`; empty when there are no tablespaces.
    pub tablespace_map: Vec<u8>,
}

/// Replication slots, of which a backup takes one while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotCount {
    /// How many there may be.
    pub max: u64,
    /// How many there are.
    pub used: u64,
}

/// A setting from a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSetting {
    /// Its name.
    pub name: String,
    /// Its value as `postgresql.conf` takes it, quoted.
    pub value: Vec<u8>,
}

/// A session with a supported server. Dropping it ends a backup that is running, and removes its slot.
///
/// Must not be used from inside an asynchronous runtime.
pub struct Session {
    // Dropped in this order: the client tells the driving task to hang up, then the runtime ends.
    client: Client,
    feedback: Feedback,
    server: Server,
    parameters: ConnectionParameters,
    endpoint: String,
    role: String,
    slot: Option<String>,
    runtime: Runtime,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("endpoint", &self.endpoint).field("server", &self.server).finish()
    }
}

type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Session {
    /// Connects as libpq would with `conninfo` (a connection string, URI or database name) and `environment`.
    /// When nothing says where the server is, it is the one that runs on `data_dir`.
    ///
    /// # Errors
    ///
    /// `Invalid` for wrong parameters, `Unavailable` when no server answers, `Postgres` when it refuses,
    /// `Unsupported` for a version that this program does not know.
    pub fn connect(conninfo: Option<&str>, data_dir: Option<&Path>, environment: &Environment) -> Result<Self> {
        let parameters = resolve(conninfo, data_dir, environment)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("pgstrata-sql")
            .enable_all()
            .build()
            .map_err(|error| Error::new(ErrorKind::Unavailable, "cannot start a thread").because(error))?;
        let (connected, server, role) = runtime.block_on(async {
            let connected = connect(&parameters).await?;
            let (server, role) = look_around(&connected).await?;
            Ok::<_, Error>((connected, server, role))
        })?;
        for notice in &parameters.notices {
            connected.feedback.add_notice(notice.clone());
        }
        let endpoint = connected.endpoint.to_string();
        let Connected { client, feedback, .. } = connected;
        Ok(Self { client, feedback, server, parameters, endpoint, role, slot: None, runtime })
    }

    /// What the server said of itself when we connected.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Where we are connected to, for people.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The role that we are.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// What the server (or the reading of the connection parameters) had to say since the last call.
    pub fn take_notices(&self) -> Vec<String> {
        self.feedback.take_notices()
    }

    /// How far a standby has replayed; `None` on a primary.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn replayed(&self) -> Result<Option<Lsn>> {
        if !self.server.in_recovery {
            return Ok(None);
        }
        let statement = "SELECT pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text";
        let row = self.query_one("ask how far WAL is replayed", statement, &[])?;
        if column::<Option<RawText>>(&row, 0)?.is_some() { lsn(&row, 0).map(Some) } else { Ok(None) }
    }

    /// Sees that the server's WAL can make a backup consistent.
    ///
    /// # Errors
    ///
    /// `Postgres` if it cannot, with what to do.
    pub fn must_write_enough_wal(&self) -> Result<()> {
        if self.server.wal_level == "minimal" {
            let what = "wal_level is minimal: the WAL does not hold enough for an online backup";
            return Err(Error::new(ErrorKind::Postgres, what)
                .hint("set wal_level = replica and restart the server, or stop it and back up with --offline"));
        }
        Ok(())
    }

    /// Sees that the role may do what a backup does.
    ///
    /// # Errors
    ///
    /// `Postgres` if it may not, with the statements that grant all that is missing.
    pub fn must_be_allowed_to_back_up(&self) -> Result<()> {
        match self.block_on(rights::hint(&self.client, self.server.major)) {
            Some(hint) => {
                let what = format!("the role {:?} may not back up this server", self.role);
                Err(Error::new(ErrorKind::Postgres, what).hint(hint))
            }
            None => Ok(()),
        }
    }

    /// Where the log is now: as far as a primary has written it to its files, or a standby has replayed it.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn current_lsn(&self) -> Result<Lsn> {
        let statement = "SELECT (CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
             ELSE pg_catalog.pg_current_wal_flush_lsn() END)::pg_catalog.text";
        let row = self.query_one("ask how far WAL is written", statement, &[])?;
        if column::<Option<RawText>>(&row, 0)?.is_some() { lsn(&row, 0) } else { Ok(Lsn::INVALID) }
    }

    /// How many replication slots there may be, and how many there are.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn replication_slots(&self) -> Result<SlotCount> {
        let statement = "SELECT pg_catalog.current_setting('max_replication_slots')::pg_catalog.int8, \
             (SELECT pg_catalog.count(*) FROM pg_catalog.pg_replication_slots)";
        let row = self.query_one("count the replication slots", statement, &[])?;
        let count = |index| Ok::<_, Error>(u64::try_from(column::<i64>(&row, index)?).unwrap_or_default());
        Ok(SlotCount { max: count(0)?, used: count(1)? })
    }

    /// Reserves the WAL and puts the server into backup mode; returns when the checkpoint is done, which takes up
    /// to `checkpoint_timeout` unless `fast`.
    ///
    /// # Errors
    ///
    /// `Invalid` for a label that a backup_label file cannot hold; `Postgres` with what to do when rights or
    /// settings do not allow it.
    pub fn begin_backup(&mut self, label: &str, fast: bool) -> Result<BackupStart> {
        if label.len() > MAX_LABEL_LEN || label.contains(|c: char| c.is_control()) {
            let what = format!("a backup label is at most {MAX_LABEL_LEN} bytes long and has no control characters");
            return Err(Error::invalid(what));
        }
        self.must_write_enough_wal()?;
        let slot_notice = self.create_slot()?;
        let statement = if self.server.major.as_u32() >= 15 {
            "SELECT pg_catalog.pg_backup_start($1, $2)::pg_catalog.text"
        } else {
            "SELECT pg_catalog.pg_start_backup($1, $2, false)::pg_catalog.text"
        };
        let row = self.query_one("begin a backup", statement, &[&label, &fast])?;
        Ok(BackupStart { start_lsn: lsn(&row, 0)?, slot_notice })
    }

    /// Creates the slot; without a free one, says so and goes on.
    fn create_slot(&mut self) -> Result<Option<String>> {
        let row = self.query_one("ask for the process", "SELECT pg_catalog.pg_backend_pid()", &[])?;
        let name = format!("pgstrata_{}_{}", column::<i32>(&row, 0)?, std::process::id());
        let statement = "SELECT slot_name FROM pg_catalog.pg_create_physical_replication_slot($1, true, true)";
        let error = match self.block_on(self.client.query(statement, &[&name])) {
            Ok(_) => {
                self.slot = Some(name);
                return Ok(None);
            }
            Err(error) => error,
        };
        let no_slot = match error.code() {
            Some(code) if *code == SqlState::CONFIGURATION_LIMIT_EXCEEDED => true,
            Some(code) if *code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => {
                self.setting("max_replication_slots")?.as_deref() == Some("0")
            }
            _ => false,
        };
        if no_slot {
            let reason = error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned());
            return Ok(Some(format!(
                "no replication slot reserves the WAL of this backup ({reason}); raise max_replication_slots"
            )));
        }
        Err(self.explain(error, "create a temporary replication slot"))
    }

    /// A setting as `pg_settings` has it, in the unit that it has there; `None` if the server has no such setting.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn setting(&self, name: &str) -> Result<Option<String>> {
        let statement = "SELECT setting FROM pg_catalog.pg_settings WHERE name = $1";
        let rows = self.query("read a setting", statement, &[&name])?;
        rows.first().map(|row| Ok(column::<RawText>(row, 0)?.to_text())).transpose()
    }

    /// Ends the backup, without waiting for the archiver. The slot stays until [`Session::drop_slot`].
    ///
    /// # Errors
    ///
    /// Any error means that the backup is void.
    pub fn end_backup(&mut self) -> Result<BackupStop> {
        let statement = if self.server.major.as_u32() >= 15 {
            "SELECT lsn::pg_catalog.text, labelfile, spcmapfile FROM pg_catalog.pg_backup_stop(false)"
        } else {
            "SELECT lsn::pg_catalog.text, labelfile, spcmapfile FROM pg_catalog.pg_stop_backup(false, false)"
        };
        let row = self.query_one("end the backup", statement, &[])?;
        let bytes =
            |index| Ok::<_, Error>(column::<Option<RawText>>(&row, index)?.map(|text| text.0).unwrap_or_default());
        let stop = BackupStop { stop_lsn: lsn(&row, 0)?, backup_label: bytes(1)?, tablespace_map: bytes(2)? };
        if stop.backup_label.is_empty() {
            return Err(Error::new(ErrorKind::Postgres, "the server returned an empty backup_label"));
        }
        Ok(stop)
    }

    /// Releases the WAL that [`Session::begin_backup`] reserved.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn drop_slot(&mut self) -> Result<()> {
        let Some(name) = self.slot.take() else { return Ok(()) };
        let statement = "SELECT pg_catalog.pg_drop_replication_slot(slot_name)::pg_catalog.text \
                         FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::pg_catalog.text";
        self.query("drop the replication slot", statement, &[&name]).map(drop)
    }

    /// Waits until the WAL up to `lsn` is in the server's files, so that it can be copied.
    ///
    /// # Errors
    ///
    /// `Unavailable` when it is not there after `timeout`.
    pub fn wait_for_wal_flush(&self, lsn: Lsn, timeout: Duration) -> Result<()> {
        let statement = "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() \
             THEN GREATEST(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()) \
             ELSE pg_catalog.pg_current_wal_flush_lsn() END::pg_catalog.text";
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_millis(5);
        loop {
            let row = self.query_one("ask how far WAL is written", statement, &[])?;
            let flushed =
                if column::<Option<RawText>>(&row, 0)?.is_some() { self::lsn(&row, 0)? } else { Lsn::INVALID };
            if flushed >= lsn {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let seconds = timeout.as_secs();
                let what = format!("WAL is written up to {flushed}, and not up to {lsn}, after {seconds} s");
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// Whether the server summarizes its WAL (17 and later).
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn summarizes_wal(&self) -> Result<bool> {
        let statement = "SELECT COALESCE(pg_catalog.current_setting('summarize_wal', true), 'off') = 'on'";
        column(&self.query_one("ask whether WAL is summarized", statement, &[])?, 0)
    }

    /// Whether the session still lives, without asking the server; cheap, and callable from any thread.
    ///
    /// # Errors
    ///
    /// `Unavailable`: the session is gone, and a backup that it began is void.
    pub fn check_alive(&self) -> Result<()> {
        if self.client.is_closed() {
            return Err(failure::connection_lost("go on with the backup, which is void", &self.feedback));
        }
        Ok(())
    }

    /// The timeline that a primary writes, or that a standby has replayed a record of.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn current_timeline(&self) -> Result<TimelineId> {
        // In recovery pg_walfile_name is not allowed; the control file may lag, but never runs ahead.
        let statement = "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL \
             ELSE pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END, \
             GREATEST((SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()), \
                      (SELECT min_recovery_end_timeline FROM pg_catalog.pg_control_recovery()))";
        let row = self.query_one("ask for the timeline", statement, &[])?;
        let replayed = u32::try_from(column::<i32>(&row, 1)?).unwrap_or_default();
        let number = match column::<Option<RawText>>(&row, 0)? {
            None => replayed,
            Some(name) => {
                let digits = name.0.get(..8).and_then(|digits| std::str::from_utf8(digits).ok());
                let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
                number.ok_or_else(|| Error::bug(format!("{:?} is no name of a WAL file", name.to_text())))?
            }
        };
        Ok(TimelineId::new(number))
    }

    /// The settings in force that come from configuration files outside the data directory, and that a restored
    /// cluster wants: without them it may not start (`max_connections` on a standby).
    ///
    /// Left out is what names files of this host (`hba_file`, `ssl_cert_file`), may hold a secret
    /// (`primary_conninfo`), or would make a copy act on others or wait for them (`archive_command`,
    /// `synchronous_standby_names`).
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn file_settings(&self) -> Result<Vec<FileSetting>> {
        let statement = "SELECT name, setting, sourcefile FROM pg_catalog.pg_settings \
             WHERE source = 'configuration file' AND sourcefile IS NOT NULL AND setting IS NOT NULL ORDER BY name";
        let rows = self.query("read the settings", statement, &[])?;
        let mut settings = Vec::new();
        for row in &rows {
            let name = column::<RawText>(row, 0)?.to_text();
            let file = column::<RawText>(row, 2)?.into_path();
            if !file.starts_with(&self.server.data_directory) && may_be_copied(&name) {
                settings.push(FileSetting { name, value: quote_setting(&column::<RawText>(row, 1)?.0) });
            }
        }
        Ok(settings)
    }

    /// `database.schema.relation` for a relation file, as far as it can be found out.
    ///
    /// A relation of another database is asked for in that database, over a second connection. Any failure on the
    /// way is `None`: the name only decorates a report.
    pub fn relation_name(&self, tablespace: u32, database: u32, filenode: u32) -> Option<String> {
        let statement = "SELECT datname, datname = pg_catalog.current_database() FROM pg_catalog.pg_database \
             WHERE oid = $1 OR ($1 = 0 AND datname = pg_catalog.current_database())";
        let rows = self.query("name a database", statement, &[&database]).ok()?;
        let name = column::<RawText>(rows.first()?, 0).ok()?.to_text();
        if column::<bool>(rows.first()?, 1).ok()? {
            return self.block_on(relation_name(&self.client, tablespace, filenode));
        }
        let parameters = ConnectionParameters { database: name, ..self.parameters.clone() };
        self.block_on(async {
            let other = connect(&parameters).await.ok()?;
            other.client.batch_execute(SESSION_SETTINGS).await.ok()?;
            relation_name(&other.client, tablespace, filenode).await
        })
    }

    fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    fn query(&self, doing: &str, statement: &str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
        self.block_on(self.client.query(statement, parameters)).map_err(|error| self.explain(error, doing))
    }

    fn query_one(&self, doing: &str, statement: &str, parameters: Parameters<'_>) -> Result<Row> {
        let rows = self.query(doing, statement, parameters)?;
        rows.into_iter().next().ok_or_else(|| Error::bug(format!("cannot {doing}: the server returned no row")))
    }

    /// The error, with the statements that grant what is missing where that is the cause.
    fn explain(&self, error: tokio_postgres::Error, doing: &str) -> Error {
        let denied = error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE);
        let result = failure::of_query(error, doing, &self.feedback);
        let hint = if denied { self.block_on(rights::hint(&self.client, self.server.major)) } else { None };
        match hint {
            Some(hint) => result.hint(hint),
            None => result,
        }
    }
}

async fn relation_name(client: &Client, tablespace: u32, filenode: u32) -> Option<String> {
    let statement = "SELECT pg_catalog.current_database(), n.nspname, c.relname FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.oid = pg_catalog.pg_filenode_relation($1, $2)";
    let rows = client.query(statement, &[&tablespace, &filenode]).await.ok()?;
    let row = rows.first()?;
    let part = |index| column::<RawText>(row, index).ok().map(|text| text.to_text());
    Some(format!("{}.{}.{}", part(0)?, part(1)?, part(2)?))
}

fn lsn(row: &Row, index: usize) -> Result<Lsn> {
    let text = column::<RawText>(row, index)?.to_text();
    text.parse().map_err(|error| Error::bug("the server's answer is not of the expected type").because(error))
}

/// PostgreSQL: src/backend/utils/misc/guc-file.l, DeescapeQuotedString.
fn quote_setting(value: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in value {
        match byte {
            b'\'' => quoted.extend(b"''"),
            b'\\' => quoted.extend(b"\\\\"),
            b'\n' => quoted.extend(b"\\n"),
            b'\r' => quoted.extend(b"\\r"),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// Whether a setting of the original makes sense, and is harmless, in a copy on any host.
fn may_be_copied(name: &str) -> bool {
    const NAMES: &[&str] = &[
        "config_file",
        "data_directory",
        "external_pid_file",
        "hba_file",
        "hosts_file",
        "ident_file",
        "krb_server_keyfile",
        "promote_trigger_file",
        "restore_command",
        "ssl",
        "stats_temp_directory",
        "sync_replication_slots",
        "synchronized_standby_slots",
        "synchronous_standby_names",
    ];
    const PREFIXES: &[&str] = &["archive_", "primary_", "recovery_", "ssl_"];
    const SECRETS: &[&str] = &["conninfo", "credential", "passphrase", "passwd", "password", "secret", "token"];
    let is_known = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let may_be_secret = name.contains('.') && SECRETS.iter().any(|word| name.to_ascii_lowercase().contains(word));
    !is_known && !may_be_secret
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_may_be_watched_from_any_thread() {
        fn shared<T: Send + Sync>() {}
        shared::<Session>();
    }

    #[test]
    fn a_setting_reads_back_from_postgresql_conf_as_it_was() {
        assert_eq!(quote_setting(b"it's a \\ path\n"), b"'it''s a \\\\ path\\n'");
        assert_eq!(quote_setting(b""), b"''");
    }

    #[test]
    fn what_names_this_host_or_acts_on_others_is_not_copied() {
        for name in ["hba_file", "archive_command", "primary_conninfo", "ssl_key_file", "myext.api_token"] {
            assert!(!may_be_copied(name), "{name}");
        }
        for name in ["max_connections", "shared_preload_libraries", "port", "password_encryption"] {
            assert!(may_be_copied(name), "{name}");
        }
    }
}
