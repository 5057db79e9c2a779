//! How do the scores of a block of rows join a running softmax?

use super::ROWS;
use crate::simd::{LANES, Lanes};

/// The running softmax of one head.
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

/// Turns the first `n` scores of each head, times its scale, into exp(score - max) and the others into 0; returns what
/// earlier sums shrink by.
#[inline(always)]
pub(super) fn exponentials<L: Lanes, const H: usize>(
    l: L,
    p: &mut [[f32; ROWS]; H],
    n: usize,
    scales: &[f32; H],
    states: &mut [Softmax],
) -> [f32; H] {
    let (mut largest, mut change, mut sums) = ([0.0; H], [0.0; LANES], [l.splat(0.0); LANES]);
    for (h, p) in p.iter_mut().enumerate() {
        for z in p.as_chunks_mut().0 {
            l.store(l.mul(l.load(z), l.splat(scales[h])), z);
        }
        p[n..].fill(f32::NEG_INFINITY);
        let mut most = l.splat(states[h].max);
        for z in p.as_chunks().0 {
            most = l.max(most, l.load(z));
        }
        largest[h] = l.largest(most);
        change[h] = states[h].max - largest[h];
    }
    let mut shrink = [0.0; LANES];
    l.store(exp(l, l.load(&change)), &mut shrink);
    for (h, p) in p.iter_mut().enumerate() {
        let max = l.splat(largest[h]);
        for p in p.as_chunks_mut().0 {
            l.store(exp(l, l.sub(l.load(p), max)), p);
        }
        p[n..].fill(0.0);
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

/// e^x for x <= 0: x = n ln 2 + r, a polynomial of degree 6 in r, then n goes into the exponent. Relative error below
/// 3e-7 down to -87; below that e^-87, nothing beside the block's 1.
#[inline(always)]
fn exp<L: Lanes>(l: L, x: L::F) -> L::F {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = l.max(l.splat(-87.0), x); // in this order a NaN stays
    let n = l.round_f(l.mul(x, l.splat(std::f32::consts::LOG2_E)));
    let r = l.mul_add(n, l.splat(-LN2_LOW), l.mul_add(n, l.splat(-LN2_HIGH), x));
    let mut p = l.splat(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = l.mul_add(p, r, l.splat(c));
    }
    l.mul(p, l.power_of_two(n))
}
