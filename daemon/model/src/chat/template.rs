//! How does a Jinja template see a conversation? As Hugging Face renders it, by `minijinja` with limits.

use super::json::{Dumps, INDENT_MAX};
use super::marks::Marks;
use super::message::{ChatMessage, ChatRequest, Role};
use crate::ModelError;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use regex::Regex;
use serde_json::{Map, Value as Json, json};
use std::io::{self, Write};

/// Steps that a template may take.
const FUEL: u64 = 10_000_000;
/// Largest rendered prompt in bytes.
pub(super) const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Largest template in bytes.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Variables that a request's template arguments cannot set.
const RESERVED: &[&str] =
    &["messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "strftime_now", "has_think"];

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    has_think: bool,
    /// Whether calls carry their arguments as an object; else as JSON text.
    object_arguments: bool,
}

impl ChatTemplate {
    /// # Errors
    /// A template over 1 MiB, or one that is not Jinja.
    pub(super) fn compile(source: &str, bos: &str, eos: &str, has_think: bool) -> Result<Self, ModelError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(ModelError::Template(format!("{} bytes, the limit is {TEMPLATE_BYTES_MAX}", source.len())));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(fail)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_filter("tojson", tojson);
        environment.add_filter("from_json", from_json);
        environment.add_template_owned("chat", without_generation(source)).map_err(fail)?;
        let (source, bos, eos) = (source.to_owned(), bos.to_owned(), eos.to_owned());
        let mut template = Self { environment, source, bos, eos, has_think, object_arguments: true };
        template.object_arguments = template.takes_objects();
        Ok(template)
    }

    /// Whether the template's text has `part` in it.
    pub(super) fn mentions(&self, part: &str) -> bool {
        self.source.contains(part)
    }

    /// The prompt for the next answer, with marks.
    ///
    /// # Errors
    /// The template's own refusal, a template that does not end, a prompt over 16 MiB.
    pub(super) fn render(&self, request: &ChatRequest, marks: &Marks<'_>) -> Result<String, ModelError> {
        let mut context: Map<String, Json> = Map::new();
        if let Some(effort) = &request.effort {
            context.insert("reasoning_effort".to_owned(), marks.text(effort).into());
        }
        for (key, value) in &request.template_arguments {
            if !RESERVED.contains(&key.as_str()) {
                context.insert(key.clone(), marks.json(value));
            }
        }
        if let Some(thinking) = request.thinking {
            // One wish, two names: DeepSeek's, and that of GLM and Qwen.
            context.insert("thinking".to_owned(), thinking.into());
            context.insert("enable_thinking".to_owned(), thinking.into());
        }
        let message = |message| self.message(message, marks);
        context.insert("messages".to_owned(), request.messages.iter().map(message).collect());
        if !request.tools.is_empty() {
            context.insert("tools".to_owned(), request.tools.iter().map(|tool| marks.json(tool)).collect());
        }
        if request.messages.iter().all(|message| message.content.is_some()) {
            return self.render_context(context, request.now);
        }
        // Templates that know calls tell null from a text; others can only add a text to their own.
        self.render_context(context.clone(), request.now).or_else(|_| {
            for message in context.get_mut("messages").and_then(Json::as_array_mut).into_iter().flatten() {
                if message["content"].is_null() {
                    message["content"] = "".into();
                }
            }
            self.render_context(context, request.now)
        })
    }

    fn message(&self, message: &ChatMessage, marks: &Marks<'_>) -> Json {
        let role = match message.role {
            Role::Developer if !self.mentions("developer") => Role::System,
            role => role,
        };
        let mut map = Map::new();
        map.insert("role".to_owned(), role.as_str().into());
        map.insert("content".to_owned(), message.content.as_ref().map(|text| marks.text(text)).into());
        if let Some(reasoning) = &message.reasoning_content {
            map.insert("reasoning_content".to_owned(), marks.text(reasoning).into());
        }
        if !message.tool_calls.is_empty() {
            let call = |call: &super::ToolCall| {
                let parsed = serde_json::from_str(&call.arguments).ok().filter(|_| self.object_arguments);
                let arguments = match parsed {
                    Some(Json::Object(arguments)) => Json::Object(marks.map(&arguments)),
                    _ => marks.word(&call.arguments).into(),
                };
                let function = json!({"name": marks.word(&call.name), "arguments": arguments});
                json!({"id": marks.word(&call.id), "type": "function", "function": function})
            };
            map.insert("tool_calls".to_owned(), message.tool_calls.iter().map(call).collect());
        }
        for (key, value) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
            if let Some(value) = value {
                map.insert(key.to_owned(), marks.word(value).into());
            }
        }
        Json::Object(map)
    }

    fn render_context(&self, mut context: Map<String, Json>, now: Option<i64>) -> Result<String, ModelError> {
        for (key, value) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            context.insert(key.to_owned(), value.clone().into());
        }
        context.insert("add_generation_prompt".to_owned(), true.into());
        context.insert("has_think".to_owned(), self.has_think.into());
        let mut context: Vec<(String, Value)> =
            context.into_iter().map(|(key, value)| (key, Value::from(Serde(value)))).collect();
        if let Some(now) = now {
            let strftime = Value::from_function(move |format: String| strftime(now, &format));
            context.push(("strftime_now".to_owned(), strftime));
        }
        let mut out = Limited { bytes: Vec::new() };
        let template = self.environment.get_template("chat").map_err(fail)?;
        template.render_captured_to(Value::from_pairs(context), &mut out).map_err(fail)?;
        String::from_utf8(out.bytes).map_err(|error| ModelError::Template(error.to_string()))
    }

    /// Tries which form of a call's arguments the template writes down whole. An object where that works: then the
    /// template decides about spaces, as when the model was trained.
    fn takes_objects(&self) -> bool {
        let shows = |arguments: Json| {
            let function = json!({"name": "probe", "arguments": arguments});
            let call = json!({"id": "call00000", "type": "function", "function": function});
            let messages = json!([
                {"role": "user", "content": "probe"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "probe", "tool_call_id": "call00000", "name": "probe"},
            ]);
            let context = Map::from_iter([("messages".to_owned(), messages)]);
            self.render_context(context, Some(0)).is_ok_and(|text| text.contains("pkey") && text.contains("pvalue"))
        };
        shows(json!({"pkey": "pvalue"})) || !shows(json!("{\"pkey\": \"pvalue\"}"))
    }
}

/// Hugging Face marks the parts to train on with `{% generation %}`, a statement of its own; here it does nothing.
fn without_generation(source: &str) -> String {
    let open = Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").expect("a constant");
    let close = Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").expect("a constant");
    let source = open.replace_all(source, "{%$1 if true $2%}");
    close.replace_all(&source, "{%$1 endif $2%}").into_owned()
}

/// The error with what caused it, as the limit of the output.
fn fail(error: Error) -> ModelError {
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    let causes: String = causes.map(|cause| format!(": {cause}")).collect();
    ModelError::Template(format!("{error:#}{causes}"))
}

/// Hugging Face's `tojson`: `json.dumps` without escapes for HTML.
fn tojson(value: Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let mut dumps = Dumps { indent: indent.or(options.get("indent")?), ..Dumps::default() };
    if dumps.indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(invalid(format!("tojson: the widest indent is {INDENT_MAX}")));
    }
    dumps.ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    if let Some(separators) = options.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators)
            .map_err(|_| invalid("tojson: separators are two strings".to_owned()))?;
        dumps.separators = (item, key);
    }
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut json = serde_json::to_value(&value).map_err(|error| invalid(format!("tojson: {error}")))?;
    if sorted {
        json.sort_all_objects();
    }
    dumps.write(&json).map(Value::from_safe_string).map_err(|error| invalid(error.to_string()))
}

fn from_json(value: Value) -> Result<Value, Error> {
    let invalid = |what: String| Error::new(ErrorKind::InvalidOperation, format!("from_json: {what}"));
    if value.kind() != ValueKind::String {
        return Err(invalid(format!("a {} is no text", value.kind())));
    }
    let text = value.as_str().unwrap_or_default();
    serde_json::from_str::<Json>(text).map(|json| Value::from(Serde(json))).map_err(|error| invalid(error.to_string()))
}

/// Python's `datetime.strftime`, in UTC.
fn strftime(now: i64, format: &str) -> Result<String, Error> {
    let invalid = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let time = jiff::Timestamp::from_second(now).map_err(invalid)?.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time).map_err(invalid)
}

/// Takes the output up to the limit.
struct Limited {
    bytes: Vec<u8>,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(bytes.len()) > OUTPUT_BYTES_MAX {
            return Err(io::Error::other(format!("the prompt is longer than {OUTPUT_BYTES_MAX} bytes")));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::ToolCall;
    use crate::tokenizer::ControlTokens;

    fn compile(source: &str) -> ChatTemplate {
        ChatTemplate::compile(source, "<s>", "</s>", false).unwrap()
    }

    fn render(source: &str, request: &ChatRequest) -> Result<String, ModelError> {
        let control = ControlTokens::new(&[("<s>", 0), ("</s>", 1)]).unwrap();
        let marks = Marks::choose(&control, request).unwrap();
        let text = compile(source).render(request, &marks)?;
        Ok(marks.unmark().text(&text).into_owned())
    }

    fn user(content: &str) -> ChatRequest {
        ChatRequest { messages: vec![ChatMessage::new(Role::User, content)], ..ChatRequest::default() }
    }

    #[test]
    fn python_methods_and_json_work() {
        let text = render("{{ bos_token }}{{ messages[0]['content'].strip() | tojson }}", &user(" \u{e9} ")).unwrap();
        assert_eq!(text, "<s>\"\u{e9}\"");
        let request = ChatRequest { tools: vec![json!({"b": 1, "a": ["<s>"]})], ..user("x") };
        let text =
            render("{{ tools[0] | tojson }}{{ tools | tojson(sort_keys=true, separators=(',', ':')) }}", &request);
        assert_eq!(text.unwrap(), r#"{"b": 1, "a": ["<s>"]}[{"a":["<s>"],"b":1}]"#);
        let text = render(
            "{{ ('{\"k\": [1, 2]}' | from_json).k[1] }}{% for x in [1, 2] %}{{ x }}{% break %}{% endfor %}",
            &user("x"),
        );
        assert_eq!(text.unwrap(), "21");
    }

    #[test]
    fn where_a_template_cannot_do_without_a_text_no_content_is_an_empty_one() {
        let mut request = user("x");
        request.messages.push(ChatMessage { content: None, ..ChatMessage::new(Role::Assistant, "") });
        let each = |body: &str| format!("{{% for m in messages %}}{body}{{% endfor %}}");
        assert_eq!(render(&each("{{ '[' + m.content + ']' }}"), &request).unwrap(), "[x][]");
        let told = each("{{ '[' + ('none' if m.content is none else m.content) + ']' }}");
        assert_eq!(render(&told, &request).unwrap(), "[x][none]");
        let refused = render(&each("{{ raise_exception('no ' + m.content) if m.content != 'x' }}"), &request);
        assert!(refused.unwrap_err().to_string().contains("no "));
    }

    #[test]
    fn marks_for_training_do_nothing() {
        let source = "a\n{%- generation -%}\n{{ messages[0].content }} {% endgeneration %}b";
        assert_eq!(render(source, &user("x")).unwrap(), "ax b");
    }

    #[test]
    fn a_date_is_there_when_the_request_has_one() {
        let source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'none' }}";
        assert_eq!(render(source, &user("x")).unwrap(), "none");
        assert_eq!(render(source, &ChatRequest { now: Some(1_767_225_600), ..user("x") }).unwrap(), "01 Jan 2026");
    }

    #[test]
    fn a_refusal_and_an_endless_template_are_errors() {
        let refused = render("{{ raise_exception('roles must alternate') }}", &user("x")).unwrap_err();
        assert!(refused.to_string().contains("roles must alternate"));
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        assert!(render(endless, &user("x")).is_err());
        let long = "{% for a in range(10000) %}{{ messages[0].content * 1000 }}{% endfor %}";
        assert!(render(long, &user("0123456789")).unwrap_err().to_string().contains("16777216"));
        assert!(ChatTemplate::compile("{% for %}", "", "", false).is_err());
    }

    #[test]
    fn arguments_come_as_the_template_needs_them() {
        let call = ToolCall { id: "1".to_owned(), name: "f".to_owned(), arguments: "{\"city\":\"<s>\"}".to_owned() };
        let mut request = user("x");
        request.messages.push(ChatMessage { tool_calls: vec![call], ..ChatMessage::new(Role::Assistant, "") });
        let calls = |body: &str| {
            format!(
                "{{% for m in messages %}}{{% for c in m.tool_calls %}}{{% set a = c.function.arguments %}}{body}{{% endfor %}}{{% endfor %}}"
            )
        };
        assert_eq!(render(&calls("{{ a | tojson }}"), &request).unwrap(), r#"{"city": "<s>"}"#);
        assert_eq!(
            render(&calls("{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}"), &request).unwrap(),
            "city=<s>"
        );
        assert_eq!(render(&calls("{{ a + '' }}"), &request).unwrap(), r#"{"city":"<s>"}"#);
    }

    #[test]
    fn arguments_of_the_request_reach_the_template_but_do_not_replace_its_own() {
        let mut request = ChatRequest { thinking: Some(false), ..user("x") };
        request.template_arguments.insert("effort".to_owned(), "<s>".into());
        request.template_arguments.insert("bos_token".to_owned(), "forged".into());
        let text = render("{{ effort }}{{ bos_token }}{{ enable_thinking }}{{ thinking }}", &request).unwrap();
        assert_eq!(text, "<s><s>FalseFalse");
        let effort = |request: &ChatRequest| render("{{ reasoning_effort }}", request).unwrap();
        request.effort = Some("low".to_owned());
        assert_eq!(effort(&request), "low");
        request.template_arguments.insert("reasoning_effort".to_owned(), "high".into());
        assert_eq!(effort(&request), "high", "what the template is told by name goes before");
    }
}
