//! A plugin and a daemon of different minors: one that has grown by the rules runs with the other, whichever it is, and
//! a plugin whose fields were moved is refused. The plugin is the C example, compiled with copies of the header; an old
//! one is the example as it was when the minor was frozen, with the headers of that day. A newer daemon is played by
//! `newer.c`, a library around the plugin.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_backend::{Plugin, SearchPath};
use sparsed_tests::{logits, tiny::Tiny};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Appends to structs that cross the border each way, to an element of an array and to the table; and a new operator.
const GROWN: &[(&str, &str)] = &[
    ("#define SPD_ABI_MINOR 6u", "#define SPD_ABI_MINOR 7u"),
    ("} spd_run;", "  uint64_t appended;\n} spd_run;"),
    ("} spd_device_info;", "  uint64_t appended;\n} spd_device_info;"),
    ("} spd_plan_info;", "  uint64_t appended;\n} spd_plan_info;"),
    ("} spd_kv_op;", "  uint64_t appended;\n} spd_kv_op;"),
    ("} spd_op;", "  uint64_t appended;\n} spd_op;"),
    ("sizeof(spd_op) == 104", "sizeof(spd_op) == 112"),
    ("} spd_api;", "  spd_status (*appended)(spd_device *);\n} spd_api;"),
    ("#define SPD_OP_HADAMARD 19u", "#define SPD_OP_HADAMARD 19u\n#define SPD_OP_APPENDED 20u"),
];
/// One field in the middle, and no new minor: the mistake that struct_size does not notice.
const MOVED: &[(&str, &str)] =
    &[("  uint64_t total, free, budget;", "  uint64_t inserted;\n  uint64_t total, free, budget;")];

/// The example in `source` and the headers in `include` after `edits` of `plugin.h`, staged in a folder of its own.
fn staged(include: &Path, source: &Path, edits: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("include/sparsed");
    std::fs::create_dir_all(&own).unwrap();
    for file in ["plugin.h", "kit.h", "program.h"] {
        let mut text = std::fs::read_to_string(include.join(file)).unwrap();
        for (from, to) in edits.iter().filter(|_| file == "plugin.h") {
            assert_eq!(text.matches(from).count(), 1, "the header has no single '{from}'");
            text = text.replace(from, to);
        }
        std::fs::write(own.join(file), text).unwrap();
    }
    compile(dir.path(), &source.join("minimal.c"));
    stage(&dir);
    dir
}

/// Makes a plugin's folder of the library in `dir`.
fn stage(dir: &TempDir) {
    let stage = Command::new("sh")
        .current_dir(sparsed_tests::root())
        .arg("packaging/stage-plugin.sh")
        .args(["minimal".as_ref(), library(dir.path()).as_os_str(), "abi/examples/plugin.toml.in".as_ref()])
        .arg(plugins(dir))
        .output()
        .unwrap();
    assert!(stage.status.success(), "{}", String::from_utf8_lossy(&stage.stderr));
}

fn library(dir: &Path) -> PathBuf {
    dir.join("libsparsed_plugin_minimal.so")
}

fn plugins(dir: &TempDir) -> PathBuf {
    let plugins = dir.path().join("plugins");
    std::fs::create_dir_all(&plugins).unwrap();
    plugins
}

/// Compiles `source` with the headers in `dir`.
fn compile(dir: &Path, source: &Path) {
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]);
    cc.arg(format!("-DPLUGIN_VERSION=\"{}\"", env!("CARGO_PKG_VERSION"))).arg("-Wl,-z,nodelete").arg("-I");
    cc.arg(dir.join("include")).arg(source).arg("-o").arg(library(dir)).args(["-lm", "-ldl"]);
    let built = cc.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// The frozen example behind a library that presents it with a newer daemon, and where the example is.
fn under_a_newer_daemon() -> (TempDir, PathBuf) {
    let dir = staged(&frozen(), &frozen(), &[]);
    let newer = sparsed_tests::root().join("tests/layout/newer.c");
    std::fs::rename(library(dir.path()), dir.path().join("old.so")).unwrap();
    compile(dir.path(), &newer);
    stage(&dir);
    // Beside the library that loads it: nothing else can be read in a plugin's process.
    let old = plugins(&dir).join("minimal/old.so");
    std::fs::rename(dir.path().join("old.so"), &old).unwrap();
    (dir, old)
}

/// Runs a tiny model on the staged plugin.
fn runs(dir: &TempDir) {
    let tiny = Tiny::open("v32");
    let folder = plugins(dir);
    let extra = ["--act", "f32", "--plugin", "minimal", "--plugins-dir", folder.to_str().unwrap()];
    let answer = logits(&tiny.gguf(), &tiny.ids, true, &extra);
    let largest = sparsed_tests::worst(&answer.logits, &tiny.logits_of_gguf);
    assert!(largest < sparsed_tests::tiny::TOLERANCE, "differs by {largest}");
    assert_eq!(tiny.other_selections(&answer.selections), 0);
}

fn current() -> (PathBuf, PathBuf) {
    let abi = sparsed_tests::root().join("abi");
    (abi.join("include/sparsed"), abi.join("examples"))
}

/// Headers and example of the first minor whose layout is kept.
fn frozen() -> PathBuf {
    sparsed_tests::root().join("tests/layout/0.2")
}

#[test]
fn a_plugin_of_the_first_minor_whose_layout_is_kept_runs() {
    runs(&staged(&frozen(), &frozen(), &[]));
}

#[test]
fn it_keeps_every_rule_under_a_daemon_whose_structs_arrays_and_operators_have_grown() {
    let (dir, old) = under_a_newer_daemon();
    let tried = Command::new(sparsed_tests::sparsectl())
        .arg("conform")
        .arg(plugins(&dir).join("minimal"))
        .env("SPARSED_WRAPPED", &old)
        .output()
        .unwrap();
    let report = String::from_utf8(tried.stdout).unwrap();
    assert!(tried.status.success(), "{report}{}", String::from_utf8_lossy(&tried.stderr));
    assert!(report.lines().filter(|line| line.starts_with("ok") && !line.contains("SKIP")).count() > 90, "{report}");
}

#[test]
fn a_plugin_of_a_later_minor_runs() {
    let (include, source) = current();
    runs(&staged(&include, &source, GROWN));
}

#[test]
fn a_plugin_whose_header_has_a_field_in_the_middle_is_refused() {
    let (include, source) = current();
    let dir = staged(&include, &source, MOVED);
    let scan = SearchPath::only(vec![plugins(&dir)]).scan();
    let refused = Plugin::load(scan.select(Some("minimal")).unwrap(), &BTreeMap::new()).unwrap_err().to_string();
    assert!(refused.contains("otherwise than by appending") && refused.contains("SPD_LAYOUT"), "{refused}");
}
