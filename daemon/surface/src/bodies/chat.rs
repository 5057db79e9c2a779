//! What is a chat completion? A conversation in, the assistant's next message out.

mod wire;

pub(crate) use wire::ChatWire;

use super::answer::{Asked, StreamOptions, now};
use super::figures::Telling;
use super::forms::FormFields;
use super::missing::{MissingFields, refuse_asked};
use super::sampling::{SamplingFields, limit};
use super::whole::whole;
use super::{fields, models, parse, sessions};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Map, Value};
use sparsed_engine::api::{Calling, Failure, Generate, Owner, Relay, RelayPrompt};
use sparsed_engine::{ChatMessage, ChatRequest, DEFAULT_MODEL, GrammarSpec, Held, Role, ServedModel, Service, Wishes};

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 10_000;
/// Longest word for an effort, in bytes.
const EFFORT_BYTES_MAX: usize = 32;
/// Most functions that are offered.
const TOOLS_MAX: usize = 128;

/// The request; fields that are not named are ignored, as OpenAI's own servers do.
#[derive(Debug, Deserialize)]
struct ChatFields {
    model: Option<String>,
    messages: Vec<ChatMessage>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(default, deserialize_with = "whole")]
    max_tokens: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    max_completion_tokens: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    n_predict: Option<i64>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    /// vLLM's: the last message is an answer that goes on.
    continue_final_message: Option<bool>,
    /// vLLM's: whether an answer begins, which is so unless one goes on.
    add_generation_prompt: Option<bool>,
    /// vLLM's: the last message is told again before the answer.
    echo: Option<bool>,
    /// OpenAI's: how hard to think; `none` for an answer without reasoning.
    reasoning_effort: Option<String>,
    /// vLLM's and llama.cpp's: further variables of the template; `thinking` and `enable_thinking` turn reasoning on.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Ours: the conversation that the daemon keeps and `messages` go on with.
    session_id: Option<String>,
}

/// Whether a function must be called.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected 'auto', 'none', 'required', a function or allowed_tools")]
enum ToolChoice {
    Mode(ToolMode),
    /// This one.
    Named {
        #[serde(rename = "type")]
        #[expect(dead_code, reason = "there is only one")]
        kind: FunctionKind,
        function: NamedFunction,
    },
    /// Of the tools these.
    Allowed {
        #[serde(rename = "type")]
        #[expect(dead_code, reason = "there is only one")]
        kind: AllowedKind,
        allowed_tools: AllowedTools,
    },
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AllowedKind {
    AllowedTools,
}

#[derive(Clone, Debug, Deserialize)]
struct AllowedTools {
    mode: ToolMode,
    tools: Vec<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ToolMode {
    Auto,
    None,
    Required,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FunctionKind {
    Function,
}

#[derive(Clone, Debug, Deserialize)]
struct NamedFunction {
    name: String,
}

/// A conversation that was asked to be continued, read but not yet a prompt.
#[derive(Debug)]
pub(crate) struct ChatAsk {
    fields: ChatFields,
    wishes: Wishes,
    n: u32,
    logprobs: Option<u32>,
    telling: Telling,
}

impl ChatAsk {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let (mut fields, sampling) = (parse::<ChatFields>(body)?, parse::<SamplingFields>(body)?);
        fields::check::<ChatFields, SamplingFields, FormFields, MissingFields>(body)?;
        parse::<MissingFields>(body)?.refuse()?;
        let (n, logprobs) = (sampling.answers()?, sampling.logprobs_of_chat()?);
        if fields.session_id.is_some() && (n > 1 || logprobs.is_some()) {
            let name = if n > 1 { "n" } else { "logprobs" };
            return Err(Refusal::invalid(name, "is not served in a session"));
        }
        if fields.session_id.is_some() && fields.continue_final_message == Some(true) {
            let reason = "is not served in a session: it has a way to continue";
            return Err(Refusal::invalid("continue_final_message", reason));
        }
        fields.refuse_what_is_missing()?;
        fields.narrow()?;
        let max_tokens = limit("max_completion_tokens", fields.max_completion_tokens)?
            .or(limit("max_tokens", fields.max_tokens)?)
            .or(limit("n_predict", fields.n_predict)?);
        let mut wishes = sampling.wishes(max_tokens, parse::<FormFields>(body)?.spec()?)?;
        wishes.one_call = fields.parallel_tool_calls == Some(false);
        Ok(Self { fields, wishes, n, logprobs, telling: sampling.telling() })
    }

    /// The same, whose answer is wanted although nobody waits for it.
    pub(crate) fn in_background(mut self, in_background: bool) -> Self {
        self.wishes.in_background = in_background;
        self
    }

    /// The same, which is to be turn number `turn` of its session and no other.
    pub(super) fn at_turn(mut self, turn: u32) -> Self {
        self.wishes.at_turn = Some(turn);
        self
    }

    /// Whether it is a turn of a session.
    pub(super) fn is_turn(&self) -> bool {
        self.fields.session_id.is_some()
    }

    /// Whether [`Self::prepare`] may take longer than somebody waits who hears nothing: the model is to be loaded, or
    /// an answer of its session that was cut is to be finished.
    pub(crate) async fn waits(&self, service: &Service, owner: Owner) -> bool {
        match &self.fields.session_id {
            Some(session) => sessions::turn_waits(service, owner, session).await,
            None => models::is_absent(service, self.fields.model.as_deref().unwrap_or(DEFAULT_MODEL)),
        }
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
        let Self { fields, mut wishes, n, logprobs, telling } = self;
        let reply = StreamOptions::reply(fields.stream_options, fields.stream, telling);
        wishes.progress = reply.telling.is_any();
        let model = fields.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        if let Some(session) = fields.session_id.clone() {
            let own = sessions::model_of(service, owner, &session).await?;
            if let Some(model) = fields.model.as_ref().filter(|model| service.canonical(model) != own) {
                let reason = format!("is '{model}', the session's is '{own}': make a new session for another one");
                return Err(Refusal::invalid("model", reason));
            }
            let needed = fields.constrains_calls(&wishes);
            let served = if needed { Some(models::held(service, owner, &own).await?) } else { None };
            let request = fields.request(served.as_ref().map(|held| &*held.model), &mut wishes)?;
            let request = sessions::turn(service, owner, &session, request, wishes).await?;
            return Ok(Asked { request: request.into(), siblings: Vec::new(), per_prompt: 1, reply, wire: ChatWire });
        }
        if service.elsewhere(&model).is_some() {
            let prompt = fields.relayed(&mut wishes)?;
            let relay = Relay { model, owner, prompt, wishes, logprobs };
            let siblings = (1..n).map(|nth| relay.sibling(nth).into()).collect();
            return Ok(Asked { request: relay.into(), siblings, per_prompt: n as usize, reply, wire: ChatWire });
        }
        let Held { model: served, lease } = models::held(service, owner, &model).await?;
        let lease = Some(lease);
        let request = fields.request(Some(&*served), &mut wishes)?;
        let asked = wishes.clone();
        let made = tokio::task::spawn_blocking(move || {
            let prompt = served.chat_prompt(&request)?;
            drop(held);
            Ok::<_, Failure>((prompt, asked.compiled(&served)?))
        });
        let (prompt, grammar) =
            made.await.map_err(|_| Failure::invalid("messages", "could not be made a prompt"))??;
        let (prompt, reading) = (prompt.tokens, Some(prompt.reading));
        let request = Generate { model, prompt, grammar, reading, logprobs, lease, ..wishes.request(owner) };
        let siblings = (1..n).map(|nth| request.sibling(nth).into()).collect();
        Ok(Asked { request: request.into(), siblings, per_prompt: n as usize, reply, wire: ChatWire })
    }
}

impl ChatFields {
    /// Whether a function must be called.
    fn enforces_call(&self) -> bool {
        matches!(self.tool_choice, Some(ToolChoice::Mode(ToolMode::Required) | ToolChoice::Named { .. }))
    }

    /// Whether calls must follow a grammar, of which the model has to be asked: a call is enforced, or what is no call
    /// has a form.
    fn constrains_calls(&self, wishes: &Wishes) -> bool {
        let none = self.tool_choice.as_ref().is_some_and(ToolChoice::is_none);
        let offers = !none && self.tools.as_ref().is_some_and(|tools| !tools.is_empty());
        self.enforces_call() || (offers && wishes.grammar.as_ref().is_some_and(is_json))
    }

    fn refuse_what_is_missing(&self) -> Result<(), Refusal> {
        let asked = [
            // A prompt after which nothing is to be said has no answer.
            (
                "add_generation_prompt",
                self.add_generation_prompt == Some(false) && self.continue_final_message != Some(true),
            ),
            ("echo", self.echo == Some(true)),
        ];
        refuse_asked(&asked, "is not served in chats as it is said")
    }

    /// Leaves those tools that `tool_choice` allows, if it says so.
    fn narrow(&mut self) -> Result<(), Refusal> {
        let Some(ToolChoice::Allowed { allowed_tools: AllowedTools { mode, tools: allowed }, .. }) = &self.tool_choice
        else {
            return Ok(());
        };
        let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
        let (names, tools): (Vec<_>, _) = (allowed.iter().map(name).collect(), self.tools.get_or_insert_default());
        if names.iter().any(|allowed| allowed.is_none() || !tools.iter().any(|tool| name(tool) == *allowed)) {
            return Err(Refusal::invalid("tool_choice", "allows a function that is not among the tools"));
        }
        tools.retain(|tool| names.contains(&name(tool)));
        self.tool_choice = Some(ToolChoice::Mode(*mode));
        Ok(())
    }

    /// The conversation. Where calls must follow a grammar, what `served`, the model that answers, must write is one of
    /// the wishes then.
    fn request(mut self, served: Option<&ServedModel>, wishes: &mut Wishes) -> Result<ChatRequest, Refusal> {
        let (constrains, enforces) = (self.constrains_calls(wishes), self.enforces_call());
        let choice = self.tool_choice.take();
        let Some(served) = served.filter(|_| constrains) else {
            return self.conversation(choice.is_some_and(|choice| choice.is_none()));
        };
        let mut request = self.conversation(false)?;
        wishes.grammar = if enforces {
            drop_form(wishes)?;
            let only = match &choice {
                Some(ToolChoice::Named { function, .. }) => Some(function.name.as_str()),
                _ => None,
            };
            Some(served.call_grammar(&request.tools, only)?)
        } else {
            wishes.grammar.take().map(|json| served.call_or_json(&request.tools, json))
        };
        // Its reasoning would have to follow the grammar too.
        request.thinking = Some(false);
        Ok(request)
    }

    /// The conversation as another engine hears it, which enforces a call by itself.
    fn relayed(mut self, wishes: &mut Wishes) -> Result<RelayPrompt, Refusal> {
        let (calling, no_tools) = match self.tool_choice.take() {
            None | Some(ToolChoice::Mode(ToolMode::Auto) | ToolChoice::Allowed { .. }) => (Calling::Free, false),
            Some(ToolChoice::Mode(ToolMode::None)) => (Calling::Free, true),
            Some(ToolChoice::Mode(ToolMode::Required)) => (Calling::Required, false),
            Some(ToolChoice::Named { function, .. }) => (Calling::Only(function.name), false),
        };
        if calling != Calling::Free {
            drop_form(wishes)?;
        }
        let chat = self.conversation(no_tools)?;
        if calling != Calling::Free && chat.tools.is_empty() {
            return Err(Refusal::invalid("tool_choice", "needs tools"));
        }
        let is_offered = |name: &str| chat.tools.iter().any(|tool| tool["function"]["name"] == *name);
        if matches!(&calling, Calling::Only(name) if !is_offered(name)) {
            return Err(Refusal::invalid("tool_choice", "names a function that is not among the tools"));
        }
        Ok(RelayPrompt::Chat { chat: Box::new(chat), calling })
    }

    /// The conversation, as far as it can be checked without the model.
    fn conversation(self, no_tools: bool) -> Result<ChatRequest, Refusal> {
        let (messages, tools) = (self.messages, self.tools.unwrap_or_default());
        if messages.is_empty() || messages.len() > MESSAGES_MAX {
            let reason = format!("has {} entries, 1 to {MESSAGES_MAX} are allowed", messages.len());
            return Err(Refusal::invalid("messages", reason));
        }
        let silent = |message: &ChatMessage| message.content.is_none() && message.role != Role::Assistant;
        if let Some(at) = messages.iter().position(silent) {
            return Err(Refusal::invalid(&format!("messages[{at}].content"), "is missing"));
        }
        let is_function = |tool: &Value| {
            let kind = tool.get("type").is_none_or(|kind| kind == "function");
            kind && tool["function"]["name"].as_str().is_some_and(|name| !name.is_empty())
        };
        if let Some(at) = tools.iter().position(|tool| !is_function(tool)) {
            let reason = "must have the type 'function' and a 'function' with a 'name': no others are served";
            return Err(Refusal::invalid(&format!("tools[{at}]"), reason));
        }
        if tools.len() > TOOLS_MAX {
            return Err(Refusal::invalid("tools", format!("has {} entries, the limit is {TOOLS_MAX}", tools.len())));
        }
        let tools = if no_tools { Vec::new() } else { tools };
        let continues = self.continue_final_message == Some(true);
        if continues && messages.last().and_then(ChatMessage::unfinished).is_none() {
            return Err(Refusal::invalid("continue_final_message", "needs a last message of an assistant, with text"));
        }
        let mut template_arguments = self.chat_template_kwargs.unwrap_or_default();
        let asked = ["thinking", "enable_thinking"].map(|name| template_arguments.remove(name));
        let asked = asked.into_iter().flatten().find_map(|value| value.as_bool());
        let effort = self.reasoning_effort;
        if effort.as_deref().is_some_and(|effort| !is_effort(effort)) {
            let reason = format!("must be a word of 1 to {EFFORT_BYTES_MAX} letters, digits, '-' and '_'");
            return Err(Refusal::invalid("reasoning_effort", reason));
        }
        let thinking = asked.or_else(|| effort.as_ref().map(|effort| effort != "none"));
        let (now, rest) = (i64::try_from(now()).ok(), ChatRequest::default());
        Ok(ChatRequest { messages, tools, thinking, effort, continues, template_arguments, now, ..rest })
    }
}

/// Which words there are is the template's, or another engine's, to know.
fn is_effort(word: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=EFFORT_BYTES_MAX).contains(&word.len()) && word.bytes().all(is_plain)
}

/// Where a call is enforced, nothing is left that `response_format` would be about.
fn drop_form(wishes: &mut Wishes) -> Result<(), Refusal> {
    match wishes.grammar.take() {
        Some(grammar) if !is_json(&grammar) => {
            let form = wishes.form.unwrap_or("grammar");
            Err(Refusal::invalid("tool_choice", format!("excludes {form}")))
        }
        _ => Ok(()),
    }
}

/// Whether it comes from `response_format`.
fn is_json(grammar: &GrammarSpec) -> bool {
    matches!(grammar, GrammarSpec::JsonObject | GrammarSpec::JsonSchema(_))
}

impl ToolChoice {
    fn is_none(&self) -> bool {
        matches!(self, Self::Mode(ToolMode::None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(text: &str) -> Result<ChatRequest, Refusal> {
        let fields: ChatFields = serde_json::from_str(text).unwrap();
        let none = fields.tool_choice.as_ref().is_some_and(ToolChoice::is_none);
        fields.conversation(none)
    }

    #[test]
    fn wishes_become_a_request() {
        let request = parsed(
            r#"{"messages": [{"role": "user", "content": "x"}], "tool_choice": "none",
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "chat_template_kwargs": {"enable_thinking": false, "style": "short"}}"#,
        );
        let request = request.unwrap();
        assert!(request.tools.is_empty());
        assert_eq!((request.thinking, request.template_arguments.len()), (Some(false), 1));
    }

    #[test]
    fn an_effort_is_a_word_that_is_kept_and_says_whether_to_think() {
        let asked =
            |fields: &str| parsed(&format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], {fields}}}"#));
        let kept = |fields: &str| asked(fields).map(|request| (request.thinking, request.effort)).unwrap();
        assert_eq!(kept(r#""reasoning_effort": "low""#), (Some(true), Some("low".to_owned())));
        assert_eq!(kept(r#""reasoning_effort": "none""#), (Some(false), Some("none".to_owned())));
        let both = r#""reasoning_effort": "low", "chat_template_kwargs": {"thinking": false}"#;
        assert_eq!(kept(both), (Some(false), Some("low".to_owned())));
        for wrong in ["", "<s>", &"x".repeat(33)] {
            let refused = asked(&format!(r#""reasoning_effort": "{wrong}""#)).unwrap_err();
            assert_eq!(refused.body()["error"]["param"], "reasoning_effort");
        }
    }

    #[test]
    fn what_cannot_be_kept_is_refused_by_name() {
        let param = |text: &str| parsed(text).unwrap_err().body()["error"]["param"].as_str().unwrap().to_owned();
        assert_eq!(param(r#"{"messages": []}"#), "messages");
        for tool in [r#"{"type": "custom", "custom": {"name": "f"}}"#, r#"{"function": {"name": ""}}"#, "1"] {
            let tools = format!(r#""tools": [{{"function": {{"name": "f"}}}}, {tool}]"#);
            assert_eq!(param(&format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], {tools}}}"#)), "tools[1]");
        }
    }

    #[test]
    fn a_prompt_without_an_answer_and_an_echo_are_refused_by_name() {
        let asked = |fields: &str| {
            let messages = r#"[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]"#;
            let read = ChatAsk::read(format!(r#"{{"messages": {messages}, {fields}}}"#).as_bytes());
            read.map(|_| ()).map_err(|error| error.body()["error"]["param"].clone())
        };
        assert_eq!(asked(r#""add_generation_prompt": false"#), Err("add_generation_prompt".into()));
        assert_eq!(asked(r#""add_generation_prompt": false, "continue_final_message": true"#), Ok(()));
        assert_eq!(asked(r#""echo": true"#), Err("echo".into()));
        assert_eq!(asked(r#""add_generation_prompt": true, "echo": false"#), Ok(()));
    }

    #[test]
    fn of_the_tools_those_are_left_that_are_allowed() {
        let asked = |allowed: &str| {
            let function = |name: &str| json!({ "type": "function", "function": { "name": name } });
            let choice = json!({
                "type": "allowed_tools", "allowed_tools": { "mode": "required", "tools": [function(allowed)] },
            });
            let body = json!({
                "messages": [{ "role": "user", "content": "x" }], "tools": [function("f"), function("g")],
                "tool_choice": choice, "parallel_tool_calls": false,
            });
            ChatAsk::read(body.to_string().as_bytes())
        };
        let ask = asked("g").unwrap();
        assert!(ask.fields.enforces_call() && ask.wishes.one_call);
        assert_eq!(ask.fields.tools.unwrap()[0]["function"]["name"], "g");
        assert_eq!(asked("h").unwrap_err().body()["error"]["param"], "tool_choice");
    }

    #[test]
    fn another_engine_is_not_asked_for_a_call_of_what_is_not_offered() {
        let asked = |called: &str| {
            let function = |name: &str| json!({ "type": "function", "function": { "name": name } });
            let body = json!({
                "messages": [{ "role": "user", "content": "x" }], "tools": [function("f")], "tool_choice": function(called),
            });
            let ChatAsk { fields, mut wishes, .. } = ChatAsk::read(body.to_string().as_bytes()).unwrap();
            fields.relayed(&mut wishes).map_err(|error| error.body()["error"]["param"].clone())
        };
        assert!(matches!(asked("f"), Ok(RelayPrompt::Chat { calling: Calling::Only(name), .. }) if name == "f"));
        assert_eq!(asked("g").unwrap_err(), "tool_choice");
    }

    #[test]
    fn a_form_of_the_answer_is_nothing_beside_a_call_that_is_enforced_but_a_grammar_is_a_mistake() {
        let mut wishes = Wishes { grammar: Some(GrammarSpec::JsonObject), ..Wishes::default() };
        drop_form(&mut wishes).unwrap();
        assert!(wishes.grammar.is_none());
        wishes.grammar = Some(GrammarSpec::Lark("start: \"a\"".to_owned()));
        assert_eq!(drop_form(&mut wishes).unwrap_err().body()["error"]["param"], "tool_choice");
    }
}
