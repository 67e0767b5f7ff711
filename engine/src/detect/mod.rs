//! Which blocks may have changed since the parent; never too few.
//!
//! A detector is a prefilter: it tells which blocks to read. Whether a block changed is told by its fingerprint alone. So a detector that
//! names too many costs time, and one that names too few loses data. The scan names all; it is always possible, and what every other detector
//! will be measured against. In doubt it is the scan.
//!
//! What the log and the server's summaries of it say is gathered in a [`ChangeMap`], which has the rule for what must be read, in one place for
//! both. [`WalFiles`] finds the log's segments, in `pg_wal` or an archive, and [`WalChanges`] gathers their records; [`Summaries`] reads
//! what PostgreSQL 17 and later wrote about them. What each of them covers is a [`Coverage`], and it is asked before anything is trusted. No
//! backup uses them yet.
//!
//! What goes wrong: a detector is asked for that cannot cover the range from the parent's start to this start. Then
//! [`choose`] refuses, instead of taking something else silently.

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
pub use segments::WalFiles;
pub use summary::Summaries;
pub use wal::WalChanges;

use crate::error::{Error, ErrorKind, Result};

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

/// A detector of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detector {
    /// Every page of every file is read.
    Scan,
}

impl fmt::Display for Detector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Detector::Scan => f.write_str("scan"),
        }
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

/// Chooses the detector for an incremental backup.
///
/// # Errors
/// `Unsupported` for a detector that this version does not have.
pub fn choose(choice: DetectorChoice, audit: bool) -> Result<Detection> {
    let reason = match choice {
        DetectorChoice::Wal | DetectorChoice::Summary => {
            let what = "this version finds changes by reading every page only";
            return Err(Error::new(ErrorKind::Unsupported, what).hint("use --detect scan or auto"));
        }
        _ if audit => "an audit reads every page",
        DetectorChoice::Scan => "a scan was asked for",
        DetectorChoice::Auto => "every page is read and compared",
    };
    Ok(Detection { detector: Detector::Scan, reason: reason.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detector_that_there_is_not_is_refused_not_replaced() {
        for choice in ["wal", "summary"] {
            let error = choose(choice.parse().unwrap(), false).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
        assert_eq!(choose(DetectorChoice::Auto, false).unwrap().detector, Detector::Scan);
        assert!("guess".parse::<DetectorChoice>().is_err());
    }
}
