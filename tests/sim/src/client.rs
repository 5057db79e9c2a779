//! What does one request's client hear, and may it?

use sparsed_engine::api::{Event, Failure, Refused, Sink};
use std::sync::{Arc, Mutex, MutexGuard};

/// A client's end of a stream: it closes with the daemon's.
#[derive(Debug)]
pub(crate) struct Ear(Client);

impl Drop for Ear {
    fn drop(&mut self) {
        let state = &mut *self.0.state();
        if !state.is_gone {
            state.end.get_or_insert(End::CutOff);
        }
    }
}

/// How a stream has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The answer is whole.
    Finished,
    /// There is no more of it.
    Failed(Failure),
    /// It was closed.
    CutOff,
}

/// A client, as it is and as the daemon knows it.
#[derive(Clone, Debug)]
pub(crate) struct Client(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// What a model says that has the device to itself.
    expected: Arc<[u32]>,
    n_heard: usize,
    end: Option<End>,
    /// Events that it takes before it must be read again.
    room: usize,
    /// Whether it was ever too slow.
    was_full: bool,
    is_gone: bool,
    violation: Option<String>,
}

impl Client {
    pub(crate) fn new(expected: Arc<[u32]>, room: usize) -> Self {
        let (end, violation) = (None, None);
        let state = State { expected, n_heard: 0, end, room, was_full: false, is_gone: false, violation };
        Self(Arc::new(Mutex::new(state)))
    }

    /// What the daemon speaks to.
    pub(crate) fn ear(&self) -> Box<Ear> {
        Box::new(Ear(self.clone()))
    }

    /// Whether it was ever too slow to read.
    pub(crate) fn was_full(&self) -> bool {
        self.state().was_full
    }

    /// Takes so many events more.
    pub(crate) fn read(&self, room: usize) {
        self.state().room = room;
    }

    pub(crate) fn leave(&self) {
        self.state().is_gone = true;
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.state().is_gone
    }

    /// Tokens of the answer so far.
    pub(crate) fn n_heard(&self) -> usize {
        self.state().n_heard
    }

    pub(crate) fn end(&self) -> Option<End> {
        self.state().end.clone()
    }

    pub(crate) fn violation(&self) -> Option<String> {
        self.state().violation.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics with it")
    }
}

impl State {
    fn hear(&mut self, event: &Event) -> Result<(), String> {
        if let Some(end) = &self.end {
            return Err(format!("{event:?} after {end:?}"));
        }
        match event {
            Event::Queued { .. } => {}
            Event::Delta { tokens, .. } => {
                let (heard, expected) = (self.n_heard, &self.expected[self.n_heard..]);
                if !expected.starts_with(tokens) {
                    let follows = expected.first();
                    return Err(format!("{tokens:?} instead of {follows:?} as token {heard}"));
                }
                self.n_heard += tokens.len();
            }
            Event::Finished(finished) => {
                let (heard, expected) = (self.n_heard, self.expected.len());
                if heard != expected || finished.usage.completion_tokens as usize != expected {
                    return Err(format!("an answer of {expected} tokens ended after {heard}"));
                }
                self.end = Some(End::Finished);
            }
            Event::Failed(failure) => self.end = Some(End::Failed(failure.clone())),
            Event::Sampled { .. }
            | Event::Reasoning { .. }
            | Event::ToolCall { .. }
            | Event::Likelihood(_)
            | Event::Progress(_) => {
                return Err(format!("{event:?} is not for clients"));
            }
        }
        Ok(())
    }
}

impl Sink for Ear {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        let state = &mut *self.0.state();
        if state.is_gone {
            return Err(Refused::Closed);
        }
        if state.room == 0 {
            state.was_full = true;
            return Err(Refused::Full(event));
        }
        state.room -= 1;
        if let Err(what) = state.hear(&event) {
            state.violation.get_or_insert(what);
        }
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.0.is_gone()
    }
}
