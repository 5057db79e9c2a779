//! How does a body become a request? Bounded, parsed once, and every refusal says where.

use super::Shared;
use crate::bodies::parse;
use crate::refusal::{AtDoor, Refusal};
use crate::shares::Share;
use axum::body::{BodyDataStream, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use bytes::BytesMut;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use sparsed_engine::api::Owner;
use std::time::Duration;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Nobody's: whose request it is, the door has said before.
const NOBODY: Owner = Owner::Uid(u32::MAX);

/// A body that has arrived. The content type is not looked at, as OpenAI's servers and llama.cpp's don't.
pub(crate) struct Body {
    bytes: Bytes,
    /// Its share of what bodies may hold together.
    share: Share,
}

impl FromRequest<Shared> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Refusal> {
        let coding = request.headers().get(header::CONTENT_ENCODING).map(|coding| coding.to_str().unwrap_or_default());
        if coding.is_some_and(|coding| !coding.eq_ignore_ascii_case("identity")) {
            let message = "the body is compressed, which is not served: send it as it is";
            return Err(Refusal::at_door(AtDoor::UnsupportedEncoding, None, message));
        }
        let most = shared.body_bytes_max;
        let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let length: usize = length.unwrap_or(most);
        if length > most {
            return Err(too_large(&format!("{length} bytes"), most));
        }
        let owner = request.extensions().get::<Owner>().copied().unwrap_or(NOBODY);
        let taken = shared.bodies.take(owner, length.div_ceil(1024));
        let (share, given_up) = taken.ok_or_else(Refusal::too_many_bodies)?;
        let mut pieces = request.into_body().into_data_stream();
        let arrived = tokio::select! {
            arrived = tokio::time::timeout(BODY_TIMEOUT, gathered(&mut pieces, most)) => arrived,
            Ok(()) = given_up => return Err(Refusal::too_many_bodies()),
        };
        let arrived = arrived.map_err(|_| {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Refusal::at_door(AtDoor::BodyTimeout, None, message)
        })?;
        if let Some(bytes) = arrived? {
            return if share.has_arrived() { Ok(Self { bytes, share }) } else { Err(Refusal::too_many_bodies()) };
        }
        Err(too_large("more bytes", most))
    }
}

/// The whole body; nothing where it is longer than `most` bytes.
async fn gathered(pieces: &mut BodyDataStream, most: usize) -> Result<Option<Bytes>, Refusal> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece
            .map_err(|error| Refusal::at_door(AtDoor::InvalidBody, None, format!("the body broke off: {error}")))?;
        if bytes.len() + piece.len() > most {
            return Ok(None);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(bytes.freeze()))
}

fn too_large(what: &str, most: usize) -> Refusal {
    Refusal::at_door(AtDoor::BodyTooLarge, None, format!("the body has {what}, the limit is {most} (limits.body)"))
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
    pub(crate) fn into_share(self) -> Share {
        self.share
    }
}
