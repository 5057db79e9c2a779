//! How does a session become another one, here or on another machine?
//!
//! An exported session is `magic "spdx", u32 version, u64 n_bytes, u32 CRC32C` of the `n_bytes` that follow: records as
//! in a compacted journal, each after its length (u32), not encrypted. Numbers are little-endian.

use super::flush::whole_journal;
use super::folder::Folder;
use super::session::Session;
use super::{Store, check_bytes, nonce};
use crate::cipher::SessionKey;
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::{History, Outcome, TurnHistory};
use crate::id::SessionId;
use crate::journal::RECORD_TEXT_BYTES_MAX;
use crate::limits::{MODEL_BYTES_MAX, TITLE_BYTES_MAX};
use crate::record::Record;
use zeroize::Zeroizing;

const MAGIC: &[u8; 4] = b"spdx";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 20;

impl<D: Disk> Store<D> {
    /// A session of its own with the first `n_turns` turns of another one, or all, each as `adopt` makes it. Images are
    /// not copied: the new session has none.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while the session is answering, fewer turns than that, a limit, or as [`Store::history`].
    pub fn fork(
        &mut self,
        owner: u64,
        id: SessionId,
        n_turns: Option<u32>,
        now: u64,
        adopt: &dyn Fn(&mut TurnHistory),
    ) -> Result<SessionId> {
        self.idle(owner, id)?;
        let mut history = self.history(owner, id)?.clone();
        if let Some(n_turns) = n_turns {
            let n_tokens = history.tokens_after(n_turns as usize);
            let n_tokens = u32::try_from(n_tokens).expect("SESSION_TOKENS_MAX is below 2^32");
            let cut = Record::Truncate { n_turns, n_tokens };
            history.apply(&cut).map_err(|misfit| StoreError::Invalid { what: misfit.0 })?;
        }
        (history.created, history.used, history.pinned) = (now, now, false);
        history.turns.iter_mut().for_each(adopt);
        self.build(history)
    }

    /// Everything of a session as one file that anybody can read.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while the session is answering, or as [`Store::history`].
    pub fn export(&mut self, owner: u64, id: SessionId) -> Result<Vec<u8>> {
        self.idle(owner, id)?;
        let mut file = vec![0; HEADER_BYTES];
        for record in self.history(owner, id)?.records() {
            let record = record.encode();
            let n_bytes = u32::try_from(record.len()).expect("RECORD_BYTES_MAX is below 2^32");
            file.extend_from_slice(&n_bytes.to_le_bytes());
            file.extend_from_slice(&record);
        }
        // In place: a copy of it would be as long again.
        let (header, body) = file.split_at_mut(HEADER_BYTES);
        let (n_bytes, crc) = (body.len() as u64, crc32c::crc32c(body));
        let parts = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &n_bytes.to_le_bytes(), &crc.to_le_bytes()];
        header.copy_from_slice(&parts.concat());
        Ok(file)
    }

    /// Makes a session of an exported one, whoever's it was, with each turn as `adopt` makes it. It keeps the time it
    /// was made at, and is not pinned; who brings it uses it now, so its retention begins anew.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::UnknownVersion`] for a file that cannot be read, a limit, or the disk.
    pub fn import(&mut self, owner: u64, file: &[u8], now: u64, adopt: &dyn Fn(&mut TurnHistory)) -> Result<SessionId> {
        let limit = self.limits.journal_bytes;
        if file.len() as u64 > limit {
            return Err(StoreError::LimitReached { what: "bytes of an exported session", limit });
        }
        let mut history = parse(file)?;
        check_names(&history.title, &history.model)?;
        (history.owner, history.used, history.pinned) = (owner, now, false);
        history.turns.iter_mut().for_each(adopt);
        self.build(history)
    }

    /// Makes a session with this history, whole and on the disk, or not at all.
    pub(super) fn build(&mut self, mut history: History) -> Result<SessionId> {
        let owner = history.owner;
        self.check_sessions(owner)?;
        if let Some(turn) = history.turns.last_mut() {
            turn.outcome.get_or_insert(Outcome::Interrupted);
        }
        let (mut id, mut key) = ([0; 16], Zeroizing::new([0; 32]));
        self.random.fill(&mut id);
        self.random.fill(&mut *key);
        let (id, key) = (SessionId::from_bytes(id), SessionKey::new(key));
        let key_file = key.wrap(&self.master, owner, id, &nonce(&mut *self.random));
        let (position, journal) = whole_journal(id, &history, &key, &mut *self.random);
        self.check_journals(owner, journal.len() as u64)?;
        Folder::of(owner, id).build(&mut self.disk, &key_file, &journal)?;
        self.journal_bytes_written += (key_file.len() + journal.len()) as u64;
        let mut session = Session::new(id, key, history, position);
        (session.journal.is_synced, session.journal.is_named) = (true, true);
        self.n_uses += 1;
        session.last_use = self.n_uses;
        self.sessions.insert(id, session);
        Ok(id)
    }
}

/// That a session may be called so, and its model.
pub(super) fn check_names(title: &str, model: &str) -> Result<()> {
    check_bytes("bytes of a title", title.len(), TITLE_BYTES_MAX)?;
    check_bytes("bytes of a model's name", model.len(), MODEL_BYTES_MAX)
}

/// What an exported session says.
pub(crate) fn parse(file: &[u8]) -> Result<History> {
    const DAMAGED: StoreError = StoreError::Damaged { what: "the exported session" };
    let (header, body) = file.split_first_chunk::<HEADER_BYTES>().ok_or(DAMAGED)?;
    let (magic, rest) = header.split_first_chunk::<4>().ok_or(DAMAGED)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(DAMAGED)?;
    let (n_bytes, crc) = rest.split_first_chunk::<8>().ok_or(DAMAGED)?;
    let crc = u32::from_le_bytes(crc.try_into().map_err(|_| DAMAGED)?);
    if magic != MAGIC {
        return Err(StoreError::Invalid { what: "not an exported session" });
    }
    match u32::from_le_bytes(*version) {
        VERSION => {}
        version => return Err(StoreError::UnknownVersion { what: "the exported session", version }),
    }
    if u64::from_le_bytes(*n_bytes) != body.len() as u64 || crc32c::crc32c(body) != crc {
        return Err(DAMAGED);
    }
    parse_body(body).ok_or(DAMAGED)
}

/// What its records say, without the header.
pub(crate) fn parse_body(mut rest: &[u8]) -> Option<History> {
    let mut history = None;
    while let Some((n_bytes, after)) = rest.split_first_chunk::<4>() {
        let n_bytes = u32::from_le_bytes(*n_bytes) as usize;
        if n_bytes > RECORD_TEXT_BYTES_MAX {
            return None;
        }
        let (record, after) = after.split_at_checked(n_bytes)?;
        match (&mut history, Record::decode(record)?) {
            (None, Record::Create(create)) => history = Some(History::new(create)),
            (Some(history), record @ (Record::Kept(_) | Record::Past(_))) => history.apply(&record).ok()?,
            _ => return None,
        }
        rest = after;
    }
    if rest.is_empty() { history } else { None }
}
