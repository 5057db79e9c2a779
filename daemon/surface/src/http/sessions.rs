//! `/v1/sessions`: conversations that the daemon keeps, and their turns.
//!
//! A turn is a chat completion with `session_id`, which sends only what is new. All of this belongs to the caller's
//! uid; another one's session is not found.

use super::Shared;
use super::body::Body;
use super::error::HttpError;
use super::generation::{Reply, finish};
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Generate, Owner};
use sparsed_engine::{
    Change, ChatRequest, ContextFull, DEFAULT_MODEL, Durability, Service, Session, SessionId, SessionState,
    SessionSummary, Sessions, Settings, Wishes,
};

/// What may be said of a session when it is made or changed.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SessionFields {
    model: Option<String>,
    title: Option<String>,
    pinned: Option<bool>,
    durability: Option<String>,
    context_full: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TurnsField {
    turns: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContinueFields {
    stream: Option<bool>,
    stream_options: Option<super::chat::StreamOptions>,
}

impl SessionFields {
    fn change(self) -> Result<Change, HttpError> {
        let durability = self.durability.as_deref().map(|name| match name {
            "token" => Ok(Durability::Token),
            "turn" => Ok(Durability::Turn),
            "none" => Ok(Durability::None),
            _ => Err(HttpError::invalid("durability", format!("is '{name}', must be 'token', 'turn' or 'none'"))),
        });
        let context_full = self.context_full.as_deref().map(|name| match name {
            "error" => Ok(ContextFull::Error),
            "truncate-oldest" => Ok(ContextFull::TruncateOldest),
            _ => Err(HttpError::invalid("context_full", format!("is '{name}', must be 'error' or 'truncate-oldest'"))),
        });
        Ok(Change {
            title: self.title,
            pinned: self.pinned,
            durability: durability.transpose()?,
            context_full: context_full.transpose()?,
        })
    }
}

pub(crate) async fn create(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, HttpError> {
    let fields: SessionFields = body.parse_or_default()?;
    let model = fields.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned());
    let change = fields.change()?;
    let made = verb(&shared, move |service| service.create_session(owner, &model, change)).await?;
    Ok((StatusCode::CREATED, Json(summary(&made))).into_response())
}

pub(crate) async fn list(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
) -> Result<Json<Value>, HttpError> {
    let list = verb(&shared, move |service| service.sessions()?.list(owner)).await?;
    Ok(Json(json!({ "object": "list", "data": list.iter().map(summary).collect::<Vec<_>>() })))
}

pub(crate) async fn one(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, HttpError> {
    Ok(Json(whole(&on(&shared, &id, move |sessions, id| sessions.get(owner, id)).await?)))
}

pub(crate) async fn change(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, HttpError> {
    let fields: SessionFields = body.parse()?;
    if fields.model.is_some() {
        return Err(HttpError::invalid("model", "cannot be changed; make a new session"));
    }
    let change = fields.change()?;
    Ok(Json(summary(&on(&shared, &id, move |sessions, id| sessions.change(owner, id, change)).await?)))
}

pub(crate) async fn delete(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, HttpError> {
    on(&shared, &id, move |sessions, id| sessions.delete(owner, id)).await?;
    Ok(Json(json!({ "id": id, "object": "session.deleted", "deleted": true })))
}

pub(crate) async fn fork(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, HttpError> {
    let TurnsField { turns } = body.parse_or_default()?;
    let fork = on(&shared, &id, move |sessions, id| sessions.fork(owner, id, turns)).await?;
    Ok((StatusCode::CREATED, Json(summary(&fork))).into_response())
}

pub(crate) async fn truncate(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, HttpError> {
    let turns = body.parse::<TurnsField>()?.turns;
    let turns = turns.ok_or_else(|| HttpError::invalid("turns", "is missing: how many of the first turns stay"))?;
    Ok(Json(summary(&on(&shared, &id, move |sessions, id| sessions.truncate(owner, id, turns)).await?)))
}

pub(crate) async fn checkpoint(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, HttpError> {
    Ok(Json(summary(&on(&shared, &id, move |sessions, id| sessions.checkpoint(owner, id)).await?)))
}

pub(crate) async fn pin(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, HttpError> {
    let fields: SessionFields = body.parse_or_default()?;
    let change = Change { pinned: Some(fields.pinned.unwrap_or(true)), ..Change::default() };
    Ok(Json(summary(&on(&shared, &id, move |sessions, id| sessions.change(owner, id, change)).await?)))
}

/// The last answer once more from its first token, and on from where it was cut.
pub(crate) async fn resume(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, HttpError> {
    let id = session_id(&id)?;
    let fields: ContinueFields = body.parse_or_default()?;
    let reply: Reply = super::chat::StreamOptions::reply(fields.stream_options, fields.stream);
    let request = verb(&shared, move |service| service.resume_turn(owner, id)).await?;
    super::chat::answer_chat(&shared.service, request, reply).await
}

pub(crate) async fn export(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Response, HttpError> {
    let file = on(&shared, &id, move |sessions, id| sessions.export(owner, id)).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], file).into_response())
}

pub(crate) async fn import(
    State(shared): State<Shared>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Response, HttpError> {
    let file = body.bytes().to_vec();
    let made = verb(&shared, move |service| service.sessions()?.import(owner, file)).await?;
    Ok((StatusCode::CREATED, Json(summary(&made))).into_response())
}

/// A turn of a session as a request. An answer that was cut before it is finished first.
///
/// # Errors
/// The session's, or the model's.
pub(crate) async fn turn(
    shared: &Shared,
    owner: Owner,
    id: &str,
    chat: ChatRequest,
    wishes: Wishes,
) -> Result<Generate, HttpError> {
    let id = session_id(id)?;
    loop {
        let (chat, wishes) = (chat.clone(), wishes.clone());
        let begun = verb(shared, move |service| match service.begin_turn(owner, id, chat, &wishes) {
            Err(Failure::SessionCut { .. }) => Ok(None),
            begun => begun.map(Some),
        });
        if let Some(request) = begun.await? {
            return Ok(request);
        }
        let cut = verb(shared, move |service| service.resume_turn(owner, id)).await?;
        finish(&shared.service, cut).await?;
    }
}

/// Has a thread that may wait carry out `action` on the session that is called `id`.
async fn on<T: Send + 'static>(
    shared: &Shared,
    id: &str,
    action: impl FnOnce(&Sessions, SessionId) -> Result<T, Failure> + Send + 'static,
) -> Result<T, HttpError> {
    let id = session_id(id)?;
    verb(shared, move |service| action(service.sessions()?, id)).await
}

/// Has a thread that may wait carry out `verb`.
async fn verb<T: Send + 'static>(
    shared: &Shared,
    verb: impl FnOnce(&Service) -> Result<T, Failure> + Send + 'static,
) -> Result<T, HttpError> {
    let service = shared.service.clone();
    let done = tokio::task::spawn_blocking(move || verb(&service)).await;
    Ok(done.map_err(|_| Failure::SessionDamaged { reason: "the verb ended early".to_owned() })??)
}

fn session_id(text: &str) -> Result<SessionId, HttpError> {
    // A name that cannot be one is not there.
    text.parse().map_err(|_| Failure::SessionNotFound { id: text.chars().take(64).collect() }.into())
}

fn summary(summary: &SessionSummary) -> Value {
    let state = match summary.state {
        SessionState::Idle => "idle",
        SessionState::Answering => "answering",
        SessionState::Interrupted => "interrupted",
    };
    json!({
        "id": summary.id.to_string(),
        "object": "session",
        "model": summary.model,
        "title": summary.title,
        "created": summary.created,
        "last_used": summary.used,
        "state": state,
        "turns": summary.n_turns,
        "tokens": summary.n_tokens,
        "pinned": summary.pinned,
        "disk_bytes": summary.disk_bytes,
        "damaged": summary.damaged,
    })
}

fn whole(session: &Session) -> Value {
    let Settings { durability, context_full } = session.settings;
    let mut object = summary(&session.summary);
    object["durability"] = json!(match durability {
        Durability::Token => "token",
        Durability::Turn => "turn",
        Durability::None => "none",
    });
    object["context_full"] = json!(match context_full {
        ContextFull::Error => "error",
        ContextFull::TruncateOldest => "truncate-oldest",
    });
    object["messages"] = json!(session.messages);
    object
}
