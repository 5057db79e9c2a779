//! What becomes of a turn while it is answered, and how does it end?

use super::keeper::{Before, Keeper, failure};
use super::listener::{Ending, Listener};
use super::recorded::TurnId;
use crate::api::{Event, Failure};
use sparsed_session::{Outcome, SessionId, StoreError};

/// A turn while it is answered.
pub(super) struct Answer {
    pub(super) owner: u64,
    pub(super) id: SessionId,
    /// Whether the session is still taken for it.
    pub(super) holds: bool,
    /// `None` until the engine has the turn.
    pub(super) listener: Option<Listener>,
    /// What it was before it was cut; such a turn is never taken back.
    pub(super) resumed: Option<Before>,
    /// Whether the journal has its end.
    pub(super) is_closed: bool,
    /// Why it has ended before there was a listener.
    pub(super) failure: Option<Failure>,
}

impl Keeper {
    /// The engine has a turn.
    pub(super) fn listen(&mut self, turn: TurnId, mut listener: Listener) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        if let Some(failure) = answer.failure.take() {
            listener.fail(failure);
        }
        answer.listener = Some(listener);
    }

    /// An answer goes on.
    pub(super) fn event(&mut self, turn: TurnId, event: Event) {
        let Some(answer) = self.answers.get_mut(&turn).filter(|answer| !answer.is_closed) else { return };
        let Some(listener) = &mut answer.listener else { return };
        if let Event::Sampled { token } = event {
            listener.journaled();
            let (owner, id) = (answer.owner, answer.id);
            let journaled = self.store.append_tokens(owner, id, &[token]);
            if let Err(error) = journaled {
                self.fail(turn, &error);
            }
            return;
        }
        listener.hear(event);
        if let Some(ending) = listener.ending(answer.resumed.as_ref()) {
            self.close(turn, ending);
        }
    }

    /// The engine has let go of a turn: its client is gone, or the answer has ended.
    pub(super) fn gone(&mut self, turn: TurnId) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        if answer.is_closed {
            if answer.listener.is_none() {
                self.forget(turn);
            }
            return;
        }
        let n_tokens = answer.listener.as_ref().map_or(0, |listener| listener.n_tokens);
        let ending = match n_tokens {
            0 => Ending::unheard(answer.resumed.as_ref()),
            _ => Ending::Of(Outcome::Cancelled),
        };
        self.close(turn, ending);
        self.forget(turn);
    }

    /// Journals the end of a turn; one that has said nothing is taken back.
    fn close(&mut self, turn: TurnId, ending: Ending) {
        let Some(answer) = self.answers.get_mut(&turn).filter(|answer| !answer.is_closed) else { return };
        answer.is_closed = true;
        let (owner, id) = (answer.owner, answer.id);
        let message = answer.listener.as_ref().map_or_else(Vec::new, Listener::answer);
        let now = self.seconds();
        let is_try = self.alone.remove(&id) && ending == Ending::Of(Outcome::Interrupted);
        let ended = match ending {
            Ending::Of(outcome) => self.store.end_turn(owner, id, outcome, &message, now),
            Ending::As(message) => self.store.end_turn(owner, id, Outcome::Cancelled, &message, now),
            Ending::TakenBack => self.take_back(owner, id),
        };
        if let Err(error) = ended {
            self.fail(turn, &error);
        }
        // It was its time, or its client, that ended it: not what it does to the daemon.
        if is_try {
            // One try fewer is all that a failing disk costs it.
            let _unwritten = self.store.forget_try(owner, id).is_err();
        }
    }

    fn take_back(&mut self, owner: u64, id: SessionId) -> Result<(), StoreError> {
        let now = self.seconds();
        self.store.end_turn(owner, id, Outcome::Failed, &[], now)?;
        let n_turns = self.store.summary(owner, id)?.n_turns;
        self.store.truncate(owner, id, n_turns.saturating_sub(1)).map(drop)
    }

    /// A turn's tokens could not be journaled: its client hears why, and nothing that the journal does not have.
    pub(super) fn fail(&mut self, turn: TurnId, error: &StoreError) {
        let Some(answer) = self.answers.get_mut(&turn) else { return };
        let (owner, id) = (answer.owner, answer.id);
        log::error!(session:% = id, reason:% = error; "answer could not be journaled, it ends");
        answer.is_closed = true;
        match &mut answer.listener {
            Some(listener) => listener.fail(failure(id, error)),
            None => answer.failure = Some(failure(id, error)),
        }
        // The session says again what it said before this turn, whose images would be sealed as that.
        self.forget_file(id);
        if let Err(error) = self.store.revert(owner, id) {
            log::error!(session:% = id, reason:% = error; "session cannot be read again");
        }
    }

    /// Passes on what may be heard, and lets go of answers that are at their end.
    pub(super) fn deliver(&mut self) {
        // The next turn may begin as soon as the client has heard the end of this one.
        let closed = self.answers.values_mut().filter(|answer| answer.is_closed);
        let freed = closed.filter_map(|answer| std::mem::take(&mut answer.holds).then_some((answer.owner, answer.id)));
        let free: Vec<(u64, SessionId)> = freed.collect();
        free.into_iter().for_each(|(owner, id)| self.let_go(owner, id));
        let mut over = Vec::new();
        for (&turn, answer) in &mut self.answers {
            let Some(listener) = &mut answer.listener else { continue };
            listener.look();
            if listener.deliver() && answer.is_closed {
                over.push(turn);
            }
        }
        over.into_iter().for_each(|turn| self.forget(turn));
    }

    fn forget(&mut self, turn: TurnId) {
        if let Some(Answer { owner, id, holds, .. }) = self.answers.remove(&turn)
            && holds
        {
            self.let_go(owner, id);
        }
    }
}
