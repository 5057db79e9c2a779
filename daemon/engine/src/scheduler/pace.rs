//! How large may a step be, and how fast is work done? Measured times to numbers of tokens.
//!
//! While answers run, every token of a prompt in a step makes all of them wait: those of other models on the device,
//! too, which have a step each in turn. Where a time per token is wanted, the part of a step that reads prompts follows
//! the measured times of a round: down at once in proportion when it took longer, up by an eighth when one with a full
//! step took less. Without running answers a step reads as much as it can.
//!
//! Models that all read prompts have as much of a round each: who takes more shrinks, who takes less grows though the
//! round is full.
//!
//! Knows no clock: times are arguments.

use super::{Scheduler, count};
use std::time::Duration;

/// Least tokens of a prompt in a step: it gets on whatever the target.
const CHUNK_MIN: u32 = 8;
/// Part of the target that a step is to take: what varies from step to step stays below the target then, where a step
/// that takes just so long would be late half of the time.
const AIM: f64 = 0.9;
/// Weight of the newest step in a mean, 1 / 2^n.
const MEAN_SHIFT: f64 = 16.0;
/// Longest time that is asked to be waited, in seconds.
const RETRY_S_MAX: f64 = 600.0;

/// What other models do on the device between two steps of this one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Company {
    /// Answers that run.
    pub(crate) n_decodes: u32,
    /// The time of their last steps, together.
    pub(crate) time: Duration,
    /// Those whose last steps read prompts, and the part of the time that is theirs.
    n_readers: u32,
    reading: Duration,
}

/// The part of a step that reads prompts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Time that a round beside running answers is to take.
    aim: Option<Duration>,
    most: u32,
    chunk: u32,
}

impl Company {
    /// What both do, one after the other.
    pub(crate) fn with(self, other: Self) -> Self {
        Self {
            n_decodes: self.n_decodes + other.n_decodes,
            time: self.time + other.time,
            n_readers: self.n_readers + other.n_readers,
            reading: self.reading + other.reading,
        }
    }

    /// What all but one of them do.
    pub(crate) fn without(self, one: Self) -> Self {
        Self {
            n_decodes: self.n_decodes.saturating_sub(one.n_decodes),
            time: self.time.saturating_sub(one.time),
            n_readers: self.n_readers.saturating_sub(one.n_readers),
            reading: self.reading.saturating_sub(one.reading),
        }
    }

    /// The time that a step has beside them which reads prompts, where a round is to take `aim`: what they leave, and
    /// no less than those who read prompts as well are to have.
    fn leave(self, aim: Duration) -> Duration {
        let others = self.time.saturating_sub(self.reading);
        aim.saturating_sub(self.time).max(aim.saturating_sub(others) / (self.n_readers + 1))
    }
}

impl Scheduler {
    /// What this model does in a round, for the others: its last step took so long.
    pub(crate) fn as_company(&self, time: Duration) -> Company {
        if !self.has_work() {
            return Company::default();
        }
        let decodes = self.running.iter().filter(|sequence| sequence.is_ready() && sequence.n_pending() == 1);
        let reads = self.scheduled.iter().any(|&(_, n)| n > 1);
        let reading = if reads { time } else { Duration::ZERO };
        Company { n_decodes: count(decodes.count()), time, n_readers: u32::from(reads), reading }
    }

    /// Reckons with what the other models on the device do until the next step.
    pub(crate) fn run_beside(&mut self, company: Company) {
        self.company = company;
    }

    /// The last scheduled step took so long, all in all.
    pub(crate) fn took(&mut self, time: Duration) {
        let is_decode = |&&(_, n): &&(usize, u32)| n == 1;
        let n_decodes = count(self.scheduled.iter().filter(is_decode).count());
        let n_tokens: u32 = self.scheduled.iter().map(|&(_, n)| n).sum();
        self.pace.took(time, n_decodes, n_tokens - n_decodes, self.company);
        self.tally.step_sequences += self.scheduled.len() as u64;
        self.throughput.took(time, n_tokens);
        self.shares.took(time, n_tokens);
    }
}

impl Pace {
    /// At most `most` tokens; running answers are to have a token each `target`.
    pub(super) fn new(target: Option<Duration>, most: u32) -> Self {
        Self { aim: aim(target), most, chunk: most }
    }

    /// Keeps another time per token, or none.
    pub(super) fn set_target(&mut self, target: Option<Duration>) {
        self.aim = aim(target);
        if target.is_none() {
            self.chunk = self.most;
        }
    }

    /// Bounds the chunk while memory is short, or lifts that.
    pub(super) fn bound(&mut self, most: u32) {
        self.most = most;
        self.chunk = self.chunk.min(most);
        if self.aim.is_none() {
            self.chunk = most;
        }
    }

    /// Tokens of prompts that a step may carry while `n_decodes` answers run, whichever models'.
    pub(super) fn chunk(&self, n_decodes: u32) -> u32 {
        if n_decodes == 0 { self.most } else { self.chunk }
    }

    /// A step took so long, in which `n_decodes` answers ran and `n_prefill` tokens of prompts were read; in its round
    /// the other models did what `company` says.
    pub(super) fn took(&mut self, time: Duration, n_decodes: u32, n_prefill: u32, company: Company) {
        let Some(aim) = self.aim else { return };
        if n_decodes + company.n_decodes == 0 || n_prefill == 0 {
            return;
        }
        let own = company.leave(aim);
        if time > own {
            let ratio = own.as_secs_f64() / time.as_secs_f64();
            // Not below half at once: one late step says little.
            self.chunk = scaled(self.chunk, ratio.max(0.5)).max(CHUNK_MIN).min(self.most);
        } else if n_prefill >= self.chunk && time + time / 8 < own {
            self.chunk = (self.chunk + (self.chunk / 8).max(1)).min(self.most);
        }
    }
}

/// How fast work is done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throughput {
    tokens_per_s: f64,
    /// Tokens of an answer.
    answer_tokens: f64,
}

impl Throughput {
    /// A step computed `n_tokens`.
    pub(super) fn took(&mut self, time: Duration, n_tokens: u32) {
        let seconds = time.as_secs_f64();
        if seconds > 0.0 {
            towards(&mut self.tokens_per_s, f64::from(n_tokens) / seconds);
        }
    }

    /// An answer is at its end.
    pub(super) fn answered(&mut self, n_tokens: u32) {
        towards(&mut self.answer_tokens, f64::from(n_tokens));
    }

    /// Tokens in a second, lately; 0 before the first step.
    pub(super) fn tokens_per_s(&self) -> f64 {
        self.tokens_per_s
    }

    /// Seconds until one of `n_waiting` requests with `n_pending` tokens of prompts together has been answered, where
    /// `share` owners have a part of the device.
    pub(super) fn retry_after_s(&self, n_waiting: u32, n_pending: u64, share: u32) -> u32 {
        if self.tokens_per_s <= 0.0 {
            return 1;
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let each = n_pending as f64 / f64::from(n_waiting.max(1)) + self.answer_tokens;
        let seconds = (each * f64::from(share.max(1)) / self.tokens_per_s).ceil().clamp(1.0, RETRY_S_MAX);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 1 ..= 600")]
        let whole = seconds as u32;
        whole
    }
}

/// Moves a mean; the first value is taken as it is.
fn towards(mean: &mut f64, value: f64) {
    *mean += if *mean == 0.0 { value } else { (value - *mean) / MEAN_SHIFT };
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a u32")]
fn scaled(n: u32, ratio: f64) -> u32 {
    (f64::from(n) * ratio.clamp(0.0, 1.0)) as u32
}

fn aim(target: Option<Duration>) -> Option<Duration> {
    target.map(|target| target.mul_f64(AIM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Leaves, Limits};
    use crate::testing::{Bench, Listener, VOCAB, VOCABULARY, limits, prompt};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Steps on a device that takes `base` + `each` us for a token of a prompt, a tenth more or less; answers the
    /// share of the last 200 of 400 steps that were late, and the chunk at the end.
    fn run(pace: &mut Pace, base: u64, each: u64) -> (u32, u32) {
        let (mut random, mut late) = (ChaCha8Rng::seed_from_u64(7), 0);
        for step in 0..400 {
            let n = pace.chunk(4);
            let us = (base + each * u64::from(n)) * (900 + u64::from(random.next_u32() % 201)) / 1000;
            let time = Duration::from_micros(us);
            late += u32::from(step >= 200 && time > ms(100));
            pace.took(time, 4, n, Company::default());
        }
        (late, pace.chunk(4))
    }

    #[test]
    fn a_chunk_is_as_large_as_the_target_allows() {
        let mut pace = Pace::new(Some(ms(100)), 256);
        let (late, chunk) = run(&mut pace, 20_000, 1000);
        assert!(late <= 4 && (55..=85).contains(&chunk), "{late} late steps, {chunk} tokens");
    }

    #[test]
    fn a_slower_device_shrinks_the_chunk_and_a_faster_one_lets_it_grow() {
        let mut pace = Pace::new(Some(ms(100)), 256);
        let before = run(&mut pace, 20_000, 1000).1;
        let (late, halved) = run(&mut pace, 40_000, 2000);
        assert!(late <= 4 && (20..=before / 2).contains(&halved), "{late} late steps, {halved} of {before} tokens");
        assert_eq!(run(&mut pace, 1000, 10).1, 256);
        // Nothing helps a device that is too slow without prompts.
        assert_eq!(run(&mut pace, 500_000, 1000).1, CHUNK_MIN);
    }

    #[test]
    fn without_a_target_or_running_answers_a_step_is_full() {
        let mut pace = Pace::new(None, 256);
        pace.took(ms(9999), 4, 256, Company::default());
        assert_eq!(pace.chunk(4), 256);
        let mut pace = Pace::new(Some(ms(1)), 256);
        pace.took(ms(9999), 4, 256, Company::default());
        assert_eq!((pace.chunk(0), pace.chunk(1)), (256, 128));
        pace.bound(64);
        assert_eq!((pace.chunk(0), pace.chunk(1)), (64, 64));
    }

    /// A step of a model on a device that takes 10 ms, and one for each token; answers its time.
    fn step(bench: &mut Bench) -> Duration {
        let (scheduler, now) = (&mut bench.scheduler, bench.now.get());
        scheduler.tend(now);
        if !scheduler.schedule(&mut bench.batch, now) {
            return Duration::ZERO;
        }
        scheduler.computed(&[], now);
        let sampled = scheduler.take_sampled();
        let at_end = |&index: &usize| scheduler.advance(index, &mut [0.0; VOCAB], VOCABULARY, now);
        let leaving: Vec<_> = sampled.into_iter().filter(at_end).map(|index| (index, Leaves::ForGood)).collect();
        let time = ms(10 + bench.batch.n_tokens() as u64);
        scheduler.took(time);
        scheduler.finish(&leaving, now);
        scheduler.tend(now);
        time
    }

    /// A step of each model, as the engine has them.
    fn round(models: &mut [Bench; 2], times: &mut [Duration; 2]) -> Duration {
        let own = [0, 1].map(|model| models[model].scheduler.as_company(times[model]));
        let all = own[0].with(own[1]);
        for (model, bench) in models.iter_mut().enumerate() {
            bench.scheduler.run_beside(all.without(own[model]));
            times[model] = step(bench);
        }
        times.iter().sum()
    }

    #[test]
    fn answers_keep_their_time_beside_another_models_long_prompts_which_are_read_in_full_steps_without_them() {
        let limits = Limits { max_batched_tokens: 256, tpot_target: Some(ms(100)), max_waiting: 100, ..limits() };
        let mut models = [Bench::new(32, limits), Bench::new(32, limits)];
        let listener = Listener::with_room(1000);
        models[0].submit(prompt(1, 4), 60, &listener);
        (0..40).for_each(|seed| models[1].submit(prompt(seed, 390), 1, &Listener::with_room(10)));
        let (mut times, mut rounds) = ([Duration::ZERO; 2], Vec::new());
        while listener.heard().1.is_none() {
            rounds.push(round(&mut models, &mut times));
        }
        assert_eq!(rounds.len(), 60);
        assert!(rounds[5..].iter().all(|&round| (ms(60)..ms(100)).contains(&round)), "{rounds:?}");
        let alone: Vec<_> = (0..5).map(|_| round(&mut models, &mut times)).collect();
        assert!(alone.contains(&ms(10 + 256)), "{alone:?}");
    }

    /// Rounds of two models that read so many tokens of prompts in a step at most, each step 10 ms and one for each
    /// token; answers the time of the last one.
    fn read_both(paces: &mut [Pace; 2], wanted: [u32; 2], n_rounds: u32) -> Duration {
        let mut did = [Company::default(); 2];
        for _ in 0..n_rounds {
            let before = did;
            for (model, pace) in paces.iter_mut().enumerate() {
                let n = pace.chunk(2).min(wanted[model]);
                let time = ms(10 + u64::from(n));
                pace.took(time, 1, n, before[0].with(before[1]).without(before[model]));
                did[model] = Company { n_decodes: 1, time, n_readers: 1, reading: time };
            }
        }
        did[0].time + did[1].time
    }

    #[test]
    fn two_models_that_read_prompts_come_to_have_about_as_much_of_a_round_each_whoever_had_all_of_it() {
        let new = || Pace::new(Some(ms(100)), 256);
        for (chunks, first) in [([256; 2], [256, 12]), ([256; 2], [12, 256]), ([62, 8], [256; 2]), ([8; 2], [256; 2])] {
            let mut paces = [new(), new()];
            [paces[0].chunk, paces[1].chunk] = chunks;
            read_both(&mut paces, first, 40);
            let round = read_both(&mut paces, [256, 256], 100);
            let [a, b] = paces.map(|pace| pace.chunk(2));
            assert!(a.min(b) * 2 >= a.max(b), "{chunks:?}, {first:?}: {a} and {b} tokens");
            assert!((ms(75)..ms(100)).contains(&round), "{chunks:?}, {first:?}: {round:?}");
        }
    }

    #[test]
    fn the_end_of_a_prompt_in_a_round_that_others_made_long_is_no_reason_to_read_less() {
        let mut pace = Pace::new(Some(ms(100)), 64);
        let other = Company { n_decodes: 1, time: ms(80), n_readers: 1, reading: ms(80) };
        pace.took(ms(22), 1, 12, other);
        assert_eq!(pace.chunk(1), 64);
        // What only answers take is not to be divided.
        pace.took(ms(74), 1, 64, Company { n_readers: 0, reading: ms(0), ..other });
        assert_eq!(pace.chunk(1), 32);
    }

    #[test]
    fn who_is_told_to_wait_is_told_how_long_one_request_takes() {
        let mut throughput = Throughput::default();
        assert_eq!(throughput.retry_after_s(4, 4000, 1), 1, "nothing is known yet");
        throughput.took(ms(1000), 100);
        throughput.answered(200);
        assert_eq!(throughput.retry_after_s(4, 4000, 1), 12);
        assert_eq!(throughput.retry_after_s(4, 4000, 3), 36);
        assert_eq!(throughput.retry_after_s(1, 1 << 40, 1), 600);
    }
}
