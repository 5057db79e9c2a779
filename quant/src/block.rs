//! Which scale and codes represent 32 values best? For Q4_0 and Q5_0, `d (q - half)`, and Q4_1 and Q5_1, `d q + m`.
//!
//! The start is ggml's encoding: the extreme values land on codes. Then scales around it are tried, each solved again
//! by least squares for the codes it gives, with `d` and `m` rounded to f16 before codes are chosen. A candidate
//! replaces the start only if its squared error is smaller, so no block is worse than ggml's.

use crate::round::nearest;
use half::f16;

const N: usize = 32;
/// Inverse scales are tried in steps of a tenth of a code, this many to either side.
const STEPS: i8 = 10;

/// A block before it is packed; `m` is 0 in symmetric formats.
#[derive(Debug)]
pub(crate) struct Fit {
    pub(crate) d: f16,
    pub(crate) m: f16,
    pub(crate) codes: [u8; N],
}

impl Fit {
    /// Codes as they come by `code`, which must be within range.
    fn new(d: f32, m: f32, codes: [u8; N]) -> Self {
        Self { d: f16::from_f32(d), m: f16::from_f32(m), codes }
    }

    /// The nearest codes for `d q + m`, with d and m as f16 has them.
    fn nearest(x: &[f32; N], d: f32, m: f32, offset: f32, code_max: u8) -> Self {
        let (d, m) = (f16::from_f32(d), f16::from_f32(m));
        let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / d.to_f32() };
        let code = |x: f32| nearest(((x - m.to_f32()) * inverse + offset).clamp(0.0, f32::from(code_max)));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; NaN becomes 0")]
        let codes = x.map(|x| code(x) as u8);
        Self { d, m, codes }
    }

    fn error(&self, x: &[f32; N], offset: f32) -> f32 {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let square = |(q, x): (&u8, &f32)| {
            let difference = d * (f32::from(*q) - offset) + m - x;
            difference * difference
        };
        self.codes.iter().zip(x).map(square).sum()
    }
}

/// The value of greatest magnitude, the first of equals.
pub(crate) fn extreme(x: &[f32; N]) -> f32 {
    x.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m })
}

/// ggml's own scale and codes for `d (q - half)`, q below 2 half: the value of greatest magnitude has code 0.
pub(crate) fn plain(x: &[f32; N], half: u8) -> Fit {
    let (offset, code_max) = (f32::from(half), 2 * half - 1);
    let d = extreme(x) / -offset;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "truncation is ggml's rounding here")]
    let codes = x.map(|x| ((x * inverse + (offset + 0.5)) as u8).min(code_max));
    Fit::new(d, 0.0, codes)
}

/// Finds codes for `d (q - half)`, q below 2 half.
pub(crate) fn symmetric(x: &[f32; N], half: u8) -> Fit {
    let (offset, code_max) = (f32::from(half), 2 * half - 1);
    let (extreme, mut best) = (extreme(x), plain(x, half));
    let mut best_error = best.error(x, offset);
    for i in -STEPS..=STEPS {
        let inverse = -(offset + 0.1 * f32::from(i)) / extreme;
        let (mut qx, mut qq) = (0f32, 0f32);
        for x in x {
            let q = nearest((inverse * x).clamp(-offset, offset - 1.0));
            qx += q * x;
            qq += q * q;
        }
        let fit = Fit::nearest(x, qx / qq, 0.0, offset, code_max);
        let error = fit.error(x, offset);
        if error < best_error {
            (best, best_error) = (fit, error);
        }
    }
    best
}

/// Finds codes for `d q + m`, q up to `code_max`.
pub(crate) fn affine(x: &[f32; N], code_max: u8) -> Fit {
    let (min, max) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
    let (range, codes) = (max - min, f32::from(code_max));
    let d = range / codes;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "truncation is ggml's rounding here")]
    let mut best = Fit::new(d, min, x.map(|x| (((x - min) * inverse + 0.5) as u8).min(code_max)));
    let mut best_error = best.error(x, 0.0);
    for i in -STEPS..=STEPS {
        let inverse = (codes + 0.1 * f32::from(i)) / range;
        let (mut q1, mut qq, mut x1, mut qx) = (0f32, 0f32, 0f32, 0f32);
        for x in x {
            let (q, x) = (nearest((inverse * (x - min)).clamp(0.0, codes)), x - min);
            q1 += q;
            qq += q * q;
            x1 += x;
            qx += q * x;
        }
        #[expect(clippy::cast_precision_loss, reason = "32")]
        let n = N as f32;
        let determinant = n * qq - q1 * q1;
        let (d, m) = ((n * qx - q1 * x1) / determinant, (qq * x1 - q1 * qx) / determinant + min);
        let fit = Fit::nearest(x, d, m, 0.0, code_max);
        let error = fit.error(x, 0.0);
        if error < best_error {
            (best, best_error) = (fit, error);
        }
    }
    best
}
