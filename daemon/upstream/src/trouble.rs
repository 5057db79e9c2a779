//! What went wrong elsewhere, may it pass, and what is it called here?

use serde_json::Value;
use sparsed_engine::api::Failure;
use std::time::Duration;

/// Longest part of another engine's message that is passed on, in characters.
const MESSAGE_CHARS_MAX: usize = 400;
/// When to try again, where a busy engine does not say, in seconds.
const RETRY_AFTER_S: u32 = 5;
/// The longest such time that is passed on, in seconds.
const RETRY_AFTER_S_MAX: u32 = 3600;

/// Why an attempt gave no answer, or no more of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Trouble {
    /// No connection.
    Unreachable(String),
    /// It took too long.
    Late { what: &'static str, limit: Duration },
    /// It takes no more now.
    Busy { retry_after_s: Option<u32> },
    /// The connection ended early, or carried what is no answer.
    Broken(String),
    /// It said that it failed, or that it does not know us or the model.
    Failed(String),
    /// It refuses the request.
    Refused { param: Option<String>, reason: String, is_context: bool },
    /// This end of it.
    Here(Failure),
}

impl Trouble {
    /// What an answer with another status than 200 says.
    pub(crate) fn of_status(status: u16, retry_after_s: Option<u32>, body: &[u8], key: Option<&str>) -> Self {
        let json: Value = serde_json::from_slice(body).unwrap_or_default();
        // SGLang's answers, and vLLM's older ones, are the error itself.
        let error = json.get("error").filter(|error| !error.is_null()).unwrap_or(&json);
        Self::of_error(Some(status), retry_after_s, error, key)
    }

    /// What an error object says, whether it came with a status or inside a stream.
    pub(crate) fn of_error(status: Option<u16>, retry_after_s: Option<u32>, error: &Value, key: Option<&str>) -> Self {
        // Some have the text alone, FastAPI calls it `detail`.
        let text = [error, &error["message"], &error["detail"]].into_iter().find_map(Value::as_str);
        let said = text.map(|text| clean(text, key)).filter(|text| !text.is_empty());
        let code = error["code"].as_u64().and_then(|code| u16::try_from(code).ok());
        let status = status.or(code).unwrap_or(500);
        let with = |what: String| match &said {
            Some(said) => format!("{what}: {said}"),
            None => what,
        };
        match status {
            // Its message may repeat a part of the key, and is about us, not the client.
            401 | 403 => Self::Failed(format!("it does not let this box in (status {status}); see relay.key_file")),
            404 => Self::Failed(with("it has no such model or interface (status 404)".to_owned())),
            429 | 503 => Self::Busy { retry_after_s },
            400 | 413 | 422 => {
                let reason = said.clone().unwrap_or_else(|| format!("status {status}"));
                let param = error["param"].as_str().map(|param| clean(param, key)).filter(|param| !param.is_empty());
                Self::Refused { param, is_context: is_about_context(error, &reason), reason }
            }
            502 | 504 => Self::Broken(with(format!("status {status}"))),
            _ => Self::Failed(with(format!("status {status}"))),
        }
    }

    /// Whether the same request may be answered in a moment.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Busy { .. } | Self::Broken(_))
    }

    /// How long it asks to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after_s } => retry_after_s.map(|s| Duration::from_secs(s.into())),
            _ => None,
        }
    }

    /// As the listener of a request for the model `name` hears it.
    pub(crate) fn failure(self, name: &str) -> Failure {
        let name = name.to_owned();
        match self {
            Self::Unreachable(reason) => Failure::UpstreamUnreachable { name, reason },
            Self::Late { what, limit } => Failure::UpstreamLate { name, what, limit_s: limit.as_secs().max(1) },
            Self::Busy { retry_after_s } => {
                let retry_after_s = retry_after_s.unwrap_or(RETRY_AFTER_S).clamp(1, RETRY_AFTER_S_MAX);
                Failure::UpstreamBusy { name, retry_after_s }
            }
            Self::Broken(reason) | Self::Failed(reason) => Failure::UpstreamFailed { name, reason },
            Self::Refused { reason, is_context: true, .. } => Failure::UpstreamContextTooLong { name, reason },
            Self::Refused { param, reason, .. } => Failure::UpstreamRefused { name, param, reason },
            Self::Here(failure) => failure,
        }
    }
}

/// OpenAI's code, llama.cpp's type, and the words of vLLM and SGLang.
fn is_about_context(error: &Value, reason: &str) -> bool {
    error["code"] == "context_length_exceeded"
        || error["type"] == "exceed_context_size_error"
        || reason.contains("maximum context length")
        || reason.contains("longer than the model's context length")
}

/// A text from elsewhere as it may be shown: short, on one line, and without our key.
pub(crate) fn clean(text: &str, key: Option<&str>) -> String {
    let text = match key.filter(|key| !key.is_empty()) {
        Some(key) => text.replace(key, "***"),
        None => text.to_owned(),
    };
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MESSAGE_CHARS_MAX).map(visible).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(status: u16, body: &str) -> Failure {
        Trouble::of_status(status, None, body.as_bytes(), Some("sk-1")).failure("big")
    }

    #[test]
    fn refusals_of_each_engine_keep_their_meaning() {
        let vllm = r#"{"object": "error", "message": "This model's maximum context length is 4096 tokens.", "type": "BadRequestError", "param": null, "code": 400}"#;
        let llama =
            r#"{"error": {"code": 400, "message": "the request exceeds", "type": "exceed_context_size_error"}}"#;
        let openai = r#"{"error": {"message": "long", "code": "context_length_exceeded", "param": "messages"}}"#;
        // As vLLM 0.32 answered, and as SGLang 0.5.23 has it in its sources.
        let vllm_now = r#"{"error": {"message": "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 input tokens", "type": "BadRequestError", "param": "input_tokens", "code": 400}}"#;
        let sglang = r#"{"object": "error", "message": "The input (1025 tokens) is longer than the model's context length (1024 tokens).", "type": "BadRequestError", "param": null, "code": 400}"#;
        for body in [vllm, vllm_now, sglang, llama, openai] {
            assert!(matches!(failure(400, body), Failure::UpstreamContextTooLong { .. }), "{body}");
        }
        let long = r#"{"error": {"message": "max_tokens=5000 cannot be greater than max_model_len=1024", "type": "BadRequestError", "param": "max_tokens", "code": 400}}"#;
        assert!(
            matches!(failure(400, long), Failure::UpstreamRefused { param: Some(param), .. } if param == "max_tokens")
        );
        let param = r#"{"error": {"message": "must be positive", "param": "top_k"}}"#;
        let expected = Failure::UpstreamRefused {
            name: "big".to_owned(),
            param: Some("top_k".to_owned()),
            reason: "must be positive".to_owned(),
        };
        assert_eq!(failure(422, param), expected);
        for body in [r#"{"error": "no such thing"}"#, r#"{"detail": "no such thing"}"#] {
            assert!(failure(400, body).to_string().ends_with("no such thing"), "{body}");
        }
        assert_eq!(failure(400, "<html>").to_string().split(": ").last(), Some("status 400"));
    }

    #[test]
    fn what_it_thinks_of_our_key_is_not_the_clients_fault_and_not_repeated() {
        let said = failure(401, r#"{"error": {"message": "Incorrect API key provided: sk-1"}}"#);
        assert!(matches!(&said, Failure::UpstreamFailed { reason, .. } if !reason.contains("sk-1")), "{said}");
        let said = failure(500, r#"{"error": {"message": "bad\nheader Bearer sk-1"}}"#);
        assert!(said.to_string().ends_with("status 500: bad header Bearer ***"), "{said}");
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let trouble = |status| Trouble::of_status(status, Some(7), b"", None);
        for status in [429, 502, 503, 504] {
            assert!(trouble(status).may_pass(), "{status}");
        }
        for status in [200, 302, 400, 401, 404, 500] {
            assert!(!trouble(status).may_pass(), "{status}");
        }
        assert_eq!(trouble(429).retry_after(), Some(Duration::from_secs(7)));
        let busy = Trouble::Busy { retry_after_s: Some(u32::MAX) }.failure("big");
        assert!(matches!(busy, Failure::UpstreamBusy { retry_after_s: RETRY_AFTER_S_MAX, .. }));
    }

    #[test]
    fn a_long_message_is_cut() {
        assert_eq!(clean(&"é".repeat(5000), None).chars().count(), MESSAGE_CHARS_MAX);
    }
}
