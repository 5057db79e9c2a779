//! What does the operator see of a request? One line of the log at its end, without a word of what was said.

use crate::refusal::Refusal;
use sparsed_engine::api::{Event, Failure, Request, Usage};
use std::time::Instant;

/// A request that is being answered. Dropped before its end, its client has gone away.
#[derive(Debug, Default)]
pub(super) struct Entry(Option<Begun>);

#[derive(Debug)]
struct Begun {
    /// What the door calls it.
    request: String,
    model: String,
    owner: u64,
    /// Empty without one.
    session: String,
    at: Instant,
    /// Answers that have not ended.
    n_left: usize,
    /// Of those that have; a prompt counts once.
    usage: Usage,
}

impl Entry {
    /// Takes in a request that is about to be handed to the engine: the first, or another answer to it.
    pub(super) fn add(&mut self, id: &str, request: &Request) {
        let begun = self.0.get_or_insert_with(|| Begun {
            request: id.to_owned(),
            model: request.model().to_owned(),
            owner: request.owner().number(),
            session: request.session().map_or_else(String::new, |id| id.to_string()),
            at: Instant::now(),
            n_left: 0,
            usage: Usage::default(),
        });
        begun.n_left += 1;
    }

    /// Hears what its client hears; of all answers to a prompt one is the first.
    pub(super) fn hear(&mut self, event: &Event, is_first: bool) {
        match event {
            Event::Finished(finished) => self.finished(finished.usage, is_first),
            Event::Failed(failure) => self.failed(failure),
            _ => {}
        }
    }

    /// It was not taken: that is the door's to tell, and there may be many of them.
    pub(super) fn refused(&mut self) {
        self.0 = None;
    }

    fn finished(&mut self, usage: Usage, is_first: bool) {
        let Some(begun) = &mut self.0 else { return };
        begun.n_left = begun.n_left.saturating_sub(1);
        let add = |sum: &mut u32, n: u32| *sum = sum.saturating_add(n);
        add(&mut begun.usage.completion_tokens, usage.completion_tokens);
        if is_first {
            add(&mut begun.usage.prompt_tokens, usage.prompt_tokens);
            add(&mut begun.usage.cached_tokens, usage.cached_tokens);
        }
        if begun.n_left > 0 {
            return;
        }
        let Some(Begun { request, model, owner, session, at, usage, .. }) = self.0.take() else { return };
        let Usage { prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens: _ } = usage;
        log::info!(
            request:%, model:%, owner:%, session:%, prompt_tokens, cached_tokens, completion_tokens,
            took_ms = millis(at);
            "request answered"
        );
    }

    /// There is no more of it. Why is said by its code only: a reason may quote the request.
    fn failed(&mut self, failure: &Failure) {
        let Some(Begun { request, model, owner, session, at, .. }) = self.0.take() else { return };
        let code = Refusal::from(failure.clone()).name().code;
        log::info!(request:%, model:%, owner:%, session:%, took_ms = millis(at), code; "request failed");
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(Begun { request, model, owner, session, at, .. }) = self.0.take() else { return };
        log::info!(request:%, model:%, owner:%, session:%, took_ms = millis(at); "request cancelled");
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
