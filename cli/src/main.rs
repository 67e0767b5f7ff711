//! The command line of pgstrata: arguments -> configuration -> one call of the engine -> report -> exit code.

mod args;
mod commands;
mod config;
mod demo;
mod exit_codes;
mod interrupt;
mod progress;
mod report;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (json, result) = commands::run(&config::Sources::of_this_process());
    let exit = result.unwrap_or_else(|failure| {
        report::print_failure(&failure, json);
        failure.exit()
    });
    exit.into()
}
