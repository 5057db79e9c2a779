//! Where does the configuration come from? The command line says: a file and settings on top.

use super::{Config, ConfigError};
use std::path::PathBuf;

/// Where the configuration is when the command line does not say.
const CONFIG_FILE: &str = "/etc/sparsed/config.toml";

/// The configuration of a command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Source {
    /// The configuration; /etc/sparsed/config.toml if it is there.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// A setting on top of the configuration, key=value; may be repeated. The value is TOML, or else a bare string.
    #[arg(long = "set", value_name = "KEY=VALUE", global = true)]
    sets: Vec<String>,
}

impl Source {
    /// Reads it.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load(&self) -> Result<Config, ConfigError> {
        let standard = PathBuf::from(CONFIG_FILE);
        let file = self.config.clone().or_else(|| standard.exists().then_some(standard));
        Config::load(file.as_deref(), &self.sets)
    }
}
