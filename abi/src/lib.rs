//! What may a plugin and the daemon say to each other?
//!
//! The Rust mirror of `include/sparsed/plugin.h`, which is the contract, and the two ends of the program blob: the
//! daemon's model builder writes it with [`ProgramBuilder`], a plugin reads it with [`Program::parse`]. What the
//! operators compute is in `OPS.md`.
//!
//! Knows nothing of dlopen, processes, models or hardware. Depends on nothing.
//!
//! Struct docs are kept in the header; here a field carries a doc only where Rust needs to say more.
#![no_std]
#![allow(unsafe_code, missing_docs, reason = "the border itself: raw memory is read here; the header documents fields")]

extern crate alloc;

mod api;
mod builder;
mod device;
mod dtype;
mod host;
mod layout;
mod memory;
mod pod;
mod program;
mod status;
mod step;
mod view;

pub use api::*;
pub use builder::{Blob, OpSpec, ProgramBuilder, TensorId};
pub use device::*;
pub use dtype::*;
pub use host::*;
pub use layout::{FieldLayout, LAYOUT_DIGEST, Layout, StructLayout, layouts};
pub use memory::*;
pub use pod::{Pod, bytes_of, read_exact};
pub use program::*;
pub use status::*;
pub use step::*;
pub use view::{BlobError, Program, StepArrays};

/// The major this crate mirrors: the argument of `spd_get_api`.
pub const ABI_MAJOR: u32 = 0;
/// The minor this crate mirrors.
pub const ABI_MINOR: u32 = 6;
/// The first minor whose layout every later one keeps: plugins from here on are taken.
pub const ABI_MINOR_FIRST: u32 = 2;
/// The name of the one exported symbol.
pub const ENTRY_SYMBOL: &core::ffi::CStr = c"spd_get_api";
/// Arenas begin every INPUT and OUTPUT tensor at a multiple of this.
pub const ARENA_ALIGN: usize = 64;
