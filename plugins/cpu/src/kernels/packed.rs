//! Products of block-quantised weights with rounded activations: 16 rows of the weight at a time.
//!
//! A weight is laid out anew ("packed", see [`layout`]) so that one vector holds the same codes of 16 rows. Per block
//! of 32 values the integer sum is exact (of Q6_K per 16 values, which have a scale each); sums of blocks are added in
//! f32 from the first block to the last, so that a value's bits depend on its row and its activations only, and are the
//! same at every level.

mod keys;
mod layout;
#[cfg(test)]
mod tests;

pub(crate) use keys::{KeyTiles, NIBBLES, score_keys, tile_block_bytes};
pub(crate) use layout::{TILE_ROWS, can_pack, pack_tile, tile_bytes};

use super::activations::{Block, Rounding};
use crate::level::Level;
use crate::simd::{Lanes, Products, on_level};
use layout::Layout;
use sparsed_quant::Format;
use std::ops::Range;

/// Most tokens that go through a tile together.
pub(crate) const TOKENS_MAX: usize = 8;

/// Sums of one token with 16 rows.
pub(crate) type Sums = [f32; TILE_ROWS];

/// How many of `left` tokens the level takes through a tile together: as many as have room for their sums in registers.
pub(crate) fn tokens_at_once(level: Level, rounding: Rounding, left: usize) -> usize {
    let sizes: &[usize] = match (level, rounding) {
        (Level::Avx512, _) => &[8, 4, 2],
        (Level::Avx2 | Level::Neon | Level::Dotprod | Level::I8mm, Rounding::Int8) => &[4, 2],
        _ => &[2],
    };
    sizes.iter().copied().find(|&n| n <= left).unwrap_or(1)
}

/// `rows` in the groups that go through a tile together, one after another.
pub(crate) fn groups_at_once(
    level: Level,
    rounding: Rounding,
    mut rows: Range<usize>,
) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        let first = rows.start;
        rows.start += if rows.is_empty() { return None } else { tokens_at_once(level, rounding, rows.len()) };
        Some(first..rows.start)
    })
}

/// What [`tokens_at_once`] never says on this architecture is not compiled.
const fn is_compiled(tokens: usize, planes: usize) -> bool {
    cfg!(not(target_arch = "aarch64")) || tokens * planes <= 4
}

/// `sums[n][r] = row r . token n` for a tile. `x` holds `sums.len()` tokens, a number of [`tokens_at_once`], rounded as
/// `rounding` says, block by block: all tokens' first blocks, then all second ones.
pub(crate) fn product(level: Level, format: Format, rounding: Rounding, tile: &[u8], x: &[Block], sums: &mut [Sums]) {
    macro_rules! choose {
        ($($format:ident: $($n:literal)*;)*) => {
            match (format, rounding, sums.len()) {
                $($(
                    (Format::$format, Rounding::Int16, $n) if const { is_compiled($n, 2) } => {
                        multiply::<{ Format::$format as u32 }, 2, $n>(level, tile, x, sums);
                    }
                    (Format::$format, Rounding::Int8, $n) if const { is_compiled($n, 1) } => {
                        multiply::<{ Format::$format as u32 }, 1, $n>(level, tile, x, sums);
                    }
                )*)*
                (format, _, n) => {
                    unreachable!("{n} tokens and {}: can_pack and tokens_at_once were asked", format.name())
                }
            }
        };
    }
    choose! {
        Q4_0: 1 2 4 8; Q4_1: 1 2 4 8; Q5_0: 1 2 4 8; Q5_1: 1 2 4 8; Q8_0: 1 2 4 8;
        Q4_K: 1 2 4 8; Q5_K: 1 2 4 8; Q6_K: 1 2 4 8;
    }
}

on_level! {
    /// FORMAT is a [`Format`], PLANES the bytes of an activation, N the number of tokens.
    fn multiply<const FORMAT: u32, const PLANES: usize, const N: usize>(tile: &[u8], x: &[Block], sums: &mut [Sums])
        = multiply_body
}

/// The layout of the format with this number.
const fn layout_of(format: u32) -> Layout {
    const FORMATS: [Format; 8] = [
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
    ];
    let mut i = 0;
    while FORMATS[i] as u32 != format {
        i += 1;
    }
    Layout::of(FORMATS[i]).expect("each of these is packed")
}

/// The codes of values 4 at .. 4 at + 4 of 16 rows.
#[inline(always)]
fn four_codes<L: Products>(l: L, bits: usize, codes: &[[u8; 64]], at: usize) -> L::I {
    if bits == 8 {
        let codes = l.load_i(&codes[at]);
        return if L::BYTE_OFFSET == 128 { codes } else { l.offset_bytes(codes) };
    }
    let nibbles = l.load_i(&codes[at % 4]);
    let nibbles = if at < 4 { l.low_nibbles(nibbles) } else { l.high_nibbles(nibbles) };
    match bits {
        5 => l.with_fifth_bit(nibbles, l.load_i(&codes[4]), at),
        6 => l.with_upper_bits(nibbles, l.load_i(&codes[4 + at / 4]), at % 4),
        _ => nibbles,
    }
}

/// Adds the products of the codes of values 8 at .. 8 at + 8 to the integer sums of N tokens.
#[inline(always)]
fn add_eight<L: Products, const PLANES: usize, const N: usize>(
    l: L,
    bits: usize,
    codes: &[[u8; 64]],
    at: usize,
    x: &[Block; N],
    sums: &mut [L::Sums; N],
) {
    let (first, second) = (four_codes(l, bits, codes, 2 * at), four_codes(l, bits, codes, 2 * at + 1));
    let codes = l.codes::<PLANES>(first, second);
    for (sums, x) in sums.iter_mut().zip(x) {
        let x = &x.codes[at];
        *sums =
            if bits == 8 { l.dot::<PLANES, false>(*sums, codes, x) } else { l.dot::<PLANES, true>(*sums, codes, x) };
    }
}

#[inline(always)]
fn multiply_body<L: Products, const FORMAT: u32, const PLANES: usize, const N: usize>(
    l: L,
    tile: &[u8],
    x: &[Block],
    sums: &mut [Sums],
) {
    let layout = const { layout_of(FORMAT) };
    let block_bytes = layout.code_bytes() + layout.scale_bytes;
    let groups = x.as_chunks::<N>().0.chunks_exact(layout.group_blocks());
    let mut totals = [l.splat(0.0); N];
    for (group, x) in tile.chunks_exact(layout.group_bytes()).zip(groups) {
        let (head, blocks) = group.split_at(layout.head_bytes);
        for (block, x) in blocks.chunks_exact(block_bytes).zip(x) {
            let (codes, scales) = block.split_at(layout.code_bytes());
            let codes = codes.as_chunks::<64>().0;
            if FORMAT == Format::Q6_K as u32 {
                add_q6_k::<L, PLANES, N>(l, codes, scales, head, x, &mut totals);
                continue;
            }
            let mut products = [l.start::<PLANES>(0); N];
            for n in 0..N {
                products[n] = l.start::<PLANES>(if FORMAT == Format::Q4_0 as u32 {
                    x[n].minus_8
                } else if FORMAT == Format::Q5_0 as u32 {
                    x[n].minus_8.wrapping_mul(2)
                } else if FORMAT == Format::Q8_0 as u32 && L::BYTE_OFFSET == 128 {
                    x[n].minus_128
                } else {
                    0
                });
            }
            for i in 0..4 {
                // Both halves of two vectors of nibbles, then the next two's.
                let at = if layout.bits == 8 { i } else { i / 2 + i % 2 * 2 };
                add_eight::<L, PLANES, N>(l, layout.bits, codes, at, x, &mut products);
            }
            let (d, minimum) = scales_of(l, layout, scales, head);
            for n in 0..N {
                let product = l.to_float(l.total::<PLANES>(products[n]));
                totals[n] = l.mul_add(product, l.mul(d, l.splat(x[n].d)), totals[n]);
                if let Some(minimum) = minimum {
                    totals[n] = l.mul_add(minimum, l.splat(x[n].sum), totals[n]);
                }
            }
        }
    }
    sums.iter_mut().zip(totals).for_each(|(sums, total)| l.store(total, sums));
}

/// What a block's codes are multiplied with, and what is added to each if the format has it.
#[inline(always)]
fn scales_of<L: Lanes>(l: L, layout: Layout, scales: &[u8], head: &[u8]) -> (L::F, Option<L::F>) {
    if layout.head_bytes == 0 {
        let halves = scales.as_chunks::<32>().0;
        return (l.load_half(&halves[0]), (layout.scale_bytes == 64).then(|| l.load_half(&halves[1])));
    }
    let (halves, bytes) = (head.as_chunks::<32>().0, scales.as_chunks::<16>().0);
    let minimum = l.mul(l.load_half(&halves[1]), l.load_bytes(&bytes[1]));
    (l.mul(l.load_half(&halves[0]), l.load_bytes(&bytes[0])), Some(l.sub(l.splat(0.0), minimum)))
}

/// A block of Q6_K: a sum and a scale for each half.
#[inline(always)]
fn add_q6_k<L: Products, const PLANES: usize, const N: usize>(
    l: L,
    codes: &[[u8; 64]],
    scales: &[u8],
    head: &[u8],
    x: &[Block; N],
    totals: &mut [L::F; N],
) {
    let d = l.load_half(&head.as_chunks::<32>().0[0]);
    for half in 0..2 {
        let mut products = [l.start::<PLANES>(0); N];
        for n in 0..N {
            products[n] = l.start::<PLANES>(x[n].minus_32[half]);
        }
        for at in 2 * half..2 * half + 2 {
            add_eight::<L, PLANES, N>(l, 6, codes, at, x, &mut products);
        }
        let d = l.mul(d, l.load_signed_bytes(&scales.as_chunks::<16>().0[half]));
        for n in 0..N {
            let product = l.to_float(l.total::<PLANES>(products[n]));
            totals[n] = l.mul_add(product, l.mul(d, l.splat(x[n].d)), totals[n]);
        }
    }
}
