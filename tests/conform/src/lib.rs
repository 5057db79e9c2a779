//! Does a plugin keep the contract of `plugin.h` and `OPS.md`?
//!
//! [`run`] tries every rule of [`RULES`] on one plugin folder and answers a [`Report`]. Rules that run code of the
//! plugin each run in a child process with a deadline, so that a crash or a hang is one failed rule. What the operators
//! should compute is said by `oracle`, an evaluation of `OPS.md` in f64 that shares only the decoders of `quant` with
//! any plugin.
//!
//! Knows no model and no plugin by name.
#![allow(unsafe_code, reason = "speaks the raw ABI, and breaks its rules on purpose")]

mod cache;
mod case;
mod checks;
mod child;
mod kit;
mod oracle;
mod report;
mod rig;
mod rule;
mod step;
mod verdict;

pub use child::{Subject, child};
pub use kit::{Options, run};
pub use report::{Device, Line, Report};
pub use rule::{Level, RULES, Rule};
pub use verdict::Verdict;
