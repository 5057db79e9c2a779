//! Who runs in the next step? Continuous batching with chunked prefill.
//!
//! Every step carries one token of each running answer and, in the room that is left, pieces of prompts, the oldest
//! first. Blocks for the whole step are reserved before any sequence is touched, so a step never runs out half-way.
//! When the pool is short, a running sequence gives its blocks back and waits again (`admission` says which); its
//! tokens are kept and its rows are computed again later, bit for bit where the device is invariant.
//!
//! Who begins next is for `queue` to say, how large a step may be for `pace`, what is done about short memory for
//! `relief`. A sequence begins with the blocks that an earlier one of the same owner has left for the same tokens.
//!
//! Knows no device, no text and no clock: time is an argument.

mod admission;
mod alike;
#[cfg(feature = "simulation")]
mod audit;
#[cfg(test)]
mod cost;
mod leaving;
mod pace;
mod queue;
mod quota;
mod relief;
mod share;
mod tiers;

pub(crate) use leaving::Leaves;
pub(crate) use pace::Company;
pub use queue::OwnerLoad;
pub(crate) use relief::Footprint;

use crate::batch::{Batch, Rows};
use crate::durable::{IMAGES_MAX, Restore, Restored};
use crate::sequence::{Sequence, Vocabulary};
use crate::telemetry::{Board, Decisions, Tally};
use pace::{Pace, Throughput};
use queue::Queue;
use relief::Relief;
use share::Shares;
use sparsed_kv::{Archive, BLOCK_TOKENS, BlockId, Pool, PrefixHasher, Reservation};
use std::collections::VecDeque;
use std::time::Duration;
use tiers::Demotions;

/// Sequences whose block has become full and is hashed in a step, or two in a block's tokens of those that run where
/// that is more; the others' turn comes in the next steps. A prompt's hashes are made before it is taken up.
const HASHES_PER_STEP: usize = 8;

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
    /// Most sequences of an owner in a step.
    pub per_user_running: u32,
    /// Most requests of an owner that wait.
    pub per_user_waiting: u32,
    /// Most requests of an owner that are under way, of all models and by all doors.
    pub per_user_requests: u32,
    /// Most tokens of an owner's prompts that wait.
    pub per_user_queued_tokens: u64,
    /// Most bytes of KV rows that an owner's sequences hold.
    pub per_user_kv_bytes: u64,
    /// Time per token that running answers keep while prompts are read beside them; `None`: no such time.
    pub tpot_target: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_running: 16,
            max_waiting: 256,
            max_batched_tokens: 256,
            slow_consumer: Duration::from_secs(30),
            slow_stateless: false,
            per_user_running: u32::MAX,
            per_user_waiting: u32::MAX,
            per_user_requests: u32::MAX,
            per_user_queued_tokens: u64::MAX,
            per_user_kv_bytes: u64::MAX,
            tpot_target: None,
        }
    }
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

/// Sequences that wait and run on one device pool.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pool: Pool,
    hasher: PrefixHasher,
    queue: Queue,
    /// Oldest first.
    running: Vec<Sequence>,
    /// Finished, with events not delivered yet; they hold no blocks.
    leaving: Vec<Sequence>,
    /// What the last step carries: index into `running` and tokens.
    scheduled: Vec<(usize, u32)>,
    /// Those whose prompts are read, by what their owners were served.
    prefills: Vec<(u64, usize)>,
    sampled: Vec<usize>,
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
    pace: Pace,
    company: Company,
    shares: Shares,
    throughput: Throughput,
    relief: Relief,
    tally: Tally,
    decisions: Decisions,
}

impl Scheduler {
    /// Takes other limits. The sizes of a step and who may use the slow tier stay: plans and pools were made for them.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        let Limits { max_running, max_batched_tokens, slow_stateless, tpot_target, .. } = self.limits;
        if limits.tpot_target != tpot_target {
            self.pace.set_target(limits.tpot_target);
        }
        self.limits = Limits { max_running, max_batched_tokens, slow_stateless, ..limits };
    }

    pub(crate) fn new(limits: Limits, pool: Pool, hasher: PrefixHasher) -> Self {
        Self {
            limits,
            pool,
            hasher,
            queue: Queue::default(),
            running: Vec::new(),
            leaving: Vec::new(),
            scheduled: Vec::new(),
            prefills: Vec::new(),
            sampled: Vec::new(),
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
            pace: Pace::new(limits.tpot_target, limits.max_batched_tokens),
            company: Company::default(),
            shares: Shares::default(),
            throughput: Throughput::default(),
            relief: Relief::new(limits.max_running),
            tally: Tally::default(),
            decisions: Decisions::default(),
        }
    }

    pub(crate) fn load(&self) -> Load {
        Load {
            running: count(self.running.len()),
            waiting: self.queue.n_waiting(),
            blocks_used: self.pool.n_used(),
            blocks_cached: self.pool.n_kept(),
            blocks_slow: self.pool.n_slow(),
            blocks_total: self.pool.n_blocks(),
        }
    }

    /// Counts since the start.
    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// Shows who waits and runs, and what was decided.
    pub(crate) fn show(&self, board: &mut Board) {
        board.owners.clear();
        board.owners.extend(self.queue.owners());
        board.chunk_tokens = self.pace.chunk(1);
        board.tokens_per_s = self.throughput.tokens_per_s();
        self.show_relief(board);
        self.decisions.show(board);
    }

    /// Whether any sequence could run now, or a block be copied for its file or from it.
    pub(crate) fn has_work(&self) -> bool {
        let can_run = || self.running.iter().any(Sequence::is_ready) || self.can_admit();
        (!self.is_blocked && can_run())
            || self.archive.is_ready()
            || (!self.arrivals.is_empty() && !self.arrivals_wait)
            || self.demotions.has_results()
    }

    /// Whether any listener still has to be served.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.n_waiting() == 0 && self.running.is_empty() && self.leaving.is_empty()
    }

    /// Whether all blocks of sessions are saved that are to be.
    pub(crate) fn is_saved(&self) -> bool {
        self.archive.is_idle()
    }

    /// Whether nothing is under way for anybody: what comes later would be another scheduler's.
    pub(crate) fn is_quiet(&self) -> bool {
        self.is_idle()
            && self.is_saved()
            && self.n_restores == 0
            && self.arrivals.is_empty()
            && !self.demotions.is_under_way()
            && !self.demotions.has_results()
    }

    /// Goes on counting from what the model's last scheduler has counted.
    pub(crate) fn count_on(&mut self, tally: Tally) {
        self.tally = tally;
    }

    /// Fills `batch` with the next step's work. Answers false when there is nothing to do.
    pub(crate) fn schedule(&mut self, batch: &mut Batch, now: Duration) -> bool {
        self.admit(now);
        self.hold_to_quota(now);
        self.adopt_alike();
        (self.is_blocked, self.without_new_blocks) = (false, false);
        loop {
            let blocks = self.plan(now);
            if self.scheduled.is_empty() {
                self.is_blocked = self.without_new_blocks;
                return false;
            }
            match self.pool.reserve(blocks, &mut self.freed) {
                Ok(reservation) => {
                    self.tell_read(now);
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

    /// Notes that the last scheduled step's rows are computed, but for the sequences `failed`, given by index.
    pub(crate) fn computed(&mut self, failed: &[usize], now: Duration) {
        let mut n_may_hash = HASHES_PER_STEP.max(self.scheduled.len() * 2 / BLOCK_TOKENS as usize);
        for &(index, n) in self.scheduled.iter().filter(|(index, _)| !failed.contains(index)) {
            let sequence = &mut self.running[index];
            sequence.computed();
            if n_may_hash > 0 && sequence.hash(&self.hasher) {
                n_may_hash -= 1;
            }
            sequence.seal(&mut self.pool);
            sequence.save(&mut self.archive, &mut self.pool);
            sequence.tell_read(now);
            let (new, again) = sequence.gained(sequence.table.n_tokens() - n);
            self.queue.charge(sequence.owner(), new);
            self.relief.note(new, again);
            self.tally.again_tokens += u64::from(again);
        }
    }

    /// Sequences whose logits the last scheduled step gives, in the order of its rows. To be given back, so that no
    /// step takes memory for them.
    pub(crate) fn take_sampled(&mut self) -> Vec<usize> {
        self.sampled.clear();
        let done = self.scheduled.iter().filter(|&&(index, _)| self.running[index].n_pending() == 0);
        self.sampled.extend(done.map(|&(index, _)| index));
        std::mem::take(&mut self.sampled)
    }

    pub(crate) fn give_back_sampled(&mut self, sampled: Vec<usize>) {
        self.sampled = sampled;
    }

    /// Samples the next token of a sequence from its logits. Answers whether its answer is at its end.
    pub(crate) fn advance(
        &mut self,
        index: usize,
        logits: &mut [f32],
        vocabulary: Vocabulary<'_>,
        now: Duration,
    ) -> bool {
        let sequence = &mut self.running[index];
        let before = sequence.last_token();
        let is_end = sequence.advance(logits, vocabulary, now);
        if let Some(before) = before {
            self.tally.between_tokens.add(now.saturating_sub(before).as_secs_f64());
        } else if let Some(time) = sequence.first_token_after() {
            self.tally.first_token.add(time.as_secs_f64());
            let usage = sequence.usage();
            self.tally.prompt_tokens += u64::from(usage.prompt_tokens);
            self.tally.cached_tokens += u64::from(usage.cached_tokens);
        }
        is_end
    }

    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// The sequence at `place` of the last scheduled step: its index, and how many of its tokens the step carries.
    pub(crate) fn scheduled(&self, place: usize) -> (usize, u32) {
        self.scheduled[place]
    }

    /// Chooses who runs and with how many tokens; answers the new blocks that takes. Each owner has its share of the
    /// step; prompts of the owner that was served least are read first, the oldest of them.
    fn plan(&mut self, now: Duration) -> u32 {
        self.scheduled.clear();
        self.prefills.clear();
        let mut left = self.limits.max_batched_tokens;
        let running = &self.running;
        let ready = || {
            let ready = running.iter().enumerate().filter(|(_, sequence)| sequence.is_ready());
            ready.filter(|&(index, _)| !alike::waits(running, index))
        };
        self.shares.divide(ready().map(|(_, sequence)| (sequence.owner(), sequence.n_pending())), left, now);
        let (without_new_blocks, queue) = (self.without_new_blocks, &self.queue);
        let fits = |sequence: &Sequence, n: u32| !without_new_blocks || sequence.table.blocks_needed(n) == 0;
        for (index, sequence) in ready() {
            match sequence.n_pending() {
                1 if left.min(self.shares.left(sequence.owner())) > 0 && fits(sequence, 1) => {
                    left -= 1;
                    self.shares.spend(sequence.owner(), 1);
                    self.scheduled.push((index, 1));
                }
                0 | 1 => {}
                _ => self.prefills.push((queue.served(sequence.owner()), index)),
            }
        }
        self.prefills.sort_unstable();
        left = left.min(self.pace.chunk(count(self.scheduled.len()) + self.company.n_decodes));
        for &(_, index) in &self.prefills {
            let sequence = &self.running[index];
            let n = sequence.n_pending().min(left).min(self.shares.left(sequence.owner()));
            if n > 0 && fits(sequence, n) {
                left -= n;
                self.shares.spend(sequence.owner(), n);
                self.scheduled.push((index, n));
            }
        }
        self.scheduled.iter().map(|&(index, n)| self.running[index].table.blocks_needed(n)).sum()
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("limits are far below 2^32")
}
