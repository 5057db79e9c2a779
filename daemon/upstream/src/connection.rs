//! How do bytes get to the other engine and back? One HTTP/1.1 connection per request, with TLS where the address wants
//! it; dropped, it is closed, which is how the other engine hears that nobody wants the answer any more.

use crate::options::Options;
use crate::trouble::Trouble;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// Most bytes of the head of a response.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Most bytes of a list of models.
const LIST_BYTES_MAX: usize = 1 << 20;
/// Most bytes of an error.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// What carries bytes.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A response, and the connection that carries it.
pub(crate) struct Exchange {
    response: Response<Incoming>,
    /// Drives the connection.
    _driver: Driver,
}

/// A task that ends with this.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Exchange {
    /// Sends a request and waits for the head of the answer.
    ///
    /// # Errors
    /// No connection, or one that breaks.
    pub(crate) async fn open(options: &Options, endpoint: &str, body: Option<Bytes>) -> Result<Self, Trouble> {
        let connect = timeout(options.connect, connect(options));
        let late = |_| Trouble::Unreachable(format!("no connection within {} ms", options.connect.as_millis()));
        let stream = connect.await.map_err(late)??;
        let broken = |error: hyper::Error| Trouble::Broken(said(&error));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = Driver(tokio::spawn(async move {
            if let Err(error) = connection.await {
                log::debug!(reason:% = error; "a connection to an upstream engine ended early");
            }
        }));
        let response = sender.send_request(request(options, endpoint, body)?).await.map_err(broken)?;
        Ok(Self { response, _driver: driver })
    }

    /// The exchange, if the answer is a stream of events.
    ///
    /// # Errors
    /// What the answer says else.
    pub(crate) async fn streaming(self, options: &Options) -> Result<Self, Trouble> {
        let ok = self.checked(options).await?;
        let kind = ok.response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if kind.starts_with("text/event-stream") {
            return Ok(ok);
        }
        Err(Trouble::Broken("it did not answer with a stream of events".to_owned()))
    }

    /// The next bytes of the body; `None` after the last.
    ///
    /// # Errors
    /// The connection breaks.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Trouble> {
        loop {
            match self.response.body_mut().frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Trouble::Broken(said(&error))),
                Some(Ok(frame)) => {
                    // Trailers are none of ours.
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The list of models that it answers.
    ///
    /// # Errors
    /// What it answers else.
    pub(crate) async fn list(self, options: &Options) -> Result<Bytes, Trouble> {
        let ok = self.checked(options).await?;
        body(ok.response.into_body(), LIST_BYTES_MAX).await
    }

    async fn checked(self, options: &Options) -> Result<Self, Trouble> {
        let status = self.response.status().as_u16();
        if status == 200 {
            return Ok(self);
        }
        let after = self.response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        // What cannot be read of an error is not said; the status is.
        let body = body(self.response.into_body(), ERROR_BYTES_MAX).await.unwrap_or_default();
        Err(Trouble::of_status(status, after, &body, options.key.as_ref().map(|key| key.as_str())))
    }
}

fn request(options: &Options, endpoint: &str, body: Option<Bytes>) -> Result<Request<Full<Bytes>>, Trouble> {
    let method = if body.is_some() { Method::POST } else { Method::GET };
    let request = Request::builder()
        .method(method)
        .uri(options.address.path_of(endpoint))
        .header(HOST, options.address.authority())
        .header(USER_AGENT, concat!("sparsed/", env!("CARGO_PKG_VERSION")))
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, if body.is_some() { "text/event-stream" } else { "application/json" });
    let mut request = request
        .body(Full::new(body.unwrap_or_default()))
        .map_err(|_| Trouble::Failed("its address makes no request".to_owned()))?;
    if let Some(key) = &options.key {
        let value = HeaderValue::from_str(&format!("Bearer {}", key.as_str()));
        let mut value = value.map_err(|_| Trouble::Failed("its key cannot stand in a header".to_owned()))?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
    }
    Ok(request)
}

async fn connect(options: &Options) -> Result<Box<dyn Stream>, Trouble> {
    let address = &options.address;
    let unreachable = |error: std::io::Error| Trouble::Unreachable(error.to_string());
    let stream = TcpStream::connect((address.host(), address.port())).await.map_err(unreachable)?;
    // Requests are one write, and tokens are small.
    stream.set_nodelay(true).map_err(unreachable)?;
    if !address.is_tls() {
        return Ok(Box::new(stream));
    }
    let config = options.tls.as_ref().ok_or_else(|| Trouble::Failed("TLS is not configured".to_owned()))?;
    let name = ServerName::try_from(address.host().to_owned());
    let name = name.map_err(|_| Trouble::Failed("its host's name is none that a certificate has".to_owned()))?;
    let stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await.map_err(unreachable)?;
    Ok(Box::new(stream))
}

async fn body(body: Incoming, limit: usize) -> Result<Bytes, Trouble> {
    let whole = Limited::new(body, limit).collect().await;
    Ok(whole.map_err(|error| Trouble::Broken(format!("its answer cannot be read: {error}")))?.to_bytes())
}

/// hyper's errors say their cause apart.
fn said(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
