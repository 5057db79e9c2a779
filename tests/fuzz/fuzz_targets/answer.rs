//! Can any answer make the parser of reasoning and calls panic, or read differently when it comes in pieces?
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use sparsed_model::{ChatFormat, ChatMessage, ChatRequest, OutputEvent, Prompt, Role, Tokenizer, TokenizerConfig};
use std::sync::LazyLock;

const HERMES: &str = "{{ messages[0].content }}{% if tools %}<tool_call></tool_call>{% endif %}";

static PROMPTS: LazyLock<Vec<Prompt>> = LazyLock::new(|| {
    let tokenizer = Tokenizer::from_json(include_bytes!("../seeds/bytes.json"), &TokenizerConfig::default());
    let tokenizer = tokenizer.expect("a fixture");
    let parameters = json!({"properties": {"a": {"type": "string"}}});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
    let mut formats: Vec<ChatFormat> = ["deepseek-v3.2", "deepseek-v3.1", "glm-5"]
        .map(|name| ChatFormat::built_in(name, &tokenizer).expect("its name is in the table"))
        .into();
    formats.extend(ChatFormat::choose(Some(HERMES), "", &tokenizer).expect("it compiles"));
    let render = |format: &ChatFormat, thinking| {
        let messages = vec![ChatMessage::new(Role::User, "x")];
        let tools = vec![tool.clone()];
        let request = ChatRequest { messages, tools, thinking: Some(thinking), ..ChatRequest::default() };
        format.render(&request).expect("a plain request")
    };
    formats.iter().flat_map(|format| [true, false].map(|thinking| render(format, thinking))).collect()
});

fn read<'t>(prompt: &Prompt, pieces: impl Iterator<Item = &'t str>) -> Vec<OutputEvent> {
    let mut parser = prompt.parser();
    let mut joined: Vec<OutputEvent> = Vec::new();
    let mut events: Vec<OutputEvent> = pieces.flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    for event in events {
        match (joined.last_mut(), event) {
            (Some(OutputEvent::Reasoning(text)), OutputEvent::Reasoning(more))
            | (Some(OutputEvent::Content(text)), OutputEvent::Content(more)) => text.push_str(&more),
            (_, event) => joined.push(event),
        }
    }
    joined
}

fuzz_target!(|input: &[u8]| {
    let Some((first, answer)) = input.split_first() else { return };
    let prompt = &PROMPTS[usize::from(*first) % PROMPTS.len()];
    let answer = String::from_utf8_lossy(answer);
    let whole = read(prompt, std::iter::once(&*answer));
    assert_eq!(whole, read(prompt, answer.split_inclusive(|_| true)));
    for event in &whole {
        if let OutputEvent::ToolCall { arguments, .. } = event {
            assert!(serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).is_ok());
        }
    }
});
