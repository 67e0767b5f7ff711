//! Which blocks may have changed since the parent; never too few.
//!
//! A detector is a prefilter: it tells which blocks to read. Whether a block changed is told by its fingerprint alone. So a detector that
//! names too many costs time, and one that names too few loses data. The scan names all; it is always possible, and what every other detector
//! will be measured against. In doubt it is the scan.
//!
//! What the log and the server's summaries of it say is gathered in a [`ChangeMap`], which has the rule for what must be read, in one place for
//! both. [`WalFiles`] finds the log's segments, in `pg_wal` or an archive, and [`WalChanges`] gathers their records; [`Summaries`] reads
//! what PostgreSQL 17 and later wrote about them. What each of them covers is a [`Coverage`], and it is asked before anything is trusted.
//! Which detector a backup takes, and when none is trusted, stands in `backup/changes.rs`.

mod change_map;
mod coverage;
mod segments;
mod summary;
mod wal;

use std::fmt;
use std::str::FromStr;

pub(crate) use change_map::sealed_changes;
pub use change_map::{BlockRun, ChangeMap, FileLength};
pub use coverage::{Coverage, CoverageCheck};
pub use segments::{HeldSegments, WalFiles};
pub use summary::Summaries;
pub use wal::WalChanges;

use crate::error::{Error, Result};

/// Which detector the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectorChoice {
    /// The cheapest that is provably complete.
    #[default]
    Auto,
    /// Reading everything.
    Scan,
    /// WAL records.
    Wal,
    /// WAL summaries.
    Summary,
}

impl FromStr for DetectorChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "scan" => Ok(Self::Scan),
            "wal" => Ok(Self::Wal),
            "summary" => Ok(Self::Summary),
            _ => Err(Error::invalid(format!("{text:?} is not a detector")).hint("use auto, scan, wal or summary")),
        }
    }
}

/// A detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detector {
    /// Every page of every file is read.
    Scan,
    /// Blocks that WAL records name are read.
    Wal,
    /// Blocks that the server's WAL summaries name are read.
    Summary,
}

impl fmt::Display for Detector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Detector::Scan => "scan",
            Detector::Wal => "wal",
            Detector::Summary => "summary",
        })
    }
}

/// The detector that a backup uses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detection {
    /// The detector.
    pub detector: Detector,
    /// Why that one, for people.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detectors_are_spelled_as_documented() {
        for (text, choice) in [
            ("auto", DetectorChoice::Auto),
            ("scan", DetectorChoice::Scan),
            ("wal", DetectorChoice::Wal),
            ("summary", DetectorChoice::Summary),
        ] {
            assert_eq!(text.parse::<DetectorChoice>().unwrap(), choice);
        }
        assert!("guess".parse::<DetectorChoice>().is_err());
    }
}
