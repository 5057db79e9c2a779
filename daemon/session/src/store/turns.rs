//! What happens in a session, one turn after the other?

use super::{Store, Summary, check_bytes, find};
use crate::disk::Disk;
use crate::error::{Result, StoreError};
use crate::history::{Outcome, State};
use crate::id::SessionId;
use crate::limits::{MESSAGE_BYTES_MAX, RECORD_TOKENS_MAX, SAMPLING_BYTES_MAX, SESSION_TURNS_MAX};
use crate::record::{Record, Turn};

/// A turn that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewTurn<'a> {
    /// Of the session's tokens, how many the prompt begins with.
    pub keep_tokens: u32,
    /// The prompt's other tokens.
    pub prompt: &'a [u32],
    /// The request, in whatever form the caller reads again.
    pub request: &'a [u8],
    /// The sampling parameters, in whatever form the caller reads again.
    pub sampling: &'a [u8],
}

impl<D: Disk> Store<D> {
    /// A turn begins. One that was cut before it stays as it is.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while the session is answering; a limit; or as [`Store::history`].
    pub fn begin_turn(&mut self, owner: u64, id: SessionId, turn: &NewTurn<'_>, now: u64) -> Result<()> {
        check_bytes("bytes of a request", turn.request.len(), MESSAGE_BYTES_MAX)?;
        check_bytes("bytes of sampling parameters", turn.sampling.len(), SAMPLING_BYTES_MAX)?;
        check_bytes("tokens of a prompt", turn.prompt.len(), RECORD_TOKENS_MAX)?;
        if self.idle(owner, id)?.1 as usize >= SESSION_TURNS_MAX {
            return Err(StoreError::LimitReached { what: "turns of a session", limit: SESSION_TURNS_MAX as u64 });
        }
        let turn = Turn {
            at: now,
            keep_tokens: turn.keep_tokens,
            prompt: turn.prompt.to_vec(),
            request: turn.request.to_vec(),
            sampling: turn.sampling.to_vec(),
        };
        let record = Record::Turn(turn);
        self.check_journals(owner, record.n_bytes())?;
        self.record(owner, id, record)?;
        find(&mut self.sessions, owner, id)?.answering = true;
        Ok(())
    }

    /// Counts a try to go on with the last turn that nobody has asked for; answers how many there were since its last
    /// token came, this one included. Those before have ended with their process.
    ///
    /// # Errors
    /// As [`Store::history`].
    pub fn note_try(&mut self, owner: u64, id: SessionId) -> Result<u32> {
        let session = find(&mut self.sessions, owner, id)?;
        let Summary { n_turns, n_tokens, .. } = session.summary();
        Ok(session.folder.note_try(&mut self.disk, n_turns, n_tokens)?)
    }

    /// What [`Store::note_try`] has counted last was none: its process is still there.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the disk.
    pub fn forget_try(&mut self, owner: u64, id: SessionId) -> Result<()> {
        Ok(find(&mut self.sessions, owner, id)?.folder.forget_try(&mut self.disk)?)
    }

    /// A turn that was cut, or cancelled, goes on: more of its tokens come. Until they do, it is what it was.
    ///
    /// # Errors
    /// [`StoreError::Busy`] unless its last turn may go on, or as [`Store::history`].
    pub fn resume_turn(&mut self, owner: u64, id: SessionId) -> Result<()> {
        let may_go_on = self.history(owner, id)?.may_go_on();
        self.idle(owner, id)?;
        if !may_go_on {
            return Err(StoreError::Busy("idle"));
        }
        find(&mut self.sessions, owner, id)?.answering = true;
        Ok(())
    }

    /// Tokens of the turn that is being answered. They may be sent after the next flush that has written the session.
    ///
    /// # Errors
    /// [`StoreError::Busy`] unless the session is answering, or a limit.
    pub fn append_tokens(&mut self, owner: u64, id: SessionId, tokens: &[u32]) -> Result<()> {
        check_bytes("tokens at once", tokens.len(), RECORD_TOKENS_MAX)?;
        self.answering(owner, id)?;
        if tokens.is_empty() { Ok(()) } else { self.record(owner, id, Record::Tokens(tokens.to_vec())) }
    }

    /// The turn that is being answered ends.
    ///
    /// # Errors
    /// [`StoreError::Busy`] unless the session is answering, or a limit.
    pub fn end_turn(&mut self, owner: u64, id: SessionId, outcome: Outcome, answer: &[u8], now: u64) -> Result<()> {
        check_bytes("bytes of an answer", answer.len(), MESSAGE_BYTES_MAX)?;
        self.answering(owner, id)?;
        self.record(owner, id, Record::End { at: now, outcome, answer: answer.to_vec() })?;
        find(&mut self.sessions, owner, id)?.answering = false;
        Ok(())
    }

    /// Forgets all turns but the first `n_turns`. Answers how many tokens stay valid: those of the last turn's end that
    /// no later turn had replaced.
    ///
    /// # Errors
    /// [`StoreError::Busy`] while the session is answering, fewer turns than that, or as [`Store::history`].
    pub fn truncate(&mut self, owner: u64, id: SessionId, n_turns: u32) -> Result<u32> {
        self.idle(owner, id)?;
        let n_tokens = self.history(owner, id)?.tokens_after(n_turns as usize);
        let n_tokens = u32::try_from(n_tokens).expect("SESSION_TOKENS_MAX is below 2^32");
        self.record(owner, id, Record::Truncate { n_turns, n_tokens })?;
        Ok(n_tokens)
    }

    /// That a session is not being answered: its state and turns.
    pub(super) fn idle(&self, owner: u64, id: SessionId) -> Result<(State, u32)> {
        let summary = self.summary(owner, id)?;
        match summary.state {
            State::Answering => Err(StoreError::Busy("answering")),
            state => Ok((state, summary.n_turns)),
        }
    }

    fn answering(&mut self, owner: u64, id: SessionId) -> Result<()> {
        if find(&mut self.sessions, owner, id)?.answering { Ok(()) } else { Err(StoreError::Busy("not answering")) }
    }
}
