//! The conformance kit passes the plugins that are right and finds every one that is wrong.
//!
//! `wrong.toml` lists deliberately wrong plugins: `abi/examples/minimal.c` with one thing broken each. Each must fail
//! the one rule that it breaks, and no other.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde::Deserialize;
use serde_json::Value;
use sparsed_tests::{root, sparsectl};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Seconds that a rule may take here: enough for a loaded machine, since one plugin hangs.
const DEADLINE_SECONDS: &str = "20";

/// Rules that no plugin of the list breaks, and why.
const NOT_BROKEN: &[(&str, &str)] = &[
    ("step.paging", "the golden rules shuffle blocks too, so who breaks it fails them first"),
    ("elf.text_relocations", "what a compiler makes of code without -fPIC depends on the machine"),
    ("slow.file_bad_page", "the C example has no slow tier"),
    ("slow.host_bad_page", "as above"),
];

#[derive(Deserialize)]
struct List {
    wrong: Vec<Wrong>,
}

#[derive(Clone, Deserialize)]
struct Wrong {
    /// The rule that it breaks.
    rule: String,
    /// What is wrong with it.
    says: String,
    /// File, text that is there once, what takes its place.
    edits: Vec<(String, String, String)>,
    /// For the compiler, after the source.
    #[serde(default)]
    flags: Vec<String>,
}

fn list() -> Vec<Wrong> {
    let text = std::fs::read_to_string(root().join("tests/conform/wrong/wrong.toml")).unwrap();
    toml::from_str::<List>(&text).unwrap().wrong
}

/// Where the plugin's sources are in the tree, and where they go in a folder that is compiled.
const SOURCES: [(&str, &str, &str); 6] = [
    ("minimal.c", "abi/examples/minimal.c", "minimal.c"),
    ("operators.h", "abi/examples/operators.h", "operators.h"),
    ("plugin.toml.in", "abi/examples/plugin.toml.in", "plugin.toml.in"),
    ("plugin.h", "abi/include/sparsed/plugin.h", "include/sparsed/plugin.h"),
    ("kit.h", "abi/include/sparsed/kit.h", "include/sparsed/kit.h"),
    ("program.h", "abi/include/sparsed/program.h", "include/sparsed/program.h"),
];

/// Compiles and stages the example with these edits; answers the plugin's folder, or which edit no longer fits.
fn build(dir: &Path, wrong: &Wrong) -> Result<PathBuf, String> {
    std::fs::create_dir_all(dir.join("include/sparsed")).unwrap();
    for (name, from, to) in SOURCES {
        let mut text = std::fs::read_to_string(root().join(from)).unwrap();
        for (_, find, replace) in wrong.edits.iter().filter(|(file, ..)| file == name) {
            let times = text.matches(find).count();
            if times != 1 {
                return Err(format!("in {name} there is {times} times: {find}"));
            }
            text = text.replace(find, replace);
        }
        std::fs::write(dir.join(to), text).unwrap();
    }
    let known = |file: &String| SOURCES.iter().any(|(name, ..)| name == file);
    assert!(wrong.edits.iter().all(|(file, ..)| known(file)), "{}: an edit of an unknown file", wrong.rule);
    let library = dir.join("libsparsed_plugin_minimal.so");
    let built = Command::new("cc")
        .args(["-std=c11", "-O2", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wl,-z,nodelete"])
        .arg(format!("-DPLUGIN_VERSION=\"{}\"", env!("CARGO_PKG_VERSION")))
        .arg("-I")
        .arg(dir.join("include"))
        .arg(dir.join("minimal.c"))
        .arg("-o")
        .arg(&library)
        .arg("-lm")
        .args(&wrong.flags)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}: {}", wrong.rule, String::from_utf8_lossy(&built.stderr));
    let plugins = dir.join("plugins");
    std::fs::create_dir_all(&plugins).unwrap();
    for path in [dir, &plugins] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let staged = Command::new("sh")
        .arg(root().join("packaging/stage-plugin.sh"))
        .arg("minimal")
        .args([&library, &dir.join("plugin.toml.in"), &plugins])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(staged.status.success(), "{}", String::from_utf8_lossy(&staged.stderr));
    Ok(plugins.join("minimal"))
}

/// What the kit says about a plugin, and whether the exit code was 0.
fn conform(folder: &Path) -> (Value, bool) {
    let mut command = Command::new(sparsectl());
    command.arg("conform").arg(folder).args(["--json", "--deadline", DEADLINE_SECONDS]);
    let done = command.output().unwrap();
    let report = serde_json::from_slice(&done.stdout);
    (report.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&done.stderr))), done.status.success())
}

/// Rules with this verdict.
fn rules<'a>(report: &'a Value, verdict: &str) -> Vec<&'a str> {
    let results = report["results"].as_array().unwrap();
    let with = results.iter().filter(|result| result["verdict"] == verdict);
    with.map(|result| result["rule"].as_str().unwrap()).collect()
}

#[test]
fn the_cpu_plugin_and_the_c_example_pass_completely() {
    let plugins = sparsectl().parent().unwrap().join("plugins");
    // What a plugin may lack; every skip that is not named here is one too many.
    let no_slow_host = ["slow.host", "slow.host_bad_page"];
    let no_slow = ["slow.file", "slow.host", "slow.file_bad_page", "slow.host_bad_page"];
    let lacks = [
        ("cpu", [&["device.host_register", "weight.file"][..], &no_slow_host].concat()),
        ("minimal", [&["device.host_register", "weight.in_place"][..], &no_slow].concat()),
    ];
    for (id, lacks) in lacks {
        let (report, passed) = conform(&plugins.join(id));
        assert_eq!(rules(&report, "failed"), Vec::<&str>::new(), "{id}: {report:#}");
        assert!(passed && report["passed"] == true);
        assert_eq!(rules(&report, "skipped"), lacks, "{id}");
        assert_eq!(report["plugin"], id);
        assert!(report["sha256"].as_str().is_some_and(|sum| sum.len() == 64) && report["device"]["id"] != "");
    }
}

#[test]
fn each_wrong_plugin_fails_the_rule_that_it_breaks_and_no_other() {
    let (all, next, bad) = (list(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let judge = |wrong: &Wrong| {
        let dir = tempfile::tempdir().unwrap();
        let outcome = build(dir.path(), wrong).map(|folder| conform(&folder));
        let why = match &outcome {
            Err(why) => why.clone(),
            Ok((report, false)) if rules(report, "failed") == [wrong.rule.as_str()] => return,
            Ok((report, _)) => format!("fails {:?}", rules(report, "failed")),
        };
        bad.lock().unwrap().push(format!("{} ({}): {why}", wrong.rule, wrong.says));
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
            scope.spawn(|| {
                while let Some(wrong) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    judge(wrong);
                }
            });
        }
    });
    let bad = bad.into_inner().unwrap();
    assert!(bad.is_empty(), "{} of {}:\n{}", bad.len(), all.len(), bad.join("\n"));
}

#[test]
fn every_rule_is_broken_by_a_plugin_of_the_list_or_excused() {
    let listed = Command::new(sparsectl()).args(["conform", "--list"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let ids: Vec<&str> = listed.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    assert!(ids.len() > 90);
    let broken: Vec<String> = list().into_iter().map(|wrong| wrong.rule).collect();
    for id in &ids {
        let excused = NOT_BROKEN.iter().any(|(rule, _)| rule == id);
        assert!(excused != broken.iter().any(|rule| rule == id), "{id} has no wrong plugin, or needs no excuse");
    }
    for rule in &broken {
        assert!(ids.contains(&rule.as_str()), "{rule} is no rule");
    }
}

#[test]
fn a_folder_that_is_no_plugin_is_one_broken_rule() {
    let dir = tempfile::tempdir().unwrap();
    let (report, passed) = conform(dir.path());
    assert!(!passed);
    assert_eq!(rules(&report, "failed"), ["manifest.valid"]);
}
