//! Which sampling parameters does a request carry? The fields that chat and completions share.

use super::figures::Telling;
use super::missing::is_asked;
use super::whole::{as_whole, whole};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::Value;
use sparsed_engine::api::{ALTERNATIVES_MAX, CacheSalt, Urgency};
use sparsed_engine::{GrammarSpec, Sampling, Wishes, checked_stops};
use std::collections::BTreeMap;

/// Most answers to one request.
const ANSWERS_MAX: u32 = 4;

/// Fields as OpenAI has them, and `top_k`, `min_p`, `repetition_penalty` as vLLM, `repeat_penalty` as llama.cpp has
/// them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    #[serde(deserialize_with = "whole")]
    top_k: Option<i64>,
    min_p: Option<f32>,
    /// Of either kind of 64 bits.
    #[serde(deserialize_with = "whole")]
    seed: Option<i128>,
    repetition_penalty: Option<f32>,
    repeat_penalty: Option<f32>,
    /// llama.cpp's: among how many of the last tokens penalties look; here all (-1), or none (0).
    #[serde(deserialize_with = "whole")]
    repeat_last_n: Option<i64>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    #[serde(deserialize_with = "whole")]
    n: Option<u32>,
    /// vLLM's: lower is earlier; here among the requests of one user.
    #[serde(deserialize_with = "whole")]
    priority: Option<i64>,
    /// Ours: a request that has not begun by then fails.
    #[serde(deserialize_with = "whole")]
    deadline_ms: Option<u64>,
    /// Of chats whether, of completions how many.
    logprobs: Option<Value>,
    #[serde(deserialize_with = "whole")]
    top_logprobs: Option<u32>,
    /// vLLM's: whose the request is, where an app asks for several people.
    cache_salt: Option<String>,
    return_progress: Option<bool>,
    timings_per_token: Option<bool>,
    // What would change the answer and is not served.
    store: Option<Value>,
    functions: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    prediction: Option<Value>,
    web_search_options: Option<Value>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

impl SamplingFields {
    /// All that an answer is wished to be; `form` is what it must be, with the field that says so.
    pub(crate) fn wishes(
        &self,
        max_tokens: Option<u32>,
        form: Option<(&'static str, GrammarSpec)>,
    ) -> Result<Wishes, Refusal> {
        let (form, grammar) = form.unzip();
        Ok(Wishes {
            max_tokens,
            grammar,
            form,
            sampling: self.sampling()?,
            stops: self.stops()?,
            ignore_end: self.ignore_end(),
            one_call: false,
            in_background: false,
            cache_salt: self.cache_salt.as_deref().map(CacheSalt::checked).transpose()?,
            weights: None,
            at_turn: None,
            urgency: self.urgency()?,
            progress: false,
        })
    }

    /// The parameters, every one in its range.
    pub(crate) fn sampling(&self) -> Result<Sampling, Refusal> {
        self.refuse_what_is_missing()?;
        let default = Sampling::default();
        let top_k = match self.top_k {
            // -1 is vLLM's and llama.cpp's "all".
            None | Some(-1) => 0,
            Some(k) => u32::try_from(k).map_err(|_| Refusal::invalid("top_k", format!("is {k}, must be 0 or more")))?,
        };
        let seed = match self.chosen_seed() {
            Some(seed) => i64::try_from(seed)
                .map(i64::cast_unsigned)
                .or_else(|_| u64::try_from(seed))
                .map_err(|_| Refusal::invalid("seed", format!("is {seed}, which has more than 64 bits")))?,
            None => getrandom::u64().unwrap_or_default(),
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k,
            // OpenAI's range has 0 in it: the most likely token alone, as with the least number above it.
            top_p: self.top_p.map_or(default.top_p, |p| if p == 0.0 { f32::MIN_POSITIVE } else { p }),
            min_p: self.min_p.unwrap_or(default.min_p),
            seed,
            repetition_penalty: self.repetition_penalty.or(self.repeat_penalty).unwrap_or(default.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            logit_bias: self.biases()?,
        };
        self.within_reach(sampling.checked()?, &default)
    }

    /// Penalties look at all tokens. A shorter reach is refused where there is any penalty, none at all turns them off.
    fn within_reach(&self, sampling: Sampling, off: &Sampling) -> Result<Sampling, Refusal> {
        let unpenalised = Sampling {
            repetition_penalty: off.repetition_penalty,
            frequency_penalty: off.frequency_penalty,
            presence_penalty: off.presence_penalty,
            ..sampling.clone()
        };
        match self.repeat_last_n {
            None | Some(-1) => Ok(sampling),
            Some(0) => Ok(unpenalised),
            Some(1..) if sampling == unpenalised => Ok(sampling),
            Some(n) => {
                let reason = format!("is {n}, must be 0 (no penalties) or -1 (all tokens) beside a penalty");
                Err(Refusal::invalid("repeat_last_n", reason))
            }
        }
    }

    /// The stop strings.
    pub(crate) fn stops(&self) -> Result<Vec<String>, Refusal> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Several(stops)) => stops.clone(),
        };
        Ok(checked_stops(stops)?)
    }

    /// When the request is to begin.
    pub(crate) fn urgency(&self) -> Result<Urgency, Refusal> {
        Ok(Urgency::checked(self.priority, self.deadline_ms)?)
    }

    /// What the client wants to hear beside the answer.
    pub(crate) fn telling(&self) -> Telling {
        Telling { return_progress: self.return_progress, timings_per_token: self.timings_per_token }
    }

    /// Whether the client has chosen the seed.
    pub(crate) fn is_seeded(&self) -> bool {
        self.chosen_seed().is_some()
    }

    /// -1 is a random one, as llama.cpp, Ollama and vLLM have it.
    fn chosen_seed(&self) -> Option<i128> {
        self.seed.filter(|seed| *seed != -1)
    }

    /// Whether the answer goes on past end tokens.
    pub(crate) fn ignore_end(&self) -> bool {
        self.ignore_eos.unwrap_or(false)
    }

    /// How many answers are wanted.
    pub(crate) fn answers(&self) -> Result<u32, Refusal> {
        match self.n.unwrap_or(1) {
            n @ 1..=ANSWERS_MAX => Ok(n),
            n => Err(Refusal::invalid("n", format!("is {n}, must be 1 to {ANSWERS_MAX}"))),
        }
    }

    /// Whether a chat wants to hear how likely its tokens were, and how many alternatives.
    pub(crate) fn logprobs_of_chat(&self) -> Result<Option<u32>, Refusal> {
        let top = self.top_logprobs.unwrap_or(0);
        if top > ALTERNATIVES_MAX {
            return Err(Refusal::invalid("top_logprobs", format!("is {top}, must be 0 to {ALTERNATIVES_MAX}")));
        }
        match &self.logprobs {
            Some(Value::Bool(true)) => Ok(Some(top)),
            None | Some(Value::Null | Value::Bool(false)) if top == 0 => Ok(None),
            None | Some(Value::Null | Value::Bool(false)) => {
                Err(Refusal::invalid("top_logprobs", "needs logprobs to be true"))
            }
            Some(_) => Err(Refusal::invalid("logprobs", "must be true or false")),
        }
    }

    /// The same of a completion, where `logprobs` is the number of alternatives.
    pub(crate) fn logprobs_of_completion(&self) -> Result<Option<u32>, Refusal> {
        let wrong = || Refusal::invalid("logprobs", format!("must be a number from 0 to {ALTERNATIVES_MAX}"));
        match &self.logprobs {
            None | Some(Value::Null | Value::Bool(false)) => Ok(None),
            Some(value) => {
                let n = as_whole(value).and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= ALTERNATIVES_MAX);
                n.map(Some).ok_or_else(wrong)
            }
        }
    }

    fn biases(&self) -> Result<Vec<(u32, f32)>, Refusal> {
        let parse = |(id, bias): (&String, &f32)| {
            let id =
                id.parse().map_err(|_| Refusal::invalid("logit_bias", format!("has key '{id}', not a token id")))?;
            Ok((id, *bias))
        };
        self.logit_bias.iter().flatten().map(parse).collect()
    }

    /// Refuses fields that ask for more than there is, rather than to answer something else than was asked for.
    fn refuse_what_is_missing(&self) -> Result<(), Refusal> {
        let fields = [
            ("store", &self.store),
            ("functions", &self.functions),
            ("audio", &self.audio),
            ("prediction", &self.prediction),
            ("web_search_options", &self.web_search_options),
        ];
        if let Some((name, _)) = fields.iter().find(|(_, value)| is_asked(value)) {
            return Err(Refusal::invalid(name, "is not served by this version"));
        }
        match &self.modalities {
            None | Some(Value::Null) => Ok(()),
            Some(value) if *value == serde_json::json!(["text"]) => Ok(()),
            Some(_) => Err(Refusal::invalid("modalities", "must be [\"text\"]")),
        }
    }
}

/// Most tokens of an answer; -1 is no limit, as llama.cpp and LM Studio have it.
pub(super) fn limit(name: &str, tokens: Option<i64>) -> Result<Option<u32>, Refusal> {
    match tokens {
        None | Some(-1) => Ok(None),
        Some(n) => match u32::try_from(n) {
            Ok(n @ 1..) => Ok(Some(n)),
            _ => Err(Refusal::invalid(name, format!("is {n}, must be at least 1, or -1 for no limit"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> SamplingFields {
        serde_json::from_str(json).unwrap()
    }

    fn refused(json: &str) -> String {
        let error = fields(json).sampling().unwrap_err();
        error.body()["error"]["param"].as_str().unwrap().to_owned()
    }

    #[test]
    fn fields_become_parameters() {
        let sampling =
            fields(r#"{"temperature": 0, "top_k": -1, "seed": -3, "logit_bias": {"7": 1.5}}"#).sampling().unwrap();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (0.0, 0, u64::MAX - 2));
        assert_eq!(sampling.logit_bias, [(7, 1.5)]);
        assert_eq!(fields(r#"{"stop": "x"}"#).stops().unwrap(), ["x"]);
        let sampling =
            fields(r#"{"seed": 18446744073709551615, "top_k": 3.0, "repeat_penalty": 1.5}"#).sampling().unwrap();
        assert_eq!((sampling.seed, sampling.top_k, sampling.repetition_penalty), (u64::MAX, 3, 1.5));
    }

    #[test]
    fn penalties_reach_over_all_tokens_or_none() {
        let all = r#""repeat_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5"#;
        let reaching = |n: i64| fields(&format!(r#"{{"repeat_last_n": {n}, {all}, "seed": 1}}"#)).sampling();
        let sampling = reaching(-1).unwrap();
        assert_eq!((sampling.repetition_penalty, sampling.presence_penalty), (1.5, 0.5));
        assert_eq!(reaching(0).unwrap(), Sampling { seed: 1, ..Sampling::default() });
        for n in [64, -2] {
            assert_eq!(reaching(n).unwrap_err().body()["error"]["param"], "repeat_last_n", "{n}");
        }
        assert!(fields(r#"{"repeat_last_n": 64, "repeat_penalty": 1}"#).sampling().is_ok(), "there is none");
        assert!(fields(r#"{"repeat_last_n": -2}"#).sampling().is_err());
    }

    #[test]
    fn a_seed_of_minus_one_is_none() {
        let drawn = |json: &str| fields(json).sampling().unwrap().seed;
        assert_ne!(drawn(r#"{"seed": -1}"#), drawn(r#"{"seed": -1.0}"#));
        assert!(!fields(r#"{"seed": -1}"#).is_seeded() && fields(r#"{"seed": -2}"#).is_seeded());
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (json, param) in [
            (r#"{"store": true}"#, "store"),
            (r#"{"functions": [{}]}"#, "functions"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"modalities": ["audio"]}"#, "modalities"),
            (r#"{"logit_bias": {"x": 1}}"#, "logit_bias"),
        ] {
            assert_eq!(refused(json), param, "{json}");
        }
        let harmless = r#"{"store": false, "functions": [], "response_format": {"type": "text"}, "metadata": {}}"#;
        assert!(fields(harmless).sampling().is_ok());
    }

    #[test]
    fn an_answer_has_a_limit_or_none() {
        let of = |n: i64| limit("max_tokens", Some(n)).map_err(|error| error.body()["error"]["param"].clone());
        assert_eq!((of(1), of(-1), limit("max_tokens", None).unwrap()), (Ok(Some(1)), Ok(None), None));
        for wrong in [0, -2, 1 << 32] {
            assert_eq!(of(wrong), Err("max_tokens".into()), "{wrong}");
        }
    }

    #[test]
    fn a_salt_is_a_wish_and_an_empty_one_a_mistake() {
        let salt = |json: &str| fields(json).wishes(None, None).map(|wishes| wishes.cache_salt);
        assert_eq!(salt(r#"{"cache_salt": "x"}"#).unwrap(), Some(CacheSalt::checked("x").unwrap()));
        assert_eq!(salt(r#"{"cache_salt": null}"#).unwrap(), None);
        assert_eq!(salt(r#"{"cache_salt": ""}"#).unwrap_err().body()["error"]["param"], "cache_salt");
    }

    #[test]
    fn one_to_four_answers_may_be_wanted() {
        assert_eq!(fields("{}").answers().unwrap(), 1);
        assert_eq!(fields(r#"{"n": 4}"#).answers().unwrap(), 4);
        assert!(fields(r#"{"n": 0}"#).answers().is_err() && fields(r#"{"n": 5}"#).answers().is_err());
    }

    #[test]
    fn likelihoods_are_asked_for_in_two_ways() {
        let chat = |json: &str| fields(json).logprobs_of_chat().map_err(|error| error.body()["error"]["param"].clone());
        assert_eq!(chat(r#"{"logprobs": true, "top_logprobs": 20}"#), Ok(Some(20)));
        assert_eq!(chat(r#"{"logprobs": true}"#), Ok(Some(0)));
        assert_eq!(chat(r#"{"logprobs": false}"#), Ok(None));
        assert_eq!(chat(r#"{"logprobs": true, "top_logprobs": 21}"#), Err("top_logprobs".into()));
        assert_eq!(chat(r#"{"top_logprobs": 2}"#), Err("top_logprobs".into()));
        assert_eq!(chat(r#"{"logprobs": 3}"#), Err("logprobs".into()));
        let completion = |json: &str| fields(json).logprobs_of_completion().ok();
        assert_eq!(completion(r#"{"logprobs": 3}"#), Some(Some(3)));
        assert_eq!(completion(r#"{"logprobs": 3.0}"#), Some(Some(3)));
        assert_eq!(completion("{}"), Some(None));
        assert_eq!((completion(r#"{"logprobs": 21}"#), completion(r#"{"logprobs": true}"#)), (None, None));
    }
}
