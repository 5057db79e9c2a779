//! How long may a client leave what is sent to it? So long; then its connection ends, and with it what waits for it.
//!
//! Answers that are made step by step have a patience of their own, in the engine. This one is for those that are there
//! already: without it, a client that never reads would keep them for ever.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// A connection on which a write fails that the client's end has taken nothing of for so long.
#[derive(Debug)]
pub(crate) struct Patient<S> {
    stream: S,
    patience: Duration,
    /// Runs while the client takes nothing.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S: Unpin> Patient<S> {
    pub(crate) fn new(stream: S, patience: Duration) -> Self {
        Self { stream, patience, waiting: None }
    }

    fn stream(self: Pin<&mut Self>) -> Pin<&mut S> {
        Pin::new(&mut self.get_mut().stream)
    }

    /// What became of a write.
    fn written(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let Self { patience, waiting, .. } = self.get_mut();
        if written.is_ready() {
            *waiting = None;
            return written;
        }
        let waiting = waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(*patience)));
        let late = || io::Error::new(io::ErrorKind::TimedOut, "the client does not take what is sent to it");
        waiting.as_mut().poll(context).map(|()| Err(late()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_read(context, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.as_mut().stream().poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.as_mut().stream().poll_write_vectored(context, pieces);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[tokio::test]
    async fn a_write_fails_when_nothing_was_taken_for_so_long_and_not_before() {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let near = tokio::net::UnixStream::from_std(near).unwrap();
        let mut near = Patient::new(near, Duration::from_millis(20));
        let bytes = vec![7; 1 << 20];
        let mut looked = 0;
        let mut write = async |far: Option<&std::os::unix::net::UnixStream>| {
            std::future::poll_fn(|context| {
                let written = Pin::new(&mut near).poll_write(context, &bytes);
                looked += usize::from(written.is_pending());
                // It takes all there is while it is waited for.
                if let Some(mut far) = far.filter(|_| written.is_pending()) {
                    let _nothing_there = far.read(&mut vec![0; 1 << 20]).is_err();
                }
                written
            })
            .await
        };
        for _ in 0..100 {
            assert!(write(Some(&far)).await.unwrap() > 0);
        }
        let error = loop {
            match write(None).await {
                Ok(n) => assert!(n > 0),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(looked > 0);
    }
}
