//! How much may sessions take?

use crate::history::Settings;

/// A date before this, in seconds since 1970, is of a clock that was not set: the beginning of 2025.
pub const DATE_MIN_S: u64 = 1_735_689_600;

/// Most bytes of a title.
pub(crate) const TITLE_BYTES_MAX: usize = 1 << 10;
/// Most bytes of a model's name.
pub(crate) const MODEL_BYTES_MAX: usize = 1 << 10;
/// Most bytes of one turn's request, and of its answer.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Most bytes of one turn's sampling parameters.
pub(crate) const SAMPLING_BYTES_MAX: usize = 1 << 20;
/// Most tokens in one record.
pub(crate) const RECORD_TOKENS_MAX: usize = 1 << 20;
/// Most tokens of a session.
pub(crate) const SESSION_TOKENS_MAX: usize = 1 << 24;
/// Most turns of a session.
pub(crate) const SESSION_TURNS_MAX: usize = 1 << 20;
/// Most bytes of one record's ciphertext: a turn with the largest request, sampling, answer and tokens fits.
pub(crate) const RECORD_BYTES_MAX: usize = 48 << 20;
/// Most bytes of one block's image.
pub(crate) const IMAGE_BYTES_MAX: u32 = 1 << 30;

/// Quotas and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions of one owner.
    pub sessions_per_owner: u32,
    /// Sessions of all owners.
    pub sessions: u32,
    /// Bytes of one session's journal.
    pub journal_bytes: u64,
    /// Bytes of one owner's journals, above which no turn begins; the answers that are under way come to their ends.
    pub journals_bytes_per_owner: u64,
    /// The same of all journals.
    pub journals_bytes: u64,
    /// Bytes of a journal that is worth compacting once less than half of it is of use.
    pub compact_bytes: u64,
    /// Bytes of records that wait for a flush, in one session.
    pub pending_bytes: u64,
    /// Bytes of one owner's KV files.
    pub kv_bytes_per_owner: u64,
    /// Bytes of all KV files.
    pub kv_bytes: u64,
    /// Seconds since its last use after which an unpinned session is one of [`crate::Store::expired`]; 0 is never.
    pub retention_seconds: u64,
    /// What a session has that says nothing else.
    pub settings: Settings,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions_per_owner: 1000,
            sessions: 4000,
            journal_bytes: 256 << 20,
            journals_bytes_per_owner: 2 << 30,
            journals_bytes: 8 << 30,
            compact_bytes: 64 << 10,
            pending_bytes: 64 << 20,
            kv_bytes_per_owner: 16 << 30,
            kv_bytes: 32 << 30,
            retention_seconds: 0,
            settings: Settings::default(),
        }
    }
}

impl Limits {
    /// Bytes of a journal's file that is still read: records that end a turn or make room are written over the limit.
    pub(crate) fn journal_file_bytes(&self) -> u64 {
        self.journal_bytes.saturating_add(4 * RECORD_BYTES_MAX as u64)
    }
}
