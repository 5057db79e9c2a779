//! What becomes of a message? Its caller is found out, its row looked up, its verb carried out, its reply sent.
//!
//! Not zbus's object server: that one shows every object to everybody, in introspection and in its object manager,
//! wants
//! an object for each of the sessions on the disk, and takes calls without a limit. Here a path is looked at when it is
//! called, for the one who calls.

use super::call::{Call, CallError, Outcome};
use super::interface::{Interface, Method, ROOT, Verb};
use super::manager::INLINE_BYTES_MAX;
use super::object::{Folder, Object};
use super::requests::Request;
use super::values::{self, Dict};
use super::{Door, manager, session, xml};
use crate::bodies::sessions;
use std::collections::BTreeSet;
use std::sync::Arc;
use zbus::Message;
use zbus::message::Flags;
use zbus::names::OwnedUniqueName;

/// Most bytes of a message that is looked at: the longest body of a request, and something for its options.
const MESSAGE_BYTES_MAX: usize = INLINE_BYTES_MAX + (64 << 10);

/// Answers a method call, whatever it is.
async fn answer(door: &Door, message: Message) {
    let (reply, after) = match outcome(door, &message).await {
        Ok(Outcome { reply, after }) => (Ok(reply), after),
        Err(error) => (error.reply(&message), None),
    };
    let is_wanted = !message.primary_header().flags().contains(Flags::NO_REPLY_EXPECTED);
    drop(message); // with the descriptors that came with it
    let sent = match reply {
        Ok(reply) if is_wanted => door.bus.send(&reply).await,
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        log::debug!(reason:% = error; "not answered");
    }
    if let Some(after) = after {
        tokio::spawn(after);
    }
}

async fn refuse(door: &Door, message: &Message, error: &CallError) {
    let Ok(reply) = error.reply(message) else { return };
    if let Err(error) = door.bus.send(&reply).await {
        log::debug!(reason:% = error; "not refused");
    }
}

async fn outcome(door: &Door, message: &Message) -> Result<Outcome, CallError> {
    let header = message.header();
    let sender = header.sender().ok_or_else(|| CallError::Standard("Failed", "the call has no sender".to_owned()))?;
    let sender = OwnedUniqueName::from(sender.to_owned());
    let _of_sender = door.peers.count_sender(&sender)?;
    let uid = door.peers.uid(&door.bus, &sender).await?;
    let _of_user = door.peers.count_user(uid)?;
    let path = header.path().map(ToString::to_string).unwrap_or_default();
    let unknown = || CallError::Standard("UnknownObject", format!("there is no object {path}"));
    let object = Object::at(&path).ok_or_else(unknown)?;
    let request = match object {
        Object::Request(key) => Some(door.shared.requests.find(uid, key).ok_or_else(unknown)?),
        _ => None,
    };
    let member = header.member().map(ToString::to_string).unwrap_or_default();
    let row = row(object, header.interface().map(|name| name.as_str()), &member)?;
    let (wanted, got) = (row.signature(), message.body().signature().to_string_no_parens());
    if wanted != got {
        let reason = format!("{member} takes '{wanted}', the call has '{got}'");
        return Err(CallError::Standard("InvalidArgs", reason));
    }
    drop(header);
    let call = Call::new(message.clone(), sender, uid);
    verb(door, &call, object, request.as_deref(), row.verb).await
}

/// The row that a call means. Without an interface its member must do.
fn row(object: Object<'_>, interface: Option<&str>, member: &str) -> Result<&'static Method, CallError> {
    let mut all = object.interfaces();
    if let Some(name) = interface {
        all.retain(|interface| interface.name == name);
        if all.is_empty() {
            return Err(CallError::Standard("UnknownInterface", format!("the object has no interface {name}")));
        }
    }
    let unknown = || CallError::Standard("UnknownMethod", format!("the object has no method {member}"));
    all.iter().find_map(|interface| interface.method(member)).ok_or_else(unknown)
}

async fn verb(
    door: &Door,
    call: &Call,
    object: Object<'_>,
    request: Option<&Request>,
    verb: Verb,
) -> Result<Outcome, CallError> {
    match (verb, object) {
        (Verb::Ping, _) => call.answer(&()),
        (Verb::Introspect, _) => {
            let children = children(door, call, object).await?;
            call.answer(&(xml::node(&object.interfaces(), &children),))
        }
        (Verb::Get, _) => {
            let (interface, name): (String, String) = call.arguments()?;
            has_property(object, &interface, &name)?;
            let mut all = properties(door, call, object, request, &interface).await?;
            let unknown = || CallError::Standard("UnknownProperty", format!("the object has no property {name}"));
            call.answer(&(all.remove(&name).ok_or_else(unknown)?,))
        }
        (Verb::GetAll, _) => {
            let (interface,): (String,) = call.arguments()?;
            call.answer(&(properties(door, call, object, request, &interface).await?,))
        }
        (Verb::Set, _) => Err(CallError::Standard("PropertyReadOnly", "properties are read only".to_owned())),
        (Verb::Cancel, _) => {
            request.into_iter().for_each(Request::cancel);
            call.answer(&())
        }
        (verb, Object::Session(id)) => session::call(door, call, id, verb).await,
        (verb, _) => manager::call(door, call, verb).await,
    }
}

/// Looks before anything is asked of the disk.
fn has_property(object: Object<'_>, interface: &str, name: &str) -> Result<(), CallError> {
    let rows = object.own().filter(|own| own.name == interface).map_or(&[][..], |own| own.properties);
    if rows.iter().any(|row| row.name == name) {
        return Ok(());
    }
    Err(CallError::Standard("UnknownProperty", format!("{interface} has no property {name}")))
}

/// The properties of one of an object's interfaces; none of the standard ones has any.
async fn properties(
    door: &Door,
    call: &Call,
    object: Object<'_>,
    request: Option<&Request>,
    interface: &str,
) -> Result<Dict, CallError> {
    let has = |own: &Interface| own.name == interface || interface.is_empty();
    if !object.own().is_some_and(has) {
        let known = object.interfaces().iter().any(|known| known.name == interface);
        let unknown = || CallError::Standard("UnknownInterface", format!("the object has no interface {interface}"));
        return if known { Ok(Dict::new()) } else { Err(unknown()) };
    }
    match (object, request) {
        (Object::Session(id), _) => session::properties(door, call, id).await,
        (_, Some(request)) => Ok(Dict::from([
            ("State".to_owned(), values::text(request.state())),
            ("Lines".to_owned(), request.lines().into()),
        ])),
        _ => Ok(manager::properties(door).into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
    }
}

/// Names of the nodes below an object: of the caller's own.
async fn children(door: &Door, call: &Call, object: Object<'_>) -> Result<Vec<String>, CallError> {
    let requests = |first: bool| {
        let keys = door.shared.requests.keys(call.uid);
        let part = move |key: String| key.split_once('/').map(|(sender, token)| (sender.to_owned(), token.to_owned()));
        keys.into_iter().filter_map(part).filter(move |(sender, _)| match object {
            Object::Folder(Folder::RequestsOf(wanted)) => sender == wanted,
            _ => first,
        })
    };
    Ok(match object {
        Object::Folder(Folder::Root) => vec!["org".to_owned()],
        Object::Folder(Folder::Org) => ROOT.strip_prefix("/org/").map(str::to_owned).into_iter().collect(),
        Object::Manager => vec!["requests".to_owned(), "sessions".to_owned()],
        Object::Folder(Folder::Requests) => {
            requests(true).map(|(sender, _)| sender).collect::<BTreeSet<_>>().into_iter().collect()
        }
        Object::Folder(Folder::RequestsOf(_)) => requests(false).map(|(_, token)| token).collect(),
        Object::Folder(Folder::Sessions) if door.shared.service.sessions().is_ok() => {
            let list = sessions::list(&door.shared.service, call.owner()).await?;
            let ids = list["data"].as_array().into_iter().flatten().filter_map(|session| session["id"].as_str());
            ids.map(str::to_owned).collect()
        }
        _ => Vec::new(),
    })
}

/// Takes a call if it is small enough and there is room, and has a task answer it. Waits only while the bus does not
/// take
/// a refusal: then nothing more is to be taken from it.
pub(super) async fn take(door: &Arc<Door>, message: Message) {
    let length = message.body().len();
    if length > MESSAGE_BYTES_MAX {
        let said = format!("the message has {length} bytes, the limit is {MESSAGE_BYTES_MAX}; use GenerateFromFd");
        return refuse(door, &message, &CallError::limit(said)).await;
    }
    let Ok(place) = Arc::clone(&door.calls).try_acquire_owned() else {
        return refuse(door, &message, &CallError::limit("too many calls are being answered already")).await;
    };
    let door = Arc::clone(door);
    tokio::spawn(async move {
        answer(&door, message).await;
        drop(place);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::interface::{MANAGER, REQUEST, SESSION};

    #[test]
    fn a_call_means_one_row_or_none() {
        let name = |object, interface: Option<&str>, member: &str| row(object, interface, member).map(|row| row.verb);
        assert_eq!(name(Object::Manager, Some("org.sparsed1.Manager"), "Generate").unwrap(), Verb::Generate);
        assert_eq!(name(Object::Session("x"), None, "Fork").unwrap(), Verb::Fork);
        assert_eq!(name(Object::Folder(Folder::Org), None, "Introspect").unwrap(), Verb::Introspect);
        assert!(name(Object::Session("x"), None, "Generate").is_err());
        assert!(name(Object::Manager, Some("org.sparsed1.Session"), "Fork").is_err());
        assert!(name(Object::Folder(Folder::Org), Some("org.freedesktop.DBus.Properties"), "Get").is_err());
    }

    #[test]
    fn every_row_has_a_verb_of_its_own() {
        let rows = [&MANAGER, &SESSION, &REQUEST].map(|interface| interface.methods.iter().map(|row| row.verb));
        let verbs: Vec<Verb> = rows.into_iter().flatten().collect();
        for (at, verb) in verbs.iter().enumerate() {
            assert!(!verbs[..at].contains(verb), "{verb:?} twice");
        }
    }
}
