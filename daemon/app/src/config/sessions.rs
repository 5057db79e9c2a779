//! `[sessions]`: what is kept of conversations, and how much of it?

use super::{BYTES_MAX, Bytes};
use serde::{Deserialize, Serialize};

/// The longest that a session which nobody uses is kept; who wants longer says 0.
const RETENTION_DAYS_MAX: u64 = 36_500;

/// `[sessions]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sessions {
    /// Whether there are any.
    pub enabled: bool,
    /// What a power cut may lose, where a session does not say.
    pub durability: Durability,
    /// What to do when the context is full, where a session does not say.
    pub context_full: ContextFull,
    /// Most sessions of a user.
    pub max_per_user: u32,
    /// Most sessions.
    pub max: u32,
    /// Most bytes on disk for what is said in a user's sessions; above it no turn begins.
    pub journals_per_user: Bytes,
    /// Most bytes on disk for what is said in all sessions.
    pub journals: Bytes,
    /// Most bytes on disk for KV rows of a user's sessions; the oldest go first.
    pub kv_per_user: Bytes,
    /// Most bytes on disk for KV rows of all sessions.
    pub kv: Bytes,
    /// Days after its last use that an unpinned session is deleted; 0: never.
    pub retention_days: u64,
    /// Answers in the background that the daemon's end has cut and that go on by themselves, so many at a time; 0: each
    /// when it is asked for.
    pub background: u32,
}

/// When is what was said on the disk for good?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Before a token is sent.
    Token,
    /// When a turn begins, and before its end is sent.
    #[default]
    Turn,
    /// When the system writes it.
    None,
}

/// What becomes of a session that fills its context?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContextFull {
    /// The request is refused.
    #[default]
    Error,
    /// The oldest turns are left out, the system prompt stays.
    TruncateOldest,
}

impl Default for Sessions {
    fn default() -> Self {
        let limits = sparsed_session::Limits::default();
        Self {
            enabled: true,
            durability: Durability::Turn,
            context_full: ContextFull::Error,
            max_per_user: limits.sessions_per_owner,
            max: limits.sessions,
            journals_per_user: Bytes(limits.journals_bytes_per_owner),
            journals: Bytes(limits.journals_bytes),
            kv_per_user: Bytes(limits.kv_bytes_per_owner),
            kv: Bytes(limits.kv_bytes),
            retention_days: 0,
            background: 4,
        }
    }
}

impl Sessions {
    /// The ranges of its numbers: key, value, least, greatest.
    pub(super) fn ranges(&self) -> Vec<(String, u64, u64, u64)> {
        [
            ("journals_per_user", self.journals_per_user.0, BYTES_MAX),
            ("journals", self.journals.0, BYTES_MAX),
            ("kv_per_user", self.kv_per_user.0, BYTES_MAX),
            ("kv", self.kv.0, BYTES_MAX),
            ("retention_days", self.retention_days, RETENTION_DAYS_MAX),
        ]
        .map(|(key, value, greatest)| (format!("sessions.{key}"), value, 0, greatest))
        .into()
    }
}
