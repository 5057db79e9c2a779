//! Where is what, when the configuration does not say? System paths for root and the service, XDG's for a user.

use super::Config;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The packaged model's file name.
const DEFAULT_MODEL_FILE: &str = "smollm2-135m-dsa.gguf";
/// Where packages put models; one of the same name in the state folder goes before it.
const PACKAGED_MODELS: &str = "/usr/share/sparsed/models";

/// Places, settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// What must survive a restart.
    pub state_dir: PathBuf,
    /// The Unix socket.
    pub socket: PathBuf,
    /// The store of models.
    pub models_dir: PathBuf,
    /// The model `default` when none is configured: the user's own goes before the packaged one.
    pub default_models: [PathBuf; 2],
}

impl Paths {
    /// The places of this process.
    pub fn of(config: &Config) -> Self {
        let is_root = rustix::process::geteuid().is_root();
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::settle(config, is_root, &variable)
    }

    /// The places of the system's service, whoever asks.
    pub fn of_service(config: &Config) -> Self {
        Self::settle(config, true, &|_| None)
    }

    /// Where the model `default` is now, or would be.
    pub fn default_model(&self) -> &Path {
        let [own, _] = &self.default_models;
        self.default_models.iter().find(|path| path.exists()).unwrap_or(own)
    }

    fn settle(config: &Config, is_root: bool, variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let home = variable("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from);
        let under = |name: &str, fallback: &str| variable(name).map_or_else(|| home.join(fallback), PathBuf::from);
        // A unit's own folders, if systemd made some, win over the user's.
        let unit = |name: &str| variable(name).map(PathBuf::from);
        let xdg_state = || under("XDG_STATE_HOME", ".local/state").join("sparsed");
        // The system's service has a user of its own, and is told by its folder from a user's service; that user's home
        // is there too, for who asks in its name.
        let is_of_system = |dir: &Path| dir.starts_with("/var/lib");
        let is_system = is_root || is_of_system(&unit("STATE_DIRECTORY").unwrap_or_else(|| home.clone()));
        let system = |path: &str| is_system.then(|| PathBuf::from(path));
        let state_dir = config.state_dir.clone().or_else(|| unit("STATE_DIRECTORY"));
        let state_dir = state_dir.or_else(|| system("/var/lib/sparsed")).unwrap_or_else(xdg_state);
        let socket = config.socket.path.clone().or_else(|| unit("RUNTIME_DIRECTORY").map(|dir| dir.join("api.sock")));
        let socket =
            socket.or_else(|| system("/run/sparsed/api.sock")).unwrap_or_else(|| match variable("XDG_RUNTIME_DIR") {
                Some(dir) => PathBuf::from(dir).join("sparsed/api.sock"),
                None => xdg_state().join("run/api.sock"),
            });
        let models = system("/var/lib/sparsed/models");
        let models = models.unwrap_or_else(|| under("XDG_DATA_HOME", ".local/share").join("sparsed/models"));
        let default_models = [models.join(DEFAULT_MODEL_FILE), Path::new(PACKAGED_MODELS).join(DEFAULT_MODEL_FILE)];
        let models_dir = config.models.dir.clone().unwrap_or(models);
        Self { state_dir, socket, models_dir, default_models }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(is_root: bool, variables: &[(&str, &str)]) -> [String; 3] {
        let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, v)| OsString::from(v));
        let paths = Paths::settle(&Config::default(), is_root, &variable);
        let [own_model, _] = paths.default_models;
        [paths.state_dir, paths.socket, own_model].map(|path| path.display().to_string())
    }

    #[test]
    fn a_packaged_model_is_the_default_unless_the_state_folder_has_one() {
        let mut paths = Paths::settle(&Config::default(), true, &|_| None);
        let [_, packaged] = &paths.default_models;
        assert_eq!(packaged, Path::new("/usr/share/sparsed/models/smollm2-135m-dsa.gguf"));
        let dir = tempfile::tempdir().unwrap();
        paths.default_models = [dir.path().join("own"), dir.path().join("packaged")];
        assert!(paths.default_model().ends_with("own"), "where it would be");
        for place in ["packaged", "own"] {
            std::fs::write(dir.path().join(place), []).unwrap();
            assert!(paths.default_model().ends_with(place));
        }
    }

    #[test]
    fn root_uses_the_systems_folders() {
        let expected = ["/var/lib/sparsed", "/run/sparsed/api.sock", "/var/lib/sparsed/models/smollm2-135m-dsa.gguf"];
        assert_eq!(settled(true, &[("HOME", "/root"), ("XDG_RUNTIME_DIR", "/run/user/0")]), expected);
    }

    #[test]
    fn the_systems_service_uses_the_systems_folders_whoever_runs_it_and_a_users_service_does_not() {
        let [state, socket, model] =
            settled(false, &[("HOME", "/var/lib/sparsed"), ("STATE_DIRECTORY", "/var/lib/sparsed")]);
        assert_eq!((state.as_str(), socket.as_str()), ("/var/lib/sparsed", "/run/sparsed/api.sock"));
        assert_eq!(model, "/var/lib/sparsed/models/smollm2-135m-dsa.gguf");
        let [state, _, model] = settled(false, &[("HOME", "/h"), ("STATE_DIRECTORY", "/h/.local/state/sparsed")]);
        assert_eq!(state, "/h/.local/state/sparsed");
        assert_eq!(model, "/h/.local/share/sparsed/models/smollm2-135m-dsa.gguf");
    }

    #[test]
    fn a_user_uses_xdgs_and_its_own_state_folder_without_a_runtime_folder() {
        let [state, socket, model] = settled(false, &[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/user/7")]);
        assert_eq!((state.as_str(), socket.as_str()), ("/h/.local/state/sparsed", "/run/user/7/sparsed/api.sock"));
        assert_eq!(model, "/h/.local/share/sparsed/models/smollm2-135m-dsa.gguf");
        let [_, socket, _] = settled(false, &[("HOME", "/h"), ("XDG_STATE_HOME", "/s")]);
        assert_eq!(socket, "/s/sparsed/run/api.sock");
    }
}
