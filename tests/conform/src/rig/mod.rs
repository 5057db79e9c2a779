//! How does a check call a plugin? Handles of the raw ABI that are given back in the right order.
//!
//! Unlike the daemon's `backend`, everything here can be made wrong on purpose: structs are plain, and a failure is a
//! [`Fault`] with the plugin's own words.

mod call;
mod host;
mod objects;
mod queue;
mod session;

pub(crate) use call::{Fault, call, entry, fresh_error, struct_size, text};
pub(crate) use host::{host, set};
pub(crate) use objects::{Plan, Pool, Weight, weight_desc};
pub(crate) use queue::{Arena, KvList, Queue, RunParts};
pub(crate) use session::{Instance, OpenOptions, Session, hole, readable_table, table};
