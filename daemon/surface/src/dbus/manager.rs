//! What can be asked of the daemon as a whole? The verbs and properties of `/org/sparsed1`.

use super::Door;
use super::call::{Call, CallError, Outcome};
use super::interface::{REQUEST, Verb};
use super::requests::Place;
use super::values::{self, Dict};
use super::{additions, leases, memfd, polkit, session, stream};
use crate::bodies::{Answering, Asked, ChatAsk, CompletionAsk, Wire, load, models, sessions, tokens};
use crate::refusal::{AtDoor, Refusal};
use crate::shares::Share;
use serde::Deserialize;
use serde_json::Value;
use sparsed_engine::api::Owner;
use sparsed_engine::{Admission, KeepAlive};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use zbus::wire::OwnedVariant;
use zbus::{Fd, OwnedFd};

/// Most bytes of a body that comes in a message: the bus copies it, and other users' messages wait.
pub(super) const INLINE_BYTES_MAX: usize = 1 << 20;

/// How a request is to be carried.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct GenerateOptions {
    pub(super) endpoint: Option<String>,
    pub(super) handle_token: Option<String>,
    pub(super) detach: bool,
}

/// Carries out `verb`.
///
/// # Errors
/// Whatever stands against it.
pub(super) async fn call(door: &Door, call: &Call, verb: Verb) -> Result<Outcome, CallError> {
    let (service, owner) = (&door.shared.service, call.owner());
    match verb {
        Verb::Generate => {
            let (body, options): (String, Dict) = call.arguments()?;
            let (body, share) = inline(door, owner, body, "use GenerateFromFd")?;
            generate(door, call, body, share, &options).await
        }
        Verb::GenerateFromFd => {
            let (fd, options): (OwnedFd, Dict) = call.arguments()?;
            let (body, share) = received(door, owner, fd, "body").await?;
            generate(door, call, body, share, &options).await
        }
        Verb::GetStatus => call.answer(&(models::status(service, owner).to_string(),)),
        Verb::ListModels => call.answer(&(models::list(service).to_string(),)),
        Verb::Tokenize | Verb::Detokenize => {
            let (body,): (String,) = call.arguments()?;
            let (body, share) = inline(door, owner, body, "HTTP takes longer ones")?;
            let _admission = service.admit(owner).map_err(Refusal::from)?;
            let made = match verb {
                Verb::Tokenize => tokens::tokenize(service, owner, &body, share).await?,
                _ => tokens::detokenize(service, owner, &body, share).await?,
            };
            call.answer(&(short(made.to_string())?,))
        }
        Verb::Lease => {
            let (model,): (String,) = call.arguments()?;
            lease(door, call, model)
        }
        Verb::KeepModel => {
            let (model, seconds): (String, i64) = call.arguments()?;
            let keep =
                u64::try_from(seconds).map_or(KeepAlive::FOREVER, |s| KeepAlive::for_time(Duration::from_secs(s)));
            service.keep(&model, keep).map_err(Refusal::from)?;
            call.answer(&())
        }
        Verb::AddModel => additions::add(door, call).await,
        Verb::CreateSession => {
            let fields = values::fields(&call.arguments::<(Dict,)>()?.0)?;
            session::created(call, &sessions::create(service, owner, fields).await?)
        }
        Verb::ListSessions => {
            let list = sessions::list(service, owner).await?;
            let entry = |session: &Value| Ok((session::path(session)?, session::dictionary(session)));
            let entries = list["data"].as_array().into_iter().flatten().map(entry);
            call.answer(&(entries.collect::<Result<Vec<_>, CallError>>()?,))
        }
        Verb::ImportSession => {
            let (fd,): (OwnedFd,) = call.arguments()?;
            let (file, _share) = received(door, owner, fd, "file").await?;
            session::created(call, &sessions::import(service, owner, file).await?)
        }
        Verb::ListSessionsOf => {
            let (uid,): (u32,) = call.arguments()?;
            polkit::check(door.system_bus(), call, polkit::MANAGE_OTHERS).await?;
            let list = sessions::list(service, Owner::Uid(uid)).await?;
            let mut sessions: Vec<Dict> =
                list["data"].as_array().into_iter().flatten().map(session::dictionary).collect();
            // What somebody talks about is not an administrator's business.
            sessions.iter_mut().for_each(|session| drop(session.remove("Title")));
            call.answer(&(sessions,))
        }
        Verb::DeleteSessionOf => {
            let (uid, id): (u32, String) = call.arguments()?;
            polkit::check(door.system_bus(), call, polkit::MANAGE_OTHERS).await?;
            sessions::delete(service, Owner::Uid(uid), &id).await?;
            call.answer(&())
        }
        _ => Err(CallError::Standard("UnknownMethod", "the manager does not have it".to_owned())),
    }
}

/// The bytes of a body that came in the message and their share of what bodies may hold together; what is too long for
/// that is told `instead`.
fn inline(door: &Door, owner: Owner, body: String, instead: &str) -> Result<(Vec<u8>, Share), CallError> {
    if body.len() > INLINE_BYTES_MAX {
        let message = format!("the body has {} bytes, {INLINE_BYTES_MAX} go into a message; {instead}", body.len());
        return Err(Refusal::at_door(AtDoor::BodyTooLarge, None, message).into());
    }
    let share = share(door, owner, body.len())?;
    Ok((body.into_bytes(), share))
}

/// An answer that goes into a message.
fn short(answer: String) -> Result<String, CallError> {
    if answer.len() > INLINE_BYTES_MAX {
        let message = format!("the answer has {} bytes, {INLINE_BYTES_MAX} go into a message", answer.len());
        return Err(Refusal::at_door(AtDoor::AnswerTooLarge, None, message + "; HTTP gives longer ones").into());
    }
    Ok(answer)
}

/// The bytes of a memfd and their share of what bodies may hold together.
async fn received(door: &Door, owner: Owner, fd: OwnedFd, param: &'static str) -> Result<(Vec<u8>, Share), CallError> {
    let (fd, limit) = (std::os::fd::OwnedFd::from(fd), door.shared.options.body_bytes_max);
    let share = share(door, owner, memfd::length(&fd)?.min(limit))?;
    let read = tokio::task::spawn_blocking(move || memfd::read(fd, param, limit)).await;
    let bytes = read.map_err(|error| CallError::Standard("Failed", error.to_string()))??;
    Ok((bytes, share))
}

fn share(door: &Door, owner: Owner, bytes: usize) -> Result<Share, CallError> {
    let share = door.shared.bodies.take_whole(owner, bytes.div_ceil(1024));
    share.ok_or_else(|| Refusal::too_many_bodies().into())
}

/// Opens the object of a request.
///
/// # Errors
/// The user has as many requests as it may; as [`super::requests::Requests::begin`].
pub(super) fn place(door: &Door, call: &Call, options: &GenerateOptions) -> Result<(Place, Admission), CallError> {
    let admission = door.shared.service.admit(call.owner()).map_err(Refusal::from)?;
    let requests = &door.shared.requests;
    let place = requests.begin(call.uid, &call.sender, options.handle_token.as_deref(), options.detach)?;
    Ok((place, admission))
}

async fn generate(door: &Door, call: &Call, body: Vec<u8>, share: Share, options: &Dict) -> Result<Outcome, CallError> {
    let options: GenerateOptions = values::fields(options)?;
    let (service, owner) = (&door.shared.service, call.owner());
    match options.endpoint.as_deref() {
        None | Some("chat.completions") => {
            let ask = ChatAsk::read(&body)?;
            drop(body);
            let place = place(door, call, &options)?;
            let (service, waits) = (service.clone(), ask.waits(service, owner).await);
            begin(door, call, place, waits, async move { ask.prepare(&service, owner, share).await }).await
        }
        Some("completions") => {
            let ask = CompletionAsk::read(&body)?;
            drop(body);
            let place = place(door, call, &options)?;
            let (service, waits) = (service.clone(), ask.waits(service));
            let asked = async move { ask.prepare(&service, owner, share).await.map_err(Refusal::about_prompt) };
            begin(door, call, place, waits, asked).await
        }
        Some(other) => {
            let reason = format!("is '{other}', must be 'chat.completions' or 'completions'");
            Err(Refusal::invalid("endpoint", reason).into())
        }
    }
}

/// Hands a request to the engine and gives the reading end of its pipe to the caller. What `waits` is answered before:
/// a caller waits less for a reply than it may take. Why it comes to nothing is told through the pipe then.
///
/// # Errors
/// What `asked` resolves to; the engine's; no descriptors left.
pub(super) async fn begin<W: Wire>(
    door: &Door,
    call: &Call,
    (place, admission): (Place, Admission),
    waits: bool,
    asked: impl Future<Output = Result<Asked<W>, Refusal>> + Send + 'static,
) -> Result<Outcome, CallError> {
    let (pipe, reader) = tokio::net::unix::pipe::pipe().map_err(|error| CallError::system(&error))?;
    let reader = reader.into_blocking_fd().map_err(|error| CallError::system(&error))?;
    let service = door.shared.service.clone();
    let beginning = async move {
        let asked = asked.await?;
        let streams = asked.reply.stream;
        Ok::<_, Refusal>((Answering::begin(&service, asked).await?, streams))
    };
    let mut beginning: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(beginning);
    if !waits {
        let begun = beginning.await?;
        place.request.answers();
        beginning = Box::pin(std::future::ready(Ok(begun)));
    }
    let outcome = call.answer(&(place.request.path.clone(), Fd::from(reader)))?;
    let (bus, patience) = (door.bus.clone(), door.shared.options.reader_patience);
    Ok(outcome.then(async move {
        // It counts as its user's until its end.
        let (request, _admission) = (&place.request, admission);
        let ended = stream::carry_once_begun(beginning, &pipe, request, patience).await;
        let (to, carried) = (Some(request.sender.as_str()), (ended.reason, ended.usage));
        let said = bus.emit_signal(to, &request.path, REQUEST.name, "Finished", &carried).await;
        if let Err(error) = said {
            log::debug!(reason:% = error; "the end of a request was not heard");
        }
    }))
}

/// Keeps a model in memory for whoever holds the other end of a pipe.
fn lease(door: &Door, call: &Call, model: String) -> Result<Outcome, CallError> {
    let service = &door.shared.service;
    // Not waited for: a caller waits less for a reply than a large model takes.
    drop(service.hold(Owner::Uid(call.uid), &model).map_err(Refusal::from)?);
    let lease = leases::begin(&door.shared.leases, call.uid)?;
    let (pipe, reader) = tokio::net::unix::pipe::pipe().map_err(|error| CallError::system(&error))?;
    let reader = reader.into_blocking_fd().map_err(|error| CallError::system(&error))?;
    let outcome = call.answer(&(Fd::from(reader),))?;
    Ok(outcome.then(leases::keep(service.clone(), model, pipe, call.uid, lease)))
}

/// All properties of the manager, always in the same order.
pub(super) fn properties(door: &Door) -> Vec<(&'static str, OwnedVariant)> {
    let service = &door.shared.service;
    let third_party = service.third_party_plugins();
    let states = service.models();
    let sum = |of: fn(&sparsed_engine::Stats) -> u64| states.iter().map(|model| of(&model.stats)).sum::<u64>();
    let count = |of| OwnedVariant::from(u32::try_from(sum(of)).unwrap_or(u32::MAX));
    let device = service.device();
    let (health, budget, outlook) = (models::health(service), service.budget(), service.outlook());
    let tightest = budget.tightest();
    vec![
        ("Version", values::text(env!("CARGO_PKG_VERSION"))),
        ("State", values::text(health.state)),
        ("StatusText", values::text(&health.text)),
        ("Tainted", (!third_party.is_empty()).into()),
        ("ThirdPartyPlugins", values::texts(&third_party)),
        ("Device", values::text(&device.name)),
        ("DeviceState", values::text(models::device_state(device.state))),
        ("DeviceFault", values::text(device.last_fault.as_deref().unwrap_or_default())),
        ("DeviceFaults", device.n_faults.into()),
        ("Models", values::texts(&models::ready(service))),
        ("ModelStates", states.iter().map(models::named_state).collect::<BTreeMap<String, String>>().into()),
        ("RunningRequests", count(|stats| u64::from(stats.load.running))),
        ("QueuedRequests", count(|stats| u64::from(stats.load.waiting))),
        ("KvBlocksUsed", count(|stats| u64::from(stats.load.blocks_used))),
        ("KvBlocksTotal", count(|stats| u64::from(stats.load.blocks_total))),
        ("MemoryLimit", tightest.map_or(0, |bound| bound.bytes).into()),
        ("MemoryLimitedBy", values::text(tightest.map_or("", |bound| bound.limit.name()))),
        ("MemoryForKv", budget.for_kv().unwrap_or(0).into()),
        ("MemoryHeadroom", load::headroom(&outlook).unwrap_or(0).into()),
        ("MemoryPressure", values::text(outlook.pressure.name())),
        ("SampledTokens", sum(|stats| stats.sampled_tokens).into()),
    ]
}
