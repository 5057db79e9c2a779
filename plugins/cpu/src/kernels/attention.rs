//! Attention of one token over listed rows, and its indexer scores.

use super::dot::{add_scaled_body, dot_body};
use super::elementwise::exp;
use super::{Arithmetic, leveled};

/// Rows that are decoded and softmaxed together. Blocks are counted from the list's first row, so that the order of
/// all sums is a function of the list alone.
pub(crate) const ROWS: usize = 64;

/// The running softmax of one head: `out` holds the sum of exp(z - max) times the latent row so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softmax {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Softmax {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// One head against up to [`ROWS`] decoded rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadBlock<'a> {
    /// Absorbed query, or empty.
    pub(crate) q_latent: &'a [f32],
    pub(crate) q_rope: &'a [f32],
    /// `[n, latent width]`, packed.
    pub(crate) latent: &'a [f32],
    /// `[n, rope width]`, packed.
    pub(crate) rope: &'a [f32],
    pub(crate) n: usize,
    pub(crate) scale: f32,
}

leveled! {
    /// Adds a block of rows to a head's running softmax.
    fn attend(block: HeadBlock<'_>, state: &mut Softmax, out: &mut [f32]) = attend_body
}

leveled! {
    /// `scores[s] = sum_h w[h] relu(q[h] . keys[s])`, q `[heads, width]` and keys `[n, width]` packed.
    fn index_scores(q: &[f32], w: &[f32], keys: &[f32], scores: &mut [f32]) = index_scores_body
}

#[inline(always)]
fn attend_body<A: Arithmetic>(block: HeadBlock<'_>, state: &mut Softmax, out: &mut [f32]) {
    let (width, rope_width) = (out.len(), block.q_rope.len());
    let mut z = [0f32; ROWS];
    let mut largest = state.max;
    for (s, z) in z.iter_mut().enumerate().take(block.n) {
        let mut score = dot_body::<A>(block.q_rope, &block.rope[s * rope_width..(s + 1) * rope_width]);
        if !block.q_latent.is_empty() {
            score += dot_body::<A>(block.q_latent, &block.latent[s * width..(s + 1) * width]);
        }
        *z = score * block.scale;
        largest = largest.max(*z);
    }
    let shrink = if state.max == f32::NEG_INFINITY { 0.0 } else { exp::<A>(state.max - largest) };
    out.iter_mut().for_each(|o| *o *= shrink);
    for z in &mut z[..block.n] {
        *z = exp::<A>(*z - largest);
    }
    let mut sum = state.sum * shrink;
    for (s, p) in z[..block.n].iter().enumerate() {
        sum += p;
        add_scaled_body::<A>(out, *p, &block.latent[s * width..(s + 1) * width]);
    }
    *state = Softmax { max: largest, sum };
}

#[inline(always)]
fn index_scores_body<A: Arithmetic>(q: &[f32], w: &[f32], keys: &[f32], scores: &mut [f32]) {
    let width = q.len() / w.len();
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(width)) {
        *score = 0.0;
        for (q, w) in q.chunks_exact(width).zip(w) {
            *score = A::mul_add(*w, dot_body::<A>(q, key).max(0.0), *score);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{bits, cases, values};
    use crate::level::Level;
    use proptest::prelude::*;

    #[test]
    fn two_blocks_give_the_softmax_of_all_rows() {
        let latent: Vec<f32> = (0..ROWS * 2 * 2).map(|i| (i % 7) as f32 - 3.0).collect();
        let rope: Vec<f32> = (0..ROWS * 2 * 2).map(|i| (i % 5) as f32 * 0.3).collect();
        let (q, scale) = ([0.5f32, -1.0], 0.7);
        let z: Vec<f64> = rope.chunks(2).map(|r| f64::from((r[0] * q[0] + r[1] * q[1]) * scale)).collect();
        let total: f64 = z.iter().map(|z| z.exp()).sum();
        for level in Level::all() {
            let (mut state, mut out) = (Softmax::EMPTY, [0.0; 2]);
            for part in 0..2 {
                let range = part * ROWS * 2..(part + 1) * ROWS * 2;
                let block = HeadBlock {
                    q_latent: &[],
                    q_rope: &q,
                    latent: &latent[range.clone()],
                    rope: &rope[range],
                    n: ROWS,
                    scale,
                };
                attend(level, block, &mut state, &mut out);
            }
            for (i, out) in out.iter().enumerate() {
                let exact: f64 =
                    z.iter().zip(latent.chunks(2)).map(|(z, l)| z.exp() * f64::from(l[i])).sum::<f64>() / total;
                assert!((f64::from(out / state.sum) - exact).abs() < 1e-5, "{level:?}");
            }
        }
    }

    #[test]
    fn index_scores_drop_negative_heads() {
        for level in Level::all() {
            let mut scores = [9.0; 2];
            index_scores(level, &[1.0, 0.0, 0.0, 1.0], &[2.0, -1.0], &[3.0, -1.0, -4.0, 5.0], &mut scores);
            assert_eq!(scores, [6.0, -5.0], "{level:?}");
        }
    }

    /// A running softmax over a whole block and one of `n` rows: its maximum and sum, then what was summed.
    fn softmaxed(
        [q_latent, q_rope, latent, rope]: [&[f32]; 4],
        (width, n): (usize, usize),
        attend: &dyn Fn(HeadBlock<'_>, &mut Softmax, &mut [f32]),
    ) -> Vec<f32> {
        let (mut state, mut out) = (Softmax::EMPTY, vec![0.0; width]);
        for (first, n) in [(0, ROWS), (ROWS, n)] {
            let (latent, rope) = (&latent[first * width..], &rope[first * q_rope.len()..]);
            attend(HeadBlock { q_latent, q_rope, latent, rope, n, scale: 0.2 }, &mut state, &mut out);
        }
        [&[state.max, state.sum], &out[..]].concat()
    }

    proptest! {
        #![proptest_config(cases(64))]
        #[test]
        fn attention_over_decoded_rows_has_the_same_bits_at_every_level(
            inputs in values(2.0), width in 1usize..100, rope_width in 1usize..70, n in 1usize..=ROWS, absorbed: bool,
        ) {
            let mut values = inputs.rows();
            let (q_latent, q_rope) = (values(if absorbed { width } else { 0 }), values(rope_width));
            let (latent, rope) = (values((ROWS + n) * width), values((ROWS + n) * rope_width));
            let at = |level| {
                let rows = [&q_latent[..], &q_rope, &latent, &rope];
                bits(&softmaxed(rows, (width, n), &|block, state, out| attend(level, block, state, out)))
            };
            let scalar = at(Level::Scalar);
            for level in Level::all() {
                prop_assert_eq!(&at(level), &scalar, "{:?}", level);
            }
        }

        #[test]
        fn index_scores_have_the_same_bits_at_every_level(
            inputs in values(1e3), heads in 1usize..20, width in 1usize..150, n in 1usize..20,
        ) {
            let mut values = inputs.rows();
            let (q, w, keys) = (values(heads * width), values(heads), values(n * width));
            let at = |level| {
                let mut scores = vec![9.0; n];
                index_scores(level, &q, &w, &keys, &mut scores);
                bits(&scores)
            };
            let scalar = at(Level::Scalar);
            for level in Level::all() {
                prop_assert_eq!(&at(level), &scalar, "{:?}", level);
            }
        }
    }
}
