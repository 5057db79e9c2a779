//! How does an answer pass the journal on its way to the client?
//!
//! The engine offers a session's events to a [`Recorded`] sink, which hands them to the sessions thread; that one
//! writes the tokens into the journal and only then passes on what was made of them. Each answer has room for a few
//! events on this way, so that the thread's queue is bounded by the number of answers, and a client that does not read
//! pauses its own sequence only.

use super::SessionId;
use super::asks::{Ask, Asks};
use crate::api::{Event, Refused, Sink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Events of one answer between engine and client, beside those in the client's own channel.
const EVENTS_MAX: u32 = 64;

/// A turn while it is answered, numbered in the order in which turns began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TurnId(pub(super) u64);

/// The right to answer a turn. The turn ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Recorder {
    asks: Asks,
    turn: TurnId,
    session: SessionId,
}

impl Recorder {
    pub(super) fn new(asks: Asks, turn: TurnId, session: SessionId) -> Self {
        Self { asks, turn, session }
    }

    /// Whose turn it is.
    pub(crate) fn session(&self) -> SessionId {
        self.session
    }

    /// A sink for the engine that leads to `sink`.
    pub(crate) fn record(self, sink: Box<dyn Sink>) -> Box<dyn Sink> {
        let flow = Arc::new(Flow::default());
        self.asks.tell(Ask::Listen { turn: self.turn, sink, flow: Arc::clone(&flow) });
        Box::new(Recorded { recorder: self, flow })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.asks.tell(Ask::Gone { turn: self.turn });
    }
}

/// What both ends of one answer's way know of each other.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    /// Events on the way.
    n_events: AtomicU32,
    /// Nobody listens any more.
    is_closed: AtomicBool,
}

impl Flow {
    /// An event has left the way.
    pub(super) fn passed(&self) {
        self.n_events.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }
}

/// The engine's end.
#[derive(Debug)]
struct Recorded {
    recorder: Recorder,
    flow: Arc<Flow>,
}

impl Sink for Recorded {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        if self.is_closed() {
            return Err(Refused::Closed);
        }
        if self.flow.n_events.load(Ordering::Relaxed) >= EVENTS_MAX {
            return Err(Refused::Full(event));
        }
        self.flow.n_events.fetch_add(1, Ordering::Relaxed);
        self.recorder.asks.tell(Ask::Event { turn: self.recorder.turn, event });
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.flow.is_closed.load(Ordering::Relaxed)
    }
}
