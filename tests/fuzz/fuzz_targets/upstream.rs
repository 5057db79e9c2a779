//! Can any stream of an engine elsewhere make its reader panic, say more than there is, or read differently when it
//! comes in pieces?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_engine::api::Event;
use sparsed_upstream::probe::stream;

fuzz_target!(|input: &[u8]| {
    let whole = stream([input]);
    assert_eq!(whole, stream(input.chunks(1)));
    assert_eq!(whole, stream(input.chunks(7)));
    let (events, end) = whole;
    let n_bytes: usize = events
        .iter()
        .map(|event| match event {
            Event::Delta { text, .. } | Event::Reasoning { text } => text.len(),
            Event::ToolCall { name, arguments, .. } => name.len() + arguments.len().saturating_sub(2),
            _ => 0,
        })
        .sum();
    // An escape of six letters stands for three bytes at most.
    assert!(n_bytes <= input.len());
    if let Ok((_, usage)) = end {
        assert!(usage.cached_tokens <= usage.prompt_tokens && usage.reasoning_tokens <= usage.completion_tokens);
    }
});
