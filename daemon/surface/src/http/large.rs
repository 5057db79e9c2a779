//! How does an answer leave that is there as a whole? In pieces, and with a share of what such answers may hold until
//! its client has taken them.
//!
//! Nothing else bounds them: they are as long as what was said, and a client may ask for as many as it has connections.

use super::Shared;
use crate::refusal::Refusal;
use crate::shares::{Share, Shares};
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};
use serde_json::Value;
use sparsed_engine::api::Owner;
use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Largest bodies that answers on their way may hold together.
const ANSWERS_MAX: usize = 4;
/// Answers that are made at a time: they have no share before it is known how long they are.
const MADE_MAX: usize = 2;
/// Bytes that are handed on at a time. Shorter answers have no share: a connection holds as much anyway.
const PIECE_BYTES: usize = 64 << 10;

/// What answers may hold that are there as a whole; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Answers {
    shares: Arc<Shares>,
    /// In KiB.
    most: usize,
    making: Arc<Semaphore>,
}

impl Answers {
    pub(super) fn new(body_bytes_max: usize) -> Self {
        let most = ANSWERS_MAX * body_bytes_max.div_ceil(1024);
        Self { shares: Arc::new(Shares::new(most)), most, making: Arc::new(Semaphore::new(MADE_MAX)) }
    }

    /// A share for `n_bytes` of `owner`'s, where one is needed. An answer that is longer than all may be is sent alone.
    pub(super) fn take(&self, owner: Owner, n_bytes: usize) -> Result<Option<Share>, Refusal> {
        if n_bytes <= PIECE_BYTES {
            return Ok(None);
        }
        let share = self.shares.take_whole(owner, n_bytes.div_ceil(1024).min(self.most));
        share.map(Some).ok_or_else(Refusal::too_many_answers)
    }
}

/// The bytes that `making` gives, of this content type.
///
/// # Errors
/// Those of `making`; that there is no room for them.
pub(super) async fn bytes(
    shared: &Shared,
    owner: Owner,
    content_type: &'static str,
    making: impl Future<Output = Result<Vec<u8>, Refusal>>,
) -> Result<Response, Refusal> {
    let (bytes, share) = {
        let _turn = shared.answers.making.acquire().await.expect("the semaphore is never closed");
        let bytes = making.await?;
        let share = shared.answers.take(owner, bytes.len())?;
        (bytes, share)
    };
    let n_bytes = bytes.len();
    let body = match share {
        None => Body::from(bytes),
        Some(share) => Body::from_stream(pieces(bytes, share)),
    };
    let head = [(header::CONTENT_TYPE, content_type.to_owned()), (header::CONTENT_LENGTH, n_bytes.to_string())];
    Ok((head, body).into_response())
}

/// The object that `making` gives.
///
/// # Errors
/// As [`bytes`].
pub(super) async fn json(
    shared: &Shared,
    owner: Owner,
    making: impl Future<Output = Result<Value, Refusal>>,
) -> Result<Response, Refusal> {
    bytes(shared, owner, "application/json", async { Ok(making.await?.to_string().into_bytes()) }).await
}

/// Copies of what is to be sent, so that it goes as a whole once the last one is on its way.
fn pieces(bytes: Vec<u8>, share: Share) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold((bytes, 0, share), |(bytes, at, share)| async move {
        let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
        let piece = Bytes::copy_from_slice(rest.get(..PIECE_BYTES).unwrap_or(rest));
        let at = at + piece.len();
        Some((Ok(piece), (bytes, at, share)))
    })
}
