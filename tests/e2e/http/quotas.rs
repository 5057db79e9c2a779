//! What one owner may have, told by its own error, while another owner is served.

use super::tcp;
use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// An answer that goes on until its client leaves, for it does not read.
fn endless(daemon: &Daemon) -> UnixStream {
    let body = json!({ "prompt": "x", "max_tokens": 100_000, "ignore_eos": true, "stream": true });
    let mut stream = daemon.open("/v1/completions", &body);
    assert!(stream.read(&mut [0; 64]).unwrap() > 0);
    stream
}

fn short(daemon: &Daemon, prompt: &str) -> Answer {
    daemon.post("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 2, "ignore_eos": true }))
}

fn refused(answer: &Answer) -> (u16, Value, bool) {
    let is_told_when = answer.head.to_ascii_lowercase().contains("retry-after: ");
    (answer.status, answer.json()["error"]["code"].clone(), is_told_when)
}

/// The status of the same request by the TCP door, where the owner is another one.
fn of_another_owner(port: u16) -> u16 {
    let body = json!({ "prompt": "x", "max_tokens": 2 }).to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n";
    write!(stream, "{head}{}\r\ncontent-length: {}\r\n\r\n{body}", tcp::authorization(), body.len()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn requests_under_way_are_counted_until_their_end_and_for_each_owner_alone() {
    let (daemon, port, _dir) = tcp::start_with(&["limits.per_user_requests=2"]);
    let mut streams = vec![endless(&daemon), endless(&daemon)];
    assert_eq!(refused(&short(&daemon, "x")), (429, json!("too_many_requests"), true));
    assert_eq!(daemon.get("/health").status, 200, "how things are may always be asked");
    assert_eq!(of_another_owner(port), 200);
    streams.pop();
    daemon.wait_until("free", || short(&daemon, "x").status == 200);
}

#[test]
fn a_response_in_the_background_counts_until_it_is_over() {
    let (daemon, port, _dir) = tcp::start_with(&["limits.per_user_requests=2", "model.default.max_context=4096"]);
    let begun = || {
        let body = json!({ "input": "x", "max_output_tokens": 3000, "background": true, "ignore_eos": true });
        daemon.post("/v1/responses", &body)
    };
    let ids = [begun(), begun()].map(|answer| answer.json()["id"].as_str().unwrap().to_owned());
    assert_eq!(refused(&begun()), (429, json!("too_many_requests"), true));
    assert_eq!(of_another_owner(port), 200);
    // Who has all of them under way may still end one.
    assert_eq!(daemon.post(&format!("/v1/responses/{}/cancel", ids[0]), &json!({})).status, 200);
    daemon.wait_until("one is over", || short(&daemon, "x").status == 200);
}

#[test]
fn tokens_that_wait_are_counted_for_each_owner_alone() {
    let sets = ["limits.per_user_queued_tokens=100", "limits.max_running=2", "limits.per_user_running=1"];
    let (daemon, port, _dir) = tcp::start_with(&sets);
    let running = endless(&daemon);
    let body = json!({ "prompt": "y".repeat(90), "max_tokens": 2, "ignore_eos": true });
    let waiting = daemon.open("/v1/completions", &body);
    daemon.wait_until("one waits", || daemon.status()["waiting"] == 1);
    assert_eq!(refused(&short(&daemon, &"z".repeat(11))), (429, json!("user_tokens_full"), true));
    assert_eq!(of_another_owner(port), 200);
    drop(running);
    assert_eq!(read_answer(waiting).unwrap().status, 200);
    assert_eq!(short(&daemon, &"z".repeat(120)).status, 200, "a long prompt alone is taken");
}

#[test]
fn a_request_for_more_of_the_kv_cache_than_an_owner_may_have_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let sets = ["limits.per_user_kv=64KiB", "model.default.max_context=4096"];
    let daemon = Daemon::start(&chatty::write(dir.path()), &sets);
    assert_eq!(refused(&short(&daemon, &"x".repeat(4000))), (429, json!("user_kv_full"), false));
    assert_eq!(short(&daemon, "x").status, 200);
}

#[test]
fn sessions_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["sessions.max_per_user=1"]);
    assert_eq!(daemon.post("/v1/sessions", &json!({})).status, 201);
    assert_eq!(refused(&daemon.post("/v1/sessions", &json!({}))), (429, json!("session_limit"), false));
}

#[test]
fn a_stored_response_that_does_not_begin_leaves_no_session_behind() {
    let sets = ["limits.per_user_queued_tokens=100", "limits.max_running=2", "limits.per_user_running=1"];
    let (daemon, _, _dir) = tcp::start_with(&sets);
    let sessions = || daemon.get("/v1/sessions").json()["data"].as_array().unwrap().len();
    let body = |n: usize| json!({ "input": "y".repeat(n), "store": true, "max_output_tokens": 2, "stream": true });
    let _running = endless(&daemon);
    let waiting = daemon.open("/v1/responses", &body(60));
    daemon.wait_until("one waits", || daemon.status()["waiting"] == 1);
    for in_background in [false, true] {
        let mut body = body(60);
        body["background"] = json!(in_background);
        assert_eq!(refused(&daemon.post("/v1/responses", &body)), (429, json!("user_tokens_full"), true));
        assert_eq!(sessions(), 1, "there is that of the one that waits");
    }
    // Its client leaves before it has begun.
    drop(waiting);
    daemon.wait_until("it is gone", || sessions() == 0);
}

#[test]
fn a_user_with_all_its_connections_is_turned_away_with_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["limits.per_user_connections=8"]);
    let idle: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(daemon.socket()).unwrap()).collect();
    let turned_away = read_answer(UnixStream::connect(daemon.socket()).unwrap()).expect("an answer");
    assert_eq!(refused(&turned_away), (429, json!("too_many_requests"), true));
    drop(idle);
    daemon.wait_until("free", || {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        // It may be closed before all of it is written.
        let _closed = stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").is_err();
        read_answer(stream).is_some_and(|answer| answer.status == 200)
    });
}
