//! Which token comes next? Logits in, one token out.
//!
//! Order of the steps, as in Hugging Face `transformers` and vLLM: the grammar's mask, bias, penalties, temperature,
//! top-k, top-p, min-p.
//! The random number of a token is a function of the seed and of its place in the answer, so a sampler that is rebuilt
//! at token n draws on as the first one would have.

use crate::api::Failure;
use crate::{Grammar, Sampling};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::{HashMap, HashSet};

/// The sampler of one sequence.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    grammar: Option<Grammar>,
    /// Tokens of the answer.
    n_answered: u64,
    /// Occurrences in the answer.
    answered: HashMap<u32, u32>,
    /// Tokens of prompt and answer; kept only when the repetition penalty needs them.
    seen: HashSet<u32>,
    /// Candidates, kept from token to token.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`.
    pub(crate) fn new(sampling: Sampling, grammar: Option<Grammar>, prompt: &[u32]) -> Self {
        let seen = if has_repetition_penalty(&sampling) { prompt.iter().copied().collect() } else { HashSet::new() };
        let rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        Self { sampling, rng, grammar, n_answered: 0, answered: HashMap::new(), seen, candidates: Vec::new() }
    }

    /// The next token. `logits` has one value per token of the vocabulary; NaN counts as impossible.
    ///
    /// # Errors
    /// The grammar's; every token is impossible, so whoever made the logits is at fault.
    pub(crate) fn next(&mut self, logits: &mut [f32]) -> Result<u32, Failure> {
        if !logits.iter().any(|logit| *logit > f32::NEG_INFINITY) {
            return Err(Failure::BackendFailed { reason: "it gave no number for any token".to_owned() });
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(logits)?;
        }
        self.adjust(logits);
        let mut token = if self.sampling.temperature == 0.0 { greedy(logits) } else { self.draw(logits) };
        if let Some(grammar) = &mut self.grammar {
            token = grammar.allowed(token);
            grammar.commit(token)?;
        }
        self.count(token);
        Ok(token)
    }

    /// Goes past a token that was chosen before, as if it had just been drawn.
    ///
    /// # Errors
    /// The grammar's, when the token is none that it allows here.
    pub(crate) fn replay(&mut self, token: u32) -> Result<(), Failure> {
        if let Some(grammar) = &mut self.grammar {
            grammar.commit(token)?;
        }
        self.count(token);
        Ok(())
    }

    fn count(&mut self, token: u32) {
        self.n_answered += 1;
        *self.answered.entry(token).or_insert(0) += 1;
        if has_repetition_penalty(&self.sampling) {
            self.seen.insert(token);
        }
    }

    /// Whether there is a grammar and the answer is all that it can be.
    pub(crate) fn is_complete(&self) -> bool {
        self.grammar.as_ref().is_some_and(Grammar::is_complete)
    }

    fn adjust(&self, logits: &mut [f32]) {
        let at = |id: u32| id as usize;
        for &(id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(at(id)) {
                *logit += bias;
            }
        }
        for &id in &self.seen {
            if let Some(logit) = logits.get_mut(at(id)) {
                let penalty = self.sampling.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let (frequency, presence) = (self.sampling.frequency_penalty, self.sampling.presence_penalty);
        if frequency != 0.0 || presence != 0.0 {
            for (&id, &n) in &self.answered {
                if let Some(logit) = logits.get_mut(at(id)) {
                    #[expect(clippy::cast_precision_loss, reason = "an answer has far fewer than 2^24 tokens")]
                    let occurrences = n as f32;
                    *logit -= frequency * occurrences + presence;
                }
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !greatest.is_finite() {
            return greedy(logits);
        }
        self.candidates.clear();
        // Below this a candidate's weight is under the smallest f32.
        let floor = greatest - 100.0 * temperature;
        self.candidates.extend((0u32..).zip(logits.iter().copied()).filter(|&(_, logit)| logit >= floor));
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let keep = top_k as usize;
        if keep > 0 && keep < self.candidates.len() {
            self.candidates.select_nth_unstable_by(keep - 1, by_logit);
            self.candidates.truncate(keep);
        }
        self.candidates.sort_unstable_by(by_logit);
        for candidate in &mut self.candidates {
            candidate.1 = ((candidate.1 - greatest) / temperature).exp();
        }
        let total: f32 = self.candidates.iter().map(|&(_, weight)| weight).sum();
        if top_p < 1.0 {
            let mut sum = 0.0;
            let enough = self.candidates.iter().position(|&(_, weight)| {
                sum += weight;
                sum >= top_p * total
            });
            self.candidates.truncate(enough.map_or(self.candidates.len(), |at| at + 1));
        }
        // The greatest has weight 1.
        self.candidates.retain(|&(_, weight)| weight >= min_p);
        let kept: f32 = self.candidates.iter().map(|&(_, weight)| weight).sum();
        self.rng.set_word_pos(u128::from(self.n_answered) * WORDS_PER_DRAW);
        let mut left = uniform(self.rng.next_u64()) * kept;
        for &(id, weight) in &self.candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding may leave a last crumb.
        self.candidates.last().map_or(0, |&(id, _)| id)
    }
}

/// 32-bit words of the generator's stream that a draw takes.
const WORDS_PER_DRAW: u128 = 2;

/// Uniform in `[0, 1)`, from the upper 24 bits.
fn uniform(bits: u64) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
    let upper = (bits >> 40) as f32;
    upper / (1u32 << 24) as f32
}

fn has_repetition_penalty(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0
}

/// The token of greatest logit, the lowest of equals.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let best =
        (0u32..).zip(logits).fold((0, f32::NEG_INFINITY), |best, (id, &v)| if v > best.1 { (id, v) } else { best });
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drawn(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, None, &[]);
        (0..n).map(|_| sampler.next(&mut logits.to_vec()).unwrap()).collect()
    }

    fn seeded(seed: u64) -> Sampling {
        Sampling { seed, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, f32::NAN]), 1);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..100u8).map(|i| f32::from(i % 7)).collect();
        assert_eq!(drawn(seeded(1), &logits, 50), drawn(seeded(1), &logits, 50));
        assert_ne!(drawn(seeded(1), &logits, 50), drawn(seeded(2), &logits, 50));
    }

    #[test]
    fn tokens_are_drawn_as_often_as_their_probability_says() {
        let logits = [0.0, 2.0f32.ln(), 4.0f32.ln(), f32::NEG_INFINITY];
        let tokens = drawn(seeded(3), &logits, 70_000);
        let share = |id: u32| tokens.iter().filter(|&&t| t == id).count();
        for (id, expected) in [(0, 10_000usize), (1, 20_000), (2, 40_000)] {
            assert!(share(id).abs_diff(expected) < 500, "token {id}: {} of 70000", share(id));
        }
        assert_eq!(share(3), 0);
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [0.0, 1.0, 2.0, 3.0]; // probabilities 0.032 0.087 0.237 0.644
        let only = |sampling, allowed: &[u32]| {
            let tokens = drawn(sampling, &logits, 500);
            assert!(tokens.iter().all(|t| allowed.contains(t)), "{allowed:?}");
            assert!(allowed.iter().all(|t| tokens.contains(t)), "{allowed:?}");
        };
        only(Sampling { top_k: 2, ..seeded(1) }, &[2, 3]);
        only(Sampling { top_p: 0.65, ..seeded(1) }, &[2, 3]);
        only(Sampling { top_p: 0.64, ..seeded(1) }, &[3]);
        only(Sampling { min_p: 0.1, ..seeded(1) }, &[1, 2, 3]);
        only(Sampling { temperature: 0.0, ..seeded(1) }, &[3]);
        // top-p counts the tail that min-p would cut.
        only(Sampling { top_p: 0.7, min_p: 0.2, ..seeded(1) }, &[2, 3]);
    }

    #[test]
    fn logits_without_a_number_give_no_token() {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(Sampling { temperature, ..seeded(1) }, None, &[]);
            let failed = sampler.next(&mut [f32::NAN, f32::NEG_INFINITY]).unwrap_err();
            assert!(matches!(failed, Failure::BackendFailed { .. }));
        }
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let greedy_with = |sampling: Sampling, prompt: &[u32], n| {
            let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..sampling }, None, prompt);
            (0..n).map(|_| sampler.next(&mut [1.0, 0.9, -0.5]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(greedy_with(Sampling { presence_penalty: 0.2, ..seeded(0) }, &[], 3), [0, 1, 0]);
        assert_eq!(greedy_with(Sampling { frequency_penalty: 0.2, ..seeded(0) }, &[], 4), [0, 1, 0, 1]);
        assert_eq!(greedy_with(Sampling { repetition_penalty: 1.5, ..seeded(0) }, &[0], 1), [1]);
        assert_eq!(greedy_with(Sampling { logit_bias: vec![(2, 5.0), (99, 1.0)], ..seeded(0) }, &[], 1), [2]);
    }

    fn logit() -> impl Strategy<Value = f32> {
        prop_oneof![9 => -50f32..50.0, 1 => Just(f32::NAN), 1 => Just(f32::NEG_INFINITY)]
    }

    proptest! {
        #![proptest_config(crate::seeded())]

        #[test]
        fn any_logits_and_parameters_give_a_token_of_the_vocabulary(
            logits in proptest::collection::vec(logit(), 1..50),
            temperature in 0f32..3.0, top_k in 0u32..60, top_p in 0.01f32..=1.0, min_p in 0f32..=1.0, seed: u64,
        ) {
            prop_assume!(logits.iter().any(|logit| *logit > f32::NEG_INFINITY));
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            for token in drawn(sampling, &logits, 5) {
                prop_assert!((token as usize) < logits.len());
            }
        }
    }
}
