//! How do a session's blocks get into its file and back?
//!
//! Blocks of a session are saved once they are full, a few after each step, so that little is lost with the process.
//! When a turn is taken up and the pool does not have its beginning any more, the file's blocks are asked for in
//! windows, placed into the sequence's table and imported; the sequence waits meanwhile, others do not. A block that is
//! not there, or not whole, ends that: the rows from there on are computed from the tokens, as without a file.
//!
//! Knows no disk and no thread: [`Files`] takes orders and never blocks, what comes of them is told to the scheduler.

use crate::attempt::{Executor, Outcome, outlive};
use crate::executor::ExecutorError;
use crate::scheduler::Scheduler;
use crate::sequence::SequenceId;
use crate::warm::{ReclaimJob, WriteJob};
use sparsed_kv::{FileId, Save};

/// Blocks that are asked for at a time: images of two windows are in memory, one that is read and one that is imported.
const WINDOW: u32 = 4;
/// Images that wait to be written at most.
pub(crate) const IMAGES_MAX: u32 = 16;
/// Blocks that are copied out of the device after a step: what that takes is added to everybody's token.
pub(crate) const SAVES_PER_STEP: usize = 4;

/// The order to read blocks of a session's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Restore {
    /// Who wants them.
    pub(crate) sequence: SequenceId,
    /// Where they are.
    pub(crate) file: FileId,
    /// The first block of the session, counted from 0.
    pub(crate) first: u32,
    /// How many, at least one.
    pub(crate) n: u32,
}

/// What a [`Restore`] has brought.
#[derive(Debug)]
pub(crate) struct Restored {
    /// What was asked for.
    pub(crate) restore: Restore,
    /// Images from the first block on; fewer than asked for when the file has no more that are whole.
    pub(crate) images: Vec<Vec<u8>>,
}

/// Where images go to and come from. Never blocks; the answers are [`Scheduler::written`] and [`Scheduler::arrived`].
pub(crate) trait Files {
    /// Writes an image.
    fn save(&mut self, save: Save, image: Vec<u8>);
    /// Reads images.
    fn restore(&mut self, restore: Restore);
    /// Takes images that are imported: the next ones may have their memory. Without any, none is needed any more.
    fn recycle(&mut self, images: Vec<Vec<u8>>);
    /// Writes a block into the slow tier; the answer is [`Scheduler::demoted`].
    fn write(&mut self, tag: u64, job: WriteJob);
    /// Gives room in the slow tier back, after all writes that were ordered before.
    fn reclaim(&mut self, job: ReclaimJob);
}

/// A sequence's side of it.
#[derive(Debug)]
pub(crate) struct Durable {
    pub(crate) file: FileId,
    /// Blocks from the beginning on that are in the file, or on their way.
    n_saved: u32,
    /// The window that was asked for.
    asked: Option<(u32, u32)>,
}

impl Durable {
    pub(crate) fn new(file: FileId, n_saved: u32) -> Self {
        Self { file, n_saved, asked: None }
    }

    /// Whether blocks are on their way back.
    pub(crate) fn is_restoring(&self) -> bool {
        self.asked.is_some()
    }

    /// Asks for what comes after `n_held` blocks, up to `n_wanted`.
    pub(crate) fn ask(&mut self, n_held: u32, n_wanted: u32) -> Option<(u32, u32)> {
        let n = self.n_saved.min(n_wanted).saturating_sub(n_held).min(WINDOW);
        self.asked = (n > 0).then_some((n_held, n));
        self.asked
    }

    /// Whether `restore` is what was asked for.
    pub(crate) fn has_asked(&self, restore: &Restore) -> bool {
        self.asked == Some((restore.first, restore.n))
    }

    /// Nothing more is to be had: the file's blocks from `n_blocks` on are not what was thought.
    pub(crate) fn end_of_file(&mut self, n_blocks: u32) {
        self.asked = None;
        self.n_saved = self.n_saved.min(n_blocks);
    }

    /// Blocks from the beginning on that are in the file, or on their way.
    pub(crate) fn n_saved(&self) -> u32 {
        self.n_saved
    }

    /// All blocks before `n_blocks` are ordered to be saved.
    pub(crate) fn saved(&mut self, n_blocks: u32) {
        self.n_saved = n_blocks;
    }

    /// The sequence has given its blocks back.
    pub(crate) fn leave_pool(&mut self) {
        self.asked = None;
    }
}

/// Carries out what the scheduler wants of the files, as far as that does not hold up the next step for long.
///
/// # Errors
/// Only when the device is of no more use as it is.
pub(crate) fn carry_out(
    scheduler: &mut Scheduler,
    executor: &mut dyn Executor,
    files: &mut dyn Files,
) -> Result<(), ExecutorError> {
    while let Some(mut restored) = scheduler.next_arrival() {
        let Some(blocks) = scheduler.place(&restored) else {
            scheduler.put_back(restored);
            break;
        };
        // The next window is read while this one is imported.
        scheduler.take_restores().for_each(|restore| files.restore(restore));
        crate::step::give_back(scheduler, executor)?;
        if blocks.is_empty() {
            continue;
        }
        match outlive(executor, |executor| executor.import(&blocks, &mut restored.images))? {
            Outcome::Done(()) => {
                scheduler.placed(restored.restore.sequence);
                files.recycle(restored.images);
            }
            Outcome::Failed(error) => {
                log::warn!(reason:% = error; "blocks could not be restored, they are computed again");
                scheduler.displaced(&restored.restore);
            }
        }
    }
    scheduler.take_restores().for_each(|restore| files.restore(restore));
    if !scheduler.is_restoring() {
        files.recycle(Vec::new());
    }
    for _ in 0..SAVES_PER_STEP {
        let Some(save) = scheduler.next_save() else { break };
        let image = outlive(executor, |executor| executor.export(save.block));
        scheduler.copied(save);
        match image {
            Ok(Outcome::Done(image)) => files.save(save, image),
            Ok(Outcome::Failed(error)) => {
                log::warn!(reason:% = error; "block could not be copied, it is not saved");
                scheduler.written();
            }
            // Nobody would ever say so, and a daemon that is to end waits for what is under way.
            Err(error) => {
                scheduler.written();
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Event, FinishReason, Generate, Owner, Turn};
    use crate::scheduler::Limits;
    use crate::testing::{BLOCK, Bench, Listener, limits, naive, prompt, request};
    use proptest::prelude::*;
    use sparsed_abi::{E_DEVICE_LOST, E_STEP};
    use std::time::Duration;

    const FILE: FileId = FileId(3);

    fn turn_of(file: FileId, n_saved: u32, prompt: Vec<u32>, max_tokens: u32) -> Generate {
        let turn = Some(Turn { file, n_saved, resumed: Vec::new(), recorder: None });
        Generate { turn, ..request(Owner::Uid(1), None, prompt, max_tokens) }
    }

    /// Runs one turn to its end; answers the answer, how many prompt tokens were cached, and how many were computed.
    fn run_turn(bench: &mut Bench, request: Generate) -> (Vec<u32>, u32, usize) {
        let (listener, before) = (Listener::with_room(10_000), bench.executor.computed);
        bench.submit_request(request, &listener);
        bench.run();
        bench.steps(50); // what is left to save
        let (tokens, end) = listener.heard();
        let Some(Event::Finished(finished)) = end else { panic!("{end:?}") };
        (tokens, finished.usage.cached_tokens, bench.executor.computed - before)
    }

    /// As after a restart: an empty pool, the files are there.
    fn restarted(old: Bench, n_blocks: u32) -> Bench {
        Bench { files: old.files, ..Bench::new(n_blocks, limits()) }
    }

    #[test]
    fn a_session_goes_on_after_a_restart_from_its_file() {
        let mut bench = Bench::new(32, limits());
        let (answer, ..) = run_turn(&mut bench, turn_of(FILE, 0, prompt(1, 200), 60));
        assert_eq!((answer.len(), bench.files.images.len()), (60, 4), "259 of 260 tokens have rows");
        let next = [prompt(1, 200), answer, prompt(2, 5)].concat();
        let mut bench = restarted(bench, 32);
        let (answer, cached, computed) = run_turn(&mut bench, turn_of(FILE, 4, next.clone(), 10));
        assert_eq!((cached, computed), (256, 265 - 256 + 9));
        assert_eq!(answer, naive(next, 10));
        assert_eq!(bench.executor.exported, 0, "what is in the file is not written again");
    }

    #[test]
    fn after_the_loss_of_a_device_a_sessions_blocks_come_from_its_file_and_others_are_computed() {
        let request = |is_session: bool| match is_session {
            true => turn_of(FILE, 0, prompt(1, 300), 60),
            false => request(Owner::Uid(1), None, prompt(1, 300), 60),
        };
        for is_session in [true, false] {
            let (mut bench, listener) = (Bench::new(32, limits()), Listener::with_room(1000));
            bench.submit_request(request(is_session), &listener);
            while listener.heard().0.len() < 40 {
                bench.steps(1);
            }
            bench.executor.failures = vec![E_DEVICE_LOST];
            assert_eq!(bench.run_on_devices(), 1);
            assert_eq!(listener.heard().0, naive(prompt(1, 300), 60));
            // At the loss 339 tokens had rows; five blocks of the session are full, and saved.
            let computed_again = if is_session { 339 - 5 * BLOCK } else { 339 };
            // And one in the step that was lost.
            assert_eq!(bench.executor.computed, 300 + 59 + 1 + computed_again, "a session: {is_session}");
        }
    }

    #[test]
    fn a_request_without_a_session_leaves_no_image() {
        let mut bench = Bench::new(32, limits());
        run_turn(&mut bench, request(Owner::Uid(1), None, prompt(1, 200), 60));
        assert!(bench.files.images.is_empty() && bench.executor.exported == 0);
    }

    #[test]
    fn a_hole_in_the_file_costs_the_rows_behind_it_and_is_filled() {
        let mut bench = Bench::new(32, limits());
        run_turn(&mut bench, turn_of(FILE, 0, prompt(1, 300), 1));
        bench.files.images.remove(&(FILE, 2));
        let mut bench = restarted(bench, 32);
        let (answer, cached, computed) = run_turn(&mut bench, turn_of(FILE, 4, prompt(1, 300), 5));
        assert_eq!((cached, computed), (128, 300 - 128 + 4));
        assert_eq!(answer, naive(prompt(1, 300), 5));
        assert!(bench.files.images.contains_key(&(FILE, 2)));
    }

    #[test]
    fn a_window_is_asked_for_while_the_last_is_imported() {
        let mut bench = Bench::new(32, Limits { max_batched_tokens: 400, ..limits() });
        let tokens = prompt(1, 399);
        run_turn(&mut bench, turn_of(FILE, 0, tokens.clone(), 1));
        let mut bench = restarted(bench, 32);
        bench.files.delay = 3;
        let (answer, cached, _) = run_turn(&mut bench, turn_of(FILE, 6, tokens.clone(), 1));
        assert_eq!((answer, cached), (naive(tokens, 1), 384));
        assert_eq!(bench.files.windows, [(4, 0), (2, 0)], "the second one was under way before there was spare memory");
    }

    #[test]
    fn images_have_the_memory_of_those_before_as_long_as_any_come() {
        let mut bench = Bench::new(32, Limits { max_batched_tokens: 400, ..limits() });
        for seed in [1, 2] {
            run_turn(&mut bench, turn_of(FileId(seed), 0, prompt(seed as u32, 399), 1));
        }
        let (mut bench, listener) = (restarted(bench, 32), Listener::with_room(10));
        for seed in [1, 2] {
            bench.submit_request(turn_of(FileId(seed), 6, prompt(seed as u32, 399), 1), &listener);
        }
        bench.run();
        assert_eq!(bench.files.windows, [(4, 0), (4, 0), (2, 0), (2, 4)]);
        assert!(bench.files.spare.is_empty(), "nothing comes any more");
    }

    #[test]
    fn others_do_not_wait_for_a_file() {
        let mut bench = Bench::new(32, limits());
        run_turn(&mut bench, turn_of(FILE, 0, prompt(1, 200), 1));
        let mut bench = restarted(bench, 32);
        bench.files.delay = 1000;
        let (restoring, other) = (Listener::with_room(100), Listener::with_room(100));
        bench.submit_request(turn_of(FILE, 3, prompt(1, 200), 5), &restoring);
        bench.submit(prompt(2, 20), 5, &other);
        bench.steps(20);
        assert_eq!((other.heard().0, restoring.heard().0), (naive(prompt(2, 20), 5), Vec::new()));
        restoring.set(0, true);
        bench.steps(1100);
        assert!(bench.scheduler.is_idle(), "an answer for somebody who is gone does no harm");
        assert_eq!(bench.scheduler.load().blocks_used, 0);
    }

    #[test]
    fn blocks_that_cannot_be_imported_are_computed_again() {
        for (failures, lost) in [(vec![E_STEP], 0), (vec![E_STEP; 3], 0), (vec![E_DEVICE_LOST], 1)] {
            let mut bench = Bench::new(32, limits());
            run_turn(&mut bench, turn_of(FILE, 0, prompt(1, 300), 1));
            let mut bench = restarted(bench, 32);
            bench.executor.import_failures = failures;
            let listener = Listener::with_room(100);
            bench.submit_request(turn_of(FILE, 4, prompt(1, 300), 9), &listener);
            assert_eq!(bench.run_on_devices(), lost);
            assert_eq!(listener.heard().0, naive(prompt(1, 300), 9));
        }
    }

    #[test]
    fn where_the_pool_is_short_saving_gives_way() {
        let mut bench = Bench::new(6, limits());
        bench.files.delay = usize::MAX / 2; // nothing is ever written
        for seed in 0..8 {
            let (answer, ..) = run_turn(&mut bench, turn_of(FileId(seed), 0, prompt(1, 200), 100));
            assert_eq!(answer, naive(prompt(1, 200), 100));
        }
        assert_eq!(bench.files.images.len(), IMAGES_MAX as usize);
    }

    #[test]
    fn a_cut_answer_says_everything_again_and_goes_on_alike() {
        let wishes = |n: usize, whole: &[u32]| {
            let sampling = crate::Sampling { temperature: 1.5, seed: 9, frequency_penalty: 0.5, ..Default::default() };
            let turn = Some(Turn { file: FILE, n_saved: 0, resumed: whole[..n].to_vec(), recorder: None });
            let grammar = crate::Grammar::over_bytes("start: (/[ -@]/ /[A-_]/)*");
            let request = request(Owner::Uid(1), Some(grammar), prompt(1, 30), 40);
            Generate { turn, sampling, ..request }
        };
        let (whole, ..) = run_turn(&mut Bench::new(32, limits()), wishes(0, &[]));
        for n in [1, 17, 39, 40] {
            let (mut bench, listener) = (Bench::new(32, limits()), Listener::with_room(3));
            bench.submit_request(wishes(n, &whole), &listener);
            (0..60).for_each(|_| {
                listener.set(3, false);
                bench.steps(1);
            });
            let sampled = listener.sampled();
            assert_eq!((listener.heard().0, sampled), (whole.clone(), whole[n..].to_vec()), "cut at {n}");
            assert!(bench.scheduler.is_idle());
        }
    }

    #[test]
    fn a_cut_answer_that_there_is_no_room_for_any_more_is_said_again_and_ends_as_at_a_limit() {
        let whole = naive(prompt(1, 180), 60);
        // Pools that are smaller than its prompt, and than what it has said, with a full queue; and one with room.
        for (n_blocks, max_waiting, n_expected) in [(2, 0, 40), (3, 0, 40), (4, 8, 60)] {
            let mut bench = Bench::new(n_blocks, Limits { max_waiting, ..limits() });
            let turn = Some(Turn { file: FILE, n_saved: 0, resumed: whole[..40].to_vec(), recorder: None });
            let listener = Listener::with_room(1000);
            let request = request(Owner::Uid(1), None, prompt(1, 180), 60);
            bench.submit_request(Generate { turn, ..request }, &listener);
            bench.run();
            let (tokens, end) = listener.heard();
            assert_eq!(tokens, whole[..n_expected], "{n_blocks} blocks");
            let Some(Event::Finished(finished)) = end else { panic!("{end:?}") };
            let n_answered = finished.usage.completion_tokens as usize;
            assert_eq!((finished.reason, n_answered), (FinishReason::Length, n_expected));
            assert_eq!(bench.executor.computed > 0, n_expected > 40, "{n_blocks} blocks");
        }
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        /// Whatever becomes of files, device and pool, each turn's answer is the naive one.
        #[test]
        fn answers_do_not_depend_on_files(
            turns in proptest::collection::vec((0..4u64, 1..90u32, 1..60u32, 0..6u8), 1..16),
            n_blocks in 7..24u32,
            delay in 0..6usize,
            holes in proptest::collection::vec((0..4u64, 0..6u32), 0..10),
            faults in proptest::collection::vec(prop_oneof![Just(0), Just(E_STEP), Just(E_DEVICE_LOST)], 0..40),
        ) {
            let mut bench = Bench::new(n_blocks, limits());
            bench.files.delay = delay;
            bench.executor.failures = faults.iter().flat_map(|&fault| [0, 0, 0, fault]).collect();
            bench.executor.import_failures = faults;
            let mut histories = vec![Vec::new(); 4];
            for (at, (session, more, max_tokens, fate)) in turns.into_iter().enumerate() {
                let history: &mut Vec<u32> = &mut histories[session as usize];
                if history.len() > 250 {
                    history.clear();
                    bench.files.images.retain(|(file, _), _| file.0 != session);
                }
                history.extend(prompt(at as u32, more));
                let n_saved = (0..).take_while(|&i| bench.files.images.contains_key(&(FileId(session), i))).count();
                let listener = Listener::with_room(10_000);
                let turn = turn_of(FileId(session), n_saved as u32, history.clone(), max_tokens);
                bench.submit_request(turn, &listener);
                bench.run_on_devices();
                let (tokens, end) = listener.heard();
                prop_assert!(matches!(end, Some(Event::Finished(_))), "{:?}", end);
                prop_assert_eq!(&tokens, &naive(history.clone(), max_tokens));
                history.extend(tokens);
                if fate == 0 {
                    bench.steps(100);
                    bench = Bench { submitted: bench.submitted, ..restarted(bench, n_blocks) };
                }
                if fate == 1 && let Some(&(file, index)) = holes.get(at) {
                    bench.files.images.remove(&(FileId(file), index));
                }
            }
            bench.steps(100);
            prop_assert_eq!(bench.scheduler.load().blocks_used, 0);
            prop_assert!(bench.executor.rows.len() <= n_blocks as usize * BLOCK);
        }
    }

    #[test]
    fn a_device_that_is_lost_while_a_block_is_copied_leaves_no_image_under_way() {
        let mut bench = Bench::new(32, limits());
        let listener = Listener::with_room(100);
        bench.executor.export_failures = vec![E_DEVICE_LOST];
        bench.submit_request(turn_of(FILE, 0, prompt(1, 200), 1), &listener);
        assert_eq!(bench.run_on_devices(), 1);
        bench.steps(20);
        assert!(bench.scheduler.is_saved(), "a daemon that is to end would wait for ever");
    }

    #[test]
    fn the_engine_is_not_saved_while_images_are_under_way() {
        let mut bench = Bench::new(32, limits());
        bench.files.delay = 500;
        let listener = Listener::with_room(100);
        bench.submit_request(turn_of(FILE, 0, prompt(1, 200), 1), &listener);
        bench.now.set(Duration::ZERO);
        bench.steps(20);
        assert!(bench.scheduler.is_idle() && !bench.scheduler.is_saved());
        bench.steps(600);
        assert!(bench.scheduler.is_saved());
    }
}
