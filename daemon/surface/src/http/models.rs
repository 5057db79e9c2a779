//! What is served, and how is it? `/v1/models`, `/health` and `/v1/status`.

use super::Shared;
use super::metrics;
use crate::refusal::Refusal;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sparsed_engine::api::Failure;
use sparsed_engine::{DEFAULT_MODEL, DeviceState, DeviceStatus, ModelState, ModelStatus, ServedModel, Service};

/// `GET /health`: 200 once a request for the default model would be served, 503 before, as llama.cpp's server does.
/// Without a device it is 503 too, though requests are taken and wait; `degraded` is served by another device.
pub(crate) async fn health(State(shared): State<Shared>) -> Response {
    let device = shared.service.device();
    let (status, text) = match shared.service.model(DEFAULT_MODEL) {
        Ok(_) if device.state == DeviceState::Recovering => (StatusCode::SERVICE_UNAVAILABLE, "recovering"),
        Ok(_) if device.backend_changed => (StatusCode::OK, "degraded"),
        Ok(_) => (StatusCode::OK, "ok"),
        Err(Failure::ModelLoading { .. }) => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
    };
    (status, Json(json!({ "status": text }))).into_response()
}

/// `GET /v1/models`: models that answer.
pub(crate) async fn list(State(shared): State<Shared>) -> Json<Value> {
    let models = shared.service.models();
    let data = models.iter().filter_map(|status| match &status.state {
        ModelState::Ready(served) => Some(entry(&status.name, served)),
        ModelState::Loading { .. } | ModelState::Failed(_) => None,
    });
    let data: Vec<Value> = data.collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`.
pub(crate) async fn one(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, Refusal> {
    let Path(id) =
        id.map_err(|error| Refusal::unreadable(400, "invalid_path", Some("model".to_owned()), error.body_text()))?;
    let served = shared.service.model(&id)?;
    Ok(Json(entry(&id, &served)))
}

/// `GET /v1/status`: the device, every configured model with its state and load, and whether code of others runs in
/// the daemon; what `sparsectl status` shows.
pub(crate) async fn status(State(shared): State<Shared>) -> Json<Value> {
    let models: Vec<Value> = shared.service.models().iter().map(|model| model_status(&shared.service, model)).collect();
    let third_party = shared.service.third_party_plugins();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "tainted": !third_party.is_empty(),
        "third_party_plugins": third_party,
        "device": device_status(&shared.service.device()),
        "memory": metrics::memory(&shared.service),
        "models": models,
    }))
}

fn device_status(device: &DeviceStatus) -> Value {
    let state = match device.state {
        DeviceState::Loading => "loading",
        DeviceState::Ready => "ready",
        DeviceState::Recovering => "recovering",
    };
    json!({
        "name": device.name,
        "state": state,
        "faults": device.n_faults,
        "last_fault": device.last_fault,
        "backend_changed": device.backend_changed,
    })
}

/// A model as OpenAI lists it, with vLLM's `max_model_len` and llama.cpp's `meta`.
fn entry(id: &str, served: &ServedModel) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": served.created,
        "owned_by": "sparsed",
        "max_model_len": served.max_context,
        "meta": meta(served),
    })
}

fn meta(served: &ServedModel) -> Value {
    let (spec, summary) = (served.model.spec(), served.model.summary());
    json!({
        "name": served.model.name(),
        "n_vocab": spec.vocab_size,
        "n_ctx_train": spec.context_length,
        "n_embd": spec.hidden_size,
        "n_params": summary.parameters,
        "size": served.model.file_bytes(),
        "top_k": served.top_k,
        "kv_bytes_per_token": served.kv_bytes_per_token,
        "label": served.model.label(),
        "has_chat_template": served.model.chat_format().is_some(),
    })
}

fn model_status(service: &Service, status: &ModelStatus) -> Value {
    let (state, detail) = match &status.state {
        ModelState::Loading { progress_permille } => ("loading", json!({ "progress_permille": progress_permille })),
        ModelState::Ready(served) => ("ready", json!({ "max_context": served.max_context, "meta": meta(served) })),
        ModelState::Failed(reason) => ("failed", json!({ "reason": reason })),
    };
    let (stats, load) = (&status.stats, &status.stats.load);
    json!({
        "name": status.name,
        "state": state,
        "detail": detail,
        "running": load.running,
        "waiting": load.waiting,
        "kv_blocks_used": load.blocks_used,
        "kv_blocks_cached": load.blocks_cached,
        "kv_blocks_slow": load.blocks_slow,
        "kv_blocks_total": load.blocks_total,
        "computed_tokens": stats.computed_tokens,
        "sampled_tokens": stats.sampled_tokens,
        "steps": stats.steps,
        "scheduling": metrics::scheduling(service, status),
    })
}
