//! How does a conversation become a prompt, and an answer text, reasoning and calls?
//!
//! [`ChatFormat`] is chosen once per model: the file's Jinja template, or an encoding built in for models that ship
//! none. [`ChatFormat::render`] gives a [`Prompt`]; [`Prompt::parser`] reads its answer. A client's text cannot forge a
//! turn: `marks` tells how.
//!
//! | built in | for | source |
//! |---|---|---|
//! | `deepseek-v3.2` | `deepseek32`, `deepseek_v32` | `encoding_dsv32.py`, see `deepseek_v32` |
//! | `deepseek-v3.1` | DeepSeek vocabularies with `<｜search▁begin｜>` | the model's template and card |
//! | `deepseek-r1` | other DeepSeek vocabularies; `<think>` where there is one | the models' templates, no tools |
//! | `glm-5` | vocabularies with `[gMASK]` | the template of GLM-4.7-Flash; GLM-5's own could not be had |
//! | `chatml` | vocabularies with `<|im_start|>` | |

mod deepseek_v32;
mod json;
mod marks;
mod message;
mod output;
mod prompt;
mod template;
mod wire;

pub use message::{ChatMessage, ChatRequest, Role, ToolCall};
pub use output::{OutputEvent, OutputParser, laid_out};
pub use prompt::Prompt;

use crate::tokenizer::ControlTokens;
use crate::{ModelError, Tokenizer};
use deepseek_v32::Encoder;
use marks::Marks;
use output::{OutputFormat, Thinking, ToolSyntax};
use std::borrow::Cow;
use std::sync::Arc;
use template::ChatTemplate;

const THINK_OPEN: &str = "<think>";
const THINK_CLOSE: &str = "</think>";

/// How one model writes conversations.
#[derive(Debug)]
pub struct ChatFormat {
    encoding: Encoding,
    control: Arc<ControlTokens>,
    syntax: ToolSyntax,
    has_think: bool,
    visible: Vec<u32>,
}

#[derive(Debug)]
enum Encoding {
    Template(Box<ChatTemplate>),
    DeepSeekV32 { bos: String, eos: String },
}

impl ChatFormat {
    /// Chooses the format of a model.
    ///
    /// `template` is the file's own Jinja template, and comes first. `architecture` is a GGUF file's
    /// `general.architecture` or `model_type` of a `config.json`. `None`: nothing tells the format.
    ///
    /// # Errors
    /// A template that is no Jinja.
    pub fn choose(
        template: Option<&str>,
        architecture: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, ModelError> {
        if let Some(source) = template {
            return Self::from_template(source, tokenizer).map(Some);
        }
        let has = |name: &str| tokenizer.token_id(name).is_some();
        let name = if matches!(architecture, "deepseek32" | "deepseek_v32") && has("<｜User｜>") {
            "deepseek-v3.2"
        } else if has("<｜User｜>") && has("<｜search▁begin｜>") {
            "deepseek-v3.1"
        } else if has("<｜User｜>") {
            "deepseek-r1"
        } else if has("[gMASK]") && has("<|assistant|>") {
            "glm-5"
        } else if has("<|im_start|>") {
            "chatml"
        } else {
            return Ok(None);
        };
        Self::built_in(name, tokenizer).map(Some)
    }

    /// A format of this crate by its name in the module's table.
    ///
    /// # Errors
    /// An unknown name.
    pub fn built_in(name: &str, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let source = match name {
            "deepseek-v3.2" => {
                let bos = token_name(tokenizer, tokenizer.bos());
                let eos = "<｜end▁of▁sentence｜>".to_owned();
                let encoding = Encoding::DeepSeekV32 { bos, eos };
                return Ok(Self::new(encoding, ToolSyntax::Dsml, true, tokenizer));
            }
            "deepseek-v3.1" => include_str!("chat/templates/deepseek_v31.jinja"),
            "deepseek-r1" => include_str!("chat/templates/deepseek_r1.jinja"),
            "glm-5" => include_str!("chat/templates/glm5.jinja"),
            "chatml" => include_str!("chat/templates/chatml.jinja"),
            other => return Err(ModelError::Template(format!("no format '{other}' is built in"))),
        };
        Self::from_template(source, tokenizer)
    }

    /// # Errors
    /// A template that is no Jinja.
    fn from_template(source: &str, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let has_think = source.contains(THINK_CLOSE) || tokenizer.token_id(THINK_OPEN).is_some();
        let bos = token_name(tokenizer, tokenizer.bos());
        let eos = token_name(tokenizer, tokenizer.eos());
        let in_vocabulary = tokenizer.token_id(THINK_OPEN).is_some();
        let template = ChatTemplate::compile(source, &bos, &eos, in_vocabulary)?;
        let syntax = ToolSyntax::of_template(source);
        Ok(Self::new(Encoding::Template(Box::new(template)), syntax, has_think, tokenizer))
    }

    fn new(encoding: Encoding, syntax: ToolSyntax, has_think: bool, tokenizer: &Tokenizer) -> Self {
        let tags = syntax.all_tags().into_iter().chain([THINK_OPEN, THINK_CLOSE]);
        let mut visible: Vec<u32> =
            tags.flat_map(|tag| tokenizer.control().find(tag).map(|(_, _, id)| id).collect::<Vec<_>>()).collect();
        visible.sort_unstable();
        visible.dedup();
        Self { encoding, control: Arc::clone(tokenizer.control()), syntax, has_think, visible }
    }

    /// Whether tools can be offered to the model.
    pub fn takes_tools(&self) -> bool {
        match &self.encoding {
            Encoding::Template(template) => template.mentions("tools"),
            Encoding::DeepSeekV32 { .. } => true,
        }
    }

    /// Whether the model can think before it answers.
    pub fn can_think(&self) -> bool {
        self.has_think
    }

    /// A grammar, in `llguidance`'s dialect of Lark, of an answer that is one call of one of `tools`, as the model
    /// writes calls. `None`: it has no tools, or writes arguments otherwise than as JSON.
    pub fn call_grammar(&self, tools: &[&serde_json::Value]) -> Option<String> {
        let functions: Vec<_> = tools.iter().map(|tool| &tool["function"]).collect();
        self.syntax.one_call(&functions, |tag| self.is_token(tag))
    }

    /// The same of an answer that is JSON that `schema` describes, or calls of `tools`.
    pub fn call_or_json_grammar(&self, tools: &[&serde_json::Value], schema: &serde_json::Value) -> Option<String> {
        let functions: Vec<_> = tools.iter().map(|tool| &tool["function"]).collect();
        self.syntax.calls_or_json(&functions, schema, |tag| self.is_token(tag))
    }

    /// Whether all of it is one control token.
    fn is_token(&self, tag: &str) -> bool {
        self.control.find(tag).any(|(start, end, _)| end - start == tag.len())
    }

    /// Control tokens that [`OutputParser`] must see: pass them to [`crate::TextStream::new`].
    pub fn visible_tokens(&self) -> &[u32] {
        &self.visible
    }

    /// The prompt for the next answer.
    ///
    /// # Errors
    /// Tools for a model that takes none or tools without a name; what the template or encoding refuses; a prompt over
    /// 16 MiB.
    pub fn render(&self, request: &ChatRequest) -> Result<Prompt, ModelError> {
        if !request.tools.is_empty() && !self.takes_tools() {
            return Err(ModelError::Template("this model takes no tools".to_owned()));
        }
        let functions = request.functions()?;
        let string_parameters = output::string_parameters(&functions);
        let mut request = self.prepared(request);
        let marks = Marks::choose(&self.control, &request)?;
        let begun = if request.continues { begun(request.to_mut())? } else { String::new() };
        let mut marked = match &self.encoding {
            Encoding::Template(template) => template.render(&request, &marks)?,
            Encoding::DeepSeekV32 { bos, eos } => Encoder::new(&request, &marks, bos, eos).render()?,
        };
        let mut thinking = self.thinking(&marked);
        if !begun.is_empty() {
            if thinking == Thinking::Open {
                return Err(ModelError::Template("an answer cannot go on: the model thinks before each".to_owned()));
            }
            thinking = Thinking::None;
            marked.push_str(&marks.text(&begun));
        }
        if marked.len() > template::OUTPUT_BYTES_MAX {
            let limit = template::OUTPUT_BYTES_MAX;
            return Err(ModelError::Template(format!("{} bytes rendered, the limit is {limit}", marked.len())));
        }
        let syntax = if request.tools.is_empty() { ToolSyntax::None } else { self.syntax };
        let output = OutputFormat { thinking, syntax, string_parameters };
        Ok(Prompt { marked, unmark: marks.unmark(), output })
    }

    /// Where the answer's reasoning begins, by the end of the prompt.
    fn thinking(&self, marked: &str) -> Thinking {
        let end = marked.trim_end();
        if !self.has_think || end.ends_with(THINK_CLOSE) {
            Thinking::None
        } else if end.ends_with(THINK_OPEN) {
            Thinking::Open
        } else {
            Thinking::Possible
        }
    }

    /// The request with its messages as all formats expect them: reasoning apart from content, results in the order of
    /// their calls.
    fn prepared<'r>(&self, request: &'r ChatRequest) -> Cow<'r, ChatRequest> {
        let mut request = Cow::Borrowed(request);
        let apart = |message: &ChatMessage| -> Option<(String, String)> {
            let content = message.content.as_ref().filter(|_| message.role == Role::Assistant && self.has_think)?;
            let (reasoning, content) = content.split_once(THINK_CLOSE)?;
            let reasoning = reasoning.split_once(THINK_OPEN).map_or(reasoning, |(_, reasoning)| reasoning);
            Some((reasoning.trim_matches('\n').to_owned(), content.trim_start_matches('\n').to_owned()))
        };
        for at in 0..request.messages.len() {
            if let Some((reasoning, content)) = apart(&request.messages[at]) {
                let message = &mut request.to_mut().messages[at];
                message.content = Some(content);
                message.reasoning_content.get_or_insert(reasoning);
            }
            if let Some(order) = results_order(&request.messages[at..]) {
                request.to_mut().messages[at + 1..][..order.len()].sort_by_cached_key(|message| {
                    order.iter().position(|id| Some(id) == message.tool_call_id.as_ref())
                });
            }
        }
        request
    }
}

/// Takes the answer that is to go on off the end.
fn begun(request: &mut ChatRequest) -> Result<String, ModelError> {
    let last = request.messages.pop();
    let text = last.as_ref().and_then(ChatMessage::unfinished).map(str::to_owned);
    text.ok_or_else(|| ModelError::Template("the last message is no text of an assistant that could go on".to_owned()))
}

/// The ids of the calls in the first message, if exactly their results follow in another order.
fn results_order(messages: &[ChatMessage]) -> Option<Vec<String>> {
    let (first, rest) = messages.split_first()?;
    let calls: Vec<&String> = first.tool_calls.iter().map(|call| &call.id).collect();
    let results = rest.get(..calls.len())?;
    let ids: Vec<&String> = results.iter().filter_map(|result| result.tool_call_id.as_ref()).collect();
    let unique = calls.iter().all(|id| calls.iter().filter(|other| *other == id).count() == 1);
    let same = ids.len() == calls.len() && calls.iter().all(|id| ids.contains(id));
    (unique && same && ids != calls).then(|| calls.into_iter().cloned().collect())
}

fn token_name(tokenizer: &Tokenizer, id: Option<u32>) -> String {
    id.and_then(|id| tokenizer.token_name(id)).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bytes_and, user};
    use proptest::prelude::*;
    use serde_json::json;

    fn built_in(name: &str, tokens: &[&str]) -> ChatFormat {
        ChatFormat::built_in(name, &bytes_and(tokens)).unwrap()
    }

    fn call(id: &str, name: &str, arguments: &str) -> ToolCall {
        ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: arguments.to_owned() }
    }

    fn result(id: &str, content: &str) -> ChatMessage {
        ChatMessage { tool_call_id: Some(id.to_owned()), ..ChatMessage::new(Role::Tool, content) }
    }

    #[test]
    fn the_vocabulary_tells_the_format_where_no_template_does() {
        let name = |architecture: &str, tokens: &[&str]| {
            let format = ChatFormat::choose(None, architecture, &bytes_and(tokens)).unwrap();
            format.map(|format| format.render(&user("Hi")).unwrap().text())
        };
        let r1 = name("deepseek2", &["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"]).unwrap();
        assert_eq!(r1, "<｜User｜>Hi<｜Assistant｜><think>\n");
        assert_eq!(name("deepseek2", &["<｜User｜>"]).unwrap(), "<｜User｜>Hi<｜Assistant｜>");
        let v31 = name("deepseek2", &["<｜User｜>", "<think>", "<｜search▁begin｜>"]).unwrap();
        assert_eq!(v31, "<｜User｜>Hi<｜Assistant｜></think>");
        assert_eq!(name("deepseek32", &["<｜User｜>"]).unwrap(), "<｜User｜>Hi<｜Assistant｜></think>");
        assert_eq!(
            name("glm-dsa", &["[gMASK]", "<|assistant|>"]).unwrap(),
            "[gMASK]<sop><|user|>Hi<|assistant|><think>"
        );
        let chatml = name("llama", &["<|im_start|>"]).unwrap();
        assert_eq!(chatml, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(name("llama", &[]), None);
        assert!(ChatFormat::built_in("?", &bytes_and(&[])).is_err());
    }

    #[test]
    fn the_files_template_comes_first() {
        let format = ChatFormat::choose(Some("{{ messages[0].content }}!"), "deepseek32", &bytes_and(&["<｜User｜>"]));
        assert_eq!(format.unwrap().unwrap().render(&user("Hi")).unwrap().text(), "Hi!");
    }

    #[test]
    fn templates_may_trim_and_cut_a_message_and_still_no_token_is_forged() {
        let tokenizer = bytes_and(&["<|im_end|>", "<think>", "</think>"]);
        for source in [
            "{{ messages[0].content | trim }}",
            "{{ messages[0].content.strip().split(' ')[0] }}{{ messages[0].content[:9] }}",
            "<{{ messages[0].content }}>",
            "<{{ messages[0].name }}>",
            "<|{{ messages[0].name }}|>",
            "{{ messages[0].content | tojson }}{{ messages | tojson(ensure_ascii=true) }}",
            "{{ messages[0].content | upper | lower }}{% for c in messages[0].content %}{{ c }}{% endfor %}",
        ] {
            let format = ChatFormat::choose(Some(source), "llama", &tokenizer).unwrap().unwrap();
            for content in ["  <|im_end|> <think>", "think", "|im_end|", "im_end", "/think"] {
                let mut request = user(content);
                request.messages[0].name = Some(content.to_owned());
                let tokens = tokenizer.encode_prompt(&format.render(&request).unwrap()).unwrap();
                assert!(tokens.iter().all(|token| *token < 257), "{source} {content}");
            }
        }
    }

    #[test]
    fn reasoning_in_an_assistants_content_is_taken_apart() {
        let format = built_in("glm-5", &["[gMASK]", "<think>"]);
        let mut request = user("a");
        request.messages.push(ChatMessage::new(Role::Assistant, "<think>\nwhy\n</think>\n\nb"));
        assert_eq!(
            format.render(&request).unwrap().text(),
            "[gMASK]<sop><|user|>a<|assistant|><think>why</think>b<|assistant|><think>"
        );
        request.messages.push(ChatMessage::new(Role::User, "c"));
        request.thinking = Some(false);
        assert_eq!(
            format.render(&request).unwrap().text(),
            "[gMASK]<sop><|user|>a<|assistant|></think>b<|user|>c<|assistant|></think>"
        );
    }

    #[test]
    fn results_come_in_the_order_of_their_calls() {
        let format = built_in("deepseek-v3.2", &["<｜User｜>"]);
        let mut request = user("a");
        let calls = vec![call("1", "f", "{}"), call("2", "g", "{\"k\": [1]}")];
        request.messages.push(ChatMessage {
            content: None,
            tool_calls: calls,
            ..ChatMessage::new(Role::Assistant, "")
        });
        request.messages.extend([result("2", "second"), result("1", "first")]);
        let text = format.render(&request).unwrap().text();
        assert!(text.contains("<function_results>\n<result>first</result>\n<result>second</result>\n"), "{text}");
        request.messages.pop();
        assert!(format.render(&request).unwrap_err().to_string().contains("2 calls, but 1 results"));
        request.messages.pop();
        request.messages[1].tool_calls[0].arguments = "[]".to_owned();
        assert!(format.render(&request).unwrap_err().to_string().contains("messages[1]"));
    }

    #[test]
    fn tools_are_refused_where_the_template_has_no_place_for_them() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
        let request = ChatRequest { tools: vec![tool], ..user("x") };
        let chatml = built_in("chatml", &["<|im_start|>"]);
        assert!(!chatml.takes_tools() && chatml.render(&request).is_err());
        let unnamed = ChatRequest { tools: vec![json!({"type": "function"})], ..user("x") };
        let error = built_in("deepseek-v3.2", &[]).render(&unnamed).unwrap_err();
        assert!(error.to_string().contains("tools[0]"));
    }

    #[test]
    fn an_answer_goes_on_behind_what_there_is_of_it() {
        let format = built_in("chatml", &["<|im_start|>", "<|im_end|>"]);
        let begun = ChatMessage::new(Role::Assistant, "One <|im_end|>, ");
        let request = user("Count.");
        let before = format.render(&request).unwrap().text();
        let mut request = ChatRequest { continues: true, ..request };
        assert!(format.render(&request).is_err(), "there is no answer");
        request.messages.push(begun);
        let prompt = format.render(&request).unwrap();
        assert_eq!(prompt.text(), format!("{before}One <|im_end|>, "));
        let tokens = bytes_and(&["<|im_start|>", "<|im_end|>"]).encode_prompt(&prompt).unwrap();
        let n_control = tokens.iter().filter(|token| **token >= 256).count();
        assert_eq!(n_control, before.matches("<|").count(), "what a client wrote is text: {tokens:?}");
    }

    #[test]
    fn an_answer_is_read_as_its_prompt_asks() {
        let tokens = ["<｜User｜>", "｜DSML｜", "<think>", "</think>"];
        let tokenizer = bytes_and(&tokens);
        let format = built_in("deepseek-v3.2", &tokens);
        assert_eq!(format.visible_tokens(), [258, 259, 260]);
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
        let request = ChatRequest { tools: vec![tool], thinking: Some(true), ..user("x") };
        let answer = "why</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>";
        let mut parser = format.render(&request).unwrap().parser();
        let mut stream = crate::TextStream::new(format.visible_tokens());
        let mut events = Vec::new();
        for token in tokenizer.encode_trusted(answer).unwrap() {
            events.extend(parser.push(&stream.push(&tokenizer, token)));
        }
        events.extend(parser.push(&stream.finish()));
        events.extend(parser.finish());
        let call = OutputEvent::ToolCall { index: 0, name: "f".to_owned(), arguments: "{}".to_owned() };
        assert_eq!(events.last(), Some(&call));
        let reasoning: String =
            events.iter().map(|event| if let OutputEvent::Reasoning(t) = event { t.as_str() } else { "" }).collect();
        assert_eq!(reasoning, "why");
        // Without tools a call is text.
        let mut parser = format.render(&user("x")).unwrap().parser();
        assert!(matches!(&parser.push("<｜DSML｜function_calls>")[..], [OutputEvent::Content(_)]));
    }

    /// Arguments that every grammar can write down and read back.
    fn any_arguments() -> impl Strategy<Value = serde_json::Map<String, serde_json::Value>> {
        let text = "[a-z0-9{}\"\\\\\n 世😀<>|]{0,12}";
        let value = prop_oneof![
            text.prop_map(serde_json::Value::from),
            any::<i64>().prop_map(serde_json::Value::from),
            any::<bool>().prop_map(serde_json::Value::from),
            Just(serde_json::Value::Null),
            prop::collection::vec(text, 0..3).prop_map(serde_json::Value::from),
        ];
        prop::collection::vec(("[a-z_]{1,6}", value), 0..4).prop_map(|pairs| pairs.into_iter().collect())
    }

    proptest! {
        #![proptest_config(crate::testing::seeded(200))]
        #[test]
        fn calls_that_were_rendered_are_read_back(arguments in any_arguments()) {
            let strings = arguments.iter().filter(|(_, value)| value.is_string());
            let properties: serde_json::Map<_, _> =
                strings.map(|(key, _)| (key.clone(), json!({"type": "string"}))).collect();
            let tool = json!({"type": "function", "function": {"name": "f_g", "parameters": {"properties": properties}}});
            let made = call("1", "f_g", &json!(arguments).to_string());
            for name in ["deepseek-v3.2", "deepseek-v3.1", "glm-5"] {
                let format = built_in(name, &["<｜User｜>", "｜DSML｜", "<think>", "</think>", "<tool_call>"]);
                let mut request = ChatRequest { tools: vec![tool.clone()], ..user("x") };
                let open = format.render(&request).unwrap();
                let tool_calls = vec![made.clone(), made.clone()];
                request.messages.push(ChatMessage { tool_calls, ..ChatMessage::new(Role::Assistant, "Well.") });
                let closed = format.render(&request).unwrap().text();
                let answer = &closed[closed.rfind("Well.").unwrap()..];
                let mut parser = OutputParser::new(OutputFormat { thinking: Thinking::None, ..open.output });
                let events = parser.push(answer);
                let mut read = Vec::new();
                for event in &events {
                    if let OutputEvent::ToolCall { name, arguments, .. } = event {
                        read.push((name.as_str(), serde_json::from_str::<serde_json::Value>(arguments).unwrap()));
                    }
                }
                let expect = ("f_g", json!(arguments));
                prop_assert_eq!(read, [expect.clone(), expect], "{} {}", name, answer);
            }
        }
    }
}
