//! What has the engine of a model done, and why? Counters, distributions and the last decisions, for status pages.
//!
//! Counting takes no memory: it happens at every step. A decision, which is rare, is a line of the log, a counter, and
//! one of the last few that are shown.

use crate::api::{FinishReason, Finished, Owner, Usage};
use crate::memory::{Pressure, Stage};
use std::collections::VecDeque;
use std::time::Duration;

/// Upper ends of the buckets of a [`Histogram`], in seconds.
pub const BUCKETS_S: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0,
];
/// The same of counts of tokens.
pub const BUCKETS_TOKENS: [f64; BUCKETS_S.len()] =
    [1.0, 2.0, 5.0, 1e1, 2e1, 5e1, 1e2, 2e2, 5e2, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6];
/// Refusals of a kind are told once in so long a time: who floods the daemon does not flood the log as well.
const REFUSALS_APART: Duration = Duration::from_secs(1);
/// Decisions that are remembered.
const RECENT_MAX: usize = 16;

/// A distribution of times, or of counts of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Per entry of [`BUCKETS_S`] or [`BUCKETS_TOKENS`], how many were within it and above the one before; the last:
    /// above all.
    pub counts: [u64; BUCKETS_S.len() + 1],
    /// Sum in seconds or tokens.
    pub sum: f64,
}

impl Histogram {
    /// All that were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Counts a time.
    pub fn add(&mut self, time_s: f64) {
        self.put(&BUCKETS_S, time_s);
    }

    /// Counts so many tokens.
    pub fn add_tokens(&mut self, n: u32) {
        self.put(&BUCKETS_TOKENS, n.into());
    }

    fn put(&mut self, ends: &[f64; BUCKETS_S.len()], value: f64) {
        self.counts[ends.partition_point(|&end| end < value)] += 1;
        self.sum += value;
    }
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Tokens of prompts whose answer has begun.
    pub prompt_tokens: u64,
    /// Of them, those whose rows were there already.
    pub cached_tokens: u64,
    /// Answers by their end: `stop`, `length`, `tool_calls`.
    pub finished: [u64; 3],
    /// Requests that ended without an answer, or with a part of it.
    pub failed: u64,
    /// Sequences that gave their blocks back and waited.
    pub preempted: u64,
    /// Tokens whose rows a sequence had before, and which were computed or restored again.
    pub again_tokens: u64,
    /// Tokens whose rows came from a session's file.
    pub restored_tokens: u64,
    /// Blocks that were copied for a session's file.
    pub saved_blocks: u64,
    /// Blocks that moved to the slow tier.
    pub demoted_blocks: u64,
    /// Decisions by [`What`].
    pub decisions: [u64; What::ALL.len()],
    /// From a request's arrival to the engine taking it up.
    pub queue: Histogram,
    /// From a request's arrival to its first token.
    pub first_token: Histogram,
    /// Of an answer that is complete, from the engine taking it up to its first token.
    pub prefill: Histogram,
    /// Of one, from its first token to the last.
    pub decode: Histogram,
    /// Of an answer, the mean time between two tokens.
    pub per_token: Histogram,
    /// Between two tokens of an answer, each time.
    pub between_tokens: Histogram,
    /// Of an answer that is complete, from the engine taking it up to the last token.
    pub inference: Histogram,
    /// From a request's arrival to its end.
    pub whole: Histogram,
    /// Tokens of the prompt of an answer that is complete.
    pub prompt_length: Histogram,
    /// Tokens of the answer.
    pub answer_length: Histogram,
    /// Most tokens that a prompt and its answer had together.
    pub longest_tokens: u32,
    /// Sequences of all steps together.
    pub step_sequences: u64,
}

impl Tally {
    /// Counts an answer that is complete.
    pub fn finished(&mut self, finished: &Finished) {
        let timings = finished.timings;
        let index = match finished.reason {
            FinishReason::Stop => 0,
            FinishReason::Length => 1,
            FinishReason::ToolCalls => 2,
        };
        self.finished[index] += 1;
        let Usage { prompt_tokens, completion_tokens, .. } = finished.usage;
        self.prompt_length.add_tokens(prompt_tokens);
        self.answer_length.add_tokens(completion_tokens);
        self.longest_tokens = self.longest_tokens.max(prompt_tokens.saturating_add(completion_tokens));
        self.inference.add((timings.prompt_ms + timings.predicted_ms) / 1e3);
        self.whole.add((timings.queue_ms + timings.prompt_ms + timings.predicted_ms) / 1e3);
        self.prefill.add(timings.prompt_ms / 1e3);
        self.decode.add(timings.predicted_ms / 1e3);
        let n_gaps = completion_tokens.saturating_sub(1);
        if n_gaps > 0 {
            self.per_token.add(timings.predicted_ms / 1e3 / f64::from(n_gaps));
        }
    }
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A further response to short memory.
    Climb,
    /// One response less.
    Descend,
    /// The pool may hold fewer blocks, or more again.
    Bound,
    /// A sequence gives its blocks back for another one.
    Preempt,
    /// A sequence gives its blocks back because memory is short.
    Spill,
    /// Fewer sequences may run, or more again, because of work that is done again.
    Thrash,
    /// A request is refused: too many wait.
    QueueFull,
    /// A request is refused: too many of its owner wait.
    UserQueueFull,
    /// A request is refused: prompts of its owner that wait have too many tokens.
    UserTokensFull,
    /// A request is refused, or ended: it needs more of the KV cache than its owner may have.
    UserKvFull,
    /// A request is refused: memory is short.
    MemoryShort,
    /// A request could not begin in time.
    DeadlineExceeded,
}

impl What {
    /// All, in the order of [`Tally::decisions`].
    pub const ALL: [Self; 12] = [
        Self::Climb,
        Self::Descend,
        Self::Bound,
        Self::Preempt,
        Self::Spill,
        Self::Thrash,
        Self::QueueFull,
        Self::UserQueueFull,
        Self::UserTokensFull,
        Self::UserKvFull,
        Self::MemoryShort,
        Self::DeadlineExceeded,
    ];

    fn is_refusal(self) -> bool {
        use What::{DeadlineExceeded, MemoryShort, QueueFull, UserKvFull, UserQueueFull, UserTokensFull};
        matches!(self, QueueFull | UserQueueFull | UserTokensFull | UserKvFull | MemoryShort | DeadlineExceeded)
    }

    /// One word, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Climb => "climb",
            Self::Descend => "descend",
            Self::Bound => "bound",
            Self::Preempt => "preempt",
            Self::Spill => "spill",
            Self::Thrash => "thrash",
            Self::QueueFull => "queue_full",
            Self::UserQueueFull => "user_queue_full",
            Self::UserTokensFull => "user_tokens_full",
            Self::UserKvFull => "user_kv_full",
            Self::MemoryShort => "memory_short",
            Self::DeadlineExceeded => "deadline_exceeded",
        }
    }
}

/// A decision that was made.
#[derive(Clone, Debug)]
pub struct Decision {
    /// When, since the engine's start.
    pub at: Duration,
    /// What.
    pub what: What,
    /// Whose request it is about; `None`: nobody's in particular.
    pub owner: Option<Owner>,
    /// Why, and what follows.
    pub reason: String,
}

/// Counts an owner's requests.
pub use crate::scheduler::OwnerLoad;

/// What a model's scheduler looks like.
#[derive(Clone, Debug, Default)]
pub struct Board {
    /// Who has requests.
    pub owners: Vec<OwnerLoad>,
    /// How short memory is.
    pub pressure: Pressure,
    /// What is done about it.
    pub stage: Stage,
    /// Bytes that the process may take beside what it has, at the last look.
    pub headroom_bytes: i64,
    /// Blocks that may be in use.
    pub blocks_max: u32,
    /// Sequences that may run.
    pub running_max: u32,
    /// Tokens of prompts that a step beside running answers carries at most.
    pub chunk_tokens: u32,
    /// Tokens in a second, lately.
    pub tokens_per_s: f64,
    /// The last decisions, the oldest first.
    pub decisions: VecDeque<Decision>,
    n_decided: u64,
}

/// The last decisions of a scheduler.
#[derive(Debug, Default)]
pub(crate) struct Decisions {
    recent: VecDeque<Decision>,
    n_decided: u64,
}

impl Decisions {
    /// Notes a decision about a request of `owner`'s, or about all: a line of the log, a counter, one of the last few.
    /// Of refusals that follow close upon another only the counter.
    pub(crate) fn note(&mut self, what: What, owner: Option<Owner>, reason: String, tally: &mut Tally, now: Duration) {
        let index = What::ALL.iter().position(|&other| other == what).expect("all are listed");
        tally.decisions[index] += 1;
        let mut told = self.recent.iter().rev().take_while(|last| now.saturating_sub(last.at) < REFUSALS_APART);
        if what.is_refusal() && told.any(|last| last.what == what) {
            return;
        }
        log::info!(decision = what.name(), reason:% = reason; "decided");
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(Decision { at: now, what, owner, reason });
        self.n_decided += 1;
    }

    /// Shows the decisions on `board`, if there are new ones.
    pub(crate) fn show(&self, board: &mut Board) {
        if board.n_decided != self.n_decided {
            board.decisions.clone_from(&self.recent);
            board.n_decided = self.n_decided;
        }
    }
}

/// What an owner is called in logs.
pub(crate) fn owner_name(owner: Owner) -> String {
    match owner {
        Owner::Uid(uid) => format!("uid {uid}"),
        Owner::Named(_) => format!("owner {:016x}", owner.number()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_first_bucket_that_holds_it() {
        let mut histogram = Histogram::default();
        [0.0, 0.001, 0.0011, 641.0].iter().for_each(|&time| histogram.add(time));
        assert_eq!((histogram.counts[0], histogram.counts[1], histogram.counts[20], histogram.count()), (2, 1, 1, 4));
        assert!((histogram.sum - 641.0021).abs() < 1e-9);
    }

    #[test]
    fn ends_of_buckets_go_up() {
        for ends in [BUCKETS_S, BUCKETS_TOKENS] {
            assert!(ends.is_sorted_by(|low, high| low < high), "{ends:?}");
        }
        let mut lengths = Histogram::default();
        [1, 2, 3, u32::MAX].iter().for_each(|&n| lengths.add_tokens(n));
        assert_eq!((lengths.counts[..3].to_vec(), lengths.counts[20]), (vec![1, 1, 1], 1));
    }

    #[test]
    fn refusals_that_follow_close_are_counted_and_not_told() {
        let (mut decisions, mut tally, mut board) = (Decisions::default(), Tally::default(), Board::default());
        for n in 0..20 {
            decisions.note(What::QueueFull, None, n.to_string(), &mut tally, Duration::from_millis(100 * n));
        }
        decisions.show(&mut board);
        assert_eq!(board.decisions.iter().map(|d| d.reason.as_str()).collect::<Vec<_>>(), ["0", "10"]);
        assert_eq!(tally.decisions[6], 20);
    }

    #[test]
    fn the_last_decisions_are_shown_and_all_are_counted() {
        let (mut decisions, mut tally, mut board) = (Decisions::default(), Tally::default(), Board::default());
        for n in 0..20 {
            decisions.note(What::Preempt, None, n.to_string(), &mut tally, Duration::from_secs(n));
        }
        decisions.show(&mut board);
        assert_eq!((board.decisions.len(), board.decisions[0].reason.as_str()), (16, "4"));
        assert_eq!(tally.decisions[3], 20);
    }
}
