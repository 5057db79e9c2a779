//! How do apps and devices reach us? OpenAI-compatible HTTP over a Unix socket, and MQTT; D-Bus comes beside them.
//!
//! The only crate that knows wire formats. It translates: requests become [`sparsed_engine::api`] values, events become
//! bytes. It computes nothing; what takes long (templates, tokenizing) goes to tokio's blocking pool.
#![forbid(unsafe_code)]

mod bodies;
mod http;
mod mqtt;
mod refusal;
mod unix;

pub use mqtt::{MqttDoor, MqttOptions, MqttProbe, MqttProbeError, TlsError, mqtt_probe, tls_config};
pub use unix::{ServeOptions, serve};
