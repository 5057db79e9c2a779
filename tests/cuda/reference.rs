//! What should the operators answer? `abi/OPS.md` in f64, and steps and numbers to ask with.

use fastrand::Rng;
use half::f16;
use sparsed_abi::StepArrays;

/// A step's arrays: one sequence from position 0.
pub struct Step {
    pub tokens: Vec<u32>,
    pub rows: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u64>,
    offsets: [u32; 2],
    context: [u32; 1],
    block_offsets: [u32; 2],
}

impl Step {
    /// Up to eight random tokens, and logits for some of them.
    pub fn random(random: &mut Rng, vocabulary: u32) -> Self {
        let n = random.u32(1..=8);
        let rows = (0..n).filter(|_| random.bool()).collect();
        let tokens = (0..n).map(|_| random.u32(0..vocabulary)).collect();
        let (positions, slots) = ((0..n).collect(), (0..u64::from(n)).collect());
        Self { tokens, rows, positions, slots, offsets: [0, n], context: [n], block_offsets: [0, 1] }
    }

    pub fn arrays(&self) -> StepArrays<'_> {
        StepArrays {
            tokens: &self.tokens,
            positions: &self.positions,
            slots: &self.slots,
            seq_offsets: &self.offsets,
            contexts: &self.context,
            block_offsets: &self.block_offsets,
            block_ids: &[0],
            rows: &self.rows,
            ..StepArrays::default()
        }
    }
}

/// Numbers that f16 has, as f16 bytes and as f64.
pub fn halves(random: &mut Rng, n: usize) -> (Vec<u8>, Vec<f64>) {
    let values: Vec<f16> = (0..n).map(|_| f16::from_f32(random.f32() * 2.0 - 1.0)).collect();
    (values.iter().flat_map(|v| v.to_le_bytes()).collect(), values.iter().map(|&v| v.into()).collect())
}

/// Numbers in f32.
pub fn singles(random: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.f32() * 2.0 - 1.0).collect()
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

pub fn embed(weights: &[f64], tokens: &[u32], width: usize) -> Vec<f64> {
    tokens.iter().flat_map(|&t| weights[t as usize * width..][..width].to_vec()).collect()
}

pub fn rms_norm(x: &[f64], gain: Option<&[f64]>, cols: usize, eps: f32) -> Vec<f64> {
    let row = |row: &[f64]| {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / cols as f64;
        let scale = (mean + f64::from(eps)).sqrt();
        row.iter().enumerate().map(|(c, v)| v / scale * gain.map_or(1.0, |gain| gain[c])).collect::<Vec<_>>()
    };
    x.chunks(cols).flat_map(row).collect()
}

pub fn linear(x: &[f64], weights: &[f64], bias: Option<&[f64]>, cols: usize) -> Vec<f64> {
    let row = |x: &[f64]| {
        let dot = |w: &[f64]| w.iter().zip(x).map(|(w, v)| w * v).sum::<f64>();
        weights.chunks(cols).enumerate().map(|(o, w)| bias.map_or(0.0, |b| b[o]) + dot(w)).collect::<Vec<_>>()
    };
    x.chunks(cols).flat_map(row).collect()
}

pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

pub fn gather(x: &[f64], rows: &[u32], width: usize) -> Vec<f64> {
    embed(x, rows, width)
}

/// Tolerance class F of `abi/OPS.md`.
pub fn assert_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: as many values");
    let error: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert!(error <= 1e-7 * norm, "{what}: squared error {error} of {norm}\n{found:?}\n{expected:?}");
}
