//! What has become of a request?

use super::desk::Ack;
use super::ledger::Kept;
use super::message::Request;

/// A request and its state.
#[derive(Debug)]
pub(super) struct Entry {
    /// It.
    pub(super) request: Request,
    /// What has become of it.
    pub(super) state: State,
    /// Counts requests in the order in which they came.
    pub(super) arrival: u64,
    /// What the broker is to be told: once it is journaled, or answered for a request of the pool.
    pub(super) acks: Vec<Ack>,
    /// Parts of the answer that the broker does not have yet.
    pub(super) unacked: usize,
    /// Somebody asked again while the answer was on its way.
    pub(super) again: bool,
}

/// What has become of a request.
#[derive(Debug)]
pub(super) enum State {
    /// It is not on the disk yet.
    New,
    /// It waits, not to be begun before this time in milliseconds since 1970.
    Waiting(u64),
    /// It is being answered, for the so-manieth time.
    Running(u64),
    /// It is answered.
    Answered(Finale),
    /// The broker had the answer at this time in milliseconds since 1970.
    Delivered(Finale, u64),
}

/// An answer, or a failure.
#[derive(Clone, Debug)]
pub(super) struct Finale {
    /// The payload.
    pub(super) payload: String,
    /// Whoever asks again hears it again. Failures that may pass are not kept.
    pub(super) is_kept: bool,
}

impl Entry {
    pub(super) fn new(request: Request, arrival: u64, acks: Vec<Ack>) -> Self {
        Self { request, state: State::New, arrival, acks, unacked: 0, again: false }
    }

    /// One of the last run. Answers are given at once; the rest is computed again.
    pub(super) fn restored(kept: Kept, arrival: u64) -> Self {
        let finale = kept.finale.map(|payload| Finale { payload, is_kept: true });
        let state = match (finale, kept.delivered_ms) {
            (Some(finale), Some(at_ms)) => State::Delivered(finale, at_ms),
            (Some(finale), None) => State::Answered(finale),
            (None, _) => State::Waiting(0),
        };
        Self { state, ..Self::new(kept.request, arrival, Vec::new()) }
    }

    /// What the journal is to say of it.
    pub(super) fn kept(&self) -> Kept {
        let (finale, delivered_ms) = match &self.state {
            State::New | State::Waiting(_) | State::Running(_) => (None, None),
            State::Answered(finale) => (Some(finale), None),
            State::Delivered(finale, at_ms) => (Some(finale), Some(*at_ms)),
        };
        let finale = finale.filter(|finale| finale.is_kept).map(|finale| finale.payload.clone());
        Kept { request: self.request.clone(), finale, delivered_ms }
    }

    /// Whether it has no answer yet.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::New | State::Waiting(_) | State::Running(_))
    }

    /// Bytes of memory and disk that it takes, nearly.
    pub(super) fn bytes(&self) -> u64 {
        let finale = match &self.state {
            State::Answered(finale) | State::Delivered(finale, _) => finale.payload.len(),
            _ => 0,
        };
        Self::bytes_of(&self.request) + finale as u64
    }

    /// The same of a request without an answer.
    pub(super) fn bytes_of(request: &Request) -> u64 {
        (request.body.len() + 512) as u64
    }
}
