//! Which scales and codes represent 256 values best? For Q6_K: `d s q`, q in -32 ..= 31.
//!
//! Each sub-block is searched by itself with errors weighted by x^2, as ggml's `make_qx_quants` does. Then, where ggml
//! stops, neighbouring int8 scales are tried under the rounded `d`, and `d` is solved again for the codes found; there
//! the plain squared error counts, and a step is kept only if it falls.

use crate::round::{LANES, nearest};
use half::f16;

/// Values of a sub-block.
const SUB: usize = 16;
/// Minus the smallest code.
const CODES: f32 = 32.0;
/// Below this magnitude every f16 scale is 0.
const VANISHING: f32 = 1e-15;
/// How often scales and their common factor are improved in turn.
const ROUNDS: usize = 3;

/// A super-block before it is packed.
#[derive(Debug)]
pub(crate) struct Fit {
    pub(crate) d: f16,
    pub(crate) scales: [i8; 16],
    pub(crate) codes: [i8; 256],
}

/// Finds codes for 256 values.
pub(crate) fn fit(values: &[f32; 256]) -> Fit {
    let subs = values.as_chunks::<SUB>().0;
    let ideal: [f32; 16] = std::array::from_fn(|j| search(&subs[j]));
    let extreme = ideal.iter().fold(0f32, |m, scale| if scale.abs() > m.abs() { *scale } else { m });
    let mut fit = Fit { d: f16::from_f32(extreme / -128.0), scales: [0; 16], codes: [0; 256] };
    if extreme.abs() < VANISHING {
        return fit;
    }
    #[expect(clippy::cast_possible_truncation, reason = "within -128 ..= 127 by the division")]
    let int8 = |scale: f32| nearest(-128.0 / extreme * scale).min(127.0) as i8;
    fit.scales = ideal.map(int8);
    for _ in 0..ROUNDS {
        for (j, sub) in subs.iter().enumerate() {
            fit.improve(j, sub);
        }
        if !fit.solve(subs) {
            break;
        }
    }
    for (j, sub) in subs.iter().enumerate() {
        #[expect(clippy::cast_possible_truncation, reason = "clamped; NaN becomes 0")]
        let codes = codes(sub, fit.step(fit.scales[j])).map(|q| q as i8);
        fit.codes.as_chunks_mut::<SUB>().0[j] = codes;
    }
    fit
}

/// The best scale for a sub-block alone: of 19 around (extreme value / -32), each solved again for its codes.
fn search(x: &[f32; SUB]) -> f32 {
    let extreme = x.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    if extreme.abs() < VANISHING {
        return 0.0;
    }
    let (mut best, mut best_gain) = (extreme / -CODES, 0f32);
    for i in -9i8..=9 {
        let inverse = -(CODES + 0.1 * f32::from(i)) / extreme;
        let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
        for start in (0..SUB).step_by(LANES) {
            for l in 0..LANES {
                let x = x[start + l];
                let q = nearest((inverse * x).clamp(-CODES, CODES - 1.0));
                xq[l] += x * x * x * q;
                qq[l] += x * x * q * q;
            }
        }
        let (xq, qq) = (xq.iter().sum::<f32>(), qq.iter().sum::<f32>());
        // The error is sum(x^4) - xq^2 / qq at scale xq / qq.
        if qq > 0.0 && xq * xq / qq > best_gain {
            (best, best_gain) = (xq / qq, xq * xq / qq);
        }
    }
    best
}

/// The nearest codes under a scale, as whole floats.
fn codes(x: &[f32; SUB], scale: f32) -> [f32; SUB] {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    x.map(|x| nearest((x * inverse).clamp(-CODES, CODES - 1.0)))
}

fn error(x: &[f32; SUB], scale: f32) -> f32 {
    let (codes, mut sums) = (codes(x, scale), [0f32; LANES]);
    for start in (0..SUB).step_by(LANES) {
        for l in 0..LANES {
            let difference = scale * codes[start + l] - x[start + l];
            sums[l] += difference * difference;
        }
    }
    sums.iter().sum()
}

impl Fit {
    /// What an int8 scale stands for.
    fn step(&self, scale: i8) -> f32 {
        self.d.to_f32() * f32::from(scale)
    }

    fn total(&self, subs: &[[f32; SUB]]) -> f32 {
        subs.iter().zip(self.scales).map(|(sub, scale)| error(sub, self.step(scale))).sum()
    }

    /// Moves sub-block `j` to the best of the neighbouring scales.
    fn improve(&mut self, j: usize, sub: &[f32; SUB]) {
        let present = self.scales[j];
        let mut best = error(sub, self.step(present));
        for scale in [present.saturating_sub(1), present.saturating_add(1)] {
            let error = error(sub, self.step(scale));
            if error < best {
                best = error;
                self.scales[j] = scale;
            }
        }
    }

    /// Solves for `d` under the present scales and codes. True when that was better.
    fn solve(&mut self, subs: &[[f32; SUB]]) -> bool {
        let before = self.total(subs);
        let (mut ax, mut aa) = (0f64, 0f64);
        for (sub, scale) in subs.iter().zip(self.scales) {
            for (q, x) in codes(sub, self.step(scale)).iter().zip(sub) {
                let a = f64::from(scale) * f64::from(*q);
                ax += a * f64::from(*x);
                aa += a * a;
            }
        }
        let old = self.d;
        self.d = f16::from_f64(ax / aa);
        let better = self.total(subs) < before;
        if !better {
            self.d = old;
        }
        better
    }
}
