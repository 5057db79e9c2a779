//! What is journaled of a request? All that its answer depends on, so that a cut answer can go on in another process.

use crate::api::{CacheSalt, Event, Failure, FinishReason, Generate, Owner, Urgency};
use crate::{ChatMessage, ChatRequest, Grammar, GrammarSpec, Role, Sampling, ServedModel, checked_stops};
use serde::{Deserialize, Serialize};
use sparsed_model::ToolCall;
use sparsed_session::{Outcome, TurnHistory};

/// How an answer is wished for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Wishes {
    /// Most tokens of the answer; `None`: as many as the context has room for.
    pub max_tokens: Option<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What the answer must be.
    pub grammar: Option<GrammarSpec>,
    /// The client's field that says so; a turn that goes on after a cut has forgotten it.
    #[serde(skip)]
    pub form: Option<&'static str>,
    /// Texts that end the answer; they are not part of it.
    pub stops: Vec<String>,
    /// Go on past end tokens.
    pub ignore_end: bool,
    /// The answer ends with its first call.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub one_call: bool,
    /// Whether it is wanted although nobody waits for it: once cut by the daemon's end, it goes on by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_background: bool,
    /// With whom its rows are shared: an answer that goes on in another process must not share more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<CacheSalt>,
    /// The weights that the answer was begun with, since there are journals that say so: others would not go on with
    /// it, but with one of their own. The session says it, whatever the request does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<[u8; 32]>,
    /// The number of the turn that it must be, from 0: it goes on from what was said so far, and from nothing else.
    #[serde(skip)]
    pub at_turn: Option<u32>,
    /// When it is to begin; no part of what the answer depends on.
    #[serde(skip)]
    pub urgency: Urgency,
    /// Whether its listener wants to hear how far it is; a turn that goes on after a cut has another listener.
    #[serde(skip)]
    pub progress: bool,
}

impl Wishes {
    /// Themselves, if a request may have them: those of an imported session come from a file.
    pub(super) fn checked(self) -> Result<Self, Failure> {
        Ok(Self { sampling: self.sampling.checked()?, stops: checked_stops(self.stops)?, ..self })
    }

    /// That an answer which goes on is of these weights, as far as is known.
    ///
    /// # Errors
    /// [`Failure::InvalidRequest`], which does not pass.
    pub(super) fn check_weights(&self, weights: [u8; 32]) -> Result<(), Failure> {
        if self.weights.is_none_or(|begun_with| begun_with == weights) {
            return Ok(());
        }
        let reason = "has a last answer that another model had begun under this name, which cannot go on: it stays as far \
                      as it is, and the next message begins a new one";
        Err(Failure::invalid("session", reason))
    }

    /// The compiled grammar, if there is one. Takes its time.
    ///
    /// # Errors
    /// What is wrong with it, by the name that the client knows.
    pub fn compiled(&self, model: &ServedModel) -> Result<Option<Grammar>, Failure> {
        let made = self.grammar.clone().map(|spec| model.grammar(spec)).transpose();
        made.map_err(|failure| match (failure, self.form) {
            // Of a call that is enforced, or stands beside a form, the tools may be at fault.
            (Failure::InvalidRequest { param, reason }, Some(form)) if param != "tools" => {
                Failure::invalid(form, reason)
            }
            (failure, _) => failure,
        })
    }

    /// A request with these wishes, without model, prompt and grammar.
    pub fn request(&self, owner: Owner) -> Generate {
        Generate {
            model: String::new(),
            owner,
            prompt: Vec::new(),
            max_tokens: self.max_tokens,
            sampling: self.sampling.clone(),
            grammar: None,
            stops: self.stops.clone(),
            ignore_end: self.ignore_end,
            one_call: self.one_call,
            reading: None,
            logprobs: None,
            progress: self.progress,
            urgency: self.urgency,
            cache_salt: self.cache_salt,
            turn: None,
            lease: None,
        }
    }
}

/// A turn as the journal has it.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// What was new in this turn, with tools and wishes for the template.
    pub(super) chat: ChatRequest,
    pub(super) wishes: Wishes,
    /// Turns that its prompt leaves out, the oldest ones.
    pub(super) n_left_out: u32,
}

impl Asked {
    /// The two texts of the journal's record.
    pub(super) fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        (json(&self.chat), json(&(&self.wishes, self.n_left_out)))
    }

    /// Reads the journal's record.
    ///
    /// # Errors
    /// [`Failure::SessionDamaged`] for a record of another version.
    pub(super) fn decode(request: &[u8], sampling: &[u8]) -> Result<Self, Failure> {
        let (wishes, n_left_out) = read(sampling, "sampling parameters")?;
        Ok(Self { chat: read(request, "a request")?, wishes, n_left_out })
    }
}

/// Makes a copied turn one that goes on when somebody asks: who wanted its answer in the background has the first one.
pub(super) fn foreground(turn: &mut TurnHistory) {
    if !matches!(turn.outcome, None | Some(Outcome::Interrupted)) {
        return;
    }
    // One that cannot be read does not go on at all.
    let Ok(asked) = Asked::decode(&turn.request, &turn.sampling) else { return };
    if asked.wishes.in_background {
        let wishes = Wishes { in_background: false, ..asked.wishes };
        (_, turn.sampling) = Asked { wishes, ..asked }.encode();
    }
}

/// The answer as a message, put together from its events.
#[derive(Debug, Default)]
pub(super) struct AnswerParts {
    content: String,
    reasoning: String,
    calls: Vec<ToolCall>,
    /// Why it has ended, if it has.
    reason: Option<FinishReason>,
}

/// An answer as the journal has it: the message, and beside its members why it ended. Who reads the message alone does
/// not see that; of answers that earlier versions have written, and of those that were cut, nothing is known.
#[derive(Serialize)]
struct Ended<'a> {
    #[serde(flatten)]
    message: &'a ChatMessage,
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<FinishReason>,
}

impl AnswerParts {
    /// Takes what its listener hears.
    pub(super) fn hear(&mut self, event: &Event) {
        match event {
            Event::Delta { text, .. } => self.content += text,
            Event::Reasoning { text } => self.reasoning += text,
            Event::ToolCall { id, name, arguments, .. } => {
                let [id, name, arguments] = [id, name, arguments].map(String::clone);
                self.calls.push(ToolCall { id, name, arguments });
            }
            Event::Finished(finished) => self.reason = Some(finished.reason),
            _ => {}
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let some = |text: &String| (!text.is_empty()).then(|| text.clone());
        let content = some(&self.content).or_else(|| self.calls.is_empty().then(String::new));
        let message = ChatMessage::new(Role::Assistant, "");
        let message = ChatMessage {
            content,
            reasoning_content: some(&self.reasoning),
            tool_calls: self.calls.clone(),
            ..message
        };
        json(&Ended { message: &message, finish_reason: self.reason })
    }
}

/// The answer of an earlier turn.
///
/// # Errors
/// [`Failure::SessionDamaged`] for a record of another version.
pub(super) fn answer(bytes: &[u8]) -> Result<ChatMessage, Failure> {
    read(bytes, "an answer")
}

/// Why the answer of an earlier turn ended, where the journal says so in words that are known here.
pub(super) fn finish_reason(bytes: &[u8]) -> Option<FinishReason> {
    #[derive(Deserialize)]
    struct Reason {
        finish_reason: Option<FinishReason>,
    }
    serde_json::from_slice::<Reason>(bytes).ok()?.finish_reason
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("maps have strings as keys, and nothing writes itself wrongly")
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, Failure> {
    serde_json::from_slice(bytes)
        .map_err(|error| Failure::SessionDamaged { reason: format!("{what} cannot be read: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Finished, Timings, Usage};

    #[test]
    fn an_answer_says_why_it_ended_and_is_read_with_and_without_that() {
        let delta = Event::Delta { text: "Ho".to_owned(), tokens: Vec::new() };
        for reason in [FinishReason::Stop, FinishReason::Length, FinishReason::ToolCalls] {
            let mut parts = AnswerParts::default();
            parts.hear(&delta);
            let cut = parts.encode();
            let (usage, timings) = (Usage::default(), Timings::default());
            parts.hear(&Event::Finished(Finished { reason, stopped_by: None, usage, timings }));
            let whole = parts.encode();
            assert_eq!((finish_reason(&cut), finish_reason(&whole)), (None, Some(reason)));
            let message = ChatMessage::new(Role::Assistant, "Ho");
            assert_eq!(cut, json(&message), "as journals were before");
            assert_eq!([answer(&cut), answer(&whole)], [Ok(message.clone()), Ok(message)]);
        }
        let newer = br#"{ "role": "assistant", "content": "Ho", "finish_reason": "bored" }"#;
        assert_eq!((finish_reason(newer), answer(newer).is_ok()), (None, true));
    }

    #[test]
    fn an_answer_goes_on_with_the_weights_that_have_begun_it_and_with_any_where_nobody_has_noted_them() {
        let asked = |weights| Asked {
            chat: ChatRequest::default(),
            wishes: Wishes { weights, ..Wishes::default() },
            n_left_out: 3,
        };
        let read = |weights| {
            let (request, sampling) = asked(weights).encode();
            Asked::decode(&request, &sampling).unwrap().wishes
        };
        assert_eq!(read(Some([7; 32])).check_weights([7; 32]), Ok(()));
        assert!(read(Some([7; 32])).check_weights([8; 32]).is_err_and(|failure| !failure.may_pass()));
        let (_, old) = asked(None).encode();
        assert!(!String::from_utf8(old).unwrap().contains("weights"), "as journals were before");
        assert_eq!(read(None).check_weights([8; 32]), Ok(()));
    }
}
