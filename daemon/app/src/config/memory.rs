//! `[memory]`: how much is there for KV caches, and what becomes of the rest?

use super::Bytes;
use serde::{Deserialize, Serialize};

/// `[memory]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// Bytes for weights, workspace and KV caches of all models together; `None`: what control group and machine have.
    pub total: Option<Bytes>,
    /// Of them, bytes for the KV caches; `None`: all that is left of `total`, or half of what is left of the rest.
    pub budget: Option<Bytes>,
    /// Whose latent rows may lie in a file below `state_dir` where the budget does not hold them.
    pub slow_tier: SlowTierFor,
    /// The share of them that stays in memory then, 0 to 1.
    pub hot_share: f64,
}

/// Who may use the slow tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SlowTierFor {
    /// Nobody.
    Off,
    /// Turns of sessions, whose owners have asked for something to be kept.
    #[default]
    Sessions,
    /// Requests without a session too: what they say then reaches the disk, though no file of it stays.
    All,
}

impl Default for Memory {
    fn default() -> Self {
        Self { total: None, budget: None, slow_tier: SlowTierFor::default(), hot_share: 0.2 }
    }
}
