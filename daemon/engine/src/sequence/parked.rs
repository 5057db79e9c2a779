//! What does a sequence's listener take, and how long has it taken nothing?

use super::Sequence;
use crate::api::Refused;
use std::time::Duration;

/// Longest time between two looks at a listener that counts as its own: in a longer one nobody has looked.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// The last look at a listener that does not read, and the time from each look to the next, added up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parked(Option<(Duration, Duration)>);

impl Parked {
    /// It has still not read.
    pub(super) fn look(&mut self, now: Duration) {
        let (last, so_far) = self.0.unwrap_or((now, Duration::ZERO));
        self.0 = Some((now, so_far + now.saturating_sub(last).min(LOOK_MAX)));
    }

    /// Time in which it could have read.
    pub(super) fn total(&self) -> Duration {
        self.0.map_or(Duration::ZERO, |(_, so_far)| so_far)
    }
}

impl Sequence {
    /// Offers what waits in the outbox. Answers whether all of it is gone.
    pub(crate) fn deliver(&mut self, now: Duration) -> bool {
        while let Some(event) = self.outbox.pop_front() {
            match self.sink.offer(event) {
                Ok(()) => self.parked = Parked::default(),
                Err(Refused::Full(event)) => {
                    self.outbox.push_front(event);
                    self.parked.look(now);
                    return false;
                }
                Err(Refused::Behind(event)) => {
                    self.outbox.push_front(event);
                    return false;
                }
                Err(Refused::Closed) => self.outbox.clear(),
            }
        }
        true
    }

    /// Whether the listener is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.sink.is_closed()
    }

    /// How long the listener has not read, as far as somebody has looked.
    pub(crate) fn parked_for(&self) -> Duration {
        self.parked.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nobody_has_looked_does_not_count() {
        let mut parked = Parked::default();
        let total = |parked: &mut Parked, at_s| {
            parked.look(Duration::from_secs(at_s));
            parked.total().as_secs()
        };
        let totals = [10, 12, 15, 60, 61].map(|at_s| total(&mut parked, at_s));
        assert_eq!(totals, [0, 2, 5, 10, 11]);
    }
}
