//! The commands of `sparsectl`. Exit codes: 0 done, 1 failed, 2 wrong arguments.

mod convert;
mod local;
mod logits;
mod run;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Work with sparsed models.
#[derive(Debug, Parser)]
#[command(name = "sparsectl", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Convert(convert::Convert),
    Logits(logits::Logits),
    Run(run::Run),
}

/// Parses the arguments, runs the command, reports a failure on standard error.
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("SPARSED_LOG", "warn")).init();
    let outcome = match Arguments::parse().command {
        Command::Convert(command) => command.run(),
        Command::Logits(command) => command.run(),
        Command::Run(command) => command.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "a command-line tool speaks on standard error")]
fn report(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
