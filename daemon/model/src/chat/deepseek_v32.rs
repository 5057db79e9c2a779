//! How does DeepSeek-V3.2 write a conversation? It ships no template but a program, `encoding/encoding_dsv32.py`.
//!
//! The text of the tools block is the model's and has blank lines, as in the outputs published beside that program;
//! copies in some engines lost them. Decisions where the program raises or engines differ:
//!
//! - Tools and the response format go with the first system message, or with an empty one before all others.
//! - Reasoning of turns before the last user message is dropped, whatever the program's `drop_thinking` says: its
//!   renderer has no place for it.
//! - Results of a turn's calls are all there or the request is refused; the program would leave their block open.

use super::json::dumps;
use super::marks::Marks;
use super::message::{ChatMessage, ChatRequest, Role, ToolCall};
use crate::ModelError;
use serde_json::Value;

/// Opens and closes reasoning.
pub(super) const THINK: (&str, &str) = ("<think>", "</think>");
/// Stands in every tag of a call.
pub(super) const DSML: &str = "｜DSML｜";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";

/// Renders one request.
pub(super) struct Encoder<'r> {
    request: &'r ChatRequest,
    marks: &'r Marks<'r>,
    bos: &'r str,
    eos: &'r str,
    thinking: bool,
    /// The last message of a user or developer.
    last_user: Option<usize>,
    out: String,
}

impl<'r> Encoder<'r> {
    pub(super) fn new(request: &'r ChatRequest, marks: &'r Marks<'r>, bos: &'r str, eos: &'r str) -> Self {
        let last_user = request.messages.iter().rposition(|m| matches!(m.role, Role::User | Role::Developer));
        // Off unless asked for, as in vLLM and SGLang.
        let thinking = request.thinking.unwrap_or(false);
        Self { request, marks, bos, eos, thinking, last_user, out: String::new() }
    }

    /// The prompt, with marks.
    ///
    /// # Errors
    /// An assistant's turn after the last user message without reasoning and calls while thinking is on; results that
    /// do not follow their calls; arguments that are no JSON object.
    pub(super) fn render(mut self) -> Result<String, ModelError> {
        self.out.push_str(self.bos);
        let messages = &self.request.messages;
        let first_is_system = messages.first().is_some_and(|message| message.role == Role::System);
        if !first_is_system {
            self.head()?;
        }
        let mut at = 0;
        while let Some(message) = messages.get(at) {
            let content = message.content.as_deref().unwrap_or_default();
            match message.role {
                Role::System => {
                    self.push_text(content);
                    if at == 0 {
                        self.head()?;
                    }
                }
                Role::User => {
                    self.out.push_str(USER);
                    self.push_text(content);
                    self.ask(at);
                }
                Role::Developer => {
                    self.out.push_str(USER);
                    self.out.push_str("\n\n# The user's message is: ");
                    self.push_text(content);
                    self.ask(at);
                }
                Role::Assistant => at += self.answer(at, message)?,
                Role::Tool => return Err(refused(at, "a tool's result without a call before it")),
            }
            at += 1;
        }
        Ok(self.out)
    }

    fn push_text(&mut self, text: &str) {
        self.out.push_str(&self.marks.text(text));
    }

    /// Tools and response format, as a system message ends with them.
    fn head(&mut self) -> Result<(), ModelError> {
        let functions = self.request.functions()?;
        if !functions.is_empty() {
            self.out.push_str("\n\n");
            self.out.push_str(&tools_intro());
            for function in functions {
                self.out.push_str(&dumps(&self.marks.json(function))?);
                self.out.push('\n');
            }
            self.out.push_str("</functions>\n");
        }
        if let Some(format) = &self.request.response_format {
            let schema = dumps(&self.marks.json(format))?;
            self.out
                .push_str("\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n");
            self.out.push_str(&schema);
        }
        Ok(())
    }

    /// Opens the assistant's turn after message `at`.
    fn ask(&mut self, at: usize) {
        self.out.push_str(ASSISTANT);
        self.think(self.last_user == Some(at));
    }

    fn think(&mut self, current: bool) {
        self.out.push_str(if current && self.thinking { THINK.0 } else { THINK.1 });
    }

    /// An assistant's message and the results of its calls; returns how many messages these are.
    fn answer(&mut self, at: usize, message: &ChatMessage) -> Result<usize, ModelError> {
        let current = self.last_user.is_none_or(|user| at > user);
        let reasoning = message.reasoning_content.as_deref().unwrap_or_default();
        if self.thinking && current {
            if reasoning.is_empty() && message.tool_calls.is_empty() {
                return Err(refused(at, "an answer without reasoning_content while thinking is on"));
            }
            self.push_text(reasoning);
            self.out.push_str(THINK.1);
        }
        self.push_text(message.content.as_deref().unwrap_or_default());
        if !message.tool_calls.is_empty() {
            self.calls(at, &message.tool_calls)?;
        }
        self.out.push_str(self.eos);
        self.results(at, message.tool_calls.len())
    }

    fn calls(&mut self, at: usize, calls: &[ToolCall]) -> Result<(), ModelError> {
        self.out.push_str(&format!("\n\n<{DSML}function_calls>\n"));
        for call in calls {
            let Ok(Value::Object(arguments)) = serde_json::from_str(&call.arguments) else {
                return Err(refused(at, "a call's arguments are no JSON object"));
            };
            let mut lines = Vec::with_capacity(arguments.len());
            for (key, value) in &arguments {
                let (is_string, value) = match value {
                    Value::String(text) => (true, self.marks.text(text)),
                    other => (false, dumps(&self.marks.json(other))?),
                };
                let key = self.marks.word(key);
                lines.push(format!("<{DSML}parameter name=\"{key}\" string=\"{is_string}\">{value}</{DSML}parameter>"));
            }
            let (name, lines) = (self.marks.word(&call.name), lines.join("\n"));
            self.out.push_str(&format!("<{DSML}invoke name=\"{name}\">\n{lines}\n</{DSML}invoke>\n"));
        }
        self.out.push_str(&format!("</{DSML}function_calls>"));
        Ok(())
    }

    /// The results of `calls` calls, which follow message `at`.
    fn results(&mut self, at: usize, calls: usize) -> Result<usize, ModelError> {
        let rest = self.request.messages.get(at + 1..).unwrap_or_default();
        let results = rest.iter().take_while(|message| message.role == Role::Tool).count();
        if results == 0 && (calls == 0 || rest.is_empty()) {
            return Ok(0);
        }
        if results != calls {
            return Err(refused(at, &format!("{calls} calls, but {results} results follow")));
        }
        self.out.push_str("\n\n<function_results>");
        for result in &rest[..results] {
            self.out.push_str("\n<result>");
            self.push_text(result.content.as_deref().unwrap_or_default());
            self.out.push_str("</result>");
        }
        self.out.push_str("\n</function_results>\n\n");
        self.think(self.last_user.is_none_or(|user| at > user));
        Ok(results)
    }
}

fn refused(at: usize, what: &str) -> ModelError {
    ModelError::Template(format!("messages[{at}]: {what}"))
}

/// The instructions before the list of functions.
fn tools_intro() -> String {
    let (open, close) = THINK;
    format!(
        "## Tools\n\n\
        You have access to a set of tools you can use to answer the user's question.\n\
        You can invoke functions by writing a \"<{DSML}function_calls>\" block like the following as part of your reply \
        to the user:\n\
        <{DSML}function_calls>\n<{DSML}invoke name=\"$FUNCTION_NAME\">\n\
        <{DSML}parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</{DSML}parameter>\n...\n\
        </{DSML}invoke>\n<{DSML}invoke name=\"$FUNCTION_NAME2\">\n...\n</{DSML}invoke>\n</{DSML}function_calls>\n\n\
        String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects \
        should use JSON format. The \"string\" attribute should be set to \"true\" for string type parameters and \
        \"false\" for other types (numbers, booleans, arrays, objects).\n\n\
        If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
        thinking block. Here is an example:\n\n\
        <{DSML}function_calls>\n...\n</{DSML}function_calls>\n\n<function_results>\n...\n</function_results>\n\n\
        {open}...thinking about results{close}\n\n\
        Here are the functions available in JSONSchema format:\n<functions>\n"
    )
}
