//! Who is taken, who begins, and who gives way?
//!
//! A request is refused when too many wait or memory is short; it is told when to come again. The next one of the queue
//! begins while there is a place and room for its prompt. Where a step finds no room, the owner that holds more than its
//! share of the blocks gives way first, the least urgent and youngest of its sequences; never the oldest one of all,
//! so somebody always gets to the end.

use super::queue::Admits;
use super::{Scheduler, count};
use crate::api::{Failure, Owner};
use crate::memory::Stage;
use crate::sequence::{Sequence, Vocabulary};
use crate::telemetry::{What, owner_name};
use sparsed_kv::{BLOCK_TOKENS, KvError, blocks_for};
use std::time::Duration;

/// When to come again while memory is short: about as long as it takes to leave a rung of the ladder.
const MEMORY_RETRY_S: u32 = 10;

impl Scheduler {
    /// Queues a request and tells its listener its place, or why it is not taken.
    pub(crate) fn submit(&mut self, mut sequence: Sequence, vocabulary: Vocabulary<'_>, now: Duration) {
        self.relieve(now);
        if let Some((what, failure)) = self.refusal(&sequence) {
            let reason = format!("{}: {failure}", owner_name(sequence.owner()));
            self.decisions.note(what, reason, &mut self.tally, now);
            sequence.fail(failure);
            return self.leave(sequence, now);
        }
        sequence.queued(self.queue.ahead_of(&sequence), now);
        if sequence.resume(vocabulary, now) {
            return self.leave(sequence, now);
        }
        sequence.hash(&self.hasher);
        self.queue.push(sequence);
    }

    /// Why the request is not taken.
    fn refusal(&self, sequence: &Sequence) -> Option<(What, Failure)> {
        let (owner, bounds) = (sequence.owner(), self.pool.bounds());
        let is_too_long = bounds.blocks < self.pool.n_blocks() && blocks_for(sequence.n_pending()) > bounds.blocks;
        if self.relief.stage() == Stage::Refuse || is_too_long {
            let retry_after_s = self.retry_after_s(1).max(MEMORY_RETRY_S);
            return Some((What::MemoryShort, Failure::MemoryShort { retry_after_s }));
        }
        let limit = self.limits.max_waiting;
        if self.queue.n_waiting() >= limit {
            return Some((What::QueueFull, Failure::QueueFull { limit, retry_after_s: self.retry_after_s(1) }));
        }
        let limit = self.limits.per_user_waiting;
        if self.queue.n_waiting_of(owner) >= limit {
            let retry_after_s = self.retry_after_s(self.queue.n_owners());
            return Some((What::UserQueueFull, Failure::UserQueueFull { limit, retry_after_s }));
        }
        None
    }

    /// Seconds until a place in the queue is free where `share` owners have a part of the device.
    fn retry_after_s(&self, share: u32) -> u32 {
        let n_pending = self.queue.waiting().map(|sequence| u64::from(sequence.n_pending())).sum();
        self.throughput.retry_after_s(self.queue.n_waiting(), n_pending, share)
    }

    /// Gives up requests that were to begin before `now`, and the next one if it could not begin though nobody runs.
    pub(super) fn give_up_late(&mut self, now: Duration) {
        if self.queue.waiting().any(|sequence| sequence.is_late(now)) {
            for mut sequence in self.queue.take_if(|sequence| sequence.is_late(now)) {
                let deadline_ms = sequence.urgency().deadline_ms.unwrap_or(0);
                let reason = format!("{}: {deadline_ms} ms are over", owner_name(sequence.owner()));
                self.decisions.note(What::DeadlineMissed, reason, &mut self.tally, now);
                sequence.fail(Failure::DeadlineMissed { deadline_ms });
                self.leave(sequence, now);
            }
        }
        let (bounds, n_blocks) = (self.pool.bounds(), self.pool.n_blocks());
        while bounds.blocks < n_blocks && self.running.is_empty() {
            let Some(next) = self.queue.next(self.admits()) else { return };
            if next.has_begun() || blocks_for(next.n_pending()) <= bounds.blocks {
                return;
            }
            let id = next.id;
            for mut sequence in self.queue.take_if(|sequence| sequence.id == id) {
                let failure = Failure::MemoryShort { retry_after_s: MEMORY_RETRY_S };
                let reason = format!("{}: its prompt does not fit any more", owner_name(sequence.owner()));
                self.decisions.note(What::MemoryShort, reason, &mut self.tally, now);
                sequence.fail(failure);
                self.leave(sequence, now);
            }
        }
    }

    /// Moves waiting sequences into the batch while there is room for their prompts.
    pub(super) fn admit(&mut self, now: Duration) {
        while self.can_admit() {
            let mut sequence = self.queue.take_next(self.admits()).expect("can_admit looked at it");
            if let Some(time) = sequence.start(now) {
                self.tally.queue.add(time.as_secs_f64());
            }
            sequence.adopt_beginning(&mut self.pool);
            self.restores.extend(sequence.ask());
            let at = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(at, sequence);
        }
    }

    /// Which requests may begin now.
    pub(super) fn admits(&self) -> Admits {
        Admits { running_max: self.limits.per_user_running, only_begun: self.relief.stage() >= Stage::Hold }
    }

    /// Whether there is a place and room for the prompt of the sequence that is next.
    pub(super) fn can_admit(&self) -> bool {
        let n_running = count(self.running.len());
        if n_running >= self.relief.running_max() {
            return false;
        }
        let Some(next) = self.queue.next(self.admits()) else { return false };
        let (found, idle) = self.pool.shareable(next.beginning());
        // One more block, so that the first tokens of the answer do not push somebody out at once.
        let needed = blocks_for(next.n_pending()) - found + u32::from(n_running > 0);
        let promised: u32 = self.running.iter().map(|s| s.table.blocks_needed(s.n_pending())).sum();
        // What has begun goes on, if need be alone and beyond what short memory allows.
        needed + idle + promised <= self.pool.n_available() || (n_running == 0 && next.has_begun())
    }

    /// Somebody has to give way for a step. Blocks that only wait to be saved go first; then full ones move to the slow
    /// tier, and meanwhile only those run who need no new block; then a sequence goes back.
    pub(super) fn make_room(&mut self, error: KvError, now: Duration) {
        if self.archive.give_up(&mut self.pool, &mut self.freed) {
            return;
        }
        let moves = matches!(error, KvError::OutOfFast { short, .. } if self.demote(short));
        if moves && !self.without_new_blocks {
            self.without_new_blocks = true;
        } else if self.running.len() > 1 {
            self.preempt(What::Preempt, "the pool is short", now);
        } else if !self.exceed_bounds(now) {
            // A lone sequence fits, unless the slow tier has failed it or the device has none.
            let mut sequence = self.release(0);
            let n_blocks = match error {
                KvError::OutOfFast { fast_max, .. } => (!self.may_be_slow(&sequence)).then_some(fast_max),
                _ => Some(self.pool.n_blocks()),
            };
            sequence.fail(match n_blocks {
                Some(n) => Failure::ContextTooLong { have_tokens: sequence.tokens.len(), max_tokens: n * BLOCK_TOKENS },
                None => Failure::DiskFailed { reason: "the slow tier takes no more".to_owned() },
            });
            self.queue.ended(sequence.owner());
            self.leave(sequence, now);
        }
    }

    /// Sends a running sequence back to wait.
    pub(super) fn preempt(&mut self, what: What, why: &str, now: Duration) {
        let sequence = self.release(self.victim());
        let (owner, n) = (owner_name(sequence.owner()), sequence.tokens.len());
        let reason = format!("{why}: a sequence of {owner} with {n} tokens waits");
        self.decisions.note(what, reason, &mut self.tally, now);
        self.tally.preempted += 1;
        self.send_back(sequence);
    }

    /// Who gives way, of two or more that run.
    fn victim(&self) -> usize {
        let mut shares: Vec<(Owner, usize)> = Vec::new();
        for sequence in &self.running {
            let n = sequence.table.blocks().len();
            match shares.iter_mut().find(|(owner, _)| *owner == sequence.owner()) {
                Some((_, blocks)) => *blocks += n,
                None => shares.push((sequence.owner(), n)),
            }
        }
        let fair = shares.iter().map(|&(_, n)| n).sum::<usize>() / shares.len().max(1);
        let over = shares.iter().filter(|&&(_, n)| n > fair).max_by_key(|&&(_, n)| n).map(|&(owner, _)| owner);
        let urgency = |index: &usize| (self.running[*index].urgency().priority, *index);
        let younger = || 1..self.running.len();
        let of_owner = |index: &usize| over.is_some_and(|owner| self.running[*index].owner() == owner);
        let victim = younger().filter(of_owner).max_by_key(urgency).or_else(|| younger().max_by_key(urgency));
        victim.expect("two or more run")
    }
}
