//! Attention over stored words for the heads of many tokens that read a block: its values lie in pairs of rows, and
//! keys by column where they are narrow.
//!
//! A vector has two values of 16 keys then, so nothing is folded across lanes. The partial sums are those of `stored`,
//! and sums of words are exact: the bits are the same.

use super::integer::{ROWS_ALIKE, WordHeads, weights};
use super::softmax::exponentials;
use super::stored::{InPlace, LINE_WORDS, Pairs, StoredBlock, VALUES_ALIKE, add_values, lines, partial_bits, scores};
use super::words::{Line, ROW_PAIRS, TOGETHER, Widths};
use super::{Ahead, ROWS, ask};
use crate::level::Level;
use crate::simd::{LANES, Words, on_level};

/// Rows that are multiplied at once.
const COLUMN_ROWS: usize = 2 * LANES;

/// Widest keys that are multiplied by column: those of a block stay in a core's first cache.
const COLUMNS_MAX: usize = 4 * VALUES_ALIKE;

/// True when keys may be multiplied by column.
pub(crate) fn can_be_columns(widths: Widths) -> bool {
    !widths.absorbed && widths.rope <= COLUMNS_MAX
}

/// A block's keys by column where [`can_be_columns`] says so, and its values in pairs of rows.
#[derive(Debug, Default)]
pub(crate) struct ColumnBlock {
    /// `[32 rows][pair of values][16 rows]`.
    keys: Vec<Line>,
    /// `[TOGETHER vectors][pair of rows][vector]`, in the level's order.
    values: Vec<Line>,
}

impl ColumnBlock {
    /// Takes the place of what was there before.
    pub(crate) fn fill(&mut self, level: Level, block: &StoredBlock<'_>) {
        let pairs = if can_be_columns(block.units.widths) { block.units.widths.key_lines() * LANES } else { 0 };
        self.keys.resize(pairs * ROWS / LANES, Line::ZERO);
        let groups = (block.units.widths.latent / LANES).div_ceil(TOGETHER);
        self.values.resize(groups * ROW_PAIRS * TOGETHER, Line::ZERO);
        fill(level, block, self);
    }
}

on_level! {
    fn fill(block: &StoredBlock<'_>, to: &mut ColumnBlock) = fill_body
}

#[inline(always)]
fn fill_body<L: Words>(l: L, block: &StoredBlock<'_>, to: &mut ColumnBlock) {
    if can_be_columns(block.units.widths) {
        fill_columns(l, block, &mut to.keys);
    }
    let latent_lines = block.units.widths.latent / LINE_WORDS;
    for part in 0..block.rows.len().div_ceil(ROWS_ALIKE) {
        for pair in 0..LANES {
            for at in 0..latent_lines {
                let [a, b] = InPlace(block).load::<L, 2>(l, part, pair, 2 * at);
                let group = at / (TOGETHER / 2) * ROW_PAIRS + part * LANES + pair;
                let values = &mut to.values[group * TOGETHER + at % (TOGETHER / 2) * 2..][..2];
                l.store_i(a, &mut values[0].0);
                l.store_i(b, &mut values[1].0);
            }
        }
    }
}

#[inline(always)]
fn fill_columns<L: Words>(l: L, block: &StoredBlock<'_>, to: &mut [Line]) {
    let pairs = block.units.widths.key_lines() * LANES;
    for tile in 0..block.rows.len().div_ceil(LANES) {
        let columns = &mut to[tile / 2 * 2 * pairs..][..2 * pairs];
        for line in 0..block.units.widths.key_lines() {
            let mut square = [l.splat(0.0); LANES];
            for (r, square) in square.iter_mut().enumerate() {
                *square = l.as_float(l.load_i(&lines(block.row(tile * LANES + r).rope)[line]));
            }
            let square = l.transpose(&square);
            for (column, v) in columns[line * LINE_WORDS..].iter_mut().skip(tile % 2).step_by(2).zip(square) {
                l.store_i(l.bits(v), &mut column.0);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Filled<'b>(&'b [[Line; TOGETHER]]);

impl Pairs for Filled<'_> {
    #[inline(always)]
    fn load<L: Words, const V: usize>(self, l: L, part: usize, pair: usize, at: usize) -> [L::I; V] {
        let from = &self.0[at / TOGETHER * ROW_PAIRS + part * LANES + pair][at % TOGETHER..][..V];
        let mut values = [l.splat_i(0); V];
        for v in 0..V {
            values[v] = l.load_ints(&from[v].0);
        }
        values
    }
}

/// As [`attend_stored`], from what was made of the block; head h sees the first `seen[h]` rows.
pub(crate) fn attend_columns(
    level: Level,
    block: &StoredBlock<'_>,
    columns: &ColumnBlock,
    seen: &[usize],
    ahead: &[&[u8]],
    heads: &mut WordHeads<'_>,
) {
    for_heads!(heads, attend_by_column(level, block, columns, seen, ahead, heads));
}

on_level! {
    fn attend_by_column<const H: usize>(
        block: &StoredBlock<'_>,
        columns: &ColumnBlock,
        seen: &[usize],
        ahead: &[&[u8]],
        heads: &mut WordHeads<'_>,
    ) = attend_by_column_body
}

#[inline(always)]
fn attend_by_column_body<L: Words, const H: usize>(
    l: L,
    block: &StoredBlock<'_>,
    columns: &ColumnBlock,
    seen: &[usize],
    ahead: &[&[u8]],
    heads: &mut WordHeads<'_>,
) {
    let seen: [usize; H] = std::array::from_fn(|h| seen[h]);
    let most = seen.iter().copied().max().unwrap_or(0);
    let mut p = [[0.0; ROWS]; H];
    if can_be_columns(block.units.widths) {
        ask(l, &mut Ahead { rows: ahead, share: ahead.len(), rest: 0 }, ROWS);
        column_scores::<L, H>(l, block, columns, most, heads.q, &mut p);
    } else {
        scores::<L, H>(l, &StoredBlock { rows: &block.rows[..most], ..*block }, ahead, heads.q, &mut p);
    }
    let scales = std::array::from_fn(|h| heads.scales[h]);
    let shrink = exponentials(l, &mut p, &seen, &scales, heads.states);
    let weights = weights(l, &mut p, &block.units.value, &seen);
    add_values::<L, _, H>(l, Filled(columns.values.as_chunks().0), most, &weights, &shrink, heads);
}

/// `q[h] . key[row]` in units of the query, for the first `n` rows.
#[inline(always)]
fn column_scores<L: Words, const H: usize>(
    l: L,
    block: &StoredBlock<'_>,
    columns: &ColumnBlock,
    n: usize,
    q: &[Line],
    out: &mut [[f32; ROWS]; H],
) {
    match partial_bits(block.units.widths) {
        0 => partial_scores::<L, H, 0>(l, block, columns, n, q, out),
        1 => partial_scores::<L, H, 1>(l, block, columns, n, q, out),
        _ => partial_scores::<L, H, 2>(l, block, columns, n, q, out),
    }
}

/// As [`column_scores`], in 2^`BITS` partial sums.
#[inline(always)]
fn partial_scores<L: Words, const H: usize, const BITS: i32>(
    l: L,
    block: &StoredBlock<'_>,
    columns: &ColumnBlock,
    n: usize,
    q: &[Line],
    out: &mut [[f32; ROWS]; H],
) {
    let lines = block.units.widths.key_lines();
    let q: [&[Line]; H] = std::array::from_fn(|h| &q[h * lines..(h + 1) * lines]);
    for (half, columns) in columns.keys.chunks_exact(2 * lines * LANES).enumerate().take(n.div_ceil(COLUMN_ROWS)) {
        let columns = columns.as_chunks::<2>().0;
        let mut totals = [[l.splat_i(0); 2]; H];
        for partial in 0..1 << BITS {
            let mut sums = [[l.begin(l.splat_i(0)); 2]; H];
            for line in 0..lines {
                let columns = &columns[line * LANES..][..LANES];
                let q: [&[i32; LANES]; H] = std::array::from_fn(|h| &q[h][line].0);
                for at in (partial..LANES).step_by(1 << BITS) {
                    let keys = [l.load_ints(&columns[at][0].0), l.load_ints(&columns[at][1].0)];
                    for h in 0..H {
                        let q = l.splat_i(q[h][at]);
                        for t in 0..2 {
                            sums[h][t] = l.dot_words(sums[h][t], q, keys[t]);
                        }
                    }
                }
            }
            for h in 0..H {
                for t in 0..2 {
                    totals[h][t] = l.add_i(totals[h][t], l.shift_right(l.end(sums[h][t]), BITS));
                }
            }
        }
        for h in 0..H {
            for (t, total) in totals[h].iter().enumerate() {
                let units = l.load(&block.units.key.as_chunks().0[2 * half + t]);
                l.store(l.mul(l.to_float(*total), units), &mut out[h].as_chunks_mut().0[2 * half + t]);
            }
        }
    }
}
