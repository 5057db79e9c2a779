//! Products of block-quantised weights with rounded activations: 16 rows of the weight at a time.
//!
//! A weight is laid out anew ("packed") so that one vector holds the same codes of 16 rows. Per block of 32 values the
//! integer sum is exact; sums of blocks are added in f32 from the first block to the last, so that a value's bits
//! depend on its row and its activations only, and are the same at every level.

use super::activations::{BLOCK, Block};
use crate::level::Level;
use crate::simd::{LANES, Lanes, on_level};
use sparsed_quant::Format;

/// Rows of a weight in a tile.
pub(crate) const TILE_ROWS: usize = LANES;
/// Most tokens that go through a tile together.
pub(crate) const TOKENS_MAX: usize = 8;

/// Sums of one token with 16 rows.
pub(crate) type Sums = [f32; TILE_ROWS];

/// Bytes of 16 packed blocks: codes, then scales.
const Q4_0_BYTES: usize = 256 + 32;
const Q4_1_BYTES: usize = 256 + 64;
const Q8_0_BYTES: usize = 512 + 32;

fn block_bytes(format: Format) -> Option<usize> {
    match format {
        Format::Q4_0 => Some(Q4_0_BYTES),
        Format::Q4_1 => Some(Q4_1_BYTES),
        Format::Q8_0 => Some(Q8_0_BYTES),
        _ => None,
    }
}

/// True when weights of this format and row length can be packed.
pub(crate) fn can_pack(format: Format, cols: usize) -> bool {
    block_bytes(format).is_some() && cols > 0 && cols.is_multiple_of(BLOCK)
}

/// Bytes of a packed tile.
pub(crate) fn tile_bytes(format: Format, cols: usize) -> usize {
    cols / BLOCK * block_bytes(format).expect("can_pack was asked")
}

/// Packs up to 16 encoded rows; rows that are missing are zero.
///
/// Block by block, so that memory is read from front to back: first the codes, vector g holding bytes 4g .. 4g + 4 of
/// each row's codes (those of Q8_0 are made unsigned by adding 128), then 16 x f16 d, and 16 x f16 m where the format
/// has it.
pub(crate) fn pack_tile<'a>(format: Format, cols: usize, row: impl Fn(usize) -> Option<&'a [u8]>, to: &mut [u8]) {
    debug_assert_eq!(to.len(), tile_bytes(format, cols));
    let offset = if format == Format::Q8_0 { 0x80 } else { 0 };
    let (bytes, code_bytes) = if format == Format::Q8_0 { (Q8_0_BYTES, 512) } else { (to.len() / (cols / BLOCK), 256) };
    to.fill(0);
    for lane in 0..TILE_ROWS {
        let Some(row) = row(lane) else { continue };
        for (block, to) in row.chunks_exact(format.block_bytes()).zip(to.chunks_exact_mut(bytes)) {
            let (codes, scales) = to.split_at_mut(code_bytes);
            let (scale, code) = block.split_at(scales.len() / TILE_ROWS);
            for (to, scale) in scales.as_chunks_mut::<{ 2 * TILE_ROWS }>().0.iter_mut().zip(scale.as_chunks::<2>().0) {
                to[lane * 2..lane * 2 + 2].copy_from_slice(scale);
            }
            for (to, four) in codes.as_chunks_mut::<{ 4 * TILE_ROWS }>().0.iter_mut().zip(code.as_chunks::<4>().0) {
                to[lane * 4..lane * 4 + 4].copy_from_slice(&four.map(|byte| byte ^ offset));
            }
        }
    }
}

/// Packs up to 16 rows of q8_0 as [`pack_tile`] does, fast enough to be done anew for every query.
pub(crate) fn pack_keys(level: Level, cols: usize, rows: &[&[u8]], to: &mut [u8]) {
    if rows.len() < TILE_ROWS || !cols.is_multiple_of(2 * BLOCK) {
        return pack_tile(Format::Q8_0, cols, |lane| rows.get(lane).copied(), to);
    }
    pack_pairs(level, rows, to);
}

on_level! {
    fn pack_pairs(rows: &[&[u8]], to: &mut [u8]) = pack_pairs_body
}

/// 16 rows of an even number of blocks: the codes of two blocks are one vector of each row, transposed.
#[inline(always)]
fn pack_pairs_body<L: Lanes>(l: L, rows: &[&[u8]], to: &mut [u8]) {
    const ENCODED: usize = 2 + BLOCK;
    for (pair, to) in to.as_chunks_mut::<{ 2 * Q8_0_BYTES }>().0.iter_mut().enumerate() {
        let (first, second) = to.split_at_mut(Q8_0_BYTES);
        let mut lanes = [l.splat(0.0); LANES];
        for (lane, (row, vector)) in rows.iter().zip(&mut lanes).enumerate() {
            let blocks = row[pair * 2 * ENCODED..].as_chunks::<ENCODED>().0;
            first[512 + 2 * lane..514 + 2 * lane].copy_from_slice(&blocks[0][..2]);
            second[512 + 2 * lane..514 + 2 * lane].copy_from_slice(&blocks[1][..2]);
            let codes = |block: &[u8; ENCODED]| *block.last_chunk::<BLOCK>().expect("32 of 34");
            *vector = l.join(&codes(&blocks[0]), &codes(&blocks[1]));
        }
        l.transpose(&mut lanes);
        let to = first.as_chunks_mut().0[..8].iter_mut().chain(&mut second.as_chunks_mut().0[..8]);
        lanes.into_iter().zip(to).for_each(|(vector, to)| l.store_offset(vector, to));
    }
}

on_level! {
    /// Adds `w[h] max(sums[h], 0)` of every head h to `scores`.
    fn weigh(sums: &[Sums], w: &[f32], scores: &mut Sums) = weigh_body
}

#[inline(always)]
fn weigh_body<L: Lanes>(l: L, sums: &[Sums], w: &[f32], scores: &mut Sums) {
    let mut total = l.load(scores);
    for (sums, w) in sums.iter().zip(w) {
        total = l.mul_add(l.splat(*w), l.max(l.splat(0.0), l.load(sums)), total);
    }
    l.store(total, scores);
}

/// How many of `left` tokens the level takes through a tile together.
pub(crate) fn tokens_at_once(level: Level, left: usize) -> usize {
    let sizes: &[usize] = if level == Level::Avx512 { &[8, 6, 4, 3, 2] } else { &[2] };
    sizes.iter().copied().find(|&n| n <= left).unwrap_or(1)
}

/// `sums[n][r] = row r . token n` for a tile. `x` holds `sums.len()` tokens, a number of [`tokens_at_once`], block by
/// block: all tokens' first blocks, then all second ones.
pub(crate) fn product(level: Level, format: Format, tile: &[u8], x: &[Block], sums: &mut [Sums]) {
    macro_rules! tokens {
        ($($n:literal)*) => {
            match (format, sums.len()) {
                $(
                    (Format::Q4_0, $n) => q4_0::<$n>(level, tile, x, sums),
                    (Format::Q4_1, $n) => q4_1::<$n>(level, tile, x, sums),
                    (Format::Q8_0, $n) => q8_0::<$n>(level, tile, x, sums),
                )*
                (format, n) => unreachable!("{n} tokens and {}: can_pack and tokens_at_once were asked", format.name()),
            }
        };
    }
    tokens!(1 2 3 4 6 8);
}

on_level! {
    fn q4_0<const N: usize>(tile: &[u8], x: &[Block], sums: &mut [Sums]) = q4_0_body
}
on_level! {
    fn q4_1<const N: usize>(tile: &[u8], x: &[Block], sums: &mut [Sums]) = q4_1_body
}
on_level! {
    fn q8_0<const N: usize>(tile: &[u8], x: &[Block], sums: &mut [Sums]) = q8_0_body
}

/// The sums of products with high bytes and with low bytes of the activations.
struct Planes<L: Lanes, const N: usize> {
    high: [L::I; N],
    low: [L::I; N],
}

impl<L: Lanes, const N: usize> Planes<L, N> {
    /// `start[n]` is added to the sum of token n.
    #[inline(always)]
    fn new(l: L, start: impl Fn(usize) -> i32) -> Self {
        Self { high: [l.splat_i(0); N], low: std::array::from_fn(|n| l.splat_i(start(n))) }
    }

    /// Adds the products of `w` with lane `at` of every token.
    #[inline(always)]
    fn add(&mut self, w: L::I, x: &[Block; N], at: usize, l: L, dot: impl Fn(L, L::I, L::I, L::I) -> L::I) {
        for ((high, low), x) in self.high.iter_mut().zip(&mut self.low).zip(x) {
            *high = dot(l, *high, w, l.splat_i(x.high[at]));
            *low = dot(l, *low, w, l.splat_i(x.low[at]));
        }
    }

    /// The exact sum of token n, rounded to f32.
    #[inline(always)]
    fn total(&self, l: L, n: usize) -> L::F {
        l.to_float(l.add_i(l.shl_byte(self.high[n]), self.low[n]))
    }
}

/// Products of 32 4-bit codes.
#[inline(always)]
fn nibbles<L: Lanes, const N: usize>(l: L, codes: &[u8], x: &[Block; N], planes: &mut Planes<L, N>) {
    for (g, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
        let v = l.load_i(codes);
        planes.add(l.low_nibbles(v), x, g, l, L::dot_nibbles);
        planes.add(l.high_nibbles(v), x, 4 + g, l, L::dot_nibbles);
    }
}

#[inline(always)]
fn q4_0_body<L: Lanes, const N: usize>(l: L, tile: &[u8], x: &[Block], sums: &mut [Sums]) {
    let x = x.as_chunks::<N>().0;
    let mut totals = [l.splat(0.0); N];
    for (block, x) in tile.as_chunks::<Q4_0_BYTES>().0.iter().zip(x) {
        let (codes, scales) = block.split_at(256);
        let mut planes = Planes::<L, N>::new(l, |n| x[n].minus_8);
        nibbles(l, codes, x, &mut planes);
        let d = l.load_half(&scales.as_chunks().0[0]);
        for n in 0..N {
            totals[n] = l.mul_add(planes.total(l, n), l.mul(d, l.splat(x[n].d)), totals[n]);
        }
    }
    sums.iter_mut().zip(totals).for_each(|(sums, total)| l.store(total, sums));
}

#[inline(always)]
fn q4_1_body<L: Lanes, const N: usize>(l: L, tile: &[u8], x: &[Block], sums: &mut [Sums]) {
    let x = x.as_chunks::<N>().0;
    let mut totals = [l.splat(0.0); N];
    for (block, x) in tile.as_chunks::<Q4_1_BYTES>().0.iter().zip(x) {
        let (codes, scales) = block.split_at(256);
        let mut planes = Planes::<L, N>::new(l, |_| 0);
        nibbles(l, codes, x, &mut planes);
        let halves = scales.as_chunks::<32>().0;
        let (d, m) = (l.load_half(&halves[0]), l.load_half(&halves[1]));
        for n in 0..N {
            totals[n] = l.mul_add(planes.total(l, n), l.mul(d, l.splat(x[n].d)), totals[n]);
            totals[n] = l.mul_add(m, l.splat(x[n].sum), totals[n]);
        }
    }
    sums.iter_mut().zip(totals).for_each(|(sums, total)| l.store(total, sums));
}

#[inline(always)]
fn q8_0_body<L: Lanes, const N: usize>(l: L, tile: &[u8], x: &[Block], sums: &mut [Sums]) {
    let x = x.as_chunks::<N>().0;
    let mut totals = [l.splat(0.0); N];
    for (block, x) in tile.as_chunks::<Q8_0_BYTES>().0.iter().zip(x) {
        let (codes, scales) = block.split_at(512);
        let mut planes = Planes::<L, N>::new(l, |n| x[n].minus_128);
        for (g, codes) in codes.as_chunks::<64>().0.iter().enumerate() {
            planes.add(l.load_i(codes), x, g, l, L::dot_bytes);
        }
        let d = l.load_half(&scales.as_chunks().0[0]);
        for n in 0..N {
            totals[n] = l.mul_add(planes.total(l, n), l.mul(d, l.splat(x[n].d)), totals[n]);
        }
    }
    sums.iter_mut().zip(totals).for_each(|(sums, total)| l.store(total, sums));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::activations::{Rounding, round_row};
    use proptest::prelude::*;

    const FORMATS: [Format; 3] = [Format::Q8_0, Format::Q4_0, Format::Q4_1];

    /// A packed tile of 15 rows (the last is missing), and its rows decoded.
    fn weight(format: Format, blocks: usize, seed: &[f32]) -> (Vec<u8>, Vec<Vec<f32>>) {
        let cols = blocks * BLOCK;
        let (mut encoded, mut decoded) = (Vec::new(), Vec::new());
        for r in 0..TILE_ROWS - 1 {
            let row: Vec<f32> = (0..cols).map(|i| seed[(i * 7 + r * 13) % seed.len()] * (1.0 + r as f32)).collect();
            let mut bytes = vec![0; format.row_bytes(cols).unwrap()];
            sparsed_quant::encode(format, &row, &mut bytes).unwrap();
            let mut back = vec![0.0; cols];
            sparsed_quant::decode(format, &bytes, &mut back).unwrap();
            encoded.push(bytes);
            decoded.push(back);
        }
        let mut tile = vec![0xff; tile_bytes(format, cols)];
        pack_tile(format, cols, |r| encoded.get(r).map(|row| &row[..]), &mut tile);
        (tile, decoded)
    }

    #[test]
    fn keys_are_packed_as_weights_are_at_every_level() {
        for (blocks, n) in [(2, 16), (4, 16), (4, 9), (3, 16)] {
            let mut rows: Vec<Vec<u8>> = Vec::new();
            for r in 0..n {
                rows.push((0..34 * blocks).map(|i| u8::try_from((i * 7 + r * 31) % 251).unwrap()).collect());
            }
            let rows: Vec<&[u8]> = rows.iter().map(|row| &row[..]).collect();
            let cols = blocks * BLOCK;
            let mut expected = vec![0; tile_bytes(Format::Q8_0, cols)];
            pack_tile(Format::Q8_0, cols, |lane| rows.get(lane).copied(), &mut expected);
            for level in Level::all() {
                let mut found = vec![1; expected.len()];
                pack_keys(level, cols, &rows, &mut found);
                assert_eq!(found, expected, "{level:?}, {blocks} blocks, {n} rows");
            }
        }
    }

    proptest! {
        #[test]
        fn levels_and_token_counts_agree_bit_for_bit_and_are_close_to_f64(
            blocks in 1usize..6, seed in proptest::collection::vec(-1f32..1.0, 50..150), n in 1usize..=TOKENS_MAX,
        ) {
            for format in FORMATS {
                let (tile, decoded) = weight(format, blocks, &seed);
                let tokens: Vec<Vec<f32>> = (0..n)
                    .map(|t| (0..blocks * BLOCK).map(|i| seed[(i * 3 + t * 5) % seed.len()] * 4.0).collect())
                    .collect();
                let alone = |level, token: &[f32]| {
                    let (mut x, mut sums) = (vec![Block::default(); blocks], [[0.0; TILE_ROWS]]);
                    round_row(level, Rounding::Int16, token, &mut x);
                    product(level, format, &tile, &x, &mut sums);
                    sums[0]
                };
                for token in &tokens {
                    let scalar = alone(Level::Scalar, token);
                    for (row, found) in decoded.iter().zip(scalar) {
                        let exact: f64 = row.iter().zip(token).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        let size: f64 = row.iter().zip(token).map(|(w, x)| f64::from(*w * x).abs()).sum();
                        prop_assert!((f64::from(found) - exact).abs() <= 2e-4 * size + 1e-30, "{found} {exact}");
                    }
                    prop_assert_eq!(scalar[TILE_ROWS - 1], 0.0);
                }
                for level in Level::all() {
                    let together = tokens_at_once(level, n);
                    let mut x = vec![Block::default(); blocks * together];
                    for (t, token) in tokens[..together].iter().enumerate() {
                        let mut row = vec![Block::default(); blocks];
                        round_row(level, Rounding::Int16, token, &mut row);
                        row.into_iter().enumerate().for_each(|(b, block)| x[b * together + t] = block);
                    }
                    let mut sums = vec![[0.0; TILE_ROWS]; together];
                    product(level, format, &tile, &x, &mut sums);
                    for (token, sums) in tokens.iter().zip(&sums) {
                        prop_assert_eq!(alone(Level::Scalar, token).map(f32::to_bits), sums.map(f32::to_bits));
                    }
                }
            }
        }
    }
}
