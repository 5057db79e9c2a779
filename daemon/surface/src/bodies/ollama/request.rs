//! How does a request of Ollama's become one of OpenAI's?

use crate::bodies::missing::refuse_asked;
use crate::bodies::parse;
use crate::bodies::whole::whole;
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sparsed_engine::{DEFAULT_MODEL, KeepAlive};

/// What Ollama's clients append to names.
const TAG: &str = ":latest";

/// What a request becomes.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// An answer: the request in OpenAI's words.
    Answer(Generation),
    /// Nothing to answer: asks that the model be in memory, or (`keep_alive` is 0) leave it.
    Nothing {
        /// The model's name.
        model: String,
        /// How long it is to stay.
        keep_alive: Option<KeepAlive>,
    },
}

/// A request in OpenAI's words.
#[derive(Debug)]
pub(crate) struct Generation {
    /// The model's name.
    pub(crate) model: String,
    /// The body of a chat completion, or (`is_chat` is false) of a completion.
    pub(crate) body: Value,
    pub(crate) is_chat: bool,
    /// How long the model is to stay afterwards.
    pub(crate) keep_alive: Option<KeepAlive>,
    /// Pieces, which is Ollama's default.
    pub(crate) stream: bool,
}

/// Fields of both kinds.
#[derive(Debug, Deserialize)]
struct Common {
    model: Option<String>,
    stream: Option<bool>,
    format: Option<Value>,
    /// Go's clients write null for none, here and elsewhere.
    options: Option<Options>,
    think: Option<Value>,
    keep_alive: Option<Value>,
    logprobs: Option<Value>,
    #[serde(default, deserialize_with = "whole")]
    top_logprobs: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct ChatFields {
    messages: Option<Vec<Message>>,
    tools: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct GenerateFields {
    prompt: Option<String>,
    suffix: Option<String>,
    system: Option<String>,
    template: Option<String>,
    context: Option<Vec<u32>>,
    raw: Option<bool>,
    images: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<String>,
    thinking: Option<String>,
    images: Option<Vec<Value>>,
    tool_calls: Option<Vec<Call>>,
    /// Of a tool's result.
    tool_name: Option<String>,
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Call {
    id: Option<String>,
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    arguments: Option<Map<String, Value>>,
}

/// How tokens are chosen. What says how the machine computes (`num_ctx`, `num_gpu`, `num_thread`, ...) is the daemon's
/// business and ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Options {
    #[serde(deserialize_with = "whole")]
    num_predict: Option<i64>,
    temperature: Option<f64>,
    top_k: Option<Value>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    seed: Option<Value>,
    stop: Option<Value>,
    repeat_penalty: Option<f64>,
    repeat_last_n: Option<Value>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    #[serde(deserialize_with = "whole")]
    mirostat: Option<i64>,
    typical_p: Option<f64>,
    tfs_z: Option<f64>,
}

/// A body of `/api/chat`.
///
/// # Errors
/// What is wrong with it, and where.
pub(crate) fn chat(bytes: &[u8]) -> Result<Wanted, Refusal> {
    let (common, fields) = (parse::<Common>(bytes)?, parse::<ChatFields>(bytes)?);
    let messages = fields.messages.unwrap_or_default();
    if messages.is_empty() {
        return common.nothing();
    }
    let messages = written(messages)?;
    // An answer that is the last message goes on.
    let goes_on = messages
        .last()
        .is_some_and(|last| last["role"] == "assistant" && last["content"] != "" && last.get("tool_calls").is_none());
    let body = json!({ "messages": messages, "tools": fields.tools, "continue_final_message": goes_on });
    common.answer(true, body)
}

/// A body of `/api/generate`: a chat of one message, or with `raw` a text that goes on.
///
/// # Errors
/// What is wrong with it, and where.
pub(crate) fn generate(bytes: &[u8]) -> Result<Wanted, Refusal> {
    let (common, fields) = (parse::<Common>(bytes)?, parse::<GenerateFields>(bytes)?);
    let asks = [
        ("suffix", fields.suffix.is_some_and(|suffix| !suffix.is_empty())),
        ("template", fields.template.is_some_and(|template| !template.is_empty())),
        ("context", fields.context.is_some_and(|context| !context.is_empty())),
        ("images", fields.images.is_some_and(|images| !images.is_empty())),
    ];
    refuse_asked(&asks, "is not served")?;
    let Some(prompt) = fields.prompt.filter(|prompt| !prompt.is_empty()) else { return common.nothing() };
    if fields.raw == Some(true) {
        return common.answer(false, json!({ "prompt": prompt }));
    }
    let system = fields.system.filter(|system| !system.is_empty());
    let mut messages: Vec<Value> =
        system.into_iter().map(|system| json!({ "role": "system", "content": system })).collect();
    messages.push(json!({ "role": "user", "content": prompt }));
    common.answer(true, json!({ "messages": messages }))
}

/// A failure of the body that was made of a request, about the field of Ollama's.
pub(crate) fn renamed(refusal: Refusal) -> Refusal {
    refusal.with_param(|param| match param {
        "response_format" => Some("format"),
        "max_tokens" => Some("options.num_predict"),
        "temperature" => Some("options.temperature"),
        "top_k" => Some("options.top_k"),
        "top_p" => Some("options.top_p"),
        "min_p" => Some("options.min_p"),
        "seed" => Some("options.seed"),
        "stop" => Some("options.stop"),
        "repetition_penalty" => Some("options.repeat_penalty"),
        "presence_penalty" => Some("options.presence_penalty"),
        "frequency_penalty" => Some("options.frequency_penalty"),
        "repeat_last_n" => Some("options.repeat_last_n"),
        "reasoning_effort" | "chat_template_kwargs" => Some("think"),
        _ => None,
    })
}

/// The name as Ollama's clients know it.
pub(crate) fn tagged(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { format!("{name}{TAG}") }
}

impl Common {
    fn name(&self) -> String {
        self.model.as_deref().unwrap_or(DEFAULT_MODEL).to_owned()
    }

    fn nothing(&self) -> Result<Wanted, Refusal> {
        Ok(Wanted::Nothing { model: self.name(), keep_alive: self.keep_alive()? })
    }

    /// Seconds, or a text as `5m`; negative for ever.
    fn keep_alive(&self) -> Result<Option<KeepAlive>, Refusal> {
        let invalid = |reason: String| Refusal::invalid("keep_alive", reason);
        let number = |value: &serde_json::Number| value.as_f64().and_then(KeepAlive::seconds);
        match &self.keep_alive {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(value)) => Ok(number(value)),
            Some(Value::String(text)) => text.parse().map(Some).map_err(invalid),
            Some(_) => Err(invalid("must be a number of seconds, or text as '5m'".to_owned())),
        }
    }

    fn answer(self, is_chat: bool, mut body: Value) -> Result<Wanted, Refusal> {
        let (model, keep_alive) = (self.name(), self.keep_alive()?);
        self.options.unwrap_or_default().write(&mut body)?;
        body["model"] = json!(model);
        body["response_format"] = match self.format {
            None | Some(Value::Null) => Value::Null,
            Some(Value::String(name)) if name.is_empty() => Value::Null,
            Some(Value::String(name)) if name == "json" => json!({ "type": "json_object" }),
            Some(schema @ Value::Object(_)) => json!({ "type": "json_schema", "json_schema": { "schema": schema } }),
            Some(_) => return Err(Refusal::invalid("format", "must be 'json' or a JSON schema")),
        };
        match self.think {
            None | Some(Value::Null) => {}
            Some(Value::Bool(think)) => body["chat_template_kwargs"] = json!({ "thinking": think }),
            Some(Value::String(effort)) => body["reasoning_effort"] = json!(effort),
            Some(_) => return Err(Refusal::invalid("think", "must be true, false or an effort")),
        }
        if !is_chat && self.logprobs == Some(Value::Bool(true)) {
            body["logprobs"] = json!(self.top_logprobs.unwrap_or(0));
        } else if is_chat {
            (body["logprobs"], body["top_logprobs"]) = (json!(self.logprobs), json!(self.top_logprobs));
        }
        Ok(Wanted::Answer(Generation { model, body, is_chat, keep_alive, stream: self.stream.unwrap_or(true) }))
    }
}

impl Options {
    fn write(self, body: &mut Value) -> Result<(), Refusal> {
        let other = [
            ("options.mirostat", self.mirostat.is_some_and(|kind| kind != 0)),
            ("options.typical_p", self.typical_p.is_some_and(|p| p != 1.0)),
            ("options.tfs_z", self.tfs_z.is_some_and(|z| z != 1.0)),
        ];
        refuse_asked(&other, "is not served")?;
        body["max_tokens"] = match self.num_predict {
            // Without end; it ends with the context.
            None | Some(..=0) => Value::Null,
            Some(n) if u32::try_from(n).is_ok() => json!(n),
            Some(n) => return Err(Refusal::invalid("options.num_predict", format!("is {n}, which is too many"))),
        };
        if self.num_predict.is_none_or(|n| n <= 0) && body.get("prompt").is_some() {
            // A completion would end after OpenAI's 16.
            body["max_tokens"] = json!(u32::MAX);
        }
        for (name, value) in [
            ("temperature", json!(self.temperature)),
            ("top_k", json!(self.top_k)),
            ("top_p", json!(self.top_p)),
            ("min_p", json!(self.min_p)),
            ("seed", json!(self.seed)),
            ("stop", json!(self.stop)),
            ("repetition_penalty", json!(self.repeat_penalty)),
            ("repeat_last_n", json!(self.repeat_last_n)),
            ("presence_penalty", json!(self.presence_penalty)),
            ("frequency_penalty", json!(self.frequency_penalty)),
        ] {
            body[name] = value;
        }
        Ok(())
    }
}

/// Messages as OpenAI has them. Calls of older clients have no ids: results answer them in their order.
fn written(messages: Vec<Message>) -> Result<Vec<Value>, Refusal> {
    let (mut n_calls, mut n_results) = (0u32, 0u32);
    let id = |n: &mut u32| {
        *n += 1;
        format!("call_{}", *n - 1)
    };
    let mut all = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        if message.images.is_some_and(|images| !images.is_empty()) {
            return Err(Refusal::invalid(&format!("messages[{at}].images"), "is not served: models here read text"));
        }
        let mut one = json!({ "role": message.role, "content": message.content.unwrap_or_default() });
        if let Some(thinking) = message.thinking.filter(|thinking| !thinking.is_empty()) {
            one["reasoning_content"] = json!(thinking);
        }
        if let Some(calls) = message.tool_calls.filter(|calls| !calls.is_empty()) {
            let mut call = |call: Call| {
                let arguments = Value::Object(call.function.arguments.unwrap_or_default()).to_string();
                let function = json!({ "name": call.function.name, "arguments": arguments });
                let counted = id(&mut n_calls);
                let id = call.id.filter(|id| !id.is_empty()).unwrap_or(counted);
                json!({ "id": id, "type": "function", "function": function })
            };
            one["tool_calls"] = calls.into_iter().map(&mut call).collect();
        }
        if message.role == "tool" {
            let counted = id(&mut n_results);
            one["tool_call_id"] = json!(message.tool_call_id.filter(|id| !id.is_empty()).unwrap_or(counted));
            one["name"] = json!(message.tool_name);
        }
        all.push(one);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(wanted: Result<Wanted, Refusal>) -> Value {
        match wanted.unwrap() {
            Wanted::Answer(generation) => generation.body,
            Wanted::Nothing { .. } => panic!("nothing is wanted"),
        }
    }

    fn refused(wanted: Result<Wanted, Refusal>) -> Value {
        wanted.unwrap_err().body()["error"]["param"].clone()
    }

    #[test]
    fn options_and_format_have_names_of_openais() {
        let body = body(chat(
            br#"{"model": "default:latest", "messages": [{"role": "user", "content": "x"}], "format": "json",
                "think": false, "options": {"num_predict": 5, "repeat_penalty": 1.5, "repeat_last_n": 0, "num_ctx": 4096,
                "stop": ["y"]}}"#,
        ));
        assert_eq!((&body["model"], &body["max_tokens"]), (&json!("default:latest"), &json!(5)));
        assert_eq!((&body["repetition_penalty"], &body["stop"]), (&json!(1.5), &json!(["y"])));
        assert_eq!((&body["response_format"]["type"], &body["repeat_last_n"]), (&json!("json_object"), &json!(0)));
        assert_eq!(body["chat_template_kwargs"]["thinking"], false);
    }

    #[test]
    fn results_answer_calls_in_their_order() {
        let body = body(chat(
            br#"{"messages": [{"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}},
                                                     {"function": {"name": "g"}}]},
                {"role": "tool", "tool_name": "f", "content": "1"}, {"role": "tool", "tool_name": "g", "content": "2"}]}"#,
        ));
        let messages = body["messages"].as_array().unwrap();
        assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"], r#"{"a":1}"#);
        assert_eq!(messages[1]["tool_calls"][1]["id"], messages[3]["tool_call_id"]);
    }

    #[test]
    fn calls_and_results_keep_the_ids_that_they_have() {
        let body = body(chat(
            br#"{"messages": [
                {"role": "assistant", "content": null, "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
                {"role": "tool", "tool_call_id": "a", "content": "1"}]}"#,
        ));
        assert_eq!(
            (&body["messages"][0]["tool_calls"][0]["id"], &body["messages"][1]["tool_call_id"]),
            (&json!("a"), &json!("a"))
        );
    }

    #[test]
    fn null_is_nothing_as_clients_in_go_write_it() {
        let all = br#"{"prompt": "x", "options": null, "format": null, "system": null, "raw": null, "images": null,
            "context": null, "stream": null, "keep_alive": null, "think": null}"#;
        assert_eq!(body(generate(all))["messages"].as_array().unwrap().len(), 1);
        let unlimited =
            body(chat(br#"{"messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 0}}"#));
        assert!(unlimited["max_tokens"].is_null());
        assert!(matches!(chat(br#"{"messages": null}"#), Ok(Wanted::Nothing { .. })));
    }

    #[test]
    fn a_generation_is_a_chat_of_one_message_or_raw_text() {
        let chat = body(generate(br#"{"prompt": "x", "system": "y"}"#));
        assert_eq!(chat["messages"].as_array().unwrap().len(), 2);
        let raw = body(generate(br#"{"prompt": "x", "raw": true}"#));
        assert_eq!((&raw["prompt"], &raw["max_tokens"]), (&json!("x"), &json!(u32::MAX)));
    }

    #[test]
    fn what_is_not_served_is_refused_by_its_name_in_ollamas_words() {
        assert_eq!(refused(generate(br#"{"prompt": "x", "suffix": "y"}"#)), "suffix");
        assert_eq!(refused(chat(br#"{"messages": [{"role": "user", "images": ["x"]}]}"#)), "messages[0].images");
        let options =
            |options: &str| refused(generate(format!(r#"{{"prompt": "x", "options": {options}}}"#).as_bytes()));
        assert_eq!(options(r#"{"mirostat": 1}"#), "options.mirostat");
        assert_eq!(renamed(Refusal::invalid("response_format", "x")).body()["error"]["message"], "'format' x");
        assert_eq!(options(r#"{"num_predict": 5000000000}"#), "options.num_predict");
        assert_eq!(renamed(Refusal::invalid("reasoning_effort", "x")).body()["error"]["param"], "think");
    }

    #[test]
    fn a_request_without_text_asks_for_the_model_only() {
        let keep = |wanted| match wanted {
            Ok(Wanted::Nothing { keep_alive, .. }) => {
                keep_alive.map(|keep: KeepAlive| keep.time().map(|t| t.as_secs()))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(keep(chat(br#"{"keep_alive": 0}"#)), Some(Some(0)));
        assert_eq!(keep(generate(br#"{"keep_alive": "5m"}"#)), Some(Some(300)));
        assert_eq!(keep(generate(br#"{"keep_alive": -1}"#)), Some(None));
        assert_eq!(keep(generate(br#"{}"#)), None);
        assert_eq!(refused(chat(br#"{"keep_alive": "soon"}"#)), "keep_alive");
    }
}
