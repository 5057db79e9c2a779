//! The door for apps that cannot use a Unix socket.

use serde_json::{Value, json};
use sparsed_tests::daemon::{Answer, Daemon};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

const HALL: &str = "hall-key-0123456789";
const BATH: &str = "bath-key-0123456789";

pub(super) fn start() -> (Daemon, u16, tempfile::TempDir) {
    start_with(&[])
}

/// A daemon with this door and these settings, and its port.
pub(super) fn start_with(more: &[&str]) -> (Daemon, u16, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, format!("hall {HALL}\nbath {BATH}\n")).unwrap();
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o600)).unwrap();
    let model = sparsed_tests::chatty::write_with_tools(dir.path());
    let sets = ["tcp.listen=127.0.0.1:0".to_owned(), format!("tcp.keys={}", keys.display())];
    let sets: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let daemon = Daemon::start(&model, &sets);
    let log = daemon.log();
    let port = log.split("tcp=127.0.0.1:").nth(1).expect("the log names the port");
    let port = port.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap();
    (daemon, port, dir)
}

/// The key of one who may come in.
pub(super) fn key() -> &'static str {
    HALL
}

/// The header of one who may come in.
pub(super) fn authorization() -> String {
    format!("Authorization: Bearer {HALL}")
}

fn ask(port: u16, method: &str, path: &str, headers: &str, body: Option<&Value>) -> Answer {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let body = body.map(Value::to_string).unwrap_or_default();
    let head =
        format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

fn with_key(key: &str) -> String {
    format!("host: localhost\r\nauthorization: Bearer {key}\r\n")
}

#[test]
fn only_who_has_a_key_is_served_and_sees_what_is_his() {
    let (daemon, port, _dir) = start();
    let refused = ask(port, "GET", "/v1/models", "host: localhost\r\n", None);
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (401, json!("invalid_api_key")));
    assert!(refused.head.to_ascii_lowercase().contains("www-authenticate: bearer"), "{}", refused.head);
    assert_eq!(ask(port, "GET", "/v1/models", &with_key("wrong-key-0123456789"), None).status, 401);
    assert_eq!(ask(port, "GET", "/v1/models", &with_key(HALL), None).status, 200);
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 3 });
    let answer = ask(port, "POST", "/v1/chat/completions", &with_key(HALL), Some(&chat));
    assert_eq!(answer.status, 200, "{}", answer.body);
    // Sessions are their owner's: the other key's owner does not see them, nor does the Unix socket's.
    let made = ask(port, "POST", "/v1/sessions", &with_key(HALL), Some(&json!({})));
    let path = format!("/v1/sessions/{}", made.json()["id"].as_str().unwrap());
    assert_eq!(ask(port, "GET", &path, &with_key(HALL), None).status, 200);
    assert_eq!(ask(port, "GET", &path, &with_key(BATH), None).status, 404);
    assert_eq!(daemon.get(&path).status, 404);
}

#[test]
fn a_key_with_all_its_connections_gets_no_further_one_and_another_key_does() {
    let (daemon, port, _dir) = start_with(&["limits.per_user_connections=2"]);
    let kept = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(format!("GET /health HTTP/1.1\r\n{}\r\n", with_key(HALL)).as_bytes()).unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        stream
    };
    let kept = [kept(), kept()];
    let refused = ask(port, "GET", "/v1/models", &with_key(HALL), None);
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (429, json!("too_many_requests")));
    assert_eq!(ask(port, "GET", "/v1/models", &with_key(BATH), None).status, 200);
    drop(kept);
    daemon.wait_until("free", || ask(port, "GET", "/v1/models", &with_key(HALL), None).status == 200);
}

#[test]
fn pages_of_other_sites_are_refused_though_they_have_the_key() {
    let (_daemon, port, _dir) = start();
    let key = format!("authorization: Bearer {HALL}\r\n");
    for headers in ["host: evil.example\r\n", "host: localhost\r\norigin: https://evil.example\r\n", ""] {
        let refused = ask(port, "GET", "/v1/models", &format!("{headers}{key}"), None);
        assert!([400, 403].contains(&refused.status), "{headers}: {}", refused.head);
    }
    let page = format!("host: localhost:{port}\r\norigin: http://localhost:{port}\r\n{key}");
    assert_eq!(ask(port, "GET", "/v1/models", &page, None).status, 200);
}

#[test]
fn a_door_without_keys_is_not_opened() {
    let mut daemon = Daemon::spawn(None, &["tcp.listen=127.0.0.1:0"]);
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.log().contains("needs API keys"), "{}", daemon.log());
}
