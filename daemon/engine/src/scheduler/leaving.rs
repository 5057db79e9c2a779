//! How does a sequence leave the pool? At its end, to wait, or because nobody listens any more.

use super::Scheduler;
use crate::api::{Event, Failure};
use crate::sequence::Sequence;
use sparsed_kv::{BlockId, Pool};
use std::time::Duration;

/// How a sequence leaves the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leaves {
    /// It is at its end.
    ForGood,
    /// Its rows are computed again.
    ToWait,
}

impl Scheduler {
    /// Delivers what waits, and lets go of sequences whose listener is gone or has not read for too long.
    pub(crate) fn tend(&mut self, now: Duration) {
        self.queue.tend(now);
        self.give_up_late(now);
        self.relieve(now);
        self.leaving.retain_mut(|sequence| !sequence.is_abandoned() && !sequence.deliver(now));
        let limit = self.limits.slow_consumer;
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            sequence.deliver(now);
            if sequence.is_abandoned() {
                let sequence = self.release(at);
                self.queue.ended(sequence.owner());
            } else if sequence.parked_for() > limit {
                let mut sequence = self.release(at);
                sequence.fail(Failure::SlowConsumer { limit_s: limit.as_secs() });
                self.queue.ended(sequence.owner());
                self.leave(sequence, now);
            } else {
                at += 1;
            }
        }
        self.leaving.retain(|sequence| sequence.parked_for() <= limit * 2);
    }

    /// Tells those of the scheduled step that want to hear it how far their prompts are read.
    pub(super) fn tell_read(&mut self, now: Duration) {
        for &(index, _) in &self.scheduled {
            let sequence = &mut self.running[index];
            sequence.tell_read(now);
            sequence.deliver(now);
        }
    }

    /// Takes sequences, given by ascending index, out of the pool: those that are at their end, and those that begin
    /// again.
    pub(crate) fn finish(&mut self, indices: &[(usize, Leaves)], now: Duration) {
        for &(index, leaves) in indices.iter().rev() {
            let sequence = self.release(index);
            match leaves {
                Leaves::ForGood => {
                    self.queue.ended(sequence.owner());
                    self.leave(sequence, now);
                }
                Leaves::ToWait => self.send_back(sequence),
            }
        }
    }

    /// Sends all that run back to wait, before those that wait already: the device has lost their rows. Their tokens
    /// stay, and with them sampler, grammar and stream; their rows are computed again.
    pub(crate) fn requeue(&mut self) {
        self.requeue_on(self.pool.renewed());
    }

    /// As [`requeue`](Self::requeue), for a device with another pool.
    pub(crate) fn requeue_on(&mut self, pool: Pool) {
        while let Some(youngest) = self.running.len().checked_sub(1) {
            let sequence = self.release(youngest);
            self.send_back(sequence);
        }
        self.scheduled.clear();
        // The device's next pool begins with zeroes: there is nothing to discard, and nothing to be found in it.
        self.freed.clear();
        self.archive.forget();
        self.arrivals.clear();
        self.restores.clear();
        self.demotions.forget();
        (self.is_blocked, self.arrivals_wait) = (false, false);
        self.pool = pool;
        self.relief.forget_bounds();
    }

    /// Ends everything with `failure`.
    pub(crate) fn fail_all(&mut self, failure: &Failure, now: Duration) {
        while !self.running.is_empty() {
            let mut sequence = self.release(self.running.len() - 1);
            sequence.fail(failure.clone());
            self.queue.ended(sequence.owner());
            self.leave(sequence, now);
        }
        for mut sequence in self.queue.take_if(|_| true) {
            sequence.fail(failure.clone());
            self.leave(sequence, now);
        }
    }

    /// Blocks that nobody holds any more since the last call: to be discarded before the next step runs. To be given
    /// back, so that no step takes memory for them.
    pub(crate) fn take_freed(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.freed)
    }

    /// As it was taken, whatever became of the blocks.
    pub(crate) fn give_back_freed(&mut self, mut freed: Vec<BlockId>) {
        freed.clear();
        self.freed = freed;
    }

    /// Takes a sequence out of the pool, which keeps what is full and computed.
    pub(super) fn release(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        sequence.hash(&self.hasher);
        sequence.seal(&mut self.pool);
        sequence.save(&mut self.archive, &mut self.pool);
        sequence.leave_pool(&mut self.pool, &mut self.freed);
        sequence
    }

    /// Sends a sequence that ran back to wait.
    pub(super) fn send_back(&mut self, sequence: Sequence) {
        let owner = sequence.owner();
        self.queue.push(sequence);
        self.queue.ended(owner);
    }

    /// A sequence is at its end; it stays until its listener has heard it.
    pub(super) fn leave(&mut self, mut sequence: Sequence, now: Duration) {
        match sequence.end() {
            Some(Event::Finished(finished)) => {
                self.tally.finished(finished);
                self.throughput.answered(finished.usage.completion_tokens);
            }
            _ => self.tally.failed += 1,
        }
        if !sequence.deliver(now) {
            self.leaving.push(sequence);
        }
    }
}
