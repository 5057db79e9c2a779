//! What becomes of a body that is not read to its end? It goes by for a while, beside the answer.
//!
//! An answer may be there before the body: the path is unknown, the key is wrong, the body is too large. A client that
//! finds its connection closed while it still sends does not look for the answer.

use bytes::Bytes;
use futures_util::future::poll_fn;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// How much of a body is let by before its connection is closed, and for how long.
const LET_BY_BYTES_MAX: usize = 64 << 20;
const LET_BY_TIMEOUT: Duration = Duration::from_secs(5);

/// A request's body. What is left of it when it is dropped is read by a task of its own; the connection carries the
/// answer meanwhile, and no further request.
#[derive(Debug)]
pub(crate) struct LetBy {
    /// `None` when it is over, or broken.
    body: Option<Incoming>,
    /// Whether the client may be sending: one that has asked first has been told to only when somebody reads.
    is_coming: bool,
}

impl LetBy {
    /// The body `body`, whose client waits for a word before it sends it if `is_asked_for`.
    pub(crate) fn new(body: Incoming, is_asked_for: bool) -> Self {
        Self { body: Some(body), is_coming: !is_asked_for }
    }
}

impl Body for LetBy {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        this.is_coming = true;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            this.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for LetBy {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| self.is_coming && !body.is_end_stream()) else { return };
        // At the end of the process there may be none.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(LET_BY_TIMEOUT, let_by(body)));
        }
    }
}

async fn let_by(mut body: Incoming) {
    let mut n_left = LET_BY_BYTES_MAX;
    while let Some(Ok(frame)) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        n_left = n_left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if n_left == 0 {
            return;
        }
    }
}
