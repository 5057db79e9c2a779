//! How does an answer say how likely its tokens were? OpenAI's two forms, of chats and of completions.

use serde_json::{Map, Value, json};
use sparsed_engine::api::{Likelihood, TokenLogprob};
use std::fmt::Write as _;

/// What is said instead of a logarithm that is no number in JSON, as OpenAI has it.
const IMPOSSIBLE: f32 = -9999.0;

/// `logprobs` of a chat completion's choice: all tokens of the answer, those of reasoning and calls too.
pub(super) fn of_chat(likelihoods: &[Likelihood]) -> Value {
    let entry = |one: &TokenLogprob| json!({ "token": name(one), "logprob": number(one), "bytes": one.bytes });
    let content = likelihoods.iter().map(|likelihood| {
        let mut content = entry(&likelihood.chosen);
        content["top_logprobs"] = likelihood.top.iter().map(entry).collect();
        content
    });
    json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
}

/// `completion_probabilities` of llama.cpp's: a chat's, with the tokens' ids.
pub(super) fn of_native(likelihoods: &[Likelihood]) -> Value {
    let entry =
        |one: &TokenLogprob| json!({ "id": one.token, "token": name(one), "bytes": one.bytes, "logprob": number(one) });
    let all = likelihoods.iter().map(|likelihood| {
        let mut told = entry(&likelihood.chosen);
        told["top_logprobs"] = likelihood.top.iter().map(entry).collect();
        told
    });
    all.collect()
}

/// `logprobs` of a text completion's choice: the token that was chosen is always among the alternatives. `offset`:
/// characters of the text before these tokens.
pub(super) fn of_completion(likelihoods: &[Likelihood], mut offset: usize) -> Value {
    let (mut tokens, mut logprobs, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for likelihood in likelihoods {
        tokens.push(name(&likelihood.chosen));
        logprobs.push(number(&likelihood.chosen));
        let all = likelihood.top.iter().chain([&likelihood.chosen]);
        let alternatives: Map<String, Value> = all.map(|one| (name(one), json!(number(one)))).collect();
        top.push(alternatives);
        offsets.push(offset);
        offset += n_chars(likelihood);
    }
    json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets })
}

/// Characters that begin in a token.
pub(super) fn n_chars(likelihood: &Likelihood) -> usize {
    likelihood.chosen.bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
}

/// A token's text; bytes that are not whole characters as OpenAI writes them, a token without text as vLLM does.
fn name(one: &TokenLogprob) -> String {
    if one.bytes.is_empty() {
        return format!("token_id:{}", one.token);
    }
    match std::str::from_utf8(&one.bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => one.bytes.iter().fold("bytes:".to_owned(), |mut name, byte| {
            write!(name, "\\x{byte:02x}").expect("a String takes all");
            name
        }),
    }
}

fn number(one: &TokenLogprob) -> f32 {
    one.logprob.max(IMPOSSIBLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(token: u32, bytes: &[u8], logprob: f32) -> TokenLogprob {
        TokenLogprob { token, bytes: bytes.to_vec(), logprob }
    }

    #[test]
    fn both_forms_are_openais() {
        let first = Likelihood { chosen: one(1, "é".as_bytes(), -0.5), top: vec![one(2, b"b", f32::NEG_INFINITY)] };
        let second = Likelihood { chosen: one(3, &[0xe2, 0x82], -1.0), top: Vec::new() };
        let chat = of_chat(&[first.clone(), second.clone()]);
        assert_eq!(chat["content"][0]["bytes"], json!([0xc3, 0xa9]));
        assert_eq!(chat["content"][0]["top_logprobs"][0], json!({ "token": "b", "logprob": -9999.0, "bytes": [98] }));
        assert_eq!(chat["content"][1]["token"], "bytes:\\xe2\\x82");
        let completion = of_completion(&[first, second], 7);
        assert_eq!(completion["text_offset"], json!([7, 8]));
        assert_eq!(completion["top_logprobs"], json!([{ "b": -9999.0, "é": -0.5 }, { "bytes:\\xe2\\x82": -1.0 }]));
        assert_eq!(
            of_completion(&[Likelihood { chosen: one(5, b"", 0.0), top: vec![] }], 0)["tokens"][0],
            "token_id:5"
        );
    }
}
