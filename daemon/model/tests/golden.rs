//! Do tokens and prompts equal those of the models' own programs? Fixtures and their makers are in `tests/golden`.
#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::{Value as Json, json};
use sparsed_model::{ChatFormat, ChatRequest, Tokenizer, TokenizerConfig};
use sparsed_quant::gguf::{Array, Metadata, Value};
use std::path::PathBuf;

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn strings(list: &Json) -> Vec<String> {
    serde_json::from_value(list.clone()).unwrap()
}

#[test]
fn each_pre_tokenizer_gives_the_tokens_of_the_python_package() {
    let fixture: Json = serde_json::from_str(&fixture("tokens.json")).unwrap();
    let records = strings(&fixture["records"]);
    let mut compared = 0;
    for (pre, encoded) in fixture["encoded"].as_object().unwrap() {
        let mut metadata = Metadata::new();
        metadata.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
        metadata.set("tokenizer.ggml.pre", Value::String(pre.clone()));
        for key in ["tokens", "merges"] {
            let list = Value::Array(Array::String(strings(&fixture[key])));
            metadata.set(format!("tokenizer.ggml.{key}"), list);
        }
        metadata.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap().unwrap();
        for (record, expect) in records.iter().zip(encoded.as_array().unwrap()) {
            let tokens = tokenizer.encode(record).unwrap();
            assert_eq!(json!(tokens), *expect, "{pre}: {record:?}");
            let bytes: Vec<u8> = tokens.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), *record);
            compared += tokens.len();
        }
    }
    assert!(compared > 10_000);
}

#[test]
fn deepseek_v32_prompts_are_those_of_its_own_encoder() {
    let special = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "｜DSML｜",
    ];
    let added: Vec<Json> =
        special.iter().zip(0..).map(|(name, id)| json!({"id": id, "content": name, "special": true})).collect();
    let file = json!({
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    });
    let mut config = TokenizerConfig::default();
    config.bos_token = Some(special[0].to_owned());
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes(), &config).unwrap();
    let format = ChatFormat::choose(None, "deepseek_v32", &tokenizer).unwrap().unwrap();
    let mut compared = 0;
    for line in fixture("deepseek_v32.jsonl").lines() {
        let case: Json = serde_json::from_str(line).unwrap();
        let request = ChatRequest {
            messages: serde_json::from_value(case["messages"].clone()).unwrap(),
            tools: case["tools"].as_array().cloned().unwrap_or_default(),
            thinking: case["thinking"].as_bool(),
            response_format: case.get("response_format").cloned(),
            ..ChatRequest::default()
        };
        assert_eq!(format.render(&request).unwrap().text(), case["expect"].as_str().unwrap());
        compared += 1;
    }
    assert_eq!(compared, 9);
}
