//! How fast does each pair turn? RoPE's frequencies, stretched by YaRN (arXiv 2309.00071; DeepSeek-V3.2-Exp
//! `precompute_freqs_cis`, transformers `_compute_yarn_parameters`).

/// RoPE of a model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rope {
    /// Base of the frequencies.
    pub(super) base: f64,
    /// How they are stretched, if they are.
    pub(super) yarn: Option<Yarn>,
}

/// YaRN's parameters. All numbers are positive and finite.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Yarn {
    /// Context over the original context.
    pub(super) factor: f64,
    /// Tokens of the original context.
    pub(super) original_context: f64,
    /// Turns in the original context above which a pair keeps its frequency.
    pub(super) beta_fast: f64,
    /// Turns below which it is stretched by the whole factor.
    pub(super) beta_slow: f64,
    /// Whether the ramp between the two begins and ends at whole pairs.
    pub(super) truncate: bool,
    /// Factor on cosine and sine.
    pub(super) attention_factor: f64,
    /// Factor on attention scores.
    pub(super) score_factor: f64,
}

/// `0.1 m ln factor + 1`, DeepSeek's `yarn_get_mscale`.
pub(super) fn magnitude(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

impl Rope {
    /// Angle per position of each pair of `dim` values.
    pub(super) fn frequencies(&self, dim: u32) -> Vec<f64> {
        let plain = |j: u32| self.base.powf(-2.0 * f64::from(j) / f64::from(dim));
        let Some(yarn) = &self.yarn else { return (0..dim / 2).map(plain).collect() };
        let turns = |r: f64| {
            let tokens = yarn.original_context / (r * std::f64::consts::TAU);
            f64::from(dim) * tokens.ln() / (2.0 * self.base.ln())
        };
        let (mut low, mut high) = (turns(yarn.beta_fast), turns(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(f64::from(dim) - 1.0));
        let width = if (high - low).abs() < f64::EPSILON { 1e-3 } else { high - low };
        let stretched = |j: u32| {
            let ramp = ((f64::from(j) - low) / width).clamp(0.0, 1.0);
            plain(j) / yarn.factor * ramp + plain(j) * (1.0 - ramp)
        };
        (0..dim / 2).map(stretched).collect()
    }

    /// Factor on cosine and sine.
    pub(super) fn attention_factor(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |yarn| yarn.attention_factor)
    }

    /// Factor on attention scores.
    pub(super) fn score_factor(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |yarn| yarn.score_factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v32() -> Rope {
        let yarn = Yarn {
            factor: 40.0,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.0,
            score_factor: magnitude(40.0, 1.0).powi(2),
        };
        Rope { base: 10000.0, yarn: Some(yarn) }
    }

    #[test]
    fn fast_pairs_keep_their_frequency_and_slow_ones_are_stretched_by_the_factor() {
        let frequencies = v32().frequencies(64);
        let plain = |j: f64| 10000f64.powf(-2.0 * j / 64.0);
        assert_eq!(frequencies.len(), 32);
        assert!((frequencies[10] - plain(10.0)).abs() < 1e-15, "the ramp begins at pair 10");
        assert!((frequencies[23] - plain(23.0) / 40.0).abs() < 1e-15, "it ends at pair 23");
        let between = plain(11.0) * (12.0 / 13.0 + 1.0 / 13.0 / 40.0);
        assert!((frequencies[11] - between).abs() < 1e-15);
    }

    #[test]
    fn the_magnitude_is_that_of_the_published_softmax_scale() {
        assert!((v32().score_factor() - 1.873_854_2).abs() < 1e-6);
        assert!((magnitude(1.0, 5.0) - 1.0).abs() < 1e-15, "without stretching there is none");
    }

    #[test]
    fn an_untruncated_ramp_begins_between_pairs() {
        let mut rope = v32();
        rope.yarn.as_mut().unwrap().truncate = false;
        assert!(rope.frequencies(64)[10].total_cmp(&v32().frequencies(64)[10]).is_eq(), "10.4 and 22.5: 10 is below");
        assert!(rope.frequencies(64)[11] > v32().frequencies(64)[11], "less of the ramp lies below 11");
        assert!((rope.frequencies(64)[23] - v32().frequencies(64)[23]).abs() < 1e-15);
    }
}
