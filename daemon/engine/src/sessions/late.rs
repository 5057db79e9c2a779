//! What if the disk of the sessions is not there yet, or has no room to begin?
//!
//! The thread then tries to open the store again and again. Whoever asks meanwhile hears why there are no sessions;
//! everything else is served.

use super::asks::Ask;
use super::keeper::Keeper;
use sparsed_session::{AnyDisk, Store};
use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Pause between two tries.
const RETRY: Duration = Duration::from_secs(5);

/// Where the sessions are kept.
#[derive(Debug)]
pub enum SessionStore {
    /// Here.
    Open(Box<Store<AnyDisk>>),
    /// Where it cannot be opened yet.
    Late(LateStore),
}

/// Opens the store, or says why it cannot be.
pub type OpenStore = Box<dyn FnMut() -> Result<Store<AnyDisk>, String> + Send>;

/// A store that could not be opened.
pub struct LateStore {
    /// Why not.
    pub reason: String,
    /// Tries again.
    pub open: OpenStore,
}

impl fmt::Debug for LateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LateStore").field("reason", &self.reason).finish_non_exhaustive()
    }
}

/// Why there are no sessions now; `None` when there are. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Absence(Arc<Mutex<Option<String>>>);

impl Absence {
    pub(super) fn of(store: &SessionStore) -> Self {
        let reason = match store {
            SessionStore::Open(_) => None,
            SessionStore::Late(late) => Some(late.reason.clone()),
        };
        Self(Arc::new(Mutex::new(reason)))
    }

    /// Why, if there are none.
    pub(super) fn reason(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, reason: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}

/// A verb for when the store is there.
type Verb = Box<dyn FnOnce(&mut Keeper) + Send>;

impl SessionStore {
    /// The store, once it is there, and what it is to do first: only a change of the limits, since `absence` keeps all
    /// others from asking. `None` when the thread is to end.
    pub(super) fn wait(self, asks: &Receiver<Ask>, absence: &Absence) -> Option<(Store<AnyDisk>, Vec<Verb>)> {
        let mut late = match self {
            Self::Open(store) => return Some((*store, Vec::new())),
            Self::Late(late) => late,
        };
        let mut verbs = Vec::new();
        loop {
            match asks.recv_timeout(RETRY) {
                Ok(Ask::Do(verb)) => verbs.push(verb),
                Ok(Ask::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
                // Of sessions that nobody could open.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => match (late.open)() {
                    Ok(store) => {
                        log::info!("sessions are kept now");
                        absence.set(None);
                        return Some((store, verbs));
                    }
                    Err(reason) => absence.set(Some(reason)),
                },
            }
        }
    }
}
