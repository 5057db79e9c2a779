//! `POST /v1/chat/completions`.

use super::Shared;
use super::body::Body;
use super::reply::reply;
use crate::bodies::ChatAsk;
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
    let ask = ChatAsk::read(body.bytes())?;
    let asked = ask.prepare(&shared.service, owner, body.into_share()).await?;
    reply(&shared.service, asked).await
}
