//! What becomes of results? Journaled first, then cut into what their readers take, sent, and kept for a while.

use super::{Act, Desk};
use crate::mqtt::entry::{Entry, Finale, State};
use crate::mqtt::ledger::Record;
use crate::mqtt::message::{Key, error, parts};
use crate::mqtt::outbox::Out;
use crate::refusal::{AtDoor, Refusal};
use sparsed_engine::api::Failure;
use std::collections::HashMap;

/// Bytes of a packet beside topic, correlation data and payload: its head, the expiry and the content type.
const PACKET_FRAME_BYTES: usize = 64;
/// Pause before a request that found no room in the engine is tried again.
const RETRY_MS_MIN: u64 = 250;
/// Never again in this life of the daemon.
const NEVER_MS: u64 = u64::MAX;
/// Pause before the journal is written again after a failure.
const DISK_RETRY_MS: u64 = 1000;

impl Desk {
    /// Ends a request that has no result: the refusal is its result.
    pub(super) fn end(&mut self, key: &Key, refusal: &Refusal, acts: &mut Vec<Act>) {
        let Some(entry) = self.entries.get(key) else { return };
        if matches!(entry.state, State::Running(_)) {
            acts.push(Act::Cancel(key.clone()));
        }
        self.fail(key, refusal);
    }

    pub(super) fn done(&mut self, now_ms: u64, key: &Key, attempt: u64, outcome: Result<String, Refusal>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        if !matches!(entry.state, State::Running(running) if running == attempt) {
            return;
        }
        match outcome {
            Ok(payload) => {
                entry.state = State::Answered(Finale { payload, is_kept: true });
                self.staged.push(key.clone());
            }
            Err(refusal) => match refusal.name().code {
                "shutting_down" => entry.state = State::Waiting(NEVER_MS),
                "cut_off" if self.is_stopping => entry.state = State::Waiting(NEVER_MS),
                "queue_full" | "user_queue_full" | "user_tokens_full" | "too_many_requests" | "model_loading"
                | "too_many_bodies" => {
                    let pause_ms = u64::from(refusal.retry_after_s().unwrap_or(0)) * 1000;
                    entry.state = State::Waiting(now_ms + pause_ms.max(RETRY_MS_MIN));
                }
                _ => self.fail(key, &refusal),
            },
        }
    }

    fn fail(&mut self, key: &Key, refusal: &Refusal) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let may_pass = refusal.may_pass();
        let payload = error(Some(&entry.request.id), refusal, self.topics.node(), may_pass);
        entry.state = State::Answered(Finale { payload, is_kept: !may_pass });
        self.staged.retain(|staged| staged != key);
        if may_pass {
            self.outbox.push(Out::Finale(key.clone()));
        } else {
            self.staged.push(key.clone());
        }
    }

    /// Journals what is staged, and tells those who wait for it. What nobody waits for goes along, or with `flush`.
    pub(super) fn save(&mut self, now_ms: u64, flush: bool, acts: &mut Vec<Act>) {
        if self.staged.is_empty() && (self.lazy.is_empty() || !flush) {
            return;
        }
        let staged = std::mem::take(&mut self.staged);
        match self.write(now_ms, &staged) {
            Ok(()) => staged.iter().for_each(|key| self.saved(key, acts)),
            Err(reason) => staged.into_iter().for_each(|key| self.unsaved(key, &reason)),
        }
    }

    fn write(&mut self, now_ms: u64, staged: &[Key]) -> Result<(), String> {
        if let Some((reason, retry_ms)) = &self.disk_failed
            && now_ms < *retry_ms
        {
            return Err(reason.clone());
        }
        // Whatever comes of them: a journal that is written anew is made of what is known, not of these.
        let mut records = std::mem::take(&mut self.lazy);
        for key in staged {
            let Some(entry) = self.entries.get(key) else { continue };
            let finale = entry.kept().finale.map(|finale| Record::Answered { key: key.clone(), finale });
            let asked = || Record::Asked(Box::new(entry.request.clone()));
            records.extend(if entry.is_open() { Some(asked()) } else { finale });
        }
        let written = self.ledger.write(&records, || snapshot(&self.entries));
        match written {
            Ok(()) if self.disk_failed.take().is_some() => log::info!("the MQTT journal can be written again"),
            Ok(()) => {}
            Err(failure) => {
                let reason = failure.to_string();
                if self.disk_failed.replace((reason.clone(), now_ms + DISK_RETRY_MS)).is_none() {
                    log::error!(reason:%; "the MQTT journal cannot be written; requests are refused");
                }
                return Err(reason);
            }
        }
        Ok(())
    }

    fn saved(&mut self, key: &Key, acts: &mut Vec<Act>) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        match entry.state {
            State::New => {
                entry.state = State::Waiting(0);
                if !entry.request.pool {
                    let acks = std::mem::take(&mut entry.acks);
                    self.acknowledge(acks, acts);
                }
            }
            State::Answered(_) => self.outbox.push(Out::Finale(key.clone())),
            _ => {}
        }
    }

    /// The disk took nothing. A request is refused; a result waits, since one that is sent and lost could come twice.
    fn unsaved(&mut self, key: Key, failure: &str) {
        let Some(entry) = self.entries.get(&key) else { return };
        if !matches!(entry.state, State::New) {
            return self.staged.push(key);
        }
        if let Some(entry) = self.entries.remove(&key) {
            let message = format!("the request could not be written to the disk: {failure}");
            let refusal = Refusal::from(Failure::DiskFailed { reason: failure.to_owned() }).saying(message);
            self.refuse(Some(&entry.request.id), entry.request.address(), &refusal, entry.acks);
        }
    }

    /// Publishes what the window has room for.
    pub(super) fn send(&mut self, now_ms: u64, acts: &mut Vec<Act>) {
        while let Some(out) = self.outbox.pop() {
            let (address, payload, retain) = match &out {
                Out::Finale(key) => {
                    self.cut(key);
                    continue;
                }
                Out::Part { address, payload, .. } => (address.clone(), payload.clone(), false),
                Out::Note { address, payload, retain, .. } => (address.clone(), payload.clone(), *retain),
            };
            // What waits for its reader is of use as long as it is kept.
            let expiry_s = (!retain).then(|| u32::try_from(self.limits.keep_ms / 1000).unwrap_or(u32::MAX));
            let token = self.outbox.fly(out, now_ms);
            acts.push(Act::Publish { token, address, payload, retain, expiry_s });
        }
    }

    /// Cuts a result into what its client and the broker take.
    fn cut(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let State::Answered(finale) = &entry.state else { return };
        let address = entry.request.address();
        let frame = address.topic.len() + address.correlation.as_ref().map_or(0, Vec::len) + PACKET_FRAME_BYTES;
        let limit = self.packet_bytes_max.saturating_sub(frame).min(entry.request.max_bytes.unwrap_or(usize::MAX));
        let payloads = parts(&finale.payload, limit).unwrap_or_else(|| {
            let message = format!("the answer cannot be told in payloads of {limit} bytes");
            let refusal = Refusal::at_door(AtDoor::AnswerTooLarge, Some("max_bytes"), message);
            vec![error(Some(&entry.request.id), &refusal, self.topics.node(), false)]
        });
        entry.unacked = payloads.len();
        let part = |payload| Out::Part { key: key.clone(), address: address.clone(), payload };
        self.outbox.push_first(payloads.into_iter().map(part));
    }

    pub(super) fn landed(&mut self, now_ms: u64, token: u64, refused: Option<String>, acts: &mut Vec<Act>) {
        let (key, address) = match self.outbox.land(token) {
            Some(Out::Part { key, address, .. }) => (key, address),
            Some(Out::Note { acks, address, .. }) => {
                if let Some(reason) = refused {
                    log::warn!(topic:% = address.topic, reason:%; "the broker did not take a message");
                }
                return self.acknowledge(acks, acts);
            }
            Some(Out::Finale(_)) | None => return,
        };
        if let Some(reason) = refused {
            // It would say so again; whoever asks again is answered again.
            log::warn!(topic:% = address.topic, reason:%; "the broker did not take an answer");
        }
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.unacked = entry.unacked.saturating_sub(1);
        let State::Answered(finale) = &entry.state else { return };
        if entry.unacked > 0 {
            return;
        }
        let (finale, acks) = (finale.clone(), std::mem::take(&mut entry.acks));
        if std::mem::take(&mut entry.again) {
            self.outbox.push(Out::Finale(key));
        } else if finale.is_kept {
            entry.state = State::Delivered(finale, now_ms);
            let client = key.client.clone();
            self.lazy.push(Record::Delivered { key, at_ms: now_ms });
            self.trim(&client);
        } else {
            self.forget(&key);
        }
        self.acknowledge(acks, acts);
    }
}

/// Records of all that is known, in the order of asking.
fn snapshot(entries: &HashMap<Key, Entry>) -> Vec<Record> {
    let mut entries: Vec<&Entry> = entries.values().collect();
    entries.sort_by_key(|entry| entry.arrival);
    entries.into_iter().flat_map(|entry| entry.kept().records()).collect()
}
