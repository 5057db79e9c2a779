//! `/api/...`: Ollama's interface, as far as it is about answers and what is served.

use super::Shared;
use super::body::Body;
use crate::bodies::ollama::{self, Kind, Speaking, Wanted, idle, model_name, tagged};
use crate::bodies::{ChatAsk, CompletionAsk};
use crate::refusal::Refusal;
use axum::body::Body as Bytes;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Owner, Request, UpstreamStatus};
use sparsed_engine::{ModelState, ServedModel, Service, Target};
use std::convert::Infallible;

/// When a model that is served is let go of: not in any client's time.
const NEVER: &str = "9999-12-31T23:59:59Z";

/// A failure in Ollama's words.
#[derive(Debug)]
pub(crate) struct Refused(Refusal);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self(refusal)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = error(&self.0).to_string();
        let (head, _) = self.0.into_response().into_parts();
        Response::from_parts(head, Bytes::from(body))
    }
}

fn error(refusal: &Refusal) -> Value {
    json!({ "error": refusal.body()["error"]["message"] })
}

pub(crate) async fn chat(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refused> {
    let wanted = ollama::chat(body.bytes())?;
    answer(&shared.service, owner, Kind::Chat, wanted, body).await
}

pub(crate) async fn generate(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refused> {
    let wanted = ollama::generate(body.bytes())?;
    answer(&shared.service, owner, Kind::Generate, wanted, body).await
}

async fn answer(service: &Service, owner: Owner, kind: Kind, wanted: Wanted, body: Body) -> Result<Response, Refused> {
    let generation = match wanted {
        Wanted::Answer(generation) => generation,
        Wanted::Nothing { model, unload } => {
            service.target(&model).map_err(Refusal::from)?;
            return Ok(Json(idle(kind, &tagged(&model), unload)).into_response());
        }
    };
    let (bytes, share) = (generation.body.to_string(), body.into_share());
    let request: Request = if generation.is_chat {
        ChatAsk::read(bytes.as_bytes())?.prepare(service, owner, share).await?.request
    } else {
        CompletionAsk::read(bytes.as_bytes())?.prepare(service, owner, share).await?.request
    };
    let speaking = Speaking::begin(service, kind, tagged(&generation.model), request).await?;
    if !generation.stream {
        return Ok(Json(speaking.whole().await?).into_response());
    }
    let lines = stream::unfold(speaking, |mut speaking| async move {
        let line = speaking.next().await?.unwrap_or_else(|refusal| error(&refusal));
        Some((Ok::<_, Infallible>(format!("{line}\n")), speaking))
    });
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))];
    Ok((kind, Bytes::from_stream(lines)).into_response())
}

/// `GET /api/tags`: models that answer.
pub(crate) async fn tags(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({ "models": listed(&shared.service, |_| json!({})) }))
}

/// `GET /api/ps`: all of them are in memory, and stay there.
pub(crate) async fn running(State(shared): State<Shared>) -> Json<Value> {
    let more =
        |served: &ServedModel| json!({ "expires_at": NEVER, "size_vram": 0, "context_length": served.max_context });
    Json(json!({ "models": listed(&shared.service, more) }))
}

fn listed(service: &Service, more: impl Fn(&ServedModel) -> Value) -> Vec<Value> {
    let entry = |name: &str, served: &ServedModel| {
        let mut entry = json!({
            "name": tagged(name),
            "model": tagged(name),
            "modified_at": time(served.created),
            "size": served.model.file_bytes(),
            "details": details(served),
        });
        if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), more(served)) {
            entry.extend(more);
        }
        entry
    };
    let ready = service.models().into_iter().filter_map(|status| match &status.state {
        ModelState::Ready(served) => Some(entry(&status.name, served)),
        ModelState::Elsewhere(upstream) if upstream.is_up() => Some(listed_elsewhere(&status.name, upstream)),
        ModelState::Elsewhere(_) | ModelState::Loading { .. } | ModelState::Failed(_) => None,
    });
    ready.collect()
}

#[derive(Debug, Deserialize)]
pub(crate) struct ShowFields {
    /// `name` in older clients.
    #[serde(alias = "name")]
    model: String,
}

/// `POST /api/show`: one model.
pub(crate) async fn show(State(shared): State<Shared>, body: Body) -> Result<Json<Value>, Refused> {
    let fields: ShowFields = body.parse()?;
    let served = match shared.service.target(model_name(&fields.model)).map_err(Refusal::from)? {
        Target::Here(served) => served,
        Target::Elsewhere(upstream) => return Ok(Json(shown_elsewhere(&upstream))),
    };
    let (spec, summary) = (served.model.spec(), served.model.summary());
    let format = served.model.chat_format();
    let mut capabilities = vec!["completion"];
    capabilities.extend(format.filter(|format| format.takes_tools()).map(|_| "tools"));
    capabilities.extend(format.filter(|format| format.can_think()).map(|_| "thinking"));
    let family = family(&served);
    Ok(Json(json!({
        "modified_at": time(served.created),
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": details(&served),
        "model_info": {
            "general.architecture": family,
            "general.basename": served.model.name(),
            "general.parameter_count": summary.parameters,
            format!("{family}.context_length"): served.max_context,
            format!("{family}.embedding_length"): spec.hidden_size,
            format!("{family}.block_count"): spec.n_layers,
        },
        "capabilities": capabilities,
    })))
}

/// A model of an engine elsewhere, with Ollama's own names for such.
fn listed_elsewhere(name: &str, upstream: &UpstreamStatus) -> Value {
    json!({
        "name": tagged(name),
        "model": tagged(name),
        "remote_model": upstream.model,
        "remote_host": upstream.address,
        "modified_at": time(0),
        "size": 0,
        "size_vram": 0,
        "expires_at": NEVER,
        "context_length": upstream.max_context,
        "details": details_elsewhere(),
    })
}

/// What it can do the other engine would know; tools and reasoning are passed on.
fn shown_elsewhere(upstream: &UpstreamStatus) -> Value {
    json!({
        "modified_at": time(0),
        "modelfile": "",
        "parameters": "",
        "template": "",
        "remote_model": upstream.model,
        "remote_host": upstream.address,
        "details": details_elsewhere(),
        "model_info": { "general.architecture": "upstream", "upstream.context_length": upstream.max_context },
        "capabilities": ["completion", "tools", "thinking"],
    })
}

fn details_elsewhere() -> Value {
    json!({
        "parent_model": "",
        "format": "",
        "family": "upstream",
        "families": ["upstream"],
        "parameter_size": "",
        "quantization_level": "",
    })
}

fn details(served: &ServedModel) -> Value {
    let (family, summary) = (family(served), served.model.summary());
    // The format of most weights.
    let format = summary.formats.iter().max_by_key(|(_, count)| **count).map_or("", |(name, _)| *name);
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": format!("{:.1}M", summary.parameters as f64 / 1e6),
        "quantization_level": format,
    })
}

fn family(served: &ServedModel) -> String {
    format!("{:?}", served.model.spec().architecture).to_lowercase()
}

fn time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

/// `GET /api/version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// What would change which models there are.
pub(crate) async fn not_here() -> Response {
    let message = "models are installed by the operator of this box, not through this interface";
    (StatusCode::NOT_IMPLEMENTED, Json(json!({ "error": message }))).into_response()
}

/// No model of this daemon makes embeddings.
pub(crate) async fn embed() -> Response {
    let message = "no model of this daemon makes embeddings: they generate text";
    (StatusCode::BAD_REQUEST, Json(json!({ "error": message }))).into_response()
}
