//! What can a surface ask, and what does it hear? The vocabulary of answers between surfaces and engine.
//!
//! A surface hands a [`Request`] and a [`Sink`] to [`Service::submit`](crate::Service::submit): a [`Generate`] for this
//! box's devices, or a [`Relay`] for an engine elsewhere. The sink then hears [`Event`]s: [`Event::Queued`], any number
//! of pieces of the answer, then exactly one [`Event::Finished`] or [`Event::Failed`] (which may also come first),
//! unless the listener goes away, which cancels the request. What has one reply (sessions, tokens, leases, status) is a
//! method of [`Service`](crate::Service); whatever fails, fails with a [`Failure`].

mod failure;
mod relay;

pub use crate::likelihood::{ALTERNATIVES_MAX, Likelihood, TokenLogprob};
pub use failure::Failure;
pub use relay::{Calling, Reach, Relay, RelayPrompt, Request, Upstream, UpstreamModel, UpstreamStatus};

use crate::service::Lease;
use crate::sessions::{Recorder, SessionId};
use crate::{Grammar, Sampling};
use sha2::{Digest, Sha256};
use sparsed_kv::FileId;
use sparsed_model::OutputParser;

/// A request for an answer.
#[derive(Debug)]
pub struct Generate {
    /// The configured model's name.
    pub model: String,
    /// Who asks.
    pub owner: Owner,
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer; `None`: as many as the context has room for.
    pub max_tokens: Option<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What the answer must be; it ends when it is that and nothing can follow.
    pub grammar: Option<Grammar>,
    /// Texts that end the answer; they are not part of it.
    pub stops: Vec<String>,
    /// Go on past end tokens, for benchmarks.
    pub ignore_end: bool,
    /// The answer ends with its first call.
    pub one_call: bool,
    /// How reasoning and calls are told from content; `None`: all text is content.
    pub reading: Option<Reading>,
    /// Say how likely each token was, and so many others (at most [`ALTERNATIVES_MAX`]) in its place.
    pub logprobs: Option<u32>,
    /// Say how far it is, see [`Event::Progress`].
    pub progress: bool,
    /// When it is to begin.
    pub urgency: Urgency,
    /// Its rows are shared with the owner's requests that have the same only.
    pub cache_salt: Option<CacheSalt>,
    /// The turn of a session that this is; `None` leaves nothing on disk.
    pub turn: Option<Turn>,
    /// Keeps the model in memory until the request has ended; the service takes one where there is none.
    pub lease: Option<Lease>,
}

impl Generate {
    /// The same request for another answer: with the seed that comes `nth` after this one's, and without the session.
    #[must_use]
    pub fn sibling(&self, nth: u32) -> Self {
        Self {
            model: self.model.clone(),
            owner: self.owner,
            prompt: self.prompt.clone(),
            max_tokens: self.max_tokens,
            sampling: self.sampling.reseeded(nth),
            grammar: self.grammar.clone(),
            stops: self.stops.clone(),
            ignore_end: self.ignore_end,
            one_call: self.one_call,
            reading: self.reading.clone(),
            logprobs: self.logprobs,
            progress: self.progress,
            urgency: self.urgency,
            cache_salt: self.cache_salt,
            turn: None,
            lease: self.lease.clone(),
        }
    }

    /// The session whose turn it is, if it is one of a session.
    pub fn session(&self) -> Option<SessionId> {
        self.turn.as_ref()?.recorder.as_ref().map(Recorder::session)
    }
}

/// When a request is to begin, as far as others leave it the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Urgency {
    /// Of one owner's requests those with a lower number begin earlier; -1000 to 1000.
    pub priority: i32,
    /// Milliseconds from its arrival after which it need not begin any more.
    pub deadline_ms: Option<u64>,
}

/// What an app that serves several people says of each (vLLM's `cache_salt`), so that none of them can find out by
/// timing what another one has said: a digest, since the text may be a secret.
#[derive(Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CacheSalt([u8; 32]);

/// Longest salt in characters.
const SALT_CHARS_MAX: usize = 256;

impl std::fmt::Debug for CacheSalt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CacheSalt") // logs are no place for it
    }
}

impl CacheSalt {
    /// The salt that is this text.
    ///
    /// # Errors
    /// [`Failure::InvalidRequest`] for `cache_salt`, where it is empty or too long.
    pub fn checked(text: &str) -> Result<Self, Failure> {
        match text.chars().count() {
            1..=SALT_CHARS_MAX => Ok(Self(Sha256::digest(text).into())),
            n => Err(Failure::invalid("cache_salt", format!("has {n} characters, must have 1 to {SALT_CHARS_MAX}"))),
        }
    }

    /// As an engine elsewhere may hear it, for which all owners of this box are one.
    pub fn relayed(self, owner: Owner) -> String {
        let digest = Sha256::new().chain_update(owner.number().to_le_bytes()).chain_update(self.0).finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn bytes(self) -> [u8; 32] {
        self.0
    }
}

/// A session's turn, as the engine must know it.
#[derive(Debug)]
pub struct Turn {
    /// Where the blocks of the session are saved.
    pub(crate) file: FileId,
    /// Blocks from the beginning of the prompt on that are there already, as far as is known.
    pub(crate) n_saved: u32,
    /// The answer's tokens so far, of a turn that was cut: their events come again, and the answer goes on from there.
    pub(crate) resumed: Vec<u32>,
    /// Makes the way of the answer lead through the journal.
    pub(crate) recorder: Option<Recorder>,
}

/// Who asks. Different owners share nothing, not even time saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A user of this box.
    Uid(u32),
    /// Somebody whom a door knows by a name, see [`Owner::named`].
    Named(NameDigest),
}

/// Stands for a name; no user's id is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameDigest(u64);

/// Set in every [`NameDigest`]; users' ids have 32 bits.
const NAMED: u64 = 1 << 63;

impl Owner {
    /// The client that `door` knows as `name`. To be taken for another one, a client would need a name with the same 63
    /// bits of SHA-256.
    pub fn named(door: &str, name: &str) -> Self {
        let digest = Sha256::new().chain_update(door).chain_update([0]).chain_update(name).finalize();
        let mut head = [0; 8];
        head.copy_from_slice(&digest[..8]);
        Self::Named(NameDigest(u64::from_le_bytes(head) | NAMED))
    }

    /// Whose [`number`](Self::number) this is; nobody's is none of those.
    pub(crate) fn numbered(number: u64) -> Option<Self> {
        match u32::try_from(number) {
            Ok(uid) => Some(Self::Uid(uid)),
            Err(_) => (number & NAMED != 0).then_some(Self::Named(NameDigest(number))),
        }
    }

    /// Different for different owners.
    pub fn number(self) -> u64 {
        match self {
            Self::Uid(uid) => u64::from(uid),
            Self::Named(NameDigest(number)) => number,
        }
    }
}

/// A conversation as tokens, and how its answer is read.
#[derive(Clone, Debug)]
pub struct ChatPrompt {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// For [`Generate::reading`].
    pub reading: Reading,
}

/// How the answer to a conversation is read.
#[derive(Clone, Debug)]
pub struct Reading {
    pub(crate) parser: OutputParser,
    /// Control tokens whose names the parser looks for.
    pub(crate) visible: Vec<u32>,
}

/// What a request hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request is taken.
    Queued {
        /// Requests of the same model that wait before it.
        ahead: u32,
    },
    /// A token of a session's answer was chosen; what its text makes follows.
    Sampled {
        /// The token.
        token: u32,
    },
    /// How far the request is, where that was asked for: before the first token of the prompt is read, after each step
    /// that reads some, and before the text of each token of the answer.
    Progress(Progress),
    /// How likely the token was whose text follows; comes before it, for each token but an end token.
    Likelihood(Box<Likelihood>),
    /// The answer goes on.
    Delta {
        /// Whole characters; empty when a token's text is held back, or the model has no tokenizer.
        text: String,
        /// The tokens behind it.
        tokens: Vec<u32>,
    },
    /// The model's reasoning goes on.
    Reasoning {
        /// Whole characters.
        text: String,
    },
    /// The model calls a function.
    ToolCall {
        /// Counts the calls of the answer from 0.
        index: u32,
        /// Names the call; what it results in is told by it. The same in the session's history.
        id: String,
        /// The function; need not be one that was offered.
        name: String,
        /// A JSON object; of a call that `max_tokens` or the end of the context has cut, what is there of one.
        arguments: String,
    },
    /// The answer is complete.
    Finished(Finished),
    /// There is no answer, or no more of it.
    Failed(Failure),
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Tokens of the prompt that are read, or whose rows were there.
    pub read_tokens: u32,
    /// Tokens counted so far.
    pub usage: Usage,
    /// Times taken so far; while the prompt is read, `prompt_ms` is the time until now.
    pub timings: Timings,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that was reached, where the engine says which.
    pub stopped_by: Option<String>,
    /// Tokens counted.
    pub usage: Usage,
    /// Times taken.
    pub timings: Timings,
}

/// Why an answer ended. Sessions' journals have it by these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The model ended it after calling functions.
    ToolCalls,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens whose rows an earlier request had left in the KV pool.
    pub cached_tokens: u32,
    /// Of the answer, the end token included.
    pub completion_tokens: u32,
    /// Of these, tokens of reasoning and of the tags around it.
    pub reasoning_tokens: u32,
}

/// Times of a request in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// From submission until the engine took it up.
    pub queue_ms: f64,
    /// From then until the first token.
    pub prompt_ms: f64,
    /// From the first token to the last.
    pub predicted_ms: f64,
}

/// Where a request's events go. Never blocks.
pub trait Sink: Send {
    /// Takes an event.
    ///
    /// # Errors
    /// [`Refused::Full`] gives the event back: the listener is slow; [`Refused::Behind`]: the way to it is.
    /// [`Refused::Closed`]: it is gone.
    fn offer(&mut self, event: Event) -> Result<(), Refused>;

    /// Whether the listener is gone.
    fn is_closed(&self) -> bool;
}

/// Why a sink took nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// No room now, for the listener has not read; the event is given back.
    Full(Event),
    /// No room now, for what comes before it is still on its way; the event is given back. Whether the listener reads
    /// nobody has looked since the last time.
    Behind(Event),
    /// No listener any more.
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_salt_is_short_and_says_nothing_of_its_text_and_another_engine_hears_one_for_each_owner() {
        let salt = CacheSalt::checked("Grüße").unwrap();
        assert_eq!((salt, format!("{salt:?}").as_str()), (CacheSalt::checked("Grüße").unwrap(), "CacheSalt"));
        assert_ne!(salt, CacheSalt::checked("Grüße ").unwrap());
        assert!(CacheSalt::checked("").is_err() && CacheSalt::checked(&"ü".repeat(257)).is_err());
        assert!(CacheSalt::checked(&"ü".repeat(256)).is_ok());
        let told = salt.relayed(Owner::Uid(1));
        assert!(told.len() == 64 && told != salt.relayed(Owner::Uid(2)), "{told}");
    }

    #[test]
    fn a_named_client_is_neither_a_user_nor_another_doors_client() {
        let owner = Owner::named("mqtt", "lamp");
        assert_eq!(owner, Owner::named("mqtt", "lamp"));
        assert_ne!(owner, Owner::named("mqtt", "lamp2"));
        assert_ne!(owner, Owner::named("mqt", "tlamp"));
        assert!(owner.number() > u64::from(u32::MAX) && Owner::Uid(u32::MAX).number() <= u64::from(u32::MAX));
        for owner in [owner, Owner::Uid(0), Owner::Uid(u32::MAX)] {
            assert_eq!(Owner::numbered(owner.number()), Some(owner));
        }
        assert_eq!(Owner::numbered(1 << 32), None);
    }
}
