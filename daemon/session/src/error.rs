//! What can a caller do about a verb that failed?

use crate::disk::DiskError;
use std::io::ErrorKind;

/// Why a verb failed; nothing of it was done then, in memory or on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The caller has no such session.
    #[error("there is no such session")]
    NotFound,
    /// The session is being answered, or is not where the verb needs it to be: wait, or end the turn first.
    #[error("the session is {0}")]
    Busy(&'static str),
    /// A limit: make it larger, ask for less, or delete something.
    #[error("{what}: the limit is {limit}")]
    LimitReached {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// What was asked makes no sense for this session.
    #[error("{what}")]
    Invalid {
        /// What is wrong.
        what: &'static str,
    },
    /// What was read is not what was written: the file must be replaced or given up.
    #[error("{what} is damaged")]
    Damaged {
        /// What.
        what: &'static str,
    },
    /// A file of another version of this program.
    #[error("{what} has version {version}, which is not known")]
    UnknownVersion {
        /// What.
        what: &'static str,
        /// As written.
        version: u32,
    },
    /// A record that is as it was written, and that this version of this program does not know.
    #[error("{what} has a record of a newer version, which is not known")]
    UnknownRecord {
        /// What.
        what: &'static str,
    },
    /// No space: free some.
    #[error("the disk is full")]
    DiskFull,
    /// Another process has this folder.
    #[error("another process uses this folder")]
    Locked,
    /// The disk fails in another way.
    #[error("the disk fails: {0}")]
    Io(ErrorKind),
}

/// What a verb answers.
pub type Result<T> = std::result::Result<T, StoreError>;

impl From<DiskError> for StoreError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Full => Self::DiskFull,
            DiskError::Locked => Self::Locked,
            DiskError::Io(kind) => Self::Io(kind),
            // The store made every name itself: whoever took a file away or put one there was not the caller.
            DiskError::NotFound => Self::Io(ErrorKind::NotFound),
            DiskError::Exists => Self::Io(ErrorKind::AlreadyExists),
        }
    }
}
