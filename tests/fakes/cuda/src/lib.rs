//! What would a strict CUDA driver have said? A `libcuda.so.1` without a GPU, for tests of the plugin `cuda`.
//!
//! It exports the functions that the plugin uses, with the numbers of NVIDIA's Driver API reference, and is stricter
//! than a driver: handles are never reused, so a freed one is always found out; async copies want pinned memory; device
//! addresses lie in a reservation that the host cannot touch.
//!
//! Nothing runs when it is enqueued. Work waits in its stream and is done, a few operations at a time and from streams
//! chosen by a seeded generator, whenever the program asks whether something is over. There is no thread, so a seed is
//! an interleaving, and a failure can be repeated.
//!
//! Kernels are host functions by name; the image that is loaded says which parameters a name has.
//!
//! `SPARSED_FAKE_CUDA="seed=1,oom_at=3"` or the exported `fake_cuda_set` set faults (see [`faults`]); `fake_cuda_get`
//! answers counters. Each copy of the file is a driver of its own.
#![allow(unsafe_code, clippy::missing_safety_doc, reason = "a C interface; its contract is the driver's")]

mod device_memory;
mod exports;
mod faults;
mod kernels;
mod launches;
mod machine;
mod streams;
