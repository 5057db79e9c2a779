//! What is served, and how is it? `/v1/models`, `/health` and `/v1/status`.

use super::Shared;
use crate::bodies::models;
use crate::refusal::{AtDoor, Refusal};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};
use sparsed_engine::api::Owner;

/// `GET /health`: 200 once a request for the default model would be served, 503 before, as llama.cpp's server does.
/// Without a device it is 503 too, though requests are taken and wait; `degraded` is served by another device.
pub(crate) async fn health(State(shared): State<Shared>) -> Response {
    let health = models::health(&shared.service);
    let (status, text) = match health.state {
        "ready" => (StatusCode::OK, "ok"),
        "degraded" => (StatusCode::OK, "degraded"),
        "starting" => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        other => (StatusCode::SERVICE_UNAVAILABLE, other),
    };
    let mut said = json!({ "status": text });
    if text != "ok" {
        said["detail"] = json!(health.text);
    }
    (status, Json(said)).into_response()
}

/// `GET /v1/models`: models that may be asked for.
pub(crate) async fn list(State(shared): State<Shared>) -> Json<Value> {
    Json(models::list(&shared.service))
}

/// `GET /v1/models/{id}`; names have slashes, and not every client writes them as `%2F`.
pub(crate) async fn one(
    State(shared): State<Shared>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, Refusal> {
    let Path(id) = id.map_err(|error| Refusal::at_door(AtDoor::InvalidPath, Some("model"), error.body_text()))?;
    Ok(Json(models::one(&shared.service, &id)?))
}

/// `GET /v1/status`.
pub(crate) async fn status(State(shared): State<Shared>, Extension(owner): Extension<Owner>) -> Json<Value> {
    Json(models::status(&shared.service, owner))
}
