//! A plugin that was compiled with another minor's header: one that has grown by the rules runs, one whose fields were
//! moved is refused. The plugin is the C example, compiled with copies of the header.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_backend::{Plugin, SearchPath};
use sparsed_tests::{logits, tiny::Tiny};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Appends to structs that cross the border each way, to an element of an array and to the table; and a new operator.
const GROWN: &[(&str, &str)] = &[
    ("#define SPD_ABI_MINOR 2u", "#define SPD_ABI_MINOR 3u"),
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

/// The example, compiled with the header after `edits`, staged in a folder of its own.
fn staged(header: &Path, edits: &[(&str, &str)]) -> TempDir {
    let root = sparsed_tests::root();
    let dir = tempfile::tempdir().unwrap();
    let include = dir.path().join("include/sparsed");
    std::fs::create_dir_all(&include).unwrap();
    for file in ["kit.h", "program.h"] {
        std::fs::copy(root.join("abi/include/sparsed").join(file), include.join(file)).unwrap();
    }
    let mut text = std::fs::read_to_string(header).unwrap();
    for (from, to) in edits {
        assert_eq!(text.matches(from).count(), 1, "the header has no single '{from}'");
        text = text.replace(from, to);
    }
    std::fs::write(include.join("plugin.h"), text).unwrap();
    let library = dir.path().join("libsparsed_plugin_minimal.so");
    compile(root, dir.path(), &library);
    let stage = Command::new("sh")
        .current_dir(root)
        .arg("packaging/stage-plugin.sh")
        .args(["minimal".as_ref(), library.as_os_str(), "abi/examples/plugin.toml.in".as_ref()])
        .arg(plugins(&dir))
        .output()
        .unwrap();
    assert!(stage.status.success(), "{}", String::from_utf8_lossy(&stage.stderr));
    dir
}

fn plugins(dir: &TempDir) -> PathBuf {
    let plugins = dir.path().join("plugins");
    std::fs::create_dir_all(&plugins).unwrap();
    plugins
}

fn compile(root: &Path, dir: &Path, library: &Path) {
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]);
    cc.arg(format!("-DPLUGIN_VERSION=\"{}\"", env!("CARGO_PKG_VERSION"))).arg("-Wl,-z,nodelete").arg("-I");
    cc.arg(dir.join("include")).arg(root.join("abi/examples/minimal.c")).arg("-o").arg(library).arg("-lm");
    let built = cc.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
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

fn current() -> PathBuf {
    sparsed_tests::root().join("abi/include/sparsed/plugin.h")
}

#[test]
fn a_plugin_of_the_first_minor_whose_layout_is_kept_runs() {
    runs(&staged(&sparsed_tests::root().join("tests/layout/plugin-0.2.h"), &[]));
}

#[test]
fn a_plugin_of_a_later_minor_runs() {
    runs(&staged(&current(), GROWN));
}

#[test]
fn a_plugin_whose_header_has_a_field_in_the_middle_is_refused() {
    let dir = staged(&current(), MOVED);
    let scan = SearchPath::only(vec![plugins(&dir)]).scan();
    let refused = Plugin::load(scan.select(Some("minimal")).unwrap(), &BTreeMap::new()).unwrap_err().to_string();
    assert!(refused.contains("otherwise than by appending") && refused.contains("SPD_LAYOUT"), "{refused}");
}
