//! Plugins as an operator meets them: listed, refused, quarantined, and of others.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::Value;
use sparsed_backend::{QuarantinePolicy, QuarantineStore, SearchPath};
use sparsed_tests::daemon::{Daemon, read_answer, streamed_tokens};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

fn staged() -> PathBuf {
    sparsed_tests::root().join("target/release/plugins")
}

fn model() -> PathBuf {
    sparsed_tests::model("smollm2-135m-dsa.gguf")
}

/// What `sparsectl plugins` says, on standard output if it succeeds.
fn plugins(arguments: &[&str], sets: &[&str]) -> Result<String, String> {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let done = Command::new(sparsed_tests::sparsectl()).arg("plugins").args(arguments).args(sets).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if done.status.success() { Ok(said(&done.stdout)) } else { Err(said(&done.stderr)) }
}

/// The entry of the plugin `id`.
fn listed(id: &str, sets: &[&str]) -> Value {
    let report: Value = serde_json::from_str(&plugins(&["--json"], sets).unwrap()).unwrap();
    report["plugins"].as_array().unwrap().iter().find(|plugin| plugin["id"] == id).unwrap().clone()
}

/// A copy of the staged CPU plugin, with its library and manifest as `change` leaves them.
fn copy_of_cpu(change: impl FnOnce(Vec<u8>, String) -> (Vec<u8>, String)) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (staged().join("cpu"), root.path().join("cpu"));
    std::fs::create_dir(&to).unwrap();
    let library = "libsparsed_plugin_cpu.so";
    let manifest = std::fs::read_to_string(from.join("plugin.toml")).unwrap();
    let (bytes, manifest) = change(std::fs::read(from.join(library)).unwrap(), manifest);
    std::fs::write(to.join(library), bytes).unwrap();
    let sum = Command::new("sha256sum").arg(to.join(library)).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap()[..64].to_owned();
    let with_sum = |line: &str| {
        if line.starts_with("sha256") { format!("sha256 = \"{sum}\"\n") } else { format!("{line}\n") }
    };
    std::fs::write(to.join("plugin.toml"), manifest.lines().map(with_sum).collect::<String>()).unwrap();
    for (path, mode) in [(to.clone(), 0o755), (to.join("plugin.toml"), 0o644), (to.join(library), 0o755)] {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    root
}

/// The CPU plugin as another version of somebody else.
fn third_party() -> TempDir {
    let (ours, theirs) = (format!("{}\0", env!("CARGO_PKG_VERSION")), "9.9.9\0");
    assert_eq!(ours.len(), theirs.len());
    copy_of_cpu(|mut bytes, manifest| {
        let found = |at: &usize| bytes[*at..].starts_with(ours.as_bytes());
        let places: Vec<usize> = (0..bytes.len()).filter(found).collect();
        assert!(!places.is_empty());
        places.into_iter().for_each(|at| bytes[at..at + theirs.len()].copy_from_slice(theirs.as_bytes()));
        (bytes, manifest.replace(env!("CARGO_PKG_VERSION"), "9.9.9"))
    })
}

fn set(key: &str, path: &Path) -> String {
    format!("{key}={}", path.display())
}

#[test]
fn the_cpu_plugin_is_listed_with_its_device() {
    let state = tempfile::tempdir().unwrap();
    let state = set("state_dir", state.path());
    let cpu = listed("cpu", &[&state]);
    assert_eq!((&cpu["state"], &cpu["third_party"], &cpu["selected"]), (&"ok".into(), &false.into(), &true.into()));
    assert_eq!(cpu["devices"][0]["kind"], "cpu");
    assert_eq!(cpu["devices"].as_array().map(Vec::len), Some(1));
    let text = plugins(&[], &[&state, "engine.set.level=scalar"]).unwrap();
    assert!(text.contains(concat!("cpu ", env!("CARGO_PKG_VERSION"), ": ok")) && text.contains("device 0:"), "{text}");
}

#[test]
fn a_refused_plugin_is_listed_with_the_reason() {
    let state = tempfile::tempdir().unwrap();
    let state = set("state_dir", state.path());
    let damaged = copy_of_cpu(|bytes, manifest| (bytes[..bytes.len() / 20].to_vec(), manifest));
    let cpu = listed("cpu", &[&state, &set("plugins.dir", damaged.path())]);
    assert_eq!(cpu["state"], "refused");
    assert!(cpu["reason"].as_str().unwrap().contains("damaged ELF file"), "{cpu}");
    let newer = copy_of_cpu(|bytes, manifest| (bytes, manifest + "requires = [\"avx512fp16\"]\n"));
    let cpu = listed("cpu", &[&state, &set("plugins.dir", newer.path())]);
    let has = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("avx512_fp16");
    assert_eq!(cpu["state"], if has { "ok" } else { "refused" });
    assert!(has || cpu["reason"].as_str().unwrap().contains("needs avx512fp16"), "{cpu}");
}

/// The daemon's device, once it is `name`.
fn device(daemon: &Daemon, name: &str) -> Value {
    let device = || daemon.get("/v1/status").json()["device"].clone();
    daemon.wait_until(name, || device()["name"] == name && device()["state"] == "ready");
    device()
}

/// Kills the plugin's process `times`, each time that it has computed a few tokens, while an answer streams; the tokens
/// of the answer.
fn killed_while_streaming(daemon: &Daemon, times: u64, tokens: u64) -> usize {
    let prompt: Vec<u32> = (0..20).collect();
    let request = serde_json::json!({
        "prompt": prompt, "return_tokens": true, "max_tokens": tokens, "ignore_eos": true, "stream": true, "temperature": 0,
    });
    let stream = daemon.open("/v1/completions", &request);
    let answer = std::thread::spawn(move || read_answer(stream).unwrap().body);
    for time in 0..times {
        let sampled = || daemon.status()["sampled_tokens"].as_u64().unwrap();
        let before = sampled();
        daemon.wait_until("tokens", || sampled() > before + 2);
        let killed = Command::new("kill").args(["-KILL", &daemon.plugin_host().to_string()]).status().unwrap();
        assert!(killed.success());
        daemon.wait_until("noticed", || daemon.get("/v1/status").json()["device"]["faults"].as_u64() > Some(time));
    }
    streamed_tokens(&answer.join().unwrap()).len()
}

fn tiny() -> PathBuf {
    sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf")
}

#[test]
fn a_plugin_that_crashes_three_times_is_quarantined_over_restarts_and_the_cpu_serves_meanwhile() {
    let sets = ["engine.plugin=minimal", "engine.retry.backoff_ms=[20, 20, 20, 1000]"];
    let mut daemon = Daemon::start(&tiny(), &sets);
    let state = set("state_dir", &daemon.state_dir());
    assert_eq!(killed_while_streaming(&daemon, 3, 400), 400, "a stream is lost: {}", daemon.log());
    assert_eq!(device(&daemon, "cpu")["backend_changed"], true);
    let minimal = listed("minimal", &[&state]);
    assert_eq!((&minimal["state"], &minimal["times"]), (&"quarantined".into(), &1.into()));
    assert!(minimal["reason"].as_str().unwrap().contains("signal 9"), "{minimal}");
    daemon.kill_and_restart(&sets);
    assert_eq!(device(&daemon, "cpu")["backend_changed"], true);
    let log = daemon.log();
    assert!(log.contains("plugin minimal is quarantined for another 60 min (time 1)"), "{log}");
    assert!(
        log.contains("sparsectl plugins unquarantine minimal") && log.contains("another device takes over"),
        "{log}"
    );
    assert!(plugins(&["unquarantine", "minimal"], &[&state]).unwrap().contains("may be used again"));
    assert_eq!(device(&daemon, "minimal")["backend_changed"], false);
}

#[test]
fn the_last_device_is_used_whatever_it_does() {
    let sets = ["engine.isolation=process", "engine.retry.backoff_ms=[1]"];
    let daemon = Daemon::start(&tiny(), &sets);
    assert_eq!(killed_while_streaming(&daemon, 5, 3000), 3000, "a stream is lost: {}", daemon.log());
    assert_eq!(device(&daemon, "cpu")["faults"], 5);
    assert_eq!(listed("cpu", &[&set("state_dir", &daemon.state_dir())])["state"], "quarantined");
    assert!(daemon.log().contains("used all the same: no other device could take over"), "{}", daemon.log());
}

#[test]
fn a_quarantined_plugin_is_told_until_it_is_let_go() {
    let state = tempfile::tempdir().unwrap();
    let state_dir = set("state_dir", state.path());
    let scan = SearchPath::only(vec![staged()]).scan();
    let sha256 = scan.select(Some("cpu")).unwrap().variant().unwrap().sha256.clone();
    let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let store = QuarantineStore::new(state.path(), QuarantinePolicy::default());
    (0..3).for_each(|_| drop(store.strike("cpu", &sha256, "killed by signal 11", now_ms).unwrap()));
    let warned = Daemon::start(&model(), &[&state_dir]);
    let log = warned.log();
    assert!(log.contains("plugin cpu is quarantined for another 60 min (time 1): killed by signal 11"), "{log}");
    assert!(log.contains("sparsectl plugins unquarantine cpu"), "{log}");
    drop(warned);
    assert_eq!(listed("cpu", &[&state_dir])["state"], "quarantined");
    let said = plugins(&["unquarantine", &sha256[..8]], &[&state_dir]).unwrap();
    assert_eq!(said.trim_end(), format!("may be used again: {sha256}"));
    assert!(plugins(&["unquarantine", "cpu"], &[&state_dir]).unwrap_err().contains("no library of 'cpu'"));
    let daemon = Daemon::start(&model(), &[&state_dir]);
    assert_eq!(daemon.get("/v1/status").json()["tainted"], false);
    assert!(!daemon.log().contains("tainted") && !daemon.log().contains("quarantine"));
}

#[test]
fn a_plugin_that_only_calls_itself_cpu_has_a_process_of_its_own_and_taints() {
    let copy = copy_of_cpu(|bytes, manifest| (bytes, manifest));
    let dir = set("plugins.dir", copy.path());
    let daemon = Daemon::start(&model(), &[&dir]);
    assert!(daemon.log().contains("plugin loaded in a host of its own"), "{}", daemon.log());
    assert_eq!(daemon.get("/v1/status").json()["tainted"], true);
    // The daemon's own folder, named by the configuration, is still its own.
    let daemon = Daemon::start(&model(), &[&set("plugins.dir", &staged())]);
    assert!(!daemon.log().contains("in a host of its own"), "{}", daemon.log());
    assert_eq!(daemon.get("/v1/status").json()["tainted"], false);
}

#[test]
fn a_reader_that_goes_away_makes_no_command_panic() {
    let state = tempfile::tempdir().unwrap();
    for arguments in ["conform --list", "plugins", "plugins --json", "conform --level L0 target/release/plugins/cpu"] {
        let script = format!("\"$0\" {arguments} --set \"$1\" | true");
        // `conform` takes settings of the plugin in the same form, and has no use for this one.
        let mut shell = Command::new("sh");
        shell.current_dir(sparsed_tests::root()).args(["-c", &script]).arg(sparsed_tests::sparsectl());
        let done = shell.arg(set("state_dir", state.path())).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&done.stderr), "", "{arguments}");
    }
}

#[test]
fn a_third_party_plugin_taints_the_daemon_and_is_not_run_for_a_list() {
    let state = tempfile::tempdir().unwrap();
    let theirs = third_party();
    let dir = set("plugins.dir", theirs.path());
    let cpu = listed("cpu", &[&set("state_dir", state.path()), &dir]);
    assert_eq!((&cpu["state"], &cpu["third_party"], &cpu["devices"]), (&"ok".into(), &true.into(), &Value::Null));
    let daemon = Daemon::start(&model(), &[&dir]);
    let status = daemon.get("/v1/status").json();
    assert_eq!((&status["tainted"], &status["third_party_plugins"][0]), (&true.into(), &"cpu 9.9.9".into()));
    assert_eq!(daemon.log().matches("tainted").count(), 1, "{}", daemon.log());
    let said = Command::new(sparsed_tests::sparsectl()).args(["status", "--socket"]).arg(daemon.socket()).output();
    let said = String::from_utf8(said.unwrap().stdout).unwrap();
    assert!(said.contains("tainted by third-party plugins: cpu 9.9.9"), "{said}");
}
