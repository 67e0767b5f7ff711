//! pgstrata killed and crowded for hundreds of rounds, with a live server under load (`testdata::torture`).

use std::fs;
use std::sync::Arc;

use testdata::os_user::ServerUser;
use testdata::servers::{Cache, Installation};
use testdata::torture::{self, Options};
use testdata::{Error, Result};

use crate::TortureArgs;
use crate::scratch::{build_pgstrata, say};

/// Runs the rounds and prints what they came to.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn run(args: &TortureArgs) -> Result<()> {
    let built = build_pgstrata()?;
    let user = ServerUser::get()?;
    let scratch = user.scratch()?;
    let binary = scratch.path().join("pgstrata");
    fs::copy(&built, &binary).map_err(|e| crate::cannot("copy", &built, e))?;
    let cache = Cache::for_tests()?;
    let (server, tools): (Arc<Installation>, Arc<Installation>) = Installation::with_tools(args.major, &cache)
        .map_err(|reason| Error::new(format!("no PostgreSQL {}: {reason}", args.major)))?;
    let options = Options { binary: &binary, server: &server, tools: &tools, rounds: args.rounds, seed: args.seed };
    let report = torture::run(&options, &say)?;
    println!("{} rounds with seed {} on PostgreSQL {}: {report:?}", args.rounds, args.seed, server.version);
    Ok(())
}
