//! What of a conversation survives?
//!
//! A *session* is a folder with three files: `key` (the session's key, wrapped under the master key), `journal` (what
//! was said, record by record: the truth) and `kv` (images of KV blocks: a cache of the journal). [`Store`] holds all
//! of them. What it calls committed is there after a power cut; what is not committed is there up to some point.
//!
//! Knows no clock, no thread and no randomness: seconds, random bytes and the [`Disk`] are arguments, so that all of it
//! runs under a simulation (`tests/sim`). Knows no model either: requests, sampling and answers are bytes.
//!
//! Invariants: what is in memory is what a replay of the journal and the pending records gives; a record or block that
//! does not verify is never used; nobody sees another owner's session.
#![forbid(unsafe_code)]

mod cipher;
mod disk;
mod error;
mod history;
mod id;
mod image;
mod journal;
mod limits;
#[doc(hidden)]
pub mod probe;
mod record;
mod store;
mod suite;

pub use cipher::MasterKey;
pub use disk::{AnyDisk, Disk, DiskError, Entry, OsDisk, Place, ReadAt};
pub use error::{Result, StoreError};
pub use history::{ContextFull, Durability, History, Outcome, Settings, State, TurnHistory};
pub use id::{IdError, SessionId};
pub use image::{BLOCK_TOKENS, ImageShape, KvFault};
pub use limits::{DATE_MIN_S, Limits};
pub use store::{
    Finding, FindingKind, Flushed, FoundBlock, Loaded, NewSession, NewTurn, Random, Report, Store, Summary, Usage,
};
pub use suite::has_aes;
