//! How does HTTP say that something failed? OpenAI's error object with its status; below `/api` Ollama's, which is a
//! text.

use crate::refusal::{AtDoor, Refusal};
use axum::body::Body;
use axum::extract::{OriginalUri, Request};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What Ollama's paths begin with.
const OLLAMA: &str = "/api/";

impl IntoResponse for Refusal {
    /// In OpenAI's form. It goes with the response, for who knows the path: [`for_path`].
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.name().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// The response to a request for `path`: of a refusal in the form that clients of that path read.
pub(crate) fn for_path(path: &str, mut response: Response) -> Response {
    match response.extensions_mut().remove::<Refusal>() {
        Some(refusal) if path.starts_with(OLLAMA) => response.map(|_| Body::from(ollamas(&refusal).to_string())),
        _ => response,
    }
}

/// The same for all that is refused behind it.
pub(crate) async fn by_path(request: Request, next: Next) -> Response {
    let uri = request.uri().clone();
    for_path(uri.path(), next.run(request).await)
}

/// A failure in Ollama's words, as it also stands in a stream that has begun.
pub(crate) fn ollamas(refusal: &Refusal) -> Value {
    json!({ "error": refusal.message() })
}

pub(crate) async fn no_such_path(method: Method, OriginalUri(uri): OriginalUri) -> Refusal {
    Refusal::at_door(AtDoor::NotFound, None, format!("there is no {method} {}", uri.path()))
}

pub(crate) async fn no_such_method(method: Method, OriginalUri(uri): OriginalUri) -> Refusal {
    Refusal::at_door(AtDoor::MethodNotAllowed, None, format!("{} does not take {method}", uri.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refusal_has_the_form_of_its_path() {
        let said = async |path: &str| {
            let response = for_path(path, Refusal::too_many_bodies().into_response());
            assert_eq!(response.headers()[header::RETRY_AFTER], "1");
            let bytes = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()["error"].clone()
        };
        assert!(said("/api/nope").await.is_string());
        for path in ["/v1/models", "/api", "/apiary"] {
            assert_eq!(said(path).await["code"], "too_many_bodies", "{path}");
        }
        let other = for_path("/api/tags", "x".into_response());
        assert_eq!(axum::body::to_bytes(other.into_body(), 8).await.unwrap(), "x");
    }
}
