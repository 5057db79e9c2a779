//! Which plugins are there, may the one that is configured be used, and what mends one that may not?

use super::installation::installs;
use super::{Check, sets};
use crate::assemble::{now_ms, quarantine_in};
use crate::choice::{Choice, choose};
use crate::config::{AUTO, Config, Paths};
use rustix::fs::Access;
use serde_json::Value;
use sparsed_backend::{ABI_MAJOR, ABI_MINOR, BackendError, Found, Refusal, Scan};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The ids of this release's plugins, and the package of each.
const PACKAGES: &[(&str, &str)] = &[("cpu", "sparsed"), ("cuda", "sparsed-plugin-cuda")];
/// Where packages put them.
const PACKAGED: &str = "/usr/lib/sparsed/plugins";
/// Whoever may write a plugin but its owner.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The plugins that are there.
#[derive(Clone, Debug, Default)]
pub(super) struct Plugins {
    /// The id of the one that is configured, whether it is there or not, or was chosen.
    pub(super) used: String,
    /// Why it was chosen, where none is configured.
    pub(super) why: Option<String>,
    /// Ids, and whether each came with this release.
    pub(super) there: Vec<(String, bool)>,
}

impl Plugins {
    /// What a daemon chose is known by its `/v1/status`, `status`; where none answers, it is looked for as one does.
    pub(super) fn of(config: &Config, paths: &Paths, scan: &Scan, status: Option<&Value>) -> Self {
        let there = scan.found.iter().map(|found| (found.manifest.id.clone(), found.is_ours())).collect();
        let told = status.and_then(|status| {
            let word = |key: &str| status["device"][key].as_str().map(str::to_owned);
            Some((word("name")?, word("chosen")?))
        });
        let chosen = || choose(config, paths, scan).map(|Choice { plugin, why, .. }| (plugin, why));
        match told.or_else(chosen).filter(|_| config.engine.plugin == AUTO) {
            Some((used, why)) => Self { used, why: Some(why), there },
            None => Self { used: config.engine.plugin.clone(), why: None, there },
        }
    }

    /// Whether there is one of this id, and then whether it came with this release.
    pub(super) fn is_ours(&self, id: &str) -> Option<bool> {
        self.there.iter().find(|(known, _)| known == id).map(|(_, is_ours)| *is_ours)
    }
}

/// What installs the plugin `id` of this release, or `again` the one that is there.
pub(super) fn installs_plugin(id: &str, again: bool) -> Option<String> {
    PACKAGES.iter().find(|(known, _)| *known == id).map(|(_, package)| installs(package, again))
}

/// A plugin's version, the ABI that it speaks, and the daemon's.
fn versions(found: &Found) -> String {
    let abi = &found.manifest.abi;
    let majors = abi.major.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (version, dir) = (&found.manifest.version, found.dir.display());
    format!("{version} in {dir}; ABI {majors}, of the daemon's {ABI_MAJOR}.{ABI_MINOR}")
}

/// Which plugins are there, and whether the one that is `used` may be.
pub(super) fn plugins(config: &Config, paths: &Paths, scan: &Scan, used: &Plugins) -> Vec<Check> {
    let store = quarantine_in(config, paths);
    // Others than the daemon's user may not see what has failed; its log says so as well.
    let is_hidden = paths.state_dir.exists() && rustix::fs::access(&paths.state_dir, Access::EXEC_OK).is_err();
    let admit = |found: &Found| if is_hidden { Ok(()) } else { store.admit(found, now_ms()) };
    let mut checks = Vec::new();
    for found in &scan.found {
        let id = &found.manifest.id;
        let title = format!("plugin {id}");
        checks.push(match admit(found).and_then(|()| found.verify().map(drop)) {
            Ok(()) => Check::ok(title, versions(found)),
            Err(error) => Check::fail(title, error.to_string(), mends(&error, id, &found.dir)),
        });
    }
    for Refusal { dir, error } in &scan.refused {
        let id = dir.file_name().unwrap_or_default().to_string_lossy();
        checks.push(Check::warn(format!("plugin {}", dir.display()), error.to_string(), mends(error, &id, dir)));
    }
    if let Plugins { used, why: Some(why), .. } = used {
        checks.push(Check::ok("engine.plugin", format!("{AUTO}: '{used}' computes; {why}")));
    }
    let wanted = &used.used;
    if !scan.found.iter().any(|found| found.manifest.id == *wanted) {
        let searched: Vec<String> = scan.searched.iter().map(|dir| dir.display().to_string()).collect();
        let found = format!("engine.plugin = \"{wanted}\" is in none of {}", searched.join(", "));
        let fix = installs_plugin(wanted, wanted == "cpu").unwrap_or_else(|| sets("engine.plugin = \"cpu\""));
        checks.push(Check::fail(format!("plugin {wanted}"), found, fix));
    }
    checks
}

/// What mends the plugin `id` in `dir`, by what is wrong with it.
fn mends(error: &BackendError, id: &str, dir: &Path) -> String {
    match error {
        BackendError::Quarantined { .. } => {
            format!(
                "sudo journalctl -u sparsed -g {id}; once its cause is mended: sudo sparsectl plugins unquarantine {id}"
            )
        }
        BackendError::Untrusted { path, .. } => trusts(path),
        BackendError::Io { path, source } if source.kind() == ErrorKind::PermissionDenied => {
            format!("sudo chmod a+rX {}", path.display())
        }
        BackendError::NoVariant { .. } => {
            format!("sudo rm -r {}; none of its libraries is for this box", dir.display())
        }
        _ => match installs_plugin(id, true).filter(|_| dir.starts_with(PACKAGED)) {
            Some(installs) => installs,
            None => format!("sudo rm -r {}, and install it again from where it came", dir.display()),
        },
    }
}

/// What has nobody but root and the daemon's user change what lies at `path`.
fn trusts(path: &Path) -> String {
    let shown = path.display();
    let Ok(found) = path.symlink_metadata() else { return format!("sudo ls -ld {shown}") };
    if found.is_symlink() {
        return sets(&format!("plugins.dir = what {shown} leads to"));
    }
    let chown = (found.uid() != 0).then(|| format!("sudo chown root: {shown}"));
    let chmod = (found.mode() & WRITABLE_BY_OTHERS != 0).then(|| format!("sudo chmod go-w {shown}"));
    match chown.into_iter().chain(chmod).collect::<Vec<_>>() {
        both if both.is_empty() => format!("sudo ls -ld {shown}"),
        both => both.join(" && "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_mends_a_plugin_is_told_by_what_is_wrong_with_it() {
        let (ours, theirs) = (Path::new("/usr/lib/sparsed/plugins/cuda"), Path::new("/opt/plugins/acme"));
        let path = || ours.join("lib.so");
        let checksum = || BackendError::Checksum { path: path(), expected: "a".to_owned(), found: "b".to_owned() };
        let elf = || BackendError::Elf { path: path(), reason: "has a writable text".to_owned() };
        for error in [checksum(), elf()] {
            let fix = mends(&error, "cuda", ours);
            assert!(fix.contains("./sparsed-plugin-cuda") && fix.contains("install"), "{fix}");
            assert!(mends(&error, "acme", theirs).starts_with("sudo rm -r /opt/plugins/acme, and install it again"));
            // Another one that only has its name came from elsewhere.
            assert!(mends(&error, "cuda", theirs).starts_with("sudo rm -r "));
        }
        let denied = BackendError::Io { path: path(), source: ErrorKind::PermissionDenied.into() };
        assert_eq!(mends(&denied, "cuda", ours), "sudo chmod a+rX /usr/lib/sparsed/plugins/cuda/lib.so");
        let none = BackendError::NoVariant { path: path(), lacks: "avx2".to_owned() };
        assert!(mends(&none, "acme", theirs).contains("none of its libraries"));
    }

    #[test]
    fn a_folder_that_others_may_write_is_shut_by_its_own_path() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("plugins");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let error = BackendError::Untrusted { path: folder.clone(), reason: "mode 777".to_owned() };
        let fix = mends(&error, "acme", &folder.join("acme"));
        assert!(fix.ends_with(&format!("sudo chmod go-w {}", folder.display())), "{fix}");
        std::os::unix::fs::symlink(&folder, dir.path().join("link")).unwrap();
        assert!(trusts(&dir.path().join("link")).contains("plugins.dir"));
    }

    #[test]
    fn a_plugin_that_is_configured_and_not_there_names_its_package_if_it_has_one() {
        let scan = Scan { searched: vec!["/p".into()], found: Vec::new(), refused: Vec::new() };
        let fix = |plugin: &str| {
            let mut config = Config::default();
            plugin.clone_into(&mut config.engine.plugin);
            let paths = Paths::of(&config);
            let used = Plugins::of(&config, &paths, &scan, None);
            plugins(&config, &paths, &scan, &used).pop().unwrap().fix.unwrap()
        };
        assert!(fix("cuda").contains("./sparsed-plugin-cuda") && fix("cpu").contains("./sparsed"));
        assert!(fix("ascend").contains("engine.plugin = \"cpu\"") && fix(AUTO).contains("./sparsed"));
    }

    #[test]
    fn what_a_daemon_has_chosen_is_told_with_its_reasons() {
        let scan = Scan { searched: vec!["/p".into()], found: Vec::new(), refused: Vec::new() };
        let status = serde_json::json!({ "device": { "name": "cuda", "chosen": "its device X has passed its test" } });
        let (left_open, named) = (Config::default(), Config::of(&["engine.plugin=cpu"]));
        let of = |config: &Config| Plugins::of(config, &Paths::of(config), &scan, Some(&status));
        let told = plugins(&left_open, &Paths::of(&left_open), &scan, &of(&left_open)).remove(0);
        assert_eq!(told.found, "auto: 'cuda' computes; its device X has passed its test");
        assert_eq!((of(&named).used.as_str(), of(&named).why), ("cpu", None));
        let alone = Plugins::of(&left_open, &Paths::of(&left_open), &scan, None);
        assert_eq!((alone.used.as_str(), alone.why.as_deref()), ("cpu", Some("no other plugin is there")));
    }
}
