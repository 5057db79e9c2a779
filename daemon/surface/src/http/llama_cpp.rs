//! llama.cpp's own paths: `POST /completion`, `/apply-template`, `/tokenize`, `/detokenize`, `GET /props`, and what
//! models here cannot do.

use super::Shared;
use super::body::Body;
use super::reply::events;
use crate::bodies::{ChatAsk, CompletionAsk, native, size, tokens};
use crate::refusal::{AtDoor, Refusal};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::stream;
use serde_json::{Value, json};
use sparsed_engine::DEFAULT_MODEL;
use sparsed_engine::api::Owner;

pub(crate) async fn complete(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refusal> {
    let wanted = native::wanted(body.bytes())?;
    let (asked, streams) = (CompletionAsk::read(wanted.body.to_string().as_bytes())?, wanted.stream);
    let asked = asked.prepare(&shared.service, owner, body.into_share()).await.map_err(Refusal::about_prompt)?;
    let speaking = native::Speaking::begin(&shared.service, wanted, asked).await?;
    if !streams {
        return Ok(Json(speaking.whole().await?).into_response());
    }
    // Its streams end without a mark.
    Ok(events(stream::unfold(speaking, |mut speaking| async move {
        let piece = speaking.next().await?.unwrap_or_else(|refusal| refusal.body());
        Some((piece.to_string(), speaking))
    })))
}

pub(crate) async fn apply_template(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let ask = ChatAsk::read(body.bytes())?;
    Ok(Json(size::text_of_chat(&shared.service, owner, ask, body.into_share()).await?))
}

pub(crate) async fn tokenize(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let bytes = body.bytes().to_vec();
    Ok(Json(tokens::tokenize(&shared.service, owner, &bytes, body.into_share()).await?))
}

pub(crate) async fn detokenize(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let bytes = body.bytes().to_vec();
    Ok(Json(tokens::detokenize(&shared.service, owner, &bytes, body.into_share()).await?))
}

/// `GET /props`: what a llama.cpp client asks of the default model.
pub(crate) async fn props(State(shared): State<Shared>) -> Result<Json<Value>, Refusal> {
    let served = shared.service.model(DEFAULT_MODEL)?;
    let tokenizer = served.model.tokenizer();
    let name = |id: Option<u32>| id.and_then(|id| tokenizer?.token_name(id)).unwrap_or_default();
    Ok(Json(json!({
        "default_generation_settings": { "n_ctx": served.stateless_context },
        "model_alias": DEFAULT_MODEL,
        "model_path": served.model.name(),
        "modalities": { "vision": false, "audio": false },
        "bos_token": name(tokenizer.and_then(|tokenizer| tokenizer.bos())),
        "eos_token": name(tokenizer.and_then(|tokenizer| tokenizer.eos())),
        "build_info": concat!("sparsed-", env!("CARGO_PKG_VERSION")),
    })))
}

/// `POST /v1/embeddings`: no model of this daemon makes any.
pub(crate) async fn embeddings() -> Refusal {
    let message = "no model of this daemon makes embeddings: they generate text";
    Refusal::at_door(AtDoor::UnsupportedCapability, Some("model"), message)
}

/// `GET /slots`: sequences share one pool.
pub(crate) async fn slots() -> Refusal {
    not_there("there are no slots: sequences share one pool; /v1/status says what is running and waiting")
}

/// `POST /infill`: no model here was made for it.
pub(crate) async fn infill() -> Refusal {
    not_there("text is not filled in here: no model of this daemon has the tokens for it")
}

/// `POST /rerank`: no model here does it.
pub(crate) async fn rerank() -> Refusal {
    not_there("no model of this daemon ranks documents: they generate text")
}

/// `/lora-adapters`: models are served as they are.
pub(crate) async fn adapters() -> Refusal {
    not_there("adapters are not served: models are served as they are")
}

fn not_there(message: &str) -> Refusal {
    Refusal::at_door(AtDoor::NotSupported, None, message)
}
