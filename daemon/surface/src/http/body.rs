//! How does a body become a request? Bounded, parsed once, and every refusal says where.

use super::Shared;
use crate::bodies::parse;
use crate::refusal::Refusal;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A body that has arrived. The content type is not looked at, as OpenAI's servers and llama.cpp's don't.
pub(crate) struct Body {
    bytes: Bytes,
    /// Its share of what bodies may hold together.
    share: OwnedSemaphorePermit,
}

impl FromRequest<Shared> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Refusal> {
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let length: usize = length.unwrap_or(shared.body_bytes_max);
        if length > shared.body_bytes_max {
            let message = format!("the body has {length} bytes, the limit is {} (limits.body)", shared.body_bytes_max);
            return Err(Refusal::unreadable(413, "body_too_large", None, message));
        }
        let kib = u32::try_from(length.div_ceil(1024)).unwrap_or(u32::MAX);
        let share = Arc::clone(&shared.bodies).try_acquire_many_owned(kib).map_err(|_| Refusal::too_many_bodies())?;
        let bytes = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, shared)).await;
        let bytes = bytes.map_err(|_| {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Refusal::unreadable(408, "body_timeout", None, message)
        })?;
        Ok(Self { bytes: bytes.map_err(unread)?, share })
    }
}

impl Body {
    /// The fields of `T`, others ignored. Read once per kind of fields: a flattened struct would lose the names of
    /// wrong fields.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        parse(&self.bytes)
    }

    /// As [`parse`](Self::parse); an empty body says nothing.
    pub(crate) fn parse_or_default<T: DeserializeOwned + Default>(&self) -> Result<T, Refusal> {
        if self.bytes.is_empty() { Ok(T::default()) } else { self.parse() }
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Lets go of the bytes, but not yet of their share: it goes when the prompt is made.
    pub(crate) fn into_share(self) -> OwnedSemaphorePermit {
        self.share
    }
}

fn unread(rejection: BytesRejection) -> Refusal {
    let message = rejection.body_text();
    let status = rejection.into_response().status();
    let code = if status == StatusCode::PAYLOAD_TOO_LARGE { "body_too_large" } else { "invalid_body" };
    Refusal::unreadable(status.as_u16(), code, None, message)
}
