//! How does a response's request become a chat's?

use super::script::Head;
use crate::bodies::answer::now;
use crate::bodies::figures::Telling;
use crate::bodies::forms::FormFields;
use crate::bodies::missing::{MissingFields, is_asked, refuse_asked};
use crate::bodies::sampling::SamplingFields;
use crate::bodies::whole::whole;
use crate::bodies::{fields, parse};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sparsed_engine::{DEFAULT_MODEL, Sampling};

/// A thing to include that is not there; the others belong to tools that are not there either, or are not needed.
const LOGPROBS: &str = "message.output_text.logprobs";

/// The request. What is not named is ignored.
#[derive(Debug, Deserialize)]
pub(super) struct Fields {
    pub(super) model: Option<String>,
    input: Input,
    pub(super) instructions: Option<String>,
    pub(super) stream: Option<bool>,
    pub(super) background: Option<bool>,
    pub(super) store: Option<bool>,
    pub(super) previous_response_id: Option<String>,
    #[serde(default, deserialize_with = "whole")]
    max_output_tokens: Option<u32>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    text: Option<TextFields>,
    reasoning: Option<ReasoningFields>,
    chat_template_kwargs: Option<Value>,
    return_progress: Option<bool>,
    timings_per_token: Option<bool>,
    metadata: Option<Value>,
    truncation: Option<String>,
    // What changes nothing here, and is told again.
    max_tool_calls: Option<Value>,
    safety_identifier: Option<Value>,
    prompt_cache_key: Option<Value>,
    user: Option<Value>,
    // What would change the answer and is not served.
    conversation: Option<Value>,
    prompt: Option<Value>,
    continue_final_message: Option<Value>,
    include: Option<Vec<String>>,
    #[serde(default, deserialize_with = "whole")]
    top_logprobs: Option<u32>,
    /// What responses share with chats: how tokens are chosen, and the form of the answer.
    #[serde(skip)]
    shared: Map<String, Value>,
}

/// What chats call otherwise: such a wish is refused with its name here, rather than passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ChatsOwn {
    messages: Option<Value>,
    max_tokens: Option<Value>,
    max_completion_tokens: Option<Value>,
    n_predict: Option<Value>,
    response_format: Option<Value>,
    reasoning_effort: Option<Value>,
    session_id: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of items")]
enum Input {
    Text(String),
    Items(Vec<Map<String, Value>>),
}

#[derive(Debug, Deserialize)]
struct TextFields {
    format: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct ReasoningFields {
    effort: Option<String>,
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(super) fn read(body: &[u8]) -> Result<Self, Refusal> {
        let mut fields: Self = parse(body)?;
        fields::check::<Self, MissingFields, SamplingFields, FormFields>(body)?;
        parse::<MissingFields>(body)?.refuse()?;
        parse::<ChatsOwn>(body)?.refuse()?;
        let asks = [
            ("conversation", is_asked(&fields.conversation)),
            ("prompt", is_asked(&fields.prompt)),
            ("continue_final_message", is_asked(&fields.continue_final_message)),
            ("top_logprobs", fields.top_logprobs.is_some_and(|n| n > 0)),
            ("truncation", fields.truncation.as_ref().is_some_and(|kind| kind != "disabled")),
            ("include", fields.include.iter().flatten().any(|name| name == LOGPROBS)),
        ];
        refuse_asked(&asks, "is not served")?;
        fields.shared = shared(body)?;
        fields.check_form(parse::<FormFields>(body)?.spec()?.is_some())?;
        if fields.background == Some(true) && fields.store == Some(false) {
            return Err(Refusal::invalid("background", "needs a response that is stored"));
        }
        if fields.previous_response_id.is_some() && fields.store == Some(false) {
            let reason = "needs a response that is stored: what goes on from one is kept with it";
            return Err(Refusal::invalid("previous_response_id", reason));
        }
        Ok(fields)
    }

    /// An answer has one form, whichever way it is said; `has_form` in chats' words.
    fn check_form(&self, has_form: bool) -> Result<(), Refusal> {
        let format = self.text.as_ref().and_then(|text| text.format.as_ref());
        match format.is_some_and(|format| !format.is_null() && format["type"] != "text") {
            true if has_form => Err(Refusal::invalid("text.format", "excludes what else says the form of the answer")),
            _ => Ok(()),
        }
    }

    /// Whether the response is kept.
    pub(super) fn is_stored(&self) -> bool {
        self.store == Some(true) || self.background == Some(true) || self.previous_response_id.is_some()
    }

    /// What the client wants to hear of a stream beside the response. Of one that is stored times are told while it is
    /// answered, and progress never: it has events of its own, whose numbers the journal could not tell again.
    pub(super) fn telling(&self) -> Telling {
        if self.stream != Some(true) {
            return Telling::default();
        }
        let return_progress = self.return_progress.filter(|_| !self.is_stored());
        Telling { return_progress, timings_per_token: self.timings_per_token }
    }

    /// The items of the input; none where it is a text.
    pub(super) fn items_mut(&mut self) -> &mut [Map<String, Value>] {
        match &mut self.input {
            Input::Text(_) => &mut [],
            Input::Items(items) => items,
        }
    }

    /// The model's name.
    pub(super) fn model(&self) -> &str {
        self.model.as_deref().unwrap_or(DEFAULT_MODEL)
    }

    /// The body of a chat completion. `session` is the one that it goes on with.
    ///
    /// # Errors
    /// An item that is not served, with its place.
    pub(super) fn chat(&self, session: Option<&str>) -> Result<Value, Refusal> {
        let rules = self.instructions.iter().map(|text| json!({ "role": "system", "content": text }));
        let mut conversation = Conversation { messages: rules.collect(), thought: String::new() };
        match &self.input {
            Input::Text(text) => conversation.say(json!({ "role": "user", "content": text })),
            Input::Items(items) => {
                for (at, item) in items.iter().enumerate() {
                    conversation.take(at, item)?;
                }
            }
        }
        let tools: Option<Vec<Value>> =
            self.tools.as_ref().map(|tools| tools.iter().map(tool).collect::<Result<_, _>>()).transpose()?;
        let own = json!({
            // A session's model is its own.
            "model": if session.is_some() { self.model.as_deref() } else { Some(self.model()) },
            "session_id": session,
            "messages": conversation.messages,
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools,
            "tool_choice": self.tool_choice.as_ref().map(tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.as_ref().and_then(|text| text.format.as_ref()).map(format),
            "stream": self.telling().is_any(),
            "return_progress": self.telling().progress(),
            "timings_per_token": self.telling().timings(),
            "reasoning_effort": self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone()),
            "chat_template_kwargs": self.chat_template_kwargs,
        });
        let mut chat = self.shared.clone();
        chat.extend(own.as_object().cloned().unwrap_or_default());
        Ok(Value::Object(chat))
    }

    /// What the response called `id` says of itself: all members that the schema of OpenAI's responses asks for.
    pub(super) fn head(&self, id: String) -> Head {
        let default = Sampling::default();
        let number =
            |name: &str, default: f32| self.shared.get(name).and_then(Value::as_f64).unwrap_or_else(|| default.into());
        let fixed = json!({
            "created_at": now(),
            "model": self.model(),
            "background": self.background.unwrap_or(false),
            "store": self.is_stored(),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata.clone().unwrap_or_else(|| json!({})),
            "parallel_tool_calls": self.parallel_tool_calls.unwrap_or(true),
            "previous_response_id": self.previous_response_id,
            "reasoning": { "effort": self.reasoning.as_ref().and_then(|r| r.effort.clone()), "summary": null },
            "temperature": number("temperature", default.temperature),
            "presence_penalty": number("presence_penalty", default.presence_penalty),
            "frequency_penalty": number("frequency_penalty", default.frequency_penalty),
            "top_logprobs": 0,
            "max_tool_calls": self.max_tool_calls,
            "service_tier": "default",
            "safety_identifier": self.safety_identifier,
            "prompt_cache_key": self.prompt_cache_key,
            "user": self.user,
            "text": { "format": self.text.as_ref().and_then(|text| text.format.clone())
                .unwrap_or_else(|| json!({ "type": "text" })) },
            "tool_choice": self.tool_choice.clone().unwrap_or_else(|| json!("auto")),
            "tools": self.tools.clone().unwrap_or_default(),
            "top_p": number("top_p", default.top_p),
            "truncation": "disabled",
        });
        Head { id, fixed, telling: self.telling() }
    }
}

impl ChatsOwn {
    fn refuse(&self) -> Result<(), Refusal> {
        let fields = [
            ("messages", &self.messages, "input"),
            ("max_tokens", &self.max_tokens, "max_output_tokens"),
            ("max_completion_tokens", &self.max_completion_tokens, "max_output_tokens"),
            ("n_predict", &self.n_predict, "max_output_tokens"),
            ("response_format", &self.response_format, "text.format"),
            ("reasoning_effort", &self.reasoning_effort, "reasoning.effort"),
            ("session_id", &self.session_id, "previous_response_id"),
        ];
        match fields.iter().find(|(_, value, _)| is_asked(value)) {
            Some((name, _, here)) => Err(Refusal::invalid(name, format!("is a field of chats; here it is '{here}'"))),
            None => Ok(()),
        }
    }
}

/// What [`SamplingFields`] and [`FormFields`] have, as the chat will read it.
///
/// # Errors
/// What is wrong with them, and what responses have not.
fn shared(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    let sampling: SamplingFields = parse(body)?;
    if sampling.answers()? > 1 {
        return Err(Refusal::invalid("n", "is not served: a response is one answer"));
    }
    if sampling.logprobs_of_chat()?.is_some() {
        return Err(Refusal::invalid("logprobs", "is not served"));
    }
    let mut shared = fields::shared::<SamplingFields, FormFields>(body)?;
    // Responses are stored, and have their progress told, in their own way.
    for own in ["store", "return_progress", "timings_per_token"] {
        shared.remove(own);
    }
    Ok(shared)
}

/// Items as the messages of a chat, in which an assistant's reasoning, text and calls are one.
struct Conversation {
    messages: Vec<Value>,
    /// What was thought before the next item.
    thought: String,
}

impl Conversation {
    fn take(&mut self, at: usize, item: &Map<String, Value>) -> Result<(), Refusal> {
        let text = |name: &str| item.get(name).and_then(Value::as_str).unwrap_or_default();
        let place = |name: &str| format!("input[{at}].{name}");
        match item.get("type").and_then(Value::as_str).unwrap_or("message") {
            "message" => {
                let content = content(item.get("content"), &place("content"))?;
                self.say(json!({ "role": text("role"), "content": content }));
            }
            "function_call" => {
                let function = json!({ "name": text("name"), "arguments": text("arguments") });
                self.call(json!({ "id": text("call_id"), "type": "function", "function": function }));
            }
            "function_call_output" => {
                let output = content(item.get("output"), &place("output"))?;
                self.say(json!({ "role": "tool", "tool_call_id": text("call_id"), "content": output }));
            }
            "reasoning" => self.thought += &thought(item),
            other => return Err(Refusal::invalid(&place("type"), format!("is '{other}', which is not served"))),
        }
        Ok(())
    }

    fn say(&mut self, mut message: Value) {
        let thought = std::mem::take(&mut self.thought);
        if message["role"] == "assistant" && !thought.is_empty() {
            message["reasoning_content"] = thought.into();
        }
        self.messages.push(message);
    }

    /// A call belongs to the assistant's message before it, if there is one.
    fn call(&mut self, call: Value) {
        if self.messages.last().is_none_or(|last| last["role"] != "assistant") {
            self.say(json!({ "role": "assistant", "content": null }));
        }
        let Some(Value::Object(message)) = self.messages.last_mut() else { return };
        if !self.thought.is_empty() {
            let before = message.get("reasoning_content").and_then(Value::as_str).unwrap_or_default();
            let thought = format!("{before}{}", std::mem::take(&mut self.thought));
            message.insert("reasoning_content".to_owned(), thought.into());
        }
        if let Some(calls) = message.entry("tool_calls").or_insert_with(|| json!([])).as_array_mut() {
            calls.push(call);
        }
    }
}

/// The text of an item of reasoning, or what sums it up.
fn thought(item: &Map<String, Value>) -> String {
    let texts = |name: &str| -> String {
        let parts = item.get(name).and_then(Value::as_array).into_iter().flatten();
        parts.filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
    };
    let content = texts("content");
    if content.is_empty() { texts("summary") } else { content }
}

/// A text, or parts of text.
fn content(value: Option<&Value>, place: &str) -> Result<Value, Refusal> {
    match value {
        Some(Value::String(text)) => Ok(json!(text)),
        Some(Value::Array(parts)) => {
            let part = |(at, part): (usize, &Value)| match part["type"].as_str() {
                Some("input_text" | "output_text" | "text") => Ok(json!({ "type": "text", "text": part["text"] })),
                Some("refusal") => Ok(json!({ "type": "text", "text": part["refusal"] })),
                _ => {
                    let reason = format!("is '{}', only text is served", part["type"].as_str().unwrap_or_default());
                    Err(Refusal::invalid(&format!("{place}[{at}].type"), reason))
                }
            };
            parts.iter().enumerate().map(part).collect()
        }
        _ => Err(Refusal::invalid(place, "must be a text or a list of parts")),
    }
}

/// A function as chats have it.
fn tool(tool: &Value) -> Result<Value, Refusal> {
    if tool["type"] != "function" {
        return Err(Refusal::invalid("tools", "must be functions: no others are served"));
    }
    let member = |name: &str| tool.get(name).cloned().unwrap_or(Value::Null);
    let mut function = json!({ "name": member("name") });
    for name in ["description", "parameters"] {
        if !member(name).is_null() {
            function[name] = member(name);
        }
    }
    Ok(json!({ "type": "function", "function": function }))
}

fn tool_choice(choice: &Value) -> Value {
    let function = |choice: &Value| json!({ "type": "function", "function": { "name": choice["name"] } });
    match choice["type"].as_str() {
        Some("function") => function(choice),
        Some("allowed_tools") => {
            let tools: Vec<Value> = choice["tools"].as_array().into_iter().flatten().map(function).collect();
            json!({ "type": "allowed_tools", "allowed_tools": { "mode": choice["mode"], "tools": tools } })
        }
        _ => choice.clone(),
    }
}

/// `text.format` as chats have it: there a schema lies one level deeper.
fn format(format: &Value) -> Value {
    match format["type"].as_str() {
        Some("json_schema") => {
            json!({ "type": "json_schema", "json_schema": { "name": format["name"], "schema": format["schema"] } })
        }
        _ => format.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::Script;
    use super::*;
    use crate::bodies::ChatAsk;

    fn chat(body: &str) -> Result<Value, Value> {
        let fields = Fields::read(body.as_bytes()).map_err(|error| error.body()["error"]["param"].clone())?;
        fields.chat(None).map_err(|error| error.body()["error"]["param"].clone())
    }

    #[test]
    fn items_become_messages() {
        let chat = chat(
            r#"{"instructions": "Be brief.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"}],
                "tools": [{"type": "function", "name": "f", "strict": true}], "tool_choice": {"type": "function", "name": "f"},
                "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "array"}}}}"#,
        );
        let chat = chat.unwrap();
        let roles: Vec<&str> =
            chat["messages"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!(chat["messages"][1]["content"][0], json!({ "type": "text", "text": "x" }));
        assert_eq!(chat["tool_choice"]["function"]["name"], "f");
        assert_eq!(chat["response_format"]["json_schema"]["schema"]["type"], "array");
    }

    #[test]
    fn a_response_has_all_members_that_openais_schema_asks_for() {
        let fields =
            Fields::read(br#"{"input": "x", "temperature": 0.5, "user": "me", "max_output_tokens": 4.0}"#).unwrap();
        let response = Script::begin(fields.head("resp_1".to_owned()), None).response("in_progress");
        let names = "id object created_at completed_at status incomplete_details model previous_response_id instructions \
            output error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty \
            frequency_penalty top_logprobs temperature reasoning usage max_output_tokens max_tool_calls store \
            background service_tier metadata safety_identifier prompt_cache_key user";
        for name in names.split_whitespace() {
            assert!(response.get(name).is_some(), "{name}");
        }
        assert_eq!((&response["temperature"], &response["top_p"]), (&json!(0.5), &json!(1.0)));
        assert_eq!((&response["user"], &response["max_output_tokens"]), (&json!("me"), &json!(4)));
    }

    #[test]
    fn what_chats_have_too_is_heeded_and_what_is_not_served_refused() {
        let body = r#"{"input": "x", "stop": ["y"], "presence_penalty": 1, "logit_bias": {"7": 1}, "seed": 1.0}"#;
        let asked = chat(body).unwrap();
        assert_eq!((&asked["stop"], &asked["presence_penalty"]), (&json!(["y"]), &json!(1)));
        assert_eq!((&asked["logit_bias"]["7"], &asked["seed"]), (&json!(1), &json!(1.0)));
        assert_eq!(chat(r#"{"input": "x", "min_tokens": 3}"#), Err("min_tokens".into()));
        for field in [
            r#""grammar": "start: \"a\"""#,
            r#""guided_choice": ["a", "b"]"#,
            r#""structured_outputs": {"regex": "a+"}"#,
            r#""repetition_penalty": 1.5"#,
            r#""chat_template_kwargs": {"thinking": false}"#,
            r#""deadline_ms": 50"#,
            r#""priority": -3"#,
        ] {
            let body = format!(r#"{{"input": "x", "text": {{"format": {{"type": "text"}}}}, {field}}}"#);
            let asked = chat(&body).unwrap();
            let (name, value) = field.split_once(": ").unwrap();
            assert_eq!(asked[name.trim_matches('"')], serde_json::from_str::<Value>(value).unwrap());
            assert!(ChatAsk::read(asked.to_string().as_bytes()).is_ok(), "{field}");
        }
        for (field, name) in [
            (r#""n": 3"#, "n"),
            (r#""logprobs": true"#, "logprobs"),
            (r#""top_logprobs": 2"#, "top_logprobs"),
            (r#""include": ["message.output_text.logprobs"]"#, "include"),
            (r#""max_tokens": 5"#, "max_tokens"),
            (r#""response_format": {"type": "json_object"}"#, "response_format"),
            (r#""reasoning_effort": "low""#, "reasoning_effort"),
            (r#""messages": [{}]"#, "messages"),
            (r#""repetition_penalty": "x""#, "repetition_penalty"),
            (r#""regex": "a", "text": {"format": {"type": "json_object"}}"#, "text.format"),
        ] {
            assert_eq!(chat(&format!(r#"{{"input": "x", {field}}}"#)), Err(name.into()), "{field}");
        }
        let none =
            r#"{"input": "x", "n": 1, "logprobs": false, "include": ["reasoning.encrypted_content"], "store": true}"#;
        assert!(chat(none).unwrap().get("store").is_none());
    }

    #[test]
    fn what_an_assistant_thinks_says_and_calls_is_one_message() {
        let messages = |items: Value| chat(&json!({ "input": items }).to_string()).unwrap()["messages"].clone();
        let call = |id: &str| json!({ "type": "function_call", "call_id": id, "name": "f", "arguments": "{}" });
        let called = |id: &str| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{}" } });
        let output = |id: &str| json!({ "type": "function_call_output", "call_id": id, "output": id });
        let result = |id: &str| json!({ "role": "tool", "tool_call_id": id, "content": id });
        let thought = json!({ "type": "reasoning", "content": [{ "type": "reasoning_text", "text": "Hm." }] });
        let said = json!({ "role": "assistant", "content": "Well." });
        let all =
            json!([{ "role": "user", "content": "x" }, thought, said, call("a"), call("b"), output("a"), output("b")]);
        let one = json!({
            "role": "assistant", "content": "Well.", "reasoning_content": "Hm.", "tool_calls": [called("a"), called("b")],
        });
        assert_eq!(messages(all), json!([{ "role": "user", "content": "x" }, one, result("a"), result("b")]));
        // Without a text, summed up, and in steps.
        let summed_up = json!({ "type": "reasoning", "summary": [{ "type": "summary_text", "text": "Hm." }] });
        let step = |id: &str| json!({ "role": "assistant", "content": null, "reasoning_content": "Hm.", "tool_calls": [called(id)] });
        let steps = json!([summed_up, call("a"), output("a"), summed_up, call("b"), output("b")]);
        assert_eq!(messages(steps), json!([step("a"), result("a"), step("b"), result("b")]));
        let late = messages(json!([said, thought, call("a")]));
        assert_eq!((late.as_array().unwrap().len(), &late[0]["reasoning_content"]), (1, &json!("Hm.")));
        assert_eq!(
            messages(json!([said, thought, { "role": "user", "content": "y" }]))[1]["reasoning_content"],
            json!(null)
        );
        assert_eq!(messages(json!([said, said])).as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_is_not_served_is_refused_with_its_place() {
        let refused = |body: &str| chat(body).unwrap_err();
        assert_eq!(
            refused(r#"{"input": [{"role": "user", "content": [{"type": "input_image"}]}]}"#),
            "input[0].content[0].type"
        );
        assert_eq!(refused(r#"{"input": [{"type": "item_reference", "id": "x"}]}"#), "input[0].type");
        assert_eq!(refused(r#"{"input": "x", "tools": [{"type": "web_search"}]}"#), "tools");
        assert_eq!(refused(r#"{"input": "x", "truncation": "auto"}"#), "truncation");
        assert_eq!(refused(r#"{"input": "x", "background": true, "store": false}"#), "background");
        assert_eq!(refused(r#"{"input": "x", "previous_response_id": "y", "store": false}"#), "previous_response_id");
    }
}
