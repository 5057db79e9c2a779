//! What does the log call a request? By a name that its client has heard too, whatever interface it speaks.

use serde_json::json;
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon};

/// What a client has heard.
fn name(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let line = answer.head.lines().find_map(|line| line.strip_prefix("x-request-id: "));
    line.unwrap_or_else(|| panic!("no name in {}", answer.head)).trim().to_owned()
}

#[test]
fn each_request_has_a_name_that_its_client_hears_and_the_log_shows() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::spawn(Some(&chatty::write(dir.path())), &["memory.budget=8MiB"]).ready();
    let messages = json!([{ "role": "user", "content": "Hello!" }]);
    let chat = json!({ "messages": messages, "max_tokens": 4 });
    let ollamas = |stream: bool| json!({ "model": "default", "messages": messages, "stream": stream, "options": { "num_predict": 4 } });
    let generate = json!({ "model": "default", "prompt": "Hello!", "options": { "num_predict": 4 } });
    let asked = [
        ("chatcmpl-", daemon.post("/v1/chat/completions", &chat)),
        ("ollama-", daemon.post("/api/chat", &ollamas(false))),
        ("ollama-", daemon.post("/api/chat", &ollamas(true))),
        ("ollama-", daemon.post("/api/generate", &generate)),
    ];
    for (kind, answer) in &asked {
        let name = name(answer);
        assert!(name.starts_with(kind), "{name}");
        let line = format!("request answered request={name} ");
        daemon.wait_until("in the log", || daemon.log().contains(&line));
    }
}
