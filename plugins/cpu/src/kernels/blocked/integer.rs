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
    let shrink = exponentials(l, &mut p, n, &scales, heads.states);
    let weights = weights(l, &mut p, &block.units.value, n);
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
const ROWS_ALIKE: usize = 2 * LANES;
const PARTS: usize = ROWS / ROWS_ALIKE;

/// Of one head, for a block.
#[derive(Clone, Copy)]
struct Weights {
    /// By pair of rows.
    words: [[i32; LANES]; PARTS],
    units: [f32; PARTS],
}

/// Rounds each head's weights of the first `n` rows. What is left of `p` is of no use.
#[inline(always)]
fn weights<L: Words, const H: usize>(l: L, p: &mut [[f32; ROWS]; H], values: &[f32; ROWS], n: usize) -> [Weights; H] {
    #[allow(clippy::cast_precision_loss, reason = "32")]
    let limit = FACTORS - ROWS_ALIKE as f32; // rounding adds half of a unit to each, at most
    let (mut sums, mut most) = ([l.splat(0.0); LANES], [[0.0; PARTS]; H]);
    for (h, p) in p.iter_mut().enumerate() {
        for (p, unit) in p.as_chunks_mut().0.iter_mut().zip(values.as_chunks().0) {
            l.store(l.mul(l.load(p), l.load(unit)), p);
        }
        p[n..].fill(0.0);
        for (part, p) in p.as_chunks::<ROWS_ALIKE>().0.iter().enumerate() {
            let lanes = p.as_chunks().0;
            let (a, b) = (l.load(&lanes[0]), l.load(&lanes[1]));
            sums[h * PARTS + part] = l.add(a, b);
            most[h][part] = l.largest(l.max(a, b));
        }
    }
    let mut totals = [0.0; LANES];
    l.store(l.sums(&sums), &mut totals);
    let mut weights = [Weights { words: [[0; LANES]; PARTS], units: [0.0; PARTS] }; H];
    for (h, weights) in weights.iter_mut().enumerate() {
        for (part, p) in p[h].as_chunks::<ROWS_ALIKE>().0.iter().enumerate() {
            let unit = (totals[h * PARTS + part] / limit).max(most[h][part] / WORD_MAX);
            let (unit, inverse) = match totals[h * PARTS + part] {
                total if total.is_nan() => (f32::NAN, 0.0),
                total if total < WEIGHTS_MIN => (0.0, 0.0),
                _ => (unit, 1.0 / unit),
            };
            let (inverse, rows) = (l.splat(inverse), p.as_chunks().0);
            let (a, b) = (l.round(l.mul(l.load(&rows[0]), inverse)), l.round(l.mul(l.load(&rows[1]), inverse)));
            l.store_i(l.pair_words(a, b), &mut weights.words[part]);
            weights.units[part] = unit;
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
    use super::super::words::{Bytes, Widths, round_query};
    use super::*;
    use fastrand::Rng;
    use sparsed_quant::Format;

    /// Rows, queries, and what is made of them.
    struct Case {
        format: Format,
        widths: Widths,
        /// `[row][latent slice, rope slice]`
        rows: Vec<[Vec<f32>; 2]>,
        /// `[head][rope, latent]`
        q: Vec<Vec<f32>>,
        scale: f32,
    }

    impl Case {
        /// Values from a distribution with a few large ones; `spread` says how much rows and parts differ in size.
        fn random(random: &mut Rng, format: Format, widths: Widths, rows: usize, heads: usize, spread: i32) -> Self {
            let mut value = |size: f32| {
                let sum: f32 = (0..4).map(|_| random.f32() - 0.5).sum();
                if random.u8(..) == 0 { 8.0 * sum * size } else { sum * size }
            };
            let mut row = |width: usize, size: f32| (0..width).map(|_| value(size)).collect::<Vec<_>>();
            let key = widths.rope + if widths.absorbed { widths.latent } else { 0 };
            let q = (0..heads).map(|_| row(key, 2.0)).collect();
            let mut sizes = Rng::with_seed(rows as u64);
            let mut size = || 2f32.powi(sizes.i32(-spread..=spread));
            let rows = (0..rows).map(|_| [row(widths.latent, size()), row(widths.rope, size())]).collect();
            #[allow(clippy::cast_precision_loss, reason = "a width")]
            let scale = 1.0 / (key as f32).sqrt();
            Self { format, widths, rows, q, scale }
        }

        fn bytes(&self) -> Vec<[Vec<u8>; 2]> {
            let encode = |values: &Vec<f32>| {
                let mut bytes = vec![0; self.format.row_bytes(values.len()).unwrap()];
                sparsed_quant::encode(self.format, values, &mut bytes).unwrap();
                bytes
            };
            self.rows.iter().map(|row| row.each_ref().map(encode)).collect()
        }

        /// The heads' answers, `at_once` at a time.
        fn run(&self, level: Level, at_once: usize) -> Vec<Vec<f32>> {
            let bytes = self.bytes();
            let rows: Vec<_> = bytes.iter().map(|[latent, rope]| Bytes { latent, rope }).collect();
            let mut answers = Vec::new();
            for queries in self.q.chunks(at_once) {
                let lines = self.widths.key_lines();
                let (mut q, mut scales) = (vec![Line::ZERO; queries.len() * lines], Vec::new());
                for (query, q) in queries.iter().zip(q.chunks_exact_mut(lines)) {
                    scales.push(round_query(level, query, self.widths.rope, q) * self.scale);
                }
                let width = self.widths.latent;
                let (mut states, mut out) = (vec![Softmax::EMPTY; queries.len()], vec![0.0; queries.len() * width]);
                let mut block = WordBlock::default();
                for rows in rows.chunks(ROWS) {
                    block.fill(level, self.format, rows, self.widths, &[&bytes[0][0]]);
                    let mut heads = WordHeads { q: &q, scales: &scales, states: &mut states, out: &mut out };
                    attend_words(level, &block, rows.len(), &[&bytes[0][1]], &mut heads);
                }
                states.iter().zip(out.chunks_exact_mut(width)).for_each(|(state, out)| state.finish(out));
                answers.extend(out.chunks_exact(width).map(<[f32]>::to_vec));
            }
            answers
        }

        /// In f64, over the values that the rows decode to.
        fn exact(&self) -> Vec<Vec<f64>> {
            let decode = |bytes: &Vec<u8>| {
                let format = self.format;
                let mut values = vec![0.0; bytes.len() / format.block_bytes() * format.block_values()];
                sparsed_quant::decode(format, bytes, &mut values).unwrap();
                values
            };
            let rows: Vec<_> = self.bytes().iter().map(|row| row.each_ref().map(decode)).collect();
            let answer = |q: &Vec<f32>| {
                let score = |[latent, rope]: &[Vec<f32>; 2]| {
                    let z: f64 =
                        q.iter().zip(rope.iter().chain(latent)).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    z * f64::from(self.scale)
                };
                let z: Vec<f64> = rows.iter().map(score).collect();
                let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = z.iter().map(|z| (z - most).exp()).collect();
                let total: f64 = p.iter().sum();
                let value = |i: usize| rows.iter().zip(&p).map(|([v, _], p)| f64::from(v[i]) * p).sum::<f64>() / total;
                (0..self.widths.latent).map(value).collect()
            };
            self.q.iter().map(answer).collect()
        }

        /// The normalised mean squared error of all answers.
        fn error(&self) -> f64 {
            let (mut wrong, mut whole) = (0.0, 0.0);
            for (found, exact) in self.run(Level::detect(), WORD_HEADS_MAX).iter().zip(self.exact()) {
                for (found, exact) in found.iter().zip(exact) {
                    wrong += (f64::from(*found) - exact).powi(2);
                    whole += exact * exact;
                }
            }
            wrong / whole
        }

        /// What OPS.md's class A allows.
        fn allowed(&self) -> f64 {
            let length = |v: &mut dyn Iterator<Item = &f32>| v.map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let longest = |lengths: &mut dyn Iterator<Item = f64>| lengths.fold(0.0, f64::max);
            let q = longest(&mut self.q.iter().map(|q| length(&mut q.iter())));
            let key = longest(&mut self.rows.iter().map(|row| length(&mut row.iter().flatten())));
            1e-7 + (1e-5 * f64::from(self.scale) * q * key).powi(2)
        }
    }

    const MLA: Widths = Widths { latent: 512, rope: 64, absorbed: true };

    #[test]
    fn answers_are_within_class_a_for_rows_of_all_sizes() {
        let mut random = Rng::with_seed(1);
        let narrow = Widths { latent: 96, rope: 32, absorbed: true };
        let plain = Widths { latent: 128, rope: 128, absorbed: false };
        for widths in [MLA, narrow, plain] {
            for format in [Format::F16, Format::Q8_0] {
                for (rows, spread) in [(64, 0), (200, 0), (64, 3), (200, 6)] {
                    let case = Case::random(&mut random, format, widths, rows, 7, spread);
                    let (error, allowed) = (case.error(), case.allowed());
                    let what = format!("{widths:?}, {}, {rows} rows, spread {spread}", format.name());
                    assert!(error < allowed, "{what}: {error:e}, {allowed:e} allowed");
                    assert!(spread > 0 || error < 1e-7, "{what}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn levels_and_head_counts_agree_bit_for_bit() {
        let mut random = Rng::with_seed(2);
        for (rows, latent, absorbed) in
            [(1, 64, true), (17, 96, true), (63, 32, false), (100, 160, true), (130, 512, true)]
        {
            let widths = Widths { latent, rope: 32, absorbed };
            for format in [Format::F16, Format::Q8_0] {
                let case = Case::random(&mut random, format, widths, rows, 7, 3);
                let scalar = case.run(Level::Scalar, 1);
                let bits = |answers: &[Vec<f32>]| answers.concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                for level in Level::all() {
                    for at_once in 1..=WORD_HEADS_MAX {
                        assert_eq!(bits(&case.run(level, at_once)), bits(&scalar), "{level:?}, {at_once} at once");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_of_zeros_and_queries_of_zeros_are_averaged() {
        let widths = Widths { latent: 32, rope: 32, absorbed: true };
        let mut case = Case::random(&mut Rng::with_seed(3), Format::F16, widths, 40, 2, 0);
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
        let case = || Case::random(&mut Rng::with_seed(4), Format::F16, widths, 70, 2, 0);
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
                let mut case = Case::random(&mut Rng::with_seed(5), Format::F16, widths, ROWS, 1, 0);
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
