//! How does a failure look? The one table from failures to what each door calls them.

use crate::additions::AddFailure;
use serde_json::{Value, json};
use sparsed_engine::api::Failure;

/// A failure on its way to a client, by whichever door.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    name: Name,
    param: Option<String>,
    retry_after_s: Option<u32>,
    message: String,
}

/// What a kind of failure is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// HTTP's status.
    pub(crate) status: u16,
    /// OpenAI's `error.type`.
    pub(crate) kind: &'static str,
    /// `error.code`, on every door.
    pub(crate) code: &'static str,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const RATE: &str = "rate_limit_error";
/// OpenAI's for what does not pass by waiting.
const QUOTA: &str = "insufficient_quota";
/// When a client should look again for a model that is loading.
const LOADING_RETRY_S: u32 = 2;

impl Refusal {
    /// A 400 about `param`.
    pub(crate) fn invalid(param: &str, reason: impl Into<String>) -> Self {
        Failure::invalid(param, reason).into()
    }

    /// A request that could not be read, with its own status.
    pub(crate) fn unreadable(status: u16, code: &'static str, param: Option<String>, message: String) -> Self {
        Self { name: Name { status, kind: INVALID, code }, param, retry_after_s: None, message }
    }

    /// Bodies hold all the memory they may for now.
    pub(crate) fn too_many_bodies() -> Self {
        let message = "too many large requests at a time; try again in a second".to_owned();
        let name = Name { status: 429, kind: RATE, code: "too_many_bodies" };
        Self { name, param: None, retry_after_s: Some(1), message }
    }

    /// A caller has all the leases of models it may have.
    pub(crate) fn too_many_leases(limit: u32) -> Self {
        let message = format!("you have {limit} leases of models, which is all you may have at a time");
        let name = Name { status: 429, kind: RATE, code: "too_many_leases" };
        Self { name, param: None, retry_after_s: None, message }
    }

    /// A door has as many requests as it may, and says so in `message`.
    pub(crate) fn door_full(message: String) -> Self {
        let name = Name { status: 429, kind: RATE, code: "queue_full" };
        Self { name, param: None, retry_after_s: Some(1), message }
    }

    /// Whether the same request may be answered another time: the failure says nothing of the request itself.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.name.status, 408 | 429 | 500 | 502..)
    }

    /// The same failure in other words.
    pub(crate) fn saying(mut self, message: String) -> Self {
        self.message = message;
        self
    }

    /// The same failure, where the prompt stands in another field than `messages`.
    pub(crate) fn about_prompt(mut self) -> Self {
        if self.name.code == "context_length_exceeded" {
            self.param = Some("prompt".to_owned());
        }
        self
    }

    /// The same failure, about the field that `rename` makes of its own, where it makes one: where its words begin with
    /// the field they have the other one.
    pub(crate) fn with_param(mut self, rename: impl FnOnce(&str) -> Option<&'static str>) -> Self {
        let Some(own) = &self.param else { return self };
        if let Some(name) = rename(own) {
            if let Some(reason) = self.message.strip_prefix(&format!("'{own}'")) {
                self.message = format!("'{name}'{reason}");
            }
            self.param = Some(name.to_owned());
        }
        self
    }

    /// What it is called.
    pub(crate) fn name(&self) -> Name {
        self.name
    }

    /// For people.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The last part of D-Bus's error name: the code in camel case, so that the table has each failure's name once.
    pub(crate) fn camel_code(&self) -> String {
        let capital = |word: &str| word[..1].to_ascii_uppercase() + &word[1..];
        self.name.code.split('_').filter(|word| !word.is_empty()).map(capital).collect()
    }

    /// After how many seconds the same request may be taken.
    pub(crate) fn retry_after_s(&self) -> Option<u32> {
        self.retry_after_s
    }

    /// OpenAI's error object, as it also stands in a stream that has begun.
    pub(crate) fn body(&self) -> Value {
        let Name { kind, code, .. } = self.name;
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": code } })
    }
}

/// The table.
fn name(failure: &Failure) -> Name {
    let (status, kind, code) = match failure {
        Failure::ModelNotFound { .. } => (404, INVALID, "model_not_found"),
        Failure::ModelLoading { .. } => (503, SERVER, "model_loading"),
        Failure::ModelUnloaded { .. } => (503, SERVER, "model_unloaded"),
        Failure::ModelUnavailable { .. } => (503, SERVER, "model_unavailable"),
        Failure::ContextTooLong { .. } => (400, INVALID, "context_length_exceeded"),
        Failure::InvalidRequest { .. } => (400, INVALID, "invalid_value"),
        Failure::QueueFull { .. } => (429, RATE, "queue_full"),
        Failure::UserQueueFull { .. } => (429, RATE, "user_queue_full"),
        Failure::TooManyRequests { .. } => (429, RATE, "too_many_requests"),
        Failure::UserTokensFull { .. } => (429, RATE, "user_tokens_full"),
        Failure::UserKvFull { .. } => (429, QUOTA, "user_kv_full"),
        Failure::MemoryShort { .. } => (503, SERVER, "memory_short"),
        Failure::DeadlineMissed { .. } => (504, SERVER, "deadline_missed"),
        Failure::SlowConsumer { .. } => (408, INVALID, "slow_consumer"),
        Failure::CutOff => (500, SERVER, "cut_off"),
        Failure::ShuttingDown => (503, SERVER, "shutting_down"),
        Failure::GrammarFailed { .. } => (400, INVALID, "grammar_failed"),
        Failure::BackendFailed { .. } => (500, SERVER, "backend_failed"),
        Failure::SessionsOff => (501, INVALID, "sessions_off"),
        Failure::SessionsAway { .. } => (503, SERVER, "sessions_away"),
        Failure::SessionNotFound { .. } => (404, INVALID, "session_not_found"),
        Failure::SessionBusy { .. } | Failure::SessionCut { .. } => (409, INVALID, "session_busy"),
        Failure::SessionOfOtherModel { .. } => (409, INVALID, "session_of_other_model"),
        Failure::SessionLimit { .. } => (429, QUOTA, "session_limit"),
        Failure::SessionDamaged { .. } => (500, SERVER, "session_damaged"),
        Failure::DiskFailed { .. } => (507, SERVER, "disk_failed"),
        _ => return elsewhere(failure),
    };
    Name { status, kind, code }
}

/// The table's part about engines elsewhere.
fn elsewhere(failure: &Failure) -> Name {
    let (status, kind, code) = match failure {
        Failure::ComputedElsewhere { .. } => (400, INVALID, "computed_elsewhere"),
        Failure::UpstreamUnreachable { .. } => (502, SERVER, "upstream_unreachable"),
        Failure::UpstreamLate { .. } => (504, SERVER, "upstream_timeout"),
        Failure::UpstreamBusy { .. } => (429, RATE, "upstream_busy"),
        Failure::UpstreamFailed { .. } => (502, SERVER, "upstream_failed"),
        Failure::UpstreamRefused { .. } => (400, INVALID, "upstream_refused"),
        Failure::UpstreamContextTooLong { .. } => (400, INVALID, "context_length_exceeded"),
        _ => (500, SERVER, "internal_error"),
    };
    Name { status, kind, code }
}

/// The table's part about models that are added.
impl From<AddFailure> for Refusal {
    fn from(failure: AddFailure) -> Self {
        let (status, kind, code) = match &failure {
            AddFailure::Invalid { param, reason } => return Self::invalid(param, reason.as_str()),
            AddFailure::TooLarge { .. } => (413, INVALID, "model_too_large"),
            AddFailure::NoRoom(_) => (507, SERVER, "store_full"),
            AddFailure::Changed(_) => (409, INVALID, "file_changed"),
            AddFailure::NoModel(_) => (400, INVALID, "invalid_model"),
            AddFailure::OtherDigest { .. } => (400, INVALID, "digest_mismatch"),
            AddFailure::Busy { .. } => (429, RATE, "store_busy"),
            AddFailure::Stopped => (499, INVALID, "cancelled"),
            AddFailure::Store(_) => (507, SERVER, "store_failed"),
        };
        Self { name: Name { status, kind, code }, param: None, retry_after_s: None, message: failure.to_string() }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let (name, message) = (name(&failure), failure.to_string());
        let retry_after_s = match &failure {
            Failure::QueueFull { retry_after_s, .. }
            | Failure::UserQueueFull { retry_after_s, .. }
            | Failure::UpstreamBusy { retry_after_s, .. }
            | Failure::UserTokensFull { retry_after_s, .. }
            | Failure::TooManyRequests { retry_after_s, .. }
            | Failure::SessionsAway { retry_after_s }
            | Failure::MemoryShort { retry_after_s } => Some(*retry_after_s),
            Failure::ModelLoading { .. } => Some(LOADING_RETRY_S),
            _ => None,
        };
        let param = match failure {
            Failure::InvalidRequest { param, .. } => Some(param),
            Failure::UpstreamRefused { param, .. } => param,
            Failure::ModelNotFound { .. } | Failure::ComputedElsewhere { .. } => Some("model".to_owned()),
            Failure::ContextTooLong { .. } | Failure::UpstreamContextTooLong { .. } => Some("messages".to_owned()),
            Failure::SessionNotFound { .. } | Failure::SessionBusy { .. } => Some("session_id".to_owned()),
            _ => None,
        };
        Self { name, param, retry_after_s, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_a_client_knows_by_another_name_has_it_in_the_words_too() {
        let rename = |name: &str| (name == "response_format").then_some("format");
        let error = Refusal::invalid("response_format", "has no 'response_format'").with_param(rename).body();
        assert_eq!(error["error"]["param"], "format");
        assert_eq!(error["error"]["message"], "'format' has no 'response_format'");
        let other = Refusal::invalid("seed", "is wrong").with_param(rename).body();
        assert_eq!((&other["error"]["param"], &other["error"]["message"]), (&"seed".into(), &"'seed' is wrong".into()));
    }
}
