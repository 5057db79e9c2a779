//! Which plugin computes where `engine.plugin` is `auto`? The best accelerator's of this release that proves here that
//! it computes, else the CPU's.
//!
//! It is settled before the engine starts, since rows are made for who computes them. A box without an accelerator is
//! known by its device nodes: nothing runs there to find out. Elsewhere each plugin is tried in a process of its own,
//! within the time that a start may take; what comes of it is one line of the log.

use crate::assemble::{now_ms, quarantine_in};
use crate::config::{AUTO, Config, Paths};
use crate::devices::{CPU, open_options, trial_options};
use sparsed_backend::{BackendError, DeviceKind, Found, QuarantineStore, Scan, SearchPath};

/// The plugin that was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Its id.
    pub(crate) plugin: String,
    /// What speaks for it and against the others.
    pub(crate) why: String,
    /// An accelerator is there whose plugin should compute, and does not.
    pub(crate) is_makeshift: bool,
}

/// What was found out about a plugin.
#[derive(Debug)]
enum Judged {
    /// It computes, on a device of this name.
    Fit { device: String, score: u32, mem_total: u64 },
    /// There is nothing for it to do here, and nothing to mend.
    PassedOver(String),
    /// Its device is there, and it does not compute.
    Unfit(String),
}

/// `config` with a plugin's id in `engine.plugin`, and why it is that one, if it was left open.
pub(crate) fn settle(config: &Config) -> (Config, Option<Choice>) {
    let mut config = config.clone();
    let scan = SearchPath::standard(config.plugins.dir.as_deref()).scan();
    let choice = choose(&config, &Paths::of(&config), &scan);
    if let Some(Choice { plugin, why, is_makeshift }) = &choice {
        let level = if *is_makeshift { log::Level::Warn } else { log::Level::Info };
        log::log!(level, plugin:%, reason:% = why; "plugin chosen");
        config.engine.plugin.clone_from(plugin);
        if plugin == CPU {
            // Which one of several was said of accelerators.
            (config.engine.device, config.engine.spare_devices) = (0, Vec::new());
        }
    }
    (config, choice)
}

/// The plugin of `scan` that a daemon of these places would choose; `None` where one is configured.
pub(crate) fn choose(config: &Config, paths: &Paths, scan: &Scan) -> Option<Choice> {
    if config.engine.plugin != AUTO {
        return None;
    }
    let quarantine = quarantine_in(config, paths);
    let others = scan.found.iter().filter(|found| found.manifest.id != CPU);
    let judged = others.map(|found| (found.manifest.id.clone(), judge(config, &quarantine, found)));
    Some(decide(&judged.collect::<Vec<_>>()))
}

/// The id of the plugin that a daemon would use.
pub(crate) fn plugin_of(config: &Config, scan: &Scan) -> String {
    choose(config, &Paths::of(config), scan).map_or_else(|| config.engine.plugin.clone(), |choice| choice.plugin)
}

/// Looks at files first, so that no code runs for nothing.
fn judge(config: &Config, quarantine: &QuarantineStore, found: &Found) -> Judged {
    let (manifest, engine) = (&found.manifest, &config.engine);
    if !found.is_ours() {
        return Judged::PassedOver(format!("it is not of this release, engine.plugin = \"{}\" uses it", manifest.id));
    }
    if manifest.devices.is_empty() {
        return Judged::PassedOver("it works with no device".to_owned());
    }
    if !found.sees_device() {
        return Judged::PassedOver(format!("none of its devices is there ({})", manifest.devices.join(", ")));
    }
    if let Some(reason) = config.outlasts_watchdog() {
        return Judged::Unfit(format!("engine.watchdog_ms {reason}"));
    }
    if let Err(error @ BackendError::Quarantined { .. }) = quarantine.admit(found, now_ms()) {
        return Judged::Unfit(error.to_string());
    }
    let host = trial_options(&config.plugins, engine);
    match found.prove(&engine.set, engine.device, &open_options(engine), &host) {
        Ok(device) if device.kind == DeviceKind::Cpu => Judged::PassedOver(format!("it computes where {CPU} does")),
        Ok(device) => Judged::Fit { device: device.name, score: device.score, mem_total: device.mem_total },
        Err(error) => Judged::Unfit(error.to_string()),
    }
}

/// The one whose device says that it is the better one, or else has more memory; of equals the first.
fn decide(judged: &[(String, Judged)]) -> Choice {
    let rank = |judged: &Judged| match judged {
        Judged::Fit { score, mem_total, .. } => Some((*score, *mem_total)),
        Judged::PassedOver(_) | Judged::Unfit(_) => None,
    };
    let fit = judged.iter().rev().filter(|(_, judged)| rank(judged).is_some());
    let best = fit.max_by_key(|(_, judged)| rank(judged)).map(|(id, _)| id);
    let why = judged.iter().map(|(id, judged)| match judged {
        Judged::Fit { device, .. } if Some(id) == best => format!("its device {device} has passed its test"),
        Judged::Fit { device, .. } => format!("{id} is not used: its device {device} is the lesser one"),
        Judged::PassedOver(reason) | Judged::Unfit(reason) => format!("{id} is not used: {reason}"),
    });
    let why: Vec<String> = why.collect();
    Choice {
        plugin: best.map_or(CPU, String::as_str).to_owned(),
        why: if why.is_empty() { "no other plugin is there".to_owned() } else { why.join("; ") },
        is_makeshift: best.is_none() && judged.iter().any(|(_, judged)| matches!(judged, Judged::Unfit(_))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(id: &str, score: u32, mem_total: u64) -> (String, Judged) {
        (id.to_owned(), Judged::Fit { device: format!("Some {id}"), score, mem_total })
    }

    fn not(id: &str, judged: fn(String) -> Judged, reason: &str) -> (String, Judged) {
        (id.to_owned(), judged(reason.to_owned()))
    }

    #[test]
    fn without_an_accelerator_the_cpu_computes_and_nothing_is_wrong() {
        let choice = decide(&[]);
        assert_eq!((choice.plugin.as_str(), choice.why.as_str()), ("cpu", "no other plugin is there"));
        let choice = decide(&[not("cuda", Judged::PassedOver, "none of its devices is there (/dev/x)")]);
        assert_eq!((choice.plugin.as_str(), choice.is_makeshift), ("cpu", false));
        assert_eq!(choice.why, "cuda is not used: none of its devices is there (/dev/x)");
    }

    #[test]
    fn one_that_computes_is_used_and_the_others_are_told_with_their_reasons() {
        let choice = decide(&[not("ascend", Judged::Unfit, "self_test: a sum came out wrong"), fit("cuda", 1, 8)]);
        let why = "ascend is not used: self_test: a sum came out wrong; its device Some cuda has passed its test";
        assert_eq!(choice, Choice { plugin: "cuda".to_owned(), why: why.to_owned(), is_makeshift: false });
    }

    #[test]
    fn the_better_device_goes_first_then_the_larger_one_then_the_one_that_was_found_first() {
        let plugin = |judged: &[(String, Judged)]| decide(judged).plugin;
        assert_eq!(plugin(&[fit("a", 1, 99), fit("b", 2, 1)]), "b");
        assert_eq!(plugin(&[fit("a", 1, 1), fit("b", 1, 2)]), "b");
        assert_eq!(plugin(&[fit("a", 1, 1), fit("b", 1, 1)]), "a");
        assert!(
            decide(&[fit("a", 2, 1), fit("b", 1, 1)]).why.contains("b is not used: its device Some b is the lesser")
        );
    }

    #[test]
    fn an_accelerator_that_does_not_compute_makes_the_cpu_a_makeshift() {
        let choice = decide(&[not("cuda", Judged::Unfit, "this build has no device code for a real driver")]);
        assert_eq!((choice.plugin.as_str(), choice.is_makeshift), ("cpu", true));
    }

    /// A folder that is not installed with the daemon is of others, whatever its plugin calls itself.
    #[test]
    fn code_of_others_is_not_run_to_see_whether_it_computes() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("cuda");
        std::fs::create_dir(&folder).unwrap();
        let (version, arch) = (env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
        let manifest = format!(
            "manifest_version = 1\nid = \"cuda\"\nversion = \"{version}\"\nlicense = \"MIT\"\ndevices = [\"/dev/null\"]\n\
             [abi]\nmajor = [0]\narch = \"{arch}\"\n[[library]]\npath = \"l.so\"\nscore = 1\nsha256 = \"{:064}\"\n",
            0
        );
        std::fs::write(folder.join("plugin.toml"), manifest).unwrap();
        let scan = SearchPath::only(vec![dir.path().to_owned()]).scan();
        let config = Config::of(&[format!("state_dir={}", dir.path().display())]);
        let choice = choose(&config, &Paths::of(&config), &scan).unwrap();
        assert_eq!((choice.plugin.as_str(), choice.is_makeshift), ("cpu", false));
        assert!(choice.why.contains("cuda is not used: it is not of this release, engine.plugin = \"cuda\" uses it"));
        let named = Config::of(&["engine.plugin=cuda"]);
        assert_eq!(choose(&named, &Paths::of(&named), &scan), None);
    }
}
