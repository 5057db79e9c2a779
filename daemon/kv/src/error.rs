//! What can a caller do nothing about but wait or make room?

/// Every failure of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// Fewer blocks are free and unreserved than were asked for; nothing has changed.
    #[error("{wanted} KV blocks wanted, {available} of {total} available")]
    OutOfBlocks {
        /// Asked for.
        wanted: u32,
        /// Free and not reserved.
        available: u32,
        /// In the pool.
        total: u32,
    },
    /// Held blocks fill fast memory; some must move to the slow tier first. Nothing has changed.
    #[error("{short} KV blocks of {fast_max} in fast memory have to move first")]
    OutOfFast {
        /// How many.
        short: u32,
        /// Most in fast memory.
        fast_max: u32,
    },
}
