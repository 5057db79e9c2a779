//! `/v1/responses`: OpenAI's newer interface, streamed, in one object, or in the background.

use super::Shared;
use super::body::Body;
use super::count::Counted;
use super::large;
use super::reply::called;
use crate::bodies::listen::Listening;
use crate::bodies::responses::{self, Found, Heard, Page, ResponseId, Run, Script};
use crate::refusal::{AtDoor, Refusal};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::Value;
use sparsed_engine::api::{Owner, Urgency};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

type Caller = Extension<Owner>;

/// How a response is to be told.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Telling {
    stream: bool,
    starting_after: Option<u64>,
}

/// An answer that goes on while its client listens.
struct Speaking {
    listening: Listening,
    script: Script,
    ready: VecDeque<Value>,
    is_over: bool,
}

pub(crate) async fn create(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Extension(Counted(admission)): Extension<Counted>,
    body: Body,
) -> Result<Response, Refusal> {
    let bytes = body.bytes().to_vec();
    let prepared = responses::prepare(&shared.service, owner, &bytes, body.into_share()).await?;
    // Until the engine has taken the request, or refused it.
    let _trial = prepared.trial;
    if let (true, Some(id)) = (prepared.background, prepared.id) {
        let run = shared.runs.start(&shared.service, (owner, admission), id, prepared.head, prepared.request).await?;
        return Ok(told(run, Telling { stream: prepared.stream, starting_after: None }));
    }
    let id = prepared.head.id.clone();
    let listening = Listening::begin(&shared.service, &prepared.head.id, [prepared.request], 1).await?;
    let mut script = Script::begin(prepared.head, None);
    let ready = script.take().into();
    let mut speaking = Speaking { listening, script, ready, is_over: false };
    if !prepared.stream {
        return Ok(called(&id, Json(speaking.whole().await?).into_response()));
    }
    let events = stream::unfold(speaking, |mut speaking| async move {
        let event = speaking.next().await?;
        Some((sent(&Heard::of(&event)), speaking))
    });
    Ok(called(&id, Sse::new(events).keep_alive(KeepAlive::default()).into_response()))
}

pub(crate) async fn one(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    telling: Result<Query<Telling>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(telling) = telling.map_err(|error| Refusal::invalid("starting_after", error.body_text()))?;
    match find(&shared, owner, &id, telling.starting_after).await? {
        Found::Run(run) => Ok(told(run, telling)),
        Found::Told(_, response) if !telling.stream => large::json(&shared, owner, async { Ok(response) }).await,
        Found::Told(events, _) => {
            let events: Vec<Heard> = events.iter().map(Heard::of).collect();
            let share = shared.answers.take(owner, events.iter().map(|event| event.data.len()).sum())?;
            let events = stream::iter(events).map(move |event| {
                let _held_as_long_as_the_stream_lives = &share;
                sent(&event)
            });
            Ok(Sse::new(events).into_response())
        }
    }
}

/// `GET /v1/responses/ID/input_items`.
pub(crate) async fn input_items(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(page) = page.map_err(|error| Refusal::at_door(AtDoor::InvalidValue, None, error.body_text()))?;
    large::json(&shared, owner, responses::input_items(&shared.service, owner, parsed(&id)?, &page)).await
}

/// `POST /v1/responses/input_tokens`.
pub(crate) async fn count(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    let bytes = body.bytes().to_vec();
    Ok(Json(responses::count(&shared.service, owner, &bytes, body.into_share()).await?))
}

pub(crate) async fn cancel(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    match find(&shared, owner, &id, None).await? {
        Found::Run(run) => {
            run.cancel();
            run.end().await;
            Ok(Json(run.response()))
        }
        Found::Told(_, response) => Ok(Json(response)),
    }
}

pub(crate) async fn delete(
    State(shared): State<Shared>,
    Extension(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    let id = parsed(&id)?;
    let deleted = responses::delete(&shared.service, owner, id).await?;
    shared.runs.forget(owner, id);
    Ok(Json(deleted))
}

async fn find(shared: &Shared, owner: Owner, id: &str, after: Option<u64>) -> Result<Found, Refusal> {
    shared.runs.find(&shared.service, owner, parsed(id)?, after, Urgency::default().priority).await
}

fn parsed(id: &str) -> Result<ResponseId, Refusal> {
    id.parse().map_err(|()| responses::not_found("response_id", id))
}

fn told(run: Arc<Run>, telling: Telling) -> Response {
    if !telling.stream {
        return Json(run.response()).into_response();
    }
    let events = stream::unfold((run, telling.starting_after), |(run, after)| async move {
        let (number, event) = run.next(after).await?;
        Some((sent(&event), (run, Some(number))))
    });
    Sse::new(events.boxed()).keep_alive(KeepAlive::default()).into_response()
}

fn sent(heard: &Heard) -> Result<Event, Infallible> {
    Ok(Event::default().event(&heard.kind).data(&heard.data))
}

impl Speaking {
    async fn next(&mut self) -> Option<Value> {
        while self.ready.is_empty() && !self.is_over {
            let (_, event) = self.listening.next().await;
            self.is_over = self.script.hear(event);
            self.ready.extend(self.script.take());
        }
        self.ready.pop_front()
    }

    /// The response when it is over.
    async fn whole(&mut self) -> Result<Value, Refusal> {
        loop {
            let (_, event) = self.listening.next().await;
            if let sparsed_engine::api::Event::Failed(failure) = event {
                return Err(failure.into());
            }
            if self.script.hear(event) {
                return Ok(Script::last_response(&self.script.take()).unwrap_or_default());
            }
            self.script.take();
        }
    }
}
