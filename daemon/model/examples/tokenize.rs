//! Tokens of a file, for comparison with other tokenizers: see `tests/golden/check_tokenizers.py`.
//!
//! `tokenize TOKENIZER TEXT OUT`: TOKENIZER is a GGUF file or a `tokenizer.json`; TEXT is taken in records that end in
//! a NUL byte. OUT gets, for each record, the count and the ids as little-endian u32: first as plain text, then as
//! trusted text.
#![allow(clippy::print_stdout, reason = "a tool")]

use sparsed_model::{Tokenizer, TokenizerConfig};
use std::error::Error;
use std::fs;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, text, out] = &arguments[..] else { return Err("usage: tokenize TOKENIZER TEXT OUT".into()) };
    let bytes = fs::read(tokenizer)?;
    let tokenizer = if tokenizer.ends_with(".json") {
        Tokenizer::from_json(&bytes, &TokenizerConfig::default())?
    } else {
        let gguf = sparsed_quant::gguf::Gguf::parse(&bytes)?;
        Tokenizer::from_metadata(gguf.metadata())?.ok_or("the file has no tokenizer")?
    };
    let text = fs::read_to_string(text)?;
    let mut encoded = Vec::new();
    let mut count = 0;
    for record in text.split_terminator('\0') {
        for tokens in [tokenizer.encode(record)?, tokenizer.encode_trusted(record)?] {
            count += tokens.len();
            encoded.extend(u32::try_from(tokens.len())?.to_le_bytes());
            encoded.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        }
    }
    fs::write(out, encoded)?;
    println!("{} bytes, {count} tokens", text.len());
    Ok(())
}
