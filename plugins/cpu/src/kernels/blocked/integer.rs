//! Attention over a block of words: scores, and the weighted sum of values, in integers.
//!
//! A score is one sum for each lane, shifted and added. Weights are rounded anew for each head and block, in a unit in
//! which they sum to what has room in 32 bits.

use super::softmax::{Softmax, exponentials};
use super::words::{FACTORS, Line, ROW_PAIRS, TOGETHER, WORD_MAX, WordBlock};
use super::{Ahead, ROWS, ask};
use crate::level::Level;
use crate::simd::{LANES, Words, on_level};

/// Most heads that share a pass over a block of words: their sums with four rows fill the registers; a NEON level's do
/// with one row.
pub(crate) const WORD_HEADS_MAX: usize = if cfg!(target_arch = "aarch64") { 3 } else { 6 };

/// What a lane's sum is shifted by, so that those of all lanes can be added: log2 of [`LANES`].
pub(super) const SUM_SHIFT: i32 = LANES.ilog2() as i32;

/// Less than this weights do not sum to in any block that counts.
const WEIGHTS_MIN: f32 = 1e-30;

/// Some heads, of one token or of several that list the same rows.
#[derive(Debug)]
pub(crate) struct WordHeads<'a> {
    /// Queries `[head][line of a key]`, by [`super::round_query`].
    pub(crate) q: &'a [Line],
    /// Unit of each head's query, times the softmax scale.
    pub(crate) scales: &'a [f32],
    pub(crate) states: &'a mut [Softmax],
    /// Sums `[head][latent width]`, packed.
    pub(crate) out: &'a mut [f32],
}

/// Adds the first `n` rows of a block to the heads' softmaxes. Memory is asked for the rows `ahead` meanwhile.
pub(crate) fn attend_words(level: Level, block: &WordBlock, n: usize, ahead: &[&[u8]], heads: &mut WordHeads<'_>) {
    debug_assert!((1..=ROWS).contains(&n), "of a block");
    for_heads!(heads, attend(level, block, n, ahead, heads));
}

on_level! {
    fn attend<const H: usize>(block: &WordBlock, n: usize, ahead: &[&[u8]], heads: &mut WordHeads<'_>) = attend_body
}

#[inline(always)]
fn attend_body<L: Words, const H: usize>(
    l: L,
    block: &WordBlock,
    n: usize,
    ahead: &[&[u8]],
    heads: &mut WordHeads<'_>,
) {
    let mut p = [[0.0; ROWS]; H];
    scores::<L, H>(l, block, n, ahead, heads.q, &mut p);
    let scales = std::array::from_fn(|h| heads.scales[h]);
    let shrink = exponentials(l, &mut p, &[n; H], &scales, heads.states);
    let weights = weights(l, &mut p, &block.units.value, &[n; H]);
    let width = heads.out.len() / H / LANES;
    let mut at = 0;
    while L::REGISTERS == 1 && at + TOGETHER <= width {
        weigh::<L, H, TOGETHER>(l, block, heads, at, n, &weights, &shrink);
        at += TOGETHER;
    }
    for at in at..width {
        weigh::<L, H, 1>(l, block, heads, at, n, &weights, &shrink);
    }
}

/// `q[h] . key[row]` in units of the query, for the first `n` rows.
#[inline(always)]
fn scores<L: Words, const H: usize>(
    l: L,
    block: &WordBlock,
    n: usize,
    ahead: &[&[u8]],
    q: &[Line],
    out: &mut [[f32; ROWS]; H],
) {
    let mut ahead = Ahead { rows: ahead, share: ahead.len(), rest: 0 };
    let lines = block.key_lines;
    let q: [&[Line]; H] = std::array::from_fn(|h| &q[h * lines..(h + 1) * lines]);
    for tile in 0..n.div_ceil(LANES) {
        // Rows j, j + 4, j + 8 and j + 12; at those that are missing nobody looks.
        let mut folded = [[l.splat_i(0); 4]; H];
        for j in 0..(n - tile * LANES).min(4) {
            ask(l, &mut ahead, 4);
            let first = tile * LANES + j;
            let mut totals = [[l.splat_i(0); 4]; H];
            if L::REGISTERS == 1 {
                totals = dot_rows::<L, H, 4>(l, block, first, &q);
            } else {
                for r in 0..4 {
                    let one = dot_rows::<L, H, 1>(l, block, first + 4 * r, &q);
                    for (totals, [one]) in totals.iter_mut().zip(one) {
                        totals[r] = one;
                    }
                }
            }
            for (folded, totals) in folded.iter_mut().zip(&totals) {
                folded[j] = l.fold_ints(totals);
            }
        }
        let units = l.load(&block.units.key.as_chunks().0[tile]);
        for (folded, out) in folded.iter().zip(&mut *out) {
            let totals = l.to_float(l.finish_ints(folded));
            l.store(l.mul(totals, units), &mut out.as_chunks_mut().0[tile]);
        }
    }
}

/// The lanes' sums, shifted, of each head with R rows: `first`, `first + 4`, ...
#[inline(always)]
fn dot_rows<L: Words, const H: usize, const R: usize>(
    l: L,
    block: &WordBlock,
    first: usize,
    q: &[&[Line]; H],
) -> [[L::I; R]; H] {
    let lines = block.key_lines;
    let keys: [&[Line]; R] = std::array::from_fn(|r| &block.keys[(first + 4 * r) * lines..][..lines]);
    let mut sums = [[l.begin(l.splat_i(0)); R]; H];
    add_products(l, &keys, q, 0, block.latent_lines, &mut sums);
    if block.latent_lines > 0 {
        for r in 0..R {
            let shift = block.units.shift[first + 4 * r];
            for sums in &mut sums {
                sums[r] = l.begin(l.shift_right(l.end(sums[r]), shift));
            }
        }
    }
    add_products(l, &keys, q, block.latent_lines, lines, &mut sums);
    let mut totals = [[l.splat_i(0); R]; H];
    for h in 0..H {
        for r in 0..R {
            totals[h][r] = l.shift_right(l.end(sums[h][r]), SUM_SHIFT);
        }
    }
    totals
}

/// Adds the products of lines `from..to`.
#[inline(always)]
fn add_products<L: Words, const H: usize, const R: usize>(
    l: L,
    keys: &[&[Line]; R],
    q: &[&[Line]; H],
    from: usize,
    to: usize,
    sums: &mut [[L::Sums; R]; H],
) {
    let keys: [&[Line]; R] = std::array::from_fn(|r| &keys[r][from..to]);
    let q: [&[Line]; H] = std::array::from_fn(|h| &q[h][from..to]);
    for i in 0..to - from {
        let mut key = [l.splat_i(0); R];
        for r in 0..R {
            key[r] = l.load_ints(&keys[r][i].0);
        }
        for h in 0..H {
            let q = l.load_ints(&q[h][i].0);
            for r in 0..R {
                sums[h][r] = l.dot_words(sums[h][r], q, key[r]);
            }
        }
    }
}

/// Rows whose weights have a unit of their own: the fewer, the finer. Halves of a pair are [`LANES`] apart.
pub(super) const ROWS_ALIKE: usize = 2 * LANES;
const PARTS: usize = ROWS / ROWS_ALIKE;

/// Of one head, for a block.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    /// By pair of rows.
    pub(super) words: [[i32; LANES]; PARTS],
    pub(super) units: [f32; PARTS],
}

/// Rounds each head's weights of the first `seen` rows. What is left of `p` is of no use.
#[inline(always)]
pub(super) fn weights<L: Words, const H: usize>(
    l: L,
    p: &mut [[f32; ROWS]; H],
    values: &[f32; ROWS],
    seen: &[usize; H],
) -> [Weights; H] {
    #[allow(clippy::cast_precision_loss, reason = "32")]
    let limit = FACTORS - ROWS_ALIKE as f32; // rounding adds half of a unit to each, at most
    let (mut sums, mut most) = ([l.splat(0.0); LANES], [l.splat(0.0); LANES]);
    for (h, p) in p.iter_mut().enumerate() {
        for (p, unit) in p.as_chunks_mut().0.iter_mut().zip(values.as_chunks().0) {
            l.store(l.mul(l.load(p), l.load(unit)), p);
        }
        if seen[h] < ROWS {
            p[seen[h]..].fill(0.0);
        }
        for (part, p) in p.as_chunks::<ROWS_ALIKE>().0.iter().enumerate() {
            let lanes = p.as_chunks().0;
            let (a, b) = (l.load(&lanes[0]), l.load(&lanes[1]));
            (sums[h * PARTS + part], most[h * PARTS + part]) = (l.add(a, b), l.max(a, b));
        }
    }
    let (mut totals, mut units, mut inverses) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    let sums = l.sums(&sums);
    let unit = l.max(l.mul(l.maxima(&most), l.splat(1.0 / WORD_MAX)), l.mul(sums, l.splat(1.0 / limit)));
    l.store(sums, &mut totals);
    l.store(unit, &mut units);
    l.store(l.div(l.splat(1.0), unit), &mut inverses);
    for ((total, unit), inverse) in totals.iter().zip(&mut units).zip(&mut inverses) {
        (*unit, *inverse) = match *total {
            total if total.is_nan() => (f32::NAN, 0.0),
            total if total < WEIGHTS_MIN => (0.0, 0.0),
            _ => (*unit, *inverse),
        };
    }
    let mut weights = [Weights { words: [[0; LANES]; PARTS], units: [0.0; PARTS] }; H];
    for (h, weights) in weights.iter_mut().enumerate() {
        for (part, p) in p[h].as_chunks::<ROWS_ALIKE>().0.iter().enumerate() {
            let (inverse, rows) = (l.splat(inverses[h * PARTS + part]), p.as_chunks().0);
            let (a, b) = (l.round(l.mul(l.load(&rows[0]), inverse)), l.round(l.mul(l.load(&rows[1]), inverse)));
            l.store_i(l.pair_words(a, b), &mut weights.words[part]);
            weights.units[part] = units[h * PARTS + part];
        }
    }
    weights
}

/// `out = out shrink + sum_row weight[row] value[row]` over the first `n` rows, for V vectors of values from vector
/// `at` on.
#[inline(always)]
fn weigh<L: Words, const H: usize, const V: usize>(
    l: L,
    block: &WordBlock,
    heads: &mut WordHeads<'_>,
    at: usize,
    n: usize,
    weights: &[Weights; H],
    shrink: &[f32; H],
) {
    let values = &block.values[at / TOGETHER * ROW_PAIRS * TOGETHER..][..ROW_PAIRS * TOGETHER];
    let (values, first) = (values.as_chunks::<TOGETHER>().0, at % TOGETHER);
    let mut totals = [[l.splat(0.0); V]; H];
    for (part, values) in values.as_chunks::<LANES>().0.iter().enumerate().take(n.div_ceil(ROWS_ALIKE)) {
        let mut sums = [[l.begin(l.splat_i(0)); V]; H];
        for (pair, lines) in values.iter().enumerate().take(n - part * ROWS_ALIKE) {
            let mut value = [l.splat_i(0); V];
            for v in 0..V {
                value[v] = l.load_ints(&lines[first + v].0);
            }
            for h in 0..H {
                let weight = l.splat_i(weights[h].words[part][pair]);
                for v in 0..V {
                    sums[h][v] = l.dot_words(sums[h][v], weight, value[v]);
                }
            }
        }
        for h in 0..H {
            let unit = l.splat(weights[h].units[part]);
            for v in 0..V {
                totals[h][v] = l.mul_add(l.to_float(l.end(sums[h][v])), unit, totals[h][v]);
            }
        }
    }
    let width = heads.out.len() / H;
    for h in 0..H {
        let out = &mut heads.out[h * width..(h + 1) * width].as_chunks_mut().0[at..at + V];
        let shrink = l.splat(shrink[h]);
        for v in 0..V {
            l.store(l.mul_add(l.load(&out[v]), shrink, totals[h][v]), &mut out[v]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::{Case, shapes};
    use super::super::words::{Formats, Widths};
    use super::*;
    use crate::kernels::inputs::{bits, cases};
    use proptest::prelude::*;
    use sparsed_quant::Format;

    const FORMATS: &[Formats] =
        &[[Format::F16; 2], [Format::Q8_0; 2], [Format::F8_128; 2], [Format::Q6_0, Format::Q8_0]];

    proptest! {
        #![proptest_config(cases(64))]
        #[test]
        fn answers_are_within_class_a_for_rows_of_all_sizes(shape in shapes(FORMATS, 200, 6)) {
            Case::check(&shape)?;
        }
    }

    proptest! {
        #![proptest_config(cases(32))]
        /// Of the words that are made of rows and queries, too.
        #[test]
        fn levels_and_head_counts_agree_bit_for_bit(shape in shapes(FORMATS, 130, 12)) {
            let case = Case::new(&shape);
            let scalar = bits(&case.run(Level::Scalar, 1).concat());
            for level in Level::all() {
                for at_once in 1..=WORD_HEADS_MAX {
                    let found = bits(&case.run(level, at_once).concat());
                    prop_assert_eq!(&found, &scalar, "{:?}, {} at once", level, at_once);
                }
            }
        }
    }

    #[test]
    fn rows_of_zeros_and_queries_of_zeros_are_averaged() {
        let widths = Widths { latent: 32, rope: 32, absorbed: true };
        let mut case = Case::seeded(3, [Format::F16; 2], widths, 40, 2);
        case.q[0].fill(0.0);
        case.rows[7].iter_mut().for_each(|part| part.fill(0.0));
        case.rows[8][0].fill(0.0);
        case.rows[9][1].fill(0.0);
        assert!(case.error() < 1e-7, "{:e}", case.error());
        for row in &mut case.rows {
            row.iter_mut().for_each(|part| part.fill(0.0));
        }
        assert_eq!(case.run(Level::detect(), 2), vec![vec![0.0; 32]; 2]);
    }

    #[test]
    fn a_row_or_a_query_that_is_no_number_makes_the_answer_none() {
        let widths = Widths { latent: 32, rope: 32, absorbed: true };
        let case = || Case::seeded(4, [Format::F16; 2], widths, 70, 2);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for level in Level::all() {
                for part in 0..2 {
                    let mut case = case();
                    case.rows[66][part][5] = value;
                    assert!(case.run(level, 2).iter().flatten().all(|v| v.is_nan()), "{level:?} {value}");
                }
                let mut case = case();
                case.q[1][40] = value;
                let answers = case.run(level, 2);
                assert!(answers[1].iter().all(|v| v.is_nan()) && answers[0].iter().all(|v| v.is_finite()));
            }
        }
    }

    #[test]
    fn no_sum_leaves_32_bits_where_all_values_point_the_same_way() {
        let widths = Widths { latent: 64, rope: 32, absorbed: true };
        // All in one lane, or all values the same: what a sum is bounded for.
        for every in [1, LANES] {
            for sign in [1.0, -1.0] {
                let mut case = Case::seeded(5, [Format::F16; 2], widths, ROWS, 1);
                let fill = |v: &mut Vec<f32>, value: f32| {
                    v.iter_mut().enumerate().for_each(|(i, v)| *v = if i % every == 0 { value } else { 0.0 });
                };
                for row in &mut case.rows {
                    row.iter_mut().for_each(|part| fill(part, 65504.0 * sign));
                }
                fill(&mut case.q[0], 3e-6);
                assert!(case.error() < 1e-7, "{:e}", case.error());
            }
        }
    }
}
