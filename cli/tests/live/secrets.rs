//! A password opens the server's door, by whatever way it is given, and is seen nowhere else: not in what is printed, not in the repository.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use engine::repo::{ClusterName, Repository};
use testdata::cluster::ClusterOptions;

use crate::support::{Lab, Run, for_majors};

for_majors!(a_password_is_seen_by_the_server_alone: secrets_on_18 = 18);

const SECRET: &str = "s3cr3t-of-mine";
const WRONG: &str = "wr0ng-of-mine";

/// Where a password can stand: the words of the command line, and the environment.
type Way = (Vec<String>, Vec<(&'static str, String)>);

/// A file that only the servers' user may read.
fn private(lab: &Lab, name: &str, text: &str) -> String {
    let path = lab.path(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    lab.user.own(&path).unwrap();
    path.display().to_string()
}

/// Every way of giving a password.
fn ways(lab: &Lab, conninfo: &str, password: &str) -> Vec<Way> {
    let services = conninfo.replace(' ', "\n");
    let services = private(lab, &format!("services-{password}"), &format!("[mine]\n{services}\npassword={password}\n"));
    let passwords = private(lab, &format!("pgpass-{password}"), &format!("*:*:*:keeper:{password}\n"));
    let given = |conninfo: String| vec!["-d".to_owned(), conninfo];
    vec![
        (given(format!("{conninfo} password={password}")), vec![]),
        (given(conninfo.to_owned()), vec![("PGPASSWORD", password.to_owned())]),
        (given(conninfo.to_owned()), vec![("PGPASSFILE", passwords)]),
        (given("service=mine".to_owned()), vec![("PGSERVICEFILE", services)]),
    ]
}

fn assert_silent(run: &Run, secret: &str) {
    assert!(
        !run.stdout.contains(secret) && !run.stderr.contains(secret),
        "a password was told: {} {}",
        run.stdout,
        run.stderr
    );
}

fn a_password_is_seen_by_the_server_alone(lab: &Lab) {
    let source = lab.cluster(&ClusterOptions::default());
    source.sql("postgres", &format!("CREATE ROLE keeper SUPERUSER LOGIN PASSWORD '{SECRET}'")).unwrap();
    let hba = source.data_dir().join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("local all keeper scram-sha-256\n{rules}")).unwrap();
    source.sql("postgres", "SELECT pg_reload_conf()").unwrap();
    let conninfo = source.conninfo().replace("user=postgres", "user=keeper");
    let back_up = |(words, environment): &Way, json: bool| {
        let mut args: Vec<OsString> = ["backup", "--init", "--repo"].map(OsString::from).into();
        args.extend([lab.repo().into(), "-D".into(), source.data_dir().into()]);
        args.extend(json.then(|| "--json".into()));
        args.extend(words.iter().map(OsString::from));
        lab.pgstrata_in(args, environment)
    };
    for way in ways(lab, &conninfo, WRONG) {
        let run = back_up(&way, true);
        run.refuses(1, &["password"]);
        assert_silent(&run, WRONG);
    }
    for (number, way) in ways(lab, &conninfo, SECRET).iter().enumerate() {
        let run = back_up(way, number % 2 == 0);
        run.expect(0);
        assert_silent(&run, SECRET);
    }
    let repo = Repository::open(&lab.repo()).unwrap();
    let catalog = repo.catalog(&ClusterName::default()).unwrap();
    assert_eq!(catalog.backups().len(), 4);
    for backup in catalog.backups() {
        let manifest = format!("{:?}", repo.manifest(&ClusterName::default(), backup.id).unwrap());
        assert!(!manifest.contains(SECRET) && !manifest.contains("keeper"), "{manifest}");
    }
}
