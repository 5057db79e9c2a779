//! What was said in a session, as messages, and which of it still fits the context?

use super::wishes::{Asked, Wishes, answer, finish_reason};
use crate::api::{ChatPrompt, Failure, FinishReason, Reading};
use crate::service::ServedModel;
use crate::{ChatMessage, ChatRequest, Role};
use sparsed_session::{ContextFull, History, Outcome, TurnHistory};

/// A session's turns.
#[derive(Debug)]
pub(super) struct Conversation {
    turns: Vec<Said>,
    /// What a later turn may begin with.
    pub(super) tokens: Vec<u32>,
    pub(super) context_full: ContextFull,
    /// The model's name.
    pub(super) model: String,
    pub(super) fingerprint: [u8; 32],
    /// Of the last turn, if its answer was cut.
    pub(super) cut: Option<Cut>,
}

/// One turn, as its owner may look at it.
#[derive(Clone, Debug)]
pub struct SaidTurn {
    /// When it began, seconds since 1970.
    pub at: u64,
    /// What was new in it.
    pub messages: Vec<ChatMessage>,
    /// What was answered; of an answer that was cut and is to be finished, nothing.
    pub answer: Option<ChatMessage>,
    /// How it ended.
    pub end: TurnEnd,
    /// Why the answer ended; of one that an earlier version has journaled that is not known.
    pub reason: Option<FinishReason>,
    /// Tokens of its prompt, the conversation before it included.
    pub prompt_tokens: u32,
    /// Tokens of its answer so far.
    pub answer_tokens: u32,
    /// Most tokens of its answer.
    pub max_tokens: Option<u32>,
    /// Whether it is wanted although nobody waits for it.
    pub in_background: bool,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnEnd {
    /// It is being answered.
    Running,
    /// The answer is complete.
    Complete,
    /// Its client went away.
    Cancelled,
    /// It could not be answered.
    Failed,
    /// The daemon has cut it; it is to be finished.
    Cut,
}

impl SaidTurn {
    /// All turns of a session.
    ///
    /// # Errors
    /// [`Failure::SessionDamaged`] for records of another version.
    pub(super) fn all(history: &History, is_answering: bool) -> Result<Vec<Self>, Failure> {
        let last = history.turns.len().saturating_sub(1);
        let turns = history.turns.iter().enumerate().map(|(at, turn)| Self::of(turn, is_answering && at == last));
        turns.collect()
    }

    fn of(turn: &TurnHistory, is_running: bool) -> Result<Self, Failure> {
        let asked = Asked::decode(&turn.request, &turn.sampling)?;
        let end = match turn.outcome {
            _ if is_running => TurnEnd::Running,
            Some(Outcome::Complete) => TurnEnd::Complete,
            Some(Outcome::Cancelled) => TurnEnd::Cancelled,
            Some(Outcome::Failed) => TurnEnd::Failed,
            None | Some(Outcome::Interrupted) => TurnEnd::Cut,
        };
        let Wishes { max_tokens, in_background, .. } = asked.wishes;
        let Said { messages, answer, .. } = Said::of(turn)?;
        let reason = finish_reason(&turn.answer);
        let (prompt_tokens, answer_tokens) = (turn.prompt_end, turn.end_token.saturating_sub(turn.prompt_end));
        Ok(Self { at: turn.at, messages, answer, end, reason, prompt_tokens, answer_tokens, max_tokens, in_background })
    }
}

/// One turn's messages.
#[derive(Clone, Debug)]
struct Said {
    messages: Vec<ChatMessage>,
    answer: Option<ChatMessage>,
    /// Turns that this one has left out of its prompt.
    n_left_out: u32,
}

/// A turn whose answer was cut.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    pub(super) asked: Asked,
    /// Tokens of its prompt.
    pub(super) prompt: Vec<u32>,
    /// Tokens of its answer so far.
    pub(super) answered: Vec<u32>,
    /// What it had said when its client went away; otherwise the daemon did, and the turn is finished before another
    /// one begins.
    pub(super) cancelled: Option<Vec<u8>>,
}

impl Conversation {
    /// # Errors
    /// [`Failure::SessionDamaged`] for records of another version.
    pub(super) fn of(history: &History) -> Result<Self, Failure> {
        let turns = history.turns.iter().map(Said::of).collect::<Result<_, _>>()?;
        let cut = match history.turns.last() {
            Some(turn) if is_cut(turn) && turn.end_token as usize == history.tokens.len() => {
                Some(Cut::of(turn, &history.tokens)?)
            }
            _ => None,
        };
        Ok(Self {
            turns,
            tokens: history.tokens.clone(),
            context_full: history.settings.context_full,
            model: history.model.clone(),
            fingerprint: history.fingerprint,
            cut,
        })
    }

    /// All messages, as a client that keeps the conversation itself would send them.
    pub(super) fn messages(&self) -> Vec<ChatMessage> {
        self.turns.iter().flat_map(Said::all).cloned().collect()
    }

    /// The prompt of another turn that asks `chat`, and how many of the oldest turns it leaves out.
    ///
    /// # Errors
    /// The model's; [`Failure::ContextTooLong`] where the session does not want anything left out, or that is not
    /// enough.
    pub(super) fn prompt(
        &self,
        model: &ServedModel,
        chat: &ChatRequest,
        max_tokens: Option<u32>,
    ) -> Result<(ChatPrompt, u32), Failure> {
        let n_left_out = self.turns.last().map_or(0, |turn| turn.n_left_out);
        let prompt = model.chat_prompt(&self.request(chat, n_left_out));
        // Room for the answer, and for some turns more: each time something is left out, the rest is read again.
        let answer = max_tokens.unwrap_or(model.max_context / 4).min(model.max_context / 2);
        let wanted = (model.max_context / 2).max(1) as usize;
        let is_enough = |prompt: &ChatPrompt| {
            let n_tokens = prompt.tokens.len();
            n_tokens <= wanted || n_tokens + answer as usize <= model.max_context as usize
        };
        if self.context_full == ContextFull::Error || prompt.as_ref().is_ok_and(is_enough) {
            return Ok((prompt?, n_left_out));
        }
        // Of what cannot be rendered more is left out.
        let fits = |n_left_out| {
            let prompt = model.chat_prompt(&self.request(chat, n_left_out));
            prompt.is_ok_and(|prompt| prompt.tokens.len() <= wanted)
        };
        match fewest(&self.beginnings(chat, n_left_out), fits) {
            Some(fewest) => Ok((model.chat_prompt(&self.request(chat, fewest))?, fewest)),
            None => Ok((prompt?, n_left_out)),
        }
    }

    /// How many turns may be left out, if more than `n_left_out` are to be: what is left begins with what a user says.
    /// The results of calls mean nothing without the calls.
    fn beginnings(&self, chat: &ChatRequest, n_left_out: u32) -> Vec<u32> {
        let turns = self.turns.iter().map(|turn| turn.messages.as_slice()).chain([chat.messages.as_slice()]);
        let numbered = (0..).zip(turns).filter(|(_, messages)| is_users(messages));
        numbered.map(|(at, _)| at).filter(|&at| at > n_left_out).collect()
    }

    /// How the answer to the last turn is read.
    ///
    /// # Errors
    /// The model's.
    pub(super) fn reading(&mut self, model: &ServedModel, last: &Asked) -> Result<Reading, Failure> {
        self.turns.pop();
        Ok(model.chat_prompt(&self.request(&last.chat, last.n_left_out))?.reading)
    }

    /// The whole conversation with `chat` at its end, without the first turns but for what sets the rules.
    fn request(&self, chat: &ChatRequest, n_left_out: u32) -> ChatRequest {
        let (out, kept) = self.turns.split_at((n_left_out as usize).min(self.turns.len()));
        let rules = out.iter().flat_map(Said::all).filter(|m| matches!(m.role, Role::System | Role::Developer));
        let messages = rules.chain(kept.iter().flat_map(Said::all)).chain(&chat.messages).cloned().collect();
        ChatRequest { messages, ..chat.clone() }
    }
}

impl Said {
    fn of(turn: &TurnHistory) -> Result<Self, Failure> {
        let asked = Asked::decode(&turn.request, &turn.sampling)?;
        let answer = if turn.answer.is_empty() || is_cut_by_daemon(turn) { None } else { Some(answer(&turn.answer)?) };
        Ok(Self { messages: asked.chat.messages, answer, n_left_out: asked.n_left_out })
    }

    fn all(&self) -> impl Iterator<Item = &ChatMessage> {
        self.messages.iter().chain(&self.answer)
    }
}

impl Cut {
    fn of(turn: &TurnHistory, tokens: &[u32]) -> Result<Self, Failure> {
        let (prompt, answered) = tokens.split_at((turn.prompt_end as usize).min(tokens.len()));
        Ok(Self {
            asked: Asked::decode(&turn.request, &turn.sampling)?,
            prompt: prompt.to_vec(),
            answered: answered.to_vec(),
            cancelled: (turn.outcome == Some(Outcome::Cancelled)).then(|| turn.answer.clone()),
        })
    }
}

/// Whether messages begin with a user's, beside what sets the rules.
fn is_users(messages: &[ChatMessage]) -> bool {
    let mut said = messages.iter().map(|message| &message.role);
    said.find(|role| !matches!(role, Role::System | Role::Developer)).is_some_and(|role| *role == Role::User)
}

/// The least of `numbers` that fits, where all after one that does do so too; the last one if none does. Each look
/// reads a whole conversation, which may have a thousand turns.
fn fewest(numbers: &[u32], fits: impl Fn(u32) -> bool) -> Option<u32> {
    let at = numbers.partition_point(|&number| !fits(number));
    numbers.get(at).or_else(|| numbers.last()).copied()
}

fn is_cut(turn: &TurnHistory) -> bool {
    is_cut_by_daemon(turn) || turn.outcome == Some(Outcome::Cancelled)
}

fn is_cut_by_daemon(turn: &TurnHistory) -> bool {
    matches!(turn.outcome, None | Some(Outcome::Interrupted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(prompt_end: u32, end_token: u32, n_tokens: u32, outcome: Option<Outcome>) -> History {
        let chat = ChatRequest { messages: vec![ChatMessage::new(Role::User, "Hi")], ..ChatRequest::default() };
        let (request, sampling) = Asked { chat, wishes: Wishes::default(), n_left_out: 0 }.encode();
        let answer = serde_json::to_vec(&ChatMessage::new(Role::Assistant, "Ho")).unwrap();
        let turn = TurnHistory { at: 0, first_token: 0, prompt_end, end_token, request, sampling, outcome, answer };
        History {
            owner: 1,
            created: 0,
            used: 0,
            model: "m".to_owned(),
            fingerprint: [0; 32],
            title: String::new(),
            settings: sparsed_session::Settings::default(),
            pinned: false,
            tokens: (0..n_tokens).collect(),
            turns: vec![turn],
        }
    }

    #[test]
    fn a_cut_answer_goes_on_from_its_tokens() {
        let conversation = Conversation::of(&history(5, 9, 9, Some(Outcome::Cancelled))).unwrap();
        let cut = conversation.cut.as_ref().unwrap();
        assert_eq!((cut.prompt.len(), cut.answered.len(), cut.cancelled.is_some()), (5, 4, true));
        assert_eq!(conversation.messages().len(), 2);
        let conversation = Conversation::of(&history(5, 9, 9, None)).unwrap();
        assert!(conversation.cut.as_ref().unwrap().cancelled.is_none());
        assert_eq!(conversation.messages().len(), 1, "what the daemon has cut is not said yet");
    }

    /// A conversation whose turns begin with these roles.
    fn conversation(roles: &[Role]) -> Conversation {
        let mut conversation = Conversation::of(&history(5, 9, 9, Some(Outcome::Complete))).unwrap();
        let said = |role: &Role| Said {
            messages: vec![ChatMessage::new(Role::System, "Be brief."), ChatMessage::new(*role, "x")],
            answer: None,
            n_left_out: 0,
        };
        conversation.turns = roles.iter().map(said).collect();
        conversation
    }

    #[test]
    fn turns_are_left_out_up_to_one_that_a_user_begins() {
        let conversation = conversation(&[Role::User, Role::Tool, Role::Tool, Role::User, Role::Tool]);
        let says = |role| ChatRequest { messages: vec![ChatMessage::new(role, "y")], ..ChatRequest::default() };
        assert_eq!(conversation.beginnings(&says(Role::User), 0), [3, 5]);
        assert_eq!(conversation.beginnings(&says(Role::User), 3), [5]);
        assert_eq!(conversation.beginnings(&says(Role::Tool), 0), [3], "the call is in the turn before");
        assert_eq!(conversation.beginnings(&says(Role::Tool), 3), [0; 0]);
    }

    #[test]
    fn the_fewest_turns_that_are_enough_are_left_out_or_all_that_may_be() {
        let numbers = [2, 5, 6, 9];
        for (least, expected) in [(0, 2), (3, 5), (6, 6), (9, 9), (10, 9)] {
            assert_eq!(fewest(&numbers, |number| number >= least), Some(expected), "{least}");
        }
        assert_eq!(fewest(&[], |_| true), None);
    }

    #[test]
    fn an_answer_whose_tokens_a_later_turn_has_replaced_does_not_go_on() {
        for n_tokens in [0, 3, 7] {
            for outcome in [None, Some(Outcome::Interrupted), Some(Outcome::Cancelled)] {
                assert!(Conversation::of(&history(5, 9, n_tokens, outcome)).unwrap().cut.is_none());
            }
        }
    }
}
