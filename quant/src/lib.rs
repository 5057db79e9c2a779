//! How is a number stored?
//!
//! Block formats with ggml's layout ([`Format`], [`decode`], [`encode`]) and the GGUF container ([`gguf`]). Scalar and
//! readable: this is the definition that kernels are tested against. Pure: no files, no clock, no threads.
#![forbid(unsafe_code)]

mod float;
mod format;
pub mod gguf;
mod q4_0;
mod q4_1;
mod q8_0;

pub use format::{Format, QuantError, decode, encode};
