//! The commands of `sparsectl`. Exit codes: 0 done, 1 failed, 2 wrong arguments.

mod bench;
mod bundle;
mod bus;
mod client;
mod complete;
mod config;
mod conform;
mod convert;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod local;
mod logits;
mod model;
mod mqtt;
mod off_bus;
mod plugins;
mod private;
mod quantize;
mod repl;
mod run;
mod sessions;
mod status;
mod system;
mod top;

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
    Complete(complete::Complete),
    Config(config::ConfigCommand),
    Conform(conform::Conform),
    Convert(convert::Convert),
    Doctor(doctor::Doctor),
    Eval(Box<eval::Eval>),
    Generate(generate::Generate),
    Inspect(inspect::Inspect),
    Logits(logits::Logits),
    Model(model::Model),
    Models(status::Models),
    Mqtt(mqtt::Mqtt),
    Plugins(plugins::Plugins),
    Quantize(quantize::Quantize),
    #[command(visible_alias = "chat")]
    Run(run::Run),
    Sessions(sessions::SessionsCommand),
    Status(status::Status),
    SupportBundle(bundle::SupportBundle),
    Top(top::Top),
}

/// Parses the arguments, runs the command, reports a failure on standard error.
pub fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    let parsed = Arguments::try_parse().map_err(|error| off_bus::explained(error, command.as_deref()));
    let arguments = parsed.unwrap_or_else(|error| error.exit());
    crate::logging::start(log::LevelFilter::Warn);
    let outcome = match arguments.command {
        Command::Bench(command) => command.run(),
        Command::Complete(command) => command.run(),
        Command::Config(command) => command.run(),
        Command::Conform(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Doctor(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Logits(command) => command.run(),
        Command::Model(command) => command.run(),
        Command::Models(command) => command.run(),
        Command::Mqtt(command) => command.run(),
        Command::Plugins(command) => command.run(),
        Command::Quantize(command) => command.run(),
        Command::Run(command) => command.run(),
        Command::Sessions(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::SupportBundle(command) => command.run(),
        Command::Top(command) => command.run(),
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
    eprintln!("error: {}", message(error));
}

/// An error with its causes, each once: a message may tell its cause already.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}

/// Writes a line to standard output. A reader that has gone, as `head` does, has what it wanted.
fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// A whole number as text, which a JSON value is not when it is padded; `-` where there is none.
fn number(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), |n| n.to_string())
}

/// A text; `-` where there is none.
fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_a_message_tells_is_not_told_again() {
        let missing = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let tells = anyhow::Error::new(missing()).context(format!("a.json: {}", missing()));
        assert_eq!(message(&tells), "a.json: no such file");
        assert_eq!(message(&anyhow::Error::new(missing()).context("a.json")), "a.json: no such file");
    }
}
