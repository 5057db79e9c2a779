//! Which plugin a daemon uses that was told none: an accelerator's that shows that it computes, else the CPU's.
//!
//! The accelerator is the CPU plugin with planted faults under the name of a plugin of the release, beside an
//! executable of its own; its device node is one that every box has, or none.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::daemon::Daemon;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A node that is there.
const THERE: &str = "/dev/null";

/// An installation of its own: the daemon's executable and its plugins.
struct Installation(TempDir);

impl Installation {
    /// With the CPU plugin alone. The files are links, so it lies where the built ones do.
    fn new() -> Self {
        let release = sparsed_tests::root().join("target/release");
        let dir = tempfile::tempdir_in(&release).unwrap();
        fs::hard_link(release.join("sparsed"), dir.path().join("sparsed")).unwrap();
        let (from, to) = (release.join("plugins/cpu"), dir.path().join("plugins/cpu"));
        fs::create_dir_all(&to).unwrap();
        for name in ["plugin.toml", "libsparsed_plugin_cpu.so"] {
            fs::hard_link(from.join(name), to.join(name)).unwrap();
        }
        Self(dir)
    }

    /// With this library as the plugin `cuda` too, whose manifest is `template` with `devices`.
    fn with_cuda(library: &str, template: &str, devices: &str) -> Self {
        let (installation, root) = (Self::new(), sparsed_tests::root());
        let template = fs::read_to_string(root.join(template)).unwrap();
        let named = |line: &&str| !line.starts_with("devices =");
        let lines: Vec<&str> = template.lines().filter(named).collect();
        let text = format!("devices = [\"{devices}\"]\n{}\n", lines.join("\n")).replace("\"faulty\"", "\"cuda\"");
        let own = installation.0.path().join("plugin.toml.in");
        fs::write(&own, text).unwrap();
        let mut stage = Command::new("sh");
        stage.current_dir(root).args(["packaging/stage-plugin.sh", "cuda", &format!("target/release/{library}")]);
        let staged = stage.arg(own).arg(installation.0.path().join("plugins")).output().unwrap();
        assert!(staged.status.success(), "{staged:?}");
        installation
    }

    /// With an accelerator whose device node is `node`.
    fn with_accelerator(node: &str) -> Self {
        let installation = Self::with_cuda("libsparsed_faulty.so", "tests/faulty/plugin.toml.in", node);
        let cpu = sparsed_tests::root().join("target/release/libsparsed_plugin_cpu.so");
        fs::copy(cpu, installation.wrapped()).unwrap();
        installation
    }

    /// What the accelerator computes with, in its own folder: it may read nothing else.
    fn wrapped(&self) -> PathBuf {
        self.plugin("cuda").join("libsparsed_plugin_cpu.so")
    }

    fn plugin(&self, id: &str) -> PathBuf {
        self.0.path().join("plugins").join(id)
    }

    /// A daemon that serves.
    fn daemon(&self, sets: &[&str]) -> Daemon {
        let wrapped = self.wrapped();
        let environment = [("SPARSED_WRAPPED", wrapped.as_path()), ("SPARSED_ACCELERATOR", Path::new("cuda"))];
        let model = sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf");
        Daemon::spawn_of(&self.0.path().join("sparsed"), &environment, Some(&model), sets).ready()
    }
}

/// The device of a daemon that answers, and that nothing has failed since it serves.
fn device(daemon: &Daemon) -> Value {
    let request = json!({ "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": true });
    let answer = daemon.post("/v1/completions", &request);
    assert_eq!(answer.status, 200, "{}", answer.body);
    let device = daemon.get("/v1/status").json()["device"].clone();
    let state = (&device["state"], &device["backend_changed"], &device["faults"]);
    assert_eq!(state, (&json!("ready"), &json!(false), &json!(0)), "{device}; log:\n{}", daemon.log());
    device
}

/// The CPU computes, as a warning or not, and the reason has these words.
fn falls_back(daemon: &Daemon, is_warned: bool, reason: &str) {
    let device = device(daemon);
    assert_eq!(device["name"], "cpu", "{device}; log:\n{}", daemon.log());
    assert!(device["chosen"].as_str().unwrap().contains(reason), "{device}");
    let log = daemon.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("plugin chosen")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains(reason), "{log}");
    assert_eq!(lines[0].to_uppercase().contains("WARN"), is_warned, "{}", lines[0]);
}

#[test]
fn an_accelerator_that_shows_that_it_computes_is_used_without_any_setting() {
    let daemon = Installation::with_accelerator(THERE).daemon(&[]);
    let device = device(&daemon);
    assert_eq!(device["name"], "cuda", "{}", daemon.log());
    assert!(device["chosen"].as_str().unwrap().ends_with("has passed its test"), "{device}");
    let log = daemon.log();
    assert!(log.contains("plugin chosen") && log.contains("plugin loaded in a host of its own"), "{log}");
    let mut tool = Command::new(sparsed_tests::sparsectl());
    let said = tool.args(["status", "--socket"]).arg(daemon.socket()).output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("device cuda: ready; by engine.plugin = \"auto\": its device "), "{said}");
}

#[test]
fn a_box_without_the_device_runs_nothing_of_its_plugin() {
    let daemon = Installation::with_accelerator("/dev/no-such-node").daemon(&[]);
    falls_back(&daemon, false, "cuda is not used: none of its devices is there (/dev/no-such-node)");
    assert!(!daemon.log().contains("plugin host"), "{}", daemon.log());
    let alone = Installation::new().daemon(&[]);
    falls_back(&alone, false, "no other plugin is there");
}

#[test]
fn an_accelerator_that_fails_its_own_test_is_a_warning_and_the_cpu_computes() {
    let daemon = Installation::with_accelerator(THERE).daemon(&["engine.set.bad_from=\"0\"", "engine.set.honest=yes"]);
    falls_back(&daemon, true, "self_test: two and two are five");
}

#[test]
fn an_accelerator_that_hangs_costs_the_time_of_a_start_and_the_cpu_computes() {
    let sets = ["engine.set.hang_open=yes", "plugins.start_timeout_ms=1500"];
    let daemon = Installation::with_accelerator(THERE).daemon(&sets);
    falls_back(&daemon, true, "cuda is not used: device_open: ");
}

#[test]
fn an_accelerator_that_breaks_in_the_middle_of_its_trial_is_a_warning() {
    let installation = Installation::with_accelerator(THERE);
    // Its library has nothing to compute with.
    fs::remove_file(installation.wrapped()).unwrap();
    falls_back(&installation.daemon(&[]), true, "cuda is not used: plugin cuda in a process of its own: ");
}

#[test]
fn a_watchdog_without_patience_for_a_hung_step_has_the_cpu_compute() {
    let daemon = Installation::with_accelerator(THERE).daemon(&["engine.watchdog_ms=30000"]);
    falls_back(&daemon, true, "cuda is not used: engine.watchdog_ms is 30000; a hung step");
}

/// The beginning of a backend: device, memory and queues are there and pass the test, most operators are not.
#[test]
fn a_plugin_that_lacks_operators_is_not_used_though_its_device_passes_its_test() {
    let installation = Installation::with_cuda("libsparsed_plugin_cuda.so", "plugins/cuda/plugin.toml.in", THERE);
    let folder = installation.plugin("cuda");
    let fake = sparsed_tests::root().join("target/release/libsparsed_fake_cuda.so");
    fs::copy(fake, folder.join("libcuda.so.1")).unwrap();
    let daemon = installation.daemon(&[&format!("engine.set.lib_dir={}", folder.display())]);
    falls_back(&daemon, true, "cuda is not used: supports: ");
    // Without a driver it says so.
    fs::remove_file(folder.join("libcuda.so.1")).unwrap();
    let daemon = installation.daemon(&[&format!("engine.set.lib_dir={}", folder.display())]);
    falls_back(&daemon, true, "libcuda.so.1");
}

#[test]
fn a_plugin_that_is_named_is_used_whatever_else_is_there() {
    let daemon = Installation::with_accelerator(THERE).daemon(&["engine.plugin=cpu"]);
    let device = device(&daemon);
    assert_eq!((&device["name"], &device["chosen"]), (&json!("cpu"), &Value::Null));
    assert!(!daemon.log().contains("plugin chosen"), "{}", daemon.log());
}
