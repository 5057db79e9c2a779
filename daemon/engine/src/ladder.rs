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
//!
//! A step that fails for all its sequences may be the device's fault, though it does not say so. Then the device is
//! examined, and so many such steps within a time ([`Conduct`]) are its fault: the next device takes over, and whether
//! that one can compute them says who was to blame.

use sparsed_backend::Fault;
use std::collections::VecDeque;
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
    /// So many steps that fail for all their sequences within [`Self::step_window`] are a fault of the device. At least
    /// 2: on the last device one ends its sequences, so that a step that none can compute does not go on for ever.
    pub step_failures: u32,
    /// How long such a step counts.
    pub step_window: Duration,
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

/// How a device behaves that fails at steps and does not call itself lost: when steps failed for all their sequences.
#[derive(Clone, Debug)]
pub(crate) struct Conduct {
    limit: usize,
    window: Duration,
    has_alternative: bool,
    /// The last device was opened again for such a step, and has not computed any since.
    had_second_chance: bool,
    failures: VecDeque<Duration>,
}

/// Who is to blame for a step that fails for all its sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// That is open: the step is tried again.
    Open,
    /// The sequences, as far as can be known: they fail.
    Sequences,
    /// The device, after so many such steps.
    Device(usize),
}

impl Conduct {
    /// # Panics
    /// With a limit below 2; the configuration has been checked.
    pub(crate) fn new(recovery: &Recovery) -> Self {
        assert!(recovery.step_failures > 1, "one failed step is the step's own");
        let (limit, window) = (recovery.step_failures as usize, recovery.step_window);
        Self { limit, window, has_alternative: false, had_second_chance: false, failures: VecDeque::new() }
    }

    /// A device has been opened; `has_alternative`: another one can take its place.
    pub(crate) fn begin(&mut self, has_alternative: bool) {
        self.has_alternative = has_alternative;
        self.failures.clear();
    }

    /// A call computed something.
    pub(crate) fn well(&mut self) {
        self.had_second_chance = false;
    }

    /// A step failed for all its sequences; `is_call`: the calls failed or took too long, not what they computed. Where
    /// another device can take over none of them need fail: it will compute them, unless they are to blame. The last
    /// device may be slow or broken in a way that being opened again mends, once.
    pub(crate) fn failed(&mut self, is_call: bool, now: Duration) -> Blame {
        self.failures.retain(|&at| now.saturating_sub(at) < self.window);
        self.failures.push_back(now);
        match self.failures.len() {
            n if n >= self.limit => {
                self.failures.clear();
                Blame::Device(n)
            }
            _ if self.has_alternative => Blame::Open,
            n if is_call && !std::mem::replace(&mut self.had_second_chance, true) => Blame::Device(n),
            _ => Blame::Sequences,
        }
    }
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

    /// The current device was lost, or could not be opened or loaded. `is_lasting`: it would be the same again.
    pub(crate) fn lost(&mut self, is_lasting: bool, now: Duration) -> DeviceRung {
        if self.up_since.take().is_some_and(|since| now.saturating_sub(since) >= self.forget) {
            self.n_losses = 0;
        }
        // Nothing is gained by a pause then, where another device can go on.
        let pause = self.backoff.get(self.n_losses).filter(|_| !is_lasting || self.n_devices == 1);
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
        DeviceLadder::new(&recovery(), n_devices)
    }

    fn recovery() -> Recovery {
        let backoff = vec![ms(1), ms(5), ms(30)];
        Recovery { backoff, forget: ms(1000), watchdog: ms(60), step_failures: 3, step_window: ms(100) }
    }

    #[test]
    fn steps_that_fail_for_all_are_the_devices_fault_when_they_are_many_within_the_time() {
        for (has_alternative, few) in [(true, Blame::Open), (false, Blame::Sequences)] {
            let mut conduct = Conduct::new(&recovery());
            conduct.begin(has_alternative);
            let answers = [0, 50, 100, 149, 150, 160].map(|now| conduct.failed(false, ms(now)));
            // At 100 the first one counts no more; at 149 there are three, and the count begins again.
            assert_eq!(answers, [few, few, few, Blame::Device(3), few, few]);
            conduct.begin(has_alternative);
            assert_eq!(conduct.failed(false, ms(161)), few);
        }
    }

    #[test]
    fn the_last_device_is_opened_again_once_for_calls_that_fail_and_not_for_what_they_compute() {
        let mut conduct = Conduct::new(&recovery());
        conduct.begin(false);
        assert_eq!(conduct.failed(true, ms(0)), Blame::Device(1));
        conduct.begin(false);
        assert_eq!(conduct.failed(true, ms(1)), Blame::Sequences, "nothing was computed since");
        conduct.well();
        conduct.begin(false);
        assert_eq!([false, true].map(|is_call| conduct.failed(is_call, ms(2))), [Blame::Sequences, Blame::Device(2)]);
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
        assert_eq!(pauses.map(|_| only.lost(false, ms(0))), pauses);
    }

    #[test]
    fn the_next_device_takes_over_after_the_last_pause_and_the_round_ends_with_a_rest() {
        let mut two = ladder(2);
        let reopen = |after| DeviceRung::Reopen { after: ms(after) };
        let failover = |device, after| DeviceRung::Failover { device, after: ms(after) };
        let rungs =
            [reopen(1), reopen(5), reopen(30), failover(1, 0), reopen(1), reopen(5), reopen(30), failover(0, 30)];
        assert_eq!(rungs.map(|_| two.lost(false, ms(0))), rungs);
    }

    #[test]
    fn a_refused_device_is_not_waited_for_where_another_can_go_on() {
        assert_eq!(ladder(2).lost(true, ms(0)), DeviceRung::Failover { device: 1, after: ms(0) });
        assert_eq!(ladder(1).lost(true, ms(0)), DeviceRung::Reopen { after: ms(1) });
    }

    #[test]
    fn a_device_that_was_up_for_long_begins_at_the_first_pause_again() {
        let mut only = ladder(1);
        only.lost(false, ms(0));
        only.up(0, ms(1));
        assert_eq!(only.lost(false, ms(900)), DeviceRung::Reopen { after: ms(5) });
        only.up(0, ms(905));
        assert_eq!(only.lost(false, ms(1905)), DeviceRung::Reopen { after: ms(1) });
    }

    #[test]
    fn the_preferred_device_has_all_its_rungs_when_it_comes_back() {
        let mut two = ladder(2);
        let last = (0..4).map(|_| two.lost(false, ms(0))).last();
        assert_eq!(last, Some(DeviceRung::Failover { device: 1, after: ms(0) }));
        two.up(1, ms(0));
        two.up(0, ms(50));
        assert_eq!((two.lost(false, ms(60)), two.current()), (DeviceRung::Reopen { after: ms(1) }, 0));
    }
}
