//! How do the scores of a block of rows join a running softmax?

use super::ROWS;
use crate::simd::{LANES, Lanes};

/// The running softmax of one head, of powers of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Divides what [`super::attend`] summed.
    pub(crate) fn finish(self, out: &mut [f32]) {
        out.iter_mut().for_each(|o| *o /= self.sum);
    }
}

/// Turns the first `seen` scores of each head, times its scale, into e^(score - max) and the others into 0; returns
/// what earlier sums shrink by.
#[inline(always)]
pub(super) fn exponentials<L: Lanes, const H: usize>(
    l: L,
    p: &mut [[f32; ROWS]; H],
    seen: &[usize; H],
    scales: &[f32; H],
    states: &mut [Softmax],
) -> [f32; H] {
    let (mut most, mut sums) = ([l.splat(f32::NEG_INFINITY); LANES], [l.splat(0.0); LANES]);
    for (h, p) in p.iter_mut().enumerate() {
        // Powers of two are what is computed.
        let scale = l.splat(scales[h] * std::f32::consts::LOG2_E);
        for z in p.as_chunks_mut().0 {
            l.store(l.mul(l.load(z), scale), z);
        }
        if seen[h] < ROWS {
            p[seen[h]..].fill(f32::NEG_INFINITY);
        }
        most[h] = l.splat(states[h].max);
        for z in p.as_chunks().0 {
            most[h] = l.max(most[h], l.load(z));
        }
    }
    let (mut largest, mut change, mut shrink) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    l.store(l.maxima(&most), &mut largest);
    for h in 0..H {
        change[h] = states[h].max - largest[h];
    }
    l.store(exp2(l, l.load(&change)), &mut shrink);
    for (h, p) in p.iter_mut().enumerate() {
        let max = l.splat(largest[h]);
        for p in p.as_chunks_mut().0 {
            l.store(exp2(l, l.sub(l.load(p), max)), p);
        }
        if seen[h] < ROWS {
            p[seen[h]..].fill(0.0);
        }
        let lanes = p.as_chunks::<LANES>().0;
        sums[h] = l.add(l.add(l.load(&lanes[0]), l.load(&lanes[1])), l.add(l.load(&lanes[2]), l.load(&lanes[3])));
    }
    let mut own = [0.0; LANES];
    l.store(l.sums(&sums), &mut own);
    let mut all = [0.0; H];
    for (h, state) in states.iter_mut().enumerate().take(H) {
        all[h] = if state.max == f32::NEG_INFINITY { 0.0 } else { shrink[h] };
        *state = Softmax { max: largest[h], sum: state.sum.mul_add(all[h], own[h]) };
    }
    all
}

/// 2^x for x up to 126: x = n + r, a polynomial of degree 5 in r, then n goes into the exponent. Relative error below
/// 3e-7 down to -125; below that 2^-125, nothing beside the 1 of a softmax.
#[inline(always)]
pub(crate) fn exp2<L: Lanes>(l: L, x: L::F) -> L::F {
    // The smallest relative error from -1/2 to 1/2 with these first two terms.
    const COEFFICIENTS: [f32; 4] = [0.009_669_691, 0.055_505_585, 0.240_222_83, std::f32::consts::LN_2];
    let x = l.max(l.splat(-125.0), x); // in this order a NaN stays
    let n = l.round_f(x);
    let r = l.sub(x, n);
    let mut p = l.splat(0.001_330_060_5);
    for c in COEFFICIENTS {
        p = l.mul_add(p, r, l.splat(c));
    }
    l.times_power_of_two(l.mul_add(p, r, l.splat(1.0)), n)
}
