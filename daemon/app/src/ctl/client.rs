//! How does the tool speak to the daemon? HTTP/1.1 over its Unix socket, or D-Bus where that is asked for.

use super::bus::{self, Pipe};
use crate::config::{Config, Paths};
use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use sparsed_surface::Bus;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Where chats are asked for.
const CHAT: &str = "/v1/chat/completions";
const WENT_AWAY: &str = "the daemon went away in the middle of the answer";
/// How a complaint begins of a socket on which connections are taken and nobody answers.
const NO_ANSWER: &str = "the socket listens, and no daemon answers";
/// Largest answer that is taken as one body.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Longest line of an event stream.
const LINE_BYTES_MAX: usize = 16 << 20;

/// The system's daemon, for users who run none of their own.
const SYSTEM_SOCKET: &str = "/run/sparsed/api.sock";

/// The socket that was named, or else where the user's daemon listens, or the system's.
pub(super) fn socket_or_default(named: Option<&Path>) -> PathBuf {
    let system = || Some(PathBuf::from(SYSTEM_SOCKET)).filter(|system| system.exists());
    let found = || own_socket().or_else(system).unwrap_or_else(|| Paths::of(&Config::default()).socket);
    named.map_or_else(found, Path::to_owned)
}

/// The socket of the user's own daemon, if there is one.
pub(super) fn own_socket() -> Option<PathBuf> {
    Some(Paths::of(&Config::default()).socket).filter(|own| own != Path::new(SYSTEM_SOCKET) && own.exists())
}

/// Where the daemon is.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Address {
    /// The daemon's socket.
    #[arg(long, env = "SPARSED_SOCKET", global = true)]
    socket: Option<PathBuf>,
    #[command(flatten)]
    on: OnBus,
}

/// Which bus, if any.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct OnBus {
    /// Speak D-Bus instead: system, session or the address of a bus.
    #[arg(
        long,
        value_name = "BUS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "system",
        global = true
    )]
    pub(super) dbus: Option<Bus>,
}

impl Address {
    /// A client of the daemon there.
    pub(super) fn client(&self) -> Client {
        match &self.on.dbus {
            Some(bus) => Client::OnBus(bus.clone()),
            None => Client::new(&self.socket()),
        }
    }

    fn socket(&self) -> PathBuf {
        socket_or_default(self.socket.as_deref())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.on.dbus {
            Some(_) => f.write_str("org.sparsed1"),
            None => self.socket().display().fmt(f),
        }
    }
}

/// A way to a daemon.
#[derive(Clone, Debug)]
pub(super) enum Client {
    /// Its socket.
    OnSocket(PathBuf),
    /// The bus that it is on.
    OnBus(Bus),
}

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self::OnSocket(socket.to_owned())
    }

    /// The JSON at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        match self {
            Self::OnSocket(socket) => whole(send(socket, "GET", path, Bytes::new()).await?).await,
            Self::OnBus(bus) => bus::ask(bus, "GET", path, &Value::Null).await,
        }
    }

    /// The chat completion that `body` asks for, as one object.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn chat(&self, body: &Value) -> anyhow::Result<Value> {
        self.answer_at(CHAT, body).await
    }

    /// The answer to `body` at another path than chats', as one object.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn answer_at(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        match self {
            Self::OnSocket(socket) => whole(send(socket, "POST", path, body.to_string().into()).await?).await,
            Self::OnBus(_) => self.stream_at(path, body).await?.next().await?.context("the answer is empty"),
        }
    }

    /// The chunks of the chat completion that `body` asks for. Dropping them ends the request.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn stream(&self, body: &Value) -> anyhow::Result<Events> {
        self.stream_at(CHAT, body).await
    }

    /// The events that answer `body` at another path than chats'. Dropping them ends the request.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn stream_at(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        let socket = match self {
            Self::OnBus(bus) => return Ok(Events::of(Source::Pipe(Pipe::open(bus, path, body).await?))),
            Self::OnSocket(socket) => socket,
        };
        let response = send(socket, "POST", path, body.to_string().into()).await?;
        if response.status() != StatusCode::OK {
            whole(response).await?;
            bail!("the daemon answered without an event stream");
        }
        Ok(Events::of(Source::Body(response.into_body())))
    }

    /// The JSON answer to `body`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        match self {
            Self::OnSocket(socket) => whole(send(socket, "POST", path, body.to_string().into()).await?).await,
            Self::OnBus(bus) => bus::ask(bus, "POST", path, body).await,
        }
    }

    /// The JSON answer to deleting what is at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        match self {
            Self::OnSocket(socket) => whole(send(socket, "DELETE", path, Bytes::new()).await?).await,
            Self::OnBus(bus) => bus::ask(bus, "DELETE", path, &Value::Null).await,
        }
    }

    /// The JSON answer to a file that is sent as it is.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn put_file(&self, path: &str, file: Vec<u8>) -> anyhow::Result<Value> {
        match self {
            Self::OnSocket(socket) => whole(send(socket, "POST", path, file.into()).await?).await,
            Self::OnBus(bus) => bus::put_file(bus, &file).await,
        }
    }

    /// The file at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn get_file(&self, path: &str) -> anyhow::Result<Bytes> {
        let socket = match self {
            Self::OnBus(bus) => return Ok(bus::get_file(bus, path).await?.into()),
            Self::OnSocket(socket) => socket,
        };
        let response = send(socket, "GET", path, Bytes::new()).await?;
        if response.status() != StatusCode::OK {
            whole(response).await?;
            bail!("the daemon answered without a file");
        }
        body_of(response).await
    }
}

/// How long a daemon may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(5);

/// What `work` gives, which asks a daemon for something that it has at hand. A socket of the service manager's takes
/// connections whether or not the service starts.
///
/// # Errors
/// As `work`'s, or no answer in time.
pub(super) async fn soon<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    within(PATIENCE, work).await
}

async fn within<T>(patience: Duration, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let late = || format!("{NO_ANSWER} within {} s; `sparsectl doctor` looks for the reason", patience.as_secs());
    tokio::time::timeout(patience, work).await.unwrap_or_else(|_| Err(anyhow::anyhow!(late())))
}

async fn send(socket: &Path, method: &str, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
    let hint =
        || format!("no daemon answers on {}; start `sparsed`, or name its socket with --socket", socket.display());
    let stream = UnixStream::connect(socket).await.with_context(hint)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            log::debug!(reason:% = error; "connection ended early");
        }
    });
    let request = Request::builder().method(method).uri(path).header("host", "sparsed");
    let request = request.header("content-type", "application/json").body(Full::new(body))?;
    Ok(sender.send_request(request).await?)
}

async fn whole(response: Response<Incoming>) -> anyhow::Result<Value> {
    let status = response.status();
    let body = body_of(response).await?;
    let json: Value = serde_json::from_slice(&body).with_context(|| format!("status {status}, not JSON"))?;
    match json["error"]["message"].as_str() {
        Some(message) => bail!("{message}"),
        // `/health` and its kind answer 503 with a body of their own.
        None => Ok(json),
    }
}

async fn body_of(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = http_body_util::Limited::new(response.into_body(), BODY_BYTES_MAX);
    Ok(body.collect().await.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes())
}

/// Chunks of an answer, one JSON value each.
#[derive(Debug)]
pub(super) struct Events {
    source: Source,
    buffer: Vec<u8>,
    /// The times have come, which end an answer.
    is_complete: bool,
}

/// Where chunks come from.
#[derive(Debug)]
enum Source {
    /// Server-sent events, which have an end of their own.
    Body(Incoming),
    /// Lines, whose end is the pipe's.
    Pipe(Pipe),
}

impl Events {
    /// The lines of a pipe.
    pub(super) fn of_pipe(pipe: Pipe) -> Self {
        Self::of(Source::Pipe(pipe))
    }

    fn of(source: Source) -> Self {
        Self { source, buffer: Vec::new(), is_complete: false }
    }

    /// The next value; `None` after the last.
    ///
    /// # Errors
    /// An error event, or a stream that breaks off.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let data = match &self.source {
                    Source::Body(_) => line.strip_prefix(b"data: "),
                    Source::Pipe(_) => Some(line.as_slice()),
                };
                let Some(data) = data else { continue };
                if data.trim_ascii() == b"[DONE]" {
                    return Ok(None);
                }
                let value: Value = serde_json::from_slice(data).context("an event that is not JSON")?;
                self.is_complete |= value.get("timings").is_some();
                return match value["error"]["message"].as_str() {
                    Some(message) => bail!("{message}"),
                    None => Ok(Some(value)),
                };
            }
            match &mut self.source {
                Source::Body(body) => {
                    let frame = body.frame().await.context(WENT_AWAY)?.context(WENT_AWAY)?;
                    self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                }
                Source::Pipe(pipe) => {
                    if !pipe.read(&mut self.buffer).await? {
                        ensure!(self.is_complete, WENT_AWAY);
                        return Ok(None);
                    }
                }
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                bail!("an event of more than {LINE_BYTES_MAX} bytes");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_asked_how_he_is_and_never_answers_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(within(Duration::ZERO, Client::new(&path).get("/health"))).unwrap_err();
        assert!(error.to_string().starts_with(NO_ANSWER), "{error}");
    }
}
