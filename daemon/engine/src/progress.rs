//! Does the engine get anywhere? What the service's watchdog is fed by.
//!
//! It does while steps are done, while there is nothing to do, and while a model is put on the device. It does not when
//! for the watchdog's time every step has failed, no device could be had, or one call has not come back. The call that
//! compiles a model has longer: a device may read all weights in it, from a disk that is slow, and have steps of other
//! models between, which take half of its time.
//!
//! Knows no clock: time is an argument.

use sparsed_backend::compile_time;
use std::time::Duration;

/// What the engine has told of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    limit: Duration,
    doing: Doing,
    /// When all was well for the last time.
    sound: Duration,
    /// The last failure since then.
    failed: Option<Duration>,
    /// The last sign of an upload that is going on.
    upload: Option<Duration>,
    /// How much longer than the limit the next sign may take, where a compilation is what comes next.
    compile: Option<Duration>,
    /// When the step began that is under way.
    step: Option<Duration>,
    /// What steps of others have taken since the compilation began.
    beside: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Nothing: there are no requests, or all wait for their listeners.
    Idle,
    /// Steps.
    Stepping,
    /// It has no usable device.
    Recovering,
}

impl Progress {
    pub(crate) fn new(limit: Duration) -> Self {
        let (doing, sound, beside) = (Doing::Idle, Duration::ZERO, Duration::ZERO);
        Self { limit, doing, sound, failed: None, upload: None, compile: None, step: None, beside }
    }

    /// A usable device has nothing to do.
    pub(crate) fn idle(&mut self, now: Duration) {
        if self.doing == Doing::Recovering {
            (self.sound, self.failed) = (now, None);
        }
        self.doing = Doing::Idle;
    }

    /// A step is about to run.
    pub(crate) fn stepping(&mut self, now: Duration) {
        let is_failing = self.failed.is_some_and(|at| now.saturating_sub(at) < self.limit);
        if self.doing == Doing::Idle && !is_failing {
            (self.sound, self.failed) = (now, None);
        }
        (self.doing, self.step) = (Doing::Stepping, Some(now));
    }

    /// A step was done for at least one sequence.
    pub(crate) fn done(&mut self, now: Duration) {
        (self.sound, self.failed) = (now, None);
        self.stepped(now);
    }

    /// A step failed for all its sequences.
    pub(crate) fn failed(&mut self, now: Duration) {
        self.failed = Some(now);
        self.stepped(now);
    }

    fn stepped(&mut self, now: Duration) {
        let began = self.step.take().unwrap_or(now);
        if self.compile.is_some() {
            self.beside += now.saturating_sub(began);
        }
    }

    /// The device is lost, or could not be had.
    pub(crate) fn lost(&mut self, now: Duration) {
        self.stepping(now);
        self.failed(now);
        (self.doing, self.upload, self.compile) = (Doing::Recovering, None, None);
    }

    /// Nothing steps any more: the device is being let go of, which waits for the end of a compilation on it.
    pub(crate) fn letting_go(&mut self) {
        if self.doing == Doing::Stepping {
            self.doing = Doing::Recovering;
        }
    }

    /// A weight has been uploaded: the time from the first to the last is not counted, however long it takes.
    pub(crate) fn uploading(&mut self, now: Duration) {
        let since = self.upload.replace(now).unwrap_or(now);
        // Steps of others may have been done since.
        self.sound = now.min(self.sound + now.saturating_sub(since));
        self.compile = None;
    }

    /// All weights are uploaded, `bytes` of them; the device compiles, and there is no sign of it until it has. What
    /// others compute meanwhile is none, but keeps the device from it: as long again as it may take, at most.
    pub(crate) fn compiling(&mut self, bytes: u64, now: Duration) {
        self.uploading(now);
        (self.compile, self.beside) = (Some(compile_time(bytes)), Duration::ZERO);
    }

    /// The model is on the device, or will not be.
    pub(crate) fn uploaded(&mut self, now: Duration) {
        if self.upload.is_some() {
            self.uploading(now);
        }
        self.upload = None;
    }

    /// Whether steps run, or would if there were a device.
    pub(crate) fn is_stepping(&self) -> bool {
        self.doing != Doing::Idle
    }

    /// Whether the watchdog may be fed.
    pub(crate) fn is_alive(&self, now: Duration) -> bool {
        let within = |since: Duration| now.saturating_sub(since) < self.limit;
        if let (Some(began), Some(longer)) = (self.upload, self.compile) {
            let was_sound = self.doing == Doing::Idle || began.saturating_sub(self.sound) < self.limit;
            // A step is as long as ever, whatever is compiled beside it.
            let steps_end = self.doing != Doing::Stepping || within(self.sound.max(began));
            let longer = longer + self.beside.min(longer);
            return was_sound && steps_end && now.saturating_sub(began) < self.limit + longer;
        }
        match (self.doing, self.failed) {
            (Doing::Idle, None) => true,
            // Requests that come and fail, one after another: idle only in between.
            (Doing::Idle, Some(failed)) => !within(failed) || failed.saturating_sub(self.sound) < self.limit,
            (Doing::Stepping | Doing::Recovering, _) => match self.upload {
                Some(last) => within(last) && last.saturating_sub(self.sound) < self.limit,
                None => within(self.sound),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn progress() -> Progress {
        Progress::new(s(60))
    }

    #[test]
    fn an_idle_engine_is_alive_for_ever() {
        let mut progress = progress();
        progress.idle(s(0));
        assert!(progress.is_alive(s(1_000_000)));
        progress.stepping(s(1_000_000));
        assert!(progress.is_alive(s(1_000_001)), "it has only just begun");
    }

    #[test]
    fn a_call_that_does_not_come_back_is_no_life() {
        let mut progress = progress();
        progress.stepping(s(10));
        assert!(progress.is_alive(s(69)) && !progress.is_alive(s(70)));
        progress.done(s(71));
        assert!(progress.is_alive(s(100)));
    }

    #[test]
    fn an_engine_without_a_device_is_alive_for_the_watchdogs_time() {
        let mut progress = progress();
        progress.idle(s(0));
        for now in [1000, 1001, 1006, 1036] {
            progress.lost(s(now));
        }
        assert!(progress.is_alive(s(1059)) && !progress.is_alive(s(1060)));
        progress.idle(s(1070)); // a device at last
        assert!(progress.is_alive(s(1070)));
    }

    #[test]
    fn devices_that_come_back_only_to_fail_at_once_are_no_life() {
        let mut progress = progress();
        for now in (0..100).step_by(10) {
            progress.stepping(s(now));
            progress.lost(s(now + 1));
        }
        assert!(!progress.is_alive(s(99)));
    }

    #[test]
    fn devices_that_take_their_weights_only_to_fail_are_no_life_not_even_meanwhile() {
        let mut progress = progress();
        progress.stepping(s(0));
        for now in (0..200).step_by(20) {
            progress.lost(s(now));
            progress.uploading(s(now + 10));
            progress.uploading(s(now + 15));
        }
        assert!(!progress.is_alive(s(196)), "five of twenty seconds are uploads, the others are not");
    }

    #[test]
    fn requests_that_all_fail_are_no_life_though_the_engine_rests_between_them() {
        let mut progress = progress();
        for now in (100..170).step_by(5) {
            progress.stepping(s(now));
            progress.failed(s(now));
            progress.idle(s(now));
        }
        assert!(!progress.is_alive(s(170)));
        assert!(progress.is_alive(s(300)), "nobody has asked for a long time");
        progress.stepping(s(301));
        progress.done(s(302));
        progress.idle(s(302));
        assert!(progress.is_alive(s(303)));
    }

    #[test]
    fn one_request_that_fails_harms_nothing() {
        let mut progress = progress();
        for now in [100, 1000] {
            progress.stepping(s(now));
            progress.failed(s(now));
            progress.idle(s(now));
            assert!([0, 30, 59, 60, 500].iter().all(|&later| progress.is_alive(s(now + later))));
        }
    }

    #[test]
    fn a_compilation_may_take_as_long_as_a_slow_disk_needs_for_its_weights_and_one_that_hangs_is_found() {
        const GIB: u64 = 1 << 30;
        let longer = compile_time(GIB).as_secs();
        for begin in [Progress::lost, Progress::idle] {
            let mut progress = progress();
            begin(&mut progress, s(0));
            progress.uploading(s(10));
            progress.compiling(GIB, s(20));
            assert!(progress.is_alive(s(79 + longer)) && !progress.is_alive(s(80 + longer)));
            // Answers of other models are no sign of it.
            progress.stepping(s(80 + longer));
            progress.done(s(80 + longer));
            assert!(!progress.is_alive(s(80 + longer)));
            progress.uploaded(s(81 + longer));
            assert!(progress.is_alive(s(82 + longer)));
        }
    }

    #[test]
    fn a_step_that_does_not_come_back_is_no_life_though_a_compilation_may_still_take_long() {
        let mut progress = progress();
        progress.stepping(s(0));
        progress.done(s(1));
        progress.compiling(1 << 40, s(50));
        assert!(progress.is_alive(s(109)) && !progress.is_alive(s(110)), "one that began before it");
        progress.done(s(70));
        progress.idle(s(70));
        assert!(progress.is_alive(s(1000)), "nobody asks for anything");
        progress.stepping(s(1000));
        assert!(progress.is_alive(s(1059)) && !progress.is_alive(s(1060)));
    }

    #[test]
    fn a_device_that_is_lost_is_let_go_of_for_as_long_as_a_compilation_on_it_may_take() {
        let longer = compile_time(1 << 30).as_secs();
        let mut progress = progress();
        progress.compiling(1 << 30, s(0));
        progress.stepping(s(10));
        progress.letting_go();
        assert!(progress.is_alive(s(59 + longer)) && !progress.is_alive(s(60 + longer)));
        progress.uploaded(s(200));
        progress.lost(s(200));
        assert!(progress.is_alive(s(259)) && !progress.is_alive(s(270)));
    }

    #[test]
    fn a_compilation_may_take_longer_by_the_steps_that_others_do_beside_it_but_no_more_than_twice_as_long() {
        let longer = compile_time(1 << 30).as_secs();
        for (n_steps, beside) in [(0, 0), (30, 60), (longer, longer)] {
            let mut progress = progress();
            progress.compiling(1 << 30, s(0));
            for step in 0..n_steps {
                progress.stepping(s(2 * step));
                progress.done(s(2 * step + 2));
            }
            progress.idle(s(2 * n_steps));
            let end = 60 + longer + beside;
            assert!(progress.is_alive(s(end - 1)) && !progress.is_alive(s(end)), "{n_steps} steps");
        }
    }

    #[test]
    fn the_time_of_a_compilation_is_not_counted_and_lends_nothing_to_what_follows() {
        let mut progress = progress();
        progress.lost(s(0));
        progress.uploading(s(0));
        progress.compiling(1 << 30, s(0));
        progress.uploading(s(300));
        assert!(progress.is_alive(s(359)) && !progress.is_alive(s(360)));
    }

    #[test]
    fn an_engine_that_had_nothing_to_do_for_long_may_compile_and_is_alive_when_it_has() {
        let mut progress = progress();
        progress.idle(s(0));
        progress.compiling(0, s(1000));
        assert!(progress.is_alive(s(1059)) && !progress.is_alive(s(1060)));
        progress.stepping(s(1001)); // somebody else's, and nothing after it
        progress.done(s(1002));
        progress.uploaded(s(1059));
        assert!(progress.is_alive(s(1060)) && !progress.is_alive(s(1119)), "no more than the limit is lent");
    }

    #[test]
    fn devices_that_compile_only_to_fail_are_no_life_not_even_meanwhile() {
        let mut progress = progress();
        progress.stepping(s(0));
        for now in (0..200).step_by(20) {
            progress.lost(s(now));
            progress.compiling(1 << 40, s(now + 19));
        }
        assert!(!progress.is_alive(s(200)));
    }

    #[test]
    fn a_long_upload_is_progress_and_a_stuck_one_is_not() {
        let mut progress = progress();
        progress.lost(s(0));
        for now in (10..300).step_by(10) {
            progress.uploading(s(now));
        }
        assert!(progress.is_alive(s(349)) && !progress.is_alive(s(360)));
        progress.uploading(s(300));
        progress.uploaded(s(300));
        progress.stepping(s(300));
        assert!(progress.is_alive(s(340)), "ten seconds of it were no upload");
        assert!(!progress.is_alive(s(350)));
    }
}
