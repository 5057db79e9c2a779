//! When do the doors look around? Together: a box that nobody asks anything is woken once for all of them.
//!
//! A beat is a multiple of five seconds on the kernel's clock, and who waits for it has a timer of the kernel's. For
//! one of tokio's a thread gets up three times: its wheel has slots of 4 s, 64 ms and 1 ms, and a time that is seconds
//! ahead is moved from one to the next.

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use std::io::ErrorKind;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;

/// Time between beats.
pub(crate) const BEAT: Duration = Duration::from_secs(5);

/// Whoever waits for beats.
#[derive(Debug)]
pub(crate) struct Beat {
    /// A timer's file, which is read as a pipe is. None where the process may have no more files.
    timer: Option<Receiver>,
    seconds: i64,
}

impl Beat {
    /// Waits for each `n`th beat only, the same ones for all with this number. Within a runtime.
    pub(crate) fn every(n: u32) -> Self {
        let seconds = i64::try_from(BEAT.as_secs()).unwrap_or(i64::MAX).saturating_mul(n.max(1).into());
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC);
        let timer = timer.map_err(std::io::Error::from).and_then(Receiver::from_owned_fd_unchecked);
        if let Err(error) = &timer {
            log::debug!(reason:% = error; "no timer of the kernel's");
        }
        Self { timer: timer.ok(), seconds }
    }

    /// Resolves at the next beat.
    pub(crate) async fn next(&self) {
        let now = clock_gettime(ClockId::Monotonic).tv_sec;
        let at = beat_after(now, self.seconds);
        let has_come = match &self.timer {
            Some(timer) => expire(timer, at).await.is_ok(),
            None => false,
        };
        if !has_come {
            tokio::time::sleep(Duration::from_secs((at - now).unsigned_abs())).await;
        }
    }
}

/// Resolves at the second `at`.
async fn expire(timer: &Receiver, at: i64) -> std::io::Result<()> {
    let it_value = Timespec { tv_sec: at, tv_nsec: 0 };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &once)?;
    loop {
        timer.readable().await?;
        match timer.try_read(&mut [0; 8]) {
            // What was there for a read was the time before.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read.map(drop),
        }
    }
}

/// The first multiple of `period` after the second `now`.
fn beat_after(now: i64, period: i64) -> i64 {
    (now / period + 1) * period
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_the_same_beat_is_woken_at_the_same_time() {
        assert_eq!([0, 1, 4].map(|now| beat_after(now, 5)), [5; 3]);
        assert_eq!([5, 9].map(|now| beat_after(now, 5)), [10; 2]);
        assert_eq!([0, 5, 9, 10].map(|now| beat_after(now, 10)), [10, 10, 10, 20]);
    }

    #[tokio::test]
    async fn a_timer_expires_when_its_second_has_come_and_again() {
        let beat = Beat::every(1);
        let timer = beat.timer.as_ref().unwrap();
        let now = clock_gettime(ClockId::Monotonic).tv_sec;
        expire(timer, now + 1).await.unwrap();
        assert!(clock_gettime(ClockId::Monotonic).tv_sec > now);
        // A second that is over does not wait, and the one before does not count for the next.
        expire(timer, 1).await.unwrap();
        expire(timer, now + 2).await.unwrap();
        assert!(clock_gettime(ClockId::Monotonic).tv_sec > now + 1);
    }
}
