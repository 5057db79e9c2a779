//! `[limits]`: how much may requests ask for, and how is the device divided among them?

use super::{BYTES_MAX, Bytes};
use serde::{Deserialize, Serialize};

/// `[limits]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most answers that run at a time, per model.
    pub max_running: u32,
    /// Most requests that wait, per model.
    pub max_waiting: u32,
    /// Of them, most of one user that run; 0: all but one in eight, see [`Limits::running_of_one`].
    pub per_user_running: u32,
    /// Of them, most of one user that wait; 0: as many as there are.
    pub per_user_waiting: u32,
    /// Most requests of one user that are under way, by all doors.
    pub per_user_requests: u32,
    /// Most tokens of one user's prompts that wait; 0: as many as there are.
    pub per_user_queued_tokens: u64,
    /// Most bytes of KV rows of one user's running answers; 0: all.
    pub per_user_kv: Bytes,
    /// Most tokens of a step.
    pub max_batched_tokens: u32,
    /// Milliseconds per token that running answers are to keep while prompts are read beside them; 0: no target.
    pub tpot_target_ms: u64,
    /// Most open connections.
    pub connections: u32,
    /// Of them, most of one user on the Unix socket; 0: as many as there are.
    pub per_user_connections: u32,
    /// Most bytes of a request's body.
    pub body: Bytes,
    /// Seconds that a request waits for its model to be loaded.
    pub load_wait_s: u64,
    /// Seconds that a client may not read before its answer is given up.
    pub slow_consumer_s: u64,
    /// Seconds that running answers may go on when the daemon is told to stop.
    pub stop_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_running: 16,
            max_waiting: 256,
            per_user_running: 0,
            per_user_waiting: 0,
            per_user_requests: 320,
            per_user_queued_tokens: 1 << 20,
            per_user_kv: Bytes(0),
            max_batched_tokens: 256,
            tpot_target_ms: 250,
            connections: 512,
            per_user_connections: 448,
            body: Bytes(8 << 20),
            load_wait_s: 300,
            slow_consumer_s: 30,
            stop_s: 20,
        }
    }
}

impl Limits {
    /// Most answers of one user that run. Unless it is said, one place in eight stays free: an owner that floods the
    /// daemon leaves others a place where their first request begins at once.
    pub fn running_of_one(&self) -> u32 {
        match self.per_user_running {
            0 => self.max_running - self.max_running / 8,
            said => said,
        }
    }

    /// Each number with its key and range.
    pub(super) fn ranges(&self) -> Vec<(String, u64, u64, u64)> {
        let ranges = [
            ("max_running", self.max_running.into(), 1, 1024),
            ("max_waiting", self.max_waiting.into(), 1, 65536),
            ("per_user_running", self.per_user_running.into(), 0, 1024),
            ("per_user_waiting", self.per_user_waiting.into(), 0, 65536),
            ("per_user_requests", self.per_user_requests.into(), 1, 65536),
            ("per_user_queued_tokens", self.per_user_queued_tokens, 0, 1 << 40),
            ("per_user_kv", self.per_user_kv.0, 0, BYTES_MAX),
            ("max_batched_tokens", self.max_batched_tokens.into(), self.max_running.into(), 65536),
            ("tpot_target_ms", self.tpot_target_ms, 0, 60_000),
            ("connections", self.connections.into(), 1, 65536),
            ("per_user_connections", self.per_user_connections.into(), 0, 65536),
            ("body", self.body.0, 1024, 1 << 30),
            ("load_wait_s", self.load_wait_s, 1, 86_400),
            ("slow_consumer_s", self.slow_consumer_s, 1, 3600),
            ("stop_s", self.stop_s, 0, 3600),
        ];
        ranges.into_iter().map(|(key, value, low, high)| (format!("limits.{key}"), value, low, high)).collect()
    }
}
