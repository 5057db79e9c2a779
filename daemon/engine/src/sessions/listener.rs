//! What does one answer's client still have to hear, and what has the answer become so far?

use super::keeper::Before;
use super::recorded::Flow;
use super::wishes::AnswerParts;
use crate::api::{Event, Failure, Refused, Sink};
use sparsed_session::Outcome;
use std::collections::VecDeque;
use std::sync::Arc;

/// The client's end of an answer's way.
pub(super) struct Listener {
    sink: Box<dyn Sink>,
    flow: Arc<Flow>,
    /// Passed on once the journal has what they come from.
    events: VecDeque<Event>,
    parts: AnswerParts,
    /// Tokens that were journaled.
    pub(super) n_tokens: u32,
    end: Option<End>,
}

/// What the journal says of a turn that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// That it ended so, with what it has said.
    Of(Outcome),
    /// That nobody goes on with it unless its client asks, and this is what it had said before.
    As(Vec<u8>),
    /// Nothing: there was no answer, and its client was told why.
    TakenBack,
}

/// What the last event was.
#[derive(Clone, Copy, Debug)]
enum End {
    Finished,
    Cut,
    /// At another time it may be answered.
    Refused,
    /// It would fail again.
    Failed,
}

impl Ending {
    /// Of an answer without a new token: what was there before stays. Of a `resumed` one not all was sent again before
    /// its first new token.
    pub(super) fn unheard(resumed: Option<&Before>) -> Self {
        match resumed {
            Some(before) if !before.is_cancelled => Self::Of(Outcome::Interrupted),
            _ => Self::failed(resumed),
        }
    }

    /// Of an answer without a new token that would fail again: what a `resumed` one had said before stays, whatever of
    /// it was sent again, and the next turn is not held up by it.
    fn failed(resumed: Option<&Before>) -> Self {
        resumed.map_or(Self::TakenBack, |before| Self::As(before.said.clone()))
    }
}

impl Listener {
    pub(super) fn new(sink: Box<dyn Sink>, flow: Arc<Flow>) -> Self {
        Self { sink, flow, events: VecDeque::new(), parts: AnswerParts::default(), n_tokens: 0, end: None }
    }

    /// Takes an event to be passed on.
    pub(super) fn hear(&mut self, event: Event) {
        self.parts.hear(&event);
        match &event {
            Event::Finished(_) => self.end = Some(End::Finished),
            // The next daemon goes on with it.
            Event::Failed(Failure::ShuttingDown) => self.end = Some(End::Cut),
            // They may fail this answer again: its client may try, the next turn does not wait for it.
            Event::Failed(Failure::BackendFailed { .. } | Failure::DiskFailed { .. }) => self.end = Some(End::Failed),
            Event::Failed(failure) if failure.may_pass() => self.end = Some(End::Refused),
            Event::Failed(_) => self.end = Some(End::Failed),
            Event::Delta { .. } | Event::Reasoning { .. } | Event::ToolCall { .. } => {}
            Event::Queued { .. } | Event::Sampled { .. } | Event::Progress(_) | Event::Likelihood(_) => {}
        }
        self.events.push_back(event);
    }

    /// A token was journaled; the client hears only what it makes.
    pub(super) fn journaled(&mut self) {
        self.n_tokens += 1;
        self.flow.passed();
    }

    /// How the turn ends, if the last event was there.
    pub(super) fn ending(&self, resumed: Option<&Before>) -> Option<Ending> {
        Some(match self.end? {
            End::Finished => Ending::Of(Outcome::Complete),
            End::Refused if self.n_tokens == 0 => Ending::unheard(resumed),
            End::Failed if self.n_tokens == 0 => Ending::failed(resumed),
            // What was said stays, and the next turn is not held up by an answer that would fail again.
            End::Refused | End::Failed => Ending::Of(Outcome::Cancelled),
            End::Cut => Ending::Of(Outcome::Interrupted),
        })
    }

    /// The answer so far, as a message.
    pub(super) fn answer(&self) -> Vec<u8> {
        self.parts.encode()
    }

    /// Passes on what may be heard. Answers whether all of it is gone.
    pub(super) fn deliver(&mut self) -> bool {
        while let Some(event) = self.events.pop_front() {
            match self.sink.offer(event) {
                Ok(()) => self.flow.passed(),
                Err(Refused::Full(event) | Refused::Behind(event)) => {
                    self.events.push_front(event);
                    self.flow.unread();
                    return false;
                }
                Err(Refused::Closed) => self.close(),
            }
        }
        true
    }

    /// Tells the engine if the client is gone.
    pub(super) fn look(&mut self) {
        if self.sink.is_closed() {
            self.close();
        }
    }

    /// What was to be heard is replaced by `failure`: its tokens could not be journaled.
    pub(super) fn fail(&mut self, failure: Failure) {
        self.close();
        self.events.push_back(Event::Failed(failure));
    }

    fn close(&mut self) {
        self.flow.close();
        self.events.clear();
    }
}
