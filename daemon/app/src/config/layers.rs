//! Which layer says what? The vendor's file, the operator's, drop-ins and the command line, each on those before.

use super::{Config, ConfigError, check};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Largest configuration file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files in the folder of drop-ins.
const DROP_INS_MAX: usize = 256;

/// What was read, before it is one configuration.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// Files with their text, the weakest first.
    files: Vec<(PathBuf, String)>,
    /// `key=value`, the weakest first.
    sets: Vec<String>,
    /// All of it together.
    table: toml::Table,
}

impl Layers {
    /// Reads `files`, then `sets`, each on top of what is there.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, a value of the wrong type.
    pub fn read(files: &[PathBuf], sets: &[String]) -> Result<Self, ConfigError> {
        let mut layers = Self::default();
        for path in files {
            let text = read(path)?;
            merge(&mut layers.table, check::parse(path, &text)?);
            layers.files.push((path.clone(), text));
        }
        for set in sets {
            check::apply(set, &mut layers.table)?;
        }
        layers.sets = sets.to_vec();
        Ok(layers)
    }

    /// All layers as one configuration.
    ///
    /// # Errors
    /// A value out of its range; something missing.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let (key, reason) = match self.table.clone().try_into::<Config>() {
            Ok(config) => match config.wrong_value() {
                None => return Ok(config),
                Some(wrong) => wrong,
            },
            // Each layer fitted its types when it was read: something is missing.
            Err(error) => (String::new(), error.message().to_owned()),
        };
        let origin = self.origin(&key).unwrap_or_else(|| self.everywhere());
        Err(ConfigError::Invalid { origin, reason: if key.is_empty() { reason } else { format!("{key} {reason}") } })
    }

    /// Where the value of `key` was said last: a file's line or the key of a setting. `None`: it is the default.
    pub fn origin(&self, key: &str) -> Option<String> {
        let path = check::key_parts(key)?;
        let by_set = self.sets.iter().rfind(|set| check::is_about(set, &path)).map(|set| check::origin_of(set));
        let by_file = || {
            let said = |(file, text): &(PathBuf, String)| {
                check::line_of(text, &path).map(|line| format!("{}:{line}", file.display()))
            };
            self.files.iter().rev().find_map(said)
        };
        by_set.or_else(by_file)
    }

    /// The files that were read, the weakest first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// All that was said, where no key is at fault.
    fn everywhere(&self) -> String {
        let files = self.files.iter().map(|(path, _)| path.display().to_string());
        files.chain(self.sets.iter().map(|set| check::origin_of(set))).collect::<Vec<_>>().join(" ")
    }
}

/// The drop-ins of a folder in the order of their names, but hidden ones; none where the folder is not there.
///
/// # Errors
/// A folder that cannot be listed, or has too many.
pub(super) fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let io = |cause| ConfigError::Io { path: folder.to_owned(), cause };
    if is_absent(folder) {
        return Ok(Vec::new());
    }
    let entries = folder.read_dir().map_err(|cause| io(told(folder, cause)))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        // An editor keeps its own there while a file is open, as links that lead nowhere.
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "toml") {
            found.push(path);
        }
        if found.len() > DROP_INS_MAX {
            let reason = format!("has more than {DROP_INS_MAX} drop-ins");
            return Err(ConfigError::Invalid { origin: folder.display().to_string(), reason });
        }
    }
    found.sort();
    Ok(found)
}

/// Whether nothing is at `path`, and no link says that something should be.
pub(super) fn is_absent(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) && !leads_nowhere(path)
}

/// Whether `path`, or a folder above it, is a link to what is not there.
pub(super) fn leads_nowhere(path: &Path) -> bool {
    broken_link(path).is_some()
}

fn broken_link(path: &Path) -> Option<&Path> {
    let is_broken = |path: &&Path| path.is_symlink() && path.metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound);
    path.ancestors().find(is_broken)
}

/// Why `path` cannot be opened: the system says of a link that leads nowhere what it says of a file that is missing.
fn told(path: &Path, cause: std::io::Error) -> std::io::Error {
    let Some((link, target)) = broken_link(path).and_then(|link| Some((link, link.read_link().ok()?))) else {
        return cause;
    };
    std::io::Error::new(cause.kind(), format!("{} leads to {}, which is not there", link.display(), target.display()))
}

/// Puts `above` on top of `below`, key by key; a list is one value.
fn merge(below: &mut toml::Table, above: toml::Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (_, value) => drop(below.insert(key, value)),
        }
    }
}

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    let io = |cause| ConfigError::Io { path: path.to_owned(), cause };
    let mut text = String::new();
    let file = File::open(path).map_err(|cause| io(told(path, cause)))?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let reason = format!("more than {FILE_BYTES_MAX} bytes");
        return Err(ConfigError::Invalid { origin: path.display().to_string(), reason });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let paths = files.iter().map(|(name, text)| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        });
        let paths = paths.collect();
        (dir, paths)
    }

    #[test]
    fn a_later_file_wins_key_by_key_and_a_setting_over_all() {
        let (_dir, files) = folder(&[
            ("vendor.toml", "[limits]\nmax_running = 2\nmax_waiting = 3\n[model.default]\npath = \"/m\"\n"),
            ("10-site.toml", "[limits]\nmax_running = 4\n"),
            ("20-box.toml", "[model.default]\ntop_k = 64\n[engine.retry]\nbackoff_ms = [1]\n"),
        ]);
        let layers = Layers::read(&files, &["limits.max_batched_tokens=64".to_owned()]).unwrap();
        let config = layers.config().unwrap();
        assert_eq!((config.limits.max_running, config.limits.max_waiting), (4, 3));
        assert_eq!((config.model["default"].top_k, &config.model["default"].path), (Some(64), &PathBuf::from("/m")));
        let origin = |key: &str| layers.origin(key).map(|origin| origin.rsplit('/').next().unwrap().to_owned());
        assert_eq!(origin("limits.max_running").as_deref(), Some("10-site.toml:2"));
        assert_eq!(origin("limits.max_waiting").as_deref(), Some("vendor.toml:3"));
        assert_eq!(origin("model.default.top_k").as_deref(), Some("20-box.toml:2"));
        assert_eq!(origin("limits.max_batched_tokens").as_deref(), Some("--set limits.max_batched_tokens"));
        assert_eq!(origin("limits.connections"), None);
    }

    #[test]
    fn a_range_that_two_layers_break_together_is_told_with_its_line() {
        let (_dir, files) =
            folder(&[("a.toml", "[plugins]\nquarantine_ms = 9\n"), ("b.toml", "[plugins]\nquarantine_max_ms = 8\n")]);
        let said = Layers::read(&files, &[]).unwrap().config().unwrap_err().to_string();
        assert!(said.ends_with("a.toml:2: plugins.quarantine_ms is 9, must be 1 to 8"), "{said}");
    }

    #[test]
    fn a_model_without_a_path_in_any_layer_is_refused_but_the_default_one() {
        let (_dir, files) = folder(&[("a.toml", "[model.small]\ntop_k = 1\n")]);
        let said = Layers::read(&files, &[]).unwrap().config().unwrap_err().to_string();
        assert!(said.contains("a.toml") && said.contains("model.small.path is missing"), "{said}");
        let (_dir, files) = folder(&[("a.toml", "[model.default]\nmax_context = 1024\n")]);
        let config = Layers::read(&files, &[]).unwrap().config().unwrap();
        let paths = crate::config::Paths::of(&config);
        let found = crate::assemble::configured_models(&config, &paths).remove("default").unwrap();
        assert_eq!((found.path.as_path(), found.max_context), (paths.default_model(), Some(1024)));
    }

    #[test]
    fn drop_ins_come_in_the_order_of_their_names() {
        let (dir, _) = folder(&[("b.toml", ""), ("a.toml", ""), ("c.toml.bak", ""), (".d.toml", "")]);
        std::os::unix::fs::symlink("anna@box.1234", dir.path().join(".#a.toml")).unwrap();
        let names: Vec<_> = drop_ins(dir.path()).unwrap().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["a.toml", "b.toml"]);
        assert!(drop_ins(&dir.path().join("absent")).unwrap().is_empty());
    }
}
