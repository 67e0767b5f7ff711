//! Tables that are like those of people: text of words, documents, uuids, times, numbers, long texts that are toasted.
//!
//! pgbench's rows are mostly filler that compresses to nothing. These do not: words follow Zipf's law, as those of a language do;
//! uuids are random; times and amounts differ in their last digits. Rows are generated here and copied in by as many sessions as
//! there are processors.
//!
//! | table | rows for each unit of scale | what is in it |
//! |---|---|---|
//! | `article` | 6000 | uuid, title, text of 30 to 150 words, tags as jsonb, time, price; indexes on uuid, time and price |
//! | `event` | 20,000 | time, kind, payload as jsonb, amount, uuid of an actor; indexes on time and actor |
//! | `report` | 250 | a text of 1500 to 3000 words, toasted |

use std::fmt::Write as _;
use std::io::Write as _;

use testdata::random::Random;
use testdata::{Error, Result};

use crate::stage::Stage;

/// Words that there are.
const WORDS: u64 = 20_000;
/// Rows that are sent at once.
const ROWS_OF_PIECE: u64 = 500;

/// A table of this cluster.
#[derive(Clone, Copy, Debug)]
struct Sort {
    name: &'static str,
    rows_of_scale: u64,
    row: fn(u64, &mut Random, &mut String),
}

const SORTS: [Sort; 3] = [
    Sort { name: "article", rows_of_scale: 6000, row: article },
    Sort { name: "event", rows_of_scale: 20_000, row: event },
    Sort { name: "report", rows_of_scale: 250, row: report },
];

const TABLES: &str = "
    CREATE TABLE article (id bigint NOT NULL, key uuid NOT NULL, title text, body text, tags jsonb,
                          created timestamptz, price numeric, views int);
    CREATE TABLE event (id bigint NOT NULL, at timestamptz, kind text, payload jsonb, amount numeric, actor uuid, views int);
    CREATE TABLE report (id bigint NOT NULL, written timestamptz, body text, views int)";
const INDEXES: [&str; 8] = [
    "ALTER TABLE article ADD PRIMARY KEY (id)",
    "ALTER TABLE event ADD PRIMARY KEY (id)",
    "ALTER TABLE report ADD PRIMARY KEY (id)",
    "CREATE UNIQUE INDEX ON article (key)",
    "CREATE INDEX ON article (created)",
    "CREATE INDEX ON article (price)",
    "CREATE INDEX ON event (at)",
    "CREATE INDEX ON event (actor)",
];

/// Fills the tables for a scale.
///
/// # Errors
/// PostgreSQL's.
pub fn load(stage: &Stage, scale: u32) -> Result<()> {
    stage.cluster().sql("postgres", TABLES)?;
    for sort in SORTS {
        let rows = sort.rows_of_scale * u64::from(scale);
        let sessions = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        std::thread::scope(|scope| {
            let copies: Vec<_> = (0..sessions)
                .map(|at| (rows * at / sessions + 1, rows * (at + 1) / sessions))
                .map(|(first, last)| scope.spawn(move || copy(stage, sort, first, last)))
                .collect();
            copies.into_iter().try_for_each(|copy| copy.join().unwrap_or_else(|_| Err(Error::new("a loader panicked"))))
        })?;
    }
    stage.cluster().sql_each("postgres", &INDEXES)
}

fn copy(stage: &Stage, sort: Sort, first: u64, last: u64) -> Result<()> {
    let mut client = stage.cluster().connect("postgres")?;
    let mut writer = client.copy_in(&format!("COPY {} FROM STDIN", sort.name))?;
    let mut random = Random::new(first);
    let mut from = first;
    while from <= last {
        let to = last.min(from + ROWS_OF_PIECE - 1);
        let mut rows = String::new();
        (from..=to).for_each(|id| (sort.row)(id, &mut random, &mut rows));
        writer.write_all(rows.as_bytes()).map_err(|e| Error::new(format!("cannot fill {}: {e}", sort.name)))?;
        from = to + 1;
    }
    writer.finish()?;
    Ok(())
}

fn article(id: u64, random: &mut Random, row: &mut String) {
    let _ = write!(row, "{id}\t{}\t", uuid(random));
    words(random, 3, 9, row);
    row.push('\t');
    words(random, 30, 150, row);
    let _ = write!(row, "\t{{\"lang\": \"{}\", \"tags\": [\"", ["en", "de", "fr", "es"][random.below(4) as usize]);
    words(random, 1, 2, row);
    let _ = write!(row, "\", \"{}\"], \"rank\": {}}}\t", word(random), random.below(1_000_000));
    let _ = writeln!(row, "{}\t{}.{:02}\t0", time(random), random.below(5000), random.below(100));
}

fn event(id: u64, random: &mut Random, row: &mut String) {
    let kind = ["view", "click", "order", "refund", "login", "search"][random.below(6) as usize];
    let _ = write!(row, "{id}\t{}\t{kind}\t{{\"session\": \"{:016x}\", \"path\": \"/", time(random), random.number());
    words(random, 1, 2, row);
    let _ = write!(row, "\", \"ms\": {}, \"ok\": {}}}\t", random.below(4000), random.below(10) > 0);
    let _ = writeln!(row, "{}.{:04}\t{}\t0", random.below(900), random.below(10_000), uuid(random));
}

fn report(id: u64, random: &mut Random, row: &mut String) {
    let _ = write!(row, "{id}\t{}\t", time(random));
    words(random, 1500, 3000, row);
    row.push_str("\t0\n");
}

fn words(random: &mut Random, least: u64, most: u64, row: &mut String) {
    let count = least + random.below(most - least + 1);
    for at in 0..count {
        row.push_str(if at == 0 { "" } else { " " });
        row.push_str(&word(random));
    }
}

/// A word that its rank determines; low ranks are frequent, and short.
fn word(random: &mut Random) -> String {
    let uniform = (random.number() >> 11) as f64 / (1_u64 << 53) as f64;
    let rank = ((WORDS as f64).ln() * uniform).exp() as u64;
    let mut letters = Random::new(rank);
    let syllables = 1 + u64::from(rank > 40) + letters.below(1 + u64::from(rank > 400) + u64::from(rank > 4000));
    let syllable = |_| {
        let (consonant, vowel) = (letters.below(20) as usize, letters.below(5) as usize);
        [&"bcdfghjklmnpqrstvwxz"[consonant..=consonant], &"aeiou"[vowel..=vowel]].concat()
    };
    (0..syllables).map(syllable).collect()
}

fn uuid(random: &mut Random) -> String {
    let (high, low) = (random.number(), random.number());
    format!(
        "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
        high >> 32,
        high & 0xFFFF,
        high >> 16 & 0xFFF,
        low >> 52,
        low & 0xFFFF_FFFF_FFFF
    )
}

/// A time of the year 2026, to the microsecond.
fn time(random: &mut Random) -> String {
    let (month, day) = (1 + random.below(12), 1 + random.below(28));
    let (hour, minute, second) = (random.below(24), random.below(60), random.below(60));
    format!("2026-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:06}+00", random.below(1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_the_columns_of_its_table() {
        let mut random = Random::new(1);
        for (sort, columns) in SORTS.iter().zip([8, 7, 4]) {
            let mut rows = String::new();
            (1..=20).for_each(|id| (sort.row)(id, &mut random, &mut rows));
            assert_eq!(rows.lines().count(), 20);
            for row in rows.lines() {
                assert_eq!(row.split('\t').count(), columns, "{row}");
            }
        }
    }

    #[test]
    fn words_are_as_skewed_as_those_of_a_language() {
        let mut random = Random::new(1);
        let mut counts = std::collections::BTreeMap::new();
        (0..10_000).for_each(|_| *counts.entry(word(&mut random)).or_insert(0) += 1);
        let most = counts.values().max().copied().unwrap_or(0);
        assert!(counts.len() > 1000 && most > 200, "{} words, the most frequent {most} times", counts.len());
    }
}
