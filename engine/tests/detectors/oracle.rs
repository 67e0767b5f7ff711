//! The log as the server's own programs read it, and as ours do, in the same words.
//!
//! There is no `pg_waldump` of 13 and 14 to be fetched; `PGSTRATA_PG_WALDUMP_13` and `_14` say where one is that was built.
//!
//! A record is its LSN and, for each block, what PostgreSQL says of it: `0/1500028: #0 1663/5/2619 main 3 hole 40+3000; #1 ...`.

use std::process::Command;

use pgstrata_engine::detect::WalFiles;
use pgstrata_engine::pg::{BlockReference, BlockSize, Lsn, RecordDecoder, WalSource};
use testdata::cluster::{Cluster, succeed};

/// As `pg_waldump` has it, or `pg_walinspect`; `None`, said aloud, where there is neither.
pub fn records(cluster: &Cluster, start: Lsn, end: Lsn) -> Option<Vec<String>> {
    let major = cluster.server().major;
    if let Some(built) = std::env::var_os(format!("PGSTRATA_PG_WALDUMP_{major}")) {
        Some(dumped(Command::new(built), cluster, start, end))
    } else if cluster.server().has("pg_waldump") {
        Some(dumped(cluster.tool("pg_waldump").unwrap(), cluster, start, end))
    } else if cluster.has_extension("pg_walinspect") {
        Some(inspected(cluster, start, end))
    } else {
        eprintln!("skipped: no pg_waldump and no pg_walinspect of PostgreSQL {major}");
        None
    }
}

fn dumped(mut dump: Command, cluster: &Cluster, start: Lsn, end: Lsn) -> Vec<String> {
    dump.arg("-b").arg("-p").arg(cluster.data_dir().join("pg_wal"));
    dump.args(["-s", &start.to_string(), "-e", &end.to_string()]);
    let text = String::from_utf8_lossy(&succeed(&mut dump).unwrap().stdout).into_owned();
    let mut records: Vec<String> = Vec::new();
    for line in text.lines() {
        match line.split_once(", lsn: ") {
            Some((_, rest)) => records.push(format!("{}:", lsn(rest.split(',').next().unwrap()))),
            None => records.last_mut().unwrap().push_str(&blocks(line)),
        }
    }
    records
}

fn inspected(cluster: &Cluster, start: Lsn, end: Lsn) -> Vec<String> {
    cluster.sql("postgres", "CREATE EXTENSION pg_walinspect").unwrap();
    let query = format!(
        "SELECT start_lsn, replace(coalesce(block_ref, ''), chr(10), ' ') FROM pg_get_wal_records_info('{start}', '{end}')"
    );
    let rows = cluster.query_strings("postgres", &query).unwrap().into_iter();
    rows.map(|row| format!("{}:{}", lsn(row[0].as_ref().unwrap()), blocks(row[1].as_ref().unwrap()))).collect()
}

fn lsn(text: &str) -> Lsn {
    text.trim().parse().unwrap()
}

/// The blocks that PostgreSQL's text names.
///
/// PostgreSQL: `src/backend/access/rmgrdesc/xlogdesc.c`, `XLogRecGetBlockRefInfo` (15+).
fn blocks(text: &str) -> String {
    let each = text.split("blkref #").skip(1).map(|block| {
        let (id, rest) = block.split_once(": rel ").unwrap();
        let words: Vec<&str> = rest.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
        let after = |name: &str| words.iter().position(|word| *word == name).map(|at| words[at + 1]);
        let hole = after("offset:").map(|offset| format!(" hole {offset}+{}", after("length:").unwrap()));
        // 13 and 14 know one method, and don't name it.
        let method = after("method:").or(after("saved:").map(|_| "pglz")).map(|method| format!(" {method}"));
        let fork = after("fork").unwrap_or("main");
        let (hole, method) = (hole.unwrap_or_default(), method.unwrap_or_default());
        format!(" #{id} {} {fork} {}{hole}{method};", words[0], after("blk").unwrap())
    });
    each.collect()
}

/// As our decoder has it.
pub fn decoded(files: &WalFiles, source: &WalSource, block_size: BlockSize, start: Lsn, end: Lsn) -> Vec<String> {
    let mut decoder = RecordDecoder::new(source.major, block_size);
    let mut records = Vec::new();
    let walked = files.walk(source.clone(), start, end, |record| {
        let decoded = decoder.decode(record)?;
        let blocks: String = decoded.blocks.iter().map(block).collect();
        records.push(format!("{}:{blocks}", record.lsn));
        Ok(())
    });
    walked.unwrap();
    records
}

fn block(reference: &BlockReference) -> String {
    let image = reference.image.map_or(String::new(), |image| {
        let method = image.compression.map_or(String::new(), |method| format!(" {method:?}").to_lowercase());
        format!(" hole {}+{}{method}", image.hole_offset, image.hole_len)
    });
    let BlockReference { id, locator, fork, block, .. } = reference;
    format!(" #{id} {locator} {fork} {block}{image};")
}
