//! What is to be done with what comes? Requests, answers, acknowledgements and time in; publishes, acknowledgements and
//! work out. Knows no socket, no thread and no clock, but the journal.
//!
//! The promise: a request to this node has exactly one result, repeated to whoever asks again with the same id. So a
//! request is acknowledged to the broker when it is journaled, its result is journaled before it is sent, and stays for
//! a while. A request of the pool is acknowledged only when the broker has its result: if this node dies, another one
//! has it. Failures that may pass (no room, a device that failed) are no results: whoever asks again is answered anew.

mod requests;
mod results;
mod room;

use super::entry::{Entry, State};
use super::ledger::{Kept, Ledger, Record};
use super::message::{Address, Key, Publish, Request};
use super::outbox::{Out, Outbox};
use super::topics::Topics;
use crate::refusal::Refusal;
use sparsed_engine::api::Failure;
use std::collections::{BTreeMap, HashMap};

/// A result that the broker did not take for so long is given up.
const UNDELIVERED_MS_MAX: u64 = 24 * 3600 * 1000;

/// What the door may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Unanswered requests of a client.
    pub(super) per_client: usize,
    /// Unanswered requests of all.
    pub(super) pending: usize,
    /// Requests that the engine is given at a time.
    pub(super) running: usize,
    /// Bytes of requests and results together.
    pub(super) held_bytes: u64,
    /// Bytes of a request's payload.
    pub(super) payload_bytes: usize,
    /// How long a delivered result is repeated.
    pub(super) keep_ms: u64,
    /// Time of a request that does not say.
    pub(super) deadline_ms: u64,
    /// A broker that does not acknowledge something for so long is left and connected to anew.
    pub(super) stall_ms: u64,
}

/// Which connection: the node's own, whose session the broker keeps, or the pool's, whose session ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Requests to this node, and all that is published.
    Node,
    /// Requests to the pool.
    Pool,
}

/// A publish that the broker waits to hear of. It means nothing on a later connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    /// Where it came in.
    pub(super) line: Line,
    /// On which of its connections.
    pub(super) epoch: u64,
    /// The packet's number.
    pub(super) pkid: u16,
}

/// What happened.
#[derive(Debug)]
pub(super) enum Input {
    /// A connection is there.
    Up { line: Line, epoch: u64, window: usize, packet_bytes_max: Option<usize> },
    /// It is gone.
    Down { line: Line, epoch: u64 },
    /// Something was published to us.
    Publish { line: Line, ack: Option<Ack>, publish: Publish },
    /// The broker has a publish of ours, or does not want it.
    Landed { token: u64, refused: Option<String> },
    /// An attempt has ended with a result's payload, or why there is none.
    Done { key: Key, attempt: u64, outcome: Result<String, Refusal> },
    /// Something to tell everybody, retained or once.
    News { topic: String, payload: String, retain: bool },
    /// The operator wants other limits, and answers on other topics.
    Settings { limits: Limits, topics: Topics },
    /// No more requests are taken.
    Stop,
    /// Time goes by.
    Tick,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Act {
    Subscribe { line: Line, filters: Vec<String> },
    Unsubscribe { line: Line, filters: Vec<String> },
    Publish { token: u64, address: Address, payload: String, retain: bool, expiry_s: Option<u32> },
    Ack(Ack),
    Start { key: Key, attempt: u64, request: Box<Request> },
    Cancel(Key),
    Reset(Line),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Desk {
    topics: Topics,
    limits: Limits,
    ledger: Ledger,
    entries: HashMap<Key, Entry>,
    outbox: Outbox,
    /// The number of each line's connection while there is one.
    epochs: [Option<u64>; 2],
    /// Largest packet that the broker takes.
    packet_bytes_max: usize,
    /// Retained topics and what they say.
    retained: BTreeMap<String, String>,
    /// Keys of what is to be journaled with the next write: a request or a result.
    staged: Vec<Key>,
    /// Records that nobody waits for.
    lazy: Vec<Record>,
    arrivals: u64,
    attempts: u64,
    is_stopping: bool,
    /// Why the journal could not be written last, and when that is tried again.
    disk_failed: Option<(String, u64)>,
}

impl Desk {
    /// Goes on from what `ledger` has kept. Requests of the pool that have no result are the broker's.
    pub(super) fn new(topics: Topics, limits: Limits, ledger: Ledger, kept: Vec<Kept>) -> Self {
        let mut desk = Self {
            topics,
            limits,
            ledger,
            entries: HashMap::new(),
            outbox: Outbox::default(),
            epochs: [None; 2],
            packet_bytes_max: usize::MAX,
            retained: BTreeMap::new(),
            staged: Vec::new(),
            lazy: Vec::new(),
            arrivals: 0,
            attempts: 0,
            is_stopping: false,
            disk_failed: None,
        };
        for kept in kept {
            let key = kept.request.key();
            if kept.request.pool && kept.finale.is_none() {
                desk.lazy.push(Record::Forgotten(key));
                continue;
            }
            desk.arrivals += 1;
            let entry = Entry::restored(kept, desk.arrivals);
            if matches!(entry.state, State::Answered(_)) {
                desk.outbox.push(Out::Finale(key.clone()));
            }
            desk.entries.insert(key, entry);
        }
        desk
    }

    /// Whether nothing runs and the broker has all that it can have.
    pub(super) fn is_idle(&self) -> bool {
        let runs = self.entries.values().any(|entry| matches!(entry.state, State::Running(_)));
        !runs && self.staged.is_empty() && (self.outbox.is_empty() || self.epochs[0].is_none())
    }

    /// Whether time changes nothing soon: nobody waits, nothing is to be written or sent.
    pub(super) fn is_quiet(&self) -> bool {
        let nothing_is_sent = self.outbox.is_empty() || self.epochs[0].is_none();
        let nothing_waits = self.staged.is_empty() && self.lazy.is_empty() && nothing_is_sent;
        nothing_waits && !self.entries.values().any(Entry::is_open)
    }

    /// Takes what has happened; answers what is to be done, in order.
    pub(super) fn handle(&mut self, now_ms: u64, inputs: impl IntoIterator<Item = Input>) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut flush = false;
        for input in inputs {
            flush |= matches!(input, Input::Tick);
            self.take(now_ms, input, &mut acts);
        }
        self.save(now_ms, flush, &mut acts);
        self.begin(now_ms, &mut acts);
        self.send(now_ms, &mut acts);
        acts
    }

    fn take(&mut self, now_ms: u64, input: Input, acts: &mut Vec<Act>) {
        match input {
            Input::Up { line, epoch, window, packet_bytes_max } => {
                self.epochs[line as usize] = Some(epoch);
                match line {
                    Line::Node => acts.push(Act::Subscribe { line, filters: self.topics.direct() }),
                    // What would come now is for the nodes that stay.
                    Line::Pool if self.is_stopping => {}
                    Line::Pool => acts.push(Act::Subscribe { line, filters: self.topics.pooled() }),
                }
                if line == Line::Node {
                    self.packet_bytes_max = packet_bytes_max.unwrap_or(usize::MAX);
                    self.outbox.open(window);
                    let retained = self.retained.clone();
                    retained.into_iter().for_each(|(topic, payload)| self.note(topic, payload, true));
                }
            }
            Input::Down { line, epoch } => {
                if self.epochs[line as usize] == Some(epoch) {
                    self.epochs[line as usize] = None;
                    if line == Line::Node {
                        self.outbox.close();
                    }
                }
            }
            Input::Publish { line, ack, publish } => self.hear(now_ms, line, ack, &publish, acts),
            Input::Landed { token, refused } => self.landed(now_ms, token, refused, acts),
            Input::Done { key, attempt, outcome } => self.done(now_ms, &key, attempt, outcome),
            Input::News { topic, payload, retain } => {
                if retain {
                    self.retained.insert(topic.clone(), payload.clone());
                }
                if self.epochs[0].is_some() {
                    self.note(topic, payload, retain);
                }
            }
            Input::Settings { limits, topics } => (self.limits, self.topics) = (limits, topics),
            Input::Stop => {
                self.is_stopping = true;
                let line = Line::Pool;
                if self.epochs[line as usize].is_some() {
                    // The broker has other nodes for what comes; what this one has begun, it ends.
                    acts.push(Act::Unsubscribe { line, filters: self.topics.pooled() });
                }
            }
            Input::Tick => self.tick(now_ms, acts),
        }
    }

    /// Gives the engine what waits: of the client that has least running, what came first.
    fn begin(&mut self, now_ms: u64, acts: &mut Vec<Act>) {
        let mut running = HashMap::<String, usize>::new();
        for entry in self.entries.values().filter(|entry| matches!(entry.state, State::Running(_))) {
            *running.entry(entry.request.client.clone()).or_default() += 1;
        }
        let mut n_running: usize = running.values().sum();
        while !self.is_stopping && n_running < self.limits.running {
            let ready = |entry: &&mut Entry| matches!(entry.state, State::Waiting(from_ms) if from_ms <= now_ms);
            let rank = |entry: &&mut Entry| (running.get(&entry.request.client).copied().unwrap_or(0), entry.arrival);
            let Some(entry) = self.entries.values_mut().filter(ready).min_by_key(rank) else { return };
            self.attempts += 1;
            entry.state = State::Running(self.attempts);
            *running.entry(entry.request.client.clone()).or_default() += 1;
            n_running += 1;
            let (key, request) = (entry.request.key(), Box::new(entry.request.clone()));
            acts.push(Act::Start { key, attempt: self.attempts, request });
        }
    }

    fn tick(&mut self, now_ms: u64, acts: &mut Vec<Act>) {
        // What is staged here is a result that the disk does not take.
        let late = |(key, entry): (&Key, &Entry)| {
            let waits = entry.is_open() || self.staged.contains(key);
            (waits && entry.request.deadline_ms <= now_ms).then(|| key.clone())
        };
        for key in self.entries.iter().filter_map(late).collect::<Vec<_>>() {
            self.end(&key, &too_late(), acts);
        }
        let keep_ms = self.limits.keep_ms;
        let stale = |(key, entry): (&Key, &Entry)| {
            let is_stale = match &entry.state {
                State::Delivered(_, at_ms) => at_ms.saturating_add(keep_ms) <= now_ms,
                State::Answered(_) => entry.request.deadline_ms.saturating_add(UNDELIVERED_MS_MAX) <= now_ms,
                _ => false,
            };
            is_stale.then(|| key.clone())
        };
        for key in self.entries.iter().filter_map(stale).collect::<Vec<_>>() {
            self.forget(&key);
        }
        if self.outbox.is_stuck(now_ms.saturating_sub(self.limits.stall_ms), now_ms) {
            log::warn!("the broker acknowledges nothing; connecting anew");
            acts.push(Act::Reset(Line::Node));
        }
    }

    /// Tells the broker of publishes whose connection is still there.
    fn acknowledge(&self, acks: Vec<Ack>, acts: &mut Vec<Act>) {
        let is_there = |ack: &Ack| self.epochs[ack.line as usize] == Some(ack.epoch);
        acts.extend(acks.into_iter().filter(is_there).map(Act::Ack));
    }

    fn note(&mut self, topic: String, payload: String, retain: bool) {
        let address = Address { topic, correlation: None };
        self.outbox.push(Out::Note { address, payload, retain, acks: Vec::new() });
    }
}

/// The time of a request is over. It may be asked again with another one.
fn too_late() -> Refusal {
    let message = "the time of the request is over (deadline_ms, or the message's expiry)";
    Refusal::from(Failure::DeadlineExceeded { deadline_ms: 0 }).saying(message.to_owned())
}

#[cfg(test)]
mod tests;
