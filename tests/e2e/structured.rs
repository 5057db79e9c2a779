//! Structured output of the real daemon: answers that are what the request says they must be.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use serde_json::{Value, json};
use sparsed_tests::daemon::{Answer, Daemon, read_answer};

fn start() -> Daemon {
    Daemon::start(&sparsed_tests::model("smollm2-135m-dsa.gguf"), &[])
}

fn chat(question: &str, member: &str, value: Value) -> Value {
    let mut request = json!({
        "messages": [{ "role": "user", "content": question }], "temperature": 0, "max_tokens": 100,
    });
    request[member] = value;
    request
}

fn schema(schema: Value) -> Value {
    json!({ "type": "json_schema", "json_schema": { "name": "answer", "strict": true, "schema": schema } })
}

fn city() -> Value {
    schema(json!({
        "type": "object",
        "properties": { "city": { "type": "string", "maxLength": 20 }, "n": { "type": "integer" } },
        "required": ["city", "n"],
        "additionalProperties": false,
    }))
}

/// The text of an answer, and why it ended.
fn content(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = &answer.json()["choices"][0];
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&choice["message"]["content"]), text(&choice["finish_reason"]))
}

fn check_city(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let members: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(members, ["city", "n"], "{text}");
    assert!(value["city"].as_str().unwrap().chars().count() <= 20, "{text}");
    assert!(value["n"].is_i64() || value["n"].as_f64().unwrap().fract() == 0.0, "{text}");
}

#[test]
fn every_seed_writes_json_of_the_schema() {
    let daemon = start();
    let mut whole = 0;
    for seed in 1..=5 {
        let mut request = chat("Name a city and a number.", "response_format", city());
        (request["temperature"], request["seed"]) = (json!(1), json!(seed));
        let (text, reason) = content(&daemon.post("/v1/chat/completions", &request));
        if reason == "stop" {
            check_city(&text);
            whole += 1;
        }
    }
    assert!(whole >= 3, "only {whole} of 5 answers were complete");
    let request = chat("Name a city and a number.", "response_format", city());
    check_city(&content(&daemon.post("/v1/chat/completions", &request)).0);
}

#[test]
fn eight_requests_with_grammars_of_their_own_share_steps() {
    let daemon = start();
    let color = schema(json!({ "enum": ["red", "green", "blue"] }));
    let requests = [
        chat("What is the capital of France?", "grammar", json!("start: \"Lyon\" | \"Paris\" | \"Nice\"")),
        chat("What is the capital of France?", "temperature", json!(0)),
        chat("Name a city and a number.", "response_format", city()),
        chat("Name a color.", "response_format", color),
        chat("Say yes or no.", "grammar", json!("start: /(yes|no)[.!]/")),
        chat("Count.", "grammar", json!("start: /[0-9]{3}/ (\", \" /[0-9]{3}/){2}")),
        chat("Are you there?", "response_format", schema(json!({ "type": "boolean" }))),
        chat(
            "Some numbers.",
            "response_format",
            schema(json!({ "type": "array", "items": { "type": "integer" }, "minItems": 2, "maxItems": 2 })),
        ),
    ];
    let streams: Vec<_> = requests.iter().map(|request| daemon.open("/v1/chat/completions", request)).collect();
    let texts: Vec<String> = streams.into_iter().map(|stream| content(&read_answer(stream).unwrap()).0).collect();
    assert!(["Lyon", "Paris", "Nice"].contains(&texts[0].as_str()), "{}", texts[0]);
    assert_eq!(texts[1], "The capital of France is Paris.");
    check_city(&texts[2]);
    assert!(["\"red\"", "\"green\"", "\"blue\""].contains(&texts[3].as_str()), "{}", texts[3]);
    assert!(["yes.", "yes!", "no.", "no!"].contains(&texts[4].as_str()), "{}", texts[4]);
    assert!(texts[5].len() == 13 && texts[5].split(", ").all(|n| n.parse::<u32>().is_ok()), "{}", texts[5]);
    assert!(["true", "false"].contains(&texts[6].as_str()), "{}", texts[6]);
    assert_eq!(serde_json::from_str::<Vec<f64>>(&texts[7]).unwrap().len(), 2, "{}", texts[7]);
    let alone: Vec<String> =
        requests.iter().map(|request| content(&daemon.post("/v1/chat/completions", request)).0).collect();
    assert_eq!(texts, alone);
}

#[test]
fn a_stream_and_a_completion_follow_a_grammar_too() {
    let daemon = start();
    let request =
        json!({ "prompt": "I am", "grammar": "start: \" happy\" | \" sad\"", "temperature": 0, "ignore_eos": true });
    let answer = daemon.post("/v1/completions", &request).json();
    assert!([" happy", " sad"].contains(&answer["choices"][0]["text"].as_str().unwrap()), "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let mut request = chat("Name a city and a number.", "response_format", city());
    request["stream"] = json!(true);
    let body = daemon.post("/v1/chat/completions", &request).body;
    let chunks = body.split("data: ").filter_map(|line| serde_json::from_str::<Value>(line.lines().next()?).ok());
    let text: String =
        chunks.filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
    check_city(&text);
}

#[test]
fn broken_schemas_and_grammars_are_400s_that_say_where() {
    let daemon = start();
    let deep = (0..300).fold(json!({}), |inner, _| json!({ "items": inner }));
    let names: Vec<String> = (0..10_000).map(|i| format!("\"{i}\"")).collect();
    for (member, value, said) in [
        ("response_format", schema(json!([1])), "not an object"),
        ("response_format", schema(json!({ "properties": { "a": { "type": "strng" } } })), "'#/properties/a'"),
        ("response_format", schema(json!({ "type": "string", "pattern": "([" })), "unclosed"),
        ("response_format", schema(deep), ""),
        ("response_format", schema(json!({ "enum": names })), "limit"),
        ("response_format", json!({ "type": "json_schema" }), "json_schema.schema"),
        ("grammar", json!(format!("start: {}", names.join("|"))), "limit"),
        ("grammar", json!("start: a\na: /b(/"), "2(4)"),
        ("grammar", json!("root ::= \"GBNF\""), "1("),
    ] {
        let answer = daemon.post("/v1/chat/completions", &chat("x", member, value));
        let error = &answer.json()["error"];
        assert_eq!(answer.status, 400, "{said}: {}", answer.body);
        assert!(error["message"].as_str().unwrap().contains(said), "{}", answer.body);
        assert!(said.is_empty() || error["param"] == member, "{}", answer.body);
    }
    // Nobody was harmed.
    check_city(&content(&daemon.post("/v1/chat/completions", &chat("A city?", "response_format", city()))).0);
}
