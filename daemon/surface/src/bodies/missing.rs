//! Which wishes about an answer do other servers fulfil and this one does not? They are refused by name unless they are
//! off: an answer to something else than was asked for would not be noticed.

use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};

/// The order of llama.cpp's samplers that it has by itself, as names and as letters: who says it asks for nothing.
const SAMPLERS: [&str; 9] =
    ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"];
const SAMPLER_LETTERS: [&str; 2] = ["edskypmxt", "edkypmxt"];

/// Samplers of llama.cpp's, constraints of vLLM's and SGLang's.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct MissingFields {
    mirostat: Option<Value>,
    typical_p: Option<Value>,
    typ_p: Option<Value>,
    top_n_sigma: Option<Value>,
    dynatemp_range: Option<Value>,
    dry_multiplier: Option<Value>,
    xtc_probability: Option<Value>,
    n_indent: Option<Value>,
    t_max_predict_ms: Option<Value>,
    post_sampling_probs: Option<Value>,
    lora: Option<Value>,
    min_tokens: Option<Value>,
    stop_token_ids: Option<Value>,
    allowed_token_ids: Option<Value>,
    bad_words: Option<Value>,
    prompt_logprobs: Option<Value>,
    truncate_prompt_tokens: Option<Value>,
    use_beam_search: Option<Value>,
    include_stop_str_in_output: Option<Value>,
    chat_template: Option<Value>,
    samplers: Option<Value>,
    min_new_tokens: Option<Value>,
    stop_regex: Option<Value>,
    logits_processors: Option<Value>,
    custom_logit_processor: Option<Value>,
    documents: Option<Value>,
    skip_special_tokens: Option<Value>,
}

/// A field, what it says, and which of its values are off beside those of [`is_asked`].
type Field<'f> = (&'static str, &'f Option<Value>, fn(&Value) -> bool);

impl MissingFields {
    /// # Errors
    /// The first that is not off.
    pub(crate) fn refuse(&self) -> Result<(), Refusal> {
        let one = |value: &Value| value.as_f64().is_some_and(|n| n >= 1.0);
        let zero = |value: &Value| value.as_f64().is_some_and(|n| n <= 0.0);
        let never = |_: &Value| false;
        let fields: [Field<'_>; 27] = [
            ("mirostat", &self.mirostat, zero),
            ("typical_p", &self.typical_p, one),
            ("typ_p", &self.typ_p, one),
            ("top_n_sigma", &self.top_n_sigma, zero),
            ("dynatemp_range", &self.dynatemp_range, zero),
            ("dry_multiplier", &self.dry_multiplier, zero),
            ("xtc_probability", &self.xtc_probability, zero),
            ("n_indent", &self.n_indent, zero),
            ("t_max_predict_ms", &self.t_max_predict_ms, zero),
            ("post_sampling_probs", &self.post_sampling_probs, never),
            ("lora", &self.lora, never),
            ("min_tokens", &self.min_tokens, zero),
            ("stop_token_ids", &self.stop_token_ids, never),
            ("allowed_token_ids", &self.allowed_token_ids, never),
            ("bad_words", &self.bad_words, never),
            ("prompt_logprobs", &self.prompt_logprobs, never),
            ("truncate_prompt_tokens", &self.truncate_prompt_tokens, never),
            ("use_beam_search", &self.use_beam_search, never),
            ("include_stop_str_in_output", &self.include_stop_str_in_output, never),
            ("chat_template", &self.chat_template, never),
            ("samplers", &self.samplers, is_usual_order),
            ("min_new_tokens", &self.min_new_tokens, zero),
            ("stop_regex", &self.stop_regex, never),
            ("logits_processors", &self.logits_processors, never),
            ("custom_logit_processor", &self.custom_logit_processor, never),
            ("documents", &self.documents, never),
            // It is the other way round: true is how it is here.
            (
                "skip_special_tokens",
                &self.skip_special_tokens.as_ref().map(|skips| json!(skips.as_bool() == Some(false))),
                never,
            ),
        ];
        let asks = |(_, value, off): &&Field<'_>| is_asked(value) && !value.as_ref().is_some_and(off);
        match fields.iter().find(asks) {
            Some((name, ..)) => Err(Refusal::invalid(name, "is not served")),
            None => Ok(()),
        }
    }
}

fn is_usual_order(samplers: &Value) -> bool {
    *samplers == json!(SAMPLERS) || SAMPLER_LETTERS.iter().any(|letters| samplers == letters)
}

/// # Errors
/// The first of these fields that is asked for, which is refused as `reason` says.
pub(super) fn refuse_asked(fields: &[(&str, bool)], reason: &str) -> Result<(), Refusal> {
    match fields.iter().find(|(_, is_asked)| *is_asked) {
        Some((name, _)) => Err(Refusal::invalid(name, reason)),
        None => Ok(()),
    }
}

/// Whether a field says anything: nulls, `false` and what is empty do not.
pub(super) fn is_asked(value: &Option<Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_change_an_answer_is_refused_by_its_name_unless_it_is_off() {
        let refused = |text: &str| {
            let fields: MissingFields = serde_json::from_str(text).unwrap();
            fields.refuse().err().map(|error| error.body()["error"]["param"].as_str().unwrap().to_owned())
        };
        for (text, name) in [
            (r#"{"mirostat": 2}"#, "mirostat"),
            (r#"{"typ_p": 0.5}"#, "typ_p"),
            (r#"{"dry_multiplier": 0.8}"#, "dry_multiplier"),
            (r#"{"min_tokens": 1}"#, "min_tokens"),
            (r#"{"stop_token_ids": [7]}"#, "stop_token_ids"),
            (r#"{"bad_words": ["x"]}"#, "bad_words"),
            (r#"{"prompt_logprobs": 0}"#, "prompt_logprobs"),
            (r#"{"chat_template": "{{ messages }}"}"#, "chat_template"),
            (r#"{"use_beam_search": true}"#, "use_beam_search"),
            (r#"{"samplers": ["top_k", "temperature"]}"#, "samplers"),
            (r#"{"min_new_tokens": 2}"#, "min_new_tokens"),
            (r#"{"stop_regex": "a+"}"#, "stop_regex"),
            (r#"{"logits_processors": ["x"]}"#, "logits_processors"),
            (r#"{"documents": [{"text": "x"}]}"#, "documents"),
            (r#"{"skip_special_tokens": false}"#, "skip_special_tokens"),
        ] {
            assert_eq!(refused(text).as_deref(), Some(name), "{text}");
        }
        let off = r#"{"mirostat": 0, "typ_p": 1.0, "top_n_sigma": -1, "dry_multiplier": 0.0, "lora": [], "min_tokens": 0,
            "stop_token_ids": [], "bad_words": null, "prompt_logprobs": null, "chat_template": "", "use_beam_search": false,
            "samplers": "edskypmxt", "skip_special_tokens": true, "documents": [], "min_new_tokens": 0}"#;
        assert_eq!(refused(off), None);
    }
}
