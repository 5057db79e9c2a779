//! Can any `tokenizer.json` or configuration make the tokenizer panic, or lose text?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_model::{TextStream, Tokenizer, TokenizerConfig};

fuzz_target!(|file: &[u8]| {
    // The configuration and a text follow the file, each after a NUL byte.
    let mut parts = file.splitn(3, |byte| *byte == 0);
    let (json, config, text) = (parts.next().unwrap_or_default(), parts.next(), parts.next().unwrap_or_default());
    let config = config.and_then(|config| TokenizerConfig::parse(config).ok()).unwrap_or_default();
    let Ok(tokenizer) = Tokenizer::from_json(json, &config) else { return };
    let text = String::from_utf8_lossy(text);
    for tokens in [tokenizer.encode(&text), tokenizer.encode_trusted(&text)].into_iter().flatten() {
        let mut stream = TextStream::new(tokenizer.end_tokens());
        for token in tokens {
            stream.push(&tokenizer, token);
        }
        stream.finish();
    }
});
