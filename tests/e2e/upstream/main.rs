//! Models that engines elsewhere compute: another sparsed, and a strict engine that does all that can go wrong.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

mod engine;

use engine::{Engine, KEY, ask, certificates, chat, key_file, relaying, strs, with};
use serde_json::{Value, json};
use sparsed_tests::broker::Broker;
use sparsed_tests::bus::{self, Bus};
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use sparsed_tests::{chatty, sparsectl};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// The chunks of a stream.
fn chunks(answer: &Answer) -> Vec<Value> {
    let data = answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// What is the same of two answers however they came.
fn said(answer: &Answer) -> Value {
    let mut json = answer.json();
    assert_eq!(answer.status, 200, "{}", answer.body);
    for name in ["id", "created", "created_at", "model", "timings"] {
        json[name].take();
    }
    // What an earlier answer left in the prefix cache.
    json.pointer_mut("/usage/prompt_tokens_details/cached_tokens").map(Value::take);
    json
}

/// A sparsed that serves the chatty model over TCP, and one that has it compute its model `big`.
fn two_daemons(dir: &Path) -> (Daemon, Daemon) {
    let keys = dir.join("keys");
    std::fs::write(&keys, format!("relay {KEY}\n")).unwrap();
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o600)).unwrap();
    let sets = ["tcp.listen=127.0.0.1:0".to_owned(), format!("tcp.keys={}", keys.display())];
    let there = Daemon::start(&chatty::write(dir), &strs(&sets));
    let log = there.log();
    let port = log.split(" address=127.0.0.1:").nth(1).expect("the log names the port");
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();
    let sets = [
        format!("model.big.upstream=http://127.0.0.1:{port}/v1"),
        format!("model.big.relay.key_file={}", key_file(dir, KEY)),
    ];
    let here = Daemon::spawn(None, &strs(&sets)).ready();
    (there, here)
}

#[test]
fn another_sparsed_gives_the_same_answers_through_each_interface() {
    let dir = tempfile::tempdir().unwrap();
    let (there, here) = two_daemons(dir.path());
    let both = |path: &str, body: Value| {
        let far = there.post(path, &with(body.clone(), "model", json!("default")));
        let near = here.post(path, &with(body, "model", json!("big")));
        (far, near)
    };
    let bodies = [
        chat("x"),
        with(with(chat("x"), "logprobs", json!(true)), "top_logprobs", json!(2)),
        with(with(chat("x"), "n", json!(2)), "temperature", json!(0.7)),
        with(
            chat("x"),
            "response_format",
            json!({ "type": "json_schema", "json_schema": { "name": "x",
            "schema": { "type": "object", "properties": { "a": { "type": "boolean" } }, "required": ["a"] } } }),
        ),
        with(with(chat("x"), "grammar", json!("start: \"yes\" | \"no\"")), "top_k", json!(5)),
        with(chat("x"), "stop", json!(["e"])),
    ];
    for body in bodies {
        let body = with(body, "seed", json!(7));
        let (far, near) = both("/v1/chat/completions", body.clone());
        assert_eq!(said(&near), said(&far), "{body}");
    }
    let text =
        json!({ "prompt": "ab", "max_tokens": 5, "temperature": 0, "logprobs": 1, "echo": false, "ignore_eos": true });
    let (far, near) = both("/v1/completions", text);
    assert_eq!(said(&near), said(&far));
    let (far, near) = both("/v1/completions", json!({ "prompt": [97, 98], "max_tokens": 5, "temperature": 0 }));
    assert_eq!(said(&near), said(&far));
    let (far, near) = both("/v1/responses", json!({ "input": "Hi", "max_output_tokens": 5, "temperature": 0 }));
    let text = |answer: &Answer| answer.json()["output"][0]["content"][0]["text"].clone();
    assert!(text(&near).as_str().is_some_and(|text| !text.is_empty()) && text(&near) == text(&far), "{}", near.body);
    let (far, near) = both(
        "/api/chat",
        json!({ "messages": [{ "role": "user", "content": "Hi" }], "stream": false, "options": { "num_predict": 5, "temperature": 0 } }),
    );
    assert_eq!(near.json()["message"], far.json()["message"]);
    let (far, near) = both("/v1/chat/completions", with(chat("x"), "stream", json!(true)));
    let deltas = |answer: &Answer| {
        let delta = |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned();
        chunks(answer).iter().map(delta).filter(|text| !text.is_empty()).collect::<Vec<_>>()
    };
    assert!(deltas(&near).len() > 1 && deltas(&near) == deltas(&far), "{}", near.body);
    assert!(near.body.ends_with("data: [DONE]\n\n"));
}

#[test]
fn how_far_a_request_is_elsewhere_is_told_here() {
    let dir = tempfile::tempdir().unwrap();
    let (there, here) = two_daemons(dir.path());
    // Two texts of the same length, so that neither finds the other's prompt.
    let asked = |daemon: &Daemon, model: &str, text: &str| {
        let body = json!({
            "model": model, "messages": [{ "role": "user", "content": text.repeat(100) }], "max_tokens": 12,
            "ignore_eos": true, "stream": true, "return_progress": true, "timings_per_token": true,
        });
        let chunks = chunks(&daemon.post("/v1/chat/completions", &body));
        let read = |chunk: &Value| {
            let told = &chunk["prompt_progress"];
            told.is_object().then(|| ["total", "cache", "processed"].map(|name| told[name].as_u64().unwrap()))
        };
        let predicted = |chunk: &Value| chunk["timings"]["predicted_n"].as_u64();
        let read: Vec<[u64; 3]> = chunks.iter().filter_map(read).collect();
        (read, chunks.iter().filter_map(predicted).collect::<Vec<u64>>())
    };
    let (far, near) = (asked(&there, "default", "a"), asked(&here, "big", "b"));
    for (read, predicted) in [&far, &near] {
        assert!(read.len() > 1 && predicted.len() > read.len() && predicted.is_sorted(), "{far:?} {near:?}");
    }
    assert_eq!((&near.0, near.1.last()), (&far.0, far.1.last()));
}

#[test]
fn a_model_of_another_engine_is_labelled_and_what_needs_its_tokens_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut there, here) = two_daemons(dir.path());
    let listed = here.get("/v1/models").json()["data"][0].clone();
    assert_eq!(
        (&listed["id"], &listed["owned_by"], &listed["upstream"]),
        (&json!("big"), &json!("upstream"), &json!(true))
    );
    assert_eq!(listed["max_model_len"], there.get("/v1/models").json()["data"][0]["max_model_len"]);
    assert_eq!(here.get("/v1/models/big").json()["meta"]["software"], "sparsed");
    let shown = here.post("/api/show", &json!({ "model": "big" })).json();
    assert!(shown["remote_host"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{shown}");
    for (path, body) in [
        ("/v1/sessions", json!({ "model": "big" })),
        ("/tokenize", json!({ "model": "big", "content": "x" })),
        ("/v1/responses", json!({ "model": "big", "input": "x", "store": true })),
    ] {
        let refused = here.post(path, &body);
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("computed_elsewhere")), "{path}");
    }
    assert_eq!(ask(&here, "big").status, 200);
    let status = here.get("/v1/status").json();
    let model = &status["models"][0];
    assert_eq!(
        (&model["state"], &model["upstream"], &status["device"]["state"]),
        (&json!("ready"), &json!(true), &json!("unused"))
    );
    assert!(model["sampled_tokens"].as_u64().unwrap() > 0 && model["running"] == 0, "{model}");
    // Once the engine is gone, a request says so, and so does all that shows models.
    there.signal("KILL");
    there.wait();
    let refused = ask(&here, "big");
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (502, &json!("upstream_unreachable")),
        "{}",
        refused.body
    );
    assert_eq!(here.get("/health").status, 503);
    assert_eq!(here.get("/v1/models").json()["data"][0]["reachable"], false);
    let models = Command::new(sparsectl()).arg("models").arg("--socket").arg(here.socket()).output().unwrap();
    let models = String::from_utf8(models.stdout).unwrap();
    assert!(models.contains("unreachable") && models.contains("computed elsewhere"), "{models}");
}

#[test]
fn what_goes_wrong_elsewhere_becomes_our_own_failures() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let names = [
        "drops", "hangs", "pings", "garbage", "huge", "page", "busy", "refuses", "too_long", "locked", "fails", "gone",
    ];
    let mut short = Vec::new();
    for name in names {
        short.push(format!("model.{name}.relay.first_token_s=2"));
        short.push(format!("model.{name}.relay.retries={}", u8::from(name == "drops")));
    }
    let daemon = relaying(&engine, dir.path(), &names, &strs(&short));
    for (name, status, code, words) in [
        ("drops", 502, "upstream_failed", ""),
        ("hangs", 504, "upstream_timeout", "2 s for the first token"),
        ("pings", 504, "upstream_timeout", "2 s for the first token"),
        ("garbage", 502, "upstream_failed", "no chunk of an answer"),
        ("huge", 502, "upstream_failed", "more than 1048576 bytes"),
        ("page", 502, "upstream_failed", "stream of events"),
        ("busy", 429, "upstream_busy", "in 60 s"),
        ("refuses", 400, "upstream_refused", "must be cheerful"),
        ("too_long", 400, "context_length_exceeded", "4096 tokens"),
        ("locked", 502, "upstream_failed", "does not let this box in"),
        ("fails", 502, "upstream_failed", "header Bearer *** broke me"),
        ("gone", 502, "upstream_failed", ""),
    ] {
        let answer = ask(&daemon, name);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["code"]), (status, &json!(code)), "{name}: {}", answer.body);
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(words) && !message.contains(KEY), "{name}: {message}");
    }
    assert_eq!(ask(&daemon, "refuses").json()["error"]["param"], "messages[0]");
    assert!(ask(&daemon, "busy").head.to_ascii_lowercase().contains("retry-after: 60"));
    assert_eq!(engine.seen("drops")["posts"], 2, "one more attempt");
    assert_eq!(engine.seen("fails")["posts"], 1, "none");
    assert!(!daemon.log().contains(KEY));
}

#[test]
fn an_answer_is_asked_for_again_before_its_first_token_and_never_after() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let names = ["good", "drops_twice", "busy_twice", "drops_later", "ends_early", "hangs_later"];
    let idle = ["model.hangs_later.relay.idle_s=1"];
    let daemon = relaying(&engine, dir.path(), &names, &idle);
    for name in ["good", "drops_twice", "busy_twice"] {
        let answer = ask(&daemon, name);
        assert_eq!(answer.status, 200, "{name}: {}", answer.body);
        let (json, message) = (answer.json(), &answer.json()["choices"][0]["message"]);
        assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("Hello"), &json!("hm")), "{name}");
        assert_eq!(
            (&json["model"], &json["usage"]["prompt_tokens_details"]["cached_tokens"]),
            (&json!(name), &json!(2))
        );
        assert_eq!(json["usage"]["total_tokens"], 8);
    }
    assert_eq!(engine.seen("drops_twice")["posts"], 3);
    for name in ["drops_later", "ends_early", "hangs_later"] {
        let answer = daemon.post("/v1/chat/completions", &with(chat(name), "stream", json!(true)));
        let chunks = chunks(&answer);
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        let code = &chunks.last().unwrap()["error"]["code"];
        let expected = if name == "hangs_later" { "upstream_timeout" } else { "upstream_failed" };
        assert_eq!((text.as_str(), code), ("Hel", &json!(expected)), "{name}: {}", answer.body);
        assert_eq!(engine.seen(name)["posts"], 1, "{name}");
    }
    let choice = daemon.post("/v1/chat/completions", &with(chat("good"), "guided_choice", json!(["a", "b"])));
    assert_eq!(choice.status, 200, "{}", choice.body);
    let seen = engine.seen("good");
    assert_eq!(seen["body"]["structured_outputs"], json!({ "choice": ["a", "b"] }), "in words of vLLM");
    assert_eq!(seen["authorization"], format!("Bearer {KEY}"));
}

#[test]
fn a_call_keeps_its_name_and_one_that_must_be_made_is_missed() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let daemon = relaying(&engine, dir.path(), &["good", "talks"], &[]);
    let tool = json!({ "type": "function", "function": { "name": "light", "parameters": {} } });
    let body = with(with(chat("good"), "tools", json!([tool])), "tool_choice", json!("required"));
    let choice = daemon.post("/v1/chat/completions", &body).json()["choices"][0].clone();
    assert_eq!(choice["message"]["tool_calls"][0]["id"], "c", "the engine knows its call by that");
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!((&function["name"], &function["arguments"]), (&json!("light"), &json!(r#"{"on": true}"#)));
    assert_eq!(
        (&choice["finish_reason"], &engine.seen("good")["body"]["tool_choice"]),
        (&json!("tool_calls"), &json!("required"))
    );
    // Some engines do not heed it.
    let body = with(with(chat("talks"), "tools", body["tools"].clone()), "tool_choice", json!("required"));
    let answer = daemon.post("/v1/chat/completions", &body);
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (502, &json!("upstream_failed")), "{}", answer.body);
}

#[test]
fn d_bus_and_mqtt_carry_the_same_answers_and_failures() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let (broker, bus) = (Broker::start(""), Bus::start(bus::Broker::DbusDaemon));
    let on_bus = format!("dbus.bus={}", bus.address());
    let on_broker = format!("mqtt.broker=mqtt://127.0.0.1:{}", broker.port());
    let daemon = relaying(&engine, dir.path(), &["good", "refuses"], &[&on_bus, &on_broker, "mqtt.node=box"]);
    let mut said = String::new();
    daemon.wait_until("on the bus", || {
        let mut run = Command::new(sparsectl());
        let run = run.arg("run").arg(format!("--dbus={}", bus.address())).args(["good", "Hi"]).output().unwrap();
        said = String::from_utf8(run.stdout).unwrap();
        run.status.success()
    });
    assert!(said.contains("Hello"), "{said}");
    daemon.wait_until("subscribed", || daemon.log().contains("connected to the MQTT broker"));
    let result = |name: &str| {
        let payload = json!({ "id": name, "body": chat(name) }).to_string();
        let reply = format!("sparsed/v1/reply/lamp/{name}");
        let mut ask = Command::new("mosquitto_rr");
        ask.args(["-V", "5", "-i", "lamp", "-q", "1", "-W", "20", "-p", &broker.port().to_string()]);
        ask.args(["-t", "sparsed/v1/box/req/lamp/chat", "-e", &reply, "-m", &payload]);
        let said = ask.output().unwrap().stdout;
        serde_json::from_slice::<Value>(&said).unwrap_or_else(|error| panic!("{error}; {}", daemon.log()))
    };
    let (good, refused) = (result("good"), result("refuses"));
    assert_eq!((&good["text"], &good["reasoning"], &good["kind"]), (&json!("Hello"), &json!("hm"), &json!("final")));
    assert_eq!((&refused["code"], &refused["param"]), (&json!("upstream_refused"), &json!("messages[0]")));
}

#[test]
fn an_engine_of_unknown_kind_hears_openais_fields_only() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let daemon = relaying(&engine, dir.path(), &["plain"], &[]);
    assert_eq!(ask(&daemon, "plain").status, 200);
    for (name, value) in [("top_k", json!(3)), ("grammar", json!("start: \"a\"")), ("ignore_eos", json!(true))] {
        let refused = daemon.post("/v1/chat/completions", &with(chat("plain"), name, value));
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(name)), "{}", refused.body);
    }
    assert_eq!(engine.seen("plain")["posts"], 1, "what is refused is not sent");
    let answer = daemon.post("/v1/chat/completions", &with(chat("plain"), "reasoning_effort", json!("low")));
    assert_eq!((answer.status, &engine.seen("plain")["body"]["reasoning_effort"]), (200, &json!("low")));
}

#[test]
fn a_client_that_goes_away_ends_the_computing_elsewhere_and_one_that_does_not_read_holds_it() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let names = ["endless", "hangs"];
    let slow = ["limits.slow_consumer_s=1", "model.endless.relay.running=1", "model.endless.relay.waiting=1"];
    let daemon = relaying(&engine, dir.path(), &names, &slow);
    let left = |name: &str, n: u64| {
        daemon.wait_until("left", || engine.seen(name)["left"].as_u64() == Some(n));
    };
    // While nothing has come yet, and in the middle of an answer.
    let silent = daemon.open("/v1/chat/completions", &with(chat("hangs"), "stream", json!(true)));
    daemon.wait_until("asked", || engine.seen("hangs")["posts"] == 1);
    drop(silent);
    left("hangs", 1);
    let stream = with(chat("endless"), "stream", json!(true));
    let mut reader = daemon.open("/v1/chat/completions", &stream);
    reader.read_exact(&mut [0; 1000]).unwrap();
    // One more waits for its turn, a third finds no room.
    let waiting = daemon.open("/v1/chat/completions", &stream);
    daemon.wait_until("waiting", || daemon.get("/v1/status").json()["models"][0]["waiting"] == 1);
    let refused = ask(&daemon, "endless");
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("queue_full")), "{}", refused.body);
    drop(reader);
    left("endless", 1);
    // The other one does not read: it loses its answer.
    left("endless", 2);
    let said = read_answer(waiting).unwrap().body;
    assert!(said.len() < 8 << 20, "{} bytes were held for it", said.len());
    daemon.wait_until("idle", || daemon.get("/v1/status").json()["models"][0]["running"] == 0);
}

#[test]
fn over_tls_an_engine_needs_a_certificate_of_the_named_authority() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let path = |name: &str| dir.path().join(name);
    let engine = Engine::start(Some((&path("server.pem"), &path("server.key"))));
    let (port, ca) = (engine.tls_port.unwrap(), path("ca.pem").display().to_string());
    let sets = [
        format!("model.good.upstream=https://localhost:{port}/good/v1"),
        format!("model.good.relay.ca_file={ca}"),
        format!("model.other.upstream=https://localhost:{port}/other/v1"),
        format!("model.other.relay.ca_file={}", path("other.pem").display()),
        "model.other.relay.retries=0".to_owned(),
    ];
    let daemon = Daemon::spawn(None, &strs(&sets));
    daemon.first_answer("/v1/status");
    let answer = ask(&daemon, "good");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let refused = ask(&daemon, "other");
    assert_eq!(refused.json()["error"]["code"], "upstream_unreachable", "{}", refused.body);
    assert_eq!(engine.seen("other")["posts"], Value::Null);
}

#[test]
fn a_daemon_that_stops_lets_answers_of_engines_elsewhere_end_and_then_says_why_not() {
    let (engine, dir) = (Engine::start(None), tempfile::tempdir().unwrap());
    let mut daemon = relaying(&engine, dir.path(), &["hangs_later"], &["limits.stop_s=1"]);
    let mut stream = daemon.open("/v1/chat/completions", &with(chat("hangs_later"), "stream", json!(true)));
    let mut head = [0; 200];
    stream.read_exact(&mut head).unwrap();
    daemon.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("shutting_down"), "{rest}");
    assert!(daemon.wait().success(), "{}", daemon.log());
}
