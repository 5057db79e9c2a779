//! How are sessions asked for over D-Bus? What the socket has below `/v1/sessions`, as calls of their objects.

use super::{Link, MANAGER, PROPERTIES, ROOT, object, pipe_of};
use anyhow::{Context, bail};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::Receiver;
use zbus::wire::{OwnedObjectPath, OwnedVariant, Variant};

const SESSION: &str = "org.sparsed1.Session";

type Properties = HashMap<String, OwnedVariant>;

impl Link {
    /// Carries out what the socket does at `path`, the part behind `/v1/sessions`.
    ///
    /// # Errors
    /// The daemon's, or that it is not on D-Bus.
    pub(super) async fn sessions(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let mut parts = path.trim_start_matches('/').splitn(2, '/');
        let (id, verb) = (parts.next().unwrap_or_default(), parts.next());
        let at = format!("{ROOT}/sessions/{id}");
        match (method, id, verb) {
            ("GET", "", None) => {
                let reply = self.call(ROOT, MANAGER, "ListSessions", &()).await?;
                let all: Vec<(OwnedObjectPath, Properties)> = reply.body().deserialize()?;
                Ok(json!({ "data": all.iter().map(|(_, properties)| fields(properties)).collect::<Vec<_>>() }))
            }
            ("POST", "", None) => self.made(ROOT, MANAGER, "CreateSession", body).await,
            ("GET", _, None) => {
                let mut session = self.session(&at).await?;
                let messages: String = self.call(&at, SESSION, "GetMessages", &()).await?.body().deserialize()?;
                session["messages"] = serde_json::from_str(&messages).context("messages that are not JSON")?;
                Ok(session)
            }
            ("POST", _, None) => {
                self.call(&at, SESSION, "Change", &(options(body)?,)).await?;
                self.session(&at).await
            }
            ("DELETE", _, None) => {
                self.call(&at, SESSION, "Delete", &()).await?;
                Ok(json!({ "id": id }))
            }
            ("POST", _, Some("fork")) => self.made(&at, SESSION, "Fork", body).await,
            ("POST", _, Some("truncate")) => {
                let turns = body["turns"].as_u64().and_then(|n| u32::try_from(n).ok()).context("turns are missing")?;
                self.call(&at, SESSION, "Truncate", &(turns,)).await?;
                self.session(&at).await
            }
            ("POST", _, Some("checkpoint")) => {
                self.call(&at, SESSION, "Checkpoint", &()).await?;
                self.session(&at).await
            }
            _ => bail!("{method} /v1/sessions{path} is not on D-Bus"),
        }
    }

    /// The reading end of the last answer of the session `id`, once more and on from where it was cut.
    ///
    /// # Errors
    /// The daemon's.
    pub(super) async fn resumed(&self, id: &str, body: &Value) -> anyhow::Result<Receiver> {
        let at = format!("{ROOT}/sessions/{id}");
        pipe_of(&self.call(&at, SESSION, "Continue", &(options(body)?,)).await?)
    }

    /// The session `id` as a file.
    ///
    /// # Errors
    /// The daemon's, or memory that cannot be read.
    pub(super) async fn exported(&self, id: &str) -> anyhow::Result<Vec<u8>> {
        let reply = self.call(&format!("{ROOT}/sessions/{id}"), SESSION, "Export", &()).await?;
        let fd: zbus::OwnedFd = reply.body().deserialize()?;
        let mut file = std::fs::File::from(OwnedFd::from(fd));
        std::io::Seek::rewind(&mut file)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A session of such a file.
    ///
    /// # Errors
    /// The daemon's, or no memory.
    pub(super) async fn imported(&self, file: &[u8]) -> anyhow::Result<Value> {
        let fd = sparsed_surface::sealed(file).context("memory for the file")?;
        let reply = self.call(ROOT, MANAGER, "ImportSession", &(zbus::Fd::from(fd),)).await?;
        let (at,): (OwnedObjectPath,) = reply.body().deserialize()?;
        self.session(&at).await
    }

    /// What `method` makes with these options.
    async fn made(&self, at: &str, interface: &str, method: &str, body: &Value) -> anyhow::Result<Value> {
        let reply = self.call(at, interface, method, &(options(body)?,)).await?;
        let (made,): (OwnedObjectPath,) = reply.body().deserialize()?;
        self.session(&made).await
    }

    async fn session(&self, at: &str) -> anyhow::Result<Value> {
        let reply = self.call(at, PROPERTIES, "GetAll", &(SESSION,)).await?;
        Ok(fields(&reply.body().deserialize::<Properties>()?))
    }
}

/// A body's fields as a call's options; those that are null are not among them.
fn options(body: &Value) -> anyhow::Result<HashMap<String, Variant<'_>>> {
    let mut options = HashMap::new();
    for (name, value) in object(body)? {
        let value = match value {
            Value::Null => continue,
            Value::Bool(value) => Variant::from(*value),
            Value::String(value) => Variant::from(value.as_str()),
            value => match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(n) => Variant::from(n),
                None => bail!("'{name}' is no option on D-Bus"),
            },
        };
        options.insert(name.clone(), value);
    }
    Ok(options)
}

/// Properties with the names that the socket has for them: `DiskBytes` is `disk_bytes`.
fn fields(properties: &Properties) -> Value {
    let field = |(name, value): (&String, &OwnedVariant)| {
        let mut snake = String::new();
        for (at, letter) in name.chars().enumerate() {
            if letter.is_ascii_uppercase() && at > 0 {
                snake.push('_');
            }
            snake.push(letter.to_ascii_lowercase());
        }
        (snake, json_of(value))
    };
    Value::Object(properties.iter().map(field).collect::<Map<String, Value>>())
}

fn json_of(value: &OwnedVariant) -> Value {
    let text = || <&str>::try_from(value).ok().map(|text| json!(text));
    let flag = || bool::try_from(value).ok().map(|flag| json!(flag));
    let small = || u32::try_from(value).ok().map(|n| json!(n));
    let large = || u64::try_from(value).ok().map(|n| json!(n));
    text().or_else(flag).or_else(small).or_else(large).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_have_the_names_of_the_sockets_fields() {
        let properties = HashMap::from([
            ("DiskBytes".to_owned(), OwnedVariant::from(5u64)),
            ("Turns".to_owned(), OwnedVariant::from(2u32)),
            ("Pinned".to_owned(), OwnedVariant::from(true)),
        ]);
        assert_eq!(fields(&properties), json!({ "disk_bytes": 5, "turns": 2, "pinned": true }));
    }

    #[test]
    fn options_are_what_a_body_says() {
        let body = json!({ "title": "x", "pinned": false, "turns": null });
        let mut names: Vec<String> = options(&body).unwrap().into_keys().collect();
        names.sort();
        assert_eq!(names, ["pinned", "title"]);
        assert!(options(&json!({ "turns": -1 })).is_err() && options(&json!([])).is_err());
    }
}
