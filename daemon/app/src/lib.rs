//! Who starts what, and when does it stop?
//!
//! So far the tool `sparsectl` with the commands that need no daemon. The daemon itself is not there yet.
#![forbid(unsafe_code)]

pub mod ctl;
