//! A whole daemon without threads and clock, among clients who leave, devices that fail and disks that lose power.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

use sparsed_sim::{DaemonOutline, Mistake, run_daemon, seeds};
use std::sync::atomic::{AtomicU64, Ordering};

/// Turns of anybody in one run.
const STEPS: u64 = 4000;

#[test]
fn nothing_is_lost_or_leaked_and_no_answer_is_wrong() {
    let (seeds, next) = (seeds(260), AtomicU64::new(0));
    let worker = || {
        let mut sum = DaemonOutline::default();
        while let Some(seed) = seeds.clone().nth(next.fetch_add(1, Ordering::Relaxed) as usize) {
            sum += run_daemon(seed, STEPS, Mistake::Nothing).unwrap_or_else(|violation| panic!("{}", violation.0));
        }
        sum
    };
    let n_threads = std::thread::available_parallelism().unwrap().get();
    let sum = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(worker)).collect();
        let sums = workers.into_iter().map(|worker| worker.join().unwrap());
        sums.fold(DaemonOutline::default(), |mut sum, one| {
            sum += one;
            sum
        })
    });
    println!("{sum:?}");
    // The runs must have been about something, if there are enough for all of it.
    let n = sum.steps / STEPS;
    if n < 50 {
        return;
    }
    assert!(sum.engine_steps > 1000 * n && sum.restarts > 20 * n && sum.devices > 3 * n, "{sum:?}");
    assert!(sum.answers > 20 * n && sum.resumed > 3 * n && sum.failures > 3 * n, "{sum:?}");
    assert!(sum.slow_rows > 1000 * n && sum.images > 10 * n, "{sum:?}");
    assert!(2 * sum.copies > n && sum.expired > n && sum.waits > 10 * n, "{sum:?}");
}

/// The first two gave a wrong token once: a block of a turn that could not be journaled was kept as one of what was
/// said before. In the third what a start had cut off a journal was back after a power cut. In the last ones the model
/// was wrong about sessions past their retention, of which some could not be removed before or were not settled.
#[test]
fn seeds_that_have_failed_once_are_clean() {
    for seed in [1930, 2135, 302_037, 9_003_925, 9_007_361, 9_011_608] {
        run_daemon(seed, STEPS, Mistake::Nothing).unwrap_or_else(|violation| panic!("{}", violation.0));
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    for seed in seeds(5) {
        let run =
            |seed| run_daemon(seed, STEPS, Mistake::Nothing).unwrap_or_else(|violation| panic!("{}", violation.0));
        let first = run(seed);
        assert_eq!(first, run(seed), "seed {seed}");
        assert_ne!(first.digest, run(seed + 1).digest);
    }
}

const MISTAKES: [Mistake; 6] = [
    Mistake::SomeSyncs,
    Mistake::KeepsFreed,
    Mistake::LosesWrites,
    Mistake::OldImages,
    Mistake::OldFiles,
    Mistake::FollowsDate,
];

#[test]
fn a_planted_mistake_is_found() {
    for mistake in MISTAKES {
        let found = (0..20).find_map(|seed| run_daemon(seed, STEPS, mistake).err());
        let Some(violation) = found else { panic!("{mistake:?} is not found in 20 runs") };
        println!("{mistake:?}: {}", violation.0.lines().next().unwrap());
    }
}
