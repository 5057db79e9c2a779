//! Prompts of conversations, for comparison with other renderers: see `tests/golden/check_templates.py`.
//!
//! `render TOKENIZER < CASES`: TOKENIZER is a `tokenizer.json`. Each line of CASES is an object with `template` or
//! `built_in`, `messages`, and optionally `tools`, `thinking`, `now`, `response_format`, `bos`, `eos`; each line of the
//! output is one with `text` or `error`.
#![allow(clippy::print_stdout, reason = "a tool")]

use serde_json::{Map, Value, json};
use sparsed_model::{ChatFormat, ChatRequest, Tokenizer, TokenizerConfig};
use std::error::Error;
use std::io::BufRead;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: render TOKENIZER < CASES")?;
    let file = std::fs::read(path)?;
    let mut tokenizers: Vec<(String, Tokenizer)> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let case: Map<String, Value> = serde_json::from_str(&line?)?;
        let name = |key: &str| case.get(key).and_then(Value::as_str).map(str::to_owned);
        let key = format!("{:?} {:?}", name("bos"), name("eos"));
        if !tokenizers.iter().any(|(known, _)| *known == key) {
            let mut config = TokenizerConfig::default();
            (config.bos_token, config.eos_token) = (name("bos"), name("eos"));
            tokenizers.push((key.clone(), Tokenizer::from_json(&file, &config)?));
        }
        let (_, tokenizer) = tokenizers.iter().find(|(known, _)| *known == key).ok_or("just added")?;
        let line = match text(&case, tokenizer) {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        println!("{line}");
    }
    Ok(())
}

fn text(case: &Map<String, Value>, tokenizer: &Tokenizer) -> Result<String, Box<dyn Error>> {
    let format = match case.get("built_in").and_then(Value::as_str) {
        Some(name) => ChatFormat::built_in(name, tokenizer)?,
        None => {
            let template = case.get("template").and_then(Value::as_str);
            ChatFormat::choose(template, "", tokenizer)?.ok_or("no format")?
        }
    };
    let request = ChatRequest {
        messages: serde_json::from_value(case.get("messages").cloned().unwrap_or_default())?,
        tools: case.get("tools").and_then(Value::as_array).cloned().unwrap_or_default(),
        thinking: case.get("thinking").and_then(Value::as_bool),
        response_format: case.get("response_format").cloned(),
        now: case.get("now").and_then(Value::as_i64),
        ..ChatRequest::default()
    };
    Ok(format.render(&request)?.text())
}
