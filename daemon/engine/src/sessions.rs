//! How does a surface use sessions? Verbs on one thread that owns them all.
//!
//! A turn of a session walks through it thus: [`Service::begin_turn`](crate::Service::begin_turn) takes the session for
//! the caller alone and makes a prompt of its conversation and of what is new; both are journaled; the engine answers
//! through a sink that passes the journal first (`recorded`, `keeper`). When the answer ends, or its client goes away,
//! the session is free again.
//!
//! Every verb waits for the thread, which may wait for the disk: not for threads that must not wait.

mod answers;
mod asks;
mod conversation;
mod images;
mod keeper;
mod late;
mod listener;
mod open;
mod readers;
mod recorded;
mod retention;
mod standing;
mod trial;
mod usage;
mod verbs;
mod wishes;

pub(crate) use asks::{Ask, Asks, ImagesOf};
pub use conversation::{SaidTurn, TurnEnd};
pub(crate) use keeper::{Clocks, Keeper, spawn};
pub use late::{LateStore, SessionStore};
pub(crate) use open::OpenSession;
pub(crate) use recorded::Recorder;
pub use sparsed_session::{
    ContextFull, Durability, SessionId, Settings, State as SessionState, Summary as SessionSummary,
    Usage as SessionUsage,
};
pub use standing::Standing;
pub use trial::Trial;
pub(crate) use verbs::CutTurn;
pub use wishes::Wishes;

use crate::ChatMessage;
use crate::api::{Failure, Owner};
use crate::service::ServedModel;
use conversation::Conversation;
use keeper::failure;
use late::Absence;
use sparsed_session::{History, Limits as SessionLimits, NewSession, StoreError};
use std::sync::mpsc::sync_channel;

/// When a disk that cannot be used may be there.
const RETRY_S: u32 = 10;

/// The sessions of this daemon; cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions {
    asks: Asks,
    absence: Absence,
    usage: usage::Board,
}

/// What a session is, and all that was said in it.
#[derive(Clone, Debug)]
pub struct Session {
    /// What a list shows.
    pub summary: SessionSummary,
    /// What its owner chose.
    pub settings: Settings,
    /// All messages; an answer that was cut and is to be finished is not among them.
    pub messages: Vec<ChatMessage>,
}

/// What its owner may change about a session; `None` leaves it.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// What it is about.
    pub title: Option<String>,
    /// Whether its files are the last to go.
    pub pinned: Option<bool>,
    /// What a power cut may lose.
    pub durability: Option<Durability>,
    /// What to do when the context is full.
    pub context_full: Option<ContextFull>,
}

impl Sessions {
    fn new(asks: Asks, absence: Absence, usage: usage::Board) -> Self {
        Self { asks, absence, usage }
    }

    /// The way to the thread.
    pub(crate) fn asks(&self) -> Asks {
        self.asks.clone()
    }

    /// Keeps to other limits from now on. Does not wait for the thread.
    pub fn set_limits(&self, limits: SessionLimits) {
        self.asks.tell(Ask::Do(Box::new(move |keeper| keeper.store.set_limits(limits))));
    }

    /// What all sessions take, whoever's, as of a second ago at most; nothing until their disk is there. Does not wait
    /// for the thread.
    pub fn usage(&self) -> Option<SessionUsage> {
        self.usage.look()
    }

    /// Whether there are none because their disk is not there yet.
    pub fn are_away(&self) -> bool {
        self.absence.lasts()
    }

    /// All sessions of `owner`, the one used last first.
    ///
    /// # Errors
    /// [`Failure::ShuttingDown`].
    pub fn list(&self, owner: Owner) -> Result<Vec<SessionSummary>, Failure> {
        let mut list = self.ask(move |keeper| Ok(keeper.store.list(owner.number())))?;
        list.sort_by_key(|summary| std::cmp::Reverse((summary.used, summary.created)));
        Ok(list)
    }

    /// What a list shows of a session. Nothing of it is read.
    ///
    /// # Errors
    /// No such session.
    pub fn summary(&self, owner: Owner, id: SessionId) -> Result<SessionSummary, Failure> {
        self.ask(move |keeper| keeper.store.summary(owner.number(), id).map_err(|error| failure(id, &error)))
    }

    /// A session with its messages.
    ///
    /// # Errors
    /// As any verb: no such session, or the disk.
    pub fn get(&self, owner: Owner, id: SessionId) -> Result<Session, Failure> {
        let (summary, _, history) = self.read(owner, id)?;
        let messages = Conversation::of(&history)?.messages();
        Ok(Session { summary, settings: history.settings, messages })
    }

    /// A session's turns one by one, and the name of its model.
    ///
    /// # Errors
    /// As any verb.
    pub fn turns(&self, owner: Owner, id: SessionId) -> Result<(String, Vec<SaidTurn>), Failure> {
        let (summary, is_answered, history) = self.read(owner, id)?;
        Ok((summary.model, SaidTurn::all(&history, is_answered)?))
    }

    /// What a list shows of a session, whether it is being answered, and all of it. Whoever asks reads the messages:
    /// the sessions thread has answers to journal.
    fn read(&self, owner: Owner, id: SessionId) -> Result<(SessionSummary, bool, History), Failure> {
        self.verb(owner, id, move |keeper, owner| {
            let summary = keeper.store.summary(owner, id)?;
            Ok((summary, keeper.live(id).is_some(), keeper.store.history(owner, id)?.clone()))
        })
    }

    /// All sessions, whoever's, whose last answer the daemon's end has cut, the one used last at the end.
    ///
    /// # Errors
    /// [`Failure::ShuttingDown`].
    pub fn interrupted(&self) -> Result<Vec<(Owner, SessionId)>, Failure> {
        self.ask(|keeper| {
            let cut = keeper.store.interrupted().into_iter();
            Ok(cut.filter_map(|(owner, id)| Some((Owner::numbered(owner)?, id))).collect())
        })
    }

    /// The number of the turn with which a session is to go on by itself, if there is one: an answer in the background
    /// that the daemon's end has cut. One at which several daemons have ended before it had another token waits
    /// for somebody to ask.
    ///
    /// # Errors
    /// As any verb.
    pub fn goes_on_alone(&self, owner: Owner, id: SessionId) -> Result<Option<u32>, Failure> {
        self.ask(move |keeper| keeper.goes_on_alone(owner.number(), id))
    }

    /// Changes a session and answers what it is then.
    ///
    /// # Errors
    /// As any verb. What could not be written has changed nothing, except where the disk has taken it and could not say
    /// that it is there for good: then the session is what the disk has.
    pub fn change(&self, owner: Owner, id: SessionId, change: Change) -> Result<SessionSummary, Failure> {
        self.verb(owner, id, move |keeper, owner| keeper.change(owner, id, &change))
    }

    /// A new session with the first `n_turns` turns of another one, or all of them. Blocks in memory are shared.
    ///
    /// # Errors
    /// As any verb; the session is being answered, or has fewer turns.
    pub fn fork(&self, owner: Owner, id: SessionId, n_turns: Option<u32>) -> Result<SessionSummary, Failure> {
        self.verb(owner, id, move |keeper, owner| {
            let fork = keeper.fork(owner, id, n_turns)?;
            keeper.store.summary(owner, fork)
        })
    }

    /// Forgets all but the first `n_turns` turns.
    ///
    /// # Errors
    /// As [`Sessions::fork`]; what could not be written, as of [`Sessions::change`].
    pub fn truncate(&self, owner: Owner, id: SessionId, n_turns: u32) -> Result<SessionSummary, Failure> {
        self.ask(move |keeper| keeper.truncate(owner.number(), id, n_turns))
    }

    /// Forgets turn number `turn`, from 0, if it is the last one; with the only one goes the session. Answers whether
    /// it was the last.
    ///
    /// # Errors
    /// As [`Sessions::truncate`].
    pub fn forget_turn(&self, owner: Owner, id: SessionId, turn: u32) -> Result<bool, Failure> {
        self.ask(move |keeper| keeper.forget_turn(owner.number(), id, turn))
    }

    /// Puts a session that was just made on trial: it is for a turn that is about to be begun, and goes again if none
    /// comes of it.
    ///
    /// # Errors
    /// As any verb.
    pub fn try_out(&self, owner: Owner, id: SessionId) -> Result<Trial, Failure> {
        let asks = self.asks();
        self.ask(move |keeper| Trial::begin(keeper, asks, owner, id))
    }

    /// Makes all of a session survive a power cut, whatever its durability.
    ///
    /// # Errors
    /// As any verb.
    pub fn checkpoint(&self, owner: Owner, id: SessionId) -> Result<SessionSummary, Failure> {
        self.verb(owner, id, move |keeper, owner| {
            keeper.checkpoint(owner, id)?;
            keeper.store.summary(owner, id)
        })
    }

    /// Destroys a session's key and removes its files.
    ///
    /// # Errors
    /// As any verb; the session is being answered.
    pub fn delete(&self, owner: Owner, id: SessionId) -> Result<(), Failure> {
        self.ask(move |keeper| keeper.delete(owner.number(), id))
    }

    /// Everything of a session as one file, which anybody can read.
    ///
    /// # Errors
    /// As any verb; the session is being answered.
    pub fn export(&self, owner: Owner, id: SessionId) -> Result<Vec<u8>, Failure> {
        self.verb(owner, id, move |keeper, owner| keeper.store.export(owner, id))
    }

    /// A session of a file that [`Sessions::export`] made, here or elsewhere.
    ///
    /// # Errors
    /// A file that cannot be read, a limit, or the disk.
    pub fn import(&self, owner: Owner, file: Vec<u8>) -> Result<SessionSummary, Failure> {
        self.ask(move |keeper| {
            let refused = |error: StoreError| match error {
                StoreError::Damaged { .. } | StoreError::UnknownVersion { .. } | StoreError::UnknownRecord { .. } => {
                    Failure::invalid("file", format!("is no exported session: {error}"))
                }
                error => failure(SessionId::from_bytes([0; 16]), &error),
            };
            let id = keeper.import(owner.number(), &file).map_err(refused)?;
            keeper.store.summary(owner.number(), id).map_err(refused)
        })
    }

    /// Makes a session for `model`, which is called `name`.
    pub(crate) fn create(
        &self,
        owner: Owner,
        name: String,
        model: &ServedModel,
        change: Change,
    ) -> Result<SessionSummary, Failure> {
        let [fingerprint, _] = model.vocabularies;
        self.ask(move |keeper| {
            let defaults = keeper.store.limits().settings;
            let settings = Settings {
                durability: change.durability.unwrap_or(defaults.durability),
                context_full: change.context_full.unwrap_or(defaults.context_full),
            };
            let title = change.title.unwrap_or_default();
            let pinned = change.pinned.unwrap_or(false);
            let new = NewSession { model: &name, fingerprint, title: &title, settings: Some(settings), pinned };
            let refused = |error: StoreError| failure(SessionId::from_bytes([0; 16]), &error);
            let id = keeper.create(owner.number(), &new).map_err(refused)?;
            keeper.store.summary(owner.number(), id).map_err(refused)
        })
    }

    /// Takes a session for the caller alone.
    pub(crate) fn open(&self, owner: Owner, id: SessionId) -> Result<OpenSession, Failure> {
        let history = self.ask(move |keeper| {
            keeper.take_session(owner.number(), id)?;
            let history = keeper.store.history(owner.number(), id).cloned();
            history.map_err(|error| {
                keeper.let_go(owner.number(), id);
                failure(id, &error)
            })
        })?;
        // Messages are read here: the sessions thread has other answers to journal.
        match Conversation::of(&history) {
            Ok(conversation) => Ok(OpenSession::new(self.asks.clone(), owner, id, conversation)),
            Err(failure) => {
                self.asks.tell(Ask::Close { owner: owner.number(), id });
                Err(failure)
            }
        }
    }

    fn verb<T: Send + 'static>(
        &self,
        owner: Owner,
        id: SessionId,
        verb: impl FnOnce(&mut Keeper, u64) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Failure> {
        self.ask(move |keeper| {
            let done = verb(keeper, owner.number()).map_err(|error| failure(id, &error));
            keeper.rest(owner.number(), id);
            done
        })
    }

    /// Has the thread carry out `verb`, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        verb: impl FnOnce(&mut Keeper) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        if self.absence.lasts() {
            return Err(Failure::SessionsAway { retry_after_s: RETRY_S });
        }
        ask(&self.asks, verb)
    }
}

fn ask<T: Send + 'static>(
    asks: &Asks,
    verb: impl FnOnce(&mut Keeper) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let (answer, answered) = sync_channel(1);
    asks.tell(Ask::Do(Box::new(move |keeper| {
        // The caller waits, or is gone with its thread.
        let _unheard = answer.send(verb(keeper)).is_err();
    })));
    answered.recv().unwrap_or(Err(Failure::ShuttingDown))
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("fewer than 2^32 tokens")
}
