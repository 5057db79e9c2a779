//! Which requests are taken? New ones if there is room, known ones are answered as before, and some end others.

use super::{Ack, Act, Desk, Line};
use crate::mqtt::entry::{Entry, State};
use crate::mqtt::ledger::Record;
use crate::mqtt::message::{Address, Key, Publish, Request, error};
use crate::mqtt::outbox::Out;
use crate::mqtt::topics::Op;
use crate::refusal::{AtDoor, Refusal};

/// Messages that may wait before a refusal that nobody waits for is dropped.
const REFUSALS_MAX: usize = 1024;

impl Desk {
    /// A publish came in on one of our filters.
    pub(super) fn hear(&mut self, now_ms: u64, line: Line, ack: Option<Ack>, publish: &Publish, acts: &mut Vec<Act>) {
        let acks: Vec<Ack> = ack.into_iter().collect();
        let place = self.topics.place(&publish.topic).filter(|place| place.pool == (line == Line::Pool));
        let Some(place) = place else {
            log::debug!(topic:% = publish.topic; "a publish that is no request");
            return self.acknowledge(acks, acts);
        };
        if publish.payload.is_empty() && publish.response_topic.is_none() {
            return self.acknowledge(acks, acts); // clears what a client had retained
        }
        if self.is_stopping {
            return; // unacknowledged, the broker gives it again
        }
        let deadline_ms = self.limits.deadline_ms;
        let read = |publish: &Publish| Request::read(publish, &place, &self.topics, now_ms, deadline_ms);
        let read = match publish.payload.len() {
            length if length > self.limits.payload_bytes => {
                let message = format!(
                    "the payload has {length} bytes, the limit is {} (mqtt.payload)",
                    self.limits.payload_bytes
                );
                let refusal = Refusal::at_door(AtDoor::BodyTooLarge, None, message);
                let short = Publish { payload: b"{}".to_vec(), ..publish.clone() };
                let address = read(&short).map_or_else(|unread| unread.address, |request| request.address());
                return self.refuse(None, address, &refusal, acks);
            }
            _ => read(publish),
        };
        let request = match read {
            Ok(request) => request,
            Err(unread) => return self.refuse(unread.id.as_deref(), unread.address, &unread.refusal, acks),
        };
        if request.op == Op::Cancel {
            self.cancel(&request.client, &request.id, acts);
            return self.acknowledge(acks, acts);
        }
        let key = request.key();
        match self.entries.get(&key) {
            Some(entry) if entry.request.digest != request.digest => {
                let message = format!("another request has the id '{}'; choose a new one", request.id);
                let refusal = Refusal::at_door(AtDoor::IdConflict, Some("id"), message);
                self.refuse(Some(&request.id), request.address(), &refusal, acks);
            }
            Some(_) => self.hear_again(&key, acks, acts),
            None if request.deadline_ms <= now_ms => {
                self.refuse(Some(&request.id), request.address(), &super::too_late(), acks);
            }
            None => self.admit(request, acks),
        }
    }

    /// A request that is known comes once more.
    fn hear_again(&mut self, key: &Key, acks: Vec<Ack>, acts: &mut Vec<Act>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let pool = entry.request.pool;
        match &entry.state {
            State::New => return entry.acks.extend(acks),
            State::Waiting(_) | State::Running(_) => {}
            State::Answered(_) => entry.again = true,
            State::Delivered(finale, _) => {
                entry.state = State::Answered(finale.clone());
                self.outbox.push(Out::Finale(key.clone()));
            }
        }
        if pool {
            // What an earlier connection waited for is over.
            entry.acks.retain(|old| acks.first().is_some_and(|new| old.epoch == new.epoch));
            entry.acks.extend(acks);
        } else {
            self.acknowledge(acks, acts);
        }
    }

    /// A request that is new: there must be room for it.
    fn admit(&mut self, request: Request, acks: Vec<Ack>) {
        let open = || self.entries.values().filter(|entry| entry.is_open());
        let of_client = open().filter(|entry| entry.request.client == request.client).count();
        let full = if of_client >= self.limits.per_client {
            Some(format!("{} requests of '{}' are unanswered; the limit is mqtt.per_client", of_client, request.client))
        } else if open().count() >= self.limits.pending {
            Some(format!("{} requests are unanswered; the limit is mqtt.pending", self.limits.pending))
        } else {
            let reason = || format!("'{}' holds its share of mqtt.inbox, or others hold the rest", request.client);
            (!self.make_room(&request.client, Entry::bytes_of(&request))).then(reason)
        };
        if let Some(message) = full {
            return self.refuse(Some(&request.id), request.address(), &Refusal::door_full(message), acks);
        }
        self.arrivals += 1;
        let key = request.key();
        self.staged.push(key.clone());
        self.entries.insert(key, Entry::new(request, self.arrivals, acks));
    }

    pub(super) fn forget(&mut self, key: &Key) {
        if self.entries.remove(key).is_some() {
            self.lazy.push(Record::Forgotten(key.clone()));
        }
    }

    fn cancel(&mut self, client: &str, id: &str, acts: &mut Vec<Act>) {
        let named = |(key, entry): (&Key, &Entry)| {
            (key.client == client && key.id == id && entry.is_open()).then(|| key.clone())
        };
        for key in self.entries.iter().filter_map(named).collect::<Vec<_>>() {
            let refusal = Refusal::at_door(AtDoor::Cancelled, None, "the request was cancelled");
            self.end(&key, &refusal, acts);
        }
    }

    /// Answers what was no request that could be kept; it is acknowledged when the broker has the refusal.
    pub(super) fn refuse(&mut self, id: Option<&str>, address: Address, refusal: &Refusal, acks: Vec<Ack>) {
        if acks.is_empty() && self.outbox.waiting() >= REFUSALS_MAX {
            return; // sent with QoS 0, and the broker does not slow down who sends it
        }
        let payload = error(id, refusal, self.topics.node(), refusal.may_pass());
        self.outbox.push(Out::Note { address, payload, retain: false, acks });
    }
}
