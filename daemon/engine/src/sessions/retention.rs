//! May the clock say that a session is old?
//!
//! Sessions have dates, and clocks are wrong: in 1970 until a network is there, or years ahead for a moment. So nothing
//! is deleted by a date until the clock has gone on as time does for an hour; one that is set begins its hour anew.

use super::keeper::Keeper;
use sparsed_session::{DATE_MIN_S, SessionId};
use std::collections::VecDeque;
use std::time::Duration;

/// Pause between looks for sessions that are past their retention.
pub(super) const EXPIRY: Duration = Duration::from_secs(600);

/// How long the clock must have gone on undisturbed.
const SETTLED: Duration = Duration::from_secs(3600);
/// What a clock may gain or lose between two looks and is not set: it is kept right by and by.
const SLACK_S: u64 = 60;

/// What was seen of the clock.
#[derive(Debug, Default)]
pub(super) struct Settling {
    /// Time since some start and date in seconds since 1970, at the first look since it was set, and at the last one.
    seen: Option<[(Duration, u64); 2]>,
}

impl Settling {
    /// Looks at both clocks; answers whether the date may be believed.
    pub(super) fn look(&mut self, uptime: Duration, date: u64) -> bool {
        let now = (uptime, date);
        let goes_on = |last: (Duration, u64)| {
            let expected = last.1.saturating_add(uptime.saturating_sub(last.0).as_secs());
            date.abs_diff(expected) <= SLACK_S
        };
        let first = self.seen.filter(|&[_, last]| goes_on(last)).map_or(now, |[first, _]| first);
        self.seen = Some([first, now]);
        date >= DATE_MIN_S && uptime.saturating_sub(first.0) >= SETTLED
    }
}

/// What is deleted because it is old.
#[derive(Debug, Default)]
pub(super) struct Retention {
    settling: Settling,
    /// When there was a look last, by the uptime.
    looked_at: Option<Duration>,
    /// Sessions that were found then, with their owners.
    found: VecDeque<(u64, SessionId)>,
}

impl Retention {
    /// Whether there is something to delete.
    pub(super) fn is_at_work(&self) -> bool {
        !self.found.is_empty()
    }
}

impl Keeper {
    /// Whether sessions were found that are past their retention, and not all of them are deleted.
    pub(crate) fn is_expiring(&self) -> bool {
        self.retention.is_at_work()
    }

    /// Deletes one session that is past its retention: each takes the disk several syncs, and answers wait meanwhile.
    pub(super) fn expire(&mut self) {
        let (uptime, now) = ((self.clocks.uptime)(), self.seconds());
        let retention = &mut self.retention;
        if retention.looked_at.is_none_or(|at| uptime.saturating_sub(at) >= EXPIRY) {
            retention.looked_at = Some(uptime);
            let is_settled = retention.settling.look(uptime, now);
            retention.found = if is_settled { self.store.expired(now).into() } else { VecDeque::new() };
            if retention.is_at_work() {
                log::info!(sessions = retention.found.len(); "sessions past their retention are deleted");
            }
        }
        let Some((owner, id)) = retention.found.pop_front().filter(|(_, id)| !self.taken.contains(id)) else { return };
        if !self.store.is_expired(owner, id, now) {
            return;
        }
        self.retract(owner, id, 0);
        // Those behind it go all the same; this one is found again.
        if let Err(error) = self.remove(owner, id) {
            log::warn!(session:% = id, reason:% = error; "sessions past their retention could not be deleted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TODAY: u64 = DATE_MIN_S + 60_000_000;

    /// Looks every ten minutes from `uptime` on, with a date that goes on; answers the last look's answer.
    fn looks(settling: &mut Settling, uptime: u64, date: u64, n: u64) -> bool {
        let look = |at: u64| settling.look(Duration::from_secs(uptime + 600 * at), date + 600 * at);
        (0..n).map(look).last().unwrap()
    }

    #[test]
    fn a_date_is_believed_after_an_hour_and_not_before() {
        let mut settling = Settling::default();
        assert!(!looks(&mut settling, 5, TODAY, 6));
        assert!(settling.look(Duration::from_secs(3605), TODAY + 3600));
    }

    #[test]
    fn a_clock_that_was_set_is_not_believed_for_an_hour_whichever_way_it_went() {
        for jump in [-50_000_000, -61, 61, 400_000_000] {
            let mut settling = Settling::default();
            assert!(looks(&mut settling, 0, TODAY, 7));
            let then = (TODAY + 7 * 600).saturating_add_signed(jump);
            assert!(!looks(&mut settling, 7 * 600, then, 6), "{jump}");
            assert!(looks(&mut settling, 13 * 600, then + 6 * 600, 1), "{jump}");
        }
    }

    /// A box that wakes for some minutes a day: whoever looks does so then only, and both clocks have gone on.
    #[test]
    fn a_machine_that_sleeps_most_of_the_time_has_a_clock_that_is_believed() {
        let mut settling = Settling::default();
        assert!(!looks(&mut settling, 5, TODAY, 1));
        assert!(settling.look(Duration::from_secs(5 + 86_400), TODAY + 86_400));
    }

    #[test]
    fn a_clock_that_runs_a_little_fast_is_believed_and_one_that_was_never_set_is_not() {
        let mut settling = Settling::default();
        let fast = (0..100).map(|at| settling.look(Duration::from_secs(600 * at), TODAY + 630 * at));
        assert!(fast.last().unwrap());
        assert!(!looks(&mut Settling::default(), 0, 100, 1000));
    }
}
