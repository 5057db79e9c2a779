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

use crate::execute::compile_time;
use std::path::PathBuf;
use std::time::Duration;

/// How a plugin host is started and watched.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// The executable that answers to `plugin-host`.
    pub program: PathBuf,
    /// For starting, loading the library and creating its instance, and for opening a device.
    pub start_timeout: Duration,
    /// For any other control call, as an upload. A compilation may take longer: [`Self::compile_timeout`].
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

impl HostOptions {
    /// For a compilation of weights of so many bytes, beside steps of others.
    pub(crate) fn compile_timeout(&self, weights_bytes: u64) -> Duration {
        self.call_timeout.max(2 * compile_time(weights_bytes) + self.step_timeout)
    }
}

/// A time as poll(2) takes it.
fn timespec(time: Duration) -> rustix::time::Timespec {
    rustix::time::Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compilation_may_take_as_long_as_its_weights_need_beside_steps_and_never_less_than_another_call() {
        let options = HostOptions::default();
        assert_eq!(options.compile_timeout(100 << 20), options.call_timeout);
        assert_eq!(options.compile_timeout(8 << 30), Duration::from_secs(2 * 2048 + 60));
    }
}
