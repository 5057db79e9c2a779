//! Attention over half-precision rows: 64 listed rows at a time, for several heads, keys across the lanes.
//!
//! A block's keys are transposed once and serve every head and every token that lists these rows. A head's sums run
//! over a key's values in order and over the listed rows in order, so they are a function of the list alone.

use crate::simd::{LANES, Lanes, on_level};

/// Listed rows in a block.
pub(crate) const ROWS: usize = 64;
/// Most heads that share one pass over a block.
pub(crate) const HEADS_MAX: usize = 6;

const VECTORS: usize = ROWS / LANES;

/// True when rows of this width can be blocked.
pub(crate) fn can_block(width: usize) -> bool {
    width > 0 && width.is_multiple_of(LANES)
}

/// Up to 64 decoded rows.
#[derive(Debug, Default)]
pub(crate) struct Block {
    /// Key values `[width][row]`: of the rope row, then (absorbed form) of the latent row.
    keys: Vec<[f32; ROWS]>,
    /// Latent values `[row][width]`.
    values: Vec<f32>,
    n: usize,
}

/// Rows that are asked for ahead of the one that is decoded: what memory delivers within its latency.
const AHEAD: usize = 8;

/// The encoded slices of a row that a head group sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    pub(crate) latent: &'a [u8],
    pub(crate) rope: &'a [u8],
    /// All bytes of the row if other groups come after this one, else none: they are asked for ahead.
    pub(crate) whole: &'a [u8],
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

/// Some heads of one token against the first `n` rows of a block.
#[derive(Debug)]
pub(crate) struct Heads<'a> {
    /// Queries `[head][key width]`, packed in the order of [`Block::keys`].
    pub(crate) q: &'a [f32],
    pub(crate) n: usize,
    pub(crate) scale: f32,
    pub(crate) states: &'a mut [Softmax],
    /// Sums `[head][latent width]`, packed.
    pub(crate) out: &'a mut [f32],
}

on_level! {
    /// Decodes `rows` (at most 64, all of one shape) into the block; `absorbed`: latent values are key values too.
    fn load(rows: &[Row<'_>], absorbed: bool, block: &mut Block) = load_body
}

#[inline(always)]
fn load_body<L: Lanes>(l: L, rows: &[Row<'_>], absorbed: bool, block: &mut Block) {
    let Some(first) = rows.first() else { return };
    let (latent, rope) = (first.latent.len() / 2, first.rope.len() / 2);
    block.keys.resize(if absorbed { rope + latent } else { rope }, [0.0; ROWS]);
    block.values.resize(ROWS * latent, 0.0);
    block.n = rows.len();
    for (i, (row, to)) in rows.iter().zip(block.values.chunks_exact_mut(latent)).enumerate() {
        for line in rows.get(i + AHEAD).map_or(&[][..], |row| row.whole).chunks(64) {
            l.prefetch(&line[0]);
        }
        for (from, to) in row.latent.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
            l.store(l.load_half(from), to);
        }
    }
    let (rope_keys, latent_keys) = block.keys.split_at_mut(rope);
    for (sixteen, rows) in rows.chunks(LANES).enumerate() {
        for (part, keys) in rope_keys.as_chunks_mut().0.iter_mut().enumerate() {
            let mut lanes = [l.splat(0.0); LANES];
            for (lane, row) in lanes.iter_mut().zip(rows) {
                *lane = l.load_half(&row.rope.as_chunks().0[part]);
            }
            put_keys(l, lanes, sixteen, keys);
        }
        for (part, keys) in latent_keys.as_chunks_mut().0.iter_mut().enumerate() {
            let mut lanes = [l.splat(0.0); LANES];
            for (lane, row) in lanes.iter_mut().zip(rows) {
                *lane = l.load_half(&row.latent.as_chunks().0[part]);
            }
            put_keys(l, lanes, sixteen, keys);
        }
    }
}

/// Stores 16 values of each of 16 rows, the `sixteen`-th of the block, across the lanes.
#[inline(always)]
fn put_keys<L: Lanes>(l: L, mut lanes: [L::F; LANES], sixteen: usize, keys: &mut [[f32; ROWS]; LANES]) {
    l.transpose(&mut lanes);
    for (key, lane) in keys.iter_mut().zip(lanes) {
        l.store(lane, &mut key.as_chunks_mut().0[sixteen]);
    }
}

/// Adds the first `heads.n` rows of the block to the heads' softmaxes.
pub(crate) fn attend(level: crate::level::Level, block: &Block, heads: &mut Heads<'_>) {
    debug_assert!(heads.n > 0 && heads.n <= block.n, "rows that are there");
    match heads.states.len() {
        1 => attend_heads::<1>(level, block, heads),
        2 => attend_heads::<2>(level, block, heads),
        3 => attend_heads::<3>(level, block, heads),
        4 => attend_heads::<4>(level, block, heads),
        5 => attend_heads::<5>(level, block, heads),
        6 => attend_heads::<6>(level, block, heads),
        n => unreachable!("{n} heads, at most {HEADS_MAX}"),
    }
}

on_level! {
    fn attend_heads<const H: usize>(block: &Block, heads: &mut Heads<'_>) = attend_body
}

#[inline(always)]
fn attend_body<L: Lanes, const H: usize>(l: L, block: &Block, heads: &mut Heads<'_>) {
    let mut p = scores::<L, H>(l, block, heads.q);
    let mut shrink = [0f32; H];
    for h in 0..H {
        shrink[h] = exponentials(l, &mut p[h], heads.n, heads.scale, &mut heads.states[h]);
    }
    let width = heads.out.len() / H;
    for part in 0..width / ROWS {
        weigh::<L, H, VECTORS>(l, block, heads, part * ROWS, &p, &shrink);
    }
    for part in width / ROWS * VECTORS..width / LANES {
        weigh::<L, H, 1>(l, block, heads, part * LANES, &p, &shrink);
    }
}

/// `q[h] . key[row]` for every row of the block.
#[inline(always)]
fn scores<L: Lanes, const H: usize>(l: L, block: &Block, q: &[f32]) -> [[f32; ROWS]; H] {
    let width = block.keys.len();
    let q: [&[f32]; H] = std::array::from_fn(|h| &q[h * width..(h + 1) * width]);
    let mut sums = [[l.splat(0.0); VECTORS]; H];
    for (i, key) in block.keys.iter().enumerate() {
        let key = key.as_chunks::<LANES>().0;
        let key: [L::F; VECTORS] = std::array::from_fn(|v| l.load(&key[v]));
        for (sums, q) in sums.iter_mut().zip(q) {
            let q = l.splat(q[i]);
            for (sum, key) in sums.iter_mut().zip(key) {
                *sum = l.mul_add(q, key, *sum);
            }
        }
    }
    let mut out = [[0.0; ROWS]; H];
    for (sums, out) in sums.iter().zip(&mut out) {
        for (sum, out) in sums.iter().zip(out.as_chunks_mut().0) {
            l.store(*sum, out);
        }
    }
    out
}

/// Turns the first `n` scores into exp(score - max) and the others into 0; returns what earlier sums shrink by.
#[inline(always)]
fn exponentials<L: Lanes>(l: L, p: &mut [f32; ROWS], n: usize, scale: f32, state: &mut Softmax) -> f32 {
    let mut largest = state.max;
    for z in &mut p[..n] {
        *z *= scale;
        largest = largest.max(*z);
    }
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

/// `out = out shrink + sum_row p[row] value[row]` for V vectors of values from `at` on.
#[inline(always)]
fn weigh<L: Lanes, const H: usize, const V: usize>(
    l: L,
    block: &Block,
    heads: &mut Heads<'_>,
    at: usize,
    p: &[[f32; ROWS]; H],
    shrink: &[f32; H],
) {
    let width = heads.out.len() / H;
    let mut sums = [[l.splat(0.0); V]; H];
    for ((sums, out), shrink) in sums.iter_mut().zip(heads.out.chunks_exact(width)).zip(shrink) {
        for (sum, out) in sums.iter_mut().zip(out[at..].as_chunks().0) {
            *sum = l.mul(l.load(out), l.splat(*shrink));
        }
    }
    for (row, value) in block.values.chunks_exact(width).take(heads.n).enumerate() {
        let value = value[at..at + V * LANES].as_chunks::<LANES>().0;
        let value: [L::F; V] = std::array::from_fn(|v| l.load(&value[v]));
        for (sums, p) in sums.iter_mut().zip(p) {
            let p = l.splat(p[row]);
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = l.mul_add(p, value, *sum);
            }
        }
    }
    for (sums, out) in sums.iter().zip(heads.out.chunks_exact_mut(width)) {
        for (sum, out) in sums.iter().zip(out[at..].as_chunks_mut().0) {
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
            let mut block = Block::default();
            let rows: Vec<Row<'_>> =
                self.latent.iter().zip(&self.rope).map(|(latent, rope)| Row { latent, rope, whole: latent }).collect();
            for rows in rows.chunks(ROWS) {
                load(level, rows, self.absorbed, &mut block);
                let q = &self.q[first * self.key_width()..][..heads * self.key_width()];
                let mut job = Heads { q, n: rows.len(), scale: 0.2, states: &mut states, out: &mut out };
                attend(level, &block, &mut job);
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
                let p = (z * 0.2).exp();
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

    #[test]
    fn rows_after_the_first_n_do_not_matter() {
        let rows: Vec<Vec<u8>> = (0..9u8).map(|r| halves(&[if r < 5 { f32::from(r) } else { f32::NAN }; 16])).collect();
        let rows: Vec<Row<'_>> = rows.iter().map(|row| Row { latent: row, rope: row, whole: row }).collect();
        for level in Level::all() {
            let mut found = Vec::new();
            for rows in [&rows[..5], &rows[..]] {
                let (mut block, mut states, mut out) = (Block::default(), [Softmax::EMPTY], [0.0; 16]);
                load(level, rows, false, &mut block);
                let mut job = Heads { q: &[0.1; 16], n: 5, scale: 1.0, states: &mut states, out: &mut out };
                attend(level, &block, &mut job);
                states[0].finish(&mut out);
                found.push(out);
            }
            assert!(found[0][0].is_finite());
            assert_eq!(found[0], found[1]);
        }
    }
}
