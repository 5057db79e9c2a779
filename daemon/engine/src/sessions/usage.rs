//! What do the sessions take, for whoever looks and must not wait for a disk? It is posted now and then.

use super::keeper::Keeper;
use crate::service::lock;
use sparsed_session::Usage;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Pause between two posts while answers are under way: all sessions are looked at for one.
const PAUSE: Duration = Duration::from_secs(1);

/// Where it is posted; nothing until there is a store. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Board(Arc<Mutex<Option<Usage>>>);

impl Board {
    pub(super) fn look(&self) -> Option<Usage> {
        *lock(&self.0)
    }

    fn post(&self, usage: Usage) {
        *lock(&self.0) = Some(usage);
    }
}

/// What the keeper posts, and when it did last, by the uptime.
#[derive(Debug, Default)]
pub(super) struct Posts {
    pub(super) board: Board,
    at: Option<Duration>,
}

impl Keeper {
    /// Posts what the sessions take, unless that was done a moment ago and more is to come.
    pub(super) fn post(&mut self) {
        let uptime = (self.clocks.uptime)();
        if self.answers.is_empty() || self.posts.at.is_none_or(|at| uptime.saturating_sub(at) >= PAUSE) {
            self.posts.at = Some(uptime);
            self.posts.board.post(self.store.usage());
        }
    }
}
