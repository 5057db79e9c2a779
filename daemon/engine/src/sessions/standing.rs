//! Does a session still have a turn as it was answered? Whoever keeps an answer in memory must not tell it any longer
//! than that: a deletion is to take all there is.

use super::SessionId;
use super::keeper::Keeper;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tells of one turn of a session whether the session still has it. One by default has no session, and lasts.
#[derive(Clone, Debug, Default)]
pub struct Standing(Arc<AtomicBool>);

impl Standing {
    /// Whether the turn has not been deleted, truncated or gone on with since it was begun. Does not wait.
    pub fn lasts(&self) -> bool {
        !self.0.load(Ordering::Acquire)
    }

    /// The turn is deleted, truncated or gone on with.
    pub fn end(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The turns that somebody may still keep in memory.
#[derive(Debug, Default)]
pub(super) struct Standings(Vec<(SessionId, u32, Standing)>);

impl Standings {
    /// A turn is answered. What was answered as this one before, or after it, is not of the session any more.
    pub(super) fn begin(&mut self, id: SessionId, turn: u32) -> Standing {
        self.end(id, turn);
        self.0.retain(|(.., standing)| Arc::strong_count(&standing.0) > 1);
        let standing = Standing::default();
        self.0.push((id, turn, standing.clone()));
        standing
    }

    /// The session has no turn any more from number `turn` on.
    fn end(&mut self, id: SessionId, turn: u32) {
        for (.., standing) in self.0.extract_if(.., |(of, number, _)| *of == id && *number >= turn) {
            standing.end();
        }
    }
}

impl Keeper {
    /// Says that the turns of a session from number `turn` on are about to go. Who keeps one that stays after all reads
    /// it from the journal again.
    pub(super) fn retract(&mut self, owner: u64, id: SessionId, turn: u32) {
        if self.store.summary(owner, id).is_ok() {
            self.standings.end(id, turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_lasts_until_it_or_one_before_it_goes_or_is_answered_again() {
        let [id, other] = [1, 2].map(|n| SessionId::from_bytes([n; 16]));
        let mut standings = Standings::default();
        let elsewhere = standings.begin(other, 0);
        let turns: Vec<Standing> = (0..4).map(|turn| standings.begin(id, turn)).collect();
        let lasting = || turns.iter().map(Standing::lasts).collect::<Vec<_>>();
        assert_eq!(lasting(), [true; 4]);
        standings.end(id, 3);
        assert_eq!(lasting(), [true, true, true, false]);
        let again = standings.begin(id, 1);
        assert_eq!(lasting(), [true, false, false, false]);
        assert!(again.lasts() && elsewhere.lasts());
        drop((turns, again));
        standings.begin(other, 1);
        assert_eq!(standings.0.len(), 2, "those that nobody keeps are forgotten");
    }
}
