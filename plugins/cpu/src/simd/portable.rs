//! The lanes in portable Rust: the definition.

use super::products::BroadcastProducts;
use super::{E4M3_IN_HALF, LANES, Lanes, Words};
use half::f16;

/// No instructions beyond the target's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// `a b + c`, rounded once. In f64 the product has no rounding, and the sum one that can be found: where it has left
/// something out, its last bit is set to 1. 53 bits of which the last says "and more" round to 24 as all bits do.
/// Where the target has no instruction for it `f32::mul_add` is a call, and takes several times as long.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the one rounding")]
pub(crate) fn portable_mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        return a.mul_add(b, c);
    }
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let of_c = sum - product;
    let left_out = (product - (sum - of_c)) + (c - of_c); // a NaN where the sum is not finite
    let bits = sum.to_bits();
    let is_even_and_inexact = u64::from((left_out > 0.0) | (left_out < 0.0)) & !bits;
    // One up in magnitude where something of the sum's sign is left out, else one down: to an odd last bit.
    let step = if (left_out > 0.0) == (sum > 0.0) { 1 } else { u64::MAX };
    f64::from_bits(bits.wrapping_add(step.wrapping_mul(is_even_and_inexact))) as f32
}

type F = [f32; LANES];
type I = [i32; LANES];

#[inline(always)]
fn zip<T: Copy, U>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// See [`Lanes::split_bytes`].
#[inline(always)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the low byte is what is wanted")]
pub(super) fn split_bytes(low: &I, high: &I) -> ([u8; 2 * LANES], [u8; 2 * LANES]) {
    let value = |i: usize| if i < LANES { low[i] } else { high[i - LANES] };
    (std::array::from_fn(|i| ((value(i) + 128) >> 8) as u8), std::array::from_fn(|i| value(i) as u8))
}

impl Lanes for Portable {
    const REGISTERS: usize = 1;
    type F = F;
    type I = I;

    #[inline(always)]
    fn splat(self, v: f32) -> F {
        [v; LANES]
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> F {
        *v
    }
    #[inline(always)]
    fn store(self, v: F, to: &mut [f32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn load_half(self, v: &[u8; 2 * LANES]) -> F {
        std::array::from_fn(|i| f16::from_le_bytes([v[2 * i], v[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn load_bytes(self, v: &[u8; LANES]) -> F {
        v.map(f32::from)
    }
    #[inline(always)]
    fn load_signed_bytes(self, v: &[u8; LANES]) -> F {
        v.map(|v| f32::from(v.cast_signed()))
    }
    #[inline(always)]
    fn load_e4m3(self, v: &[u8; LANES]) -> F {
        v.map(|v| f16::from_bits((i16::from(v.cast_signed()) << 7 & E4M3_IN_HALF).cast_unsigned()).to_f32())
    }
    #[inline(always)]
    fn store_half(self, v: F, to: &mut [u8; 2 * LANES]) {
        for (to, v) in to.as_chunks_mut::<2>().0.iter_mut().zip(v) {
            *to = f16::from_f32(v).to_le_bytes();
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| portable_mul_add(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn fold(self, vectors: &[F; 4]) -> F {
        std::array::from_fn(|i| {
            let (v, i) = (&vectors[i / 4], i % 4);
            (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12])
        })
    }
    #[inline(always)]
    fn finish(self, folded: &[F; 4]) -> F {
        std::array::from_fn(|i| {
            let four = &folded[i % 4][i / 4 * 4..];
            (four[0] + four[2]) + (four[1] + four[3])
        })
    }

    #[inline(always)]
    fn splat_i(self, v: i32) -> I {
        [v; LANES]
    }
    #[inline(always)]
    fn load_i(self, v: &[u8; 4 * LANES]) -> I {
        std::array::from_fn(|i| i32::from_le_bytes([v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]]))
    }
    #[inline(always)]
    fn prefetch(self, _: &u8) {}
    #[inline(always)]
    fn store_i(self, v: I, to: &mut [i32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn max_i(self, a: I, b: I) -> I {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    fn offset_bytes(self, v: I) -> I {
        v.map(|v| (v.cast_unsigned() ^ 0x8080_8080).cast_signed())
    }
    #[inline(always)]
    fn above(self, a: F, b: F) -> u16 {
        (0..LANES).fold(0, |bits, i| bits | u16::from(a[i] > b[i]) << i)
    }
    #[inline(always)]
    fn high_nibbles(self, v: I) -> I {
        v.map(|v| v >> 4 & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn low_nibbles(self, v: I) -> I {
        v.map(|v| v & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn with_fifth_bit(self, nibbles: I, fifth: I, at: usize) -> I {
        zip(nibbles, fifth, |nibbles, fifth| nibbles | (fifth >> at & 0x0101_0101) << 4)
    }
    #[inline(always)]
    fn with_upper_bits(self, nibbles: I, upper: I, at: usize) -> I {
        zip(nibbles, upper, |nibbles, upper| nibbles | (upper >> (2 * at) & 0x0303_0303) << 4)
    }
    #[inline(always)]
    fn split_bytes(self, low: I, high: I) -> ([u8; 2 * LANES], [u8; 2 * LANES]) {
        split_bytes(&low, &high)
    }
    #[inline(always)]
    #[allow(clippy::cast_precision_loss, reason = "rounded to nearest, as the instruction does")]
    fn to_float(self, v: I) -> F {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "rounded first; callers stay in range")]
    fn round(self, v: F) -> I {
        v.map(|v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    fn magnitude_bits(self, v: F) -> I {
        v.map(|v| (v.to_bits() & 0x7fff_ffff).cast_signed())
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "an integer from -126 to 127 by contract")]
    fn power_of_two(self, v: F) -> F {
        v.map(|v| f32::from_bits(((v as i32 + 127) << 23).cast_unsigned()))
    }
    #[inline(always)]
    fn round_f(self, v: F) -> F {
        v.map(f32::round_ties_even)
    }
}

impl BroadcastProducts for Portable {
    #[inline(always)]
    fn dot_small(self, acc: I, w: I, x: I) -> I {
        self.dot_bytes(acc, w, x)
    }
    #[inline(always)]
    fn dot_bytes(self, acc: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            let products = w.iter().zip(x).map(|(w, x)| i32::from(*w) * i32::from(x.cast_signed()));
            products.fold(acc[i], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn shl_byte(self, v: I) -> I {
        v.map(|v| v << 8)
    }
}

/// The words of a lane, the low one first.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the low word is what is wanted")]
fn words(v: i32) -> [i16; 2] {
    [v as i16, (v >> 16) as i16]
}

impl Words for Portable {
    type Sums = I;

    #[inline(always)]
    fn load_ints(self, v: &[i32; LANES]) -> I {
        *v
    }
    #[inline(always)]
    fn bits(self, v: F) -> I {
        v.map(|v| v.to_bits().cast_signed())
    }
    #[inline(always)]
    fn pair_words(self, low: I, high: I) -> I {
        zip(low, high, |low, high| low & 0xffff | high << 16)
    }
    #[inline(always)]
    fn shift_right(self, v: I, by: i32) -> I {
        v.map(|v| v >> by)
    }
    #[inline(always)]
    fn max_magnitude_words(self, most: I, v: I) -> I {
        zip(most, v, |most, v| {
            let (most, v) = (most.cast_unsigned(), v.cast_unsigned() & 0x7fff_7fff);
            ((most & 0xffff).max(v & 0xffff) | (most & 0xffff_0000).max(v & 0xffff_0000)).cast_signed()
        })
    }
    #[inline(always)]
    fn begin(self, start: I) -> I {
        start
    }
    #[inline(always)]
    fn dot_words(self, sums: I, a: I, b: I) -> I {
        std::array::from_fn(|i| {
            let ([a0, a1], [b0, b1]) = (words(a[i]), words(b[i]));
            let product = |a, b| i32::from(a) * i32::from(b);
            sums[i].wrapping_add(product(a0, b0)).wrapping_add(product(a1, b1))
        })
    }
    #[inline(always)]
    fn end(self, sums: I) -> I {
        sums
    }
    #[inline(always)]
    fn fold_ints(self, vectors: &[I; 4]) -> I {
        std::array::from_fn(|i| {
            let (v, i) = (&vectors[i / 4], i % 4);
            [v[i + 4], v[i + 8], v[i + 12]].into_iter().fold(v[i], i32::wrapping_add)
        })
    }
    #[inline(always)]
    fn pair_up_ints(self, folded: &[I; 4]) -> [I; 2] {
        // Lanes 4 i .. 4 i + 4: the even and the odd sum of one vector's i-th quarter, then of the other's.
        let pair = |a: &I, b: &I| {
            std::array::from_fn(|i| {
                let (v, first) = (if i % 4 < 2 { a } else { b }, i / 4 * 4 + i % 2);
                v[first].wrapping_add(v[first + 2])
            })
        };
        [pair(&folded[0], &folded[1]), pair(&folded[2], &folded[3])]
    }
    #[inline(always)]
    fn finish_pairs(self, a: I, b: I) -> I {
        std::array::from_fn(|i| {
            let (v, first) = (if i % 4 < 2 { &a } else { &b }, i / 4 * 4 + i % 2 * 2);
            v[first].wrapping_add(v[first + 1])
        })
    }
    #[inline(always)]
    fn pack_words(self, a: I, b: I) -> I {
        std::array::from_fn(|i| {
            let (v, first) = (if i < LANES / 2 { &a } else { &b }, i % (LANES / 2) * 2);
            v[first] & 0xffff | v[first + 1] << 16
        })
    }
    #[inline(always)]
    fn zip_words(self, a: I, b: I) -> [I; 2] {
        let pair = |word: usize| {
            let of = |v: &I| v[word / 2] >> (word % 2 * 16) & 0xffff;
            of(&a) | of(&b) << 16
        };
        [std::array::from_fn(pair), std::array::from_fn(|i| pair(LANES + i))]
    }
    #[inline(always)]
    fn zipped_in_order(self, v: [F; 2]) -> [F; 2] {
        v
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "2^14 at most")]
    fn shift_words(self, v: I, by: i32) -> I {
        let half = ((1i32 << by) >> 1) as i16;
        let shift = |word: i16| i32::from(word.saturating_add(half) >> by);
        v.map(|v| {
            let [low, high] = words(v);
            shift(low) & 0xffff | shift(high) << 16
        })
    }
    #[inline(always)]
    fn as_float(self, v: I) -> F {
        v.map(|v| f32::from_bits(v.cast_unsigned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::bits;
    use fastrand::Rng;

    /// A number with an exponent near that of 1, and in some few bits set at the end: else sums are seldom halfway.
    fn near_one(random: &mut Rng) -> f32 {
        let fraction = random.u32(..1 << 23) & u32::MAX << random.u32(..23);
        f32::from_bits(u32::from(random.bool()) << 31 | random.u32(97..157) << 23 | fraction)
    }

    #[test]
    fn a_portable_multiplication_and_addition_is_rounded_once() {
        let mut random = Rng::with_seed(1);
        for case in 0..1_000_000 {
            // All there is, subnormal and infinite ones too; then such that meet in their last bits.
            let [a, b, c] = std::array::from_fn(|_| match case % 2 {
                0 => f32::from_bits(random.u32(..)),
                _ => near_one(&mut random),
            });
            let (found, expected) = (portable_mul_add(a, b, c), a.mul_add(b, c));
            assert_eq!(bits(&[found]), bits(&[expected]), "{a:e} {b:e} {c:e}: {found:e}, not {expected:e}");
        }
        assert_eq!(portable_mul_add(f32::MAX, 2.0, f32::NEG_INFINITY), f32::NEG_INFINITY);
        assert!(portable_mul_add(f32::INFINITY, 1.0, f32::NEG_INFINITY).is_nan());
    }
}
