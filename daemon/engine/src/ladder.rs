//! What is tried next when a device fails? From a step run again to another device.
//!
//! Decides and does nothing: it is told what failed and when, and answers with the next rung. Steps are idempotent and
//! the daemon holds all tokens, so every rung up to another device costs time and nothing else.
//!
//! | fault | first | then | then |
//! |---|---|---|---|
//! | step, memory, cancelled | the step again | each sequence alone | that one sequence fails |
//! | caller | each sequence alone | that one sequence fails | |
//! | queue | a new queue, the step again | the device is opened again | |
//! | device | the device is opened again after a pause | after longer pauses | the next device |

use sparsed_backend::Fault;
use std::time::Duration;

/// How a lost device is treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Pauses before a lost device is opened again. After the last one the next device takes over; where there is none,
    /// the last pause repeats.
    pub backoff: Vec<Duration>,
    /// A device that was up for so long begins with the first pause again.
    pub forget: Duration,
    /// For how long all steps may fail before the engine counts as stuck.
    pub watchdog: Duration,
}

/// What is done about a step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepRung {
    /// The same step once more.
    Again,
    /// A new queue, and the same step on it.
    NewQueue,
    /// Each sequence of the step in a step of its own.
    Isolate,
    /// The sequence fails: it is alone in its step.
    GiveUp,
    /// The device is of no more use as it is.
    Lost,
}

/// What was tried for one step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepLadder {
    repeated: bool,
    queue_renewed: bool,
}

/// What is done about a device that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceRung {
    /// It is opened again.
    Reopen {
        /// After this pause.
        after: Duration,
    },
    /// Another one takes over.
    Failover {
        /// Its place in the order of preference.
        device: usize,
        /// After this pause.
        after: Duration,
    },
}

/// What was tried for the device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLadder {
    backoff: Vec<Duration>,
    forget: Duration,
    n_devices: usize,
    current: usize,
    /// Losses of the current device, failed openings included.
    n_losses: usize,
    up_since: Option<Duration>,
}

impl StepLadder {
    /// The next rung after `fault`. `alone`: the step carries one sequence.
    pub(crate) fn next(&mut self, fault: Fault, alone: bool) -> StepRung {
        let apart = if alone { StepRung::GiveUp } else { StepRung::Isolate };
        match fault {
            Fault::Device => StepRung::Lost,
            Fault::Queue if std::mem::replace(&mut self.queue_renewed, true) => StepRung::Lost,
            Fault::Queue => StepRung::NewQueue,
            Fault::Caller => apart,
            Fault::Step | Fault::Memory | Fault::Cancelled if std::mem::replace(&mut self.repeated, true) => apart,
            Fault::Step | Fault::Memory | Fault::Cancelled => StepRung::Again,
        }
    }
}

impl DeviceLadder {
    /// For `n_devices` in order of preference; the first is the current one.
    ///
    /// # Panics
    /// Without a device or a pause; the configuration has been checked.
    pub(crate) fn new(recovery: &Recovery, n_devices: usize) -> Self {
        assert!(n_devices > 0 && !recovery.backoff.is_empty(), "no device, or no pause");
        let (backoff, forget) = (recovery.backoff.clone(), recovery.forget);
        Self { backoff, forget, n_devices, current: 0, n_losses: 0, up_since: None }
    }

    /// The device in use, or to be opened next.
    pub(crate) fn current(&self) -> usize {
        self.current
    }

    /// The pause before a device that could not be used for long is tried again.
    pub(crate) fn longest_pause(&self) -> Duration {
        *self.backoff.last().expect("checked in new")
    }

    /// Device `device` is open and its models are loaded.
    pub(crate) fn up(&mut self, device: usize, now: Duration) {
        if device != self.current {
            (self.current, self.n_losses) = (device, 0);
        }
        self.up_since = Some(now);
    }

    /// The current device was lost, or could not be opened or loaded.
    pub(crate) fn lost(&mut self, fault: Fault, now: Duration) -> DeviceRung {
        if self.up_since.take().is_some_and(|since| now.saturating_sub(since) >= self.forget) {
            self.n_losses = 0;
        }
        // What was refused would be refused again, so nothing is gained by a pause where another device can go on.
        let pause = self.backoff.get(self.n_losses).filter(|_| fault != Fault::Caller || self.n_devices == 1);
        self.n_losses += 1;
        match pause {
            Some(&after) => DeviceRung::Reopen { after },
            None if self.n_devices == 1 => DeviceRung::Reopen { after: self.longest_pause() },
            None => {
                self.current = (self.current + 1) % self.n_devices;
                self.n_losses = 0;
                // All have been tried: not in a circle without rest.
                let after = if self.current == 0 { self.longest_pause() } else { Duration::ZERO };
                DeviceRung::Failover { device: self.current, after }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn ladder(n_devices: usize) -> DeviceLadder {
        let recovery = Recovery { backoff: vec![ms(1), ms(5), ms(30)], forget: ms(1000), watchdog: ms(60) };
        DeviceLadder::new(&recovery, n_devices)
    }

    #[test]
    fn each_fault_of_a_step_climbs_its_own_rungs() {
        use Fault::{Caller, Cancelled, Device, Memory, Queue, Step};
        use StepRung::{Again, GiveUp, Isolate, Lost, NewQueue};
        let table: [(bool, &[(Fault, StepRung)]); 9] = [
            (false, &[(Step, Again), (Step, Isolate)]),
            (true, &[(Step, Again), (Step, GiveUp)]),
            (false, &[(Memory, Again), (Memory, Isolate)]),
            (true, &[(Cancelled, Again), (Step, GiveUp)]),
            (false, &[(Caller, Isolate)]),
            (true, &[(Caller, GiveUp)]),
            (false, &[(Queue, NewQueue), (Queue, Lost)]),
            (false, &[(Queue, NewQueue), (Step, Again), (Step, Isolate)]),
            (true, &[(Step, Again), (Device, Lost)]),
        ];
        for (alone, history) in table {
            let mut ladder = StepLadder::default();
            for &(fault, rung) in history {
                assert_eq!(ladder.next(fault, alone), rung, "{history:?}, alone: {alone}");
            }
        }
    }

    #[test]
    fn a_device_is_opened_again_after_longer_and_longer_pauses() {
        let mut only = ladder(1);
        let pauses = [1, 5, 30, 30, 30].map(|after| DeviceRung::Reopen { after: ms(after) });
        assert_eq!(pauses.map(|_| only.lost(Fault::Device, ms(0))), pauses);
    }

    #[test]
    fn the_next_device_takes_over_after_the_last_pause_and_the_round_ends_with_a_rest() {
        let mut two = ladder(2);
        let reopen = |after| DeviceRung::Reopen { after: ms(after) };
        let failover = |device, after| DeviceRung::Failover { device, after: ms(after) };
        let rungs =
            [reopen(1), reopen(5), reopen(30), failover(1, 0), reopen(1), reopen(5), reopen(30), failover(0, 30)];
        assert_eq!(rungs.map(|_| two.lost(Fault::Device, ms(0))), rungs);
    }

    #[test]
    fn a_refused_device_is_not_waited_for_where_another_can_go_on() {
        assert_eq!(ladder(2).lost(Fault::Caller, ms(0)), DeviceRung::Failover { device: 1, after: ms(0) });
        assert_eq!(ladder(1).lost(Fault::Caller, ms(0)), DeviceRung::Reopen { after: ms(1) });
    }

    #[test]
    fn a_device_that_was_up_for_long_begins_at_the_first_pause_again() {
        let mut only = ladder(1);
        only.lost(Fault::Device, ms(0));
        only.up(0, ms(1));
        assert_eq!(only.lost(Fault::Device, ms(900)), DeviceRung::Reopen { after: ms(5) });
        only.up(0, ms(905));
        assert_eq!(only.lost(Fault::Device, ms(1905)), DeviceRung::Reopen { after: ms(1) });
    }

    #[test]
    fn the_preferred_device_has_all_its_rungs_when_it_comes_back() {
        let mut two = ladder(2);
        let last = (0..4).map(|_| two.lost(Fault::Device, ms(0))).last();
        assert_eq!(last, Some(DeviceRung::Failover { device: 1, after: ms(0) }));
        two.up(1, ms(0));
        two.up(0, ms(50));
        assert_eq!((two.lost(Fault::Device, ms(60)), two.current()), (DeviceRung::Reopen { after: ms(1) }, 0));
    }
}
