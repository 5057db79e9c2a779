//! Attention over half-precision rows: up to 64 listed rows at a time, for several heads, values across the lanes.
//!
//! Rows are read where they lie and widened in registers; a pass over a row serves several heads, or the same head of
//! several tokens. A score is 16 interleaved sums over the key's values, folded as a tree; values are summed over the
//! listed rows in order. Both are functions of the list alone.

use crate::simd::{LANES, Lanes, on_level};
use softmax::exponentials;

/// Listed rows in a block.
pub(crate) const ROWS: usize = 64;
/// Most heads that share one pass over a block.
pub(crate) const HEADS_MAX: usize = 6;

/// The same of a block that was widened: more sums do not stay in registers.
pub(crate) const WIDENED_HEADS_MAX: usize = 4;

/// Rows, or vectors of values, that are multiplied with every head at once: their sums and they fill the registers.
const TOGETHER: usize = 4;
/// One at a time where 16 values fill this many registers: the sums of six heads are 24 of 32 then.
const REGISTERS_FOR_ONE: usize = 4;

/// `$run::<H>(..)` for the number of heads.
macro_rules! for_heads {
    ($heads:ident, $run:ident($($argument:expr),*)) => {
        match $heads.states.len() {
            1 => $run::<1>($($argument),*),
            2 => $run::<2>($($argument),*),
            3 => $run::<3>($($argument),*),
            4 => $run::<4>($($argument),*),
            5 => $run::<5>($($argument),*),
            6 => $run::<6>($($argument),*),
            n => unreachable!("{n} heads, at most six"),
        }
    };
}

#[cfg(test)]
mod case;
mod columns;
mod integer;
mod softmax;
mod stored;
mod widened;
mod words;

pub(crate) use columns::{ColumnBlock, attend_columns, can_be_columns};
pub(crate) use integer::{WORD_HEADS_MAX, WordHeads, attend_words};
pub(crate) use softmax::{Softmax, exp2};
pub(crate) use stored::{StoredBlock, StoredUnits, attend_stored, can_be_stored, round_stored_query};
pub(crate) use widened::{Widened, can_widen};
pub(crate) use words::{Bytes, Formats, Line, Widths, WordBlock, can_be_words, round_query};

/// True when rows of this width can be blocked.
pub(crate) fn can_block(width: usize) -> bool {
    width > 0 && width.is_multiple_of(LANES)
}

/// The slices of a row that a head group sees, as vectors of 16 halves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Row<'a> {
    pub(crate) latent: &'a [[u8; 2 * LANES]],
    pub(crate) rope: &'a [[u8; 2 * LANES]],
}

/// The values of a block of rows.
trait Values: Copy {
    fn rows(self) -> usize;
    /// V vectors of a row from vector `at` on.
    fn load<L: Lanes, const V: usize>(self, l: L, row: usize, at: usize) -> [L::F; V];
}

impl Values for &[Row<'_>] {
    #[inline(always)]
    fn rows(self) -> usize {
        self.len()
    }
    #[inline(always)]
    fn load<L: Lanes, const V: usize>(self, l: L, row: usize, at: usize) -> [L::F; V] {
        let from = &self[row].latent[at..at + V];
        let mut values = [l.splat(0.0); V];
        for v in 0..V {
            values[v] = l.load_half(&from[v]);
        }
        values
    }
}

/// Some heads, of one token or of several that list the same rows.
#[derive(Debug)]
pub(crate) struct Heads<'a> {
    /// Queries `[head][key width]`, packed: for the rope row, then (absorbed form) for the latent row.
    pub(crate) q: &'a [f32],
    pub(crate) scale: f32,
    pub(crate) states: &'a mut [Softmax],
    /// Sums `[head][latent width]`, packed.
    pub(crate) out: &'a mut [f32],
}

/// Adds a block of rows, at most 64, to the heads' softmaxes. Memory is asked for the rows `ahead` meanwhile.
pub(crate) fn attend(level: crate::level::Level, rows: &[Row<'_>], ahead: &[&[u8]], heads: &mut Heads<'_>) {
    debug_assert!(!rows.is_empty() && rows.len() <= ROWS, "a block");
    for_heads!(heads, attend_halves(level, rows, ahead, heads));
}

/// As [`attend`], with the first `n` rows of a block that was widened before.
pub(crate) fn attend_widened(
    level: crate::level::Level,
    block: &Widened,
    n: usize,
    ahead: &[&[u8]],
    heads: &mut Heads<'_>,
) {
    for_heads!(heads, attend_floats(level, block, n, ahead, heads));
}

on_level! {
    fn attend_halves<const H: usize>(rows: &[Row<'_>], ahead: &[&[u8]], heads: &mut Heads<'_>) = halves_body
}
on_level! {
    fn attend_floats<const H: usize>(block: &Widened, n: usize, ahead: &[&[u8]], heads: &mut Heads<'_>) = floats_body
}

#[inline(always)]
fn halves_body<L: Lanes, const H: usize>(l: L, rows: &[Row<'_>], ahead: &[&[u8]], heads: &mut Heads<'_>) {
    let mut p = [[0.0; ROWS]; H];
    scores::<L, H>(l, rows, ahead, &queries(heads.q), &mut p);
    add::<L, _, H>(l, rows, &mut p, heads);
}

#[inline(always)]
fn floats_body<L: Lanes, const H: usize>(l: L, block: &Widened, n: usize, ahead: &[&[u8]], heads: &mut Heads<'_>) {
    ask(l, &mut Ahead { rows: ahead, share: ahead.len(), rest: 0 }, ROWS);
    let mut p = [[0.0; ROWS]; H];
    widened::scores::<L, H>(l, block.columns(), &queries(heads.q), &mut p);
    add::<L, _, H>(l, block.values(n), &mut p, heads);
}

/// Each head's query as vectors.
#[inline(always)]
fn queries<const H: usize>(q: &[f32]) -> [&[[f32; LANES]]; H] {
    let width = q.len() / H;
    std::array::from_fn(|h| q[h * width..(h + 1) * width].as_chunks().0)
}

/// Adds rows with scores `p` to the softmaxes.
#[inline(always)]
fn add<L: Lanes, R: Values, const H: usize>(l: L, rows: R, p: &mut [[f32; ROWS]; H], heads: &mut Heads<'_>) {
    let shrink = exponentials(l, p, &[rows.rows(); H], &[heads.scale; H], heads.states);
    let width = heads.out.len() / H / LANES;
    let mut at = 0;
    while L::REGISTERS < REGISTERS_FOR_ONE && at + TOGETHER <= width {
        weigh::<L, R, H, TOGETHER>(l, rows, heads, at, p, &shrink);
        at += TOGETHER;
    }
    for at in at..width {
        weigh::<L, R, H, 1>(l, rows, heads, at, p, &shrink);
    }
}

/// `q[h] . key[row]` for every row of the block.
#[inline(always)]
fn scores<L: Lanes, const H: usize>(
    l: L,
    rows: &[Row<'_>],
    ahead: &[&[u8]],
    q: &[&[[f32; LANES]]; H],
    out: &mut [[f32; ROWS]; H],
) {
    let mut ahead = Ahead { rows: ahead, share: ahead.len(), rest: 0 };
    for (sixteen, rows) in rows.chunks(LANES).enumerate() {
        if L::REGISTERS < REGISTERS_FOR_ONE {
            // Rows j, j + 4, j + 8 and j + 12. Of rows that are missing the first takes the place; nobody looks at it.
            let mut folded = [[l.splat(0.0); 4]; H];
            for j in 0..rows.len().min(4) {
                ask(l, &mut ahead, TOGETHER);
                let four: [&Row<'_>; TOGETHER] = std::array::from_fn(|i| rows.get(j + 4 * i).unwrap_or(&rows[j]));
                let totals = dot_rows::<L, H, TOGETHER>(l, &four, q);
                for (folded, totals) in folded.iter_mut().zip(&totals) {
                    folded[j] = l.fold(totals);
                }
            }
            for (folded, out) in folded.iter().zip(&mut *out) {
                l.store(l.finish(folded), &mut out.as_chunks_mut().0[sixteen]);
            }
            continue;
        }
        // What is left of other rows is not looked at.
        let mut sums = [[l.splat(0.0); LANES]; H];
        for (at, row) in rows.iter().enumerate() {
            ask(l, &mut ahead, 1);
            let totals = dot_rows::<L, H, 1>(l, &[row], q);
            for (sums, [total]) in sums.iter_mut().zip(totals) {
                sums[at] = total;
            }
        }
        for (sums, out) in sums.iter().zip(&mut *out) {
            l.store(l.sums(sums), &mut out.as_chunks_mut().0[sixteen]);
        }
    }
}

/// Rows to ask memory for, evenly while a block is read: what is asked for at once waits for each other.
struct Ahead<'a> {
    rows: &'a [&'a [u8]],
    /// For a whole block of rows that are read.
    share: usize,
    /// What is left of a row, times [`ROWS`].
    rest: usize,
}

/// Asks for the share of `n` rows that are read.
#[inline(always)]
fn ask<L: Lanes>(l: L, ahead: &mut Ahead<'_>, n: usize) {
    ahead.rest += ahead.share * n;
    while ahead.rest >= ROWS {
        ahead.rest -= ROWS;
        let Some((row, rows)) = ahead.rows.split_first() else { return };
        ahead.rows = rows;
        for line in row.chunks(64) {
            l.prefetch(&line[0]);
        }
    }
}

/// The lanes' sums of each head with R rows.
#[inline(always)]
fn dot_rows<L: Lanes, const H: usize, const R: usize>(
    l: L,
    rows: &[&Row<'_>; R],
    q: &[&[[f32; LANES]]; H],
) -> [[L::F; R]; H] {
    let rope = rows[0].rope.len();
    let mut totals = [[l.splat(0.0); R]; H];
    let keys: [&[[u8; 2 * LANES]]; R] = std::array::from_fn(|r| rows[r].rope);
    add_products(l, &keys, rope, q, 0, &mut totals);
    if q[0].len() > rope {
        let keys: [&[[u8; 2 * LANES]]; R] = std::array::from_fn(|r| rows[r].latent);
        add_products(l, &keys, q[0].len() - rope, q, rope, &mut totals);
    }
    totals
}

/// Adds the products of `width` vectors of keys with those of the queries from vector `first` on.
#[inline(always)]
fn add_products<L: Lanes, const H: usize, const R: usize>(
    l: L,
    keys: &[&[[u8; 2 * LANES]]; R],
    width: usize,
    q: &[&[[f32; LANES]]; H],
    first: usize,
    totals: &mut [[L::F; R]; H],
) {
    let keys: [&[[u8; 2 * LANES]]; R] = std::array::from_fn(|r| &keys[r][..width]);
    let q: [&[[f32; LANES]]; H] = std::array::from_fn(|h| &q[h][first..first + width]);
    for i in 0..width {
        let mut key = [l.splat(0.0); R];
        for r in 0..R {
            key[r] = l.load_half(&keys[r][i]);
        }
        for h in 0..H {
            let q = l.load(&q[h][i]);
            for r in 0..R {
                totals[h][r] = l.mul_add(q, key[r], totals[h][r]);
            }
        }
    }
}

/// `out = out shrink + sum_row p[row] value[row]` for V vectors of values from vector `at` on.
#[inline(always)]
fn weigh<L: Lanes, R: Values, const H: usize, const V: usize>(
    l: L,
    rows: R,
    heads: &mut Heads<'_>,
    at: usize,
    p: &[[f32; ROWS]; H],
    shrink: &[f32; H],
) {
    let width = heads.out.len() / H;
    let mut sums = [[l.splat(0.0); V]; H];
    for ((sums, out), shrink) in sums.iter_mut().zip(heads.out.chunks_exact(width)).zip(shrink) {
        for (sum, out) in sums.iter_mut().zip(&out.as_chunks().0[at..]) {
            *sum = l.mul(l.load(out), l.splat(*shrink));
        }
    }
    for r in 0..rows.rows().min(ROWS) {
        let value = rows.load::<L, V>(l, r, at);
        for h in 0..H {
            let p = l.splat(p[h][r]);
            for v in 0..V {
                sums[h][v] = l.mul_add(p, value[v], sums[h][v]);
            }
        }
    }
    for (sums, out) in sums.iter().zip(heads.out.chunks_exact_mut(width)) {
        for (sum, out) in sums.iter().zip(&mut out.as_chunks_mut().0[at..]) {
            l.store(*sum, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;
    use half::f16;
    use proptest::prelude::*;

    fn halves(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
    }

    struct Case {
        latent: Vec<Vec<u8>>,
        rope: Vec<Vec<u8>>,
        q: Vec<f32>,
        heads: usize,
        absorbed: bool,
        scale: f32,
    }

    const ROPE: usize = 32;

    impl Case {
        fn width(&self) -> usize {
            self.latent[0].len() / 2
        }

        fn key_width(&self) -> usize {
            if self.absorbed { ROPE + self.width() } else { ROPE }
        }

        /// All rows in blocks, for `heads` heads from `first` on.
        fn run(&self, level: Level, widened: bool, first: usize, heads: usize) -> Vec<f32> {
            let (mut out, mut states) = (vec![0.0; heads * self.width()], vec![Softmax::EMPTY; heads]);
            let row = |(latent, rope): (&'_ Vec<u8>, &'_ Vec<u8>)| {
                (latent.as_chunks().0.to_vec(), rope.as_chunks().0.to_vec())
            };
            let rows: Vec<_> = self.latent.iter().zip(&self.rope).map(row).collect();
            let rows: Vec<Row<'_>> = rows.iter().map(|(latent, rope)| Row { latent, rope }).collect();
            let mut block = Widened::default();
            for rows in rows.chunks(ROWS) {
                let q = &self.q[first * self.key_width()..][..heads * self.key_width()];
                let mut job = Heads { q, scale: self.scale, states: &mut states, out: &mut out };
                if widened {
                    block.fill(level, rows, self.key_width());
                    attend_widened(level, &block, rows.len(), &[&self.latent[0]], &mut job);
                } else {
                    attend(level, rows, &[&self.latent[0]], &mut job);
                }
            }
            states.iter().zip(out.chunks_exact_mut(self.width())).for_each(|(state, out)| state.finish(out));
            out
        }

        fn exact(&self, head: usize) -> Vec<f64> {
            let decode = |bytes: &[u8]| -> Vec<f64> {
                bytes.as_chunks::<2>().0.iter().map(|b| f64::from(f16::from_le_bytes(*b).to_f32())).collect()
            };
            let q = &self.q[head * self.key_width()..][..self.key_width()];
            let (mut out, mut total) = (vec![0.0; self.width()], 0.0);
            for (latent, rope) in self.latent.iter().zip(&self.rope) {
                let latent = decode(latent);
                let keys = decode(rope).into_iter().chain(latent.iter().copied());
                let z: f64 = q.iter().zip(keys).map(|(q, k)| f64::from(*q) * k).sum();
                let p = (z * f64::from(self.scale)).exp();
                total += p;
                out.iter_mut().zip(&latent).for_each(|(o, v)| *o += p * v);
            }
            out.into_iter().map(|o| o / total).collect()
        }
    }

    proptest! {
        #[test]
        fn levels_and_head_counts_agree_bit_for_bit_and_are_close_to_f64(
            seed in proptest::collection::vec(-1f32..1.0, 97), rows in 1usize..150, heads in 1usize..=HEADS_MAX,
            absorbed: bool, latent in prop_oneof![Just(80usize), Just(176)],
        ) {
            let value = |i: usize| seed[i % seed.len()] + 0.3 * seed[i * 7 % seed.len()];
            let row = |width: usize, from: usize| halves(&(0..width).map(|i| value(from + i)).collect::<Vec<_>>());
            let case = Case {
                latent: (0..rows).map(|r| row(latent, r * 31)).collect(),
                rope: (0..rows).map(|r| row(ROPE, r * 17 + 5)).collect(),
                q: (0..heads * (ROPE + latent)).map(|i| value(i * 3)).collect(),
                heads,
                absorbed,
                scale: if rows % 2 == 0 { 0.2 } else { -0.2 },
            };
            let scalar = case.run(Level::Scalar, false, 0, case.heads);
            for (head, found) in scalar.chunks_exact(latent).enumerate() {
                for (found, exact) in found.iter().zip(case.exact(head)) {
                    prop_assert!((f64::from(*found) - exact).abs() < 1e-5, "{found} {exact}");
                }
            }
            let alike = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            for level in Level::all() {
                for widened in [false, true] {
                    let together = case.run(level, widened, 0, case.heads);
                    prop_assert!(alike(&together, &scalar), "{level:?}, widened before: {widened}");
                    for head in 0..case.heads {
                        let alone = case.run(level, widened, head, 1);
                        prop_assert!(alike(&alone, &scalar[head * latent..(head + 1) * latent]), "head {head} alone");
                    }
                }
            }
        }
    }
}
