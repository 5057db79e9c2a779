//! How does the CUDA driver look from Rust? Its functions, found at run time, and owners for what they hand out.

mod context;
mod error;
mod objects;
mod table;

pub(crate) use context::Context;
pub(crate) use error::describe;
pub(crate) use objects::{DeviceMemory, Event, Function, Launch, Module, PinnedMemory, Stream};
pub(crate) use table::{Address, Driver};
