//! Commands that are killed or run beside each other; `bench torture` does the same for hundreds of rounds.

use testdata::torture::{self, Options};

use crate::support::{Lab, for_majors, reachable_binary};

for_majors!(nothing_is_lost_whoever_is_killed: killed_on_15 = 15, killed_on_18 = 18);

const ROUNDS: u32 = 14;

fn nothing_is_lost_whoever_is_killed(lab: &Lab) {
    let seed = lab.server.major.into();
    let binary = reachable_binary(&lab.user);
    let options = Options { binary, server: &lab.server, tools: &lab.tools, rounds: ROUNDS, seed };
    let report = torture::run(&options, &|round| eprintln!("{round}")).unwrap();
    assert!(report.killed > 0 && report.crowded > 0 && report.restored > 0, "{report:?}");
}
