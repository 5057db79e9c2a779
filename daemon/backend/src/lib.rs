//! Who computes it, and is it healthy?
//!
//! Finds plugins, refuses those that could be somebody else's code, loads them through the C ABI of `sparsed-abi`, and
//! turns raw handles into values whose drop order is right by construction: a plan keeps its weights and pools, those
//! keep the device, the device keeps the plugin. Nothing is ever unloaded.
//!
//! Knows no model, no session and no token. It is the only crate of the daemon with `unsafe`.
#![allow(unsafe_code, reason = "the daemon's side of the C ABI")]

mod arena;
mod call;
mod device;
mod discover;
mod elf;
mod error;
mod execute;
#[cfg(test)]
mod fixture;
mod folder;
mod host;
mod isa;
mod library;
mod limits;
mod load;
mod manifest;
mod memory;
mod proof;
mod quarantine;
mod remote;
mod slow;
mod taint;

pub use arena::Arena;
pub use device::{Backend, DeviceInfo, DeviceKind, MemoryInfo, OpenOptions};
pub use discover::{Found, Refusal, Scan, SearchPath};
pub use elf::ElfFacts;
pub use error::{BackendError, Fault};
pub use execute::{Plan, PlanInfo, Queue, compile_time};
pub use library::inspect_library;
pub use load::{Plugin, entry_point};
pub use manifest::{AbiSection, LibrarySection, Manifest};
pub use memory::{KvDesc, KvInfo, KvPool, Weight, WeightFile, WeightUpload};
pub use quarantine::{Left, Outcome, Quarantine, QuarantinePolicy, QuarantineStore, Quarantined, STRIKES_MAX};
pub use remote::{HostOptions, confine, kill_plugin_hosts, run_plugin_host};
pub use slow::SlowArea;
pub use sparsed_abi::{ABI_MAJOR, ABI_MINOR};
pub use sparsed_plugin_kit::slow::rowcache::Cipher;
pub use taint::third_party;
