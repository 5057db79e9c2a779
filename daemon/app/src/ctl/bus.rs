//! How does the tool speak to the daemon over D-Bus? The same requests as over the socket, as calls of `org.sparsed1`.

pub(super) mod models;
mod sessions;

use anyhow::{Context, anyhow, bail};
use serde_json::{Map, Value, json};
use sparsed_surface::Bus;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::Receiver;
use zbus::wire::{DynamicType, OwnedObjectPath, OwnedVariant, Variant};
use zbus::{Connection, Message};

const NAME: &str = "org.sparsed1";
const ROOT: &str = "/org/sparsed1";
const MANAGER: &str = "org.sparsed1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// What the socket has for sessions is below it.
const SESSIONS: &str = "/v1/sessions";

/// A connection to a bus.
struct Link {
    connection: Connection,
    bus: Bus,
}

/// The JSON that the socket has at `path` for `method`.
///
/// # Errors
/// No daemon on the bus, or its own error.
pub(super) async fn ask(bus: &Bus, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    let link = Link::to(bus).await?;
    if let Some(below) = path.strip_prefix(SESSIONS) {
        return link.sessions(method, below, body).await;
    }
    let text: String = match (method, path) {
        ("GET", "/v1/status") => link.call(ROOT, MANAGER, "GetStatus", &()).await?.body().deserialize()?,
        ("GET", "/v1/models") => link.call(ROOT, MANAGER, "ListModels", &()).await?.body().deserialize()?,
        ("GET", "/health") => {
            let reply = link.call(ROOT, PROPERTIES, "Get", &(MANAGER, "State")).await?;
            let state = String::try_from(reply.body().deserialize::<OwnedVariant>()?)?;
            return Ok(json!({ "status": if state == "ready" { "ok" } else { &state } }));
        }
        _ => bail!("{method} {path} is not on D-Bus"),
    };
    serde_json::from_str(&text).context("an answer that is not JSON")
}

/// The file that the socket has at `path`: a session's export.
///
/// # Errors
/// As [`ask`].
pub(super) async fn get_file(bus: &Bus, path: &str) -> anyhow::Result<Vec<u8>> {
    let id = path.strip_prefix(SESSIONS).and_then(|below| below.strip_suffix("/export"));
    let id = id.with_context(|| format!("{path} is not on D-Bus"))?;
    Link::to(bus).await?.exported(id.trim_start_matches('/')).await
}

/// The JSON answer to a file: a session that is imported.
///
/// # Errors
/// As [`ask`].
pub(super) async fn put_file(bus: &Bus, file: &[u8]) -> anyhow::Result<Value> {
    Link::to(bus).await?.imported(file).await
}

/// An answer on its way. Dropped, it is cancelled.
#[derive(Debug)]
pub(super) struct Pipe {
    pipe: Receiver,
    /// The request ends with it.
    _connection: Connection,
}

impl Pipe {
    /// The answer to `body`, for which the socket has `path`.
    ///
    /// # Errors
    /// As [`ask`].
    pub(super) async fn open(bus: &Bus, path: &str, body: &Value) -> anyhow::Result<Self> {
        let link = Link::to(bus).await?;
        let below = path.strip_prefix(SESSIONS).and_then(|below| below.strip_suffix("/continue"));
        let pipe = match (below, path.strip_prefix("/v1/")) {
            (Some(id), _) => link.resumed(id.trim_start_matches('/'), body).await?,
            (None, Some(endpoint @ ("chat/completions" | "completions"))) => {
                let endpoint = endpoint.replace('/', ".");
                let options = HashMap::from([("endpoint", Variant::from(endpoint.as_str()))]);
                pipe_of(&link.call(ROOT, MANAGER, "Generate", &(body.to_string(), options)).await?)?
            }
            _ => bail!("{path} is not on D-Bus"),
        };
        Ok(Self { pipe, _connection: link.connection })
    }

    /// What has come, appended to `buffer`; whether there may be more.
    ///
    /// # Errors
    /// A pipe that cannot be read.
    pub(super) async fn read(&self, buffer: &mut Vec<u8>) -> anyhow::Result<bool> {
        let mut bytes = [0; 8192];
        loop {
            self.pipe.readable().await?;
            match self.pipe.try_read(&mut bytes) {
                Ok(n) => {
                    buffer.extend_from_slice(&bytes[..n]);
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the pipe of the answer"),
            }
        }
    }
}

impl Link {
    async fn to(bus: &Bus) -> anyhow::Result<Self> {
        let connection = bus.connect().await.with_context(|| format!("no bus to be reached ({bus:?})"))?;
        Ok(Self { connection, bus: bus.clone() })
    }

    async fn call<B: serde::Serialize + DynamicType>(
        &self,
        at: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> anyhow::Result<Message> {
        let reply = self.connection.call_method(Some(NAME), at, Some(interface), method, body).await;
        reply.map_err(|error| said(error, &self.bus))
    }
}

/// What is said of a call that has failed: the daemon's own words, if it has answered.
fn said(error: zbus::Error, bus: &Bus) -> anyhow::Error {
    match error {
        zbus::Error::MethodError(_, Some(message), _) => anyhow!("{message}"),
        error => anyhow!(error).context(format!("{NAME} does not answer on the bus ({bus:?})")),
    }
}

/// The reading end of the pipe that a request's reply carries.
fn pipe_of(reply: &Message) -> anyhow::Result<Receiver> {
    let (_request, pipe): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize()?;
    Receiver::from_owned_fd(OwnedFd::from(pipe)).context("the pipe of the answer")
}

/// The fields of a body.
fn object(body: &Value) -> anyhow::Result<&Map<String, Value>> {
    body.as_object().context("the body is not an object")
}
