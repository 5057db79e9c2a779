//! Who calls, and how much at a time? The users behind connections, as the bus knows them.
//!
//! A unique name is never given to another connection while the bus runs, so what is known of it stays true until it
//! goes.

use super::call::CallError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zbus::Connection;
use zbus::names::OwnedUniqueName;
use zbus::wire::OwnedVariant;

/// Calls of a connection that are worked on at a time.
const CALLS_PER_SENDER: usize = 16;
/// Calls of a user.
const CALLS_PER_USER: usize = 32;
/// Connections that are remembered; any more, and all are forgotten and asked for again.
const KNOWN_MAX: usize = 4096;

/// Callers.
#[derive(Debug, Default)]
pub(super) struct Peers {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    users: HashMap<OwnedUniqueName, u32>,
    calls: HashMap<Caller, usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Caller {
    Sender(OwnedUniqueName),
    User(u32),
}

/// Counts a call until it is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    peers: Arc<Peers>,
    caller: Caller,
}

impl Peers {
    /// Counts a call of `sender`.
    ///
    /// # Errors
    /// It has too many already.
    pub(super) fn count_sender(self: &Arc<Self>, sender: &OwnedUniqueName) -> Result<Counted, CallError> {
        self.count(Caller::Sender(sender.clone()), CALLS_PER_SENDER, "of this connection")
    }

    /// Counts a call of the user `uid`.
    ///
    /// # Errors
    /// There are too many already.
    pub(super) fn count_user(self: &Arc<Self>, uid: u32) -> Result<Counted, CallError> {
        self.count(Caller::User(uid), CALLS_PER_USER, "of this user")
    }

    /// The user behind `sender`; asks the bus the first time.
    ///
    /// # Errors
    /// The bus does not say, as when the connection is gone already.
    pub(super) async fn uid(&self, bus: &Connection, sender: &OwnedUniqueName) -> Result<u32, CallError> {
        if let Some(uid) = self.lock().users.get(sender) {
            return Ok(*uid);
        }
        let unknown = |reason: String| CallError::Standard("AccessDenied", format!("your user is not known: {reason}"));
        let name = "org.freedesktop.DBus";
        let asked =
            bus.call_method(Some(name), "/org/freedesktop/DBus", Some(name), "GetConnectionCredentials", sender);
        let reply = asked.await.map_err(|error| unknown(error.to_string()))?;
        let credentials: HashMap<String, OwnedVariant> =
            reply.body().deserialize().map_err(|error| unknown(error.to_string()))?;
        let uid = credentials.get("UnixUserID").and_then(|uid| u32::try_from(uid).ok());
        let uid = uid.ok_or_else(|| unknown("the bus has no UnixUserID of yours".to_owned()))?;
        log::debug!(sender = sender.as_str(), uid; "on the bus");
        let mut state = self.lock();
        if state.users.len() >= KNOWN_MAX {
            state.users.clear();
        }
        state.users.insert(sender.clone(), uid);
        Ok(uid)
    }

    /// `sender` has left.
    pub(super) fn forget(&self, sender: &OwnedUniqueName) {
        self.lock().users.remove(sender);
    }

    fn count(self: &Arc<Self>, caller: Caller, limit: usize, whose: &str) -> Result<Counted, CallError> {
        let mut state = self.lock();
        let calls = state.calls.entry(caller.clone()).or_default();
        if *calls >= limit {
            return Err(CallError::limit(format!("{limit} calls {whose} are being answered already")));
        }
        *calls += 1;
        Ok(Counted { peers: Arc::clone(self), caller })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut state = self.peers.lock();
        let Some(calls) = state.calls.get_mut(&self.caller) else { return };
        *calls -= 1;
        if *calls == 0 {
            state.calls.remove(&self.caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_has_so_many_calls_and_no_more_until_one_has_ended() {
        let peers = Arc::new(Peers::default());
        let sender: OwnedUniqueName = ":1.7".try_into().unwrap();
        let mut held: Vec<Counted> = (0..CALLS_PER_SENDER).map(|_| peers.count_sender(&sender).unwrap()).collect();
        assert!(peers.count_sender(&sender).is_err());
        assert!(peers.count_sender(&":1.8".try_into().unwrap()).is_ok());
        held.pop();
        assert!(peers.count_sender(&sender).is_ok());
        drop(held);
        assert!(peers.lock().calls.is_empty());
    }
}
