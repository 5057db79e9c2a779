//! What is a request while it is being answered? Its tokens, its place in the KV pool, its sampler and its listener.

mod answer;
mod figures;
mod parked;

use crate::api::{CacheSalt, Event, Failure, FinishReason, Finished, Generate, Owner, Sink, Turn, Urgency};
use crate::durable::{Durable, Restore};
use crate::likelihood::Likelihoods;
use crate::sampler::Sampler;
use crate::service::Lease;
pub(crate) use answer::retold;
use answer::{Answer, End};
use figures::Times;
use parked::Parked;
use sparsed_kv::{Archive, BLOCK_TOKENS, BlockHash, BlockId, BlockTable, Pool, PrefixHasher, Realm};
use sparsed_model::Tokenizer;
use std::collections::VecDeque;
use std::time::Duration;

/// Times that a sequence's rows are computed again because the slow tier had others: a disk that goes on so is broken.
const SPOILT_MAX: u32 = 4;

/// Order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId(pub(crate) u64);

/// What an answer needs to know of its model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vocabulary<'a> {
    /// The text of each token, if the model has a tokenizer.
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    /// Tokens of prompt and answer together.
    pub(crate) max_context: u32,
}

impl Vocabulary<'_> {
    fn ends(&self, token: u32) -> bool {
        self.tokenizer.is_some_and(|tokenizer| tokenizer.end_tokens().contains(&token))
    }
}

/// A request that waits or runs.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    /// Prompt, then answer. The last one has no KV rows yet while the sequence runs.
    pub(crate) tokens: Vec<u32>,
    pub(crate) table: BlockTable,
    owner: Owner,
    realm: Realm,
    urgency: Urgency,
    /// Tokens that have had rows, at most at a time.
    n_had: u32,
    /// What each full block of `tokens` contains, as far as that was asked.
    hashes: Vec<BlockHash>,
    /// Blocks of the table that are full and computed, and those of them whose content the pool has been told.
    n_full: usize,
    n_sealed: usize,
    /// Times that its rows were not what was written.
    n_spoilt: u32,
    /// Prompt tokens that were there when the sequence was first taken up.
    n_cached: Option<u32>,
    n_prompt: usize,
    /// Of a turn that was cut: its answer's tokens so far.
    resumed: Vec<u32>,
    max_tokens: Option<u32>,
    /// Tokens that prompt and answer may come to, once it was taken.
    n_longest: u32,
    ignore_end: bool,
    sampler: Sampler,
    /// Alternatives of which the listener wants to hear.
    logprobs: Option<u32>,
    /// Whether the listener wants to hear how far it is, and up to where it knows that the prompt is read.
    progress: bool,
    told_read: Option<u32>,
    answer: Answer,
    sink: Box<dyn Sink>,
    /// Sent once the listener has room; at most what one token makes, or what a resumed answer has said before.
    outbox: VecDeque<Event>,
    /// Of a session's turn: its blocks' way to the file and back.
    pub(crate) durable: Option<Durable>,
    parked: Parked,
    times: Times,
    /// Its model stays as long as it does.
    _lease: Option<Lease>,
}

impl std::fmt::Debug for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Tokens are what somebody said: they stay out of logs.
        f.debug_struct("Sequence").field("id", &self.id).field("n_tokens", &self.tokens.len()).finish_non_exhaustive()
    }
}

impl Sequence {
    /// # Panics
    /// When the prompt is empty; the service has checked it.
    pub(crate) fn new(id: SequenceId, request: Generate, sink: Box<dyn Sink>, now: Duration) -> Self {
        assert!(!request.prompt.is_empty(), "a request without a prompt");
        let (durable, resumed) = request.turn.map_or((None, Vec::new()), |turn| {
            let Turn { file, n_saved, resumed, recorder: _ } = turn;
            (Some(Durable::new(file, n_saved)), resumed)
        });
        Self {
            id,
            n_prompt: request.prompt.len(),
            resumed,
            answer: Answer::new(request.reading, request.stops, (request.sampling.seed, request.prompt.len()))
                .ending_with_a_call(request.one_call),
            sampler: Sampler::new(request.sampling, request.grammar, &request.prompt),
            tokens: request.prompt,
            table: BlockTable::new(),
            owner: request.owner,
            realm: Realm::new(request.owner.number(), request.cache_salt.map(CacheSalt::bytes)),
            urgency: request.urgency,
            n_had: 0,
            hashes: Vec::new(),
            n_full: 0,
            n_sealed: 0,
            n_spoilt: 0,
            n_cached: None,
            max_tokens: request.max_tokens,
            n_longest: 0,
            ignore_end: request.ignore_end,
            logprobs: request.logprobs,
            progress: request.progress,
            told_read: None,
            sink,
            outbox: VecDeque::new(),
            durable,
            parked: Parked::default(),
            times: Times { submitted: now, started: None, first_token: None, last_token: now },
            _lease: request.lease,
        }
    }

    pub(crate) fn owner(&self) -> Owner {
        self.owner
    }

    pub(crate) fn urgency(&self) -> Urgency {
        self.urgency
    }

    /// Whether the engine has taken it up before.
    pub(crate) fn has_begun(&self) -> bool {
        self.times.started.is_some()
    }

    /// Whether it should have begun by `now` and has not.
    pub(crate) fn is_late(&self, now: Duration) -> bool {
        let late = |ms| now.saturating_sub(self.times.submitted) >= Duration::from_millis(ms);
        !self.has_begun() && self.urgency.deadline_ms.is_some_and(late)
    }

    /// Notes that all tokens of the table but the first `before` have got rows; answers how many of them are new, and
    /// how many had rows before.
    pub(crate) fn gained(&mut self, before: u32) -> (u32, u32) {
        let n = self.table.n_tokens();
        let new = n.saturating_sub(self.n_had.max(before));
        self.n_had = self.n_had.max(n);
        (new, n - before - new)
    }

    /// Tokens without KV rows: many while the prompt is read, then one.
    pub(crate) fn n_pending(&self) -> u32 {
        count(self.tokens.len()) - self.table.n_tokens()
    }

    /// Hashes of the beginning that could be taken from other sequences: all full blocks, but at least one token is
    /// left to be computed, whose logits give the next.
    pub(crate) fn beginning(&self) -> &[BlockHash] {
        &self.hashes[..self.hashes.len().min((self.tokens.len() - 1) / BLOCK_TOKENS as usize)]
    }

    /// Makes the hashes of the blocks that have become full. Answers whether there were any to make.
    pub(crate) fn hash(&mut self, hasher: &PrefixHasher) -> bool {
        let n_before = self.hashes.len();
        hasher.extend(self.realm, &self.tokens, &mut self.hashes);
        self.hashes.len() > n_before
    }

    /// Takes what the pool has of the sequence's beginning behind the full blocks that are there.
    pub(crate) fn adopt_beginning(&mut self, pool: &mut Pool) {
        let before = self.table.n_tokens();
        let mut table = std::mem::take(&mut self.table);
        let all = table.adopt(self.beginning(), pool);
        self.n_full = table.blocks().len();
        (self.n_sealed, self.table) = (self.n_full, table);
        // Rows that it has had itself come back, or are computed again: they were not there.
        if self.n_had == 0 || self.n_cached.is_none() {
            self.n_cached = Some(self.n_cached.unwrap_or(0) + all - before);
        }
    }

    /// The rows of all tokens in the table are computed.
    pub(crate) fn computed(&mut self) {
        self.n_full = (self.table.n_tokens() / BLOCK_TOKENS) as usize;
    }

    /// Tells the pool what the full blocks contain, as far as their hashes are made.
    pub(crate) fn seal(&mut self, pool: &mut Pool) {
        let hashes = &self.hashes[..self.hashes.len().min(self.n_full)];
        self.table.seal(self.n_sealed, hashes, self.owner.number(), pool);
        self.n_sealed = hashes.len();
    }

    /// Orders those full blocks to be saved that are not in the session's file yet.
    pub(crate) fn save(&mut self, archive: &mut Archive, pool: &mut Pool) {
        let Some(durable) = &mut self.durable else { return };
        let (first, end) = (durable.n_saved() as usize, self.n_sealed);
        if first < end {
            archive.save(durable.file, durable.n_saved(), &self.table.blocks()[first..end], pool);
            durable.saved(count(end));
        }
    }

    /// What is to be read from the session's file before the sequence can go on.
    pub(crate) fn ask(&mut self) -> Option<Restore> {
        let n_wanted = count(self.beginning().len());
        let durable = self.durable.as_mut()?;
        let (first, n) = durable.ask(count(self.table.blocks().len()), n_wanted)?;
        Some(Restore { sequence: self.id, file: durable.file, first, n })
    }

    /// Whether `restore` is what the sequence waits for, and fits where it is now.
    pub(crate) fn has_asked(&self, restore: &Restore) -> bool {
        let is_next = self.table.blocks().len() == restore.first as usize;
        is_next && self.durable.as_ref().is_some_and(|durable| durable.has_asked(restore))
    }

    /// The session's file has nothing more for the sequence.
    pub(crate) fn end_of_file(&mut self) {
        let n_blocks = count(self.table.blocks().len());
        if let Some(durable) = &mut self.durable {
            durable.end_of_file(n_blocks);
        }
    }

    /// The table's blocks are filled from the file: they are sealed, and count as cached.
    pub(crate) fn restored(&mut self, hasher: &PrefixHasher, pool: &mut Pool) {
        self.computed();
        self.hash(hasher);
        self.seal(pool);
        // Only the first time that it is taken up: later its own rows come back.
        if self.times.first_token.is_none() {
            self.n_cached = Some(self.table.n_tokens());
        }
    }

    /// Blocks that are full and computed, from the beginning on, and known to the pool.
    pub(crate) fn sealed_blocks(&self) -> &[BlockId] {
        &self.table.blocks()[..self.n_sealed]
    }

    /// Whether its rows may be computed again because some were not what was written; counted.
    pub(crate) fn may_begin_again(&mut self) -> bool {
        self.n_spoilt += 1;
        self.n_spoilt <= SPOILT_MAX
    }

    /// Gives all blocks back; the tokens stay.
    pub(crate) fn leave_pool(&mut self, pool: &mut Pool, freed: &mut Vec<BlockId>) {
        self.table.truncate(0, pool, freed);
        (self.n_full, self.n_sealed) = (0, 0);
        if let Some(durable) = &mut self.durable {
            durable.leave_pool();
        }
    }

    /// Tells the listener that the request is taken, with `ahead` waiting before it.
    pub(crate) fn queued(&mut self, ahead: u32, now: Duration) {
        self.outbox.push_back(Event::Queued { ahead });
        self.deliver(now);
    }

    /// Notes how long it may get in a context of so many tokens; its answer ends there. What it had said before it was
    /// cut is said again in any case: the context may have been longer then.
    pub(crate) fn bound(&mut self, max_context: u32) {
        let wanted = self.max_tokens.map_or(max_context, |max| count(self.n_prompt).saturating_add(max));
        self.n_longest = wanted.min(max_context).max(count(self.n_prompt + self.resumed.len()));
    }

    /// Whether it was cut, and ends with what it had said: nothing is left to be computed.
    pub(crate) fn is_only_retold(&self) -> bool {
        !self.resumed.is_empty() && self.n_prompt + self.resumed.len() >= self.n_longest as usize
    }

    /// Notes that the engine took the sequence up; the first time counts, and answers the time that it waited. Its
    /// lists of blocks are made as long as they may get, half a byte a token, so that no step has to.
    pub(crate) fn start(&mut self, now: Duration) -> Option<Duration> {
        self.table.expect(self.n_longest);
        self.hashes.reserve_exact(((self.n_longest / BLOCK_TOKENS) as usize).saturating_sub(self.hashes.len()));
        let is_first = !self.has_begun();
        self.times.started.get_or_insert(now);
        is_first.then(|| now.saturating_sub(self.times.submitted))
    }

    /// How the answer has ended, as long as the listener has not heard it.
    pub(crate) fn end(&self) -> Option<&Event> {
        self.outbox.back().filter(|event| matches!(event, Event::Finished(_) | Event::Failed(_)))
    }

    /// Samples the next token from its logits. The events it makes wait in the outbox.
    ///
    /// Answers whether the answer is at its end.
    pub(crate) fn advance(&mut self, logits: &mut [f32], vocabulary: Vocabulary<'_>, now: Duration) -> bool {
        // The sampler changes them in place.
        let likelihoods = self.logprobs.map(|n| (Likelihoods::of(logits), n));
        let token = match self.sampler.next(logits) {
            Ok(token) => token,
            Err(failure) => {
                self.fail(failure);
                return true;
            }
        };
        if let Some((likelihoods, n)) = likelihoods.filter(|_| !vocabulary.ends(token)) {
            let likelihood = likelihoods.tell(token, n, vocabulary.tokenizer);
            self.outbox.push_back(Event::Likelihood(Box::new(likelihood)));
        }
        if self.durable.is_some() {
            self.outbox.push_back(Event::Sampled { token });
        }
        self.take(token, vocabulary, now)
    }

    /// Takes up an answer that was cut: what it has said comes again. Answers whether it had come to its end.
    pub(crate) fn resume(&mut self, vocabulary: Vocabulary<'_>, now: Duration) -> bool {
        for token in std::mem::take(&mut self.resumed) {
            if let Err(failure) = self.sampler.replay(token) {
                self.fail(failure);
                return true;
            }
            if self.take(token, vocabulary, now) {
                return true;
            }
        }
        false
    }

    /// Adds a token to the answer. Answers whether the answer is at its end.
    fn take(&mut self, token: u32, vocabulary: Vocabulary<'_>, now: Duration) -> bool {
        self.tokens.push(token);
        self.times.first_token.get_or_insert(now);
        self.times.last_token = now;
        self.tell_answered();
        let complete = self.sampler.is_complete();
        let ended = (complete || !self.ignore_end) && vocabulary.ends(token);
        let stopped = self.answer.take(token, ended, vocabulary.tokenizer, &mut self.outbox);
        let full = self.tokens.len() >= self.n_longest as usize;
        if !ended && !complete && !stopped && !full {
            return false;
        }
        let is_whole = ended || complete || stopped;
        let end = match stopped {
            true => End::Stopped,
            false if is_whole || self.durable.is_some() => End::Complete,
            false => End::CutOff,
        };
        self.answer.finish(end, &mut self.outbox);
        let reason = match (is_whole, self.answer.has_called()) {
            (true, true) => FinishReason::ToolCalls,
            (true, false) => FinishReason::Stop,
            (false, _) => FinishReason::Length,
        };
        let (stopped_by, usage, timings) = (self.answer.stopped_by(), self.usage(), self.timings());
        self.outbox.push_back(Event::Finished(Finished { reason, stopped_by, usage, timings }));
        true
    }

    /// Ends the sequence with a failure.
    pub(crate) fn fail(&mut self, failure: Failure) {
        self.outbox.push_back(Event::Failed(failure));
    }

    /// Whether it could take part in a step: nothing waits to be delivered, and no block is on its way back.
    pub(crate) fn is_ready(&self) -> bool {
        self.outbox.is_empty() && self.durable.as_ref().is_none_or(|durable| !durable.is_restoring())
    }

    fn n_answered(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("fewer than 2^32 tokens")
}
