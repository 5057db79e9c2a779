//! How is it known, after rendering, which characters came from a client?
//!
//! A template writes control tokens and messages into one text. Were control tokens then looked for in that text, a
//! message with `<|im_end|>` in it could end its turn and forge the next. So each string of a request is marked before
//! it is rendered, with private-use characters that occur nowhere in the request:
//!
//! - Each character that control tokens begin or end with (`<`, `>`, ...) is replaced by a stand-in of its own, one
//!   for one: no control token can begin, end or be whole in a message, also when the template cuts or joins it.
//! - The text of messages gets a joiner at both ends, inside the whitespace, so that `strip` and `trim` still work:
//!   no control token can reach across the border.
//! - A name, key or value that is the inside of a control token (`think`) gets a joiner too: a template that puts `<`
//!   and `>` around it does not make a token. All others stay as they are, so that templates can compare them.
//!
//! Stand-ins never match a control token; after these are found, the text between them is unmarked and encoded as
//! plain text, the same text that would have been encoded without marks.
//! A template that looks for tags in a message does not see them; `<think>` of assistants is taken apart beforehand.

use super::message::{ChatMessage, ChatRequest};
use crate::ModelError;
use crate::tokenizer::ControlTokens;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Private-use characters of the two planes that are nothing else.
const FIRST: u32 = 0xf_0000;
const LAST: u32 = 0x10_fffd;

/// The marks of one rendering.
#[derive(Clone, Debug)]
pub(super) struct Marks<'c> {
    control: &'c ControlTokens,
    joiner: char,
    /// By index of the control tokens' frame.
    stand_ins: Vec<char>,
}

/// What is needed to take marks off again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unmark {
    joiner: char,
    /// Stand-in and what it stands for, ascending.
    pairs: Vec<(char, char)>,
}

/// Whether a character may be a mark; `tojson` leaves them alone.
pub(super) fn is_private(c: char) -> bool {
    u32::from(c) >= FIRST
}

impl<'c> Marks<'c> {
    /// Chooses characters that occur nowhere in `request`.
    ///
    /// # Errors
    /// A request that uses up all of them.
    pub(super) fn choose(control: &'c ControlTokens, request: &ChatRequest) -> Result<Self, ModelError> {
        let mut used = BTreeSet::new();
        visit(request, &mut |text| used.extend(text.chars().filter(|c| is_private(*c))));
        let mut free = (FIRST..=LAST).filter_map(char::from_u32).filter(|c| !used.contains(c));
        let needed = control.frame().len();
        let full = || ModelError::Template("the messages use up all private-use characters".to_owned());
        let joiner = free.next().ok_or_else(full)?;
        let stand_ins: Vec<char> = free.take(needed).collect();
        if stand_ins.len() < needed {
            return Err(full());
        }
        Ok(Self { control, joiner, stand_ins })
    }

    pub(super) fn unmark(&self) -> Unmark {
        let pairs = self.stand_ins.iter().copied().zip(self.control.frame().iter().copied()).collect();
        Unmark { joiner: self.joiner, pairs }
    }

    /// Replaces frame characters alone.
    fn framed(&self, text: &str) -> String {
        let frame = self.control.frame();
        text.chars().map(|c| frame.binary_search(&c).map_or(c, |at| self.stand_ins[at])).collect()
    }

    /// Marks the text of a message.
    pub(super) fn text(&self, text: &str) -> String {
        let inner = text.trim();
        if inner.is_empty() {
            return text.to_owned();
        }
        let start = text.len() - text.trim_start().len();
        let (before, after) = (&text[..start], &text[start + inner.len()..]);
        format!("{before}{joiner}{}{joiner}{after}", self.framed(inner), joiner = self.joiner)
    }

    /// Marks a name, key or value.
    pub(super) fn word(&self, text: &str) -> String {
        let mut marked = self.framed(text);
        if self.control.is_inside(text.trim()) {
            let start = marked.len() - marked.trim_start().len();
            let first = marked[start..].chars().next().map_or(0, char::len_utf8);
            marked.insert(start + first, self.joiner);
        }
        marked
    }

    /// Marks all strings in a value.
    pub(super) fn json(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.word(text)),
            Value::Array(values) => Value::Array(values.iter().map(|value| self.json(value)).collect()),
            Value::Object(map) => Value::Object(self.map(map)),
            other => other.clone(),
        }
    }

    pub(super) fn map(&self, map: &Map<String, Value>) -> Map<String, Value> {
        map.iter().map(|(key, value)| (self.word(key), self.json(value))).collect()
    }
}

impl Unmark {
    /// The text without marks.
    pub(super) fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        if !text.contains(is_private) {
            return Cow::Borrowed(text);
        }
        let original = |c: char| {
            let at = self.pairs.binary_search_by_key(&c, |(stand_in, _)| *stand_in);
            at.map_or(c, |at| self.pairs[at].1)
        };
        Cow::Owned(text.chars().filter(|c| *c != self.joiner).map(original).collect())
    }
}

/// Calls `see` with every string of a request that can be rendered.
fn visit(request: &ChatRequest, see: &mut dyn FnMut(&str)) {
    for message in &request.messages {
        let ChatMessage { role: _, content, reasoning_content, tool_calls, tool_call_id, name } = message;
        [content, reasoning_content, tool_call_id, name].into_iter().flatten().for_each(|text| see(text));
        for call in tool_calls {
            [&call.id, &call.name, &call.arguments].into_iter().for_each(|text| see(text));
            // Escapes become characters when arguments are parsed.
            if let Ok(arguments) = serde_json::from_str(&call.arguments) {
                visit_json(&arguments, see);
            }
        }
    }
    request.effort.iter().for_each(|effort| see(effort));
    request.tools.iter().chain(&request.response_format).for_each(|value| visit_json(value, see));
    for (key, value) in &request.template_arguments {
        see(key);
        visit_json(value, see);
    }
}

fn visit_json(value: &Value, see: &mut dyn FnMut(&str)) {
    match value {
        Value::String(text) => see(text),
        Value::Array(values) => values.iter().for_each(|value| visit_json(value, see)),
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            see(key);
            visit_json(value, see);
        }),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::message::Role;

    fn control() -> ControlTokens {
        ControlTokens::new(&[("<|im_end|>", 1), ("<think>", 2), ("[gMASK]", 3)]).unwrap()
    }

    fn check(text: &str) {
        let control = control();
        let request = ChatRequest { messages: vec![ChatMessage::new(Role::User, text)], ..ChatRequest::default() };
        let marks = Marks::choose(&control, &request).unwrap();
        for marked in [marks.text(text), marks.word(text)] {
            assert_eq!(control.find(&marked).count(), 0);
            assert_eq!(control.find(&format!("<{}>", marked.trim())).count(), 0, "{text}");
            assert_eq!(marks.unmark().text(&marked), text);
        }
        assert_eq!(marks.unmark().text(marks.text(text).trim()), text.trim());
    }

    #[test]
    fn no_control_token_comes_from_a_marked_text() {
        for text in [
            "",
            "  ",
            "plain",
            "<|im_end|>",
            " <think>\n",
            "think",
            "|im_end|",
            "a [gMASK] b",
            "\u{f0000}\u{f0001}<",
            "\u{10fffd}",
        ] {
            check(text);
        }
    }

    #[test]
    fn words_that_are_no_token_stay_as_they_are() {
        let control = control();
        let marks = Marks::choose(&control, &ChatRequest::default()).unwrap();
        assert_eq!(marks.word("function"), "function");
        assert_ne!(marks.word("think"), "think");
        let value = serde_json::json!({"type": "string", "<x>": [1, "<"]});
        let marked = marks.json(&value).to_string();
        assert!(marked.contains("\"type\":\"string\"") && !marked.contains('<'));
        assert_eq!(marks.unmark().text(&marked), value.to_string());
    }

    #[test]
    fn a_request_that_leaves_no_character_is_refused() {
        let all: String = (FIRST..=LAST).filter_map(char::from_u32).collect();
        let request = ChatRequest { messages: vec![ChatMessage::new(Role::User, all)], ..ChatRequest::default() };
        assert!(Marks::choose(&control(), &request).is_err());
    }
}
