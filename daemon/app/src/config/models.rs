//! `[models]`: where are models kept that the tool fetches, and from where? And when a model is in memory.

use super::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// How long a model stays that was loaded when somebody asked for it.
const KEEP_ON_DEMAND: Duration = Duration::from_secs(300);

/// Largest model that is fetched unless somebody says otherwise.
const MAX_BYTES: u64 = 256 << 30;

/// `[models]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Models {
    /// The folder of the store; `None`: see [`Paths`](super::Paths).
    pub dir: Option<PathBuf>,
    /// What `hf:` stands for: the address of a hub that speaks Hugging Face's paths, or of a mirror of it.
    pub hub: String,
    /// Whose certificates are believed, in PEM; `None`: the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// Largest file that is fetched.
    pub max_bytes: Bytes,
}

impl Default for Models {
    fn default() -> Self {
        Self { dir: None, hub: String::new(), ca_file: None, max_bytes: Bytes(MAX_BYTES) }
    }
}

impl Models {
    /// The first value that cannot be, and what it must be.
    pub(super) fn wrong_value(&self) -> Option<(String, String)> {
        let rest = ["https://", "http://"].iter().find_map(|start| self.hub.strip_prefix(start));
        // The address itself is not repeated: it may hold a password.
        let reason = match rest {
            None if self.hub.is_empty() => return None,
            None | Some("") => "must begin with https:// or http://",
            Some(rest) if rest.contains(['@', '?', '#']) => {
                "must have no user, password, query or fragment; a token goes into the variable HF_TOKEN"
            }
            Some(rest) if !rest.bytes().all(|byte| byte.is_ascii_graphic()) => "must be an address without blanks",
            Some(_) => return None,
        };
        Some(("models.hub".to_owned(), reason.to_owned()))
    }
}

/// When a model is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadWhen {
    /// When the daemon starts.
    #[default]
    Start,
    /// When somebody asks for it.
    Demand,
}

impl LoadWhen {
    /// How long a model stays that nobody asks for, where the configuration does not say.
    pub fn default_keep_alive(self) -> sparsed_engine::KeepAlive {
        match self {
            Self::Start => sparsed_engine::KeepAlive::FOREVER,
            Self::Demand => sparsed_engine::KeepAlive::for_time(KEEP_ON_DEMAND),
        }
    }
}

/// How long a model stays that nobody asks for: `"5m"`, a number of seconds, or a negative one for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeepAlive(String);

impl KeepAlive {
    /// As the engine has it.
    pub fn parsed(&self) -> sparsed_engine::KeepAlive {
        self.0.parse().expect("it was parsed when it was read")
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number of seconds, or text as \"5m\"")]
        enum Form {
            Seconds(i64),
            Text(String),
        }
        let text = match Form::deserialize(deserializer)? {
            Form::Seconds(seconds) => seconds.to_string(),
            Form::Text(text) => text,
        };
        text.parse::<sparsed_engine::KeepAlive>().map_err(serde::de::Error::custom)?;
        Ok(Self(text))
    }
}
