//! What is on its way to the broker? A queue, and a window of publishes that it has not acknowledged yet.

use super::desk::Ack;
use super::message::{Address, Key};
use std::collections::{BTreeMap, VecDeque};

/// Something to be published with QoS 1.
#[derive(Clone, Debug)]
pub(super) enum Out {
    /// The answer to a request, not yet in parts.
    Finale(Key),
    /// A part of it, or all.
    Part {
        /// Of which request.
        key: Key,
        /// Where to.
        address: Address,
        /// What.
        payload: String,
    },
    /// Something else.
    Note {
        /// Where to.
        address: Address,
        /// What.
        payload: String,
        /// The broker keeps it for whoever comes.
        retain: bool,
        /// What may be acknowledged once the broker has this.
        acks: Vec<Ack>,
    },
}

/// The queue and the window.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<Out>,
    /// By token, which grows; each with the time when it went, in milliseconds.
    flying: BTreeMap<u64, (Out, u64)>,
    next_token: u64,
    /// Publishes that may be unacknowledged at a time; 0 while there is no connection.
    window: usize,
}

impl Outbox {
    /// A connection is there.
    pub(super) fn open(&mut self, window: usize) {
        self.window = window;
    }

    /// The connection is gone: what was on its way goes again, first things first. Retained notes are made anew.
    pub(super) fn close(&mut self) {
        self.window = 0;
        for (_, (out, _)) in std::mem::take(&mut self.flying).into_iter().rev() {
            self.queue.push_front(out);
        }
        self.queue.retain(|out| !matches!(out, Out::Note { retain: true, .. }));
    }

    /// Puts something behind all others.
    pub(super) fn push(&mut self, out: Out) {
        self.queue.push_back(out);
    }

    /// Puts parts before all others.
    pub(super) fn push_first(&mut self, parts: impl DoubleEndedIterator<Item = Out>) {
        parts.rev().for_each(|part| self.queue.push_front(part));
    }

    /// The next thing that may go.
    pub(super) fn pop(&mut self) -> Option<Out> {
        if self.flying.len() >= self.window { None } else { self.queue.pop_front() }
    }

    /// Something goes now; answers its token.
    pub(super) fn fly(&mut self, out: Out, now_ms: u64) -> u64 {
        self.next_token += 1;
        self.flying.insert(self.next_token, (out, now_ms));
        self.next_token
    }

    /// The broker has it.
    pub(super) fn land(&mut self, token: u64) -> Option<Out> {
        self.flying.remove(&token).map(|(out, _)| out)
    }

    /// Whether the broker has had no word for something that went before `from_ms`; then all of it counts as gone now.
    pub(super) fn is_stuck(&mut self, from_ms: u64, now_ms: u64) -> bool {
        let is_stuck = self.flying.values().any(|(_, went_ms)| *went_ms <= from_ms);
        if is_stuck {
            self.flying.values_mut().for_each(|(_, went_ms)| *went_ms = now_ms);
        }
        is_stuck
    }

    /// Things that wait to go.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is to be sent, and nothing on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty() && self.queue.is_empty()
    }
}
