//! The commands of `sparsectl`. Exit codes: 0 done, 1 failed, 2 wrong arguments.

mod bench;
mod client;
mod conform;
mod convert;
mod eval;
mod inspect;
mod local;
mod logits;
mod plugins;
mod private;
mod quantize;
mod repl;
mod run;
mod status;

use clap::{Parser, Subcommand};
use serde_json::Value;
use std::io::Write;
use std::process::ExitCode;

/// Work with sparsed and its models.
#[derive(Debug, Parser)]
#[command(name = "sparsectl", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Bench),
    Conform(conform::Conform),
    Convert(convert::Convert),
    Eval(Box<eval::Eval>),
    Inspect(inspect::Inspect),
    Logits(logits::Logits),
    Models(status::Models),
    Plugins(plugins::Plugins),
    Quantize(quantize::Quantize),
    Run(run::Run),
    Status(status::Status),
}

/// Parses the arguments, runs the command, reports a failure on standard error.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    crate::logging::start(log::LevelFilter::Warn);
    let outcome = match arguments.command {
        Command::Bench(command) => command.run(),
        Command::Conform(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Logits(command) => command.run(),
        Command::Models(command) => command.run(),
        Command::Plugins(command) => command.run(),
        Command::Quantize(command) => command.run(),
        Command::Run(command) => command.run(),
        Command::Status(command) => command.run(),
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

/// Writes a line to standard output.
fn print(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// A whole number as text, which a JSON value is not when it is padded; `-` where there is none.
fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), |n| n.to_string())
}
