//! How does one request go? A seat, attempts until the first token has come, then the stream to its end.

use crate::answer::Answer;
use crate::client::Inner;
use crate::connection::Exchange;
use crate::ear::{Ear, End};
use crate::events::Events;
use crate::line::Place;
use crate::request::Body;
use crate::trouble::Trouble;
use bytes::Bytes;
use sparsed_engine::api::{Calling, Event, Failure, FinishReason, Finished, Relay, RelayPrompt, Timings};
use std::future::Future;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// How often it is looked whether anybody listens.
const LOOK: Duration = Duration::from_millis(50);
/// A request that was not refused within so long is taken as far as its listener must know: doors wait for that.
const TAKEN: Duration = Duration::from_secs(1);
/// The first pause before a further attempt; each is twice as long as the one before.
const BACKOFF: Duration = Duration::from_millis(250);
/// The longest pause. Who asks to be left alone for longer is not asked again.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A request on its way.
pub(crate) struct Run<'a> {
    inner: &'a Inner,
    relay: &'a Relay,
    ear: &'a mut Ear,
    arrived: Instant,
    /// When it had a seat.
    seated: Instant,
    /// When the first token came.
    first: Option<Instant>,
}

/// Has a request answered; what becomes of it is heard by `ear`.
pub(crate) async fn answer(inner: &Inner, relay: &Relay, ear: &mut Ear, place: Place) -> Result<Finished, End> {
    let now = Instant::now();
    let mut run = Run { inner, relay, ear, arrived: now, seated: now, first: None };
    run.whole(place).await
}

impl Run<'_> {
    async fn whole(&mut self, mut place: Place) -> Result<Finished, End> {
        if !place.has_seat() {
            self.ear.queued(place.ahead).await?;
            let deadline = self.deadline();
            self.meanwhile(place.sit(), deadline).await?;
        }
        self.seated = Instant::now();
        let mut pause = BACKOFF;
        let mut n_left = self.inner.options.retries;
        loop {
            let trouble = match self.attempt().await {
                Err(End::Trouble(trouble)) => trouble,
                ended => return ended,
            };
            self.inner.note(&trouble);
            let asked = trouble.retry_after().unwrap_or_default();
            if self.first.is_some() || n_left == 0 || !trouble.may_pass() || asked > BACKOFF_MAX {
                return Err(trouble.into());
            }
            n_left -= 1;
            log::debug!(model = self.relay.model.as_str(), pause_ms = pause.as_millis(); "an upstream engine is asked again");
            let jitter = pause.mul_f64(fastrand::f64() / 2.0);
            let deadline = self.deadline();
            self.meanwhile(sleep(asked.max(pause + jitter)), deadline).await?;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    /// By when the request must have begun, and what it hears else.
    fn deadline(&self) -> Option<(Instant, Trouble)> {
        let deadline_ms = self.relay.wishes.urgency.deadline_ms?;
        let at = self.arrived + Duration::from_millis(deadline_ms);
        Some((at, Trouble::Here(Failure::DeadlineExceeded { deadline_ms })))
    }

    /// Waits for `future`, until `limit`, while somebody listens and the daemon goes on.
    async fn meanwhile<T>(
        &mut self,
        future: impl Future<Output = T>,
        limit: Option<(Instant, Trouble)>,
    ) -> Result<T, End> {
        let mut future = std::pin::pin!(future);
        let at = limit.as_ref().map_or_else(Instant::now, |(at, _)| *at);
        loop {
            tokio::select! {
                biased;
                done = &mut future => return Ok(done),
                () = sleep_until(at), if limit.is_some() => {
                    let trouble = limit.map_or(Trouble::Here(Failure::CutOff), |(_, trouble)| trouble);
                    return Err(trouble.into());
                }
                () = sleep(LOOK) => {
                    if self.inner.stop.load(Ordering::Relaxed) {
                        return Err(Trouble::Here(Failure::ShuttingDown).into());
                    }
                    if self.ear.is_gone() {
                        return Err(End::Gone);
                    }
                    if self.arrived.elapsed() >= TAKEN {
                        self.ear.queued(0).await?;
                    }
                }
            }
        }
    }

    async fn attempt(&mut self) -> Result<Finished, End> {
        let options = &self.inner.options;
        let late = |what, limit: Duration| Some((Instant::now() + limit, Trouble::Late { what, limit }));
        let there = self.meanwhile(self.inner.there(), late("its list of models", options.first_token)).await??;
        let body = Body::of(self.relay, &there, options.priority).map_err(Trouble::Here)?;
        let bytes = Bytes::from(body.json.to_string());
        let mut limit = late("the first token", options.first_token);
        let open = async { Exchange::open(options, body.endpoint, Some(bytes)).await?.streaming(options).await };
        let mut exchange = self.meanwhile(open, limit.clone()).await??;
        self.inner.up(there);
        self.ear.queued(0).await?;
        let key = options.key.as_ref().map(|key| key.as_str());
        let (mut events, wishes) = (Events::default(), &self.relay.wishes);
        let answer = Answer::new(self.relay.logprobs, wishes.one_call, key);
        let mut answer = answer.telling_progress(wishes.progress);
        let mut last = Instant::now();
        while !answer.is_over() {
            let Some(bytes) = self.meanwhile(exchange.next(), limit.clone()).await?? else { break };
            let mut heard = Vec::new();
            let mut n_events = 0u32;
            let read = events.push(&bytes, |data| {
                n_events += 1;
                answer.read(data, |event| heard.push(event))
            });
            // Comments, which keep proxies awake, are no sign of life; nor is an opening without text, or a count.
            if heard.iter().any(|event| !matches!(event, Event::Progress(_))) {
                last = Instant::now();
                self.first.get_or_insert(last);
            }
            for mut event in heard {
                if let Event::Progress(progress) = &mut event {
                    progress.timings = self.timings(if self.first.is_some() { last } else { Instant::now() });
                }
                self.ear.tell(event).await?;
            }
            read?;
            if self.first.is_some() && n_events > 0 {
                limit = late("a further token", options.idle);
            }
        }
        let (reason, usage) = answer.end()?;
        if reason == FinishReason::Stop && self.must_call() {
            // Some engines do not heed it, where the model's template knows no functions.
            return Err(Trouble::Failed("it called no function, which it was told to".to_owned()).into());
        }
        Ok(Finished { reason, stopped_by: None, usage, timings: self.timings(last) })
    }

    /// Whether the answer is nothing without a call.
    fn must_call(&self) -> bool {
        matches!(&self.relay.prompt, RelayPrompt::Chat { calling, .. } if *calling != Calling::Free)
    }

    /// As this end has measured them.
    fn timings(&self, last: Instant) -> Timings {
        let first = self.first.unwrap_or(last);
        let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        Timings {
            queue_ms: ms(self.arrived, self.seated),
            prompt_ms: ms(self.seated, first),
            predicted_ms: ms(first, last),
        }
    }
}

/// The last word to the listener, if there is one.
pub(crate) async fn conclude(inner: &Inner, ear: &mut Ear, ended: Result<Finished, End>) {
    match ended {
        Ok(finished) => {
            // Counted first: who has heard the end finds it in the counts.
            inner.finished(&finished);
            if let Err(End::Trouble(trouble)) = ear.tell(Event::Finished(finished)).await {
                ear.fail(trouble.failure(&inner.options.name));
            }
        }
        Err(End::Gone) => inner.failed(),
        Err(End::Trouble(trouble)) => {
            inner.failed();
            ear.fail(trouble.failure(&inner.options.name));
        }
    }
}
