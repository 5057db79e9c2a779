//! The interface is what `packaging/openapi.yaml` says: all paths are there, and schemathesis makes requests of it,
//! right ones and wrong ones.

use super::tcp;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

const VERBS: [&str; 4] = ["get", "post", "patch", "delete"];

fn description() -> PathBuf {
    sparsed_tests::root().join("packaging/openapi.yaml")
}

#[test]
fn schemathesis_finds_nothing_in_the_daemon_that_its_description_does_not_say() {
    let (daemon, port, dir) = tcp::start();
    let python = sparsed_tests::root().join(".venv/python");
    let here = sparsed_tests::root().join("tests/e2e/http");
    let file = dir.path().join("openapi.json");
    let mut narrow = Command::new("python3");
    narrow.env("PYTHONPATH", &python).arg(here.join("narrow.py")).arg(description()).arg(here.join("narrow.yaml"));
    assert!(narrow.arg(&file).status().unwrap().success());
    let mut command = Command::new("python3");
    command.current_dir(dir.path()).env("PYTHONPATH", python).args(["-m", "schemathesis.cli", "run"]).arg(file);
    command.args(["--url", &format!("http://127.0.0.1:{port}"), "--header", &tcp::authorization()]);
    command.args(["--phases", "fuzzing", "--max-examples", "3", "--seed", "1", "--workers", "2"]);
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    command.args(["--checks", checks, "--request-timeout", "60", "--generation-database", "none"]);
    command.args(["--warnings", "off", "--suppress-health-check", "all"]);
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let end: String = said.lines().rev().take(150).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(done.status.success(), "{end}\n{}\n{}", String::from_utf8_lossy(&done.stderr), daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

/// Verbs and paths, as the router has them.
fn routes() -> BTreeSet<String> {
    let text = fs::read_to_string(sparsed_tests::root().join("daemon/surface/src/http/mod.rs")).unwrap();
    let routes = text.split(".route(").skip(1).flat_map(|route| {
        let (_, rest) = route.split_once('"').unwrap();
        let (path, handlers) = rest.split_once('"').unwrap();
        let has = |verb: &&&str| handlers.contains(&format!("{verb}("));
        VERBS.iter().filter(has).map(|verb| format!("{verb} {}", path.replace("{*", "{"))).collect::<Vec<_>>()
    });
    routes.collect()
}

/// The same as the description has them.
fn described() -> BTreeSet<String> {
    let text = fs::read_to_string(description()).unwrap();
    let (_, paths) = text.split_once("\npaths:\n").unwrap();
    let (mut found, mut others, mut path) = (BTreeSet::new(), Vec::new(), "");
    for line in paths.lines() {
        if line.starts_with("  /") {
            path = line.trim().trim_end_matches(':');
        } else if let Some(other) = line.strip_prefix("    $ref: \"#/paths/") {
            others.push((path, other.trim_end_matches('"').replace("~1", "/")));
        } else if let Some(verb) = VERBS.iter().find(|verb| line.starts_with(&format!("    {verb}:"))) {
            found.insert(format!("{verb} {path}"));
        }
    }
    for (path, other) in others {
        let verbs = VERBS.iter().filter(|verb| found.contains(&format!("{verb} {other}")));
        let same: Vec<String> = verbs.map(|verb| format!("{verb} {path}")).collect();
        assert!(!same.is_empty(), "{path} is another name of nothing");
        found.extend(same);
    }
    found
}

#[test]
fn each_path_that_is_served_is_described_and_no_other() {
    let (routes, described) = (routes(), described());
    assert!(routes.len() > 60, "{routes:?}");
    let missing: Vec<_> = routes.difference(&described).collect();
    let more: Vec<_> = described.difference(&routes).collect();
    assert!(missing.is_empty() && more.is_empty(), "not described: {missing:?}; not served: {more:?}");
}
