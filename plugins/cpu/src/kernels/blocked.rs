//! Attention over half-precision rows: up to 64 listed rows at a time, for several heads, values across the lanes.
//!
//! Rows are read where they lie and widened in registers; a pass over a row serves several heads, or the same head of
//! several tokens. A score is 16 interleaved sums over the key's values, folded as a tree; values are summed over the
//! listed rows in order. Both are functions of the list alone.

use crate::simd::{LANES, Lanes, on_level};

/// Listed rows in a block.
pub(crate) const ROWS: usize = 64;
/// Most heads that share one pass over a block.
pub(crate) const HEADS_MAX: usize = 6;

/// Rows, or vectors of values, that are multiplied with every head at once: their sums and they fill the registers.
const TOGETHER: usize = 4;
/// One at a time where 16 values fill this many registers: the sums of six heads are 24 of 32 then.
const REGISTERS_FOR_ONE: usize = 4;

/// True when rows of this width can be blocked.
pub(crate) fn can_block(width: usize) -> bool {
    width > 0 && width.is_multiple_of(LANES)
}

/// The encoded slices of a row that a head group sees.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Row<'a> {
    pub(crate) latent: &'a [u8],
    pub(crate) rope: &'a [u8],
}

/// The running softmax of one head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Divides what [`attend`] summed.
    pub(crate) fn finish(self, out: &mut [f32]) {
        out.iter_mut().for_each(|o| *o /= self.sum);
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
    match heads.states.len() {
        1 => attend_heads::<1>(level, rows, ahead, heads),
        2 => attend_heads::<2>(level, rows, ahead, heads),
        3 => attend_heads::<3>(level, rows, ahead, heads),
        4 => attend_heads::<4>(level, rows, ahead, heads),
        5 => attend_heads::<5>(level, rows, ahead, heads),
        6 => attend_heads::<6>(level, rows, ahead, heads),
        n => unreachable!("{n} heads, at most {HEADS_MAX}"),
    }
}

on_level! {
    fn attend_heads<const H: usize>(rows: &[Row<'_>], ahead: &[&[u8]], heads: &mut Heads<'_>) = attend_body
}

#[inline(always)]
fn attend_body<L: Lanes, const H: usize>(l: L, rows: &[Row<'_>], ahead: &[&[u8]], heads: &mut Heads<'_>) {
    let mut p = scores::<L, H>(l, rows, ahead, heads.q);
    let mut shrink = [0f32; H];
    for h in 0..H {
        shrink[h] = exponentials(l, &mut p[h], rows.len(), heads.scale, &mut heads.states[h]);
    }
    let width = heads.out.len() / H / LANES;
    let together = if L::REGISTERS < REGISTERS_FOR_ONE { width / TOGETHER } else { 0 };
    for part in 0..together {
        weigh::<L, H, TOGETHER>(l, rows, heads, part * TOGETHER, &p, &shrink);
    }
    for part in together * TOGETHER..width {
        weigh::<L, H, 1>(l, rows, heads, part, &p, &shrink);
    }
}

/// `q[h] . key[row]` for every row of the block.
#[inline(always)]
fn scores<L: Lanes, const H: usize>(l: L, rows: &[Row<'_>], ahead: &[&[u8]], q: &[f32]) -> [[f32; ROWS]; H] {
    let width = q.len() / H;
    let q: [&[[f32; LANES]]; H] = std::array::from_fn(|h| q[h * width..(h + 1) * width].as_chunks().0);
    let mut out = [[0.0; ROWS]; H];
    // Of 16 rows; what is left of other rows is not looked at.
    let mut sums = [[l.splat(0.0); LANES]; H];
    let mut ahead = Ahead { rows: ahead, share: ahead.len(), rest: 0 };
    for (sixteen, rows) in rows.chunks(LANES).enumerate() {
        let mut at = 0;
        if L::REGISTERS < REGISTERS_FOR_ONE {
            for rows in rows.as_chunks::<TOGETHER>().0 {
                ask(l, &mut ahead, TOGETHER);
                dot_rows::<L, H, TOGETHER>(l, rows, &q, at, &mut sums);
                at += TOGETHER;
            }
        }
        for row in &rows[at..] {
            ask(l, &mut ahead, 1);
            dot_rows::<L, H, 1>(l, &[*row], &q, at, &mut sums);
            at += 1;
        }
        for (sums, out) in sums.iter().zip(&mut out) {
            l.store(l.sums(sums), &mut out.as_chunks_mut().0[sixteen]);
        }
    }
    out
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

/// `sums[h][at + r]`: the lanes' sums of head h with row r.
#[inline(always)]
fn dot_rows<L: Lanes, const H: usize, const R: usize>(
    l: L,
    rows: &[Row<'_>; R],
    q: &[&[[f32; LANES]]; H],
    at: usize,
    sums: &mut [[L::F; LANES]; H],
) {
    let rope = rows[0].rope.len() / (2 * LANES);
    let mut totals = [[l.splat(0.0); R]; H];
    let (keys, width): ([&[u8]; R], usize) = (std::array::from_fn(|r| rows[r].rope), rope);
    add_products(l, &keys, width, q, 0, &mut totals);
    if q[0].len() > rope {
        let keys: [&[u8]; R] = std::array::from_fn(|r| rows[r].latent);
        add_products(l, &keys, q[0].len() - rope, q, rope, &mut totals);
    }
    for (sums, totals) in sums.iter_mut().zip(totals) {
        for (r, total) in totals.into_iter().enumerate() {
            sums[at + r] = total;
        }
    }
}

/// Adds the products of `width` vectors of keys with those of the queries from vector `first` on.
#[inline(always)]
fn add_products<L: Lanes, const H: usize, const R: usize>(
    l: L,
    keys: &[&[u8]; R],
    width: usize,
    q: &[&[[f32; LANES]]; H],
    first: usize,
    totals: &mut [[L::F; R]; H],
) {
    let keys: [&[[u8; 2 * LANES]]; R] = std::array::from_fn(|r| &keys[r].as_chunks().0[..width]);
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

/// Turns the first `n` scores into exp(score - max) and the others into 0; returns what earlier sums shrink by.
#[inline(always)]
fn exponentials<L: Lanes>(l: L, p: &mut [f32; ROWS], n: usize, scale: f32, state: &mut Softmax) -> f32 {
    for z in p.as_chunks_mut().0 {
        l.store(l.mul(l.load(z), l.splat(scale)), z);
    }
    p[n..].fill(f32::NEG_INFINITY);
    let mut most = l.splat(state.max);
    for z in p.as_chunks().0 {
        most = l.max(most, l.load(z));
    }
    let mut lanes = [0.0; LANES];
    l.store(most, &mut lanes);
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let shrink = if state.max == f32::NEG_INFINITY {
        0.0
    } else {
        let mut lanes = [0.0; LANES];
        l.store(exp(l, l.splat(state.max - largest)), &mut lanes);
        lanes[0]
    };
    let max = l.splat(largest);
    for p in p.as_chunks_mut().0 {
        l.store(exp(l, l.sub(l.load(p), max)), p);
    }
    p[n..].fill(0.0);
    let lanes = p.as_chunks::<LANES>().0;
    let sum = l.add(l.add(l.load(&lanes[0]), l.load(&lanes[1])), l.add(l.load(&lanes[2]), l.load(&lanes[3])));
    *state = Softmax { max: largest, sum: state.sum.mul_add(shrink, l.sum(sum)) };
    shrink
}

/// `out = out shrink + sum_row p[row] value[row]` for V vectors of values from vector `at` on.
#[inline(always)]
fn weigh<L: Lanes, const H: usize, const V: usize>(
    l: L,
    rows: &[Row<'_>],
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
    for (r, row) in rows.iter().enumerate().take(ROWS) {
        let from = &row.latent.as_chunks::<{ 2 * LANES }>().0[at..at + V];
        let mut value = [l.splat(0.0); V];
        for v in 0..V {
            value[v] = l.load_half(&from[v]);
        }
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

    const LATENT: usize = 80;
    const ROPE: usize = 32;

    impl Case {
        fn key_width(&self) -> usize {
            if self.absorbed { ROPE + LATENT } else { ROPE }
        }

        /// All rows in blocks, for `heads` heads from `first` on.
        fn run(&self, level: Level, first: usize, heads: usize) -> Vec<f32> {
            let (mut out, mut states) = (vec![0.0; heads * LATENT], vec![Softmax::EMPTY; heads]);
            let rows: Vec<Row<'_>> =
                self.latent.iter().zip(&self.rope).map(|(latent, rope)| Row { latent, rope }).collect();
            for rows in rows.chunks(ROWS) {
                let q = &self.q[first * self.key_width()..][..heads * self.key_width()];
                let mut job = Heads { q, scale: self.scale, states: &mut states, out: &mut out };
                attend(level, rows, &[&self.latent[0]], &mut job);
            }
            states.iter().zip(out.chunks_exact_mut(LATENT)).for_each(|(state, out)| state.finish(out));
            out
        }

        fn exact(&self, head: usize) -> Vec<f64> {
            let decode = |bytes: &[u8]| -> Vec<f64> {
                bytes.as_chunks::<2>().0.iter().map(|b| f64::from(f16::from_le_bytes(*b).to_f32())).collect()
            };
            let q = &self.q[head * self.key_width()..][..self.key_width()];
            let (mut out, mut total) = (vec![0.0; LATENT], 0.0);
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
            absorbed: bool,
        ) {
            let value = |i: usize| seed[i % seed.len()] + 0.3 * seed[i * 7 % seed.len()];
            let row = |width: usize, from: usize| halves(&(0..width).map(|i| value(from + i)).collect::<Vec<_>>());
            let case = Case {
                latent: (0..rows).map(|r| row(LATENT, r * 31)).collect(),
                rope: (0..rows).map(|r| row(ROPE, r * 17 + 5)).collect(),
                q: (0..heads * (ROPE + LATENT)).map(|i| value(i * 3)).collect(),
                heads,
                absorbed,
                scale: if rows % 2 == 0 { 0.2 } else { -0.2 },
            };
            let scalar = case.run(Level::Scalar, 0, case.heads);
            for (head, found) in scalar.chunks_exact(LATENT).enumerate() {
                for (found, exact) in found.iter().zip(case.exact(head)) {
                    prop_assert!((f64::from(*found) - exact).abs() < 1e-5, "{found} {exact}");
                }
            }
            for level in Level::all() {
                let together = case.run(level, 0, case.heads);
                prop_assert!(together.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()), "{level:?}");
                for head in 0..case.heads {
                    let alone = case.run(level, head, 1);
                    let part = &scalar[head * LATENT..(head + 1) * LATENT];
                    prop_assert!(alone.iter().zip(part).all(|(a, b)| a.to_bits() == b.to_bits()), "head {head} alone");
                }
            }
        }
    }
}
