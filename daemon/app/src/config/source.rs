//! Where does the configuration come from? From the vendor, the operator and the command line.

use super::layers::{drop_ins, read};
use super::{Config, ConfigError, Layers, check, flatten};
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
        Layers::read(&self.files()?, &self.sets)
    }

    /// Texts that are said, with their keys, dotted, whether the configuration is right or not; of a file that is no
    /// TOML what its lines say.
    pub(crate) fn texts(&self) -> Vec<(String, String)> {
        let files = self.files().unwrap_or_default();
        let of_files = files.iter().filter_map(|path| read(path).ok());
        let tables = of_files.flat_map(|text| check::readable_tables(&text));
        let mut texts = Vec::new();
        for table in tables.chain(self.sets.iter().filter_map(|set| check::table_of(set))) {
            flatten(&table, &mut Vec::new(), &mut |key, value| {
                texts.extend(value.as_str().map(|value| (key.to_owned(), value.to_owned())));
            });
        }
        texts
    }

    fn files(&self) -> Result<Vec<PathBuf>, ConfigError> {
        if let Some(file) = &self.config {
            return Ok(vec![file.clone()]);
        }
        let files = [VENDOR_FILE, CONFIG_FILE].map(PathBuf::from).into_iter();
        let mut files: Vec<PathBuf> = files.filter(|path| path.exists()).collect();
        files.extend(drop_ins(Path::new(DROP_INS))?);
        Ok(files)
    }

    /// What these arguments of a command line name.
    #[cfg(test)]
    pub(crate) fn of(config: &Path, sets: &[&str]) -> Self {
        Self { config: Some(config.to_owned()), sets: sets.iter().map(|&set| set.to_owned()).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_says_is_known_though_it_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let said = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let sets = ["mqtt.username=anna", "engine.set.\"a b\"=\"c d\"", "limits.stop_s=3", "nonsense"];
            let mut said = Source::of(&file, &sets).texts();
            said.retain(|(key, _)| key != "mqtt.username" && !key.starts_with("engine."));
            assert!(Source::of(&file, &sets).layers().is_err());
            said
        };
        let expected =
            [("tcp.keys", "/k"), ("model.a.relay.key_file", "/r")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let right = "[model.a.relay]\nkey_file = \"/r\"\n";
        assert_eq!(said(&format!("[tcp]\nkeys = \"/k\" # ours\nlisten = 5\n{right}")).len(), 2);
        assert_eq!(said(&format!("[tcp]\nkeys = \"/k\" # ours\nlisten = [\n{right}")), expected);
        let of_sets = Source::of(&file, &["mqtt.username=anna", "engine.set.\"a b\"=c"]).texts();
        assert_eq!(of_sets.last().unwrap(), &("engine.set.\"a b\"".to_owned(), "c".to_owned()));
    }
}
