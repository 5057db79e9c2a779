//! How does the tool speak to the daemon? HTTP/1.1 over its Unix socket.

use crate::config::{Config, Paths};
use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// Largest answer that is taken as one body.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Longest line of an event stream.
const LINE_BYTES_MAX: usize = 16 << 20;

/// The system's daemon, for users who run none of their own.
const SYSTEM_SOCKET: &str = "/run/sparsed/api.sock";

/// The socket that was named, or else where the user's daemon listens, or the system's.
pub(super) fn socket_or_default(named: Option<&Path>) -> PathBuf {
    let own = || Paths::of(&Config::default()).socket;
    let system = || Some(PathBuf::from(SYSTEM_SOCKET)).filter(|system| system.exists());
    let found = || Some(own()).filter(|own| own.exists()).or_else(system).unwrap_or_else(own);
    named.map_or_else(found, Path::to_owned)
}

/// A daemon's socket.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// The JSON at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.whole(self.send("GET", path, Bytes::new()).await?).await
    }

    /// The JSON answer to `body`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.whole(self.send("POST", path, body.to_string().into()).await?).await
    }

    /// The JSON answer to deleting what is at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.whole(self.send("DELETE", path, Bytes::new()).await?).await
    }

    /// The JSON answer to a file that is sent as it is.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn put_file(&self, path: &str, file: Vec<u8>) -> anyhow::Result<Value> {
        self.whole(self.send("POST", path, file.into()).await?).await
    }

    /// The file at `path`.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn get_file(&self, path: &str) -> anyhow::Result<Bytes> {
        let response = self.send("GET", path, Bytes::new()).await?;
        if response.status() != StatusCode::OK {
            self.whole(response).await?;
            bail!("the daemon answered without a file");
        }
        body(response).await
    }

    /// The events that answer `body`. Dropping them ends the request.
    ///
    /// # Errors
    /// No daemon, or its own error.
    pub(super) async fn stream(&self, path: &str, body: &Value) -> anyhow::Result<Events> {
        let response = self.send("POST", path, body.to_string().into()).await?;
        if response.status() != StatusCode::OK {
            self.whole(response).await?;
            bail!("the daemon answered without an event stream");
        }
        Ok(Events { body: response.into_body(), buffer: Vec::new() })
    }

    async fn send(&self, method: &str, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let hint = || {
            format!("no daemon answers on {}; start `sparsed`, or name its socket with --socket", self.socket.display())
        };
        let stream = UnixStream::connect(&self.socket).await.with_context(hint)?;
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

    async fn whole(&self, response: Response<Incoming>) -> anyhow::Result<Value> {
        let status = response.status();
        let body = body(response).await?;
        let json: Value = serde_json::from_slice(&body).with_context(|| format!("status {status}, not JSON"))?;
        match json["error"]["message"].as_str() {
            Some(message) => bail!("{message}"),
            // `/health` and its kind answer 503 with a body of their own.
            None => Ok(json),
        }
    }
}

async fn body(response: Response<Incoming>) -> anyhow::Result<Bytes> {
    let body = http_body_util::Limited::new(response.into_body(), BODY_BYTES_MAX);
    Ok(body.collect().await.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes())
}

/// Server-sent events, one JSON value each.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next value; `None` after the last.
    ///
    /// # Errors
    /// An error event, or a stream that breaks off.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data: ") else { continue };
                if data.trim_ascii() == b"[DONE]" {
                    return Ok(None);
                }
                let value: Value = serde_json::from_slice(data).context("an event that is not JSON")?;
                return match value["error"]["message"].as_str() {
                    Some(message) => bail!("{message}"),
                    None => Ok(Some(value)),
                };
            }
            match self.body.frame().await {
                Some(frame) => {
                    let frame = frame.context("the daemon went away in the middle of the answer")?;
                    self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
                }
                None => bail!("the daemon went away in the middle of the answer"),
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                bail!("an event of more than {LINE_BYTES_MAX} bytes");
            }
        }
    }
}
