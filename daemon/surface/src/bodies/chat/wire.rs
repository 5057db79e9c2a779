//! How is an answer written as a chat completion?

use super::super::answer::{Answer, Wire};
use super::super::logprobs;
use serde_json::{Value, json};
use sparsed_engine::api::{Event, Likelihood};

/// Writes answers as chat completions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChatWire;

impl ChatWire {
    fn delta(delta: &Value, finish_reason: Option<&str>) -> Value {
        json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason })
    }
}

/// A call as OpenAI has it.
fn call(id: &str, name: &str, arguments: &str) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

impl Wire for ChatWire {
    const ID_PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";

    fn choice(&self, _: usize, answer: &Answer, finish_reason: &str) -> Value {
        let mut message = json!({ "role": "assistant", "content": answer.text });
        if !answer.reasoning.is_empty() {
            message["reasoning_content"] = json!(answer.reasoning);
        }
        if !answer.calls.is_empty() {
            message["tool_calls"] = answer.calls.iter().map(|one| call(&one.id, &one.name, &one.arguments)).collect();
            if answer.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": finish_reason })
    }

    fn opening(&self, _: usize) -> Option<Value> {
        Some(Self::delta(&json!({ "role": "assistant", "content": "" }), None))
    }

    fn piece(&self, event: &Event) -> Option<Value> {
        let delta = match event {
            Event::Delta { text, .. } if text.is_empty() => return None,
            Event::Delta { text, .. } => json!({ "content": text }),
            Event::Reasoning { text } => json!({ "reasoning_content": text }),
            Event::ToolCall { index, id, name, arguments } => {
                let mut call = call(id, name, arguments);
                call["index"] = json!(index);
                json!({ "tool_calls": [call] })
            }
            _ => return None,
        };
        Some(Self::delta(&delta, None))
    }

    fn silence(&self) -> Value {
        Self::delta(&json!({}), None)
    }

    fn last(&self, finish_reason: &str) -> Value {
        Self::delta(&json!({}), Some(finish_reason))
    }

    fn logprobs(&self, likelihoods: &[Likelihood], _: usize) -> Value {
        logprobs::of_chat(likelihoods)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::ToolCall;

    #[test]
    fn calls_and_reasoning_stand_beside_the_content() {
        let [id, name, arguments] = ["call_7", "f", "{}"].map(str::to_owned);
        let calls = vec![ToolCall { id: id.clone(), name: name.clone(), arguments: arguments.clone() }];
        let answer = Answer { reasoning: "hm".to_owned(), calls, ..Answer::default() };
        let message = &ChatWire.choice(0, &answer, "tool_calls")["message"];
        assert!(message["content"].is_null() && message["reasoning_content"] == "hm");
        assert_eq!(message["tool_calls"][0]["function"]["name"], "f");
        let piece = ChatWire.piece(&Event::ToolCall { index: 2, id, name, arguments }).unwrap();
        let told = [&piece["delta"]["tool_calls"][0], &message["tool_calls"][0]];
        assert_eq!(
            (&told[0]["index"], &told[0]["id"], &told[1]["id"]),
            (&json!(2), &json!("call_7"), &json!("call_7"))
        );
    }
}
