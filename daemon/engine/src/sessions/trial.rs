//! Does a session stay that was made for a turn? Only if there is one at the end.
//!
//! Whoever makes it does not know what becomes of the turn: the engine may refuse it, its client may go away, it may
//! fail before its first token. The journal knows. So the session is on trial while somebody holds a [`Trial`]; when
//! nobody does, and nobody has taken the session, it goes again if it has no more turns than it was made with.

use super::keeper::{Keeper, failure};
use super::{Ask, Asks, SessionId};
use crate::api::{Failure, Owner};

/// Who means to begin a turn of a session that was made for it. Does not wait when it is dropped.
#[derive(Debug)]
pub struct Trial {
    asks: Asks,
    owner: Owner,
    id: SessionId,
}

/// A session on trial.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnTrial {
    /// Turns that it was made with.
    n_turns: u32,
    /// Whether the turn that it is for may still be begun.
    is_waited_for: bool,
}

impl Trial {
    /// Has a session that was just made go again if no further turn comes of it.
    ///
    /// # Errors
    /// There is no such session.
    pub(super) fn begin(keeper: &mut Keeper, asks: Asks, owner: Owner, id: SessionId) -> Result<Self, Failure> {
        let summary = keeper.store.summary(owner.number(), id).map_err(|error| failure(id, &error))?;
        keeper.on_trial.insert(id, OnTrial { n_turns: summary.n_turns, is_waited_for: true });
        Ok(Self { asks, owner, id })
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        let (owner, id) = (self.owner.number(), self.id);
        self.asks.tell(Ask::Do(Box::new(move |keeper| keeper.end_trial(owner, id))));
    }
}

impl Keeper {
    fn end_trial(&mut self, owner: u64, id: SessionId) {
        if let Some(trial) = self.on_trial.get_mut(&id) {
            trial.is_waited_for = false;
            self.rest(owner, id);
        }
    }

    /// Deletes a session that nobody has taken if its trial is over and has brought nothing.
    pub(super) fn judge(&mut self, owner: u64, id: SessionId) {
        let Some(&OnTrial { n_turns, is_waited_for: false }) = self.on_trial.get(&id) else { return };
        self.on_trial.remove(&id);
        let is_vain = self.store.summary(owner, id).is_ok_and(|summary| summary.n_turns <= n_turns);
        if is_vain && let Err(error) = self.remove(owner, id) {
            log::warn!(session:% = id, reason:% = error; "a session that no turn came of could not be deleted");
        }
    }
}
