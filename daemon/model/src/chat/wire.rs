//! How does a message look in JSON? As in OpenAI's chat completions, with DeepSeek's `reasoning_content`.

use super::message::{ChatMessage, Role, ToolCall};
use serde::{Deserialize, Serialize};

/// Content in parts is joined with this, as vLLM and llama.cpp do.
const BETWEEN_PARTS: &str = "\n";

#[derive(Deserialize, Serialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
    #[serde(alias = "reasoning", skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<Call>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize, Serialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(alias = "refusal")]
    text: Option<String>,
}

#[derive(Deserialize, Serialize)]
struct Call {
    #[serde(default)]
    id: String,
    /// Always a function; servers want it said.
    #[serde(default, rename = "type", skip_deserializing)]
    kind: Kind,
    function: Function,
}

#[derive(Clone, Copy, Default, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Function,
}

#[derive(Deserialize, Serialize)]
struct Function {
    name: String,
    #[serde(default)]
    arguments: String,
}

impl Content {
    fn text(self) -> Result<String, String> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let text = |part: Part| match part.text {
            // What an assistant has refused with comes back as a part of its own kind.
            Some(text) if part.kind == "text" || part.kind == "refusal" => Ok(text),
            None if part.kind == "text" => Err("a part of type 'text' has no 'text'".to_owned()),
            _ => Err(format!("content of type '{}' is not supported, only 'text' is", part.kind)),
        };
        Ok(parts.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.join(BETWEEN_PARTS))
    }
}

impl TryFrom<Message> for ChatMessage {
    type Error = String;

    fn try_from(message: Message) -> Result<Self, String> {
        let role: Role = message.role.parse().map_err(|error: crate::ModelError| error.to_string())?;
        let call = |call: Call| {
            // Some clients send nothing for a call without arguments.
            let arguments = call.function.arguments;
            let arguments = if arguments.is_empty() { "{}".to_owned() } else { arguments };
            ToolCall { id: call.id, name: call.function.name, arguments }
        };
        Ok(Self {
            role,
            content: message.content.map(Content::text).transpose()?,
            reasoning_content: message.reasoning_content,
            tool_calls: message.tool_calls.unwrap_or_default().into_iter().map(call).collect(),
            tool_call_id: message.tool_call_id,
            name: message.name,
        })
    }
}

impl From<ChatMessage> for Message {
    fn from(message: ChatMessage) -> Self {
        let call = |call: ToolCall| Call {
            id: call.id,
            kind: Kind::Function,
            function: Function { name: call.name, arguments: call.arguments },
        };
        let calls: Vec<Call> = message.tool_calls.into_iter().map(call).collect();
        Self {
            role: message.role.as_str().to_owned(),
            content: message.content.map(Content::Text),
            reasoning_content: message.reasoning_content,
            tool_calls: (!calls.is_empty()).then_some(calls),
            tool_call_id: message.tool_call_id,
            name: message.name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_clients_send_them() {
        let read = serde_json::from_str::<ChatMessage>;
        let parts = r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
        assert_eq!(read(parts).unwrap(), ChatMessage::new(Role::User, "a\nb"));
        let calls = r#"{"role": "assistant", "content": null, "reasoning": "r", "refusal": null,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]}"#;
        let message = read(calls).unwrap();
        assert_eq!((message.content, message.reasoning_content.as_deref()), (None, Some("r")));
        assert_eq!(message.tool_calls[0].arguments, "{}");
        let written = serde_json::to_string(&read(calls).unwrap()).unwrap();
        assert!(written.contains(r#""type":"function""#) && !written.contains("tool_call_id"));
        assert_eq!(read(&written).unwrap(), read(calls).unwrap());
        let image = r#"{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}"#;
        assert!(read(image).unwrap_err().to_string().contains("image_url"));
        assert!(read(r#"{"role": "robot", "content": "x"}"#).unwrap_err().to_string().contains("robot"));
    }
}
