//! What does the scheduler want of sessions' files and of the slow tier, and what becomes of it?
//!
//! Orders are taken from here and carried out by [`durable`](crate::durable) and [`warm`](crate::warm); what came of
//! them is told here.

use super::{Scheduler, count};
use crate::durable::{Restore, Restored};
use crate::sequence::{Sequence, SequenceId, Vocabulary};
use crate::warm::{Demote, Demoted};
use sparsed_kv::{BLOCK_TOKENS, BlockId, KvError, Place, Released, Save, blocks_for};
use std::collections::{HashMap, VecDeque};

/// Blocks that are on their way to the slow tier at most: each has an image in memory meanwhile.
const DEMOTIONS_MAX: usize = 4;

/// Windows of sessions' files that are read at a time.
const RESTORES_MAX: usize = 3;
/// Blocks in a row that could not be moved, after which the slow tier is taken for broken until the device changes.
const FAILED_MAX: u32 = 4;

/// Blocks on their way to the slow tier.
#[derive(Debug, Default)]
pub(super) struct Demotions {
    /// By tag, which no other block of this process has.
    under_way: HashMap<u64, BlockId>,
    orders: Vec<Demote>,
    results: VecDeque<Demoted>,
    n_tags: u64,
    /// Blocks that could not be moved, since the last one that could.
    n_failed: u32,
}

impl Demotions {
    /// The pool's content is lost: what is under way does not matter any more.
    pub(super) fn forget(&mut self) {
        self.under_way.clear();
        self.orders.clear();
        self.results.clear();
        self.n_failed = 0;
    }

    pub(super) fn is_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Blocks that are held because they are under way.
    #[cfg(feature = "simulation")]
    pub(super) fn blocks(&self) -> impl Iterator<Item = BlockId> {
        self.under_way.values().copied()
    }

    pub(super) fn has_results(&self) -> bool {
        !self.results.is_empty()
    }
}

impl Scheduler {
    /// The next block to copy for its file, followed by [`copied`](Self::copied) and [`written`](Self::written).
    pub(crate) fn next_save(&mut self) -> Option<Save> {
        self.archive.next_save()
    }

    /// The block is copied, or could not be.
    pub(crate) fn copied(&mut self, save: Save) {
        self.archive.copied(save, &mut self.pool, &mut self.freed);
        self.tally.saved_blocks += 1;
    }

    /// An image is written, or could not be.
    pub(crate) fn written(&mut self) {
        self.archive.written();
    }

    /// What is to be read from sessions' files.
    ///
    /// Few at a time: what is read lies in memory until it has a place.
    pub(crate) fn take_restores(&mut self) -> impl Iterator<Item = Restore> + use<> {
        let n = self.restores.len().min(RESTORES_MAX - self.n_restores);
        self.n_restores += n;
        self.restores.drain(..n).collect::<Vec<_>>().into_iter()
    }

    /// Whether anything is still to come from sessions' files.
    pub(crate) fn is_restoring(&self) -> bool {
        self.n_restores > 0 || !self.restores.is_empty() || !self.arrivals.is_empty()
    }

    /// What was read.
    pub(crate) fn arrived(&mut self, restored: Restored) {
        self.n_restores -= 1;
        self.arrivals.push_back(restored);
    }

    pub(crate) fn next_arrival(&mut self) -> Option<Restored> {
        self.arrivals.pop_front()
    }

    /// What was read has to wait until a block has moved to the slow tier.
    pub(crate) fn put_back(&mut self, restored: Restored) {
        self.arrivals.push_front(restored);
        self.arrivals_wait = true;
    }

    /// Gives the sequence blocks for what was read, to be filled before anything else is done with them; the next
    /// window is ordered. No blocks when the sequence is gone or has changed its mind; `None` when there will be some
    /// once others have moved to the slow tier.
    pub(crate) fn place(&mut self, restored: &Restored) -> Option<Vec<BlockId>> {
        let is_expected = |sequence: &Sequence| sequence.has_asked(&restored.restore);
        if !restoring(&mut self.running, restored.restore.sequence).is_some_and(|sequence| is_expected(sequence)) {
            return Some(Vec::new());
        }
        let mut n = count(restored.images.len()).min(self.pool.n_available());
        let mut reservation = loop {
            match self.pool.reserve(n, &mut self.freed) {
                Ok(reservation) => break reservation,
                Err(KvError::OutOfFast { short, .. }) if self.demote(short) => return None,
                Err(KvError::OutOfFast { short, .. }) => n = n.saturating_sub(short),
                Err(error) => unreachable!("no more than is available: {error}"),
            }
        };
        let sequence = restoring(&mut self.running, restored.restore.sequence).expect("it was there just now");
        self.slots.clear();
        let first = sequence.table.blocks().len();
        sequence.table.append(n * BLOCK_TOKENS, &mut self.pool, &mut reservation, &mut self.slots);
        self.pool.forfeit(reservation);
        if n < restored.restore.n {
            sequence.end_of_file();
        } else {
            self.restores.extend(sequence.ask());
        }
        Some(sequence.table.blocks()[first..].to_vec())
    }

    /// The blocks that [`place`](Self::place) gave are filled.
    pub(crate) fn placed(&mut self, id: SequenceId) {
        if let Some(sequence) = restoring(&mut self.running, id) {
            let before = count(sequence.sealed_blocks().len()) * BLOCK_TOKENS;
            sequence.restored(&self.hasher, &mut self.pool);
            let (new, again) = sequence.gained(before);
            self.relief.note(new, again);
            self.tally.restored_tokens += u64::from(new + again);
            self.tally.again_tokens += u64::from(again);
        }
    }

    /// The blocks for `restore` could not be filled.
    pub(crate) fn displaced(&mut self, restore: &Restore) {
        if let Some(sequence) = restoring(&mut self.running, restore.sequence) {
            sequence.table.truncate(restore.first * BLOCK_TOKENS, &mut self.pool, &mut self.freed);
            sequence.end_of_file();
        }
    }

    /// Orders held blocks to the slow tier, at least `short` if there are so many: the beginnings of the longest
    /// sequences first. Answers whether any is on its way.
    pub(super) fn demote(&mut self, short: u32) -> bool {
        if self.demotions.n_failed < FAILED_MAX {
            let may = |&index: &usize| self.may_be_slow(&self.running[index]);
            let mut longest: Vec<usize> = (0..self.running.len()).filter(may).collect();
            longest.sort_by_key(|&index| std::cmp::Reverse(self.running[index].tokens.len()));
            let blocks = longest.iter().flat_map(|&index| self.running[index].sealed_blocks());
            let mut fast: Vec<BlockId> = Vec::new();
            for &block in blocks {
                let room = (short as usize).min(DEMOTIONS_MAX) > self.demotions.under_way.len() + fast.len();
                if room && self.pool.place(block) == Place::Fast && !fast.contains(&block) {
                    fast.push(block);
                }
            }
            for block in fast {
                self.pool.leave(block);
                let tag = self.demotions.n_tags;
                self.demotions.n_tags += 1;
                self.demotions.under_way.insert(tag, block);
                self.demotions.orders.push(Demote { block, tag });
            }
        }
        self.demotions.is_under_way()
    }

    /// Whether the sequence's blocks may lie on a disk.
    pub(super) fn may_be_slow(&self, sequence: &Sequence) -> bool {
        self.limits.slow_stateless || sequence.durable.is_some()
    }

    /// Tokens of prompt and answer that the sequence may come to, on the pool that there is.
    pub(super) fn context_of(&self, sequence: &Sequence, vocabulary: Vocabulary<'_>) -> u32 {
        let n_blocks = if self.may_be_slow(sequence) { self.pool.n_blocks() } else { self.pool.fast_max() };
        vocabulary.max_context.min(n_blocks.saturating_mul(BLOCK_TOKENS))
    }

    /// Fast blocks that are missing for `next` to begin beside those that run; `needed` are all that its prompt takes.
    /// Full blocks of whoever may be slow can move away; what is left of them is where they write, and one step's. What
    /// only waits to be saved goes as soon as its place is needed.
    pub(super) fn fast_short(&self, next: &Sequence, needed: u32) -> u32 {
        let has_slow_tier = self.pool.fast_max() < self.pool.n_blocks();
        if self.running.is_empty() || self.limits.slow_stateless || !has_slow_tier {
            return 0;
        }
        // Of whoever has ended, as long as the disk takes.
        let is_left = |block: &&BlockId| self.pool.ref_count(**block) == 1;
        let n_left = count(self.demotions.under_way.values().filter(is_left).count());
        let (mut stays, mut any_slow) = (self.pool.n_staying() + n_left, false);
        for sequence in &self.running {
            if self.may_be_slow(sequence) {
                let n_begun = sequence.table.blocks().len() - sequence.sealed_blocks().len();
                stays += count(n_begun).max(1);
                any_slow = true;
            } else {
                stays += sequence.table.blocks_needed(sequence.n_pending());
            }
        }
        let (needed, any_slow) = if self.may_be_slow(next) { (1, true) } else { (needed, any_slow) };
        let step = if any_slow { blocks_for(self.limits.max_batched_tokens) } else { 0 };
        (stays + needed + step).saturating_sub(self.pool.bounds().fast)
    }

    pub(crate) fn take_demotes(&mut self) -> Vec<Demote> {
        std::mem::take(&mut self.demotions.orders)
    }

    /// A block was written into the slow tier, or could not be.
    pub(crate) fn demoted(&mut self, demoted: Demoted) {
        self.demotions.results.push_back(demoted);
        (self.is_blocked, self.arrivals_wait) = (false, false);
    }

    pub(crate) fn next_demoted(&mut self) -> Option<(Demoted, BlockId)> {
        loop {
            let demoted = self.demotions.results.pop_front()?;
            // Of a pool that is gone, nobody knows the tag.
            if let Some(&block) = self.demotions.under_way.get(&demoted.tag) {
                return Some((demoted, block));
            }
        }
    }

    /// The device reads the block in the slow tier from now on, or `is_moved` is false and it stays where it was.
    pub(crate) fn settle(&mut self, tag: u64, is_moved: bool) {
        let Some(block) = self.demotions.under_way.remove(&tag) else { return };
        let released = if is_moved { self.pool.moved(block) } else { self.pool.stayed(block) };
        if released == Released::Freed {
            self.freed.push(block);
        }
        self.tally.demoted_blocks += u64::from(is_moved);
        self.demotions.n_failed = if is_moved { 0 } else { self.demotions.n_failed + 1 };
        if self.demotions.n_failed == FAILED_MAX {
            log::error!("the slow tier takes no more blocks: long contexts have to wait for each other now");
        }
    }

    /// A block's rows in the slow tier are not what was written: its sequence goes back and computes them again, a few
    /// times at most. Answers whether it does.
    pub(crate) fn spoilt(&mut self, index: usize, block: BlockId) -> bool {
        let sequence = &mut self.running[index];
        if !sequence.table.blocks().contains(&block) || !sequence.may_begin_again() {
            return false;
        }
        self.pool.spoil(block);
        true
    }
}

fn restoring(running: &mut [Sequence], id: SequenceId) -> Option<&mut Sequence> {
    running.iter_mut().find(|sequence| sequence.id == id && sequence.durable.is_some())
}

#[cfg(test)]
mod tests {
    use crate::api::{Event, Failure, FinishReason, Generate, Owner, Turn};
    use crate::durable::IMAGES_MAX;
    use crate::scheduler::Limits;
    use crate::testing::{BLOCK, Bench, Listener, limits, naive, prompt, request};
    use sparsed_kv::FileId;

    const OWNER: Owner = Owner::Uid(1);

    /// As the default is: only sessions' blocks may be slow.
    fn sessions() -> Limits {
        Limits { slow_stateless: false, ..limits() }
    }

    fn listeners<const N: usize>() -> [Listener; N] {
        std::array::from_fn(|_| Listener::with_room(1000))
    }

    /// A turn of a session that was never saved.
    fn turn(file: u64, tokens: Vec<u32>, max_tokens: u32) -> Generate {
        let turn = Turn { file: FileId(file), n_saved: 0, resumed: Vec::new(), recorder: None };
        Generate { turn: Some(turn), ..request(OWNER, None, tokens, max_tokens) }
    }

    #[test]
    fn who_may_not_be_slow_begins_only_where_there_are_fast_blocks_for_it() {
        // Three with three blocks each, of which two fit.
        let mut bench = Bench::with_slow_tier(40, 8, sessions());
        let listeners: [Listener; 3] = listeners();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 140), 40, listener);
        }
        bench.steps(12);
        let load = bench.scheduler.load();
        assert_eq!((load.running, load.waiting), (2, 1));
        bench.run();
        assert_eq!(bench.scheduler.tally().preempted, 0);
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 140), 40));
        }
    }

    #[test]
    fn a_session_begins_only_where_it_has_room_to_write_beside_who_may_not_be_slow() {
        let mut bench = Bench::with_slow_tier(40, 4, sessions());
        let [long, session]: [Listener; 2] = listeners();
        bench.submit(prompt(1, 200), 30, &long);
        bench.steps(6);
        bench.submit_request(turn(1, prompt(2, 300), 20), &session);
        bench.run();
        assert_eq!(bench.scheduler.tally().preempted, 0, "it had nothing to write into, and was sent back");
        assert_eq!(long.heard().0, naive(prompt(1, 200), 30));
        assert_eq!(session.heard().0, naive(prompt(2, 300), 20));
    }

    #[test]
    fn a_request_without_a_session_has_a_context_of_the_fast_blocks() {
        let mut bench = Bench::with_slow_tier(20, 3, sessions());
        let [cut, refused, session]: [Listener; 3] = listeners();
        bench.submit(prompt(1, 150), 100, &cut);
        bench.submit(prompt(2, 3 * BLOCK as u32), 10, &refused);
        bench.submit_request(turn(1, prompt(2, 3 * BLOCK as u32), 100), &session);
        let failure = Failure::ContextTooLong { have_tokens: 3 * BLOCK, max_tokens: 3 * BLOCK as u32 };
        assert_eq!(refused.heard(), (Vec::new(), Some(Event::Failed(failure))), "before anything was computed");
        bench.run();
        let (tokens, end) = cut.heard();
        assert_eq!(tokens, naive(prompt(1, 150), 3 * BLOCK as u32 - 150));
        let Some(Event::Finished(finished)) = end else { panic!("{end:?}") };
        assert_eq!(finished.reason, FinishReason::Length);
        assert_eq!(session.heard().0, naive(prompt(2, 3 * BLOCK as u32), 100));
    }

    #[test]
    fn what_waits_to_be_saved_on_a_disk_that_stalls_holds_up_no_request_without_a_session() {
        let mut bench = Bench::with_slow_tier(40, 10, sessions());
        bench.files.delay = usize::MAX / 2; // nothing is ever written
        let [session, parked, request]: [Listener; 3] = listeners();
        for seed in 0..4 {
            bench.submit_request(turn(seed, prompt(seed as u32, 390), 5), &session);
            bench.run();
        }
        let n_waiting = bench.scheduler.archive.waiting().count();
        assert_eq!(n_waiting, 4 * 6 - IMAGES_MAX as usize, "they hold most of the fast blocks");
        parked.set(1, false);
        bench.submit_request(turn(9, prompt(9, 20), 5), &parked);
        bench.steps(4);
        bench.submit(prompt(5, 150), 20, &request);
        bench.steps(40);
        assert_eq!(request.heard().0, naive(prompt(5, 150), 20));
        assert_eq!(bench.scheduler.load().running, 1, "the other one is still there");
    }

    #[test]
    fn blocks_that_two_sessions_share_make_room_once() {
        let mut bench = Bench::with_slow_tier(40, 8, sessions());
        let [older, first, second, younger]: [Listener; 4] = listeners();
        bench.submit(prompt(1, 140), 40, &older);
        bench.steps(4);
        bench.submit_request(turn(1, prompt(2, 300), 90), &first);
        bench.steps(9);
        bench.submit_request(turn(2, prompt(2, 300), 90), &second);
        bench.steps(3);
        bench.submit(prompt(3, 140), 40, &younger);
        bench.steps(3);
        // Of three blocks, and two where sessions write, two and a step's are left.
        let load = bench.scheduler.load();
        assert_eq!((load.running, load.waiting), (3, 1));
        bench.run();
        assert_eq!(bench.scheduler.tally().preempted, 0);
        for (seed, listener) in [(1, &older), (3, &younger)] {
            assert_eq!(listener.heard().0, naive(prompt(seed, 140), 40));
        }
        for listener in [first, second] {
            assert_eq!(listener.heard().0, naive(prompt(2, 300), 90));
        }
    }

    #[test]
    fn where_fast_blocks_are_short_a_session_whose_blocks_are_slow_goes_on() {
        // Two that grow to four blocks each, and a session that is younger.
        let mut bench = Bench::with_slow_tier(40, 8, sessions());
        let [older, younger, session]: [Listener; 3] = listeners();
        bench.submit(prompt(1, 100), 140, &older);
        bench.submit(prompt(2, 100), 140, &younger);
        bench.steps(6);
        bench.submit_request(turn(1, prompt(3, 100), 250), &session);
        while bench.scheduler.tally().preempted == 0 {
            assert!(bench.step().is_some() || !bench.scheduler.is_idle(), "there was room for all");
        }
        assert!(bench.scheduler.queue.waiting().all(|sequence| sequence.durable.is_none()));
        bench.run();
        assert_eq!(older.heard().0, naive(prompt(1, 100), 140));
        assert_eq!(younger.heard().0, naive(prompt(2, 100), 140));
        assert_eq!(session.heard().0, naive(prompt(3, 100), 250));
    }
}
