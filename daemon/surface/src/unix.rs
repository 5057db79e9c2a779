//! Who connects to the Unix socket? The kernel says whose process it is, and nobody takes all the connections.

use crate::accept::{Guest, Listener};
use crate::refusal::Refusal;
use axum::{Extension, Router};
use sparsed_engine::Tenants;
use sparsed_engine::api::{Failure, Owner};
use std::sync::Arc;
use tokio::net::{UnixListener, UnixStream};

/// The Unix socket and who is connected to it.
#[derive(Debug)]
pub(crate) struct UnixDoor {
    listener: UnixListener,
    connections: Arc<Tenants>,
    per_user: u32,
}

impl UnixDoor {
    /// Of each user `per_user` connections at a time.
    pub(crate) fn new(listener: UnixListener, per_user: u32) -> Self {
        Self { listener, connections: Arc::new(Tenants::new(per_user)), per_user }
    }
}

impl Listener for UnixDoor {
    type Stream = UnixStream;

    const COUNTS_ALL: bool = true;

    async fn accept(&self) -> std::io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    fn guest(&self, stream: &UnixStream, router: &Router) -> Option<Guest> {
        let owner = owner(stream)?;
        match self.connections.admit(owner) {
            // The connection owns its router, so it counts as long as it is there.
            Ok(admission) => {
                let interface = router.clone().layer(Extension(owner)).layer(Extension(Arc::new(admission)));
                Some(Guest { interface, must_go: Box::pin(std::future::pending()) })
            }
            Err(failure) => {
                log::debug!(owner:? = owner; "has too many connections");
                turn_away(stream, failure, self.per_user);
                None
            }
        }
    }
}

/// Tells a client that it has all the connections it may have; one that does not take it finds its connection closed.
fn turn_away(stream: &UnixStream, failure: Failure, per_user: u32) {
    let refusal = all_taken(failure, per_user);
    let (body, retry_s) = (refusal.body().to_string(), refusal.retry_after_s().unwrap_or(1));
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: {retry_s}\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    let _closed = stream.try_write(answer.as_bytes()).is_err();
}

/// An owner has all the connections that it may have.
pub(crate) fn all_taken(failure: Failure, per_user: u32) -> Refusal {
    Refusal::from(failure).saying(format!(
        "{per_user} connections of this user are open, which is all it may have (limits.per_user_connections)"
    ))
}

/// Who is at the other end. `None` when the kernel does not say, which happens to a client that is gone already.
fn owner(stream: &UnixStream) -> Option<Owner> {
    let peer = stream.peer_cred().ok()?;
    log::debug!(uid = peer.uid(), pid = peer.pid().unwrap_or(0); "connected");
    Some(Owner::Uid(peer.uid()))
}
