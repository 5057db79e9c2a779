//! Fields of OpenAI's requests, as the real daemon honours them.

use serde_json::{Value, json};
use sparsed_tests::chatty;
use sparsed_tests::daemon::{Answer, Daemon};

fn tiny() -> std::path::PathBuf {
    sparsed_tests::root().join("tests/golden/tiny/v32/model.gguf")
}

fn param(answer: &Answer) -> String {
    assert_eq!(answer.status, 400, "{}", answer.body);
    answer.json()["error"]["param"].as_str().unwrap_or_default().to_owned()
}

/// The data of each event of a stream but the last.
fn events(body: &str) -> Vec<Value> {
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
    let lines = body.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    lines.map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[test]
fn likelihoods_are_the_log_softmax_of_the_models_logits() {
    let daemon = Daemon::start(&tiny(), &[]);
    let prompt = [5u32, 9, 2, 77, 30];
    // What is drawn has no influence on what is said of it.
    let request = json!({
        "prompt": prompt, "max_tokens": 6, "temperature": 1.3, "seed": 3, "logprobs": 4, "ignore_eos": true,
        "logit_bias": { "11": 3.0 },
    });
    let answer = daemon.post("/v1/completions", &request);
    let choice = answer.json()["choices"][0].clone();
    let tokens: Vec<u32> = serde_json::from_value(choice["tokens"].clone()).unwrap();
    let ids: Vec<u32> = prompt.iter().chain(&tokens).copied().collect();
    let logits = sparsed_tests::logits(&tiny(), &ids, false, &[]).logits;
    let vocab = logits.len() / ids.len();
    for (at, &token) in tokens.iter().enumerate() {
        let row: Vec<f64> = logits[(prompt.len() - 1 + at) * vocab..][..vocab].iter().map(|&v| f64::from(v)).collect();
        let normalizer = row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let said = choice["logprobs"]["token_logprobs"][at].as_f64().unwrap();
        assert!((said - (row[token as usize] - normalizer)).abs() < 1e-3, "token {at}: {said}");
        let top = choice["logprobs"]["top_logprobs"][at].as_object().unwrap();
        // The token that was chosen is one of them, or one more.
        let n_more = usize::from(!order[..4].contains(&(token as usize)));
        assert_eq!(top.len(), 4 + n_more, "{choice}");
        assert_eq!(top[&format!("token_id:{token}")].as_f64(), Some(said), "{choice}");
        for id in &order[..4] {
            let said = top[&format!("token_id:{id}")].as_f64().unwrap();
            assert!((said - (row[*id] - normalizer)).abs() < 1e-3, "token {at}, alternative {id}: {said}");
        }
    }
    // The same in pieces.
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let pieces = events(&daemon.post("/v1/completions", &streamed).body);
    let said: Vec<Value> = pieces
        .iter()
        .flat_map(|piece| piece["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(json!(said), choice["logprobs"]["token_logprobs"]);
}

#[test]
fn several_answers_to_one_prompt_are_those_of_seeds_in_a_row() {
    let daemon = Daemon::start(&tiny(), &[]);
    let request = |n: u32, seed: u32| json!({ "prompt": [1, 2, 3], "max_tokens": 9, "seed": seed, "n": n });
    let answer = daemon.post("/v1/completions", &request(4, 50)).json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (at, choice) in (0u32..).zip(choices) {
        let alone = daemon.post("/v1/completions", &request(1, 50 + at)).json();
        assert_eq!((&choice["index"], &choice["tokens"]), (&json!(at), &alone["choices"][0]["tokens"]));
    }
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(3), &json!(36)));
    let mut streamed = request(4, 50);
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let mut tokens = vec![Vec::new(); 4];
    let mut ends = 0;
    let pieces = events(&daemon.post("/v1/completions", &streamed).body);
    for choice in pieces.iter().filter_map(|piece| piece["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        tokens[index].extend(choice["tokens"].as_array().unwrap().clone());
        ends += u32::from(choice["finish_reason"] == "length");
    }
    let whole: Vec<_> = choices.iter().map(|choice| choice["tokens"].as_array().unwrap().clone()).collect();
    assert_eq!((tokens, ends), (whole, 4));
    assert_eq!(pieces.last().unwrap()["usage"]["completion_tokens"], 36);
}

#[test]
fn each_prompt_of_a_list_is_answered_as_if_it_were_alone() {
    let daemon = Daemon::start(&tiny(), &[]);
    let prompts = [vec![1u32, 2, 3], vec![4, 5, 6, 7, 8], vec![1, 2, 3]];
    let request = |prompt: Value, n: u32| json!({ "prompt": prompt, "max_tokens": 7, "seed": 50, "n": n });
    let answer = daemon.post("/v1/completions", &request(json!(prompts), 2)).json();
    let tokens = |answer: &Value| -> Vec<Value> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["tokens"].clone()).collect()
    };
    let indices: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5].map(|index| json!(index)), "the answers to a prompt come together");
    for (prompt, choices) in prompts.iter().zip(tokens(&answer).chunks(2)) {
        assert_eq!(tokens(&daemon.post("/v1/completions", &request(json!(prompt), 2)).json()), choices);
    }
    let usage = |answer: &Value| ["prompt_tokens", "completion_tokens"].map(|name| answer["usage"][name].clone());
    assert_eq!(usage(&answer), [json!(3 + 5 + 3), json!(6 * 7)]);
    // In pieces, each with the number of its answer.
    let mut streamed = request(json!(prompts), 2);
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({ "include_usage": true }));
    let pieces = events(&daemon.post("/v1/completions", &streamed).body);
    let mut gathered = vec![Vec::new(); 6];
    for choice in pieces.iter().filter_map(|piece| piece["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        gathered[index].extend(choice["tokens"].as_array().unwrap().clone());
    }
    assert_eq!(gathered.into_iter().map(Value::Array).collect::<Vec<_>>(), tokens(&answer));
    assert_eq!(usage(pieces.last().unwrap()), usage(&answer));
    // Without a seed, what is asked twice is drawn twice.
    let drawn = json!({ "prompt": vec![[1, 2, 3]; 4], "max_tokens": 30, "temperature": 2.0 });
    let drawn = tokens(&daemon.post("/v1/completions", &drawn).json());
    assert!(drawn.iter().any(|other| *other != drawn[0]), "{drawn:?}");
    for wrong in [json!([]), json!(vec![[1]; 33]), json!([[1], []]), json!([[1], "x"])] {
        assert_eq!(param(&daemon.post("/v1/completions", &request(wrong, 1))), "prompt");
    }
}

#[test]
fn texts_of_a_list_are_echoed_before_their_own_answers() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let request = json!({ "prompt": ["ab", "xyz"], "n": 2, "max_tokens": 3, "echo": true, "ignore_eos": true });
    let choices = daemon.post("/v1/completions", &request).json()["choices"].clone();
    for (index, prompt) in ["ab", "ab", "xyz", "xyz"].into_iter().enumerate() {
        assert!(choices[index]["text"].as_str().unwrap().starts_with(prompt), "{choices}");
    }
}

#[test]
fn several_answers_read_their_prompt_once() {
    let daemon = Daemon::start(&tiny(), &[]);
    let prompt: Vec<u32> = (0..200).map(|i| i * 7 % 131).collect();
    let request = json!({ "prompt": prompt, "max_tokens": 2, "n": 4, "ignore_eos": true });
    let computed = |daemon: &Daemon| {
        daemon.wait_until("counted", || daemon.status()["running"] == 0);
        daemon.status()["computed_tokens"].as_u64().unwrap()
    };
    let before = computed(&daemon);
    assert_eq!(daemon.post("/v1/completions", &request).status, 200);
    // Three blocks of 64 are read once, the 8 tokens behind them by each; the last token of an answer is not computed.
    assert_eq!(computed(&daemon) - before, 3 * 64 + 4 * (8 + 1));
}

#[test]
fn who_asks_for_several_people_has_nothing_shared_between_them() {
    let daemon = Daemon::start(&tiny(), &[]);
    let prompt: Vec<u32> = (0..200).map(|i| i * 7 % 131).collect();
    let cached = |salt: Value| {
        let request = json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": salt });
        let answer = daemon.post("/v1/completions", &request).json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("counted")
    };
    assert_eq!([json!("anna"), json!("bert"), json!("anna")].map(cached), [0, 0, 192]);
    assert_eq!([Value::Null, Value::Null].map(cached), [0, 192], "without one all is as it was");
    for wrong in [json!(""), json!("x".repeat(257)), json!(7)] {
        let request = json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": wrong });
        assert_eq!(param(&daemon.post("/v1/completions", &request)), "cache_salt");
    }
}

#[test]
fn a_session_is_not_answered_by_another_model_than_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let id = daemon.post("/v1/sessions", &json!({})).json()["id"].clone();
    let turn = |model: Value| {
        let messages = json!([{ "role": "user", "content": "x" }]);
        daemon.post(
            "/v1/chat/completions",
            &json!({ "session_id": id, "model": model, "messages": messages, "max_tokens": 2 }),
        )
    };
    assert_eq!(param(&turn(json!("other"))), "model");
    assert_eq!((turn(json!("default")).status, turn(Value::Null).status), (200, 200));
    let first = daemon.post("/v1/responses", &json!({ "input": "x", "store": true, "max_output_tokens": 2 })).json();
    let next = json!({ "input": "y", "previous_response_id": first["id"], "model": "other", "max_output_tokens": 2 });
    assert_eq!(param(&daemon.post("/v1/responses", &next)), "model");
}

#[test]
fn a_model_has_other_names_and_what_is_kept_of_it_is_under_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &["model.default.aliases=[\"gpt-4o\"]"]);
    let made = daemon.post("/v1/sessions", &json!({ "model": "gpt-4o" })).json();
    assert_eq!(made["model"], "default");
    let messages = json!([{ "role": "user", "content": "x" }]);
    let turn = json!({ "session_id": made["id"], "model": "gpt-4o", "messages": messages, "max_tokens": 2 });
    assert_eq!(daemon.post("/v1/chat/completions", &turn).status, 200);
    let stored = json!({ "model": "gpt-4o", "input": "x", "store": true, "max_output_tokens": 2 });
    assert_eq!(daemon.post("/v1/responses", &stored).json()["model"], "default");
    assert_eq!(daemon.get("/v1/models/gpt-4o").json()["id"], "gpt-4o");
    assert_eq!(daemon.post("/api/show", &json!({ "model": "gpt-4o:latest" })).status, 200);
    assert_eq!(daemon.post("/api/pull", &json!({ "model": "gpt-4o" })).json()["status"], "success");
    let unknown = daemon.post("/v1/completions", &json!({ "model": "gpt-4", "prompt": "x" }));
    assert_eq!((unknown.status, unknown.json()["error"]["param"].clone()), (404, json!("model")));
}

#[test]
fn a_call_has_the_same_name_wherever_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=2048"]);
    let id = daemon.post("/v1/sessions", &json!({})).json()["id"].clone();
    let tool = json!({ "type": "function", "function": { "name": "on", "parameters": {
        "type": "object", "required": ["on"], "additionalProperties": false, "properties": { "on": { "type": "boolean" } },
    } } });
    let body = json!({
        "session_id": id, "messages": [{ "role": "user", "content": "light" }], "tools": [tool], "tool_choice": "required",
        "stream": true,
    });
    let pieces = events(&daemon.post("/v1/chat/completions", &body).body);
    let mut told = pieces.iter().filter_map(|piece| piece["choices"][0]["delta"]["tool_calls"][0]["id"].as_str());
    let told = told.next().expect("a call was enforced");
    let session = daemon.get(&format!("/v1/sessions/{}", id.as_str().unwrap())).json();
    let kept = session["messages"].as_array().unwrap().last().unwrap()["tool_calls"][0]["id"].clone();
    assert_eq!(kept, told, "{session}");
    // So the result is told by the name that the client knows.
    let mut result = body;
    result["messages"] = json!([{ "role": "tool", "tool_call_id": told, "content": "done" }]);
    (result["tool_choice"], result["max_tokens"]) = (json!("none"), json!(2));
    assert_eq!(daemon.post("/v1/chat/completions", &result).status, 200);
}

#[test]
fn a_response_heeds_what_a_chat_heeds_and_refuses_what_it_has_not() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let ask = |more: Value| {
        let mut body = json!({ "input": "x", "max_output_tokens": 20, "temperature": 1.5, "seed": 1 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        daemon.post("/v1/responses", &body)
    };
    let text = |more: Value| ask(more).json()["output"][0]["content"][0]["text"].as_str().unwrap().to_owned();
    for form in [
        json!({ "grammar": "start: \"yes\" | \"no\"" }),
        json!({ "guided_choice": ["yes", "no"] }),
        json!({ "structured_outputs": { "regex": "yes|no" } }),
    ] {
        let said = text(form.clone());
        assert!(["yes", "no"].contains(&said.as_str()), "{form}: {said}");
    }
    assert!(text(json!({ "json_schema": { "const": "x" } })).contains("\"x\""));
    for (field, value) in [
        ("repetition_penalty", json!(11)),
        ("deadline_ms", json!(-5)),
        ("priority", json!(99_999)),
        ("n", json!(3)),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(2)),
        ("include", json!(["message.output_text.logprobs"])),
        ("max_tokens", json!(5)),
        ("response_format", json!({ "type": "json_object" })),
        ("messages", json!([{ "role": "user", "content": "x" }])),
        ("cache_salt", json!("")),
    ] {
        assert_eq!(param(&ask(json!({ field: value }))), field);
    }
    // What is refused leaves no session behind.
    assert_eq!(param(&ask(json!({ "store": true, "top_k": -2 }))), "top_k");
    assert_eq!(daemon.get("/v1/sessions").json()["data"], json!([]));
}

#[test]
fn a_client_of_four_answers_that_goes_away_frees_all_of_them() {
    let daemon = Daemon::start(&tiny(), &[]);
    let request = json!({ "prompt": [1, 2, 3], "n": 4, "max_tokens": 1_000_000, "ignore_eos": true, "stream": true });
    // The answers are far too long for the buffers between: all four are paused, or running, until it is read.
    let stream = daemon.open("/v1/completions", &request);
    daemon.wait_until("running", || daemon.status()["running"] == 4);
    drop(stream);
    daemon.wait_until("free", || daemon.status()["running"] == 0 && daemon.status()["kv_blocks_used"] == 0);
}

#[test]
fn a_call_that_is_required_is_one_of_the_tools_with_arguments_of_its_schema() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &[]);
    let tool = |name: &str, parameters: Value| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    let light = json!({
        "type": "object", "required": ["on"], "additionalProperties": false,
        "properties": { "on": { "type": "boolean" }, "room": { "$ref": "#/$defs/room" } },
        "$defs": { "room": { "enum": ["hall", "bath"] } },
    });
    let tools = json!([tool("light", light), tool("stop", json!({ "type": "object", "additionalProperties": false }))]);
    let ask = |choice: Value, seed: u32| {
        let mut request = json!({
            "messages": [{ "role": "user", "content": "x" }], "tools": tools, "seed": seed, "max_tokens": 200,
        });
        request["tool_choice"] = choice;
        daemon.post("/v1/chat/completions", &request)
    };
    let mut called = Vec::new();
    for seed in 0..8 {
        let answer = ask(json!("required"), seed).json();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        let function = &choice["message"]["tool_calls"][0]["function"];
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        match function["name"].as_str().unwrap() {
            "light" => assert!(arguments["on"].is_boolean(), "{arguments}"),
            "stop" => assert_eq!(arguments, json!({})),
            other => panic!("{other} was not offered"),
        }
        called.push(function["name"].as_str().unwrap().to_owned());
    }
    assert!(called.iter().any(|name| name == "light") && called.iter().any(|name| name == "stop"), "{called:?}");
    let named = ask(json!({ "type": "function", "function": { "name": "stop" } }), 1).json();
    assert_eq!(named["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "stop");
    assert_eq!(param(&ask(json!({ "type": "function", "function": { "name": "fly" } }), 1)), "tool_choice");
    assert_eq!(param(&ask(json!("perhaps"), 1)), "tool_choice");
    // A model without a place for tools cannot be made to call any.
    let plain = Daemon::start(&chatty::write(dir.path()), &[]);
    let request = json!({
        "messages": [{ "role": "user", "content": "x" }], "tools": tools, "tool_choice": "required",
    });
    assert_eq!(param(&plain.post("/v1/chat/completions", &request)), "tool_choice");
}

#[test]
fn a_call_that_max_tokens_cuts_is_told_as_far_as_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write_with_tools(dir.path()), &["model.default.max_context=2048"]);
    let schema = json!({
        "type": "object", "required": ["room"], "additionalProperties": false,
        "properties": { "room": { "type": "string", "minLength": 40, "maxLength": 60 } },
    });
    let request = |max_tokens: usize, stream: bool| {
        json!({
            "messages": [{ "role": "user", "content": "x" }], "tool_choice": "required", "seed": 3, "stream": stream,
            "tools": [{ "type": "function", "function": { "name": "light", "parameters": schema } }],
            "max_tokens": max_tokens,
        })
    };
    let answered = |max_tokens: usize| daemon.post("/v1/chat/completions", &request(max_tokens, false)).json();
    let whole = answered(400)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].clone();
    let whole = whole.as_str().expect("a call");
    // The model's tokens are bytes: the tag, a line break, and the name with what is around it come first.
    let before = "<tool_call>\n{\"name\": \"light\", \"arguments\": ".len();
    for n in [before + 1, before + 10, before + 25] {
        let choice = answered(n)["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "length", "{choice}");
        let function = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!((&function["name"], &choice["message"]["content"]), (&json!("light"), &Value::Null), "{choice}");
        let arguments = function["arguments"].as_str().unwrap();
        assert!(whole.starts_with(arguments) && arguments.len() < whole.len() && !arguments.is_empty(), "{arguments}");
        let pieces = events(&daemon.post("/v1/chat/completions", &request(n, true)).body);
        let told: Vec<&Value> = pieces.iter().map(|piece| &piece["choices"][0]).collect();
        assert_eq!(told[told.len() - 2]["delta"]["tool_calls"][0]["function"], *function, "{told:?}");
        assert_eq!(told[told.len() - 1]["finish_reason"], "length");
    }
    // While the function is not known it is text, as it comes.
    let early = answered(before - 30)["choices"][0].clone();
    assert!(early["message"]["content"].as_str().unwrap().starts_with("<tool_call>"), "{early}");
    // Nothing of it is told that could be taken for a whole call where arguments are no text.
    let body = json!({
        "input": "x", "tool_choice": "required", "seed": 3, "max_output_tokens": before + 10,
        "tools": [{ "type": "function", "name": "light", "parameters": schema }],
    });
    let response = daemon.post("/v1/responses", &body).json();
    let item = &response["output"][0];
    assert_eq!((&response["status"], &item["status"]), (&json!("incomplete"), &json!("incomplete")), "{response}");
}

#[test]
fn text_becomes_tokens_and_tokens_text_again() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&chatty::write(dir.path()), &[]);
    let text = "Grüße, <|im_end|>!";
    let tokens = daemon.post("/tokenize", &json!({ "content": text })).json()["tokens"].clone();
    assert_eq!(tokens.as_array().unwrap().len(), text.len(), "a token for each byte: {tokens}");
    assert_eq!(daemon.post("/detokenize", &json!({ "tokens": tokens })).json()["content"], text);
    let pieces = daemon.post("/tokenize", &json!({ "content": "aü", "with_pieces": true })).json();
    assert_eq!(pieces["tokens"][0], json!({ "id": 97, "piece": "a" }));
    assert_eq!(pieces["tokens"][1]["piece"], json!([0xc3]));
    assert_eq!(param(&daemon.post("/detokenize", &json!({ "tokens": [1_000_000] }))), "tokens");
    let props = daemon.get("/props").json();
    assert_eq!((&props["eos_token"], &props["modalities"]["vision"]), (&json!("<|im_end|>"), &json!(false)));
    assert_eq!(daemon.get("/ready").status, 200);
    let refused = daemon.post("/v1/embeddings", &json!({ "input": "x" }));
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (400, json!("unsupported_model_capability")));
}
