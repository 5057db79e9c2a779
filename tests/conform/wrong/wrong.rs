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
    ("slow.file_bad_page", "the C example has no slow tier: it is broken by WRONG_SLOW"),
    ("slow.host_bad_page", "as above"),
    ("slow.sealed_bad_page", "as above"),
    ("life.confined_slow", "as above"),
];

/// Faults of the slow tier of `faulty`, which is the CPU plugin but for them, and the rules that each breaks: those of
/// the file, plain and encrypted, and those of host memory.
const WRONG_SLOW: &[(&str, &[&str])] = &[
    ("swallow", &["slow.file_bad_page", "slow.host_bad_page", "slow.sealed_bad_page"]),
    ("shift", &["slow.file", "slow.host", "slow.sealed"]),
    ("spill", &["life.confined_slow"]),
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
    conform_with(folder, &["--deadline", DEADLINE_SECONDS], &[])
}

/// As [`conform`], with these arguments and variables.
fn conform_with(folder: &Path, arguments: &[&str], environment: &[(&str, String)]) -> (Value, bool) {
    let mut command = Command::new(sparsectl());
    command.arg("conform").arg(folder).arg("--json").args(arguments).envs(environment.iter().cloned());
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
    let no_slow = [
        "slow.file",
        "slow.host",
        "slow.sealed",
        "slow.file_bad_page",
        "slow.host_bad_page",
        "slow.sealed_bad_page",
        "life.confined_slow",
    ];
    let lacks = [
        ("cpu", vec!["device.host_register", "weight.file"]),
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

/// Levels of instructions that this machine has, as the CPU plugin's setting `level` names them.
fn levels() -> Vec<&'static str> {
    let mut levels = vec!["scalar"];
    #[cfg(target_arch = "x86_64")]
    {
        let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        levels.extend((has_avx2 && is_x86_feature_detected!("f16c")).then_some("avx2"));
        let has_avx512 = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq");
        levels.extend((has_avx512 && is_x86_feature_detected!("avx512vnni")).then_some("avx512"));
    }
    #[cfg(target_arch = "aarch64")]
    levels.push("neon");
    levels
}

/// Up to L3: garbage and repetition look at what all levels share.
#[test]
fn the_cpu_plugin_computes_right_at_every_level_of_this_machine() {
    let cpu = sparsectl().parent().unwrap().join("plugins/cpu");
    for level in levels() {
        let (report, passed) = conform_with(&cpu, &["--level", "L3", "--set", &format!("level={level}")], &[]);
        assert!(passed, "{level}: {:?} of {report:#}", rules(&report, "failed"));
        let driver = report["device"]["driver"].as_str().unwrap();
        assert!(driver.contains(level), "{driver} is not {level}");
        assert!(rules(&report, "ok").len() > 90, "{level}: {report:#}");
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
fn a_slow_tier_that_is_wrong_fails_the_rules_that_it_breaks_and_no_other() {
    let tool = sparsectl();
    let release = tool.parent().unwrap();
    let faulty = release.join("test-plugins/faulty");
    let wrapped = faulty.join("libsparsed_plugin_cpu.so").to_str().unwrap().to_owned();
    let environment = [("SPARSED_WRAPPED", wrapped)];
    for (fault, broken) in WRONG_SLOW {
        let arguments = ["--deadline", DEADLINE_SECONDS, "--set", &format!("slow={fault}")];
        let (report, _) = conform_with(&faulty, &arguments, &environment);
        assert_eq!(rules(&report, "failed"), *broken, "{fault}: {report:#}");
    }
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
fn a_plugin_that_hangs_at_every_step_costs_the_time_of_two_rules() {
    let at =
        ("minimal.c", "mtx_lock(&plan->running);", "for (volatile int go = 1; go;) {}\n  mtx_lock(&plan->running);");
    let wrong = Wrong {
        rule: String::new(),
        says: "hangs at every step".to_owned(),
        edits: vec![(at.0.to_owned(), at.1.to_owned(), at.2.to_owned())],
        flags: Vec::new(),
    };
    let dir = tempfile::tempdir().unwrap();
    let (report, passed) = conform_with(&build(dir.path(), &wrong).unwrap(), &["--deadline", "8"], &[]);
    assert!(!passed);
    assert_eq!(rules(&report, "failed").len(), 2, "{:?}", rules(&report, "failed"));
    assert!(rules(&report, "skipped").len() > 40);
}

#[test]
fn a_device_and_settings_can_be_chosen() {
    let cpu = sparsectl().parent().unwrap().join("plugins/cpu");
    let (report, passed) = conform_with(&cpu, &["--level", "L1", "--set", "level=scalar"], &[]);
    assert!(passed && report["device"]["driver"].as_str().unwrap().contains("scalar"), "{report:#}");
    let (report, _) = conform_with(&cpu, &["--level", "L1", "--device", "7"], &[]);
    assert!(rules(&report, "failed").contains(&"device.info"), "{report:#}");
    let why = report["results"].as_array().unwrap().iter().find(|result| result["rule"] == "device.info").unwrap();
    assert!(why.to_string().contains("device 7 cannot be tried"), "{why}");
}

/// Every rule, mutated programs and steps among them, on the C example built with sanitizers: the first wrong access or
/// undefined operation ends its process.
#[test]
fn the_c_example_passes_completely_under_sanitizers() {
    let runtime = |name: &str| {
        let found = Command::new("cc").arg(format!("-print-file-name={name}")).output().unwrap();
        std::fs::canonicalize(String::from_utf8(found.stdout).unwrap().trim()).unwrap()
    };
    let paths = [runtime("libasan.so"), runtime("libubsan.so")];
    // libasan.so.8.0.0 is libasan.so.8 by its own name.
    let names = paths.each_ref().map(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        format!("\"{}\"", name.split('.').take(3).collect::<Vec<_>>().join("."))
    });
    let needs = format!("sha256 = \"@SHA256@\"\nneeds = [{}]", names.join(", "));
    let sanitized = Wrong {
        rule: String::new(),
        says: "nothing: it is sanitized".to_owned(),
        edits: vec![("plugin.toml.in".to_owned(), "sha256 = \"@SHA256@\"".to_owned(), needs)],
        flags: ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"].map(str::to_owned).to_vec(),
    };
    let dir = tempfile::tempdir().unwrap();
    let folder = build(dir.path(), &sanitized).unwrap();
    let preload = paths[0].to_str().unwrap().to_owned();
    // What is freed goes back soon: some rules look at resident memory.
    let options = "detect_leaks=0:quarantine_size_mb=1".to_owned();
    let environment = [("LD_PRELOAD", preload), ("ASAN_OPTIONS", options)];
    let (report, _) = conform_with(&folder, &["--deadline", "120"], &environment);
    assert_eq!(rules(&report, "failed"), Vec::<&str>::new(), "{report:#}");
    assert!(rules(&report, "ok").len() > 80, "{report:#}");
}

#[test]
fn a_folder_that_is_no_plugin_is_one_broken_rule() {
    let dir = tempfile::tempdir().unwrap();
    let (report, passed) = conform(dir.path());
    assert!(!passed);
    assert_eq!(rules(&report, "failed"), ["manifest.valid"]);
}
