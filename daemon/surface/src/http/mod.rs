//! Which request is it? Routes, limits and what all handlers share.

mod body;
mod chat;
mod completions;
mod error;
mod generation;
mod models;
mod sampling;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use sparsed_engine::Service;

/// What handlers share.
#[derive(Clone, Debug)]
struct Shared {
    service: Service,
}

/// The whole HTTP interface.
pub(crate) fn router(service: Service, body_bytes_max: usize) -> Router {
    Router::new()
        .route("/health", get(models::health))
        .route("/v1/status", get(models::status))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::one))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .fallback(error::no_such_path)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .with_state(Shared { service })
}
