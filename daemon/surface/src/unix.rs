//! Who connects to the Unix socket? The kernel says whose process it is.

use crate::accept::Listener;
use axum::{Extension, Router};
use sparsed_engine::api::Owner;
use tokio::net::{UnixListener, UnixStream};

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> std::io::Result<UnixStream> {
        Self::accept(self).await.map(|(stream, _)| stream)
    }

    fn interface(&self, stream: &UnixStream, router: &Router) -> Option<Router> {
        owner(stream).map(|owner| router.clone().layer(Extension(owner)))
    }
}

/// Who is at the other end. `None` when the kernel does not say, which happens to a client that is gone already.
fn owner(stream: &UnixStream) -> Option<Owner> {
    let peer = stream.peer_cred().ok()?;
    log::debug!(uid = peer.uid(), pid = peer.pid().unwrap_or(0); "connected");
    Some(Owner::Uid(peer.uid()))
}
