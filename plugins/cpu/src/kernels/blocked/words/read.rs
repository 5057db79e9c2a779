//! How do 32 values of a stored row become words? Formats differ in where a value's power of two is.

use super::{PAIR, VALUE_BITS};
use crate::simd::{LANES, Words};

/// How 32 values of a row are read.
pub(super) trait Stored {
    /// Of 32 values, without what lies elsewhere.
    const BYTES: usize;
    /// What `row` has of a slice of `width` values: all, or from `group` slices on where a row is given whole.
    #[inline(always)]
    fn slice(row: &[u8], _width: usize, _group: usize) -> Slice<'_> {
        Slice { lines: row, powers: &[], before: 0 }
    }
    /// All magnitudes of a slice are below 2 to this power plus 1; nothing where one is infinite or no number.
    fn exponent<L: Words>(l: L, slice: Slice<'_>) -> Option<i32>;
    /// Line `line` of a slice, of `BYTES` bytes, as words in the low bits of lanes.
    fn words<L: Words>(l: L, bytes: &[u8], slice: Slice<'_>, line: usize, scale: Scale<L>) -> [L::I; 2];
}

#[derive(Clone, Copy)]
pub(super) struct Slice<'a> {
    /// Lines of values.
    pub(super) lines: &'a [u8],
    /// In F8_128 the powers of two, from that of the first line on.
    powers: &'a [u8],
    /// Lines before the slice that have the first of them.
    before: usize,
}

/// What words are made with.
#[derive(Clone, Copy)]
pub(super) struct Scale<L: Words> {
    /// Of the slice, or of a greater one in whose unit its words are.
    pub(super) exponent: i32,
    /// See [`magic`].
    pub(super) magic: L::F,
}

impl<L: Words> Scale<L> {
    /// Values of the slice as words.
    #[inline(always)]
    fn words(self, l: L, values: [L::F; 2]) -> [L::I; 2] {
        [l.bits(l.add(values[0], self.magic)), l.bits(l.add(values[1], self.magic))]
    }
}

/// Exponent of the largest scale of blocks of `bytes` bytes that begin with a half.
fn scales_exponent(blocks: &[u8], bytes: usize) -> Option<i32> {
    let scales = blocks.chunks_exact(bytes).map(|block| u16::from_le_bytes([block[0], block[1]]) & 0x7fff);
    half_exponent(scales.max().unwrap_or(0))
}

/// Exponent of a half's magnitude (as bits).
fn half_exponent(bits: u16) -> Option<i32> {
    let exponent = i32::from(bits >> 10);
    (exponent < 31).then(|| exponent.max(1) - 15)
}

pub(super) struct Halves;

impl Stored for Halves {
    const BYTES: usize = 2 * PAIR;

    #[inline(always)]
    fn exponent<L: Words>(l: L, slice: Slice<'_>) -> Option<i32> {
        let mut most = l.splat_i(0);
        for line in slice.lines.as_chunks().0 {
            most = l.max_magnitude_words(most, l.load_i(line));
        }
        let mut words = [0; LANES];
        l.store_i(most, &mut words);
        let largest = words.iter().fold(0, |most, pair: &i32| {
            let pair = pair.cast_unsigned();
            most.max(pair & 0xffff).max(pair >> 16)
        });
        half_exponent(u16::try_from(largest).expect("of 16 bits"))
    }

    #[inline(always)]
    fn words<L: Words>(l: L, bytes: &[u8], _: Slice<'_>, _: usize, scale: Scale<L>) -> [L::I; 2] {
        let halves = bytes.as_chunks().0;
        let values = [l.load_half(&halves[0]), l.load_half(&halves[1])];
        scale.words(l, values)
    }
}

/// Blocks of Q8_0: a half, then 32 signed bytes.
pub(super) struct Codes;

impl Stored for Codes {
    const BYTES: usize = 2 + PAIR;

    #[inline(always)]
    fn exponent<L: Words>(_: L, slice: Slice<'_>) -> Option<i32> {
        // A code is at most 128.
        scales_exponent(slice.lines, Self::BYTES).map(|exponent| exponent + 7)
    }

    #[inline(always)]
    fn words<L: Words>(l: L, block: &[u8], _: Slice<'_>, _: usize, scale: Scale<L>) -> [L::I; 2] {
        let d = l.splat(half::f16::from_le_bytes([block[0], block[1]]).to_f32());
        let codes = block[2..].as_chunks().0;
        let values = [l.mul(l.load_signed_bytes(&codes[0]), d), l.mul(l.load_signed_bytes(&codes[1]), d)];
        scale.words(l, values)
    }
}

/// Blocks of Q6_0: a half, then the upper two bits of 32 codes, then the lower four.
pub(super) struct Sixes;

impl Sixes {
    /// Both halves of a block's codes, a byte each, unpacked eight at a time.
    #[inline(always)]
    fn codes(block: &[u8]) -> [[u8; LANES]; 2] {
        const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;
        const UPPER: u64 = 0x3030_3030_3030_3030;
        let mut eights = [0; 3];
        for (eight, bytes) in eights.iter_mut().zip(block[2..].as_chunks().0) {
            *eight = u64::from_le_bytes(*bytes);
        }
        let [upper, a, b] = eights;
        let low = [a & NIBBLES | upper << 4 & UPPER, b & NIBBLES | upper & UPPER];
        let high = [a >> 4 & NIBBLES | upper << 2 & UPPER, b >> 4 & NIBBLES | upper >> 2 & UPPER];
        let bytes = |[a, b]: [u64; 2]| (u128::from(b) << 64 | u128::from(a)).to_le_bytes();
        [bytes(low), bytes(high)]
    }
}

impl Stored for Sixes {
    const BYTES: usize = 2 + PAIR / 4 + LANES;

    #[inline(always)]
    fn exponent<L: Words>(_: L, slice: Slice<'_>) -> Option<i32> {
        // A code less 32 is at most 32.
        scales_exponent(slice.lines, Self::BYTES).map(|exponent| exponent + 5)
    }

    #[inline(always)]
    fn words<L: Words>(l: L, block: &[u8], _: Slice<'_>, _: usize, scale: Scale<L>) -> [L::I; 2] {
        let d = l.splat(half::f16::from_le_bytes([block[0], block[1]]).to_f32());
        let ([low, high], offset) = (Self::codes(block), l.splat(32.0));
        let (low, high) = (l.sub(l.load_bytes(&low), offset), l.sub(l.load_bytes(&high), offset));
        scale.words(l, [l.mul(low, d), l.mul(high, d)])
    }
}

/// Rows of F8_128: codes, then a power of two for each four lines.
pub(super) struct Eights;

impl Eights {
    const LINES: usize = 128 / PAIR;
    const NO_NUMBER: u8 = 255;
    /// What is lower is zeros.
    const LEAST: u8 = 16;
    /// Magnitudes are below 2 to the power of 9 times a power of two, whose bias is 127.
    const TO_EXPONENT: i32 = 8 - 127;
}

impl Stored for Eights {
    const BYTES: usize = PAIR;

    #[inline(always)]
    fn slice(row: &[u8], width: usize, group: usize) -> Slice<'_> {
        let (codes, powers) = row.split_at(row.len() - row.len().div_ceil(Self::LINES * PAIR + 1));
        let (first, lines) = (group * width / PAIR, width / PAIR);
        let end = (first + lines).div_ceil(Self::LINES);
        let codes = &codes[first * PAIR..(first + lines) * PAIR];
        Slice { lines: codes, powers: &powers[first / Self::LINES..end], before: first % Self::LINES }
    }

    #[inline(always)]
    fn exponent<L: Words>(_: L, slice: Slice<'_>) -> Option<i32> {
        let most = slice.powers.iter().copied().fold(Self::LEAST, u8::max);
        (most < Self::NO_NUMBER).then(|| i32::from(most) + Self::TO_EXPONENT)
    }

    #[inline(always)]
    fn words<L: Words>(l: L, bytes: &[u8], slice: Slice<'_>, line: usize, scale: Scale<L>) -> [L::I; 2] {
        let power = slice.powers.get((slice.before + line) / Self::LINES).copied().unwrap_or(0);
        // From a 256th of a value to its word.
        let shift = i32::from(power) + Self::TO_EXPONENT + (VALUE_BITS - 1) - scale.exponent;
        let (factor, magic) = (l.splat(power_of_two(shift.max(-126))), l.splat(magic(VALUE_BITS - 1)));
        let codes = bytes.as_chunks().0;
        // Rounded once: what is added to is exact.
        let values = [l.load_e4m3(&codes[0]), l.load_e4m3(&codes[1])];
        [l.bits(l.mul_add(values[0], factor, magic)), l.bits(l.mul_add(values[1], factor, magic))]
    }
}

/// Adding it to a value of a slice of this exponent makes the value's word the low bits of the sum: the last bit of a
/// float of 1.5 times 2^(exponent + 10) is the word's unit.
pub(super) fn magic(exponent: i32) -> f32 {
    1.5 * power_of_two(exponent - (VALUE_BITS - 1) + 23)
}

/// 2 to a power from -126 to 127.
pub(super) fn power_of_two(power: i32) -> f32 {
    f32::from_bits(((power + 127) << 23).cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_quant::{Format, decode};

    #[test]
    fn every_code_of_q6_0_is_read_in_every_place_as_the_decoder_does() {
        for turn in 0..64 {
            let mut block = [0; Sixes::BYTES];
            block[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
            for (i, byte) in (0u8..).zip(&mut block[2..]) {
                *byte = (i * 37).wrapping_add(turn * 85);
            }
            let mut expected = [0.0; PAIR];
            decode(Format::Q6_0, &block, &mut expected).unwrap();
            let found = Sixes::codes(&block).map(|half| half.map(|code| f32::from(code) - 32.0));
            assert_eq!(found.concat(), expected);
        }
    }
}
