//! What do OpenAI's bodies say? Requests and answers as every door has them, whatever carries the bytes.

mod answer;
mod chat;
mod completions;
mod entry;
mod fields;
pub(crate) mod figures;
mod forms;
pub(crate) mod listen;
pub(crate) mod load;
mod logprobs;
mod missing;
pub(crate) mod models;
pub(crate) mod native;
pub(crate) mod ollama;
pub(crate) mod responses;
mod sampling;
pub(crate) mod sessions;
pub(crate) mod size;
pub(crate) mod tokens;
mod whole;

pub(crate) use answer::{Answering, Asked, Piece, Wire};
pub(crate) use chat::ChatAsk;
#[cfg(test)]
pub(crate) use chat::ChatWire;
pub(crate) use completions::{CompletionAsk, CompletionWire};

use crate::refusal::Refusal;
use serde::de::DeserializeOwned;

/// The fields of `T`, others ignored. A body is read once per kind of fields: a flattened struct would lose the names
/// of wrong fields. serde_json refuses values nested deeper than 128.
///
/// # Errors
/// What is wrong, and where.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    // A list would be read as the fields in their order.
    if bytes.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
        return Err(Refusal::unreadable(400, "invalid_json", None, "the body is no JSON object".to_owned()));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let param = (path != "." && path != "?").then(|| path.clone());
        let message = match &param {
            Some(path) => format!("'{path}': {}", error.inner()),
            None => format!("the body is not the JSON expected: {}", error.inner()),
        };
        Refusal::unreadable(400, "invalid_json", param, message)
    })?;
    json.end().map_err(|error| Refusal::unreadable(400, "invalid_json", None, format!("after the body: {error}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Point {
        at: Vec<u32>,
    }

    fn refused(text: &str) -> String {
        parse::<Point>(text.as_bytes()).err().expect("refused").body()["error"]["message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn refusals_name_the_place() {
        assert!(refused(r#"{"at": [1, "x"]}"#).contains("'at[1]'"));
        assert!(refused("{").contains("EOF"));
        assert!(refused(r#"{"at": []} x"#).contains("after the body"));
        assert!(refused(&format!("{{\"at\": {}1{}}}", "[".repeat(200), "]".repeat(200))).contains("'at"));
        for other in ["[[1]]", "null", "\"x\"", "\u{feff}{}"] {
            assert!(refused(other).contains("no JSON object"), "{other}");
        }
    }
}
