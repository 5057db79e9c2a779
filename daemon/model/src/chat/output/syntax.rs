//! How do models write a call? Four grammars; each is read from the text between the tags of one call.

use crate::chat::deepseek_v32::DSML;
use crate::chat::json::dumps;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::collections::HashSet;

/// The grammar of a model's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::chat) enum ToolSyntax {
    /// Calls are text.
    None,
    /// DeepSeek-V3.2: a block of `invoke`s with one `parameter` each per argument.
    Dsml,
    /// DeepSeek-V3.1, name and JSON between tokens; R1 and V3, with a Markdown block around the JSON.
    DeepSeekV3,
    /// GLM-4.5 to GLM-5: a name, and pairs of `arg_key` and `arg_value`.
    Glm,
    /// Hermes, Qwen: JSON with `name` and `arguments`.
    Hermes,
}

/// The tags around calls.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tags {
    /// Opens a block of calls, or one call.
    pub(super) open: &'static str,
    /// Closes one call.
    pub(super) item_close: &'static str,
    /// Of a block: opens one call; closes the block.
    pub(super) block: Option<(&'static str, &'static str)>,
}

const DSML_TAGS: Tags = Tags {
    open: "<｜DSML｜function_calls>",
    item_close: "</｜DSML｜invoke>",
    block: Some(("<｜DSML｜invoke name=\"", "</｜DSML｜function_calls>")),
};
const DEEPSEEK_V3_TAGS: Tags = Tags {
    open: "<｜tool▁calls▁begin｜>",
    item_close: "<｜tool▁call▁end｜>",
    block: Some(("<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>")),
};
pub(super) const SEPARATOR: &str = "<｜tool▁sep｜>";
const TOOL_CALL_TAGS: Tags = Tags { open: "<tool_call>", item_close: "</tool_call>", block: None };
const KEY: (&str, &str) = ("<arg_key>", "</arg_key>");
const VALUE: (&str, &str) = ("<arg_value>", "</arg_value>");

impl ToolSyntax {
    /// The grammar that a template teaches its model.
    pub(in crate::chat) fn of_template(source: &str) -> Self {
        if source.contains(DSML) && source.contains("function_calls") {
            Self::Dsml
        } else if source.contains(DEEPSEEK_V3_TAGS.open) {
            Self::DeepSeekV3
        } else if source.contains(KEY.0) {
            Self::Glm
        } else if source.contains(TOOL_CALL_TAGS.open) {
            Self::Hermes
        } else {
            Self::None
        }
    }

    pub(super) fn tags(self) -> Option<Tags> {
        match self {
            Self::None => None,
            Self::Dsml => Some(DSML_TAGS),
            Self::DeepSeekV3 => Some(DEEPSEEK_V3_TAGS),
            Self::Glm | Self::Hermes => Some(TOOL_CALL_TAGS),
        }
    }

    /// All tags, for the tokens that they are made of.
    pub(in crate::chat) fn all_tags(self) -> Vec<&'static str> {
        let Some(tags) = self.tags() else { return Vec::new() };
        let mut all = vec![tags.open, tags.item_close];
        all.extend(tags.block.into_iter().flat_map(|(item, close)| [item, close]));
        match self {
            Self::DeepSeekV3 => all.push(SEPARATOR),
            Self::Glm => all.extend([KEY.0, KEY.1, VALUE.0, VALUE.1]),
            _ => {}
        }
        all
    }

    /// Function and arguments, a JSON object, of the text between a call's tags; `None`: malformed.
    pub(super) fn parse(self, body: &str, strings: &HashSet<(String, String)>) -> Option<(String, String)> {
        let (name, arguments) = match self {
            Self::None => None,
            Self::Dsml => dsml(body),
            Self::DeepSeekV3 => deepseek_v3(body),
            Self::Glm => glm(body, strings),
            Self::Hermes => hermes(body),
        }?;
        (!name.is_empty()).then_some((name, arguments))
    }
}

// How a call begins that is not complete.
impl ToolSyntax {
    /// Function and as much of the arguments as there is, of the text behind the opening tag of a call that was cut.
    /// `None`: the function is not known yet.
    pub(super) fn cut(self, body: &str, strings: &HashSet<(String, String)>) -> Option<(String, String)> {
        let (name, arguments) = match self {
            Self::None => None,
            Self::Dsml => {
                let (name, rest) = body.split_once("\">")?;
                let whole =
                    rest.rfind("</｜DSML｜parameter>").map_or("", |at| &rest[..at + "</｜DSML｜parameter>".len()]);
                let (name, arguments) = dsml(&format!("{name}\">{whole}"))?;
                Some((name, opened(arguments)))
            }
            Self::DeepSeekV3 => {
                let (first, rest) = body.split_once(SEPARATOR)?;
                match rest.split_once("```json") {
                    Some((name, block)) if first.trim() == "function" => {
                        Some((name.trim().to_owned(), first_value(block)))
                    }
                    _ if first.trim() == "function" => None,
                    _ => Some((first.trim().to_owned(), first_value(rest))),
                }
            }
            Self::Glm => {
                // The name ends where something follows it.
                let at = body.find(KEY.0)?;
                let whole = body.rfind(VALUE.1).map_or(at, |end| end + VALUE.1.len());
                let (name, arguments) = glm(&body[..whole], strings)?;
                Some((name, opened(arguments)))
            }
            Self::Hermes => hermes_cut(body),
        }?;
        (!name.is_empty()).then_some((name, arguments))
    }
}

/// An object without its closing brace: more would have followed.
fn opened(object: String) -> String {
    object.strip_suffix('}').map(str::to_owned).unwrap_or(object)
}

/// The first value of `text` where it is whole, else all of it.
fn first_value(text: &str) -> String {
    let text = text.trim_start();
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    let end = match values.next() {
        Some(Ok(_)) => values.byte_offset(),
        _ => text.len(),
    };
    text[..end].to_owned()
}

fn hermes_cut(body: &str) -> Option<(String, String)> {
    let rest = behind(body, &["{", "\"name\"", ":"])?;
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let name = values.next()?.ok()?;
    let arguments = behind(&rest[values.byte_offset()..], &[",", "\"arguments\"", ":"]);
    Some((name, arguments.map_or_else(String::new, first_value)))
}

/// What follows these words, which may have whitespace before them.
fn behind<'t>(text: &'t str, words: &[&str]) -> Option<&'t str> {
    words.iter().try_fold(text, |text, word| text.trim_start().strip_prefix(word))
}

/// Collects arguments in order; a key that comes twice makes the call malformed.
#[derive(Default)]
struct Arguments {
    seen: HashSet<String>,
    text: String,
}

impl Arguments {
    fn add(&mut self, key: &str, value: &str) -> Option<()> {
        let separator = if self.seen.is_empty() { "" } else { ", " };
        self.text.push_str(&format!("{separator}{}: {value}", quoted(key)?));
        self.seen.insert(key.to_owned()).then_some(())
    }

    fn object(self) -> String {
        format!("{{{}}}", self.text)
    }
}

fn quoted(text: &str) -> Option<String> {
    dumps(&text).ok()
}

/// `text` without the whitespace around it, if it is JSON.
fn json(text: &str) -> Option<&str> {
    let text = text.trim();
    serde_json::from_str::<IgnoredAny>(text).is_ok().then_some(text)
}

/// As [`json`], and an object.
fn object(text: &str) -> Option<String> {
    json(text).filter(|text| text.starts_with('{')).map(str::to_owned)
}

fn dsml(body: &str) -> Option<(String, String)> {
    let (name, mut rest) = body.split_once("\">")?;
    let mut arguments = Arguments::default();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Some((name.to_owned(), arguments.object()));
        }
        let (key, after) = rest.strip_prefix("<｜DSML｜parameter name=\"")?.split_once("\" string=\"")?;
        let (is_string, after) = after.split_once("\">")?;
        let (value, after) = after.split_once("</｜DSML｜parameter>")?;
        match is_string {
            "true" => arguments.add(key, &quoted(value)?)?,
            "false" => arguments.add(key, json(value)?)?,
            _ => return None,
        }
        rest = after;
    }
}

fn deepseek_v3(body: &str) -> Option<(String, String)> {
    let (first, rest) = body.split_once(SEPARATOR)?;
    if let Some((name, block)) = rest.split_once("```json").filter(|_| first.trim() == "function") {
        let block = block.trim_end().strip_suffix("```")?;
        return Some((name.trim().to_owned(), object(block)?));
    }
    Some((first.trim().to_owned(), object(rest)?))
}

fn glm(body: &str, strings: &HashSet<(String, String)>) -> Option<(String, String)> {
    let (name, mut rest) = body.split_at(body.find(KEY.0).unwrap_or(body.len()));
    let name = name.trim().to_owned();
    if name.contains(['<', '{', '\n']) {
        return None;
    }
    let mut arguments = Arguments::default();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Some((name, arguments.object()));
        }
        let (key, after) = rest.strip_prefix(KEY.0)?.split_once(KEY.1)?;
        let (value, after) = after.trim_start().strip_prefix(VALUE.0)?.split_once(VALUE.1)?;
        let key = key.trim();
        let is_string = strings.contains(&(name.clone(), key.to_owned()));
        match json(value).filter(|_| !is_string) {
            Some(value) => arguments.add(key, value)?,
            None => arguments.add(key, &quoted(value)?)?,
        }
        rest = after;
    }
}

fn hermes(body: &str) -> Option<(String, String)> {
    let call: Map<String, Value> = serde_json::from_str(body.trim()).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    let arguments = match call.get("arguments") {
        None => "{}".to_owned(),
        Some(Value::String(text)) => object(text)?,
        Some(Value::Object(map)) => dumps(map).ok()?,
        Some(_) => return None,
    };
    Some((name, arguments))
}
