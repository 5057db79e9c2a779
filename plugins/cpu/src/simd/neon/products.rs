//! What do the NEON levels multiply bytes with? Registers hold four codes of four rows each, or eight of two.
//!
//! The instructions of Armv8.2 and 8.6 are inline assembly: stable Rust does not have their intrinsics.

use super::{Base, Dotprod, I, I8mm, Neon};
use crate::simd::Products;
#[allow(clippy::wildcard_imports, reason = "intrinsics: their names say whose they are")]
use std::arch::aarch64::*;
use std::arch::asm;

/// Signed codes: of the first four values of 16 rows, of the other four; with `smmla` see [`beside`].
type Codes = [int8x16_t; 8];
/// Of the high bytes of 16 rows, of the low bytes; with `smmla` see [`dot_matrices`].
type Sums = [int32x4_t; 8];

#[inline(always)]
fn in_order(first: I, second: I) -> Codes {
    let all = [first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]];
    // SAFETY: NEON is part of the target.
    unsafe { all.map(|v| vreinterpretq_s8_s32(v)) }
}

#[inline(always)]
fn start_in_order(start: i32) -> Sums {
    // SAFETY: NEON is part of the target.
    let (high, low) = unsafe { (vdupq_n_s32(0), vdupq_n_s32(start)) };
    [high, high, high, high, low, low, low, low]
}

#[inline(always)]
fn total_in_order<const PLANES: usize>(sums: Sums) -> I {
    let mut total = [sums[4], sums[5], sums[6], sums[7]];
    if PLANES == 2 {
        for (total, high) in total.iter_mut().zip(sums) {
            // SAFETY: NEON is part of the target.
            *total = unsafe { vaddq_s32(vshlq_n_s32::<8>(high), *total) };
        }
    }
    total
}

#[inline(always)]
fn load(x: &[i32; 4]) -> int8x16_t {
    // SAFETY: NEON is part of the target; 16 bytes are read, which may lie anywhere.
    unsafe { vreinterpretq_s8_s32(vld1q_s32(x.as_ptr())) }
}

impl Products for Neon<Base> {
    const BYTE_OFFSET: u8 = 0;
    type Codes = Codes;
    type Sums = Sums;

    #[inline(always)]
    fn codes<const PLANES: usize>(self, first: I, second: I) -> Codes {
        in_order(first, second)
    }
    #[inline(always)]
    fn start<const PLANES: usize>(self, start: i32) -> Sums {
        start_in_order(start)
    }
    #[inline(always)]
    fn dot<const PLANES: usize, const SMALL: bool>(self, mut sums: Sums, codes: Codes, x: &[i32; 4]) -> Sums {
        for plane in 2 - PLANES..2 {
            // SAFETY: NEON is part of the target.
            let x = unsafe { [x[2 * plane], x[2 * plane + 1]].map(|four| vreinterpretq_s8_s32(vdupq_n_s32(four))) };
            for rows in 0..4 {
                let (sum, w) = (sums[4 * plane + rows], [codes[rows], codes[4 + rows]]);
                sums[4 * plane + rows] = if SMALL { widening_small(sum, w, x) } else { widening(sum, w, x) };
            }
        }
        sums
    }
    #[inline(always)]
    fn total<const PLANES: usize>(self, sums: Sums) -> I {
        total_in_order::<PLANES>(sums)
    }
}

/// Per lane: `sum` plus the products of its four bytes, of both registers. Bytes of `w` are from 0 to 63: four products
/// are at most 4 * 63 * 128, which is a word.
#[inline(always)]
fn widening_small(sum: int32x4_t, w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    // SAFETY: NEON is part of the target.
    unsafe {
        let low = vmlal_s8(vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0])), vget_low_s8(w[1]), vget_low_s8(x[1]));
        let high = vmlal_high_s8(vmull_high_s8(w[0], x[0]), w[1], x[1]);
        vpadalq_s16(sum, vpaddq_s16(low, high))
    }
}

/// As [`widening_small`] for any signed bytes: a word has room for one product.
#[inline(always)]
fn widening(sum: int32x4_t, w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    // SAFETY: NEON is part of the target.
    unsafe {
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0])));
        let low = vpadalq_s16(low, vmull_s8(vget_low_s8(w[1]), vget_low_s8(x[1])));
        let high = vpadalq_s16(vpaddlq_s16(vmull_high_s8(w[0], x[0])), vmull_high_s8(w[1], x[1]));
        vaddq_s32(sum, vpaddq_s32(low, high))
    }
}

impl Products for Neon<Dotprod> {
    const BYTE_OFFSET: u8 = 0;
    type Codes = Codes;
    type Sums = Sums;

    #[inline(always)]
    fn codes<const PLANES: usize>(self, first: I, second: I) -> Codes {
        in_order(first, second)
    }
    #[inline(always)]
    fn start<const PLANES: usize>(self, start: i32) -> Sums {
        start_in_order(start)
    }
    #[inline(always)]
    fn dot<const PLANES: usize, const SMALL: bool>(self, sums: Sums, codes: Codes, x: &[i32; 4]) -> Sums {
        // SAFETY: `self` proves that the CPU has `sdot`.
        unsafe { dot_lanes::<PLANES>(sums, codes, load(x)) }
    }
    #[inline(always)]
    fn total<const PLANES: usize>(self, sums: Sums) -> I {
        total_in_order::<PLANES>(sums)
    }
}

/// # Safety
/// The CPU has `sdot`.
#[inline(always)]
unsafe fn dot_lanes<const PLANES: usize>(mut sums: Sums, codes: Codes, x: int8x16_t) -> Sums {
    for rows in 0..4 {
        // SAFETY: the caller's contract.
        unsafe {
            if PLANES == 2 {
                sums[rows] = sdot::<0>(sums[rows], codes[rows], x);
                sums[rows] = sdot::<1>(sums[rows], codes[4 + rows], x);
            }
            sums[4 + rows] = sdot::<2>(sums[4 + rows], codes[rows], x);
            sums[4 + rows] = sdot::<3>(sums[4 + rows], codes[4 + rows], x);
        }
    }
    sums
}

/// Per lane: `sum` plus the products of its four bytes of `w` with the four bytes in lane LANE of `x`.
///
/// # Safety
/// The CPU has `sdot`.
#[inline(always)]
unsafe fn sdot<const LANE: u32>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the CPU has the instruction by the caller's contract.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x, lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl Products for Neon<I8mm> {
    const BYTE_OFFSET: u8 = 0;
    type Codes = Codes;
    type Sums = Sums;

    #[inline(always)]
    fn codes<const PLANES: usize>(self, first: I, second: I) -> Codes {
        if PLANES == 2 { beside(first, second) } else { in_order(first, second) }
    }
    #[inline(always)]
    fn start<const PLANES: usize>(self, start: i32) -> Sums {
        if PLANES == 2 { start_beside(start) } else { start_in_order(start) }
    }
    #[inline(always)]
    fn dot<const PLANES: usize, const SMALL: bool>(self, sums: Sums, codes: Codes, x: &[i32; 4]) -> Sums {
        // SAFETY: `self` proves that the CPU has `smmla` and `sdot`.
        unsafe { if PLANES == 2 { dot_matrices(sums, codes, load(x)) } else { dot_lanes::<1>(sums, codes, load(x)) } }
    }
    #[inline(always)]
    fn total<const PLANES: usize>(self, sums: Sums) -> I {
        if PLANES == 2 { total_beside(sums) } else { total_in_order::<1>(sums) }
    }
}

/// Eight codes of rows 2 r and 2 r + 1 in register r.
#[inline(always)]
fn beside(first: I, second: I) -> Codes {
    let mut codes = in_order(first, second);
    for (pair, (first, second)) in codes.as_chunks_mut::<2>().0.iter_mut().zip(first.into_iter().zip(second)) {
        // SAFETY: NEON is part of the target.
        *pair = unsafe { [vzip1q_s32(first, second), vzip2q_s32(first, second)].map(|v| vreinterpretq_s8_s32(v)) };
    }
    codes
}

/// Sums as [`dot_matrices`] has them.
#[inline(always)]
fn start_beside(start: i32) -> Sums {
    // SAFETY: NEON is part of the target.
    [unsafe { vzip1q_s32(vdupq_n_s32(0), vdupq_n_s32(start)) }; 8]
}

/// Adds the products of two rows (see [`beside`]) with eight high bytes, and with eight low bytes, in one instruction:
/// register r has the high and the low sum of row 2 r, then of row 2 r + 1.
///
/// # Safety
/// The CPU has `smmla`.
#[inline(always)]
unsafe fn dot_matrices(mut sums: Sums, codes: Codes, x: int8x16_t) -> Sums {
    for (sum, w) in sums.iter_mut().zip(codes) {
        // SAFETY: registers only; the CPU has the instruction by the caller's contract.
        unsafe {
            asm!(
                "smmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                sum = inout(vreg) *sum, w = in(vreg) w, x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    }
    sums
}

#[inline(always)]
fn total_beside(sums: Sums) -> I {
    // SAFETY: NEON is part of the target.
    let total = |a, b| unsafe { vaddq_s32(vshlq_n_s32::<8>(vuzp1q_s32(a, b)), vuzp2q_s32(a, b)) };
    [total(sums[0], sums[1]), total(sums[2], sums[3]), total(sums[4], sums[5]), total(sums[6], sums[7])]
}
