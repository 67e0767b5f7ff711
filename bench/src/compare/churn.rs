//! What happens to a cluster between two backups, and how much of it.
//!
//! | model | of a server | of a synthetic cluster |
//! |---|---|---|
//! | `uniform` | updates of rows that lie equally far apart, in every table | single blocks anywhere |
//! | `zipf` | updates of rows by a skewed law: the same few each time, and a long tail of others | the same of blocks |
//! | `append` | new rows | new blocks at the end of the largest relation |
//! | `hot` | every row of one small table, then a vacuum of it | blocks of the largest relation only |
//! | `vacuum` | scattered rows are deleted, then the table is vacuumed | runs of 32 neighbouring blocks |
//!
//! A vacuum also cleans up after the models before it, so it is best asked for alone.
//!
//! The share that is asked for is of the cluster's blocks. One updated row dirties its page, the page that its new version goes to,
//! and a leaf of each index: [`rows_for`] finds how many rows that makes. It is an estimate; how many blocks really differed is what
//! the backups say, and the report prints it.

use std::collections::BTreeSet;

use clap::ValueEnum;
use testdata::random::Random;

/// How a cluster changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Churn {
    /// Rows or blocks that are spread evenly.
    Uniform,
    /// A few again and again, and a long tail.
    Zipf,
    /// Growth at the end.
    Append,
    /// One table.
    Hot,
    /// Deletions and a vacuum.
    Vacuum,
}

/// Neighbours that a vacuum of a synthetic cluster rewrites.
const VACUUM_RUN: u64 = 32;
/// A prime above all numbers of rows and blocks here: ranks are scattered by it.
const SCATTER: u64 = 4_294_967_291;
/// Draws for each number that is wanted, after which a skewed choice is filled up evenly.
const MAX_DRAWS: u64 = 64;

impl Churn {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Append => "append",
            Self::Hot => "hot",
            Self::Vacuum => "vacuum",
        }
    }
}

/// Chooses `count` of the numbers below `total`, ascending; `turn` makes the choice another one each time.
///
/// An appending model has nothing to choose; for a hot one `total` is the hot part.
pub fn choose(churn: Churn, total: u64, count: u64, turn: u64) -> Vec<u64> {
    let count = count.min(total);
    match churn {
        Churn::Append => Vec::new(),
        Churn::Uniform | Churn::Hot => evenly(total, count, turn),
        Churn::Zipf => skewed(total, count, turn),
        Churn::Vacuum => {
            let runs = evenly(total.div_ceil(VACUUM_RUN), count.div_ceil(VACUUM_RUN), turn);
            let of = |run| (run * VACUUM_RUN..(run + 1) * VACUUM_RUN).take_while(|number| *number < total);
            runs.into_iter().flat_map(of).take(usize::try_from(count).unwrap_or(usize::MAX)).collect()
        }
    }
}

fn evenly(total: u64, count: u64, turn: u64) -> Vec<u64> {
    let wide = |number: u64| u128::from(number) * u128::from(total) / u128::from(count.max(1));
    let stride = total / count.max(1);
    // Golden steps: other numbers each time, without a seam between the first times.
    let shift = if stride > 1 { turn.wrapping_mul(0x9E37_79B9_7F4A_7C15) % stride } else { 0 };
    (0..count).filter_map(|number| u64::try_from(wide(number)).ok()).map(|number| number + shift).collect()
}

/// Ranks by Zipf's law with exponent 1, by its continuous inverse, each at a place of its own that stays its own.
fn skewed(total: u64, count: u64, turn: u64) -> Vec<u64> {
    let mut random = Random::new(turn);
    let mut chosen = BTreeSet::new();
    let mut draws = 0;
    while (chosen.len() as u64) < count && draws < count * MAX_DRAWS {
        draws += 1;
        let uniform = (random.number() >> 11) as f64 / (1_u64 << 53) as f64;
        let rank = ((total as f64).ln() * uniform).exp() as u64 % total;
        chosen.insert(scattered(rank, total));
    }
    let missing = usize::try_from(count).unwrap_or(usize::MAX) - chosen.len();
    let rest: Vec<u64> =
        evenly(total, count, turn).into_iter().filter(|at| !chosen.contains(at)).take(missing).collect();
    chosen.extend(rest);
    chosen.into_iter().collect()
}

fn scattered(rank: u64, total: u64) -> u64 {
    u64::try_from(u128::from(rank) * u128::from(SCATTER) % u128::from(total)).unwrap_or_default()
}

/// A table as far as changes to it matter, in blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Its rows.
    pub rows: u64,
    /// The blocks of its heap.
    pub heap: u64,
    /// The blocks of each of its indexes, the primary key's first.
    pub indexes: Vec<u64>,
    /// Its blocks with indexes and toast.
    pub total: u64,
}

/// How many rows, equally far apart, must be updated so that about `blocks` blocks differ.
pub fn rows_for(table: &Table, blocks: u64) -> u64 {
    let per_page = (table.rows / table.heap.max(1)).max(1);
    fewest(table.rows, blocks, |rows| {
        let leaves: u64 = table.indexes.iter().map(|index| rows.min(*index)).sum();
        rows.min(table.heap) + leaves + rows / per_page
    })
}

/// How many rows must be added so that about `blocks` blocks differ: the primary key grows at its end, other indexes anywhere.
pub fn new_rows_for(table: &Table, blocks: u64) -> u64 {
    let others: u64 = table.indexes.iter().skip(1).sum();
    let growing = table.total.saturating_sub(others);
    fewest(table.rows, blocks, |rows| {
        let leaves: u64 = table.indexes.iter().skip(1).map(|index| rows.min(*index)).sum();
        leaves + rows * growing / table.rows.max(1)
    })
}

/// The fewest of up to `most` rows that dirty as many blocks.
fn fewest(most: u64, blocks: u64, dirtied: impl Fn(u64) -> u64) -> u64 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low) / 2;
        if dirtied(middle) < blocks { low = middle + 1 } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_chooses_as_many_as_it_is_asked_for_and_none_twice() {
        for churn in [Churn::Uniform, Churn::Zipf, Churn::Hot, Churn::Vacuum] {
            for (total, count) in [(1000, 0), (1000, 1), (1000, 100), (1000, 1000), (100_003, 10_000), (7, 9)] {
                let chosen = choose(churn, total, count, 5);
                assert_eq!(chosen.len() as u64, count.min(total), "{churn:?} of {total}");
                assert!(chosen.windows(2).all(|two| two[0] < two[1]), "{churn:?} of {total}");
                assert!(chosen.last().is_none_or(|last| *last < total), "{churn:?} of {total}");
            }
        }
        assert!(choose(Churn::Append, 1000, 10, 5).is_empty());
    }

    #[test]
    fn uniform_choices_lie_equally_far_apart_and_elsewhere_each_time() {
        let (first, second) = (choose(Churn::Uniform, 100_000, 100, 1), choose(Churn::Uniform, 100_000, 100, 2));
        assert!(first.windows(2).all(|two| two[1] - two[0] == 1000));
        assert_ne!(first, second);
    }

    #[test]
    fn skewed_choices_repeat_themselves_and_uniform_ones_do_not() {
        let again = |churn| {
            let first: BTreeSet<u64> = choose(churn, 1_000_000, 1000, 1).into_iter().collect();
            choose(churn, 1_000_000, 1000, 2).iter().filter(|at| first.contains(at)).count()
        };
        assert!(again(Churn::Zipf) > 100, "{}", again(Churn::Zipf));
        assert_eq!(again(Churn::Uniform), 0);
    }

    #[test]
    fn a_vacuum_takes_neighbours() {
        let chosen = choose(Churn::Vacuum, 100_000, 3200, 3);
        let borders = chosen.windows(2).filter(|two| two[1] != two[0] + 1).count();
        assert!(borders < 100, "{borders}");
    }

    #[test]
    fn an_updated_row_dirties_its_page_and_a_leaf_of_each_index() {
        let table = Table { rows: 610_000, heap: 10_000, indexes: vec![1700], total: 11_700 };
        assert_eq!(rows_for(&table, 0), 0);
        assert!((495..=505).contains(&rows_for(&table, 1000)), "{}", rows_for(&table, 1000));
        // There are no more leaves to dirty than there are.
        assert!((3200..=3300).contains(&rows_for(&table, 5000)), "{}", rows_for(&table, 5000));
        assert_eq!(rows_for(&table, 1_000_000), 610_000);
    }

    #[test]
    fn new_rows_make_a_table_grow_and_dirty_leaves_of_unordered_indexes() {
        let ordered = Table { rows: 10_000, heap: 900, indexes: vec![100], total: 1000 };
        assert_eq!(new_rows_for(&ordered, 100), 1000);
        let unordered = Table { indexes: vec![100, 50], total: 1050, ..ordered };
        assert_eq!(new_rows_for(&unordered, 50), 46);
        assert_eq!(new_rows_for(&unordered, 150), 1000);
    }
}
