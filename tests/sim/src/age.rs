//! Which sessions are old, and does the clock say so that may be believed? It is set at any moment, to any date.
//!
//! The model: a session goes when its date is further back than the retention, if it is not pinned, nobody uses it, and
//! the clock has not been set for an hour; never otherwise.

use crate::daemon::{OWNERS, World};
use crate::disk::Faults;
use crate::outline::Mistake;
use crate::run::{Checked, wrong};
use fastrand::Rng;
use sparsed_engine::{SessionId, SessionSummary};
use sparsed_session::DATE_MIN_S;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a session stays that nobody uses, in seconds.
pub(crate) const RETENTION_S: u64 = 30 * 86_400;
/// How long a clock must not have been set.
const HOUR_S: u64 = 3600;

/// Both clocks as the daemon is told of them, in seconds.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    date: Arc<AtomicU64>,
    uptime: Arc<AtomicU64>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { date: Arc::new(AtomicU64::new(1_700_000_000)), uptime: Arc::default() }
    }

    /// What tells the date.
    pub(crate) fn date(&self) -> impl Fn() -> u64 + Send + 'static {
        let date = Arc::clone(&self.date);
        move || date.load(Ordering::Relaxed)
    }

    /// What tells the time since some start.
    pub(crate) fn uptime(&self) -> impl Fn() -> Duration + Send + 'static {
        let uptime = Arc::clone(&self.uptime);
        move || Duration::from_secs(uptime.load(Ordering::Relaxed))
    }
}

/// What the model knows of the clock.
#[derive(Clone, Debug)]
pub(crate) struct Age {
    pub(crate) clock: Clock,
    /// Seconds that have gone by since somebody could have seen that the clock was set.
    steady_s: u64,
    /// Whether it was set since the last look.
    is_set: bool,
}

impl Age {
    pub(crate) fn new() -> Self {
        Self { clock: Clock::new(), steady_s: 0, is_set: false }
    }

    /// A daemon has looked at the clock for the first time.
    pub(crate) fn begin(&mut self) {
        (self.steady_s, self.is_set) = (0, false);
    }

    /// The clock is set, by more than it is kept right.
    pub(crate) fn set(&mut self, rng: &mut Rng, mistake: Mistake) {
        let (now, mut then) = (self.clock.date.load(Ordering::Relaxed), rng.u64(..4_000_000_000));
        if now.abs_diff(then) < HOUR_S {
            then += 2 * HOUR_S;
        }
        self.clock.date.store(then, Ordering::Relaxed);
        self.is_set = true;
        if mistake == Mistake::FollowsDate {
            self.clock.uptime.fetch_add(then.saturating_sub(now), Ordering::Relaxed);
        }
    }

    /// Time goes by; answers the date if it may be believed at the next look.
    fn pass(&mut self, seconds: u64) -> Option<u64> {
        self.clock.uptime.fetch_add(seconds, Ordering::Relaxed);
        let date = self.clock.date.fetch_add(seconds, Ordering::Relaxed) + seconds;
        self.steady_s = if std::mem::take(&mut self.is_set) { 0 } else { self.steady_s + seconds };
        (self.steady_s >= HOUR_S && date >= DATE_MIN_S).then_some(date)
    }
}

impl World {
    /// Time goes by in which nobody does anything, in pieces after each of which the daemon looks for old sessions.
    pub(crate) fn age(&mut self) -> Checked {
        // Whether nothing fails meanwhile: then who is to go is gone for good.
        let is_sure = self.rng.bool();
        if is_sure {
            self.disk.set_faults(Faults::NONE);
        }
        self.machine.sessions_turn(usize::MAX);
        self.settle_all()?;
        for _ in 0..self.rng.u32(1..12) {
            let seconds = [600, 600, 2000, 86_400, RETENTION_S / 3][self.rng.usize(..5)];
            let before: Vec<SessionSummary> =
                OWNERS.into_iter().flat_map(|owner| self.machine.summaries(owner)).collect();
            let in_use: Vec<SessionId> = self.in_use();
            let believed = self.age.pass(seconds);
            self.machine.sessions_turn(usize::MAX);
            // Of those that could not be removed before, which nobody sees any more, each takes a turn, too.
            while self.machine.is_expiring() {
                self.machine.sessions_turn(usize::MAX);
            }
            self.look_for_old(believed, &before, &in_use, is_sure)?;
        }
        Ok(())
    }

    /// Sessions that somebody has taken.
    fn in_use(&mut self) -> Vec<SessionId> {
        let ids: Vec<SessionId> = self.talks.iter().map(|(talk, _)| talk.id).collect();
        ids.into_iter().filter(|id| !self.machine.is_free(*id)).collect()
    }

    /// Of the sessions that there were `before`, those are gone that were to go at this date.
    fn look_for_old(
        &mut self,
        believed: Option<u64>,
        before: &[SessionSummary],
        in_use: &[SessionId],
        is_sure: bool,
    ) -> Checked {
        let after: Vec<SessionSummary> = OWNERS.into_iter().flat_map(|owner| self.machine.summaries(owner)).collect();
        for summary in before {
            let is_gone = after.iter().all(|other| other.id != summary.id);
            // What was last used before the clock was ever set has been used when it was.
            let age = believed.filter(|_| summary.used >= DATE_MIN_S).and_then(|date| date.checked_sub(summary.used));
            let is_in_use = in_use.contains(&summary.id);
            let must_go = age.is_some_and(|age| age > RETENTION_S) && !summary.pinned && !is_in_use;
            // An answer may have come to its end on a disk that fails.
            if is_gone != must_go && (is_sure || !is_in_use) {
                let which = if is_gone { "is gone" } else { "is still there" };
                return wrong(format!("{} {which}, last used {age:?} s before {believed:?}", summary.id));
            }
            let Some(at) = self.talks.iter().position(|(talk, _)| talk.id == summary.id) else { continue };
            let (talk, live) = &mut self.talks[at];
            let is_known = live.is_none() && !talk.doomed && talk.unseen.is_none();
            if is_known && talk.said().pinned != summary.pinned {
                return wrong(format!("{} is pinned: {}, which nobody has asked for", summary.id, summary.pinned));
            }
            if is_gone {
                self.outline.expired += 1;
                // One that could not be removed is not shown any more, and may come back.
                talk.doomed = true;
                if is_sure {
                    self.gone.push(summary.id);
                    drop(self.talks.swap_remove(at));
                }
            }
        }
        Ok(())
    }
}
