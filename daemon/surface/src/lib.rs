//! How do local apps reach us? By OpenAI-compatible HTTP over a Unix socket and by D-Bus, so far; MQTT comes beside them.
//!
//! The only crate that knows wire formats. It translates: requests become [`sparsed_engine::api`] values, events become
//! bytes. It computes nothing; what takes long (templates, tokenizing) goes to tokio's blocking pool.
#![forbid(unsafe_code)]

mod bodies;
mod dbus;
mod http;
mod refusal;
mod unix;

pub use dbus::{Bus, DbusOptions, serve_dbus};
pub use unix::{ServeOptions, serve};
