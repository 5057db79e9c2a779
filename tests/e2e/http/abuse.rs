//! What no client should send, and what nobody else should notice.

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Daemon, read_answer};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const PATHS: &[&str] = &[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/tokenize",
    "/detokenize",
    "/v1/sessions",
    "/v1/sessions/import",
];
/// Pieces of requests, right and wrong; a fuzzer of bytes alone would not get past the parser.
const NAMES: &[&str] = &[
    "messages",
    "prompt",
    "input",
    "content",
    "model",
    "max_tokens",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "grammar",
    "stream",
    "options",
    "format",
    "tokens",
    "session_id",
    "previous_response_id",
    "background",
    "store",
    "strict",
    "echo",
    "think",
    "stream_options",
    "keep_alive",
    "images",
    "title",
    "durability",
    "instructions",
    "text",
    "reasoning",
];
const TEXTS: &[&str] = &[
    "default",
    "",
    "x",
    "required",
    "json",
    "start: /(/",
    "start: \"a\"",
    "sess_0",
    "resp_0_0",
    "\u{0}\u{202e}\u{1f980}",
    "<|im_end|>",
    "-1",
    "auto",
    "user",
    "token",
];

fn value(random: &mut fastrand::Rng, depth: u32) -> Value {
    match random.u32(..if depth > 4 { 7 } else { 11 }) {
        0 => Value::Null,
        1 => json!(random.bool()),
        2 => json!(random.i32(-3..40)),
        3 => json!(random.choice([i64::MIN, i64::MAX, 1 << 32, -1]).unwrap()),
        4 => json!(random.choice([-0.5, 1e300, 0.5, 1e-300]).unwrap()),
        5 | 6 => json!(random.choice(TEXTS).unwrap()),
        7 => (0..random.usize(..4)).map(|_| value(random, depth + 1)).collect(),
        8 => json!([{ "role": random.choice(TEXTS).unwrap(), "content": value(random, depth + 1) }]),
        _ => object(random, depth + 1),
    }
}

fn object(random: &mut fastrand::Rng, depth: u32) -> Value {
    (0..random.usize(..6)).map(|_| ((*random.choice(NAMES).unwrap()).to_owned(), value(random, depth))).collect()
}

/// A request that is broken somewhere, or means nothing, or is right by accident; it must not run for long then.
/// Answers too whether less is sent than announced.
fn request(random: &mut fastrand::Rng) -> (Vec<u8>, bool) {
    let path = random.choice(PATHS).unwrap();
    let mut body = object(random, 0);
    if random.bool() {
        body["messages"] = json!([{ "role": "user", "content": value(random, 3) }]);
        body["prompt"] = value(random, 3);
        body["input"] = value(random, 2);
    }
    for name in ["max_tokens", "max_output_tokens", "max_completion_tokens"] {
        body[name] = if random.u32(..8) == 0 { value(random, 5) } else { json!(2) };
    }
    if random.u32(..4) > 0 {
        body["options"] = json!({ "num_predict": 2 });
    }
    body["background"] = json!(false);
    let mut body = body.to_string().into_bytes();
    let method = random.choice(["POST", "POST", "POST", "POST", "GET", "DELETE", "BREW", ""]).unwrap();
    let mut length = body.len();
    let spoilt = random.u32(..12);
    match spoilt {
        0 => body.truncate(random.usize(..=body.len())),
        1 => length = random.usize(..1 << 40),
        2 => body.iter_mut().for_each(|byte| {
            if random.u32(..20) == 0 {
                *byte = random.u8(..)
            }
        }),
        _ => {}
    }
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n");
    match random.u32(..30) {
        0 => bytes += &"x: y\r\n".repeat(random.usize(..300)),
        1 => bytes += &format!("x: {}\r\n", "y".repeat(random.usize(..80_000))),
        2 => bytes += "content-length: 1\r\n",
        3 => bytes += "transfer-encoding: chunked\r\n",
        4 => bytes += "\u{7}\u{ff}: \r\n",
        _ => {}
    }
    let mut bytes = (bytes + "\r\n").into_bytes();
    bytes.extend(body);
    (bytes, spoilt < 2)
}

#[test]
fn ten_thousand_malformed_requests_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(
        &chatty::write(dir.path()),
        &["sessions.max_per_user=20", "limits.body=64KiB", "model.default.max_context=128"],
    );
    let n: u64 = if std::env::var_os("LONG").is_some() { 100_000 } else { 10_000 };
    let first = std::env::var("SEED").map_or(0, |seed| seed.parse::<u64>().unwrap() * 1_000_000);
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let socket = daemon.socket();
            std::thread::spawn(move || {
                let mut statuses = std::collections::BTreeMap::new();
                for seed in (thread..n).step_by(4) {
                    let mut random = fastrand::Rng::with_seed(first + seed);
                    let mut stream = UnixStream::connect(&socket).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    let (bytes, is_short) = request(&mut random);
                    // The daemon may have refused it before all was there.
                    let _refused = stream.write_all(&bytes).is_err();
                    if is_short {
                        // Otherwise it would wait for the rest.
                        let _refused = stream.shutdown(std::net::Shutdown::Write).is_err();
                    }
                    let status = read_answer(stream).map_or(0, |answer| answer.status);
                    *statuses.entry(status).or_insert(0u32) += 1;
                }
                statuses
            })
        })
        .collect();
    let mut statuses = std::collections::BTreeMap::new();
    for thread in threads {
        thread.join().unwrap().into_iter().for_each(|(status, n)| *statuses.entry(status).or_insert(0) += n);
    }
    assert!(statuses.keys().all(|status| *status < 500), "the daemon took the blame: {statuses:?}\n{}", daemon.log());
    assert!(statuses[&400] > 1000, "the fuzzer does not get to where requests are read: {statuses:?}");
    daemon.wait_until("free", || daemon.status()["running"] == 0 && daemon.status()["kv_blocks_used"] == 0);
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 3 });
    assert_eq!(daemon.post("/v1/chat/completions", &chat).status, 200);
}

#[test]
fn slow_clients_take_connections_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    // Bodies on their way count among a user's requests; here all are one user's.
    let daemon = Daemon::start(&chatty::write(dir.path()), &["limits.per_user_requests=256"]);
    let body = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 3 });
    // Heads and bodies that never end.
    let slow: Vec<UnixStream> = (0..200)
        .map(|at| {
            let mut stream = UnixStream::connect(daemon.socket()).unwrap();
            let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 400\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(if at % 2 == 0 { b"x: " } else { b"\r\n{" }).unwrap();
            stream
        })
        .collect();
    for _ in 0..5 {
        assert_eq!(daemon.post("/v1/chat/completions", &body).status, 200);
    }
    drop(slow);
    // Deep and long bodies are refused for what they are.
    let deep = format!("{{\"messages\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(raw(&daemon, &deep), 400);
    let many = json!({ "messages": vec![json!({ "role": "user", "content": "x" }); 10_001] }).to_string();
    assert_eq!(raw(&daemon, &many), 400);
}

fn raw(daemon: &Daemon, body: &str) -> u16 {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    read_answer(stream).unwrap().status
}

#[test]
fn a_prompt_of_eight_mebibytes_stalls_nobody_elses_stream() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["limits.body=9MiB", "model.default.max_context=4096"]);
    let stream = json!({
        "prompt": "x", "max_tokens": 3000, "ignore_eos": true, "stream": true, "temperature": 0,
    });
    let mut reader = daemon.open("/v1/completions", &stream);
    let mut buffer = [0; 4096];
    assert!(reader.read(&mut buffer).unwrap() > 0);
    let large = json!({ "messages": [{ "role": "user", "content": "word ".repeat((8 << 20) / 5) }] }).to_string();
    let socket = daemon.socket();
    let sender = std::thread::spawn(move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
        stream.write_all(format!("{head}content-length: {}\r\n\r\n", large.len()).as_bytes()).unwrap();
        stream.write_all(large.as_bytes()).unwrap();
        let began = Instant::now();
        (read_answer(stream).unwrap(), began.elapsed())
    });
    // Reads while the prompt is worked on; how long was the longest silence?
    let mut longest = Duration::ZERO;
    let mut last = Instant::now();
    while !sender.is_finished() {
        match reader.read(&mut buffer) {
            Ok(0) => reader = daemon.open("/v1/completions", &stream),
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    let (answer, took) = sender.join().unwrap();
    assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (400, json!("context_length_exceeded")));
    // Where there is a core for each; otherwise they share it, and the stream is as fast as that allows.
    assert!(longest < Duration::from_secs(2).max(took / 2), "silent for {longest:?}, the prompt took {took:?}");
}

/// What reaches no handler is answered by hyper: it has a status and no body.
#[test]
fn a_head_that_is_no_head_is_answered_with_a_status_and_the_end_of_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let answer = |head: &str| {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        // It may be refused before all of it is there.
        let _refused = stream.write_all(head.as_bytes()).is_err();
        let answer = read_answer(stream).unwrap();
        assert!(answer.head.to_ascii_lowercase().contains("content-length: 0"), "{}", answer.head);
        assert_eq!(answer.body, "");
        answer.status
    };
    let line = "GET /health HTTP/1.1\r\n";
    let cases = [
        (format!("{line}{}\r\n", "x: y\r\n".repeat(101)), 431),
        (format!("{line}x: {}\r\n\r\n", "y".repeat(70 << 10)), 431),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(70 << 10)), 431),
        ("GET /health\r\n\r\n".to_owned(), 400),
        ("\u{1} / HTTP/1.1\r\n\r\n".to_owned(), 400),
        (format!("{line}no colon\r\n\r\n"), 400),
        (format!("{line}content-length: many\r\n\r\n"), 400),
    ];
    for (head, status) in cases {
        assert_eq!(answer(&head), status, "{}", &head[..head.len().min(60)]);
    }
    assert_eq!(daemon.get("/health").status, 200);
}

/// KiB of the daemon's memory that are no file's.
fn rss(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    ["RssAnon:", "RssShmem:"].iter().map(|name| field(name).trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
}

#[test]
fn three_hundred_clients_that_do_not_read_take_what_is_between_and_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        "limits.max_running=310",
        "limits.max_batched_tokens=310",
        "limits.per_user_running=310",
        "limits.max_waiting=400",
        "limits.slow_consumer_s=600",
    ];
    let daemon = Daemon::start(&chatty::write(dir.path()), &[&sets[..], &["model.default.max_context=2048"]].concat());
    // Alternatives make large events of tokens, which soon fill what is between.
    let endless = json!({
        "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2000, "ignore_eos": true, "stream": true,
        "logprobs": true, "top_logprobs": 20,
    });
    let held: Vec<UnixStream> = (0..300).map(|_| daemon.open("/v1/chat/completions", &endless)).collect();
    let mut seen = Vec::new();
    daemon.wait_until("all paused", || {
        let status = daemon.status();
        seen.push((status["running"].clone(), status["sampled_tokens"].clone()));
        seen.len() > 100 && seen[seen.len() - 100..].iter().all(|one| *one == seen[seen.len() - 1])
    });
    assert_eq!(seen.last().unwrap().0, 300, "none of them was answered to its end");
    let before = rss(&daemon);
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 8 });
    for _ in 0..10 {
        assert_eq!(daemon.post("/v1/chat/completions", &chat).status, 200);
    }
    let grown = rss(&daemon).saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB more than {before}");
    drop(held);
    daemon.wait_until("free", || daemon.status()["running"] == 0 && daemon.status()["kv_blocks_used"] == 0);
}

/// One owner's flood is bounded: what does not fit is told to come again, and who has waited is served.
#[test]
fn a_flood_is_told_to_come_again_and_what_was_taken_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["limits.max_running=2", "limits.max_waiting=8"]);
    let request = |tokens: u32| json!({ "prompt": "x", "max_tokens": tokens, "ignore_eos": true });
    // All that come before the engine looks wait together: two are to run already, then as many again as may wait.
    let mut streams: Vec<UnixStream> = (0..2).map(|_| daemon.open("/v1/completions", &request(2000))).collect();
    daemon.wait_until("two run", || daemon.status()["running"] == 2);
    streams.extend((0..98).map(|_| daemon.open("/v1/completions", &request(60))));
    let statuses: Vec<u16> = streams.into_iter().map(|stream| read_answer(stream).unwrap().status).collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses.iter().filter(|status| **status == 200).count() >= 10, "{statuses:?}");
    assert_eq!(daemon.post("/v1/completions", &request(60)).status, 200);
}
