//! What of requests and answers outlives the daemon? Records of both in one [`Journal`], inbox and outbox alike.
//!
//! A request is recorded before the broker is told that it came, its answer before it is sent. An answer stays for a
//! while after it was delivered, so that whoever asks again hears the same. What a request looks like in the end is the
//! last that its records say.

use super::journal::{Journal, Seal};
use super::message::{Key, Request};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::{Error, Result};
use std::path::Path;

/// A file that is smaller is not written anew.
const COMPACT_BYTES_MIN: u64 = 1 << 20;

/// A line of the ledger.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Record {
    /// A request came.
    Asked(Box<Request>),
    /// It has its answer.
    Answered {
        /// Of which request.
        key: Key,
        /// The payload.
        finale: String,
    },
    /// The broker has the answer.
    Delivered {
        /// Of which request.
        key: Key,
        /// When, in milliseconds since 1970.
        at_ms: u64,
    },
    /// Nothing is known of it any more.
    Forgotten(Key),
}

/// What the records say of a request.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    /// It.
    pub(super) request: Request,
    /// Its answer, if it has one.
    pub(super) finale: Option<String>,
    /// When that was delivered, if it was.
    pub(super) delivered_ms: Option<u64>,
}

impl Kept {
    /// Records that say this.
    pub(super) fn records(self) -> Vec<Record> {
        let key = self.request.key();
        let answered = self.finale.map(|finale| Record::Answered { key: key.clone(), finale });
        let delivered = self.delivered_ms.map(|at_ms| Record::Delivered { key, at_ms });
        [Some(Record::Asked(Box::new(self.request))), answered, delivered].into_iter().flatten().collect()
    }
}

/// The records on the disk.
#[derive(Debug)]
pub(super) struct Ledger {
    journal: Journal,
    /// Bytes of the file when it was written anew.
    base_bytes: u64,
}

impl Ledger {
    /// Opens it below `dir`; answers what it says, in the order of asking.
    ///
    /// # Errors
    /// The disk's, a file of another version or key, a record that means nothing.
    pub(super) fn open(dir: &Path, key: &[u8; 32]) -> Result<(Self, Vec<Kept>)> {
        let (journal, lines) = Journal::open(dir, Seal::new(key))?;
        let mut kept = HashMap::<Key, (usize, Kept)>::new();
        for (at, line) in lines.iter().enumerate() {
            match serde_json::from_slice(line).map_err(Error::other)? {
                Record::Asked(request) => {
                    let new = Kept { request: *request, finale: None, delivered_ms: None };
                    kept.insert(new.request.key(), (at, new));
                }
                Record::Answered { key, finale } => {
                    kept.entry(key).and_modify(|(_, kept)| kept.finale = Some(finale));
                }
                Record::Delivered { key, at_ms } => {
                    kept.entry(key).and_modify(|(_, kept)| kept.delivered_ms = Some(at_ms));
                }
                Record::Forgotten(key) => {
                    kept.remove(&key);
                }
            }
        }
        let mut kept: Vec<_> = kept.into_values().collect();
        kept.sort_by_key(|(at, _)| *at);
        let base_bytes = journal.length();
        Ok((Self { journal, base_bytes }, kept.into_iter().map(|(_, kept)| kept).collect()))
    }

    /// Writes `records`. All of them are on the disk then, or none after an error; `all` are those before and these.
    ///
    /// # Errors
    /// The disk's.
    pub(super) fn write(&mut self, records: &[Record], all: impl Fn() -> Vec<Record>) -> Result<()> {
        if self.journal.is_doubtful() {
            return self.rewrite(&all());
        }
        self.journal.append(&lines(records)?)?;
        if self.journal.length() > COMPACT_BYTES_MIN + 2 * self.base_bytes
            && let Err(error) = self.rewrite(&all())
        {
            // What was said is in the old file; tried again when that has grown as much.
            self.base_bytes = self.journal.length();
            log::warn!(reason:% = error; "the MQTT journal could not be written anew");
        }
        Ok(())
    }

    /// From now on nothing can be written.
    #[cfg(test)]
    pub(super) fn break_disk(&mut self) {
        self.journal.break_disk();
    }

    /// From now on it can be written again.
    #[cfg(test)]
    pub(super) fn mend_disk(&mut self) {
        self.journal.mend_disk();
    }

    fn rewrite(&mut self, all: &[Record]) -> Result<()> {
        self.journal.rewrite(lines(all)?)?;
        self.base_bytes = self.journal.length();
        Ok(())
    }
}

fn lines(records: &[Record]) -> Result<Vec<Vec<u8>>> {
    records.iter().map(|record| serde_json::to_vec(record).map_err(Error::other)).collect()
}
