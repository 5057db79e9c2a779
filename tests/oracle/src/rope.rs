//! By which angles are positions told? Frequencies of the pairs of a row, with YaRN's stretching.

use crate::model::Keys;
use anyhow::bail;

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair.
    pub frequencies: Vec<f64>,
    /// Factor on cosines and sines (YaRN).
    pub magnitude: f64,
}

impl Rope {
    /// Frequencies of `width / 2` pairs, stretched by YaRN when the file says so (Peng et al., 2023).
    pub(crate) fn parse(keys: &Keys<'_>, width: usize) -> anyhow::Result<Self> {
        let base = keys.float("rope.freq_base", 10000.0)?;
        let plain: Vec<f64> = (0..width / 2).map(|j| base.powf(-2.0 * j as f64 / width as f64)).collect();
        let Some(yarn) = Yarn::parse(keys)? else { return Ok(Self { frequencies: plain, magnitude: 1.0 }) };
        // The pair that turns r times within the original context.
        let pair = |r: f64| width as f64 * (yarn.original / (r * std::f64::consts::TAU)).ln() / (2.0 * base.ln());
        let low = pair(yarn.beta_fast).floor().max(0.0);
        let high = pair(yarn.beta_slow).ceil().min(width as f64 - 1.0);
        let stretch = |(j, frequency): (usize, f64)| {
            let ramp = ((j as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0);
            frequency / yarn.factor * ramp + frequency * (1.0 - ramp)
        };
        Ok(Self { frequencies: plain.into_iter().enumerate().map(stretch).collect(), magnitude: yarn.magnitude })
    }

    /// Values that are rotated.
    pub fn width(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// `count` pairs from pair `first`.
    pub fn part(&self, first: usize, count: usize) -> Self {
        Self { frequencies: self.frequencies[first..first + count].to_vec(), magnitude: self.magnitude }
    }
}

/// YaRN's parameters.
pub(crate) struct Yarn {
    factor: f64,
    original: f64,
    beta_fast: f64,
    beta_slow: f64,
    /// Factor on cosines and sines.
    magnitude: f64,
    /// Factor on attention scores, to be squared.
    pub(crate) scale: f64,
}

impl Yarn {
    /// As Hugging Face computes them. A GGUF holds a tenth of `mscale_all_dim` but not `mscale`: as llama.cpp does, a
    /// deepseek2 file has both equal, and elsewhere `mscale` is 1.
    pub(crate) fn parse(keys: &Keys<'_>) -> anyhow::Result<Option<Self>> {
        match keys.metadata.str(&keys.name("rope.scaling.type"))? {
            None | Some("none") => return Ok(None),
            Some("yarn") => {}
            Some(other) => bail!("rope scaling '{other}' is not known"),
        }
        let factor = keys.float("rope.scaling.factor", 1.0)?;
        let log_multiplier = keys.float("rope.scaling.yarn_log_multiplier", 0.0)?;
        let mscale = |m: f64| if factor > 1.0 { m * factor.ln() + 1.0 } else { 1.0 };
        let own = if keys.arch == "deepseek2" && log_multiplier > 0.0 { log_multiplier } else { 0.1 };
        Ok(Some(Self {
            factor,
            original: keys.count("rope.scaling.original_context_length")? as f64,
            beta_fast: keys.float("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: keys.float("rope.scaling.yarn_beta_slow", 1.0)?,
            magnitude: mscale(own) / mscale(log_multiplier),
            scale: mscale(log_multiplier),
        }))
    }
}
