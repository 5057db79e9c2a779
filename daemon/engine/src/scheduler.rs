//! Who runs in the next step? Continuous batching with chunked prefill.
//!
//! Every step carries one token of each running answer and, in the room that is left, pieces of prompts, the oldest
//! first. Blocks for the whole step are reserved before any sequence is touched, so a step never runs out half-way.
//! When the pool is short, the youngest running sequence gives its blocks back and waits again; its tokens are kept and
//! its rows are computed again later, bit for bit where the device is invariant.
//!
//! A sequence begins with the blocks that an earlier one of the same owner has left for the same tokens.
//!
//! Knows no device, no text and no clock: time is an argument.

#[cfg(feature = "simulation")]
mod audit;
mod tiers;

use crate::api::Failure;
use crate::batch::{Batch, Rows};
use crate::durable::{IMAGES_MAX, Restore, Restored};
use crate::sequence::{Sequence, Vocabulary};
use sparsed_kv::{Archive, BLOCK_TOKENS, BlockId, KvError, Pool, PrefixHasher, Reservation, blocks_for};
use std::collections::VecDeque;
use std::time::Duration;
use tiers::Demotions;

/// What the scheduler may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most sequences in a step.
    pub max_running: u32,
    /// Most requests that wait.
    pub max_waiting: u32,
    /// Most tokens in a step.
    pub max_batched_tokens: u32,
    /// How long a listener may not read before its request is given up.
    pub slow_consumer: Duration,
    /// Whether blocks of requests without a session may lie in the slow tier, which is on a disk.
    pub slow_stateless: bool,
}

/// Counts for status pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences in the pool.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Blocks held.
    pub blocks_used: u32,
    /// Blocks that nobody holds, kept for sequences that begin alike.
    pub blocks_cached: u32,
    /// Blocks whose latent plane is in the slow tier.
    pub blocks_slow: u32,
    /// Blocks of the pool.
    pub blocks_total: u32,
}

/// How a sequence leaves the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leaves {
    /// It is at its end.
    ForGood,
    /// Its rows are computed again.
    ToWait,
}

/// Sequences that wait and run on one device pool.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pool: Pool,
    hasher: PrefixHasher,
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
    /// Finished, with events not delivered yet; they hold no blocks.
    leaving: Vec<Sequence>,
    /// What the last step carries: index into `running` and tokens.
    scheduled: Vec<(usize, u32)>,
    freed: Vec<BlockId>,
    slots: Vec<u64>,
    /// Blocks on their way to their sessions' files.
    archive: Archive,
    restores: Vec<Restore>,
    /// Of them, those that are being read.
    n_restores: usize,
    arrivals: VecDeque<Restored>,
    demotions: Demotions,
    /// Nobody can run until a block has moved.
    is_blocked: bool,
    /// Who needs a new block is left out of this step.
    without_new_blocks: bool,
    /// What was read for a sequence has no place until a block has moved.
    arrivals_wait: bool,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits, pool: Pool, hasher: PrefixHasher) -> Self {
        Self {
            limits,
            pool,
            hasher,
            waiting: VecDeque::new(),
            running: Vec::new(),
            leaving: Vec::new(),
            scheduled: Vec::new(),
            freed: Vec::new(),
            slots: Vec::new(),
            archive: Archive::new(IMAGES_MAX),
            restores: Vec::new(),
            n_restores: 0,
            arrivals: VecDeque::new(),
            demotions: Demotions::default(),
            is_blocked: false,
            without_new_blocks: false,
            arrivals_wait: false,
        }
    }

    pub(crate) fn load(&self) -> Load {
        Load {
            running: count(self.running.len()),
            waiting: count(self.waiting.len()),
            blocks_used: self.pool.n_used(),
            blocks_cached: self.pool.n_kept(),
            blocks_slow: self.pool.n_slow(),
            blocks_total: self.pool.n_blocks(),
        }
    }

    /// Queues a request, or tells its listener that too many wait.
    pub(crate) fn submit(&mut self, mut sequence: Sequence, vocabulary: Vocabulary<'_>, now: Duration) {
        let limit = self.limits.max_waiting;
        let ahead = count(self.waiting.len());
        if ahead < limit {
            sequence.queued(ahead, now);
            if sequence.resume(vocabulary, now) {
                return self.leave(sequence, now);
            }
            sequence.hash(&self.hasher);
            self.waiting.push_back(sequence);
            return;
        }
        sequence.fail(Failure::QueueFull { limit, retry_after_s: 1 });
        self.leave(sequence, now);
    }

    /// Whether any sequence could run now, or a block be copied for its file or from it.
    pub(crate) fn has_work(&self) -> bool {
        let can_run = || self.can_admit() || self.running.iter().any(Sequence::is_ready);
        (!self.is_blocked && can_run())
            || self.archive.is_ready()
            || (!self.arrivals.is_empty() && !self.arrivals_wait)
            || self.demotions.has_results()
    }

    /// Whether any listener still has to be served.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.leaving.is_empty()
    }

    /// Whether all blocks of sessions are saved that are to be.
    pub(crate) fn is_saved(&self) -> bool {
        self.archive.is_idle()
    }

    /// Blocks that nobody holds any more since the last call: to be discarded before the next step runs.
    pub(crate) fn take_freed(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.freed)
    }

    /// Delivers what waits, and lets go of sequences whose listener is gone or has not read for too long.
    pub(crate) fn tend(&mut self, now: Duration) {
        // One that was sent back may still have something to deliver.
        self.waiting.retain_mut(|sequence| {
            sequence.deliver(now);
            !sequence.is_abandoned()
        });
        self.leaving.retain_mut(|sequence| !sequence.is_abandoned() && !sequence.deliver(now));
        let limit = self.limits.slow_consumer;
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            sequence.deliver(now);
            if sequence.is_abandoned() {
                self.release(at);
            } else if sequence.parked_for(now) > limit {
                let mut sequence = self.release(at);
                sequence.fail(Failure::SlowConsumer { limit_s: limit.as_secs() });
                self.leave(sequence, now);
            } else {
                at += 1;
            }
        }
        self.leaving.retain(|sequence| sequence.parked_for(now) <= limit * 2);
    }

    /// Fills `batch` with the next step's work. Answers false when there is nothing to do.
    pub(crate) fn schedule(&mut self, batch: &mut Batch, now: Duration) -> bool {
        self.admit(now);
        (self.is_blocked, self.without_new_blocks) = (false, false);
        loop {
            let blocks = self.plan();
            if self.scheduled.is_empty() {
                self.is_blocked = self.without_new_blocks;
                return false;
            }
            match self.pool.reserve(blocks, &mut self.freed) {
                Ok(reservation) => {
                    self.fill(batch, reservation);
                    return true;
                }
                Err(error) => self.make_room(error, now),
            }
        }
    }

    fn fill(&mut self, batch: &mut Batch, mut reservation: Reservation) {
        batch.clear();
        for &(index, n) in &self.scheduled {
            let sequence = &mut self.running[index];
            let first = sequence.table.n_tokens() as usize;
            self.slots.clear();
            sequence.table.append(n, &mut self.pool, &mut reservation, &mut self.slots);
            let rows = if sequence.n_pending() == 0 { Rows::Last } else { Rows::None };
            let tokens = &sequence.tokens[first..first + n as usize];
            batch.push(tokens, &self.slots, &sequence.table, rows);
        }
        self.pool.forfeit(reservation);
    }

    /// Somebody has to give way for a step. Blocks that only wait to be saved go first; then full ones move to the slow
    /// tier, and meanwhile only those run who need no new block; then the youngest sequence goes back.
    fn make_room(&mut self, error: KvError, now: Duration) {
        if self.archive.give_up(&mut self.pool, &mut self.freed) {
            return;
        }
        let moves = matches!(error, KvError::OutOfFast { short, .. } if self.demote(short));
        if moves && !self.without_new_blocks {
            self.without_new_blocks = true;
        } else if self.running.len() > 1 {
            self.preempt();
        } else {
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
            self.leave(sequence, now);
        }
    }

    /// Notes that the last scheduled step's rows are computed, but for the sequences `failed`, given by index.
    pub(crate) fn computed(&mut self, failed: &[usize]) {
        for &(index, _) in self.scheduled.iter().filter(|(index, _)| !failed.contains(index)) {
            self.running[index].seal(&self.hasher, &mut self.pool);
            self.running[index].save(&mut self.archive, &mut self.pool);
        }
    }

    /// Sequences whose logits the last scheduled step gives, in the order of its rows.
    pub(crate) fn sampled(&self) -> Vec<usize> {
        let done = self.scheduled.iter().filter(|&&(index, _)| self.running[index].n_pending() == 0);
        done.map(|&(index, _)| index).collect()
    }

    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Takes sequences, given by ascending index, out of the pool: those that are at their end, and those that begin
    /// again.
    pub(crate) fn finish(&mut self, indices: &[(usize, Leaves)], now: Duration) {
        for &(index, leaves) in indices.iter().rev() {
            let sequence = self.release(index);
            match leaves {
                Leaves::ForGood => self.leave(sequence, now),
                Leaves::ToWait => self.waiting.push_front(sequence),
            }
        }
    }

    /// The sequence at `place` of the last scheduled step: its index, and how many of its tokens the step carries.
    pub(crate) fn scheduled(&self, place: usize) -> (usize, u32) {
        self.scheduled[place]
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
            self.waiting.push_front(sequence);
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
    }

    /// Ends everything with `failure`.
    pub(crate) fn fail_all(&mut self, failure: &Failure, now: Duration) {
        while !self.running.is_empty() {
            let mut sequence = self.release(self.running.len() - 1);
            sequence.fail(failure.clone());
            self.leave(sequence, now);
        }
        for mut sequence in std::mem::take(&mut self.waiting) {
            sequence.fail(failure.clone());
            self.leave(sequence, now);
        }
    }

    /// Moves waiting sequences into the batch while there is room for their prompts.
    fn admit(&mut self, now: Duration) {
        while self.can_admit() {
            let mut sequence = self.waiting.pop_front().expect("can_admit looked at it");
            sequence.start(now);
            sequence.adopt_beginning(&mut self.pool);
            self.restores.extend(sequence.ask());
            let at = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(at, sequence);
        }
    }

    /// Whether there is a place and room for the prompt of the sequence that waits longest.
    fn can_admit(&self) -> bool {
        if count(self.running.len()) >= self.limits.max_running {
            return false;
        }
        let Some(next) = self.waiting.front() else { return false };
        let (found, idle) = self.pool.shareable(next.beginning());
        // One more block, so that the first tokens of the answer do not push somebody out at once.
        let needed = blocks_for(next.n_pending()) - found + u32::from(!self.running.is_empty());
        let promised: u32 = self.running.iter().map(|s| s.table.blocks_needed(s.n_pending())).sum();
        needed + idle + promised <= self.pool.n_available()
    }

    /// Chooses who runs and with how many tokens; answers the new blocks that takes.
    fn plan(&mut self) -> u32 {
        self.scheduled.clear();
        let mut left = self.limits.max_batched_tokens;
        for decodes in [true, false] {
            for (index, sequence) in self.running.iter().enumerate() {
                let pending = sequence.n_pending();
                let n = pending.min(left);
                let fits = !self.without_new_blocks || sequence.table.blocks_needed(n) == 0;
                if sequence.is_ready() && (pending == 1) == decodes && n > 0 && fits {
                    left -= n;
                    self.scheduled.push((index, n));
                }
            }
        }
        self.scheduled.iter().map(|&(index, n)| self.running[index].table.blocks_needed(n)).sum()
    }

    /// Sends the youngest running sequence back to wait.
    fn preempt(&mut self) {
        let youngest = self.running.len().checked_sub(1).expect("somebody holds the blocks");
        let sequence = self.release(youngest);
        self.waiting.push_front(sequence);
    }

    /// Takes a sequence out of the pool.
    fn release(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        sequence.leave_pool(&mut self.pool, &mut self.freed);
        sequence
    }

    fn leave(&mut self, mut sequence: Sequence, now: Duration) {
        if !sequence.deliver(now) {
            self.leaving.push(sequence);
        }
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("limits are far below 2^32")
}
