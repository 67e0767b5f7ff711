//! What a role without superuser must be granted, and which of it is missing.
//!
//! All that is missing is said at once, as statements that a superuser can paste: asking for it grant by grant
//! would take three failed runs.

use tokio_postgres::Client;

use super::server::{RawText, column};
use crate::pg::MajorVersion;

/// The statements that grant what this session's role misses; `None` if nothing is, or it cannot be found out.
pub(super) async fn hint(client: &Client, major: MajorVersion) -> Option<String> {
    let [start, stop] = backup_functions(major);
    let statement = "SELECT CURRENT_USER::pg_catalog.text, pg_catalog.current_database()::pg_catalog.text, \
         pg_catalog.pg_has_role('pg_read_all_settings', 'USAGE'), \
         (SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = CURRENT_USER), \
         pg_catalog.has_function_privilege($1::pg_catalog.text, 'EXECUTE'), \
         pg_catalog.has_function_privilege($2::pg_catalog.text, 'EXECUTE')";
    let row = client.query_one(statement, &[&start, &stop]).await.ok()?;
    let name = |index| column::<RawText>(&row, index).ok().map(|name| quote_identifier(&name.to_text()));
    let (role, database) = (name(0)?, name(1)?);
    let has = |index| column::<bool>(&row, index).ok();
    let mut grants = Vec::new();
    if !has(2)? {
        grants.push(format!("GRANT pg_read_all_settings TO {role}"));
    }
    if !has(3)? {
        grants.push(format!("ALTER ROLE {role} REPLICATION"));
    }
    if !(has(4)? && has(5)?) {
        grants.push(format!("GRANT EXECUTE ON FUNCTION {start}, {stop} TO {role}"));
    }
    let statements = grants.join("; ");
    (!grants.is_empty()).then(|| format!("as a superuser, in the database {database}: {statements}"))
}

/// The functions as GRANT names them.
fn backup_functions(major: MajorVersion) -> [&'static str; 2] {
    if major.as_u32() >= 15 {
        ["pg_catalog.pg_backup_start(text, boolean)", "pg_catalog.pg_backup_stop(boolean)"]
    } else {
        ["pg_catalog.pg_start_backup(text, boolean, boolean)", "pg_catalog.pg_stop_backup(boolean, boolean)"]
    }
}

fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roles_name_is_quoted_in_the_statement_that_helps() {
        assert_eq!(quote_identifier("odd\"name"), "\"odd\"\"name\"");
    }
}
