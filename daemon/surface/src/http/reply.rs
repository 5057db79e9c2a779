//! How does HTTP carry an answer? As one JSON body, or as server-sent events.

use crate::bodies::{Answering, Asked, Piece, Wire};
use crate::refusal::Refusal;
use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use sparsed_engine::Service;
use std::convert::Infallible;

/// Hands the request to the engine and answers as the client wants it.
///
/// # Errors
/// Why no answer has begun.
pub(crate) async fn reply<W: Wire>(service: &Service, asked: Asked<W>) -> Result<Response, Refusal> {
    let streams = asked.reply.stream;
    let mut answering = Answering::begin(service, asked).await?;
    if !streams {
        return Ok(Json(answering.whole().await?).into_response());
    }
    answering.open();
    let events = stream::unfold(Some(answering), |answering| async move {
        let mut answering = answering?;
        let (data, rest) = match answering.next().await {
            Some(Piece::Chunk(chunk)) => (chunk.to_string(), Some(answering)),
            Some(Piece::Failed(refusal)) => (refusal.body().to_string(), None),
            None => ("[DONE]".to_owned(), None),
        };
        Some((Ok::<_, Infallible>(Event::default().data(data)), rest))
    });
    // Comments keep proxies awake during a long prefill.
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}
