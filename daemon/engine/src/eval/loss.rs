//! How surprised is a model by a text? Cross-entropy in nats, in f64, compared window by window.

/// Why a loss could not be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LossError {
    /// The model gave out something that is no number.
    #[error("a logit is not a finite number")]
    NotFinite,
    /// The token has no logit.
    #[error("token {token} is past the {vocab} logits of a row")]
    PastVocabulary {
        /// The token.
        token: u32,
        /// Logits of a row.
        vocab: usize,
    },
}

/// `-ln softmax(logits)[token]`, in nats.
///
/// # Errors
/// A logit that is not finite, or a token without one.
pub fn cross_entropy(logits: &[f32], token: u32) -> Result<f64, LossError> {
    let past = LossError::PastVocabulary { token, vocab: logits.len() };
    let own = f64::from(*logits.get(token as usize).ok_or(past)?);
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !logits.iter().all(|logit| logit.is_finite()) {
        return Err(LossError::NotFinite);
    }
    let greatest = f64::from(greatest);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum();
    Ok(greatest + sum.ln() - own)
}

/// Mean cross-entropy of one window, of all its scored tokens and of those in its second half, where a selection
/// leaves most out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WindowLoss {
    /// Over every scored token.
    pub all: f64,
    /// Over the scored tokens of the second half.
    pub late: f64,
}

impl WindowLoss {
    /// From the losses of a window's tokens, in order.
    ///
    /// # Panics
    /// When there is none.
    pub fn new(losses: &[f64]) -> Self {
        assert!(!losses.is_empty(), "a window scores at least one token");
        Self { all: mean(losses), late: mean(&losses[losses.len() / 2..]) }
    }
}

/// Losses of the same windows under two models or settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Mean cross-entropy, in nats per token.
    pub cross_entropy: f64,
    /// Of that mean, over windows; `None` with one window.
    pub standard_error: Option<f64>,
    /// `exp` of the mean difference to the reference: the ratio of perplexities.
    pub ratio: f64,
    /// Of the ratio, from the differences of each window to its own reference; `None` with one window.
    pub ratio_error: Option<f64>,
}

/// Compares `losses` with those of a `reference`, window by window.
///
/// # Panics
/// When there are not as many windows, or none.
pub fn compare(losses: &[f64], reference: &[f64]) -> Comparison {
    assert_eq!(losses.len(), reference.len(), "a loss for each window");
    let differences: Vec<f64> = losses.iter().zip(reference).map(|(a, b)| a - b).collect();
    let ratio = mean(&differences).exp();
    Comparison {
        cross_entropy: mean(losses),
        standard_error: standard_error(losses),
        ratio,
        ratio_error: standard_error(&differences).map(|error| error * ratio),
    }
}

/// The mean.
///
/// # Panics
/// When there are no values.
pub fn mean(values: &[f64]) -> f64 {
    assert!(!values.is_empty(), "the mean of nothing");
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the mean, with divisor n - 1; `None` for fewer than two values.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let (n, centre) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|value| (value - centre).powi(2)).sum();
    Some((squares / (n - 1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_of_equal_logits_is_the_logarithm_of_their_number() {
        assert!((cross_entropy(&[3.5; 8], 2).unwrap() - 8f64.ln()).abs() < 1e-15);
    }

    #[test]
    fn losses_of_a_row_are_those_of_a_distribution() {
        let logits = [1.0, -2.0, 0.5, 4.0];
        let sum: f64 = (0..4).map(|token| (-cross_entropy(&logits, token).unwrap()).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-15);
        // By hand: ln(e^1 + e^-2 + e^0.5 + e^4) - 4.
        assert!((cross_entropy(&logits, 3).unwrap() - 0.079_239_188_6).abs() < 1e-9);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert!((cross_entropy(&[3e38, 0.0], 0).unwrap()).abs() < 1e-12);
        assert!(cross_entropy(&[3e38, 0.0], 1).unwrap() > 2e38);
    }

    #[test]
    fn what_is_no_number_and_what_is_no_token_are_errors() {
        assert_eq!(cross_entropy(&[0.0, f32::NAN], 0), Err(LossError::NotFinite));
        assert_eq!(cross_entropy(&[0.0, f32::INFINITY], 0), Err(LossError::NotFinite));
        assert_eq!(cross_entropy(&[0.0, 0.0], 2), Err(LossError::PastVocabulary { token: 2, vocab: 2 }));
    }

    #[test]
    fn the_late_loss_is_that_of_the_second_half() {
        assert_eq!(WindowLoss::new(&[1.0, 2.0, 3.0, 5.0]), WindowLoss { all: 2.75, late: 4.0 });
        assert_eq!(WindowLoss::new(&[1.0]), WindowLoss { all: 1.0, late: 1.0 });
    }

    #[test]
    fn a_constant_difference_has_no_error_however_much_the_windows_differ() {
        let compared = compare(&[1.5, 3.5, 2.5], &[1.0, 3.0, 2.0]);
        assert!((compared.ratio - 0.5f64.exp()).abs() < 1e-15);
        assert!(compared.ratio_error.unwrap() < 1e-15);
        // Deviations -1, 1, 0: variance 1, over 3.
        assert!((compared.standard_error.unwrap() - (1.0f64 / 3.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn one_window_has_no_standard_error() {
        let compared = compare(&[2.0], &[1.0]);
        assert_eq!((compared.standard_error, compared.ratio_error), (None, None));
    }
}
