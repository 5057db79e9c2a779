//! What did the model say? Reasoning, content and calls are told apart while the answer comes.
//!
//! No clock and no I/O: text goes in, events come out. What is not decided yet waits: a piece that may be the start of
//! a tag, whitespace that may belong to one, a call that is not complete. A call is one event, when it is whole: so
//! one that turns out malformed can still become content, which it then does, letter for letter. So does one that is
//! not complete at the end, unless the reader is told that a limit has cut the answer (`cut_off`).
//! However an answer is cut into pieces, the events in a row say the same.
//!
//! Line breaks around the tags of reasoning are layout and are dropped, as is up to 64 bytes of whitespace before a
//! call. Calls are looked for in content only, and only if the request had tools.

mod enforce;
mod layout;
mod syntax;

pub use layout::laid_out;
pub(super) use syntax::ToolSyntax;

use super::{THINK_CLOSE, THINK_OPEN};
use serde_json::Value;
use std::collections::HashSet;
use syntax::Tags;

/// Longest call in bytes, with its tags.
const CALL_BYTES_MAX: usize = 1 << 20;
/// Most whitespace in bytes that waits for a tag.
const SPACE_BYTES_MAX: usize = 64;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputEvent {
    /// More of what the model thinks.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A call, whole.
    ToolCall {
        /// Counts the calls of the answer from 0.
        index: u32,
        /// The function; need not be one that was offered.
        name: String,
        /// A JSON object; of a call that a limit has cut, what is there of one.
        arguments: String,
    },
}

/// Where reasoning begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thinking {
    /// Nowhere.
    None,
    /// The prompt opened it.
    Open,
    /// With the answer, if that begins with its tag.
    Possible,
}

/// How an answer is read.
#[derive(Clone, Debug)]
pub(super) struct OutputFormat {
    pub(super) thinking: Thinking,
    pub(super) syntax: ToolSyntax,
    /// Function and parameter whose values are text, whatever they look like.
    pub(super) string_parameters: HashSet<(String, String)>,
}

/// Parameters of type `string` of the offered functions.
pub(super) fn string_parameters(functions: &[&Value]) -> HashSet<(String, String)> {
    let mut parameters = HashSet::new();
    for function in functions {
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let properties = function.get("parameters").and_then(|schema| schema.get("properties")?.as_object());
        let strings = properties.into_iter().flatten().filter(|(_, schema)| schema["type"] == "string");
        parameters.extend(strings.map(|(key, _)| (name.to_owned(), key.clone())));
    }
    parameters
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before anything: the tag of reasoning may come.
    Start,
    Reasoning,
    Content,
    /// In a call or a block of calls. `open` is the end of what was read: tags and whitespace.
    Calls {
        open: usize,
    },
}

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct OutputParser {
    format: OutputFormat,
    state: State,
    /// Text without event yet.
    pending: String,
    /// No end of a call begins before this byte of `pending`.
    searched: usize,
    /// Whether line breaks are dropped until text comes.
    fresh: bool,
    calls: u32,
    /// Calls before the block that is being read.
    calls_before: u32,
    /// A limit has cut the answer.
    is_cut: bool,
    events: Vec<OutputEvent>,
}

impl OutputParser {
    pub(super) fn new(format: OutputFormat) -> Self {
        let state = match format.thinking {
            Thinking::None => State::Content,
            Thinking::Open => State::Reasoning,
            Thinking::Possible => State::Start,
        };
        let fresh = format.thinking == Thinking::Open;
        let (pending, events) = (String::new(), Vec::new());
        Self { format, state, pending, searched: 0, fresh, calls: 0, calls_before: 0, is_cut: false, events }
    }

    /// Adds a piece of the answer.
    pub fn push(&mut self, text: &str) -> Vec<OutputEvent> {
        self.pending.push_str(text);
        self.run(false)
    }

    /// Whether what comes now is reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Ends the answer: what waited is text.
    pub fn finish(&mut self) -> Vec<OutputEvent> {
        self.run(true)
    }

    /// Ends an answer that a limit has cut: a call whose function is known is told with what is there of its arguments,
    /// all else that waited is text.
    pub fn cut_off(&mut self) -> Vec<OutputEvent> {
        self.is_cut = true;
        self.run(true)
    }

    fn run(&mut self, end: bool) -> Vec<OutputEvent> {
        while match self.state {
            State::Start => self.start(end),
            State::Reasoning => self.reasoning(end),
            State::Content => self.content(end),
            State::Calls { open } => self.calls(open, end),
        } {}
        std::mem::take(&mut self.events)
    }

    /// Takes `pending` up to `until`.
    fn take(&mut self, until: usize) -> String {
        self.searched = 0;
        self.pending.drain(..until).collect()
    }

    fn emit_content(&mut self, until: usize) {
        let text = self.take(until);
        if !text.is_empty() {
            self.events.push(OutputEvent::Content(text));
        }
    }

    /// Each of these steps returns whether there may be more to do.
    fn start(&mut self, end: bool) -> bool {
        let text = self.pending.trim_start();
        if text.starts_with(THINK_OPEN) {
            self.take(self.pending.len() - text.len() + THINK_OPEN.len());
            (self.state, self.fresh) = (State::Reasoning, true);
        } else if end || !THINK_OPEN.starts_with(text) {
            self.state = State::Content;
        } else {
            return false;
        }
        true
    }

    /// Drops line breaks after a tag of reasoning; returns whether text follows.
    fn freshen(&mut self) -> bool {
        if self.fresh {
            self.take(self.pending.len() - self.pending.trim_start_matches('\n').len());
            self.fresh = self.pending.is_empty();
        }
        !self.fresh
    }

    fn reasoning(&mut self, end: bool) -> bool {
        if !self.freshen() {
            return false;
        }
        let (until, closed) = match self.pending.find(THINK_CLOSE) {
            Some(at) => (at - space_before(&self.pending[..at], b"\n"), true),
            None if end => (self.pending.len(), false),
            None => (decided(&self.pending, &[THINK_CLOSE], b"\n"), false),
        };
        let text = self.take(until);
        if !text.is_empty() {
            self.events.push(OutputEvent::Reasoning(text));
        }
        if closed {
            let tag = self.pending.find(THINK_CLOSE).map_or(0, |at| at + THINK_CLOSE.len());
            self.take(tag);
            (self.state, self.fresh) = (State::Content, true);
        }
        closed
    }

    fn content(&mut self, end: bool) -> bool {
        if !self.freshen() {
            return false;
        }
        let Some(tags) = self.format.syntax.tags() else {
            self.emit_content(self.pending.len());
            return false;
        };
        if let Some(at) = self.pending.find(tags.open) {
            let space = space_before(&self.pending[..at], WHITESPACE);
            self.emit_content(at - space);
            self.calls_before = self.calls;
            self.state = State::Calls { open: space + tags.open.len() };
            return true;
        }
        if !end {
            self.emit_content(decided(&self.pending, &[tags.open], WHITESPACE));
        } else if self.calls == 0 || !self.pending.trim().is_empty() {
            self.emit_content(self.pending.len());
        } else {
            self.take(self.pending.len());
        }
        false
    }

    fn calls(&mut self, open: usize, end: bool) -> bool {
        let Some(tags) = self.format.syntax.tags() else { return false };
        let (item, body) = match tags.block {
            None => (open - tags.open.len(), open),
            Some((item_open, close)) => {
                let rest = self.pending[open..].trim_start();
                let item = self.pending.len() - rest.len();
                if rest.starts_with(item_open) {
                    (item, item + item_open.len())
                } else if rest.starts_with(close) && self.calls > self.calls_before {
                    self.take(item + close.len());
                    self.state = State::Content;
                    return true;
                } else if !end && (item_open.starts_with(rest) || close.starts_with(rest)) {
                    return false;
                } else {
                    return self.not_a_call(item, end);
                }
            }
        };
        self.call(&tags, item, body, end)
    }

    /// Reads the call that begins at `item`, its tag ending at `body`.
    fn call(&mut self, tags: &Tags, item: usize, body: usize, end: bool) -> bool {
        let from = floor_boundary(&self.pending, self.searched.max(body));
        let close = self.pending[from..].find(tags.item_close).map(|at| from + at);
        let length = close.map_or(self.pending.len(), |close| close + tags.item_close.len()) - item;
        if length > CALL_BYTES_MAX {
            let cut = ceil_boundary(&self.pending, item + CALL_BYTES_MAX);
            return self.not_a_call(cut, end);
        }
        let Some(close) = close else {
            let (format, text) = (&self.format, &self.pending[body..]);
            let cut = if end && self.is_cut { format.syntax.cut(text, &format.string_parameters) } else { None };
            if let Some((name, arguments)) = cut {
                self.take(self.pending.len());
                self.events.push(OutputEvent::ToolCall { index: self.calls, name, arguments });
                self.calls += 1;
                self.state = State::Content;
                return false;
            }
            if end {
                return self.not_a_call(self.pending.len(), end);
            }
            self.searched = self.pending.len().saturating_sub(tags.item_close.len()).max(body);
            return false;
        };
        let until = close + tags.item_close.len();
        match self.format.syntax.parse(&self.pending[body..close], &self.format.string_parameters) {
            Some((name, arguments)) => {
                self.take(until);
                self.events.push(OutputEvent::ToolCall { index: self.calls, name, arguments });
                self.calls += 1;
                self.state = if tags.block.is_some() { State::Calls { open: 0 } } else { State::Content };
                true
            }
            None => self.not_a_call(until, end),
        }
    }

    /// What was taken for a call is content, up to `until`; whitespace after a block's calls is nothing at the end.
    fn not_a_call(&mut self, until: usize, end: bool) -> bool {
        self.state = State::Content;
        if end && self.calls > self.calls_before && self.pending.trim().is_empty() {
            self.take(self.pending.len());
        }
        self.emit_content(until.min(self.pending.len()));
        true
    }
}

const WHITESPACE: &[u8] = b" \t\r\n";

/// Bytes of `space` at the end of `text`, as far as they may wait for a tag.
fn space_before(text: &str, space: &[u8]) -> usize {
    text.bytes().rev().take(SPACE_BYTES_MAX).take_while(|byte| space.contains(byte)).count()
}

/// How much of `text` is decided: all but a start of one of `tags` at its end and `space` before that.
fn decided(text: &str, tags: &[&str], space: &[u8]) -> usize {
    let begun = |tag: &&str| {
        let longest = tag.len().min(text.len() + 1) - 1;
        (1..=longest).rev().find(|n| tag.is_char_boundary(*n) && text.ends_with(&tag[..*n])).unwrap_or(0)
    };
    let until = text.len() - tags.iter().map(begun).max().unwrap_or(0);
    until - space_before(&text[..until], space)
}

fn floor_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The first boundary past `at`, or the end.
fn ceil_boundary(text: &str, at: usize) -> usize {
    (at + 1..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const DSML: &str = "Let me look.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"weather\">\n\
        <｜DSML｜parameter name=\"city\" string=\"true\">Paris \"x\"</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"days\" string=\"false\">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
        <｜DSML｜invoke name=\"now\">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>";
    const V31: &str = "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜>\
        <｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    const GLM: &str = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>75001</arg_value>\n\
        <arg_key>days</arg_key><arg_value>3</arg_value>\
        <arg_key>note</arg_key><arg_value>no JSON</arg_value>\n</tool_call>\n\
        <tool_call>now</tool_call>\n";
    const HERMES: &str = "Sure. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"a\": 1}}\n</tool_call>\
        \n<tool_call>{\"name\": \"now\"}</tool_call>";

    fn parser(thinking: Thinking, syntax: ToolSyntax) -> OutputParser {
        let weather =
            json!({"name": "weather", "parameters": {"properties": {"city": {"type": "string"}, "days": {}}}});
        OutputParser::new(OutputFormat { thinking, syntax, string_parameters: string_parameters(&[&weather]) })
    }

    /// Events with neighbours of one kind joined.
    fn read<'t>(mut parser: OutputParser, pieces: impl IntoIterator<Item = &'t str>) -> Vec<OutputEvent> {
        let mut events: Vec<OutputEvent> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
        events.extend(parser.finish());
        assert_eq!(parser.finish(), []);
        let mut joined: Vec<OutputEvent> = Vec::new();
        for event in events {
            match (joined.last_mut(), event) {
                (Some(OutputEvent::Reasoning(text)), OutputEvent::Reasoning(more))
                | (Some(OutputEvent::Content(text)), OutputEvent::Content(more)) => text.push_str(&more),
                (_, event) => joined.push(event),
            }
        }
        joined
    }

    fn whole(thinking: Thinking, syntax: ToolSyntax, text: &str) -> Vec<OutputEvent> {
        read(parser(thinking, syntax), [text])
    }

    fn reasoning(text: &str) -> OutputEvent {
        OutputEvent::Reasoning(text.to_owned())
    }

    fn content(text: &str) -> OutputEvent {
        OutputEvent::Content(text.to_owned())
    }

    fn call(index: u32, name: &str, arguments: &str) -> OutputEvent {
        OutputEvent::ToolCall { index, name: name.to_owned(), arguments: arguments.to_owned() }
    }

    #[test]
    fn reasoning_is_told_from_content() {
        for (thinking, text, expect) in [
            (Thinking::Open, "\nwhy\n</think>\n\nyes", vec![reasoning("why"), content("yes")]),
            (Thinking::Open, "</think>yes", vec![content("yes")]),
            (Thinking::Open, "cut off\n", vec![reasoning("cut off\n")]),
            (Thinking::Open, "a </thin", vec![reasoning("a </thin")]),
            (Thinking::Possible, " <think>a\n\nb</think>c", vec![reasoning("a\n\nb"), content("c")]),
            (Thinking::Possible, "<thin", vec![content("<thin")]),
            (Thinking::Possible, "c <think>d</think>", vec![content("c <think>d</think>")]),
            (Thinking::None, "<think>x</think>", vec![content("<think>x</think>")]),
        ] {
            assert_eq!(whole(thinking, ToolSyntax::None, text), expect, "{text}");
        }
    }

    #[test]
    fn calls_of_each_grammar_are_read() {
        let now = call(1, "now", "{}");
        let check = |syntax, text, expect: Vec<OutputEvent>| assert_eq!(whole(Thinking::None, syntax, text), expect);
        let dsml = call(0, "weather", r#"{"city": "Paris \"x\"", "days": [1, 2]}"#);
        check(ToolSyntax::Dsml, DSML, vec![content("Let me look."), dsml, now.clone()]);
        let v31 = call(0, "weather", r#"{"city": "Paris"}"#);
        check(ToolSyntax::DeepSeekV3, V31, vec![content("Hm."), v31, now.clone()]);
        let glm = call(0, "weather", r#"{"city": "75001", "days": 3, "note": "no JSON"}"#);
        check(ToolSyntax::Glm, GLM, vec![glm, now.clone()]);
        let hermes = call(0, "weather", r#"{"city": "Paris", "a": 1}"#);
        check(ToolSyntax::Hermes, HERMES, vec![content("Sure."), hermes, now]);
        check(ToolSyntax::None, HERMES, vec![content(HERMES)]);
    }

    #[test]
    fn what_is_malformed_is_content_letter_for_letter() {
        for (syntax, text) in [
            (ToolSyntax::Hermes, "a\n<tool_call>{\"name\": 1}</tool_call> b"),
            (ToolSyntax::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>"),
            (ToolSyntax::Hermes, "<tool_call>{\"name\": \"f\", \"argu"),
            (ToolSyntax::Hermes, "x <tool_c"),
            (ToolSyntax::Hermes, "<tool_call></tool_call>\n"),
            (ToolSyntax::Glm, "<tool_call>{\"name\": \"f\"}</tool_call>"),
            (ToolSyntax::Glm, "<tool_call>f<arg_key>a</arg_key>1</tool_call>"),
            (
                ToolSyntax::Glm,
                "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>a</arg_key><arg_value>2</arg_value></tool_call>",
            ),
            (ToolSyntax::Dsml, "\n\n<｜DSML｜function_calls>\nno"),
            (ToolSyntax::Dsml, "<｜DSML｜function_calls></｜DSML｜function_calls>"),
            (
                ToolSyntax::Dsml,
                "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"a\" string=\"false\">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
            ),
            (ToolSyntax::DeepSeekV3, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>[]<｜tool▁call▁end｜>"),
        ] {
            assert_eq!(whole(Thinking::None, syntax, text), [content(text)], "{text}");
        }
    }

    #[test]
    fn a_call_that_a_limit_has_cut_is_told_as_far_as_it_is_there_once_its_function_is_known() {
        let cut = |syntax: ToolSyntax, text: &str| {
            let mut parser = parser(Thinking::None, syntax);
            let mut events = parser.push(text);
            events.extend(parser.cut_off());
            assert_eq!(parser.cut_off(), [], "{text}");
            events
        };
        for (syntax, text, arguments) in [
            (ToolSyntax::Hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"x", "{\"a\": [1, \"x"),
            (ToolSyntax::Hermes, "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\": 1}}\n</tool_c", "{\"a\": 1}"),
            (ToolSyntax::Hermes, "<tool_call>{\"name\": \"f\"", ""),
            (ToolSyntax::Hermes, "<tool_call>{\"name\": \"f\", \"argum", ""),
            (ToolSyntax::DeepSeekV3, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a", "{\"a"),
            (
                ToolSyntax::DeepSeekV3,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": 1}\n``",
                "{\"a\": 1}",
            ),
            (ToolSyntax::Glm, "<tool_call>f\n<arg_key>a</arg_key><arg_value>7</arg_value><arg_key>b", "{\"a\": 7"),
            (
                ToolSyntax::Dsml,
                "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n\
                 <｜DSML｜parameter name=\"a\" string=\"true\">x</｜DSML｜parameter>\n<｜DSML｜parameter name=\"b",
                "{\"a\": \"x\"",
            ),
        ] {
            assert_eq!(cut(syntax, text), [call(0, "f", arguments)], "{text}");
        }
        for (syntax, text) in [
            (ToolSyntax::Hermes, "<tool_call>{\"name\": \"f"),
            (ToolSyntax::Hermes, "<tool_call>{\"arguments\": {}"),
            (ToolSyntax::DeepSeekV3, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f"),
            (ToolSyntax::Glm, "<tool_call>f"),
            (ToolSyntax::Dsml, "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f"),
        ] {
            assert_eq!(cut(syntax, text), [content(text)], "the function is not known yet: {text}");
        }
        let second = cut(ToolSyntax::Hermes, &format!("{HERMES}<tool_call>{{\"name\": \"f\", "));
        assert_eq!(second.last(), Some(&call(2, "f", "")));
    }

    #[test]
    fn a_block_that_breaks_after_a_call_keeps_the_call() {
        let good = "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"f\">\n</｜DSML｜invoke>\n";
        let f = call(0, "f", "{}");
        assert_eq!(whole(Thinking::None, ToolSyntax::Dsml, good), std::slice::from_ref(&f));
        let broken = format!("{good}and");
        assert_eq!(whole(Thinking::None, ToolSyntax::Dsml, &broken), [f.clone(), content("\nand")]);
        let closed = format!("{good}</｜DSML｜function_calls>\n\nDone.");
        assert_eq!(whole(Thinking::None, ToolSyntax::Dsml, &closed), [f, content("\n\nDone.")]);
    }

    #[test]
    fn a_call_that_does_not_end_becomes_content_and_memory_stays_bounded() {
        let mut parser = parser(Thinking::None, ToolSyntax::Hermes);
        let mut seen = parser.push("<tool_call>").len();
        for _ in 0..(2 * CALL_BYTES_MAX / 1024) {
            seen += parser.push(&"x".repeat(1024)).len();
            assert!(parser.pending.len() <= CALL_BYTES_MAX + 1024);
        }
        assert!(seen > 0);
    }

    fn any_answer() -> impl Strategy<Value = (Thinking, ToolSyntax, String)> {
        let thinking = prop_oneof![Just(Thinking::None), Just(Thinking::Open), Just(Thinking::Possible)];
        let syntax = prop_oneof![
            Just(ToolSyntax::None),
            Just(ToolSyntax::Dsml),
            Just(ToolSyntax::DeepSeekV3),
            Just(ToolSyntax::Glm),
            Just(ToolSyntax::Hermes)
        ];
        let part = prop_oneof![
            prop::sample::select(vec![
                "<think>",
                "</think>",
                "\n",
                "\n\n",
                " ",
                "<",
                "</",
                "text",
                "世😀",
                DSML,
                V31,
                GLM,
                HERMES,
                "<tool_call>",
                "</tool_call>",
                "<｜DSML｜function_calls>",
                "</｜DSML｜function_calls>",
                "<｜DSML｜invoke name=\"f\">",
                "</｜DSML｜invoke>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁calls▁end｜>",
                "<arg_key>",
                "{\"name\": \"f\"}",
            ])
            .prop_map(str::to_owned),
            // Longer than what may wait.
            Just(" ".repeat(100)),
            "[a-z<>/\n]{0,5}",
        ];
        let text = prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat());
        (thinking, syntax, text)
    }

    /// `text` in pieces of the given numbers of characters.
    fn cut<'t>(text: &'t str, sizes: &[usize]) -> Vec<&'t str> {
        let (mut pieces, mut rest, mut sizes) = (Vec::new(), text, sizes.iter().cycle());
        while let (false, Some(size)) = (rest.is_empty(), sizes.next()) {
            let at = rest.char_indices().nth(*size).map_or(rest.len(), |(at, _)| at);
            let (now, later) = rest.split_at(at);
            pieces.push(now);
            rest = later;
        }
        pieces
    }

    proptest! {
        #![proptest_config(crate::testing::seeded(2000))]
        #[test]
        fn any_cut_of_an_answer_reads_the_same(
            (thinking, syntax, text) in any_answer(),
            sizes in prop::collection::vec(1usize..9, 1..6),
        ) {
            let expect = whole(thinking, syntax, &text);
            for sizes in [&[1][..], &sizes] {
                prop_assert_eq!(&read(parser(thinking, syntax), cut(&text, sizes)), &expect);
            }
        }

        #[test]
        fn any_answer_may_be_cut(
            (thinking, syntax, text) in any_answer(),
            sizes in prop::collection::vec(1usize..9, 1..6),
        ) {
            let cut_off = |pieces: &[&str]| {
                let mut parser = parser(thinking, syntax);
                let mut events: Vec<OutputEvent> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
                events.extend(parser.cut_off());
                events.into_iter().filter(|event| matches!(event, OutputEvent::ToolCall { .. })).collect::<Vec<_>>()
            };
            let calls = cut_off(&[text.as_str()]);
            prop_assert_eq!(&calls, &cut_off(&cut(&text, &sizes)));
            let told = whole(thinking, syntax, &text);
            let told: Vec<_> = told.into_iter().filter(|event| matches!(event, OutputEvent::ToolCall { .. })).collect();
            prop_assert!(calls.starts_with(&told) && calls.len() <= told.len() + 1, "{:?} {:?}", calls, told);
        }

        #[test]
        fn arguments_are_json_and_no_text_is_lost((thinking, syntax, text) in any_answer()) {
            let events = whole(thinking, syntax, &text);
            let mut letters = String::new();
            let mut calls = 0;
            for event in &events {
                match event {
                    OutputEvent::ToolCall { arguments, .. } => {
                        calls += 1;
                        prop_assert!(serde_json::from_str::<serde_json::Map<String, Value>>(arguments).is_ok());
                    }
                    OutputEvent::Reasoning(text) | OutputEvent::Content(text) => letters.push_str(text),
                }
            }
            if calls == 0 {
                // All but layout and the tags of reasoning.
                let bare = |text: &str| text.replace("<think>", "").replace("</think>", "").replace(['\n', ' '], "");
                prop_assert_eq!(bare(&letters), bare(&text));
            }
        }
    }
}
