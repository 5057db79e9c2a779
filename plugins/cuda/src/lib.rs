//! Who computes on an NVIDIA GPU? The CUDA plugin, id `cuda`: a bring-up slice that has never run on one.
//!
//! It needs `libcuda.so.1` only, found at run time. Work is asynchronous: a step is staged in pinned memory and put on
//! a stream; an event says when it is over. Device memory is taken by weights, pools and plans, never in a step.
#![allow(unsafe_code, reason = "calls of the CUDA driver, and memory that it reads and writes")]

mod check;
mod device;
mod driver;
mod frame;
mod ledger;
mod lower;
mod memory;
mod place;
mod plan;
mod pool;
mod queue;

sparsed_plugin_kit::export_plugin!(device::CudaPlugin);
