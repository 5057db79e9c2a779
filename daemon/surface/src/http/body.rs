//! How does a body become a request? Bounded, parsed once, and every refusal says where.

use super::error::HttpError;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;

/// A body that has arrived. The content type is not looked at, as OpenAI's servers and llama.cpp's don't.
pub(crate) struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = HttpError;

    async fn from_request(request: Request, state: &S) -> Result<Self, HttpError> {
        Bytes::from_request(request, state).await.map(Self).map_err(unread)
    }
}

impl Body {
    /// The fields of `T`, others ignored. Read once per kind of fields: a flattened struct would lose the names of
    /// wrong fields.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, HttpError> {
        parse(&self.0)
    }
}

fn unread(rejection: BytesRejection) -> HttpError {
    let message = rejection.body_text();
    let status = rejection.into_response().status();
    let code = if status == StatusCode::PAYLOAD_TOO_LARGE { "body_too_large" } else { "invalid_body" };
    HttpError::unreadable(status, code, None, message)
}

/// serde_json refuses values nested deeper than 128.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, HttpError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let param = (path != "." && path != "?").then(|| path.clone());
        let message = match &param {
            Some(path) => format!("'{path}': {}", error.inner()),
            None => format!("the body is not the JSON expected: {}", error.inner()),
        };
        HttpError::unreadable(StatusCode::BAD_REQUEST, "invalid_json", param, message)
    })?;
    json.end().map_err(|error| {
        HttpError::unreadable(StatusCode::BAD_REQUEST, "invalid_json", None, format!("after the body: {error}"))
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Point {
        at: Vec<u32>,
    }

    fn refused(text: &str) -> String {
        parse::<Point>(text.as_bytes()).err().expect("refused").body()["error"]["message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn refusals_name_the_place() {
        assert!(refused(r#"{"at": [1, "x"]}"#).contains("'at[1]'"));
        assert!(refused("{").contains("EOF"));
        assert!(refused(r#"{"at": []} x"#).contains("after the body"));
        assert!(refused(&format!("{}1{}", "[".repeat(200), "]".repeat(200))).contains("invalid type"));
    }
}
