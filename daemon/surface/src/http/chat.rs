//! `POST /v1/chat/completions`, and how many tokens one would have.

use super::Shared;
use super::body::Body;
use super::reply::reply;
use crate::bodies::{ChatAsk, size};
use crate::refusal::Refusal;
use axum::extract::State;
use axum::response::Response;
use axum::{Extension, Json};
use serde_json::Value;
use sparsed_engine::api::Owner;

pub(crate) async fn create(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refusal> {
    let ask = ChatAsk::read(body.bytes())?;
    let asked = ask.prepare(&shared.service, owner, body.into_share()).await?;
    reply(&shared.service, asked).await
}

/// `POST /v1/chat/completions/input_tokens`, as llama.cpp has it.
pub(crate) async fn count(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let ask = ChatAsk::read(body.bytes())?;
    Ok(Json(size::of_chat(&shared.service, owner, ask, body.into_share()).await?))
}
