//! What is left when the power goes, or the disk fails, at the worst moment?
//!
//! [`FakeDisk`] keeps what was synced apart from what was not. [`run()`] makes random verbs of a session store on it
//! and of a naive model, cuts the power, kills the store, fails calls, and compares. [`run_daemon`] does so with a
//! whole daemon: engine, KV pool, row cache, slow tier and sessions. A seed is a run, to the byte.
#![forbid(unsafe_code)]

mod age;
mod area;
mod check;
mod client;
mod content;
mod daemon;
mod device;
mod disk;
mod fate;
mod machine;
mod model;
mod names;
mod outline;
mod run;
mod short;
mod speak;
mod start;
mod talk;

pub use daemon::run_daemon;
pub use disk::{FakeDisk, Faults, Plant};
pub use model::{Chat, Said, image};
pub use outline::{DaemonOutline, Mistake};
pub use run::{Outline, Violation, run};

/// The seeds of a test: `n` from 0 on, 200 times as many with `LONG=1` (400 with 2), or the one in `SEED`.
pub fn seeds(n: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..n * number("LONG").map_or(1, |times| 200 * times.clamp(1, 1000)),
    }
}
