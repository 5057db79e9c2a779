//! `POST /v1/chat/completions`: a conversation in, the assistant's next message out.

use super::Shared;
use super::body::JsonBody;
use super::error::HttpError;
use super::generation::{Reply, Wire, answer};
use super::sampling::SamplingFields;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Generate};
use sparsed_engine::{ChatMessage, DEFAULT_MODEL};

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 10_000;

/// The request; fields that are not named are ignored, as OpenAI's own servers do.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    model: Option<String>,
    messages: Vec<Message>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    #[serde(flatten)]
    sampling: SamplingFields,
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

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    #[serde(default)]
    content: Option<Content>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: String,
}

pub(crate) async fn create(
    State(shared): State<Shared>,
    JsonBody(request): JsonBody<ChatRequest>,
) -> Result<Response, HttpError> {
    let sampling = request.sampling.sampling()?;
    let stops = request.sampling.stops()?;
    let messages = messages(request.messages)?;
    let model = request.model.unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    let served = shared.service.model(&model)?;
    let prompt = tokio::task::spawn_blocking(move || served.chat_prompt(&messages));
    let prompt = prompt.await.map_err(|_| Failure::invalid("messages", "could not be made a prompt"))??;
    let generate = Generate {
        model,
        prompt,
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
        sampling,
        stops,
        ignore_end: request.sampling.ignore_end(),
    };
    let reply = StreamOptions::reply(request.stream_options, request.stream);
    answer(&shared.service, generate, reply, ChatWire).await
}

fn messages(messages: Vec<Message>) -> Result<Vec<ChatMessage>, HttpError> {
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        let reason = format!("has {} entries, 1 to {MESSAGES_MAX} are allowed", messages.len());
        return Err(HttpError::invalid("messages", reason));
    }
    messages.into_iter().enumerate().map(|(at, message)| message.checked(at)).collect()
}

impl Message {
    fn checked(self, at: usize) -> Result<ChatMessage, HttpError> {
        if !["system", "developer", "user", "assistant"].contains(&self.role.as_str()) {
            let reason = format!("is '{}'; system, developer, user and assistant are served", self.role);
            return Err(HttpError::invalid(&format!("messages[{at}].role"), reason));
        }
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                if let Some(part) = parts.iter().find(|part| part.kind != "text") {
                    let reason = format!("has a part of type '{}'; only text is served", part.kind);
                    return Err(HttpError::invalid(&format!("messages[{at}].content"), reason));
                }
                parts.into_iter().map(|part| part.text).collect()
            }
        };
        Ok(ChatMessage { role: self.role, content })
    }
}

struct ChatWire;

impl Wire for ChatWire {
    const ID_PREFIX: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK_OBJECT: &'static str = "chat.completion.chunk";

    fn choice(&self, text: String, _tokens: &[u32], finish_reason: &str) -> Value {
        json!({
            "index": 0,
            "message": { "role": "assistant", "content": text },
            "logprobs": null,
            "finish_reason": finish_reason,
        })
    }

    fn opening(&self) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": null }))
    }

    fn chunk_choice(&self, text: &str, _tokens: &[u32], finish_reason: Option<&str>) -> Value {
        let delta = if finish_reason.is_some() { json!({}) } else { json!({ "content": text }) };
        json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Result<Vec<ChatMessage>, String> {
        let request: ChatRequest = serde_json::from_str(json).unwrap();
        messages(request.messages).map_err(|error| error.body()["error"]["param"].as_str().unwrap().to_owned())
    }

    #[test]
    fn text_parts_are_joined() {
        let parts = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}"#;
        assert_eq!(parsed(parts).unwrap(), [ChatMessage { role: "user".to_owned(), content: "ab".to_owned() }]);
    }

    #[test]
    fn pictures_and_unknown_roles_are_refused_by_place() {
        let picture = r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}"#;
        assert_eq!(parsed(picture).unwrap_err(), "messages[0].content");
        assert_eq!(parsed(r#"{"messages": [{"role": "boss", "content": "x"}]}"#).unwrap_err(), "messages[0].role");
        assert_eq!(parsed(r#"{"messages": []}"#).unwrap_err(), "messages");
    }
}
