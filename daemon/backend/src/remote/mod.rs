//! How does a plugin compute in a process of its own? The host process is one more plugin behind the same table.
//!
//! In the daemon, [`client`] implements the traits of the plugin kit by asking a child process, and the kit makes the
//! C table of it: everything above the table cannot tell it from a loaded library. In the child, [`server`] loads the
//! library and drives it as the daemon would. Between them are a socket for control calls ([`wire`]) and, for each
//! queue that is in use, a lane: a piece of shared memory ([`arena`]) with a doorbell each way ([`bell`]).

mod arena;
mod bell;
mod client;
mod server;
mod wire;

pub use client::kill_plugin_hosts;
pub(crate) use server::matching_devices;
pub use server::{confine, run_plugin_host};

use std::path::PathBuf;
use std::time::Duration;

/// How a plugin host is started and watched.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The executable that answers to `plugin-host`.
    pub program: PathBuf,
    /// For starting, loading the library and creating its instance, and for opening a device.
    pub start_timeout: Duration,
    /// For any other control call: an upload, a compilation.
    pub call_timeout: Duration,
    /// For a step or a list of KV operations; then it is cancelled.
    pub step_timeout: Duration,
    /// For a cancelled step to end, and for the process when it is not needed any more; then it is killed.
    pub grace: Duration,
    /// Most bytes of shared memory of one lane: a step with its input and output.
    pub arena_bytes_max: u64,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            program: PathBuf::from("/proc/self/exe"),
            start_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(300),
            step_timeout: Duration::from_secs(60),
            grace: Duration::from_secs(1),
            arena_bytes_max: 8 << 30,
        }
    }
}

/// A time as poll(2) takes it.
fn timespec(time: Duration) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}
