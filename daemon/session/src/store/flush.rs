//! What is written when, and which of it is committed?
//!
//! A failed write is cut off again. After a failed sync nobody knows what is on the disk, and asking again would not
//! tell: the system may have thrown the bytes away and call the file clean. Then, and when a cut fails, the journal is
//! written again as a whole, from memory, under another name.

use super::session::Session;
use super::{Random, Store, nonce};
use crate::cipher::SessionKey;
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::{Durability, History};
use crate::id::SessionId;
use crate::journal::Position;

/// What a flush did. A session is in one of the lists, or two: what is committed was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Sessions whose records are in the journal: the death of this process loses nothing of them.
    pub written: Vec<SessionId>,
    /// Sessions of which a power cut loses nothing from now on.
    pub committed: Vec<SessionId>,
    /// Sessions that could not be written or synced. Their records wait for the next flush, or for [`Store::revert`].
    pub failed: Vec<(SessionId, StoreError)>,
}

impl<D: Disk> Store<D> {
    /// Writes the records of all sessions that have some, one write each, and syncs as their durability says.
    pub fn flush(&mut self) -> Flushed {
        let mut flushed = Flushed::default();
        for id in std::mem::take(&mut self.dirty) {
            let Some(session) = self.sessions.get_mut(&id).filter(|session| !session.doomed) else { continue };
            let mut writer = Writer {
                disk: &mut self.disk,
                random: &mut *self.random,
                n_written: &mut self.journal_bytes_written,
                compact_bytes: self.limits.compact_bytes,
            };
            match writer.flush(session) {
                Ok(is_committed) => {
                    flushed.written.push(id);
                    if is_committed {
                        flushed.committed.push(id);
                    }
                }
                Err(error) => {
                    self.dirty.insert(id);
                    flushed.failed.push((id, error));
                }
            }
        }
        flushed
    }

    /// Writes all of one session and syncs it, whatever its durability.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the disk.
    pub fn commit(&mut self, owner: u64, id: SessionId) -> Result<()> {
        self.write_one(owner, id, |writer, session| writer.flush(session).map(drop))
    }

    /// As [`Store::commit`], and of what was truncated nothing is left in the session's files: its journal is written
    /// again, and images of blocks that it does not say any more are cut off.
    ///
    /// # Errors
    /// As [`Store::commit`]; the journal that was there needs no room, the new one does.
    pub fn forget(&mut self, owner: u64, id: SessionId) -> Result<()> {
        self.write_one(owner, id, |writer, session| {
            session.load(writer.disk)?;
            session.cut_kv(writer.disk)?;
            writer.rewrite(session)?;
            writer.sync(session)?;
            session.must_sync = false;
            Ok(())
        })
    }

    fn write_one(
        &mut self,
        owner: u64,
        id: SessionId,
        write: impl FnOnce(&mut Writer<'_, D>, &mut Session) -> Result<()>,
    ) -> Result<()> {
        let session = super::find(&mut self.sessions, owner, id)?;
        session.must_sync = true;
        let mut writer = Writer {
            disk: &mut self.disk,
            random: &mut *self.random,
            n_written: &mut self.journal_bytes_written,
            compact_bytes: self.limits.compact_bytes,
        };
        let written = write(&mut writer, session);
        if written.is_ok() {
            self.dirty.remove(&id);
        } else {
            self.dirty.insert(id);
        }
        written
    }

    /// Forgets what could not be written: the session is what the disk has of it. A turn that was being answered is
    /// interrupted then.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], damage, or the disk.
    pub fn revert(&mut self, owner: u64, id: SessionId) -> Result<()> {
        let session = super::find(&mut self.sessions, owner, id)?;
        // Also where it cannot be read now: nobody answers it any more, and what waits is written later.
        session.answering = false;
        session.read(&mut self.disk)?;
        if !session.journal.is_broken && !session.must_sync {
            self.dirty.remove(&id);
        }
        Ok(())
    }
}

struct Writer<'a, D> {
    disk: &'a mut D,
    random: &'a mut (dyn Random + Send),
    n_written: &'a mut u64,
    compact_bytes: u64,
}

impl<D: Disk> Writer<'_, D> {
    /// Answers whether the session is committed.
    fn flush(&mut self, session: &mut Session) -> Result<bool> {
        if session.journal.is_broken {
            self.rewrite(session)?;
        } else if !session.pending.is_empty() {
            self.append(session)?;
            if is_mostly_dead(session, self.compact_bytes) {
                let compacted = self.rewrite(session);
                // Nobody needs it while the old journal is there: it is tried again at the next cut or end of a turn.
                if session.journal.is_broken {
                    compacted?;
                }
            }
        }
        if !session.must_sync && session.durability() != Durability::Token {
            return Ok(false);
        }
        self.sync(session)?;
        session.must_sync = false;
        Ok(true)
    }

    fn append(&mut self, session: &mut Session) -> Result<()> {
        let mut position = session.journal.position;
        let mut bytes = Vec::new();
        for record in &session.pending {
            position.append(record, &session.key, nonce(self.random), &mut bytes);
        }
        let (journal, n_bytes) = (session.folder.journal(), session.journal.position.n_bytes);
        if let Err(error) = self.disk.write_at(&journal, n_bytes, &bytes) {
            // What was cut may be back after a power cut, until the cut is synced.
            session.journal.is_synced = false;
            session.journal.is_broken = self.disk.set_len(&journal, n_bytes).is_err();
            return Err(error.into());
        }
        *self.n_written += bytes.len() as u64;
        session.pending_is_written(position);
        session.journal.is_synced = false;
        Ok(())
    }

    /// Writes the journal again, with nothing in it that nobody needs.
    fn rewrite(&mut self, session: &mut Session) -> Result<()> {
        session.load(self.disk)?;
        let history = session.history.as_ref().ok_or(StoreError::NotFound)?;
        let (position, bytes) = whole_journal(session.id, history, &session.key, self.random);
        session.folder.write_journal(self.disk, &bytes)?;
        if let Err(error) = session.folder.replace_journal(self.disk) {
            session.journal.is_broken = true;
            return Err(error.into());
        }
        *self.n_written += bytes.len() as u64;
        session.pending_is_written(position);
        if std::mem::take(&mut session.journal.is_broken) {
            session.folder.unmark_unsure(self.disk);
        }
        session.journal.is_synced = true;
        session.journal.is_named = false;
        Ok(())
    }

    fn sync(&mut self, session: &mut Session) -> Result<()> {
        if !session.journal.is_synced {
            if let Err(error) = self.disk.sync(&session.folder.journal()) {
                session.journal.is_broken = true;
                session.folder.mark_unsure(self.disk);
                return Err(error.into());
            }
            session.journal.is_synced = true;
        }
        if !session.journal.is_named {
            session.folder.sync_names(self.disk)?;
            session.journal.is_named = true;
        }
        Ok(())
    }
}

/// Whether less than half of a journal that is worth it would be left after compaction.
fn is_mostly_dead(session: &Session, compact_bytes: u64) -> bool {
    let n_bytes = session.journal_bytes();
    let is_worth_it = n_bytes >= compact_bytes && !session.answering;
    let Some(history) = session.history.as_ref().filter(|_| is_worth_it) else { return false };
    let turns: usize =
        history.turns.iter().map(|turn| turn.request.len() + turn.sampling.len() + turn.answer.len()).sum();
    // Frames, nonces and numbers, and what most tokens take.
    let n_live = 512 + turns as u64 + 128 * history.turns.len() as u64 + 3 * history.tokens.len() as u64;
    n_bytes > n_live.saturating_mul(2)
}

/// A journal that gives just this history, and where its next record goes.
pub(super) fn whole_journal(
    id: SessionId,
    history: &History,
    key: &SessionKey,
    random: &mut (dyn Random + Send),
) -> (Position, Vec<u8>) {
    let mut generation = [0; 16];
    random.fill(&mut generation);
    let (mut position, header) = Position::start(id, generation);
    let mut bytes = header.to_vec();
    history.records().iter().for_each(|record| position.append(record, key, nonce(random), &mut bytes));
    (position, bytes)
}
