//! `sparsectl config`: what does the daemon's configuration come to, who says so, and is it right?

use super::{doctor, print};
use crate::config::{Layers, Source, flatten};
use anyhow::ensure;
use clap::Subcommand;
use toml::Value;

/// Show or check the daemon's configuration.
#[derive(Debug, clap::Args)]
pub(super) struct ConfigCommand {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// All settings as the daemon would have them, as TOML.
    Show {
        /// Behind each, where it was said: file and line, or the argument.
        #[arg(long)]
        origin: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Whether the daemon would take it; says line, key and what was likely meant.
    Check {
        #[command(flatten)]
        source: Source,
    },
}

impl ConfigCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.verb {
            Verb::Show { origin: false, source } => print(toml::to_string(&source.load()?)?.trim_end()),
            Verb::Show { origin: true, source } => {
                print(&with_origins(&source.layers()?, |_, value| value.to_string())?)
            }
            Verb::Check { source } => {
                let layers = source.layers()?;
                let (wrong, remarks) = doctor::of_config(&source, &layers.config()?);
                ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
                for remark in remarks {
                    print(&remark)?;
                }
                let files: Vec<String> = layers.files().map(|path| path.display().to_string()).collect();
                print(&format!(
                    "right: {}",
                    if files.is_empty() { "no file, the defaults".to_owned() } else { files.join(", ") }
                ))
            }
        }
    }
}

/// Every setting on a line of its own, its value as `shown` has it, and where it was said.
pub(super) fn with_origins(layers: &Layers, shown: impl Fn(&str, &Value) -> String) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    flatten(&toml::Table::try_from(layers.config()?)?, &mut Vec::new(), &mut |key, value| {
        let origin = layers.origin(key).unwrap_or_else(|| "default".to_owned());
        lines.push(format!("{key} = {} # {origin}", shown(key, value)));
    });
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_with_origins_is_a_configuration_that_says_the_same() {
        let sets = ["model.\"smol-1.7 b\".path=/x", "limits.max_running=3"].map(str::to_owned);
        let layers = Layers::read(&[], &sets).unwrap();
        let shown = with_origins(&layers, |_, value| value.to_string()).unwrap();
        assert!(shown.contains("limits.max_running = 3 # --set limits.max_running\n"), "{shown}");
        assert!(shown.contains("limits.max_waiting = 256 # default\n"), "{shown}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &shown).unwrap();
        let again = Layers::read(&[file.path().to_owned()], &[]).unwrap().config().unwrap();
        assert_eq!(toml::to_string(&again).unwrap(), toml::to_string(&layers.config().unwrap()).unwrap());
    }
}
