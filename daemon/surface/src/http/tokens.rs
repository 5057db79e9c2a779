//! `POST /tokenize`, `POST /detokenize`, `GET /props` as llama.cpp has them, and what models here cannot do.

use super::Shared;
use super::body::Body;
use crate::bodies::tokens;
use crate::refusal::Refusal;
use axum::extract::State;
use axum::{Extension, Json};
use serde_json::{Value, json};
use sparsed_engine::DEFAULT_MODEL;
use sparsed_engine::api::Owner;

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
        "default_generation_settings": { "n_ctx": served.max_context },
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
    let message = "no model of this daemon makes embeddings: they generate text".to_owned();
    Refusal::unreadable(400, "unsupported_model_capability", Some("model".to_owned()), message)
}
