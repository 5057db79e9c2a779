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
        assert_eq!(top.len(), 4, "{choice}");
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
