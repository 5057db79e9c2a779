//! How does one side of a lane wait for the other? It looks at a shared counter for a moment, then sleeps until it is
//! rung. Who knows how long the last jobs took sleeps before it looks, for as long as the next one surely takes.
//!
//! Between looks the processor is offered to others: the kernel tends to wake both sides on one, and there a look that
//! kept it would cost its whole time. A processor that does not come back at once has other work, a job that outlasts a
//! look is not worth looking for: after either the next jobs are slept for at once, for the longer the more often it
//! happens (`tests/bench/round_trip.c`, RESULTS.md).

use rustix::io::Errno;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a side looks before it sleeps until it is rung.
const LOOK: Duration = Duration::from_micros(500);
/// What waking by the clock may take too long, and a job be shorter than the one before.
const EARLY: Duration = Duration::from_micros(250);
/// Waits that are slept for at once after a look in vain, at first and at most.
const ABSTINENCE: [u32; 2] = [16, 4096];

/// A counter that one side raises and the other waits for. Lies in shared memory, where each side may lie about its
/// part: who says that it sleeps is rung, who does not sees to it by itself.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Counter {
    value: AtomicU32,
    /// Not 0: who waits for it sleeps, or is about to.
    is_slept_for: AtomicU32,
}

impl Counter {
    /// What it was raised to last; what was written before that can be read then.
    pub(super) fn value(&self) -> u32 {
        self.value.load(Ordering::SeqCst)
    }

    /// Raises it, and rings who sleeps. With both sides in one order of all accesses, either this side sees that the
    /// other one sleeps, or the other one sees the value before it does.
    pub(super) fn raise(&self, value: u32, bell: BorrowedFd<'_>) {
        self.value.store(value, Ordering::SeqCst);
        if self.is_slept_for.load(Ordering::SeqCst) != 0 {
            ring(bell);
        }
    }

    /// To be called before the last look and the sleep that follows.
    pub(super) fn will_sleep(&self) {
        self.is_slept_for.store(1, Ordering::SeqCst);
    }

    /// To be called after a sleep.
    pub(super) fn is_awake(&self) {
        self.is_slept_for.store(0, Ordering::SeqCst);
    }
}

/// Rings a doorbell. A full counter means that it is rung.
pub(super) fn ring(bell: BorrowedFd<'_>) {
    let _rung = rustix::io::write(bell, &1u64.to_ne_bytes()).is_err();
}

/// Reads away that a doorbell was rung, and says whether it was.
pub(super) fn was_rung(bell: BorrowedFd<'_>) -> bool {
    !matches!(rustix::io::read(bell, &mut [0; 8]), Err(Errno::AGAIN | Errno::INTR))
}

/// Whether looking has been worth it lately.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// Waits that are slept for at once.
    abstains: u32,
    /// How many they were after the last look in vain, less what good ones have taken off.
    abstinence: u32,
}

impl Patience {
    /// Looks whether `is_done`, at most for the time of a look. `false` means that it is time to sleep.
    pub(super) fn look(&mut self, is_done: impl Fn() -> bool) -> bool {
        self.look_with(is_done, || {
            let began = Instant::now();
            rustix::thread::sched_yield();
            began.elapsed()
        })
    }

    /// As [`Self::look`]; `pause` offers the processor to others and says how long it was away.
    fn look_with(&mut self, is_done: impl Fn() -> bool, mut pause: impl FnMut() -> Duration) -> bool {
        if self.abstains > 0 {
            self.abstains -= 1;
            return is_done();
        }
        let mut looked = Duration::ZERO;
        while looked <= LOOK {
            if is_done() {
                self.abstinence /= 2;
                return true;
            }
            looked += pause();
        }
        self.abstinence = (self.abstinence * 4).clamp(ABSTINENCE[0], ABSTINENCE[1]);
        self.abstains = self.abstinence;
        is_done()
    }
}

/// How long the last two jobs took. Decoding steps are much alike, and to be woken by the other process costs more than
/// to wake by the clock shortly before it has an answer and look.
#[derive(Debug, Default)]
pub(super) struct Rhythm([Duration; 2]);

impl Rhythm {
    /// How long to sleep before the first look; `None` for jobs that are looked for at once.
    pub(super) fn nap(&self) -> Option<Duration> {
        let shorter = self.0[0].min(self.0[1]);
        (shorter > LOOK).then(|| shorter - EARLY)
    }

    /// A job took so long.
    pub(super) fn took(&mut self, time: Duration) {
        self.0 = [self.0[1], time];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_job_is_slept_for_as_long_as_the_shorter_of_the_last_two_took_less_what_waking_takes() {
        let mut rhythm = Rhythm::default();
        assert_eq!(rhythm.nap(), None);
        rhythm.took(MICRO * 4000);
        assert_eq!(rhythm.nap(), None, "one long job says little");
        rhythm.took(MICRO * 90_000);
        assert_eq!(rhythm.nap(), Some(MICRO * 3750));
        rhythm.took(MICRO * 4100);
        assert_eq!(rhythm.nap(), Some(MICRO * 3850));
        rhythm.took(MICRO * 100);
        assert_eq!(rhythm.nap(), None, "short jobs are looked for");
    }

    /// A look at a job that is done after `after`, with pauses of `pause`; whether it was seen, and the pauses made.
    fn look(patience: &mut Patience, after: Duration, pause: Duration) -> (bool, u32) {
        let (now, pauses) = (Cell::new(Duration::ZERO), Cell::new(0));
        let seen = patience.look_with(
            || now.get() >= after,
            || {
                now.set(now.get() + pause);
                pauses.set(pauses.get() + 1);
                pause
            },
        );
        (seen, pauses.get())
    }

    const MICRO: Duration = Duration::from_micros(1);

    #[test]
    fn short_jobs_are_always_looked_for() {
        let mut patience = Patience::default();
        assert!((0..100).all(|_| look(&mut patience, MICRO * 50, MICRO) == (true, 50)));
    }

    #[test]
    fn long_jobs_are_looked_for_ever_more_rarely() {
        let mut patience = Patience::default();
        let jobs = 100_000;
        let looked = (0..jobs).filter(|_| look(&mut patience, MICRO * 5000, MICRO).1 > 0).count();
        assert!((24..40).contains(&looked), "{looked} of {jobs}");
    }

    #[test]
    fn a_processor_that_is_taken_away_is_given_up_even_when_the_job_is_done_on_return() {
        let mut patience = Patience::default();
        assert_eq!(look(&mut patience, MICRO * 20, MICRO * 3000), (true, 1));
        let slept = (0..).take_while(|_| look(&mut patience, MICRO * 20, MICRO).1 == 0).count();
        assert_eq!(slept, 16);
        let looked = (0..1000).filter(|_| look(&mut patience, MICRO * 20, MICRO * 3000).1 > 0).count();
        assert!(looked <= 4, "{looked} of 1000");
    }

    #[test]
    fn a_calm_processor_is_trusted_again() {
        let mut patience = Patience::default();
        for _ in 0..5000 {
            look(&mut patience, MICRO * 20, MICRO * 3000);
        }
        for _ in 0..10_000 {
            look(&mut patience, MICRO * 20, MICRO);
        }
        assert_eq!(patience.abstinence, 0);
        assert_eq!(look(&mut patience, MICRO * 20, MICRO), (true, 20));
    }
}
