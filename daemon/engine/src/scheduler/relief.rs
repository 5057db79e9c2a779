//! What does the scheduler do about short memory, and about work that is done again? The ladder's stage and the last
//! look at the memory become bounds of the pool, of a step and of who may begin.
//!
//! What is held is never taken from the last sequence that runs: it goes on beyond the bounds, alone.

use super::{Scheduler, count};
use crate::memory::{Ladder, Outlook, Stage, Thrash};
use crate::telemetry::{Board, What};
use sparsed_kv::Bounds;
use std::time::Duration;

/// Under short memory a step reads a quarter of the prompt tokens that it otherwise does.
const SMALL_CHUNK_SHIFT: u32 = 2;

/// What blocks of the pool take.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Footprint {
    /// Bytes of a block with both planes.
    pub(crate) block_bytes: u64,
    /// Of them, those of the latent plane.
    pub(crate) latent_bytes: u64,
    /// Blocks with their latent plane in fast memory that a step needs.
    pub(crate) least_fast: u32,
    /// Bytes of the whole pool, the cache of slow rows included.
    pub(crate) pool_bytes: u64,
    /// Bytes of the cache of slow rows; 0 where there is none.
    pub(crate) cache_bytes: u64,
    /// Of them, those that a step cannot do without.
    pub(crate) least_cache_bytes: u64,
}

/// What the cache of slow rows may take.
#[derive(Clone, Copy, Debug)]
struct CacheLimit {
    wanted: u64,
    /// What the device takes it to be.
    told: u64,
}

/// Where things stand.
#[derive(Debug)]
pub(super) struct Relief {
    ladder: Ladder,
    thrash: Thrash,
    footprint: Footprint,
    outlook: Outlook,
    /// Of the last reading: blocks in use and latent planes in fast memory at most.
    room: Option<(u32, u32)>,
    /// Bytes that the budget has for the pool.
    allowed: u64,
    /// Kept blocks when the cache was to grow no more.
    kept_max: u32,
    /// The bounds are to be reckoned anew.
    is_stale: bool,
    cache: CacheLimit,
}

impl Relief {
    pub(super) fn new(max_running: u32) -> Self {
        Self {
            ladder: Ladder::default(),
            thrash: Thrash::new(max_running),
            footprint: Footprint::default(),
            outlook: Outlook::default(),
            room: None,
            allowed: u64::MAX,
            kept_max: 0,
            is_stale: false,
            cache: CacheLimit { wanted: 0, told: 0 },
        }
    }

    /// Bytes of a block; 0 before they are known.
    pub(super) fn block_bytes(&self) -> u64 {
        self.footprint.block_bytes
    }

    pub(super) fn stage(&self) -> Stage {
        self.ladder.stage()
    }

    /// Most sequences that may run.
    pub(super) fn running_max(&self) -> u32 {
        self.thrash.running_max()
    }

    /// Tokens came into the pool, new ones and such that were there before.
    pub(super) fn note(&mut self, new: u32, again: u32) {
        self.thrash.note(new, again);
    }

    /// The pool is another one.
    pub(super) fn forget_bounds(&mut self) {
        self.room = None;
        self.is_stale = true;
        self.cache.told = self.footprint.cache_bytes;
    }

    /// Reckons what the cache of slow rows may take at a new stage: where latent planes move away the least, elsewhere
    /// half of what is left beside that.
    fn limit_cache(&mut self) {
        let Footprint { cache_bytes, least_cache_bytes, .. } = self.footprint;
        let left = u64::try_from(self.outlook.headroom_bytes).unwrap_or(0) / 2;
        self.cache.wanted = match self.stage() {
            Stage::Calm => cache_bytes,
            stage if stage >= Stage::Demote => least_cache_bytes,
            _ => self.cache.wanted.saturating_add(left).min(cache_bytes),
        };
    }
}

impl Scheduler {
    /// Says what blocks of the pool take; without that, readings bound nothing.
    pub(crate) fn weigh(&mut self, footprint: Footprint) {
        self.relief.footprint = footprint;
        self.relief.cache = CacheLimit { wanted: footprint.cache_bytes, told: footprint.cache_bytes };
    }

    /// What the cache of slow rows may take from now on, if that is not what it may take already.
    pub(crate) fn take_cache_limit(&mut self) -> Option<u64> {
        let CacheLimit { wanted, told } = &mut self.relief.cache;
        let is_there = self.pool.fast_max() < self.pool.n_blocks();
        (is_there && wanted != told).then(|| {
            *told = *wanted;
            *told
        })
    }

    /// Takes a look at the memory. The same one again says nothing new.
    pub(crate) fn look(&mut self, outlook: Outlook, now: Duration) {
        if outlook.number == self.relief.outlook.number {
            return;
        }
        let before = self.relief.room;
        self.relief.outlook = outlook;
        self.relief.room = self.room_of(outlook.headroom_bytes);
        self.relief.is_stale = true;
        if before.is_some() != self.relief.room.is_some() {
            let mib = outlook.headroom_bytes >> 20;
            let reason = match self.relief.room {
                Some((blocks, fast)) => format!("headroom is {mib} MiB: at most {blocks} blocks, {fast} of them fast"),
                None => format!("headroom is {mib} MiB: the whole pool again"),
            };
            self.decisions.note(What::Bound, None, reason, &mut self.tally, now);
        }
    }

    /// Blocks in use and latent planes in fast memory that `headroom` leaves; `None`: all there are.
    fn room_of(&self, headroom: i64) -> Option<(u32, u32)> {
        let Footprint { block_bytes, latent_bytes, .. } = self.relief.footprint;
        if block_bytes == 0 {
            return None;
        }
        let (all, fast_all) = (self.pool.n_blocks(), self.pool.fast_max());
        let in_use = self.pool.n_used() + self.pool.n_kept();
        let fast = in_use - self.pool.n_slow();
        let blocks_in = |bytes: u64, each: u64| u32::try_from(bytes / each.max(1)).unwrap_or(u32::MAX);
        let bytes = headroom.unsigned_abs();
        let (blocks, fast) = match (headroom >= 0, fast_all < all) {
            (false, _) => self.less((in_use, fast), bytes),
            (true, false) => (in_use.saturating_add(blocks_in(bytes, block_bytes)), all),
            // Half of it for blocks, half of it for the latent planes of those that are there.
            (true, true) => (
                in_use.saturating_add(blocks_in(bytes / 2, block_bytes - latent_bytes)),
                fast.saturating_add(blocks_in(bytes / 2, latent_bytes)),
            ),
        };
        let fast = if fast_all < all { fast } else { all };
        (blocks < all || fast < fast_all).then(|| (blocks.min(all), fast.min(fast_all)))
    }

    /// Uses so many bytes of the pool at most: what weights and workspace have left of the budget.
    pub(crate) fn allow(&mut self, bytes: u64) {
        self.relief.allowed = bytes;
        self.relief.is_stale = true;
    }

    /// Blocks and latent planes in fast memory that remain of `blocks` and `fast` when `bytes` of them go: latent
    /// planes first, as many as a step can do without.
    fn less(&self, (blocks, fast): (u32, u32), bytes: u64) -> (u32, u32) {
        let Footprint { block_bytes, latent_bytes, least_fast, .. } = self.relief.footprint;
        let blocks_in = |each: u64| u32::try_from(bytes.div_ceil(each.max(1))).unwrap_or(u32::MAX);
        if bytes == 0 || block_bytes == 0 {
            return (blocks, fast);
        }
        if self.pool.fast_max() == self.pool.n_blocks() {
            return (blocks.saturating_sub(blocks_in(block_bytes)), fast);
        }
        let away = blocks_in(latent_bytes);
        let can_go = fast.saturating_sub(least_fast);
        (blocks.saturating_sub(away.saturating_sub(can_go)), fast - away.min(can_go))
    }

    /// Does what is due: climbs or leaves rungs, judges the work of the last seconds, keeps the pool in its bounds.
    pub(super) fn relieve(&mut self, now: Duration) {
        let Outlook { pressure, headroom_bytes, .. } = self.relief.outlook;
        if let Some(step) = self.relief.ladder.look(pressure, now) {
            let (what, mib) = (if step.to > step.from { What::Climb } else { What::Descend }, headroom_bytes >> 20);
            let (from, to) = (step.from.name(), step.to.name());
            let reason = format!("pressure is {}, headroom {mib} MiB: from {from} to {to}", pressure.name());
            self.decisions.note(what, None, reason, &mut self.tally, now);
            if step.from == Stage::Calm {
                self.relief.kept_max = self.pool.n_kept();
            }
            self.relief.limit_cache();
            self.relief.is_stale = true;
        }
        if let Some((new, again)) = self.relief.thrash.judge(count(self.running.len()), now) {
            let running_max = self.relief.running_max();
            let reason =
                format!("{again} tokens were computed or restored again, {new} are new: {running_max} may run");
            self.decisions.note(What::Thrash, None, reason, &mut self.tally, now);
        }
        if std::mem::take(&mut self.relief.is_stale) {
            self.apply_bounds();
        }
        self.pool.trim(&mut self.freed);
        let stage = self.relief.stage();
        let beyond = self.pool.n_fast_beyond();
        if stage >= Stage::Demote && beyond > 0 {
            self.demote(beyond);
        }
        if stage >= Stage::Spill {
            self.spill(now);
        }
    }

    fn apply_bounds(&mut self) {
        let stage = self.relief.stage();
        let (all, fast_all) = (self.pool.n_blocks(), self.pool.fast_max());
        let Footprint { block_bytes, pool_bytes, .. } = self.relief.footprint;
        // The pool may be smaller than it was meant to be: for want of a slow tier, or of room on the device.
        let taken = if all == fast_all { pool_bytes.min(u64::from(all) * block_bytes) } else { pool_bytes };
        let missing = taken.saturating_sub(self.relief.allowed);
        let (budget_blocks, budget_fast) = self.less((all, fast_all), missing);
        let (blocks, fast) = self.relief.room.unwrap_or((all, fast_all));
        let (blocks, fast) = (blocks.min(budget_blocks), fast.min(budget_fast));
        let kept = match stage {
            Stage::Calm => all,
            Stage::KeepNoMore => self.relief.kept_max,
            _ => 0,
        };
        self.pool.bound(Bounds { blocks, kept, fast });
        let most = self.limits.max_batched_tokens;
        let small = (most >> SMALL_CHUNK_SHIFT).max(1);
        self.pace.bound(if stage >= Stage::SmallChunks { small } else { most });
    }

    /// Lets go of blocks that only wait to be saved, and sends sequences back until the others are within the bounds.
    fn spill(&mut self, now: Duration) {
        let is_beyond = |scheduler: &Self| scheduler.pool.n_used() > scheduler.pool.bounds().blocks;
        if is_beyond(self) {
            self.archive.give_up(&mut self.pool, &mut self.freed);
        }
        while is_beyond(self) && self.running.len() > 1 {
            self.preempt(What::Spill, "memory is short", now);
            self.pool.trim(&mut self.freed);
        }
    }

    /// Lets the last sequence that runs go on beyond the bounds. Answers whether there were any.
    pub(super) fn exceed_bounds(&mut self, now: Duration) -> bool {
        let (all, fast, bounds) = (self.pool.n_blocks(), self.pool.fast_max(), self.pool.bounds());
        if bounds.blocks == all && bounds.fast == fast {
            return false;
        }
        self.pool.bound(Bounds { blocks: all, kept: 0, fast });
        let reason = format!("the only sequence that runs needs more than {} blocks: it goes on", bounds.blocks);
        self.decisions.note(What::Bound, None, reason, &mut self.tally, now);
        true
    }

    pub(super) fn show_relief(&self, board: &mut Board) {
        board.pressure = self.relief.outlook.pressure;
        board.stage = self.relief.stage();
        board.headroom_bytes = self.relief.outlook.headroom_bytes;
        board.blocks_max = self.pool.bounds().blocks;
        board.running_max = self.relief.running_max();
    }
}

#[cfg(test)]
mod tests {
    use super::Footprint;
    use crate::api::{Event, Failure, Owner};
    use crate::memory::{Outlook, Pressure, Stage};
    use crate::scheduler::Limits;
    use crate::telemetry::Board;
    use crate::testing::{Bench, Listener, limits, naive, prompt};
    use proptest::prelude::*;
    use std::time::Duration;

    /// A KiB each for index and latent plane.
    const FOOTPRINT: Footprint = Footprint {
        block_bytes: 2048,
        latent_bytes: 1024,
        least_fast: 3,
        pool_bytes: 16_384,
        cache_bytes: 5000,
        least_cache_bytes: 100,
    };

    fn bench(n_blocks: u32, n_fast: u32, limits: Limits) -> Bench {
        let mut bench = Bench::with_slow_tier(n_blocks, n_fast, limits);
        bench.scheduler.weigh(FOOTPRINT);
        bench
    }

    fn look(bench: &mut Bench, pressure: Pressure, headroom_bytes: i64) {
        let number = bench.now.get().as_millis() as u64 + 1;
        bench.scheduler.look(Outlook { number, pressure, headroom_bytes }, bench.now.get());
    }

    /// Lets so many seconds pass with a look and a step in each.
    fn seconds(bench: &mut Bench, n: u64, pressure: Pressure, headroom_bytes: i64) {
        for _ in 0..n {
            bench.now.set(bench.now.get() + Duration::from_secs(1));
            look(bench, pressure, headroom_bytes);
            bench.step();
        }
    }

    fn board(bench: &Bench) -> Board {
        let mut board = Board::default();
        bench.scheduler.show(&mut board);
        board
    }

    #[test]
    fn responses_come_in_order_and_end_with_a_refusal_that_says_when_to_come_again() {
        let mut bench = bench(32, 32, Limits { max_batched_tokens: 400, ..limits() });
        let cached = Listener::with_room(1000);
        bench.submit(prompt(1, 300), 1, &cached);
        bench.run();
        assert_eq!(bench.scheduler.load().blocks_cached, 4);
        let running = Listener::with_room(1000);
        bench.submit(prompt(2, 10), 300, &running);
        seconds(&mut bench, 1, Pressure::Some, 1 << 20);
        assert_eq!((board(&bench).stage, bench.scheduler.load().blocks_cached), (Stage::KeepNoMore, 4));
        seconds(&mut bench, 2, Pressure::Some, 1 << 20);
        assert_eq!((board(&bench).stage, bench.scheduler.load().blocks_cached), (Stage::DropCache, 0));
        seconds(&mut bench, 6, Pressure::Some, 1 << 20);
        assert_eq!((board(&bench).stage, board(&bench).chunk_tokens), (Stage::SmallChunks, 100));
        seconds(&mut bench, 2, Pressure::Some, 1 << 20);
        let (held, refused) = (Listener::with_room(1000), Listener::with_room(1000));
        bench.submit(prompt(3, 10), 5, &held);
        seconds(&mut bench, 3, Pressure::Critical, 1 << 20);
        assert_eq!(board(&bench).stage, Stage::Refuse);
        bench.submit(prompt(4, 10), 5, &refused);
        assert!(matches!(refused.heard().1, Some(Event::Failed(Failure::MemoryShort { retry_after_s: 10 }))));
        assert!(held.heard().0.is_empty() && running.heard().0.len() >= 14, "who runs goes on, who waits waits");
        seconds(&mut bench, 80, Pressure::None, 1 << 20);
        assert_eq!((board(&bench).stage, held.heard().0.len()), (Stage::Calm, 5));
        let kinds: Vec<&str> = board(&bench).decisions.iter().map(|decision| decision.what.name()).collect();
        assert_eq!(kinds, [vec!["climb"; 7], vec!["memory_short"], vec!["descend"; 7]].concat());
    }

    #[test]
    fn a_budget_that_shrinks_sends_sequences_back_and_ends_none() {
        let mut bench = bench(32, 32, limits());
        let listeners: Vec<Listener> = (0..4).map(|_| Listener::with_room(1000)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit(prompt(seed, 100), 150, listener);
        }
        bench.steps(60);
        assert_eq!(bench.scheduler.load().running, 4);
        let used = bench.scheduler.load().blocks_used;
        // Four blocks are to be given back: one sequence, or two.
        look(&mut bench, Pressure::Critical, -8192);
        bench.step();
        let load = bench.scheduler.load();
        assert!(load.blocks_used + load.blocks_cached <= used - 4 && load.running >= 2, "{load:?} of {used}");
        assert!(bench.scheduler.tally().decisions[4] >= 1, "it was not for the memory");
        // Less than one sequence needs: one goes on alone, to its end; then the next.
        look(&mut bench, Pressure::Critical, -(1 << 20));
        bench.run();
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 100), 150), "request {seed}");
        }
    }

    #[test]
    fn latent_planes_move_when_memory_gets_short_while_nobody_needs_a_block() {
        let mut bench = bench(16, 12, Limits { max_batched_tokens: 64, ..limits() });
        let listener = Listener::with_room(1000);
        bench.submit(prompt(1, 330), 60, &listener);
        bench.steps(10);
        assert_eq!(bench.scheduler.load().blocks_slow, 0);
        look(&mut bench, Pressure::Critical, -2048);
        bench.steps(6);
        assert_eq!(bench.scheduler.load().blocks_slow, 2);
        assert_eq!(bench.scheduler.tally().decisions[4], 0, "the only one that runs does not wait");
        assert!(!board(&bench).decisions.iter().any(|decision| decision.reason.contains("goes on")));
        bench.run();
        assert_eq!(listener.heard().0, naive(prompt(1, 330), 60));
    }

    #[test]
    fn the_cache_of_slow_rows_gives_way_at_once_and_comes_back_bit_by_bit() {
        let mut bench = bench(16, 12, limits());
        seconds(&mut bench, 9, Pressure::Critical, -2048);
        assert_eq!(bench.executor.cache_limits, [100]);
        // From refuse down to demote, then twice half of what is left, and all in the end.
        seconds(&mut bench, 60, Pressure::None, 3000);
        assert_eq!(bench.executor.cache_limits, [100, 1600, 3100]);
        seconds(&mut bench, 20, Pressure::None, 1 << 20);
        assert_eq!(bench.executor.cache_limits, [100, 1600, 3100, 5000]);
        // A new device has a cache of the whole size.
        seconds(&mut bench, 1, Pressure::Critical, -2048);
        bench.scheduler.requeue_on(sparsed_kv::Pool::with_slow_tier(16, 12));
        bench.step();
        assert_eq!(bench.executor.cache_limits, [100, 1600, 3100, 5000, 100, 100]);
    }

    #[test]
    fn a_pool_without_a_slow_tier_has_no_cache_to_limit() {
        let mut bench = bench(16, 16, limits());
        seconds(&mut bench, 9, Pressure::Critical, -2048);
        assert!(bench.executor.cache_limits.is_empty());
    }

    #[test]
    fn where_memory_stays_tight_requests_begin_one_by_one() {
        let mut bench = bench(16, 16, limits());
        seconds(&mut bench, 20, Pressure::Some, 1 << 20);
        assert_eq!(board(&bench).stage, Stage::Hold);
        let listeners: Vec<Listener> = (0..3).map(|_| Listener::with_room(100)).collect();
        for (seed, listener) in (0..).zip(&listeners) {
            bench.submit_of(Owner::Uid(seed), None, prompt(seed, 30), 5, listener);
        }
        for _ in 0..40 {
            seconds(&mut bench, 1, Pressure::Some, 1 << 20);
            assert!(bench.scheduler.load().running <= 1);
        }
        for (seed, listener) in (0..).zip(&listeners) {
            assert_eq!(listener.heard().0, naive(prompt(seed, 30), 5), "request {seed}");
        }
        // What has no room at all hears when to come again.
        let long = Listener::with_room(100);
        bench.submit(prompt(1, 300), 5, &long);
        seconds(&mut bench, 2, Pressure::Some, 2048);
        assert!(matches!(long.heard().1, Some(Event::Failed(Failure::MemoryShort { .. }))), "{:?}", long.heard().1);
    }

    #[test]
    fn a_prompt_that_does_not_fit_any_more_is_refused_and_not_kept_for_ever() {
        let mut bench = bench(16, 16, limits());
        look(&mut bench, Pressure::None, 3 * 2048);
        bench.step();
        let (long, short) = (Listener::with_room(100), Listener::with_room(100));
        bench.submit(prompt(1, 300), 5, &long);
        bench.submit(prompt(1, 30), 5, &short);
        assert!(matches!(long.heard().1, Some(Event::Failed(Failure::MemoryShort { .. }))));
        bench.run();
        assert_eq!(short.heard().0, naive(prompt(1, 30), 5));
    }

    #[test]
    fn what_weights_have_not_left_is_not_used() {
        let mut bench = bench(8, 8, limits());
        bench.scheduler.allow(3 * 2048);
        bench.step();
        assert_eq!(board(&bench).blocks_max, 3);
        bench.scheduler.requeue();
        bench.step();
        assert_eq!(board(&bench).blocks_max, 3, "after the device was lost as well");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..crate::seeded() })]

        /// However memory comes and goes, who is answered is answered as without that, and nobody who ran is ended.
        #[test]
        fn answers_do_not_depend_on_memory(
            requests in proptest::collection::vec((1..300u32, 1..80u32, 0..20usize, 0..3u32), 1..10),
            looks in proptest::collection::vec((0..3u8, -40_000..40_000i64), 1..40),
            n_blocks in 8..24u32,
            n_fast in 4..24u32,
            target in prop_oneof![Just(None), (1..50u64).prop_map(|ms| Some(Duration::from_millis(ms)))],
        ) {
            let limits = Limits { max_batched_tokens: 64, tpot_target: target, max_waiting: 20, ..limits() };
            let mut bench = bench(n_blocks, n_fast.min(n_blocks), limits);
            let mut looks = looks.into_iter().cycle().take(600);
            let mut press = |bench: &mut Bench| {
                bench.now.set(bench.now.get() + Duration::from_millis(400));
                let (pressure, headroom) = looks.next().unwrap_or((0, i64::MAX));
                let pressure = [Pressure::None, Pressure::Some, Pressure::Critical][usize::from(pressure)];
                look(bench, pressure, headroom);
            };
            let mut listeners = Vec::new();
            for (seed, (n_prompt, n_answer, steps, uid)) in (0..).zip(requests) {
                let listener = Listener::with_room(10_000);
                bench.submit_of(Owner::Uid(uid), None, prompt(seed, n_prompt), n_answer, &listener);
                for _ in 0..steps {
                    press(&mut bench);
                    bench.step();
                }
                listeners.push((listener, seed, n_prompt, n_answer));
            }
            for _ in 0..4000 {
                press(&mut bench);
                bench.step();
            }
            prop_assert!(bench.scheduler.is_idle());
            for (listener, seed, n_prompt, n_answer) in listeners {
                let (tokens, end) = listener.heard();
                match end {
                    Some(Event::Failed(Failure::MemoryShort { .. })) => prop_assert!(tokens.is_empty()),
                    Some(Event::Finished(_)) => prop_assert_eq!(tokens, naive(prompt(seed, n_prompt), n_answer)),
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            prop_assert_eq!(bench.scheduler.load().blocks_used, 0);
        }
    }
}
