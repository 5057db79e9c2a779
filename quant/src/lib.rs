//! How is a number stored?
//!
//! Block formats with ggml's layout ([`Format`], [`decode`], [`encode`]), FP8 matrices as DeepSeek ships them
//! ([`ScaledF8`]) and the GGUF container ([`gguf`]). Scalar and
//! readable: this is the definition that kernels are tested against. Pure: no files, no clock, no threads.
#![forbid(unsafe_code)]

mod affine;
mod block;
mod f8_128;
mod f8_e4m3;
mod float;
mod format;
pub mod gguf;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_0;
mod q6_k;
mod q8_0;
mod round;
mod symmetric;
mod w16;

pub use f8_e4m3::ScaledF8;
pub use format::{Format, QuantError, decode, decode_part, encode, encode_row};
