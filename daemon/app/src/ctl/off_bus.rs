//! Why does a command take no `--dbus`? Those that ask the daemon do; the others say what they ask instead.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// The command line's error; one about `--dbus` says why the command does not take it.
pub(super) fn explained(mut error: clap::Error, command: Option<&str>) -> clap::Error {
    let is_dbus = |value: &ContextValue| matches!(value, ContextValue::String(text) if text.starts_with("--dbus"));
    let is_about_it =
        error.kind() == ErrorKind::UnknownArgument && error.get(ContextKind::InvalidArg).is_some_and(is_dbus);
    if let Some(reason) = command.and_then(reason).filter(|_| is_about_it) {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![reason.into()]));
    }
    error
}

/// Why this command, or some of its verbs, asks nothing of a daemon on a bus.
fn reason(command: &str) -> Option<&'static str> {
    Some(match command {
        "mqtt" => "mqtt test asks the node by its broker, as devices do: whether that works is what it is to find out",
        "model" => "only pull file: has the daemon do it; the other verbs work on the files of the store themselves",
        "doctor" | "support-bundle" => {
            "it looks at this box's files, and at the daemon by its socket: it is for when something does not work"
        }
        "config" | "plugins" => "it reads the configuration's and the plugins' files, and asks no daemon",
        "bench" | "conform" | "convert" | "eval" | "generate" | "inspect" | "logits" | "quantize" => {
            "it works with files in its own process, and asks no daemon"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::Arguments;
    use clap::{CommandFactory, Parser};

    fn takes_it(command: &clap::Command) -> bool {
        let takes = command.get_arguments().any(|argument| argument.get_long() == Some("dbus"));
        takes || command.get_subcommands().any(takes_it)
    }

    #[test]
    fn every_command_takes_a_bus_or_says_why_not() {
        for command in Arguments::command().get_subcommands() {
            let name = command.get_name();
            assert!(takes_it(command) || reason(name).is_some(), "{name}");
            assert!(name == "model" || !takes_it(command) || reason(name).is_none(), "{name}");
        }
    }

    #[test]
    fn who_asks_in_vain_is_told_why_and_other_mistakes_are_left_alone() {
        let said = |arguments: &[&str]| {
            let error = Arguments::try_parse_from(["sparsectl"].iter().chain(arguments)).unwrap_err();
            explained(error, arguments.first().copied()).to_string()
        };
        assert!(said(&["mqtt", "test", "--dbus"]).contains("by its broker"), "{}", said(&["mqtt", "test", "--dbus"]));
        assert!(said(&["model", "list", "--dbus=session"]).contains("files of the store"));
        assert!(!said(&["mqtt", "test", "--bus"]).contains("by its broker"));
    }
}
