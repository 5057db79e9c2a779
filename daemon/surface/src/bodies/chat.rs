//! What is a chat completion? A conversation in, the assistant's next message out.

use super::answer::{Answer, Asked, Reply, Wire};
use super::sampling::SamplingFields;
use super::{parse, sessions};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sparsed_engine::api::{Event, Failure, Generate, Owner};
use sparsed_engine::{ChatMessage, ChatRequest, DEFAULT_MODEL, Role, Service, Wishes};
use std::time::{SystemTime, UNIX_EPOCH};

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 10_000;
/// Most functions that are offered.
const TOOLS_MAX: usize = 128;

/// The request; fields that are not named are ignored, as OpenAI's own servers do.
#[derive(Debug, Deserialize)]
struct ChatFields {
    model: Option<String>,
    messages: Vec<ChatMessage>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    /// OpenAI's: `none` for an answer without reasoning.
    reasoning_effort: Option<String>,
    /// vLLM's and llama.cpp's: further variables of the template; `thinking` and `enable_thinking` turn reasoning on.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Ours: the conversation that the daemon keeps and `messages` go on with.
    session_id: Option<String>,
}

/// What goes with `stream`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl StreamOptions {
    /// What the client wants back.
    pub(crate) fn reply(options: Option<Self>, stream: Option<bool>) -> Reply {
        Reply { stream: stream.unwrap_or(false), include_usage: options.unwrap_or_default().include_usage }
    }
}

/// A conversation that was asked to be continued, read but not yet a prompt.
#[derive(Debug)]
pub(crate) struct ChatAsk {
    fields: ChatFields,
    wishes: Wishes,
}

impl ChatAsk {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let (fields, sampling) = (parse::<ChatFields>(body)?, parse::<SamplingFields>(body)?);
        if fields.max_completion_tokens == Some(0) {
            return Err(Refusal::invalid("max_completion_tokens", "is 0, must be at least 1"));
        }
        let wishes = Wishes {
            max_tokens: fields.max_completion_tokens.or(fields.max_tokens),
            grammar: sampling.grammar()?,
            sampling: sampling.sampling()?,
            stops: sampling.stops()?,
            ignore_end: sampling.ignore_end(),
            urgency: sampling.urgency()?,
        };
        Ok(Self { fields, wishes })
    }

    /// Makes a prompt of it, on a thread that may compute, and lets go of `held` then.
    ///
    /// # Errors
    /// The model's, the session's, or what is wrong with the request.
    pub(crate) async fn prepare(
        self,
        service: &Service,
        owner: Owner,
        held: impl Send + 'static,
    ) -> Result<Asked<ChatWire>, Refusal> {
        let Self { fields, wishes } = self;
        let reply = StreamOptions::reply(fields.stream_options, fields.stream);
        let model = fields.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        if let Some(session) = fields.session_id.clone() {
            if let Some(model) = &fields.model {
                service.model(model)?;
            }
            let request = sessions::turn(service, owner, &session, fields.request()?, wishes).await?;
            return Ok(Asked { request, reply, wire: ChatWire });
        }
        let request = fields.request()?;
        let served = service.model(&model)?;
        let spec = wishes.grammar.clone();
        let made = tokio::task::spawn_blocking(move || {
            let prompt = served.chat_prompt(&request)?;
            drop(held);
            Ok::<_, Failure>((prompt, spec.map(|spec| served.grammar(spec)).transpose()?))
        });
        let (prompt, grammar) =
            made.await.map_err(|_| Failure::invalid("messages", "could not be made a prompt"))??;
        let request =
            Generate { model, prompt: prompt.tokens, grammar, reading: Some(prompt.reading), ..wishes.request(owner) };
        Ok(Asked { request, reply, wire: ChatWire })
    }
}

impl ChatFields {
    /// The conversation, as far as it can be checked without the model.
    fn request(self) -> Result<ChatRequest, Refusal> {
        let (messages, tools) = (self.messages, self.tools.unwrap_or_default());
        if messages.is_empty() || messages.len() > MESSAGES_MAX {
            let reason = format!("has {} entries, 1 to {MESSAGES_MAX} are allowed", messages.len());
            return Err(Refusal::invalid("messages", reason));
        }
        let silent = |message: &ChatMessage| message.content.is_none() && message.role != Role::Assistant;
        if let Some(at) = messages.iter().position(silent) {
            return Err(Refusal::invalid(&format!("messages[{at}].content"), "is missing"));
        }
        if tools.iter().any(|tool| !tool.is_object()) {
            return Err(Refusal::invalid("tools", "must be a list of objects with 'type' and 'function'"));
        }
        if tools.len() > TOOLS_MAX {
            return Err(Refusal::invalid("tools", format!("has {} entries, the limit is {TOOLS_MAX}", tools.len())));
        }
        let tools = match self.tool_choice {
            None | Some(Value::Null) => tools,
            Some(choice) if choice == "auto" => tools,
            Some(choice) if choice == "none" => Vec::new(),
            Some(_) => return Err(Refusal::invalid("tool_choice", "must be 'auto' or 'none'; no call is enforced")),
        };
        let mut template_arguments = self.chat_template_kwargs.unwrap_or_default();
        let asked = ["thinking", "enable_thinking"].map(|name| template_arguments.remove(name));
        let asked = asked.into_iter().flatten().find_map(|value| value.as_bool());
        let thinking = asked.or_else(|| self.reasoning_effort.map(|effort| effort != "none"));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let now = now.and_then(|since| i64::try_from(since.as_secs()).ok());
        Ok(ChatRequest { messages, tools, thinking, template_arguments, now, ..ChatRequest::default() })
    }
}

/// Writes answers as chat completions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChatWire;

impl ChatWire {
    fn delta(delta: &Value, finish_reason: Option<&str>) -> Value {
        json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason })
    }
}

/// A call as OpenAI has it; its id is made up here, the model has none.
fn call(name: &str, arguments: &str) -> Value {
    let id = format!("call_{:016x}", getrandom::u64().unwrap_or_default());
    json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
}

impl Wire for ChatWire {
    const ID_PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";

    fn choice(&self, answer: &Answer, finish_reason: &str) -> Value {
        let mut message = json!({ "role": "assistant", "content": answer.text });
        if !answer.reasoning.is_empty() {
            message["reasoning_content"] = json!(answer.reasoning);
        }
        if !answer.calls.is_empty() {
            message["tool_calls"] = answer.calls.iter().map(|(name, arguments)| call(name, arguments)).collect();
            if answer.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": finish_reason })
    }

    fn opening(&self) -> Option<Value> {
        Some(Self::delta(&json!({ "role": "assistant", "content": "" }), None))
    }

    fn piece(&self, event: &Event) -> Option<Value> {
        let delta = match event {
            Event::Delta { text, .. } if text.is_empty() => return None,
            Event::Delta { text, .. } => json!({ "content": text }),
            Event::Reasoning { text } => json!({ "reasoning_content": text }),
            Event::ToolCall { index, name, arguments } => {
                let mut call = call(name, arguments);
                call["index"] = json!(index);
                json!({ "tool_calls": [call] })
            }
            _ => return None,
        };
        Some(Self::delta(&delta, None))
    }

    fn last(&self, finish_reason: &str) -> Value {
        Self::delta(&json!({}), Some(finish_reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ChatRequest, Refusal> {
        serde_json::from_str::<ChatFields>(text).unwrap().request()
    }

    #[test]
    fn wishes_become_a_request() {
        let request = parsed(
            r#"{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "tool_choice": "none",
                "chat_template_kwargs": {"enable_thinking": false, "style": "short"}}"#,
        );
        let request = request.unwrap();
        assert!(request.tools.is_empty());
        assert_eq!((request.thinking, request.template_arguments.len()), (Some(false), 1));
    }

    #[test]
    fn what_cannot_be_kept_is_refused_by_name() {
        let param = |text: &str| parsed(text).unwrap_err().body()["error"]["param"].as_str().unwrap().to_owned();
        assert_eq!(param(r#"{"messages": []}"#), "messages");
        assert_eq!(
            param(r#"{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}"#),
            "tool_choice"
        );
    }

    #[test]
    fn calls_and_reasoning_stand_beside_the_content() {
        let calls = vec![("f".to_owned(), "{}".to_owned())];
        let answer = Answer { reasoning: "hm".to_owned(), calls, ..Answer::default() };
        let message = &ChatWire.choice(&answer, "tool_calls")["message"];
        assert!(message["content"].is_null() && message["reasoning_content"] == "hm");
        assert_eq!(message["tool_calls"][0]["function"]["name"], "f");
        let event = Event::ToolCall { index: 2, name: "f".to_owned(), arguments: "{}".to_owned() };
        assert_eq!(ChatWire.piece(&event).unwrap()["delta"]["tool_calls"][0]["index"], 2);
    }
}
