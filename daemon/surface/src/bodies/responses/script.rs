//! Which events does a response make? OpenAI's, each with a number, from the engine's.
//!
//! A number counts what was said: every event but a piece of text by one, a piece by its characters. So the numbers of
//! an answer do not depend on how it was cut into pieces, and one that is put together again from the journal goes on
//! after any number that a client has seen.

use crate::bodies::answer::now;
use crate::bodies::figures::{Telling, prompt_progress, timings, timings_so_far};
use serde_json::{Value, json};
use sparsed_engine::api::{Event, FinishReason, Finished, Progress};

/// What a response says of itself beside its output.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// Its name; the names of its items are made of it.
    pub(crate) id: String,
    /// `response`'s members that do not change.
    pub(crate) fixed: Value,
    /// What its events say beside it.
    pub(crate) telling: Telling,
}

/// How a response ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    Completed,
    /// `max_output_tokens` was reached.
    Incomplete,
    Cancelled,
    /// With OpenAI's `code` and `message`.
    Failed {
        code: String,
        message: String,
    },
}

/// Tokens of a response.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tokens {
    pub(super) input: u32,
    /// Where that is known.
    pub(super) cached: Option<u32>,
    pub(super) output: u32,
    /// Of the output, where that is known.
    pub(super) reasoning: Option<u32>,
}

/// Writes the events of one response.
#[derive(Debug)]
pub(crate) struct Script {
    head: Head,
    /// The number of the last event.
    number: u64,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<Open>,
    n_calls: usize,
    /// Seconds since 1970, of a response that was heard to be complete.
    completed_at: Option<u64>,
    /// Times of what was not told yet.
    timings: Option<Value>,
    /// Written, not taken yet.
    events: Vec<Value>,
    /// Events up to this number are not written.
    after: Option<u64>,
}

/// An item of text that goes on.
#[derive(Debug)]
struct Open {
    kind: Kind,
    id: String,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
}

impl Script {
    /// Begins a response; a client that has heard `after` hears what follows it.
    pub(crate) fn begin(head: Head, after: Option<u64>) -> Self {
        let (output, events) = (Vec::new(), Vec::new());
        let (open, completed_at, timings) = (None, None, None);
        let mut script = Self { head, number: 0, output, open, n_calls: 0, completed_at, timings, events, after };
        let response = script.response("in_progress");
        script.tell_at(0, json!({ "type": "response.created", "response": response }));
        script.tell(json!({ "type": "response.in_progress", "response": response }));
        script
    }

    /// Events since they were last taken.
    pub(crate) fn take(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Goes on with an event of the engine's. Answers whether it was the last.
    pub(crate) fn hear(&mut self, event: Event) -> bool {
        match event {
            Event::Queued { .. } | Event::Sampled { .. } | Event::Likelihood(_) => false,
            Event::Progress(progress) => self.progress(&progress),
            Event::Delta { text, .. } => self.text(Kind::Message, &text),
            Event::Reasoning { text } => self.text(Kind::Reasoning, &text),
            Event::ToolCall { id, name, arguments, .. } => self.call(&id, &name, &arguments),
            Event::Finished(finished) => {
                self.timings = self.head.telling.timings().then(|| timings(&finished));
                let Finished { reason, usage, .. } = finished;
                let tokens = Tokens {
                    input: usage.prompt_tokens,
                    cached: Some(usage.cached_tokens),
                    output: usage.completion_tokens,
                    reasoning: Some(usage.reasoning_tokens),
                };
                let end = if reason == FinishReason::Length { End::Incomplete } else { End::Completed };
                self.completed_at = (end == End::Completed).then(now);
                self.end(&end, tokens)
            }
            Event::Failed(failure) => {
                let refusal = crate::refusal::Refusal::from(failure.clone());
                let (code, message) = (refusal.name().code.to_owned(), failure.to_string());
                self.end(&End::Failed { code, message }, Tokens::default())
            }
        }
    }

    /// The whole response as it is after the last event.
    pub(crate) fn last_response(events: &[Value]) -> Option<Value> {
        Some(events.last()?.get("response")?.clone())
    }

    pub(super) fn text_of(&mut self, reasoning: bool, text: &str) {
        self.text(if reasoning { Kind::Reasoning } else { Kind::Message }, text);
    }

    /// A call, whole or cut. Always `false`: it is not the last event.
    pub(super) fn call(&mut self, call_id: &str, name: &str, arguments: &str) -> bool {
        self.close();
        let at = self.output.len();
        let id = format!("fc_{}_{}", self.head.id, self.n_calls);
        self.n_calls += 1;
        let item = |arguments: &str, status: &str| {
            json!({ "type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": arguments,
                    "status": status })
        };
        let added = item("", "in_progress");
        self.tell(json!({ "type": "response.output_item.added", "output_index": at, "item": added }));
        let part = |kind: &str, member: &str| {
            let mut event = json!({ "type": kind, "item_id": id, "output_index": at });
            event[member] = json!(arguments);
            event
        };
        self.tell(part("response.function_call_arguments.delta", "delta"));
        // A call that the limit has cut is no whole object.
        let is_whole = serde_json::from_str::<serde_json::Map<String, Value>>(arguments).is_ok();
        if is_whole {
            let mut done = part("response.function_call_arguments.done", "arguments");
            done["name"] = json!(name);
            self.tell(done);
        }
        self.item_done(item(arguments, if is_whole { "completed" } else { "incomplete" }));
        false
    }

    /// Ends the response. Always `true`.
    pub(super) fn end(&mut self, end: &End, tokens: Tokens) -> bool {
        self.close_as(if *end == End::Completed { "completed" } else { "incomplete" });
        let (status, kind) = match end {
            End::Completed => ("completed", "response.completed"),
            End::Incomplete => ("incomplete", "response.incomplete"),
            // OpenAI names no event of its own for it.
            End::Cancelled => ("cancelled", "response.incomplete"),
            End::Failed { .. } => ("failed", "response.failed"),
        };
        let mut response = self.response(status);
        match end {
            End::Failed { code, message } => response["error"] = json!({ "code": code, "message": message }),
            End::Incomplete => response["incomplete_details"] = json!({ "reason": "max_output_tokens" }),
            End::Completed | End::Cancelled => {}
        }
        if tokens.output > 0 {
            response["usage"] = json!({
                "input_tokens": tokens.input,
                "input_tokens_details": { "cached_tokens": tokens.cached },
                "output_tokens": tokens.output,
                "output_tokens_details": { "reasoning_tokens": tokens.reasoning },
                "total_tokens": u64::from(tokens.input) + u64::from(tokens.output),
            });
        }
        let event = self.timed(json!({ "type": kind, "response": response }));
        self.tell(event);
        true
    }

    /// The response as it is now.
    pub(super) fn response(&self, status: &str) -> Value {
        let mut response = self.head.fixed.clone();
        response["id"] = json!(self.head.id);
        response["object"] = json!("response");
        response["status"] = json!(status);
        response["completed_at"] = json!(self.completed_at);
        response["error"] = Value::Null;
        response["incomplete_details"] = Value::Null;
        response["output"] = json!(self.output);
        response["usage"] = Value::Null;
        response
    }

    /// How far the prompt is read, or how long the token took that follows. Always `false`: it is not the last event.
    fn progress(&mut self, progress: &Progress) -> bool {
        self.timings = self.head.telling.timings().then(|| timings_so_far(progress));
        if let Some(progress) = prompt_progress(progress).filter(|_| self.head.telling.progress()) {
            let response = self.response("in_progress");
            let event = json!({ "type": "response.in_progress", "response": response, "prompt_progress": progress });
            let event = self.timed(event);
            self.tell(event);
        }
        false
    }

    /// The event with the times that go with it, if any do.
    fn timed(&mut self, mut event: Value) -> Value {
        if let Some(timings) = self.timings.take() {
            event["timings"] = timings;
        }
        event
    }

    /// Text goes on, in an item of its kind. Always `false`: it is not the last event.
    fn text(&mut self, kind: Kind, text: &str) -> bool {
        if text.is_empty() {
            return false;
        }
        if self.open.as_ref().is_none_or(|open| open.kind != kind) {
            self.close();
            self.open(kind);
        }
        let first = self.number + 1;
        self.number += text.chars().count() as u64;
        let Some(open) = &mut self.open else { return false };
        open.text += text;
        // Of a piece that the client has heard in part, the rest.
        let heard = self.after.map_or(0, |after| (after + 1).saturating_sub(first));
        let rest: String = text.chars().skip(usize::try_from(heard).unwrap_or(usize::MAX)).collect();
        if !rest.is_empty() {
            let id = open.id.clone();
            let mut event = self.part(kind.delta(), &id);
            event["delta"] = json!(rest);
            if kind == Kind::Message {
                event["logprobs"] = json!([]);
            }
            let event = self.timed(event);
            self.tell_at(self.number, event);
        }
        false
    }

    fn open(&mut self, kind: Kind) {
        let id = match kind {
            Kind::Reasoning => format!("rs_{}_{}", self.head.id, self.output.len()),
            Kind::Message => format!("msg_{}_{}", self.head.id, self.output.len()),
        };
        let item = kind.item(&id, "in_progress", &[]);
        self.tell(json!({ "type": "response.output_item.added", "output_index": self.output.len(), "item": item }));
        let mut event = self.part("response.content_part.added", &id);
        event["part"] = kind.content("");
        self.tell(event);
        self.open = Some(Open { kind, id, text: String::new() });
    }

    /// Ends the text that goes on.
    fn close(&mut self) {
        self.close_as("completed");
    }

    fn close_as(&mut self, status: &str) {
        let Some(Open { kind, id, text }) = self.open.take() else { return };
        let mut event = self.part(kind.done(), &id);
        event["text"] = json!(text);
        if kind == Kind::Message {
            event["logprobs"] = json!([]);
        }
        self.tell(event);
        let mut event = self.part("response.content_part.done", &id);
        event["part"] = kind.content(&text);
        self.tell(event);
        self.item_done(kind.item(&id, status, &[kind.content(&text)]));
    }

    fn item_done(&mut self, item: Value) {
        let at = self.output.len();
        self.tell(json!({ "type": "response.output_item.done", "output_index": at, "item": item }));
        self.output.push(item);
    }

    fn part(&self, kind: &str, id: &str) -> Value {
        json!({ "type": kind, "item_id": id, "output_index": self.output.len(), "content_index": 0 })
    }

    fn tell(&mut self, event: Value) {
        self.number += 1;
        self.tell_at(self.number, event);
    }

    fn tell_at(&mut self, number: u64, mut event: Value) {
        if self.after.is_none_or(|after| number > after) {
            event["sequence_number"] = json!(number);
            self.events.push(event);
        }
    }
}

impl Kind {
    fn delta(self) -> &'static str {
        match self {
            Self::Reasoning => "response.reasoning_text.delta",
            Self::Message => "response.output_text.delta",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Reasoning => "response.reasoning_text.done",
            Self::Message => "response.output_text.done",
        }
    }

    fn content(self, text: &str) -> Value {
        match self {
            Self::Reasoning => json!({ "type": "reasoning_text", "text": text }),
            Self::Message => json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] }),
        }
    }

    fn item(self, id: &str, status: &str, content: &[Value]) -> Value {
        match self {
            Self::Reasoning => {
                json!({ "type": "reasoning", "id": id, "status": status, "summary": [], "content": content })
            }
            Self::Message => {
                json!({ "type": "message", "id": id, "status": status, "role": "assistant", "content": content })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::api::{Timings, Usage};

    fn head() -> Head {
        Head { id: "resp_1".to_owned(), fixed: json!({ "model": "m" }), telling: Telling::default() }
    }

    /// The events of an answer in these pieces; a client that has heard `after` listens.
    fn events(reasoning: &[&str], pieces: &[&str], after: Option<u64>) -> Vec<Value> {
        let mut script = Script::begin(head(), after);
        for text in reasoning {
            script.hear(Event::Reasoning { text: (*text).to_owned() });
        }
        for text in pieces {
            script.hear(Event::Delta { text: (*text).to_owned(), tokens: Vec::new() });
        }
        let [id, name, arguments] = ["call_7", "f", "{}"].map(str::to_owned);
        script.hear(Event::ToolCall { index: 0, id, name, arguments });
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 4, reasoning_tokens: 2 };
        let finished = Finished { reason: FinishReason::Stop, stopped_by: None, usage, timings: Timings::default() };
        assert!(script.hear(Event::Finished(finished)));
        script.take()
    }

    fn text(events: &[Value]) -> String {
        let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
        deltas.map(|event| event["delta"].as_str().unwrap()).collect()
    }

    fn number(event: &Value) -> u64 {
        event["sequence_number"].as_u64().unwrap()
    }

    #[test]
    fn events_come_in_openais_order_and_the_last_has_everything() {
        let events = events(&[], &["Hel", "lo"], None);
        let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        let parts = ["output_item.added", "content_part.added", "output_text.delta", "output_text.delta"];
        let ends = ["output_text.done", "content_part.done", "output_item.done"];
        let call =
            ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"];
        let all = ["created", "in_progress"].iter().chain(&parts).chain(&ends).chain(&call).chain(&["completed"]);
        assert_eq!(kinds, all.map(|kind| format!("response.{kind}")).collect::<Vec<_>>());
        let response = Script::last_response(&events).unwrap();
        assert_eq!((&response["status"], &response["model"]), (&json!("completed"), &json!("m")));
        assert!(response["completed_at"].is_u64() && events[0]["response"]["completed_at"].is_null());
        assert_eq!(response["output"][0]["content"][0]["text"], "Hello");
        assert_eq!(response["output"][1]["name"], "f");
        assert_eq!(response["usage"]["total_tokens"], 7);
        assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 2);
    }

    #[test]
    fn a_call_that_was_cut_is_not_told_as_whole() {
        let mut script = Script::begin(head(), None);
        let [id, name, arguments] = ["call_7", "f", "{\"a\": "].map(str::to_owned);
        script.hear(Event::ToolCall { index: 0, id, name, arguments });
        let timings = Timings::default();
        let usage = Usage { completion_tokens: 4, ..Usage::default() };
        assert!(script.hear(Event::Finished(Finished {
            reason: FinishReason::Length,
            stopped_by: None,
            usage,
            timings
        })));
        let events = script.take();
        assert!(events.iter().all(|event| event["type"] != "response.function_call_arguments.done"));
        let response = Script::last_response(&events).unwrap();
        assert_eq!(
            (&response["status"], &response["output"][0]["status"]),
            (&json!("incomplete"), &json!("incomplete"))
        );
        assert_eq!(response["output"][0]["arguments"], "{\"a\": ");
    }

    #[test]
    fn a_text_that_its_limit_has_cut_is_incomplete_and_the_reasoning_before_it_is_not() {
        let mut script = Script::begin(head(), None);
        script.hear(Event::Reasoning { text: "Hm.".to_owned() });
        script.hear(Event::Delta { text: "Wel".to_owned(), tokens: Vec::new() });
        let (usage, timings) = (Usage::default(), Timings::default());
        script.hear(Event::Finished(Finished { reason: FinishReason::Length, stopped_by: None, usage, timings }));
        let response = Script::last_response(&script.take()).unwrap();
        assert_eq!((&response["status"], &response["completed_at"]), (&json!("incomplete"), &Value::Null));
        let of = |at: usize| response["output"][at]["status"].as_str().unwrap();
        assert_eq!((of(0), of(1)), ("completed", "incomplete"));
    }

    #[test]
    fn an_answer_has_the_same_numbers_however_it_was_cut_and_goes_on_after_any_of_them() {
        let (reasoning, pieces) = (["th", "ink"], ["Grü", "ße", "!"]);
        let all = events(&reasoning, &pieces, None);
        assert!(all.windows(2).all(|pair| number(&pair[0]) < number(&pair[1])));
        let joined = events(&["think"], &["Grüße!"], None);
        assert_eq!(all.last().map(number), joined.last().map(number));
        for (heard, event) in all.iter().enumerate() {
            let rest = events(&["think"], &["Grüße!"], Some(number(event)));
            let said = text(&all[..=heard]) + &text(&rest);
            assert_eq!(said, "Grüße!", "after event {heard}");
            assert!(rest.iter().all(|later| number(later) > number(event)));
            assert_eq!(rest.is_empty(), heard + 1 == all.len());
        }
    }
}
