//! Whose requests and results are held? All together have a bound (`mqtt.inbox`), and nobody's go for another client's.
//!
//! Who holds some gets more as long as at least as much is left for others, as with bodies (`shares.rs`), or while it
//! is no more than an equal part for each client that holds something and one that is to come. For what is new, a
//! client's own results go that the broker had first; where that does not help it is refused.

use super::Desk;
use crate::mqtt::entry::{Entry, State};
use std::collections::HashSet;

/// Bytes that requests and results take.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Of all clients.
    all: u64,
    /// Of the one that is looked at.
    own: u64,
    /// Of these, of results that the broker has.
    spare: u64,
    /// Clients that hold something, this one in any case.
    n_clients: u64,
}

impl Held {
    fn of<'a>(entries: impl Iterator<Item = &'a Entry>, client: &'a str) -> Self {
        let (mut clients, mut held) = (HashSet::from([client]), Self { all: 0, own: 0, spare: 0, n_clients: 0 });
        for entry in entries {
            let bytes = entry.bytes();
            held.all += bytes;
            if entry.request.client == client {
                held.own += bytes;
                held.spare += if matches!(entry.state, State::Delivered(..)) { bytes } else { 0 };
            } else {
                clients.insert(&entry.request.client);
            }
        }
        Self { n_clients: clients.len() as u64, ..held }
    }

    /// When `bytes` more of the client's are there.
    fn with(self, bytes: u64) -> Self {
        Self { all: self.all + bytes, own: self.own + bytes, ..self }
    }

    /// When `bytes` of its results are gone.
    fn without(self, bytes: u64) -> Self {
        Self { all: self.all - bytes, own: self.own - bytes, spare: self.spare - bytes, ..self }
    }

    /// Whether the client has no more than its share of `most`.
    fn is_fair(self, most: u64) -> bool {
        self.own <= most.saturating_sub(self.all) || self.own <= most / (self.n_clients + 1)
    }

    /// Whether there is room for `bytes` more of the client's. The first may be all that is left.
    fn takes(self, bytes: u64, most: u64) -> bool {
        let after = self.with(bytes);
        after.all <= most && (self.own == 0 || after.is_fair(most))
    }
}

impl Desk {
    /// Has `client` hold `bytes` more, if need be in the place of its own oldest results. Answers `false`, and nothing
    /// is forgotten, where that is not enough.
    pub(super) fn make_room(&mut self, client: &str, bytes: u64) -> bool {
        let (mut held, most) = (Held::of(self.entries.values(), client), self.limits.held_bytes);
        if !held.without(held.spare).takes(bytes, most) {
            return false;
        }
        while !held.takes(bytes, most) {
            let Some(freed) = self.forget_oldest(client) else { return false };
            held = held.without(freed);
        }
        true
    }

    /// Forgets the oldest results of `client` while it holds more than its share: an answer may be larger than its
    /// question.
    pub(super) fn trim(&mut self, client: &str) {
        let mut held = Held::of(self.entries.values(), client);
        while !held.is_fair(self.limits.held_bytes) {
            let Some(freed) = self.forget_oldest(client) else { return };
            held = held.without(freed);
        }
    }

    /// Forgets the result of `client` that the broker had first; answers its bytes, if there is one.
    fn forget_oldest(&mut self, client: &str) -> Option<u64> {
        let delivered = self.entries.iter().filter_map(|(key, entry)| match entry.state {
            State::Delivered(_, at_ms) if key.client == client => Some((at_ms, entry.arrival, key, entry.bytes())),
            _ => None,
        });
        let (_, _, key, bytes) = delivered.min()?;
        let key = key.clone();
        self.forget(&key);
        Some(bytes)
    }
}
