//! Index keys as packed rows, and what becomes of their products.

use super::{Sums, TILE_ROWS, pack_tile};
use crate::kernels::activations::BLOCK;
use crate::level::Level;
use crate::simd::{LANES, Lanes, on_level};
use sparsed_quant::Format;

/// Bytes of 16 packed blocks of Q8_0.
const TILE_BYTES: usize = TILE_ROWS * (BLOCK + 2);

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
    for (pair, to) in to.as_chunks_mut::<{ 2 * TILE_BYTES }>().0.iter_mut().enumerate() {
        let (first, second) = to.split_at_mut(TILE_BYTES);
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
