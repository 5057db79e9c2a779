//! `POST /v1/completions`.

use super::Shared;
use super::body::Body;
use super::reply::reply;
use crate::bodies::CompletionAsk;
use crate::refusal::Refusal;
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use sparsed_engine::api::Owner;

pub(crate) async fn create(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refusal> {
    let ask = CompletionAsk::read(body.bytes())?;
    let asked = ask.prepare(&shared.service, owner, body.into_share()).await.map_err(Refusal::about_prompt)?;
    reply(&shared.service, asked).await.map_err(Refusal::about_prompt)
}
