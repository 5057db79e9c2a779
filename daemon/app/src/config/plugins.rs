//! Which plugins may be used, and how much time do they have?

use super::{DAY_MS, HOUR_MS};
use serde::{Deserialize, Serialize};
use sparsed_backend::{HostOptions, QuarantinePolicy, STRIKES_MAX};
use std::path::PathBuf;
use std::time::Duration;

/// The longest time that can be configured.
const YEAR_MS: u64 = 365 * 86_400_000;
/// The longest time that a hung call may hold its end up.
const GRACE_MS_MAX: u64 = 60_000;

/// `[plugins]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plugins {
    /// A folder that is searched before `plugins/` beside the executable and `/usr/lib/sparsed/plugins`.
    pub dir: Option<PathBuf>,
    /// Failures of a library that quarantine it.
    pub strikes: u32,
    /// How long a failure counts, in milliseconds.
    pub strike_window_ms: u64,
    /// The first quarantine in milliseconds; each further one is twice as long.
    pub quarantine_ms: u64,
    /// The longest quarantine in milliseconds.
    pub quarantine_max_ms: u64,
    /// Steps that fail for all their sequences within `step_window_ms` that are a fault of the device, and a strike.
    pub step_failures: u32,
    /// How long such a step counts, in milliseconds.
    pub step_window_ms: u64,
    /// Milliseconds that a plugin's process may take to start, to load the library, and to open a device.
    pub start_timeout_ms: u64,
    /// Milliseconds that any other call may take that is no step: an upload, a compilation.
    pub call_timeout_ms: u64,
    /// Milliseconds that a cancelled step, or a process that is to end, may take before it is killed.
    pub grace_ms: u64,
}

impl Default for Plugins {
    fn default() -> Self {
        let (policy, host) = (QuarantinePolicy::default(), HostOptions::default());
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            dir: None,
            strikes: policy.strikes,
            strike_window_ms: policy.window_ms,
            quarantine_ms: policy.first_ms,
            quarantine_max_ms: policy.max_ms,
            step_failures: 3,
            step_window_ms: 60_000,
            start_timeout_ms: ms(host.start_timeout),
            call_timeout_ms: ms(host.call_timeout),
            grace_ms: ms(host.grace),
        }
    }
}

impl Plugins {
    /// What each number must be.
    pub(super) fn ranges(&self) -> [(String, u64, u64, u64); 9] {
        [
            ("plugins.strikes".to_owned(), self.strikes.into(), 1, STRIKES_MAX.into()),
            ("plugins.strike_window_ms".to_owned(), self.strike_window_ms, 1, YEAR_MS),
            ("plugins.quarantine_ms".to_owned(), self.quarantine_ms, 1, self.quarantine_max_ms),
            ("plugins.quarantine_max_ms".to_owned(), self.quarantine_max_ms, 1, YEAR_MS),
            ("plugins.step_failures".to_owned(), self.step_failures.into(), 2, 1024),
            ("plugins.step_window_ms".to_owned(), self.step_window_ms, 1, DAY_MS),
            ("plugins.start_timeout_ms".to_owned(), self.start_timeout_ms, 1, HOUR_MS),
            ("plugins.call_timeout_ms".to_owned(), self.call_timeout_ms, 1, HOUR_MS),
            ("plugins.grace_ms".to_owned(), self.grace_ms, 1, GRACE_MS_MAX),
        ]
    }

    /// When a library is quarantined, and for how long.
    pub fn quarantine_policy(&self) -> QuarantinePolicy {
        QuarantinePolicy {
            strikes: self.strikes,
            window_ms: self.strike_window_ms,
            first_ms: self.quarantine_ms,
            max_ms: self.quarantine_max_ms,
        }
    }
}
