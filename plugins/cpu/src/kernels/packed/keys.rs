//! How well do index keys match a query? Tiles of 16 keys of the pool (see `crate::keys`) against all heads.

use super::{Sums, TILE_ROWS};
use crate::kernels::activations::{BLOCK, Block, Rounding};
use crate::level::Level;
use crate::simd::{Products, on_level};

/// Bytes of 16 blocks of keys: codes, signed, then scales.
const TILE_BLOCK_BYTES: usize = TILE_ROWS * (BLOCK + 2);

/// Adds `w[h] max(q[h] . key, 0)` of every head h to the scores of 16 keys of each tile. `x` holds the heads' queries
/// as `rounding` says, a number of [`super::tokens_at_once`] with 16 bits, as `packed::product` wants them. Memory is
/// asked for as many tiles `ahead` meanwhile.
pub(crate) fn score_keys(
    level: Level,
    rounding: Rounding,
    tiles: &[u8],
    ahead: &[u8],
    x: &[Block],
    w: &[f32],
    scores: &mut [Sums],
) {
    macro_rules! choose {
        ($($n:literal)*) => {
            match (rounding, w.len()) {
                $(
                    (Rounding::Int16, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<2, $n>(level, tiles, ahead, x, w, scores);
                    }
                    (Rounding::Int8, $n) if const { super::is_compiled($n, 2) } => {
                        score_heads::<1, $n>(level, tiles, ahead, x, w, scores);
                    }
                )*
                (_, n) => unreachable!("{n} heads: tokens_at_once was asked"),
            }
        };
    }
    choose! { 1 2 4 8 }
}

on_level! {
    /// PLANES are the bytes of a query's value, N the number of heads.
    fn score_heads<const PLANES: usize, const N: usize>(
        tiles: &[u8], ahead: &[u8], x: &[Block], w: &[f32], scores: &mut [Sums],
    ) = score_body
}

#[inline(always)]
fn score_body<L: Products, const PLANES: usize, const N: usize>(
    l: L,
    tiles: &[u8],
    ahead: &[u8],
    x: &[Block],
    w: &[f32],
    scores: &mut [Sums],
) {
    let tile_bytes = x.len() / N * TILE_BLOCK_BYTES;
    let mut ahead = ahead.chunks(tile_bytes);
    for (tile, scores) in tiles.chunks_exact(tile_bytes).zip(scores) {
        for line in ahead.next().unwrap_or_default().chunks(64) {
            l.prefetch(&line[0]);
        }
        score_tile::<L, PLANES, N>(l, tile, x, w, scores);
    }
}

#[inline(always)]
fn score_tile<L: Products, const PLANES: usize, const N: usize>(
    l: L,
    tile: &[u8],
    x: &[Block],
    w: &[f32],
    scores: &mut Sums,
) {
    let mut totals = [l.splat(0.0); N];
    for (block, x) in tile.as_chunks::<TILE_BLOCK_BYTES>().0.iter().zip(x.as_chunks::<N>().0) {
        let (codes, scales) = block.split_at(TILE_ROWS * BLOCK);
        let mut products = [l.start::<PLANES>(0); N];
        if L::BYTE_OFFSET == 128 {
            for n in 0..N {
                products[n] = l.start::<PLANES>(x[n].minus_128);
            }
        }
        for (at, [first, second]) in codes.as_chunks::<64>().0.as_chunks::<2>().0.iter().enumerate() {
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
