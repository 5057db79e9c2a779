//! How does a request of llama.cpp's `/completion` become a completion of OpenAI's?

use crate::bodies::missing::MissingFields;
use crate::bodies::parse;
use crate::bodies::whole::whole;
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::ALTERNATIVES_MAX;

/// Most members of `response_fields`.
const RESPONSE_FIELDS_MAX: usize = 64;

/// A request in OpenAI's words, and what they do not say.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The body of a completion.
    pub(crate) body: Value,
    pub(crate) stream: bool,
    /// The tokens of an answer in one object.
    pub(crate) with_tokens: bool,
    /// The members that the client wants of an answer; none: all.
    pub(crate) response_fields: Vec<String>,
}

/// All that is read of a request: a second pass over a long prompt would cost as much as the first.
#[derive(Debug, Deserialize)]
struct Fields {
    prompt: Option<Value>,
    #[serde(default, deserialize_with = "whole")]
    n_predict: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    max_tokens: Option<i64>,
    #[serde(default, deserialize_with = "whole")]
    n_cmpl: Option<u32>,
    stream: Option<bool>,
    #[serde(default, deserialize_with = "whole")]
    n_probs: Option<u32>,
    repeat_penalty: Option<f64>,
    logit_bias: Option<Value>,
    return_tokens: Option<bool>,
    response_fields: Option<Vec<String>>,
    // What means the same in both is read as OpenAI's.
    model: Option<Value>,
    temperature: Option<Value>,
    top_k: Option<Value>,
    top_p: Option<Value>,
    min_p: Option<Value>,
    seed: Option<Value>,
    repeat_last_n: Option<Value>,
    presence_penalty: Option<Value>,
    frequency_penalty: Option<Value>,
    stop: Option<Value>,
    ignore_eos: Option<Value>,
    grammar: Option<Value>,
    json_schema: Option<Value>,
    return_progress: Option<Value>,
    timings_per_token: Option<Value>,
    priority: Option<Value>,
    deadline_ms: Option<Value>,
    cache_salt: Option<Value>,
    /// Of any kind, so that none is wrong: it would have lost its name.
    #[serde(flatten)]
    missing: MissingFields,
}

/// Reads a body.
///
/// # Errors
/// What is wrong with it, and where.
pub(crate) fn wanted(bytes: &[u8]) -> Result<Wanted, Refusal> {
    let fields: Fields = parse(bytes)?;
    fields.missing.refuse()?;
    fields.check()?;
    let body = [
        ("prompt", Some(prompt(fields.prompt.unwrap_or_default())?)),
        // Without an end where nothing is said; it ends with the context.
        ("max_tokens", Some(json!(fields.n_predict.or(fields.max_tokens).unwrap_or(-1)))),
        ("n", fields.n_cmpl.map(Value::from)),
        ("seed", fields.seed),
        ("stream", fields.stream.map(Value::from)),
        ("logprobs", fields.n_probs.filter(|n| *n > 0).map(Value::from)),
        ("repetition_penalty", fields.repeat_penalty.map(Value::from)),
        ("logit_bias", fields.logit_bias.map(biases).transpose()?),
        ("model", fields.model),
        ("temperature", fields.temperature),
        ("top_k", fields.top_k),
        ("top_p", fields.top_p),
        ("min_p", fields.min_p),
        ("repeat_last_n", fields.repeat_last_n),
        ("presence_penalty", fields.presence_penalty),
        ("frequency_penalty", fields.frequency_penalty),
        ("stop", fields.stop),
        ("ignore_eos", fields.ignore_eos),
        ("grammar", fields.grammar),
        ("json_schema", fields.json_schema),
        ("return_progress", fields.return_progress),
        ("timings_per_token", fields.timings_per_token),
        ("priority", fields.priority),
        ("deadline_ms", fields.deadline_ms),
        ("cache_salt", fields.cache_salt),
    ];
    let body = body.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    let (stream, with_tokens) = (fields.stream == Some(true), fields.return_tokens == Some(true));
    let response_fields = fields.response_fields.unwrap_or_default();
    Ok(Wanted { body: Value::Object(body), stream, with_tokens, response_fields })
}

impl Fields {
    fn check(&self) -> Result<(), Refusal> {
        if self.n_predict.or(self.max_tokens) == Some(0) {
            return Err(Refusal::invalid("n_predict", "is 0: a prompt is not read without an answer"));
        }
        if let Some(n) = self.n_probs.filter(|n| *n > ALTERNATIVES_MAX) {
            return Err(Refusal::invalid("n_probs", format!("is {n}, must be 0 to {ALTERNATIVES_MAX}")));
        }
        if let Some(n) = self.response_fields.as_ref().map(Vec::len).filter(|n| *n > RESPONSE_FIELDS_MAX) {
            let reason = format!("has {n} entries, the limit is {RESPONSE_FIELDS_MAX}");
            return Err(Refusal::invalid("response_fields", reason));
        }
        Ok(())
    }
}

/// Objects with a text in them become that text; media are refused.
fn prompt(prompt: Value) -> Result<Value, Refusal> {
    match prompt {
        Value::Object(mut object) => {
            let media = object.get("multimodal_data").and_then(Value::as_array).is_some_and(|data| !data.is_empty());
            if media {
                return Err(Refusal::invalid("prompt", "has media: models here read text"));
            }
            let none = || Refusal::invalid("prompt", "is an object without prompt_string");
            object.remove("prompt_string").filter(Value::is_string).ok_or_else(none)
        }
        Value::Array(all) => all.into_iter().map(self::prompt).collect(),
        other => Ok(other),
    }
}

/// llama.cpp's list of pairs as OpenAI's object; `false` stands for never.
fn biases(biases: Value) -> Result<Value, Refusal> {
    let Value::Array(pairs) = biases else { return Ok(biases) };
    let wrong = || Refusal::invalid("logit_bias", "must have pairs of a token id and a number or false");
    let pair = |pair: Value| {
        let [token, bias] =
            <[Value; 2]>::try_from(pair.as_array().cloned().unwrap_or_default()).map_err(|_| wrong())?;
        let token = token.as_u64().ok_or_else(wrong)?;
        let bias = if bias == Value::Bool(false) { json!(-100) } else { bias };
        Ok((token.to_string(), bias))
    };
    Ok(Value::Object(pairs.into_iter().map(pair).collect::<Result<_, Refusal>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> Value {
        wanted(text.as_bytes()).unwrap().body
    }

    fn refused(text: &str) -> Value {
        wanted(text.as_bytes()).unwrap_err().body()["error"]["param"].clone()
    }

    #[test]
    fn what_openai_calls_otherwise_has_its_name() {
        let body = body(
            r#"{"prompt": "x", "n_predict": 5, "seed": -1, "n_probs": 3, "repeat_penalty": 1.5, "repeat_last_n": 0, "top_k": 4,
                "cache_prompt": false, "logit_bias": [[7, 1.5], [8, false]], "json_schema": {"const": 1}}"#,
        );
        assert_eq!((&body["max_tokens"], &body["logprobs"], &body["top_k"]), (&json!(5), &json!(3), &json!(4)));
        assert_eq!((&body["repetition_penalty"], &body["seed"]), (&json!(1.5), &json!(-1)));
        assert_eq!(body["logit_bias"], json!({ "7": 1.5, "8": -100 }));
        assert_eq!((&body["json_schema"]["const"], &body["repeat_last_n"]), (&json!(1), &json!(0)));
        assert!(body.get("cache_prompt").is_none());
    }

    #[test]
    fn an_answer_ends_with_the_context_where_no_limit_is_said() {
        assert_eq!(body(r#"{"prompt": "x"}"#)["max_tokens"], -1);
        assert_eq!(body(r#"{"prompt": "x", "max_tokens": 3}"#)["max_tokens"], 3);
        assert_eq!(refused(r#"{"prompt": "x", "n_predict": 0}"#), "n_predict");
        assert_eq!(refused(r#"{"mirostat": 0, "n_predict": "5"}"#), "n_predict");
    }

    #[test]
    fn objects_as_prompts_are_their_text_and_nothing_else() {
        assert_eq!(body(r#"{"prompt": {"prompt_string": "x"}}"#)["prompt"], "x");
        assert_eq!(body(r#"{"prompt": [[1, 2], [3]]}"#)["prompt"], json!([[1, 2], [3]]));
        assert_eq!(refused(r#"{"prompt": {"prompt_string": "x", "multimodal_data": ["eA=="]}}"#), "prompt");
        assert_eq!(refused(r#"{"prompt": {}}"#), "prompt");
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_its_name_unless_it_is_off() {
        for (field, name) in [
            ("\"mirostat\": 2", "mirostat"),
            ("\"typical_p\": 0.5", "typical_p"),
            ("\"post_sampling_probs\": true", "post_sampling_probs"),
            ("\"n_probs\": 21", "n_probs"),
            ("\"logit_bias\": [[\"word\", 1]]", "logit_bias"),
            ("\"lora\": [{\"id\": 0}]", "lora"),
        ] {
            assert_eq!(refused(&format!(r#"{{"prompt": "x", {field}}}"#)), name);
        }
        let off =
            r#"{"prompt": "x", "mirostat": 0, "typical_p": 1.0, "dry_multiplier": 0.0, "lora": [], "id_slot": 3}"#;
        assert!(wanted(off.as_bytes()).is_ok());
    }
}
