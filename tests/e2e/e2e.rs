//! The real daemon, as an app on the box meets it.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

const FRANCE: &str = "The capital of France is Paris.";

fn default_model() -> std::path::PathBuf {
    sparsed_tests::model("smollm2-135m-dsa.gguf")
}

fn question(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "temperature": 0 })
}

fn content(answer: &Answer) -> String {
    answer.json()["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}

/// A request that would go on for a long time.
fn endless() -> Value {
    json!({ "prompt": [504, 3575, 282], "max_tokens": 8000, "ignore_eos": true, "stream": true, "temperature": 0 })
}

#[test]
fn the_openai_client_is_served() {
    let daemon = Daemon::start(&default_model(), &[]);
    let python = sparsed_tests::root().join(".venv/python");
    assert!(python.exists(), "{} is not there: run `make test`", python.display());
    let script = sparsed_tests::root().join("tests/e2e/openai_client.py");
    let done = Command::new("python3").env("PYTHONPATH", python).arg(script).arg(daemon.socket()).output().unwrap();
    assert!(done.status.success(), "{}\n{}", String::from_utf8_lossy(&done.stderr), daemon.log());
}

#[test]
fn rows_in_8_bits_take_little_more_than_half_the_memory_answer_and_come_back_from_a_sessions_file() {
    let sets = ["model.default.kv_dtype=q8_0"];
    let mut daemon = Daemon::start(&default_model(), &sets);
    // 30 layers, each with rows of 384 values and an index row of 64: 12 and 2 blocks of 34 bytes. In f16 it is 25,080.
    assert_eq!(daemon.get("/v1/models").json()["data"][0]["meta"]["kv_bytes_per_token"], 30 * (12 + 2) * 34);
    let chat = "/v1/chat/completions";
    // As in f16. Where the first two tokens are nearly as likely it may say something else, of France for example.
    let sum = content(&daemon.post(chat, &question("What is 2 + 2?")));
    assert_eq!(sum, "The answer to this classic math problem is 4.");
    let id = daemon.post("/v1/sessions", &json!({})).json()["id"].clone();
    let turn = |text: &str| {
        let messages = json!([{ "role": "user", "content": text }]);
        json!({ "session_id": id, "messages": messages, "temperature": 0, "max_tokens": 16 })
    };
    let story = "A baker in Lyon bakes bread of rye and of wheat. ".repeat(20);
    assert!(!content(&daemon.post(chat, &turn(&story))).is_empty());
    let before = daemon.post(chat, &turn("Where does the baker live?"));
    assert_eq!(
        daemon.post(&format!("/v1/sessions/{}/truncate", id.as_str().unwrap()), &json!({ "turns": 1 })).status,
        200
    );
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    daemon.restart(&sets);
    let after = daemon.post(chat, &turn("Where does the baker live?"));
    assert_eq!(content(&after), content(&before), "log:\n{}", daemon.log());
    let cached = after.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached >= Some(192), "{cached:?} tokens came from the file");
}

#[test]
fn a_client_that_goes_away_mid_stream_frees_its_sequence_and_blocks() {
    let daemon = Daemon::start(&default_model(), &[]);
    let mut stream = daemon.open("/v1/completions", &endless());
    let mut some = [0; 1024];
    stream.read_exact(&mut some).unwrap();
    daemon.wait_until("running", || daemon.status()["kv_blocks_used"].as_u64() > Some(0));
    drop(stream);
    daemon.wait_until("free", || {
        let status = daemon.status();
        status["running"] == 0 && status["kv_blocks_used"] == 0
    });
}

#[test]
fn a_client_that_goes_away_before_its_answer_frees_its_place() {
    let daemon = Daemon::start(&default_model(), &[]);
    let mut request = endless();
    request["stream"] = json!(false);
    let stream = daemon.open("/v1/completions", &request);
    daemon.wait_until("running", || daemon.status()["running"] == 1);
    drop(stream);
    daemon.wait_until("free", || daemon.status()["kv_blocks_used"] == 0);
}

#[test]
fn eight_chats_share_steps_and_each_gets_the_answer_it_gets_alone() {
    let daemon = Daemon::start(&default_model(), &[]);
    let questions: Vec<Value> = (1..=8)
        .map(|n| {
            let mut question = question(&format!("Write a sentence about the number {n}."));
            question["max_tokens"] = json!(24);
            question
        })
        .collect();
    let steps = || daemon.status()["steps"].as_u64().unwrap();
    let before = steps();
    let alone: Vec<String> = questions.iter().map(|q| content(&daemon.post("/v1/chat/completions", q))).collect();
    let between = steps();
    let streams: Vec<_> = questions.iter().map(|q| daemon.open("/v1/chat/completions", q)).collect();
    let together: Vec<String> = streams.into_iter().map(|stream| content(&read_answer(stream).unwrap())).collect();
    assert_eq!(together, alone);
    assert!(alone.iter().all(|text| text.len() > 10), "{alone:?}");
    let (one_by_one, shared) = (between - before, steps() - between);
    assert!(shared * 3 < one_by_one, "{one_by_one} steps alone, {shared} together");
}

#[test]
fn a_prompt_over_the_context_is_a_400_that_names_both_numbers() {
    let daemon = Daemon::start(&default_model(), &["model.default.max_context=100"]);
    let answer = daemon.post("/v1/chat/completions", &question(&"word ".repeat(150)));
    let error = &answer.json()["error"];
    assert_eq!((answer.status, error["code"].as_str()), (400, Some("context_length_exceeded")));
    let message = error["message"].as_str().unwrap();
    let have: u32 = message.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!(have > 150 && message.contains("100"), "{message}");
}

#[test]
fn a_prompt_of_several_steps_is_answered_as_in_one() {
    let long = format!("{} What is the capital of France?", "The sun is warm. ".repeat(120));
    let small = Daemon::start(&default_model(), &["limits.max_batched_tokens=64"]);
    let large = Daemon::start(&default_model(), &["limits.max_batched_tokens=2048"]);
    let mut request = question(&long);
    request["max_tokens"] = json!(24);
    let answers = [small, large].map(|daemon| daemon.post("/v1/chat/completions", &request));
    assert!(answers[0].json()["usage"]["prompt_tokens"].as_u64() > Some(500), "{}", answers[0].body);
    assert!(!content(&answers[0]).is_empty());
    assert_eq!(content(&answers[0]), content(&answers[1]));
}

#[test]
fn bad_bodies_get_an_openai_error_and_harm_nobody() {
    let daemon = Daemon::start(&default_model(), &["limits.body=4096"]);
    let bodies = [
        (json!({ "messages": "x" }), 400),
        (json!({ "messages": [{ "role": "user", "content": 5 }] }), 400),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "temperature": "hot" }), 400),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": -2 }), 400),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "model": "nothing" }), 404),
        (json!([]), 400),
        (question(&"x".repeat(5000)), 413),
    ];
    for (body, status) in bodies {
        let answer = daemon.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert!(answer.json()["error"]["message"].is_string(), "{}", answer.body);
    }
    assert_eq!(daemon.post("/v1/completions", &json!({ "prompt": [49152] })).status, 400);
    assert_eq!(content(&daemon.post("/v1/chat/completions", &question("What is the capital of France?"))), FRANCE);
}

#[test]
fn too_many_requests_are_told_when_to_come_again() {
    let daemon = Daemon::start(&default_model(), &["limits.max_running=1", "limits.max_waiting=1"]);
    let running = daemon.open("/v1/completions", &endless());
    daemon.wait_until("running", || daemon.status()["running"] == 1);
    let waiting = daemon.open("/v1/completions", &endless());
    daemon.wait_until("waiting", || daemon.status()["waiting"] == 1);
    let refused = daemon.post("/v1/completions", &endless());
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.head.to_ascii_lowercase().contains("retry-after: 1"), "{}", refused.head);
    drop((running, waiting));
}

#[test]
fn a_daemon_that_is_told_to_stop_ends_running_answers_first() {
    let mut daemon = Daemon::start(&default_model(), &[]);
    let mut request = question("Count to five.");
    request["max_tokens"] = json!(32);
    let stream = daemon.open("/v1/chat/completions", &request);
    daemon.wait_until("running", || daemon.status()["running"] == 1);
    daemon.signal("TERM");
    let answer = read_answer(stream).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(!content(&answer).is_empty());
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket().exists(), "the socket is left behind");
}

#[test]
fn an_answer_that_takes_too_long_to_stop_says_so() {
    let mut daemon = Daemon::start(&default_model(), &["limits.stop_s=0"]);
    let stream = daemon.open("/v1/completions", &endless());
    daemon.wait_until("running", || daemon.status()["running"] == 1);
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    let answer = read_answer(stream).unwrap();
    assert!(!answer.body.contains("[DONE]"), "an endless answer cannot have ended");
}

#[test]
fn a_daemon_with_every_connection_taken_can_be_stopped() {
    let mut daemon = Daemon::start(&default_model(), &["limits.connections=2", "limits.stop_s=1"]);
    let idle: Vec<_> = (0..3).map(|_| UnixStream::connect(daemon.socket()).unwrap()).collect();
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    drop(idle);
}

#[test]
fn a_body_that_is_announced_too_large_is_refused_before_it_comes() {
    let daemon = Daemon::start(&default_model(), &[]);
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let answer = read_answer(stream).unwrap();
    assert_eq!(answer.status, 413, "{}", answer.body);
    assert!(answer.body.contains("limits.body"), "{}", answer.body);
}

#[test]
fn nothing_is_ready_before_every_model_is_loaded() {
    let second = format!("model.second.path={}", default_model().display());
    let daemon = Daemon::spawn(Some(&default_model()), &[&second]);
    daemon.wait_until("listening", || daemon.socket().exists() && UnixStream::connect(daemon.socket()).is_ok());
    let first = daemon.get("/health");
    let states = daemon.get("/v1/status").json();
    let ready = states["models"].as_array().unwrap().iter().all(|model| model["state"] == "ready");
    assert!(ready || first.status == 503, "healthy while a model is loading: {states}");
    assert!(first.status == 200 || first.json()["status"] == "loading", "{}", first.body);
    daemon.wait_until("ready", || daemon.get("/health").status == 200);
    assert_eq!(daemon.get("/v1/models").json()["data"].as_array().map(Vec::len), Some(2));
}

#[test]
fn ctrl_c_in_a_chat_stops_the_answer_and_not_the_conversation() {
    let root = sparsed_tests::root();
    let mut command = Command::new("python3");
    command.arg(root.join("tests/e2e/interrupt.py")).arg("packaging/chat.sh").arg(default_model());
    let done = command.current_dir(root).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let first = Daemon::start(&default_model(), &[]);
    let mut second = Daemon::spawn(None, &[&format!("state_dir={}", first.state_dir().display())]);
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.log().contains("another sparsed uses the state folder"), "{}", second.log());
}

#[test]
fn a_daemon_that_cannot_serve_says_which_file_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken.gguf");
    std::fs::write(&broken, &std::fs::read(default_model()).unwrap()[..1 << 20]).unwrap();
    let mut broken = Daemon::spawn(Some(&broken), &[]);
    assert_eq!(broken.wait().code(), Some(1));
    assert!(broken.log().contains("broken.gguf"), "{}", broken.log());

    let mut no_plugin = Daemon::spawn(Some(&default_model()), &["engine.plugin=nothing"]);
    assert_eq!(no_plugin.wait().code(), Some(1));
    assert!(no_plugin.log().contains("no usable plugin 'nothing'"), "{}", no_plugin.log());

    let mut typo = Daemon::spawn(Some(&default_model()), &["limits.max_runing=1"]);
    assert_eq!(typo.wait().code(), Some(2));
    assert!(typo.log().contains("did you mean 'limits.max_running'"), "{}", typo.log());
}

#[test]
fn the_tool_asks_the_daemon() {
    let daemon = Daemon::start(&default_model(), &[]);
    let tool = |arguments: &[&str]| {
        let mut command = Command::new(sparsed_tests::sparsectl());
        let done = command.args(arguments).arg("--socket").arg(daemon.socket()).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    assert_eq!(tool(&["run", "--temperature", "0", "What is the capital of France?"]), format!("{FRANCE}\n"));
    let json: Value =
        serde_json::from_str(&tool(&["chat", "default", "Say hi.", "--json", "--max-tokens", "3"])).unwrap();
    assert_eq!(json["usage"]["completion_tokens"], 3);
    assert!(tool(&["status"]).contains("ready"));
    let models: Value = serde_json::from_str(&tool(&["models", "--json"])).unwrap();
    assert_eq!(models[0]["detail"]["meta"]["top_k"], 512);
}

#[test]
fn models_without_a_tokenizer_go_on_from_token_ids() {
    for file in ["model.gguf", ""] {
        let model = sparsed_tests::root().join("tests/golden/tiny/v32").join(file);
        let daemon = Daemon::start(&model, &[]);
        let request = json!({ "prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0 });
        let choice = daemon.post("/v1/completions", &request).json()["choices"][0].clone();
        assert_eq!((choice["tokens"].as_array().map(Vec::len), &choice["finish_reason"]), (Some(5), &json!("length")));
        let refused = daemon.post("/v1/chat/completions", &question("Hi"));
        assert!(refused.status == 400 && refused.body.contains("no tokenizer"), "{}", refused.body);
    }
}

#[test]
fn a_base_model_runs_as_dense_mla_and_says_so() {
    let daemon = Daemon::start(&sparsed_tests::model("SmolLM2-135M-Instruct.Q4_1.gguf"), &[]);
    assert_eq!(daemon.get("/v1/models").json()["data"][0]["meta"]["label"], "dense: no indexer");
    assert_eq!(content(&daemon.post("/v1/chat/completions", &question("What is the capital of France?"))), FRANCE);
}

#[test]
fn the_doctor_finds_a_daemon_well_and_says_what_is_wrong_with_a_configuration() {
    let daemon = Daemon::start(&default_model(), &[]);
    let doctor = |arguments: &[&str]| {
        let mut command = Command::new(sparsed_tests::sparsectl());
        command.args(["doctor", "--json", "--set"]).arg(format!("model.default.path={}", default_model().display()));
        let done = command.args(arguments).output().unwrap();
        let checks: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
        (done.status.success(), checks)
    };
    let of = |checks: &[Value], name: &str| {
        checks.iter().find(|check| check["check"] == name).unwrap()["verdict"].as_str().unwrap().to_owned()
    };
    let socket = daemon.socket();
    let state = format!("state_dir={}", daemon.state_dir().display());
    let (well, checks) = doctor(&["--socket", socket.to_str().unwrap(), "--set", &state]);
    assert!(well, "{checks:?}");
    assert!(["daemon", "model default", "plugin cpu"].iter().all(|name| of(&checks, name) == "ok"), "{checks:?}");
    let (well, checks) = doctor(&["--set", "limits.max_runing=1"]);
    assert!(!well && of(&checks, "configuration") == "fail", "{checks:?}");
}
