//! What is one step? Schedule, run, sample, deliver.

use crate::api::Failure;
use crate::attempt::{Executor, compute, discard};
use crate::batch::Batch;
use crate::executor::ExecutorError;
use crate::scheduler::Scheduler;
use crate::sequence::Vocabulary;
use std::time::Duration;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    /// Tokens that went through the model; none when the step failed for all its sequences.
    pub(crate) computed: usize,
    /// Tokens that were sampled.
    pub(crate) sampled: usize,
}

/// Runs one step. Answers `None` when there was nothing to do.
///
/// # Errors
/// Only when the device is of no more use as it is. Nothing of the step is done then; the sequences are as they were
/// but for rows that the device was to hold. A sequence that fails alone has heard of it, and the answer is `Ok`.
pub(crate) fn step(
    scheduler: &mut Scheduler,
    executor: &mut dyn Executor,
    batch: &mut Batch,
    vocabulary: Vocabulary<'_>,
    clock: &dyn Fn() -> Duration,
) -> Result<Option<Done>, ExecutorError> {
    scheduler.tend(clock());
    let scheduled = scheduler.schedule(batch, clock());
    let freed = scheduler.take_freed();
    if !freed.is_empty() {
        discard(executor, &freed)?;
    }
    if !scheduled {
        return Ok(None);
    }
    let mut computed = compute(executor, batch)?;
    let now = clock();
    let mut finished = Vec::new();
    let mut n_failed_tokens = 0;
    for (place, error) in computed.failed {
        log::error!(reason:% = error; "step failed for a sequence alone, which ends");
        let (index, n_tokens) = scheduler.scheduled(place);
        scheduler.running_mut(index).fail(Failure::BackendFailed { reason: error.to_string() });
        finished.push(index);
        n_failed_tokens += n_tokens as usize;
    }
    scheduler.computed(&finished);
    let sampled: Vec<usize> = scheduler.sampled().into_iter().filter(|index| !finished.contains(index)).collect();
    let vocab = computed.logits.len().checked_div(sampled.len()).unwrap_or(0);
    for (&index, logits) in sampled.iter().zip(computed.logits.chunks_exact_mut(vocab.max(1))) {
        if scheduler.running_mut(index).advance(logits, vocabulary, now) {
            finished.push(index);
        }
    }
    finished.sort_unstable();
    scheduler.finish(&finished, now);
    scheduler.tend(now);
    Ok(Some(Done { computed: batch.n_tokens() - n_failed_tokens, sampled: sampled.len() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Event, FinishReason, Generate, Owner, Refused, Sink, Usage};
    use crate::executor::Outputs;
    use crate::scheduler::Limits;
    use crate::sequence::{Sequence, SequenceId};
    use crate::{Grammar, Sampling, params};
    use proptest::prelude::*;
    use sparsed_abi::{E_DATA, E_DEVICE_LOST, E_INTERNAL, E_NOMEM_DEVICE, E_QUEUE_LOST, E_STEP, SpdStatus};
    use sparsed_backend::BackendError;
    use sparsed_kv::{BLOCK_TOKENS, BlockId, PrefixHasher};
    use std::cell::Cell;
    use std::collections::{BTreeSet, HashMap};
    use std::sync::{Arc, Mutex};

    const VOCAB: usize = 97;
    const BLOCK: usize = BLOCK_TOKENS as usize;
    const CONTEXT: u32 = 400;

    /// A "model" whose next token is a function of the whole history, which it reads back through the block tables:
    /// a block that is lost, shared by mistake or not rewritten shows in the answer.
    #[derive(Default)]
    struct Paged {
        /// Token and position of each slot.
        rows: HashMap<u64, (u32, u32)>,
        /// Statuses of the next runs, the last one first; 0 is none.
        failures: Vec<SpdStatus>,
        /// A token that no step with it survives.
        poison: Option<u32>,
        /// A token after which the logits are no numbers, how often.
        not_a_number: Option<(u32, usize)>,
        /// Since a queue was lost, until there is a new one.
        poisoned: bool,
        /// Answers when it is examined, the last one first; with none left it proves to be of no use.
        patience: Vec<bool>,
        examined: usize,
        runs: usize,
        computed: usize,
    }

    fn next_token(history: impl Iterator<Item = u32>) -> u32 {
        history.fold(7u32, |hash, token| (hash.wrapping_mul(31) ^ token) % 1_000_003) % VOCAB as u32
    }

    impl Executor for Paged {
        fn run(&mut self, batch: &Batch) -> Result<Outputs, ExecutorError> {
            self.runs += 1;
            self.computed += batch.n_tokens();
            let planted = self.failures.pop().filter(|&status| status != 0);
            let poison = self.poison.is_some_and(|token| batch.tokens.contains(&token)).then_some(E_STEP);
            let poisoned = self.poisoned.then_some(E_QUEUE_LOST);
            if let Some(status) = poisoned.or(planted).or(poison) {
                self.poisoned |= status == E_QUEUE_LOST;
                let (call, message) = ("queue_run", "planted".to_owned());
                return Err(ExecutorError::Backend(BackendError::refused(call, status, message)));
            }
            for ((&slot, &token), &position) in batch.slots.iter().zip(&batch.tokens).zip(&batch.positions) {
                self.rows.insert(slot, (token, position));
            }
            let mut logits = vec![0.0; batch.rows.len() * VOCAB];
            for (row, logits) in batch.rows.iter().zip(logits.chunks_exact_mut(VOCAB)) {
                let sequence = batch.seq_offsets.iter().rposition(|&start| start <= *row).unwrap();
                let blocks = batch.block_offsets[sequence] as usize..batch.block_offsets[sequence + 1] as usize;
                let blocks = &batch.block_ids[blocks];
                let history = (0..=batch.positions[*row as usize]).map(|position| {
                    let slot = u64::from(blocks[position as usize / BLOCK]) * BLOCK as u64 + u64::from(position) % 64;
                    let (token, written_at) = self.rows[&slot];
                    assert_eq!(written_at, position, "the slot holds another position");
                    token
                });
                logits[next_token(history) as usize] = 1.0;
                if let Some((token, times)) = &mut self.not_a_number
                    && *times > 0
                    && batch.tokens[*row as usize] == *token
                {
                    *times -= 1;
                    logits[0] = f32::NAN;
                }
            }
            Ok(Outputs { logits, ..Outputs::default() })
        }

        fn discard(&mut self, blocks: &[BlockId]) -> Result<(), ExecutorError> {
            self.rows.retain(|slot, _| !blocks.iter().any(|block| u64::from(block.0) == slot / BLOCK as u64));
            Ok(())
        }

        fn renew_queue(&mut self) -> Result<(), ExecutorError> {
            self.poisoned = false;
            Ok(())
        }

        fn examine(&mut self, _is_call: bool) -> Result<bool, ExecutorError> {
            self.examined += 1;
            match self.patience.pop() {
                Some(left) => Ok(left),
                None => Err(ExecutorError::Unfit { reason: "planted".to_owned() }),
            }
        }
    }

    /// What a test's listener has heard, and how much more it takes.
    #[derive(Clone, Default)]
    struct Listener(Arc<Mutex<(Vec<Event>, usize, bool)>>);

    impl Listener {
        fn with_room(room: usize) -> Self {
            Self(Arc::new(Mutex::new((Vec::new(), room, false))))
        }

        fn set(&self, room: usize, gone: bool) {
            let mut state = self.0.lock().unwrap();
            (state.1, state.2) = (room, gone);
        }

        fn heard(&self) -> (Vec<u32>, Option<Event>) {
            let events = self.0.lock().unwrap().0.clone();
            let tokens = events.iter().filter_map(|event| match event {
                Event::Delta { tokens, .. } => Some(tokens.clone()),
                _ => None,
            });
            let end = events.iter().find(|event| !matches!(event, Event::Queued { .. } | Event::Delta { .. })).cloned();
            (tokens.flatten().collect(), end)
        }
    }

    impl Sink for Listener {
        fn offer(&mut self, event: Event) -> Result<(), Refused> {
            let mut state = self.0.lock().unwrap();
            match *state {
                (_, _, true) => Err(Refused::Closed),
                (_, 0, _) => Err(Refused::Full(event)),
                _ => {
                    state.1 -= 1;
                    state.0.push(event);
                    Ok(())
                }
            }
        }

        fn is_closed(&self) -> bool {
            self.0.lock().unwrap().2
        }
    }

    struct Bench {
        scheduler: Scheduler,
        executor: Paged,
        batch: Batch,
        now: Cell<Duration>,
        submitted: u64,
    }

    impl Bench {
        fn new(n_blocks: u32, limits: Limits) -> Self {
            let hasher = PrefixHasher::new([7; 32]);
            let executor = Paged { patience: vec![false; 1000], ..Paged::default() };
            let scheduler = Scheduler::new(limits, n_blocks, hasher);
            Self { scheduler, executor, batch: Batch::default(), now: Cell::default(), submitted: 0 }
        }

        fn submit(&mut self, prompt: Vec<u32>, max_tokens: u32, listener: &Listener) {
            self.submit_under(None, prompt, max_tokens, listener);
        }

        fn submit_under(&mut self, grammar: Option<Grammar>, prompt: Vec<u32>, max_tokens: u32, listener: &Listener) {
            self.submit_of(Owner::Uid(1000), grammar, prompt, max_tokens, listener);
        }

        fn submit_of(&mut self, owner: Owner, grammar: Option<Grammar>, prompt: Vec<u32>, max: u32, to: &Listener) {
            let request = Generate {
                model: "m".to_owned(),
                owner,
                prompt,
                max_tokens: Some(max),
                sampling: Sampling { temperature: 0.0, ..Sampling::default() },
                grammar,
                stops: params::checked_stops(Vec::new()).unwrap(),
                ignore_end: false,
                reading: None,
            };
            let id = SequenceId(self.submitted);
            self.submitted += 1;
            let sequence = Sequence::new(id, request, Box::new(to.clone()), self.now.get());
            self.scheduler.submit(sequence, self.now.get());
        }

        fn step(&mut self) -> Option<Done> {
            self.try_step().unwrap()
        }

        fn try_step(&mut self) -> Result<Option<Done>, ExecutorError> {
            let vocabulary = Vocabulary { tokenizer: None, max_context: CONTEXT };
            let clock = || self.now.get();
            step(&mut self.scheduler, &mut self.executor, &mut self.batch, vocabulary, &clock)
        }

        /// As `run`, on a new device whenever one is lost; answers how many were.
        fn run_on_devices(&mut self) -> usize {
            let mut n_lost = 0;
            for _ in 0..10_000 {
                match self.try_step() {
                    Ok(None) if self.scheduler.is_idle() => return n_lost,
                    Ok(_) => {}
                    Err(_) => {
                        n_lost += 1;
                        self.executor.rows.clear();
                        self.executor.poisoned = false;
                        self.scheduler.requeue();
                    }
                }
                self.now.set(self.now.get() + Duration::from_millis(1));
            }
            panic!("the engine does not come to rest");
        }

        fn steps(&mut self, n: usize) {
            for _ in 0..n {
                self.step();
            }
        }

        fn run(&mut self) {
            for _ in 0..10_000 {
                if self.step().is_none() && self.scheduler.is_idle() {
                    return;
                }
                self.now.set(self.now.get() + Duration::from_millis(1));
            }
            panic!("the engine does not come to rest");
        }
    }

    fn limits() -> Limits {
        let slow_consumer = Duration::from_millis(50);
        Limits { max_running: 4, max_waiting: 8, max_batched_tokens: 48, slow_consumer }
    }

    fn prompt(seed: u32, n: u32) -> Vec<u32> {
        (0..n).map(|i| (seed * 13 + i * 7) % VOCAB as u32).collect()
    }

    /// The answer of a model without batches, blocks or schedules.
    fn naive(mut tokens: Vec<u32>, n: u32) -> Vec<u32> {
        let start = tokens.len();
        for _ in 0..n.min(CONTEXT - start as u32) {
            tokens.push(next_token(tokens.iter().copied()));
        }
        tokens.split_off(start)
    }

    #[test]
    fn eight_requests_share_steps_and_each_gets_its_own_answer() {
        let mut bench = Bench::new(32, Limits { max_running: 8, ..limits() });
        let listeners: Vec<Listener> = (0..8).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 10 + seed), 20, listener);
        }
        bench.run();
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 10 + seed), 20), "request {seed}");
        }
        // 108 prompt tokens in steps of 48, and 20 tokens each: alone they would take 8 x 20 steps.
        assert!(bench.executor.runs < 30, "{} steps", bench.executor.runs);
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }

    #[test]
    fn a_short_pool_sends_the_youngest_back_and_loses_nothing() {
        let mut bench = Bench::new(4, limits()); // 256 tokens for three that grow to 130 each
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 50), 80, listener);
        }
        bench.run();
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 50), 80), "request {seed}");
        }
    }

    #[test]
    fn a_grammar_goes_on_where_it_was_when_a_sequence_is_computed_again() {
        let answers = |n_blocks: u32| {
            let mut bench = Bench::new(n_blocks, limits());
            let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
            for (seed, listener) in (0..).zip(&listeners) {
                let grammar = Grammar::over_bytes("start: (/[ -@]/ /[A-_]/)*");
                bench.submit_under(Some(grammar), prompt(seed, 50), 80, listener);
            }
            bench.run();
            let answers: Vec<Vec<u32>> = listeners.iter().map(|listener| listener.heard().0).collect();
            (answers, bench.executor.computed)
        };
        let (short, again) = answers(4); // 256 tokens for three that grow to 130 each
        let (roomy, once) = answers(32);
        assert!(again > once, "nothing was computed again");
        assert_eq!(short, roomy);
        for answer in short {
            assert_eq!(answer.len(), 80);
            assert!(answer.chunks(2).all(|pair| (32..=64).contains(&pair[0]) && (65..=95).contains(&pair[1])));
        }
    }

    #[test]
    fn a_listener_that_goes_away_frees_its_blocks() {
        let mut bench = Bench::new(8, limits());
        let listener = Listener::with_room(1000);
        bench.submit(prompt(1, 100), 200, &listener);
        (0..10).for_each(|_| assert!(bench.step().is_some()));
        assert_eq!(bench.scheduler.load().blocks_used, 2);
        listener.set(0, true);
        assert_eq!(bench.step(), None);
        assert_eq!(bench.scheduler.load(), crate::Load { blocks_cached: 1, blocks_total: 8, ..crate::Load::default() });
        assert_eq!(bench.executor.rows.len(), BLOCK, "of two blocks the full one is kept, the other discarded");
    }

    #[test]
    fn a_slow_listener_pauses_only_itself_and_is_given_up_in_the_end() {
        let mut bench = Bench::new(8, limits());
        let (slow, quick) = (Listener::with_room(4), Listener::with_room(1000));
        bench.submit(prompt(1, 5), 40, &slow);
        bench.submit(prompt(2, 5), 40, &quick);
        bench.steps(45);
        assert_eq!(quick.heard().0, naive(prompt(2, 5), 40));
        assert_eq!(slow.heard().0.len(), 3);
        slow.set(10, false);
        bench.steps(20);
        assert_eq!(slow.heard().0, naive(prompt(1, 5), 40)[..13]);
        bench.now.set(bench.now.get() + Duration::from_millis(51));
        bench.step();
        assert_eq!(bench.scheduler.load().running, 0);
        slow.set(10, false);
        bench.step();
        assert!(matches!(slow.heard().1, Some(Event::Failed(Failure::SlowConsumer { .. }))));
        assert!(bench.scheduler.is_idle());
    }

    #[test]
    fn an_engine_whose_only_sequence_is_paused_has_nothing_to_do() {
        let mut bench = Bench::new(8, Limits { max_running: 1, ..limits() });
        bench.submit(prompt(1, 5), 40, &Listener::with_room(3));
        bench.submit(prompt(2, 5), 40, &Listener::with_room(1000));
        bench.steps(5);
        assert!(!bench.scheduler.has_work() && !bench.scheduler.is_idle());
    }

    #[test]
    fn one_request_too_many_is_told_so_and_the_others_are_answered() {
        let mut bench = Bench::new(8, Limits { max_waiting: 2, ..limits() });
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(100)).collect();
        for listener in &listeners {
            bench.submit(prompt(1, 5), 3, listener);
        }
        bench.run();
        assert!(matches!(listeners[2].heard().1, Some(Event::Failed(Failure::QueueFull { limit: 2, .. }))));
        assert!(matches!(listeners[1].heard().1, Some(Event::Finished(_))));
    }

    #[test]
    fn answers_end_at_max_tokens_and_at_the_end_of_the_context() {
        let mut bench = Bench::new(8, limits());
        let (short, long) = (Listener::with_room(1000), Listener::with_room(1000));
        bench.submit(prompt(1, 5), 7, &short);
        bench.submit(prompt(2, CONTEXT - 5), 100, &long);
        bench.run();
        for (listener, n) in [(short, 7), (long, 5)] {
            let (tokens, end) = listener.heard();
            let Some(Event::Finished(finished)) = end else { panic!("{end:?}") };
            assert_eq!((tokens.len(), finished.usage.completion_tokens), (n, n as u32));
            assert_eq!(finished.reason, FinishReason::Length);
        }
    }

    #[test]
    fn a_failed_step_is_tried_again_and_then_fails_its_requests_only() {
        let mut bench = Bench::new(8, limits());
        let (first, second) = (Listener::with_room(100), Listener::with_room(100));
        bench.submit(prompt(1, 5), 3, &first);
        bench.executor.failures = vec![E_STEP];
        bench.run();
        assert_eq!(first.heard().0, naive(prompt(1, 5), 3));
        bench.submit(prompt(2, 5), 3, &second);
        bench.executor.failures = vec![E_STEP; 2];
        bench.run();
        assert!(matches!(second.heard().1, Some(Event::Failed(Failure::BackendFailed { .. }))));
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }

    /// Three requests of which the second is bad, run to the end; answers how the second ended.
    fn one_bad_among_three(bench: &mut Bench) -> (Vec<u32>, Option<Event>) {
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
        for (listener, first) in listeners.iter().zip([1, BAD, 2]) {
            bench.submit([vec![first], vec![3; 9]].concat(), 30, listener);
        }
        bench.run();
        for (listener, first) in [(&listeners[0], 1), (&listeners[2], 2)] {
            assert_eq!(listener.heard().0, naive([vec![first], vec![3; 9]].concat(), 30));
        }
        assert_eq!(bench.scheduler.load().blocks_used, 0);
        listeners[1].heard()
    }

    /// A token that no answer of [`one_bad_among_three`] has.
    const BAD: u32 = 96;

    #[test]
    fn a_poisoned_sequence_ends_alone_and_its_company_goes_on() {
        let mut bench = Bench::new(8, limits());
        bench.executor.poison = Some(BAD);
        let (tokens, end) = one_bad_among_three(&mut bench);
        assert!(tokens.is_empty() && matches!(end, Some(Event::Failed(Failure::BackendFailed { .. }))), "{end:?}");
        // Twice together; then one, the bad one twice, and one; then 29 steps for the tokens that follow.
        assert_eq!(bench.executor.runs, 2 + 4 + 29);
    }

    #[test]
    fn only_a_step_that_fails_for_all_has_its_device_examined() {
        let mut bench = Bench::new(8, limits());
        bench.executor.poison = Some(BAD);
        one_bad_among_three(&mut bench);
        assert_eq!(bench.executor.examined, 0);
        let alone = Listener::with_room(100);
        bench.submit(vec![BAD; 3], 3, &alone);
        bench.run();
        assert_eq!(bench.executor.examined, 1);
        assert!(matches!(alone.heard().1, Some(Event::Failed(Failure::BackendFailed { .. }))));
    }

    #[test]
    fn nobodys_answer_is_lost_to_a_device_that_fails_at_every_step() {
        let mut bench = Bench::new(8, limits());
        let listeners: Vec<Listener> = (0..2).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (1..).zip(&listeners) {
            bench.submit(prompt(seed, 5), 20, listener);
        }
        bench.steps(4);
        // Three attempts at a step of two sequences, each twice together and twice alone.
        bench.executor.failures = vec![E_STEP; 3 * (2 + 2 * 2)];
        bench.executor.patience = vec![true; 2];
        assert!(matches!(bench.try_step(), Err(ExecutorError::Unfit { .. })));
        assert_eq!(bench.executor.examined, 3);
        bench.scheduler.requeue();
        bench.executor.rows.clear();
        bench.run();
        for (seed, listener) in (1..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 5), 20));
        }
    }

    #[test]
    fn a_row_that_is_no_number_ends_its_sequence_alone() {
        let mut bench = Bench::new(8, limits());
        bench.executor.not_a_number = Some((BAD, usize::MAX));
        let listeners: Vec<Listener> = (0..2).map(|_| Listener::with_room(1000)).collect();
        bench.submit(vec![1, 2, 3], 30, &listeners[0]);
        bench.submit(vec![1, 2, BAD], 30, &listeners[1]);
        bench.run();
        assert_eq!(listeners[0].heard().0, naive(vec![1, 2, 3], 30));
        let (tokens, end) = listeners[1].heard();
        let Some(Event::Failed(failure)) = end else { panic!("{end:?}") };
        assert!(tokens.is_empty() && failure.to_string().contains("not a number"), "{failure}");
        assert_eq!(bench.executor.runs, 2 + 29, "once more, and not sequence by sequence");
    }

    #[test]
    fn a_number_that_is_none_only_once_harms_nobody() {
        let mut bench = Bench::new(8, limits());
        bench.executor.not_a_number = Some((BAD, 1));
        let listener = Listener::with_room(1000);
        bench.submit(vec![1, 2, BAD], 30, &listener);
        bench.run();
        assert_eq!(listener.heard().0, naive(vec![1, 2, BAD], 30));
    }

    #[test]
    fn a_lost_queue_is_replaced_once_and_then_the_device_is_lost() {
        let mut bench = Bench::new(8, limits());
        let listener = Listener::with_room(100);
        bench.submit(prompt(1, 5), 3, &listener);
        bench.executor.failures = vec![E_QUEUE_LOST];
        assert!(matches!(bench.try_step(), Ok(Some(_))));
        bench.executor.failures = vec![E_QUEUE_LOST; 2];
        assert!(bench.try_step().is_err());
        bench.scheduler.requeue();
        assert_eq!(bench.scheduler.load(), crate::Load { waiting: 1, blocks_total: 8, ..crate::Load::default() });
        bench.run();
        assert_eq!(listener.heard().0, naive(prompt(1, 5), 3));
    }

    #[test]
    fn sequences_wait_in_their_order_when_the_device_is_lost() {
        let mut bench = Bench::new(32, Limits { max_running: 3, ..limits() });
        let listeners: Vec<Listener> = (0..5).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 5), 20, listener);
        }
        bench.steps(5);
        bench.scheduler.requeue();
        bench.executor.rows.clear();
        bench.steps(3);
        let heard: Vec<usize> = listeners.iter().map(|listener| listener.heard().0.len()).collect();
        assert_eq!(heard, [8, 8, 8, 0, 0], "the first three go on");
        listeners[0].set(1000, true);
        bench.run();
        for (seed, listener) in (0..).zip(&listeners).skip(1) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 5), 20), "request {seed}");
        }
    }

    #[test]
    fn what_was_cached_on_a_lost_device_is_not_found_on_the_next() {
        let mut bench = Bench::new(32, limits());
        for _ in 0..2 {
            let listener = Listener::with_room(1000);
            bench.submit(prompt(1, 128), 5, &listener);
            bench.run();
            assert_eq!((listener.heard().0, usage(&listener).cached_tokens), (naive(prompt(1, 128), 5), 0));
            bench.scheduler.requeue();
            bench.executor.rows.clear();
        }
        assert_eq!(bench.scheduler.load().blocks_cached, 0);
    }

    #[test]
    fn a_block_of_a_sequence_that_failed_is_not_found_by_the_next() {
        let mut bench = Bench::new(32, Limits { max_batched_tokens: 200, ..limits() });
        bench.executor.not_a_number = Some((BAD, 2));
        let beginning = [prompt(1, 128), vec![BAD]].concat();
        let listeners = [(); 2].map(|()| Listener::with_room(1000));
        for listener in &listeners {
            bench.submit(beginning.clone(), 5, listener);
            bench.run();
        }
        assert!(matches!(listeners[0].heard().1, Some(Event::Failed(_))));
        assert_eq!((listeners[1].heard().0, usage(&listeners[1]).cached_tokens), (naive(beginning, 5), 0));
    }

    fn usage(listener: &Listener) -> Usage {
        let Some(Event::Finished(finished)) = listener.heard().1 else { panic!("not finished") };
        finished.usage
    }

    #[test]
    fn a_conversation_that_goes_on_reads_only_what_is_new() {
        let mut bench = Bench::new(32, limits());
        let first = Listener::with_room(1000);
        bench.submit(prompt(1, 150), 60, &first);
        bench.run();
        let computed = bench.executor.computed;
        // The second turn: the first prompt, its answer, and 20 tokens more.
        let mut turn = prompt(1, 150);
        turn.extend(first.heard().0);
        turn.extend(prompt(2, 20));
        let second = Listener::with_room(1000);
        bench.submit(turn.clone(), 10, &second);
        bench.run();
        assert_eq!(second.heard().0, naive(turn, 10));
        // 209 of 210 tokens had rows, in 3 full blocks.
        assert_eq!((usage(&first).cached_tokens, usage(&second).cached_tokens), (0, 192));
        assert_eq!(bench.executor.computed - computed, 230 - 192 + 9);
    }

    #[test]
    fn a_prompt_that_is_all_there_still_computes_its_last_block() {
        let mut bench = Bench::new(32, limits());
        for cached in [0, 64] {
            let listener = Listener::with_room(1000);
            bench.submit(prompt(1, 128), 5, &listener);
            bench.run();
            assert_eq!(listener.heard().0, naive(prompt(1, 128), 5));
            assert_eq!(usage(&listener).cached_tokens, cached);
        }
    }

    #[test]
    fn another_owner_finds_nothing() {
        let mut bench = Bench::new(32, limits());
        for owner in [1, 2] {
            let listener = Listener::with_room(1000);
            bench.submit_of(Owner::Uid(owner), None, prompt(1, 128), 5, &listener);
            bench.run();
            assert_eq!(usage(&listener).cached_tokens, 0, "uid {owner}");
        }
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// Whatever shares the pool, an answer is the naive one; whoever goes away leaves nothing behind.
        #[test]
        fn answers_do_not_depend_on_company(
            requests in proptest::collection::vec((0..5u32, 1..300u32, 1..120u32, 0..40usize, 0..5u8), 1..12),
            n_blocks in 7..20u32,
            max_batched_tokens in 4..200u32,
        ) {
            let mut bench = Bench::new(n_blocks, Limits { max_waiting: 100, max_batched_tokens, ..limits() });
            let mut waiting = Vec::new();
            for (seed, n_prompt, max_tokens, steps, fate) in requests {
                let listener = Listener::with_room(if fate == 1 { 6 } else { 100_000 });
                bench.submit(prompt(seed, n_prompt), max_tokens, &listener);
                bench.steps(steps);
                if fate == 0 {
                    listener.set(0, true);
                }
                waiting.push((listener, seed, n_prompt, max_tokens, fate));
            }
            waiting.iter().filter(|w| w.4 == 1).for_each(|w| w.0.set(100_000, false));
            bench.run();
            for (listener, seed, n_prompt, max_tokens, fate) in waiting {
                let (tokens, end) = listener.heard();
                let expected = naive(prompt(seed, n_prompt), max_tokens);
                if fate == 0 {
                    prop_assert!(expected.starts_with(&tokens));
                } else {
                    prop_assert!(matches!(end, Some(Event::Finished(_))), "{:?}", end);
                    prop_assert_eq!(tokens, expected);
                }
            }
            prop_assert_eq!(bench.scheduler.load().blocks_used, 0);
            let written: BTreeSet<u64> = bench.executor.rows.keys().map(|slot| slot / BLOCK as u64).collect();
            prop_assert_eq!(written.len() as u32, bench.scheduler.load().blocks_cached, "a freed block was not discarded");
        }

        /// Whatever fails when, an answer is the naive one as long as no step fails three times in a row.
        #[test]
        fn answers_do_not_depend_on_faults(
            requests in proptest::collection::vec((0..6u32, 1..200u32, 1..80u32), 1..6),
            faults in proptest::collection::vec((0..6usize, 0..12usize), 1..60),
            n_blocks in 7..20u32,
        ) {
            let mut bench = Bench::new(n_blocks, limits());
            // Each fault comes alone or twice, and one run between two faults goes well.
            for (status, gap) in faults {
                let status = [E_STEP, E_DATA, E_QUEUE_LOST, E_DEVICE_LOST, E_INTERNAL, E_NOMEM_DEVICE][status];
                let times = if [E_STEP, E_DATA, E_NOMEM_DEVICE].contains(&status) { 1 } else { 1 + gap % 2 };
                bench.executor.failures.extend(vec![0; gap + 1]);
                bench.executor.failures.extend(vec![status; times]);
            }
            let grammar = || Grammar::over_bytes("start: (/[ -@]/ /[A-_]/)*");
            let listeners: Vec<_> = requests.iter().map(|_| Listener::with_room(100_000)).collect();
            for (&(seed, n_prompt, max_tokens), listener) in requests.iter().zip(&listeners) {
                let grammar = (seed % 5 == 0).then(grammar);
                bench.submit_under(grammar, prompt(seed, n_prompt), max_tokens, listener);
            }
            bench.run_on_devices();
            for ((seed, n_prompt, max_tokens), listener) in requests.into_iter().zip(listeners) {
                let (tokens, end) = listener.heard();
                prop_assert!(matches!(end, Some(Event::Finished(_))), "{:?}", end);
                prop_assert_eq!(tokens.len() as u32, max_tokens);
                if seed % 5 != 0 {
                    prop_assert_eq!(tokens, naive(prompt(seed, n_prompt), max_tokens));
                }
            }
            prop_assert_eq!(bench.scheduler.load().blocks_used, 0);
        }
    }
}
