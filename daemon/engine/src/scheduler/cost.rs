//! What does it cost to schedule a step? Memory none; the time is printed, `tests/bench/RESULTS.md` has it.
#![expect(clippy::disallowed_methods, clippy::print_stderr, reason = "a measurement")]

use super::Limits;
use crate::api::{Event, Generate, Owner, Turn};
use crate::durable::SAVES_PER_STEP;
use crate::telemetry::Board;
use crate::testing::{BLOCK, Bench, Listener, VOCAB, VOCABULARY, prompt, request};
use sparsed_kv::FileId;
use std::time::{Duration, Instant};

/// Tokens that a sequence has when it is measured for the first time: all lists have been as long as they get.
const FROM: u32 = 2 * BLOCK as u32 - 12;
/// Steps that are measured: each sequence fills a block three times.
const STEPS: u32 = 3 * BLOCK as u32;

/// Blocks that a sequence has at the end.
const BLOCKS: usize = 6;

/// When sequences fill their blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    /// All of them in the same step, and the next step takes a new block for each.
    Together,
    /// A 64th of them in each step.
    InTurn,
}

/// What steps had to do beside decoding: blocks that became full, and blocks that went to their sessions' files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Decodes,
    Takes,
    Seals,
    Saves,
    SealsAndSaves,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Decodes, Self::Takes, Self::Seals, Self::Saves, Self::SealsAndSaves];

    /// Of a step in which so many blocks began, became full, and were saved.
    fn of(n_begun: usize, n_sealed: usize, n_saved: usize) -> Self {
        match (n_begun, n_sealed, n_saved) {
            (_, 0, 1..) => Self::Saves,
            (_, 1.., 1..) => Self::SealsAndSaves,
            (_, 1.., 0) => Self::Seals,
            (1.., 0, 0) => Self::Takes,
            (0, 0, 0) => Self::Decodes,
        }
    }
}

/// Whose answers they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Requests,
    Sessions,
    /// On a pool with a slow tier, where there are places for those that wait, and no fast block: what is short is
    /// reckoned in each step.
    SessionsInTiers,
}

impl Whose {
    const ALL: [Self; 3] = [Self::Requests, Self::Sessions, Self::SessionsInTiers];
}

/// `n` answers that run and `n` requests that wait, of four owners; a step schedules all that run.
fn bench(n: u32, fill: Fill, whose: Whose) -> Bench {
    let (is_session, n_blocks) = (whose != Whose::Requests, BLOCKS as u32 * n);
    let limits = Limits { max_running: n, max_waiting: n, max_batched_tokens: 68 * n, ..Limits::default() };
    let mut bench = match whose {
        // Each writes into one block, and a step takes all the others.
        Whose::SessionsInTiers => {
            let max_batched_tokens = (n_blocks - n) * BLOCK as u32;
            Bench::with_slow_tier(2 * n_blocks, n_blocks, Limits { max_running: 2 * n, max_batched_tokens, ..limits })
        }
        _ => Bench::new(n_blocks, limits),
    };
    for seed in 0..2 * n {
        let listener = Listener::with_room(10_000);
        let n_prompt = if fill == Fill::InTurn { 4 + seed % BLOCK as u32 } else { 4 };
        let request = request(Owner::Uid(seed % 4), None, prompt(seed, n_prompt), 390 - n_prompt);
        let turn =
            is_session.then(|| Turn { file: FileId(seed.into()), n_saved: 0, resumed: Vec::new(), recorder: None });
        bench.submit_request(Generate { turn, ..request }, &listener);
        // All that run begin in the same step.
        if seed + 1 == n {
            bench.step();
        }
    }
    bench
}

/// Times of steps with what they had to do, and allocations in all of them.
fn measure(n: u32, fill: Fill, whose: Whose) -> (Vec<(Kind, Duration)>, u64) {
    let mut bench = bench(n, fill, whose);
    // A step is never longer than the longest one was: here none has been yet.
    bench.batch.block_ids.reserve(BLOCKS * n as usize);
    let (mut board, mut logits) = (Board::default(), vec![0.0; VOCAB]);
    let (mut steps, mut allocations) = (Vec::new(), 0);
    for step in 0..FROM + STEPS {
        let now = Duration::from_millis(step.into());
        let (scheduler, batch) = (&mut bench.scheduler, &mut bench.batch);
        let (mut time, mut n_saved) = (Duration::ZERO, 0);
        let counted = allocation_counter::measure(|| {
            let began = Instant::now();
            scheduler.tend(now);
            // As `durable` does, but for the copy itself.
            while n_saved < SAVES_PER_STEP
                && let Some(save) = scheduler.next_save()
            {
                scheduler.copied(save);
                scheduler.written();
                n_saved += 1;
            }
            assert!(scheduler.has_work() && scheduler.schedule(batch, now));
            let freed = scheduler.take_freed();
            scheduler.give_back_freed(freed);
            scheduler.computed(&[], now);
            let sampled = scheduler.take_sampled();
            scheduler.give_back_sampled(sampled);
            scheduler.took(Duration::from_millis(9));
            scheduler.finish(&[], now);
            scheduler.show(&mut board);
            time = began.elapsed();
        });
        assert_eq!(batch.n_sequences(), n as usize);
        let of_block = |at: usize| {
            let places = scheduler.running.iter().map(|sequence| sequence.table.n_tokens() as usize % BLOCK);
            places.filter(|&place| place == at).count()
        };
        let kind = Kind::of(of_block(1), of_block(0), n_saved);
        let sampled = scheduler.take_sampled();
        for &index in &sampled {
            assert!(!scheduler.advance(index, &mut logits, VOCABULARY, now));
        }
        scheduler.give_back_sampled(sampled);
        scheduler.tend(now);
        if step >= FROM {
            steps.push((kind, time));
            allocations += counted.count_total;
        }
    }
    (steps, allocations)
}

/// The median time of the steps of each kind that there is, and the least one.
fn summary(steps: &[(Kind, Duration)]) -> Vec<(Kind, [Duration; 2])> {
    let of = |kind: Kind| {
        let mut times: Vec<Duration> = steps.iter().filter(|(of, _)| *of == kind).map(|&(_, time)| time).collect();
        times.sort_unstable();
        Some((kind, [*times.get(times.len() / 2)?, times[0]]))
    };
    Kind::ALL.into_iter().filter_map(of).collect()
}

#[test]
fn scheduling_a_step_takes_no_memory_and_its_time_grows_no_faster_than_the_sequences() {
    let fills = [Fill::Together, Fill::InTurn].into_iter();
    for (fill, whose) in fills.flat_map(|fill| Whose::ALL.map(|whose| (fill, whose))) {
        let mut alone = Vec::new();
        for n in [1, 16, 64, 256] {
            let (steps, allocations) = measure(n, fill, whose);
            assert_eq!(allocations, 0, "{n} sequences, {fill:?}, {whose:?}");
            let kinds = summary(&steps);
            for &(kind, [median, least]) in &kinds {
                let us = median.as_secs_f64() * 1e6;
                eprintln!("{n} sequences, {fill:?}, {whose:?}: {kind:?} {us:.1} us a step");
                // One has what it needs in the nearest cache.
                let one = alone.iter().find(|(of, _)| *of == kind).map(|&(_, one)| one);
                assert!(one.is_none_or(|one| least < 4 * n * one), "{n} sequences, {kind:?}: {least:?}, one {one:?}");
            }
            if n == 1 {
                alone = kinds.into_iter().map(|(kind, [_, least])| (kind, least)).collect();
            }
        }
    }
}

#[test]
fn blocks_that_become_full_together_are_hashed_over_several_steps() {
    let mut bench = bench(64, Fill::Together, Whose::Requests);
    let sealed = |bench: &Bench| bench.scheduler.running.iter().filter(|one| one.sealed_blocks().len() == 1).count();
    while sealed(&bench) == 0 {
        bench.step();
    }
    assert!(bench.scheduler.running.iter().all(|one| one.table.n_tokens() as usize == BLOCK));
    let mut counts = vec![sealed(&bench)];
    while counts.last() < Some(&64) {
        bench.step();
        counts.push(sealed(&bench));
    }
    assert_eq!(counts, [8, 16, 24, 32, 40, 48, 56, 64]);
}

#[test]
fn a_full_block_is_found_again_though_its_sequence_ended_before_its_hash_was_due() {
    let limits = Limits { max_running: 32, max_waiting: 32, max_batched_tokens: 2048, ..Limits::default() };
    let mut bench = Bench::new(128, limits);
    let ask = |bench: &mut Bench, prompts: &[Vec<u32>], n: u32| -> Vec<(Vec<u32>, u32)> {
        let listeners = prompts.iter().map(|prompt| {
            let listener = Listener::with_room(1000);
            bench.submit_request(request(Owner::Uid(1), None, prompt.clone(), n), &listener);
            listener
        });
        let listeners: Vec<Listener> = listeners.collect();
        bench.run();
        let heard = listeners.iter().map(|listener| match listener.heard() {
            (tokens, Some(Event::Finished(finished))) => (tokens, finished.usage.cached_tokens),
            (_, end) => panic!("{end:?}"),
        });
        heard.collect()
    };
    let prompts: Vec<Vec<u32>> = (0..32).map(|seed| prompt(seed, 4)).collect();
    let answers = ask(&mut bench, &prompts, BLOCK as u32 - 3);
    let whole = prompts.into_iter().zip(answers).map(|(prompt, (answer, _))| [prompt, answer].concat());
    let whole: Vec<Vec<u32>> = whole.collect();
    assert!(whole.iter().all(|tokens| tokens.len() == BLOCK + 1), "the last token has no rows");
    assert!(ask(&mut bench, &whole, 1).iter().all(|&(_, n_cached)| n_cached == BLOCK as u32));
}
