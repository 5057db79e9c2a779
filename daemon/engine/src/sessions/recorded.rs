//! How does an answer pass the journal on its way to the client?
//!
//! The engine offers a session's events to a [`Recorded`] sink, which hands them to the sessions thread; that one
//! writes the tokens into the journal and only then passes on what was made of them. Each answer has room for a few
//! events on this way, so that the thread's queue is bounded by the number of answers, and a client that does not read
//! pauses its own sequence only. A disk that takes long pauses all of them, which no client pays for.

use super::SessionId;
use super::asks::{Ask, Asks};
use super::standing::Standing;
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
    standing: Standing,
}

impl Recorder {
    pub(super) fn new(asks: Asks, turn: TurnId, session: SessionId, standing: Standing) -> Self {
        Self { asks, turn, session, standing }
    }

    /// Whose turn it is.
    pub(crate) fn session(&self) -> SessionId {
        self.session
    }

    /// Whether the session still has the turn.
    pub(crate) fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// A sink for the engine that leads to `sink`.
    pub(crate) fn record(self, sink: Box<dyn Sink>) -> Box<dyn Sink> {
        let flow = Arc::new(Flow::default());
        self.asks.tell(Ask::Listen { turn: self.turn, sink, flow: Arc::clone(&flow) });
        Box::new(Recorded { recorder: self, flow, n_unread: 0 })
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
    /// Looks at the client that have found its own channel full. There are none while a disk holds the sessions thread
    /// up.
    n_unread: AtomicU32,
    /// Nobody listens any more.
    is_closed: AtomicBool,
}

impl Flow {
    /// An event has left the way.
    pub(super) fn passed(&self) {
        self.n_events.fetch_sub(1, Ordering::Relaxed);
    }

    /// The client does not read.
    pub(super) fn unread(&self) {
        self.n_unread.fetch_add(1, Ordering::Relaxed);
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
    /// Of the looks at the client, those that the engine knows of.
    n_unread: u32,
}

impl Sink for Recorded {
    fn offer(&mut self, event: Event) -> Result<(), Refused> {
        if self.is_closed() {
            return Err(Refused::Closed);
        }
        if self.flow.n_events.load(Ordering::Relaxed) >= EVENTS_MAX {
            let n_unread = self.flow.n_unread.load(Ordering::Relaxed);
            let is_unread = std::mem::replace(&mut self.n_unread, n_unread) != n_unread;
            return Err(if is_unread { Refused::Full(event) } else { Refused::Behind(event) });
        }
        self.flow.n_events.fetch_add(1, Ordering::Relaxed);
        self.recorder.asks.tell(Ask::Event { turn: self.recorder.turn, event });
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.flow.is_closed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Listener;

    #[test]
    fn a_full_way_is_the_clients_fault_only_when_somebody_has_looked_at_it_since() {
        let (asks, _asked) = Asks::new();
        let flow = Arc::new(Flow::default());
        let recorder = Recorder::new(asks, TurnId(0), SessionId::from_bytes([0; 16]), Standing::default());
        let mut recorded = Recorded { recorder, flow: Arc::clone(&flow), n_unread: 0 };
        let event = Event::Sampled { token: 1 };
        for _ in 0..EVENTS_MAX {
            recorded.offer(event.clone()).unwrap();
        }
        let mut client = super::super::listener::Listener::new(Box::new(Listener::with_room(0)), flow);
        client.hear(event.clone());
        for _ in 0..2 {
            assert_eq!(recorded.offer(event.clone()), Err(Refused::Behind(event.clone())));
            assert!(!client.deliver());
            assert_eq!(recorded.offer(event.clone()), Err(Refused::Full(event.clone())));
        }
    }
}
