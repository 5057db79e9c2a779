//! What must a client of another engine be told?

use crate::address::Address;
use rustls::ClientConfig;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// All that is configured of an engine elsewhere.
#[derive(Clone)]
pub struct Options {
    /// The model's name here.
    pub name: String,
    /// Where the engine is.
    pub address: Address,
    /// The model's name there; `None`: the first that it lists.
    pub model: Option<String>,
    /// Who this is to it: a bearer token.
    pub key: Option<Zeroizing<String>>,
    /// How the connection is encrypted; must be there for an `https` address.
    pub tls: Option<Arc<ClientConfig>>,
    /// Tokens of prompt and answer together, where the engine does not say.
    pub max_context: Option<u32>,
    /// How long a connection may take, TLS included.
    pub connect: Duration,
    /// How long the first token may take from when the request was sent.
    pub first_token: Duration,
    /// How long each further token may take.
    pub idle: Duration,
    /// Further attempts before the first token.
    pub retries: u32,
    /// Whether the engine hears of priorities.
    pub priority: bool,
    /// Most requests that are under way there.
    pub running_max: u32,
    /// Most further requests that wait here.
    pub waiting_max: u32,
    /// What of it may change while the client is used.
    pub limits: Limits,
}

/// What a listener may take of an engine elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most requests of one owner, waiting or under way.
    pub per_owner_max: u32,
    /// How long a listener may take nothing.
    pub slow_consumer: Duration,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No secrets.
        f.debug_struct("Options").field("name", &self.name).field("address", &self.address).finish_non_exhaustive()
    }
}
