//! How does the tool speak to the daemon over D-Bus? The same requests as over the socket, as calls of `org.sparsed1`.

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use sparsed_surface::Bus;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::Receiver;
use zbus::wire::{DynamicType, OwnedObjectPath, OwnedVariant, Variant};
use zbus::{Connection, Message};

const NAME: &str = "org.sparsed1";
const ROOT: &str = "/org/sparsed1";
const MANAGER: &str = "org.sparsed1.Manager";

/// The JSON that the socket has at `path`.
///
/// # Errors
/// No daemon on the bus, or its own error.
pub(super) async fn get(bus: &Bus, path: &str) -> anyhow::Result<Value> {
    let connection = connect(bus).await?;
    let text: String = match path {
        "/v1/status" => call(&connection, bus, MANAGER, "GetStatus", &()).await?.body().deserialize()?,
        "/v1/models" => call(&connection, bus, MANAGER, "ListModels", &()).await?.body().deserialize()?,
        "/health" => {
            let of = (MANAGER, "State");
            let reply = call(&connection, bus, "org.freedesktop.DBus.Properties", "Get", &of).await?;
            let state = String::try_from(reply.body().deserialize::<OwnedVariant>()?)?;
            return Ok(json!({ "status": if state == "ready" { "ok" } else { &state } }));
        }
        _ => bail!("{path} is not on D-Bus"),
    };
    serde_json::from_str(&text).context("an answer that is not JSON")
}

/// An answer on its way. Dropped, it is cancelled.
#[derive(Debug)]
pub(super) struct Pipe {
    pipe: Receiver,
    /// The request ends with it.
    _connection: Connection,
}

impl Pipe {
    /// The chat that `body` asks for.
    ///
    /// # Errors
    /// As [`get`].
    pub(super) async fn open(bus: &Bus, body: &Value) -> anyhow::Result<Self> {
        let connection = connect(bus).await?;
        let options: HashMap<&str, Variant<'_>> = HashMap::new();
        let reply = call(&connection, bus, MANAGER, "Generate", &(body.to_string(), options)).await?;
        let (_request, pipe): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize()?;
        let pipe = Receiver::from_owned_fd(OwnedFd::from(pipe)).context("the pipe of the answer")?;
        Ok(Self { pipe, _connection: connection })
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

async fn connect(bus: &Bus) -> anyhow::Result<Connection> {
    bus.connect().await.with_context(|| format!("no bus to be reached ({bus:?})"))
}

async fn call<B: serde::Serialize + DynamicType>(
    connection: &Connection,
    bus: &Bus,
    interface: &str,
    method: &str,
    body: &B,
) -> anyhow::Result<Message> {
    let reply = connection.call_method(Some(NAME), ROOT, Some(interface), method, body).await;
    reply.map_err(|error| match error {
        // The daemon's own words.
        zbus::Error::MethodError(_, Some(message), _) => anyhow!("{message}"),
        error => anyhow!(error).context(format!("{NAME} does not answer on the bus ({bus:?})")),
    })
}
