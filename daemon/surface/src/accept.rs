//! What may a connection cost? The accept loop of every socket that speaks HTTP, with its limits.

use crate::patience::Patient;
use crate::unread::LetBy;
use axum::Router;
use axum::http::{Request, header};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;

/// Most bytes of a request's head; also the read buffer, which hyper fills up to twice that where more comes at once.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Most header lines of a request.
const HEADERS_MAX: usize = 100;
/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Pause after a failed accept: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a socket.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Most open connections; further ones wait to be accepted.
    pub connections_max: usize,
    /// Of them, most of one user, where the socket tells users apart.
    pub connections_per_user: u32,
    /// Most bytes of a request's body.
    pub body_bytes_max: usize,
    /// Answers in the background that go on by themselves, at a time; 0: none does.
    pub background: usize,
    /// How long a client may take nothing of what is sent to it.
    pub reader_patience: Duration,
    /// How long running answers may go on after `stop`.
    pub stop_timeout: Duration,
}

/// A socket that is listened on.
pub(crate) trait Listener {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Whether its connections count from their acceptance: further ones then wait for a place. Otherwise the socket
    /// bounds them itself.
    const COUNTS_ALL: bool;

    /// The next one.
    fn accept(&self) -> impl Future<Output = std::io::Result<Self::Stream>> + Send;

    /// The client at the other end; `None` for one that is gone already.
    fn guest(&self, stream: &Self::Stream, router: &Router) -> Option<Guest>;
}

/// A client that has come in.
pub(crate) struct Guest {
    /// The interface as it sees it.
    pub(crate) interface: Router,
    /// Resolves when its connection has to end.
    pub(crate) must_go: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Serves HTTP/1.1 on `listener` until `stop` resolves, then lets running requests end.
pub(crate) async fn serve<L: Listener>(
    listener: L,
    router: Router,
    options: ServeOptions,
    stop: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(options.connections_max));
    let mut stop = std::pin::pin!(stop);
    let mut is_failing = false;
    loop {
        let accepted = async {
            let place = async { Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed") };
            let place = if L::COUNTS_ALL { Some(place.await) } else { None };
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Once per episode: out of file descriptors lasts.
                if !std::mem::replace(&mut is_failing, true) {
                    log::warn!(reason:% = error; "connection not accepted");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        is_failing = false;
        let Some(Guest { interface, must_go }) = listener.guest(&stream, &router) else { continue };
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        builder.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
        let interface = TowerToHyperService::new(interface);
        let answer = move |request: Request<Incoming>| {
            let is_asked_for = request.headers().contains_key(header::EXPECT);
            interface.call(request.map(|body| LetBy::new(body, is_asked_for)))
        };
        let connection =
            builder.serve_connection(TokioIo::new(Patient::new(stream, options.reader_patience)), service_fn(answer));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => {
                    if let Err(error) = ended {
                        log::debug!(reason:% = error; "connection ended early");
                    }
                }
                () = must_go => {}
            }
            drop(place);
        });
    }
    drop(listener); // further clients are refused at once instead of waiting
    if tokio::time::timeout(options.stop_timeout, graceful.shutdown()).await.is_err() {
        log::warn!("answers were still running when the time to stop was over");
    }
}
