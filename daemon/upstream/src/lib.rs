//! How does a model answer that does not fit this box? Through an engine elsewhere that speaks OpenAI's HTTP: vLLM,
//! SGLang, vllm-ascend, llama-server, or another sparsed.
//!
//! A client and a mapping, no balancer: one address, one model. A [`Relay`](sparsed_engine::api::Relay) becomes a body
//! (`request`), a connection of its own carries it (`connection`), the stream that comes back is read event by event
//! (`events`, `answer`) into what every request hears, and what goes wrong becomes one of the engine's failures
//! (`trouble`). A connection ends with its request, so that a client that goes away ends the computing elsewhere too.
//!
//! Nothing that comes from the network is trusted: every length has a limit with a name.
#![forbid(unsafe_code)]

mod address;
mod answer;
mod client;
mod connection;
mod described;
mod dialect;
mod ear;
mod events;
mod line;
mod logprobs;
mod options;
pub mod probe;
mod request;
mod run;
mod trouble;

pub use address::Address;
pub use client::Client;
pub use described::Described;
pub use options::{Limits, Options};
