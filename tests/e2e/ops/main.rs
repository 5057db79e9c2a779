//! The real daemon as its operator has it: a new configuration while it runs, what it tells the service manager, what a
//! support bundle shows, what an author of plugins installs, and what it costs when nobody asks anything.
#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs, reason = "a test")]

mod bundle;
mod clock;
mod devel;
mod idle;
mod log;
mod purge;
mod readmes;
mod reload;
mod state;
mod throttled;
mod tutorials;
