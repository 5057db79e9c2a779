//! A block of rows in f32: widened once where heads of many tokens read it.
//!
//! Values lie row by row, keys column by column: a vector holds one value of 16 keys, and the 16 sums of a score, which
//! are lanes otherwise, are vectors. They are added in the same order, but nothing is folded across lanes.

use super::{ROWS, Row, Values};
use crate::simd::{LANES, Lanes, on_level};

/// Widest keys that are worth it: those of a block stay in a core's first cache.
const WIDTH_MAX: usize = 128;

/// True when a block of keys of this width can be widened.
pub(crate) fn can_widen(key_width: usize) -> bool {
    key_width <= WIDTH_MAX
}

/// The order in which a score's sums are computed, so that few wait to be added: [`Lanes::sums`] adds lanes i and i +
/// 8, then i + 4, i + 2, i + 1.
const ORDER: [usize; LANES] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Up to [`ROWS`] rows.
#[derive(Debug, Default)]
pub(crate) struct Widened {
    /// `[row][16 values]`.
    values: Vec<[f32; LANES]>,
    /// Vectors of a row.
    width: usize,
    /// `[16 rows][sum][value]`, a vector the value of 16 rows, sums in [`ORDER`].
    columns: Vec<[f32; LANES]>,
}

impl Widened {
    /// Takes the place of what was there before. A key is the rope row, then (absorbed form) the latent row.
    pub(crate) fn fill(&mut self, level: crate::level::Level, rows: &[Row<'_>], key_width: usize) {
        debug_assert!(!rows.is_empty() && rows.len() <= ROWS, "a block");
        self.width = rows[0].latent.len();
        self.values.resize(ROWS * self.width, [0.0; LANES]);
        self.columns.resize(ROWS / LANES * key_width, [0.0; LANES]);
        widen(level, rows, self);
    }

    pub(super) fn columns(&self) -> &[[f32; LANES]] {
        &self.columns
    }

    /// Of the first `n` rows.
    pub(super) fn values(&self, n: usize) -> Floats<'_> {
        Floats { values: &self.values[..n * self.width], width: self.width }
    }
}

/// Values of a block of rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Floats<'a> {
    values: &'a [[f32; LANES]],
    width: usize,
}

impl Values for Floats<'_> {
    #[inline(always)]
    fn rows(self) -> usize {
        self.values.len() / self.width
    }
    #[inline(always)]
    fn load<L: Lanes, const V: usize>(self, l: L, row: usize, at: usize) -> [L::F; V] {
        let from = &self.values[row * self.width + at..][..V];
        let mut values = [l.splat(0.0); V];
        for v in 0..V {
            values[v] = l.load(&from[v]);
        }
        values
    }
}

on_level! {
    fn widen(rows: &[Row<'_>], to: &mut Widened) = widen_body
}

#[inline(always)]
fn widen_body<L: Lanes>(l: L, rows: &[Row<'_>], to: &mut Widened) {
    for (row, to) in rows.iter().zip(to.values.chunks_exact_mut(to.width)) {
        for (from, to) in row.latent.iter().zip(to) {
            l.store(l.load_half(from), to);
        }
    }
    let vectors = to.columns.len() / ROWS;
    for (rows, columns) in rows.chunks(LANES).zip(to.columns.chunks_exact_mut(vectors * LANES)) {
        for i in 0..vectors {
            // Rows that are missing are zero; nobody looks at them.
            let mut square = [l.splat(0.0); LANES];
            for (square, row) in square.iter_mut().zip(rows) {
                let rope = row.rope.len();
                *square = l.load_half(if i < rope { &row.rope[i] } else { &row.latent[i - rope] });
            }
            let square = l.transpose(&square);
            for (at, &j) in ORDER.iter().enumerate() {
                l.store(square[j], &mut columns[at * vectors + i]);
            }
        }
    }
}

/// `q[h] . key[row]` of H heads with all rows of a block, from columns.
#[inline(always)]
pub(super) fn scores<L: Lanes, const H: usize>(
    l: L,
    columns: &[[f32; LANES]],
    q: &[&[[f32; LANES]]; H],
    out: &mut [[f32; ROWS]; H],
) {
    let width = columns.len() / (ROWS / LANES);
    let together = if L::REGISTERS == 1 { 2 } else { 1 };
    for (tile, columns) in columns.chunks_exact(together * width).enumerate() {
        let mut h = 0;
        while L::REGISTERS == 1 && h + 1 < H {
            let (a, b) = columns.split_at(width);
            let sums = tree::<L, 2, 2>(l, [a, b], [q[h], q[h + 1]]);
            for (out, sums) in out[h..].iter_mut().zip(sums) {
                let out = &mut out.as_chunks_mut().0[tile * 2..];
                for (out, sums) in out.iter_mut().zip(sums) {
                    l.store(sums, out);
                }
            }
            h += 2;
        }
        for h in h..H {
            for (i, columns) in columns.chunks_exact(width).enumerate() {
                let [[sums]] = tree::<L, 1, 1>(l, [columns], [q[h]]);
                l.store(sums, &mut out[h].as_chunks_mut().0[tile * together + i]);
            }
        }
    }
}

type Sums<L, const H: usize, const T: usize> = [[<L as Lanes>::F; T]; H];

/// Scores of H heads with T times 16 rows: the 16 sums of each added as [`Lanes::sums`] adds lanes.
#[inline(always)]
fn tree<L: Lanes, const H: usize, const T: usize>(
    l: L,
    columns: [&[[f32; LANES]]; T],
    q: [&[[f32; LANES]]; H],
) -> Sums<L, H, T> {
    let even = plus::<L, H, T>(l, quarter(l, &columns, &q, 0), quarter(l, &columns, &q, 4));
    plus::<L, H, T>(l, even, plus::<L, H, T>(l, quarter(l, &columns, &q, 8), quarter(l, &columns, &q, 12)))
}

/// Four sums, from that of [`ORDER`] at `at` on.
#[inline(always)]
fn quarter<L: Lanes, const H: usize, const T: usize>(
    l: L,
    columns: &[&[[f32; LANES]]; T],
    q: &[&[[f32; LANES]]; H],
    at: usize,
) -> Sums<L, H, T> {
    let first = plus::<L, H, T>(l, one(l, columns, q, at), one(l, columns, q, at + 1));
    plus::<L, H, T>(l, first, plus::<L, H, T>(l, one(l, columns, q, at + 2), one(l, columns, q, at + 3)))
}

/// The sum over values j, j + 16, j + 32 ..., j being [`ORDER`] at `at`.
#[inline(always)]
fn one<L: Lanes, const H: usize, const T: usize>(
    l: L,
    columns: &[&[[f32; LANES]]; T],
    q: &[&[[f32; LANES]]; H],
    at: usize,
) -> Sums<L, H, T> {
    let n = q[0].len();
    let mut keys = [&[][..]; T];
    let mut values = [&[][..]; H];
    for t in 0..T {
        keys[t] = &columns[t][at * n..(at + 1) * n];
    }
    for h in 0..H {
        values[h] = &q[h][..n];
    }
    let mut sums = [[l.splat(0.0); T]; H];
    for i in 0..n {
        let mut key = [l.splat(0.0); T];
        for t in 0..T {
            key[t] = l.load(&keys[t][i]);
        }
        for h in 0..H {
            let q = l.splat(values[h][i][ORDER[at]]);
            for t in 0..T {
                sums[h][t] = l.mul_add(q, key[t], sums[h][t]);
            }
        }
    }
    sums
}

#[inline(always)]
fn plus<L: Lanes, const H: usize, const T: usize>(l: L, a: Sums<L, H, T>, b: Sums<L, H, T>) -> Sums<L, H, T> {
    let mut sums = a;
    for h in 0..H {
        for t in 0..T {
            sums[h][t] = l.add(a[h][t], b[h][t]);
        }
    }
    sums
}
