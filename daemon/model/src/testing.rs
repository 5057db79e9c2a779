//! What do the tests of several modules share?

use crate::{ChatMessage, ChatRequest, Role, Tokenizer};
use sparsed_quant::gguf::{Array, Metadata, Value};

/// Properties are tried on the same cases in every run.
pub(crate) fn seeded(cases: u32) -> proptest::test_runner::Config {
    use proptest::test_runner::{Config, RngSeed};
    Config { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(0x5eed), ..Config::default() }
}

/// GPT-2's character of each byte.
pub(crate) fn byte_names() -> Vec<String> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (0x100u32..).filter_map(char::from_u32);
    (0..=255u8).map(|b| if printable(b) { char::from(b) } else { others.next().unwrap() }.to_string()).collect()
}

/// All bytes, the merge "ab" as 256, and the given tokens: control if they look like it, else added.
pub(crate) fn bytes_and(tokens: &[&str]) -> Tokenizer {
    let mut names = byte_names();
    names.push("ab".to_owned());
    let mut kinds = vec![1; names.len()];
    names.extend(tokens.iter().map(|token| (*token).to_owned()));
    kinds.extend(tokens.iter().map(|token| if token.contains(['|', '｜']) { 3 } else { 4 }));
    let mut metadata = Metadata::new();
    metadata.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
    metadata.set("tokenizer.ggml.tokens", Value::Array(Array::String(names)));
    metadata.set("tokenizer.ggml.merges", Value::Array(Array::String(vec!["a b".to_owned()])));
    metadata.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    if !tokens.is_empty() {
        metadata.set("tokenizer.ggml.eos_token_id", Value::U32(257));
    }
    Tokenizer::from_metadata(&metadata).unwrap().unwrap()
}

/// A request of one message.
pub(crate) fn user(content: &str) -> ChatRequest {
    ChatRequest { messages: vec![ChatMessage::new(Role::User, content)], ..ChatRequest::default() }
}
