//! What does a store say about itself?

use crate::history::State;
use crate::id::SessionId;
use std::io::ErrorKind;

/// What a list of sessions shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its name.
    pub id: SessionId,
    /// What it is about.
    pub title: String,
    /// The model's name.
    pub model: String,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When a turn last began or ended, seconds since 1970.
    pub used: u64,
    /// Tokens.
    pub n_tokens: u32,
    /// Turns.
    pub n_turns: u32,
    /// What may be done with it.
    pub state: State,
    /// Whether its files are the last to go.
    pub pinned: bool,
    /// Bytes of its files.
    pub disk_bytes: u64,
    /// Whether something of its journal was lost to damage; what was cut lies in the files `journal.cut*`, as far as
    /// their limits go.
    pub damaged: bool,
}

/// What opening a store has found besides sound sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sessions there are.
    pub sessions: u32,
    /// Of them, those whose last turn was cut.
    pub interrupted: u32,
    /// What was odd, by owner and session.
    pub findings: Vec<Finding>,
}

/// Something odd in the store's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whose it is; `None` for what lies in nobody's folder.
    pub owner: Option<u64>,
    /// Which session, or what lies there instead.
    pub name: String,
    /// What is odd.
    pub kind: FindingKind,
}

/// What is odd, and what was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// The journal ends within a record: what a death or a power cut leaves of a write, or damage that looks like it.
    Torn {
        /// Bytes that were cut.
        n_bytes: u64,
        /// Of them, those that are kept in `journal.torn`.
        n_kept: u64,
    },
    /// The journal makes no sense from some record on.
    Cut {
        /// Bytes that were cut.
        n_bytes: u64,
        /// Of them, those that are kept in a file `journal.cut*`: all until its limits are reached.
        n_kept: u64,
    },
    /// A file has another version; the session was left alone and cannot be used.
    UnknownVersion {
        /// As written.
        version: u32,
    },
    /// The journal has a record that is as it was written and that is not known, a newer version's; the session was
    /// left alone and cannot be used.
    UnknownRecord,
    /// The key is wrapped under another master key; the session was left alone and cannot be used.
    ForeignKey,
    /// Key or journal are missing, or make no sense from the start; the session was left alone and cannot be used.
    Unreadable,
    /// The journal is longer than the limit; the session was left alone and cannot be used.
    TooLarge,
    /// The disk failed; the session was left alone and cannot be used until the store is opened again.
    Io(ErrorKind),
    /// What a deletion or a creation left behind; it was removed.
    Swept,
    /// Nothing of the store's; it was left alone.
    Strange,
}

impl Report {
    /// How many findings are of a kind.
    pub fn count(&self, is_kind: impl Fn(FindingKind) -> bool) -> usize {
        self.findings.iter().filter(|finding| is_kind(finding.kind)).count()
    }
}

/// What all sessions take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Sessions.
    pub sessions: u64,
    /// Sessions beside these whose keys are wrapped under another master key: nobody sees them.
    pub of_other_key: u64,
    /// Of the sessions, those whose history is in memory.
    pub loaded: u64,
    /// Bytes of journals.
    pub journal_bytes: u64,
    /// Bytes of KV files.
    pub kv_bytes: u64,
    /// Bytes written to journals and keys since the store was opened.
    pub journal_bytes_written: u64,
    /// Bytes written to KV files since the store was opened.
    pub kv_bytes_written: u64,
}
