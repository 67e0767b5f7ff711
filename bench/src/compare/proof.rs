//! Whether what was restored is right: what is fast and wrong is not fast.
//!
//! With a server: another one starts on the restored directory and answers. One without the WAL of its backup gets it from the
//! cluster's own `pg_wal`, as from an archive. After the last incremental it must have the rows of the cluster.
//! Without a server: the relation files are those of the cluster, byte for byte.

use std::fs;
use std::path::Path;

use testdata::cluster::{Cluster, StopMode, succeed};
use testdata::{Error, Result};

use super::site::Site;
use crate::cannot;

/// Proves what is in `restored`; `whole` if it is to be the cluster as it is now.
///
/// # Errors
/// With what differs.
pub fn prove(site: &Site, needs_archive: bool, whole: bool) -> Result<String> {
    let restored = site.scratch().path("restored").join("data");
    match site.server() {
        Some(server) => rows(site, server, &restored, needs_archive, whole),
        None if whole => files(site, &restored),
        None => Ok("restored".to_owned()),
    }
}

fn rows(site: &Site, source: &Cluster, restored: &Path, needs_archive: bool, whole: bool) -> Result<String> {
    if needs_archive {
        source.sql("postgres", "SELECT pg_switch_wal()")?;
        recover_from(site, restored)?;
    }
    let mut server = Cluster::adopt(source.server(), source.tools(), restored)?;
    server.start()?;
    let tables = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
                  WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace";
    let tables = source.query_value("postgres", tables)?;
    let fact = match whole {
        true => same_rows(source, &server, &tables),
        false => server.query_value("postgres", "SELECT count(*) FROM pgbench_branches").map(|_| "starts".to_owned()),
    };
    server.stop(StopMode::Immediate)?;
    fact
}

fn same_rows(source: &Cluster, restored: &Cluster, tables: &str) -> Result<String> {
    for table in tables.split(' ') {
        let sum = format!("SELECT count(*) || ' ' || coalesce(sum(hashtext(t::text)::bigint), 0) FROM {table} t");
        let (ours, theirs) = (source.query_value("postgres", &sum)?, restored.query_value("postgres", &sum)?);
        if ours != theirs {
            return Err(Error::new(format!(
                "the restored {table} has {theirs} as its rows and their sum, the original {ours}"
            )));
        }
    }
    // Reading rows sets hint bits, which no round is to find as changes.
    source.sql("postgres", "CHECKPOINT")?;
    Ok("starts and has the rows of the cluster".to_owned())
}

/// Lets the server on `restored` take WAL from the cluster.
fn recover_from(site: &Site, restored: &Path) -> Result<()> {
    let wal = site.data_dir().join("pg_wal");
    let setting = format!("restore_command = 'cp {}/%f %p'\n", wal.display());
    let path = restored.join("postgresql.auto.conf");
    let text = fs::read_to_string(&path).map_err(|e| cannot("read", &path, e))?;
    fs::write(&path, text + &setting).map_err(|e| cannot("write", &path, e))?;
    let signal = restored.join("recovery.signal");
    fs::write(&signal, "").map_err(|e| cannot("write", &signal, e))?;
    site.scratch().user().own(&signal)
}

fn files(site: &Site, restored: &Path) -> Result<String> {
    let mut diff = site.scratch().program("diff");
    succeed(diff.arg("-rq").arg(site.data_dir().join("base")).arg(restored.join("base")))?;
    for moved in site.tablespaces() {
        succeed(site.scratch().program("diff").arg("-rq").arg(moved.from).arg(moved.to))?;
    }
    Ok("has the files of the cluster".to_owned())
}
