//! Which requests are under way? An object for each, from the call until its answer has ended.

use super::call::CallError;
use super::interface::ROOT;
use crate::refusal::Refusal;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use zbus::names::OwnedUniqueName;
use zbus::wire::OwnedObjectPath;

/// Longest `handle_token`.
const TOKEN_MAX: usize = 64;

/// All requests.
#[derive(Debug)]
pub(super) struct Requests {
    /// By what follows `requests/` in their paths.
    open: Mutex<BTreeMap<String, Arc<Request>>>,
    n_begun: AtomicU64,
    ended: Notify,
}

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    /// Its object.
    pub(super) path: OwnedObjectPath,
    /// Who asked.
    pub(super) sender: OwnedUniqueName,
    uid: u32,
    outlives_sender: bool,
    is_answering: AtomicBool,
    n_lines: AtomicU64,
    cancel: Notify,
}

/// Keeps a request's object; it is gone when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    requests: Arc<Requests>,
    key: String,
    /// The request.
    pub(super) request: Arc<Request>,
}

impl Requests {
    /// None.
    pub(super) fn new() -> Self {
        Self { open: Mutex::default(), n_begun: AtomicU64::new(0), ended: Notify::new() }
    }

    /// Begins one. `token` is the last part of its path.
    ///
    /// # Errors
    /// The token cannot be one or is taken.
    pub(super) fn begin(
        self: &Arc<Self>,
        uid: u32,
        sender: &OwnedUniqueName,
        token: Option<&str>,
        outlives_sender: bool,
    ) -> Result<Place, CallError> {
        let token = match token {
            Some(token) if is_token(token) => token.to_owned(),
            Some(_) => {
                let reason = format!("must be 1 to {TOKEN_MAX} of A-Z, a-z, 0-9 and _");
                return Err(Refusal::invalid("handle_token", reason).into());
            }
            None => format!("r{}", self.n_begun.fetch_add(1, Ordering::Relaxed)),
        };
        let key = format!("{}/{token}", element(sender));
        let path = OwnedObjectPath::try_from(format!("{ROOT}/requests/{key}"));
        let path = path.map_err(|error| CallError::Standard("InvalidArgs", error.to_string()))?;
        let mut open = self.lock();
        if open.contains_key(&key) {
            return Err(Refusal::invalid("handle_token", "is the one of a request under way").into());
        }
        let request = Arc::new(Request {
            path,
            sender: sender.clone(),
            uid,
            outlives_sender,
            is_answering: AtomicBool::new(false),
            n_lines: AtomicU64::new(0),
            cancel: Notify::new(),
        });
        open.insert(key.clone(), Arc::clone(&request));
        drop(open);
        Ok(Place { requests: Arc::clone(self), key, request })
    }

    /// The request of `uid` that is called `key`; another one's is not there.
    pub(super) fn find(&self, uid: u32, key: &str) -> Option<Arc<Request>> {
        self.lock().get(key).filter(|request| request.uid == uid).cloned()
    }

    /// What the requests of `uid` are called.
    pub(super) fn keys(&self, uid: u32) -> Vec<String> {
        self.lock().iter().filter(|(_, request)| request.uid == uid).map(|(key, _)| key.clone()).collect()
    }

    /// Cancels what ends with `sender`, or with the bus when there is none.
    pub(super) fn sender_gone(&self, sender: Option<&OwnedUniqueName>) {
        let is_of = |request: &&Arc<Request>| sender.is_none_or(|sender| request.sender == *sender);
        self.lock().values().filter(|request| !request.outlives_sender).filter(is_of).for_each(|one| one.cancel());
    }

    /// Resolves when none is under way.
    pub(super) async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.lock().is_empty() {
                return;
            }
            ended.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Request>>> {
        // Whole at any time.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Request {
    /// Ends it, now or as soon as it begins.
    pub(super) fn cancel(&self) {
        self.cancel.notify_one();
    }

    /// Resolves once when it is cancelled.
    pub(super) async fn cancelled(&self) {
        self.cancel.notified().await;
    }

    /// The caller has the pipe.
    pub(super) fn answers(&self) {
        self.is_answering.store(true, Ordering::Relaxed);
    }

    /// A line is in the pipe.
    pub(super) fn count_line(&self) {
        self.n_lines.fetch_add(1, Ordering::Relaxed);
    }

    /// The property `State`.
    pub(super) fn state(&self) -> &'static str {
        if self.is_answering.load(Ordering::Relaxed) { "answering" } else { "preparing" }
    }

    /// The property `Lines`.
    pub(super) fn lines(&self) -> u64 {
        self.n_lines.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.requests.lock().remove(&self.key);
        self.requests.ended.notify_waiters();
    }
}

fn is_token(token: &str) -> bool {
    let fits = |letter: u8| letter.is_ascii_alphanumeric() || letter == b'_';
    (1..=TOKEN_MAX).contains(&token.len()) && token.bytes().all(fits)
}

/// A unique name as one element of a path: `:1.42` is `1_42`.
fn element(sender: &OwnedUniqueName) -> String {
    let letter = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
    sender.as_str().trim_start_matches(':').chars().map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &'static str) -> OwnedUniqueName {
        name.try_into().unwrap()
    }

    #[test]
    fn a_path_is_known_before_the_call() {
        let requests = Arc::new(Requests::new());
        let place = requests.begin(5, &name(":1.42"), Some("chat_1"), false).unwrap();
        assert_eq!(place.request.path.as_str(), "/org/sparsed1/requests/1_42/chat_1");
        assert!(requests.begin(5, &name(":1.42"), Some("chat_1"), false).is_err(), "taken");
        for bad in ["", "a b", "../x", &"x".repeat(TOKEN_MAX + 1)] {
            assert!(requests.begin(5, &name(":1.42"), Some(bad), false).is_err(), "{bad}");
        }
    }

    #[test]
    fn nobody_finds_the_requests_of_others() {
        let requests = Arc::new(Requests::new());
        let place = requests.begin(5, &name(":1.42"), Some("a"), false).unwrap();
        assert!(requests.find(5, "1_42/a").is_some() && requests.find(6, "1_42/a").is_none());
        assert!(requests.keys(5) == ["1_42/a"] && requests.keys(6).is_empty());
        drop(place);
        assert!(requests.find(5, "1_42/a").is_none());
    }

    #[tokio::test]
    async fn a_sender_that_leaves_cancels_what_is_not_detached() {
        let requests = Arc::new(Requests::new());
        let ends = requests.begin(5, &name(":1.1"), None, false).unwrap();
        let stays = requests.begin(5, &name(":1.1"), None, true).unwrap();
        let other = requests.begin(5, &name(":1.2"), None, false).unwrap();
        requests.sender_gone(Some(&name(":1.1")));
        ends.request.cancelled().await;
        let is_cancelled = |place: &Place| {
            let mut cancelled = std::pin::pin!(place.request.cancelled());
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            Future::poll(cancelled.as_mut(), &mut context).is_ready()
        };
        assert!(!is_cancelled(&stays) && !is_cancelled(&other));
    }
}
