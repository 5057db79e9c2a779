//! How does HTTP say that something failed? OpenAI's error object with its status.

use crate::refusal::Refusal;
use axum::extract::OriginalUri;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.name().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

pub(crate) async fn no_such_path(method: Method, OriginalUri(uri): OriginalUri) -> Refusal {
    Refusal::unreadable(404, "not_found", None, format!("there is no {method} {}", uri.path()))
}

pub(crate) async fn no_such_method(method: Method, OriginalUri(uri): OriginalUri) -> Refusal {
    Refusal::unreadable(405, "method_not_allowed", None, format!("{} does not take {method}", uri.path()))
}
