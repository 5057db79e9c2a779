//! How does an answer travel? From the engine's events to OpenAI's objects: one whole body, or pieces.

use super::figures::{self, Telling, timings, timings_so_far, usage};
use super::listen::{self, Listening};
use super::logprobs;
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Event, FinishReason, Finished, Likelihood, Progress, Request};
use sparsed_engine::{Service, ToolCall};
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

/// How the two kinds of answers are written.
pub(crate) trait Wire: Send + 'static {
    /// The id's prefix.
    const ID_PREFIX: &'static str;
    /// `object` of a whole answer.
    const OBJECT: &'static str;
    /// `object` of a piece.
    const CHUNK_OBJECT: &'static str;
    /// The choice of a whole answer, which is the `index`th.
    fn choice(&self, index: usize, answer: &Answer, finish_reason: &str) -> Value;
    /// The piece before any text of the `index`th answer, if the kind has one.
    fn opening(&self, index: usize) -> Option<Value>;
    /// The choice of a piece, if the event is one for this kind.
    fn piece(&self, event: &Event) -> Option<Value>;
    /// The choice of a piece that says nothing of the answer.
    fn silence(&self) -> Value;
    /// The choice of the last piece.
    fn last(&self, finish_reason: &str) -> Value;
    /// How likely tokens were that have `n_chars` characters of the answer before them.
    fn logprobs(&self, likelihoods: &[Likelihood], n_chars: usize) -> Value;
}

/// A whole answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Content.
    pub(crate) text: String,
    /// What the model thought before.
    pub(crate) reasoning: String,
    /// The functions called.
    pub(crate) calls: Vec<ToolCall>,
    /// The tokens, where the engine gives them out.
    pub(crate) tokens: Vec<u32>,
    /// How likely the tokens were, where that was asked for.
    pub(crate) likelihoods: Vec<Likelihood>,
}

/// What a client wants back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    /// Pieces instead of one body.
    pub(crate) stream: bool,
    /// A last piece with the usage.
    pub(crate) include_usage: bool,
    /// What else the pieces say.
    pub(crate) telling: Telling,
}

/// What goes with `stream`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl StreamOptions {
    /// What the client wants back.
    pub(crate) fn reply(options: Option<Self>, stream: Option<bool>, telling: Telling) -> Reply {
        let (stream, include_usage) = (stream.unwrap_or(false), options.unwrap_or_default().include_usage);
        Reply { stream, include_usage, telling: if stream { telling } else { Telling::default() } }
    }
}

/// A request as a door has read it.
#[derive(Debug)]
pub(crate) struct Asked<W> {
    /// For the engine.
    pub(crate) request: Request,
    /// Where several answers are wanted, the requests for the others: all to the first prompt, then all to the next.
    pub(crate) siblings: Vec<Request>,
    /// Answers to each prompt.
    pub(crate) per_prompt: usize,
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

/// An answer on its way, or several.
#[derive(Debug)]
pub(crate) struct Answering<W> {
    head: Head,
    wire: W,
    include_usage: bool,
    telling: Telling,
    listening: Listening,
    choices: Vec<Choice>,
    /// Answers to each prompt.
    per_prompt: usize,
    /// Written, not taken yet.
    ready: VecDeque<Piece>,
    has_ended: bool,
}

/// How far one of the answers has come.
#[derive(Debug, Default)]
struct Choice {
    /// Of tokens whose text was not sent yet.
    likelihoods: Vec<Likelihood>,
    /// Characters of the tokens before these.
    n_chars: usize,
    /// Times of the token whose text was not sent yet.
    timings: Option<Value>,
    finished: Option<Finished>,
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
    pub(crate) fn of(wire: W) -> (Self, tokio::sync::mpsc::Sender<(usize, Event)>) {
        Self::of_several(wire, 1, 1, false)
    }

    /// The same of `n` answers, so many of them to each prompt.
    pub(crate) fn of_several(
        wire: W,
        n: usize,
        per_prompt: usize,
        include_usage: bool,
    ) -> (Self, tokio::sync::mpsc::Sender<(usize, Event)>) {
        let (listening, engine) = Listening::of();
        let head = Head::new::<W>("test".to_owned());
        let choices = std::iter::repeat_with(Choice::default).take(n).collect();
        let (ready, telling) = (VecDeque::new(), Telling::default());
        (Self { head, wire, include_usage, telling, listening, choices, per_prompt, ready, has_ended: false }, engine)
    }
}

impl<W: Wire> Answering<W> {
    /// Hands the request to the engine.
    ///
    /// # Errors
    /// The engine's, and that there is no room in its queue.
    pub(crate) async fn begin(service: &Service, asked: Asked<W>) -> Result<Self, Refusal> {
        let Asked { request, siblings, per_prompt, reply, wire } = asked;
        let head = Head::new::<W>(request.model().to_owned());
        let choices = std::iter::repeat_with(Choice::default).take(1 + siblings.len()).collect();
        let requests = std::iter::once(request).chain(siblings);
        let listening = Listening::begin(service, &head.id, requests, per_prompt).await?;
        let (include_usage, telling, ready) = (reply.include_usage, reply.telling, VecDeque::new());
        Ok(Self { head, wire, include_usage, telling, listening, choices, per_prompt, ready, has_ended: false })
    }

    /// What the answer is called, in the log too.
    pub(crate) fn id(&self) -> &str {
        &self.head.id
    }

    /// The answer in one object.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) async fn whole(mut self) -> Result<Value, Refusal> {
        let mut answers: Vec<Answer> = std::iter::repeat_with(Answer::default).take(self.choices.len()).collect();
        loop {
            match self.listening.next().await {
                (_, Event::Failed(failure)) => return Err(failure.into()),
                (index, Event::Finished(finished)) => {
                    self.choices[index].finished = Some(finished);
                    if let Some(all) = self.all_finished() {
                        return Ok(self.object(&answers, &all));
                    }
                }
                (index, event) => answers[index].hear(event),
            }
        }
    }

    /// Begins a stream of pieces: before any text comes the opening one, if the kind of answer has it.
    pub(crate) fn open(&mut self) {
        for index in 0..self.choices.len() {
            if let Some(choice) = self.wire.opening(index) {
                self.piece(index, choice);
            }
        }
    }

    /// The next piece; nothing after the last.
    pub(crate) async fn next(&mut self) -> Option<Piece> {
        while self.ready.is_empty() && !self.has_ended {
            let (index, event) = self.listening.next().await;
            self.write(index, event);
        }
        self.ready.pop_front()
    }

    fn write(&mut self, index: usize, event: Event) {
        match event {
            Event::Queued { .. } | Event::Sampled { .. } => {}
            Event::Progress(progress) => self.progress(index, &progress),
            Event::Likelihood(likelihood) => self.choices[index].likelihoods.push(*likelihood),
            Event::Delta { .. } | Event::Reasoning { .. } | Event::ToolCall { .. } => {
                if let Some(choice) = self.wire.piece(&event) {
                    self.piece(index, choice);
                }
            }
            Event::Finished(finished) => {
                let choice = self.wire.last(finish_reason(finished.reason));
                self.choices[index].timings = Some(timings(&finished));
                self.piece(index, choice);
                self.choices[index].finished = Some(finished);
                let Some(all) = self.all_finished() else { return };
                if self.include_usage {
                    let mut body = self.head.object(W::CHUNK_OBJECT, &[]);
                    body["usage"] = usage(&all, self.per_prompt);
                    body["timings"] = all.first().map(timings).unwrap_or_default();
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

    /// Why the first answer ended and what all have used, once they are complete; of a whole body it stands in there.
    pub(crate) fn end(&self) -> Option<(&'static str, Value)> {
        let all = self.all_finished()?;
        Some((finish_reason(all.first()?.reason), usage(&all, self.per_prompt)))
    }

    /// How all answers ended, if they have.
    fn all_finished(&self) -> Option<Vec<Finished>> {
        self.choices.iter().map(|choice| choice.finished.clone()).collect()
    }

    /// How far the prompt is read is a piece by itself; of a token, its times go with its text.
    fn progress(&mut self, index: usize, progress: &Progress) {
        let of_prompt = figures::prompt_progress(progress);
        if self.telling.timings() {
            self.choices[index].timings = Some(timings_so_far(progress));
        }
        let Some(of_prompt) = of_prompt else { return };
        if self.telling.progress() {
            let choice = self.wire.silence();
            self.piece(index, choice);
            if let Some(Piece::Chunk(body)) = self.ready.back_mut() {
                body["prompt_progress"] = of_prompt;
            }
        }
    }

    fn piece(&mut self, index: usize, mut choice: Value) {
        choice["index"] = json!(index);
        let state = &mut self.choices[index];
        if !state.likelihoods.is_empty() {
            choice["logprobs"] = self.wire.logprobs(&state.likelihoods, state.n_chars);
            state.n_chars += state.likelihoods.drain(..).map(|one| logprobs::n_chars(&one)).sum::<usize>();
        }
        let timings = state.timings.take();
        let mut body = self.head.object(W::CHUNK_OBJECT, &[choice]);
        if let Some(timings) = timings {
            body["timings"] = timings;
        }
        self.ready.push_back(Piece::Chunk(body));
    }

    fn object(&self, answers: &[Answer], finished: &[Finished]) -> Value {
        let choices = answers.iter().zip(finished).enumerate().map(|(index, (answer, finished))| {
            let mut choice = self.wire.choice(index, answer, finish_reason(finished.reason));
            choice["index"] = json!(index);
            if !answer.likelihoods.is_empty() {
                choice["logprobs"] = self.wire.logprobs(&answer.likelihoods, 0);
            }
            choice
        });
        let mut body = self.head.object(W::OBJECT, &choices.collect::<Vec<_>>());
        body["usage"] = usage(finished, self.per_prompt);
        body["timings"] = finished.first().map(timings).unwrap_or_default();
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
            Event::ToolCall { id, name, arguments, .. } => self.calls.push(ToolCall { id, name, arguments }),
            Event::Likelihood(likelihood) => self.likelihoods.push(*likelihood),
            Event::Queued { .. }
            | Event::Sampled { .. }
            | Event::Progress(_)
            | Event::Finished(_)
            | Event::Failed(_) => {}
        }
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Head {
    fn new<W: Wire>(model: String) -> Self {
        Self { id: listen::name(W::ID_PREFIX), created: now(), model }
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
