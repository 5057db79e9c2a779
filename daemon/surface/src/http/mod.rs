//! Which request is it? Routes, limits and what all handlers share.

mod body;
mod chat;
mod completions;
mod count;
pub(crate) mod error;
mod exposition;
mod large;
mod llama_cpp;
mod metrics;
mod models;
mod ollama;
mod reply;
mod responses;
mod sessions;

use crate::bodies::responses::Runs;
use crate::shares::Shares;
use axum::Router;
use axum::middleware;
use axum::routing::{delete, get, post};
use sparsed_engine::Service;
use std::sync::Arc;

/// Largest bodies that are held at a time, before they are prompts; smaller ones in proportion.
const BODIES_MAX: usize = 8;

/// What handlers share.
#[derive(Clone, Debug)]
struct Shared {
    service: Service,
    body_bytes_max: usize,
    /// Memory for bodies on their way.
    bodies: Arc<Shares>,
    /// Memory for answers that are there as a whole.
    answers: large::Answers,
    /// Responses in the background.
    runs: Runs,
}

/// The whole HTTP interface.
pub(crate) fn router(service: Service, runs: Runs, body_bytes_max: usize) -> Router {
    let bodies = Arc::new(Shares::new(BODIES_MAX * body_bytes_max.div_ceil(1024)));
    let counted = middleware::from_fn_with_state(service.clone(), count::count);
    Router::new()
        .route("/health", get(models::health))
        .route("/ready", get(models::health))
        .route("/v1/embeddings", post(llama_cpp::embeddings))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/status", get(models::status))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/chat/completions/input_tokens", post(chat::count))
        .route("/v1/completions", post(completions::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::one).delete(responses::delete))
        .route("/v1/responses/input_tokens", post(responses::count))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/sessions", get(sessions::list).post(sessions::create))
        .route("/v1/sessions/import", post(sessions::import))
        .route(
            "/v1/sessions/{id}",
            get(sessions::one).post(sessions::change).patch(sessions::change).delete(sessions::delete),
        )
        .route("/v1/sessions/{id}/continue", post(sessions::resume))
        .route("/v1/sessions/{id}/fork", post(sessions::fork))
        .route("/v1/sessions/{id}/truncate", post(sessions::truncate))
        .route("/v1/sessions/{id}/checkpoint", post(sessions::checkpoint))
        .route("/v1/sessions/{id}/pin", post(sessions::pin))
        .route("/v1/sessions/{id}/export", get(sessions::export))
        .merge(ollama())
        .merge(llama_cpp())
        .fallback(error::no_such_path)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(counted)
        .layer(middleware::from_fn(error::by_path))
        .with_state(Shared { service, body_bytes_max, bodies, answers: large::Answers::new(body_bytes_max), runs })
}

/// llama.cpp's own paths, and OpenAI's without the version, which its server has too.
fn llama_cpp() -> Router<Shared> {
    Router::new()
        .route("/v1/health", get(models::health))
        .route("/props", get(llama_cpp::props))
        .route("/models", get(models::list))
        .route("/completion", post(llama_cpp::complete))
        .route("/completions", post(llama_cpp::complete))
        .route("/chat/completions", post(chat::create))
        .route("/chat/completions/input_tokens", post(chat::count))
        .route("/responses", post(responses::create))
        .route("/responses/input_tokens", post(responses::count))
        .route("/apply-template", post(llama_cpp::apply_template))
        .route("/tokenize", post(llama_cpp::tokenize))
        .route("/detokenize", post(llama_cpp::detokenize))
        .route("/embedding", post(llama_cpp::embeddings))
        .route("/embeddings", post(llama_cpp::embeddings))
        .route("/slots", get(llama_cpp::slots))
        .route("/infill", post(llama_cpp::infill))
        .route("/rerank", post(llama_cpp::rerank))
        .route("/v1/rerank", post(llama_cpp::rerank))
        .route("/lora-adapters", get(llama_cpp::adapters).post(llama_cpp::adapters))
}

/// Ollama's interface.
fn ollama() -> Router<Shared> {
    Router::new()
        .route("/", get(ollama::here))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/tags", get(ollama::tags))
        .route("/api/ps", get(ollama::running))
        .route("/api/show", post(ollama::show))
        .route("/api/version", get(ollama::version))
        .route("/api/embed", post(llama_cpp::embeddings))
        .route("/api/embeddings", post(llama_cpp::embeddings))
        .route("/api/pull", post(ollama::pull))
        .route("/api/push", post(ollama::not_here))
        .route("/api/create", post(ollama::not_here))
        .route("/api/copy", post(ollama::not_here))
        .route("/api/delete", delete(ollama::not_here))
}
