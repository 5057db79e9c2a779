//! Which scales, minimums and codes represent 256 values best? For Q4_K and Q5_K: `d s q - dmin m`.
//!
//! The measure is the squared error weighted by `rms + |x|` of the sub-block, as in ggml's `make_qkx2_quants`: large
//! weights matter more. The search begins as ggml's does (each sub-block by itself, then 6-bit scales of a common one)
//! and goes on where ggml stops: neighbouring scales and minimums are tried under the rounded `d` and `dmin`, and those
//! are solved again for the codes found. A step is kept only if the measure falls, so no block is worse than its start.

use crate::round::{LANES, nearest};
use half::f16;

/// Values of a sub-block.
const SUB: usize = 32;
/// Largest scale or minimum of a sub-block.
const SIX_BITS: u8 = 63;
/// How often scales and their common factors are improved in turn; more gains less than 0.1 %.
const ROUNDS: usize = 3;
/// Below this range every f16 scale is 0.
const VANISHING: f32 = 1e-30;

/// What is searched for one format.
#[derive(Debug)]
pub(crate) struct Search {
    /// Largest code.
    pub(crate) code_max: u8,
    /// Inverse scales tried are `(code_max + first + i / 10) / range` for i in 0 ..= steps.
    pub(crate) first: f32,
    pub(crate) steps: u8,
}

/// A super-block before it is packed.
#[derive(Debug)]
pub(crate) struct Fit {
    pub(crate) d: f16,
    pub(crate) dmin: f16,
    pub(crate) scales: [u8; 8],
    pub(crate) minimums: [u8; 8],
    pub(crate) codes: [u8; 256],
}

/// A sub-block's values and what an error in each costs.
struct Sub<'a> {
    x: &'a [f32; SUB],
    cost: [f32; SUB],
}

/// Finds codes for 256 values.
pub(crate) fn fit(values: &[f32; 256], search: &Search) -> Fit {
    let subs: [Sub<'_>; 8] = std::array::from_fn(|j| Sub::new(&values.as_chunks::<SUB>().0[j]));
    let ideal = subs.each_ref().map(|sub| sub.search(search));
    let max_scale = ideal.iter().fold(0f32, |m, (scale, _)| m.max(*scale));
    let max_minimum = ideal.iter().fold(0f32, |m, (_, minimum)| m.max(*minimum));
    let mut fit = Fit {
        d: f16::from_f32(max_scale / f32::from(SIX_BITS)),
        dmin: f16::from_f32(max_minimum / f32::from(SIX_BITS)),
        scales: ideal.map(|(scale, _)| six_bits(scale, max_scale)),
        minimums: ideal.map(|(_, minimum)| six_bits(minimum, max_minimum)),
        codes: [0; 256],
    };
    for _ in 0..ROUNDS {
        for (j, sub) in subs.iter().enumerate() {
            fit.improve(j, sub, search.code_max);
        }
        if !fit.solve(&subs, search.code_max) {
            break;
        }
    }
    for (j, sub) in subs.iter().enumerate() {
        let (scale, minimum) = fit.step(fit.scales[j], fit.minimums[j]);
        fit.codes.as_chunks_mut::<SUB>().0[j] = sub.codes(scale, minimum, search.code_max);
    }
    fit
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0 ..= 63 by the division")]
fn six_bits(value: f32, max: f32) -> u8 {
    if max > 0.0 { nearest(f32::from(SIX_BITS) / max * value) as u8 } else { 0 }
}

impl<'a> Sub<'a> {
    fn new(x: &'a [f32; SUB]) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "32")]
        let rms = (x.iter().map(|x| x * x).sum::<f32>() / SUB as f32).sqrt();
        Self { x, cost: x.map(|x| rms + x.abs()) }
    }

    /// The best (scale, minimum) for this sub-block alone.
    fn search(&self, search: &Search) -> (f32, f32) {
        let (low, high) = self.x.iter().fold((0f32, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
        let (range, code_max) = (high - low, f32::from(search.code_max));
        if range.is_nan() || range <= VANISHING {
            return (0.0, -low);
        }
        let (mut best, mut best_error) = ((range / code_max, -low), f32::INFINITY);
        for i in 0..=search.steps {
            let inverse = (code_max + search.first + 0.1 * f32::from(i)) / range;
            let codes = self.x.map(|x| nearest((inverse * (x - low)).clamp(0.0, code_max)));
            let Some((scale, minimum)) = self.line(&codes) else { continue };
            let error = self.error(&codes, scale, minimum);
            if error < best_error {
                (best, best_error) = ((scale, minimum), error);
            }
        }
        best
    }

    /// The scale and the minimum, not below 0, that bring `scale q - minimum` closest to the values.
    fn line(&self, codes: &[f32; SUB]) -> Option<(f32, f32)> {
        let (mut w, mut wq, mut wqq, mut wx, mut wqx) =
            ([0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES]);
        for start in (0..SUB).step_by(LANES) {
            for l in 0..LANES {
                let (x, q, cost) = (self.x[start + l], codes[start + l], self.cost[start + l]);
                w[l] += cost;
                wq[l] += cost * q;
                wqq[l] += cost * q * q;
                wx[l] += cost * x;
                wqx[l] += cost * q * x;
            }
        }
        let [w, wq, wqq, wx, wqx] = [w, wq, wqq, wx, wqx].map(|lanes| lanes.iter().sum::<f32>());
        let determinant = w * wqq - wq * wq;
        if determinant.is_nan() || determinant <= 0.0 {
            return None;
        }
        let low = (wqq * wx - wq * wqx) / determinant;
        let line = if low > 0.0 { (wqx / wqq, 0.0) } else { ((w * wqx - wx * wq) / determinant, -low) };
        (line.0 > 0.0).then_some(line)
    }

    fn error(&self, codes: &[f32; SUB], scale: f32, minimum: f32) -> f32 {
        let mut sums = [0f32; LANES];
        for start in (0..SUB).step_by(LANES) {
            for l in 0..LANES {
                let difference = scale * codes[start + l] - minimum - self.x[start + l];
                sums[l] += self.cost[start + l] * difference * difference;
            }
        }
        sums.iter().sum()
    }

    /// The nearest codes under a scale and a minimum, as whole floats.
    fn nearest(&self, scale: f32, minimum: f32, code_max: u8) -> [f32; SUB] {
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        self.x.map(|x| nearest(((x + minimum) * inverse).clamp(0.0, f32::from(code_max))))
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; NaN becomes 0")]
    fn codes(&self, scale: f32, minimum: f32, code_max: u8) -> [u8; SUB] {
        self.nearest(scale, minimum, code_max).map(|q| q as u8)
    }
}

impl Fit {
    /// What a 6-bit scale and minimum stand for.
    fn step(&self, scale: u8, minimum: u8) -> (f32, f32) {
        (self.d.to_f32() * f32::from(scale), self.dmin.to_f32() * f32::from(minimum))
    }

    fn error(&self, sub: &Sub<'_>, scale: u8, minimum: u8, code_max: u8) -> f32 {
        let (scale, minimum) = self.step(scale, minimum);
        sub.error(&sub.nearest(scale, minimum, code_max), scale, minimum)
    }

    fn total(&self, subs: &[Sub<'_>; 8], code_max: u8) -> f32 {
        (0..8).map(|j| self.error(&subs[j], self.scales[j], self.minimums[j], code_max)).sum()
    }

    /// Moves sub-block `j` to the best of the neighbouring scales and minimums.
    fn improve(&mut self, j: usize, sub: &Sub<'_>, code_max: u8) {
        let (s, m) = (self.scales[j], self.minimums[j]);
        let mut best = self.error(sub, s, m, code_max);
        for scale in s.saturating_sub(1)..=(s + 1).min(SIX_BITS) {
            for minimum in m.saturating_sub(1)..=(m + 1).min(SIX_BITS) {
                let error = self.error(sub, scale, minimum, code_max);
                if error < best {
                    best = error;
                    (self.scales[j], self.minimums[j]) = (scale, minimum);
                }
            }
        }
    }

    /// Solves for `d` and `dmin` under the present scales, minimums and codes. True when that was better.
    fn solve(&mut self, subs: &[Sub<'_>; 8], code_max: u8) -> bool {
        let before = self.total(subs, code_max);
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for (j, sub) in subs.iter().enumerate() {
            let (scale, minimum) = self.step(self.scales[j], self.minimums[j]);
            let b = f64::from(self.minimums[j]);
            for ((q, x), cost) in sub.nearest(scale, minimum, code_max).iter().zip(sub.x).zip(&sub.cost) {
                let (a, x, cost) = (f64::from(self.scales[j]) * f64::from(*q), f64::from(*x), f64::from(*cost));
                aa += cost * a * a;
                ab += cost * a * b;
                bb += cost * b * b;
                ax += cost * a * x;
                bx += cost * b * x;
            }
        }
        let determinant = aa * bb - ab * ab;
        let (mut d, mut dmin) = ((ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant);
        if !(determinant > 0.0 && dmin >= 0.0) {
            (d, dmin) = (ax / aa, self.dmin.to_f64());
        }
        if !(d > 0.0 && d.is_finite()) {
            return false;
        }
        let old = (self.d, self.dmin);
        (self.d, self.dmin) = (f16::from_f64(d), f16::from_f64(dmin));
        let better = self.total(subs, code_max) < before;
        if !better {
            (self.d, self.dmin) = old;
        }
        better
    }
}
