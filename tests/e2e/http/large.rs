//! What do answers cost that are there as a whole, and whose clients do not read them?

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::Daemon;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A session whose export is longer than what lies between daemon and client.
fn long_session(daemon: &Daemon) -> String {
    let id = daemon.post("/v1/sessions", &json!({})).json()["id"].as_str().unwrap().to_owned();
    let function = json!({ "name": "f", "description": "x".repeat(800_000) });
    let turn = daemon.post(
        "/v1/chat/completions",
        &json!({
            "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2, "session_id": id,
            "tools": [{ "type": "function", "function": function }],
        }),
    );
    assert_eq!(turn.status, 200, "{}", turn.body);
    id
}

/// Asks for a session's export and reads the status of the answer only.
fn unread(daemon: &Daemon, id: &str) -> (String, UnixStream) {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    write!(stream, "GET /v1/sessions/{id}/export HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut status = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status).unwrap();
    (String::from_utf8_lossy(&status[9..]).into_owned(), stream)
}

#[test]
fn large_answers_that_nobody_reads_have_a_bound_and_small_ones_come_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(
        &chatty::write_with_names_of_tools(dir.path()),
        &["limits.body=1MiB", "limits.slow_consumer_s=600"],
    );
    let id = long_session(&daemon);
    let (held, refused): (Vec<_>, Vec<_>) =
        (0..16).map(|_| unread(&daemon, &id)).partition(|(status, _)| status == "200");
    assert!((1..=4).contains(&held.len()), "{} MiB of answers, four at most", held.len());
    assert!(refused.iter().all(|(status, _)| status == "429"));
    let path = format!("/v1/sessions/{id}/export");
    let told = daemon.get(&path);
    assert_eq!((told.status, &told.json()["error"]["code"]), (429, &json!("too_many_bodies")));
    for path in ["/v1/sessions".to_owned(), format!("/v1/sessions/{id}")] {
        assert_eq!(daemon.get(&path).status, 200, "{path}");
    }
    drop(held);
    daemon.wait_until("there is room", || unread(&daemon, &id).0 == "200");
    let mut exported = Vec::new();
    daemon.wait_until("it is taken", || {
        exported = daemon.fetch("GET", &path, &[]).unwrap();
        exported.len() > 800_000
    });
    let made = daemon.fetch("POST", "/v1/sessions/import", &exported).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&made).unwrap()["turns"], 1);
}

#[test]
fn a_client_that_takes_nothing_of_its_answer_loses_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(
        &chatty::write_with_names_of_tools(dir.path()),
        &["limits.body=1MiB", "limits.slow_consumer_s=1"],
    );
    let id = long_session(&daemon);
    let mut held = vec![unread(&daemon, &id)];
    while let Some((status, _)) = held.last()
        && status == "200"
    {
        held.push(unread(&daemon, &id));
    }
    daemon.wait_until("one was let go of", || unread(&daemon, &id).0 == "200");
    let mut rest = Vec::new();
    // It may hear that as an error, or as the end.
    let _broken = held[0].1.read_to_end(&mut rest).is_err();
    assert!(rest.len() < 800_000, "{}", rest.len());
}
