//! What may be done with a session that is not being answered? The verbs that change what it says.

use super::Change;
use super::conversation::SaidTurn;
use super::keeper::{Before, Keeper, Resumed, failure};
use super::wishes::foreground;
use crate::api::{Failure, Turn};
#[cfg(feature = "simulation")]
use sparsed_session::History;
use sparsed_session::{Durability, ImageShape, NewSession, NewTurn, Outcome, SessionId, StoreError, Summary};

/// How often an answer goes on by itself from the same token: it may be what ends the daemon.
const TRIES_MAX: u32 = 3;

/// A turn that was cut and is to go on.
#[derive(Clone, Debug)]
pub(crate) struct CutTurn {
    /// Tokens of its prompt.
    pub(crate) n_prompt: u32,
    /// Tokens of its answer so far.
    pub(crate) answered: Vec<u32>,
    /// The message of its answer so far.
    pub(crate) said: Vec<u8>,
    /// Whether its client went away; otherwise the daemon did.
    pub(crate) is_cancelled: bool,
}

impl Keeper {
    pub(crate) fn create(&mut self, owner: u64, new: &NewSession<'_>) -> Result<SessionId, StoreError> {
        let now = self.seconds();
        let made = self.with_room(|store| store.create(owner, new, now));
        self.made(owner, made)
    }

    pub(crate) fn import(&mut self, owner: u64, file: &[u8]) -> Result<SessionId, StoreError> {
        let now = self.seconds();
        let made = self.with_room(|store| store.import(owner, file, now, &foreground));
        self.made(owner, made)
    }

    pub(crate) fn fork(&mut self, owner: u64, id: SessionId, n_turns: Option<u32>) -> Result<SessionId, StoreError> {
        let now = self.seconds();
        let made = self.with_room(|store| store.fork(owner, id, n_turns, now, &foreground));
        self.made(owner, made)
    }

    /// Nobody uses a session that was just made.
    fn made(&mut self, owner: u64, made: Result<SessionId, StoreError>) -> Result<SessionId, StoreError> {
        if let Ok(id) = made {
            self.rest(owner, id);
        }
        made
    }

    /// Changes what its owner may change, and says so to the disk.
    pub(crate) fn change(&mut self, owner: u64, id: SessionId, change: &Change) -> Result<Summary, StoreError> {
        if let Some(title) = &change.title {
            self.store.rename(owner, id, title)?;
        }
        if let Some(pinned) = change.pinned {
            self.store.pin(owner, id, pinned)?;
        }
        if change.durability.is_some() || change.context_full.is_some() {
            let mut settings = self.store.history(owner, id)?.settings;
            settings.durability = change.durability.unwrap_or(settings.durability);
            settings.context_full = change.context_full.unwrap_or(settings.context_full);
            self.store.set_settings(owner, id, settings)?;
        }
        self.commit(owner, id)?;
        self.store.summary(owner, id)
    }

    /// Brings a change to the disk, or takes it back: whoever asked hears that it was not made.
    fn commit(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        let committed = self.checkpoint(owner, id);
        self.taken_back(owner, id, committed)
    }

    /// As [`Self::commit`], of what was truncated. A disk that is full of other things than blocks keeps it from going,
    /// until the journal is written again for another reason.
    fn commit_forgotten(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        let forgotten = match self.with_room(|store| store.forget(owner, id)) {
            Err(StoreError::DiskFull) => {
                log::warn!(session:% = id; "the disk is full: what was truncated is left in the session's journal");
                self.store.commit(owner, id)
            }
            done => done,
        };
        self.taken_back(owner, id, forgotten)
    }

    fn taken_back(&mut self, owner: u64, id: SessionId, done: Result<(), StoreError>) -> Result<(), StoreError> {
        if let Err(error) = &done {
            self.undo(owner, id, error);
        }
        done
    }

    /// Brings all that was said to the disk. What could not be brought there yet stays said.
    pub(super) fn checkpoint(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        self.with_room(|store| store.commit(owner, id))
    }

    /// Forgets all but the first turns, and says so to the disk.
    pub(crate) fn truncate(&mut self, owner: u64, id: SessionId, n_turns: u32) -> Result<Summary, Failure> {
        self.check_free(id)?;
        self.retract(owner, id, n_turns);
        let mut truncate = || {
            self.store.truncate(owner, id, n_turns)?;
            self.forget_file(id);
            self.commit_forgotten(owner, id)?;
            self.store.summary(owner, id)
        };
        let done = truncate().map_err(|error| failure(id, &error));
        self.rest(owner, id);
        done
    }

    /// Forgets turn number `turn`, and with the only one the session, if it is the last one still. Answers whether it
    /// was.
    pub(crate) fn forget_turn(&mut self, owner: u64, id: SessionId, turn: u32) -> Result<bool, Failure> {
        let n_turns = self.store.summary(owner, id).map_err(|error| failure(id, &error))?.n_turns;
        if n_turns.checked_sub(1) != Some(turn) {
            return Ok(false);
        }
        match turn {
            0 => self.delete(owner, id)?,
            turn => drop(self.truncate(owner, id, turn)?),
        }
        Ok(true)
    }

    pub(crate) fn delete(&mut self, owner: u64, id: SessionId) -> Result<(), Failure> {
        self.check_free(id)?;
        self.retract(owner, id, 0);
        self.remove(owner, id).map_err(|error| failure(id, &error))
    }

    /// Deletes a session that nobody has taken, with what is known of it here.
    pub(super) fn remove(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        self.forget_file(id);
        self.alone.remove(&id);
        self.over_quota.remove(&id);
        self.on_trial.remove(&id);
        self.store.delete(owner, id)
    }

    /// That the next turn of a session is number `turn`, if it must be a certain one.
    pub(crate) fn check_next(&self, owner: u64, id: SessionId, turn: Option<u32>) -> Result<(), Failure> {
        let n_turns = self.store.summary(owner, id).map_err(|error| failure(id, &error))?.n_turns;
        match turn {
            Some(turn) if turn != n_turns => Err(Failure::SessionWentOn { id: id.to_string() }),
            _ => Ok(()),
        }
    }

    /// Journals a turn of a session that is taken.
    pub(crate) fn begin(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        turn: &NewTurn<'_>,
    ) -> Result<Turn, Failure> {
        let now = self.seconds();
        self.with_room(|store| store.begin_turn(owner, id, turn, now)).map_err(|error| failure(id, &error))?;
        Ok(self.turn(owner, id, shape, turn.keep_tokens, None))
    }

    /// As [`Sessions::goes_on_alone`](super::Sessions::goes_on_alone).
    pub(crate) fn goes_on_alone(&mut self, owner: u64, id: SessionId) -> Result<Option<u32>, Failure> {
        if self.check_free(id).is_err() {
            return Ok(None);
        }
        let history = self.store.history(owner, id).map_err(|error| failure(id, &error))?;
        let turns = if history.is_open() { SaidTurn::all(history, false) } else { Ok(Vec::new()) };
        self.rest(owner, id);
        let turns = turns?;
        if turns.last().is_none_or(|turn| !turn.in_background) {
            return Ok(None);
        }
        let n_tries = self.store.note_try(owner, id).map_err(|error| failure(id, &error))?;
        if n_tries > TRIES_MAX {
            log::warn!(session:% = id, tries = n_tries - 1; "daemons have ended at this answer, it waits to be asked for");
            return Ok(None);
        }
        self.alone.insert(id);
        Ok(Some(super::count(turns.len()) - 1))
    }

    /// Goes on with the last turn of a session that is taken.
    pub(crate) fn resume(
        &mut self,
        owner: u64,
        id: SessionId,
        shape: &ImageShape,
        cut: CutTurn,
    ) -> Result<Turn, Failure> {
        let resumed = self.with_room(|store| {
            // Its tokens are sent again before anything is written, and the daemon that wrote them, and its begin, may
            // have died before a sync.
            if store.history(owner, id)?.settings.durability != Durability::None {
                store.commit(owner, id)?;
            }
            store.resume_turn(owner, id)
        });
        resumed.map_err(|error| failure(id, &error))?;
        let n_kept = cut.n_prompt + super::count(cut.answered.len());
        let before = Before { is_cancelled: cut.is_cancelled, said: cut.said };
        Ok(self.turn(owner, id, shape, n_kept, Some(Resumed { tokens: cut.answered, before })))
    }
}

impl Keeper {
    /// Ends the last turn of a session that is taken, which was cut and would fail again; it has said `answer`.
    pub(crate) fn give_up(&mut self, owner: u64, id: SessionId, answer: &[u8]) -> Result<(), Failure> {
        let now = self.seconds();
        self.store.resume_turn(owner, id).map_err(|error| failure(id, &error))?;
        let ended = self.store.end_turn(owner, id, Outcome::Cancelled, answer, now);
        if let Err(error) = &ended {
            self.undo(owner, id, error);
        }
        ended.and_then(|()| self.commit(owner, id)).map_err(|error| failure(id, &error))
    }

    /// A session that could not be written is again what the disk has of it. The answer that is under way cannot be
    /// written either.
    fn undo(&mut self, owner: u64, id: SessionId, error: &StoreError) {
        if let Some(turn) = self.live(id) {
            return self.fail(turn, error);
        }
        if let Err(error) = self.store.revert(owner, id) {
            log::error!(session:% = id, reason:% = error; "session cannot be read again");
        }
    }
}

/// What a simulation looks at.
#[cfg(feature = "simulation")]
impl Keeper {
    pub(crate) fn history(&mut self, owner: u64, id: SessionId) -> Result<History, Failure> {
        self.store.history(owner, id).cloned().map_err(|error| failure(id, &error))
    }

    pub(crate) fn histories(&mut self, owner: u64) -> Result<Vec<(SessionId, History)>, Failure> {
        let ids: Vec<SessionId> = self.store.list(owner).iter().map(|summary| summary.id).collect();
        ids.into_iter().map(|id| Ok((id, self.history(owner, id)?))).collect()
    }

    pub(crate) fn summaries(&self, owner: u64) -> Vec<Summary> {
        self.store.list(owner)
    }

    pub(crate) fn export(&mut self, owner: u64, id: SessionId) -> Result<Vec<u8>, StoreError> {
        let file = self.store.export(owner, id);
        self.rest(owner, id);
        file
    }
}
