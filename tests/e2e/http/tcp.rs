//! The door for apps that cannot use a Unix socket.

use serde_json::{Value, json};
use sparsed_tests::daemon::{Answer, Daemon};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
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
    let port = port_of(&daemon.log(), "127.0.0.1");
    (daemon, port, dir)
}

/// Where it listens at this address.
fn port_of(log: &str, address: &str) -> u16 {
    let port = log.split(&format!(" address={address}:")).nth(1).expect("the log names the port");
    port.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
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
fn a_page_of_this_box_may_ask_and_hears_that_before_it_shows_the_key() {
    let (_daemon, port, _dir) = start();
    let page = "host: localhost\r\norigin: http://localhost:3000\r\n";
    let first =
        format!("{page}access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n");
    let allowed = ask(port, "OPTIONS", "/v1/chat/completions", &first, None);
    let head = allowed.head.to_ascii_lowercase();
    assert_eq!(allowed.status, 204, "{head}");
    for line in ["access-control-allow-origin: http://localhost:3000", "access-control-allow-headers: authorization"] {
        assert!(head.contains(line), "{head}");
    }
    let then = format!("{page}authorization: Bearer {HALL}\r\n");
    let models = ask(port, "GET", "/v1/models", &then, None);
    assert!(models.status == 200 && models.head.to_ascii_lowercase().contains("access-control-allow-origin"));
    // It is told apart from who has no key, and nobody else is answered so.
    assert_eq!(ask(port, "GET", "/v1/models", page, None).status, 401);
    let other = first.replace("localhost:3000", "evil.example");
    let refused = ask(port, "OPTIONS", "/v1/chat/completions", &other, None);
    assert!(refused.status == 403 && !refused.head.to_ascii_lowercase().contains("access-control"), "{}", refused.head);
}

#[test]
fn each_address_of_a_list_is_a_door_to_the_same_places() {
    if TcpListener::bind("[::1]:0").is_err() {
        return sparsed_tests::skipped("TCP at several addresses", "this machine has no IPv6");
    }
    let both = r#"tcp.listen=["127.0.0.1:0", "[::1]:0"]"#;
    let (daemon, first, _dir) = start_with(&[both, "limits.per_user_connections=2"]);
    let second = port_of(&daemon.log(), "[::1]");
    let open = |address: (&str, u16)| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(format!("GET /health HTTP/1.1\r\n{}\r\n", with_key(HALL)).as_bytes()).unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).unwrap();
        (stream, String::from_utf8(start.to_vec()).unwrap())
    };
    let kept = [open(("127.0.0.1", first)), open(("::1", second))];
    assert!(kept.iter().all(|(_, start)| start == "HTTP/1.1 200"));
    // They count together, wherever the third one comes in.
    assert_eq!([open(("127.0.0.1", first)).1, open(("::1", second)).1], ["HTTP/1.1 429", "HTTP/1.1 429"]);
    let mut stranger = TcpStream::connect(("::1", second)).unwrap();
    stranger.write_all(b"GET /health HTTP/1.1\r\nhost: [::1]\r\n\r\n").unwrap();
    let mut start = [0; 12];
    stranger.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 401");
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

/// What a client has that says nothing of who it is, and does not come to an end.
fn stranger(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: ").unwrap();
    stream
}

#[test]
fn connections_without_a_key_take_no_place_of_those_with_one() {
    let (_daemon, port, _dir) = start_with(&["limits.connections=4", "limits.per_user_connections=4"]);
    let mut strangers: Vec<TcpStream> = (0..70).map(|_| stranger(port)).collect();
    for _ in 0..3 {
        assert_eq!(ask(port, "GET", "/v1/models", &with_key(HALL), None).status, 200);
        strangers.extend((0..10).map(|_| stranger(port)));
    }
    // The oldest have gone for them: what they read is the end, or that their head came too late.
    let mut nothing = [0];
    assert!(matches!(strangers[0].read(&mut nothing), Ok(0) | Err(_)));
    // A key that is wrong makes nobody known, and one connection that is known stays beside any number of others.
    let mut known = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut asked = |head: &str| {
        known.write_all(format!("GET /health HTTP/1.1\r\n{head}\r\n").as_bytes()).unwrap();
        let mut start = [0; 12];
        known.read_exact(&mut start).unwrap();
        let mut rest = String::new();
        while !rest.ends_with('}') {
            let mut byte = [0];
            known.read_exact(&mut byte).unwrap();
            rest.push(byte[0].into());
        }
        String::from_utf8(start.to_vec()).unwrap()
    };
    assert_eq!(asked(&with_key(HALL)), "HTTP/1.1 200");
    strangers.extend((0..80).map(|_| stranger(port)));
    assert_eq!(ask(port, "GET", "/v1/models", &with_key(BATH), None).status, 200);
    assert_eq!(asked(&with_key(HALL)), "HTTP/1.1 200");
}

/// A request whose body is awaited: the daemon has told it to send one.
fn announced(port: u16, key: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = format!("{}expect: 100-continue\r\ncontent-length: 65536\r\n", with_key(key));
    stream.write_all(format!("POST /tokenize HTTP/1.1\r\n{head}\r\n").as_bytes()).unwrap();
    let mut start = [0; 25];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream
}

#[test]
fn the_bodies_of_one_user_that_do_not_come_have_those_of_nobody_else_refused() {
    let (_daemon, port, _dir) = start_with(&["limits.body=64KiB"]);
    // All the memory there is for bodies on their way.
    let mut slow: Vec<TcpStream> = (0..8).map(|_| announced(port, HALL)).collect();
    let body = json!({ "content": "x".repeat(60_000) });
    let mine = ask(port, "POST", "/tokenize", &with_key(HALL), Some(&body));
    assert_eq!((mine.status, mine.json()["error"]["code"].clone()), (429, json!("too_many_bodies")));
    assert_eq!(ask(port, "POST", "/tokenize", &with_key(BATH), Some(&body)).status, 200);
    // The oldest of the others has made room for it, and only that one.
    let mut told = [0; 12];
    slow[0].read_exact(&mut told).unwrap();
    assert_eq!(&told, b"HTTP/1.1 429");
    slow[1].write_all(&[b' '; 65_536 - 15]).unwrap();
    slow[1].write_all(b"{\"content\":\"x\"}").unwrap();
    slow[1].read_exact(&mut told).unwrap();
    assert_eq!(&told, b"HTTP/1.1 200");
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
    assert_eq!(daemon.wait().code(), Some(2));
    assert!(daemon.log().contains("needs API keys"), "{}", daemon.log());
    // Who asks before a start hears the same.
    let mut tool = std::process::Command::new(sparsed_tests::sparsectl());
    let said = tool.args(["config", "check", "--set", "tcp.listen=127.0.0.1:0"]).output().unwrap();
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("needs API keys"), "{said:?}");
}
