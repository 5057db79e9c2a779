//! How far is a request, and how long did it take? What its listener hears of it beside the answer.

use super::{Sequence, count};
use crate::api::{Event, Progress, Timings, Usage};
use std::time::Duration;

/// When things happened, since the engine's start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) submitted: Duration,
    pub(super) started: Option<Duration>,
    pub(super) first_token: Option<Duration>,
    pub(super) last_token: Duration,
}

impl Times {
    /// While there is no token, the prompt's time is that until `now`.
    fn told(self, now: Duration) -> Timings {
        let Self { submitted, started, first_token, last_token } = self;
        let started = started.unwrap_or(submitted);
        let (first, last) = first_token.map_or((now, now), |first| (first, last_token));
        let ms = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64() * 1e3;
        Timings { queue_ms: ms(submitted, started), prompt_ms: ms(started, first), predicted_ms: ms(first, last) }
    }
}

impl Sequence {
    /// Tokens counted so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: count(self.n_prompt),
            // A resumed answer's rows may be there too.
            cached_tokens: self.n_cached.unwrap_or(0).min(count(self.n_prompt)),
            completion_tokens: count(self.n_answered()),
            reasoning_tokens: self.answer.n_reasoning(),
        }
    }

    /// How long it is here.
    pub(crate) fn waits_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.times.submitted)
    }

    /// When its first token came, counted from its arrival.
    pub(crate) fn first_token_after(&self) -> Option<Duration> {
        self.times.first_token.map(|first| first.saturating_sub(self.times.submitted))
    }

    /// When its last token came, if there is any.
    pub(crate) fn last_token(&self) -> Option<Duration> {
        self.times.first_token.map(|_| self.times.last_token)
    }

    /// Times of an answer that has begun.
    pub(super) fn timings(&self) -> Timings {
        self.times.told(self.times.last_token)
    }

    /// Tells a listener that wants to hear it how far the prompt is read, if that is further than it knows: what is
    /// read again because blocks were given back is no news.
    pub(crate) fn tell_read(&mut self, now: Duration) {
        let read_tokens = self.table.n_tokens().min(count(self.n_prompt));
        let is_news = self.told_read.is_none_or(|told| read_tokens > told) && self.times.first_token.is_none();
        if self.progress && is_news {
            self.told_read = Some(read_tokens);
            let (usage, timings) = (self.usage(), self.times.told(now));
            self.outbox.push_back(Event::Progress(Progress { read_tokens, usage, timings }));
        }
    }

    /// The same of a token of the answer, before its text.
    pub(super) fn tell_answered(&mut self) {
        if self.progress {
            let (read_tokens, usage, timings) = (count(self.n_prompt), self.usage(), self.timings());
            self.outbox.push_back(Event::Progress(Progress { read_tokens, usage, timings }));
        }
    }
}
