//! Who speaks to the other engine? A client of one configured model, cheap to clone, and the look at whether the engine
//! is there.

use crate::connection::Exchange;
use crate::described::Described;
use crate::ear::Ear;
use crate::line::Line;
use crate::options::{Limits, Options};
use crate::run;
use crate::trouble::Trouble;
use sparsed_engine::Stats;
use sparsed_engine::api::{Failure, Finished, Reach, Relay, Sink, Upstream, UpstreamStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// How often an engine is asked that answered.
const LOOK_UP: Duration = Duration::from_secs(15);
/// How often one is asked that did not.
const LOOK_DOWN: Duration = Duration::from_secs(3);
/// How long it may take to list its models.
const LIST: Duration = Duration::from_secs(10);

/// A client of one model of another engine.
#[derive(Clone, Debug)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) options: Options,
    /// Whether requests are given up.
    pub(crate) stop: AtomicBool,
    line: Arc<Line>,
    /// As they were set last; those of the options are the first.
    limits: Mutex<Limits>,
    found: Mutex<Found>,
    /// All but how many run and wait.
    stats: Mutex<Stats>,
}

/// What is known of the engine.
#[derive(Debug)]
struct Found {
    reach: Reach,
    /// Of the last time that it answered.
    there: Option<Described>,
}

impl Client {
    /// A client that has asked nothing yet.
    pub fn new(options: Options) -> Self {
        let line = Line::new(&options);
        let found = Mutex::new(Found { reach: Reach::Unknown, there: None });
        let limits = Mutex::new(options.limits);
        Self(Arc::new(Inner { options, stop: AtomicBool::new(false), line, limits, found, stats: Mutex::default() }))
    }

    /// Has requests keep to `limits` that come from now on; those that are there keep to the ones that they came with.
    pub fn set_limits(&self, limits: Limits) {
        *self.0.limits() = limits;
    }

    /// Looks again and again whether the engine is there; resolves never.
    pub async fn watch(&self) {
        loop {
            let pause = match self.describe().await {
                Ok(_) => LOOK_UP,
                Err(_) => LOOK_DOWN,
            };
            sleep(pause).await;
        }
    }

    /// Asks the engine what it serves.
    ///
    /// # Errors
    /// Why it does not say.
    pub async fn describe(&self) -> Result<Described, Failure> {
        match self.0.describe().await {
            Ok(there) => {
                self.0.up(there.clone());
                Ok(there)
            }
            Err(trouble) => {
                self.0.down(&trouble);
                Err(trouble.failure(&self.0.options.name))
            }
        }
    }
}

impl Inner {
    async fn describe(&self) -> Result<Described, Trouble> {
        let options = &self.options;
        let list = async { Exchange::open(options, "/models", None).await?.list(options).await };
        let list =
            timeout(LIST, list).await.map_err(|_| Trouble::Late { what: "its list of models", limit: LIST })??;
        let mut there = Described::find(&list, options.model.as_deref())?;
        there.max_context = options.max_context.or(there.max_context);
        Ok(there)
    }

    /// The model to ask for: as it was described last, or it is asked for now.
    pub(crate) async fn there(&self) -> Result<Described, Trouble> {
        let known = self.found().there.clone();
        match known {
            Some(there) => Ok(there),
            None => self.describe().await,
        }
    }

    /// Takes note that the engine answers.
    pub(crate) fn up(&self, there: Described) {
        let mut found = self.found();
        if found.reach != Reach::Up {
            let (model, engine) = (self.options.name.as_str(), &self.options.address);
            log::info!(model, engine:%; "upstream engine answers");
        }
        *found = Found { reach: Reach::Up, there: Some(there) };
    }

    fn down(&self, trouble: &Trouble) {
        let reason = trouble.clone().failure(&self.options.name).to_string();
        let mut found = self.found();
        if !matches!(found.reach, Reach::Down(_)) {
            let (model, engine) = (self.options.name.as_str(), &self.options.address);
            log::warn!(model, engine:%, reason:%; "upstream engine does not answer");
        }
        // A busy engine may be slow to list its models and answers all the same; one that was gone may have others.
        let there = if matches!(trouble, Trouble::Late { .. }) { found.there.take() } else { None };
        *found = Found { reach: Reach::Down(reason), there };
    }

    /// Takes note of what went wrong with a request, as far as it says that the engine is not there.
    pub(crate) fn note(&self, trouble: &Trouble) {
        if matches!(trouble, Trouble::Unreachable(_)) {
            self.down(trouble);
        }
    }

    pub(crate) fn finished(&self, finished: &Finished) {
        let (usage, timings) = (finished.usage, finished.timings);
        let mut stats = self.stats();
        stats.sampled_tokens += u64::from(usage.completion_tokens);
        stats.tally.prompt_tokens += u64::from(usage.prompt_tokens);
        stats.tally.cached_tokens += u64::from(usage.cached_tokens);
        stats.tally.queue.add(timings.queue_ms / 1e3);
        stats.tally.first_token.add((timings.queue_ms + timings.prompt_ms) / 1e3);
        stats.tally.finished(finished);
    }

    pub(crate) fn failed(&self) {
        self.stats().tally.failed += 1;
    }

    fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        // Whole at any time, as the other.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Upstream for Client {
    fn status(&self) -> UpstreamStatus {
        let (options, found) = (&self.0.options, self.0.found());
        let there = found.there.as_ref();
        UpstreamStatus {
            address: options.address.to_string(),
            model: there.map(|there| there.model.clone()).or_else(|| options.model.clone()),
            software: there.map_or("unknown", Described::software),
            max_context: there.map_or(options.max_context, |there| there.max_context),
            reach: found.reach.clone(),
        }
    }

    fn stats(&self) -> Stats {
        let mut stats = *self.0.stats();
        (stats.load.running, stats.load.waiting) = self.0.line.load();
        stats
    }

    fn submit(&self, relay: Relay, sink: Box<dyn Sink>) -> Result<(), Failure> {
        // Doors call from their runtime; without one there is nobody to carry bytes.
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| Failure::ShuttingDown)?;
        let limits = *self.0.limits();
        let place = self.0.line.enter(relay.owner, limits.per_owner_max)?;
        let inner = Arc::clone(&self.0);
        runtime.spawn(async move {
            let mut ear = Ear::new(sink, limits.slow_consumer);
            let ended = run::answer(&inner, &relay, &mut ear, place).await;
            run::conclude(&inner, &mut ear, ended).await;
        });
        Ok(())
    }

    fn stop(&self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::Wishes;
    use sparsed_engine::api::{Event, Owner, Refused, RelayPrompt};

    /// Has gone away.
    struct Gone;

    impl Sink for Gone {
        fn offer(&mut self, _: Event) -> Result<(), Refused> {
            Err(Refused::Closed)
        }

        fn is_closed(&self) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn limits_that_are_changed_hold_for_the_next_request() {
        let limits = |per_owner_max| Limits { per_owner_max, slow_consumer: Duration::from_secs(1) };
        let client = Client::new(Options {
            name: "big".to_owned(),
            address: "http://127.0.0.1:9/v1".parse().unwrap(),
            model: None,
            key: None,
            tls: None,
            max_context: None,
            connect: Duration::from_secs(1),
            first_token: Duration::from_secs(1),
            idle: Duration::from_secs(1),
            retries: 0,
            priority: false,
            running_max: 8,
            waiting_max: 8,
            limits: limits(1),
        });
        let ask = || {
            let relay = Relay {
                model: "big".to_owned(),
                owner: Owner::Uid(1),
                prompt: RelayPrompt::Text("x".to_owned()),
                wishes: Wishes::default(),
                logprobs: None,
            };
            // None of them begins before this test waits for something.
            client.submit(relay, Box::new(Gone))
        };
        let full = |limit| Err(Failure::UserQueueFull { limit, retry_after_s: 1 });
        assert_eq!((ask(), ask()), (Ok(()), full(1)));
        client.set_limits(limits(2));
        assert_eq!((ask(), ask()), (Ok(()), full(2)));
        client.set_limits(limits(1));
        assert_eq!(ask(), full(1));
    }
}
