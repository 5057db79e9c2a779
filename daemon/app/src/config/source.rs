//! Where does the configuration come from? From the vendor, the operator and the command line.

use super::layers::drop_ins;
use super::{Config, ConfigError, Layers};
use std::path::{Path, PathBuf};

/// What the vendor of an image or a package says.
const VENDOR_FILE: &str = "/usr/lib/sparsed/config.toml";
/// What the operator says.
const CONFIG_FILE: &str = "/etc/sparsed/config.toml";
/// What further packages and tools say; in the order of their names.
const DROP_INS: &str = "/etc/sparsed/conf.d";

/// The configuration of a command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Source {
    /// The configuration, instead of /usr/lib/sparsed/config.toml, /etc/sparsed/config.toml and
    /// /etc/sparsed/conf.d/*.toml.
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
    /// As [`Layers::read`] and [`Layers::config`].
    pub fn load(&self) -> Result<Config, ConfigError> {
        self.layers()?.config()
    }

    /// Whether the command line leaves it to the system's files.
    pub fn names_nothing(&self) -> bool {
        self.config.is_none() && self.sets.is_empty()
    }

    /// What each layer says.
    ///
    /// # Errors
    /// As [`Layers::read`].
    pub fn layers(&self) -> Result<Layers, ConfigError> {
        let files = match &self.config {
            Some(file) => vec![file.clone()],
            None => {
                let files = [VENDOR_FILE, CONFIG_FILE].map(PathBuf::from).into_iter();
                let mut files: Vec<PathBuf> = files.filter(|path| path.exists()).collect();
                files.extend(drop_ins(Path::new(DROP_INS))?);
                files
            }
        };
        Layers::read(&files, &self.sets)
    }
}
