//! Where does each block of the KV cache live?
//!
//! A *block* is 64 consecutive tokens of one sequence in every layer. [`Pool`] says which blocks of a device are free
//! and how many hold on to the others; [`BlockTable`] is one sequence's blocks in order and turns tokens into slots.
//!
//! [`Archive`] holds the full blocks of sessions that are still to be written into their files.
//!
//! [`PrefixHasher`] names full blocks by what they contain, so that sequences that begin alike share them.
//!
//! [`Place`] says whether a block's latent plane is in fast memory or in the slow tier.
//!
//! Knows no time, no file and no device: it decides, others carry out. Whoever gives a block back gets
//! told when nobody holds it any more and must have the device discard its content before the next step runs.
//!
//! While memory is short a pool is bounded: kept blocks go, and nobody is promised a block beyond; what is held stays.
//!
//! Invariants, asserted in release too: free + kept + held = all blocks; reserved <= free + kept; a held block has
//! `ref_count` >= 1; nobody writes into a block that somebody else holds as well, or that was sealed.
#![forbid(unsafe_code)]

mod archive;
mod block;
mod error;
mod kept;
mod pool;
mod prefix;
mod table;
mod tier;

pub use archive::{Archive, FileId, Save};
pub use block::{BLOCK_TOKENS, BlockId, blocks_for};
pub use error::KvError;
pub use pool::{Bounds, Pool, Released, Reservation};
pub use prefix::{BlockHash, PrefixHasher, Realm};
pub use table::BlockTable;
pub use tier::Place;

/// The same cases on every run, and no files written.
#[cfg(test)]
fn seeded() -> proptest::test_runner::Config {
    use proptest::test_runner::{Config, RngSeed};
    Config { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() }
}
