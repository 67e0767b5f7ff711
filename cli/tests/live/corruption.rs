//! A damaged page of the source: the backup is made, says so by its exit code, and names the page until it is gone.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use testdata::cluster::{ClusterOptions, StopMode};

use crate::support::{Lab, Run, for_majors, text};

for_majors!(a_corrupt_page_is_named_by_every_backup_that_holds_it: on_15 = 15, on_18 = 18);

const BLOCK: u32 = 7;
const PAGE_LEN: usize = 8192;

fn a_corrupt_page_is_named_by_every_backup_that_holds_it(lab: &Lab) {
    let mut source = lab.cluster(&ClusterOptions::default().conf("autovacuum = off"));
    let make = "CREATE TABLE healthy AS SELECT generate_series(1, 9000) AS i;
                CREATE TABLE damaged AS SELECT i, md5(i::text) FROM generate_series(1, 9000) i";
    source.sql("postgres", make).unwrap();
    assert_eq!(lab.backup(&source, &[])["corrupt_pages"], json!([]));

    let file = source.query_value("postgres", "SELECT pg_relation_filepath('damaged')").unwrap();
    source.stop(StopMode::Fast).unwrap();
    let bytes_at = u64::from(BLOCK) * PAGE_LEN as u64 + 5000;
    flip(&source.data_dir().join(&file), bytes_at, 16);
    source.start().unwrap();

    // What WAL does not name is not read by other detectors.
    let scan = ["--detect".into(), "scan".into()];
    let run = || -> Run { lab.pgstrata(lab.backup_args(&source).into_iter().chain(scan.clone())) };
    let first = run().json(3);
    assert_names_the_page(&first, &file);
    source.sql("postgres", "UPDATE healthy SET i = 0 WHERE i = 1").unwrap();
    let second = run().json(3);
    assert_names_the_page(&second, &file);
    let listed = lab.list();
    assert_eq!((listed.len(), &listed[0]["corrupt_pages"]), (3, &json!([])));
    assert_names_the_page(&listed[1], &file);
    assert_names_the_page(&listed[2], &file);

    // The damaged page is restored as it was, neither repaired nor left out.
    let target = lab.path("restored");
    lab.run_restore(text(&second, "id"), &target, &[]).json(3);
    assert_eq!(page(&target.join(&file)), page(&source.data_dir().join(&file)));

    source.sql("postgres", "TRUNCATE damaged").unwrap();
    assert_eq!(run().json(0)["corrupt_pages"], json!([]));
}

fn assert_names_the_page(report: &Value, file: &str) {
    let pages = report["corrupt_pages"].as_array().unwrap();
    assert_eq!(pages.len(), 1, "{report}");
    let page = &pages[0];
    assert_eq!((page["file"].as_str(), page["fork"].as_str()), (Some(file), Some("main")), "{page}");
    assert_eq!(page["block"], BLOCK);
    let number = file.rsplit('/').next().unwrap();
    let relation = page["relation"].to_string();
    assert!(relation.contains(number) || relation.contains("damaged"), "{page}");
    assert!(!text(page, "reason").is_empty());
}

fn flip(path: &Path, at: u64, len: usize) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    file.write_all_at(&bytes, at).unwrap();
}

fn page(path: &Path) -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    File::open(path).unwrap().read_exact_at(&mut page, u64::from(BLOCK) * PAGE_LEN as u64).unwrap();
    page
}
