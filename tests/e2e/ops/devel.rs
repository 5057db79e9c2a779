//! Does what an author of plugins installs build one? As `sparsed-dev` lays it out, and only by what pkg-config says.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap().trim().to_owned()
}

fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap().flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn the_example_is_built_by_what_pkg_config_says() {
    let dir = tempfile::tempdir().unwrap();
    let abi = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../abi"));
    let (made, usr) = (dir.path().join("made"), dir.path().join("usr"));
    run(Command::new(sparsed_tests::sparsectl()).arg("generate").arg(&made));
    copied(&made.join("pkgconfig"), &usr.join("share/pkgconfig"));
    copied(&abi.join("include/sparsed"), &usr.join("include/sparsed"));
    copied(&abi.join("examples"), &usr.join("share/doc/sparsed-dev/examples"));
    let said = |arguments: &[&str]| {
        let mut tool = Command::new("pkg-config");
        tool.arg(format!("--define-variable=prefix={}", usr.display())).args(arguments).arg("sparsed-plugin");
        run(tool.env("PKG_CONFIG_PATH", usr.join("share/pkgconfig")))
    };
    assert_eq!(said(&["--modversion"]), env!("CARGO_PKG_VERSION"));
    // The header is what a plugin is built with, so it says which interface that is.
    let header = fs::read_to_string(abi.join("include/sparsed/plugin.h")).unwrap();
    let number = |name: &str| {
        let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define {name} "))).unwrap();
        line.trim().trim_end_matches('u').to_owned()
    };
    let abi_version = format!("{}.{}", number("SPD_ABI_MAJOR"), number("SPD_ABI_MINOR"));
    assert_eq!(said(&["--variable=abi_version"]), abi_version);
    let flags = said(&["--cflags"]);
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-pthread"]);
    compiler.arg("-DPLUGIN_VERSION=\"0.1.0\"").args(flags.split_whitespace());
    compiler.arg(usr.join("share/doc/sparsed-dev/examples/minimal.c")).arg("-o").arg(dir.path().join("minimal.so"));
    run(compiler.arg("-lm"));
    assert!(dir.path().join("minimal.so").exists());
}
