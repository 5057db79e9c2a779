//! How does an answer travel? From the engine's events to OpenAI's objects: one whole body, or pieces.
//!
//! Both hold the receiving end of the request's channel: when the client goes away and its door drops them, the engine
//! sees the closed channel and frees the sequence.

use crate::refusal::Refusal;
use serde_json::{Value, json};
use sparsed_engine::Service;
use sparsed_engine::api::{Event, Failure, FinishReason, Finished, Generate, Refused, Sink};
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

/// Events between engine and client; a client that reads slower than this pauses its sequence.
const CHANNEL: usize = 64;

/// How the two kinds of answers are written.
pub(crate) trait Wire: Send + 'static {
    /// The id's prefix.
    const ID_PREFIX: &'static str;
    /// `object` of a whole answer.
    const OBJECT: &'static str;
    /// `object` of a piece.
    const CHUNK_OBJECT: &'static str;
    /// The choice of a whole answer.
    fn choice(&self, answer: &Answer, finish_reason: &str) -> Value;
    /// The piece before any text, if the kind has one.
    fn opening(&self) -> Option<Value>;
    /// The choice of a piece, if the event is one for this kind.
    fn piece(&self, event: &Event) -> Option<Value>;
    /// The choice of the last piece.
    fn last(&self, finish_reason: &str) -> Value;
}

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Content.
    pub(crate) text: String,
    /// What the model thought before.
    pub(crate) reasoning: String,
    /// Name and arguments of each function called.
    pub(crate) calls: Vec<(String, String)>,
    /// The tokens, where the engine gives them out.
    pub(crate) tokens: Vec<u32>,
}

/// What a client wants back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    /// Pieces instead of one body.
    pub(crate) stream: bool,
    /// A last piece with the usage.
    pub(crate) include_usage: bool,
}

/// A request as a door has read it.
#[derive(Debug)]
pub(crate) struct Asked<W> {
    /// For the engine.
    pub(crate) request: Generate,
    /// What the client wants back.
    pub(crate) reply: Reply,
    /// How the answer is written.
    pub(crate) wire: W,
}

/// Who an answer says it is.
#[derive(Clone, Debug)]
struct Head {
    id: String,
    created: u64,
    model: String,
}

struct ChannelSink(mpsc::Sender<Event>);

impl Sink for ChannelSink {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        self.0.try_send(event).map_err(|error| match error {
            TrySendError::Full(event) => Refused::Full(event),
            TrySendError::Closed(_) => Refused::Closed,
        })
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// An answer on its way.
#[derive(Debug)]
pub(crate) struct Answering<W> {
    head: Head,
    wire: W,
    include_usage: bool,
    events: mpsc::Receiver<Event>,
    /// Written, not taken yet.
    ready: VecDeque<Piece>,
    has_ended: bool,
}

/// What a stream carries.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// OpenAI's chunk.
    Chunk(Value),
    /// There is no more of the answer; the last piece.
    Failed(Refusal),
}

#[cfg(test)]
impl<W: Wire> Answering<W> {
    /// An answer of which a test has the engine's end.
    pub(crate) fn of(wire: W) -> (Self, mpsc::Sender<Event>) {
        let (sender, events) = mpsc::channel(CHANNEL);
        let head = Head::new::<W>("test".to_owned());
        (Self { head, wire, include_usage: false, events, ready: VecDeque::new(), has_ended: false }, sender)
    }
}

impl<W: Wire> Answering<W> {
    /// Hands the request to the engine.
    ///
    /// # Errors
    /// The engine's, and that there is no room in its queue.
    pub(crate) async fn begin(service: &Service, asked: Asked<W>) -> Result<Self, Refusal> {
        let Asked { request, reply, wire } = asked;
        let head = Head::new::<W>(request.model.clone());
        let (sender, mut events) = mpsc::channel(CHANNEL);
        service.generate(request, Box::new(ChannelSink(sender)))?;
        // Whether the queue had room is known before the first byte of an answer is sent.
        match events.recv().await {
            Some(Event::Queued { .. }) => {}
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(_) => {
                return Err(Failure::BackendFailed { reason: "an answer began before its turn".to_owned() }.into());
            }
            None => return Err(Failure::CutOff.into()),
        }
        let include_usage = reply.include_usage;
        Ok(Self { head, wire, include_usage, events, ready: VecDeque::new(), has_ended: false })
    }

    /// The answer in one object.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn whole(mut self) -> Result<Value, Refusal> {
        let mut answer = Answer::default();
        loop {
            match self.events.recv().await {
                Some(Event::Finished(finished)) => return Ok(self.object(&answer, &finished)),
                Some(Event::Failed(failure)) => return Err(failure.into()),
                Some(event) => answer.hear(event),
                None => return Err(Failure::CutOff.into()),
            }
        }
    }

    /// Begins a stream of pieces: before any text comes the opening one, if the kind of answer has it.
    pub(crate) fn open(&mut self) {
        if let Some(choice) = self.wire.opening() {
            self.piece(&[choice], None);
        }
    }

    /// The next piece; nothing after the last.
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        while self.ready.is_empty() && !self.has_ended {
            let event = self.events.recv().await;
            self.write(event.unwrap_or(Event::Failed(Failure::CutOff)));
        }
        self.ready.pop_front()
    }

    fn write(&mut self, event: Event) {
        match event {
            Event::Queued { .. } | Event::Sampled { .. } => {}
            Event::Delta { .. } | Event::Reasoning { .. } | Event::ToolCall { .. } => {
                if let Some(choice) = self.wire.piece(&event) {
                    self.piece(&[choice], None);
                }
            }
            Event::Finished(finished) => {
                let choice = self.wire.last(finish_reason(finished.reason));
                self.piece(&[choice], Some(timings(&finished)));
                if self.include_usage {
                    let mut body = self.head.object(W::CHUNK_OBJECT, &[]);
                    body["usage"] = usage(&finished);
                    self.ready.push_back(Piece::Chunk(body));
                }
                self.has_ended = true;
            }
            Event::Failed(failure) => {
                self.ready.push_back(Piece::Failed(failure.into()));
                self.has_ended = true;
            }
        }
    }

    fn piece(&mut self, choices: &[Value], timings: Option<Value>) {
        let mut body = self.head.object(W::CHUNK_OBJECT, choices);
        if let Some(timings) = timings {
            body["timings"] = timings;
        }
        self.ready.push_back(Piece::Chunk(body));
    }

    fn object(&self, answer: &Answer, finished: &Finished) -> Value {
        let choice = self.wire.choice(answer, finish_reason(finished.reason));
        let mut body = self.head.object(W::OBJECT, &[choice]);
        body["usage"] = usage(finished);
        body["timings"] = timings(finished);
        body
    }
}

impl Answer {
    /// Takes a piece in; ends are not its business.
    pub(crate) fn hear(&mut self, event: Event) {
        match event {
            Event::Delta { text, tokens } => {
                self.text += &text;
                self.tokens.extend(tokens);
            }
            Event::Reasoning { text } => self.reasoning += &text,
            Event::ToolCall { name, arguments, .. } => self.calls.push((name, arguments)),
            Event::Queued { .. } | Event::Sampled { .. } | Event::Finished(_) | Event::Failed(_) => {}
        }
    }
}

/// Has the engine finish an answer that nobody hears.
///
/// # Errors
/// Why it could not be finished.
pub(crate) async fn finish(service: &Service, request: Generate) -> Result<(), Refusal> {
    let (sender, mut events) = mpsc::channel(CHANNEL);
    service.generate(request, Box::new(ChannelSink(sender)))?;
    loop {
        match events.recv().await {
            Some(Event::Finished(_)) => return Ok(()),
            Some(Event::Failed(failure)) => return Err(failure.into()),
            Some(_) => {}
            None => return Err(Failure::CutOff.into()),
        }
    }
}

impl Head {
    fn new<W: Wire>(model: String) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let id = format!("{}-{:016x}", W::ID_PREFIX, getrandom::u64().unwrap_or(created));
        Self { id, created, model }
    }

    fn object(&self, object: &str, choices: &[Value]) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }
}

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
    }
}

fn usage(finished: &Finished) -> Value {
    let usage = finished.usage;
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// As llama.cpp's server has them, and the time in the queue.
fn timings(finished: &Finished) -> Value {
    let (usage, timings) = (finished.usage, finished.timings);
    let rate = |n: u32, ms: f64| if ms > 0.0 { f64::from(n) * 1e3 / ms } else { 0.0 };
    let read = usage.prompt_tokens - usage.cached_tokens;
    let after_first = usage.completion_tokens.saturating_sub(1);
    json!({
        "queue_ms": timings.queue_ms,
        "cache_n": usage.cached_tokens,
        "prompt_n": read,
        "prompt_ms": timings.prompt_ms,
        "prompt_per_second": rate(read, timings.prompt_ms),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": timings.predicted_ms,
        "predicted_per_second": rate(after_first, timings.predicted_ms),
    })
}
