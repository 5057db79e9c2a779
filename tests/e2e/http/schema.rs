//! The interface is what `packaging/openapi.yaml` says: schemathesis makes requests of it, right ones and wrong ones.

use super::tcp;
use std::process::Command;

#[test]
fn schemathesis_finds_nothing_in_the_daemon_that_its_description_does_not_say() {
    let (daemon, port, dir) = tcp::start();
    let python = sparsed_tests::root().join(".venv/python");
    let file = sparsed_tests::root().join("packaging/openapi.yaml");
    let mut command = Command::new("python3");
    command.current_dir(dir.path()).env("PYTHONPATH", python).args(["-m", "schemathesis.cli", "run"]).arg(file);
    command.args(["--url", &format!("http://127.0.0.1:{port}"), "--header", &tcp::authorization()]);
    command.args(["--phases", "fuzzing", "--max-examples", "3", "--seed", "1", "--workers", "2"]);
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    command.args(["--checks", checks, "--request-timeout", "60", "--generation-database", "none"]);
    // What is not there yet, and models that others install, are server errors by their status.
    for path in ["/api/pull", "/slots", "/infill", "/rerank", "/lora-adapters"] {
        command.args(["--exclude-path", path]);
    }
    command.args(["--warnings", "off", "--suppress-health-check", "all"]);
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let end: String = said.lines().rev().take(150).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(done.status.success(), "{end}\n{}\n{}", String::from_utf8_lossy(&done.stderr), daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}
