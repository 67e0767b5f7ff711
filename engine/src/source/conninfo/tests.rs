use std::fs;

use proptest::prelude::*;

use super::*;

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment {
        variables: variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect(),
        home: None,
        os_user: Some("alice".to_owned()),
        socket_directories: vec!["/nowhere/run".into(), "/nowhere/tmp".into()],
        service_directories: Vec::new(),
    }
}

fn resolved(conninfo: &str) -> ConnectionParameters {
    resolve(Some(conninfo), None, &environment(&[])).unwrap()
}

fn error(conninfo: &str) -> String {
    resolve(Some(conninfo), None, &environment(&[])).unwrap_err().to_string()
}

fn endpoints(parameters: &ConnectionParameters) -> Vec<String> {
    parameters.endpoints.iter().map(ToString::to_string).collect()
}

fn password(parameters: &ConnectionParameters) -> Option<&str> {
    parameters.endpoints[0].password.as_ref().map(Secret::expose)
}

/// A home directory with this `.pgpass`.
fn home_with_password_file(text: &str, mode: u32) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(".pgpass");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    home
}

#[test]
fn nothing_given_means_the_users_name_the_database_postgres_and_the_customary_sockets() {
    let parameters = resolve(None, None, &environment(&[])).unwrap();
    assert_eq!((&*parameters.user, &*parameters.database), ("alice", "postgres"));
    let expected = ["socket /nowhere/run/.s.PGSQL.5432", "socket /nowhere/tmp/.s.PGSQL.5432"];
    assert_eq!(endpoints(&parameters), expected);
    assert_eq!(parameters.tls.mode, SslMode::Prefer);
    assert_eq!(parameters.application_name, "pgstrata");
}

#[test]
fn a_socket_that_exists_is_the_only_one_tried() {
    let run = tempfile::tempdir().unwrap();
    fs::write(run.path().join(".s.PGSQL.6000"), "").unwrap();
    let directories = vec!["/nowhere/run".into(), run.path().to_owned()];
    let environment = Environment { socket_directories: directories, ..environment(&[]) };
    let parameters = resolve(Some("port=6000"), None, &environment).unwrap();
    assert_eq!(endpoints(&parameters), [format!("socket {}/.s.PGSQL.6000", run.path().display())]);
}

#[test]
fn pairs_may_be_quoted_escaped_and_spaced() {
    let parameters = resolved(r"  host = db  user='o\'hara \\ x' password=a\ b dbname='' port=''");
    assert_eq!(parameters.user, r"o'hara \ x");
    assert_eq!(password(&parameters), Some("a b"));
    assert_eq!(parameters.database, "postgres");
    assert_eq!(endpoints(&parameters), ["host db port 5432"]);
}

#[test]
fn a_text_that_is_neither_pairs_nor_uri_is_a_database() {
    assert_eq!(resolved("sales").database, "sales");
    assert_eq!(resolved("").database, "postgres");
}

#[test]
fn a_uri_names_user_password_hosts_ports_database_and_parameters() {
    let uri = "postgresql://us%40er:p%3Aw@h1:1,[::1]:2,h3/my%20db?connect_timeout=3&ssl=true&options=-c%20x%3D1";
    let parameters = resolved(uri);
    assert_eq!((&*parameters.user, password(&parameters)), ("us@er", Some("p:w")));
    assert_eq!(endpoints(&parameters), ["host h1 port 1", "host ::1 port 2", "host h3 port 5432"]);
    assert_eq!(parameters.database, "my db");
    assert_eq!(parameters.connect_timeout, Some(Duration::from_secs(3)));
    assert_eq!(parameters.tls.mode, SslMode::Require);
    assert_eq!(parameters.options.as_deref(), Some("-c x=1"));
}

#[test]
fn a_uri_may_name_a_socket_directory_and_leave_anything_out() {
    assert_eq!(endpoints(&resolved("postgres://%2Frun%2Fpg/db")), ["socket /run/pg/.s.PGSQL.5432"]);
    assert_eq!(endpoints(&resolved("postgresql:///db?host=/run/pg&port=7")), ["socket /run/pg/.s.PGSQL.7"]);
    assert_eq!(endpoints(&resolved("postgresql://")).len(), 2);
    assert_eq!(resolved("postgresql://bob@").user, "bob");
    let parameters = resolve(Some("postgresql://h"), None, &environment(&[("PGDATABASE", "d")])).unwrap();
    assert_eq!(parameters.database, "d");
}

#[test]
fn a_malformed_text_is_an_error_that_quotes_no_value() {
    for (conninfo, expected) in [
        ("host=a user", "missing \"=\" after \"user\""),
        ("host=a pass word=x", "missing \"=\" after \"pass\""),
        ("password='se cret", "unterminated quoted string"),
        ("passwort=secret", "unknown connection parameter \"passwort\""),
        ("postgresql://h?secret", "not of the form key=value"),
        ("postgresql://h?a=b=secret", "not of the form key=value"),
        ("postgresql://%zz", "percent-encoded"),
        ("postgresql://%00", "percent-encoded"),
        ("postgresql://[]", "IPv6"),
        ("postgresql://[::1]x", "IPv6"),
        ("port=secret!", "invalid port number"),
        ("port=0", "invalid port number"),
        ("sslmode=secret", "none of: disable, allow"),
        ("connect_timeout=secret", "not an integer"),
        ("hostaddr=localhost", "hostaddr is not a numeric"),
        ("host=a,b port=1,2,3", "could not match 3 port numbers to 2 hosts"),
        ("host=a,b hostaddr=127.0.0.1", "could not match 2 host names to 1 hostaddr"),
        ("port=1,2", "could not match 2 port numbers to 1 hosts"),
    ] {
        let error = error(conninfo);
        assert!(error.contains(expected), "{conninfo}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn what_would_make_the_connection_safer_is_refused_rather_than_ignored() {
    for conninfo in
        ["sslcrl=x", "require_auth=scram-sha-256", "requirepeer=postgres", "gssencmode=require", "replication=true"]
    {
        let error = resolve(Some(conninfo), None, &environment(&[])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{conninfo}");
    }
    resolved("gssencmode=prefer replication=false sslcrl='' krbsrvname=x client_encoding=LATIN1");
}

#[test]
fn several_hosts_share_a_port_or_have_their_own() {
    assert_eq!(endpoints(&resolved("host=a,/b port=7")), ["host a port 7", "socket /b/.s.PGSQL.7"]);
    let parameters = resolved("host=a,b hostaddr=10.0.0.1,::1 port=1,");
    assert_eq!(endpoints(&parameters), ["host a (10.0.0.1) port 1", "host b (::1) port 5432"]);
    assert_eq!(endpoints(&resolved("hostaddr=10.0.0.1")), ["host 10.0.0.1 port 5432"]);
}

#[test]
fn the_conninfo_wins_over_the_service_and_the_service_over_the_environment() {
    let home = tempfile::tempdir().unwrap();
    let services = "# mine\n[x]\nhost=wrong\n\n[s]\nhost=service\nport=11\nuser=service\n[s]\nhost=second\n";
    fs::write(home.path().join(".pg_service.conf"), services).unwrap();
    let variables = [("PGSERVICE", "s"), ("PGUSER", "env"), ("PGHOST", "env"), ("PGDATABASE", "env")];
    let environment = Environment { home: Some(home.path().to_owned()), ..environment(&variables) };
    let parameters = resolve(Some("port=12"), None, &environment).unwrap();
    assert_eq!(endpoints(&parameters), ["host service port 12"]);
    assert_eq!((&*parameters.user, &*parameters.database), ("service", "env"));
}

#[test]
fn a_service_is_looked_for_in_the_users_file_and_then_in_the_systems() {
    let home = tempfile::tempdir().unwrap();
    let system = tempfile::tempdir().unwrap();
    fs::write(home.path().join(".pg_service.conf"), "[a]\nhost=user\n").unwrap();
    fs::write(system.path().join("pg_service.conf"), "[a]\nhost=system\n[b]\nhost=system\n").unwrap();
    let variables = [("PGSYSCONFDIR", system.path().to_str().unwrap())];
    let environment = Environment { home: Some(home.path().to_owned()), ..environment(&variables) };
    let of = |service| resolve(Some(service), None, &environment);
    assert_eq!(endpoints(&of("service=a").unwrap()), ["host user port 5432"]);
    assert_eq!(endpoints(&of("service=b").unwrap()), ["host system port 5432"]);
    assert!(of("service=c").unwrap_err().to_string().contains("\"c\" not found"));
}

#[test]
fn a_faulty_service_file_is_named_with_the_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("services");
    for text in ["[s]\nhost\n", "[s]\nnosuch=1\n", "[s]\nservice=t\n", "[s]\nldap://x\n"] {
        fs::write(&file, text).unwrap();
        let environment = environment(&[("PGSERVICEFILE", file.to_str().unwrap())]);
        let error = resolve(Some("service=s"), None, &environment).unwrap_err();
        assert!(error.place().unwrap().ends_with("services line 2"), "{error}");
    }
    fs::remove_file(&file).unwrap();
    let environment = environment(&[("PGSERVICEFILE", file.to_str().unwrap())]);
    assert_eq!(resolve(Some("service=s"), None, &environment).unwrap_err().kind(), ErrorKind::Missing);
}

#[test]
fn the_password_file_is_matched_by_host_port_database_and_user() {
    let text = "# comment\n\nh:5432:*:bob:no\nh:5432:postgres:alice:p\\:w\\\\d\n*:*:*:*:other\n";
    let home = home_with_password_file(text, 0o600);
    let environment = Environment { home: Some(home.path().to_owned()), ..environment(&[]) };
    let of = |conninfo| resolve(Some(conninfo), None, &environment).unwrap();
    assert_eq!(password(&of("host=h")), Some("p:w\\d"));
    assert_eq!(password(&of("host=h user=bob")), Some("no"));
    assert_eq!(password(&of("host=h port=1")), Some("other"));
    assert_eq!(password(&of("host=h password=explicit")), Some("explicit"));
    let parameters = of("host=h,i");
    assert_eq!(parameters.endpoints[1].password, Some(Secret("other".to_owned())));
}

#[test]
fn a_customary_socket_is_localhost_to_the_password_file_and_another_one_its_path() {
    let home = home_with_password_file("localhost:*:*:*:a\n/srv/pg:*:*:*:b\n", 0o600);
    let environment = Environment { home: Some(home.path().to_owned()), ..environment(&[]) };
    let of = |conninfo| resolve(Some(conninfo), None, &environment).unwrap();
    assert_eq!(password(&of("")), Some("a"));
    assert_eq!(password(&of("host=/nowhere/tmp")), Some("a"));
    assert_eq!(password(&of("host=/srv/pg")), Some("b"));
}

#[test]
fn a_password_file_that_others_can_read_is_not_used_and_that_is_said() {
    let home = home_with_password_file("*:*:*:*:secret\n", 0o640);
    let environment = Environment { home: Some(home.path().to_owned()), ..environment(&[]) };
    let parameters = resolve(Some("host=h"), None, &environment).unwrap();
    assert_eq!(password(&parameters), None);
    assert!(parameters.notices[0].contains("permissions should be 0600"), "{:?}", parameters.notices);
}

#[test]
fn an_unescaped_star_matches_everything_and_an_escaped_one_itself() {
    let hosts = ["h".to_owned()];
    let find = |text| find_password(text, &hosts, ["5432", "db", "*"]).map(|secret| secret.0);
    assert_eq!(find("h:*:*:\\*:x").as_deref(), Some("x"));
    assert_eq!(find("h:*:\\*:*:x"), None);
    assert_eq!(find("h:*:*:*"), None);
    assert_eq!(find("h:*:*:*:").as_deref(), Some(""));
    assert_eq!(find("h:5432:db:*:x:trailing").as_deref(), Some("x"));
}

#[test]
fn the_server_of_the_data_directory_is_used_unless_a_host_or_port_is_given() {
    let data = tempfile::tempdir().unwrap();
    let of = |conninfo: Option<&str>, text: &str| {
        fs::write(data.path().join("postmaster.pid"), text).unwrap();
        endpoints(&resolve(conninfo, Some(data.path()), &environment(&[])).unwrap())
    };
    let running = "1\n/d\n2\n6543\n/sock\n*\n";
    assert_eq!(of(None, running), ["socket /sock/.s.PGSQL.6543"]);
    assert_eq!(of(Some("user=x"), running), ["socket /sock/.s.PGSQL.6543"]);
    assert_eq!(of(Some("host=h"), running), ["host h port 5432"]);
    assert_eq!(of(Some("port=1"), running).len(), 2);
    assert_eq!(of(None, "1\n/d\n2\n6543\n\n*\n"), ["host localhost port 6543"]);
    assert_eq!(of(None, "1\n/d\n2\n6543\n\n10.1.1.1\n"), ["host 10.1.1.1 port 6543"]);
    assert_eq!(of(None, "1\n").len(), 2);
}

#[test]
fn the_system_root_certificates_demand_full_verification() {
    assert_eq!(resolved("sslrootcert=system").tls.mode, SslMode::VerifyFull);
    assert!(error("sslrootcert=system sslmode=require").contains("weak sslmode"));
    assert!(error("sslnegotiation=direct").contains("weak sslmode"));
}

#[test]
fn no_password_is_printed() {
    let variables = [("PGPASSWORD", "topsecret")];
    let environment = environment(&variables);
    let parameters = resolve(None, None, &environment).unwrap();
    assert_eq!(password(&parameters), Some("topsecret"));
    assert!(!format!("{parameters:?} {environment:?}").contains("topsecret"));
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in ".*") {
        let _ = resolve(Some(&text), None, &environment(&[]));
        let _ = resolve(Some(&format!("postgresql://{text}")), None, &environment(&[]));
        let _ = find_password(&text, &["h".to_owned()], ["1", "d", "u"]);
    }

    #[test]
    fn a_quoted_value_reads_back_as_it_was(value in ".+") {
        let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
        let parameters = resolved(&format!("user='{quoted}' host=h"));
        prop_assert_eq!(parameters.user, value);
    }
}
