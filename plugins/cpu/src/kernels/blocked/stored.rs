//! Attention over rows that the pool has as 16-bit words, multiplied where they lie; `columns` is for many heads.
//!
//! A row's latent slice and its rope slice are words times a power of two each (OPS.md, W16). Sums of words' products
//! are exact as long as they have room in 32 bits, so a key's values are added in a few partial sums, each with a
//! query that is rounded to leave that room; the partial sums are shifted, then added. Which values are in which sum
//! is a function of the widths alone, and so both forms give the same bits.

use super::integer::{ROWS_ALIKE, Weights, WordHeads, weights};
use super::softmax::exponentials;
use super::words::{Bytes, Line, TOGETHER, Widths, are_lines, query_unit};
use super::{Ahead, ROWS, ask};
use crate::level::Level;
use crate::simd::{LANES, Words, on_level};
use sparsed_quant::Format;

/// Words of a line.
pub(super) const LINE_WORDS: usize = 2 * LANES;
/// Values that are multiplied with a lane, at most, before partial sums are made of fewer lanes.
pub(super) const VALUES_ALIKE: usize = 32;

/// A line as the pool has it.
type Stored = [u8; 4 * LANES];

/// Lines of a row's slice.
#[inline(always)]
pub(super) fn lines(slice: &[u8]) -> &[Stored] {
    slice.as_chunks().0
}

/// True when rows of such a format and such widths are multiplied as they are.
pub(crate) fn can_be_stored(format: Format, widths: Widths) -> bool {
    format == Format::W16 && are_lines(widths)
}

/// log2 of the partial sums that a key's products are added in.
pub(super) fn partial_bits(widths: Widths) -> i32 {
    match widths.key_lines() * LINE_WORDS {
        width if width <= VALUES_ALIKE => 0,
        width if width <= 2 * VALUES_ALIKE => 1,
        width if width <= 4 * VALUES_ALIKE => 2,
        _ => 4,
    }
}

/// What the words of up to [`ROWS`] rows are times.
#[derive(Debug)]
pub(crate) struct StoredUnits {
    pub(super) widths: Widths,
    /// Of a score, in 2^[`partial_bits`] partial sums; NaN where a value is none.
    pub(super) key: [f32; ROWS],
    /// Of a latent slice.
    pub(super) value: [f32; ROWS],
    /// How far a latent slice's sums, or a rope slice's words, are shifted to be in the other's unit, where that is
    /// greater.
    shift: [[i32; 2]; ROWS],
}

impl Default for StoredUnits {
    fn default() -> Self {
        Self { widths: Widths::default(), key: [0.0; ROWS], value: [0.0; ROWS], shift: [[0; 2]; ROWS] }
    }
}

impl StoredUnits {
    /// Takes those of a block's rows, whose rope part begins after `latent` bytes. All groups' slices have the same.
    pub(crate) fn take(&mut self, level: Level, rows: &[&[u8]], latent: usize, widths: Widths) {
        debug_assert!(!rows.is_empty() && rows.len() <= ROWS, "a block");
        self.widths = widths;
        take(level, rows, latent, self);
    }
}

on_level! {
    fn take(rows: &[&[u8]], latent: usize, to: &mut StoredUnits) = take_body
}

#[inline(always)]
fn take_body<L: Words>(l: L, rows: &[&[u8]], latent: usize, to: &mut StoredUnits) {
    let mut bits = [[0; ROWS]; 2];
    for (r, row) in rows.iter().enumerate() {
        let (latent, rope) = row.split_at(latent);
        (bits[0][r], bits[1][r]) = (l.unit_bits(&lines(latent)[0]), l.unit_bits(&lines(rope)[0]));
    }
    #[allow(clippy::cast_precision_loss, reason = "16 at most")]
    let partials = (1 << partial_bits(to.widths)) as f32;
    // Bits that say the power of two are in a float's exponent already: 0 is 0 and 255 is infinite, or made a NaN.
    let unit = |bits: i32| f32::from_bits((bits << 23 | (bits + 1) >> 8 << 22).cast_unsigned());
    for (r, (&latent, &rope)) in bits[0].iter().zip(&bits[1]).enumerate() {
        let key = if to.widths.absorbed { latent.max(rope) } else { rope };
        to.value[r] = unit(latent);
        to.key[r] = unit(key) * partials;
        to.shift[r] = [(key - latent).min(31), (key - rope).min(15)];
    }
}

/// Up to [`ROWS`] rows as a head group sees them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredBlock<'a> {
    pub(crate) rows: &'a [Bytes<'a>],
    pub(crate) units: &'a StoredUnits,
}

impl<'a> StoredBlock<'a> {
    /// Row `r`, or in the place of one that is missing the last one: nobody looks at it, or it is weighed with 0.
    #[inline(always)]
    pub(super) fn row(&self, r: usize) -> Bytes<'a> {
        self.rows[r.min(self.rows.len() - 1)]
    }
}

/// Adds a block to the heads' softmaxes. Memory is asked for the rows `ahead` meanwhile.
pub(crate) fn attend_stored(level: Level, block: &StoredBlock<'_>, ahead: &[&[u8]], heads: &mut WordHeads<'_>) {
    for_heads!(heads, attend(level, block, ahead, heads));
}

on_level! {
    fn attend<const H: usize>(block: &StoredBlock<'_>, ahead: &[&[u8]], heads: &mut WordHeads<'_>) = attend_body
}

#[inline(always)]
fn attend_body<L: Words, const H: usize>(l: L, block: &StoredBlock<'_>, ahead: &[&[u8]], heads: &mut WordHeads<'_>) {
    let mut p = [[0.0; ROWS]; H];
    scores::<L, H>(l, block, ahead, heads.q, &mut p);
    let scales = std::array::from_fn(|h| heads.scales[h]);
    let seen = [block.rows.len(); H];
    let shrink = exponentials(l, &mut p, &seen, &scales, heads.states);
    let weights = weights(l, &mut p, &block.units.value, &seen);
    add_values::<L, _, H>(l, InPlace(block), block.rows.len(), &weights, &shrink, heads);
}

/// `q[h] . key[row]` in units of the query.
#[inline(always)]
pub(super) fn scores<L: Words, const H: usize>(
    l: L,
    block: &StoredBlock<'_>,
    ahead: &[&[u8]],
    q: &[Line],
    out: &mut [[f32; ROWS]; H],
) {
    match partial_bits(block.units.widths) {
        0 => partial_scores::<L, H, 0>(l, block, ahead, q, out),
        1 => partial_scores::<L, H, 1>(l, block, ahead, q, out),
        2 => partial_scores::<L, H, 2>(l, block, ahead, q, out),
        _ => partial_scores::<L, H, 4>(l, block, ahead, q, out),
    }
}

/// As [`scores`], in 2^`BITS` partial sums.
#[inline(always)]
fn partial_scores<L: Words, const H: usize, const BITS: i32>(
    l: L,
    block: &StoredBlock<'_>,
    ahead: &[&[u8]],
    q: &[Line],
    out: &mut [[f32; ROWS]; H],
) {
    let mut ahead = Ahead { rows: ahead, share: ahead.len(), rest: 0 };
    let lines = block.units.widths.key_lines();
    let q: [&[Line]; H] = std::array::from_fn(|h| &q[h * lines..(h + 1) * lines]);
    for tile in 0..block.rows.len().div_ceil(LANES) {
        let mut folded = [[l.splat_i(0); 4]; H];
        for j in 0..(block.rows.len() - tile * LANES).min(4) {
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
            for (folded, totals) in folded.iter_mut().zip(&mut totals) {
                if BITS == 4 {
                    totals.iter_mut().for_each(|v| *v = l.shift_right(*v, BITS));
                }
                folded[j] = l.fold_ints(totals);
                if BITS == 2 {
                    folded[j] = l.shift_right(folded[j], BITS);
                }
            }
        }
        let units = l.load(&block.units.key.as_chunks().0[tile]);
        for (folded, out) in folded.iter().zip(&mut *out) {
            let [mut a, mut b] = l.pair_up_ints(folded);
            if BITS == 1 {
                (a, b) = (l.shift_right(a, BITS), l.shift_right(b, BITS));
            }
            let totals = l.to_float(l.finish_pairs(a, b));
            l.store(l.mul(totals, units), &mut out.as_chunks_mut().0[tile]);
        }
    }
}

/// The lanes' sums of each head with R rows: `first`, `first + 4`, ...
#[inline(always)]
fn dot_rows<L: Words, const H: usize, const R: usize>(
    l: L,
    block: &StoredBlock<'_>,
    first: usize,
    q: &[&[Line]; H],
) -> [[L::I; R]; H] {
    let latent_lines = block.units.widths.latent_lines();
    let mut sums = [[l.begin(l.splat_i(0)); R]; H];
    if latent_lines > 0 {
        let keys: [&[Stored]; R] = std::array::from_fn(|r| lines(block.row(first + 4 * r).latent));
        add_products::<L, H, R, false>(l, &keys, q, 0..latent_lines, &[0; R], &mut sums);
        for r in 0..R {
            let shift = block.units.shift[first + 4 * r][0];
            for sums in &mut sums {
                sums[r] = l.begin(l.shift_right(l.end(sums[r]), shift));
            }
        }
    }
    let keys: [&[Stored]; R] = std::array::from_fn(|r| lines(block.row(first + 4 * r).rope));
    if latent_lines > 0 {
        let shifts = std::array::from_fn(|r| block.units.shift[first + 4 * r][1]);
        add_products::<L, H, R, true>(l, &keys, q, latent_lines..q[0].len(), &shifts, &mut sums);
    } else {
        add_products::<L, H, R, false>(l, &keys, q, 0..q[0].len(), &[0; R], &mut sums);
    }
    let mut totals = [[l.splat_i(0); R]; H];
    for h in 0..H {
        for r in 0..R {
            totals[h][r] = l.end(sums[h][r]);
        }
    }
    totals
}

/// Adds the products of the queries' lines `own` with keys, whose words are shifted first where `SHIFTED`.
#[inline(always)]
fn add_products<L: Words, const H: usize, const R: usize, const SHIFTED: bool>(
    l: L,
    keys: &[&[Stored]; R],
    q: &[&[Line]; H],
    own: std::ops::Range<usize>,
    shifts: &[i32; R],
    sums: &mut [[L::Sums; R]; H],
) {
    let n = own.len();
    let keys: [&[Stored]; R] = std::array::from_fn(|r| &keys[r][..n]);
    let q: [&[Line]; H] = std::array::from_fn(|h| &q[h][own.clone()]);
    for i in 0..n {
        let mut key = [l.splat_i(0); R];
        for r in 0..R {
            key[r] = l.load_i(&keys[r][i]);
            if SHIFTED {
                key[r] = l.shift_words(key[r], shifts[r]);
            }
        }
        for h in 0..H {
            let q = l.load_ints(&q[h][i].0);
            for r in 0..R {
                sums[h][r] = l.dot_words(sums[h][r], q, key[r]);
            }
        }
    }
}

/// Values of a block, two rows together.
pub(super) trait Pairs: Copy {
    /// V vectors from vector `at` on of rows `pair` and `pair` + 16 of a part, in the level's order.
    fn load<L: Words, const V: usize>(self, l: L, part: usize, pair: usize, at: usize) -> [L::I; V];
}

#[derive(Clone, Copy)]
pub(super) struct InPlace<'b, 'a>(pub(super) &'b StoredBlock<'a>);

impl Pairs for InPlace<'_, '_> {
    #[inline(always)]
    fn load<L: Words, const V: usize>(self, l: L, part: usize, pair: usize, at: usize) -> [L::I; V] {
        let (a, b) = (self.0.row(part * ROWS_ALIKE + pair), self.0.row(part * ROWS_ALIKE + pair + LANES));
        let (a, b) = (&lines(a.latent)[at / 2..][..V / 2], &lines(b.latent)[at / 2..][..V / 2]);
        let mut values = [l.splat_i(0); V];
        for i in 0..V / 2 {
            [values[2 * i], values[2 * i + 1]] = l.zip_words(l.load_i(&a[i]), l.load_i(&b[i]));
        }
        values
    }
}

#[inline(always)]
pub(super) fn add_values<L: Words, P: Pairs, const H: usize>(
    l: L,
    values: P,
    n: usize,
    weights: &[Weights; H],
    shrink: &[f32; H],
    heads: &mut WordHeads<'_>,
) {
    let width = heads.out.len() / H / LANES;
    let mut at = 0;
    // Sums of a part and totals of those before it are in registers together: more heads, fewer vectors.
    while L::REGISTERS == 1 && H <= 3 && at + TOGETHER <= width {
        weigh::<L, P, H, TOGETHER>(l, values, heads, at, n, weights, shrink);
        at += TOGETHER;
    }
    for at in (at..width).step_by(2) {
        weigh::<L, P, H, 2>(l, values, heads, at, n, weights, shrink);
    }
}

/// `out = out shrink + sum_row weight[row] value[row]` over the first `n` rows, for V vectors of values from vector
/// `at` on.
#[inline(always)]
fn weigh<L: Words, P: Pairs, const H: usize, const V: usize>(
    l: L,
    values: P,
    heads: &mut WordHeads<'_>,
    at: usize,
    n: usize,
    weights: &[Weights; H],
    shrink: &[f32; H],
) {
    let mut totals = [[l.splat(0.0); V]; H];
    for part in 0..n.div_ceil(ROWS_ALIKE) {
        let mut sums = [[l.begin(l.splat_i(0)); V]; H];
        for pair in 0..(n - part * ROWS_ALIKE).min(LANES) {
            let value = values.load::<L, V>(l, part, pair, at);
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
        for v in (0..V).step_by(2) {
            let [a, b] = l.zipped_in_order([totals[h][v], totals[h][v + 1]]);
            l.store(l.mul_add(l.load(&out[v]), shrink, a), &mut out[v]);
            l.store(l.mul_add(l.load(&out[v + 1]), shrink, b), &mut out[v + 1]);
        }
    }
}

/// Rounds a head's query (for the rope slice, then for the latent slice) to words beside those of a stored key, the
/// latent part first, and returns what they are times: NaN for a query that is not finite.
///
/// What is multiplied with a partial sum's values sums to [`super::words::FACTORS`] at most, so that it has room in 32
/// bits.
pub(crate) fn round_stored_query(level: Level, q: &[f32], widths: Widths, to: &mut [Line]) -> f32 {
    round_pairs(level, q, widths.rope, partial_bits(widths), to)
}

on_level! {
    fn round_pairs(q: &[f32], rope: usize, bits: i32, to: &mut [Line]) -> f32 = round_pairs_body
}

#[inline(always)]
fn round_pairs_body<L: Words>(l: L, q: &[f32], rope: usize, bits: i32, to: &mut [Line]) -> f32 {
    let zero = l.splat(0.0);
    // Of a line's first and second half.
    let (mut sums, mut most) = ([zero; 2], zero);
    for v in q.as_chunks::<LINE_WORDS>().0 {
        for (sums, v) in sums.iter_mut().zip(v.as_chunks().0) {
            let v = l.load(v);
            let magnitude = l.max(v, l.sub(zero, v)); // in this order a NaN stays
            (*sums, most) = (l.add(*sums, magnitude), l.max(magnitude, most));
        }
    }
    let mut halves = [[0.0; LANES]; 2];
    l.store(sums[0], &mut halves[0]);
    l.store(sums[1], &mut halves[1]);
    let mut partials = [0.0; LANES];
    for (i, sum) in halves.as_flattened().iter().enumerate() {
        partials[i / 2 % (1 << bits)] += sum;
    }
    let Some((unit, inverse)) = query_unit(&partials, q.len() >> bits, l.largest(most)) else { return f32::NAN };
    let (rope, latent) = q.split_at(rope);
    let inverse = l.splat(inverse);
    for (v, to) in latent.as_chunks::<LINE_WORDS>().0.iter().chain(rope.as_chunks().0).zip(to) {
        let halves = v.as_chunks().0;
        let (a, b) = (l.round(l.mul(l.load(&halves[0]), inverse)), l.round(l.mul(l.load(&halves[1]), inverse)));
        l.store_i(l.pack_words(a, b), &mut to.0);
    }
    unit
}

#[cfg(test)]
mod tests {
    use super::super::case::{Case, MLA, Shape, shapes};
    use super::super::integer::WORD_HEADS_MAX;
    use super::super::words::Formats;
    use super::*;
    use crate::kernels::inputs::{bits, cases};
    use proptest::prelude::*;

    const PLAIN: Widths = Widths { latent: 64, rope: 64, absorbed: false };
    const FORMATS: &[Formats] = &[[Format::W16; 2]];

    proptest! {
        #![proptest_config(cases(32))]
        #[test]
        fn answers_are_within_class_a_for_rows_of_all_sizes(shape in shapes(FORMATS, 200, 6)) {
            Case::check(&shape)?;
        }

        /// Of the words that are made of queries, too.
        #[test]
        fn levels_head_counts_and_columns_agree_bit_for_bit(shape in shapes(FORMATS, 130, 12)) {
            let case = Case::new(&shape);
            let scalar = bits(&case.run_stored(Level::Scalar, 1, false).concat());
            for (level, by_column) in Level::all().flat_map(|level| [(level, false), (level, true)]) {
                for at_once in 1..=WORD_HEADS_MAX {
                    let found = bits(&case.run_stored(level, at_once, by_column).concat());
                    prop_assert_eq!(&found, &scalar, "{:?}, {} at once, prepared: {}", level, at_once, by_column);
                }
            }
        }

        #[test]
        fn a_head_that_sees_fewer_rows_of_the_columns_gives_what_it_gives_with_those_alone(
            shape in shapes(FORMATS, ROWS, 12), seen in proptest::collection::vec(1..=ROWS, 1..=WORD_HEADS_MAX),
        ) {
            let whole = Case::new(&Shape { rows: ROWS, heads: seen.len(), ..shape });
            for level in Level::all() {
                let together = whole.run_seeing(level, &seen);
                for (head, &n) in seen.iter().enumerate() {
                    let mut alone = whole.clone();
                    alone.rows.truncate(n);
                    let alone = &alone.run_stored(level, WORD_HEADS_MAX, false)[head];
                    prop_assert_eq!(bits(&together[head]), bits(alone), "{:?}, {} rows", level, n);
                }
            }
        }
    }

    #[test]
    fn rows_and_queries_of_zeros_are_averaged_and_what_is_no_number_makes_the_answer_none() {
        for widths in [Widths { latent: 32, rope: 32, absorbed: true }, PLAIN] {
            let case = || Case::seeded(4, [Format::W16; 2], widths, 70, 2);
            let mut zeros = case();
            zeros.q[0].fill(0.0);
            zeros.rows[7].iter_mut().for_each(|part| part.fill(0.0));
            zeros.rows[8][0].fill(0.0);
            zeros.rows[9][1].fill(0.0);
            assert!(zeros.error() < 1e-7, "{:e}", zeros.error());
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for (level, by_column) in Level::all().flat_map(|level| [(level, false), (level, true)]) {
                    for part in 0..2 {
                        let mut case = case();
                        case.rows[66][part][5] = value;
                        let answers = case.run_stored(level, 2, by_column);
                        assert!(answers.iter().flatten().all(|v| v.is_nan()), "{level:?} {value}");
                    }
                    let mut case = case();
                    case.q[1][20] = value;
                    let answers = case.run_stored(level, 2, by_column);
                    assert!(answers[1].iter().all(|v| v.is_nan()) && answers[0].iter().all(|v| v.is_finite()));
                }
            }
        }
    }

    #[test]
    fn no_sum_leaves_32_bits_where_all_values_point_the_same_way() {
        for widths in [Widths { latent: 64, rope: 32, absorbed: true }, PLAIN, MLA] {
            // All in one partial sum, or all values the same: what a sum is bounded for.
            for every in [1, 2, 4, 2 * LANES] {
                for sign in [1.0, -1.0] {
                    let mut case = Case::seeded(5, [Format::W16; 2], widths, ROWS, 1);
                    let fill = |v: &mut Vec<f32>, value: f32| {
                        v.iter_mut().enumerate().for_each(|(i, v)| *v = if i % every == 0 { value } else { 0.0 });
                    };
                    let below = f32::from_bits(32.0f32.to_bits() - 1);
                    case.rows.iter_mut().for_each(|row| row.iter_mut().for_each(|part| fill(part, below * sign)));
                    fill(&mut case.q[0], 3e-3);
                    assert!(case.error() < 1e-7, "{widths:?}, every {every}: {:e}", case.error());
                }
            }
        }
    }
}
