//! What can go wrong between a selection and its rows?

use crate::seal::PageFault;

/// Every failure of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowCacheError {
    /// A row does not fit into a page.
    #[error("rows of {row_bytes} bytes, a page holds 1 to {row_bytes_max}")]
    RowBytes {
        /// Latent and rope row together.
        row_bytes: usize,
        /// What a page has room for.
        row_bytes_max: usize,
    },
    /// A size is zero, overflows, or passes a named limit.
    #[error("{what} is zero or too large")]
    Size {
        /// Which size.
        what: &'static str,
    },
    /// A buffer is not as long as the layout says.
    #[error("{what}: {found} bytes instead of {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What the layout says.
        expected: usize,
    },
    /// There is no such page in a block.
    #[error("page {page} of {block_pages}")]
    NoSuchPage {
        /// Asked for.
        page: u32,
        /// In a block.
        block_pages: u32,
    },
    /// There is no such row in a block.
    #[error("layer {layer} of {n_layers}, token {token} of {block_tokens}")]
    NoSuchRow {
        /// Asked for.
        layer: u32,
        /// In a block.
        n_layers: u32,
        /// Asked for.
        token: u32,
        /// In a block.
        block_tokens: u32,
    },
    /// There is no such block in the pool.
    #[error("block {block} of {n_blocks}")]
    NoSuchBlock {
        /// Asked for.
        block: u32,
        /// In the pool.
        n_blocks: u32,
    },
    /// The block does not lie in the slow tier.
    #[error("block {block} is not in the slow tier")]
    NotAttached {
        /// Which.
        block: u32,
    },
    /// A block's image does not start at a page, or ends outside the slow area.
    #[error("block {block}: no image fits at byte {slow_offset} of the slow area")]
    Offset {
        /// Which.
        block: u32,
        /// Where it was said to be.
        slow_offset: u64,
    },
    /// More rows are needed at once than the cache can hold: ask for fewer at a time.
    #[error("{needed} rows at once, the cache holds {slots}")]
    TooSmall {
        /// Rows that would have to stay.
        needed: usize,
        /// Slots of the cache.
        slots: usize,
    },
    /// The page is not what was written: the block must be computed again.
    #[error("block {block}, layer {layer}, page {page}: {fault}")]
    BadPage {
        /// The block.
        block: u32,
        /// The layer whose rows the page holds.
        layer: u32,
        /// The page's number in the block.
        page: u32,
        /// What is wrong with it.
        fault: PageFault,
    },
}

/// What a call answers.
pub type Result<T> = std::result::Result<T, RowCacheError>;
