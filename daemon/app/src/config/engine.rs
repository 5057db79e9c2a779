//! Which device computes, and what becomes of one that is lost?

use super::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What `engine.plugin` says to leave open which one computes.
pub const AUTO: &str = "auto";

/// `[engine]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Engine {
    /// The plugin's id, or [`AUTO`].
    pub plugin: String,
    /// Device of the plugin, from 0.
    pub device: u32,
    /// Devices of the plugin that take over when that one is lost for good, in this order.
    pub spare_devices: Vec<u32>,
    /// Most of the device's memory that its plugin may hold, for weights, pools and workspaces; `None`: all of it.
    pub device_memory: Option<Bytes>,
    /// Compute threads; 0: the plugin's choice.
    pub threads: u32,
    /// Whether the CPU plugin takes over when another one's device is lost for good.
    pub failover: bool,
    /// Milliseconds without progress after which the service manager is not told any more that all is well.
    pub watchdog_ms: u64,
    /// How a lost device is treated.
    pub retry: Retry,
    /// Settings for the plugin.
    pub set: BTreeMap<String, String>,
    /// Where the plugin's code runs.
    pub isolation: Isolation,
    /// Milliseconds that a step may take in a process of the plugin's own before it is cancelled.
    pub step_timeout_ms: u64,
}

/// Where a plugin's code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// The CPU plugin in the daemon, every other one in a process of its own.
    #[default]
    Auto,
    /// In a process of its own.
    Process,
    /// In the daemon; what the plugin breaks is then broken for everybody.
    None,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            plugin: AUTO.to_owned(),
            device: 0,
            spare_devices: Vec::new(),
            device_memory: None,
            threads: 0,
            failover: true,
            watchdog_ms: 60_000,
            retry: Retry::default(),
            set: BTreeMap::new(),
            isolation: Isolation::Auto,
            step_timeout_ms: 20_000,
        }
    }
}

/// `[engine.retry]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// Pauses in milliseconds before a lost device is opened again.
    pub backoff_ms: Vec<u64>,
    /// A device that was up for so many milliseconds begins with the first pause again.
    pub forget_ms: u64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { backoff_ms: vec![1000, 5000, 30_000], forget_ms: 600_000 }
    }
}
