//! How is a file asked for by HTTP? One GET, redirects followed, over TLS where the address says so.
//!
//! Each question has a connection of its own: what a broken one did is never part of the next.

use super::Digest;
use anyhow::{Context, anyhow, bail, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

/// Most redirects that are followed.
const REDIRECTS_MAX: usize = 8;
/// What hubs call the SHA-256 of a large file, in their redirect to it.
const LINKED_ETAG: &str = "x-linked-etag";
const USER_AGENT: &str = concat!("sparsectl/", env!("CARGO_PKG_VERSION"));

/// Asks.
#[derive(Debug)]
pub(super) struct Client {
    /// How long a server may be silent.
    pub(super) patience: Duration,
    /// Goes to the host that was asked first, and to nobody else.
    pub(super) token: Option<String>,
    /// Whose certificates are believed; `None`: the system's authorities.
    ca_file: Option<PathBuf>,
    tls: Option<Arc<ClientConfig>>,
}

/// Which part of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    /// From this byte on; 0: all of it.
    pub(super) from: u64,
    /// All of it unless it is still this one.
    pub(super) if_still: Option<&'a str>,
}

/// A server's answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// The file's digest, where a hub says it.
    pub(super) digest: Option<Digest>,
    body: Incoming,
    patience: Duration,
}

impl Client {
    pub(super) fn new(patience: Duration, token: Option<String>, ca_file: Option<PathBuf>) -> Self {
        Self { patience, token, ca_file, tls: None }
    }

    /// The answer to `GET`, redirects followed.
    ///
    /// # Errors
    /// A server that is not reached, is silent, or leads nowhere.
    pub(super) async fn get(&mut self, uri: &Uri, part: Part<'_>) -> anyhow::Result<Reply> {
        let (first, mut uri, mut digest) = (uri.clone(), uri.clone(), None);
        for _ in 0..=REDIRECTS_MAX {
            let token = self.token.clone().filter(|_| origin(&uri) == origin(&first));
            let (patience, asking) = (self.patience, self.ask(&uri, part, token.as_deref()));
            let mut reply = timeout(patience, asking).await.map_err(|_| anyhow!("{} is silent", place(&uri)))??;
            digest = digest.or_else(|| linked(&reply.headers));
            let is_redirect = matches!(reply.status.as_u16(), 301 | 302 | 303 | 307 | 308);
            if !is_redirect {
                reply.digest = digest;
                return Ok(reply);
            }
            let next = redirected(&uri, reply.headers.get(header::LOCATION))?;
            ensure!(
                uri.scheme_str() != Some("https") || next.scheme_str() == Some("https"),
                "{} leads to an address without TLS",
                place(&uri)
            );
            uri = next;
        }
        bail!("{} leads through more than {REDIRECTS_MAX} redirects", place(&first))
    }

    async fn ask(&mut self, uri: &Uri, part: Part<'_>, token: Option<&str>) -> anyhow::Result<Reply> {
        let host = uri.host().context("an address without a host")?.trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let unreached = || format!("{} is not reached", place(uri));
        let stream = TcpStream::connect((host.as_str(), port)).await.with_context(unreached)?;
        let request = request(uri, part, token)?;
        if is_tls {
            let name = ServerName::try_from(host).with_context(unreached)?;
            let stream = TlsConnector::from(self.tls()?).connect(name, stream).await.with_context(unreached)?;
            return self.send(stream, request).await.with_context(unreached);
        }
        self.send(stream, request).await.with_context(unreached)
    }

    async fn send<S>(&self, stream: S, request: Request<Empty<Bytes>>) -> anyhow::Result<Reply>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Its end is seen where the answer is read.
        tokio::spawn(async move { drop(connection.await) });
        let (head, body) = sender.send_request(request).await?.into_parts();
        Ok(Reply { status: head.status, headers: head.headers, digest: None, body, patience: self.patience })
    }

    fn tls(&mut self) -> anyhow::Result<Arc<ClientConfig>> {
        match &self.tls {
            Some(tls) => Ok(Arc::clone(tls)),
            None => {
                let tls = sparsed_surface::tls_config(self.ca_file.as_deref(), None)?;
                self.tls = Some(Arc::clone(&tls));
                Ok(tls)
            }
        }
    }
}

impl Reply {
    /// The next bytes; `None` at the end, which is where the server said it would be.
    ///
    /// # Errors
    /// A connection that breaks off or is silent.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        loop {
            let frame = timeout(self.patience, self.body.frame()).await.map_err(|_| anyhow!("the server is silent"))?;
            let Some(frame) = frame else { return Ok(None) };
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
    }

    /// A header as text.
    pub(super) fn text(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// A header as a number.
    pub(super) fn number(&self, name: header::HeaderName) -> Option<u64> {
        self.text(name)?.trim().parse().ok()
    }
}

fn request(uri: &Uri, part: Part<'_>, token: Option<&str>) -> anyhow::Result<Request<Empty<Bytes>>> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let host = authority.rsplit('@').next().unwrap_or_default();
    let mut request = Request::get(path).header(header::HOST, host).header(header::USER_AGENT, USER_AGENT);
    // What comes is hashed and continued byte by byte.
    request = request.header(header::ACCEPT_ENCODING, "identity");
    if part.from > 0 {
        request = request.header(header::RANGE, format!("bytes={}-", part.from));
        if let Some(still) = part.if_still {
            request = request.header(header::IF_RANGE, still);
        }
    }
    if let Some(token) = token {
        let mut value =
            HeaderValue::try_from(format!("Bearer {token}")).context("the token has a strange character")?;
        value.set_sensitive(true);
        request = request.header(header::AUTHORIZATION, value);
    }
    Ok(request.body(Empty::new())?)
}

/// Where a redirect leads.
fn redirected(from: &Uri, location: Option<&HeaderValue>) -> anyhow::Result<Uri> {
    let location = location.and_then(|location| location.to_str().ok());
    let location = location.with_context(|| format!("{} leads nowhere", place(from)))?;
    let scheme = from.scheme_str().unwrap_or_default();
    let whole = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        let authority = from.authority().map_or("", |authority| authority.as_str());
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    let next: Uri = whole.parse().with_context(|| format!("{} leads to no URL", place(from)))?;
    let is_web = matches!(next.scheme_str(), Some("http" | "https")) && next.host().is_some();
    ensure!(is_web, "{} leads to an address that is not HTTP", place(from));
    Ok(next)
}

/// The digest in a hub's header.
fn linked(headers: &HeaderMap) -> Option<Digest> {
    headers.get(LINKED_ETAG)?.to_str().ok()?.trim_matches('"').parse().ok()
}

fn origin(uri: &Uri) -> (Option<&str>, Option<&str>, Option<u16>) {
    (uri.scheme_str(), uri.host(), uri.port_u16())
}

/// An address without what may be secret.
fn place(uri: &Uri) -> String {
    let port = uri.port().map_or(String::new(), |port| format!(":{port}"));
    format!("{}://{}{port}{}", uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default(), uri.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_with_its_port_and_without_its_secrets() {
        let uri: Uri = "https://me:word@hub.example:8443/a?token=x".parse().unwrap();
        assert_eq!(place(&uri), "https://hub.example:8443/a");
    }

    #[test]
    fn redirects_lead_to_web_addresses_only() {
        let from: Uri = "https://hub.example:8443/a/b?x".parse().unwrap();
        let lead = |to: &str| redirected(&from, Some(&HeaderValue::from_str(to).unwrap())).map(|uri| uri.to_string());
        assert_eq!(lead("/c?y").unwrap(), "https://hub.example:8443/c?y");
        assert_eq!(lead("//cdn.example/c").unwrap(), "https://cdn.example/c");
        assert_eq!(lead("http://cdn.example/c").unwrap(), "http://cdn.example/c");
        for bad in ["file:///etc/passwd", "ftp://x/y", "c", ""] {
            assert!(lead(bad).is_err(), "{bad}");
        }
        assert!(redirected(&from, None).is_err());
    }

    #[test]
    fn a_user_and_a_token_do_not_come_into_the_host() {
        let uri: Uri = "http://me:word@hub.example/a".parse().unwrap();
        let request = request(&uri, Part { from: 5, if_still: Some("\"x\"") }, Some("secret")).unwrap();
        assert_eq!(request.headers()["host"], "hub.example");
        assert_eq!(request.headers()["range"], "bytes=5-");
        assert_eq!(request.headers()["if-range"], "\"x\"");
        assert!(request.headers()["authorization"].is_sensitive());
    }
}
