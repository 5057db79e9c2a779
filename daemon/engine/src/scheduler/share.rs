//! How much of a step may each owner have? So much that its answers are as fast as on a device that is its own for its
//! part of the time.
//!
//! A step costs something as such, for all the weights that are read, and something for each of its tokens. With `k`
//! owners a step may take `k` times as long as the one would take that has nothing but the tokens of the owner with the
//! fewest; what fits into that is divided among them, and what an owner has beyond its part waits, oldest first. Where
//! tokens cost little beside the step, all of them fit. Both costs are measured; before that nobody is held back. A
//! token of a small step costs more than one of a large step, so what shared steps take corrects how much fits into
//! them: down at once in proportion, up by an eighth where a further token would still fit. Who has the fewest gets all
//! of them, if a step has room for as many of each owner.
//!
//! Who comes while a step runs waits for its end, and no division helps then. So an owner that is alone, but was not
//! lately, has short steps: the other one may come again at any time.

use crate::api::Owner;
use std::time::Duration;

/// A step of at most so many tokens tells what a step costs as such.
const FEW_TOKENS: u32 = 4;
/// A step of at least so many tokens tells what a token costs.
const MANY_TOKENS: u32 = 32;
/// What a shared step aims at, of the time that is bearable: what varies from step to step stays below it then.
const AIM: f64 = 0.9;
/// How long an owner that was not alone has short steps.
const COMPANY: Duration = Duration::from_secs(60);
/// A short step takes so many times as long as one with a single token,
const SHORT_STEPS: f64 = 4.0;
/// but has room for so many: prompts get on, however much is behind them. It tells no cost: these may be a flood's
/// answers with much behind them, and what they take would be allowed to steps that are shared.
const SHORT_STEP_TOKENS: u32 = 2 * FEW_TOKENS;
/// Part of the way that a measured cost goes up with a step that took longer, 1 / n; what took less is believed sooner,
/// since all that disturbs a step makes it longer.
const UP: f64 = 16.0;
const DOWN: f64 = 2.0;
/// Least of [`Shares::fitting`], from which it comes back in some thirty steps.
const FITTING_MIN: f64 = 1.0 / 32.0;

/// What steps cost, and what is left for whom in the next one.
#[derive(Debug)]
pub(super) struct Shares {
    /// Seconds of a step without its tokens; 0 before it was measured.
    step_s: f64,
    /// Seconds of a token; 0 before it was measured.
    token_s: f64,
    /// Of the tokens that fit into a shared step beyond equal numbers, the part that has turned out to fit.
    fitting: f64,
    /// How long the step that was divided last is to take, and of how many tokens; `None`: as long as it likes.
    aim: Option<(f64, u32)>,
    /// When several owners could use a step, last.
    shared_at: Option<Duration>,
    /// Owners that could use the next step, and the tokens they may still have in it.
    owners: Vec<(Owner, u32)>,
}

impl Default for Shares {
    fn default() -> Self {
        Self { step_s: 0.0, token_s: 0.0, fitting: 1.0, aim: None, shared_at: None, owners: Vec::new() }
    }
}

impl Shares {
    /// A step of `n_tokens` took so long.
    pub(super) fn took(&mut self, time: Duration, n_tokens: u32) {
        let (seconds, n) = (time.as_secs_f64(), f64::from(n_tokens));
        if let Some((aim, most)) = self.aim.take() {
            // Not below half at once: one late step says little. Nor does a fast one with fewer tokens, or one that
            // another token would make late.
            let change = (aim / seconds.max(f64::MIN_POSITIVE)).clamp(0.5, 1.125);
            if change < 1.0 || (n_tokens >= most && seconds * (n + 1.0) <= aim * n) {
                self.fitting = (self.fitting * change).clamp(FITTING_MIN, 1.0);
            }
            return;
        }
        if n_tokens >= MANY_TOKENS {
            settle(&mut self.token_s, seconds / n);
        } else if (1..=FEW_TOKENS).contains(&n_tokens) {
            settle(&mut self.step_s, (seconds - self.token_s * n).max(0.0));
        }
    }

    /// Divides a step of at most `most` tokens at `now` among the owners of sequences that could use so many each.
    pub(super) fn divide(&mut self, wanted: impl Iterator<Item = (Owner, u32)>, most: u32, now: Duration) {
        self.owners.clear();
        for (owner, n) in wanted {
            match self.owners.iter_mut().find(|(known, _)| *known == owner) {
                Some((_, wanted)) => *wanted = wanted.saturating_add(n),
                None => self.owners.push((owner, n)),
            }
        }
        self.owners.sort_unstable_by_key(|&(_, wanted)| wanted);
        if self.owners.len() > 1 {
            self.shared_at = Some(now);
        }
        let mut left = self.step_tokens(most, now);
        let mut least = if self.owners.len() > 1 { most / super::count(self.owners.len()) } else { 0 };
        for at in 0..self.owners.len() {
            let owners_left = super::count(self.owners.len() - at);
            let wanted = &mut self.owners[at].1;
            *wanted = (*wanted).min(left.div_ceil(owners_left).max(least));
            left = left.saturating_sub(*wanted);
            least = 0;
        }
    }

    /// Tokens of a step that all owners bear, and who may come; those are sorted by what they want.
    fn step_tokens(&mut self, most: u32, now: Duration) -> u32 {
        self.aim = None;
        let n_owners = super::count(self.owners.len());
        if self.step_s <= 0.0 || self.token_s <= 0.0 {
            return most;
        }
        let (factor, fewest, least) = match self.owners.as_slice() {
            &[(_, fewest), _, ..] => (AIM * f64::from(n_owners), f64::from(fewest), n_owners),
            _ if self.shared_at.is_some_and(|at| now.saturating_sub(at) < COMPANY) => {
                (SHORT_STEPS, 1.0, SHORT_STEP_TOKENS.min(most))
            }
            _ => return most,
        };
        let fitting = factor * fewest + (factor - 1.0) * self.step_s / self.token_s * self.fitting;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast saturates, then bounded")]
        let fitting = (fitting as u32).clamp(least, most.max(least));
        // What one owner's steps take says nothing of shared ones: its answers may have far more behind them.
        self.aim = (n_owners > 1).then_some((factor * (self.step_s + self.token_s * fewest), fitting));
        fitting
    }

    /// Tokens that `owner` may still have in the step.
    pub(super) fn left(&self, owner: Owner) -> u32 {
        self.owners.iter().find(|(known, _)| *known == owner).map_or(0, |&(_, left)| left)
    }

    /// `owner` has `n` tokens in the step.
    pub(super) fn spend(&mut self, owner: Owner, n: u32) {
        if let Some((_, left)) = self.owners.iter_mut().find(|(known, _)| *known == owner) {
            *left -= n.min(*left);
        }
    }
}

/// Moves a measured cost; the first value is taken as it is.
fn settle(cost: &mut f64, value: f64) {
    let way = if value < *cost { DOWN } else { UP };
    *cost += if *cost == 0.0 { value } else { (value - *cost) / way };
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u32 = 256;

    fn divided(shares: &mut Shares, wanted: &[(u32, u32)]) -> Vec<u32> {
        divided_at(shares, wanted, Duration::ZERO)
    }

    fn divided_at(shares: &mut Shares, wanted: &[(u32, u32)], now: Duration) -> Vec<u32> {
        shares.divide(wanted.iter().map(|&(uid, n)| (Owner::Uid(uid), n)), MOST, now);
        let mut uids: Vec<u32> = wanted.iter().map(|&(uid, _)| uid).collect();
        uids.dedup();
        uids.into_iter().map(|uid| shares.left(Owner::Uid(uid))).collect()
    }

    /// A step of `n` tokens takes 2 ms, and 1 ms for each of them.
    fn measured() -> Shares {
        let mut shares = Shares::default();
        for n in [100, 2, 1] {
            shares.took(Duration::from_micros(if n == 100 { 100_000 } else { 2000 + 1000 * n }), n as u32);
        }
        shares
    }

    #[test]
    fn nobody_is_held_back_alone_or_before_costs_are_known() {
        assert_eq!(divided(&mut measured(), &[(1, 1), (1, 300)]), [MOST]);
        assert_eq!(divided(&mut Shares::default(), &[(1, 100), (2, 1)]), [100, 1]);
    }

    #[test]
    fn a_step_takes_no_longer_than_an_owners_own_would_as_often_as_there_are_owners() {
        // 0.9 * 2 * (2 + 1) ms: three tokens.
        assert_eq!(divided(&mut measured(), &[(1, 1), (1, 1), (1, 100), (2, 1)]), [2, 1]);
        // 0.9 * 2 * (2 + 12) ms: 23 tokens.
        assert_eq!(divided(&mut measured(), &[(1, 12), (2, 200)]), [12, 11]);
        // 0.9 * 2 * (2 + 60) ms: 109 tokens.
        assert_eq!(divided(&mut measured(), &[(1, 60), (2, 200)]), [60, 49]);
        // 0.9 * 3 * (2 + 1) ms: six tokens.
        assert_eq!(divided(&mut measured(), &[(1, 50), (2, 1), (3, 50)]), [3, 1, 2]);
    }

    #[test]
    fn who_was_not_alone_lately_has_short_steps_for_a_while() {
        let (mut shares, alone) = (measured(), [(1, 1), (1, 300)]);
        divided(&mut shares, &[(1, 100), (2, 1)]);
        // 4 * (2 + 1) ms: ten tokens.
        assert_eq!(divided_at(&mut shares, &alone, COMPANY / 2), [10]);
        assert_eq!(divided_at(&mut shares, &alone, COMPANY), [MOST]);
        // 4 * (0.5 + 1) ms would be five tokens.
        shares.step_s /= 4.0;
        assert_eq!(divided_at(&mut shares, &alone, COMPANY / 2), [SHORT_STEP_TOKENS]);
        // 4 * (10 + 1) ms: 34 tokens.
        shares.step_s *= 20.0;
        assert_eq!(divided_at(&mut shares, &alone, COMPANY / 2), [34]);
    }

    #[test]
    fn a_fast_step_with_fewer_tokens_than_it_might_have_had_tells_nothing() {
        let mut shares = measured();
        divided(&mut shares, &[(1, 100), (2, 1)]);
        shares.took(Duration::from_millis(60), 3);
        let fitting = shares.fitting;
        divided(&mut shares, &[(1, 1), (2, 1)]);
        shares.took(Duration::from_millis(1), 1);
        assert_eq!(shares.fitting, fitting);
        divided(&mut shares, &[(1, 100), (2, 1)]);
        shares.took(Duration::from_millis(1), 3);
        assert!(shares.fitting > fitting);
    }

    #[test]
    fn who_has_one_answer_each_is_never_left_out() {
        let wanted: Vec<(u32, u32)> = (0..16).map(|uid| (uid, 1)).collect();
        assert_eq!(divided(&mut measured(), &wanted), [1; 16]);
    }

    #[test]
    fn cheap_tokens_hold_nobody_back() {
        let mut shares = Shares::default();
        shares.took(Duration::from_micros(3200), 64);
        shares.took(Duration::from_millis(30), 1);
        assert_eq!(divided(&mut shares, &[(1, 100), (2, 1)]), [100, 1]);
    }

    #[test]
    fn steps_that_take_longer_than_their_owners_can_bear_get_smaller_and_come_back() {
        let mut shares = measured();
        let mut sizes = Vec::new();
        for ms in [6, 12, 12, 12, 12].into_iter().chain([1; 30]) {
            sizes.push(divided(&mut shares, &[(1, 100), (2, 1)]).iter().sum::<u32>());
            shares.took(Duration::from_millis(ms), 4);
        }
        assert_eq!((sizes[0], sizes[4], sizes[34]), (3, 2, 3), "{sizes:?}");
    }

    #[test]
    fn a_step_that_another_token_would_make_late_grows_no_further() {
        let mut shares = measured();
        shares.fitting = FITTING_MIN;
        // 5.4 ms are bearable.
        for (ms, grows) in [(4, false), (3, true)] {
            let before = shares.fitting;
            assert_eq!(divided(&mut shares, &[(1, 100), (2, 1)]), [1, 1]);
            shares.took(Duration::from_millis(ms), 2);
            assert_eq!(shares.fitting > before, grows, "{ms} ms");
        }
    }

    #[test]
    fn what_a_floods_short_steps_take_is_no_cost_of_a_step() {
        let mut shares = measured();
        for _ in 0..50 {
            divided_at(&mut shares, &[(1, 1), (1, 300)], Duration::ZERO);
            shares.took(Duration::from_millis(50), SHORT_STEP_TOKENS);
        }
        assert_eq!(shares.step_s, measured().step_s);
    }

    #[test]
    fn a_step_that_was_slow_by_chance_is_soon_forgotten() {
        let mut shares = Shares::default();
        shares.took(Duration::from_millis(1000), 100);
        for _ in 0..6 {
            shares.took(Duration::from_millis(100), 100);
        }
        assert!((1e-3..1.2e-3).contains(&shares.token_s), "{}", shares.token_s);
        shares.took(Duration::from_millis(1000), 100);
        assert!(shares.token_s < 1.8e-3, "{}", shares.token_s);
    }

    #[test]
    fn what_is_spent_is_not_left() {
        let mut shares = measured();
        divided(&mut shares, &[(1, 100), (2, 1)]);
        shares.spend(Owner::Uid(1), 1);
        assert_eq!((shares.left(Owner::Uid(1)), shares.left(Owner::Uid(9))), (1, 0));
    }
}
