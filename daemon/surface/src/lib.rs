//! How do local apps reach us? OpenAI-compatible HTTP over a Unix socket, so far; D-Bus and MQTT come beside it.
//!
//! The only crate that knows wire formats. It translates: requests become [`sparsed_engine::api`] values, events become
//! bytes. It computes nothing; what takes long (templates, tokenizing) goes to tokio's blocking pool.
#![forbid(unsafe_code)]

mod bodies;
mod http;
mod refusal;
mod unix;

pub use unix::{ServeOptions, serve};
