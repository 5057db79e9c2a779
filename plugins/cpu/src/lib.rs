//! Who computes on the host's own cores? The CPU plugin, id `cpu`.
//!
//! One library for every x86-64: the instruction level (scalar, AVX2, AVX-512 with VNNI) is chosen once, when the
//! device opens, or forced by the setting `level`. Weights are read where the daemon has mapped them. A row's bits
//! depend on its own sequence only: every sum has one fixed order, whatever shares the batch, however many threads.
#![allow(unsafe_code, reason = "SIMD kernels, and tensors that several threads write at disjoint places")]

mod blocks;
mod device;
mod execute;
mod kernels;
mod keys;
mod level;
mod memory;
mod packing;
mod plan;
mod simd;
mod tensor;
mod threads;
mod turns;
mod validate;

sparsed_plugin_kit::export_plugin!(device::CpuPlugin);
