//! Bad plugins and bad models are refused with the file and the reason, never a crash.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use std::path::Path;
use std::process::{Command, Output};

fn run(model: &Path, plugins: Option<&Path>) -> Output {
    let mut command = Command::new(sparsed_tests::sparsectl());
    command.arg("run").arg(model);
    if let Some(dir) = plugins {
        command.args(["--plugin", "other", "--plugins-dir"]).arg(dir);
    }
    command.arg("x").output().unwrap()
}

/// Runs with a plugin `other` whose library is compiled from `source`; answers what was said.
fn with_plugin(source: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("other");
    std::fs::create_dir(&folder).unwrap();
    let (c, library) = (dir.path().join("p.c"), folder.join("p.so"));
    std::fs::write(&c, source).unwrap();
    let include = sparsed_tests::root().join("abi/include");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-I"]).arg(include).arg("-o").arg(&library).arg(&c);
    let built = cc.status().unwrap();
    assert!(built.success());
    let sum = Command::new("sha256sum").arg(&library).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap()[..64].to_owned();
    let arch = std::env::consts::ARCH;
    let manifest = format!(
        "manifest_version = 1\nid = \"other\"\nversion = \"1\"\nlicense = \"MIT\"\n[abi]\nmajor = [0]\n\
         arch = \"{arch}\"\n[[library]]\npath = \"p.so\"\nscore = 1\nsha256 = \"{sum}\"\n"
    );
    std::fs::write(folder.join("plugin.toml"), manifest).unwrap();
    let chmod = Command::new("chmod").args(["-R", "go-w"]).arg(dir.path()).status().unwrap();
    assert!(chmod.success());
    // Models are looked at first: a plugin is loaded when there is one to serve.
    let done = run(&sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf"), Some(dir.path()));
    assert_eq!(done.status.code(), Some(1));
    String::from_utf8(done.stderr).unwrap()
}

#[test]
fn a_library_without_the_entry_symbol_is_named() {
    let said = with_plugin("int nothing;");
    assert!(said.contains("p.so") && said.contains("spd_get_api"), "{said}");
}

#[test]
fn another_abi_version_is_named() {
    let said = with_plugin("const void *spd_get_api(unsigned a, unsigned b) { (void)a; (void)b; return 0; }");
    assert!(said.contains("p.so") && said.contains("ABI"), "{said}");
    let older = "static unsigned t[512] = {2048, 1}; const void *spd_get_api(unsigned a, unsigned b) { return t; }";
    let said = with_plugin(older);
    assert!(said.contains("0.1"), "{said}");
}

#[test]
fn a_table_with_holes_is_named() {
    let holes = "#include <sparsed/plugin.h>\nstatic const spd_api t = {.struct_size = sizeof t, \
        .abi_minor = SPD_ABI_MINOR, .layout = SPD_LAYOUT};\nconst spd_api *spd_get_api(uint32_t a, uint32_t b) \
        { (void)a; (void)b; return &t; }";
    let said = with_plugin(holes);
    assert!(said.contains("instance_create"), "{said}");
}

#[test]
fn without_the_plugin_the_places_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let done = run(Path::new("absent.gguf"), Some(dir.path()));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.code() == Some(1) && said.contains(&dir.path().display().to_string()), "{said}");
}

#[test]
fn damaged_models_are_refused_with_a_reason() {
    let model = std::fs::read(sparsed_tests::model("smollm2-135m-dsa.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let refused = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let done = run(&file, None);
        assert_eq!(done.status.code(), Some(1), "neither a crash nor a success");
        String::from_utf8(done.stderr).unwrap()
    };
    assert!(refused(&model[..model.len() / 2]).contains("truncated"));
    assert!(refused(&[]).contains("truncated"));
    assert!(refused(b"not a model at all").contains("not a GGUF file"));
    let mut flipped = model.clone();
    let at = model.windows(27).position(|w| w == b"deepseek32.attention.scale\x06").unwrap();
    flipped[at + 30..at + 34].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(refused(&flipped).contains("attention.scale"));
}
