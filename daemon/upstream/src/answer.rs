//! What does the other engine say? Chunks of OpenAI's streams become the events that every request hears.

use crate::logprobs::Logprobs;
use crate::trouble::{Trouble, clean};
use serde::Deserialize;
use serde_json::Value;
use sparsed_engine::api::{Event, FinishReason, Progress, Timings, Usage};

/// Most functions that an answer may call.
const CALLS_MAX: usize = 128;
/// Longest name of a call that is kept.
const CALL_ID_BYTES_MAX: usize = 128;

/// An answer, as far as it has come.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Alternatives to a token that were asked for; `None`: nothing is said of how likely tokens were.
    logprobs: Option<u32>,
    /// Calls after the first are not told: some engines make them whatever they are told.
    one_call: bool,
    /// How far the request is is told where the engine says it.
    progress: bool,
    /// Our own key, which no message repeats.
    key: Option<String>,
    calls: Vec<Call>,
    /// Calls that were told already.
    n_told: usize,
    reason: Option<FinishReason>,
    usage: Usage,
    is_over: bool,
}

/// A call whose arguments come in pieces.
#[derive(Debug, Default)]
struct Call {
    /// What the other engine numbers it with.
    number: u64,
    /// Its own name of the call, by which it knows the result; empty where it gives none.
    id: String,
    name: String,
    arguments: String,
}

#[derive(Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Counts>,
    /// llama.cpp's and ours. Looked into where somebody wants to hear of it, so that what another engine means by it
    /// spoils no answer.
    prompt_progress: Option<Value>,
    timings: Option<Value>,
    error: Option<Value>,
    /// `error` where the whole event is one, as older vLLM and what is in front of some engines have it.
    object: Option<String>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    delta: Option<Delta>,
    /// Of a completion.
    text: Option<String>,
    finish_reason: Option<String>,
    logprobs: Option<Logprobs>,
}

/// Some engines send both names of the reasoning, so they are no aliases.
#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Option<Vec<CallPiece>>,
}

#[derive(Deserialize)]
struct CallPiece {
    index: Option<u64>,
    id: Option<String>,
    function: Option<FunctionPiece>,
}

#[derive(Deserialize)]
struct FunctionPiece {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Deserialize)]
struct Counts {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<Details>,
    completion_tokens_details: Option<AnswerDetails>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct AnswerDetails {
    reasoning_tokens: Option<u32>,
}

impl Answer {
    pub(crate) fn new(logprobs: Option<u32>, one_call: bool, key: Option<&str>) -> Self {
        let (calls, usage, key) = (Vec::new(), Usage::default(), key.map(str::to_owned));
        Self { logprobs, one_call, progress: false, key, calls, n_told: 0, reason: None, usage, is_over: false }
    }

    /// The same, which tells how far the request is if that is wanted; times are for who knows a clock.
    pub(crate) fn telling_progress(self, progress: bool) -> Self {
        Self { progress, ..self }
    }

    /// Takes the data of an event in; what it says goes to `tell`.
    ///
    /// # Errors
    /// An error that it carries; what is no chunk.
    pub(crate) fn read(&mut self, data: &[u8], mut tell: impl FnMut(Event)) -> Result<(), Trouble> {
        let data = data.trim_ascii();
        if self.is_over || data.is_empty() {
            return Ok(());
        }
        if data == b"[DONE]" {
            self.is_over = true;
            return Ok(());
        }
        let mut chunk: Chunk = serde_json::from_slice(data)
            .map_err(|error| Trouble::Broken(format!("it sent an event that is no chunk of an answer: {error}")))?;
        let whole = || serde_json::from_slice::<Value>(data).unwrap_or_default();
        let is_error = chunk.object.as_deref() == Some("error");
        let error = chunk.error.take().filter(|error| !error.is_null()).or_else(|| is_error.then(whole));
        if let Some(error) = error {
            return Err(Trouble::of_error(None, None, &error, self.key.as_deref()));
        }
        let usage = chunk.usage.take().map(Counts::usage);
        if self.progress {
            chunk.progress(usage).into_iter().for_each(|progress| tell(Event::Progress(progress)));
        }
        if let Some(usage) = usage {
            self.usage = usage;
        }
        for choice in chunk.choices.into_iter().flatten().filter(|choice| choice.index == 0) {
            self.hear(choice, &mut tell)?;
        }
        Ok(())
    }

    /// Whether the stream has said that there is no more.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// How the answer ended, once its stream has.
    ///
    /// # Errors
    /// It was cut.
    pub(crate) fn end(&self) -> Result<(FinishReason, Usage), Trouble> {
        let reason = self.reason.ok_or_else(|| Trouble::Broken("its answer broke off in the middle".to_owned()))?;
        Ok((reason, self.usage))
    }

    fn hear(&mut self, choice: Choice, tell: &mut impl FnMut(Event)) -> Result<(), Trouble> {
        if let (Some(n), Some(logprobs)) = (self.logprobs, choice.logprobs) {
            let likelihoods = logprobs.likelihoods(n as usize);
            likelihoods.into_iter().for_each(|one| tell(Event::Likelihood(Box::new(one))));
        }
        let mut text = choice.text;
        if let Some(delta) = choice.delta {
            let reasoning = delta.reasoning_content.filter(|text| !text.is_empty()).or(delta.reasoning);
            if let Some(text) = reasoning.filter(|text| !text.is_empty()) {
                tell(Event::Reasoning { text });
            }
            text = text.or(delta.content);
            for piece in delta.tool_calls.unwrap_or_default() {
                self.call(piece, tell)?;
            }
        }
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            tell(Event::Delta { text, tokens: Vec::new() });
        }
        // Not over yet is null, and with some an empty text.
        match choice.finish_reason.filter(|reason| !reason.is_empty()) {
            Some(reason) => self.finish(&reason, tell),
            None => Ok(()),
        }
    }

    /// A piece of a call; with the next call's first one it is whole.
    fn call(&mut self, piece: CallPiece, tell: &mut impl FnMut(Event)) -> Result<(), Trouble> {
        let function = piece.function.unwrap_or(FunctionPiece { name: None, arguments: None });
        let number = piece.index.unwrap_or(0);
        let goes_on = self.calls.last().is_some_and(|call| call.number == number);
        if !goes_on && self.one_call && !self.calls.is_empty() {
            return Ok(());
        }
        if !goes_on {
            self.tell_calls(tell)?;
            if self.calls.iter().any(|call| call.number == number) {
                return Err(Trouble::Broken("it went back to a call that was complete".to_owned()));
            }
            if self.calls.len() == CALLS_MAX {
                return Err(Trouble::Broken(format!("it called more than {CALLS_MAX} functions")));
            }
            self.calls.push(Call { number, ..Call::default() });
        }
        if let Some(call) = self.calls.last_mut() {
            // Some engines repeat these with each piece.
            if call.id.is_empty() {
                call.id = piece.id.unwrap_or_default();
            }
            if call.name.is_empty() {
                call.name = function.name.unwrap_or_default();
            }
            call.arguments += &function.arguments.unwrap_or_default();
        }
        Ok(())
    }

    /// Tells the calls that were not told yet.
    fn tell_calls(&mut self, tell: &mut impl FnMut(Event)) -> Result<(), Trouble> {
        for (index, call) in (0u32..).zip(&mut self.calls).skip(self.n_told) {
            let (name, mut arguments) = (call.name.clone(), std::mem::take(&mut call.arguments));
            if arguments.trim().is_empty() {
                "{}".clone_into(&mut arguments);
            }
            if serde_json::from_str::<serde_json::Map<String, Value>>(&arguments).is_err() {
                let name = clean(&name, None);
                return Err(Trouble::Failed(format!("it called '{name}' with arguments that are no JSON object")));
            }
            let id = call.told_id();
            tell(Event::ToolCall { index, id, name, arguments });
        }
        self.n_told = self.calls.len();
        Ok(())
    }

    /// The limit of tokens has cut the answer: of the call that was on its way, what is there is told once its function
    /// is known.
    fn tell_cut_call(&mut self, tell: &mut impl FnMut(Event)) {
        let index = self.calls.len().saturating_sub(1);
        if index < self.n_told {
            return;
        }
        let Some(call) = self.calls.last_mut().filter(|call| !call.name.is_empty()) else { return };
        let (name, arguments) = (call.name.clone(), std::mem::take(&mut call.arguments));
        let id = call.told_id();
        tell(Event::ToolCall { index: u32::try_from(index).unwrap_or(u32::MAX), id, name, arguments });
        self.n_told = self.calls.len();
    }

    fn finish(&mut self, reason: &str, tell: &mut impl FnMut(Event)) -> Result<(), Trouble> {
        let reason = match reason {
            "stop" => FinishReason::Stop,
            "length" => FinishReason::Length,
            "tool_calls" | "function_call" => FinishReason::ToolCalls,
            other => return Err(Trouble::Failed(format!("it ended the answer with '{}'", clean(other, None)))),
        };
        if reason == FinishReason::Length {
            self.tell_cut_call(tell);
        } else {
            self.tell_calls(tell)?;
        }
        // Where a certain function had to be called, some engines say `stop`.
        let called = reason == FinishReason::Stop && !self.calls.is_empty();
        self.reason = Some(if called { FinishReason::ToolCalls } else { reason });
        Ok(())
    }
}

impl Chunk {
    /// How far the request is, if this piece says it; `usage` is its counts in OpenAI's form.
    fn progress(&self, usage: Option<Usage>) -> Option<Progress> {
        let count = |value: &Value, name: &str| value[name].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let told = |read_tokens: u32, usage: Usage| Some(Progress { read_tokens, usage, timings: Timings::default() });
        if let Some(prompt) = self.prompt_progress.as_ref().filter(|prompt| prompt.is_object()) {
            let prompt_tokens = count(prompt, "total");
            let cached_tokens = count(prompt, "cache").min(prompt_tokens);
            let usage = Usage { prompt_tokens, cached_tokens, ..Usage::default() };
            return told(count(prompt, "processed").min(prompt_tokens), usage);
        }
        if let Some(timings) = self.timings.as_ref().filter(|timings| timings.is_object()) {
            let cached_tokens = count(timings, "cache_n");
            let prompt_tokens = count(timings, "prompt_n").saturating_add(cached_tokens);
            let completion_tokens = count(timings, "predicted_n");
            return told(prompt_tokens, Usage { prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: 0 });
        }
        // The counts after the last piece are not of one that is under way.
        let has_choice = self.choices.as_ref().is_some_and(|choices| !choices.is_empty());
        usage.filter(|_| has_choice).and_then(|usage| told(usage.prompt_tokens, usage))
    }
}

impl Call {
    /// The other engine's name of the call, or one of ours where that is nothing to be sent on.
    fn told_id(&mut self) -> String {
        let id = Some(std::mem::take(&mut self.id)).filter(|id| is_id(id));
        id.unwrap_or_else(|| format!("call_{:016x}", fastrand::u64(..)))
    }
}

/// Whether it names a call, or is nothing to be sent on.
fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= CALL_ID_BYTES_MAX && id.bytes().all(|byte| byte.is_ascii_graphic())
}

impl Counts {
    fn usage(self) -> Usage {
        let prompt_tokens = self.prompt_tokens.unwrap_or(0);
        let cached = self.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0);
        let completion_tokens = self.completion_tokens.unwrap_or(0);
        let reasoning = self.completion_tokens_details.and_then(|details| details.reasoning_tokens).unwrap_or(0);
        Usage {
            prompt_tokens,
            // More than the whole prompt would be nonsense, and is reckoned with.
            cached_tokens: cached.min(prompt_tokens),
            completion_tokens,
            reasoning_tokens: reasoning.min(completion_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;

    type Heard = (Vec<Event>, Result<(FinishReason, Usage), Trouble>);

    fn heard(chunks: &[&str]) -> Heard {
        let (mut answer, mut events) = (Answer::new(Some(1), false, None), Vec::new());
        for chunk in chunks {
            if let Err(trouble) = answer.read(chunk.as_bytes(), |event| events.push(event)) {
                return (events, Err(trouble));
            }
        }
        let end = answer.end();
        (events, end)
    }

    fn delta(text: &str) -> Event {
        Event::Delta { text: text.to_owned(), tokens: Vec::new() }
    }

    #[test]
    fn a_chat_becomes_reasoning_text_and_an_end() {
        let (events, end) = heard(&[
            r#"{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}"#,
            r#"{"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "reasoning": "hm"}}]}"#,
            r#"{"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": -1.0}]}}]}"#,
            r#"{"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 9}, "completion_tokens_details": {"reasoning_tokens": 2}}}"#,
            "[DONE]",
            r#"{"choices": [{"index": 0, "delta": {"content": "after the end"}}]}"#,
        ]);
        assert_eq!(events[0], Event::Reasoning { text: "hm".to_owned() });
        assert!(matches!(&events[1], Event::Likelihood(one) if one.chosen.bytes == b"a"));
        assert_eq!(events[2..], [delta("a"), delta("b")]);
        let usage = Usage { prompt_tokens: 5, cached_tokens: 5, completion_tokens: 3, reasoning_tokens: 2 };
        assert_eq!(end, Ok((FinishReason::Stop, usage)));
    }

    #[test]
    fn a_call_keeps_the_name_that_the_other_engine_gave_it_and_has_one_in_any_case() {
        let long = "x".repeat(CALL_ID_BYTES_MAX + 1);
        for (id, kept) in [("chatcmpl-tool-7", true), ("", false), ("a\u{7}b", false), (&long, false)] {
            let piece = serde_json::json!({ "index": 0, "id": id, "function": { "name": "f", "arguments": "{}" } });
            let choice = serde_json::json!({ "delta": { "tool_calls": [piece] }, "finish_reason": "tool_calls" });
            let (events, _) = heard(&[&serde_json::json!({ "choices": [choice] }).to_string()]);
            let [Event::ToolCall { id: told, .. }] = &events[..] else { panic!("{events:?}") };
            assert_eq!(told == id, kept, "{id:?} became {told:?}");
            assert!(is_id(told), "{told:?}");
        }
    }

    #[test]
    fn calls_are_told_when_they_are_whole() {
        let piece = |number: u32, function: &str| {
            format!(
                r#"{{"choices": [{{"delta": {{"tool_calls": [{{"index": {number}, "function": {function}}}]}}}}]}}"#
            )
        };
        let call = |index, name: &str, arguments: &str| (index, name.to_owned(), arguments.to_owned());
        let calls = |events: &[Event]| {
            let told = |event: &Event| match event {
                Event::ToolCall { index, name, arguments, .. } => (*index, name.clone(), arguments.clone()),
                other => panic!("{other:?}"),
            };
            events.iter().map(told).collect::<Vec<_>>()
        };
        let chunks = [
            piece(0, r#"{"name": "f", "arguments": ""}"#),
            piece(0, r#"{"name": "f", "arguments": "{\"a\":"}"#),
            piece(0, r#"{"arguments": " 1}"}"#),
            piece(1, r#"{"name": "g"}"#),
        ];
        let finish = |reason: &str| format!(r#"{{"choices": [{{"delta": {{}}, "finish_reason": "{reason}"}}]}}"#);
        let all = |reason: &str| {
            let finish = finish(reason);
            heard(&chunks.iter().chain([&finish]).map(String::as_str).collect::<Vec<_>>())
        };
        let (events, end) = all("stop");
        assert_eq!(calls(&events), [call(0, "f", r#"{"a": 1}"#), call(1, "g", "{}")]);
        assert_eq!(end.unwrap().0, FinishReason::ToolCalls);
        let cut = [call(0, "f", r#"{"a": 1}"#), call(1, "g", "")];
        assert_eq!(calls(&all("length").0), cut, "the last one was cut");
        let broken = [piece(0, r#"{"name": "f", "arguments": "[1]"}"#), finish("tool_calls")];
        let (_, end) = heard(&broken.each_ref().map(String::as_str));
        assert!(matches!(end, Err(Trouble::Failed(said)) if said.contains("'f'")));
        let many: Vec<String> = (0..129).map(|n| piece(n, r#"{"name": "f"}"#)).collect();
        let (_, end) = heard(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(matches!(end, Err(Trouble::Broken(said)) if said.contains("128 functions")));
    }

    /// As vLLM 0.32 sent them, asked to count as it goes.
    #[test]
    fn a_stream_that_vllm_sent_is_understood() {
        let counts = |n: u32| {
            format!(r#""usage": {{"prompt_tokens": 37, "total_tokens": {}, "completion_tokens": {n}}}"#, 37 + n)
        };
        let piece = |delta: &str, reason: &str, n: u32| {
            let choice = format!(r#"{{"index": 0, "delta": {delta}, "logprobs": null, "finish_reason": {reason}}}"#);
            let more = r#""prompt_token_ids": null, "prompt_text": null"#;
            format!(r#"{{"id": "chatcmpl-1", "model": "smol", "choices": [{choice}], {}, {more}}}"#, counts(n))
        };
        let chunks = [
            piece(r#"{"role": "assistant", "content": ""}"#, "null", 0),
            piece(r#"{"content": "Paris"}"#, "null", 1),
            piece(r#"{"content": ""}"#, r#""stop""#, 2),
            format!(r#"{{"id": "chatcmpl-1", "choices": [], {}}}"#, counts(2)),
            "[DONE]".to_owned(),
        ];
        let (mut answer, mut events) = (Answer::new(None, false, None).telling_progress(true), Vec::new());
        for chunk in &chunks {
            answer.read(chunk.as_bytes(), |event| events.push(event)).unwrap();
        }
        let told = |event: &Event| match event {
            Event::Progress(progress) => Some((progress.read_tokens, progress.usage.completion_tokens)),
            _ => None,
        };
        assert_eq!(events.iter().filter_map(told).collect::<Vec<_>>(), [(37, 0), (37, 1), (37, 2)]);
        assert_eq!(events.iter().filter(|event| told(event).is_none()).collect::<Vec<_>>(), [&delta("Paris")]);
        assert!(answer.is_over());
        let usage = Usage { prompt_tokens: 37, completion_tokens: 2, ..Usage::default() };
        assert_eq!(answer.end(), Ok((FinishReason::Stop, usage)));
    }

    /// As the sources of vLLM and SGLang write them, without names and dates: counts beside every piece, ids once,
    /// members that are null, matched stops.
    #[test]
    fn streams_of_known_engines_are_understood() {
        let piece = |delta: &str, more: &str| {
            format!(r#"{{"id": "1", "choices": [{{"index": 0, "delta": {delta}, "logprobs": null, {more}}}]}}"#)
        };
        let goes_on = r#""finish_reason": null"#;
        let call = |function: &str| piece(&format!(r#"{{"tool_calls": [{{{function}}}]}}"#), goes_on);
        let vllm = [
            r#"{"choices": [{"index": 0, "delta": {"role": "assistant", "content": "", "reasoning_content": null}}],
                "prompt_token_ids": null, "usage": {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}}"#
                .to_owned(),
            piece(r#"{"reasoning": "hm", "reasoning_content": "hm"}"#, r#""finish_reason": null, "token_ids": null"#),
            call(r#""id": "chatcmpl-tool-1", "type": "function", "index": 0, "function": {"name": "f"}"#),
            call(r#""index": 0, "function": {"arguments": "{\"a\": "}"#),
            call(r#""index": 0, "function": {"arguments": "1}"}"#),
            piece(r#"{"content": ""}"#, r#""finish_reason": "tool_calls", "stop_reason": null"#),
            r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 12, "prompt_tokens_details": null}}"#
                .to_owned(),
            "[DONE]".to_owned(),
        ];
        let (events, end) = heard(&vllm.each_ref().map(String::as_str));
        let [Event::Reasoning { text }, Event::ToolCall { id, arguments, .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert_eq!((text.as_str(), id.as_str(), arguments.as_str()), ("hm", "chatcmpl-tool-1", r#"{"a": 1}"#));
        let usage = Usage { prompt_tokens: 9, completion_tokens: 12, ..Usage::default() };
        assert_eq!(end, Ok((FinishReason::ToolCalls, usage)));
        let delta_of = |content: &str| {
            format!(r#"{{"role": null, "content": {content}, "reasoning_content": null, "tool_calls": null}}"#)
        };
        let sglang = [
            piece(&delta_of(r#""""#), r#""finish_reason": null, "matched_stop": null"#),
            piece(&delta_of(r#""Hi""#), r#""finish_reason": null, "matched_stop": null"#),
            piece(&delta_of("null"), r#""finish_reason": "stop", "matched_stop": 151645"#),
            r#"{"choices": [], "usage": {"prompt_tokens": 4, "total_tokens": 6, "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 1}, "reasoning_tokens": 0}}"#
                .to_owned(),
            "[DONE]".to_owned(),
        ];
        let (events, end) = heard(&sglang.each_ref().map(String::as_str));
        let usage = Usage { prompt_tokens: 4, cached_tokens: 1, completion_tokens: 2, ..Usage::default() };
        assert_eq!((events, end), (vec![delta("Hi")], Ok((FinishReason::Stop, usage))));
    }

    /// As llama-server, sparsed, vLLM and SGLang count, and as nobody should.
    #[test]
    fn how_far_a_request_is_is_told_as_far_as_the_engine_says_it() {
        let counted = |chunk: &str| {
            let (mut answer, mut told) = (Answer::new(None, false, None).telling_progress(true), Vec::new());
            answer.read(chunk.as_bytes(), |event| told.push(event)).unwrap();
            let Some(Event::Progress(Progress { read_tokens, usage, .. })) = told.first() else { return None };
            Some((*read_tokens, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens))
        };
        let piece = |more: &str| format!(r#"{{"choices": [{{"index": 0, "delta": {{"content": "a"}}}}], {more}}}"#);
        let read =
            r#""prompt_progress": {"total": 9, "cache": 2, "processed": 6, "time_ms": 3}, "timings": {"prompt_n": 4}"#;
        assert_eq!(counted(&piece(read)), Some((6, 9, 2, 0)));
        let timed = r#""timings": {"cache_n": 2, "prompt_n": 7, "prompt_ms": 1.5, "predicted_n": 3}"#;
        assert_eq!(counted(&piece(timed)), Some((9, 9, 2, 3)));
        let usage = r#""usage": {"prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3}"#;
        assert_eq!(counted(&piece(usage)), Some((9, 9, 0, 3)));
        assert_eq!(counted(&format!(r#"{{"choices": [], {usage}}}"#)), None, "the answer is over");
        for odd in [r#""timings": [], "prompt_progress": 1"#, r#""timings": null"#] {
            assert_eq!(counted(&piece(odd)), None, "{odd}");
        }
        assert_eq!(counted(&piece(r#""timings": {"prompt_n": -1, "cache_n": 1e99}"#)), Some((0, 0, 0, 0)));
        let (events, _) = heard(&[&piece(read)]);
        assert_eq!(events, [delta("a")], "nobody asked");
    }

    #[test]
    fn of_several_calls_the_first_is_told_where_one_is_wanted() {
        let piece = |n: u32| {
            let function = serde_json::json!({ "name": format!("f{n}"), "arguments": "{}" });
            let call = serde_json::json!({ "index": n, "function": function });
            serde_json::json!({ "choices": [{ "delta": { "tool_calls": [call] } }] }).to_string()
        };
        let finish = r#"{"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}"#.to_owned();
        let (mut answer, mut events) = (Answer::new(None, true, None), Vec::new());
        for chunk in [piece(0), piece(1), finish] {
            answer.read(chunk.as_bytes(), |event| events.push(event)).unwrap();
        }
        assert!(matches!(&events[..], [Event::ToolCall { name, .. }] if name == "f0"), "{events:?}");
        assert_eq!(answer.end().unwrap().0, FinishReason::ToolCalls);
    }

    #[test]
    fn a_completion_is_text() {
        let (events, end) = heard(&[
            r#"{"choices": [{"index": 1, "text": "of another"}, {"index": 0, "text": "a"}]}"#,
            r#"{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}"#,
        ]);
        assert_eq!((events, end.unwrap().0), (vec![delta("a")], FinishReason::Length));
    }

    #[test]
    fn what_is_no_answer_or_no_whole_one_is_told() {
        let cut = heard(&[r#"{"choices": [{"index": 0, "delta": {"content": "a"}}]}"#, "[DONE]"]).1;
        assert!(matches!(cut, Err(Trouble::Broken(said)) if said.contains("broke off")));
        assert!(matches!(heard(&["garbage"]).1, Err(Trouble::Broken(_))));
        let filtered = heard(&[r#"{"choices": [{"delta": {}, "finish_reason": "content_filter"}]}"#]).1;
        assert!(matches!(filtered, Err(Trouble::Failed(said)) if said.contains("content_filter")));
        // vLLM's and SGLang's, an older vLLM's, and what others have.
        for error in [
            r#"{"error": {"message": "out of memory", "code": 500}}"#,
            r#"{"object": "error", "message": "out of memory", "type": "InternalServerError", "code": 500}"#,
            r#"{"error": "out of memory"}"#,
            // SGLang's aborts.
            r#"{"error": {"object": "error", "message": "out of memory", "type": "INTERNAL_SERVER_ERROR", "param": null, "code": 500}}"#,
        ] {
            let end = heard(&[r#"{"choices": [{"delta": {"content": "a"}, "finish_reason": ""}]}"#, error]).1;
            assert_eq!(end, Err(Trouble::Failed("status 500: out of memory".to_owned())), "{error}");
        }
    }

    /// Bytes that are changed, doubled, dropped or cut somewhere: the stream has an end, and its counts make sense.
    #[test]
    fn a_stream_that_is_damaged_anywhere_is_read_or_refused() {
        let stream = concat!(
            ": ping\n\ndata: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \"\u{e9}\", \"reasoning\": \"r\"}}]}\n\n",
            "data: {\"choices\": [{\"delta\": {\"tool_calls\": [{\"index\": 0, \"function\": {\"name\": \"f\", \"arguments\": \"{}\"}}]},",
            " \"logprobs\": {\"content\": [{\"token\": \"a\", \"logprob\": -1, \"bytes\": [97], \"top_logprobs\": []}]}}]}\r\n\r\n",
            "data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"tool_calls\"}]}\n\n",
            "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 5, \"prompt_tokens_details\": {\"cached_tokens\": 4}}}\n\n",
            "data: [DONE]\n\n",
        );
        let mut random = fastrand::Rng::with_seed(11);
        let (mut n_whole, mut n_refused) = (0, 0);
        for _ in 0..4000 {
            let mut bytes = stream.as_bytes().to_vec();
            for _ in 0..random.usize(0..4) {
                let at = random.usize(0..bytes.len());
                match random.u8(0..4) {
                    0 => bytes[at] = random.u8(..),
                    1 => bytes.insert(at, bytes[at]),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            let (mut events, mut answer) = (Events::default(), Answer::new(Some(5), false, Some("key")));
            match events.push(&bytes, |data| answer.read(data, |_| ())).and_then(|()| answer.end()) {
                Ok((_, usage)) => {
                    assert!(usage.cached_tokens <= usage.prompt_tokens);
                    n_whole += 1;
                }
                Err(_) => n_refused += 1,
            }
        }
        assert!(n_whole > 500 && n_refused > 500, "{n_whole} whole, {n_refused} refused");
    }
}
