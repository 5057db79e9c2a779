//! What is one step? Schedule, run, sample, deliver.

use crate::api::Failure;
use crate::attempt::{Executor, Outcome, compute, discard, outlive};
use crate::batch::Batch;
use crate::durable::{Files, carry_out};
use crate::executor::ExecutorError;
use crate::scheduler::{Leaves, Scheduler};
use crate::sequence::Vocabulary;
use crate::warm;
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
    files: &mut dyn Files,
    batch: &mut Batch,
    vocabulary: Vocabulary<'_>,
    clock: &dyn Fn() -> Duration,
) -> Result<Option<Done>, ExecutorError> {
    let began = clock();
    scheduler.tend(began);
    warm::carry_out(scheduler, executor, files)?;
    carry_out(scheduler, executor, files)?;
    let scheduled = scheduler.schedule(batch, clock());
    give_back(scheduler, executor)?;
    // What is to move moves before anybody waits for it.
    warm::carry_out(scheduler, executor, files)?;
    if !scheduled {
        return Ok(None);
    }
    let mut computed = compute(executor, batch)?;
    let now = clock();
    let (mut leaving, mut failed, mut n_failed_tokens) = (Vec::new(), Vec::new(), 0);
    for (place, error) in computed.failed {
        let (index, n_tokens) = scheduler.scheduled(place);
        failed.push(index);
        n_failed_tokens += n_tokens as usize;
        if error.bad_block().is_some_and(|block| scheduler.spoilt(index, block)) {
            log::warn!(reason:% = error; "rows in the slow tier are not what was written, they are computed again");
            leaving.push((index, Leaves::ToWait));
            continue;
        }
        log::error!(reason:% = error; "step failed for a sequence alone, which ends");
        scheduler.running_mut(index).fail(Failure::BackendFailed { reason: error.to_string() });
        leaving.push((index, Leaves::ForGood));
    }
    scheduler.computed(&failed, now);
    let mut sampled = scheduler.take_sampled();
    sampled.retain(|index| !failed.contains(index));
    let vocab = computed.logits.len().checked_div(sampled.len()).unwrap_or(0);
    for (&index, logits) in sampled.iter().zip(computed.logits.chunks_exact_mut(vocab.max(1))) {
        if scheduler.advance(index, logits, vocabulary, now) {
            leaving.push((index, Leaves::ForGood));
        }
    }
    let n_sampled = sampled.len();
    scheduler.give_back_sampled(sampled);
    scheduler.took(clock().saturating_sub(began));
    leaving.sort_unstable();
    scheduler.finish(&leaving, now);
    scheduler.tend(now);
    Ok(Some(Done { computed: batch.n_tokens() - n_failed_tokens, sampled: n_sampled }))
}

/// Has the device give back what is not to be held any more: blocks, and what its cache of slow rows has beyond its
/// limit.
///
/// # Errors
/// Only when the device is of no more use as it is.
pub(crate) fn give_back(scheduler: &mut Scheduler, executor: &mut dyn Executor) -> Result<(), ExecutorError> {
    if let Some(bytes) = scheduler.take_cache_limit()
        && let Outcome::Failed(error) = outlive(executor, |executor| executor.limit_cache(bytes))?
    {
        log::info!(bytes, reason:% = error; "the cache of slow rows keeps its size");
    }
    let freed = scheduler.take_freed();
    let discarded = if freed.is_empty() { Ok(()) } else { discard(executor, &freed) };
    scheduler.give_back_freed(freed);
    discarded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Grammar;
    use crate::api::{Event, FinishReason, Generate, Owner, Usage};
    use crate::scheduler::Limits;
    use crate::testing::{BLOCK, Bench, CONTEXT, Listener, limits, naive, prompt, request};
    use proptest::prelude::*;
    use sparsed_abi::{E_DATA, E_DEVICE_LOST, E_INTERNAL, E_NOMEM_DEVICE, E_QUEUE_LOST, E_STEP};
    use std::collections::BTreeSet;

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
    fn a_listener_hears_how_far_its_prompt_is_read_and_then_of_each_token() {
        let mut bench = Bench::new(32, limits());
        let told = |bench: &mut Bench| {
            let listener = Listener::with_room(1000);
            let request = request(Owner::Uid(1), None, prompt(1, 150), 3);
            bench.submit_request(Generate { progress: true, ..request }, &listener);
            bench.run();
            assert_eq!(listener.heard().0, naive(prompt(1, 150), 3));
            let progress = listener.progress();
            assert!(progress.windows(2).all(|pair| pair[0].timings.prompt_ms <= pair[1].timings.prompt_ms));
            assert_eq!(progress[0].timings, crate::api::Timings::default(), "before the first step");
            let of = |p: &crate::api::Progress| (p.read_tokens, p.usage.cached_tokens, p.usage.completion_tokens);
            progress.iter().map(of).collect::<Vec<_>>()
        };
        // Steps carry 48 tokens.
        let answered = |cached| [(150, cached, 1), (150, cached, 2), (150, cached, 3)];
        let read = |steps: &[u32], cached| steps.iter().map(|&n| (n, cached, 0)).collect::<Vec<_>>();
        assert_eq!(told(&mut bench), [read(&[0, 48, 96, 144, 150], 0), answered(0).to_vec()].concat());
        assert_eq!(told(&mut bench), [read(&[128, 150], 128), answered(128).to_vec()].concat());
        let listener = Listener::with_room(1000);
        bench.submit(prompt(1, 150), 3, &listener);
        bench.run();
        assert_eq!(listener.progress(), [], "nobody has asked");
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
