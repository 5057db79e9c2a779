//! How long is a block, and where in the pool do its tokens lie?
//!
//! Slot `s` is token `s % BLOCK_TOKENS` of block `s / BLOCK_TOKENS`, as `abi/include/sparsed/plugin.h` counts them.

/// Tokens in a block.
pub const BLOCK_TOKENS: u32 = 64;

/// A block of a device's pool, `0 .. n_blocks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The slot of token `offset` of this block.
    ///
    /// # Panics
    /// When `offset` is not below [`BLOCK_TOKENS`].
    pub fn slot(self, offset: u32) -> u64 {
        assert!(offset < BLOCK_TOKENS, "token {offset} of a block of {BLOCK_TOKENS}");
        u64::from(self.0) * u64::from(BLOCK_TOKENS) + u64::from(offset)
    }
}

/// The blocks that `n_tokens` tokens of one sequence fill, the last one perhaps in part.
pub const fn blocks_for(n_tokens: u32) -> u32 {
    n_tokens.div_ceil(BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_up() {
        let counts = [0, 1, 63, 64, 65, 128, u32::MAX].map(blocks_for);
        assert_eq!(counts, [0, 1, 1, 1, 2, 2, 1 << 26]);
    }

    #[test]
    fn slots_of_the_last_block_do_not_wrap() {
        assert_eq!(BlockId(0).slot(63), 63);
        assert_eq!(BlockId(u32::MAX).slot(63), (u64::from(u32::MAX) << 6) + 63);
    }
}
