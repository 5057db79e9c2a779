//! What is another engine asked that computes in this one's place? Texts and wishes instead of tokens; its client
//! stands behind a trait, since it needs a network, which this crate does not know.

use super::{Failure, Generate, Owner, Sink};
use crate::sessions::Recorder;
use crate::{ChatRequest, SessionId, Standing, Stats, Wishes};
use std::sync::Arc;

/// A request by who computes its answer.
#[derive(Debug)]
pub enum Request {
    /// A device of this box.
    Here(Box<Generate>),
    /// An engine elsewhere.
    Elsewhere(Box<Relay>),
}

impl Request {
    /// The configured model's name.
    pub fn model(&self) -> &str {
        match self {
            Self::Here(request) => &request.model,
            Self::Elsewhere(relay) => &relay.model,
        }
    }

    /// Who asks.
    pub fn owner(&self) -> Owner {
        match self {
            Self::Here(request) => request.owner,
            Self::Elsewhere(relay) => relay.owner,
        }
    }

    /// The session whose turn it is, if it is one of a session.
    pub fn session(&self) -> Option<SessionId> {
        match self {
            Self::Here(request) => request.session(),
            Self::Elsewhere(_) => None,
        }
    }

    /// Tells whether its session still has the turn that it is.
    pub fn standing(&self) -> Standing {
        let recorder = match self {
            Self::Here(request) => request.turn.as_ref().and_then(|turn| turn.recorder.as_ref()),
            Self::Elsewhere(_) => None,
        };
        recorder.map(Recorder::standing).unwrap_or_default()
    }
}

impl From<Generate> for Request {
    fn from(request: Generate) -> Self {
        Self::Here(Box::new(request))
    }
}

impl From<Relay> for Request {
    fn from(relay: Relay) -> Self {
        Self::Elsewhere(Box::new(relay))
    }
}

/// A request for an answer that another engine computes.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The configured model's name.
    pub model: String,
    /// Who asks.
    pub owner: Owner,
    /// What the answer follows.
    pub prompt: RelayPrompt,
    /// How the answer is wished for; its grammar is the other engine's business.
    pub wishes: Wishes,
    /// Say how likely each token was, and so many others in its place.
    pub logprobs: Option<u32>,
}

impl Relay {
    /// The same request for another answer: with the seed that comes `nth` after this one's.
    #[must_use]
    pub fn sibling(&self, nth: u32) -> Self {
        let wishes = Wishes { sampling: self.wishes.sampling.reseeded(nth), ..self.wishes.clone() };
        Self { wishes, ..self.clone() }
    }
}

/// What an answer follows.
#[derive(Clone, Debug)]
pub enum RelayPrompt {
    /// A conversation.
    Chat {
        /// All of it, with the functions that may be called.
        chat: Box<ChatRequest>,
        /// Whether one must be.
        calling: Calling,
    },
    /// A text.
    Text(String),
    /// Tokens of the other engine's vocabulary.
    Tokens(Vec<u32>),
}

/// Whether an answer must call a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Calling {
    /// As the model has it.
    Free,
    /// Any of those offered.
    Required,
    /// The one of this name.
    Only(String),
}

/// The client of an engine that serves one configured model.
pub trait Upstream: Send + Sync + std::fmt::Debug {
    /// Whether it can be reached, and what it serves.
    fn status(&self) -> UpstreamStatus;

    /// What has been asked of it.
    fn stats(&self) -> Stats;

    /// Has it answer; events go to `sink` as [`api`](crate::api) says. Never waits.
    ///
    /// # Errors
    /// No room. The sink has heard nothing then.
    fn submit(&self, relay: Relay, sink: Box<dyn Sink>) -> Result<(), Failure>;

    /// Gives up what is under way: it hears [`Failure::ShuttingDown`].
    fn stop(&self);
}

/// A configured model that another engine computes.
#[derive(Clone, Debug)]
pub struct UpstreamModel {
    /// Its name here.
    pub name: String,
    /// Other names that requests may have for it.
    pub aliases: Vec<String>,
    /// Its client.
    pub engine: Arc<dyn Upstream>,
}

/// How an engine elsewhere is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamStatus {
    /// Scheme, host and port; no secrets.
    pub address: String,
    /// The model's name there, once it is known.
    pub model: Option<String>,
    /// Which software it is, as far as it says.
    pub software: &'static str,
    /// Tokens of prompt and answer together, where it is known.
    pub max_context: Option<u32>,
    /// Whether it answers.
    pub reach: Reach,
}

/// Whether an engine elsewhere answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It has not been asked yet.
    Unknown,
    /// It did when it was asked last.
    Up,
    /// It did not, and why.
    Down(String),
}

impl UpstreamStatus {
    /// Whether it answered when it was asked last.
    pub fn is_up(&self) -> bool {
        self.reach == Reach::Up
    }
}
