//! How does a surface ask for a turn of a session? The same [`Generate`] comes of it as of a request without one.

use super::{Held, Service};
use crate::ChatRequest;
use crate::api::{ChatPrompt, Failure, Generate, Owner, Turn};
use crate::sessions::{Change, OpenSession, SessionId, SessionSummary, Sessions, Wishes};

impl Service {
    /// The sessions of this daemon.
    ///
    /// # Errors
    /// [`Failure::SessionsOff`].
    pub fn sessions(&self) -> Result<&Sessions, Failure> {
        self.sessions.as_ref().ok_or(Failure::SessionsOff)
    }

    /// Makes a session for `model`. Waits for the disk: not for threads that must not wait.
    ///
    /// # Errors
    /// The model's; a limit, or the disk.
    pub fn create_session(&self, owner: Owner, model: &str, wishes: Change) -> Result<SessionSummary, Failure> {
        let sessions = self.sessions()?;
        let name = self.slot(model)?.1.name.clone();
        sessions.create(owner, name, &*self.model(model)?, wishes)
    }

    /// Journals a turn of a session and makes a request of it: `chat` has what is new. Waits for the disk: not for
    /// threads that must not wait.
    ///
    /// # Errors
    /// The session's or the model's; [`Failure::SessionCut`] when [`Service::resume_turn`] is to come first.
    pub fn begin_turn(
        &self,
        owner: Owner,
        id: SessionId,
        chat: ChatRequest,
        wishes: &Wishes,
    ) -> Result<Generate, Failure> {
        let (session, Held { model, lease }) = self.open_session(owner, id)?;
        if session.is_cut() {
            return Err(Failure::SessionCut { id: id.to_string() });
        }
        let name = session.model().to_owned();
        let grammar = wishes.compiled(&model)?;
        let (prompt, turn) = session.begin(&model, chat, wishes)?;
        Ok(with(name, prompt, turn, Generate { grammar, lease: Some(lease), ..wishes.request(owner) }))
    }

    /// Goes on with the last answer of a session, which was cut: all of it is sent, from its first token on. Waits for
    /// the disk: not for threads that must not wait.
    ///
    /// # Errors
    /// The session's or the model's; the last answer was not cut. One that would fail again is ended with what it has
    /// said.
    pub fn resume_turn(&self, owner: Owner, id: SessionId) -> Result<Generate, Failure> {
        let (session, Held { model, lease }) = self.open_session(owner, id)?;
        let name = session.model().to_owned();
        let request = session.resume(&model)?;
        Ok(Generate { model: name, lease: Some(lease), ..request })
    }

    fn open_session(&self, owner: Owner, id: SessionId) -> Result<(OpenSession, Held), Failure> {
        let session = self.sessions()?.open(owner, id)?;
        let held = self.held_now(session.model())?;
        Ok((session, held))
    }
}

fn with(model: String, prompt: ChatPrompt, turn: Turn, wishes: Generate) -> Generate {
    Generate { model, prompt: prompt.tokens, reading: Some(prompt.reading), turn: Some(turn), ..wishes }
}
