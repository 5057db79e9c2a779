//! How well do index keys match a query? Tiles of 16 keys of the pool (see `crate::keys`) against all heads.

use super::{Sums, TILE_ROWS, add_eight};
use crate::kernels::activations::{BLOCK, Block, Rounding};
use crate::level::Level;
use crate::simd::{Products, on_level};

/// Tiles of 16 keys as they lie in the pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyTiles<'a> {
    /// Bytes of a block's codes: 32 signed ones, or [`NIBBLES`] for two each.
    pub(crate) codes: usize,
    pub(crate) tiles: &'a [u8],
    /// Memory is asked for as many of these as there are tiles.
    pub(crate) ahead: &'a [u8],
}

/// Bytes of a block's codes in Q4_0.
pub(crate) const NIBBLES: usize = BLOCK / 2;

/// Bytes of 16 blocks of keys: codes, then scales.
pub(crate) const fn tile_block_bytes(codes: usize) -> usize {
    TILE_ROWS * (codes + 2)
}

/// Adds `w[h] max(q[h] . key, 0)` of every head h to the scores of 16 keys of each tile. `x` holds the heads' queries
/// as `rounding` says, a number of [`super::tokens_at_once`] with 16 bits, as `packed::product` wants them.
pub(crate) fn score_keys(
    level: Level,
    rounding: Rounding,
    keys: KeyTiles<'_>,
    x: &[Block],
    w: &[f32],
    scores: &mut [Sums],
) {
    macro_rules! choose {
        ($($n:literal)*) => {
            match (keys.codes, rounding, w.len()) {
                $(
                    (NIBBLES, Rounding::Int16, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<NIBBLES, 2, $n>(level, keys, x, w, scores);
                    }
                    (NIBBLES, Rounding::Int8, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<NIBBLES, 1, $n>(level, keys, x, w, scores);
                    }
                    (_, Rounding::Int16, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<BLOCK, 2, $n>(level, keys, x, w, scores);
                    }
                    (_, Rounding::Int8, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<BLOCK, 1, $n>(level, keys, x, w, scores);
                    }
                )*
                (_, _, n) => unreachable!("{n} heads: tokens_at_once was asked"),
            }
        };
    }
    choose! { 1 2 4 8 }
}

on_level! {
    /// CODES as in [`KeyTiles`], PLANES are the bytes of a query's value, N the number of heads.
    fn score_heads<const CODES: usize, const PLANES: usize, const N: usize>(
        keys: KeyTiles<'_>, x: &[Block], w: &[f32], scores: &mut [Sums],
    ) = score_body
}

#[inline(always)]
fn score_body<L: Products, const CODES: usize, const PLANES: usize, const N: usize>(
    l: L,
    keys: KeyTiles<'_>,
    x: &[Block],
    w: &[f32],
    scores: &mut [Sums],
) {
    let tile_bytes = x.len() / N * tile_block_bytes(CODES);
    let mut ahead = keys.ahead.chunks(tile_bytes);
    for (tile, scores) in keys.tiles.chunks_exact(tile_bytes).zip(scores) {
        for line in ahead.next().unwrap_or_default().chunks(64) {
            l.prefetch(&line[0]);
        }
        score_tile::<L, CODES, PLANES, N>(l, tile, x, w, scores);
    }
}

#[inline(always)]
fn score_tile<L: Products, const CODES: usize, const PLANES: usize, const N: usize>(
    l: L,
    tile: &[u8],
    x: &[Block],
    w: &[f32],
    scores: &mut Sums,
) {
    let mut totals = [l.splat(0.0); N];
    for (block, x) in tile.chunks_exact(tile_block_bytes(CODES)).zip(x.as_chunks::<N>().0) {
        let (codes, scales) = block.split_at(TILE_ROWS * CODES);
        let codes = codes.as_chunks::<64>().0;
        let mut products = [l.start::<PLANES>(0); N];
        if CODES == NIBBLES || L::BYTE_OFFSET == 128 {
            for n in 0..N {
                products[n] = l.start::<PLANES>(if CODES == NIBBLES { x[n].minus_8 } else { x[n].minus_128 });
            }
        }
        if CODES == NIBBLES {
            // Both halves of two vectors, then the next two's.
            for at in [0, 2, 1, 3] {
                add_eight::<L, PLANES, N>(l, 4, codes, at, x, &mut products);
            }
        }
        let bytes = if CODES == NIBBLES { &[] } else { codes.as_chunks::<2>().0 };
        for (at, [first, second]) in bytes.iter().enumerate() {
            let (mut first, mut second) = (l.load_i(first), l.load_i(second));
            if L::BYTE_OFFSET == 128 {
                (first, second) = (l.offset_bytes(first), l.offset_bytes(second));
            }
            let codes = l.codes::<PLANES>(first, second);
            for n in 0..N {
                products[n] = l.dot::<PLANES, false>(products[n], codes, &x[n].codes[at]);
            }
        }
        let d = l.load_half(&scales.as_chunks().0[0]);
        for n in 0..N {
            let sum = l.to_float(l.total::<PLANES>(products[n]));
            totals[n] = l.mul_add(sum, l.mul(d, l.splat(x[n].d)), totals[n]);
        }
    }
    let mut score = l.load(scores);
    for (total, w) in totals.into_iter().zip(w) {
        score = l.mul_add(l.splat(*w), l.max(l.splat(0.0), total), score);
    }
    l.store(score, scores);
}
