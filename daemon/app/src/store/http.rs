//! How is a file asked for by HTTP? One GET, redirects followed, over TLS where the address says so.
//!
//! Each question has a connection of its own: what a broken one did is never part of the next.

use super::Digest;
use anyhow::{Context, anyhow, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};

/// Most redirects that are followed.
const REDIRECTS_MAX: usize = 8;
/// How long one address of a host may take to be connected to: one that nobody answers on leaves time for the others.
const CONNECT: Duration = Duration::from_secs(10);
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

/// Why a question has no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The line or the server: the next attempt may go better.
    ForNow(anyhow::Error),
    /// The address, a redirect, a certificate, or what was given for them: no other attempt would.
    ForGood(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Unanswered {
    fn from(error: E) -> Self {
        Self::ForGood(error.into())
    }
}

impl Client {
    pub(super) fn new(patience: Duration, token: Option<String>, ca_file: Option<PathBuf>) -> Self {
        Self { patience, token, ca_file, tls: None }
    }

    /// The answer to `GET`, redirects followed.
    ///
    /// # Errors
    /// A server that is not reached, is silent, or leads nowhere.
    pub(super) async fn get(&mut self, uri: &Uri, part: Part<'_>) -> Result<Reply, Unanswered> {
        let (first, mut uri, mut digest) = (uri.clone(), uri.clone(), None);
        for _ in 0..=REDIRECTS_MAX {
            let token = self.token.clone().filter(|_| origin(&uri) == origin(&first));
            let mut reply = self.ask(&uri, part, token.as_deref()).await?;
            digest = digest.or_else(|| linked(&reply.headers));
            let is_redirect = matches!(reply.status.as_u16(), 301 | 302 | 303 | 307 | 308);
            if !is_redirect {
                reply.digest = digest;
                return Ok(reply);
            }
            let next = redirected(&uri, reply.headers.get(header::LOCATION))?;
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(anyhow!("{} leads to an address without TLS", place(&uri)).into());
            }
            uri = next;
        }
        Err(anyhow!("{} leads through more than {REDIRECTS_MAX} redirects", place(&first)).into())
    }

    async fn ask(&mut self, uri: &Uri, part: Part<'_>, token: Option<&str>) -> Result<Reply, Unanswered> {
        let host = uri.host().context("an address without a host")?.trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let unreached = || format!("{} is not reached", place(uri));
        let request = request(uri, part, token)?;
        // What is wrong on this side is found before anybody is asked.
        let tls = match is_tls {
            true => Some((self.tls()?, ServerName::try_from(host.clone()).with_context(unreached)?)),
            false => None,
        };
        let silent = |_| Unanswered::ForNow(anyhow!("{} is silent", place(uri)));
        let found = timeout(self.patience, lookup_host((host.as_str(), port))).await.map_err(silent)?;
        let stream = match found {
            Ok(addresses) => connect(&addresses.collect::<Vec<_>>(), CONNECT.min(self.patience)).await,
            Err(error) => Err(error),
        };
        let stream = stream.with_context(unreached).map_err(Unanswered::ForNow)?;
        let asking = async {
            let Some((tls, name)) = tls else { return self.send(stream, request).await };
            let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(of_tls)?;
            self.send(stream, request).await
        };
        timeout(self.patience, asking).await.map_err(silent)?.map_err(|error| match error {
            Unanswered::ForNow(error) => Unanswered::ForNow(error.context(unreached())),
            Unanswered::ForGood(error) => Unanswered::ForGood(error.context(unreached())),
        })
    }

    async fn send<S>(&self, stream: S, request: Request<Empty<Bytes>>) -> Result<Reply, Unanswered>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let passing = |error: hyper::Error| Unanswered::ForNow(error.into());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(passing)?;
        // Its end is seen where the answer is read.
        tokio::spawn(async move { drop(connection.await) });
        let (head, body) = sender.send_request(request).await.map_err(passing)?.into_parts();
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

/// A connection to the first of a host's addresses that takes one; each may take as long as `limit`.
async fn connect(addresses: &[SocketAddr], limit: Duration) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

/// A certificate that is not believed now is not believed the next time.
fn of_tls(error: io::Error) -> Unanswered {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match matches!(cause, Some(rustls::Error::InvalidCertificate(_))) {
        true => Unanswered::ForGood(error.into()),
        false => Unanswered::ForNow(error.into()),
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

/// Where a redirect leads; `Location` may be relative to the address that was asked (RFC 3986, 5.2).
fn redirected(from: &Uri, location: Option<&HeaderValue>) -> anyhow::Result<Uri> {
    let location = location.and_then(|location| location.to_str().ok());
    let location = location.with_context(|| format!("{} leads nowhere", place(from)))?;
    let location = location.split_once('#').map_or(location, |(location, _)| location);
    let scheme = from.scheme_str().unwrap_or_default();
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let at_home = |path: &str| format!("{scheme}://{authority}{}", without_dots(path));
    let whole = match location.as_bytes() {
        _ if has_scheme(location) => location.to_owned(),
        [b'/', b'/', ..] => format!("{scheme}:{location}"),
        [b'/', ..] => at_home(location),
        [b'?', ..] => at_home(&format!("{}{location}", from.path())),
        [] => String::new(),
        _ => {
            let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            at_home(&format!("{folder}/{location}"))
        }
    };
    let next: Uri = whole.parse().with_context(|| format!("{} leads to no URL", place(from)))?;
    let is_web = matches!(next.scheme_str(), Some("http" | "https")) && next.host().is_some();
    ensure!(is_web, "{} leads to an address that is not HTTP", place(from));
    Ok(next)
}

/// Whether a reference begins with a scheme: a letter, then such, digits and `+-.` up to a colon.
fn has_scheme(reference: &str) -> bool {
    let Some((scheme, _)) = reference.split_once(':') else { return false };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    scheme.starts_with(|first: char| first.is_ascii_alphabetic()) && scheme.bytes().all(fits)
}

/// A path, with its query behind, whose `.` and `..` are followed.
fn without_dots(path: &str) -> String {
    let (path, query) = path.split_at(path.find('?').unwrap_or(path.len()));
    let (mut kept, n_parts) = (Vec::new(), path.split('/').count());
    for (at, part) in path.split('/').enumerate() {
        match part {
            ".." if kept.len() > 1 => drop(kept.pop()),
            "." | ".." => {}
            part => {
                kept.push(part);
                continue;
            }
        }
        // A folder's end stays one.
        if at + 1 == n_parts {
            kept.push("");
        }
    }
    kept.join("/") + query
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
        for bad in ["file:///etc/passwd", "ftp://x/y", "mailto:c", "#c", ""] {
            assert!(lead(bad).is_err(), "{bad}");
        }
        assert!(redirected(&from, None).is_err());
        // Relative ones, as RFC 3986 has them.
        let relative = [
            ("c", "a/c"),
            ("c?y#z", "a/c?y"),
            ("./c/../d", "a/d"),
            ("../c", "c"),
            ("../../../c", "c"),
            ("..", ""),
            ("c/.", "a/c/"),
            ("?y", "a/b?y"),
            ("/../c/./d", "c/d"),
            ("c?to=http://x/../y", "a/c?to=http://x/../y"),
        ];
        for (to, path) in relative {
            assert_eq!(lead(to).unwrap(), format!("https://hub.example:8443/{path}"), "{to}");
        }
    }

    /// Where connections are not taken any more: its line of those that nobody has accepted is full.
    fn black_hole() -> (std::net::TcpListener, Vec<std::net::TcpStream>, SocketAddr) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok();
        let waiting = std::iter::from_fn(connect).take(64).collect();
        (listener, waiting, address)
    }

    #[test]
    fn an_address_that_nobody_answers_on_leaves_time_for_the_next_one() {
        let (_listener, waiting, hole) = black_hole();
        assert!(waiting.len() < 64, "the kernel takes them all");
        let there = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let limit = Duration::from_millis(50);
        let connected = |addresses: &[SocketAddr]| runtime.block_on(connect(addresses, limit));
        let stream = connected(&[hole, there.local_addr().unwrap()]).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), there.local_addr().unwrap());
        assert_eq!(connected(&[hole]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(connected(&[]).is_err());
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
