//! How does a block's latent plane get into the slow tier?
//!
//! Its rows are copied out of the device, written by somebody who may wait for the disk, and then the device is told to
//! read them there. Until then they are read where they were, so a step never waits, and a disk that fails costs
//! nothing but the room.

use crate::attempt::{Executor, Outcome, outlive};
use crate::durable::Files;
use crate::executor::ExecutorError;
use crate::scheduler::Scheduler;
use sparsed_kv::BlockId;

/// Writes a block into the slow tier; may wait for the disk.
pub(crate) type WriteJob = Box<dyn FnOnce() -> std::io::Result<()> + Send>;
/// Gives room in the slow tier back; may wait for the disk. Not at the same time as a [`WriteJob`].
pub(crate) type ReclaimJob = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

/// The order to move a block to the slow tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demote {
    pub(crate) block: BlockId,
    /// What its pages carry.
    pub(crate) tag: u64,
}

/// What has become of a [`WriteJob`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demoted {
    pub(crate) tag: u64,
    pub(crate) is_written: bool,
}

/// Carries out what the scheduler wants of the slow tier.
///
/// # Errors
/// Only when the device is of no more use as it is.
pub(crate) fn carry_out(
    scheduler: &mut Scheduler,
    executor: &mut dyn Executor,
    files: &mut dyn Files,
) -> Result<(), ExecutorError> {
    while let Some((demoted, block)) = scheduler.next_demoted() {
        let mut relocate = || outlive(executor, |executor| executor.relocate(block, demoted.tag));
        let is_moved = demoted.is_written && settled(relocate()?, "be read in");
        scheduler.settle(demoted.tag, is_moved);
    }
    if let Some(job) = executor.reclaim() {
        files.reclaim(job);
    }
    for Demote { block, tag } in scheduler.take_demotes() {
        match outlive(executor, |executor| executor.slow_copy(block, tag))? {
            Outcome::Done(job) => files.write(tag, job),
            failed @ Outcome::Failed(_) => {
                settled(failed, "be copied for");
                scheduler.settle(tag, false);
            }
        }
    }
    Ok(())
}

fn settled<T>(outcome: Outcome<T>, what: &str) -> bool {
    match outcome {
        Outcome::Done(_) => true,
        Outcome::Failed(error) => {
            log::warn!(what, reason:% = error; "block could not be moved in the slow tier");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::api::{Event, Failure, Generate, Owner, Turn};
    use crate::scheduler::Limits;
    use crate::testing::{Bench, Listener, limits, naive, prompt, request};
    use proptest::prelude::*;
    use sparsed_abi::{E_DEVICE_LOST, E_STEP};
    use sparsed_kv::FileId;

    fn small_steps() -> Limits {
        Limits { max_batched_tokens: 64, ..limits() }
    }

    fn answer(bench: &mut Bench, request: Generate) -> Vec<u32> {
        let listener = Listener::with_room(10_000);
        bench.submit_request(request, &listener);
        bench.run();
        let (tokens, end) = listener.heard();
        assert!(matches!(end, Some(Event::Finished(_))), "{end:?}");
        tokens
    }

    #[test]
    fn a_context_longer_than_memory_is_answered() {
        for delay in [0, 1, 7] {
            let mut bench = Bench::with_slow_tier(16, 3, small_steps());
            bench.files.delay = delay;
            let tokens = answer(&mut bench, request(Owner::Uid(1), None, prompt(1, 330), 60));
            assert_eq!(tokens, naive(prompt(1, 330), 60));
            assert_eq!(bench.executor.computed, 330 + 59, "nothing is computed twice");
            assert!(bench.scheduler.load().blocks_slow >= 3, "{:?}", bench.scheduler.load());
        }
    }

    #[test]
    fn the_room_of_blocks_that_nobody_holds_any_more_is_given_back() {
        let mut bench = Bench::with_slow_tier(8, 3, small_steps());
        answer(&mut bench, request(Owner::Uid(1), None, prompt(1, 330), 60));
        let held = bench.executor.blocks_on_disk();
        assert!(held.len() >= 3);
        // Another one's blocks come in their stead, of which others are in the slow tier.
        answer(&mut bench, request(Owner::Uid(1), None, prompt(2, 330), 60));
        bench.steps(1);
        let slow = bench.executor.slow.keys().copied().collect();
        assert_eq!(bench.executor.blocks_on_disk(), slow, "what is there is what is read there");
        assert!(held != slow);
    }

    #[test]
    fn answers_go_on_while_a_block_moves() {
        let mut bench = Bench::with_slow_tier(16, 4, small_steps());
        let (long, short) = (Listener::with_room(1000), Listener::with_room(1000));
        bench.submit(prompt(2, 4), 50, &short);
        bench.step();
        bench.files.delay = 40;
        bench.submit(prompt(1, 390), 1, &long);
        bench.steps(30);
        assert!(short.heard().0.len() > 25 && long.heard().0.is_empty());
        bench.files.delay = 0;
        bench.run();
        assert_eq!(long.heard().0, naive(prompt(1, 390), 1));
        assert_eq!(short.heard().0, naive(prompt(2, 4), 50));
    }

    #[test]
    fn a_slow_tier_that_takes_no_more_ends_the_one_who_needs_it_and_says_so() {
        let mut bench = Bench::with_slow_tier(16, 3, small_steps());
        bench.files.writes_left = Some(2);
        let (long, other) = (Listener::with_room(1000), Listener::with_room(1000));
        bench.submit(prompt(1, 390), 5, &long);
        bench.run();
        assert!(matches!(long.heard().1, Some(Event::Failed(Failure::DiskFailed { .. }))));
        bench.submit(prompt(2, 100), 5, &other);
        bench.run();
        assert_eq!(other.heard().0, naive(prompt(2, 100), 5));
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }

    #[test]
    fn rows_that_are_not_what_was_written_are_computed_again() {
        let mut bench = Bench::with_slow_tier(16, 3, small_steps());
        let listener = Listener::with_room(1000);
        bench.submit(prompt(1, 330), 40, &listener);
        bench.steps(12);
        assert!(!bench.executor.slow.is_empty());
        bench.executor.disk.0.lock().unwrap().values_mut().next().unwrap().0 += 1000;
        bench.run();
        assert_eq!(listener.heard().0, naive(prompt(1, 330), 40));
        // The block at least; those behind it that the pool has kept are as good as they were.
        assert!(bench.executor.computed >= 330 + 39 + 64, "{}", bench.executor.computed);
    }

    #[test]
    fn a_disk_that_goes_on_to_spoil_rows_ends_the_answer_in_the_end() {
        let mut bench = Bench::with_slow_tier(16, 3, small_steps());
        let listener = Listener::with_room(1000);
        bench.submit(prompt(1, 330), 40, &listener);
        for _ in 0..300 {
            bench.step();
            let slow = &bench.executor.slow;
            bench.executor.disk.0.lock().unwrap().retain(|block, _| !slow.contains_key(block));
        }
        assert!(matches!(listener.heard().1, Some(Event::Failed(Failure::BackendFailed { .. }))));
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }

    #[test]
    fn a_session_comes_back_from_its_file_into_both_tiers() {
        let turn = |n_saved| Some(Turn { file: FileId(1), n_saved, resumed: Vec::new(), recorder: None });
        let mut bench = Bench::with_slow_tier(16, 4, small_steps());
        answer(&mut bench, Generate { turn: turn(0), ..request(Owner::Uid(1), None, prompt(1, 380), 1) });
        bench.steps(60);
        let saved = bench.files.images.len();
        let mut bench = Bench { files: bench.files, ..Bench::with_slow_tier(16, 6, small_steps()) };
        bench.files.delay = 2;
        let request = Generate { turn: turn(saved as u32), ..request(Owner::Uid(1), None, prompt(1, 380), 15) };
        assert_eq!(answer(&mut bench, request), naive(prompt(1, 380), 15));
        assert_eq!((saved, bench.executor.computed), (5, 380 - 320 + 14));
        assert!(bench.scheduler.load().blocks_slow > 0);
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// Whatever moves when, and whatever fails, an answer is the naive one.
        #[test]
        fn answers_do_not_depend_on_tiers(
            requests in proptest::collection::vec((0..6u32, 1..300u32, 1..80u32, 0..30usize), 1..8),
            n_blocks in 8..24u32,
            n_fast in 4..8u32,
            delay in 0..9usize,
            faults in proptest::collection::vec(prop_oneof![Just(0), Just(E_STEP), Just(E_DEVICE_LOST)], 0..20),
            spoilt in prop_oneof![Just(Vec::new()), proptest::collection::vec(any::<bool>(), 1..9)],
        ) {
            let mut bench = Bench::with_slow_tier(n_blocks, n_fast, small_steps());
            bench.files.delay = delay;
            // Not both at once: a step that fails beside a bad page has failed twice.
            if !spoilt.contains(&true) {
                bench.executor.failures = faults.iter().flat_map(|&fault| [0, 0, 0, 0, fault]).collect();
            }
            let mut listeners = Vec::new();
            let spoilt = spoilt.into_iter().chain([false; 8]);
            for ((seed, n_prompt, max_tokens, steps), spoil) in requests.into_iter().zip(spoilt) {
                let listener = Listener::with_room(10_000);
                bench.submit(prompt(seed, n_prompt), max_tokens, &listener);
                for _ in 0..steps {
                    if bench.try_step().is_err() {
                        bench.executor.rows.clear();
                        bench.executor.slow.clear();
                        bench.scheduler.requeue();
                    }
                }
                if spoil && let Some(block) = bench.executor.disk.0.lock().unwrap().values_mut().next() {
                    block.0 += 1 << 40;
                }
                listeners.push((listener, seed, n_prompt, max_tokens));
            }
            bench.run_on_devices();
            for (listener, seed, n_prompt, max_tokens) in listeners {
                let (tokens, end) = listener.heard();
                prop_assert!(matches!(end, Some(Event::Finished(_))), "{:?}", end);
                prop_assert_eq!(tokens, naive(prompt(seed, n_prompt), max_tokens));
            }
            bench.steps(20); // what is still on its way to the slow tier
            prop_assert_eq!(bench.scheduler.load().blocks_used, 0);
        }
    }
}
