//! How likely was a token? Its logarithmic probability, and those of the tokens that could have stood in its place.

use sparsed_model::Tokenizer;

/// Most alternatives to a token of which a request may hear.
pub const ALTERNATIVES_MAX: u32 = 20;

/// How likely a token was, by the model alone: before grammar, biases, penalties, temperature and cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Likelihood {
    /// The token that was chosen.
    pub chosen: TokenLogprob,
    /// The most likely ones, the first is the greatest.
    pub top: Vec<TokenLogprob>,
}

/// A token and the logarithm of its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token; [`u32::MAX`] where an engine elsewhere has told its text only.
    pub token: u32,
    /// Its text, which need not be whole characters; nothing where the model has no tokenizer.
    pub bytes: Vec<u8>,
    /// Natural logarithm, 0 or less; negative infinity for what cannot come.
    pub logprob: f32,
}

/// The logits of one step as the model gave them.
#[derive(Debug)]
pub(crate) struct Likelihoods {
    logits: Vec<f32>,
    /// The logarithm of the sum of their exponentials.
    normalizer: f64,
}

impl Likelihoods {
    /// Of one value per token of the vocabulary; NaN counts as impossible.
    pub(crate) fn of(logits: &[f32]) -> Self {
        let number = |logit: &f32| if logit.is_nan() { f32::NEG_INFINITY } else { *logit };
        let logits: Vec<f32> = logits.iter().map(number).collect();
        let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum();
        Self { logits, normalizer: greatest + sum.ln() }
    }

    /// What a listener hears of `token`: its own likelihood and the `n` greatest.
    pub(crate) fn tell(&self, token: u32, n: u32, tokenizer: Option<&Tokenizer>) -> Likelihood {
        let one = |token: u32| TokenLogprob {
            token,
            bytes: tokenizer.map_or_else(Vec::new, |tokenizer| bytes(tokenizer, token)),
            logprob: self.logprob(token),
        };
        Likelihood { chosen: one(token), top: self.greatest(n as usize).into_iter().map(one).collect() }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a logarithm of a probability needs no more digits")]
    fn logprob(&self, token: u32) -> f32 {
        let logit = self.logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        (f64::from(logit) - self.normalizer) as f32
    }

    /// The `n` tokens of greatest logit, of equals the lowest first.
    fn greatest(&self, n: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0u32..).take(self.logits.len()).collect();
        let at = |id: u32| self.logits[id as usize];
        let by_logit = |a: &u32, b: &u32| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
        if n < ids.len() {
            ids.select_nth_unstable_by(n, by_logit);
            ids.truncate(n);
        }
        ids.sort_unstable_by(by_logit);
        ids
    }
}

/// A token's text; of a control token its name.
fn bytes(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    let text = tokenizer.token_bytes(token);
    if text.is_empty() { tokenizer.token_name(token).unwrap_or_default().as_bytes().to_vec() } else { text.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(logits: &[f32], token: u32, n: u32) -> (f32, Vec<(u32, f32)>) {
        let likelihood = Likelihoods::of(logits).tell(token, n, None);
        (likelihood.chosen.logprob, likelihood.top.iter().map(|one| (one.token, one.logprob)).collect())
    }

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln(), f32::NAN];
        let (chosen, top) = told(&logits, 0, 2);
        assert!((chosen - 0.125f32.ln()).abs() < 1e-6, "{chosen}");
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [2, 1]);
        assert!((top[0].1 - 0.625f32.ln()).abs() < 1e-6 && (top[1].1 - 0.25f32.ln()).abs() < 1e-6, "{top:?}");
    }

    #[test]
    fn a_shift_of_all_logits_changes_nothing_and_huge_ones_stay_finite() {
        let (a, b) = (told(&[3e4, 3e4 - 1.0], 1, 1), told(&[0.0, -1.0], 1, 1));
        assert!((a.0 - b.0).abs() < 1e-5, "{a:?} {b:?}");
        assert!(a.0.is_finite() && a.1[0].0 == 0);
    }

    #[test]
    fn what_cannot_come_is_told_so_and_there_are_no_more_alternatives_than_tokens() {
        let (impossible, top) = told(&[0.0, f32::NEG_INFINITY], 1, 20);
        assert_eq!((impossible, top.len()), (f32::NEG_INFINITY, 2));
        assert_eq!(told(&[1.0, 1.0, 1.0], 2, 0).1, []);
        assert_eq!(told(&[1.0, 1.0, 1.0], 2, 2).1.iter().map(|one| one.0).collect::<Vec<_>>(), [0, 1]);
    }
}
