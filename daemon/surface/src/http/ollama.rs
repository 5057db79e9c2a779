//! `/api/...`: Ollama's interface, as far as it is about answers and what is served.

use super::Shared;
use super::body::Body;
use super::error::ollamas;
use super::reply::called;
use crate::bodies::ollama::{self, Kind, Speaking, Wanted, idle, tagged};
use crate::bodies::{ChatAsk, CompletionAsk, load, models};
use crate::refusal::{AtDoor, Refusal};
use axum::body::Body as Bytes;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sparsed_engine::api::{Owner, Request, UpstreamStatus};
use sparsed_engine::{KeepAlive, ModelState, ModelStatus, ServedModel, Service};
use std::convert::Infallible;
use std::time::Duration;

/// When a model leaves the memory that stays: not in any client's time.
const NEVER: &str = "9999-12-31T23:59:59Z";

/// The version of Ollama whose requests and answers these are: clients ask for it, and some refuse older ones.
const VERSION: &str = "0.12.11";

pub(crate) async fn chat(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refusal> {
    let wanted = ollama::chat(body.bytes())?;
    answer(&shared.service, owner, Kind::Chat, wanted, body).await
}

pub(crate) async fn generate(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, Refusal> {
    let wanted = ollama::generate(body.bytes())?;
    answer(&shared.service, owner, Kind::Generate, wanted, body).await
}

async fn answer(service: &Service, owner: Owner, kind: Kind, wanted: Wanted, body: Body) -> Result<Response, Refusal> {
    let generation = match wanted {
        Wanted::Answer(generation) => generation,
        Wanted::Nothing { model, keep_alive } => {
            let unload = keep_alive.is_some_and(|keep| keep.time() == Some(Duration::ZERO));
            // It is not loaded only to leave.
            let is_needed = !unload && service.elsewhere(&model).is_none();
            let held = if is_needed { Some(models::held(service, owner, &model).await?) } else { None };
            keep(service, &model, keep_alive)?;
            drop(held);
            return Ok(Json(idle(kind, &tagged(&model), unload)).into_response());
        }
    };
    let (bytes, share) = (generation.body.to_string(), body.into_share());
    let request = asked(service, owner, generation.is_chat, bytes.as_bytes(), share).await.map_err(ollama::renamed)?;
    // The request has a lease: the model does not leave before its answer.
    keep(service, &generation.model, generation.keep_alive)?;
    let speaking = Speaking::begin(service, kind, tagged(&generation.model), request).await?;
    let id = speaking.id().to_owned();
    if !generation.stream {
        return Ok(called(&id, Json(speaking.whole().await?).into_response()));
    }
    let lines = stream::unfold(speaking, |mut speaking| async move {
        let line = speaking.next().await?.unwrap_or_else(|refusal| ollamas(&refusal));
        Some((Ok::<_, Infallible>(format!("{line}\n")), speaking))
    });
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))];
    Ok(called(&id, (kind, Bytes::from_stream(lines)).into_response()))
}

async fn asked(
    service: &Service,
    owner: Owner,
    is_chat: bool,
    body: &[u8],
    held: impl Send + 'static,
) -> Result<Request, Refusal> {
    if is_chat {
        return Ok(ChatAsk::read(body)?.prepare(service, owner, held).await?.request);
    }
    Ok(CompletionAsk::read(body)?.prepare(service, owner, held).await?.request)
}

/// What an engine elsewhere keeps in memory is its own business.
fn keep(service: &Service, model: &str, keep_alive: Option<KeepAlive>) -> Result<(), Refusal> {
    match keep_alive.filter(|_| service.elsewhere(model).is_none()) {
        Some(keep_alive) => Ok(service.keep(model, keep_alive)?),
        None => Ok(()),
    }
}

/// `GET /api/tags`: models that may be asked for. Of one that is not in memory no more than its name is known.
pub(crate) async fn tags(State(shared): State<Shared>) -> Json<Value> {
    let mut all = listed(&shared.service, |_, _| json!({}));
    let service = &shared.service;
    let away = |status: &ModelStatus| !matches!(status.state, ModelState::Ready(_)) && models::is_offered(status);
    all.extend(service.models().iter().filter(|status| away(status)).map(|status| {
        let name = tagged(&status.name);
        let digest = named(&status.name);
        json!({ "name": name, "model": name, "modified_at": time(0), "size": 0, "digest": digest, "details": {} })
    }));
    Json(json!({ "models": all }))
}

/// `GET /api/ps`: those that are in memory, and until when.
pub(crate) async fn running(State(shared): State<Shared>) -> Json<Value> {
    let more = |status: &ModelStatus, served: &ServedModel| {
        // While it is needed its time begins anew.
        let stays = load::leaves_in(&shared.service, status).or(status.keeping.keep_alive);
        let until = stays
            .and_then(|stays| jiff::Timestamp::now().checked_add(jiff::SignedDuration::try_from(stays).ok()?).ok());
        let expires_at = until.map_or_else(|| NEVER.to_owned(), |until| until.to_string());
        json!({ "expires_at": expires_at, "size_vram": 0, "context_length": served.stateless_context })
    };
    Json(json!({ "models": listed(&shared.service, more) }))
}

fn listed(service: &Service, more: impl Fn(&ModelStatus, &ServedModel) -> Value) -> Vec<Value> {
    let entry = |status: &ModelStatus, served: &ServedModel| {
        let name = status.name.as_str();
        let mut entry = json!({
            "name": tagged(name),
            "model": tagged(name),
            "modified_at": time(served.created),
            "size": served.model.file_bytes(),
            "digest": hex(served.digest()),
            "details": details(served),
        });
        if let (Some(entry), Value::Object(more)) = (entry.as_object_mut(), more(status, served)) {
            entry.extend(more);
        }
        entry
    };
    let ready = service.models().into_iter().filter_map(|status| match &status.state {
        ModelState::Ready(served) => Some(entry(&status, served)),
        ModelState::Elsewhere(upstream) if upstream.is_up() => Some(listed_elsewhere(&status.name, upstream)),
        ModelState::Elsewhere(_) | ModelState::Unloaded | ModelState::Loading { .. } | ModelState::Failed(_) => None,
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
pub(crate) async fn show(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let fields: ShowFields = body.parse()?;
    let name = fields.model.as_str();
    if let Some(upstream) = shared.service.elsewhere(name) {
        return Ok(Json(shown_elsewhere(&upstream)));
    }
    let held = models::held(&shared.service, owner, name).await?;
    let served = &held.model;
    let (spec, summary) = (served.model.spec(), served.model.summary());
    let format = served.model.chat_format();
    let mut capabilities = vec!["completion"];
    capabilities.extend(format.filter(|format| format.takes_tools()).map(|_| "tools"));
    capabilities.extend(format.filter(|format| format.can_think()).map(|_| "thinking"));
    let family = family(served);
    Ok(Json(json!({
        "modified_at": time(served.created),
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": details(served),
        "model_info": {
            "general.architecture": family,
            "general.basename": served.model.name(),
            "general.parameter_count": summary.parameters,
            format!("{family}.context_length"): served.stateless_context,
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
        "digest": named(name),
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

/// What stands for a model whose file is not known now: its name.
fn named(name: &str) -> String {
    hex(Sha256::digest(name).into())
}

fn hex(digest: [u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `GET /api/version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({ "version": VERSION, "sparsed": env!("CARGO_PKG_VERSION") }))
}

/// `GET /`: Ollama's clients look whether anybody is there.
pub(crate) async fn here() -> &'static str {
    "sparsed is running"
}

#[derive(Debug, Deserialize)]
pub(crate) struct PullFields {
    #[serde(alias = "name")]
    model: String,
}

/// `POST /api/pull`: a model that is here needs no fetching, so scripts that begin with it go on.
pub(crate) async fn pull(State(shared): State<Shared>, body: Body) -> Result<Response, Refusal> {
    let fields: PullFields = body.parse()?;
    let name = shared.service.canonical(&fields.model);
    if !shared.service.models().iter().any(|status| status.name == name) {
        return Err(not_here().await);
    }
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"))];
    Ok((kind, format!("{}\n", json!({ "status": "success" }))).into_response())
}

/// What would change which models there are.
pub(crate) async fn not_here() -> Refusal {
    let message = "models are installed by the operator of this box, not through this interface";
    Refusal::at_door(AtDoor::NotSupported, None, message)
}
