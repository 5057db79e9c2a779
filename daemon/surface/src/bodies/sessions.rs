//! What is said of sessions? Their verbs as every door has them: fields in, an object out.
//!
//! All of it belongs to the caller; another one's session is not found.

use super::answer::{Asked, Reply, StreamOptions};
use super::chat::ChatWire;
use super::figures::Telling;
use super::listen::finish;
use super::models;
use super::places::{Place, Places};
use crate::refusal::Refusal;
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, Generate, Owner};
use sparsed_engine::{
    Change, ChatRequest, ContextFull, DEFAULT_MODEL, Durability, Held, Service, Session, SessionId, SessionState,
    SessionSummary, Sessions, Settings, Wishes,
};
use std::time::Duration;

/// Most threads that verbs of sessions take at a time, of those that may wait. All of them wait for one thread, and
/// that one for the disk: one that does not answer holds up no request without a session, if there are more threads.
pub const VERBS_AT_A_TIME: usize = 2;
/// How long a verb waits for one of them.
const PATIENCE: Duration = Duration::from_secs(30);
/// When a verb that has found none may be asked for again.
const RETRY_S: u32 = 10;

static THREADS: Places = Places::new(VERBS_AT_A_TIME);

/// What may be said of a session when it is made or changed.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct SessionFields {
    model: Option<String>,
    title: Option<String>,
    pinned: Option<bool>,
    durability: Option<String>,
    context_full: Option<String>,
}

/// How many of the first turns.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TurnsField {
    #[serde(deserialize_with = "super::whole::whole")]
    turns: Option<u32>,
}

/// How an answer is to be continued.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ContinueFields {
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

impl SessionFields {
    fn change(self) -> Result<Change, Refusal> {
        let durability = self.durability.as_deref().map(|name| match name {
            "token" => Ok(Durability::Token),
            "turn" => Ok(Durability::Turn),
            "none" => Ok(Durability::None),
            _ => Err(Refusal::invalid("durability", format!("is '{name}', must be 'token', 'turn' or 'none'"))),
        });
        let context_full = self.context_full.as_deref().map(|name| match name {
            "error" => Ok(ContextFull::Error),
            "truncate-oldest" => Ok(ContextFull::TruncateOldest),
            _ => Err(Refusal::invalid("context_full", format!("is '{name}', must be 'error' or 'truncate-oldest'"))),
        });
        Ok(Change {
            title: self.title,
            pinned: self.pinned,
            durability: durability.transpose()?,
            context_full: context_full.transpose()?,
        })
    }
}

/// Makes a session.
pub(crate) async fn create(service: &Service, owner: Owner, fields: SessionFields) -> Result<Value, Refusal> {
    let model = service.canonical(fields.model.as_deref().unwrap_or(DEFAULT_MODEL)).to_owned();
    let change = fields.change()?;
    let _held = models::held(service, owner, &model).await?;
    Ok(summary(&verb(service, Some(owner), move |service| service.create_session(owner, &model, change)).await?))
}

/// All sessions of the caller, the one used last first.
pub(crate) async fn list(service: &Service, owner: Owner) -> Result<Value, Refusal> {
    let list = verb(service, Some(owner), move |service| service.sessions()?.list(owner)).await?;
    Ok(json!({ "object": "list", "data": list.iter().map(summary).collect::<Vec<_>>() }))
}

/// One session with its messages.
pub(crate) async fn get(service: &Service, owner: Owner, id: &str) -> Result<Value, Refusal> {
    Ok(whole(&on(service, owner, id, move |sessions, id| sessions.get(owner, id)).await?))
}

/// Changes what `fields` name.
pub(crate) async fn change(service: &Service, owner: Owner, id: &str, fields: SessionFields) -> Result<Value, Refusal> {
    if fields.model.is_some() {
        return Err(Refusal::invalid("model", "cannot be changed; make a new session"));
    }
    let change = fields.change()?;
    Ok(summary(&on(service, owner, id, move |sessions, id| sessions.change(owner, id, change)).await?))
}

/// Pins a session, or lets it go with `"pinned": false`.
pub(crate) async fn pin(service: &Service, owner: Owner, id: &str, fields: SessionFields) -> Result<Value, Refusal> {
    let change = Change { pinned: Some(fields.pinned.unwrap_or(true)), ..Change::default() };
    Ok(summary(&on(service, owner, id, move |sessions, id| sessions.change(owner, id, change)).await?))
}

/// Deletes a session and its key.
pub(crate) async fn delete(service: &Service, owner: Owner, id: &str) -> Result<Value, Refusal> {
    on(service, owner, id, move |sessions, id| sessions.delete(owner, id)).await?;
    Ok(json!({ "id": id, "object": "session.deleted", "deleted": true }))
}

/// A new session that begins as this one.
pub(crate) async fn fork(service: &Service, owner: Owner, id: &str, fields: TurnsField) -> Result<Value, Refusal> {
    Ok(summary(&on(service, owner, id, move |sessions, id| sessions.fork(owner, id, fields.turns)).await?))
}

/// Forgets all turns but the first ones.
pub(crate) async fn truncate(service: &Service, owner: Owner, id: &str, fields: TurnsField) -> Result<Value, Refusal> {
    let missing = || Refusal::invalid("turns", "is missing: how many of the first turns stay");
    let turns = fields.turns.ok_or_else(missing)?;
    Ok(summary(&on(service, owner, id, move |sessions, id| sessions.truncate(owner, id, turns)).await?))
}

/// Has all that was said on the disk.
pub(crate) async fn checkpoint(service: &Service, owner: Owner, id: &str) -> Result<Value, Refusal> {
    Ok(summary(&on(service, owner, id, move |sessions, id| sessions.checkpoint(owner, id)).await?))
}

/// The last answer once more from its first token, and on from where it was cut.
pub(crate) async fn resume(
    service: &Service,
    owner: Owner,
    id: &str,
    fields: ContinueFields,
) -> Result<Asked<ChatWire>, Refusal> {
    let id = session_id(id)?;
    let reply: Reply = StreamOptions::reply(fields.stream_options, fields.stream, Telling::default());
    let request = with_model(service, owner, move |service| service.resume_turn(owner, id)).await?.into();
    Ok(Asked { request, siblings: Vec::new(), per_prompt: 1, reply, wire: ChatWire })
}

/// A session as one file.
pub(crate) async fn export(service: &Service, owner: Owner, id: &str) -> Result<Vec<u8>, Refusal> {
    on(service, owner, id, move |sessions, id| sessions.export(owner, id)).await
}

/// A session from such a file.
pub(crate) async fn import(service: &Service, owner: Owner, file: Vec<u8>) -> Result<Value, Refusal> {
    Ok(summary(&verb(service, Some(owner), move |service| service.sessions()?.import(owner, file)).await?))
}

/// A turn of a session as a request. An answer that was cut before it is finished first, or, where it would fail again,
/// given up.
///
/// # Errors
/// The session's, or the model's.
pub(crate) async fn turn(
    service: &Service,
    owner: Owner,
    id: &str,
    chat: ChatRequest,
    wishes: Wishes,
) -> Result<Generate, Refusal> {
    let id = session_id(id)?;
    let mut failed = None;
    loop {
        let (chat, wishes) = (chat.clone(), wishes.clone());
        let begun =
            with_model(service, owner, move |service| match service.begin_turn(owner, id, chat.clone(), &wishes) {
                Err(Failure::SessionCut { .. }) => Ok(None),
                begun => begun.map(Some),
            });
        if let Some(request) = begun.await? {
            return Ok(request);
        }
        if let Some(failure) = failed.take() {
            return Err(Refusal::from(failure));
        }
        let cut = with_model(service, owner, move |service| match service.resume_turn(owner, id) {
            Err(failure) if !failure.may_pass() => Ok(Err(failure)),
            cut => cut.map(Ok),
        });
        match cut.await? {
            Ok(cut) => finish(service, cut.into()).await?,
            // It is ended now, or the session is not this model's.
            Err(failure) => failed = Some(failure),
        }
    }
}

/// Whether a turn of a session has something before it: an answer that was cut, or a model that is to be loaded. Not of
/// one that is not there.
pub(crate) async fn turn_waits(service: &Service, owner: Owner, id: &str) -> bool {
    let summary = on(service, owner, id, move |sessions, id| sessions.summary(owner, id)).await;
    summary.is_ok_and(|found| found.state == SessionState::Interrupted || models::is_absent(service, &found.model))
}

/// Whether a session's model is to be loaded first. Not of one that is not there.
pub(crate) async fn model_is_absent(service: &Service, owner: Owner, id: &str) -> bool {
    model_of(service, owner, id).await.is_ok_and(|model| models::is_absent(service, &model))
}

/// The name of a session's model.
///
/// # Errors
/// The session's.
pub(super) async fn model_of(service: &Service, owner: Owner, id: &str) -> Result<String, Refusal> {
    on(service, owner, id, move |sessions, id| Ok(sessions.summary(owner, id)?.model)).await
}

/// Has a thread that may wait carry out `action` on the session that is called `id`.
async fn on<T: Send + 'static>(
    service: &Service,
    owner: Owner,
    id: &str,
    action: impl FnOnce(&Sessions, SessionId) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Refusal> {
    let id = session_id(id)?;
    verb(service, Some(owner), move |service| action(service.sessions()?, id)).await
}

/// As [`verb`], and once more when the model that it needs is loaded. Whose turn has begun has a lease of its own.
pub(super) async fn with_model<T: Send + 'static>(
    service: &Service,
    owner: Owner,
    verb: impl Fn(&Service) -> Result<T, Failure> + Clone + Send + 'static,
) -> Result<T, Refusal> {
    let mut held: Option<Held> = None;
    loop {
        let verb = verb.clone();
        let is_first = held.is_none();
        let done = self::verb(service, Some(owner), move |service| match verb(service) {
            Err(Failure::ModelUnloaded { name } | Failure::ModelLoading { name }) if is_first => Ok(Err(name)),
            done => done.map(Ok),
        });
        match done.await? {
            Ok(done) => return Ok(done),
            Err(name) => held = Some(models::held(service, owner, &name).await?),
        }
    }
}

/// Has a thread that may wait carry out `verb`, which `owner` asks for, or else the daemon itself.
pub(super) async fn verb<T: Send + 'static>(
    service: &Service,
    owner: Option<Owner>,
    verb: impl FnOnce(&Service) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Refusal> {
    let thread = place(&THREADS, owner, PATIENCE).await?;
    let service = service.clone();
    let done = tokio::task::spawn_blocking(move || {
        // As long as the verb takes: who asked for it may be gone before.
        let _thread = thread;
        verb(&service)
    });
    let done = done.await;
    Ok(done.map_err(|_| Failure::SessionDamaged { reason: "the verb ended early".to_owned() })??)
}

/// A place among the threads of verbs.
///
/// # Errors
/// [`Failure::SessionsOverloaded`] where it did not come to that for so long: the disk is slow, or others want much of
/// it. Whether it can be used is not known here.
async fn place(threads: &'static Places, owner: Option<Owner>, patience: Duration) -> Result<Place, Failure> {
    let overloaded = |waiting| Failure::SessionsOverloaded {
        waiting,
        limit: VERBS_AT_A_TIME,
        waited_s: patience.as_secs(),
        retry_after_s: RETRY_S,
    };
    threads.take(owner, patience).await.map_err(overloaded)
}

fn session_id(text: &str) -> Result<SessionId, Refusal> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_verb_that_finds_all_threads_waiting_hears_that_they_are_many_and_not_that_the_disk_is_away() {
        static ONE: Places = Places::new(1);
        let owner = Some(Owner::Uid(1));
        let first = place(&ONE, owner, Duration::ZERO).await.unwrap();
        let refused = Refusal::from(place(&ONE, owner, Duration::ZERO).await.unwrap_err());
        assert_eq!((refused.name().status, refused.name().code), (503, "sessions_overloaded"));
        assert!(refused.may_pass() && refused.retry_after_s() == Some(RETRY_S));
        assert!(refused.message().starts_with("sessions are busy: 1 request waits"), "{}", refused.message());
        let (second, ()) = tokio::join!(place(&ONE, owner, PATIENCE), async { drop(first) });
        assert!(second.is_ok(), "its turn has come");
    }
}
