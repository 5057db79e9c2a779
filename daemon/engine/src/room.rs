//! How much of the KV cache fits the memory there is, and what of it lies in the slow tier?
//!
//! Where all of it fits nothing is slow. Otherwise the index planes stay in memory for as many blocks as possible, with
//! a share of the latent planes: `blocks * (index + lookup + hot * latent)` bytes. The share, and what no further block
//! is wanted for, goes to cached rows first: fewer than one step selects are of no use, and more than three steps'
//! bring little (`daemon/kv/WORKLOAD.md`). What is left keeps whole blocks.
//!
//! Where requests without a session may not be slow, whole blocks are all that they have. Then some come first: as many
//! as a context of the wanted length takes, where a session of that length finds room for its index planes and rows
//! beside them; never fewer than half of what memory holds where nothing is slow. They count as part of the hot share,
//! since sessions use them too while nobody else does.

use crate::scheduler::Limits;
use sparsed_kv::{BLOCK_TOKENS, blocks_for};
use std::path::PathBuf;

/// Bytes per row by which the CPU plugin finds it in its cache.
const LOOKUP_BYTES: u64 = 4;
/// Bytes of a cached row beside the row.
const SLOT_BYTES: u64 = 28;
/// Steps whose selections the cache of rows is to hold.
const CACHE_STEPS: u64 = 3;
/// One part in so many of the memory goes to them even where the hot share is smaller and another sequence would fit.
const CACHE_PARTS: u64 = 4;
/// One part in so many of what memory holds where nothing is slow is fast, if some requests may not be slow.
const FAST_PARTS: u32 = 2;
/// Memory that readers of the slow tier need.
const READERS_BYTES: u64 = 2 << 20;
/// Fast blocks beyond those of one step: they are on their way to the slow tier or to a session's file.
const SPARE_BLOCKS: u32 = 24;

/// Where and how much of the KV cache may be slow.
#[derive(Clone, Debug)]
pub struct SlowTier {
    /// The folder of its file.
    pub dir: PathBuf,
    /// The share of latent planes that stays in memory, `0 ..= 1`.
    pub hot_share: f64,
}

/// What a model's KV cache takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// Bytes of a token in the index plane.
    pub(crate) index_bytes: u64,
    /// Bytes of a token in the latent plane.
    pub(crate) latent_bytes: u64,
    /// Rows of a token in the latent plane.
    pub(crate) layers: u64,
    /// Tokens that attention selects.
    pub(crate) top_k: u64,
    /// Most tokens of a sequence that were asked for.
    pub(crate) context: u32,
}

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// Most tokens of a sequence.
    pub(crate) max_context: u32,
    /// Blocks of the pool.
    pub(crate) n_blocks: u32,
    /// Of them, those with their latent plane in memory.
    pub(crate) n_fast: u32,
    /// Memory for rows of the others.
    pub(crate) cache_bytes: u64,
    /// Of it, what a step cannot do without.
    pub(crate) least_cache_bytes: u64,
}

impl Need {
    /// Bytes of a block with both planes.
    pub(crate) fn block_bytes(&self) -> u64 {
        (self.index_bytes + self.latent_bytes) * u64::from(BLOCK_TOKENS)
    }

    /// Bytes of memory that a pool takes.
    pub(crate) fn bytes_of(&self, room: &Room) -> u64 {
        let tokens = u64::from(BLOCK_TOKENS);
        let (n_blocks, n_fast) = (u64::from(room.n_blocks), u64::from(room.n_fast));
        let whole = n_fast * self.latent_bytes * tokens + n_blocks * self.index_bytes * tokens;
        if room.n_fast == room.n_blocks {
            return whole;
        }
        whole + n_blocks * LOOKUP_BYTES * self.layers * tokens + room.cache_bytes + READERS_BYTES
    }

    /// All in memory, as much as fits.
    pub(crate) fn without_slow_tier(&self, budget: u64, limits: Limits) -> Room {
        let all = u64::from(limits.max_running) * u64::from(blocks_for(self.context));
        let n_blocks = whole((budget / self.block_bytes().max(1)).min(all));
        let max_context = self.context.min(n_blocks * BLOCK_TOKENS);
        Room { max_context, n_blocks, n_fast: n_blocks, cache_bytes: 0, least_cache_bytes: 0 }
    }

    /// As [`without_slow_tier`](Self::without_slow_tier) where the wanted context fits for everybody, otherwise with
    /// some of it in the slow tier.
    pub(crate) fn with_slow_tier(&self, budget: u64, limits: Limits, hot_share: f64) -> Room {
        let plain = self.without_slow_tier(budget, limits);
        let all = limits.max_running.saturating_mul(blocks_for(self.context));
        if plain.n_blocks >= all {
            return plain;
        }
        let tokens = u64::from(BLOCK_TOKENS);
        let (cold, latent) = ((self.index_bytes + LOOKUP_BYTES * self.layers) * tokens, self.latent_bytes * tokens);
        let least_fast = least_fast(limits);
        let least = u64::from(least_fast) * latent + READERS_BYTES;
        // A token's rows in one layer are in memory together, and those of the next token.
        let layer_bytes = self.top_k * (self.latent_bytes / self.layers.max(1) + SLOT_BYTES);
        let least_cache = 2 * layer_bytes;
        // Less than a step beside what moves: a slow tier is of no use.
        let Some(left) = budget.checked_sub(least + least_cache) else { return plain };
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share"
        )]
        let share = |bytes: u64| (bytes as f64 * hot_share.clamp(0.0, 1.0)) as u64;
        let hot = share(latent);
        let steps_bytes = CACHE_STEPS * layer_bytes * self.layers;
        let least_rows = steps_bytes.min(left / CACHE_PARTS);
        let context = u64::from(blocks_for(self.context));
        let fast_first = if limits.slow_stateless {
            0
        } else {
            let beside_one = left.saturating_sub(cold * context + least_rows) / latent.max(1);
            let one = context.min(u64::from(least_fast) + beside_one);
            one.max(u64::from(plain.n_blocks / FAST_PARTS)).saturating_sub(least_fast.into()) * latent
        };
        let beside = left.saturating_sub(fast_first);
        // One sequence of the wanted length comes before the rows.
        let one = context.min(beside / cold.max(1));
        let most = (left / (cold + hot).max(1)).min((beside.saturating_sub(least_rows) / cold.max(1)).max(one));
        let n_blocks = whole(most.min(u64::from(all)));
        let hot_bytes = left - cold * u64::from(n_blocks);
        // So many sequences of full length may be read by turns, each from its own rows.
        let n_seqs = u64::from((n_blocks / blocks_for(self.context).max(1)).clamp(1, limits.max_running.max(1)));
        let rows_bytes = hot_bytes.saturating_sub(fast_first).min(steps_bytes * n_seqs);
        let n_fast = least_fast + whole((hot_bytes - rows_bytes) / latent.max(1));
        let room = Room {
            max_context: self.context.min(n_blocks * BLOCK_TOKENS),
            n_blocks,
            n_fast: n_fast.min(n_blocks),
            cache_bytes: least_cache + rows_bytes,
            least_cache_bytes: least_cache,
        };
        // So little memory that keeping all in it holds more, or a whole context that would be cut for the slow tier.
        let is_cut = plain.max_context == self.context && room.stateless_context(limits) < self.context;
        if room.n_blocks > plain.n_blocks && !is_cut { room } else { plain }
    }
}

impl Room {
    /// Most tokens of a request without a session.
    pub(crate) fn stateless_context(&self, limits: Limits) -> u32 {
        let n_blocks = if limits.slow_stateless { self.n_blocks } else { self.n_fast };
        self.max_context.min(n_blocks.saturating_mul(BLOCK_TOKENS))
    }
}

/// Blocks that need their latent plane in memory for a step to run beside what moves.
pub(crate) fn least_fast(limits: Limits) -> u32 {
    blocks_for(limits.max_batched_tokens) + limits.max_running + SPARE_BLOCKS
}

fn whole(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX).min(u32::MAX / BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// The default model's: 30 layers, rows of 384 and 68 bytes.
    const NEED: Need = Need { index_bytes: 30 * 68, latent_bytes: 30 * 384, layers: 30, top_k: 512, context: 32_768 };
    const LIMITS: Limits = Limits {
        max_running: 4,
        max_waiting: 8,
        max_batched_tokens: 256,
        slow_consumer: Duration::from_secs(1),
        slow_stateless: true,
        per_user_running: 4,
        per_user_waiting: 8,
        tpot_target: None,
        per_user_requests: 8,
        per_user_queued_tokens: u64::MAX,
        per_user_kv_bytes: u64::MAX,
    };

    /// As the defaults have it: rows in f16, and requests without a session are not slow.
    const WIDE: Need = Need { latent_bytes: 30 * 768, context: 8192, ..NEED };
    const DEFAULTS: Limits = Limits { max_running: 16, slow_stateless: false, ..LIMITS };

    /// The figures of `tests/bench/RESULTS.md`: tokens without a session, of one request and of all together, and those
    /// of the pool.
    #[test]
    fn requests_without_a_session_have_a_whole_context_or_half_of_what_memory_holds() {
        let figures = [
            (64, 2624, 2624, 2624),
            (128, 4160, 4160, 8704),
            (256, 8192, 8192, 18_560),
            (512, 8192, 10_688, 69_248),
            (768, 8192, 16_000, 108_928),
            (1024, 8192, 21_376, 131_072),
        ];
        for (mib, one, together, all) in figures {
            let room = WIDE.with_slow_tier(mib << 20, DEFAULTS, 0.2);
            let found = (room.stateless_context(DEFAULTS), room.n_fast * BLOCK_TOKENS, room.n_blocks * BLOCK_TOKENS);
            assert_eq!(found, (one, together, all), "{mib} MiB: {room:?}");
        }
        for mib in 40..2000 {
            for (context, hot) in [(2048, 0.0), (8192, 0.0), (8192, 0.2), (32_768, 0.07), (1 << 20, 0.2), (8192, 0.7)] {
                let need = Need { context, ..WIDE };
                let room = need.with_slow_tier(mib << 20, DEFAULTS, hot);
                let plain = need.without_slow_tier(mib << 20, DEFAULTS);
                assert!(need.bytes_of(&room) <= mib << 20, "{mib} MiB: {room:?}");
                assert!(room.n_fast >= plain.n_blocks / 2, "{mib} MiB, context {context}: {room:?}, {plain:?}");
                let is_whole = room.stateless_context(DEFAULTS) == context;
                assert!(is_whole || plain.max_context < context, "{mib} MiB, context {context}: {room:?}");
                assert!(room.max_context >= plain.max_context, "{mib} MiB, context {context}: {room:?}");
            }
        }
    }

    /// The figures of `tests/bench/RESULTS.md`, for rows in f16 and in 8 bits: the longest context at hot shares of 0,
    /// 7 and 20 %, where all requests may be slow and where sessions may.
    #[test]
    fn the_longest_context_is_what_the_documents_say() {
        let figures = [
            (30 * 768, true, [217_152, 124_288, 69_248]),
            (30 * 768, false, [133_184, 124_288, 69_248]),
            (30 * 408, true, [231_360, 165_632, 108_416]),
            (30 * 408, false, [141_056, 141_056, 108_416]),
        ];
        for (latent_bytes, slow_stateless, expected) in figures {
            let need = Need { latent_bytes, context: 1 << 20, ..NEED };
            let limits = Limits { slow_stateless, ..DEFAULTS };
            let found = [0.0, 0.07, 0.2].map(|hot| need.with_slow_tier(512 << 20, limits, hot).max_context);
            assert_eq!(found, expected, "{latent_bytes} bytes, all may be slow: {slow_stateless}");
        }
    }

    #[test]
    fn what_fits_is_not_slow() {
        let room = NEED.with_slow_tier(4 << 30, LIMITS, 0.2);
        assert_eq!((room.n_blocks, room.n_fast, room.cache_bytes), (2048, 2048, 0));
    }

    #[test]
    fn what_does_not_fit_keeps_its_index_planes_in_memory() {
        let budget = 128 << 20;
        let plain = NEED.without_slow_tier(budget, LIMITS);
        for (hot, times) in [(0.0, 3.5), (0.07, 2.8), (0.2, 2.0)] {
            let room = NEED.with_slow_tier(budget, LIMITS, hot);
            let more = f64::from(room.n_blocks) / f64::from(plain.n_blocks);
            assert!(more > times, "{hot}: {more}");
            let taken = NEED.bytes_of(&room);
            assert!(taken <= budget, "{taken}");
        }
    }

    /// Bytes of the rows that one step selects in all layers.
    const STEP: u64 = 30 * 512 * (384 + SLOT_BYTES);

    #[test]
    fn rows_of_three_steps_come_before_blocks() {
        let one = Limits { max_running: 1, ..LIMITS };
        // 8192 tokens of which 7 and 20 % are to be hot, and 32768: as half of the share it was 0.5 to 6 steps.
        for (context, budget, hot) in [(8192, 64 << 20, 0.07), (8192, 64 << 20, 0.2), (32_768, 128 << 20, 0.07)] {
            let need = Need { context, ..NEED };
            let room = need.with_slow_tier(budget, one, hot);
            assert!(room.n_fast < room.n_blocks, "{room:?}");
            let steps = room.cache_bytes / STEP;
            assert_eq!(steps, 3, "{context}, {hot}: {room:?}");
            let taken = need.bytes_of(&room);
            assert!(taken <= budget && budget - taken < 1 << 20, "{context}, {hot}: {taken} of {budget}");
        }
    }

    #[test]
    fn without_a_hot_share_a_step_still_finds_its_rows_where_there_is_memory() {
        let one = Limits { max_running: 1, ..LIMITS };
        let two = Limits { max_running: 2, ..LIMITS };
        let room = NEED.with_slow_tier(160 << 20, two, 0.0);
        assert!(room.n_blocks > 512 && room.n_blocks < 1024 && room.cache_bytes >= 2 * STEP, "{room:?}");
        // What one sequence needs is not taken for rows.
        let room = NEED.with_slow_tier(100 << 20, one, 0.0);
        assert!(room.n_blocks == 512 && room.cache_bytes < 2 * STEP, "{room:?}");
    }

    #[test]
    fn memory_that_no_further_block_is_wanted_for_is_used_too() {
        let one = Limits { max_running: 1, ..LIMITS };
        let budget = 350 << 20;
        let room = NEED.with_slow_tier(budget, one, 0.0);
        assert_eq!(room.n_blocks, 512);
        let taken = NEED.bytes_of(&room);
        assert!(taken <= budget && budget - taken < 1 << 20, "{taken} of {budget}: {room:?}");
    }

    #[test]
    fn a_budget_for_less_than_a_step_with_a_slow_tier_has_none() {
        let room = NEED.with_slow_tier(20 << 20, LIMITS, 0.2);
        assert_eq!(room, NEED.without_slow_tier(20 << 20, LIMITS));
        assert_eq!(room.n_blocks, 24);
    }
}
