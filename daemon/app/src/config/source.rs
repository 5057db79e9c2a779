//! Where does the configuration come from? From the vendor, the operator and the command line.

use super::layers::{drop_ins, is_absent, read};
use super::{Config, ConfigError, Layers, check, flatten};
use std::path::{Path, PathBuf};

/// What the vendor of an image or a package says.
const VENDOR_FILE: &str = "usr/lib/sparsed/config.toml";
/// What the operator says.
const CONFIG_FILE: &str = "etc/sparsed/config.toml";
/// What further packages and tools say; in the order of their names.
const DROP_INS: &str = "etc/sparsed/conf.d";

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
    /// Below it are the system's files; empty: below `/`.
    #[arg(skip)]
    root: PathBuf,
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
    /// TOML what its lines say, and of a folder that cannot be listed nothing.
    pub(crate) fn texts(&self) -> Vec<(String, String)> {
        let files = self.files_and(self.drop_ins().unwrap_or_default());
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

    /// The files that are read, the weakest first.
    ///
    /// # Errors
    /// As [`drop_ins`].
    fn files(&self) -> Result<Vec<PathBuf>, ConfigError> {
        Ok(self.files_and(self.drop_ins()?))
    }

    /// The file that is named, or those of the system that are there and `drop_ins`. One that only a link says is there
    /// counts: a daemon without the settings of a disk that comes late would serve whom it should not.
    fn files_and(&self, drop_ins: Vec<PathBuf>) -> Vec<PathBuf> {
        if let Some(file) = &self.config {
            return vec![file.clone()];
        }
        let files = [VENDOR_FILE, CONFIG_FILE].map(|file| self.at(file)).into_iter().filter(|path| !is_absent(path));
        files.chain(drop_ins).collect()
    }

    fn drop_ins(&self) -> Result<Vec<PathBuf>, ConfigError> {
        match self.config {
            Some(_) => Ok(Vec::new()),
            None => drop_ins(&self.at(DROP_INS)),
        }
    }

    /// A file of the system.
    fn at(&self, file: &str) -> PathBuf {
        Path::new("/").join(&self.root).join(file)
    }

    /// What these arguments of a command line name.
    #[cfg(test)]
    pub(crate) fn of(config: &Path, sets: &[&str]) -> Self {
        let sets = sets.iter().map(|&set| set.to_owned()).collect();
        Self { config: Some(config.to_owned()), sets, ..Self::default() }
    }

    /// What a command line names that names nothing, on a system below `root`.
    #[cfg(test)]
    pub(crate) fn of_system_below(root: &Path) -> Self {
        Self { root: root.to_owned(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_links_to_a_disk_that_is_away_is_missed_and_not_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let read = || Source::of_system_below(dir.path()).layers();
        fs::create_dir_all(at("etc/sparsed")).unwrap();
        assert_eq!(read().unwrap().files().count(), 0);
        // Each time a link of another height, to a disk that comes then.
        let (file, drop_ins) = (("etc/sparsed/config.toml", "disk/c.toml"), ("etc/sparsed/conf.d", "disk/more"));
        for (link, target) in [file, drop_ins, ("etc/sparsed", "disk/etc")] {
            if link == "etc/sparsed" {
                fs::remove_dir_all(at(link)).unwrap();
            }
            symlink(at(target), at(link)).unwrap();
            let missed = read().unwrap_err();
            assert!(missed.may_mend_itself() && missed.to_string().contains("which is not there"), "{missed}");
            fs::create_dir_all(at("disk/more")).unwrap();
            fs::create_dir_all(at("disk/etc")).unwrap();
            fs::write(at("disk/c.toml"), "[limits]\nmax_waiting = 3\n").unwrap();
            assert!(read().is_ok());
            fs::remove_dir_all(at("disk")).unwrap();
        }
        // What nobody links to is not waited for.
        assert!(!Source::of(&at("none.toml"), &[]).load().unwrap_err().may_mend_itself());
    }

    #[test]
    fn what_a_configuration_says_is_known_though_it_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let said = |text: &str| {
            fs::write(&file, text).unwrap();
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
