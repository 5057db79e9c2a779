//! How does a turn of a session begin, or go on?

use super::asks::{Ask, Asks};
use super::conversation::{Conversation, Cut};
use super::wishes::{AnswerParts, Asked, Wishes};
use super::{CutTurn, ask, count};
use crate::ChatRequest;
use crate::api::{ChatPrompt, Failure, Generate, Owner, Reading, Turn};
use crate::sequence::retold;
use crate::service::ServedModel;
use sparsed_session::{NewTurn, SessionId};

/// A session that nobody else may use until this is dropped, or its turn has ended.
#[derive(Debug)]
pub(crate) struct OpenSession {
    asks: Asks,
    owner: Owner,
    id: SessionId,
    conversation: Conversation,
    is_begun: bool,
}

impl OpenSession {
    /// A session that is taken.
    pub(super) fn new(asks: Asks, owner: Owner, id: SessionId, conversation: Conversation) -> Self {
        Self { asks, owner, id, conversation, is_begun: false }
    }

    /// The name of its model.
    pub(crate) fn model(&self) -> &str {
        &self.conversation.model
    }

    /// Whether the daemon has cut the last answer.
    pub(crate) fn is_cut(&self) -> bool {
        self.conversation.cut.as_ref().is_some_and(|cut| cut.cancelled.is_none())
    }

    /// Journals a turn that asks `chat`; answers its prompt and how it is recorded.
    pub(crate) fn begin(
        mut self,
        model: &ServedModel,
        chat: ChatRequest,
        wishes: &Wishes,
    ) -> Result<(ChatPrompt, Turn), Failure> {
        self.check(model)?;
        let (prompt, n_left_out) = self.conversation.prompt(model, &chat, wishes.max_tokens)?;
        model.check_prompt(&prompt.tokens, true)?;
        let n_kept = common(&self.conversation.tokens, &prompt.tokens);
        let at_turn = wishes.at_turn;
        let wishes = Wishes { weights: Some(model.weights), ..wishes.clone() };
        let (request, sampling) = Asked { chat, wishes, n_left_out }.encode();
        let (owner, id, shape) = (self.owner.number(), self.id, model.images);
        let (n_kept, new) = (count(n_kept), prompt.tokens[n_kept..].to_vec());
        let turn = ask(&self.asks, move |keeper| {
            keeper.check_next(owner, id, at_turn)?;
            let turn = NewTurn { keep_tokens: n_kept, prompt: &new, request: &request, sampling: &sampling };
            keeper.begin(owner, id, &shape, &turn)
        })?;
        self.is_begun = true;
        Ok((prompt, turn))
    }

    /// Goes on with the turn that was cut; answers it as a request, without model and lease. One that cannot be asked
    /// again as it was is ended with what it has said: the next turn would wait for it for ever.
    pub(crate) fn resume(mut self, model: &ServedModel) -> Result<Generate, Failure> {
        self.check(model)?;
        let none = || Failure::SessionBusy { id: self.id.to_string(), state: "idle: its last answer was not cut" };
        let cut = self.conversation.cut.take().ok_or_else(none)?;
        let reading = self.conversation.reading(model, &cut.asked);
        let request = again(self.owner, model, &cut, &reading);
        let said = cut.cancelled.clone().unwrap_or_else(|| self.said(model, &cut, reading.ok()));
        let (owner, id, shape) = (self.owner.number(), self.id, model.images);
        let request = match request {
            Err(failure) if !failure.may_pass() && cut.cancelled.is_none() => {
                ask(&self.asks, move |keeper| keeper.give_up(owner, id, &said))?;
                return Err(failure);
            }
            request => request?,
        };
        let (n_prompt, is_cancelled) = (count(cut.prompt.len()), cut.cancelled.is_some());
        let cut = CutTurn { n_prompt, answered: cut.answered, said, is_cancelled };
        let turn = ask(&self.asks, move |keeper| keeper.resume(owner, id, &shape, cut))?;
        self.is_begun = true;
        Ok(Generate { turn: Some(turn), ..request })
    }

    /// The message of an answer that the daemon has cut: it has journaled its tokens only.
    fn said(&self, model: &ServedModel, cut: &Cut, reading: Option<Reading>) -> Vec<u8> {
        let request = cut.asked.wishes.request(self.owner);
        let mut parts = AnswerParts::default();
        let said = retold(&cut.answered, cut.prompt.len(), &request, reading, model.model.tokenizer());
        said.iter().for_each(|event| parts.hear(event));
        parts.encode()
    }

    fn check(&self, model: &ServedModel) -> Result<(), Failure> {
        if model.vocabularies.contains(&self.conversation.fingerprint) {
            return Ok(());
        }
        Err(Failure::SessionOfOtherModel { id: self.id.to_string(), model: self.conversation.model.clone() })
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        if !self.is_begun {
            self.asks.tell(Ask::Close { owner: self.owner.number(), id: self.id });
        }
    }
}

/// The request of a turn that was cut, without model, lease and turn. The file may be an imported one, which says what
/// it likes; the model may be another one, or have another context now.
fn again(
    owner: Owner,
    model: &ServedModel,
    cut: &Cut,
    reading: &Result<Reading, Failure>,
) -> Result<Generate, Failure> {
    cut.asked.wishes.check_weights(model.weights)?;
    model.check_tokens("session", &cut.answered)?;
    let reading = reading.clone()?;
    let wishes = cut.asked.wishes.clone().checked()?;
    let grammar = wishes.compiled(model)?;
    let prompt = cut.prompt.clone();
    let request = Generate { prompt, reading: Some(reading), grammar, ..wishes.request(owner) };
    model.check(&request, true)?;
    Ok(request)
}

/// Tokens that two sequences begin with alike.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
