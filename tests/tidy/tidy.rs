//! The house rules that a machine can check.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Who may import whom; `sparsed-tests` may import anything.
const ARROWS: &[(&str, &[&str])] = &[
    ("sparsed-abi", &[]),
    ("sparsed-quant", &[]),
    ("sparsed-rowcache", &[]),
    ("sparsed-plugin-kit", &["sparsed-abi", "sparsed-rowcache"]),
    ("sparsed-plugin-cpu", &["sparsed-plugin-kit", "sparsed-abi", "sparsed-quant"]),
    ("sparsed-plugin-cuda", &["sparsed-plugin-kit", "sparsed-abi"]),
    // Shares nothing with what it tests.
    ("sparsed-fake-cuda", &[]),
    ("sparsed-kv", &[]),
    ("sparsed-session", &[]),
    ("sparsed-sim", &["sparsed-session", "sparsed-engine", "sparsed-kv", "sparsed-rowcache"]),
    // The oracle shares the reader of files with the product, and nothing else.
    ("sparsed-oracle", &["sparsed-quant"]),
    ("sparsed-faulty", &["sparsed-abi"]),
    // What runs in a process of its own stands behind the same table as a plugin, made by the same kit.
    ("sparsed-backend", &["sparsed-abi", "sparsed-plugin-kit"]),
    ("sparsed-conform", &["sparsed-abi", "sparsed-backend", "sparsed-quant"]),
    ("sparsed-model", &["sparsed-quant", "sparsed-abi"]),
    ("sparsed-engine", &["sparsed-kv", "sparsed-session", "sparsed-model", "sparsed-backend", "sparsed-abi"]),
    ("sparsed-surface", &["sparsed-engine"]),
    // Behind a trait of the engine's: only the daemon knows that it is there.
    ("sparsed-upstream", &["sparsed-engine"]),
    (
        "sparsed",
        // sparsed-conform is the one part of the tests that the product ships: `sparsectl conform`.
        &[
            "sparsed-surface",
            "sparsed-upstream",
            "sparsed-engine",
            "sparsed-model",
            "sparsed-backend",
            "sparsed-kv",
            "sparsed-quant",
            "sparsed-session",
            "sparsed-conform",
        ],
    ),
];

fn files(extension: &str) -> Vec<PathBuf> {
    let root = sparsed_tests::root();
    let listed =
        Command::new("git").arg("-C").arg(root).args(["ls-files", "-co", "--exclude-standard"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    listed.lines().filter(|name| name.ends_with(extension)).map(|name| root.join(name)).filter(|p| p.exists()).collect()
}

/// An import that is not in the list of arrows.
fn bad_arrow(from: &str, to: &str) -> bool {
    from != "sparsed-tests" && !ARROWS.iter().any(|(name, may)| *name == from && may.contains(&to))
}

/// Lines before the tests of a file.
fn code_lines(text: &str) -> usize {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines().count()
}

/// The first line that is wider than 120 columns and could be broken: string literals are left whole.
fn wide_line(text: &str) -> Option<usize> {
    text.lines().position(|line| line.chars().count() > 120 && !line.contains('"')).map(|at| at + 1)
}

#[test]
fn crates_import_along_the_arrows() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(sparsed_tests::root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() >= ARROWS.len());
    let mut used = Vec::new();
    for package in packages {
        let from = package["name"].as_str().unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            assert!(!to.starts_with("sparsed") || !bad_arrow(from, to), "{from} imports {to}");
            used.push((from, to));
        }
    }
    for (from, may) in ARROWS {
        may.iter().for_each(|to| assert!(used.contains(&(*from, *to)), "{from} may import {to} and does not"));
    }
}

/// The rules of `deny.toml` that need no network: every crate comes from the registry or is ours, and may be used.
#[test]
fn every_dependency_has_an_allowed_licence_and_source() {
    let root = sparsed_tests::root();
    let rules: toml::Table = std::fs::read_to_string(root.join("deny.toml")).unwrap().parse().unwrap();
    let allowed: Vec<String> = rules["licenses"]["allow"].clone().try_into().unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform"])
        .arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH)) // what a build here has fetched
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or_default());
        assert!(may_be_used(licence, &allowed), "{name}: licence '{licence}' is not allowed by deny.toml");
        let source = package["source"].as_str();
        let from_registry = source.is_none_or(|source| source.starts_with("registry+"));
        assert!(from_registry, "{name} comes from {source:?}");
    }
}

fn may_be_used(licence: &str, allowed: &[String]) -> bool {
    // Some older crates write "/" for OR.
    let Ok(expression) = spdx::Expression::parse(&licence.replace('/', " OR ")) else { return false };
    expression.evaluate(|requirement| allowed.iter().any(|name| *name == requirement.to_string()))
}

/// A nearer clippy.toml replaces the root's, so it must repeat it.
#[test]
fn every_clippy_toml_has_the_roots_keys() {
    let root = std::fs::read_to_string(sparsed_tests::root().join("clippy.toml")).unwrap();
    let nearer: Vec<PathBuf> = files("/clippy.toml");
    assert!(nearer.len() >= 3);
    for path in nearer {
        let text = std::fs::read_to_string(&path).unwrap();
        root.lines().for_each(|line| assert!(text.contains(line), "{}: '{line}' is missing", path.display()));
    }
}

#[test]
fn files_are_short_and_narrow() {
    let all = files(".rs");
    assert!(all.len() > 40);
    for path in all {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(code_lines(&text) <= 400, "{}: {} lines", path.display(), code_lines(&text));
        assert_eq!(wide_line(&text), None, "{}: a wide line", path.display());
    }
}

/// Functions that are longer than `limit` lines without blanks and comments: their first lines, from 1.
/// In formatted code a function ends at the brace under its first letter.
fn long_functions(text: &str, limit: usize) -> Vec<usize> {
    let lines: Vec<&str> = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let is_function = |line: &str| {
        let words = line.split_whitespace();
        let mut words = words.skip_while(|word| {
            word.starts_with("pub") || ["async", "const", "unsafe", "extern", "\"C\""].contains(word)
        });
        words.next() == Some("fn")
    };
    let counts = |line: &&&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
    let starts = lines.iter().enumerate().filter(|(_, line)| is_function(line) && !line.ends_with(';'));
    let long = starts.filter(|(start, line)| {
        let ends = |other: &&str| other.trim() == "}" && indent(other) == indent(line);
        let length = lines[*start..].iter().position(ends).unwrap_or(0);
        lines[*start..=*start + length].iter().filter(counts).count() > limit
    });
    long.map(|(start, _)| start + 1).collect()
}

#[test]
fn functions_are_short() {
    for path in files(".rs") {
        let text = std::fs::read_to_string(&path).unwrap();
        // The signature and the closing brace are not counted by the rule, nor by clippy.
        let long = long_functions(&text, 70 + 2);
        assert!(long.is_empty(), "{}: functions of more than 70 lines at {long:?}", path.display());
    }
}

#[test]
fn crates_without_hardware_forbid_unsafe_code() {
    let safe = [
        "quant",
        "plugins/rowcache",
        "daemon/kv",
        "daemon/session",
        "daemon/engine",
        "daemon/surface",
        "daemon/upstream",
        "daemon/app",
        "tests/oracle",
        "tests/sim",
    ];
    for name in safe {
        let text = std::fs::read_to_string(sparsed_tests::root().join(name).join("src/lib.rs")).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name}");
    }
}

#[test]
fn no_file_is_large_but_the_indexer() {
    for path in files("") {
        let size = std::fs::metadata(&path).unwrap().len();
        let indexer = path.ends_with(Path::new("packaging/models/smollm2-135m-indexer.safetensors"));
        assert!(size <= 1 << 20 || indexer, "{}: {size} bytes", path.display());
    }
}

#[test]
fn the_checks_can_fail() {
    assert!(bad_arrow("sparsed-plugin-cpu", "sparsed-engine") && bad_arrow("sparsed-kv", "sparsed-backend"));
    assert_eq!(code_lines("a\nb\n#[cfg(test)]\nmod tests {\n}"), 2);
    assert_eq!(wide_line(&format!("a\n{}", "x".repeat(121))), Some(2));
    let body = "    let x = 1;\n".repeat(5);
    assert_eq!(long_functions(&format!("// first\npub fn f() {{\n{body}}}\nfn g() {{}}\n"), 6), [2]);
    assert_eq!(
        long_functions(&format!("pub(crate) async fn f() {{\n{body}    // why\n\n}}\n"), 7),
        Vec::<usize>::new()
    );
    let mit = ["MIT".to_owned()];
    assert!(may_be_used("MIT/Apache-2.0", &mit) && may_be_used("(MIT OR GPL-3.0-only)", &mit));
    assert!(!may_be_used("GPL-3.0-only", &mit) && !may_be_used("MIT AND Zlib", &mit) && !may_be_used("", &mit));
}
