//! How does a failure look? OpenAI's error object, and the one table from failures to statuses.

use axum::extract::OriginalUri;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sparsed_engine::api::Failure;

/// A failure on its way to a client.
#[derive(Clone, Debug)]
pub(crate) struct HttpError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<String>,
    retry_after_s: Option<u32>,
    message: String,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
/// When a client should look again for a model that is loading.
const LOADING_RETRY_S: u32 = 2;

impl HttpError {
    /// A 400 about `param`.
    pub(crate) fn invalid(param: &str, reason: impl Into<String>) -> Self {
        Failure::invalid(param, reason).into()
    }

    /// A request that could not be read, with its own status.
    pub(crate) fn unreadable(status: StatusCode, code: &'static str, param: Option<String>, message: String) -> Self {
        Self { status, kind: INVALID, code, param, retry_after_s: None, message }
    }

    /// Bodies hold all the memory they may for now.
    pub(crate) fn too_many_bodies() -> Self {
        let message = "too many large requests at a time; try again in a second".to_owned();
        let (status, kind) = (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error");
        Self { status, kind, code: "too_many_bodies", param: None, retry_after_s: Some(1), message }
    }

    /// The same failure, where the prompt stands in another field than `messages`.
    pub(crate) fn about_prompt(mut self) -> Self {
        if self.code == "context_length_exceeded" {
            self.param = Some("prompt".to_owned());
        }
        self
    }

    /// The error object, as it also stands in a stream that has begun.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl From<Failure> for HttpError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        let (status, kind, code) = match &failure {
            Failure::ModelNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            Failure::ModelLoading { .. } => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "model_loading"),
            Failure::ModelUnavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "model_unavailable"),
            Failure::ContextTooLong { .. } => (StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded"),
            Failure::InvalidRequest { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_value"),
            Failure::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full"),
            Failure::UserQueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "user_queue_full"),
            Failure::MemoryShort { .. } => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "memory_short"),
            Failure::DeadlineMissed { .. } => (StatusCode::GATEWAY_TIMEOUT, SERVER, "deadline_missed"),
            Failure::SlowConsumer { .. } => (StatusCode::REQUEST_TIMEOUT, INVALID, "slow_consumer"),
            Failure::CutOff => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "cut_off"),
            Failure::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "shutting_down"),
            Failure::GrammarFailed { .. } => (StatusCode::BAD_REQUEST, INVALID, "grammar_failed"),
            Failure::BackendFailed { .. } => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "backend_failed"),
            Failure::SessionsOff => (StatusCode::NOT_IMPLEMENTED, INVALID, "sessions_off"),
            Failure::SessionNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, "session_not_found"),
            Failure::SessionBusy { .. } | Failure::SessionCut { .. } => (StatusCode::CONFLICT, INVALID, "session_busy"),
            Failure::SessionOfOtherModel { .. } => (StatusCode::CONFLICT, INVALID, "session_of_other_model"),
            Failure::SessionLimit { .. } => (StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", "session_limit"),
            Failure::SessionDamaged { .. } => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "session_damaged"),
            Failure::DiskFailed { .. } => (StatusCode::INSUFFICIENT_STORAGE, SERVER, "disk_failed"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error"),
        };
        let retry_after_s = match &failure {
            Failure::QueueFull { retry_after_s, .. }
            | Failure::UserQueueFull { retry_after_s, .. }
            | Failure::MemoryShort { retry_after_s } => Some(*retry_after_s),
            Failure::ModelLoading { .. } => Some(LOADING_RETRY_S),
            _ => None,
        };
        let param = match failure {
            Failure::InvalidRequest { param, .. } => Some(param),
            Failure::ModelNotFound { .. } => Some("model".to_owned()),
            Failure::ContextTooLong { .. } => Some("messages".to_owned()),
            Failure::SessionNotFound { .. } | Failure::SessionBusy { .. } => Some("session_id".to_owned()),
            _ => None,
        };
        Self { status, kind, code, param, retry_after_s, message }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

pub(crate) async fn no_such_path(method: Method, OriginalUri(uri): OriginalUri) -> HttpError {
    let message = format!("there is no {method} {}", uri.path());
    HttpError::unreadable(StatusCode::NOT_FOUND, "not_found", None, message)
}

pub(crate) async fn no_such_method(method: Method, OriginalUri(uri): OriginalUri) -> HttpError {
    let message = format!("{} does not take {method}", uri.path());
    HttpError::unreadable(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", None, message)
}
