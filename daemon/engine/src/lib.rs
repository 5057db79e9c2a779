//! Whose token is next?
//!
//! A request walks through it thus: a surface makes a prompt with [`ServedModel`] and hands a [`api::Generate`] to the
//! [`Service`]; the engine thread (`runner`) queues it as a sequence; `scheduler` fills a [`Batch`] from the sequences;
//! `step` has the [`DeviceModel`] compute it, samples, and delivers [`api::Event`]s to the request's sink.
//!
//! How much memory there is, and what is done about too little, is [`memory`]'s to say; [`telemetry`] is what status
//! pages show.
//!
//! When a device fails, `attempt` climbs the rungs of `ladder` that keep the device, `runner` the others; requests keep
//! their place and their tokens.
//!
//! Only `runner` knows a clock; threads are its own, the sessions' (`sessions`) and the slow tier's (`orders`).
//! The rest decides and is told the time.
#![forbid(unsafe_code)]

pub mod api;
pub mod eval;
pub mod memory;
pub mod telemetry;

mod attempt;
mod batch;
mod device;
mod durable;
mod executor;
mod grammar;
mod ladder;
mod lane;
mod likelihood;
mod lockstep;
mod orders;
mod params;
mod progress;
mod residence;
mod room;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod service;
mod sessions;
#[cfg(feature = "simulation")]
pub mod simulation;
mod step;
mod stream;
mod tenants;
#[cfg(test)]
mod testing;
mod warm;

pub use batch::{Batch, Rows};
pub use device::{DeviceSource, DeviceState, DeviceStatus};
pub use executor::{DeviceModel, ExecutorError, LoadOptions, Outputs, Queries};
pub use grammar::{Compiler as GrammarCompiler, Grammar, GrammarSpec};
pub use ladder::Recovery;
pub use lane::ModelOptions;
pub use lockstep::{CachedRows, Lockstep};
pub use params::{Sampling, checked_stops};
pub use residence::{KeepAlive, Left, ModelSource, Residence};
pub use room::SlowTier;
pub use runner::start;
pub use scheduler::{Limits, Load};
pub use service::{
    Arriving, DEFAULT_MODEL, Held, Keeping, Lease, ModelState, ModelStatus, ServedModel, Service, Stats,
};
pub use sessions::{
    Change, ContextFull, Durability, LateStore, SaidTurn, Session, SessionId, SessionState, SessionStore,
    SessionSummary, SessionUsage, Sessions, Settings, Standing, Trial, TurnEnd, Wishes,
};
pub use tenants::{Admission, Tenants};

pub use sparsed_model::{ChatMessage, ChatRequest, Role, ToolCall};

/// The same cases on every run, and no files written.
#[cfg(test)]
fn seeded() -> proptest::test_runner::Config {
    use proptest::test_runner::{Config, RngSeed};
    Config { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() }
}
