//! What does it cost to schedule a step? Memory none; the time is printed, `tests/bench/RESULTS.md` has it.
#![expect(clippy::disallowed_methods, clippy::print_stderr, reason = "a measurement")]

use super::Limits;
use crate::api::Owner;
use crate::telemetry::Board;
use crate::testing::{Bench, Listener, VOCAB, VOCABULARY, prompt};
use std::time::{Duration, Instant};

/// Steps that are measured, all within one block of each sequence.
const STEPS: usize = 40;

/// `n` answers that run and `n` requests that wait, of four owners; a step schedules all that run. Answers times of
/// steps, and allocations in all of them.
fn measure(n: u32) -> (Vec<Duration>, u64) {
    let limits = Limits { max_running: n, max_waiting: n, max_batched_tokens: 4 * n, ..Limits::default() };
    let mut bench = Bench::new(4 * n, limits);
    // All begin in the same step, so that none of them fills a block while it is measured.
    for seed in 0..2 * n {
        let listener = Listener::with_room(1000);
        bench.submit_of(Owner::Uid(seed % 4), None, prompt(seed, 4), 300, &listener);
        if seed + 1 == n {
            bench.step();
        }
    }
    bench.steps(6);
    let (mut board, mut logits) = (Board::default(), vec![0.0; VOCAB]);
    let (mut times, mut allocations) = (Vec::new(), 0);
    for step in 0..STEPS {
        let now = Duration::from_millis(step as u64);
        let (scheduler, batch) = (&mut bench.scheduler, &mut bench.batch);
        let mut time = Duration::ZERO;
        let counted = allocation_counter::measure(|| {
            let began = Instant::now();
            scheduler.tend(now);
            assert!(scheduler.has_work() && scheduler.schedule(batch, now));
            scheduler.computed(&[], now);
            let sampled = scheduler.take_sampled();
            scheduler.give_back_sampled(sampled);
            scheduler.took(Duration::from_millis(9));
            scheduler.finish(&[], now);
            scheduler.show(&mut board);
            time = began.elapsed();
        });
        assert_eq!(batch.n_sequences(), n as usize);
        let sampled = scheduler.take_sampled();
        for &index in &sampled {
            assert!(!scheduler.advance(index, &mut logits, VOCABULARY, now));
        }
        scheduler.give_back_sampled(sampled);
        scheduler.tend(now);
        times.push(time);
        // The first step may still make the lists as long as they have to be.
        allocations += if step == 0 { 0 } else { counted.count_total };
    }
    (times, allocations)
}

#[test]
fn scheduling_a_step_takes_no_memory() {
    for n in [1, 16, 64, 256] {
        let (mut times, allocations) = measure(n);
        times.sort_unstable();
        eprintln!("{n} sequences: {:.1} us a step", times[STEPS / 2].as_secs_f64() * 1e6);
        assert_eq!(allocations, 0, "{n} sequences");
    }
}
