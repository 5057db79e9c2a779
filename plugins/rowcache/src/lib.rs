//! Which rows of the slow tier are in memory, and what must be read for the others?
//!
//! The latent plane of a block may lie in a slow tier (a file, or pinned host memory) in pages of 4 KiB that the daemon
//! writes and a plugin reads. Which rows a step needs is known only after its top-k selection, inside the step:
//!
//! 1. [`RowCache::lookup`] takes the selected rows and answers with [`Read`]s, sorted and merged.
//! 2. Somebody reads them, in any order ([`RowCache`] knows no file, clock or thread).
//! 3. [`RowCache::admit`] checks and decrypts each page and keeps the rows that were asked for.
//! 4. [`RowCache::row`] gives every row that was asked for, until [`RowCache::release`].
//!
//! [`SlowLayout`] and [`Seal`] are the format of the pages, for both sides.
//!
//! Invariants: no byte of a page that fails its checks is ever given out; a row that was asked for stays until the
//! release; what a failed step leaves behind is right, so the step can be repeated; nothing is allocated after creation
//! but one map of 4 bytes per row when a block is attached.
#![forbid(unsafe_code)]

mod cache;
mod error;
mod layout;
mod lookup;
mod replacement;
mod seal;

pub use cache::{Counters, RowCache, SLOT_OVERHEAD_BYTES};
pub use error::{Result, RowCacheError};
pub use layout::{BLOCK_PAGES_MAX, PAGE_BYTES, PageBytes, SlowLayout, TRAILER_BYTES};
pub use lookup::{Lookup, READ_PAGES_MAX, Read, RowKey};
pub use replacement::{HITS_MAX, Policy, Replacement};
pub use seal::{Cipher, PageFault, Seal, SlowKey};
