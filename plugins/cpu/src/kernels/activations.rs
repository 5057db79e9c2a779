//! Activations as integers: per block of 32 values a scale and codes of one or two bytes (OPS.md, LINEAR).

use crate::simd::{LANES, Lanes, on_level};

/// Values in a block.
pub(crate) const BLOCK: usize = 32;

/// 32 rounded activations, `x[i] = d (256 high[i] + low[i])`, bytes signed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Block {
    /// For eight values at a time: four high bytes, the other four, four low bytes, the other four.
    pub(crate) codes: [[i32; 4]; BLOCK / 8],
    /// The scale.
    pub(crate) d: f32,
    /// `d` times the sum of the codes: what a weight's minimum is multiplied with.
    pub(crate) sum: f32,
    /// -8 times the sum of the codes: what the offset of Q4_0 adds to a product.
    pub(crate) minus_8: i32,
    /// -128 times the sum of the codes: what the offset of packed Q8_0 adds.
    pub(crate) minus_128: i32,
    /// -32 times the sum of the codes of each half: what the offset of Q6_K adds.
    pub(crate) minus_32: [i32; 2],
}

impl Block {
    /// The high bytes alone, as codes of one byte.
    pub(crate) fn coarse(&self) -> Self {
        let sum: i32 = self.codes.iter().flat_map(|codes| &codes[..2]).map(signed_sum).sum();
        let d = 256.0 * self.d;
        #[allow(clippy::cast_precision_loss, reason = "a sum of 32 bytes")]
        let sum_float = sum as f32;
        Self {
            codes: self.codes.map(|[high, other, ..]| [0, 0, high, other]),
            d,
            sum: d * sum_float,
            minus_8: -8 * sum,
            minus_128: -128 * sum,
            minus_32: [0, 2]
                .map(|at| -32 * self.codes[at..at + 2].iter().flat_map(|c| &c[..2]).map(signed_sum).sum::<i32>()),
        }
    }

    /// What [`Self::coarse`] leaves out of each value.
    pub(crate) fn rest(&self) -> [f32; BLOCK] {
        let mut rest = [0.0; BLOCK];
        let low = self.codes.iter().flat_map(|codes| &codes[2..]).flat_map(|four| four.to_le_bytes());
        rest.iter_mut().zip(low).for_each(|(rest, low)| *rest = self.d * f32::from(low.cast_signed()));
        rest
    }
}

/// The sum of four signed bytes.
fn signed_sum(four: &i32) -> i32 {
    four.to_le_bytes().map(|byte| i32::from(byte.cast_signed())).iter().sum()
}

/// How finely activations are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// Codes up to 127: the low byte alone.
    Int8,
    /// Codes up to 32639 = 127 * 257, so that both bytes stay within -127 ..= 127 and -128 ..= 127.
    Int16,
}

impl Rounding {
    /// What an operator's attribute allows; `None`: nothing.
    pub(crate) fn allowed(attribute: i32) -> Option<Self> {
        match attribute {
            1 => Some(Self::Int8),
            2 => Some(Self::Int16),
            _ => None,
        }
    }

    const fn limit(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Int16 => 32639.0,
        }
    }
}

/// Rounds a row of whole blocks into every `step`-th block of `to`: scale = largest magnitude / limit, codes to nearest
/// even. A NaN or an infinity makes the scale of its block one; values below some 4e-34 become zeros.
pub(crate) fn round_row(level: crate::level::Level, rounding: Rounding, x: &[f32], to: &mut [Block], step: usize) {
    round_blocks(level, rounding.limit(), x, to, step);
}

on_level! {
    fn round_blocks(limit: f32, x: &[f32], to: &mut [Block], step: usize) = round_body
}

#[inline(always)]
fn round_body<L: Lanes>(l: L, limit: f32, x: &[f32], to: &mut [Block], step: usize) {
    for (x, to) in x.as_chunks::<BLOCK>().0.iter().zip(to.iter_mut().step_by(step)) {
        let (halves, _) = x.as_chunks::<LANES>();
        let (a, b) = (l.load(&halves[0]), l.load(&halves[1]));
        let mut lanes = [0; LANES];
        l.store_i(l.max_i(l.magnitude_bits(a), l.magnitude_bits(b)), &mut lanes);
        let largest = f32::from_bits(lanes.into_iter().fold(0, i32::max).cast_unsigned());
        to.d = largest / limit;
        // Of smaller values the inverse is none, and the scale no number of full precision: they are zeros.
        let inverse = l.splat(if largest > limit * f32::MIN_POSITIVE { limit / largest } else { 0.0 });
        let (a, b) = (l.round(l.mul(a, inverse)), l.round(l.mul(b, inverse)));
        let (high, low) = l.split_bytes(a, b);
        let (high, low) = (dwords(&high), dwords(&low));
        to.codes = std::array::from_fn(|j| [high[2 * j], high[2 * j + 1], low[2 * j], low[2 * j + 1]]);
        // A closure would be compiled without the level's instructions.
        let mut sums = [0_i32; 2];
        for (sum, half) in sums.iter_mut().zip([a, b]) {
            l.store_i(half, &mut lanes);
            *sum = lanes.into_iter().fold(0, i32::wrapping_add);
        }
        let sum = sums[0].wrapping_add(sums[1]);
        #[allow(clippy::cast_precision_loss, reason = "rounded to nearest, the same at every level")]
        let sum_float = sum as f32;
        to.sum = to.d * sum_float;
        to.minus_8 = sum.wrapping_mul(-8);
        to.minus_128 = sum.wrapping_mul(-128);
        to.minus_32 = sums.map(|sum| sum.wrapping_mul(-32));
    }
}

#[inline(always)]
fn dwords(bytes: &[u8; BLOCK]) -> [i32; BLOCK / 4] {
    std::array::from_fn(|i| i32::from_le_bytes(bytes.as_chunks::<4>().0[i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::inputs::{cases, values};
    use crate::level::Level;
    use proptest::prelude::*;

    fn codes(block: &Block) -> Vec<i32> {
        let signed = |four: &i32| four.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
        let eight = |codes: &[i32; 4]| {
            let bytes: Vec<i32> = codes.iter().flat_map(signed).collect();
            (0..8).map(move |i| 256 * bytes[i] + bytes[8 + i])
        };
        block.codes.iter().flat_map(eight).collect()
    }

    proptest! {
        #![proptest_config(cases(256))]
        /// Nearest but for the rounding of 1 / scale: 0.51 of it.
        #[test]
        fn codes_are_the_nearest_and_the_same_at_every_level(inputs in values(100.0), power in -20i32..20) {
            let x: Vec<f32> = inputs.rows()(BLOCK).iter().map(|v| v * 2f32.powi(power)).collect();
            for (rounding, limit) in [(Rounding::Int8, 127), (Rounding::Int16, 32639)] {
                let mut scalar = [Block::default()];
                round_row(Level::Scalar, rounding, &x, &mut scalar, 1);
                let q = codes(&scalar[0]);
                prop_assert!(q.iter().all(|q| q.abs() <= limit));
                prop_assert_eq!(scalar[0].minus_8, -8 * q.iter().sum::<i32>());
                prop_assert_eq!(scalar[0].minus_32[1], -32 * q[BLOCK / 2..].iter().sum::<i32>());
                for (x, q) in x.iter().zip(&q) {
                    let back = f64::from(scalar[0].d) * f64::from(*q);
                    prop_assert!((back - f64::from(*x)).abs() <= f64::from(scalar[0].d) * 0.51, "{x} became {back}");
                }
                for level in Level::all() {
                    let mut found = [Block::default()];
                    round_row(level, rounding, &x, &mut found, 1);
                    prop_assert_eq!(found, scalar);
                }
            }
        }

        #[test]
        fn high_bytes_and_what_they_leave_out_are_the_whole(inputs in values(100.0)) {
            let mut block = [Block::default()];
            round_row(Level::detect(), Rounding::Int16, &inputs.rows()(BLOCK), &mut block, 1);
            let (coarse, rest) = (block[0].coarse(), block[0].rest());
            // A block of one byte has zeros where two bytes have the high ones.
            let high = codes(&coarse);
            for ((code, high), rest) in codes(&block[0]).into_iter().zip(&high).zip(rest) {
                prop_assert_eq!(block[0].d * (code - 256 * high) as f32, rest);
                prop_assert!((code - 256 * high).abs() <= 128);
            }
            let sum = high.iter().sum::<i32>();
            prop_assert_eq!((coarse.d, coarse.sum), (256.0 * block[0].d, coarse.d * sum as f32));
            prop_assert_eq!((coarse.minus_128, coarse.minus_8), (-128 * sum, -8 * sum));
            prop_assert_eq!(coarse.minus_32.iter().sum::<i32>(), -32 * sum);
        }
    }

    #[test]
    fn values_too_small_for_a_scale_are_zeros_at_every_level() {
        for level in Level::all() {
            for largest in [1e-45, 1e-39, f32::MIN_POSITIVE, 1e-37] {
                for (rounding, limit) in [(Rounding::Int8, 127.0), (Rounding::Int16, 32639.0)] {
                    let (mut block, mut x) = ([Block::default()], [largest; BLOCK]);
                    x[3] = -largest;
                    round_row(level, rounding, &x, &mut block, 1);
                    let is_zero = largest <= limit * f32::MIN_POSITIVE;
                    let expected = if is_zero { 0 } else { limit as i32 };
                    assert_eq!(codes(&block[0])[0], expected, "{level:?}, {largest}");
                    assert_eq!(codes(&block[0])[3], -expected);
                }
            }
        }
    }

    #[test]
    fn a_nan_is_not_rounded_away() {
        for level in Level::all() {
            let mut block = [Block::default()];
            let mut x = [1.0; BLOCK];
            x[17] = f32::NAN;
            round_row(level, Rounding::Int16, &x, &mut block, 1);
            assert!(block[0].d.is_nan());
        }
    }
}
