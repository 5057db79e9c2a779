//! Does the pool take in the same rows again and again? Then fewer sequences run at a time.
//!
//! Rows that a sequence had before and lost, computed or restored again, are work for nothing. Where they are more
//! than half of a window's work, half as many sequences may run; when they are less than a fifth, one more.
//!
//! Knows no clock: times are arguments.

use std::time::Duration;

/// How long work is counted before it is judged.
const WINDOW: Duration = Duration::from_secs(5);
/// Tokens in a window below which nothing is said.
const TOKENS_MIN: u64 = 256;

/// Work of a window, and what follows from the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thrash {
    /// As configured.
    most: u32,
    running_max: u32,
    begun: Duration,
    new: u64,
    again: u64,
}

impl Thrash {
    pub(crate) fn new(running_max: u32) -> Self {
        Self { most: running_max, running_max, begun: Duration::ZERO, new: 0, again: 0 }
    }

    /// Most sequences that may run.
    pub(crate) fn running_max(&self) -> u32 {
        self.running_max
    }

    /// Tokens came into the pool: `new` ones, and such as were there before.
    pub(crate) fn note(&mut self, new: u32, again: u32) {
        self.new += u64::from(new);
        self.again += u64::from(again);
    }

    /// Judges the window if it is over; answers tokens that were new and not, when `running` sequences are too many or
    /// more of them may run again.
    pub(crate) fn judge(&mut self, running: u32, now: Duration) -> Option<(u64, u64)> {
        if now.saturating_sub(self.begun) < WINDOW {
            return None;
        }
        let (new, again, before) = (self.new, self.again, self.running_max);
        (self.begun, self.new, self.again) = (now, 0, 0);
        if again >= TOKENS_MIN && again > new {
            self.running_max = (before.min(running) / 2).max(1);
        } else if again * 4 <= new {
            self.running_max = (before + 1).min(self.most);
        }
        (self.running_max != before).then_some((new, again))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn work_that_is_done_again_lets_fewer_run_and_ends_when_it_is_not() {
        let mut thrash = Thrash::new(16);
        let mut caps = Vec::new();
        for window in 1..=10 {
            let (new, again) = if window <= 4 { (500, 900) } else { (900, 10) };
            thrash.note(new, again);
            thrash.judge(thrash.running_max(), s(5 * window));
            caps.push(thrash.running_max());
        }
        assert_eq!(caps, [8, 4, 2, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn little_work_says_nothing_and_nothing_is_judged_early() {
        let mut thrash = Thrash::new(16);
        thrash.note(0, 255);
        assert_eq!((thrash.judge(16, s(4)), thrash.judge(16, s(5))), (None, None));
        thrash.note(100, 300);
        assert_eq!((thrash.judge(16, s(9)), thrash.judge(16, s(10))), (None, Some((100, 300))));
    }
}
