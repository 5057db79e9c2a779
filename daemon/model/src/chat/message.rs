//! What is a conversation? Messages, tools and wishes, as OpenAI's chat completions name them.

use crate::ModelError;
use serde_json::{Map, Value};
use std::str::FromStr;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Who sets the rules.
    System,
    /// Newer name of `System`; DeepSeek-V3.2 has a form of its own for it.
    Developer,
    /// Who asks.
    User,
    /// The model.
    Assistant,
    /// The result of a call.
    Tool,
}

impl Role {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl FromStr for Role {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let all = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];
        let unknown = || ModelError::Template(format!("unknown role '{name}'"));
        all.into_iter().find(|role| role.as_str() == name).ok_or_else(unknown)
    }
}

/// A function that the model called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The client's name for the call; ties it to its result.
    pub id: String,
    /// The function.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// One message. It is read from JSON and written as in OpenAI's chat completions; text parts of content are joined.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "super::wire::Message", into = "super::wire::Message")]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// The text; `None` beside tool calls.
    pub content: Option<String>,
    /// What an assistant thought before it answered.
    pub reasoning_content: Option<String>,
    /// What an assistant called.
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool's result: the call.
    pub tool_call_id: Option<String>,
    /// A name for the speaker, or a tool's function.
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message of text alone.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(content.into()),
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }

    /// The text of an answer that could go on: an assistant's that calls nothing.
    pub fn unfinished(&self) -> Option<&str> {
        let is_answer = self.role == Role::Assistant && self.tool_calls.is_empty();
        self.content.as_deref().filter(|text| is_answer && !text.is_empty())
    }
}

/// What is rendered.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ChatRequest {
    /// The conversation so far.
    pub messages: Vec<ChatMessage>,
    /// Functions that may be called: OpenAI's `tools`, objects with `type` and `function`.
    pub tools: Vec<Value>,
    /// Whether the model should think first; `None`: as the model's template has it.
    pub thinking: Option<bool>,
    /// How hard, in the client's word (OpenAI's `reasoning_effort`), for templates that have degrees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effort: Option<String>,
    /// The last message is an answer that goes on, instead of a new one.
    pub continues: bool,
    /// A JSON schema that the answer must follow, for encodings that tell the model (DeepSeek-V3.2).
    pub response_format: Option<Value>,
    /// Further variables of the template: `chat_template_kwargs`.
    pub template_arguments: Map<String, Value>,
    /// Seconds since 1970, for templates that name the date; this crate has no clock.
    pub now: Option<i64>,
}

impl ChatRequest {
    /// The `function` objects of the tools; each has a name.
    ///
    /// # Errors
    /// A tool without function or name, named by its index.
    pub(super) fn functions(&self) -> Result<Vec<&Value>, ModelError> {
        let mut functions = Vec::with_capacity(self.tools.len());
        for (at, tool) in self.tools.iter().enumerate() {
            let function = tool.get("function").filter(|function| function.get("name").is_some_and(Value::is_string));
            functions.push(function.ok_or_else(|| ModelError::Template(format!("tools[{at}] has no function.name")))?);
        }
        Ok(functions)
    }
}
