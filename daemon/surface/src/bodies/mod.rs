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
mod places;
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

use crate::refusal::{AtDoor, Refusal};
use serde::de::DeserializeOwned;

/// The fields of `T`, others ignored. A body is read once per kind of fields: a flattened struct would lose the names
/// of wrong fields. serde_json refuses values nested deeper than 128.
///
/// # Errors
/// What is wrong, and where.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    // A list would be read as the fields in their order.
    if bytes.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
        return Err(Refusal::at_door(AtDoor::InvalidJson, None, "the body is no JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| misread(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| Refusal::at_door(AtDoor::InvalidJson, None, format!("after the body: {error}")))?;
    Ok(value)
}

/// What is wrong with a body, at `path` of it: no JSON, or JSON in which a value is not what it must be.
fn misread(path: &str, error: &serde_json::Error) -> Refusal {
    let said = plain(&error.to_string());
    let place = Some(path).filter(|path| !matches!(*path, "." | "?"));
    // What lacks a field is all that the path knows of it.
    let named = |what| said.strip_prefix(what).and_then(|rest| rest.split_once('`')).map(|(name, _)| name);
    let (missing, twice) = (named("missing field `"), named("duplicate field `"));
    let param = match (place, missing.or(twice)) {
        (Some(place), Some(name)) => Some(format!("{place}.{name}")),
        (place, name) => place.or(name).map(str::to_owned),
    };
    let message = match &param {
        Some(param) if missing.is_some() => format!("'{param}' is missing"),
        Some(param) if twice.is_some() => format!("'{param}' is there twice"),
        Some(param) => format!("'{param}': {said}"),
        None => format!("the body is not the JSON expected: {said}"),
    };
    let what = if error.is_data() { AtDoor::InvalidValue } else { AtDoor::InvalidJson };
    Refusal::at_door(what, param.as_deref(), message)
}

/// The words of an error with JSON's names for what Rust has other names for.
fn plain(said: &str) -> String {
    let Some((found, expected)) = said.rsplit_once(", expected ") else { return said.to_owned() };
    let (kind, place) = match expected.find(" at line ") {
        Some(at) => expected.split_at(at),
        None => (expected, ""),
    };
    let kind = match kind {
        "f32" | "f64" => "a number",
        "i8" | "i16" | "i32" | "i64" | "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number",
        "a sequence" => "a list",
        "a map" => "an object",
        kind if kind.starts_with("struct ") => "an object",
        other => other,
    };
    let found = match found {
        "invalid type: sequence" => "invalid type: list",
        "invalid type: map" => "invalid type: object",
        other => other,
    };
    format!("{found}, expected {kind}{place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Point {
        at: Vec<u32>,
        scale: Option<f32>,
        next: Option<Box<Self>>,
    }

    fn refused(text: &str) -> String {
        parse::<Point>(text.as_bytes()).unwrap_err().body()["error"]["message"].as_str().unwrap().to_owned()
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
    #[test]
    fn what_is_wrong_with_a_value_is_said_in_jsons_words_and_what_is_missing_has_its_name() {
        for (text, code, param, said) in [
            ("{", "invalid_json", None, "EOF"),
            ("{}", "invalid_value", Some("at"), "'at' is missing"),
            (r#"{"at": [], "next": {}}"#, "invalid_value", Some("next.at"), "'next.at' is missing"),
            (r#"{"at": [], "next": 1}"#, "invalid_value", Some("next"), "integer `1`, expected an object"),
            (r#"{"at": [], "scale": {}}"#, "invalid_value", Some("scale"), "type: object, expected a number at line 1"),
            (r#"{"at": [], "at": []}"#, "invalid_value", Some("at"), "'at' is there twice"),
            (
                r#"{"at": [], "next": {"at": [], "at": []}}"#,
                "invalid_value",
                Some("next.at"),
                "'next.at' is there twice",
            ),
            (r#"{"at": [[]]}"#, "invalid_value", Some("at[0]"), "type: list, expected a whole number"),
            (r#"{"at": "x, expected u32"}"#, "invalid_value", Some("at"), "\"x, expected u32\", expected a list"),
        ] {
            let error = parse::<Point>(text.as_bytes()).unwrap_err().body()["error"].clone();
            assert_eq!((&error["code"], error["param"].as_str()), (&code.into(), param), "{text}");
            assert!(error["message"].as_str().unwrap().contains(said), "{error}");
        }
    }
}
