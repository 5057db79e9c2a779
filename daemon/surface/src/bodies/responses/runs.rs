//! Who answers when nobody listens? Tasks of responses in the background, and what clients hear of them.
//!
//! A run keeps its events while it goes on, so that any number of clients may listen from any of them; what it has said
//! is in its session's journal too, from where it is told once the run is forgotten. Memory of a run is bounded by the
//! length of its answer; runs at a time are by the engine's limits, those that are over by their number and their
//! bytes.

use super::script::{End, Head, Script, Tokens};
use super::stored::{ResponseId, Stored, stored};
use crate::bodies::listen::Listening;
use crate::bodies::sessions;
use crate::refusal::Refusal;
use serde_json::Value;
use sparsed_engine::api::{Owner, Request};
use sparsed_engine::{Admission, Service, SessionId, Standing};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::watch;

/// Runs that are over and still remembered: for those that failed before they said anything, there is no journal.
const OVER_MAX: usize = 64;
/// Most bytes of what these have said, together.
const OVER_BYTES_MAX: usize = 16 << 20;
/// What an event takes beside its texts.
const EVENT_BYTES: usize = 128;

/// Whoever has it locked is alone at something.
type Alone = tokio::sync::Mutex<()>;

/// All runs of the daemon; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runs {
    entries: Arc<Mutex<VecDeque<Entry>>>,
    resuming: Arc<Mutex<HashMap<SessionId, Weak<Alone>>>>,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    id: ResponseId,
    /// What is over is told from memory only as long as the session still says it.
    standing: Standing,
    run: Arc<Run>,
}

/// One response that is answered whether anybody listens or not.
#[derive(Debug)]
pub(crate) struct Run {
    said: Mutex<Said>,
    /// Changes with each event.
    news: watch::Sender<()>,
    cancel: watch::Sender<bool>,
}

#[derive(Debug)]
struct Said {
    events: Vec<Arc<Heard>>,
    /// What they take.
    n_bytes: usize,
    response: Value,
    is_over: bool,
}

/// A run that is over.
#[derive(Clone, Copy, Debug)]
struct Over {
    /// Whether it has no answer.
    has_failed: bool,
    n_bytes: usize,
}

/// An event as it is sent.
#[derive(Debug)]
pub(crate) struct Heard {
    number: u64,
    /// Its `type`.
    pub(crate) kind: String,
    /// All of it as JSON.
    pub(crate) data: String,
}

impl Heard {
    pub(crate) fn of(event: &Value) -> Self {
        Self {
            number: event["sequence_number"].as_u64().unwrap_or(0),
            kind: event["type"].as_str().unwrap_or_default().to_owned(),
            data: event.to_string(),
        }
    }
}

/// A response that was asked for by its name.
#[derive(Debug)]
pub(crate) enum Found {
    /// It is being answered.
    Run(Arc<Run>),
    /// Its events, and the response.
    Told(Vec<Value>, Value),
}

impl Runs {
    /// A response with its events after the number `after`; one that the daemon's end has cut goes on from here, at
    /// `priority`.
    ///
    /// # Errors
    /// There is none of that name; the session's, or the engine's.
    pub(crate) async fn find(
        &self,
        service: &Service,
        owner: Owner,
        id: ResponseId,
        after: Option<u64>,
        priority: i32,
    ) -> Result<Found, Refusal> {
        let failed = match self.get(owner, id) {
            Some(run) if run.has_failed() => Some(run),
            Some(run) => return Ok(Found::Run(run)),
            None => None,
        };
        let stored = match (stored(service, owner, id, after).await, failed) {
            // Nobody had time for it; its answer is still there.
            (Ok(stored @ Stored::Cut(_)), _) => stored,
            (_, Some(run)) => return Ok(Found::Run(run)),
            (Ok(Stored::Told(events, response)), None) => return Ok(Found::Told(events, response)),
            (stored, None) => stored?,
        };
        let alone = self.resuming(id.session);
        let _alone = alone.lock().await;
        if let Some(run) = self.get(owner, id).filter(|run| !run.has_failed()) {
            return Ok(Found::Run(run));
        }
        let head = match stored {
            // Its own connection hears it.
            Stored::Told(events, response) | Stored::Running(events, response) => {
                return Ok(Found::Told(events, response));
            }
            Stored::Cut(head) => head,
        };
        let mut request =
            sessions::with_model(service, owner, move |service| service.resume_turn(owner, id.session)).await?;
        request.urgency.priority = priority;
        let admission = Arc::new(service.admit(owner)?);
        Ok(Found::Run(self.start(service, (owner, admission), id, head, request.into()).await?))
    }

    /// The run of a response, if it goes on or was over not long ago, and its session has it still.
    pub(crate) fn get(&self, owner: Owner, id: ResponseId) -> Option<Arc<Run>> {
        let mut runs = self.lock();
        runs.retain(|entry| entry.standing.lasts());
        runs.iter().rfind(|entry| entry.owner == owner && entry.id == id).map(|entry| Arc::clone(&entry.run))
    }

    /// Has a request answered by a task of its own, which counts as its owner's until it is over.
    ///
    /// # Errors
    /// The engine's, and that there is no room in its queue.
    pub(crate) async fn start(
        &self,
        service: &Service,
        (owner, admission): (Owner, Arc<Admission>),
        id: ResponseId,
        head: Head,
        request: Request,
    ) -> Result<Arc<Run>, Refusal> {
        let standing = request.standing();
        let listening = Listening::begin(service, &head.id, [request], 1).await?;
        let mut script = Script::begin(head, None);
        let run = Arc::new(Run::new(script.response("in_progress"), &script.take()));
        self.lock().push_back(Entry { owner, id, standing, run: Arc::clone(&run) });
        let (task, runs) = (Arc::clone(&run), self.clone());
        tokio::spawn(async move {
            task.carry_out(listening, script).await;
            drop(admission);
            runs.forget_some();
        });
        Ok(run)
    }

    /// Held while an answer of a session begins to go on: who finds the session in use meanwhile waits, and then finds
    /// the run. It may take as long as a model takes to load, so each session has its own.
    fn resuming(&self, session: SessionId) -> Arc<Alone> {
        let mut resuming = self.resuming.lock().unwrap_or_else(PoisonError::into_inner);
        resuming.retain(|_, alone| alone.strong_count() > 0);
        let alone = resuming.get(&session).and_then(Weak::upgrade).unwrap_or_default();
        resuming.insert(session, Arc::downgrade(&alone));
        alone
    }

    /// Forgets a response that is deleted.
    pub(crate) fn forget(&self, owner: Owner, id: ResponseId) {
        self.lock().retain(|entry| entry.owner != owner || entry.id != id);
    }

    /// Forgets runs that are over until the others are within bounds: the oldest first, and of those that have failed
    /// none as long as there are others, which the journal can tell.
    fn forget_some(&self) {
        let mut runs = self.lock();
        runs.retain(|entry| entry.standing.lasts());
        loop {
            let over = runs.iter().enumerate().filter_map(|(at, entry)| Some((at, entry.run.over()?)));
            let over: Vec<(usize, Over)> = over.collect();
            let n_bytes: usize = over.iter().map(|(_, over)| over.n_bytes).sum();
            let next = over.iter().find(|(_, over)| !over.has_failed).or_else(|| over.first());
            match next {
                Some(&(at, _)) if over.len() > OVER_MAX || n_bytes > OVER_BYTES_MAX => drop(runs.remove(at)),
                _ => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    fn new(response: Value, events: &[Value]) -> Self {
        let said = Said { events: Vec::new(), n_bytes: 0, response, is_over: false };
        let run = Self { said: Mutex::new(said), news: watch::Sender::new(()), cancel: watch::Sender::new(false) };
        run.tell(events, false);
        run
    }

    /// The response as it is now.
    pub(crate) fn response(&self) -> Value {
        self.lock().response.clone()
    }

    /// Whether it is over without an answer.
    pub(crate) fn has_failed(&self) -> bool {
        self.over().is_some_and(|over| over.has_failed)
    }

    /// Gives the answer up; it is over soon after.
    pub(crate) fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Waits until it is over.
    pub(crate) async fn end(&self) {
        let mut news = self.news.subscribe();
        while !self.is_over() {
            // The sender is this run's own.
            let _closed = news.changed().await.is_err();
        }
    }

    /// The first event after the one numbered `after`, when it comes; nothing after the last.
    pub(crate) async fn next(&self, after: Option<u64>) -> Option<(u64, Arc<Heard>)> {
        let mut news = self.news.subscribe();
        loop {
            {
                let said = self.lock();
                let heard = after.map_or(0, |after| said.events.partition_point(|event| event.number <= after));
                if let Some(event) = said.events.get(heard) {
                    return Some((event.number, Arc::clone(event)));
                }
                if said.is_over {
                    return None;
                }
            }
            let _closed = news.changed().await.is_err();
        }
    }

    async fn carry_out(&self, mut listening: Listening, mut script: Script) {
        let mut cancelled = self.cancel.subscribe();
        loop {
            let is_over = tokio::select! {
                (_, event) = listening.next() => script.hear(event),
                cancelled = cancelled.wait_for(|cancelled| *cancelled) => {
                    drop(cancelled);
                    script.end(&End::Cancelled, Tokens::default())
                }
            };
            self.tell(&script.take(), is_over);
            if is_over {
                return;
            }
        }
    }

    fn tell(&self, events: &[Value], is_over: bool) {
        let mut said = self.lock();
        for event in events.iter().map(Heard::of) {
            said.n_bytes += EVENT_BYTES + event.kind.len() + event.data.len();
            said.events.push(Arc::new(event));
        }
        if is_over {
            said.response = Script::last_response(events).unwrap_or_default();
        }
        said.is_over = is_over;
        drop(said);
        self.news.send_replace(());
    }

    fn is_over(&self) -> bool {
        self.lock().is_over
    }

    /// What it is if it is over.
    fn over(&self) -> Option<Over> {
        let said = self.lock();
        let has_failed = said.response["status"] == "failed";
        said.is_over.then_some(Over { has_failed, n_bytes: said.n_bytes })
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(number: u64) -> Value {
        json!({ "type": "x", "sequence_number": number, "response": { "n": number } })
    }

    #[tokio::test]
    async fn a_listener_hears_what_comes_after_its_number_and_then_the_end() {
        let run = Run::new(json!({ "n": 0 }), &[event(0), event(1)]);
        let waiting = async {
            let (number, heard) = run.next(Some(1)).await.unwrap();
            assert_eq!((number, heard.kind.as_str()), (5, "x"));
            run.next(Some(5)).await
        };
        let telling = async {
            tokio::task::yield_now().await;
            run.tell(&[event(5)], false);
            tokio::task::yield_now().await;
            run.tell(&[event(6)], true);
        };
        let (last, ()) = tokio::join!(waiting, telling);
        assert_eq!(last.unwrap().0, 6);
        assert!(run.next(Some(6)).await.is_none());
        assert_eq!(run.next(None).await.unwrap().0, 0);
        assert_eq!(run.response(), json!({ "n": 6 }));
        run.end().await;
    }

    #[tokio::test]
    async fn an_answer_that_waits_for_its_model_holds_up_nobody_elses() {
        let runs = Runs::default();
        let [slow, other] = [1, 2].map(|n| SessionId::from_bytes([n; 16]));
        let first = runs.resuming(slow);
        let alone = first.lock().await;
        assert!(runs.resuming(slow).try_lock().is_err(), "one at a time goes on with a session");
        assert!(runs.resuming(other).try_lock().is_ok());
        drop(alone);
        assert!(runs.resuming(slow).try_lock().is_ok());
        drop(first);
        runs.resuming(other);
        assert_eq!(runs.resuming.lock().unwrap().len(), 1, "those that nobody waits for are forgotten");
    }

    fn id(turn: u32) -> ResponseId {
        ResponseId { session: SessionId::from_bytes([1; 16]), turn }
    }

    const OWNER: Owner = Owner::Uid(1);

    /// Has `runs` remember response number `turn`, which is over with `last` if that is an event.
    fn remember(runs: &Runs, turn: u32, last: Option<Value>) {
        remember_as(runs, turn, last, Standing::default());
    }

    fn remember_as(runs: &Runs, turn: u32, last: Option<Value>, standing: Standing) {
        let run = Arc::new(Run::new(json!({}), &[]));
        if let Some(last) = last {
            run.tell(&[last], true);
        }
        runs.lock().push_back(Entry { owner: OWNER, id: id(turn), standing, run });
        runs.forget_some();
    }

    #[test]
    fn what_the_session_does_not_say_any_more_is_not_told_from_memory() {
        let runs = Runs::default();
        let standing = Standing::default();
        remember_as(&runs, 0, Some(event(1)), standing.clone());
        remember(&runs, 1, Some(event(1)));
        assert!(runs.get(OWNER, id(0)).is_some());
        standing.end();
        assert!(runs.get(OWNER, id(0)).is_none() && runs.get(OWNER, id(1)).is_some());
        assert_eq!(runs.lock().len(), 1);
    }

    #[test]
    fn runs_that_are_over_are_forgotten_in_time_and_others_never() {
        let runs = Runs::default();
        remember(&runs, 0, None);
        (1..200).for_each(|turn| remember(&runs, turn, Some(event(1))));
        assert!(runs.get(OWNER, id(0)).is_some(), "it goes on");
        assert!(runs.get(OWNER, id(199)).is_some() && runs.get(OWNER, id(1)).is_none());
        assert!(runs.get(Owner::Uid(2), id(199)).is_none(), "another one's");
        assert_eq!(runs.lock().len(), OVER_MAX + 1);
        runs.forget(OWNER, id(0));
        assert!(runs.get(OWNER, id(0)).is_none());
    }

    #[test]
    fn long_answers_that_are_over_are_left_to_the_journal_and_what_has_failed_is_remembered() {
        let runs = Runs::default();
        let ended = |status: &str, n: usize| {
            let response = json!({ "status": status, "text": "x".repeat(n) });
            Some(json!({ "type": "x", "sequence_number": 1, "response": response }))
        };
        remember(&runs, 0, ended("failed", 10));
        (1..30).for_each(|turn| remember(&runs, turn, ended("completed", 1 << 20)));
        let kept: Vec<u32> = runs.lock().iter().map(|entry| entry.id.turn).collect();
        let n_long = kept.len() - 1;
        assert!((kept[0], kept[n_long]) == (0, 29) && (8..=16).contains(&n_long), "{kept:?}");
        remember(&runs, 30, ended("completed", OVER_BYTES_MAX));
        assert_eq!(runs.lock().len(), 1, "one that is longer than all may be is told from the journal at once");
        assert!(runs.get(OWNER, id(0)).is_some_and(|run| run.has_failed()));
    }
}
