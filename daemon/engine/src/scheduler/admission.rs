//! Who is taken, who begins, and who gives way?
//!
//! A request is refused when too many wait or memory is short; it is told when to come again. The next one of the queue
//! begins while there is a place and room for its prompt. Where a step finds no room, the owner that holds more than
//! its share of the blocks gives way first, the least urgent and youngest of its sequences; never the oldest one of
//! all, so somebody always gets to the end.
//!
//! Who may not be slow finds room in fast memory only, so blocks are counted twice: all of them, and those that stay
//! fast.

use super::queue::{Admits, Queue};
use super::quota::blocks_per_owner;
use super::relief::Relief;
use super::{Limits, Scheduler, count};
use crate::api::{Failure, Owner};
use crate::memory::Stage;
use crate::sequence::{Sequence, Vocabulary};
use crate::telemetry::{What, owner_name};
use sparsed_kv::{BLOCK_TOKENS, KvError, blocks_for};
use std::time::Duration;

/// When to come again while memory is short: about as long as it takes to leave a rung of the ladder.
const MEMORY_RETRY_S: u32 = 10;

/// How long a user with nothing that runs waits for room before others' answers are sent back for it: most end sooner,
/// and putting one back costs.
const PATIENCE: Duration = Duration::from_secs(1);

impl Scheduler {
    /// Queues a request and tells its listener its place, or why it is not taken.
    pub(crate) fn submit(&mut self, mut sequence: Sequence, vocabulary: Vocabulary<'_>, now: Duration) {
        self.relieve(now);
        if !self.may_be_slow(&sequence) {
            sequence.table.stay_fast();
        }
        let (have_tokens, max_tokens) = (sequence.tokens.len(), self.context_of(&sequence, vocabulary));
        sequence.bound(max_tokens);
        // What was said is not lost where there is no room to go on, and takes none to be said again.
        let needs_room = !sequence.is_only_retold();
        // The service knows what the pool was meant to be; the device's may be smaller.
        if needs_room && have_tokens >= max_tokens as usize {
            sequence.fail(Failure::ContextTooLong { have_tokens, max_tokens });
            return self.leave(sequence, now);
        }
        if needs_room && let Some((what, failure)) = self.refusal(&sequence) {
            let reason = format!("{}: {failure}", owner_name(sequence.owner()));
            self.decisions.note(what, Some(sequence.owner()), reason, &mut self.tally, now);
            sequence.fail(failure);
            return self.leave(sequence, now);
        }
        sequence.queued(self.queue.ahead_of(&sequence), now);
        if sequence.resume(vocabulary, now) {
            return self.leave(sequence, now);
        }
        sequence.hash(&self.hasher);
        self.queue.push(sequence);
    }

    /// Why the request is not taken.
    fn refusal(&self, sequence: &Sequence) -> Option<(What, Failure)> {
        let bounds = self.pool.bounds();
        let is_too_long = bounds.blocks < self.pool.n_blocks() && blocks_for(sequence.n_pending()) > bounds.blocks;
        if self.relief.stage() == Stage::Refuse || is_too_long {
            let retry_after_s = self.retry_after_s(1).max(MEMORY_RETRY_S);
            return Some((What::MemoryShort, Failure::MemoryShort { retry_after_s }));
        }
        let limit = self.limits.max_waiting;
        if self.queue.n_waiting() >= limit {
            return Some((What::QueueFull, Failure::QueueFull { limit, retry_after_s: self.retry_after_s(1) }));
        }
        self.beyond_quota(sequence)
    }

    /// Seconds until a place in the queue is free where `share` owners have a part of the device.
    pub(super) fn retry_after_s(&self, share: u32) -> u32 {
        let n_pending = self.queue.waiting().map(|sequence| u64::from(sequence.n_pending())).sum();
        self.throughput.retry_after_s(self.queue.n_waiting(), n_pending, share)
    }

    /// Gives up requests that were to begin before `now`, and the next one if it could not begin though nobody runs.
    pub(super) fn give_up_late(&mut self, now: Duration) {
        if self.queue.waiting().any(|sequence| sequence.is_late(now)) {
            for mut sequence in self.queue.take_if(|sequence| sequence.is_late(now)) {
                let deadline_ms = sequence.urgency().deadline_ms.unwrap_or(0);
                let reason = format!("{}: {deadline_ms} ms are over", owner_name(sequence.owner()));
                self.decisions.note(What::DeadlineExceeded, Some(sequence.owner()), reason, &mut self.tally, now);
                sequence.fail(Failure::DeadlineExceeded { deadline_ms });
                self.leave(sequence, now);
            }
        }
        let (bounds, n_blocks) = (self.pool.bounds(), self.pool.n_blocks());
        while bounds.blocks < n_blocks && self.running.is_empty() {
            let Some(next) = self.queue.next(self.admits()) else { return };
            if next.has_begun() || blocks_for(next.n_pending()) <= bounds.blocks {
                return;
            }
            let id = next.id;
            for mut sequence in self.queue.take_if(|sequence| sequence.id == id) {
                let failure = Failure::MemoryShort { retry_after_s: MEMORY_RETRY_S };
                let reason = format!("{}: its prompt does not fit any more", owner_name(sequence.owner()));
                self.decisions.note(What::MemoryShort, Some(sequence.owner()), reason, &mut self.tally, now);
                sequence.fail(failure);
                self.leave(sequence, now);
            }
        }
    }

    /// Moves waiting sequences into the batch while there is room for their prompts.
    pub(super) fn admit(&mut self, now: Duration) {
        self.make_way(now);
        while self.can_admit() {
            let admits = admits(&self.limits, &self.relief, &self.running, &self.queue);
            let mut sequence = self.queue.take_next(admits).expect("can_admit looked at it");
            if let Some(time) = sequence.start(now) {
                self.tally.queue.add(time.as_secs_f64());
            }
            sequence.adopt_beginning(&mut self.pool);
            self.restores.extend(sequence.ask());
            let at = self.running.partition_point(|other| other.id < sequence.id);
            self.running.insert(at, sequence);
        }
    }

    /// Which requests may begin now.
    pub(super) fn admits(&self) -> Admits<'_> {
        admits(&self.limits, &self.relief, &self.running, &self.queue)
    }

    /// Whether there is a place and room for the prompt of the sequence that is next.
    pub(super) fn can_admit(&self) -> bool {
        let Some((next, short)) = self.next_and_short() else { return false };
        // What has begun goes on, if need be alone and beyond what short memory allows.
        let may_exceed = self.running.is_empty() && next.has_begun();
        let beyond = (self.pool.n_blocks() - self.pool.n_used()).saturating_sub(self.pool.n_available());
        short == Short::default() || (may_exceed && short.blocks <= beyond)
    }

    /// The sequence that is next, if there is a place for it, and the blocks that are missing for its prompt.
    fn next_and_short(&self) -> Option<(&Sequence, Short)> {
        let n_running = count(self.running.len());
        if n_running >= self.relief.running_max() {
            return None;
        }
        let next = self.queue.next(self.admits())?;
        let (found, idle) = self.pool.shareable(next.beginning());
        // One more block, so that the first tokens of the answer do not push somebody out at once.
        let needed = blocks_for(next.n_pending()) - found + u32::from(n_running > 0);
        let promised: u32 = self.running.iter().map(|s| s.table.blocks_needed(s.n_pending())).sum();
        let blocks = (needed + idle + promised).saturating_sub(self.pool.n_available());
        Some((next, Short { blocks, fast: self.fast_short(next, needed + idle) }))
    }

    /// Has the owner that holds most make room for one who has nothing that runs: its youngest sequences wait, as long
    /// as it holds more than its share and has others. Blocks of theirs that nobody needs are found again.
    fn make_way(&mut self, now: Duration) {
        let Some((next, mut short)) = self.next_and_short().filter(|(_, short)| *short != Short::default()) else {
            return;
        };
        let is_theirs = |owner: Owner| move |sequence: &&Sequence| sequence.owner() == owner;
        let is_alone = self.running.iter().all(|sequence| sequence.owner() != next.owner());
        if !is_alone || next.waits_for(now) < PATIENCE {
            return;
        }
        let only_fast = short.blocks == 0;
        let helps = |sequence: &&Sequence| !only_fast || !self.may_be_slow(sequence);
        let held = |owner: Owner| -> usize {
            let helping = self.running.iter().filter(is_theirs(owner)).filter(helps);
            helping.map(|sequence| sequence.table.blocks().len()).sum()
        };
        let bounds = self.pool.bounds();
        let all = if only_fast { bounds.fast } else { bounds.blocks };
        let share = all as usize / (self.queue.n_running_owners() + 1);
        let Some(most) = self.running.iter().map(Sequence::owner).max_by_key(|&owner| held(owner)) else { return };
        let (mut left, mut victims) = (held(most), Vec::new());
        // Never the oldest of all, nor an owner's last one.
        let n_theirs = self.running.iter().filter(is_theirs(most)).count();
        let younger = (1..self.running.len()).rev().filter(|&index| self.running[index].owner() == most);
        for index in younger.take(n_theirs - 1).filter(|&index| helps(&&self.running[index])) {
            if short == Short::default() || left <= share {
                break;
            }
            let blocks = self.running[index].table.blocks();
            // What others hold as well is not free then; what it was promised is.
            let own = blocks.iter().filter(|&&block| self.pool.ref_count(block) == 1).count();
            let promised = self.running[index].table.blocks_needed(self.running[index].n_pending());
            short = short.less(count(own) + promised, !self.may_be_slow(&self.running[index]));
            left -= blocks.len();
            victims.push(index);
        }
        if short == Short::default() {
            for index in victims {
                self.send_to_wait(index, What::Preempt, "another user's first request has no room", now);
            }
        }
    }

    /// Somebody has to give way for a step. Blocks that only wait to be saved go first; then full ones move to the slow
    /// tier, and meanwhile only those run who need no new block; then a sequence goes back.
    pub(super) fn make_room(&mut self, error: KvError, now: Duration) {
        if self.archive.give_up(&mut self.pool, &mut self.freed) {
            return;
        }
        let moves = matches!(error, KvError::OutOfFast { short, .. } if self.demote(short));
        if moves && !self.without_new_blocks {
            self.without_new_blocks = true;
        } else if self.running.len() > 1 {
            // Of what may be slow, all that can go is on its way or gone.
            let only_fast = matches!(error, KvError::OutOfFast { .. });
            self.send_to_wait(self.victim(only_fast), What::Preempt, "the pool is short", now);
        } else if !self.exceed_bounds(now) {
            // A lone sequence fits, unless the slow tier has failed it or the device has none.
            let mut sequence = self.release(0);
            let n_blocks = match error {
                KvError::OutOfFast { fast_max, .. } => (!self.may_be_slow(&sequence)).then_some(fast_max),
                _ => Some(self.pool.n_blocks()),
            };
            sequence.fail(match n_blocks {
                Some(n) => Failure::ContextTooLong { have_tokens: sequence.tokens.len(), max_tokens: n * BLOCK_TOKENS },
                None => Failure::DiskFailed { reason: "the slow tier takes no more".to_owned() },
            });
            self.queue.ended(sequence.owner());
            self.leave(sequence, now);
        }
    }

    /// Sends a running sequence back to wait.
    pub(super) fn preempt(&mut self, what: What, why: &str, now: Duration) {
        self.send_to_wait(self.victim(false), what, why, now);
    }

    /// Sends the sequence at `index` of those that run back to wait.
    pub(super) fn send_to_wait(&mut self, index: usize, what: What, why: &str, now: Duration) {
        let sequence = self.release(index);
        let (owner, n) = (sequence.owner(), sequence.tokens.len());
        let reason = format!("{why}: a sequence of {} with {n} tokens waits", owner_name(owner));
        self.decisions.note(what, Some(owner), reason, &mut self.tally, now);
        self.tally.preempted += 1;
        self.send_back(sequence);
    }

    /// Who gives way, of two or more that run; `only_fast`: one that holds fast blocks, if any does.
    fn victim(&self, only_fast: bool) -> usize {
        let mut shares: Vec<(Owner, usize)> = Vec::new();
        for sequence in &self.running {
            let n = sequence.table.blocks().len();
            match shares.iter_mut().find(|(owner, _)| *owner == sequence.owner()) {
                Some((_, blocks)) => *blocks += n,
                None => shares.push((sequence.owner(), n)),
            }
        }
        let fair = shares.iter().map(|&(_, n)| n).sum::<usize>() / shares.len().max(1);
        let over = shares.iter().filter(|&&(_, n)| n > fair).max_by_key(|&&(_, n)| n).map(|&(owner, _)| owner);
        let urgency = |index: &usize| (self.running[*index].urgency().priority, *index);
        let holds_fast = |index: &usize| !self.may_be_slow(&self.running[*index]);
        let only_fast = only_fast && (1..self.running.len()).any(|index| holds_fast(&index));
        let younger = || (1..self.running.len()).filter(|index| !only_fast || holds_fast(index));
        let of_owner = |index: &usize| over.is_some_and(|owner| self.running[*index].owner() == owner);
        let victim = younger().filter(of_owner).max_by_key(urgency).or_else(|| younger().max_by_key(urgency));
        victim.expect("two or more run")
    }
}

/// Blocks that are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Short {
    /// Of any kind.
    blocks: u32,
    /// With room for their latent plane in fast memory.
    fast: u32,
}

impl Short {
    /// What is missing once somebody has given up `n` blocks.
    fn less(self, n: u32, are_fast: bool) -> Self {
        let fast = if are_fast { n } else { 0 };
        Self { blocks: self.blocks.saturating_sub(n), fast: self.fast.saturating_sub(fast) }
    }
}

/// Which requests may begin beside those that are `running`.
fn admits<'a>(limits: &Limits, relief: &Relief, running: &'a [Sequence], queue: &Queue) -> Admits<'a> {
    // Memory may stay tight for as long as others want: where nothing goes on, what waits begins one by one.
    let is_idle = || running.is_empty() && !queue.waiting().any(Sequence::has_begun);
    let only_begun = match relief.stage() {
        Stage::Refuse => true,
        Stage::Hold => !is_idle(),
        _ => false,
    };
    Admits {
        running_max: limits.per_user_running,
        only_begun,
        running,
        blocks_max: blocks_per_owner(limits.per_user_kv_bytes, relief),
    }
}

#[cfg(test)]
mod tests {
    use crate::api::{Event, Failure, Generate, Owner, Turn, Urgency};
    use crate::scheduler::Limits;
    use crate::testing::{BLOCK, Bench, Listener, limits, naive, prompt, request};
    use proptest::prelude::*;
    use sparsed_kv::FileId;
    use std::time::Duration;

    /// A request under way.
    struct Asked {
        listener: Listener,
        n_prompt: u32,
    }

    impl Asked {
        fn is_over(&self) -> bool {
            matches!(self.listener.heard().1, Some(Event::Finished(_)))
        }

        /// Tokens that were computed for it, as far as its listener knows.
        fn n_tokens(&self) -> u32 {
            let n = self.listener.heard().0.len() as u32;
            if n > 0 { self.n_prompt + n } else { 0 }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..crate::seeded() })]

        /// One owner asks for everything at once, two others always have three requests: each gets its third.
        #[test]
        fn an_owner_that_floods_leaves_the_others_their_share(
            sizes in proptest::collection::vec((5..60u32, 5..40u32), 40..80),
            n_blocks in 8..30u32,
        ) {
            let mut bench = Bench::new(n_blocks, Limits { max_waiting: 1000, ..limits() });
            let mut asked: [Vec<Asked>; 3] = Default::default();
            let mut sizes = sizes.into_iter().cycle();
            for _ in 0..2000 {
                for (uid, asked) in (1..).zip(&mut asked) {
                    let open = if uid == 1 { 200 } else { 3 };
                    while asked.iter().filter(|asked| !asked.is_over()).count() < open {
                        let (n_prompt, n_answer) = sizes.next().unwrap();
                        let listener = Listener::with_room(1000);
                        let tokens = prompt(bench.submitted as u32, n_prompt);
                        bench.submit_of(Owner::Uid(uid), None, tokens, n_answer, &listener);
                        asked.push(Asked { listener, n_prompt });
                    }
                    asked.retain(|asked| asked.n_prompt > 0);
                }
                bench.steps(4);
                let total: u32 = asked.iter().flatten().map(Asked::n_tokens).sum();
                if total > 6000 {
                    break;
                }
            }
            let served = asked.map(|asked| asked.iter().map(Asked::n_tokens).sum::<u32>());
            let fair = served.iter().sum::<u32>() / 3;
            for n in served {
                prop_assert!(n.abs_diff(fair) * 5 <= fair, "{served:?}");
            }
        }
    }

    /// 64 sessions on a pool that holds eight of them, each with its next turn as soon as the last is over.
    #[test]
    fn sixty_four_sessions_take_turns_on_a_pool_for_eight() {
        let mut bench = Bench::new(8 * 5, Limits { max_running: 8, max_waiting: 64, ..limits() });
        let mut histories: Vec<Vec<u32>> = (0..64).map(|session| prompt(session, 200)).collect();
        let mut turns: Vec<Option<(Listener, usize)>> = vec![None; 64];
        let mut answered = [0_u32; 64];
        for _ in 0..6000 {
            for (session, history) in histories.iter_mut().enumerate() {
                let over = turns[session].as_ref().and_then(|(listener, n)| {
                    let (tokens, end) = listener.heard();
                    assert!(matches!(end, None | Some(Event::Finished(_))), "{end:?}");
                    end.map(|_| (tokens, *n))
                });
                if let Some((tokens, n_prompt)) = over {
                    assert_eq!(tokens, naive(history[..n_prompt].to_vec(), 8), "session {session}");
                    answered[session] += 8;
                    history.extend(tokens);
                    history.push(session as u32);
                    turns[session] = None;
                }
                if turns[session].is_none() && history.len() < 280 {
                    let file = FileId(session as u64);
                    let n_saved = (0..).take_while(|&i| bench.files.images.contains_key(&(file, i))).count() as u32;
                    let turn = Some(Turn { file, n_saved, resumed: Vec::new(), recorder: None });
                    let listener = Listener::with_room(1000);
                    let owner = Owner::Uid(session as u32 % 16);
                    let request = Generate { turn, ..request(owner, None, history.clone(), 8) };
                    bench.submit_request(request, &listener);
                    turns[session] = Some((listener, history.len()));
                }
            }
            bench.step();
            bench.now.set(bench.now.get() + Duration::from_millis(5));
            if answered.iter().sum::<u32>() >= 64 * 40 {
                break;
            }
        }
        let mean = answered.iter().sum::<u32>() / 64;
        assert!(mean >= 40, "{answered:?}");
        assert!(answered.iter().all(|n| n.abs_diff(mean) * 5 <= mean), "{answered:?}");
        let (tally, computed) = (bench.scheduler.tally(), bench.executor.computed as u64);
        assert!(tally.again_tokens * 20 < computed, "{} of {computed} tokens again", tally.again_tokens);
        assert!(tally.restored_tokens > 64 * 64, "nothing came from files");
    }

    #[test]
    fn a_user_whose_answers_fill_the_pool_makes_way_for_another_ones_first_request() {
        // Four with two blocks each, one block is left: of all, or of the fast ones.
        let limits = Limits { max_running: 8, slow_stateless: false, ..limits() };
        for mut bench in [Bench::new(9, limits), Bench::with_slow_tier(40, 9, limits)] {
            makes_way(&mut bench);
        }
    }

    fn makes_way(bench: &mut Bench) {
        let theirs: Vec<Listener> = (0..4).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&theirs) {
            bench.submit_of(Owner::Uid(1), None, prompt(seed, 70), 55, listener);
        }
        bench.steps(12);
        assert_eq!((bench.scheduler.load().running, bench.scheduler.load().blocks_used), (4, 8));
        let (other, second) = (Listener::with_room(1000), Listener::with_room(1000));
        bench.submit_of(Owner::Uid(2), None, prompt(9, 70), 20, &other);
        bench.submit_of(Owner::Uid(2), None, prompt(8, 70), 20, &second);
        bench.steps(2);
        assert!(other.heard().0.is_empty(), "answers may end soon");
        bench.now.set(bench.now.get() + Duration::from_secs(2));
        bench.steps(10);
        assert!(!other.heard().0.is_empty() && second.heard().0.is_empty(), "the first one, and no more");
        assert_eq!(bench.scheduler.tally().preempted, 1);
        bench.run();
        assert_eq!((other.heard().0, second.heard().0), (naive(prompt(9, 70), 20), naive(prompt(8, 70), 20)));
        for (seed, listener) in (0..).zip(&theirs) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 70), 55));
        }
    }

    #[test]
    fn nobody_makes_way_where_that_would_not_do() {
        let mut bench = Bench::new(8, limits());
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
        bench.submit_of(Owner::Uid(1), None, prompt(0, 300), 80, &listeners[0]);
        bench.submit_of(Owner::Uid(1), None, prompt(1, 70), 40, &listeners[1]);
        bench.steps(12);
        // Without the youngest there are three blocks, and five are needed.
        bench.submit_of(Owner::Uid(2), None, prompt(2, 200), 40, &listeners[2]);
        bench.now.set(bench.now.get() + Duration::from_secs(2));
        bench.steps(4);
        assert_eq!(bench.scheduler.tally().preempted, 0);
        bench.run();
        for (listener, (seed, n_prompt, n)) in listeners.iter().zip([(0, 300, 80), (1, 70, 40), (2, 200, 40)]) {
            assert_eq!(listener.heard().0, naive(prompt(seed, n_prompt), n));
        }
    }

    #[test]
    fn who_gave_way_computes_again_only_what_others_needed() {
        // Two that grow to six blocks each on a pool of eight.
        let mut bench = Bench::new(8, limits());
        let listeners: Vec<Listener> = (0..2).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 150), 220, listener);
        }
        bench.run();
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 150), 220));
        }
        // The younger one had three full blocks and a part of the fourth. The older one took the part's place and then
        // that of the last full block; the other two are found.
        let tally = bench.scheduler.tally();
        assert_eq!(tally.preempted, 1);
        assert!((1..2 * BLOCK as u64).contains(&tally.again_tokens), "{} tokens", tally.again_tokens);
    }

    #[test]
    fn a_request_that_cannot_begin_in_time_fails_by_name_and_others_do_not() {
        let mut bench = Bench::new(16, Limits { max_running: 1, ..limits() });
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
        for (deadline_ms, listener) in [Some(20), Some(20), None].into_iter().zip(&listeners) {
            let urgency = Urgency { priority: 0, deadline_ms };
            let request = Generate { urgency, ..request(Owner::Uid(1), None, prompt(1, 5), 40) };
            bench.submit_request(request, listener);
        }
        bench.run();
        assert_eq!(listeners[0].heard().0.len(), 40, "one that has begun goes on after its deadline");
        assert_eq!(listeners[1].heard().1, Some(Event::Failed(Failure::DeadlineExceeded { deadline_ms: 20 })));
        assert_eq!(listeners[2].heard().0.len(), 40);
    }

    #[test]
    fn an_owner_has_limits_of_its_own_and_is_told_how_long_to_wait() {
        let limits = Limits { per_user_running: 1, per_user_waiting: 2, ..limits() };
        let mut bench = Bench::new(32, limits);
        let listeners: Vec<Listener> = (0..5).map(|_| Listener::with_room(1000)).collect();
        let submit = |bench: &mut Bench, uid: u32, at: usize| {
            bench.submit_of(Owner::Uid(uid), None, prompt(1, 30), 20, &listeners[at]);
        };
        submit(&mut bench, 1, 0);
        for _ in 0..10 {
            bench.step();
        }
        // Ten steps of 100 ms each: 30 + 9 tokens.
        bench.scheduler.took(Duration::from_secs(1));
        (1..4).for_each(|at| submit(&mut bench, 1, at));
        submit(&mut bench, 2, 4);
        let Some(Event::Failed(Failure::UserQueueFull { limit: 2, retry_after_s })) = listeners[3].heard().1 else {
            panic!("{:?}", listeners[3].heard().1)
        };
        assert!(retry_after_s > 1, "{retry_after_s}");
        bench.step();
        assert_eq!(bench.scheduler.load().running, 2, "the other user does not wait");
        bench.run();
        assert!([0, 1, 2, 4].iter().all(|&at| listeners[at].heard().0.len() == 20));
    }

    #[test]
    fn the_owner_over_its_share_gives_way_though_another_one_is_younger() {
        let mut bench = Bench::new(6, limits());
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(1000)).collect();
        for (at, (uid, n)) in [(1, 100), (1, 100), (2, 20)].into_iter().enumerate() {
            bench.submit_of(Owner::Uid(uid), None, prompt(at as u32, n), 80, &listeners[at]);
            bench.steps(4);
        }
        assert_eq!(bench.scheduler.load().running, 3);
        while bench.scheduler.tally().preempted == 0 {
            bench.step();
        }
        let waiting: Vec<(Owner, u32)> = bench.scheduler.queue.owners().map(|o| (o.owner, o.waiting)).collect();
        assert_eq!(waiting, [(Owner::Uid(1), 1), (Owner::Uid(2), 0)]);
        bench.run();
        for (at, n) in [100, 100, 20].into_iter().enumerate() {
            assert_eq!(listeners[at].heard().0, naive(prompt(at as u32, n), 80));
        }
    }
}
