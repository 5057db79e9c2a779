//! Can any JSON Schema or Lark grammar bring the compiler down, or keep it longer than the limit of `make fuzz`?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_engine::{GrammarCompiler, GrammarSpec};
use sparsed_model::{Tokenizer, TokenizerConfig};
use std::sync::LazyLock;

/// All bytes and three control tokens.
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    Tokenizer::from_json(include_bytes!("../seeds/bytes.json"), &TokenizerConfig::default()).expect("a fixture")
});
/// Keeps the trie of the vocabulary, as a model does.
static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(GrammarCompiler::default);

fuzz_target!(
    init: {
        // A panic of `llguidance` is caught and refused: the fuzzer's hook would end it here. One that is not caught
        // still ends it, where it leaves the target.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |input: &[u8]| {
        let spec = match serde_json::from_slice(input) {
            Ok(schema) => GrammarSpec::JsonSchema(schema),
            Err(_) => GrammarSpec::Lark(String::from_utf8_lossy(input).into_owned()),
        };
        drop(COMPILER.compile(spec, &TOKENIZER));
    }
);
