//! What clients of others send and count on, that no client of these tests does: shapes of requests of LlamaIndex,
//! OpenAI's agents, Vercel's AI SDK, instructor, `llm-ollama`, Ollama's library in Go, and curl.

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon, read_answer};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) fn start() -> (Daemon, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=4096"]);
    (daemon, dir)
}

/// Sends bytes as they are, and reads all that comes until the connection ends.
fn raw(daemon: &Daemon, bytes: &[u8]) -> Answer {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.write_all(bytes).unwrap();
    read_answer(stream).unwrap()
}

pub(crate) fn error(answer: &Answer) -> (u16, String, Value) {
    let error = &answer.json()["error"];
    (answer.status, error["code"].as_str().unwrap_or_default().to_owned(), error["param"].clone())
}

pub(crate) fn function(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

fn light() -> Value {
    let on = json!({ "on": { "type": "boolean" } });
    function("light", json!({ "type": "object", "required": ["on"], "additionalProperties": false, "properties": on }))
}

fn schema() -> Value {
    let schema = json!({
        "type": "object", "required": ["x"], "additionalProperties": false, "properties": { "x": { "enum": [1, 2] } },
    });
    json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } })
}

/// Agents with an output type offer tools and say what the answer must be: it is one or the other.
#[test]
fn beside_tools_a_schema_is_for_what_is_no_call_and_without_parallel_calls_there_is_one() {
    let (daemon, _dir) = start();
    let ask = |seed: u32, parallel: bool| {
        let request = json!({
            "messages": [{ "role": "user", "content": "x" }], "tools": [light()], "response_format": schema(),
            "seed": seed, "temperature": 1.5, "max_tokens": 600, "parallel_tool_calls": parallel,
        });
        daemon.post("/v1/chat/completions", &request).json()["choices"][0].clone()
    };
    let (mut n_answered, mut n_called, mut n_several) = (0, 0, 0);
    for seed in 0..24 {
        let choice = ask(seed, true);
        let Some(calls) = choice["message"]["tool_calls"].as_array() else {
            let content: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
            assert!(content == json!({ "x": 1 }) || content == json!({ "x": 2 }), "{choice}");
            assert_eq!(choice["finish_reason"], "stop");
            n_answered += 1;
            continue;
        };
        n_called += 1;
        n_several += usize::from(calls.len() > 1);
        let alone = ask(seed, false);
        assert_eq!(alone["finish_reason"], "tool_calls", "{alone}");
        assert_eq!(alone["message"]["tool_calls"], json!([calls[0]]), "{alone}");
    }
    assert!(
        n_answered > 2 && n_called > 2 && n_several > 0,
        "{n_answered} answers, {n_called} calls, {n_several} several"
    );
}

#[test]
fn a_call_that_is_enforced_leaves_nothing_for_a_schema_and_of_the_tools_some_may_be_allowed() {
    let (daemon, _dir) = start();
    let stop = function("stop", json!({ "type": "object", "additionalProperties": false }));
    let mut request = json!({
        "messages": [{ "role": "user", "content": "x" }], "tools": [light(), stop], "response_format": schema(),
        "max_tokens": 200, "tool_choice": { "type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{ "type": "function", "function": { "name": "stop" } }],
        } },
    });
    for seed in 0..4 {
        request["seed"] = json!(seed);
        let answer = daemon.post("/v1/chat/completions", &request).json();
        assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "stop", "{answer}");
    }
    let custom = json!({
        "messages": [{ "role": "user", "content": "x" }], "tools": [{ "type": "custom", "custom": { "name": "x" } }],
    });
    let answer = daemon.post("/v1/chat/completions", &custom);
    assert_eq!(error(&answer), (400, "invalid_value".to_owned(), json!("tools[0]")));
}

#[test]
fn an_answer_has_its_name_in_the_head_and_in_the_log() {
    let (daemon, _dir) = start();
    for (path, body) in [
        ("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 })),
        ("/v1/completions", json!({ "prompt": "x", "max_tokens": 1, "stream": true })),
        ("/v1/responses", json!({ "input": "x", "max_output_tokens": 1 })),
    ] {
        let answer = daemon.post(path, &body);
        let id = answer
            .head
            .lines()
            .find_map(|line| line.strip_prefix("x-request-id: "))
            .unwrap_or_else(|| panic!("{}", answer.head));
        assert!(answer.body.contains(&format!("\"id\":\"{id}\"")), "{}", answer.body);
        daemon.wait_until("logged", || daemon.log().contains(id));
    }
}

#[test]
fn numbers_at_the_end_of_their_range_and_parts_of_a_replayed_answer_are_taken() {
    let (daemon, _dir) = start();
    let messages = json!([
        { "role": "user", "content": "x", "name": "bob" },
        { "role": "assistant", "content": [{ "type": "refusal", "refusal": "no" }], "refusal": null, "audio": null },
        { "role": "user", "content": [{ "type": "text", "text": "y" }] },
    ]);
    let ask = |seed: u32| {
        let request = json!({
            "messages": messages, "top_p": 0, "temperature": 2, "seed": seed, "max_tokens": 8, "ignore_eos": true,
        });
        let answer = daemon.post("/v1/chat/completions", &request).json();
        answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    };
    assert_eq!(ask(1), ask(2), "the most likely token each time");
    let body = json!({ "prompt": "x", "n": 2, "best_of": 2, "max_tokens": 2 });
    assert_eq!(daemon.post("/v1/completions", &body).json()["choices"].as_array().unwrap().len(), 2);
}

#[test]
fn an_answer_that_is_the_last_message_goes_on_where_that_is_asked_for() {
    let (daemon, _dir) = start();
    let letters: Value =
        (0..259).filter(|byte| !(97..123).contains(byte)).map(|byte| (byte.to_string(), json!(-100))).collect();
    let ask = |begun: &str, max_tokens: usize| {
        let mut messages = vec![json!({ "role": "user", "content": "x" })];
        messages.extend((!begun.is_empty()).then(|| json!({ "role": "assistant", "content": begun })));
        let request = json!({
            "messages": messages, "continue_final_message": !begun.is_empty(), "temperature": 0,
            "max_tokens": max_tokens, "logit_bias": letters, "ignore_eos": true,
        });
        let answer = daemon.post("/v1/chat/completions", &request).json();
        answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    };
    let whole = ask("", 12);
    assert_eq!(ask(&whole[..5], 7), whole[5..]);
    // Ollama's chats go on by themselves.
    let messages = json!([{ "role": "user", "content": "x" }, { "role": "assistant", "content": &whole[..5] }]);
    let options = json!({ "temperature": 0, "num_predict": 7 });
    let ollama = daemon.post("/api/chat", &json!({ "messages": messages, "options": options, "stream": false })).json();
    let mut request =
        json!({ "messages": messages, "temperature": 0, "max_tokens": 7, "continue_final_message": true });
    let openai = daemon.post("/v1/chat/completions", &request).json();
    assert_eq!(ollama["message"]["content"], openai["choices"][0]["message"]["content"], "{ollama}");
    request["messages"] = json!([{ "role": "user", "content": "x" }]);
    assert_eq!(error(&daemon.post("/v1/chat/completions", &request)).2, "continue_final_message");
}

#[test]
fn responses_that_go_on_from_one_at_once_are_each_told_their_own_name() {
    let (daemon, _dir) = start();
    let first = daemon.post("/v1/responses", &json!({ "input": "x", "store": true, "max_output_tokens": 2 })).json();
    let go_on = |text: &str| {
        let body = json!({ "input": text, "previous_response_id": first["id"], "max_output_tokens": 2 });
        // While one of them is answered its session is in use.
        std::iter::repeat_with(|| daemon.post("/v1/responses", &body)).find(|answer| answer.status != 409).unwrap()
    };
    let texts = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let asked: Vec<_> = texts.iter().map(|text| scope.spawn(|| go_on(text).json())).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    for (text, answer) in texts.iter().zip(&answers) {
        let path = format!("/v1/responses/{}/input_items?order=asc", answer["id"].as_str().unwrap());
        let items = daemon.get(&path).json();
        let said: Vec<&Value> = items["data"].as_array().unwrap().iter().map(|item| &item["content"]).collect();
        assert_eq!((said.len(), &said[2][0]["text"]), (3, &json!(text)), "{items}");
    }
    assert_eq!(daemon.get("/v1/sessions").json()["data"].as_array().unwrap().len(), texts.len());
}

#[test]
fn a_stored_response_tells_its_items_and_others_may_refer_to_them() {
    let (daemon, _dir) = start();
    let respond = |body: Value| daemon.post("/v1/responses", &body);
    let first = respond(json!({
        "input": "Hello", "instructions": "Be brief.", "store": true, "max_output_tokens": 30, "seed": 1,
        "ignore_eos": true, "max_tool_calls": 3,
    }));
    let first = first.json();
    assert_eq!(first["usage"]["output_tokens_details"]["reasoning_tokens"], 0, "{first}");
    let second =
        respond(json!({ "input": "More", "previous_response_id": first["id"], "max_output_tokens": 4 })).json();
    let list = |query: &str| {
        daemon.get(&format!("/v1/responses/{}/input_items{query}", second["id"].as_str().unwrap())).json()
    };
    let items = list("?order=asc");
    let kinds: Vec<&str> =
        items["data"].as_array().unwrap().iter().map(|item| item["role"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["user", "assistant", "user"], "{items}");
    assert_eq!(items["data"][1], first["output"][0], "as the first response had it");
    let page = list("?limit=1");
    assert_eq!((&page["data"][0], &page["has_more"]), (&items["data"][2], &json!(true)));
    let refer = |id: &Value| {
        let reference = json!({ "type": "item_reference", "id": id });
        let [hello, x] = ["Hello", "x"].map(|text| json!({ "role": "user", "content": text }));
        json!({ "input": [hello, reference, x], "max_output_tokens": 1 })
    };
    let by_name = respond(refer(&first["output"][0]["id"])).json();
    let mut whole = refer(&json!(""));
    whole["input"][1] = first["output"][0].clone();
    let counted = daemon.post("/v1/responses/input_tokens", &whole).json();
    assert_eq!(counted["object"], "response.input_tokens");
    assert_eq!(by_name["usage"]["input_tokens"], counted["input_tokens"], "{by_name}");
    let unknown = respond(refer(&json!("msg_resp_00000000000000000000000000000000_0_0")));
    assert_eq!(error(&unknown), (400, "invalid_value".to_owned(), json!("input[1].id")));
}

#[test]
fn ollamas_clients_find_what_they_look_for_before_they_ask() {
    let (daemon, _dir) = start();
    let head = raw(&daemon, b"HEAD / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let version = daemon.get("/api/version").json();
    let number = |part: &str| part.parse::<u32>().unwrap();
    let parts: Vec<u32> = version["version"].as_str().unwrap().split('.').map(number).collect();
    assert!(parts >= vec![0, 6, 4], "some clients want one that knows tools in streams: {version}");
    let listed = daemon.get("/api/tags").json()["models"][0]["digest"].as_str().unwrap().to_owned();
    assert!(listed.len() == 64 && listed.bytes().all(|byte| byte.is_ascii_hexdigit()), "{listed}");
    assert_eq!(daemon.post("/api/pull", &json!({ "model": "default:latest" })).json(), json!({ "status": "success" }));
    assert_eq!(daemon.post("/api/pull", &json!({ "model": "another" })).status, 501);
    let nulls = json!({
        "model": "default", "prompt": "x", "stream": false, "options": null, "context": null, "raw": null,
        "images": null,
    });
    let answer = daemon.post("/api/generate", &nulls);
    assert_eq!(answer.status, 200, "{}", answer.body);
}

/// A client that is still sending when the connection is closed does not see the answer.
#[test]
fn who_sends_too_much_is_told_so_when_it_has_sent_it() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["limits.body=64KiB"]);
    let body = "x".repeat(4 << 20);
    for head in [
        format!("content-length: {}\r\n\r\n", body.len()),
        format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len()),
    ] {
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}");
        let end = if head.contains("chunked") { "\r\n0\r\n\r\n" } else { "" };
        let answer = raw(&daemon, [&head, &body, end].concat().as_bytes());
        assert_eq!(error(&answer).1, "body_too_large", "{}", answer.body);
    }
}

/// One that finds it closed gives up, as Python's `http.client` does where it sends the body after the head.
#[test]
fn an_answer_that_needs_no_body_does_not_close_the_connection_on_who_still_sends_it() {
    let (daemon, _dir) = start();
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    let body = "x".repeat(1 << 20);
    for (path, status) in [("/infill", 501), ("/nowhere", 404), ("/health", 405), ("/infill", 501)] {
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // The refusal is there, whole, before anything of the body.
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut piece = [0; 4096];
            let n = stream.read(&mut piece).unwrap();
            assert!(n > 0, "{path} has closed the connection: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&piece[..n]);
        }
        assert_eq!(answer[9..12], *format!("{status}").as_bytes(), "{path}: {}", String::from_utf8_lossy(&answer));
        stream.write_all(body.as_bytes()).unwrap();
    }
}

#[test]
fn a_body_that_is_compressed_or_no_object_is_refused_for_what_it_is() {
    let (daemon, _dir) = start();
    let ask = |head: &str, body: &str| {
        let length = body.len();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             {head}content-length: {length}\r\n\r\n{body}"
        );
        raw(&daemon, request.as_bytes())
    };
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}"#;
    assert_eq!(ask("content-encoding: identity\r\n", body).status, 200);
    let compressed = ask("content-encoding: gzip\r\n", body);
    assert_eq!(error(&compressed), (415, "unsupported_content_encoding".to_owned(), Value::Null));
    for other in ["[]", "null", "\"x\"", "\u{feff}{}"] {
        let answer = ask("", other);
        assert_eq!(error(&answer), (400, "invalid_json".to_owned(), Value::Null), "{other}");
        assert!(answer.body.contains("no JSON object"), "{}", answer.body);
    }
}
