//! Which sessions are there, and what may be done with them?
//!
//! Verbs change memory and queue records; [`Store::flush`] writes all queues and says what is committed. Making,
//! forking, importing and deleting a session is on the disk when the verb returns. Of a session that is in use the
//! whole history is in memory, of the others a summary.

mod blocks;
mod flush;
mod folder;
mod report;
mod scan;
mod session;
mod space;
#[cfg(test)]
mod tests;
mod transfer;
mod turns;

pub use blocks::{FoundBlock, Loaded};
pub use flush::Flushed;
pub use report::{Finding, FindingKind, Report, Summary, Usage};
pub(crate) use transfer::{parse, parse_body};
pub use turns::NewTurn;

use crate::cipher::{MasterKey, NONCE_BYTES};
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::{History, Settings, State};
use crate::id::SessionId;
use crate::image::KvFault;
use crate::limits::{Limits, TITLE_BYTES_MAX};
use crate::record::{Create, Record};
use session::Session;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use transfer::check_names;

/// Where random bytes come from: keys, names and nonces are made of them.
pub trait Random {
    /// Fills `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);
}

impl<F: FnMut(&mut [u8])> Random for F {
    fn fill(&mut self, bytes: &mut [u8]) {
        self(bytes);
    }
}

/// All sessions below one folder. Nobody else uses the folder meanwhile.
pub struct Store<D> {
    disk: D,
    random: Box<dyn Random + Send>,
    master: MasterKey,
    limits: Limits,
    sessions: BTreeMap<SessionId, Session>,
    /// Sessions with something to write or sync.
    dirty: BTreeSet<SessionId>,
    /// Orders uses without a clock.
    n_uses: u64,
    /// Sessions that another master key has wrapped.
    n_of_other_key: u64,
    journal_bytes_written: u64,
    kv_bytes_written: u64,
    /// Whose KV file was of no use and is gone.
    dropped: Vec<(SessionId, KvFault)>,
    /// A place of a KV file.
    scratch: Vec<u8>,
}

/// What a new session is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSession<'a> {
    /// The model's name.
    pub model: &'a str,
    /// Which model it is.
    pub fingerprint: [u8; 32],
    /// What it is about; may be empty.
    pub title: &'a str,
    /// What its owner chose; `None` for the limits' default.
    pub settings: Option<Settings>,
    /// Whether its files are the last to go.
    pub pinned: bool,
}

impl<D: Disk> Store<D> {
    /// Makes a session that survives a power cut from now on.
    ///
    /// # Errors
    /// A limit, or the disk: then there is no such session.
    pub fn create(&mut self, owner: u64, new: &NewSession<'_>, now: u64) -> Result<SessionId> {
        check_names(new.title, new.model)?;
        let history = History::new(Create {
            owner,
            created: now,
            used: now,
            model: new.model.to_owned(),
            fingerprint: new.fingerprint,
            title: new.title.to_owned(),
            settings: new.settings.unwrap_or(self.limits.settings),
            pinned: new.pinned,
        });
        self.build(history)
    }

    /// All sessions of `owner`, by name.
    pub fn list(&self, owner: u64) -> Vec<Summary> {
        self.sessions.values().filter(|session| session.is_of(owner)).map(Session::summary).collect()
    }

    /// All sessions, whoever's, whose last turn was cut, the one used last at the end.
    pub fn interrupted(&self) -> Vec<(u64, SessionId)> {
        let cut = self.sessions.values().filter(|session| session.state() == State::Interrupted);
        let mut cut: Vec<&Session> = cut.collect();
        cut.sort_by_key(|session| session.last_use);
        cut.into_iter().map(|session| (session.owner, session.id)).collect()
    }

    /// What is known of a session without reading it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn summary(&self, owner: u64, id: SessionId) -> Result<Summary> {
        let session = self.sessions.get(&id).filter(|session| session.is_of(owner));
        session.map(Session::summary).ok_or(StoreError::NotFound)
    }

    /// Everything of a session, read from the disk if it is not in memory.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], damage at its beginning, or the disk.
    pub fn history(&mut self, owner: u64, id: SessionId) -> Result<&History> {
        self.n_uses += 1;
        let session = find(&mut self.sessions, owner, id)?;
        session.last_use = self.n_uses;
        session.load(&mut self.disk)
    }

    /// Forgets what can be read again from the disk; the session is as it was. Answers whether it can be: what is not
    /// written stays in memory.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub fn release(&mut self, owner: u64, id: SessionId) -> Result<bool> {
        Ok(find(&mut self.sessions, owner, id)?.release())
    }

    /// Gives a session another title.
    ///
    /// # Errors
    /// A limit, or as [`Store::history`].
    pub fn rename(&mut self, owner: u64, id: SessionId, title: &str) -> Result<()> {
        check_bytes("bytes of a title", title.len(), TITLE_BYTES_MAX)?;
        self.record(owner, id, Record::Rename { title: title.to_owned() })
    }

    /// Makes a session's files the last to go, or not.
    ///
    /// # Errors
    /// As [`Store::history`].
    pub fn pin(&mut self, owner: u64, id: SessionId, pinned: bool) -> Result<()> {
        self.record(owner, id, Record::Pin { pinned })
    }

    /// Changes what the owner chose.
    ///
    /// # Errors
    /// As [`Store::history`].
    pub fn set_settings(&mut self, owner: u64, id: SessionId, settings: Settings) -> Result<()> {
        self.record(owner, id, Record::Settings(settings))
    }

    /// What all sessions take, and what was written.
    pub fn usage(&self) -> Usage {
        let sum = |bytes: fn(&Session) -> u64| self.sessions.values().map(bytes).sum();
        Usage {
            sessions: self.sessions.values().filter(|session| !session.is_doomed()).count() as u64,
            of_other_key: self.n_of_other_key,
            loaded: self.sessions.values().filter(|session| session.history.is_some()).count() as u64,
            journal_bytes: sum(Session::journal_bytes),
            kv_bytes: sum(|session| session.kv.n_bytes),
            journal_bytes_written: self.journal_bytes_written,
            kv_bytes_written: self.kv_bytes_written,
        }
    }

    /// Bytes that the disk still takes.
    ///
    /// # Errors
    /// The disk's.
    pub fn free_bytes(&mut self) -> Result<u64> {
        Ok(self.disk.free_bytes()?)
    }

    /// Quotas and defaults.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Changes quotas and defaults; what is over them already stays until room is needed.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Applies a record and queues it.
    fn record(&mut self, owner: u64, id: SessionId, record: Record) -> Result<()> {
        self.n_uses += 1;
        let session = find(&mut self.sessions, owner, id)?;
        session.load(&mut self.disk)?;
        session.record(record, &self.limits)?;
        session.last_use = self.n_uses;
        self.dirty.insert(id);
        Ok(())
    }

    /// As [`StoreError::LimitReached`] when `owner` may not have another session.
    fn check_sessions(&self, owner: u64) -> Result<()> {
        let n_own = self.sessions.values().filter(|session| session.is_of(owner)).count() as u64;
        let (own, all) = (u64::from(self.limits.sessions_per_owner), u64::from(self.limits.sessions));
        if n_own >= own {
            return Err(StoreError::LimitReached { what: "sessions of one owner", limit: own });
        }
        if self.sessions.len() as u64 >= all {
            return Err(StoreError::LimitReached { what: "sessions of all owners", limit: all });
        }
        Ok(())
    }
}

impl<D> fmt::Debug for Store<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}

fn find(sessions: &mut BTreeMap<SessionId, Session>, owner: u64, id: SessionId) -> Result<&mut Session> {
    sessions.get_mut(&id).filter(|session| session.is_of(owner)).ok_or(StoreError::NotFound)
}

fn check_bytes(what: &'static str, n_bytes: usize, limit: usize) -> Result<()> {
    if n_bytes <= limit { Ok(()) } else { Err(StoreError::LimitReached { what, limit: limit as u64 }) }
}

fn nonce(random: &mut (dyn Random + Send)) -> [u8; NONCE_BYTES] {
    let mut nonce = [0; NONCE_BYTES];
    random.fill(&mut nonce);
    nonce
}
