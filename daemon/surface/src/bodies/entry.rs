//! What does the operator see of a request? One line of the log at its end, without a word of what was said.

use crate::refusal::Refusal;
use sparsed_engine::api::{Finished, Generate};
use std::time::Instant;

/// A request that is being answered. Dropped before its end, its client has gone away.
#[derive(Debug, Default)]
pub(super) struct Entry(Option<Begun>);

#[derive(Debug)]
struct Begun {
    request: String,
    model: String,
    owner: u64,
    /// Empty without one.
    session: String,
    at: Instant,
}

impl Entry {
    /// Of a request that is about to be handed to the engine, which answers call `id`.
    pub(super) fn new(id: &str, request: &Generate) -> Self {
        Self(Some(Begun {
            request: id.to_owned(),
            model: request.model.clone(),
            owner: request.owner.number(),
            session: request.session().map_or_else(String::new, |id| id.to_string()),
            at: Instant::now(),
        }))
    }

    /// All answers to it have ended.
    pub(super) fn answered(&mut self, finished: &[Finished]) {
        let Some(Begun { request, model, owner, session, at }) = self.0.take() else { return };
        let sum = |tokens: fn(&Finished) -> u32| finished.iter().map(|one| u64::from(tokens(one))).sum::<u64>();
        // The prompt is the same for all of them.
        let usage = finished.first().map(|one| one.usage).unwrap_or_default();
        log::info!(
            request:%, model:%, owner:%, session:%, prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens, completion_tokens = sum(|one| one.usage.completion_tokens),
            took_ms = millis(at);
            "request answered"
        );
    }

    /// There is no more of it. Why is said by its code only: a reason may quote the request.
    pub(super) fn failed(&mut self, refusal: &Refusal) {
        let Some(Begun { request, model, owner, session, at }) = self.0.take() else { return };
        let code = refusal.name().code;
        log::info!(request:%, model:%, owner:%, session:%, took_ms = millis(at), code; "request failed");
    }

    /// It was not taken: that is the door's to tell, and there may be many of them.
    pub(super) fn refused(&mut self) {
        self.0 = None;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(Begun { request, model, owner, session, at }) = self.0.take() else { return };
        log::info!(request:%, model:%, owner:%, session:%, took_ms = millis(at); "request cancelled");
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
