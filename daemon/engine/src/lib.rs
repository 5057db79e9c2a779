//! Whose token is next?
//!
//! So far this crate holds the executor: a model on a device, and one sequence that runs through it in chunks. The
//! scheduler, sampler and engine thread are not there yet; nothing here pretends to be them.
#![forbid(unsafe_code)]

mod executor;

pub use executor::{DeviceModel, ExecutorError, LoadOptions, Outputs, Sequence};
