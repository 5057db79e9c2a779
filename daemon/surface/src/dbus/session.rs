//! What can be done with a session? The verbs of `/org/sparsed1/sessions/<id>`, all on the caller's own.

use super::Door;
use super::call::{Call, CallError, Outcome};
use super::interface::SESSION;
use super::manager::{self, GenerateOptions};
use super::object::session_path;
use super::values::{self, Dict};
use super::{interface::Verb, memfd};
use crate::bodies::sessions::{self, SessionFields};
use serde::Deserialize;
use serde_json::{Value, json};
use sparsed_engine::api::Failure;
use zbus::Fd;
use zbus::wire::{ObjectPath, OwnedVariant};

/// Properties, and what the JSON of a session calls them.
const FIELDS: &[(&str, &str)] = &[
    ("Id", "id"),
    ("Model", "model"),
    ("Title", "title"),
    ("Created", "created"),
    ("LastUsed", "last_used"),
    ("State", "state"),
    ("Turns", "turns"),
    ("Tokens", "tokens"),
    ("Pinned", "pinned"),
    ("DiskBytes", "disk_bytes"),
    ("Damaged", "damaged"),
];

/// How an answer goes on.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ContinueOptions {
    stream: bool,
    handle_token: Option<String>,
    detach: bool,
}

/// Carries out `verb` on the session `id`.
///
/// # Errors
/// The session's, or what is wrong with the arguments.
pub(super) async fn call(door: &Door, call: &Call, id: &str, verb: Verb) -> Result<Outcome, CallError> {
    let (service, owner) = (&door.shared.service, call.owner());
    match verb {
        Verb::GetMessages => {
            let session = sessions::get(service, owner, id).await?;
            call.answer(&(session["messages"].to_string(),))
        }
        Verb::Continue => {
            let ContinueOptions { stream, handle_token, detach } = values::fields(&call.arguments::<(Dict,)>()?.0)?;
            let options = GenerateOptions { endpoint: None, handle_token, detach };
            let place = manager::place(door, call, &options)?;
            let fields = crate::bodies::parse(json!({ "stream": stream }).to_string().as_bytes())?;
            let (service, id) = (service.clone(), id.to_owned());
            let waits = sessions::model_is_absent(&service, owner, &id).await;
            let asked = async move { sessions::resume(&service, owner, &id, fields).await };
            manager::begin(door, call, place, waits, asked).await
        }
        Verb::Fork => {
            let fork = sessions::fork(service, owner, id, values::fields(&call.arguments::<(Dict,)>()?.0)?).await?;
            created(call, &fork)
        }
        Verb::Truncate => {
            let (turns,): (u32,) = call.arguments()?;
            let fields = crate::bodies::parse(json!({ "turns": turns }).to_string().as_bytes())?;
            sessions::truncate(service, owner, id, fields).await?;
            call.answer(&())
        }
        Verb::Checkpoint => {
            sessions::checkpoint(service, owner, id).await?;
            call.answer(&())
        }
        Verb::Rename => change(door, call, id, &json!({ "title": call.arguments::<(String,)>()?.0 })).await,
        Verb::Pin => change(door, call, id, &json!({ "pinned": call.arguments::<(bool,)>()?.0 })).await,
        Verb::Change => {
            sessions::change(service, owner, id, values::fields(&call.arguments::<(Dict,)>()?.0)?).await?;
            call.answer(&())
        }
        Verb::Export => {
            let file = sessions::export(service, owner, id).await?;
            let fd = memfd::write("session", &file).map_err(|error| CallError::system(&error))?;
            call.answer(&(Fd::from(fd),))
        }
        Verb::Delete => {
            sessions::delete(service, owner, id).await?;
            call.answer(&())
        }
        _ => Err(CallError::Standard("UnknownMethod", "sessions do not have it".to_owned())),
    }
}

async fn change(door: &Door, call: &Call, id: &str, fields: &Value) -> Result<Outcome, CallError> {
    let fields: SessionFields = crate::bodies::parse(fields.to_string().as_bytes())?;
    sessions::change(&door.shared.service, call.owner(), id, fields).await?;
    call.answer(&())
}

/// The path of a session that was made.
///
/// # Errors
/// As [`Call::answer`].
pub(super) fn created(call: &Call, session: &Value) -> Result<Outcome, CallError> {
    call.answer(&(path(session)?,))
}

/// All properties of the session `id`.
///
/// # Errors
/// The caller has none that is called so.
pub(super) async fn properties(door: &Door, call: &Call, id: &str) -> Result<Dict, CallError> {
    let list = sessions::list(&door.shared.service, call.owner()).await?;
    let found = list["data"].as_array().and_then(|all| all.iter().find(|session| session["id"] == id));
    let none = || CallError::Refused(Failure::SessionNotFound { id: id.chars().take(64).collect() }.into());
    Ok(dictionary(found.ok_or_else(none)?))
}

/// A session's JSON as properties.
pub(super) fn dictionary(session: &Value) -> Dict {
    let value = |(property, field): &(&str, &str)| {
        let row = SESSION.properties.iter().find(|row| row.name == *property)?;
        Some((row.name.to_owned(), values::typed(row.kind, &session[*field])))
    };
    FIELDS.iter().filter_map(value).collect::<std::collections::HashMap<String, OwnedVariant>>()
}

/// Where a session is.
///
/// # Errors
/// An id that no path can have.
pub(super) fn path(session: &Value) -> Result<ObjectPath<'static>, CallError> {
    let path = session_path(session["id"].as_str().unwrap_or_default());
    ObjectPath::try_from(path).map_err(|error| CallError::Standard("Failed", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_property_has_its_field_and_type() {
        let session = json!({ "id": "sess_0a", "model": "m", "title": "t", "created": 1, "last_used": 2,
            "state": "idle", "turns": 3, "tokens": 4, "pinned": true, "disk_bytes": 5, "damaged": false });
        let properties = dictionary(&session);
        assert_eq!(properties.len(), SESSION.properties.len());
        for row in SESSION.properties {
            assert_eq!(properties[row.name].value_signature().to_string(), row.kind, "{}", row.name);
        }
        assert_eq!(path(&session).unwrap().as_str(), "/org/sparsed1/sessions/sess_0a");
    }
}
