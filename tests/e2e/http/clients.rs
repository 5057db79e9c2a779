//! Clients that others have written, unchanged: Ollama's, OpenAI's for responses and for Node, LangChain's, and `llm`.

use super::tcp;
use serde_json::json;
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a script of this folder with the Python clients; answers what it has printed.
fn run(script: &str, socket: &Path, arguments: &[&str], daemon: &Daemon) -> String {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", installed("python")).arg(path(script)).arg(socket).args(arguments);
    told(command, daemon)
}

/// What `make test` has installed below `.venv`.
fn installed(folder: &str) -> PathBuf {
    let folder = sparsed_tests::root().join(".venv").join(folder);
    assert!(folder.exists(), "{} is not there: run `make test`", folder.display());
    folder
}

fn path(script: &str) -> PathBuf {
    sparsed_tests::root().join("tests/e2e/http").join(script)
}

fn told(mut command: Command, daemon: &Daemon) -> String {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}\n{}", String::from_utf8_lossy(&done.stderr), daemon.log());
    String::from_utf8(done.stdout).unwrap().trim().to_owned()
}

#[test]
fn ollamas_client_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=4096"]);
    assert_eq!(run("ollama_client.py", &daemon.socket(), &[], &daemon), "ollama client: ok");
}

#[test]
fn openais_client_for_node_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=4096"]);
    let mut command = Command::new("node");
    command.env("NODE_MODULES", installed("node")).arg(path("openai_client.mjs")).arg(daemon.socket());
    assert_eq!(told(command, &daemon), "openai client for Node: ok");
}

#[test]
fn llama_cpps_assertions_hold_where_the_table_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["model.default.max_context=512", "model.default.aliases=[\"tinyllama-2\", \"code\"]"];
    let daemon = Daemon::start(&chatty::write(dir.path()), &sets);
    let table = sparsed_tests::root().join("packaging/compatibility.md");
    let said = run("llama_cpp_table.py", &daemon.socket(), &[table.to_str().unwrap()], &daemon);
    assert!(said.ends_with("by other tests: ok"), "{said}");
}

#[test]
fn langchain_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=4096"]);
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", installed("clients")).arg(path("langchain_client.py")).arg(daemon.socket());
    assert_eq!(told(command, &daemon), "LangChain: ok");
}

#[test]
fn the_command_llm_is_served() {
    let (daemon, port, _dir) = tcp::start_with(&["model.default.max_context=4096"]);
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", installed("clients")).arg(path("llm_client.py")).args([&port.to_string(), tcp::key()]);
    assert_eq!(told(command, &daemon), "llm: ok");
}

#[test]
fn the_openai_clients_responses_are_served_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=4096"]);
    assert_eq!(run("responses_client.py", &daemon.socket(), &["all"], &daemon), "responses: ok");
}

#[test]
fn after_a_kill_an_answer_in_the_background_goes_on_by_itself_and_another_one_when_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["engine.threads=1", "model.default.max_context=4096"];
    let mut daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &sets);
    let whole = run("responses_client.py", &daemon.socket(), &["whole"], &daemon);
    let asked = daemon.post("/v1/sessions", &json!({ "title": "asked for" })).json();
    let message = json!({ "role": "user", "content": "Hello" });
    let chat = json!({
        "session_id": asked["id"], "messages": [message], "max_tokens": 3000, "ignore_eos": true, "stream": true,
    });
    let mut stream = daemon.open("/v1/chat/completions", &chat);
    stream.read_exact(&mut [0; 2000]).unwrap();
    let started = run("responses_client.py", &daemon.socket(), &["begin"], &daemon);
    daemon.kill_and_restart(&sets);
    assert!(daemon.log().contains("interrupted=2"), "an answer was over before the daemon: {}", daemon.log());
    let state = |title: &str| {
        let list = daemon.get("/v1/sessions").json();
        let found = list["data"].as_array().unwrap().iter().find(|session| session["title"] == title);
        found.unwrap_or_else(|| panic!("{list}"))["state"].as_str().unwrap().to_owned()
    };
    daemon.wait_until("the answer has ended by itself", || state("response") == "idle");
    assert_eq!(state("asked for"), "interrupted");
    let (id, heard) = started.split_once('\n').unwrap();
    assert_eq!(run("responses_client.py", &daemon.socket(), &["finish", id, heard], &daemon), whole);
    let id = asked["id"].as_str().unwrap();
    let answer = daemon.post(&format!("/v1/sessions/{id}/continue"), &json!({})).json();
    assert_eq!(answer["usage"]["completion_tokens"], 3000, "{answer}");
}

#[test]
fn a_response_in_the_background_is_finished_after_the_daemon_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["engine.threads=1", "model.default.max_context=4096"];
    let mut daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &sets);
    // Answers that the same request gets undisturbed, and that the daemon's death cuts.
    let whole = run("responses_client.py", &daemon.socket(), &["whole"], &daemon);
    let started = run("responses_client.py", &daemon.socket(), &["begin"], &daemon);
    daemon.kill_and_restart(&sets);
    assert!(daemon.log().contains("interrupted=1"), "the answer was over before the daemon: {}", daemon.log());
    let (id, heard) = started.split_once('\n').unwrap();
    let said = run("responses_client.py", &daemon.socket(), &["finish", id, heard], &daemon);
    assert_eq!(said, whole);
}
