//! What does the scheduler do about short memory, and about work that is done again? The ladder's stage and the last
//! look at the memory become bounds of the pool, of a step and of who may begin.
//!
//! What is held is never taken from the last sequence that runs: it goes on beyond the bounds, alone.

use super::{Scheduler, count};
use crate::memory::{Ladder, Reading, Stage, Thrash};
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
}

/// Where things stand.
#[derive(Debug)]
pub(super) struct Relief {
    ladder: Ladder,
    thrash: Thrash,
    footprint: Footprint,
    reading: Reading,
    /// Of the last reading: blocks in use and latent planes in fast memory at most.
    room: Option<(u32, u32)>,
    /// Kept blocks when the cache was to grow no more.
    kept_max: u32,
    /// The bounds are to be reckoned anew.
    is_stale: bool,
}

impl Relief {
    pub(super) fn new(max_running: u32) -> Self {
        Self {
            ladder: Ladder::default(),
            thrash: Thrash::new(max_running),
            footprint: Footprint::default(),
            reading: Reading::default(),
            room: None,
            kept_max: 0,
            is_stale: false,
        }
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
    }
}

impl Scheduler {
    /// Says what blocks of the pool take; without that, readings bound nothing.
    pub(crate) fn weigh(&mut self, footprint: Footprint) {
        self.relief.footprint = footprint;
    }

    /// Takes a look at the memory. The same one again says nothing new.
    pub(crate) fn look(&mut self, reading: Reading, now: Duration) {
        if reading.number == self.relief.reading.number {
            return;
        }
        let before = self.relief.room;
        self.relief.reading = reading;
        self.relief.room = self.room_of(reading.headroom_bytes);
        self.relief.is_stale = true;
        if before.is_some() != self.relief.room.is_some() {
            let mib = reading.headroom_bytes >> 20;
            let reason = match self.relief.room {
                Some((blocks, fast)) => format!("headroom is {mib} MiB: at most {blocks} blocks, {fast} of them fast"),
                None => format!("headroom is {mib} MiB: the whole pool again"),
            };
            self.decisions.note(What::Bound, reason, &mut self.tally, now);
        }
    }

    /// Blocks in use and latent planes in fast memory that `headroom` leaves; `None`: all there are.
    fn room_of(&self, headroom: i64) -> Option<(u32, u32)> {
        let Footprint { block_bytes, latent_bytes, least_fast } = self.relief.footprint;
        if block_bytes == 0 {
            return None;
        }
        let (all, fast_all) = (self.pool.n_blocks(), self.pool.fast_max());
        let in_use = self.pool.n_used() + self.pool.n_kept();
        let fast = in_use - self.pool.n_slow();
        let blocks_in = |bytes: u64, each: u64| u32::try_from(bytes / each.max(1)).unwrap_or(u32::MAX);
        let bytes = headroom.unsigned_abs();
        let (blocks, fast) = match (headroom >= 0, fast_all < all) {
            (true, false) => (in_use.saturating_add(blocks_in(bytes, block_bytes)), all),
            // Half of it for blocks, half of it for the latent planes of those that are there.
            (true, true) => (
                in_use.saturating_add(blocks_in(bytes / 2, block_bytes - latent_bytes)),
                fast.saturating_add(blocks_in(bytes / 2, latent_bytes)),
            ),
            (false, false) => (in_use.saturating_sub(blocks_in(bytes, block_bytes).saturating_add(1)), all),
            (false, true) => {
                let away = blocks_in(bytes, latent_bytes).saturating_add(1);
                let can_go = fast.saturating_sub(least_fast);
                (in_use.saturating_sub(away.saturating_sub(can_go)), fast.saturating_sub(away).max(least_fast))
            }
        };
        (blocks < all || fast < fast_all.min(all)).then(|| (blocks.min(all), fast.min(fast_all)))
    }

    /// Does what is due: climbs or leaves rungs, judges the work of the last seconds, keeps the pool in its bounds.
    pub(super) fn relieve(&mut self, now: Duration) {
        let Reading { pressure, headroom_bytes, .. } = self.relief.reading;
        if let Some(step) = self.relief.ladder.look(pressure, now) {
            let (what, mib) = (if step.to > step.from { What::Climb } else { What::Descend }, headroom_bytes >> 20);
            let (from, to) = (step.from.name(), step.to.name());
            let reason = format!("pressure is {}, headroom {mib} MiB: from {from} to {to}", pressure.name());
            self.decisions.note(what, reason, &mut self.tally, now);
            if step.from == Stage::Calm {
                self.relief.kept_max = self.pool.n_kept();
            }
            self.relief.is_stale = true;
        }
        if let Some((new, again)) = self.relief.thrash.judge(count(self.running.len()), now) {
            let running_max = self.relief.running_max();
            let reason =
                format!("{again} tokens were computed or restored again, {new} are new: {running_max} may run");
            self.decisions.note(What::Thrash, reason, &mut self.tally, now);
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
        let (blocks, fast) = self.relief.room.unwrap_or((all, fast_all));
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
        self.decisions.note(What::Bound, reason, &mut self.tally, now);
        true
    }

    pub(super) fn show_relief(&self, board: &mut Board) {
        board.pressure = self.relief.reading.pressure;
        board.stage = self.relief.stage();
        board.headroom_bytes = self.relief.reading.headroom_bytes;
        board.blocks_max = self.pool.bounds().blocks;
        board.running_max = self.relief.running_max();
    }
}
