//! What if the disk of the sessions is not there yet, or has no room to begin?
//!
//! The thread then tries to open the store again and again. Whoever asks meanwhile hears that there are no sessions
//! now; everything else is served. Why it cannot be opened is for the log: clients need not know the disk.

use super::asks::Ask;
use super::keeper::Keeper;
use sparsed_session::{AnyDisk, Store};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
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

/// A store that could not be opened: tries again, and says in the log why it still cannot be.
pub struct LateStore(pub Box<dyn FnMut() -> Option<Store<AnyDisk>> + Send>);

impl fmt::Debug for LateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LateStore").finish_non_exhaustive()
    }
}

/// Whether there are no sessions now. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Absence(Arc<AtomicBool>);

impl Absence {
    pub(super) fn of(store: &SessionStore) -> Self {
        Self(Arc::new(AtomicBool::new(matches!(store, SessionStore::Late(_)))))
    }

    /// Whether it lasts.
    pub(super) fn lasts(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A verb for when the store is there.
type Verb = Box<dyn FnOnce(&mut Keeper) + Send>;

impl SessionStore {
    /// The store, once it is there, and what it is to do first: only a change of the limits, since `absence` keeps all
    /// others from asking. `None` when the thread is to end.
    pub(super) fn wait(self, asks: &Receiver<Ask>, absence: &Absence) -> Option<(Store<AnyDisk>, Vec<Verb>)> {
        let mut open = match self {
            Self::Open(store) => return Some((*store, Vec::new())),
            Self::Late(LateStore(open)) => open,
        };
        let mut verbs = Vec::new();
        loop {
            match asks.recv_timeout(RETRY) {
                Ok(Ask::Do(verb)) => verbs.push(verb),
                Ok(Ask::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
                // Of sessions that nobody could open.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(store) = open() {
                        log::info!("sessions are kept now");
                        absence.end();
                        return Some((store, verbs));
                    }
                }
            }
        }
    }
}
