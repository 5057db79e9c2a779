//! The CUDA plugin against its strict fake driver: operators, queues, faults. No GPU is needed, and none is used.
#![allow(unsafe_code, clippy::unwrap_used, missing_docs, unreachable_pub, reason = "a test of a C interface")]

mod driver;
mod faults;
mod isolated;
mod loading;
mod operators;
mod pools;
mod queues;
mod reference;
mod rig;
