//! Shapes of requests that libraries write for other servers: schemas for validators, numbers with a point, names with
//! a tag, fields of vLLM's and llama.cpp's on OpenAI's paths, conversations with calls.

use super::strangers::{error, function, start};
use serde_json::{Value, json};

fn hello() -> Value {
    json!([{ "role": "user", "content": "Hi" }])
}

/// What pydantic, zod and OpenAPI write: remarks, and constraints that their validators look at.
fn schemas() -> Vec<Value> {
    let record = json!({
        "type": "object", "propertyNames": { "type": "string" }, "additionalProperties": { "type": "integer" },
    });
    let decimal = json!({ "type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$" });
    let object = |schema: Value| json!({ "type": "object", "properties": { "a": schema }, "required": ["a"] });
    vec![
        object(json!({ "type": "string", "format": "path" })),
        object(record),
        object(json!({ "type": "array", "uniqueItems": true, "items": { "type": "integer" } })),
        object(json!({ "anyOf": [{ "type": "number" }, decimal] })),
    ]
}

#[test]
fn a_schema_for_validators_is_taken_wherever_a_client_says_one() {
    let (daemon, _dir) = start();
    for schema in schemas() {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let tools = json!([function("f", schema.clone())]);
        for (path, body) in [
            ("/v1/chat/completions", json!({ "messages": hello(), "max_tokens": 4, "response_format": format })),
            (
                "/v1/chat/completions",
                json!({ "messages": hello(), "max_tokens": 4, "tools": tools, "tool_choice": "required" }),
            ),
            (
                "/v1/chat/completions",
                json!({ "messages": hello(), "max_tokens": 4, "tools": tools, "response_format": format }),
            ),
            (
                "/api/chat",
                json!({ "messages": hello(), "options": { "num_predict": 4 }, "stream": false, "format": schema }),
            ),
        ] {
            let answer = daemon.post(path, &body);
            assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        }
    }
}

#[test]
fn what_is_wrong_with_a_schema_is_still_said_and_in_the_words_of_the_client() {
    let (daemon, _dir) = start();
    let broken = [
        json!({ "properties": { "a": { "type": "strng" } } }),
        json!({ "properties": { "a": { "$ref": "#/$defs/b" } } }),
        json!({ "properties": { "a": { "not": { "type": "null" } } } }),
    ];
    for schema in broken {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let answer = daemon.post("/v1/chat/completions", &json!({ "messages": hello(), "response_format": format }));
        assert_eq!(error(&answer), (400, "invalid_value".to_owned(), json!("response_format")), "{schema}");
        assert!(answer.body.contains("#/properties/a"), "{}", answer.body);
        let answer = daemon.post("/api/chat", &json!({ "messages": hello(), "stream": false, "format": schema }));
        let said = answer.json()["error"].as_str().unwrap_or_else(|| panic!("{}", answer.body)).to_owned();
        assert!(answer.status == 400 && said.starts_with("'format' has a schema"), "{said}");
    }
}

#[test]
fn a_message_may_be_without_content_on_every_path() {
    let (daemon, _dir) = start();
    let call = json!({ "id": "a", "type": "function", "function": { "name": "f", "arguments": "{}" } });
    let user = json!({ "role": "user", "content": "x" });
    let refused = json!([user, { "role": "assistant", "content": null, "refusal": "no" }, user]);
    let called = json!([
        user, { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "a", "content": "1" },
    ]);
    for messages in [refused, called] {
        for path in ["/v1/chat/completions", "/apply-template"] {
            let answer = daemon.post(path, &json!({ "messages": messages, "max_tokens": 4 }));
            assert_eq!(answer.status, 200, "{path} {messages}: {}", answer.body);
        }
    }
}

#[test]
fn a_history_with_calls_is_the_same_prompt_as_a_response_and_as_a_chat() {
    let (daemon, _dir) = start();
    let call = |id: &str| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{}" } });
    let messages = json!([
        { "role": "user", "content": "x" },
        { "role": "assistant", "content": "Well.", "reasoning_content": "Hm.", "tool_calls": [call("a"), call("b")] },
        { "role": "tool", "tool_call_id": "a", "content": "1" },
        { "role": "tool", "tool_call_id": "b", "content": "2" },
    ]);
    let item = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "f", "arguments": "{}" });
    let output = |id: &str, output: &str| json!({ "type": "function_call_output", "call_id": id, "output": output });
    let items = json!([
        { "role": "user", "content": "x" },
        { "type": "reasoning", "id": "rs", "summary": [], "content": [{ "type": "reasoning_text", "text": "Hm." }] },
        { "role": "assistant", "content": [{ "type": "output_text", "text": "Well.", "annotations": [] }] },
        item("a"), item("b"), output("a", "1"), output("b", "2"),
    ]);
    let chat = json!({ "messages": messages, "temperature": 0, "max_tokens": 12 });
    let response = json!({ "input": items, "temperature": 0, "max_output_tokens": 12 });
    let counted = |path: &str, body: &Value| daemon.post(path, body).json()["input_tokens"].as_u64().unwrap();
    assert_eq!(counted("/v1/responses/input_tokens", &response), counted("/v1/chat/completions/input_tokens", &chat));
    let said = daemon.post("/v1/chat/completions", &chat).json()["choices"][0]["message"]["content"].clone();
    assert_eq!(daemon.post("/v1/responses", &response).json()["output"][0]["content"][0]["text"], said);
}

#[test]
fn fields_of_other_servers_are_honoured_or_refused_by_name_and_never_dropped() {
    let (daemon, _dir) = start();
    let chat = |more: Value| {
        let mut body = json!({ "messages": hello(), "temperature": 0, "ignore_eos": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        daemon.post("/v1/chat/completions", &body)
    };
    let short = chat(json!({ "n_predict": 3 })).json();
    assert_eq!(short["usage"]["completion_tokens"], 3, "{short}");
    let text = |more: Value| chat(more).json()["choices"][0]["message"]["content"].clone();
    let [own, other] =
        ["repetition_penalty", "repeat_penalty"].map(|name| text(json!({ "max_tokens": 40, name: 1.9 })));
    assert_eq!(own, other);
    assert_ne!(own, text(json!({ "max_tokens": 40 })));
    for (name, value) in [
        ("min_tokens", json!(2)),
        ("stop_token_ids", json!([1])),
        ("allowed_token_ids", json!([1])),
        ("bad_words", json!(["x"])),
        ("mirostat", json!(2)),
        ("xtc_probability", json!(0.5)),
        ("dry_multiplier", json!(0.8)),
        ("typ_p", json!(0.5)),
        ("prompt_logprobs", json!(1)),
        ("chat_template", json!("x")),
    ] {
        let refused = (400, "invalid_value".to_owned(), json!(name));
        assert_eq!(error(&chat(json!({ name: value }))), refused);
        let completion = json!({ "prompt": "x", "n_predict": 1, name: value });
        for path in ["/v1/completions", "/completion"] {
            assert_eq!(error(&daemon.post(path, &completion)), refused, "{path}");
        }
    }
    let off = json!({ "max_tokens": 1, "min_tokens": 0, "stop_token_ids": [], "mirostat": 0, "typ_p": 1.0 });
    assert_eq!(chat(off).status, 200);
    assert_eq!(error(&daemon.post("/v1/responses", &json!({ "input": "x", "min_tokens": 2 }))).2, "min_tokens");
    let stopped = daemon.post("/v1/responses", &json!({ "input": "x", "stop": [""] }));
    assert_eq!(error(&stopped).2, "stop", "it is read: {}", stopped.body);
}

#[test]
fn whole_numbers_may_have_a_point() {
    let (daemon, _dir) = start();
    for (path, body) in [
        (
            "/v1/chat/completions",
            json!({ "messages": hello(), "max_tokens": 4.0, "seed": 1.0, "top_k": 5.0, "n": 2.0 }),
        ),
        ("/v1/completions", json!({ "prompt": "x", "max_tokens": 4.0, "logprobs": 2.0 })),
        ("/v1/responses", json!({ "input": "x", "max_output_tokens": 4.0, "seed": 1.0 })),
        ("/completion", json!({ "prompt": "x", "n_predict": 4.0, "seed": -1.0, "n_probs": 1.0 })),
        ("/api/chat", json!({ "messages": hello(), "stream": false, "options": { "num_predict": 3.0, "seed": 7.0 } })),
    ] {
        let answer = daemon.post(path, &body);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
    // What a server reports as its seed it takes again.
    let body = json!({ "prompt": "x", "n_predict": 8, "seed": u64::MAX });
    let ask = || daemon.post("/completion", &body).json();
    let (first, again) = (ask(), ask());
    assert_eq!(first["generation_settings"]["seed"], u64::MAX, "{first}");
    assert_eq!(first["content"], again["content"]);
    let wrong = daemon.post("/v1/completions", &json!({ "prompt": "x", "max_tokens": 4.5 }));
    assert_eq!(error(&wrong), (400, "invalid_value".to_owned(), json!("max_tokens")));
}

#[test]
fn a_name_may_have_ollamas_tag_on_openais_paths() {
    let (daemon, _dir) = start();
    let chat = json!({ "model": "default:latest", "messages": hello(), "max_tokens": 1 });
    assert_eq!(daemon.post("/v1/chat/completions", &chat).status, 200);
    assert_eq!(daemon.get("/v1/models/default:latest").status, 200);
    assert_eq!(daemon.get("/v1/models/default:7b").status, 404);
    let shown = daemon.post("/api/show", &json!({ "model": "default:latest" }));
    assert_eq!(shown.status, 200, "{}", shown.body);
}

#[test]
fn the_token_that_was_chosen_is_among_the_likely_ones() {
    let (daemon, _dir) = start();
    for most in 0..2 {
        let body = json!({ "prompt": "Hi", "logprobs": most, "max_tokens": 8, "temperature": 2, "seed": 3 });
        let answer = daemon.post("/v1/completions", &body).json();
        let told = &answer["choices"][0]["logprobs"];
        let tokens = told["tokens"].as_array().unwrap();
        assert!(!tokens.is_empty());
        for (at, token) in tokens.iter().enumerate() {
            let top = told["top_logprobs"][at].as_object().unwrap();
            assert_eq!(top[token.as_str().unwrap()], told["token_logprobs"][at], "{told}");
            assert!(top.len() <= most + 1, "{told}");
        }
    }
}

#[test]
fn tokens_are_counted_in_vllms_form() {
    let (daemon, _dir) = start();
    let plain = daemon.post("/tokenize", &json!({ "content": "Hello" })).json();
    assert!(plain.get("count").is_none());
    let bare = json!({ "prompt": "Hello", "add_special_tokens": false, "return_token_strs": true });
    let counted = daemon.post("/tokenize", &bare).json();
    let n_tokens = counted["tokens"].as_array().unwrap().len();
    assert_eq!((&counted["tokens"], &counted["count"]), (&plain["tokens"], &json!(n_tokens)));
    assert_eq!(counted["max_model_len"], 4096, "{counted}");
    let names = counted["token_strs"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect::<String>();
    assert_eq!(names, "Hello");
    let chat = daemon.post("/tokenize", &json!({ "messages": hello() })).json();
    let written = daemon.post("/apply-template", &json!({ "messages": hello() })).json();
    assert_eq!(chat["tokens"], written["tokens"], "{chat}");
    let closed = json!({ "messages": hello(), "add_generation_prompt": false });
    assert_eq!(error(&daemon.post("/tokenize", &closed)).2, "add_generation_prompt");
    assert_eq!(error(&daemon.post("/tokenize", &json!({}))), (400, "invalid_value".to_owned(), json!("content")));
}

#[test]
fn an_error_names_the_field_and_says_nothing_of_the_daemons_own_types() {
    let (daemon, _dir) = start();
    for (path, body, param, said) in [
        ("/v1/completions", json!({ "max_tokens": 3 }), "prompt", "'prompt' is missing"),
        ("/v1/chat/completions", json!({}), "messages", "'messages' is missing"),
        (
            "/v1/chat/completions",
            json!({ "messages": hello(), "response_format": "json" }),
            "response_format",
            "expected an object",
        ),
        ("/v1/chat/completions", json!({ "messages": hello(), "temperature": "hot" }), "temperature", "a number"),
        ("/v1/chat/completions", json!({ "messages": [{ "role": "x", "content": "" }] }), "messages[0]", "role"),
        (
            "/v1/responses",
            json!({ "input": "x", "max_output_tokens": 0 }),
            "max_output_tokens",
            "'max_output_tokens' is 0",
        ),
    ] {
        let answer = daemon.post(path, &body);
        assert_eq!(error(&answer), (400, "invalid_value".to_owned(), json!(param)), "{path} {body}");
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(said) && !message.contains("f32") && !message.contains("struct"), "{message}");
    }
}

#[test]
fn below_api_every_error_is_a_text() {
    let (daemon, _dir) = start();
    let text = |answer: sparsed_tests::daemon::Answer| {
        let said = answer.json();
        assert!(said["error"].is_string() && said.as_object().unwrap().len() == 1, "{said}");
        answer.status
    };
    assert_eq!(text(daemon.get("/api/nope")), 404);
    assert_eq!(text(daemon.get("/api/chat")), 405);
    assert_eq!(text(daemon.post("/api/push", &json!({}))), 501);
    assert_eq!(text(daemon.post("/api/embed", &json!({}))), 400);
    assert_eq!(text(daemon.post("/api/chat", &json!({ "model": "nobody", "messages": hello() }))), 404);
    assert_eq!(text(daemon.post("/api/chat", &json!([]))), 400);
    assert!(daemon.get("/v1/nope").json()["error"].is_object());
}

#[test]
fn a_response_says_all_that_its_schema_asks_for_and_what_was_cut_is_incomplete() {
    let (daemon, _dir) = start();
    let response = |more: Value| {
        let mut body = json!({ "input": "x", "seed": 1 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        daemon.post("/v1/responses", &body).json()
    };
    let cut = response(json!({ "max_output_tokens": 8, "ignore_eos": true, "temperature": 0.5 }));
    assert_eq!((&cut["status"], &cut["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")), "{cut}");
    assert_eq!((&cut["temperature"], &cut["top_p"], &cut["completed_at"]), (&json!(0.5), &json!(1.0), &Value::Null));
    let format = json!({ "format": { "type": "json_schema", "name": "x", "schema": { "const": 1 } } });
    let whole = response(json!({ "text": format, "max_output_tokens": 20, "user": "me" }));
    assert_eq!(
        (&whole["status"], &whole["output"][0]["status"]),
        (&json!("completed"), &json!("completed")),
        "{whole}"
    );
    assert!(whole["completed_at"].as_u64() >= whole["created_at"].as_u64(), "{whole}");
    for name in ["presence_penalty", "frequency_penalty", "top_logprobs", "max_tool_calls", "service_tier", "user"] {
        assert!(whole.get(name).is_some(), "{name}: {whole}");
    }
}

#[test]
fn a_completion_of_no_tokens_is_its_prompt() {
    let (daemon, _dir) = start();
    let body = json!({ "prompt": ["Hi", "Hello"], "max_tokens": 0, "echo": true, "n": 4 });
    let answer = daemon.post("/v1/completions", &body).json();
    let texts: Vec<&str> =
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [["Hi"; 4], ["Hello"; 4]].concat(), "{answer}");
    assert_eq!(
        (&answer["choices"][0]["finish_reason"], &answer["usage"]["completion_tokens"]),
        (&json!("length"), &json!(0))
    );
    let read = |max_tokens: u32| {
        daemon.post("/v1/completions", &json!({ "prompt": "Hi", "max_tokens": max_tokens })).json()["usage"]["prompt_tokens"]
            .clone()
    };
    assert_eq!(read(0), read(1));
    let many = json!({ "prompt": vec!["x"; 32], "max_tokens": 0, "n": 4 });
    assert_eq!(daemon.post("/v1/completions", &many).json()["choices"].as_array().unwrap().len(), 128);
    let streamed = daemon.post("/v1/completions", &json!({ "prompt": "Hi", "max_tokens": 0, "stream": true }));
    assert!(
        streamed.body.contains("\"finish_reason\":\"length\"") && streamed.body.contains("[DONE]"),
        "{}",
        streamed.body
    );
    let chat = json!({ "messages": hello(), "max_tokens": 0 });
    assert_eq!(error(&daemon.post("/v1/chat/completions", &chat)).2, "max_tokens");
}
