//! Where is a response kept? As a turn of a session, whose name is part of the response's.

use super::items;
use super::request::Fields;
use super::script::{End, Head, Script, Tokens};
use crate::bodies::figures::Telling;
use crate::bodies::{ChatAsk, models, sessions, size};
use crate::refusal::{AtDoor, Refusal};
use serde_json::{Value, json};
use sparsed_engine::api::{Failure, FinishReason, Owner, Request};
use sparsed_engine::{Change, ChatMessage, Role, SaidTurn, Service, SessionId, Trial, TurnEnd};
use std::fmt;
use std::str::FromStr;

/// What responses' names begin with.
const PREFIX: &str = "resp_";
/// What a session is about that holds responses.
const TITLE: &str = "response";

/// The name of a stored response: `resp_`, the digits of its session's name, `_`, the number of its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ResponseId {
    pub(super) session: SessionId,
    /// From 0.
    pub(super) turn: u32,
}

/// A request that may be handed to the engine.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) request: Request,
    pub(crate) head: Head,
    pub(crate) stream: bool,
    pub(crate) background: bool,
    /// Of one that is stored.
    pub(crate) id: Option<ResponseId>,
    /// Of a session that was made for it, until the engine has taken the request or refused it.
    pub(crate) trial: Option<Trial>,
}

/// What became of a stored response.
#[derive(Debug)]
pub(crate) enum Stored {
    /// It is over: its events after a number, and the response.
    Told(Vec<Value>, Value),
    /// It is being answered, with what is known of it.
    Running(Vec<Value>, Value),
    /// The daemon has cut it, and nobody goes on with it.
    Cut(Head),
}

/// Reads a request and makes a prompt of it; one that is stored is in the journal then.
///
/// # Errors
/// What is wrong with the request; the model's or the session's.
pub(crate) async fn prepare(
    service: &Service,
    owner: Owner,
    body: &[u8],
    held: impl Send + 'static,
) -> Result<Prepared, Refusal> {
    let mut fields = Fields::read(body)?;
    items::resolve(service, owner, &mut fields).await?;
    let (stream, background) = (fields.stream.unwrap_or(false), fields.background.unwrap_or(false));
    if !fields.is_stored() {
        let id = format!("{PREFIX}{:016x}", getrandom::u64().unwrap_or_default());
        let ask = ChatAsk::read(fields.chat(None)?.to_string().as_bytes()).map_err(renamed)?;
        let request = ask.prepare(service, owner, held).await.map_err(renamed)?.request;
        return Ok(Prepared { request, head: fields.head(id), stream, background, id: None, trial: None });
    }
    // What cannot be read makes no session.
    fields.chat(None)?;
    let (id, trial, asked) = loop {
        let (id, trial) = place(service, owner, &mut fields).await?;
        let asked = async {
            let ask = ChatAsk::read(fields.chat(Some(&id.session.to_string()))?.to_string().as_bytes())?;
            ask.in_background(background).at_turn(id.turn).prepare(service, owner, ()).await
        };
        match asked.await {
            Ok(asked) => break (id, trial, asked),
            // Another response has gone on from the same one in the meantime: this one does so in a fork.
            Err(refusal) if refusal.is_too_late() => {}
            Err(refusal) => return Err(renamed(refusal)),
        }
    };
    drop(held);
    let mut head = fields.head(id.to_string());
    head.fixed["model"] = json!(asked.request.model());
    Ok(Prepared { request: asked.request, head, stream, background, id: Some(id), trial })
}

/// How many tokens a request would give the model.
///
/// # Errors
/// What is wrong with the request; the model's, which must be of this box.
pub(crate) async fn count(
    service: &Service,
    owner: Owner,
    body: &[u8],
    held: impl Send + 'static,
) -> Result<Value, Refusal> {
    let mut fields = Fields::read(body)?;
    if fields.previous_response_id.is_some() {
        return Err(Refusal::invalid("previous_response_id", "is not counted: send the whole conversation"));
    }
    items::resolve(service, owner, &mut fields).await?;
    let ask = ChatAsk::read(fields.chat(None)?.to_string().as_bytes()).map_err(renamed)?;
    size::of_chat(service, owner, ask, held).await.map_err(renamed)
}

/// The turn that a request will be: of the session of the response that it goes on from, of a fork of it where that
/// one has gone on already, or of a new one. A session that was made for it goes again if nothing comes of it.
async fn place(service: &Service, owner: Owner, fields: &mut Fields) -> Result<(ResponseId, Option<Trial>), Refusal> {
    // On one thread with the session's making: the caller may go away at any time.
    let tried_out = move |service: &Service, session| Ok((session, service.sessions()?.try_out(owner, session)?));
    let Some(previous) = &fields.previous_response_id else {
        let model = service.canonical(fields.model()).to_owned();
        let _held = models::held(service, owner, &model).await?;
        let made = sessions::verb(service, Some(owner), move |service| {
            let change = Change { title: Some(TITLE.to_owned()), ..Change::default() };
            tried_out(service, service.create_session(owner, &model, change)?.id)
        });
        let (session, trial) = made.await?;
        return Ok((ResponseId { session, turn: 0 }, Some(trial)));
    };
    let previous: ResponseId = previous.parse().map_err(|()| not_found("previous_response_id", previous))?;
    let (_, turns) = turns(service, owner, previous, "previous_response_id").await?;
    let first = turns.first().and_then(|turn| turn.messages.first());
    let rules = first.filter(|message| message.role == Role::System).and_then(|message| message.content.clone());
    if fields.instructions.is_some() && fields.instructions != rules {
        let reason = "are those of the first response and stay so; leave them out, or begin anew";
        return Err(Refusal::invalid("instructions", reason));
    }
    fields.instructions = None;
    let turn = previous.turn + 1;
    if turn as usize == turns.len() {
        return Ok((ResponseId { session: previous.session, turn }, None));
    }
    let fork =
        move |service: &Service| tried_out(service, service.sessions()?.fork(owner, previous.session, Some(turn))?.id);
    let (session, trial) = sessions::verb(service, Some(owner), fork).await?;
    Ok((ResponseId { session, turn }, Some(trial)))
}

/// A stored response and its events after the number `after`.
///
/// # Errors
/// There is none of that name, or the session's.
pub(crate) async fn stored(
    service: &Service,
    owner: Owner,
    id: ResponseId,
    after: Option<u64>,
) -> Result<Stored, Refusal> {
    let (model, turns) = turns(service, owner, id, "response_id").await?;
    let is_last = id.turn as usize + 1 == turns.len();
    let turn = &turns[id.turn as usize];
    let head = head(id, &model, turn);
    if turn.end == TurnEnd::Cut && is_last {
        return Ok(Stored::Cut(head));
    }
    let mut script = Script::begin(head, after);
    if turn.end == TurnEnd::Running {
        let response = script.response("in_progress");
        return Ok(Stored::Running(script.take(), response));
    }
    if let Some(answer) = &turn.answer {
        say(&mut script, answer);
    }
    let end = end(turn);
    let status = match end {
        End::Completed => "completed",
        End::Incomplete => "incomplete",
        End::Cancelled => "cancelled",
        End::Failed { .. } => "failed",
    };
    let (input, output) = (turn.prompt_tokens, turn.answer_tokens);
    script.end(&end, Tokens { input, cached: None, output, reasoning: None });
    let events = script.take();
    let response = Script::last_response(&events).unwrap_or_else(|| script.response(status));
    Ok(Stored::Told(events, response))
}

/// Deletes a response, which must be the last of its session; with the only one goes the session.
///
/// # Errors
/// There is none of that name, it is being answered, or another one goes on from it.
pub(crate) async fn delete(service: &Service, owner: Owner, id: ResponseId) -> Result<Value, Refusal> {
    turns(service, owner, id, "response_id").await?;
    // In one with the look: another one may go on from it at any time.
    let is_last = move |service: &Service| service.sessions()?.forget_turn(owner, id.session, id.turn);
    if !sessions::verb(service, Some(owner), is_last).await? {
        let message = format!("another response goes on from '{id}'; delete that one first");
        return Err(Refusal::at_door(AtDoor::ResponseInUse, Some("response_id"), message));
    }
    Ok(json!({ "id": id.to_string(), "object": "response", "deleted": true }))
}

pub(super) async fn turns(
    service: &Service,
    owner: Owner,
    id: ResponseId,
    param: &str,
) -> Result<(String, Vec<SaidTurn>), Refusal> {
    let turns =
        sessions::verb(service, Some(owner), move |service| match service.sessions()?.turns(owner, id.session) {
            Err(Failure::SessionNotFound { .. }) => Ok(None),
            turns => turns.map(Some),
        });
    turns.await?.filter(|(_, turns)| (id.turn as usize) < turns.len()).ok_or_else(|| not_found(param, &id.to_string()))
}

/// What is known of a response without its request.
pub(super) fn head(id: ResponseId, model: &str, turn: &SaidTurn) -> Head {
    let previous = id.turn.checked_sub(1).map(|turn| ResponseId { turn, ..id }.to_string());
    let rules = turn.messages.first().filter(|message| message.role == Role::System);
    let fixed = json!({
        "created_at": turn.at,
        "model": model,
        "background": turn.in_background,
        "store": true,
        "instructions": rules.and_then(|message| message.content.clone()),
        "max_output_tokens": turn.max_tokens,
        "metadata": {},
        "parallel_tool_calls": true,
        "previous_response_id": previous,
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
    });
    Head { id: id.to_string(), fixed, telling: Telling::default() }
}

/// How the response of a turn ended.
pub(super) fn end(turn: &SaidTurn) -> End {
    match turn.end {
        TurnEnd::Complete => {
            // An answer that an earlier version has journaled says nothing of it, but how long it is.
            let by_length = || turn.max_tokens == Some(turn.answer_tokens);
            let is_cut = turn.reason.map_or_else(by_length, |reason| reason == FinishReason::Length);
            if is_cut { End::Incomplete } else { End::Completed }
        }
        TurnEnd::Cancelled => End::Cancelled,
        TurnEnd::Failed | TurnEnd::Cut | TurnEnd::Running => {
            End::Failed { code: "cut_off".to_owned(), message: "the answer was given up".to_owned() }
        }
    }
}

pub(super) fn say(script: &mut Script, answer: &ChatMessage) {
    script.text_of(true, answer.reasoning_content.as_deref().unwrap_or_default());
    script.text_of(false, answer.content.as_deref().unwrap_or_default());
    for call in &answer.tool_calls {
        script.call(&call.id, &call.name, &call.arguments);
    }
}

pub(crate) fn not_found(param: &str, id: &str) -> Refusal {
    let id: String = id.chars().take(64).collect();
    Refusal::at_door(AtDoor::ResponseNotFound, Some(param), format!("there is no response '{id}'"))
}

/// Fields of chats that have other names here.
fn renamed(refusal: Refusal) -> Refusal {
    refusal.with_param(|param| match param {
        "messages" => Some("input"),
        "max_completion_tokens" => Some("max_output_tokens"),
        "response_format" => Some("text.format"),
        "reasoning_effort" => Some("reasoning.effort"),
        "session_id" => Some("previous_response_id"),
        _ => None,
    })
}

impl fmt::Display for ResponseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let session = self.session.to_string();
        let (_, digits) = session.split_once('_').unwrap_or(("", &session));
        write!(f, "{PREFIX}{digits}_{}", self.turn)
    }
}

impl FromStr for ResponseId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (digits, turn) = text.strip_prefix(PREFIX).ok_or(())?.split_once('_').ok_or(())?;
        let session = format!("sess_{digits}").parse().map_err(drop)?;
        let id = Self { session, turn: turn.parse().map_err(drop)? };
        // One spelling each.
        if id.to_string() == text { Ok(id) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_response_ends_as_it_was_told_and_an_old_one_by_its_length() {
        let end = |reason, answer_tokens, max_tokens| {
            let answer = Some(ChatMessage::new(Role::Assistant, "Ho"));
            let (at, prompt_tokens) = (0, 1);
            let (messages, end, in_background) = (Vec::new(), TurnEnd::Complete, false);
            let turn =
                SaidTurn { at, messages, answer, end, reason, prompt_tokens, answer_tokens, max_tokens, in_background };
            super::end(&turn)
        };
        let (stop, length) = (Some(FinishReason::Stop), Some(FinishReason::Length));
        assert_eq!(end(length, 7, None), End::Incomplete, "the context has ended it");
        assert_eq!(end(stop, 7, Some(7)), End::Completed, "its last token was the end");
        assert_eq!([end(None, 7, Some(7)), end(None, 6, Some(7))], [End::Incomplete, End::Completed]);
    }

    #[test]
    fn a_name_tells_the_session_and_the_turn() {
        let id = ResponseId { session: SessionId::from_bytes([0xab; 16]), turn: 7 };
        let text = id.to_string();
        assert_eq!(text, format!("resp_{}_7", "ab".repeat(16)));
        assert_eq!(text.parse(), Ok(id));
        for wrong in
            ["", "resp_", "resp_ab_7", &format!("{text}x"), &text.replace("_7", "_07"), &text.replace("resp", "sess")]
        {
            assert_eq!(wrong.parse::<ResponseId>(), Err(()), "{wrong}");
        }
    }
}
