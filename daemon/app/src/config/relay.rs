//! `[model.<name>.relay]`: how is a model asked for that an engine elsewhere computes (`upstream`)?

use super::dotted;
use serde::{Deserialize, Serialize};
use sparsed_upstream::Address;
use std::path::PathBuf;

/// `[model.<name>.relay]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relay {
    /// The model's name there; `None`: the first that the engine lists.
    pub model: Option<String>,
    /// The file with the key that the engine wants; `None`: the credential `sparsed.upstream-NAME-key`, if there is
    /// one.
    pub key_file: Option<PathBuf>,
    /// Certificates of authorities; `None`: the credential `sparsed.upstream-NAME-ca`, or else the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether an engine on another machine may be spoken to without TLS.
    pub allow_insecure: bool,
    /// Milliseconds that a connection may take.
    pub connect_ms: u64,
    /// Seconds that the first token may take.
    pub first_token_s: u64,
    /// Seconds that each further token may take.
    pub idle_s: u64,
    /// Further attempts before the first token.
    pub retries: u32,
    /// Whether `priority` is passed on. The engine must have been started for it: others may refuse the request.
    pub priority: bool,
    /// Requests that are under way there at a time.
    pub running: u32,
    /// Further requests, which wait here.
    pub waiting: u32,
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            model: None,
            key_file: None,
            ca_file: None,
            allow_insecure: false,
            connect_ms: 5000,
            first_token_s: 300,
            idle_s: 60,
            retries: 2,
            priority: false,
            running: 64,
            waiting: 256,
        }
    }
}

impl Relay {
    /// The ranges of its numbers: key, value, least, greatest.
    pub(super) fn ranges(&self, model: &str) -> Vec<(String, u64, u64, u64)> {
        [
            ("connect_ms", self.connect_ms, 1, 600_000),
            ("first_token_s", self.first_token_s, 1, 86_400),
            ("idle_s", self.idle_s, 1, 86_400),
            ("retries", self.retries.into(), 0, 16),
            ("running", self.running.into(), 1, 65536),
            ("waiting", self.waiting.into(), 0, 65536),
        ]
        .map(|(key, value, least, greatest)| (dotted(&["model", model, "relay", key]), value, least, greatest))
        .into()
    }

    /// What is wrong with a model at the address `upstream`.
    pub(super) fn wrong_value(&self, model: &str, upstream: &str) -> Option<(String, String)> {
        let key = dotted(&["model", model, "upstream"]);
        let address: Address = match upstream.parse() {
            Ok(address) => address,
            // The address itself is not repeated: it may hold a password.
            Err(reason) => return Some((key, reason.to_owned())),
        };
        if address.is_tls() || address.is_here() || self.allow_insecure {
            return None;
        }
        let insists = dotted(&["model", model, "relay", "allow_insecure"]);
        Some((key, format!("is elsewhere and without TLS; use https://, or set {insists}")))
    }
}
