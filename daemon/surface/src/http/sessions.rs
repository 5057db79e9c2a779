//! `/v1/sessions`: conversations that the daemon keeps, and their turns.
//!
//! A turn is a chat completion with `session_id`, which sends only what is new.

use super::Shared;
use super::body::Body;
use super::large;
use super::reply::reply;
use crate::bodies::sessions;
use crate::refusal::Refusal;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::Value;
use sparsed_engine::api::Owner;

type Caller = Extension<Owner>;

pub(crate) async fn create(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    body: Body,
) -> Result<Response, Refusal> {
    Ok(created(sessions::create(&service, owner, body.parse_or_default()?).await?))
}

pub(crate) async fn list(State(shared): State<Shared>, Extension(owner): Caller) -> Result<Response, Refusal> {
    large::json(&shared, owner, sessions::list(&shared.service, owner)).await
}

pub(crate) async fn one(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    large::json(&shared, owner, sessions::get(&shared.service, owner, &id)).await
}

pub(crate) async fn change(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    Ok(Json(sessions::change(&service, owner, &id, body.parse()?).await?))
}

pub(crate) async fn delete(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    Ok(Json(sessions::delete(&service, owner, &id).await?))
}

pub(crate) async fn fork(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Refusal> {
    Ok(created(sessions::fork(&service, owner, &id, body.parse_or_default()?).await?))
}

pub(crate) async fn truncate(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    Ok(Json(sessions::truncate(&service, owner, &id, body.parse()?).await?))
}

pub(crate) async fn checkpoint(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    Ok(Json(sessions::checkpoint(&service, owner, &id).await?))
}

pub(crate) async fn pin(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    Ok(Json(sessions::pin(&service, owner, &id, body.parse_or_default()?).await?))
}

pub(crate) async fn resume(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Refusal> {
    reply(&service, sessions::resume(&service, owner, &id, body.parse_or_default()?).await?).await
}

pub(crate) async fn export(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    large::bytes(&shared, owner, "application/octet-stream", sessions::export(&shared.service, owner, &id)).await
}

pub(crate) async fn import(
    State(Shared { service, .. }): State<Shared>,
    Extension(owner): Caller,
    body: Body,
) -> Result<Response, Refusal> {
    Ok(created(sessions::import(&service, owner, body.bytes().to_vec()).await?))
}

fn created(session: Value) -> Response {
    (StatusCode::CREATED, Json(session)).into_response()
}
