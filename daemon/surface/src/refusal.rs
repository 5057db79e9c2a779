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
    /// Whether the same request may be answered another time: it says nothing of the request itself.
    pub(crate) may_pass: bool,
}

/// What a door refuses by itself, before the engine is asked or beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtDoor {
    /// An answer that its reader does not take.
    AnswerTooLarge,
    /// A body did not come in time.
    BodyTimeout,
    /// A body is longer than bodies may be.
    BodyTooLarge,
    /// The client ended it.
    Cancelled,
    /// A page of another site, or a name that is not this box's.
    Forbidden,
    /// Another request has its id.
    IdConflict,
    /// No key, or a wrong one.
    InvalidApiKey,
    /// A body that broke off.
    InvalidBody,
    /// A body that is no JSON.
    InvalidJson,
    /// A path that cannot be read.
    InvalidPath,
    /// A field that is not what it must be.
    InvalidValue,
    /// A path that does not take the method.
    MethodNotAllowed,
    /// A path that there is not.
    NotFound,
    /// What other servers have on this path.
    NotSupported,
    /// Another response goes on from this one.
    ResponseInUse,
    /// No such response.
    ResponseNotFound,
    /// Bodies hold all the memory that they may.
    TooManyBodies,
    /// The caller has all the leases that it may have.
    TooManyLeases,
    /// What no model here can do.
    UnsupportedCapability,
    /// A compressed body.
    UnsupportedEncoding,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const RATE: &str = "rate_limit_error";
/// OpenAI's for what does not pass by waiting.
const QUOTA: &str = "insufficient_quota";
/// The code of what only this daemon's own doors hear: they begin elsewhere then.
const SESSION_WENT_ON: &str = "session_went_on";
/// When a client should look again for a model that is loading.
const LOADING_RETRY_S: u32 = 2;

impl Refusal {
    /// A 400 about `param`.
    pub(crate) fn invalid(param: &str, reason: impl Into<String>) -> Self {
        Failure::invalid(param, reason).into()
    }

    /// What a door refuses by itself, about `param` where it is about a field.
    pub(crate) fn at_door(what: AtDoor, param: Option<&str>, message: impl Into<String>) -> Self {
        let (param, message) = (param.map(str::to_owned), message.into());
        Self { name: at_door(what), param, retry_after_s: None, message }
    }

    /// Bodies hold all the memory they may for now.
    pub(crate) fn too_many_bodies() -> Self {
        let message = "too many large requests at a time; try again in a second";
        Self { retry_after_s: Some(1), ..Self::at_door(AtDoor::TooManyBodies, None, message) }
    }

    /// Answers on their way hold all the memory they may for now.
    pub(crate) fn too_many_answers() -> Self {
        Self::too_many_bodies().saying("too many large answers on their way; try again in a second".to_owned())
    }

    /// A caller has all the leases of models it may have.
    pub(crate) fn too_many_leases(limit: u32) -> Self {
        let message = format!("you have {limit} leases of models, which is all you may have at a time");
        Self::at_door(AtDoor::TooManyLeases, None, message)
    }

    /// A door has as many requests as it may, and says so in `message`.
    pub(crate) fn door_full(message: String) -> Self {
        Self::from(Failure::QueueFull { limit: 0, retry_after_s: 1 }).saying(message)
    }

    /// Whether the same request may be answered another time.
    pub(crate) fn may_pass(&self) -> bool {
        self.name.may_pass
    }

    /// Whether a turn has come too late to go on from what it was to go on from.
    pub(crate) fn is_too_late(&self) -> bool {
        self.name.code == SESSION_WENT_ON
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

/// The table. Whether a failure may pass is its own to say, since sessions ask it too.
fn name(failure: &Failure) -> Name {
    let (status, kind, code) = match failure {
        Failure::ModelNotFound { .. } => (404, INVALID, "model_not_found"),
        Failure::ModelLoading { .. } => (503, SERVER, "model_loading"),
        Failure::ModelUnloaded { .. } => (503, SERVER, "model_unloaded"),
        Failure::ModelUnavailable { .. } => (503, SERVER, "model_unavailable"),
        Failure::ContextTooLong { .. } => (400, INVALID, "context_length_exceeded"),
        Failure::InvalidRequest { .. } => return at_door(AtDoor::InvalidValue),
        Failure::QueueFull { .. } => (429, RATE, "queue_full"),
        Failure::UserQueueFull { .. } => (429, RATE, "user_queue_full"),
        Failure::TooManyRequests { .. } => (429, RATE, "too_many_requests"),
        Failure::UserTokensFull { .. } => (429, RATE, "user_tokens_full"),
        Failure::UserKvFull { .. } => (429, QUOTA, "user_kv_full"),
        Failure::MemoryShort { .. } => (503, SERVER, "memory_short"),
        Failure::DeadlineExceeded { .. } => (504, SERVER, "deadline_exceeded"),
        Failure::SlowConsumer { .. } => (408, INVALID, "slow_consumer"),
        Failure::CutOff => (500, SERVER, "cut_off"),
        Failure::ShuttingDown => (503, SERVER, "shutting_down"),
        Failure::GrammarFailed { .. } => (400, INVALID, "grammar_failed"),
        Failure::BackendFailed { .. } => (500, SERVER, "backend_failed"),
        Failure::SessionsOff => (501, INVALID, "sessions_off"),
        Failure::SessionsAway { .. } => (503, SERVER, "sessions_away"),
        Failure::SessionsOverloaded { .. } => (503, SERVER, "sessions_overloaded"),
        Failure::SessionNotFound { .. } => (404, INVALID, "session_not_found"),
        Failure::SessionBusy { .. } | Failure::SessionCut { .. } => (409, INVALID, "session_busy"),
        Failure::SessionWentOn { .. } => (409, INVALID, SESSION_WENT_ON),
        Failure::SessionOfOtherModel { .. } => (409, INVALID, "session_of_other_model"),
        Failure::SessionLimit { .. } => (429, QUOTA, "session_limit"),
        Failure::SessionDamaged { .. } => (500, SERVER, "session_damaged"),
        Failure::DiskFailed { .. } => (507, SERVER, "disk_failed"),
        _ => return elsewhere(failure),
    };
    Name { status, kind, code, may_pass: failure.may_pass() }
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
    Name { status, kind, code, may_pass: failure.may_pass() }
}

/// The table's part about what doors refuse by themselves.
fn at_door(what: AtDoor) -> Name {
    let (status, kind, code, may_pass) = match what {
        AtDoor::AnswerTooLarge => (413, INVALID, "answer_too_large", false),
        AtDoor::BodyTimeout => (408, INVALID, "body_timeout", true),
        AtDoor::BodyTooLarge => (413, INVALID, "body_too_large", false),
        AtDoor::Cancelled => (499, INVALID, "cancelled", false),
        AtDoor::Forbidden => (403, INVALID, "forbidden", false),
        AtDoor::IdConflict => (409, INVALID, "id_conflict", false),
        AtDoor::InvalidApiKey => (401, INVALID, "invalid_api_key", false),
        AtDoor::InvalidBody => (400, INVALID, "invalid_body", true),
        AtDoor::InvalidJson => (400, INVALID, "invalid_json", false),
        AtDoor::InvalidPath => (400, INVALID, "invalid_path", false),
        AtDoor::InvalidValue => (400, INVALID, "invalid_value", false),
        AtDoor::MethodNotAllowed => (405, INVALID, "method_not_allowed", false),
        AtDoor::NotFound => (404, INVALID, "not_found", false),
        AtDoor::NotSupported => (501, INVALID, "not_supported", false),
        AtDoor::ResponseInUse => (409, INVALID, "response_in_use", false),
        AtDoor::ResponseNotFound => (404, INVALID, "response_not_found", false),
        AtDoor::TooManyBodies => (429, RATE, "too_many_bodies", true),
        AtDoor::TooManyLeases => (429, RATE, "too_many_leases", true),
        AtDoor::UnsupportedCapability => (400, INVALID, "unsupported_model_capability", false),
        AtDoor::UnsupportedEncoding => (415, INVALID, "unsupported_content_encoding", false),
    };
    Name { status, kind, code, may_pass }
}

/// The table's part about models that are added.
impl From<AddFailure> for Refusal {
    fn from(failure: AddFailure) -> Self {
        let (status, kind, code, may_pass) = match &failure {
            AddFailure::Invalid { param, reason } => return Self::invalid(param, reason.as_str()),
            AddFailure::TooLarge { .. } => (413, INVALID, "model_too_large", false),
            AddFailure::NoRoom(_) => (507, SERVER, "store_full", true),
            AddFailure::Changed(_) => (409, INVALID, "file_changed", true),
            AddFailure::NoModel(_) => (400, INVALID, "invalid_model", false),
            AddFailure::OtherDigest { .. } => (400, INVALID, "digest_mismatch", false),
            AddFailure::Busy { .. } => (429, RATE, "store_busy", true),
            AddFailure::Stopped => return Self::at_door(AtDoor::Cancelled, None, failure.to_string()),
            AddFailure::Store(_) => (507, SERVER, "store_failed", true),
        };
        let name = Name { status, kind, code, may_pass };
        Self { name, param: None, retry_after_s: None, message: failure.to_string() }
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
            | Failure::SessionsOverloaded { retry_after_s, .. }
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

    #[test]
    fn what_waiting_cures_is_told_from_what_it_does_not() {
        let id = || "sess_1".to_owned();
        let reason = || "x".to_owned();
        for passes in [
            Failure::SessionBusy { id: id(), state: "answering" },
            Failure::SessionCut { id: id() },
            Failure::SessionsAway { retry_after_s: 5 },
            Failure::TooManyRequests { limit: 1, retry_after_s: 1 },
            Failure::DeadlineExceeded { deadline_ms: 1 },
            Failure::BackendFailed { reason: reason() },
            Failure::DiskFailed { reason: reason() },
        ] {
            assert!(Refusal::from(passes.clone()).may_pass(), "{passes}");
        }
        for stays in [
            Failure::SessionLimit { what: "sessions", limit: 3 },
            Failure::UserKvFull { limit_bytes: 1 },
            Failure::SessionDamaged { reason: reason() },
            Failure::SessionNotFound { id: id() },
            Failure::SessionsOff,
            Failure::GrammarFailed { reason: reason() },
        ] {
            assert!(!Refusal::from(stays.clone()).may_pass(), "{stays}");
        }
        assert!(Refusal::door_full(reason()).may_pass() && Refusal::too_many_bodies().may_pass());
        assert!(!Refusal::at_door(AtDoor::IdConflict, Some("id"), "x").may_pass());
    }
}
