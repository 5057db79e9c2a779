//! What does a client write around the body of its request?

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};
use std::fmt;

/// Pause between two deltas when the request does not say.
pub(super) const MIN_MS_DEFAULT: u64 = 100;
/// The least that `max_bytes` may be: a part needs room for more than its frame.
pub(super) const PART_BYTES_MIN: usize = 256;

/// A payload that is a request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Envelope {
    v: Option<u32>,
    #[serde(default)]
    id: Id,
    /// Where answers go, of clients without properties.
    pub(super) reply_to: Option<String>,
    /// How long the answer is wanted.
    pub(super) deadline_ms: Option<u64>,
    #[serde(default)]
    body: Map<String, Value>,
    session: Option<String>,
    #[serde(default, deserialize_with = "stream")]
    stream: Option<Stream>,
    /// Most bytes of an answer's payload.
    pub(super) max_bytes: Option<usize>,
}

/// Small devices count their requests.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged, expecting = "expected a word or a whole number")]
enum Id {
    Word(String),
    Number(u64),
    #[default]
    None,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stream {
    #[serde(default)]
    mode: Mode,
    min_ms: Option<u64>,
}

/// `true` or `false` as on the other doors, or the mode with its pace. By hand, so that an error names the field.
fn stream<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Stream>, D::Error> {
    struct Shapes;

    impl<'de> Visitor<'de> for Shapes {
        type Value = Option<Stream>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true, false, or an object with mode (none or delta) and min_ms")
        }

        fn visit_bool<E>(self, is_wanted: bool) -> Result<Self::Value, E> {
            Ok(is_wanted.then_some(Stream { mode: Mode::Delta, min_ms: None }))
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            Stream::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }

    deserializer.deserialize_any(Shapes)
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    None,
    #[default]
    Delta,
}

impl Envelope {
    /// What is wrong with a field, by its name.
    pub(super) fn check(&self) -> Result<(), (&'static str, &'static str)> {
        if self.v.is_some_and(|version| version != 1) {
            return Err(("v", "must be 1"));
        }
        if self.deadline_ms == Some(0) {
            return Err(("deadline_ms", "must be at least 1"));
        }
        if self.max_bytes.is_some_and(|bytes| bytes < PART_BYTES_MIN) {
            return Err(("max_bytes", "must be at least 256"));
        }
        if self.body.get("n").is_some_and(|n| !n.is_null() && *n != 1) {
            return Err(("n", "must be 1 on this door"));
        }
        Ok(())
    }

    /// The body with what the envelope says of it. Answers always come in pieces, whoever hears them.
    pub(super) fn body(&self) -> String {
        let mut body = self.body.clone();
        if let Some(session) = &self.session {
            body.insert("session_id".to_owned(), json!(session));
        }
        Value::Object(body).to_string()
    }

    /// What the client calls its request.
    pub(super) fn id(&self) -> Option<String> {
        match &self.id {
            Id::Word(word) => Some(word.clone()),
            Id::Number(number) => Some(number.to_string()),
            Id::None => None,
        }
    }

    /// Milliseconds between two deltas; `None`: no deltas.
    pub(super) fn min_ms(&self) -> Option<u64> {
        match self.stream.as_ref()? {
            Stream { mode: Mode::None, .. } => None,
            Stream { mode: Mode::Delta, min_ms } => Some(min_ms.unwrap_or(MIN_MS_DEFAULT)),
        }
    }
}
