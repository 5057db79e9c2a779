//! How likely were the other engine's tokens? OpenAI's two forms, of chats and of completions.

use serde::Deserialize;
use serde_json::{Map, Value};
use sparsed_engine::api::{Likelihood, TokenLogprob};

/// What a number stands for that is no logarithm.
const IMPOSSIBLE: f32 = f32::NEG_INFINITY;

/// `logprobs` of a choice: `content` of chats (and of llama.cpp's completions), or the lists of completions.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Logprobs {
    content: Option<Vec<Entry>>,
    tokens: Option<Vec<String>>,
    token_logprobs: Option<Vec<Option<f32>>>,
    top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    token: String,
    logprob: Option<f32>,
    bytes: Option<Vec<u8>>,
    #[serde(default)]
    top_logprobs: Vec<One>,
}

#[derive(Debug, Deserialize)]
struct One {
    token: String,
    logprob: Option<f32>,
    bytes: Option<Vec<u8>>,
}

impl Logprobs {
    /// One entry a token, each with at most `top_max` alternatives.
    pub(crate) fn likelihoods(self, top_max: usize) -> Vec<Likelihood> {
        if let Some(content) = self.content {
            let likelihood = |entry: Entry| Likelihood {
                chosen: one(entry.token, entry.bytes, entry.logprob),
                top: entry.top_logprobs.into_iter().take(top_max).map(|o| one(o.token, o.bytes, o.logprob)).collect(),
            };
            return content.into_iter().map(likelihood).collect();
        }
        let mut logprobs = self.token_logprobs.unwrap_or_default().into_iter();
        let mut tops = self.top_logprobs.unwrap_or_default().into_iter();
        let likelihood = |token: String| {
            let top = tops.next().flatten().unwrap_or_default().into_iter();
            #[expect(clippy::cast_possible_truncation, reason = "a logarithm of a probability needs no more digits")]
            let mut top: Vec<TokenLogprob> =
                top.map(|(token, value)| one(token, None, value.as_f64().map(|number| number as f32))).collect();
            top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
            top.truncate(top_max);
            Likelihood { chosen: one(token, None, logprobs.next().flatten()), top }
        };
        self.tokens.unwrap_or_default().into_iter().map(likelihood).collect()
    }
}

/// Its number in the other engine's vocabulary is not told.
fn one(token: String, bytes: Option<Vec<u8>>, logprob: Option<f32>) -> TokenLogprob {
    let bytes = bytes.filter(|bytes| !bytes.is_empty()).unwrap_or_else(|| token.into_bytes());
    TokenLogprob { token: u32::MAX, bytes, logprob: logprob.map_or(IMPOSSIBLE, |number| number.min(0.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, top_max: usize) -> Vec<(Vec<u8>, f32, Vec<Vec<u8>>)> {
        let logprobs: Logprobs = serde_json::from_str(json).unwrap();
        let likelihoods = logprobs.likelihoods(top_max).into_iter();
        let texts = |top: Vec<TokenLogprob>| top.into_iter().map(|one| one.bytes).collect();
        likelihoods.map(|one| (one.chosen.bytes, one.chosen.logprob, texts(one.top))).collect()
    }

    #[test]
    fn both_forms_are_read_and_alternatives_beyond_what_was_asked_for_left_out() {
        let chat = r#"{"content": [{"token": "?", "logprob": -0.5, "bytes": [195], "top_logprobs": [
            {"token": "a", "logprob": -0.1, "bytes": null}, {"token": "b", "logprob": -9999.0}]}], "refusal": null}"#;
        assert_eq!(read(chat, 1), [(vec![195], -0.5, vec![b"a".to_vec()])]);
        let completion = r#"{"tokens": ["x", "y"], "token_logprobs": [-1.5, null],
            "top_logprobs": [{"b": -2, "a": -1.5}, null], "text_offset": [0, 1]}"#;
        let expected =
            [(b"x".to_vec(), -1.5, vec![b"a".to_vec(), b"b".to_vec()]), (b"y".to_vec(), f32::NEG_INFINITY, Vec::new())];
        assert_eq!(read(completion, 5), expected);
        assert_eq!(read("{}", 5), []);
    }
}
